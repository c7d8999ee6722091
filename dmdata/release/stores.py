"""Arrays of local Zarr stores: of a run, a mirror, or anybody's, and mirrors under the names of what they stand for."""

from dataclasses import replace

import numpy as np
import zarr

from dmdata.array import LazyArray, described_rows, numbered_dims
from dmdata.bodies import AsNpy, InZarr
from dmdata.catalog.entries import Artifact
from dmdata.catalog.roles import ModelRows
from dmdata.copying.journal import JOURNAL, Journal
from dmdata.copying.place import Place
from dmdata.errors import CatalogError, FormatError
from dmdata.layout.formats import NPY_PREFIX_BYTES, Layout
from dmdata.layout.layouts import listed
from dmdata.release.catalogs import address_of
from dmdata.release.mirrors import arrays_in, local_mirror
from dmdata.release.pricing import as_npy


def open_mirror(artifact: Artifact, path: str) -> LazyArray:
    """Open the local mirror of an artifact under the artifact's own name."""
    assert artifact.schema is not None  # noqa: S101 - only arrays have mirrors
    array = open_zarr(artifact.name, path, dims=artifact.schema.dims)
    assert isinstance(array.body, InZarr)  # noqa: S101 - as it was opened
    dims, rows = described_rows(array.dims, rows_of(artifact), array.shape)
    body = replace(array.body, mirrors=str(address_of(artifact)))
    return replace(array, body=body, dims=dims, rows=rows or array.rows)


def octets_of_mirror(artifact: Artifact) -> LazyArray | None:
    """Show the bytes of a ``.npy`` by its local mirror; None where there is none, or it was not as NumPy writes it."""
    if artifact.stored.format != "npy" or (path := local_mirror(artifact)) is None:
        return None
    array, journal = open_mirror(artifact, path), Journal.load(Place(path))
    dtype, n_bytes = np.dtype(journal.original.dtype), NPY_PREFIX_BYTES + array.nbytes
    if n_bytes != artifact.stored.n_bytes or (journal.blocks.axis and array.size) or not isinstance(array.body, InZarr):
        return None
    layout = Layout((n_bytes,), np.dtype(np.uint8), 0, (1,))
    return LazyArray(array.name, ("byte",), layout, AsNpy(array.body, dtype))


def open_zarr(name: str, url: str, *, dims: tuple[str, ...] | None) -> LazyArray:
    """Open an array of a local Zarr store.

    Raises
    ------
    CatalogError
        If it is a group; names what is in it.
    FormatError
        If it is not a readable Zarr array.
    """
    try:
        opened = InZarr(url).open()
    except FormatError:
        if of_group := _of_group(name, url):
            raise of_group from None
        raise
    named = getattr(opened.metadata, "dimension_names", None)  # Zarr v2 has none
    if dims is None or len(dims) != opened.ndim:
        numbered = numbered_dims(opened.ndim)
        dims = tuple(given or number for given, number in zip(named or numbered, numbered, strict=True))
    journal = opened.attrs.get(JOURNAL)
    rows = ModelRows.from_dict(journal.get("rows")) if isinstance(journal, dict) else None
    body = InZarr(url, is_copy=isinstance(journal, dict))
    return LazyArray(name, dims, as_npy(opened.shape, np.dtype(opened.dtype)), body, rows)


def rows_of(artifact: Artifact) -> ModelRows | None:
    """Take what the catalog says of an array's rows."""
    rows = artifact.rows
    return ModelRows(slice(*rows.fit), slice(*rows.evaluation), rows.n_retrainings) if rows else None


def _of_group(name: str, url: str) -> CatalogError | None:
    """State what a Zarr group holds; None where there is none."""
    try:
        paths = [path for path, _ in arrays_in(zarr.open_group(url, mode="r"))]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    calls = [f"{name.rstrip('/')}/{path}" for path in sorted(paths)]
    if not calls:
        return CatalogError(f"{name} is a Zarr group without arrays; name an array, or mirror into it", name=name)
    return CatalogError(
        f"{name} holds {len(calls)} arrays; open one of them by dmdata.open({calls[0]!r})"
        + (f", or {listed(calls[1:])}" if calls[1:] else ""),
        name=name,
        nearest=calls,
    )
