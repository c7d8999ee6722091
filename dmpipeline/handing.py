"""Hand out a run's missing blocks to the workers of a cluster until all are done.

What is done is what the store says, never what the scheduler says: a task is one block, and one that is lost, done
twice or done too late does no harm. A worker has its next block before it is done with one, so that it never waits; not
so near the end, when it would keep that block from others.

A block that another process has claimed is looked at again later. When a worker takes much longer for a block than
others do, because it is stopped, hung or out of reach, its blocks are given to others as well, which heed no claim: a
claim only saves work. It is safe to have a block trained by two, even at once, because a row depends on nothing but its
draws, so both write the same bytes; each chunk is a file that is written beside its place and moved there; and whoever
writes a block's digest has written all of its data before.

A block whose workers die is handed out once more to a worker that has no other, for it may have died of that one.

Dask hands on what a worker had that died, but not a task that is bound to a worker if there was no other at that
moment, nor does it ever say so. Such a block is handed out anew.
"""

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any

from dmdata.cluster import dask_distributed
from dmpipeline import directory, worker
from dmpipeline.directory import done_blocks
from dmpipeline.errors import ClusterError, TrainingError
from dmpipeline.store import Run

MOST_FAILED_BLOCKS = 3
"""So many blocks may fail before nothing more is handed out."""

LEAST_PATIENCE_SECONDS = 15.0
"""No block is given to a second worker sooner."""

_PATIENCE_IN_MEDIANS = 3
_PATIENCE_AT_FIRST_SECONDS = 120.0  # while no block has come back that would tell how long one takes
_LOOK_AGAIN_SECONDS = 1.0


@dataclass(slots=True)
class _Task:
    """One handing out of a block; `worker` has it, as far as is known; if it `is_bound`, Dask was told so."""

    block: int
    worker: str
    is_bound: bool
    is_overdue: bool = False
    nobody_has_it_since: float | None = None


