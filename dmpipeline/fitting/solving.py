"""The work of a fit from second moments: choose each target's lam on rows held out, then fit all rows at that lam.

With a prior this is done with each trust in it, and the result is a mixture of them all, whose weights are chosen on
the rows held out too. Targets are solved in blocks, through `dmpipeline.fitting.blocks`: what a directory keeps of them
is not solved again.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from dmpipeline.fitting.guides.mixing import Agreement, best_mixture
from dmpipeline.fitting.guides.priors import (
    TRUSTS,
    Trust,
    check_prior,
    combined_weights,
    expected_weights,
    penalty_factors,
    standardised_scores,
)
from dmpipeline.fitting.limits import LinearLimit
from dmpipeline.fitting.pairs.estimation import Blind
from dmpipeline.fitting.settings import FitSettings, StageProgress
from dmpipeline.fitting.solvers import lasso
from dmpipeline.fitting.spaces import Space, parts_of
from dmpipeline.moments.moments import Moments
from dmpipeline.moments.tensors import page_out


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

    def split(self, fitting: Moments, held_out: Moments) -> "Fitted":
        """Choose lam on the rows of `held_out`, then fit the rows of both."""
        fitting.checked_sum(held_out)
        return self._chosen_and_fitted(
            lambda: fitting.plus(held_out, zeros=self.place.zeros), [(fitting, held_out)], grid_from=fitting, n_splits=1
        )

    def folds(self, parts: Sequence[Moments]) -> "Fitted":
        """Hold out each set of rows in turn to choose lam, then fit all."""
        whole = reduce(lambda left, right: left.plus(right, zeros=self.place.zeros), parts)
        splits = ((whole.minus(part, zeros=self.place.zeros), part) for part in parts)  # one at a time: a Gram each
        return self._chosen_and_fitted(lambda: whole, splits, grid_from=whole, n_splits=len(parts))

    def _chosen_and_fitted(
        self,
        add_up: Callable[[], Moments],
        splits: Iterable[tuple[Moments, Moments]],
        *,
        grid_from: Moments,
        n_splits: int,
    ) -> "Fitted":
        n_train, n_targets = grid_from.cross.shape
        if self.prior is not None:
            check_prior(self.prior, n_train=n_train, n_targets=n_targets)
        choice = _choose(self, splits, grid_from=grid_from, n_splits=n_splits)
        whole = add_up()  # not before the paths are solved: with their Gram matrices that would be one more
        solutions = _refit(self, whole, choice)
        return Fitted(_datamodels(self, whole, choice, solutions), partial(_blind, self, choice))

    @property
    def trusts(self) -> Sequence[Trust]:
        """How far the prior may be trusted; a weight that may not be negative is not shrunk towards one."""
        if self.prior is None:
            return TRUSTS[:1]
        return [trust for trust in TRUSTS if not (trust.in_values and self.settings.is_positive)]

    def guidance(self, part: slice, space: Space) -> dict[str, NDArray[Any]]:
        """Return what is known of some targets before: the prior's scores, as of raw masks and as of scaled ones."""
        if self.prior is None:
            return {}
        prior = np.asarray(self.prior[:, part])
        return {
            "prior": np.ascontiguousarray(prior, np.float32),
            "scores": standardised_scores(prior, space.inverse_scale),
        }

    def grid(self, cross: NDArray[np.float64], factor: NDArray[np.float32] | None) -> NDArray[np.float64]:
        """Space the strengths of some targets, (n_targets, n_lams)."""
        return lasso.lambda_grid(cross, factor=factor, **self.settings.of_grid())

    def gram(self, space: Space, moments: Moments) -> NDArray[np.floating[Any]]:
        """Return the rows' Gram matrix in these coordinates, (n_train, n_train), mapped from a file if it is large."""
        return space.gram(moments, threads=self.settings.n_threads, zeros=self.place.zeros)

    def grams(self, name: str, space: Space, moments: Mapping[str, Moments]) -> Arrays:
        """Return Gram matrices in these coordinates by name, (n_train, n_train), and keep them as `name`."""

        def fill(arrays: Mapping[str, NDArray[Any]]) -> None:
            for of_array, array in arrays.items():
                own = moments[of_array]
                space.gram(own, threads=self.settings.n_threads, zeros=lambda _, __, array=array: array)
                if self.place.directory is not None and not isinstance(own.gram, np.memmap):
                    page_out(own.gram)  # of a file that was read, not one that is written still

        shape = (len(space.mean), len(space.mean))
        return self.place.kept_filled(name, dict.fromkeys(moments, (shape, np.float32)), fill)

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
class Fitted:
    """What a fit comes to, and what it was before it had seen the rows held out last.

    Attributes
    ----------
    datamodels : Datamodels
    blind : callable
        Returns the datamodels at the chosen strengths of the other rows alone.
    """

    datamodels: Datamodels
    blind: Callable[[], Blind]


