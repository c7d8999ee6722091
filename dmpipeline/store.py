"""Training a run: which blocks are missing, how they are trained, and how they come into the store.

Models are trained and stored in blocks that are whole chunks. A block's data are written first and its digest, the
SHA-256 of the data, last: a block without a digest was never finished and is trained again, one with a digest never is.
So a run killed at any moment loses the blocks in flight and nothing else, and a creation that was killed is begun again
by the next. Several processes may train one run: each claims a block by a lock that ends with the process, and where
locks do not reach, two of them write the same bytes, because a row depends on nothing but its draws.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from dmdata import phases
from dmpipeline import directory
from dmpipeline.directory import PRESENCE_BYTE, PROVENANCE_BYTE, claimed, write_beside
from dmpipeline.ensembles import Method
from dmpipeline.errors import RunError, RunExistsError, SpecError, explain_os_errors, quoted
from dmpipeline.examples import Dataset
from dmpipeline.learned import Watch
from dmpipeline.masks import given_masks, masks_digest, subset_masks, subset_size
from dmpipeline.outputs import check_outputs
from dmpipeline.pinned import pin, spec_digest
from dmpipeline.probe import fastest_way
from dmpipeline.recipes import AnyRecipe, Recipe, code_digest, find_recipe
from dmpipeline.relocation import read_spec
from dmpipeline.rows import Block, block_digest
from dmpipeline.scores import measure
from dmpipeline.settling import settle, settled_as
from dmpipeline.spec import MASK_LAWS, RunSpec
from dmpipeline.stored import StoredRun
from dmpipeline.train import GradientTrainer, Trainer, Way, make_trainer, usable_device

ARRAYS = RunSpec().arrays
"""Names of a run's arrays, unless its spec asks for other outputs: `RunSpec.arrays`."""

Measured = tuple[Block, npt.NDArray[np.float64]]
"""A block that was trained, and its models' scores: see `scores.SCORES`."""

Progress = Callable[[int, int], None]
"""Called with the rows done and the rows in all."""


@dataclass(frozen=True, slots=True, repr=False)
class Run(StoredRun):
    """A run on disk, to be read and trained; made by `create` or `open`."""

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
                facts = self.provenance
                if way != self._recorded_way(device) or "spec" not in facts:
                    facts |= {} if "spec" in facts else pin(self.spec)  # a run made before specs were pinned
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

    def require_trainable(
        self, device: str | None = "cpu", method: Method | None = None, n_models: int | None = None
    ) -> None:
        """Refuse now whatever would be refused when models are trained; nothing is trained, or measured.

        Parameters
        ----------
        device : str or None
            None where it is another machine's.
        method, n_models
            As for `find_way`.

        Raises
        ------
        RunError, SpecError
            As `train`.
        """
        if device is not None:
            usable_device(device)
        dataset, recipe = self.require_unchanged(), find_recipe(self.spec.recipe)
        if isinstance(recipe, Recipe) and device is not None:
            GradientTrainer(dataset, recipe, seed=self.spec.seed, way=Way(method or "loop", 1), device=device)
        elif not isinstance(recipe, Recipe) and (method or n_models):
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
            scores = self.scores(rows)
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
