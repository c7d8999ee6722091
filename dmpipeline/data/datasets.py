"""The datasets that a run's spec can name.

`digits` comes with scikit-learn; CIFAR-10 and FMoW, which the release is of, are read from their own files; anything
else is an .npz file or a folder of arrays. What a dataset is stands in `dmpipeline.data.examples`.
"""

import functools
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dmpipeline.data.cifar import load_cifar
from dmpipeline.data.examples import (
    OWN_DATA,
    Dataset,
    InputsForm,
    Task,
    as_features,
    checked_dataset,
    checked_name,
    unusable,
)
from dmpipeline.data.fmow import load_fmow
from dmpipeline.data.folders import ARRAYS, load_folder, save_dataset
from dmpipeline.data.tasks import FACTS, Said, check_said, dataset_of, said_in_files
from dmpipeline.draws.masks import Purpose, draw_permutation
from dmpipeline.errors import SpecError
from dmpipeline.spec import DATASET_FORMS, DATASET_NAMES, nearest_name, split_dataset

__all__ = ["Dataset", "as_features", "load_dataset", "save_dataset"]

DIGITS_TRAIN = 1437

_LOADERS: dict[str, Callable[[Path], Dataset]] = {"cifar10": load_cifar, "fmow": load_fmow}


def load_dataset(
    name: str, *, task: Task | None = None, inputs: InputsForm | None = None, as_before: bool = False
) -> Dataset:
    """Load a dataset by name or from files, and settle what is learned of it and how its inputs are taken.

    Parameters
    ----------
    name : str
        - `digits`: scikit-learn's 1,797 pictures of 8 x 8 pixels, scaled to 0..1, put in an order drawn once and for
          all (`masks.draw_permutation`, seed 0, purpose SPLIT, index 0); the first 1,437 are for training, the other
          360 for testing.
        - `cifar10:PATH`: a folder with CIFAR-10's own files; see `dmpipeline.data.cifar.load_cifar`.
        - `fmow:PATH`: the folder of WILDS's FMoW; see `dmpipeline.data.fmow.load_fmow`.
        - The path of an .npz file with `train_inputs`, `train_labels`, `test_inputs` and `test_labels`, as
          `dmpipeline.data.examples.Dataset` describes them, labels also as text, bools, one-hot rows or any whole
          numbers; perhaps `class_names` and `feature_names`. Nothing in it is unpickled. The dataset's name is the
          file's stem.
        - The path of a folder with the same as .npy files, which stay on disk; see `save_dataset`.
    task : {"classification", "regression", "tokens"}, optional
        What is learned; left out, what the files say, or what the labels leave no doubt of.
    inputs : {"standardised", "as-is", "tokens"}, optional
        How inputs are taken; left out, a table of numbers is standardised by the full training set, while pictures
        and tokens are taken as they are.
    as_before : bool
        Whether to read arrays as the runs do that were created before there were tasks: floats are a regression, whole
        numbers classes, whole inputs tokens, and nothing is scaled. Not with `task` or `inputs`.

    Returns
    -------
    Dataset

    Raises
    ------
    SpecError
        If there is no such dataset, its files cannot be used, or what its labels mean is in doubt.
    RunError
        If what is to be kept of it cannot be written.
    """
    form, place = split_dataset(name)
    said = Said(task=task, inputs=inputs, as_before=as_before)
    if form in DATASET_NAMES:
        return check_said(name, said, _digits())
    path = Path(place).expanduser()
    if form is not None and place:
        return check_said(name, said, _LOADERS[form](path))
    if name.endswith(".npz"):
        return _from_npz(path, said)
    if form is None and path.is_dir():
        return load_folder(path, said)
    if form is None and path.is_file():
        raise unusable(path, "a file that is not an .npz", f"is to be made arrays of numbers first: {OWN_DATA}")
    if form is None and ":" not in name and "/" in name:
        raise unusable(name, "there is no such folder;", "correct the path")
    choice = nearest_name(name.partition(":")[0], [*DATASET_NAMES, *DATASET_FORMS])
    spelled = ", ".join(part + ":PATH" if part in DATASET_FORMS else part for part in choice.split(", "))
    raise SpecError(
        f"dataset {name!r} is not known; choose {spelled}, or the path of an .npz file or a folder of "
        f"arrays; {OWN_DATA}",
        field="dataset",
        value=name,
    )


@functools.cache
def _digits() -> Dataset:
    from sklearn.datasets import load_digits  # takes a second, and only this dataset needs it

    digits = load_digits()
    order = draw_permutation(0, Purpose.SPLIT, 0, len(digits.target))
    inputs = (digits.data / 16.0).astype(np.float32)[order]
    labels = digits.target[order]
    return checked_dataset(
        "digits",
        (inputs[:DIGITS_TRAIN], labels[:DIGITS_TRAIN]),
        (inputs[DIGITS_TRAIN:], labels[DIGITS_TRAIN:]),
        source="digits",
        image_shape=(8, 8),
        example_order="scikit-learn's digits in a fixed random order: the first 1,437 train, the other 360 test",
    )


def _from_npz(path: Path, said: Said) -> Dataset:
    name = checked_name(path.stem, path)
    try:
        # opened here because numpy leaves a file open that it cannot read
        with open(path, "rb") as raw:
            file = np.load(raw, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise unusable(path, "one array", "is not an .npz file of four; write it with numpy.savez")
            if missing := [array for array in ARRAYS if array not in file.files]:
                why = f"lacks {', '.join(missing)}; save all four: {OWN_DATA}"
                raise unusable(path, f"a file with {', '.join(file.files)}", why)
            train_inputs, train_labels, test_inputs, test_labels = (_member(path, file, array) for array in ARRAYS)
            facts = {fact: _member(path, file, fact).tolist() for fact in FACTS if fact in file.files}
    except FileNotFoundError as error:
        why = f"correct the path, or write it with numpy.savez; {OWN_DATA}"
        raise unusable(path, "there is no such file;", why) from error
    except SpecError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise unusable(path, str(error), "cannot be read; write plain arrays with numpy.savez") from error
    return dataset_of(
        name,
        (train_inputs, train_labels),
        (test_inputs, test_labels),
        said if said.as_before else said_in_files(path, facts, said),
        source=path,
        example_order=f"that of {path.name}",
    )


def _member(path: Path, file: "np.lib.npyio.NpzFile", array: str) -> "np.ndarray[Any, Any]":
    try:
        values: np.ndarray[Any, Any] = file[array]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise unusable(
            path,
            f"{array} of Python objects",
            "is never unpickled; write plain arrays with numpy.savez, text as by labels.astype(str)",
        ) from error
    return values
