"""What other libraries find by entry points: ``dmdata://`` for fsspec and ``engine="dmdata"`` for xarray."""
