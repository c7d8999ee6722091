"""What a model would say if the training set were another one: predicted by datamodels, measured by retraining.

Datamodels are fitted on subsets of a share alpha of the training set and asked here about nearly all of it. That is an
extrapolation, so each answer says which alpha it is from, and `n_retrainings` checks it: models are trained on the
changed and on the unchanged set, in the same way as the run's own.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

import dmdata
from dmdata.reading.long_work import shows_count
from dmdata.shown import as_html, fact_in_words
from dmpipeline.applications.curvature import bent_changes
from dmpipeline.applications.evidence import Asked, Evidence, checked_indices, find_evidence
from dmpipeline.applications.interactions import pairs_help
from dmpipeline.applications.retraining import Retrained, TrainingSet, retrain
from dmpipeline.errors import SpecError
from dmpipeline.fitting.pairs.terms import PairTerms
from dmpipeline.runs.targets import TargetsName
from dmpipeline.tables import Table

Order = Literal["helpful", "harmful", "mixed", "random"]
"""In which order examples are removed: largest weights first, lowest first, by magnitude, or at random."""

LEVEL = 0.95
"""Coverage of intervals unless another is given."""

POOR_ALPHA = 0.7
"""From here on datamodels foresee removals from the full set worse than those of 0.5: measured at 0.75 and 0.9 on
digits and MNIST by ``benchmarks/counterfactuals.py``."""


@dataclass(frozen=True, slots=True)
class Case:
    """A question: how does a target's output change with the training set.

    Attributes
    ----------
    target : int
    remove : tuple of int
        Training examples that the changed set lacks.
    add : tuple of int
        Training examples that the unchanged set lacks, and the changed one holds.
    """

    target: int
    remove: tuple[int, ...] = ()
    add: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Counterfactual:
    """The answer for one case; a change is the output on the changed set less that on the unchanged one.

    Attributes
    ----------
    target : int
    removed, added : tuple of int
    predicted_before, predicted_after : float
        Outputs by the datamodel, of the unchanged and the changed set: estimated.
    predicted_change : float
        Estimated: the difference of both, or where models of several runs were asked how outputs bend, what these say;
        see `dmpipeline.applications.curvature`.
    linear_change : float
        Estimated: by the weights alone, in any case.
    measured_before, measured_after : float or None
        Means over retrainings; None where nothing was retrained.
    measured_change, measured_low, measured_high : float or None
        The difference of both with its interval, by Welch's t: certified by retraining.
    n_retrainings : int
        Of either set.
    pair_change : float or None
        Estimated: what pair terms add to `linear_change`; None of datamodels without. It is part of the prediction only
        where `Counterfactuals.with_pairs` says so.
    """

    target: int
    removed: tuple[int, ...]
    added: tuple[int, ...]
    predicted_before: float
    predicted_after: float
    predicted_change: float
    linear_change: float
    measured_before: float | None = None
    measured_after: float | None = None
    measured_change: float | None = None
    measured_low: float | None = None
    measured_high: float | None = None
    n_retrainings: int = 0
    pair_change: float | None = None

    @property
    def basis(self) -> str:
        """What the answer rests on: "estimated", or "certified" by retraining; one retraining has no interval."""
        return "certified" if self.n_retrainings > 1 else "estimated"

    @property
    def is_far_off(self) -> bool:
        """Whether the predicted change lies outside the interval of the measured one, where there is one."""
        if self.measured_low is None or self.measured_high is None or self.n_retrainings < 2:
            return False
        return not self.measured_low <= self.predicted_change <= self.measured_high

    def _shown(self) -> dict[str, object]:
        changed = f"{len(self.removed):,} removed, {len(self.added):,} added"
        facts: dict[str, object] = {"training examples": changed, "predicted change": self.predicted_change}
        if self.measured_change is not None:
            low, high = self.measured_low, self.measured_high
            interval = "" if low is None or high is None else f" ({low:.3f} to {high:.3f})"
            facts["measured change"] = f"{self.measured_change:.3f}{interval}, in {self.n_retrainings:,} retrainings"
        return facts

    def _repr_html_(self) -> str:
        return as_html(f"Counterfactual of target {self.target}", self._shown())

    def __str__(self) -> str:
        facts = [f"{name}: {fact_in_words(fact)}" for name, fact in self._shown().items()]
        return "\n".join([f"Counterfactual of target {self.target}", *facts])


@dataclass(frozen=True, slots=True, repr=False)
class Counterfactuals(Table[Counterfactual]):
    """Answers, in the order of the cases.

    Attributes
    ----------
    alpha : float or None
        Share of the examples in the subsets that the datamodels were fitted on; None where it is not known.
    level : float
        Coverage of the intervals.
    bent_by : tuple of str
        Runs whose models were asked how outputs bend; empty where changes are the datamodels' own.
    with_pairs : bool
        Whether predictions hold pair terms: where the sets that the run was retrained on before show that they foresee
        changes of the full set better; see `dmpipeline.applications.interactions`.
    """

    alpha: float | None = None
    level: float = LEVEL
    bent_by: tuple[str, ...] = ()
    with_pairs: bool = False

    @property
    def advice(self) -> str | None:
        """What would foresee removals from the full set better; None where nothing is known to."""
        if self.alpha is None or self.alpha < POOR_ALPHA or self.bent_by:
            return None
        return (
            f"datamodels of {self.alpha:.0%} subsets foresee removals less well than those of 50% do, and as too "
            "small; ask datamodels of 50%"
        )

    def changes(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return predicted and measured changes, nan where not measured; shape (n_cases,) each."""
        measured = [math.nan if row.measured_change is None else row.measured_change for row in self.rows]
        return np.array([row.predicted_change for row in self.rows]), np.array(measured)


