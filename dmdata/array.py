"""An artifact as a lazy array: shape and dtype now, dollars before bytes, bytes when indexed.

Indexing plans the exact byte ranges, reserves their price, and fetches them into the answer. Arrays of a local Zarr
store (a run of dmpipeline, a mirror) are the same type and cost nothing. A `LazyArray` pickles as name, layout and
address, never with credentials, and its repr touches nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import zarr

from dmdata.catalog.roles import ModelRows
from dmdata.copying.mirror import DEFAULT_MEMORY_BYTES, Progress, plan_copy, require_budget, run_copy
from dmdata.copying.place import Place
from dmdata.errors import FormatError, IntegrityError
from dmdata.layout.formats import Layout
from dmdata.layout.plan import ReadPlan, plan_read, product_array
from dmdata.layout.selection import Selection, select
from dmdata.money.prices import (
    Destination,
    Estimate,
    PriceTable,
    Terms,
    destination_of,
    readable_bytes,
    usage_of,
)
from dmdata.reading.fetch import LEAST_RANGE_BYTES, MAX_RANGE_BYTES, Transport
from dmdata.reading.headers import forget_header
from dmdata.reading.pace import CONNECTIONS
from dmdata.reading.progress_bar import can_show, shown
from dmdata.reading.reader import Spool
from dmdata.settings import Settings, settings
from dmdata.views.array_protocols import ArrayProtocols
from dmdata.views.interop import to_dask, to_xarray
from dmdata.views.zarr_store import ArrayValues, Form, View

if TYPE_CHECKING:
    import dask.array
    import xarray

_LOCAL_GAP_BYTES = 64 << 10


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
            forget_header(self.transport.address)
            raise


@dataclass(frozen=True, slots=True)
class InZarr:
    """Elements in an array of a local Zarr store, free to read."""

    url: str

    def open(self) -> zarr.Array[Any]:
        """Open the array, read-only."""
        try:
            return zarr.open_array(self.url, mode="r")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{self.url} is not a readable Zarr array: {error}", url=self.url) from error

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
        try:
            product = np.asarray(self.open().oindex[wanted])
        except (OSError, ValueError, RuntimeError, SystemError) as error:
            raise FormatError(
                f"{self.url} has a damaged chunk ({error}); restore the store from a copy, or make it again",
                url=self.url,
            ) from error
        if progress:
            progress(product.nbytes)
        return selection.answer(product)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LazyArray(ArrayProtocols):
    """An array that is read when it is indexed. Made by `dmdata.open`.

    Its prices, its destination, the assumed link and the bound on what is kept are those that were set when it was
    opened; open it again after changing them. The budget, and whether to be offline, are looked up at every read; what
    the account used this month, and the prices of an array in a Zarr store, at every estimate.

    Attributes
    ----------
    name : str
        In its catalog, or the address it was opened by.
    dims : tuple of str
        Names of the dimensions, as ("model", "test_example").
    layout : Layout
        Where the elements lie; for a Zarr array, where they would lie in a ``.npy``, which is what it is priced by.
    body : InObject or InZarr
        Where they are read from.
    rows : ModelRows or None
        Which rows are models to fit on and which are held out, as the catalog says: ``masks[masks.rows.fit]``. None
        for what is opened by its address and is not a mirror, has no models along its first dimension, or has fewer
        rows than its catalog says.

    Examples
    --------
    >>> import dmdata
    >>> masks = dmdata.open("cifar/50pct/train_masks")  # doctest: +SKIP
    >>> masks.estimate(np.s_[:1000]).usd                # doctest: +SKIP
    0.0041924
    >>> masks.rows.evaluation                           # doctest: +SKIP
    slice(300000, 310000, None)
    """

    name: str
    dims: tuple[str, ...]
    layout: Layout
    body: InObject | InZarr
    rows: ModelRows | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""
        return self.layout.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of an element as it is read; numbers that NumPy does not have, as bfloat16, are read as float32."""
        return self.layout.read_dtype

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements as they are read; `layout.n_bytes` are those stored."""
        return self.size * self.dtype.itemsize

    @property
    def url(self) -> str:
        """Where the elements are."""
        return self.body.url

    @property
    def identity(self) -> str:
        """What distinguishes this object from a later one at the same address: address and etag."""
        etag = self.body.etag if isinstance(self.body, InObject) else None
        return f"{self.url} {etag}" if etag else self.url

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("an array without dimensions has no length; its shape is ()")
        return self.shape[0]

    def __getitem__(self, key: Any) -> npt.NDArray[Any]:
        """Read a selection as NumPy would return it; several index arrays are refused, see `oindex`.

        Raises
        ------
        SelectionError
            If it does not fit; nothing is read.
        BudgetError
            If it would cost more than a budget has left; nothing is read.
        IntegrityError
            If the object changed since it was opened.
        AccessError, SourceError
            If it cannot be read.
        """
        answer = self.read(select(key, self.shape, orthogonal=False))
        # as NumPy has it, an ellipsis asks for an array even of nothing but one element
        asks_array = any(part is Ellipsis for part in (key if isinstance(key, tuple) else (key,)))
        return answer if asks_array else answer[()]

    def __repr__(self) -> str:
        dims = ", ".join(f"{dim}: {size:,}" for dim, size in zip(self.dims, self.shape, strict=True))
        stored = f" from {self.layout.encoding}" if self.layout.encoding else ""
        n_bytes = readable_bytes(self.layout.n_bytes)
        return f"<LazyArray {self.name} ({dims}) {self.dtype}{stored}, {n_bytes} at {self.url}>"

    @property
    def oindex(self) -> "OrthogonalIndex":
        """Index each axis on its own: ``a.oindex[rows, columns]`` reads their product."""
        return OrthogonalIndex(self)

    def read(
        self,
        selection: Selection,
        *,
        progress: Callable[[int], object] | None = None,
        spool: Spool | None = None,
    ) -> npt.NDArray[Any]:
        """Read a selection made by `dmdata.layout.selection.select`; `progress` is called with bytes as they arrive.

        With a `spool` the answer is a view of its buffer, and ranges that it has are not fetched again.
        """
        return self.body.read(self.layout, selection, progress=progress, spool=spool)

    @property
    def slowest_axis(self) -> int:
        """The axis along which the bytes lie in slabs: 0 in C order."""
        return next(iter(self.layout.storage_order), 0)

    def planned(self, selection: Selection) -> ReadPlan | None:
        """Plan a selection as `read` with a spool carries it out, past what is kept; None for an array of a Zarr store.

        That one is not read by ranges.
        """
        return self.body.plan(self.layout, selection) if isinstance(self.body, InObject) else None

    def price_usd(self, n_bytes: int, n_requests: int) -> float:
        """Price what was planned, upper bound; 0 where reading is free."""
        return self.body.transport.price_usd(n_bytes, n_requests) if isinstance(self.body, InObject) else 0.0

    @property
    def is_local(self) -> bool:
        """Whether it lies on this machine, so that reading it again is quick and free."""
        return not isinstance(self.body, InObject) or self.body.transport.address.is_local

    def plan(self, key: Any = ..., *, to: str | None = None, prefer: Preference | None = None) -> ReadPlan:
        """Plan the byte ranges of a selection as a read from a release would ask for them, without reading anything.

        What is kept from earlier reads is left out: the plan is of what is missing.

        Parameters
        ----------
        key : index
            As in ``[]``; several index arrays mean their product.
        to : {"internet", "same-region", "cross-region"}, optional
            Where the bytes go; by default where the array was opened for.
        prefer : {"price", "speed"}, optional
            By default what the array was opened with.
        """
        selection = select(key, self.shape, orthogonal=True)
        terms = self._terms(to)
        if (prefer or (self.body.prefer if isinstance(self.body, InObject) else "price")) == "speed":
            return self._rest_of(fastest_plan(self.layout, selection, terms))
        return self._rest_of(cheapest_plan(self.layout, selection, terms))

    def _rest_of(self, plan: ReadPlan) -> ReadPlan:
        return self.body.rest_of(plan) if isinstance(self.body, InObject) else plan

    def _terms(self, to: str | None, known: Settings | None = None) -> Terms:
        if not isinstance(self.body, InObject):
            return Terms.in_force(to or Destination.INTERNET, known=known)
        terms = self.body.transport.terms
        return replace(terms, destination=destination_of(to)) if to else terms

    def estimate(
        self,
        key: Any = ...,
        *,
        to: str | None = None,
        used_gib: float | None = None,
        free_tier: bool | None = None,
    ) -> Estimate:
        """Price a selection before a byte moves: requests, bytes, dollars and seconds, cheapest and fastest.

        What is kept from earlier reads is left out. For a free source this is what the same read would cost from a
        release in a requester-pays bucket.

        Parameters
        ----------
        key : index
            As in ``[]``; several index arrays mean their product.
        to : {"internet", "same-region", "cross-region"}, optional
            Where the bytes go; by default where the array was opened for.
        used_gib : float, optional
            GB that the account sent to the internet this month; by default as set, else unknown.
        free_tier : bool, optional
            Whether the month's free GB are left but for these; by default as set, else not counted on.
        """
        selection = select(key, self.shape, orthogonal=True)
        known = settings()
        terms = replace(self._terms(to, known), usage=usage_of(used_gib, free_tier, known=known))
        table = self.body.transport.table if isinstance(self.body, InObject) else None
        return estimate_read(self.layout, selection, terms, rest_of=self._rest_of, table=table)

    def mirror(
        self,
        destination: str | Path,
        *,
        rows: Any = slice(None),
        columns: Any = slice(None),
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        scheduler: str | None = None,
        progress: Callable[[Progress], object] | Literal[False] | None = None,
    ) -> zarr.Array[Any]:
        """Copy the array, or some rows and columns of it, into a Zarr array; run again to resume.

        Parameters
        ----------
        destination : path or ``s3://bucket/prefix``
            Of the Zarr array.
        rows, columns : slice, number or index array
            Of the first two axes. Each stays an axis of the copy.
        memory_bytes : int
            Bound on the memory of the copy.
        scheduler : str, optional
            Address of a Dask scheduler whose workers copy the blocks, as ``tcp://host:8786``.
        progress : callable or False, optional
            Called with a `dmdata.Progress` after each block of rows. By default a bar is shown; with False none.

        Raises
        ------
        SelectionError, BudgetError
            Before any data.
        IntegrityError, AccessError, SourceError
            See `dmdata.copying.mirror.run_copy`; what is complete stays.
        """
        key = (rows, columns)[: self.ndim] if self.ndim > 1 else (rows,)
        selection = select(key, self.shape, orthogonal=True)
        copy = plan_copy(self, Place.of(destination), selection=selection, memory_bytes=memory_bytes)
        require_budget([copy])
        return run_copy(copy, scheduler=scheduler, progress=progress, received=None)

    def slabs(self, n_bytes: int) -> "LazyArray":
        """Show the stored bytes of the elements, in storage order, as slabs of `n_bytes`.

        Returns
        -------
        slabs : LazyArray of uint8, shape (self.layout.n_bytes // n_bytes, n_bytes)
            Read from the same object under the same budget.
        """
        layout = Layout((self.layout.n_bytes // n_bytes, n_bytes), np.dtype(np.uint8), self.layout.offset, (n_bytes, 1))
        return replace(self, dims=("slab", "byte"), layout=layout, rows=None)

    def to_zarr(self, form: Form = "blocks", *, block_rows: int | None = None) -> zarr.Array[Any]:
        """Show the array to code that only reads Zarr, without copying anything.

        Reads of it, by zarr or anything built on zarr, are requests under the budget.

        Parameters
        ----------
        form : {"blocks", "rows"}
            "blocks": chunks of whole rows, each read whole, in one request. "rows": shards of single rows, so that
            only the rows that are needed are read; rows under 4 KiB in groups of about that, since a request costs
            as much. For an array in Fortran order, columns.
        block_rows : int, optional
            Rows of a chunk, or of a shard; by default about 16 MiB, or 1 MiB.

        Returns
        -------
        array : zarr.Array
            Read-only, Zarr v3. For an array of a Zarr store, that array itself.

        Raises
        ------
        FormatError
            If Zarr v3 has no such data type.
        DmdataError
            If there is no such form, or a block would have no rows.
        """
        if isinstance(self.body, InZarr):
            return self.body.open()
        return zarr.open_array(View(ArrayValues(self, form, block_rows)), mode="r")

    def without_progress(self) -> "LazyArray":
        """Return the same array, whose reads show no progress bar, however long they take."""
        if not isinstance(self.body, InObject) or not self.body.shows_progress:
            return self
        return replace(self, body=replace(self.body, shows_progress=False))

    def to_dask(self, chunks: Any = None) -> "dask.array.Array":
        """Wrap as a dask array, by default in blocks of whole rows; needs ``dmdata[dask]``."""
        return to_dask(self.without_progress(), chunks)

    def to_xarray(self, chunks: Any = None) -> "xarray.DataArray":
        """Wrap as an xarray DataArray with named dimensions; needs ``dmdata[xarray]``."""
        return to_xarray(self.without_progress(), chunks)


@dataclass(frozen=True, slots=True)
class OrthogonalIndex:
    """``array.oindex``: each axis indexed on its own, as ``np.ix_`` would."""

    array: LazyArray

    def __getitem__(self, key: Any) -> npt.NDArray[Any]:
        return self.array.read(select(key, self.array.shape, orthogonal=True))


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


def estimate_read(
    layout: Layout,
    selection: Selection,
    terms: Terms,
    *,
    rest_of: Callable[[ReadPlan], ReadPlan] = lambda plan: plan,
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
    table : PriceTable, optional
        By default the prices of the terms.

    Returns
    -------
    estimate : Estimate
    """
    plans = (rest_of(cheapest_plan(layout, selection, terms)), rest_of(fastest_plan(layout, selection, terms)))
    cheapest, fastest = (terms.quote(plan.n_bytes, plan.n_requests, table=table) for plan in plans)
    return terms.estimate(cheapest, fastest, table=table)
