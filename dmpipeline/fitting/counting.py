"""Second moments of the rows of a fit, counted once: what the directory of `checkpoints` holds is not counted again.

What is kept: the moments of each range that a fit asks for, 4 n_train^2 + 8 n_train n_targets bytes each. In addition,
for float16 outputs, those of up to 16 pieces of its rows, as many as take 64 MiB: counting a thousand rows again costs
less than reading and writing larger ones. And what other fits left, of other data or other ranges, the latest used
first, as much as takes 1 GiB or twice what this fit's ranges take: two users may share a directory, and of 50,000
examples it holds three fits and no more.

With a Dask scheduler its workers count blocks of rows, whose moments are then added in pairs.
"""

import math
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import dmdata
from dmdata.copying.cluster import Carried, carried_along, run_on_cluster
from dmpipeline.errors import DataWarning, explain_os_errors
from dmpipeline.fitting.checkpoints import Checkpoints
from dmpipeline.moments.arrays import RowSliceable, as_rows, check_shapes
from dmpipeline.moments.identity import KnownRows, Span, digest_of
from dmpipeline.moments.moments import Moments, Zeros


@dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """Second moments of some ranges of rows, and what these rows are.

    Attributes
    ----------
    parts : list of Moments
        One for each range.
    digest : str
        Of the rows of all ranges: masks, outputs, dtype and order.
    mask_keys : array of uint64, shape (n_rows,)
        A key of each row's mask, ranges in order; see `dmpipeline.moments.identity.keys_of_masks`.
    """

    parts: list[Moments]
    digest: str
    mask_keys: NDArray[np.uint64]


def counted_moments(
    place: Checkpoints,
    masks: RowSliceable,
    outputs: RowSliceable,
    ranges: Sequence[Span],
    *,
    block_rows: int,
    threads: int | None,
    progress: Callable[[int], None],
) -> Gathered:
    """Return the second moments of some ranges of rows, counting only those that no kept moments are of.

    Parameters
    ----------
    place : Checkpoints
    masks, outputs, block_rows, threads
        As for `dmpipeline.fit`.
    ranges : sequence of (start, stop)
        Disjoint, rising.
    progress : callable
        Called with the number of rows done, in all ranges together.

    Warns
    -----
    DataWarning
        If the directory holds moments of an earlier version of this package, which are counted again.
    """
    check_shapes(masks, outputs)
    masks, outputs = as_rows(masks, "masks"), as_rows(outputs, "outputs")
    known = KnownRows.of(masks, outputs)
    counting = _Counting(place, known, block_rows, threads, progress)
    parts = counting.in_memory(ranges) if place.directory is None else counting.in_directory(ranges)
    keys = np.concatenate([known.keys[slice(*rows)] for rows in ranges])
    return Gathered(parts, digest_of(keys, masks.shape[1], outputs.shape[1]), keys[:, 0].copy())


