"""Which local mirrors were made or registered under this ``DMDATA_HOME``, and whether one may stand for its object.

An entry is a pointer and proves nothing: whether the mirror is there, whole, complete and of the object as it is known
now is found out from the mirror itself whenever its name is opened. One small file for each array of each object,
written whole. Mirrors in a bucket are not entered.
"""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from dmdata.atomic import write_whole
from dmdata.copying.journal import Journal
from dmdata.copying.place import Place
from dmdata.errors import DmdataError
from dmdata.home import home
from dmdata.objects.address import Address
from dmdata.objects.endpoints import object_key
from dmdata.reading.headers import gone_etag, known_state
from dmdata.reading.locks import only_process_at

FOLDER = "mirrors"
_SHOWN_PLACES = 8
"""Folder of the entries, below ``DMDATA_HOME``."""

_WAIT_SECONDS = 60.0
_SAID: set[tuple[str, str]] = set()


class LocalMirrorWarning(UserWarning):
    """A local mirror cannot stand for the object that it was made of, so the object itself is read, at its price."""


@contextlib.contextmanager
def entered(address: Address, name: str, place: Place) -> Iterator[None]:
    """Enter the mirror of an array that a catalog lists, once the block has copied it, or what there is of it."""
    try:
        yield
    finally:
        if address.listed and not address.is_local and not place.is_s3:
            with contextlib.suppress(DmdataError):
                enter(address, name, Journal.load(place))


def enter(address: Address, name: str, journal: Journal) -> None:
    """Enter a mirror.

    Raises
    ------
    DmdataError
        If the home cannot be written.
    """
    file, path = _file(address, name), journal.place.url
    entry = [journal.original.identity, journal.is_whole and journal.is_complete]
    with _only_writer():
        known = _entries(address, name)
        known.pop(path, None)  # the last one entered is looked at first
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({"name": name, "url": str(address), "places": known | {path: entry}}))


def forget(path: str) -> list[str]:
    """Take out the entries of all mirrors at or below a path, as it is given or as its links lead.

    Returns
    -------
    names : list of str
        Of their arrays.

    Raises
    ------
    DmdataError
        If no mirror there is entered, or the home cannot be written.
    """
    forgotten, others = [], set()
    with _only_writer():
        for file in sorted((home() / FOLDER).glob("*.json")):
            try:
                facts = json.loads(file.read_text())
                name, entries = str(facts["name"]), dict(facts["places"])
            except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
                continue  # damaged: it points nowhere
            places = {place: entry for place, entry in entries.items() if not _is_within(place, path)}
            others |= set(places)
            if len(places) < len(entries):
                write_whole(file, json.dumps(facts | {"places": places}))
                forgotten.append(name)
    if not forgotten:
        some = ", ".join(sorted(others)[:_SHOWN_PLACES]) + (" and others" if len(others) > _SHOWN_PLACES else "")
        remedy = f"name one that is: {some}" if others else "none is anywhere"
        raise DmdataError(f"no mirror at or below {path} is registered; {remedy}")
    return forgotten


@contextlib.contextmanager
def _only_writer() -> Iterator[None]:
    folder = home() / FOLDER
    with only_process_at(folder, wait_seconds=_WAIT_SECONDS):
        try:
            yield
        except OSError as error:
            raise DmdataError(
                f"{folder} cannot be written ({error}); set DMDATA_HOME to a directory that can"
            ) from error


def complete_mirror(address: Address, name: str, etag: str | None) -> str | None:
    """Find a mirror that may stand for an array; says, once a process, why those that are entered may not.

    Parameters
    ----------
    address : Address
        Of the object.
    name : str
        Of the array, in its catalog.
    etag : str or None
        That the catalog claims the object to have.

    Returns
    -------
    path : str or None
        Of the Zarr array; None where there is none, and the object is to be read.
    """
    entries = _entries(address, name)
    if not entries:
        return None
    reasons: list[tuple[str, str]] = []
    for path, (identity, was_whole) in reversed(entries.items()):
        reason = _why_not(path, address, identity, etag, was_whole=was_whole)
        if reason is None:
            return path
        reasons.append((path, reason))
    for path, reason in reasons:
        if reason and (path, reason) not in _SAID:
            _SAID.add((path, reason))
            warnings.warn(
                f"the local mirror of {name} at {path} {reason}; until then the object itself is read, at its price",
                LocalMirrorWarning,
                stacklevel=4,
            )
    return None


