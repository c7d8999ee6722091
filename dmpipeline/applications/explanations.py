"""Why this prediction: the training examples that help and hurt a target, how stable that is, and the reverse."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

import dmdata
from dmdata.reading.long_work import shows_count
from dmpipeline.applications.describing import label_names
from dmpipeline.applications.evidence import Asked, Evidence, checked_index, find_evidence
from dmpipeline.errors import SpecError
from dmpipeline.fitting.influences import Influence, Influences, largest
from dmpipeline.fitting.solvers import lasso
from dmpipeline.moments.arrays import read_masks, read_outputs
from dmpipeline.runs.targets import TargetsName

N_FITS = 20
"""Fits to halves of the models by which `explain` tells how stable a weight is, unless told otherwise."""

_MOST_COLUMNS = 1000
_BLOCK_ROWS = 4096


@shows_count("reading", "models")
def explain(
    asked: Asked,
    target: int | None = None,
    *,
    train_example: int | None = None,
    top: int = 10,
    targets: TargetsName = "test",
    n_fits: int | None = None,
    seed: int = 0,
    catalog: dmdata.CatalogLike = None,
    progress: Callable[[int, int], None] | None = None,
) -> Influences:
    """List the training examples that help and hurt a target most, or the targets that lean on a training example.

    Parameters
    ----------
    asked : Run, Datamodels, path or name
        See `dmpipeline.applications.evidence.find_evidence`. Of a release one column of the weights is read, or one
        row.
    target : int
        What to explain: a test example, or with ``targets="train"`` a training example as a target.
    train_example : int
        In place of a target: whose rows of weights to list, by target.
    top : int
        How many of each kind, at most.
    n_fits : int, optional
        Fits to halves of the models that say how stable each weight is, an even number; 0 for none. By default 20 where
        a run's models are at hand, none otherwise: of a release the masks of all models would be read and paid.
    seed : int
        Of the halves.
    progress : callable, optional
        Called with (models read, in total).

    Returns
    -------
    influences : Influences

    Raises
    ------
    SpecError
        If there is no such target or example, or both or neither were given.

    Notes
    -----
    Stability is that of complementary pairs (Shah and Samworth, Variable selection with error control, J. R. Stat. Soc.
    B 75, 2013): the models are cut at random into halves, and each half is fitted at the target's own lam times the
    root of two, as there are half as many models. Fitted are the examples of nonzero weight, and others whose masks
    correlate most with the output, 1,000 together at most: memory holds their columns of the masks, 4,000 bytes a
    model.
    """
    if (target is None) == (train_example is None):
        raise SpecError("give either a target or a train_example, whose weights are to be listed", field="target")
    if top < 1:
        raise SpecError(f"top is {top}; choose 1 or more", field="top", value=top)
    if n_fits is not None and (n_fits < 0 or n_fits % 2):
        raise SpecError(f"n_fits is {n_fits}; choose an even number, such as 20, or 0", field="n_fits", value=n_fits)
    evidence = find_evidence(asked, targets, catalog=catalog)
    train_name, target_name = label_names(evidence)
    if target is None:
        assert train_example is not None  # noqa: S101 - told above
        example = checked_index(train_example, evidence.n_train, "training example", field="train_example")
        weight = evidence.weights_of(example)
        rows = largest(weight, top, target_name)
        n_nonzero = int(np.count_nonzero(weight))
        return Influences(rows, of="train_example", index=example, label=train_name(example), n_nonzero=n_nonzero)
    target = evidence.checked_one(target)
    datamodel = evidence.datamodels([target])
    weight = datamodel.weight[:, 0]
    rows = largest(weight, top, train_name)
    if n_fits is None:
        n_fits = N_FITS if evidence.run is not None else 0
    if n_fits:
        fits = fits_to_halves(
            evidence, target, weight, float(datamodel.lam[0]), n_fits=n_fits, seed=seed, progress=progress
        )
        rows = tuple(fits.described(row) for row in rows)
    return Influences(
        rows,
        index=target,
        label=target_name(target),
        n_nonzero=int(np.count_nonzero(weight)),
        n_fits=n_fits,
        pairs=() if datamodel.pairs is None else datamodel.pairs.top(0, top),
    )


@dataclass(frozen=True, slots=True, eq=False)
class HalfFits:
    """Weights of one target, fitted to halves of the models.

    Attributes
    ----------
    columns : array of int, shape (n_columns,)
        The training examples that were fitted, rising.
    weight : array of float64, shape (n_fits, n_columns)
        Of raw masks.
    """

    columns: npt.NDArray[np.intp]
    weight: npt.NDArray[np.float64]

    def described(self, row: Influence) -> Influence:
        """Add to a row how stable its weight is."""
        sign = 1 if row.weight > 0 else -1
        place = int(np.searchsorted(self.columns, row.index))
        if place == len(self.columns) or self.columns[place] != row.index:
            return replace(row, same_sign=0.0)
        own = sign * self.weight[:, place]
        ranks = 1 + (sign * self.weight > own[:, None]).sum(axis=1)
        low, high = np.quantile(ranks, [0.05, 0.95], method="nearest").tolist()
        return replace(row, same_sign=float((own > 0).mean()), rank_low=int(low), rank_high=int(high))


def fits_to_halves(
    evidence: Evidence,
    target: int,
    weight: npt.NDArray[np.floating[Any]],
    lam: float,
    *,
    n_fits: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> HalfFits:
    """Fit a target's datamodel to random halves of the models; see the notes of `explain`."""
    masks, outputs = evidence.rows("models")
    n_models, n_train = masks.shape
    columns = np.flatnonzero(weight)
    y = np.empty(n_models)
    sums, products = np.zeros(n_train), np.zeros(n_train)
    for start in range(0, n_models, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, n_models)
        y[start:stop] = read_outputs(outputs, start, stop)[:, target]
        block = read_masks(masks, start, stop)
        sums += block.sum(axis=0, dtype=np.int64)
        products += y[start:stop] @ block.astype(np.float32)
        if progress is not None:
            progress(stop // 2, n_models)
    share = sums / n_models
    spread = np.sqrt(share * (1 - share))
    pull = np.abs(products / n_models - y.mean() * share)
    np.divide(pull, spread, out=pull, where=spread > 0)
    pull[spread == 0] = -1
    pull[columns] = math.inf
    columns = np.sort(np.argsort(-pull, kind="stable")[: max(_MOST_COLUMNS, len(columns))])
    columns = columns[pull[columns] >= 0]
    x = np.empty((n_models, len(columns)), np.float32)
    for start in range(0, n_models, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, n_models)
        x[start:stop] = read_masks(masks, start, stop)[:, columns]
        if progress is not None:
            progress((n_models + stop) // 2, n_models)
    rng = np.random.default_rng(seed)
    fitted = []
    for _ in range(n_fits // 2):
        order = rng.permutation(n_models)
        for half in (order[: n_models // 2], order[n_models // 2 :]):
            fitted.append(_fitted(x[half], y[half], lam * math.sqrt(2)))
    return HalfFits(columns, np.stack(fitted))


def _fitted(x: npt.NDArray[np.float32], y: npt.NDArray[np.float64], lam: float) -> npt.NDArray[np.float64]:
    """Solve one target at one strength, in units of standardised masks; return weights of raw ones."""
    mean = x.mean(axis=0, dtype=np.float64)
    spread = np.sqrt(mean * (1 - mean))
    inverse = np.divide(1, spread, out=np.zeros_like(spread), where=spread > 0)
    scaled = (x - mean.astype(np.float32)) * inverse.astype(np.float32)
    own = y - y.mean()
    solution = lasso.solve(
        np.ascontiguousarray(scaled.T @ scaled / np.float32(len(x))),
        (own @ scaled / len(x))[None].astype(np.float64),
        np.array([float(own @ own) / len(x)]),
        np.array([lam]),
        start=np.zeros((1, x.shape[1]), np.float32),
        tol=1e-2,
        max_sweeps=1000,
        threads=1,
        progress=None,
    )
    weights: npt.NDArray[np.float64] = solution.weight[0].astype(np.float64) * inverse
    return weights
