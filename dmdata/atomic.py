"""Files that are there whole or not at all: written next to their place and moved there."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a path in the folder of `path` to write to; it takes the place of `path` unless the block raises.

    A process that is killed leaves ``.NAME.*.partial`` and the old file.

    Raises
    ------
    FileExistsError
        If something is there, or appears in the meantime, and `replace` is false.
    OSError
        If it cannot be written or moved.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        if replace:
            os.replace(partial, path)
        else:
            os.link(partial, path)  # unlike a replacement, fails where something is
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes, *, replace: bool = True) -> None:
    """Write `content` into a file, text as UTF-8: a reader sees the old file or the new one.

    Raises
    ------
    FileExistsError
        If something is there, or appears in the meantime, and `replace` is false.
    OSError
        If it cannot be written or moved.
    """
    with replacing(path, replace=replace) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
