"""Lazy arrays for dask and xarray, reading through the same budgeted transport.

Both are optional: nothing here imports them until it is called.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from dmdata.errors import DmdataError
from dmdata.mirror import Readable

if TYPE_CHECKING:
    import dask.array
    import xarray

_BLOCK_BYTES = 64 << 20


def to_dask(array: Readable, chunks: Any = None) -> "dask.array.Array":
    """Wrap a lazy array as a dask array.

    Parameters
    ----------
    array : LazyArray
    chunks : anything dask takes, optional
        By default blocks of whole rows of about 64 MiB, which is how the bytes lie.

    Raises
    ------
    DmdataError
        If dask is not installed.
    """
    try:
        import dask.array
    except ImportError as error:
        raise DmdataError("dask is not installed; pip install 'dmdata[dask]'") from error
    if chunks is None:
        row_bytes = max(math.prod(array.shape[1:]) * array.dtype.itemsize, 1)
        chunks = (max(_BLOCK_BYTES // row_bytes, 1), *array.shape[1:])[: len(array.shape)]
    meta = np.empty((0,) * len(array.shape), array.dtype)
    lazy: dask.array.Array = dask.array.from_array(  # type: ignore[no-untyped-call] # dask ships partial types
        array, chunks=chunks, meta=meta, name=False, asarray=False, inline_array=True
    )
    return lazy


def to_xarray(array: Readable, chunks: Any = None) -> "xarray.DataArray":
    """Wrap a lazy array as an xarray DataArray over dask, with its dimensions named.

    Raises
    ------
    DmdataError
        If xarray or dask is not installed.
    """
    try:
        import xarray
    except ImportError as error:
        raise DmdataError("xarray is not installed; pip install 'dmdata[xarray]'") from error
    return xarray.DataArray(to_dask(array, chunks), dims=array.dims, name=array.name)
