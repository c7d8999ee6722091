"""Lazy, priced access to the datamodels release and to any other catalogued arrays."""
