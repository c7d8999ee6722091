"""A run in the release's own layout: `.npy` and `.pt` files under the keys that the release uses, and their catalog.

One writer serves folders and buckets. It reads the run block by block, all arrays side by side, and checks each block
against the digest it was stored with before any of it is written. In a folder a file is written beside its place and
moved there when it is whole; in a bucket an object changes when its upload is completed. Only when all are whole, the
catalog stops listing what they replace, they are put in place, and the catalog lists them: at any moment a place with a
catalog has all that the catalog lists, and no mixture.

A place holds several alphas and several datasets, as the release does: an export replaces what the catalog lists of its
own dataset and alpha and leaves the rest.

Two exports into one folder do not share a file until it is moved into place. What a killed export has left beside its
files is removed by the next one into the same place, once it is a week old: by then nobody is writing it any more. What
a killed publication has sent is gone on with by the next one (see `dmdata.uploads`).
"""

import hashlib
import os
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from dmdata.catalog import Catalog, DatasetEntry, StoredArray
from dmdata.errors import CatalogError, FactualError
from dmdata.formats import npy_header
from dmdata.uploads import EtagDigest, Uploads
from dmpipeline.cataloguing import describe_datamodels
from dmpipeline.derivation import old_result
from dmpipeline.directory import write_beside
from dmpipeline.errors import RunError, VerificationError, explain_os_errors, quoted
from dmpipeline.rows import block_digest
from dmpipeline.store import Progress, Run
from dmpipeline.targets import check_targets, datamodels_path

_COPIED_BYTES = 2**22
_STALE_SECONDS = 7 * 86_400
_CATALOG = "catalog.yaml"
_BY_US = "trained by dmpipeline"
_FINGERPRINT = "fingerprint "


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """One file of an export.

    Attributes
    ----------
    name : str
        The artifact's name, as `digits/50pct/test_margins`.
    key : str
        Path under the folder or prefix, as `digits/data/test_margins_50pct.npy`.
    url : str
        Absolute path, or ``s3://bucket/key``.
    n_bytes : int
    sha256 : str
        In hexadecimal, of the whole file.
    replaced : bool
        Whether the catalog listed the name before.
    sent_bytes : int or None
        Bytes that were sent to the bucket, the rest was there already; None in a folder.
    """

    name: str
    key: str
    url: str
    n_bytes: int
    sha256: str
    replaced: bool
    sent_bytes: int | None = None


def export_run(
    run: Run,
    folder: str | Path,
    datamodels: str | Path | None = None,
    progress: Progress | None = None,
    *,
    train_datamodels: str | Path | None = None,
    requester_pays: bool = False,
) -> list[ExportedFile]:
    """Write a complete run, and datamodels if given, as the release would have them.

    Parameters
    ----------
    run : Run
    folder : path
        Made if it is not there. Files of an earlier export of this dataset and alpha are replaced, others stay listed.
    datamodels, train_datamodels : path, optional
        A `.pt` of test datamodels, and one of training examples, copied as they are. If it is the run's own and old,
        the catalog says so in a note.
    progress : callable, optional
        Called with (rows written, rows in all) after each block.
    requester_pays : bool
        What the catalog says of who pays for reading, once the folder is in a bucket.

    Returns
    -------
    files : list of ExportedFile
        Arrays are C-ordered `.npy` files whose headers are those numpy writes. `catalog.yaml` in the folder lists all.

    Raises
    ------
    IncompleteRunError
        If rows are missing.
    VerificationError
        If a block does not have the bytes it was stored with; nothing is put in place then.
    RunError
        If there are no datamodels at the path given, the run's arrays are damaged, the folder is the run itself, it
        cannot be written to, or its catalog does not go with the run: another dataset of the same name, files that lie
        elsewhere, or other terms of payment.
    dmdata.errors.FormatError
        If the datamodels are not of the release's form.
    """
    folder = Path(folder).absolute()
    if folder.resolve() == run.path.resolve():
        raise RunError(f"{folder} is the run itself, which has a catalog of its own; choose {folder / 'export'}")
    with explain_os_errors(folder), _Folder(folder) as place:
        return _export(run, place, _named(datamodels, train_datamodels), progress, requester_pays=requester_pays)


