"""What a prior says of the weights: which examples are likely to matter for a target, by any attribution score.

A LASSO that penalises likely examples less, and shrinks weights towards what the scores lead to expect rather than
towards zero, needs fewer models. A fit is made with each of `TRUSTS`, and what comes out is a mixture that predicts the
validation models best (`fitting.guides.mixing`). One of them is no trust, so a useless prior costs time and little
else; scores that are better than any fit can be most of the mixture.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dmpipeline.errors import SpecError
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.moments.arrays import RowSliceable, as_rows, read_outputs


class Trust(NamedTuple):
    """How far scores are believed.

    Attributes
    ----------
    strength : float
        Exponent of the penalty factors; 0 is no prior.
    in_values : bool
        Whether weights are shrunk towards the scores, and not only their sizes taken for penalty factors.
    of_others : bool
        Whether they are shrunk towards a combination of the scores of many targets, and not only of their own.
    """

    strength: float
    in_values: bool
    of_others: bool = False


TRUSTS = (Trust(0.0, False), Trust(0.5, False), Trust(0.5, True), Trust(0.25, True, of_others=True))
"""Of whose weights `fit` makes a mixture. The first is none."""

_FLOOR = 0.003
_RIDGES = np.geomspace(1e-4, 1e3, 60)
"""Among which that of `combined_weights` is looked for, as shares of the mean eigenvalue."""
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
    """Turn scores s of any sign and scale into penalty factors (|s| / max |s| + 0.003) ** -strength, for each target.

    Parameters
    ----------
    prior : array of float, shape (n_train, n_targets)
    strength : float
        0 gives 1 for all.

    Returns
    -------
    factor : array of float32, shape (n_targets, n_train)
        From about 1 for the likeliest example up to 333 ** strength for one of score 0. All 1 for a target whose scores
        are all 0, of which nothing is known.
    """
    size = np.abs(np.asarray(prior, np.float64).T)
    largest = size.max(axis=1, keepdims=True)
    share = np.divide(size, largest, out=np.ones_like(size), where=largest > 0)
    factor: NDArray[np.float32] = ((share + _FLOOR) ** -strength).astype(np.float32)
    return factor


def standardised_scores(prior: NDArray[Any], inverse_scale: NDArray[np.float64]) -> NDArray[np.float32]:
    """Take scores as weights of raw masks, up to a factor, and turn them into those of masks scaled to unit variance.

    Parameters
    ----------
    prior : array of float, shape (n_train, n_targets)
    inverse_scale : array of float64, shape (n_train,)
        One over the masks' deviations; 0 for an example in all subsets or in none.

    Returns
    -------
    scores : array of float32, shape (n_targets, n_train)
        At most 1 before scaling; 0 below 0.003 of a target's largest, so that weights stay sparse.
    """
    scores = np.asarray(prior, np.float64).T
    largest = np.abs(scores).max(axis=1, keepdims=True)
    share = np.divide(scores, largest, out=np.zeros_like(scores), where=largest > 0)
    share[np.abs(share) < _FLOOR] = 0
    scale = np.divide(1, inverse_scale, out=np.zeros_like(inverse_scale), where=inverse_scale > 0)
    standardised: NDArray[np.float32] = (share * scale).astype(np.float32)
    return standardised


def expected_weights(
    scores: NDArray[np.float32], gram: NDArray[Any], cross: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Fit each target by one factor c on its scores s, by least squares: c = s'X'y / s'X'X s.

    The sign is the data's: scores that are all turned round serve as well.

    Parameters
    ----------
    scores : array of float32, shape (n_targets, n_train)
    gram : array of float, shape (n_train, n_train)
        X'X / n.
    cross : array of float64, shape (n_targets, n_train)
        X'y / n.

    Returns
    -------
    expected : array of float32, shape (n_targets, n_train)
        c s; 0 where the scores say nothing.
    pull : array of float64, shape (n_targets, n_train)
        X'X c s / n: what of `cross` they account for.
    """
    pull = (scores @ gram).astype(np.float64)
    reach, agreement = (np.einsum("tj,tj->t", scores, other, dtype=np.float64) for other in (pull, cross))
    factor = np.divide(agreement, reach, out=np.zeros_like(reach), where=reach > 0)[:, None]
    return (factor * scores).astype(np.float32), factor * pull


