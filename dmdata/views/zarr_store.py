"""A lazy array as a read-only Zarr v3 store, for code that only reads Zarr.

Nothing is copied or converted: a chunk is a range of the object as it lies, and what Zarr wants around it (metadata,
the padding of the last chunk, the index of a shard) is made up on the spot and costs nothing. Two forms:

- *blocks*: uncompressed chunks of whole rows. One chunk is one request, and is read whole for any part of it.
- *rows*: the same blocks as shards, whose inner chunks are single rows. The index that a reader asks for says where in
  the object each row is, so that unmodified Zarr reads the bytes of exactly the rows it needs.

Every byte goes through the array's own `read`, under its budget. A chunk that cannot be had raises; it is never
answered with None, which Zarr would read as zeros. Rows are slabs across the slowest axis: for an array in Fortran
order columns, put right by a ``transpose`` codec.
"""

import asyncio
import atexit
import contextlib
import functools
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.sync import sync

from dmdata.copying.mirror import Readable, require_zarr_dtype
from dmdata.errors import BudgetError, DmdataError, FormatError, ObjectMissingError, SourceError
from dmdata.layout.formats import Layout
from dmdata.layout.selection import select

Form: TypeAlias = Literal["blocks", "rows"]
Octets: TypeAlias = npt.NDArray[np.uint8]

_BLOCK_BYTES: dict[Form, int] = {"blocks": 16 << 20, "rows": 1 << 20}
"""A block is one request; a shard is small because zarr-python 3.1 reads the rows of one shard one after the other."""

_LEAST_CHUNK_BYTES = 4096
"""A request costs about as much as this many bytes to the internet: shorter rows share an inner chunk."""

_MISSING = 2**64 - 1
"""In a shard's index: no such inner chunk."""

_SECONDS_TO_END = 2.0

_METADATA_KEY = "zarr.json"


class Stored(Readable, Protocol):
    """A named array whose bytes can be read as they are stored."""

    @property
    def url(self) -> str:
        """Where the elements are, without secrets."""

    @property
    def layout(self) -> Layout:
        """Where the elements lie in their object."""

    def slabs(self, n_bytes: int) -> Readable:
        """Its bytes in storage order, uint8 of shape (n, n_bytes); what is left at the end is not in it."""


