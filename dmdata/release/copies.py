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
from dmdata.copying.slices import save_slice
from dmdata.errors import CatalogError, DmdataError, FormatError, SelectionError
from dmdata.layout.formats import Layout, without_suffix
from dmdata.layout.selection import Selection
from dmdata.money.prices import Estimate, Terms
from dmdata.objects.address import ObjectState
from dmdata.objects.endpoints import object_key
from dmdata.reading import digests
from dmdata.reading.headers import forget_header, known_state
from dmdata.release.mirrors import enter_into_catalog, local_mirror
from dmdata.release.opening import (
    CatalogLike,
    address_of,
    forget_unlike,
    in_force,
    known_layout,
    look_up,
    object_named,
    open_artifact,
    transport_to,
)
from dmdata.release.present import check_object, check_slice, check_values
from dmdata.release.pricing import (
    arrays_of,
    claimed_layout,
    download_path,
    parsed_selection,
    path_in,
    place_of,
    price_download,
    price_reads,
)
from dmdata.release.stores import open_mirror
from dmdata.settings import settings


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
        Of the header where that was read, else as the catalog claims it.
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
    arrays = [open_artifact(artifact, terms).read_header() if opened else None for artifact in artifacts]
    return replace(plan, parts=tuple(map(partial(_plan_part, plan), artifacts, arrays)))


def _plan_part(plan: MirrorPlan, artifact: Artifact, array: LazyArray | None) -> MirrorPart:
    place = plan.target / place_of(artifact) if plan.is_group else plan.target
    layout = known_layout(artifact) if array is None else array.layout
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
    require_budget([copy for _, copy in planned])
    if plan.is_group:
        with plan.target.explain_errors():
            group = zarr.open_group(plan.target.store(), mode="a")
            for part in plan.parts:
                group.require_group(place_of(part.artifact).rpartition("/")[0])
    for part, (source, copy) in zip(plan.parts, planned, strict=True):
        name = copy.source.name
        with source.entered(copy.place):
            array = run_copy(
                copy,
                scheduler=scheduler,
                progress=progress and partial(progress, name),
                received=received and partial(received, name),
            )
        enter_into_catalog(plan.target, part.artifact, copy.place, copy.selection)
    return group if plan.is_group else array


def _plan_copy(part: MirrorPart, plan: MirrorPlan) -> tuple[LazyArray, Copy]:
    """Open an array, unless it is open, and plan its copy: again where its header is not as it was claimed."""
    array = part.array
    if array is None:
        array = open_artifact(part.artifact, plan.terms).read_header()
        if _form(array.layout) != _form(part.layout):
            part = _plan_part(plan, part.artifact, array)
    copy = plan_copy(array, part.place, selection=part.selection, memory_bytes=plan.memory_bytes, reads=part.reads)
    return array, copy


def _form(layout: Layout) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """Take what decides the blocks of a copy."""
    return layout.shape, layout.read_dtype.itemsize, tuple(layout.storage_order)


def get(
    name: str,
    destination: str | os.PathLike[str] | None = None,
    *,
    select: Any = None,
    to: str | None = None,
    catalog: CatalogLike = None,
    progress: Callable[[int, int], object] | Literal[False] | None = None,
) -> Path:
    """Download an object as it is, or save part of an array as a ``.npy``; run again to resume.

    What is there already is not downloaded again.

    Parameters
    ----------
    name : str
        Of an artifact; for an array inside a ``.pt``, the whole ``.pt``. Or an address, of whatever object.
    destination : path, optional
        File or existing folder; by default the object's own name in the working directory, of part of an array the
        array's own name with ``.npy``.
    select : index or str, optional
        Of an array, save this part alone; as text "0:1000,42". It has to fit into memory.
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
    DmdataError
        If another file is there.
    FormatError, IntegrityError
        If the object is damaged or changed meanwhile; nothing is left under the final name.
    """
    terms, catalog = in_force(to, catalog)
    if select is not None:
        found = look_up(name, terms, catalog=catalog)
        part = Slice.planned(found, select, destination, terms)
        return part.path if part.found_there() is not None else run_slice(part, progress=progress)
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

    def found_there(self) -> str | None:
        """Say how what is there already was found to be the object, None where nothing is; see `check_object`."""
        return check_object(self.artifact, self.path, self.state)


def run_download(planned: Download, *, progress: Callable[[int, int], object] | Literal[False] | None = None) -> Path:
    """Download what was planned; see `get`."""
    artifact, path = planned.artifact, planned.path
    if artifact.stored.format == "zarr":
        raise CatalogError(
            f"{artifact.name} is an array of a Zarr store, not one object; "
            f"use dmdata mirror {shlex.quote(artifact.name)} DESTINATION"
        )
    if planned.found_there() is not None:
        return path
    transport = transport_to(artifact, artifact.object_name, planned.terms)
    kind, sha256 = artifact.stored.format, artifact.stored.sha256
    download(transport, path, kind=kind, sha256=sha256, state=planned.state, progress=progress)
    known, read = known_state(transport.address), digests.latest(transport.address)
    if known and read and known.etag != read[0].etag:
        forget_header(transport.address)  # it is of an earlier object than what was just downloaded
    return path


