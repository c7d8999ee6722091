"""Where the error of datamodels comes from: chance of training, too few models, and what is not linear.

The output of a model on a subset is f(subset) + chance, and f is its best linear datamodel plus a rest that has nothing
to do with any single example. A fit misses all three, and their mean squares add up:

    MSE = noise + nonlinear + estimation.

- noise: the variance of one subset's retrainings, from the held-out models;
- noise + nonlinear: the variance of outputs less what the best linear datamodel would explain, from `LinearLimit`;
- estimation: the rest, which more models take away.

With these parts of the variance V, a prediction as good as can be with what it knows correlates with averages of R
retrainings by sqrt(1 - (nonlinear + estimation + noise / R) / (V - noise + noise / R)). LDS is a rank correlation, so
that what it would be without a part is told from the LDS found, times the ratio of this with the part left out to this
as it is.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np

from dmpipeline.fitting.limits import LinearLimit
from dmpipeline.scoring.correlation import Floats
from dmpipeline.scoring.retrainings import Retrainings
from dmpipeline.tables import number, number_or_none

ENOUGH = 0.02
"""An LDS this little below what could be reached is as good as that."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its interval; nan where it is not known."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, drawn: Floats, level: float) -> "Estimate":
        """Take the value, which is the first, and an interval about it from the spread of the others."""
        value, draws = float(drawn[0]), drawn[1:]
        low, high = np.quantile(draws - draws.mean(), [(1 - level) / 2, (1 + level) / 2])
        return cls(value, value + float(low), value + float(high))

    def as_dict(self) -> dict[str, float | None]:
        """Return value, low and high, ready for JSON."""
        return {name: number_or_none(getattr(self, name)) for name in _ENDS}


@dataclass(frozen=True, slots=True)
class Shares:
    """The parts as shares of each target's variance, averaged over targets, and the mean of 1 / R over subsets.

    Where subsets were trained once, chance counts as nonlinear and `noise` is 0, which correlates alike.
    """

    noise: Any  # floats, or arrays of draws
    estimation: Any
    nonlinear: Any
    inverse_retrainings: float

    def correlation(self) -> Any:
        """Return what the best prediction of these errors correlates with averages of R retrainings."""
        of_averages = self.noise * self.inverse_retrainings
        missed = self.nonlinear + self.estimation + of_averages
        explained = 1 - missed / np.maximum(1 - self.noise + of_averages, _LEAST)
        return np.sqrt(np.clip(explained, 0, 1))


@dataclass(frozen=True, slots=True)
class Decomposition:
    """The mean squared error on held-out models in three parts, and the LDS that would be reached without each.

    All are averages over the targets that vary. Parts are estimated without bias and add up to the `mse` of the
    evaluation; chance may carry one below 0.

    Attributes
    ----------
    noise : Estimate
        Chance of training, in squared units of the output; nan where subsets were trained once.
    estimation : Estimate
        Of too few models. Of the linear part, where there are pair terms.
    nonlinear : Estimate
        What no linear datamodel can say, less what pair terms say of it; nan where `noise` is.
    variance : float
        Of the outputs of single models.
    lds : float
        As it is, against averages of R retrainings.
    lds_without_noise, lds_without_estimation, lds_without_nonlinear : Estimate
        Against averages of endlessly many retrainings; with endlessly many models to fit on; and if outputs were linear
        in the masks, with as many models as now. nan where the part is.
    shares : Shares
        What the LDS were told from.
    has_pairs : bool
    """

    noise: Estimate
    estimation: Estimate
    nonlinear: Estimate
    variance: float
    lds: float
    lds_without_noise: Estimate
    lds_without_estimation: Estimate
    lds_without_nonlinear: Estimate
    shares: Shares
    has_pairs: bool

    def lds_with(self, estimation: float) -> float:
        """Return the LDS if too few models cost this share of the variance; nan where the LDS found is too low."""
        now = self.shares.correlation()
        return (
            float(self.lds * replace(self.shares, estimation=estimation).correlation() / now) if now > 0 else math.nan
        )

    def estimation_of(self, target_mse: Floats, limit: LinearLimit) -> float:
        """Return what of other linear errors, (n_targets,), is of too few models, as a share of the variance."""
        known = np.isfinite(target_mse) & (limit.variance > 0)
        mse = (target_mse[known] / limit.variance[known]).mean()
        return float(mse - self.shares.noise - self.shares.nonlinear)

    @property
    def advice(self) -> str:
        """One sentence: train more models, use pairs, or stop."""
        more, linear = self.lds_without_estimation, self.lds_without_nonlinear
        if math.isnan(more.value):
            return f"{TRAIN_MORE}: these are too few to tell where the error comes from"
        by_models, by_terms = more.value - self.lds, linear.value - self.lds
        reached = f"LDS is {self.lds:.3f}, and with endlessly many models would be {_of(more)}"
        if more.high - more.low > _VAGUE:
            return f"hold out more subsets, for these are too few to tell: {reached}"
        if self.has_pairs or math.isnan(by_terms):
            by_terms = 0.0
        if max(by_models, by_terms) < ENOUGH:
            return f"stop: {reached}"
        # pairs are found by models too: what they bring comes when most of what models bring has come
        if by_models >= by_terms / 2:
            return f"{TRAIN_MORE}: {reached}"
        return f"{USE_PAIRS}: {reached}; without what is not linear it would be {_of(linear)}"

    def as_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON: parts and LDS as {"value", "low", "high"}, and the advice."""
        found: dict[str, Any] = {name: getattr(self, name).as_dict() for name in _ESTIMATES}
        found |= {name: number_or_none(getattr(self, name)) for name in ("variance", "lds")}
        shares = {name: number_or_none(share) for name, share in asdict(self.shares).items()}
        return found | {"shares": shares, "has_pairs": self.has_pairs, "advice": self.advice}

    def in_words(self) -> list[tuple[tuple[str, str], str]]:
        """Describe the parts for people, a line each: what it is, its size and share of all, and the LDS without it."""
        total = sum(getattr(self, name).value for name in PARTS)
        lines = []
        for name, words in PARTS.items():
            part, lds = getattr(self, name), getattr(self, f"lds_without_{name}")
            if math.isnan(part.value):
                lines.append(((f"  {words}", "not known"), "needs subsets that were trained more than once"))
                continue
            share = "" if math.isnan(total) else f"{part.value / total:.0%} of it; "
            interval = f"{share}interval {part.low:.3g} to {part.high:.3g}"
            lines.append(((f"  {words}", f"{part.value:.3g}"), f"{interval}; without it LDS would be {_of(lds)}"))
        return lines

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Take what `as_dict` returned; TypeError or KeyError for anything else."""
        estimates = {name: Estimate(*(number(data[name][end]) for end in _ENDS)) for name in _ESTIMATES}
        shares = Shares(**{name: number(share) for name, share in data["shares"].items()})
        return cls(
            variance=number(data["variance"]),
            lds=number(data["lds"]),
            shares=shares,
            has_pairs=bool(data["has_pairs"]),
            **estimates,
        )


