"""Penalty factors from a prior: which examples are likely to matter for a target, by any attribution score.

A LASSO that penalises likely examples less needs fewer models to find them. How far to trust the prior is chosen on
validation models from strengths that include none, so a useless one costs time and nothing else.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmpipeline.datamodels import Datamodels
from dmpipeline.errors import SpecError
from dmpipeline.moments import RowSliceable

STRENGTHS = (0.0, 0.25, 0.5)
"""Exponents from which `fit` chooses; 0 is no prior."""

_FLOOR = 0.01
_BLOCK_ROWS = 4096


def check_prior(prior: NDArray[Any], *, n_train: int, n_targets: int) -> None:
    """Refuse scores of another shape, or that are not numbers; SpecError names the first."""
    if getattr(prior, "shape", None) != (n_train, n_targets):
        raise SpecError(
            f"prior has shape {getattr(prior, 'shape', None)}; expected a score for each example and target, "
            f"({n_train}, {n_targets})"
        )
    finite = np.isfinite(prior)
    if not finite.all():
        example, target = np.argwhere(~finite)[0]
        raise SpecError(
            f"prior is {prior[example, target]} for example {example}, target {target}; give 0 where nothing is known",
            example=int(example),
            target=int(target),
        )


def penalty_factors(prior: NDArray[Any], *, strength: float) -> NDArray[np.float32]:
    """Turn scores s of any sign and scale into penalty factors (|s| / max |s| + 0.01) ** -strength, a target at a time.

    Parameters
    ----------
    prior : array of float, shape (n_train, n_targets)
    strength : float
        0 gives 1 for all.

    Returns
    -------
    factor : array of float32, shape (n_targets, n_train)
        From about 1 for the likeliest example up to 100 ** strength for one of score 0. All 1 for a target whose scores
        are all 0, of which nothing is known.
    """
    size = np.abs(np.asarray(prior, np.float64).T)
    largest = size.max(axis=1, keepdims=True)
    share = np.divide(size, largest, out=np.ones_like(size), where=largest > 0)
    factor: NDArray[np.float32] = ((share + _FLOOR) ** -strength).astype(np.float32)
    return factor


def pooled_scores(datamodels: Datamodels, outputs: RowSliceable) -> NDArray[np.float32]:
    """Score an example for a target by its weights for all targets, those with correlated outputs counting most.

    score[j, t] = sum over targets u of corr(outputs of u, outputs of t)^2 |weight[j, u]|.

    Parameters
    ----------
    datamodels : Datamodels
        Fitted to models that do not choose the strength of the prior: leave the validation rows out.
    outputs : real, shape (n_models, n_targets)
        Of the same models, or some of them. Read once, 4,096 rows at a time.

    Returns
    -------
    scores : array of float32, shape (n_train, n_targets)
    """
    n_models, n_targets = outputs.shape
    if n_targets != datamodels.n_targets or n_models < 2:
        raise SpecError(
            f"outputs have shape {outputs.shape}; expected two models or more of {datamodels.n_targets} targets"
        )
    first = np.asarray(outputs[0:1], np.float64)  # sums are taken about it, so that a large offset drowns nothing
    products, total = np.zeros((n_targets, n_targets)), np.zeros(n_targets)
    for start in range(0, n_models, _BLOCK_ROWS):
        block = np.asarray(outputs[start : start + _BLOCK_ROWS], np.float64) - first
        products += block.T @ block
        total += block.sum(axis=0)
    covariance = products / n_models - np.outer(total, total) / n_models**2
    deviation = np.sqrt(np.maximum(np.diagonal(covariance), 0))
    scale = np.outer(deviation, deviation)
    correlation = np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)
    return np.asarray(np.abs(datamodels.weight) @ (correlation**2).astype(np.float32))
