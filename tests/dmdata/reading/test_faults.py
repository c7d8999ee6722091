"""Whatever goes wrong on the way: no byte lost, none wrong, and no dollar billed that the ledger does not show.

Every fault meets six ways of reading one object: whole, scattered rows, a column, many parts of rows, a download and a
mirror. Each ends in the right bytes or in an error of ours, after which the same read, run again, gives the right
bytes. What the server served is priced here at list price, apart from dmdata's own price table, and compared with the
ledger. The figures of all faults are printed as one table at the end of the session.
"""

import contextlib
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from processes import printed_seed
from servers.loopback import BUCKET, Fault, LoopbackS3, Request
from small_release import npy, publish

import dmdata
from dmdata.errors import AccessError, DmdataError, FormatError, IntegrityError, ObjectMissingError, SourceError
from dmdata.layout.formats import NPY_PREFIX_BYTES, TrailingBytesWarning
from dmdata.money.ledger import Ledger, Reservation, home

NAME = "toy/50pct/test_margins"
KEY = "toy/data/test_margins_50pct.npy"
ROWS = np.array([1, 2, 5, 11, 12, 23, 29, 30])
COLUMNS = np.ravel(np.arange(4)[:, None] * (64 << 10) + np.arange(2000))
"""Four runs a row: 128 short ranges, of which a thread asks for several at a time."""
VALUES = np.random.default_rng(0).integers(0, 256, (32, 256 << 10), np.uint8)
"""8 MiB: two ranges when read whole, rows far enough apart that each is a range of its own."""
OTHER = np.random.default_rng(1).integers(0, 256, VALUES.shape, np.uint8)

USD_A_REQUEST = 0.0004 / 1000
USD_A_BYTE = 0.09 / 2**30
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Way:
    """A way of reading: what it does, what it must give, and a number of bytes well inside each of its ranges."""

    read: Callable[[str, str, Path], Array]
    of: Callable[[Array], Array]
    inside: int


def _mirrored(name: str, catalog: str, folder: Path) -> Array:
    return np.asarray(dmdata.mirror(name, folder / "m.zarr", catalog=catalog, memory_bytes=8 << 20)[...])  # type: ignore[index] # an array


def _downloaded(name: str, catalog: str, folder: Path) -> Array:
    return np.asarray(np.load(dmdata.get(name, folder / "x.npy", catalog=catalog)))


WAYS = {
    "whole": Way(lambda name, catalog, _: dmdata.open(name, catalog=catalog)[...], lambda x: x, 1 << 20),
    "rows": Way(lambda name, catalog, _: dmdata.open(name, catalog=catalog)[ROWS], lambda x: x[ROWS], 100_000),
    "column": Way(lambda name, catalog, _: dmdata.open(name, catalog=catalog)[:, 99], lambda x: x[:, 99], 0),
    "parts": Way(
        lambda name, catalog, _: dmdata.open(name, catalog=catalog).oindex[:, COLUMNS], lambda x: x[:, COLUMNS], 500
    ),
    "get": Way(_downloaded, lambda x: x, 1 << 20),
    "mirror": Way(_mirrored, lambda x: x, 1 << 20),
}
ways = pytest.mark.parametrize("way", WAYS)


def billed_usd(s3: LoopbackS3) -> float:
    """Price what was served as a provider may bill it: every request, and every byte of the object that left."""
    return s3.n_object_bytes * USD_A_BYTE + s3.n_requests * USD_A_REQUEST


# The table


@dataclass(slots=True)
class Outcomes:
    """What became of all reads that met one fault."""

    n_reads: int = 0
    n_requests: int = 0
    n_faults: int = 0
    n_errors: int = 0
    lost_bytes: int = 0
    wrong_bytes: int = 0
    billed_usd: float = 0.0
    ledger_usd: float = 0.0
    over_usd: float = 0.0
    again_bytes: int = 0


