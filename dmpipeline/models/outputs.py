"""What is measured of a trained model: functions of (logits, labels) that return one number a target.

They are plain functions of arrays, so that anyone who has logits can recompute what a run stored, bit for bit.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dmpipeline.compute import kernel_when_called
from dmpipeline.data.examples import Dataset
from dmpipeline.errors import SpecError
from dmpipeline.spec import OutputName

if TYPE_CHECKING:
    import torch

# A margin is a difference of two logits: within this bound on logits it always fits float16, whose largest is 65,504.
LARGEST_LOGIT = 32_752.0

_WIDENED_NUMBERS = 2**20  # logits at a time


def correct_class_margins(logits: npt.NDArray[np.floating[Any]], labels: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Measure how far each example's true class leads its best rival.

    Parameters
    ----------
    logits : array of float, shape (..., n_examples, n_classes)
        Raw outputs, before softmax, usually with models in front; float16 is widened first.
    labels : array of int, shape (n_examples,)
        True classes, from 0 to n_classes - 1.

    Returns
    -------
    margins : array of float32, shape (..., n_examples)
        In logit units; negative where a rival leads. Exact to float32's rounding of one subtraction.

    Raises
    ------
    SpecError
        If shapes disagree, there are fewer than two classes, or a label is none of them.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim < 2 or labels.shape != logits.shape[-2:-1] or logits.shape[-1] < 2:
        raise SpecError(
            f"logits of shape {logits.shape} and labels of shape {labels.shape} do not belong together; "
            f"give logits (..., n_examples, n_classes) with two classes or more, and labels (n_examples,)"
        )
    n_classes = logits.shape[-1]
    if labels.dtype.kind not in "iu" or (labels.size and not (labels.min() >= 0 and labels.max() < n_classes)):
        raise SpecError(f"labels are to be integers from 0 to {n_classes - 1}, the {n_classes} classes of the logits")
    margins = np.empty(logits.shape[:-1], np.float32)
    n_rows = math.prod(logits.shape[:-2])
    rows, leads = logits.reshape(n_rows, *logits.shape[-2:]), margins.reshape(n_rows, len(labels))
    step = max(1, _WIDENED_NUMBERS // max(1, len(labels) * n_classes))
    for start in range(0, n_rows, step):
        some = slice(start, start + step)
        _take_leads(_widened(rows[some]), labels.astype(np.int64, copy=False), leads[some])
    return margins


def _widened(numbers: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Convert to float32, by torch, which is several times as fast with float16 as NumPy."""
    wide: npt.NDArray[np.float32] = as_tensor(np.ascontiguousarray(numbers)).float().numpy()
    return wide


def as_tensor(numbers: npt.NDArray[Any]) -> "torch.Tensor":
    """View an array as a tensor, which must not be written to where the array is read-only, as a memory map.

    torch would warn of such an array, and Python cannot silence a warning in one thread alone.
    """
    import torch  # takes a second, and reading a run does without

    if numbers.flags.writeable:
        return torch.from_numpy(numbers)
    return torch.from_numpy(np.asarray(_Writable(numbers)))


class _Writable:
    """Lends an array's memory as if it might be written to, and keeps it alive."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        facts = array.__array_interface__
        self.array, self.__array_interface__ = array, facts | {"data": (facts["data"][0], False)}


@kernel_when_called
def _take_leads(logits, labels, leads):  # type: ignore[no-untyped-def]
    for row in range(len(logits)):
        for example in range(len(labels)):
            of_classes, label = logits[row, example], labels[example]
            rival, n_odd = np.float32(-np.inf), 0
            for other in range(len(of_classes)):
                logit = of_classes[other]
                n_odd += logit != logit
                rival = max(rival, logit if other != label else np.float32(-np.inf))
            leads[row, example] = of_classes[label] - rival if not n_odd else np.float32(np.nan)


def log_likelihoods(logits: npt.NDArray[np.floating[Any]], labels: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Measure the log probability that each example's true class has, or all true tokens of a sequence together.

    Parameters
    ----------
    logits : array of float, shape (..., n_examples, n_classes) or (..., n_examples, n_positions, n_classes)
    labels : array of int, shape (n_examples,) or (n_examples, n_positions)
        -1 where a position of a sequence has nothing to predict; it counts for nothing.

    Returns
    -------
    log_likelihoods : array of float32, shape (..., n_examples)
        In nats, at most 0; summed in float64.
    """
    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    true = np.take_along_axis(wide, np.broadcast_to(np.maximum(labels, 0), wide.shape[:-1])[..., None], -1)[..., 0]
    found = true - np.log(np.exp(wide).sum(-1))
    if labels.ndim == 2:
        found = np.where(labels >= 0, found, 0).sum(-1)
    return np.asarray(found, np.float32)


