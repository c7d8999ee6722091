"""Which byte ranges a selection needs, and where each byte lands. Pure: no network, no clock, no prices.

A plan is arrays, not objects, so that a column of a million rows is planned in a blink. Wanted bytes are cut into
*pieces* in the order they lie in the object; pieces a small gap apart share a *range*, which is one request. The
pieces, one after the other, form the *product*: the selection in storage order, each wanted byte once. Each range is
at most `max_range_bytes` long, and every wanted byte is covered by exactly one range.
"""

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dmdata.errors import SelectionError
from dmdata.formats import Layout
from dmdata.selection import AxisRequest, Selection

Offsets: TypeAlias = npt.NDArray[np.int64]


# each piece takes about 100 bytes while it is planned
_MOST_PIECES = 10_000_000


@dataclass(frozen=True, slots=True, eq=False)
class ReadPlan:
    """Byte ranges to request, and the wanted pieces inside them.

    Attributes
    ----------
    layout : Layout
    selection : Selection
    range_starts, range_stops : int64 arrays, shape (n_requests,)
        Half-open byte ranges in the object, ascending, without overlap.
    piece_starts, piece_stops : int64 arrays, shape (n_pieces,)
        Half-open wanted byte ranges, ascending; each lies in one request.
    first_piece : int64 array, shape (n_requests + 1,)
        Range ``i`` holds the pieces ``first_piece[i]:first_piece[i + 1]``.
    landing : int64 array, shape (n_pieces + 1,)
        Byte of the product at which each piece begins, and the product's size.
    """

    layout: Layout
    selection: Selection
    range_starts: Offsets
    range_stops: Offsets
    piece_starts: Offsets
    piece_stops: Offsets
    first_piece: Offsets
    landing: Offsets

    @property
    def ranges(self) -> Offsets:
        """Byte ranges to request, shape (n_requests, 2)."""
        return np.stack([self.range_starts, self.range_stops], axis=1)

    @property
    def n_requests(self) -> int:
        """Number of requests."""
        return len(self.range_starts)

    @property
    def n_bytes(self) -> int:
        """Bytes requested, gaps included."""
        return int((self.range_stops - self.range_starts).sum())

    @property
    def wanted_bytes(self) -> int:
        """Bytes of the product: each wanted byte once, however often the selection repeats it."""
        return int(self.landing[-1])

    @property
    def amplification(self) -> float:
        """Bytes requested for each wanted byte; 1.0 where nothing is wasted or wanted."""
        return self.n_bytes / self.wanted_bytes if self.wanted_bytes else 1.0

    def __repr__(self) -> str:
        return (
            f"ReadPlan(n_requests={self.n_requests:,}, n_bytes={self.n_bytes:,}, "
            f"wanted_bytes={self.wanted_bytes:,}, amplification={self.amplification:.2f})"
        )


