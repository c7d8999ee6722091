"""Train a run on a Dask cluster, on this machine or anywhere that sees the run's directory under the same path.

Dask starts one long task on each worker, which trains blocks that nobody else has claimed (see `runs.claims`) until
none is left. It knows nothing of blocks: what is done is what the store says.

How models are trained is settled on a worker and put on record before the first block, so all workers train rows to the
same bits; one that runs different code or versions refuses.
"""

import contextlib
import importlib
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from typing import Any

import torch

from dmdata import phases
from dmdata.copying.cluster import connect, dask_distributed
from dmdata.errors import FactualError
from dmdata.reading.long_work import shows_count
from dmpipeline.cluster import worker
from dmpipeline.compute import available_threads
from dmpipeline.errors import ClusterError, SpecError, TrainingError, quoted
from dmpipeline.runs import directory
from dmpipeline.runs.claims import LEASE_SECONDS, LOOK_AGAIN_SECONDS, MOST_DEATHS, Claims
from dmpipeline.runs.learned import Watch
from dmpipeline.runs.store import RowProgress, Run
from dmpipeline.training.ensembles import Method

WAIT_FOR_WORKERS_SECONDS = 60.0
"""How long a cluster may be without workers."""

# By default, workers return all memory that they free, only to request it again, and profile what each thread does;
# every process checks its event loop fifty times a second and the machine twice a second; and a worker is dropped for
# good if it is still restarting 15 seconds after it was lost.
_CONFIGURATION = {
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "10s",
    "distributed.deploy.lost-worker-timeout": "1000 days",
}


