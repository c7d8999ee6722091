"""Train a run on a Dask cluster, on this machine or anywhere that sees the run's directory under the same path.

How models are trained is settled on a worker and put on record before the first block is handed out, so all workers
train rows to the same bits; one that has other code or other versions refuses.
"""

import contextlib
import importlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from multiprocessing import resource_tracker
from typing import Any

import torch

from dmdata import phases
from dmdata.cluster import connect, dask_distributed
from dmdata.errors import FactualError
from dmpipeline import directory, worker
from dmpipeline.compute import available_threads
from dmpipeline.ensembles import Method
from dmpipeline.errors import ClusterError, SpecError, TrainingError, quoted
from dmpipeline.handing import Handing
from dmpipeline.learned import Watch
from dmpipeline.store import Progress, Run

WAIT_FOR_WORKERS_SECONDS = 60.0
"""A cluster without workers is given up after so long."""

# Dask would have workers return every bit of memory, only to fault it in again, and watch what each thread does; and
# everybody look fifty times a second whether they are still awake, and twice at how the machine does. It would drop a
# worker for good that happens to be starting again 15 seconds after it was lost before.
_CONFIGURATION = {
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "10s",
    "distributed.deploy.lost-worker-timeout": "1000 days",
}


def train_on_cluster(
    run: Run,
    scheduler: Any,
    *,
    device: str = "cpu",
    method: Method | None = None,
    n_models: int | None = None,
    n_threads: int | None = None,
    wait_seconds: float | None = WAIT_FOR_WORKERS_SECONDS,
    progress: Progress | None = None,
) -> None:
    """Train and store the blocks that are missing, then write the catalog.

    Parameters
    ----------
    run : Run
    scheduler : str or cluster
        Address of a Dask scheduler, as ``tcp://host:8786``, or what `local_cluster` yields.
    device : str
        As torch names it, on the workers.
    method, n_models
        How to train, as for `Run.find_way`, which is asked on a worker.
    n_threads : int, optional
        Cores for each worker; otherwise as many as Dask gives it threads. It works best with two threads or more: one
        block is stored while the next is trained.
    wait_seconds : float, optional
        How long there may be no workers, at first or later; None: as long as it takes.
    progress : callable, optional
        Called with (rows done, rows in all) at the start and after each block.

    Raises
    ------
    TrainingError
        If blocks failed, each named by its `rows`; others were trained meanwhile, until
        `handing.MOST_FAILED_BLOCKS` had.
    ClusterError
        If the cluster is lost on the way, or has no workers.
    RunError, SpecError
        If a worker does not find the run, has other code, or as `Run.train`.
    DmdataError
        If Dask is not installed, or no scheduler answers.
    """
    report = progress or (lambda *_: None)
    report(run.n_rows_done, run.spec.n_rows)
    with run.presence() as lock, quiet(), _explained(scheduler), connect(scheduler) as client, client.as_current():
        # other workers than those that are there now may take part; each asks for itself whether it may
        phases.phase("waiting for workers")
        try:
            client.wait_for_workers(1, timeout=wait_seconds)
        except TimeoutError as error:
            raise ClusterError(
                f"the cluster at {scheduler} has no workers; start some with `dask worker`, then run the same again",
                scheduler=str(scheduler),
            ) from error
        order: worker.Order = {
            "path": str(run.path),
            "spec": run.spec.to_yaml(),
            "device": device,
            "n_threads": n_threads,
        }
        order |= {"versions": worker.code_versions(), "method": method, "n_models": n_models}
        order |= {"folder": os.getcwd()}
        phases.phase("finding the fastest way to train, on a worker")
        order["way"] = client.submit(worker.settle, order, pure=False).result()
        handing, watch = Handing(run, client, order, wait_seconds), Watch(run)
        phases.phase(f"first block of {len(run.spec.blocks) - len(directory.done_blocks(run.path))}")
        if (listener := phases.heard_by()) is not None:
            client.subscribe_topic(worker.PROGRESS_TOPIC, lambda event: listener.advance(event[1]))
        try:
            for n_done in handing.until_done():
                phases.phase("")
                watch.look()
                report(n_done, run.spec.n_rows)
        finally:
            if handing.sessions:
                run.record_sessions(lock, list(handing.sessions.values()))
    if handing.failed:
        raise _failure(run, handing.failed)
    report(run.n_rows_done, run.spec.n_rows)
    run.write_catalog()


