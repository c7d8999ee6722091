"""Train a run on a Dask cluster, on this machine or anywhere that sees the run's directory under the same path.

What is done is what the store says, never what the scheduler says: a task is one block, which a worker trains and
stores as `Run.train` does, and a task that is lost, done twice or done too late does no harm. How models are trained is
settled on a worker and put on record before the first block goes out, so all workers train rows to the same bits; one
that has other code or other versions refuses.

A block that another process has claimed is looked at again later. One that takes much longer than others, because its
worker is stopped, hung or out of reach, is given to another worker as well, which heeds no claim: a claim only saves
work. It is safe to have a block trained by two, even at once, because a row depends on nothing but its draws, so both
write the same bytes; each chunk is a file that is written beside its place and moved there; and whoever writes a
block's digest has written all of its data before.
"""

import contextlib
import hashlib
import importlib
import logging
import os
import platform
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch

from dmdata.cluster import connect, dask_distributed
from dmdata.errors import FactualError
from dmpipeline import directory
from dmpipeline.directory import claimed, done_blocks
from dmpipeline.ensembles import Method
from dmpipeline.errors import ClusterError, RunError, SpecError, TrainingError
from dmpipeline.store import Progress, Run, Trainer
from dmpipeline.train import Way

MOST_FAILED_BLOCKS = 3
"""So many blocks may fail before nothing more is handed out."""

LEAST_PATIENCE_SECONDS = 15.0
"""No block is given to a second worker sooner."""

WAIT_FOR_WORKERS_SECONDS = 60.0
"""A cluster without workers is given up after so long."""

_PATIENCE_IN_MEDIANS = 3
_PATIENCE_AT_FIRST_SECONDS = 120.0  # while no block has come back that would tell how long one takes
_LOOK_AGAIN_SECONDS = 1.0

# Dask would have workers return every bit of memory, only to fault it in again, and watch what each thread does.
_CONFIGURATION = {
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,
    "distributed.worker.profile.enabled": False,
}

Order = dict[str, Any]
"""What a worker is told: plain values, so that one with other code understands enough to refuse."""


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
        Cores for each worker; otherwise as many as Dask gives it threads.
    wait_seconds : float, optional
        How long there may be no workers, at first or later; None: as long as it takes.
    progress : callable, optional
        Called with (rows done, rows in all) at the start and after each block.

    Raises
    ------
    TrainingError
        If blocks failed, each named by its `rows`; others were trained meanwhile, until `MOST_FAILED_BLOCKS` had.
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
        try:
            client.wait_for_workers(1, timeout=wait_seconds)
        except TimeoutError as error:
            raise ClusterError(
                f"the cluster at {scheduler} has no workers; start some with `dask worker`, then run the same again",
                scheduler=str(scheduler),
            ) from error
        order: Order = {"path": str(run.path), "spec": run.spec.to_yaml(), "device": device, "n_threads": n_threads}
        order |= {"versions": code_versions(), "method": method, "n_models": n_models}
        order["way"] = client.submit(_settle_there, order, pure=False).result()
        handing = _Handing(run, client, order, wait_seconds)
        try:
            for n_done in handing.until_done():
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
    options = where | {"nthreads": 1, "memory_limit": 0, "silence_logs": "CRITICAL"}
    # a block that kills its workers again and again is given up
    scheduler = {"cls": distributed.Scheduler, "options": where | {"port": 0, "allowed_failures": 2}}
    workers = {
        number: {"cls": distributed.Nanny, "options": options | {"env": environment}}
        for number, environment in enumerate(environments)
    }
    cluster = None
    with quiet():
        try:
            # which workers get when they are specified, and keep
            with _without_interrupts(), importlib.import_module("dask.config").set(_CONFIGURATION):
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


