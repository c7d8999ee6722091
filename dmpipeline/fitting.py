"""Fitting: from masks and outputs, or their second moments, to datamodels.

Masks and outputs are taken in any form that gives rows, and are read once. The strength of the penalty is chosen for
each target on rows held out, and the fit is then repeated on all rows at that strength. Every fit comes with a
certificate of how near its optimum is.

Nothing is read before the shapes and settings are known to be usable.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmpipeline import lasso, proximal
from dmpipeline.arrays import RowSliceable, check_shapes
from dmpipeline.checkpoints import Arrays, Block, Checkpoints
from dmpipeline.compute import available_threads
from dmpipeline.datamodels import Certificate, Datamodels
from dmpipeline.errors import ConvergenceError, SpecError
from dmpipeline.moments import BLOCK_ROWS, Moments
from dmpipeline.overlaps import Possible, warn_of_held_out_rows
from dmpipeline.priors import (
    TRUSTS,
    Trust,
    check_prior,
    expected_weights,
    penalty_factors,
    standardised_scores,
)
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
    device: str | None = None,
    directory: str | os.PathLike[str] | None = None,
    scheduler: str | None = None,
    progress: Progress | None = None,
) -> Datamodels:
    """Fit a sparse linear datamodel to every target.

    Parameters
    ----------
    masks : bool or 0/1, shape (n_models, n_train)
        Which examples each model was trained on: an array of any kind that `dmpipeline.arrays` takes, as a LazyArray,
        Zarr or dask array, a sparse one, a torch tensor or a DataFrame.
    outputs : real, shape (n_models, n_targets)
        What each model said about each target, say a float16 margin.
    validation : float
        Share of the rows, the last ones, on which lam is chosen. Not used with `folds`.
    folds : int, optional
        Choose lam by so many-fold cross-validation instead: each of so many runs of rows is held out in turn, and the
        lam of least mean error taken. It takes that many times as long.
    prior : array of float, shape (n_train, n_targets), optional
        Scores that say which examples are likely to matter for a target; any attribution will do. Likely ones are
        penalised less, and weights may be shrunk towards the scores, times a factor that the fitted models give each
        target, instead of towards zero (but not if `is_positive`). Which of `priors.TRUSTS` is best is chosen for all
        targets together by their validation errors. Not at all is among them: a useless prior costs time, four times
        as much, and little else.
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
    device : str, optional
        Solve with torch on this device, many targets at a time, as "cuda"; else on the processors, which is far faster
        than torch on them. The answer is the same but for what `tol` allows. The second moments are counted on the
        processors all the same.
    directory : path, optional
        Keep there what is finished, moments of rows and blocks of targets: the same fit goes on from it after it was
        killed, large arrays are mapped from it rather than held in memory, and the moments stay for later fits, with
        other settings or more models. Data are known by all of their rows, so only what changed is counted again:
        see `dmpipeline.checkpoints`.
    scheduler : str, optional
        Address of a Dask scheduler, as ``tcp://host:8786``, whose workers do the work. They must see `directory` under
        the same path. Masks and outputs should be arrays that they can open, such as LazyArrays; others are sent to
        them.
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
    DataWarning
        If a run's held-out models are among the rows, or seem to be: then subsets repeat.

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
    ranges = list(zip([0, *ends], ends, strict=False))
    settings = _Settings(prior, is_positive, n_lams, lam_ratio, tol, patience, strict, threads, device, progress)
    place = Checkpoints.at(directory, scheduler)
    with place.claimed():
        report = settings.report("moments", n_models)
        rows = place.gathered(masks, outputs, ranges, block_rows=block_rows, threads=threads, progress=report)
        parts = rows.parts
        size = sum(int(part.ones.sum(dtype=np.int64)) for part in parts) / n_models
        possible = Possible.subsets(n_train, size)
        warn_of_held_out_rows((masks, outputs), rows.mask_keys, possible, stacklevel=2)
        own = place.under("fit", settings.facts, prior, ranges, rows.digest)
        try:
            datamodels = _fit_parts(parts, settings, own) if folds else _fit_split(parts[0], parts[1], settings, own)
        except ConvergenceError:
            own.remove()
            raise
        own.remove()
    return replace(datamodels, fitted_masks=rows.mask_keys)


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
    device: str | None = None,
    progress: Progress | None = None,
) -> Datamodels:
    """Fit from second moments: choose lam on the rows of `held_out`, then fit the rows of both at that lam.

    The settings are those of `fit`. No model is read, so the time does not depend on how many there were.
    """
    settings = _Settings(prior, is_positive, n_lams, lam_ratio, tol, patience, strict, threads, device, progress)
    return _fit_split(fitting, held_out, settings, Checkpoints())


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
    device: str | None = None,
    progress: Progress | None = None,
) -> Datamodels:
    """Fit from the second moments of two or more sets of rows: hold out each in turn to choose lam, then fit all.

    The settings are those of `fit`.
    """
    if len(parts) < 2:
        raise SpecError(f"{len(parts)} sets of moments leave nothing to hold out; hand in at least 2")
    settings = _Settings(prior, is_positive, n_lams, lam_ratio, tol, patience, strict, threads, device, progress)
    return _fit_parts(parts, settings, Checkpoints())


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
    device: str | None
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
        if self.device is not None:
            proximal.check_device(self.device)

    def told(self, part: slice, trust: Trust, space: Space) -> dict[str, NDArray[np.float32]]:
        """Give what the prior says of some targets: penalty factors, and scores to shrink weights towards."""
        if self.prior is None or trust.strength == 0:
            return {}
        prior = np.asarray(self.prior[:, part])
        told = {"factor": penalty_factors(prior, strength=trust.strength)}
        return told | ({"scores": standardised_scores(prior, space.inverse_scale)} if trust.in_values else {})

    @property
    def trusts(self) -> Sequence[Trust]:
        """How far the prior may be trusted; a weight that may not be negative is not shrunk towards one."""
        if self.prior is None:
            return TRUSTS[:1]
        return [trust for trust in TRUSTS if not (trust.in_values and self.is_positive)]

    def grid(self, cross: NDArray[np.float64], factor: NDArray[np.float32] | None) -> NDArray[np.float64]:
        """Space the strengths of some targets, (n_targets, n_lams)."""
        return lasso.lambda_grid(
            cross, n_lams=self.n_lams, ratio=self.lam_ratio, factor=factor, is_positive=self.is_positive
        )

    @property
    def facts(self) -> tuple[object, ...]:
        """What results depend on, but for the prior."""
        return (self.is_positive, self.n_lams, self.lam_ratio, self.tol, self.patience, _MAX_SWEEPS, _LEAST_RISE)

    def solver(self, place: Checkpoints) -> dict[str, Any]:
        """Give the arguments of the solver that are the same for all blocks of targets."""
        threads = 1 if place.scheduler else self.threads or available_threads()
        where = {"threads": threads} if self.device is None else {"device": self.device}
        return {"is_positive": self.is_positive, "tol": self.tol, "max_sweeps": _MAX_SWEEPS} | where

    def report(self, stage: str, total: int, before: int = 0) -> Callable[[int], None]:
        """Make a reporter for a part of a stage, which counts on from what was done before it."""
        progress = self.progress
        return (lambda _: None) if progress is None else lambda done: progress(stage, before + done, total)


