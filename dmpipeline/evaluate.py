"""How well datamodels foresee models they have not seen: held-out error, and LDS beside its noise ceiling.

LDS is the Spearman correlation of predicted and true outputs over held-out subsets, averaged over targets. Training
is random, so the truth of a subset is the average of its R retrainings, and no prediction can reach a correlation of
1 with a noisy average: the ceiling says how far one can get. Intervals are over subsets, for they are what was drawn.

A target whose true output never varies has no correlation: it is nan, left out of the averages, and counted. A
datamodel that predicts the same for every subset, although the truth varies, foresees nothing: it counts as 0.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from dmpipeline.datamodels import Datamodels
from dmpipeline.errors import SpecError
from dmpipeline.moments import RowSliceable, check_shapes
from dmpipeline.shown import Shown

Floats = NDArray[np.float64]

LEAST_SUBSETS = 3
"""Fewer held-out subsets than this give no rank correlation worth the name."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Evaluation(Shown):
    """Scores on held-out subsets, each averaged over the targets that vary.

    Attributes
    ----------
    lds : float
        Against the averages of the retrainings.
    lds_low, lds_high : float
        Its bootstrap interval over subsets, at `level`.
    lds_single : float
        Against one retraining of each subset, averaged over which.
    lds_ceiling : float
        The highest LDS that the noise in the averages allows; nan with a single retraining.
    mse, r2 : float
        Error against single retrainings, in squared units of the output, and the share of their variance explained.
    target_lds, target_lds_single, target_lds_ceiling, target_mse, target_r2 : arrays of float64, shape (n_targets,)
        The same for each target; nan where its output never varies.
    n_subsets, n_retrainings, n_targets : int
    n_constant : int
        Targets left out of the averages because their true output never varies.
    level : float
        Of the interval.
    """

    lds: float
    lds_low: float
    lds_high: float
    lds_single: float
    lds_ceiling: float
    mse: float
    r2: float
    target_lds: Floats
    target_lds_single: Floats
    target_lds_ceiling: Floats
    target_mse: Floats
    target_r2: Floats
    n_subsets: int
    n_retrainings: int
    n_targets: int
    n_constant: int
    level: float

    def _facts(self) -> tuple[str, dict[str, object]]:
        interval = f"{readable_score(self.lds_low)} to {readable_score(self.lds_high)}"
        return "Evaluation", {
            "LDS": f"{readable_score(self.lds)} ({self.level:.0%} interval {interval})",
            "ceiling": readable_score(self.lds_ceiling),
            "R2": readable_score(self.r2),
            "targets": self.n_targets,
            "held out": f"{self.n_subsets:,} subsets of {self.n_retrainings:,}",
        }

    @property
    def lds_ratio(self) -> float:
        """Share of the ceiling that the LDS reaches; nan where the ceiling is not defined, or is 0.

        A ratio of two averages, each of which is estimated: chance may carry it above 1.
        """
        return self.lds / self.lds_ceiling if self.lds_ceiling > 0 else math.nan

    def as_dict(self) -> dict[str, float | int | None]:
        """Give the scalars, ready for JSON: None stands for what is not defined."""
        names = ("lds", "lds_low", "lds_high", "lds_single", "lds_ceiling", "lds_ratio", "mse", "r2", "level")
        scores = {name: _or_none(getattr(self, name)) for name in names}
        counts = {name: getattr(self, name) for name in ("n_subsets", "n_retrainings", "n_targets", "n_constant")}
        return scores | counts


