"""Whether two ensembles were trained alike, by statistics on their outputs: arrays in, findings out.

Climate models are accepted on a new machine in this way (PyCECT, Baker et al. 2015, doi:10.5194/gmd-8-2829-2015): the
outputs of the new ensemble, and its scores in principal components, are held against the spread of the accepted one.
Three rules keep the verdict honest:

- the outputs of one model on different targets depend on each other, so whole *models* are permuted between the
  ensembles, and the largest statistic over all targets is held against the largest under permutation (Westfall and
  Young 1993);
- a difference counts only where its simultaneous interval lies wholly beyond a margin that is stated: what is detected
  within the margin is reported, and is no fault;
- agreement is never a large p-value: it is claimed where upper bounds of aggregates lie within the margin, which are
  two one-sided tests (Schuirmann 1987).

Effects on a target are in standard deviations of its output over models.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dmpipeline.checks.findings import Finding, VerdictName
from dmpipeline.checks.samples import LEAST_MODELS as LEAST_MODELS  # where it is known from
from dmpipeline.checks.samples import (
    ColumnMoments,
    Columns,
    Floats,
    Sample,
    Shape,
    critical_value,
    eigenvalues,
    ks_critical,
    permuted,
)
from dmpipeline.errors import SpecError

_N_PERMUTATIONS = 999
_SHARES = {"moments": 0.6, "shape": 0.2, "aggregates": 0.2}
# How the error is split over what can be called different.
_N_DRAWS = 40_000
_N_DIRECTIONS = 16  # of the noise that are drawn one by one; the others together are nearly normal
_BRIDGE_TERMS = 8
_SAMPLE_TARGETS = 1000  # whose correlations stand for those of all


@dataclass(frozen=True, slots=True, eq=False)
class Agreement:
    """How the outputs of two ensembles compare.

    Attributes
    ----------
    verdict : {"agrees", "differs", "undecided"}
    findings : tuple of Finding
        Of level "statistics": location, spread, shape, components; then the aggregates rms_shift, rms_spread and
        rms_shape, by which agreement is claimed.
    n_ours, n_theirs : int
        Independent subsets that were compared.
    shift, shift_error : array of float64, shape (n_targets,)
        Mean of ours less that of the reference, and its standard error, in standard deviations of the target.
    log_ratio, log_ratio_error : array of float64, shape (n_targets,)
        Logarithm of our standard deviation over the reference's, and its standard error.
    distance : array of float64, shape (n_targets,)
        Kolmogorov-Smirnov distance of the two distributions.
    is_detected : array of bool, shape (n_targets,)
        Where there surely is a difference, within the margin or beyond it.
    factor : float or None
        How many times as much data would decide, if differences are as large as they seem; 1 where decided, None
        where a difference seems to lie at the margin itself.
    """

    verdict: VerdictName
    findings: tuple[Finding, ...]
    n_ours: int
    n_theirs: int
    shift: Floats
    shift_error: Floats
    log_ratio: Floats
    log_ratio_error: Floats
    distance: Floats
    is_detected: npt.NDArray[np.bool_]
    factor: float | None


def compare_outputs(
    ours: npt.ArrayLike,
    theirs: npt.ArrayLike,
    our_groups: npt.ArrayLike | None = None,
    their_groups: npt.ArrayLike | None = None,
    *,
    margin: float = 0.1,
    level: float = 0.05,
    n_permutations: int = _N_PERMUTATIONS,
    numbers: npt.ArrayLike | None = None,
    seed: int = 0,
) -> Agreement:
    """Compare the outputs of two ensembles of models on the same targets.

    Parameters
    ----------
    ours : array of float, shape (n_models, n_targets)
    theirs : array of float, shape (m_models, n_targets)
        The reference.
    our_groups, their_groups : array, shape (n_models,) and (m_models,), optional
        Which subset each model was trained on, by any numbers. Retrainings of a subset depend on each other: they are
        averaged for means, and the first of them stands for spread and shape. By default each model has its own.
    margin : float
        Differences up to this many standard deviations, or up to this logarithm of a ratio of standard deviations,
        count as none; for distributions, what a shift of that size makes of a normal one.
    level : float
        Probability of calling equal ensembles different, at most, and different ones equal. The first is split over
        all statistics.
    n_permutations : int
        Of models between the ensembles.
    numbers : array of int, shape (n_targets,), optional
        What findings call the targets, where these are a part of all.
    seed : int

    Returns
    -------
    agreement : Agreement

    Raises
    ------
    SpecError
        If shapes do not fit, numbers are not finite, there are fewer than `LEAST_MODELS` subsets on either side, or
        `margin` or `level` cannot be used.
    """
    sample = Sample.of(ours, theirs, our_groups, their_groups, numbers)
    if not margin > 0:
        raise SpecError(f"margin {margin} leaves nothing that agrees; choose more than 0, as 0.1", field="margin")
    if not 0 < level < 0.5:
        raise SpecError(f"level {level} is not an error that may be made; choose between 0 and 0.5", field="level")
    rng = np.random.default_rng(seed)
    columns = Columns.of(sample, seed)
    moments = ColumnMoments.of(columns)
    null = permuted(columns, n_permutations, rng)
    critical = critical_value(null, level * _SHARES["moments"], 2 * columns.n)
    shape = Shape.of(sample)
    shape_critical = ks_critical(sample, level * _SHARES["shape"])
    bounds = _aggregates(sample, columns, moments, shape, level)
    findings = (
        _of_targets("location", moments.shift, moments.shift_error, critical, margin, sample),
        _of_targets("spread", moments.log_ratio, moments.log_ratio_error, critical, margin, sample),
        _of_shape(shape.distance, shape_critical, shape_margin(margin), sample),
        _of_components(moments, critical, margin, sample),
        *(bound.finding(margin, sample.n_theirs) for bound in bounds),
    )
    verdict: VerdictName = "undecided"
    if not all(finding.passed for finding in findings):
        verdict = "differs"
    elif all(bound.is_within(bound.margin(margin)) for bound in bounds):
        verdict = "agrees"
    t = sample.n_targets
    is_detected = (np.abs(moments.shift) > critical * moments.shift_error)[:t]
    is_detected |= (np.abs(moments.log_ratio) > critical * moments.log_ratio_error)[:t]
    return Agreement(
        verdict=verdict,
        findings=findings,
        n_ours=sample.n_ours,
        n_theirs=sample.n_theirs,
        shift=moments.shift[:t],
        shift_error=moments.shift_error[:t],
        log_ratio=moments.log_ratio[:t],
        log_ratio_error=moments.log_ratio_error[:t],
        distance=shape.distance,
        is_detected=is_detected | (shape.distance > shape_critical),
        factor=1.0 if verdict != "undecided" else _factor(bounds, margin),
    )


def shape_margin(margin: float) -> float:
    """Return the Kolmogorov-Smirnov distance that a shift by `margin` standard deviations makes of a normal law."""
    return math.erf(margin / (2 * math.sqrt(2)))


def rms_shape_margin(margin: float) -> float:
    """Return the root mean square of the same difference between distribution functions, over the law itself.

    For a small shift it is the shift times the square root of the integral of the density cubed, 1 / (2 pi sqrt(3)).
    """
    return margin / math.sqrt(2 * math.pi * math.sqrt(3))


@dataclass(frozen=True, slots=True, eq=False)
class _Bound:
    """A mean square over targets, and what bounds the one without noise from both sides.

    The noise is a sum of independent normal parts along principal directions of the targets. Of all differences of a
    size the one along the first direction is the hardest to tell from noise, and bounds are those of that one: what the
    mean square is with it is drawn, a sum of weighted chi-squares one of which is not central.

    Attributes
    ----------
    check : str
    square : float
        As observed, noise included.
    weights : array of float64
        Expected square of each part of the noise, the largest first.
    noise : tuple of array of float64, each of shape (n_draws,)
        Draws of the part along the first direction, and of the squares of all others.
    share_high, share_low : float
        Probability that may be spent on calling a difference, and on claiming agreement.
    """

    check: str
    square: float
    weights: Floats
    noise: tuple[Floats, Floats]
    share_high: float
    share_low: float

    @classmethod
    def of(cls, check: str, square: float, weights: Floats, *, share_high: float, share_low: float) -> "_Bound":
        """Draw the noise of these weights."""
        draws = _normal_draws()
        top, rest = weights[:_N_DIRECTIONS], weights[_N_DIRECTIONS:]
        others = draws[:, 1 : len(top)] ** 2 @ top[1:] + rest.sum()
        others = others + math.sqrt(2 * float((rest**2).sum())) * draws[:, -1]
        noise = (math.sqrt(float(top[0])) * draws[:, 0], np.maximum(others, 0))
        return cls(check, square, weights, noise, share_high, share_low)

    def margin(self, margin: float) -> float:
        return rms_shape_margin(margin) if self.check == "rms_shape" else margin

    @property
    def estimate(self) -> float:
        """The root mean square without noise, as far as noise can be taken off."""
        return math.sqrt(max(0.0, self.square - float(self.weights.sum())))

    def is_within(self, size: float, factor: float = 1.0) -> bool:
        """Whether a difference of this size would surely show in more; with `factor` times as much data."""
        # less than is expected of noise alone is taken for that, lest luck counts as agreement
        observed = max(self._expected(factor), float(self.weights.sum()) / factor)
        return self._below(size, observed, factor) < self.share_low

    def is_beyond(self, size: float, factor: float = 1.0) -> bool:
        """Whether a difference of this size would surely show in less, likewise."""
        return 1 - self._below(size, self._expected(factor), factor) < self.share_high

    def upper(self) -> float:
        """Bound from above."""
        return self._edge(lambda size: not self.is_within(size))

    def lower(self) -> float:
        """Bound from below."""
        return self._edge(self.is_beyond)

    def _edge(self, is_inside: Callable[[float], bool]) -> float:
        low, high = 0.0, math.sqrt(self.square) + 10 * math.sqrt(float(self.weights.sum()))
        if not is_inside(low):
            return low
        for _ in range(25):
            middle = (low + high) / 2
            low, high = (middle, high) if is_inside(middle) else (low, middle)
        return high

    def _expected(self, factor: float) -> float:
        """Foresee what would be observed, if the difference is what it seems."""
        return self.square - float(self.weights.sum()) * (1 - 1 / factor)

    def _below(self, size: float, observed: float, factor: float) -> float:
        """Compute the probability of observing at most this where there is a difference of a size."""
        first, others = self.noise
        return float(((size + first / math.sqrt(factor)) ** 2 + others / factor <= observed).mean())

    def finding(self, margin: float, n_theirs: int) -> Finding:
        own = self.margin(margin)
        low, high = self.lower(), self.upper()
        what = _AGGREGATES[self.check]
        told = f"{what} is {self.estimate:.3g}, and at most {high:.3g}"
        if self.is_beyond(own):
            told = f"{what} is {self.estimate:.3g}, and at least {low:.3g}: beyond the margin of {own:.3g}"
        elif self.is_within(own):
            told += f": within the margin of {own:.3g}"
        else:
            told += f": more models would show whether it is within the margin of {own:.3g}"
        return _finding(self.check, not self.is_beyond(own), told, (self.estimate, low, high), own, n_theirs)


@functools.cache
def _normal_draws() -> Floats:
    return np.random.default_rng(0).standard_normal((_N_DRAWS, _N_DIRECTIONS + 1))


_AGGREGATES = {
    "rms_shift": "the root mean square shift over targets, in standard deviations, noise taken off,",
    "rms_spread": "the root mean square log ratio of standard deviations over targets, noise taken off,",
    "rms_shape": "the root mean square difference of distribution functions, noise taken off,",
}


def _aggregates(
    sample: Sample, columns: Columns, moments: ColumnMoments, shape: Shape, level: float
) -> tuple[_Bound, ...]:
    t, n = sample.n_targets, sample.n_ours
    share = level * _SHARES["aggregates"] / len(_AGGREGATES)
    values = np.asarray(columns.firsts[:, :t], np.float64)
    values = np.concatenate([values[:n] - values[:n].mean(0), values[n:] - values[n:].mean(0)])
    alike = _correlations(values)
    bounds = [
        _Bound.of(check, float((difference**2).mean()), _noise_weights(of, error), share_high=share, share_low=level)
        for check, difference, error, of in (
            ("rms_shift", moments.shift[:t], moments.shift_error[:t], alike),
            ("rms_spread", moments.log_ratio[:t], moments.log_ratio_error[:t], _correlations(values**2)),
        )
    ]
    # a difference of empirical distribution functions is a Brownian bridge, whose squares have weights 1 / (pi k)^2
    error = np.full(t, math.sqrt(1 / n + 1 / sample.n_theirs))
    bridge = 1 / (math.pi * np.arange(1, _BRIDGE_TERMS + 1)) ** 2
    bridge[-1] += 1 / 6 - bridge.sum()
    weights = np.outer(_noise_weights(alike, error), bridge).ravel()
    weights = np.sort(weights)[::-1]
    bounds.append(_Bound.of("rms_shape", shape.square, weights, share_high=share, share_low=level))
    return tuple(bounds)


def _sampled(n_targets: int) -> npt.NDArray[np.intp]:
    """Choose the targets whose correlations stand for those of all."""
    return np.linspace(0, n_targets - 1, min(n_targets, _SAMPLE_TARGETS)).astype(np.intp)


def _correlations(values: Floats) -> Floats:
    """Correlate sampled targets of values, shape (n_models, n_targets); a target that never varies with none."""
    picked = _sampled(values.shape[1])
    values = values if len(picked) == values.shape[1] else values[:, picked]
    centered = values - values.mean(axis=0)
    covariance = centered.T @ centered / len(centered)
    deviation = np.sqrt(np.diagonal(covariance))
    unit = np.where(deviation > 0, deviation, 1)
    return np.asarray(covariance / np.outer(unit, unit))


def _noise_weights(correlations: Floats, error: Floats) -> Floats:
    """Decompose the noise of a mean square over targets, by how values correlate; the weights add up to the whole.

    Parameters
    ----------
    correlations : array of float64, shape (n_sampled, n_sampled)
        Of the sampled targets.
    error : array of float64, shape (n_targets,)
        Standard error of each target's difference.
    """
    error = error[_sampled(len(error))]
    weights = np.maximum(eigenvalues(correlations * np.outer(error, error))[::-1], 0) / len(error)
    total = float((error**2).mean())
    return np.asarray(weights + max(0.0, total - float(weights.sum())) / len(weights))


def _factor(bounds: tuple[_Bound, ...], margin: float) -> float | None:
    """Find with how many times as much data the verdict would no longer be open, if differences are as they seem."""
    factor = 1.0
    while factor < 1e4:
        factor *= 1.1
        if any(bound.is_beyond(bound.margin(margin), factor) for bound in bounds):
            return factor
        if all(bound.is_within(bound.margin(margin), factor) for bound in bounds):
            return factor
    return None


_KINDS = {
    "location": ("mean", "mean output differs by {:+.3g} standard deviations ({:+.3g} to {:+.3g})"),
    "spread": ("standard deviation", "log ratio of standard deviations is {:+.3g} ({:+.3g} to {:+.3g})"),
}


def _of_targets(check: str, effects: Floats, errors: Floats, critical: float, margin: float, sample: Sample) -> Finding:
    """Describe the largest difference of any target, and whether it lies beyond the margin."""
    t = sample.n_targets
    effects, half = effects[:t], critical * errors[:t]
    # the one that is furthest beyond; where none is, the one that is most surely there
    worst = int((np.abs(effects) - half).argmax())
    interval = _interval(effects[worst], half[worst])
    name, words = _KINDS[check]
    said = f"of target {sample.numbers[worst]} the {words.format(*interval)}"
    return _found(check, name, np.abs(effects) - half, interval, said, margin, sample)


def _of_shape(distance: Floats, critical: float, margin: float, sample: Sample) -> Finding:
    worst = int(distance.argmax())
    effect = float(distance[worst])
    interval = (effect, max(0.0, effect - critical), min(1.0, effect + critical))
    words = "Kolmogorov-Smirnov distance is {:.3g} ({:.3g} to {:.3g})".format(*interval)
    said = f"of target {sample.numbers[worst]} the {words}"
    return _found("shape", "distribution", distance - critical, interval, said, margin, sample)


def _found(
    check: str,
    name: str,
    surely: Floats,
    interval: tuple[float, float, float],
    said: str,
    margin: float,
    sample: Sample,
) -> Finding:
    """Say of how many targets a difference is sure, by the least size it has: beyond the margin, or within it."""
    beyond, detected = surely > margin, surely > 0
    if beyond.any():
        told = f"the {name} of {_counted(beyond)}{_where(beyond, sample)} is surely beyond the margin of {margin:.3g}"
    else:
        told = f"no target's {name} is surely beyond the margin of {margin:.3g}"
        if detected.any():
            told += f"; a smaller difference is sure of {_counted(detected)}{_where(detected, sample)}"
    return _finding(check, not beyond.any(), f"{told}; {said}", interval, margin, sample.n_theirs)


def _of_components(moments: ColumnMoments, critical: float, margin: float, sample: Sample) -> Finding:
    """Describe the ensembles as wholes: the average over targets, and scores in principal components."""
    t = sample.n_targets
    effects = np.concatenate([moments.shift[t:], moments.log_ratio[t:]])
    half = critical * np.concatenate([moments.shift_error[t:], moments.log_ratio_error[t:]])
    if not len(effects):
        return Finding(
            "components", passed=True, detail="outputs never vary", level="statistics", n_rows=sample.n_theirs
        )
    is_beyond = bool((np.abs(effects) - half > margin).any())
    worst = int((np.abs(effects) - half).argmax())
    nth, is_spread = worst % (len(effects) // 2), worst >= len(effects) // 2
    name = "average over targets" if nth == 0 else f"principal component {nth}"
    words = _KINDS["spread" if is_spread else "location"][1]
    interval = _interval(effects[worst], half[worst])
    said = f"of the {name} the {words.format(*interval)}"
    n_components = len(effects) // 2 - 1
    told = (
        f"surely beyond the margin of {margin:.3g}: {said}"
        if is_beyond
        else f"neither the average over targets nor any of {n_components} principal components is surely beyond the "
        f"margin of {margin:.3g}; {said}"
    )
    return _finding("components", not is_beyond, told, interval, margin, sample.n_theirs)


def _interval(effect: float, half: float) -> tuple[float, float, float]:
    return float(effect), float(effect - half), float(effect + half)


def _finding(
    check: str, passed: bool, detail: str, interval: tuple[float, float, float], margin: float, n_theirs: int
) -> Finding:
    effect, low, high = interval
    return Finding(
        check,
        passed=bool(passed),
        detail=detail,
        level="statistics",
        effect=effect,
        low=low,
        high=high,
        margin=margin,
        n_rows=n_theirs,
    )


def _counted(flags: npt.NDArray[np.bool_]) -> str:
    count = int(flags.sum())
    return f"{count:,} of {len(flags):,} targets" if count != 1 else f"one of {len(flags):,} targets"


def _where(flags: npt.NDArray[np.bool_], sample: Sample) -> str:
    places = sample.numbers[flags]
    more = f" and {len(places) - 5:,} more" if len(places) > 5 else ""
    return f" ({', '.join(map(str, places[:5]))}{more})"
