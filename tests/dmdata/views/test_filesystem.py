"""``dmdata://`` shows a catalog's objects as read-only files, and each byte read is paid from a budget."""

import io
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers.loopback import SECRET, LoopbackS3
from small_release import Pt, npy, publish, write_locally

import dmdata
from dmdata.errors import AccessError, BudgetError, CatalogError, FormatError, IntegrityError, ObjectMissingError
from dmdata.plugins.filesystem import DmdataFileSystem

MARGINS = "toy/50pct/test_margins"
MASKS = "toy/50pct/train_masks"
VALUES = np.arange(40 * 30, dtype=np.float32).reshape(40, 30)
CONTENT = npy(VALUES)
BIG = "toy/20pct/train_masks"
WIDE = np.zeros((64, 1 << 16), np.uint8)


@pytest.fixture
def server(s3: LoopbackS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackS3]:
    """A server to which no request without a range may ever have gone."""
    monkeypatch.setenv("DMDATA_CACHE_GIB", "0")  # the same is read again and again, and counted
    yield s3
    assert all(request.method == "GET" and request.range for request in s3.log), s3.log


@pytest.fixture
def catalog(server: LoopbackS3, tmp_path: Path) -> str:
    return publish(server, {MARGINS: VALUES, MASKS: VALUES > 7, BIG: WIDE}, tmp_path)


@pytest.fixture
def files(server: LoopbackS3, catalog: str) -> DmdataFileSystem:
    return fsspec.filesystem("dmdata", catalog=catalog)


def test_listing_globbing_and_finding_cost_nothing(server: LoopbackS3, files: DmdataFileSystem) -> None:
    assert files.ls("", detail=False) == ["toy"]
    assert files.ls("dmdata://toy", detail=False) == ["toy/20pct", "toy/50pct"]
    assert files.ls("toy/50pct/", detail=False) == [MARGINS, MASKS]
    assert files.ls(MARGINS) == [files.info(MARGINS)]
    assert files.info(f"dmdata://{MARGINS}") == {"name": MARGINS, "size": len(CONTENT), "type": "file", "format": "npy"}
    assert files.glob("toy/*/train_*") == [BIG, MASKS]
    assert files.find("toy") == [BIG, MARGINS, MASKS]
    assert files.isdir("toy/50pct")
    assert files.isfile(MARGINS)
    assert not files.exists("toy/5")
    assert files.info("")["type"] == "directory"
    assert server.n_requests == 0


def test_the_names_of_the_release_are_there_without_network() -> None:
    files = fsspec.filesystem("dmdata")
    assert files.ls("", detail=False) == ["cifar", "fmow"]
    assert files.info("cifar/50pct/test_margins")["size"] == 310_000 * 10_000 * 2 + 128


def test_a_file_is_the_object_to_the_byte(files: DmdataFileSystem) -> None:
    assert files.cat_file(MARGINS) == files.cat(MARGINS) == CONTENT
    with files.open(MARGINS) as file:
        np.testing.assert_array_equal(np.load(file), VALUES)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.none() | st.integers(-5000, 5000), end=st.none() | st.integers(-5000, 5000))
def test_a_range_of_a_file_is_read_to_the_byte(
    server: LoopbackS3, files: DmdataFileSystem, start: int | None, end: int | None
) -> None:
    files.info(MARGINS)
    dmdata.release.opening.open_object(MARGINS, catalog=files.catalog)  # remembers the header
    server.reset_log()
    assert files.cat_file(MARGINS, start, end) == CONTENT[start:end]
    assert server.n_bytes == len(CONTENT[start:end])


def test_ranges_of_several_files_are_one_read_each(server: LoopbackS3, files: DmdataFileSystem) -> None:
    files.cat_ranges([MARGINS, BIG], 0, 1)
    server.reset_log()
    before = dmdata.spend()
    pieces = files.cat_ranges([BIG, MARGINS, BIG], [10, 128, -100_000], [20, -4000, -90_000])
    octets = npy(WIDE)
    assert pieces == [octets[10:20], CONTENT[128:-4000], octets[-100_000:-90_000]]
    assert server.n_bytes == sum(map(len, pieces))
    assert dmdata.spend().n_reads - before.n_reads == 2


def test_an_error_stands_in_place_of_ranges_where_it_is_asked_to(files: DmdataFileSystem) -> None:
    pieces = files.cat_ranges([MARGINS, "toy/50pct/none"], [0, 0], [6, 6])
    assert pieces[0] == b"\x93NUMPY"
    assert isinstance(pieces[1], ObjectMissingError)
    with pytest.raises(ObjectMissingError):
        files.cat_ranges(["toy/50pct/none"], [0], [6], on_error="raise")
    with pytest.raises(ValueError, match="pass as many of each"):
        files.cat_ranges([MARGINS], [0, 1], [6])


