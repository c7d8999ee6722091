"""Fitting: from masks and outputs, or their second moments, to datamodels.

Masks and outputs are taken in any form that gives rows, and are read once. The strength of the penalty is chosen for
each target on rows held out, and the fit is then repeated on all rows at that strength. Every fit comes with a
certificate of how near its optimum is.

Nothing is read before the shapes and settings are known to be usable.
"""

import itertools
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmpipeline import lasso
from dmpipeline.compute import available_threads
from dmpipeline.datamodels import Certificate, Datamodels
from dmpipeline.errors import ConvergenceError, SpecError
from dmpipeline.moments import BLOCK_ROWS, Moments, RowSliceable, check_shapes
from dmpipeline.priors import STRENGTHS, check_prior, penalty_factors
from dmpipeline.spaces import Space

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, in all); the stages are "moments" in rows, then "paths" and "refit" in targets."""


def fit(
    masks: RowSliceable,
    outputs: RowSliceable,
    *,
    validation: float = 0.1,
    folds: int | None = None,
    prior: NDArray[Any] | None = None,
    is_positive: bool = False,
    n_lams: int = 100,
    lam_ratio: float = 1e-2,
    tol: float = 1e-3,
    patience: int = 5,
    strict: bool = False,
    block_rows: int = BLOCK_ROWS,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Datamodels:
    """Fit a sparse linear datamodel to every target.

    Parameters
    ----------
    masks : bool or 0/1, shape (n_models, n_train)
        Which examples each model was trained on: an array, LazyArray, Zarr or dask array.
    outputs : real, shape (n_models, n_targets)
        What each model said about each target, say a float16 margin.
    validation : float
        Share of the rows, the last ones, on which lam is chosen. Not used with `folds`.
    folds : int, optional
        Choose lam by so many-fold cross-validation instead: each of so many runs of rows is held out in turn, and the
        lam of least mean error taken. It takes that many times as long.
    prior : array of float, shape (n_train, n_targets), optional
        Scores that say, by their magnitude, which examples are likely to matter for a target; any attribution will do.
        Likely ones are penalised less, by a strength from `priors.STRENGTHS` that is chosen for all targets together by
        their validation errors. None is among them: a useless prior costs time, three times as much, and little else.
    is_positive : bool
        Allow no weight below zero (the positive Lasso of Efron et al., Least Angle Regression, 2004).
    n_lams, lam_ratio
        Points of a target's grid, spaced evenly in log lam from the least lam that silences it down to `lam_ratio` of
        that.
    tol : float
        Largest violation of an optimality condition at which a point is accepted, as a share of lam.
    patience : int
        A path stops when so many points in a row have not lowered the validation error, and it has risen by more than
        0.1 / sqrt(validation models) of itself: less is often chance, and a lower minimum lies further on.
    strict : bool
        Refuse a target whose last fit did not reach `tol` before its sweeps ran out. Otherwise it is warned of, and its
        certificate tells how near it came.
    block_rows : int
        Models read at a time.
    threads : int, optional
        Targets solved at a time; all processors if not given. The result does not depend on it.
    progress : callable, optional
        See `Progress`.

    Returns
    -------
    datamodels : Datamodels
        With a certificate. An example that is in all subsets or in none has weight 0; a target that never varies has
        weights 0.

    Raises
    ------
    SpecError
        Shapes that disagree, too few rows or an unusable setting, before anything is read; masks other than 0 and 1
        or outputs that are not finite, once they are met.
    ConvergenceError
        If `strict`, naming the targets that did not reach `tol`.

    Warns
    -----
    RuntimeWarning
        If not `strict` and some targets did not reach `tol`.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> masks = rng.random((500, 20)) < 0.5
    >>> outputs = 3.0 * masks[:, [4]] + 0.1 * rng.standard_normal((500, 1))
    >>> dm = fit(masks, outputs)
    >>> int(abs(dm.weight[:, 0]).argmax()), bool(abs(dm.weight[4, 0] - 3) < 0.1)
    (4, True)
    """
    n_models, n_train, n_targets = check_shapes(masks, outputs)
    _check_prior(prior, n_train, n_targets)
    ends = _ends_of_parts(n_models, validation=validation, folds=folds)
    settings = _Settings(prior, is_positive, n_lams, lam_ratio, tol, patience, strict, threads, progress)
    parts = []
    for start, stop in zip([0, *ends], ends, strict=False):
        report = settings.report("moments", start, n_models)
        parts.append(
            Moments.of(masks, outputs, start=start, stop=stop, block_rows=block_rows, threads=threads, progress=report)
        )
    if folds is None:
        return _fit_split(parts[0], parts[1], settings)
    return _fit_folds(parts, settings)


def split_rows(n_models: int, validation: float) -> int:
    """Count the rows to fit on; those after them, `validation` of all, choose lam.

    Raises
    ------
    SpecError
        If there are not two of each, or `validation` is not a share.
    """
    if not 0 < validation < 1:
        raise SpecError(f"validation {validation} is not a share of the rows; choose between 0 and 1, such as 0.1")
    n_validation = max(round(validation * n_models), 1)
    n_fit = n_models - n_validation
    if n_fit < 2 or n_validation < 2:
        raise SpecError(
            f"{n_models} models with validation {validation} leave {n_fit} to fit and {n_validation} to validate; "
            "expected at least 2 of each: train more models, or choose another share",
            n_fit=n_fit,
            n_validation=n_validation,
        )
    return n_fit


def fit_moments(
    fitting: Moments,
    held_out: Moments,
    *,
    prior: NDArray[Any] | None = None,
    is_positive: bool = False,
    n_lams: int = 100,
    lam_ratio: float = 1e-2,
    tol: float = 1e-3,
    patience: int = 5,
    strict: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Datamodels:
    """Fit from second moments: choose lam on the rows of `held_out`, then fit the rows of both at that lam.

    The settings are those of `fit`. No model is read, so the time does not depend on how many there were.
    """
    settings = _Settings(prior, is_positive, n_lams, lam_ratio, tol, patience, strict, threads, progress)
    return _fit_split(fitting, held_out, settings)


def fit_folds(
    parts: Sequence[Moments],
    *,
    prior: NDArray[Any] | None = None,
    is_positive: bool = False,
    n_lams: int = 100,
    lam_ratio: float = 1e-2,
    tol: float = 1e-3,
    patience: int = 5,
    strict: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Datamodels:
    """Fit from the second moments of two or more sets of rows: hold out each in turn to choose lam, then fit all.

    The settings are those of `fit`.
    """
    if len(parts) < 2:
        raise SpecError(f"{len(parts)} sets of moments leave nothing to hold out; hand in at least 2")
    return _fit_folds(parts, _Settings(prior, is_positive, n_lams, lam_ratio, tol, patience, strict, threads, progress))


_MAX_SWEEPS = 10_000
_TARGETS_AT_ONCE = 512

_LEAST_RISE = 0.1
"""A path goes on while its error is within this, over the root of the validation models, of the lowest.

