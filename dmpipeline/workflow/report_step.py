"""The step `report`: the page of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import dmdata
from dmdata.money.prices import prices_in_words, readable_bytes, readable_usd
from dmpipeline.data.datasets import Dataset
from dmpipeline.draws.subsets import law_in_words, sizes_of
from dmpipeline.fitting.fitted import fit_facts, load_datamodels
from dmpipeline.report.page import Gallery, write_report
from dmpipeline.runs.derivation import old_result, result_path, sources_of, take_note, warn_of_old_datamodels
from dmpipeline.runs.learned import what_was_learned
from dmpipeline.runs.store import Run
from dmpipeline.runs.targets import TargetsName, fitted_array
from dmpipeline.scoring.evaluation import Evaluation
from dmpipeline.workflow.run_arrays import open_rows
from dmpipeline.workflow.score_steps import load_curves


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
    masks = open_rows(run, "train_masks", held_out)[0 : held_out.stop]
    margins = open_rows(run, array, held_out)[0 : held_out.stop].astype(np.float32)
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
