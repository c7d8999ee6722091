"""What a long fit has finished, kept in a directory: killed at any moment it resumes from there, and workers share it.

::

    directory/
      moments-2000x500/         of 2,000 training examples and 500 targets
        0-65536-3fa8c1d2....pt  second moments of rows 0 to 65,536, and a digest of what these rows hold
        rows.pt                 what is known of the rows of sources that need not be read again for it
      fit-77ab0e19.../          of certain rows with certain settings; removed when the fit is done
        grams-0.pt, paths-0-0-512.pt, ...

A file is there whole or not at all, and its name says what it is of. Moments are known by all of their rows: by their
masks, outputs, dtype and order (`dmpipeline.identity`). A row that changed makes the moments that hold it unusable and
no others, so only those are counted again; rows that a source vouches for, as a run or an object with an ETag does, are
not even read. Moments of adjacent rows are added up to those of a wider range, exactly for float16 outputs: when more
models have been trained, rows that were counted are not counted again, and the fit is that of all rows read at once.
Large arrays are mapped from files in the directory, so that a fit may be larger than memory.

What is kept: the moments of each range that a fit asks for, 4 n_train^2 + 8 n_train n_targets bytes each. In addition,
for float16 outputs, those of up to 16 pieces of its rows, as many as take 64 MiB: counting a thousand rows again costs
less than reading and writing larger ones. And what other fits left, of other data or other ranges, the latest used
first, as much as takes 1 GiB or twice what this fit's ranges take: two users may share a directory, and of 50,000
examples it holds three fits and no more.

With a Dask scheduler its workers, who must see the directory under the same path, do the work: blocks of rows, whose
moments are then added in pairs, and blocks of targets. A task that is lost is done again, with the same result but for
rounding: processes may have compiled a kernel apart.
"""

import hashlib
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

import dmdata
from dmdata.cluster import Carried, carried_along, run_on_cluster
from dmdata.locks import only_process_at
from dmpipeline.arrays import RowSliceable, as_rows, check_shapes
from dmpipeline.errors import DataWarning, SpecError, explain_os_errors
from dmpipeline.identity import KnownRows, Span, digest_of
from dmpipeline.moments import Moments
from dmpipeline.tensors import map_tensors, save_tensors

Arrays = Mapping[str, NDArray[Any]]