def publish_run(
    run: Run,
    url: str,
    datamodels: str | Path | None = None,
    progress: Progress | None = None,
    *,
    train_datamodels: str | Path | None = None,
    requester_pays: bool = False,
    acl: str | None = None,
) -> list[ExportedFile]:
    """Write a complete run, and datamodels if given, to a bucket, as `export_run` does to a folder.

    Nothing is written to this machine's disk. Memory holds a block, a part of each file, and four parts that are sent;
    parts are 8 MiB, or a ten-thousandth of a file. Killed or interrupted at any moment, it goes on by the same call:
    parts that the bucket has are not sent again. Objects of the same sizes that are there already are compared first,
    by reading the run once more, and kept where they are the same. Unfinished uploads of this dataset and alpha that
    are of no more use are aborted at the end.

    Parameters
    ----------
    run, datamodels, progress, train_datamodels, requester_pays
        As in `export_run`; rows are counted anew when what is there has been compared.
    url : str
        ``s3://bucket/prefix``.
    acl : str, optional
        Canned ACL of the objects, as "authenticated-read".

    Raises
    ------
    AccessError, SourceError
        If the bucket cannot be written to; what it listed before, it has, and what was sent so far waits there.
    IncompleteRunError, VerificationError, RunError, dmdata.errors.FormatError
        As in `export_run`.
    """
    with explain_os_errors(run.path, "read"), Uploads(url, acl=acl) as place:
        try:
            fitted = _named(datamodels, train_datamodels)
            return _export(run, place, fitted, progress, requester_pays=requester_pays)
        except FactualError as error:
            if place.has_unfinished:
                error.message += f"; what was sent waits in {place.url}, and the same command goes on from there"
            raise


class _Sink(Protocol):
    """A file that is being written: all of it, in order, then `finish`, then `put_in_place`, which is quick."""

    @property
    def sent_bytes(self) -> int | None: ...

    def write(self, data: bytes | memoryview) -> None: ...

    def finish(self) -> None: ...

    def put_in_place(self) -> None: ...


class _Place(Protocol):
    """Where an export goes; names are paths below it. `_Folder`, and `dmdata.uploads.Uploads`, which explains them."""

    url: str

    def read(self, name: str) -> bytes | None: ...

    def put(self, name: str, data: bytes) -> None: ...

    def remove(self, name: str) -> None: ...

    def etag(self, name: str, n_bytes: int) -> str | None: ...

    def begin(self, name: str, n_bytes: int) -> _Sink: ...

    def keep(self, name: str) -> None: ...

    def abort_unfinished(self, folder: str, belongs: Any) -> None: ...


@dataclass(slots=True)
class _Output:
    """A file's bytes on their way: digested, counted, and handed on."""

    key: str
    n_bytes: int
    sink: Any = None
    etag: EtagDigest | None = None
    digest: Any = field(default_factory=hashlib.sha256)
    n_written: int = 0

    def write(self, data: bytes | memoryview) -> None:
        self.digest.update(data)
        self.n_written += len(data)
        for taker in filter(None, (self.sink, self.etag)):
            taker.write(data)


def _named(datamodels: str | Path | None, train_datamodels: str | Path | None) -> dict[str, Path]:
    """Name the files of datamodels that are given as catalogs do."""
    given = {"test_datamodels": datamodels, "train_datamodels": train_datamodels}
    return {name: Path(path) for name, path in given.items() if path is not None}


