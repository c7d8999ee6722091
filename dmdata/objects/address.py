"""Where an object is, what a reader of it promises, and the errors all readers share.

An `Address` travels between processes and holds no credentials; written out it shows no user, password or query.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias
from urllib.parse import unquote_to_bytes

import numpy as np
import numpy.typing as npt

from dmdata.errors import IntegrityError, SourceError


@dataclass(frozen=True, slots=True)
class Address:
    """Where one object is, and on what terms. Holds no credentials.

    Attributes
    ----------
    url : str
        ``s3://bucket/key``, an absolute path, or any URL that fsspec reads.
    requester_pays : bool
        Whether the reader is charged: then reads go through budget and ledger.
    region : str or None
        Of the bucket; None asks the bucket.
    listed : bool
        Whether a catalog lists the object: distinguishes a missing key from missing rights where both answer 403.
    version : str or None
        Of an object in a bucket that keeps versions; None for the newest.
    """

    url: str
    requester_pays: bool = False
    region: str | None = None
    listed: bool = False
    version: str | None = None

    def __str__(self) -> str:
        """Write the address as it may be shown and stored: a user, password or query may hold a secret."""
        if self.is_local:
            return self.url
        if self.is_s3:  # a key is no URL: it may hold any character
            bucket, slash, key = self.url.removeprefix("s3://").partition("/")
            version = f"?versionId={self.version}" if self.version else ""
            return f"s3://{bucket.rpartition('@')[2]}{slash}{key}{version}"
        # not by urlsplit: a chain of URLs ("zip://x.npy::https://...") has several users and hosts
        url = self.url if self.url.startswith("github:") else re.sub(r"://[^/?#]*@", "://", self.url)
        return re.sub(r"(?s)[?#].*", "", url)

    @property
    def is_s3(self) -> bool:
        """Whether S3's own client reads it."""
        return self.url.startswith("s3://")

    @property
    def is_local(self) -> bool:
        """Whether it is a file of this machine."""
        return "://" not in self.url or self.url[:7].lower() == "file://"

    @property
    def is_web(self) -> bool:
        """Whether it is an http or https URL."""
        return self.url[:8].lower().startswith(("http://", "https://"))

    @property
    def local_path(self) -> Path:
        """The file of this machine: a path as it is, a ``file://`` URL decoded (RFC 8089).

        Raises
        ------
        SourceError
            If the URL names another machine, or no absolute path.
        """
        if self.url[:7].lower() != "file://":
            return Path(self.url)
        host, slash, path = self.url[7:].partition("/")
        if host.lower() not in ("", "localhost", "127.0.0.1", "[::1]") or not slash:
            raise SourceError(
                f"{self.url} names a file of the host {host!r}, not of this machine; write file:///PATH, or the path",
                url=self.url,
            )
        return Path(os.fsdecode(unquote_to_bytes(f"/{path}")))


def split_version(url: str) -> tuple[str, str | None]:
    """Split ``?versionId=ID`` off an S3 address; a question mark before anything else belongs to the key.

    Raises
    ------
    SourceError
        If a version is named together with something else, which would be dropped.
    """
    key, mark, query = url.rpartition("?")
    if not mark or "versionId=" not in query:
        return url, None
    name, _, version = query.partition("=")
    if name != "versionId" or not version or "&" in version:
        raise SourceError(
            f"{url} names a version and something else; write it like s3://bucket/key?versionId=ID",
            url=url,
        )
    return key, version


@dataclass(frozen=True, slots=True)
class ObjectState:
    """Size and identity of an object at one moment.

    Attributes
    ----------
    n_bytes : int
    etag : str or None
        None where the store has none.
    charged : bool or None
        Whether the store said that it charges the reader (``x-amz-request-charged``); None where it was not asked.
    encoding : str or None
        How its bytes are encoded ("gzip"), where that is not how they were saved.
    """

    n_bytes: int
    etag: str | None
    charged: bool | None = None
    encoding: str | None = None


