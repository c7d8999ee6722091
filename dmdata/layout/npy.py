"""The header of a ``.npy``: plain numbers, dates, fixed text, raw bytes and records of these; never objects.

The format is NumPy's enhancement proposal 1 (versions 1.0, 2.0 and 3.0). A header is parsed as a literal; nothing in it
is run.
"""

import ast
import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from dmdata.errors import FormatError
from dmdata.layout.layouts import Layout, ReadAt, contiguous_strides, is_possible

NPY_PREFIX_BYTES = 128
"""What numpy writes before the first element of an array of few dimensions: one read gets it all."""

MAGIC = b"\x93NUMPY"

_LONGEST_HEADER = 65_536
_DEEPEST_RECORD = 16
_LARGEST_ELEMENT = 1 << 30
_PLAIN = re.compile(r"[<>=|]?(\?|b1|[biufc]\d{1,2}|[Mm]8(\[\d{0,9}[A-Za-z\u03bc]{1,2}\])?|[SUV]\d{1,9})")
_OBJECTS = re.compile(r"[<>=|]?O\d{0,2}")
# a length as Python 2 wrote it, outside of quoted text
_LONG_NUMBER = re.compile(r"""('[^'\n]*'|"[^"\n]*")|(?<=\d)L(?=[\s,)\]])""")


class TrailingBytesWarning(UserWarning):
    """An object is longer than its array; what follows the array is not read, as NumPy would not read it either."""


def npy_layout(read_at: ReadAt, *, object_bytes: int, url: str) -> Layout:
    """Read the header of a ``.npy`` object.

    Parameters
    ----------
    read_at : callable
        Called once with the first 128 bytes, once more for a longer header.
    object_bytes : int
        Size of the object as its store states it; all that the header promises must be in it.
    url : str
        Names the object in errors.

    Raises
    ------
    FormatError
        If it is not a ``.npy`` file, its header is damaged, it holds objects, or it is shorter than the header
        promises.

    Warns
    -----
    TrailingBytesWarning
        If it is longer, as after two ``np.save`` into one file; the first array is read.
    """
    head = bytes(read_at(0, min(NPY_PREFIX_BYTES, object_bytes)))
    if not head.startswith(MAGIC) or len(head) < 12:
        raise FormatError(f"{url} is not a .npy file: it starts with {head[:8]!r}; expected b'\\x93NUMPY'", url=url)
    major, minor = head[6:8]
    if major not in (1, 2, 3) or minor != 0:
        raise FormatError(f"{url} has .npy version {major}.{minor}; versions 1.0, 2.0 and 3.0 are known", url=url)
    width = 2 if major == 1 else 4
    offset = 8 + width + int.from_bytes(head[8 : 8 + width], "little")
    if offset > min(object_bytes, _LONGEST_HEADER):
        raise FormatError(
            f"{url} claims a header of {offset} bytes in an object of {object_bytes}; it is damaged", url=url
        )
    if offset > len(head):
        head += bytes(read_at(len(head), offset))
    shape, fortran, dtype = _facts(head[8 + width : offset], major=major, url=url)
    layout = Layout(shape, dtype, offset, contiguous_strides(shape, dtype.itemsize, fortran=fortran))
    if layout.stop > object_bytes:
        raise FormatError(
            f"{url} has {object_bytes} bytes but its header promises {layout.stop} (shape {shape}, {dtype}); "
            "it is truncated or damaged: fetch it again or ask its publisher",
            url=url,
            promised_bytes=layout.stop,
            object_bytes=object_bytes,
        )
    warn_of_trailing_bytes(layout, object_bytes=object_bytes, url=url)
    return layout


def warn_of_trailing_bytes(layout: Layout, *, object_bytes: int, url: str) -> None:
    """Warn where a ``.npy`` has bytes after its array."""
    if layout.stop < object_bytes:
        warnings.warn(
            f"{url} has {object_bytes:,} bytes but its array ends at byte {layout.stop:,}; what follows, perhaps a "
            "second array saved into the same file, is not read",
            TrailingBytesWarning,
            stacklevel=3,
        )


