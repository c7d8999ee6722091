"""What a NumPy-style request asks for, axis by axis, checked against a shape before anything else happens.

``[]`` follows NumPy's basic indexing plus one index array; ``oindex`` takes an index array for each axis and answers
with their product. Either way the answer is a product of axes, which is what can be read as byte ranges.
"""

import hashlib
import math
import operator
from dataclasses import dataclass
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
import numpy.typing as npt

from dmdata.errors import SelectionError

Indices: TypeAlias = npt.NDArray[np.int64]
AxisRequest: TypeAlias = range | Indices


@dataclass(frozen=True, slots=True)
class Selection:
    """A product of axes of an array.

    Attributes
    ----------
    array_shape : tuple of int
        Shape of the array selected from.
    axes : tuple of range or int64 array
        The wanted indices of each axis, all within bounds and not negative; in any order, repeats allowed.
    kept : tuple of int
        Axes of the array that stay axes of the answer, in the answer's order; an axis indexed by one number is dropped.
    """

    array_shape: tuple[int, ...]
    axes: tuple[AxisRequest, ...]
    kept: tuple[int, ...]

    @property
    def product_shape(self) -> tuple[int, ...]:
        """Number of wanted indices along each axis of the array."""
        return tuple(len(axis) for axis in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the answer."""
        return tuple(len(self.axes[axis]) for axis in self.kept)

    @property
    def n_elements(self) -> int:
        """Elements of the answer."""
        return math.prod(self.product_shape)

    @property
    def distinct(self) -> tuple[AxisRequest, ...]:
        """Wanted indices of each axis, ascending and without repeats: what has to be read."""
        return tuple(_distinct(axis)[0] for axis in self.axes)

    def keeps_all_of(self, axis: int) -> bool:
        """Whether every index of an axis is wanted, once and in order."""
        wanted = self.axes[axis]
        return isinstance(wanted, range) and wanted == range(self.array_shape[axis])

    @property
    def digest(self) -> str:
        """SHA-256, as hexadecimal text, of what is selected: the same for the same indices in the same order."""
        digest = hashlib.sha256()
        for axis in self.axes:
            if isinstance(axis, range):
                digest.update(f"{axis.start}:{axis.stop}:{axis.step};".encode())
            else:
                digest.update(b"[" + axis.astype("<i8").tobytes() + b"]")
        return digest.hexdigest()

    def answer(self, product: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Turn the product of the `distinct` indices into what was asked for.

        A view of `product`, unless indices repeat or come out of order.
        """
        for axis, request in enumerate(self.axes):
            inverse = _distinct(request)[1]
            if isinstance(inverse, slice):
                product = product[(slice(None),) * axis + (inverse,)]
            elif inverse is not None:
                product = product.take(inverse, axis=axis)
        return self._arranged(product)

    def _arranged(self, product: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Drop the axes indexed by one number and put the rest in order."""
        order = [*self.kept, *(axis for axis in range(len(self.axes)) if axis not in self.kept)]
        return product.transpose(order).reshape(self.shape)


def select(key: object, shape: tuple[int, ...], *, orthogonal: bool) -> Selection:
    """Check a request against a shape.

    Parameters
    ----------
    key : int, slice, ellipsis, index or boolean array, or a tuple of them
    shape : tuple of int
        The array's.
    orthogonal : bool
        Whether several index arrays mean their product (``oindex``); in plain indexing they are refused.

    Raises
    ------
    SelectionError
        If an index is out of bounds or of a kind that is not read, or several index arrays meet in plain indexing.
    """
    requests = _one_each_axis(key, shape)
    axes: list[AxisRequest] = []
    dropped: list[int] = []
    arrays: list[int] = []
    for axis, (request, size) in enumerate(zip(requests, shape, strict=True)):
        if isinstance(request, slice):
            axes.append(_from_slice(request, size, axis))
        elif (index := _as_integer(request)) is not None:
            axes.append(_from_integer(index, size, axis))
            dropped.append(axis)
        else:
            axes.append(_from_array(request, size, axis))
            arrays.append(axis)
    if len(arrays) > 1 and not orthogonal:
        raise SelectionError(
            f"index arrays on axes {arrays} in [] would pair up in NumPy; for their product use .oindex[...]",
            shape=shape,
        )
    kept = [axis for axis in range(len(shape)) if axis not in dropped]
    if arrays and not orthogonal and _split_by_slice([*arrays, *dropped]):
        # NumPy puts the axis of an index array first where a slice stands between it and an integer
        kept.remove(arrays[0])
        kept.insert(0, arrays[0])
    return Selection(shape, tuple(axes), tuple(kept))


def parse_selection(text: str, shape: tuple[int, ...]) -> Selection:
    """Read a selection written like ``0:1000,42`` or ``::2,[1,5,9]`` on a command line.

    Raises
    ------
    SelectionError
        If the text is not a selection, or does not fit the shape.
    """
    parts = _split_outside_brackets(text)
    try:
        key = tuple(_parse_part(part.strip()) for part in parts)
    except ValueError as error:
        raise SelectionError(
            f"{text!r} is not a selection; write it like 0:1000,42 or ::2,[1,5,9]", shape=shape
        ) from error
    return select(key, shape, orthogonal=True)


def _one_each_axis(key: object, shape: tuple[int, ...]) -> list[Any]:
    given = list(key) if isinstance(key, tuple) else [key]
    ellipses = [position for position, item in enumerate(given) if item is Ellipsis]
    if len(ellipses) > 1:
        raise SelectionError("an index has two ellipses; at most one is understood", shape=shape)
    if any(item is None for item in given):
        raise SelectionError("np.newaxis adds nothing that could be read; add the axis to the answer", shape=shape)
    if len(given) - len(ellipses) > len(shape):
        raise SelectionError(
            f"{len(given) - len(ellipses)} indices for an array of {len(shape)} dimensions, shape {shape}", shape=shape
        )
    missing = [slice(None)] * (len(shape) - len(given) + len(ellipses))
    if ellipses:
        return [*given[: ellipses[0]], *missing, *given[ellipses[0] + 1 :]]
    return [*given, *missing]


def _as_integer(request: object) -> int | None:
    if isinstance(request, bool | np.bool_) or (
        isinstance(request, np.ndarray) and request.shape == () and request.dtype == bool
    ):
        raise SelectionError(f"{request} as an index adds an axis in NumPy and is not read; use 0, 1 or an array")
    if isinstance(request, np.ndarray) and request.ndim > 0:
        return None
    if isinstance(request, SupportsIndex):
        return operator.index(request)
    return None


def _from_integer(index: int, size: int, axis: int) -> range:
    if not -size <= index < size:
        raise SelectionError(f"index {index} is out of bounds for axis {axis} with size {size}", axis=axis, size=size)
    index %= size
    return range(index, index + 1)


def _from_slice(request: slice, size: int, axis: int) -> range:
    try:
        return range(*request.indices(size))
    except (TypeError, ValueError) as error:
        raise SelectionError(f"slice {request} cannot be used on axis {axis}: {error}", axis=axis, size=size) from error


def _from_array(request: object, size: int, axis: int) -> Indices:
    try:
        array = np.asarray(request)
    except ValueError as error:
        raise SelectionError(
            f"{request!r} is not an index for axis {axis}; use integers, slices or 1-D arrays"
        ) from error
    if array.ndim != 1 or (array.dtype.kind not in "iub" and array.size):
        raise SelectionError(
            f"an index of {array.ndim} dimensions and dtype {array.dtype} on axis {axis} is not read; "
            "use integers, slices, or 1-D integer or boolean arrays",
            axis=axis,
        )
    if array.dtype.kind == "b":
        if len(array) != size:
            raise SelectionError(f"a boolean index of {len(array)} entries for axis {axis} with size {size}", axis=axis)
        return np.flatnonzero(array).astype(np.int64)
    outside = array[(array < -size) | (array >= size)]
    if outside.size:
        raise SelectionError(
            f"index {outside[0]} is out of bounds for axis {axis} with size {size}", axis=axis, size=size
        )
    indices = array.astype(np.int64)
    return np.where(indices < 0, indices + size, indices)


def _distinct(request: AxisRequest) -> tuple[AxisRequest, slice | npt.NDArray[np.intp] | None]:
    """Sort the wanted indices without repeats; return how to get from them to the request (None: they are the same)."""
    if isinstance(request, range):
        return (request, None) if request.step > 0 else (request[::-1], slice(None, None, -1))
    if len(request) < 2 or bool((request[1:] > request[:-1]).all()):
        return request, None
    values, inverse = np.unique(request, return_inverse=True)
    return values, inverse


def _split_by_slice(axes: list[int]) -> bool:
    return max(axes) - min(axes) + 1 > len(axes)


def _split_outside_brackets(text: str) -> list[str]:
    parts, depth = [""], 0
    for character in text:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _parse_part(part: str) -> object:
    if part == "...":
        return Ellipsis
    if part.startswith("[") and part.endswith("]"):
        return np.array([int(index) for index in part[1:-1].split(",") if index.strip()], np.int64)
    if ":" in part:
        fields = [int(field) if field.strip() else None for field in part.split(":")]
        if len(fields) > 3:
            raise ValueError(part)
        return slice(*fields)
    return int(part)
