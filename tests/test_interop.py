"""dask and xarray read the same numbers through the same transport."""

import warnings

import numpy as np
import pytest

import dmdata


@pytest.fixture
def stored(tmp_path):
    values = np.arange(600, dtype="float16").reshape(60, 10)
    np.save(tmp_path / "x.npy", values)
    return values, dmdata.open(tmp_path / "x.npy")


def test_a_dask_array_reads_only_what_it_computes(s3):
    dask_array = pytest.importorskip("dask.array")
    values = np.arange(600, dtype="float16").reshape(60, 10)
    s3.put("cifar/data/test_margins_50pct.npy", _npy(values))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dmdata.CatalogMismatchWarning)
        lazy = dmdata.open("cifar/50pct/test_margins")
    array = lazy.to_dask(chunks=(20, 10))
    assert isinstance(array, dask_array.Array)
    assert array.dtype == values.dtype
    s3.reset_log()
    np.testing.assert_array_equal(array[20:40].compute(scheduler="threads"), values[20:40])
    assert s3.n_bytes == 20 * 10 * 2
    np.testing.assert_array_equal(array.sum(axis=1).compute(), values.sum(axis=1))


def test_an_xarray_has_the_dimensions_of_the_catalog(stored):
    pytest.importorskip("xarray")
    values, lazy = stored
    array = lazy.to_xarray()
    assert array.dims == lazy.dims
    np.testing.assert_array_equal(array.isel(dim_0=slice(3, 7)).values, values[3:7])


def _npy(values):
    import io

    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()
