"""The page of a run: what it holds is gathered here, from scores, weights, examples and what else is known."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import dmdata
from dmdata.money.prices import prices_in_words, readable_bytes, readable_usd
from dmdata.reading.long_work import shows_stages
from dmpipeline.applications.describing import example_in_words
from dmpipeline.applications.evidence import find_evidence
from dmpipeline.data.examples import Dataset
from dmpipeline.draws.subsets import law_in_words, sizes_of
from dmpipeline.errors import RunError, explain_os_errors, quoted
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.fitting.fitted import fit_facts
from dmpipeline.report.contents import Contents, add_labels, add_outputs, add_weights, empty_facts
from dmpipeline.report.findings import (
    PartName,
    add_findings,
    checked_parts,
    default_parts,
    retrained_sets,
    weights_by_halves,
)
from dmpipeline.report.page import checked_place, is_one_file, write_page
from dmpipeline.report.thumbnails import thumbnails
from dmpipeline.report.wording import BETTER, FOOTER, as_rows, fit_rows, models_sentence, summary, tiles, words_used
from dmpipeline.runs.derivation import old_result, result_path, sources_of, take_note, warn_of_old_datamodels
from dmpipeline.runs.directory import write_beside
from dmpipeline.runs.learned import Learned, what_was_learned
from dmpipeline.runs.store import Run, opened
from dmpipeline.runs.targets import TargetsName, command, fitted_array, options_of, place_of
from dmpipeline.scoring.evaluation import Evaluation
from dmpipeline.workflow.run_arrays import open_rows
from dmpipeline.workflow.score_steps import load_curves

KEPT = {"verification": "verification.json", "scores": "scores.json"}
"""Answers of other commands that a run keeps for its page, by their file's name."""

REPORT_STAGES = {
    "halves": "targets",
    "map": "maps",
    "leakage": "steps",
    "duplicates": "examples",
    "suspects": "models",
}
"""Stages that `report_run` reports, and what each counts."""

_LEVEL = 0.95
_MOST_THUMBNAILS = 6_000
_MOST_WORDS = 20_000
_MOST_VALUES = 400_000


