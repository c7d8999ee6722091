"""A mirror is a release: it has a catalog inside, and stands for what it copies wherever that is named.

The catalog of a mirror is an attribute of its Zarr store's root. It lists what is complete, under the names that the
arrays have in the catalog they were found in.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import zarr

from dmdata.catalog.entries import Alpha, ArraySchema, Artifact, Basis, Catalog, DatasetEntry, SourceEntry, StoredArray
from dmdata.catalog.names import CATALOG_ATTRIBUTE
from dmdata.copying import registry
from dmdata.copying.journal import JOURNAL, Journal, open_copy
from dmdata.copying.place import Place
from dmdata.errors import CatalogError, DmdataError
from dmdata.layout.selection import Selection
from dmdata.objects.endpoints import own_endpoint
from dmdata.reading.locks import only_process_at
from dmdata.release.catalogs import CatalogLike, address_of, load_catalog
from dmdata.release.pricing import arrays_of

_WAIT_SECONDS = 60.0


def local_mirror(artifact: Artifact) -> str | None:
    """Find the local mirror of an array that a catalog lists; see `dmdata.copying.registry.complete_mirror`."""
    if artifact.at is not None or artifact.schema is None or artifact.stored.format == "zarr":
        return None
    address = address_of(artifact)
    return None if address.is_local else registry.complete_mirror(address, artifact.name, artifact.stored.etag)


def is_mirrored(artifact: Artifact) -> bool:
    """Return whether an artifact, or each array of one of several, has a local mirror that stands for it."""
    parts = arrays_of([artifact]) if artifact.schema or artifact.stored.members else []
    return bool(parts) and all(map(local_mirror, parts))


def register_mirror(path: str | os.PathLike[str], *, catalog: CatalogLike = None) -> list[str]:
    """Have a mirror that exists found by the names of its arrays, as one that is made under this ``DMDATA_HOME`` is.

    Parameters
    ----------
    path : path
        Of a mirrored array, or of a group of them.
    catalog : Catalog, path or URL, optional
        That lists what was mirrored; see `dmdata.load_catalog`.

    Returns
    -------
    names : list of str
        That are found there from now on.

    Raises
    ------
    DmdataError
        If no mirror is there, or one of them is not complete, has only some rows or columns, or is of an object that
        the catalog does not list or that has changed since. Then nothing is registered.
    """
    place, known = Place.of(path), load_catalog(catalog)
    if place.is_s3:
        raise DmdataError(f"{place} is in a bucket; only a mirror on this machine is found by the names of its arrays")
    with place.explain_errors("read"):
        found = [(Journal.load(one), known) for one in mirrors_at(place)]
    listed = [(journal, _listed(journal, known)) for journal, known in found]
    for journal, artifact in listed:
        registry.enter(address_of(artifact), artifact.name, journal)
    return [artifact.name for _, artifact in listed]


def forget_mirror(path: str | os.PathLike[str]) -> list[str]:
    """Have what is mirrored at a path, or below it, no longer found by its names; nothing at the path is touched.

    Returns
    -------
    names : list of str
        That were found there until now.

    Raises
    ------
    DmdataError
        If no mirror there was found by its names.
    """
    return registry.forget(Place.of(path).url)


def _listed(journal: Journal, known: Catalog) -> Artifact:
    """Find what a mirror may stand for, and refuse it if it may not."""
    name, place = journal.original.artifact, journal.place
    if not journal.is_whole:
        raise DmdataError(f"{place} has only some rows or columns of {name}; mirror all of it to have it found by name")
    if not journal.is_complete:
        raise DmdataError(f"{place} is not complete; run the same dmdata mirror again, then register it")
    artifact = known.find(name)
    address, etag = address_of(artifact), artifact.stored.etag
    url = str(address)
    if journal.original.identity != url and not journal.original.identity.startswith(f"{url} "):
        raise CatalogError(
            f"{place} is a mirror of {journal.original.identity.partition(' ')[0]}, and the catalog has {name} at "
            f"{url}; name the catalog it was found in: --catalog",
            name=name,
        )
    if reason := registry.why_outdated(address, journal.original.identity, etag):
        raise DmdataError(f"{place} {reason}")
    if address.is_s3 and own_endpoint() and not registry.is_confirmed(address, journal.original.identity, etag):
        raise DmdataError(
            f"{place} may be of another server's {url}: nothing read from {own_endpoint()} has its ETag; read the "
            f"header there first: dmdata.open({name!r}, local=False).read_header()"
        )
    return artifact


def mirrors_at(place: Place, names: Sequence[str] = ()) -> Iterator[Place]:
    """List the places of the mirrored arrays at or below a place.

    Parameters
    ----------
    place : Place
    names : sequence of str
        Of artifacts in a group; by default all that are mirrored in it.

    Raises
    ------
    CatalogError
        If a name is not mirrored there.
    DmdataError
        If there is no mirror at all.
    """
    try:
        node = zarr.open(place.store(read_only=True), mode="r")
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise DmdataError(f"no mirror is at {place} ({error}); make one with dmdata mirror NAME DESTINATION") from error
    if isinstance(node, zarr.Array):
        own = Journal.load(place).original.artifact
        if names and list(names) != [own]:
            raise CatalogError(f"{place} is a mirror of {own} alone; leave the names out", name=", ".join(names))
        yield place
        return
    found = [path for path, array in arrays_in(node) if JOURNAL in array.attrs]
    if unknown := sorted(set(names) - set(found)):
        raise CatalogError(
            f"{place} holds no mirror of {', '.join(unknown)}; it holds {', '.join(sorted(found)) or 'none'}",
            name=unknown[0],
            nearest=sorted(found),
        )
    if not found:
        raise DmdataError(f"{place} is a Zarr group without any mirror; make one with dmdata mirror NAME DESTINATION")
    yield from (place / path for path in sorted(names or found))


def arrays_in(group: zarr.Group) -> list[tuple[str, zarr.Array[Any]]]:
    """List the arrays below a Zarr group by their paths in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what else lies in the group is not ours to judge
        members = group.members(max_depth=None)
    return [(path, node) for path, node in members if isinstance(node, zarr.Array)]


