"""The examples that models are trained and judged on, in a fixed order.

A dataset is four arrays and a fingerprint of them. The order of its examples is part of it: column j of every mask,
margin and datamodel means example j. `digits` comes with scikit-learn; anything else is an .npz file.
"""

import functools
import hashlib
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dmpipeline.errors import SpecError
from dmpipeline.masks import Purpose, draw_permutation
from dmpipeline.spec import nearest_name

DIGITS_TRAIN = 1437


@dataclass(frozen=True, slots=True)
class Dataset:
    """Examples to train on and to judge by.

    Attributes
    ----------
    name : str
        How the catalog and exported files call it.
    train_inputs, test_inputs : array of float32, shape (n_train, n_features), (n_test, n_features)
    train_labels, test_labels : array of int64, shape (n_train,), (n_test,)
        Classes, from 0 to n_classes - 1.
    n_classes : int
    image_shape : tuple of int, or None
        Height, width and perhaps channels, when an input reshaped to it is a picture.
    example_order : str
        In words, where the order of examples is from.
    fingerprint : str
        SHA-256 of the four arrays with their shapes, in hexadecimal.
    """

    name: str
    train_inputs: npt.NDArray[np.float32]
    train_labels: npt.NDArray[np.int64]
    test_inputs: npt.NDArray[np.float32]
    test_labels: npt.NDArray[np.int64]
    n_classes: int
    image_shape: tuple[int, ...] | None
    example_order: str
    fingerprint: str

    @property
    def n_train(self) -> int:
        """Count of training examples."""
        return len(self.train_labels)

    @property
    def n_test(self) -> int:
        """Count of test examples."""
        return len(self.test_labels)


def load_dataset(name: str) -> Dataset:
    """Load a dataset by name, or from an .npz file.

    Parameters
    ----------
    name : str
        `digits`: scikit-learn's 1,797 pictures of 8 x 8 pixels, scaled to 0..1, put in an order drawn once and for all
        (`masks.draw_permutation`, seed 0, purpose SPLIT, index 0); the first 1,437 are for training, the other 360 for
        testing. Or the path of an .npz file with `train_inputs`, `train_labels`, `test_inputs` and `test_labels`:
        inputs of any shape after the first dimension, floats as they are or uint8 divided by 255; labels integers from
        0. Nothing in it is unpickled. The dataset's name is the file's stem.

    Returns
    -------
    Dataset

    Raises
    ------
    SpecError
        If there is no such dataset, or the file's arrays cannot be used.
    """
    if name == "digits":
        return _digits()
    if not name.endswith(".npz"):
        raise SpecError(
            f"dataset {name!r} is not known; choose {nearest_name(name, ['digits'])}, or the path of an .npz file",
            field="dataset",
            value=name,
        )
    return _from_npz(Path(name))


@functools.cache
def _digits() -> Dataset:
    from sklearn.datasets import load_digits  # takes a second, and only this dataset needs it

    digits = load_digits()
    order = draw_permutation(0, Purpose.SPLIT, 0, len(digits.target))
    inputs = (digits.data / 16.0).astype(np.float32)[order]
    labels = digits.target[order]
    return _dataset(
        "digits",
        (inputs[:DIGITS_TRAIN], labels[:DIGITS_TRAIN], inputs[DIGITS_TRAIN:], labels[DIGITS_TRAIN:]),
        image_shape=(8, 8),
        example_order="scikit-learn's digits in a fixed random order: the first 1,437 train, the other 360 test",
    )


