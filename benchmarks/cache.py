"""What keeping bytes that were paid for costs the first read, and what it spares the second: whole, rows, a column."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from server import BUCKET, Nginx, nginx
from timing import Bench, timed

import dmdata

KEY = "kept.npy"
ROW_BYTES = 20_000
N_THREADS = 16


def run(bench: Bench, *, small: bool) -> None:
    """Measure all of it; small: an eighth of the bytes."""
    n_rows = 50_000 if not small else 6_250
    with nginx() as server, dmdata.budget(usd=10_000):
        write_rows(server.objects / KEY, n_rows)
        del os.environ["DMDATA_CACHE_GIB"]
        url = f"s3://{BUCKET}/{KEY}"
        past, kept = dmdata.open(url, cache=False), dmdata.open(url)
        rows = np.random.default_rng(0).permutation(n_rows)[:400].tolist()

        def row_by_row(array: dmdata.LazyArray) -> None:
            with ThreadPoolExecutor(N_THREADS) as pool:
                list(pool.map(lambda row: array[row], rows))

        compare(bench, "whole", lambda array: array[...], kept, past)
        compare(bench, f"{len(rows)} rows, one by one, {N_THREADS} threads", row_by_row, kept, past)
        compare(bench, "column", lambda array: array[:, 42], kept, past)
        slow(bench, server, url)


def compare(
    bench: Bench,
    what: str,
    read: Callable[[dmdata.LazyArray], object],
    kept: dmdata.LazyArray,
    past: dmdata.LazyArray,
) -> None:
    """Time a first read that is kept, a second one from there, and the same past it."""

    def first() -> float:
        forget()
        return timed(lambda: read(kept))

    def second() -> float:
        read(kept)
        return timed(lambda: read(kept))

    bench.compare(f"{what}: first read, kept", first, {"past the cache": lambda: timed(lambda: read(past))})
    bench.compare(f"{what}: read again", second, {"past the cache": lambda: timed(lambda: read(past))})


def slow(bench: Bench, server: Nginx, url: str) -> None:
    """The same over a slow link, whose bytes are waited for."""
    os.environ["AWS_ENDPOINT_URL_S3"] = server.slow_endpoint
    past, kept = dmdata.open(url, cache=False), dmdata.open(url)
    n_rows = min(len(past), 12_500)
    compare(bench, f"{n_rows:,} rows over a slow link", lambda array: array[:n_rows], kept, past)


def forget() -> None:
    """Remove all that is kept."""
    shutil.rmtree(Path(os.environ["DMDATA_HOME"]) / "ranges", ignore_errors=True)


def write_rows(path: Path, n_rows: int) -> None:
    """Write an array of random rows of 20,000 bytes."""
    block = np.random.default_rng(0).integers(0, 255, (min(n_rows, 1000), ROW_BYTES), np.uint8)
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(n_rows, ROW_BYTES))
    for first in range(0, n_rows, len(block)):
        array[first : first + len(block)] = block[: n_rows - first]
    array.flush()
