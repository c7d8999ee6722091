"""Masks and outputs of any kind, read as NumPy arrays some rows at a time: what is taken, and what is refused.

Taken are arrays whose `x[i:j]` can be made a NumPy array (ndarray, LazyArray, Zarr, dask, HDF5), SciPy's sparse
matrices and arrays, torch tensors on any device and pandas DataFrames. A block is converted exactly when it is read:
sparse ones become dense, and bfloat16, which NumPy does not have, becomes float32. What would lose something on the
way (complex numbers, objects, text, dates, masked values) is refused, with what to hand in instead.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dmpipeline.errors import SpecError


class RowSliceable(Protocol):
    """Anything with a shape whose `x[i:j]` can be made a NumPy array: see the module's words on what is taken.

    An array may know what its rows hold without reading them. It then has a method ``content_digest(start, stop)``
    that returns a str, another one as soon as one of these rows is another, or None where it does not know.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of all dimensions, rows first."""

    def __getitem__(self, rows: slice, /) -> Any:
        """Rows i to j, half-open."""


def as_rows(array: Any, name: str) -> RowSliceable:
    """Take an array of any kind in a form whose rows are read quickly; one that is so already is returned as it is.

    Parameters
    ----------
    array
        See the module's words.
    name : str
        What to call it in errors: "masks", "outputs".

    Raises
    ------
    SpecError
        If it has no shape, or is sparse and of a form that has no rows.
    """
    if not hasattr(array, "shape"):
        raise SpecError(f"{name} are a {type(array).__name__}; hand in an array, such as numpy.asarray({name})")
    if _is_sparse(array) and getattr(array, "format", "csr") != "csr" and array.ndim == 2:
        return array.tocsr()  # type: ignore[no-any-return]
    if hasattr(array, "iloc"):
        return _Frame(array)
    if hasattr(array, "detach"):
        is_compressed = str(array.layout) not in ("torch.strided", "torch.sparse_coo")
        return _Tensor(array.to_sparse_coo() if is_compressed else array)
    return array  # type: ignore[no-any-return]


def check_shapes(masks: RowSliceable, outputs: RowSliceable) -> tuple[int, int, int]:
    """Return (n_models, n_train, n_targets), or raise SpecError where the two do not make one regression."""
    for name, array in (("masks", masks), ("outputs", outputs)):
        if not hasattr(array, "shape"):
            raise SpecError(f"{name} are a {type(array).__name__}; hand in an array, such as numpy.asarray({name})")
    of_masks, of_outputs = tuple(masks.shape), tuple(outputs.shape)
    if len(of_masks) != 2:
        raise SpecError(f"masks have shape {of_masks}; expected (n_models, n_train)", shape=of_masks)
    if len(of_outputs) == 3:
        raise SpecError(
            f"outputs have shape {of_outputs}; expected (n_models, n_targets): choose one number a target, such as the "
            "margin of the logits by dmpipeline.models.outputs.correct_class_margins(outputs, labels), "
            "or outputs[:, :, 0]",
            shape=of_outputs,
        )
    if len(of_outputs) != 2:
        raise SpecError(
            f"outputs have shape {of_outputs}; expected (n_models, n_targets): choose one number a target, "
            "such as the margin of the logits, and reshape a single target to (n_models, 1)",
            shape=of_outputs,
        )
    if of_masks[0] != of_outputs[0]:
        raise SpecError(
            f"{of_masks[0]} masks but {of_outputs[0]} rows of outputs: masks have shape {of_masks} and outputs "
            f"{of_outputs}; {_remedy(of_masks, of_outputs)}",
            n_masks=of_masks[0],
            n_outputs=of_outputs[0],
        )
    if 0 in of_masks or 0 in of_outputs:
        raise SpecError(
            f"masks {of_masks} and outputs {of_outputs} leave nothing to fit; "
            "expected at least a model, an example and a target"
        )
    return of_masks[0], of_masks[1], of_outputs[1]


def read_masks(masks: RowSliceable, first: int, last: int) -> NDArray[np.int8]:
    """Read some rows of masks as int8, C-contiguous, shape (last - first, n_train).

    Raises
    ------
    SpecError
        For a value other than 0 and 1, numbers that are not real, or rows of another shape than the array's.
    """
    return as_binary(_read(masks, first, last, "masks", "booleans, or 0 and 1: `masks.astype(bool)`"), first=first)


def read_outputs(outputs: RowSliceable, first: int, last: int) -> NDArray[Any]:
    """Read some rows of outputs as real numbers in native byte order, shape (last - first, n_targets).

    Raises
    ------
    SpecError
        For numbers that are not real, or rows of another shape than the array's.
    """
    return _read(outputs, first, last, "outputs", "real numbers, such as float16 margins: `outputs.astype(float)`")


def as_binary(block: NDArray[Any], *, first: int) -> NDArray[np.int8]:
    """Turn a block of masks, whose first row is `first`, into int8; SpecError names a value other than 0 and 1."""
    if block.dtype == np.bool_:
        return np.ascontiguousarray(block).view(np.int8)
    wrong = (block != 0) & (block != 1)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise SpecError(
            f"masks hold {block[row, column]} at row {first + row}, column {column}; expected booleans, or 0 and 1 "
            "(True where the example was trained on)",
            row=int(first + row),
            column=int(column),
        )
    return np.ascontiguousarray(block, dtype=np.int8)


@dataclass(frozen=True, slots=True, eq=False)
class _Frame:
    """A pandas DataFrame by its rows."""

    frame: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.frame.shape)

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        some = self.frame.iloc[rows]
        block = np.asarray(some.to_numpy())
        if block.dtype.kind != "O":
            return block
        try:  # columns of several types, or of pandas' own with values missing, which become nan
            return np.asarray(some.to_numpy(dtype=np.float64, na_value=np.nan))
        except (TypeError, ValueError):
            return block


@dataclass(frozen=True, slots=True, eq=False)
class _Tensor:
    """A torch tensor by its rows, wherever it is."""

    tensor: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self[0:0].dtype

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        tensor = self.tensor.detach()
        if str(tensor.layout) == "torch.strided":
            return _numpy_of(tensor[rows])
        start, stop, _ = rows.indices(tensor.shape[0])
        return _numpy_of(tensor.narrow_copy(0, start, stop - start).to_dense())


def _numpy_of(tensor: Any) -> NDArray[Any]:
    tensor = tensor.cpu()
    # of what NumPy does not have, bfloat16 and the floats of 8 bits, every value is one of float32
    is_foreign = tensor.is_floating_point() and str(tensor.dtype) not in _NUMPYS
    return np.asarray((tensor.float() if is_foreign else tensor).numpy())


_NUMPYS = {"torch.float16", "torch.float32", "torch.float64"}


def _is_sparse(array: Any) -> bool:
    return hasattr(array, "tocsr") and hasattr(array, "toarray")


def _read(array: RowSliceable, first: int, last: int, name: str, expected: str) -> NDArray[Any]:
    block = as_rows(array, name)[first:last]
    if _is_sparse(block):
        block = block.toarray()
    elif hasattr(block, "todense"):
        block = block.todense()
    if isinstance(block, np.ma.MaskedArray) and np.ma.is_masked(block):
        row = first + int(np.argwhere(np.ma.getmaskarray(block))[0][0])
        raise SpecError(
            f"{name} have masked values, the first in row {row}; fill them in with .filled(...), or leave those rows "
            "out",
            row=row,
        )
    try:
        block = np.asarray(block)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SpecError(
            f"{name}[{first}:{last}] is a {type(block).__name__} that cannot be made a NumPy array ({error}); hand in "
            "one, or an array that can"
        ) from error
    columns = tuple(array.shape[1:])
    if block.shape != (last - first, *columns):
        raise SpecError(f"{name}[{first}:{last}] gave shape {block.shape}; expected {(last - first, *columns)}")
    if block.dtype.kind == "V" and "float" in block.dtype.name:
        block = block.astype(np.float32)  # bfloat16 and the like, of ml_dtypes
    if block.dtype.kind not in "fiub":
        raise SpecError(f"{name} have dtype {block.dtype}; expected {expected}", dtype=str(block.dtype))
    return block.astype(block.dtype.newbyteorder("="), copy=False)


def _remedy(masks: tuple[int, ...], outputs: tuple[int, ...]) -> str:
    """Suggest what may be meant by shapes that disagree."""
    if masks[1] == outputs[0]:
        return "the masks look transposed: hand in masks.T"
    if masks[0] == outputs[1]:
        return "the outputs look transposed: hand in outputs.T"
    if masks[1] == outputs[1]:
        return "both look transposed: hand in masks.T and outputs.T, a row for each model"
    return "hand in the same models in the same order"
