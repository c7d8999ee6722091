"""Which arrays an object holds and where their elements lie, read from the object's own header.

Each format is a module: `dmdata.layout.npy`, `dmdata.layout.pt` (with `dmdata.layout.pickles`), `dmdata.layout.npz`,
`dmdata.layout.safetensors`; this one recognizes all of them, by suffix or first bytes. Nothing is unpickled, imported
or run, torch is not needed, and only headers are read. Whatever is damaged or lies about its size raises `FormatError`
naming the object.
"""

from dataclasses import dataclass
from typing import get_args

from dmdata.errors import FormatError
from dmdata.layout.kinds import NPY, Kind, kind_by_suffix, without_suffix
from dmdata.layout.layouts import Layout, ReadAt, contiguous_strides, stored_as
from dmdata.layout.npy import (
    MAGIC,
    NPY_PREFIX_BYTES,
    TrailingBytesWarning,
    npy_header,
    npy_layout,
    warn_of_trailing_bytes,
)
from dmdata.layout.npz import NPZ_HEAD_BYTES, npz_arrays
from dmdata.layout.pt import PT_HEAD_BYTES, pt_layouts, pt_tensors
from dmdata.layout.safetensors import SAFETENSORS_HEAD_BYTES, safetensors_layouts

__all__ = [
    "HEAD_BYTES",
    "NPY",
    "NPY_PREFIX_BYTES",
    "PT_HEAD_BYTES",
    "Contents",
    "Kind",
    "Layout",
    "ReadAt",
    "TrailingBytesWarning",
    "contents_of",
    "contiguous_strides",
    "kind_by_bytes",
    "kind_by_suffix",
    "npy_header",
    "npy_layout",
    "npz_arrays",
    "pt_layouts",
    "safetensors_layouts",
    "stored_as",
    "warn_of_trailing_bytes",
    "without_suffix",
]

HEAD_BYTES: dict[Kind, int] = {
    "npy": NPY_PREFIX_BYTES,
    "npz": NPZ_HEAD_BYTES,
    "pt": PT_HEAD_BYTES,
    "safetensors": SAFETENSORS_HEAD_BYTES,
}
"""What is read first of an object, so that most headers take one or two requests."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What an object holds, by its header.

    Attributes
    ----------
    layouts : dict of str to Layout
    names : tuple of str
        Of all arrays; of a ``.npz`` only the header that was asked for is read.
    unreadable : dict of str to str
        Arrays that are not read, and why, as the end of a sentence that begins with the name.
    """

    layouts: dict[str, Layout]
    names: tuple[str, ...]
    unreadable: dict[str, str]


def contents_of(kind: Kind, read_at: ReadAt, *, object_bytes: int, url: str, wanted: str | None = None) -> Contents:
    """Read an object's header.

    Parameters
    ----------
    kind : {"npy", "npz", "pt", "safetensors"}
    read_at : callable
    object_bytes : int
    url : str
        Names the object in errors.
    wanted : str, optional
        The array that will be read, which may save requests for the others.

    Raises
    ------
    FormatError
    """
    if kind == "npy":
        return Contents({NPY: npy_layout(read_at, object_bytes=object_bytes, url=url)}, (NPY,), {})
    if kind == "npz":
        npz = npz_arrays(read_at, object_bytes=object_bytes, url=url, wanted=wanted)
        return Contents(npz.layouts, npz.names, {})
    if kind == "pt":
        tensors = pt_tensors(read_at, object_bytes=object_bytes, url=url)
        return Contents(tensors.layouts, (*tensors.layouts, *tensors.unreadable), tensors.unreadable)
    layouts = safetensors_layouts(read_at, object_bytes=object_bytes, url=url)
    return Contents(layouts, tuple(layouts), {})


def kind_by_bytes(head: bytes, *, object_bytes: int, url: str) -> Kind:
    """Recognize a format by an object's first bytes, a ``.pt`` or ``.npz`` by the zip's first member.

    Raises
    ------
    FormatError
        If it is none that is known.
    """
    if head.startswith(MAGIC):
        return "npy"
    if head.startswith(b"PK"):
        n_name = int.from_bytes(head[26:28], "little")
        return "npz" if head[30 : 30 + n_name].lower().endswith(b".npy") else "pt"
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= object_bytes - 8:
        return "safetensors"
    raise FormatError(
        f"{url} starts with {head[:8]!r}, so it is none of {', '.join(get_args(Kind))}; name an object of one of these",
        url=url,
    )