class Table:
    """Collects outcomes, one line a fault."""

    def __init__(self) -> None:
        self._lines: dict[str, Outcomes] = {}
        self._lock = threading.Lock()

    def enter(
        self, fault: str, s3: LoopbackS3, got: list[tuple[Array, Array]], *, n_faults: int, n_errors: int = 0
    ) -> None:
        """Account for reads: `got` are pairs of what was read and what had to be; fails unless all is well."""
        served, n_requests, spent = s3.n_object_bytes, s3.n_requests, dmdata.spend()
        billed = billed_usd(s3)
        lost = sum(max(right.nbytes - read.nbytes, 0) for read, right in got)
        wrong = sum(_n_wrong(read, right) for read, right in got)
        over_usd = max(billed - spent.usd, 0.0)
        with self._lock:
            line = self._lines.setdefault(fault, Outcomes())
            line.n_reads += len(got)
            line.n_requests += n_requests
            line.n_faults += n_faults
            line.n_errors += n_errors
            line.lost_bytes += lost
            line.wrong_bytes += wrong
            line.billed_usd += billed
            line.ledger_usd += spent.usd
            line.over_usd += over_usd
            # a pico-dollar may hide in a float
            line.over_usd = 0.0 if line.over_usd < 1e-12 else line.over_usd
            line.again_bytes += max(served - sum(right.nbytes for _, right in got), 0)
        assert (lost, wrong) == (0, 0)
        assert served <= spent.n_bytes
        assert n_requests <= spent.n_requests
        assert over_usd < 1e-12

    def lines(self) -> Iterator[str]:
        """Write the table."""
        head = f"{'fault':<44}{'reads':>6}{'tries':>7}{'faults':>7}{'errors':>7}{'lost':>6}{'wrong':>6}"
        yield head + f"{'$ billed':>10}{'$ ledger':>10}{'$ over':>7}{'extra MiB':>11}"
        for fault, line in self._lines.items():
            yield (
                f"{fault:<44}{line.n_reads:>6}{line.n_requests:>7,}{line.n_faults:>7}{line.n_errors:>7}"
                f"{line.lost_bytes:>6}{line.wrong_bytes:>6}{line.billed_usd:>10.6f}{line.ledger_usd:>10.6f}"
                f"{line.over_usd:>7.2g}{line.again_bytes / 2**20:>11.2f}"
            )


def _n_wrong(read: Array, right: Array) -> int:
    if read.shape != right.shape or read.dtype != right.dtype:
        return right.nbytes
    return int((read.view(np.uint8) != right.view(np.uint8)).sum())


def write_table(lines: list[str]) -> None:
    """Write the table for the documentation, where ``DMDATA_TESTS_FAULTS_TABLE`` names a file."""
    if path := os.environ.get("DMDATA_TESTS_FAULTS_TABLE"):
        said = f"Measured on {date.today()} by the tests of faults, which wrote this file."
        Path(path).write_text("\n".join([said, "", "```text", *lines, "```", ""]), encoding="utf-8")


@pytest.fixture(scope="module")
def table(figures: list[str]) -> Iterator[Table]:
    table = Table()
    yield table
    lines = list(table.lines())
    figures += lines
    write_table(lines)


@pytest.fixture
def server(s3: LoopbackS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackS3]:
    """A server whose every answer of data was asked for by a range of the object first seen, and paid for."""
    monkeypatch.setenv("DMDATA_CACHE_GIB", "0")  # what is read again is served again
    yield s3
    first: dict[tuple[str, str | None], int] = Counter()
    for request in s3.log:
        assert request.method == "GET"
        assert request.range
        if request.if_match is None:
            start, stop = map(int, request.range.removeprefix("bytes=").split("-"))
            assert (start, stop < 4096) == (0, True), f"only an object's beginning is read without If-Match: {request}"
            first[request.key, request.range] += 1
    assert all(request.charged for request in s3.log if request.status in (200, 206))


@pytest.fixture
def catalog(server: LoopbackS3, tmp_path: Path) -> str:
    return publish(server, {NAME: VALUES}, tmp_path / "catalog")


class Storm:
    """Lets the first tries at each range fail: whatever is asked for up to the same last byte is the same range.

    A storm without end spares headers, so that it meets the data.
    """

    def __init__(self, s3: LoopbackS3, fault: Fault, *, tries: float, key: str | None = None) -> None:
        self.n_faults = 0
        self._tries, self._key = tries, key
        self._failed: Counter[tuple[str, str]] = Counter()
        s3.inject(fault, when=self._hits, times=math.inf)

    def _hits(self, request: Request) -> bool:
        is_header = request.if_match is None
        if self._key not in (None, request.key) or (is_header and self._tries == math.inf):
            return False
        last_byte = (request.range or "").rpartition("-")[2]
        if self._failed[request.key, last_byte] >= self._tries:
            return False
        self._failed[request.key, last_byte] += 1
        self.n_faults += 1
        return True


