"""Second moments of (masks, outputs): all that a linear fit needs to know about any number of models.

A fit of every target costs no pass over the models once these are known, so they are read once, streamed in blocks of
rows, and can be added up from parts. The counts X'X are exact integers. X'y is summed in float64, which is exact for
float16 outputs of ordinary size; then neither the size of the blocks nor the order of merging changes a bit.

Wider outputs may lie far from zero and vary little, a million give or take a tenth: their squares would drown what
varies. So their sums are taken about a shift, the first row read, and parts with different shifts are brought to one
when they are added, which costs no more than rounding.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from dmpipeline import binary
from dmpipeline.compute import available_threads
from dmpipeline.errors import SpecError

BLOCK_ROWS = 4096

BITS_BYTES = 2**27
"""Masks are packed to bits, and so many bytes of them gathered (128 MiB) before X'X is passed over once."""


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
        threads: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Self:
        """Sum the rows `start` to `stop` (half-open), `block_rows` at a time.

        Parameters
        ----------
        masks : bool or 0/1, shape (n_models, n_train)
        outputs : real, shape (n_models, n_targets)
            float16 is widened to float64 first.
        threads : int, optional
            All processors if not given. The result does not depend on it.
        progress : callable, optional
            Called with (rows done, rows in all) after each block.

        Raises
        ------
        SpecError
            Shapes that disagree, masks other than 0 and 1, outputs that are not finite (`rows` and `targets` name
            them).

        Notes
        -----
        Beside the result, memory holds one block, about `block_rows` x (n_train + 12 n_targets) bytes for boolean
        masks and float16 outputs; at most `BITS_BYTES`, or the bits of a block if those are more; and 1.5 MiB a thread.

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
        if threads is not None and threads < 1:
            raise SpecError(f"threads is {threads}; choose at least 1")
        threads = threads or available_threads()
        gram = np.zeros((n_train, n_train), np.int32)
        cross = np.zeros((n_train, n_targets))
        shift, y_sum, y_squares = np.zeros(n_targets), np.zeros(n_targets), np.zeros(n_targets)
        bits = binary.Bits(n_train, min(max(BITS_BYTES // n_train, block_rows // 8 + 4), (stop - start) // 8 + 4))
        with ThreadPoolExecutor(threads) as pool:
            for first in range(start, stop, block_rows):
                last = min(first + block_rows, stop)
                codes = binary.code_rows(_read_masks(masks, first, last, n_train))
                y = _read_outputs(outputs, first, last, n_targets)
                if first == start and y.dtype != np.float16:
                    shift = y[0].astype(np.float64)
                with np.errstate(over="ignore", invalid="ignore"):  # such sums are refused
                    binary.add_products(codes, y, shift, cross, y_sum, y_squares, pool, threads=threads)
                if not np.isfinite(y_squares).all():
                    raise _not_finite(y, first)
                if not bits.fits(codes):
                    bits.add_counts(gram, pool)
                bits.append(codes)
                if progress is not None:
                    progress(last - start, stop - start)
            bits.add_counts(gram, pool)
        return cls(n=stop - start, gram=gram, shift=shift, cross=cross, y_sum=y_sum, y_squares=y_squares)

    @property
    def ones(self) -> NDArray[np.int32]:
        """How many subsets hold each example, shape (n_train,); the column sums of X."""
        return np.diagonal(self.gram)

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of the rows of both; SpecError where their columns differ in number."""
        return self._with(other, 1)

    def __sub__(self, other: "Moments") -> "Moments":
        """Moments of the rows that are in these and not in `other`, all of whose rows must be in these."""
        return self._with(other, -1)

    def _with(self, other: "Moments", sign: int) -> "Moments":
        if self.cross.shape != other.cross.shape:
            raise SpecError(
                f"moments of {self.cross.shape} and {other.cross.shape} (n_train, n_targets) cannot be added or taken "
                "off; take both from the same examples and targets"
            )
        n = self.n + sign * other.n
        if not 0 < n <= np.iinfo(np.int32).max:
            raise SpecError(f"{n} rows cannot be counted in 32 bits; fit at most 2^31 - 1 models, and at least one")
        cross = self.cross + sign * other.cross
        y_sum = self.y_sum + sign * other.y_sum
        y_squares = self.y_squares + sign * other.y_squares
        off = other.shift - self.shift
        if off.any():  # (y - s) = (y - s') + off, summed over the rows of `other`
            for top in range(0, len(cross), _ROWS_AT_ONCE):
                rows = slice(top, top + _ROWS_AT_ONCE)
                cross[rows] += np.outer(sign * other.ones[rows], off)
            y_sum += sign * other.n * off
            y_squares += sign * (2 * off * other.y_sum + other.n * off**2)
        gram = np.add(self.gram, other.gram) if sign > 0 else np.subtract(self.gram, other.gram)
        return Moments(n=n, gram=gram, shift=self.shift, cross=cross, y_sum=y_sum, y_squares=y_squares)


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


_ROWS_AT_ONCE = 1024

_LARGEST = 1e150
"""Numbers beyond this, whose squares float64 cannot hold, count as not finite."""


def _read_masks(masks: RowSliceable, first: int, last: int, n_train: int) -> NDArray[np.int8]:
    block = np.asarray(masks[first:last])
    if block.shape != (last - first, n_train):
        raise SpecError(f"masks[{first}:{last}] gave shape {block.shape}; expected {(last - first, n_train)}")
    return as_binary(block, first=first)


def _read_outputs(outputs: RowSliceable, first: int, last: int, n_targets: int) -> NDArray[Any]:
    block = np.asarray(outputs[first:last])
    if block.shape != (last - first, n_targets):
        raise SpecError(f"outputs[{first}:{last}] gave shape {block.shape}; expected {(last - first, n_targets)}")
    if block.dtype.kind not in "fiub":
        raise SpecError(f"outputs have dtype {block.dtype}; expected real numbers, such as float16 margins")
    return block


def _not_finite(block: NDArray[Any], first: int) -> SpecError:
    """Name what keeps the sum of squares of a block, whose first row is `first`, from being a number."""
    finite = np.abs(block.astype(np.float64)) < _LARGEST
    rows = (first + np.flatnonzero(~finite.all(axis=1))).tolist()
    targets = np.flatnonzero(~finite.all(axis=0)).tolist()
    return SpecError(
        f"outputs are not finite in rows {_some(rows)}, targets {_some(targets)}; "
        "train those rows again, or leave them out",
        rows=rows,
        targets=targets,
    )


def _some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return shown if len(numbers) <= 5 else f"{shown} and {len(numbers) - 5} more"
