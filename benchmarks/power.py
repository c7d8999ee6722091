"""How often `dmpipeline verify --against` calls ensembles different, by planted fault and rows read: a table of power.

    python benchmarks/power.py CACHE [--draws 200] [--models 6000] [--rows 100,300,1000,3000] [--faults clean,...]

One pool of digits models is trained into CACHE once, and a second one with another step size. For each draw, disjoint
models of the pool stand for ours and for the reference's, a fault is planted in the reference, and what `verify` does
with rows that it has read is done: the statistics on outputs, the law of masks, rows that repeat, and both orders. One
look is one cell: how looks share their error when rows are read in portions is left out. Weights are compared by
datamodels fitted once.

Each cell has the share of draws called "differs", with Wilson's 95% interval, and the share called "agrees". Of clean
draws at most 5% may be called different; of those that differ by the margin itself at most 5% may be called either.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # matrices are small: threads only wait for each other

import numpy as np
from rich.console import Console
from rich.table import Table

from dmpipeline import Datamodels, Run, RunSpec, find_space, fit
from dmpipeline.checks.agreement import compare_outputs
from dmpipeline.checks.mask_law import MaskLaw
from dmpipeline.checks.orders import order_of_targets, order_of_training
from dmpipeline.checks.repeats import rows_repeated
from dmpipeline.draws.masks import draw_bernoulli_masks

Array = np.ndarray[Any, Any]

ALPHA = 0.5
OTHER_LR = 1.5
"""By how much the step size of the second pool is larger."""
OTHER_ALPHA = 0.2


@dataclass(frozen=True)
class Pool:
    """Models to draw from: masks (n_models, n_train) and margins (n_models, n_targets)."""

    masks: Array
    outputs: Array


@dataclass(frozen=True)
class Cell:
    """What came of the draws of one fault at one number of rows."""

    fault: str
    n_rows: int
    n_draws: int
    n_differs: int
    n_agrees: int
    n_named: int
    """Draws in which the fault was named: an order, a law, a repeated row."""
    seconds: float

    @property
    def differs(self) -> float:
        """Share called different."""
        return self.n_differs / self.n_draws

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of that share."""
        return wilson(self.n_differs, self.n_draws)


