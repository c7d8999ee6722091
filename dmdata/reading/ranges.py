"""Bytes that were paid for, kept under ``DMDATA_HOME`` so that they are not paid for again.

Each object, identified by endpoint, address and strong etag, has a folder of *segments*: files of up to 64 MiB that one
process appends *records* to. A record is what a read received: which bytes of the object, packed one after the other,
with checksums. Nothing in a segment is ever overwritten, so that readers need no lock, and a process that is killed
leaves at worst an unfinished record, which is recognized as one. What fails its checksum is removed and fetched again.
Where which byte is, is known to each process in arrays that grow with the segments. The least recently used segments
are removed when all of them pass the bound. Nothing is synced to disk: a power cut may lose what was kept, and
checksums detect it. A disk that is full or may not be written costs a warning, never a read.
"""

import contextlib
import hashlib
import math
import os
import struct
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dmdata.home import home
from dmdata.layout.plan import Offsets, ReadPlan, without
from dmdata.objects.address import Address
from dmdata.objects.endpoints import object_key
from dmdata.reading.byte_index import ByteIndex, Level, covered
from dmdata.reading.segments import (
    FOLDER,
    SEGMENT_BYTES,
    SUFFIX,
    Bytes,
    DamagedError,
    OwnSegment,
    Record,
    Segment,
    hold,
    parse_record,
    record_head,
    segments_of_all,
    sweep,
    write_all,
    write_segment,
)
from dmdata.settings import settings

_SAVED = "saved"
_SAVED_RECORD = struct.Struct("<Qd")
_LEAST_SEGMENT_BYTES = 64 << 10
# of more records than these a new segment is begun, and of more segments than these the small ones are made one
_MOST_RECORDS = 1024
_MOST_SMALL_SEGMENTS = 32
_SMALL_SEGMENT_BYTES = 4 << 20
_SECONDS_BETWEEN_MERGES = 2.0
# a read of more than this share of the bound is not kept: it would drive out all else
_LARGEST_SHARE = 4
# small ranges are kept together until they have this many bytes, or there are this many of them
_TOGETHER_BYTES = 1 << 20
_MOST_TOGETHER = 1 << 16
# wanted pieces that are looked up one by one: more are read as if nothing were kept
_MOST_WANTED = 1 << 26
_MOST_OBJECTS_OPEN = 64
# a folder that changed so recently may change again within the same tick of the file system's clock
_TICK_SECONDS = 0.1
_PAUSE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Usage:
    """What is kept: objects, bytes on disk with the bound on them, and what reads did not have to fetch so far."""

    n_objects: int
    n_segments: int
    n_bytes: int
    bound_bytes: int
    saved_bytes: int
    saved_usd: float


