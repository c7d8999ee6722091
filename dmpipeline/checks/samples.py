"""Two ensembles as they are compared: their independent subsets, what is taken of each model, and permuted models.

See `dmpipeline.checks.agreement`, which makes findings of it.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dmpipeline.errors import SpecError

Floats = npt.NDArray[np.float64]

LEAST_MODELS = 20
"""Fewer independent models than this on either side show nothing about spreads."""

N_COMPONENTS = 10
"""Principal components of the pooled outputs that are compared."""

_MOST_WORK = 3e11
# Multiplications that permutations may take, about half a minute on two cores; beyond it bounds are Bonferroni's.
_BLOCK_TARGETS = 32
_EXACT_TARGETS = 1500  # up to which principal components are those of the matrix of all targets


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Both ensembles below each other, ours first: the mean over each subset's retrainings, and one of them."""

    means: npt.NDArray[np.float64]
    firsts: npt.NDArray[np.float64]
    n_ours: int
    n_theirs: int
    numbers: npt.NDArray[np.int64]

    @property
    def n_targets(self) -> int:
        """Targets that are compared."""
        return int(self.firsts.shape[1])

    @classmethod
    def of(cls, ours: Any, theirs: Any, our_groups: Any, their_groups: Any, numbers: Any) -> "Sample":
        """Group the retrainings of each subset; SpecError where outputs cannot be compared."""
        sides = [np.asarray(side) for side in (ours, theirs)]
        if any(side.ndim != 2 for side in sides) or sides[0].shape[1:] != sides[1].shape[1:] or not sides[0].shape[1]:
            raise SpecError(
                f"outputs {sides[0].shape} and {sides[1].shape} cannot be compared; expected (n_models, n_targets) of "
                "the same targets"
            )
        parts = [_grouped(side, groups) for side, groups in zip(sides, (our_groups, their_groups), strict=True)]
        counts = [len(means) for means, _ in parts]
        if min(counts) < LEAST_MODELS:
            raise SpecError(
                f"{counts[0]} and {counts[1]} models of different subsets are too few to compare; "
                f"hand in at least {LEAST_MODELS} of each"
            )
        firsts = np.concatenate([firsts for _, firsts in parts])
        if not np.isfinite(firsts).all():
            raise SpecError("outputs are not all finite; leave those models out, and find out why")
        alike = all(means is first for means, first in parts)
        means = firsts if alike else np.concatenate([means for means, _ in parts])
        known = np.arange(firsts.shape[1]) if numbers is None else np.asarray(numbers)
        if known.shape != firsts.shape[1:]:
            raise SpecError(f"numbers {known.shape} do not fit {firsts.shape[1]:,} targets; hand in one each")
        return cls(means, firsts, counts[0], counts[1], known.astype(np.int64))


def _grouped(side: npt.NDArray[Any], groups: Any) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    wide = side.astype(np.float64)
    if groups is None:
        return wide, wide
    numbers = np.asarray(groups)
    if numbers.shape != (len(wide),):
        raise SpecError(f"groups {numbers.shape} do not fit {len(wide):,} models; hand in one number each")
    _, firsts, nth, sizes = np.unique(numbers, return_index=True, return_inverse=True, return_counts=True)
    if len(firsts) == len(wide):
        return wide, wide
    sums = np.zeros((len(firsts), wide.shape[1]))
    np.add.at(sums, nth, wide)
    return sums / sizes[:, None], wide[firsts]


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """What means and spreads are taken of: targets, then their average over a model, then principal components.

    All are in standard deviations of a target over models: the average, and scores as what they add to the root mean
    square over targets.
    """

    means: npt.NDArray[np.float32]
    firsts: npt.NDArray[np.float32]
    kurtosis: Floats
    varies: npt.NDArray[np.bool_]
    n_ours: int

    @property
    def n(self) -> int:
        """Columns that are compared: targets, their average, and principal components."""
        return int(self.firsts.shape[1])

    @classmethod
    def of(cls, sample: Sample, seed: int) -> "Columns":
        """Standardise the outputs of both, and add what is taken of all targets together."""
        n = sample.n_ours
        deviation = np.sqrt((sample.firsts[:n].var(0, ddof=1) + sample.firsts[n:].var(0, ddof=1)) / 2)
        center = (sample.firsts[:n].mean(0) + sample.firsts[n:].mean(0)) / 2
        # a target that never varies on either side has no unit: it is the same value, or beyond any margin
        varies = deviation > 1e-9 * np.maximum(1, np.abs(center))
        scale = np.where(varies, deviation, np.maximum(1e-9 * np.maximum(1, np.abs(center)), deviation))
        firsts = (sample.firsts - center) / scale
        means = firsts if sample.means is sample.firsts else (sample.means - center) / scale
        directions = _components(_kept(firsts, varies), seed)
        # a shift of a score is then never more than the root mean square shift of the targets
        unit = math.sqrt(max(1, int(varies.sum())))

        def widened(part: Floats) -> npt.NDArray[np.float32]:
            if not varies.any():
                return part.astype(np.float32)
            kept = _kept(part, varies)
            of_models = kept.mean(axis=1, keepdims=True)
            return np.concatenate([part, of_models, kept @ directions.T / unit], axis=1).astype(np.float32)

        wide = widened(firsts)
        squares = np.concatenate([wide[:n] - wide[:n].mean(0), wide[n:] - wide[n:].mean(0)]).astype(np.float64)
        squares *= squares
        variance = squares.mean(0)
        squares *= squares
        fourth = squares.mean(0)
        kurtosis = np.divide(fourth, variance**2, out=np.full(len(variance), 3.0), where=variance > 0)
        return cls(wide if means is firsts else widened(means), wide, np.maximum(kurtosis, 1.2), varies, n)


