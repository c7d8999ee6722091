"""How well datamodels foresee models they have not seen: held-out error, and LDS beside its noise ceiling.

LDS is the Spearman correlation of predicted and true outputs over held-out subsets, averaged over targets. Training
is random, so the truth of a subset is the average of its R retrainings, and no prediction can reach a correlation of
1 with a noisy average: the ceiling says how far one can get. Intervals are over subsets, for they are what was drawn.

A target whose true output never varies has no correlation: it is nan, left out of the averages, and counted. A
datamodel that predicts the same for every subset, although the truth varies, foresees nothing: it counts as 0.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from dmpipeline.arrays import RowSliceable, as_rows, check_shapes, read_masks, read_outputs
from dmpipeline.datamodels import Datamodels
from dmpipeline.errors import DataWarning, SpecError
from dmpipeline.identity import keys_of_masks
from dmpipeline.overlaps import Possible, repeats_beyond_chance, shared_beyond_chance
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
        Error against single retrainings, in squared units of the output, and the share of their variance explained;
        nan for scores that have no units, see `evaluate`.
    target_lds, target_lds_single, target_lds_ceiling, target_mse, target_r2 : arrays of float64, shape (n_targets,)
        The same for each target; nan where its output never varies.
    n_subsets, n_retrainings, n_targets : int
        Where subsets were trained differently often, `n_retrainings` is of the one trained least often.
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
    datamodels: Datamodels | RowSliceable,
    masks: RowSliceable,
    outputs: RowSliceable,
    *,
    n_retrainings: int | None = None,
    n_bootstraps: int = 500,
    n_splits: int = 50,
    level: float = 0.95,
    seed: int = 0,
) -> Evaluation:
    """Score datamodels, or anybody's attribution scores, on held-out models.

    Parameters
    ----------
    datamodels : Datamodels, or array of float, shape (n_train, n_targets)
        An array holds a score of each example for each target: a subset's output is then foretold by the sum of its
        examples' scores. Such scores rank subsets and have no units, so that `mse` and `r2` are nan.
    masks : bool or 0/1, shape (n_models, n_train)
        Of models that were not fitted on.
    outputs : real, shape (n_models, n_targets)
    n_retrainings : int, optional
        How often each subset was trained; its retrainings are adjacent rows. If not given, rows with the same mask are
        the retrainings of one subset, wherever they are and however many: `lds` is against the averages of all of each
        subset's, and `lds_single` takes one of each. The ceiling is of the subsets that were trained at least twice,
        each one's retrainings split into two halves; it is nan where these are fewer than half of all.
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
        `LEAST_SUBSETS` subsets, outputs or scores that are not finite.

    Warns
    -----
    DataWarning
        If subsets were fitted on, or if with the `n_retrainings` given one subset counts as several: more of them than
        chance explains, which repeats subsets of tiny training sets.
    """
    if not isinstance(datamodels, Datamodels):
        datamodels = as_rows(datamodels, "scores")
    n_models, n_train, n_targets = check_shapes(masks, outputs)
    _check_fit(datamodels, (n_models, n_train), (n_models, n_targets))
    rows = read_masks(as_rows(masks, "masks"), 0, n_models)
    truth = read_outputs(as_rows(outputs, "outputs"), 0, n_models)
    keys, possible = keys_of_masks(rows), Possible.subsets(n_train, float(rows.mean() * n_train))
    _warn_of_fitted(datamodels, masks, keys, possible)
    if n_retrainings is None:
        groups = _groups_of(keys)
    else:
        groups = _adjacent_groups(rows, n_retrainings)
        if n_repeats := repeats_beyond_chance(keys[::n_retrainings], possible):
            n_different = n_models // n_retrainings - n_repeats
            warnings.warn(
                f"n_retrainings is {n_retrainings}, but {n_models:,} rows hold {n_different:,} different subsets, so "
                "that retrainings of one count as subsets of their own and the LDS is too low; leave n_retrainings "
                "out, and rows with the same mask are taken together",
                DataWarning,
                stacklevel=2,
            )
    firsts = rows[[group[0] for group in groups]]
    is_fitted = isinstance(datamodels, Datamodels)
    predicted = datamodels.predict(firsts) if isinstance(datamodels, Datamodels) else _foretold(datamodels, firsts)
    return score(
        predicted,
        truth[np.concatenate(groups)],
        sizes=[len(group) for group in groups],
        has_units=is_fitted,
        n_bootstraps=n_bootstraps,
        n_splits=n_splits,
        level=level,
        seed=seed,
    )


def score(
    predicted: NDArray[Any],
    outputs: NDArray[Any],
    *,
    sizes: Sequence[int] | None = None,
    has_units: bool = True,
    n_bootstraps: int,
    n_splits: int,
    level: float,
    seed: int,
) -> Evaluation:
    """Score predictions, from whatever they come, against the outputs of retrained models.

    Parameters
    ----------
    predicted : array of float, shape (n_subsets, n_targets)
    outputs : array of float, shape (n_models, n_targets)
        The retrainings of a subset are adjacent rows.
    sizes : sequence of int, optional
        How many retrainings each subset has; equally many if not given.
    has_units : bool
        Whether predictions are in the units of the outputs; otherwise `mse` and `r2` are nan.
    n_bootstraps, n_splits, level, seed
        As for `evaluate`.
    """
    n_subsets, n_targets = predicted.shape
    is_whole = len(outputs) % n_subsets == 0 if sizes is None and n_subsets else sum(sizes or ()) == len(outputs)
    if n_subsets < LEAST_SUBSETS or not is_whole or outputs.shape[1:] != predicted.shape[1:]:
        raise SpecError(
            f"predictions {predicted.shape} and outputs {outputs.shape} cannot be compared; expected at least "
            f"{LEAST_SUBSETS} subsets, the same targets, and a whole number of retrainings for each subset"
        )
    if not 0 < level < 1:
        raise SpecError(f"level {level} is not a coverage; choose between 0 and 1, such as 0.95")
    retrainings = _Retrainings.of(outputs, sizes or [len(outputs) // n_subsets] * n_subsets)
    finite = np.isfinite(retrainings.outputs).all(axis=1)
    if not (finite.all() and np.isfinite(predicted).all()):
        where = f" ({int((~finite).sum())} rows of outputs)" if not finite.all() else ""
        raise SpecError(
            f"held-out outputs or predictions are not finite{where}; train those rows again, or leave them out"
        )
    predicted = predicted.astype(np.float64)
    averages = retrainings.averages()
    varies = (averages != averages[0]).any(axis=0)
    target_lds = _lds_of_targets(predicted, averages)
    replicates = [_lds_of_targets(predicted, retrainings.replicate(r)) for r in range(max(retrainings.sizes))]
    target_lds_single = _mean(np.stack(replicates), axis=0)
    target_lds_single[~varies] = np.nan
    target_mse = ((retrainings.outputs - predicted[retrainings.subsets]) ** 2).mean(axis=0)
    variance = retrainings.outputs.var(axis=0)
    target_r2 = 1 - np.divide(target_mse, variance, out=np.full(n_targets, np.nan), where=varies & (variance > 0))
    target_mse = np.where(varies & has_units, target_mse, np.nan)
    target_r2 = np.where(has_units, target_r2, np.nan)
    ceiling = retrainings.noise_ceiling(n_splits=n_splits, seed=seed)
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
        n_retrainings=min(retrainings.sizes),
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
    return _reliable(total / n_splits, n_retrainings / half)


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
class _Retrainings:
    """Outputs of subsets that were each trained once or more, the retrainings of one in adjacent rows."""

    outputs: Floats  # (n_models, n_targets)
    sizes: tuple[int, ...]  # of each subset

    @classmethod
    def of(cls, outputs: NDArray[Any], sizes: Sequence[int]) -> "_Retrainings":
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
        return len(set(self.sizes)) == 1

    def averages(self) -> Floats:
        if self.is_even:
            averages: Floats = self.outputs.reshape(len(self.sizes), self.sizes[0], -1).mean(axis=1)
            return averages
        sums: Floats = np.add.reduceat(self.outputs, self.starts, axis=0)
        return sums / np.array(self.sizes, np.float64)[:, None]

    def replicate(self, nth: int) -> Floats:
        """One retraining of each subset: the nth, or as one counts on from the first again."""
        rows: Floats = self.outputs[self.starts + nth % np.array(self.sizes)]
        return rows

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


def _reliable(agreement: Floats, factor: float) -> Floats:
    """Turn the agreement of halves into the correlation of averages with what they would be without noise."""
    agreement = np.maximum(agreement, 0)
    ceiling: Floats = np.sqrt(factor * agreement / (1 + (factor - 1) * agreement))
    return ceiling


def _check_fit(datamodels: Datamodels | RowSliceable, masks: tuple[int, int], outputs: tuple[int, int]) -> None:
    """Refuse masks and outputs, by their shapes, that are not of the datamodels' or scores' examples and targets."""
    own = datamodels.weight.shape if isinstance(datamodels, Datamodels) else tuple(datamodels.shape)
    if (masks[1], outputs[1]) == own:
        return
    if not isinstance(datamodels, Datamodels):
        turned = "the scores look transposed: hand in scores.T" if own == (outputs[1], masks[1]) else ""
        raise SpecError(
            f"scores have shape {own}, but masks {masks} and outputs {outputs} need {(masks[1], outputs[1])}: a row "
            f"for each training example, a column for each target; {turned or 'hand in those of the same run'}"
        )
    raise SpecError(
        f"masks {masks} and outputs {outputs} do not fit datamodels of {own[0]} examples and {own[1]} targets; "
        "hand in held-out models of the same run"
    )


def _foretold(scores: RowSliceable, masks: NDArray[np.int8]) -> Floats:
    """Sum the scores of each subset's examples."""
    return masks.astype(np.float64) @ read_outputs(scores, 0, scores.shape[0]).astype(np.float64)


