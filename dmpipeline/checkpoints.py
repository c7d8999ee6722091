"""What a long fit has finished, kept in a directory: killed at any moment it goes on from there, and workers share it.

::

    directory/
      moments-3fa8c1d2.../    of masks and outputs that begin with the same rows
        0-65536.pt            second moments of rows 0 to 65,536
      fit-77ab0e19.../        of certain rows with certain settings; removed when the fit is done
        grams-0.pt, paths-0-0-512.pt, ...

A file is there whole or not at all, and its name says what it is of, so nothing else is remembered. Moments of adjacent
rows are added up to those of a wider range, exactly for float16 outputs: when more models have been trained, rows that
were read are not read again, and the fit is that of all rows read at once. Large arrays are mapped from files in the
directory, so that a fit may be larger than memory.

With a Dask scheduler its workers, who must see the directory under the same path, do the work: blocks of rows, whose
moments are then added in pairs, and blocks of targets. A task that is lost is done again, with the same result but for
rounding: processes may have compiled a kernel apart.
"""

import hashlib
import math
import os
import shutil
import tempfile
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
from dmpipeline.errors import SpecError, explain_os_errors
from dmpipeline.moments import Moments, RowSliceable, check_shapes
from dmpipeline.tensors import map_tensors, save_tensors

Arrays = Mapping[str, NDArray[Any]]

Solve = Callable[[Arrays, Arrays, Callable[[int], None]], Arrays]
"""From the arrays that all blocks share and those of one block to its results; reports how many targets are done."""

