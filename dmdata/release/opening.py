"""Names to arrays: open, price and describe what a catalog lists or an address leads to.

What was regenerated here, what another lab published and what the authors released are opened by the same call.
"""

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args
from urllib.parse import unquote

import numpy as np

from dmdata.array import LazyArray, described_rows, numbered_dims, warn_of_mismatch
from dmdata.bodies import InObject, Preference, Unread
from dmdata.catalog.catalogued import artifact_below, catalog_below
from dmdata.catalog.entries import ArraySchema, Artifact, Basis, Catalog, SourceEntry, StoredArray
from dmdata.catalog.locate import is_address, path_of, url_and_member
from dmdata.errors import CatalogError, FormatError, SelectionError, SourceError
from dmdata.layout.formats import HEAD_BYTES, Layout, kind_by_bytes, kind_by_suffix
from dmdata.money.prices import Estimate, Terms, usage_of
from dmdata.objects.address import Address, ObjectState
from dmdata.reading.fetch import Transport
from dmdata.reading.headers import NPY, Header, forget_header, known_charge, read_header, remembered_header
from dmdata.release.catalogs import CatalogLike, address_at, address_of, in_force, load_catalog
from dmdata.release.mirrors import is_mirrored, local_mirror
from dmdata.release.pricing import claimed_layout, price_artifacts, price_header, total_of
from dmdata.release.stores import octets_of_mirror, open_mirror, open_zarr, rows_of
from dmdata.settings import settings

__all__ = [
    "CatalogLike",
    "address_at",
    "address_named",
    "address_of",
    "describe",
    "describe_whole",
    "estimate",
    "in_force",
    "is_paid",
    "load_catalog",
    "look_up",
    "matching",
    "object_named",
    "open",
    "open_artifact",
    "open_object",
    "price_headers",
    "price_reading",
    "read_is_paid",
    "reader_pays",
    "transport_to",
]


def open(  # noqa: A001 - dmdata.open reads like the builtin it stands for
    name: str | os.PathLike[str],
    *,
    catalog: CatalogLike = None,
    to: str | None = None,
    prefer: Preference = "price",
    progress: bool = True,
    cache: bool = True,
    local: bool | None = None,
) -> LazyArray:
    """Open an artifact by its name, or an array by its address.

    Of what a catalog lists nothing is read, and no credentials are needed: shape, dtype and price are as the catalog
    claims, until the header is read together with the first elements. At an address the header is read now, once.

    The array keeps the prices and the destination that are set now; see `LazyArray`.

    Parameters
    ----------
    name : str or path
        ``dataset/alpha/array`` of a catalog, as "cifar/50pct/test_margins"; the same behind the path of a folder that
        has a ``catalog.yaml``, as "export/digits/50pct/test_margins"; or a path or URL of a ``.npy``, of an array
        inside a ``.pt``, ``.pth``, ``.npz`` or ``.safetensors`` ("x.pt/model/fc.weight"), or of a Zarr array. A
        `pathlib.Path` is never looked up in `catalog`.
    catalog : Catalog, path or URL, optional
        See `load_catalog`.
    to : {"internet", "same-region", "cross-region"}, optional
        Where the bytes go: decides their price and how ranges are merged. By default as set, else the internet.
    prefer : {"price", "speed"}
        What paid reads are planned for: the fewest dollars or the fewest seconds; `LazyArray.estimate` shows both.
    progress : bool
        Whether reads that take longer than two seconds show a progress bar, at a terminal or in a notebook.
    cache : bool
        Whether bytes that were paid for are kept, and not paid again. False goes past what is kept.
    local : bool, optional
        Whether the name of what was mirrored whole on this machine opens the mirror, which is free to read: by default
        as the setting ``local_mirrors``, which is on. See `register_mirror`.

    Raises
    ------
    CatalogError
        If the name is unknown; lists the nearest.
    FormatError
        If the object is damaged or is not of the kind it claims.
    BudgetError, AccessError, ObjectMissingError, SourceError
        If the header of what is at an address cannot be read.

    Warns
    -----
    LocalMirrorWarning
        Where a local mirror is entered that cannot be used: it is gone, not whole, not complete, or of an earlier
        version of the object. Once a process; then the object is read, at its price.
    """
    is_path, name, known = isinstance(name, os.PathLike), os.fspath(name), settings()
    terms, catalog = in_force(to, catalog, known=known)
    if prefer not in get_args(Preference):
        raise SelectionError(f"prefer={prefer!r}; choose {' or '.join(get_args(Preference))}")
    artifact = artifact_below(name) if is_path or is_address(name) else _listed_or_local(name, catalog)
    if artifact is None:
        array = _open_address(name, terms, prefer)
    elif artifact.schema is None:
        members = ", ".join(f"{name}/{member}" for member in artifact.stored.members)
        raise CatalogError(f"{name} holds several arrays; open one of {members}", name=name)
    else:
        path = local_mirror(artifact) if (known.local_mirrors if local is None else local) else None
        array = open_artifact(artifact, terms, prefer) if path is None else open_mirror(artifact, path)
    return array.with_options(shows_progress=progress, cache=cache)


