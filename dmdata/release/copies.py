"""Copies of artifacts, found by name or address: as a Zarr store or as the object they are; resumable and checked."""

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import zarr

from dmdata.array import LazyArray
from dmdata.catalog.entries import Artifact
from dmdata.catalog.locate import url_and_member
from dmdata.copying.download import download
from dmdata.copying.mirror import (
    DEFAULT_MEMORY_BYTES,
    Copy,
    Progress,
    Reads,
    missing_reads,
    plan_copy,
    require_budget,
    run_copy,
)
from dmdata.copying.place import Place
from dmdata.errors import CatalogError, DmdataError
from dmdata.layout.formats import Layout
from dmdata.layout.selection import Selection
from dmdata.money.prices import Estimate, Terms
from dmdata.objects.address import ObjectState
from dmdata.release.opening import CatalogLike, in_force, look_up, object_named, open_artifact, transport_to
from dmdata.release.pricing import (
    arrays_of,
    claimed_layout,
    download_path,
    parsed_selection,
    place_of,
    price_download,
    price_reads,
)


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
        Address of a Dask scheduler whose workers copy the blocks, as ``tcp://host:8786``; see `dmdata.copying.cluster`.
    progress : callable or False, optional
        Called with an artifact's name and a `dmdata.Progress` after each block. By default a bar is shown; with False
        none.
    received : callable, optional
        Called with an artifact's name and the bytes that arrived since the last call, from any thread.

    Raises
    ------
    CatalogError, SelectionError, BudgetError, IntegrityError, AccessError, SourceError
        What is complete stays.
    """
    terms, catalog = in_force(to, catalog)
    names = [patterns] if isinstance(patterns, str) else list(patterns)
    plan = plan_mirror(
        names,
        look_up(names, terms, exclude=exclude, catalog=catalog),
        destination,
        terms,
        key=key,
        axes=(rows, columns),
        memory_bytes=memory_bytes,
        opened=True,
    )
    return run_mirror(plan, scheduler=scheduler, progress=progress, received=received)


@dataclass(frozen=True, slots=True)
class MirrorPart:
    """One array of a mirror as it was planned.

    Attributes
    ----------
    artifact : Artifact
    place : Place
        Of the copy.
    layout : Layout
        As the catalog claims it, or of the header where that was read.
    selection : Selection
    reads : list of (Selection, int)
        What is still missing at the place.
    array : LazyArray or None
        None until the header is read.
    """

    artifact: Artifact
    place: Place
    layout: Layout
    selection: Selection
    reads: Reads
    array: LazyArray | None


@dataclass(frozen=True, slots=True)
class MirrorPlan:
    """Arrays about to be copied: what was looked up, where to, and on which terms. Made by `plan_mirror`.

    Attributes
    ----------
    target : Place
    is_group : bool
        Whether the target is a group with the arrays in it, not the one array.
    parts : tuple of MirrorPart
    key : index, str or None
        What of each array is copied; None for what `axes` select.
    axes : tuple of index
        Of the first axes of each; an array that has fewer is selected by those it has.
    memory_bytes : int
    terms : Terms
    """

    target: Place
    is_group: bool
    parts: tuple[MirrorPart, ...]
    key: Any
    axes: tuple[Any, ...]
    memory_bytes: int
    terms: Terms

    def prices(self) -> list[tuple[Artifact, Estimate]]:
        """Price what is still missing of each array, its header included; asks nothing."""
        return [(part.artifact, price_reads(part.artifact, part.layout, part.reads, self.terms)) for part in self.parts]


def plan_mirror(
    patterns: Sequence[str],
    found: Sequence[Artifact],
    destination: str | os.PathLike[str],
    terms: Terms,
    *,
    key: Any,
    axes: tuple[Any, ...] = (),
    memory_bytes: int,
    opened: bool = False,
) -> MirrorPlan:
    """Plan a mirror of artifacts that were looked up, by what is complete at its destination; see `mirror`.

    By what the catalog claims of them, or, with `opened`, by their headers, which are read.
    """
    artifacts = arrays_of(found)
    target, is_group = Place.of(destination), not _is_one_array(patterns, artifacts)
    plan = MirrorPlan(target, is_group, (), key, axes, memory_bytes, terms)
    arrays = [open_artifact(artifact, terms) if opened else None for artifact in artifacts]
    return replace(plan, parts=tuple(map(partial(_plan_part, plan), artifacts, arrays)))


def _plan_part(plan: MirrorPlan, artifact: Artifact, array: LazyArray | None) -> MirrorPart:
    place = plan.target / place_of(artifact) if plan.is_group else plan.target
    layout = claimed_layout(artifact) if array is None else array.layout
    selection = parsed_selection(plan.axes[: len(layout.shape)] if plan.key is None else plan.key, layout.shape)
    reads = missing_reads(
        place,
        selection,
        name=artifact.name,
        itemsize=layout.read_dtype.itemsize,
        axis=next(iter(layout.storage_order), 0),
        memory_bytes=plan.memory_bytes,
    )
    return MirrorPart(artifact, place, layout, selection, reads, array)


def run_mirror(
    plan: MirrorPlan,
    *,
    scheduler: str | None = None,
    progress: Callable[[str, Progress], object] | Literal[False] | None = None,
    received: Callable[[str, int], object] | None = None,
) -> zarr.Array[Any] | zarr.Group:
    """Copy what was planned by `plan_mirror`; see `mirror`."""
    planned = [_plan_copy(part, plan) for part in plan.parts]
    require_budget(planned)
    if plan.is_group:
        with plan.target.explain_errors():
            group = zarr.open_group(plan.target.store(), mode="a")
            for part in plan.parts:
                group.require_group(place_of(part.artifact).rpartition("/")[0])
    for copy in planned:
        name = copy.source.name
        array = run_copy(
            copy,
            scheduler=scheduler,
            progress=progress and partial(progress, name),
            received=received and partial(received, name),
        )
    return group if plan.is_group else array


def _plan_copy(part: MirrorPart, plan: MirrorPlan) -> Copy:
    """Open an array, unless it is open, and plan its copy: again where its header is not as it was claimed."""
    array = part.array
    if array is None:
        array = open_artifact(part.artifact, plan.terms)
        if _form(array.layout) != _form(part.layout):
            part = _plan_part(plan, part.artifact, array)
    return plan_copy(array, part.place, selection=part.selection, memory_bytes=plan.memory_bytes, reads=part.reads)


def _form(layout: Layout) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """Take what decides the blocks of a copy."""
    return layout.shape, layout.read_dtype.itemsize, tuple(layout.storage_order)


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
    terms, catalog = in_force(to, catalog)
    artifact = object_named(name, catalog)
    return run_download(Download(artifact, download_path(artifact, destination), terms), progress=progress)


@dataclass(frozen=True, slots=True)
class Download:
    """An object about to be downloaded.

    Attributes
    ----------
    artifact : Artifact
    path : Path
        Of the file.
    terms : Terms
    state : ObjectState or None
        As the source has just answered; None where it is still to be asked.
    """

    artifact: Artifact
    path: Path
    terms: Terms
    state: ObjectState | None = None

    def prices(self) -> list[tuple[Artifact, Estimate]]:
        """Price what is still missing of the file; asks nothing."""
        return [(self.artifact, price_download(self.artifact, self.path, self.terms))]


def run_download(planned: Download, *, progress: Callable[[int, int], object] | Literal[False] | None = None) -> Path:
    """Download what was planned; see `get`."""
    artifact, path = planned.artifact, planned.path
    if artifact.stored.format == "zarr":
        raise CatalogError(
            f"{artifact.name} is an array of a Zarr store, not one object; "
            f"use dmdata mirror {shlex.quote(artifact.name)}"
        )
    if path.exists():
        raise DmdataError(f"{path} exists; remove it, or name another file")
    transport = transport_to(artifact, artifact.object_name, planned.terms)
    kind, sha256 = artifact.stored.format, artifact.stored.sha256
    download(transport, path, kind=kind, sha256=sha256, state=planned.state, progress=progress)
    return path


def _is_one_array(patterns: Sequence[str], artifacts: Sequence[Artifact]) -> bool:
    """Return whether a mirror of these is one array, not a group: one artifact, named exactly."""
    if len(artifacts) != 1 or len(patterns) != 1:
        return False
    # a whole .pt stands for all of its arrays, even where that is one
    by_address = artifacts[0].at is not None and artifacts[0].member == (url_and_member(patterns[0])[1] or None)
    return by_address or patterns[0] == artifacts[0].name
