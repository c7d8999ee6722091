"""What a long piece of work is doing at the moment, reported to whatever shows it.

Code that takes long calls `phase` and, as parts are done, `Share.add`; a command listens and shows both. Where nobody
listens this costs next to nothing. A listener hears what happens in the thread that set it; work that is handed to
other threads takes it along by `heard_by`.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

_TOLD_EVERY_SECONDS = 0.25


class Listener(Protocol):
    """Whatever shows what is being done."""

    def phase(self, text: str) -> None:
        """Note what is done from now on, as "compiling"; empty where there is nothing special to say."""

    def advance(self, amount: float) -> None:
        """Note that this much more is done, in units of what is counted; may be part of a unit."""


_listener: ContextVar[Listener | None] = ContextVar("dmdata_phases_listener", default=None)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Report to a listener what this thread does while the block runs."""
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)


def phase(text: str) -> None:
    """State what is done from now on, if anybody listens."""
    if (listener := _listener.get()) is not None:
        listener.phase(text)


def heard_by() -> Listener | None:
    """Return who listens to this thread, for threads that work for it."""
    return _listener.get()


class Share:
    """Adds up small parts that are done and reports them to a listener a few times a second, from any thread.

    Parameters
    ----------
    listener : Listener or None
        As `heard_by` returned it.
    """

    def __init__(self, listener: Listener | None) -> None:
        self._listener, self._lock = listener, threading.Lock()
        self._amount, self._told = 0.0, 0.0

    def add(self, amount: float) -> None:
        """Count `amount` more units as done."""
        if self._listener is None:
            return
        now = time.monotonic()
        with self._lock:
            self._amount += amount
            if now - self._told < _TOLD_EVERY_SECONDS:
                return
            told, self._amount, self._told = self._amount, 0.0, now
        self._listener.advance(told)