def plan_read(layout: Layout, selection: Selection, *, max_gap_bytes: float, max_range_bytes: int) -> ReadPlan:
    """Plan the requests of a selection.

    Parameters
    ----------
    layout : Layout
    selection : Selection
        Of the layout's shape.
    max_gap_bytes : float
        Unwanted bytes that may be fetched to save a request: 0 merges only what touches, infinity merges everything.
    max_range_bytes : int
        Longest request; at least one element.

    Returns
    -------
    plan : ReadPlan

    Raises
    ------
    SelectionError
        If it would be more than ten million separate pieces.
    """
    starts, stops = _wanted_segments(layout, selection)
    if not len(starts):
        none = np.zeros(0, np.int64)
        zero = np.zeros(1, np.int64)
        return ReadPlan(layout, selection, none, none, none, none, zero, zero)
    window = max(max_range_bytes // layout.dtype.itemsize, 1) * layout.dtype.itemsize
    merged = np.concatenate([[True], starts[1:] - stops[:-1] > max_gap_bytes])
    group_start = starts[merged][np.cumsum(merged) - 1]
    starts, stops, group_start = _cut_at_windows(starts, stops, group_start, window)
    # a range is the wanted pieces of one group that lie in one window, from the first byte to the last
    new_range = np.ones(len(starts), bool)
    same_group = group_start[1:] == group_start[:-1]
    same_window = (starts - group_start)[1:] // window == (starts - group_start)[:-1] // window
    new_range[1:] = ~(same_group & same_window)
    first = np.flatnonzero(new_range)
    first_piece = np.append(first, len(starts)).astype(np.int64)
    landing = np.zeros(len(starts) + 1, np.int64)
    np.cumsum(stops - starts, out=landing[1:])
    return ReadPlan(layout, selection, starts[first], stops[first_piece[1:] - 1], starts, stops, first_piece, landing)


def product_array(plan: ReadPlan, buffer: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """View a filled product buffer as the selection's answer.

    Parameters
    ----------
    plan : ReadPlan
    buffer : uint8 array, shape (plan.wanted_bytes,)

    Returns
    -------
    answer : array of the layout's dtype, shape ``plan.selection.shape``
        A view of the buffer, unless indices repeat or come out of order.
    """
    by_stride = _storage_order(plan.layout)
    sizes = [len(indices) for indices in plan.selection.distinct]
    stored = buffer.view(plan.layout.dtype).reshape([sizes[axis] for axis in by_stride])
    return plan.selection.answer(stored.transpose(np.argsort(by_stride)))


def land(plan: ReadPlan, nth: int, received: npt.NDArray[np.uint8], buffer: npt.NDArray[np.uint8]) -> None:
    """Put the wanted pieces of the nth range into the product buffer.

    Parameters
    ----------
    plan : ReadPlan
    nth : int
    received : uint8 array
        All bytes of the range.
    buffer : uint8 array, shape (plan.wanted_bytes,)
    """
    pieces = slice(plan.first_piece[nth], plan.first_piece[nth + 1])
    itemsize = plan.layout.dtype.itemsize
    starts = (plan.piece_starts[pieces] - plan.range_starts[nth]) // itemsize
    counts = (plan.piece_stops[pieces] - plan.piece_starts[pieces]) // itemsize
    before = np.cumsum(counts) - counts
    elements = np.repeat(starts - before, counts) + np.arange(counts.sum())
    wanted = received.view(plan.layout.dtype)[elements]
    buffer[plan.landing[pieces.start] : plan.landing[pieces.stop]] = wanted.view(np.uint8)


def _storage_order(layout: Layout) -> list[int]:
    """Sort the axes from the slowest to the fastest."""
    return sorted(range(len(layout.shape)), key=lambda axis: (-layout.strides[axis], axis))


def _runs(request: AxisRequest) -> tuple[Offsets, Offsets]:
    """Turn ascending indices into half-open runs of neighbours."""
    if isinstance(request, range):
        if not len(request):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        if request.step == 1 or len(request) == 1:
            return np.array([request[0]], np.int64), np.array([request[-1] + 1], np.int64)
        starts = np.arange(request.start, request.stop, request.step, dtype=np.int64)
        return starts, starts + 1
    first = np.flatnonzero(np.concatenate([[True], np.diff(request) != 1])[: len(request)])
    return request[first], request[np.append(first[1:], len(request)) - 1] + 1 if len(request) else request


def _wanted_segments(layout: Layout, selection: Selection) -> tuple[Offsets, Offsets]:
    """List the wanted bytes as half-open ranges in ascending order, touching ones joined."""
    if math.prod(selection.product_shape) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    starts, stops = np.zeros(1, np.int64), np.full(1, layout.dtype.itemsize, np.int64)
    wanted = selection.distinct
    for axis in reversed(_storage_order(layout)):
        size, stride = layout.shape[axis], layout.strides[axis]
        if size == 1:
            continue
        indices = wanted[axis]
        if len(starts) == 1 and stops[0] - starts[0] == stride:
            # what lies inside is wanted whole, so neighbours along this axis touch
            first, last = _runs(indices)
            starts, stops = first * stride + starts[0], (last - 1) * stride + stops[0]
        else:
            if len(indices) * len(starts) > _MOST_PIECES:
                raise SelectionError(
                    f"the selection {selection.shape} of {layout.shape} is {len(indices) * len(starts):,} separate "
                    f"pieces, more than the {_MOST_PIECES:,} that are planned at once; read blocks of rows, or "
                    "neighbouring columns",
                    shape=layout.shape,
                )
            base = np.asarray(indices, np.int64) * stride
            starts, stops = (base[:, None] + starts).ravel(), (base[:, None] + stops).ravel()
    return starts + layout.offset, stops + layout.offset


def _cut_at_windows(
    starts: Offsets, stops: Offsets, group_start: Offsets, window: int
) -> tuple[Offsets, Offsets, Offsets]:
    """Cut segments wherever they cross a multiple of `window` bytes from the start of their group."""
    first = (starts - group_start) // window
    n_cuts = (stops - 1 - group_start) // window - first
    if not n_cuts.any():
        return starts, stops, group_start
    source = np.repeat(np.arange(len(starts)), n_cuts + 1)
    nth = np.arange(len(source)) - np.repeat(np.cumsum(n_cuts + 1) - n_cuts - 1, n_cuts + 1)
    edge = group_start[source] + (first[source] + nth) * window
    return np.maximum(starts[source], edge), np.minimum(stops[source], edge + window), group_start[source]
