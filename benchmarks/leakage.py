"""Copies of test examples planted in a training set, and wrong labels: what is found, next to other ways to look.

`python benchmarks/leakage.py [--models N] [--seed S] [--copies N] [--json FILE]` plants copies of digits' test examples
of four kinds in the place of training examples: exact, with noise of deviation 0.1 to 0.2 of the range, shifted by one
pixel, and relabelled. It trains perceptrons, fits datamodels, and prints recall by kind and precision. cleanlab takes
part where it is installed.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from dmpipeline.applications.inspecting.suspects import suspects
from dmpipeline.applications.leakage import leakage, p_values
from dmpipeline.data.datasets import load_dataset
from dmpipeline.fitting.fitted import load_datamodels
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec
from dmpipeline.workflow.fit_step import fit_run

KINDS = ("exact", "noisy", "shifted", "relabelled")
Q = 0.1
Pairs = dict[tuple[int, int], float]


def planted(seed: int, n_copies: int) -> tuple[dict[str, npt.NDArray[Any]], dict[tuple[int, int], str]]:
    """Return arrays of digits with copies, and the kind of each (train, test) pair planted."""
    digits, rng = load_dataset("digits"), np.random.default_rng(seed)
    train, labels = digits.train_inputs.reshape(-1, 8, 8).copy(), digits.train_labels.copy()
    test = digits.test_inputs.reshape(-1, 8, 8)
    tests = rng.choice(len(test), (len(KINDS), n_copies), replace=False)
    trains = rng.choice(len(train), (len(KINDS), n_copies), replace=False)
    truth = {}
    for kind, of_tests, of_trains in zip(KINDS, tests.tolist(), trains.tolist(), strict=True):
        for of_test, of_train in zip(of_tests, of_trains, strict=True):
            copy, label = test[of_test], digits.test_labels[of_test]
            if kind == "noisy":
                copy = np.clip(copy + rng.normal(0, rng.uniform(0.1, 0.2), copy.shape), 0, 1)
            if kind == "shifted":
                copy = moved(copy, int(rng.integers(2)), int(rng.choice([-1, 1])))
            if kind == "relabelled":
                label = (label + rng.integers(1, 10)) % 10
            train[of_train], labels[of_train] = copy, label
            truth[of_train, of_test] = kind
    arrays = {"train_inputs": train, "train_labels": labels, "test_inputs": test, "test_labels": digits.test_labels}
    return arrays, truth


def moved(picture: npt.NDArray[np.float32], axis: int, by: int) -> npt.NDArray[np.float32]:
    """Shift a picture by one pixel; what comes in is 0."""
    shifted = np.roll(picture, by, axis)
    shifted[(slice(None),) * axis + (0 if by > 0 else -1,)] = 0
    return shifted


def nearest_pixels(arrays: dict[str, npt.NDArray[Any]]) -> tuple[Pairs, Pairs]:
    """Return each test example's nearest training example: all by distance, and those significant by the same null."""
    train, test = (arrays[name].reshape(len(arrays[name]), -1) for name in ("train_inputs", "test_inputs"))
    search = NearestNeighbors(n_neighbors=2).fit(train)
    distance, index = search.kneighbors(test)
    null = search.kneighbors(train)[0][:, 1]
    p = p_values(-distance[:, 0], -null)
    order = np.argsort(p, kind="stable")
    passed = np.flatnonzero(p[order] <= Q * np.arange(1, len(p) + 1) / len(p))
    n_found = passed[-1] + 1 if len(passed) else 0
    found = {(int(index[t, 0]), int(t)): -float(distance[t, 0]) for t in range(len(test))}
    return found, {(int(index[t, 0]), int(t)): -float(distance[t, 0]) for t in order[:n_found]}


def at_precision(pairs: Pairs, truth: dict[tuple[int, int], str], precision: float) -> Pairs:
    """Keep the best-scored pairs down to where the precision, known here alone, is last as high as asked."""
    order = sorted(pairs, key=lambda pair: -pairs[pair])
    right = np.cumsum([pair in truth for pair in order]) / np.arange(1, len(order) + 1)
    good = np.flatnonzero(right >= precision)
    return {pair: pairs[pair] for pair in order[: good[-1] + 1 if len(good) else 0]}


