"""Where bytes come from: S3 and the web, local files, and any other URL through fsspec.

Errors of the libraries below are translated once, and say what to do; no key or token is ever in one. Nothing here
knows of money: that is `fetch`'s.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from dmdata.address import Address, ByPieces, ObjectState, Put, Source, changed, ended_short
from dmdata.errors import AccessError, ObjectMissingError, SourceError
from dmdata.s3 import s3_source, web_source
from dmdata.settings import settings

_LOCAL_CHUNK_BYTES = 512 << 10


def connect(address: Address) -> Source:
    """Make the reader of one object, its client and credentials included; sends nothing to the object.

    Raises
    ------
    AccessError
        If credentials are needed and there are none, or the AWS configuration cannot be used.
    SourceError
        If the address cannot be read, or is remote and ``DMDATA_OFFLINE`` is set.
    """
    if address.is_local:
        return _LocalSource(address)
    if settings().offline:
        raise SourceError(
            f"{address} is remote and DMDATA_OFFLINE is set, or offline in the config file; unset it to read",
            url=str(address),
            transient=False,
        )
    if address.is_s3:
        return s3_source(address)
    web = web_source(address) if address.url.startswith(("http://", "https://")) else None
    return web or _FsspecSource(address)


@dataclass(frozen=True, slots=True)
class _LocalSource(ByPieces):
    address: Address

    def start(self, n_bytes: int) -> tuple[bytes, ObjectState]:
        path = _local_path(self.address.url)
        try:
            with path.open("rb") as file:
                return file.read(n_bytes), _state_of_file(file.fileno())
        except OSError as error:
            raise _os_error(self.address, error) from error

    def read(self, start: int, stop: int, *, etag: str | None, put: Put, stopped: Callable[[], bool]) -> None:
        # small enough to stay in the processor's cache between the two copies
        buffer = np.empty(min(stop - start, _LOCAL_CHUNK_BYTES), np.uint8)
        try:
            with _local_path(self.address.url).open("rb", buffering=0) as file:
                if etag is not None and _state_of_file(file.fileno()).etag != etag:
                    raise changed(self.address)
                file.seek(start)
                while start < stop and not stopped():
                    n_read = file.readinto(buffer[: stop - start].data)
                    if not n_read:
                        raise ended_short(self.address, start, transient=False)
                    put(buffer[:n_read])
                    start += n_read
        except OSError as error:
            if isinstance(error, SourceError):
                raise
            raise _os_error(self.address, error) from error


def _local_path(url: str) -> Path:
    return Path(url.removeprefix("file://"))


def _state_of_file(descriptor: int) -> ObjectState:
    facts = os.fstat(descriptor)
    return ObjectState(facts.st_size, f"{facts.st_ino:x}-{facts.st_mtime_ns:x}-{facts.st_size:x}")


@dataclass(frozen=True, slots=True)
class _FsspecSource(ByPieces):
    """Any store fsspec knows; identity is its etag, checksum or time, asked before each read."""

    address: Address

    def start(self, n_bytes: int) -> tuple[bytes, ObjectState]:
        state = self._state()
        return self._cat(0, min(n_bytes, state.n_bytes)), state

    def read(self, start: int, stop: int, *, etag: str | None, put: Put, stopped: Callable[[], bool]) -> None:
        if stopped():
            return
        if etag is not None and self._state().etag != etag:
            raise changed(self.address)
        data = self._cat(start, stop)[: stop - start]
        put(np.frombuffer(data, np.uint8))
        if len(data) != stop - start:
            raise ended_short(self.address, start + len(data), transient=True)

    def _state(self) -> ObjectState:
        filesystem, path = self._open()
        try:
            facts = filesystem.info(path)
        except (OSError, ValueError) as error:
            raise _os_error(self.address, error) from error
        identity = [facts.get(name) for name in ("ETag", "etag", "checksum", "mtime", "LastModified", "created")]
        identity = [str(value) for value in identity if value is not None]
        return ObjectState(int(facts["size"] or 0), identity[0] if identity else None)

    def _cat(self, start: int, stop: int) -> bytes:
        filesystem, path = self._open()
        try:
            return bytes(filesystem.cat_file(path, start=start, end=stop)) if stop > start else b""
        except (OSError, ValueError) as error:
            raise _os_error(self.address, error) from error

    def _open(self) -> tuple[Any, str]:
        try:
            filesystem, path = fsspec.url_to_fs(self.address.url)
        except (ValueError, TypeError, KeyError, ImportError) as error:
            raise SourceError(
                f"no reader for {self.address}: {error}", url=str(self.address), transient=False
            ) from error
        return filesystem, path


def _os_error(address: Address, error: Exception) -> SourceError | AccessError:
    if isinstance(error, FileNotFoundError):
        return ObjectMissingError(f"nothing is at {address}; check the name", url=str(address), transient=False)
    if isinstance(error, PermissionError):
        return AccessError(f"{address} may not be read by this user", url=str(address), cause="denied")
    transient = isinstance(error, ConnectionError | TimeoutError)
    reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
    return SourceError(f"{address} could not be read: {reason}", url=str(address), transient=transient)
