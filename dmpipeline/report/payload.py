"""Arrays as the page's script reads them: one block of bytes, deflated, in base64, and where in it each array lies."""

import base64
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

_KINDS = ("u1", "u2", "i2", "i4", "f2", "f4")
_ALIGNED = 8


def packed(arrays: Mapping[str, npt.NDArray[Any]]) -> tuple[str, dict[str, dict[str, Any]]]:
    """Pack arrays.

    Parameters
    ----------
    arrays : mapping of str to array
        Of uint8, uint16, int16, int32, float16 or float32.

    Returns
    -------
    text : str
        Base64.
    places : dict
        By name, ready for JSON: `dtype` as "f4", `shape`, and `offset` in bytes, a multiple of 8.
    """
    block = bytearray()
    places: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        kind = array.dtype.str[1:]
        if kind not in _KINDS:
            raise TypeError(f"array {name} is of {array.dtype}, which the page's script does not read")
        places[name] = {"dtype": kind, "shape": list(array.shape), "offset": len(block)}
        block += np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
        block += bytes(-len(block) % _ALIGNED)
    return base64.b64encode(zlib.compress(bytes(block), 9)).decode("ascii"), places
