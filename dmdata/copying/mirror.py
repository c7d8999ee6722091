"""Copy an array into a chunked Zarr store, block by block, so that it can be stopped and resumed.

Chunks are good for a block of rows and for a column alike. A block is a slab across the axis along which the source's
bytes lie, rows for an array in C order. While one block is compressed, digested and written, the next is fetched: each
byte once, in one pass. A block is entered, with its digest, into the mirror's journal only after its chunks are
written; ranges of a block under way are kept in a spool as they land. So whatever kills the copy, what had landed is
never paid again. Peak memory is that of a few blocks, whatever the number of rows. The mirror is plain Zarr v3 in Blosc
zstd: any reader opens it.
"""

import ctypes
import os
import queue
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import zarr

from dmdata.copying.cluster import Carried, carried_along, run_on_cluster
from dmdata.copying.journal import Block, Blocks, BlockWriter, Journal, Original, has_mirror, open_copy
from dmdata.copying.place import Place
from dmdata.copying.spool import Landing, read_key, sweep
from dmdata.errors import DmdataError, FormatError
from dmdata.layout.plan import ReadPlan
from dmdata.layout.selection import Selection
from dmdata.money.ledger import Ledger, home
from dmdata.reading.progress_bar import shown
from dmdata.reading.reader import Spool

DEFAULT_MEMORY_BYTES = 512 << 20
"""Bound on the memory of a copy, apart from what Python, its libraries and connections take."""

# one is written while the next is fetched
_BLOCKS_UNDER_WAY = 2
# how long an interrupted copy may take to end the block it is writing
_GRACE_SECONDS = 2.0


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

    @property
    def is_local(self) -> bool:
        """Whether reading it again is quick and free."""

    def read(
        self, selection: Selection, *, progress: Callable[[int], object] | None = None, spool: Spool | None = None
    ) -> npt.NDArray[Any]:
        """Read a selection."""

    def planned(self, selection: Selection) -> ReadPlan | None:
        """Plan a selection as `read` carries it out; None where it is not read by ranges."""

    def price_usd(self, n_bytes: int, n_requests: int) -> float:
        """Price what was planned, upper bound; 0 where reading is free."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a copy is: rows complete of all rows, with those complete before it began.

    Rows are slabs across the source's slowest axis: columns, for a source in Fortran order.
    """

    n_rows: int
    n_rows_total: int