def by_weight(weight: npt.NDArray[np.float32], *, is_sized: bool) -> Pairs:
    """Return each test example's training example of the largest weight, by how far it stands out."""
    size = np.abs(weight) if is_sized else weight
    deviation = np.sqrt(np.square(weight).mean(0)) + 1e-12
    return {(int(size[:, t].argmax()), t): float(size[:, t].max() / deviation[t]) for t in range(weight.shape[1])}


def cleanlab_duplicates(arrays: dict[str, npt.NDArray[Any]]) -> Pairs | None:
    """Return cleanlab's near duplicates among train and test examples together, those of both parts; None without."""
    try:
        from cleanlab import Datalab
    except ImportError:
        return None
    train, test = (arrays[name].reshape(len(arrays[name]), -1) for name in ("train_inputs", "test_inputs"))
    lab = Datalab({"label": np.concatenate([arrays["train_labels"], arrays["test_labels"]])}, label_name="label")
    lab.find_issues(features=np.concatenate([train, test]).astype(np.float64), issue_types={"near_duplicate": {}})
    issues = lab.get_issues("near_duplicate")
    found = {}
    for t, row in enumerate(issues.iloc[len(train) :].itertuples()):
        if row.is_near_duplicate_issue:
            for near in row.near_duplicate_sets:
                if near < len(train):
                    found[int(near), t] = 1 - float(row.near_duplicate_score)
    return found


def show_copies(table: Table, what: str, found: Pairs, truth: dict[tuple[int, int], str], n_copies: int) -> dict:
    """Add a line: recall by kind, precision."""
    recall = {kind: sum(truth.get(pair) == kind for pair in found) / n_copies for kind in KINDS}
    precision = sum(pair in truth for pair in found) / max(1, len(found))
    table.add_row(what, *(f"{recall[kind]:.2f}" for kind in KINDS), f"{precision:.2f}", str(len(found)))
    return {"what": what, **recall, "precision": precision, "n_found": len(found)}


def trained(arrays: dict[str, npt.NDArray[Any]], place: Path, n_models: int, *, is_fitted: bool) -> Run:
    """Train perceptrons on arrays, and fit datamodels of test examples."""
    place.mkdir()
    np.savez(place / "digits.npz", **arrays)
    spec = RunSpec(
        dataset=str(place / "digits.npz"),
        n_models=n_models,
        held_out={"n_subsets": 10, "n_retrainings": 2},
        outputs=("margins", "logits"),
        recipe={"name": "perceptron", "version": 1},
    )
    run = Run.create(place / "run", spec)
    run.train()
    if is_fitted:
        fit_run(run)
    return run


def compare_copies(place: Path, seed: int, n_copies: int, n_models: int) -> tuple[Table, list[dict]]:
    """Plant copies, and look for them in all ways."""
    arrays, truth = planted(seed, n_copies)
    run = trained(arrays, place, n_models, is_fitted=True)
    weight = load_datamodels(run).weight
    table = Table("copies, recall", *KINDS, "precision", "found", title=f"{n_copies} of each kind, {n_models} models")
    lines = []
    for what, n in (
        ("leakage, 50 candidates by weight", 50),
        ("leakage, inputs alone", 0),
    ):
        started = time.perf_counter()
        result = leakage(run, q=Q, candidates=n)
        found = {(pair.train, pair.test): pair.score for pair in result}
        said = f"{what}, {time.perf_counter() - started:.0f} s"
        lines.append(show_copies(table, said, found, truth, n_copies))
        lines[-1]["expected_false_share"] = result.expected_false_share
    everything, significant = nearest_pixels(arrays)
    lines.append(show_copies(table, "nearest pixels, same null", significant, truth, n_copies))
    oracle = at_precision(everything, truth, 0.9)
    lines.append(show_copies(table, "nearest pixels, threshold by an oracle", oracle, truth, n_copies))
    for what, is_sized in (("largest weight, threshold by an oracle", False), ("largest in size, same", True)):
        found = at_precision(by_weight(weight, is_sized=is_sized), truth, 0.9)
        lines.append(show_copies(table, what, found, truth, n_copies))
    by_cleanlab = cleanlab_duplicates(arrays)
    if by_cleanlab is not None:
        lines.append(show_copies(table, "cleanlab, near duplicates", by_cleanlab, truth, n_copies))
    return table, lines


