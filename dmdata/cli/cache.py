"""What is cached under ``DMDATA_HOME`` to save requests and time: counted, and cleared on demand.

Only files that dmdata itself put into its own folders are touched, never through a link, and never the ledger.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dmdata.home import home

FOLDERS = {
    "ranges": "bytes that were paid for; without them the next read of the same pays again",
    "headers": "where the elements of each opened object lie; without it the next open asks for 128 bytes again",
    "spools": "ranges of interrupted copies to a bucket; without them these are fetched, and paid for, again",
    "datasets": "pictures that dmpipeline has decoded; without them the next load decodes them again, in minutes",
}
"""What each folder of the cache is for."""


@dataclass(frozen=True, slots=True)
class Remembered:
    """One folder of the cache: what it is for, and how much is in it."""

    folder: str
    what: str
    n_files: int
    n_bytes: int


def remembered() -> list[Remembered]:
    """Count what is in the cache, by folder."""
    found = []
    for folder, what in FOLDERS.items():
        sizes = []
        for path in _files(home() / folder):
            with contextlib.suppress(FileNotFoundError):  # others remove files meanwhile
                sizes.append(path.lstat().st_size)
        found.append(Remembered(folder, what, len(sizes), sum(sizes)))
    return found


def clear(*, older_than_seconds: float = 0.0) -> tuple[int, int]:
    """Remove what is in the cache; return how many files and bytes.

    Parameters
    ----------
    older_than_seconds : float
        Leave what was written since, of bytes that were paid for also what was read since.
    """
    n_files = n_bytes = 0
    for folder in FOLDERS:
        for path in list(_files(home() / folder)):
            try:
                facts = path.lstat()
            except FileNotFoundError:
                continue
            if time.time() - facts.st_mtime >= older_than_seconds:
                path.unlink(missing_ok=True)
                n_files, n_bytes = n_files + 1, n_bytes + facts.st_size
        for path in _files(home() / folder, folders=True):
            with contextlib.suppress(OSError):  # there is something in it, or another process is putting it there
                path.rmdir()
    return n_files, n_bytes


def _files(folder: Path, *, folders: bool = False) -> Iterator[Path]:
    """List the files below a folder, or the folders, the innermost first."""
    if folder.is_dir() and not folder.is_symlink():
        for path in sorted(folder.rglob("*"), reverse=folders):
            is_file = path.is_file() or path.is_symlink()
            if is_file != folders and (is_file or path.is_dir()):
                yield path