def _fit_split(fitting: Moments, held_out: Moments, settings: _Settings, place: Checkpoints) -> Datamodels:
    whole = fitting.plus(held_out, zeros=place.zeros)
    return _choose_and_fit(whole, [(fitting, held_out)], settings, place, grid_from=fitting, n_splits=1)


def _fit_parts(parts: Sequence[Moments], settings: _Settings, place: Checkpoints) -> Datamodels:
    whole = reduce(lambda left, right: left.plus(right, zeros=place.zeros), parts)
    splits = ((whole.minus(part, zeros=place.zeros), part) for part in parts)  # one at a time: a Gram each
    return _choose_and_fit(whole, splits, settings, place, grid_from=whole, n_splits=len(parts))


def _choose_and_fit(
    whole: Moments,
    splits: Iterable[tuple[Moments, Moments]],
    settings: _Settings,
    place: Checkpoints,
    *,
    grid_from: Moments,
    n_splits: int,
) -> Datamodels:
    """Choose each target's lam by its error on the held-out rows of all splits, then fit the whole at that lam."""
    _check_prior(settings.prior, *whole.cross.shape)
    choice = _choose(splits, settings, place, grid_from=grid_from, n_splits=n_splits)
    return _refit(whole, choice, settings, place)


@dataclass(frozen=True, slots=True)
class _Choice:
    """Where each target's weights are to be looked for among all rows."""

    lam: NDArray[np.float64]  # (n_targets,)
    start: dict[int, NDArray[np.float32]]  # by first target of a part: standardised, of the last split
    validation_error: NDArray[np.float64]  # (n_targets,)
    trust: Trust  # in the prior


