"""How heavy work is run: kernels compiled by numba, on a pool of as many threads as there are processors."""

import os

from numba import njit

kernel = njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz", "arcp"})
"""Compile a function, once a machine, to run without the interpreter's lock.

Float sums may be reordered and fused, the same way in every run but perhaps the one that compiles: what numba has just
compiled was seen to round otherwise than the same read from its cache. Nothing is assumed about NaN and infinity.
"""


def available_threads() -> int:
    """Count the processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