def test_a_seek_pays_for_little_more_than_a_block(server: LoopbackS3, files: DmdataFileSystem) -> None:
    with files.open(BIG, block_size=1000, cache_type="readahead") as file:
        server.reset_log()
        file.seek(2_000_000)
        assert file.read(100) == npy(WIDE)[2_000_000:2_000_100]
    assert server.n_bytes == 1100
    with files.open(BIG, cache_type="none") as file:
        server.reset_log()
        file.seek(2_000_000)
        file.read(100)
    assert server.n_bytes == 100


def test_an_open_file_by_url_pickles_without_credentials(server: LoopbackS3, catalog: str) -> None:
    named = fsspec.open(f"dmdata://{MARGINS}", catalog=catalog)
    text = pickle.dumps(named)
    assert SECRET.encode() not in text
    with pickle.loads(text) as file:
        np.testing.assert_array_equal(np.load(file), VALUES)
        file.seek(9)
        copy = pickle.loads(pickle.dumps(file))
        assert (copy.tell(), copy.read(20)) == (9, CONTENT[9:29])


def test_a_read_over_the_budget_is_refused_before_any_byte(server: LoopbackS3, files: DmdataFileSystem) -> None:
    with files.open(BIG) as file:
        server.reset_log()
        with dmdata.budget(usd=1e-9), pytest.raises(BudgetError):
            file.read()
    with dmdata.budget(usd=1e-9), pytest.raises(BudgetError):
        files.cat_ranges([BIG], [0], [1000], on_error="raise")
    assert server.n_requests == 0


def test_an_object_that_changed_is_an_error(server: LoopbackS3, files: DmdataFileSystem) -> None:
    with files.open(MARGINS, cache_type="none") as file:
        file.read(1)
        server.put("toy/data/test_margins_50pct.npy", npy(VALUES + 1))
        with pytest.raises(IntegrityError):
            file.read()


@pytest.mark.parametrize(
    "write",
    [
        lambda files: files.open(MARGINS, "wb"),
        lambda files: files.open(MARGINS, "ab"),
        lambda files: files.rm(MARGINS),
        lambda files: files.pipe(MARGINS, b"x"),
        lambda files: files.touch(MARGINS),
        lambda files: files.mkdir("toy/new"),
        lambda files: files.makedirs("toy/new"),
        lambda files: files.cp_file(MARGINS, "x"),
        lambda files: files.mv(MARGINS, "x"),
        lambda files: files.put_file(__file__, MARGINS),
    ],
)
def test_writing_is_refused_in_words(server: LoopbackS3, files: DmdataFileSystem, write) -> None:
    with pytest.raises(AccessError, match="dmdata:// is read-only") as caught:
        write(files)
    assert caught.value.cause == "read_only"
    assert server.n_requests == 0


def test_what_is_no_file_is_refused_in_words(files: DmdataFileSystem) -> None:
    with pytest.raises(ObjectMissingError, match="nearest"):
        files.cat_file("toy/50pct/test_margin")
    with pytest.raises(IsADirectoryError, match="open one of"):
        files.cat_file("toy/50pct")


def test_a_pt_is_one_file_and_its_arrays_are_none(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    held = Pt(buffer.getvalue(), {"weight": np.zeros((2, 3), np.float32)})
    about = write_locally({"toy/50pct/test_datamodels": held}, tmp_path)
    files = fsspec.filesystem("dmdata", catalog=about)
    assert files.find("toy") == ["toy/50pct/test_datamodels"]
    with pytest.raises(ObjectMissingError, match="is a part of the object toy/50pct/test_datamodels"):
        files.cat_file("toy/50pct/test_datamodels/weight")
    with pytest.raises(FormatError):
        files.cat_file("toy/50pct/test_datamodels")


def test_an_array_of_a_zarr_store_is_no_file(tmp_path: Path) -> None:
    import yaml
    import zarr

    about = write_locally({MARGINS: VALUES}, tmp_path)
    zarr.create_array(tmp_path / "m.zarr", data=VALUES)
    document = yaml.safe_load(Path(about).read_text())
    document["datasets"]["toy"]["alphas"]["50pct"]["arrays"]["test_margins"] |= {"key": "m.zarr", "format": "zarr"}
    Path(about).write_text(yaml.safe_dump(document))
    files = fsspec.filesystem("dmdata", catalog=about)
    assert files.info(MARGINS)["type"] == "other"
    with pytest.raises(CatalogError, match="an array of a Zarr store"):
        files.cat_file(MARGINS)


def test_importing_dmdata_makes_the_protocol_known_and_loads_nothing_for_it() -> None:
    program = (
        "import sys, dmdata, fsspec; assert 'dmdata.plugins.filesystem' not in sys.modules\n"
        "print(fsspec.filesystem('dmdata'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "DmdataFileSystem" in done.stdout