def _choose(
    splits: Iterable[tuple[Moments, Moments]],
    settings: _Settings,
    place: Checkpoints,
    *,
    grid_from: Moments,
    n_splits: int,
) -> _Choice:
    threads = settings.threads or available_threads()
    n_targets = grid_from.cross.shape[1]
    trusts = settings.trusts
    tried = [(i, part) for i in range(len(trusts)) for part in _parts(n_targets)]
    lams = _grids(grid_from, settings, place)
    error, n_held_out, starts = np.zeros(lams.shape), 0, {}
    for nth, (fitting, held_out) in enumerate(splits):
        space = Space.of(fitting)

        def grams(space: Space = space, fitting: Moments = fitting, held_out: Moments = held_out) -> Arrays:
            gram, gram_out = (space.gram(rows, threads=threads, zeros=place.zeros) for rows in (fitting, held_out))
            return {"gram": gram, "gram_out": gram_out}

        def problem(
            i: int, part: slice, space: Space = space, fitting: Moments = fitting, held_out: Moments = held_out
        ) -> Arrays:
            return {
                "cross": space.cross(fitting, part),
                "lams": lams[i, part],
                "cross_out": space.cross(held_out, part),
                "square_out": space.square(held_out, part),
            } | settings.told(part, trusts[i], space)

        how = settings.solver(place) | {"patience": settings.patience, "least_rise": _LEAST_RISE / held_out.n**0.5}
        paths = place.solved(
            partial(_solve_paths, how),
            (f"grams-{nth}", grams),
            {f"paths-{nth}-{i}-{part.start}": _block(part, partial(problem, i, part)) for i, part in tried},
            settings.report("paths", n_splits * len(trusts) * n_targets, nth * len(trusts) * n_targets),
        )
        for i, part in tried:
            path = paths[f"paths-{nth}-{i}-{part.start}"]
            starts[i, part.start] = path["weight"]
            error[i, part] += held_out.n * path["error"]
        n_held_out += held_out.n
    # a point that some split's path did not reach is nan, and the first is reached by all
    of_trusts = np.nanmin(error, axis=2) / n_held_out
    chosen = _most_fitting(of_trusts)
    return _Choice(
        lam=lams[chosen, np.arange(n_targets), np.nanargmin(error[chosen], axis=1)],
        start={first: weight for (i, first), weight in starts.items() if i == chosen},
        validation_error=of_trusts[chosen],
        trust=trusts[chosen],
    )


def _grids(moments: Moments, settings: _Settings, place: Checkpoints) -> NDArray[np.float64]:
    """Space the strengths of all targets, (n_trusts, n_targets, n_lams).

    A grid starts where all weights are as expected, which is far lower than where they are zero.
    """
    n_targets, space, gram = moments.cross.shape[1], Space.of(moments), None
    lams = np.empty((len(settings.trusts), n_targets, settings.n_lams))
    for part in _parts(n_targets):
        plain = space.cross(moments, part)
        for i, trust in enumerate(settings.trusts):
            told, cross = settings.told(part, trust, space), plain
            if "scores" in told:
                if gram is None:
                    gram = space.gram(moments, threads=settings.threads or available_threads(), zeros=place.zeros)
                cross = plain - expected_weights(told["scores"], gram, plain)[1]
            lams[i, part] = settings.grid(cross, told.get("factor"))
    return lams


