"""Which views of pictures at test time a reference averaged: found out by training some of our rows with each."""

import math
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from dmpipeline.checks.findings import Finding
from dmpipeline.models.recipes import LogisticRegression, Perceptron, Recipe
from dmpipeline.runs.preparation import Prepared
from dmpipeline.runs.store import Run
from dmpipeline.runs.targets import TargetsName, fitted_array
from dmpipeline.runs.training import RowTrainer
from dmpipeline.training.way import Way

_LEVEL = 0.05


def compare_views(
    run: Run,
    targets: TargetsName,
    ours: npt.NDArray[Any],
    theirs: npt.NDArray[Any],
    *,
    n_rows: int,
    first_row: int = 0,
    n_subsets: tuple[int, int] | None = None,
) -> Finding | None:
    """Train the first rows again with each `tta` of the recipe, and see which shift brings ours to the reference.

    A row trained with other views is the same model, so that a few rows show what views do to each target.

    Parameters
    ----------
    run : Run
    targets : {"test", "train"}
    ours, theirs : array of float, shape (n_models, n_targets) and (m_models, n_targets)
        Ours are of the run's rows from `first_row` on; all finite.
    n_rows : int
        Rows to train with each.
    first_row : int
    n_subsets : tuple of int, optional
        Of ours and of the reference's models, where some were trained on one subset: these are not independent.

    Returns
    -------
    finding : Finding or None
        It fails where other views fit clearly better than those of the recipe; None where the recipe takes no pictures.
    """
    prepared = Prepared.of(run)
    recipe = prepared.recipe
    if not isinstance(recipe, Recipe) or isinstance(recipe, Perceptron | LogisticRegression):
        return None  # the user's own code, and networks that see numbers in a row
    if prepared.dataset.image_shape is None:
        return None
    options = [option for option in get_args(Recipe.model_fields["tta"].annotation) if option != recipe.tta]
    array, rows = fitted_array(run, targets), list(range(first_row, first_row + min(n_rows, len(ours))))
    again = {}
    for option in options:
        other = Prepared(run, prepared.dataset, recipe.model_copy(update={"tta": option}))
        # the run's own way may not know other views; one by one, every network is trained
        again[option] = RowTrainer(run, other.trainer(way=Way("loop", 1))).rows(rows)[array]
    return best_views(recipe.tta, ours, theirs, again, n_subsets=n_subsets)


def best_views(
    own: str,
    ours: npt.NDArray[Any],
    theirs: npt.NDArray[Any],
    again: Mapping[str, npt.NDArray[Any]],
    *,
    n_subsets: tuple[int, int] | None = None,
) -> Finding:
    """Say which views bring ours to the reference.

    Parameters
    ----------
    own : str
        The views of ours.
    ours, theirs : array of float, shape (n_models, n_targets) and (m_models, n_targets)
        All finite.
    again : dict of str to array of float, shape (n_rows, n_targets)
        For each other views, what the first models of ours give with them.
    n_subsets : tuple of int, optional
        As for `compare_views`.

    Returns
    -------
    finding : Finding
        It fails where other views fit clearly better than `own`, which they would by chance in 5% of comparisons at
        most: targets share their noise, so that means of both sides may well lie apart in the direction of a change.
    """
    from scipy.stats import norm  # slow to import

    deviation = ours.std(axis=0, dtype=np.float64)
    unit = np.where(deviation > 0, deviation, 1)
    apart = (theirs.mean(axis=0, dtype=np.float64) - ours.mean(axis=0, dtype=np.float64)) / unit
    # as if retrainings of one subset were one model: no less than their noise
    noise = sum(1 / n for n in n_subsets or (len(ours), len(theirs)))
    left, is_sure = {own: float((apart**2).mean()) - noise}, {own: False}
    for option, outputs in again.items():
        change = (outputs.astype(np.float64) - ours[: len(outputs)]) / unit
        # how far apart means are along the change, and by how much that scatters if nothing but models differs
        along = change.mean(axis=0) / len(unit)
        scatter = float((ours @ (along / unit)).std()) * math.sqrt(noise)
        is_sure[option] = float(apart @ along) > norm.isf(_LEVEL / len(again)) * scatter
        # what few rows leave unknown of the change is noise as well
        more = change.var(axis=0, ddof=1).mean() / len(outputs) if len(outputs) > 1 else 0.0
        left[option] = float(((apart - change.mean(axis=0)) ** 2).mean()) - noise - float(more)
    shifts = {option: math.sqrt(max(0.0, square)) for option, square in left.items()}
    best = min(left, key=lambda option: left[option])
    fits = not is_sure[best] or left[own] - left[best] < noise
    listed = ", ".join(f"{option} {shift:.3f}" for option, shift in sorted(shifts.items(), key=lambda pair: pair[1]))
    told = f"views at test time that fit the reference best: {best}; root mean square shift left with each: {listed}"
    if not fits:
        told += f"; ours are of tta: {own}, create a run with --set tta={best}"
    return Finding("tta", passed=fits, detail=told, level="statistics", effect=shifts[own], n_rows=len(theirs))
