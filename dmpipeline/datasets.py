"""The datasets that a run's spec can name.

`digits` comes with scikit-learn; CIFAR-10 and FMoW, which the release is of, are read from their own files; anything
else is an .npz file or a folder of arrays. What a dataset is stands in `dmpipeline.examples`.
"""

import functools
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dmpipeline.cifar import load_cifar
from dmpipeline.errors import SpecError
from dmpipeline.examples import Dataset, as_features, checked_dataset, checked_name, unusable
from dmpipeline.fmow import load_fmow
from dmpipeline.folders import ARRAYS, load_folder, save_dataset
from dmpipeline.masks import Purpose, draw_permutation
from dmpipeline.spec import DATASET_FORMS, DATASET_NAMES, nearest_name, split_dataset

__all__ = ["Dataset", "as_features", "load_dataset", "save_dataset"]

DIGITS_TRAIN = 1437

_LOADERS: dict[str, Callable[[Path], Dataset]] = {"cifar10": load_cifar, "fmow": load_fmow}


def load_dataset(name: str) -> Dataset:
    """Load a dataset by name or from files.

    Parameters
    ----------
    name : str
        - `digits`: scikit-learn's 1,797 pictures of 8 x 8 pixels, scaled to 0..1, put in an order drawn once and for
          all (`masks.draw_permutation`, seed 0, purpose SPLIT, index 0); the first 1,437 are for training, the other
          360 for testing.
        - `cifar10:PATH`: a folder with CIFAR-10's own files; see `dmpipeline.cifar.load_cifar`.
        - `fmow:PATH`: the folder of WILDS's FMoW; see `dmpipeline.fmow.load_fmow`.
        - The path of an .npz file with `train_inputs`, `train_labels`, `test_inputs` and `test_labels`, as
          `dmpipeline.examples.Dataset` describes them. Nothing in it is unpickled. The dataset's name is the file's
          stem.
        - The path of a folder with the same as .npy files, which stay on disk; see `save_dataset`.

    Returns
    -------
    Dataset

    Raises
    ------
    SpecError
        If there is no such dataset, or its files cannot be used.
    RunError
        If what is to be kept of it cannot be written.
    """
    form, place = split_dataset(name)
    if form in DATASET_NAMES:
        return _digits()
    path = Path(place).expanduser()
    if form is not None and place:
        return _LOADERS[form](path)
    if name.endswith(".npz"):
        return _from_npz(path)
    if form is None and path.is_dir():
        return load_folder(path)
    if form is None and ":" not in name and "/" in name:
        raise unusable(name, "no folder", "is there; correct the path")
    choice = nearest_name(name.partition(":")[0], [*DATASET_NAMES, *DATASET_FORMS])
    spelled = ", ".join(part + ":PATH" if part in DATASET_FORMS else part for part in choice.split(", "))
    raise SpecError(
        f"dataset {name!r} is not known; choose {spelled}, or the path of an .npz file or a folder of arrays",
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


def _from_npz(path: Path) -> Dataset:
    name = checked_name(path.stem, path)
    try:
        # opened here because numpy leaves a file open that it cannot read
        with open(path, "rb") as raw:
            file = np.load(raw, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise unusable(path, "one array", "is not an .npz file of four; write it with numpy.savez")
            if missing := [array for array in ARRAYS if array not in file.files]:
                raise unusable(path, f"{', '.join(file.files)}", f"lacks {', '.join(missing)}; add what is missing")
            train_inputs, train_labels, test_inputs, test_labels = (file[array] for array in ARRAYS)
    except FileNotFoundError as error:
        raise unusable(path, "nothing", "is to be an .npz file; correct the path") from error
    except SpecError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise unusable(path, str(error), "cannot be read; write plain arrays with numpy.savez") from error
    return checked_dataset(
        name,
        (train_inputs, train_labels),
        (test_inputs, test_labels),
        source=path,
        example_order=f"that of {path.name}",
    )
