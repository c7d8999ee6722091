"""What users hand over as inputs and labels, made into plain arrays without losing a value or a name.

Tensors, pandas and polars tables and series, lists and masked arrays are converted where that is exact; what cannot be
is refused with what to do instead. No package is imported here: an object's own package is there already.
"""

import sys
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from dmpipeline.data.examples import OWN_DATA
from dmpipeline.errors import SpecError

_LISTED = 5


def input_array(value: Any, where: str, *, picture_axes: int) -> tuple[npt.NDArray[Any], tuple[str, ...] | None]:
    """Make an array of inputs that were handed over.

    Parameters
    ----------
    value : array, tensor, table or list
        A table has a column a feature, each of numbers or bools.
    where : str
        What an error calls them, as `dataset wine: train_inputs`.
    picture_axes : int
        A tensor with this many axes, the third from the end of length 1, 3 or 4, holds pictures with channels first;
        they are moved last.

    Returns
    -------
    array : array of bool, int, uint or float; bfloat16 and other short floats of torch become float32
    feature_names : tuple of str, or None
        Of a table.

    Raises
    ------
    SpecError
        If they cannot be converted exactly.
    """
    _refuse_sparse(value, where)
    if is_table(value):
        return _table_array(value, where)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        array = _tensor_array(value, where)
        is_picture = array.ndim == picture_axes and array.shape[-3] in (1, 3, 4)
        return (np.moveaxis(array, -3, -1) if is_picture else array), None
    pil = sys.modules.get("PIL.Image")
    if pil is not None and isinstance(value, pil.Image) and value.mode not in ("L", "RGB", "RGBA"):
        raise SpecError(
            f"{where}: a picture of mode {value.mode} has no bytes to store; convert it to L, RGB or RGBA",
            field="dataset",
        )
    array = _plain_array(value, where)
    if array.dtype.kind == "O":
        array = _numbers_of_objects(array, where)
    if array.dtype.kind not in "biuf":
        raise SpecError(
            f"{where} of {array.dtype} are neither floats nor integers; convert them to numbers", field="dataset"
        )
    return array, None


def label_array(value: Any, where: str) -> tuple[npt.NDArray[Any], tuple[str, ...] | None]:
    """Make an array of labels that were handed over.

    Parameters
    ----------
    value : array, tensor, series, categories, table or list
        Of numbers, bools or text. A table of several columns is taken as one-hot rows, or numbers of a regression.
    where : str
        What an error calls them, as `dataset wine: train_labels`.

    Returns
    -------
    array : array of bool, int, uint, float or str
    names : tuple of str, or None
        The columns of a table of several.

    Raises
    ------
    SpecError
        If a label is missing, or they are of mixed kinds, or of a kind that cannot be a label.
    """
    _refuse_sparse(value, where)
    torch = sys.modules.get("torch")
    names = None
    if is_table(value):
        columns = _columns(value)
        names = tuple(str(name) for name, _ in columns)
        arrays = [label_array(column, f"{where}, column {name!r}")[0] for name, column in columns]
        if len(arrays) == 1:
            return arrays[0], None
        if any(array.dtype.kind == "U" for array in arrays):
            raise SpecError(
                f"{where} is a table of {len(arrays)} columns with text; give the one column that is the label",
                field="dataset",
            )
        array = np.stack(arrays, axis=1)
    elif torch is not None and isinstance(value, torch.Tensor):
        array = _tensor_array(value, where)
    else:
        array = _plain_array(value, where)
    if array.dtype.kind == "O":
        array = _labels_of_objects(array, where)
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8")
    if array.dtype.kind == "T":
        array = array.astype(str)
    if array.dtype.kind not in "biufU":
        raise SpecError(
            f"{where} of {array.dtype} are neither floats nor integers nor text; convert them", field="dataset"
        )
    if array.dtype.kind == "f" and array.size:
        rows = np.atleast_1d(array)
        if (missing := np.isnan(rows.reshape(len(rows), -1)).any(1)).any():
            raise _missing(np.flatnonzero(missing), len(rows), where, "NaN")
    return array, names


