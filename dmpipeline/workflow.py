"""The steps from a trained run to its report: fit, evaluate, report. Each leaves its result in the run's directory.

::

    run/
      datamodels/test_50pct.pt     fit_run
      datamodels/fit.json          fit_run: settings, certificate, seconds
      fitting/                     fit_run: second moments, kept for further fits
      evaluation.json              evaluate_run
      curve.json, curve.svg        curve_run
      report.html                  report_run
      made_from/                   each: what its result was made from, see `dmpipeline.derivation`

What is made of datamodels of training examples has the same names with ``train_`` in front: see `dmpipeline.targets`.

Arrays are read through the run's catalog, a block of rows at a time, as those of a release would be. What is damaged
ends a step with a `RunError` that names the command which finds or replaces it.
"""

import functools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

import dmdata
from dmdata.download import n_requests_of
from dmdata.errors import FormatError
from dmdata.prices import destination_of, price_table, prices_in_words, quote, readable_bytes, readable_usd, usage_of
from dmpipeline.alternatives import Comparison, compare, debiased, difference_of_means, ridge
from dmpipeline.attribution import gradient_scores
from dmpipeline.checkpoints import Checkpoints
from dmpipeline.curves import Estimate, LearningCurve, default_counts, draw_curves, learning_curves, split_counts
from dmpipeline.datamodels import Datamodels
from dmpipeline.datasets import Dataset
from dmpipeline.derivation import old_result, result_path, sources_of, take_note, warn_of_old_datamodels
from dmpipeline.directory import write_beside
from dmpipeline.errors import RunError, SpecError, quoted
from dmpipeline.evaluate import Evaluation, evaluate
from dmpipeline.fitted import command, fit_facts, fit_notes_path, load_datamodels
from dmpipeline.fitting import Progress, fit, fit_moments, split_rows
from dmpipeline.identity import files_digest
from dmpipeline.learned import what_was_learned
from dmpipeline.moments import BLOCK_ROWS, Moments
from dmpipeline.report import Gallery, write_report
from dmpipeline.store import Run
from dmpipeline.subsets import law_in_words, sizes_of
from dmpipeline.targets import TargetsName, datamodels_path, fitted_array, place_of

__all__ = [
    "COMPARE_STAGES",
    "CURVE_STAGES",
    "FIT_STAGES",
    "GRADIENT",
    "PLAIN",
    "PriorName",
    "RowsOf",
    "artifact_name",
    "compare_run",
    "curve_picture",
    "curve_run",
    "download_price",
    "evaluate_run",
    "fit_facts",
    "fit_run",
    "load_curves",
    "load_datamodels",
    "price_of_arrays",
    "probe_seconds_per_model",
    "report_run",
]

FIT_STAGES = {"gradients": "models", "moments": "models", "paths": "targets", "refit": "targets"}
"""Stages that `fit_run` reports, and what each counts."""

CURVE_STAGES = {"gradients": "models", "moments": "models", "points": "fits"}
"""Stages that `curve_run` reports, and what each counts."""

COMPARE_STAGES = {"moments": "models"}
"""Stages that `compare_run` reports, and what each counts."""

PLAIN, GRADIENT = "plain", "gradient scores"
"""Names of the curves that `curve_run` gives."""


PriorName = Literal["none", "gradient"]

_VALIDATION = 0.1
_FITTING = "fitting"


