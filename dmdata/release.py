"""Names to arrays: open, price, download and mirror what a catalog lists.

The catalog is, in this order: the one handed in, ``DMDATA_CATALOG``, the published release's. It may be a file, a
folder with a ``catalog.yaml``, or the URL of one, so that what was regenerated here, what another lab published and
what the authors released are opened by the same call.
"""

import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, get_args
from urllib.parse import urlsplit

import numpy as np
import zarr
import zarr.errors

from dmdata.address import Address
from dmdata.array import InObject, InZarr, LazyArray, Preference, estimate_read
from dmdata.catalog import Artifact, Catalog, bundled, load_file
from dmdata.download import START_BYTES, bytes_complete, download, n_requests_of
from dmdata.errors import CatalogError, DmdataError, FormatError, SelectionError
from dmdata.fetch import Transport
from dmdata.formats import NPY_PREFIX_BYTES, Layout, contiguous_strides
from dmdata.headers import NPY, Header, known_charge, read_header
from dmdata.ledger import Ledger, home
from dmdata.mirror import DEFAULT_MEMORY_BYTES, Progress, missing_reads
from dmdata.mirror import mirror as mirror_array
from dmdata.place import Place
from dmdata.prices import ANY_MONTH, Destination, Estimate, Usage, destination_of, price_table, quote, usage_of
from dmdata.selection import Selection, parse_selection, select
from dmdata.settings import settings

CatalogLike: TypeAlias = Catalog | str | os.PathLike[str] | None

_LONGEST_CATALOG_BYTES = 4 << 20


class CatalogMismatchWarning(UserWarning):
    """An object's header and its catalog disagree; the header is believed."""


def load_catalog(catalog: CatalogLike = None) -> Catalog:
    """Find the catalog to use.

    Parameters
    ----------
    catalog : Catalog, path or URL, optional
        By default ``DMDATA_CATALOG``, else the config file's, else the published release's, which is in the package.

    Raises
    ------
    CatalogError
        If it cannot be read or is not valid.
    """
    if isinstance(catalog, Catalog):
        return catalog
    where = os.fspath(catalog) if catalog is not None else settings().catalog
    if not where:
        return bundled()
    if "://" not in where:
        return load_file(where)
    url = where if where.endswith((".yaml", ".yml")) else f"{where.rstrip('/')}/catalog.yaml"
    text, state = Transport(_address_of_url(url), artifact=url).start(_LONGEST_CATALOG_BYTES)
    if state.n_bytes > len(text):
        raise CatalogError(f"{url} has {state.n_bytes} bytes; a catalog has at most {_LONGEST_CATALOG_BYTES}")
    return Catalog.parse(text.decode("utf-8", errors="replace"), origin=url)


def open(  # noqa: A001 - dmdata.open reads like the builtin it stands for
    name: str | os.PathLike[str],
    *,
    catalog: CatalogLike = None,
    to: str | None = None,
    prefer: Preference = "price",
) -> LazyArray:
    """Open an artifact by its name, or an array by its address. Reads the object's header, once.

    Parameters
    ----------
    name : str or path
        ``dataset/alpha/array`` of a catalog, as "cifar/50pct/test_margins"; or a path or URL of a ``.npy``, of an
        array inside a ``.pt`` ("x.pt/weight"), or of a Zarr array.
    catalog : Catalog, path or URL, optional
        See `load_catalog`.
    to : {"internet", "same-region", "cross-region"}, optional
        Where the bytes go: decides their price and how ranges are merged. By default as set, else the internet.
    prefer : {"price", "speed"}
        What paid reads are planned for: the fewest dollars or the fewest seconds; `LazyArray.estimate` shows both.

    Raises
    ------
    CatalogError
        If the name is unknown; lists the nearest.
    FormatError
        If the object is damaged or is not what it says.
    BudgetError, AccessError, ObjectMissingError, SourceError
        If the header cannot be read.
    """
    name = os.fspath(name)
    destination = destination_of(to)
    if prefer not in get_args(Preference):
        raise SelectionError(f"prefer={prefer!r}; choose {' or '.join(get_args(Preference))}")
    if _is_address(name):
        return _open_address(name, destination, prefer)
    artifact = load_catalog(catalog).find(name)
    if artifact.schema is None:
        members = ", ".join(f"{name}/{member}" for member in artifact.stored.members)
        raise CatalogError(f"{name} holds several arrays; open one of {members}", name=name)
    return _open_artifact(artifact, destination, prefer)


