"""Where the elements of a lazy array are, and how a selection of them is read: an object, or a local Zarr array."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from dmdata.errors import FormatError, IntegrityError
from dmdata.layout.formats import HEAD_BYTES, Kind, Layout
from dmdata.layout.npy import npy_header
from dmdata.layout.plan import ReadPlan, land, plan_read, product_array
from dmdata.layout.selection import Selection
from dmdata.money.prices import Estimate, PriceTable, Terms
from dmdata.reading.fetch import LEAST_RANGE_BYTES, MAX_RANGE_BYTES, Transport
from dmdata.reading.headers import note_change, read_header
from dmdata.reading.pace import CONNECTIONS
from dmdata.reading.progress_bar import can_show, shown
from dmdata.reading.reader import Spool

_LOCAL_GAP_BYTES = 64 << 10
# elements that are read in the same request as the header in front of them
_MOST_BYTES_WITH_HEADER = 1 << 20


Preference: TypeAlias = Literal["price", "speed"]
"""What a read merges small gaps for: the fewest dollars, or the fewest seconds by the assumed link."""


@dataclass(frozen=True, slots=True)
class InObject:
    """Elements in one object, read by byte ranges; `etag` is that of the header's reading.

    With `cache`, what was paid for once is kept and not paid again: see `dmdata.reading.ranges`.
    """

    transport: Transport
    etag: str | None
    prefer: Preference = "price"
    shows_progress: bool = True
    cache: bool = True

    @property
    def url(self) -> str:
        """Where the object is, without user, password or query."""
        return str(self.transport.address)

    def plan(self, layout: Layout, selection: Selection) -> ReadPlan:
        """Plan a read as it is carried out where nothing is kept of it; from a free source always the quick way."""
        address = self.transport.address
        if address.is_local:
            return _plan(layout, selection, max_gap_bytes=_LOCAL_GAP_BYTES, least_range_bytes=LEAST_RANGE_BYTES)
        if self.prefer == "speed" or not self.transport.is_paid:
            return fastest_plan(layout, selection, self.transport.terms)
        return cheapest_plan(layout, selection, self.transport.terms)

    def rest_of(self, plan: ReadPlan) -> ReadPlan:
        """Leave out of a plan what is kept from earlier reads."""
        kept = self.transport.kept(self.etag) if self.cache else None
        return kept.rest_of(plan) if kept else plan

    def read(
        self,
        layout: Layout,
        selection: Selection,
        *,
        progress: Callable[[int], object] | None,
        spool: Spool | None = None,
    ) -> npt.NDArray[Any]:
        """Fetch a selection."""
        plan = self.plan(layout, selection)

        wanted = self.shows_progress and progress is None and can_show()
        rest = self.rest_of(plan) if wanted else plan

        def price() -> float:
            return self.transport.price_usd(rest.n_bytes, rest.n_requests)

        try:
            with shown(self.transport.artifact, rest.n_bytes, price, wanted=wanted) as arrived:
                octets = self.transport.fetch(
                    plan, etag=self.etag, progress=progress or arrived, spool=spool, cache=self.cache
                )
            return product_array(plan, octets)
        except IntegrityError:
            note_change(self.transport.address, self.etag)
            raise


@dataclass(frozen=True, slots=True)
class Unread:
    """Elements in one object whose header is not read yet: where they lie is not known, only what its catalog claims.

    Attributes
    ----------
    object : InObject
        The object, its etag unknown.
    kind : {"npy", "npz", "pt", "safetensors"}
    member : str
        The array in the object.
    """

    object: InObject
    kind: Kind
    member: str

    @property
    def url(self) -> str:
        """Where the object is, without user, password or query."""
        return self.object.url

    def header_cost(self, plan: ReadPlan) -> tuple[int, int]:
        """Count the bytes and requests that the header adds to a read; see `header_cost`."""
        transport = self.object.transport
        return header_cost(plan, self.kind, transport.terms, by_price=self._by_price)

    @property
    def _by_price(self) -> bool:
        return self.object.prefer == "price" and self.object.transport.is_paid

    def read_header(self, claimed: Layout, selection: Selection | None) -> "Found":
        """Read the header, and in the same request the selection where that is what follows it.

        Raises
        ------
        BudgetError
            Before the header, if it and the selection would not fit a budget.
        FormatError, AccessError, ObjectMissingError, SourceError
        """
        transport, plan, joined = self.object.transport, None, 0
        if selection is not None:
            plan = self.object.plan(claimed, selection)
            joined = joined_end(plan, self.kind, transport.terms, by_price=self._by_price)
            n_bytes, n_requests = self.header_cost(plan)
            transport.require_budget(n_bytes=plan.n_bytes + n_bytes, n_requests=plan.n_requests + n_requests)
        header = read_header(transport, kind=self.kind, wanted=self.member, first_bytes=joined)
        layout, state = header.layout_of(self.member, self.url), header.state
        body = replace(self.object, transport=replace(transport, charged=state.charged), etag=state.etag)
        if plan is None or layout != claimed or not joined or len(header.head) < joined:
            return Found(layout, body, None)
        received = np.frombuffer(header.head, np.uint8)
        product = np.empty(plan.wanted_bytes, np.uint8)
        land(plan.wanted, 0, received, product, 0)
        if body.cache:
            body.transport.keep(received, etag=state.etag)
        return Found(layout, body, product_array(plan, product))


@dataclass(frozen=True, slots=True)
class Found:
    """What reading a header found: where the elements lie, and those that came along with it, if any."""

    layout: Layout
    body: InObject
    answer: npt.NDArray[Any] | None


@dataclass(frozen=True, slots=True)
class InZarr:
    """Elements in an array of a local Zarr store, free to read.

    Attributes
    ----------
    url : str
        Path of the array.
    mirrors : str or None
        Address of the object that it was found to be a complete mirror of, by the object's name.
    is_copy : bool
        Whether dmdata copied it, which writes every chunk: one that is gone is damage then, not zeros.
    """

    url: str
    mirrors: str | None = None
    is_copy: bool = False

    def open(self) -> zarr.Array[Any]:
        """Open the array, read-only."""
        try:
            return zarr.open_array(_EveryChunk(self.url, read_only=True) if self.is_copy else self.url, mode="r")
        except (OSError, ValueError, KeyError, TypeError) as error:
            remedy = "; open it with local=False to read what it mirrors" if self.mirrors else ""
            raise FormatError(f"{self.url} is not a readable Zarr array: {error}{remedy}", url=self.url) from error

    def read(
        self,
        layout: Layout,
        selection: Selection,
        *,
        progress: Callable[[int], object] | None,
        spool: Spool | None = None,
    ) -> npt.NDArray[Any]:
        """Read a selection; it is free, so a spool would save nothing and is not used."""
        del spool
        if selection.n_elements == 0:
            return np.empty(selection.shape, layout.dtype)
        wanted = tuple(
            slice(indices.start, indices.stop, indices.step) if isinstance(indices, range) else indices
            for indices in selection.distinct
        )
        product = self.rows(self.open(), wanted)
        if progress:
            progress(product.nbytes)
        return selection.answer(product)

    def rows(self, array: zarr.Array[Any], key: Any) -> npt.NDArray[Any]:
        """Read a product of axes.

        Raises
        ------
        FormatError
            If a chunk of it is damaged or gone.
        """
        try:
            return np.asarray(array.oindex[key])
        except (OSError, ValueError, RuntimeError, SystemError) as error:
            raise FormatError(
                f"{self.url} has a damaged chunk ({error}); restore the store from a copy, or make it again",
                url=self.url,
            ) from error


@dataclass(frozen=True, slots=True)
class AsNpy:
    """Bytes of the ``.npy`` that an array of a local Zarr store is a mirror of: its header, then its elements.

    Attributes
    ----------
    copy : InZarr
    dtype : numpy.dtype
        Of the elements in the ``.npy``, byte order included.
    """

    copy: InZarr
    dtype: np.dtype[Any]

    @property
    def url(self) -> str:
        """Path of the array."""
        return self.copy.url

    @property
    def mirrors(self) -> str | None:
        """Address of the ``.npy``."""
        return self.copy.mirrors

    def read(
        self,
        layout: Layout,
        selection: Selection,
        *,
        progress: Callable[[int], object] | None,
        spool: Spool | None = None,
    ) -> npt.NDArray[Any]:
        """Make up a selection of the bytes; it is free, so a spool would save nothing and is not used."""
        del spool
        plan = _plan(layout, selection, max_gap_bytes=_LOCAL_GAP_BYTES, least_range_bytes=MAX_RANGE_BYTES)
        product = np.empty(plan.wanted_bytes, np.uint8)
        array = self.copy.open()
        for ranges in plan.batches():
            landings = plan.wanted.landing(ranges[:, 0])
            for (start, stop), at in zip(ranges.tolist(), landings.tolist(), strict=True):
                land(plan.wanted, start, self._octets(array, start, stop), product, at)
        if progress:
            progress(plan.n_bytes)
        return product_array(plan, product)

    def _octets(self, array: zarr.Array[Any], start: int, stop: int) -> npt.NDArray[np.uint8]:
        header = np.frombuffer(npy_header(array.shape, self.dtype), np.uint8)
        row_bytes = max(math.prod(array.shape[1:]) * self.dtype.itemsize, 1)
        first = max(start - len(header), 0) // row_bytes
        last = -(-max(stop - len(header), 0) // row_bytes)
        rows = self.copy.rows(array, slice(first, last) if array.shape else ...)
        elements = np.ascontiguousarray(rows, self.dtype).reshape(-1).view(np.uint8)
        before = header[start:stop]
        at = max(start - len(header), 0) - first * row_bytes
        return np.concatenate([before, elements[at : at + stop - start - len(before)]])


class _EveryChunk(LocalStore):
    """A store of an array that has all of its chunks: to Zarr one that is gone would be zeros."""

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read a value; None only where it is no chunk."""
        return self._there(key, await super().get(key, prototype, byte_range))

    def get_sync(self, key: str, **options: Any) -> Buffer | None:
        """Do as `get` does, for a newer zarr."""
        found: Buffer | None = super().get_sync(key, **options)
        return self._there(key, found)

    @staticmethod
    def _there(key: str, found: Buffer | None) -> Buffer | None:
        if found is None and key.partition("/")[0] == "c":
            raise OSError(f"chunk {key} is gone")
        return found


