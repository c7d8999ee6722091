"""Rank correlation of predicted and true outputs, target by target: LDS, and its interval over subsets.

A target whose true output never varies has no correlation, nan. A prediction that is the same for every subset,
although the truth varies, counts as 0.
"""

import math
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmpipeline.compute import available_threads, kernel_when_called

Floats = NDArray[np.float64]

_RESAMPLES_AT_ONCE = 32
"""Resamples whose counts of a subset lie side by side, so that one instruction serves several."""
_COLUMNS_AT_ONCE = 8


def lds(predicted: NDArray[Any], true: NDArray[Any]) -> float:
    """Average over targets the Spearman correlation of predicted and true outputs over subsets.

    Parameters
    ----------
    predicted, true : arrays of float, shape (n_subsets, n_targets)

    Returns
    -------
    lds : float
        nan where no target varies.

    Examples
    --------
    >>> import numpy as np
    >>> true = np.array([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]])
    >>> lds(true ** 3, true)  # the second target never varies
    1.0
    """
    return float(mean_of_known(lds_of_targets(predicted, true)))


def spearman(a: NDArray[Any], b: NDArray[Any]) -> Floats:
    """Correlate the ranks of each column of `a` with those of the same column of `b`; ties get their average rank.

    Parameters
    ----------
    a, b : arrays of real, shape (n, n_columns)

    Returns
    -------
    correlation : array of float64, shape (n_columns,)
        nan where a column of either is constant.
    """
    weight = np.ones(len(a))
    return weighted_correlation(Ranker.of(a).ranks(weight), Ranker.of(b).ranks(weight), weight)


def lds_of_targets(predicted: NDArray[Any], true: NDArray[Any]) -> Floats:
    """Spearman a target; 0 where only the truth varies, nan where it does not."""
    correlation = spearman(predicted, true)
    blind = np.isnan(correlation) & (true != true[0]).any(axis=0)
    return np.where(blind, 0.0, correlation)


def lds_interval(predicted: Floats, true: Floats, *, n_bootstraps: int, level: float, seed: int) -> tuple[float, float]:
    """Percentiles of the LDS over resamples of the subsets with replacement, about the LDS itself.

    Each resample is ranked again. A Spearman correlation of 100 rows is about 1% too low, and its resamples are so once
    more, which would push the interval below the estimate; so only the spread is taken from them.

    Memory holds, a thread, 128 bytes for each subset, in addition to the order of all numbers.
    """
    rng = np.random.default_rng([seed, 2])
    n_subsets = len(predicted)
    varies = (true != true[0]).any(axis=0)
    if not varies.any() or n_bootstraps == 0:
        return math.nan, math.nan
    of_both = _sorted_columns(predicted[:, varies]), _sorted_columns(true[:, varies])
    scores = np.empty(n_bootstraps)
    with ThreadPoolExecutor(available_threads()) as pool:
        for start in range(0, n_bootstraps, _RESAMPLES_AT_ONCE):
            some = scores[start : start + _RESAMPLES_AT_ONCE]
            weights = np.zeros((n_subsets, _RESAMPLES_AT_ONCE), np.float32)
            for b in range(len(some)):
                weights[:, b] = rng.multinomial(n_subsets, np.full(n_subsets, 1 / n_subsets))
            some[:] = _correlations_of_resamples(*of_both, weights, pool).mean(axis=0)[: len(some)]
    low, high = np.quantile(scores - scores.mean(), [(1 - level) / 2, (1 + level) / 2])
    middle = lds_of_targets(predicted, true)[varies].mean()
    return float(max(middle + low, -1)), float(min(middle + high, 1))


def mean_of_known(values: Floats, axis: int | None = None) -> Any:
    """Mean of what is not nan; nan where nothing is."""
    known = ~np.isnan(values)
    count = known.sum(axis=axis)
    total = np.where(known, values, 0).sum(axis=axis)
    return np.divide(total, count, out=np.full(np.shape(count), np.nan), where=count > 0)


@dataclass(frozen=True, slots=True, eq=False)
class Ranker:
    """The sorted order of every column, from which the ranks of any resample of the rows follow without a sort."""

    order: NDArray[np.intp]  # (n, n_columns): rows by rising value
    first: NDArray[np.intp]  # (n, n_columns): for each sorted place, where its group of ties begins
    last: NDArray[np.intp]  # and where it ends, inclusive

    @classmethod
    def of(cls, values: NDArray[Any]) -> "Ranker":
        """Sort each column of `values`, (n, n_columns)."""
        order = np.argsort(values, axis=0, kind="stable")
        ordered = np.take_along_axis(values, order, axis=0)
        place = np.arange(len(values))[:, None]
        starts = np.ones(values.shape, bool)
        starts[1:] = ordered[1:] != ordered[:-1]
        ends = np.ones(values.shape, bool)
        ends[:-1] = starts[1:]
        first = np.maximum.accumulate(np.where(starts, place, 0), axis=0)
        last = np.minimum.accumulate(np.where(ends, place, len(values))[::-1], axis=0)[::-1]
        return cls(order, first, last)

    def ranks(self, weight: Floats) -> Floats:
        """Average ranks, from 1, in a sample that holds row i `weight[i]` times; shape (n, n_columns)."""
        below = np.concatenate([np.zeros((1, self.order.shape[1])), np.cumsum(weight[self.order], axis=0)])
        reached = np.take_along_axis(below, self.first, axis=0) + np.take_along_axis(below, self.last + 1, axis=0)
        ranks = np.empty(self.order.shape)
        np.put_along_axis(ranks, self.order, (reached + 1) / 2, axis=0)
        return ranks