def open_object(name: str, *, catalog: CatalogLike = None, to: str | None = None) -> LazyArray:
    """Open an object of a catalog as the bytes it is, header included. Reads its header, once.

    Parameters
    ----------
    name : str
        Of a ``.npy`` or a whole ``.pt``.
    catalog, to
        As in `open`.

    Returns
    -------
    octets : LazyArray of uint8, shape (size of the object,)

    Raises
    ------
    CatalogError
        If the name is unknown, or is of a part of an object or of an array in a Zarr store.
    FormatError, BudgetError, AccessError, ObjectMissingError, SourceError
        As in `open`.
    """
    artifact = load_catalog(catalog).find(name)
    if artifact.stored.format == "zarr":
        raise CatalogError(f"{name} is an array of a Zarr store, not one object; open it by dmdata.open", name=name)
    if artifact.member:
        raise CatalogError(f"{name} is a part of the object {artifact.object_name}; open that", name=name)
    transport = Transport(address_of(artifact), artifact.name, destination_of(to), prices=artifact.source.prices)
    state = read_header(transport, kind=artifact.stored.format).state
    layout = Layout((state.n_bytes,), np.dtype(np.uint8), 0, (1,))
    return LazyArray(artifact.name, ("byte",), layout, InObject(transport, state.etag))


def estimate(
    patterns: str | Sequence[str],
    *,
    select: Any = None,
    exclude: Sequence[str] = (),
    to: str | None = None,
    catalog: CatalogLike = None,
    used_gib: float | None = None,
    free_tier: bool | None = None,
) -> Estimate:
    """Price artifacts by the catalog alone: no network, no credentials.

    Parameters
    ----------
    patterns : str or sequence of str
        Names or globs.
    select : index or str, optional
        What is read of each; by default all of it. As text: "0:1000,42".
    exclude : sequence of str
        Names or globs to leave out.
    to : {"internet", "same-region", "cross-region"}
    catalog : Catalog, path or URL, optional
    used_gib : float, optional
        GB that the account sent to the internet this month; by default as set, else unknown.
    free_tier : bool, optional
        Whether the month's free GB are left but for these; by default as set, else not counted on.

    Returns
    -------
    total : Estimate
        Of all together; the price of a gigabyte falls and the free tier is met only once.
    """
    usage = usage_of(used_gib, free_tier)
    priced = price_artifacts(load_catalog(catalog).match(patterns, exclude=exclude), key=select, to=to, usage=usage)
    return total_of([price for _, price in priced], to=to, usage=usage)


def price_artifacts(
    artifacts: Sequence[Artifact], *, key: Any = None, to: str | None = None, usage: Usage = ANY_MONTH
) -> list[tuple[Artifact, Estimate]]:
    """Price a selection of each artifact, or all of it, by what its catalog claims, header included.

    By default as a budget will reckon, which knows nothing of the month.
    """
    priced = []
    for artifact in artifacts:
        if key is None:
            n_requests = n_requests_of(artifact.n_bytes) + 1
            priced.append((artifact, _same_both_ways(artifact.n_bytes, n_requests, to=to, usage=usage)))
            continue
        if artifact.schema is None:
            raise SelectionError(f"{artifact.name} holds several arrays; select from {artifact.name}/weight")
        layout = _claimed_layout(artifact)
        selection = _parsed(key, layout.shape)
        data = estimate_read(layout, selection, to=destination_of(to), usage=usage)
        total = _totalled([(data, 1)], to=to, usage=usage, extra_bytes=NPY_PREFIX_BYTES, extra_requests=1)
        priced.append((artifact, total))
    return priced


def price_mirror(
    artifacts: Sequence[Artifact],
    destination: str | os.PathLike[str],
    *,
    key: Any,
    to: str | None,
    memory_bytes: int,
    alone: bool,
) -> list[tuple[Artifact, Estimate]]:
    """Price what a mirror still lacks, by what the catalog claims and what is complete at its destination."""
    priced, target = [], Place.of(destination)
    for artifact in artifacts:
        layout = _claimed_layout(artifact)
        reads = missing_reads(
            target if alone else target / artifact.name,
            _parsed(key, layout.shape),
            name=artifact.name,
            itemsize=layout.dtype.itemsize,
            axis=max(range(len(layout.shape)), key=lambda axis: layout.strides[axis], default=0),
            memory_bytes=memory_bytes,
        )
        data = [(estimate_read(layout, selection, to=destination_of(to)), count) for selection, count in reads]
        priced.append((artifact, _totalled(data, to=to, extra_bytes=NPY_PREFIX_BYTES, extra_requests=1)))
    return priced