def wilson(count: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's interval of a share (Wilson 1927), which stays within 0 and 1 and holds for small counts."""
    share = count / total
    center = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * np.sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
    return float(max(0, center - half)), float(min(1, center + half))


def pool_of(cache: Path, name: str, n_models: int, **overrides: Any) -> Pool:
    """Open a pool in the cache, trained first if it is not there."""
    path = cache / f"{name}-{n_models}"
    spec = RunSpec(
        n_models=n_models,
        held_out={"n_subsets": 0},
        outputs=["test_margins"],
        seed=11,
        **overrides,
    )
    run = Run.open(path) if (path / "run.yaml").exists() else Run.create(path, spec)
    if run.n_rows_done < run.spec.n_rows:
        sys.stderr.write(f"training {n_models:,} models into {path}\n")
        run.train()
    return Pool(run.array("train_masks")[:], run.array("test_margins")[:].astype(np.float32))


@dataclass
class Draw:
    """One draw: the models of ours and of the reference, the latter copied, to plant faults in."""

    ours: Pool
    theirs: Pool
    rng: np.random.Generator
    others: dict[str, Pool]


def clean(draw: Draw) -> Pool:
    """Nothing is planted."""
    return draw.theirs


def shifted(by: float) -> Callable[[Draw], Pool]:
    """Shift every margin by a share of its standard deviation over models."""

    def plant(draw: Draw) -> Pool:
        return Pool(draw.theirs.masks, draw.theirs.outputs + np.float32(by) * draw.ours.outputs.std(0))

    return plant


def targets_permuted(draw: Draw) -> Pool:
    """Exchange ten targets' outputs, none left in its place."""
    picked = draw.rng.choice(draw.theirs.outputs.shape[1], 10, replace=False)
    outputs = draw.theirs.outputs.copy()
    outputs[:, picked] = outputs[:, np.roll(picked, 1)]
    return Pool(draw.theirs.masks, outputs)


def test_order_off(draw: Draw) -> Pool:
    """Number every target one too low."""
    return Pool(draw.theirs.masks, np.roll(draw.theirs.outputs, -1, axis=1))


def train_order_off(draw: Draw) -> Pool:
    """Number every training example one too low."""
    return Pool(np.roll(draw.theirs.masks, -1, axis=1), draw.theirs.outputs)


def row_repeated(draw: Draw) -> Pool:
    """Store one row over another."""
    masks, outputs = draw.theirs.masks.copy(), draw.theirs.outputs.copy()
    first, second = draw.rng.choice(len(masks), 2, replace=False)
    masks[first], outputs[first] = masks[second], outputs[second]
    return Pool(masks, outputs)


def other_step(draw: Draw) -> Pool:
    """Take models that were trained with a larger step."""
    other = draw.others["lr"]
    rows = draw.rng.choice(len(other.masks), len(draw.theirs.masks), replace=False)
    return Pool(other.masks[rows], other.outputs[rows])


def rows_of_other_alpha(draw: Draw) -> Pool:
    """Take one row in a hundred of models that were trained on fewer examples."""
    other = draw.others["alpha"]
    masks, outputs = draw.theirs.masks.copy(), draw.theirs.outputs.copy()
    count = max(1, len(masks) // 100)
    rows = draw.rng.choice(len(masks), count, replace=False)
    taken = draw.rng.choice(len(other.masks), count, replace=False)
    masks[rows], outputs[rows] = other.masks[taken], other.outputs[taken]
    return Pool(masks, outputs)


def other_law(draw: Draw) -> Pool:
    """Take masks that are drawn example by example; outputs stay, as few statistics of them would differ."""
    count, n_train = draw.theirs.masks.shape
    numbers = draw.rng.integers(0, 2**31, count).astype(np.uint64)
    return Pool(draw_bernoulli_masks(5, numbers, n_train, ALPHA), draw.theirs.outputs)


FAULTS: dict[str, Callable[[Draw], Pool]] = {
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
}
NAMED_BY = {
    "10 targets permuted": "test_order",
    "test order off by one": "test_order",
    "training order off by one": "train_order",
    "1% of rows of another alpha": "masks",
    "a row repeated": "rows",
    "masks of another law": "masks",
}
"""The check that would say what is wrong, where one can."""


def judge(ours: Pool, theirs: Pool, seed: int, *, orders: bool) -> tuple[str, set[str]]:
    """Give the verdict as `verify` does, and which checks failed."""
    n_train = ours.masks.shape[1]
    law = MaskLaw(n_train, int(ALPHA * n_train) / n_train, is_exact=True)
    law.add(theirs.masks)
    sizes = theirs.masks.sum(axis=1, dtype=np.int64)
    failed = set()
    if law.size_faults(sizes) or law.density_faults() or law.pair_faults():
        failed.add("masks")
    if len(rows_repeated(theirs.outputs)) and not len(rows_repeated(ours.outputs)):
        failed.add("rows")
    agreement = compare_outputs(ours.outputs, theirs.outputs, seed=seed)
    failed |= {finding.check for finding in agreement.findings if not finding.passed}
    if order_of_targets(ours.outputs, theirs.outputs).is_wrong:
        failed.add("test_order")
    if orders:
        rows = slice(0, 1000)
        order = order_of_training(ours.masks[rows], ours.outputs[rows], theirs.masks[rows], theirs.outputs[rows])
        failed |= {"train_order"} if order.is_wrong else set()
    return ("differs" if failed else agreement.verdict), failed


def cell_of(
    pool: Pool, others: dict[str, Pool], fault: str, n_rows: int, *, n_ours: int, n_draws: int, seed: int
) -> Cell:
    """Draw, plant, and judge."""
    started, verdicts, named = time.monotonic(), [], 0
    for nth in range(n_draws):
        rng = np.random.default_rng([seed, nth, n_rows])
        order = rng.permutation(len(pool.masks))
        own, other = order[:n_ours], order[n_ours : n_ours + n_rows]
        ours = Pool(pool.masks[own], pool.outputs[own])
        theirs = Pool(pool.masks[other], pool.outputs[other])
        planted = FAULTS[fault](Draw(ours, theirs, rng, others))
        # finding the order of training examples takes long, and only two faults are about it
        orders = fault in ("clean", "training order off by one")
        verdict, failed = judge(ours, planted, nth, orders=orders)
        verdicts.append(verdict)
        named += NAMED_BY.get(fault, "") in failed
    return Cell(
        fault, n_rows, n_draws, verdicts.count("differs"), verdicts.count("agrees"), named, time.monotonic() - started
    )


def weights_of_another_space(pool: Pool, n_rows: int, n_draws: int, seed: int) -> Cell:
    """Fit datamodels once, write their weights as those of standardised masks, and see whether that is found."""
    started = time.monotonic()
    n_fitted = min(2000, len(pool.masks) - 500)
    targets = slice(0, 20)
    fitted = fit(pool.masks[:n_fitted], np.asarray(pool.outputs[:n_fitted, targets]))
    standardised = fitted.to_standardised(mean=ALPHA)
    written = Datamodels(standardised.weight, standardised.bias, standardised.lam)
    found = 0
    for nth in range(n_draws):
        rng = np.random.default_rng([seed, nth])
        rows = n_fitted + rng.choice(len(pool.masks) - n_fitted, min(n_rows, 250), replace=False)
        reading = find_space(written, pool.masks[rows], pool.outputs[rows, targets])
        found += reading.space == "standardised" and reading.is_sure
    seconds = time.monotonic() - started
    return Cell("weights of another space", n_rows, n_draws, found, 0, found, seconds)


def table_of(cells: Sequence[Cell]) -> Table:
    """Lay the cells out."""
    table = Table("fault", "rows", "differs", "95%", "agrees", "named", "draws", "s a draw", box=None)
    for cell in cells:
        low, high = cell.interval
        table.add_row(
            cell.fault,
            f"{cell.n_rows:,}",
            f"{cell.differs:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{cell.n_agrees / cell.n_draws:.3f}",
            f"{cell.n_named / cell.n_draws:.3f}" if cell.fault in NAMED_BY or "space" in cell.fault else "",
            f"{cell.n_draws:,}",
            f"{cell.seconds / cell.n_draws:.2f}",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the table, or the part of it that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, help="folder where pools are kept")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--models", type=int, default=6000, help="of the pool")
    parser.add_argument("--ours", type=int, default=3000, help="models that stand for ours, at most; rows otherwise")
    parser.add_argument("--rows", default="100,300,1000,3000")
    parser.add_argument("--faults", default="", help="by name, with commas; all if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the cells here, too")
    given = parser.parse_args(arguments)
    given.cache.mkdir(parents=True, exist_ok=True)
    faults = given.faults.split(",") if given.faults else [*FAULTS, "weights of another space"]
    pool = pool_of(given.cache, "pool", given.models)
    others = {}
    if "another step size" in faults:
        from dmpipeline.models.recipes import find_recipe

        recipe = find_recipe(RunSpec().recipe)
        others["lr"] = pool_of(given.cache, "lr", given.models // 2, recipe={"lr": recipe.lr * OTHER_LR})
    if "1% of rows of another alpha" in faults:
        others["alpha"] = pool_of(given.cache, "alpha", 200, alpha=OTHER_ALPHA)
    cells = []
    for fault in faults:
        for n_rows in map(int, given.rows.split(",")):
            n_ours = min(given.ours, given.models - n_rows)
            if fault == "weights of another space":
                cells.append(weights_of_another_space(pool, n_rows, given.draws, given.seed))
            else:
                cells.append(cell_of(pool, others, fault, n_rows, n_ours=n_ours, n_draws=given.draws, seed=given.seed))
            Console(stderr=True, width=150).print(table_of(cells[-1:]))
            if given.json:
                given.json.write_text(json.dumps([asdict(cell) for cell in cells], indent=1) + "\n")
    Console(width=150).print(table_of(cells))


if __name__ == "__main__":
    main()