def cheapest_plan(layout: Layout, selection: Selection, terms: Terms) -> ReadPlan:
    """Plan a read for the fewest dollars: gaps are fetched where that costs less than another request.

    A short read is split for concurrency all the same, down to 4 MiB a range, for 0.1% of its price at most.
    """
    gap = terms.prices.break_even_gap_bytes(terms.destination)
    return _plan(layout, selection, max_gap_bytes=gap, least_range_bytes=LEAST_RANGE_BYTES)


def fastest_plan(layout: Layout, selection: Selection, terms: Terms) -> ReadPlan:
    """Plan a read for the fewest seconds by the assumed link: gaps are fetched where a request would take longer."""
    link = terms.link
    gap = int(link.break_even_gap_bytes)
    merged = _plan(layout, selection, max_gap_bytes=gap, least_range_bytes=gap)
    if merged.n_requests == 1 and merged.n_bytes == merged.wanted_bytes:
        return merged  # as the cheapest is
    plans = (merged, cheapest_plan(layout, selection, terms))
    return min(plans, key=lambda plan: link.seconds(plan.n_bytes, plan.n_requests))


def _plan(layout: Layout, selection: Selection, *, max_gap_bytes: float, least_range_bytes: int) -> ReadPlan:
    return plan_read(
        layout,
        selection,
        max_gap_bytes=max_gap_bytes,
        max_range_bytes=MAX_RANGE_BYTES,
        n_at_once=CONNECTIONS,
        least_range_bytes=least_range_bytes,
    )


