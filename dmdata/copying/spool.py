"""What a read has received, kept in a file until it is written for good, so that a killed process does not pay twice.

Each range is written to the file as it lands, and a record with a checksum follows: the system keeps both, whatever
becomes of the process. Whoever begins the same read again finds the ranges whose records and bytes are whole. Records
are bound to the read that they belong to: another object, selection or plan begins again. The file is not the memory
itself, mapped, because a page written for the first time is slower than a copy of it.
"""

import errno
import fcntl
import hashlib
import os
import struct
import threading
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from dmdata.layout.plan import ReadPlan

# range, first and last byte in the product, checksums of these bytes and of the record itself
_RECORD = struct.Struct("<QQQII")
_PIECE_BYTES = 256 << 10
_NOT_OFFERED = (errno.ENOTSUP, errno.EINVAL, errno.ENOSYS, errno.ENODEV, errno.ENOLCK)


def read_key(identity: str, plan: ReadPlan) -> str:
    """Name a read, so that ranges of another one are never taken for its own.

    Parameters
    ----------
    identity : str
        What changes when the object does.
    plan : ReadPlan
    """
    digest = hashlib.sha256(repr((identity, plan.layout, plan.n_requests, plan.n_bytes, plan.wanted_bytes)).encode())
    digest.update(repr((plan.max_gap_bytes, plan.max_range_bytes)).encode())
    digest.update(plan.selection.digest.encode())
    return digest.hexdigest()


class Landing:
    """The memory that one read after the other lands in; with a file next to it, for as long as one is attached.

    A `dmdata.reading.reader.Spool`. Its size is that of the largest read so far.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._records: _Records | None = None
        self._path: Path | None = None
        self._file: _Descriptor | None = None

    def attach(self, path: Path, key: str, n_bytes: int) -> None:
        """Keep what the next read receives in files that begin with `path`, and take what is there of the same read.

        Room for all of it is taken at once, so that a full disk is met before anything is paid for. Where another
        process has the files, or the file system knows no locks, nothing is kept.

        Parameters
        ----------
        path : Path
        key : str
            See `read_key`.
        n_bytes : int
            Wanted bytes of the read.

        Raises
        ------
        OSError
            If the files cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        records = _Records.open(path.with_name(f"{path.name}.ranges"), key)
        if records is None:
            self._forget_file()
            return
        try:
            file = self._open(path.with_name(f"{path.name}.bytes"))
            # what is there already may be longer, and is used again
            take_room(file.number, max(n_bytes, os.fstat(file.number).st_size))
            records.recall(file.number, self.product(n_bytes))
        except OSError as error:
            if records.is_empty:
                records.remove()
                path.with_name(f"{path.name}.bytes").unlink(missing_ok=True)
            records.close()
            self._forget_file()
            if error.errno not in _NOT_OFFERED:
                raise
            return
        self._records = records

    def detach(self) -> None:
        """Release the files; what was received and is not written for good stays in them."""
        if self._records:
            self._records.close()
        elif self._path:
            self._path.unlink(missing_ok=True)
        self._forget_file()

    def discard(self) -> None:
        """Remove the record of what was received, because it is written for good; the file is used again."""
        if self._records:
            self._records.remove()
        self._records = None

    def product(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Return the memory; see `dmdata.reading.reader.Spool`."""
        if len(self._memory) < n_bytes:
            self._memory = np.empty(n_bytes, np.uint8)
        return self._memory[:n_bytes]

    def has(self, nth: int) -> bool:
        """Whether a range is in memory already."""
        return self._records is not None and nth in self._records.landed

    def landed(self, nth: int, start: int, stop: int) -> None:
        """Keep a range that is in memory now.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        records, file = self._records, self._file
        if records and file:
            received = self._memory[start:stop]
            _write_all(file.number, received.data, start)
            records.keep(nth, start, stop, received)

    def _open(self, path: Path) -> "_Descriptor":
        """Open the file that is there, else the last one under its new name, else a new one."""
        if self._file and self._path and not path.exists():
            self._path.rename(path)
        else:
            self._forget_file()
            self._file = _Descriptor(path)
        self._path = path
        return self._file

    def _forget_file(self) -> None:
        self._records = self._path = self._file = None


class _Descriptor:
    """A file that is closed when nobody has it any more: a thread that could not be waited for may write to it yet."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def sweep(directory: Path) -> None:
    """Remove files of which nothing is on record: a killed process may leave one for each read under way."""
    for path in directory.glob("*.bytes"):
        if not path.with_suffix(".ranges").exists():
            path.unlink(missing_ok=True)


def take_room(descriptor: int, n_bytes: int) -> None:
    """Set the size of a file, with the disk's blocks allocated, so that a full disk fails now and not half-way.

    Raises
    ------
    OSError
        If the disk has not as much room.
    """
    os.ftruncate(descriptor, n_bytes)
    try:
        os.posix_fallocate(descriptor, 0, n_bytes)
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise


class _Records:
    """Which ranges of a read are in its file. One process has it; the system lets go of it when the process dies."""

    def __init__(self, path: Path, descriptor: int, head: bytes) -> None:
        self._path, self._descriptor, self._head = path, descriptor, head
        self._end = len(head)
        self._lock = threading.Lock()
        self.landed: set[int] = set()

    @classmethod
    def open(cls, path: Path, key: str) -> "_Records | None":
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NOT_OFFERED:
                os.close(descriptor)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    return None
                raise
        return cls(path, descriptor, hashlib.sha256(key.encode()).digest())

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever entered, of this read or another."""
        return os.fstat(self._descriptor).st_size <= len(self._head)

    def recall(self, file: int, memory: npt.NDArray[np.uint8]) -> None:
        """Read what is whole of the same read from its file into memory; write on behind it, over anything else."""
        stored = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
        if stored[: self._end] != self._head:
            stored = self._head
            os.ftruncate(self._descriptor, 0)
            _write_all(self._descriptor, self._head, 0)
        while record := stored[self._end : self._end + _RECORD.size]:
            if len(record) < _RECORD.size:
                break
            nth, start, stop, checksum, own_checksum = _RECORD.unpack(record)
            if google_crc32c.value(record[:-4]) != own_checksum or not start <= stop <= len(memory):
                break
            self._end += len(record)
            received = memory[start:stop]
            if os.preadv(file, [received.data], start) == len(received) and _checksum(received) == checksum:
                self.landed.add(nth)

    def keep(self, nth: int, start: int, stop: int, received: npt.NDArray[np.uint8]) -> None:
        """Enter a range whose bytes are in the file."""
        record = _RECORD.pack(nth, start, stop, _checksum(received), 0)[:-4]
        record += google_crc32c.value(record).to_bytes(4, "little")
        with self._lock:
            # a thread that could not be waited for may come when the read has long ended
            if self._descriptor >= 0:
                _write_all(self._descriptor, record, self._end)
                self._end += len(record)
                self.landed.add(nth)

    def close(self) -> None:
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
            self._descriptor = -1

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
        self.close()


def _write_all(descriptor: int, data: bytes | memoryview, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], at + done)


def _checksum(data: npt.NDArray[np.uint8]) -> int:
    # it takes nothing but bytes objects, and a range may be long
    checksum = 0
    for start in range(0, len(data), _PIECE_BYTES):
        checksum = google_crc32c.extend(checksum, data[start : start + _PIECE_BYTES].tobytes())
    return int(checksum)
