"""Where a copy is written: a local directory, or a prefix in a bucket of one's own. Either is a Zarr store.

What a copy has received and not yet written is kept in a directory of this machine: inside the local copy itself, or
below ``DMDATA_HOME`` for a copy in a bucket.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import obstore
import obstore.exceptions
import zarr.errors
from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.storage import LocalStore, ObjectStore

from dmdata.errors import AccessError, DmdataError
from dmdata.money.ledger import home
from dmdata.objects.s3 import writable_store
from dmdata.reading.locks import only_process_at

SPOOL = "spool"
"""Directory, inside a local copy under way, of what was received and is not written yet."""

LEASE = "lease.json"
"""Object, inside a copy under way in a bucket, that says who is writing it."""

_FOREIGN_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    zarr.errors.BaseZarrError,
)
_LEASE_SECONDS = 900.0
_RENEWAL_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Place:
    """A directory or an S3 prefix. Pickles without credentials.

    Attributes
    ----------
    url : str
        Absolute path, or ``s3://bucket/prefix``.
    """

    url: str

    @classmethod
    def of(cls, destination: "str | os.PathLike[str] | Place") -> "Place":
        """Read a destination as users write it.

        Raises
        ------
        DmdataError
            If it is an address that is not written to.
        """
        if isinstance(destination, Place):
            return destination
        text = os.fspath(destination)
        if text.startswith("s3://"):
            return cls(text.rstrip("/"))
        if "://" in text.removeprefix("file://"):
            raise DmdataError(f"{text} is not a place to write to; give a local path or s3://bucket/prefix")
        return cls(os.path.abspath(os.path.expanduser(text.removeprefix("file://"))))

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "Place":
        return Place(f"{self.url}/{name}")

    @property
    def is_s3(self) -> bool:
        """Whether it is in a bucket."""
        return self.url.startswith("s3://")

    def store(self, *, read_only: bool = False) -> Store:
        """Open the Zarr store whose root is here; nothing is made.

        Raises
        ------
        AccessError, SourceError
            For a bucket, without credentials for it.
        """
        if self.is_s3:
            return ObjectStore(writable_store(self.url), read_only=read_only)
        return LocalStore(self.url, read_only=read_only)

    def names(self) -> set[str]:
        """List what is directly inside: nothing, where nothing is there yet.

        Raises
        ------
        OSError
            If a file is in its place.
        """
        if not self.is_s3:
            return set(os.listdir(self.url)) if os.path.lexists(self.url) else set()

        async def listed() -> set[str]:
            return {name.rstrip("/") async for name in self.store(read_only=True).list_dir("")}

        return sync(listed())

    def spool_directory(self) -> Path:
        """State where this machine keeps what was received for a copy here and is not written yet."""
        if self.is_s3:
            return home() / "spools" / hashlib.sha256(self.url.encode()).hexdigest()
        return Path(self.url) / SPOOL

    @contextlib.contextmanager
    def claimed(self) -> Iterator[Callable[[], None]]:
        """Hold the place while the block runs; yields what to call now and then, to hold on.

        Who shares ``DMDATA_HOME`` is kept out by a lock that ends with its process. A bucket may be written from
        anywhere, so there a lease lies next to the copy; a writer that dies leaves it, and it expires.

        Raises
        ------
        DmdataError
            If somebody else holds it.
        """
        with only_process_at(Path(self.url) if not self.is_s3 else self.url):
            if not self.is_s3:
                Path(self.url).parent.mkdir(parents=True, exist_ok=True)
                yield lambda: None
                return
            lease = _Lease(self)
            lease.take()
            try:
                yield lease.renew
            finally:
                lease.give_back()

    @contextlib.contextmanager
    def explain_errors(self, what: str = "written") -> Iterator[None]:
        """Turn what files, stores and Zarr raise into one error that names this place.

        Raises
        ------
        DmdataError
        """
        try:
            yield
        except DmdataError:
            raise
        except obstore.exceptions.BaseError as error:
            raise self._refused(what, error) from None
        except _FOREIGN_ERRORS as error:
            raise self._failed(what, str(error) or type(error).__name__) from error

    def _refused(self, what: str, error: Exception) -> DmdataError:
        """State what a bucket's store refused; its text may quote keys, so neither is it quoted nor chained."""
        found = re.search(r"status code: (\d{3})", str(error)), re.search(r"<Code>(\w+)</Code>", str(error))
        answer = " ".join(match[1] for match in found if match)
        if "403" not in answer:
            kind = type(error).__name__.removesuffix("Error")
            return self._failed(what, f"the store answers {answer or kind}; check the bucket's name and the endpoint")
        return AccessError(
            f"{self} may not be {what} ({answer}); these credentials need s3:ListBucket, s3:GetObject, "
            "s3:PutObject and s3:DeleteObject there",
            url=self.url,
            cause="denied",
        )

    def _failed(self, what: str, reason: str) -> DmdataError:
        remedy = "what is complete stays, run the same again to resume" if what == "written" else "check its path"
        return DmdataError(f"{self} cannot be {what}: {reason}; {remedy}", path=self.url)


class _Lease:
    """States in a bucket who is writing a copy. Expires after minutes: nobody can see there whether a writer lives."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._store = writable_store(place.url)
        self._id = uuid.uuid4().hex
        self._renewed_at = 0.0

    def take(self) -> None:
        holder = self._holder()
        # one that has our own lock under DMDATA_HOME cannot be alive
        if holder and holder["home"] != _own_home() and time.time() - holder["at"] < _LEASE_SECONDS:
            left = _LEASE_SECONDS - (time.time() - holder["at"])
            raise DmdataError(
                f"another process, on {holder['home'].partition(':')[0]}, is writing {self._place}; wait for it, or "
                f"choose another destination. If it died, its lease ends in {left / 60:.0f} minutes"
            )
        self._write()
        # of two who took it in the same moment one was the last to write
        if (self._holder() or {}).get("id") != self._id:
            raise DmdataError(f"another process has begun to write {self._place}; wait for it, or choose another")

    def renew(self) -> None:
        if time.monotonic() - self._renewed_at > _RENEWAL_SECONDS:
            if (self._holder() or {}).get("id") != self._id:
                raise DmdataError(f"another process has taken {self._place} over; wait for it, then run again")
            self._write()

    def give_back(self) -> None:
        # it ends by itself
        with contextlib.suppress(obstore.exceptions.BaseError):
            self._store.delete(LEASE)

    def _write(self) -> None:
        self._store.put(LEASE, json.dumps({"id": self._id, "home": _own_home(), "at": time.time()}).encode())
        self._renewed_at = time.monotonic()

    def _holder(self) -> dict[str, Any] | None:
        try:
            facts = json.loads(bytes(self._store.get(LEASE).bytes()))
            return {"id": str(facts["id"]), "home": str(facts["home"]), "at": float(facts["at"])}
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


def _own_home() -> str:
    return f"{socket.gethostname()}:{home().absolute()}"
