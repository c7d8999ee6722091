"""How large pair terms are likely to be: a law of their variance, learned from all targets' noisy estimates at once.

A coefficient's estimate is the coefficient plus noise of known variance e. What coefficients are typically like depends
on what is known of the pair,

    log v = a + b log |w_i w_j| + c r + d r^2,

where w are the linear weights and r is how alike both examples act on other targets: copies, or near ones, can replace
each other, and what they do together is not the sum. Among pairs that are known to be like one another a few are far
larger than the rest: a coefficient is taken for drawn from a mixture of normal laws of mean zero and variances v s, for
a few scales s (Stephens, False discovery rates: a new deal, Biostatistics 18, 2017). The law and the shares of the
scales are the most likely ones (empirical Bayes), and a coefficient is then expected to be

    sum over s of P(s | estimate) v s / (v s + e)

times its estimate. So nothing is left out by a threshold, and there is no strength to choose.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_SCALES = (0.0, 0.1, 0.5, 2.0, 8.0, 32.0)


class Mixture(NamedTuple):
    """Scales of a law's variance, and the share of the pairs that each is for.

    Attributes
    ----------
    scales, shares : array of float64, shape (n_scales,)
    """

    scales: NDArray[np.float64]
    shares: NDArray[np.float64]


NORMAL = Mixture(np.ones(1), np.ones(1))
"""All pairs are as the law has them."""

_LEAST_WEIGHT = 1e-5
_CENTRE = -8.0
_MOST_STEPS = 50
_LEAST_GAIN = 1e-3  # in units of log likelihood
_LEAST_CHANGE = 1e-4
_LOG_RANGE = (-60.0, 0.0)


def pair_features(weight: NDArray[np.floating[Any]], likeness: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Describe the pairs of one target's examples.

    Parameters
    ----------
    weight : array of float, shape (k,)
        Linear effects, in units of the output's deviation.
    likeness : array of float, shape (k, k)
        Cosine of what two examples do to other targets; below zero counts as zero.

    Returns
    -------
    features : array of float64, shape (k (k - 1) / 2, 4)
    """
    pairs = np.triu_indices(len(weight), 1)
    size = np.log(np.maximum(np.abs(weight), _LEAST_WEIGHT))
    alike = np.maximum(likeness[pairs], 0)
    return np.stack([np.ones(len(alike)), size[pairs[0]] + size[pairs[1]] - _CENTRE, alike, alike**2], axis=1)


def likely_variance(features: NDArray[np.float64], law: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the variance of coefficients by a law, for features (..., 4)."""
    variance: NDArray[np.float64] = np.exp(np.clip(features @ law, *_LOG_RANGE))
    return variance


def likeliest_law(
    estimate: NDArray[np.floating[Any]], noise: NDArray[np.float64], features: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Find the law by Fisher scoring, with steps shortened until the likelihood rises.

    Parameters
    ----------
    estimate : array of float, shape (n_targets, n_pairs)
    noise : array of float64, shape (n_targets,)
        Variance of a target's estimates.
    features : array of float64, shape (n_targets, n_pairs, 4)

    Returns
    -------
    law : array of float64, shape (4,)
    """
    square, noise = np.asarray(estimate, np.float64) ** 2, noise[:, None]
    known = [place for place in range(features.shape[2]) if place == 0 or np.ptp(features[..., place]) > 0]
    own = features[..., known]

    def loss(law: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        variance = np.exp(np.clip(own @ law, *_LOG_RANGE))
        return float(
            0.5 * (np.log1p(variance / noise) - square * variance / (noise * (variance + noise))).sum()
        ), variance

    law = np.zeros(len(known))
    law[0] = np.log(max(float((square - noise).mean()), float(noise.mean()) * 1e-3))
    least, variance = loss(law)
    damping = 1.0
    for _ in range(_MOST_STEPS):
        share = variance / (variance + noise)
        slope = 0.5 * np.einsum("tp,tpf->f", (1 - square / (variance + noise)) * share, own)
        information = 0.5 * np.einsum("tpf,tpg->fg", own * (share**2)[..., None], own)
        scale = np.diag(np.diag(information) + 1e-9)
        while True:
            tried = law - np.linalg.solve(information + damping * scale, slope)
            its, its_variance = loss(tried)
            if its <= least or damping > 1e9:
                break
            damping *= 4
        gain, damping = least - its, max(damping / 8, 1e-6)
        if gain > 0:
            law, least, variance = tried, its, its_variance
        if gain < _LEAST_GAIN:
            break
    whole = np.zeros(features.shape[2])
    whole[known] = law
    return whole


def likeliest_mixture(
    estimate: NDArray[np.floating[Any]], noise: NDArray[np.float64], variance: NDArray[np.floating[Any]]
) -> Mixture:
    """Find the shares of the scales by expectation and maximisation.

    Parameters
    ----------
    estimate, variance : array of float, shape (n_targets, n_pairs)
    noise : array of float64, shape (n_targets,)
    """
    mixture = Mixture(np.array(_SCALES), np.full(len(_SCALES), 1 / len(_SCALES)))
    for _ in range(_MOST_STEPS):
        of_targets = zip(estimate, noise, variance, strict=True)
        sums = np.sum([_odds(*target, mixture).sum(axis=1) for target in of_targets], axis=0)
        before, mixture = mixture, mixture._replace(shares=sums / estimate.size)
        if np.abs(mixture.shares - before.shares).max() < _LEAST_CHANGE:
            break
    return mixture


def believed(
    estimate: NDArray[np.floating[Any]], noise: float, variance: NDArray[np.floating[Any]], mixture: Mixture
) -> NDArray[np.float64]:
    """Return by what each estimate of one target, (n_pairs,), is to be multiplied; between 0 and 1."""
    scaled = np.multiply.outer(mixture.scales, np.asarray(variance, np.float64))
    share: NDArray[np.float64] = (_odds(estimate, noise, variance, mixture) * scaled / (scaled + noise)).sum(axis=0)
    return share


def _odds(
    estimate: NDArray[np.floating[Any]], noise: float, variance: NDArray[np.floating[Any]], mixture: Mixture
) -> NDArray[np.float64]:
    """Return how likely each scale is after the estimate was seen, (n_scales, n_pairs)."""
    spread = np.multiply.outer(mixture.scales, np.asarray(variance, np.float64)) + noise
    log_odds = np.log(np.maximum(mixture.shares, 1e-300))[:, None] - 0.5 * (np.log(spread) + estimate**2 / spread)
    odds: NDArray[np.float64] = np.exp(log_odds - log_odds.max(axis=0))
    odds /= odds.sum(axis=0)
    return odds