def _export(
    run: Run, place: _Place, fitted: Mapping[str, Path], progress: Progress | None, *, requester_pays: bool
) -> list[ExportedFile]:
    run.require_complete()
    stored = _describe(run, fitted)
    ours = _catalog_of(run, stored, requester_pays=requester_pays)
    ((dataset, entry),) = ours.datasets.items()
    (alpha_name,) = entry.alphas
    listed = _listed(place, ours)
    outputs = _kept(run, place, stored, fitted, progress)
    sinks = {name: place.begin(stored[name].key, stored[name].n_bytes) for name in stored if name not in outputs}
    outputs |= {name: _Output(stored[name].key, stored[name].n_bytes, sink) for name, sink in sinks.items()}
    _write(run, {name: outputs[name] for name in sinks}, fitted, progress)
    for sink in sinks.values():
        sink.finish()
    replaced = {artifact.name for artifact in listed.artifacts()} if listed else set()
    _list_others(place, _listed(place, ours), dataset, alpha_name)
    for name in stored:
        if name in sinks:
            sinks[name].put_in_place()
        else:
            place.keep(stored[name].key)
    stored = {
        name: entry.model_copy(update={"sha256": outputs[name].digest.hexdigest()}) for name, entry in stored.items()
    }
    ours = _catalog_of(run, stored, requester_pays=requester_pays)
    place.put(_CATALOG, _merged(_listed(place, ours), ours, dataset, alpha_name).dump().encode())
    place.abort_unfinished(dataset, lambda key: Path(key).stem.endswith(f"_{alpha_name}"))
    is_folder = isinstance(place, _Folder)
    return [
        ExportedFile(
            name=f"{dataset}/{alpha_name}/{name}",
            key=entry.key,
            url=f"{place.url}/{entry.key}",
            n_bytes=entry.n_bytes,
            sha256=outputs[name].digest.hexdigest(),
            replaced=f"{dataset}/{alpha_name}/{name}" in replaced,
            sent_bytes=None if is_folder else sinks[name].sent_bytes if name in sinks else 0,
        )
        for name, entry in stored.items()
    ]


def _describe(run: Run, fitted: Mapping[str, Path]) -> dict[str, StoredArray]:
    """Describe all files before any is written; their digests are not known yet."""
    names, dataset, alpha_name = run.spec.arrays, run.dataset().name, run.alpha_name
    stored = {}
    for name in names:
        n_bytes = len(_header(run, name)) + run.array(name).nbytes
        stored[name] = run.describe(name, key=f"{dataset}/data/{name}_{alpha_name}.npy", form="npy", n_bytes=n_bytes)
    for name, path in fitted.items():
        if not path.is_file():
            raise RunError(f"{path} is no file; fit datamodels first, or leave them out of the export", path=path)
        key = f"{dataset}/datamodels/{name.partition('_')[0]}_{alpha_name}.pt"
        stored[name] = describe_datamodels(path, name=name, key=key, note=_why_old(run, name, path))
    return stored


def _why_old(run: Run, name: str, path: Path) -> str | None:
    """Say of datamodels that are the run's own, and are old, what they were fitted on."""
    targets = check_targets(name.partition("_")[0])
    is_own = path.resolve() == datamodels_path(run, targets).resolve()
    old = old_result(run, "datamodels", targets) if is_own else None
    return None if old is None else old.why


def _kept(
    run: Run, place: _Place, stored: Mapping[str, StoredArray], fitted: Mapping[str, Path], progress: Progress | None
) -> dict[str, _Output]:
    """Read what would be written where the place has files of the same sizes; return those that it has."""
    etags = {name: place.etag(entry.key, entry.n_bytes) for name, entry in stored.items()}
    outputs = {
        name: _Output(stored[name].key, stored[name].n_bytes, etag=EtagDigest(stored[name].n_bytes))
        for name, etag in etags.items()
        if etag is not None
    }
    _write(run, outputs, fitted, progress)
    return {name: output for name, output in outputs.items() if output.etag and output.etag.etag == etags[name]}