def usage() -> Usage:
    """Count what is kept."""
    files = segments_of_all()
    saved_bytes, saved_usd = 0, 0.0
    with contextlib.suppress(OSError):
        stored = (home() / FOLDER / _SAVED).read_bytes()
        for n_bytes, usd in _SAVED_RECORD.iter_unpack(stored[: len(stored) // _SAVED_RECORD.size * _SAVED_RECORD.size]):
            saved_bytes, saved_usd = saved_bytes + n_bytes, saved_usd + usd
    n_objects = len({os.path.dirname(path) for path, _, _ in files})
    return Usage(
        n_objects, len(files), sum(size for _, size, _ in files), settings().cache_bytes, saved_bytes, saved_usd
    )


def note_saved(n_bytes: int, usd: float) -> None:
    """Count bytes that a read found here."""
    with contextlib.suppress(OSError):
        descriptor = os.open(home() / FOLDER / _SAVED, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, _SAVED_RECORD.pack(n_bytes, usd))
        finally:
            os.close(descriptor)


def kept_of(address: Address, etag: str | None, *, paid: bool, bound_bytes: int) -> "Kept | None":
    """Find what is kept of an object, and where more is kept; None where nothing is to be.

    Parameters
    ----------
    address : Address
    etag : str or None
        Only a strong one identifies bytes.
    paid : bool
        Whether reading it costs anything: what is free is not kept.
    bound_bytes : int
        On all that is kept; with 0 nothing is.
    """
    if not paid or not etag or etag.startswith("W/") or address.is_local or not bound_bytes:
        return None
    key = hashlib.sha256(f"{object_key(address)} {etag}".encode()).digest()
    folder = home() / FOLDER / key.hex()
    with _REGISTRY.lock:
        kept = _REGISTRY.kept.pop(folder, None) or Kept(folder, key[:16])
        _REGISTRY.kept[folder] = kept
        if len(_REGISTRY.kept) > _MOST_OBJECTS_OPEN:
            _REGISTRY.kept.popitem(last=False)
    return kept


class Kept:
    """What is kept of one object, as this process knows it. Safe for threads."""

    def __init__(self, folder: Path, key: bytes) -> None:
        self._folder, self._key = folder, key
        self._lock = threading.Lock()
        self._index = ByteIndex()
        self._segments: dict[str, Segment] = {}
        self._own: OwnSegment | None = None
        self._seen = -1
        self._merged_at = -math.inf

    def rest_of(self, plan: ReadPlan) -> ReadPlan:
        """Leave out of a plan what is kept; looks at no bytes."""
        ranges = _worth_a_look(plan)
        return plan if ranges is None else without(plan, covered(self._known(), ranges))

    def fill(self, plan: ReadPlan) -> tuple[ReadPlan, Bytes | None]:
        """Put what is kept into a read's product, and leave it out of the plan; no product where nothing is."""
        ranges = _worth_a_look(plan)
        if ranges is None:
            return plan, None
        product: Bytes | None = None
        try:
            while len(found := covered(levels := self._known(), ranges)):
                product = np.empty(plan.wanted_bytes, np.uint8) if product is None else product
                try:
                    self._index.copy(levels, plan.wanted, product)
                except DamagedError as error:
                    self._drop(error.args[0])
                    continue
                return without(plan, found), product
        except OSError:
            pass  # it cannot be read now: all of it is fetched
        return plan, None

    def keeper(self, n_bytes: int, *, bound: int) -> "Keeper | None":
        """Return what keeps the bytes that a read receives; None where they are too many."""
        if n_bytes * _LARGEST_SHARE > bound or _REGISTRY.paused.get(self._folder.parent, 0) > time.monotonic():
            return None
        return Keeper(self, bound)

    def store(self, starts: Offsets, lengths: Offsets, pieces: Sequence[Bytes], *, bound: int) -> None:
        """Keep byte ranges, ascending and without overlap, each with its bytes."""
        n_bytes = int(lengths.sum())
        data = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        head, checksums = record_head(self._key, starts, lengths, data)
        try:
            self._make_room(len(head) + n_bytes, bound)
            with self._lock:
                own = self._segment_for(len(head) + n_bytes, bound)
                at = own.segment.end
                own.segment.end += len(head) + n_bytes
                own.segment.n_records += 1
            write_all(own.descriptor, head, at)
            write_all(own.descriptor, data.data, at + len(head))
        except OSError as error:
            self._give_up(error)
            return
        record = Record(own.segment, at + len(head), n_bytes, checksums)
        with self._lock:
            if own.segment.path in self._segments:
                self._index.add([(record, np.stack([starts, starts + lengths], axis=1))])

    def _known(self) -> tuple[Level, ...]:
        """Look at what others have added or removed, and return where everything is."""
        with self._lock:
            try:
                self._look()
            except OSError:
                self._seen = -1
                self._forget(set(self._segments))
            return self._index.levels

    def _look(self) -> None:
        self._look_for_segments()
        added: list[tuple[Record, Offsets]] = []
        for segment in list(self._segments.values()):
            if segment.grows:
                with contextlib.suppress(FileNotFoundError):
                    added += self._new_records(segment)
        if added:
            self._index.add(added)
        small = [s for s in self._segments.values() if s.end < _SMALL_SEGMENT_BYTES and not self._is_own(s)]
        if len(small) > _MOST_SMALL_SEGMENTS and time.monotonic() - self._merged_at > _SECONDS_BETWEEN_MERGES:
            self._merged_at = time.monotonic()
            self._make_one(small)

    def _look_for_segments(self) -> None:
        """Note which files there are, if the folder has changed."""
        try:
            changed_at = os.stat(self._folder).st_mtime_ns
        except FileNotFoundError:
            if self._segments:
                self._forget(set(self._segments))
            self._seen = -1
            return
        if changed_at == self._seen:
            return
        with os.scandir(self._folder) as entries:
            there = {entry.path for entry in entries if entry.name.endswith(SUFFIX)}
        if gone := self._segments.keys() - there:
            self._forget(gone)
        for path in there - self._segments.keys():
            self._segments[path] = Segment(path)
        self._seen = changed_at if time.time() - changed_at / 1e9 > _TICK_SECONDS else -1

    def _is_own(self, segment: Segment) -> bool:
        return self._own is not None and self._own.segment is segment

    def _new_records(self, segment: Segment) -> list[tuple[Record, Offsets]]:
        """Read the heads of whole records that are new to this process, as far as they are sound."""
        if os.stat(segment.path).st_size <= segment.end:
            return []
        found = []
        descriptor = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            size = os.fstat(descriptor).st_size
            while (parsed := parse_record(descriptor, self._key, segment, size)) is not None:
                found.append(parsed)
                segment.end = parsed[0].data_at + parsed[0].n_bytes
                segment.n_records += 1
        finally:
            os.close(descriptor)
        segment.grows = segment.end < SEGMENT_BYTES
        return found

    def _forget(self, paths: set[str]) -> None:
        """Forget segments, and where their bytes were."""
        for path in paths:
            self._segments.pop(path, None)
        if self._own and self._own.segment.path in paths:
            self._own = None
        self._index.forget(paths)

    def _drop(self, segment: Segment) -> None:
        """Remove a segment that is damaged, or gone.

        Raises
        ------
        OSError
            If it cannot be removed.
        """
        with self._lock:
            self._seen = -1
            self._remove({segment.path})

    def _segment_for(self, n_bytes: int, bound: int) -> "OwnSegment":
        """Return the segment that this process appends to: a new one where there is none, or it is full or removed."""
        largest = min(SEGMENT_BYTES, max(bound // 16, _LEAST_SEGMENT_BYTES))
        own = self._own
        if own and os.fstat(own.descriptor).st_nlink == 0:
            self._forget({own.segment.path})
            own = None
        if own and own.segment.end and own.segment.end + n_bytes > largest:
            own = None
        elif own and own.segment.n_records >= _MOST_RECORDS:
            # every new process would have to read all of these heads
            finished = own.segment
            self._own = own = None
            self._make_one([finished])
        if own is None:
            own = OwnSegment.begin(self._folder)
            self._segments[own.segment.path] = own.segment
            self._own = own
        return own

    def _make_one(self, segments: list[Segment]) -> None:
        """Make small segments, which nobody appends to, one segment with one record."""
        with contextlib.ExitStack() as stack:
            held: dict[str, float] = {}  # with the time of its last use
            n_bytes = 0
            for segment in segments:
                if n_bytes < SEGMENT_BYTES and (last_used := hold(segment.path, stack)) is not None:
                    held[segment.path] = last_used
                    n_bytes += segment.end
                    if segment.grows and (added := self._new_records(segment)):  # until just now somebody did
                        self._index.add(added)
            found = self._index.of_segments(held)
            if found is None:
                self._remove(set(held))
                return
            lengths = found.ranges[:, 1] - found.ranges[:, 0]
            data = np.empty(int(lengths.sum()), np.uint8)
            try:
                self._index.gather(found, data, np.cumsum(lengths) - lengths)
            except DamagedError as error:
                self._remove({error.args[0].path})
                return
            apart = np.concatenate([[True], found.ranges[1:, 0] != found.ranges[:-1, 1]])
            starts = found.ranges[apart, 0]
            stops = found.ranges[np.concatenate([apart[1:], [True]]), 1]
            head, checksums = record_head(self._key, starts, stops - starts, data)
            try:
                segment = write_segment(self._folder, [head, data.data], max(held.values()))
            except OSError:
                return  # no room for it: they stay as they are
            self._remove(set(held))
            self._segments[segment.path] = segment
            record = Record(segment, len(head), len(data), checksums)
            self._index.add([(record, np.stack([starts, stops], axis=1))])

    def _remove(self, paths: set[str]) -> None:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        self._forget(paths)

    def _make_room(self, n_bytes: int, bound: int) -> None:
        with _REGISTRY.lock:
            _REGISTRY.written += n_bytes
            root = self._folder.parent
            if _REGISTRY.root == root and _REGISTRY.bound == bound:
                enough = _REGISTRY.total + _REGISTRY.written <= bound and _REGISTRY.written <= bound // 64
                if enough:
                    return
            total = sweep(bound - n_bytes)
            _REGISTRY.root, _REGISTRY.bound, _REGISTRY.total, _REGISTRY.written = root, bound, total, n_bytes

    def _give_up(self, error: OSError) -> None:
        """Keep nothing for a while, free what this process holds of a full disk, and say so once."""
        _REGISTRY.paused[self._folder.parent] = time.monotonic() + _PAUSE_SECONDS
        with self._lock:
            if self._own:
                with contextlib.suppress(OSError):
                    os.unlink(self._own.segment.path)
                self._forget({self._own.segment.path})
        with _REGISTRY.lock:
            warned, _REGISTRY.warned = _REGISTRY.warned, True
        if not warned:
            warnings.warn(
                f"what was read cannot be kept in {home() / FOLDER} ({error.strerror or error}), so that reading it "
                "again is paid again; make room there, or set DMDATA_CACHE_GIB=0",
                RuntimeWarning,
                stacklevel=2,
            )


class Keeper:
    """Keeps what one read receives, from any of its threads: long ranges as they come, short ones together."""

    def __init__(self, kept: Kept, bound: int) -> None:
        self._kept, self._bound = kept, bound
        self._lock = threading.Lock()
        self._pending: list[tuple[int, Bytes]] = []
        self._n_bytes = 0
        self._is_closed = False

    def keep(self, start: int, data: Bytes) -> None:
        """Keep a range that begins at `start` in the object; its bytes must not change before `close`."""
        with self._lock:
            if self._is_closed:
                return
            self._pending.append((start, data))
            self._n_bytes += len(data)
            if self._n_bytes < _TOGETHER_BYTES and len(self._pending) < _MOST_TOGETHER:
                return
            pending, self._pending, self._n_bytes = self._pending, [], 0
        self._store(pending)

    def close(self) -> None:
        """Keep what is pending, and nothing that comes later."""
        with self._lock:
            pending, self._pending, self._is_closed = self._pending, [], True
        if pending:
            self._store(pending)

    def _store(self, pending: list[tuple[int, Bytes]]) -> None:
        pending.sort(key=lambda item: item[0])
        starts = np.array([start for start, _ in pending], np.int64)
        lengths = np.array([len(data) for _, data in pending], np.int64)
        apart = np.flatnonzero(np.concatenate([[True], starts[1:] != starts[:-1] + lengths[:-1]]))
        starts, lengths = starts[apart], np.add.reduceat(lengths, apart)
        self._kept.store(starts, lengths, [data for _, data in pending], bound=self._bound)


@dataclass(slots=True)
class _Registry:
    """What this process has open; a child begins with nothing of its parent's."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    kept: OrderedDict[Path, Kept] = field(default_factory=OrderedDict)
    root: Path | None = None
    bound: int = 0
    total: int = 0
    written: int = 0
    paused: dict[Path, float] = field(default_factory=dict)
    warned: bool = False


_REGISTRY = _Registry()


def forget_what_is_known() -> None:
    """Know nothing of what is kept, as a new process does."""
    global _REGISTRY  # a lock that another thread held at the fork would be held for ever
    _REGISTRY = _Registry(warned=_REGISTRY.warned)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_what_is_known)


def _worth_a_look(plan: ReadPlan) -> Offsets | None:
    """Return the ranges of a plan; None where they, or the pieces wanted of them, are too many to look up."""
    return None if plan.wanted.n_repeats * len(plan.wanted.starts) > _MOST_WANTED else plan.remembered