@contextlib.contextmanager
def local_cluster(n_workers: int, *, device: str = "cpu") -> Iterator[Any]:
    """Run a Dask cluster of processes on this machine, while the block runs; they end with this process at the latest.

    Processes import the script that starts them, so there it belongs under ``if __name__ == "__main__":``.

    Parameters
    ----------
    n_workers : int
    device : str
        On ``cuda``, workers take turns in having one of the GPUs to themselves.

    Raises
    ------
    DmdataError
        If Dask is not installed.
    """
    distributed = dask_distributed()
    environments: list[dict[str, str]] = [{}] * n_workers
    if device == "cuda":
        gpus = visible_gpus()
        environments = [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(n_workers)] if gpus else []
        if not gpus:
            raise SpecError("device 'cuda' cannot be used: there is no GPU; choose cpu", field="device", value=device)
    # every port is one that is free, and heard on this machine alone
    where = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    options = where | {
        "nthreads": max(2, available_threads() // n_workers),
        "memory_limit": 0,
        "silence_logs": "CRITICAL",
    }
    # a block that kills two workers is looked into
    scheduler = {"cls": distributed.Scheduler, "options": where | {"port": 0, "allowed_failures": 1}}
    workers = {
        number: {"cls": distributed.Nanny, "options": options | {"env": environment}}
        for number, environment in enumerate(environments)
    }
    cluster = None
    with quiet(), importlib.import_module("dask.config").set(_CONFIGURATION):
        try:
            with _without_interrupts():
                cluster = distributed.SpecCluster(scheduler=scheduler, workers=workers)
            yield cluster
        finally:
            if cluster is not None:
                cluster.close(timeout=30)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Keep Ctrl-C, which a terminal sends to all, from processes that are started meanwhile, and for so long from this.

    Raises
    ------
    KeyboardInterrupt
        At the end, if it was pressed.
    """
    is_pressed, is_main = threading.Event(), threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda *_: is_pressed.set()) if is_main else None
    # multiprocessing's own helper, which lets interrupts through again when it is started
    resource_tracker.ensure_running()
    # threads and processes begin with the mask of the thread that starts them
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if is_main:
            signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    if is_pressed.is_set():
        raise KeyboardInterrupt


def visible_gpus() -> list[str]:
    """Name the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` does."""
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    n_gpus = torch.cuda.device_count()
    return names[:n_gpus] if names else [str(number) for number in range(n_gpus)]


def _failure(run: Run, failed: set[int]) -> TrainingError:
    blocks = [run.spec.blocks[block] for block in sorted(failed)]
    *frames, cause = directory.cause_of_failure(run.failures().get(min(failed), "")).splitlines() or [""]
    ranges = ", ".join(f"{rows.start} to {rows.stop - 1}" for rows in blocks)
    return TrainingError(
        f"rows {ranges} of {run.path} could not be trained{cause and f' ({cause})'}; see all of it with `dmpipeline "
        f"status -v {quoted(run.path)}`",
        rows=[row for rows in blocks for row in rows],
        frames="".join(f"{line}\n" for line in frames),
    )


@contextlib.contextmanager
def _explained(scheduler: Any) -> Iterator[None]:
    """Turn what a client raises that has lost its scheduler into a `ClusterError`."""
    try:
        yield
    except (CancelledError, OSError, TimeoutError) as error:
        if isinstance(error, FactualError | BrokenPipeError):
            raise
        address = getattr(scheduler, "scheduler_address", scheduler)
        raise ClusterError(
            f"the cluster at {address} was lost ({type(error).__name__}); what its workers finished is stored: start "
            "it again, and run the same again to go on",
            scheduler=str(address),
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Dask from telling of lost workers and connections what is said here in other words."""
    dask_distributed()  # which says how loud its loggers are when it is imported
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "distributed"]
    loggers = [] if logging.root.isEnabledFor(logging.DEBUG) else [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    loops = logging.getLogger("asyncio")
    loops.addFilter(_is_no_wait_that_ended)
    try:
        yield
    finally:
        loops.removeFilter(_is_no_wait_that_ended)
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _is_no_wait_that_ended(record: logging.LogRecord) -> bool:
    """Tell what is worth a word of what asyncio logs: Dask stops waiting for what a dead worker had by an error."""
    error = record.exc_info[1] if record.exc_info else None
    return type(error).__name__ != "AllExit"
