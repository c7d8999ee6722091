"""A run in the release's own layout: `.npy` and `.pt` files under the keys that the release uses, and their catalog.

What is exported is checked against the digests it was stored with while it is written. A file is written beside its
place and moved there when it is whole, the catalog last: a folder with a catalog has all that the catalog lists.

Two exports into one folder do not share a file until it is moved into place. What an export or publication that was
killed has left beside its files is removed by the next one into the same place, once it is a week old: by then nobody
is writing it any more.
"""

import hashlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from dmdata.formats import npy_header
from dmdata.s3 import remove, upload
from dmpipeline.directory import write_beside
from dmpipeline.errors import RunError, VerificationError, explain_os_errors
from dmpipeline.store import Progress, Run, block_digest, describe_datamodels

_COPIED_BYTES = 2**22
_STALE_SECONDS = 7 * 86_400


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """One file of an export.

    Attributes
    ----------
    name : str
        The artifact's name, as `digits/50pct/test_margins`.
    key : str
        Path under the folder, as `digits/data/test_margins_50pct.npy`.
    path : pathlib.Path
    n_bytes : int
    sha256 : str
        In hexadecimal, of the whole file.
    """

    name: str
    key: str
    path: Path
    n_bytes: int
    sha256: str


def export_run(
    run: Run,
    folder: str | Path,
    datamodels: str | Path | None = None,
    progress: Progress | None = None,
    *,
    requester_pays: bool = False,
) -> list[ExportedFile]:
    """Write a complete run, and datamodels if given, as the release would have them.

    Parameters
    ----------
    run : Run
    folder : path
        Made if it is not there; files of an earlier export are replaced.
    datamodels : path, optional
        A `.pt` of test datamodels, copied as it is.
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
        If there are no datamodels at the path given, the run's arrays are damaged, the folder is the run itself, or it
        cannot be written to.
    dmdata.errors.FormatError
        If the datamodels are not of the release's form.
    """
    run.require_complete()
    folder = Path(folder).absolute()
    if folder.resolve() == run.path.resolve():
        raise RunError(f"{folder} is the run itself, which has a catalog of its own; choose {folder / 'export'}")
    dataset, alpha_name = run.dataset().name, run.spec.alpha_name
    keys = {name: f"{dataset}/data/{name}_{alpha_name}.npy" for name in run.spec.arrays}
    # on any error the stack removes what is not in place yet
    with explain_os_errors(folder), ExitStack() as stack:
        outputs = {name: stack.enter_context(_output(folder / key)) for name, key in keys.items()}
        _write_arrays(run, outputs, progress)
        if datamodels is not None:
            keys["test_datamodels"] = f"{dataset}/datamodels/test_{alpha_name}.pt"
            outputs["test_datamodels"] = stack.enter_context(_output(folder / keys["test_datamodels"]))
            _copy(Path(datamodels), outputs["test_datamodels"])
        # an earlier export's catalog must not list a mixture of old and new files
        (folder / "catalog.yaml").unlink(missing_ok=True)
        for output in outputs.values():
            output.put_in_place()
    files = [
        ExportedFile(f"{dataset}/{alpha_name}/{name}", keys[name], output.path, output.n_bytes, output.sha256)
        for name, output in outputs.items()
    ]
    write_beside(folder / "catalog.yaml", _catalog_text(run, files, requester_pays))
    return files


def publish_run(
    run: Run,
    url: str,
    datamodels: str | Path | None = None,
    progress: Progress | None = None,
    *,
    requester_pays: bool = False,
    acl: str | None = None,
) -> list[ExportedFile]:
    """Write a complete run, and datamodels if given, to a bucket, as `export_run` does to a folder.

    The files are made in the run's directory first. Then the catalog of an earlier publication is deleted, the files
    are uploaded, and their own catalog last: a bucket with a catalog has all that the catalog lists.

    Parameters
    ----------
    run, datamodels, progress, requester_pays
        As in `export_run`.
    url : str
        ``s3://bucket/prefix``.
    acl : str, optional
        Canned ACL of the objects, as "authenticated-read".

    Raises
    ------
    AccessError, SourceError
        If the bucket cannot be written to; objects uploaded so far stay, without a catalog.
    """
    base = url.rstrip("/")
    _remove_stale(run.path, ".publishing-*")
    with (
        explain_os_errors(run.path),
        tempfile.TemporaryDirectory(dir=run.path, prefix=".publishing-") as staging,
    ):
        files = export_run(run, staging, datamodels, progress, requester_pays=requester_pays)
        remove(f"{base}/catalog.yaml")
        for key in (*(file.key for file in files), "catalog.yaml"):
            os.utime(staging)  # still in use, however long the uploads take
            upload(Path(staging) / key, f"{base}/{key}", acl=acl)
    return files


class _Output:
    """A file being written beside its place, counted and digested on the way."""

    def __init__(self, path: Path, partial: Path, file: IO[bytes]) -> None:
        self.path = path
        self.n_bytes = 0
        self._partial = partial
        self._file = file
        self._digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.n_bytes += len(data)

    def put_in_place(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._partial, self.path)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


@contextmanager
def _output(path: Path) -> Iterator[_Output]:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path.parent, f".{path.name}.*.partial")
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "wb") as file:
            yield _Output(path, partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _remove_stale(folder: Path, pattern: str) -> None:
    for left in folder.glob(pattern):
        try:
            if time.time() - left.stat().st_mtime < _STALE_SECONDS:
                continue
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()
        except OSError:  # somebody else removes it, or it is not ours to remove
            continue


def _write_arrays(run: Run, outputs: dict[str, _Output], progress: Progress | None) -> None:
    """Write all arrays side by side, so that each block is read once and checked before any of it is written."""
    for name, output in outputs.items():
        array = run.array(name)
        output.write(npy_header(array.shape, array.dtype))
    for digest, rows in zip(run.digests(), run.spec.blocks, strict=True):
        block = run.read_block(rows)
        if block_digest(block) != digest.tobytes():
            wrong = f"rows {rows.start} to {rows.stop - 1} of {run.path} are not what was stored"
            raise VerificationError(f"{wrong}; see `dmpipeline verify {run.path}`", findings=[wrong])
        for name, output in outputs.items():
            output.write(_elements(block[name]))
        if progress is not None:
            progress(rows.stop, run.spec.n_rows)


def _elements(array: npt.NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _copy(source: Path, output: _Output) -> None:
    if not source.is_file():
        raise RunError(f"{source} is no file; fit datamodels first, or leave them out of the export", path=source)
    describe_datamodels(source, key=source.name)
    with explain_os_errors(source, "copied"), open(source, "rb") as file:
        while piece := file.read(_COPIED_BYTES):
            output.write(piece)


def _catalog_text(run: Run, files: list[ExportedFile], requester_pays: bool) -> str:
    stored = {}
    for file in files:
        name = file.name.rpartition("/")[2]
        if name in run.spec.arrays:
            stored[name] = run.describe(name, key=file.key, form="npy", n_bytes=file.n_bytes, sha256=file.sha256)
        else:
            stored[name] = describe_datamodels(file.path, key=file.key, sha256=file.sha256)
    catalog = run.catalog(stored)
    source = catalog.source.model_copy(update={"requester_pays": requester_pays})
    return catalog.model_copy(update={"source": source}).dump()