def evaluate(
    datamodels: Datamodels,
    masks: RowSliceable,
    outputs: RowSliceable,
    *,
    n_retrainings: int = 1,
    n_bootstraps: int = 500,
    n_splits: int = 50,
    level: float = 0.95,
    seed: int = 0,
) -> Evaluation:
    """Score datamodels on held-out models.

    Parameters
    ----------
    datamodels : Datamodels
    masks : bool or 0/1, shape (n_subsets * n_retrainings, n_train)
        The retrainings of one subset are adjacent rows.
    outputs : real, shape (n_subsets * n_retrainings, n_targets)
    n_retrainings : int
        How often each subset was trained.
    n_bootstraps, n_splits : int
        Resamples of the subsets for the interval, and random halvings of the retrainings for the ceiling.
    level : float
        Coverage of the interval.
    seed : int
        Of both.

    Raises
    ------
    SpecError
        Rows that are not whole groups of one mask each, shapes that do not fit the datamodels, fewer than
        `LEAST_SUBSETS` subsets, outputs that are not finite.
    """
    n_models, n_train, n_targets = check_shapes(masks, outputs)
    if (n_train, n_targets) != datamodels.weight.shape:
        raise SpecError(
            f"masks {masks.shape} and outputs {outputs.shape} do not fit datamodels of {datamodels.n_train} examples "
            f"and {datamodels.n_targets} targets; hand in held-out models of the same run"
        )
    if n_retrainings < 1 or n_models % n_retrainings:
        raise SpecError(
            f"{n_models} held-out models are not whole groups of {n_retrainings} retrainings; "
            "choose n_retrainings so that it divides them",
            n_models=n_models,
            n_retrainings=n_retrainings,
        )
    rows = np.asarray(masks[0:n_models])
    of_subset = rows.reshape(-1, n_retrainings, n_train)
    mixed = np.flatnonzero((of_subset != of_subset[:, :1]).any(axis=(1, 2)))
    if len(mixed):
        raise SpecError(
            f"rows {mixed[0] * n_retrainings} to {(mixed[0] + 1) * n_retrainings} hold different masks; expected "
            f"{n_retrainings} retrainings of one subset in adjacent rows: order them so, or correct n_retrainings",
            subset=int(mixed[0]),
        )
    return score(
        datamodels.predict(of_subset[:, 0]),
        np.asarray(outputs[0:n_models]),
        n_bootstraps=n_bootstraps,
        n_splits=n_splits,
        level=level,
        seed=seed,
    )


def score(
    predicted: NDArray[Any],
    outputs: NDArray[Any],
    *,
    n_bootstraps: int,
    n_splits: int,
    level: float,
    seed: int,
) -> Evaluation:
    """Score predictions, from whatever they come, against the outputs of retrained models.

    Parameters
    ----------
    predicted : array of float, shape (n_subsets, n_targets)
    outputs : array of float, shape (n_subsets * R, n_targets)
        The R retrainings of a subset are adjacent rows.
    n_bootstraps, n_splits, level, seed
        As for `evaluate`.
    """
    n_subsets, n_targets = predicted.shape
    if n_subsets < LEAST_SUBSETS or len(outputs) % n_subsets or outputs.shape[1:] != predicted.shape[1:]:
        raise SpecError(
            f"predictions {predicted.shape} and outputs {outputs.shape} cannot be compared; expected at least "
            f"{LEAST_SUBSETS} subsets, the same targets, and a whole number of retrainings for each subset"
        )
    if not 0 < level < 1:
        raise SpecError(f"level {level} is not a coverage; choose between 0 and 1, such as 0.95")
    single = outputs.astype(np.float64).reshape(n_subsets, -1, n_targets)
    if not (np.isfinite(single).all() and np.isfinite(predicted).all()):
        raise SpecError("held-out outputs or predictions are not finite; train those rows again, or leave them out")
    predicted = predicted.astype(np.float64)
    averages = single.mean(axis=1)
    varies = (averages != averages[0]).any(axis=0)
    target_lds = _lds_of_targets(predicted, averages)
    replicates = [_lds_of_targets(predicted, single[:, r]) for r in range(single.shape[1])]
    target_lds_single = _mean(np.stack(replicates), axis=0)
    target_lds_single[~varies] = np.nan
    target_mse = ((single - predicted[:, None]) ** 2).mean(axis=(0, 1))
    variance = single.var(axis=(0, 1))
    target_r2 = 1 - np.divide(target_mse, variance, out=np.full(n_targets, np.nan), where=varies & (variance > 0))
    target_mse = np.where(varies, target_mse, np.nan)
    ceiling = noise_ceiling(single, n_splits=n_splits, seed=seed)
    low, high = _interval(predicted, averages, n_bootstraps=n_bootstraps, level=level, seed=seed)
    return Evaluation(
        lds=float(_mean(target_lds)),
        lds_low=low,
        lds_high=high,
        lds_single=float(_mean(target_lds_single)),
        lds_ceiling=float(_mean(ceiling)),
        mse=float(_mean(target_mse)),
        r2=float(_mean(target_r2)),
        target_lds=target_lds,
        target_lds_single=target_lds_single,
        target_lds_ceiling=ceiling,
        target_mse=target_mse,
        target_r2=target_r2,
        n_subsets=n_subsets,
        n_retrainings=single.shape[1],
        n_targets=n_targets,
        n_constant=int((~varies).sum()),
        level=level,
    )


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
    return float(_mean(_lds_of_targets(predicted, true)))


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
    return _weighted_correlation(_Ranker.of(a).ranks(weight), _Ranker.of(b).ranks(weight), weight)


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
    agreement = np.maximum(total / n_splits, 0)
    factor = n_retrainings / half
    ceiling: Floats = np.sqrt(factor * agreement / (1 + (factor - 1) * agreement))
    return ceiling