def compare_labels(place: Path, seed: int, n_models: int) -> tuple[Table, list[dict]]:
    """Flip a twentieth of the training labels, and rank training examples by suspicion."""
    digits, rng = load_dataset("digits"), np.random.default_rng(seed)
    labels = digits.train_labels.copy()
    flipped = rng.choice(len(labels), len(labels) // 20, replace=False)
    labels[flipped] = (labels[flipped] + rng.integers(1, 10, len(flipped))) % 10
    is_wrong = np.isin(np.arange(len(labels)), flipped)
    arrays = {"train_inputs": digits.train_inputs.reshape(-1, 8, 8), "train_labels": labels}
    arrays |= {"test_inputs": digits.test_inputs.reshape(-1, 8, 8), "test_labels": digits.test_labels}
    run = trained(arrays, place, n_models, is_fitted=False)
    table = Table(
        "wrong labels", "precision at their number", "AUC", "label corrected", title=f"{len(flipped)} flipped"
    )
    lines = []

    def show(what: str, scores: npt.NDArray[np.float64], suggested: npt.NDArray[np.int64] | None = None) -> None:
        top = np.argsort(-scores, kind="stable")[: len(flipped)]
        precision, auc = float(is_wrong[top].mean()), float(roc_auc_score(is_wrong, scores))
        right = None if suggested is None else float((suggested[flipped] == digits.train_labels[flipped]).mean())
        table.add_row(what, f"{precision:.3f}", f"{auc:.4f}", "" if right is None else f"{right:.3f}")
        lines.append({"what": what, "precision_at_k": precision, "auc": auc, "corrected": right})

    fit_run(run, targets="train")
    found = sorted(suspects(run, top=len(labels)), key=lambda row: row.index)
    show(
        "suspects, by models not trained on them",
        np.array([row.score for row in found]),
        np.array([row.suggested for row in found]),
    )
    own = np.array([row.own_weight for row in found])
    show("own weight, large first", own)
    by_rank = np.argsort(np.argsort(own)) + np.argsort(np.argsort([row.score for row in found]))
    show("both, by the sum of ranks", by_rank.astype(np.float64))
    probabilities = _left_out_probabilities(run)
    show("1 - probability of the label", 1 - probabilities[np.arange(len(labels)), labels])
    try:
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        return table, lines
    for method, is_adjusted in (("self_confidence", False), ("self_confidence", True), ("normalized_margin", False)):
        quality = get_label_quality_scores(labels, probabilities, method=method, adjust_pred_probs=is_adjusted)
        show(f"cleanlab, {method}{', adjusted' if is_adjusted else ''}", 1 - quality)
    return table, lines


def _left_out_probabilities(run: Run) -> npt.NDArray[np.float64]:
    """Average the class probabilities of each training example over models whose subset leaves it out."""
    rows = run.spec.rows.models
    is_out = ~np.asarray(run.array("train_masks")[rows])
    logits = np.asarray(run.array("train_logits")[rows], np.float64)
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    total = np.einsum("mi,mic->ic", is_out, odds / odds.sum(-1, keepdims=True))
    return total / is_out.sum(0)[:, None]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=2000)
    parser.add_argument("--copies", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("copies", "labels"))
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        if asked.only != "labels":
            table, some = compare_copies(Path(folder) / "copies", asked.seed, asked.copies, asked.models)
            Console(width=140).print(table)
            lines += some
        if asked.only != "copies":
            table, some = compare_labels(Path(folder) / "labels", asked.seed, min(asked.models, 1000))
            Console(width=140).print(table)
            lines += some
    if asked.json is not None:
        asked.json.write_text(json.dumps(lines, indent=2))


if __name__ == "__main__":
    main()
