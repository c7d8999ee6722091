"""The files of a run's directory: made whole or not at all, claimed by one process at a time, replaced in one go.

What was killed in the middle leaves a folder with a dot in front, which the next process removes (a creation) or
finishes (an extension whose new files were all there).
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import shutil
import traceback
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dmdata.atomic import write_whole
from dmdata.errors import FactualError
from dmpipeline.errors import RunError, RunExistsError, explain_os_errors, quoted

if TYPE_CHECKING:
    from dmpipeline.training.train import Way

# Bytes of the lock file. Claims on blocks lock others, see `claims`, and creation locks that of the first block. Those
# who train lock the byte of presence together; a process that extends the run locks it alone.
PROVENANCE_BYTE = 2**40
PRESENCE_BYTE = 2**40 + 1

PER_ROW = ("model_scores",)
"""Arrays with a row for each model that a block's digest does not cover; a store may lack them."""

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_EXTENDED = ".extended"


def write_beside(path: Path, content: str | bytes) -> None:
    """Replace a file of a run, whole or not at all; text as UTF-8.

    Raises
    ------
    RunError
        If it cannot be written.
    """
    with explain_os_errors(path):
        write_whole(path, content)


@contextlib.contextmanager
def claimed(lock: IO[bytes], byte: int, *, wait: bool, shared: bool = False) -> Iterator[bool]:
    """Hold one byte of a run's lock file, if no other process does; the system lets go of it when a process dies.

    Closing any handle of the file drops all that the process holds of it.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.lockf(lock, kind if wait else kind | fcntl.LOCK_NB, 1, byte)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            yield False
            return
        if error.errno not in _WITHOUT_LOCKS:
            raise
        # a file system without locks: two trainers may do the same work, to the same bytes
        yield True
        return
    try:
        yield True
    finally:
        fcntl.lockf(lock, fcntl.LOCK_UN, 1, byte)


def can_lock(lock: IO[bytes]) -> bool:
    """Return whether the file system has locks; the caller is present already."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_SH, 1, PRESENCE_BYTE)
    except OSError as error:
        if error.errno in _WITHOUT_LOCKS:
            return False
        raise
    return True


def done_blocks(path: Path) -> dict[int, float]:
    """List the blocks of a run that are done, and when in seconds since 1970, by the files of their digests.

    Those are written last, and whole. What is in them is read by `Run.digests`, which takes a hundred times as long.
    """
    done = {}
    for file in (path / "store.zarr" / "block_digests" / "c").glob("*/0"):
        with contextlib.suppress(OSError):  # the run is being extended
            done[int(file.parent.name)] = file.stat().st_mtime
    return done


def is_stored(path: Path, block: int) -> bool:
    """Return whether a block is done, by the file of its digest."""
    return (path / "store.zarr" / "block_digests" / "c" / str(block) / "0").exists()


def cut_blocks(path: Path) -> set[int]:
    """List the blocks of a run of which an extension left some rows, by the files of those rows' digests."""
    return {int(file.parent.name) for file in (path / "store.zarr" / "row_digests" / "c").glob("*/0")}


def put_extended(path: Path, staging: Path) -> None:
    """Put a run's new files in place, all of which are in `staging`; the caller holds the run alone."""
    os.rename(staging, path / _EXTENDED)
    _finish(path)


def is_settled(path: Path) -> bool:
    """Return whether no files are still to be put in place."""
    return not (path / _EXTENDED).exists()


def finish_extension(path: Path) -> None:
    """Finish putting a run's new files in place, if a process was killed while it did."""
    if is_settled(path):
        return
    with open(path / "lock", "a+b") as lock, claimed(lock, PRESENCE_BYTE, wait=True), explain_os_errors(path):
        if not is_settled(path):
            _finish(path)


def _finish(path: Path) -> None:
    """Put files in place; each step may be done again."""
    staged = path / _EXTENDED
    if (staged / "store.zarr").exists():
        if (path / "store.zarr").exists():
            os.rename(path / "store.zarr", staged / "old.zarr")
        os.rename(staged / "store.zarr", path / "store.zarr")
    # not all that the catalog lists is still there
    (path / "catalog.yaml").unlink(missing_ok=True)
    for name in ("provenance.json", "run.yaml"):
        with contextlib.suppress(FileNotFoundError):
            os.replace(staged / name, path / name)
    shutil.rmtree(staged)


