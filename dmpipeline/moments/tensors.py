"""Named arrays in one `.pt` file, as torch writes them: complete or not there, read without unpickling anything."""

import contextlib
import ctypes
import mmap
import os
import pickle
import sys
import tempfile
from collections.abc import Iterator, Mapping
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


@contextlib.contextmanager
def new_tensors(
    shapes: Mapping[str, tuple[tuple[int, ...], Any]], path: str | os.PathLike[str]
) -> Iterator[dict[str, NDArray[Any]]]:
    """Make a file of zeros and yield its arrays, mapped: what is written into them in the block is what it holds.

    So arrays larger than memory are written once, not to one file and then copied to another. The file is moved into
    place when the block ends, and is not there if the block raises.

    Parameters
    ----------
    shapes : mapping of name to (shape, dtype)
        None of the arrays may be empty.
    path
        As for `save_tensors`.

    Raises
    ------
    RunError
        If the disk has no room, or the file cannot be written.
    """
    with explain_missing_extra():
        import torch

    path = Path(path)
    with contextlib.ExitStack() as whole:
        with explain_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = whole.enter_context(replacing(path))
            _save_empty(shapes, partial)
            file = whole.enter_context(open(partial, "r+b"))
            os.posix_fallocate(
                file.fileno(), 0, partial.stat().st_size
            )  # without it a full disk would kill the process
            with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
                tensors = torch.load(partial, map_location="cpu", mmap=True, weights_only=True)
        yield {name: tensor.numpy() for name, tensor in tensors.items()}
        with explain_os_errors(path):
            os.fsync(file.fileno())  # of what was written through the mapping, too
            whole.pop_all().close()


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


def page_out(array: NDArray[Any]) -> None:
    """Let go of the memory in which pages of a mapped array are cached; they come from the file when next used.

    What is read once would otherwise push out what is used again and again. Does nothing where Linux cannot.
    """
    if not sys.platform.startswith("linux"):
        return
    start = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    n_bytes = array.ctypes.data + array.nbytes - start
    if n_bytes > 0:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        madvise(start, n_bytes, _MADV_PAGEOUT)  # an advice: whether it was taken does not matter


_MADV_PAGEOUT = 21  # of linux/mman.h, since Linux 5.4


def _save_empty(shapes: Mapping[str, tuple[tuple[int, ...], Any]], path: Path) -> None:
    """Write a file of arrays whose numbers are holes; memory is not claimed, however large they are."""
    import torch

    with tempfile.TemporaryFile(dir=path.parent) as holes, torch.serialization.skip_data():
        empty = {name: np.memmap(holes, dtype, "w+", shape=shape) for name, (shape, dtype) in shapes.items()}
        torch.save({name: torch.from_numpy(array) for name, array in empty.items()}, path)


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
