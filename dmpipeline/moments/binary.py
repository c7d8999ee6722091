# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, disable-error-code="call-arg"
# compiled kernels take their types from what they are called with

"""Products of 0/1 matrices X from packed bits: X'X by population counts, X'y by sums looked up in tables.

A word of 64 rows of two columns costs an `and` and a population count in place of 64 multiplications, and X'X is
symmetric, so half of it is counted. X'y takes 8 rows at a time: all 256 sums that a byte of X can ask for are formed
once for all columns (the method of four Russians; Arlazarov, Dinic, Kronrod and Faradzev, 1970). Counts are exact. Sums
are of float64, and come in the same order whatever the number of threads; those of float16 are of whole multiples of a
power of two, in int32, which twice as many fit into a vector of, and the few numbers that have a finer rest add it.
"""

import functools
import math
from concurrent.futures import Executor
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from dmpipeline.compute import kernel

_WORD_BYTES = 8
_TABLES = 4  # looked up together
_TILE_COLUMNS = 128
_TILE_WORDS = 256  # two tiles of words, 512 KiB, stay in the second cache
_PANEL_COLUMNS = 2048
_MOST_BYTES = 256  # of a row's targets: the tables take 256 KiB, the sums of a panel 512 KiB
_ROWS_OF_A_SUM = 512
_CODED_AT_ONCE = 64  # rows of codes that a thread packs
_RESTS_AT_ONCE = 8  # targets: a line of the first cache, and of a panel 128 KiB of sums


