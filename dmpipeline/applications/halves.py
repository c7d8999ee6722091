"""Datamodels fitted to either half of a run's models: what both say is there, and what one alone says may be chance."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dmpipeline.applications.evidence import Evidence
from dmpipeline.errors import SpecError
from dmpipeline.fitting.fitting import fit
from dmpipeline.runs.store import Run
from dmpipeline.runs.targets import TargetsName, fitted_array, place_of
from dmpipeline.workflow.run_arrays import RowsOf, open_rows

LEAST_HALF = 20
"""Fewer models than these are not fitted."""

_PLACE = "halves"


def run_to_halve(evidence: Evidence, stability: bool | None) -> Run | None:
    """Return the run whose halves are to be fitted, or None.

    Raises
    ------
    SpecError
        If stability is asked for where it cannot be measured.
    """
    if stability is False or (stability is None and evidence.run is None):
        return None
    run = evidence.require_run("models to fit halves of are")
    if run.spec.n_models < 2 * LEAST_HALF:
        if stability is None:
            return None
        raise SpecError(
            f"{run.spec.n_models} models are too few to fit halves of; train {2 * LEAST_HALF} or more, or ask for no "
            "stability",
            field="stability",
            n_models=run.spec.n_models,
        )
    run.require_complete()
    return run


def weights_of_halves(
    run: Run,
    targets: TargetsName,
    columns: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[npt.NDArray[np.float32]]:
    """Fit datamodels to the first and to the second half of a run's models.

    Parameters
    ----------
    run : Run
        Complete.
    targets : {"test", "train"}
    columns : sequence of int, optional
        These targets alone.
    progress : callable, optional
        Called with (targets done, targets in total), over both fits.

    Returns
    -------
    weights : list of two arrays of float32, shape (n_train, n_targets)
        The second moments of the halves are kept in the run's folder ``halves``, which may be removed; not in a run
        that may only be read.
    """
    models = run.spec.rows.models
    middle = models.start + (models.stop - models.start) // 2
    weights = []
    for nth, rows in enumerate((slice(models.start, middle), slice(middle, models.stop))):
        masks = open_rows(run, "train_masks", rows)
        outputs = open_rows(run, fitted_array(run, targets), rows)
        some = outputs if columns is None else _Columns(outputs, np.asarray(columns, np.intp))
        place = place_of(run, _PLACE, targets) if os.access(run.path, os.W_OK) else None
        weights.append(fit(masks, some, directory=place, progress=_of_half(nth, progress)).weight)
    return weights


def _of_half(nth: int, progress: Callable[[int, int], None] | None) -> Callable[[str, int, int], None] | None:
    """Count the targets of a half's refit after those of the halves before."""
    if progress is None:
        return None
    return lambda stage, done, total: progress(nth * total + done, 2 * total) if stage == "refit" else None


@dataclass(frozen=True, slots=True)
class _Columns:
    """Some columns of a run's array, still lazy."""

    array: RowsOf
    columns: npt.NDArray[np.intp]

    @property
    def shape(self) -> tuple[int, int]:
        return (self.array.shape[0], len(self.columns))

    def __getitem__(self, rows: slice) -> npt.NDArray[Any]:
        return self.array[rows][:, self.columns]
