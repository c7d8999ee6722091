"""One SQLite file written by many threads at the price of a few: what waits is committed together.

A commit waits for the disk, and a thread that finds another one at it lays its work down instead of queueing for a
commit of its own: when that one is done, the first of those who wait does all that has been laid down, in order, in one
transaction. Work that refuses does so before it writes anything, so that the others' is not undone. Work that nobody
waits for rides along with the next, or is done within a moment. No thread of its own is needed for that but a short
one, so that a fork loses nothing.
"""

import contextlib
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from dmdata.errors import FactualError

__all__ = ["FAILURES", "Commits", "Work"]

T = TypeVar("T")
Work: TypeAlias = Callable[[sqlite3.Connection], T]
"""Reads, may refuse, then writes, in a transaction with the work of others: it must not refuse once it has written.

Done again if it was interrupted, so done twice it must do no harm. Each statement gives other threads a turn, and so
costs more than it takes: the fewer, the better.
"""

FAILURES = (OSError, sqlite3.Error, ValueError, TypeError, OverflowError, AttributeError)
"""How a file that cannot be used shows: in what SQLite says, in text that is none, or in a value of another kind."""

_LATEST_SECONDS = 0.05
_BUSY_SECONDS = 60

# holds what is laid down, and who commits; never for long, and never around the other
_LISTED = threading.Lock()
# SQLite has locks of its own: a child forked while another thread holds one would wait for it for ever
_ONE_IN_SQLITE = threading.Lock()
_OPENED: "dict[Path, Commits]" = {}


@dataclass(slots=True, eq=False)
class _Laid:
    """Work laid down, and what became of it."""

    work: Work[Any]
    is_awaited: bool
    is_done: bool = False
    result: Any = None
    error: BaseException | None = None
    # held until there is news: it is done, or its thread is the one to do it all
    news: Any = field(default_factory=threading.Lock)


