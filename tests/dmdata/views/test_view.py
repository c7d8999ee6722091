"""A view is a Zarr store like any other, but for writing, and reads through the budget what its reader asks for."""

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from servers.loopback import SECRET, LoopbackS3
from small_release import npy, publish
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.buffer.cpu import Buffer as CpuBuffer
from zarr.testing.store import StoreTests

import dmdata
from dmdata.errors import BudgetError, DmdataError, FormatError, IntegrityError, SourceError
from dmdata.views.zarr_store import ArrayValues, Value, View, read_ranges

NAME = "toy/50pct/test_margins"
VALUES = np.random.default_rng(0).integers(0, 255, (300, 1250), np.int32)
"""Rows of 5,000 bytes: a request costs less than fetching one that nobody wants."""
FORMS = ("blocks", "rows")


@pytest.fixture
def server(s3: LoopbackS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackS3]:
    """A server to which no request without a range, and none that is not paid for, may ever have gone."""
    monkeypatch.setenv("DMDATA_CACHE_GIB", "0")  # the same is read again and again, and counted
    yield s3
    assert all(request.method == "GET" and request.range for request in s3.log), s3.log


@pytest.fixture
def array(server: LoopbackS3, tmp_path: Path) -> dmdata.LazyArray:
    opened = dmdata.open(NAME, catalog=publish(server, {NAME: VALUES}, tmp_path)).read_header()
    server.reset_log()
    return opened


def stored(folder: Path, values: Any) -> dmdata.LazyArray:
    np.save(folder / "x.npy", values)
    return dmdata.open(folder / "x.npy").read_header()


class PublishedValues:
    """Values under any keys, each an object on the server: what zarr's tests store, a view then reads."""

    def __init__(self, server: LoopbackS3) -> None:
        self.server: LoopbackS3 | None = server
        self.table: dict[str, Value] = {}

    def publish(self, key: str, content: bytes) -> None:
        """Put the bytes on the server as an array, and show them by a key: the door for tests to write through."""
        assert self.server is not None
        name = f"values/{len(self.table)}.npy"
        self.server.put(name, npy(np.frombuffer(content, np.uint8)))
        array = dmdata.open(f"s3://{self.server.bucket}/{name}")
        # half of it in the object and half made up, as a view has it
        n_stored = (len(content) + 1) // 2
        self.table[key] = Value(array, 0, n_stored, content[n_stored:])

    def find(self, key: str) -> Value | None:
        return self.table.get(key)

    def keys(self) -> Iterator[str]:
        return iter(self.table)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublishedValues) and sorted(self.table) == sorted(other.table)

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return "published values"

    def __getstate__(self) -> dict[str, Any]:
        return {"server": None, "table": self.table}


class Writable(View):
    """A view for tests that fill a store by its own `set` before they look: what is set is published instead."""

    def __init__(self, view: View) -> None:
        super().__init__(view.values)

    async def set(self, key: str, value: Buffer) -> None:
        self.values.publish(key, value.to_bytes())


REFUSED = "store was opened in read-only mode and does not support writing"


