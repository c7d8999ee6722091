"""Brittleness: how many of a target's highest scores have to be removed until models classify the target wrongly.

dattri's ``metric.brittleness``, over a sample of targets: each is removed for alone, in rising numbers, and models are
retrained on what remains, several times, so that it flips where their mean margin is below 0.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dmpipeline.applications.evidence import Evidence
from dmpipeline.applications.retraining import TrainingSet, retrain
from dmpipeline.errors import SpecError
from dmpipeline.moments.arrays import RowSliceable
from dmpipeline.runs.store import Run
from dmpipeline.runs.targets import TargetsName, fitted_array
from dmpipeline.scoring.attributions import scores_of_targets, share_within

REMOVALS = (10, 20, 40, 80, 160, 320)
"""Numbers of examples that are removed unless others are asked for: of these, those below half of all."""


@dataclass(frozen=True, slots=True)
class Removals:
    """What is to be removed and retrained: the smallest number first, until a target flips.

    Attributes
    ----------
    run : Run
    targets : {"test", "train"}
    removals : tuple of int
        Rising numbers of examples.
    n_targets, n_retrainings, seed : int
        As for `dmpipeline.applications.attributions.score`.
    """

    run: Run
    targets: TargetsName
    removals: tuple[int, ...]
    n_targets: int
    n_retrainings: int
    seed: int

    @classmethod
    def of(
        cls,
        evidence: Evidence,
        n_retrainings: int,
        n_targets: int,
        removals: Sequence[int] | None,
        seed: int,
    ) -> "Removals | None":
        """Plan it, or return None for no retrainings; `removals` None stands for those of `REMOVALS` that are possible.

        Raises
        ------
        SpecError
            For numbers that cannot be, evidence without a run, or outputs that are not margins.
        """
        if n_retrainings == 0:
            return None
        if n_retrainings < 0:
            raise SpecError(
                f"n_retrainings is {n_retrainings}; choose 0 or more", field="n_retrainings", value=n_retrainings
            )
        run = evidence.require_run("to retrain is")
        array = fitted_array(run, evidence.targets)
        if not array.endswith("_margins"):
            raise SpecError(
                f"{run.path} keeps {array}, which do not say whether a target is classified correctly; leave "
                "n_retrainings out, or make a run whose first output is margins",
                field="n_retrainings",
            )
        if not 1 <= n_targets <= evidence.n_targets:
            raise SpecError(
                f"n_brittle_targets is {n_targets}; choose from 1 to {evidence.n_targets:,}",
                field="n_brittle_targets",
                value=n_targets,
            )
        n_train = evidence.n_train
        grid = [k for k in REMOVALS if k < n_train / 2] or [1] if removals is None else [int(k) for k in removals]
        if not grid or grid != sorted(set(grid)) or not 1 <= grid[0] <= grid[-1] < n_train:
            raise SpecError(
                f"removals are {grid}; choose rising numbers from 1 to {n_train - 1:,}", field="removals", value=grid
            )
        return cls(run, evidence.targets, tuple(grid), n_targets, n_retrainings, seed)

    def carried_out(
        self,
        matrices: Mapping[str, RowSliceable],
        *,
        device: str,
        progress: Callable[[int, int], None] | None,
    ) -> tuple[tuple[int, ...], dict[str, tuple[float, ...]]]:
        """Retrain, and return the targets, and by name which share of them has flipped within each number of removals.

        Parameters
        ----------
        matrices : mapping of str to array, shape (n_train, n_targets)
            Whose highest scores are removed; their columns of the sampled targets are read.
        device, progress
            As for `dmpipeline.applications.attributions.score`.

        Raises
        ------
        SpecError
            If models of the full set classify no target correctly.
        RunError, TrainingError
            As for `retrain`.
        """
        report, n_done = progress or (lambda *_: None), 0
        n_train = self.run.array("train_masks").shape[1]
        most = (1 + len(matrices) * self.n_targets * len(self.removals)) * self.n_retrainings

        def mean_outputs(sets: list[TrainingSet]) -> npt.NDArray[np.float64]:
            retrained = retrain(
                self.run,
                sets,
                self.n_retrainings,
                device=device,
                progress=lambda done, _: report(n_done + done, most),
            )
            return np.stack([each.of(self.targets).mean(axis=0) for each in retrained])

        full = mean_outputs([TrainingSet.of(n_train)])[0]
        n_done += self.n_retrainings
        picked = self._sample(full)
        ranked = {name: self._ranked(name, matrix, picked) for name, matrix in matrices.items()}
        smallest = {name: np.full(len(picked), np.nan) for name in matrices}
        for k in self.removals:
            asked = [(name, place) for name in matrices for place in np.flatnonzero(np.isnan(smallest[name])).tolist()]
            if not asked:
                break
            outputs = mean_outputs([TrainingSet.of(n_train, without=ranked[name][:k, place]) for name, place in asked])
            for (name, place), of_set in zip(asked, outputs, strict=True):
                if of_set[picked[place]] < 0:
                    smallest[name][place] = k
            n_done += len(asked) * self.n_retrainings
        report(most, most)
        return tuple(picked), {name: share_within(each, self.removals) for name, each in smallest.items()}

    def _ranked(self, name: str, matrix: RowSliceable, picked: list[int]) -> npt.NDArray[np.intp]:
        """Order the examples of each target by falling score, equal ones (such as 0) at random: (n_train, n_picked)."""
        scores = scores_of_targets(matrix, picked, name=f"scores {name!r}")
        if self.targets == "train":
            scores[picked, np.arange(len(picked))] = -np.inf  # a target does not count as its own proponent
        by_chance = np.random.default_rng([self.seed, 4]).permutation(len(scores))
        return np.stack([np.lexsort((by_chance, -of_target)) for of_target in scores.T], axis=1)

    def _sample(self, margins: npt.NDArray[np.float64]) -> list[int]:
        """Draw targets that models of the full set classify correctly."""
        correct = np.flatnonzero(margins > 0)
        if not len(correct):
            raise SpecError(
                f"models of all examples of {self.run.path} classify no target correctly, so that none can flip; leave "
                "n_retrainings out",
                field="n_retrainings",
            )
        rng = np.random.default_rng([self.seed, 3])
        picked: list[int] = sorted(rng.choice(correct, min(self.n_targets, len(correct)), replace=False).tolist())
        return picked
