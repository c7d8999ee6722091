"""Who trains which block of a run: one process at a time, as long as it is seen to be alive.

A process claims a block by locking a byte of the run's lock file, which the system unlocks when the process dies. It
also keeps a file ``.claim-<byte>`` in the run's directory and touches it every few seconds. A lock whose file has not
been touched for `LEASE_SECONDS`, by the observer's own clock, has expired: its process is stopped, or its machine is
out of reach. A process that sees this claims the same block by another byte, far behind the first.

So a block may be trained twice. This is safe: a row depends on nothing but its draws, so both write the same bytes;
each chunk is put in place whole; and a process that finds the block stored when it wakes up stores nothing.

The file is removed when the block is stored. One that is there without a lock was left by a process that died. It names
the command that the process worked for, so other processes of that command see which blocks were begun, how often, and
which ones failed.
"""

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import IO, Any, Self

from dmpipeline.errors import RunError, SpecError, TrainingError
from dmpipeline.runs import directory
from dmpipeline.runs.directory import claimed, write_beside

LEASE_SECONDS = 15.0
"""A claim whose file was not touched for this long has expired."""

MOST_FAILED_BLOCKS = 3
"""A command that carries on after failures stops when this many blocks have failed."""

MOST_DEATHS = 3
"""A block is given up when this many processes of one command died while they trained it."""

LOOK_AGAIN_SECONDS = 0.5
"""How often to look whether a block that others have claimed is stored, or free."""

FIRST_PATIENCE_SECONDS = 120.0
"""How long a process that has trained no block waits for one that another process holds, and touches."""

_TOUCHES_A_LEASE = 5
# A process may hang and still touch its files. An idle one that has trained blocks much faster trains its block, too.
_PATIENCE_IN_BLOCKS = 10
_NEXT_BYTE = 2**32


@dataclass(slots=True)
class Observed:
    """What a process has seen of a run's blocks; kept by one that trains the run in several turns.

    Attributes
    ----------
    slowest : float
        Seconds that the slowest block of this process has taken; 0 where it has trained none.
    claims : dict
        By byte: the claim on it, when its file was touched, by the file's clock, since when this is so, and when the
        claim was first seen, by the observer's clock.
    """

    slowest: float = 0.0
    claims: dict[int, tuple[str | None, int | None, float, float]] = field(default_factory=dict)


