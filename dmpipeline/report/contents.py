"""What the page shows of datamodels, as facts ready for JSON and as arrays: the largest weights, and their sums.

All weights of a large release do not fit a page. Of each target it has its strongest helpers and harmers, what the
output is foreseen to be without the first k of them, for k from 1 to all, and its support. Of each training example it
has what all its weights add up to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dmpipeline.errors import SpecError
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.report.thumbnails import Thumbnails

MOST_POINTS = 60_000
"""Of predicted and true outputs, at most; held-out subsets are left out beyond."""

_BLOCK_BYTES = 2**27
_NOT_KNOWN = 255
_EXACT_ENOUGH = 2_048  # from here on float16 knows whole numbers alone
_MOST_MATRIX_CLASSES = 64


@dataclass(slots=True)
class Contents:
    """What a page shows.

    Attributes
    ----------
    facts : dict
        Ready for JSON.
    arrays : dict of str to array
        As `dmpipeline.report.payload.packed` takes them.
    pictures : dict of str to Thumbnails
        Of "train" and "targets".
    halves : sequence of arrays of float32, shape (n_train, n_targets), or None
        Weights of fits to both halves of the models, where they were fitted.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    pictures: dict[str, Thumbnails] = field(default_factory=dict)
    halves: Sequence[npt.NDArray[np.float32]] | None = None


def removal_steps(n_train: int) -> list[int]:
    """List at how many removals the page knows the foreseen output: each up to 20, then in growing steps.

    >>> removal_steps(30)
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 25, 30]
    """
    steps = list(range(min(20, n_train) + 1))
    while steps[-1] < n_train:
        size = 5 * 2 ** max(0, int(np.log2(steps[-1] / 20)))
        steps.append(min(n_train, steps[-1] + size))
    return steps


def listed_of(n_targets: int) -> int:
    """Return how many helpers and harmers of a target are listed, so that a page of many targets stays small."""
    return 50 if n_targets <= 500 else 30 if n_targets <= 2_000 else 20


