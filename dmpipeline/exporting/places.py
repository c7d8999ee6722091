"""Where an export goes: files in a folder, or objects in a bucket through `dmdata.objects.uploads`."""

import os
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

from dmdata.atomic import replacing
from dmpipeline.runs.directory import write_beside

_STALE_SECONDS = 7 * 86_400


class Sink(Protocol):
    """A file that is being written: all of it, in order, then `finish`, then `put_in_place`, which is quick."""

    @property
    def sent_bytes(self) -> int | None:
        """Bytes of it that were sent this time; None where nothing is sent."""

    def write(self, data: bytes | memoryview) -> None:
        """Append to it."""

    def finish(self) -> None:
        """Make all of it safe on its storage, still out of sight."""

    def put_in_place(self) -> None:
        """Let it replace what is there under its name."""


class Place(Protocol):
    """Where an export goes; names are paths below it. `Folder`, and `Uploads`, which explains them."""

    url: str

    def read(self, name: str) -> bytes | None:
        """Read a small file; None where there is none."""

    def put(self, name: str, data: bytes) -> None:
        """Write a small file, whole or not at all."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def etag(self, name: str, n_bytes: int) -> str | None:
        """Return the ETag of a file of this size; None where it is to be written again."""

    def begin(self, name: str, n_bytes: int) -> Sink:
        """Begin a file of a known size."""

    def keep(self, name: str) -> None:
        """Note that a file there is to stay."""

    def abort_unfinished(self, folder: str, belongs: Any) -> None:
        """Give up what earlier exports left unfinished below a folder."""


class Folder:
    """A folder as an export's place; leaving it removes what is not in place."""

    def __init__(self, folder: Path) -> None:
        self.url = str(folder)
        self._folder = folder
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)

    def read(self, name: str) -> bytes | None:
        """Read a small file; None where there is none."""
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def put(self, name: str, data: bytes) -> None:
        """Write a small file, whole or not at all."""
        write_beside(self._folder / name, data)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self._folder / name).unlink(missing_ok=True)

    def etag(self, name: str, n_bytes: int) -> str | None:
        """Return None: files are written again, which costs less than comparing them."""

    def begin(self, name: str, n_bytes: int) -> "NewFile":  # noqa: ARG002 - a bucket's place needs it
        """Begin a file next to its place."""
        return NewFile(self._folder / name, self._stack.enter_context(ExitStack()))

    def keep(self, name: str) -> None:
        """Note that a file there is to stay."""

    def abort_unfinished(self, folder: str, belongs: Any) -> None:
        """Give up what earlier exports left unfinished below a folder."""


class NewFile:
    """A file being written next to its place; leaving `stack` by an error removes it."""

    sent_bytes = None

    def __init__(self, path: Path, stack: ExitStack) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent, f".{path.name}.*.partial")
        self._stack = stack
        self._file: IO[bytes] = stack.enter_context(open(stack.enter_context(replacing(path)), "wb"))  # noqa: SIM115 - the stack closes it

    def write(self, data: bytes | memoryview) -> None:
        """Append to it."""
        self._file.write(data)

    def finish(self) -> None:
        """Make all of it safe on its storage, still out of sight."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def put_in_place(self) -> None:
        """Let it replace what is there under its name."""
        self._stack.close()


def _remove_stale(folder: Path, pattern: str) -> None:
    for left in folder.glob(pattern):
        try:
            if time.time() - left.stat().st_mtime >= _STALE_SECONDS:
                left.unlink()
        except OSError:  # somebody else removes it, or it is not ours to remove
            continue
