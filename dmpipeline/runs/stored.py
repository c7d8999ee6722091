"""A run's directory, as it is read: what was specified, what is trained so far, and how it came about.

::

    run/
      run.yaml            the spec; written last when a run is created, so a directory that has it is whole
      provenance.json     versions, machine, dataset fingerprint, training sessions
      store.zarr/         train_masks, test_margins, train_margins, test_logits, train_logits, block_digests,
                          row_digests of blocks that an extension cut, model_scores
      catalog.yaml        the same arrays by name, once all rows are there; dmdata opens it
      datamodels/         test_50pct.pt, when datamodels were fitted; train_50pct.pt of training examples
      made_from/          notes of what datamodels, scores, curves and pages were made from
      failures/           block-3.txt: why a block could not be trained; removed when it is
      .claim-3            while a block is trained: a process works on it; see `claims`
      lock                its bytes are locked by processes that create, extend or train the run, or have claimed a
                          block; may be deleted when there are none

Datamodels are read by `fitted`, the notes by `derivation`, all else that lies in a run by `StoredRun`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import zarr

from dmdata import phases
from dmdata.catalog.entries import Catalog, StoredArray
from dmdata.shown import Shown
from dmpipeline.data.examples import Dataset
from dmpipeline.draws.subsets import alpha_name_of, sizes_of, spec_facts
from dmpipeline.errors import IncompleteRunError, RunError, SpecChangedError, SpecError, quoted
from dmpipeline.runs import directory
from dmpipeline.runs.cataloguing import catalog_of, describe_array, describe_fitted
from dmpipeline.runs.directory import write_beside
from dmpipeline.runs.pinned import require_pinned
from dmpipeline.runs.relocation import load_recorded, read_spec, remember
from dmpipeline.runs.rows import DIGEST_BYTES, PartialBlock, RowArrays
from dmpipeline.spec import MASK_LAWS, RunSpec
from dmpipeline.training.scores import SCORES

RowProgress = Callable[[int, int], None]
"""Called with the rows done and the rows in total."""


@dataclass(frozen=True, slots=True, repr=False)
class StoredRun(Shown):
    """A run on disk, to be read; made by `open`.

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
    def open(cls, path: str | Path, *, dataset: str | None = None) -> Self:
        """Open a run, complete or not; `dataset` is where its dataset is now, if that was moved; it is remembered.

        Raises
        ------
        RunError
            If there is no run, its store cannot be opened, or the dataset is another one.
        SpecError
            If its run.yaml was damaged, or there is no such dataset.
        """
        path = Path(path).absolute()
        directory.require_run(path)
        directory.finish_extension(path)
        spec = read_spec(path, dataset)
        try:
            arrays = zarr.open_group(path / "store.zarr", mode="r+", zarr_format=3)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            # zarr takes a damaged zarr.json for what it should be, and stumbles in several ways
            raise RunError(f"{path} has no readable store.zarr ({error}); restore it", path=path) from error
        run = cls(path=path, spec=spec, arrays=arrays)
        try:
            run._require_pinned()
        except SpecChangedError:
            directory.finish_extension(path)  # or wait for a process that is extending the run
            if read_spec(path, dataset) == spec:
                raise
            return cls.open(path, dataset=dataset)
        if dataset is not None:
            run.dataset()  # refuses another one
            remember(path, run.spec)
        return run

    def _facts(self) -> tuple[str, dict[str, object]]:
        done = f"{self.n_rows_done:,} of {self.spec.n_rows:,} models"
        return f"Run {self.path}", {**spec_facts(self.spec), "trained": done}

    def array(self, name: str) -> zarr.Array[Any]:
        """Look up one of `spec.arrays`; rows that are not trained yet read as False, NaN or -1.

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
        """What provenance.json says.

        `created`, `versions`, `machine` and `dataset`; `code` and `masks`, digests of the user's own, if there are
        some; `ways`, how models are trained by kind of device; and training `sessions`.
        """
        try:
            facts: dict[str, Any] = json.loads((self.path / "provenance.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._damaged(f"has no readable provenance.json ({error})") from error
        match facts:
            case {"dataset": {"fingerprint": str()}, "sessions": list()}:
                return facts
        raise self._damaged("has a provenance.json without the dataset's fingerprint or without sessions")

    @property
    def fitted_array(self) -> str:
        """Name of the array that datamodels are fitted to: the first with one number a test example.

        Raises
        ------
        SpecError
            If the run stores none.
        """
        for name in self.spec.arrays:
            if name.startswith("test_") and self.array(name).ndim == 2:
                return name
        raise SpecError(
            f"{self.path} stores no output with one number per test example, which datamodels predict; create a run "
            "that stores one, for example margins",
            field="outputs",
        )

    @property
    def datamodels_path(self) -> Path:
        """Where this run's datamodels of test examples belong; `write_catalog` lists them if they are there."""
        return self.path / "datamodels" / f"test_{self.alpha_name}.pt"

    @property
    def alpha_name(self) -> str:
        """How names of this run's artifacts spell its subsets, as `50pct`, or `given` for masks of one's own."""
        return self.spec.alpha_name if self.spec.masks in MASK_LAWS else alpha_name_of(self.spec, self.provenance)

    def dataset(self) -> Dataset:
        """Load the dataset and make sure that it is the one the run was created with.

        Raises
        ------
        RunError, SpecError
            If the dataset has changed since, or is not there any more.
        """
        phases.phase("loading the dataset")
        return load_recorded(self.path, self.spec, self.provenance["dataset"])

    def digests(self) -> npt.NDArray[np.uint8]:
        """Read the blocks' recorded digests, shape (n_blocks, 32); all zeros where a block is not done.

        Raises
        ------
        RunError
            If they are damaged.
        """
        return self._read("block_digests", slice(None))

    def _require_pinned(self) -> None:
        """Refuse a run.yaml that was edited since rows were made; see `pinned`."""
        try:
            facts = self.provenance
        except RunError:  # said by whatever needs it
            return
        if "spec" not in facts:
            self._require_room()
        require_pinned(self.path, self.spec, facts)
        if "spec" in facts and facts["spec"]["dataset"] != RunSpec.read(self.path / "run.yaml").dataset:
            self.dataset()  # from another place, as long as it is the same

    def _require_room(self) -> None:
        """Refuse an edited run.yaml of a run made before specs were pinned, as far as its arrays tell."""
        try:
            masks, n_blocks = self.array("train_masks"), self.array("block_digests").shape[0]
        except RunError:  # said by whatever needs them
            return
        n_rows, step = masks.shape[0], masks.chunks[0]
        if (n_rows, n_blocks) != (self.spec.n_rows, len(self.spec.blocks)):
            raise SpecChangedError(
                f"{self.path / 'run.yaml'} was edited: it says {self.spec.n_rows:,} models in blocks of "
                f"{self.spec.block_models:,}, the run has room for {n_rows:,} in {n_blocks:,} blocks of {step:,}; put "
                f"back what it said, then extend by `dmpipeline run {quoted(self.path)} --models N`",
                path=self.path,
                differences={"n_rows": (n_rows, self.spec.n_rows)},
            )

    def rows_digest(self, rows: slice) -> str:
        """Digest what the blocks that hold some rows were stored with; nothing of the rows is read.

        Parameters
        ----------
        rows : slice
            Half-open, as those of `spec.rows`.

        Returns
        -------
        digest : str
            In hexadecimal; another one as soon as a row of these blocks was trained again to other bits.

        Raises
        ------
        RunError
            If the recorded digests are damaged.
        """
        step = self.spec.block_models
        recorded = self._read("block_digests", slice(rows.start // step, -(-rows.stop // step)))
        facts = f"{rows.start}-{rows.stop} of blocks of {step}: {', '.join(self.spec.arrays)}"
        return hashlib.sha256(facts.encode() + np.ascontiguousarray(recorded).data).hexdigest()

    @property
    def n_rows_done(self) -> int:
        """Count of rows that are trained, those of blocks that an extension cut included."""
        done = directory.done_blocks(self.path)
        cut = directory.cut_blocks(self.path).difference(done)
        return sum(len(self.spec.blocks[block]) for block in done) + sum(
            int(self._row_digests(self.spec.blocks[block]).any(axis=1).sum()) for block in cut
        )

    def require_complete(self) -> None:
        """Raise IncompleteRunError, with `n_missing`, unless every row is trained."""
        done = np.flatnonzero(self.digests().any(axis=1)).tolist()
        if len(done) < len(self.spec.blocks):
            n_missing = self.spec.n_rows - self.n_rows_done
            raise IncompleteRunError(
                f"{self.path} lacks {n_missing:,} of {self.spec.n_rows:,} models; "
                f"train them with `dmpipeline run {quoted(self.path)}`, or in Python with "
                f"dmpipeline.Run.open({str(self.path)!r}).train()",
                path=self.path,
                n_missing=n_missing,
            )

    def read_block(self, rows: range) -> RowArrays:
        """Read some rows of every array into memory.

        Raises
        ------
        RunError
            If some of it is damaged; `reason` says how, in the words of the library that failed to read it.
        """
        return {name: self._read(name, slice(rows.start, rows.stop)) for name in self.spec.arrays}

    def read_partial(self, rows: range) -> PartialBlock:
        """Read a block that is not done, with what an extension left of it.

        Raises
        ------
        RunError
            If some of it is damaged.
        """
        digests = self._row_digests(rows)
        return PartialBlock.sound(self.read_block(rows), digests)

    def failures(self) -> dict[int, str]:
        """Read what went wrong with blocks that are not done, a traceback each, by block."""
        return directory.recorded_failures(self.path)

    def write_catalog(self, *, datamodels: bool | Literal["sound"] = True, dataset: Dataset | None = None) -> Path:
        """Write catalog.yaml, by which dmdata opens this run's arrays and datamodels; return its path.

        Parameters
        ----------
        datamodels : bool or "sound"
            Whether to list the file at `datamodels_path` and that of training examples, if they are there; "sound"
            leaves out those that are damaged.
        dataset : Dataset, optional
            The run's, where it is at hand.

        Raises
        ------
        IncompleteRunError
            If rows are missing.
        FormatError
            If one of these files is not one of datamodels, and only sound ones are not asked for.
        """
        self.require_complete()
        stored = {name: self.describe(name, key=f"store.zarr/{name}", form="zarr") for name in self.spec.arrays}
        if datamodels:
            stored |= describe_fitted(self.path, self.datamodels_path, only_sound=datamodels == "sound")
        path = self.path / "catalog.yaml"
        write_beside(path, self.catalog(stored, dataset or self.dataset()).dump())
        return path

    def describe(
        self, name: str, *, key: str, form: str, n_bytes: int | None = None, sha256: str | None = None
    ) -> StoredArray:
        """Describe one of the run's arrays for a catalog; without `n_bytes`, those of its elements are meant."""
        return describe_array(self.array(name), key=key, form=form, n_bytes=n_bytes, sha256=sha256)

    def catalog(self, stored: Mapping[str, StoredArray], dataset: Dataset | None = None) -> Catalog:
        """Catalog artifacts of this run under `dataset/alpha/name`; their keys start at the catalog's folder."""
        sizes = sizes_of(self.spec, self.provenance)
        return catalog_of(self.spec, dataset or self.dataset(), stored, alpha_name=self.alpha_name, sizes=sizes)

    def _read(self, name: str, rows: slice) -> npt.NDArray[Any]:
        array = self.array(name)
        try:
            return np.asarray(array[rows])
        # what zarr and its codecs raise on chunks that are gone, cut short or scrambled
        except (OSError, ValueError, RuntimeError) as error:
            raise RunError(
                f"{self.path} has a damaged array {name} ({error}); find out which rows are affected with "
                f"`dmpipeline verify {quoted(self.path)}`",
                path=self.path,
                reason=str(error),
            ) from error

    def _row_digests(self, rows: range) -> npt.NDArray[np.uint8]:
        """Read what rows of blocks that are not done are known by, zeros for those that are missing."""
        try:
            return self._read("row_digests", slice(rows.start, rows.stop))
        except RunError:  # a run of before, or damaged: then these rows are trained again
            return np.zeros((len(rows), DIGEST_BYTES), np.uint8)

    def scores(self, rows: range) -> npt.NDArray[np.float64]:
        """Read what is on record of how good models are, NaN where nothing is."""
        try:
            return self._read("model_scores", slice(rows.start, rows.stop))
        except RunError:  # a run of before, or damaged: nothing depends on them
            return np.full((len(rows), len(SCORES)), np.nan)

    def _damaged(self, how: str) -> RunError:
        return RunError(f"{self.path} {how}; restore it from a copy", path=self.path)
