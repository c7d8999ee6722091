"""The work of a fit from second moments: choose each target's lam on rows held out, then fit all rows at that lam.

Targets are solved in blocks, through `dmpipeline.fitting.blocks`: what a directory keeps of them is not solved again.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmpipeline.errors import ConvergenceError, explain_missing_extra
from dmpipeline.fitting.blocks import TargetBlock, solved_blocks
from dmpipeline.fitting.checkpoints import Arrays, Checkpoints
from dmpipeline.fitting.datamodels import Certificate, Datamodels
from dmpipeline.fitting.priors import (
    TRUSTS,
    Trust,
    check_prior,
    expected_weights,
    penalty_factors,
    standardised_scores,
)
from dmpipeline.fitting.settings import FitSettings, StageProgress
from dmpipeline.fitting.solvers import lasso
from dmpipeline.fitting.spaces import Space, parts_of
from dmpipeline.moments.moments import Moments


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """A fit under way: its settings, what guides it, where finished work is kept, and where progress is reported.

    Attributes
    ----------
    settings : FitSettings
    prior : array of float, shape (n_train, n_targets), or None
    place : Checkpoints
    progress : callable or None
    """

    settings: FitSettings
    prior: NDArray[Any] | None = None
    place: Checkpoints = field(default_factory=Checkpoints)
    progress: StageProgress | None = None

    def split(self, fitting: Moments, held_out: Moments) -> Datamodels:
        """Choose lam on the rows of `held_out`, then fit the rows of both."""
        whole = fitting.plus(held_out, zeros=self.place.zeros)
        return self._chosen_and_fitted(whole, [(fitting, held_out)], grid_from=fitting, n_splits=1)

    def folds(self, parts: Sequence[Moments]) -> Datamodels:
        """Hold out each set of rows in turn to choose lam, then fit all."""
        whole = reduce(lambda left, right: left.plus(right, zeros=self.place.zeros), parts)
        splits = ((whole.minus(part, zeros=self.place.zeros), part) for part in parts)  # one at a time: a Gram each
        return self._chosen_and_fitted(whole, splits, grid_from=whole, n_splits=len(parts))

    def _chosen_and_fitted(
        self, whole: Moments, splits: Iterable[tuple[Moments, Moments]], *, grid_from: Moments, n_splits: int
    ) -> Datamodels:
        n_train, n_targets = whole.cross.shape
        if self.prior is not None:
            check_prior(self.prior, n_train=n_train, n_targets=n_targets)
        choice = _choose(self, splits, grid_from=grid_from, n_splits=n_splits)
        solutions = _refit(self, whole, choice)
        return _datamodels(self, Space.of(whole), choice, solutions)

    @property
    def trusts(self) -> Sequence[Trust]:
        """How far the prior may be trusted; a weight that may not be negative is not shrunk towards one."""
        if self.prior is None:
            return TRUSTS[:1]
        return [trust for trust in TRUSTS if not (trust.in_values and self.settings.is_positive)]

    def guidance(self, part: slice, trust: Trust, space: Space) -> dict[str, NDArray[np.float32]]:
        """Return what the prior says of some targets: penalty factors, and scores to shrink weights towards."""
        if self.prior is None or trust.strength == 0:
            return {}
        prior = np.asarray(self.prior[:, part])
        factor = {"factor": penalty_factors(prior, strength=trust.strength)}
        return factor | ({"scores": standardised_scores(prior, space.inverse_scale)} if trust.in_values else {})

    def grid(self, cross: NDArray[np.float64], factor: NDArray[np.float32] | None) -> NDArray[np.float64]:
        """Space the strengths of some targets, (n_targets, n_lams)."""
        own = self.settings
        return lasso.lambda_grid(
            cross, n_lams=own.n_lams, ratio=own.lam_ratio, factor=factor, is_positive=own.is_positive
        )

    def gram(self, space: Space, moments: Moments) -> NDArray[np.floating[Any]]:
        """Return the rows' Gram matrix in these coordinates, (n_train, n_train), mapped from a file if it is large."""
        return space.gram(moments, threads=self.settings.n_threads, zeros=self.place.zeros)

    def parts(self, n_targets: int) -> list[slice]:
        """Cut the targets into blocks."""
        return parts_of(n_targets, self.settings.block_targets)

    def solver(self) -> dict[str, Any]:
        """Return the solver's settings; a task on a cluster has one thread."""
        return self.settings.of_solver(threads=1 if self.place.scheduler else None)

    def report(self, stage: str, total: int, before: int = 0) -> Callable[[int], None]:
        """Return a callable that reports a part of a stage, adding what was done before it."""
        progress = self.progress
        return (lambda _: None) if progress is None else lambda done: progress(stage, before + done, total)


