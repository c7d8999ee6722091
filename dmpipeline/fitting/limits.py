"""What a linear datamodel could explain if there were endlessly many models: estimated from moments, without a fit.

With masks z scaled to mean 0 and variance 1 and independent examples, the best linear datamodel of an output y has the
weights E[y z_j], and explains L = sum_j E[y z_j]^2 of the variance V of y. Over n models c = z'y / n, and the mean of
y_i y_k z_i'z_k over different models i, k is an unbiased estimate of L: (n |c|^2 - p V) / (n - 1), for |z_i|^2 = p.
No law of the noise or of the weights is assumed, and nothing need be sparse. Where y is linear with normal noise this
is the method of moments of Dicker (2014), "Variance estimation in high-dimensional linear models", Biometrika 101,
whose variance is taken for the standard error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dmpipeline.fitting.spaces import Space
from dmpipeline.moments.moments import Moments

_SAMPLED_ROWS = 256
# of what an example has in common with all others, in squared correlations; chance leaves about 0.02 with 250 models
_DEPENDENT = 0.2


@dataclass(frozen=True, slots=True, eq=False)
class LinearLimit:
    """Of each target's output, how much varies among models, and how much of it a linear datamodel could ever explain.

    Attributes
    ----------
    variance : array of float64, shape (n_targets,)
        Of the outputs of the models fitted on, in squared units of the output.
    linear : array of float64, shape (n_targets,)
        What the best linear datamodel explains of it. An unbiased estimate, which chance may carry below 0 or above
        `variance`; nan where examples are not in the subsets independently of one another.
    error : array of float64, shape (n_targets,)
        Standard error of `left`.
    """

    variance: NDArray[np.float64]
    linear: NDArray[np.float64]
    error: NDArray[np.float64]

    @property
    def left(self) -> NDArray[np.float64]:
        """What no linear datamodel explains: chance of training, and what is not linear."""
        return self.variance - self.linear

    @classmethod
    def of(cls, moments: Moments, space: Space, parts: Sequence[slice]) -> Self:
        """Estimate from the moments of all models fitted on, whose `space` it is, for a part of the targets at a time.

        Memory holds a part's moments in float64, and the counts of 256 examples with all others.
        """
        n, n_targets = moments.n, moments.cross.shape[1]
        p = int((space.inverse_scale > 0).sum())
        variance, squares = np.empty(n_targets), np.empty(n_targets)
        for part in parts:
            variance[part] = space.square(moments, part)
            squares[part] = (space.cross(moments, part) ** 2).sum(axis=1)
        if n < 2 or not p:
            return cls(variance, np.full(n_targets, np.nan), np.full(n_targets, np.nan))
        linear = (n * squares - p * variance) / (n - 1) * _scale(moments, space)
        left = variance - linear
        error = np.sqrt(2 / n * (p / n * variance**2 + left**2 + linear**2))
        return cls(variance, linear, error)


def _scale(moments: Moments, space: Space) -> float:
    """Return what to multiply sum_j E[y z_j]^2 by: 1 for independent examples, 1 - 1/p where all subsets are as large.

    In subsets of one size examples have a correlation of -1 / (p - 1), and the covariance p / (p - 1) (I - 11'/p) has
    that generalised inverse. nan where examples have more to do with one another.
    """
    varying = np.flatnonzero(space.inverse_scale)
    p = len(varying)
    picked = varying[np.linspace(0, p - 1, min(p, _SAMPLED_ROWS)).astype(np.intp)]
    counts = moments.gram[picked][:, varying] / moments.n
    mean, inverse = space.mean, space.inverse_scale
    correlation = (counts - np.outer(mean[picked], mean[varying])) * np.outer(inverse[picked], inverse[varying])
    together = (correlation**2).sum(axis=1) - 1 - (p - 1) / moments.n
    if together.mean() - 1 / max(p - 1, 1) > _DEPENDENT:
        return float("nan")
    sums = (counts - np.outer(mean[picked], mean[varying])).sum(axis=1)
    is_one_size = bool((np.abs(sums) < 1e-9 * p).all())
    return 1 - 1 / p if is_one_size else 1.0
