"""What is measured of a trained model: functions of (logits, labels) that give one number a target.

They are plain functions of arrays, so that whoever holds logits can recompute what a run stored, bit for bit.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from dmpipeline.errors import SpecError

# A margin is a difference of two logits: within this bound on logits it always fits float16, whose largest is 65,504.
LARGEST_LOGIT = 32_752.0


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
    wide = logits.astype(np.float32)
    examples = np.arange(len(labels))
    true = wide[..., examples, labels]
    wide[..., examples, labels] = -np.inf
    # class by class: NumPy's own maximum over so short an axis is slower
    rival = wide[..., 0].copy()
    for other in range(1, n_classes):
        np.maximum(rival, wide[..., other], out=rival)
    return np.asarray(true - rival)
