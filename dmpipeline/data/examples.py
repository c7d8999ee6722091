"""Examples that models are trained and judged on: what they may be, and the fingerprint that identifies a set.

A dataset is four arrays in a fixed order: column j of every mask, margin and datamodel means example j. Inputs keep
the form they came in, so that pictures take a byte a value and may stay on disk; `as_features` makes numbers of them.
Nothing here knows where examples come from.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dmdata.shown import Shown
from dmpipeline.data.scaling import Scaling
from dmpipeline.errors import SpecError

Part = tuple[npt.NDArray[Any], npt.NDArray[Any]]
"""The inputs and labels of one part of a dataset, train or test."""

Task = Literal["classification", "regression", "tokens"]
"""What models learn of a dataset."""

InputsForm = Literal["standardised", "as-is", "tokens"]
"""How models take inputs."""

_CLASSES_BELOW = 2**16
_TOKENS_BELOW = 2**20
_LISTED_COLUMNS = 8

# Large arrays are looked at in pieces of about this size, so that a memory map is never in memory as a whole.
_PIECE_BYTES = 2**24


@dataclass(frozen=True, slots=True, repr=False)
class Dataset(Shown):
    """Examples to train on and to judge by.

    Attributes
    ----------
    name : str
        How the catalog and exported files call it.
    train_inputs, test_inputs : array, shape (n_train, ...), (n_test, ...)
        float32; or uint8 pictures (n, height, width) or (n, height, width, channels), with 1, 3 or 4 channels; or int64
        tokens (n, n_positions), from 0. May be a read-only memory map.
    train_labels, test_labels : array, shape (n_train, ...), (n_test, ...)
        int64 classes (n,) from 0; or int64 tokens (n, n_positions) to be predicted at each position, -1 where there is
        nothing to predict; or finite float32 numbers (n,) or (n, k), for a regression.
    n_classes : int
        Classes, or tokens to choose from; in a regression the numbers predicted, k, 1 for labels of shape (n,).
    image_shape : tuple of int, or None
        Height, width and perhaps channels, when an input reshaped to it is a picture.
    example_order : str
        In words, where the order of examples is from.
    fingerprint : str
        SHA-256 of the four arrays with their dtypes and shapes, in hexadecimal.
    class_names : tuple of str, or None
        How the user called each class, in the order of their numbers; None where classes are just numbers from 0.
    feature_names : tuple of str, or None
        Names of the columns of a table of inputs, where it had some.
    scaling : Scaling, or None
        How inputs and labels are scaled for training by gradients; the arrays here are not scaled.
    """

    name: str
    train_inputs: npt.NDArray[Any]
    train_labels: npt.NDArray[Any]
    test_inputs: npt.NDArray[Any]
    test_labels: npt.NDArray[Any]
    n_classes: int
    image_shape: tuple[int, ...] | None
    example_order: str
    fingerprint: str
    class_names: tuple[str, ...] | None = None
    feature_names: tuple[str, ...] | None = None
    scaling: Scaling | None = None

    def _facts(self) -> tuple[str, dict[str, object]]:
        kind = "numbers" if self.is_regression else "tokens" if self.is_sequence else "classes"
        return f"Dataset {self.name}", {
            "train": self.n_train,
            "test": self.n_test,
            "inputs": f"{self.train_inputs.dtype} {self.train_inputs.shape[1:]}",
            "labels": f"of {self.n_classes:,} {kind}",
            "fingerprint": self.fingerprint[:12],
        }

    @property
    def n_train(self) -> int:
        """Count of training examples."""
        return len(self.train_labels)

    @property
    def n_test(self) -> int:
        """Count of test examples."""
        return len(self.test_labels)

    @property
    def n_features(self) -> int:
        """Count of values in an input."""
        return math.prod(self.train_inputs.shape[1:])

    @property
    def is_regression(self) -> bool:
        """Whether labels are numbers to come close to."""
        return self.train_labels.dtype.kind == "f"

    @property
    def is_sequence(self) -> bool:
        """Whether a token is predicted at each position of an input."""
        return self.train_labels.dtype.kind == "i" and self.train_labels.ndim == 2

    @property
    def task(self) -> Task:
        """What is learned: "classification", "regression", or "tokens" at each position of a sequence."""
        return "regression" if self.is_regression else "tokens" if self.is_sequence else "classification"

    @property
    def inputs_form(self) -> InputsForm:
        """How models trained by gradients take the inputs: "standardised", "as-is", or as "tokens"."""
        if self.train_inputs.dtype.kind == "i":
            return "tokens"
        return "standardised" if self.scaling is not None and self.scaling.inputs is not None else "as-is"

    def name_of(self, label: Any) -> str:
        """Return how the user calls a label: by its class name where there is one, else the number as text."""
        return str(label) if self.class_names is None else self.class_names[int(label)]


def as_features(inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Make rows of numbers from inputs.

    Parameters
    ----------
    inputs : array of float32 or uint8, shape (n, ...)

    Returns
    -------
    features : array of float32, shape (n, n_features)
        uint8 divided by 255; floats as they are, not copied.

    Raises
    ------
    SpecError
        If the inputs are tokens, whose numbers measure nothing.
    """
    if inputs.dtype.kind == "i":
        raise SpecError(
            f"inputs of {inputs.dtype} are tokens, not features; choose a recipe for sequences", field="recipe"
        )
    features = inputs.reshape(len(inputs), -1).astype(np.float32, copy=False)
    if inputs.dtype == np.uint8:
        features *= np.float32(1 / 255)
    return features


