"""Retrainings of the same subsets: which rows they are, their averages, and the ceiling that their noise sets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmpipeline.errors import SpecError
from dmpipeline.scoring.correlation import Floats, spearman

LEAST_SUBSETS = 3
"""Fewer held-out subsets than this have no meaningful rank correlation."""


@dataclass(frozen=True, slots=True, eq=False)
class Retrainings:
    """Outputs of subsets that were each trained once or more, the retrainings of one in adjacent rows."""

    outputs: Floats  # (n_models, n_targets)
    sizes: tuple[int, ...]  # of each subset

    @classmethod
    def of(cls, outputs: NDArray[Any], sizes: Sequence[int]) -> "Retrainings":
        """Take rows of outputs, (n_models, n_targets), and how many each subset has."""
        return cls(outputs.astype(np.float64), tuple(sizes))

    @property
    def starts(self) -> NDArray[np.intp]:
        """Each subset's first row."""
        return np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(np.intp)

    @property
    def subsets(self) -> NDArray[np.intp]:
        """Each row's subset."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    @property
    def is_even(self) -> bool:
        """Whether all subsets were trained equally often."""
        return len(set(self.sizes)) == 1

    def averages(self) -> Floats:
        """Each subset's mean output, (n_subsets, n_targets)."""
        if self.is_even:
            averages: Floats = self.outputs.reshape(len(self.sizes), self.sizes[0], -1).mean(axis=1)
            return averages
        sums: Floats = np.add.reduceat(self.outputs, self.starts, axis=0)
        return sums / np.array(self.sizes, np.float64)[:, None]

    def replicate(self, nth: int) -> Floats:
        """One retraining of each subset: the nth, or as one counts on from the first again."""
        rows: Floats = self.outputs[self.starts + nth % np.array(self.sizes)]
        return rows

    def mean_squares(self, predicted: Floats) -> Floats:
        """Mean squared difference of each subset's retrainings from a prediction, both (n_subsets, n_targets)."""
        squares = (self.outputs - predicted[self.subsets]) ** 2
        sums: Floats = np.add.reduceat(squares, self.starts, axis=0)
        return sums / np.array(self.sizes, np.float64)[:, None]

    def variances(self) -> Floats | None:
        """Estimate the variance of a subset's retrainings, (n_subsets, n_targets), without bias.

        Subsets that were trained once have the mean of the others; None where these are fewer than half of all.
        """
        sizes = np.array(self.sizes)
        several = sizes >= 2
        if several.sum() < max(LEAST_SUBSETS, len(sizes) / 2):
            return None
        variances: Floats = self.mean_squares(self.averages()) * (sizes / np.maximum(sizes - 1, 1))[:, None]
        variances[~several] = variances[several].mean(axis=0)
        return variances

    def noise_ceiling(self, *, n_splits: int, seed: int) -> Floats:
        """As `noise_ceiling`; of unequal groups each is split in halves of its own, and singles are left out.

        With noise of variance v in one retraining, averages of R have v E[1 / R] over subsets, and those of halves
        v E[1 / h], so that the factor of Spearman and Brown is k = E[1 / h] / E[1 / R].
        """
        if self.is_even:
            single = self.outputs.reshape(len(self.sizes), self.sizes[0], -1)
            return noise_ceiling(single, n_splits=n_splits, seed=seed)
        sizes = np.array(self.sizes)
        several = np.flatnonzero(sizes >= 2)
        n_targets = self.outputs.shape[1]
        if len(several) < max(LEAST_SUBSETS, len(sizes) / 2):
            return np.full(n_targets, np.nan)
        rng = np.random.default_rng([seed, 1])
        starts, halves, total = self.starts[several], sizes[several] // 2, np.zeros(n_targets)
        for _ in range(n_splits):
            first, second = np.empty((2, len(several), n_targets))
            for nth, (start, size, half) in enumerate(zip(starts, sizes[several], halves, strict=True)):
                order = start + rng.permutation(size)
                first[nth] = self.outputs[order[:half]].mean(axis=0)
                second[nth] = self.outputs[order[half : 2 * half]].mean(axis=0)
            total += spearman(first, second)
        factor = float((1 / halves).mean() / (1 / sizes).mean())
        return _reliable(total / n_splits, factor)


def groups_of(keys: NDArray[np.uint64]) -> list[NDArray[np.intp]]:
    """Take the rows of each mask together, masks in the order in which they come first."""
    _, first, nth = np.unique(keys, return_index=True, return_inverse=True)
    place = np.argsort(np.argsort(first))[nth]
    order = np.argsort(place, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(place[order])) + 1)


def adjacent_groups(rows: NDArray[np.int8], n_retrainings: int) -> list[NDArray[np.intp]]:
    """Take each `n_retrainings` adjacent rows together; SpecError where they are not of one mask each."""
    n_models, n_train = rows.shape
    if n_retrainings < 1 or n_models % n_retrainings:
        raise SpecError(
            f"{n_models} held-out models are not whole groups of {n_retrainings} retrainings; "
            "choose n_retrainings so that it divides them, or leave it out",
            n_models=n_models,
            n_retrainings=n_retrainings,
        )
    of_subset = rows.reshape(-1, n_retrainings, n_train)
    mixed = np.flatnonzero((of_subset != of_subset[:, :1]).any(axis=(1, 2)))
    if len(mixed):
        raise SpecError(
            f"rows {mixed[0] * n_retrainings} to {(mixed[0] + 1) * n_retrainings} hold different masks; expected "
            f"{n_retrainings} retrainings of one subset in adjacent rows: order them so, correct n_retrainings, or "
            "leave it out and rows with the same mask are taken together",
            subset=int(mixed[0]),
        )
    return np.split(np.arange(n_models), n_models // n_retrainings)


def noise_ceiling(single: NDArray[Any], *, n_splits: int, seed: int) -> Floats:
    """Bound the correlation that any prediction can reach with averages of R noisy retrainings.

    The retrainings are split at random into two halves of h = R // 2, and the halves' averages correlated (Spearman)
    over subsets; r is the mean over splits. The reliability of the average of R is k r / (1 + (k - 1) r) with k = R /
    h (Spearman and Brown, 1910), and its square root is the correlation of the average with what it would be without
    noise.

    Parameters
    ----------
    single : array of float, shape (n_subsets, R, n_targets)

    Returns
    -------
    ceiling : array of float64, shape (n_targets,)
        nan with fewer than two retrainings or where the output never varies; 0 where halves do not agree.
    """
    _, n_retrainings, n_targets = single.shape
    half = n_retrainings // 2
    if half == 0:
        return np.full(n_targets, np.nan)
    rng = np.random.default_rng([seed, 1])
    total = np.zeros(n_targets)
    for _ in range(n_splits):
        order = rng.permutation(n_retrainings)
        first, second = (single[:, part].mean(axis=1) for part in (order[:half], order[half : 2 * half]))
        total += spearman(first, second)
    return _reliable(total / n_splits, n_retrainings / half)


def _reliable(agreement: Floats, factor: float) -> Floats:
    """Turn the agreement of halves into the correlation of averages with what they would be without noise."""
    agreement = np.maximum(agreement, 0)
    ceiling: Floats = np.sqrt(factor * agreement / (1 + (factor - 1) * agreement))
    return ceiling
