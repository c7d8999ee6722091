"""Data support: the fewest training examples whose removal, or whose mislabelling, turns a prediction into a wrong one.

A margin above zero is a right prediction. Examples are taken in the order of a target's weights, the most helpful
first, until what they add up to exceeds the target's margin on the full training set (Ilyas et al., Datamodels, 2022,
section 4.1). That is an *estimate*. A set is *certified* when models trained without it say so: when the interval of
their mean margin lies below zero.

Mislabelling sets have no mask. Each example is taken to lose its weight and, as an example of another class, to work
against the target by some multiple of it: the change of the margin is estimated as `relabel_factor` times that of
removing it. The factor is measured on the run by training on changed labels, for a few targets, and told. The wrong
label is the class whose examples together hurt the target most.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

import dmdata
from dmdata.reading.long_work import shows_stages
from dmpipeline.applications.counterfactuals import LEVEL, removal_order
from dmpipeline.applications.evidence import Asked, Evidence, find_evidence
from dmpipeline.applications.retraining import Retrained, TrainingSet, retrain
from dmpipeline.data.examples import Dataset
from dmpipeline.errors import SpecError
from dmpipeline.runs.targets import TargetsName, fitted_array
from dmpipeline.tables import Table

Change = Literal["removed", "mislabelled"]
"""What is done to the examples of a support set."""

RELABEL_FACTOR = 2.0
"""How many times removing an example mislabelling it counts for, where that is not measured: it gains what it loses."""

_FACTOR_EXAMPLES = 8
_FACTOR_TARGETS = 12


@dataclass(frozen=True, slots=True)
class Support:
    """The support of one target.

    Attributes
    ----------
    target : int
    size : int or None
        Of the smallest set by the estimate, enlarged by `DataSupport.inflation`; 0 where the prediction is wrong as it
        is, None where all helpful examples together do not suffice.
    certified : bool or None
        Whether models trained without the set get the target wrong: the interval of their mean margin lies below zero.
        None where nothing was retrained, or there is no set.
    examples : tuple of int
        The set, in order.
    margin : float
        On the full set: measured where models were retrained, else estimated by the datamodel.
    estimated_margin : float or None
        Of the set's models, by the estimate.
    measured_margin, measured_low, measured_high : float or None
        Mean over the retrainings, and its interval.
    wrong_label : int or None
        What examples of a mislabelling set are called; None where they are removed.
    """

    target: int
    size: int | None
    certified: bool | None
    examples: tuple[int, ...]
    margin: float
    estimated_margin: float | None = None
    measured_margin: float | None = None
    measured_low: float | None = None
    measured_high: float | None = None
    wrong_label: int | None = None

    @property
    def flips(self) -> bool | None:
        """Whether the mean margin of the retrained models is below zero, with or without certainty."""
        return None if self.measured_margin is None else self.measured_margin < 0


@dataclass(frozen=True, slots=True, repr=False)
class DataSupport(Table[Support]):
    """Support sets, in the order of the targets.

    Attributes
    ----------
    change : {"removed", "mislabelled"}
    inflation : float
        By which share estimated sets were enlarged.
    n_retrainings : int
        Of each set and of the full set; 0 where all is estimated.
    level : float
        Coverage of the intervals.
    relabel_factor : float or None
        Of mislabelling, see the module's words; None for removal.
    factor_basis : {"assumed", "measured"} or None
    alpha : float or None
        Share of the examples in the subsets that the datamodels were fitted on.
    """

    change: Change = "removed"
    inflation: float = 0.0
    n_retrainings: int = 0
    level: float = LEVEL
    relabel_factor: float | None = None
    factor_basis: str | None = None
    alpha: float | None = None

    name = "targets"

    def curve(self, *, certified: bool = False) -> npt.NDArray[np.float64]:
        """Share of the targets that flip within k examples, for k from 0 to the largest set; shape (k + 1,).

        Parameters
        ----------
        certified : bool
            Count only sets that retraining certified; otherwise all estimates. Targets that are wrong as they are
            count at 0 in both.
        """
        sizes = [
            row.size
            for row in self.rows
            if row.size is not None and (not certified or row.size == 0 or row.certified is True)
        ]
        counts = np.bincount(sizes, minlength=1) if sizes else np.zeros(1, np.int64)
        return np.cumsum(counts) / max(len(self.rows), 1)

    @property
    def half_within(self) -> int | None:
        """The least k at which half of the targets flip by the estimate; None where fewer ever do."""
        curve = self.curve()
        return int(np.argmax(curve >= 0.5)) if (curve >= 0.5).any() else None

    def shares(self) -> dict[str, float | None]:
        """Return shares of the retrained sets: `certified`, and `flipped`, whose mean margin is below zero."""
        tried = [row for row in self.rows if row.certified is not None]
        if not tried:
            return {"certified": None, "flipped": None}
        return {
            "certified": sum(row.certified is True for row in tried) / len(tried),
            "flipped": sum(row.flips is True for row in tried) / len(tried),
        }

    def facts(self) -> dict[str, Any]:
        """State what holds for all targets."""
        return Table.facts(self) | {"half_within": self.half_within, "shares": self.shares()}


SUPPORT_STAGES = {"baseline": "models", "factor": "models", "sets": "models"}
"""Stages that `data_support` reports, and what each counts."""


@shows_stages(SUPPORT_STAGES)
def data_support(
    asked: Asked,
    targets: Sequence[int] | None = None,
    certify: int = 0,
    *,
    mislabel: bool = False,
    inflation: float = 0.0,
    of: TargetsName = "test",
    level: float = LEVEL,
    device: str = "cpu",
    seed: int = 0,
    catalog: dmdata.CatalogLike = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> DataSupport:
    """Find for each target the fewest examples without which, or with wrong labels on which, it is predicted wrongly.

    Parameters
    ----------
    asked : Run, Datamodels, path or name
        See `dmpipeline.applications.evidence.find_evidence`.
    targets : sequence of int, optional
        All if not given.
    certify : int
        How many models to train on each set, and on the full one, whose measured margins then take the place of the
        estimated ones; 0 for none.
    mislabel : bool
        Mislabel examples rather than remove them. A run's alone, and of classes.
    inflation : float
        Enlarge each set by this share, rounded up: 0.2 is what the paper needed for nine of ten sets to hold.
    of : {"test", "train"}
        Whose targets.
    level : float
        Coverage of the intervals.
    device : str
        As for `Run.train`.
    seed : int
        Of the targets that the factor of mislabelling is measured on.
    catalog : Catalog, path or URL, optional
    progress : callable, optional
        Called with (stage, models done, in total); see `SUPPORT_STAGES`.

    Raises
    ------
    SpecError
        If a target is not there, outputs are no margins or log-likelihoods whose sign tells right from wrong, or
        something is to be retrained that is no run on disk.
    TrainingError, RunError
        As for `dmpipeline.applications.retraining.retrain`.

    Notes
    -----
    Estimates on the full set extrapolate from subsets: a target's margin by its datamodel may be far from the measured
    one. With `certify` it is measured, once for all targets.
    """
    if certify < 0:
        raise SpecError(f"{certify} retrainings; choose 0 for none, or more", field="certify", value=certify)
    if not (inflation >= 0 and math.isfinite(inflation)):
        raise SpecError(f"inflation {inflation} is no share; choose 0 or more, such as 0.2", field="inflation")
    if not 0 < level < 1:
        raise SpecError(f"level {level} is not a coverage; choose between 0 and 1, such as 0.95", field="level")
    evidence = find_evidence(asked, of, catalog=catalog)
    _require_margins(evidence)
    picked = list(range(evidence.n_targets)) if targets is None else evidence.checked(targets)
    dataset = evidence.dataset() if evidence.run is not None else None
    if mislabel and (dataset is None or dataset.is_regression or dataset.is_sequence):
        raise SpecError(
            f"{evidence.name} has no classes at hand, so that nothing can be mislabelled; leave mislabel out",
            field="mislabel",
        )
    if certify:
        evidence.require_measurable()
    work = _Work(evidence, dataset, certify, level, device, progress)
    datamodels = evidence.datamodels(picked)
    weights = np.ascontiguousarray(datamodels.weight.T, np.float64)
    margins = datamodels.bias.astype(np.float64) + weights.sum(axis=1)
    if certify:
        baseline = work.retrained("baseline", [TrainingSet.of(evidence.n_train)])[0]
        margins = baseline.of(evidence.targets).mean(axis=0)[picked]
    factor, basis = (None, None) if not mislabel else work.relabel_factor(picked, weights, seed)
    rows = [
        _estimated(target, weight, work.order(weight, wrong_label), margin, factor, inflation, wrong_label)
        for target, weight, margin, wrong_label in zip(
            picked, weights, margins.tolist(), work.wrong_labels(picked, weights, mislabel=mislabel), strict=True
        )
    ]
    if certify:
        rows = work.certified(rows)
    return DataSupport(
        tuple(rows),
        change="mislabelled" if mislabel else "removed",
        inflation=inflation,
        n_retrainings=certify,
        level=level,
        relabel_factor=factor,
        factor_basis=basis,
        alpha=evidence.alpha,
    )


@dataclass(frozen=True, slots=True)
class _Work:
    """What is retrained for one call."""

    evidence: Evidence
    dataset: Dataset | None
    n_retrainings: int
    level: float
    device: str
    progress: Callable[[str, int, int], None] | None

    def retrained(self, stage: str, sets: Sequence[TrainingSet]) -> list[Retrained]:
        run = self.evidence.require_run("what models are retrained with is")
        report = self.progress
        return retrain(
            run,
            sets,
            self.n_retrainings,
            device=self.device,
            progress=None if report is None else lambda done, total: report(stage, done, total),
        )

    def relabel_factor(self, picked: Sequence[int], weights: npt.NDArray[np.float64], seed: int) -> tuple[float, str]:
        """Measure what mislabelling does, of what removal is estimated to do: the ratio of both, over some targets."""
        if not self.n_retrainings or self.dataset is None:
            return RELABEL_FACTOR, "assumed"
        n_train, of = self.evidence.n_train, self.evidence.targets
        rng = np.random.default_rng(seed)
        sets, tried = [], []
        for nth in rng.permutation(len(picked))[:_FACTOR_TARGETS].tolist():
            wrong = self.wrong_labels([picked[nth]], weights[nth : nth + 1], mislabel=True)[0]
            first = self.order(weights[nth], wrong)[:_FACTOR_EXAMPLES]
            if len(first):
                sets.append(TrainingSet.of(n_train, relabelled=_relabelled(first, wrong)))
                tried.append((nth, first))
        if not tried:
            return RELABEL_FACTOR, "assumed"
        before = self.retrained("factor", [TrainingSet.of(n_train)])[0].of(of).mean(axis=0)
        after = self.retrained("factor", sets)
        changes = [
            float(each.of(of)[:, picked[nth]].mean() - before[picked[nth]])
            for each, (nth, _) in zip(after, tried, strict=True)
        ]
        foreseen = [float(weights[nth][first].sum()) for nth, first in tried]
        # the ratio of sums: single ratios scatter where little is foreseen
        return max(-sum(changes) / sum(foreseen), 1.0), "measured"

    def order(self, weight: npt.NDArray[np.float64], wrong_label: int | None) -> npt.NDArray[np.intp]:
        """Order the helpful examples, the most helpful first; those that bear the wrong label already are left out."""
        order = removal_order(weight)
        if wrong_label is None or self.dataset is None:
            return order
        kept: npt.NDArray[np.intp] = order[self.dataset.train_labels[order] != wrong_label]
        return kept

    def wrong_labels(
        self, picked: Sequence[int], weights: npt.NDArray[np.float64], *, mislabel: bool
    ) -> list[int | None]:
        """Choose for each target the class whose examples together hurt it most, but its own; None for removal."""
        dataset = self.dataset
        if not mislabel or dataset is None:
            return [None] * len(picked)
        own = dataset.train_labels if self.evidence.targets == "train" else dataset.test_labels
        hurts = np.stack(
            [np.bincount(dataset.train_labels, np.minimum(weight, 0), dataset.n_classes) for weight in weights]
        )
        hurts[np.arange(len(picked)), own[list(picked)]] = math.inf
        chosen: list[int | None] = hurts.argmin(axis=1).tolist()
        return chosen

    def certified(self, rows: Sequence[Support]) -> list[Support]:
        """Train on each set, and state what came out."""
        there = [row for row in rows if row.size]
        sets = [self._set_of(row) for row in there]
        found = dict(zip((row.target for row in there), self.retrained("sets", sets) if sets else [], strict=True))
        return [
            row
            if row.target not in found
            else _certified(row, found[row.target].of(self.evidence.targets)[:, row.target], self.level)
            for row in rows
        ]

    def _set_of(self, row: Support) -> TrainingSet:
        if row.wrong_label is None or self.dataset is None:
            return TrainingSet.of(self.evidence.n_train, without=row.examples)
        relabelled = _relabelled(np.array(row.examples, np.intp), row.wrong_label)
        return TrainingSet.of(self.evidence.n_train, relabelled=relabelled)


def _estimated(
    target: int,
    weight: npt.NDArray[np.float64],
    order: npt.NDArray[np.intp],
    margin: float,
    factor: float | None,
    inflation: float,
    wrong_label: int | None,
) -> Support:
    if margin < 0:
        return Support(target, 0, None, (), margin, wrong_label=wrong_label)
    taken = np.cumsum(weight[order]) * (1 if factor is None else factor)
    if not len(order) or taken[-1] <= margin:
        return Support(target, None, None, (), margin, wrong_label=wrong_label)
    size = int(np.argmax(taken > margin)) + 1
    size = min(math.ceil(size * (1 + inflation) - 1e-9), len(order))
    return Support(
        target,
        size,
        None,
        tuple(order[:size].tolist()),
        margin,
        margin - float(taken[size - 1]),
        wrong_label=wrong_label,
    )


def _certified(row: Support, margins: npt.NDArray[np.float64], level: float) -> Support:
    from scipy import stats  # slow to import

    mean, low, high = float(margins.mean()), -math.inf, math.inf
    if len(margins) > 1:
        reach = float(stats.t.ppf((1 + level) / 2, len(margins) - 1) * margins.std(ddof=1) / math.sqrt(len(margins)))
        low, high = mean - reach, mean + reach
    return Support(
        row.target,
        row.size,
        high < 0,
        row.examples,
        row.margin,
        row.estimated_margin,
        mean,
        low,
        high,
        row.wrong_label,
    )


def _relabelled(examples: npt.NDArray[np.intp], wrong_label: int | None) -> list[tuple[int, int]]:
    return [] if wrong_label is None else [(example, wrong_label) for example in examples.tolist()]


def _require_margins(evidence: Evidence) -> None:
    if evidence.run is None:
        return
    array = fitted_array(evidence.run, evidence.targets)
    if not array.endswith("margins"):
        raise SpecError(
            f"{evidence.name} has datamodels of {array.partition('_')[2].replace('_', ' ')}, whose sign does not tell "
            "right from wrong; data support is of margins: create a run that stores them first, with "
            "`dmpipeline init OTHER --outputs margins`",
            field="outputs",
            value=array,
        )
