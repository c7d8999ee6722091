"""What a run's models have learned: their accuracy next to always saying the commonest class, and warnings.

Datamodels predict what a network would say, whether it has learned anything or not: of networks that say one class
whatever they see, they get high scores. So the accuracy of the models is told with every score, and models that are no
better than the baseline, that say one thing of everything, whose errors explode or whose outputs never vary are warned
of: by `Watch` after the first block, by `status` and `verify` at any time. Nothing of it needs the dataset, unless the
run is of before models' scores were kept.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import zarr

from dmpipeline.data.examples import LARGEST_PLAIN_INPUT, Dataset
from dmpipeline.errors import LearningWarning, RunError, SpecError
from dmpipeline.models.outputs import output_of
from dmpipeline.runs.directory import done_blocks
from dmpipeline.spec import MASK_LAWS, RunSpec
from dmpipeline.tables import number_or_none
from dmpipeline.training.scores import SCORES, baseline_facts, stored_scores

Verdict = Literal["better", "no better", "too few", "unknown"]

Kind = Literal["no better", "constant", "exploding", "unvarying", "untrained"]
"""What a warning is of."""

LEAST_MODELS = 10
"""Fewer models whose interval holds the baseline are too few to tell whether they are better."""

EXPLODED_R2 = -10.0
"""A regression below is not a poor one but one whose errors exploded."""

# of models with one answer to everything, and of targets whose outputs never vary
_MANY_MODELS, _MANY_TARGETS = 0.1, 0.5
# what averaging leaves of two equal shares
_ROUNDING = 1e-9
# How much is read where no scores are on record, and to see whether outputs vary.
_ROWS_OF_A_BLOCK, _BLOCKS_READ = 50, 4

_STUDENT_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_TELLING = {
    "test": ("predicted_labels", "logits", "margins", "predictions", "squared_errors"),
    "train": ("margins", "predicted_labels", "logits", "squared_errors", "predictions"),
}

Floats = npt.NDArray[np.float64]


class TrainedRun(Protocol):
    """What is asked of a run here; see `dmpipeline.Run`."""

    @property
    def path(self) -> Path:
        """Its directory."""

    @property
    def spec(self) -> RunSpec:
        """What it is of."""

    def array(self, name: str) -> "zarr.Array[Any]":
        """Look up one of its arrays."""

    def dataset(self) -> Dataset:
        """Load what it is trained on."""


@dataclass(frozen=True, slots=True)
class Learned:
    """What a run's models have learned, as far as its store tells.

    Attributes
    ----------
    measure : {"accuracy", "r2"}
    unit : str
        What an accuracy is a share of.
    n_models : int
        Models that were scored.
    score, low, high : float
        Mean over the models on test examples, and its 95% interval over models (Student's t); nan where not defined,
        as are all others.
    median : float
        Over the models.
    baseline : float
        What always saying the commonest class of the training labels scores on the test examples; 0 for R2, which is
        the mean of the test labels, the best of all single numbers.
    commonest : str or None
        That class.
    left_out, left_out_baseline : float
        The same on training examples that a model was not trained on, each model on its own.
    n_constant : int
        Models that say one thing of every test example.
    n_exploded : int
        Regressions of R2 below `EXPLODED_R2`.
    unvarying : float
        Share of targets whose outputs are the same in all rows that were compared.
    n_compared : int
        How many rows those were.
    warnings : tuple of (Kind, str)
        What is wrong: what was seen, what it means and what to do.
    """

    measure: str
    unit: str
    n_models: int
    score: float
    low: float
    high: float
    median: float
    baseline: float
    commonest: str | None
    left_out: float
    left_out_baseline: float
    n_constant: int
    n_exploded: int
    unvarying: float
    n_compared: int
    warnings: tuple[tuple[Kind, str], ...] = ()

    @property
    def texts(self) -> list[str]:
        """The warnings' texts."""
        return [text for _, text in self.warnings]

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, ready for JSON; None stands for what is not defined. `warnings` are not among them."""
        is_accuracy = self.measure == "accuracy"
        facts: dict[str, Any] = {"n_models_scored": self.n_models}
        accuracies = {
            "accuracy": self.score,
            "accuracy_low": self.low,
            "accuracy_high": self.high,
            "baseline_accuracy": self.baseline,
            "left_out_accuracy": self.left_out,
            "left_out_baseline_accuracy": self.left_out_baseline,
        }
        r2s = {
            "r2_models": self.score,
            "r2_models_low": self.low,
            "r2_models_high": self.high,
            "r2_models_median": self.median,
            "left_out_r2_models": self.left_out,
        }
        facts |= {name: number_or_none(value) if is_accuracy else None for name, value in accuracies.items()}
        return facts | {name: None if is_accuracy else number_or_none(value) for name, value in r2s.items()}

    def figure(self) -> str:
        """Return the score alone, as 96.2% or an R2."""
        return "not known" if math.isnan(self.score) else (_share if self.measure == "accuracy" else _r2)(self.score)

    def sentence(self) -> str:
        """State how good the models are, in plain words; empty where that is not known."""
        if math.isnan(self.score):
            return ""
        if self.measure == "r2":
            text = f"models explain {_share(self.score)} of the variance of {self.unit}"
            if self.score < 0:
                text = f"models' squared errors on {self.unit} are {_r2(1 - self.score)} times their mean's"
            text += f" (R2 {_r2(self.score)}, median {_r2(self.median)}; always saying the mean has 0)"
        else:
            text = f"models are right on {_share(self.score)} of {self.unit}"
            if not math.isnan(self.baseline):
                text += f"; always saying the commonest class, {self.commonest}, would be on {_share(self.baseline)}"
        if self.verdict == "too few":
            text += f"; {_count(self.n_models, 'model is', 'models are')} too few to tell whether that is better"
        return text

    @property
    def verdict(self) -> Verdict:
        """Whether the models are better than the baseline; no better where their interval reaches it."""
        if math.isnan(self.score) or math.isnan(self.baseline):
            return "unknown"
        bar = self.baseline + _ROUNDING
        if self.measure == "accuracy" and self.baseline >= 1:
            return "unknown"  # all test examples are of one class
        if self.n_models < LEAST_MODELS and (math.isnan(self.low) or self.low <= bar < self.high):
            return "better" if math.isnan(self.low) and self.score > bar else "too few"
        # so few examples may be in a test set that chance lifts models a little above; those left out are more
        falls_behind = self.n_models >= LEAST_MODELS and self.left_out <= self.left_out_baseline + _ROUNDING
        return "no better" if self.low <= bar or self.median <= bar or falls_behind else "better"


class Watch:
    """Looks at a run while it is trained, first after the first block, and warns of each kind of trouble once.

    Parameters
    ----------
    run : TrainedRun
    dataset : Dataset, optional
        The run's, where it is at hand.
    """

    def __init__(self, run: TrainedRun, dataset: Dataset | None = None) -> None:
        self.run, self.dataset = run, dataset
        self._said: set[Kind] = set()
        self._look_at = 1

    def look(self) -> None:
        """Look, where twice as many blocks are done as when last looked at; call it after each block.

        Warns
        -----
        LearningWarning
            Of what is wrong with what the models have learned.
        """
        n_done = len(done_blocks(self.run.path))
        if n_done < self._look_at:
            return
        self._look_at = 2 * n_done
        for kind, text in what_was_learned(self.run, self.dataset).warnings:
            if kind not in self._said:
                self._said.add(kind)
                warnings.warn(text, LearningWarning, stacklevel=3)


def what_was_learned(run: TrainedRun, dataset: Dataset | None = None) -> Learned:
    """Find out what a run's models have learned, by the rows that are done.

    Models' scores are on record since they were first trained. Of a run of before, up to 200 rows are read and scored.

    Parameters
    ----------
    run : TrainedRun
    dataset : Dataset, optional
        The run's, where it is at hand; otherwise it is loaded where it is needed.
    """
    blocks = [block for block in sorted(done_blocks(run.path)) if block < len(run.spec.blocks)]
    facts, scores = _recorded(run)
    done = np.zeros(run.spec.n_rows, np.bool_)
    for block in blocks:
        done[run.spec.blocks[block].start : run.spec.blocks[block].stop] = True
    scores = scores[done]
    unknown = np.flatnonzero(done)[np.isnan(scores).all(1)]
    if facts is None or len(unknown):
        dataset = dataset or _dataset_of(run)
    if dataset is not None:
        facts = facts or baseline_facts(dataset, run.spec)
        in_blocks = np.unique(unknown // run.spec.block_models).tolist()
        scores = np.concatenate([scores, *(_scores_of(run, dataset, some) for some in _some_rows(run, in_blocks))])
    return _judged(run, facts or _UNKNOWN_BASELINE, scores, *_unvarying(run, blocks))


_UNKNOWN_BASELINE = {"measure": "accuracy", "unit": "test examples", "baseline": None, "commonest": None}


def _recorded(run: TrainedRun) -> tuple[dict[str, Any] | None, Floats]:
    """Read the scores on record, NaN where there are none, and what they are to be compared with."""
    none = np.full((run.spec.n_rows, len(SCORES)), np.nan)
    try:
        array = run.array("model_scores")
        if array.attrs.get("scores") != list(SCORES) or array.shape != none.shape:
            return None, none
        facts: Any = array.attrs.get("baseline")
        return facts, np.asarray(array[...], np.float64)
    except (RunError, OSError, ValueError, RuntimeError):  # not there, or damaged: what is stored tells, too
        return None, none


def _dataset_of(run: TrainedRun) -> Dataset | None:
    try:
        return run.dataset()
    except (RunError, SpecError):  # it was moved or changed: said by what needs it
        return None


def _some_rows(run: TrainedRun, blocks: Sequence[int]) -> list[slice]:
    """Choose some rows, spread over blocks."""
    chosen = np.unique(np.linspace(0, len(blocks) - 1, min(_BLOCKS_READ, len(blocks))).round().astype(int))
    found = [run.spec.blocks[blocks[place]] for place in chosen.tolist()]
    return [slice(rows.start, min(rows.stop, rows.start + _ROWS_OF_A_BLOCK)) for rows in found]


def _scores_of(run: TrainedRun, dataset: Dataset, rows: slice) -> Floats:
    """Score some rows by what is stored of them; none where it is damaged, which `verify` finds."""
    names = ["train_masks"]
    for part, telling in _TELLING.items():
        names += [f"{part}_{name}" for name in telling if f"{part}_{name}" in run.spec.arrays][:1]
    try:
        return stored_scores(dataset, {name: np.asarray(run.array(name)[rows]) for name in names})
    except (RunError, OSError, ValueError, RuntimeError):
        return np.empty((0, len(SCORES)))


def _unvarying(run: TrainedRun, blocks: Sequence[int]) -> tuple[float, int]:
    """Return the share of test targets whose outputs are the same in all of some rows, and how many rows those are."""
    names = [name for name in run.spec.arrays if name.startswith("test_")]
    try:
        arrays = sorted((run.array(name) for name in names), key=lambda array: array.ndim)
        if not arrays:
            return math.nan, 0
        parts = [np.asarray(arrays[0][rows]) for rows in _some_rows(run, blocks)]
    except (RunError, OSError, ValueError, RuntimeError):
        return math.nan, 0
    n_rows = sum(len(part) for part in parts)
    if n_rows < 2:
        return math.nan, n_rows
    outputs = np.concatenate(parts)
    never = ~(outputs != outputs[0]).any(0)
    share = float(never.mean())
    # what a class is called may well be the same for all models
    is_coarse = output_of(arrays[0].basename).dtype.startswith("int")
    return (float(share == 1) if is_coarse else share), n_rows


def _judged(run: TrainedRun, facts: dict[str, Any], scores: Floats, unvarying: float, n_compared: int) -> Learned:
    test, left_out, left_out_baseline, constant = (_known(column) for column in scores.T)
    mean, low, high = interval(test)
    is_drawn = run.spec.masks in MASK_LAWS
    found = Learned(
        measure=facts["measure"],
        unit=facts["unit"],
        n_models=len(test),
        score=mean,
        low=low,
        high=high,
        median=float(np.median(test)) if len(test) else math.nan,
        baseline=math.nan if facts["baseline"] is None else facts["baseline"],
        commonest=facts["commonest"],
        left_out=float(left_out.mean()) if len(left_out) else math.nan,
        # examples that masks of one's own leave out may be all those of a class: no model is right on them
        left_out_baseline=float(left_out_baseline.mean()) if len(left_out) and is_drawn else math.nan,
        n_constant=int((constant >= 1).sum()),
        n_exploded=int((test < EXPLODED_R2).sum()) if facts["measure"] == "r2" else 0,
        unvarying=unvarying,
        n_compared=n_compared,
    )
    return replace(found, warnings=tuple(_troubles(found, run.spec, facts.get("largest_input"))))


def interval(scores: Floats) -> tuple[float, float, float]:
    """Average scores; return the mean and its 95% interval over models, by Student's t; nan where not defined."""
    if not len(scores):
        return math.nan, math.nan, math.nan
    mean, n = float(scores.mean()), len(scores)
    if n < 2:
        return mean, math.nan, math.nan
    freedom = n - 1
    student = _STUDENT_95[freedom - 1] if freedom <= len(_STUDENT_95) else 1.96 + 2.37 / freedom + 2.82 / freedom**2
    half = student * float(scores.std(ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


def _troubles(found: Learned, spec: RunSpec, largest_input: float | None) -> list[tuple[Kind, str]]:
    """State what is wrong with what models have learned: what was seen, what it means, what to do."""
    # said once, with what is said first
    rest = f". {_EFFECT}. {_remedy(found, spec, largest_input)}"
    troubles: list[tuple[Kind, str]] = []
    if found.n_exploded and found.n_exploded >= found.n_models * 0.01:
        troubles.append(
            (
                "exploding",
                f"errors exploded: {_count(found.n_exploded, 'model has', 'models have')} an R2 below "
                f"{EXPLODED_R2:.0f}, of {found.n_models:,} scored (mean {_r2(found.score)}, median "
                f"{_r2(found.median)}; always saying the mean has 0){rest}",
            )
        )
    only_some_exploded = bool(troubles) and found.median > found.baseline
    if found.verdict == "no better" and not only_some_exploded:
        troubles.append(("no better", f"models have not learned: {_behind(found)}{'' if troubles else rest}"))
    if found.n_constant > found.n_models * _MANY_MODELS and found.verdict not in ("unknown", "too few"):
        said = "number" if found.measure == "r2" else "class" if found.unit == "test examples" else "token"
        troubles.append(
            (
                "constant",
                f"{found.n_constant:,} of {_count(found.n_models, 'model says', 'models say')} one {said} for all "
                f"{found.unit}, whatever the inputs are{'' if troubles else rest}",
            )
        )
    if found.unvarying >= _MANY_TARGETS:
        of = "every test example" if found.unvarying == 1 else f"{found.unvarying:.0%} of test examples"
        troubles.append(
            (
                "unvarying",
                f"outputs never vary: {found.n_compared:,} models on different subsets have one and the same output of "
                f"{of}. Datamodels have nothing to predict there. Check that training uses the subset and "
                "the seed that it is given, and that outputs are not cut off or rounded to one value; then create "
                "another run",
            )
        )
    return troubles


_EFFECT = "Datamodels of such models predict noise, not learning, however high their LDS"


def _behind(found: Learned) -> str:
    if found.measure == "r2":
        return (
            f"R2 is {_r2(found.score)} on average over {_count(found.n_models, 'model', 'models')} (95% interval "
            f"{_r2(found.low)} to {_r2(found.high)}, median {_r2(found.median)}), no better than always saying the "
            f"mean, 0{_left_out(found)}"
        )
    return (
        f"they are right on {_share(found.score)} of {found.unit} (95% interval over "
        f"{_count(found.n_models, 'model', 'models')} {_share(found.low)} to {_share(found.high)}), no better than "
        f"always saying the commonest class, {found.commonest}, on {_share(found.baseline)}{_left_out(found)}"
    )


def _left_out(found: Learned) -> str:
    """State what left-out examples tell, where they tell more than the test examples."""
    if found.low <= found.baseline or not found.left_out <= found.left_out_baseline + _ROUNDING:
        return ""
    if found.measure == "r2":
        return f", as left-out training examples show: R2 {_r2(found.left_out)}"
    of = f"{_share(found.left_out)} against {_share(found.left_out_baseline)}"
    return f", as left-out training examples show: {of}"


def _remedy(found: Learned, spec: RunSpec, largest_input: float | None) -> str:
    """State what to do, by what is the likeliest cause."""
    settings = spec.recipe.overrides
    if spec.recipe.name == "function":
        return (
            "Check what recipe.function trains and returns, whether it scales inputs and labels, and that outputs and "
            "labels are in the dataset's order"
        )
    if largest_input is not None and largest_input > LARGEST_PLAIN_INPUT:
        return (
            f"Inputs reach {largest_input:,.4g} and are not standardised: create another run with `dmpipeline init "
            "OTHER --spec RUN/run.yaml --inputs standardised`"
        )
    lr = f" from {settings['lr']:g}" if isinstance(settings.get("lr"), int | float) else ""
    if found.measure == "r2":
        return (
            f"Scale labels to a mean of 0 and a standard deviation of 1 if they are not, or lower the recipe's lr{lr}, "
            "in another run; and check that labels and inputs are in one order"
        )
    return (
        f"Check that labels and inputs are in one order; else create another run with another lr{lr}, more epochs or "
        f"larger subsets than alpha {spec.alpha:.0%}, and look at `dmpipeline status RUN` after its first block"
    )


def _known(scores: Floats) -> Floats:
    return scores[~np.isnan(scores)]


def _share(value: float) -> str:
    return f"{value:.1%}"


def _r2(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"


def _count(n: int, one: str, more: str) -> str:
    return f"{n:,} {one if n == 1 else more}"
