"""A mirror is its source, is resumed without paying twice, and says why where it cannot be made."""

import json
import signal
import subprocess
import sys
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from processes import Child, wait_until
from servers.loopback import Fault, LoopbackS3
from small_release import Pt, npy, publish, write_locally

import dmdata
from dmdata import Progress
from dmdata.copying.journal import DIGESTS, JOURNAL, stored_digest
from dmdata.copying.place import Place
from dmdata.errors import AccessError, BudgetError, DmdataError, IntegrityError, SelectionError

MARGINS = "toy/50pct/test_margins"
MASKS = "toy/50pct/train_masks"
VALUES = np.random.default_rng(0).normal(size=(2000, 1000)).astype(np.float16)
MEBIBYTE = 1 << 20
"""Of memory: blocks of 128 rows of `VALUES`, so sixteen of them, a request each."""


@pytest.fixture
def catalog(s3: LoopbackS3, tmp_path: Path) -> str:
    masks = np.random.default_rng(1).random((300, 70)) < 0.5
    return publish(s3, {MARGINS: VALUES, MASKS: masks}, tmp_path)


@pytest.fixture
def margins(s3: LoopbackS3, catalog: str) -> dmdata.LazyArray:
    array = dmdata.open(MARGINS, catalog=catalog).read_header()
    s3.reset_log()
    return array


def data_requests(s3: LoopbackS3) -> Counter[str | None]:
    return Counter(request.range for request in s3.log if request.range != "bytes=0-127")


