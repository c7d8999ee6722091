"""A download is the object, byte for byte and under its own name, or nothing; what was paid for is kept."""

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import Child, wait_until
from servers.loopback import Fault, LoopbackS3
from small_release import Pt, npy, publish, write_locally

import dmdata
from dmdata.errors import AccessError, BudgetError, CatalogError, DmdataError, FormatError, IntegrityError
from dmdata.layout.formats import TrailingBytesWarning

NAME = "toy/50pct/test_margins"
KEY = "toy/data/test_margins_50pct.npy"
VALUES = np.random.default_rng(0).normal(size=(300, 1000)).astype(np.float16)
BLOCK_BYTES = 128 << 20


@pytest.fixture
def catalog(s3: LoopbackS3, tmp_path: Path) -> str:
    return publish(s3, {NAME: VALUES}, tmp_path / "catalog")


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "downloads").mkdir()
    return tmp_path / "downloads"


def test_a_download_is_the_object_and_is_paid_once(s3: LoopbackS3, catalog: str, folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = dmdata.get(NAME, folder, catalog=catalog, progress=lambda done, total: seen.append((done, total)))
    assert path == folder / "test_margins_50pct.npy"
    assert path.read_bytes() == s3.content(KEY)
    assert left_in(folder) == [path.name]
    assert seen[-1] == (len(s3.content(KEY)),) * 2
    assert dmdata.spend().n_bytes == s3.n_bytes <= path.stat().st_size + 128
    np.testing.assert_array_equal(np.load(path), VALUES)


def test_a_download_is_named_or_put_where_one_says(
    s3: LoopbackS3, catalog: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dmdata.get(NAME, folder / "deep" / "mine.npy", catalog=catalog) == folder / "deep" / "mine.npy"
    monkeypatch.chdir(folder)
    assert dmdata.get(NAME, catalog=catalog) == Path("test_margins_50pct.npy")
    assert left_in(folder) == ["deep", "test_margins_50pct.npy"]


def test_a_file_that_is_there_is_not_written_over_or_paid_for(s3: LoopbackS3, catalog: str, folder: Path) -> None:
    (folder / "x.npy").write_text("mine")
    with pytest.raises(DmdataError, match="exists"):
        dmdata.get(NAME, folder / "x.npy", catalog=catalog)
    assert (folder / "x.npy").read_text() == "mine"
    assert s3.n_requests == 0


def test_a_local_object_is_copied_for_free(tmp_path: Path, folder: Path) -> None:
    catalog = write_locally({NAME: VALUES}, tmp_path / "run")
    with dmdata.budget(usd=0):
        path = dmdata.get(NAME, folder, catalog=catalog)
    np.testing.assert_array_equal(np.load(path), VALUES)
    assert dmdata.spend().n_reads == 0


def test_a_member_of_a_pt_downloads_the_whole_pt(s3: LoopbackS3, tmp_path: Path, folder: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"weight": torch.eye(3)}, tmp_path / "x.pt")
    pt = Pt((tmp_path / "x.pt").read_bytes(), {"weight": np.eye(3, dtype=np.float32)})
    catalog = publish(s3, {"toy/50pct/test_datamodels": pt}, tmp_path)
    path = dmdata.get("toy/50pct/test_datamodels/weight", folder, catalog=catalog)
    assert path.read_bytes() == pt.content


@pytest.mark.parametrize("damaged", [npy(VALUES)[:-1], b"<html>" * 99, b"", npy(VALUES).replace(b"<f2", b"|O2")])
def test_a_damaged_object_leaves_nothing_behind(s3: LoopbackS3, catalog: str, folder: Path, damaged: bytes) -> None:
    s3.put(KEY, damaged)
    with pytest.raises(FormatError, match=KEY):
        dmdata.get(NAME, folder, catalog=catalog)
    assert left_in(folder) == []


def test_a_npy_that_is_not_what_its_header_says_is_refused_before_it_is_paid_for(
    s3: LoopbackS3, catalog: str, folder: Path
) -> None:
    s3.put(KEY, npy(VALUES)[:-1])
    with pytest.raises(FormatError, match="its header promises"):
        dmdata.get(NAME, folder, catalog=catalog)
    assert (s3.n_requests, s3.n_object_bytes) == (1, 128)


def test_a_pt_with_code_in_it_leaves_nothing_behind(s3: LoopbackS3, tmp_path: Path, folder: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"weight": torch.nn.Linear(2, 2)}, tmp_path / "x.pt")
    pt = Pt((tmp_path / "x.pt").read_bytes(), {"weight": np.eye(2, dtype=np.float32)})
    catalog = publish(s3, {"toy/50pct/test_datamodels": pt}, tmp_path)
    with pytest.raises(FormatError, match="nothing was run"):
        dmdata.get("toy/50pct/test_datamodels", folder, catalog=catalog)
    assert left_in(folder) == []


