"""Catalogs in the forms that other tools read: Croissant, Intake, Data Package.

Each form is a pure function of a catalog; `export.py` chooses one. Nothing is read but the catalog, and nothing is
stated that it does not say: what a form has no field for is in keys of our own, and said in words in the description.
"""
