"""Prices of reading, mirroring and downloading artifacts, by what is claimed of them: nothing is asked of a source."""

import os
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dmdata.bodies import estimate_read, header_cost
from dmdata.catalog.entries import ArraySchema, Artifact
from dmdata.copying.download import START_BYTES, bytes_complete, n_requests_of
from dmdata.copying.mirror import Reads
from dmdata.errors import FormatError, SelectionError
from dmdata.layout.formats import NPY_PREFIX_BYTES, PT_HEAD_BYTES, Layout, contiguous_strides, stored_as
from dmdata.layout.selection import Selection, parse_selection, select
from dmdata.money.prices import Estimate, PriceTable, Quote, Terms
from dmdata.objects.endpoints import own_endpoint

_LONGER_HEADER_BYTES = 1024
_PT_DIRECTORY_BYTES = 128 << 10


def price_artifacts(artifacts: Sequence[Artifact], terms: Terms, *, key: Any = None) -> list[tuple[Artifact, Estimate]]:
    """Price a selection of each artifact, or all of it, by what its catalog claims, header included."""
    priced = []
    for artifact in artifacts:
        if key is None:
            n_requests = n_requests_of(artifact.n_bytes) + 1
            table = named_prices(artifact, terms)
            priced.append((artifact, same_both_ways(artifact.n_bytes, n_requests, terms, table=table)))
            continue
        if artifact.schema is None:
            arrays_of([artifact])  # raises where there are none
            member = next(iter(artifact.stored.members))
            raise SelectionError(f"{artifact.name} holds several arrays; select from {artifact.name}/{member}")
        layout, kind = claimed_layout(artifact), artifact.stored.format
        added = partial(header_cost, kind="npy" if kind == "zarr" else kind, terms=terms)
        selection, table = parsed_selection(key, layout.shape), named_prices(artifact, terms)
        priced.append((artifact, estimate_read(layout, selection, terms, header_cost=added, table=table)))
    return priced


def price_reads(artifact: Artifact, layout: Layout, reads: Reads, terms: Terms) -> Estimate:
    """Price reads of an artifact, each as many times as is stated, and its header."""
    table = named_prices(artifact, terms)
    data = [(estimate_read(layout, selection, terms, table=table), count) for selection, count in reads]
    return _totalled(data, terms, extra_bytes=NPY_PREFIX_BYTES, extra_requests=1)


def price_download(artifact: Artifact, path: Path, terms: Terms) -> Estimate:
    """Price what a download still lacks, by what the catalog claims and what is complete next to its final name."""
    n_missing = max(artifact.n_bytes - bytes_complete(path), 0)
    n_bytes = n_missing + START_BYTES[artifact.stored.format if artifact.stored.format != "zarr" else "bytes"]
    return same_both_ways(n_bytes, n_requests_of(n_missing) + 1, terms, table=named_prices(artifact, terms))


def price_header(kind: str, terms: Terms) -> Estimate:
    """Price the header of an object of unknown size, upper bound for what people save."""
    if kind == "npy":
        # a header of many dimensions or field names takes one more request
        return same_both_ways(NPY_PREFIX_BYTES + _LONGER_HEADER_BYTES, 2, terms)
    # its start, its directory, and what stands before each tensor that is not within either
    return same_both_ways(PT_HEAD_BYTES + _PT_DIRECTORY_BYTES, 12, terms)


def place_of(artifact: Artifact) -> str:
    """Name an artifact inside a group: a relative path that stays in it, whatever its address is."""
    if artifact.at is None:
        return artifact.name
    address = artifact.name.removeprefix("file://").partition("://")
    parts = [part for part in (address[2] or address[0]).split("/") if part]
    return "/".join(_safe_part(part) for part in parts)


def _safe_part(part: str) -> str:
    if not part.strip("."):
        return part.replace(".", "_")  # nothing but dots would lead out of the group
    part = part.removeprefix("__") or "_"  # names that begin so Zarr keeps for itself
    return f"{part}_" if part in ("zarr.json", ".zarray", ".zgroup", ".zattrs") else part