@cache
def code_versions() -> dict[str, str]:
    """Say what must be the same wherever one run's rows are trained; dmpipeline by a digest of its source files."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    versions = {name: metadata.version(name) for name in ("dmdata", "numpy", "torch")}
    python = ".".join(platform.python_version_tuple()[:2])
    return {"dmpipeline": digest.hexdigest()[:16], **versions, "python": python}


@dataclass(slots=True)
class _Task:
    """One handing out of a block."""

    block: int
    since: float
    is_overdue: bool = False


@dataclass(slots=True)
class _Handing:
    """Hands out a run's missing blocks, one a worker, until all are done or too many failed."""

    run: Run
    client: Any
    order: Order
    wait_seconds: float | None
    sessions: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    _waiting: deque[int] = field(default_factory=deque)
    _left: set[int] = field(default_factory=set)
    _out: dict[Any, _Task] = field(default_factory=dict)
    _claimed_since: dict[int, float] = field(default_factory=dict)
    _looked_at: dict[int, float] = field(default_factory=dict)
    _seconds: list[float] = field(default_factory=list)
    _late_workers: set[str] = field(default_factory=set)
    _workers_seen: float = field(default_factory=time.monotonic)

    def until_done(self) -> Iterator[int]:
        """Yield the count of rows done each time that it grew."""
        blocks = self.run.spec.blocks
        self._left = set(range(len(blocks))).difference(done_blocks(self.run.path))
        self._waiting = deque(sorted(self._left))
        n_done = self.run.spec.n_rows - sum(len(blocks[block]) for block in self._left)
        try:
            while self._left and len(self.failed) < MOST_FAILED_BLOCKS:
                self._hand_out()
                for block in self._take_back():
                    n_done += len(blocks[block])
                    yield n_done
        finally:
            with contextlib.suppress(OSError, TimeoutError, CancelledError):  # as when the scheduler is lost
                self.client.cancel(list(self._out))

    def _hand_out(self) -> None:
        workers = set(self.client.nthreads())
        self._require_workers(workers)
        self._late_workers &= workers
        n_free = len(workers - self._late_workers) - sum(not task.is_overdue for task in self._out.values())
        while n_free > 0 and self._waiting:
            self._submit(self._waiting.popleft())
            n_free -= 1
        if n_free > 0:
            self._see_who_is_late()
            for block in self._to_do_again()[:n_free]:
                is_stuck = block not in self._claimed_since or self._is_late(self._claimed_since[block])
                self._looked_at[block] = time.monotonic()
                self._submit(block, heeds_claims=not is_stuck)

    def _require_workers(self, workers: set[str]) -> None:
        now = time.monotonic()
        if workers:
            self._workers_seen = now
        elif self.wait_seconds is not None and now - self._workers_seen > self.wait_seconds:
            raise ClusterError(
                f"the cluster has had no workers for {self.wait_seconds:.0f} s; what they finished is stored: start "
                "some with `dask worker`, then run the same again to go on",
                scheduler=str(self.client.scheduler.address),
            )

    def _submit(self, block: int, *, heeds_claims: bool = True) -> None:
        order = self.order | {"block": block, "heeds_claims": heeds_claims}
        good = sorted(set(self.client.nthreads()) - self._late_workers) if self._late_workers else None
        where = {"workers": good, "allow_other_workers": True} if good else {}
        future = self.client.submit(_train_there, order, pure=False, **where)
        self._out[future] = _Task(block, time.monotonic())

    def _see_who_is_late(self) -> None:
        late = [task for task in self._out.values() if not task.is_overdue and self._is_late(task.since)]
        if not late:
            return
        for task in late:
            task.is_overdue = True
        keys = {future.key for future, task in self._out.items() if task.is_overdue}
        for worker, processing in self.client.processing().items():
            if keys.intersection(processing):
                self._late_workers.add(worker)

    def _to_do_again(self) -> list[int]:
        """Blocks that late workers have, and those that another process had claimed when last looked at."""
        in_good_hands = {task.block for task in self._out.values() if not task.is_overdue}
        again = self._left - in_good_hands - self.failed
        now = time.monotonic()
        return sorted(b for b in again if now - self._looked_at.get(b, -_LOOK_AGAIN_SECONDS) >= _LOOK_AGAIN_SECONDS)

    def _is_late(self, since: float) -> bool:
        patience = _PATIENCE_AT_FIRST_SECONDS
        if self._seconds:
            patience = max(LEAST_PATIENCE_SECONDS, _PATIENCE_IN_MEDIANS * statistics.median(self._seconds))
        return time.monotonic() - since > patience

    def _take_back(self) -> Iterator[int]:
        """Wait a moment for tasks to end; yield blocks that are done."""
        if not self._out:
            time.sleep(_LOOK_AGAIN_SECONDS)
            return
        with contextlib.suppress(TimeoutError):
            dask_distributed().wait(list(self._out), timeout=_LOOK_AGAIN_SECONDS, return_when="FIRST_COMPLETED")
        for future in [future for future in self._out if future.done()]:
            task = self._out.pop(future, None)
            if task is not None and task.block in self._left and self._has_done(future, task):
                self._left.discard(task.block)
                # whoever else has it is not waited for
                for other in [other for other, its in self._out.items() if its.block == task.block]:
                    del self._out[other]
                yield task.block

    def _has_done(self, future: Any, task: _Task) -> bool:
        try:
            outcome = future.result()
        except dask_distributed().scheduler.KilledWorker:
            rows = self.run.spec.blocks[task.block]
            lost = TrainingError("every worker that trained it died; see their logs for what killed them")
            directory.record_failure(self.run.path, task.block, rows, lost)
            self._give_up(task.block)
            return False
        self._late_workers.discard(outcome["worker"])
        match outcome["state"]:
            case "claimed":
                self._claimed_since.setdefault(task.block, time.monotonic())
                return False
            case "failed":
                self._give_up(task.block)
                return False
        if session := outcome["session"]:
            self._seconds.append(session["seconds"])
            of_worker = self.sessions.setdefault(outcome["worker"], session | {"seconds": 0.0, "n_rows": 0})
            of_worker["seconds"] = round(of_worker["seconds"] + session["seconds"], 3)
            of_worker["n_rows"] += session["n_rows"]
        return True

    def _give_up(self, block: int) -> None:
        self.failed.add(block)
        self._left.discard(block)


