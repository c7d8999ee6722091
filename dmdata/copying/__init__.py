"""Copies that resume: downloads of an object as it is, and mirrors into Zarr stores, here or on a cluster."""