def _kept(part: Floats, varies: npt.NDArray[np.bool_]) -> Floats:
    """Pick the targets that vary, without a copy where all do."""
    return part if varies.all() else part[:, varies]


def _components(standardised: Floats, seed: int) -> Floats:
    """Find the directions in which the pooled models vary most, array of shape (n_components, n_targets)."""
    n_targets = standardised.shape[1]
    count = min(N_COMPONENTS, n_targets - 1, len(standardised) - 1)
    if count < 1:
        return np.zeros((0, n_targets))
    centered = standardised - standardised.mean(0)
    if n_targets <= _EXACT_TARGETS:
        vectors = eigen(centered.T @ centered)[1]
        return np.asarray(vectors[:, : -count - 1 : -1].T, np.float64)
    from sklearn.utils.extmath import randomized_svd  # slow to import

    _, _, directions = randomized_svd(centered, n_components=count, n_iter=3, random_state=seed)
    return np.asarray(directions, np.float64)


def eigen(matrix: Floats) -> tuple[Floats, Floats]:
    """Decompose a symmetric matrix of up to some thousand rows, eigenvalues rising.

    In one thread: on a busy machine those of a small decomposition wait for each other far longer than they work.
    """
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    with threadpool_limits(1, user_api="blas"):
        values, vectors = np.linalg.eigh(matrix)
    return values, vectors


