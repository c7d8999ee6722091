"""From arrays to a dataset whose task and form of inputs are settled.

What the user says holds; what is not said is inferred where there is no doubt (`labels`), or follows a rule: tables are
standardised by the full training set, pictures and tokens taken as they are, and whole numbers are features, not
tokens, unless the task is tokens or it is said. Runs of earlier versions were created without such rules, and read
their datasets as they did: floats are a regression, whole numbers classes, whole inputs tokens, and nothing is scaled.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from dmpipeline.data.conversion import label_array
from dmpipeline.data.examples import (
    Dataset,
    InputsForm,
    Part,
    Task,
    check_finite,
    check_shape,
    checked_dataset,
    pieces_of,
    unusable,
)
from dmpipeline.data.labels import understood
from dmpipeline.data.scaling import Moments, Scaling

FACTS = ("task", "class_names", "feature_names")
"""What the files of a dataset may say in addition to its arrays: in dataset.json of a folder, or arrays of an .npz."""

# Pictures of floats are on 0..1, or normalised to a few deviations; what lies further out trains badly as it is.
_LARGEST_OF_PICTURES = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class Said:
    """What is said of a dataset, by its files or by its user.

    Attributes
    ----------
    task : {"classification", "regression", "tokens"}, optional
    inputs : {"standardised", "as-is", "tokens"}, optional
    class_names, feature_names : tuple of str, optional
    as_before : bool
        Whether to read the arrays as versions did that knew neither tasks nor scaling.
    """

    task: Task | None = None
    inputs: InputsForm | None = None
    class_names: tuple[str, ...] | None = None
    feature_names: tuple[str, ...] | None = None
    as_before: bool = False


def dataset_of(
    name: str,
    train: Part,
    test: Part,
    said: Said,
    *,
    source: str | Path,
    example_order: str,
) -> Dataset:
    """Make a dataset of arrays, its task and the form of its inputs settled.

    Parameters
    ----------
    name : str
    train, test : pair of arrays
        Inputs, and labels of any kind that `conversion.label_array` takes.
    said : Said
    source : str or path
        What an error calls the dataset.
    example_order : str

    Raises
    ------
    SpecError
        If the arrays cannot be used, what they mean is in doubt, or what is said of them cannot be.
    """
    if said.as_before:
        return checked_dataset(name, train, test, source=source, example_order=example_order)
    labels = []
    for of, part in (("train", train), ("test", test)):
        check_shape(source, f"{of}_inputs", part[0])
        array, _ = label_array(part[1], f"dataset {source}: {of}_labels")
        labels.append(array)
        found = f"{of}_labels of {'text' if array.dtype.kind == 'U' else array.dtype}, shape {array.shape}"
        if array.ndim < 1 or len(array) != len(part[0]) or not array.size:
            raise unusable(source, found, f"is to be of shape ({len(part[0])},), one for each input")
        if array.dtype.kind == "f":
            check_finite(source, f"{of}_labels", array)
    are_whole = train[0].dtype.kind in "iu" and train[0].ndim == 2
    meant = understood(
        source,
        *labels,
        task=said.task,
        tokens_shape=train[0].shape if are_whole else None,
        names=said.class_names,
    )
    form = _form(source, said.inputs, meant.task)
    inputs = [_inputs(source, f"{of}_inputs", part[0], form) for of, part in (("train", train), ("test", test))]
    _check_columns(source, said.feature_names, inputs[0])
    dataset = checked_dataset(
        name,
        (inputs[0], meant.train),
        (inputs[1], meant.test),
        source=source,
        example_order=example_order,
        n_classes=None if meant.class_names is None else len(meant.class_names),
        feature_names=said.feature_names,
    )
    return dataclasses.replace(dataset, class_names=meant.class_names, scaling=_scaling(source, dataset, form))


def said_in_files(source: str | Path, facts: Mapping[str, Any], said: Said) -> Said:
    """Put together what a dataset's files say of it and what its user does, who is right where they differ.

    Parameters
    ----------
    source : str or path
    facts : mapping
        Of `FACTS`, as in JSON.
    said : Said
        By the user.

    Raises
    ------
    SpecError
        If a fact is of another form than `save_dataset` writes.
    """
    task = facts.get("task")
    if task not in (None, *get_args(Task)):
        raise unusable(source, f"task {task!r} in its files", f"is to be {', '.join(get_args(Task))}")
    names: dict[str, tuple[str, ...] | None] = {}
    for fact in ("class_names", "feature_names"):
        values = facts.get(fact)
        if values is not None and not (isinstance(values, list) and all(isinstance(value, str) for value in values)):
            raise unusable(source, f"{fact} {values!r} in its files", "is to be a list of text")
        names[fact] = None if values is None else tuple(values)
    class_names = names["class_names"]
    if class_names is not None and len(set(class_names)) < len(class_names):
        raise unusable(source, f"class_names {', '.join(class_names)} in its files", "is to name each class once")
    task = said.task or task or (None if class_names is None else "classification")
    if task != "classification":
        class_names = None
    return dataclasses.replace(said, task=task, class_names=class_names, feature_names=names["feature_names"])


def check_said(source: str | Path, said: Said, dataset: Dataset) -> Dataset:
    """Return a public dataset, whose task and form are known, unless something else is said of it.

    Raises
    ------
    SpecError
    """
    if said.task not in (None, dataset.task):
        raise unusable(source, f"task {said.task}", f"is to be {dataset.task}; leave --task out")
    if said.inputs not in (None, "as-is"):
        raise unusable(source, f"inputs {said.inputs}", "are pictures, which are taken as-is; leave --inputs out")
    return dataset


def unscaled_inputs(dataset: Dataset) -> Dataset:
    """Return the dataset with its inputs taken as they are."""
    if dataset.scaling is None or dataset.scaling.inputs is None:
        return dataset
    labels = dataset.scaling.labels
    return dataclasses.replace(dataset, scaling=Scaling(None, labels) if labels is not None else None)


def _form(source: str | Path, said: InputsForm | None, task: Task) -> InputsForm | None:
    """Return how inputs are taken, where that is known before they are looked at."""
    if task == "tokens" and said not in (None, "tokens"):
        raise unusable(
            source,
            f"inputs {said} for task tokens",
            "is to be tokens; leave --inputs out, or say another --task",
        )
    return "tokens" if task == "tokens" else said


def _inputs(source: str | Path, name: str, inputs: npt.NDArray[Any], form: InputsForm | None) -> npt.NDArray[Any]:
    kind = inputs.dtype.kind
    if form == "tokens":
        if kind not in "iu":
            raise unusable(source, f"{name} of {inputs.dtype}", "is to be whole numbers from 0, for tokens")
        return inputs.astype(np.int64)
    if kind == "b" or (kind in "iu" and inputs.ndim == 2 and inputs.dtype != np.uint8):
        return inputs.astype(np.float32)
    return inputs


def _check_columns(source: str | Path, names: tuple[str, ...] | None, inputs: npt.NDArray[Any]) -> None:
    if names is not None and (inputs.ndim != 2 or inputs.shape[1] != len(names)):
        raise unusable(source, f"{len(names)} feature_names for train_inputs of shape {inputs.shape}", "disagree")


def _scaling(source: str | Path, dataset: Dataset, form: InputsForm | None) -> Scaling | None:
    inputs = dataset.train_inputs
    if form == "standardised" and inputs.dtype == np.uint8:
        raise unusable(
            source,
            "inputs standardised of pictures of bytes",
            "is to be as-is: the recipe's mean and std normalise them; leave --inputs out",
        )
    if form is None and inputs.dtype.kind == "f":
        form = "as-is" if dataset.image_shape is not None and _are_on_scale(inputs) else "standardised"
    of_inputs = Moments.of(inputs) if form == "standardised" else None
    of_labels = Moments.of(dataset.train_labels) if dataset.is_regression else None
    return None if of_inputs is None and of_labels is None else Scaling(of_inputs, of_labels)


def _are_on_scale(pictures: npt.NDArray[Any]) -> bool:
    return all(float(np.abs(piece).max()) <= _LARGEST_OF_PICTURES for piece in pieces_of(pictures))
