"""What a worker of a cluster does: settle how a run is trained, then train blocks of it until none is left.

All of it is done by one thread of the process, always the same, because what torch compiles for a GPU belongs to the
thread that first called it, and because claims lock out processes, not threads.
"""

import contextlib
import hashlib
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dmdata import phases
from dmdata.copying.cluster import dask_distributed
from dmdata.errors import FactualError
from dmpipeline.errors import RunError, TrainingError
from dmpipeline.models.usercode import look_in
from dmpipeline.runs import directory
from dmpipeline.runs.claims import LOOK_AGAIN_SECONDS, Claims, Observed
from dmpipeline.runs.preparation import Prepared
from dmpipeline.runs.store import Run
from dmpipeline.runs.training import RowTrainer, presence
from dmpipeline.training.train import Trainer, Way

TURN_SECONDS = 60.0
"""A worker trains blocks of one command for this long; then another command that uses the same cluster has its turn."""

Order = dict[str, Any]
"""What a worker is to do, in plain values, so that one with different code understands enough to refuse."""

_LOOK_WHETHER_WANTED_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class _Opened:
    """What a worker process keeps between tasks: datasets take long to load."""

    key: tuple[str, ...]
    prepared: Prepared
    way: Order | None = None
    trainer: Trainer | None = None
    observed: Observed = field(default_factory=Observed)


_alone = ThreadPoolExecutor(1)
_opened: _Opened | None = None


def topic(order: Order) -> str:
    """Name the Dask events by which workers report to a command: {"models": how many more} or {"session": ...}."""
    return f"dmpipeline-{order['command']}"


def settle(order: Order) -> dict[str, Any]:
    """Settle how models are trained; return the `Way` as a dictionary.

    Raises
    ------
    RunError
        If this worker does not find the run, or runs different code.
    SpecError
        If models cannot be trained so.
    TrainingError
        If anything else goes wrong.
    """
    _require_same_code(order)
    with _explained():
        return _alone.submit(_settle, order, _n_cores(order)).result()


def train(order: Order) -> None:
    """Train blocks that nobody else has claimed, until none is left, the turn is over, or nobody waits for this task.

    A turn that is over begins no other block, but stores those it has begun; it has tried at least one. Sessions are
    reported block by block, so that none is lost with the process.

    Raises
    ------
    RunError, SpecError
        As `settle`; or if no block can be trained, as for `Run.train`.
    TrainingError
        If anything else goes wrong outside of a block.
    """
    _require_same_code(order)
    worker = dask_distributed().get_worker()
    task = _Task(worker, worker.get_current_task(), topic(order))
    with _explained():
        _alone.submit(_train, order, _n_cores(order), task).result()


@cache
def code_versions() -> dict[str, str]:
    """Return what must be the same wherever rows of a run are trained; of dmpipeline, a digest of its source files."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package).as_posix()} {file.stat().st_size}\n".encode() + file.read_bytes())
    versions = {name: directory.versions().get(name, "") for name in ("dmdata", "numpy", "torch")}
    python = ".".join(platform.python_version_tuple()[:2])
    return {"dmpipeline": digest.hexdigest()[:16], **versions, "python": python}


def _settle(order: Order, n_cores: int) -> dict[str, Any]:
    torch.set_num_threads(n_cores)
    prepared, device, method, n_models = _open(order).prepared, order["device"], order["method"], order["n_models"]
    way = prepared.find_way(device, method, n_models) if method or n_models else None
    with presence(prepared.run) as lock:
        return asdict(prepared.trainer(device, way, lock=lock).way)


@dataclass(frozen=True, slots=True)
class _Task:
    """The task that Dask has this process run; reports to the command that waits for it, as a `phases.Listener`."""

    worker: Any
    key: str
    topic: str

    def phase(self, text: str) -> None:
        """Report nothing: what one of many workers is doing is not shown."""

    def advance(self, amount: float) -> None:
        """Report how many more models are trained."""
        self.worker.log_event(self.topic, {"models": amount})

    def stored(self, session: dict[str, Any]) -> None:
        """Report what has been trained and stored."""
        self.worker.log_event(self.topic, {"session": session, "worker": self.worker.address})

    def is_wanted(self) -> bool:
        """Return whether the command still waits for the task, and the worker is not being closed."""
        task = self.worker.state.tasks.get(self.key)
        return task is not None and task.state == "executing" and self.worker.status.name == "running"

    def wait(self, seconds: float) -> None:
        """Wait, but no longer than the task is wanted."""
        end = time.monotonic() + seconds
        while self.is_wanted() and time.monotonic() < end:
            time.sleep(_LOOK_WHETHER_WANTED_SECONDS)


def _train(order: Order, n_cores: int, task: _Task) -> None:
    if not task.is_wanted():
        return
    opened, trainer = _trainer(order, n_cores)
    run, end, is_over = opened.prepared.run, time.monotonic() + order["turn_seconds"], False
    with phases.listening(task), presence(run) as lock:
        how = {"carries_on": True, "lease_seconds": order["lease_seconds"], "observed": opened.observed}
        claims = Claims(run.path, run.spec.blocks, lock, order["command"], **how)
        session, clock = directory.session(directory.now(), 0.0, 0, trainer.way, order["device"]), time.monotonic()
        taking = {"may_start": lambda: not is_over, "n_others": order["n_workers"] - 1}
        with contextlib.closing(RowTrainer(run, trainer).missing(claims, **taking)) as blocks:
            for n_rows in blocks:
                if n_rows is None:
                    task.wait(LOOK_AGAIN_SECONDS)
                elif n_rows:
                    task.stored(session | {"seconds": time.monotonic() - clock, "n_rows": n_rows})
                clock = time.monotonic()
                is_over = clock > end
                if not task.is_wanted():
                    return


def _trainer(order: Order, n_cores: int) -> tuple[_Opened, Trainer]:
    global _opened
    torch.set_num_threads(n_cores)
    opened = _open(order)
    way, trainer = order["way"], opened.trainer
    if trainer is None or opened.way != way:
        trainer = opened.prepared.trainer(order["device"], Way(**way))
        _opened = opened = replace(opened, way=way, trainer=trainer)
    return opened, trainer


def _open(order: Order) -> _Opened:
    global _opened
    key = tuple(str(order.get(name)) for name in ("path", "spec", "device"))
    if _opened is None or _opened.key != key:
        if not (Path(order["path"]) / "run.yaml").exists():
            raise RunError(
                f"{platform.node()} does not find the run at {order['path']}; workers must see it under the same "
                "path: put it on a disk that all share, and name it by the path it has there",
                path=order["path"],
                host=platform.node(),
            )
        look_in(order["folder"])
        _opened = _Opened(key, Prepared.of(Run.open(order["path"])))
    return _opened


def _require_same_code(order: Order) -> None:
    ours, theirs = code_versions(), order["versions"]
    if differing := {name: (ours.get(name), wanted) for name, wanted in theirs.items() if ours.get(name) != wanted}:
        said = "; ".join(f"{name} {here} there, {wanted} here" for name, (here, wanted) in differing.items())
        raise RunError(
            f"the worker on {platform.node()} runs different code from the process that started the run ({said}), and "
            "could train different rows; install the same versions there, restart it, and run the same command again",
            host=platform.node(),
            versions=differing,
        )


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Raise a `TrainingError` for an error that is not ours: the command could take it for one of its connection."""
    try:
        yield
    except FactualError:
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise TrainingError(f"the worker on {platform.node()} failed ({cause}); its log tells more") from error


def _n_cores(order: Order) -> int:
    return int(order["n_threads"] or dask_distributed().get_worker().state.nthreads)
