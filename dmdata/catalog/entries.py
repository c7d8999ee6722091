"""What a release holds: pydantic models of catalog.yaml, and lookup of its artifacts by name or glob.

A catalog is a claim, not the truth: each fact says whether it is published, measured or inferred, and an object's own
header has the last word about its shape. Loading a catalog touches no network, runs nothing (safe YAML, no aliases)
and refuses keys and names that could leave the folder or bucket they belong to.

An artifact is named ``dataset/alpha/array``, and an array inside a ``.pt`` one level deeper:
``cifar/50pct/test_margins``, ``cifar/75pct/test_datamodels/weight``.
"""

import difflib
import fnmatch
import functools
import math
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from dmdata.catalog.names import CATALOG_FILE, MEMBER_PART, NAME, bundled_text, text_at
from dmdata.errors import CatalogError
from dmdata.layout.layouts import stored_as
from dmdata.settings import PriceOverrides
from dmdata.shown import readable_bytes, rows_as_html, sizes_in_words


class Basis(StrEnum):
    """How a fact is known: its publisher or a maintainer says it, an object was looked at, or others imply it."""

    PUBLISHED = "published"
    MEASURED = "measured"
    INFERRED = "inferred"


def _safe_key(key: str) -> str:
    path = PurePosixPath(key)
    parts = {part for piece in path.parts for part in piece.split("\\")}
    if not key or path.is_absolute() or ".." in parts or not key.isprintable() or re.match(r"[A-Za-z][\w+.-]*:", key):
        raise ValueError(f"key {key!r} is not a relative path inside the source; write it like 'cifar/data/x.npy'")
    return key


def _safe_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError(f"name {name!r} must be letters, digits, '_', '-' and '.', starting with a letter or digit")
    return name


def _safe_member(path: str) -> str:
    """Check the name of an array inside an object: a path, as "model/fc.weight"."""
    if not all(map(MEMBER_PART.fullmatch, path.split("/"))):
        raise ValueError(
            f"name {path!r} must be of letters, digits, '_', '-' and '.', each part not starting with '-' or '.'"
        )
    return path


def _plain_dtype(dtype: str) -> str:
    try:
        stored, _ = stored_as(dtype)
    except TypeError as error:
        raise ValueError(f"dtype {dtype!r} is not one NumPy knows; write it like 'float16'") from error
    if stored.kind not in "biufcmMSU" or not stored.itemsize:
        raise ValueError(f"dtype {dtype!r} is not of plain numbers, dates or text; write it like 'float16'")
    return dtype