def eigenvalues(matrix: Floats) -> Floats:
    """Return the eigenvalues alone, rising, in a third of the time; likewise in one thread."""
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    with threadpool_limits(1, user_api="blas"):
        values = np.linalg.eigvalsh(matrix)
    return np.asarray(values, np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class ColumnMoments:
    """Differences of means and spreads of each column, with standard errors."""

    shift: Floats
    shift_error: Floats
    log_ratio: Floats
    log_ratio_error: Floats

    @classmethod
    def of(cls, columns: Columns) -> "ColumnMoments":
        """Compare means and spreads of every column."""
        labels = np.zeros((1, len(columns.firsts)), np.float32)
        labels[0, : columns.n_ours] = 1
        return cls(*(part[0] for part in _differences(columns, labels, _sums(columns))))


def _sums(columns: Columns) -> list[tuple[npt.NDArray[np.float32], Floats]]:
    """Prepare what permutations add up: values and squares, with their totals."""
    parts = [columns.firsts, columns.firsts**2]
    if columns.means is not columns.firsts:
        parts += [columns.means, columns.means**2]
    return [(part, part.sum(0, dtype=np.float64)) for part in parts]


def _differences(
    columns: Columns, labels: npt.NDArray[np.float32], sums: list[tuple[npt.NDArray[np.float32], Floats]]
) -> tuple[Floats, Floats, Floats, Floats]:
    """Compute shift, log ratio of spreads and their errors for each row of labels, 1 where a model is one of ours."""
    n, total = columns.n_ours, len(columns.firsts)
    m = total - n
    added = [(labels @ part).astype(np.float64) for part, _ in sums]
    others = [of_all - part for part, (_, of_all) in zip(added, sums, strict=True)]

    def variance(value: Floats, square: Floats, count: int) -> Floats:
        return np.maximum(square - value**2 / count, 0) / (count - 1)

    ours, theirs = variance(added[0], added[1], n), variance(others[0], others[1], m)
    mean, other_mean = added[-2] / n, others[-2] / m
    if len(sums) == 2:
        error = ours / n + theirs / m
    else:
        error = variance(added[2], added[3], n) / n + variance(others[2], others[3], m) / m
    tiny = 1e-12
    log_ratio = 0.5 * np.log((ours + tiny) / (theirs + tiny))
    log_error = np.sqrt((columns.kurtosis - 1) / 4 * (1 / n + 1 / m))
    return mean - other_mean, np.sqrt(error + tiny), log_ratio, np.broadcast_to(log_error, log_ratio.shape)


def critical_value(largest: Floats, share: float, n_statistics: int) -> float:
    """Find what the largest of all statistics exceeds with this probability if the ensembles are alike.

    Without permutations it is Bonferroni's bound, which holds under any dependence but trusts the normal tail.
    """
    from scipy.stats import norm  # slow to import

    rank = math.ceil((1 - share) * (len(largest) + 1))  # the ensembles as they are count as one permutation more
    if rank > len(largest):  # too few permutations, or none, for so small a share
        return max(float(norm.isf(share / (2 * n_statistics))), float(largest.max(initial=0.0)))
    return float(np.sort(largest)[rank - 1])


def permuted(columns: Columns, n_permutations: int, rng: np.random.Generator) -> Floats:
    """Return the largest statistic of each permutation of models; empty where that would take too long."""
    total, n = columns.firsts.shape
    sums = _sums(columns)
    if n_permutations < 1 or n_permutations * total * n * len(sums) * 2 > _MOST_WORK:
        return np.zeros(0)
    largest = []
    step = max(1, min(256, int(2e7 // n)))
    for start in range(0, n_permutations, step):
        count = min(step, n_permutations - start)
        labels = _least(rng.random((count, total), np.float32), columns.n_ours)
        shift, error, ratio, ratio_error = _differences(columns, labels, sums)
        largest.append(np.maximum(np.abs(shift / error).max(1), np.abs(ratio / ratio_error).max(1)))
    return np.concatenate(largest)


def _least(numbers: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.float32]:
    """Mark the `count` least numbers of each row by 1, all others by 0; of equal ones any."""
    # ordering values is several times as fast as ordering places
    edge = np.partition(numbers, count - 1, axis=1)[:, count - 1 : count]
    labels = (numbers <= edge).astype(np.float32)
    for row in np.flatnonzero(labels.sum(axis=1) != count):
        labels[row] = 0
        labels[row, np.argpartition(numbers[row], count - 1)[:count]] = 1
    return labels


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """Distances between distribution functions: the largest of each target, and the mean square of all."""

    distance: Floats
    square: float

    @classmethod
    def of(cls, sample: Sample) -> "Shape":
        """Compare the distributions of every target."""
        n, total = sample.n_ours, len(sample.firsts)
        weights = np.where(np.arange(total) < n, 1 / n, -1 / sample.n_theirs).astype(np.float32)
        distance, square = np.zeros(sample.n_targets), 0.0
        for start in range(0, sample.n_targets, _BLOCK_TARGETS):
            part = slice(start, start + _BLOCK_TARGETS)
            values = np.ascontiguousarray(sample.firsts[:, part].T)  # numbers of a target next to each other
            order = values.argsort(axis=1)
            ordered = np.take_along_axis(values, order, axis=1)
            # equal values are one step of a distribution function, at which all of them count
            is_last = np.ones(ordered.shape, np.bool_)
            np.not_equal(ordered[:, 1:], ordered[:, :-1], out=is_last[:, :-1])
            apart = np.cumsum(weights[order], axis=1) * is_last
            distance[part] = np.maximum(apart.max(axis=1), -apart.min(axis=1))
            square += float((np.einsum("ij,ij->i", apart, apart) / is_last.sum(axis=1)).sum())
        return cls(distance, square / sample.n_targets)


def ks_critical(sample: Sample, share: float) -> float:
    """Bound the largest Kolmogorov-Smirnov distance of equal distributions: Bonferroni's over targets."""
    n, m = sample.n_ours, sample.n_theirs
    return math.sqrt(math.log(2 * sample.n_targets / share) / 2 * (n + m) / (n * m))