@dataclass(frozen=True, slots=True)
class _Choice:
    """Where each target's weights are to be looked for among all rows, with each trust, and what is made of them."""

    lam: NDArray[np.float64]  # (n_trusts, n_targets)
    start: dict[int, NDArray[np.float32]]  # by first target of a part: (n_trusts, ...), standardised, of the last split
    validation_error: NDArray[np.float64]  # (n_targets,)
    mixture: NDArray[np.float64]  # (n_fits,), of the trusts and then of what is expected of the weights
    last: Moments  # the rows fitted on in the last split

    @property
    def share_of_prior(self) -> float:
        return 1 - float(self.mixture[0] / self.mixture.sum())


def _choose(fit: Fit, splits: Iterable[tuple[Moments, Moments]], *, grid_from: Moments, n_splits: int) -> _Choice:
    """Choose each target's lam with each trust, and one mixture for all, by the errors on all held-out rows."""
    n_targets, lams = grid_from.cross.shape[1], _grids(fit, grid_from)
    error, best, n_held_out, starts, agreements = np.zeros(lams.shape), [], 0, {}, []
    for nth, (fitting, held_out) in enumerate(splits):
        paths = _solve_split(fit, fitting, held_out, lams, nth=nth, n_splits=n_splits)
        best.append(np.zeros(lams.shape[:2], np.intp))
        for part in fit.parts(n_targets):
            path = paths[_paths_name(nth, part)]
            starts[part.start] = path["weight"]
            best[-1][:, part] = np.nanargmin(path["error"], axis=2)
            error[:, part] += held_out.n * _carried_on(path["error"])
        n_held_out += held_out.n
        if fit.prior is not None:
            of_parts = [paths[_paths_name(nth, part)] for part in fit.parts(n_targets)]
            of_split = {name: np.concatenate([path[name] for path in of_parts]) for name in _AGREEMENT}
            agreements.append({name: held_out.n * moments for name, moments in of_split.items()})
    error /= n_held_out
    middle: NDArray[np.intp] = np.rint(np.median(np.stack(best), axis=0)).astype(np.intp)
    points = _points(middle, varies=error[:, :, 0] > 0)
    validation_error, mixture = np.take_along_axis(error[0], points[0][:, None], axis=1)[:, 0], np.ones(1)
    if agreements:
        agreement = Agreement(
            **{name: np.sum([of_split[name] for of_split in agreements], axis=0) / n_held_out for name in _AGREEMENT}
        )
        mixture = best_mixture(agreement, n_held_out, is_of_all=n_splits > 1)
        if mixture[1:].any():
            validation_error = agreement.error(mixture)
    lam = np.take_along_axis(lams, points[:, :, None], axis=2)[:, :, 0]
    return _Choice(lam=lam, start=starts, validation_error=validation_error, mixture=mixture, last=fitting)


def _carried_on(error: NDArray[np.float64]) -> NDArray[np.float64]:
    """Fill the errors of points that a path has not reached, nan, with that of the last it has; the first is."""
    last = error.shape[-1] - 1 - np.isfinite(error)[..., ::-1].argmax(axis=-1)
    reached = np.minimum(np.arange(error.shape[-1]), last[..., None])
    return np.take_along_axis(error, reached, axis=-1)


_LEAST_LEFT = 1e-3


