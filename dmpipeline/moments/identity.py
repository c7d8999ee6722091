"""What rows of masks and outputs hold, by digests of all of them: the same rows have the same, others do not.

A row's key is a digest of its mask, packed to bits, and one of its outputs with their dtype: so it does not matter
whether masks come as booleans, bytes or sparse, and a change of a single output is a change. Keys are taken from blocks
as they are counted, on a thread of their own.

A source that knows what it holds need not be read for that. A run records a digest of each block, and an object on the
network has an ETag: their keys, once taken, are remembered next to the digest that the source gave for these rows
(`content_digest`), up to 1,024 rows to a digest. As long as it returns the same one, they hold.
"""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

import dmdata
from dmdata.bodies import InObject, InZarr
from dmdata.errors import AccessError, BudgetError, IntegrityError, SourceError
from dmdata.reading.headers import note_change
from dmpipeline.moments.arrays import RowSliceable, read_masks, read_outputs
from dmpipeline.moments.tensors import map_tensors, save_tensors

Span = tuple[int, int]
"""Adjacent rows, half-open."""


def keys_of_rows(masks: NDArray[np.int8], outputs: NDArray[Any]) -> NDArray[np.uint64]:
    """Take the keys of some rows.

    Parameters
    ----------
    masks : array of int8, shape (n_rows, n_train)
    outputs : array of real, shape (n_rows, n_targets)

    Returns
    -------
    keys : array of uint64, shape (n_rows, 4)
        128 bits that identify the mask, and 128 that identify the outputs.
    """
    outputs = np.ascontiguousarray(outputs)
    dtype = hashlib.sha256(outputs.dtype.str.encode())
    taken = bytearray()
    for packed, row in zip(_packed(masks), outputs, strict=True):
        taken += hashlib.sha256(packed).digest()[:16]
        digest = dtype.copy()
        digest.update(row)
        taken += digest.digest()[:16]
    return np.frombuffer(bytes(taken), np.uint64).reshape(-1, 4)


def keys_of_masks(masks: NDArray[np.int8]) -> NDArray[np.uint64]:
    """Take the keys of some masks alone, shape (n_rows,): the first column of `keys_of_rows`."""
    taken = b"".join(hashlib.sha256(packed).digest()[:8] for packed in _packed(masks))
    return np.frombuffer(taken, np.uint64)


def content_digest(array: RowSliceable, start: int, stop: int) -> str | None:
    """Identify what some rows hold by what their source says of them, unread; None where it says nothing.

    A LazyArray on the network is known by its address, ETag and place in the object. Local arrays are read: that is
    quick, and they may change under an address.
    """
    if isinstance(array, dmdata.LazyArray):
        body = array.read_header().body
        if not isinstance(body, InObject) or array.is_local or body.etag is None:
            return None
        layout = array.layout
        facts = (array.identity, layout.shape, layout.dtype.str, layout.offset, layout.strides, layout.encoding)
        return hashlib.sha256(repr((facts, start, stop)).encode()).hexdigest()
    own = getattr(array, "content_digest", None)
    digest = own(start, stop) if callable(own) else None
    return None if digest is None else str(digest)


