"""Whether this process may use obstore: not if it was forked from one that has, for dmdata or for anything else.

The Rust threads behind obstore stay in the parent. A call in the child would hang, and what it waits for would be
reported to the parent's threads, which crash. The package imports this first, so that it sees every fork from then on.
"""

import os
import sys

_RUNTIME_THREAD = "tokio-rt-worker"
_PF_FORKNOEXEC = 0x40

_is_near = False
_is_here = False


def announce_runtime() -> None:
    """Say that obstore is about to be used, which starts its threads: a process forked from now on must not use it."""
    global _is_near
    _is_near = True


def runtime_was_lost() -> bool:
    """Whether this process was forked from one that used obstore, so that it must not."""
    return _was_lost


def _runtime_runs() -> bool:
    """Whether the threads behind obstore run in this process; those of other Rust packages count as well.

    Only Linux tells. Elsewhere only our own use is known.
    """
    if "obstore" not in sys.modules:
        return False
    try:
        threads = os.listdir("/proc/self/task")
    except OSError:
        return False
    return any(_read(f"/proc/self/task/{thread}/comm").rstrip() == _RUNTIME_THREAD for thread in threads)


def _was_lost_before() -> bool:
    """Whether a parent used obstore before it forked, if dmdata is first imported here, in the child."""
    if "obstore" not in sys.modules or _runtime_runs():
        return False
    # the name of the program, in brackets, may hold anything
    facts = _read("/proc/self/stat").rpartition(")")[2].split()
    return bool(facts and int(facts[6]) & _PF_FORKNOEXEC and _polls())


def _polls() -> bool:
    """Whether this process has an epoll of its own or its parent's, as the threads behind obstore have."""
    try:
        return any(os.readlink(f"/proc/self/fd/{fd}").endswith("[eventpoll]") for fd in os.listdir("/proc/self/fd"))
    except OSError:  # one was closed meanwhile
        return True


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:  # it has ended meanwhile, or this is no Linux
        return ""


def _before() -> None:
    global _is_here
    _is_here = _is_near or _runtime_runs()


def _after_in_child() -> None:
    global _is_near, _was_lost
    _was_lost |= _is_here
    _is_near = False


_was_lost = _was_lost_before()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_child=_after_in_child)
