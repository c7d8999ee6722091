"""How heavy work is run: kernels compiled by numba, on a pool of as many threads as there are processors."""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function, once a machine, to run without the interpreter's lock.

    Float sums may be reordered and fused, the same way in every run but perhaps the one that compiles: what numba has
    just compiled was seen to round otherwise than the same read from its cache. Nothing is assumed about NaN and
    infinity.
    """
    from numba import njit  # takes half a second, and what only reads a run needs no kernel

    return njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz", "arcp"})(function)


def kernel_when_called(function: Callable[..., Any]) -> Any:
    """Make a `kernel` of a function at its first call: for modules that are imported by what only reads a run."""
    compiled = functools.cache(lambda: kernel(function))

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return compiled()(*arguments)

    return call


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
        """Enter the context; yields what it yields."""
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