class TestViewAsStore(StoreTests[View, CpuBuffer]):
    """zarr's own tests of a store.

    Tests that only fill the store before they read run as they are, on a `Writable` view. Tests of writing itself are
    replaced by tests that it is refused. Nothing is skipped.
    """

    store_cls = View
    buffer_cls = CpuBuffer

    @pytest.fixture
    def store_kwargs(self, server: LoopbackS3) -> dict[str, Any]:
        return {"values": PublishedValues(server)}

    async def set(self, store: View, key: str, value: Buffer) -> None:
        await Writable(store).set(key, value)

    async def get(self, store: View, key: str) -> Buffer:
        value = store.values.find(key)
        (content,) = value.read([(0, value.n_bytes)])
        return self.buffer_cls.from_bytes(content.tobytes())

    def test_store_repr(self, store: View) -> None:
        assert repr(store) == "<View of published values>"

    def test_store_supports_writes(self, store: View) -> None:
        assert not store.supports_writes
        assert not store.supports_deletes

    def test_store_supports_listing(self, store: View) -> None:
        assert store.supports_listing

    def test_store_read_only(self, store: View) -> None:
        assert store.read_only
        with pytest.raises(AttributeError):
            store.read_only = False

    async def test_store_open_read_only(self, open_kwargs: dict[str, Any]) -> None:
        assert (await View.open(**open_kwargs, read_only=True)).read_only
        with pytest.raises(ValueError, match="read-only; open it with mode='r'"):
            await View.open(**open_kwargs, read_only=False)

    async def test_serializable_store(self, store: View) -> None:
        await self.set(store, "foo", self.buffer_cls.from_bytes(b"\x01\x02\x03\x04"))
        copy = pickle.loads(pickle.dumps(store))
        assert copy == store
        assert copy.read_only
        assert (await copy.get("foo", default_buffer_prototype())).to_bytes() == b"\x01\x02\x03\x04"

    # these fill the store by its own `set`, then look

    async def test_getsize_prefix(self, store: View) -> None:
        await super().test_getsize_prefix(Writable(store))

    async def test_exists(self, store: View) -> None:
        await super().test_exists(Writable(store))

    async def test_list(self, store: View) -> None:
        await super().test_list(Writable(store))

    async def test_list_prefix(self, store: View) -> None:
        await super().test_list_prefix(Writable(store))

    async def test_list_empty_path(self, store: View) -> None:
        await super().test_list_empty_path(Writable(store))

    async def test_list_dir(self, store: View) -> None:
        await super().test_list_dir(Writable(store))

    if hasattr(StoreTests, "test_get_sync_byte_range_parity"):  # newer zarr
        ranges = StoreTests.test_get_sync_byte_range_parity.pytestmark[0]

        @pytest.mark.parametrize(*ranges.args, **ranges.kwargs)
        async def test_get_sync_byte_range_parity(self, store: View, byte_range: Any) -> None:
            await super().test_get_sync_byte_range_parity(Writable(store), byte_range)

    # these write

    async def refused(self, writing: Any) -> None:
        with pytest.raises(ValueError, match=REFUSED):
            await writing

    @pytest.mark.parametrize("key", ["zarr.json", "c/0", "foo/c/0.0", "foo/0/0"])
    async def test_set(self, store: View, key: str) -> None:
        await self.refused(store.set(key, self.buffer_cls.from_bytes(b"\x01")))
        assert not await store.exists(key)

    async def test_set_not_open(self, store_not_open: View) -> None:
        await self.refused(store_not_open.set("c/0", self.buffer_cls.from_bytes(b"\x01")))

    async def test_set_many(self, store: View) -> None:
        await self.refused(store._set_many([("c/0", self.buffer_cls.from_bytes(b"\x01"))]))

    async def test_set_if_not_exists(self, store: View) -> None:
        await self.set(store, "k", self.buffer_cls.from_bytes(b"0000"))
        await store.set_if_not_exists("k", self.buffer_cls.from_bytes(b"1111"))
        assert (await store.get("k", default_buffer_prototype())).to_bytes() == b"0000"
        await self.refused(store.set_if_not_exists("k2", self.buffer_cls.from_bytes(b"1111")))

    async def test_delete(self, store: View) -> None:
        await self.set(store, "foo/zarr.json", self.buffer_cls.from_bytes(b"bar"))
        await self.refused(store.delete("foo/zarr.json"))
        assert await store.exists("foo/zarr.json")

    async def test_delete_dir(self, store: View) -> None:
        with pytest.raises(NotImplementedError):
            await store.delete_dir("foo")

    async def test_delete_nonexistent_key_does_not_raise(self, store: View) -> None:
        await self.refused(store.delete("nonexistent_key"))

    async def test_clear(self, store: View) -> None:
        with pytest.raises(NotImplementedError):
            await store.clear()

    def test_set_sync(self, store: View) -> None:
        with pytest.raises(ValueError, match=REFUSED):
            store.set_sync("k", self.buffer_cls.from_bytes(b"\x01"))

    def test_delete_sync(self, store: View) -> None:
        with pytest.raises(ValueError, match=REFUSED):
            store.delete_sync("k")

    test_delete_sync_missing = test_delete_sync

    async def test_sync_async_set_get_parity(self, store: View) -> None:
        await self.set(store, "k", self.buffer_cls.from_bytes(b"\x01\x02"))
        read = await store.get("k", default_buffer_prototype())
        assert store.get_sync("k").to_bytes() == read.to_bytes() == b"\x01\x02"

    async def test_delete_sync_visible_to_async_get(self, store: View) -> None:
        self.test_delete_sync(store)


shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7)
ordered = st.sampled_from("CF")
dtypes = st.sampled_from(["?", "u1", "<f2", ">f4", "<i8", ">c16"])
shared = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@shared
@given(
    data=st.data(), shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7), order=ordered, dtype=dtypes
)
def test_zarr_reads_a_view_as_numpy_reads_the_array(
    tmp_path: Path, data: st.DataObject, shape: tuple[int, ...], order: str, dtype: str
) -> None:
    values = np.array((np.arange(np.prod(shape)) % 3).reshape(shape).astype(dtype), order=order)
    form, block_rows = data.draw(st.sampled_from(FORMS)), data.draw(st.one_of(st.none(), st.integers(1, 5)))
    view = stored(tmp_path, values).to_zarr(form, block_rows=block_rows)
    assert view.shape == values.shape
    np.testing.assert_array_equal(view[...], values)
    # zarr reads no negative steps, and no numbers out of bounds
    key = data.draw(hnp.basic_indices(shape, allow_ellipsis=False).filter(_zarr_reads))
    np.testing.assert_array_equal(view[key], values[key])


def _zarr_reads(key: Any) -> bool:
    parts = key if isinstance(key, tuple) else (key,)
    return all(not isinstance(part, slice) or part.step is None or part.step > 0 for part in parts)


@pytest.mark.parametrize("form", FORMS)
def test_what_zarr_reads_is_what_is_served_planned_and_booked(
    server: LoopbackS3, array: dmdata.LazyArray, form: Any
) -> None:
    view, before = array.to_zarr(form, block_rows=64), dmdata.spend()
    assert server.n_requests == 0, "opening a view reads nothing"
    np.testing.assert_array_equal(view[64:192], VALUES[64:192])
    assert server.n_bytes == array.plan(np.s_[64:192]).n_bytes == VALUES[64:192].nbytes
    assert server.n_requests == 2
    assert dmdata.spend().n_bytes - before.n_bytes == server.n_bytes


def test_scattered_rows_of_the_row_form_are_read_to_the_byte(server: LoopbackS3, array: dmdata.LazyArray) -> None:
    view = array.to_zarr("rows", block_rows=100)
    np.testing.assert_array_equal(view.oindex[[3, 77, 250]], VALUES[[3, 77, 250]])
    assert server.n_bytes == 3 * VALUES[0].nbytes
    assert server.n_requests == 3


@shared
@given(rows=st.sets(st.integers(0, 299), min_size=1, max_size=12), block_rows=st.integers(1, 350))
def test_any_rows_of_the_row_form_are_equal_and_exact(
    server: LoopbackS3, array: dmdata.LazyArray, rows: set[int], block_rows: int
) -> None:
    server.reset_log()
    wanted = sorted(rows)
    np.testing.assert_array_equal(
        array.to_zarr("rows", block_rows=block_rows).oindex[wanted, [7, 3]], VALUES[np.ix_(wanted, [7, 3])]
    )
    assert server.n_bytes == len(rows) * VALUES[0].nbytes


def test_a_block_is_one_request_and_read_whole(server: LoopbackS3, array: dmdata.LazyArray) -> None:
    assert array.to_zarr(block_rows=50)[120, 7] == VALUES[120, 7]
    assert (server.n_requests, server.n_bytes) == (1, VALUES[100:150].nbytes)


def test_short_rows_share_an_inner_chunk_that_is_worth_its_request(tmp_path: Path) -> None:
    metadata = stored(tmp_path, np.zeros((5000, 10), "<f4")).to_zarr("rows").metadata
    assert metadata.to_dict()["codecs"][0]["configuration"]["chunk_shape"] == (102, 10)


def test_a_column_major_array_has_columns_for_rows(tmp_path: Path) -> None:
    values = np.asfortranarray(np.arange(600 * 8.0).reshape(600, 8))
    view = stored(tmp_path, values).to_zarr("rows", block_rows=2)
    assert view.chunks == (600, 1)
    np.testing.assert_array_equal(view.oindex[[5, 590], [1, 6]], values[np.ix_([5, 590], [1, 6])])


def test_ranges_of_a_shard_are_read_in_one_priced_read(server: LoopbackS3, array: dmdata.LazyArray) -> None:
    """Newer zarr asks for the rows of a shard together, and would itself read gaps of a megabyte."""
    before = dmdata.spend()
    pieces = read_ranges(array, [(0, 5000), (25_000, 30_000), (25_000, 25_000), (15_000, 15_004)])
    octets = VALUES.tobytes()
    assert [piece.tobytes() for piece in pieces] == [octets[:5000], octets[25_000:30_000], b"", octets[15_000:15_004]]
    assert server.n_bytes == 10_004
    assert dmdata.spend().n_reads - before.n_reads == 1


def test_a_view_names_its_dimensions_and_its_origin(array: dmdata.LazyArray) -> None:
    metadata = array.to_zarr().metadata
    assert metadata.dimension_names == array.dims == ("model", "example")
    assert metadata.attributes == {"artifact": NAME, "url": array.url}