def _refit(whole: Moments, choice: _Choice, settings: _Settings, place: Checkpoints) -> Datamodels:
    threads = settings.threads or available_threads()
    n_train, n_targets = whole.cross.shape
    lam, space = choice.lam, Space.of(whole)

    def problem(part: slice) -> Arrays:
        told = settings.told(part, choice.trust, space)
        cross = space.cross(whole, part)
        # a target without a path, which nothing pulled over the fitting rows, is silenced over all rows too
        lam[part] = np.where(lam[part] > 0, lam[part], settings.grid(cross, told.get("factor"))[:, 0])
        problem = {"cross": cross, "square": space.square(whole, part), "lam": lam[part]}
        return problem | {"start": choice.start[part.start]} | told

    solutions = place.solved(
        partial(_solve, settings.solver(place)),
        ("gram", lambda: {"gram": space.gram(whole, threads=threads, zeros=place.zeros)}),
        {f"refit-{part.start}": _block(part, partial(problem, part)) for part in _parts(n_targets)},
        settings.report("refit", n_targets),
    )
    weight, bias = place.zeros((n_train, n_targets), np.float32), np.empty(n_targets, np.float32)
    for part in _parts(n_targets):
        weight[:, part], bias[part] = space.raw(solutions[f"refit-{part.start}"]["weight"], part)
    lam, gap, kkt, converged = (
        np.concatenate([solution[name] for solution in solutions.values()])
        for name in ("lam", "gap", "kkt", "converged")
    )
    if not converged.all():
        _tell_unconverged(np.flatnonzero(~converged), gap, settings)
    return Datamodels(
        weight=weight,
        bias=bias,
        lam=lam.astype(np.float32),
        certificate=Certificate(gap=gap, kkt=kkt),
        validation_error=choice.validation_error,
        prior_strength=None if settings.prior is None else choice.trust.strength,
    )


def _solve_paths(how: dict[str, Any], shared: Arrays, problem: Arrays, progress: Callable[[int], None]) -> Arrays:
    cross, cross_out, square_out = problem["cross"], problem["cross_out"], problem["square_out"]
    if "scores" in problem:
        # the weights' deviation from what is expected is solved for, and its error is that of the weights
        expected, pull = expected_weights(problem["scores"], shared["gram"], cross)
        pull_out = (expected @ shared["gram_out"]).astype(np.float64)
        cross, square_out = cross - pull, _left_over(square_out, expected, pull_out, cross_out)
        cross_out = cross_out - pull_out
    path = (proximal if "device" in how else lasso).solve_paths(
        shared["gram"],
        cross,
        problem["lams"],
        holdout=lasso.Holdout(shared["gram_out"], cross_out, square_out),
        factor=problem.get("factor"),
        progress=lambda done, _: progress(done),
        **how,
    )
    return {"weight": path.weight, "error": path.error}


def _solve(how: dict[str, Any], shared: Arrays, problem: Arrays, progress: Callable[[int], None]) -> Arrays:
    cross, square, expected = problem["cross"], problem["square"], None
    if "scores" in problem:
        expected, pull = expected_weights(problem["scores"], shared["gram"], cross)
        cross, square = cross - pull, _left_over(square, expected, pull, cross)
    solution = (proximal if "device" in how else lasso).solve(
        shared["gram"],
        cross,
        square,
        problem["lam"],
        start=problem["start"],
        factor=problem.get("factor"),
        progress=lambda done, _: progress(done),
        **how,
    )
    results = {name: getattr(solution, name) for name in ("gap", "kkt", "converged")}
    weight = solution.weight if expected is None else expected + solution.weight
    return results | {"weight": weight, "lam": problem["lam"]}


def _left_over(
    square: NDArray[np.float64], weight: NDArray[Any], pull: NDArray[np.float64], cross: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean square of y - Xw, from y'y, w, X'Xw and X'y, all but w divided by n."""
    left: NDArray[np.float64] = np.maximum(square + np.einsum("tj,tj->t", weight, pull - 2 * cross), 0)
    return left


def _block(part: slice, make: Callable[[], Arrays]) -> Block:
    return Block(part.stop - part.start, make)


def _most_fitting(errors: NDArray[np.float64]) -> int:
    """Choose the trust whose validation errors, (n_trusts, n_targets), are least on average, as shares of none's.

    One trust serves all targets: for each by itself the validation rows would be too few to choose well.
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