def readable_score(value: float, *, digits: int = 3) -> str:
    """Write a score for people, as 0.812; what is not defined says so."""
    return "not defined" if math.isnan(value) else f"{value:.{digits}f}"


def readable_table(table: Table) -> str:
    """Write a table as plain lines, however wide, with nothing after the last word of a line."""
    console = Console(width=10_000, markup=False, emoji=False, highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


@dataclass(frozen=True, slots=True, eq=False)
class _Ranker:
    """The sorted order of every column, from which the ranks of any resample of the rows follow without a sort."""

    order: NDArray[np.intp]  # (n, n_columns): rows by rising value
    first: NDArray[np.intp]  # (n, n_columns): for each sorted place, where its group of ties begins
    last: NDArray[np.intp]  # and where it ends, inclusive

    @classmethod
    def of(cls, values: NDArray[Any]) -> "_Ranker":
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


def _weighted_correlation(a: Floats, b: Floats, weight: Floats) -> Floats:
    share = weight / weight.sum()
    a = a - share @ a
    b = b - share @ b
    scale = np.sqrt((share @ a**2) * (share @ b**2))
    # ranks are halves, so what remains of a constant column is rounding, far below the least real variance
    correlation = np.full(a.shape[1], np.nan)
    np.divide(share @ (a * b), scale, out=correlation, where=scale > 1e-9)
    return correlation


def _lds_of_targets(predicted: NDArray[Any], true: NDArray[Any]) -> Floats:
    """Spearman a target; 0 where only the truth varies, nan where it does not."""
    correlation = spearman(predicted, true)
    blind = np.isnan(correlation) & (true != true[0]).any(axis=0)
    return np.where(blind, 0.0, correlation)


def _interval(predicted: Floats, true: Floats, *, n_bootstraps: int, level: float, seed: int) -> tuple[float, float]:
    """Percentiles of the LDS over resamples of the subsets with replacement, about the LDS itself.

    Each resample is ranked anew. A Spearman correlation of 100 rows is about 1% too low, and its resamples are so once
    more, which would push the interval below the estimate; so only the spread is taken from them.
    """
    rng = np.random.default_rng([seed, 2])
    n_subsets = len(predicted)
    varies = (true != true[0]).any(axis=0)
    if not varies.any() or n_bootstraps == 0:
        return math.nan, math.nan
    of_predicted, of_true = _Ranker.of(predicted[:, varies]), _Ranker.of(true[:, varies])
    scores = np.empty(n_bootstraps)
    for b in range(n_bootstraps):
        weight = rng.multinomial(n_subsets, np.full(n_subsets, 1 / n_subsets)).astype(np.float64)
        correlation = _weighted_correlation(of_predicted.ranks(weight), of_true.ranks(weight), weight)
        scores[b] = np.nan_to_num(correlation).mean()
    low, high = np.quantile(scores - scores.mean(), [(1 - level) / 2, (1 + level) / 2])
    middle = _lds_of_targets(predicted, true)[varies].mean()
    return float(max(middle + low, -1)), float(min(middle + high, 1))


def _mean(values: Floats, axis: int | None = None) -> Any:
    """Mean of what is not nan; nan where nothing is."""
    known = ~np.isnan(values)
    count = known.sum(axis=axis)
    total = np.where(known, values, 0).sum(axis=axis)
    return np.divide(total, count, out=np.full(np.shape(count), np.nan), where=count > 0)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