@dataclass(frozen=True, slots=True)
class _Choice:
    """Where each target's weights are to be looked for among all rows."""

    lam: NDArray[np.float64]  # (n_targets,)
    start: dict[int, NDArray[np.float32]]  # by first target of a part: standardised, of the last split
    validation_error: NDArray[np.float64]  # (n_targets,)
    trust: Trust  # in the prior


def _choose(fit: Fit, splits: Iterable[tuple[Moments, Moments]], *, grid_from: Moments, n_splits: int) -> _Choice:
    """Choose one trust in the prior for all targets, and each target's lam, by the errors on all held-out rows."""
    trusts, n_targets = fit.trusts, grid_from.cross.shape[1]
    lams = _grids(fit, grid_from)
    error, n_held_out, starts = np.zeros(lams.shape), 0, {}
    for nth, (fitting, held_out) in enumerate(splits):
        paths = _solve_split(fit, fitting, held_out, lams, nth=nth, n_splits=n_splits)
        for i in range(len(trusts)):
            for part in fit.parts(n_targets):
                path = paths[_paths_name(nth, i, part)]
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


def _solve_split(
    fit: Fit, fitting: Moments, held_out: Moments, lams: NDArray[np.float64], *, nth: int, n_splits: int
) -> dict[str, Arrays]:
    """Solve the paths of all targets with each trust, on one split of the rows."""
    space, trusts, n_targets = Space.of(fitting), fit.trusts, fitting.cross.shape[1]

    def grams() -> Arrays:
        return {"gram": fit.gram(space, fitting), "gram_out": fit.gram(space, held_out)}

    def problem(i: int, part: slice) -> Arrays:
        return {
            "cross": space.cross(fitting, part),
            "lams": lams[i, part],
            "cross_out": space.cross(held_out, part),
            "square_out": space.square(held_out, part),
        } | fit.guidance(part, trusts[i], space)

    blocks = {
        _paths_name(nth, i, part): _block(part, partial(problem, i, part))
        for i in range(len(trusts))
        for part in fit.parts(n_targets)
    }
    how = fit.solver() | fit.settings.of_paths(held_out.n)
    n_paths = len(trusts) * n_targets
    report = fit.report("paths", n_splits * n_paths, before=nth * n_paths)
    return solved_blocks(fit.place, partial(_solve_paths, how), (f"grams-{nth}", grams), blocks, report)


def _paths_name(nth: int, trust: int, part: slice) -> str:
    return f"paths-{nth}-{trust}-{part.start}"


def _grids(fit: Fit, moments: Moments) -> NDArray[np.float64]:
    """Space the strengths of all targets, (n_trusts, n_targets, n_lams).

    A grid starts where all weights are as expected, which is far lower than where they are zero.
    """
    n_targets, space, gram = moments.cross.shape[1], Space.of(moments), None
    lams = np.empty((len(fit.trusts), n_targets, fit.settings.n_lams))
    for part in fit.parts(n_targets):
        plain = space.cross(moments, part)
        for i, trust in enumerate(fit.trusts):
            guidance, cross = fit.guidance(part, trust, space), plain
            if "scores" in guidance:
                if gram is None:
                    gram = fit.gram(space, moments)
                cross = plain - expected_weights(guidance["scores"], gram, plain)[1]
            lams[i, part] = fit.grid(cross, guidance.get("factor"))
    return lams


