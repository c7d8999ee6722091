"""One at a time: of processes on a destination, and of a process's threads on what one of them does for all.

The lock of a destination ends with its process, and is kept away from the destination itself.
"""

import contextlib
import hashlib
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import filelock

from dmdata.errors import DmdataError
from dmdata.money.ledger import home

_THREADS: weakref.WeakValueDictionary[object, threading.Lock] = weakref.WeakValueDictionary()
_THREADS_LOCK = threading.Lock()


@contextlib.contextmanager
def only_thread_at(what: object) -> Iterator[None]:
    """Hold something, by a name that can be hashed, while the block runs; other threads of this process wait."""
    with _THREADS_LOCK:
        lock = _THREADS.get(what)
        if lock is None:
            lock = _THREADS[what] = threading.Lock()
    with lock:
        yield


def _forget_threads() -> None:
    global _THREADS_LOCK  # what another thread held at the fork would be held for ever
    _THREADS_LOCK = threading.Lock()
    _THREADS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


@contextlib.contextmanager
def only_process_at(path: Path | str, *, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold a destination, a path or an address, while the block runs; who shares ``DMDATA_HOME`` is kept out.

    Who holds it is waited for that long.

    Raises
    ------
    DmdataError
        If another process, or another thread of this one, holds it.
    """
    name = hashlib.sha256(str(path.absolute() if isinstance(path, Path) else path).encode()).hexdigest()
    lock = filelock.FileLock(home() / "locks" / f"{name}.lock", timeout=wait_seconds)
    try:
        (home() / "locks").mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout as error:
        raise DmdataError(f"another process is writing {path}; wait for it, or choose another destination") from error
    except OSError as error:
        raise DmdataError(f"{home()} cannot be written ({error}); set DMDATA_HOME to a directory that can") from error
    try:
        yield
    finally:
        lock.release()