@shows_count("retraining", "models")
def counterfactual(
    asked: Asked,
    target: int,
    remove: Sequence[int] = (),
    add: Sequence[int] = (),
    n_retrainings: int = 0,
    *,
    others: Sequence[Asked] = (),
    targets: TargetsName = "test",
    level: float = LEVEL,
    device: str = "cpu",
    catalog: dmdata.CatalogLike = None,
    progress: Callable[[int, int], None] | None = None,
) -> Counterfactual:
    """Foresee a target's output on a changed training set, and check it by retraining if asked to.

    Parameters
    ----------
    asked : Run, Datamodels, path or name
        See `dmpipeline.applications.evidence.find_evidence`. Of a release the target's column of the weights is read.
    target : int
    remove : sequence of int
        Training examples that the changed set lacks; see `removal_order` for those that matter most.
    add : sequence of int
        Training examples that the unchanged set lacks and the changed one holds: the change is what they bring.
    n_retrainings : int
        Models to train on the changed set, and as many on the unchanged one; kept in the run, and not trained again.
    others : sequence of Run, path or name
        Runs of other alphas on the same examples by the same recipe. Where there are some, all of their models and the
        run's own are read, and the predicted change follows how outputs bend; see `dmpipeline.applications.curvature`.
    targets, catalog
        As for `find_evidence`.
    level : float
        Coverage of the interval of the measured change.
    device : str
        As for `Run.train`.
    progress : callable, optional
        Called with (models trained, in total).

    Raises
    ------
    SpecError
        If an example or target is not there, nothing or everything is removed, one example is removed and added, or
        something is to be retrained that is no run on disk.
    TrainingError, RunError
        As for `dmpipeline.applications.retraining.retrain`.
    """
    case = Case(target, tuple(remove), tuple(add))
    answers = counterfactuals(
        asked,
        [case],
        n_retrainings,
        others=others,
        targets=targets,
        level=level,
        device=device,
        catalog=catalog,
        progress=progress,
    )
    return answers[0]


