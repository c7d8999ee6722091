"""A catalog as an Intake 2 catalog: YAML whose entries open as xarray datasets, or as plain arrays.

The format: https://intake.readthedocs.io/en/latest/api2.html
"""

from collections.abc import Iterator
from typing import Any

from dmdata.catalog.entries import Artifact
from dmdata.exchange.described import Exported, describe_object, facts_of

_FOLDER = "{CATALOG_DIR}"  # Intake puts the URL of the catalog's folder there
# a type of data that Intake hands on as it is: it would open the URLs of others as files before xarray sees them
_NAMED = "Zarr"
_PLAIN = {"npy": ("NumpyFile", "NumpyReader", "numpy:ndarray"), "zarr": ("Zarr", "DaskZarr", "dask.array:Array")}


def intake(exported: Exported) -> tuple[dict[str, Any], list[str]]:
    """Write a catalog for Intake.

    Returns
    -------
    document : dict
        To be written as YAML.
    notes : list of str
        What Intake has no field for, in words; also in the document's metadata.
    """
    catalog = exported.catalog
    notes = [
        "Entries named dataset/alpha or dataset/alpha/array are read by the engine dmdata of xarray (dmdata[xarray])"
    ]
    if exported.payer:
        notes.append(
            f"This source is {exported.payer}; the engine estimates and budgets each read. There are no entries for "
            "readers that would not"
        )
    else:
        notes.append("Entries whose name ends in .npy or .zarr need nothing of dmdata; those of .npy are read whole")
    metadata: dict[str, Any] = {"title": catalog.title, "description": exported.describe(notes)}
    if catalog.citation:
        metadata["citation"] = catalog.citation
    data: dict[str, Any] = {}
    entries: dict[str, Any] = {}
    for name, entry in _entries(exported):
        token = f"data of {name}"
        data[token] = _description("datatype", f"datatypes:{entry['type']}", url=entry["url"], storage_options=None)
        read = _description("reader", f"readers:{entry['reader']}", args=[f"{{data({token})}}"], **entry["options"])
        entries[name] = read | {"output_instance": entry["makes"], "metadata": entry["metadata"]}
    document = {
        "version": 2,
        "metadata": metadata | {"release": exported.common_facts},
        "aliases": {name: name for name in entries},
        "data": data,
        "entries": entries,
        "user_parameters": {},
    }
    return document, notes


def _description(kind: str, what: str, **options: Any) -> dict[str, Any]:
    return {kind: f"intake.readers.{what}", "kwargs": options, "metadata": {}, "user_parameters": {}}


def _entries(exported: Exported) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the entries by name: a dataset an alpha, one an object, and plain arrays where these are free."""
    catalog = exported.catalog
    engine = {"engine": "dmdata", "catalog": _from_folder(exported.from_here(exported.at)) if exported.at else ""}
    named = {"type": _NAMED, "reader": "XArrayDatasetReader", "makes": "xarray:Dataset", "options": engine}
    for dataset, entry in catalog.datasets.items():
        for alpha in entry.alphas:
            about = f"all arrays of {entry.title} at {alpha}, one lazy dataset"
            yield f"{dataset}/{alpha}", named | {"url": f"{dataset}/{alpha}", "metadata": {"description": about}}
    for artifact in catalog.artifacts():
        yield artifact.name, named | {"url": artifact.name, "metadata": _metadata(artifact)}
        if artifact.stored.format in _PLAIN and not exported.payer:
            plain = dict(zip(("type", "reader", "makes"), _PLAIN[artifact.stored.format], strict=True))
            url = _from_folder(exported.address(artifact))
            name = f"{artifact.name}.{artifact.stored.format}"
            yield name, plain | {"url": url, "options": {}, "metadata": _metadata(artifact)}


def _metadata(artifact: Artifact) -> dict[str, Any]:
    stored = artifact.stored
    size = {} if stored.format == "zarr" else {"bytes": stored.n_bytes}
    digest = {"sha256": stored.sha256} if stored.sha256 else {}
    return {"description": describe_object(artifact)} | size | digest | facts_of(artifact)


def _from_folder(path: str) -> str:
    """Name a path for Intake: from the catalog's folder if it is relative."""
    is_relative = "://" not in path and not path.startswith("/")
    return f"{_FOLDER}/{path}" if is_relative else path