@dataclass(frozen=True, slots=True)
class Slice:
    """Part of an array about to be saved as a ``.npy``.

    Attributes
    ----------
    artifact : Artifact
    selection : Selection
        By the shape that its catalog claims.
    path : Path
        Of the file.
    terms : Terms
    mirror : str or None
        Path of the local mirror that is read instead of the object, for nothing.
    """

    artifact: Artifact
    selection: Selection
    path: Path
    terms: Terms
    mirror: str | None

    @classmethod
    def planned(
        cls, found: Sequence[Artifact], key: Any, destination: str | os.PathLike[str] | None, terms: Terms
    ) -> "Slice":
        """Plan to save part of the one array that was looked up.

        Raises
        ------
        SelectionError
            If there are several arrays, the selection does not fit, or the file is not to be a ``.npy``.
        """
        arrays = arrays_of(found)
        if len(arrays) > 1:
            shown = ", ".join(array.name for array in arrays[:3]) + (" and others" if arrays[3:] else "")
            raise SelectionError(f"a selection is of one array, and there are {len(arrays)}: {shown}; name one of them")
        artifact = arrays[0]
        own_name = without_suffix((artifact.member or artifact.name).rstrip("/").rpartition("/")[2]) + ".npy"
        path = path_in(destination, own_name)
        if path.suffix != ".npy":
            raise SelectionError(f"{path} is not the name of a .npy, as which a selection is saved; use {path}.npy")
        mirror = local_mirror(artifact) if settings().local_mirrors else None
        return cls(artifact, parsed_selection(key, claimed_layout(artifact).shape), path, terms, mirror)

    def prices(self) -> list[tuple[Artifact, Estimate]]:
        """Price all of it, its header included, nothing where a local mirror is read; asks nothing."""
        if self.mirror is not None:
            nothing = self.terms.quote(0, 0)
            return [(self.artifact, self.terms.estimate(nothing, nothing))]
        reads = [(self.selection, 1)]
        return [(self.artifact, price_reads(self.artifact, known_layout(self.artifact), reads, self.terms))]

    def found_there(self) -> str | None:
        """Say how what is there already was found to be this part, None where nothing is; see `check_slice`."""
        if not address_of(self.artifact).is_local:
            return check_slice(self.artifact.name, self.path, self._place(self._known_etag), self.selection.digest)
        # read again for free: it may have changed since
        return check_values(self.artifact.name, self.path, lambda: self.opened().read(self.selection))

    def opened(self) -> LazyArray:
        """Open the array.

        Raises
        ------
        SelectionError
            If its shape is not the one that its catalog claims.
        DmdataError
            If it was planned to read a mirror, and that is gone.
        """
        if self.mirror is None:
            forget_unlike(self.artifact)
            array = open_artifact(self.artifact, self.terms).read_header()
        else:
            try:
                array = open_mirror(self.artifact, self.mirror)
            except (FormatError, CatalogError) as error:
                raise DmdataError(
                    f"the local mirror of {self.artifact.name} at {self.mirror}, which was to be read for nothing, can "
                    "no longer be read; run the same again for the price of reading the object itself",
                    path=self.mirror,
                ) from error
        if array.shape != claimed_layout(self.artifact).shape:
            raise SelectionError(
                f"{self.artifact.name} has shape {array.shape}, not the one of its catalog, which was selected from; "
                "correct the catalog, or name the object by its address"
            )
        return array

    def note(self, array: LazyArray, sha256: str) -> None:
        """Keep the digest of the file, by which it is known again, with the ETag of what was read."""
        etag = array.identity.removeprefix(array.url).strip() if self.mirror is None else self._known_etag
        digests.record_slice(self._place(etag), self.selection.digest, sha256)

    @property
    def _known_etag(self) -> str | None:
        state = known_state(address_of(self.artifact))
        return state.etag if state else None

    def _place(self, etag: str | None) -> str:
        """Say what was read, or would be: which object, at which ETag, and which of its axes are dropped."""
        claimed = self.artifact.stored.etag
        facts = (etag or claimed, claimed, self.artifact.member or "", self.selection.shape)
        return f"{object_key(address_of(self.artifact))} {facts}"


def run_slice(planned: Slice, *, progress: Callable[[int, int], object] | Literal[False] | None = None) -> Path:
    """Save part of an array that was planned; see `get`."""
    array = planned.opened()
    plan = array.planned(planned.selection)
    n_bytes, n_arrived = plan.n_bytes if plan else 0, 0

    def arrived(n_more: int) -> None:
        nonlocal n_arrived
        n_arrived += n_more
        if progress:
            progress(n_arrived, max(n_bytes, n_arrived))

    sha256 = save_slice(array, planned.selection, planned.path, progress=None if progress is None else arrived)
    planned.note(array, sha256)
    return planned.path


def _is_one_array(patterns: Sequence[str], artifacts: Sequence[Artifact]) -> bool:
    """Return whether a mirror of these is one array, not a group: one artifact, named exactly."""
    if len(artifacts) != 1 or len(patterns) != 1:
        return False
    # a whole .pt stands for all of its arrays, even where that is one
    by_address = artifacts[0].at is not None and artifacts[0].member == (url_and_member(patterns[0])[1] or None)
    return by_address or patterns[0] == artifacts[0].name