def enter_into_catalog(root: Place, artifact: Artifact, place: Place, selection: Selection) -> None:
    """List a mirror that is complete in the catalog of its store.

    Parameters
    ----------
    root : Place
        Of the store.
    artifact : Artifact
        That was copied; one that no catalog lists is left out.
    place : Place
        Of the copy, at the root or below it.
    selection : Selection
        What of the artifact was copied.
    """
    if artifact.catalog is None:
        return
    key = place.url.removeprefix(root.url).lstrip("/") or "."
    with root.explain_errors(), only_process_at(f"the catalog of {root}", wait_seconds=_WAIT_SECONDS):
        copied, node = open_copy(place, "r"), zarr.open(root.store(), mode="r+")
        known = node.attrs.get(CATALOG_ATTRIBUTE)
        origin = f"{root.url}/zarr.json"
        before = Catalog.parse(known, origin=origin) if isinstance(known, str) else None
        text = _with_entry(before, artifact, artifact.catalog, key, copied, selection).dump()
        Catalog.parse(text, origin=origin)  # so that it is one, or stays what it was
        node.attrs[CATALOG_ATTRIBUTE] = text


def _with_entry(
    before: Catalog | None, artifact: Artifact, source: Catalog, key: str, copied: zarr.Array[Any], selection: Selection
) -> Catalog:
    own = SourceEntry(url=".", basis=dict.fromkeys(("url", "requester_pays"), Basis.MEASURED))
    datasets = dict(before.datasets) if before else {}
    dataset = datasets.get(artifact.dataset) or source.datasets[artifact.dataset].model_copy(update={"alphas": {}})
    datasets[artifact.dataset] = _with_array(dataset, artifact, source, key, copied, selection)
    if before:
        return before.model_copy(update={"source": own, "datasets": datasets})
    title = f"mirror of {source.title}"
    return Catalog(version=1, title=title, citation=source.citation, source=own, datasets=datasets)


def _with_array(
    dataset: DatasetEntry, artifact: Artifact, source: Catalog, key: str, copied: zarr.Array[Any], selection: Selection
) -> DatasetEntry:
    of_source = source.datasets[artifact.dataset].alphas[artifact.alpha_name]
    alpha: Alpha = dataset.alphas.get(artifact.alpha_name) or of_source.model_copy(update={"arrays": {}})
    if alpha.rows and selection.axes and not selection.keeps_all_of(0):
        # of the rows that were copied the copy itself knows what they are for
        alpha = alpha.model_copy(update={"rows": None, "basis": {k: v for k, v in alpha.basis.items() if k != "rows"}})
    array = artifact.object_name.rpartition("/")[2]
    stored = _stored(alpha.arrays.get(array), artifact, key, copied)
    alpha = alpha.model_copy(update={"arrays": alpha.arrays | {array: stored}})
    return dataset.model_copy(update={"alphas": dataset.alphas | {artifact.alpha_name: alpha}})


def _stored(before: StoredArray | None, artifact: Artifact, key: str, copied: zarr.Array[Any]) -> StoredArray:
    named = getattr(copied.metadata, "dimension_names", None) or [None] * copied.ndim
    dims = tuple(name or f"dim_{axis}" for axis, name in enumerate(named))
    schema = ArraySchema(shape=copied.shape, dtype=str(copied.dtype), dims=dims)
    note = f"copied from {address_of(artifact)}"
    if artifact.member is None:
        facts: dict[str, Any] = {"shape": schema.shape, "dtype": schema.dtype, "dims": schema.dims}
        facts["n_bytes"] = schema.array_bytes
    else:
        members = (before.members if before else {}) | {artifact.member: schema}
        facts = {"members": members, "n_bytes": sum(member.array_bytes for member in members.values())}
        key = key.removesuffix(f"/{artifact.member}")
    basis = dict.fromkeys(["key", "format", *(fact for fact in facts if fact != "members")], Basis.MEASURED)
    return StoredArray(key=key, format="zarr", note=note, basis=basis, **facts)