# No fault


@ways
def test_without_faults_the_ledger_is_what_was_served_to_the_byte(
    server: LoopbackS3, catalog: str, table: Table, tmp_path: Path, way: str
) -> None:
    got = WAYS[way].read(NAME, catalog, tmp_path)
    table.enter("none", server, [(got, WAYS[way].of(VALUES))], n_faults=0)
    spent = dmdata.spend()
    assert (spent.n_bytes, spent.n_requests) == (server.n_object_bytes, server.n_requests)
    n_headers = 2 if way == "get" else 1  # looked at first, then part of the file
    assert server.n_object_bytes == got.nbytes + n_headers * NPY_PREFIX_BYTES


# Transfers that break and can be resumed


def breaks(inside: int) -> dict[str, Fault]:
    return {
        "503 ServiceUnavailable": Fault(status=503, code="ServiceUnavailable"),
        "503 SlowDown": Fault(status=503, code="SlowDown"),
        "500 InternalError": Fault(status=500),
        "400 RequestTimeout": Fault(status=400, code="RequestTimeout"),
        "reset before the answer": Fault(drop=True),
        "reset mid-body": Fault(reset_after=inside),
        "closed mid-body": Fault(end_after=inside),
        "short body of honest length": Fault(shorten_to=inside),
    }


def all_ways_at_once(
    s3: LoopbackS3, folder: Path, attempt: Callable[[Way, str, str, Path], object]
) -> dict[str, object]:
    """Read a copy of the object in every way, all at the same time."""
    names = {way: f"toy/50pct/{way}" for way in WAYS}
    catalog = publish(s3, dict.fromkeys(names.values(), VALUES), folder / "copies")
    folders = {way: folder / way for way in WAYS}
    for each in folders.values():
        each.mkdir()
    with ThreadPoolExecutor(len(WAYS)) as pool:
        outcomes = {way: pool.submit(attempt, WAYS[way], names[way], catalog, folders[way]) for way in WAYS}
        return {way: outcome.result() for way, outcome in outcomes.items()}


@pytest.fixture
def never_more_than_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a read fail that was billed more than it had set aside before it sent it."""
    settle = Reservation.settle

    def checked(reservation: Reservation, *, usd: float, **facts: Any) -> None:
        with reservation.ledger.transaction() as connection:
            row = connection.execute("SELECT pico FROM reading WHERE id = ?", (reservation.id,)).fetchone()
        assert usd <= row[0] / 1e12 + 1e-12
        settle(reservation, usd=usd, **facts)

    monkeypatch.setattr(Reservation, "settle", checked)


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let reads ask again at once: hundreds of pauses take a minute, and change nothing that is read or paid."""
    monkeypatch.setattr("dmdata.reading.reader._LONGEST_PAUSE_SECONDS", 0.02)


@pytest.mark.usefixtures("never_more_than_reserved", "short_pauses")
@pytest.mark.parametrize("fault", breaks(0))
def test_what_breaks_is_resumed(server: LoopbackS3, table: Table, tmp_path: Path, fault: str) -> None:
    storms = {
        way: Storm(server, breaks(WAYS[way].inside)[fault], tries=2, key=f"toy/data/{way}_50pct.npy") for way in WAYS
    }
    got = all_ways_at_once(server, tmp_path, lambda way, name, catalog, to: way.read(name, catalog, to))
    pairs = [(np.asarray(read), WAYS[way].of(VALUES)) for way, read in got.items()]
    n_faults = sum(storm.n_faults for storm in storms.values())
    table.enter(f"{fault}, twice a range", server, pairs, n_faults=n_faults)
    assert all(storm.n_faults >= 4 for storm in storms.values())
    wanted = sum(right.nbytes for _, right in pairs) + (len(WAYS) + 1) * NPY_PREFIX_BYTES
    # each range that broke asked for what was missing, and nothing more: at worst twice the rest of it
    # short ranges that were asked for together with one that failed may be billed, and are asked for again
    together = WAYS["parts"].of(VALUES).nbytes
    assert server.n_object_bytes <= dmdata.spend().n_bytes <= 3 * wanted + together
    if fault.startswith(("503", "500", "400", "short", "reset before")):
        most = wanted + together
        assert server.n_object_bytes <= most, "what was refused, or cut short in good order, is not served twice"


