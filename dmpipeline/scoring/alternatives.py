"""Estimators other than the LASSO, from the same second moments, and their comparison on the same held-out models.

Each returns `Datamodels` in raw-mask space, so what reads, saves, predicts or scores those of `fit` takes these too;
their lam is of the estimator's own penalty. The intercept is never penalised, an example that is in all subsets or in
none has weight 0, and a target that never varies has weights 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from dmpipeline.compute import available_threads
from dmpipeline.errors import SpecError
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.fitting.settings import BLOCK_TARGETS
from dmpipeline.fitting.spaces import Space, parts_of
from dmpipeline.moments.arrays import RowSliceable, check_shapes, read_masks, read_outputs
from dmpipeline.moments.moments import Moments
from dmpipeline.scoring.evaluation import (
    Evaluation,
    ScoreKeywords,
    check_keywords,
    evaluate,
    readable_score,
    readable_table,
)
from dmpipeline.tables import dicts_as_html

Floats = NDArray[np.float64]


def ridge(
    fitting: Moments,
    held_out: Moments,
    *,
    n_lams: int = 31,
    threads: int | None = None,
    block_targets: int = BLOCK_TARGETS,
) -> Datamodels:
    """Fit by ridge regression (Hoerl and Kennard, 1970): choose lam on the rows of `held_out`, then fit all rows at it.

    A target's weights w minimise ``|y - Xw|^2 / n + lam |w|^2`` with X the masks centred and scaled to unit variance,
    so that w = (G + lam)^-1 c with their Gram matrix G and covariances c. Once G = V diag(e) V' is known, every target
    at every lam costs products of matrices and no other factorisation.

    Parameters
    ----------
    fitting, held_out : Moments
        Of the same examples and targets, over different rows.
    n_lams : int
        Points of the grid, which all targets share, spaced evenly in log lam over six decades about n_train / n.
    threads : int, optional
        Of forming G; all processors if not given. The linear algebra takes those its library is set to.
    block_targets : int
        Targets whose covariances are formed at a time.

    Returns
    -------
    datamodels : Datamodels
        Without a certificate, for the solution is direct. A target that never varies over the rows of `fitting` has the
        largest lam.

    Raises
    ------
    SpecError
        Moments that differ in their examples or targets, or an unusable setting.

    Notes
    -----
    The best lam is ``n_train s^2 / (n |w|^2)`` with a noise of variance s^2 (Hoerl, Kennard and Baldwin, 1975). For
    columns of unit variance that are nearly uncorrelated this is (n_train / n) (1 - R2) / R2, so the grid goes from an
    R2 of 0.001 to one of 0.999.

    G is formed and decomposed in float64. It is singular wherever subsets have one size, examples are duplicates or
    models are fewer than examples, and the least lam may then be below the 1e-7 of the largest eigenvalue by which
    float32 would miss a zero.

    Memory holds the moments and about 32 n_train^2 bytes. The time is that of two eigendecompositions and, for each
    target, of `n_lams` + 4 products of a vector with an n_train x n_train matrix.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> masks = rng.random((500, 20)) < 0.5
    >>> outputs = 3.0 * masks[:, [4]] + 0.1 * rng.standard_normal((500, 1))
    >>> dm = ridge(Moments.of(masks, outputs, stop=400), Moments.of(masks, outputs, start=400))
    >>> int(abs(dm.weight[:, 0]).argmax()), bool(abs(dm.weight[4, 0] - 3) < 0.1)
    (4, True)
    """
    if n_lams < 1:
        raise SpecError(f"n_lams is {n_lams}; choose at least 1", field="n_lams", value=n_lams)
    if threads is not None and threads < 1:
        raise SpecError(f"threads is {threads}; choose at least 1, or leave it out", field="threads", value=threads)
    threads = threads or available_threads()
    whole = fitting + held_out
    n_train, n_targets = whole.cross.shape
    lams = n_train / fitting.n * np.geomspace(_MOST_NOISE, 1 / _MOST_NOISE, n_lams)

    space = Space.of(fitting)
    values, vectors = _eigen(space, fitting, threads=threads)
    gram_out = vectors.T @ (space.gram(held_out, threads=threads, dtype=np.float64) @ vectors)
    error = np.empty((n_targets, n_lams))
    for part in parts_of(n_targets, block_targets):
        pull, pull_out = space.cross(fitting, part) @ vectors, space.cross(held_out, part) @ vectors
        square = space.square(held_out, part)
        for k, lam in enumerate(lams):
            along = pull / (values + lam)  # the weights, along the eigenvectors
            error[part, k] = square + np.einsum("tj,tj->t", along, along @ gram_out - 2 * pull_out)
    del vectors, gram_out
    best = error.argmin(axis=1)

    space = Space.of(whole)
    values, vectors = _eigen(space, whole, threads=threads)
    weight = np.empty((n_targets, n_train), np.float32)
    for part in parts_of(n_targets, block_targets):
        along = space.cross(whole, part) @ vectors / (values + lams[best[part], None])
        weight[part] = along @ vectors.T
    return _datamodels(space, weight, lams[best], validation_error=error[np.arange(n_targets), best])


def debiased(datamodels: Datamodels, moments: Moments, *, block_targets: int = BLOCK_TARGETS) -> Datamodels:
    """Fit each target's nonzero weights again by least squares, without the penalty that shrank them.

    The LASSO's penalty serves to choose the support, and least squares on it has no more bias than the choice left
    (post-LASSO: Belloni and Chernozhukov, Least squares after model selection in high-dimensional sparse models, 2013).

    Parameters
    ----------
    datamodels : Datamodels
        Their supports are taken, and nothing else.
    moments : Moments
        Of all rows to fit on, held-out ones of the choice of lam included.
    block_targets : int
        As for `ridge`.

    Returns
    -------
    datamodels : Datamodels
        Of the same lam, without a certificate. Where the support's columns are linearly dependent (duplicates, or no
        fewer than rows) least squares has many answers: of these, the one of least norm over columns scaled to unit
        variance, so that duplicates share their weight equally.

    Raises
    ------
    SpecError
        Moments of other examples or targets.

    Notes
    -----
    A target of s nonzero weights takes s^3 / 3 multiplications and 16 s^2 bytes; meant for sparse datamodels.
    """
    if datamodels.weight.shape != moments.cross.shape:
        raise SpecError(
            f"moments of {moments.cross.shape} (n_train, n_targets) do not fit datamodels of "
            f"{datamodels.weight.shape}; take both from the same examples and targets"
        )
    space = Space.of(moments)
    n_train, n_targets = datamodels.weight.shape
    weight = np.zeros((n_targets, n_train), np.float32)
    for part in parts_of(n_targets, block_targets):
        cross = space.cross(moments, part)
        is_in_support = (datamodels.weight[:, part].T != 0) & (space.inverse_scale > 0)
        for t, (own, is_in) in enumerate(zip(cross, is_in_support, strict=True), start=part.start):
            support = np.flatnonzero(is_in)
            if len(support):
                weight[t, support] = _least_squares(_gram_of(space, moments, support), own[support])
    return _datamodels(space, weight, datamodels.lam)


def difference_of_means(moments: Moments, *, block_targets: int = BLOCK_TARGETS) -> Datamodels:
    """Weigh each example by itself: the mean output of the models with it, less that of the models without it.

    With subsets drawn uniformly from all there are, this is the maximum-sample-reuse estimate of the Banzhaf value
    (Wang and Jia, Data Banzhaf, 2023), and for any share of examples the influence of Feldman and Zhang (What Neural
    Networks Memorize and Why, 2020). It is linear regression on one column at a time: an estimate of an example's
    weight carries what all others do to the output as noise.

    Parameters
    ----------
    moments : Moments
        Of all rows to fit on.
    block_targets : int
        As for `ridge`.

    Returns
    -------
    datamodels : Datamodels
        Without a certificate, and lam 0. The bias is such that predictions average to the mean output over these rows.
    """
    space = Space.of(moments)
    n_train, n_targets = moments.cross.shape
    weight = np.empty((n_targets, n_train), np.float32)
    for part in parts_of(n_targets, block_targets):
        # cov(x, y) / var(x) is the difference of means for x of 0 and 1; the space divides by the deviation twice
        weight[part] = space.cross(moments, part)
    return _datamodels(space, weight, np.zeros(n_targets))


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Scores of several datamodels on the same held-out models, which `print` shows as a table.

    Attributes
    ----------
    evaluations : dict of str to Evaluation
        By name, in the order handed in. Intervals and ceilings are of the same resamples and halvings.
    nonzero_weights : dict of str to float
        Mean number of nonzero weights a target, by name.
    """

    evaluations: dict[str, Evaluation]
    nonzero_weights: dict[str, float]

    def as_rows(self) -> list[dict[str, str | float | None]]:
        """Return a row for each estimate, ready for JSON: None stands for what is not defined.

        Returns
        -------
        rows : list of dict
            `name`, `nonzero_weights`, and of the `Evaluation` `lds`, `lds_low`, `lds_high`, `lds_ratio`, `r2`, `mse`.
        """
        rows: list[dict[str, str | float | None]] = []
        for name, evaluation in self.evaluations.items():
            scores = evaluation.as_dict()
            shown = {score: scores[score] for score in ("lds", "lds_low", "lds_high", "lds_ratio", "r2", "mse")}
            rows.append({"name": name, **shown, "nonzero_weights": self.nonzero_weights[name]})
        return rows

    def table(self) -> Table:
        """Lay the rows out for a terminal."""
        level = next(iter(self.evaluations.values())).level
        columns = ("LDS", f"{level:.0%} interval", "of its ceiling", "R2", "MSE", "nonzero weights")
        table = Table("estimate", *columns, box=None, header_style="bold")
        for column in table.columns[1:]:
            column.justify = "right"
        for name, e in self.evaluations.items():
            interval = f"{readable_score(e.lds_low)} to {readable_score(e.lds_high)}"
            scores = (readable_score(e.lds), interval, *map(readable_score, (e.lds_ratio, e.r2, e.mse)))
            table.add_row(name, *scores, f"{self.nonzero_weights[name]:,.1f}")
        return table

    def __str__(self) -> str:
        return readable_table(self.table())

    def _repr_html_(self) -> str:
        rows = [{name.replace("_", " "): value for name, value in row.items()} for row in self.as_rows()]
        return dicts_as_html(f"Comparison of {len(rows)} estimates", rows, n_rows=len(rows))

    def __repr__(self) -> str:
        return f"<Comparison: {', '.join(self.evaluations)}>"


