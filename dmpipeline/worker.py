"""What a worker of a cluster does: settle how a run is trained, and train and store the blocks that it is told to.

Of a run that threads train, a worker may be told several blocks at a time: while one is stored, its threads train the
next. Whatever else there is to do is done by one thread of the process, always the same, for what torch compiles for a
GPU belongs to the thread that first called it.
"""

import hashlib
import platform
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dmdata import phases
from dmdata.cluster import dask_distributed
from dmpipeline import directory
from dmpipeline.compute import Shared
from dmpipeline.directory import claimed
from dmpipeline.errors import RunError, SpecError
from dmpipeline.store import Run
from dmpipeline.train import Trainer, Way
from dmpipeline.usercode import look_in

PROGRESS_TOPIC = "dmpipeline-progress"
"""Topic of Dask events by which workers say how much more of their blocks they have trained, in models."""

Order = dict[str, Any]
"""What a worker is told: plain values, so that one with other code understands enough to refuse."""


@dataclass(frozen=True, slots=True)
class _Opened:
    """What a worker process keeps between tasks: datasets take long to load."""

    key: tuple[str, ...]
    run: Run
    presence: Shared[Any]
    trainer: Trainer | None


_alone = ThreadPoolExecutor(1)
_opened: _Opened | None = None
_clock, _last_stored = threading.Lock(), 0.0


def settle(order: Order) -> dict[str, Any]:
    """Settle how models are trained; return the `Way` as a dictionary.

    Raises
    ------
    RunError
        If this worker does not find the run, or has other code.
    SpecError
        If models cannot be trained so.
    """
    _require_same_code(order)
    return _alone.submit(_settle, order, _n_cores(order)).result()


def train(order: Order) -> dict[str, Any]:
    """Train and store one block.

    Returns
    -------
    outcome : dict
        Its `state`: done, claimed by another process, or failed with its traceback on record; the `worker`; and the
        `session`, None if the block was found done.

    Raises
    ------
    RunError, SpecError
        As `settle`.
    """
    _require_same_code(order)
    n_cores = _n_cores(order)
    opened, trainer = _alone.submit(_trainer, order, n_cores).result()
    here = dask_distributed().get_worker()
    listener = _Reporter(here)
    if trainer.n_ahead > 1:
        torch.set_num_threads(n_cores)
        outcome = _train(order, opened, trainer, listener)
    else:
        outcome = _alone.submit(_train, order, opened, trainer, listener).result()
    return outcome | {"worker": str(here.address)}


@cache
def code_versions() -> dict[str, str]:
    """Say what must be the same wherever one run's rows are trained; dmpipeline by a digest of its source files."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    versions = {name: directory.versions().get(name, "") for name in ("dmdata", "numpy", "torch")}
    python = ".".join(platform.python_version_tuple()[:2])
    return {"dmpipeline": digest.hexdigest()[:16], **versions, "python": python}


def _settle(order: Order, n_cores: int) -> dict[str, Any]:
    torch.set_num_threads(n_cores)
    opened, method, n_models = _open(order), order["method"], order["n_models"]
    run = opened.run
    way = run.find_way(order["device"], method, n_models) if method or n_models else None
    with opened.presence() as lock:
        return asdict(run.trainer(order["device"], way, lock=lock).way)


@dataclass(frozen=True, slots=True)
class _Reporter:
    """Tells a cluster's clients how much more is trained."""

    worker: Any

    def phase(self, text: str) -> None:
        """Say nothing: what one of many workers does just now is not told."""

    def advance(self, amount: float) -> None:
        """Tell it."""
        self.worker.log_event(PROGRESS_TOPIC, amount)


def _train(order: Order, opened: _Opened, trainer: Trainer, listener: _Reporter) -> dict[str, Any]:
    run, block = opened.run, order["block"]
    began, clock = directory.now(), time.monotonic()
    with opened.presence() as lock, claimed(lock, block, wait=False) as is_ours:
        if run.is_done(block):
            return {"state": "done", "session": None}
        if not is_ours and order["heeds_claims"]:
            return {"state": "claimed"}
        try:
            with phases.listening(listener):
                n_rows = run.train_block(trainer, block)
        except (RunError, SpecError):
            raise  # no other block would fare better here
        except Exception:  # noqa: BLE001 - a user's own code may raise anything, which may not even pickle
            return {"state": "failed"}
    seconds = _seconds_since(clock)
    return {"state": "done", "session": directory.session(began, seconds, n_rows, trainer.way, order["device"])}


def _seconds_since(clock: float) -> float:
    """Tell how long a block took, leaving out what passed before the one before it was stored."""
    global _last_stored
    with _clock:
        now = time.monotonic()
        seconds, _last_stored = now - max(clock, _last_stored), now
    return seconds


def _trainer(order: Order, n_cores: int) -> tuple[_Opened, Trainer]:
    global _opened
    torch.set_num_threads(n_cores)
    opened = _open(order)
    trainer = opened.trainer or opened.run.trainer(order["device"], Way(**order["way"]))
    _opened = replace(opened, trainer=trainer)
    return opened, trainer


def _open(order: Order) -> _Opened:
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
        look_in(order["folder"])
        run = Run.open(order["path"])
        _opened = _Opened(key, run, _presence(order["path"], order["spec"]), None)
    return _opened


@cache
def _presence(path: str, _spec: str) -> Shared[Any]:
    """Have this process hold one handle of a run's lock file: to close any drops all that the process has locked."""
    return Shared(Run.open(path).presence)


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


def _n_cores(order: Order) -> int:
    return int(order["n_threads"] or dask_distributed().get_worker().state.nthreads)