Rows = tuple[int, int]
"""Adjacent rows, half-open."""


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
            digest.update(np.ascontiguousarray(fact).data if isinstance(fact, np.ndarray) else repr(fact).encode())
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
        ranges: Sequence[Rows],
        *,
        block_rows: int,
        threads: int | None,
        progress: Callable[[int], None],
    ) -> list[Moments]:
        """Give the second moments of some ranges of rows, reading those that no kept moments are of.

        Parameters
        ----------
        ranges : sequence of (start, stop)
        progress : callable
            Called with the number of rows done, in all ranges together.
        """
        if self.directory is not None:
            first = slice(0, min(_ROWS_KNOWN_BY, masks.shape[0]))
            known_by = np.asarray(masks[first]).astype(np.bool_), np.asarray(outputs[first])
            here = self.under("moments", check_shapes(masks, outputs)[1:], *known_by)
            return here._gathered(masks, outputs, ranges, block_rows=block_rows, threads=threads, progress=progress)
        of_ranges, before = [], 0
        for start, stop in ranges:
            report = _counting_on(progress, before)
            of_ranges.append(
                Moments.of(
                    masks, outputs, start=start, stop=stop, block_rows=block_rows, threads=threads, progress=report
                )
            )
            before += stop - start
        return of_ranges

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

    def _gathered(
        self,
        masks: RowSliceable,
        outputs: RowSliceable,
        ranges: Sequence[Rows],
        *,
        block_rows: int,
        threads: int | None,
        progress: Callable[[int], None],
    ) -> list[Moments]:
        pieces = {rows: self._pieces(*rows) for rows in ranges}
        unread = [rows for of_range in pieces.values() for rows in of_range if not self._has(_rows_name(rows))]
        done = sum(stop - start for start, stop in ranges) - sum(stop - start for start, stop in unread)
        if done:
            progress(done)
        if self.scheduler is not None:
            self._read_on_cluster(masks, outputs, unread, block_rows, _counting_on(progress, done))
            for rows in ranges:
                self._add_on_cluster(pieces[rows])
        else:
            for rows in ranges:
                total = pieces[rows][0]
                for nth, piece in enumerate(pieces[rows]):
                    if piece in unread:
                        report = _counting_on(progress, done)
                        path = self._path(_rows_name(piece))
                        _sum_rows(masks, outputs, piece, path, block_rows, threads, report)
                        done += piece[1] - piece[0]
                    if nth:
                        total = self._add(total, piece)
        for path in self.directory.glob("*.pt") if self.directory else ():
            if path.stem not in map(_rows_name, ranges):
                path.unlink()
        return [Moments.open(self._path(_rows_name(rows))) for rows in ranges]

    def _pieces(self, start: int, stop: int) -> list[Rows]:
        """Cut a range into what is kept, the longest first from each row on, and what is to be read, not too long."""
        files = self.directory.glob("*-*.pt") if self.directory else ()
        kept = [(int(first), int(last)) for first, _, last in (path.stem.partition("-") for path in files)]
        inside = [rows for rows in kept if start <= rows[0] and rows[1] <= stop]
        pieces: list[Rows] = []
        while start < stop:
            if ends := [last for first, last in inside if first == start]:
                end = max(ends)
            else:
                next_kept = min((first for first, _ in inside if first > start), default=stop)
                end = min(next_kept, start + self._most_rows(stop - start))
            pieces.append((start, end))
            start = end
        return pieces

    def _most_rows(self, n_rows: int) -> int:
        """Rows to read between two checkpoints; on a cluster they are shared among many workers."""
        return _ROWS_OF_A_PIECE if self.scheduler is None else max(-(-n_rows // _TASKS), _LEAST_ROWS_OF_A_TASK)

    def _add(self, left: Rows, right: Rows) -> Rows:
        rows = (left[0], right[1])
        _add_files(*(self._path(_rows_name(part)) for part in (left, right, rows)))
        return rows

    def _read_on_cluster(
        self,
        masks: RowSliceable,
        outputs: RowSliceable,
        unread: Sequence[Rows],
        block_rows: int,
        progress: Callable[[int, int], None],
    ) -> None:
        if not unread:
            return
        done = 0
        with carried_along(paid=any(map(_is_paid, (masks, outputs)))) as carried:
            tasks = ((masks, outputs, rows, self._path(_rows_name(rows)), block_rows, carried) for rows in unread)
            for n_rows in run_on_cluster(self._scheduler, _sum_rows_there, tasks):
                done += n_rows
                progress(done, 0)

    def _add_on_cluster(self, pieces: list[Rows]) -> None:
        """Add adjacent pieces in pairs, and those in pairs again, until one is left."""
        while len(pieces) > 1:
            pairs = list(zip(pieces[::2], pieces[1::2], strict=False))
            sums = [(left[0], right[1]) for left, right in pairs]
            tasks = [
                tuple(self._path(_rows_name(rows)) for rows in (*pair, total))
                for pair, total in zip(pairs, sums, strict=True)
            ]
            for _ in run_on_cluster(self._scheduler, _add_files, tasks):
                pass
            pieces = [*sums, *pieces[2 * len(pairs) :]]

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


_MAPPED_BYTES = 2**26
_ROWS_KNOWN_BY = 16
_ROWS_OF_A_PIECE = 65_536
_TASKS = 16
_LEAST_ROWS_OF_A_TASK = 1024


def _rows_name(rows: Rows) -> str:
    return f"{rows[0]}-{rows[1]}"


def _counting_on(progress: Callable[[int], None], before: int) -> Callable[..., None]:
    return lambda done, _=0: progress(before + done)


def _is_paid(array: RowSliceable) -> bool:
    return isinstance(array, dmdata.LazyArray) and array.price_usd(1, 1) > 0


def _sum_rows(
    masks: RowSliceable,
    outputs: RowSliceable,
    rows: Rows,
    path: Path,
    block_rows: int,
    threads: int | None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    zeros = Checkpoints(path.parent).zeros
    start, stop = rows
    own = Moments.of(
        masks, outputs, start=start, stop=stop, block_rows=block_rows, threads=threads, progress=progress, zeros=zeros
    )
    own.save(path)


def _sum_rows_there(
    masks: RowSliceable, outputs: RowSliceable, rows: Rows, path: Path, block_rows: int, carried: Carried
) -> int:
    """Keep the moments of some rows; on a thread of a worker, of which it has one for each task."""
    with carried.in_force():
        if not path.exists():
            _sum_rows(masks, outputs, rows, path, block_rows, 1)
    return rows[1] - rows[0]


def _add_files(left: Path, right: Path, total: Path) -> None:
    """Keep the sum of two files of moments in their stead; done a second time, it does nothing."""
    if not total.exists():
        Moments.open(left).plus(Moments.open(right), zeros=Checkpoints(total.parent).zeros).save(total)
    for path in (left, right):
        path.unlink(missing_ok=True)


def _solve_there(solve: Solve, shared: Path, problem: Path, result: Path, n_targets: int) -> int:
    if not result.exists():
        save_tensors(solve(map_tensors(shared), map_tensors(problem), lambda _: None), result)
    problem.unlink(missing_ok=True)
    return n_targets
