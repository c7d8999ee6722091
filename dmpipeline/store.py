"""A run's directory: what was specified, what is trained so far, and how it came about.

::

    run/
      run.yaml            the spec; written last when a run is created, so a directory that has it is whole
      provenance.json     versions, machine, dataset fingerprint, training sessions
      store.zarr/         train_masks, test_margins, train_margins, test_logits, train_logits, block_digests,
                          model_scores
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

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import zarr

from dmdata import phases
from dmdata.catalog import Catalog, StoredArray
from dmpipeline import directory
from dmpipeline.cataloguing import catalog_of, describe_array, describe_fitted
from dmpipeline.directory import PRESENCE_BYTE, PROVENANCE_BYTE, claimed, write_beside
from dmpipeline.ensembles import Method
from dmpipeline.errors import IncompleteRunError, RunError, RunExistsError, SpecError, explain_os_errors, quoted
from dmpipeline.examples import Dataset
from dmpipeline.learned import Watch
from dmpipeline.masks import given_masks, masks_digest, subset_masks, subset_size
from dmpipeline.outputs import check_outputs
from dmpipeline.pinned import pin, require_pinned, spec_digest
from dmpipeline.probe import fastest_way
from dmpipeline.recipes import AnyRecipe, Recipe, code_digest, find_recipe
from dmpipeline.relocation import load_recorded, read_spec, remember
from dmpipeline.rows import DIGEST_BYTES, Block, PartialBlock, block_digest
from dmpipeline.scores import SCORES, measure
from dmpipeline.settling import settle, settled_as
from dmpipeline.shown import Shown
from dmpipeline.spec import MASK_LAWS, RunSpec
from dmpipeline.subsets import alpha_name_of, sizes_of, spec_facts
from dmpipeline.train import GradientTrainer, Trainer, Way, make_trainer, usable_device

ARRAYS = RunSpec().arrays
"""Names of a run's arrays, unless its spec asks for other outputs: `RunSpec.arrays`."""

Measured = tuple[Block, npt.NDArray[np.float64]]
"""A block that was trained, and its models' scores: see `scores.SCORES`."""

Progress = Callable[[int, int], None]
"""Called with the rows done and the rows in all."""