def compare(
    estimates: Mapping[str, Datamodels],
    masks: RowSliceable,
    outputs: RowSliceable,
    **scoring: Unpack[ScoreKeywords],
) -> Comparison:
    """Score several datamodels on the same held-out models, which are read once.

    Parameters
    ----------
    estimates : mapping of str to Datamodels
        At least one, by the names to show.
    masks, outputs
        As for `evaluate`.
    **scoring
        `n_retrainings`, `n_bootstraps`, `n_splits`, `level` and `seed` of `evaluate`.

    Raises
    ------
    SpecError
        If there are no estimates; else as for `evaluate`.
    """
    check_keywords(scoring, of="compare")
    if not estimates:
        raise SpecError("there are no estimates to compare; hand in datamodels by name")
    n_models, _, _ = check_shapes(masks, outputs)
    rows, truth = read_masks(masks, 0, n_models), read_outputs(outputs, 0, n_models)
    evaluations = {name: evaluate(datamodels, rows, truth, **scoring) for name, datamodels in estimates.items()}
    nonzero = {name: float(np.count_nonzero(dm.weight) / dm.n_targets) for name, dm in estimates.items()}
    return Comparison(evaluations, nonzero)


_MOST_NOISE = 1e3
"""Largest ratio of unexplained to explained variance that the grid of `ridge` provides for; the least is its inverse.
"""

