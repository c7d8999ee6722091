"""How often `dmpipeline verify --against` calls ensembles different, by planted fault and rows read: a table of power.

    python benchmarks/power.py CACHE [--draws 200] [--models 6000] [--rows 100,300,1000,3000] [--faults clean,...]
    python benchmarks/power.py CACHE --looks [--draws 1000]

Pools of models are trained into CACHE once: digits, digits with another step size, and small pictures of three
channels, on which views at test time (`tta`) matter. For each draw, disjoint models of a pool stand for ours and for
those of the reference, a fault is planted in the latter, and `verify`'s own code compares them as if it had read these
rows: the law of masks, rows that repeat, statistics on outputs, and both orders. A cell is one look, with the whole
error of 5%; `--looks` reads up to 100, 300 and so on as `verify` does, and shares the error as it does.

Each cell has the share of draws called "differs", with Wilson's 95% interval, the share called "agrees", and the share
in which the fault was named: by the check that is about it, of views at test time as `verify --tta 8` does. Of clean
draws at most 5% may be called different; of those that differ by the margin itself at most 5% may be called either.
Draws share a pool: where ours and those of the reference are nearly all of it, as 3,000 and 3,000 of 6,000, clean draws
differ by which side a model is on, and by nothing else.

Cells are written to CACHE/power.json one by one; one that is there with as many draws is not computed again, and one
with fewer gets the rest. Delete the file where the checks have changed.
"""

import argparse
import functools
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # matrices are small: threads only wait for each other

import numpy as np
from rich.console import Console
from rich.table import Table

from dmpipeline import Datamodels, Run, RunSpec, fit
from dmpipeline.checks.agreement import LEAST_MODELS
from dmpipeline.checks.verification import law_of
from dmpipeline.data.datasets import load_dataset
from dmpipeline.draws.masks import draw_bernoulli_masks
from dmpipeline.models.outputs import output_of
from dmpipeline.models.recipes import find_recipe
from dmpipeline.workflow.reference import Part, Reference, find_reference
from dmpipeline.workflow.refit_check import MOST_HELD_OUT, _in_raw_space, picked_targets
from dmpipeline.workflow.tta_check import best_views
from dmpipeline.workflow.verify_step import LEVEL, MARGIN, _Comparison, portions

Array = np.ndarray[Any, Any]

OTHER_LR = 1.5
"""By how much the step size of the second pool is larger."""
OTHER_ALPHA = 0.2
N_OTHER_ALPHA = 200
"""Models of it: a hundredth of the most rows."""
N_FITTED = 2000
"""Models that datamodels are fitted to, whose weights are then written as those of another space."""
N_AGAIN = 8
"""Rows of ours that `verify --tta` trains again with other views."""
OUR_VIEWS = "mirror"
N_PICTURES = (200, 100)
"""Pictures to train and to test on: digits from 0 to 4, coloured."""


@dataclass(frozen=True, eq=False)
class Models:
    """Masks (n_models, n_train) and margins (n_models, n_targets), as they are stored."""

    masks: Array
    outputs: Array

    def at(self, rows: Array) -> "Models":
        """Pick some."""
        return Models(self.masks[rows], self.outputs[rows])


@dataclass(frozen=True, eq=False)
class Bench:
    """A pool to draw from, its run, and what faults are made of."""

    run: Run
    reference: Reference
    pool: Models
    others: dict[str, Models]
    """Of other ensembles; of pictures, the same models with other views at test time."""


@dataclass
class Draw:
    """One draw: the models of ours and of the reference, the latter copied, to plant faults in."""

    bench: Bench
    ours: Models
    theirs: Models
    rows: Array
    """Where theirs are in the pool."""
    rng: np.random.Generator


def clean(draw: Draw) -> Models:
    """Nothing is planted."""
    return draw.theirs


def shifted(by: float) -> Callable[[Draw], Models]:
    """Shift every margin by a share of its standard deviation over models."""

    def plant(draw: Draw) -> Models:
        moved = draw.theirs.outputs + by * draw.ours.outputs.std(0, dtype=np.float64)
        return Models(draw.theirs.masks, moved.astype(draw.theirs.outputs.dtype))

    return plant


