"""The directory of a zip archive, and where its members' bytes lie: what ``.pt`` and ``.npz`` are kept in.

Python's own reader understands the directory, which is at the end; members are then found by ranges. The bytes of a
member begin behind a header of unknown length. That header is read, unless the way torch aligns its members tells the
same as where the next one begins.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dmdata.errors import FormatError
from dmdata.layout.layouts import ReadAt

TAIL_BYTES = 4096
"""What is read from the end of an archive: the directory of a few members; a longer one is read on."""

_LARGEST_DIRECTORY = 64 << 20
# bits 0, 5, 6 and 13 of a zip member's flags, by PKWARE's APPNOTE 4.4.4
_ENCRYPTED_OR_PATCHED = 0x2061
_LOCAL_HEADER_BYTES = 30
# what a header of a large member has beyond the padding: its 64-bit sizes and offset
_ZIP64_BYTES = 32
# what zipfile and struct raise for bytes that are not a sound archive
DAMAGED_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    MemoryError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
)


@dataclass(frozen=True, slots=True)
class Member:
    """A member of an archive, by the directory.

    Attributes
    ----------
    info : zipfile.ZipInfo
    stop : int
        Where its part of the archive ends: where the next one, or the directory, begins.
    """

    info: zipfile.ZipInfo
    stop: int

    @property
    def is_stored(self) -> bool:
        """Whether its bytes are in the archive as they are."""
        info = self.info
        is_plain = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & _ENCRYPTED_OR_PATCHED
        return is_plain and info.compress_size == info.file_size

    @property
    def _name_bytes(self) -> int:
        return len(self.info.orig_filename.encode("utf-8" if self.info.flag_bits & 0x800 else "cp437"))

    @property
    def _descriptor_sizes(self) -> tuple[int, ...]:
        """How many bytes of checksum and sizes may follow its data: with 8-byte sizes in a large archive."""
        if not self.info.flag_bits & 8:
            return (0,)
        return (16, 24) if max(self.info.file_size, self.info.header_offset) >= 2**32 - 1 else (16,)

    def start_if_aligned(self, alignment: int) -> int | None:
        """Find the first byte by the directory alone, where torch wrote the archive; None where it did not.

        Two things must agree to the byte: where the next member begins, and the alignment, by which torch makes the
        header before a member just as long as is needed.
        """
        least = self.info.header_offset + _LOCAL_HEADER_BYTES + self._name_bytes + 4
        for descriptor_bytes in self._descriptor_sizes:
            start = self.stop - descriptor_bytes - self.info.file_size
            if start % alignment == 0 and 0 <= start - least < alignment + _ZIP64_BYTES * (self.stop >= 2**32 - 1):
                return start
        return None

    def start_by(self, header: bytes, url: str) -> int:
        """Find the first byte by the header before the member; it must agree with where the next one begins."""
        if len(header) < _LOCAL_HEADER_BYTES:
            raise _damaged(self, url)
        signature, name_bytes, extra_bytes = struct.unpack("<I22xHH", header[:_LOCAL_HEADER_BYTES])
        start: int = self.info.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        descriptor_bytes = self.stop - start - self.info.file_size
        if signature != 0x04034B50 or name_bytes != self._name_bytes or descriptor_bytes not in self._descriptor_sizes:
            raise _damaged(self, url)
        return start


class Archive:
    """A zip archive in an object.

    Parameters
    ----------
    read_at : callable
        Called for the last 32 KiB, for more where the directory is longer, and for what is asked of the members.
    object_bytes : int
    url : str
        Names the object in errors.

    Attributes
    ----------
    members : dict of str to Member
        By name, in the directory's order.

    Raises
    ------
    FormatError, or one of `DAMAGED_ZIP`
        If it is not a sound archive.
    """

    def __init__(self, read_at: ReadAt, *, object_bytes: int, url: str) -> None:
        self._read_at, self._url = read_at, url
        file = io.BufferedReader(_RangeFile(read_at, object_bytes, url), buffer_size=4096)
        with zipfile.ZipFile(file) as archive:
            infos, end = archive.infolist(), archive.start_dir
        in_order = sorted(infos, key=lambda info: info.header_offset)
        stops = [*(info.header_offset for info in in_order[1:]), end]
        by_offset = {id(info): stop for info, stop in zip(in_order, stops, strict=True)}
        self.members = {info.filename: Member(info, by_offset[id(info)]) for info in infos}

    def start_of(self, member: Member, *, alignment: int = 0) -> int:
        """Find the first byte of a member, by its alignment if it has one, else by the header before it."""
        start = member.start_if_aligned(alignment) if alignment else None
        if start is not None:
            return start
        offset = member.info.header_offset
        return member.start_by(bytes(self._read_at(offset, offset + _LOCAL_HEADER_BYTES)), self._url)

    def contents(self, members: Iterable[Member]) -> list[bytes]:
        """Read small members whole, in one read where they lie next to each other; checks their checksums."""
        wanted = list(members)
        first = min(member.info.header_offset for member in wanted)
        stop = max(member.stop for member in wanted)
        if stop - first > sum(member.stop - member.info.header_offset for member in wanted) + (4 << 10):
            return [content for member in wanted for content in self.contents([member])]
        data = bytes(self._read_at(first, stop))
        found = []
        for member in wanted:
            start = member.start_by(data[member.info.header_offset - first :], self._url) - first
            content = data[start : start + member.info.file_size]
            if len(content) < member.info.file_size or zlib.crc32(content) != member.info.CRC:
                raise _damaged(member, self._url)
            found.append(content)
        return found


def _damaged(member: Member, url: str) -> FormatError:
    return FormatError(f"{url} is damaged at its member {member.info.filename[:100]}; fetch it again", url=url)


class _RangeFile(io.RawIOBase):
    """A seekable file over `read_at`, for zipfile; the tail, where a zip keeps its directory, is read once."""

    def __init__(self, read_at: ReadAt, size: int, url: str) -> None:
        self._read_at = read_at
        self._size = size
        self._url = url
        self._position = 0
        self._tail_start = max(size - TAIL_BYTES, 0)
        self._tail: bytes | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        start, stop = self._position, min(self._position + len(buffer), self._size)
        if start >= stop:
            return 0
        if stop - start > _LARGEST_DIRECTORY:
            raise FormatError(
                f"{self._url} claims a zip directory of {stop - start:,} bytes; {_LARGEST_DIRECTORY:,} at most",
                url=self._url,
            )
        if start >= self._tail_start:
            if self._tail is None:
                self._tail = bytes(self._read_at(self._tail_start, self._size))
            data = self._tail[start - self._tail_start : stop - self._tail_start]
        else:
            data = bytes(self._read_at(start, stop))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
