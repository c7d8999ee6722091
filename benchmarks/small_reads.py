"""Single rows from 16 threads: paid for through the ledger, unpaid, and by bare obstore against the same server."""

import itertools
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import obstore
from reading import ROW_BYTES, bare_store, write_npy
from server import BUCKET, nginx
from timing import Bench

import dmdata
from dmdata.array import LazyArray
from dmdata.bodies import InObject

KEY = "small.npy"
N_THREADS = 16


def run(bench: Bench, *, small: bool) -> None:
    """Measure on the disk that holds ``DMDATA_HOME``, and with a home in memory, where a commit waits for nothing."""
    n_rows = 1_000 if not small else 200
    with nginx() as server:
        write_npy(server.objects / KEY, (n_rows, ROW_BYTES // 2), np.dtype("float16"))
        on_disk = os.environ["DMDATA_HOME"]
        try:
            for where, folder in (("on disk", None), ("in memory", "/dev/shm")):  # noqa: S108 - the disk is the point
                with tempfile.TemporaryDirectory(dir=folder) as home:
                    os.environ["DMDATA_HOME"] = home
                    with dmdata.budget(usd=10_000):
                        for endpoint, far in ((server.endpoint, ""), (server.slow_endpoint, ", 30 ms away")):
                            os.environ["AWS_ENDPOINT_URL_S3"] = endpoint
                            measure(bench, endpoint, n_rows, where + far)
        finally:
            os.environ["DMDATA_HOME"] = on_disk


def measure(bench: Bench, endpoint: str, n_rows: int, where: str) -> None:
    """Compare paid with unpaid, and unpaid with bare, by turns."""
    lazy = dmdata.open(f"s3://{BUCKET}/{KEY}")
    paid, unpaid = _told(lazy, charged=True), _told(lazy, charged=False)
    store = bare_store(endpoint)
    offset = lazy.layout.offset

    def bare(row: int) -> object:
        return obstore.get_range(store, KEY, start=offset + row * ROW_BYTES, length=ROW_BYTES)

    what = f"{n_rows:,} single rows, {N_THREADS} threads, ledger {where}"
    free = _each(n_rows, lambda row: unpaid[row])
    bench.compare(f"{what}: paid", _each(n_rows, lambda row: paid[row]), {"unpaid": free}, {"unpaid": ">= 0.7"})
    bench.compare(f"{what}: unpaid", free, {"bare get_range": _each(n_rows, bare)}, {"bare get_range": ">= 0.5"})


def _told(lazy: LazyArray, *, charged: bool) -> LazyArray:
    """Read as if the source had said that it charges, or that it does not."""
    assert isinstance(lazy.body, InObject)
    return replace(lazy, body=replace(lazy.body, transport=replace(lazy.body.transport, charged=charged)))


def _each(n_rows: int, read: Callable[[int], object]) -> Callable[[], None]:
    def work() -> None:
        numbers = itertools.count()

        def some() -> None:
            while (row := next(numbers)) < n_rows:
                read(row)

        threads = [threading.Thread(target=some) for _ in range(N_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return work
