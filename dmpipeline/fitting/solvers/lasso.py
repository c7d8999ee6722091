"""Many LASSO problems that share one design, solved from second moments alone.

Each target t asks for the weights w that minimise

    1/2 w'Gw - c_t'w + lam_t sum_j f_tj |w_j|,

where G (n_features, n_features) is the Gram matrix of centred columns of unit variance over n rows, divided by n, and
c_t their covariances with the target. With q_t, the target's variance, that is |y - Xw|^2 / 2n + lam |w|_1 but for a
constant, if all penalty factors f are 1, as they are unless given. Weights may be held to be positive or zero.

What is promised: a solution is accepted only when *all* coordinates meet their optimality conditions to the
tolerance, or the sweeps ran out; which of the two it was, the certificates say, computed afresh in float64 from the
weights handed back. A target's result depends on nothing but its own numbers: not on the number of threads, nor on
which other targets are solved. Columns without variance have a row of zeros in G and get weight 0; a target
without variance gets weights 0.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmpipeline.fitting.solvers import descent

Floats = NDArray[np.floating[Any]]

LARGE_GAP = 1e-4
"""A solution with a duality gap above this share of the variance is refined,"""
MORE_SWEEPS = 100
"""by at most this many sweeps at each finer tolerance."""


@dataclass(frozen=True, slots=True, eq=False)
class Holdout:
    """Second moments of rows held out, in the coordinates of the problem (centred and scaled as the fitted rows were).

    Attributes
    ----------
    gram : array of float, shape (n_features, n_features)
        X'X / n, of the dtype of the problem's; for `proximal` it may be a tensor.
    cross : array of float64, shape (n_targets, n_features)
        X'y / n.
    square : array of float64, shape (n_targets,)
        y'y / n.
    """

    gram: Any
    cross: NDArray[np.float64]
    square: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Path:
    """The best point of each target's path.

    Attributes
    ----------
    weight : array of float, shape (n_targets, n_features)
    lam : array of float64, shape (n_targets,)
    error : array of float64, shape (n_targets, n_lams)
        Mean squared error on the held-out rows at each grid point; nan beyond the last one solved.
    best : array of int64, shape (n_targets,)
        Index of the point of least error, the one kept.
    n_solved : array of int64, shape (n_targets,)
        Grid points visited before the path was stopped.
    """

    weight: Floats
    lam: NDArray[np.float64]
    error: NDArray[np.float64]
    best: NDArray[np.int64]
    n_solved: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """Weights at given strengths, with the proof of how good they are.

    Attributes
    ----------
    weight : array of float, shape (n_targets, n_features)
    gap : array of float64, shape (n_targets,)
        Duality gap: the objective is at most this far above its minimum, as a share of the target's variance.
    kkt : array of float64, shape (n_targets,)
        Worst violation of an optimality condition over all features, as a share of lam.
    converged : array of bool, shape (n_targets,)
        Whether all conditions were met to the tolerance, rather than the sweeps ran out.
    """

    weight: Floats
    gap: NDArray[np.float64]
    kkt: NDArray[np.float64]
    converged: NDArray[np.bool_]


def lambda_grid(
    cross: NDArray[np.float64], *, n_lams: int, ratio: float, factor: Floats | None = None, is_positive: bool = False
) -> NDArray[np.float64]:
    """Space strengths evenly in their logarithm, from the least that silences a target down to `ratio` of it.

    Parameters
    ----------
    cross : array of float64, shape (n_targets, n_features)
    factor, is_positive
        As for `solve_paths`.

    Returns
    -------
    lams : array of float64, shape (n_targets, n_lams)
        Falling; the first is max |c| / f, at which all weights are zero. None is negative.
    """
    pull = cross if is_positive else np.abs(cross)
    most = np.maximum((pull if factor is None else pull / factor).max(axis=1), 0)
    lams: NDArray[np.float64] = most[:, None] * ratio ** np.linspace(0, 1, n_lams)
    return lams


def solve_paths(
    gram: Floats,
    cross: NDArray[np.float64],
    lams: NDArray[np.float64],
    *,
    holdout: Holdout,
    factor: Floats | None = None,
    is_positive: bool = False,
    tol: float,
    patience: int,
    least_rise: float = 0.0,
    max_sweeps: int,
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> Path:
    """Follow each target's grid downwards with warm starts, and keep the point of least held-out error.

    Parameters
    ----------
    gram : array of float32 or float64, shape (n_features, n_features), C order
    cross : array of float64, shape (n_targets, n_features)
    lams : array of float64, shape (n_targets, n_lams)
        As `lambda_grid` returns: falling, and the first silences the target.
    factor : array of float, shape (n_targets, n_features) or (1, n_features), optional
        Penalty factors above zero, for each target or for all; 1 if not given.
    is_positive : bool
        Whether weights are held to be positive or zero.
    tol : float
        Largest violation of an optimality condition at which a point is accepted, as a share of its lam.
    patience : int
        The path stops when this many points in a row have not lowered the held-out error,
    least_rise : float
        and it has risen by more than this share of the lowest.
    max_sweeps : int
        Most passes of coordinate descent between two looks at all features.
    progress : callable or None
        Called with (targets done, total).

    Notes
    -----
    In addition to the result, each thread holds 8 a^2 bytes (of float32) with the most active features of a target, a.
    """
    n_targets, n_features = cross.shape
    factor = _factor_rows(factor, gram)
    weight = np.empty((n_targets, n_features), gram.dtype)
    error = np.empty(lams.shape)
    best, n_solved = np.empty(n_targets, np.int64), np.empty(n_targets, np.int64)
    own, stop = _WorkSpace(gram.dtype), descent.Stop(patience, least_rise)

    def one(t: int) -> None:
        target = descent.Target(gram, cross[t], factor[t % len(factor)], is_positive)
        held_out = descent.HeldOut(holdout.gram, holdout.cross[t], holdout.square[t])
        best[t], n_solved[t], own.room = descent.follow_path(
            target, lams[t], held_out, stop, tol, max_sweeps, weight[t], error[t], own.room
        )

    _for_each(one, n_targets, threads=threads, progress=progress)
    return Path(weight=weight, lam=lams[np.arange(n_targets), best], error=error, best=best, n_solved=n_solved)


def solve(
    gram: Floats,
    cross: NDArray[np.float64],
    square: NDArray[np.float64],
    lam: NDArray[np.float64],
    *,
    start: Floats,
    factor: Floats | None = None,
    is_positive: bool = False,
    tol: float,
    max_sweeps: int,
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> Solution:
    """Solve each target at one strength, from the weights `start`, and certify the result.

    Where the conditions hold to `tol` and the duality gap is still above 1e-4 of the variance, a finer one follows.

    Parameters
    ----------
    gram : array of float32 or float64, shape (n_features, n_features), C order
    cross : array of float64, shape (n_targets, n_features)
    square : array of float64, shape (n_targets,)
        The targets' variances.
    lam : array of float64, shape (n_targets,)
        Not negative; above zero wherever the target varies.
    start : array of float, shape (n_targets, n_features)
    factor, is_positive, tol, max_sweeps, threads, progress
        As for `solve_paths`.
    """
    n_targets = len(cross)
    factor = _factor_rows(factor, gram)
    weight = np.array(start, dtype=gram.dtype, order="C")
    gap, kkt, converged = np.zeros(n_targets), np.zeros(n_targets), np.zeros(n_targets, np.bool_)
    own = _WorkSpace(gram.dtype)

    def one(t: int) -> None:
        target = descent.Target(gram, cross[t], factor[t % len(factor)], is_positive)

        def solve_to(tol: float, n_sweeps: int) -> bool:
            is_optimal, packed = descent.solve_at(target, lam[t], tol, n_sweeps, weight[t], own.room.packed)
            own.room = own.room._replace(packed=packed)
            gap[t], kkt[t] = descent.certify_one(target, square[t], lam[t], weight[t])
            return bool(is_optimal)

        converged[t] = solve_to(tol, max_sweeps)
        finer = tol
        while converged[t] and gap[t] > LARGE_GAP and finer > tol / 100:
            finer /= 4
            solve_to(finer, min(max_sweeps, MORE_SWEEPS))

    _for_each(one, n_targets, threads=threads, progress=progress)
    return Solution(weight=weight, gap=gap, kkt=kkt, converged=converged)


def certify(
    gram: Floats,
    cross: NDArray[np.float64],
    square: NDArray[np.float64],
    lam: NDArray[np.float64],
    weight: Floats,
    *,
    factor: Floats | None = None,
    is_positive: bool = False,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Measure how far given weights are from optimal, in float64: duality gap and worst KKT violation a target.

    With the gradient g = c - Gw, residual r = y - Xw and all products divided by n: r'r = q - w'c - w'g and y'r = q -
    w'c. The residual scaled by s = min(1, lam f_j / |g_j| over all j) is feasible for the dual, whose value there is
    s y'r - s^2 r'r / 2. The gap is

        r'r / 2 + lam sum_j f_j |w_j| - s y'r + s^2 r'r / 2,

    divided by q. The violation is |g_j - lam f_j sign(w_j)| where w_j is not zero and max(0, |g_j| - lam f_j) where it
    is, divided by lam. Where weights are held to be positive, g_j stands for |g_j|. A target without variance is
    certified (0, 0) with weights 0.

    Parameters
    ----------
    gram : array of float, shape (n_features, n_features)
    cross, weight : arrays of float, shape (n_targets, n_features)
    square, lam : arrays of float64, shape (n_targets,)
    factor, is_positive
        As for `solve_paths`.

    Returns
    -------
    gap, kkt : arrays of float64, shape (n_targets,)
    """
    factor = _factor_rows(factor, gram)
    pairs = [
        descent.certify_one(
            descent.Target(gram, cross[t], factor[t % len(factor)], is_positive), square[t], lam[t], weight[t]
        )
        for t in range(len(cross))
    ]
    gap, kkt = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return gap, kkt


def _for_each(
    one: Callable[[int], None], n_targets: int, *, threads: int, progress: Callable[[int, int], None] | None
) -> None:
    """Run `one` for every target on a pool of threads.

    The kernels release the interpreter's lock. numba's own parallel loops are not used: their pools fail when two
    threads call them at once, or after a fork, and a path's length differs too much between targets for equal shares.
    """
    if n_targets == 0:
        return
    one(0)  # compiles, once
    with ThreadPoolExecutor(threads) as pool:
        try:
            for done, _ in enumerate(pool.map(one, range(1, n_targets)), start=1):
                if progress is not None:
                    progress(done, n_targets)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if progress is not None:
        progress(n_targets, n_targets)


class _WorkSpace(threading.local):
    """The room of a thread, which its targets take in turn."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.room = descent.Room(np.empty((0, 0), dtype), np.empty((0, 0), dtype))


def _factor_rows(factor: Floats | None, gram: Floats) -> Floats:
    return np.ones((1, len(gram)), gram.dtype) if factor is None else np.ascontiguousarray(factor, dtype=gram.dtype)
