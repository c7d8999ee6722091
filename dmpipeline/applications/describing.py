"""Examples in a few words: their labels as the user calls them, and their inputs for tables in a terminal."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dmpipeline.applications.evidence import Evidence
from dmpipeline.data.examples import Dataset
from dmpipeline.fitting.influences import Label
from dmpipeline.runs.targets import TargetsName

_COLUMNS = 5
_TOKENS = 12
_SHADES = " ░▒▓█"
_MOST_PIXELS = 12


def described(evidence: Evidence, part: TargetsName) -> Callable[[int], str]:
    """Return what describes examples of a part of the dataset in a few words; nothing where no dataset is known."""
    if evidence.run is None:
        return lambda _: ""
    dataset = evidence.dataset()
    inputs = dataset.train_inputs if part == "train" else dataset.test_inputs
    return lambda index: example_in_words(dataset, inputs[index])


def label_names(evidence: Evidence) -> tuple[Callable[[int], Label], Callable[[int], Label]]:
    """Return what calls training examples and targets by their labels; None where labels are not known."""
    class_names = None if evidence.run is None else evidence.dataset().class_names

    def naming(labels: npt.NDArray[Any] | None) -> Callable[[int], Label]:
        return lambda i: None if labels is None else label_of(labels[i], class_names)

    of_train, of_targets = evidence.labels()
    return naming(of_train), naming(of_targets)


def label_of(label: Any, class_names: Sequence[str] | None) -> Label:
    """Return a label as the user calls it: a class's name or number, or a regression's number; None for several."""
    if np.ndim(label):
        return None
    plainly: int | float = label.item()
    return plainly if class_names is None else class_names[int(plainly)]


def example_in_words(dataset: Dataset, example: Any) -> str:
    """Describe one example's inputs.

    Parameters
    ----------
    dataset : Dataset
    example : array
        One of its inputs.

    Returns
    -------
    words : str
        The first columns of a table, by name; of a row that is mostly 0, as a text's counts of words, those of the
        largest values; the first tokens of a text; nothing of a picture.
    """
    if dataset.image_shape is not None:
        return ""
    values = np.asarray(example).reshape(-1)
    if values.dtype.kind == "i":
        return " ".join(map(str, values[:_TOKENS].tolist())) + (" ..." if len(values) > _TOKENS else "")
    names = dataset.feature_names or [f"column {i}:" for i in range(len(values))]
    columns, there = np.arange(len(values)), np.flatnonzero(values)
    if len(values) > _COLUMNS and 0 < len(there) < len(values) / 2:
        columns = there[np.argsort(-np.abs(values[there]), kind="stable")]
    shown = [f"{names[column]} {values[column]:.4g}" for column in columns[:_COLUMNS].tolist()]
    return ", ".join(shown) + (", ..." if len(columns) > _COLUMNS else "")


def shades(dataset: Dataset, example: Any) -> list[str]:
    """Draw a picture in shades of gray, a line of text a row of pixels; one without pictures has no lines.

    Parameters
    ----------
    dataset : Dataset
    example : array
        One of its inputs.

    Returns
    -------
    lines : list of str
        Of one length each, two characters a pixel; at most 12 rows, larger pictures are averaged down.
    """
    if dataset.image_shape is None:
        return []
    picture = np.asarray(example, np.float64).reshape(dataset.image_shape)
    if picture.ndim == 3:
        picture = picture.mean(axis=2)
    step = -(-max(picture.shape) // _MOST_PIXELS)
    down, across = (min(step, size) for size in picture.shape)  # flat ones are thinner than a step
    height, width = picture.shape[0] // down * down, picture.shape[1] // across * across
    picture = picture[:height, :width].reshape(height // down, down, width // across, across).mean(axis=(1, 3))
    low, high = picture.min(), picture.max()
    levels = np.round((picture - low) / (high - low or 1) * (len(_SHADES) - 1)).astype(int)
    return ["".join(_SHADES[level] * 2 for level in row) for row in levels.tolist()]
