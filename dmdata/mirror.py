"""Copy an array into a chunked Zarr store, block of rows by block of rows, so that it can be stopped and resumed.

Chunks are good for a block of rows and for a column alike. A block is read once, written as whole chunks, and only
then entered, with its digest, into the journal in the array's own attributes; so whatever kills the copy, what was
entered is complete and is never fetched again. Peak memory is a few blocks, whatever the number of rows. The mirror
is plain Zarr v3, bool or float in Blosc zstd with bitshuffle: any reader opens it.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import filelock
import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec

from dmdata.errors import DmdataError, IntegrityError, SourceError
from dmdata.prices import readable_bytes
from dmdata.selection import AxisRequest, Selection

DEFAULT_MEMORY_BYTES = 512 << 20
"""Bound on the memory of a copy, apart from what Python and its libraries take."""

JOURNAL = "dmdata_mirror"
"""Attribute of the mirrored array that says what it is a copy of, and which blocks are complete."""

_CHUNK_BYTES = 4 << 20
_MOST_CHUNK_ROWS = 4096
_BLOCKS_IN_MEMORY = 4


class Readable(Protocol):
    """What can be copied or wrapped: a named array of known shape that reads selections."""

    @property
    def name(self) -> str:
        """What it is called in errors and journals."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of an element."""

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the dimensions."""

    @property
    def identity(self) -> str:
        """What changes when the source does."""

    def read(self, selection: Selection, *, progress: Callable[[int], object] | None = None) -> npt.NDArray[Any]:
        """Read a selection."""

    def require_budget(self, selection: Selection) -> None:
        """Raise `BudgetError` if a selection cannot be read under the budget."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a copy is: rows complete of all rows, with those complete before it began."""

    n_rows: int
    n_rows_total: int


def mirror(
    source: Readable,
    destination: Path,
    *,
    selection: Selection,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    progress: Callable[[Progress], object] | None = None,
) -> zarr.Array[Any]:
    """Copy an array, or a product of some of its rows and columns, into a Zarr array.

    Parameters
    ----------
    source : Readable
    destination : Path
        Directory of the Zarr array; where an unfinished copy of the same is there, it is gone on with.
    selection : Selection
        Of the source's shape; every axis kept.
    memory_bytes : int
        Bound on the memory of a copy; decides the rows of a block.
    progress : callable, optional
        Called after each block.

    Returns
    -------
    copy : zarr.Array
        Complete.

    Raises
    ------
    IntegrityError
        If the destination holds the copy of an object that has changed since.
    DmdataError
        If the destination holds something else, or another process is copying to it.
    BudgetError, AccessError, SourceError
        From the source; blocks complete by then stay.
    """
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{destination}.lock", timeout=0):
            copy = _open_or_create(source, destination, selection, memory_bytes)
            _copy_missing_blocks(source, copy, selection, progress)
        Path(f"{destination}.lock").unlink(missing_ok=True)
    except filelock.Timeout as error:
        raise DmdataError(
            f"another process is copying to {destination}; wait for it, or choose another destination"
        ) from error
    except OSError as error:
        if isinstance(error, DmdataError):
            raise
        raise SourceError(
            f"{destination} cannot be written: {error}; blocks complete so far stay, run the same again to go on"
        ) from error
    return copy


def block_digest(block: npt.NDArray[Any]) -> str:
    """Compute the SHA-256 of a block's elements in C order, as hexadecimal text."""
    return hashlib.sha256(np.ascontiguousarray(block).data).hexdigest()


def _copy_missing_blocks(
    source: Readable, copy: zarr.Array[Any], selection: Selection, progress: Callable[[Progress], object] | None
) -> None:
    journal: dict[str, Any] = dict(copy.attrs[JOURNAL])  # type: ignore[arg-type] # attributes are any JSON
    digests = dict(journal["digests"])
    blocks = list(_blocks(copy.shape[0], journal["block_rows"]))
    missing = [np.arange(start, stop) for nth, start, stop in blocks if str(nth) not in digests]
    if missing:
        source.require_budget(_of_rows(selection, np.asarray(selection.axes[0])[np.concatenate(missing)]))
    for nth, start, stop in blocks:
        if str(nth) not in digests:
            block = source.read(_of_rows(selection, selection.axes[0][start:stop]))
            copy[start:stop] = block
            digests[str(nth)] = block_digest(block)
            copy.attrs[JOURNAL] = journal | {"digests": digests}
        if progress:
            progress(Progress(stop, copy.shape[0]))


