"""Scores, fits and what a page's words mean, in sentences and small tables."""

import math
from collections.abc import Mapping

import numpy as np

from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.runs.learned import Learned
from dmpipeline.scoring.evaluation import Evaluation, readable_score

BETTER = {"margin": "higher", "log likelihood": "higher", "squared error": "lower"}
"""Whether more or less of an output is better, where either is."""

_LARGE = 1e6

FOOTER = (
    "Datamodels: Ilyas, Park, Engstrom, Leclerc and Madry, arXiv 2202.00622, 2022. Made by dmpipeline; this "
    "page asks no server for anything."
)


def summary(evaluation: Evaluation, *, n_models: int | None, output: str, remark: str = "") -> str:
    """State in two sentences how good datamodels are."""
    e = evaluation
    if math.isnan(e.lds):
        return f"None of the {e.n_targets:,} targets varies over the held-out subsets, so there is nothing to predict."
    text = (
        f"From {_models(n_models)} trained on random subsets, the datamodels learned to predict the {output} of "
        f"{e.n_targets:,} targets. On {e.n_subsets:,} subsets they had not seen, each trained "
        f"{_times(e.n_retrainings)}, the mean LDS is {_number(e.lds, 3)} "
        f"({e.level:.0%} interval {_number(e.lds_low, 3)} to {_number(e.lds_high, 3)})"
    )
    share = e.lds_ratio
    if math.isnan(share):
        return f"{text}.{remark}"
    return f"{text}, which is {share:.0%} of what the noise of training allows ({_number(e.lds_ceiling, 3)}).{remark}"


def models_sentence(learned: Learned | None) -> str:
    """State how good the models are, next to always saying the commonest class; nothing where that is not known."""
    sentence = "" if learned is None else learned.sentence()
    return f"The {sentence}." if sentence else ""


def tiles(evaluation: Evaluation, learned: Learned | None, *, output: str) -> list[dict[str, str]]:
    """List the figures to show large, each with what it means."""
    e = evaluation
    share = e.lds_ratio
    facts = {
        f"LDS, against the average of {e.n_retrainings} retrainings": _number(e.lds, 3),
        "noise ceiling of the LDS": _number(e.lds_ceiling, 3),
        "of the ceiling reached": "not defined" if math.isnan(share) else f"{share:.0%}",
        "LDS against single retrainings": _number(e.lds_single, 3),
        "of a single retraining's variance explained (R\N{SUPERSCRIPT TWO})": _number(e.r2),
        f"mean squared error, in squared units of the {output}": _number(e.mse),
    }
    return _model_tiles(learned) + [{"value": value, "meaning": meaning} for meaning, value in facts.items()]


def words_used(*, nouns: Mapping[str, str], output: str, alpha: float | None, n_models: int | None) -> list[list[str]]:
    """List the words that a reader of the page needs, with their meaning."""
    target, example = nouns["targets"], nouns["train"]
    called = {"higher": " Helpers have a weight above zero, harmers below.", "lower": " Below zero it makes it better."}
    words = [
        [
            "datamodel",
            f"A linear function from which {example}s a model is trained on to its {output} on one {target}, fitted to "
            f"{_models(n_models)}.",
        ],
        [
            "weight",
            f"By how much the {output} of a {target} changes when one {example} joins the training set."
            f"{called.get(BETTER.get(output, ''), '')}",
        ],
    ]
    if output == "margin":
        words += [
            ["margin", "The logit of the true class less the largest other: above zero, the prediction is right."],
            ["flips", "A prediction flips when its margin falls below zero: another class has the largest logit."],
        ]
    if alpha is not None:
        words.append(["alpha", f"The share of the training set that each model was trained on, here {alpha:.0%}."])
    return [
        *words,
        [
            "LDS",
            f"Linear datamodeling score: the rank correlation of predicted and true {output}s over held-out subsets; 1 "
            "is perfect. Its ceiling is what the noise of training allows.",
        ],
        ["estimated", "Foreseen by a datamodel. Certified or measured means that models were trained to see."],
    ]


def fit_rows(datamodels: Datamodels, evaluation: Evaluation | None, *, n_models: int | None) -> list[list[str]]:
    """List facts of a fit."""
    support = np.count_nonzero(datamodels.weight, axis=0)
    rows = [
        ["Models fitted on", "not recorded" if n_models is None else f"{n_models:,}"],
        ["Targets", f"{datamodels.n_targets:,}"],
        ["Training examples", f"{datamodels.n_train:,}"],
        ["Nonzero weights of a target, median", f"{np.median(support):,.0f}"],
        ["Penalty lam, median", f"{np.median(datamodels.lam):.3g}"],
    ]
    if evaluation is not None:
        rows.append(["Targets that never vary, left out", f"{evaluation.n_constant:,}"])
        if evaluation.decomposition is not None:
            parts = evaluation.decomposition.in_words()
            rows += [[f"Mean squared error: {name.strip()}", f"{value}; {says}"] for (name, value), says in parts]
            rows.append(["Advice", evaluation.decomposition.advice])
    if datamodels.certificate is not None:
        rows += [
            ["Worst duality gap, share of the variance", f"{datamodels.certificate.gap.max():.1e}"],
            ["Worst broken optimality condition, share of lam", f"{datamodels.certificate.kkt.max():.1e}"],
        ]
    return rows


def as_rows(facts: Mapping[str, object]) -> list[list[str]]:
    """Turn named facts into rows of a table."""
    return [[name, str(value)] for name, value in facts.items()]


def _model_tiles(learned: Learned | None) -> list[dict[str, str]]:
    if learned is None or math.isnan(learned.score):
        return []
    meaning = f"of {learned.unit} the models are right on"
    if learned.measure == "r2":
        meaning = "R\N{SUPERSCRIPT TWO} of the models; always saying the mean has 0"
    elif not math.isnan(learned.baseline):
        meaning += f"; always saying {learned.commonest} would be on {learned.baseline:.1%}"
    return [{"value": learned.figure().replace("-", "\N{MINUS SIGN}"), "meaning": meaning}]


def _number(value: float, digits: int = 2) -> str:
    if abs(value) >= _LARGE:
        return f"{value:.2e}"
    return readable_score(value, digits=digits).replace("-", "\N{MINUS SIGN}")


def _models(n_models: int | None) -> str:
    return "models" if n_models is None else f"{n_models:,} models"


def _times(n: int) -> str:
    return {1: "once", 2: "twice"}.get(n, f"{n} times")