def _points(best: NDArray[np.intp], *, varies: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Choose points of paths, (n_trusts, n_targets), by those of least error: guided ones halfway to their mean.

    Validation rows are few, and guided paths of many targets are best at about the same point. On digits, wine and
    breast_cancer with 250 models LDS is 0.005 to 0.007 higher than by each target's own errors, and with 1,000 of
    digits 0.003 higher.
    """
    points = best.copy()
    for of_trust, moving in zip(points[1:], varies[1:], strict=True):
        if moving.any():
            of_trust[moving] = np.round((of_trust[moving] + of_trust[moving].mean()) / 2).astype(np.intp)
    return points


def _solve_split(
    fit: Fit, fitting: Moments, held_out: Moments, lams: NDArray[np.float64], *, nth: int, n_splits: int
) -> dict[str, Arrays]:
    """Solve the paths of all targets with each trust, on one split of the rows."""
    space, trusts, n_targets = Space.of(fitting), fit.trusts, fitting.cross.shape[1]

    def grams() -> Arrays:
        return fit.grams(f"grams-{nth}", space, {"gram": fitting, "gram_out": held_out})

    def problem(part: slice) -> Arrays:
        moments: dict[str, NDArray[Any]] = {
            "cross": space.cross(fitting, part),
            "square": space.square(fitting, part),
            "lams": lams[:, part],
            "cross_out": space.cross(held_out, part),
            "square_out": space.square(held_out, part),
        }
        return moments | fit.guidance(part, space)

    blocks = {_paths_name(nth, part): _block(part, partial(problem, part), trusts) for part in fit.parts(n_targets)}
    how = fit.solver() | fit.settings.of_paths(held_out.n)
    n_paths = len(trusts) * n_targets
    report = fit.report("paths", n_splits * n_paths, before=nth * n_paths)
    solve = partial(_solve_paths, how, trusts, fitting.n)
    paths = solved_blocks(fit.place, solve, (f"grams-{nth}", grams), blocks, report)
    fit.place.forget(f"grams-{nth}")
    return paths


def _paths_name(nth: int, part: slice) -> str:
    return f"paths-{nth}-{part.start}"


def _grids(fit: Fit, moments: Moments) -> NDArray[np.float64]:
    """Space the strengths of all targets, (n_trusts, n_targets, n_lams).

    A grid starts where all weights are as expected, which is far lower than where they are zero.
    """
    n_targets, space = moments.cross.shape[1], Space.of(moments)
    gram = fit.gram(space, moments) if any(trust.in_values for trust in fit.trusts) else None
    lams = np.empty((len(fit.trusts), n_targets, fit.settings.n_lams))
    for part in fit.parts(n_targets):
        problem: dict[str, NDArray[Any]] = {"cross": space.cross(moments, part), "square": space.square(moments, part)}
        of_part = _Guided(problem | fit.guidance(part, space), gram, moments.n)
        for i, trust in enumerate(fit.trusts):
            lams[i, part] = fit.grid(of_part.expected(trust).cross, of_part.factor(trust))
    # where what is expected leaves next to nothing, there is nothing to look for: a plain grid is silent all the way
    is_explained = lams[:, :, :1] < _LEAST_LEFT * lams[:1, :, :1]
    return np.where(is_explained, lams[:1], lams)


def _refit(fit: Fit, whole: Moments, choice: _Choice) -> dict[str, Arrays]:
    """Solve all targets over all rows with each trust that counts, each at its chosen lam, and mix them."""
    n_targets, trusts, space = whole.cross.shape[1], fit.trusts, Space.of(whole)

    def problem(part: slice) -> Arrays:
        moments: dict[str, NDArray[Any]] = {
            "cross": space.cross(whole, part),
            "square": space.square(whole, part),
            "lam": choice.lam[:, part],
            "start": choice.start[part.start],
        }
        return moments | fit.guidance(part, space)

    counting = [trust for trust, share in zip(trusts, choice.mixture, strict=False) if share > 0]
    solve = partial(_solve, fit.solver(), trusts, whole.n, fit.settings.of_grid(), choice.mixture)
    blocks = {f"refit-{part.start}": _block(part, partial(problem, part), counting) for part in fit.parts(n_targets)}
    report = fit.report("refit", len(counting) * n_targets)
    shared = ("gram", lambda: fit.grams("gram", space, {"gram": whole}))
    return solved_blocks(fit.place, solve, shared, blocks, report)


def _blind(fit: Fit, choice: _Choice) -> Blind:
    """Return the fit to the last split's rows alone, as its paths left it."""
    last, trusts = choice.last, fit.trusts
    space, n_targets, is_in_values = Space.of(last), len(choice.validation_error), any(t.in_values for t in trusts)
    weight = fit.place.zeros((len(space.mean), n_targets), np.float32)
    bias, square = np.empty(n_targets, np.float32), np.empty(n_targets)
    gram = fit.gram(space, last) if is_in_values and choice.mixture[1:].any() else None
    for part in fit.parts(n_targets):
        square[part] = space.square(last, part)
        problem: dict[str, NDArray[Any]] = {"cross": space.cross(last, part), "square": square[part]}
        guided = _Guided(problem | fit.guidance(part, space), gram, last.n)
        mixed = guided.mixed(trusts, list(choice.start[part.start]), choice.mixture)
        weight[:, part], bias[part] = space.raw(mixed, part)
    deviation = np.sqrt(np.where(space.varies, square, 0))
    return Blind(weight, bias, space.mean, deviation, last.n)


def _datamodels(fit: Fit, whole: Moments, choice: _Choice, solutions: dict[str, Arrays]) -> Datamodels:
    space = Space.of(whole)
    n_train, n_targets = len(space.mean), len(choice.validation_error)
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
        prior_strength=None if fit.prior is None else choice.share_of_prior,
        limit=LinearLimit.of(whole, space, fit.parts(n_targets)),
    )


