"""A column is many short ranges: far servers are asked for hundreds at a time, and for fewer when they say so.

Against the loopback server, which logs each request and connection and plays SlowDown and broken connections.
"""

import asyncio
import itertools
import math
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from servers.loopback import BUCKET, Fault, LoopbackS3, Request
from small_release import npy

import dmdata
from dmdata.errors import IntegrityError, SourceError
from dmdata.money.prices import Link
from dmdata.reading.pace import FEW_CONNECTIONS, RequestPace

N_ROWS = 1500
ROW_BYTES = 6000  # a request costs less than the bytes between two rows
KEY = "column.npy"
VALUES = np.zeros((N_ROWS, ROW_BYTES // 2), np.float16)
VALUES[:, 42] = np.random.default_rng(0).standard_normal(N_ROWS)
COLUMN = VALUES[:, 42].copy()
CONTENT = npy(VALUES)
FAR_SECONDS = 0.03


@pytest.fixture
def far(s3: LoopbackS3) -> LoopbackS3:
    """A server that takes 30 ms to its first byte, with one array."""
    s3.latency_seconds = FAR_SECONDS
    s3.put(KEY, CONTENT)
    return s3


def opened(server: LoopbackS3) -> dmdata.LazyArray:
    """Open the array, and forget what that took."""
    lazy = dmdata.open(f"s3://{BUCKET}/{KEY}")
    assert lazy.plan(np.s_[:, 42]).n_requests == N_ROWS
    server.reset_log()
    return lazy


def ranges_of(server: LoopbackS3) -> list[Request]:
    return [request for request in server.log if request.key == KEY]


def most_at_once(server: LoopbackS3) -> int:
    """Count the connections that the ranges came on: none of them carries two at a time."""
    return len({request.connection for request in ranges_of(server)})


def is_data(request: Request) -> bool:
    return request.if_match is not None


def test_a_column_of_a_far_server_is_read_over_hundreds_of_connections_and_each_request_is_counted(
    far: LoopbackS3,
) -> None:
    lazy, before = opened(far), dmdata.spend()
    assert np.array_equal(lazy[:, 42], COLUMN)
    requests = ranges_of(far)
    assert len(requests) == N_ROWS
    assert {request.if_match for request in requests} == {far.etag(KEY)}
    spent = dmdata.spend()
    assert (spent.n_requests - before.n_requests, spent.n_bytes - before.n_bytes) == (N_ROWS, COLUMN.nbytes)
    assert 8 * 10 < most_at_once(far) <= 512


def test_the_next_column_uses_the_connections_of_the_one_before(far: LoopbackS3) -> None:
    lazy = opened(far)
    lazy[:, 42]
    before = {request.connection for request in ranges_of(far)}
    # on a busy machine those of the one before may not be known to be idle yet: once is enough
    used = before
    for nth in range(43, 53):
        far.reset_log()
        lazy[:, nth]
        used = {request.connection for request in ranges_of(far)}
        if len(before & used) >= len(used) / 2:
            return
        before = used
    pytest.fail(f"{len(before & used)} of {len(used)} connections were used before")


def test_a_near_server_is_read_by_few_connections(s3: LoopbackS3) -> None:
    s3.put(KEY, CONTENT)
    lazy = opened(s3)
    # a busy machine may take its time for an answer: once is enough
    for _ in range(5):
        s3.reset_log()
        assert np.array_equal(lazy[:, 42], COLUMN)
        if most_at_once(s3) <= FEW_CONNECTIONS * 10:
            return
    pytest.fail(f"{most_at_once(s3)} connections")


def limited_to(per_second: float) -> Callable[[Request], bool]:
    """Refuse what comes faster than a rate, as S3 does for a prefix."""
    served: deque[float] = deque()

    def is_too_fast(request: Request) -> bool:
        now = time.monotonic()
        while served and served[0] < now - 0.1:
            served.popleft()
        if not is_data(request):
            return False
        if len(served) >= per_second / 10:
            return True
        served.append(now)
        return False

    return is_too_fast


def test_a_server_that_says_slow_down_is_asked_for_less_at_a_time_and_read_to_the_end(far: LoopbackS3) -> None:
    lazy, before = opened(far), dmdata.spend()
    far.inject(Fault(status=503, code="SlowDown"), when=limited_to(600), times=math.inf)
    assert np.array_equal(lazy[:, 42], COLUMN)
    requests = ranges_of(far)
    refused = [nth for nth, request in enumerate(requests) if request.status == 503]
    assert refused
    spent = dmdata.spend()
    assert spent.n_requests - before.n_requests >= len(requests)
    assert spent.n_bytes - before.n_bytes >= far.n_object_bytes
    # where nothing was learned, most of the second half of the requests would be refused
    late = sum(1 for nth in refused if nth >= len(requests) // 2)
    assert late <= len(requests) / 2 / 3, f"{late} of {len(requests) // 2} were refused at last"


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=503, code="SlowDown"),
        Fault(status=500),
        Fault(drop=True),
        Fault(reset_after=1),
        Fault(end_after=1),
        Fault(shorten_to=1),
        Fault(stall_seconds=0.4),
    ],
    ids=str,
)
def test_a_column_is_exact_and_its_ledger_no_less_than_served_whatever_breaks_now_and_then(
    far: LoopbackS3, fault: Fault
) -> None:
    lazy, before = opened(far), dmdata.spend()
    numbers = itertools.count(1)
    far.inject(fault, when=lambda request: is_data(request) and next(numbers) % 75 == 0, times=math.inf)
    assert np.array_equal(lazy[:, 42], COLUMN)
    spent = dmdata.spend()
    assert spent.n_bytes - before.n_bytes >= far.n_object_bytes
    assert spent.n_requests - before.n_requests >= far.n_requests
    assert far.n_requests <= 2.2 * N_ROWS