def add_weights(contents: Contents, datamodels: Datamodels, *, measured: Sequence[int] = ()) -> None:
    """Add what the weights say; where both halves of the models were fitted, also in how many a weight has its sign.

    Parameters
    ----------
    contents : Contents
    datamodels : Datamodels
        With weights of raw masks.
    measured : sequence of int
        Numbers of removals that models were retrained for: what is foreseen is known for them, too.

    Notes
    -----
    Weights are sorted in blocks of targets of 128 MiB.
    """
    weight, halves = datamodels.weight, contents.halves
    n_train, n_targets = weight.shape
    listed = min(listed_of(n_targets), n_train)
    steps = np.array(sorted({*removal_steps(n_train), *measured}), np.int32)
    index_type = np.uint16 if n_train < 2**16 else np.int32
    arrays = contents.arrays
    arrays["removal_k"] = steps
    arrays["target_full"] = (datamodels.bias.astype(np.float64) + weight.sum(axis=0, dtype=np.float64)).astype(
        np.float32
    )
    for kind in ("helper", "harmer"):
        arrays[f"{kind}_index"] = np.zeros((n_targets, listed), index_type)
        arrays[f"{kind}_weight"] = np.zeros((n_targets, listed), np.float32)
        arrays[f"{kind}_count"] = np.zeros(n_targets, np.uint16)
        arrays[f"{kind}_total"] = np.zeros(n_targets, np.int32)
        arrays[f"{kind}_drop"] = np.zeros((n_targets, len(steps)), np.float32)
        if halves is not None:
            arrays[f"{kind}_stable"] = np.full((n_targets, listed), _NOT_KNOWN, np.uint8)
    size = max(1, _BLOCK_BYTES // (8 * n_train))
    for start in range(0, n_targets, size):
        block = slice(start, min(start + size, n_targets))
        columns = np.ascontiguousarray(weight[:, block].T, np.float64)
        order = np.argsort(-columns, axis=1, kind="stable")
        ranked = np.take_along_axis(columns, order, axis=1)
        for kind, sign in (("helper", 1), ("harmer", -1)):
            of_kind = order if sign > 0 else order[:, ::-1]
            values = ranked if sign > 0 else ranked[:, ::-1]
            total = (sign * values > 0).sum(axis=1)
            sums = np.concatenate([np.zeros((len(values), 1)), np.cumsum(values, axis=1)], axis=1)
            # beyond its last helper a target has none left to remove
            reached = np.minimum(steps[None], total[:, None])
            arrays[f"{kind}_total"][block] = total
            arrays[f"{kind}_count"][block] = np.minimum(total, listed)
            arrays[f"{kind}_drop"][block] = np.take_along_axis(sums, reached, axis=1)
            arrays[f"{kind}_index"][block] = of_kind[:, :listed]
            arrays[f"{kind}_weight"][block] = values[:, :listed]
            if halves is not None:
                first = of_kind[:, :listed]
                n_same = sum(
                    (np.take_along_axis(half[:, block].T, first, axis=1) * sign > 0).astype(np.uint8) for half in halves
                )
                arrays[f"{kind}_stable"][block] = n_same
    arrays["train_sum"] = weight.sum(axis=1, dtype=np.float64).astype(np.float32)
    arrays["train_size"] = np.abs(weight).sum(axis=1, dtype=np.float64).astype(np.float32)
    arrays["train_nonzero"] = np.count_nonzero(weight, axis=1).astype(np.int32)
    contents.facts |= {"n_train": n_train, "n_targets": n_targets}


def add_labels(
    contents: Contents,
    weight: npt.NDArray[np.floating[Any]],
    *,
    train: npt.NDArray[Any],
    targets: npt.NDArray[Any],
    class_names: Sequence[str] | None,
) -> None:
    """Add labels, where they are one class or number an example, and the influence of classes on one another.

    Parameters
    ----------
    contents : Contents
    weight : array of float, shape (n_train, n_targets)
    train, targets : arrays, shape (n_train,), (n_targets,)
        int classes, or float numbers.
    class_names : sequence of str, optional

    Raises
    ------
    SpecError
        If there are other numbers of labels.
    """
    if (len(train), len(targets)) != weight.shape:
        raise SpecError(
            f"{len(train)} training and {len(targets)} target labels do not fit weights of shape {weight.shape}; give "
            "a label for each row and for each column"
        )
    if train.ndim != 1:
        return
    is_regression = train.dtype.kind == "f"
    kind = np.float32 if is_regression else np.int32
    contents.arrays |= {"train_label": train.astype(kind), "target_label": targets.astype(kind)}
    contents.facts |= {
        "classes": None if class_names is None else list(class_names),
        "is_regression": is_regression,
    }
    if is_regression:
        return
    classes, counts = np.unique(train, return_counts=True)
    shown = np.sort(classes[np.argsort(-counts, kind="stable")[:_MOST_MATRIX_CLASSES]])
    if len(shown) < 2:
        return
    sums = np.stack([weight[train == each].sum(axis=0, dtype=np.float64) for each in shown])
    of_targets = [sums[:, targets == each] for each in shown]
    unknown = np.full(len(shown), np.nan)  # of a class that no target has
    matrix = np.stack([own.mean(axis=1) if own.shape[1] else unknown for own in of_targets], axis=1)
    contents.arrays["class_matrix"] = matrix.astype(np.float32)
    contents.facts["matrix_classes"] = [
        str(each) if class_names is None else class_names[int(each)] for each in shown.tolist()
    ]
    contents.facts["matrix_note"] = (
        f" Shown are the {len(shown)} commonest of {len(classes)} classes." if len(classes) > len(shown) else ""
    )


def add_outputs(contents: Contents, predicted: npt.NDArray[Any], true: npt.NDArray[Any]) -> None:
    """Add predicted and true outputs on held-out subsets, each of shape (n_subsets, n_targets).

    Raises
    ------
    SpecError
        If the shapes do not fit the weights.
    """
    n_targets = contents.facts["n_targets"]
    if predicted.shape != true.shape or true.ndim != 2 or true.shape[1] != n_targets:
        raise SpecError(
            f"predicted {predicted.shape} and true {true.shape} do not fit {n_targets} targets: one row a held-out "
            "subset, one column a target"
        )
    n_kept = max(1, min(len(true), MOST_POINTS // n_targets))
    kept = {"predicted": predicted[:n_kept], "true": true[:n_kept]}
    largest = max(float(np.abs(array).max()) for array in kept.values())
    is_short = n_kept * n_targets > MOST_POINTS // 2 and largest < _EXACT_ENOUGH
    values = true.astype(np.float64)
    contents.arrays |= {name: array.astype(np.float16 if is_short else np.float32) for name, array in kept.items()}
    contents.arrays |= {
        "target_mean": values.mean(axis=0).astype(np.float32),
        "target_low": values.min(axis=0).astype(np.float32),
        "target_high": values.max(axis=0).astype(np.float32),
    }


def add_map(contents: Contents, part: str, x: npt.NDArray[Any], y: npt.NDArray[Any], *, name: str, note: str) -> None:
    """Add where examples of a part, "train" or "targets", lie on a map."""
    contents.arrays |= {f"map_{part}_x": x.astype(np.float32), f"map_{part}_y": y.astype(np.float32)}
    contents.facts["maps"][part] = {"name": name, "note": note}


def empty_facts(**known: Any) -> dict[str, Any]:
    """Return facts of a page that knows nothing yet, with what is known put in place."""
    nothing: Mapping[str, Any] = {
        "title": "Datamodels",
        "summary": "",
        "models": "",
        "warnings": [],
        "tiles": [],
        "words_used": [],
        "nouns": {"train": "training example", "targets": "test example"},
        "output": "output",
        "is_margin": False,
        "better": None,
        "is_regression": False,
        "targets": "test",
        "alpha": None,
        "level": 0.95,
        "n_retrainings": 0,
        "classes": None,
        "lds": None,
        "curves": [],
        "curves_remark": "",
        "tables": [],
        "methods": None,
        "verification": None,
        "leakage": None,
        "duplicates": None,
        "suspects": None,
        "clusters": None,
        "maps": {},
        "retrained": {},
        "features": None,
        "words": None,
        "left_out": [],
        "run": None,
        "options": "",
        "target_numbers": None,
        "footer": "",
    }
    return dict(nothing) | known