def price_download(artifact: Artifact, path: Path, *, to: str | None) -> list[tuple[Artifact, Estimate]]:
    """Price what a download still lacks, by what the catalog claims and what is complete beside its final name."""
    n_missing = max(artifact.n_bytes - bytes_complete(path), 0)
    n_bytes = n_missing + START_BYTES["pt" if artifact.stored.format == "pt" else "npy"]
    return [(artifact, _same_both_ways(n_bytes, n_requests_of(n_missing) + 1, to=to))]


def arrays_of(artifacts: Sequence[Artifact], catalog: Catalog) -> list[Artifact]:
    """List the arrays among artifacts and inside them."""
    return [
        array
        for artifact in artifacts
        for array in (
            [artifact]
            if artifact.schema is not None
            else [catalog.find(f"{artifact.name}/{member}") for member in artifact.stored.members]
        )
    ]


def total_of(
    estimates: Sequence[Estimate], *, to: str | None = None, usage: Usage = ANY_MONTH, with_headers: int = 0
) -> Estimate:
    """Price several reads together, and the headers of so many objects."""
    parts = [(estimate, 1) for estimate in estimates]
    extra_bytes = with_headers * NPY_PREFIX_BYTES
    return _totalled(parts, to=to, usage=usage, extra_bytes=extra_bytes, extra_requests=with_headers)


def reader_pays(name: str, catalog: Catalog) -> bool:
    """Tell whether whoever reads an artifact, or an array at an address, pays for it; asks nothing of it."""
    if not _is_address(name):
        return is_paid(catalog.find(name))
    address = _address_of_url(name)
    # an endpoint of one's own says whether it charges when it is first read; until then it may
    return Transport(address, name, charged=known_charge(address)).is_paid


def is_paid(artifact: Artifact) -> bool:
    """Tell whether reads of an artifact count: its reader is charged, or its source has prices of its own."""
    return Transport(address_of(artifact), artifact.name, prices=artifact.source.prices).is_paid


def mirror(
    patterns: str | Sequence[str],
    destination: str | os.PathLike[str],
    *,
    rows: Any = slice(None),
    columns: Any = slice(None),
    key: Any = None,
    exclude: Sequence[str] = (),
    to: str | None = None,
    catalog: CatalogLike = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    scheduler: str | None = None,
    progress: Callable[[str, Progress], object] | None = None,
    received: Callable[[str, int], object] | None = None,
) -> zarr.Array[Any] | zarr.Group:
    """Copy artifacts into a Zarr store; run again to resume.

    Parameters
    ----------
    patterns : str or sequence of str
        One exact name makes the destination that array; globs or several names make it a group in which each array
        has its full name.
    destination : path or ``s3://bucket/prefix``
    rows, columns : slice, number or index array
        Of the first two axes of each.
    key : index or str, optional
        Of all axes of each, in place of `rows` and `columns`; as text "0:1000,0:50".
    exclude, to, catalog
        As in `estimate`.
    memory_bytes : int
        Bound on the memory of the copy; on a cluster of each thread's.
    scheduler : str, optional
        Address of a Dask scheduler whose workers copy the blocks, as ``tcp://host:8786``; see `dmdata.cluster`.
    progress : callable, optional
        Called with an artifact's name and a `dmdata.mirror.Progress`, after each block.
    received : callable, optional
        Called with an artifact's name and the bytes that arrived since the last call, from any thread.

    Raises
    ------
    CatalogError, SelectionError, BudgetError, IntegrityError, AccessError, SourceError
        What is complete stays.
    """
    known = load_catalog(catalog)
    names = [patterns] if isinstance(patterns, str) else list(patterns)
    artifacts = arrays_of(known.match(names, exclude=exclude), known)
    target = Place.of(destination)
    alone = mirrored_alone(names, artifacts)
    work = []
    for artifact in artifacts:
        array = _open_artifact(artifact, destination_of(to))
        selection = _parsed(key if key is not None else (rows, columns)[: array.ndim], array.shape)
        work.append((array, target if alone else target / artifact.name, selection))
    _require_budget(work, memory_bytes)
    if not alone:
        with target.explain_errors():
            group = zarr.open_group(target.store(), mode="a")
            for array, *_ in work:
                group.require_group(array.name.rpartition("/")[0])
    for array, place, selection in work:
        copy = mirror_array(
            array,
            place,
            selection=selection,
            memory_bytes=memory_bytes,
            scheduler=scheduler,
            progress=progress and partial(progress, array.name),
            received=received and partial(received, array.name),
        )
    return copy if alone else group