def arrays_of(artifacts: Sequence[Artifact]) -> list[Artifact]:
    """List the arrays among artifacts and inside them.

    Raises
    ------
    FormatError
        If an address is of an object that holds no array.
    """
    arrays = []
    for artifact in artifacts:
        if artifact.schema is not None:
            arrays.append(artifact)
        elif artifact.stored.members:
            arrays += [_member_of(artifact, member, schema) for member, schema in artifact.stored.members.items()]
        else:
            raise FormatError(
                f"{artifact.name} is not of a kind whose arrays are read; download it as it is with dmdata get NAME",
                url=artifact.name,
            )
    return arrays


def _member_of(artifact: Artifact, member: str, schema: ArraySchema) -> Artifact:
    return replace(artifact, name=f"{artifact.name}/{member}", member=member, schema=schema)


def total_of(estimates: Sequence[Estimate], terms: Terms, *, with_headers: int = 0) -> Estimate:
    """Price several reads together, and the headers of that many objects."""
    parts = [(estimate, 1) for estimate in estimates]
    return _totalled(parts, terms, extra_bytes=with_headers * NPY_PREFIX_BYTES, extra_requests=with_headers)


def download_path(artifact: Artifact, destination: str | os.PathLike[str] | None) -> Path:
    """Return where `get` puts an object: a file, or its own name in a folder."""
    return path_in(destination, artifact.stored.key.rpartition("/")[2])


def path_in(destination: str | os.PathLike[str] | None, own_name: str) -> Path:
    """Name a file: as it is asked for, or by its own name in a folder that exists or is written with a slash behind."""
    path = Path(destination or own_name)
    is_folder = path.is_dir() or os.fspath(destination or "").endswith((os.sep, "/"))
    return path / own_name if is_folder else path


def parsed_selection(key: Any, shape: tuple[int, ...]) -> Selection:
    """Read a selection as users write it: an index, text, or None for all."""
    if isinstance(key, str):
        return parse_selection(key, shape)
    return select(... if key is None else key, shape, orthogonal=True)


def named_prices(artifact: Artifact, terms: Terms) -> PriceTable | None:
    """Take the prices that are named for an artifact's source; None where the list prices hold, if any do."""
    has_endpoint = artifact.url.startswith("s3://") and own_endpoint() is not None
    return terms.prices_of(artifact.source.prices, has_endpoint=has_endpoint)


def same_both_ways(n_bytes: int, n_requests: int, terms: Terms, *, table: PriceTable | None = None) -> Estimate:
    """Price a read that there is one way for."""
    way = terms.quote(n_bytes, n_requests, table=table)
    return terms.estimate(way, way, table=table)


def _totalled(
    estimates: Sequence[tuple[Estimate, int]], terms: Terms, *, extra_bytes: int, extra_requests: int
) -> Estimate:
    """Price several reads together, each as many times as is stated."""
    tables = list(dict.fromkeys(estimate.table for estimate, _ in estimates)) or [None]

    def together(way: str) -> Quote:
        parts = []
        for nth, table in enumerate(tables):
            quotes = [(getattr(estimate, way), count) for estimate, count in estimates if estimate.table == table]
            n_bytes = sum(q.n_bytes * count for q, count in quotes) + (extra_bytes if not nth else 0)
            n_requests = sum(q.n_requests * count for q, count in quotes) + (extra_requests if not nth else 0)
            parts.append(terms.quote(n_bytes, n_requests, table=table))
        return Quote(*(sum(getattr(part, field.name) for part in parts) for field in fields(Quote)))

    ways = together("cheapest"), together("fastest")
    # part by part the fastest splits ranges for connections that all parts together keep busy anyway
    fastest = min(reversed(ways), key=lambda way: way.seconds)
    return terms.estimate(ways[0], fastest, table=tables[0] if len(tables) == 1 else None)


def claimed_layout(artifact: Artifact) -> Layout:
    """Lay an artifact out as its catalog claims it to be."""
    if artifact.schema is None:
        return Layout((artifact.n_bytes,), np.dtype(np.uint8), 0, (1,))
    return as_npy(artifact.schema.shape, *stored_as(artifact.schema.dtype))


def as_npy(shape: tuple[int, ...], dtype: np.dtype[Any], encoding: str = "") -> Layout:
    """Lay an array out as a ``.npy`` of it would be."""
    return Layout(shape, dtype, NPY_PREFIX_BYTES, contiguous_strides(shape, dtype.itemsize), encoding)
