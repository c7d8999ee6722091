"""A dataset as a folder of four arrays, which is read without being loaded and written without being held.

The files are `train_inputs.npy`, `train_labels.npy`, `test_inputs.npy` and `test_labels.npy`. They are mapped from disk
when read, and written an example or a piece at a time beside their place, so that a folder is whole or not there.
"""

import contextlib
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dmpipeline.errors import SpecError, explain_os_errors
from dmpipeline.examples import Dataset, checked_dataset, checked_name, kept_dtype, pieces_of, unusable

ARRAYS = ("train_inputs", "train_labels", "test_inputs", "test_labels")
"""Names of a dataset's arrays, in files and in archives."""


class Examples(Protocol):
    """A map-style dataset of torch, or whatever counts and indexes its examples the same way."""

    def __len__(self) -> int:
        """Count the examples."""

    def __getitem__(self, index: int, /) -> tuple[Any, Any]:
        """Give one example's input and label."""


def load_folder(folder: Path) -> Dataset:
    """Map a dataset from a folder; its name is the folder's.

    Float32 and uint8 inputs stay on disk and are read where they are used; others are converted in memory.

    Raises
    ------
    SpecError
        If a file is missing or its array cannot be used. Nothing is unpickled.
    """
    name = checked_name(folder.resolve().name, folder)
    train_inputs, train_labels, test_inputs, test_labels = (_mapped(folder, array) for array in ARRAYS)
    return checked_dataset(
        name,
        (train_inputs, train_labels),
        (test_inputs, test_labels),
        source=folder,
        example_order=f"that of the arrays in the folder {name}",
    )


def save_dataset(
    folder: str | os.PathLike[str],
    train: tuple[Any, Any] | Examples,
    test: tuple[Any, Any] | Examples,
) -> Path:
    """Write examples as a folder that a run's `dataset` can name; the dataset is called as the folder.

    Parameters
    ----------
    folder : path
        Where to; missing, or empty.
    train, test : pair of arrays, or map-style torch Dataset
        Inputs and labels, arrays or tensors, with an example along the first axis; or a Dataset that gives (input,
        label) by index, each asked for once, in order, and never all in memory: leave random augmentation out of it.
        Floats are stored as float32, uint8 as it is, other integers as int64. Tensors that look like pictures, channels
        first (C, height, width) with 1, 3 or 4 channels, are stored channels last; numpy arrays and PIL pictures of
        mode L, RGB or RGBA as they are. Labels are integers for classes, vectors of integers for sequences, floats or
        vectors of floats for a regression; see `dmpipeline.examples.Dataset`.

    Returns
    -------
    folder : pathlib.Path
        Absolute: what to write as `dataset`.

    Raises
    ------
    SpecError
        If the folder holds something, or what was given is no dataset; nothing is left behind.
    RunError
        If it cannot be written.
    """
    folder = Path(folder).absolute()
    checked_name(folder.name, folder)
    with explain_os_errors(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise unusable(folder, "something", "is there already; choose another folder, or remove it")
        # bears the folder's name, for what is written is read back before it is moved into place
        staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial") / folder.name
        staging.mkdir(parents=True)
        try:
            for part, examples in (("train", train), ("test", test)):
                _write_part(staging, part, examples, folder)
            try:
                load_folder(staging)
            except SpecError as error:
                raise SpecError(str(error).replace(str(staging), str(folder)), field="dataset") from None
            os.rename(staging, folder)
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
    with written_beside(path) as partial, open(partial, "wb") as file:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype).data)


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Give a path to write to; move what was written into place if all went well, and remove it if not."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _mapped(folder: Path, name: str) -> npt.NDArray[Any]:
    path = folder / f"{name}.npy"
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        raise unusable(folder, "a folder", f"lacks {path.name}; `dmpipeline.save_dataset` writes all four") from error
    except (OSError, ValueError, EOFError) as error:
        raise unusable(folder, f"{path.name}, {error},", "cannot be read; write it with numpy.save") from error


def _write_part(staging: Path, part: str, examples: tuple[Any, Any] | Examples, folder: Path) -> None:
    paths = [staging / f"{part}_{what}.npy" for what in ("inputs", "labels")]
    if isinstance(examples, tuple | list):
        if len(examples) != 2:
            raise unusable(folder, f"{part} of {len(examples)} arrays", "is to be a pair of inputs and labels")
        for path, values in zip(paths, examples, strict=True):
            array = _as_array(values, picture_axes=4)
            write_array(path, array.shape, kept_dtype(array.dtype), pieces_of(array))
        return
    if len(examples) == 0:
        raise unusable(folder, part, "is to hold one example or more; it holds none")
    _write_examples(paths, examples, f"dataset {folder}: {part}")


def _write_examples(paths: list[Path], examples: Examples, where: str) -> None:
    """Write inputs and labels side by side, for an example is asked for but once."""
    n_examples = len(examples)
    forms: list[tuple[tuple[int, ...], np.dtype[Any]]] = []
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(path, "wb")) for path in paths]
        # a Dataset need not end by IndexError, so its length is believed
        for index in range(n_examples):
            values = [_as_array(value, picture_axes=3) for value in examples[index]]
            found = [(value.shape, kept_dtype(value.dtype)) for value in values]
            if not forms:
                if len(found) != 2:
                    raise SpecError(f"{where} gives {len(found)} values an example; give (input, label)")
                forms = found
                for file, (shape, dtype) in zip(files, forms, strict=True):
                    header = {"descr": dtype.str, "fortran_order": False, "shape": (n_examples, *shape)}
                    np.lib.format.write_array_header_1_0(file, header)
            if found != forms:
                raise SpecError(
                    f"{where}: example {index} is {_in_words(found)}, where the first is {_in_words(forms)}; "
                    f"give all of one shape and kind"
                )
            for file, value, (_, dtype) in zip(files, values, forms, strict=True):
                file.write(np.ascontiguousarray(value, dtype).data)


def _as_array(value: Any, *, picture_axes: int) -> npt.NDArray[Any]:
    """Make an array of what may be given; tensors with so many axes, channels third from the end, are pictures."""
    # who hands over a tensor or a PIL picture has imported its package, and nobody else needs it
    torch, pil = sys.modules.get("torch"), sys.modules.get("PIL.Image")
    if torch is not None and isinstance(value, torch.Tensor):
        array: npt.NDArray[Any] = value.detach().cpu().numpy()
        is_picture = array.ndim == picture_axes and array.shape[-3] in (1, 3, 4)
        return np.moveaxis(array, -3, -1) if is_picture else array
    if pil is not None and isinstance(value, pil.Image) and value.mode not in ("L", "RGB", "RGBA"):
        raise SpecError(f"a picture of mode {value.mode} has no bytes to store; convert it to L, RGB or RGBA")
    return np.asarray(value)


def _in_words(forms: list[tuple[tuple[int, ...], np.dtype[Any]]]) -> str:
    return " and ".join(f"{dtype} of shape {shape}" for shape, dtype in forms)
