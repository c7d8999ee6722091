"""A run in the release's own layout: `.npy` and `.pt` files under the keys that the release uses, and their catalog.

One writer serves folders and buckets. It reads the run block by block, all arrays side by side, and checks each block
against the digest it was stored with before any of it is written. In a folder a file is written next to its place and
moved there when it is whole; in a bucket an object changes when its upload is completed. Only when all are whole, the
catalog stops listing what they replace, they are put in place, and the catalog lists them: at any moment a place with a
catalog has all that the catalog lists, and no mixture.

A place holds several alphas and several datasets, as the release does: an export replaces what the catalog lists of its
own dataset and alpha and leaves the rest.

Two exports into one folder do not share a file until it is moved into place. What a killed export has left next to its
files is removed by the next one into the same place, once it is a week old: by then no process is writing it any more.
What a killed publication has sent is resumed by the next one (see `dmdata.objects.uploads`).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dmdata.catalog.entries import StoredArray
from dmdata.errors import FactualError
from dmdata.layout.formats import npy_header
from dmdata.objects.uploads import EtagDigest, Uploads
from dmdata.reading.long_work import shows_count
from dmpipeline.data.examples import Dataset
from dmpipeline.errors import RunError, VerificationError, explain_os_errors, quoted
from dmpipeline.exporting.listing import CATALOG, catalog_of_export, list_others, listed_at, merged
from dmpipeline.exporting.places import Folder, Place
from dmpipeline.runs.cataloguing import describe_datamodels
from dmpipeline.runs.derivation import old_result
from dmpipeline.runs.rows import block_digest
from dmpipeline.runs.store import Run
from dmpipeline.runs.stored import RowProgress
from dmpipeline.runs.targets import check_targets, datamodels_path

_COPIED_BYTES = 2**22


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


@shows_count("exporting", "models")
def export_run(
    run: Run,
    folder: str | Path,
    datamodels: str | Path | None = None,
    progress: RowProgress | None = None,
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
        Called with (rows written, rows in total) after each block.
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
    with explain_os_errors(folder), Folder(folder) as place:
        return _export(run, place, _named(datamodels, train_datamodels), progress, requester_pays=requester_pays)


@shows_count("publishing", "models")
def publish_run(
    run: Run,
    url: str,
    datamodels: str | Path | None = None,
    progress: RowProgress | None = None,
    *,
    train_datamodels: str | Path | None = None,
    requester_pays: bool = False,
    acl: str | None = None,
) -> list[ExportedFile]:
    """Write a complete run, and datamodels if given, to a bucket, as `export_run` does to a folder.

    Nothing is written to this machine's disk. Memory holds a block, a part of each file, and four parts that are sent;
    parts are 8 MiB, or a ten-thousandth of a file. Killed or interrupted at any moment, the same call resumes it:
    parts that the bucket has are not sent again. Objects of the same sizes that are there already are compared first,
    by reading the run once more, and kept where they are the same. Unfinished uploads of this dataset and alpha that
    are of no more use are aborted at the end.

    Parameters
    ----------
    run, datamodels, progress, train_datamodels, requester_pays
        As in `export_run`; rows are counted again when what is there has been compared.
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
                error.message += f"; what was sent waits in {place.url}, and the same command resumes from there"
            raise


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
    run: Run, place: Place, fitted: Mapping[str, Path], progress: RowProgress | None, *, requester_pays: bool
) -> list[ExportedFile]:
    run.require_complete()
    data = run.dataset()
    stored = _describe(run, data, fitted)
    ours = catalog_of_export(run, data, stored, requester_pays=requester_pays)
    ((dataset, entry),) = ours.datasets.items()
    (alpha_name,) = entry.alphas
    listed = listed_at(place, ours)
    outputs = _kept(run, place, stored, fitted, progress)
    sinks = {name: place.begin(stored[name].key, stored[name].n_bytes) for name in stored if name not in outputs}
    outputs |= {name: _Output(stored[name].key, stored[name].n_bytes, sink) for name, sink in sinks.items()}
    _write(run, {name: outputs[name] for name in sinks}, fitted, progress)
    for sink in sinks.values():
        sink.finish()
    replaced = {artifact.name for artifact in listed.artifacts()} if listed else set()
    list_others(place, listed_at(place, ours), dataset, alpha_name)
    for name in stored:
        if name in sinks:
            sinks[name].put_in_place()
        else:
            place.keep(stored[name].key)
    stored = {
        name: entry.model_copy(update={"sha256": outputs[name].digest.hexdigest()}) for name, entry in stored.items()
    }
    ours = catalog_of_export(run, data, stored, requester_pays=requester_pays)
    place.put(CATALOG, merged(listed_at(place, ours), ours, dataset, alpha_name).dump().encode())
    place.abort_unfinished(dataset, lambda key: Path(key).stem.endswith(f"_{alpha_name}"))
    is_folder = isinstance(place, Folder)
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


def _describe(run: Run, data: Dataset, fitted: Mapping[str, Path]) -> dict[str, StoredArray]:
    """Describe all files before any is written; their digests are not known yet."""
    names, dataset, alpha_name = run.spec.arrays, data.name, run.alpha_name
    stored = {}
    for name in names:
        n_bytes = len(_header(run, name)) + run.array(name).nbytes
        stored[name] = run.describe(name, key=f"{dataset}/data/{name}_{alpha_name}.npy", form="npy", n_bytes=n_bytes)
    for name, path in fitted.items():
        if not path.is_file():
            raise RunError(f"{path} is not a file; fit datamodels first, or leave them out of the export", path=path)
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
    run: Run, place: Place, stored: Mapping[str, StoredArray], fitted: Mapping[str, Path], progress: RowProgress | None
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


def _write(run: Run, outputs: Mapping[str, _Output], fitted: Mapping[str, Path], progress: RowProgress | None) -> None:
    if arrays := {name: output for name, output in outputs.items() if name not in fitted}:
        _write_arrays(run, arrays, progress)
    for name in fitted:
        if name in outputs:
            _copy(fitted[name], outputs[name])


def _write_arrays(run: Run, outputs: Mapping[str, _Output], progress: RowProgress | None) -> None:
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
