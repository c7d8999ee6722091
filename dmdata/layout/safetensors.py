"""The header of a ``.safetensors``: JSON that says of each tensor its dtype, its shape and its bytes.

The format is that of https://huggingface.co/docs/safetensors: eight bytes with the length of the JSON, the JSON, and
the tensors in C order, which together fill the rest of the file without holes.
"""

import json
import math
from typing import Any

import numpy as np

from dmdata.errors import FormatError
from dmdata.layout.layouts import Layout, ReadAt, contiguous_strides, is_possible, stored_as

SAFETENSORS_HEAD_BYTES = 64 << 10
"""What is read first of a ``.safetensors``: the whole header of a few hundred tensors."""

# the bound of the format's own reader
_LONGEST_HEADER = 100_000_000
_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip


def safetensors_layouts(read_at: ReadAt, *, object_bytes: int, url: str) -> dict[str, Layout]:
    """Read the header of a ``.safetensors`` object.

    Parameters
    ----------
    read_at : callable
        Called for the length of the header, and for the header.
    object_bytes : int
    url : str
        Names the object in errors.

    Returns
    -------
    layouts : dict of str to Layout
        In the order of the header.

    Raises
    ------
    FormatError
        If it is not of this format, is damaged or truncated, or a tensor is of another dtype.
    """
    n_header = int.from_bytes(read_at(0, min(8, object_bytes)), "little")
    start = 8 + n_header
    if object_bytes < 10 or n_header > _LONGEST_HEADER or start > object_bytes:
        raise FormatError(
            f"{url} claims a header of {n_header:,} bytes in an object of {object_bytes:,}; it is not a .safetensors "
            "file, or is truncated",
            url=url,
        )
    try:
        header = json.loads(bytes(read_at(8, start)), object_pairs_hook=_without_duplicates)
        if not isinstance(header, dict):
            raise TypeError("it is not an object of JSON")
        layouts = {
            name: _layout(about, name, start, object_bytes - start, url)
            for name, about in header.items()
            if name != "__metadata__"
        }
    except FormatError:
        raise
    except (ValueError, TypeError, LookupError, RecursionError, MemoryError) as error:
        raise FormatError(f"{url} has a damaged .safetensors header: {str(error)[:200]}", url=url) from error
    _require_no_holes(layouts, start, object_bytes, url)
    return layouts


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name is in it twice")
    return made


def _layout(about: Any, name: str, start: int, n_data: int, url: str) -> Layout:
    code, shape, (first, stop) = about["dtype"], about["shape"], about["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise FormatError(
            f"{url} has {name[:100]} of dtype {str(code)[:20]}, which is not read; known are {', '.join(_DTYPES)}",
            url=url,
        )
    dtype, encoding = stored_as(_DTYPES[code])
    dtype = np.dtype(dtype).newbyteorder("<")
    if not isinstance(shape, list) or not is_possible(tuple(shape), dtype.itemsize):
        raise FormatError(f"{url} has {name[:100]} of shape {str(shape)[:80]}; expected a list of counts", url=url)
    n_bytes = math.prod(shape) * dtype.itemsize
    if type(first) is not int or type(stop) is not int or not 0 <= first <= stop <= n_data or stop - first != n_bytes:
        raise FormatError(
            f"{url} puts {name[:100]} at bytes {str(first)[:20]} to {str(stop)[:20]} of {n_data:,}, but its shape "
            f"{str(tuple(shape))[:80]} needs {n_bytes:,}; it is truncated or damaged: fetch it again",
            url=url,
        )
    return Layout(tuple(shape), dtype, start + first, contiguous_strides(tuple(shape), dtype.itemsize), encoding)


def _require_no_holes(layouts: dict[str, Layout], start: int, object_bytes: int, url: str) -> None:
    """Refuse tensors that overlap or leave bytes unused, which the format forbids."""
    position = start
    for name, layout in sorted(layouts.items(), key=lambda item: (item[1].offset, item[1].stop)):
        if layout.offset != position:
            raise FormatError(
                f"{url} has {name[:100]} at byte {layout.offset:,}, where {position:,} was expected: tensors overlap "
                "or leave a hole; it is damaged",
                url=url,
            )
        position = layout.stop
    if position != object_bytes:
        raise FormatError(
            f"{url} has {object_bytes:,} bytes but its tensors end at {position:,}; it is damaged", url=url
        )
