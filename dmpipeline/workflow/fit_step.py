"""The step `fit`: datamodels of a run, and the second moments of its models, which other steps share."""

import functools
import json
import os
import time
from pathlib import Path
from typing import Literal, Unpack

import numpy as np
import numpy.typing as npt

from dmdata.reading.long_work import shows_stages
from dmpipeline.data.examples import Dataset
from dmpipeline.fitting.checkpoints import Checkpoints
from dmpipeline.fitting.counting import counted_moments
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.fitting.fitted import fit_notes_path
from dmpipeline.fitting.fitting import fit, folds_of, split_rows
from dmpipeline.fitting.settings import VALIDATION, FitKeywords, FitSettings, StageProgress
from dmpipeline.moments.moments import BLOCK_ROWS, Moments
from dmpipeline.runs.derivation import sources_of, take_note
from dmpipeline.runs.directory import write_beside
from dmpipeline.runs.store import Run, opened
from dmpipeline.runs.targets import TargetsName, datamodels_path, fitted_array, place_of
from dmpipeline.workflow.run_arrays import open_rows

FIT_STAGES = {"gradients": "models", "moments": "models", "paths": "targets", "refit": "targets", "pairs": "models"}
"""Stages that `fit_run` reports, and what each counts."""

PriorName = Literal["none", "gradient"]

_FITTING = "fitting"


@shows_stages(FIT_STAGES)
def fit_run(
    run: Run | str | os.PathLike[str],
    *,
    targets: TargetsName = "test",
    validation: float = VALIDATION,
    folds: int | None = None,
    prior: PriorName = "none",
    pairs: bool = False,
    directory: Path | None = None,
    scheduler: str | None = None,
    progress: StageProgress | None = None,
    settings: FitSettings | None = None,
    **changes: Unpack[FitKeywords],
) -> Datamodels:
    """Fit datamodels of what a run stores first of its targets, mostly margins, and save them in the run.

    Held-out models are left out. What is finished is kept in the run, or in `directory`, as `dmpipeline.fit` has it.

    Parameters
    ----------
    run : Run or path
        Complete.
    targets : {"test", "train"}
        Whose outputs to predict: test examples', or training examples'. Of the latter, the weight of a target on
        itself is what its own presence adds: it stands out where an example is only remembered.
    validation, folds, pairs, scheduler, settings, **changes
        As for `dmpipeline.fit`.
    prior : {"none", "gradient"}
        Scores to guide the fit by: gradients of the run's first models, `dmpipeline.gradient_scores`.
    directory : path, optional
        Where another run's moments are kept whose models this run begins with: a shorter one of the same seed.
    progress : callable, optional
        See `dmpipeline.fitting.settings.StageProgress`.

    Raises
    ------
    IncompleteRunError
        If rows are missing.
    RunError
        If the arrays are damaged, or the results cannot be written.
    SpecError, ConvergenceError
        As for `dmpipeline.fit`; SpecError also if the run stores no outputs of these targets, before any is read.

    Examples
    --------
    >>> import dmpipeline
    >>> dmpipeline.fit_run("wine-run")  # doctest: +SKIP
    >>> print(dmpipeline.explain("wine-run", 0))  # doctest: +SKIP
    """
    run = opened(run)
    settings = (settings or FitSettings()).with_changes(**changes)
    array = fitted_array(run, targets)
    run.require_complete()
    dataset = run.dataset()
    run.write_catalog(datamodels="sound", dataset=dataset)
    started, sources = time.monotonic(), sources_of(run, "datamodels", targets)
    masks, margins = (open_rows(run, name, run.spec.rows.models) for name in ("train_masks", array))
    datamodels = fit(
        masks,
        margins,
        validation=validation,
        folds=folds,
        prior=gradient_prior(run, dataset, targets, progress) if prior == "gradient" else None,
        pairs=pairs,
        directory=directory or place_of(run, _FITTING, targets),
        scheduler=scheduler,
        progress=progress,
        settings=settings,
    )
    datamodels.save(datamodels_path(run, targets))
    facts: dict[str, float] = {"n_models": run.spec.n_models}
    used = folds_of(run.spec.n_models, validation=validation, folds=folds, is_guided=prior != "none")
    facts |= {"validation": validation} if used is None else {"folds": used}
    facts |= {"seconds": round(time.monotonic() - started, 3)} | _facts_of(datamodels)
    facts |= _facts_of_pairs(datamodels) if pairs else {}
    facts |= {name: value for name, value in settings.changed().items() if name not in ("threads", "device")}
    write_beside(fit_notes_path(run, targets), json.dumps(facts, indent=2) + "\n")
    options = [] if folds is None else ["--folds", str(folds)]
    options += ["--validation", str(validation)] if folds is None and validation != VALIDATION else []
    options += ["--prior", prior] if prior != "none" else []
    options += ["--pairs"] if pairs else []
    options += ["--positive"] if settings.is_positive else []
    take_note(run, "datamodels", targets, sources, options)
    run.write_catalog(datamodels="sound", dataset=dataset)
    return datamodels


def _facts_of(datamodels: Datamodels) -> dict[str, float]:
    facts = {"nonzero_weights": float(np.count_nonzero(datamodels.weight) / max(datamodels.n_targets, 1))}
    if datamodels.prior_strength is not None:
        facts["prior_strength"] = datamodels.prior_strength
    if datamodels.certificate is not None:
        facts["worst_gap"] = float(datamodels.certificate.gap.max())
        facts["worst_kkt"] = float(datamodels.certificate.kkt.max())
    return facts


def _facts_of_pairs(datamodels: Datamodels) -> dict[str, float]:
    """Say how many pairs a target has, none where validation models do not speak for them, and what they are worth."""
    terms = datamodels.pairs
    facts: dict[str, float] = {"pair_terms": 0 if terms is None else terms.weight.shape[1]}
    if terms is not None and datamodels.validation_error is not None:
        alone, both = float(datamodels.validation_error.mean()), float(terms.validation_error.mean())
        facts |= {
            "validation_error": alone,
            "validation_error_with_pairs": both,
            "worst_pair_gap": float(terms.gap.max()),
        }
    return facts


def moments_of_run(
    run: Run, targets: TargetsName, validation: float, *, progress: StageProgress | None
) -> tuple[Moments, Moments]:
    """Return the moments of a run's models: of those to fit on, and of those that choose lambda.

    Most runs are fitted already; then the moments are kept, and no model is read.
    """
    n_models, n_fit = run.spec.n_models, split_rows(run.spec.n_models, validation)
    array = fitted_array(run, targets)
    masks, margins = (open_rows(run, name, run.spec.rows.models) for name in ("train_masks", array))
    place = Checkpoints.at(place_of(run, _FITTING, targets))
    with place.claimed():
        rows = counted_moments(
            place,
            masks,
            margins,
            [(0, n_fit), (n_fit, n_models)],
            block_rows=BLOCK_ROWS,
            threads=None,
            progress=lambda done: None if progress is None else progress("moments", done, n_models),
        )
    fitting, held_out = rows.parts
    return fitting, held_out


def gradient_prior(
    run: Run, dataset: Dataset, targets: TargetsName, progress: StageProgress | None
) -> npt.NDArray[np.float32]:
    """Score examples by gradients of the run's first models, (n_train, n_targets); see `gradient_scores`."""
    from dmpipeline.fitting.attribution import gradient_scores  # loads torch

    report = None if progress is None else functools.partial(progress, "gradients")
    return gradient_scores(run, dataset=dataset, targets=targets, progress=report)