def _listed_or_local(name: str, catalog: CatalogLike) -> Artifact | None:
    """Find an artifact by its name, or by a path into a folder with a catalog; None for another local path."""
    try:
        return load_catalog(catalog).find(name)
    except CatalogError:
        if (artifact := artifact_below(name)) is not None:
            return artifact
        if os.path.exists(name):
            return None
        raise


def open_object(
    name: str | os.PathLike[str], *, catalog: CatalogLike = None, to: str | None = None, local: bool | None = None
) -> LazyArray:
    """Open an object as the bytes it is, header included. Reads its header, once.

    Those of a ``.npy`` that was mirrored whole on this machine are made up of the mirror.

    Parameters
    ----------
    name : str or path
        Of a ``.npy``, or of a whole ``.pt``, ``.npz`` or ``.safetensors``; in the catalog, or an address.
    catalog, to, local
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
    known = settings()
    terms, catalog = in_force(to, catalog, known=known)
    is_path, name = isinstance(name, os.PathLike), os.fspath(name)
    artifact = artifact_below(name) if is_path or is_address(name) else _listed_or_local(name, catalog)
    if artifact is None:
        url, member = url_and_member(name)
        if member:
            raise CatalogError(f"{name} is a part of the object {address_at(url)}; open that", name=name)
        address = address_at(url)
        transport = Transport(address, str(address), terms)
        return _octets(transport, read_header(transport, kind=kind_by_suffix(path_of(url))))
    if artifact.stored.format == "zarr":
        raise CatalogError(f"{name} is an array of a Zarr store, not one object; open it by dmdata.open", name=name)
    if artifact.member:
        raise CatalogError(f"{name} is a part of the object {artifact.object_name}; open that", name=name)
    if (known.local_mirrors if local is None else local) and (octets := octets_of_mirror(artifact)) is not None:
        return octets
    transport = transport_to(artifact, artifact.name, terms)
    return _octets(transport, read_header(transport, kind=artifact.stored.format))


def _octets(transport: Transport, header: Header) -> LazyArray:
    layout = Layout((header.state.n_bytes,), np.dtype(np.uint8), 0, (1,))
    return LazyArray(transport.artifact, ("byte",), layout, InObject(transport, header.state.etag))


def estimate(
    patterns: str | Sequence[str],
    *,
    select: Any = None,
    exclude: Sequence[str] = (),
    to: str | None = None,
    catalog: CatalogLike = None,
    used_gib: float | None = None,
    free_tier: bool | None = None,
    local: bool | None = None,
) -> Estimate:
    """Price artifacts by the catalog alone: no network, no credentials. Of an address the header is read.

    What `open` would read from a local mirror costs nothing.

    Parameters
    ----------
    patterns : str or sequence of str
        Names, globs or addresses.
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
    local : bool, optional
        As in `open`.

    Returns
    -------
    total : Estimate
        Of all together; the price of a gigabyte falls with use, and the free tier is counted once.

    Raises
    ------
    CatalogError, SelectionError
    FormatError, BudgetError, AccessError, ObjectMissingError, SourceError
        If the header of an address cannot be read.
    """
    known = settings()
    terms, catalog = in_force(to, catalog, known=known)
    artifacts = look_up(patterns, terms, exclude=exclude, catalog=catalog)
    terms = replace(terms, usage=usage_of(used_gib, free_tier, known=known))
    is_local = known.local_mirrors if local is None else local
    return total_of([price for _, price in price_reading(artifacts, terms, key=select, local=is_local)], terms)


def price_reading(
    artifacts: Sequence[Artifact], terms: Terms, *, key: Any = None, local: bool | None = None
) -> list[tuple[Artifact, Estimate]]:
    """Price a selection of each artifact, or all of it, as `open` would read it: nothing where that is a mirror."""
    nothing, local = terms.quote(0, 0), settings().local_mirrors if local is None else local
    priced = []
    for artifact in artifacts:
        if local and is_mirrored(artifact):
            priced.append((artifact, terms.estimate(nothing, nothing)))
        else:
            priced += price_artifacts([artifact], terms, key=key)
    return priced


def reader_pays(name: str, catalog: Catalog, terms: Terms) -> bool:
    """Return whether the reader of an artifact, or of an array at an address, pays for it; asks nothing of it."""
    if not is_address(name):
        return is_paid(catalog.find(name), terms)
    return _counts(address_at(name), terms)


def read_is_paid(artifact: Artifact, terms: Terms) -> bool:
    """Return whether reads of an artifact count when it is opened by its name; not those of its local mirror."""
    return is_paid(artifact, terms) and not (settings().local_mirrors and is_mirrored(artifact))


def is_paid(artifact: Artifact, terms: Terms) -> bool:
    """Return whether reads of an artifact count: its reader is charged, or its source has prices of its own."""
    if artifact.at is not None:
        return _counts(address_at(artifact.at), terms)
    return transport_to(artifact, artifact.name, terms).is_paid


def _counts(address: Address, terms: Terms) -> bool:
    # an endpoint of one's own says whether it charges when it is first read; until then it may
    return Transport(address, str(address), terms, charged=known_charge(address)).is_paid


def transport_to(artifact: Artifact, name: str, terms: Terms) -> Transport:
    """Make the way to an artifact's object, on the terms of the reader and at the prices of its catalog."""
    return Transport(address_of(artifact), name, terms, prices=artifact.source.prices)


