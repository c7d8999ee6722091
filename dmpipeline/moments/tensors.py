"""Named arrays in one `.pt` file, as torch writes them: complete or not there, read without unpickling anything."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dmdata.atomic import replacing
from dmdata.errors import FormatError
from dmpipeline.errors import SpecError, explain_missing_extra, explain_os_errors

if TYPE_CHECKING:
    import torch


def save_tensors(arrays: Mapping[str, NDArray[Any]], path: str | os.PathLike[str]) -> Path:
    """Write a dict of tensors; the file is written next to its destination and moved into place.

    Raises
    ------
    SpecError
        If the path does not end in ``.pt``, by which the form is known when it is read.
    RunError
        If the file cannot be written.
    """
    with explain_missing_extra():
        import torch  # slow to import

    path = Path(path)
    if path.suffix != ".pt":
        raise SpecError(f"{path} does not end in .pt, so it would not be read again; choose {path.name}.pt")
    with explain_os_errors(path):
        _save_whole(
            {name: torch.from_numpy(np.require(array, requirements="W")) for name, array in arrays.items()}, path
        )
    return path


def map_tensors(path: str | os.PathLike[str], names: set[str] | None = None) -> dict[str, NDArray[Any]]:
    """Map the tensors of a file into memory; what is changed there does not reach the file.

    Raises
    ------
    FormatError
        If it is not such a file, or does not hold tensors of just these names, if any are given.
    RunError
        If it cannot be read.
    """
    with explain_missing_extra():
        import torch

    with explain_os_errors(Path(path)):
        try:
            tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise FormatError(
                f"{path} cannot be read ({error}); delete it, or write it again", url=str(path)
            ) from error
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise FormatError(f"{path} does not hold tensors by name; delete it, or write it again", url=str(path))
    if names is not None and set(tensors) != names:
        raise FormatError(
            f"{path} does not hold the tensors {', '.join(sorted(names))}; delete it, or write it again", url=str(path)
        )
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _save_whole(tensors: "dict[str, torch.Tensor]", path: Path) -> None:
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, open(partial, "wb") as file:
        try:
            torch.save(tensors, file)
        except RuntimeError as error:
            # its writer fails once more where it closes after a failed write, and hides what the system said
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())
