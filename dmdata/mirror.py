"""Copy an array into a chunked Zarr store, block by block, so that it can be stopped and resumed.

Chunks are good for a block of rows and for a column alike. A block is a slab across the axis along which the source's
bytes lie, rows for an array in C order; it is read once, written as whole chunks, and only then entered, with its
digest, into the journal in the array's own attributes; so whatever kills the copy, what was entered is complete and is
never fetched again. Peak memory is a few blocks and the ranges in flight, whatever the number of rows. The mirror is
plain Zarr v3 in Blosc zstd with bitshuffle: any reader opens it.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec

from dmdata.errors import DmdataError, IntegrityError
from dmdata.ledger import Ledger, home
from dmdata.locks import only_process_at
from dmdata.prices import readable_bytes
from dmdata.selection import AxisRequest, Selection

DEFAULT_MEMORY_BYTES = 512 << 20
"""Bound on the memory of a copy, apart from up to 128 MiB in flight and what Python and its libraries take."""

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

    @property
    def slowest_axis(self) -> int:
        """The axis along which its bytes lie in slabs: 0 in C order."""

    def read(self, selection: Selection, *, progress: Callable[[int], object] | None = None) -> npt.NDArray[Any]:
        """Read a selection."""

    def price_usd(self, selections: Iterable[Selection]) -> float:
        """Price several reads together, upper bound; 0 where reading is free."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a copy is: rows complete of all rows, with those complete before it began.

    Rows are slabs across the source's slowest axis: columns, for a source in Fortran order.
    """

    n_rows: int
    n_rows_total: int


@dataclass(frozen=True, slots=True)
class Block:
    """A slab of a copy: `start:stop` along the blocks' axis, and what it is of the source."""

    nth: int
    start: int
    stop: int
    selection: Selection


def mirror(
    source: Readable,
    destination: Path,
    *,
    selection: Selection,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    progress: Callable[[Progress], object] | None = None,
) -> zarr.Array[Any]:
    """Copy an array, or a product of its axes, into a Zarr array.

    Parameters
    ----------
    source : Readable
    destination : Path
        Directory of the Zarr array; where an unfinished copy of the same is there, it is gone on with.
    selection : Selection
        Of the source's shape. Every axis stays one: a number selects a slab of one.
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
    BudgetError
        If a budget would not let it end; before any data.
    IntegrityError
        If the destination holds the copy of an object that has changed since.
    DmdataError
        If the destination holds something else, cannot be written, or another process is copying to it.
    AccessError, SourceError
        From the source; blocks complete by then stay.
    """
    selection = replace(selection, kept=tuple(range(len(selection.axes))))
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with only_process_at(destination):
            copy = _open_or_create(source, destination, selection, memory_bytes)
            _copy_missing_blocks(source, copy, selection, progress)
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, DmdataError):
            raise
        raise DmdataError(
            f"{destination} cannot be written: {error}; blocks complete so far stay, run the same again to go on"
        ) from error
    return copy


def missing_blocks(
    destination: Path, selection: Selection, *, name: str, itemsize: int, axis: int, memory_bytes: int
) -> list[Block]:
    """List the blocks that a copy still needs: all of them where there is none yet. Touches no network.

    Parameters
    ----------
    destination : Path
    selection : Selection
    name : str
        Of the source.
    itemsize : int
        Bytes of an element.
    axis : int
        The source's slowest axis.
    memory_bytes : int
    """
    selection = replace(selection, kept=tuple(range(len(selection.axes))))
    try:
        journal = dict(zarr.open_array(destination, mode="r").attrs[JOURNAL])  # type: ignore[arg-type] # any JSON
        if journal["artifact"] == name and journal["selection"] == _selection_digest(selection):
            return _missing(selection, journal)
    except (OSError, KeyError, ValueError, TypeError):
        pass  # nothing there, or something else, which the copy itself will refuse
    n_rows = _rows_of_a_block(selection.product_shape, axis, itemsize, memory_bytes)
    return _missing(selection, {"axis": axis, "block_rows": n_rows, "digests": {}})


def block_digest(block: npt.NDArray[Any]) -> str:
    """Compute the SHA-256 of a block's elements in C order, as hexadecimal text."""
    return hashlib.sha256(np.ascontiguousarray(block).data).hexdigest()