def address_named(name: str) -> Address:
    """Find where the object at an address is, without the member that it may name."""
    return address_at(url_and_member(name)[0])


def look_up(
    patterns: str | Sequence[str], terms: Terms, *, exclude: Sequence[str] = (), catalog: CatalogLike = None
) -> list[Artifact]:
    """Find artifacts by names and globs in the catalog, then describe what lies at addresses.

    Parameters
    ----------
    patterns : str or sequence of str
    terms : Terms
        By which headers of addresses are read.
    exclude : sequence of str
        Names or globs to leave out of what the catalog lists.
    catalog
        As in `open`.

    Raises
    ------
    CatalogError
        If a name or glob matches nothing.
    FormatError, BudgetError, AccessError, ObjectMissingError, SourceError
        If the header of an address cannot be read.
    """
    wanted = list(dict.fromkeys([patterns] if isinstance(patterns, str) else patterns))
    listed, others = matching(wanted, exclude=exclude, catalog=catalog)
    return listed + [describe(pattern, terms)[0] for pattern in others]


def matching(
    patterns: Sequence[str], *, exclude: Sequence[str] = (), catalog: CatalogLike = None
) -> tuple[list[Artifact], list[str]]:
    """Find what names and globs match in the catalog, and paths in the catalogs of local folders they lead through.

    Parameters
    ----------
    patterns, exclude, catalog
        As in `look_up`. What ends before it names an artifact, as "cifar/50pct" or a path to such a folder, stands for
        all below it.

    Returns
    -------
    artifacts, others : lists of Artifact and of str
        `others` are the addresses among the patterns, of which nothing was read.

    Raises
    ------
    CatalogError
        If a name, glob or path matches nothing.
    """
    names: list[str] = []
    others: list[str] = []
    below: list[Artifact] = []
    for pattern in patterns:
        found = catalog_below(pattern)
        if found is not None and (is_address(pattern) or not load_catalog(catalog).has(pattern)):
            known, name = found
            whole = [name] if name and known.has(name) else [f"{name}/**".lstrip("/")]
            below += known.match(whole, exclude=exclude)
        else:
            (others if is_address(pattern) else names).append(pattern)
    if not names:
        return below, others
    known = load_catalog(catalog)
    names, out = ([_with_all_below(known, name) for name in some] for some in (names, exclude))
    return known.match(names, exclude=out) + below, others


def _with_all_below(known: Catalog, pattern: str) -> str:
    """Have the name of a dataset or an alpha, as "cifar" or "cifar/50pct/", stand for the artifacts below it."""
    all_below = f"{pattern.rstrip('/')}/**"
    return all_below if pattern.strip("/") and not known.has(pattern) and known.has(all_below) else pattern


