"""Whatever goes wrong on the way: no byte is lost or wrong, and no dollar is billed beyond the ledger.

Each fault meets each way of reading: whole, scattered rows, one column, `get` and `mirror`. The server counts what it
served; priced at list price, that is never more than what the ledger says was spent, and equal to it where nothing
went wrong. One line a case is printed when all tests have run: the requests sent, the bytes served more than once,
bytes lost and wrong, and the dollars that a provider could bill beyond the ledger.
"""

import contextlib
import math
import os
import random
import shutil
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from servers.loopback import Fault, LoopbackS3, Request
from small_release import npy, publish

import dmdata
import dmdata.s3
from dmdata.errors import (
    AccessError,
    DmdataError,
    FormatError,
    IntegrityError,
    ObjectMissingError,
    SourceError,
)
from dmdata.fetch import CONNECTIONS, LEAST_RANGE_BYTES
from dmdata.prices import Destination, quote

NAME = "toy/50pct/test_margins"
KEY = "toy/data/test_margins_50pct.npy"
VALUES = np.random.default_rng(0).integers(0, 255, (32, 1 << 18), np.uint8)
"""8 MiB: a read of all of it takes two requests of 4 MiB."""
ROWS = [1, 5, 6, 17, 28, 29, 30]
MIRROR_MEMORY_BYTES = 8 << 20
"""Blocks of 8 rows, 2 MiB."""

HEAD_RANGES = {"bytes=0-0", "bytes=0-127"}
"""The requests by which an object is first seen, which cannot know its ETag yet."""

COLUMNS = "{:<34} {:<7} {:<15} {:>8} {:>10} {:>4} {:>5} {:>6}"
TITLES = ("fault", "reading", "outcome", "requests", "again", "lost", "wrong", "over")


@dataclass(frozen=True)
class Way:
    """One way of reading: what it does, and the values it must end in."""

    name: str
    read: Callable[[dmdata.LazyArray, str, Path], npt.NDArray[np.uint8]]
    wanted: npt.NDArray[np.uint8]
    n_other_bytes: int = 0
    """Read beside these values."""


def by_get(array: dmdata.LazyArray, catalog: str, folder: Path) -> npt.NDArray[np.uint8]:
    return np.asarray(np.load(dmdata.get(NAME, folder / "x.npy", catalog=catalog)))


def by_mirror(array: dmdata.LazyArray, catalog: str, folder: Path) -> npt.NDArray[np.uint8]:
    return np.asarray(array.mirror(folder / "m.zarr", memory_bytes=MIRROR_MEMORY_BYTES)[...])


WAYS = [
    Way("whole", lambda array, *_: array[...], VALUES),
    Way("rows", lambda array, *_: array[ROWS], VALUES[ROWS]),
    Way("column", lambda array, *_: array[:, 42], VALUES[:, 42]),
    Way("get", by_get, VALUES, n_other_bytes=1 + 128),
    Way("mirror", by_mirror, VALUES),
]
each_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)


@dataclass
class Case:
    """A fresh array on a fresh server, and the account of what is done with it."""

    server: LoopbackS3
    array: dmdata.LazyArray
    catalog: str
    folder: Path
    figures: list[str]

    def read(self, way: Way, fault: str, *, may_fail: tuple[type[DmdataError], ...] = ()) -> DmdataError | None:
        """Read one way while a fault happens, and enter the outcome into the table; returns the error it ended in."""
        before, error, got = dmdata.spend(), None, None
        try:
            got = way.read(self.array, self.catalog, self.folder)
        except may_fail as caught:
            error = caught
        self.account(fault, way, got, before, error=error)
        return error

    def account(
        self,
        fault: str,
        way: Way,
        got: npt.NDArray[np.uint8] | None,
        before: dmdata.Spending,
        *,
        error: DmdataError | None = None,
    ) -> None:
        """Compare what was got, served and spent since with what should be."""
        until_quiet(self.server)
        spent = dmdata.spend()
        n_bytes, n_requests = spent.n_bytes - before.n_bytes, spent.n_requests - before.n_requests
        over = max(billed(self.server) - (spent.usd - before.usd), 0.0)
        lost = way.wanted.size - got.size if got is not None else 0
        wrong = int((got != way.wanted).sum()) if got is not None and not lost else 0
        again = max(self.server.n_object_bytes - way.wanted.nbytes - way.n_other_bytes, 0) if error is None else 0
        outcome = type(error).__name__ if error else "right"
        figures = f"{self.server.n_requests:,}", f"{again:,}", lost, wrong, f"${over:.2g}"
        self.figures.append(COLUMNS.format(fault, way.name, outcome, *figures))
        assert (lost, wrong) == (0, 0)
        assert over < 1e-12, "the ledger is an upper bound of the bill"
        assert n_bytes >= self.server.n_object_bytes
        assert n_requests >= self.server.n_requests
        for request in self.server.log:
            assert request.range, "never a request without a range"
            assert request.if_match or request.range in HEAD_RANGES, "every other request names the object first seen"