def read_ranges(array: Stored, ranges: Sequence[tuple[int, int]]) -> list[Octets]:
    """Read byte ranges of an array's elements as they are stored, all in one planned and priced read.

    Parameters
    ----------
    array : LazyArray
        Of elements in one object.
    ranges : sequence of (start, stop)
        Half-open, counted from the first element, within the array.

    Returns
    -------
    pieces : list of uint8 arrays
        One a range.

    Raises
    ------
    BudgetError, IntegrityError, AccessError, ObjectMissingError, SourceError
    """
    wanted = [(start, stop) for start, stop in ranges if stop > start]
    # the longest unit of which all ranges are whole numbers: the bytes of a row, where rows are read
    unit = math.gcd(*(bound for pair in wanted for bound in pair))
    if not unit:
        return [np.empty(0, np.uint8) for _ in ranges]
    slabs = array.slabs(unit)
    if len(wanted) == 1:
        key: Any = slice(wanted[0][0] // unit, wanted[0][1] // unit)
    else:
        key = np.concatenate([np.arange(start // unit, stop // unit) for start, stop in wanted])
    read = np.ascontiguousarray(slabs.read(select(key, slabs.shape, orthogonal=True))).reshape(-1)
    lengths = [max(stop - start, 0) for start, stop in ranges]
    return np.split(read, np.cumsum(lengths)[:-1])


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """The value of one key: bytes of an array as it is stored, then a tail that is in no object.

    Attributes
    ----------
    array : LazyArray or None
        None where all of it is tail.
    start, stop : int
        Half-open, counted from the first element.
    tail : bytes
    """

    array: Stored | None
    start: int
    stop: int
    tail: bytes = b""

    @property
    def n_bytes(self) -> int:
        """Size of the value."""
        return self.stop - self.start + len(self.tail)

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[Octets]:
        """Read half-open ranges of the value, within it.

        Raises
        ------
        SourceError
            Also where the object is gone: readers of Zarr take a missing file for a chunk of zeros.
        BudgetError, IntegrityError, AccessError
        """
        n_stored = self.stop - self.start
        if self.array is None:
            stored = [np.empty(0, np.uint8)] * len(ranges)
        else:
            inside = [(min(start, n_stored), min(stop, n_stored)) for start, stop in ranges]
            try:
                stored = read_ranges(self.array, [(self.start + start, self.start + stop) for start, stop in inside])
            except ObjectMissingError as error:
                raise SourceError(str(error), **error.facts) from error
        tails = [self.tail[max(start - n_stored, 0) : max(stop - n_stored, 0)] for start, stop in ranges]
        return [
            np.concatenate([piece, np.frombuffer(tail, np.uint8)]) if tail else piece
            for piece, tail in zip(stored, tails, strict=True)
        ]


class Values(Protocol):
    """What a `View` shows: keys and their values, known without reading any."""

    def find(self, key: str) -> Value | None:
        """Look up a key; None where there is none."""

    def keys(self) -> Iterator[str]:
        """List the keys."""


class ArrayValues:
    """The metadata and chunks of one array.

    Parameters
    ----------
    array : LazyArray
        Of elements in one object.
    form : {"blocks", "rows"}
    block_rows : int, optional
        Rows of a chunk, or of a shard; by default about 16 MiB, or 1 MiB.

    Raises
    ------
    FormatError
        If Zarr v3 has no such data type.
    DmdataError
        If there is no such form, or a block would have no rows.
    """

    def __init__(self, array: Stored, form: Form = "blocks", block_rows: int | None = None) -> None:
        if form not in get_args(Form):
            raise DmdataError(f"form {form!r} is unknown; use 'blocks' (fewest requests) or 'rows' (fewest bytes)")
        if block_rows is not None and block_rows < 1:
            raise DmdataError(f"a block of {block_rows} rows holds nothing; use 1 or more")
        require_zarr_dtype(array.name, array.dtype, url=array.url)
        if array.layout.encoding:
            raise FormatError(
                f"{array.name} is stored as {array.layout.encoding}, for which Zarr v3 has no data type; index the "
                "array itself, or mirror it, which stores float32",
                url=array.url,
            )
        self.array = array
        # nothing and scalars have no rows to choose from
        self.form: Form = form if array.shape and 0 not in array.shape else "blocks"
        layout = array.layout
        self.order = layout.storage_order
        # slabs across an axis of size 1 would be the whole array: the next slower axis has rows
        self.axis = next((axis for axis in self.order if layout.shape[axis] != 1), 0)
        self.n_rows = layout.shape[self.axis] if layout.shape else 1
        self.row_bytes = layout.n_bytes // max(self.n_rows, 1)
        rows_of = _BLOCK_BYTES[self.form] // max(self.row_bytes, 1)
        block = max(min(block_rows or rows_of, self.n_rows), 1)
        self.chunk_rows = min(max(_LEAST_CHUNK_BYTES // max(self.row_bytes, 1), 1), block) if self.form == "rows" else 0
        # a shard is a whole number of inner chunks
        self.block_rows = -(-block // self.chunk_rows) * self.chunk_rows if self.chunk_rows else block

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ArrayValues) and self._facts == other._facts

    def __hash__(self) -> int:
        return hash(self.array.identity)

    def __repr__(self) -> str:
        unit = "shards" if self.form == "rows" else "blocks"
        return f"{self.array.name} in {unit} of {self.block_rows:,} rows"

    @property
    def _facts(self) -> tuple[Any, ...]:
        array = self.array
        return array.name, array.identity, array.dims, array.layout, self.form, self.block_rows

    @property
    def n_blocks(self) -> int:
        """Number of chunks, or shards."""
        return -(-self.n_rows // self.block_rows) if self.row_bytes else 0

    def keys(self) -> Iterator[str]:
        """List the metadata and the chunks, in order."""
        yield _METADATA_KEY
        yield from (self._key_of(block) for block in range(self.n_blocks))

    def find(self, key: str) -> Value | None:
        """Look up the metadata, or a chunk of the array's grid."""
        if key == _METADATA_KEY:
            return Value(None, 0, 0, json.dumps(self.metadata()).encode())
        coordinates = key.split("/")
        number = coordinates[self.axis + 1] if len(coordinates) > self.axis + 1 else "0"
        if not (number.isascii() and number.isdecimal()):
            return None
        block = int(number)
        if block >= self.n_blocks or key != self._key_of(block):
            return None
        first, last = block * self.block_rows, min((block + 1) * self.block_rows, self.n_rows)
        return Value(self.array, first * self.row_bytes, last * self.row_bytes, self._tail(last - first))

    def metadata(self) -> dict[str, Any]:
        """Describe the array as the document of its ``zarr.json``."""
        array, dtype = self.array, self.array.dtype
        codecs = self._codecs()
        if self.form == "rows":
            inner = {"chunk_shape": self._chunk_shape(self.chunk_rows), "codecs": codecs}
            index = {"index_codecs": [_bytes_codec("little")], "index_location": "end"}
            codecs = [{"name": "sharding_indexed", "configuration": inner | index}]
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(array.shape),
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self._chunk_shape(self.block_rows)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": codecs,
            "fill_value": [0.0, 0.0] if dtype.kind == "c" else dtype.type(0).item(),
            "dimension_names": list(array.dims),
            "attributes": {"artifact": array.name, "url": array.url},
        }

    def _codecs(self) -> list[dict[str, Any]]:
        swapped = self.array.dtype.itemsize > 1 and self.array.dtype == self.array.dtype.newbyteorder(">")
        codecs = [_bytes_codec("big" if swapped else "little")]
        if self.order != sorted(self.order):
            codecs.insert(0, {"name": "transpose", "configuration": {"order": self.order}})
        return codecs

    def _chunk_shape(self, n_rows: int) -> list[int]:
        sizes = [max(size, 1) for size in self.array.shape]
        if sizes:
            sizes[self.axis] = n_rows
        return sizes

    def _key_of(self, block: int) -> str:
        numbers = ["0"] * len(self.array.shape)
        if numbers:
            numbers[self.axis] = str(block)
        return "/".join(["c", *numbers])

    def _tail(self, n_rows: int) -> bytes:
        """Make up what follows the stored rows of a block: rows that fill it up, and the index of a shard."""
        if self.form == "blocks":
            return bytes((self.block_rows - n_rows) * self.row_bytes)
        n_chunks, chunk_bytes = -(-n_rows // self.chunk_rows), self.chunk_rows * self.row_bytes
        index = np.full((self.block_rows // self.chunk_rows, 2), _MISSING, "<u8")
        index[:n_chunks, 0] = np.arange(n_chunks) * chunk_bytes
        index[:n_chunks, 1] = chunk_bytes
        return bytes(n_chunks * chunk_bytes - n_rows * self.row_bytes) + index.tobytes()


class View(Store):
    """A read-only Zarr store of values that lie elsewhere. Made by `dmdata.LazyArray.to_zarr`.

    It pickles without credentials, and lists and measures its keys without reading any.

    Parameters
    ----------
    values : Values
        As `ArrayValues` of a lazy array.
    read_only : bool
        There is no other kind; Zarr passes it.

    Raises
    ------
    ValueError
        If it is opened for writing.
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = True
    supports_partial_writes = False

    def __init__(self, values: Values, *, read_only: bool = True) -> None:
        if not read_only:
            raise ValueError(f"a view of {values!r} is read-only; open it with mode='r', or write to a mirror of it")
        super().__init__(read_only=True)
        self.values = values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, View) and self.values == other.values

    def __hash__(self) -> int:
        return hash(self.values)

    def __repr__(self) -> str:
        return f"<View of {self.values!r}>"

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read a value or a range of it; None only where the store has no such key."""
        _end_with_the_process()
        try:
            return await asyncio.to_thread(self.get_sync, key, prototype=prototype, byte_range=byte_range)
        except BudgetError as error:
            raise error.with_traceback(None) from None  # what came before is of no use to who raises the budget

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Read ranges of several values at once."""
        return await asyncio.gather(*(self.get(key, prototype, byte_range) for key, byte_range in key_ranges))

    async def get_ranges(
        self, key: str, byte_ranges: Sequence[ByteRequest | None], *, prototype: BufferPrototype, **_own_plan: Any
    ) -> AsyncIterator[Sequence[tuple[int, Buffer | None]]]:
        """Read ranges of one value in one planned read (newer zarr asks so for the rows of a shard).

        The limits by which zarr would merge ranges are not heeded: gaps are merged by price, as everywhere.
        """
        yield await asyncio.to_thread(self.get_ranges_sync, key, byte_ranges, prototype=prototype)

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Do as `get` does, in this thread."""
        value = self.values.find(key)
        if value is None:
            return None
        (piece,) = value.read([_bounds(byte_range, value.n_bytes)])
        return _buffer(piece, prototype)

    def get_ranges_sync(
        self, key: str, byte_ranges: Sequence[ByteRequest | None], *, prototype: BufferPrototype, **_own_plan: Any
    ) -> Sequence[tuple[int, Buffer | None]]:
        """Do as `get_ranges` does, in this thread."""
        value = self.values.find(key)
        if value is None:
            raise FileNotFoundError(f"{self!r} has no key {key}")
        pieces = value.read([_bounds(byte_range, value.n_bytes) for byte_range in byte_ranges])
        return [(nth, _buffer(piece, prototype)) for nth, piece in enumerate(pieces)]

    async def exists(self, key: str) -> bool:
        """Return whether there is such a key."""
        return self.values.find(key) is not None

    async def getsize(self, key: str) -> int:
        """Measure a value without reading it."""
        value = self.values.find(key)
        if value is None:
            raise FileNotFoundError(f"{self!r} has no key {key}")
        return value.n_bytes

    async def list(self) -> AsyncGenerator[str, None]:
        """List all keys."""
        for key in self.values.keys():  # noqa: SIM118 - no mapping
            yield key

    async def list_prefix(self, prefix: str) -> AsyncGenerator[str, None]:
        """List the keys that begin so."""
        async for key in self.list():
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        """List the names directly below a prefix, each once."""
        folder = f"{prefix.rstrip('/')}/" if prefix else ""
        seen: set[str] = set()
        async for key in self.list_prefix(folder):
            name = key.removeprefix(folder).partition("/")[0]
            if name not in seen:
                seen.add(name)
                yield name

    async def set(self, key: str, value: Buffer) -> None:
        """Refuse."""
        self.set_sync(key, value)

    async def delete(self, key: str) -> None:
        """Refuse."""
        self.delete_sync(key)

    def set_sync(self, key: str, value: Buffer) -> None:  # noqa: ARG002 - zarr's signature
        """Refuse."""
        self._check_writable()

    def delete_sync(self, key: str) -> None:  # noqa: ARG002 - zarr's signature
        """Refuse."""
        self._check_writable()


@functools.cache
def _end_with_the_process() -> None:
    """Have reads that Zarr leaves behind, after one of them failed, end before the process does: Python complains."""

    async def end() -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def end_all() -> None:
        with contextlib.suppress(Exception):  # the process ends in any case
            sync(end(), timeout=_SECONDS_TO_END)

    # before zarr, whose own was registered first, stops its event loop
    atexit.register(end_all)


def _bytes_codec(endian: str) -> dict[str, Any]:
    return {"name": "bytes", "configuration": {"endian": endian}}


def _bounds(byte_range: ByteRequest | None, n_bytes: int) -> tuple[int, int]:
    """Turn a request into half-open bounds within a value of `n_bytes`."""
    match byte_range:
        case None:
            return 0, n_bytes
        case RangeByteRequest(start, end):
            return min(start, n_bytes), max(min(end, n_bytes), min(start, n_bytes))
        case OffsetByteRequest(offset):
            return min(offset, n_bytes), n_bytes
        case SuffixByteRequest(suffix):
            return max(n_bytes - suffix, 0), n_bytes
    raise TypeError(f"Unexpected byte_range, got {byte_range}; zarr's byte requests are understood")


def _buffer(piece: Octets, prototype: BufferPrototype | None) -> Buffer:
    return (prototype or default_buffer_prototype()).buffer.from_array_like(piece)