class Claims:
    """The claims of one process on blocks of a run; a context in which their files are touched.

    One at a time in a process: the system does not lock out threads of the process that has the lock.

    Parameters
    ----------
    path : pathlib.Path
        The run's directory.
    blocks : sequence of range
        Rows of each block.
    lock : file
        The run's open lock file; see `training.presence`.
    command : str
        A name that all processes share which work for one command, and no others.
    carries_on : bool
        Whether a block that fails is given up, so that others are trained, instead of raising.
    lease_seconds : float
    first_patience : float
        See `FIRST_PATIENCE_SECONDS`.
    observed : Observed, optional
        What this process has seen before; added to.
    clock : callable
        Returns the seconds by which claims expire.
    """

    def __init__(
        self,
        path: Path,
        blocks: Sequence[range],
        lock: IO[bytes],
        command: str,
        *,
        carries_on: bool = False,
        lease_seconds: float = LEASE_SECONDS,
        first_patience: float = FIRST_PATIENCE_SECONDS,
        observed: Observed | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.carries_on, self._observed, self._clock = carries_on, observed or Observed(), clock
        self._path, self._blocks, self._lock, self._command = path, blocks, lock, command
        self._lease_seconds, self._first_patience = lease_seconds, first_patience
        self._held: set[int] = set()
        self._can_lock = directory.can_lock(lock)
        self._is_over = threading.Event()
        self._touching = threading.Thread(target=self._touch, name="claims", daemon=True)

    def __enter__(self) -> Self:
        self._touching.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._touching.join()

    @contextlib.contextmanager
    def claimed(self, block: int, *, again: bool) -> Iterator[bool]:
        """Claim a block while the body runs; yields whether it is ours to train.

        Parameters
        ----------
        block : int
        again : bool
            Whether to claim a block that a process of the same command has begun and left, because it died. It may have
            died of the block, so train it when nothing else is left, and nothing else with it.
        """
        note = self._read(self._file(block))
        if self._is_ours(note) and (note.get("is_failed") or not again):
            yield False
            return
        with contextlib.ExitStack() as stack:
            byte = self._lock_one(block, stack)
            if byte is None:
                yield False
                return
            left = self._read(self._file(byte))
            n_begun = left.get("n_begun", 0) if self._is_ours(left) else 0
            if n_begun >= MOST_DEATHS:
                lost = TrainingError("every worker that trained it died; see their logs for what killed them")
                directory.record_failure(self._path, block, self._blocks[block], lost)
                self._give_up(block)
                yield False
                return
            self._write(byte, n_begun=n_begun + 1, claim=uuid.uuid4().hex[:8])
            self._held.add(byte)
            began = self._clock()
            try:
                yield True
            finally:
                self._held.discard(byte)
                if byte != block or not self._is_failed(self._read(self._file(block))):
                    self._file(byte).unlink(missing_ok=True)
            self._observed.slowest = max(self._observed.slowest, self._clock() - began)

    @contextlib.contextmanager
    def failures(self, block: int) -> Iterator[None]:
        """Give up a claimed block if the body raises, where this command carries on.

        Raises
        ------
        RunError, SpecError
            Whatever the body raises of this kind: no other block would fare better.
        """
        try:
            yield
        except (RunError, SpecError):
            raise
        except Exception:
            if not self.carries_on:
                raise
            self._give_up(block)

    def failed(self) -> set[int]:
        """Return the blocks that processes of this command have given up."""
        return {byte for byte, file in self._files() if self._is_failed(self._read(file))}

    def begun(self) -> dict[int, str]:
        """Return the claims of this command's processes, of those that died as well: what tells each apart, by byte."""
        notes = ((byte, self._read(file)) for byte, file in self._files())
        return {byte: note["claim"] for byte, note in notes if self._is_ours(note) and "claim" in note}

    def is_held(self, byte: int) -> bool:
        """Return whether another process holds a byte that was claimed, or may hold it."""
        with claimed(self._lock, byte, wait=False) as is_free:
            return not (is_free and self._can_lock)

    def are_free(self, more_than: int, blocks: Iterable[int]) -> bool:
        """Return whether more than `more_than` of these blocks are neither claimed nor stored."""
        if not more_than:
            return True
        taken = {byte % _NEXT_BYTE for byte, _ in self._files()}
        free = (block for block in blocks if block not in taken and not directory.is_stored(self._path, block))
        return next(islice(free, more_than, None), None) is not None

    def is_hopeless(self) -> bool:
        """Return whether too many blocks have failed for training to go on."""
        return self.carries_on and len(self.failed()) >= MOST_FAILED_BLOCKS

    def clear(self, done: Collection[int]) -> None:
        """Remove, when the command is over, what is left of its claims, and files of blocks that are `done`.

        Claims that its processes still hold stay: those remove them.
        """
        for byte, file in self._files():
            note = self._read(file)
            is_over = byte % _NEXT_BYTE in done or self._is_failed(note)
            if is_over or (self._is_ours(note) and not self.is_held(byte)):
                file.unlink(missing_ok=True)

    def _lock_one(self, block: int, stack: contextlib.ExitStack) -> int | None:
        """Lock the first byte of a block that is free, if all before it have expired."""
        for byte in count(block, _NEXT_BYTE):
            is_ours = stack.enter_context(claimed(self._lock, byte, wait=False))
            if is_ours and (self._can_lock or self._look(byte)[1] is None):
                self._observed.claims.pop(byte, None)
                return byte
            if not self._has_expired(byte):
                return None
            if not self._can_lock:
                return byte
        return None

    def _has_expired(self, byte: int) -> bool:
        now, (claim, touched) = self._clock(), self._look(byte)
        claim_before, touched_before, since, first = self._observed.claims.get(byte, (claim, touched, now, now))
        since = since if touched == touched_before else now
        first = first if claim == claim_before else now
        self._observed.claims[byte] = claim, touched, since, first
        slowest = self._observed.slowest
        patience = max(self._lease_seconds, _PATIENCE_IN_BLOCKS * slowest if slowest else self._first_patience)
        return now - since > self._lease_seconds or now - first > patience

    def _look(self, byte: int) -> tuple[str | None, int | None]:
        """Return what tells the claim on a byte from others, and when its file was touched; None where unknown."""
        # opened, because a network file system need not look at the server for a file that is not; one that was
        # replaced meanwhile may be an error there
        with contextlib.suppress(OSError), open(self._file(byte), "rb") as file:
            return _parsed(file.read()).get("claim"), os.fstat(file.fileno()).st_mtime_ns
        return None, None

    def _touch(self) -> None:
        while not self._is_over.wait(self._lease_seconds / _TOUCHES_A_LEASE):
            for byte in tuple(self._held):
                with contextlib.suppress(OSError):  # not touched is as good as stopped
                    os.utime(self._file(byte))

    def _give_up(self, block: int) -> None:
        self._write(block, is_failed=True)

    def _is_ours(self, note: dict[str, Any]) -> bool:
        return note.get("command") == self._command

    def _is_failed(self, note: dict[str, Any]) -> bool:
        return self._is_ours(note) and "is_failed" in note

    def _read(self, file: Path) -> dict[str, Any]:
        with contextlib.suppress(OSError):
            return _parsed(file.read_bytes())
        return {}

    def _write(self, byte: int, **facts: Any) -> None:
        write_beside(self._file(byte), json.dumps({"command": self._command} | facts))

    def _file(self, byte: int) -> Path:
        return self._path / f".claim-{byte}"

    def _files(self) -> list[tuple[int, Path]]:
        return [(int(file.name.removeprefix(".claim-")), file) for file in sorted(self._path.glob(".claim-*"))]


def _parsed(note: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        return dict(json.loads(note))
    return {}