@shows_stages(REPORT_STAGES)
def report_run(
    run: Run | str | os.PathLike[str],
    evaluation: Evaluation,
    targets: TargetsName = "test",
    *,
    path: str | os.PathLike[str] | None = None,
    parts: Sequence[PartName] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Write a run's page: an explorer of its datamodels in one HTML file, or in a folder.

    Parameters
    ----------
    run : Run or path
    evaluation : Evaluation
        Of these targets' datamodels, by `evaluate_run`.
    targets : {"test", "train"}
    path : path, optional
        Of the `.html`, or of a folder, for more pictures than fit a file; by default ``report.html`` in the run.
    parts : sequence of str, optional
        Of "stability", "support", "map", "clusters", "leakage", "duplicates" and "suspects"; by default all, but for
        searches for copies among more than 10^8 pairs of examples.
    progress : callable, optional
        Called with (stage, done, total); see `REPORT_STAGES`.

    Returns
    -------
    path : pathlib.Path
        Of the HTML file.

    Raises
    ------
    IncompleteRunError
        If the run has no datamodels yet.
    SpecError
        If a part is not one, or the path cannot be a page's.
    RunError
        If arrays, datamodels, the notes on their fit or the learning curve are damaged, or the page cannot be written.

    Warns
    -----
    OldResultWarning
        If the datamodels were fitted on other models than the run has now. The page says so, too, as it says of a
        learning curve that is old.

    Notes
    -----
    Memory holds the weights, and where stability or clusters are asked for those of two more fits.
    """
    run = opened(run)
    dataset, sources = run.dataset(), sources_of(run, "report", targets)
    own_path = result_path(run, "report", targets)
    place = own_path if path is None else checked_place(path)
    evidence = find_evidence(run, targets)
    chosen = default_parts(dataset, evidence.n_targets) if parts is None else checked_parts(parts)
    datamodels = evidence.datamodels()
    warn_of_old_datamodels(run, targets, stacklevel=4)
    contents = Contents(_facts(run, targets, evaluation, datamodels, dataset, sources))
    halves = weights_by_halves(evidence, chosen, progress)
    contents.halves = halves if "stability" in chosen else None
    dots = retrained_sets(run, datamodels.weight, targets, _LEVEL)
    contents.facts |= {"retrained": dots, "level": _LEVEL}
    add_weights(contents, datamodels, measured=sorted({dot["k"] for of_target in dots.values() for dot in of_target}))
    contents.halves = halves
    _add_held_out(contents, run, targets, evaluation, datamodels)
    add_examples(contents, dataset, targets, datamodels, in_one_file=is_one_file(place))
    add_findings(contents, evidence, chosen, progress)
    written = write_page(place, contents)
    if place == own_path:
        take_note(run, "report", targets, sources)
    return written


def keep_answer(run: Run, name: str, answer: Mapping[str, Any], targets: TargetsName = "test") -> None:
    """Keep another command's answer in the run, for its page; see `KEPT`. A run that may only be read keeps nothing.

    Raises
    ------
    RunError
        If it cannot be written.
    """
    if not os.access(run.path, os.W_OK):
        return
    dated = {"when": f"{datetime.now(UTC):%Y-%m-%d}", "made_from": _made_from(run, name, targets)} | dict(answer)
    write_beside(place_of(run, KEPT[name], targets), json.dumps(dated, indent=2) + "\n")


def download_price(run: Run) -> dmdata.Estimate:
    """Price a download of a run's artifacts, were they on a requester-pays bucket."""
    return dmdata.estimate("**", catalog=run.path)


def add_examples(
    contents: Contents,
    dataset: Dataset,
    targets: TargetsName,
    datamodels: Datamodels,
    *,
    picked: Sequence[int] | None = None,
    in_one_file: bool,
) -> None:
    """Add what examples are: labels and pictures, columns of a table, or words; as many as a file should hold.

    Of the targets those that are `picked`, in this order, or all.
    """
    which = slice(None) if picked is None else np.asarray(picked, np.intp)
    parts = {
        "train": ("train", dataset.train_inputs),
        "targets": (targets, getattr(dataset, f"{targets}_inputs")[which]),
    }
    of_targets = getattr(dataset, f"{targets}_labels")[which]
    add_labels(
        contents, datamodels.weight, train=dataset.train_labels, targets=of_targets, class_names=dataset.class_names
    )
    kind = "image" if dataset.image_shape else "text" if dataset.train_inputs.dtype.kind == "i" else "row"
    contents.facts["nouns"] = {"train": f"training {kind}", "targets": f"{_ADJECTIVE[targets]} {kind}"}
    if dataset.image_shape is not None:
        # a single channel is a grey picture; bytes stay bytes, on disk where they are mapped
        shape = dataset.image_shape[:2] if dataset.image_shape[2:] == (1,) else dataset.image_shape
        for part, (_, inputs) in parts.items():
            shown = _shown(contents, part, len(inputs)) if in_one_file else None
            contents.pictures[part] = thumbnails(inputs.reshape(-1, *shape), shown)
        return
    if len(dataset.train_inputs) + len(parts["targets"][1]) <= _MOST_WORDS:
        contents.facts["words"] = {
            part: [example_in_words(dataset, each) for each in inputs] for part, (_, inputs) in parts.items()
        }
    n_values = (dataset.n_train + len(parts["targets"][1])) * dataset.n_features
    if kind == "row" and n_values <= _MOST_VALUES:
        contents.facts["features"] = list(dataset.feature_names or map(str, range(dataset.n_features)))
        for part, (_, inputs) in parts.items():
            contents.arrays[f"{part}_features"] = np.asarray(inputs, np.float32).reshape(len(inputs), -1)


_ADJECTIVE = {"test": "test", "train": "training"}


def _shown(contents: Contents, part: str, n: int) -> list[int] | None:
    """Choose whose thumbnails one file holds: all, or of training examples those of largest weights."""
    if n <= _MOST_THUMBNAILS:
        return None
    if part == "targets":
        return list(range(_MOST_THUMBNAILS))
    strongest = np.argsort(-contents.arrays["train_size"], kind="stable")[:_MOST_THUMBNAILS]
    return sorted(strongest.tolist())


def _facts(
    run: Run,
    targets: TargetsName,
    evaluation: Evaluation,
    datamodels: Datamodels,
    dataset: Dataset,
    sources: Mapping[str, Any],
) -> dict[str, Any]:
    array, learned = fitted_array(run, targets), what_was_learned(run, dataset)
    output = array.partition("_")[2].removesuffix("s").replace("_", " ")
    old = {what: found for what in ("datamodels", "curve") if (found := old_result(run, what, targets)) is not None}
    curves = load_curves(run, targets)
    sizes = sizes_of(run.spec, run.provenance)
    alpha = None if sizes is None else sizes.mean / sizes.n_train
    n_models = sources["n_models"]
    kind = "image" if dataset.image_shape else "text" if dataset.train_inputs.dtype.kind == "i" else "row"
    nouns = {"train": f"training {kind}", "targets": f"{_ADJECTIVE[targets]} {kind}"}
    of_train = " of training examples" if targets == "train" else ""
    return empty_facts(
        title=f"Datamodels{of_train} of {dataset.name} {law_in_words(run.spec)}",
        summary=summary(evaluation, n_models=n_models, output=output, remark=_old_remark(old, "datamodels")),
        models=models_sentence(learned),
        warnings=[text[0].upper() + text[1:] for text in learned.texts],
        tiles=tiles(evaluation, learned, output=output),
        words_used=words_used(nouns=nouns, output=output, alpha=alpha, n_models=n_models),
        output=output,
        is_margin=output == "margin",
        better=BETTER.get(output),
        targets=targets,
        alpha=alpha,
        n_retrainings=evaluation.n_retrainings,
        lds=evaluation.as_dict(),
        curves=[{"name": name} | curve.as_dict() for name, curve in curves.items()],
        curves_remark=_old_remark(old, "curve"),
        tables=[
            {"heading": "How it was made", "rows": as_rows(_how_it_was_made(run, targets, sources))},
            {"heading": "The fit", "rows": fit_rows(datamodels, evaluation, n_models=n_models)},
            {"heading": "What it cost", "rows": as_rows(_costs(run, targets, learned))},
        ],
        methods=_kept(run, "scores", targets, _methods),
        verification=_kept(run, "verification", "test", _verification),
        run=quoted(run.path),
        options="".join(f" {word}" for word in options_of(targets)),
        footer=FOOTER,
    )


def _add_held_out(
    contents: Contents, run: Run, targets: TargetsName, evaluation: Evaluation, datamodels: Datamodels
) -> None:
    held_out, n_retrainings = run.spec.rows.held_out, run.spec.held_out.n_retrainings
    masks = open_rows(run, "train_masks", held_out)[0 : held_out.stop]
    outputs = open_rows(run, fitted_array(run, targets), held_out)[0 : held_out.stop].astype(np.float32)
    true = outputs.reshape(run.spec.held_out.n_subsets, n_retrainings, -1).mean(1)
    add_outputs(contents, datamodels.predict(masks[::n_retrainings]), true)
    contents.arrays |= {
        "target_lds": evaluation.target_lds.astype(np.float32),
        "target_ceiling": evaluation.target_lds_ceiling.astype(np.float32),
    }


def _made_from(run: Run, name: str, targets: TargetsName) -> dict[str, Any]:
    """State what an answer is of: the run's rows, and for scores its datamodels."""
    return sources_of(run, "evaluation" if name == "scores" else "curve", targets)


def _kept(
    run: Run, name: str, targets: TargetsName, shown: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> dict[str, Any] | None:
    """Read an answer that was kept, as the page shows it; with a remark where the run has changed since."""
    path = place_of(run, KEPT[name], targets)
    if not path.exists():
        return None
    try:
        with explain_os_errors(path, "read"):
            kept = json.loads(path.read_text("utf-8"))
        facts = shown(kept) | {"when": kept["when"]}
        before = kept["made_from"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error!r}); remove it", path=path) from error
    if before == _made_from(run, name, targets):
        return facts | {"old": ""}
    n_before = before.get("n_models")
    of = "" if n_before is None else f", when there were {n_before:,} models"
    return facts | {"old": f"The run has changed since{of}: this is old."}


def _methods(kept: Mapping[str, Any]) -> dict[str, Any]:
    rows = kept["scores"]
    measures = {
        "lds": "LDS",
        "lds_low": "low",
        "lds_high": "high",
        "lds_ceiling": "ceiling",
        "class_detection": "class detection",
        "subclass_detection": "subclass detection",
        "mislabel_auc": "mislabel AUC",
    }
    known = {key: title for key, title in measures.items() if any(row.get(key) is not None for row in rows)}
    return {
        "columns": ["method", *known.values()],
        "rows": [[row["name"], *(row.get(key) for key in known)] for row in rows],
    }


def _verification(kept: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "verdict": kept["verdict"],
        "against": kept["reference"],
        "findings": [{key: row[key] for key in ("level", "check", "passed", "detail")} for row in kept["findings"]],
    }


def _old_remark(old: Mapping[str, Any], what: str) -> str:
    """State why datamodels or a curve are old; nothing for those that are not."""
    if what not in old:
        return ""
    subject, again = {
        "datamodels": ("These datamodels are", "dmpipeline fit RUN makes new ones"),
        "curve": ("This curve is", "dmpipeline curve RUN draws it again"),
    }[what]
    return f" {subject} old: {old[what].why}; {again}."


def _how_it_was_made(run: Run, targets: TargetsName, sources: Mapping[str, Any]) -> dict[str, object]:
    spec, provenance = run.spec, run.provenance
    versions = provenance["versions"]
    return {
        "dataset": f"{provenance['dataset']['name']}, {provenance['dataset']['fingerprint'][:16]}",
        "training examples": provenance["dataset"]["n_train"],
        "examples in a subset": sizes.in_words if (sizes := sizes_of(run.spec, run.provenance)) else "not known",
        "recipe": f"{spec.recipe.name}, version {spec.recipe.version}",
        "seed": spec.seed,
        "models to fit on": spec.n_models,
        "held-out models": f"{spec.held_out.n_subsets} subsets, {spec.held_out.n_retrainings} trainings each",
        "device": provenance["machine"]["device"],
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "created": provenance["created"],
        "datamodels, SHA-256": sources["datamodels"],
        "held-out rows, SHA-256 of their digests": sources["held_out"],
        "this page again": command(str(run.path), "report", targets),
    } | _certificate(run, targets)


def _certificate(run: Run, targets: TargetsName) -> dict[str, object]:
    facts = fit_facts(run, targets)
    if "worst_gap" not in facts:
        return {}
    return {
        "certificate of the fit": f"duality gap at most {facts['worst_gap']:.1e} of a target's variance, optimality "
        f"conditions kept within {facts['worst_kkt']:.1e} of lam"
    }


def _costs(run: Run, targets: TargetsName, learned: Learned) -> dict[str, object]:
    price, facts, sessions = download_price(run), fit_facts(run, targets), run.provenance["sessions"]
    seconds = sum(session["seconds"] for session in sessions)
    return {
        "training": f"{seconds:,.0f} s for {learned.n_models:,} models",
        "fit": f"{facts['seconds']:,.1f} s" if "seconds" in facts else "not recorded",
        "a download of the same from a requester-pays bucket": (
            f"{readable_usd(price.usd)} for {readable_bytes(price.n_bytes)} in {price.n_requests:,} requests, "
            f"{prices_in_words()} to {price.destination}"
        ),
    }