def mirrored_alone(patterns: Sequence[str], artifacts: Sequence[Artifact]) -> bool:
    """Tell whether a mirror of these is one array, not a group: one artifact, named exactly."""
    return len(artifacts) == 1 and list(patterns) == [artifacts[0].name]


def download_path(artifact: Artifact, destination: str | os.PathLike[str] | None) -> Path:
    """Say where `get` puts an object: a file, or its own name in a folder."""
    own_name = artifact.stored.key.rpartition("/")[2]
    path = Path(destination or own_name)
    return path / own_name if path.is_dir() else path


def get(
    name: str,
    destination: str | os.PathLike[str] | None = None,
    *,
    to: str | None = None,
    catalog: CatalogLike = None,
    progress: Callable[[int, int], object] | None = None,
) -> Path:
    """Download an object as it is; run again to resume.

    Parameters
    ----------
    name : str
        Of an artifact; for an array inside a ``.pt``, the whole ``.pt``.
    destination : path, optional
        File or existing folder; by default the object's own name in the working directory.
    to, catalog
        As in `open`.
    progress : callable, optional
        Called with bytes complete and bytes in all.

    Returns
    -------
    path : Path
        The complete file, its size, digest (where catalogued) and header checked.

    Raises
    ------
    FormatError, IntegrityError
        If the object is damaged or changed meanwhile; nothing is left under the final name.
    """
    artifact = load_catalog(catalog).find(name)
    path = download_path(artifact, destination)
    if artifact.stored.format == "zarr":
        raise CatalogError(f"{name} is an array of a Zarr store, not one object; use dmdata mirror {name}")
    if path.exists():
        raise DmdataError(f"{path} exists; remove it, or name another file")
    transport = Transport(address_of(artifact), artifact.object_name, destination_of(to), prices=artifact.source.prices)
    download(transport, path, kind=artifact.stored.format, sha256=artifact.stored.sha256, progress=progress)
    return path


def _parsed(key: Any, shape: tuple[int, ...]) -> Selection:
    if isinstance(key, str):
        return parse_selection(key, shape)
    return select(... if key is None else key, shape, orthogonal=True)


def _require_budget(work: Sequence[tuple[LazyArray, Place, Selection]], memory_bytes: int) -> None:
    """Refuse copies of several arrays, before any data, if a budget would not let all of them end."""
    usd = 0.0
    for array, place, selection in work:
        reads = missing_reads(
            place,
            selection,
            name=array.name,
            itemsize=array.dtype.itemsize,
            axis=array.slowest_axis,
            memory_bytes=memory_bytes,
        )
        for part, count in reads:
            if plan := array.planned(part):
                usd += array.price_usd(count * plan.n_bytes, count * plan.n_requests)
    if usd:
        Ledger(home()).check(usd=usd, artifact=", ".join(array.name for array, *_ in work))


def _same_both_ways(n_bytes: int, n_requests: int, *, to: str | None, usage: Usage = ANY_MONTH) -> Estimate:
    way = quote(n_bytes, n_requests, destination_of(to), usage=usage)
    return Estimate(way, way, destination_of(to), price_table().date)


def _totalled(
    estimates: Sequence[tuple[Estimate, int]],
    *,
    to: str | None,
    usage: Usage = ANY_MONTH,
    extra_bytes: int = 0,
    extra_requests: int = 0,
) -> Estimate:
    """Price several reads together, each as many times as is said."""

    def together(way: str) -> Any:
        quotes = [(getattr(estimate, way), count) for estimate, count in estimates]
        n_bytes = sum(q.n_bytes * count for q, count in quotes) + extra_bytes
        n_requests = sum(q.n_requests * count for q, count in quotes) + extra_requests
        return quote(n_bytes, n_requests, destination_of(to), usage=usage)

    ways = together("cheapest"), together("fastest")
    # part by part the fastest splits ranges for connections that all parts together keep busy anyway
    fastest = min(reversed(ways), key=lambda way: way.seconds)
    return Estimate(ways[0], fastest, destination_of(to), price_table().date)