def test_a_digest_that_differs_from_the_catalogs_leaves_nothing_behind(
    s3: LoopbackS3, tmp_path: Path, folder: Path
) -> None:
    right = hashlib.sha256(npy(VALUES)).hexdigest()
    wrong = publish(s3, {NAME: VALUES}, tmp_path / "wrong", sha256="0" * 64)
    with pytest.raises(IntegrityError, match=right) as caught:
        dmdata.get(NAME, folder, catalog=wrong)
    assert caught.value.exit_code == 3
    assert left_in(folder) == []
    good = publish(s3, {NAME: VALUES}, tmp_path / "right", sha256=right)
    assert dmdata.get(NAME, folder, catalog=good).exists()


def test_an_object_that_changes_meanwhile_leaves_nothing_behind(s3: LoopbackS3, catalog: str, folder: Path) -> None:
    s3.inject(Fault(replace=npy(VALUES + 1)), after=1)
    with pytest.raises(IntegrityError):
        dmdata.get(NAME, folder, catalog=catalog)
    assert left_in(folder) == []
    np.testing.assert_array_equal(np.load(dmdata.get(NAME, folder, catalog=catalog)), VALUES + 1)


def test_a_budget_too_small_for_the_whole_stops_it_before_any_data(s3: LoopbackS3, catalog: str, folder: Path) -> None:
    with dmdata.budget(usd=VALUES.nbytes * 0.09 / 2**30), pytest.raises(BudgetError):
        dmdata.get(NAME, folder, catalog=catalog)
    assert s3.n_bytes <= 128
    assert "test_margins_50pct.npy" not in left_in(folder)


def test_a_download_that_was_refused_half_way_is_gone_on_with(s3: LoopbackS3, catalog: str, folder: Path) -> None:
    s3.inject(Fault(status=403), after=1)
    with pytest.raises(AccessError):
        dmdata.get(NAME, folder, catalog=catalog)
    assert "test_margins_50pct.npy" not in left_in(folder)
    path = dmdata.get(NAME, folder, catalog=catalog)
    assert path.read_bytes() == s3.content(KEY)
    assert left_in(folder) == [path.name]


def test_a_part_of_another_object_is_not_gone_on_with(s3: LoopbackS3, catalog: str, folder: Path) -> None:
    (folder / "x.npy.part").write_bytes(b"\xff" * 1000)
    (folder / "x.npy.part.json").write_text('{"n_bytes": 1000, "etag": "another"}')
    path = dmdata.get(NAME, folder / "x.npy", catalog=catalog)
    assert path.read_bytes() == s3.content(KEY)


def test_a_download_to_where_nothing_can_be_written_says_so(s3: LoopbackS3, catalog: str, folder: Path) -> None:
    (folder / "file").write_text("dear")
    with pytest.raises(DmdataError, match="cannot be written"):
        dmdata.get(NAME, folder / "file" / "x.npy", catalog=catalog)


def test_an_array_in_a_zarr_store_is_not_one_object(tmp_path: Path) -> None:
    about = write_locally({NAME: VALUES}, tmp_path)
    text = Path(about).read_text()
    Path(about).write_text(text.replace("format: npy", "format: zarr"))
    with pytest.raises(CatalogError, match="dmdata mirror"):
        dmdata.get(NAME, catalog=about)


def test_a_killed_download_is_gone_on_with_and_fetches_at_most_one_block_again(
    s3: LoopbackS3, tmp_path: Path, folder: Path
) -> None:
    size = 3 * BLOCK_BYTES - 128
    values = np.lib.format.open_memmap(tmp_path / "big.npy", mode="w+", dtype=np.uint8, shape=(4, size // 4))  # type: ignore[no-untyped-call] # numpy's own
    values[:, ::4096] = np.arange(1, 5)[:, None]
    values.flush()
    catalog = publish(s3, {NAME: VALUES}, tmp_path, shape=[4, size // 4], dtype="uint8", n_bytes=size + 128)
    s3.put(KEY, tmp_path / "big.npy")
    s3.latency_seconds = 0.3
    command = ["get", NAME, "-o", str(folder / "x.npy"), "--catalog", catalog, "-y"]
    program = [sys.executable, "-c", "from dmdata.cli.command import main; main()", *command]
    with Child(program, stderr=subprocess.PIPE) as process:
        # the first block is written, the second asked for
        wait_until(lambda: sum(request.n_bytes > 1 for request in s3.log) >= 5)
        process.send_signal(signal.SIGKILL)
    assert "x.npy" not in left_in(folder)
    s3.latency_seconds = 0
    path = dmdata.get(NAME, folder / "x.npy", catalog=catalog)
    assert path.stat().st_size == size + 128
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256((tmp_path / "big.npy").read_bytes()).digest()
    assert left_in(folder) == ["x.npy"]
    assert s3.n_object_bytes <= size + 128 + BLOCK_BYTES + 2 * 128
    assert dmdata.spend().n_bytes >= size + 128
    path.unlink()
    (tmp_path / "big.npy").unlink()


def test_an_object_that_goes_on_behind_its_array_is_downloaded_whole_with_a_warning(
    s3: LoopbackS3, catalog: str, folder: Path
) -> None:
    s3.put(KEY, npy(VALUES) + npy(VALUES))
    with pytest.warns(TrailingBytesWarning, match=r"ends at byte 600,128"):
        path = dmdata.get(NAME, folder, catalog=catalog)
    assert path.read_bytes() == npy(VALUES) + npy(VALUES)
