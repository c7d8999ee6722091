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
from dmdata.errors import CatalogError, FormatError
from dmdata.layout.formats import HEAD_BYTES, NPY, Kind, Layout, contents_of, kind_by_bytes, warn_of_trailing_bytes
from dmdata.layout.layouts import listed
from dmdata.layout.npy import dtype_of_text, dtype_text
from dmdata.money.ledger import home
from dmdata.objects.address import Address, ObjectState
from dmdata.objects.endpoints import object_key
from dmdata.objects.explaining.refusals import encoded
from dmdata.reading.fetch import Transport
from dmdata.reading.locks import only_thread_at

__all__ = [
    "NPY",
    "Header",
    "forget_header",
    "gone_etag",
    "known_charge",
    "known_state",
    "note_change",
    "read_header",
    "remembered_header",
]

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
    head : bytes
        What was read of the object from its first byte on; nothing where the header is remembered.
    """

    state: ObjectState
    layouts: dict[str, Layout]
    names: tuple[str, ...] = ()
    unreadable: dict[str, str] = field(default_factory=dict)
    is_remembered: bool = field(default=False, compare=False)
    head: bytes = field(default=b"", compare=False, repr=False)

    def answers(self, wanted: str | None) -> bool:
        """Whether nothing more need be read for an array, or for all of them.

        In a ``.npz`` an array may be asked for with its suffix.
        """
        if wanted is None:
            return {*self.layouts, *self.unreadable}.issuperset(self.names)
        named = {wanted, wanted.removesuffix(".npy")} & set(self.names)
        return not named or wanted in self.layouts or wanted.removesuffix(".npy") in self.layouts

    def layout_of(self, member: str, url: str) -> Layout:
        """Find the layout of an array in the object; "" is the only one of its object.

        Raises
        ------
        FormatError
            If there is no such array, or it is not read.
        CatalogError
            If the object holds several and none was named.
        """
        names = self.names or tuple(self.layouts)
        for name in (member, member.removesuffix(".npy")):
            if name in self.layouts:
                return self.layouts[name]
        if member in self.unreadable:
            raise FormatError(f"{url}/{member} {self.unreadable[member]}", url=url)
        if member:
            raise FormatError(
                f"{url} holds no array {member!r}; it holds {listed(names, near=member) or 'one'}", url=url
            )
        several = "several arrays" if len(names) > 1 else "an array by name"
        raise CatalogError(f"{url} holds {several}; open one of {listed(names)}, as {url}/{next(iter(names))}", url=url)


def read_header(
    transport: Transport,
    *,
    kind: Kind | None,
    wanted: str | None = NPY,
    begun: tuple[bytes, ObjectState] | None = None,
    first_bytes: int = 0,
) -> Header:
    """Learn the layouts of an object: as remembered, or by reading its header. Of several threads one reads it.

    Parameters
    ----------
    transport : Transport
    kind : {"npy", "npz", "pt", "safetensors"} or None
        None to recognize it by the first bytes.
    wanted : str or None
        The array that will be read; None for all of them.
    begun : bytes and ObjectState, optional
        What `Transport.start` has just returned, where the start was read before.
    first_bytes : int
        Bytes to read from the start in any case, where nothing is remembered: of the elements that follow the header.

    Raises
    ------
    FormatError
        If the object is damaged or lies about itself; then nothing is remembered.
    BudgetError, AccessError, ObjectMissingError, SourceError
    """
    with only_thread_at(_path(transport.address)):
        known = remembered_header(transport.address, wanted)
        return known or _read_header(transport, kind, wanted, begun, first_bytes)


def remembered_header(address: Address, wanted: str | None = NPY) -> Header | None:
    """Recall an object's header as it was read some time ago; None where it is to be read."""
    known = _recall(address)
    if known is None or not known.answers(wanted):
        return None
    if known.names == (NPY,):
        warn_of_trailing_bytes(known.layouts[NPY], object_bytes=known.state.n_bytes, url=str(address))
    return known


def _read_header(
    transport: Transport,
    kind: Kind | None,
    wanted: str | None,
    begun: tuple[bytes, ObjectState] | None,
    first_bytes: int,
) -> Header:
    url = str(transport.address)
    n_head = HEAD_BYTES[kind] if kind else _UNKNOWN_HEAD_BYTES
    head, state = begun or transport.start(max(n_head, first_bytes))

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
    header = Header(state, contents.layouts, contents.names, contents.unreadable, head=head)
    known = _recall(transport.address)
    if known is not None and known.state == state:
        header = replace(header, layouts=known.layouts | header.layouts)
    _remember(transport.address, header)
    return header


def known_state(address: Address) -> ObjectState | None:
    """Return what the source said of the object when its header was read; None where it was not."""
    known = _recall(address)
    return known.state if known else None


def known_charge(address: Address) -> bool | None:
    """Return what the source said about charging its reader when the header was read; None where it was not."""
    known = known_state(address)
    return known.charged if known else None


def forget_header(address: Address) -> None:
    """Drop what is remembered of an object's header; that it changed stays noted."""
    if _recall(address) is not None:
        with contextlib.suppress(OSError):
            _path(address).unlink(missing_ok=True)


def note_change(address: Address, etag: str | None) -> None:
    """Forget an object's header, because the object is not the one with this ETag any more, and note that."""
    known = _recall(address)
    if address.is_local or etag is None or (known is not None and known.state.etag != etag):
        return  # nothing was remembered, or the header of the object as it is now was read since
    forget_header(address)
    _write(address, {"url": str(address), "gone": etag})


def gone_etag(address: Address) -> str | None:
    """Return the ETag that an object had until it changed; None where its new header was read since, or it did not."""
    try:
        facts = _facts(address)
        return str(facts["gone"]) if facts else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _path(address: Address) -> Path:
    return home() / "headers" / f"{object_key(address)}.json"


def _facts(address: Address) -> dict[str, Any] | None:
    memory: dict[str, Any] = json.loads(_path(address).read_text())
    facts: dict[str, Any] = memory["facts"]
    return facts if memory["sha256"] == _digest(facts) and facts["url"] == str(address) else None


def _write(address: Address, facts: dict[str, Any]) -> None:
    path = _path(address)
    with contextlib.suppress(OSError):  # a convenience: where nothing can be written, the header is read each time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"facts": facts, "sha256": _digest(facts)}))


def _recall(address: Address) -> Header | None:
    try:
        facts = _facts(address)
        if facts is None or "gone" in facts:
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
    _write(address, facts)


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