@dataclass(slots=True)
class Handing:
    """Hands out a run's missing blocks until all are done or too many failed.

    Attributes
    ----------
    run : Run
    client : distributed.Client
    order : dict
        What every worker is told.
    wait_seconds : float or None
        How long there may be no workers.
    sessions : dict
        What each worker has trained, by its address; see `directory.session`.
    failed : set of int
        Blocks that were given up.
    """

    run: Run
    client: Any
    order: worker.Order
    wait_seconds: float | None
    sessions: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    _waiting: deque[int] = field(default_factory=deque)
    _left: set[int] = field(default_factory=set)
    _out: dict[Any, _Task] = field(default_factory=dict)
    _suspects: set[int] = field(default_factory=set)
    _unbound: set[int] = field(default_factory=set)
    _claimed_since: dict[int, float] = field(default_factory=dict)
    _looked_at: dict[int, float] = field(default_factory=dict)
    _busy_since: dict[str, float] = field(default_factory=dict)
    _seconds: list[float] = field(default_factory=list)
    _late_workers: set[str] = field(default_factory=set)
    _workers_seen: float = field(default_factory=time.monotonic)

    def until_done(self) -> Iterator[int]:
        """Yield the count of rows done each time that it grew.

        Raises
        ------
        ClusterError
            If there have been no workers for too long.
        """
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
        if any(task.worker not in workers or future.status == "lost" for future, task in self._out.items()):
            self._see_who_has_what()
            self._take_back_what_nobody_has()
        self._late_workers &= workers
        good = sorted(workers - self._late_workers)
        self._fill_up(good, 1)
        if len(self._waiting) >= len(good) and not self._suspects & self._left:
            self._fill_up(good, 2)
        idle = [address for address in good if not self._has(address)]
        if idle and not self._waiting:
            self._see_who_is_late()
            for address, block in zip(idle, self._to_do_again(), strict=False):
                is_stuck = block not in self._claimed_since or self._is_late(self._claimed_since[block])
                self._looked_at[block] = time.monotonic()
                self._submit(block, address, heeds_claims=not is_stuck)

    def _fill_up(self, addresses: list[str], n_blocks: int) -> None:
        for address in addresses:
            if self._waiting and len(self._has(address)) < n_blocks:
                self._submit(self._waiting.popleft(), address)

    def _has(self, address: str) -> list[_Task]:
        return [task for task in self._out.values() if task.worker == address and not task.is_overdue]

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

    def _submit(self, block: int, address: str, *, heeds_claims: bool = True) -> None:
        if not self._has(address):
            self._busy_since[address] = time.monotonic()
        order = self.order | {"block": block, "heeds_claims": heeds_claims}
        # left to Dask, it counts how many workers the block has killed
        is_bound = block not in self._unbound and len(self.client.nthreads()) > 1
        where = {"workers": [address], "allow_other_workers": True} if is_bound else {}
        future = self.client.submit(worker.train, order, pure=False, **where)
        self._out[future] = _Task(block, address, is_bound)

    def _see_who_has_what(self) -> None:
        """Ask the scheduler, which moves tasks away from workers that died, or to some that are idle."""
        now, having = time.monotonic(), {key: who for who, keys in self.client.processing().items() for key in keys}
        for future, task in self._out.items():
            address = having.get(future.key)
            if address is None:
                task.nobody_has_it_since = task.nobody_has_it_since or now
                continue
            task.nobody_has_it_since = None
            if task.worker != address:
                task.worker = address
                self._busy_since[address] = now

    def _take_back_what_nobody_has(self) -> None:
        for future, task in list(self._out.items()):
            since = task.nobody_has_it_since
            # what has just ended is nobody's for a moment, too, and what is overdue is somebody else's
            is_lost = since is not None and time.monotonic() - since > _LOOK_AGAIN_SECONDS and not future.done()
            if is_lost and task.is_bound and not task.is_overdue:
                del self._out[future]
                self._unbound.add(task.block)
                self._waiting.appendleft(task.block)

    def _see_who_is_late(self) -> None:
        self._see_who_has_what()
        for task in self._out.values():
            if not task.is_overdue and self._is_late(self._busy_since[task.worker]):
                task.is_overdue = True
                self._late_workers.add(task.worker)

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
            outcome = self._outcome(future) if future in self._out else None
            if outcome is None:
                continue
            block = self._out.pop(future).block
            if block in self._left and self._has_done(block, outcome):
                self._left.discard(block)
                # whoever else has it is not waited for
                for other in [other for other, its in self._out.items() if its.block == block]:
                    del self._out[other]
                yield block

    def _outcome(self, future: Any) -> dict[str, Any] | None:
        """Fetch what a worker said; None if it has died since and what it said with it."""
        try:
            outcome: dict[str, Any] = future.result(timeout=_LOOK_AGAIN_SECONDS)
        except dask_distributed().scheduler.KilledWorker:
            return {"state": "killed"}
        except TimeoutError:
            if future.status == "error":  # a worker's own
                raise
            return None
        return outcome

    def _has_done(self, block: int, outcome: dict[str, Any]) -> bool:
        if outcome["state"] == "killed":
            self._see_whose_fault(block)
            return False
        # its next block, if it has one, is what it is busy with from now on
        self._busy_since[outcome["worker"]] = time.monotonic()
        self._late_workers.discard(outcome["worker"])
        match outcome["state"]:
            case "claimed":
                self._claimed_since.setdefault(block, time.monotonic())
                return False
            case "failed":
                self._give_up(block)
                return False
        if session := outcome["session"]:
            self._seconds.append(session["seconds"])
            of_worker = self.sessions.setdefault(outcome["worker"], session | {"seconds": 0.0, "n_rows": 0})
            of_worker["seconds"] = round(of_worker["seconds"] + session["seconds"], 3)
            of_worker["n_rows"] += session["n_rows"]
        return True

    def _see_whose_fault(self, block: int) -> None:
        if block not in self._suspects:
            self._suspects.add(block)
            self._waiting.appendleft(block)
            return
        lost = TrainingError("every worker that trained it died; see their logs for what killed them")
        directory.record_failure(self.run.path, block, self.run.spec.blocks[block], lost)
        self._give_up(block)

    def _give_up(self, block: int) -> None:
        self.failed.add(block)
        self._left.discard(block)
