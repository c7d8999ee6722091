"""Which catalog an operation uses, and on whose terms: what is passed to it, else what is set.

The catalog is, in this order: the one passed, ``DMDATA_CATALOG``, the published release's. It may be a file, a folder
with a ``catalog.yaml``, or the URL of one. What was read by its URL is kept under ``DMDATA_HOME`` with its ETag: a new
process, and one that has used it for some minutes, reads one byte to learn whether it is still the same.
"""

import contextlib
import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from dmdata.atomic import write_whole
from dmdata.catalog.entries import Artifact, Catalog, bundled, load_file
from dmdata.errors import CatalogError
from dmdata.home import home
from dmdata.money.prices import Terms
from dmdata.objects.address import Address, split_version
from dmdata.objects.endpoints import object_key
from dmdata.reading.fetch import Transport
from dmdata.reading.locks import only_thread_at
from dmdata.settings import Settings, settings

CatalogLike: TypeAlias = Catalog | str | os.PathLike[str] | None

_LONGEST_CATALOG_BYTES = 4 << 20
_FOLDER = "catalogs"
_CATALOGS: dict[tuple[object, ...], "_FetchedCatalog"] = {}


def in_force(to: str | None, catalog: CatalogLike, *, known: Settings | None = None) -> tuple[Terms, CatalogLike]:
    """Take terms and catalog as passed, else as set: an operation reads the settings once."""
    known = known or settings()
    return Terms.in_force(to, known=known), (known.catalog or "") if catalog is None else catalog


def load_catalog(catalog: CatalogLike = None, *, max_age_seconds: float = 300.0) -> Catalog:
    """Find the catalog to use.

    Parameters
    ----------
    catalog : Catalog, path or URL, optional
        By default ``DMDATA_CATALOG``, else the config file's, else the published release's, which is in the package.
        One with a URL is fetched once, and kept while its ETag stays the same.
    max_age_seconds : float
        How long one with a URL is used; then one byte of it is read, as in each new process, to learn whether its ETag
        is still the same.

    Raises
    ------
    CatalogError
        If it cannot be read or is not valid.
    """
    if isinstance(catalog, Catalog):
        return catalog
    where = os.fspath(catalog) if catalog is not None else settings().catalog
    if not where:
        return bundled()
    if "://" not in where:
        return load_file(where)
    url = where if where.endswith((".yaml", ".yml")) else f"{where.rstrip('/')}/catalog.yaml"
    if address_at(url).is_local:
        return load_file(address_at(url).local_path)
    # what leads to another object under the same URL: an endpoint, a profile, the home whose ledger is charged
    environment = sorted(
        (name, value)
        for name, value in os.environ.items()
        if name.startswith("AWS_") or name in ("DMDATA_HOME", "DMDATA_OFFLINE")
    )
    known_as = (url, *environment)
    # of several threads one fetches it, and the others that want it wait for that
    with only_thread_at(known_as):
        fetched = _CATALOGS.get(known_as)
        if fetched is None or fetched.is_older(max_age_seconds):
            fetched = _CATALOGS[known_as] = _fetch_catalog(url, fetched)
    return fetched.catalog


@dataclass(frozen=True, slots=True)
class _FetchedCatalog:
    """A catalog that was read by its URL: the ETag it had, and when it was last seen to have it."""

    catalog: Catalog
    etag: str | None
    seen_at: float

    def is_older(self, seconds: float) -> bool:
        """Return whether it was last seen longer ago."""
        return time.monotonic() - self.seen_at >= seconds


def _fetch_catalog(url: str, known: _FetchedCatalog | None) -> _FetchedCatalog:
    """Read a catalog, or one byte of it where what is known of it or kept on disk has the same ETag."""
    address = address_at(url)
    transport, file = Transport(address, artifact=str(address)), home() / _FOLDER / f"{object_key(address)}.json"
    etag, text = (known.etag, "") if known else _kept_text(file)
    if etag is not None and transport.start(1)[1].etag == etag:
        return _FetchedCatalog(
            known.catalog if known else Catalog.parse(text, origin=str(address)), etag, time.monotonic()
        )
    content, state = transport.start(_LONGEST_CATALOG_BYTES)
    if state.n_bytes > len(content):
        raise CatalogError(f"{address} has {state.n_bytes} bytes; a catalog has at most {_LONGEST_CATALOG_BYTES}")
    text = content.decode("utf-8", errors="replace")
    catalog = Catalog.parse(text, origin=str(address))
    if state.etag is not None:
        _keep_text(file, state.etag, text)
    return _FetchedCatalog(catalog, state.etag, time.monotonic())


def _kept_text(file: Path) -> tuple[str | None, str]:
    """Recall a catalog's ETag and text; no ETag where they are not kept, or damaged."""
    try:
        facts = json.loads(file.read_text())
        etag, text = str(facts["etag"]), str(facts["text"])
        return (etag, text) if facts["sha256"] == _digest(etag, text) else (None, "")
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None, ""


def _keep_text(file: Path, etag: str, text: str) -> None:
    with contextlib.suppress(OSError):  # a convenience: where nothing can be written, each process reads it
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({"etag": etag, "text": text, "sha256": _digest(etag, text)}))


def _digest(etag: str, text: str) -> str:
    return hashlib.sha256(f"{etag} {text}".encode()).hexdigest()


def address_at(url: str) -> Address:
    """Find out on what terms a path or URL is read that is not in a catalog."""
    if url.startswith("s3://"):
        url, version = split_version(url)
        # the reader of S3 by address pays: as its requester, or as its owner
        return Address(url, requester_pays=True, version=version)
    return Address(url if "://" in url else os.path.abspath(os.path.expanduser(url)))


def address_of(artifact: Artifact) -> Address:
    """Find where an artifact's object is, and on what terms it is read."""
    source = artifact.source
    if artifact.at is not None:
        return address_at(artifact.at)
    return Address(artifact.url, source.requester_pays, source.region, listed=True)