def combined_weights(
    scores: NDArray[np.float32],
    gram: NDArray[Any],
    cross: NDArray[np.float64],
    square: NDArray[np.float64],
    n_models: int,
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Fit each target by a combination of the scores of all these targets, its own counting first.

    With F the models' outputs that the scores predict, one column a target, each of unit length over its scores, the
    coefficients of a target are b = c e + (F'F / n + l I)^-1 F'(y - c F e) / n, where e is its own column and c that of
    `expected_weights`. One l serves all: that of least generalised cross-validation (Golub, Heath & Wahba, 1979),
    summed over targets as shares of their variances, among those that take up no more than half of the models. Scores
    of other targets help because those of few models are noisy, and because a target leans on examples that are known
    from targets like it.

    Parameters
    ----------
    scores, gram, cross
        As for `expected_weights`.
    square : array of float64, shape (n_targets,)
        y'y / n.
    n_models : int
        n.

    Returns
    -------
    expected, pull
        As of `expected_weights`; dense where scores of other targets are.
    """
    length = np.sqrt(np.square(scores, dtype=np.float64).sum(axis=1))
    of_unit = scores * np.divide(1, length, out=np.zeros_like(length), where=length > 0)[:, None].astype(np.float32)
    pull = of_unit @ gram
    among = (pull @ of_unit.T).astype(np.float64)
    with_targets = (of_unit @ cross.T.astype(np.float32)).astype(np.float64)  # (n_scores, n_targets)
    reach, agreement = np.diagonal(among).copy(), np.diagonal(with_targets).copy()
    own = np.divide(agreement, reach, out=np.zeros_like(reach), where=reach > 0)
    left = square - own * agreement
    values, axes = np.linalg.eigh((among + among.T) / 2)
    values = np.maximum(values, 0)
    along = axes.T @ (with_targets - among * own)
    known = square > 0
    if not known.any() or not values.any():
        return np.zeros_like(scores), np.zeros(scores.shape)
    inverses = [1 / (values + share * values.mean()) for share in _RIDGES]
    # of few models it would choose what interpolates them
    inverses = [inverse for inverse in inverses if values @ inverse + 1 <= n_models / 2] or inverses[-1:]

    def validated(inverse: NDArray[np.float64]) -> float:
        error = left + (inverse * (values * inverse - 2)) @ np.square(along)
        n_free = min(float(values @ inverse) + 1, n_models - 1)
        return float(np.mean(error[known] / square[known])) / (1 - n_free / n_models) ** 2

    inverse = min(inverses, key=validated)
    coefficients = axes @ (along * inverse[:, None])
    coefficients[np.diag_indices(len(own))] += own
    of_targets = coefficients.T.astype(np.float32)
    return of_targets @ of_unit, (of_targets @ pull).astype(np.float64)


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
    outputs = as_rows(outputs, "outputs")
    n_models, n_targets = outputs.shape
    if n_targets != datamodels.n_targets or n_models < 2:
        raise SpecError(
            f"outputs have shape {outputs.shape}; expected two models or more of {datamodels.n_targets} targets"
        )
    first = read_outputs(outputs, 0, 1).astype(
        np.float64
    )  # sums are taken about it, so that a large offset drowns nothing
    products, total = np.zeros((n_targets, n_targets)), np.zeros(n_targets)
    for start in range(0, n_models, _BLOCK_ROWS):
        block = read_outputs(outputs, start, min(start + _BLOCK_ROWS, n_models)) - first
        products += block.T @ block
        total += block.sum(axis=0)
    covariance = products / n_models - np.outer(total, total) / n_models**2
    deviation = np.sqrt(np.maximum(np.diagonal(covariance), 0))
    scale = np.outer(deviation, deviation)
    correlation = np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)
    return np.asarray(np.abs(datamodels.weight) @ (correlation**2).astype(np.float32))