def test_a_stall_is_broken_off_and_resumed(
    server: LoopbackS3, table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmdata.objects.clients.SILENCE_SECONDS", 3)  # in test_reading.py it is as long as it is
    stalled: set[str] = set()

    def first_data_of(key: str) -> Callable[[Request], bool]:
        def is_first(request: Request) -> bool:
            found = request.key == key and request.if_match is not None and key not in stalled
            if found:
                stalled.add(key)
            return found

        return is_first

    for way in WAYS:
        fault = Fault(stall_seconds=120, stall_after=WAYS[way].inside)
        server.inject(fault, when=first_data_of(f"toy/data/{way}_50pct.npy"), times=math.inf)
    got = all_ways_at_once(server, tmp_path, lambda way, name, catalog, to: way.read(name, catalog, to))
    pairs = [(np.asarray(read), WAYS[way].of(VALUES)) for way, read in got.items()]
    table.enter("silence for 120 s mid-body", server, pairs, n_faults=len(WAYS))


# What cannot be resumed


def test_a_server_that_stays_down_is_given_up_and_the_same_again_succeeds(
    server: LoopbackS3, table: Table, tmp_path: Path
) -> None:
    storm = Storm(server, Fault(status=503), tries=math.inf)

    def fail(way: Way, name: str, catalog: str, folder: Path) -> None:
        with pytest.raises(SourceError, match="given up after 6 tries") as caught:
            way.read(name, catalog, folder)
        assert caught.value.transient

    all_ways_at_once(server, tmp_path, fail)
    server.clear_faults()
    catalog = str(tmp_path / "copies" / "catalog.yaml")
    pairs = [(way.read(f"toy/50pct/{kind}", catalog, tmp_path / kind), way.of(VALUES)) for kind, way in WAYS.items()]
    table.enter("503 forever, then the same again", server, pairs, n_faults=storm.n_faults, n_errors=len(WAYS))


@ways
def test_a_changed_object_is_noticed_and_never_mixed(
    server: LoopbackS3, catalog: str, table: Table, tmp_path: Path, way: str
) -> None:
    # the second range of data finds the object changed, where there are two
    after = 2 if way in ("rows", "column", "mirror") else 1
    server.inject(Fault(replace=npy(OTHER)), after=after)
    with pytest.raises(IntegrityError, match="changed"):
        WAYS[way].read(NAME, catalog, tmp_path)
    (tmp_path / "anew").mkdir()
    got = WAYS[way].read(NAME, catalog, tmp_path / "anew")
    table.enter("object changed meanwhile", server, [(got, WAYS[way].of(OTHER))], n_faults=1, n_errors=1)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "get"])  # which looks at the object again
def test_a_changed_object_is_noticed_where_the_server_knows_no_conditions(
    server: LoopbackS3, catalog: str, table: Table, tmp_path: Path, way: str
) -> None:
    dmdata.open(NAME, catalog=catalog).read_header()  # its header is remembered
    server.put(KEY, npy(OTHER))
    server.inject(Fault(heedless=True), times=math.inf)
    with pytest.raises(IntegrityError, match="changed"):
        WAYS[way].read(NAME, catalog, tmp_path)
    n_faults = server.n_requests
    server.clear_faults()
    (tmp_path / "anew").mkdir()
    got = WAYS[way].read(NAME, catalog, tmp_path / "anew")
    pairs = [(got, WAYS[way].of(OTHER))]
    table.enter("changed, and no conditions known", server, pairs, n_faults=n_faults, n_errors=1)


@ways
@pytest.mark.parametrize("after", [0, 1], ids=["at once", "in the data"])
def test_a_whole_object_where_a_range_is_due_is_refused_and_counted(
    server: LoopbackS3, catalog: str, table: Table, tmp_path: Path, way: str, after: int
) -> None:
    server.inject(Fault(whole=True), after=after)
    n_errors = 0
    try:
        got = WAYS[way].read(NAME, catalog, tmp_path)
    except (SourceError, IntegrityError):
        n_errors = 1
        got = WAYS[way].read(NAME, catalog, tmp_path)
    table.enter("200 where 206 is due", server, [(got, WAYS[way].of(VALUES))], n_faults=1, n_errors=n_errors)