def test_a_mirror_is_its_source_and_pays_each_byte_once(
    s3: LoopbackS3, margins: dmdata.LazyArray, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    copy = margins.mirror(tmp_path / "m.zarr", memory_bytes=MEBIBYTE, progress=seen.append)
    np.testing.assert_array_equal(np.asarray(copy[...]), VALUES)
    assert s3.n_bytes == VALUES.nbytes
    assert dmdata.spend().n_bytes == VALUES.nbytes + 128
    assert [done.n_rows for done in seen] == [*range(128, 2000, 128), 2000]
    assert {done.n_rows_total for done in seen} == {2000}
    assert not (tmp_path / "m.zarr.lock").exists()
    s3.reset_log()
    again = margins.mirror(tmp_path / "m.zarr", memory_bytes=MEBIBYTE)
    np.testing.assert_array_equal(np.asarray(again[...]), VALUES)
    assert s3.n_requests == 0, "a complete mirror is not paid for again"


def test_a_mirror_is_plain_zarr_that_names_its_dimensions_and_its_blocks(
    margins: dmdata.LazyArray, tmp_path: Path
) -> None:
    margins.mirror(tmp_path / "m.zarr", memory_bytes=MEBIBYTE)
    copy = zarr.open_array(tmp_path / "m.zarr", mode="r")
    assert copy.metadata.zarr_format == 3
    assert (copy.shape, copy.dtype) == (VALUES.shape, VALUES.dtype)
    assert copy.metadata.dimension_names == ("model", "example")
    # as it is written: how zarr-python spells it in memory changes between its versions
    _, codec = json.loads((tmp_path / "m.zarr/zarr.json").read_text())["codecs"]
    assert codec["name"] == "blosc"
    assert (codec["configuration"]["cname"], codec["configuration"]["shuffle"]) == ("zstd", "shuffle")
    digests = zarr.open_array(tmp_path / "m.zarr" / DIGESTS, mode="r")
    chunks = [sorted((tmp_path / f"m.zarr/c/{n}").iterdir()) for n in range(16)]
    assert [bytes(digest) for digest in np.asarray(digests[...])] == [
        sha256(b"".join(sha256(chunk.read_bytes()).digest() for chunk in block)).digest() for block in chunks
    ]
    about: Any = copy.attrs[JOURNAL]
    assert (about["artifact"], about["shape"], about["axes"]) == (MARGINS, [2000, 1000], [[0, 2000, 1], [0, 1000, 1]])


def test_masks_are_stored_near_their_entropy(s3: LoopbackS3, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for percent, bar in ((10, 1.2), (20, 1.2), (50, 1.15), (75, 1.15)):
        alpha = percent / 100
        masks = rng.random((1500, 4000)) < alpha
        catalog = publish(s3, {f"toy/{percent}pct/train_masks": masks}, tmp_path)
        dmdata.mirror(f"toy/{percent}pct/train_masks", tmp_path / f"{percent}.zarr", catalog=catalog)
        bound = masks.size / 8 * -(alpha * np.log2(alpha) + (1 - alpha) * np.log2(1 - alpha))
        stored = sum(path.stat().st_size for path in (tmp_path / f"{percent}.zarr").rglob("*") if path.is_file())
        assert stored <= bar * bound


def test_the_memory_decides_the_rows_of_a_block(s3: LoopbackS3, margins: dmdata.LazyArray, tmp_path: Path) -> None:
    for mebibytes, block_rows in ((1, 128), (4, 512), (64, 2000)):
        s3.reset_log()
        copy = margins.mirror(tmp_path / f"{mebibytes}.zarr", memory_bytes=mebibytes * MEBIBYTE)
        assert copy.chunks[0] == block_rows
        assert copy.chunks[0] * copy.chunks[1] * 2 <= 4 * MEBIBYTE
        assert s3.n_requests == -(-2000 // block_rows)
        assert max(request.n_bytes for request in s3.log) * 4 <= max(mebibytes * MEBIBYTE, 4 * VALUES.nbytes)
    with pytest.raises(DmdataError, match="allow at least"):
        margins.mirror(tmp_path / "small.zarr", memory_bytes=4 * 2000 - 1)
    assert not (tmp_path / "small.zarr").exists()


@pytest.mark.parametrize("order", ["C", "F"])
def test_logits_and_fortran_order_are_mirrored(s3: LoopbackS3, tmp_path: Path, order: Any) -> None:
    values = np.asarray(np.random.default_rng(2).normal(size=(50, 30, 10)).astype(np.float16), order=order)
    catalog = publish(s3, {"toy/50pct/test_logits": values}, tmp_path)
    copy = dmdata.mirror("toy/50pct/test_logits", tmp_path / "m.zarr", catalog=catalog, memory_bytes=50_000)
    assert isinstance(copy, zarr.Array)
    np.testing.assert_array_equal(np.asarray(copy[...]), values)
    assert dmdata.spend().n_bytes == values.nbytes + 128


@settings(max_examples=25)
@given(data=st.data())
def test_any_rows_and_columns_are_mirrored_as_numpy_selects_them(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("subset")
    values = np.arange(20 * 9, dtype=np.int32).reshape(20, 9)
    np.save(folder / "x.npy", values)
    picks = []
    for size in values.shape:
        indices = hnp.arrays(int, st.integers(1, 12), elements=st.integers(-size, size - 1))
        picks.append(data.draw(indices | st.slices(size) | hnp.arrays(bool, size)))
    rows, columns = (np.arange(size)[pick] for pick, size in zip(picks, values.shape, strict=True))
    copy = dmdata.open(folder / "x.npy").mirror(folder / "m.zarr", rows=picks[0], columns=picks[1], memory_bytes=1000)
    np.testing.assert_array_equal(np.asarray(copy[...]), values[np.ix_(rows, columns)])
    assert copy.shape == (len(rows), len(columns))


def test_one_column_is_mirrored_as_one_column(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", VALUES)
    array = dmdata.open(tmp_path / "x.npy")
    copy = array.mirror(tmp_path / "column.zarr", columns=42)
    assert copy.shape in ((2000,), (2000, 1))
    np.testing.assert_array_equal(np.asarray(copy[...]).reshape(2000), VALUES[:, 42])
    copy = array.mirror(tmp_path / "row.zarr", rows=7)
    assert copy.shape in ((1000,), (1, 1000))
    np.testing.assert_array_equal(np.asarray(copy[...]).reshape(1000), VALUES[7])


def test_arrays_without_rows_or_without_a_second_axis_are_mirrored(tmp_path: Path) -> None:
    for nth, values in enumerate((np.zeros((0, 3), np.float16), np.arange(5), np.zeros((5, 0), bool))):
        np.save(tmp_path / "x.npy", values)
        copy = dmdata.open(tmp_path / "x.npy").mirror(tmp_path / f"{nth}.zarr")
        np.testing.assert_array_equal(np.asarray(copy[...]), values)


def test_rows_that_do_not_exist_are_refused_before_anything_is_made(
    s3: LoopbackS3, margins: dmdata.LazyArray, tmp_path: Path
) -> None:
    with pytest.raises(SelectionError):
        margins.mirror(tmp_path / "m.zarr", rows=[5000])
    assert s3.n_requests == 0
    assert not (tmp_path / "m.zarr").exists()


def test_a_mirror_is_opened_like_the_original(margins: dmdata.LazyArray, tmp_path: Path) -> None:
    margins.mirror(tmp_path / "m.zarr", memory_bytes=MEBIBYTE)
    array = dmdata.open(tmp_path / "m.zarr")
    assert array.dims == margins.dims
    with dmdata.budget(usd=0):
        np.testing.assert_array_equal(array[::100, 3], VALUES[::100, 3])


# Money


def test_a_budget_too_small_for_the_whole_stops_it_before_any_data(
    s3: LoopbackS3, margins: dmdata.LazyArray, tmp_path: Path
) -> None:
    whole = VALUES.nbytes * 0.09 / 2**30
    with dmdata.budget(usd=whole * 0.99), pytest.raises(BudgetError, match="nothing was fetched"):
        margins.mirror(tmp_path / "m.zarr", memory_bytes=MEBIBYTE)
    assert s3.n_requests == 0
    with dmdata.budget(usd=whole + 3.5 * 0.0004 / 1000), pytest.raises(BudgetError):
        margins.mirror(tmp_path / "m.zarr", memory_bytes=MEBIBYTE)
    assert s3.n_requests == 0, "enough for the bytes, not for a request each block"
    with dmdata.budget(usd=whole + 16.5 * 0.0004 / 1000):
        margins.mirror(tmp_path / "m.zarr", memory_bytes=MEBIBYTE)


def test_a_budget_too_small_for_all_of_a_glob_stops_it_before_any_data(
    s3: LoopbackS3, catalog: str, tmp_path: Path
) -> None:
    # two headers and the margins, but no request more
    most = VALUES.nbytes * 0.09 / 2**30 + 0.0004 / 1000 * 3.5
    with dmdata.budget(usd=most), pytest.raises(BudgetError):
        dmdata.mirror(["toy/50pct/test_margins", "toy/50pct/train_masks"], tmp_path / "g.zarr", catalog=catalog)
    assert not data_requests(s3)


# Interruption


def mirror_in_subprocess(catalog: str, destination: Path) -> "subprocess.Popen[bytes]":
    program = [sys.executable, "-c", "from dmdata.cli.command import main; main()"]
    command = ["mirror", MARGINS, str(destination), "--catalog", catalog, "--memory", "1", "-y", "--max-cost", "1"]
    return Child([*program, *command], stderr=subprocess.PIPE)


def test_a_killed_mirror_is_gone_on_with_and_fetches_at_most_one_block_again(
    s3: LoopbackS3, catalog: str, tmp_path: Path
) -> None:
    s3.latency_seconds = 0.1
    destination = tmp_path / "m.zarr"
    with mirror_in_subprocess(catalog, destination) as process:
        wait_until(lambda: s3.n_requests >= 8)
        process.send_signal(signal.SIGKILL)
    s3.latency_seconds = 0
    copy = dmdata.mirror(MARGINS, destination, catalog=catalog, memory_bytes=MEBIBYTE)
    np.testing.assert_array_equal(np.asarray(copy[...]), VALUES)
    requests = data_requests(s3)
    assert len(requests) == 16
    assert sum(requests.values()) <= 17
    assert sum(request.range == "bytes=0-127" for request in s3.log) == 1
    total = dmdata.spend()
    assert total.n_bytes >= VALUES.nbytes + 128
    assert total.n_bytes >= s3.n_object_bytes, "what the killed process had reserved counts whole"
    assert total.n_requests <= s3.n_requests + 1


@pytest.mark.parametrize("after", range(0, 16, 5))
def test_a_mirror_that_fails_at_any_block_is_gone_on_with(
    s3: LoopbackS3, margins: dmdata.LazyArray, tmp_path: Path, after: int
) -> None:
    s3.inject(Fault(status=403), after=after)
    with pytest.raises(AccessError):
        margins.mirror(tmp_path / "m.zarr", memory_bytes=MEBIBYTE)
    copy = margins.mirror(tmp_path / "m.zarr", memory_bytes=MEBIBYTE)
    np.testing.assert_array_equal(np.asarray(copy[...]), VALUES)
    assert s3.n_object_bytes == VALUES.nbytes
    assert s3.n_requests == 17
    assert dmdata.spend().n_bytes == VALUES.nbytes + 128


def test_the_journal_never_runs_ahead_of_the_data(s3: LoopbackS3, margins: dmdata.LazyArray, tmp_path: Path) -> None:
    s3.inject(Fault(status=403), after=5)
    with pytest.raises(AccessError):
        margins.mirror(tmp_path / "m.zarr", memory_bytes=MEBIBYTE)
    copy = zarr.open_array(tmp_path / "m.zarr", mode="r")
    digests = np.asarray(zarr.open_array(tmp_path / "m.zarr" / DIGESTS, mode="r")[...])
    assert np.flatnonzero(digests.any(axis=1)).tolist() == [0, 1, 2, 3, 4]
    for nth in range(5):
        rows = slice(128 * nth, 128 * (nth + 1))
        assert stored_digest(copy, Place.of(tmp_path / "m.zarr"), (rows,)) == bytes(digests[nth])
        np.testing.assert_array_equal(np.asarray(copy[rows]), VALUES[rows])


def test_only_one_process_copies_to_a_destination(margins: dmdata.LazyArray, tmp_path: Path) -> None:
    refusals = []

    def meddle(done: Progress) -> None:
        if done.n_rows == 512:
            with pytest.raises(DmdataError, match="another process is writing") as caught:
                margins.mirror(tmp_path / "m.zarr", memory_bytes=MEBIBYTE)
            refusals.append(caught.value)

    copy = margins.mirror(tmp_path / "m.zarr", memory_bytes=MEBIBYTE, progress=meddle)
    assert len(refusals) == 1
    np.testing.assert_array_equal(np.asarray(copy[...]), VALUES)


def test_a_source_that_changed_is_not_mixed_into_a_mirror_begun_before(
    s3: LoopbackS3, margins: dmdata.LazyArray, catalog: str, tmp_path: Path
) -> None:
    destination = tmp_path / "m.zarr"
    s3.inject(Fault(replace=npy(VALUES + 1)), after=5)
    with pytest.raises(IntegrityError):
        margins.mirror(destination, memory_bytes=MEBIBYTE)
    before = np.asarray(zarr.open_array(destination, mode="r")[...])
    with pytest.raises(IntegrityError, match="changed since the mirror") as caught:
        dmdata.mirror(MARGINS, destination, catalog=catalog, memory_bytes=MEBIBYTE)
    assert str(destination) in str(caught.value)
    np.testing.assert_array_equal(np.asarray(zarr.open_array(destination, mode="r")[...]), before)


def test_a_destination_that_holds_something_else_is_left_alone(margins: dmdata.LazyArray, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    zarr.create_array(tmp_path / "other.zarr", shape=(3,), dtype="i4")[...] = 7
    margins.mirror(tmp_path / "part.zarr", rows=slice(10))
    for name in ("folder", "file", "other.zarr", "part.zarr"):
        with pytest.raises(DmdataError, match=f"{tmp_path}/{name}"):
            margins.mirror(tmp_path / name)
    assert (tmp_path / "folder" / "letter.txt").read_text() == "dear"
    assert (tmp_path / "file").read_text() == "dear"
    assert np.asarray(zarr.open_array(tmp_path / "other.zarr")[...]).tolist() == [7, 7, 7]
    assert zarr.open_array(tmp_path / "part.zarr").shape == (10, 1000)


def test_a_mirror_to_where_nothing_can_be_written_says_so(margins: dmdata.LazyArray, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("dear")
    with pytest.raises(DmdataError, match="file"):
        margins.mirror(tmp_path / "file" / "m.zarr")


# Groups


def test_a_glob_is_mirrored_as_a_group_with_every_array_under_its_name(
    s3: LoopbackS3, catalog: str, tmp_path: Path
) -> None:
    names: set[str] = set()
    group = dmdata.mirror(
        "toy/50pct/*",
        tmp_path / "g.zarr",
        catalog=catalog,
        rows=slice(0, 200),
        progress=lambda name, _: names.add(name),
    )
    assert isinstance(group, zarr.Group)
    opened = zarr.open_group(tmp_path / "g.zarr", mode="r")
    assert names == {MARGINS, MASKS}
    for name in names:
        source = dmdata.open(name, catalog=catalog, local=False)
        np.testing.assert_array_equal(np.asarray(opened[name][...]), source[:200])  # type: ignore[index] # an array
        np.testing.assert_array_equal(dmdata.open(tmp_path / "g.zarr" / name)[3], source[3])
    s3.reset_log()
    dmdata.mirror("toy/50pct/*", tmp_path / "g.zarr", catalog=catalog, rows=slice(0, 200))
    assert s3.n_requests == 0


def test_every_array_of_a_pt_is_mirrored(s3: LoopbackS3, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    values = {"weight": np.arange(600, dtype=np.float32).reshape(30, 20), "bias": np.arange(20, dtype=np.float32)}
    torch.save({name: torch.from_numpy(array) for name, array in values.items()}, tmp_path / "x.pt")
    pt = Pt((tmp_path / "x.pt").read_bytes(), values)
    catalog = publish(s3, {"toy/50pct/test_datamodels": pt}, tmp_path)
    group = dmdata.mirror("toy/50pct/test_datamodels", tmp_path / "g.zarr", catalog=catalog)
    for name, array in values.items():
        np.testing.assert_array_equal(np.asarray(group[f"toy/50pct/test_datamodels/{name}"][...]), array)  # type: ignore[index] # an array


def test_a_local_run_is_mirrored_for_free(tmp_path: Path) -> None:
    catalog = write_locally({MARGINS: VALUES}, tmp_path / "run")
    with dmdata.budget(usd=0):
        copy = dmdata.mirror(MARGINS, tmp_path / "m.zarr", catalog=catalog, columns=[5, 1])
    np.testing.assert_array_equal(np.asarray(copy[...]), VALUES[:, [5, 1]])  # type: ignore[index] # an array
    assert dmdata.spend().n_reads == 0