def why_outdated(address: Address, identity: str, etag: str | None) -> str | None:
    """State why a mirror with this identity is not of its object as it is known now, with a remedy; None if it is.

    Known are the ETag that the catalog claims, the one that the object's header was last read with, and one that the
    object is known to have no longer. Nothing is asked of the source.
    """
    url, state = str(address), known_state(address)
    if (gone := gone_etag(address)) is not None and identity in (url, f"{url} {gone}"):
        return f"is of an earlier version of {url}, which has changed since; mirror it again to another place"
    if state is not None and state.etag is not None and identity != f"{url} {state.etag}":
        return f"is of an earlier version of {url}, whose ETag is {state.etag} now; mirror it again to another place"
    if etag is not None and identity != f"{url} {etag}":
        return (
            f"is of an earlier version of {url} than the catalog's, or of a later one: the catalog has ETag {etag}; "
            "mirror it again to another place, or have the catalog confirmed: "
            "dmdata catalog check FILE --against-bucket"
        )
    return None


def is_confirmed(address: Address, identity: str, etag: str | None) -> bool:
    """Whether an ETag that is known here, of the object or its catalog, is that of a mirror with this identity."""
    state = known_state(address)
    return identity in {f"{address} {known}" for known in (etag, state.etag if state else None) if known is not None}


def _why_not(path: str, address: Address, identity: str, etag: str | None, *, was_whole: bool) -> str | None:
    """State why a mirror may not stand for its object, with a remedy; None if it may, "" if nothing is to be said."""
    url = str(address)
    try:
        os.stat(Path(path) / "zarr.json")
        journal = Journal.load(Place(path))
    except (FileNotFoundError, NotADirectoryError):
        # of a copy that never was complete nobody expects anything
        gone = f"is gone; register it where it is now: dmdata mirror --register PATH, or: dmdata mirror --forget {path}"
        return gone if was_whole else ""
    except (OSError, ValueError) as error:
        return f"cannot be read: {error}; make it readable, or: dmdata mirror --forget {path}"
    except DmdataError as error:
        if isinstance(error.__cause__, PermissionError):
            return f"cannot be read: {error.__cause__}; make it readable, or: dmdata mirror --forget {path}"
        return "is damaged; remove it and mirror again"
    original = journal.original.identity
    if original != identity or (original != url and not original.startswith(f"{url} ")):
        return f"was replaced by a new mirror; register it again: dmdata mirror --register {path}"
    if not journal.is_whole:
        return f"has only some rows or columns; mirror all of it, or: dmdata mirror --forget {path}"
    if not journal.is_complete:
        return "is not complete; run the same dmdata mirror again"
    return why_outdated(address, original, etag)


def _entries(address: Address, name: str) -> dict[str, tuple[str, bool]]:
    try:
        places = json.loads(_file(address, name).read_text())["places"]
        return {str(path): (str(identity), bool(was_whole)) for path, (identity, was_whole) in places.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}  # none, or damaged: the object is read


def _file(address: Address, name: str) -> Path:
    # a digest: whatever a catalog calls an array, its entry stays in the folder
    digest = hashlib.sha256(f"{object_key(address)} {name}".encode()).hexdigest()
    return home() / FOLDER / f"{digest}.json"


def _is_within(place: str, path: str) -> bool:
    pairs = ((place, path), (os.path.realpath(place), os.path.realpath(path)))
    return any(one == other or one.startswith(other.rstrip(os.sep) + os.sep) for one, other in pairs)
