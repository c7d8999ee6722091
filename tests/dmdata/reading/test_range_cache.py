"""What was paid once is not paid again: bytes of paid objects are kept, and never served wrong."""

import math
import multiprocessing
import os
import pickle
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import Child
from servers.loopback import BUCKET, Fault, LoopbackS3
from small_release import npy, publish

import dmdata
from dmdata.errors import AccessError, BudgetError, DmdataError, IntegrityError
from dmdata.layout.formats import Layout
from dmdata.layout.plan import overlaps, plan_read, subtract
from dmdata.layout.selection import select
from dmdata.money.ledger import home
from dmdata.objects.address import Address
from dmdata.reading import ranges
from dmdata.reading.byte_index import ByteIndex
from dmdata.reading.segments import Record, Segment

NAME = "toy/50pct/test_margins"
KEY = "toy/data/test_margins_50pct.npy"
VALUES = np.random.default_rng(5).integers(0, 60000, (400, 50)).astype(np.uint16)
LONG_ROWS = np.random.default_rng(6).integers(0, 255, (40, 10000)).astype(np.uint8)


@pytest.fixture(autouse=True)
def forgetful() -> None:
    fresh_process()


@pytest.fixture
def catalog(s3: LoopbackS3, tmp_path: Path) -> str:
    return publish(s3, {NAME: VALUES, "toy/50pct/train_margins": LONG_ROWS}, tmp_path)


def served(s3: LoopbackS3, read: Callable[[], object]) -> tuple[int, int]:
    """Requests and bytes of a read, as the server counts them."""
    before = s3.n_requests, s3.n_bytes
    read()
    return s3.n_requests - before[0], s3.n_bytes - before[1]


def bytes_served(s3: LoopbackS3, since: int = 0) -> list[tuple[int, int]]:
    """Byte ranges that were served, from the log."""
    found = []
    for request in s3.log[since:]:
        if request.status == 206 and request.range:
            start, last = request.range.removeprefix("bytes=").split("-")
            found.append((int(start), int(last) + 1))
    return found


def kept_files() -> list[Path]:
    return sorted((home() / "ranges").glob("*/*.ranges"))


def let_time_pass(seconds: float) -> None:
    """Make what is kept older, as far as files show."""
    for path in kept_files():
        facts = path.stat()
        os.utime(path, (facts.st_atime - seconds, facts.st_mtime - seconds))


def fresh_process() -> None:
    """Forget what this process knows, as a new one would."""
    ranges.forget_what_is_known()


def test_what_was_read_once_is_not_fetched_again(s3: LoopbackS3, catalog: str) -> None:
    array = dmdata.open(NAME, catalog=catalog).read_header()
    assert served(s3, lambda: array[10:20]) == (1, 10 * 100)
    spent = dmdata.spend()
    for anew in (False, True):
        if anew:
            fresh_process()
        assert served(s3, lambda: np.testing.assert_array_equal(array[10:20], VALUES[10:20])) == (0, 0)
        assert served(s3, lambda: np.testing.assert_array_equal(array[12, 3:9], VALUES[12, 3:9])) == (0, 0)
    assert dmdata.spend() == spent, "what is not fetched is not booked"


def test_of_more_rows_only_the_missing_ones_are_fetched_planned_and_booked(s3: LoopbackS3, catalog: str) -> None:
    array = dmdata.open(NAME, catalog=catalog).read_header()
    whole = array.estimate(np.s_[0:200])
    array[0:100]
    plan, price, booked = array.plan(np.s_[0:200]), array.estimate(np.s_[0:200]), dmdata.spend()
    assert (plan.n_requests, plan.n_bytes) == (1, 100 * 100)
    assert price.n_bytes == 100 * 100
    assert price.usd < whole.usd
    assert served(s3, lambda: np.testing.assert_array_equal(array[0:200], VALUES[0:200])) == (1, 100 * 100)
    assert dmdata.spend().n_bytes - booked.n_bytes == 100 * 100
    assert array.plan(np.s_[0:200]).n_requests == 0
    assert array.estimate(np.s_[0:200]).usd == 0


def test_what_lies_between_two_missing_parts_is_not_fetched_again(s3: LoopbackS3, catalog: str) -> None:
    array = dmdata.open(NAME, catalog=catalog).read_header()
    array[5]
    assert served(s3, lambda: np.testing.assert_array_equal(array[0:10], VALUES[0:10])) == (2, 9 * 100)


