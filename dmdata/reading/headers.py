"""An object's header, read once and remembered under ``DMDATA_HOME`` for as long as the object stays the same.

Remembering saves requests and their latency at each `dmdata.open`. It is safe because every later read must match the
etag seen with the header: when it does not, the header is forgotten, and the next `open` reads it again. Its own
digest detects a file that was damaged on disk, which would otherwise point at other elements.
"""

import contextlib
import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dmdata.atomic import write_whole
from dmdata.errors import FormatError
from dmdata.layout.formats import HEAD_BYTES, NPY, Kind, Layout, contents_of, kind_by_bytes, warn_of_trailing_bytes
from dmdata.layout.npy import dtype_of_text, dtype_text
from dmdata.money.ledger import home
from dmdata.objects.address import Address, ObjectState
from dmdata.objects.endpoints import object_key
from dmdata.objects.explaining.refusals import encoded
from dmdata.reading.fetch import Transport

__all__ = ["NPY", "Header", "forget_header", "read_header"]

# enough to recognize any format, and the whole header of a ``.npz`` of few arrays
_UNKNOWN_HEAD_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Header:
    """State of an object when its header was read, and the layouts of its arrays by name.

    Attributes
    ----------
    state : ObjectState
    layouts : dict of str to Layout
    names : tuple of str
        Of all arrays in the object; the layouts of those in a ``.npz`` are read as they are asked for.
    unreadable : dict of str to str
        Arrays that are not read, and why, as the end of a sentence.
    is_remembered : bool
        Whether it was read some time ago: the object may have changed since.
    """

    state: ObjectState
    layouts: dict[str, Layout]
    names: tuple[str, ...] = ()
    unreadable: dict[str, str] = field(default_factory=dict)
    is_remembered: bool = field(default=False, compare=False)

    def answers(self, wanted: str | None) -> bool:
        """Whether nothing more need be read for an array, or for all of them.

        In a ``.npz`` an array may be asked for with its suffix.
        """
        if wanted is None:
            return {*self.layouts, *self.unreadable}.issuperset(self.names)
        named = {wanted, wanted.removesuffix(".npy")} & set(self.names)
        return not named or wanted in self.layouts or wanted.removesuffix(".npy") in self.layouts


def read_header(
    transport: Transport,
    *,
    kind: Kind | None,
    wanted: str | None = NPY,
    begun: tuple[bytes, ObjectState] | None = None,
) -> Header:
    """Learn the layouts of an object, from memory or by reading its header.

    Parameters
    ----------
    transport : Transport
    kind : {"npy", "npz", "pt", "safetensors"} or None
        None to recognize it by the first bytes.
    wanted : str or None
        The array that will be read; None for all of them.
    begun : bytes and ObjectState, optional
        What `Transport.start` has just returned, where the start was read before.

    Raises
    ------
    FormatError
        If the object is damaged or lies about itself; then nothing is remembered.
    BudgetError, AccessError, ObjectMissingError, SourceError
    """
    url = str(transport.address)
    known = _recall(transport.address)
    if known is not None and known.answers(wanted):
        if known.names == (NPY,):
            warn_of_trailing_bytes(known.layouts[NPY], object_bytes=known.state.n_bytes, url=url)
        return known
    head, state = begun or transport.start(HEAD_BYTES[kind] if kind else _UNKNOWN_HEAD_BYTES)

    def read_at(start: int, stop: int) -> bytes:
        stop = min(stop, state.n_bytes)
        if stop <= len(head):
            return head[start:stop]
        missing = max(start, len(head))
        return head[start:missing] + transport.read(missing, stop, etag=state.etag)

    if state.encoding:
        raise encoded(transport.address, state.encoding)
    if state.n_bytes == 0:
        raise FormatError(f"{url} is empty; expected {f'a .{kind} object' if kind else 'an array'}", url=url)
    kind = kind or kind_by_bytes(head, object_bytes=state.n_bytes, url=url)
    contents = contents_of(kind, read_at, object_bytes=state.n_bytes, url=url, wanted=wanted)
    header = Header(state, contents.layouts, contents.names, contents.unreadable)
    if known is not None and known.state == state:
        header = replace(header, layouts=known.layouts | header.layouts)
    _remember(transport.address, header)
    return header


def known_charge(address: Address) -> bool | None:
    """Return what the source said about charging its reader when the object was opened; None where it was not."""
    known = _recall(address)
    return known.state.charged if known else None


def forget_header(address: Address) -> None:
    """Drop what is remembered of an object, because it changed."""
    _path(address).unlink(missing_ok=True)


def _path(address: Address) -> Path:
    return home() / "headers" / f"{object_key(address)}.json"


def _recall(address: Address) -> Header | None:
    try:
        memory: dict[str, Any] = json.loads(_path(address).read_text())
        facts = memory["facts"]
        if memory["sha256"] != _digest(facts) or facts["url"] != str(address):
            return None
        layouts = {
            name: Layout(tuple(shape), dtype_of_text(dtype), offset, tuple(strides), encoding)
            for name, (shape, dtype, offset, strides, encoding) in facts["layouts"].items()
        }
        state = ObjectState(facts["n_bytes"], facts["etag"], facts.get("charged"))
        return Header(state, layouts, tuple(facts["names"]), facts["unreadable"], is_remembered=True)
    except (OSError, ValueError, SyntaxError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # not there, or damaged: the object's own header is read


def _remember(address: Address, header: Header) -> None:
    if address.is_local or header.state.etag is None:
        return  # reading it again is free, or a change could not be noticed
    layouts = {
        name: (layout.shape, dtype_text(layout.dtype), layout.offset, layout.strides, layout.encoding)
        for name, layout in header.layouts.items()
    }
    state = header.state
    facts = {"url": str(address), "n_bytes": state.n_bytes, "etag": state.etag, "charged": state.charged}
    facts |= {"layouts": layouts, "names": header.names, "unreadable": header.unreadable}
    path = _path(address)
    with contextlib.suppress(OSError):  # a convenience: where nothing can be written, the header is read each time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"facts": facts, "sha256": _digest(facts)}))


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