@dataclass(frozen=True, slots=True)
class _Opened:
    """What a worker process keeps between tasks: datasets take long to load."""

    key: tuple[str, ...]
    run: Run
    trainer: Trainer | None


# A run's locks belong to a process, so its threads take turns, whoever has sent the tasks.
_TURN = threading.Lock()
_opened: _Opened | None = None


def _settle_there(order: Order) -> dict[str, Any]:
    """Settle how models are trained, on a worker; return the `Way` as a dictionary."""
    _require_same_code(order)
    with _TURN:
        _take_cores(order)
        run, method, n_models = _run_there(order).run, order["method"], order["n_models"]
        way = run.find_way(order["device"], method, n_models) if method or n_models else None
        with run.presence() as lock:
            return asdict(run.trainer(order["device"], way, lock=lock).way)


def _train_there(order: Order) -> dict[str, Any]:
    """Train and store one block on a worker.

    Returns
    -------
    outcome : dict
        Its `state`: done, claimed by another process, or failed with its traceback on record; the `worker`; and the
        `session`, None if the block was found done.
    """
    _require_same_code(order)
    with _TURN:
        _take_cores(order)
        run, trainer = _trainer_there(order)
        outcome = {"state": "done", "worker": _worker_address(), "session": None}
        block = order["block"]
        began, clock = directory.now(), time.monotonic()
        with run.presence() as lock, claimed(lock, block, wait=False) as is_ours:
            if run.is_done(block):
                return outcome
            if not is_ours and order["heeds_claims"]:
                return outcome | {"state": "claimed"}
            try:
                run.train_block(trainer, block)
            except (RunError, SpecError):
                raise  # no other block would fare better here
            except Exception:  # noqa: BLE001 - a user's own code may raise anything, which may not even pickle
                return outcome | {"state": "failed"}
        seconds = time.monotonic() - clock
        n_rows = len(run.spec.blocks[block])
        return outcome | {"session": directory.session(began, seconds, n_rows, trainer.way, order["device"])}


def _trainer_there(order: Order) -> tuple[Run, Trainer]:
    global _opened
    opened = _run_there(order)
    trainer = opened.trainer or opened.run.trainer(order["device"], Way(**order["way"]))
    _opened = _Opened(opened.key, opened.run, trainer)
    return opened.run, trainer


def _run_there(order: Order) -> _Opened:
    global _opened
    key = tuple(str(order.get(name)) for name in ("path", "spec", "device", "way"))
    if _opened is None or _opened.key != key:
        if not (Path(order["path"]) / "run.yaml").exists():
            raise RunError(
                f"{platform.node()} does not find the run at {order['path']}; workers must see it under the same "
                "path: put it on a disk that all share, and name it by the path it has there",
                path=order["path"],
                host=platform.node(),
            )
        _opened = _Opened(key, Run.open(order["path"]), None)
    return _opened


def _require_same_code(order: Order) -> None:
    ours, theirs = code_versions(), order["versions"]
    if differing := {name: (ours.get(name), wanted) for name, wanted in theirs.items() if ours.get(name) != wanted}:
        said = "; ".join(f"{name} {here} there, {wanted} here" for name, (here, wanted) in differing.items())
        raise RunError(
            f"the worker on {platform.node()} has other code than whoever started the run ({said}), and might train "
            "other rows; install the same versions there, restart it, and run the same again",
            host=platform.node(),
            versions=differing,
        )


def _take_cores(order: Order) -> None:
    """Have torch use all cores that are this worker's; the number belongs to the thread."""
    torch.set_num_threads(order["n_threads"] or dask_distributed().get_worker().state.nthreads)


def _worker_address() -> str:
    return str(dask_distributed().get_worker().address)


def _failure(run: Run, failed: set[int]) -> TrainingError:
    blocks = [run.spec.blocks[block] for block in sorted(failed)]
    ranges = ", ".join(f"{rows.start} to {rows.stop - 1}" for rows in blocks)
    return TrainingError(
        f"rows {ranges} of {run.path} could not be trained; see why with `dmpipeline status -v {run.path}`, mend it, "
        "and run the same again",
        rows=[row for rows in blocks for row in rows],
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
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
