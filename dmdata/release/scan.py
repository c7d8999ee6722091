"""A catalog of what is there: the arrays below a bucket's prefix or a folder, by their own headers.

Two steps, each priced first: the objects are listed, then the header of each array is read. What is written down was
measured: shape, dtype, size, ETag, who pays. Names are proposed from the keys; they and the names of dimensions are
marked as inferred. What cannot be read, or may not stand in a catalog, is left out and reported.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zarr
from pydantic import ValidationError

from dmdata.atomic import write_whole
from dmdata.catalog.entries import Alpha, Basis, Catalog, DatasetEntry, SourceEntry, StoredArray, join_url
from dmdata.errors import AccessError, CatalogError, DmdataError, FormatError, SourceError
from dmdata.layout.formats import Layout, kind_by_suffix
from dmdata.money.prices import Estimate, Terms
from dmdata.objects.address import Address
from dmdata.objects.listing import Listed, list_bucket, list_folder
from dmdata.objects.s3 import access_terms
from dmdata.reading import digests
from dmdata.reading.fetch import Transport
from dmdata.reading.headers import NPY, read_header
from dmdata.release.opening import address_at
from dmdata.release.pricing import price_header

_HEADERS_AT_ONCE = 16
_ZARR_FILES = ("zarr.json", ".zarray")
_ALPHA = re.compile(r"(.+)_(\d+(?:\.\d+)?)pct")
_UNNAMED_ALPHA = "all"
# the dimensions of the datamodels release's arrays, by their names in it
_DIMS = {
    "train_masks": ("model", "train_example"),
    "train_margins": ("model", "train_example"),
    "test_margins": ("model", "test_example"),
    "train_logits": ("model", "train_example", "class"),
    "test_logits": ("model", "test_example", "class"),
    "test_datamodels/weight": ("train_example", "test_example"),
    "test_datamodels/bias": ("test_example",),
    "test_datamodels/lam": ("test_example",),
    "train_datamodels/weight": ("train_example", "train_target"),
    "train_datamodels/bias": ("train_target",),
    "train_datamodels/lam": ("train_target",),
}


@dataclass(frozen=True, slots=True)
class Found:
    """What was listed.

    Attributes
    ----------
    root : Address
        Of what was listed.
    arrays : tuple of (str, Listed)
        Kind and entry of each object whose header will be read, by key.
    stores : tuple of str
        Keys of Zarr arrays in folders.
    remarks : tuple of str
        What was left out, and why.
    """

    root: Address
    arrays: tuple[tuple[str, Listed], ...]
    stores: tuple[str, ...]
    remarks: tuple[str, ...]

    def prices(self, terms: Terms) -> list[tuple[str, Estimate]]:
        """Price the headers, upper bound: nothing where reading is free."""
        if not self.root.requester_pays:
            return []
        return [(entry.key, price_header(kind, terms)) for kind, entry in self.arrays]


def root_of(target: str) -> Address:
    """Return what would be listed.

    Raises
    ------
    CatalogError
        If it is nothing that can be listed.
    """
    root = address_at(target.rstrip("/") or "/")
    if root.is_local:
        folder = root.local_path
        if not folder.is_dir():
            raise CatalogError(f"{folder} is not a folder; name one, or s3://bucket/prefix", name=target)
        return Address(str(folder.absolute()))
    if not root.is_s3:
        raise CatalogError(f"{root} cannot be listed: a web server has no lists; name s3://bucket/prefix", name=target)
    return root


def find(root: Address, terms: Terms, *, progress: Callable[[int], object] | None = None) -> Found:
    """List what is there, and choose what a catalog can hold.

    Raises
    ------
    BudgetError, AccessError, SourceError
    CatalogError
        If nothing of it can be catalogued.
    """
    if root.is_local:
        entries = sorted(list_folder(Path(root.url)), key=lambda entry: entry.key)
    else:
        entries = sorted(list_bucket(root, terms, progress=progress), key=lambda entry: entry.key)
    in_zarr = _zarr_folders(entries)
    stores, arrays, remarks = [], [], []
    for folder in sorted(in_zarr):
        if not root.is_local:
            remarks.append(f"{folder} is a Zarr store in a bucket, which is not read from there; mirror it to a folder")
        elif _is_array(Path(root.url) / folder):
            stores.append(folder)
    n_others = 0
    for entry in entries:
        if in_zarr and any(folder in in_zarr for folder in _folders_above(entry.key)):
            continue
        kind = kind_by_suffix(entry.key)
        if kind is None:
            n_others += 1
        elif entry.is_archived:
            remarks.append(f"{entry.key!r} is archived (Glacier); ask for it to be restored, then scan again")
        else:
            arrays.append((kind, entry))
    if n_others:
        remarks.append(f"{n_others:,} objects are not of a kind whose arrays are read")
    if not arrays and not stores:
        raise CatalogError(
            f"no arrays are below {root}: {len(entries):,} objects are there, none of which is read in place; "
            "check the prefix",
            name=str(root),
        )
    return Found(root, tuple(arrays), tuple(stores), tuple(remarks))


def catalog_of(
    found: Found,
    terms: Terms,
    *,
    url: str | None = None,
    requester_pays: bool | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[Catalog, list[str]]:
    """Read the headers of what was found and describe it.

    Parameters
    ----------
    found : Found
    terms : Terms
        Of the headers: decides their price.
    url : str, optional
        Of the source, as the catalog will state it; by default as it was listed.
    requester_pays : bool, optional
        By default, whether the source states that it charges this reader; the owner of a bucket is never charged.
    progress : callable, optional
        Called with the number of headers read, and of all.

    Returns
    -------
    catalog : Catalog
    remarks : list of str
        What was left out, and why.

    Raises
    ------
    BudgetError, SourceError
        Headers read until then are remembered, so that they are free when it is run again.
    AccessError
        If not one object may be read.
    """
    root, remarks = found.root, list(found.remarks)
    region = _region(found)
    described: list[tuple[str, dict[str, Any]]] = []
    charged = False
    for key, outcome in _headers(found, region, terms, progress):
        if isinstance(outcome, DmdataError):
            remarks.append(f"{key!r} was left out: {outcome}")
            continue
        facts, is_charged = outcome
        charged = charged or is_charged
        described.append((key, facts))
    for key in found.stores:
        array = zarr.open_array(str(Path(root.url) / key), mode="r")
        named = getattr(array.metadata, "dimension_names", None) or [None] * array.ndim
        dims = [name or f"dim_{axis}" for axis, name in enumerate(named)]
        facts = {"format": "zarr", "shape": array.shape, "dtype": str(array.dtype), "dims": dims}
        described.append((key, facts | {"n_bytes": array.nbytes}))
    datasets = _datasets(sorted(described, key=lambda pair: pair[0]), _root_name(root), remarks)
    if not datasets:
        raise CatalogError(f"nothing below {root} can be catalogued: {'; '.join(remarks)}", name=str(root))
    pays = charged if requester_pays is None else requester_pays
    if root.requester_pays and not charged and requester_pays is None:
        remarks.append(
            "the source did not state that it charges this reader, so requester_pays is false; where others pay, as "
            "for a bucket of your own, scan with --requester-pays"
        )
    known = ["url", "requester_pays", *(["region"] if region else [])]
    source = SourceEntry(
        url=url or root.url, requester_pays=pays, region=region, basis=dict.fromkeys(known, Basis.MEASURED)
    )
    return Catalog(version=1, title=f"arrays found at {root}", source=source, datasets=datasets), remarks


def write(catalog: Catalog, path: Path, *, force: bool) -> None:
    """Write a catalog, whole or not at all.

    Raises
    ------
    CatalogError
        If something is there and `force` is false.
    DmdataError
        If it cannot be written.
    """
    text = catalog.dump()
    Catalog.parse(text, origin=str(path))
    try:
        write_whole(path, text, replace=force)
    except FileExistsError as error:
        raise exists_already(path) from error
    except OSError as error:
        raise DmdataError(f"{path} cannot be written: {error}; name another file with -o") from error


def exists_already(path: Path) -> CatalogError:
    """Make the error for a catalog that would be written over what is there."""
    return CatalogError(f"{path} exists; name another file with -o, or write over it with --force", name=str(path))


def propose_name(key: str, root: str) -> tuple[str, str, str]:
    """Propose dataset, alpha and array for a key.

    >>> propose_name("cifar/data/train_masks_50pct.npy", "bucket")
    ('cifar', '50pct', 'train_masks')
    >>> propose_name("cifar/datamodels/test_50pct.pt", "bucket")
    ('cifar', '50pct', 'test_datamodels')
    >>> propose_name("run 1/seed=3/layer.4.npy", "bucket"), propose_name("x.npy", "bucket")
    (('run_1', 'seed_3', 'layer.4'), ('bucket', 'all', 'x'))
    """
    *folders, name = key.split("/")
    stem = name.rpartition(".")[0] or name
    if found := _ALPHA.fullmatch(stem):
        stem, alpha = found[1], f"{found[2]}pct"
        if folders and folders[-1] in ("data", "datamodels"):
            stem += "_datamodels" if folders.pop() == "datamodels" else ""
        dataset = ".".join(folders)
    else:
        dataset, alpha = "".join(folders[:1]), ".".join(folders[1:])
    return _clean(dataset or root), _clean(alpha or _UNNAMED_ALPHA), _clean(stem)


def _clean(text: str) -> str:
    cleaned = re.sub(r"[^A-Za-z0-9_.-]+", "_", text)
    return cleaned if cleaned[:1].isascii() and cleaned[:1].isalnum() else f"x{cleaned}"


def _root_name(root: Address) -> str:
    return root.url.rstrip("/").rpartition("/")[2] or "root"


def _zarr_folders(entries: Sequence[Listed]) -> set[str]:
    """List the folders that are Zarr nodes and not inside another array; groups are among them."""
    return {
        folder
        for entry in entries
        for folder, _, name in [entry.key.rpartition("/")]
        if name in (*_ZARR_FILES, ".zgroup") and folder
    }


def _folders_above(key: str) -> Iterator[str]:
    while key := key.rpartition("/")[0]:
        yield key


def _is_array(folder: Path) -> bool:
    try:
        zarr.open_array(str(folder), mode="r")
    except (OSError, ValueError, KeyError, TypeError):
        return False  # a group, or no Zarr at all
    return True


def _region(found: Found) -> str | None:
    if not found.root.is_s3:
        return None
    return access_terms(Address(join_url(found.root.url, found.arrays[0][1].key), found.root.requester_pays)).region


def _headers(
    found: Found, region: str | None, terms: Terms, progress: Callable[[int, int], object] | None
) -> Iterator[tuple[str, tuple[dict[str, Any], bool] | DmdataError]]:
    """Read headers, several at once; in the order of the keys, each facts and whether it was charged, or an error."""
    root = found.root

    def describe(kind: str, key: str) -> tuple[dict[str, Any], bool] | DmdataError:
        address = Address(join_url(root.url, key), root.requester_pays, region, listed=True)
        try:
            header = read_header(Transport(address, key, terms), kind=kind, wanted=None)  # type: ignore[arg-type] # by suffix
        except (FormatError, AccessError) as error:
            return error
        except SourceError as error:
            if error.transient:
                raise
            return error
        return _facts(kind, header.layouts, address, header.state), header.state.charged is True

    outcomes: dict[str, tuple[dict[str, Any], bool] | DmdataError] = {}
    with ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
        futures = {pool.submit(describe, kind, entry.key): entry.key for kind, entry in found.arrays}
        try:
            for future in as_completed(futures):
                outcomes[futures[future]] = future.result()
                if progress:
                    progress(len(outcomes), len(futures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    refusals = [outcome for outcome in outcomes.values() if isinstance(outcome, AccessError)]
    if refusals and len(refusals) == len(outcomes):
        raise refusals[0]
    return iter(sorted(outcomes.items()))


def _facts(kind: str, layouts: dict[str, Layout], address: Address, state: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {"format": kind}
    if NPY in layouts:
        facts |= _schema(layouts[NPY])
    facts["n_bytes"] = state.n_bytes
    if not address.is_local:
        facts |= {"etag": state.etag, "sha256": digests.recall(address, state)}
    if NPY not in layouts:
        facts["members"] = {name: _schema(layout) for name, layout in layouts.items()}
    return facts


def _schema(layout: Layout) -> dict[str, Any]:
    dims = [f"dim_{axis}" for axis in range(len(layout.shape))]
    return {"shape": layout.shape, "dtype": layout.encoding or str(layout.dtype), "dims": dims}


def _datasets(
    described: Sequence[tuple[str, dict[str, Any]]], root_name: str, remarks: list[str]
) -> dict[str, DatasetEntry]:
    """Lay out what was described by the names its keys propose; of equal names the first key in order keeps its own."""
    tree: dict[str, dict[str, dict[str, StoredArray]]] = {}
    for key, facts in described:
        dataset, alpha, array = propose_name(key, root_name)
        _name_dims(facts, array)
        try:
            basis = {fact: Basis.MEASURED for fact in _FACTS if fact == "key" or fact in facts}
            stored = StoredArray(key=key, **facts, basis=basis | ({"dims": Basis.INFERRED} if "dims" in facts else {}))
        except ValidationError as error:
            reason = "; ".join(str(fault["msg"]).removeprefix("Value error, ") for fault in error.errors())
            remarks.append(f"{key!r} was left out: {reason}")
            continue
        arrays = tree.setdefault(dataset, {}).setdefault(alpha, {})
        suffix = _clean(key.rpartition(".")[2]) if "." in key else "x"
        choices = [array, f"{array}_{suffix}", *(f"{array}_{suffix}_{nth}" for nth in range(2, len(described) + 2))]
        chosen = next(choice for choice in choices if choice not in arrays)
        if chosen != array:
            remarks.append(f"{key!r} is named {dataset}/{alpha}/{chosen}, for {array} is another key's name already")
        arrays[chosen] = stored
    return {name: _dataset(name, alphas) for name, alphas in tree.items()}


_FACTS = ("key", "format", "shape", "dtype", "n_bytes")


def _name_dims(facts: dict[str, Any], array: str) -> None:
    for name, schema in [(array, facts), *((f"{array}/{m}", inner) for m, inner in facts.get("members", {}).items())]:
        dims = _DIMS.get(name, ())
        if len(dims) == len(schema.get("shape", ())) > 0:
            schema["dims"] = list(dims)


def _dataset(name: str, alphas: dict[str, dict[str, StoredArray]]) -> DatasetEntry:
    entries = {}
    for alpha_name, arrays in alphas.items():
        found = re.fullmatch(r"(\d+(?:\.\d+)?)pct", alpha_name)
        alpha = float(found[1]) / 100 if found else None
        if alpha is not None and not 0 < alpha < 1:
            alpha = None
        entries[alpha_name] = Alpha(alpha=alpha, arrays=arrays, basis={"alpha": Basis.INFERRED} if alpha else {})
    return DatasetEntry(title=name, alphas=entries, basis={"title": Basis.INFERRED})
