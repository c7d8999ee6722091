"""Which files Python opens, seen where all of it goes through: `open` itself.

An audit hook would see more, but it stays in its process and is called in every thread, also while that starts.
"""

import builtins
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """Yield a list that grows by the path of each file that is opened during the block."""
    paths: list[str] = []
    really_open = io.open

    def noted(file: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, str | os.PathLike):
            paths.append(os.fspath(file))
        return really_open(file, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", noted)
        patch.setattr(io, "open", noted)
        yield paths
