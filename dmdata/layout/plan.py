"""Which byte ranges a selection needs, and where each byte lands. Pure: no network, no clock, no prices.

The wanted bytes are a *pattern* of segments repeated at the offsets of the slower axes, so that a column of a million
rows, or every second number of a terabyte, is planned in arrays of bounded size. Segments a small gap apart share a
*range*, which is one request. Wanted bytes in the order they lie in the object are the *product*: the selection in
storage order, each byte once; where a byte of the object lands in it is arithmetic, not a table. Each range is at most
`max_range_bytes` long, begins and ends with a wanted byte, and every wanted byte is covered by exactly one range.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dmdata.errors import SelectionError
from dmdata.layout.formats import Layout
from dmdata.layout.selection import AxisRequest, Selection

Offsets: TypeAlias = npt.NDArray[np.int64]

# segments held as arrays at one time, 16 bytes each; a plan remembers four times as many requests
_MOST_AT_ONCE = 1 << 20
_MOST_RANGES_LISTED = 100_000_000
# pieces of at least this length are copied one by one, shorter ones by an index array
_LONG_PIECE_BYTES = 512
# requests that may be added to leave out bytes that are there: some dollars a million, and one round trip at most
_SPARE_REQUESTS = 32


@dataclass(frozen=True, slots=True)
class WantedBytes:
    """The bytes of an object that a selection wants: a pattern of segments, repeated along the slower axes.

    Attributes
    ----------
    offset : int
        Of the array in the object.
    outer : tuple of (indices, stride)
        Slower axes, the slowest first: the pattern stands at ``offset + sum of index * stride`` for their product.
    starts, stops : int64 arrays, shape (n_segments,)
        The pattern: half-open segments, ascending; they touch nowhere.
    most_at_once : int
        Segments that are held as arrays at one time.
    """

    offset: int
    outer: tuple[tuple[AxisRequest, int], ...]
    starts: Offsets
    stops: Offsets
    # wanted bytes of the pattern before each segment, and all of them
    before: Offsets
    most_at_once: int

    @property
    def n_repeats(self) -> int:
        """How often the pattern stands in the object."""
        return math.prod(len(indices) for indices, _ in self.outer)

    @property
    def n_bytes(self) -> int:
        """All wanted bytes."""
        return self.n_repeats * int(self.before[-1])

    def segments(self, max_gap_bytes: float = 0) -> Iterator[tuple[Offsets, Offsets]]:
        """Walk through the segments in ascending order, some at a time, small gaps inside the pattern filled."""
        if not self.n_bytes:
            return
        starts, stops = _joined(self.starts, self.stops, max_gap_bytes)
        step = max(self.most_at_once // len(starts), 1)
        for first in range(0, self.n_repeats, step):
            offsets = self._offsets(first, min(first + step, self.n_repeats))[:, None]
            yield (offsets + starts).ravel(), (offsets + stops).ravel()

    def landing(self, positions: Offsets) -> Offsets:
        """Count the wanted bytes before each position of the object."""
        rest = positions - self.offset
        repeats = np.zeros(len(positions), np.int64)
        inside = rest >= 0
        for indices, stride in self.outer:
            index = rest // stride
            nth = _position_of(indices, index)
            # behind the last wanted index before it: all of that one's bytes come before
            exact = inside & (nth >= 0) & (_index_at(indices, np.maximum(nth, 0)) == index)
            repeats = repeats * len(indices) + np.where(inside, nth + ~exact, 0)
            inside = exact
            rest = rest - index * stride
        nth = np.searchsorted(self.stops, rest, side="right")
        partial = self.before[nth] + np.maximum(rest - np.append(self.starts, rest.max(initial=0))[nth], 0)
        counted: Offsets = repeats * self.before[-1] + np.where(inside, partial, 0)
        return counted

    def pieces(self, start: int, stop: int) -> tuple[Offsets, Offsets]:
        """List the wanted pieces between two positions of the object, the first and last cut at them."""
        first, last = (int(n) // int(self.before[-1]) for n in self.landing(np.array([start, stop])))
        offsets = self._offsets(first, min(last + 1, self.n_repeats))[:, None]
        starts, stops = (offsets + self.starts).ravel(), (offsets + self.stops).ravel()
        low, high = np.searchsorted(stops, start, side="right"), np.searchsorted(starts, stop, side="left")
        return np.maximum(starts[low:high], start), np.minimum(stops[low:high], stop)

    def trimmed(self, ranges: Offsets) -> Offsets:
        """Cut unwanted bytes from both ends of ranges, shape (n, 2), and drop those that have no others."""
        landings = self.landing(ranges.ravel()).reshape(-1, 2)
        landings = landings[landings[:, 0] < landings[:, 1]]
        return np.stack([self._positions(landings[:, 0]), self._positions(landings[:, 1] - 1) + 1], axis=1)

    def _positions(self, nth: Offsets) -> Offsets:
        """Find where in the object the nth wanted bytes are."""
        repeats, rest = np.divmod(nth, self.before[-1])
        segment = np.searchsorted(self.before, rest, side="right") - 1
        return self._offsets_at(repeats) + self.starts[segment] + rest - self.before[segment]

    def _offsets(self, first: int, last: int) -> Offsets:
        """Find where the pattern stands for the repeats `first` to `last`."""
        return self._offsets_at(np.arange(first, last))

    def _offsets_at(self, repeats: Offsets) -> Offsets:
        offsets = np.full(len(repeats), self.offset, np.int64)
        for indices, stride in reversed(self.outer):
            repeats, digit = np.divmod(repeats, len(indices))
            offsets += _index_at(indices, digit) * stride
        return offsets


@dataclass(frozen=True, slots=True, eq=False)
class ReadPlan:
    """Byte ranges to request, and the wanted bytes inside them.

    Attributes
    ----------
    layout : Layout
    selection : Selection
    wanted : WantedBytes
    max_gap_bytes : float
    max_range_bytes : int
        As planned with; a whole number of elements.
    n_requests, n_bytes : int
        Requests, and their bytes, gaps included.
    """

    layout: Layout
    selection: Selection
    wanted: WantedBytes
    max_gap_bytes: float
    max_range_bytes: int
    n_requests: int
    n_bytes: int
    # all of them, unless there are too many to keep
    remembered: Offsets | None

    @property
    def ranges(self) -> Offsets:
        """Byte ranges to request, half-open, ascending, without overlap, shape (n_requests, 2).

        Raises
        ------
        SelectionError
            If they are too many for one array; walk through `batches`.
        """
        if self.n_requests > _MOST_RANGES_LISTED:
            raise SelectionError(
                f"the plan has {self.n_requests:,} ranges, too many for one array; read blocks of rows, or walk "
                "through plan.batches()",
                shape=self.layout.shape,
            )
        return np.concatenate([*self.batches(), np.zeros((0, 2), np.int64)])

    def batches(self) -> Iterator[Offsets]:
        """Walk through the ranges in order, some at a time, each shape (n, 2)."""
        if self.remembered is not None:
            step = self.wanted.most_at_once
            for first in range(0, len(self.remembered), step):
                yield self.remembered[first : first + step]
        else:
            yield from _ranges(self.wanted, self.max_gap_bytes, self.max_range_bytes)

    @property
    def wanted_bytes(self) -> int:
        """Bytes of the product: each wanted byte once, however often the selection repeats it."""
        return self.wanted.n_bytes

    @property
    def amplification(self) -> float:
        """Bytes requested for each wanted byte; 1.0 where nothing is wasted or wanted."""
        return self.n_bytes / self.wanted_bytes if self.wanted_bytes else 1.0

    def __repr__(self) -> str:
        return (
            f"ReadPlan(n_requests={self.n_requests:,}, n_bytes={self.n_bytes:,}, "
            f"wanted_bytes={self.wanted_bytes:,}, amplification={self.amplification:.2f})"
        )


def plan_read(
    layout: Layout,
    selection: Selection,
    *,
    max_gap_bytes: float,
    max_range_bytes: int,
    n_at_once: int = 1,
    least_range_bytes: int = 1,
    most_at_once: int = _MOST_AT_ONCE,
) -> ReadPlan:
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
    n_at_once : int
        Connections to keep busy: fewer ranges than these are split, so that a short read is not one slow stream.
    least_range_bytes : int
        Ranges are not split for that into shorter ones.
    most_at_once : int
        Segments to hold as arrays at one time: bounds memory, and changes no range.

    Returns
    -------
    plan : ReadPlan
    """
    wanted = _wanted(layout, selection, most_at_once)
    n_bytes = wanted.n_bytes
    if not wanted.outer and len(wanted.starts) == 1 and n_bytes <= (least_range_bytes if n_at_once > 1 else 0):
        # a row, as most small reads: one range, which need not be split
        start = wanted.offset + int(wanted.starts[0])
        window = max(max_range_bytes // layout.dtype.itemsize, 1) * layout.dtype.itemsize
        if n_bytes <= window:
            one = np.array([[start, start + n_bytes]], np.int64)
            return ReadPlan(layout, selection, wanted, max_gap_bytes, window, 1, n_bytes, one)
    plan = _planned(layout, selection, wanted, max_gap_bytes, max_range_bytes)
    if 0 < plan.n_requests < n_at_once:
        window = max(-(-plan.n_bytes // n_at_once), min(least_range_bytes, max_range_bytes))
        if window < max_range_bytes:
            plan = _planned(layout, selection, wanted, max_gap_bytes, window)
    return plan


def without(plan: ReadPlan, held: Offsets) -> ReadPlan:
    """Leave out of a plan what is there already.

    What is held is cut out of the ranges, also where it lies between two bytes that are missing. Only where that takes
    more than 32 requests beyond those of the plan are gaps filled again, as far as a request costs more than they do.

    Parameters
    ----------
    plan : ReadPlan
        With fewer ranges than are too many for one array.
    held : int64 array, shape (n, 2)
        Byte ranges, half-open, ascending, without overlap.

    Returns
    -------
    rest : ReadPlan
        Of the same product; its ranges cover each wanted byte that is not held, once.
    """
    if not len(held) or not plan.n_requests:
        return plan
    ranges = plan.ranges
    missing = plan.wanted.trimmed(subtract(ranges, held)[0])
    if len(missing) > plan.n_requests + _SPARE_REQUESTS:
        nth = np.searchsorted(ranges[:, 0], missing[:, 0], side="right")
        apart = (missing[1:, 0] - missing[:-1, 1] > plan.max_gap_bytes) | (nth[1:] != nth[:-1])
        first, last = np.concatenate([[True], apart]), np.concatenate([apart, [True]])
        missing = np.stack([missing[first, 0], missing[last, 1]], axis=1)
    n_bytes = int((missing[:, 1] - missing[:, 0]).sum())
    return replace(plan, n_requests=len(missing), n_bytes=n_bytes, remembered=missing)


def overlaps(ranges: Offsets, others: Offsets) -> tuple[Offsets, Offsets, Offsets]:
    """Intersect byte ranges with others, each ascending and without overlap.

    Returns
    -------
    pieces : int64 array, shape (n, 2)
        Ascending.
    nth_range, nth_other : int64 arrays, shape (n,)
        Which two have each piece in common.
    """
    low = np.searchsorted(others[:, 1], ranges[:, 0], side="right")
    n_others = np.maximum(np.searchsorted(others[:, 0], ranges[:, 1], side="left") - low, 0)
    nth_range = np.repeat(np.arange(len(ranges)), n_others)
    nth_other = np.arange(len(nth_range)) + np.repeat(low - np.cumsum(n_others) + n_others, n_others)
    starts = np.maximum(ranges[nth_range, 0], others[nth_other, 0])
    stops = np.minimum(ranges[nth_range, 1], others[nth_other, 1])
    return np.stack([starts, stops], axis=1), nth_range, nth_other


def subtract(ranges: Offsets, others: Offsets) -> tuple[Offsets, Offsets]:
    """Take others out of byte ranges, each ascending and without overlap.

    Returns
    -------
    pieces : int64 array, shape (n, 2)
        What is left, ascending.
    nth_range : int64 array, shape (n,)
        Which range each piece is of.
    """
    common, _, _ = overlaps(ranges, others)
    starts = np.sort(np.concatenate([ranges[:, 0], common[:, 1]]))
    stops = np.sort(np.concatenate([ranges[:, 1], common[:, 0]]))
    some = starts < stops
    starts, stops = starts[some], stops[some]
    return np.stack([starts, stops], axis=1), np.searchsorted(ranges[:, 0], starts, side="right") - 1


def product_array(plan: ReadPlan, buffer: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """View a filled product buffer as the selection's answer.

    Parameters
    ----------
    plan : ReadPlan
    buffer : uint8 array, shape (plan.wanted_bytes,)

    Returns
    -------
    answer : array of the layout's `read_dtype`, shape ``plan.selection.shape``
        A view of the buffer, unless indices repeat or come out of order, or the elements had to be decoded.
    """
    by_stride = plan.layout.storage_order
    sizes = [len(indices) for indices in plan.selection.distinct]
    stored = buffer.view(plan.layout.dtype).reshape([sizes[axis] for axis in by_stride])
    return plan.selection.answer(plan.layout.decode(stored.transpose(np.argsort(by_stride))))


def land(
    wanted: WantedBytes, position: int, received: npt.NDArray[np.uint8], product: npt.NDArray[np.uint8], at: int
) -> int:
    """Put the wanted among received bytes into the product; return how many they are.

    Parameters
    ----------
    wanted : WantedBytes
    position : int
        Of the first received byte in the object.
    received : uint8 array
    product : uint8 array, shape (plan.wanted_bytes,)
    at : int
        Where in the product the first wanted of them belongs.
    """
    starts, stops = wanted.pieces(position, position + len(received))
    lengths = stops - starts
    n_wanted = int(lengths.sum())
    if n_wanted >= _LONG_PIECE_BYTES * len(starts):
        for start, stop in zip((starts - position).tolist(), (stops - position).tolist(), strict=True):
            product[at : at + stop - start] = received[start:stop]
            at += stop - start
    else:
        before = np.cumsum(lengths) - lengths
        indices = np.repeat(starts - position - before, lengths) + np.arange(n_wanted)
        np.take(received, indices, out=product[at : at + n_wanted], mode="clip")  # others are slower
    return n_wanted


def _planned(
    layout: Layout, selection: Selection, wanted: WantedBytes, max_gap_bytes: float, max_range_bytes: int
) -> ReadPlan:
    window = max(max_range_bytes // layout.dtype.itemsize, 1) * layout.dtype.itemsize
    n_requests = n_bytes = 0
    most_remembered = 4 * wanted.most_at_once
    kept: list[Offsets] | None = []
    for ranges in _ranges(wanted, max_gap_bytes, window):
        n_requests += len(ranges)
        n_bytes += int((ranges[:, 1] - ranges[:, 0]).sum())
        kept = [*kept, ranges] if kept is not None and n_requests <= most_remembered else None
    remembered = None if kept is None else np.concatenate([*kept, np.zeros((0, 2), np.int64)])
    return ReadPlan(layout, selection, wanted, max_gap_bytes, window, n_requests, n_bytes, remembered)


def _runs(request: AxisRequest) -> tuple[Offsets, Offsets]:
    """Turn ascending indices into half-open runs of neighbours."""
    if isinstance(request, range):
        if request.step == 1 or len(request) == 1:
            return np.array([request[0]], np.int64), np.array([request[-1] + 1], np.int64)
        starts = np.arange(request.start, request.stop, request.step, dtype=np.int64)
        return starts, starts + 1
    first = np.flatnonzero(np.concatenate([[True], np.diff(request) != 1]))
    return request[first], request[np.append(first[1:], len(request)) - 1] + 1


def _wanted(layout: Layout, selection: Selection, most_at_once: int) -> WantedBytes:
    """Describe the wanted bytes: the faster axes as a pattern, the slower ones by their indices."""
    if math.prod(selection.product_shape) == 0:
        none = np.zeros(0, np.int64)
        return WantedBytes(layout.offset, (), none, none, np.zeros(1, np.int64), most_at_once)
    starts, stops = np.zeros(1, np.int64), np.full(1, layout.dtype.itemsize, np.int64)
    outer: list[tuple[AxisRequest, int]] = []
    wanted = selection.distinct
    for axis in reversed(layout.storage_order):
        size, stride, indices = layout.shape[axis], layout.strides[axis], wanted[axis]
        if size == 1:
            continue
        # where all that lies inside is wanted, neighbours along this axis touch
        whole = not outer and len(starts) == 1 and stops[0] - starts[0] == stride
        if outer or (len(indices) * len(starts) > most_at_once and not (whole and _is_run(indices))):
            outer.insert(0, (indices, stride))
        elif whole:
            first, last = _runs(indices)
            starts, stops = first * stride + starts[0], (last - 1) * stride + stops[0]
        else:
            base = np.asarray(indices, np.int64) * stride
            starts, stops = _joined((base[:, None] + starts).ravel(), (base[:, None] + stops).ravel(), 0)
    before = np.zeros(len(starts) + 1, np.int64)
    np.cumsum(stops - starts, out=before[1:])
    return WantedBytes(layout.offset, tuple(outer), starts, stops, before, most_at_once)


def _joined(starts: Offsets, stops: Offsets, max_gap_bytes: float) -> tuple[Offsets, Offsets]:
    """Join segments at most a gap apart."""
    apart = starts[1:] - stops[:-1] > max_gap_bytes
    return starts[np.concatenate([[True], apart])], stops[np.concatenate([apart, [True]])]


def _is_run(indices: AxisRequest) -> bool:
    return isinstance(indices, range) and indices.step == 1


def _index_at(indices: AxisRequest, nth: Offsets) -> Offsets:
    return indices.start + nth * indices.step if isinstance(indices, range) else indices[nth]


def _position_of(indices: AxisRequest, index: Offsets) -> Offsets:
    """Find the last of ascending indices that is at most `index`; -1 where there is none."""
    if isinstance(indices, range):
        return np.clip((index - indices.start) // indices.step, -1, len(indices) - 1)
    return np.searchsorted(indices, index, side="right") - 1


def _ranges(wanted: WantedBytes, max_gap_bytes: float, window: int) -> Iterator[Offsets]:
    """Merge segments across small gaps into groups, cut groups at multiples of `window` from their start."""
    if not wanted.n_bytes:
        return
    # a cut that falls into a gap would leave a range that begins or ends with unwanted bytes
    gaps_inside = len(_joined(wanted.starts, wanted.stops, max_gap_bytes)[0]) < len(wanted.starts)
    # the last range so far may continue in the next segments: it is held back, with the start of its group
    open_range, open_group = np.zeros((0, 2), np.int64), 0
    for starts, stops in wanted.segments(max_gap_bytes):
        starts, stops = np.append(open_range[:, 0], starts), np.append(open_range[:, 1], stops)
        new_group = np.concatenate([[True], starts[1:] - stops[:-1] > max_gap_bytes])
        group_starts = starts[new_group]
        if len(open_range):
            group_starts[0] = open_group
        group = group_starts[np.cumsum(new_group) - 1]
        starts, stops, group = _cut_at_windows(starts, stops, group, window)
        nth_window = (starts - group) // window
        new_range = np.concatenate([[True], (group[1:] != group[:-1]) | (nth_window[1:] != nth_window[:-1])])
        first = np.flatnonzero(new_range)
        ranges = np.stack([starts[first], stops[np.append(first[1:], len(stops)) - 1]], axis=1)
        open_range, open_group = ranges[-1:], int(group[-1])
        if len(ranges) > 1:
            yield wanted.trimmed(ranges[:-1]) if gaps_inside else ranges[:-1]
    if len(open_range):
        yield wanted.trimmed(open_range) if gaps_inside else open_range


def _cut_at_windows(starts: Offsets, stops: Offsets, group: Offsets, window: int) -> tuple[Offsets, Offsets, Offsets]:
    """Cut segments wherever they cross a multiple of `window` bytes from the start of their group."""
    first = (starts - group) // window
    n_cuts = (stops - 1 - group) // window - first
    if not n_cuts.any():
        return starts, stops, group
    source = np.repeat(np.arange(len(starts)), n_cuts + 1)
    nth = np.arange(len(source)) - np.repeat(np.cumsum(n_cuts + 1) - n_cuts - 1, n_cuts + 1)
    edge = group[source] + (first[source] + nth) * window
    return np.maximum(starts[source], edge), np.minimum(stops[source], edge + window), group[source]