def versions() -> dict[str, str]:
    """Versions of what a row's last bit may depend on; what is not installed, as in a bare checkout, is left out."""
    found = {"python": platform.python_version()}
    for name in ("dmdata", "numpy", "torch", "zarr", "scikit-learn"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def machine(device: str) -> dict[str, Any]:
    """Describe what models are trained on."""
    import torch  # takes a second, and only what trains or creates a run comes here

    if device.startswith("cuda"):
        device = f"{device}, {torch.cuda.get_device_name(device)}"
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
    }


def session(began: str, seconds: float, n_rows: int, way: "Way", device: str) -> dict[str, Any]:
    """State what one process has trained; `seconds` are those it trained and stored in."""
    return {
        "started": began,
        "seconds": round(seconds, 3),
        "n_rows": n_rows,
        "way": asdict(way),
        "machine": machine(device),
        "versions": versions(),
    }


def record_failure(path: Path, block: int, rows: range, error: Exception) -> None:
    """Keep the traceback of a block that could not be trained, with its rows, when and where.

    What people look for comes last, behind an empty line: the frames of their own code, if that failed, and the cause.
    """
    failure = _failure_path(path, block)
    failure.parent.mkdir(exist_ok=True)
    where = f"rows {rows.start} to {rows.stop - 1}, {now()}, {platform.node()}\n"
    frames = error.frames or "" if isinstance(error, FactualError) else ""
    cause = f"{frames}{type(error).__name__}: {error}\n"
    write_beside(failure, f"{where}{''.join(traceback.format_exception(error))}\n{cause}")


def cause_of_failure(record: str) -> str:
    """Take from a block's record the frames of the user's own code, if that failed, and the cause."""
    return record.rstrip().rpartition("\n\n")[2]


def forget_failure(path: Path, block: int) -> None:
    """Remove the record of a block that was trained after all."""
    _failure_path(path, block).unlink(missing_ok=True)


def recorded_failures(path: Path) -> dict[int, str]:
    """Read the records of blocks that could not be trained, by block."""
    found = {}
    for failure in (path / "failures").glob("block-*.txt"):
        with contextlib.suppress(FileNotFoundError):  # trained after all, just now
            found[int(failure.stem.removeprefix("block-"))] = failure.read_text(encoding="utf-8")
    return dict(sorted(found.items()))


def _failure_path(path: Path, block: int) -> Path:
    return path / "failures" / f"block-{block}.txt"


def now() -> str:
    """Return the time for a record."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def as_json(facts: Mapping[str, Any]) -> str:
    """Write facts as people read them."""
    return json.dumps(facts, indent=2) + "\n"


def staging_folder(path: Path, doing: str) -> Path:
    """Make a folder for files that are to be put in place together."""
    staging = path / f".{doing}-{uuid.uuid4().hex}"
    staging.mkdir()
    return staging


def remove_staging(path: Path) -> None:
    """Remove what killed processes have staged; the caller holds the lock."""
    for entry in filter(_is_staging, path.iterdir()):
        shutil.rmtree(entry, ignore_errors=True)


def require_run(path: Path) -> None:
    """Raise RunError unless there is a run."""
    with explain_os_errors(path, "opened"):
        if not (path / "run.yaml").is_file():
            if found := [file.parent for file in sorted(path.glob("*/run.yaml"))]:
                shown = ", ".join(str(place) for place in found[:3]) + (" and so on" if found[3:] else "")
                raise RunError(
                    f"{path} is not one run, but holds {len(found)}; name one, for example {shown}", path=path
                )
            raise RunError(
                f"{path} is not a run: it has no run.yaml; create one with `dmpipeline init {quoted(path)}`, "
                f"or in Python with dmpipeline.Run.create({str(path)!r}, dmpipeline.RunSpec(dataset=...))",
                path=path,
            )


def require_vacant(path: Path) -> None:
    """Refuse a place that holds anything but what a creation leaves that was killed between its renames.

    Raises
    ------
    RunExistsError
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise RunExistsError(f"{path} is a file; choose a new or empty directory", path=path)
    names = {entry.name for entry in path.iterdir() if not _is_staging(entry)} - {"lock"}
    if not names or "run.yaml" in names:  # another process has just created it
        return
    store = path / "store.zarr"
    if not names <= {"store.zarr", "provenance.json"} or not (store / "block_digests" / "zarr.json").is_file():
        raise RunExistsError(f"{path} holds other files; choose a new or empty directory", path=path)
    if any(store.glob("*/c")):
        raise RunExistsError(
            f"{path} holds a store with trained models but no run.yaml; restore it, or choose another directory",
            path=path,
        )


def _is_staging(entry: Path) -> bool:
    return entry.name.startswith((".creating-", ".extending-"))