def test_a_column_after_rows_fetches_its_missing_cells_alone(s3: LoopbackS3, catalog: str) -> None:
    array = dmdata.open("toy/50pct/train_margins", catalog=catalog).read_header()
    array[10:20]
    assert served(s3, lambda: np.testing.assert_array_equal(array[:, 77], LONG_ROWS[:, 77])) == (30, 30)


def test_bytes_fetched_to_save_requests_are_kept_too(s3: LoopbackS3, catalog: str) -> None:
    array = dmdata.open(NAME, catalog=catalog).read_header()
    n_requests, n_bytes = served(s3, lambda: array[:, 7])
    assert (n_requests, n_bytes) == (1, 399 * 100 + 2)
    assert served(s3, lambda: np.testing.assert_array_equal(array[1:399], VALUES[1:399])) == (0, 0)


def test_many_holes_are_filled_again_where_requests_would_cost_more(s3: LoopbackS3, catalog: str) -> None:
    array = dmdata.open(NAME, catalog=catalog).read_header()
    for row in range(0, 400, 4):
        array[row]
    whole = dmdata.open(NAME, catalog=catalog, cache=False).estimate()
    assert served(s3, lambda: np.testing.assert_array_equal(array[...], VALUES))[0] == 1
    assert array.estimate().usd <= whole.usd


