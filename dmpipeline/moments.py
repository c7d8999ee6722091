"""Second moments of (masks, outputs): all that a linear fit needs to know about any number of models.

A fit of every target costs no pass over the models once these are known, so they are read once, streamed in blocks of
rows, and can be added up from parts. The counts X'X are exact integers. X'y is summed in float64, which is exact for
float16 outputs of ordinary size; then neither the size of the blocks nor the order of merging changes a bit.

Wider outputs may lie far from zero and vary little, a million give or take a tenth: their squares would drown what
varies. So their sums are taken about a shift, the first row read, and parts with different shifts are brought to one
when they are added, which costs no more than rounding.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from dmpipeline.errors import SpecError

BLOCK_ROWS = 4096


class RowSliceable(Protocol):
    """Anything with a shape whose `x[i:j]` can be made a NumPy array: ndarray, LazyArray, Zarr or dask array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of all dimensions, rows first."""

    def __getitem__(self, rows: slice, /) -> Any:
        """Rows i to j, half-open."""


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Sums over `n` models of products of masks X (n, n_train) and outputs Y (n, n_targets), these less their shift.

    Attributes
    ----------
    n : int
        Rows summed.
    gram : array of int32, shape (n_train, n_train)
        X'X: how many subsets hold both examples. Exact. Its diagonal is `ones`.
    shift : array of float64, shape (n_targets,)
        What was taken off every output before it was summed: 0 for float16, else the first row's outputs.
    cross : array of float64, shape (n_train, n_targets)
        X'(Y - shift).
    y_sum : array of float64, shape (n_targets,)
        Column sums of Y - shift.
    y_squares : array of float64, shape (n_targets,)
        Column sums of (Y - shift) squared.
    """

    n: int
    gram: NDArray[np.int32]
    shift: NDArray[np.float64]
    cross: NDArray[np.float64]
    y_sum: NDArray[np.float64]
    y_squares: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        masks: RowSliceable,
        outputs: RowSliceable,
        *,
        start: int = 0,
        stop: int | None = None,
        block_rows: int = BLOCK_ROWS,
        progress: Callable[[int, int], None] | None = None,
    ) -> Self:
        """Sum the rows `start` to `stop` (half-open), `block_rows` at a time.

        Parameters
        ----------
        masks : bool or 0/1, shape (n_models, n_train)
        outputs : real, shape (n_models, n_targets)
            float16 is widened to float64 first.
        progress : callable, optional
            Called with (rows done, rows in all) after each block.

        Raises
        ------
        SpecError
            Shapes that disagree, masks other than 0 and 1, outputs that are not finite (`rows` and `targets` name
            them).

        Notes
        -----
        Beside the result, memory holds one block: about `block_rows` x (11 n_train + 12 n_targets) bytes at most for
        boolean masks and float16 outputs, and a panel of 1,024 columns of the result.

        Examples
        --------
        >>> import numpy as np
        >>> m = Moments.of(np.array([[1, 0], [1, 1]], bool), np.array([[0.5], [2.0]], np.float16))
        >>> m.n, m.gram.tolist(), m.cross.ravel().tolist()
        (2, [[2, 1], [1, 1]], [2.5, 2.0])
        """
        n_models, n_train, n_targets = check_shapes(masks, outputs)
        stop = n_models if stop is None else stop
        if not 0 <= start < stop <= n_models:
            raise SpecError(f"rows {start}:{stop} are not in 0:{n_models}; choose 0 <= start < stop <= {n_models}")
        if block_rows < 1:
            raise SpecError(f"block_rows is {block_rows}; choose at least 1")
        gram = np.zeros((n_train, n_train), np.int32)
        cross = np.zeros((n_train, n_targets))
        shift = np.zeros(n_targets)
        y_sum, y_squares = np.zeros(n_targets), np.zeros(n_targets)
        for first in range(start, stop, block_rows):
            last = min(first + block_rows, stop)
            x = _read_masks(masks, first, last, n_train)
            y, is_half = _read_outputs(outputs, first, last, n_targets)
            if first == start and not is_half:
                shift = y[0].copy()
            y -= shift
            _add_gram(gram, x)
            _add_cross(cross, x, y)
            y_sum += y.sum(axis=0)
            y_squares += np.einsum("ij,ij->j", y, y)
            if progress is not None:
                progress(last - start, stop - start)
        _mirror_upper(gram)
        return cls(n=stop - start, gram=gram, shift=shift, cross=cross, y_sum=y_sum, y_squares=y_squares)

    @property
    def ones(self) -> NDArray[np.int32]:
        """How many subsets hold each example, shape (n_train,); the column sums of X."""
        return np.diagonal(self.gram)

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of the rows of both; SpecError where their columns differ in number."""
        if self.cross.shape != other.cross.shape:
            raise SpecError(
                f"moments of {self.cross.shape} and {other.cross.shape} (n_train, n_targets) cannot be added; "
                "take both from the same examples and targets"
            )
        if self.n + other.n > np.iinfo(np.int32).max:
            raise SpecError(f"{self.n + other.n} rows overflow the 32-bit counts; fit at most 2^31 - 1 models")
        cross = self.cross + other.cross
        y_sum, y_squares = self.y_sum + other.y_sum, self.y_squares + other.y_squares
        off = other.shift - self.shift
        if off.any():  # (y - s) = (y - s') + off, summed over the rows of `other`
            for left in range(0, len(cross), _PANEL_COLUMNS):
                cross[left : left + _PANEL_COLUMNS] += np.outer(other.ones[left : left + _PANEL_COLUMNS], off)
            y_sum += other.n * off
            y_squares += 2 * off * other.y_sum + other.n * off**2
        return Moments(
            n=self.n + other.n,
            gram=self.gram + other.gram,
            shift=self.shift,
            cross=cross,
            y_sum=y_sum,
            y_squares=y_squares,
        )


def check_shapes(masks: RowSliceable, outputs: RowSliceable) -> tuple[int, int, int]:
    """Return (n_models, n_train, n_targets), or raise SpecError where the two do not make one regression."""
    for name, array in (("masks", masks), ("outputs", outputs)):
        if not hasattr(array, "shape"):
            raise SpecError(f"{name} are a {type(array).__name__}; hand in an array, such as numpy.asarray({name})")
    if len(masks.shape) != 2:
        raise SpecError(f"masks have shape {masks.shape}; expected (n_models, n_train)", shape=masks.shape)
    if len(outputs.shape) != 2:
        raise SpecError(
            f"outputs have shape {outputs.shape}; expected (n_models, n_targets): choose one number a target, "
            "such as the margin of the logits, and reshape a single target to (n_models, 1)",
            shape=outputs.shape,
        )
    if masks.shape[0] != outputs.shape[0]:
        raise SpecError(
            f"{masks.shape[0]} masks but {outputs.shape[0]} rows of outputs; hand in the same models in the same order",
            n_masks=masks.shape[0],
            n_outputs=outputs.shape[0],
        )
    if 0 in masks.shape or 0 in outputs.shape:
        raise SpecError(
            f"masks {masks.shape} and outputs {outputs.shape} leave nothing to fit; "
            "expected at least a model, an example and a target"
        )
    return masks.shape[0], masks.shape[1], outputs.shape[1]


def as_binary(block: NDArray[Any], *, first: int) -> NDArray[np.int8]:
    """Turn a block of masks, whose first row is `first`, into int8; SpecError names a value other than 0 and 1."""
    if block.dtype == np.bool_:
        return np.ascontiguousarray(block).view(np.int8)
    wrong = (block != 0) & (block != 1)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise SpecError(
            f"masks hold {block[row, column]} at row {first + row}, column {column}; expected booleans, or 0 and 1 "
            "(True where the example was trained on)",
            row=int(first + row),
            column=int(column),
        )
    return np.ascontiguousarray(block, dtype=np.int8)


_PANEL_COLUMNS = 1024
_EXACT_ROWS = 2**23
_LEAST_INT8_SIDE = 16


def _read_masks(masks: RowSliceable, first: int, last: int, n_train: int) -> NDArray[np.int8]:
    block = np.asarray(masks[first:last])
    if block.shape != (last - first, n_train):
        raise SpecError(f"masks[{first}:{last}] gave shape {block.shape}; expected {(last - first, n_train)}")
    return as_binary(block, first=first)


def _read_outputs(outputs: RowSliceable, first: int, last: int, n_targets: int) -> tuple[NDArray[np.float64], bool]:
    """Read a block of outputs, widened; and tell whether they were float16."""
    block = np.asarray(outputs[first:last])
    if block.shape != (last - first, n_targets):
        raise SpecError(f"outputs[{first}:{last}] gave shape {block.shape}; expected {(last - first, n_targets)}")
    if block.dtype.kind not in "fiub":
        raise SpecError(f"outputs have dtype {block.dtype}; expected real numbers, such as float16 margins")
    wide = block.astype(np.float64)
    finite = np.isfinite(wide)
    if not finite.all():
        rows = (first + np.flatnonzero(~finite.all(axis=1))).tolist()
        targets = np.flatnonzero(~finite.all(axis=0)).tolist()
        raise SpecError(
            f"outputs are not finite in rows {_some(rows)}, targets {_some(targets)}; "
            "train those rows again, or leave them out",
            rows=rows,
            targets=targets,
        )
    return wide, block.dtype == np.float16


def _some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return shown if len(numbers) <= 5 else f"{shown} and {len(numbers) - 5} more"


def _add_gram(gram: NDArray[np.int32], x: NDArray[np.int8]) -> None:
    """Add X'X to the upper panels of `gram`; what lies below them is mirrored once, at the end."""
    ints = torch.from_numpy(x)
    transposed = ints.T.contiguous()
    for left in range(0, len(gram), _PANEL_COLUMNS):
        right = min(left + _PANEL_COLUMNS, len(gram))
        gram[:right, left:right] += _count_products(transposed[:right], ints[:, left:right].contiguous())


