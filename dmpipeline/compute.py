"""How heavy work is run: kernels compiled by numba, on a pool of as many threads as there are processors."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Generic, TypeVar

from numba import njit

T = TypeVar("T")

kernel = njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz", "arcp"})
"""Compile a function, once a machine, to run without the interpreter's lock.

Float sums may be reordered and fused, the same way in every run but perhaps the one that compiles: what numba has just
compiled was seen to round otherwise than the same read from its cache. Nothing is assumed about NaN and infinity.
"""


def available_threads() -> int:
    """Count the processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Shared(Generic[T]):
    """A context of all threads that are in it at one time: the first to come enters it, the last to go leaves it.

    Parameters
    ----------
    make : callable
        Makes the context.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[T]]) -> None:
        self._make, self._turn, self._n_inside = make, threading.Lock(), 0
        self._entered, self._given = ExitStack(), list[T]()

    @contextmanager
    def __call__(self) -> Iterator[T]:
        """Be in the context; yields what it gives."""
        with self._turn:
            if not self._n_inside:
                self._given[:] = [self._entered.enter_context(self._make())]
            self._n_inside += 1
        try:
            yield self._given[0]
        finally:
            with self._turn:
                self._n_inside -= 1
                if not self._n_inside:
                    self._entered.close()