def describe(name: str, terms: Terms, *, whole: bool = False) -> tuple[Artifact, ObjectState | None]:
    """Describe what lies at an address as a catalog would, by its header, which is read.

    Parameters
    ----------
    name : str
    terms : Terms
    whole : bool
        Whether the object will be downloaded as it is, so that what cannot be read by ranges is found too.

    Returns
    -------
    artifact : Artifact
        Its format is "bytes" where the object is not of a kind whose arrays are read.
    state : ObjectState or None
        As the source has just answered; None where the header was remembered, or is not read by ranges.

    Raises
    ------
    CatalogError
        If the object has no such member.
    FormatError, BudgetError, AccessError, ObjectMissingError, SourceError
    """
    url, member = url_and_member(name)
    address, kind = address_at(url), kind_by_suffix(path_of(url))
    if kind is None and address.is_local and address.local_path.is_dir():
        array = open_zarr(name, str(address.local_path), dims=None)
        stored = ObjectState(array.layout.n_bytes, None)
        return _described(address, None, "zarr", stored, {NPY: array.layout}), None
    transport = Transport(address, str(address), terms)
    begun = None
    if kind is None:
        head, state = begun = transport.start(HEAD_BYTES["npy"])
        try:
            kind = kind_by_bytes(head, object_bytes=state.n_bytes, url=str(address))
        except FormatError:
            return _described(address, None, "bytes", state, {}), state
    try:
        header = read_header(transport, kind=kind, wanted=None, begun=begun)
    except SourceError as error:
        if whole and error.by_download:
            return _described(address, None, kind, ObjectState(0, None), {}), None
        raise
    if member:
        header.layout_of(member, str(address))
    state_now = None if header.is_remembered else header.state
    return _described(address, member, kind, header.state, header.layouts), state_now


def describe_whole(name: str, terms: Terms, *, catalog: CatalogLike = None) -> tuple[Artifact, ObjectState | None]:
    """Describe the object at an address, to be downloaded as it is; see `describe`.

    It may lead through a local folder with a catalog, which then describes it.
    """
    listed, _ = matching([name], catalog=catalog)
    return (listed[0], None) if listed else describe(name, terms, whole=True)


def price_headers(patterns: Sequence[str], terms: Terms) -> list[tuple[str, Estimate]]:
    """Price the headers of the addresses among these whose reader pays: what `look_up` would spend."""
    paid = [name for name in patterns if is_address(name) and _counts(address_named(name), terms)]
    return [
        (str(address_named(name)), price_header(kind_by_suffix(path_of(url_and_member(name)[0])) or "npy", terms))
        for name in dict.fromkeys(paid)
    ]


def object_named(name: str, catalog: CatalogLike = None) -> Artifact:
    """Find the object behind a name or address; of an address nothing is read for that, and its size is not known."""
    found = catalog_below(name)
    if not is_address(name) or found is not None:
        known = load_catalog(catalog)
        if found is not None and (is_address(name) or not known.has(name)):
            known, name = found
        return known.find(known.find(name).object_name)
    url, _ = url_and_member(name)
    address = address_at(url)
    if address.is_local and address.local_path.is_dir():
        raise CatalogError(
            f"{name} is a folder, not one object; use dmdata mirror {shlex.quote(name)} DESTINATION", name=name
        )
    return _described(address, None, kind_by_suffix(path_of(url)) or "bytes", ObjectState(0, None), {})


def _described(
    address: Address, member: str | None, kind: str, state: ObjectState, layouts: dict[str, Layout]
) -> Artifact:
    schemas = {name: _schema_of(layout) for name, layout in layouts.items()}
    # what lies at an address need not be fit for a catalog: nothing of it is checked
    stored = StoredArray.model_construct(
        key=_key_of(address),
        format=kind,
        n_bytes=state.n_bytes,
        etag=state.etag,
        members={name: schema for name, schema in schemas.items() if name},
        basis=dict.fromkeys(("shape", "dtype", "n_bytes"), Basis.MEASURED),
    )
    requester_pays = address.requester_pays if state.charged is None else state.charged
    return Artifact(
        name=f"{address}/{member}" if member else str(address),
        dataset="",
        alpha_name="",
        alpha=None,
        member=member,
        stored=stored,
        schema=schemas.get(member or NPY),
        source=SourceEntry.model_construct(url=str(address), requester_pays=requester_pays, region=None, basis={}),
        rows=None,
        basis=stored.basis,
        at=address.url,
    )