def code_rows(x: NDArray[Any], pool: Executor) -> NDArray[np.uint8]:
    """Pack a block of X, shape (n_rows, n_columns): bit k of codes[g, j] is whether x[8 g + k, j] is not zero.

    The number of codes is rounded up to whole groups of tables; what is beyond the rows is zero.
    """
    codes = np.zeros((-(-len(x) // (8 * _TABLES)) * _TABLES, x.shape[1]), np.uint8)

    def of_some(top: int) -> None:
        some = codes[top : top + _CODED_AT_ONCE]
        _code_rows(x[8 * top : 8 * (top + len(some))], some)

    list(pool.map(of_some, range(0, len(codes), _CODED_AT_ONCE)))
    return codes


class Bits:
    """The bits of some blocks of rows of X, by column, until there are enough to be worth a pass over X'X.

    Parameters
    ----------
    n_columns : int
    n_bytes : int
        Of a column: room for 8 times as many rows.
    """

    def __init__(self, n_columns: int, n_bytes: int) -> None:
        n_bytes = -(-n_bytes // _WORD_BYTES) * _WORD_BYTES
        # columns are taken in pairs, so an odd one gets a companion of zeros
        self._bytes = np.zeros((n_columns + n_columns % 2, n_bytes), np.uint8)
        self._used = 0

    def fits(self, codes: NDArray[np.uint8]) -> bool:
        """Return whether there is room for these."""
        return self._used + len(codes) <= self._bytes.shape[1]

    def append(self, codes: NDArray[np.uint8], pool: Executor) -> None:
        """Take in what `code_rows` packed."""
        room = self._bytes[: codes.shape[1], self._used : self._used + len(codes)]

        def of_columns(left: int) -> None:
            room[left : left + _TILE_COLUMNS] = codes[:, left : left + _TILE_COLUMNS].T

        list(pool.map(of_columns, range(0, len(room), _TILE_COLUMNS)))
        self._used += len(codes)

    def add_counts(self, counts: NDArray[np.int32], pool: Executor) -> None:
        """Add X'X to `counts`, shape (n_columns, n_columns), both triangles, and forget the bits."""
        n_words = -(-self._used // _WORD_BYTES)
        self._bytes[:, self._used : n_words * _WORD_BYTES] = 0
        words = self._bytes.view(np.uint64)
        tops = range(0, len(counts), _TILE_COLUMNS)
        list(pool.map(lambda top: _count_tiles(words, n_words, counts, top), tops))
        self._used = 0


def add_products(
    codes: NDArray[np.uint8],
    y: NDArray[Any],
    shift: NDArray[np.float64],
    cross: NDArray[np.float64],
    sums: NDArray[np.float64],
    squares: NDArray[np.float64],
    pool: Executor,
    *,
    threads: int,
) -> None:
    """Add X'(y - shift) to `cross`, (n_columns, n_targets), and the sums and squares of y - shift to the others.

    Parameters
    ----------
    codes
        Of a block of X, from `code_rows`.
    y : array of real, shape (n_rows, n_targets)
    shift : array of float64, shape (n_targets,)
    """
    n_targets = y.shape[1]
    is_short = y.dtype == np.float16
    width = min(_MOST_BYTES // (4 if is_short else 8), -(-n_targets // threads))

    def of_targets(left: int) -> None:
        some = slice(left, left + width)
        rows = np.zeros((8 * len(codes), len(shift[some])))
        if is_short:
            _read_short(y[:, some].view(np.uint16), _shorts(), shift[some], rows)
        else:
            np.subtract(y[:, some], shift[some], out=rows[: len(y)])
        _add_sums(rows, sums[some], squares[some])
        if is_short:
            scale = _scale_of(max(rows.max(), -rows.min()))
            whole = np.empty(rows.shape, np.int32)
            if _take_whole(rows, scale, whole):
                _add_rests(codes, rows, cross[:, some])
            _add_products(codes, whole, 1 / scale, cross[:, some])
        else:
            _add_products(codes, rows, 1.0, cross[:, some])

    list(pool.map(of_targets, range(0, n_targets, width)))


@functools.cache
def _shorts() -> NDArray[np.float64]:
    """Return every float16 as float64, by its bits, 512 KiB: looked up several times faster than NumPy converts."""
    return np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float64)


def _scale_of(largest: float) -> float:
    """Find the power of two by which numbers up to `largest` may be multiplied, so that sums of a panel fit int32."""
    _, exponent = math.frexp(largest)
    return math.ldexp(1.0, 31 - int(math.log2(_ROWS_OF_A_SUM)) - exponent) if math.isfinite(largest) else 1.0


@intrinsic
def ones_of(typing_context, word):  # noqa: ARG001 - numba hands these over by position
    """Count the ones of a 64-bit word; LLVM makes it one instruction for eight words where the machine has that."""

    def generate(context, builder, signature, arguments):  # noqa: ARG001
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


@kernel
def _code_rows(x, codes):
    for g in range(len(codes)):
        for k in range(min(8, len(x) - 8 * g)):
            for j in range(x.shape[1]):
                codes[g, j] |= np.uint8(x[8 * g + k, j] != 0) << np.uint8(k)


@kernel
def _count_tiles(words, n_words, counts, top):
    """Count the tiles of rows `top` on, from the diagonal to the right, and add each to both triangles."""
    n_columns = len(counts)
    bottom = min(top + _TILE_COLUMNS, len(words))
    tile = np.empty((_TILE_COLUMNS, _TILE_COLUMNS), np.uint64)
    for left in range(top, n_columns, _TILE_COLUMNS):
        right = min(left + _TILE_COLUMNS, len(words))
        tile[:] = 0
        for first in range(0, n_words, _TILE_WORDS):
            last = min(first + _TILE_WORDS, n_words)
            for i in range(top, bottom, 2):
                a, b = words[i, first:last], words[i + 1, first:last]
                for j in range(left, right, 2):
                    c, d = words[j, first:last], words[j + 1, first:last]
                    ac, ad, bc, bd = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
                    for r in range(last - first):
                        ac += ones_of(a[r] & c[r])
                        ad += ones_of(a[r] & d[r])
                        bc += ones_of(b[r] & c[r])
                        bd += ones_of(b[r] & d[r])
                    tile[i - top, j - left] += ac
                    tile[i - top, j - left + 1] += ad
                    tile[i - top + 1, j - left] += bc
                    tile[i - top + 1, j - left + 1] += bd
        for i in range(top, min(bottom, n_columns)):
            for j in range(left, min(right, n_columns)):
                counts[i, j] += np.int32(tile[i - top, j - left])
        if left > top:
            for j in range(left, min(right, n_columns)):
                for i in range(top, bottom):
                    counts[j, i] = counts[i, j]


@kernel
def _read_short(bits, shorts, shift, rows):
    for i in range(len(bits)):
        for t in range(bits.shape[1]):
            rows[i, t] = shorts[bits[i, t]] - shift[t]


@kernel
def _add_sums(rows, sums, squares):
    for i in range(len(rows)):
        for t in range(rows.shape[1]):
            sums[t] += rows[i, t]
            squares[t] += rows[i, t] * rows[i, t]


@kernel
def _take_whole(rows, scale, whole):
    """Move the whole multiples of 1 / scale from `rows` to `whole`; count the numbers of which something is left."""
    n_left = 0
    for i in range(len(rows)):
        for t in range(rows.shape[1]):
            whole[i, t] = np.int32(rows[i, t] * scale)
            rows[i, t] -= whole[i, t] / scale
            n_left += rows[i, t] != 0
    return n_left


@kernel
def _add_rests(codes, rows, cross):
    """Add X'r of the few numbers r in `rows` that are not zero."""
    total = np.empty((_RESTS_AT_ONCE, min(_PANEL_COLUMNS, len(cross))))
    for left in range(0, len(cross), _PANEL_COLUMNS):
        for first in range(0, rows.shape[1], _RESTS_AT_ONCE):
            some = rows[:, first : first + _RESTS_AT_ONCE]
            panel = cross[left : left + _PANEL_COLUMNS, first : first + _RESTS_AT_ONCE]
            total[:] = 0
            for i in range(len(some)):
                n_left = 0
                for t in range(some.shape[1]):  # without a branch, which most rows then never reach
                    n_left += some[i, t] != 0
                if n_left > 0:
                    code, bit = codes[i // 8, left : left + _PANEL_COLUMNS], np.uint8(1 << (i % 8))
                    for t in range(some.shape[1]):
                        rest = some[i, t]
                        if rest != 0:
                            own = total[t]
                            for j in range(len(code)):
                                own[j] += rest if code[j] & bit else 0.0
            for j in range(len(panel)):
                for t in range(some.shape[1]):
                    panel[j, t] += total[t, j]


@kernel
def _add_products(codes, rows, unit, cross):
    """Add X'(rows) * unit; the sums of `_ROWS_OF_A_SUM` rows fit into the numbers of `rows`."""
    n_columns, width = cross.shape
    tables = np.zeros((_TABLES, 256, width), rows.dtype)
    panel = np.empty((_PANEL_COLUMNS, width), rows.dtype)
    for left in range(0, n_columns, _PANEL_COLUMNS):
        right = min(left + _PANEL_COLUMNS, n_columns)
        for top in range(0, len(codes), _ROWS_OF_A_SUM // 8):
            panel[:] = 0
            for g in range(top, min(top + _ROWS_OF_A_SUM // 8, len(codes)), _TABLES):
                for h in range(_TABLES):
                    _sum_subsets(rows[8 * (g + h) : 8 * (g + h + 1)], tables[h])
                for j in range(left, right):
                    a, b = tables[0, codes[g, j]], tables[1, codes[g + 1, j]]
                    c, d = tables[2, codes[g + 2, j]], tables[3, codes[g + 3, j]]
                    total = panel[j - left]
                    for t in range(width):
                        total[t] += (a[t] + b[t]) + (c[t] + d[t])
            for j in range(left, right):
                for t in range(width):
                    cross[j, t] += unit * panel[j - left, t]


@kernel
def _sum_subsets(rows, table):
    """Let table[code] be the sum of the rows whose bit in `code` is set; table[0] is zero already."""
    for k in range(8):
        half = 1 << k
        for code in range(half):
            for t in range(table.shape[1]):
                table[half + code, t] = table[code, t] + rows[k, t]