@dataclass(frozen=True, slots=True, eq=False)
class _Counting:
    """Rows whose moments are wanted, and how they are counted."""

    place: Checkpoints
    known: KnownRows
    block_rows: int
    threads: int | None
    progress: Callable[[int], None]

    @property
    def directory(self) -> Path:
        return self.place.directory or Path()

    def in_memory(self, ranges: Sequence[Span]) -> list[Moments]:
        parts, before = [], 0
        for rows in ranges:
            parts.append(self._count(rows, before, np.zeros))
            before += rows[1] - rows[0]
        return parts

    def in_directory(self, ranges: Sequence[Span]) -> list[Moments]:
        """Count what no kept moments are of, and add all up to the ranges; every step leaves what it made in a file."""
        _warn_of_earlier_version(self.directory)
        with explain_os_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._kept_at.clear_unfinished()
        self.known.recall(self._memory)
        piece_rows, is_lasting = self._pieces_kept(sum(stop - start for start, stop in ranges))
        joins_last = not is_lasting and self.place.scheduler is None
        pieces = {rows: self._pieces(rows, piece_rows, joins_last=joins_last) for rows in ranges}
        uncounted = [rows for of_range in pieces.values() for rows, path in of_range if path is None]
        done = sum(stop - start for start, stop in ranges) - sum(stop - start for start, stop in uncounted)
        if done:
            self.progress(done)
        spared, final = set[Path](), set[Path]()
        if self.place.scheduler is not None:
            self._count_on_cluster(uncounted, done)
        for of_range in pieces.values():
            parts: list[Span] = []
            for rows, path in of_range:
                if path is None and self.place.scheduler is None:
                    _keep_counted(self._folder, self.known, rows, partial(self._count, rows, done))
                    self.known.remember(self._memory)
                    done += rows[1] - rows[0]
                (final if is_lasting else spared if path is not None else set()).add(self._path(rows))
                parts.append(rows)
                if self.place.scheduler is None:
                    parts = self._added(parts, spared | final)
            while len(parts) > 1:
                parts = self._added(parts, spared | final)
        self.known.remember(self._memory)
        totals = [self._path(rows) for rows in ranges]
        final.update(totals)
        for path in spared - final:  # part of a total now
            path.unlink()
        self._clear(final, totals)
        return [Moments.open(path) for path in totals]

    @property
    def _folder(self) -> Path:
        n_train, n_targets = self.known.masks.shape[1], self.known.outputs.shape[1]
        return self.directory / f"moments-{n_train}x{n_targets}"

    @property
    def _kept_at(self) -> Checkpoints:
        return replace(self.place, directory=self._folder)

    @property
    def _memory(self) -> Path:
        return self._folder / "rows.pt"

    def _path(self, rows: Span) -> Path:
        """Where the moments of known rows are kept."""
        return _path_of(self._folder, rows, self.known.digest(*rows))

    def _count(self, rows: Span, before: int, zeros: Zeros) -> Moments:
        return Moments.of(
            self.known.masks,
            self.known.outputs,
            start=rows[0],
            stop=rows[1],
            block_rows=self.block_rows,
            threads=self.threads,
            progress=lambda done, _: self.progress(before + done),
            zeros=zeros,
            seen=self.known.saw,
        )

    def _pieces_kept(self, n_rows: int) -> tuple[int, bool]:
        """Return at how many rows pieces are cut, and whether they are kept once they are added up."""
        n_train, n_targets, sizes = self.known.masks.shape[1], self.known.outputs.shape[1], self.place.sizes
        n_kept = min(sizes.bytes_of_pieces // (4 * n_train**2 + 8 * n_train * n_targets), sizes.n_pieces)
        # sums of wider outputs are rounded, and would be so otherwise in every other piece
        if self.place.scheduler is None and (n_kept < 2 or not _is_half(self.known.outputs)):
            return sizes.rows_of_a_piece, False
        rows = 2 ** math.ceil(math.log2(n_rows / max(n_kept, 2)))
        if self.place.scheduler is not None:
            return max(-(-n_rows // sizes.n_pieces), sizes.least_rows_of_a_task), False
        return min(max(rows, sizes.least_rows_of_a_piece), sizes.rows_of_a_piece), True

    def _pieces(self, rows: Span, piece_rows: int, *, joins_last: bool) -> list[tuple[Span, Path | None]]:
        """Cut a range into what is kept, the longest first from each row on, and what is to be counted.

        With `joins_last` less than half a piece at the end joins the one before: a file of X'X less to write.
        """
        kept = self._kept_inside(rows)
        pieces: list[tuple[Span, Path | None]] = []
        at, stop = rows
        while at < stop:
            if ends := [span[1] for span in kept if span[0] == at]:
                end = max(ends)
            else:
                next_kept = min((span[0] for span in kept if span[0] > at), default=stop)
                end = min(next_kept, (at // piece_rows + 1) * piece_rows, stop)
                if joins_last and end < min(next_kept, stop) < end + piece_rows // 2:
                    end = min(next_kept, stop)
            pieces.append(((at, end), kept.get((at, end))))
            at = end
        return pieces

    def _kept_inside(self, rows: Span) -> dict[Span, Path]:
        """Find kept moments of just these rows; what is needed to know is read, where that is cheap."""
        found = []
        for path in self._folder.glob("*.pt"):
            if match := _KEPT_NAME.fullmatch(path.name):
                span = int(match[1]), int(match[2])
                if rows[0] <= span[0] < span[1] <= rows[1]:
                    found.append((span, path, match[3]))
        for span in sorted({span for span, _, _ in found}):
            self.known.read_near(*span, block_rows=self.block_rows)
        return {span: path for span, path, digest in found if self.known.digest(*span) == digest}

    def _added(self, parts: list[Span], spared: set[Path]) -> list[Span]:
        """Add adjacent parts in pairs, the last of an odd number left over; remove those that are not spared."""
        pairs = list(zip(parts[::2], parts[1::2], strict=False))
        if not pairs:
            return parts
        sums = [(left[0], right[1]) for left, right in pairs]
        tasks = [
            (left, right, self._path(total), [path for path in (left, right) if path not in spared])
            for (left, right), total in zip((map(self._path, pair) for pair in pairs), sums, strict=True)
        ]
        if self.place.scheduler is None:
            for task in tasks:
                _add_files(*task)
        else:
            for _ in run_on_cluster(self.place.scheduler, _add_files, tasks):
                pass
        return [*sums, *parts[2 * len(pairs) :]]

    def _count_on_cluster(self, uncounted: Sequence[Span], done: int) -> None:
        if not uncounted:
            return
        masks, outputs = self.known.masks, self.known.outputs
        with carried_along(paid=any(map(_is_paid, (masks, outputs)))) as carried:
            tasks = ((masks, outputs, rows, self._kept_at, self.block_rows, carried) for rows in uncounted)
            for first, keys in run_on_cluster(self.place.scheduler or "", _count_there, tasks):
                self.known.set(first, keys)
                self.known.remember(self._memory)
                done += len(keys)
                self.progress(done)

    def _clear(self, used: set[Path], totals: Sequence[Path]) -> None:
        """Remove what other fits left, but for the latest used."""
        for path in used:
            os.utime(path)
        room = max(self.place.sizes.bytes_of_others, 2 * sum(path.stat().st_size for path in totals))
        kept = self._folder.parent.glob("moments-*x*/*.pt")
        others = [path for path in kept if path not in used and path.name != self._memory.name]
        for path in sorted(others, key=lambda path: path.stat().st_mtime_ns, reverse=True):
            room -= path.stat().st_size
            if room < 0:
                path.unlink()
        self._kept_at.clear_unfinished()
        _forget_earlier_version(self.directory)


_EARLIER_NAME = re.compile(r"moments-[0-9a-f]{16}")
_KEPT_NAME = re.compile(r"(\d+)-(\d+)-([0-9a-f]+)\.pt")


def _path_of(folder: Path | None, rows: Span, digest: str | None) -> Path:
    return (folder or Path()) / f"{rows[0]}-{rows[1]}-{digest}.pt"


def _is_paid(array: RowSliceable) -> bool:
    return isinstance(array, dmdata.LazyArray) and array.price_usd(1, 1) > 0


def _is_half(array: RowSliceable) -> bool:
    return str(getattr(array, "dtype", None)) == "float16"


def _of_earlier_version(directory: Path) -> list[Path]:
    return [path for path in directory.glob("moments-*") if _EARLIER_NAME.fullmatch(path.name)]


def _warn_of_earlier_version(directory: Path) -> None:
    if _of_earlier_version(directory):
        warnings.warn(
            f"{directory} holds moments that an earlier version kept, which knew data by their first 16 rows alone; "
            "they are not used but counted again, and then removed",
            DataWarning,
            stacklevel=6,
        )


def _forget_earlier_version(directory: Path) -> None:
    for path in _of_earlier_version(directory):
        shutil.rmtree(path, ignore_errors=True)


def _count_there(
    masks: RowSliceable, outputs: RowSliceable, rows: Span, place: Checkpoints, block_rows: int, carried: Carried
) -> tuple[int, NDArray[np.uint64]]:
    """Keep the moments of some rows; return the first row and their keys. Runs on a thread of a worker, one a task."""
    with carried.in_force():
        known = KnownRows.of(masks, outputs)
        start, stop = rows

        def count(zeros: Zeros) -> Moments:
            return Moments.of(
                masks, outputs, start=start, stop=stop, block_rows=block_rows, threads=1, zeros=zeros, seen=known.saw
            )

        _keep_counted(place.directory or Path(), known, rows, count)
    return start, known.keys[start:stop]


def _keep_counted(folder: Path, known: KnownRows, rows: Span, count: Callable[[Zeros], Moments]) -> None:
    """Count rows into a file, which is named by what they hold: that is known once they were read."""
    unnamed = folder / f".{rows[0]}-{rows[1]}.{uuid.uuid4().hex}.partial"
    Moments.save_new(unnamed, known.masks.shape[1], known.outputs.shape[1], count)
    with explain_os_errors(folder):
        os.replace(unnamed, _path_of(folder, rows, known.digest(*rows)))


def _add_files(left: Path, right: Path, total: Path, spent: Sequence[Path]) -> None:
    """Keep the sum of two files of moments, and remove those that are spent; done a second time, it does nothing."""
    if not total.exists():
        of_left, of_right = Moments.open(left), Moments.open(right)
        n_train, n_targets = of_left.cross.shape
        Moments.save_new(total, n_train, n_targets, lambda zeros: of_left.plus(of_right, zeros=zeros))
    for path in spent:
        path.unlink(missing_ok=True)
