"""What labels mean: classes by name, numbers of a regression, or tokens; inferred only where there is no doubt.

Text, bools and one-hot rows are classes. Whole numbers are classes where they are few, or number many examples each
from 0 or 1 without a gap. Floats are numbers of a regression, unless all of them are whole and several examples share
each. What is in doubt is refused, with how to say it. Classes are numbered by their sorted names, or by size where
those are numbers, over train and test together.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dmpipeline.data.examples import Task, unusable
from dmpipeline.errors import SpecError

# Up to 20 different whole numbers are surely classes; more are if each has 10 examples, and none is left out.
_SURELY_CLASSES = 20
_EXAMPLES_A_CLASS = 10
# Whole floats that fewer examples share than this, on average, are surely amounts.
_SHARED_BY = 5

_SAY = "--task {0} on the command line, task: {0} in run.yaml, or task={0!r} of save_dataset"


@dataclass(frozen=True, slots=True)
class Labels:
    """Labels that were understood.

    Attributes
    ----------
    task : {"classification", "regression", "tokens"}
    train, test : array
        int64 classes (n,) from 0; float numbers (n,) or (n, k); or integer tokens (n, n_positions).
    class_names : tuple of str, or None
        Of a classification, unless the classes were given as 0 to n_classes - 1.
    """

    task: Task
    train: npt.NDArray[Any]
    test: npt.NDArray[Any]
    class_names: tuple[str, ...] | None


def understood(
    source: str | Path,
    train: npt.NDArray[Any],
    test: npt.NDArray[Any],
    *,
    task: Task | None,
    tokens_shape: tuple[int, ...] | None,
    names: tuple[str, ...] | None = None,
) -> Labels:
    """Find out what labels mean, or make of them what the user says that they mean.

    Parameters
    ----------
    source : str or path
        What an error calls the dataset.
    train, test : array of bool, int, uint, float or str, shape (n, ...)
        Without missing values.
    task : {"classification", "regression", "tokens"}, optional
        What the user says.
    tokens_shape : tuple of int, or None
        Shape of the training inputs where these are whole numbers, which may be tokens.
    names : tuple of str, optional
        Names of classes 0, 1, ..., or of the columns of one-hot rows.

    Raises
    ------
    SpecError
        If there is doubt, or labels cannot be what is said.
    """
    if task != "tokens":
        train, test = (part[:, 0] if part.ndim == 2 and part.shape[1] == 1 else part for part in (train, test))
    _check_kinds_agree(source, train, test)
    found = task or _inferred(source, train, test, tokens_shape)
    if found == "classification":
        return _classes(source, train, test, names)
    if train.dtype.kind not in "biuf" or (found == "tokens" and train.dtype.kind not in "iu"):
        what = "numbers" if found == "regression" else "whole numbers"
        raise unusable(source, f"train_labels of {_called(train)}", f"is to be {what} for task {found}; convert them")
    if found == "regression":
        return Labels(found, train.astype(np.float64), test.astype(np.float64), None)
    return Labels(found, train, test, None)


def _inferred(
    source: str | Path, train: npt.NDArray[Any], test: npt.NDArray[Any], tokens_shape: tuple[int, ...] | None
) -> Task:
    kind = train.dtype.kind
    if _is_one_hot(train) and _is_one_hot(test):
        return "classification"
    if train.ndim == 1:
        if kind in "Ub":
            return "classification"
        whole = kind in "iu" or all(bool((part == np.round(part)).all()) for part in (train, test))
        if not whole:
            return "regression"
        values = np.unique(np.concatenate([np.unique(train), np.unique(test)]))
        if kind in "iu" and _are_surely_classes(values, len(train)):
            return "classification"
        if kind == "f" and len(values) > _SURELY_CLASSES and len(train) < _SHARED_BY * len(values):
            return "regression"
        raise _doubt(source, train, f"with {len(values):,} different whole numbers", values, "classification")
    if kind == "f" and not ({*np.unique(train)} <= {0, 1}):
        return "regression"
    if kind in "iu" and train.shape == tokens_shape:
        if train.max() > 1 or train.min() == -1:
            return "tokens"
        raise _doubt(source, train, "of 0 and 1 alone", np.unique(train), "tokens")
    if kind in "iu" and not set(np.unique(train).tolist()) <= {0, 1}:
        raise unusable(
            source,
            f"train_labels of {train.dtype}, shape {train.shape}",
            "is to go with tokens of the same shape; for a regression of several numbers give floats, or say "
            + _SAY.format("regression"),
        )
    raise unusable(
        source,
        f"train_labels of {_called(train)}, shape {train.shape},",
        f"is to be one label an example, ({len(train)},), or one-hot rows; several classes an example are not known: "
        "make a dataset of each, or numbers of a regression, by " + _SAY.format("regression"),
    )


def _are_surely_classes(values: npt.NDArray[Any], n_examples: int) -> bool:
    n_classes = len(values)
    if n_classes <= 2:
        return True
    if n_classes <= _SURELY_CLASSES:
        return 2 * n_classes <= n_examples
    has_no_gap = int(values[-1]) - int(values[0]) == n_classes - 1 and int(values[0]) in (0, 1)
    return has_no_gap and n_examples >= _EXAMPLES_A_CLASS * n_classes


def _classes(
    source: str | Path, train: npt.NDArray[Any], test: npt.NDArray[Any], names: tuple[str, ...] | None
) -> Labels:
    if train.ndim == 2:
        if not (_is_one_hot(train) and _is_one_hot(test)):
            raise unusable(
                source,
                f"train_labels of {_called(train)}, shape {train.shape},",
                f"is to be one class an example, ({len(train)},), or one-hot rows, with a single 1 each",
            )
        train, test = train.argmax(1), test.argmax(1)
    elif train.ndim != 1:
        raise unusable(
            source, f"train_labels of shape {train.shape}", f"is to be one class an example, ({len(train)},)"
        )
    if train.dtype.kind == "f":
        if any((part != np.round(part)).any() for part in (train, test)):
            raise unusable(
                source, "train_labels with fractions", "is to be whole numbers for task classification; round them"
            )
        train, test = train.astype(np.int64), test.astype(np.int64)
    in_train = np.unique(train)
    values = np.unique(np.concatenate([in_train, np.unique(test)]))
    if len(in_train) < 2:
        raise unusable(
            source,
            f"train_labels of one class, {in_train[0]},",
            "is to hold two classes or more; shuffle before splitting into train and test",
        )
    if names is not None and train.dtype.kind in "iu":
        if values[0] < 0 or values[-1] >= len(names):
            found = f"labels from {values[0]} to {values[-1]} with {len(names)} class names"
            raise unusable(source, found, "disagree; number the classes from 0 in the order of their names")
        return Labels("classification", train.astype(np.int64), test.astype(np.int64), names)
    is_numbered = train.dtype.kind in "iu" and values[0] == 0 and values[-1] == len(values) - 1
    if is_numbered:
        return Labels("classification", train.astype(np.int64), test.astype(np.int64), None)
    numbered = [np.searchsorted(values, part).astype(np.int64) for part in (train, test)]
    return Labels("classification", numbered[0], numbered[1], tuple(str(value) for value in values.tolist()))


def _is_one_hot(labels: npt.NDArray[Any]) -> bool:
    if labels.ndim != 2 or labels.shape[1] < 2 or labels.dtype.kind not in "biuf" or not labels.size:
        return False
    is_hot = labels == 1
    return bool((is_hot | (labels == 0)).all() and (is_hot.sum(1) == 1).all())


def _check_kinds_agree(source: str | Path, train: npt.NDArray[Any], test: npt.NDArray[Any]) -> None:
    kinds = [part.dtype.kind.replace("u", "i") for part in (train, test)]
    if kinds[0] != kinds[1] or train.shape[1:] != test.shape[1:]:
        found = (
            f"train_labels of {_called(train)}, shape {train.shape}, and test_labels of {_called(test)}, {test.shape}"
        )
        raise unusable(source, found, "differ after the first dimension or in kind; give both the same")


def _called(labels: npt.NDArray[Any]) -> str:
    return "text" if labels.dtype.kind == "U" else str(labels.dtype)


def _doubt(
    source: str | Path, labels: npt.NDArray[Any], found: str, values: npt.NDArray[Any], first: str | None
) -> SpecError:
    either = f"{'tokens' if first == 'tokens' else 'classes'} or amounts"
    return SpecError(
        f"dataset {source}: train_labels of {labels.dtype}, shape {labels.shape}, {found} from {values[0]:g} to "
        f"{values[-1]:g}, may be {either}; say which by --task {first} or --task regression (task: in run.yaml, task= "
        "of save_dataset)",
        field="task",
        value=str(source),
    )