def is_table(value: Any) -> bool:
    """Return whether something is a table of named columns, as pandas' and polars' DataFrame."""
    return hasattr(value, "columns") and hasattr(value, "dtypes") and hasattr(value, "to_numpy")


def _columns(table: Any) -> list[tuple[Any, Any]]:
    """List a table's columns with their names; by place where pandas allows a name twice."""
    by_place = getattr(table, "iloc", None)
    if by_place is not None:
        return [(name, by_place[:, place]) for place, name in enumerate(table.columns)]
    return [(name, table[name]) for name in table.columns]


def _table_array(table: Any, where: str) -> tuple[npt.NDArray[Any], tuple[str, ...]]:
    arrays, odd = [], []
    columns = _columns(table)
    for name, column in columns:
        is_category = str(column.dtype).lower().startswith(("category", "categorical", "enum"))
        array = None if is_category else _numeric_column(column)
        if array is None:
            odd.append(f"{name!r} ({column.dtype})")
        else:
            arrays.append(array)
    if odd:
        listed = ", ".join(odd[:_LISTED]) + (f" and {len(odd) - _LISTED} more" if len(odd) > _LISTED else "")
        raise SpecError(
            f"{where}: column{'s' * (len(odd) > 1)} {listed} of the table hold{'s' * (len(odd) == 1)} no numbers; "
            "encode text and categories as columns of numbers, for example by pandas.get_dummies of train and test "
            "together, or leave them out",
            field="dataset",
        )
    if not arrays:
        raise SpecError(f"{where} is a table without columns; give one with a column a feature", field="dataset")
    return np.stack(arrays, axis=1), tuple(str(name) for name, _ in columns)


def _numeric_column(column: Any) -> npt.NDArray[Any] | None:
    """Return a column's numbers, NaN where a value is missing; None if it holds something else."""
    array = np.asarray(column)
    if array.dtype.kind in "biuf":
        return array
    # pandas' own integers and bools, and Arrow's, become objects where values may be missing
    if array.dtype.kind == "O":
        values = array.tolist()
        if all(_is_missing(value) or isinstance(value, bool | int | float | np.number | np.bool_) for value in values):
            return np.array([np.nan if _is_missing(value) else value for value in values], np.float64)
    return None


def _tensor_array(tensor: Any, where: str) -> npt.NDArray[Any]:
    """Return a tensor's values; kinds of float that NumPy lacks become float32, which holds each of them exactly."""
    plain = tensor.detach()
    if str(plain.layout) != "torch.strided":
        raise SpecError(f"{where} is a tensor of layout {plain.layout}; give .to_dense()", field="dataset")
    if plain.is_quantized:
        raise SpecError(f"{where} is a quantized tensor; give .dequantize()", field="dataset")
    plain = plain.cpu()
    try:
        array: npt.NDArray[Any] = plain.numpy()
    except (TypeError, RuntimeError) as error:
        if not plain.is_floating_point():
            raise SpecError(
                f"{where} is a tensor of {plain.dtype}, which NumPy lacks ({error}); convert it, as by .float()",
                field="dataset",
            ) from error
        array = plain.float().numpy()
    return array


def _plain_array(value: Any, where: str) -> npt.NDArray[Any]:
    if isinstance(value, np.ma.MaskedArray):
        if np.ma.getmaskarray(value).any():
            found = np.flatnonzero(np.ma.getmaskarray(value).reshape(len(value), -1).any(1))
            raise _missing(found, len(value), where, "masked")
        return np.asarray(value.data)
    is_list = isinstance(value, list | tuple)
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise SpecError(
            f"{where} cannot be made one array ({error}); give examples of one shape and kind", field="dataset"
        ) from error
    if is_list and array.dtype.kind in "US":
        # NumPy would write numbers and missing values as text, too
        array = np.array(value, object)
    return array