def targets_permuted(draw: Draw) -> Models:
    """Exchange ten targets' outputs, none left in its place."""
    picked = draw.rng.choice(draw.theirs.outputs.shape[1], 10, replace=False)
    outputs = draw.theirs.outputs.copy()
    outputs[:, picked] = outputs[:, np.roll(picked, 1)]
    return Models(draw.theirs.masks, outputs)


def test_order_off(draw: Draw) -> Models:
    """Number every target one too low."""
    return Models(draw.theirs.masks, np.roll(draw.theirs.outputs, -1, axis=1))


def train_order_off(draw: Draw) -> Models:
    """Number every training example one too low."""
    return Models(np.roll(draw.theirs.masks, -1, axis=1), draw.theirs.outputs)


def row_repeated(draw: Draw) -> Models:
    """Store one row over another."""
    masks, outputs = draw.theirs.masks.copy(), draw.theirs.outputs.copy()
    first, second = draw.rng.choice(len(masks), 2, replace=False)
    masks[first], outputs[first] = masks[second], outputs[second]
    return Models(masks, outputs)


def other_step(draw: Draw) -> Models:
    """Take models that were trained with a larger step."""
    other = draw.bench.others["lr"]
    return other.at(draw.rng.choice(len(other.masks), len(draw.theirs.masks), replace=False))