@pytest.mark.parametrize("form", FORMS)
def test_a_view_pickles_without_credentials(array: dmdata.LazyArray, form: Any) -> None:
    view = array.to_zarr(form)
    text = pickle.dumps(view)
    assert SECRET.encode() not in text
    assert pickle.loads(text).store == view.store
    np.testing.assert_array_equal(pickle.loads(text)[5:7], VALUES[5:7])


@pytest.mark.parametrize("form", FORMS)
def test_a_read_over_the_budget_is_refused_before_any_byte(
    server: LoopbackS3, array: dmdata.LazyArray, form: Any
) -> None:
    with dmdata.budget(usd=1e-9), pytest.raises(BudgetError):
        array.to_zarr(form)[...]
    assert server.n_requests == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("key", [np.s_[...], np.s_[5:9], np.s_[299]])
def test_an_object_that_is_gone_is_an_error_and_never_zeros(
    server: LoopbackS3, array: dmdata.LazyArray, form: Any, key: Any
) -> None:
    view = array.to_zarr(form)
    server.hide_missing = False
    server.delete(server.keys()[0])
    with pytest.raises(SourceError) as caught:
        view[key]
    assert not isinstance(caught.value, FileNotFoundError), "zarr takes a missing file for a chunk of zeros"


@pytest.mark.parametrize("form", FORMS)
def test_an_object_that_changed_is_an_error(server: LoopbackS3, array: dmdata.LazyArray, form: Any) -> None:
    view = array.to_zarr(form)
    server.put(server.keys()[0], npy(VALUES + 1))
    with pytest.raises(IntegrityError):
        view[0]


def test_keys_outside_the_grid_are_not_there(tmp_path: Path) -> None:
    values = ArrayValues(stored(tmp_path, np.zeros((10, 3))), "blocks", 4)
    assert list(values.keys()) == ["zarr.json", "c/0/0", "c/1/0", "c/2/0"]
    for key in ["c/3/0", "c/0/1", "c/00/0", "c/-1/0", "c/0", "c", "c/0/0/0", "zarr.json/c", "d/0/0", "c/٣/0", ""]:
        assert values.find(key) is None, key
    (last,) = values.find("c/2/0").read([(0, 4 * 24)])
    assert len(last) == 4 * 24, "Zarr wants the last chunk full"


def test_a_dtype_that_zarr_has_not_is_refused_with_the_remedy(tmp_path: Path) -> None:
    if np.dtype(np.longdouble).itemsize == 8:
        pytest.skip("long double is double here")
    array = stored(tmp_path, np.zeros(3, np.longdouble))
    with pytest.raises(FormatError, match="index the array itself"):
        array.to_zarr()


def test_a_form_or_block_that_is_none_is_refused(tmp_path: Path) -> None:
    array = stored(tmp_path, np.zeros((3, 4)))
    with pytest.raises(DmdataError, match="use 'blocks'"):
        array.to_zarr("columns")
    with pytest.raises(DmdataError, match="use 1 or more"):
        array.to_zarr(block_rows=0)


def test_an_array_of_a_zarr_store_is_itself(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "x.zarr", data=np.arange(12).reshape(3, 4))
    view = dmdata.open(tmp_path / "x.zarr").to_zarr("rows")
    np.testing.assert_array_equal(view[...], np.arange(12).reshape(3, 4))
    assert view.read_only


OVER_BUDGET = """
import sys
import dmdata
name, catalog, way = sys.argv[1:]
array = dmdata.open(name, catalog=catalog).read_header()
with dmdata.budget(usd=2e-6):
    if way in ("blocks", "rows"):
        array.to_zarr(way, block_rows=8)[...]
    elif way == "dask":
        array.to_dask(chunks=8).compute()
    else:
        array.to_xarray(chunks=8).values
"""


@pytest.mark.parametrize("way", ["blocks", "rows", "dask", "xarray"])
def test_a_view_that_a_budget_refuses_shows_one_short_traceback_and_nothing_else(
    server: LoopbackS3, tmp_path: Path, way: str
) -> None:
    for needed in {"blocks": [], "rows": [], "dask": ["dask"], "xarray": ["dask", "xarray"]}[way]:
        pytest.importorskip(needed)
    catalog = publish(server, {NAME: VALUES}, tmp_path)
    command = [sys.executable, "-c", OVER_BUDGET, NAME, catalog, way]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("dmdata.errors.BudgetError: reading toy/50pct/test_margins would")
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert "was destroyed" not in done.stderr
    assert "never retrieved" not in done.stderr
    ours = [line for line in done.stderr.splitlines() if "/dmdata/" in line]
    assert len(ours) <= 3, done.stderr
