"""Reading a `.npy` of a requester-pays bucket: whole, over a slow link, scattered rows, a column; and planning one."""

import contextlib
import functools
import itertools
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import obstore
from obstore.store import S3Store
from server import BUCKET, SLOW_BYTES_PER_SECOND, SLOW_SECONDS_TO_FIRST_BYTE, Nginx, nginx
from timing import PEERS, Bench, timed

import dmdata
from dmdata.layout.formats import npy_header

KEY = "whole.npy"
ROW_BYTES = 20_000


def run(bench: Bench, *, small: bool) -> None:
    """Measure all of it; small: an eighth of the bytes."""
    n_rows = 50_000 if not small else 6_250
    with nginx() as server, dmdata.budget(usd=10_000):
        write_npy(server.objects / KEY, (n_rows, ROW_BYTES // 2), np.dtype("float16"))
        whole(bench, server)
        scattered(bench, server, n_rows)
        slow(bench, server, n_rows)
    planning(bench)


def whole(bench: Bench, server: Nginx) -> None:
    """The whole array into memory."""
    lazy = dmdata.open(f"s3://{BUCKET}/{KEY}")
    size = lazy.nbytes + 128
    store, client = bare_store(server.endpoint), boto3.client("s3")
    target = Path(os.environ["DMDATA_HOME"]) / "downloaded.npy"

    def one_stream() -> None:
        body = client.get_object(Bucket=BUCKET, Key=KEY, RequestPayer="requester")["Body"]
        buffer, at = memoryview(bytearray(size)), 0
        while chunk := body.read(8 << 20):
            buffer[at : at + len(chunk)] = chunk
            at += len(chunk)

    starts = list(range(0, size, 8 << 20))
    ends = [min(start + (8 << 20), size) for start in starts]
    peers: dict[str, Callable[[], object]] = {
        "obstore, ranges into a buffer": lambda: bare_ranges(store, KEY, size, range_bytes=8 << 20, n_threads=8),
        "obstore get_ranges": lambda: obstore.get_ranges(store, KEY, starts=starts, ends=ends, coalesce=0),
        "plain sockets, the wire itself": lambda: bare_sockets(
            server.endpoint, size, range_bytes=16 << 20, n_threads=8
        ),
        "boto3 one stream": one_stream,
        "boto3 download_file": lambda: client.download_file(
            BUCKET, KEY, str(target), ExtraArgs={"RequestPayer": "requester"}
        ),
    }
    bars = {"obstore, ranges into a buffer": ">= 0.85", "boto3 download_file": ">= 3", "s3fs cat_ranges": ">= 3"}
    with s3fs_peer(server.endpoint, f"{BUCKET}/{KEY}", size) as s3fs:
        if s3fs is not None:
            peers |= {f"s3fs {how}": functools.partial(s3fs, how) for how in ("cat_ranges", "open")}
        bench.compare(f"whole array, {size / 1e6:,.0f} MB", lambda: lazy[...], peers, bars, memory_bytes=2 * size)
    target.unlink()


def scattered(bench: Bench, server: Nginx, n_rows: int) -> None:
    """A thousand rows here and there, and one column: bytes as planned, time as the bare requests'."""
    lazy = dmdata.open(f"s3://{BUCKET}/{KEY}")
    store = bare_store(server.endpoint)
    rows = np.sort(np.random.default_rng(0).choice(n_rows, min(1000, n_rows // 5), replace=False))
    n_column = min(n_rows, 50_000)
    cases: dict[str, tuple[Any, Callable[[], object]]] = {
        f"{len(rows):,} scattered rows": ((rows,), lambda: lazy.oindex[rows]),
        f"a column of {n_column:,} rows": (np.s_[:n_column, 7], lambda: lazy[:n_column, 7]),
    }
    for what, (key, read) in cases.items():
        plan = lazy.plan(key)
        before = server.served()
        read()
        after = server.served()
        served = after[0] - before[0], after[1] - before[1]
        bench.add(f"{what}: bytes served", f"{served[1]:,} B", "the plan's", [served[1] / plan.n_bytes], bar="= 1")
        bench.add(f"{what}: requests", f"{served[0]:,}", "the plan's", [served[0] / plan.n_requests], bar="= 1")
        ranges = plan.ranges.tolist()
        peers = {"bare get_range, 8 threads": bare_requests(store, ranges, plan.n_bytes, 8)}
        bars = dict.fromkeys(peers, ">= 0.833")  # at most 1.2 times their time
        peers["obstore get_ranges, in one call"] = lambda ranges=ranges: obstore.get_ranges(
            store, KEY, starts=[a for a, _ in ranges], ends=[b for _, b in ranges], coalesce=0
        )
        bench.compare(what, read, peers, bars)


def slow(bench: Bench, server: Nginx, n_rows: int) -> None:
    """50 MB/s a connection and 30 ms to the first byte."""
    os.environ["AWS_ENDPOINT_URL_S3"] = server.slow_endpoint
    try:
        lazy = dmdata.open(f"s3://{BUCKET}/{KEY}")
        client = boto3.client("s3")

        def one_stream() -> None:
            body = client.get_object(Bucket=BUCKET, Key=KEY, RequestPayer="requester")["Body"]
            while body.read(8 << 20):
                pass

        store, ranges = bare_store(server.slow_endpoint), (16 << 20, 64 << 20)
        for n_bytes in ranges:
            seconds = timed(lambda n_bytes=n_bytes: obstore.get_range(store, KEY, start=0, length=n_bytes))
            due = slow_seconds(n_bytes)
            what = f"the slow link itself: one range of {n_bytes >> 20} MiB"
            bench.add(what, f"{seconds:.3f} s", f"{due:.3f} s", [seconds / due], bar=">= 0.95")
        # nginx keeps no exact pace on a busy machine: a stream that lags would flatter us
        reckoned = "one stream, reckoned"
        few = Bench(repeats=min(bench.repeats, 2), rows=bench.rows)
        few.compare(
            f"whole array, {n_rows * ROW_BYTES / 1e6:,.0f} MB, 50 MB/s a connection, 30 ms",
            lambda: lazy[...],
            {"boto3 one stream": one_stream, reckoned: lambda: slow_seconds(lazy.nbytes + 128)},
            {"boto3 one stream": ">= 12", reckoned: ">= 12"},
            memory_bytes=2 * lazy.nbytes,
        )
    finally:
        os.environ["AWS_ENDPOINT_URL_S3"] = server.endpoint


def slow_seconds(n_bytes: int) -> float:
    """Reckon the time of one answer over the slow link."""
    return SLOW_SECONDS_TO_FIRST_BYTE + n_bytes / SLOW_BYTES_PER_SECOND


def planning(bench: Bench) -> None:
    """One column of 1,510,000 rows, in a process of its own."""
    # a file of holes: a plan needs its header and its size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "margins.npy"
        with path.open("wb") as file:
            header = npy_header((1_510_000, ROW_BYTES // 2), np.dtype("float16"))
            file.write(header)
            file.truncate(len(header) + 1_510_000 * ROW_BYTES)
        program = "import sys; sys.path.insert(0, sys.argv[1]); import reading; reading.plan_a_column(sys.argv[2])"
        command = [sys.executable, "-c", program, str(Path(__file__).parent), str(path)]
        runs = [
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            for _ in range(bench.repeats)
        ]
    seconds, megabytes = ([float(figure) for figure in figures] for figures in zip(*runs, strict=True))
    bench.add(
        "plan a column of 1,510,000 rows, seconds",
        f"{statistics.median(seconds):.2f} s",
        "a second",
        seconds,
        bar="< 1",
    )
    bench.add(
        "plan a column of 1,510,000 rows, MB",
        f"{statistics.median(megabytes):.0f} MB",
        "300 MB",
        megabytes,
        bar="< 300",
    )


def plan_a_column(path: str) -> None:
    """Plan, and print the seconds and megabytes it took."""
    lazy = dmdata.open(path)
    before = peak_memory()
    began = time.perf_counter()
    plan = lazy.plan(np.s_[:, 42])
    assert plan.n_requests == len(plan.ranges) == 1_510_000
    seconds = time.perf_counter() - began
    print(seconds, (peak_memory() - before) / 1e6)


def peak_memory() -> int:
    """Tell the most resident memory of this process so far, in bytes.

    Not by getrusage: there, a process starts with its parent's peak.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def write_npy(path: Path, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
    """Write normal draws as a .npy, a part at a time."""
    part = np.random.default_rng(0).standard_normal((1000, shape[1]), np.float32).astype(dtype)
    with path.open("wb") as file:
        file.write(npy_header(shape, dtype))
        for first in range(0, shape[0], len(part)):
            file.write(np.roll(part, first, axis=1)[: shape[0] - first].tobytes())


def bare_store(endpoint: str) -> S3Store:
    """Make obstore's own client, with nothing of ours around it."""
    return S3Store(
        BUCKET,
        endpoint=endpoint,
        access_key_id="BENCHMARK",
        secret_access_key="BENCHMARK",  # noqa: S106
        region="us-east-1",
        virtual_hosted_style_request=False,
        request_payer=True,
        client_options={"allow_http": True},
    )


def bare_ranges(store: S3Store, key: str, size: int, *, range_bytes: int, n_threads: int) -> None:
    """Read an object in ranges, by several threads, into one buffer."""
    buffer = np.empty(size, np.uint8)
    ranges = [(start, min(start + range_bytes, size)) for start in range(0, size, range_bytes)]
    _by_threads(store, key, ranges, buffer, [start for start, _ in ranges], n_threads)


def bare_sockets(endpoint: str, size: int, *, range_bytes: int, n_threads: int) -> None:
    """Read an object in ranges into one buffer with nothing between it and the kernel: no client can be much faster."""
    buffer = np.empty(size, np.uint8)
    starts = iter(range(0, size, range_bytes))
    host, port = endpoint.removeprefix("http://").split(":")

    def work() -> None:
        with socket.create_connection((host, int(port))) as connection:
            for start in starts:
                at, stop = start, min(start + range_bytes, size)
                head = f"GET /{BUCKET}/{KEY} HTTP/1.1\r\nHost: {host}\r\nx-amz-request-payer: requester\r\n"
                connection.sendall(f"{head}Range: bytes={start}-{stop - 1}\r\n\r\n".encode())
                answer = b""
                while b"\r\n\r\n" not in answer:
                    answer += connection.recv(4096)
                body = answer.partition(b"\r\n\r\n")[2]
                buffer[at : at + len(body)] = np.frombuffer(body, np.uint8)
                at += len(body)
                while at < stop:
                    at += connection.recv_into(buffer[at:stop].data)

    _in_threads(work, n_threads)


def bare_requests(
    store: S3Store, ranges: list[list[int]], n_bytes: int, n_threads: int, *, key: str = KEY
) -> Callable[[], object]:
    """Make the reading of given ranges, one after the other into a buffer, by several threads."""
    places = np.cumsum([0, *(stop - start for start, stop in ranges)]).tolist()

    def read() -> None:
        _by_threads(store, key, ranges, np.empty(n_bytes, np.uint8), places, n_threads)

    return read


def _by_threads(store: S3Store, key: str, ranges: Any, buffer: Any, places: list[int], n_threads: int) -> None:
    numbers = itertools.count()

    def work() -> None:
        while (nth := next(numbers)) < len(ranges):
            start, stop = ranges[nth]
            data = obstore.get_range(store, key, start=start, end=stop)
            buffer[places[nth] : places[nth] + stop - start] = np.frombuffer(data, np.uint8)

    _in_threads(work, n_threads)


def _in_threads(work: Callable[[], None], n_threads: int) -> None:
    threads = [threading.Thread(target=work) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contextlib.contextmanager
def s3fs_peer(endpoint: str, path: str, size: int) -> Iterator[Callable[[str], float] | None]:
    """Start s3fs in its own environment, where `make bench` has made one."""
    if not (PEERS / ".installed").exists():
        print("  without s3fs, for it is not installed: make bench")
        yield None
        return
    command = [
        str(PEERS / "bin" / "python"),
        "-I",
        str(Path(__file__).with_name("peer_s3fs.py")),
        endpoint,
        path,
        str(size),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout
        if stdout.readline().strip() != "ready":
            raise SystemExit("s3fs does not start, see above; rm -r .venv-peers; make bench")

        def read(how: str) -> float:
            stdin.write(how + "\n")
            stdin.flush()
            return float(stdout.readline())

        try:
            yield read
        finally:
            stdin.close()
