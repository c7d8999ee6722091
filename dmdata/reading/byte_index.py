"""Which record of which segment holds each byte of an object that is kept.

Byte ranges are in *levels*, arrays that are sorted by their start. There are about as many as the logarithm of the
number of ranges, so that adding and finding are both quick.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dmdata.layout.plan import Offsets, WantedBytes, overlaps, subtract
from dmdata.reading.segments import Bytes, Record, Segment, copy_record, open_to_read


@dataclass(frozen=True, slots=True)
class Level:
    """Byte ranges of the object, ascending and without overlap; the record that has each, and where in its data."""

    ranges: Offsets
    nth: Offsets
    at: Offsets

    def __getitem__(self, some: npt.NDArray[np.bool_] | Offsets) -> "Level":
        return Level(self.ranges[some], self.nth[some], self.at[some])

    def cut(self, pieces: Offsets, nth: Offsets) -> "Level":
        """Cut pieces out of the ranges so numbered."""
        return Level(pieces, self.nth[nth], self.at[nth] + pieces[:, 0] - self.ranges[nth, 0])


class ByteIndex:
    """What is known to be kept of one object; records are never removed, so that a reader needs no lock.

    Attributes
    ----------
    levels : tuple of Level
        Replaced, never changed.
    """

    def __init__(self) -> None:
        self.levels: tuple[Level, ...] = ()
        self._records: list[Record] = []

    def add(self, found: Iterable[tuple[Record, Offsets]]) -> None:
        """Enter records, each with its byte ranges: of bytes that are there already, what is known stays."""
        ranges, nth, at = [], [], []
        for record, of_record in found:
            lengths = of_record[:, 1] - of_record[:, 0]
            ranges.append(of_record)
            nth.append(np.full(len(of_record), len(self._records), np.int64))
            at.append(np.cumsum(lengths) - lengths)
            self._records.append(record)
        new = Level(np.concatenate(ranges), np.concatenate(nth), np.concatenate(at))
        if len(ranges) > 1:
            new = _without_overlap(new)
        for level in self.levels:
            new = new.cut(*subtract(new.ranges, level.ranges))
        levels = [*self.levels, new] if len(new.ranges) else list(self.levels)
        while len(levels) > 1 and len(levels[-2].ranges) < 2 * len(levels[-1].ranges):
            levels[-2:] = [_together(levels[-2:])]
        self.levels = tuple(levels)

    def forget(self, paths: Iterable[str]) -> None:
        """Forget where the bytes of some segments were."""
        is_gone = self._is_in(paths)
        levels = [level[~is_gone[level.nth]] for level in self.levels]
        self.levels = tuple(level for level in levels if len(level.ranges))

    def of_segments(self, paths: Iterable[str]) -> Level | None:
        """Collect what some segments hold; None where that is nothing."""
        is_theirs = self._is_in(paths)
        parts = [level[is_theirs[level.nth]] for level in self.levels]
        parts = [part for part in parts if len(part.ranges)]
        return _together(parts) if parts else None

    def copy(self, levels: Sequence[Level], wanted: WantedBytes, product: Bytes) -> None:
        """Put those wanted bytes that are in `levels` where they belong.

        Raises
        ------
        DamagedError
            With the segment.
        OSError
            If it cannot be read for another reason than that it is gone.
        """
        for starts, stops in wanted.segments():
            pieces = np.stack([starts, stops], axis=1)
            for level in levels:
                common, _, nth = overlaps(pieces, level.ranges)
                if len(common):
                    self.gather(level.cut(common, nth), product, wanted.landing(common[:, 0]))

    def gather(self, found: Level, product: Bytes, landings: Offsets) -> None:
        """Read byte ranges, each to its landing; raises as `copy` does."""
        order = np.lexsort((found.at, found.nth))
        found, landings = found[order], landings[order]
        firsts = np.flatnonzero(np.concatenate([[True], found.nth[1:] != found.nth[:-1]]))
        opened: tuple[Segment, int] | None = None
        try:
            for first, last in zip(firsts.tolist(), [*firsts[1:].tolist(), len(order)], strict=True):
                record = self._records[int(found.nth[first])]
                if opened is None or opened[0] is not record.segment:
                    if opened:
                        os.close(opened[1])
                    opened = None
                    opened = record.segment, open_to_read(record.segment)
                some = slice(first, last)
                lengths = found.ranges[some, 1] - found.ranges[some, 0]
                copy_record(opened[1], record, found.at[some], lengths, product, landings[some])
        finally:
            if opened:
                os.close(opened[1])

    def _is_in(self, paths: Iterable[str]) -> npt.NDArray[np.bool_]:
        """Whether each record is in one of these segments."""
        found = set(paths)
        return np.array([record.segment.path in found for record in self._records], np.bool_)


def covered(levels: Iterable[Level], ranges: Offsets) -> Offsets:
    """List what of byte ranges is in `levels`, ascending."""
    pieces = [overlaps(ranges, level.ranges)[0] for level in levels]
    pieces = [part for part in pieces if len(part)]
    if not pieces:
        return np.zeros((0, 2), np.int64)
    found = np.concatenate(pieces)
    return found if len(pieces) == 1 else found[np.argsort(found[:, 0])]


def _without_overlap(level: Level) -> Level:
    """Sort ranges, and cut off what an earlier one has already."""
    level = level[np.argsort(level.ranges[:, 0], kind="stable")]
    reached = np.maximum.accumulate(np.concatenate([[0], level.ranges[:-1, 1]]))
    starts = np.maximum(level.ranges[:, 0], reached)
    some = np.flatnonzero(starts < level.ranges[:, 1])
    return level.cut(np.stack([starts[some], level.ranges[some, 1]], axis=1), some)


def _together(levels: Sequence[Level]) -> Level:
    if len(levels) == 1:
        return levels[0]
    ranges = np.concatenate([level.ranges for level in levels])
    order = np.argsort(ranges[:, 0], kind="stable")
    nth = np.concatenate([level.nth for level in levels])
    at = np.concatenate([level.at for level in levels])
    return Level(ranges[order], nth[order], at[order])
