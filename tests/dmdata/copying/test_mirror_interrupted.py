"""Whatever ends a mirror, nothing that had landed is lost, and nothing is paid twice but what was in flight."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Child, printed_seed, wait_until
from servers.loopback import Fault, LoopbackS3
from small_release import npy, publish

import dmdata
from dmdata.copying.journal import DIGESTS
from dmdata.copying.place import SPOOL
from dmdata.copying.spool import Landing, read_key
from dmdata.errors import AccessError, DmdataError
from dmdata.layout.selection import select
from dmdata.reading.fetch import LEAST_RANGE_BYTES
from dmdata.reading.pace import CONNECTIONS

MARGINS = "toy/50pct/test_margins"
MASKS = "toy/50pct/train_masks"
MEBIBYTE = 1 << 20


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from dmdata.cli.command import main; main()", *map(str, arguments)]


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_mirrors_killed_at_random_moments_pay_again_only_what_was_in_flight(s3: LoopbackS3, tmp_path: Path) -> None:
    # every second row: a request each, for the gap between two costs more
    values = np.random.default_rng(0).normal(size=(3000, 4000)).astype(np.float16)
    catalog = publish(s3, {MARGINS: values}, tmp_path)
    wanted = values[::2]
    arguments = ["mirror", MARGINS, tmp_path / "m.zarr", "--catalog", catalog, "--select", "::2", "--memory", 8, "-yq"]
    rng, n_kills = np.random.default_rng(printed_seed()), 0
    s3.latency_seconds = 0.03
    for _ in range(6):
        before = s3.n_requests
        with Child(command(*arguments), stderr=subprocess.PIPE) as process:
            wait_until(lambda: process.poll() is not None or s3.n_requests > before + 50)  # noqa: B023
            time.sleep(rng.uniform(0, 0.5))
            n_kills += process.poll() is None
            process.kill()
    assert n_kills >= 3
    s3.latency_seconds = 0
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    np.testing.assert_array_equal(np.asarray(zarr.open_array(tmp_path / "m.zarr", mode="r")[...]), wanted)
    again = s3.n_object_bytes - wanted.nbytes
    # on a busy machine what had arrived may wait to be written while as many further requests are under way
    assert 0 <= again <= n_kills * (2 * CONNECTIONS * 8000 + 128)
    assert dmdata.spend().n_bytes >= s3.n_object_bytes
    assert not (tmp_path / "m.zarr" / SPOOL).exists()


def test_ranges_of_a_block_that_had_landed_are_not_fetched_again(s3: LoopbackS3, tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((240, 100 * 1024)) < 0.5  # one block, six ranges
    catalog = publish(s3, {MASKS: values}, tmp_path)
    destination = tmp_path / "m.zarr"
    s3.inject(Fault(stall_seconds=30, stall_after=1000), after=3)
    with Child(command("mirror", MASKS, destination, "--catalog", catalog, "-y", "-q")) as process:
        spool = destination / SPOOL / "0.ranges"
        wait_until(lambda: spool.exists() and spool.stat().st_size == 32 + 5 * 32)
        process.kill()
    s3.reset_log()
    copy = dmdata.mirror(MASKS, destination, catalog=catalog)
    np.testing.assert_array_equal(np.asarray(copy[...]), values)  # type: ignore[index] # an array
    # whichever of the six was stalled, the last of which is shorter
    (missing,) = s3.log
    assert missing.n_bytes in (LEAST_RANGE_BYTES, values.nbytes - 5 * LEAST_RANGE_BYTES)


def test_a_block_that_was_fetched_and_not_written_is_not_fetched_again(s3: LoopbackS3, tmp_path: Path) -> None:
    values = np.arange(300_000, dtype=np.int32).reshape(300, 1000)
    array = dmdata.open(MARGINS, catalog=publish(s3, {MARGINS: values}, tmp_path)).read_header()

    s3.inject(Fault(status=403))
    with pytest.raises(AccessError):
        array.mirror(tmp_path / "m.zarr")
    # where the chunks should go is a file in their way
    (tmp_path / "m.zarr" / "c").write_bytes(b"")
    with pytest.raises(DmdataError, match="what is complete stays"):
        array.mirror(tmp_path / "m.zarr")
    (tmp_path / "m.zarr" / "c").unlink()
    s3.reset_log()
    np.testing.assert_array_equal(np.asarray(array.mirror(tmp_path / "m.zarr")[...]), values)
    assert s3.n_requests == 0


def test_what_landed_of_a_changed_object_or_is_damaged_is_not_used(s3: LoopbackS3, tmp_path: Path) -> None:
    values = np.arange(400_000, dtype=np.int32).reshape(400, 1000)
    array = dmdata.open(MARGINS, catalog=publish(s3, {MARGINS: values}, tmp_path)).read_header()
    s3.inject(Fault(status=403), after=0)
    with pytest.raises(AccessError):
        array.mirror(tmp_path / "m.zarr")
    for damage in ("bytes", "ranges"):
        landing = Landing()
        selection = select(..., array.shape, orthogonal=True)
        plan = array.planned(selection)
        assert plan is not None
        spool = tmp_path / "m.zarr" / SPOOL / "0"
        landing.attach(spool, read_key(array.identity, plan), plan.wanted_bytes)
        array.read(selection, spool=landing)
        landing.detach()
        path = spool.with_name(f"0.{damage}")
        scrambled = bytearray(path.read_bytes())
        scrambled[len(scrambled) // 2] ^= 1
        path.write_bytes(scrambled)
        s3.reset_log()
        copy = array.mirror(tmp_path / "m.zarr")
        np.testing.assert_array_equal(np.asarray(copy[...]), values)
        assert s3.n_requests == 1
        zarr.open_array(tmp_path / "m.zarr" / DIGESTS)[...] = 0


@settings(max_examples=50)
@given(data=st.data())
def test_a_spool_has_what_was_kept_whoever_cuts_its_records(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("spool") / "3"
    content = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)
    bounds = [0, *sorted(data.draw(st.lists(st.integers(0, 1000), max_size=6))), 1000]
    ranges = list(enumerate(itertools.pairwise(bounds)))
    landing = Landing()
    landing.attach(path, "key", 1000)
    kept = data.draw(st.permutations(ranges))[: data.draw(st.integers(0, len(ranges)))]
    for nth, (start, stop) in kept:
        landing.product(1000)[start:stop] = content[start:stop]
        landing.landed(nth, start, stop)
    landing.detach()
    records = path.with_name("3.ranges")
    n_whole = data.draw(st.integers(0, len(kept)))
    os.truncate(records, 32 + 32 * n_whole + data.draw(st.integers(0, 31 if n_whole < len(kept) else 0)))
    again = Landing()
    again.attach(path, data.draw(st.sampled_from(["key", "other"])), 1000)
    found = [nth for nth, _ in ranges if again.has(nth)]
    assert found in ([], sorted(nth for nth, _ in kept[:n_whole]))
    for nth in found:
        start, stop = dict(ranges)[nth]
        np.testing.assert_array_equal(again.product(1000)[start:stop], content[start:stop])
    again.detach()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 6 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("memory", [4, 16])
def test_a_full_disk_ends_a_mirror_in_words_and_nothing_is_paid_twice(
    s3: LoopbackS3, small_disk: Path, tmp_path: Path, memory: int
) -> None:
    values = np.random.default_rng(0).integers(0, 256, (5000, 2000), np.uint8)  # 9.5 MiB, hardly compressible
    catalog = publish(s3, {MARGINS: values}, tmp_path)
    arguments = ["mirror", MARGINS, small_disk / "m.zarr", "--catalog", catalog, "--memory", memory, "-y", "-q"]
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "No space left on device; what is complete stays" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    np.testing.assert_array_equal(np.asarray(zarr.open_array(small_disk / "m.zarr", mode="r")[...]), values)
    assert s3.n_object_bytes == values.nbytes + 128
    assert folder_bytes(small_disk) < 1.2 * values.nbytes


def test_an_interrupted_mirror_ends_at_once_and_in_one_line(s3: LoopbackS3, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(4000, 4000)).astype(np.float16)
    catalog = publish(s3, {MARGINS: values}, tmp_path)
    s3.bytes_per_second = 2e6
    arguments = ["mirror", MARGINS, tmp_path / "m.zarr", "--catalog", catalog, "--memory", 16, "-y", "-q"]
    restored = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program = command(*arguments)
    program[2] = restored + program[2]
    with Child(program, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: s3.n_requests >= 3)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert s3.n_object_bytes < values.nbytes / 2, "nothing was waited for"
    assert process.returncode == 130
    assert err.splitlines() == ["dmdata: interrupted; what is complete stays, run the same again to resume"]


def test_a_home_that_cannot_be_written_is_named_before_anything_is_paid(
    s3: LoopbackS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = publish(s3, {MARGINS: np.zeros((10, 10), np.float16)}, tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DMDATA_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(DmdataError, match="set DMDATA_HOME"):
        dmdata.mirror(MARGINS, tmp_path / "m.zarr", catalog=catalog)
    assert s3.n_requests == 0


def test_memory_does_not_grow_with_the_number_of_rows(s3: LoopbackS3, tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc, which this system lacks")
    program = (
        "import sys, dmdata\n"
        "array = dmdata.open(sys.argv[1]).read_header()\n"
        "array.mirror(sys.argv[2], memory_bytes=32 << 20)\n"
        # of this program alone; getrusage would count what its parent had
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    peaks = []
    for n_rows in (3000, 24000):
        values = np.random.default_rng(0).random((n_rows, 10_000), np.float32) < 0.5
        s3.put(f"x{n_rows}.npy", npy(values))
        arguments = [f"s3://madrylab-datamodels/x{n_rows}.npy", str(tmp_path / f"{n_rows}.zarr")]
        runs = []
        for nth in range(2):  # what happens to be in memory at one time varies by some percent
            place = f"{arguments[1]}{nth}"
            run = [sys.executable, "-c", program, arguments[0], place]
            runs.append(int(subprocess.run(run, capture_output=True, text=True, check=True).stdout))
        peaks.append(min(runs))
    assert peaks[1] < 1.05 * peaks[0], peaks