def _labels_of_objects(array: npt.NDArray[Any], where: str) -> npt.NDArray[Any]:
    """Find the one kind that all labels are of."""
    values = array.ravel().tolist()
    missing = [place for place, value in enumerate(values) if _is_missing(value)]
    if missing:
        n_examples = len(np.atleast_1d(array))
        examples = np.unique(np.array(missing) // (len(values) // n_examples))
        raise _missing(examples, n_examples, where, repr(values[missing[0]]))
    kinds = Counter(_kind(value) for value in values)
    if set(kinds) == {"text"}:
        return np.array([value.decode() if isinstance(value, bytes) else str(value) for value in values]).reshape(
            array.shape
        )
    if set(kinds) == {"bool"}:
        return np.array(values, bool).reshape(array.shape)
    if kinds and set(kinds) <= {"whole number", "number"}:
        dtype = np.int64 if set(kinds) == {"whole number"} else np.float64
        return np.array(values, dtype).reshape(array.shape)
    listed = ", ".join(f"{count:,} of {kind}" for kind, count in sorted(kinds.items()))
    raise SpecError(
        f"{where} are of mixed or unknown kinds: {listed}; give all as text, as whole numbers, as bools or as floats",
        field="dataset",
    )


def _numbers_of_objects(array: npt.NDArray[Any], where: str) -> npt.NDArray[Any]:
    values = array.ravel().tolist()
    wrong = [value for value in values if not _is_missing(value) and _kind(value) not in _NUMERIC]
    if wrong and array.ndim == 1 and _kind(wrong[0]) == "text":
        raise SpecError(
            f"{where} hold {str(wrong[0])[:40]!r}, a text; make each text a row of numbers, for example by "
            f"scikit-learn's TfidfVectorizer, in a DataFrame whose columns are the words: {OWN_DATA}",
            field="dataset",
        )
    if wrong:
        raise SpecError(
            f"{where} hold {wrong[0]!r}, a {type(wrong[0]).__name__}, among their values, not a number; encode "
            "text and categories as numbers, for example by pandas.get_dummies, and give examples of one shape",
            field="dataset",
        )
    return np.array([np.nan if _is_missing(value) else value for value in values], np.float64).reshape(array.shape)


_NUMERIC = ("bool", "whole number", "number")


def _kind(value: Any) -> str:
    if isinstance(value, str | bytes):
        return "text"
    if isinstance(value, bool | np.bool_):
        return "bool"
    if isinstance(value, int | np.integer):
        return "whole number"
    if isinstance(value, float | np.floating):
        return "number"
    return f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")


def _is_missing(value: Any) -> bool:
    return (
        value is None
        or type(value).__name__ in ("NAType", "NaTType")
        or (isinstance(value, float | np.floating) and bool(np.isnan(value)))
    )


def _missing(examples: npt.NDArray[Any], n_examples: int, where: str, as_what: str) -> SpecError:
    if n_examples == 1:
        return SpecError(f"{where} is missing ({as_what}); fill it, or leave this example out", field="dataset")
    listed = ", ".join(str(int(example)) for example in examples[:_LISTED]) + (
        ", ..." if len(examples) > _LISTED else ""
    )
    return SpecError(
        f"{where}: {len(examples):,} of {n_examples:,} examples have a missing value ({as_what}), namely {listed}; "
        "fill them, or leave these examples out",
        field="dataset",
    )


def _refuse_sparse(value: Any, where: str) -> None:
    sparse = sys.modules.get("scipy.sparse")
    if sparse is not None and sparse.issparse(value):
        n_bytes = 4 * int(np.prod(value.shape, dtype=np.float64))
        raise SpecError(
            f"{where} is a sparse matrix of shape {value.shape} ({type(value).__name__}); give .toarray(), which "
            f"takes {n_bytes / 2**30:.2g} GiB as float32",
            field="dataset",
        )