def _from_npz(path: Path) -> Dataset:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", path.stem):
        raise _unusable(path, f"name {path.stem!r}", "is to be letters, digits, '_', '-' and '.'; rename the file")
    names = ("train_inputs", "train_labels", "test_inputs", "test_labels")
    try:
        # opened here because numpy leaves a file open that it cannot read
        with open(path, "rb") as raw:
            file = np.load(raw, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise _unusable(path, "one array", "is not an .npz file of four; write it with numpy.savez")
            if missing := [name for name in names if name not in file.files]:
                raise _unusable(path, f"{', '.join(file.files)}", f"lacks {', '.join(missing)}; add what is missing")
            arrays = [file[name] for name in names]
    except FileNotFoundError as error:
        raise _unusable(path, "nothing", "is to be an .npz file; correct the path") from error
    except SpecError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _unusable(path, str(error), "cannot be read; write plain arrays with numpy.savez") from error
    train_inputs, train_labels, test_inputs, test_labels = arrays
    for part, inputs, labels in (("train", train_inputs, train_labels), ("test", test_inputs, test_labels)):
        _check_inputs(path, f"{part}_inputs", inputs)
        _check_labels(path, f"{part}_labels", labels, len(inputs))
    if train_labels.max() == 0:
        raise _unusable(path, "train_labels of one class", "is to number two classes or more from 0")
    if train_inputs.shape[1:] != test_inputs.shape[1:]:
        shapes = f"train_inputs of shape {train_inputs.shape} and test_inputs of shape {test_inputs.shape}"
        raise _unusable(path, shapes, "differ after the first dimension; give both the same features")
    return _dataset(
        path.stem,
        (_as_features(train_inputs), train_labels, _as_features(test_inputs), test_labels),
        image_shape=_picture_shape(train_inputs.shape[1:]),
        example_order=f"that of {path.name}",
    )


def _dataset(
    name: str, arrays: tuple[npt.NDArray[Any], ...], *, image_shape: tuple[int, ...] | None, example_order: str
) -> Dataset:
    train_inputs, test_inputs = (np.ascontiguousarray(arrays[i], np.float32) for i in (0, 2))
    train_labels, test_labels = (np.ascontiguousarray(arrays[i], np.int64) for i in (1, 3))
    digest = hashlib.sha256()
    for array in (train_inputs, train_labels, test_inputs, test_labels):
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.data)
    return Dataset(
        name=name,
        train_inputs=train_inputs,
        train_labels=train_labels,
        test_inputs=test_inputs,
        test_labels=test_labels,
        n_classes=int(max(train_labels.max(), test_labels.max())) + 1,
        image_shape=image_shape,
        example_order=example_order,
        fingerprint=digest.hexdigest(),
    )


def _check_inputs(path: Path, name: str, inputs: npt.NDArray[Any]) -> None:
    if inputs.ndim < 2 or inputs.size == 0:
        raise _unusable(path, f"{name} of shape {inputs.shape}", "is to be (n_examples, ...), none of them 0")
    if inputs.dtype.kind != "f" and inputs.dtype != np.uint8:
        raise _unusable(path, f"{name} of {inputs.dtype}", "is to be floats, or uint8 from 0 to 255; convert it")
    if inputs.dtype.kind == "f" and not np.abs(inputs).max() <= np.finfo(np.float32).max:
        raise _unusable(path, name, "holds NaN, infinity or values beyond float32; give finite inputs")


def _check_labels(path: Path, name: str, labels: npt.NDArray[Any], n_examples: int) -> None:
    if labels.dtype.kind not in "iu" or labels.shape != (n_examples,):
        found = f"{name} of {labels.dtype}, shape {labels.shape}"
        raise _unusable(path, found, f"is to be integers of shape ({n_examples},), one for each input")
    if labels.min() < 0 or labels.max() >= 2**16:
        found = f"{name} from {labels.min()} to {labels.max()}"
        raise _unusable(path, found, "is to number classes from 0, fewer than 65,536")


def _as_features(inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    scale = 1 / 255 if inputs.dtype == np.uint8 else 1
    return inputs.reshape(len(inputs), -1).astype(np.float32) * np.float32(scale)


def _picture_shape(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    return shape if len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4)) else None


def _unusable(path: Path, found: str, why: str) -> SpecError:
    return SpecError(f"dataset {path}: {found} {why}", field="dataset", value=str(path))
