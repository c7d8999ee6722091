"""Digests of objects that were read whole: kept under ``DMDATA_HOME`` next to the ETag and size they were read with.

A catalog seldom has a digest, and an ETag is one only of what was uploaded in one piece. What was downloaded once is
therefore measured once: a later download of the same object and ETag must have the same digest, and
``dmdata catalog check --against-bucket`` compares a catalog with it. One file an object, written whole.
"""

import contextlib
import hashlib
import json
from pathlib import Path

from dmdata.atomic import write_whole
from dmdata.money.ledger import home
from dmdata.objects.address import Address, ObjectState
from dmdata.objects.endpoints import object_key

FOLDER = "digests"
"""Folder of these files, below ``DMDATA_HOME``."""


def record(address: Address, state: ObjectState, sha256: str) -> None:
    """Keep the digest of an object that was read whole; nothing is kept of one that has no ETag, or is a local file."""
    if address.is_local or state.etag is None:
        return
    facts = {"url": str(address), "etag": state.etag, "n_bytes": state.n_bytes, "sha256": sha256}
    path = _path(address)
    with contextlib.suppress(OSError):  # a convenience: where nothing can be written, the download is complete anyway
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(facts))


def recall(address: Address, state: ObjectState) -> str | None:
    """Return the digest of an object, if one was recorded for the same ETag and size."""
    found = latest(address)
    return found[1] if found and (found[0].etag, found[0].n_bytes) == (state.etag, state.n_bytes) else None


def latest(address: Address) -> tuple[ObjectState, str] | None:
    """Return the ETag and size with which an object was last read whole, and its digest; None where it was not."""
    try:
        facts = json.loads(_path(address).read_text())
        state, sha256 = ObjectState(int(facts["n_bytes"]), str(facts["etag"])), str(facts["sha256"])
        return (state, sha256) if facts["url"] == str(address) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # not there, or damaged: nothing is known


def record_slice(url: str, selection: str, sha256: str) -> None:
    """Keep the digest of a file with part of an array, by where the array is and the digest of its selection."""
    path = _path_of_slice(url, selection)
    with contextlib.suppress(OSError):  # as above
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, sha256)


def recall_slice(url: str, selection: str) -> str | None:
    """Return the digest of the file with part of an array; None where none was recorded."""
    try:
        return _path_of_slice(url, selection).read_text()
    except (OSError, UnicodeDecodeError):
        return None


def _path_of_slice(url: str, selection: str) -> Path:
    return home() / FOLDER / "slices" / hashlib.sha256(f"{url} {selection}".encode()).hexdigest()


def _path(address: Address) -> Path:
    return home() / FOLDER / f"{object_key(address)}.json"