@dataclass(frozen=True, slots=True, repr=False)
class Run(Shown):
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
            directory.create(path, *_settled(spec))
        return cls._resume(path, spec)

    @classmethod
    def require_creatable(cls, path: str | Path, spec: RunSpec) -> None:
        """Refuse whatever `create` would refuse; nothing is written.

        Raises
        ------
        SpecError, RunExistsError, RunError
            As `create`.
        """
        path, spec = Path(path).absolute(), spec.located(Path.cwd())
        with explain_os_errors(path):
            if (path / "run.yaml").exists():
                cls._resume(path, spec)
                return
            directory.require_vacant(path)
        _settled(spec)

    @classmethod
    def _resume(cls, path: Path, spec: RunSpec) -> Self:
        run = cls.open(path)
        spec = spec.with_version_of(run.spec)
        if run.spec.task and run.spec.inputs:  # decided when it was created
            n_train = run.provenance["dataset"]["n_train"]
            spec = settled_as(spec, run.spec.task, run.spec.inputs, n_train)
        there, wanted = (some.model_dump(mode="json") for some in (run.spec, spec))
        if differing := [name for name in wanted if there[name] != wanted[name]]:
            name = differing[0]
            more = f" --models {wanted[name]}" if name == "n_models" and wanted[name] > there[name] else ""
            raise RunExistsError(
                f"{path} holds a run with {name} {there[name]!r}, not {wanted[name]!r}; "
                f"choose another directory, or go on with that run by `dmpipeline run {quoted(path)}{more}`",
                path=path,
            )
        return run

    @classmethod
    def open(cls, path: str | Path, *, dataset: str | None = None) -> Self:
        """Open a run, complete or not; `dataset` says, once for all, where its dataset is now if that was moved.

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
        run._require_pinned()
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
            f"{self.path} stores nothing that is one number a test example, which datamodels predict; create a run "
            "whose outputs have such, as margins",
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
        require_pinned(self.path, self.spec, facts)
        if "spec" in facts and facts["spec"]["dataset"] != RunSpec.read(self.path / "run.yaml").dataset:
            self.dataset()  # from another place, as long as it is the same

    def rows_digest(self, rows: slice) -> str:
        """Tell in one digest what the blocks that hold some rows were stored with; nothing of the rows is read.

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
                f"train them with `dmpipeline run {quoted(self.path)}`",
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

    def train(
        self,
        progress: Progress | None = None,
        *,
        device: str = "cpu",
        way: Way | None = None,
        blocks: Sequence[int] | None = None,
    ) -> None:
        """Train and store the blocks that are missing, then write the catalog.

        From the first block on, models that have not learned are warned of by an `errors.LearningWarning`.
        Holds one block's outputs in memory, or two where threads train: one is stored while the next is trained.

        Parameters
        ----------
        progress : callable, optional
            Called with (rows done, rows in all) at the start and after each block; rows that other processes finished
            count.
        device : str
            As torch names it.
        way : Way, optional
            How to train, from here on; otherwise as the run was trained on such a device before, or as is found to be
            the fastest.
        blocks : sequence of int, optional
            Only these.

        Raises
        ------
        TrainingError
            If a model's outputs cannot be stored; its block is left out, blocks before it stay.
        RunError
            If the dataset, the user's own code or masks have changed since the run was created, or its directory cannot
            be written to.
        SpecError
            If the device or the way cannot be used.
        """
        report = progress or (lambda *_: None)
        report(self.n_rows_done, self.spec.n_rows)
        with self.presence() as lock:
            trainer = self.trainer(device, way, lock=lock)
            began, clock, n_trained = directory.now(), time.monotonic(), 0
            watch = Watch(self, trainer.dataset)
            wanted = range(len(self.spec.blocks)) if blocks is None else blocks
            n_left = len(set(wanted) - directory.done_blocks(self.path).keys())
            phases.phase(f"first block of {n_left}")
            try:
                with trainer.workers(), closing(self._train_missing(trainer, lock, wanted)) as stored:
                    for n_rows in stored:
                        n_trained += n_rows
                        phases.phase("")
                        watch.look()
                        report(self.n_rows_done, self.spec.n_rows)
            finally:
                if n_trained:
                    seconds = time.monotonic() - clock
                    self.record_sessions(lock, [directory.session(began, seconds, n_trained, trainer.way, device)])
        report(self.n_rows_done, self.spec.n_rows)
        if self.n_rows_done == self.spec.n_rows:
            self.write_catalog()

    @contextmanager
    def presence(self) -> Iterator[IO[bytes]]:
        """Be one of those who train the run, so that nobody extends it; yields its open lock file.

        One at a time in a process: closing any handle of that file drops all that the process holds of it.

        Raises
        ------
        RunError
            If the run was extended since it was opened, or its directory cannot be written to.
        """
        with (
            explain_os_errors(self.path),
            open(self.path / "lock", "a+b") as lock,
            claimed(lock, PRESENCE_BYTE, wait=True, shared=True),
        ):
            if not directory.is_settled(self.path) or read_spec(self.path) != self.spec:
                raise RunError(f"{self.path} was extended meanwhile; open it again", path=self.path)
            yield lock

    def trainer(self, device: str = "cpu", way: Way | None = None, *, lock: IO[bytes] | None = None) -> Trainer:
        """Make what trains this run's rows.

        Parameters
        ----------
        device, way
            As for `train`.
        lock : file, optional
            The run's open lock file, with which the way is put on record; otherwise it is not.

        Raises
        ------
        RunError, SpecError
            As `train`.
        """
        dataset, recipe = self.require_unchanged(), find_recipe(self.spec.recipe)
        if not isinstance(recipe, Recipe):
            return make_trainer(dataset, recipe, seed=self.spec.seed)
        if lock is None:
            way = way or self.find_way(device)
        else:
            # who comes second waits for what the first finds
            with claimed(lock, PROVENANCE_BYTE, wait=True):
                way = way or self.find_way(device)
                if way != self._recorded_way(device):
                    facts = self.provenance
                    facts.setdefault("ways", {})[device.partition(":")[0]] = asdict(way)
                    write_beside(self.path / "provenance.json", directory.as_json(facts))
        return GradientTrainer(dataset, recipe, seed=self.spec.seed, way=way, device=device)

    def require_unchanged(self) -> Dataset:
        """Make sure that rows trained now are like those trained before; return the dataset.

        Raises
        ------
        RunError
            If the dataset, the user's own code or masks have changed since the run was created.
        SpecError
            If the recipe or its code cannot be used.
        """
        dataset, recipe = self.dataset(), find_recipe(self.spec.recipe)
        if code_digest(recipe) != self.provenance.get("code"):
            raise RunError(
                f"the code that recipe {self.spec.recipe.name} of {self.path} names has changed since the run was "
                "created, and its models would not be like those trained before; restore it, or create another run",
                path=self.path,
            )
        if (recorded := self.provenance.get("masks")) and masks_digest(self.spec) != recorded:
            raise RunError(
                f"the masks in {self.spec.masks} have changed since {self.path} was created; restore the file, or "
                "create another run",
                path=self.path,
            )
        return dataset

    def require_trainable(self, device: str = "cpu", method: Method | None = None) -> None:
        """Refuse now whatever would be refused when models are trained; nothing is trained, or measured.

        Raises
        ------
        RunError, SpecError
            As `train`.
        """
        usable_device(device)
        dataset, recipe = self.require_unchanged(), find_recipe(self.spec.recipe)
        if isinstance(recipe, Recipe):
            GradientTrainer(dataset, recipe, seed=self.spec.seed, way=Way(method or "loop", 1), device=device)
        elif method:
            raise _trains_itself(recipe)

    def find_way(self, device: str = "cpu", method: Method | None = None, n_models: int | None = None) -> Way:
        """Settle how to train: by what is given, what is on record, and what is measured, in this order.

        Parameters
        ----------
        device : str
        method : {"products", "vmap", "loop"}, optional
        n_models : int, optional
            Of a group.

        Raises
        ------
        SpecError
            If the recipe cannot be trained so, or trains its models itself.
        """
        dataset, recipe = self.dataset(), find_recipe(self.spec.recipe)
        if not isinstance(recipe, Recipe):
            raise _trains_itself(recipe)
        found = Way(method, n_models or 1) if method and (n_models or method == "loop") else None
        recorded = self._recorded_way(device)
        if found is None and recorded is not None and method in (None, recorded.method):
            found = recorded
        if found is None:
            found = fastest_way(
                dataset,
                recipe,
                seed=self.spec.seed,
                masks=subset_masks(self.spec, self.spec.blocks[0], dataset.n_train),
                n_models=self.spec.n_rows - self.n_rows_done,
                device=device,
                methods=(method,) if method else None,
            )
        return replace(found, n_models=n_models or found.n_models)

    def train_rows(self, trainer: Trainer, rows: Sequence[int]) -> Block:
        """Train some rows; nothing is stored."""
        with trainer.workers():
            return self._start(trainer, rows)()[0]

    def is_done(self, block: int) -> bool:
        """Tell whether a block is trained and stored."""
        return bool(self._read("block_digests", slice(block, block + 1)).any())

    def train_block(self, trainer: Trainer, block: int) -> int:
        """Train and store one block, its digest last; return how many rows were trained.

        Whoever calls has claimed the block, or does not mind that another process does the same: both write the same
        bytes, and each file is put in place whole.

        Raises
        ------
        Exception
            Whatever went wrong in training; its traceback is on record.
        """
        with trainer.workers():
            n_rows, trained = self._start_block(trainer, block)
            self._finish(block, trained)
        return n_rows

    def failures(self) -> dict[int, str]:
        """Read what went wrong with blocks that are not done, a traceback each, by block."""
        return directory.recorded_failures(self.path)

    def write_catalog(self, *, datamodels: bool | Literal["sound"] = True) -> Path:
        """Write catalog.yaml, by which dmdata opens this run's arrays and datamodels; return its path.

        Parameters
        ----------
        datamodels : bool or "sound"
            Whether to list the file at `datamodels_path` and that of training examples, if they are there; "sound"
            leaves out those that are damaged.

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
        write_beside(path, self.catalog(stored).dump())
        return path

    def describe(
        self, name: str, *, key: str, form: str, n_bytes: int | None = None, sha256: str | None = None
    ) -> StoredArray:
        """Describe one of the run's arrays for a catalog; without `n_bytes`, those of its elements are meant."""
        return describe_array(self.array(name), key=key, form=form, n_bytes=n_bytes, sha256=sha256)

    def catalog(self, stored: Mapping[str, StoredArray]) -> Catalog:
        """Catalog artifacts of this run under `dataset/alpha/name`; their keys start at the catalog's folder."""
        sizes = sizes_of(self.spec, self.provenance)
        return catalog_of(self.spec, self.dataset(), stored, alpha_name=self.alpha_name, sizes=sizes)

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
        if "row_digests" not in self.arrays:
            return np.zeros((len(rows), DIGEST_BYTES), np.uint8)
        return self._read("row_digests", slice(rows.start, rows.stop))

    def _scores(self, rows: range) -> npt.NDArray[np.float64]:
        """Read what is on record of how good models are, NaN where nothing is."""
        if "model_scores" not in self.arrays:
            return np.full((len(rows), len(SCORES)), np.nan)
        return self._read("model_scores", slice(rows.start, rows.stop))

    def _damaged(self, how: str) -> RunError:
        return RunError(f"{self.path} {how}; restore it from a copy", path=self.path)

    def _train_missing(self, trainer: Trainer, lock: IO[bytes], wanted: Sequence[int]) -> Generator[int]:
        """Train blocks that are not done, and yield how many rows each took; those that others have claimed come last.

        It waits for no claim of others while it has any.
        """
        started: deque[tuple[int, int, Callable[[], Measured], ExitStack]] = deque()

        def finish_first() -> int:
            block, n_rows, trained, claim = started.popleft()
            with claim:
                self._finish(block, trained)
            return n_rows

        try:
            for wait, n_ahead in ((False, trainer.n_ahead), (True, 1)):
                done = directory.done_blocks(self.path)
                for block in wanted:
                    if block in done:
                        continue
                    with ExitStack() as claim:
                        if claim.enter_context(claimed(lock, block, wait=wait)) and not self.is_done(block):
                            started.append((block, *self._start_block(trainer, block), claim.pop_all()))
                    if len(started) == n_ahead:
                        yield finish_first()
                while started:
                    yield finish_first()
        finally:
            for *_, claim in started:
                claim.close()

    def _start(self, trainer: Trainer, rows: Sequence[int]) -> Callable[[], Measured]:
        masks = subset_masks(self.spec, rows, trainer.dataset.n_train)
        trained = trainer.start(masks, self.spec.model_indices(rows), rows)
        return lambda: measure(self.spec.arrays, trainer.dataset, masks, trained())

    def _start_block(self, trainer: Trainer, block: int) -> tuple[int, Callable[[], Measured]]:
        """Have the rows of a block trained that are missing; tell how many, and what gives the whole block."""
        rows = self.spec.blocks[block]
        with self._failure_on_record(block):
            if block not in directory.cut_blocks(self.path):
                return len(rows), self._start(trainer, rows)
            there = self.read_partial(rows)
            scores = self._scores(rows)
            if not there.missing:
                return 0, lambda: (there.block, scores)
            trained = self._start(trainer, [rows[place] for place in there.missing])

            def filled() -> Measured:
                block, scores[~there.is_done] = trained()
                return there.filled(block), scores

            return len(there.missing), filled

    @contextmanager
    def _failure_on_record(self, block: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            directory.record_failure(self.path, block, self.spec.blocks[block], error)
            raise

    def _finish(self, block: int, trained: Callable[[], Measured]) -> None:
        """Wait for a block and store it."""
        rows = self.spec.blocks[block]
        with self._failure_on_record(block):
            data, scores = trained()
        # compressed side by side: one thread would keep many cores waiting
        with ThreadPoolExecutor(len(data)) as pool:
            digest = pool.submit(block_digest, data)
            list(pool.map(lambda name: self._write(name, rows, data[name]), data))
        if "model_scores" in self.arrays:  # not in runs of before there were any
            self._write("model_scores", rows, scores)
        self._write("block_digests", range(block, block + 1), np.frombuffer(digest.result(), np.uint8)[None])
        directory.forget_failure(self.path, block)

    def _write(self, name: str, rows: range, data: npt.NDArray[Any]) -> None:
        # to look first whether all of it is missing values, and need not be written, takes longer than to write it
        self.array(name).with_config({"write_empty_chunks": True})[rows.start : rows.stop] = data

    def _recorded_way(self, device: str) -> Way | None:
        recorded = self.provenance.get("ways", {}).get(device.partition(":")[0])
        return Way(**recorded) if recorded else None

    def record_sessions(self, lock: IO[bytes], sessions: Sequence[dict[str, Any]]) -> None:
        """Put on record what was trained where; see `directory.session`. The caller is present."""
        with claimed(lock, PROVENANCE_BYTE, wait=True):
            facts = self.provenance
            facts["sessions"] += [session | {"spec_digest": spec_digest(self.spec)} for session in sessions]
            facts |= {} if "spec" in facts else pin(self.spec)  # a run made before specs were pinned
            write_beside(self.path / "provenance.json", directory.as_json(facts))


def _trains_itself(recipe: AnyRecipe) -> SpecError:
    return SpecError(f"recipe {recipe.name} trains its models itself, one by one; leave out how", field="method")


def _settled(spec: RunSpec) -> tuple[RunSpec, Dataset]:
    """Decide what a spec leaves to its dataset, and make sure that its models can be trained."""
    spec, dataset = settle(spec)
    if spec.masks == "exact":
        subset_size(dataset.n_train, spec.alpha)
    if spec.masks not in MASK_LAWS:
        given_masks(spec, dataset.n_train)
    check_outputs(spec.arrays[1:], dataset)
    make_trainer(dataset, find_recipe(spec.recipe), seed=spec.seed)
    return spec, dataset