Solve = Callable[[Arrays, Arrays, Callable[[int], None]], Arrays]
"""From the arrays that all blocks share and those of one block to its results; reports how many targets are done."""


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
        A key of each row's mask, ranges in order; see `dmpipeline.identity.keys_of_masks`.
    """

    parts: list[Moments]
    digest: str
    mask_keys: NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Block:
    """Some targets to solve, and what makes the arrays that describe them."""

    n_targets: int
    make: Callable[[], Arrays]


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """A place for what is finished. Without a directory nothing is kept, and arrays are in memory.

    Attributes
    ----------
    directory : pathlib.Path or None
    scheduler : str or None
        Address of a Dask scheduler whose workers do the work.
    """

    directory: Path | None = None
    scheduler: str | None = None

    @classmethod
    def at(cls, directory: str | os.PathLike[str] | None, scheduler: str | None = None) -> Self:
        """Make the place, if it is not there.

        Raises
        ------
        SpecError
            If there is a scheduler and no directory to share with its workers.
        RunError
            If the directory cannot be made.
        """
        if directory is None:
            if scheduler is not None:
                raise SpecError(
                    f"the workers of {scheduler} hand over results in a directory that all of them see; name one",
                    field="directory",
                )
            return cls()
        path = Path(directory).absolute()
        with explain_os_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        return cls(path, scheduler)

    def claimed(self) -> AbstractContextManager[None]:
        """Hold the directory while the block runs; DmdataError where another process does."""
        return nullcontext() if self.directory is None else only_process_at(self.directory)

    def under(self, kind: str, *facts: object) -> "Checkpoints":
        """Give the place for what follows from these facts: arrays, and anything that `repr` tells apart."""
        if self.directory is None:
            return self
        digest = hashlib.sha256()
        for fact in facts:
            # of an array the bytes, and of those no copy
            if isinstance(fact, np.ndarray):
                digest.update(repr((fact.dtype.str, fact.shape)).encode())
                digest.update(np.ascontiguousarray(fact).data)
            else:
                digest.update(repr(fact).encode())
            digest.update(b"\0")
        return replace(self, directory=self.directory / f"{kind}-{digest.hexdigest()[:16]}")

    def remove(self) -> None:
        """Forget what is here."""
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Make an array of zeros; a large one, where there is a directory, in a file there that goes with the array.

        Raises
        ------
        RunError
            If the disk has no room for it.
        """
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        if self.directory is None or n_bytes < _MAPPED_BYTES:
            return np.zeros(shape, dtype)
        with explain_os_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory) as file:
                os.posix_fallocate(file.fileno(), 0, n_bytes)  # without it a full disk would kill the process
                return np.memmap(file, dtype, "r+", shape=shape)

    def moments(
        self,
        masks: RowSliceable,
        outputs: RowSliceable,
        ranges: Sequence[Span],
        *,
        block_rows: int,
        threads: int | None,
        progress: Callable[[int], None],
    ) -> list[Moments]:
        """Give the second moments of some ranges of rows, counting those that no kept moments are of.

        Parameters
        ----------
        ranges : sequence of (start, stop)
            Disjoint, rising.
        progress : callable
            Called with the number of rows done, in all ranges together.
        """
        return self.gathered(masks, outputs, ranges, block_rows=block_rows, threads=threads, progress=progress).parts

    def gathered(
        self,
        masks: RowSliceable,
        outputs: RowSliceable,
        ranges: Sequence[Span],
        *,
        block_rows: int,
        threads: int | None,
        progress: Callable[[int], None],
    ) -> Gathered:
        """Give what `moments` does, with what tells the rows from others.

        Warns
        -----
        DataWarning
            If the directory holds moments of an earlier version of this package, which are counted again.
        """
        check_shapes(masks, outputs)
        masks, outputs = as_rows(masks, "masks"), as_rows(outputs, "outputs")
        known = KnownRows.of(masks, outputs)
        counting = _Counting(self, known, block_rows, threads, progress)
        parts = counting.in_memory(ranges) if self.directory is None else counting.in_directory(ranges)
        keys = np.concatenate([known.keys[slice(*rows)] for rows in ranges])
        return Gathered(parts, digest_of(keys, masks.shape[1], outputs.shape[1]), keys[:, 0].copy())

    def solved(
        self,
        solve: Solve,
        shared: tuple[str, Callable[[], Arrays]],
        blocks: Mapping[str, Block],
        progress: Callable[[int], None],
    ) -> dict[str, Arrays]:
        """Solve the blocks of targets whose results are not kept.

        Parameters
        ----------
        solve : callable
            With a scheduler, one that its workers can import.
        shared : name and callable
            What makes the arrays that all blocks share; not called if nothing is left to solve.
        blocks : mapping of name to Block
        progress : callable
            Called with the number of targets done, in all blocks together.
        """
        results: dict[str, Arrays] = {}
        left = {name: block for name, block in blocks.items() if not self._has(name)}
        done = sum(block.n_targets for block in blocks.values()) - sum(block.n_targets for block in left.values())
        if done:
            progress(done)
        if left:
            arrays = self._kept(*shared)
            if self.scheduler is not None:
                self._solve_on_cluster(solve, shared[0], left, _counting_on(progress, done))
            else:
                for name, block in left.items():
                    report = _counting_on(progress, done)
                    results[name] = self._kept(name, lambda: solve(arrays, block.make(), report))  # noqa: B023
                    done += block.n_targets
        for name in blocks.keys() - results.keys():
            results[name] = map_tensors(self._path(name))
        return {name: results[name] for name in blocks}

    def _path(self, name: str) -> Path:
        return (self.directory or Path()) / f"{name}.pt"

    def _has(self, name: str) -> bool:
        return self.directory is not None and self._path(name).exists()

    def _kept(self, name: str, make: Callable[[], Arrays]) -> Arrays:
        """Give what is kept by this name; make it and keep it where it is not there."""
        if self.directory is None:
            return make()
        if not self._has(name):
            save_tensors(make(), self._path(name))
        return map_tensors(self._path(name))

    def _solve_on_cluster(
        self, solve: Solve, shared: str, blocks: Mapping[str, Block], progress: Callable[[int, int], None]
    ) -> None:
        def tasks() -> Iterator[tuple[Any, ...]]:
            for name, block in blocks.items():
                problem = self._path(f"{name}-problem")
                save_tensors(block.make(), problem)
                yield solve, self._path(shared), problem, self._path(name), block.n_targets

        done = 0
        for n_targets in run_on_cluster(self._scheduler, _solve_there, tasks()):
            done += n_targets
            progress(done, 0)

    @property
    def _scheduler(self) -> str:
        return self.scheduler or ""