SHORT_RANGE_BYTES = 256 << 10
"""A shorter range is read as one piece: fewer calls, and little to lose where it breaks."""

Buffer: TypeAlias = bytes | memoryview
"""Bytes by the buffer protocol, whatever holds them."""

Put: TypeAlias = Callable[[npt.NDArray[np.uint8]], None]
"""Takes the next bytes of a range; they are the callee's only until it returns."""


class Source(Protocol):
    """One object's bytes."""

    @property
    def address(self) -> Address:
        """Where the object is."""

    @property
    def most_at_once(self) -> int:
        """How many short ranges can be asked for at a time, by all threads together."""

    @property
    def pieces_at_once(self) -> int:
        """How many of them `pieces` asks for at a time."""

    def start(self, n_bytes: int) -> tuple[bytes, ObjectState]:
        """Read up to `n_bytes` from the start, in one request, with the object's size and etag.

        Raises
        ------
        ObjectMissingError, AccessError, SourceError
        """

    def piece(self, start: int, stop: int, *, etag: str | None) -> Buffer:
        """Read a short range in one request, and one piece; raises as `read` does."""

    def pieces(self, starts: Sequence[int], stops: Sequence[int], *, etag: str | None) -> Sequence[Buffer]:
        """Read short ranges, each in one request; raises as `read` does, if only one of them fails."""

    def read(self, start: int, stop: int, *, etag: str | None, put: Put, stopped: Callable[[], bool]) -> None:
        """Read a range in one request, handing over its bytes in order as they arrive; all of them, unless `stopped`.

        Raises
        ------
        IntegrityError
            If the object's etag is not the one given.
        SourceError
            If the transfer broke; `transient` states whether to try again.

        Notes
        -----
        The fact `refused` of an error says that the store answered with an error instead of the object's bytes, so that
        none of those can be billed; `whole` that it began to send the whole object.
        """


class ByPieces:
    """Makes the pieces of a source by its `read`."""

    __slots__ = ()

    @property
    def most_at_once(self) -> int:
        """As many connections as the pools of boto3 and fsspec's clients are good for."""
        return 32

    @property
    def pieces_at_once(self) -> int:
        """One after the other."""
        return 1

    def piece(self: "Source", start: int, stop: int, *, etag: str | None) -> Buffer:
        """Read a short range in one request, and one piece."""
        parts: list[bytes] = []
        self.read(start, stop, etag=etag, put=lambda chunk: parts.append(chunk.tobytes()), stopped=lambda: False)
        return b"".join(parts)

    def pieces(self: "Source", starts: Sequence[int], stops: Sequence[int], *, etag: str | None) -> Sequence[Buffer]:
        """Read short ranges, one after the other."""
        return [self.piece(start, stop, etag=etag) for start, stop in zip(starts, stops, strict=True)]


def changed(address: Address, *, refused: bool = False) -> IntegrityError:
    """State that an object is not the one that was read before."""
    return IntegrityError(
        f"{address} changed since it was first read, so what was read before does not belong to it; "
        "open it again and read it again",
        url=str(address),
        refused=refused,
    )


def ended_short(address: Address, at: int, *, transient: bool) -> SourceError:
    """State that an object has fewer bytes than were asked for."""
    return SourceError(
        f"{address} ended at byte {at}, inside the range that was asked for",
        url=str(address),
        transient=transient,
        refused=True,  # what was sent of it has arrived
    )


class PastEndError(SourceError):
    """A range begins past the end of its object, of `object_bytes` where the server says so."""

    object_bytes: int | None = None


def past_end(address: Address, object_bytes: int | None = None) -> PastEndError:
    """State that an object ends before the range that was asked for."""
    return PastEndError(
        f"{address} ended before the range that was asked for",
        url=str(address),
        refused=True,
        object_bytes=object_bytes,
    )
