"""Preparing to train a run: its dataset is loaded once and compared, its code is too, and how to train is settled."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import IO, Self

from dmpipeline.data.examples import Dataset
from dmpipeline.draws.masks import masks_digest, subset_masks
from dmpipeline.errors import RunError, SpecError
from dmpipeline.models.recipes import AnyRecipe, Recipe, code_digest, find_recipe
from dmpipeline.runs import directory
from dmpipeline.runs.directory import PROVENANCE_BYTE, claimed, write_beside
from dmpipeline.runs.pinned import pin
from dmpipeline.runs.stored import StoredRun
from dmpipeline.training.ensembles import Method
from dmpipeline.training.probe import fastest_way
from dmpipeline.training.train import GradientTrainer, Trainer, Way, make_trainer, usable_device


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run whose rows can be trained like those trained before; made by `of`.

    Attributes
    ----------
    run : StoredRun
    dataset : Dataset
        The run's, loaded once for all that is done with it.
    recipe : AnyRecipe
    """

    run: StoredRun
    dataset: Dataset
    recipe: AnyRecipe

    @classmethod
    def of(cls, run: StoredRun, dataset: Dataset | None = None) -> Self:
        """Load a run's dataset, and make sure that rows trained now are like those trained before.

        Parameters
        ----------
        run : StoredRun
        dataset : Dataset, optional
            What `run.dataset()` returned, where it is at hand.

        Raises
        ------
        RunError
            If the dataset, the user's own code or masks have changed since the run was created.
        SpecError
            If the recipe or its code cannot be used.
        """
        dataset = dataset or run.dataset()
        recipe, facts = find_recipe(run.spec.recipe), run.provenance
        if code_digest(recipe) != facts.get("code"):
            raise RunError(
                f"the code that recipe {run.spec.recipe.name} of {run.path} names has changed since the run was "
                "created, and its models would not be like those trained before; restore it, or create another run",
                path=run.path,
            )
        if (recorded := facts.get("masks")) and masks_digest(run.spec) != recorded:
            raise RunError(
                f"the masks in {run.spec.masks} have changed since {run.path} was created; restore the file, or "
                "create another run",
                path=run.path,
            )
        return cls(run, dataset, recipe)

    def require_way(self, device: str | None, method: Method | None = None, n_models: int | None = None) -> None:
        """Refuse a way to train that would be refused later; nothing is trained, or measured.

        Parameters
        ----------
        device : str or None
            None where it is another machine's.
        method, n_models
            As for `find_way`.

        Raises
        ------
        SpecError
            If the device or the method cannot be used.
        """
        if device is not None:
            usable_device(device)
        if not isinstance(self.recipe, Recipe):
            if method or n_models:
                raise _trains_itself(self.recipe)
        elif device is not None:
            self._gradient_trainer(self.recipe, Way(method or "loop", 1), device)

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
        run = self.run
        if not isinstance(self.recipe, Recipe):
            raise _trains_itself(self.recipe)
        found = Way(method, n_models or 1) if method and (n_models or method == "loop") else None
        recorded = self._recorded_way(device)
        if found is None and recorded is not None and method in (None, recorded.method):
            found = recorded
        if found is None:
            found = fastest_way(
                self.dataset,
                self.recipe,
                seed=run.spec.seed,
                masks=subset_masks(run.spec, run.spec.blocks[0], self.dataset.n_train),
                n_models=run.spec.n_rows - run.n_rows_done,
                device=device,
                methods=(method,) if method else None,
            )
        return replace(found, n_models=n_models or found.n_models)

    def trainer(self, device: str = "cpu", way: Way | None = None, *, lock: IO[bytes] | None = None) -> Trainer:
        """Make what trains the run's rows.

        Parameters
        ----------
        device, way
            As for `Run.train`.
        lock : file, optional
            The run's open lock file, with which the way is put on record; otherwise it is not.

        Raises
        ------
        RunError, SpecError
            As `Run.train`.
        """
        run = self.run
        if not isinstance(self.recipe, Recipe):
            return make_trainer(self.dataset, self.recipe, seed=run.spec.seed)
        if lock is None:
            return self._gradient_trainer(self.recipe, way or self.find_way(device), device)
        # who comes second waits for what the first finds
        with claimed(lock, PROVENANCE_BYTE, wait=True):
            way = way or self.find_way(device)
            facts = run.provenance
            if way != self._recorded_way(device) or "spec" not in facts:
                facts |= {} if "spec" in facts else pin(run.spec)  # a run made before specs were pinned
                facts.setdefault("ways", {})[device.partition(":")[0]] = asdict(way)
                write_beside(run.path / "provenance.json", directory.as_json(facts))
        return self._gradient_trainer(self.recipe, way, device)

    def _gradient_trainer(self, recipe: Recipe, way: Way, device: str) -> GradientTrainer:
        return GradientTrainer(self.dataset, recipe, seed=self.run.spec.seed, way=way, device=device)

    def _recorded_way(self, device: str) -> Way | None:
        recorded = self.run.provenance.get("ways", {}).get(device.partition(":")[0])
        return Way(**recorded) if recorded else None


def prepare(runs: Iterable[StoredRun]) -> list[Prepared]:
    """Prepare several runs; those of one dataset share it.

    Raises
    ------
    RunError, SpecError
        As `Prepared.of`.
    """
    loaded: dict[str, Dataset] = {}
    prepared = []
    for run in runs:
        spec = run.spec
        dataset = json.dumps([spec.dataset, spec.task, spec.inputs, run.provenance["dataset"]])
        prepared.append(Prepared.of(run, loaded.get(dataset)))
        loaded[dataset] = prepared[-1].dataset
    return prepared


def _trains_itself(recipe: AnyRecipe) -> SpecError:
    return SpecError(f"recipe {recipe.name} trains its models itself; leave out --method and --at-once", field="method")