@shows_count("training", "models")
def train_on_cluster(
    run: Run,
    scheduler: Any,
    *,
    device: str = "cpu",
    method: Method | None = None,
    n_models: int | None = None,
    n_threads: int | None = None,
    wait_seconds: float | None = WAIT_FOR_WORKERS_SECONDS,
    lease_seconds: float = LEASE_SECONDS,
    turn_seconds: float = worker.TURN_SECONDS,
    progress: RowProgress | None = None,
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
        Cores for each worker; otherwise as many as Dask gives it threads.
    wait_seconds : float, optional
        How long there may be no workers, at first or later; None: as long as it takes.
    lease_seconds : float
        How long a worker may be stopped before others train its blocks.
    turn_seconds : float
        See `worker.TURN_SECONDS`.
    progress : callable, optional
        Called with (rows done, rows in total) at the start and when more rows are done.

    Raises
    ------
    TrainingError
        If blocks failed; `rows` lists theirs. Others were trained meanwhile, until `claims.MOST_FAILED_BLOCKS` had
        failed. Or if a worker could not prepare to train.
    ClusterError
        If the cluster is lost, has no workers, or they die before they train anything.
    RunError, SpecError
        If a worker does not find the run, runs different code, or as `Run.train`.
    DmdataError
        If Dask is not installed, or no scheduler answers.
    """
    report = progress or (lambda *_: None)
    report(run.n_rows_done, run.spec.n_rows)
    with run.presence() as lock, quiet(), _explained(scheduler), connect(scheduler) as client, client.as_current():
        # workers may join later; each checks for itself whether it has the same code
        phases.phase("waiting for workers")
        try:
            client.wait_for_workers(1, timeout=wait_seconds)
        except TimeoutError as error:
            raise ClusterError(
                f"the cluster at {scheduler} has no workers; start some with `dask worker`, then run the same "
                "command again",
                scheduler=str(scheduler),
            ) from error
        order: worker.Order = {
            "path": str(run.path),
            "spec": run.spec.to_yaml(),
            "device": device,
            "n_threads": n_threads,
        }
        order |= {"versions": worker.code_versions(), "method": method, "n_models": n_models}
        order |= {"folder": os.getcwd(), "command": uuid.uuid4().hex}
        order |= {"lease_seconds": lease_seconds, "turn_seconds": turn_seconds}
        phases.phase("finding the fastest way to train, on a worker")
        try:
            order["way"] = client.submit(worker.settle, order, pure=False).result()
        except dask_distributed().scheduler.KilledWorker as error:
            raise _workers_die(scheduler) from error
        claims, watch = Claims(run.path, run.spec.blocks, lock, order["command"], carries_on=True), Watch(run)
        phases.phase(f"first block of {len(run.spec.blocks) - len(directory.done_blocks(run.path))}")
        sessions = _Sessions(phases.heard_by())
        client.subscribe_topic(worker.topic(order), sessions.hear)
        n_before = n_reported = n_done = run.n_rows_done
        try:
            for n_done in _until_done(run, client, order, claims, wait_seconds):
                if n_done != n_reported:
                    n_reported = n_done
                    phases.phase("")
                    watch.look()
                    report(n_done, run.spec.n_rows)
        finally:
            sessions.wait_for(n_done - n_before)
            failed = claims.failed() - directory.done_blocks(run.path).keys()
            claims.clear(directory.done_blocks(run.path))
            if sessions.of_workers:
                run.record_sessions(lock, list(sessions.of_workers.values()))
    if failed:
        raise _failure(run, failed)
    report(run.n_rows_done, run.spec.n_rows)
    run.write_catalog()


@dataclass(frozen=True, slots=True)
class _Sessions:
    """What workers report: what each has trained, by its address; see `directory.session`."""

    listener: phases.Listener | None
    of_workers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def hear(self, event: tuple[float, dict[str, Any]]) -> None:
        """Take in one event of `worker.topic`."""
        _, said = event
        if "session" in said:
            session = said["session"]
            total = self.of_workers.setdefault(said["worker"], session | {"seconds": 0.0, "n_rows": 0})
            total["seconds"] = round(total["seconds"] + session["seconds"], 3)
            total["n_rows"] += session["n_rows"]
        elif self.listener is not None:
            self.listener.advance(said["models"])

    def wait_for(self, n_rows: int) -> None:
        """Wait a moment for reports on the way; not all come where workers died or other processes trained, too."""
        end = time.monotonic() + LOOK_AGAIN_SECONDS
        while sum(each["n_rows"] for each in tuple(self.of_workers.values())) < n_rows and time.monotonic() < end:
            time.sleep(0.01)


def _until_done(
    run: Run, client: Any, order: worker.Order, claims: Claims, wait_seconds: float | None
) -> Iterator[int]:
    """Keep every worker training until all is done or too many blocks failed; yield how many rows are done.

    Raises
    ------
    ClusterError
        If there have been no workers for too long, or those that there are die before they train anything.
    Exception
        Whatever a worker raised: no block can be trained.
    """
    tasks, workers_seen = dict[str, Any](), time.monotonic()
    deaths, n_ended, n_killed, n_before = _Deaths(claims), 0, 0, -1
    try:
        while True:
            began = time.monotonic()
            done, failed, n_done = directory.done_blocks(run.path), claims.failed(), run.n_rows_done
            yield n_done
            if claims.is_hopeless() or len(failed | done.keys()) == len(run.spec.blocks):
                return
            now, workers = time.monotonic(), set(client.nthreads())
            if workers:
                workers_seen = now
            elif wait_seconds is not None and now - workers_seen > wait_seconds:
                raise ClusterError(
                    f"the cluster has had no workers for {wait_seconds:.0f} s; what they finished is stored: start "
                    "some with `dask worker`, then run the same command again to resume",
                    scheduler=str(client.scheduler.address),
                )
            lost = tasks.keys() - workers
            for address in lost:
                del tasks[address]
            if deaths.are_too_many(len(lost) + n_killed, n_done):
                raise _workers_die(client.scheduler.address)
            if n_ended and n_done == n_before:  # a worker sees sooner than this process that all is stored
                time.sleep(LOOK_AGAIN_SECONDS)
            n_before = n_done
            for address in workers - tasks.keys():
                its = order | {"n_workers": len(workers)}
                tasks[address] = client.submit(worker.train, its, workers=[address], pure=False)
            # a large run takes long to look at
            n_ended, n_killed = _wait_for_one(tasks, max(LOOK_AGAIN_SECONDS, 10 * (now - began)))
    finally:
        with contextlib.suppress(OSError, TimeoutError, CancelledError):  # as when the scheduler is lost
            client.cancel(list(tasks.values()))


@dataclass(slots=True)
class _Deaths:
    """Counts workers that were lost with a task while nobody trained anything: they died loading data or code."""

    claims: Claims
    n: int = 0
    n_done: int = -1
    begun: dict[int, str] = field(default_factory=dict)

    def are_too_many(self, n_more: int, n_done: int) -> bool:
        """Count some more; return whether no row was stored, no block begun and none in work, for too many."""
        begun = self.claims.begun()
        if (n_done, begun) != (self.n_done, self.begun) or any(map(self.claims.is_held, begun)):
            self.n, self.n_done, self.begun = 0, n_done, begun
            return False
        self.n += n_more
        return self.n >= MOST_DEATHS


def _workers_die(scheduler: Any) -> ClusterError:
    address = getattr(scheduler, "scheduler_address", scheduler)
    return ClusterError(
        f"workers of the cluster at {address} die before they train anything, as while they load the dataset or import "
        "your code; see their logs for what killed them, such as too little memory, then run the same command again",
        scheduler=str(address),
    )


def _wait_for_one(tasks: dict[str, Any], seconds: float) -> tuple[int, int]:
    """Wait until a task has ended, at most `seconds`; remove those that have, and raise their errors.

    Returns
    -------
    n_ended, n_killed : int
        How many have ended, and how many of them because workers died.
    """
    n_ended = n_killed = 0
    if not tasks:
        time.sleep(seconds)
        return n_ended, n_killed
    distributed = dask_distributed()
    with contextlib.suppress(TimeoutError):
        distributed.wait(list(tasks.values()), timeout=seconds, return_when="FIRST_COMPLETED")
    for address, task in list(tasks.items()):
        if task.status == "pending":
            continue
        del tasks[address]
        n_ended += 1
        if task.status in ("error", "cancelled"):
            # a worker that died with it is no error: its claims ended
            try:
                task.result()
            except distributed.scheduler.KilledWorker:
                n_killed += 1
    return n_ended, n_killed


@contextlib.contextmanager
def local_cluster(n_workers: int, *, device: str = "cpu") -> Iterator[Any]:
    """Run a Dask cluster of processes on this machine while the block runs; they end with this process at the latest.

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
    # any free port, reachable from this machine only
    where = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    options = where | {
        "nthreads": max(2, available_threads() // n_workers),
        "memory_limit": 0,
        "silence_logs": "CRITICAL",
    }
    scheduler = {"cls": distributed.Scheduler, "options": where | {"port": 0}}
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
    """Keep Ctrl-C, which a terminal sends to all its processes, from those that the block starts; defer it in this one.

    Raises
    ------
    KeyboardInterrupt
        At the end, if Ctrl-C was pressed.
    """
    is_pressed, is_main = threading.Event(), threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda *_: is_pressed.set()) if is_main else None
    # started first, because starting it unblocks interrupts
    resource_tracker.ensure_running()
    # threads and processes inherit the mask of the thread that starts them
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
    """Return the names of the GPUs that this process may use, as in ``CUDA_VISIBLE_DEVICES``."""
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
    """Raise a `ClusterError` for what a client raises that has lost its scheduler."""
    try:
        yield
    except (CancelledError, OSError, TimeoutError) as error:
        if isinstance(error, FactualError | BrokenPipeError):
            raise
        address = getattr(scheduler, "scheduler_address", scheduler)
        raise ClusterError(
            f"the cluster at {address} was lost ({type(error).__name__}); what its workers finished is stored: start "
            "it again, and run the same command again to resume",
            scheduler=str(address),
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Dask from logging lost workers and connections, which are reported here in other words."""
    dask_distributed()  # its import sets the levels of its loggers
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
    """Filter what asyncio logs: Dask raises an error to stop waiting for what a dead worker had."""
    error = record.exc_info[1] if record.exc_info else None
    return type(error).__name__ != "AllExit"