_LEAST_PIVOT = 1e-10
"""A column of whose variance the columns before it leave no more than this share is held to be dependent on them.

Masks that differ in one row of a million leave 1e-6; rounding leaves 1e-16 times the columns.
"""


def _eigen(space: Space, moments: Moments, *, threads: int) -> tuple[Floats, Floats]:
    """Decompose these rows' Gram matrix: eigenvalues, not negative, (n_train,), and eigenvectors as columns."""
    values, vectors = np.linalg.eigh(space.gram(moments, threads=threads, dtype=np.float64))
    return np.maximum(values, 0), vectors


def _gram_of(space: Space, moments: Moments, support: NDArray[np.intp]) -> Floats:
    """Form the support's part of the Gram matrix of the rows that the space is of, from their exact counts."""
    mean, inverse_scale = space.mean[support], space.inverse_scale[support]
    gram = moments.gram[np.ix_(support, support)] / moments.n
    gram -= np.outer(mean, mean)
    gram *= np.outer(inverse_scale, inverse_scale)
    return gram


def _least_squares(gram: Floats, cross: Floats) -> Floats:
    """Solve Gw = c for columns of unit variance; of many solutions, return that of least norm."""
    try:
        least = (np.diagonal(np.linalg.cholesky(gram)) ** 2).min()
    except np.linalg.LinAlgError:
        least = 0.0
    if least <= _LEAST_PIVOT:
        return np.asarray(np.linalg.pinv(gram, rcond=_LEAST_PIVOT, hermitian=True) @ cross, np.float64)
    return np.asarray(np.linalg.solve(gram, cross), np.float64)


def _datamodels(
    space: Space, weight: NDArray[np.float32], lam: NDArray[np.floating[Any]], *, validation_error: Floats | None = None
) -> Datamodels:
    of_masks, bias = space.raw(weight)
    return Datamodels(weight=of_masks, bias=bias, lam=lam.astype(np.float32), validation_error=validation_error)