Reads: TypeAlias = list[tuple[Selection, int]]
"""What a copy still needs of its source: one block of each kind, and how many cost the same."""


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy as it was planned by `plan_copy`.

    Attributes
    ----------
    source : Readable
    place : Place
    selection : Selection
        Keeps every axis of the source.
    memory_bytes : int
    n_bytes : int
        That will arrive.
    usd : float
        Upper bound of what they cost; 0 where reading is free.
    """

    source: Readable
    place: Place
    selection: Selection
    memory_bytes: int
    n_bytes: int
    usd: float


def plan_copy(
    source: Readable, place: Place, *, selection: Selection, memory_bytes: int, reads: Reads | None = None
) -> Copy:
    """Plan and price the copy of an array, or of a product of its axes; asks nothing of the source, writes nothing.

    Parameters
    ----------
    source : Readable
    place : Place
        Of the Zarr array; where an unfinished copy of the same is there, it is resumed.
    selection : Selection
        Of the source's shape. Every axis stays one: a number selects a slab of one.
    memory_bytes : int
        Bound on the memory of the copy, on a cluster of each of its tasks; decides the rows of a block.
    reads : list of (Selection, int), optional
        What `missing_reads` found at the place, where that was asked before.

    Raises
    ------
    FormatError
        If Zarr has no data type for its elements.
    """
    require_zarr_dtype(source.name, source.dtype)
    if reads is None:
        itemsize, axis = source.dtype.itemsize, source.slowest_axis
        reads = missing_reads(
            place, selection, name=source.name, itemsize=itemsize, axis=axis, memory_bytes=memory_bytes
        )
    n_bytes = n_requests = n_local = 0
    for part, count in reads:
        plan = source.planned(part)
        if plan is not None:
            n_bytes, n_requests = n_bytes + count * plan.n_bytes, n_requests + count * plan.n_requests
        else:
            n_local += count * part.n_elements * source.dtype.itemsize
    usd = source.price_usd(n_bytes, n_requests)
    selection = replace(selection, kept=tuple(range(len(selection.axes))))
    return Copy(source, place, selection, memory_bytes, n_bytes + n_local, usd)


def require_budget(copies: Sequence[Copy]) -> None:
    """Refuse copies, before any data, if a budget would not let all of them end.

    Raises
    ------
    BudgetError
    """
    if usd := sum(copy.usd for copy in copies):
        Ledger(home()).check(usd=usd, artifact=", ".join(copy.source.name for copy in copies))


def run_copy(
    copy: Copy,
    *,
    scheduler: str | None,
    progress: Callable[[Progress], object] | Literal[False] | None,
    received: Callable[[int], object] | None,
) -> zarr.Array[Any]:
    """Copy what was planned, or what is still missing of it by now.

    Parameters
    ----------
    copy : Copy
    scheduler : str or None
        Address of a Dask scheduler, whose workers then copy the blocks; this process keeps the journal.
    progress : callable, False or None
        Called after each block; with None a bar is shown, unless `received` is called.
    received : callable or None
        Called with the number of bytes that arrived since the last call, from any thread.

    Returns
    -------
    copy : zarr.Array
        Complete.

    Raises
    ------
    IntegrityError
        If the destination holds the copy of an object that has changed since.
    DmdataError
        If the destination holds something else, cannot be written, or another process is copying to it.
    AccessError, SourceError
        From the source; what has landed by then stays.
    """
    source, place = copy.source, copy.place
    with place.explain_errors(), place.claimed() as hold_on:
        journal = _open_or_create(copy)
        sweep(place.spool_directory())
        n_rows = journal.n_rows_complete

        def report(nth: int) -> None:
            nonlocal n_rows
            hold_on()
            n_rows += journal.blocks[nth].stop - journal.blocks[nth].start
            if progress:
                progress(Progress(n_rows, journal.blocks.n_rows))

        is_wanted = progress is None and received is None
        with shown(source.name, copy.n_bytes, lambda: copy.usd, wanted=is_wanted) as arrived:
            if journal.is_complete:
                pass
            elif scheduler:
                _copy_on_cluster(copy, journal, scheduler, report=report, received=received or arrived)
            else:
                _copy_here(source, journal, report=report, received=received or arrived)
        shutil.rmtree(place.spool_directory(), ignore_errors=True)
        return open_copy(place, "r+")


def require_zarr_dtype(name: str, dtype: np.dtype[Any], *, url: str | None = None) -> None:
    """Refuse an array whose elements Zarr cannot store, before anything of it is read.

    Raises
    ------
    FormatError
        If Zarr v3 has no such data type, as for dates, text and records.
    """
    if dtype.kind not in "biufc" or dtype.itemsize > (16 if dtype.kind == "c" else 8):
        raise FormatError(
            f"{name} has dtype {str(dtype)[:200]}, for which Zarr v3 has no data type; index the array itself, or "
            "download its object with dmdata get NAME",
            url=url,
        )


def missing_reads(
    place: Place, selection: Selection, *, name: str, itemsize: int, axis: int, memory_bytes: int
) -> Reads:
    """List the reads that a copy still needs: all of them where there is none yet. Asks nothing of the source.

    Parameters
    ----------
    place : Place
    selection : Selection
    name : str
        Of the source.
    itemsize : int
        Bytes of an element.
    axis : int
        The source's slowest axis.
    memory_bytes : int

    Returns
    -------
    reads : list of (Selection, int)
        One block of each kind, and how many cost the same.
    """
    try:
        with place.explain_errors("read"):
            journal = Journal.load(place) if has_mirror(place) else None
        if journal and journal.original.artifact == name and journal.blocks.selection.digest == selection.digest:
            return _distinct(journal.blocks, journal.missing())
    except DmdataError:
        pass  # something else, which the copy itself will refuse
    blocks = Blocks.cut(selection, axis=axis, itemsize=itemsize, memory_bytes=memory_bytes)
    return _distinct(blocks, (blocks[nth] for nth in range(len(blocks))))


def _distinct(blocks: Blocks, missing: Iterable[Block]) -> Reads:
    """Count blocks that cost the same: where rows are evenly spaced, all with as many of them."""
    if blocks.selection.axes and not isinstance(blocks.selection.axes[blocks.axis], range):
        return [(block.selection, 1) for block in missing]
    counts: Counter[int] = Counter()
    examples: dict[int, Selection] = {}
    for block in missing:
        counts[block.stop - block.start] += 1
        examples.setdefault(block.stop - block.start, block.selection)
    return [(examples[n_rows], count) for n_rows, count in counts.items()]


def _open_or_create(copy: Copy) -> Journal:
    source, place = copy.source, copy.place
    original = Original(source.name, source.identity, source.shape, str(source.dtype))
    if has_mirror(place):
        open_copy(place, "r+")
        journal = Journal.load(place)
        journal.require_same(original, copy.selection)
        return journal
    itemsize = source.dtype.itemsize
    blocks = Blocks.cut(copy.selection, axis=source.slowest_axis, itemsize=itemsize, memory_bytes=copy.memory_bytes)
    blocks.require_memory(source.name, itemsize=itemsize, memory_bytes=copy.memory_bytes)
    # a view of bytes has no models
    rows = getattr(source, "rows", None)
    return Journal.create(place, original, blocks, dims=source.dims, dtype=source.dtype, rows=rows)


def _copy_here(
    source: Readable,
    journal: Journal,
    *,
    report: Callable[[int], object],
    received: Callable[[int], object] | None,
) -> None:
    """Fetch block after block in this thread, which Ctrl-C reaches; another one writes them."""
    writer = _Writer(journal)
    try:
        for block in journal.missing():
            landing = writer.vacant()
            try:
                data = _read(source, block, journal.place, landing, received)
            except BaseException:
                landing.detach()  # else its files stay locked, and the next try in this process keeps nothing
                raise
            writer.put(block, data, landing)
            for nth in writer.finished():
                report(nth)
        for nth in writer.finished(wait=True):
            report(nth)
    except Exception:
        writer.end()  # what is fetched is written first
        raise
    except BaseException:
        writer.end(seconds=_GRACE_SECONDS)
        raise
    writer.end()


def _read(
    source: Readable, block: Block, place: Place, landing: Landing, received: Callable[[int], object] | None
) -> npt.NDArray[Any]:
    plan = None if source.is_local else source.planned(block.selection)
    if plan is not None and plan.n_requests:
        path = place.spool_directory() / str(block.nth)
        landing.attach(path, read_key(source.identity, plan), plan.wanted_bytes)
    return source.read(block.selection, progress=received, spool=landing)


class _Writer:
    """A thread that compresses, digests and writes blocks, and enters them into the journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._blocks = BlockWriter(journal.place)
        self._vacant: queue.SimpleQueue[Landing] = queue.SimpleQueue()
        self._received: queue.SimpleQueue[tuple[Block, npt.NDArray[Any], Landing] | None] = queue.SimpleQueue()
        self._finished: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._is_abandoned = False
        self._n_under_way = 0
        for _ in range(_BLOCKS_UNDER_WAY):
            self._vacant.put(Landing())
        self._thread = threading.Thread(target=self._run, name="dmdata-mirror", daemon=True)
        self._thread.start()

    def vacant(self) -> Landing:
        """Wait for memory that a block can be read into; raise what writing failed for."""
        landing = self._vacant.get()
        self._raise_failure()
        return landing

    def put(self, block: Block, data: npt.NDArray[Any], landing: Landing) -> None:
        """Have a block written; its memory is vacant again afterwards."""
        self._n_under_way += 1
        self._received.put((block, data, landing))

    def finished(self, *, wait: bool = False) -> Iterator[int]:
        """Yield the numbers of blocks written since the last call, or of all; raise what writing failed for."""
        while self._n_under_way and (wait or not self._finished.empty()):
            nth = self._finished.get()
            self._n_under_way -= 1
            self._raise_failure()
            yield nth

    def end(self, *, seconds: float | None = None) -> None:
        """End the thread: after all blocks, or, with `seconds`, after the one it is writing or that time."""
        self._is_abandoned = seconds is not None
        self._received.put(None)
        self._thread.join(seconds)
        while not self._vacant.empty():
            self._vacant.get().detach()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while (item := self._received.get()) is not None:
            block, data, landing = item
            try:
                if self._failure is None and not self._is_abandoned:
                    digest = self._blocks.write(self._journal.blocks.region(block.start, block.stop), data)
                    self._journal.record(block.nth, digest)
                    landing.discard()
                else:
                    landing.detach()
            except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
                self._failure = error
                landing.detach()
            del item, data
            _return_memory()
            self._vacant.put(landing)
            self._finished.put(block.nth)
        self._blocks.end()


