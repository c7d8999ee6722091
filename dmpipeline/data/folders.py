"""A dataset as a folder of four arrays, which is read without being loaded and written without being held.

The files are `train_inputs.npy`, `train_labels.npy`, `test_inputs.npy` and `test_labels.npy`. They are mapped from disk
when read, and written an example or a piece at a time next to their place, so that a folder is whole or not there.
Names of classes and features, and the task where it was given, are in `dataset.json`.
"""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
import numpy.typing as npt

from dmdata.atomic import replacing
from dmpipeline.data.conversion import input_array, is_table, label_array
from dmpipeline.data.examples import OWN_DATA, Dataset, Task, checked_name, kept_dtype, pieces_of, unusable
from dmpipeline.data.labels import understood
from dmpipeline.data.tasks import Said, dataset_of, said_in_files
from dmpipeline.errors import SpecError, explain_os_errors

ARRAYS = ("train_inputs", "train_labels", "test_inputs", "test_labels")
"""Names of a dataset's arrays, in files and in archives."""

_FACTS_FILE = "dataset.json"
_STREAMED = "_labels.streamed.npy"

# What items that are dicts usually call their input and their label, in public datasets.
_INPUT_KEYS = ("image", "img", "pixel_values", "input", "inputs", "input_values", "features", "x", "data", "input_ids")
_LABEL_KEYS = ("label", "labels", "target", "targets", "y", "class")


class Examples(Protocol):
    """A map-style dataset of torch, or whatever counts and indexes its examples the same way."""

    def __len__(self) -> int:
        """Count the examples."""

    def __getitem__(self, index: int, /) -> Any:
        """Return one example: its input and label, or a dict that has both."""


def load_folder(folder: Path, said: Said | None = None) -> Dataset:
    """Map a dataset from a folder; its name is the folder's.

    Float32 and uint8 inputs stay on disk and are read where they are used; others are converted in memory.

    Parameters
    ----------
    folder : pathlib.Path
    said : Said, optional
        What its user says of it, in addition to its files.

    Raises
    ------
    SpecError
        If a file is missing or its array cannot be used. Nothing is unpickled.
    """
    name, said = checked_name(folder.resolve().name, folder), said or Said()
    train_inputs, train_labels, test_inputs, test_labels = (_mapped(folder, array) for array in ARRAYS)
    return dataset_of(
        name,
        (train_inputs, train_labels),
        (test_inputs, test_labels),
        said if said.as_before else said_in_files(folder, _read_facts(folder), said),
        source=folder,
        example_order=f"that of the arrays in the folder {name}",
    )