@dataclass(frozen=True, slots=True, eq=False)
class _Counting:
    """Rows whose moments are wanted, and how they are counted."""

    place: Checkpoints
    known: KnownRows
    block_rows: int
    threads: int | None
    progress: Callable[[int], None]

    def in_memory(self, ranges: Sequence[Span]) -> list[Moments]:
        parts, before = [], 0
        for rows in ranges:
            parts.append(self._count(rows, before, np.zeros))
            before += rows[1] - rows[0]
        return parts

    def in_directory(self, ranges: Sequence[Span]) -> list[Moments]:
        """Count what no kept moments are of, and add all up to the ranges; every step leaves what it made in a file."""
        _warn_of_earlier_version(self.place.directory or Path())
        with explain_os_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        self.known.recall(self._memory)
        piece_rows, is_lasting = self._pieces_kept(sum(stop - start for start, stop in ranges))
        pieces = {rows: self._pieces(rows, piece_rows) for rows in ranges}
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
                    self._count(rows, done, self.place.zeros).save(self._path(rows))
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
        return (self.place.directory or Path()) / f"moments-{n_train}x{n_targets}"

    @property
    def _memory(self) -> Path:
        return self._folder / "rows.pt"

    def _path(self, rows: Span) -> Path:
        """Where the moments of known rows are kept."""
        return _path_of(self._folder, rows, self.known.digest(*rows))

    def _count(self, rows: Span, before: int, zeros: Any) -> Moments:
        return Moments.of(
            self.known.masks,
            self.known.outputs,
            start=rows[0],
            stop=rows[1],
            block_rows=self.block_rows,
            threads=self.threads,
            progress=_counting_on(self.progress, before),
            zeros=zeros,
            seen=self.known.saw,
        )

    def _pieces_kept(self, n_rows: int) -> tuple[int, bool]:
        """Say at how many rows pieces are cut, and whether they are kept once they are added up."""
        n_train, n_targets = self.known.masks.shape[1], self.known.outputs.shape[1]
        n_kept = min(_PIECES_BYTES // (4 * n_train**2 + 8 * n_train * n_targets), _TASKS)
        # sums of wider outputs are rounded, and would be so otherwise in every other piece
        if self.place.scheduler is None and (n_kept < 2 or not _is_half(self.known.outputs)):
            return _ROWS_OF_A_PIECE, False
        rows = 2 ** math.ceil(math.log2(n_rows / max(n_kept, 2)))
        if self.place.scheduler is not None:
            return max(-(-n_rows // _TASKS), _LEAST_ROWS_OF_A_TASK), False
        return min(max(rows, _LEAST_ROWS_OF_A_PIECE), _ROWS_OF_A_PIECE), True

    def _pieces(self, rows: Span, piece_rows: int) -> list[tuple[Span, Path | None]]:
        """Cut a range into what is kept, the longest first from each row on, and what is to be counted."""
        kept = self._kept_inside(rows)
        pieces: list[tuple[Span, Path | None]] = []
        at, stop = rows
        while at < stop:
            if ends := [span[1] for span in kept if span[0] == at]:
                end = max(ends)
            else:
                next_kept = min((span[0] for span in kept if span[0] > at), default=stop)
                end = min(next_kept, (at // piece_rows + 1) * piece_rows, stop)
            pieces.append(((at, end), kept.get((at, end))))
            at = end
        return pieces

    def _kept_inside(self, rows: Span) -> dict[Span, Path]:
        """Find kept moments of just these rows; what is needed to tell is read, where that is cheap."""
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
            tasks = ((masks, outputs, rows, self._folder, self.block_rows, carried) for rows in uncounted)
            for first, keys in run_on_cluster(self.place.scheduler or "", _count_there, tasks):
                self.known.set(first, keys)
                self.known.remember(self._memory)
                done += len(keys)
                self.progress(done)

    def _clear(self, used: set[Path], totals: Sequence[Path]) -> None:
        """Remove what other fits left, but for the latest used."""
        for path in used:
            os.utime(path)
        room = max(_OTHERS_BYTES, 2 * sum(path.stat().st_size for path in totals))
        kept = self._folder.parent.glob("moments-*x*/*.pt")
        others = [path for path in kept if path not in used and path.name != self._memory.name]
        for path in sorted(others, key=lambda path: path.stat().st_mtime_ns, reverse=True):
            room -= path.stat().st_size
            if room < 0:
                path.unlink()
        for part in self._folder.glob(".*.part"):  # what a killed process was writing
            part.unlink()
        _forget_earlier_version(self.place.directory or Path())


_MAPPED_BYTES = 2**26
_ROWS_OF_A_PIECE = 65_536
_LEAST_ROWS_OF_A_PIECE = 1024
_PIECES_BYTES = 2**26
_OTHERS_BYTES = 2**30
_TASKS = 16
_LEAST_ROWS_OF_A_TASK = 1024
_EARLIER_NAME = re.compile(r"moments-[0-9a-f]{16}")
_KEPT_NAME = re.compile(r"(\d+)-(\d+)-([0-9a-f]+)\.pt")


def _path_of(folder: Path, rows: Span, digest: str | None) -> Path:
    return folder / f"{rows[0]}-{rows[1]}-{digest}.pt"


def _counting_on(progress: Callable[[int], None], before: int) -> Callable[..., None]:
    return lambda done, _=0: progress(before + done)


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
    masks: RowSliceable, outputs: RowSliceable, rows: Span, folder: Path, block_rows: int, carried: Carried
) -> tuple[int, NDArray[np.uint64]]:
    """Keep the moments of some rows, return the first and their keys; on a thread of a worker, one a task."""
    with carried.in_force():
        known = KnownRows.of(masks, outputs)
        zeros = Checkpoints(folder).zeros
        start, stop = rows
        own = Moments.of(
            masks, outputs, start=start, stop=stop, block_rows=block_rows, threads=1, zeros=zeros, seen=known.saw
        )
        own.save(_path_of(folder, rows, known.digest(*rows)))
    return start, known.keys[start:stop]


def _add_files(left: Path, right: Path, total: Path, spent: Sequence[Path]) -> None:
    """Keep the sum of two files of moments, and remove those that are spent; done a second time, it does nothing."""
    if not total.exists():
        Moments.open(left).plus(Moments.open(right), zeros=Checkpoints(total.parent).zeros).save(total)
    for path in spent:
        path.unlink(missing_ok=True)


def _solve_there(solve: Solve, shared: Path, problem: Path, result: Path, n_targets: int) -> int:
    if not result.exists():
        save_tensors(solve(map_tensors(shared), map_tensors(problem), lambda _: None), result)
    problem.unlink(missing_ok=True)
    return n_targets