@pytest.fixture(scope="session")
def table(figures: list[str]) -> list[str]:
    figures.append(COLUMNS.format(*TITLES))
    return figures


@pytest.fixture
def case(s3: LoopbackS3, tmp_path: Path, table: list[str]) -> Case:
    catalog = publish(s3, {NAME: VALUES}, tmp_path / "catalog")
    array = dmdata.open(NAME, catalog=catalog)
    s3.reset_log()
    (tmp_path / "out").mkdir()
    return Case(s3, array, catalog, tmp_path / "out", table)


def billed(server: LoopbackS3) -> float:
    """What a provider could ask for: each request, and each byte of an object that left the server."""
    return quote(server.n_object_bytes, server.n_requests, Destination.INTERNET).usd


def until_quiet(server: LoopbackS3) -> None:
    """Wait until what was cut off is no longer on its way out of the server."""
    n_bytes = -1
    while n_bytes != server.n_bytes:
        n_bytes = server.n_bytes
        time.sleep(0.05)


def range_bytes(request: Request) -> int:
    first, last = (request.range or "bytes=0-0").removeprefix("bytes=").split("-")
    return int(last) - int(first) + 1


class EarlyTries:
    """Chooses the first try, or the first two, of each range of some length: a storm that is the same each time."""

    def __init__(self, n_bytes: range, *, most: int = 2) -> None:
        self._n_bytes, self._most = n_bytes, most
        self._tries: Counter[str] = Counter()

    def __call__(self, request: Request) -> bool:
        asked = request.range or ""
        if asked in HEAD_RANGES or range_bytes(request) not in self._n_bytes:
            return False
        self._tries[asked] += 1
        return self._tries[asked] <= 1 + zlib.crc32(asked.encode()) % self._most


LONG, MIDDLING, SHORT = range(1 << 20, 1 << 30), range(1 << 17, 1 << 20), range(1 << 17)


def storm(server: LoopbackS3, strike: Callable[[int], Fault], *, most: int = 2) -> None:
    """Let early tries of all ranges fail, each kind after some bytes of its body."""
    for lengths, after in ((LONG, 1_100_000), (MIDDLING, 100_000), (SHORT, 0)):
        server.inject(strike(after), when=EarlyTries(lengths, most=most), times=math.inf)


@each_way
def test_without_faults_the_plan_the_server_and_the_ledger_say_the_same(case: Case, way: Way) -> None:
    before = dmdata.spend()
    case.read(way, "none")
    spent = dmdata.spend()
    assert spent.n_bytes - before.n_bytes == case.server.n_object_bytes == way.wanted.nbytes + way.n_other_bytes
    assert spent.n_requests - before.n_requests == case.server.n_requests
    assert spent.usd - before.usd == pytest.approx(billed(case.server), abs=1e-11)


STORMS: dict[str, Callable[[int], Fault]] = {
    "503 storm": lambda _: Fault(status=503, code="ServiceUnavailable"),
    "SlowDown storm": lambda _: Fault(status=503, code="SlowDown"),
    "resets before the answer": lambda _: Fault(drop=True),
    "resets mid-body": lambda after: Fault(reset_after=after),
    "connections closed mid-body": lambda after: Fault(end_after=after),
    "short bodies of honest length": lambda after: Fault(shorten_to=after),
    "another range than asked for": lambda _: Fault(shift=64),
}