Key = Annotated[str, AfterValidator(_safe_key)]
Name = Annotated[str, AfterValidator(_safe_name)]
MemberName = Annotated[str, AfterValidator(_safe_member)]
Count = Annotated[int, Field(ge=0, lt=2**50)]  # a petabyte: more would be an error, and could not be planned
DType = Annotated[str, AfterValidator(_plain_dtype)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Facts(_Record):
    """A record that says for each of its facts how it is known."""

    basis: dict[str, Basis]
    note: str | None = None

    @model_validator(mode="after")
    def _every_fact_has_a_basis(self) -> Self:
        facts = self._fact_names()
        if missing := sorted(facts - set(self.basis)):
            raise ValueError(f"no basis for {', '.join(missing)}; say published, measured or inferred")
        if unknown := sorted(set(self.basis) - facts):
            raise ValueError(f"a basis for {', '.join(unknown)}, which this entry does not state; remove it")
        return self

    def _fact_names(self) -> set[str]:
        records = {"basis", "note", "members", "alphas", "arrays", "published_sizes", "not_released"}
        records |= {"sha256", "etag", "prices"}
        return {name for name in type(self).model_fields if name not in records and getattr(self, name) is not None}


class ArraySchema(_Record):
    """Shape, dtype and dimension names of one array, as inside a ``.pt``; the dtype may be "bfloat16"."""

    shape: tuple[Count, ...]
    dtype: DType
    dims: tuple[str, ...]

    @model_validator(mode="after")
    def _a_name_each_dimension(self) -> Self:
        if len(self.shape) != len(self.dims):
            raise ValueError(f"{len(self.shape)} sizes but {len(self.dims)} dims; name each dimension once")
        return self

    @property
    def array_bytes(self) -> int:
        """Bytes of the array's elements, without any header."""
        return math.prod(self.shape) * stored_as(self.dtype)[0].itemsize


class StoredArray(_Facts):
    """One object of the release: a ``.npy``, an object with several arrays, or arrays in a Zarr store.

    ``n_bytes`` is the whole object, headers included; ``members`` are the arrays of a ``.pt``, ``.npz`` or
    ``.safetensors``, or of a group of a Zarr store that copies one; ``etag`` is the store's own mark of the content,
    when it was looked at.
    """

    key: Key
    format: Literal["npy", "npz", "pt", "safetensors", "zarr"]
    shape: tuple[Count, ...] | None = None
    dtype: DType | None = None
    dims: tuple[str, ...] | None = None
    n_bytes: Count
    sha256: str | None = None
    etag: str | None = None
    members: dict[MemberName, ArraySchema] = {}

    @model_validator(mode="after")
    def _schema_agrees_with_bytes(self) -> Self:
        if self.format in ("npz", "pt", "safetensors") or (self.format == "zarr" and self.members):
            if not self.members or self.shape is not None:
                raise ValueError(f"a .{self.format} lists its arrays under 'members' and has no shape of its own")
            needed = sum(member.array_bytes for member in self.members.values())
        else:
            if self.shape is None or self.dtype is None or self.dims is None or self.members:
                raise ValueError("an array needs shape, dtype and dims, and no members")
            needed = ArraySchema(shape=self.shape, dtype=self.dtype, dims=self.dims).array_bytes
        if self.format != "zarr" and self.n_bytes < needed:
            raise ValueError(f"n_bytes {self.n_bytes} is less than the {needed} that the shape needs")
        return self


class Rows(_Record):
    """Half-open row ranges by role: models to fit on, and held-out models for evaluation.

    ``n_retrainings`` adjacent evaluation rows share one subset.
    """

    fit: tuple[Count, Count]
    evaluation: tuple[Count, Count]
    n_retrainings: Annotated[int, Field(ge=1)] = 1


class Alpha(_Facts):
    """Everything released at one subsampling fraction; ``alpha`` and ``rows`` are left out where nobody knows them."""

    alpha: Annotated[float, Field(gt=0, lt=1)] | None = None
    rows: Rows | None = None
    arrays: dict[Name, StoredArray]


class PublishedSize(_Record):
    """A size as the publisher prints it, in GiB, and the artifacts it covers."""

    artifacts: tuple[str, ...]
    gib: Annotated[float, Field(gt=0)]


class NotReleased(_Record):
    """Artifacts one might look for that do not exist, and why that is known."""

    artifacts: tuple[str, ...]
    why: str


class DatasetEntry(_Facts):
    """A dataset: its sizes, the order of its examples, and its arrays by alpha."""

    title: str
    n_train: Count | None = None
    n_test: Count | None = None
    n_classes: Count | None = None
    example_order: str | None = None
    alphas: dict[Name, Alpha]


class SourceEntry(_Facts):
    """Where the objects lie. A relative ``url`` is taken from the folder of the catalog itself.

    ``prices`` name what reading from a store that is not AWS's costs; what they leave out is free there.
    """

    url: str
    requester_pays: bool = False
    region: str | None = None
    prices: PriceOverrides = PriceOverrides()


@dataclass(frozen=True, slots=True)
class Artifact:
    """One name of a catalog, with all that is known of it: an array, or a ``.pt`` of several arrays.

    Attributes
    ----------
    name : str
        ``dataset/alpha/array`` or ``dataset/alpha/array/member``.
    stored : StoredArray
        The object that holds it; several members of a ``.pt`` share one.
    schema : ArraySchema or None
        Claimed shape, dtype and dims; None for a whole ``.pt``.
    alpha : float or None
        Share of the training examples in a subset; None where it is not known.
    rows : Rows or None
        What the models are for; None where it is not known.
    basis : dict of str to Basis
        How each fact is known.
    at : str or None
        Where the object lies, for one that no catalog lists: it was found by its address.
    catalog : Catalog or None
        That lists it.
    """

    name: str
    dataset: str
    alpha_name: str
    alpha: float | None
    member: str | None
    stored: StoredArray
    schema: ArraySchema | None
    source: SourceEntry
    rows: Rows | None
    basis: dict[str, Basis]
    at: str | None = None
    catalog: "Catalog | None" = field(default=None, compare=False, repr=False)

    @property
    def object_name(self) -> str:
        """The name of the object that holds this artifact: the same, without a member."""
        return self.name.removesuffix(f"/{self.member}") if self.member else self.name

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole object, or of the member's elements alone."""
        return self.schema.array_bytes if self.member and self.schema else self.stored.n_bytes

    @property
    def url(self) -> str:
        """Where the object lies, or the array in a Zarr store."""
        if self.at:
            return self.at
        url = join_url(self.source.url, self.stored.key)
        is_below = self.member and self.stored.format == "zarr" and self.stored.key != "."
        return f"{url}/{self.member}" if is_below else url


class Catalog(_Record):
    """A release: where it is, what it holds, what it does not, and what its publisher says of its size."""

    version: Literal[1]
    title: str
    citation: str | None = None
    source: SourceEntry
    datasets: dict[Name, DatasetEntry]
    published_sizes: tuple[PublishedSize, ...] = ()
    not_released: tuple[NotReleased, ...] = ()
    _origin: str = PrivateAttr(CATALOG_FILE)

    @classmethod
    def parse(cls, text: str, *, origin: str) -> Self:
        """Read a catalog from YAML text.

        Parameters
        ----------
        text : str
        origin : str
            Path or URL the text came from: relative source addresses start in its folder, and errors name it.

        Raises
        ------
        CatalogError
            If the text is not safe YAML of the catalog's schema; names the field and the value.
        """
        try:
            document = yaml.load(text, _PlainLoader)  # noqa: S506 - a SafeLoader without aliases
        except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError) as error:
            # a tagged scalar of the wrong form makes the loader stumble in several ways
            raise CatalogError(f"{origin} is not a readable catalog: {error}", origin=origin) from error
        try:
            catalog = cls.model_validate(document)
        except ValidationError as error:
            raise CatalogError(f"{origin} is not a valid catalog: {_first_fault(error)}", origin=origin) from error
        base = origin.rpartition("/")[0] or "."
        try:
            source = catalog.source.model_copy(update={"url": _resolve(catalog.source.url, base)})
        except ValueError as error:
            raise CatalogError(f"{origin} is not a valid catalog: source.url: {error}", origin=origin) from error
        if "://" in origin and ("://" not in source.url or source.url.startswith("file://")):
            raise CatalogError(
                f"{origin} is remote but its source {source.url} is on this machine; refused", origin=origin
            )
        parsed = catalog.model_copy(update={"source": source})
        parsed._origin = origin
        return parsed

    def __eq__(self, other: object) -> bool:
        """Compare what is said, wherever it was read."""
        return isinstance(other, Catalog) and self.__dict__ == other.__dict__

    def dump(self) -> str:
        """Write the catalog as YAML text that `parse` reads."""
        document = self.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        return yaml.dump(document, Dumper=_PlainDumper, sort_keys=False, width=120)

    def artifacts(self, *, members: bool = False) -> Iterator[Artifact]:
        """Iterate over the objects of the release in order, and over the arrays inside them if `members`."""
        for dataset, entry in self.datasets.items():
            for alpha_name, alpha in entry.alphas.items():
                for array, stored in alpha.arrays.items():
                    yield from self._artifacts_of(dataset, alpha_name, alpha, array, stored, members)

    def _artifacts_of(
        self, dataset: str, alpha_name: str, alpha: Alpha, array: str, stored: StoredArray, members: bool
    ) -> Iterator[Artifact]:
        schema = None
        if stored.shape is not None and stored.dtype is not None and stored.dims is not None:
            schema = ArraySchema(shape=stored.shape, dtype=stored.dtype, dims=stored.dims)
        whole = Artifact(
            name=f"{dataset}/{alpha_name}/{array}",
            dataset=dataset,
            alpha_name=alpha_name,
            alpha=alpha.alpha,
            member=None,
            stored=stored,
            schema=schema,
            source=self.source,
            rows=alpha.rows,
            basis=stored.basis | ({"rows": alpha.basis["rows"]} if alpha.rows else {}),
            catalog=self,
        )
        yield whole
        if members:
            for member, inner in stored.members.items():
                yield replace(whole, name=f"{whole.name}/{member}", member=member, schema=inner)

    def find(self, name: str) -> Artifact:
        """Look up one artifact by its exact name.

        Raises
        ------
        CatalogError
            If there is none; the message says which part is unknown and the nearest names, kept in `nearest`.
        """
        for artifact in self.artifacts(members=True):
            if artifact.name == name:
                return artifact
        raise self._unknown(name)

    def match(self, patterns: str | Sequence[str], *, exclude: Sequence[str] = ()) -> list[Artifact]:
        """Look up artifacts by names or globs, each object once, in catalog order.

        ``*`` stands for any text within one part of a name, ``**`` for any parts. A pattern that matches a whole
        ``.pt`` stands for all of its arrays.

        Raises
        ------
        CatalogError
            If a pattern matches nothing.
        """
        wanted: dict[str, Artifact] = {}
        everything = list(self.artifacts(members=True))
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            found = [artifact for artifact in everything if _matches(artifact.name, pattern)]
            if not found:
                raise self._unknown(pattern)
            wanted |= {artifact.name: artifact for artifact in found}
        for artifact in everything:
            if any(_matches(artifact.name, pattern) for pattern in exclude):
                wanted.pop(artifact.name, None)
        return [
            artifact
            for artifact in everything
            if artifact.name in wanted and (artifact.member is None or artifact.object_name not in wanted)
        ]

    def __repr__(self) -> str:
        return f"<{self._title()}>"

    def _repr_html_(self) -> str:
        """Show the artifacts in a notebook, as `dmdata ls` does, without prices."""
        artifacts = list(self.artifacts())
        rows = [(a.name, _shown_shape(a), _shown_dtype(a), readable_bytes(a.n_bytes)) for a in artifacts]
        return rows_as_html(self._title(), ("artifact", "shape", "dtype", "size"), rows, n_rows=len(rows))

    def _title(self) -> str:
        url = re.sub(r"://[^/?#]*@", "://", self.source.url)  # a password is not shown
        payer = ", requester pays" if self.source.requester_pays else ""
        return f"Catalog: {self.title}; {sum(1 for _ in self.artifacts())} artifacts at {url}{payer}"

    def has(self, pattern: str) -> bool:
        """Whether a name or glob matches anything."""
        return any(_matches(artifact.name, pattern) for artifact in self.artifacts(members=True))

    def _unknown(self, name: str) -> CatalogError:
        for record in self.not_released:
            if any(_matches(name, pattern) for pattern in record.artifacts):
                return CatalogError(f"{name} was never released: {record.why}", name=name, nearest=[])
        dataset, *rest = name.split("/")
        if dataset not in self.datasets:
            return _no_such("dataset", dataset, self.datasets, where="this catalog", origin=self._origin)
        alphas = self.datasets[dataset].alphas
        if rest and rest[0] not in alphas and not any(wild in rest[0] for wild in "*?["):
            return CatalogError(
                f"alpha {_shown_alpha(rest[0])} is not released for {dataset}; "
                f"choose {_alternatives([_shown_alpha(alpha) for alpha in alphas])}",
                name=name,
                nearest=[f"{dataset}/{alpha}" for alpha in alphas],
            )
        names = [artifact.name for artifact in self.artifacts(members=True)]
        return _no_such("artifact", name, names, where=self.title, origin=self._origin)