class Commits:
    """The transactions of this process on one file.

    Parameters
    ----------
    path : Path
    prepare : callable
        Called in each transaction, first.
    """

    def __init__(self, path: Path, prepare: Callable[[sqlite3.Connection], None]) -> None:
        self.path = path
        self._prepare = prepare
        self._laid: deque[_Laid] = deque()
        self._leader: _Laid | None = None
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._is_flushed = False
        self._failure: FactualError | None = None

    @classmethod
    def on(cls, path: Path, prepare: Callable[[sqlite3.Connection], None]) -> "Commits":
        """Return the one of this process for a file."""
        if known := _OPENED.get(path):
            return known  # without waiting for who commits
        with _ONE_IN_SQLITE:
            if path not in _OPENED:
                for other in _OPENED.values():
                    other.close()  # one is enough: opened again where it is used again
                _OPENED[path] = cls(path, prepare)
            return _OPENED[path]

    def do(self, work: Work[T]) -> T:
        """Have work committed, and return its answer.

        Raises
        ------
        FactualError
            What `work` refused with, then nothing of it is written; or what was done later and failed.
        OSError, sqlite3.Error, ValueError, TypeError, OverflowError, AttributeError
            If the file cannot be used.
        """
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        laid = _Laid(work, is_awaited=True)
        laid.news.acquire()
        with _LISTED:
            self._laid.append(laid)
            if is_leader := self._leader is None:
                self._leader = laid
        try:
            if not is_leader:
                laid.news.acquire()
            if not laid.is_done:
                self._lead(laid)
            elif self._leader is laid:  # to lead, but somebody held the file alone and did it meanwhile
                with _LISTED:
                    self._hand_on(laid)
        except BaseException:  # interrupted: the others continue without this one
            with _LISTED:
                if laid in self._laid:
                    self._laid.remove(laid)
                self._hand_on(laid)
            raise
        if laid.error is not None:
            raise laid.error
        answer: T = laid.result
        return answer

    def do_later(self, work: Work[object]) -> None:
        """Have work committed with the next, or within a moment; before this process ends in any case but a kill."""
        with _LISTED:
            self._laid.append(_Laid(work, is_awaited=False))
            is_first, self._is_flushed = not self._is_flushed, True
        if is_first:
            try:
                # no daemon: an interpreter waits for it, in a forked worker too
                threading.Timer(_LATEST_SECONDS, self._flush).start()
            except RuntimeError:  # the interpreter is shutting down, or there are too many threads
                self._flush()

    @contextlib.contextmanager
    def alone(self) -> Iterator[sqlite3.Connection]:
        """Hold the file alone: all of the block is written, or nothing."""
        with _ONE_IN_SQLITE:
            if self._laid:
                self._commit()
            connection = self._begun()
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Close the file; what was begun is undone."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def forget(self) -> None:
        """Leave to the parent what it laid down before this process was forked from it."""
        self._laid.clear()
        self._leader, self._is_flushed = None, False

    def _flush(self) -> None:
        nobody = _Laid(lambda _: None, is_awaited=False)
        with _LISTED:
            self._is_flushed = False
            if self._leader is not None or not self._laid:
                return  # the thread that commits takes it along, or nothing is left
            self._leader = nobody
        self._lead(nobody)

    def _lead(self, leader: _Laid) -> None:
        """Commit what is laid down, and let the next of those who wait do so."""
        try:
            with _ONE_IN_SQLITE:
                self._commit()
        finally:
            with _LISTED:
                self._hand_on(leader)

    def _hand_on(self, leader: _Laid) -> None:
        """Wake the first who waits, to lead in this one's place. Called with the list held."""
        if self._leader is leader:
            self._leader = following = next((laid for laid in self._laid if laid.is_awaited), None)
            if following is not None:
                following.news.release()

    def _commit(self) -> None:
        """Do all that is laid down in one transaction. Called with SQLite held."""
        with _LISTED:
            taken = list(self._laid)
            self._laid.clear()
        is_decided = False
        try:
            connection = self._begun()
            for laid in taken:
                try:
                    laid.result, laid.error = laid.work(connection), None
                except FactualError as error:
                    laid.error = error
            connection.execute("COMMIT")
            is_decided = True
        except FAILURES as error:
            is_decided = True
            self.close()
            for laid in reversed(taken):
                if laid.is_awaited:
                    laid.error = error
                else:  # written with the next, or never: what was drawn stays counted
                    with _LISTED:
                        self._laid.appendleft(laid)
            taken = [laid for laid in taken if laid.is_awaited]
        finally:
            if is_decided:
                for laid in taken:
                    if not laid.is_awaited and isinstance(laid.error, FactualError):
                        self._failure = laid.error
                    laid.is_done = True
                    if laid.news.locked():
                        laid.news.release()
            else:  # interrupted: the others' work is done by one of them
                self.close()
                with _LISTED:
                    self._laid.extendleft(reversed(taken))

    def _begun(self) -> sqlite3.Connection:
        try:
            connection = self._connected()
            connection.execute("BEGIN IMMEDIATE")
            self._prepare(connection)
        except BaseException:
            self.close()
            raise
        return connection

    def _connected(self) -> sqlite3.Connection:
        """Return the open file; opened again where another one has taken its place."""
        try:
            facts = self.path.stat()
            identity = (facts.st_dev, facts.st_ino)
        except FileNotFoundError:
            identity = None
        if self._connection is not None and identity == self._identity is not None:
            return self._connection
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        self._connection = connection
        # as safe as deleting the journal each time, and the file system has less to write
        connection.execute("PRAGMA journal_mode = PERSIST")
        facts = self.path.stat()
        self._identity = (facts.st_dev, facts.st_ino)
        return connection


def _before_fork() -> None:
    _ONE_IN_SQLITE.acquire()
    _LISTED.acquire()
    for commits in _OPENED.values():
        commits.close()  # an open file of SQLite's must not be carried over a fork


def _after_in_parent() -> None:
    _LISTED.release()
    _ONE_IN_SQLITE.release()


def _after_in_child() -> None:
    for commits in _OPENED.values():
        commits.forget()
    _after_in_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