@each_way
@pytest.mark.parametrize("name", STORMS)
def test_no_storm_loses_a_byte_or_bills_beyond_the_ledger(case: Case, way: Way, name: str) -> None:
    storm(case.server, STORMS[name])
    case.read(way, name)
    assert case.server.n_requests > len({request.range for request in case.server.log}), "something was tried again"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up on a silent server after a second, not after twenty."""
    monkeypatch.setattr(dmdata.s3, "_SILENCE_SECONDS", 1)


@each_way
def test_a_silent_server_is_given_up_on_and_asked_again(hasty: None, case: Case, way: Way) -> None:
    after = {"rows": 100_000, "column": 0}.get(way.name, 1_100_000)
    is_data = EarlyTries(range(1 << 30))
    case.server.inject(Fault(stall_seconds=60, stall_after=after), when=is_data, after=1, times=3)
    case.read(way, "silence mid-body")


@each_way
def test_a_whole_object_where_a_range_is_due_is_never_taken_for_it(case: Case, way: Way) -> None:
    case.server.inject(Fault(whole=True), after=1, times=math.inf)
    assert case.read(way, "200 where 206 is due", may_fail=(SourceError, IntegrityError))


@each_way
@pytest.mark.parametrize("status", [403, 404])
def test_a_refusal_ends_the_read_at_once(case: Case, way: Way, status: int) -> None:
    case.server.inject(Fault(status=status), when=lambda request: request.range not in HEAD_RANGES, times=math.inf)
    assert case.read(way, f"{status}", may_fail=(AccessError, ObjectMissingError))
    assert len({request.range for request in case.server.log}) == case.server.n_requests, "nothing is tried again"


@each_way
def test_a_changed_object_ends_the_read_and_nothing_is_mixed(case: Case, way: Way) -> None:
    case.server.inject(Fault(replace=npy(VALUES + 1)), after=1)
    error = case.read(way, "object changed meanwhile", may_fail=(IntegrityError,))
    assert isinstance(error, IntegrityError)
    if way.name == "get":
        assert not [path for path in case.folder.iterdir() if path.suffix != ".lock"]
    if way.name == "mirror":
        with pytest.raises(IntegrityError):
            case.array.mirror(case.folder / "m.zarr", memory_bytes=MIRROR_MEMORY_BYTES)


OPENED = Way("open", lambda array, *_: np.zeros(array.shape, np.uint8)[:0], VALUES[:0])


@pytest.mark.parametrize("claim", [0, 1, 128, VALUES.nbytes, VALUES.nbytes + 129, 1 << 60], ids=str)
def test_a_store_that_lies_about_an_objects_length_is_not_believed(case: Case, dmdata_home: Path, claim: int) -> None:
    shutil.rmtree(dmdata_home / "headers")
    before = dmdata.spend()
    case.server.inject(Fault(claimed_size=claim), times=math.inf)
    with pytest.raises((FormatError, SourceError)) as caught:
        dmdata.open(NAME, catalog=case.catalog)
    case.account("a lie about the object's length", OPENED, None, before, error=caught.value)


@pytest.mark.parametrize(
    "content",
    [npy(VALUES)[:-5], npy(VALUES) + b"\0", b"", npy(VALUES)[:100], b"\x93NUMPY\x01\x00\xff\xff" + bytes(1000)],
    ids=["too short", "too long", "empty", "half a header", "a header of 64 KiB that is not there"],
)
def test_an_object_of_a_wrong_length_is_refused_by_its_header(case: Case, dmdata_home: Path, content: bytes) -> None:
    shutil.rmtree(dmdata_home / "headers")
    case.server.put(KEY, content)
    before = dmdata.spend()
    with pytest.raises(FormatError) as caught:
        dmdata.open(NAME, catalog=case.catalog)
    assert case.server.n_object_bytes <= 1200
    case.account("an object of a wrong length", OPENED, None, before, error=caught.value)


def test_a_storm_without_end_is_given_up_in_words_and_gone_on_with_later(case: Case) -> None:
    case.server.inject(Fault(status=503), after=2, times=math.inf)
    error = case.read(WAYS[4], "503 without end", may_fail=(SourceError,))
    assert "try again later" in str(error)
    case.server.clear_faults()
    n_before = case.server.n_object_bytes
    assert n_before
    before = dmdata.spend()
    case.server.reset_log()
    copy = by_mirror(case.array, case.catalog, case.folder)
    case.account("503 without end, run again", WAYS[4], copy, before)
    assert case.server.n_object_bytes + n_before == VALUES.nbytes


# Processes

KILLED = np.random.default_rng(1).integers(0, 255, (2000, 1 << 15), np.uint8)
HALF = 1 << 14
KILLER = f"""
import os, random, signal, sys, time
import numpy as np, zarr, dmdata, dmdata.mirror
catalog, destination, n_kills, seed = sys.argv[1:]
rng = random.Random(int(seed))
for _ in range(int(n_kills)):
    pid = os.fork()
    if not pid:
        dmdata.mirror({NAME!r}, destination, columns=slice({HALF}), catalog=catalog, memory_bytes={128 * HALF})
        os._exit(0)
    time.sleep(rng.uniform(0.15, 0.7))
    os.kill(pid, signal.SIGKILL)
    print(os.WIFSIGNALED(os.waitpid(pid, 0)[1]), flush=True)