def test_a_server_that_refuses_for_ever_is_given_up_and_all_requests_are_in_the_ledger(far: LoopbackS3) -> None:
    lazy, before = opened(far), dmdata.spend()
    far.inject(Fault(status=503, code="SlowDown"), when=is_data, times=math.inf)
    with pytest.raises(SourceError, match=r"SlowDown\).* given up after 6 tries"):
        lazy[:, 42]
    assert dmdata.spend().n_requests - before.n_requests >= far.n_requests


def test_an_object_that_changes_on_the_way_ends_the_read(far: LoopbackS3) -> None:
    lazy = opened(far)
    numbers = itertools.count()
    far.inject(Fault(replace=npy(VALUES + 1)), when=lambda request: is_data(request) and next(numbers) == 700)
    with pytest.raises(IntegrityError, match="changed"):
        lazy[:, 42]


def test_a_server_that_heeds_no_condition_is_caught_as_soon_as_headers_are_seen(far: LoopbackS3) -> None:
    lazy = opened(far)
    far.put(KEY, npy(VALUES + 1))
    far.inject(Fault(heedless=True), times=math.inf)
    with pytest.raises(IntegrityError, match="changed"):
        lazy[:, 42]


def test_an_interrupted_column_ends_at_once_and_the_ledger_has_what_was_served(far: LoopbackS3) -> None:
    lazy, before = opened(far), dmdata.spend()
    has_stalled, turns = threading.Event(), itertools.count()

    def is_late(request: Request) -> bool:
        if not is_data(request) or next(turns) < 500:
            return False
        has_stalled.set()
        return True

    far.inject(Fault(stall_seconds=120), when=is_late, times=math.inf)
    interrupt = threading.Thread(target=lambda: has_stalled.wait(60) and signal.raise_signal(signal.SIGINT))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            lazy[:, 42]
    finally:
        signal.signal(signal.SIGINT, handler)
        interrupt.join()
    assert "dmdata-fetch" in {thread.name for thread in threading.enumerate()}, "it waited for a silent server"
    spent = dmdata.spend()
    assert spent.n_bytes - before.n_bytes >= far.n_object_bytes
    assert spent.n_requests - before.n_requests >= far.n_requests


def test_columns_read_at_the_same_time_share_the_connections_of_the_process(far: LoopbackS3) -> None:
    lazy = opened(far)
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda nth: lazy[:, nth], [42, 43, 42, 43]))
    assert all(np.array_equal(column, VALUES[:, nth]) for column, nth in zip(got, [42, 43, 42, 43], strict=True))
    assert most_at_once(far) <= 512 + 4 * 80


def test_a_column_is_read_where_an_event_loop_runs_as_in_a_notebook(far: LoopbackS3) -> None:
    lazy = opened(far)

    async def cell() -> npt.NDArray[Any]:
        return np.asarray(lazy[:, 42])

    assert np.array_equal(asyncio.run(cell()), COLUMN)