@shows_count("retraining", "models")
def counterfactuals(
    asked: Asked,
    cases: Sequence[Case],
    n_retrainings: int = 0,
    *,
    others: Sequence[Asked] = (),
    targets: TargetsName = "test",
    level: float = LEVEL,
    device: str = "cpu",
    catalog: dmdata.CatalogLike = None,
    progress: Callable[[int, int], None] | None = None,
) -> Counterfactuals:
    """Answer several cases at once, as `counterfactual` does one: sets that they share are trained once."""
    if not 0 < level < 1:
        raise SpecError(f"level {level} is not a coverage; choose between 0 and 1, such as 0.95", field="level")
    if n_retrainings < 0:
        raise SpecError(f"{n_retrainings} retrainings; choose 0 for none, or more", field="n_retrainings")
    evidence = find_evidence(asked, targets, catalog=catalog)
    cases = [_checked(case, evidence) for case in cases]
    picked = sorted({case.target for case in cases})
    datamodels, place = evidence.datamodels(picked), {target: nth for nth, target in enumerate(picked)}
    rows = []
    for case in cases:
        weight = datamodels.weight[:, place[case.target]].astype(np.float64)
        whole = float(datamodels.bias[place[case.target]]) + float(weight.sum())
        before, after = whole - float(weight[list(case.add)].sum()), whole - float(weight[list(case.remove)].sum())
        change = after - before
        rows.append(Counterfactual(case.target, case.remove, case.add, before, after, change, change))
    asked_too, with_pairs = [find_evidence(other, evidence.targets, catalog=catalog) for other in others], False
    if asked_too:
        weight = np.stack([datamodels.weight[:, place[case.target]] for case in cases], axis=1).astype(np.float64)
        rows = _bent(rows, [evidence, *asked_too], weight)
    elif datamodels.pairs is not None:
        with_pairs = pairs_help(evidence) is True
        rows = [_with_pairs(row, datamodels.pairs, place[row.target], is_used=with_pairs) for row in rows]
    alpha, bent_by = evidence.alpha, tuple(each.name for each in asked_too)
    if n_retrainings == 0:
        return Counterfactuals(tuple(rows), alpha, level, bent_by, with_pairs)
    run = evidence.require_measurable()
    sets = [TrainingSet.of(evidence.n_train, without=case.add) for case in cases]
    sets += [TrainingSet.of(evidence.n_train, without=case.remove) for case in cases]
    retrained = retrain(run, sets, n_retrainings, device=device, progress=progress)
    measured = [
        _measured(row, before, after, evidence.targets, level)
        for row, before, after in zip(rows, retrained[: len(cases)], retrained[len(cases) :], strict=True)
    ]
    return Counterfactuals(tuple(measured), alpha, level, bent_by, with_pairs)


def removal_order(
    weight: npt.NDArray[np.floating[Any]], order: Order = "helpful", *, seed: int = 0
) -> npt.NDArray[np.intp]:
    """Order training examples by what removing them does to a target, the first to remove first.

    Parameters
    ----------
    weight : array of float, shape (n_train,)
        Of one target.
    order : {"helpful", "harmful", "mixed", "random"}
        See `Order`. Of the first three only examples of such weights are listed; ties in the order of their numbers.
    seed : int
        Of the random order.

    Returns
    -------
    examples : array of int, shape (at most n_train,)
    """
    if order == "random":
        return np.random.default_rng(seed).permutation(len(weight)).astype(np.intp)
    if order not in get_args(Order):
        raise SpecError(f"order is {order!r}; choose {', '.join(get_args(Order))}", field="order", value=order)
    strength = {"helpful": weight, "harmful": -weight, "mixed": np.abs(weight)}[order]
    sorted_by_it = np.argsort(-strength, kind="stable")
    ordered: npt.NDArray[np.intp] = sorted_by_it[strength[sorted_by_it] > 0]
    return ordered


def read_examples(text: str, n_train: int) -> list[int]:
    """Read which training examples are meant: numbers and half-open ranges as "3,17,20:40", or a file of numbers.

    Parameters
    ----------
    text : str
        A list, or the path of a text file with numbers between spaces, commas or lines, or of an ``.npy`` of integers
        or of a mask (n_train,), True where an example is meant.
    n_train : int

    Raises
    ------
    SpecError
        If it is neither, or an example is not there.
    """
    path = Path(text)
    # a long list is no file's name, and asking whether it is one raises
    if path.suffix == ".npy" or (not re.fullmatch(r"[\d\s,:]*", text) and path.is_file()):
        try:
            array = (
                np.load(path, allow_pickle=False)
                if path.suffix == ".npy"
                else np.array(read_numbers(path.read_text("utf-8")), np.int64)
            )
        except (OSError, ValueError, EOFError) as error:
            raise SpecError(f"{path} cannot be read as numbers of examples ({error})", field="remove") from error
        if array.dtype == np.bool_ and array.shape == (n_train,):
            array = np.flatnonzero(array)
        return sorted(set(checked_indices(array, n_train, "training example", field="remove")))
    return sorted(set(checked_indices(read_numbers(text), n_train, "training example", field="remove")))