@ways
@pytest.mark.parametrize("status", [403, 404])
def test_a_refusal_is_never_tried_again(
    server: LoopbackS3, catalog: str, table: Table, tmp_path: Path, way: str, status: int
) -> None:
    refused = Counter[str | None]()

    def data_of_the_object(request: Request) -> bool:
        refused[request.range] += request.if_match is not None
        return request.if_match is not None

    server.inject(Fault(status=status), when=data_of_the_object, times=math.inf)
    with pytest.raises(AccessError if status == 403 else ObjectMissingError):
        WAYS[way].read(NAME, catalog, tmp_path)
    assert set(refused.values()) <= {0, 1}
    server.clear_faults()
    got = WAYS[way].read(NAME, catalog, tmp_path)
    pairs, n_faults = [(got, WAYS[way].of(VALUES))], refused.total()
    table.enter(f"{status} for all data, then fixed", server, pairs, n_faults=n_faults, n_errors=1)


@ways
def test_an_object_that_is_longer_than_its_header_promises_is_read_with_a_warning(
    server: LoopbackS3, catalog: str, tmp_path: Path, way: str
) -> None:
    server.put(KEY, npy(VALUES) + bytes(1000))
    with pytest.warns(TrailingBytesWarning, match="its array ends at"):
        got = WAYS[way].read(NAME, catalog, tmp_path)
    np.testing.assert_array_equal(got, WAYS[way].of(VALUES))


@ways
def test_an_object_that_is_shorter_than_its_header_promises_is_refused(
    server: LoopbackS3, catalog: str, table: Table, tmp_path: Path, way: str
) -> None:
    right = npy(VALUES)
    server.put(KEY, right[:-1000])
    with pytest.raises(FormatError, match="its header promises"):
        WAYS[way].read(NAME, catalog, tmp_path)
    assert not list(tmp_path.glob("x.npy*")), "nothing is kept"
    assert not (tmp_path / "m.zarr").exists()
    server.put(KEY, right)
    got = WAYS[way].read(NAME, catalog, tmp_path)
    table.enter("object of a wrong length, then fixed", server, [(got, WAYS[way].of(VALUES))], n_faults=1, n_errors=1)


@ways
def test_another_range_than_was_asked_for_is_never_taken_for_it(
    server: LoopbackS3, catalog: str, table: Table, tmp_path: Path, way: str
) -> None:
    storm = Storm(server, Fault(shift=64), tries=1)
    got = WAYS[way].read(NAME, catalog, tmp_path)
    table.enter("another range than asked for", server, [(got, WAYS[way].of(VALUES))], n_faults=storm.n_faults)
    assert storm.n_faults >= 2


@pytest.mark.parametrize("claim", [0, 1, 128, VALUES.nbytes], ids=str)
def test_a_store_that_lies_about_the_length_of_an_object_is_not_believed(
    server: LoopbackS3, catalog: str, table: Table, claim: int
) -> None:
    server.inject(Fault(claimed_size=claim), times=math.inf)
    with pytest.raises((FormatError, SourceError)):
        dmdata.open(NAME, catalog=catalog)[ROWS]
    n_faults = server.n_requests
    server.clear_faults()
    got = dmdata.open(NAME, catalog=catalog)[ROWS]
    table.enter("a lie about the length, then fixed", server, [(got, VALUES[ROWS])], n_faults=n_faults, n_errors=1)


# Kills


class Commands:
    """Starts dmdata commands as processes of their own, forked from one that has loaded it: a kill is cheap then.

    Parameters
    ----------
    n_files : int, optional
        How many files each may open.
    """

    _PROGRAM = """
import json, os, sys
from dmdata.cli.command import main
print("ready", flush=True)
while line := sys.stdin.readline():
    task = json.loads(line)
    if isinstance(task, int):
        print(os.waitstatus_to_exitcode(os.waitpid(task, 0)[1]), flush=True)
        continue
    child = os.fork()
    if not child:
        os.dup2(2, 1)  # what it prints is no answer
        try:
            main(task)
        except SystemExit as ended:
            os._exit(ended.code or 0)
        os._exit(0)
    print(child, flush=True)
"""

    def __init__(self, n_files: int | None = None) -> None:
        self._n_files = n_files

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self._PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._answer() == "ready"
        if self._n_files:
            limit = resource.RLIMIT_NOFILE
            resource.prlimit(self._process.pid, limit, (self._n_files, resource.getrlimit(limit)[1]))
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def start(self, *arguments: object) -> int:
        """Start a command; returns its process id."""
        return int(self._ask([str(argument) for argument in arguments]))

    def exit_code(self, pid: int) -> int:
        """Wait for a command to end; a signal's number is negative."""
        return int(self._ask(pid))

    def _ask(self, task: object) -> str:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()