@dataclass(frozen=True, slots=True)
class RowsOf:
    """Some adjacent rows of a run's array, still lazy: `shape` and row slices."""

    run: Run
    array: dmdata.LazyArray
    rows: slice

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""
        return (self.rows.stop - self.rows.start, *self.array.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of an element as it is read."""
        return np.dtype(np.float32) if self.array.dtype.kind == "i" else self.array.dtype

    def content_digest(self, start: int, stop: int) -> str:
        """Tell some rows by the digests that their blocks were stored with, and by their files; none of them is read.

        Rows that are damaged and trained again get the digests that they had before.
        """
        rows = slice(self.rows.start + start, self.rows.start + stop)
        files = files_digest(self.array, rows.start, rows.stop)
        return f"{self.array.name.rpartition('/')[2]} {self.run.rows_digest(rows)} {files}"

    def __getitem__(self, key: slice) -> npt.NDArray[Any]:
        start, stop, _ = key.indices(self.shape[0])
        with _explained(self.run):
            rows = self.array[self.rows.start + start : self.rows.start + stop]
        # labels are numbers, too
        return rows.astype(np.float32) if rows.dtype.kind == "i" else rows


def fit_run(
    run: Run,
    *,
    targets: TargetsName = "test",
    validation: float = _VALIDATION,
    folds: int | None = None,
    prior: PriorName = "none",
    is_positive: bool = False,
    strict: bool = False,
    device: str | None = None,
    directory: Path | None = None,
    scheduler: str | None = None,
    progress: Progress | None = None,
) -> Datamodels:
    """Fit datamodels of what a run stores first of its targets, mostly margins, and save them in the run.

    Held-out models are left out. What is finished is kept in the run, or in `directory`, as `dmpipeline.fit` has it.

    Parameters
    ----------
    run : Run
        Complete.
    targets : {"test", "train"}
        Whose outputs to predict: test examples', or training examples'. Of the latter, the weight of a target on
        itself is what its own presence adds: it stands out where an example is only remembered.
    validation, folds, is_positive, strict, device, scheduler
        As for `dmpipeline.fit`.
    prior : {"none", "gradient"}
        Scores to guide the fit by: gradients of the run's first models, `attribution.gradient_scores`.
    directory : path, optional
        Where another run's moments are kept whose models this run begins with: a shorter one of the same seed.
    progress : callable, optional
        See `dmpipeline.fitting.Progress`.

    Raises
    ------
    IncompleteRunError
        If rows are missing.
    RunError
        If the arrays are damaged, or the results cannot be written.
    SpecError, ConvergenceError
        As for `dmpipeline.fit`; SpecError also if the run stores no outputs of these targets, before any is read.
    """
    array = fitted_array(run, targets)
    _write_catalog(run)
    started, sources = time.monotonic(), sources_of(run, "datamodels", targets)
    masks, margins = (_open(run, name, run.spec.rows.models) for name in ("train_masks", array))
    datamodels = fit(
        masks,
        margins,
        validation=validation,
        folds=folds,
        prior=_gradient_scores(run, targets, progress) if prior == "gradient" else None,
        is_positive=is_positive,
        strict=strict,
        device=device,
        directory=directory or place_of(run, _FITTING, targets),
        scheduler=scheduler,
        progress=progress,
    )
    datamodels.save(datamodels_path(run, targets))
    facts: dict[str, float] = {"n_models": run.spec.n_models}
    facts |= {"validation": validation} if folds is None else {"folds": folds}
    facts |= {"seconds": round(time.monotonic() - started, 3)}
    facts |= {"nonzero_weights": float(np.count_nonzero(datamodels.weight) / max(datamodels.n_targets, 1))}
    if datamodels.prior_strength is not None:
        facts["prior_strength"] = datamodels.prior_strength
    if datamodels.certificate is not None:
        facts["worst_gap"] = float(datamodels.certificate.gap.max())
        facts["worst_kkt"] = float(datamodels.certificate.kkt.max())
    write_beside(fit_notes_path(run, targets), json.dumps(facts, indent=2) + "\n")
    options = [] if folds is None else ["--folds", str(folds)]
    options += ["--validation", str(validation)] if folds is None and validation != _VALIDATION else []
    options += ["--prior", prior] if prior != "none" else []
    options += ["--positive"] if is_positive else []
    take_note(run, "datamodels", targets, sources, options)
    _write_catalog(run)
    return datamodels


def evaluate_run(run: Run, targets: TargetsName = "test") -> Evaluation:
    """Score a run's datamodels on its held-out models.

    Parameters
    ----------
    run : Run
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
    """
    array, held_out, sources = (
        fitted_array(run, targets),
        run.spec.rows.held_out,
        sources_of(run, "evaluation", targets),
    )
    datamodels = load_datamodels(run, targets)
    warn_of_old_datamodels(run, targets)
    evaluation = evaluate(
        datamodels,
        _open(run, "train_masks", held_out),
        _open(run, array, held_out),
        n_retrainings=run.spec.held_out.n_retrainings,
    )
    facts = evaluation.as_dict() | {"targets": targets, "n_models": sources["n_models"]}
    write_beside(result_path(run, "evaluation", targets), json.dumps(facts, indent=2) + "\n")
    take_note(run, "evaluation", targets, sources)
    return evaluation


def compare_run(run: Run, *, targets: TargetsName = "test", progress: Progress | None = None) -> Comparison:
    """Score a run's datamodels beside other estimates from the same models, on its held-out models.

    These are least squares on the support of the saved ones, ridge with the same validation models, and differences of
    means.

    Parameters
    ----------
    run : Run
        Complete, with datamodels.
    targets : {"test", "train"}
        Which datamodels.
    progress : callable, optional
        Called with (stage, done, in all); see `COMPARE_STAGES`.

    Raises
    ------
    IncompleteRunError
        If the run has no datamodels yet, or rows are missing.
    SpecError
        If it has too few held-out subsets.
    RunError
        If arrays, datamodels or the notes on their fit are damaged.
    """
    array, saved, held_out = fitted_array(run, targets), load_datamodels(run, targets), run.spec.rows.held_out
    share = fit_facts(run, targets).get("validation", _VALIDATION)
    fitting, validation = _moments(run, targets, share, progress=progress)
    whole = fitting + validation
    estimates = {
        "saved datamodels": saved,
        "debiased": debiased(saved, whole),
        "ridge": ridge(fitting, validation),
        "difference of means": difference_of_means(whole),
    }
    masks, margins = _open(run, "train_masks", held_out), _open(run, array, held_out)
    return compare(estimates, masks, margins, n_retrainings=run.spec.held_out.n_retrainings)


def curve_run(
    run: Run,
    counts: Sequence[int] | None = None,
    prior: Literal["gradient"] | None = None,
    *,
    targets: TargetsName = "test",
    validation: float = _VALIDATION,
    progress: Progress | None = None,
) -> dict[str, LearningCurve]:
    """Draw LDS against the number of a run's models fitted on; write ``curve.json`` and ``curve.svg`` in the run.

    Parameters
    ----------
    run : Run
        Complete.
    counts : sequence of int, optional
        Numbers of models, rising; see `dmpipeline.curves.default_counts`.
    prior : {"gradient"}, optional
        Draw a second curve, of fits with the run's gradient scores as their prior.
    targets : {"test", "train"}
        Whose outputs to predict.
    validation : float
        Share of each number of models on which lambda is chosen.
    progress : callable, optional
        Called with (stage, done, in all); see `CURVE_STAGES`.

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
    _write_catalog(run)
    sources = sources_of(run, "curve", targets)
    estimates: dict[str, Estimate] = {PLAIN: fit_moments}
    if prior is not None:
        estimates[GRADIENT] = functools.partial(fit_moments, prior=_gradient_scores(run, targets, progress))
    curves = learning_curves(
        *(_open(run, name, spec.rows.models) for name in ("train_masks", array)),
        *(_open(run, name, spec.rows.held_out) for name in ("train_masks", array)),
        estimates=estimates,
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
            raise SpecError("it holds no curves by name")
        return {name: LearningCurve.from_dict(curve) for name, curve in facts.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} is damaged ({error}); draw it again with `{command(run, 'curve', targets)}`", path=run.path
        ) from error


def report_run(run: Run, evaluation: Evaluation, targets: TargetsName = "test") -> Path:
    """Write a run's page, ``report.html``; return its path.

    Parameters
    ----------
    run : Run
    evaluation : Evaluation
        Of these targets' datamodels, by `evaluate_run`.
    targets : {"test", "train"}

    Raises
    ------
    IncompleteRunError
        If the run has no datamodels yet.
    RunError
        If arrays, datamodels, the notes on their fit or the learning curve are damaged, or the page cannot be written.

    Warns
    -----
    OldResultWarning
        If the datamodels were fitted on other models than the run has now. The page says so, too, as it says of a
        learning curve that is old.
    """
    array, spec, dataset, sources = (
        fitted_array(run, targets),
        run.spec,
        run.dataset(),
        sources_of(run, "report", targets),
    )
    datamodels = load_datamodels(run, targets)
    warn_of_old_datamodels(run, targets)
    n_subsets, n_retrainings = spec.held_out.n_subsets, spec.held_out.n_retrainings
    held_out = spec.rows.held_out
    masks = _open(run, "train_masks", held_out)[0 : held_out.stop]
    margins = _open(run, array, held_out)[0 : held_out.stop].astype(np.float32)
    old = {what: old_result(run, what, targets) for what in ("datamodels", "curve")}
    of_train = " of training examples" if targets == "train" else ""
    path = write_report(
        result_path(run, "report", targets),
        title=f"Datamodels{of_train} of {dataset.name} {law_in_words(spec)}",
        evaluation=evaluation,
        datamodels=datamodels,
        predicted=datamodels.predict(masks[::n_retrainings]),
        true=margins.reshape(n_subsets, n_retrainings, -1).mean(1),
        n_models=sources["n_models"],
        made=_how_it_was_made(run, targets, sources),
        costs=_costs(run, targets),
        gallery=_gallery(dataset, targets),
        output_name=array.partition("_")[2].removesuffix("s").replace("_", " "),
        curves=load_curves(run, targets),
        old={what: found.why for what, found in old.items() if found is not None},
        learned=what_was_learned(run, dataset),
    )
    take_note(run, "report", targets, sources)
    return path


def download_price(run: Run) -> dmdata.Estimate:
    """Price a download of a run's artifacts, were they on a requester-pays bucket."""
    return dmdata.estimate("**", catalog=run.path)


def price_of_arrays(run: Run) -> dmdata.Estimate:
    """Price a download of all that a run will hold, trained or not, were it on a requester-pays bucket.

    To where bytes are set to go, and with what is set of the month, as `dmdata.estimate` has it.
    """
    sizes = [int(run.array(name).nbytes) for name in run.spec.arrays]
    n_requests = sum(n_requests_of(size) + 1 for size in sizes)
    to = destination_of(None)
    way = quote(sum(sizes), n_requests, to, usage=usage_of())
    return dmdata.Estimate(way, way, to, price_table().date)


def probe_seconds_per_model(run: Run) -> float:
    """Measure how long a model of a run takes on this machine, by training a few of its own; nothing is kept.

    As many as its first block trains side by side: fewer would leave cores idle and seem slower than they are.
    """
    trainer = run.trainer()
    with trainer.workers() as (_, n_workers):
        rows = run.spec.blocks[0][: trainer.way.n_models * n_workers]
    # the first steps of a process pay for what later ones find ready
    for some in (rows[:1], rows):
        began = time.perf_counter()
        run.train_rows(trainer, some)
    return (time.perf_counter() - began) / len(rows)


def artifact_name(run: Run, array: str) -> str:
    """Name one of a run's arrays as its catalog does."""
    return f"{run.provenance['dataset']['name']}/{run.alpha_name}/{array}"


def _how_it_was_made(run: Run, targets: TargetsName, sources: Mapping[str, Any]) -> dict[str, object]:
    spec, provenance = run.spec, run.provenance
    sessions = provenance["sessions"]
    versions = provenance["versions"]
    return {
        "dataset": f"{provenance['dataset']['name']}, {provenance['dataset']['fingerprint'][:16]}",
        "training examples": provenance["dataset"]["n_train"],
        "examples in a subset": sizes.in_words if (sizes := sizes_of(run.spec, run.provenance)) else "not known",
        "recipe": f"{spec.recipe.name}, version {spec.recipe.version}",
        "seed": spec.seed,
        "models to fit on": spec.n_models,
        "held-out models": f"{spec.held_out.n_subsets} subsets, {spec.held_out.n_retrainings} trainings each",
        "trained in": f"{sum(session['seconds'] for session in sessions):,.0f} s",
        "device": provenance["machine"]["device"],
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "created": provenance["created"],
        "datamodels, SHA-256": sources["datamodels"],
        "held-out rows, SHA-256 of their digests": sources["held_out"],
    } | _certificate(run, targets)


def _certificate(run: Run, targets: TargetsName) -> dict[str, object]:
    facts = fit_facts(run, targets)
    if "worst_gap" not in facts:
        return {}
    return {
        "certificate of the fit": f"duality gap at most {facts['worst_gap']:.1e} of a target's variance, optimality "
        f"conditions kept within {facts['worst_kkt']:.1e} of lam"
    }


def _costs(run: Run, targets: TargetsName) -> dict[str, object]:
    price, spent, facts = download_price(run), dmdata.spend(), fit_facts(run, targets)
    return {
        "a download of the same from a requester-pays bucket": (
            f"{readable_usd(price.usd)} for {readable_bytes(price.n_bytes)} in {price.n_requests:,} requests, "
            f"{prices_in_words()} to {price.destination}"
        ),
        "spent through this machine's ledger": f"{readable_usd(spent.usd)} in {spent.n_requests:,} requests",
        "time of the fit": f"{facts['seconds']:,.1f} s" if "seconds" in facts else "not recorded",
    }


def _gallery(dataset: Dataset, targets: TargetsName) -> Gallery | None:
    if dataset.image_shape is None:
        return None
    # a single channel is a grey picture; bytes stay bytes, on disk where they are mapped
    shape = dataset.image_shape[:2] if dataset.image_shape[2:] == (1,) else dataset.image_shape
    pictures = {"train": dataset.train_inputs, "test": dataset.test_inputs}
    labels = {"train": dataset.train_labels, "test": dataset.test_labels}
    return Gallery(
        train=pictures["train"].reshape(-1, *shape),
        targets=pictures[targets].reshape(-1, *shape),
        train_labels=[dataset.name_of(label) for label in labels["train"]],
        target_labels=[dataset.name_of(label) for label in labels[targets]],
    )


def _moments(
    run: Run, targets: TargetsName, validation: float, *, progress: Progress | None
) -> tuple[Moments, Moments]:
    """Give the moments of a run's models, of those to fit on and of those that choose lambda; kept ones where they are.

    The run is fitted already, mostly: then no model is read.
    """
    n_models, n_fit = run.spec.n_models, split_rows(run.spec.n_models, validation)
    array = fitted_array(run, targets)
    masks, margins = (_open(run, name, run.spec.rows.models) for name in ("train_masks", array))
    place = Checkpoints.at(place_of(run, _FITTING, targets))
    with place.claimed():
        fitting, held_out = place.moments(
            masks,
            margins,
            [(0, n_fit), (n_fit, n_models)],
            block_rows=BLOCK_ROWS,
            threads=None,
            progress=lambda done: None if progress is None else progress("moments", done, n_models),
        )
    return fitting, held_out


def _gradient_scores(run: Run, targets: TargetsName, progress: Progress | None) -> npt.NDArray[np.float32]:
    report = None if progress is None else functools.partial(progress, "gradients")
    return gradient_scores(run, targets=targets, progress=report)


def _write_catalog(run: Run) -> None:
    """List in the catalog what the run holds, without datamodels that are damaged."""
    run.write_catalog(datamodels="sound")


def _open(run: Run, array: str, rows: slice) -> RowsOf:
    with _explained(run):
        return RowsOf(run, dmdata.open(artifact_name(run, array), catalog=run.path), rows)


@contextmanager
def _explained(run: Run) -> Iterator[None]:
    """Say of an array that cannot be read how to find out what is damaged."""
    try:
        yield
    except FormatError as error:
        raise RunError(
            f"{error}; find out which rows of the run are affected with `dmpipeline verify {quoted(run.path)}`",
            path=run.path,
        ) from error