def weighted_correlation(a: Floats, b: Floats, weight: Floats) -> Floats:
    """Correlate each column of `a` with the same of `b`, (n, n_columns), row i counted `weight[i]` times."""
    share = weight / weight.sum()
    a = a - share @ a
    b = b - share @ b
    scale = np.sqrt((share @ a**2) * (share @ b**2))
    # ranks are halves, so what remains of a constant column is rounding, far below the least real variance
    correlation = np.full(a.shape[1], np.nan)
    np.divide(share @ (a * b), scale, out=correlation, where=scale > 1e-9)
    return correlation


_Sorted = tuple[NDArray[np.intp], NDArray[np.bool_]]
"""For each column, (n_columns, n): rows by rising value, and whether a group of ties ends at each sorted place."""


def _sorted_columns(values: Floats) -> _Sorted:
    ranker = Ranker.of(values)
    return np.ascontiguousarray(ranker.order.T), np.arange(len(values)) == ranker.last.T


def _correlations_of_resamples(a: _Sorted, b: _Sorted, weights: NDArray[np.float32], pool: Executor) -> Floats:
    """Correlate the ranks of each column of two matrices in each resample; 0 where a column is constant in it.

    Parameters
    ----------
    a, b
        From `_sorted_columns`.
    weights : array of float32, shape (n, n_resamples)
        How often each resample holds each row, as many in total as there are rows.

    Returns
    -------
    correlations : array of float64, shape (n_columns, n_resamples)
    """
    correlations = np.empty((len(a[0]), weights.shape[1]))

    def of_columns(left: int) -> None:
        some = slice(left, left + _COLUMNS_AT_ONCE)
        _correlate_resamples(weights, a[0][some], a[1][some], b[0][some], b[1][some], correlations[some])

    of_columns(0)  # compiles, once
    list(pool.map(of_columns, range(_COLUMNS_AT_ONCE, len(correlations), _COLUMNS_AT_ONCE)))
    return correlations


@kernel_when_called
def _correlate_resamples(weights, order_a, ends_a, order_b, ends_b, correlations):  # type: ignore[no-untyped-def]
    """Correlate each column with its counterpart in all resamples.

    Twice the rank of a group of ties, less its mean, is twice what lies below it, plus its own size, less the size of
    the sample. These are whole numbers, and so are their sums: exact for up to 100,000 rows, and beyond but
    for rounding.
    """
    n, n_resamples = weights.shape
    below, group, pull = np.zeros(n_resamples), np.zeros(n_resamples), np.zeros(n_resamples)
    pulls = np.empty((n, n_resamples), np.float32)
    for t in range(len(order_a)):
        squares_a, squares_b, products = np.zeros(n_resamples), np.zeros(n_resamples), np.zeros(n_resamples)
        below[:] = 0
        first = 0
        for k in range(n):
            weight = weights[order_b[t, k]]
            for s in range(n_resamples):
                group[s] += weight[s]
            if ends_b[t, k]:
                for s in range(n_resamples):
                    pull[s] = 2 * below[s] + group[s] - n
                    squares_b[s] += group[s] * pull[s] * pull[s]
                    below[s] += group[s]
                    group[s] = 0
                for tied in range(first, k + 1):
                    weight, own = weights[order_b[t, tied]], pulls[order_b[t, tied]]
                    for s in range(n_resamples):
                        own[s] = weight[s] * pull[s]
                first = k + 1
        below[:] = 0
        pull[:] = 0
        for k in range(n):
            weight, own = weights[order_a[t, k]], pulls[order_a[t, k]]
            for s in range(n_resamples):
                group[s] += weight[s]
                pull[s] += own[s]
            if ends_a[t, k]:
                for s in range(n_resamples):
                    rank = 2 * below[s] + group[s] - n
                    squares_a[s] += group[s] * rank * rank
                    products[s] += pull[s] * rank
                    below[s] += group[s]
                    group[s] = 0
                    pull[s] = 0
        for s in range(n_resamples):
            scale = math.sqrt(squares_a[s]) * math.sqrt(squares_b[s])
            correlations[t, s] = products[s] / scale if scale > 0 else 0.0
