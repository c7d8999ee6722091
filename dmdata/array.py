"""An artifact as a lazy array: shape and dtype now, dollars before bytes, bytes when indexed.

Indexing plans the exact byte ranges, reserves their price, and fetches them into the answer. Arrays of a local Zarr
store (a run of dmpipeline, a mirror) are the same type and cost nothing. A `LazyArray` pickles as name, layout and
address, never with credentials, and its repr touches nothing.
"""

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import zarr

from dmdata.bodies import (
    AsNpy,
    Found,
    InObject,
    InZarr,
    Preference,
    Unread,
    cheapest_plan,
    estimate_read,
    fastest_plan,
    no_header,
)
from dmdata.catalog.roles import ModelRows
from dmdata.copying.mirror import DEFAULT_MEMORY_BYTES, Progress, plan_copy, require_budget, run_copy
from dmdata.copying.place import Place
from dmdata.copying.registry import entered
from dmdata.errors import BudgetError, SelectionError
from dmdata.layout.formats import Layout
from dmdata.layout.plan import ReadPlan
from dmdata.layout.selection import Selection, select
from dmdata.money.prices import Destination, Estimate, Terms, destination_of, readable_bytes, usage_of
from dmdata.reading.reader import Spool
from dmdata.settings import Settings, settings
from dmdata.shown import as_html, sizes_in_words
from dmdata.views.array_protocols import ArrayProtocols
from dmdata.views.interop import to_dask, to_xarray
from dmdata.views.zarr_store import ArrayValues, Form, View

if TYPE_CHECKING:
    import dask.array
    import xarray


