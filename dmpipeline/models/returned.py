"""What a user's function returned as a model's outputs: taken where it can be, else told what to return instead."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dmpipeline.data.examples import Dataset
from dmpipeline.errors import TrainingError, UserCodeError

Parts = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""Outputs of one model on all train and on all test examples."""

_MOST_CLASSES = 5


def checked_outputs(returned: Any, dataset: Dataset, mask: npt.NDArray[np.bool_], *, row: int, path: str) -> Parts:
    """Make the outputs of one model of what a function returned.

    Parameters
    ----------
    returned : pair of array-likes, shapes (n_train, ..., n_classes) and (n_test, ..., n_classes)
        Arrays of any real numbers, tensors on any device, nested lists or data frames; of a regression to one number
        also (n_train,) and (n_test,).
    dataset : Dataset
    mask : array of bool, shape (n_train,)
        The model's subset.
    row : int
        The model's.
    path : str
        Import path of the function; errors name both.

    Returns
    -------
    train, test : array of float32

    Raises
    ------
    UserCodeError
        If it is not two arrays of numbers of these shapes.
    TrainingError
        If it lacks columns for classes that the subset has no example of, or holds what is not finite.
    """
    wanted = output_shapes(dataset)
    called = f"row {row}: recipe.function {path!r}"
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        raise UserCodeError(
            f"{called} returned {_words_for(returned)}; return two arrays, (train_outputs, test_outputs), of shapes "
            f"{wanted[0]} and {wanted[1]}",
            field="recipe.function",
            value=path,
            rows=[row],
        )
    arrays = [
        _as_numbers(part, f"{called} returned as {name} outputs")
        for name, part in zip(("train", "test"), returned, strict=True)
    ]
    if dataset.is_regression and dataset.n_classes == 1:
        arrays = [array[:, None] if array.ndim == 1 else array for array in arrays]
    if tuple(array.shape for array in arrays) != wanted:
        raise _of_other_shapes(called, [array.shape for array in arrays], wanted, dataset, mask, row=row, path=path)
    for name, array in zip(("train", "test"), arrays, strict=True):
        _require_finite(array, name, called, row=row)
    return arrays[0], arrays[1]


def output_shapes(dataset: Dataset) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of one model's outputs on all train and all test examples."""
    positions = dataset.train_labels.shape[1:] if dataset.is_sequence else ()
    return (dataset.n_train, *positions, dataset.n_classes), (dataset.n_test, *positions, dataset.n_classes)


def _as_numbers(part: Any, what: str) -> npt.NDArray[np.float32]:
    if isinstance(part, torch.Tensor):
        part = part.detach().cpu().to_dense()
        part = (part.float() if part.is_floating_point() else part).numpy()
    if isinstance(part, np.ma.MaskedArray):
        part = np.ma.filled(part.astype(np.float64), np.nan)
    if hasattr(part, "toarray"):
        raise UserCodeError(f"{what} a sparse {type(part).__name__}; return its .toarray()", field="recipe.function")
    try:
        array = np.asarray(part)
        is_real = array.dtype.kind in "fiub" or (array.dtype.kind == "O" and array.ndim > 0)
        if is_real:
            with np.errstate(over="ignore"):  # what is too large is said below
                return np.asarray(array, np.float32)
        wrong = f"an array of {array.dtype}" if array.ndim else _words_for(part)
    except (TypeError, ValueError) as error:
        wrong = f"{_words_for(part)} that is not an array of numbers ({error})"
    raise UserCodeError(f"{what} {wrong}; return an array of real numbers", field="recipe.function")


def _words_for(returned: Any) -> str:
    if returned is None:
        return "None"
    if isinstance(returned, tuple | list):
        return f"a {type(returned).__name__} of {len(returned)}"
    if isinstance(returned, dict):
        return f"a dict of {', '.join(map(repr, list(returned)[:4])) or 'nothing'}"
    shape = getattr(returned, "shape", None)
    return f"one {type(returned).__name__}{f' of shape {tuple(shape)}' if isinstance(shape, tuple) else ''}"


def _of_other_shapes(
    called: str,
    found: Sequence[tuple[int, ...]],
    wanted: tuple[tuple[int, ...], tuple[int, ...]],
    dataset: Dataset,
    mask: npt.NDArray[np.bool_],
    *,
    row: int,
    path: str,
) -> UserCodeError | TrainingError:
    """State what is wrong with shapes: as far as can be told, what the function did."""
    train, test = found
    facts: dict[str, Any] = {"field": "recipe.function", "value": path, "rows": [row]}
    said = f"{called} returned shapes {train} and {test}"
    return_these = f"return outputs of all train and of all test examples, {wanted[0]} and {wanted[1]}"
    if not (dataset.is_regression or dataset.is_sequence):
        present = np.unique(dataset.train_labels[mask])
        if len(present) < dataset.n_classes and found == [
            (dataset.n_train, len(present)),
            (dataset.n_test, len(present)),
        ]:
            return TrainingError(
                f"{called} returned {len(present)} columns for {dataset.n_classes} classes: the model's subset of "
                f"{np.count_nonzero(mask):,} has no example of {_classes_lacking(dataset, present)}; return a column "
                "for every class of the dataset, in the order of their numbers, those that the subset lacks with a "
                "logit below all others (scikit-learn's classes_ says which columns there are, as in `logits = "
                f"np.full((len(x), {dataset.n_classes}), -20.0); logits[:, model.classes_] = "
                "np.log(np.clip(model.predict_proba(x), 1e-6, 1))`)",
                rows=[row],
                classes=[k for k in range(dataset.n_classes) if k not in present],
            )
    if (test, train) == wanted:
        return UserCodeError(f"{said}, test before train; {return_these}", **facts)
    if train and train[0] == int(mask.sum()) and dataset.n_train != train[0]:
        return UserCodeError(f"{said}, train outputs of the subset's examples alone; {return_these}", **facts)
    if (train, test) == ((dataset.n_train,), (dataset.n_test,)):
        kind = "one number an example, such as predicted labels or one decision value"
        return UserCodeError(f"{said}, {kind}, where each class has a column; {return_these}", **facts)
    return UserCodeError(f"{said}; {return_these}", **facts)


def _classes_lacking(dataset: Dataset, present: npt.NDArray[Any]) -> str:
    names = dataset.class_names
    lacking = sorted(set(range(dataset.n_classes)) - set(present.tolist()))
    shown = [f"{k} ({names[k]})" if names else str(k) for k in lacking[:_MOST_CLASSES]]
    more = f" and {len(lacking) - _MOST_CLASSES} more" if len(lacking) > _MOST_CLASSES else ""
    return f"class{'es' * (len(lacking) != 1)} {', '.join(shown)}{more}"


def _require_finite(array: npt.NDArray[np.float32], name: str, called: str, *, row: int) -> None:
    is_finite = np.isfinite(array)
    if is_finite.all():
        return
    if np.isneginf(array).any() and not (np.isnan(array) | np.isposinf(array)).any():
        cause = "-inf, as the logarithm of a probability of 0 is; clip first, as np.log(np.clip(p, 1e-6, 1))"
    else:
        cause = "not finite (NaN or infinite); see why the model did not learn, and return finite numbers"
    n_wrong, example = int((~is_finite).sum()), int(np.argwhere(~is_finite)[0, 0])
    raise TrainingError(
        f"{called} returned {name} outputs of which {n_wrong:,} are {cause} (example {example} first)", rows=[row]
    )
