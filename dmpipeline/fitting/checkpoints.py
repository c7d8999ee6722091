"""What a long fit has finished, kept in a directory: killed at any moment it resumes from there, and workers share it.

::

    directory/
      moments-2000x500/         of 2,000 training examples and 500 targets
        0-65536-3fa8c1d2....pt  second moments of rows 0 to 65,536, and a digest of what these rows hold
        rows.pt                 what is known of the rows of sources that need not be read again for it
      fit-77ab0e19.../          of certain rows with certain settings; removed when the fit is done
        grams-0.pt, paths-0-512.pt, ...

A file is there whole or not at all, and its name says what it is of. Moments are known by all of their rows: by their
masks, outputs, dtype and order (`dmpipeline.moments.identity`). A row that changed makes the moments that hold it
unusable and no others, so only those are counted again; rows that a source vouches for, as a run or an object with an
ETag does, are not even read. Moments of adjacent rows are added up to those of a wider range, exactly for float16
outputs: when more models have been trained, rows that were counted are not counted again, and the fit is that of all
rows read at once. Large arrays are mapped from files in the directory, so that a fit may be larger than memory.

`dmpipeline.fitting.counting` decides which moments are kept, `dmpipeline.fitting.blocks` has the targets solved.
"""

import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dmdata.reading.locks import only_process_at
from dmpipeline.errors import SpecError, explain_os_errors
from dmpipeline.moments.tensors import map_tensors, new_tensors, save_tensors

Arrays = Mapping[str, NDArray[Any]]

Shapes = Mapping[str, tuple[tuple[int, ...], Any]]
"""Shape and dtype of arrays by name."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How rows are cut into pieces, and how much is kept or mapped from files; the defaults are meant to be right.

    Attributes
    ----------
    rows_of_a_piece : int
        Most rows that are counted before what was counted is saved.
    least_rows_of_a_piece : int
        Pieces that are kept after they are added up hold at least this many.
    bytes_of_pieces : int
        How much the pieces of one fit may take together.
    bytes_of_others : int
        How much is kept of other fits.
    n_pieces : int
        Most pieces that are kept, and tasks that rows are cut into for a cluster.
    least_rows_of_a_task : int
        Of these tasks.
    mapped_bytes : int
        Arrays of at least this size are mapped from files.
    """

    rows_of_a_piece: int = 131_072
    least_rows_of_a_piece: int = 1024
    bytes_of_pieces: int = 2**26
    bytes_of_others: int = 2**30
    n_pieces: int = 16
    least_rows_of_a_task: int = 1024
    mapped_bytes: int = 2**26


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """A place for what is finished. Without a directory nothing is kept, and arrays are in memory.

    Attributes
    ----------
    directory : pathlib.Path or None
    scheduler : str or None
        Address of a Dask scheduler whose workers do the work.
    sizes : Sizes
    """

    directory: Path | None = None
    scheduler: str | None = None
    sizes: Sizes = field(default_factory=Sizes)

    @classmethod
    def at(
        cls, directory: str | os.PathLike[str] | None, scheduler: str | None = None, *, sizes: Sizes | None = None
    ) -> Self:
        """Make the directory, if it is not there.

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
            return cls(sizes=sizes or Sizes())
        path = Path(directory).absolute()
        with explain_os_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        return cls(path, scheduler, sizes or Sizes())

    def claimed(self) -> AbstractContextManager[None]:
        """Hold the directory while the block runs; DmdataError where another process does."""
        return nullcontext() if self.directory is None else only_process_at(self.directory)

    def under(self, kind: str, *facts: object) -> "Checkpoints":
        """Return the place for what follows from these facts: arrays, and anything that `repr` distinguishes."""
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
        if self.directory is None or n_bytes < self.sizes.mapped_bytes:
            return np.zeros(shape, dtype)
        with explain_os_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory) as file:
                os.posix_fallocate(file.fileno(), 0, n_bytes)  # without it a full disk would kill the process
                return np.memmap(file, dtype, "r+", shape=shape)

    def forget(self, name: str) -> None:
        """Remove the arrays that are kept by this name, if there are any; those who have mapped them keep them."""
        if self.directory is not None:
            self.path(name).unlink(missing_ok=True)

    def clear_unfinished(self) -> None:
        """Remove what killed processes were writing here: files as large as a Gram matrix."""
        if self.directory is not None:
            for partial in self.directory.glob(".*.partial"):
                partial.unlink(missing_ok=True)

    def path(self, name: str) -> Path:
        """Where the arrays of this name are, or would be, kept."""
        return (self.directory or Path()) / f"{name}.pt"

    def has(self, name: str) -> bool:
        """Whether arrays are kept by this name."""
        return self.directory is not None and self.path(name).exists()

    def kept(self, name: str, make: Callable[[], Arrays]) -> Arrays:
        """Return the arrays that are kept by this name; make them, and keep them, if there are none."""
        if self.directory is None:
            return make()
        if not self.has(name):
            save_tensors(make(), self.path(name))
        return map_tensors(self.path(name))

    def kept_filled(self, name: str, shapes: Shapes, fill: Callable[[Mapping[str, NDArray[Any]]], None]) -> Arrays:
        """Return the arrays of these shapes and dtypes that are kept by this name; if there are none, have them filled.

        Unlike `kept`, what is filled is the file itself, so that large arrays are not copied.
        """
        if self.directory is None:
            arrays = {of_array: np.zeros(shape, dtype) for of_array, (shape, dtype) in shapes.items()}
            fill(arrays)
            return arrays
        if not self.has(name):
            with new_tensors(shapes, self.path(name)) as mapped:
                fill(mapped)
        return map_tensors(self.path(name))