def _write(run: Run, outputs: Mapping[str, _Output], fitted: Mapping[str, Path], progress: Progress | None) -> None:
    if arrays := {name: output for name, output in outputs.items() if name not in fitted}:
        _write_arrays(run, arrays, progress)
    for name in fitted:
        if name in outputs:
            _copy(fitted[name], outputs[name])


def _write_arrays(run: Run, outputs: Mapping[str, _Output], progress: Progress | None) -> None:
    """Write all arrays side by side, so that each block is read once and checked before any of it is written."""
    for name, output in outputs.items():
        output.write(_header(run, name))
    for digest, rows in zip(run.digests(), run.spec.blocks, strict=True):
        block = run.read_block(rows)
        if block_digest(block) != digest.tobytes():
            wrong = f"rows {rows.start} to {rows.stop - 1} of {run.path} are not what was stored"
            raise VerificationError(f"{wrong}; see `dmpipeline verify {quoted(run.path)}`", findings=[wrong])
        for name, output in outputs.items():
            output.write(_elements(block[name]))
        if progress is not None:
            progress(rows.stop, run.spec.n_rows)


def _header(run: Run, name: str) -> bytes:
    array = run.array(name)
    return npy_header(array.shape, array.dtype)


def _elements(array: npt.NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _copy(source: Path, output: _Output) -> None:
    with explain_os_errors(source, "copied"), open(source, "rb") as file:
        while piece := file.read(_COPIED_BYTES):
            output.write(piece)
    if output.n_written != output.n_bytes:
        raise RunError(f"{source} changed while it was copied; wait until it is written, and try again", path=source)


def _catalog_of(run: Run, stored: Mapping[str, StoredArray], *, requester_pays: bool) -> Catalog:
    """Catalog this run alone; notes tell its recipe, and its dataset from another of the same sizes."""
    catalog, spec = run.catalog(stored), run.spec
    ((dataset, entry),) = catalog.datasets.items()
    recipe = f"{spec.recipe.name}@{spec.recipe.version}, seed {spec.seed}"
    alphas = {
        name: alpha.model_copy(update={"note": "; ".join(filter(None, [recipe, alpha.note]))})
        for name, alpha in entry.alphas.items()
    }
    entry = entry.model_copy(update={"alphas": alphas, "note": _FINGERPRINT + run.dataset().fingerprint})
    source = catalog.source.model_copy(update={"requester_pays": requester_pays})
    return catalog.model_copy(update={"source": source, "datasets": {dataset: entry}})


def _listed(place: _Place, ours: Catalog) -> Catalog | None:
    """Read the catalog that is there, if there is one, and make sure that what we export may be added to it."""
    text = place.read(_CATALOG)
    if text is None:
        return None
    origin = f"{place.url}/{_CATALOG}"
    try:
        catalog = Catalog.parse(text.decode(errors="replace"), origin=origin)
    except CatalogError as error:
        raise RunError(f"{error}; mend or remove it, or choose another destination", path=origin) from error
    if catalog.source.url.rstrip("/") != place.url:
        raise RunError(
            f"{origin} lists files in {catalog.source.url}, not beside it; choose another destination", path=origin
        )
    ((dataset, entry),) = ours.datasets.items()
    (alpha_name,) = entry.alphas
    if differing := _difference(catalog.datasets.get(dataset), entry):
        fact, there, wanted = differing
        raise RunError(
            f"{origin} lists another dataset named {dataset}: its {fact} is {there!r}, not {wanted!r}; "
            "choose another destination",
            path=origin,
        )
    wanted_pays = ours.source.requester_pays
    if _others(catalog, dataset, alpha_name).datasets and catalog.source.requester_pays != wanted_pays:
        there, remedy = (
            ("the bucket's owner pays", "leave out --requester-pays (requester_pays=False)")
            if wanted_pays
            else ("readers pay", "add --requester-pays (requester_pays=True)")
        )
        raise RunError(f"{origin} says that {there}; {remedy}, or choose another destination", path=origin)
    return catalog


def _difference(there: DatasetEntry | None, ours: DatasetEntry) -> tuple[str, object, object] | None:
    """Find the first fact by which two datasets of one name are not the same."""
    if there is None:
        return None
    for fact in ("n_train", "n_test", "n_classes", "example_order", "note"):
        old, new = getattr(there, fact), getattr(ours, fact)
        is_known = old is not None and (fact != "note" or old.startswith(_FINGERPRINT))
        if is_known and old != new:
            return fact, old, new
    return None


def _others(catalog: Catalog, dataset: str, alpha_name: str) -> Catalog:
    """Leave one dataset's alpha out of a catalog."""
    datasets = dict(catalog.datasets)
    if dataset in datasets:
        entry = datasets.pop(dataset)
        if alphas := {name: alpha for name, alpha in entry.alphas.items() if name != alpha_name}:
            datasets[dataset] = entry.model_copy(update={"alphas": alphas})
    return catalog.model_copy(update={"datasets": datasets})


def _list_others(place: _Place, listed: Catalog | None, dataset: str, alpha_name: str) -> None:
    """Have the catalog that is there list nothing that is about to be replaced."""
    if listed is None or alpha_name not in getattr(listed.datasets.get(dataset), "alphas", ()):
        return
    others = _others(listed, dataset, alpha_name)
    if others.datasets:
        source = others.source.model_copy(update={"url": "."})
        place.put(_CATALOG, others.model_copy(update={"source": source}).dump().encode())
    else:
        place.remove(_CATALOG)


def _merged(listed: Catalog | None, ours: Catalog, dataset: str, alpha_name: str) -> Catalog:
    """Add this run to what else is listed; a title that people wrote stays, one of ours stays true."""
    if listed is None:
        return ours
    others = _others(listed, dataset, alpha_name)
    entry = ours.datasets[dataset]
    if there := others.datasets.get(dataset):
        alphas = {**there.alphas, **entry.alphas}
        alphas = dict(sorted(alphas.items(), key=lambda item: (item[1].alpha is None, item[1].alpha or 0.0)))
        entry = there.model_copy(update={"alphas": alphas})
    datasets = {**others.datasets, dataset: entry}
    title = listed.title
    if title.endswith(_BY_US) and title != ours.title:
        title = f"{', '.join(datasets)}, {_BY_US}" if others.datasets else ours.title
    source = listed.source.model_copy(update={"url": ".", "requester_pays": ours.source.requester_pays})
    return listed.model_copy(update={"title": title, "source": source, "datasets": datasets})


class _Folder:
    """A folder as an export's place; leaving it removes what is not in place."""

    def __init__(self, folder: Path) -> None:
        self.url = str(folder)
        self._folder = folder
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def read(self, name: str) -> bytes | None:
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def put(self, name: str, data: bytes) -> None:
        write_beside(self._folder / name, data)

    def remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    def etag(self, name: str, n_bytes: int) -> str | None:
        """None: files are written anew, which costs less than comparing them."""

    def begin(self, name: str, n_bytes: int) -> "_FileBeside":  # noqa: ARG002 - a bucket's place needs it
        return self._stack.enter_context(_FileBeside(self._folder / name))

    def keep(self, name: str) -> None: ...

    def abort_unfinished(self, folder: str, belongs: Any) -> None: ...


class _FileBeside:
    """A file being written beside its place."""

    sent_bytes = None

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent, f".{path.name}.*.partial")
        self._path = path
        self._partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        self._file: IO[bytes] = open(self._partial, "wb")  # noqa: SIM115 - closed on leaving

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._file.close()
        finally:
            self._partial.unlink(missing_ok=True)

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)

    def finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def put_in_place(self) -> None:
        os.replace(self._partial, self._path)


def _remove_stale(folder: Path, pattern: str) -> None:
    for left in folder.glob(pattern):
        try:
            if time.time() - left.stat().st_mtime >= _STALE_SECONDS:
                left.unlink()
        except OSError:  # somebody else removes it, or it is not ours to remove
            continue
