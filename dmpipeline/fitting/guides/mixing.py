"""Mixtures of several fits of the same targets, that predict rows held out at least as well as the first of them.

One set of weights, none negative, serves all targets, for each by itself the validation rows would be too few. A
mixture of linear datamodels is one: its weights are sums of theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Agreement:
    """Second moments, over rows held out, of what several fits predict of each target.

    Attributes
    ----------
    among : array of float64, shape (n_targets, n_fits, n_fits)
        p_i'p_j / n of the predictions p_i of fit i.
    with_truth : array of float64, shape (n_targets, n_fits)
        p_i'y / n.
    square : array of float64, shape (n_targets,)
        y'y / n.
    square_fitted : array of float64, shape (n_targets,)
        The same over the rows that were fitted on.
    """

    among: NDArray[np.float64]
    with_truth: NDArray[np.float64]
    square: NDArray[np.float64]
    square_fitted: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        weights: Sequence[NDArray[np.float32]],
        gram: NDArray[Any],
        cross: NDArray[np.float64],
        square: NDArray[np.float64],
        square_fitted: NDArray[np.float64],
    ) -> Self:
        """Take it of weights, one array of shape (n_targets, n_train) a fit, from X'X / n, X'y / n and y'y / n."""
        n_targets, n_fits = len(cross), len(weights)
        among, with_truth = np.empty((n_targets, n_fits, n_fits)), np.empty((n_targets, n_fits))
        for i, weight in enumerate(weights):
            with_truth[:, i] = np.einsum("tj,tj->t", weight, cross, dtype=np.float64)
            pull = weight @ gram
            for j, other in enumerate(weights[: i + 1]):
                among[:, i, j] = among[:, j, i] = np.einsum("tj,tj->t", other, pull, dtype=np.float64)
        return cls(among, with_truth, square, square_fitted)

    def error(self, mixture: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return each target's mean squared error under a mixture, (n_targets,)."""
        explained = 2 * self.with_truth @ mixture - np.einsum("tij,i,j->t", self.among, mixture, mixture)
        error: NDArray[np.float64] = np.maximum(self.square - explained, 0)
        return error


def best_mixture(agreement: Agreement, n_models: int, *, is_of_all: bool = False) -> NDArray[np.float64]:
    """Find the weights, none negative, of least error over all targets, as shares of their mean squares.

    A target's mean square is the larger of those over the rows fitted on and the rows held out. Where outputs have
    heavy tails, as cross-entropies do, a few rows of a target hold most of it, and where these are on one side only,
    the other would count the target's errors many times over.

    They are drawn towards the first fit alone as by one more row of the size of what it leaves, where there is one
    target; with more the draw falls with the root of their number, for targets share rows and are not independent.

    What is found is believed by how much the error of the median target falls below what the first leaves when it is
    scaled as a whole, for a mixture of fits that say the same does no more than that. The mean is no guide: with heavy
    tails a few rows of a few targets decide it. It is counted in shares of a row, 1 / `n_models`. One share, which one
    free weight wins by chance (a quarter of it from 16 targets on), is believed fully, less in part, and less than a
    quarter of that not at all: with 25 rows real scores won from 0.12 on, and permuted ones up to 0.4. Over all models,
    100 or more, the two lie apart: with 200 and 500 models of wine, breast_cancer and digits real scores won 7 shares
    or more, permuted ones 2.5 at most. So there 3 are believed, less in part, and 2.5 not at all.

    Parameters
    ----------
    agreement : Agreement
        Of several fits; the first is what the others have to improve on.
    n_models : int
        Over how many rows.
    is_of_all : bool
        Whether these are all models, each predicted by fits of others, rather than a few held out of one fit.

    Returns
    -------
    mixture : array of float64, shape (n_fits,)
    """
    first = np.zeros(agreement.with_truth.shape[1])
    first[0] = 1
    known = agreement.square > 0
    if len(first) == 1 or not known.any():
        return first
    scale = 1 / np.maximum(agreement.square, agreement.square_fitted)[known]
    before = float(agreement.error(first)[known] @ scale)
    chance = 1 / n_models / known.sum() ** 0.5
    one_row = max(before * chance, _LEAST_ROW * known.sum())
    among = np.einsum("tij,t->ij", agreement.among[known], scale) + one_row * np.eye(len(first))
    towards = agreement.with_truth[known].T @ scale + one_row * first
    mixture = _least_squares(among, towards)
    scaled = first * max(towards[0] / among[0, 0], 0)
    left, left_by_first = (agreement.error(weights)[known] for weights in (mixture, scaled))
    gain = 1 - np.divide(left, left_by_first, out=np.ones_like(left), where=left_by_first > 0)
    won = float(np.median(gain)) * n_models
    least, enough = _LEAST_AND_ENOUGH
    if not is_of_all or n_models < _MANY_MODELS:
        one = max(0.25, chance * n_models)
        least, enough = one / 4, one
    return first if won < least else first + min(won / enough, 1.0) * (mixture - first)


_MANY_MODELS = 100
_LEAST_AND_ENOUGH = 2.5, 3.0
_LEAST_ROW = 1e-9
"""Of the errors' share, so that there is a solution where nothing predicts anything."""


def _least_squares(among: NDArray[np.float64], towards: NDArray[np.float64]) -> NDArray[np.float64]:
    """Minimise w'Aw - 2b'w over w of no negative elements, by trying every set of elements that are not zero."""
    best, least = np.zeros(len(towards)), 0.0
    for chosen in product((False, True), repeat=len(towards)):
        some = np.flatnonzero(chosen)
        solution = np.linalg.solve(among[np.ix_(some, some)], towards[some])
        value = -float(towards[some] @ solution)
        if value < least and (solution >= 0).all():
            best, least = np.zeros(len(towards)), value
            best[some] = solution
    return best
