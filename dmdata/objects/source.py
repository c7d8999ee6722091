"""Where bytes come from: S3 and the web, local files, and any other URL through fsspec.

Errors of the libraries below are translated once, and state what to do; none contains a key or token. Nothing here
knows of money: that is `fetch`'s.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np

from dmdata.errors import AccessError, DmdataError, ObjectMissingError, SourceError
from dmdata.objects.address import Address, ByPieces, ObjectState, Put, Source, changed, ended_short
from dmdata.objects.http.web import web_source
from dmdata.objects.s3 import s3_source
from dmdata.settings import Settings, settings

_LOCAL_CHUNK_BYTES = 512 << 10


def connect(address: Address, *, known: Settings | None = None) -> Source:
    """Make the reader of one object, its client and credentials included; sends nothing to the object.

    Parameters
    ----------
    address : Address
    known : Settings, optional
        Those in force, where they have just been read; by default they are read.

    Raises
    ------
    AccessError
        If credentials are needed and there are none, or the AWS configuration cannot be used.
    SourceError
        If the address cannot be read, or is remote and ``DMDATA_OFFLINE`` is set.
    """
    if address.is_local:
        return _LocalSource(address)
    if (known or settings()).offline:
        raise SourceError(
            f"{address} is remote and DMDATA_OFFLINE is set, or offline in the config file; unset it to read",
            url=str(address),
        )
    if address.is_s3:
        return s3_source(address)
    return web_source(address) if address.is_web else _FsspecSource(address)


@dataclass(frozen=True, slots=True)
class _LocalSource(ByPieces):
    address: Address

    def start(self, n_bytes: int) -> tuple[bytes, ObjectState]:
        path = self.address.local_path
        try:
            with path.open("rb") as file:
                return file.read(n_bytes), _state_of_file(file.fileno())
        except OSError as error:
            raise _os_error(self.address, error) from error

    def read(self, start: int, stop: int, *, etag: str | None, put: Put, stopped: Callable[[], bool]) -> None:
        # small enough to stay in the processor's cache between the two copies
        buffer = np.empty(min(stop - start, _LOCAL_CHUNK_BYTES), np.uint8)
        try:
            with self.address.local_path.open("rb", buffering=0) as file:
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
        with self._in_words():
            filesystem, path = self._open()
            facts = filesystem.info(path)
        identity = [facts.get(name) for name in ("ETag", "etag", "checksum", "mtime", "LastModified", "created")]
        identity = [str(value) for value in identity if value is not None]
        return ObjectState(int(facts["size"] or 0), identity[0] if identity else None)

    def _cat(self, start: int, stop: int) -> bytes:
        with self._in_words():
            filesystem, path = self._open()
            return bytes(filesystem.cat_file(path, start=start, end=stop)) if stop > start else b""

    def _open(self) -> tuple[Any, str]:
        try:
            filesystem, path = fsspec.url_to_fs(self.address.url)
        except ImportError as error:
            raise _not_installed(self.address, error) from None
        except (ValueError, TypeError, KeyError) as error:
            # their texts may quote the whole URL
            words = f": {error}" if str(error).startswith("Protocol not known") else ""
            raise SourceError(
                f"no reader for {self.address}{words}; check what the address begins with",
                url=str(self.address),
            ) from None
        return filesystem, path

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except DmdataError:
            raise
        except Exception as error:  # noqa: BLE001 - each of fsspec's stores has errors of its own, of any kind
            raise _os_error(self.address, error) from None


def _not_installed(address: Address, error: ImportError) -> SourceError:
    """State what to install for a store: fsspec's error names it in prose, its cause by the module."""
    protocol = address.url.partition("://")[0]
    cause = error if error.name else error.__cause__ or error.__context__
    module = (getattr(cause, "name", None) or "").partition(".")[0]
    package = _PACKAGES.get(module, module.replace("_", "-"))
    if protocol in ("s3a", "s3n"):
        remedy = "write s3:// instead"
    else:
        remedy = f"pip install {package}" if package else f"fsspec says: {error}"
    return SourceError(f"{address} is read by a package that is not installed here; {remedy}", url=str(address))


# where the package is not called as its module is, or one alone is not enough
_PACKAGES = {"libarchive": "libarchive-c", "aiohttp": "requests aiohttp", "requests": "requests aiohttp"}


def _os_error(address: Address, error: Exception) -> SourceError | AccessError:
    answer = getattr(error, "response", None)
    statuses = [getattr(error, "status", None), getattr(error, "code", None), getattr(answer, "status_code", None)]
    status = next((int(str(one)) for one in statuses if str(one).isdigit()), None)
    if isinstance(error, FileNotFoundError) or status == 404:
        return ObjectMissingError(f"nothing is at {address}; check the name", url=str(address))
    if isinstance(error, PermissionError) or status in (401, 403):
        return AccessError(f"{address} may not be read by this user", url=str(address), cause="denied")
    kind = type(error).__name__
    if "Credential" in kind or kind.endswith("AuthError"):
        return AccessError(
            f"{address} could not be asked for: no credentials for it were found ({kind}); log in as its store's own "
            "tools do",
            url=str(address),
            cause="no_credentials",
        )
    transient = isinstance(error, ConnectionError | TimeoutError) or status == 429 or (status or 0) >= 500
    reason = error.strerror if isinstance(error, OSError) and error.strerror else kind
    return SourceError(f"{address} could not be read: {reason}", url=str(address), transient=transient)