def files_digest(array: dmdata.LazyArray, start: int, stop: int) -> str | None:
    """Identify some rows of an array of a local Zarr store by its files: their sizes and when they were written.

    What is damaged and stored again with the bits that it had is distinguished from what it was meanwhile. None for an
    array that is not in a Zarr store.
    """
    if not isinstance(array.body, InZarr) or stop <= start:
        return None
    opened, folder = array.body.open(), Path(array.body.url)
    shape = opened.shards or opened.chunks
    numbers = [range(start // shape[0], -(-stop // shape[0]))]
    numbers += [range(-(-size // step)) for size, step in zip(opened.shape[1:], shape[1:], strict=True)]
    digest = hashlib.sha256(repr((shape, str(opened.dtype))).encode())
    for place in itertools.product(*numbers):
        try:
            state = (folder / opened.metadata.encode_chunk_key(place)).stat()
            digest.update(repr((place, state.st_size, state.st_mtime_ns)).encode())
        except FileNotFoundError:  # all its elements are the fill value
            digest.update(repr(place).encode())
    return digest.hexdigest()


def confirm(array: RowSliceable) -> None:
    """Make sure that an object on the network is still the one that was opened, if it can be asked: one byte is read.

    What `dmdata` remembers of a header may be older than the object.

    Raises
    ------
    IntegrityError
        If the object has changed since.
    """
    if isinstance(array, dmdata.LazyArray) and isinstance(array.body, InObject) and not array.is_local:
        transport, at = array.body.transport, array.layout.offset
        try:
            transport.read(at, at + 1, etag=array.body.etag)
        except (AccessError, BudgetError, SourceError):
            return  # nothing says that it is another
        except IntegrityError:
            note_change(transport.address, array.body.etag)
            raise


def is_near(array: RowSliceable) -> bool:
    """Return whether an array may be read twice without a cost: anything but a LazyArray on the network."""
    return not isinstance(array, dmdata.LazyArray) or array.is_local


def digest_of(keys: NDArray[np.uint64], *columns: int) -> str:
    """Identify rows by their keys, in order, and by how many columns masks and outputs have; in hexadecimal."""
    return hashlib.sha256(repr(columns).encode() + np.ascontiguousarray(keys).data).hexdigest()[:24]


@dataclass(slots=True, eq=False)
class KnownRows:
    """Keys of the rows of masks and outputs, as far as they are known.

    Attributes
    ----------
    masks, outputs : RowSliceable
    keys : array of uint64, shape (n_models, 4)
        See `keys_of_rows`; zeros where a row is not known yet.
    is_known : array of bool, shape (n_models, 2)
        Of each row's mask, and of its outputs.
    said : dict
        What a source said of some rows, by 0 for masks or 1 for outputs and by first row and end. It is asked before
        anything is read, so that rows which change meanwhile are taken for changed the next time.
    """

    masks: RowSliceable
    outputs: RowSliceable
    keys: NDArray[np.uint64]
    is_known: NDArray[np.bool_]
    said: dict[tuple[int, Span], bytes | None] = field(default_factory=dict)

    @classmethod
    def of(cls, masks: RowSliceable, outputs: RowSliceable) -> Self:
        """Begin, with no row known."""
        n_models = masks.shape[0]
        return cls(masks, outputs, np.zeros((n_models, 4), np.uint64), np.zeros((n_models, 2), np.bool_))

    def saw(self, first: int, masks: NDArray[np.int8], outputs: NDArray[Any]) -> None:
        """Take the keys of rows that were read."""
        self.set(first, keys_of_rows(masks, outputs))

    def set(self, first: int, keys: NDArray[np.uint64]) -> None:
        """Take keys as they are, of rows from `first` on."""
        self.keys[first : first + len(keys)] = keys
        self.is_known[first : first + len(keys)] = True

    def read_near(self, start: int, stop: int, *, block_rows: int) -> None:
        """Make some rows known by reading what is not, if that is on this machine: nothing is fetched for it."""
        rows = slice(start, stop)
        unknown = [side for side in (0, 1) if not self.is_known[rows, side].all()]
        if not all(is_near(self._sources[side]) for side in unknown):
            return
        is_unknown: NDArray[np.bool_] = ~np.logical_and(self.is_known[rows, 0], self.is_known[rows, 1])
        for first, last in _stretches(is_unknown, start):
            for at in range(first, last, block_rows):
                end = min(at + block_rows, last)
                # what is known already is not read: an empty block stands for it
                masks = read_masks(self.masks, at, end) if 0 in unknown else np.empty((end - at, 0), np.int8)
                outputs = read_outputs(self.outputs, at, end) if 1 in unknown else np.empty((end - at, 0))
                keys = keys_of_rows(masks, outputs)
                for side in unknown:
                    self._set_side(side, at, keys[:, _COLUMNS[side]])

    def digest(self, start: int, stop: int) -> str | None:
        """Identify some rows by one digest; None if not all of them are known."""
        if not self.is_known[start:stop].all():
            return None
        return digest_of(self.keys[start:stop], self.masks.shape[1], self.outputs.shape[1])

    def recall(self, path: Path) -> None:
        """Take the keys that `remember` kept, of rows of which the sources say what they said then."""
        n_models = len(self.keys)
        for side in (0, 1):
            for first in range(0, n_models, _SPAN_ROWS):
                if self._said(side, (first, min(first + _SPAN_ROWS, n_models))) is None:
                    break  # nor will it of the others
        for side, span, digest, keys in _entries(path) if path.exists() else ():
            if span[1] <= n_models and self._said(side, span) == digest:
                self._set_side(side, span[0], keys)
        for side, source in enumerate(self._sources):
            if self.is_known[:, side].any():
                confirm(source)

    def remember(self, path: Path) -> None:
        """Keep the keys of known rows whose sources say what they hold; of others' the latest, up to a bound."""
        entries: dict[tuple[int, Span, bytes], NDArray[np.uint64]] = {}
        for (side, span), digest in self.said.items():
            if digest is not None and self.is_known[slice(*span), side].all():
                entries[side, span, digest] = self.keys[slice(*span), _COLUMNS[side]]
        if not entries:
            return
        n_rows = 0
        for side, span, digest, keys in _entries(path) if path.exists() else ():
            n_rows += len(keys)
            if n_rows > _ROWS_OF_OTHERS:
                break
            entries.setdefault((side, span, digest), keys)
        arrays: dict[str, NDArray[Any]] = {
            "sides": np.array([side for side, _, _ in entries], np.int64),
            "spans": np.array([span for _, span, _ in entries], np.int64),
            "digests": np.frombuffer(b"".join(digest for _, _, digest in entries), np.uint8).reshape(-1, 32),
            "keys": np.concatenate(list(entries.values())).view(np.int64),
        }
        save_tensors(arrays, path)

    @property
    def _sources(self) -> tuple[RowSliceable, RowSliceable]:
        return self.masks, self.outputs

    def _set_side(self, side: int, first: int, keys: NDArray[np.uint64]) -> None:
        self.keys[first : first + len(keys), _COLUMNS[side]] = keys
        self.is_known[first : first + len(keys), side] = True

    def _said(self, side: int, span: Span) -> bytes | None:
        if (side, span) not in self.said:
            source = self._sources[side]
            said = content_digest(source, *span)
            facts = repr((said, source.shape[1])).encode()
            self.said[side, span] = None if said is None else hashlib.sha256(facts).digest()
        return self.said[side, span]


_COLUMNS = (slice(0, 2), slice(2, 4))
_SPAN_ROWS = 1024
_ROWS_OF_OTHERS = 2**20  # 24 MiB


def _packed(masks: NDArray[np.int8]) -> NDArray[np.uint8]:
    return np.packbits(masks.view(np.bool_), axis=1)


def _stretches(wanted: NDArray[np.bool_], first: int) -> Iterator[Span]:
    """Return the longest stretches of adjacent rows that are wanted, of which the array's first is `first`."""
    edges = np.flatnonzero(np.diff(wanted.astype(np.int8), prepend=0, append=0)) + first
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _entries(path: Path) -> Iterator[tuple[int, Span, bytes, NDArray[np.uint64]]]:
    arrays = map_tensors(path, {"sides", "spans", "digests", "keys"})
    keys, at = arrays["keys"].view(np.uint64), 0
    for side, (start, stop), digest in zip(
        arrays["sides"].tolist(), arrays["spans"].tolist(), arrays["digests"], strict=True
    ):
        yield side, (start, stop), digest.tobytes(), keys[at : at + stop - start].copy()
        at += stop - start
