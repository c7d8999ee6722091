"""A run's directory: what was specified, what is trained so far, and how it came about.

::

    run/
      run.yaml            the spec; written last when a run is created, so a directory that has it is whole
      provenance.json     versions, machine, dataset fingerprint, training sessions
      store.zarr/         train_masks, test_margins, train_margins, test_logits, train_logits, block_digests
      catalog.yaml        the same arrays by name, once all rows are there; dmdata opens it
      datamodels/         test_50pct.pt, when datamodels were fitted
      lock                says which process creates the run or trains which block; may be deleted when none does

Models are trained and stored in blocks that are whole chunks. A block's data are written first and its digest, the
SHA-256 of the data, last: a block without a digest was never finished and is trained again, one with a digest never is.
So a run killed at any moment loses the blocks in flight and nothing else, and a creation that was killed is begun anew
by the next. Several processes may train one run: each
claims a block by a lock that ends with the process, and where locks do not reach, two of them write the same bytes,
because a row depends on nothing but its draws.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt
import torch
import zarr
from zarr.codecs import BloscCodec

from dmdata.catalog import Alpha, ArraySchema, Basis, Catalog, DatasetEntry, SourceEntry, StoredArray
from dmdata.catalog import Rows as CatalogRows
from dmdata.errors import FormatError
from dmdata.formats import pt_layouts
from dmpipeline.datasets import Dataset, load_dataset
from dmpipeline.errors import IncompleteRunError, RunError, RunExistsError, explain_os_errors
from dmpipeline.masks import subset_size
from dmpipeline.outputs import correct_class_margins
from dmpipeline.recipes import find_recipe
from dmpipeline.spec import RunSpec
from dmpipeline.train import train_rows

ARRAYS = ("train_masks", "test_margins", "train_margins", "test_logits", "train_logits")
"""Names of a run's arrays, in the order in which a block's digest covers them."""

Block = Mapping[str, npt.NDArray[Any]]
"""Rows of each of ARRAYS."""

Progress = Callable[[int, int], None]
"""Called with the rows done and the rows in all."""

_DIMS = {
    "train_masks": ("model", "train_example"),
    "test_margins": ("model", "test_example"),
    "train_margins": ("model", "train_example"),
    "test_logits": ("model", "test_example", "class"),
    "train_logits": ("model", "train_example", "class"),
}
_LARGEST_CHUNK_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class Run:
    """A run on disk; made by `create` or `open`.

    Attributes
    ----------
    path : pathlib.Path
        Absolute path of the run's directory.
    spec : RunSpec
    arrays : zarr.Group
        The store; `array` looks one up by name.
    """

    path: Path
    spec: RunSpec
    arrays: zarr.Group

    @classmethod
    def create(cls, path: str | Path, spec: RunSpec) -> Self:
        """Create a run, or open the one that is there if its spec is the same.

        Raises
        ------
        SpecError
            If the dataset, its subsets or the recipe cannot be used.
        RunExistsError
            If the path holds another spec's run, or anything else but what a killed creation left.
        RunError
            If the directory cannot be made or written to.
        """
        path, spec = Path(path).absolute(), spec.located(Path.cwd())
        with explain_os_errors(path):
            if (path / "run.yaml").exists():
                return cls._resume(path, spec)
            dataset = load_dataset(spec.dataset)
            subset_size(dataset.n_train, spec.alpha)
            find_recipe(spec.recipe)
            _require_vacant(path)
            path.mkdir(parents=True, exist_ok=True)
            with open(path / "lock", "ab") as lock, _claimed(lock, 0, wait=True):
                # another process may have created it meanwhile
                if not (path / "run.yaml").exists():
                    _create_files(path, spec, dataset)
        return cls._resume(path, spec)

    @classmethod
    def _resume(cls, path: Path, spec: RunSpec) -> Self:
        run = cls.open(path)
        there, wanted = run.spec.model_dump(), spec.model_dump()
        if differing := [name for name in wanted if there[name] != wanted[name]]:
            name = differing[0]
            raise RunExistsError(
                f"{path} holds a run with {name} {there[name]!r}, not {wanted[name]!r}; "
                f"choose another directory, or go on with that run by `dmpipeline run {path}`",
                path=path,
            )
        return run

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a run, complete or not.

        Raises
        ------
        RunError
            If there is no run, or its store cannot be opened.
        SpecError
            If its run.yaml was damaged.
        """
        path = Path(path).absolute()
        with explain_os_errors(path, "opened"):
            if not (path / "run.yaml").is_file():
                raise RunError(f"{path} is no run: it has no run.yaml; create one with `dmpipeline init`", path=path)
        spec = RunSpec.read(path / "run.yaml")
        try:
            arrays = zarr.open_group(path / "store.zarr", mode="r+", zarr_format=3)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            # zarr takes a damaged zarr.json for what it should be, and stumbles in several ways
            raise RunError(f"{path} has no readable store.zarr ({error}); restore it", path=path) from error
        return cls(path=path, spec=spec, arrays=arrays)

    def array(self, name: str) -> zarr.Array[Any]:
        """Look up one of ARRAYS; rows that are not trained yet read as False or NaN.

        Raises
        ------
        RunError
            If the store lacks it.
        """
        try:
            array = self.arrays[name]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._damaged(f"has no readable array {name}") from error
        if not isinstance(array, zarr.Array):
            raise self._damaged(f"holds a group where array {name} should be")
        return array

    @property
    def provenance(self) -> dict[str, Any]:
        """What provenance.json says: `created`, `versions`, `machine`, `dataset` and training `sessions`."""
        try:
            facts: dict[str, Any] = json.loads((self.path / "provenance.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._damaged(f"has no readable provenance.json ({error})") from error
        match facts:
            case {"dataset": {"fingerprint": str()}, "sessions": list()}:
                return facts
        raise self._damaged("has a provenance.json without the dataset's fingerprint or without sessions")

    @property
    def datamodels_path(self) -> Path:
        """Where this run's datamodels of test examples belong; `write_catalog` lists them if they are there."""
        return self.path / "datamodels" / f"test_{self.spec.alpha_name}.pt"

    def dataset(self) -> Dataset:
        """Load the dataset and make sure that it is the one the run was created with.

        Raises
        ------
        RunError
            If the dataset has changed since.
        """
        dataset = load_dataset(self.spec.dataset)
        recorded = self.provenance["dataset"]["fingerprint"]
        if dataset.fingerprint != recorded:
            raise RunError(
                f"dataset {self.spec.dataset} has fingerprint {dataset.fingerprint[:12]}, but the run at {self.path} "
                f"was created with {recorded[:12]}; restore the dataset, or create another run",
                path=self.path,
            )
        return dataset

    def digests(self) -> npt.NDArray[np.uint8]:
        """Read the blocks' recorded digests, shape (n_blocks, 32); all zeros where a block is not done.

        Raises
        ------
        RunError
            If they are damaged.
        """
        return self._read("block_digests", slice(None))

    @property
    def n_rows_done(self) -> int:
        """Count of rows in finished blocks."""
        return sum(len(self.spec.blocks[block]) for block in np.flatnonzero(self.digests().any(1)).tolist())

    def require_complete(self) -> None:
        """Raise IncompleteRunError, with `n_missing`, unless every row is trained."""
        if n_missing := self.spec.n_rows - self.n_rows_done:
            raise IncompleteRunError(
                f"{self.path} lacks {n_missing:,} of {self.spec.n_rows:,} models; "
                f"train them with `dmpipeline run {self.path}`",
                path=self.path,
                n_missing=n_missing,
            )

    def read_block(self, rows: range) -> Block:
        """Read some rows of every array into memory.

        Raises
        ------
        RunError
            If some of it is damaged; `reason` says how, in the words of whoever could not read it.
        """
        return {name: self._read(name, slice(rows.start, rows.stop)) for name in ARRAYS}

    def train(self, progress: Progress | None = None) -> None:
        """Train and store the blocks that are missing, then write the catalog.

        Parameters
        ----------
        progress : callable, optional
            Called with (rows done, rows in all) at the start and after each block; rows that other processes finished
            count.

        Raises
        ------
        TrainingError
            If a model's logits cannot be stored; its block is left out, blocks before it stay.
        RunError
            If the dataset has changed since the run was created, or its directory cannot be written to.
        """
        dataset, started, n_trained = self.dataset(), datetime.now(UTC), 0
        clock = time.monotonic()
        report = progress or _say_nothing
        report(self.n_rows_done, self.spec.n_rows)
        # opened once: closing any handle of the file would drop this process's other claims
        with explain_os_errors(self.path), open(self.path / "lock", "ab") as lock:
            try:
                for block in self._missing_blocks(lock):
                    self._train_block(dataset, block)
                    n_trained += len(self.spec.blocks[block])
                    report(self.n_rows_done, self.spec.n_rows)
            finally:
                if n_trained:
                    self._record_session(lock, started, time.monotonic() - clock, n_trained)
        report(self.n_rows_done, self.spec.n_rows)
        self.write_catalog()

    def write_catalog(self, *, datamodels: bool = True) -> Path:
        """Write catalog.yaml, by which dmdata opens this run's arrays and datamodels; return its path.

        Parameters
        ----------
        datamodels : bool
            Whether to list the file at `datamodels_path`, if it is there.

        Raises
        ------
        IncompleteRunError
            If rows are missing.
        FormatError
            If the file at `datamodels_path` is not one of datamodels.
        """
        self.require_complete()
        stored = {name: self.describe(name, key=f"store.zarr/{name}", form="zarr") for name in ARRAYS}
        if datamodels and self.datamodels_path.exists():
            key = self.datamodels_path.relative_to(self.path).as_posix()
            stored["test_datamodels"] = describe_datamodels(self.datamodels_path, key=key)
        path = self.path / "catalog.yaml"
        write_beside(path, self.catalog(stored).dump())
        return path

    def describe(
        self, name: str, *, key: str, form: str, n_bytes: int | None = None, sha256: str | None = None
    ) -> StoredArray:
        """Describe one of ARRAYS for a catalog; without `n_bytes`, those of its elements are meant."""
        array = self.array(name)
        return StoredArray.model_validate(
            {
                "key": key,
                "format": form,
                "shape": array.shape,
                "dtype": str(array.dtype),
                "dims": _DIMS[name],
                "n_bytes": array.nbytes if n_bytes is None else n_bytes,
                "sha256": sha256,
                "basis": _measured("key", "format", "shape", "dtype", "dims", "n_bytes"),
            }
        )

    def catalog(self, stored: Mapping[str, StoredArray]) -> Catalog:
        """Catalog artifacts of this run under `dataset/alpha/name`; their keys start at the catalog's folder."""
        spec, dataset = self.spec, self.dataset()
        rows = spec.rows
        alpha = Alpha(
            alpha=spec.alpha,
            rows=CatalogRows(
                fit=(rows.models.start, rows.models.stop),
                evaluation=(rows.held_out.start, rows.held_out.stop),
                n_retrainings=spec.held_out.n_retrainings,
            ),
            arrays=dict(stored),
            basis=_measured("alpha", "rows"),
        )
        entry = DatasetEntry(
            title=dataset.name,
            n_train=dataset.n_train,
            n_test=dataset.n_test,
            n_classes=dataset.n_classes,
            example_order=dataset.example_order,
            alphas={spec.alpha_name: alpha},
            basis=_measured("title", "n_train", "n_test", "n_classes", "example_order"),
        )
        return Catalog(
            version=1,
            title=f"{dataset.name}, {spec.recipe.name}@{spec.recipe.version}, seed {spec.seed}, trained by dmpipeline",
            source=SourceEntry(url=".", basis=_measured("url", "requester_pays")),
            datasets={dataset.name: entry},
        )

    def _read(self, name: str, rows: slice) -> npt.NDArray[Any]:
        array = self.array(name)
        try:
            return np.asarray(array[rows])
        # what zarr and its codecs raise on chunks that are gone, cut short or scrambled
        except (OSError, ValueError, RuntimeError) as error:
            raise RunError(
                f"{self.path} has a damaged array {name} ({error}); find out which rows are affected with "
                f"`dmpipeline verify {self.path}`",
                path=self.path,
                reason=str(error),
            ) from error

    def _damaged(self, how: str) -> RunError:
        return RunError(f"{self.path} {how}; restore it from a copy", path=self.path)

    def _missing_blocks(self, lock: IO[bytes]) -> Iterator[int]:
        """Yield blocks that are not done, each claimed while the caller trains it; those others claimed come last."""
        for wait in (False, True):
            for block in np.flatnonzero(~self.digests().any(axis=1)).tolist():
                with _claimed(lock, block, wait=wait) as ours:
                    if ours and not self.digests()[block].any():
                        yield block

    def _train_block(self, dataset: Dataset, block: int) -> None:
        rows = self.spec.blocks[block]
        masks, logits = train_rows(self.spec, dataset, rows)
        # margins are taken from the rounded logits, so that whoever reads those can recompute them to the bit
        data = {
            "train_masks": masks,
            "test_margins": correct_class_margins(logits.test, dataset.test_labels).astype(np.float16),
            "train_margins": correct_class_margins(logits.train, dataset.train_labels).astype(np.float16),
            "test_logits": logits.test,
            "train_logits": logits.train,
        }
        for name in ARRAYS:
            self.array(name)[rows.start : rows.stop] = data[name]
        self.array("block_digests")[block] = np.frombuffer(block_digest(data), np.uint8)

    def _record_session(self, lock: IO[bytes], started: datetime, seconds: float, n_rows: int) -> None:
        session = {
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "n_rows": n_rows,
            "machine": _machine(),
            "versions": _versions(),
        }
        # the byte after the blocks' is for provenance.json
        with _claimed(lock, len(self.spec.blocks), wait=True):
            facts = self.provenance
            facts["sessions"].append(session)
            write_beside(self.path / "provenance.json", _as_json(facts))


def block_digest(block: Block) -> bytes:
    """Digest a block: SHA-256 over the elements of each of ARRAYS, in C order; 32 bytes."""
    digest = hashlib.sha256()
    for name in ARRAYS:
        digest.update(np.ascontiguousarray(block[name]).view(np.uint8).data)
    return digest.digest()


def describe_datamodels(path: Path, *, key: str, sha256: str | None = None) -> StoredArray:
    """Describe a `.pt` of test datamodels for a catalog, from the file's own directory.

    Raises
    ------
    dmdata.errors.FormatError
        If the file is damaged or holds anything but tensors.
    RunError
        If it cannot be read.
    """
    with explain_os_errors(path, "read"), open(path, "rb") as file:
        n_bytes = os.fstat(file.fileno()).st_size

        def read_at(start: int, stop: int) -> bytes:
            file.seek(start)
            return file.read(stop - start)

        layouts = pt_layouts(read_at, object_bytes=n_bytes, url=str(path))
    shapes = {name: layout.shape for name, layout in layouts.items()}
    n_train, n_test = (*shapes.get("weight", ()), 0, 0)[:2]
    of_targets = set(shapes) - {"weight"}
    expected = {"weight": (n_train, n_test)} | dict.fromkeys(of_targets, (n_test,))
    if not of_targets >= {"bias", "lam"} or shapes != expected:
        raise FormatError(
            f"{path} holds {shapes}; datamodels are weight (n_train, n_test), bias and lam (n_test,), and what else "
            "there is of each target",
            url=str(path),
        )
    dims = {"weight": ("train_example", "test_example")} | dict.fromkeys(of_targets, ("test_example",))
    members = {
        name: ArraySchema(shape=layout.shape, dtype=str(layout.dtype), dims=dims[name])
        for name, layout in layouts.items()
    }
    basis = _measured("key", "format", "n_bytes")
    return StoredArray(key=key, format="pt", n_bytes=n_bytes, sha256=sha256, members=members, basis=basis)


def write_beside(path: Path, content: str | bytes) -> None:
    """Write a file beside its place and move it there, so that a reader sees the old content or the new; text as UTF-8.

    Raises
    ------
    RunError
        If it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    with explain_os_errors(path):
        try:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _require_vacant(path: Path) -> None:
    """Refuse a place that holds anything but what a creation leaves that was killed between its renames."""
    if not path.exists():
        return
    if not path.is_dir():
        raise RunExistsError(f"{path} is a file; choose a new or empty directory", path=path)
    names = {entry.name for entry in path.iterdir() if not _is_staging(entry)} - {"lock"}
    if not names or "run.yaml" in names:  # another process has just created it
        return
    store = path / "store.zarr"
    if not names <= {"store.zarr", "provenance.json"} or not (store / "block_digests" / "zarr.json").is_file():
        raise RunExistsError(f"{path} holds other files; choose a new or empty directory", path=path)
    if any(store.glob("*/c")):
        raise RunExistsError(
            f"{path} holds a store with trained models but no run.yaml; restore it, or choose another directory",
            path=path,
        )


def _create_files(path: Path, spec: RunSpec, dataset: Dataset) -> None:
    """Put a run's files in place, run.yaml last; the caller holds the lock."""
    staging = path / f".creating-{uuid.uuid4().hex}"
    staging.mkdir()
    _create_store(staging / "store.zarr", spec, dataset)
    write_beside(staging / "provenance.json", _as_json(_provenance(dataset)))
    write_beside(staging / "run.yaml", spec.to_yaml())
    if (path / "store.zarr").exists():
        os.rename(path / "store.zarr", staging / "left-over.zarr")
    for name in ("store.zarr", "provenance.json", "run.yaml"):
        os.rename(staging / name, path / name)
    for entry in filter(_is_staging, path.iterdir()):
        shutil.rmtree(entry, ignore_errors=True)


def _create_store(path: Path, spec: RunSpec, dataset: Dataset) -> None:
    group = zarr.create_group(path, zarr_format=3)
    sizes = {"train_example": dataset.n_train, "test_example": dataset.n_test, "class": dataset.n_classes}
    n_rows, block = spec.n_rows, min(spec.block_models, spec.n_rows)
    for name in ARRAYS:
        dims = _DIMS[name]
        examples, *rest = (sizes[dim] for dim in dims[1:])
        is_mask = name == "train_masks"
        bytes_of_example = block * int(np.prod(rest, dtype=int)) * (1 if is_mask else 2)
        group.create_array(
            name,
            shape=(n_rows, examples, *rest),
            dtype="bool" if is_mask else "float16",
            chunks=(block, max(1, min(examples, _LARGEST_CHUNK_BYTES // bytes_of_example)), *rest),
            compressors=BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle" if is_mask else "shuffle"),
            # what was never written is not mistaken for a model's output
            fill_value=False if is_mask else float("nan"),
            dimension_names=dims,
        )
    group.create_array(
        "block_digests",
        shape=(len(spec.blocks), 32),
        dtype="uint8",
        chunks=(1, 32),
        compressors=None,
        fill_value=0,
        dimension_names=("block", "byte"),
    )


@contextlib.contextmanager
def _claimed(lock: IO[bytes], byte: int, *, wait: bool) -> Iterator[bool]:
    """Hold one byte of the lock file, if no other process does; the system lets go of it when a process dies."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            yield False
            return
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        # a file system without locks: two trainers may do the same work, to the same bytes
        yield True
        return
    try:
        yield True
    finally:
        fcntl.lockf(lock, fcntl.LOCK_UN, 1, byte)


def _say_nothing(n_done: int, n_rows: int) -> None:
    pass


def _provenance(dataset: Dataset) -> dict[str, Any]:
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "machine": _machine(),
        "dataset": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "n_train": dataset.n_train,
            "n_test": dataset.n_test,
            "n_classes": dataset.n_classes,
            "example_order": dataset.example_order,
        },
        "sessions": [],
    }


def _versions() -> dict[str, str]:
    packages = ("dmdata", "numpy", "torch", "zarr", "scikit-learn")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}


def _machine() -> dict[str, Any]:
    return {"platform": platform.platform(), "device": "cpu", "threads": torch.get_num_threads()}


def _measured(*facts: str) -> dict[str, Basis]:
    return dict.fromkeys(facts, Basis.MEASURED)


def _is_staging(entry: Path) -> bool:
    return entry.name.startswith(".creating-")


def _as_json(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, indent=2) + "\n"
