"""Copies of artifacts, found by name or address: as a Zarr store or as the object they are; resumable and checked."""

import os
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import zarr

from dmdata.array import LazyArray
from dmdata.catalog import Artifact
from dmdata.download import download
from dmdata.errors import CatalogError, DmdataError
from dmdata.ledger import Ledger, home
from dmdata.locate import url_and_member
from dmdata.mirror import DEFAULT_MEMORY_BYTES, Progress, missing_reads
from dmdata.mirror import mirror as mirror_array
from dmdata.place import Place
from dmdata.prices import destination_of
from dmdata.pricing import arrays_of, download_path, parsed_selection, place_of
from dmdata.release import CatalogLike, look_up, object_named, open_artifact, transport_to
from dmdata.selection import Selection


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
    progress: Callable[[str, Progress], object] | Literal[False] | None = None,
    received: Callable[[str, int], object] | None = None,
) -> zarr.Array[Any] | zarr.Group:
    """Copy artifacts into a Zarr store; run again to resume.

    Parameters
    ----------
    patterns : str or sequence of str
        One exact name or address makes the destination that array; globs or several make it a group in which each
        array has its full name, or its address without the scheme.
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
    progress : callable or False, optional
        Called with an artifact's name and a `dmdata.mirror.Progress`, after each block; else a bar is shown, or with
        False none.
    received : callable, optional
        Called with an artifact's name and the bytes that arrived since the last call, from any thread.

    Raises
    ------
    CatalogError, SelectionError, BudgetError, IntegrityError, AccessError, SourceError
        What is complete stays.
    """
    names = [patterns] if isinstance(patterns, str) else list(patterns)
    artifacts = arrays_of(look_up(names, exclude=exclude, to=to, catalog=catalog))
    return mirror_artifacts(
        artifacts,
        destination,
        alone=mirrored_alone(names, artifacts),
        rows=rows,
        columns=columns,
        key=key,
        to=to,
        memory_bytes=memory_bytes,
        scheduler=scheduler,
        progress=progress,
        received=received,
    )


def mirror_artifacts(
    artifacts: Sequence[Artifact],
    destination: str | os.PathLike[str],
    *,
    alone: bool,
    rows: Any = slice(None),
    columns: Any = slice(None),
    key: Any,
    to: str | None,
    memory_bytes: int,
    scheduler: str | None = None,
    progress: Callable[[str, Progress], object] | Literal[False] | None = None,
    received: Callable[[str, int], object] | None = None,
) -> zarr.Array[Any] | zarr.Group:
    """Copy arrays that were looked up; see `mirror`."""
    target = Place.of(destination)
    work = []
    for artifact in artifacts:
        array = open_artifact(artifact, destination_of(to))
        selection = parsed_selection(key if key is not None else (rows, columns)[: array.ndim], array.shape)
        work.append((array, target if alone else target / place_of(artifact), selection))
    _require_budget(work, memory_bytes)
    if not alone:
        with target.explain_errors():
            group = zarr.open_group(target.store(), mode="a")
            for artifact in artifacts:
                group.require_group(place_of(artifact).rpartition("/")[0])
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


def get(
    name: str,
    destination: str | os.PathLike[str] | None = None,
    *,
    to: str | None = None,
    catalog: CatalogLike = None,
    progress: Callable[[int, int], object] | Literal[False] | None = None,
) -> Path:
    """Download an object as it is; run again to resume.

    Parameters
    ----------
    name : str
        Of an artifact; for an array inside a ``.pt``, the whole ``.pt``. Or an address, of whatever object.
    destination : path, optional
        File or existing folder; by default the object's own name in the working directory.
    to, catalog
        As in `open`.
    progress : callable or False, optional
        Called with bytes complete and bytes in total; else a bar is shown, or with False none.

    Returns
    -------
    path : Path
        The complete file, its size, digest (where catalogued) and header checked.

    Raises
    ------
    FormatError, IntegrityError
        If the object is damaged or changed meanwhile; nothing is left under the final name.
    """
    return get_artifact(object_named(name, catalog), destination, to=to, progress=progress)


def get_artifact(
    artifact: Artifact,
    destination: str | os.PathLike[str] | None = None,
    *,
    to: str | None = None,
    progress: Callable[[int, int], object] | Literal[False] | None = None,
) -> Path:
    """Download an object that was looked up; see `get`."""
    path = download_path(artifact, destination)
    if artifact.stored.format == "zarr":
        raise CatalogError(
            f"{artifact.name} is an array of a Zarr store, not one object; "
            f"use dmdata mirror {shlex.quote(artifact.name)}"
        )
    if path.exists():
        raise DmdataError(f"{path} exists; remove it, or name another file")
    transport = transport_to(artifact, artifact.object_name, destination_of(to))
    download(transport, path, kind=artifact.stored.format, sha256=artifact.stored.sha256, progress=progress)
    return path


def mirrored_alone(patterns: Sequence[str], artifacts: Sequence[Artifact]) -> bool:
    """Tell whether a mirror of these is one array, not a group: one artifact, named exactly."""
    if len(artifacts) != 1 or len(patterns) != 1:
        return False
    # a whole .pt stands for all of its arrays, even where that is one
    by_address = artifacts[0].at is not None and artifacts[0].member == (url_and_member(patterns[0])[1] or None)
    return by_address or patterns[0] == artifacts[0].name


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