Without it 1 to 7 of 100 targets stopped before a minimum up to 5% lower (of 200 to 1,100 planted models); with it none.
"""


@dataclass(frozen=True, slots=True)
class _Settings:
    """The settings of a fit from moments, as `fit` describes them."""

    prior: NDArray[Any] | None
    is_positive: bool
    n_lams: int
    lam_ratio: float
    tol: float
    patience: int
    strict: bool
    threads: int | None
    progress: Progress | None

    def __post_init__(self) -> None:
        for name, usable, expected in (
            ("n_lams", self.n_lams >= 1, "at least 1"),
            ("lam_ratio", 0 < self.lam_ratio < 1, "between 0 and 1, such as 0.01"),
            ("tol", 0 < self.tol < 1, "between 0 and 1, such as 0.001"),
            ("patience", self.patience >= 1, "at least 1"),
            ("threads", self.threads is None or self.threads >= 1, "at least 1, or leave it out"),
        ):
            if not usable:
                value = getattr(self, name)
                raise SpecError(f"{name} is {value}; choose {expected}", field=name, value=value)

    def factor(self, part: slice, strength: float) -> NDArray[np.float32] | None:
        """Give the penalty factors of some targets, (n_targets of the part, n_train), or None where all are 1."""
        if self.prior is None or strength == 0:
            return None
        return penalty_factors(np.asarray(self.prior[:, part]), strength=strength)

    def grid(self, cross: NDArray[np.float64], factor: NDArray[np.float32] | None) -> NDArray[np.float64]:
        """Space the strengths of some targets, (n_targets, n_lams)."""
        return lasso.lambda_grid(
            cross, n_lams=self.n_lams, ratio=self.lam_ratio, factor=factor, is_positive=self.is_positive
        )

    def report(self, stage: str, before: int, total: int) -> Callable[[int, int], None] | None:
        """Make a reporter for one part of a stage, which counts on from what was done before it."""
        progress = self.progress
        return None if progress is None else lambda done, _: progress(stage, before + done, total)


def _fit_split(fitting: Moments, held_out: Moments, settings: _Settings) -> Datamodels:
    return _choose_and_fit(fitting + held_out, [(fitting, held_out)], settings, grid_from=fitting, n_splits=1)


def _fit_folds(parts: Sequence[Moments], settings: _Settings) -> Datamodels:
    whole = reduce(operator.add, parts)
    splits = ((whole - part, part) for part in parts)  # one at a time: a Gram each
    return _choose_and_fit(whole, splits, settings, grid_from=whole, n_splits=len(parts))


def _choose_and_fit(
    whole: Moments,
    splits: Iterable[tuple[Moments, Moments]],
    settings: _Settings,
    *,
    grid_from: Moments,
    n_splits: int,
) -> Datamodels:
    """Choose each target's lam by its error on the held-out rows of all splits, then fit the whole at that lam."""
    _check_prior(settings.prior, *whole.cross.shape)
    return _refit(whole, _choose(splits, settings, grid_from=grid_from, n_splits=n_splits), settings)


