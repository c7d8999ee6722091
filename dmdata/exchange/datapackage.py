"""A catalog as a Data Package 2.0: JSON that Frictionless tools read.

The specification: https://datapackage.org/standard/data-package/
"""

import os
from pathlib import Path
from typing import Any

from dmdata.catalog.entries import Artifact
from dmdata.errors import CatalogError
from dmdata.exchange.described import Exported, describe_object, facts_of

_SCHEMA = "https://datapackage.org/profiles/2.0/datapackage.json"


def datapackage(exported: Exported) -> tuple[dict[str, Any], list[str]]:
    """Write a catalog as a Data Package.

    Returns
    -------
    document : dict
    notes : list of str
        What a Data Package has no field for, in words; also in the document's description.

    Raises
    ------
    CatalogError
        If files lie on this machine, but not below the export's folder: a Data Package may not name them.
    """
    catalog = exported.catalog
    artifacts = list(catalog.artifacts())
    notes = [
        "A Data Package has no fields for arrays, nor for whether a fact is published, measured or inferred: they are "
        "in properties of our own (shape, dtype, dims, members, basis)"
    ]
    if exported.payer:
        notes.append(f"It has no field for who pays either. This source is {exported.payer}")
    addresses = {artifact.name: exported.address(artifact) for artifact in artifacts}
    if any("://" in address and not address.startswith("http") for address in addresses.values()):
        notes.append("The paths are addresses of a store, where the standard provides for http and https alone")
    if any(artifact.stored.format == "zarr" for artifact in artifacts):
        notes.append("A resource is one file: of a Zarr array it is the array's metadata")
    if exported.unknown_digests:
        notes.append(exported.unknown_digests)
    notes.append("License and contributors are left out, because the catalog does not say them")
    document = {"$schema": _SCHEMA, "title": catalog.title, "description": exported.describe(notes)}
    if catalog.citation:
        document["citation"] = catalog.citation
    resources = [_resource(artifact, addresses[artifact.name], exported) for artifact in artifacts]
    return document | {"release": exported.common_facts, "resources": resources}, notes


def _resource(artifact: Artifact, path: str, exported: Exported) -> dict[str, Any]:
    stored = artifact.stored
    if os.path.isabs(path):
        folder = exported.catalog.source.url
        raise CatalogError(
            f"{path} is not below {exported.folder}, and a data package lists files below its own folder alone; write "
            f"it into {folder}: -o {Path(folder) / 'datapackage.json'}",
            name=artifact.name,
        )
    about = {"name": artifact.name, "description": describe_object(artifact)}
    if stored.format == "zarr":
        older = Path(exported.folder, path, ".zarray").is_file()
        metadata = {"path": f"{path}/{'.zarray' if older else 'zarr.json'}", "mediatype": "application/json"}
        return about | metadata | facts_of(artifact)
    file: dict[str, Any] = {"path": path, "mediatype": "application/octet-stream", "bytes": stored.n_bytes}
    if stored.sha256:
        file["hash"] = f"sha256:{stored.sha256}"
    return about | file | facts_of(artifact)
