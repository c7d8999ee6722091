"""An object's header, read once and remembered under ``DMDATA_HOME`` for as long as the object stays the same.

Remembering saves requests and their latency at each `dmdata.open`. It is safe because every later read must match the
etag seen with the header: when it does not, the header is forgotten, and the next `open` reads it anew. A digest of its
own tells a memory that was damaged on disk, which would else point at other elements.
"""

import contextlib
import hashlib
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dmdata.address import Address, ObjectState
from dmdata.errors import FormatError
from dmdata.fetch import Transport
from dmdata.formats import NPY_PREFIX_BYTES, PT_HEAD_BYTES, Layout, npy_layout, pt_layouts
from dmdata.ledger import home

NPY = ""
"""Name of the one array of a ``.npy`` among the layouts of its header."""


@dataclass(frozen=True, slots=True)
class Header:
    """State of an object when its header was read, and the layouts of its arrays by name."""

    state: ObjectState
    layouts: dict[str, Layout]


def read_header(transport: Transport, *, kind: Literal["npy", "pt"]) -> Header:
    """Learn the layouts of an object, from memory or by reading its header.

    Raises
    ------
    FormatError
        If the object is damaged or lies about itself; then nothing is remembered.
    BudgetError, AccessError, ObjectMissingError, SourceError
    """
    known = _recall(transport.address)
    if known is not None:
        return known
    url = str(transport.address)
    head, state = transport.start(NPY_PREFIX_BYTES if kind == "npy" else PT_HEAD_BYTES)

    def read_at(start: int, stop: int) -> bytes:
        if stop <= len(head):
            return head[start:stop]
        return transport.read(start, min(stop, state.n_bytes), etag=state.etag)

    if state.n_bytes == 0:
        raise FormatError(f"{url} is empty; expected a .{kind} object", url=url)
    if kind == "npy":
        layouts = {NPY: npy_layout(read_at, object_bytes=state.n_bytes, url=url)}
    else:
        layouts = pt_layouts(read_at, object_bytes=state.n_bytes, url=url)
    header = Header(state, layouts)
    _remember(transport.address, header)
    return header


def known_charge(address: Address) -> bool | None:
    """Tell what the source said of charging its reader when the object was opened; None where it was not."""
    known = _recall(address)
    return known.state.charged if known else None


def forget_header(address: Address) -> None:
    """Drop what is remembered of an object, because it changed."""
    _path(address).unlink(missing_ok=True)


def _path(address: Address) -> Path:
    # named by digest: whatever a catalog calls an object, the file stays in this folder
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    name = hashlib.sha256(f"{endpoint} {address.url}".encode()).hexdigest()
    return home() / "headers" / f"{name}.json"


def _recall(address: Address) -> Header | None:
    try:
        memory: dict[str, Any] = json.loads(_path(address).read_text())
        facts = memory["facts"]
        if memory["sha256"] != _digest(facts) or facts["url"] != str(address):
            return None
        layouts = {
            name: Layout(tuple(shape), np.dtype(dtype), offset, tuple(strides))
            for name, (shape, dtype, offset, strides) in facts["layouts"].items()
        }
        return Header(ObjectState(facts["n_bytes"], facts["etag"], facts.get("charged")), layouts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # not there, or damaged: the object's own header is read


def _remember(address: Address, header: Header) -> None:
    if address.is_local or header.state.etag is None:
        return  # reading it again is free, or a change could not be noticed
    layouts = {
        name: (layout.shape, layout.dtype.str, layout.offset, layout.strides) for name, layout in header.layouts.items()
    }
    state = header.state
    facts = {"url": str(address), "n_bytes": state.n_bytes, "etag": state.etag, "charged": state.charged}
    facts["layouts"] = layouts
    path = _path(address)
    beside = path.with_suffix(f".{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):  # a convenience: where nothing can be written, the header is read each time
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps({"facts": facts, "sha256": _digest(facts)}))
        beside.replace(path)


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
