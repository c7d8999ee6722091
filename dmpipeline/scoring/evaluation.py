"""How well datamodels predict models they have not seen: held-out error, and LDS with its noise ceiling.

LDS is the Spearman correlation of predicted and true outputs over held-out subsets, averaged over targets. Training
is random, so the truth of a subset is the average of its R retrainings, and no prediction can reach a correlation of
1 with a noisy average: the ceiling is how far one can get. Intervals are over subsets, for they are what was drawn.

A target whose true output never varies has no correlation: it is nan, left out of the averages, and counted. A
datamodel that predicts the same for every subset, although the truth varies, counts as 0.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from dmdata.shown import Shown
from dmpipeline.errors import DataWarning, SpecError
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.moments.arrays import RowSliceable, as_rows, check_shapes, read_masks, read_outputs
from dmpipeline.moments.identity import keys_of_masks
from dmpipeline.moments.overlaps import Possible, repeats_beyond_chance, shared_beyond_chance
from dmpipeline.scoring.correlation import Floats, lds_interval, lds_of_targets, mean_of_known
from dmpipeline.scoring.decomposition import Decomposition, decompose
from dmpipeline.scoring.retrainings import LEAST_SUBSETS, Retrainings, adjacent_groups, groups_of
from dmpipeline.tables import number_or_none

_SCORES_BYTES = 2**26
"""A block of scores in float64 takes no more, unless a row does."""


class ScoreKeywords(TypedDict, total=False):
    """Settings of `evaluate` as keywords, for what passes them on."""

    n_retrainings: int | None
    n_bootstraps: int
    n_splits: int
    level: float
    seed: int


def check_keywords(scoring: ScoreKeywords, *, of: str) -> None:
    """Refuse keywords that `evaluate` does not have, before anything is read.

    Raises
    ------
    TypeError
        Naming the first, and the function `of` that was called.
    """
    if unknown := sorted(scoring.keys() - ScoreKeywords.__annotations__.keys()):
        raise TypeError(f"{of}() got an unexpected keyword argument {unknown[0]!r}")


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
    lds_linear : float or None
        `lds` of the linear part alone, where datamodels have pair terms.
    decomposition : Decomposition or None
        Where the error comes from; None for scores without units, and for datamodels whose `limit` is not known.
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
    lds_linear: float | None = None
    decomposition: Decomposition | None = None

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

    def as_dict(self) -> dict[str, Any]:
        """Return the scalars and the decomposition, ready for JSON: None stands for what is not defined."""
        names = ("lds", "lds_low", "lds_high", "lds_single", "lds_ceiling", "lds_ratio", "mse", "r2", "level")
        scores = {name: number_or_none(getattr(self, name)) for name in names}
        counts = {name: getattr(self, name) for name in ("n_subsets", "n_retrainings", "n_targets", "n_constant")}
        linear = {} if self.lds_linear is None else {"lds_linear": number_or_none(self.lds_linear)}
        parts = {} if self.decomposition is None else {"decomposition": self.decomposition.as_dict()}
        return scores | linear | counts | parts


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
    """Score datamodels, or attribution scores of any origin, on held-out models.

    Parameters
    ----------
    datamodels : Datamodels, or array of float, shape (n_train, n_targets)
        An array holds a score of each example for each target: a subset's output is then predicted by the sum of its
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
    held_out = HeldOut.read(
        masks,
        outputs,
        n_retrainings=n_retrainings,
        n_bootstraps=n_bootstraps,
        n_splits=n_splits,
        level=level,
        seed=seed,
    )
    return held_out.scores_of(datamodels)


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
    """Score predictions, wherever they come from, against the outputs of retrained models.

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
    n_subsets = len(predicted)
    is_whole = len(outputs) % n_subsets == 0 if sizes is None and n_subsets else sum(sizes or ()) == len(outputs)
    if n_subsets < LEAST_SUBSETS or not is_whole or outputs.shape[1:] != predicted.shape[1:]:
        raise SpecError(
            f"predictions {predicted.shape} and outputs {outputs.shape} cannot be compared; expected at least "
            f"{LEAST_SUBSETS} subsets, the same targets, and a whole number of retrainings for each subset"
        )
    retrainings = Retrainings.of(outputs, sizes or [len(outputs) // n_subsets] * n_subsets)
    truth = _Truth.of(retrainings, n_bootstraps=n_bootstraps, n_splits=n_splits, level=level, seed=seed)
    return truth.score(predicted, has_units=has_units)


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """Held-out models, read once, that any number of datamodels are scored on: what `evaluate` does, in two steps.

    Memory holds the masks, a byte an entry, and the outputs in float64.
    """

    masks: RowSliceable
    rows: NDArray[np.int8]  # (n_models, n_train)
    keys: NDArray[np.uint64]  # of the rows
    possible: Possible
    firsts: NDArray[np.intp]  # a row of each subset
    truth: "_Truth"

    @classmethod
    def read(
        cls,
        masks: RowSliceable,
        outputs: RowSliceable,
        *,
        n_retrainings: int | None = None,
        n_bootstraps: int = 500,
        n_splits: int = 50,
        level: float = 0.95,
        seed: int = 0,
    ) -> "HeldOut":
        """Read all rows; arguments and errors are those of `evaluate`."""
        n_models, n_train, _ = check_shapes(masks, outputs)
        rows = read_masks(as_rows(masks, "masks"), 0, n_models)
        found = read_outputs(as_rows(outputs, "outputs"), 0, n_models)
        keys, possible = keys_of_masks(rows), Possible.subsets(n_train, float(rows.mean() * n_train))
        if n_retrainings is None:
            groups = groups_of(keys)
        else:
            groups = adjacent_groups(rows, n_retrainings)
            if n_repeats := repeats_beyond_chance(keys[::n_retrainings], possible):
                n_different = n_models // n_retrainings - n_repeats
                warnings.warn(
                    f"n_retrainings is {n_retrainings}, but {n_models:,} rows hold {n_different:,} different subsets, "
                    "so that retrainings of one count as subsets of their own and the LDS is too low; leave "
                    "n_retrainings out, and rows with the same mask are taken together",
                    DataWarning,
                    stacklevel=3,
                )
        if len(groups) < LEAST_SUBSETS:
            raise SpecError(
                f"{n_models} held-out models are of {len(groups)} subsets; expected at least {LEAST_SUBSETS} subsets"
            )
        retrainings = Retrainings.of(found[np.concatenate(groups)], [len(group) for group in groups])
        truth = _Truth.of(retrainings, n_bootstraps=n_bootstraps, n_splits=n_splits, level=level, seed=seed)
        return cls(masks, rows, keys, possible, np.array([group[0] for group in groups]), truth)

    def scores_of(self, datamodels: Datamodels | RowSliceable, *, in_parts: bool = True) -> Evaluation:
        """Score datamodels, or an array of scores, of the same examples and targets; see `evaluate`.

        Without `in_parts` nothing is said of where the error comes from, which takes resamples of its own.
        """
        _warn_of_fitted(datamodels, self.masks, self.keys, self.possible)
        firsts, truth = self.rows[self.firsts], self.truth
        if not isinstance(datamodels, Datamodels):
            return truth.score(_summed_scores(datamodels, firsts), has_units=False)
        predicted, linear = datamodels.predict(firsts), None
        evaluation = truth.score(predicted, has_units=True)
        if datamodels.pairs is not None:
            linear = datamodels.linear.predict(firsts).astype(np.float64)
            of_linear = mean_of_known(lds_of_targets(linear, truth.averages))
            evaluation = replace(evaluation, lds_linear=float(of_linear))
        if datamodels.limit is None or not in_parts:
            return evaluation
        parts = decompose(
            datamodels.limit,
            predicted.astype(np.float64),
            linear,
            truth.retrainings,
            lds=evaluation.lds,
            lds_interval=(evaluation.lds_low, evaluation.lds_high),
            n_draws=truth.n_bootstraps,
            level=truth.level,
            seed=truth.seed,
        )
        return replace(evaluation, decomposition=parts)


@dataclass(frozen=True, slots=True, eq=False)
class _Truth:
    """What held-out subsets were found to give, and how far chance goes in it: the same for whatever is scored."""

    retrainings: Retrainings
    averages: Floats  # (n_subsets, n_targets)
    ceiling: Floats  # (n_targets,)
    n_bootstraps: int
    level: float
    seed: int

    @classmethod
    def of(cls, retrainings: Retrainings, *, n_bootstraps: int, n_splits: int, level: float, seed: int) -> "_Truth":
        if not 0 < level < 1:
            raise SpecError(f"level {level} is not a coverage; choose between 0 and 1, such as 0.95")
        finite = np.isfinite(retrainings.outputs).all(axis=1)
        _require_finite(f" ({int((~finite).sum())} rows of outputs)", is_finite=bool(finite.all()))
        ceiling = retrainings.noise_ceiling(n_splits=n_splits, seed=seed)
        return cls(retrainings, retrainings.averages(), ceiling, n_bootstraps, level, seed)

    def score(self, predicted: NDArray[Any], *, has_units: bool) -> Evaluation:
        """Score predictions, (n_subsets, n_targets)."""
        _require_finite("", is_finite=bool(np.isfinite(predicted).all()))
        retrainings, averages = self.retrainings, self.averages
        n_subsets, n_targets = predicted.shape
        predicted = predicted.astype(np.float64)
        varies = (averages != averages[0]).any(axis=0)
        target_lds = lds_of_targets(predicted, averages)
        replicates = [lds_of_targets(predicted, retrainings.replicate(r)) for r in range(max(retrainings.sizes))]
        target_lds_single = mean_of_known(np.stack(replicates), axis=0)
        target_lds_single[~varies] = np.nan
        target_mse = ((retrainings.outputs - predicted[retrainings.subsets]) ** 2).mean(axis=0)
        variance = retrainings.outputs.var(axis=0)
        target_r2 = 1 - np.divide(target_mse, variance, out=np.full(n_targets, np.nan), where=varies & (variance > 0))
        target_mse = np.where(varies & has_units, target_mse, np.nan)
        target_r2 = np.where(has_units, target_r2, np.nan)
        low, high = lds_interval(predicted, averages, n_bootstraps=self.n_bootstraps, level=self.level, seed=self.seed)
        return Evaluation(
            lds=float(mean_of_known(target_lds)),
            lds_low=low,
            lds_high=high,
            lds_single=float(mean_of_known(target_lds_single)),
            lds_ceiling=float(mean_of_known(self.ceiling)),
            mse=float(mean_of_known(target_mse)),
            r2=float(mean_of_known(target_r2)),
            target_lds=target_lds,
            target_lds_single=target_lds_single,
            target_lds_ceiling=self.ceiling,
            target_mse=target_mse,
            target_r2=target_r2,
            n_subsets=n_subsets,
            n_retrainings=min(retrainings.sizes),
            n_targets=n_targets,
            n_constant=int((~varies).sum()),
            level=self.level,
        )


def _require_finite(where: str, *, is_finite: bool) -> None:
    if not is_finite:
        raise SpecError(
            f"held-out outputs or predictions are not finite{where}; train those rows again, or leave them out"
        )


def readable_score(value: float, *, digits: int = 3) -> str:
    """Write a score for people, as 0.812; what is not defined says so."""
    return "not defined" if math.isnan(value) else f"{value:.{digits}f}"


def readable_table(table: Table) -> str:
    """Write a table as plain lines, however wide, with nothing after the last word of a line."""
    console = Console(width=10_000, markup=False, emoji=False, highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


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


def _summed_scores(scores: RowSliceable, masks: NDArray[np.int8]) -> Floats:
    """Sum the scores of each subset's examples, which are read a block of rows at a time."""
    n_train, n_targets = scores.shape
    step = max(1, _SCORES_BYTES // (8 * n_targets))
    sums = np.zeros((len(masks), n_targets))
    for start in range(0, n_train, step):
        stop = min(start + step, n_train)
        sums += masks[:, start:stop].astype(np.float64) @ read_outputs(scores, start, stop).astype(np.float64)
    return sums


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
            stacklevel=4,
        )