def test_a_read_from_what_is_kept_needs_no_network_budget_or_credentials(
    s3: LoopbackS3, catalog: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dmdata.open(NAME, catalog=catalog)[0:50]
    fresh_process()
    monkeypatch.setenv("DMDATA_OFFLINE", "1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "EXPIRED")
    monkeypatch.setenv("DMDATA_MAX_COST", "0")
    before = s3.n_requests
    with dmdata.budget(usd=0):
        np.testing.assert_array_equal(dmdata.open(NAME, catalog=catalog)[7:50], VALUES[7:50])
    with pytest.raises(DmdataError):
        dmdata.open(NAME, catalog=catalog)[7:51]
    assert s3.n_requests == before


def test_a_changed_object_is_never_read_from_what_was_kept_of_the_old(s3: LoopbackS3, catalog: str) -> None:
    old = dmdata.open(NAME, catalog=catalog).read_header()
    old[0:50]
    s3.put(KEY, npy(VALUES + 1))
    with pytest.raises(IntegrityError):
        old[0:60]
    new = dmdata.open(NAME, catalog=catalog).read_header()
    np.testing.assert_array_equal(new[0:60], VALUES[0:60] + 1)


@pytest.mark.parametrize("how", ["variable", "parameter", "config"])
def test_the_cache_can_be_turned_off(s3: LoopbackS3, catalog: str, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "variable":
        monkeypatch.setenv("DMDATA_CACHE_GIB", "0")
    if how == "config":
        home().mkdir(parents=True)
        (home() / "config.yaml").write_text("cache_gib: 0\n")
    array = dmdata.open(NAME, catalog=catalog, cache=how != "parameter").read_header()
    array = pickle.loads(pickle.dumps(array))  # as it travels to workers
    assert served(s3, lambda: array[0:3]) == served(s3, lambda: array[0:3]) == (1, 300)
    assert not kept_files()


def test_what_is_free_or_has_no_strong_etag_is_not_kept(tmp_path: Path) -> None:
    paid = Address("s3://b/x.npy", requester_pays=True)
    assert ranges.kept_of(paid, '"a"', paid=True, bound_bytes=1 << 30)
    assert ranges.kept_of(paid, '"a"', paid=False, bound_bytes=1 << 30) is None
    assert ranges.kept_of(paid, 'W/"a"', paid=True, bound_bytes=1 << 30) is None
    assert ranges.kept_of(paid, None, paid=True, bound_bytes=1 << 30) is None


def test_others_may_not_read_what_is_kept_and_no_name_is_in_it(s3: LoopbackS3, catalog: str) -> None:
    dmdata.open(NAME, catalog=catalog)[0:50]
    for path in (home() / "ranges").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
        assert "margins" not in str(path.relative_to(home()))
    assert stat.S_IMODE((home() / "ranges").stat().st_mode) == 0o700


def test_a_column_of_short_ranges_is_one_small_file(s3: LoopbackS3, catalog: str) -> None:
    values = np.zeros((3000, 5000), np.uint8)
    s3.put("column.npy", npy(values))
    array = dmdata.open(f"s3://{BUCKET}/column.npy")
    assert served(s3, lambda: array[:, 9]) == (3000, 3000)
    assert [path.stat().st_size < 20_000 for path in kept_files()] == [True]
    assert served(s3, lambda: array[:, 9]) == (0, 0)


@pytest.mark.parametrize("damage", ["byte", "tail", "head", "gone", "other"])
def test_damaged_files_are_dropped_and_never_served(s3: LoopbackS3, catalog: str, damage: str) -> None:
    array = dmdata.open(NAME, catalog=catalog).read_header()
    array[0:50]
    (path,) = kept_files()
    stored = bytearray(path.read_bytes())
    if damage == "byte":
        stored[-300] ^= 1
    elif damage == "tail":
        del stored[-300:]
    elif damage == "head":
        stored[40] ^= 1
    if damage == "gone":
        path.unlink()
    elif damage == "other":  # a file of another object, put here by whoever
        dmdata.open("toy/50pct/train_margins", catalog=catalog)[0:10]
        (other,) = set(kept_files()) - {path}
        path.write_bytes(other.read_bytes())
    else:
        path.write_bytes(stored)
    for anew in (False, True):
        if anew:
            fresh_process()
        np.testing.assert_array_equal(array[0:50], VALUES[0:50])
    assert served(s3, lambda: np.testing.assert_array_equal(array[0:50], VALUES[0:50])) == (0, 0)


def test_least_recently_used_goes_first_and_the_bound_holds(
    s3: LoopbackS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = 1 << 20
    monkeypatch.setenv("DMDATA_CACHE_GIB", str(bound / 2**30))
    values = np.random.default_rng(1).integers(0, 255, (64, 50_000)).astype(np.uint8)
    s3.put("wide.npy", npy(values))
    array = dmdata.open(f"s3://{BUCKET}/wide.npy")
    for row in range(64):
        np.testing.assert_array_equal(array[row], values[row])
        let_time_pass(seconds=10)
        assert served(s3, lambda: array[0]) == (0, 0), f"row 0 is used all the time; row {row} was just read"
        assert sum(path.stat().st_size for path in kept_files()) <= bound
    assert served(s3, lambda: array[63])[0] == 0
    assert served(s3, lambda: array[1])[0] == 1


def test_a_read_too_large_for_the_bound_is_not_kept(
    s3: LoopbackS3, catalog: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DMDATA_CACHE_GIB", str(100_000 / 2**30))
    array = dmdata.open(NAME, catalog=catalog).read_header()
    array[0:300]
    assert not kept_files()
    array[0:200]
    assert kept_files()


def test_a_folder_that_cannot_be_written_costs_one_warning_and_no_read(s3: LoopbackS3, catalog: str) -> None:
    home().mkdir(parents=True)
    (home() / "ranges").write_text("a file is in the way")
    array = dmdata.open(NAME, catalog=catalog).read_header()
    with pytest.warns(RuntimeWarning, match="DMDATA_CACHE_GIB=0") as said:
        got = [array[0:50], array[0:50]]
    assert len(said) == 1
    np.testing.assert_array_equal(got, [VALUES[0:50]] * 2)


def test_a_full_disk_costs_one_warning_and_no_read(catalog: str, tmp_path: Path) -> None:
    program = f"""
import resource, warnings, signal
import numpy as np, dmdata
array = dmdata.open("toy/50pct/train_margins", catalog={catalog!r}).read_header()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # a write beyond fails, as on a full disk
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    print(int(array[0:20].sum()), int(array[20:40].sum()), len([w for w in said if "CACHE" in str(w.message)]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(LONG_ROWS[:20].sum()), str(LONG_ROWS[20:].sum()), "1"], done.stderr
    assert not kept_files(), "what could not be written whole is removed"


def test_what_a_failed_read_received_is_kept(s3: LoopbackS3, tmp_path: Path) -> None:
    values = np.random.default_rng(2).integers(0, 255, (8, 2 << 20)).astype(np.uint8)
    s3.put("long.npy", npy(values))
    array = dmdata.open(f"s3://{BUCKET}/long.npy")
    last = 128 + values.size - 1
    s3.inject(Fault(status=403, stall_seconds=1.0), when=lambda request: (request.range or "").endswith(f"-{last}"))
    with pytest.raises(AccessError):
        array[...]
    kept = array.nbytes - array.plan().n_bytes
    assert kept >= 4 << 20
    assert served(s3, lambda: np.testing.assert_array_equal(array[...], values))[1] == array.nbytes - kept


def read_rows(catalog: str, rows: range, answers: Any) -> None:
    array = dmdata.open(NAME, catalog=catalog).read_header()
    answers.put(all(np.array_equal(array[row], VALUES[row]) for row in rows))


def test_many_processes_at_once_share_what_they_read(s3: LoopbackS3, catalog: str) -> None:
    dmdata.open(NAME, catalog=catalog).read_header()
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    workers = [context.Process(target=read_rows, args=(catalog, range(n * 20, n * 20 + 60), answers)) for n in range(6)]
    for worker in workers:
        worker.start()
    assert [answers.get(timeout=60) for _ in workers] == [True] * 6
    for worker in workers:
        worker.join()
    array = dmdata.open(NAME, catalog=catalog).read_header()
    assert served(s3, lambda: np.testing.assert_array_equal(array[0:160], VALUES[0:160])) == (0, 0)


def test_threads_that_read_single_rows_are_all_right(s3: LoopbackS3, catalog: str) -> None:
    array = dmdata.open(NAME, catalog=catalog).read_header()
    with ThreadPoolExecutor(16) as pool:
        for _ in range(2):
            rows = list(pool.map(lambda row: array[row], range(100)))
            np.testing.assert_array_equal(rows, VALUES[:100])
    assert served(s3, lambda: array[0:100]) == (0, 0)


def test_whoever_is_killed_while_storing_leaves_nothing_wrong(s3: LoopbackS3, tmp_path: Path) -> None:
    values = np.random.default_rng(3).integers(0, 255, (24, 1 << 20)).astype(np.uint8)
    s3.put("killed.npy", npy(values))
    url = f"s3://{BUCKET}/killed.npy"
    dmdata.open(url).read_header()
    program = f"""
import dmdata
array = dmdata.open({url!r}).read_header()
for row in range(24):
    array[row]
    print(row, flush=True)
"""
    for n_rows, seconds in ((1, 0.003), (2, 0.009), (3, 0.015)):
        with Child([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
            assert process.stdout
            for _ in range(n_rows):
                process.stdout.readline()
            time.sleep(seconds)
            os.kill(process.pid, signal.SIGKILL)
        array = dmdata.open(url).read_header()
        missing = array.plan().n_bytes
        assert missing <= array.nbytes - (n_rows << 20)
    assert served(s3, lambda: np.testing.assert_array_equal(array[...], values))[1] == missing


def test_a_record_cut_at_any_byte_is_passed_over(s3: LoopbackS3, catalog: str) -> None:
    array = dmdata.open(NAME, catalog=catalog).read_header()
    array[0:2]
    array[2:4]
    (path,) = kept_files()
    stored = path.read_bytes()
    for length in range(0, len(stored), 7):
        path.write_bytes(stored[:length])
        fresh_process()
        n_kept = 4 * 100 - array.plan(np.s_[0:4]).n_bytes
        assert n_kept == (200 if length >= len(stored) // 2 else 0)


def test_many_small_files_become_one(s3: LoopbackS3, catalog: str) -> None:
    array = dmdata.open(NAME, catalog=catalog).read_header()
    for row in range(60):
        fresh_process()
        array[row]
    fresh_process()
    assert served(s3, lambda: np.testing.assert_array_equal(array[0:60], VALUES[0:60])) == (0, 0)
    assert len(kept_files()) <= 34


def test_arrays_to_look_up_grow_as_the_logarithm_of_what_is_kept() -> None:
    index = ByteIndex()
    for n, nth in enumerate(np.random.default_rng(4).permutation(10_000).tolist(), 1):
        record = Record(Segment(f"{nth % 7}"), 0, 100, ())
        index.add([(record, np.array([[nth * 300, nth * 300 + 100]]))])
        assert len(index.levels) <= 1 + math.log2(n)
    assert sum(len(level.ranges) for level in index.levels) == 10_000
    index.forget(["3"])
    assert sum(len(level.ranges) for level in index.levels) == 10_000 - len(range(3, 10_000, 7))


def test_many_small_reads_become_few_files(s3: LoopbackS3, tmp_path: Path) -> None:
    kept = ranges.kept_of(Address("s3://b/x.npy", requester_pays=True), '"e"', paid=True, bound_bytes=1 << 30)
    assert kept
    data = np.zeros(100, np.uint8)
    order = np.random.default_rng(4).permutation(10_000)
    for nth in order.tolist():
        kept.store(np.array([nth * 300]), np.array([100]), [data], bound=10 << 30)
    layout = Layout((10_000, 300), np.dtype(np.uint8), 0, (300, 1))
    for row in range(200):
        plan = plan_read(
            layout,
            select((row, slice(0, 100)), layout.shape, orthogonal=True),
            max_gap_bytes=0,
            max_range_bytes=1 << 20,
        )
        assert kept.fill(plan)[0].n_requests == 0
    assert len(kept_files()) < 50


INTERVALS = st.lists(st.integers(0, 60), max_size=12, unique=True).map(
    lambda edges: np.sort(np.array(edges[: len(edges) // 2 * 2], np.int64)).reshape(-1, 2)
)


def positions(pieces: np.ndarray) -> list[int]:
    return [position for start, stop in pieces.tolist() for position in range(start, stop)]


@given(ours=INTERVALS, theirs=INTERVALS)
def test_ranges_are_intersected_and_subtracted_as_sets_of_bytes_are(ours: np.ndarray, theirs: np.ndarray) -> None:
    common, nth, nth_other = overlaps(ours, theirs)
    assert positions(common) == sorted(set(positions(ours)) & set(positions(theirs)))
    for (start, stop), mine, other in zip(common.tolist(), nth.tolist(), nth_other.tolist(), strict=True):
        assert ours[mine][0] <= start < stop <= ours[mine][1]
        assert theirs[other][0] <= start < stop <= theirs[other][1]
    left, of = subtract(ours, theirs)
    assert positions(left) == sorted(set(positions(ours)) - set(positions(theirs)))
    for (start, stop), mine in zip(left.tolist(), of.tolist(), strict=True):
        assert ours[mine][0] <= start < stop <= ours[mine][1]


def test_a_budget_refuses_a_huge_read_before_memory_is_claimed(s3: LoopbackS3, catalog: str) -> None:
    array = dmdata.open(NAME, catalog=catalog).read_header()
    array[0]
    layout = Layout((1 << 50,), np.dtype(np.uint8), 128, (1,))
    with dmdata.budget(usd=1), pytest.raises(BudgetError):
        replace(array, layout=layout)[: 1 << 44]


KEYS = st.tuples(
    st.one_of(
        st.builds(slice, st.integers(0, 400), st.integers(0, 400), st.integers(1, 7)),
        st.lists(st.integers(0, 399), min_size=1, max_size=4, unique=True),
    ),
    st.one_of(st.just(slice(None)), st.builds(slice, st.integers(0, 50), st.integers(0, 50), st.integers(1, 3))),
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.lists(KEYS, min_size=2, max_size=8), anew=st.lists(st.booleans(), min_size=8, max_size=8))
def test_any_reads_in_turn_are_right_and_few_bytes_are_served_twice(
    s3: LoopbackS3, catalog: str, keys: list[Any], anew: list[bool]
) -> None:
    for path in kept_files():
        path.unlink()
    array = dmdata.open(NAME, catalog=catalog).read_header()
    since = len(s3.log)
    for key, is_new in zip(keys, anew, strict=False):
        if is_new:
            fresh_process()
        before, cost = len(s3.log), array.plan(key)
        whole = dmdata.open(NAME, catalog=catalog, cache=False).plan(key)
        np.testing.assert_array_equal(array.oindex[key], VALUES[key])
        assert len(s3.log) - before == cost.n_requests <= whole.n_requests + 32
    times = np.zeros(len(npy(VALUES)), np.int64)
    for start, stop in bytes_served(s3, since):
        times[start:stop] += 1
    assert times.max(initial=0) <= 1


def test_mirror_and_get_and_verify_go_past_what_is_kept(s3: LoopbackS3, catalog: str, tmp_path: Path) -> None:
    array = dmdata.open(NAME, catalog=catalog).read_header()
    array[...]
    files = kept_files()
    assert served(s3, lambda: array.mirror(tmp_path / "copy.zarr"))[1] == VALUES.nbytes
    assert served(s3, lambda: dmdata.get(NAME, tmp_path / "x.npy", catalog=catalog))[1] >= VALUES.nbytes
    assert kept_files() == files


def test_progress_is_told_of_the_bytes_of_the_plan(s3: LoopbackS3, catalog: str) -> None:
    array = dmdata.open(NAME, catalog=catalog).read_header()
    array[0:100]
    told: list[int] = []
    plan = array.plan(np.s_[0:150])
    array.read(select(np.s_[0:150], array.shape, orthogonal=True), progress=told.append)
    assert sum(told) == plan.n_bytes == 50 * 100
