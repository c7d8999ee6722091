"""Which catalog an operation uses, and on whose terms: what is passed to it, else what is set.

The catalog is, in this order: the one passed, ``DMDATA_CATALOG``, the published release's. It may be a file, a folder
with a ``catalog.yaml``, or the URL of one.
"""

import os
import threading
import time
from dataclasses import dataclass
from typing import TypeAlias

from dmdata.catalog.entries import Catalog, bundled, load_file
from dmdata.errors import CatalogError
from dmdata.money.prices import Terms
from dmdata.objects.address import Address, split_version
from dmdata.reading.fetch import Transport
from dmdata.settings import Settings, settings

CatalogLike: TypeAlias = Catalog | str | os.PathLike[str] | None

_LONGEST_CATALOG_BYTES = 4 << 20
_CATALOGS: dict[tuple[object, ...], "_FetchedCatalog"] = {}
_CATALOGS_LOCK = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_CATALOGS_LOCK.acquire,
        after_in_parent=_CATALOGS_LOCK.release,
        after_in_child=_CATALOGS_LOCK.release,
    )


def in_force(to: str | None, catalog: CatalogLike, *, known: Settings | None = None) -> tuple[Terms, CatalogLike]:
    """Take terms and catalog as passed, else as set: an operation reads the settings once."""
    known = known or settings()
    return Terms.in_force(to, known=known), (known.catalog or "") if catalog is None else catalog


def load_catalog(catalog: CatalogLike = None, *, max_age_seconds: float = 900.0) -> Catalog:
    """Find the catalog to use.

    Parameters
    ----------
    catalog : Catalog, path or URL, optional
        By default ``DMDATA_CATALOG``, else the config file's, else the published release's, which is in the package.
        One on the web is fetched once a process.
    max_age_seconds : float
        How long one from the web is used; then one byte of it is read, to learn whether its ETag is still the same.

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
    # of several threads one fetches it, and the others wait for that
    with _CATALOGS_LOCK:
        fetched = _CATALOGS.get(known_as)
        if fetched is None or not fetched.is_current(url, max_age_seconds):
            fetched = _CATALOGS[known_as] = _fetch_catalog(url)
    return fetched.catalog


@dataclass(slots=True)
class _FetchedCatalog:
    """A catalog that was read by its URL: the ETag it had, and when it was last seen to have it."""

    catalog: Catalog
    etag: str | None
    seen_at: float

    def is_current(self, url: str, max_age_seconds: float) -> bool:
        """Return whether it is still what lies at the URL; asks once it is older than that."""
        if time.monotonic() - self.seen_at < max_age_seconds:
            return True
        if self.etag is None or Transport(address_at(url), artifact=url).start(1)[1].etag != self.etag:
            return False
        self.seen_at = time.monotonic()
        return True


def _fetch_catalog(url: str) -> _FetchedCatalog:
    text, state = Transport(address_at(url), artifact=url).start(_LONGEST_CATALOG_BYTES)
    if state.n_bytes > len(text):
        raise CatalogError(f"{url} has {state.n_bytes} bytes; a catalog has at most {_LONGEST_CATALOG_BYTES}")
    catalog = Catalog.parse(text.decode("utf-8", errors="replace"), origin=url)
    return _FetchedCatalog(catalog, state.etag, time.monotonic())


def address_at(url: str) -> Address:
    """Find out on what terms a path or URL is read that is not in a catalog."""
    if url.startswith("s3://"):
        url, version = split_version(url)
        # the reader of S3 by address pays: as its requester, or as its owner
        return Address(url, requester_pays=True, version=version)
    return Address(url if "://" in url else os.path.abspath(os.path.expanduser(url)))
