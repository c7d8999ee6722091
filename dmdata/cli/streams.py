"""Standard output kept for a command's result, whatever else the process prints meanwhile.

What a user's own code prints, a library, code in C, or a process that either starts, goes to standard error: the file
descriptor itself is redirected, not only Python's `sys.stdout`.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


@contextlib.contextmanager
def kept_for_results(*, for_good: bool) -> Iterator[TextIO]:
    """Send whatever is printed while the block runs to standard error; yields the stream that is standard output still.

    Parameters
    ----------
    for_good : bool
        The process is one command's: what is printed after the block, as it ends, goes to standard error as well.
    """
    before = sys.stdout
    result = _real_output()
    sys.stdout = sys.stderr
    try:
        yield before if result is None else result
    finally:
        if result is not None:
            _flush(before)
            with contextlib.suppress(OSError, ValueError):  # nobody reads any more, which was said when it was written
                result.flush()
            if for_good:
                _ended.append(result)
            else:
                os.dup2(result.fileno(), 1)
                with contextlib.suppress(OSError, ValueError):
                    result.close()
        if result is None or not for_good:
            sys.stdout = before


# a stream that is collected is closed, and says so if that fails
_ended: list[TextIO] = []


def _real_output() -> TextIO | None:
    """Move file descriptor 1 to another number and put standard error in its place; None where it is not `sys.stdout`.

    It is not under a test that captures what is printed, or in a notebook.
    """
    try:
        if sys.stdout.fileno() != 1:
            return None
        sys.stdout.flush()
        kept = os.dup(1)
    except (AttributeError, OSError, ValueError):
        return None
    try:
        os.dup2(2, 1)
    except OSError:  # there is no standard error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
    encoding, errors = getattr(sys.stdout, "encoding", None), getattr(sys.stdout, "errors", None)
    return open(kept, "w", encoding=encoding, errors=errors)


def _flush(stream: Any) -> None:
    """Write what Python and C still hold back for file descriptor 1 to where that leads at the moment."""
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).fflush(None)
