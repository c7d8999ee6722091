"""Training labels that may be wrong: those that models which were not trained on an example do not believe."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from dmdata.reading.long_work import shows_count
from dmpipeline.applications.evidence import Evidence, run_at
from dmpipeline.errors import SpecError
from dmpipeline.fitting.fitted import load_datamodels
from dmpipeline.runs.store import Run
from dmpipeline.runs.targets import datamodels_path
from dmpipeline.tables import Table
from dmpipeline.workflow.run_arrays import open_rows

_JUDGED = ("logits", "margins", "log_likelihoods", "predictions", "squared_errors")
_BLOCK_BYTES = 2**25


@dataclass(frozen=True, slots=True)
class Suspect:
    """A training example, and how suspect its label is.

    Attributes
    ----------
    index : int
        From 0.
    label : int, float, or None
        As the dataset has it; None where it is more than one number.
    suggested : int, float, or None
        Class or number that models predict that were not trained on the example; None where what a run stores does not
        say, or it is more than one number.
    score : float
        From 0 to 1, the most suspect: 1 - (probability of the label), or of margins 1 / (1 + e^margin), averaged over
        models that were not trained on the example. Where no probability is predicted, as in a regression, the share of
        training examples with a smaller error.
    own_weight : float or None
        Of the example in its own datamodel, in the output's units: large where its label is only remembered. None where
        datamodels of training examples were not fitted.
    """

    index: int
    label: int | float | None
    suggested: int | float | None
    score: float
    own_weight: float | None


@dataclass(frozen=True, slots=True, repr=False)
class Suspects(Table[Suspect]):
    """Training examples, the most suspect first.

    Attributes
    ----------
    array : str
        What was read of the models.
    n_models : int
        Models read.
    n_unjudged : int
        Training examples that all models were trained on, so that nothing is said of them.
    """

    name: ClassVar[str] = "suspects"

    array: str
    n_models: int
    n_unjudged: int


@shows_count("comparing", "models")
def suspects(
    run: Run | Evidence | str | os.PathLike[str],
    *,
    top: int = 100,
    progress: Callable[[int, int], None] | None = None,
) -> Suspects:
    """Rank training examples by how little models that were not trained on them believe their labels.

    Each model of a run leaves a part of the training set out, so that what is cross-validation elsewhere is there: with
    alpha 50%, half of the models have not seen an example (as confident learning asks of its probabilities, Northcutt,
    Jiang and Chuang 2021).

    Parameters
    ----------
    run : Run, path or Evidence
        Complete, with logits, margins or log-likelihoods of training examples; predictions or squared errors of a
        regression.
    top : int
        How many to return.
    progress : callable, optional
        Called with (models read, models in total).

    Raises
    ------
    SpecError
        If `top` is less than 1, or the run stores none of these.
    IncompleteRunError
        If rows are missing.

    Notes
    -----
    Models are read in blocks of 32 MiB, or one at a time where that is more.
    """
    if top < 1:
        raise SpecError(f"top is {top}; choose 1 or more", field="top", value=top)
    run = run_at(run, "what models say of examples that they were not trained on is")
    array = next((f"train_{name}" for name in _JUDGED if f"train_{name}" in run.spec.arrays), None)
    if array is None:
        raise SpecError(
            f"{run.path} stores none of {', '.join(_JUDGED)} of training examples, by which labels are judged; create "
            "another run with --outputs margins,logits",
            field="outputs",
            value=list(run.spec.outputs),
        )
    run.require_complete()
    dataset = run.dataset()
    sums, n_out = _sums_left_out(run, array, progress)
    judged = np.flatnonzero(n_out)
    mean = sums[judged] / n_out[judged].reshape(-1, *[1] * (sums.ndim - 1))
    labels = dataset.train_labels[judged]
    score, suggested = _suspicion(array.removeprefix("train_"), mean, labels)
    path = datamodels_path(run, "train")
    own = load_datamodels(run, "train").weight.diagonal() if path.exists() else None
    order = np.argsort(-score, kind="stable")[:top]
    rows = [
        Suspect(
            index=int(judged[place]),
            label=labels[place].item() if labels.ndim == 1 else None,
            suggested=None if suggested is None else suggested[place].item(),
            score=float(score[place]),
            own_weight=None if own is None else float(own[judged[place]]),
        )
        for place in order
    ]
    return Suspects(tuple(rows), array=array, n_models=run.spec.n_models, n_unjudged=dataset.n_train - len(judged))


def _sums_left_out(
    run: Run, array: str, progress: Callable[[int, int], None] | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Add up what models say of the examples they were not trained on, and count these models.

    Of logits it is class probabilities that are added, (n_train, n_classes).
    """
    rows = run.spec.rows.models
    masks, outputs = open_rows(run, "train_masks", rows), open_rows(run, array, rows)
    n_models, step = outputs.shape[0], max(1, _BLOCK_BYTES // (8 * math.prod(outputs.shape[1:])))
    sums, n_out = np.zeros(outputs.shape[1:]), np.zeros(outputs.shape[1], np.int64)
    for start in range(0, n_models, step):
        is_out = ~np.asarray(masks[start : start + step], np.bool_)
        said = np.asarray(outputs[start : start + step], np.float64)
        if array == "train_logits":
            odds = np.exp(said - said.max(-1, keepdims=True))
            said = odds / odds.sum(-1, keepdims=True)
        sums += np.einsum("mi,mi...->i...", is_out, said)
        n_out += is_out.sum(0)
        if progress is not None:
            progress(min(start + step, n_models), n_models)
    return sums, n_out


def _suspicion(
    output: str, mean: npt.NDArray[np.float64], labels: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[Any] | None]:
    """Return scores of examples by their mean outputs, and the labels these suggest."""
    if output == "logits" and labels.ndim == 1:
        return 1 - mean[np.arange(len(mean)), labels], mean.argmax(1)
    if output == "logits":  # at each position of a sequence; -1 where nothing is to be predicted
        there = np.maximum(labels, 0)[..., None]
        believed = np.take_along_axis(mean, there, 2)[..., 0]
        return 1 - np.average(believed, axis=1, weights=labels >= 0), None
    if output == "margins":
        return 1 / (1 + np.exp(np.clip(mean, -500, 500))), None
    if output == "log_likelihoods":
        return _shares(-mean), None
    if output == "squared_errors":
        return _shares(mean), None
    error = np.abs(mean - labels) if labels.ndim == 1 else np.linalg.norm(mean - labels, axis=1)
    return _shares(error), mean if labels.ndim == 1 else None


def _shares(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return for each value which share of all is smaller."""
    shares: npt.NDArray[np.float64] = np.searchsorted(np.sort(values), values, "left") / len(values)
    return shares