def test_a_process_forked_from_one_that_read_a_column_reads_it_too(far: LoopbackS3) -> None:
    lazy = opened(far)
    lazy[:, 42]
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=lambda: results.put(np.asarray(lazy[:200, 42])))
    process.start()
    assert np.array_equal(results.get(), COLUMN[:200])
    process.join(10)
    assert process.exitcode == 0


_READ_WITH_FEW_FILES = """
import resource, sys
import numpy as np
import dmdata
resource.setrlimit(resource.RLIMIT_NOFILE, (200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
np.save(sys.argv[2], dmdata.open(sys.argv[1])[:, 42])
"""


def test_where_few_files_may_be_open_fewer_connections_are_made(far: LoopbackS3, tmp_path: Path) -> None:
    read = tmp_path / "read.npy"
    command = [sys.executable, "-c", _READ_WITH_FEW_FILES, f"s3://{BUCKET}/{KEY}", str(read)]
    subprocess.run(command, check=True)
    assert np.array_equal(np.load(read), COLUMN)
    assert all(request.status == 206 for request in far.log)
    # on a busy machine a few connections are replaced; without the limit on files there would be up to 512
    assert most_at_once(far) <= 150


# How many at a time


def answered(pace: RequestPace, seconds: float, *, n: int = 100) -> None:
    for _ in range(n):
        pace.answered(seconds)
        pace.went_well(1)


def pace_of(n_bytes_each: int = 2, *, n_each: int = 10, n_most: int = 512) -> RequestPace:
    return RequestPace(100_000, 100_000 * n_bytes_each, n_each=n_each, n_most=n_most)


@pytest.mark.parametrize(
    ("seconds", "n_bytes_each", "n_threads"),
    [
        (0.0005, 2, 8),
        (0.003, 2, 8),
        (0.005, 2, 10),
        (0.01, 2, 20),
        (0.02, 2, 40),
        (0.03, 2, 52),
        (0.3, 2, 52),
        # 1.6 GB/s are as much as 32 streams of 50 MB/s: no more is asked for
        (0.03, 400_000, 12),
        (0.04, 800_000, 8),
    ],
)
def test_as_many_requests_are_in_flight_as_a_second_has_times_the_seconds_of_one(
    seconds: float, n_bytes_each: int, n_threads: int
) -> None:
    with pace_of(n_bytes_each) as pace:
        answered(pace, seconds)
        assert pace.allowed == n_threads


def test_connections_are_added_step_by_step() -> None:
    with pace_of() as pace:
        answered(pace, 0.03)
        assert [pace.n_now() for _ in range(8)] == [16, 24, 32, 40, 48, 51, 51, 51]


def test_a_refusal_takes_a_quarter_away_once_a_round_and_good_answers_give_one_back_a_round() -> None:
    with pace_of() as pace:
        answered(pace, 0.03)
        for _ in range(8):
            pace.n_now()
        sent_at = time.monotonic()
        for _ in range(100):
            pace.refused(sent_at)
        assert pace.allowed == 38
        pace.refused(time.monotonic())
        assert pace.allowed == 28
        for _ in range(10):
            pace.went_well(28 * 10)
        assert 37 <= pace.allowed <= 39
        for _ in range(200):
            pace.refused(time.monotonic())
        assert pace.allowed == 1


# How long it takes


def test_the_estimate_of_a_column_reckons_with_more_requests_in_flight_than_that_of_few_long_ranges() -> None:
    link = Link()
    assert link.seconds(310_000 * 2, 310_000) == pytest.approx(310_000 * 0.03 / 256, rel=0.01)
    assert link.seconds(32 * (16 << 20), 32) == pytest.approx(0.03 + (16 << 20) / 50e6)
    # bytes come no faster by that
    assert link.seconds(1000 * 500_000, 1000) == pytest.approx(1000 * 0.03 / 256 + 1000 * 500_000 / 50e6 / 32)


def test_connections_of_the_config_file_hold_for_short_ranges_too(far: LoopbackS3, dmdata_home: Path) -> None:
    seconds = opened(far).estimate(np.s_[:, 42]).seconds
    (dmdata_home / "config.yaml").write_text("link: {n_connections: 16}\n")
    assert opened(far).estimate(np.s_[:, 42]).seconds == pytest.approx(seconds * 16, rel=0.01)
