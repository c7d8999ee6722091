"""A mirror made by a Dask cluster is the same, under the same budget, whichever worker dies."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers.loopback import LoopbackS3
from small_release import publish, write_locally

import dmdata
from dmdata.copying.cluster import carried_along
from dmdata.errors import BudgetError, DmdataError

distributed = pytest.importorskip("distributed")

MARGINS = "toy/50pct/test_margins"
VALUES = np.random.default_rng(0).normal(size=(2000, 1000)).astype(np.float16)
MEBIBYTE = 1 << 20


@pytest.fixture
def cluster(s3: LoopbackS3) -> Iterator[Any]:
    """Two workers of one thread, each a process of its own, with credentials of their own: those do not travel."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0", silence_logs="CRITICAL"
    ) as local:
        yield local


def mirror_on(cluster: Any, catalog: str, destination: Path) -> Any:
    return dmdata.mirror(
        MARGINS, destination, catalog=catalog, memory_bytes=MEBIBYTE, scheduler=cluster.scheduler_address
    )


def test_a_cluster_mirrors_each_byte_once(s3: LoopbackS3, cluster: Any, tmp_path: Path) -> None:
    copy = mirror_on(cluster, publish(s3, {MARGINS: VALUES}, tmp_path), tmp_path / "m.zarr")
    np.testing.assert_array_equal(np.asarray(copy[...]), VALUES)
    assert s3.n_object_bytes == VALUES.nbytes + 128
    assert dmdata.spend().n_bytes == VALUES.nbytes + 128, "workers count in the caller's ledger"
    assert all(comparison.is_same for comparison in dmdata.verify(tmp_path / "m.zarr"))
    assert not (tmp_path / "m.zarr" / "spool").exists()


def test_workers_hold_the_callers_budget(s3: LoopbackS3, cluster: Any, tmp_path: Path) -> None:
    catalog = publish(s3, {MARGINS: VALUES}, tmp_path)
    whole = VALUES.nbytes * 0.09 / 2**30 + 17 * 0.0004 / 1000
    with dmdata.budget(usd=whole * 0.9), pytest.raises(BudgetError):
        mirror_on(cluster, catalog, tmp_path / "m.zarr")
    assert s3.n_object_bytes <= 128
    with dmdata.budget(usd=whole):
        mirror_on(cluster, catalog, tmp_path / "m.zarr")
        with pytest.raises(BudgetError):
            dmdata.open(MARGINS, catalog=catalog, local=False)[:200]


def test_a_block_whose_worker_dies_is_copied_by_another(s3: LoopbackS3, cluster: Any, tmp_path: Path) -> None:
    catalog = publish(s3, {MARGINS: VALUES}, tmp_path)
    s3.latency_seconds = 0.2
    victim = next(iter(cluster.workers.values())).pid

    def kill() -> None:
        while s3.n_requests < 5:
            time.sleep(0.01)
        os.kill(victim, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    copy = mirror_on(cluster, catalog, tmp_path / "m.zarr")
    thread.join()
    np.testing.assert_array_equal(np.asarray(copy[...]), VALUES)
    again = s3.n_object_bytes - VALUES.nbytes - 128
    assert 0 <= again <= 2 * 128 * 2000, "what the dead worker had in flight"
    assert dmdata.spend().n_bytes >= s3.n_object_bytes


def test_a_cluster_that_does_not_answer_is_named(tmp_path: Path) -> None:
    catalog = write_locally({MARGINS: VALUES}, tmp_path / "run")
    with pytest.raises(DmdataError, match=r"no Dask scheduler answers at tcp://127.0.0.1:9"):
        dmdata.mirror(MARGINS, tmp_path / "m.zarr", catalog=catalog, scheduler="tcp://127.0.0.1:9")


def test_a_worker_without_the_callers_ledger_refuses_paid_work(
    dmdata_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with carried_along(paid=True) as carried, carried.in_force():
        pass
    with carried_along(paid=True) as carried:
        next(dmdata_home.glob("cluster-*")).unlink()  # as seen from a machine with a home of its own
        with pytest.raises(DmdataError, match="does not share the caller's ledger"), carried.in_force():
            pass


def test_tasks_take_no_credentials_along_and_leave_the_environment_as_it_was(
    s3: LoopbackS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dmdata.budget(usd=3), carried_along(paid=False) as carried:
        pass
    assert not [name for name in carried.variables if "KEY" in name or "TOKEN" in name]
    before = dict(os.environ)
    with carried.in_force():
        assert os.environ["DMDATA_BUDGETS"].endswith("=3000000000000")
    assert dict(os.environ) == before
