"""What a read has received, kept in a file until it is written for good: whoever is killed does not pay it again.

Each range is written to the file as it lands, then a record of it with a checksum. Whoever begins the same read again
finds the ranges whose records and bytes are whole. Records are bound to the read that they belong to: another object,
selection or plan begins anew.
"""

import contextlib
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

from dmdata.plan import ReadPlan

# range, first and last byte in the product, checksums of these bytes and of the record itself
_RECORD = struct.Struct("<QQQII")
_PIECE_BYTES = 256 << 10


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
    """The memory that one read after the other lands in; with a file behind it, for as long as one is attached.

    A `dmdata.fetch.Spool`. Its size is that of the largest read so far.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._file: _SpoolFile | None = None

    def attach(self, path: Path, key: str, n_bytes: int) -> None:
        """Keep what the next read receives in files that begin with `path`, and take what is there of the same read.

        Room for all of it is taken at once, so that a full disk is met before anything is paid for. Where another
        process has the files, nothing is kept.

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
        self.detach()
        self._file = _SpoolFile.open(path, key, self.product(n_bytes))

    def detach(self) -> None:
        """Let go of the files; what was received stays in them."""
        if self._file:
            self._file.close()
        self._file = None

    def discard(self) -> None:
        """Remove the files: what was received is written for good."""
        if self._file:
            self._file.remove()
        self.detach()

    def product(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Give the memory; see `dmdata.fetch.Spool`."""
        if len(self._memory) < n_bytes:
            self._memory = np.empty(n_bytes, np.uint8)
        return self._memory[:n_bytes]

    def has(self, nth: int) -> bool:
        """Tell whether a range is in memory already."""
        return self._file is not None and nth in self._file.landed

    def landed(self, nth: int, start: int, stop: int) -> None:
        """Keep a range that is in memory now."""
        if self._file:
            self._file.keep(nth, start, stop, self._memory[start:stop])


class _SpoolFile:
    """The bytes of one read as far as they have landed, and beside them the records of which these are."""

    def __init__(self, path: Path, bytes_file: int, records_file: int) -> None:
        self._paths = _paths(path)
        self._bytes_file, self._records_file = bytes_file, records_file
        self._lock = threading.Lock()
        self._is_open = True
        self._end = 0
        self.landed: set[int] = set()

    @classmethod
    def open(cls, path: Path, key: str, memory: npt.NDArray[np.uint8]) -> "_SpoolFile | None":
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            files = []
            for name in _paths(path):
                files.append(os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
                stack.callback(os.close, files[-1])
            if not _is_ours_alone(files[1]):
                return None
            _take_room(files[0], len(memory))
            file = cls(path, *files)
            file._recall(key.encode(), memory)
            stack.pop_all()
        return file

    def keep(self, nth: int, start: int, stop: int, received: npt.NDArray[np.uint8]) -> None:
        checksum = _checksum(received)
        with self._lock:
            # a thread that could not be waited for may come when the read has long ended
            if not self._is_open:
                return
            _write_all(self._bytes_file, received.data, start)
            record = _RECORD.pack(nth, start, stop, checksum, 0)[:-4]
            record += google_crc32c.value(record).to_bytes(4, "little")
            _write_all(self._records_file, memoryview(record), self._end)
            self._end += len(record)
            self.landed.add(nth)

    def close(self) -> None:
        with self._lock:
            if self._is_open:
                os.close(self._bytes_file)
                os.close(self._records_file)
            self._is_open = False

    def remove(self) -> None:
        for path in reversed(self._paths):
            path.unlink(missing_ok=True)

    def _recall(self, key: bytes, memory: npt.NDArray[np.uint8]) -> None:
        """Take into memory what is whole of the same read; write on behind it, over anything else."""
        head = hashlib.sha256(key).digest()
        stored = os.pread(self._records_file, os.fstat(self._records_file).st_size, 0)
        whole = len(head)
        if stored[:whole] != head:
            stored = head
            os.ftruncate(self._records_file, 0)
            _write_all(self._records_file, memoryview(head), 0)
        for at in range(whole, len(stored) - _RECORD.size + 1, _RECORD.size):
            record = stored[at : at + _RECORD.size]
            nth, start, stop, checksum, own_checksum = _RECORD.unpack(record)
            if google_crc32c.value(record[:-4]) != own_checksum or stop > len(memory) or start > stop:
                break
            whole = at + _RECORD.size
            n_read = os.preadv(self._bytes_file, [memory[start:stop].data], start)
            if n_read == stop - start and _checksum(memory[start:stop]) == checksum:
                self.landed.add(nth)
        self._end = whole


def _paths(path: Path) -> tuple[Path, Path]:
    return path.with_name(f"{path.name}.bytes"), path.with_name(f"{path.name}.ranges")


def _is_ours_alone(descriptor: int) -> bool:
    """Lock a file until it is closed; the system lets go of it when the process dies."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
    return True


def _take_room(descriptor: int, n_bytes: int) -> None:
    os.ftruncate(descriptor, n_bytes)
    try:
        if n_bytes:
            os.posix_fallocate(descriptor, 0, n_bytes)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
            raise


def _write_all(descriptor: int, data: memoryview, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], at + done)


def _checksum(data: npt.NDArray[np.uint8]) -> int:
    # it takes nothing but bytes objects, and a range may be long
    checksum = 0
    for start in range(0, len(data), _PIECE_BYTES):
        checksum = google_crc32c.extend(checksum, data[start : start + _PIECE_BYTES].tobytes())
    return int(checksum)
