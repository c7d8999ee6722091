"""Files of records of what reads received: written once, appended to by one process, checked whenever they are read.

A record is a head with checksums of all that follows, a table of byte ranges, and their bytes, packed. What is torn,
because a process was killed or a disk was full, has no whole record and is passed over. Locks end with their process.
"""

import contextlib
import fcntl
import os
import struct
import time
import uuid
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import google_crc32c
import numpy as np
import numpy.typing as npt

from dmdata.atomic import replacing
from dmdata.home import home
from dmdata.layout.plan import Offsets

FOLDER = "ranges"
"""Where all segments are, each object's in a folder of its own, below `dmdata.home.home`."""

SUFFIX = ".ranges"
SEGMENT_BYTES = 64 << 20
"""A segment of at least this size is not appended to."""

Bytes: TypeAlias = npt.NDArray[np.uint8]

# magic, object, byte ranges, bytes of the table of these as stored, bytes of data, checksum of all before the data
_HEAD = struct.Struct("<8s16sQQQI")
_MAGIC = b"dmrange1"
_BLOCK_BYTES = 32 << 10
_BLOCKS_AT_ONCE = 32
# a table of fewer ranges is stored as it is
_FEW_RANGES = 64
_LONG_PIECE_BYTES = 512
_TOUCH_SECONDS = 1.0
_STALE_SECONDS = 3600.0


@dataclass(slots=True)
class Segment:
    """A file of records: how far it is known, and whether more may come."""

    path: str
    end: int = 0
    n_records: int = 0
    grows: bool = True


@dataclass(frozen=True, slots=True)
class Record:
    """Where a record's data is: its segment, the place and length there, and the checksums of its blocks."""

    segment: Segment
    data_at: int
    n_bytes: int
    checksums: tuple[int, ...]


class DamagedError(Exception):
    """What a segment holds is not what was written."""


class OwnSegment:
    """The segment that this process appends to; held by a lock for as long as it does."""

    def __init__(self, segment: Segment, descriptor: int) -> None:
        self.segment, self.descriptor = segment, descriptor

    @classmethod
    def begin(cls, folder: Path) -> "OwnSegment":
        """Make a new, empty one."""
        path = str(folder / f"{uuid.uuid4().hex}{SUFFIX}")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        for _ in range(3):
            _make_folder(folder)
            try:
                descriptor = os.open(path, flags, 0o600)
                break
            except FileNotFoundError:
                continue  # another process has just found the folder empty, and removed it
        else:
            descriptor = os.open(path, flags, 0o600)
        with contextlib.suppress(OSError):  # a file system without locks: what is appended to may be made one
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return cls(Segment(path, grows=False), descriptor)

    def __del__(self) -> None:
        os.close(self.descriptor)


def record_head(key: bytes, starts: Offsets, lengths: Offsets, data: Bytes) -> tuple[bytes, tuple[int, ...]]:
    """Write all of a record but its data: head, table of ranges, checksums of the data's blocks."""
    table = np.stack([np.diff(starts, prepend=0), lengths]).astype("<i8").tobytes()
    if len(starts) >= _FEW_RANGES:
        table = zlib.compress(table, 1)
    checksums = tuple(
        int(google_crc32c.value(data[at : at + _BLOCK_BYTES].tobytes())) for at in range(0, len(data), _BLOCK_BYTES)
    )
    packed = np.array(checksums, "<u4").tobytes()
    fields = _HEAD.pack(_MAGIC, key, len(starts), len(table), len(data), 0)[:-4]
    own = google_crc32c.value(fields + table + packed)
    return fields + own.to_bytes(4, "little") + table + packed, checksums