def checked_dataset(
    name: str,
    train: Part,
    test: Part,
    *,
    source: str | Path,
    example_order: str,
    image_shape: tuple[int, ...] | None = None,
    n_classes: int | None = None,
    fingerprint: str | None = None,
    feature_names: tuple[str, ...] | None = None,
) -> Dataset:
    """Make a dataset of arrays that can be used, whatever their width and byte order.

    Parameters
    ----------
    name : str
    train, test : pair of arrays
        Inputs and labels. Those of another dtype than `Dataset` promises are converted in memory: floats to float32,
        integers to int64, uint8 that are not pictures to float32 from 0 to 1.
    source : str or path
        What an error calls the dataset.
    example_order : str
    image_shape : tuple of int, optional
        Left out, it is the shape of an input, where that may be a picture's.
    n_classes : int, optional
        Left out, one more than the largest label, or the count of numbers that a regression predicts.
    fingerprint : str, optional
        If it is known.
    feature_names : tuple of str, optional
        How the columns of a table of inputs are called.

    Raises
    ------
    SpecError
        If the arrays cannot be used; it names the array.
    """
    arrays: list[npt.NDArray[Any]] = []
    for part, (inputs, labels) in (("train", train), ("test", test)):
        _check_inputs(source, f"{part}_inputs", inputs, feature_names)
        _check_labels(source, f"{part}_labels", labels, inputs)
        arrays += [_as_kept(inputs), _kept_labels(labels)]
    train_inputs, train_labels, test_inputs, test_labels = arrays
    _check_parts_agree(source, "inputs", train_inputs, test_inputs)
    _check_parts_agree(source, "labels", train_labels, test_labels)
    if train_labels.dtype.kind == "f":
        found = math.prod(train_labels.shape[1:])
    else:
        found = int(max(train_labels.max(), test_labels.max())) + 1
        if train_labels.max() < 1:
            raise unusable(source, "train_labels of one class", "is to number two classes or more from 0")
    if image_shape is None and train_inputs.dtype.kind in "fu":
        image_shape = train_inputs.shape[1:] if _is_picture(train_inputs.shape[1:]) else None
    return Dataset(
        name=name,
        train_inputs=train_inputs,
        train_labels=train_labels,
        test_inputs=test_inputs,
        test_labels=test_labels,
        n_classes=found if n_classes is None else n_classes,
        image_shape=image_shape,
        example_order=example_order,
        fingerprint=fingerprint or fingerprint_of(arrays),
        feature_names=feature_names,
    )