def _of_rows(selection: Selection, rows: AxisRequest) -> Selection:
    return Selection(selection.array_shape, (rows, *selection.axes[1:]), selection.kept)


def _blocks(n_rows: int, block_rows: int) -> Iterator[tuple[int, int, int]]:
    for nth, start in enumerate(range(0, n_rows, block_rows)):
        yield nth, start, min(start + block_rows, n_rows)


def _open_or_create(source: Readable, destination: Path, selection: Selection, memory_bytes: int) -> zarr.Array[Any]:
    about = {"artifact": source.name, "object": source.identity, "selection": _selection_digest(selection)}
    if (destination / "zarr.json").exists():
        return _reopen(destination, about)
    if destination.exists() and any(destination.iterdir()):
        raise DmdataError(f"{destination} is not empty and no mirror; choose another destination")
    shape = selection.product_shape
    row_bytes = math.prod(shape[1:]) * source.dtype.itemsize
    block_rows = _power_of_two_below(memory_bytes // max(_BLOCKS_IN_MEMORY * row_bytes, 1), most=_MOST_CHUNK_ROWS)
    if row_bytes * _BLOCKS_IN_MEMORY > memory_bytes:
        raise DmdataError(
            f"one row of {source.name} has {readable_bytes(row_bytes)}, too much for {readable_bytes(memory_bytes)} of "
            f"memory; allow at least {readable_bytes(_BLOCKS_IN_MEMORY * row_bytes)}"
        )
    inner = math.prod(shape[2:]) * source.dtype.itemsize
    n_columns = max(_CHUNK_BYTES // max(block_rows * inner, 1), 1)
    return zarr.create_array(
        destination,
        shape=shape,
        dtype=source.dtype,
        chunks=_chunks(shape, block_rows, n_columns),
        compressors=BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle", typesize=source.dtype.itemsize),
        dimension_names=source.dims,
        attributes={JOURNAL: about | {"block_rows": block_rows, "digests": {}}},
    )


def _chunks(shape: tuple[int, ...], rows: int, columns: int) -> tuple[int, ...]:
    wanted = (rows, columns, *shape[2:])[: len(shape)]
    return tuple(max(min(chunk, size), 1) for chunk, size in zip(wanted, shape, strict=True))


def _reopen(destination: Path, about: dict[str, str]) -> zarr.Array[Any]:
    opened = zarr.open(destination, mode="r+")
    journal = opened.attrs.get(JOURNAL)
    if not isinstance(opened, zarr.Array) or not isinstance(journal, dict):
        raise DmdataError(f"{destination} is a Zarr store but no mirror; choose another destination")
    if journal["artifact"] != about["artifact"] or journal["selection"] != about["selection"]:
        raise DmdataError(
            f"{destination} is a mirror of {journal['artifact']} with other rows or columns; choose another destination"
        )
    if journal["object"] != about["object"]:
        raise IntegrityError(
            f"{about['artifact']} has changed since the mirror {destination} was begun, so their blocks do not fit; "
            "mirror it to another destination",
            url=about["artifact"],
        )
    return opened


def _selection_digest(selection: Selection) -> str:
    """Name a selection by what it selects, so that a copy is gone on with only by the same."""
    digest = hashlib.sha256()
    for axis in selection.axes:
        digest.update(_written(axis))
    return digest.hexdigest()


def _written(axis: AxisRequest) -> bytes:
    if isinstance(axis, range):
        return f"{axis.start}:{axis.stop}:{axis.step};".encode()
    return b"[" + axis.astype("<i8").tobytes() + b"]"


def _power_of_two_below(limit: int, *, most: int) -> int:
    return 1 << (max(min(limit, most), 1).bit_length() - 1)