def _key_of(address: Address) -> str:
    """Name an object's key: a path as it is, and what comes behind the host of a URL."""
    if address.is_local:
        return str(address.local_path)
    path = path_of(address.url).lstrip("/")
    return path if address.is_s3 else unquote(path)


def _schema_of(layout: Layout) -> ArraySchema:
    text = layout.encoding or str(layout.dtype)
    if layout.encoding:
        return ArraySchema.model_construct(shape=layout.shape, dtype=text, dims=numbered_dims(len(layout.shape)))
    try:
        np.dtype(text)
    except TypeError:
        text = layout.dtype.str  # of a structured type: its size is right
    return ArraySchema.model_construct(shape=layout.shape, dtype=text, dims=numbered_dims(len(layout.shape)))


def _open_address(name: str, terms: Terms, prefer: Preference) -> LazyArray:
    url, member = url_and_member(name)
    address = address_at(url)
    path = path_of(url)
    kind = kind_by_suffix(path)
    if kind is None and address.is_local and not address.local_path.is_file():
        return open_zarr(name, str(address.local_path), dims=None)
    shown = f"{address}/{member}" if member else str(address)
    transport = Transport(address, shown, terms)
    header = read_header(transport, kind=kind, wanted=member)
    layout = header.layout_of(member, str(address))
    return LazyArray(shown, numbered_dims(len(layout.shape)), layout, _in_object(transport, header, prefer))


def _in_object(transport: Transport, header: Header, prefer: Preference) -> InObject:
    return InObject(replace(transport, charged=header.state.charged), header.state.etag, prefer)


def open_artifact(artifact: Artifact, terms: Terms, prefer: Preference = "price") -> LazyArray:
    """Open an array that was looked up; see `open`."""
    schema = artifact.schema
    if schema is None:
        raise CatalogError(f"{artifact.name} holds several arrays", name=artifact.name)
    if artifact.stored.format == "zarr":
        array = open_zarr(artifact.name, artifact.url, dims=schema.dims)
    else:
        array = _open_listed(artifact, schema, transport_to(artifact, artifact.name, terms), prefer)
    claimed, found = claimed_layout(artifact), array.layout
    if artifact.at is None and not found.is_alike(claimed):
        warn_of_mismatch(artifact.name, array.url, claimed, found, stacklevel=3)
    dims, rows = described_rows(array.dims, rows_of(artifact), array.shape)
    return replace(array, dims=dims, rows=rows or array.rows)


def _open_listed(artifact: Artifact, schema: ArraySchema, transport: Transport, prefer: Preference) -> LazyArray:
    """Open an array in an object: by its header where that is known or free to read, else by what is claimed of it."""
    kind, member = artifact.stored.format, artifact.member or NPY
    assert kind != "zarr"  # noqa: S101 - the caller has seen to it
    body: InObject | Unread = Unread(InObject(transport, None, prefer), kind, member)
    layout = claimed_layout(artifact)
    header = remembered_header(transport.address, member)
    if header is None and (transport.address.is_local or artifact.at is not None):
        header = read_header(transport, kind=kind, wanted=member)
    if header is not None:
        layout, body = header.layout_of(member, artifact.url), _in_object(transport, header, prefer)
    return LazyArray(artifact.name, schema.dims, layout, body)


def known_layout(artifact: Artifact) -> Layout:
    """Lay an array out as its header said, if that is remembered and of the claimed shape, else as it is claimed."""
    claimed, found = claimed_layout(artifact), _remembered_layout(artifact)
    return found if found is not None and found.shape == claimed.shape else claimed


def forget_unlike(artifact: Artifact) -> None:
    """Forget the header of an array if it is not of the shape that is claimed: it may be of an earlier object."""
    address = address_of(artifact)
    if remembered_header(address, artifact.member or NPY) is None:
        return
    found = _remembered_layout(artifact)
    if found is None or found.shape != claimed_layout(artifact).shape:
        forget_header(address)


def _remembered_layout(artifact: Artifact) -> Layout | None:
    if artifact.stored.format == "zarr":
        return None
    header = remembered_header(address_of(artifact), artifact.member or NPY)
    try:
        return header.layout_of(artifact.member or NPY, artifact.url) if header else None
    except (FormatError, CatalogError):
        return None  # it has no such array