def pieces_of(array: npt.NDArray[Any], piece_bytes: int = _PIECE_BYTES) -> Iterator[npt.NDArray[Any]]:
    """Cut an array into pieces of consecutive examples, of some 16 MiB, one in memory at a time."""
    step = max(1, piece_bytes // max(1, array[:1].nbytes))
    for start in range(0, len(array), step):
        yield np.ascontiguousarray(array[start : start + step])


def kept_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return how values of a dtype are kept: floats as float32, uint8 as they are, other integers as int64.

    Raises
    ------
    SpecError
        If they are something else.
    """
    if dtype == np.uint8:
        return np.dtype(np.uint8)
    if dtype.kind not in "fiu":
        raise SpecError(f"values of {dtype} are neither floats nor integers; convert them", value=str(dtype))
    return np.dtype(np.float32 if dtype.kind == "f" else np.int64)


def checked_name(name: str, source: str | Path) -> str:
    """Return a name that catalogs and exported files may bear.

    Raises
    ------
    SpecError
        If it has other characters than those may have.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise unusable(
            source, f"name {name!r}", "is to be letters, digits, '_', '-' and '.'; rename the file or folder"
        )
    return name


def check_shape(source: str | Path, name: str, inputs: npt.NDArray[Any]) -> None:
    """Refuse inputs that are not (n_examples, ...), or are empty.

    Raises
    ------
    SpecError
    """
    if inputs.ndim < 2 or inputs.size == 0:
        single = "; for a single feature give inputs.reshape(-1, 1)" if inputs.ndim == 1 and inputs.size else ""
        raise unusable(source, f"{name} of shape {inputs.shape}", f"is to be (n_examples, ...), none of them 0{single}")


def check_finite(source: str | Path, name: str, values: npt.NDArray[Any]) -> None:
    """Refuse values that are not finite, or too large for float32.

    Raises
    ------
    SpecError
    """
    largest = np.finfo(np.float32).max
    if not all(np.abs(piece).max() <= largest for piece in pieces_of(values)):
        raise unusable(source, name, "holds NaN, infinity or values beyond float32; give finite ones")


OWN_DATA = "docs/how-to/own-data.md shows the lines for a CSV, a folder of pictures and texts"
"""Where to read on, for an error about data that are in another form than a dataset's."""


def unusable(source: str | Path, found: str, why: str) -> SpecError:
    """State what is wrong with a dataset: what was found, what it is to be, and the remedy."""
    return SpecError(f"dataset {source}: {found} {why}", field="dataset", value=str(source))


def _check_inputs(
    source: str | Path, name: str, inputs: npt.NDArray[Any], feature_names: tuple[str, ...] | None
) -> None:
    check_shape(source, name, inputs)
    if inputs.dtype.kind not in "fiu":
        raise unusable(
            source, f"{name} of {inputs.dtype}", "is to be floats, uint8 from 0 to 255 or tokens; convert it"
        )
    if inputs.dtype.kind == "f":
        _check_none_missing(source, name, inputs, feature_names)
        check_finite(source, name, inputs)
    elif inputs.dtype != np.uint8:
        if inputs.ndim != 2:
            found = f"{name} of {inputs.dtype}, shape {inputs.shape}"
            why = "is to be (n_examples, n_positions); give pictures as uint8, other numbers as floats"
            raise unusable(source, found, why)
        _check_range(source, name, inputs, least=0, below=_TOKENS_BELOW, what="tokens")


def _check_labels(source: str | Path, name: str, labels: npt.NDArray[Any], inputs: npt.NDArray[Any]) -> None:
    found = f"{name} of {labels.dtype}, shape {labels.shape}"
    n_examples = len(inputs)
    if labels.dtype.kind not in "fiu" or labels.ndim not in (1, 2) or len(labels) != n_examples or labels.size == 0:
        raise unusable(source, found, f"is to be integers or floats of shape ({n_examples},), one for each input")
    if labels.dtype.kind == "f":
        check_finite(source, name, labels)
    elif labels.ndim == 1:
        _check_range(source, name, labels, least=0, below=_CLASSES_BELOW, what="classes")
    else:
        if inputs.dtype.kind not in "iu" or inputs.dtype == np.uint8 or labels.shape != inputs.shape:
            raise unusable(source, found, "is to go with tokens of the same shape; give floats for a regression")
        _check_range(source, name, labels, least=-1, below=_TOKENS_BELOW, what="tokens")
        if (labels.max(1) < 0).any():
            row = int(np.argmax(labels.max(1) < 0))
            raise unusable(source, f"{name}, example {row}", "has nothing to predict, -1 throughout; leave it out")


def _check_none_missing(
    source: str | Path, name: str, inputs: npt.NDArray[Any], feature_names: tuple[str, ...] | None
) -> None:
    """Refuse NaN, by the columns that have it where inputs are a table."""
    n_examples, in_column = 0, np.zeros(math.prod(inputs.shape[1:]), np.int64)
    for piece in pieces_of(inputs):
        is_missing = np.isnan(piece).reshape(len(piece), -1)
        n_examples += int(is_missing.any(1).sum())
        in_column += is_missing.sum(0)
    if not n_examples:
        return
    found = f"{name} with NaN, a missing value, in {n_examples:,} of {len(inputs):,} examples"
    if inputs.ndim == 2:
        columns = np.flatnonzero(in_column)
        called = [repr(feature_names[column]) if feature_names else str(column) for column in columns.tolist()]
        listed = [f"{name} ({count:,})" for name, count in zip(called, in_column[columns].tolist(), strict=True)]
        shown = ", ".join(listed[:_LISTED_COLUMNS]) + (", ..." if len(listed) > _LISTED_COLUMNS else "")
        found += f", column{'s' * (len(listed) > 1)} {shown}"
    raise unusable(source, found, "is to hold finite numbers; fill missing values, or leave these examples out")


def _check_range(source: str | Path, name: str, values: npt.NDArray[Any], *, least: int, below: int, what: str) -> None:
    if values.min() < least or values.max() >= below:
        found = f"{name} from {values.min()} to {values.max()}"
        raise unusable(source, found, f"is to number {what} from {least}, below {below:,}; number them again")


def _check_parts_agree(source: str | Path, what: str, train: npt.NDArray[Any], test: npt.NDArray[Any]) -> None:
    train_form, test_form = ((array.dtype, array.shape[1:]) for array in (train, test))
    if train_form != test_form:
        found = f"train_{what} of {train.dtype}, shape {train.shape}, and test_{what} of {test.dtype}, {test.shape}"
        raise unusable(source, found, "differ after the first dimension or in kind; give both the same")


def _as_kept(inputs: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if inputs.dtype == np.uint8 and not _is_picture(inputs.shape[1:]):
        return as_features(inputs).reshape(inputs.shape)
    return np.ascontiguousarray(inputs, kept_dtype(inputs.dtype))


def _kept_labels(labels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(labels, np.float32 if labels.dtype.kind == "f" else np.int64)


def _is_picture(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))


def fingerprint_of(arrays: Sequence[npt.NDArray[Any]], piece_bytes: int = _PIECE_BYTES) -> str:
    """Digest a dataset's four arrays with their dtypes and shapes: SHA-256, in hexadecimal."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        for piece in pieces_of(array, piece_bytes):
            digest.update(piece.data)
    return digest.hexdigest()


LARGEST_PLAIN_INPUT = 20.0
"""Inputs beyond this are far from the scale that networks are initialised for."""

_INPUTS_LOOKED_AT = 1000


def largest_plain_input(dataset: Dataset) -> float | None:
    """Find the largest of the first inputs that models take as they are: None of pictures, tokens and scaled ones."""
    is_scaled = dataset.scaling is not None and dataset.scaling.inputs is not None
    if is_scaled or dataset.train_inputs.dtype.kind != "f":
        return None
    return float(np.abs(dataset.train_inputs[:_INPUTS_LOOKED_AT]).max(initial=0.0))
