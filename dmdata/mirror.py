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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import zarr

from dmdata.cluster import Carried, carried_along, run_on_cluster
from dmdata.errors import DmdataError, FormatError
from dmdata.journal import JOURNAL, Block, Blocks, BlockWriter, Journal, Original, has_mirror, open_copy
from dmdata.ledger import Ledger, home
from dmdata.place import Place
from dmdata.plan import ReadPlan
from dmdata.progress_bar import shown
from dmdata.reader import Spool
from dmdata.selection import Selection
from dmdata.spool import Landing, read_key, sweep

__all__ = ["DEFAULT_MEMORY_BYTES", "JOURNAL", "Progress", "Readable", "mirror", "missing_reads"]

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


def mirror(
    source: Readable,
    destination: Path | str | Place,
    *,
    selection: Selection,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    scheduler: str | None = None,
    progress: Callable[[Progress], object] | Literal[False] | None = None,
    received: Callable[[int], object] | None = None,
) -> zarr.Array[Any]:
    """Copy an array, or a product of its axes, into a Zarr array.

    Parameters
    ----------
    source : Readable
    destination : path or ``s3://bucket/prefix``
        Of the Zarr array; where an unfinished copy of the same is there, it is gone on with.
    selection : Selection
        Of the source's shape. Every axis stays one: a number selects a slab of one.
    memory_bytes : int
        Bound on the memory of a copy, on a cluster of each of its tasks; decides the rows of a block.
    scheduler : str, optional
        Address of a Dask scheduler, whose workers then copy the blocks; this process keeps the journal.
    progress : callable or False, optional
        Called after each block; else a bar is shown, or with False none.
    received : callable, optional
        Called with the number of bytes that arrived since the last call, from any thread.

    Returns
    -------
    copy : zarr.Array
        Complete.

    Raises
    ------
    BudgetError
        If a budget would not let it end; before any data.
    FormatError
        If Zarr has no data type for its elements; before any data.
    IntegrityError
        If the destination holds the copy of an object that has changed since.
    DmdataError
        If the destination holds something else, cannot be written, or another process is copying to it.
    AccessError, SourceError
        From the source; what has landed by then stays.
    """
    require_zarr_dtype(source.name, source.dtype)
    place = Place.of(destination)
    selection = replace(selection, kept=tuple(range(len(selection.axes))))
    with place.explain_errors(), place.claimed() as hold_on:
        journal = _open_or_create(source, place, selection, memory_bytes)
        reads = _distinct(journal.blocks, journal.missing())
        n_bytes, usd = _price(source, reads)
        if usd:
            Ledger(home()).check(usd=usd, artifact=source.name)

        sweep(place.spool_directory())
        n_rows = journal.n_rows_complete

        def report(nth: int) -> None:
            nonlocal n_rows
            hold_on()
            n_rows += journal.blocks[nth].stop - journal.blocks[nth].start
            if progress:
                progress(Progress(n_rows, journal.blocks.n_rows))

        with shown(source.name, n_bytes, lambda: usd, wanted=progress is None and received is None) as arrived:
            if reads and scheduler:
                _copy_on_cluster(source, journal, scheduler, paid=usd > 0, report=report, received=received or arrived)
            elif reads:
                _copy_here(source, journal, report=report, received=received or arrived)
        shutil.rmtree(place.spool_directory(), ignore_errors=True)
        return open_copy(place, "r+")


def require_zarr_dtype(name: str, dtype: np.dtype[Any], **facts: Any) -> None:
    """Refuse an array whose elements Zarr cannot store, before anything of it is read.

    Raises
    ------
    FormatError
        If Zarr v3 has no such data type, as for dates, text and records.
    """
    if dtype.kind not in "biufc" or dtype.itemsize > (16 if dtype.kind == "c" else 8):
        raise FormatError(
            f"{name} has dtype {str(dtype)[:200]}, for which Zarr v3 has no data type; index the array itself, or "
            "download its object by dmdata get",
            **facts,
        )


def missing_reads(
    destination: Path | str | Place, selection: Selection, *, name: str, itemsize: int, axis: int, memory_bytes: int
) -> list[tuple[Selection, int]]:
    """List the reads that a copy still needs: all of them where there is none yet. Asks nothing of the source.

    Parameters
    ----------
    destination : path or ``s3://bucket/prefix``
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
    place = Place.of(destination)
    try:
        with place.explain_errors("read"):
            journal = Journal.load(place) if has_mirror(place) else None
        if journal and journal.original.artifact == name and journal.blocks.selection.digest == selection.digest:
            return _distinct(journal.blocks, journal.missing())
    except DmdataError:
        pass  # something else, which the copy itself will refuse
    blocks = Blocks.cut(selection, axis=axis, itemsize=itemsize, memory_bytes=memory_bytes)
    return _distinct(blocks, (blocks[nth] for nth in range(len(blocks))))


def _price(source: Readable, reads: list[tuple[Selection, int]]) -> tuple[int, float]:
    """Add up the bytes that will arrive, and price them."""
    n_bytes = n_requests = n_local = 0
    for selection, count in reads:
        plan = source.planned(selection)
        if plan is not None:
            n_bytes, n_requests = n_bytes + count * plan.n_bytes, n_requests + count * plan.n_requests
        else:
            n_local += count * selection.n_elements * source.dtype.itemsize
    return n_bytes + n_local, source.price_usd(n_bytes, n_requests)


def _distinct(blocks: Blocks, missing: Iterable[Block]) -> list[tuple[Selection, int]]:
    """Count blocks that cost the same: where rows are evenly spaced, all with as many of them."""
    if blocks.selection.axes and not isinstance(blocks.selection.axes[blocks.axis], range):
        return [(block.selection, 1) for block in missing]
    counts: Counter[int] = Counter()
    examples: dict[int, Selection] = {}
    for block in missing:
        counts[block.stop - block.start] += 1
        examples.setdefault(block.stop - block.start, block.selection)
    return [(examples[n_rows], count) for n_rows, count in counts.items()]


def _open_or_create(source: Readable, place: Place, selection: Selection, memory_bytes: int) -> Journal:
    original = Original(source.name, source.identity, source.shape, str(source.dtype))
    if has_mirror(place):
        open_copy(place, "r+")
        journal = Journal.load(place)
        journal.require_same(original, selection)
        return journal
    itemsize = source.dtype.itemsize
    blocks = Blocks.cut(selection, axis=source.slowest_axis, itemsize=itemsize, memory_bytes=memory_bytes)
    blocks.require_memory(source.name, itemsize=itemsize, memory_bytes=memory_bytes)
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
            data = _read(source, block, journal.place, landing, received)
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
        """End the thread: after all blocks, or after the one it is writing if it may take only so long."""
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
    """Give back what was freed: chunks of a few mebibytes leave gaps in glibc's heaps, more with every block."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim:
        trim(0)


def _copy_on_cluster(
    source: Readable,
    journal: Journal,
    scheduler: str,
    *,
    paid: bool,
    report: Callable[[int], object],
    received: Callable[[int], object] | None,
) -> None:
    with carried_along(paid=paid) as carried:
        tasks = (
            (source, journal.place, block, journal.blocks.region(block.start, block.stop), carried)
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
