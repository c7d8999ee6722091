"""Where the elements of an array lie in its object, and how their stored bits become numbers.

NumPy has no bfloat16 and no 8-bit floats. Their bits are read as unsigned integers of the same size, so that plans and
prices count what is stored, and become float32 numbers, each exactly the stored one, when an array is made of them.
"""

import difflib
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

ReadAt: TypeAlias = Callable[[int, int], bytes]
"""Read the half-open byte range (start, stop) of an object; fewer bytes come back only at its end."""

MOST_DIMENSIONS = 64
_LARGEST_SIZE = 1 << 50
_MOST_NAMES_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the elements of an array lie in an object.

    Attributes
    ----------
    shape : tuple of int
    dtype : numpy.dtype
        As which an element is stored: what plans and prices count.
    offset : int
        Bytes before the first element.
    strides : tuple of int
        Bytes from one element to the next along each axis. The elements fill their extent without holes, in C order,
        Fortran order, or any other order of the axes.
    encoding : str
        Of numbers that NumPy does not have, one of `ENCODINGS`, as "bfloat16"; "" where it has them.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    strides: tuple[int, ...]
    encoding: str = ""

    @property
    def read_dtype(self) -> np.dtype[Any]:
        """As which an element is read: the stored dtype, or what its encoding stands for."""
        return ENCODINGS[self.encoding].read_dtype if self.encoding else self.dtype

    @property
    def n_bytes(self) -> int:
        """Bytes of all elements as they are stored."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stop(self) -> int:
        """First byte after the last element."""
        return self.offset + self.n_bytes

    def is_alike(self, other: "Layout") -> bool:
        """Return whether it is of arrays of the same shape and dtype, wherever their elements lie."""
        return (self.shape, self.dtype, self.encoding) == (other.shape, other.dtype, other.encoding)

    @property
    def storage_order(self) -> list[int]:
        """Axes from the slowest to the fastest."""
        return sorted(range(len(self.shape)), key=lambda axis: (-self.strides[axis], axis))

    def decode(self, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Turn stored elements into the numbers they stand for; exact, and without a copy where NumPy has them."""
        return ENCODINGS[self.encoding].decode(stored) if self.encoding else stored


@dataclass(frozen=True, slots=True)
class Encoding:
    """A number format that NumPy does not have.

    Attributes
    ----------
    stored_dtype, read_dtype : numpy.dtype
    decode : callable
        Turns an array of the first into one of the second.
    """

    stored_dtype: np.dtype[Any]
    read_dtype: np.dtype[Any]
    decode: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


def contiguous_strides(shape: tuple[int, ...], itemsize: int, *, fortran: bool = False) -> tuple[int, ...]:
    """Compute the byte strides of an array without holes, in C or Fortran order."""
    sizes = shape if fortran else shape[::-1]
    strides = [itemsize]
    for size in sizes[:-1]:
        strides.append(strides[-1] * max(size, 1))
    strides = strides[: len(shape)]
    return tuple(strides if fortran else strides[::-1])


def is_possible(shape: tuple[Any, ...], itemsize: int = 1) -> bool:
    """Whether NumPy could make an array of this shape and element size."""
    if len(shape) > MOST_DIMENSIONS or not all(type(size) is int and 0 <= size < _LARGEST_SIZE for size in shape):
        return False
    n_elements: int = math.prod(size or 1 for size in shape)
    return n_elements < _LARGEST_SIZE and n_elements * itemsize < 1 << 62


def stored_as(name: str) -> tuple[np.dtype[Any], str]:
    """Look up a dtype by its name, as a catalog writes it: how an element is stored, and its encoding or "".

    Raises
    ------
    TypeError
        If NumPy does not know it, and it is not an encoding either.
    """
    return (ENCODINGS[name].stored_dtype, name) if name in ENCODINGS else (np.dtype(name), "")


def listed(names: Iterable[str], *, near: str = "") -> str:
    """Write some names out, those most like `near` first, and how many others there are."""
    every = list(names)
    nearest = difflib.get_close_matches(near, every[:10_000], n=3, cutoff=0.4) if near else []
    order = [*nearest, *(name for name in every[: 2 * _MOST_NAMES_SHOWN] if name not in nearest)]
    shown = ", ".join(name[:100] for name in order[:_MOST_NAMES_SHOWN])
    n_others = len(every) - _MOST_NAMES_SHOWN
    return f"{shown} and {n_others:,} others" if n_others > 0 else shown


def _bfloat16(stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Widen bfloat16, which is the upper half of a float32."""
    widened = np.left_shift(stored, 16, dtype=np.uint32)
    return np.asarray(widened, order="K").view(np.float32)


def _complex32(stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Widen pairs of float16, the real part in the lower half."""
    read = np.empty_like(stored, np.complex64)
    read.real = (stored & 0xFFFF).astype(np.uint16).view(np.float16)
    read.imag = (stored >> 16).astype(np.uint16).view(np.float16)
    return read


def _by_table(name: str) -> Callable[[npt.NDArray[Any]], npt.NDArray[Any]]:
    return lambda stored: np.asarray(np.take(_values_of_8_bits(name), stored))


@functools.cache
def _values_of_8_bits(name: str) -> npt.NDArray[np.float32]:
    """Compute the number of each of the 256 patterns of an 8-bit float, every one exact in float32.

    The formats are those of OCP's "8-bit Floating Point Specification" and "Microscaling Formats"; "fn" has no
    infinities, and "uz" no negative zero, whose pattern is then the only not-a-number.
    """
    patterns = np.arange(256)
    if name == "float8_e8m0fnu":
        powers: npt.NDArray[Any] = np.where(patterns == 255, np.nan, np.exp2(patterns - 127.0))
        return powers.astype(np.float32)
    n_mantissa = int(name[len("float8_e4m")])
    bias = (1 << (6 - n_mantissa)) - 1 + name.endswith("uz")
    exponent, mantissa = (patterns & 0x7F) >> n_mantissa, patterns & ((1 << n_mantissa) - 1)
    significand = mantissa / (1 << n_mantissa) + (exponent > 0)
    values: npt.NDArray[Any] = np.where(patterns & 0x80, -1.0, 1.0) * significand
    values *= np.exp2(np.maximum(exponent, 1) - float(bias))
    if name == "float8_e5m2":
        special = exponent == 31
        values[special] = np.where(mantissa, np.nan, np.copysign(np.inf, values))[special]
    elif name == "float8_e4m3fn":
        values[(patterns & 0x7F) == 0x7F] = np.nan
    else:
        values[0x80] = np.nan
    return values.astype(np.float32)


ENCODINGS = {
    "bfloat16": Encoding(np.dtype("<u2"), np.dtype(np.float32), _bfloat16),
    "complex32": Encoding(np.dtype("<u4"), np.dtype(np.complex64), _complex32),
} | {
    name: Encoding(np.dtype("u1"), np.dtype(np.float32), _by_table(name))
    for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
}
"""Number formats that NumPy does not have, by torch's names."""