"""
"""Kills mirrors at random moments; each is forked from a process that has imported everything and done nothing."""


def test_twenty_kills_of_a_mirror_lose_nothing_but_the_ranges_in_flight(
    s3: LoopbackS3, tmp_path: Path, table: list[str]
) -> None:
    catalog = publish(s3, {NAME: KILLED}, tmp_path / "catalog")
    destination, before = tmp_path / "m.zarr", dmdata.spend()
    s3.latency_seconds = 0.02
    program = [sys.executable, "-c", KILLER, catalog, str(destination), "20", str(random.randrange(1 << 30))]  # noqa: S311
    done = subprocess.run(program, capture_output=True, text=True, check=True, timeout=120)
    n_kills = done.stdout.split().count("True")
    assert n_kills >= 15, "the others ended before they were killed"
    s3.latency_seconds = 0
    columns = slice(HALF)
    copy = dmdata.mirror(NAME, destination, columns=columns, catalog=catalog, memory_bytes=128 * HALF)
    got, wanted = np.asarray(copy[...]), KILLED[:, columns]  # type: ignore[index] # an array, not a group
    case = Case(s3, dmdata.open(NAME, catalog=catalog), catalog, tmp_path, table)
    case.account(f"{n_kills} SIGKILLs", Way("mirror", by_mirror, wanted, n_other_bytes=128), got, before)
    again = s3.n_object_bytes - wanted.nbytes
    assert again <= n_kills * (CONNECTIONS * HALF + 128)
    states = dmdata.Ledger(dmdata.home()).spent(by="state")
    assert "reserved" not in states, "what a killed process had reserved and not sent is free again"


def test_of_two_mirrors_of_one_destination_one_is_refused_and_nothing_is_paid_twice(case: Case) -> None:
    case.server.bytes_per_second = 8e6
    destination, before = case.folder / "m.zarr", dmdata.spend()
    arguments = ["mirror", NAME, str(destination), "--catalog", case.catalog, "--memory", "8", "-y", "-q"]
    program = [sys.executable, "-c", "from dmdata.cli import main; main()", *arguments]
    both = [subprocess.Popen(program, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    words = [process.communicate()[1] for process in both]
    codes = sorted(process.returncode for process in both)
    refused = next(text for text, process in zip(words, both, strict=True) if process.returncode)
    assert codes == [0, 1]
    assert "another process is writing" in refused
    got = np.asarray(zarr.open_array(destination, mode="r")[...])
    case.account("two mirrors of one destination", WAYS[4], got, before)
    assert case.server.n_object_bytes == VALUES.nbytes


RACER = """
import sys, dmdata, dmdata.errors
array, n = dmdata.open(sys.argv[1], catalog=sys.argv[2]), 0
try:
    while n < 20:
        array[...]
        n += 1
except dmdata.errors.BudgetError:
    pass
