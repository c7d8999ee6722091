"""Pair terms of datamodels: coefficients of products of two examples' centred masks, for each target's strongest."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Pair:
    """Two training examples and what both together add to a target's output.

    Attributes
    ----------
    first, second : int
        Training examples, the one of the larger weight first.
    weight : float
        Output of a model that has both, less the sum of what each of them changes alone.
    """

    first: int
    second: int
    weight: float


@dataclass(frozen=True, slots=True, eq=False)
class PairTerms:
    """Coefficients b of a target's outputs in sum over pairs i < j of b_ij (x_i - mean_i) (x_j - mean_j).

    Since masks are centred, a linear datamodel is the same with these terms and without, and they change nothing on
    average. The coefficient is also an interaction: f(both) - f(i alone) - f(j alone) + f(neither).

    Attributes
    ----------
    examples : array of int32, shape (n_targets, k)
        Each target's examples of largest weight, the largest first.
    weight : array of float32, shape (n_targets, k (k - 1) / 2)
        In the output's units: pairs of the first example with the second, third, ..., of the second with the third, ...
    mean : array of float32, shape (n_train,)
        Share of the fitted subsets that hold each example.
    gap : array of float64, shape (n_targets,)
        The ridge problem's objective is at most this far above its minimum, as a share of the output's variance; see
        `dmpipeline.fitting.pairs.estimation`.
    validation_error : array of float64, shape (n_targets,)
        Mean squared error of linear and pair terms together on the models that were held out, both fitted to others.
    """

    examples: NDArray[np.int32]
    weight: NDArray[np.float32]
    mean: NDArray[np.float32]
    gap: NDArray[np.float64]
    validation_error: NDArray[np.float64]

    def __post_init__(self) -> None:
        n_targets, k = self.examples.shape
        if self.weight.shape != (n_targets, k * (k - 1) // 2):
            raise ValueError(f"{k} examples a target have {k * (k - 1) // 2} pairs, not {self.weight.shape}")

    @property
    def k(self) -> int:
        """Examples a target whose pairs are known."""
        return int(self.examples.shape[1])

    def add_to(self, predicted: NDArray[np.float32], masks: NDArray[Any]) -> None:
        """Add the pairs' part to predictions, (n_models, n_targets), for masks of 0 and 1, (n_models, n_train)."""
        centred = masks - self.mean
        for target, (examples, weight) in enumerate(zip(self.examples, self.weight, strict=True)):
            own = centred[:, examples]
            predicted[:, target] += np.einsum("nk,nk->n", own @ square(weight, self.k), own)

    def part_of(self, target: int, mask: NDArray[Any]) -> float:
        """Return what the pairs add to a target's output for one mask, (n_train,)."""
        own = (mask - self.mean)[self.examples[target]].astype(np.float64)
        return float(own @ square(self.weight[target], self.k) @ own)

    def top(self, target: int, n: int) -> tuple[Pair, ...]:
        """List the pairs of largest coefficients by magnitude, at most n; those of zero are none."""
        weight = self.weight[target]
        first, second = np.triu_indices(self.k, 1)
        order = np.argsort(-np.abs(weight), kind="stable")[:n]
        examples = self.examples[target]
        return tuple(
            Pair(int(examples[first[at]]), int(examples[second[at]]), float(weight[at]))
            for at in order.tolist()
            if weight[at] != 0
        )

    def columns(self, picked: NDArray[np.integer[Any]] | slice) -> Self:
        """Return the terms of some targets."""
        return type(self)(
            self.examples[picked], self.weight[picked], self.mean, self.gap[picked], self.validation_error[picked]
        )


def square(weight: NDArray[np.floating[Any]], k: int) -> NDArray[np.float32]:
    """Lay the pairs of k examples out as an upper triangle, (k, k)."""
    laid: NDArray[np.float32] = np.zeros((k, k), np.float32)
    laid[np.triu_indices(k, 1)] = weight
    return laid
