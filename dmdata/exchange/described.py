"""A catalog about to be exported: where its objects are from the export's folder, and what is said of them."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmdata.catalog.entries import ArraySchema, Artifact, Catalog
from dmdata.objects.address import Address
from dmdata.shown import sizes_in_words

ARRAY_FACTS = ("format", "shape", "dtype", "dims", "array_bytes", "members", "etag", "basis", "note")
"""What `facts_of` may state of an artifact."""


@dataclass(frozen=True, slots=True)
class Exported:
    """A catalog, where it lies, and the folder that its export is for.

    Attributes
    ----------
    catalog : Catalog
    at : str
        Absolute path or URL of the catalog; "" for the published release's, which is in the package.
    folder : pathlib.Path
        Absolute; files below it are named relative to it.
    """

    catalog: Catalog
    at: str
    folder: Path

    def address(self, artifact: Artifact) -> str:
        """Return where an object is: relative to the folder if it is below it, and without a user or password."""
        return self.from_here(artifact.url)

    def from_here(self, path: str) -> str:
        """Return a path relative to the folder where it is below it; another, and a URL, as it is."""
        address = Address(path)
        if not address.is_local:
            return str(address)
        local = os.path.abspath(address.local_path)
        below = os.path.relpath(local, self.folder)
        return local if below == ".." or below.startswith("../") else below

    @property
    def unknown_digests(self) -> str | None:
        """Say of how many objects, Zarr arrays aside, the SHA-256 is not known; None where all are."""
        files = [artifact.stored for artifact in self.catalog.artifacts() if artifact.stored.format != "zarr"]
        n_unknown = sum(stored.sha256 is None for stored in files)
        return f"The checksums of {n_unknown} of {len(files)} files are not known" if n_unknown else None

    @property
    def common_facts(self) -> dict[str, Any]:
        """Everything the catalog says of the release as a whole, as JSON: its source, datasets, alphas and sizes."""
        arrays_of_alphas = {"__all__": {"alphas": {"__all__": {"arrays"}}}}
        facts = self.catalog.model_dump(
            mode="json",
            exclude_none=True,
            exclude_defaults=True,
            exclude={"version": True, "title": True, "citation": True, "datasets": arrays_of_alphas},
        )
        source = {"url": self.from_here(self.catalog.source.url)}
        return facts | {"source": facts["source"] | source}

    @property
    def payer(self) -> str | None:
        """Say that the reader pays; None where nothing says so."""
        if not self.catalog.source.requester_pays:
            return None
        return "requester pays: requests must carry x-amz-request-payer, and are charged to the reader's AWS account"

    def describe(self, notes: list[str]) -> str:
        """Describe the whole in words, and end with what its form has no field for."""
        contents = (f"{entry.title}: {', '.join(entry.alphas)}" for entry in self.catalog.datasets.values())
        return " ".join([f"{self.catalog.title}. {'; '.join(contents)}.", *(f"{note}." for note in notes)])


def facts_of(artifact: Artifact) -> dict[str, Any]:
    """Return what a catalog says of one object beyond its address, size and digest, as JSON; see `ARRAY_FACTS`."""
    stored = artifact.stored
    facts = stored.model_dump(mode="json", exclude_none=True, exclude={"key", "n_bytes", "sha256"})
    if stored.format == "zarr":
        facts["array_bytes"] = stored.n_bytes
    return {name: facts[name] for name in ARRAY_FACTS if facts.get(name)}


def describe_object(artifact: Artifact) -> str:
    """Describe an object in words: shape, dtype and dimensions of what it holds, then the catalog's note."""
    stored = artifact.stored
    if artifact.schema is not None:
        words = _layout(artifact.schema)
    else:
        words = "; ".join(f"{name}: {_layout(schema)}" for name, schema in stored.members.items())
    return f"{words}; {stored.note}" if stored.note else words


def _layout(schema: ArraySchema) -> str:
    sizes = sizes_in_words(schema.shape, schema.dims)
    return f"{schema.dtype}, {sizes}" if sizes else schema.dtype