def _copy_missing_blocks(
    source: Readable, copy: zarr.Array[Any], selection: Selection, progress: Callable[[Progress], object] | None
) -> None:
    journal: dict[str, Any] = dict(copy.attrs[JOURNAL])  # type: ignore[arg-type] # attributes are any JSON
    digests = dict(journal["digests"])
    missing = _missing(selection, journal)
    usd = source.price_usd(block.selection for block in missing)
    if usd:
        Ledger(home()).check(usd=usd, artifact=source.name)
    n_rows, n_done = copy.shape[journal["axis"]], copy.shape[journal["axis"]] - sum(b.stop - b.start for b in missing)
    before: tuple[slice, ...] = (slice(None),) * journal["axis"]
    for block in missing:
        data = source.read(block.selection)
        copy[(*before, slice(block.start, block.stop))] = data
        digests[str(block.nth)] = block_digest(data)
        copy.attrs[JOURNAL] = journal | {"digests": digests}
        n_done += block.stop - block.start
        if progress:
            progress(Progress(n_done, n_rows))


def _missing(selection: Selection, journal: dict[str, Any]) -> list[Block]:
    axis, block_rows, digests = journal["axis"], journal["block_rows"], journal["digests"]
    n_rows = len(selection.axes[axis])
    blocks = []
    for nth, start in enumerate(range(0, n_rows, block_rows)):
        if str(nth) not in digests:
            stop = min(start + block_rows, n_rows)
            axes = (*selection.axes[:axis], selection.axes[axis][start:stop], *selection.axes[axis + 1 :])
            blocks.append(Block(nth, start, stop, replace(selection, axes=axes)))
    return blocks


def _open_or_create(source: Readable, destination: Path, selection: Selection, memory_bytes: int) -> zarr.Array[Any]:
    about = {"artifact": source.name, "object": source.identity, "selection": _selection_digest(selection)}
    if (destination / "zarr.json").exists():
        return _reopen(destination, about)
    if destination.exists() and any(destination.iterdir()):
        raise DmdataError(f"{destination} is not empty and no mirror; choose another destination")
    shape, itemsize, axis = selection.product_shape, source.dtype.itemsize, source.slowest_axis
    block_rows = _rows_of_a_block(shape, axis, itemsize, memory_bytes)
    row_bytes = _row_bytes(shape, axis, itemsize)
    if row_bytes * _BLOCKS_IN_MEMORY > memory_bytes:
        raise DmdataError(
            f"one row of {source.name} has {readable_bytes(row_bytes)}, too much for {readable_bytes(memory_bytes)} of "
            f"memory; allow at least {readable_bytes(_BLOCKS_IN_MEMORY * row_bytes)}"
        )
    return zarr.create_array(
        destination,
        shape=shape,
        dtype=source.dtype,
        chunks=_chunks(shape, axis, block_rows, itemsize),
        compressors=BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle", typesize=itemsize),
        dimension_names=source.dims,
        attributes={JOURNAL: about | {"axis": axis, "block_rows": block_rows, "digests": {}}},
    )


def _row_bytes(shape: tuple[int, ...], axis: int, itemsize: int) -> int:
    return math.prod(size for other, size in enumerate(shape) if other != axis) * itemsize


def _rows_of_a_block(shape: tuple[int, ...], axis: int, itemsize: int, memory_bytes: int) -> int:
    row_bytes = max(_row_bytes(shape, axis, itemsize), 1)
    return _power_of_two_below(memory_bytes // (_BLOCKS_IN_MEMORY * row_bytes), most=_MOST_CHUNK_ROWS)


def _chunks(shape: tuple[int, ...], axis: int, block_rows: int, itemsize: int) -> tuple[int, ...]:
    """Cut blocks into chunks along one more axis, so that a column need not be read with all others."""
    chunks = list(shape)
    chunks[axis] = block_rows
    across = next((other for other in range(len(shape)) if other != axis), None)
    if across is not None:
        chunks[across] = 1
        chunks[across] = _CHUNK_BYTES // max(math.prod(chunks) * itemsize, 1)
    return tuple(max(min(chunk, size), 1) for chunk, size in zip(chunks, shape, strict=True))


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