def is_running(pid: int) -> bool:
    """Tell whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to tell whether a process has ended")
@pytest.mark.timeout(600)
def test_twenty_kills_at_random_moments_of_a_mirror_lose_nothing(
    server: LoopbackS3, table: Table, tmp_path: Path
) -> None:
    values = np.random.default_rng(2).integers(0, 2**16, (3000, 4000), np.uint16)
    catalog = publish(server, {NAME: values}, tmp_path / "catalog")
    # every second row: a request each, for the gap between two costs more
    wanted, row_bytes = values[::2], 8000
    rng = np.random.default_rng(printed_seed())
    server.latency_seconds = 0.02
    n_kills = n_done = code = 0
    n_files = 160
    with Commands(n_files) as commands:
        while n_kills < 20 or code:
            destination = tmp_path / f"{n_done}.zarr"
            before, more = server.n_requests, int(rng.integers(0, 500))
            pid = commands.start(
                "mirror", NAME, destination, "--catalog", catalog, "--select", "::2", "--memory", 8, "-yq"
            )
            if n_kills < 20:
                while is_running(pid) and server.n_requests < before + more:
                    time.sleep(0.002)
                time.sleep(rng.uniform(0, 0.05))
                if is_running(pid):
                    os.kill(pid, signal.SIGKILL)
                    n_kills += 1
            else:
                server.latency_seconds = 0
            code = commands.exit_code(pid)
            assert code in (0, -signal.SIGKILL)
            n_done += code == 0
    got = [(np.asarray(zarr.open_array(tmp_path / f"{nth}.zarr", mode="r")[...]), wanted) for nth in range(n_done)]
    again = server.n_object_bytes - n_done * wanted.nbytes
    # short ranges take up to half of the files that a process may open
    assert 0 <= again <= n_kills * (n_files // 2 * row_bytes + NPY_PREFIX_BYTES)
    table.enter("kill -9 of a mirror at random moments", server, got, n_faults=n_kills, n_errors=n_kills)
    assert "reserved" not in Ledger(home()).spent(by="state"), "what a killed process had set aside is free again"


# This machine's own faults


@contextlib.contextmanager
def disk(place: Path, options: str) -> Iterator[Path]:
    """Mount a small disk in memory; skips where one may not."""
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("way", ["get", "mirror"])
@pytest.mark.parametrize("mebibytes", [1, 5])
def test_a_full_disk_is_an_error_in_words_and_nothing_is_paid_twice(
    server: LoopbackS3, catalog: str, table: Table, tmp_path: Path, way: str, mebibytes: int
) -> None:
    with disk(tmp_path / "disk", f"size={mebibytes}m") as folder:
        with pytest.raises(DmdataError, match="No space left on device"):
            WAYS[way].read(NAME, catalog, folder)
        subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
        got = WAYS[way].read(NAME, catalog, folder)
        table.enter("disk full, then with room", server, [(got, WAYS[way].of(VALUES))], n_faults=1, n_errors=1)
    assert server.n_object_bytes - got.nbytes <= 3 * NPY_PREFIX_BYTES


@ways
def test_a_home_that_cannot_be_written_is_named_before_anything_is_paid(
    server: LoopbackS3,
    catalog: str,
    table: Table,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    dmdata_home: Path,
) -> None:
    with disk(tmp_path / "home", "ro,size=1m") as place:
        monkeypatch.setenv("DMDATA_HOME", str(place))
        with pytest.raises(DmdataError, match="set DMDATA_HOME"):
            WAYS[way].read(NAME, catalog, tmp_path)
    assert server.n_requests == 0
    monkeypatch.setenv("DMDATA_HOME", str(dmdata_home))
    got = WAYS[way].read(NAME, catalog, tmp_path)
    table.enter("home read-only, then fixed", server, [(got, WAYS[way].of(VALUES))], n_faults=1, n_errors=1)


@ways
def test_a_home_whose_disk_fills_up_meanwhile_never_hides_what_was_paid(
    server: LoopbackS3, catalog: str, table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    with disk(tmp_path / "home", "size=1m") as place:
        monkeypatch.setenv("DMDATA_HOME", str(place))
        filler = place / "filler"

        def fill(request: Request) -> bool:
            if request.if_match and not filler.exists():
                with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                    while file.write(bytes(4096)):
                        pass
            return False

        server.inject(Fault(), when=fill, times=math.inf)
        n_errors = 0
        try:
            got = WAYS[way].read(NAME, catalog, tmp_path)
        except DmdataError as error:
            n_errors = 1
            assert "set DMDATA_HOME" in str(error)  # noqa: PT017 - either outcome is right
        server.clear_faults()
        filler.unlink()
        if n_errors:
            got = WAYS[way].read(NAME, catalog, tmp_path)
        pairs = [(got, WAYS[way].of(VALUES))]
        table.enter("home's disk full meanwhile, then with room", server, pairs, n_faults=1, n_errors=n_errors)


def test_of_two_mirrors_to_one_destination_one_copies_and_the_other_says_so(
    server: LoopbackS3, catalog: str, table: Table, tmp_path: Path
) -> None:
    server.bytes_per_second = 8e6
    arguments = ["mirror", NAME, tmp_path / "m.zarr", "--catalog", catalog, "--memory", 8, "-yq"]
    with Commands() as commands:
        codes = []
        for _ in range(3):
            pids = [commands.start(*arguments) for _ in range(2)]
            codes.append(sorted(commands.exit_code(pid) for pid in pids))
            server.bytes_per_second = 0
    assert codes[0] == [0, 1]
    got = np.asarray(zarr.open_array(tmp_path / "m.zarr", mode="r")[...])
    table.enter("two mirrors of one destination at once", server, [(got, VALUES)], n_faults=3, n_errors=1)
    assert server.n_object_bytes <= VALUES.nbytes + 2 * NPY_PREFIX_BYTES, "each byte of data once"


def test_several_processes_under_one_budget_never_pass_it_while_transfers_break(
    server: LoopbackS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: list[str]
) -> None:
    values = VALUES[:24, :200_000]
    catalog = publish(server, {NAME: values}, tmp_path)
    price = dmdata.open(NAME, catalog=catalog).estimate().usd
    monkeypatch.setenv("DMDATA_MAX_COST", f"{dmdata.spend().usd + price * 5.5:.12f}")
    rng = random.Random(3)  # noqa: S311 - a seeded fault, no secret
    server.inject(
        Fault(reset_after=50_000), when=lambda sent: sent.if_match is not None and rng.random() < 0.3, times=math.inf
    )
    program = (
        "import sys, dmdata\n"
        "array, n = dmdata.open(sys.argv[1], catalog=sys.argv[2]), 0\n"
        "for _ in range(20):\n"
        "    try:\n"
        "        array[...]\n"
        "        n += 1\n"
        "    except dmdata.errors.BudgetError:\n"
        "        break\n"
        "print(n)\n"
    )
    command = [sys.executable, "-c", "import dmdata.errors\n" + program, NAME, catalog]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) for _ in range(8)]
    counts = [int(racer.communicate()[0]) for racer in racers]
    limit, spent = float(os.environ["DMDATA_MAX_COST"]), dmdata.spend().usd
    figures.append(
        f"fault, 8 processes and resets under one budget: {sum(counts)} reads done, ${spent:.6f} of ${limit:.6f} "
        f"spent, served for ${billed_usd(server):.6f}"
    )
    assert spent <= limit
    assert billed_usd(server) <= spent + 1e-12
    assert 1 <= sum(counts) <= 5


def test_one_server_log_shows_the_condition_on_every_request_for_data(
    server: LoopbackS3, catalog: str, tmp_path: Path
) -> None:
    for way in WAYS.values():
        way.read(NAME, catalog, tmp_path)
    conditions = Counter(request.if_match for request in server.log)
    assert set(conditions) == {None, server.etag(KEY)}
    assert conditions[None] == 2, "the header, and once more before a download"
    assert {request.bucket for request in server.log} == {BUCKET}
