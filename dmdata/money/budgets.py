"""Which budgets (``with dmdata.budget(...)``) hold a read: its thread's, those it was carried from, its ancestors'.

A budget is known in three places. The thread that opened it has it in its context, so that two threads keep their own;
one variable of the environment hands it to the processes started in it; and the ledger names it with the process that
opened it, so that a worker that was started long before finds the budgets of its ancestors. What is pickled in a budget
takes it along (`in_force_here`), which reaches workers on other hosts.
"""

import functools
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from dmdata.errors import BudgetError

__all__ = [
    "BUDGETS_VARIABLE",
    "Budget",
    "Held",
    "ancestors",
    "close_here",
    "held",
    "in_force_here",
    "is_alive",
    "open_here",
    "process_name",
    "put_in_force",
]

BUDGETS_VARIABLE = "DMDATA_BUDGETS"
"""Hands the budgets in force to the processes that are started."""

# a process of another host that has not drawn for this long is presumed dead
_LEASE_SECONDS = 24 * 3600.0
_MOST_ANCESTORS = 64


@dataclass(frozen=True, slots=True)
class Budget:
    """An opened budget: its name, its limit, and the names of the budgets around it."""

    name: str
    pico: int
    inside: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Write it as the environment and what is pickled carry it."""
        return f"{self.name}={self.pico}"


@dataclass(frozen=True, slots=True)
class Held:
    """The budgets that may hold one read, as far as can be told without the ledger.

    Attributes
    ----------
    certain : tuple of Budget
        Opened around the read, or around the start of its process.
    carried : tuple of Budget
        In force where the work was sent from.
    of_others : tuple of Budget
        Opened by other threads of this process, where this one has none of its own.
    ancestors : tuple of str
        Processes whose open budgets hold too, by name.
    """

    certain: tuple[Budget, ...]
    carried: tuple[Budget, ...]
    of_others: tuple[Budget, ...]
    ancestors: tuple[str, ...]


_LOCK = threading.Lock()
# of this process, in all its threads, in the order in which they were opened
_OPENED: dict[str, Budget] = {}
_OWN: ContextVar[tuple[Budget, ...]] = ContextVar("dmdata_budgets", default=())

if hasattr(os, "register_at_fork"):
    # a child forked while another thread holds the lock would wait for it for ever
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)


def open_here(name: str, pico: int) -> Budget:
    """Make a budget inside those that hold here; it is not yet in force."""
    return Budget(name, pico, tuple(budget.name for budget in in_force_here()))


def put_in_force(budget: Budget) -> None:
    """Let a budget hold this thread, the threads without one of their own, and the processes started from now on."""
    with _LOCK:
        _OPENED[budget.name] = budget
        _set_variable([*_in_variable(), budget])
    _OWN.set((*_OWN.get(), budget))


def close_here(budget: Budget) -> None:
    """End a budget; others may have begun or ended meanwhile, in other threads."""
    with _LOCK:
        _OPENED.pop(budget.name, None)
        _set_variable([other for other in _in_variable() if other.name != budget.name])
    _OWN.set(tuple(other for other in _OWN.get() if other != budget))


def in_force_here(carried: Iterable[Budget] = ()) -> tuple[Budget, ...]:
    """List the budgets that work sent from this thread takes along, those it brought with it first."""
    found = held(carried, with_ancestors=False)
    return tuple({budget.name: budget for budget in (*found.carried, *found.certain, *found.of_others)}.values())


def held(carried: Iterable[Budget] = (), *, with_ancestors: bool = True) -> Held:
    """Find the budgets that may hold a read of this thread.

    Raises
    ------
    BudgetError
        If the variable of the environment holds something else.
    """
    with _LOCK:
        inherited = [budget for budget in _in_variable() if budget.name not in _OPENED]
        # a context may have been left behind by a budget that ended in another one
        own = [budget for budget in _OWN.get() if budget.name in _OPENED]
        others = [] if own else list(_OPENED.values())
    return Held(
        certain=(*inherited, *own),
        carried=tuple(carried),
        of_others=tuple(others),
        ancestors=ancestors() if with_ancestors else (),
    )


def parsed(text: str) -> Budget:
    """Read a budget as the environment and what is pickled carry it.

    Raises
    ------
    BudgetError
        If it is none.
    """
    name, _, pico = text.partition("=")
    if not (name.startswith("block:") and pico.isdecimal()):
        raise BudgetError(f"{BUDGETS_VARIABLE} holds {text!r}, which is not a budget; unset it")
    return Budget(name, int(pico))


def _in_variable() -> list[Budget]:
    return [parsed(text) for text in os.environ.get(BUDGETS_VARIABLE, "").split(",") if text]


def _set_variable(budgets: list[Budget]) -> None:
    if budgets:
        os.environ[BUDGETS_VARIABLE] = ",".join(map(str, budgets))
    else:
        os.environ.pop(BUDGETS_VARIABLE, None)


def process_name() -> str:
    """Name this process so that another one, later, with the same number is told apart."""
    return _name(os.getpid())


@functools.lru_cache(maxsize=1)
def _name(pid: int) -> str:
    fields = _stat(pid)
    # no /proc on this system: the number alone must do
    return f"{socket.gethostname()}:{pid}:{fields[19] if fields else ''}"


def _stat(pid: int) -> list[str]:
    """Read proc(5)'s stat of a process from its third field on: behind the name, which may hold spaces."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def ancestors() -> tuple[str, ...]:
    """Name the processes that this one descends from, the nearest first."""
    return _ancestors(os.getpid(), os.getppid())


# with the same parent as before the living ancestors are the same; a budget of a dead one holds until it is closed
@functools.lru_cache(maxsize=4)
def _ancestors(pid: int, parent: int) -> tuple[str, ...]:
    del pid
    names: list[str] = []
    while parent > 1 and len(names) < _MOST_ANCESTORS:
        names.append(_name(parent))
        parent = _parent(parent)
    return tuple(names)


def _parent(pid: int) -> int:
    if fields := _stat(pid):
        return int(fields[1])
    try:
        listed = subprocess.run(
            ["ps", "-o", "ppid=", "-p", str(pid)],
            capture_output=True,
            text=True,
            check=False,
            timeout=5,
        )
        return int(listed.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0


def is_alive(process: str, seen_at: float) -> bool:
    """Return whether a process still runs; one of another host is presumed to for a day after it was last seen."""
    host, pid, _ = process.rsplit(":", 2)
    if host != socket.gethostname():
        return time.time() - seen_at < _LEASE_SECONDS
    if process == process_name():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's process has the number; the start time tells whose
    return _name(int(pid)) == process