@dataclass(frozen=True, slots=True)
class _Choice:
    """Where each target's weights are to be looked for among all rows."""

    lam: NDArray[np.float64]  # (n_targets,)
    weight: NDArray[np.float32]  # (n_targets, n_train), standardised: the fit to the rows of the last split
    validation_error: NDArray[np.float64]  # (n_targets,)
    strength: float  # of the prior


def _choose(
    splits: Iterable[tuple[Moments, Moments]], settings: _Settings, *, grid_from: Moments, n_splits: int
) -> _Choice:
    threads = settings.threads or available_threads()
    n_train, n_targets = grid_from.cross.shape
    strengths = (0.0,) if settings.prior is None else STRENGTHS
    space = Space.of(grid_from)
    lams = np.empty((len(strengths), n_targets, settings.n_lams))
    for part in _parts(n_targets):
        cross = space.cross(grid_from, part)
        for i, strength in enumerate(strengths):
            lams[i, part] = settings.grid(cross, settings.factor(part, strength))
    error, n_held_out = np.zeros(lams.shape), 0
    weights = np.empty((len(strengths), n_targets, n_train), np.float32)
    paths = itertools.count(0, n_targets)
    for fitting, held_out in splits:
        space = Space.of(fitting)
        gram, gram_out = space.gram(fitting, threads=threads), space.gram(held_out, threads=threads)
        for i, strength in enumerate(strengths):
            done = next(paths)
            for part in _parts(n_targets):
                path = lasso.solve_paths(
                    gram,
                    space.cross(fitting, part),
                    lams[i, part],
                    holdout=lasso.Holdout(gram_out, space.cross(held_out, part), space.square(held_out, part)),
                    factor=settings.factor(part, strength),
                    is_positive=settings.is_positive,
                    tol=settings.tol,
                    patience=settings.patience,
                    least_rise=_LEAST_RISE / held_out.n**0.5,
                    max_sweeps=_MAX_SWEEPS,
                    threads=threads,
                    progress=settings.report("paths", done + part.start, n_splits * len(strengths) * n_targets),
                )
                weights[i, part] = path.weight
                error[i, part] += held_out.n * path.error
        n_held_out += held_out.n
        del gram, gram_out
    # a point that some split's path did not reach is nan, and the first is reached by all
    of_strengths = np.nanmin(error, axis=2) / n_held_out
    chosen = _best_strength(of_strengths)
    return _Choice(
        lam=lams[chosen, np.arange(n_targets), np.nanargmin(error[chosen], axis=1)],
        weight=weights[chosen].copy(),
        validation_error=of_strengths[chosen],
        strength=strengths[chosen],
    )


