"""What a mirror is a copy of, and which of its blocks are complete: written into the mirror itself, after the data.

Facts that never change are an attribute of the mirrored array. The digests of its blocks are a small Zarr array inside
it, zero where a block is missing; one chunk of them is replaced as a whole after each block, so that a mirror of any
number of blocks costs the same for each. Row or column numbers that are not a plain range are Zarr arrays next to them.
"""

import asyncio
import hashlib
import itertools
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
from numcodecs.blosc import Blosc
from zarr.abc.store import Store
from zarr.codecs import BloscCodec
from zarr.core.array import Array
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from dmdata.catalog.roles import ModelRows
from dmdata.copying.place import LEASE, SPOOL, Place
from dmdata.errors import DmdataError, FormatError, IntegrityError
from dmdata.layout.formats import NPY_PREFIX_BYTES, Layout, contiguous_strides
from dmdata.layout.selection import AxisRequest, Selection
from dmdata.money.prices import readable_bytes

JOURNAL = "dmdata_mirror"
"""Attribute of the mirrored array that says what it is a copy of."""

DIGESTS = "block_digests"
"""Name, inside the mirrored array, of the array of its blocks' digests: SHA-256, 32 bytes a block, zero if missing."""

_INDICES = "indices_"
_VERSION = 2
_DIGEST_BYTES = 32
_DIGESTS_A_CHUNK = 256
_CHUNK_BYTES = 4 << 20
_MOST_CHUNK_ROWS = 4096
# half a chunk: with 512 KiB masks of 10% take a sixth longer and margins a third; Blosc's own choice is far smaller
_COMPRESSED_AT_ONCE_BYTES = 2 << 20
_SHUFFLES = {"noshuffle": Blosc.NOSHUFFLE, "shuffle": Blosc.SHUFFLE, "bitshuffle": Blosc.BITSHUFFLE}
_BLOCKS_IN_MEMORY = 4
_CHUNKS_AT_ONCE = 16
_UPLOADS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Block:
    """A slab of a copy: `start:stop` along the blocks' axis, and what it is of the source."""

    nth: int
    start: int
    stop: int
    selection: Selection


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a selection is cut into blocks across one axis.

    Attributes
    ----------
    selection : Selection
        Of the source; keeps every axis.
    axis : int
        The source's slowest axis.
    rows : int
        Of a block, along that axis; the last block may have fewer.
    """

    selection: Selection
    axis: int
    rows: int

    @classmethod
    def cut(cls, selection: Selection, *, axis: int, itemsize: int, memory_bytes: int) -> "Blocks":
        """Choose the rows of a block by memory."""
        selection = replace(selection, kept=tuple(range(len(selection.axes))))
        row_bytes = max(_row_bytes(selection, axis, itemsize), 1)
        rows, most = memory_bytes // (_BLOCKS_IN_MEMORY * row_bytes), _most_chunk_rows(row_bytes)
        return cls(selection, axis, rows // most * most if rows > most else _power_of_two_below(rows))

    @property
    def n_rows(self) -> int:
        """Rows of the copy along the blocks' axis."""
        return len(self.selection.axes[self.axis]) if self.selection.axes else 1

    def __len__(self) -> int:
        return -(-self.n_rows // self.rows)

    def __getitem__(self, nth: int) -> Block:
        if not self.selection.axes:
            return Block(nth, 0, 1, self.selection)
        start = nth * self.rows
        stop = min(start + self.rows, self.n_rows)
        return Block(nth, start, stop, self.part(start, stop))

    def part(self, start: int, stop: int) -> Selection:
        """Select some rows of the copy from the source."""
        axes, axis = self.selection.axes, self.axis
        return replace(self.selection, axes=(*axes[:axis], axes[axis][start:stop], *axes[axis + 1 :]))

    def region(self, start: int, stop: int) -> tuple[slice, ...]:
        """State where rows are in the copy."""
        return (*(slice(None),) * self.axis, slice(start, stop)) if self.selection.axes else ()

    def chunks(self, itemsize: int) -> tuple[int, ...]:
        """Cut blocks into chunks along one more axis, so that a column need not be read with all others."""
        shape = self.selection.product_shape
        if not shape:
            return ()
        chunks = list(shape)
        row_bytes = _row_bytes(self.selection, self.axis, itemsize)
        chunks[self.axis] = min(self.rows, _most_chunk_rows(row_bytes))
        across = next((other for other in range(len(shape)) if other != self.axis), None)
        if across is not None:
            chunks[across] = 1
            chunks[across] = _CHUNK_BYTES // max(math.prod(chunks) * itemsize, 1)
        return tuple(max(min(chunk, size), 1) for chunk, size in zip(chunks, shape, strict=True))

    def require_memory(self, name: str, *, itemsize: int, memory_bytes: int) -> None:
        """Refuse rows that are too long for the memory.

        Raises
        ------
        DmdataError
        """
        row_bytes = _row_bytes(self.selection, self.axis, itemsize)
        if row_bytes * _BLOCKS_IN_MEMORY > memory_bytes:
            raise DmdataError(
                f"one row of {name} has {readable_bytes(row_bytes)}, too much for {readable_bytes(memory_bytes)} of "
                f"memory; allow at least {readable_bytes(_BLOCKS_IN_MEMORY * row_bytes)}"
            )


@dataclass(frozen=True, slots=True)
class Original:
    """What a mirror is a copy of.

    Attributes
    ----------
    artifact : str
        Name, or address it was opened by.
    identity : str
        What changes when the object does: its address and etag.
    shape : tuple of int
    dtype : str
    """

    artifact: str
    identity: str
    shape: tuple[int, ...]
    dtype: str


class Journal:
    """A mirror as it is stored, and which blocks of it are complete. One process writes it.

    Attributes
    ----------
    place : Place
    original : Original
    blocks : Blocks
    digests : uint8 array, shape (n_blocks, 32)
        Zero where a block is missing.
    """

    def __init__(self, place: Place, original: Original, blocks: Blocks, digests: npt.NDArray[np.uint8]) -> None:
        self.place, self.original, self.blocks, self.digests = place, original, blocks, digests
        self._stored_digests: Array[Any] | None = None

    @classmethod
    def create(
        cls,
        place: Place,
        original: Original,
        blocks: Blocks,
        *,
        dims: tuple[str, ...],
        dtype: np.dtype[Any],
        rows: ModelRows | None = None,
    ) -> "Journal":
        """Make an empty mirror: its own ``zarr.json`` comes last, so that it is one or is none.

        What the source's rows are for is kept with it, as far as it is true of the rows that are copied.

        Raises
        ------
        DmdataError
            If something else is there.
        """
        if names := _foreign(place.names()):
            raise DmdataError(
                f"{place} is not empty and is not a mirror (it holds {sorted(names)[0]}); choose another destination"
            )
        facts: dict[str, Any] = {"version": _VERSION, "artifact": original.artifact, "object": original.identity}
        facts |= {"shape": original.shape, "dtype": original.dtype, "selection": blocks.selection.digest}
        facts |= {"axis": blocks.axis, "block_rows": blocks.rows, "digest": "sha256", "axes": []}
        first = blocks.selection.axes[0] if blocks.selection.axes else None
        if rows is not None and isinstance(first, range) and (copied := rows.within(first)) is not None:
            facts["rows"] = copied.as_dict()
        for axis, indices in enumerate(blocks.selection.axes):
            if isinstance(indices, range):
                facts["axes"].append([indices.start, indices.stop, indices.step])
            else:
                facts["axes"].append(f"{_INDICES}{axis}")
                zarr.create_array((place / f"{_INDICES}{axis}").store(), data=indices, overwrite=True)
        # by stores of their own: below a name Zarr would make a group of the mirror
        zarr.create_array(
            (place / DIGESTS).store(),
            shape=(len(blocks), _DIGEST_BYTES),
            dtype="uint8",
            chunks=(_DIGESTS_A_CHUNK, _DIGEST_BYTES),
            compressors=None,
            fill_value=0,
            dimension_names=("block", "byte"),
            overwrite=True,
        )
        # planes of bits say most of what is to be said of masks, and nothing of floating-point numbers
        shuffle: Literal["bitshuffle", "shuffle"] = "bitshuffle" if dtype.kind == "b" else "shuffle"
        zarr.create_array(
            place.store(),
            shape=blocks.selection.product_shape,
            dtype=dtype,
            chunks=blocks.chunks(dtype.itemsize),
            compressors=BloscCodec(
                cname="zstd", clevel=1, shuffle=shuffle, typesize=dtype.itemsize, blocksize=_COMPRESSED_AT_ONCE_BYTES
            ),
            dimension_names=dims,
            attributes={JOURNAL: facts},
        )
        return cls(place, original, blocks, np.zeros((len(blocks), _DIGEST_BYTES), np.uint8))

    @classmethod
    def load(cls, place: Place) -> "Journal":
        """Read the journal of a mirror.

        Raises
        ------
        FormatError
            If no mirror is there, or its journal is damaged.
        """
        array = open_copy(place, "r")
        facts = array.attrs.get(JOURNAL)
        try:
            if not isinstance(facts, dict) or facts["version"] != _VERSION:
                raise ValueError("it is of another form")
            original = Original(
                str(facts["artifact"]), str(facts["object"]), _numbers(facts["shape"]), str(np.dtype(facts["dtype"]))
            )
            axes = tuple(_indices(place, axis, n) for axis, n in zip(facts["axes"], array.shape, strict=True))
            selection = Selection(original.shape, axes, tuple(range(len(axes))))
            blocks = Blocks(selection, *_numbers([facts["axis"], facts["block_rows"]]))
            fits = blocks.rows >= 1 and (0 <= blocks.axis < max(len(axes), 1)) and _within(axes, original.shape)
            if not fits or selection.digest != facts["selection"] or selection.product_shape != array.shape:
                raise ValueError("its parts do not fit together")
            digests = _numbers_stored(place / DIGESTS, (len(blocks), _DIGEST_BYTES), np.uint8)
        except (LookupError, ValueError, TypeError, OSError, RuntimeError, ArithmeticError, AttributeError) as error:
            raise FormatError(
                f"{place} is a Zarr array, but its journal of a mirror is missing or damaged ({error}); choose "
                "another destination, or remove it and mirror again",
                url=place.url,
            ) from error
        return cls(place, original, blocks, digests)

    def claimed_layout(self) -> Layout:
        """Lay the source out as the mirror says it was, in an object of its own: what reading it is priced by."""
        shape, dtype = self.original.shape, np.dtype(self.original.dtype)
        strides = contiguous_strides(shape, dtype.itemsize)
        if self.blocks.axis:
            strides = contiguous_strides(shape[::-1], dtype.itemsize)[::-1]
        return Layout(shape, dtype, NPY_PREFIX_BYTES, strides)

    @property
    def is_complete(self) -> bool:
        """Whether no block is missing."""
        return bool(self.digests.any(axis=1).all())

    @property
    def is_whole(self) -> bool:
        """Whether it is to be all of its source, in its order."""
        return all(map(self.blocks.selection.keeps_all_of, range(len(self.original.shape))))

    @property
    def n_rows_complete(self) -> int:
        """Rows of complete blocks."""
        complete = np.flatnonzero(self.digests.any(axis=1))
        n_rows = len(complete) * self.blocks.rows
        if len(complete) and complete[-1] == len(self.blocks) - 1:
            n_rows -= len(self.blocks) * self.blocks.rows - self.blocks.n_rows
        return n_rows

    def missing(self) -> Iterator[Block]:
        """List the blocks that are not complete."""
        for nth in np.flatnonzero(~self.digests.any(axis=1)).tolist():
            yield self.blocks[nth]

    def record(self, nth: int, digest: bytes) -> None:
        """Enter a block, after its data; an empty digest takes it out again."""
        if self._stored_digests is None:
            self._stored_digests = zarr.open_array((self.place / DIGESTS).store(), mode="r+")
        self.digests[nth] = np.frombuffer(digest or bytes(_DIGEST_BYTES), np.uint8)
        first = nth // _DIGESTS_A_CHUNK * _DIGESTS_A_CHUNK
        chunk = slice(first, first + _DIGESTS_A_CHUNK)
        self._stored_digests[chunk] = self.digests[chunk]

    def require_same(self, original: Original, selection: Selection) -> None:
        """Refuse to resume the mirror of something else.

        Raises
        ------
        DmdataError
            If it is of another artifact, or of other rows or columns.
        IntegrityError
            If the object has changed since.
        """
        own = self.original
        if own.artifact != original.artifact or self.blocks.selection.digest != selection.digest:
            raise DmdataError(
                f"{self.place} is a mirror of {own.artifact} with other rows or columns; choose another destination"
            )
        if own != original:
            raise IntegrityError(
                f"{original.artifact} has changed since the mirror {self.place} was begun, so their blocks do not "
                "fit; mirror it to another destination",
                url=original.artifact,
            )


class BlockWriter:
    """Writes blocks of a mirror, and returns the digest that identifies each afterwards: that of its chunks as stored.

    Chunks are digested on their way to the store: an eighth of the bytes, for masks, and a verification
    need not decode them.
    """

    def __init__(self, place: Place) -> None:
        self._store = place.store()
        self._array = _open(self._store, place, "r+")
        self._compressor = _compressor(self._array, place)
        n_threads = _UPLOADS_AT_ONCE if place.is_s3 else 1 + (os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(n_threads, thread_name_prefix="dmdata-chunks")

    def write(self, region: tuple[slice, ...], block: npt.NDArray[Any]) -> bytes:
        """Write a block, which is whole chunks; return its digest."""
        whole = [part.indices(size)[:2] for part, size in zip(region, self._array.shape, strict=False)]
        offsets = [start for start, _ in whole] + [0] * (self._array.ndim - len(region))
        dtype = self._array.dtype.newbyteorder("<")

        def write_chunk(chunk: tuple[slice, ...]) -> tuple[str, bytes]:
            inside = zip(chunk, offsets, strict=True)
            part = block[tuple(slice(part.start - start, part.stop - start) for part, start in inside)]
            if part.shape == self._array.chunks:
                values = np.ascontiguousarray(part, dtype)
            else:  # at the edge of the array: stored whole
                values = np.zeros(self._array.chunks, dtype)
                values[tuple(map(slice, part.shape))] = part
            stored = self._compressor.encode(values)
            key = _chunk_key(self._array, chunk)
            # zeros as well: a chunk that is gone is not mistaken for one
            sync(self._store.set(key, default_buffer_prototype().buffer.from_bytes(stored)))
            return key, hashlib.sha256(stored).digest()

        # a few at a time: each thread holds one chunk, and it compressed
        return _together(dict(self._threads.map(write_chunk, _chunk_regions(self._array, region))))

    def end(self) -> None:
        """Release the threads."""
        self._threads.shutdown()


def stored_digest(copy: zarr.Array[Any], place: Place, region: tuple[slice, ...]) -> bytes:
    """Digest a block as it is stored now; see `BlockWriter`. A chunk that is gone counts as empty."""
    store = place.store(read_only=True)
    keys = [_chunk_key(copy, chunk) for chunk in _chunk_regions(copy, region)]

    async def digest(key: str) -> tuple[str, bytes]:
        stored = await store.get(key, default_buffer_prototype())
        return key, hashlib.sha256(stored.as_buffer_like() if stored else b"").digest()

    async def all_of_them() -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for first in range(0, len(keys), _CHUNKS_AT_ONCE):
            found.update(await asyncio.gather(*map(digest, keys[first : first + _CHUNKS_AT_ONCE])))
        return found

    return _together(sync(all_of_them()))


def _compressor(array: zarr.Array[Any], place: Place) -> Blosc:
    """Make what compresses a chunk as Zarr would: by itself it keeps one core busy, with all of these threads."""
    codecs: list[Any] = [codec.to_dict() for codec in array.metadata.codecs]  # type: ignore[union-attr] # version 3
    if [codec["name"] for codec in codecs] != ["bytes", "blosc"]:
        raise FormatError(f"{place} is not stored as a mirror is; choose another destination", url=place.url)
    facts = codecs[1]["configuration"]
    return Blosc(facts["cname"], facts["clevel"], _SHUFFLES[facts["shuffle"]], facts["blocksize"])


def _together(digests: dict[str, bytes]) -> bytes:
    return hashlib.sha256(b"".join(digest for _, digest in sorted(digests.items()))).digest()


def _chunk_key(copy: zarr.Array[Any], chunk: tuple[slice, ...]) -> str:
    metadata: Any = copy.metadata
    key: str = metadata.encode_chunk_key(
        tuple(part.start // size for part, size in zip(chunk, copy.chunks, strict=True))
    )
    return key


def _chunk_regions(copy: zarr.Array[Any], region: tuple[slice, ...]) -> list[tuple[slice, ...]]:
    """List where the chunks of a block lie; the block is whole chunks, but for the last along an axis."""
    cuts = []
    slices = (*region, *(slice(None),) * (copy.ndim - len(region)))
    for part, size, chunk in zip(slices, copy.shape, copy.chunks, strict=True):
        start, stop, _ = part.indices(size)
        cuts.append([slice(at, min(at + chunk, stop)) for at in range(start, stop, chunk)])
    return list(itertools.product(*cuts))


def has_mirror(place: Place) -> bool:
    """Whether a Zarr node is in a place, which may be a mirror to resume."""
    return "zarr.json" in place.names()


def open_copy(place: Place, mode: Any) -> zarr.Array[Any]:
    """Open a mirrored array.

    Raises
    ------
    DmdataError
        If none is there.
    """
    return _open(place.store(read_only=mode == "r"), place, mode)


def _open(store: Store, place: Place, mode: Any) -> zarr.Array[Any]:
    try:
        opened = zarr.open(store, mode=mode)
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, zarr.errors.BaseZarrError) as error:
        raise FormatError(f"{place} holds no readable Zarr array ({error})", url=place.url) from error
    if not isinstance(opened, zarr.Array) or JOURNAL not in opened.attrs:
        raise DmdataError(f"{place} is a Zarr store but not a mirror; choose another destination")
    return opened


def _row_bytes(selection: Selection, axis: int, itemsize: int) -> int:
    return math.prod(size for other, size in enumerate(selection.product_shape) if other != axis) * itemsize


def _most_chunk_rows(row_bytes: int) -> int:
    """Bound the rows of a chunk, more loosely where rows are short."""
    return max(_MOST_CHUNK_ROWS, _power_of_two_below(_CHUNK_BYTES // max(row_bytes, 1)))


def _power_of_two_below(limit: int) -> int:
    return 1 << (max(limit, 1).bit_length() - 1)


def _foreign(names: set[str]) -> set[str]:
    """Leave out what a creation leaves that was killed before its end."""
    return {name for name in names if name not in (DIGESTS, SPOOL, LEASE) and not name.startswith(_INDICES)}


def _indices(place: Place, axis: Any, n_indices: int) -> AxisRequest:
    if isinstance(axis, str) and axis.startswith(_INDICES):
        return _numbers_stored(place / axis, (n_indices,), np.int64)
    start, stop, step = _numbers(axis)
    return range(start, stop, step)


def _numbers_stored(place: Place, shape: tuple[int, ...], dtype: type[Any]) -> npt.NDArray[Any]:
    """Read an array of a journal, if it is as large as it should be."""
    stored = zarr.open_array(place.store(read_only=True), mode="r")
    if stored.shape != shape or stored.dtype != dtype:
        raise ValueError(f"{place} has shape {stored.shape} and dtype {stored.dtype}, not {shape}")
    return np.asarray(stored[...])


def _within(axes: tuple[AxisRequest, ...], shape: tuple[int, ...]) -> bool:
    if len(axes) != len(shape):
        return False
    for axis, size in zip(axes, shape, strict=True):
        ends = np.asarray(axis[:: max(len(axis) - 1, 1)] if isinstance(axis, range) else axis)
        if ((ends < 0) | (ends >= size)).any():
            return False
    return True


def _numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or not all(type(value) is int for value in values):
        raise ValueError(f"{values!r} are not whole numbers")
    return tuple(values)