def predicted_labels(logits: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.int32]:
    """Name the class of the largest logit, the first of equals; shape (..., n_examples[, n_positions])."""
    return np.asarray(np.asarray(logits).argmax(-1), np.int32)


def squared_errors(predictions: npt.NDArray[np.floating[Any]], labels: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Measure the squared distance of predictions (..., n_examples, k) from numbers (n_examples,) or (n_examples, k).

    Averaged over the k numbers of an example, as the loss is: shape (..., n_examples).
    """
    wide = np.asarray(predictions, np.float64)
    return np.asarray(np.square(wide - labels.reshape(*wide.shape[-2:])).mean(-1), np.float32)


@dataclass(frozen=True, slots=True)
class Output:
    """What is stored of models, and how it is taken from their raw outputs.

    Attributes
    ----------
    dtype : str
    measure : callable
        From raw outputs and labels to what is stored, before it is rounded to `dtype`.
    of_numbers : bool
        Whether it is of regressions, not of classes.
    """

    dtype: str
    measure: Callable[[npt.NDArray[Any], npt.NDArray[Any]], npt.NDArray[Any]]
    of_numbers: bool = False

    def __call__(self, raw: npt.NDArray[Any], labels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Measure and round."""
        return self.measure(raw, labels).astype(self.dtype, copy=False)


OUTPUTS: dict[OutputName, Output] = {
    "margins": Output("float16", correct_class_margins),
    "logits": Output("float16", lambda raw, _: raw),
    "log_likelihoods": Output("float32", log_likelihoods),
    "predicted_labels": Output("int32", lambda raw, _: predicted_labels(raw)),
    "predictions": Output("float32", lambda raw, labels: raw[..., 0] if labels.ndim == 1 else raw, of_numbers=True),
    "squared_errors": Output("float32", squared_errors, of_numbers=True),
}
"""All that can be stored, by name."""


def output_of(array: str) -> Output:
    """Look up what an array of outputs holds by its name, as `test_margins`."""
    return OUTPUTS[array.partition("_")[2]]  # type: ignore[index]


def dims_of(array: str, dataset: Dataset) -> dict[str, int]:
    """Name and measure the dimensions of an array of outputs but the first, which is models.

    Parameters
    ----------
    array : str
        As `test_logits`.
    dataset : Dataset
    """
    part, _, name = array.partition("_")
    dims = {f"{part}_example": dataset.n_train if part == "train" else dataset.n_test}
    if dataset.is_sequence and name in ("logits", "predicted_labels"):
        dims["position"] = dataset.train_labels.shape[1]
    if name == "logits":
        dims["class"] = dataset.n_classes
    if name == "predictions" and dataset.train_labels.ndim == 2:
        dims["number"] = dataset.n_classes
    return dims


def check_outputs(arrays: tuple[str, ...], dataset: Dataset) -> None:
    """Refuse outputs that a dataset's models do not have.

    Raises
    ------
    SpecError
    """
    for array in arrays:
        name = array.partition("_")[2]
        if output_of(array).of_numbers != dataset.is_regression or (dataset.is_sequence and name == "margins"):
            possible = ", ".join(default_outputs(dataset))
            kind = "numbers" if dataset.is_regression else "sequences" if dataset.is_sequence else "classes"
            raise SpecError(
                f"outputs {name} do not exist where {kind} are predicted, as of {dataset.name}; write for example "
                f"outputs: [{possible}]",
                field="outputs",
                value=name,
            )


def default_outputs(dataset: Dataset) -> tuple[OutputName, ...]:
    """Name what is stored unless the user says otherwise: what datamodels are fitted to first."""
    if dataset.is_regression:
        return ("squared_errors", "predictions")
    return ("log_likelihoods",) if dataset.is_sequence else ("margins", "logits")
