"""How often each trained model is right: whether it learned anything that datamodels could predict.

A model's score is its accuracy where classes or tokens are predicted, and R2 in a regression. It is taken twice: on the
test examples, and on the training examples that the model was not trained on. Scores are taken from raw outputs when
models are trained, as those are stored, so they can be recomputed from a run's logits; where a run has none on
record, `stored_scores` takes them from what is stored.
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dmpipeline.compute import kernel_when_called
from dmpipeline.data.examples import Dataset, largest_plain_input
from dmpipeline.models.outputs import output_of, predicted_labels
from dmpipeline.spec import RunSpec

if TYPE_CHECKING:
    from dmpipeline.training.logits import Logits

SCORES = ("test", "left_out", "left_out_baseline", "constant")
"""What is kept of each model, in the order of the columns, NaN where not defined.

`test` and `left_out` are the score on test examples and on left-out training examples; `left_out_baseline` is what the
commonest class of all training labels would score on the same left-out examples, 0 in a regression; `constant` is the
share of test examples, or positions, for which the model predicts its most frequent class: 1 means that it predicts
nothing else. In a regression it is 1 for equal predictions and else 0.
"""

_LEAST_SCORE = -1e30
# predictions this much closer together than labels are one prediction, rounded
_NO_SPREAD = 1e-5

Floats = npt.NDArray[np.float64]


def measure(
    arrays: Sequence[str], dataset: Dataset, masks: npt.NDArray[np.bool_], logits: "Logits"
) -> tuple[dict[str, npt.NDArray[Any]], Floats]:
    """Take from models' raw outputs what a run stores of them, and their scores.

    Parameters
    ----------
    arrays : sequence of str
        As `RunSpec.arrays`.
    dataset : Dataset
    masks : array of bool, shape (n_models, n_train)
    logits : Logits

    Returns
    -------
    block : dict of str to arrays
        Rows of each of the arrays.
    scores : array of float64, shape (n_models, 4)
        See `stored_scores`.
    """
    # all is taken from the rounded logits, so that it can be recomputed from those to the bit
    parts = {"test": (logits.test, dataset.test_labels), "train": (logits.train, dataset.train_labels)}
    names, raw = arrays[1:], "predictions" if dataset.is_regression else "logits"
    with ThreadPoolExecutor(len(names) + 1) as pool:
        known = {"train_masks": masks, f"test_{raw}": logits.test, f"train_{raw}": logits.train}
        scores = pool.submit(stored_scores, dataset, known)
        outputs = pool.map(lambda name: output_of(name)(*parts[name.partition("_")[0]]), names)
        return {"train_masks": masks} | dict(zip(names, outputs, strict=True)), scores.result()


def stored_scores(dataset: Dataset, block: Mapping[str, npt.NDArray[Any]]) -> Floats:
    """Score models by what a run stores of them, as far as that allows.

    Parameters
    ----------
    dataset : Dataset
    block : mapping of str to arrays
        Rows of a run's arrays, `train_masks` among them. Logits, predicted labels, predictions, squared errors and
        margins determine a score, log-likelihoods do not. Of margins, a tie counts as wrong.

    Returns
    -------
    scores : array of float64, shape (n_models, 4)
        Columns as in `SCORES`. R2 on test examples is 1 less the squared errors as a share of the test labels' own
        about their mean, as scikit-learn has it: the best that any one number could do is 0. On left-out examples,
        which may be a handful, errors are a share of the variance of all training labels. It is cut off at -1e30.
    """
    masks = block["train_masks"]
    scores = np.full((len(masks), len(SCORES)), np.nan)
    fill_in = _regression_scores if dataset.is_regression else _class_scores
    fill_in(dataset, block, masks, scores)
    return scores


def baseline_facts(dataset: Dataset, spec: RunSpec) -> dict[str, Any]:
    """State what the scores of a dataset's models are to be compared with; plain values, for JSON.

    Returns
    -------
    facts : dict
        `measure`, accuracy or r2; `unit`, what a share is of; `baseline`, the accuracy of always saying the commonest
        class of the training labels on the test examples, or 0 for R2, None where no test example has a label;
        `commonest`, that class, by name where it has one; `largest_input`, the largest number among the first examples'
        inputs where models are given it as it is, else None.
    """
    facts: dict[str, Any] = {"measure": "r2", "unit": "test examples", "baseline": 0.0, "commonest": None}
    if not dataset.is_regression:
        commonest = _commonest_class(dataset)
        known = dataset.test_labels[dataset.test_labels >= 0]
        facts["measure"] = "accuracy"
        facts["unit"] = "positions of the test sequences" if dataset.is_sequence else "test examples"
        facts["baseline"] = float((known == commonest).mean()) if known.size else None
        facts["commonest"] = dataset.name_of(commonest)
    is_plain = spec.inputs != "standardised"
    return facts | {"largest_input": largest_plain_input(dataset) if is_plain else None}


def _commonest_class(dataset: Dataset) -> int:
    labels = dataset.train_labels
    return int(np.bincount(labels[labels >= 0]).argmax())


def _class_scores(
    dataset: Dataset, block: Mapping[str, npt.NDArray[Any]], masks: npt.NDArray[np.bool_], scores: Floats
) -> None:
    """Fill in the scores of classifiers."""
    of_commonest = dataset.train_labels == _commonest_class(dataset)
    n_left_out = _left_out_sums(masks, dataset.train_labels[None] >= 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        scores[:, 2] = _left_out_sums(masks, of_commonest[None]) / n_left_out
        for part, labels in (("test", dataset.test_labels), ("train", dataset.train_labels)):
            said = _said(block, part)
            if said is not None:
                # where a position has no label it is -1, which no model predicts
                right: npt.NDArray[np.bool_] = said == labels
            elif f"{part}_margins" in block:
                right = block[f"{part}_margins"] > 0
            else:
                continue
            if part == "train":
                scores[:, 1] = _left_out_sums(masks, right) / n_left_out
                continue
            scores[:, 0] = right.reshape(len(right), -1).sum(1) / (labels >= 0).sum()
            if said is not None:
                scores[:, 3] = _commonest_share(said.reshape(len(said), -1)[:, labels.ravel() >= 0])


def _left_out_sums(masks: npt.NDArray[np.bool_], flags: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Count the flags on each model's left-out examples; of shape (n_models or 1, n_train[, n_positions])."""
    if flags.ndim == 2:
        return np.asarray((flags & ~masks).sum(1), np.int64)
    return np.asarray(np.where(masks, 0, flags.sum(2)).sum(1), np.int64)