def rows_of_other_alpha(draw: Draw) -> Models:
    """Take one row in a hundred of models that were trained on fewer examples."""
    other = draw.bench.others["alpha"]
    masks, outputs = draw.theirs.masks.copy(), draw.theirs.outputs.copy()
    count = max(1, len(masks) // 100)
    rows = draw.rng.choice(len(masks), count, replace=False)
    taken = draw.rng.choice(len(other.masks), count, replace=False)
    masks[rows], outputs[rows] = other.masks[taken], other.outputs[taken]
    return Models(masks, outputs)


def other_law(draw: Draw) -> Models:
    """Take masks that are drawn example by example; outputs stay, as few statistics of them would differ."""
    count, n_train = draw.theirs.masks.shape
    numbers = draw.rng.integers(0, 2**31, count).astype(np.uint64)
    return Models(draw_bernoulli_masks(5, numbers, n_train, draw.bench.run.spec.alpha), draw.theirs.outputs)


def other_views(views: str) -> Callable[[Draw], Models]:
    """Take the same models, with other views averaged at test time."""

    def plant(draw: Draw) -> Models:
        return draw.bench.others[views].at(draw.rows)

    return plant


FAULTS: dict[str, Callable[[Draw], Models]] = {
    "clean": clean,
    "shift 0.05": shifted(0.05),
    "shift 0.1 (the margin)": shifted(0.1),
    "shift 0.2": shifted(0.2),
    "10 targets permuted": targets_permuted,
    "test order off by one": test_order_off,
    "training order off by one": train_order_off,
    "another step size": other_step,
    "1% of rows of another alpha": rows_of_other_alpha,
    "a row repeated": row_repeated,
    "masks of another law": other_law,
    "clean pictures": clean,
    "tta": other_views("none"),
    "tta swapped": other_views("channel_flip"),
}
OF_WEIGHTS = "weights of another space"
PICTURES = {"clean pictures": "", "tta": "none", "tta swapped": "channel_flip"}
"""Rows of the table that are of pictures, and the views that are to be named; of clean ones any name is wrong."""
NAMED_BY = {
    "10 targets permuted": "test_order",
    "test order off by one": "test_order",
    "training order off by one": "train_order",
    "1% of rows of another alpha": "reference_masks",
    "a row repeated": "reference_rows",
    "masks of another law": "reference_masks",
    OF_WEIGHTS: "weight_space",
}
"""The check that would say what is wrong, where one can."""


def trained(path: Path, **settings: Any) -> Run:
    """Open a pool in the cache, trained first if it is not there."""
    spec = RunSpec(held_out={"n_subsets": 0}, seed=11, **settings)
    run = Run.open(path) if (path / "run.yaml").exists() else Run.create(path, spec)
    if run.n_rows_done < run.spec.n_rows:
        sys.stderr.write(f"training {run.spec.n_rows:,} models into {path}\n")
        run.train()
    return run


def margins_of(run: Run) -> Models:
    """Read what a run stores."""
    return Models(run.array("train_masks")[:], run.array("test_margins")[:])


@functools.cache
def digits_bench(cache: Path, n_models: int) -> Bench:
    """Open the pools of digits."""
    margins = {"outputs": ["test_margins"]}
    run = trained(cache / f"pool-{n_models}", n_models=n_models, **margins)
    recipe = {"lr": find_recipe(RunSpec().recipe).lr * OTHER_LR}
    others = {
        "lr": margins_of(trained(cache / f"lr-{n_models}", n_models=max(1, n_models // 2), recipe=recipe, **margins)),
        "alpha": margins_of(trained(cache / f"alpha-{n_models}", n_models=N_OTHER_ALPHA, alpha=OTHER_ALPHA, **margins)),
    }
    return Bench(run, find_reference(run, run), margins_of(run), others)


def coloured_digits(path: Path) -> None:
    """Write digits of a colour that tells a part of their class, and their images with each view as test pictures."""
    from sklearn.datasets import load_digits

    rng, digits = np.random.default_rng(3), load_digits()
    few = rng.permutation(np.flatnonzero(digits.target < 5))[: sum(N_PICTURES)]
    shapes, labels = digits.images[few] / 16, digits.target[few]
    hues = np.array([[1, 0.4, 0.4], [0.9, 1, 0.4], [0.4, 1, 0.6], [0.4, 0.7, 1], [0.9, 0.4, 1]])
    colours = np.clip(hues[labels] + rng.normal(0, 0.35, (len(labels), 3)), 0, 1)
    pictures = shapes[..., None] * colours[:, None, None, :] + rng.normal(0, 0.1, (len(labels), 8, 8, 3))
    pictures = (np.clip(pictures, 0, 1) * 255).astype(np.uint8)
    train, test = pictures[: N_PICTURES[0]], pictures[N_PICTURES[0] :]
    unfinished = path.with_suffix(".part.npz")
    np.savez(
        unfinished,
        train_inputs=train,
        train_labels=labels[: N_PICTURES[0]],
        test_inputs=np.concatenate([test, test[:, :, ::-1], test[..., ::-1]]),
        test_labels=np.tile(labels[N_PICTURES[0] :], 3),
    )
    unfinished.replace(path)


@functools.cache
def pictures_bench(cache: Path, n_models: int) -> Bench:
    """Open the pool of pictures: one training of each model, whose logits of each view are averaged here."""
    path = cache / "pictures.npz"
    if not path.exists():
        coloured_digits(path)
    recipe = {"name": "convnet", "channels": [4, 8], "batch_size": 20, "flip": "random"}
    run = trained(
        cache / f"pictures-{n_models}",
        dataset=str(path.resolve()),
        n_models=n_models,
        recipe=recipe,
        outputs=["test_margins", "test_logits"],
    )
    logits = run.array("test_logits")[:].astype(np.float32)
    alone, mirrored, reversed_channels = np.split(logits, 3, axis=1)
    labels = load_dataset(str(path)).test_labels[: N_PICTURES[1]]
    masks = run.array("train_masks")[:]
    views = {"none": alone, "mirror": (alone + mirrored) / 2, "channel_flip": (alone + reversed_channels) / 2}
    pools = {name: Models(masks, output_of("test_margins")(found, labels)) for name, found in views.items()}
    return Bench(run, find_reference(run, run), pools.pop(OUR_VIEWS), pools)


def bench_of(fault: str, cache: Path, n_models: int) -> Bench:
    """Open the pools that a fault needs."""
    return (pictures_bench if fault in PICTURES else digits_bench)(cache, n_models)


class OfPool(_Comparison):
    """The comparison of `verify`, ours of a pool instead of a run."""

    def of(self, ours: Models) -> "OfPool":
        """Set what stands for ours."""
        self.mine = ours
        return self

    def _our_masks(self, part: Part, start: int, stop: int) -> Array:  # noqa: ARG002
        return self.mine.masks[start:stop]

    def verdicts(self, theirs: Models, looks: Sequence[int]) -> Iterator[tuple[str, list[str]]]:
        """Read on up to each look; give each verdict, and the checks that failed, whether `verify` would go on or not.

        Each look forgets the verdict of the one before and keeps its rows.
        """
        whole, law = Part(range(len(self.mine.masks))), law_of(self.run.spec, theirs.masks.shape[1])
        self._know_our_subsets(whole, len(self.mine.masks))
        for start, look in zip((0, *looks), looks, strict=False):
            self._keep(theirs.masks[start:look], theirs.outputs[start:look], law)
            self.n_rows, self.verdict = look, "undecided"
            found = self._look(self.mine.outputs, whole, law, self.level / len(looks))
            yield self.verdict, [finding.check for finding in found if not finding.passed]


@dataclass
class Outcome:
    """What came of one draw: the verdict and the failed checks of each look, and whether the fault was named."""

    looks: list[tuple[str, list[str]]]
    is_named: bool = False
    cpu_seconds: float = 0.0

    @property
    def end(self) -> int:
        """The look at which `verify` stops."""
        return next((k for k, (verdict, _) in enumerate(self.looks) if verdict != "undecided"), len(self.looks) - 1)


def outcome_of(bench: Bench, fault: str, looks: Sequence[int], *, n_ours: int, seed: int, nth: int) -> Outcome:
    """Draw, plant, and judge."""
    started, n_rows = time.process_time(), looks[-1]
    rng = np.random.default_rng([seed, nth, n_rows])
    order = rng.permutation(len(bench.pool.masks))
    own, other = order[:n_ours], order[n_ours : n_ours + n_rows]
    ours = bench.pool.at(own)
    planted = FAULTS[fault](Draw(bench, ours, bench.pool.at(other), other, rng))
    comparison = OfPool(bench.run, bench.reference, margin=MARGIN, level=LEVEL, seed=nth).of(ours)
    found = list(comparison.verdicts(planted, looks))
    outcome = Outcome(found)
    outcome.is_named = NAMED_BY.get(fault, "") in found[outcome.end][1]
    if fault in PICTURES:
        again = {views: models.outputs[own[:N_AGAIN]] for views, models in bench.others.items()}
        finding = best_views(OUR_VIEWS, ours.outputs, planted.outputs[: looks[outcome.end]], again)
        outcome.is_named = not finding.passed and f"best: {PICTURES[fault]}" in finding.detail
    outcome.cpu_seconds = time.process_time() - started
    return outcome


def outcomes_of(
    cache: Path, n_models: int, fault: str, looks: Sequence[int], n_ours: int, seed: int, draws: range
) -> list[Outcome]:
    """Do some draws, in a process of their own."""
    bench = bench_of(fault, cache, n_models)
    return [outcome_of(bench, fault, looks, n_ours=n_ours, seed=seed, nth=nth) for nth in draws]


@functools.cache
def misnamed_weights(bench: Bench) -> tuple[Datamodels, Array]:
    """Fit datamodels, and say that they are of standardised masks, as a file may that is wrong."""
    targets = picked_targets(bench.pool.outputs.shape[1], 0)
    fitted = fit(bench.pool.masks[:N_FITTED], bench.pool.outputs[:N_FITTED, targets].astype(np.float32))
    return Datamodels(fitted.weight, fitted.bias, fitted.lam, space="standardised"), targets


def weights_outcome(bench: Bench, n_rows: int, *, seed: int, nth: int) -> Outcome:
    """See whether held-out models show what weights are of; `n_rows` counts these, of which `verify` reads 1,000."""
    started = time.process_time()
    written, targets = misnamed_weights(bench)
    rng = np.random.default_rng([seed, nth, n_rows])
    held_out = rng.choice(len(bench.pool.masks) - N_FITTED, min(n_rows, MOST_HELD_OUT), replace=False) + N_FITTED
    side = bench.pool.masks[held_out], bench.pool.outputs[held_out][:, targets].astype(np.float64), 1
    _, finding = _in_raw_space(written, side, bench.run.spec.alpha)
    failed = [] if finding.passed else [finding.check]
    verdict = "undecided" if finding.passed else "differs"
    return Outcome([(verdict, failed)], not finding.passed, time.process_time() - started)


@dataclass
class Cell:
    """What came of the draws of one fault at one number of rows."""

    fault: str
    n_rows: int
    looks: list[int]
    n_models: int
    n_ours: int
    seed: int
    n_draws: int = 0
    n_differs: int = 0
    n_agrees: int = 0
    n_named: int = 0
    n_ever: int = 0
    """Draws called different at any look, were all of them taken."""
    cpu_seconds: float = 0.0
    checks: dict[str, int] = field(default_factory=dict)
    """How often each check failed at the look at which `verify` stops."""
    ends: dict[str, list[int]] = field(default_factory=dict)
    """By look at which `verify` stops: how often, called different, and called in agreement."""

    def add(self, outcome: Outcome) -> None:
        """Count one draw."""
        verdict, failed = outcome.looks[outcome.end]
        is_different, is_agreement = verdict == "differs", verdict == "agrees"
        self.n_draws += 1
        self.n_differs += is_different
        self.n_agrees += is_agreement
        self.n_named += outcome.is_named
        self.n_ever += any(each == "differs" for each, _ in outcome.looks)
        self.cpu_seconds += outcome.cpu_seconds
        self.checks = dict(Counter(self.checks) + Counter(failed))
        counts = self.ends.setdefault(str(self.looks[outcome.end]), [0, 0, 0])
        counts[:] = [counts[0] + 1, counts[1] + is_different, counts[2] + is_agreement]

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from other cells."""
        return self.fault, tuple(self.looks), self.n_models, self.n_ours, self.seed


def wilson(count: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's interval of a share (Wilson 1927), which stays within 0 and 1 and holds for small counts."""
    share = count / total
    center = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * np.sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
    return float(max(0, center - half)), float(min(1, center + half))


def with_interval(count: int, total: int) -> str:
    """Write a share and its interval."""
    low, high = wilson(count, total)
    return f"{count / total:.3f} ({low:.3f} to {high:.3f})"


def table_of(cells: Sequence[Cell]) -> Table:
    """Lay the cells out."""
    table = Table("fault", "rows", "differs (95%)", "agrees", "named", "draws", "CPU s a draw", "failed", box=None)
    has_looks = any(len(cell.looks) > 1 for cell in cells)
    if has_looks:
        table.add_column("differs at any look")
        table.add_column("stops at")
    for cell in cells:
        is_named = cell.fault in NAMED_BY or cell.fault in PICTURES
        row = [
            cell.fault,
            f"{cell.n_rows:,}",
            with_interval(cell.n_differs, cell.n_draws),
            f"{cell.n_agrees / cell.n_draws:.3f}",
            f"{cell.n_named / cell.n_draws:.3f}" if is_named else "",
            f"{cell.n_draws:,}",
            f"{cell.cpu_seconds / cell.n_draws:.2f}",
            ", ".join(f"{check} {count}" for check, count in sorted(cell.checks.items())),
        ]
        if has_looks:
            row.append(with_interval(cell.n_ever, cell.n_draws))
            row.append(", ".join(f"{int(look):,}: {ends[0]}" for look, ends in sorted(cell.ends.items(), key=by_look)))
        table.add_row(*row)
    return table


def by_look(end: tuple[str, list[int]]) -> int:
    return int(end[0])


def read_cells(path: Path) -> dict[tuple[Any, ...], Cell]:
    """Read what was computed before."""
    found = [Cell(**entry) for entry in json.loads(path.read_text())["cells"]] if path.exists() else []
    return {cell.key: cell for cell in found}


def write_cells(path: Path, cells: dict[tuple[Any, ...], Cell]) -> None:
    """Write all cells, whole or not at all."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps({"cells": [asdict(cell) for cell in cells.values()]}, indent=1) + "\n")
    unfinished.replace(path)


def compute(cell: Cell, cache: Path, draws: range, jobs: ProcessPoolExecutor, n_jobs: int) -> None:
    """Add draws to a cell."""
    if cell.fault == OF_WEIGHTS:
        bench = bench_of(cell.fault, cache, cell.n_models)
        for nth in draws:
            cell.add(weights_outcome(bench, cell.n_rows, seed=cell.seed, nth=nth))
        return
    step = max(1, min(10, len(draws) // (2 * n_jobs)))
    parts = [
        jobs.submit(
            outcomes_of,
            cache,
            cell.n_models,
            cell.fault,
            cell.looks,
            cell.n_ours,
            cell.seed,
            draws[start : start + step],
        )
        for start in range(0, len(draws), step)
    ]
    for part in parts:
        for outcome in part.result():
            cell.add(outcome)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute the table, or the part of it that is asked for and not known yet."""
    everything = [*FAULTS, OF_WEIGHTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, help="folder where pools and power.json are kept")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--models", type=int, default=6000, help="of each pool")
    parser.add_argument("--ours", type=int, default=3000, help="models that stand for ours, at most; rows otherwise")
    parser.add_argument("--rows", default="100,300,1000,3000", help="with --looks the largest is read at most")
    parser.add_argument("--faults", default="", help=f"with commas, of: {', '.join(everything)}")
    parser.add_argument(
        "--looks", action="store_true", help="look as verify does; at clean draws, unless faults are given"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    given = parser.parse_args(arguments)
    named = [fault.strip() for fault in given.faults.split(",")] if given.faults else []
    faults = named or (["clean", "clean pictures"] if given.looks else everything)
    try:
        counts = sorted(int(count.replace("_", "")) for count in given.rows.split(","))
    except ValueError:
        parser.error(f"--rows {given.rows}: write counts with commas, as 100,300")
    if unknown := [fault for fault in faults if fault not in everything]:
        parser.error(f"--faults {', '.join(unknown)}: no such fault; choose of {', '.join(everything)}")
    least = max(counts[-1] + LEAST_MODELS, 2 * counts[-1] if "another step size" in faults else 0)
    least = max(least, N_FITTED + min(counts[-1], MOST_HELD_OUT) if OF_WEIGHTS in faults else 0)
    if given.models < least or min(counts[0], given.ours) < LEAST_MODELS or min(given.draws, given.jobs) < 1:
        parser.error(
            f"--models {given.models}, --rows {given.rows}, --ours {given.ours}, --draws {given.draws}, --jobs "
            f"{given.jobs}: these need {least:,} models, {LEAST_MODELS} rows and of ours, a draw and a process, or more"
        )
    if counts[-1] > 100 * N_OTHER_ALPHA:
        parser.error(f"--rows {given.rows}: {100 * N_OTHER_ALPHA:,} at most")
    if given.looks and OF_WEIGHTS in faults:
        parser.error(f"--looks: {OF_WEIGHTS} are compared once; leave them out")
    cache = given.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    for fault in faults:
        bench_of(fault, cache, given.models)  # trains what is missing, once
    path, wanted = cache / "power.json", []
    known = read_cells(path)
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(given.jobs, mp_context=context) as jobs:
        for fault in faults:
            for n_rows in counts[-1:] if given.looks else counts:
                n_ours = min(given.ours, given.models - n_rows)
                looks = portions(n_rows) if given.looks else [n_rows]
                cell = Cell(fault, n_rows, looks, given.models, n_ours, given.seed)
                cell = known.setdefault(cell.key, cell)
                if cell.n_draws < given.draws:
                    compute(cell, cache, range(cell.n_draws, given.draws), jobs, given.jobs)
                    write_cells(path, known)
                    Console(stderr=True, width=150).print(table_of([cell]))
                wanted.append(cell)
    Console(width=190).print(table_of(wanted))


if __name__ == "__main__":
    main()