def _refit(whole: Moments, choice: _Choice, settings: _Settings) -> Datamodels:
    threads = settings.threads or available_threads()
    n_targets = whole.cross.shape[1]
    lam, weight = choice.lam, choice.weight
    space = Space.of(whole)
    gram = space.gram(whole, threads=threads)
    gap, kkt, converged = np.zeros(n_targets), np.zeros(n_targets), np.zeros(n_targets, np.bool_)
    for part in _parts(n_targets):
        cross, factor = space.cross(whole, part), settings.factor(part, choice.strength)
        # a target without a path, which nothing pulled over the fitting rows, is silenced over all rows too
        lam[part] = np.where(lam[part] > 0, lam[part], settings.grid(cross, factor)[:, 0])
        solution = lasso.solve(
            gram,
            cross,
            space.square(whole, part),
            lam[part],
            start=weight[part],
            factor=factor,
            is_positive=settings.is_positive,
            tol=settings.tol,
            max_sweeps=_MAX_SWEEPS,
            threads=threads,
            progress=settings.report("refit", part.start, n_targets),
        )
        weight[part], converged[part] = solution.weight, solution.converged
        gap[part], kkt[part] = solution.gap, solution.kkt
    if not converged.all():
        _tell_unconverged(np.flatnonzero(~converged), gap, settings)
    of_masks, bias = space.raw(weight)
    return Datamodels(
        weight=of_masks,
        bias=bias,
        lam=lam.astype(np.float32),
        certificate=Certificate(gap=gap, kkt=kkt),
        validation_error=choice.validation_error,
        prior_strength=None if settings.prior is None else choice.strength,
    )


def _best_strength(errors: NDArray[np.float64]) -> int:
    """Choose the strength whose validation errors, (n_strengths, n_targets), are least on average, as shares of none's.

    One strength serves all targets: for each by itself the validation rows would be too few to choose well.
    """
    known = errors[0] > 0
    shares = errors[:, known] / errors[0, known]
    return int(shares.mean(axis=1).argmin()) if known.any() else 0


def _check_prior(prior: NDArray[Any] | None, n_train: int, n_targets: int) -> None:
    if prior is not None:
        check_prior(prior, n_train=n_train, n_targets=n_targets)


def _tell_unconverged(targets: NDArray[np.intp], gap: NDArray[np.float64], settings: _Settings) -> None:
    shown = ", ".join(map(str, targets[:5])) + (", ..." if len(targets) > 5 else "")
    told = (
        f"{len(targets):,} of {len(gap):,} targets did not reach tol {settings.tol} in {_MAX_SWEEPS:,} sweeps ({shown})"
        f"; their duality gap is at most {gap[targets].max():.1e} of the variance: choose a larger tol or lam_ratio"
    )
    if settings.strict:
        raise ConvergenceError(told, targets=targets.tolist(), gap=float(gap[targets].max()))
    warnings.warn(told, RuntimeWarning, stacklevel=6)


def _parts(n_targets: int) -> list[slice]:
    """Cut the targets into parts, whose covariances are formed at a time."""
    return [slice(i, min(i + _TARGETS_AT_ONCE, n_targets)) for i in range(0, n_targets, _TARGETS_AT_ONCE)]


def _ends_of_parts(n_models: int, *, validation: float, folds: int | None) -> list[int]:
    """Say at which row each part ends: what is fitted and what is held out, or the folds."""
    if folds is None:
        return [split_rows(n_models, validation), n_models]
    if folds < 2 or n_models < 2 * folds:
        raise SpecError(
            f"{n_models} models cannot be cut into {folds} folds; choose at least 2, of at least 2 models each",
            n_models=n_models,
            folds=folds,
        )
    return [n_models * (k + 1) // folds for k in range(folds)]
