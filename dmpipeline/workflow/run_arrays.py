"""A run's arrays as a step reads them: through its catalog, a block of rows at a time, damage explained."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import dmdata
from dmdata.errors import FormatError
from dmpipeline.errors import RunError, quoted
from dmpipeline.moments.identity import files_digest
from dmpipeline.runs.store import Run


@dataclass(frozen=True, slots=True)
class RowsOf:
    """Some adjacent rows of a run's array, still lazy: `shape` and row slices."""

    run: Run
    array: dmdata.LazyArray
    rows: slice

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""
        return (self.rows.stop - self.rows.start, *self.array.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of an element as it is read."""
        return np.dtype(np.float32) if self.array.dtype.kind == "i" else self.array.dtype

    def content_digest(self, start: int, stop: int) -> str:
        """Identify some rows by the digests that their blocks were stored with, and by their files, unread.

        Rows that are damaged and trained again get the digests that they had before.
        """
        rows = slice(self.rows.start + start, self.rows.start + stop)
        files = files_digest(self.array, rows.start, rows.stop)
        return f"{self.array.name.rpartition('/')[2]} {self.run.rows_digest(rows)} {files}"

    def __getitem__(self, key: slice) -> npt.NDArray[Any]:
        start, stop, _ = key.indices(self.shape[0])
        with _explained(self.run):
            rows = self.array[self.rows.start + start : self.rows.start + stop]
        # labels are numbers, too
        return rows.astype(np.float32) if rows.dtype.kind == "i" else rows


def artifact_name(run: Run, array: str) -> str:
    """Name one of a run's arrays as its catalog does."""
    return f"{run.provenance['dataset']['name']}/{run.alpha_name}/{array}"


def open_rows(run: Run, array: str, rows: slice) -> RowsOf:
    """Open some adjacent rows of a run's array; RunError where what is stored is damaged."""
    with _explained(run):
        return RowsOf(run, dmdata.open(artifact_name(run, array), catalog=run.path), rows)


@contextmanager
def _explained(run: Run) -> Iterator[None]:
    """Explain, where an array cannot be read, how to find out what is damaged."""
    try:
        yield
    except FormatError as error:
        raise RunError(
            f"{error}; find out which rows of the run are affected with `dmpipeline verify {quoted(run.path)}`",
            path=run.path,
        ) from error