def _warn_of_fitted(
    datamodels: Datamodels | RowSliceable, masks: RowSliceable, keys: NDArray[np.uint64], possible: Possible
) -> None:
    """Warn where rows to score on were fitted on; called by `evaluate`."""
    fitted = datamodels.fitted_masks if isinstance(datamodels, Datamodels) else None
    if fitted is None:
        return
    if n_shared := shared_beyond_chance(keys, fitted, possible):
        held_out = getattr(getattr(masks, "rows", None), "evaluation", None)
        which = "leave them out" if held_out is None else "take masks[masks.rows.evaluation] and outputs likewise"
        warnings.warn(
            f"{n_shared:,} of {len(np.unique(keys)):,} subsets to score on were fitted on, so that these scores say "
            f"little of subsets that were not; score on held-out models alone: {which}",
            DataWarning,
            stacklevel=3,
        )


def _groups_of(keys: NDArray[np.uint64]) -> list[NDArray[np.intp]]:
    """Take the rows of each mask together, masks in the order in which they come first."""
    _, first, nth = np.unique(keys, return_index=True, return_inverse=True)
    place = np.argsort(np.argsort(first))[nth]
    order = np.argsort(place, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(place[order])) + 1)


def _adjacent_groups(rows: NDArray[np.int8], n_retrainings: int) -> list[NDArray[np.intp]]:
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
