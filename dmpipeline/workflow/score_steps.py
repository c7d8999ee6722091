"""The steps that score a run's datamodels on its held-out models: alone, next to other estimates, and as curves."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dmdata.reading.long_work import shows_stages
from dmpipeline.errors import RunError, SpecError
from dmpipeline.figures.curve_picture import draw_curves
from dmpipeline.fitting.fitted import fit_facts, load_datamodels
from dmpipeline.fitting.fitting import fit_moments
from dmpipeline.fitting.settings import VALIDATION, StageProgress
from dmpipeline.runs.derivation import result_path, sources_of, take_note, warn_of_old_datamodels
from dmpipeline.runs.directory import write_beside
from dmpipeline.runs.store import Run, opened
from dmpipeline.runs.targets import TargetsName, command, fitted_array, require_datamodels
from dmpipeline.scoring.alternatives import Comparison, compare, debiased, difference_of_means, ridge
from dmpipeline.scoring.curves import LearningCurve
from dmpipeline.scoring.evaluation import Evaluation, evaluate
from dmpipeline.scoring.learning import default_counts, learning_curves, split_counts
from dmpipeline.workflow.fit_step import gradient_prior, moments_of_run
from dmpipeline.workflow.run_arrays import open_rows

CURVE_STAGES = {"gradients": "models", "moments": "models", "points": "fits"}
"""Stages that `curve_run` reports, and what each counts."""

COMPARE_STAGES = {"moments": "models"}
"""Stages that `compare_run` reports, and what each counts."""

PLAIN, GRADIENT = "plain", "gradient scores"
"""Names of the curves that `curve_run` returns."""


def evaluate_run(run: Run | str | os.PathLike[str], targets: TargetsName = "test") -> Evaluation:
    """Score a run's datamodels on its held-out models.

    Parameters
    ----------
    run : Run or path
    targets : {"test", "train"}
        Which datamodels.

    Raises
    ------
    IncompleteRunError
        If the run has no datamodels yet.
    SpecError
        If it has too few held-out subsets.
    RunError
        If arrays or datamodels are damaged, or the scores cannot be written.

    Warns
    -----
    OldResultWarning
        If the datamodels were fitted on other models than the run has now: the scores are those of that fit.

    Examples
    --------
    >>> import dmpipeline
    >>> evaluation = dmpipeline.evaluate_run("wine-run")  # doctest: +SKIP
    >>> dmpipeline.report_run("wine-run", evaluation)  # doctest: +SKIP
    """
    run = opened(run)
    array, held_out, sources = (
        fitted_array(run, targets),
        run.spec.rows.held_out,
        sources_of(run, "evaluation", targets),
    )
    require_datamodels(run, targets)
    datamodels = load_datamodels(run, targets)
    warn_of_old_datamodels(run, targets)
    evaluation = evaluate(
        datamodels,
        open_rows(run, "train_masks", held_out),
        open_rows(run, array, held_out),
        n_retrainings=run.spec.held_out.n_retrainings,
    )
    facts = evaluation.as_dict() | {"targets": targets, "n_models": sources["n_models"]}
    write_beside(result_path(run, "evaluation", targets), json.dumps(facts, indent=2) + "\n")
    take_note(run, "evaluation", targets, sources)
    return evaluation


@shows_stages(COMPARE_STAGES)
def compare_run(run: Run, *, targets: TargetsName = "test", progress: StageProgress | None = None) -> Comparison:
    """Score a run's datamodels next to other estimates from the same models, on its held-out models.

    These are least squares on the support of the saved ones, ridge with the same validation models, and differences of
    means.

    Parameters
    ----------
    run : Run
        Complete, with datamodels.
    targets : {"test", "train"}
        Which datamodels.
    progress : callable, optional
        Called with (stage, done, total); see `COMPARE_STAGES`.

    Raises
    ------
    IncompleteRunError
        If the run has no datamodels yet, or rows are missing.
    SpecError
        If it has too few held-out subsets.
    RunError
        If arrays, datamodels or the notes on their fit are damaged.
    """
    require_datamodels(run, targets)
    array, saved, held_out = fitted_array(run, targets), load_datamodels(run, targets), run.spec.rows.held_out
    share = fit_facts(run, targets).get("validation", VALIDATION)
    fitting, validation = moments_of_run(run, targets, share, progress=progress)
    whole = fitting + validation
    estimates = {
        "saved datamodels": saved,
        "debiased": debiased(saved, whole),
        "ridge": ridge(fitting, validation),
        "difference of means": difference_of_means(whole),
    }
    masks, margins = open_rows(run, "train_masks", held_out), open_rows(run, array, held_out)
    return compare(estimates, masks, margins, n_retrainings=run.spec.held_out.n_retrainings)


@shows_stages(CURVE_STAGES)
def curve_run(
    run: Run,
    counts: Sequence[int] | None = None,
    prior: Literal["gradient"] | None = None,
    *,
    targets: TargetsName = "test",
    validation: float = VALIDATION,
    progress: StageProgress | None = None,
) -> dict[str, LearningCurve]:
    """Draw LDS against the number of a run's models fitted on; write ``curve.json`` and ``curve.svg`` in the run.

    Parameters
    ----------
    run : Run
        Complete.
    counts : sequence of int, optional
        Numbers of models, rising; see `dmpipeline.scoring.learning.default_counts`.
    prior : {"gradient"}, optional
        Draw a second curve, of fits with the run's gradient scores as their prior.
    targets : {"test", "train"}
        Whose outputs to predict.
    validation : float
        Share of each number of models on which lambda is chosen.
    progress : callable, optional
        Called with (stage, done, total); see `CURVE_STAGES`.

    Returns
    -------
    curves : dict of str to LearningCurve
        `PLAIN`, and with a prior `GRADIENT`.

    Raises
    ------
    SpecError
        If the counts or the prior cannot be used, or there are too few held-out subsets.
    IncompleteRunError
        If rows are missing.
    RunError
        If arrays are damaged, or the results cannot be written.
    """
    if prior not in (None, "gradient"):
        raise SpecError(f"prior is {prior!r}; choose gradient, or leave it out", value=prior)
    spec, array = run.spec, fitted_array(run, targets)
    counts = default_counts(spec.n_models, validation=validation) if counts is None else counts
    split_counts(counts, n_models=spec.n_models, validation=validation)
    dataset = run.dataset()
    run.write_catalog(datamodels="sound", dataset=dataset)
    sources = sources_of(run, "curve", targets)
    guided = {} if prior is None else {GRADIENT: gradient_prior(run, dataset, targets, progress)}
    curves = learning_curves(
        *(open_rows(run, name, spec.rows.models) for name in ("train_masks", array)),
        *(open_rows(run, name, spec.rows.held_out) for name in ("train_masks", array)),
        estimates={PLAIN: fit_moments},
        priors=guided,
        counts=counts,
        n_retrainings=spec.held_out.n_retrainings,
        validation=validation,
        progress=progress,
    )
    facts = {name: curve.as_dict() for name, curve in curves.items()}
    write_beside(result_path(run, "curve", targets), json.dumps(facts, indent=2) + "\n")
    draw_curves(curves, curve_picture(run, targets))
    take_note(run, "curve", targets, sources, [] if prior is None else ["--prior", prior])
    return curves


def curve_picture(run: Run, targets: TargetsName = "test") -> Path:
    """Where `curve_run` draws."""
    return result_path(run, "curve", targets).with_suffix(".svg")


def load_curves(run: Run, targets: TargetsName = "test") -> dict[str, LearningCurve]:
    """Read the curves that `curve_run` wrote; empty where there are none.

    Raises
    ------
    RunError
        If they are damaged.
    """
    path = result_path(run, "curve", targets)
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise SpecError("it does not hold curves by name")
        return {name: LearningCurve.from_dict(curve) for name, curve in facts.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} is damaged ({error}); draw it again with `{command(run.path, 'curve', targets)}`", path=run.path
        ) from error