def _refit(fit: Fit, whole: Moments, choice: _Choice) -> dict[str, Arrays]:
    """Solve all targets over all rows, each at its chosen lam."""
    n_targets, lam, space = whole.cross.shape[1], choice.lam, Space.of(whole)

    def problem(part: slice) -> Arrays:
        guidance = fit.guidance(part, choice.trust, space)
        cross = space.cross(whole, part)
        # a target without a path, which nothing pulled over the fitting rows, is silenced over all rows too
        own_lam = np.where(lam[part] > 0, lam[part], fit.grid(cross, guidance.get("factor"))[:, 0])
        problem = {"cross": cross, "square": space.square(whole, part), "lam": own_lam}
        return problem | {"start": choice.start[part.start]} | guidance

    return solved_blocks(
        fit.place,
        partial(_solve, fit.solver()),
        ("gram", lambda: {"gram": fit.gram(space, whole)}),
        {f"refit-{part.start}": _block(part, partial(problem, part)) for part in fit.parts(n_targets)},
        fit.report("refit", n_targets),
    )


def _datamodels(fit: Fit, space: Space, choice: _Choice, solutions: dict[str, Arrays]) -> Datamodels:
    n_train, n_targets = len(space.mean), len(choice.lam)
    weight, bias = fit.place.zeros((n_train, n_targets), np.float32), np.empty(n_targets, np.float32)
    for part in fit.parts(n_targets):
        weight[:, part], bias[part] = space.raw(solutions[f"refit-{part.start}"]["weight"], part)
    lam, gap, kkt, converged = (
        np.concatenate([solution[name] for solution in solutions.values()])
        for name in ("lam", "gap", "kkt", "converged")
    )
    if not converged.all():
        _report_unconverged(np.flatnonzero(~converged), gap, fit.settings)
    return Datamodels(
        weight=weight,
        bias=bias,
        lam=lam.astype(np.float32),
        certificate=Certificate(gap=gap, kkt=kkt),
        validation_error=choice.validation_error,
        prior_strength=None if fit.prior is None else choice.trust.strength,
    )


def _solver(how: dict[str, Any]) -> ModuleType:
    """Choose the solver of a torch device, where one is named; importing it loads torch."""
    if "device" not in how:
        return lasso
    with explain_missing_extra():
        from dmpipeline.fitting.solvers import proximal

    return proximal


def _solve_paths(how: dict[str, Any], shared: Arrays, problem: Arrays, progress: Callable[[int], None]) -> Arrays:
    cross, cross_out, square_out = problem["cross"], problem["cross_out"], problem["square_out"]
    if "scores" in problem:
        # the weights' deviation from what is expected is solved for, and its error is that of the weights
        expected, pull = expected_weights(problem["scores"], shared["gram"], cross)
        pull_out = (expected @ shared["gram_out"]).astype(np.float64)
        cross, square_out = cross - pull, _left_over(square_out, expected, pull_out, cross_out)
        cross_out = cross_out - pull_out
    path = _solver(how).solve_paths(
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
    solution = _solver(how).solve(
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


def _block(part: slice, make: Callable[[], Arrays]) -> TargetBlock:
    return TargetBlock(part.stop - part.start, make)


def _most_fitting(errors: NDArray[np.float64]) -> int:
    """Choose the trust whose validation errors, (n_trusts, n_targets), are least on average, as shares of none's.

    One trust serves all targets: for each by itself the validation rows would be too few to choose well.
    """
    known = errors[0] > 0
    shares = errors[:, known] / errors[0, known]
    return int(shares.mean(axis=1).argmin()) if known.any() else 0


def _report_unconverged(targets: NDArray[np.intp], gap: NDArray[np.float64], settings: FitSettings) -> None:
    shown = ", ".join(map(str, targets[:5])) + (", ..." if len(targets) > 5 else "")
    message = (
        f"{len(targets):,} of {len(gap):,} targets did not reach tol {settings.tol} in {settings.max_sweeps:,} sweeps "
        f"({shown}); their duality gap is at most {gap[targets].max():.1e} of the variance: choose a larger tol or "
        "lam_ratio"
    )
    if settings.strict:
        raise ConvergenceError(message, targets=targets.tolist(), gap=float(gap[targets].max()))
    warnings.warn(message, RuntimeWarning, stacklevel=6)