def read_numbers(text: str) -> list[int]:
    """Read numbers and half-open ranges, as "3,17,20:40".

    Raises
    ------
    SpecError
        For anything else.
    """
    numbers: list[int] = []
    for word in text.replace(",", " ").split():
        first, colon, last = word.partition(":")
        try:
            numbers += range(int(first), int(last)) if colon else [int(first)]
        except ValueError as error:
            raise SpecError(
                f"{word!r} is neither a number nor a range; write examples like 3,17,20:40, or name a file of them",
                field="remove",
                value=text,
            ) from error
    return numbers


def interval_of_difference(
    after: npt.NDArray[np.float64], before: npt.NDArray[np.float64], level: float
) -> tuple[float, float]:
    """Bound the difference of two means by Welch's t interval; infinite with one retraining of either."""
    from scipy import stats  # slow to import

    if min(len(after), len(before)) < 2:
        return -math.inf, math.inf
    parts = np.array([after.var(ddof=1) / len(after), before.var(ddof=1) / len(before)])
    error = math.sqrt(parts.sum())
    difference = float(after.mean() - before.mean())
    if error == 0:
        return difference, difference
    freedom = parts.sum() ** 2 / (parts**2 / (np.array([len(after), len(before)]) - 1)).sum()
    reach = float(stats.t.ppf((1 + level) / 2, freedom)) * error
    return difference - reach, difference + reach


def _measured(
    row: Counterfactual, unchanged: Retrained, changed: Retrained, targets: TargetsName, level: float
) -> Counterfactual:
    before, after = unchanged.of(targets)[:, row.target], changed.of(targets)[:, row.target]
    low, high = interval_of_difference(after, before, level)
    return replace(
        row,
        measured_before=float(before.mean()),
        measured_after=float(after.mean()),
        measured_change=float(after.mean() - before.mean()),
        measured_low=low,
        measured_high=high,
        n_retrainings=len(after),
    )


def _with_pairs(row: Counterfactual, terms: PairTerms, place: int, *, is_used: bool) -> Counterfactual:
    """Say what pairs add to a row, and where they are used put it into its predictions."""
    before, after = np.ones((2, len(terms.mean)), np.float32)
    before[list(row.added)] = 0
    after[list(row.removed)] = 0
    added = [terms.part_of(place, mask) for mask in (before, after)]
    row = replace(row, pair_change=added[1] - added[0])
    if not is_used:
        return row
    return replace(
        row,
        predicted_before=row.predicted_before + added[0],
        predicted_after=row.predicted_after + added[1],
        predicted_change=row.predicted_change + added[1] - added[0],
    )


def _bent(
    rows: Sequence[Counterfactual], evidences: Sequence[Evidence], weight: npt.NDArray[np.float64]
) -> list[Counterfactual]:
    """Put in each row the change that the models of several runs say, with how outputs bend."""
    before, after = np.ones((2, len(rows), len(weight)), np.bool_)
    for nth, row in enumerate(rows):
        before[nth, list(row.added)] = False
        after[nth, list(row.removed)] = False
    changes = bent_changes(evidences, weight, [row.target for row in rows], before, after)
    return [replace(row, predicted_change=float(change)) for row, change in zip(rows, changes, strict=True)]


def _checked(case: Case, evidence: Evidence) -> Case:
    n_train = evidence.n_train
    target = evidence.checked_one(case.target)
    remove = checked_indices(case.remove, n_train, "training example", field="remove")
    add = checked_indices(case.add, n_train, "training example", field="add")
    if not remove and not add:
        raise SpecError("nothing is removed or added; name at least one training example", field="remove")
    for name, listed in (("remove", remove), ("add", add)):
        if len(set(listed)) != len(listed):
            twice = next(i for i in listed if listed.count(i) > 1)
            raise SpecError(f"training example {twice} is listed twice; list it once", field=name, value=twice)
        if len(listed) == n_train:
            raise SpecError(f"all {n_train:,} training examples are listed; leave at least one", field=name)
    if both := sorted(set(remove) & set(add)):
        raise SpecError(f"training example {both[0]} is both removed and added; choose one", field="add", value=both[0])
    return Case(target, tuple(remove), tuple(add))