def save_dataset(
    folder: str | os.PathLike[str],
    train: tuple[Any, Any] | Examples,
    test: tuple[Any, Any] | Examples,
    *,
    task: Task | None = None,
    keys: tuple[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write examples as a folder that a run's `dataset` can name; the dataset is called as the folder.

    Parameters
    ----------
    folder : path
        Where to; missing, or empty, unless `overwrite`.
    train, test : pair of arrays or tables, or map-style torch Dataset
        Inputs and labels, arrays, tensors, or pandas' and polars' tables and series, with an example along the first
        axis; or a Dataset that gives (input, label), or a dict that has both, by index, each asked for once, in order,
        and never all in memory: leave random augmentation out of it. Floats are stored as float32, uint8 as it is,
        other integers as int64. Tensors that look like pictures, channels first (C, height, width) with 1, 3 or 4
        channels, are stored channels last; numpy arrays and PIL pictures of mode L, RGB or RGBA as they are.
        Labels are classes as text, bools, whole numbers or one-hot rows, whose names are kept; or floats or vectors of
        floats for a regression; or vectors of integers for sequences; see `dmpipeline.data.examples.Dataset`.
    task : {"classification", "regression", "tokens"}, optional
        What is to be learned; necessary here or when a run is created where labels leave a doubt, as whole floats do.
    keys : pair of str, optional
        Which of an item's keys are the input and the label, where items are dicts; left out, the usual ones.
    overwrite : bool
        Whether a dataset that an earlier call wrote there may be replaced; other folders are left alone. Runs that
        were made with the former one refuse another.

    Returns
    -------
    folder : pathlib.Path
        Absolute: what to write as `dataset`.

    Raises
    ------
    SpecError
        If the folder holds something, or what was given is not a dataset, with the example where one cannot be had;
        nothing is left behind.
    RunError
        If it cannot be written.

    Examples
    --------
    >>> import tempfile, sklearn.datasets, sklearn.model_selection
    >>> inputs, labels = sklearn.datasets.load_wine(return_X_y=True)
    >>> parts = sklearn.model_selection.train_test_split(inputs, labels, test_size=0.2, random_state=0)
    >>> train, test = (parts[0], parts[2]), (parts[1], parts[3])
    >>> save_dataset(tempfile.mkdtemp() + "/wine", train, test).name
    'wine'
    """
    folder = Path(folder).absolute()
    checked_name(folder.name, folder)
    if task not in (None, *get_args(Task)):
        raise SpecError(f"task {task!r} is not known; choose {', '.join(get_args(Task))}", field="task", value=task)
    with explain_os_errors(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            if not _is_dataset(folder):
                raise unusable(folder, "something", "is there already; choose another folder, or remove it")
            if not overwrite:
                raise unusable(
                    folder, "a dataset", "is there already; choose another folder, or replace it with overwrite=True"
                )
        # bears the folder's name, for what is written is read back before it is moved into place
        staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial") / folder.name
        staging.mkdir(parents=True)
        try:
            given = {"train": train, "test": test}
            parts = [_write_part(staging, part, examples, folder, keys) for part, examples in given.items()]
            _write_labels(staging, parts, folder, task)
            try:
                _check_readable(staging)
            except SpecError as error:
                raise SpecError(str(error).replace(str(staging), str(folder)), field="dataset") from None
            _put_in_place(staging, folder)
        finally:
            shutil.rmtree(staging.parent, ignore_errors=True)
    return folder


def write_array(path: Path, shape: tuple[int, ...], dtype: npt.DTypeLike, pieces: Iterable[npt.NDArray[Any]]) -> None:
    """Write an .npy file from pieces that follow one another along its first axis, of its dtype; whole or not at all.

    Raises
    ------
    OSError
        If it cannot be written: a full disk is an error here, where a writable map would end the process.
    """
    with replacing(path) as partial, open(partial, "wb") as file:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype).data)


def _mapped(folder: Path, name: str) -> npt.NDArray[Any]:
    path = folder / f"{name}.npy"
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        why = f"lacks {path.name}; `dmpipeline.save_dataset` writes all four, of pairs (inputs, labels): {OWN_DATA}"
        raise unusable(folder, "a folder", why) from error
    except (OSError, ValueError, EOFError) as error:
        if "Python objects" in str(error):
            why = "cannot be read, for nothing is unpickled; write plain arrays, text as by labels.astype(str)"
            raise unusable(folder, f"{path.name}, an array of Python objects,", why) from error
        raise unusable(folder, f"{path.name}, {error},", "cannot be read; write it with numpy.save") from error


@dataclass(frozen=True, slots=True)
class _Written:
    """What is known of a part whose inputs are on disk; labels that are vectors may be on disk as well."""

    n_examples: int
    labels: npt.NDArray[Any]
    label_names: tuple[str, ...] | None
    feature_names: tuple[str, ...] | None


def _put_in_place(staging: Path, folder: Path) -> None:
    """Move a folder to its place; what is there leaves only once it can."""
    if not folder.exists() or not any(folder.iterdir()):
        os.rename(staging, folder)
        return
    former = staging.parent / "former"
    os.rename(folder, former)
    try:
        os.rename(staging, folder)
    except OSError:
        os.rename(former, folder)
        raise


def _is_dataset(folder: Path) -> bool:
    """Tell whether a folder holds what `save_dataset` writes, and nothing else."""
    names = {f"{array}.npy" for array in ARRAYS}
    return folder.is_dir() and names <= {entry.name for entry in folder.iterdir()} <= names | {_FACTS_FILE}


def _check_readable(folder: Path) -> None:
    """Read back what was written; a doubt about the task is settled when a run is created."""
    try:
        load_folder(folder)
    except SpecError as error:
        if error.field != "task":
            raise
        load_folder(folder, Said(task="regression"))


def _read_facts(folder: Path) -> Mapping[str, Any]:
    path = folder / _FACTS_FILE
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise unusable(folder, f"{path.name}, {error},", "cannot be read; restore it") from error
    if not isinstance(facts, dict):
        raise unusable(folder, path.name, "is to hold names and their values; restore it")
    return facts


def _write_part(
    staging: Path, part: str, examples: tuple[Any, Any] | Examples, folder: Path, keys: tuple[str, str] | None
) -> _Written:
    where = f"dataset {folder}: {part}"
    _refuse_single(where, examples)
    if isinstance(examples, tuple | list) and not (examples and all(isinstance(item, Mapping) for item in examples)):
        if len(examples) != 2:
            raise unusable(folder, f"{part} of {len(examples)} arrays", "is to be a pair of inputs and labels")
        inputs, feature_names = input_array(examples[0], f"{where}_inputs", picture_axes=4)
        labels, label_names = label_array(examples[1], f"{where}_labels")
        write_array(staging / f"{part}_inputs.npy", inputs.shape, _stored(inputs.dtype), pieces_of(inputs))
        return _Written(len(inputs) if inputs.ndim else 0, labels, label_names, feature_names)
    if not hasattr(examples, "__len__") or not hasattr(examples, "__getitem__"):
        raise SpecError(
            f"{where} is a {type(examples).__name__}, without a length or an index; give a pair (inputs, labels), or a "
            "dataset whose items are asked for by index",
            field="dataset",
        )
    if len(examples) == 0:
        raise unusable(folder, part, "is to hold one example or more; it holds none")
    return _write_examples(staging, part, examples, where, keys)


def _refuse_single(where: str, examples: Any) -> None:
    """Refuse what could be asked by index, but holds inputs alone, or is a mapping of whole arrays."""
    if isinstance(examples, Mapping):
        pair = ", ".join(f"part[{key!r}]" for key in _usual_keys(examples) or ("inputs", "labels"))
        raise SpecError(
            f"{where} is a {type(examples).__name__} with the keys {_listed(examples)}; give a pair, as ({pair})",
            field="dataset",
        )
    is_array = hasattr(examples, "shape") and hasattr(examples, "dtype")
    if is_array or is_table(examples) or isinstance(examples, str | bytes):
        of_path = f" of arrays; {OWN_DATA}" if isinstance(examples, str | bytes) else ""
        shape = f" of shape {tuple(examples.shape)}" if hasattr(examples, "shape") else ""
        raise SpecError(
            f"{where} is a single {type(examples).__name__}{shape}; give a pair (inputs, labels){of_path}",
            field="dataset",
        )


def _write_labels(staging: Path, parts: list[_Written], folder: Path, task: Task | None) -> None:
    """Write labels, as numbers where they are text or bools, and the names of what is named."""
    for of, names in (
        ("inputs", [part.feature_names for part in parts]),
        ("labels", [part.label_names for part in parts]),
    ):
        if None not in names and names[0] != names[1]:
            raise _differing_columns(folder, of, names[0] or (), names[1] or ())
    labels = [part.labels for part in parts]
    for name, part in zip(("train", "test"), parts, strict=True):
        if part.labels.ndim < 1 or len(part.labels) != part.n_examples:
            kind = "text" if part.labels.dtype.kind == "U" else part.labels.dtype
            found = f"{name}_labels of {kind}, shape {part.labels.shape}"
            raise unusable(folder, found, f"is to be of shape ({part.n_examples},), one for each input")
    class_names = parts[0].label_names
    are_named = class_names is not None or any(array.dtype.kind in "Ub" for array in labels)
    if task == "classification" or (are_named and task is None and not _are_numbers_of_a_table(parts)):
        meant = understood(folder, *labels, task=task, tokens_shape=None, names=class_names)
        labels, class_names, task = [meant.train, meant.test], meant.class_names, meant.task
    else:
        class_names = None
        if "U" in (array.dtype.kind for array in labels):
            raise unusable(folder, "train_labels of text", f"is to be numbers for task {task}; convert them")
    for name, array in zip(("train", "test"), labels, strict=True):
        dtype = np.float32 if array.dtype.kind == "f" else np.int64
        write_array(staging / f"{name}_labels.npy", array.shape, dtype, pieces_of(array))
    for streamed in staging.glob(f"*{_STREAMED}"):
        streamed.unlink()
    facts = {"task": task, "class_names": class_names, "feature_names": parts[0].feature_names}
    if any(facts.values()):
        said = {name: fact for name, fact in facts.items() if fact}
        (staging / _FACTS_FILE).write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _are_numbers_of_a_table(parts: list[_Written]) -> bool:
    """Return whether labels are several columns of floats, as a regression has."""
    return all(part.labels.ndim == 2 and part.labels.dtype.kind == "f" for part in parts)


def _write_examples(staging: Path, part: str, examples: Any, where: str, keys: tuple[str, str] | None) -> _Written:
    """Write inputs one by one, for an example is asked for but once; labels too where each is a vector."""
    forms: list[tuple[tuple[int, ...], np.dtype[Any]]] = []
    labels: list[Any] = []
    streamed, n_examples = staging / f"{part}{_STREAMED}", len(examples)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(path, "wb")) for path in (staging / f"{part}_inputs.npy", streamed)]
        # a Dataset need not end by IndexError, so its length is believed
        for index in range(n_examples):
            with _naming_the_item(where, index, part):
                item = examples[index]
                if isinstance(item, Mapping):
                    keys = keys or _found_keys(item)
                    item = _picked(item, keys)
                if not isinstance(item, tuple | list):
                    raise SpecError(
                        f"a {type(item).__name__} is not an example; give (input, label), or a dict of both"
                    )
                if len(item) != 2:
                    raise SpecError(f"{part} gives {len(item)} values an example; give (input, label)")
                values = [
                    input_array(item[0], "the input", picture_axes=3)[0],
                    label_array(item[1], "the label")[0],
                ]
            found = [(value.shape, _stored(value.dtype)) for value in values]
            if not forms:
                forms = found
                for file, (shape, dtype) in zip(files, forms, strict=True):
                    if shape or file is files[0]:
                        header = {"descr": dtype.str, "fortran_order": False, "shape": (n_examples, *shape)}
                        np.lib.format.write_array_header_1_0(file, header)
            if found != forms:
                raise SpecError(
                    f"{where}: example {index} is {_in_words(found)}, where the first is {_in_words(forms)}; "
                    "give all of one shape and kind",
                    field="dataset",
                )
            files[0].write(np.ascontiguousarray(values[0], forms[0][1]).data)
            if forms[1][0]:
                files[1].write(np.ascontiguousarray(values[1], forms[1][1]).data)
            else:
                labels.append(values[1][()])
    if forms[1][0]:
        return _Written(n_examples, np.lib.format.open_memmap(streamed, mode="r"), None, None)
    array = np.array(labels)
    return _Written(n_examples, array, _names_by_dataset(array, examples, keys), None)


@contextlib.contextmanager
def _naming_the_item(where: str, index: int, part: str) -> Iterator[None]:
    """Turn whatever goes wrong with one example into an error that names it; it may be decoded only when it is used."""
    called = f"{where.rpartition(': ')[0]}: item {index} of {part}"
    try:
        yield
    except SpecError as error:
        raise SpecError(f"{called}: {error}", field="dataset", value=index) from error
    except Exception as error:
        raise SpecError(
            f"{called}: {type(error).__name__}: {error}; correct it, or leave this example out of the dataset",
            field="dataset",
            value=index,
        ) from error


def _usual_keys(item: Mapping[Any, Any]) -> tuple[str, str] | None:
    """Find the keys that the input and the label have in an item, if there is no doubt."""
    found = [[key for key in item if str(key).lower() in usual] for usual in (_INPUT_KEYS, _LABEL_KEYS)]
    if len(item) == 2 and len(found[1]) == 1:
        return next(key for key in item if key != found[1][0]), found[1][0]
    return (found[0][0], found[1][0]) if [len(keys) for keys in found] == [1, 1] else None


def _found_keys(item: Mapping[Any, Any]) -> tuple[str, str]:
    keys = _usual_keys(item)
    if keys is None:
        raise SpecError(
            f"a dict with the keys {_listed(item)}; say which are the input and the label, as keys=('image', 'label')"
        )
    return keys


def _picked(item: Mapping[Any, Any], keys: tuple[str, str]) -> tuple[Any, Any]:
    if missing := [key for key in keys if key not in item]:
        raise SpecError(
            f"a dict with the keys {_listed(item)} lacks {missing[0]!r}; say others, as keys=(input, label)"
        )
    return item[keys[0]], item[keys[1]]


def _listed(item: Mapping[Any, Any]) -> str:
    return ", ".join(repr(key) for key in item)


def _names_by_dataset(labels: npt.NDArray[Any], examples: Any, keys: tuple[str, str] | None) -> tuple[str, ...] | None:
    """Return what a dataset itself calls its classes, as torchvision's and Hugging Face's do, if that is plain."""
    names = getattr(examples, "classes", None)
    features = getattr(examples, "features", None)
    if keys is not None and isinstance(features, Mapping):
        names = getattr(features.get(keys[1]), "names", None)
    if labels.dtype.kind not in "iu" or not isinstance(names, list | tuple):
        return None
    is_plain = all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    return tuple(names) if is_plain and labels.min() >= 0 and labels.max() < len(names) else None


def _differing_columns(folder: Path, of: str, train: tuple[str, ...], test: tuple[str, ...]) -> SpecError:
    alone = [
        f"{name!r} of {part} alone"
        for part, ours, theirs in (("train", train, test), ("test", test, train))
        for name in ours
        if name not in theirs
    ]
    how = ", ".join(alone[:6]) or "they are in another order"
    found = f"columns of train_{of} and test_{of}"
    return unusable(folder, found, f"differ, {how}; give both the same in the same order, as test[train.columns]")


def _stored(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return how values are written: bools of inputs and of vectors as numbers, labels of text not yet."""
    if dtype.kind == "U":
        return np.dtype("U")
    return np.dtype(np.float32) if dtype.kind == "b" else kept_dtype(dtype)


def _in_words(forms: list[tuple[tuple[int, ...], np.dtype[Any]]]) -> str:
    return " and ".join(f"{dtype} of shape {shape}" for shape, dtype in forms)
