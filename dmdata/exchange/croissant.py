"""A catalog as Croissant 1.0: JSON-LD that dataset search and machine learning tools read.

The specification: https://docs.mlcommons.org/croissant/docs/croissant-spec.html
"""

from typing import Any

from dmdata.catalog.entries import Artifact
from dmdata.exchange.described import ARRAY_FACTS, Exported, describe_object, facts_of

_OWN = "https://github.com/dmdata/dmdata#"
# as the specification prints it; readers compare it key by key
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}


def croissant(exported: Exported) -> tuple[dict[str, Any], list[str]]:
    """Write a catalog as Croissant.

    Returns
    -------
    document : dict
        JSON-LD.
    notes : list of str
        What Croissant has no field for, in words; also in the document's description.
    """
    catalog = exported.catalog
    own = {name: {"@id": f"dmdata:{name}", "@type": "@json"} for name in _own_names()}
    notes = [
        "Croissant 1.0 has no fields for shape, dtype and dimensions of an array, nor for whether a fact is published, "
        "measured or inferred: they are in keys of dmdata's own (dmdata_*)",
        "There are no record sets, because Croissant reads no records from .npy, .pt or Zarr",
    ]
    document: dict[str, Any] = {
        "@context": _CONTEXT | {"dmdata": _OWN} | own,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": catalog.title,
        "url": exported.from_here(catalog.source.url),
    }
    if catalog.citation:
        document["citeAs"] = catalog.citation
    if exported.payer:
        document |= {"isAccessibleForFree": False, "conditionsOfAccess": exported.payer}
        notes.append("Croissant has no field for requester pays: it is in conditionsOfAccess")
    if exported.unknown_digests:
        document["isLiveDataset"] = True
        notes.append(
            f"{exported.unknown_digests}, and Croissant accepts files without one in a live dataset alone: that is "
            "why isLiveDataset is true"
        )
    notes.append("License, creator and date are left out, because the catalog does not say them")
    document["description"] = exported.describe(notes)
    document["dmdata_release"] = exported.common_facts
    document["distribution"] = [_distribution(artifact, exported) for artifact in catalog.artifacts()]
    return document, notes


def _own_names() -> tuple[str, ...]:
    return ("dmdata_release", *(f"dmdata_{name}" for name in ARRAY_FACTS))


def _distribution(artifact: Artifact, exported: Exported) -> dict[str, Any]:
    stored, address = artifact.stored, exported.address(artifact)
    about = {"@id": artifact.name, "description": describe_object(artifact)}
    facts = {f"dmdata_{name}": fact for name, fact in facts_of(artifact).items()}
    if stored.format == "zarr":
        files = {"includes": f"{address}/**", "encodingFormat": "application/vnd.zarr"}
        return {"@type": "cr:FileSet", **about, "name": artifact.name, **files, **facts}
    file = {
        "name": stored.key.rpartition("/")[2],
        "contentUrl": address,
        "contentSize": f"{stored.n_bytes} B",
        "encodingFormat": "application/octet-stream",
    }
    digest = {"sha256": stored.sha256} if stored.sha256 else {}
    return {"@type": "cr:FileObject", **about, **file, **digest, **facts}
