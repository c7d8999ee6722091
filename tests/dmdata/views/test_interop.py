"""dask, xarray and torch read the same numbers through the same budgeted transport."""

import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers.loopback import SECRET, LoopbackS3
from small_release import npy, publish, write_locally

import dmdata
from dmdata.errors import BudgetError, CatalogError, DmdataError, FormatError, SelectionError

N_MODELS = 200
RNG = np.random.default_rng(0)
RELEASE = {
    "toy/50pct/train_masks": RNG.integers(0, 2, (N_MODELS, 5000)).astype(bool),
    "toy/50pct/test_margins": RNG.normal(size=(N_MODELS, 2600)).astype(np.float16),
    "toy/50pct/test_logits": RNG.normal(size=(N_MODELS, 900, 4)).astype(np.float16),
}
MASKS, MARGINS, LOGITS = RELEASE.values()
DIMS = {"train_masks": ["model", "train_example"], "test_margins": ["model", "test_example"]}


@pytest.fixture
def server(s3: LoopbackS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackS3]:
    """A server to which no request without a range may ever have gone."""
    monkeypatch.setenv("DMDATA_CACHE_GIB", "0")  # the same is read again and again, and counted
    yield s3
    assert all(request.method == "GET" and request.range for request in s3.log), s3.log


@pytest.fixture
def catalog(server: LoopbackS3, tmp_path: Path) -> str:
    return with_roles(publish(server, RELEASE, tmp_path))


def with_roles(path: str, **shapes: list[str]) -> str:
    """Give the arrays of the toy catalog the dimensions and roles of a real one."""
    document = yaml.safe_load(Path(path).read_text())
    alpha = document["datasets"]["toy"]["alphas"]["50pct"]
    alpha["rows"] = {"fit": [0, 150], "evaluation": [150, N_MODELS], "n_retrainings": 2}
    for name, array in alpha["arrays"].items():
        array["dims"] = DIMS.get(name, ["model", "logit_example", "class"])
    Path(path).write_text(yaml.safe_dump(document))
    return path


@pytest.fixture
def dataset(server: LoopbackS3, catalog: str) -> Any:
    read_headers(catalog)
    opened = open_dataset("toy/50pct", catalog=catalog)
    server.reset_log()
    return opened


def read_headers(catalog: str) -> None:
    """Have all headers remembered, so that what is served is elements alone."""
    for name in RELEASE:
        dmdata.open(name, catalog=catalog).read_header()


def open_dataset(name: str, **options: Any) -> Any:
    """Open by the engine's class: its name is known to xarray only where dmdata is installed; see test_wheel."""
    xarray = pytest.importorskip("xarray")
    from dmdata.plugins.xarray_engine import DmdataBackendEntrypoint

    return xarray.open_dataset(name, engine=DmdataBackendEntrypoint, **options)


@pytest.fixture
def stored(tmp_path):
    values = np.arange(600, dtype="float16").reshape(60, 10)
    np.save(tmp_path / "x.npy", values)
    return values, dmdata.open(tmp_path / "x.npy")


def test_a_dask_array_reads_only_what_it_computes(s3):
    dask_array = pytest.importorskip("dask.array")
    values = np.arange(600, dtype="float16").reshape(60, 10)
    s3.put("cifar/data/test_margins_50pct.npy", npy(values))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dmdata.CatalogMismatchWarning)
        lazy = dmdata.open("cifar/50pct/test_margins").read_header()
    array = lazy.to_dask(chunks=(20, 10))
    assert isinstance(array, dask_array.Array)
    assert array.dtype == values.dtype
    s3.reset_log()
    np.testing.assert_array_equal(array[20:40].compute(scheduler="threads"), values[20:40])
    assert s3.n_bytes == 20 * 10 * 2
    np.testing.assert_array_equal(array.sum(axis=1).compute(), values.sum(axis=1))


