"""A column over a link with 30 ms to the first byte, next to bare obstore with as many requests in flight."""

import functools
import os
from collections.abc import Callable

import numpy as np
from reading import bare_requests, bare_store
from server import BUCKET, Nginx, nginx
from timing import Bench, timed

import dmdata
from dmdata.layout.formats import npy_header
from dmdata.reading.pace import SHORT_RANGE_CONNECTIONS

COLUMN = 42
# a request pays more than the gap between two rows of so many bytes
ROW_BYTES = 6_000
FEW = 32


def run(bench: Bench, *, small: bool) -> None:
    """Measure a column of 31,000 rows, and one of 310,000 against the estimate; small: of 6,200 alone."""
    n_rows = 6_200 if small else 31_000
    with nginx() as server, dmdata.budget(usd=10_000):
        os.environ["AWS_ENDPOINT_URL_S3"] = server.slow_endpoint
        against_obstore(bench, server, n_rows)
        if not small:
            against_the_estimate(bench, server, 310_000)


def against_obstore(bench: Bench, server: Nginx, n_rows: int) -> None:
    """As many in flight as ours, and 32, which a read had before."""
    column = write_column(server, n_rows)
    lazy = dmdata.open(f"s3://{BUCKET}/{_key(n_rows)}")
    plan = lazy.plan(np.s_[:, COLUMN])
    assert plan.n_requests == n_rows, plan
    assert np.array_equal(lazy[:, COLUMN], column)
    store, ranges = bare_store(server.slow_endpoint), plan.ranges.tolist()
    peers: dict[str, Callable[[], float | object]] = {
        f"bare get_range, {n} in flight": bare_requests(store, ranges, plan.n_bytes, n, key=_key(n_rows))
        for n in (SHORT_RANGE_CONNECTIONS, SHORT_RANGE_CONNECTIONS // 2)
    }
    tenth = bare_requests(store, ranges[: n_rows // 10], plan.n_bytes, FEW, key=_key(n_rows))
    few = f"bare get_range, {FEW} in flight, of a tenth"
    peers[few] = lambda: 10 * timed(tenth)
    bars = dict.fromkeys(peers, ">= 0.8") | {few: ">= 5"}
    bench.compare(
        f"a column of {n_rows:,} rows, 30 ms", functools.partial(lazy.__getitem__, np.s_[:, COLUMN]), peers, bars
    )


def against_the_estimate(bench: Bench, server: Nginx, n_rows: int) -> None:
    """How long it takes next to what was said before."""
    column = write_column(server, n_rows)
    lazy = dmdata.open(f"s3://{BUCKET}/{_key(n_rows)}")
    said = lazy.estimate(np.s_[:, COLUMN]).seconds
    read: list[np.ndarray] = []
    seconds = timed(lambda: read.append(lazy[:, COLUMN]))
    assert np.array_equal(read[0], column)
    bench.add(f"a column of {n_rows:,} rows, 30 ms", f"{seconds:.1f} s", "the estimate", [seconds / said], bar="<= 1.2")


def write_column(server: Nginx, n_rows: int) -> np.ndarray:
    """Write an array whose other columns are holes, so that a large one takes little memory."""
    header = npy_header((n_rows, ROW_BYTES // 2), np.dtype("float16"))
    column = np.random.default_rng(0).standard_normal(n_rows).astype(np.float16)
    path = server.objects / _key(n_rows)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + n_rows * ROW_BYTES)
    np.memmap(path, np.float16, "r+", offset=len(header), shape=(n_rows, ROW_BYTES // 2))[:, COLUMN] = column
    return column


def _key(n_rows: int) -> str:
    return f"column-{n_rows}.npy"
