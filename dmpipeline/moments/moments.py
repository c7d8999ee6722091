"""Second moments of (masks, outputs): all that a linear fit needs to know about any number of models.

A fit of every target costs no pass over the models once these are known, so they are read once, streamed in blocks of
rows. They can be added up from parts, kept in a file, and extended as more models arrive. The counts X'X are exact
integers. X'y is summed in float64, which is exact for float16 outputs of ordinary size; then neither the size of the
blocks nor the order of merging changes a bit.

Wider outputs may lie far from zero and vary little, a million give or take a tenth: their squares would drown what
varies. So their sums are taken about a shift, the first row read, and parts with different shifts are brought to one
when they are added, which costs no more than rounding.
"""

import copy
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from dmdata.errors import FormatError
from dmdata.reading.long_work import shows_count
from dmpipeline.compute import available_threads
from dmpipeline.errors import SpecError
from dmpipeline.moments import binary
from dmpipeline.moments.arrays import RowSliceable, as_rows, check_shapes, read_masks, read_outputs
from dmpipeline.moments.tensors import map_tensors, new_tensors, save_tensors

BLOCK_ROWS = 4096

BITS_BYTES = 2**27


def bits_bytes_for(n_train: int) -> int:
    """Say how much of the masks, packed to bits, is gathered before X'X is passed over once.

    `BITS_BYTES`, or a sixteenth of X'X if that is more: a pass over what lies in a file costs more than counting does.
    """
    return max(BITS_BYTES, 4 * n_train**2 // 16)


Seen = Callable[[int, NDArray[np.int8], NDArray[Any]], None]
"""Called with the rows that are read: the first one's number, their masks and their outputs."""


class Zeros(Protocol):
    """Makes an array of zeros, in memory or elsewhere."""

    def __call__(self, shape: tuple[int, ...], dtype: Any, /) -> NDArray[Any]:
        """Make one."""


@dataclass(frozen=True, eq=False)
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
    @shows_count("moments", "models")
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
        zeros: Zeros = np.zeros,
        seen: Seen | None = None,
        bits_bytes: int | None = None,
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
            Called with (rows done, total) after each block.
        zeros : callable
            Makes the arrays of sums from a shape and a dtype, as `numpy.zeros` does.
        seen : callable, optional
            Called on another thread with each block that is read: its first row, its masks (int8) and its outputs.
        bits_bytes : int, optional
            How much of the masks, packed to bits, is gathered before X'X is passed over once; see `bits_bytes_for`.

        Raises
        ------
        SpecError
            Shapes that disagree, masks other than 0 and 1, outputs that are not finite (`rows` and `targets` name
            them).

        Notes
        -----
        Memory holds the result and one block, about `block_rows` x (n_train + 12 n_targets) bytes for boolean masks and
        float16 outputs; at most `bits_bytes`, or the bits of a block if those are more; and 2 MiB a thread.

        Examples
        --------
        >>> import numpy as np
        >>> m = Moments.of(np.array([[1, 0], [1, 1]], bool), np.array([[0.5], [2.0]], np.float16))
        >>> m.n, m.gram.tolist(), m.cross.ravel().tolist()
        (2, [[2, 1], [1, 1]], [2.5, 2.0])
        """
        _, n_train, n_targets = check_shapes(masks, outputs)
        none = cls(
            n=0,
            gram=zeros((n_train, n_train), np.int32),
            shift=np.zeros(n_targets),
            cross=zeros((n_train, n_targets), np.float64),
            y_sum=np.zeros(n_targets),
            y_squares=np.zeros(n_targets),
        )
        return none._grow(
            masks,
            outputs,
            start,
            stop,
            block_rows=block_rows,
            threads=threads,
            progress=progress,
            seen=seen,
            bits_bytes=bits_bytes,
        )

    @shows_count("moments", "models")
    def extended(
        self,
        masks: RowSliceable,
        outputs: RowSliceable,
        *,
        start: int | None = None,
        stop: int | None = None,
        block_rows: int = BLOCK_ROWS,
        threads: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Self:
        """Sum further rows onto a copy of these; what was summed before is not read again.

        Parameters
        ----------
        start : int, optional
            The first row that is new; `n` if not given, as for moments of the first n rows.
        masks, outputs, stop, block_rows, threads, progress
            As for `of`, of the same examples and targets.

        Raises
        ------
        SpecError
            As for `of`; and if the columns are not as many as these have.
        """
        check_shapes(masks, outputs)
        if (masks.shape[1], outputs.shape[1]) != self.cross.shape:
            raise SpecError(
                f"masks {masks.shape} and outputs {outputs.shape} do not continue moments of {self.cross.shape[0]} "
                f"examples and {self.cross.shape[1]} targets; hand in the arrays that they were taken from, grown"
            )
        own = copy.deepcopy(self)
        start = self.n if start is None else start
        return own._grow(masks, outputs, start, stop, block_rows=block_rows, threads=threads, progress=progress)

    def of_targets(self, targets: slice) -> Self:
        """Return the moments of some of the targets, a view: X'X is shared, and no number is copied.

        Raises
        ------
        SpecError
            If the slice leaves no target.

        Examples
        --------
        >>> import numpy as np
        >>> m = Moments.of(np.array([[1, 0], [1, 1]], bool), np.array([[0.5, 3], [2, 4]], np.float16))
        >>> m.of_targets(slice(1, 2)).cross.tolist()
        [[7.0], [4.0]]
        """
        checked_targets(targets, self.cross.shape[1])
        own = {name: getattr(self, name)[targets] for name in ("shift", "y_sum", "y_squares")}
        some = replace(self, cross=self.cross[:, targets], **own)
        some.__dict__["ones"] = self.ones  # what is known of X'X already
        return some

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a `.pt` of these arrays, complete or not there.

        Raises
        ------
        SpecError
            If the path does not end in ``.pt``.
        RunError
            If the file cannot be written.
        """
        return save_tensors({"n": np.array(self.n)} | {name: getattr(self, name) for name in _ARRAYS}, path)

    @classmethod
    def save_new(
        cls, path: str | os.PathLike[str], n_train: int, n_targets: int, make: Callable[[Zeros], "Moments"]
    ) -> None:
        """Write a `.pt` as `save` does, of moments whose large arrays are made in it: nothing is copied.

        Parameters
        ----------
        make : callable
            From what makes zeros, as it is handed to `of` or `plus`, to the moments.

        Raises
        ------
        RunError
            If the disk has no room, or the file cannot be written.
        """
        with new_tensors(_layout(n_train, n_targets), path) as arrays:
            large = [arrays["gram"], arrays["cross"]]  # in the order in which they are asked for
            moments = make(lambda shape, dtype: large.pop(0))  # noqa: ARG005 - they are of that shape and dtype
            for name in arrays.keys() - {"gram", "cross"}:
                arrays[name][...] = getattr(moments, name)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Map the moments of a file that `save` wrote: they come from the disk as they are used.

        Raises
        ------
        FormatError
            If the file is not one of moments.
        RunError
            If it cannot be read.
        """
        arrays = map_tensors(path, {"n", *_ARRAYS})
        n_train, n_targets = arrays["cross"].shape if arrays["cross"].ndim == 2 else (-1, -1)
        layout = _layout(n_train, n_targets)
        for name, array in arrays.items():
            shape, dtype = layout[name]
            if array.shape != shape or array.dtype != dtype:
                raise FormatError(f"{path} holds {name} {array.shape} of {array.dtype}; write it again", url=str(path))
        return cls(n=int(arrays.pop("n")), **arrays)

    def _grow(
        self,
        masks: RowSliceable,
        outputs: RowSliceable,
        start: int,
        stop: int | None,
        *,
        block_rows: int,
        threads: int | None,
        progress: Callable[[int, int], None] | None,
        seen: Seen | None = None,
        bits_bytes: int | None = None,
    ) -> Self:
        """Add rows to these very arrays, and return what they have become."""
        masks, outputs = as_rows(masks, "masks"), as_rows(outputs, "outputs")
        n_models, n_train = masks.shape
        stop = n_models if stop is None else stop
        if not 0 <= start < stop <= n_models:
            raise SpecError(f"rows {start}:{stop} are not in 0:{n_models}; choose 0 <= start < stop <= {n_models}")
        for name, value in (("block_rows", block_rows), ("threads", threads)):
            if value is not None and value < 1:
                raise SpecError(f"{name} is {value}; choose at least 1")
        threads = threads or available_threads()
        n = _checked_count(self.n + stop - start)
        bits_bytes = bits_bytes_for(n_train) if bits_bytes is None else bits_bytes
        bits = binary.Bits(n_train, min(max(bits_bytes // n_train, block_rows // 8 + 4), (stop - start) // 8 + 4))
        with ThreadPoolExecutor(threads) as pool:
            for first in range(start, stop, block_rows):
                last = min(first + block_rows, stop)
                x, y = read_masks(masks, first, last), read_outputs(outputs, first, last)
                noted = None if seen is None else pool.submit(seen, first, x, y)
                codes = binary.code_rows(x, pool)
                if self.n == 0 and first == start and y.dtype != np.float16:
                    self.shift[:] = y[0]
                with np.errstate(over="ignore", invalid="ignore"):  # such sums are refused
                    binary.add_products(
                        codes, y, self.shift, self.cross, self.y_sum, self.y_squares, pool, threads=threads
                    )
                if not np.isfinite(self.y_squares).all():
                    raise _not_finite(y, first)
                if not bits.fits(codes):
                    bits.add_counts(self.gram, pool)
                bits.append(codes, pool)
                if noted is not None:
                    noted.result()
                if progress is not None:
                    progress(last - start, stop - start)
            bits.add_counts(self.gram, pool)
        return replace(self, n=n)

    @cached_property
    def ones(self) -> NDArray[np.int32]:
        """How many subsets hold each example, shape (n_train,); the column sums of X."""
        return np.diagonal(self.gram).copy()  # each number is on a page of its own, which may have to come from a file

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of the rows of both; SpecError where their columns differ in number."""
        return self.plus(other)

    def __sub__(self, other: "Moments") -> "Moments":
        """Moments of the rows that are in these and not in `other`, all of whose rows must be in these."""
        return self.minus(other)

    def plus(self, other: "Moments", *, zeros: Zeros = np.zeros) -> "Moments":
        """Add, into arrays that `zeros` makes."""
        return self._with(other, 1, zeros)

    def minus(self, other: "Moments", *, zeros: Zeros = np.zeros) -> "Moments":
        """Take off, into arrays that `zeros` makes."""
        return self._with(other, -1, zeros)

    def checked_sum(self, other: "Moments", sign: int = 1) -> int:
        """Return how many rows the sum of both is of, or with a sign of -1 the difference.

        Raises
        ------
        SpecError
            Where columns differ in number, or rows would be more than can be counted.
        """
        if self.cross.shape != other.cross.shape:
            raise SpecError(
                f"moments of {self.cross.shape} and {other.cross.shape} (n_train, n_targets) cannot be added or taken "
                "off; take both from the same examples and targets"
            )
        return _checked_count(self.n + sign * other.n)

    def _with(self, other: "Moments", sign: int, zeros: Zeros) -> "Moments":
        n = self.checked_sum(other, sign)
        combine = np.add if sign > 0 else np.subtract
        gram = combine(self.gram, other.gram, out=zeros(self.gram.shape, np.int32))
        cross = combine(self.cross, other.cross, out=zeros(self.cross.shape, np.float64))
        y_sum = self.y_sum + sign * other.y_sum
        y_squares = self.y_squares + sign * other.y_squares
        off = other.shift - self.shift
        if off.any():  # (y - s) = (y - s') + off, summed over the rows of `other`
            for top in range(0, len(cross), _ROWS_AT_ONCE):
                rows = slice(top, top + _ROWS_AT_ONCE)
                cross[rows] += np.outer(sign * other.ones[rows], off)
            y_sum += sign * other.n * off
            y_squares += sign * (2 * off * other.y_sum + other.n * off**2)
        return Moments(n=n, gram=gram, shift=self.shift, cross=cross, y_sum=y_sum, y_squares=y_squares)


_ARRAYS = ("gram", "shift", "cross", "y_sum", "y_squares")


def checked_targets(targets: slice, n_targets: int) -> slice:
    """Return a slice of some of `n_targets` with whole ends; SpecError if none are left."""
    chosen = slice(*targets.indices(n_targets))
    if len(range(n_targets)[chosen]) == 0:
        raise SpecError(
            f"targets {targets.start}:{targets.stop} are none of {n_targets:,}; choose at least one, such as "
            f"slice(0, {min(n_targets, 300)})",
            field="targets",
        )
    return chosen


def _layout(n_train: int, n_targets: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return the shapes and dtypes of a file's arrays."""
    return {
        "n": ((), np.int64),
        "gram": ((n_train, n_train), np.int32),
        "cross": ((n_train, n_targets), np.float64),
        "shift": ((n_targets,), np.float64),
        "y_sum": ((n_targets,), np.float64),
        "y_squares": ((n_targets,), np.float64),
    }


_ROWS_AT_ONCE = 1024

_LARGEST = 1e150
"""Numbers beyond this, whose squares float64 cannot hold, count as not finite."""


def _checked_count(n: int) -> int:
    if not 0 < n <= np.iinfo(np.int32).max:
        raise SpecError(f"{n} rows cannot be counted in 32 bits; fit at least 1 model and at most 2^31 - 1")
    return n


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