def npy_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """Write the header that numpy puts before the elements of a C-ordered array of this shape and dtype."""
    buffer = io.BytesIO()
    facts = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, facts)
    return buffer.getvalue()


def dtype_text(dtype: np.dtype[Any]) -> str:
    """Write a dtype out as a ``.npy`` header does; `dtype_of_text` reads it."""
    return repr(np.lib.format.dtype_to_descr(dtype))


def dtype_of_text(text: str) -> np.dtype[Any]:
    """Read a dtype as `dtype_text` wrote it.

    Raises
    ------
    ValueError, SyntaxError
        If it is not one that is read from a ``.npy``.
    """
    dtype = _dtype_of(ast.literal_eval(text))
    if dtype is None:
        raise ValueError(f"{text[:80]} is not a dtype that is read")
    return dtype


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Keep Python's parsers from warning of odd text in a file: it is judged by what it says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _facts(header: bytes, *, major: int, url: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        text = header.decode("utf-8" if major == 3 else "latin1")
        facts = _literal(text if major == 3 else _LONG_NUMBER.sub(lambda found: found[1] or "", text))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise FormatError(f"{url} has a damaged .npy header: {header[:80]!r}", url=url) from error
    if not isinstance(facts, dict) or set(facts) != {"descr", "fortran_order", "shape"}:
        raise FormatError(
            f"{url} has a .npy header of {header[:80]!r}; expected descr, fortran_order and shape", url=url
        )
    shape, fortran, descr = facts["shape"], facts["fortran_order"], facts["descr"]
    if not isinstance(shape, tuple) or not is_possible(shape):
        raise FormatError(f"{url} has shape {str(shape)[:80]} in its header; expected a tuple of counts", url=url)
    if not isinstance(fortran, bool):
        raise FormatError(f"{url} has fortran_order {fortran!r} in its header; expected True or False", url=url)
    if _has_objects(descr):
        raise FormatError(
            f"{url} holds Python objects ({str(descr)[:80]}), which could run code when they are loaded; only numbers, "
            "dates, fixed text and records of these are read. If you trust it, load it by np.load with "
            "allow_pickle=True and save it as one of these",
            url=url,
        )
    dtype = _dtype_of(descr)
    if dtype is None or not is_possible(shape, dtype.itemsize):
        raise FormatError(
            f"{url} holds elements of type {str(descr)[:80]!r}, which np.save does not write or has no bytes; it is "
            "damaged, or another program wrote it: save it again by np.save",
            url=url,
        )
    return shape, fortran, dtype


def _literal(text: str) -> Any:
    with no_warnings():
        return ast.literal_eval(text)


def _has_objects(descr: object) -> bool:
    if isinstance(descr, list | tuple):
        # a field is (name, type) or (name, type, shape): the name may be any text
        return any(_has_objects(field[1]) for field in descr if isinstance(field, tuple) and len(field) > 1)
    return isinstance(descr, str) and bool(_OBJECTS.fullmatch(descr))


def _dtype_of(descr: Any) -> np.dtype[Any] | None:
    """Make a dtype of what a header says of it; None where it is not one that np.save writes."""
    if not _is_plain(descr, _DEEPEST_RECORD):
        return None
    try:
        with no_warnings():
            dtype = np.lib.format.descr_to_dtype(descr)
    except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError, SyntaxError, MemoryError):
        return None
    return dtype if not dtype.hasobject and 0 < dtype.itemsize < _LARGEST_ELEMENT and dtype.subdtype is None else None


def _is_plain(descr: Any, depth: int) -> bool:
    if isinstance(descr, str):
        return bool(_PLAIN.fullmatch(descr))
    return isinstance(descr, list) and depth > 0 and all(_is_field(field, depth - 1) for field in descr)


def _is_field(field: object, depth: int) -> bool:
    if not isinstance(field, tuple) or len(field) not in (2, 3) or not _is_plain(field[1], depth):
        return False
    names = field[0] if isinstance(field[0], tuple) else (field[0],)
    shapes = field[2:]
    return (
        len(names) in (1, 2)
        and all(isinstance(name, str) for name in names)
        and all(isinstance(shape, tuple) and is_possible(shape) for shape in shapes)
    )
