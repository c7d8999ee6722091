"""A lazy array as other libraries know arrays: a read-only Zarr store, dask, xarray, NumPy's and torch's protocols."""