print(n)
"""


def test_eight_processes_under_one_budget_never_pass_it_while_transfers_break(
    s3: LoopbackS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: list[str]
) -> None:
    catalog = publish(s3, {NAME: VALUES[:, :100_000]}, tmp_path)
    price = dmdata.open(NAME, catalog=catalog).estimate().usd
    limit = dmdata.spend().usd + price * 5.5
    monkeypatch.setenv("DMDATA_MAX_COST", f"{limit:.12f}")
    rng = random.Random(3)  # noqa: S311 - a seeded fault, no secret
    s3.inject(
        Fault(reset_after=50_000),
        when=lambda request: request.range not in HEAD_RANGES and rng.random() < 0.3,
        times=math.inf,
    )
    program = [sys.executable, "-c", RACER, NAME, catalog]
    racers = [subprocess.Popen(program, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    n_reads = sum(int(racer.communicate(timeout=100)[0]) for racer in racers)
    until_quiet(s3)
    spent = dmdata.spend().usd
    over = max(billed(s3) - spent, 0.0)
    figures = f"{s3.n_requests:,}", "", 0, 0, f"${over:.2g}"
    table.append(COLUMNS.format("8 processes, resets, 1 budget", "whole", f"{n_reads} right", *figures))
    assert spent <= limit
    assert over < 1e-12
    assert 1 <= n_reads <= 5


# Disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a small disk; called again with other options, it changes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk takes root and mount(8)")
    is_mounted = False

    def mount(options: str) -> Path:
        nonlocal is_mounted
        both = f"remount,{options}" if is_mounted else options
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", both, "tmpfs", str(disk)], capture_output=True, text=True, check=False
        )
        if done.returncode and not is_mounted:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        is_mounted = True
        return disk

    yield mount
    if is_mounted:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # an error may still hold its files


def test_a_mirror_that_fills_the_disk_goes_on_when_there_is_room(case: Case, small_disk: Callable[[str], Path]) -> None:
    case.folder = small_disk("size=6m")
    error = case.read(WAYS[4], "disk full", may_fail=(DmdataError,))
    assert "No space left" in str(error)
    n_before = case.server.n_object_bytes
    small_disk("size=64m")
    before = dmdata.spend()
    case.server.reset_log()
    copy = by_mirror(case.array, case.catalog, case.folder)
    case.account("disk full, run again with room", WAYS[4], copy, before)
    assert case.server.n_object_bytes + n_before <= VALUES.nbytes + 2 * LEAST_RANGE_BYTES, "but what was in flight"


def test_a_download_that_does_not_fit_the_disk_is_refused_before_it_is_paid_for(
    case: Case, small_disk: Callable[[str], Path]
) -> None:
    case.folder = small_disk("size=6m")
    error = case.read(WAYS[3], "disk too small", may_fail=(DmdataError,))
    assert "has room for" in str(error)
    assert case.server.n_object_bytes <= 1
    small_disk("size=64m")
    before = dmdata.spend()
    case.server.reset_log()
    got = by_get(case.array, case.catalog, case.folder)
    case.account("disk too small, run again", WAYS[3], got, before)


@each_way
def test_nothing_is_spent_where_the_ledger_cannot_be_written(
    case: Case, way: Way, small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, dmdata_home: Path
) -> None:
    home = small_disk("size=2m")
    shutil.copytree(dmdata_home, home, dirs_exist_ok=True)
    small_disk("size=2m,ro")
    monkeypatch.setenv("DMDATA_HOME", str(home))
    with pytest.raises(DmdataError, match="DMDATA_HOME") as caught:
        way.read(case.array, case.catalog, case.folder)
    assert case.server.n_requests == 0
    monkeypatch.setenv("DMDATA_HOME", str(dmdata_home))
    case.account("read-only home", way, None, dmdata.spend(), error=caught.value)


def test_a_disk_that_is_full_of_other_things_stops_all_spending(
    case: Case, small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, dmdata_home: Path
) -> None:
    home = small_disk("size=1m")
    other = os.open(home / "other", os.O_CREAT | os.O_WRONLY)
    with contextlib.suppress(OSError):
        while True:
            os.write(other, bytes(1 << 12))
    os.close(other)
    monkeypatch.setenv("DMDATA_HOME", str(home))
    with pytest.raises(DmdataError, match="nothing is spent") as caught:
        case.array[ROWS]
    assert case.server.n_requests == 0
    monkeypatch.setenv("DMDATA_HOME", str(dmdata_home))
    case.account("home on a full disk", WAYS[1], None, dmdata.spend(), error=caught.value)