def _claimed_layout(artifact: Artifact) -> Layout:
    """Lay an artifact out as its catalog claims it to be."""
    if artifact.schema is None:
        return Layout((artifact.n_bytes,), np.dtype(np.uint8), 0, (1,))
    return _as_npy(artifact.schema.shape, np.dtype(artifact.schema.dtype))


def _as_npy(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Layout:
    return Layout(shape, dtype, NPY_PREFIX_BYTES, contiguous_strides(shape, dtype.itemsize))


def address_of(artifact: Artifact) -> Address:
    """Say where an artifact's object is, and on what terms."""
    source = artifact.source
    return Address(artifact.url, source.requester_pays, source.region, listed=True)


def _address_of_url(url: str) -> Address:
    # whoever reads from S3 by address pays: as its requester, or as its owner
    return Address(url if "://" in url else os.path.abspath(os.path.expanduser(url)), url.startswith("s3://"))


def _is_address(name: str) -> bool:
    return "://" in name or name.startswith(("/", "./", "../", "~")) or bool(re.search(r"\.(npy|zarr|pt)(/|$)", name))


def _open_address(name: str, destination: Destination, prefer: Preference) -> LazyArray:
    inside_pt = re.fullmatch(r"(.*\.pt)/([^/]+)", name)
    url, member = inside_pt.groups() if inside_pt else (name, NPY)
    address = _address_of_url(url)
    if address.is_local and not address.url.endswith((".npy", ".pt")):
        return _open_zarr(name, address.url, dims=None)
    shown = f"{address}/{member}" if member else str(address)
    transport = Transport(address, shown, destination)
    header = read_header(transport, kind="pt" if urlsplit(url).path.endswith(".pt") else "npy")
    layout = _layout_named(header.layouts, member, str(address))
    return LazyArray(shown, _numbered_dims(len(layout.shape)), layout, _in_object(transport, header, prefer))


def _in_object(transport: Transport, header: Header, prefer: Preference) -> InObject:
    return InObject(replace(transport, charged=header.state.charged), header.state.etag, prefer)


def _open_artifact(artifact: Artifact, destination: Destination, prefer: Preference = "price") -> LazyArray:
    schema = artifact.schema
    if schema is None:
        raise CatalogError(f"{artifact.name} holds several arrays", name=artifact.name)
    if artifact.stored.format == "zarr":
        array = _open_zarr(artifact.name, artifact.url, dims=schema.dims)
    else:
        transport = Transport(address_of(artifact), artifact.name, destination, prices=artifact.source.prices)
        header = read_header(transport, kind=artifact.stored.format)
        layout = _layout_named(header.layouts, artifact.member or NPY, artifact.url)
        # a header with other dimensions than the catalog's is believed, but then their names are not known
        dims = schema.dims if len(schema.dims) == len(layout.shape) else _numbered_dims(len(layout.shape))
        array = LazyArray(artifact.name, dims, layout, _in_object(transport, header, prefer))
    if array.shape != schema.shape or array.dtype != np.dtype(schema.dtype):
        warnings.warn(
            f"the catalog says {artifact.name} has shape {schema.shape} and dtype {schema.dtype}; the object at "
            f"{artifact.url} has shape {array.shape} and dtype {array.dtype}, and is believed",
            CatalogMismatchWarning,
            stacklevel=3,
        )
    return array


def _open_zarr(name: str, url: str, *, dims: tuple[str, ...] | None) -> LazyArray:
    body = InZarr(url)
    opened = body.open()
    named = getattr(opened.metadata, "dimension_names", None)  # Zarr v2 has none
    if dims is None or len(dims) != opened.ndim:
        numbered = _numbered_dims(opened.ndim)
        dims = tuple(given or number for given, number in zip(named or numbered, numbered, strict=True))
    return LazyArray(name, dims, _as_npy(opened.shape, np.dtype(opened.dtype)), body)


def _numbered_dims(n: int) -> tuple[str, ...]:
    return tuple(f"dim_{axis}" for axis in range(n))


def _layout_named(layouts: dict[str, Layout], member: str, url: str) -> Layout:
    if member in layouts:
        return layouts[member]
    names = ", ".join(layouts)
    if member:
        raise FormatError(f"{url} holds no array {member!r}; it holds {names}", url=url)
    raise CatalogError(f"{url} holds several arrays; open one of {names}, as {url}/{next(iter(layouts))}", url=url)