def _mirror_upper(gram: NDArray[np.int32]) -> None:
    for left in range(0, len(gram), _PANEL_COLUMNS):
        right = min(left + _PANEL_COLUMNS, len(gram))
        gram[left:right, :left] = gram[:left, left:right].T


def _count_products(a: torch.Tensor, b: torch.Tensor) -> NDArray[np.int32]:
    """Multiply two int8 matrices of zeros and ones exactly, by whichever exact product is faster on this machine."""
    # for a single row or column the int8 product answers with memory it never wrote (seen in torch 2.13 with VNNI)
    if min(a.shape[0], b.shape[1]) >= _LEAST_INT8_SIDE and _int8_products_pay():
        return torch._int_mm(a, b).numpy()
    return _float_products(a, b)


def _float_products(a: torch.Tensor, b: torch.Tensor) -> NDArray[np.int32]:
    """Count in float32, which is exact below 2^24, so longer inner dimensions are cut."""
    total = np.zeros((a.shape[0], b.shape[1]), np.int32)
    for first in range(0, a.shape[1], _EXACT_ROWS):
        part = a[:, first : first + _EXACT_ROWS].float() @ b[first : first + _EXACT_ROWS].float()
        total += part.to(torch.int32).numpy()
    return total


@cache
def _int8_products_pay() -> bool:
    """Try torch's int8 product once a process, for being there, right, and faster than float32.

    It is a private function whose kernels differ by machine: several times faster where there are int8 instructions
    (VNNI, AMX), and dozens of times slower where there are none. Both products count exactly, so the choice changes
    no result.
    """
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.integers(0, 2, shape, dtype=np.int8)) for shape in ((256, 1024), (1024, 256)))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    expected = _float_products(a, b)
    for _ in range(3):
        started = time.perf_counter()
        try:
            counted = torch._int_mm(a, b).numpy()
        except (AttributeError, RuntimeError):
            return False
        if not np.array_equal(counted, expected):
            return False
        counted_at = time.perf_counter()
        _float_products(a, b)
        seconds[True].append(counted_at - started)
        seconds[False].append(time.perf_counter() - counted_at)
    return min(seconds[True]) < min(seconds[False])


def _add_cross(cross: NDArray[np.float64], x: NDArray[np.int8], y: NDArray[np.float64]) -> None:
    for left in range(0, len(cross), _PANEL_COLUMNS):
        cross[left : left + _PANEL_COLUMNS] += x[:, left : left + _PANEL_COLUMNS].T.astype(np.float64) @ y