@dataclass(frozen=True, slots=True)
class ErrorLaw:
    """How the error of too few models falls with their number: scale n^-exponent, as a share of the variance.

    It is fitted to all points of a curve but the last, and what it foresees for that is compared with what was found.

    Attributes
    ----------
    scale, exponent : float
    n_models : int
        Of the point that was held back.
    foreseen, found : float
        Its estimation error.
    """

    scale: float
    exponent: float
    n_models: int
    foreseen: float
    found: float

    @classmethod
    def of(cls, counts: Sequence[int], estimation: Sequence[float]) -> "ErrorLaw | None":
        """Fit it by least squares of logarithms; None where fewer than `LEAST_POINTS` points have an error above 0."""
        n, error = np.array(counts, np.float64), np.array(estimation)
        is_told = error[:-1] > 0
        if is_told.sum() < LEAST_POINTS:
            return None
        slope, level = np.polyfit(np.log(n[:-1][is_told]), np.log(error[:-1][is_told]), 1)
        foreseen = float(np.exp(level + slope * np.log(n[-1])))
        return cls(float(np.exp(level)), -float(slope), int(n[-1]), foreseen, float(error[-1]))

    @property
    def holds(self) -> bool:
        """Whether it falls, and what it foresaw is within a quarter of what was found."""
        return self.exponent > 0 and abs(self.foreseen - self.found) <= 0.25 * self.found

    def estimation(self, n_models: float) -> float:
        """Return the error of this many models, from the point held back on by the law's exponent."""
        return float(self.found * (n_models / self.n_models) ** -self.exponent)

    def in_words(self) -> str:
        """Say the law, and how well it foresaw."""
        tested = (
            f"of {self.n_models:,} models it foresees {self.foreseen:.1%} of the variance, found were {self.found:.1%}"
        )
        verdict = "" if self.holds else "; it does not hold here"
        return f"the error of too few models falls as models^-{self.exponent:.2f}: {tested}{verdict}"

    def as_dict(self) -> dict[str, float | bool]:
        """Return everything, ready for JSON."""
        return asdict(self) | {"holds": self.holds}

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Take what `as_dict` returned; TypeError or KeyError for anything else."""
        numbers = {name: number(data[name]) for name in ("scale", "exponent", "foreseen", "found")}
        return cls(n_models=int(number(data["n_models"])), **numbers)


LEAST_POINTS = 3
"""Points that a law is fitted to at least; one more is held back to test it."""

TRAIN_MORE, USE_PAIRS = "train more models", "use pairs"
"""How two of the sentences of advice begin."""

PARTS = {"noise": "chance of training", "estimation": "too few models", "nonlinear": "not linear"}
"""Of the mean squared error: attributes of `Decomposition`, and how people call them."""

_ESTIMATES = (*PARTS, *(f"lds_without_{part}" for part in PARTS))
_ENDS = ("value", "low", "high")


def decompose(
    limit: LinearLimit,
    predicted: Floats,
    linear: Floats | None,
    truth: Retrainings,
    *,
    lds: float,
    lds_interval: tuple[float, float],
    n_draws: int,
    level: float,
    seed: int,
) -> Decomposition | None:
    """Take the error on held-out models apart; None where nothing varies or the limit is not known.

    Parameters
    ----------
    limit : LinearLimit
        Of the models that were fitted on.
    predicted : array of float, shape (n_subsets, n_targets)
        By the datamodels.
    linear : array of float, shape (n_subsets, n_targets), or None
        By their linear part alone, if they have another.
    truth : Retrainings
        What they were to predict.
    lds, lds_interval
        Of the predictions, as `Evaluation` has them.
    n_draws : int
        Resamples of the subsets, each with a draw of the limit by its standard error, that intervals are taken from.
    """
    averages = truth.averages()
    varies = (averages != averages[0]).any(axis=0) & (limit.variance > 0) & np.isfinite(limit.linear)
    if not varies.any() or n_draws < 2:
        return None
    error = truth.mean_squares(predicted)[:, varies]
    of_linear = error if linear is None else truth.mean_squares(linear)[:, varies]
    within = truth.variances()
    is_known = within is not None
    within = np.zeros_like(error) if within is None else within[:, varies]
    alike = _Alike.of(truth.outputs[:, varies])
    rng = np.random.default_rng([seed, 3])
    n_subsets = len(truth.sizes)
    resampled = rng.multinomial(n_subsets, np.full(n_subsets, 1 / n_subsets), size=n_draws) / n_subsets
    weights = np.vstack([np.full(n_subsets, 1 / n_subsets), resampled]) * truth.sizes  # first the estimate itself
    weights /= weights.sum(axis=1, keepdims=True)
    chance = np.concatenate([[0], rng.standard_normal(n_draws)])

    def parts(unit: Floats) -> tuple[Floats, Floats, Floats]:
        """Average the parts over targets in units of theirs, (n_targets,); the estimate, and then the draws."""
        left = limit.left[varies] / unit
        drawn = left.mean() + alike.error_of_mean(limit.error[varies] / unit) * chance
        mse, of_its_linear, noise = (weights @ (of / unit).mean(axis=1) for of in (error, of_linear, within))
        estimation = of_its_linear - drawn
        return noise, estimation, mse - noise - estimation

    in_squares = [Estimate.of(part, level) for part in parts(np.ones(int(varies.sum())))]
    noise, estimation, nonlinear = parts(limit.variance[varies])
    inverse = float((1 / np.array(truth.sizes)).mean())
    drawn = Shares(noise, estimation, nonlinear, inverse)
    now = drawn.correlation()
    spread = (lds_interval[1] - lds_interval[0]) / 2

    def lds_without(is_told: bool, **changed: Any) -> Estimate:
        if not is_told or now[0] < _BLIND:
            return UNKNOWN
        factor = Estimate.of(replace(drawn, **changed).correlation() / np.maximum(now, _BLIND), level)
        value = min(lds * factor.value, 1.0)
        low, high = (math.hypot(lds * (factor.value - end), spread) for end in (factor.low, factor.high))
        return Estimate(value, value - low, min(value + high, 1.0))

    return Decomposition(
        noise=in_squares[0] if is_known else UNKNOWN,
        estimation=in_squares[1],
        nonlinear=in_squares[2] if is_known else UNKNOWN,
        variance=float(limit.variance[varies].mean()),
        lds=lds,
        lds_without_noise=lds_without(is_known, inverse_retrainings=0.0),
        lds_without_estimation=lds_without(True, estimation=0.0),
        lds_without_nonlinear=lds_without(is_known, nonlinear=0.0),
        shares=Shares(float(noise[0]), float(estimation[0]), float(nonlinear[0]), inverse),
        has_pairs=linear is not None,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Alike:
    """How alike targets are over models, by which what is wrong of one is wrong of others too."""

    scaled: Floats  # (n_models, n_targets): outputs of mean 0 and mean square 1

    @classmethod
    def of(cls, outputs: Floats) -> "_Alike":
        centred = outputs - outputs.mean(axis=0)
        return cls(centred / np.sqrt((centred**2).mean(axis=0)))

    def error_of_mean(self, error: Floats) -> float:
        """Return the standard error of a mean over targets, from each one's.

        Estimates of second moments of two targets correlate as the square of their outputs' correlation r: the variance
        is the sum of e_t e_u r_tu^2 over targets t and u, here as a Frobenius norm over models.
        """
        among_models = (self.scaled * error) @ self.scaled.T / len(self.scaled)
        return float(np.linalg.norm(among_models)) / len(error)


UNKNOWN = Estimate(math.nan, math.nan, math.nan)

_LEAST = 1e-12
_VAGUE = 0.25
"""An interval of the LDS this wide says nothing."""
_BLIND = 0.1
"""What correlates less with the truth is too little to tell another correlation from."""


def _of(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "not known"
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"