def _shown_shape(artifact: Artifact) -> str:
    if artifact.schema is not None:
        return sizes_in_words(artifact.schema.shape, artifact.schema.dims)
    return " + ".join(artifact.stored.members)


def _shown_dtype(artifact: Artifact) -> str:
    schemas = [artifact.schema] if artifact.schema else artifact.stored.members.values()
    return ", ".join(dict.fromkeys(schema.dtype for schema in schemas))


def _shown_alpha(name: str) -> str:
    """Show an alpha's name as people write it, 50% for 50pct; another name, as "given", as it is."""
    share = name.removesuffix("pct").removesuffix("%")
    return f"{share}%" if re.fullmatch(r"[\d.]+", share) else name


def join_url(base: str, key: str) -> str:
    """Put a catalogued key behind its source's address; "." is the source itself."""
    return base if key == "." else f"{base.rstrip('/')}/{key}"


@functools.cache
def bundled() -> Catalog:
    """Load the catalog of the published release that comes with the package."""
    return Catalog.parse(bundled_text(), origin=CATALOG_FILE)


def load_file(path: str | os.PathLike[str]) -> Catalog:
    """Load a catalog from a local file, from ``catalog.yaml`` in a folder, or from a mirror's Zarr store.

    Raises
    ------
    CatalogError
        If there is no such file or it is not a catalog.
    """
    try:
        text, file = text_at(Path(path))
    except (OSError, UnicodeDecodeError) as error:
        raise CatalogError(
            f"no catalog can be read at {path}: {error}; name a catalog.yaml, a folder with one, or a mirror",
            origin=str(path),
        ) from error
    parsed = Catalog.parse(text, origin=str(file.absolute()))
    parsed._origin = os.fspath(path)  # a mirror's own catalog is no file
    return parsed


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader that refuses aliases, by which a small file could grow without bound."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read in a catalog; write the value out")
        return super().compose_node(parent, index)