class CatalogMismatchWarning(UserWarning):
    """An object's header and its catalog disagree; the header is believed."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LazyArray(ArrayProtocols):
    """An array that is read when it is indexed. Made by `dmdata.open`.

    What a catalog lists has the shape, dtype and dimensions that the catalog claims until something of it is read. The
    header is read then, or by `read_header`; where it says otherwise, a `CatalogMismatchWarning` names both, and the
    array is what its header says from then on.

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
    body : InObject, Unread, InZarr or AsNpy
        Where they are read from; `Unread` until the header is known.
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
    body: InObject | Unread | InZarr | AsNpy
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
        """What distinguishes this object from a later one at the same address: address and etag. Reads the header."""
        body = self.read_header().body
        etag = body.etag if isinstance(body, InObject) else None
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
        answer = self._read(key, orthogonal=False)
        # as NumPy has it, an ellipsis asks for an array even of nothing but one element
        asks_array = any(part is Ellipsis for part in (key if isinstance(key, tuple) else (key,)))
        return answer if asks_array else answer[()]

    def __repr__(self) -> str:
        dims = ", ".join(f"{dim}: {size:,}" for dim, size in zip(self.dims, self.shape, strict=True))
        stored = f" from {self.layout.encoding}" if self.layout.encoding else ""
        n_bytes = readable_bytes(self.layout.n_bytes)
        at = "from the local mirror" if self._mirrors else "at"
        return f"<LazyArray {self.name} ({dims}) {self.dtype}{stored}, {n_bytes} {at} {self.url}>"

    def _repr_html_(self) -> str:
        paid = self._object is not None and self._object.transport.is_paid
        roles = {"to fit on": self.rows.fit, "held out": self.rows.evaluation} if self.rows else {}
        there = (f"{part.start:,} to {part.stop:,} {role}" for role, part in roles.items() if part.start < part.stop)
        facts = {
            "shape": sizes_in_words(self.shape, self.dims) or "a single element",
            "dtype": f"{self.dtype} from {self.layout.encoding}" if self.layout.encoding else str(self.dtype),
            "size": readable_bytes(self.layout.n_bytes),
            "models": ", ".join(there) or None,
            "local mirror" if self._mirrors else "at": self.url,
            "reading": "is charged: see .estimate(...)" if paid else "is free",
        }
        return as_html(f"LazyArray {self.name}", facts)

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

        Raises
        ------
        SelectionError
            If the header, read just now, shows that the selection was made of another shape than the array has.
        """
        body, answer = self.body, None
        if isinstance(body, Unread):
            answer = self._settle(body, selection)
        if selection.array_shape != self.shape:
            raise SelectionError(
                f"{self.name} has shape {self.shape}, and not {selection.array_shape} as its catalog claims, of which "
                "the selection was made; select again, or open it again",
                shape=self.shape,
            )
        return self._body_read(selection, progress, spool) if answer is None else answer

    def _read(self, key: Any, *, orthogonal: bool) -> npt.NDArray[Any]:
        """Read what a key selects: of the array as it is, whatever its catalog claims."""
        # the body first: once another thread has read the header, the shape that is selected from is the true one
        body = self.body
        selection = select(key, self.shape, orthogonal=orthogonal)
        if isinstance(body, Unread):
            answer = self._settle(body, selection)
            if answer is not None:
                return answer
            selection = select(key, self.shape, orthogonal=orthogonal)
        return self._body_read(selection, None, None)

    def _body_read(
        self, selection: Selection, progress: Callable[[int], object] | None, spool: Spool | None
    ) -> npt.NDArray[Any]:
        body = self.body
        assert not isinstance(body, Unread)  # noqa: S101 - its header has just been read
        try:
            return body.read(self.layout, selection, progress=progress, spool=spool)
        except BudgetError as error:
            raise error.with_traceback(None) from None  # where it was refused is of no use to who raises the budget

    def read_header(self) -> Self:
        """Read the object's header now, if that was not done yet, and return the array itself.

        Raises
        ------
        FormatError
            If the object is damaged, or is not of the kind that its catalog claims.
        BudgetError, AccessError, ObjectMissingError, SourceError
            If it cannot be read.
        """
        if isinstance(body := self.body, Unread):
            self._settle(body, None)
        return self

    def _settle(self, body: Unread, selection: Selection | None) -> npt.NDArray[Any] | None:
        """Become what the header says, and return the selection if that came along with it."""
        claimed = self.layout
        if selection is not None and selection.array_shape != claimed.shape:
            selection = None  # another thread has read the header meanwhile
        try:
            found = body.read_header(claimed, selection)
        except BudgetError as error:
            raise error.with_traceback(None) from None
        layout = found.layout
        if not layout.is_alike(claimed) and isinstance(self.body, Unread):
            warn_of_mismatch(self.name, self.url, claimed, layout, stacklevel=4)
        self._become(found)
        return found.answer

    def _become(self, found: Found) -> None:
        dims, rows = described_rows(self.dims, self.rows, found.layout.shape)
        # the body last: another thread that sees it sees the rest
        for name, value in (("dims", dims), ("rows", rows), ("layout", found.layout), ("body", found.body)):
            object.__setattr__(self, name, value)

    @property
    def slowest_axis(self) -> int:
        """The axis along which the bytes lie in slabs: 0 in C order."""
        return next(iter(self.layout.storage_order), 0)

    def planned(self, selection: Selection) -> ReadPlan | None:
        """Plan a selection as `read` with a spool carries it out, past what is kept; None for an array of a Zarr store.

        That one is not read by ranges.
        """
        body = self.read_header().body
        return body.plan(self.layout, selection) if isinstance(body, InObject) else None

    def price_usd(self, n_bytes: int, n_requests: int) -> float:
        """Price what was planned, upper bound; 0 where reading is free."""
        object_ = self._object
        return object_.transport.price_usd(n_bytes, n_requests) if object_ else 0.0

    @property
    def _object(self) -> InObject | None:
        """The object that it is read from, whatever is known of it; None for an array of a Zarr store."""
        body = self.body.object if isinstance(self.body, Unread) else self.body
        return body if isinstance(body, InObject) else None

    @property
    def _mirrors(self) -> str | None:
        """Address of the object that a local mirror stands for; None where none does."""
        return self.body.mirrors if isinstance(self.body, InZarr | AsNpy) else None

    @property
    def is_local(self) -> bool:
        """Whether it lies on this machine, so that reading it again is quick and free."""
        object_ = self._object
        return object_ is None or object_.transport.address.is_local

    def plan(self, key: Any = ..., *, to: str | None = None, prefer: Preference | None = None) -> ReadPlan:
        """Plan the byte ranges of a selection as a read from a release would ask for them, without reading any.

        What is kept from earlier reads is left out: the plan is of what is missing. Where the elements lie is in the
        header, which is read now if it was not yet.

        Parameters
        ----------
        key : index
            As in ``[]``; several index arrays mean their product.
        to : {"internet", "same-region", "cross-region"}, optional
            Where the bytes go; by default where the array was opened for.
        prefer : {"price", "speed"}, optional
            By default what the array was opened with.
        """
        selection = select(key, self.read_header().shape, orthogonal=True)
        terms = self._terms(to)
        if (prefer or (self.body.prefer if isinstance(self.body, InObject) else "price")) == "speed":
            return self._rest_of(fastest_plan(self.layout, selection, terms))
        return self._rest_of(cheapest_plan(self.layout, selection, terms))

    def _rest_of(self, plan: ReadPlan) -> ReadPlan:
        return self.body.rest_of(plan) if isinstance(self.body, InObject) else plan

    def _terms(self, to: str | None, known: Settings | None = None) -> Terms:
        object_ = self._object
        if object_ is None:
            return Terms.in_force(to or Destination.INTERNET, known=known)
        terms = object_.transport.terms
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

        What is kept from earlier reads is left out, and the header is counted until it is read. For a free source this
        is what the same read would cost from a release in a requester-pays bucket; only what is read from the local
        mirror of such a release is free here, too.

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
        if self._mirrors:
            nothing = terms.quote(0, 0)
            return terms.estimate(nothing, nothing)
        table = self._object.transport.table if self._object else None
        header_cost = self.body.header_cost if isinstance(self.body, Unread) else no_header
        return estimate_read(self.layout, selection, terms, rest_of=self._rest_of, header_cost=header_cost, table=table)

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
        with self.entered(copy.place):
            return run_copy(copy, scheduler=scheduler, progress=progress, received=None)

    def entered(self, place: Place) -> AbstractContextManager[None]:
        """Have a mirror of it that the block makes found by its name from then on; see `dmdata.copying.registry`."""
        object_ = self._object
        return entered(object_.transport.address, self.name, place) if object_ else nullcontext()

    def slabs(self, n_bytes: int) -> "LazyArray":
        """Show the stored bytes of the elements, in storage order, as slabs of `n_bytes`.

        Returns
        -------
        slabs : LazyArray of uint8, shape (self.layout.n_bytes // n_bytes, n_bytes)
                Read from the same object under the same budget. The header is read now, if it was not yet.
        """
        self.read_header()
        layout = Layout((self.layout.n_bytes // n_bytes, n_bytes), np.dtype(np.uint8), self.layout.offset, (n_bytes, 1))
        return replace(self, dims=("slab", "byte"), layout=layout, rows=None)

    def to_zarr(self, form: Form = "blocks", *, block_rows: int | None = None) -> zarr.Array[Any]:
        """Show the array to code that only reads Zarr, without copying anything.

        Reads of it, by zarr or anything built on zarr, are requests under the budget. The header is read now, if it was
        not yet.

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
        return zarr.open_array(View(ArrayValues(self.read_header(), form, block_rows)), mode="r")

    def without_progress(self) -> "LazyArray":
        """Return the same array, whose reads show no progress bar, however long they take."""
        if self._object is None or not self._object.shows_progress:
            return self
        return self.with_options(shows_progress=False)

    def with_options(self, **options: Any) -> "LazyArray":
        """Return the same array with other options of `InObject`; one of a Zarr store has none."""
        if isinstance(self.body, Unread):
            return replace(self, body=replace(self.body, object=replace(self.body.object, **options)))
        return replace(self, body=replace(self.body, **options)) if isinstance(self.body, InObject) else self

    def to_dask(self, chunks: Any = None) -> "dask.array.Array":
        """Wrap as a dask array, by default in blocks of whole rows; needs ``dmdata[dask]``.

        The header is read now, if it was not yet: once, not by each worker.
        """
        return to_dask(self.read_header().without_progress(), chunks)

    def to_xarray(self, chunks: Any = None) -> "xarray.DataArray":
        """Wrap as an xarray DataArray with named dimensions; needs ``dmdata[xarray]``. It reads the header now."""
        return to_xarray(self.read_header().without_progress(), chunks)


@dataclass(frozen=True, slots=True)
class OrthogonalIndex:
    """``array.oindex``: each axis indexed on its own, as ``np.ix_`` would."""

    array: LazyArray

    def __getitem__(self, key: Any) -> npt.NDArray[Any]:
        return self.array._read(key, orthogonal=True)


def warn_of_mismatch(name: str, url: str, claimed: Layout, found: Layout, *, stacklevel: int) -> None:
    """Warn that an object is not what its catalog claims."""
    warnings.warn(
        f"the catalog says {name} has shape {claimed.shape} and dtype {claimed.encoding or claimed.dtype}; the object "
        f"at {url} has shape {found.shape} and dtype {found.encoding or found.dtype}, and is believed",
        CatalogMismatchWarning,
        stacklevel=stacklevel + 1,
    )


def numbered_dims(n: int) -> tuple[str, ...]:
    """Name dimensions of which nothing is known."""
    return tuple(f"dim_{axis}" for axis in range(n))


def described_rows(
    dims: tuple[str, ...], rows: ModelRows | None, shape: tuple[int, ...]
) -> tuple[tuple[str, ...], ModelRows | None]:
    """Take names of dimensions and roles of rows, as far as they are true of an array of this shape."""
    if len(dims) != len(shape):
        return numbered_dims(len(shape)), None
    if rows is None or dims[:1] != ("model",) or shape[0] < max(rows.fit.stop, rows.evaluation.stop):
        return dims, None
    return dims, rows