def _said(block: Mapping[str, npt.NDArray[Any]], part: str) -> npt.NDArray[np.int32] | None:
    """Return the class that each model predicts for each example; None where what is stored does not determine it."""
    if f"{part}_logits" not in block:
        return block.get(f"{part}_predicted_labels")
    logits = block[f"{part}_logits"]
    if logits.dtype != np.float16:
        return predicted_labels(logits)
    said = np.empty(logits.shape[:-1], np.int32)
    bits = np.ascontiguousarray(logits).view(np.int16)
    _take_largest(bits.reshape(-1, logits.shape[-1]), said.reshape(-1))
    return said


@kernel_when_called
def _take_largest(bits, said):  # type: ignore[no-untyped-def]
    """Find the first largest of each row of float16 numbers by their bits, sign and magnitude: ten times as fast."""
    for row in range(len(bits)):
        best, largest = 0, np.int32(-(2**16))
        for place in range(bits.shape[1]):
            number = np.int32(bits[row, place])
            number = number if number >= 0 else -(2**15) - number
            if number > largest:
                best, largest = place, number
        said[row] = best


def _commonest_share(said: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if not said.shape[1]:
        return np.full(len(said), np.nan)
    return np.array([np.bincount(of_model).max() / said.shape[1] for of_model in np.maximum(said, 0)])


def _regression_scores(
    dataset: Dataset, block: Mapping[str, npt.NDArray[Any]], masks: npt.NDArray[np.bool_], scores: Floats
) -> None:
    """Fill in the scores of regressions."""
    scores[:, 2] = 0
    for part, labels in (("test", dataset.test_labels), ("train", dataset.train_labels)):
        wide = labels.reshape(len(labels), -1).astype(np.float64)
        variance = float(np.square(wide - wide.mean(0)).sum(1).mean())
        predictions, given = block.get(f"{part}_predictions"), block.get(f"{part}_squared_errors")
        for model, mask in enumerate(masks):
            if predictions is not None:
                own = predictions[model].reshape(wide.shape).astype(np.float64)
                errors = np.square(own - wide).sum(1)
            elif given is not None:
                errors = given[model].astype(np.float64) * wide.shape[1]
            else:
                break
            if part == "train":
                scores[model, 1] = _r2(errors[~mask], variance)
                continue
            scores[model, 0] = _r2(errors, variance)
            if predictions is not None:
                scores[model, 3] = bool((np.ptp(own, axis=0) <= _NO_SPREAD * np.ptp(wide, axis=0)).all())


def _r2(errors: npt.NDArray[np.float64], variance: float) -> float:
    if not len(errors) or variance == 0:
        return math.nan
    return max(1 - float(errors.mean()) / variance, _LEAST_SCORE)