class _PlainDumper(yaml.SafeDumper):
    """SafeDumper that writes no aliases and keeps short lists on one line."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the base class's signature
        return True


def _short_list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.Node:
    flat = all(isinstance(value, str | int | float) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=flat)


_PlainDumper.add_representer(list, _short_list)


def _resolve(url: str, base: str) -> str:
    if "://" in url or os.path.isabs(url):
        return url
    return base if url in ("", ".") else join_url(base, _safe_key(url))


def _matches(name: str, pattern: str) -> bool:
    return _parts_match(name.split("/"), pattern.strip("/").split("/"))


def _parts_match(parts: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_parts_match(parts[skip:], patterns[1:]) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], patterns[0]) and _parts_match(parts[1:], patterns[1:])


def _no_such(what: str, asked: str, known: Iterable[str], *, where: str, origin: str) -> CatalogError:
    choices = list(known)
    given = "" if origin == CATALOG_FILE else f" --catalog {shlex.quote(origin)}"
    nearest = difflib.get_close_matches(asked, choices, n=3, cutoff=0.4) or choices[:3]
    return CatalogError(
        f"{what} {asked!r} is not in {where}; nearest: {_alternatives(nearest)}; all names: dmdata ls{given}",
        name=asked,
        nearest=nearest,
    )


def _alternatives(choices: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]])) if choices else "nothing"


def _first_fault(error: ValidationError) -> str:
    fault = error.errors()[0]
    where = ".".join(str(part) for part in fault["loc"])
    value = repr(fault.get("input"))
    return f"{where or 'document'}: {fault['msg']} (found {value[:80]})"