def test_dask_blocks_lie_as_the_bytes_do(tmp_path: Path) -> None:
    pytest.importorskip("dask.array")
    values = np.asfortranarray(np.zeros((5000, 5000), np.float32))
    np.save(tmp_path / "x.npy", values)
    assert dmdata.open(tmp_path / "x.npy").to_dask().chunksize == (5000, (64 << 20) // 20_000)


def test_an_xarray_has_the_dimensions_of_the_catalog(stored):
    pytest.importorskip("xarray")
    values, lazy = stored
    array = lazy.to_xarray()
    assert array.dims == lazy.dims
    np.testing.assert_array_equal(array.isel(dim_0=slice(3, 7)).values, values[3:7])


def test_a_dataset_has_the_arrays_of_an_alpha_and_reads_nothing_of_them(server: LoopbackS3, catalog: str) -> None:
    dataset = open_dataset("toy/50pct", catalog=catalog)
    assert server.n_requests == 0
    assert set(dataset.data_vars) == {"train_masks", "test_margins", "test_logits"}
    sizes = {"model": N_MODELS, "train_example": 5000, "test_example": 2600, "logit_example": 900, "class": 4}
    assert dict(dataset.sizes) == sizes
    assert dataset.attrs == {"title": "a small release", "dataset": "toy", "alpha": 0.5, "n_retrainings": 2}
    repr(dataset)
    dataset._repr_html_()
    assert server.n_requests == 0


def test_a_slice_of_a_dataset_reads_exactly_its_bytes_without_dask(server: LoopbackS3, dataset: Any) -> None:
    got = dataset.test_margins[:100, 42].values
    np.testing.assert_array_equal(got, MARGINS[:100, 42])
    assert server.n_bytes == 100 * 2
    assert server.n_requests == 100


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_outer_index_of_a_dataset_equals_numpy_and_serves_its_plan(
    server: LoopbackS3, catalog: str, dataset: Any, data: st.DataObject
) -> None:
    server.reset_log()
    picks = {}
    for dim, size in zip(("model", "logit_example", "class"), LOGITS.shape, strict=True):
        index = st.integers(-size, size - 1)
        # xarray itself stumbles over a slice that walks backwards over nothing
        slices = st.slices(size).filter(lambda part, size=size: (part.step or 1) > 0 or range(size)[part])
        picks[dim] = data.draw(st.one_of(index, slices, st.lists(index, max_size=5).map(np.int64)))
    got = dataset.test_logits.isel(**picks).values
    wanted = [np.arange(size)[pick] for size, pick in zip(LOGITS.shape, picks.values(), strict=True)]
    np.testing.assert_array_equal(got, LOGITS[np.ix_(*map(np.atleast_1d, wanted))].reshape(got.shape))
    plan = dmdata.open("toy/50pct/test_logits", catalog=catalog).plan(tuple(picks.values()))
    assert (server.n_bytes, server.n_requests) == (plan.n_bytes, plan.n_requests)


def test_the_role_of_a_model_is_a_coordinate_that_selects_rows(server: LoopbackS3, dataset: Any) -> None:
    assert list(dataset.role[[0, 149, 150, 199]].values) == ["fit", "fit", "evaluation", "evaluation"]
    held_out = dataset.test_margins.isel(model=dataset.role == "evaluation")
    assert server.n_bytes == 0
    np.testing.assert_array_equal(held_out.values, MARGINS[150:])
    assert server.n_bytes == MARGINS[150:].nbytes


def test_a_dataset_in_chunks_reads_through_dask(server: LoopbackS3, catalog: str) -> None:
    dask_array = pytest.importorskip("dask.array")
    read_headers(catalog)
    dataset = open_dataset("toy/50pct", catalog=catalog, chunks={})
    assert isinstance(dataset.test_margins.data, dask_array.Array)
    server.reset_log()
    means = dataset.test_margins[10:20].astype("float32").mean("test_example").compute(scheduler="threads")
    np.testing.assert_allclose(means, MARGINS[10:20].astype("float32").mean(axis=1), rtol=1e-5, atol=1e-6)
    assert server.n_bytes == MARGINS[10:20].nbytes
    server.reset_log()
    np.testing.assert_array_equal(dataset.test_margins[:100, 42].compute(scheduler="threads"), MARGINS[:100, 42])
    assert (server.n_requests, server.n_bytes) == (100, 200)
    with pytest.warns(UserWarning, match="separate the stored chunks"):  # xarray cannot know that any rows are exact
        dataset = open_dataset("toy/50pct", catalog=catalog, chunks={"model": 50})
    assert dataset.test_margins.chunks[0] == (50,) * 4


def test_one_array_opens_as_a_dataset_of_one(catalog: str) -> None:
    assert set(open_dataset("toy/50pct/test_margins", catalog=catalog).data_vars) == {"test_margins"}
    assert set(open_dataset("dmdata://toy/50pct/test_margins", catalog=catalog).data_vars) == {"test_margins"}


def test_a_dropped_array_is_not_even_opened(catalog: str) -> None:
    dataset = open_dataset("toy/50pct", catalog=catalog, drop_variables=["train_masks", "test_logits"])
    assert set(dataset.variables) == {"test_margins", "role"}


@pytest.mark.parametrize("prefix", ["", "dmdata://"])
def test_several_names_open_as_one_dataset(
    server: LoopbackS3, catalog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    pytest.importorskip("dask")
    xarray = pytest.importorskip("xarray")
    from dmdata.plugins.xarray_engine import DmdataBackendEntrypoint

    # a folder of that name that has no catalog
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    (elsewhere / "toy" / "50pct").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    names = [f"{prefix}toy/50pct/test_margins"] * 2
    both = xarray.open_mfdataset(
        names, engine=DmdataBackendEntrypoint, catalog=catalog, combine="nested", concat_dim="model"
    )
    np.testing.assert_array_equal(both.test_margins.values, np.concatenate([MARGINS, MARGINS]))
    with pytest.raises(CatalogError, match="'nothing' is not in this catalog"):
        xarray.open_mfdataset(["nothing/50pct"], engine=DmdataBackendEntrypoint, catalog=catalog)


def test_a_dataset_pickles_without_credentials(dataset: Any) -> None:
    text = pickle.dumps(dataset)
    assert SECRET.encode() not in text
    np.testing.assert_array_equal(pickle.loads(text).test_margins[3].values, MARGINS[3])


def test_a_budget_holds_through_xarray_and_dask(server: LoopbackS3, catalog: str, dataset: Any) -> None:
    lazily = open_dataset("toy/50pct", catalog=catalog, chunks={})
    with dmdata.budget(usd=1e-9):
        for opened in (dataset, lazily):
            with pytest.raises(BudgetError):
                opened.test_margins.values  # noqa: B018 - reading is what is tested
    assert server.n_requests == 0


def test_names_that_are_no_dataset_are_refused_in_words(catalog: str) -> None:
    with pytest.raises(CatalogError, match="several alphas, which do not make one dataset; open toy/50pct"):
        open_dataset("toy", catalog=catalog)
    with pytest.raises(CatalogError, match="alpha 30% is not released"):
        open_dataset("toy/30pct", catalog=catalog)


def test_arrays_that_do_not_fit_together_are_refused_with_the_remedy(tmp_path: Path) -> None:
    release = {"toy/50pct/test_margins": np.zeros((3, 4)), "toy/50pct/train_masks": np.zeros((5, 4), bool)}
    path = with_roles(write_locally(release, tmp_path))
    with pytest.raises(FormatError, match=r"drop_variables=\['train_masks'\]"):
        open_dataset("toy/50pct", catalog=path)
    assert open_dataset("toy/50pct", catalog=path, drop_variables="train_masks").sizes["model"] == 3


def opened(name: str, catalog: str) -> dmdata.LazyArray:
    return dmdata.open(f"toy/50pct/{name}", catalog=catalog).read_header()


def test_batches_are_rows_of_both_arrays_and_cost_their_bytes(server: LoopbackS3, catalog: str) -> None:
    batches = dmdata.torch_dataset(
        opened("train_masks", catalog), opened("test_margins", catalog), batch_rows=64, rows=np.s_[:150]
    )
    server.reset_log()
    assert len(batches) == 3
    masks, margins = batches[2]
    np.testing.assert_array_equal(masks, MASKS[128:150])
    np.testing.assert_array_equal(margins, MARGINS[128:150])
    assert (server.n_requests, server.n_bytes) == (2, masks.nbytes + margins.nbytes)
    with pytest.raises(IndexError):
        batches[3]


def test_batches_of_some_targets_read_only_these(server: LoopbackS3, catalog: str) -> None:
    batches = dmdata.torch_dataset(
        opened("train_masks", catalog), opened("test_margins", catalog), batch_rows=10, columns=[5, 2599]
    )
    server.reset_log()
    np.testing.assert_array_equal(batches[1][1], MARGINS[10:20, [5, 2599]])
    assert server.n_bytes < MASKS[:10].nbytes + MARGINS[:10].nbytes


@given(n_rows=st.integers(0, N_MODELS), batch_rows=st.integers(1, 70), seed=st.none() | st.integers(0, 9))
def test_an_epoch_has_every_row_once_however_it_is_shuffled(n_rows: int, batch_rows: int, seed: int | None) -> None:
    rows = np.random.default_rng(1).permutation(N_MODELS)[:n_rows]
    array = _Rows()
    batches = dmdata.torch_dataset(array, array, batch_rows=batch_rows, rows=rows, seed=seed)
    epochs = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        epochs.append([batches.rows_of(batch).tolist() for batch in range(len(batches))])
        assert sorted(np.concatenate([[], *epochs[-1]])) == sorted(rows)
    assert epochs[0] == epochs[2], "a seed and an epoch say all"


class _Rows:
    name = "rows"
    shape = (N_MODELS, 3)


def test_a_seed_shuffles_batches_and_rows_and_keeps_pairs(tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", np.arange(500)[:, None] % 2 == 0)
    np.save(tmp_path / "o.npy", np.arange(500.0).astype(">f4")[:, None])
    masks, outputs = dmdata.open(tmp_path / "m.npy"), dmdata.open(tmp_path / "o.npy")
    batches = dmdata.torch_dataset(masks, outputs, batch_rows=50, seed=3)
    read = list(batches)
    assert all((mask[:, 0] == (output[:, 0] % 2 == 0)).all() for mask, output in read)
    assert read[0][1].dtype.isnative
    first = [int(output.min()) // 50 for _, output in read]
    assert sorted(first) == list(range(10)) != first
    assert any((np.diff(output[:, 0]) < 0).any() for _, output in read)


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_data_loader_with_two_workers_reads_every_row_once(server: LoopbackS3, catalog: str, start: str) -> None:
    data = pytest.importorskip("torch.utils.data")
    batches = dmdata.torch_dataset(
        opened("train_masks", catalog), opened("test_margins", catalog), batch_rows=32, seed=1
    )
    server.reset_log()
    loader = data.DataLoader(batches, batch_size=None, num_workers=2, multiprocessing_context=start)
    before, read = dmdata.spend(), list(loader)
    rows = np.concatenate([batches.rows_of(batch) for batch in range(len(batches))])
    np.testing.assert_array_equal(np.concatenate([masks.numpy() for masks, _ in read]), MASKS[rows])
    np.testing.assert_array_equal(np.concatenate([margins.numpy() for _, margins in read]), MARGINS[rows])
    assert server.n_bytes == MASKS.nbytes + MARGINS.nbytes
    assert dmdata.spend().n_bytes - before.n_bytes == server.n_bytes


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_budget_holds_in_the_workers_of_a_data_loader(server: LoopbackS3, catalog: str) -> None:
    data = pytest.importorskip("torch.utils.data")
    batches = dmdata.torch_dataset(opened("train_masks", catalog), opened("test_margins", catalog), batch_rows=32)
    server.reset_log()
    with dmdata.budget(usd=1e-9), pytest.raises(BudgetError):
        list(data.DataLoader(batches, batch_size=None, num_workers=2, multiprocessing_context="fork"))
    assert server.n_requests == 0


def test_arrays_of_other_models_are_refused(catalog: str, stored: Any) -> None:
    _, other = stored
    with pytest.raises(SelectionError, match="rows of the same models"):
        dmdata.torch_dataset(opened("train_masks", catalog), other)
    with pytest.raises(SelectionError, match="use 1 or more"):
        dmdata.torch_dataset(other, other, batch_rows=0)
    with pytest.raises(SelectionError, match="out of bounds"):
        dmdata.torch_dataset(other, other, columns=[10])


def test_what_is_not_installed_is_named_with_the_remedy(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    _, array = stored
    monkeypatch.setitem(sys.modules, "dask.array", None)
    with pytest.raises(DmdataError, match=r"pip install 'dmdata\[dask\]'"):
        array.to_dask()