def header_cost(plan: ReadPlan, kind: Kind, terms: Terms, *, by_price: bool = True) -> tuple[int, int]:
    """Count the bytes and requests that a header adds to a read, as far as is known before it is read.

    One of several arrays has some kilobytes more, which are read once for all of them and not counted.
    """
    joined = joined_end(plan, kind, terms, by_price=by_price)
    return (joined - plan.n_bytes, 0) if joined else (HEAD_BYTES["npy"], 1)


def joined_end(plan: ReadPlan, kind: Kind, terms: Terms, *, by_price: bool) -> int:
    """Return where a read ends that is one request together with the header; 0 where the header is read on its own."""
    if kind != "npy" or plan.n_requests != 1:
        return 0
    ((start, stop),) = plan.ranges.tolist()
    gap = terms.prices.break_even_gap_bytes(terms.destination) if by_price else terms.link.break_even_gap_bytes
    return stop if stop <= _MOST_BYTES_WITH_HEADER and start - HEAD_BYTES["npy"] <= gap else 0


def no_header(plan: ReadPlan) -> tuple[int, int]:  # noqa: ARG001 - as one that adds something
    """Add nothing to a plan: the header was read."""
    return 0, 0


def estimate_read(
    layout: Layout,
    selection: Selection,
    terms: Terms,
    *,
    rest_of: Callable[[ReadPlan], ReadPlan] = lambda plan: plan,
    header_cost: Callable[[ReadPlan], tuple[int, int]] = no_header,
    table: PriceTable | None = None,
) -> Estimate:
    """Price a read the cheapest way and the fastest way.

    Parameters
    ----------
    layout : Layout
    selection : Selection
    terms : Terms
    rest_of : callable
        Leaves out of a plan what need not be read.
    header_cost : callable
        Counts the bytes and requests that a header adds to a plan.
    table : PriceTable, optional
        By default the prices of the terms.

    Returns
    -------
    estimate : Estimate
    """
    plans = (rest_of(cheapest_plan(layout, selection, terms)), rest_of(fastest_plan(layout, selection, terms)))
    totals = [(plan.n_bytes + extra[0], plan.n_requests + extra[1]) for plan in plans for extra in [header_cost(plan)]]
    cheapest, fastest = (terms.quote(n_bytes, n_requests, table=table) for n_bytes, n_requests in totals)
    return terms.estimate(cheapest, fastest, table=table)