def _return_memory() -> None:
    """Return freed memory to the system: chunks of some MiB leave gaps in glibc's heaps, more with every block."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim:
        trim(0)


def _copy_on_cluster(
    copy: Copy,
    journal: Journal,
    scheduler: str,
    *,
    report: Callable[[int], object],
    received: Callable[[int], object] | None,
) -> None:
    with carried_along(paid=copy.usd > 0) as carried:
        tasks = (
            (copy.source, journal.place, block, journal.blocks.region(block.start, block.stop), carried)
            for block in journal.missing()
        )
        for nth, digest, n_bytes in run_on_cluster(scheduler, copy_block, tasks):
            journal.record(nth, digest)
            if received:
                received(n_bytes)
            report(nth)


def copy_block(
    source: Readable, place: Place, block: Block, region: tuple[slice, ...], carried: Carried
) -> tuple[int, bytes, int]:
    """Copy one block, in a worker: the same bytes to the same chunks, however often.

    Returns
    -------
    nth : int
    digest : bytes
    n_bytes : int
        That had to be fetched.
    """
    counts: list[int] = []
    landing = Landing()
    with carried.in_force(), place.explain_errors():
        try:
            data = _read(source, block, place, landing, counts.append)
            writer = BlockWriter(place)
            digest = writer.write(region, data)
            writer.end()
            landing.discard()
        finally:
            landing.detach()
    return block.nth, digest, sum(counts)
