"""What a catalog lists is opened without a request; its header comes with the first elements and is believed."""

import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers.loopback import LoopbackS3
from small_release import Pt, npy, pt, publish

import dmdata
from dmdata.errors import BudgetError, ObjectMissingError, SelectionError

NAME = "toy/50pct/test_margins"
PT = "toy/50pct/test_datamodels"
KEY = "toy/data/test_margins_50pct.npy"
VALUES = np.arange(60, dtype=np.float16).reshape(12, 5)
LONG = np.arange(40_000, dtype=np.float32).reshape(400, 100)


@pytest.fixture
def catalog(s3: LoopbackS3, tmp_path: Path) -> str:
    members = {"weight": LONG, "bias": LONG[0]}
    return publish(s3, {NAME: VALUES, "toy/50pct/train_masks": LONG, PT: Pt(pt(members), members)}, tmp_path)


@pytest.mark.parametrize("name", [NAME, f"{PT}/weight"])
def test_shape_dims_price_and_repr_need_no_request_and_no_credentials(
    s3: LoopbackS3, catalog: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in s3.env:
        monkeypatch.delenv(variable)
    with dmdata.budget(usd=0):
        array = dmdata.open(name, catalog=catalog)
        assert (array.shape, array.dtype) in (((12, 5), np.float16), ((400, 100), np.float32))
        assert array.dims == ("dim_0", "dim_1") or array.dims[0] == "model"
        assert array.estimate(np.s_[:3]).usd > 0
        assert name in repr(array)
        assert len(array) == array.shape[0]
    assert s3.n_requests == 0


def test_the_header_comes_in_the_request_of_the_elements_behind_it(s3: LoopbackS3, catalog: str) -> None:
    array = dmdata.open(NAME, catalog=catalog)
    price = array.estimate(np.s_[2:4])
    np.testing.assert_array_equal(array[2:4], VALUES[2:4])
    assert [request.range for request in s3.log] == ["bytes=0-167"]
    spent = dmdata.spend()
    assert (spent.n_bytes, spent.n_requests) == (price.n_bytes, price.n_requests) == (168, 1)
    np.testing.assert_array_equal(array[2:4], VALUES[2:4])
    assert s3.n_requests == 1, "what came along was kept as what is read is"
    np.testing.assert_array_equal(dmdata.open(NAME, catalog=catalog)[...], VALUES)
    assert s3.n_requests == 2


def test_elements_far_behind_the_header_take_a_request_of_their_own(s3: LoopbackS3, catalog: str) -> None:
    array = dmdata.open("toy/50pct/train_masks", catalog=catalog)
    price = array.estimate(np.s_[300])
    np.testing.assert_array_equal(array[300], LONG[300])
    assert [request.range for request in s3.log] == ["bytes=0-127", f"bytes={128 + 300 * 400}-{127 + 301 * 400}"]
    spent = dmdata.spend()
    assert (spent.n_bytes, spent.n_requests) == (price.n_bytes, price.n_requests) == (528, 2)


def test_a_read_over_the_budget_fails_before_the_header(s3: LoopbackS3, catalog: str) -> None:
    array = dmdata.open("toy/50pct/train_masks", catalog=catalog)
    with dmdata.budget(usd=array.estimate(np.s_[300:, 3]).usd * 0.9), pytest.raises(BudgetError):
        array[300:, 3]
    assert s3.n_requests == 0


@pytest.mark.parametrize("true", [VALUES[:7], np.concatenate([VALUES, VALUES]), VALUES.T.copy(), VALUES[0]])
def test_where_the_header_says_otherwise_it_is_believed_and_both_are_named(
    s3: LoopbackS3, catalog: str, true: np.ndarray
) -> None:
    s3.put(KEY, npy(true))
    array = dmdata.open(NAME, catalog=catalog)
    assert array.shape == VALUES.shape
    with pytest.warns(dmdata.CatalogMismatchWarning, match=r"\(12, 5\).*is believed"):
        np.testing.assert_array_equal(array[...], true)
    assert (array.shape, array.ndim, len(array.dims)) == (true.shape, true.ndim, true.ndim)
    np.testing.assert_array_equal(array[-1], true[-1])


@pytest.mark.parametrize("true", [VALUES.astype(np.float32), np.asfortranarray(VALUES)])
def test_elements_that_lie_otherwise_than_a_catalog_can_say_are_read_right(
    s3: LoopbackS3, catalog: str, true: np.ndarray, recwarn: pytest.WarningsRecorder
) -> None:
    s3.put(KEY, npy(true))
    array = dmdata.open(NAME, catalog=catalog)
    got = array[1:3, 2:]
    np.testing.assert_array_equal(got, true[1:3, 2:])
    assert got.dtype == array.dtype == true.dtype
    assert bool(recwarn.list) == (true.dtype != VALUES.dtype)


def test_a_selection_made_of_a_false_claim_is_refused(s3: LoopbackS3, catalog: str) -> None:
    xarray = pytest.importorskip("xarray")
    from dmdata.plugins.xarray_engine import DmdataBackendEntrypoint

    s3.put(KEY, npy(VALUES[:7]))
    others = ["train_masks", "test_datamodels_weight", "test_datamodels_bias"]
    dataset = xarray.open_dataset("toy/50pct", engine=DmdataBackendEntrypoint, catalog=catalog, drop_variables=others)
    assert s3.n_requests == 0
    with pytest.warns(dmdata.CatalogMismatchWarning), pytest.raises(SelectionError, match=r"\(7, 5\).*\(12, 5\)"):
        dataset["test_margins"][:2].load()
    with pytest.raises(SelectionError, match=r"\(7, 5\)"):
        dataset["test_margins"][:2].load()


def test_a_dtype_that_xarray_was_told_wrongly_is_refused(s3: LoopbackS3, catalog: str) -> None:
    xarray = pytest.importorskip("xarray")
    from dmdata.plugins.xarray_engine import DmdataBackendEntrypoint

    s3.put(KEY, npy(VALUES.astype(np.float64)))
    others = ["train_masks", "test_datamodels_weight", "test_datamodels_bias"]
    dataset = xarray.open_dataset("toy/50pct", engine=DmdataBackendEntrypoint, catalog=catalog, drop_variables=others)
    with pytest.warns(dmdata.CatalogMismatchWarning), pytest.raises(SelectionError, match="float64"):
        dataset["test_margins"][:2].load()
    with pytest.raises(SelectionError, match="float64"):
        dataset["test_margins"][:2].load()


def test_of_many_threads_one_reads_the_header(s3: LoopbackS3, catalog: str) -> None:
    array = dmdata.open("toy/50pct/train_masks", catalog=catalog)
    got: list[bool] = []
    s3.latency_seconds = 0.05

    def read(row: int) -> None:
        got.append(np.array_equal(array[row], LONG[row]))

    threads = [threading.Thread(target=read, args=(row,)) for row in range(100, 116)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [True] * 16
    assert [request.range for request in s3.log].count("bytes=0-127") == 1


def test_views_and_mirrors_know_the_header(s3: LoopbackS3, catalog: str, tmp_path: Path) -> None:
    pytest.importorskip("dask")
    s3.put(KEY, npy(np.asfortranarray(VALUES)))
    np.testing.assert_array_equal(dmdata.open(NAME, catalog=catalog).to_zarr()[...], VALUES)
    np.testing.assert_array_equal(dmdata.open(NAME, catalog=catalog).to_dask().compute(), VALUES)
    dmdata.open(NAME, catalog=catalog).mirror(tmp_path / "copy.zarr", progress=False)
    np.testing.assert_array_equal(dmdata.open(tmp_path / "copy.zarr")[...], VALUES)


def test_an_array_is_pickled_as_it_is_known(s3: LoopbackS3, catalog: str) -> None:
    array = dmdata.open(NAME, catalog=catalog)
    sent = pickle.loads(pickle.dumps(array))
    assert s3.n_requests == 0
    np.testing.assert_array_equal(sent[3], VALUES[3])
    np.testing.assert_array_equal(array.oindex[[1, 3], :2], VALUES[[1, 3], :2])


def test_what_is_missing_is_said_at_the_first_read(s3: LoopbackS3, tmp_path: Path) -> None:
    catalog = publish(s3, {NAME: VALUES}, tmp_path)
    s3.delete(KEY)
    array = dmdata.open(NAME, catalog=catalog)
    with pytest.raises((ObjectMissingError, dmdata.AccessError), match=KEY):
        array[0]


@pytest.mark.parametrize("key", [-1, np.s_[:], np.s_[-2:], np.s_[3, 2]])
def test_a_header_that_another_thread_reads_in_between_counts_for_the_selection(
    s3: LoopbackS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: Any
) -> None:
    values = np.arange(120, dtype=np.float16).reshape(24, 5)
    catalog = publish(s3, {NAME: values}, tmp_path, shape=[12, 5])
    array = dmdata.open(NAME, catalog=catalog)
    selected = dmdata.array.select

    def select_and_lose_the_race(*arguments: Any, **options: Any) -> Any:
        selection = selected(*arguments, **options)
        other = threading.Thread(target=array.read_header)  # a second time it has nothing to read
        other.start()
        other.join()
        return selection

    monkeypatch.setattr("dmdata.array.select", select_and_lose_the_race)
    with pytest.warns(dmdata.array.CatalogMismatchWarning):
        np.testing.assert_array_equal(array[key], values[key])