def _solver(how: dict[str, Any]) -> ModuleType:
    """Choose the solver of a torch device, where one is named; importing it loads torch."""
    if "device" not in how:
        return lasso
    with explain_missing_extra():
        from dmpipeline.fitting.solvers import proximal

    return proximal


@dataclass(frozen=True, slots=True)
class _Expected:
    """What the prior leads to expect of some targets' weights, and what it leaves of `cross` to solve for."""

    weight: NDArray[np.float32] | None  # (n_targets, n_train); none is zero
    cross: NDArray[np.float64]  # (n_targets, n_train)

    def left_over(self, square: NDArray[np.float64], cross: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the mean square of what is left of targets, whose own moments these are."""
        return square if self.weight is None else _left_over(square, self.weight, cross - self.cross, cross)


class _Guided:
    """What a prior says of some targets' problem; what is expected of the weights is found once."""

    def __init__(self, problem: Arrays, gram: NDArray[Any] | None, n_models: int) -> None:
        self.problem, self.gram, self.n_models = problem, gram, n_models
        self._found: dict[bool, _Expected] = {}

    def factor(self, trust: Trust) -> NDArray[np.float32] | None:
        """Return penalty factors, (n_targets, n_train)."""
        return penalty_factors(self.problem["prior"], strength=trust.strength) if trust.strength else None

    def expected(self, trust: Trust) -> _Expected:
        """Return the weights to shrink towards."""
        cross = self.problem["cross"]
        if not trust.in_values or self.gram is None:
            return _Expected(None, cross)
        if trust.of_others not in self._found:
            scores, square = self.problem["scores"], self.problem["square"]
            if trust.of_others:
                weight, pull = combined_weights(scores, self.gram, cross, square, self.n_models)
            else:
                weight, pull = expected_weights(scores, self.gram, cross)
            self._found[trust.of_others] = _Expected(weight, cross - pull)
        return self._found[trust.of_others]

    def all_expected(self, trusts: Sequence[Trust]) -> list[NDArray[np.float32]]:
        """Return the weights that any of the trusts shrinks towards: fits of their own, which join a mixture last."""
        weights = (self.expected(trust).weight for trust in trusts)
        return [weight for weight in weights if weight is not None]

    def mixed(
        self, trusts: Sequence[Trust], solved: Sequence[NDArray[np.float32] | None], mixture: NDArray[np.float64]
    ) -> NDArray[np.float32]:
        """Mix what was solved for with each trust, None where it does not count, and what is expected."""
        weight = np.zeros(self.problem["cross"].shape, np.float32)
        for trust, of_trust, share in zip(trusts, solved, mixture, strict=False):
            if share and of_trust is not None:
                expected = self.expected(trust).weight
                weight += np.float32(share) * (of_trust if expected is None else expected + of_trust)
        if mixture[len(trusts) :].any():
            for share, expected in zip(mixture[len(trusts) :], self.all_expected(trusts), strict=True):
                weight += np.float32(share) * expected
        return weight


def _solve_paths(
    how: dict[str, Any],
    trusts: Sequence[Trust],
    n_models: int,
    shared: Arrays,
    problem: Arrays,
    progress: Callable[[int], None],
) -> Arrays:
    gram, gram_out = shared["gram"], shared["gram_out"]
    guided, n_targets = _Guided(problem, gram, n_models), len(problem["cross"])
    weights, errors = [], []
    for i, trust in enumerate(trusts):
        expected = guided.expected(trust)
        cross_out, square_out = problem["cross_out"], problem["square_out"]
        if expected.weight is not None:
            # the weights' deviation from what is expected is solved for, and its error is that of the weights
            pull_out = (expected.weight @ gram_out).astype(np.float64)
            square_out = _left_over(square_out, expected.weight, pull_out, cross_out)
            cross_out = cross_out - pull_out
        path = _solver(how).solve_paths(
            gram,
            expected.cross,
            problem["lams"][i],
            holdout=lasso.Holdout(gram_out, cross_out, square_out),
            factor=guided.factor(trust),
            progress=lambda done, _, before=i * n_targets: progress(before + done),
            **how,
        )
        weights.append(path.weight)
        errors.append(path.error)
    results: dict[str, NDArray[Any]] = {"weight": np.stack(weights), "error": np.stack(errors)}
    if "prior" not in problem:
        return results
    for i, trust in enumerate(trusts):
        if (weight := guided.expected(trust).weight) is not None:
            weights[i] = weights[i] + weight
    fits = [*weights, *guided.all_expected(trusts)]
    agreement = Agreement.of(fits, gram_out, problem["cross_out"], problem["square_out"], problem["square"])
    return results | {name: getattr(agreement, name) for name in _AGREEMENT}


def _solve(
    how: dict[str, Any],
    trusts: Sequence[Trust],
    n_models: int,
    grid: dict[str, Any],
    mixture: NDArray[np.float64],
    shared: Arrays,
    problem: Arrays,
    progress: Callable[[int], None],
) -> Arrays:
    guided, n_targets, lams = _Guided(problem, shared["gram"], n_models), len(problem["cross"]), {}
    solutions: list[lasso.Solution | None] = []
    done_before = 0
    for i, trust in enumerate(trusts):
        if not mixture[i]:
            solutions.append(None)
            continue
        expected, factor, lam = guided.expected(trust), guided.factor(trust), problem["lam"][i]
        # a target without a path, which nothing pulled over the fitting rows, is silenced over all rows too
        lams[i] = np.where(lam > 0, lam, lasso.lambda_grid(expected.cross, factor=factor, **grid)[:, 0])
        solution = _solver(how).solve(
            shared["gram"],
            expected.cross,
            expected.left_over(problem["square"], problem["cross"]),
            lams[i],
            start=problem["start"][i],
            factor=factor,
            progress=lambda done, _, before=done_before: progress(before + done),
            **how,
        )
        done_before += n_targets
        solutions.append(solution)
    weight = guided.mixed(trusts, [None if found is None else found.weight for found in solutions], mixture)
    return _worst([found for found in solutions if found], lams, mixture, n_targets) | {"weight": weight}


def _worst(
    solutions: Sequence[lasso.Solution], lams: dict[int, NDArray[np.float64]], mixture: NDArray[np.float64], n: int
) -> dict[str, NDArray[Any]]:
    """Certify a mixture by the worst of its fits, for each target; lam is that of the fit that counts most.

    A mixture of scores alone has nothing to certify.
    """
    if not solutions:
        return {"gap": np.zeros(n), "kkt": np.zeros(n), "converged": np.ones(n, np.bool_), "lam": np.zeros(n)}
    return {
        "gap": np.max([solution.gap for solution in solutions], axis=0),
        "kkt": np.max([solution.kkt for solution in solutions], axis=0),
        "converged": np.all([solution.converged for solution in solutions], axis=0),
        "lam": lams[max(lams, key=lambda i: float(mixture[i]))],
    }


_AGREEMENT = ("among", "with_truth", "square", "square_fitted")


def _left_over(
    square: NDArray[np.float64], weight: NDArray[Any], pull: NDArray[np.float64], cross: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean square of y - Xw, from y'y, w, X'Xw and X'y, all but w divided by n."""
    left: NDArray[np.float64] = np.maximum(square + np.einsum("tj,tj->t", weight, pull - 2 * cross), 0)
    return left


def _block(part: slice, make: Callable[[], Arrays], trusts: Sequence[Trust]) -> TargetBlock:
    return TargetBlock(len(trusts) * (part.stop - part.start), make)


def _report_unconverged(targets: NDArray[np.intp], gap: NDArray[np.float64], settings: FitSettings) -> None:
    shown = ", ".join(map(str, targets[:5])) + (", ..." if len(targets) > 5 else "")
    message = (
        f"{len(targets):,} of {len(gap):,} targets did not reach tol {settings.tol} in {settings.max_sweeps:,} sweeps "
        f"({shown}); their duality gap is at most {gap[targets].max():.1e} of the variance: choose a larger tol or "
        "lam_ratio"
    )
    if settings.strict:
        raise ConvergenceError(message, targets=targets.tolist(), gap=float(gap[targets].max()))
    warnings.warn(message, RuntimeWarning, stacklevel=7)