def parse_record(descriptor: int, key: bytes, segment: Segment, size: int) -> tuple[Record, Offsets] | None:
    """Read the record at the end of what is known of a segment; None where no whole one is there."""
    head = os.pread(descriptor, _HEAD.size, segment.end)
    if len(head) < _HEAD.size:
        return None
    magic, of_object, n_ranges, n_table, n_bytes, own = _HEAD.unpack(head)
    if magic != _MAGIC or of_object != key:
        return None
    n_packed = 4 * -(-n_bytes // _BLOCK_BYTES)
    data_at = segment.end + len(head) + n_table + n_packed
    if data_at + n_bytes > size:
        return None
    rest = os.pread(descriptor, n_table + n_packed, segment.end + len(head))
    if len(rest) < n_table + n_packed or google_crc32c.value(head[:-4] + rest) != own:
        return None
    table = rest[:n_table] if n_ranges < _FEW_RANGES else zlib.decompress(rest[:n_table])
    deltas, lengths = np.frombuffer(table, "<i8").reshape(2, n_ranges).astype(np.int64)
    starts = np.cumsum(deltas)
    checksums = tuple(np.frombuffer(rest[n_table:], "<u4").tolist())
    return Record(segment, data_at, n_bytes, checksums), np.stack([starts, starts + lengths], axis=1)


def open_to_read(segment: Segment) -> int:
    """Open a segment, and note that it is used."""
    try:
        descriptor = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise DamagedError(segment) from None
    if time.time() - os.fstat(descriptor).st_mtime > _TOUCH_SECONDS:
        with contextlib.suppress(OSError):
            os.utime(descriptor)
    return descriptor


def copy_record(
    descriptor: int, record: Record, at: Offsets, lengths: Offsets, product: Bytes, landings: Offsets
) -> None:
    """Copy pieces of a record's data, ascending, each to its landing, by windows of blocks whose checksums hold."""
    ends = at + lengths
    nth, done = 0, 0
    while nth < len(at):
        low = (int(at[nth]) + done) // _BLOCK_BYTES * _BLOCK_BYTES
        high = low + _BLOCKS_AT_ONCE * _BLOCK_BYTES
        past = int(np.searchsorted(at, high, side="left"))
        high = min(high, -(-int(ends[past - 1]) // _BLOCK_BYTES) * _BLOCK_BYTES, record.n_bytes)
        window = _sound_bytes(descriptor, record, low, high)
        starts, stops, to = at[nth:past] - low, np.minimum(ends[nth:past], high) - low, landings[nth:past].copy()
        starts[0] += done
        to[0] += done
        sizes = stops - starts
        n_bytes = int(sizes.sum())
        if n_bytes >= _LONG_PIECE_BYTES * len(sizes):
            for start, stop, where in zip(starts.tolist(), stops.tolist(), to.tolist(), strict=True):
                product[where : where + stop - start] = window[start:stop]
        else:
            before = np.cumsum(sizes) - sizes
            within = np.arange(n_bytes)
            product[np.repeat(to - before, sizes) + within] = window[np.repeat(starts - before, sizes) + within]
        if ends[past - 1] > high:
            done = high - int(at[past - 1])
            nth = past - 1
        else:
            nth, done = past, 0


def _sound_bytes(descriptor: int, record: Record, low: int, high: int) -> Bytes:
    """Read blocks of a record's data.

    Raises
    ------
    DamagedError
        If a checksum does not hold.
    """
    data = os.pread(descriptor, high - low, record.data_at + low)
    first = low // _BLOCK_BYTES
    if len(data) < high - low:
        raise DamagedError(record.segment)
    for nth, start in enumerate(range(0, len(data), _BLOCK_BYTES), first):
        if google_crc32c.value(data[start : start + _BLOCK_BYTES]) != record.checksums[nth]:
            raise DamagedError(record.segment)
    return np.frombuffer(data, np.uint8)


def write_segment(folder: Path, parts: Iterable[bytes | memoryview], last_used: float) -> Segment:
    """Write a segment next to its place, then move it there."""
    path = folder / f"{uuid.uuid4().hex}{SUFFIX}"
    with replacing(path) as partial:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            end = 0
            for part in parts:
                write_all(descriptor, part, end)
                end += len(part)
            os.utime(descriptor, (last_used, last_used))
        finally:
            os.close(descriptor)
    return Segment(str(path), end, 1, grows=False)


def write_all(descriptor: int, data: bytes | memoryview, at: int) -> None:
    """Write bytes to a place in a file, in as many pieces as the system makes of them."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], at + done)


def hold(path: str, stack: contextlib.ExitStack) -> float | None:
    """Take the lock of a segment until the stack ends, and return its last use; None where somebody appends to it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return None
    facts = os.fstat(descriptor)
    return facts.st_mtime if facts.st_nlink else None


def _make_folder(folder: Path) -> None:
    folder.parent.parent.mkdir(parents=True, exist_ok=True)
    for path in (folder.parent, folder):
        path.mkdir(mode=0o700, exist_ok=True)


def segments_of_all() -> list[tuple[str, int, float]]:
    """List path, bytes and last use of all segments, and of files that were to become one."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(home() / FOLDER) as objects:
        for folder in objects:
            if not folder.is_dir(follow_symlinks=False):
                continue
            with contextlib.suppress(FileNotFoundError), os.scandir(folder.path) as files:
                for file in files:
                    with contextlib.suppress(FileNotFoundError):
                        facts = file.stat(follow_symlinks=False)
                        found.append((file.path, facts.st_size, facts.st_mtime))
    return found


def sweep(bound: int) -> int:
    """Remove what was not used for longest, some more than it takes to be below the bound; return what is left."""
    files = segments_of_all()
    total = sum(size for _, size, _ in files)
    aim = bound if total <= bound else bound - bound // 16
    for path, size, last_used in sorted(files, key=lambda file: file[2]):
        is_left_over = path.endswith((".partial", ".new")) and last_used < time.time() - _STALE_SECONDS
        if total > aim or is_left_over:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            with contextlib.suppress(OSError):
                os.rmdir(os.path.dirname(path))
            total -= size
    return total
