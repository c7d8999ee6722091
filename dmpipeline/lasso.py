# mypy: allow-untyped-defs
# compiled kernels take their types from what they are called with

"""Many LASSO problems that share one design, solved from second moments alone.

Each target t asks for the weights w that minimise

    1/2 w'Gw - c_t'w + lam_t |w|_1,

where G (n_features, n_features) is the Gram matrix of centred columns of unit variance over n rows, divided by n, and
c_t their covariances with the target. With q_t, the target's variance, that is |y - Xw|^2 / 2n + lam |w|_1 but for a
constant.

What is promised: a solution is accepted only when *all* coordinates meet their optimality conditions to the
tolerance, or the sweeps ran out; which of the two it was, the certificates say, computed afresh in float64 from the
weights handed back. A target's result depends on nothing but its own numbers: not on the number of threads, nor on
which targets are solved beside it. Columns without variance have a row of zeros in G and get weight 0; a target
without variance gets weights 0.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Holdout:
    """Second moments of rows held out, in the coordinates of the problem (centred and scaled as the fitted rows were).

    Attributes
    ----------
    gram : array of float, shape (n_features, n_features)
        X'X / n, of the dtype of the problem's.
    cross : array of float64, shape (n_targets, n_features)
        X'y / n.
    square : array of float64, shape (n_targets,)
        y'y / n.
    """

    gram: Floats
    cross: NDArray[np.float64]
    square: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Path:
    """The best point of each target's path.

    Attributes
    ----------
    weight : array of float, shape (n_targets, n_features)
    lam : array of float64, shape (n_targets,)
    error : array of float64, shape (n_targets,)
        Mean squared error on the held-out rows.
    n_solved : array of int64, shape (n_targets,)
        Grid points visited before the path was stopped.
    """

    weight: Floats
    lam: NDArray[np.float64]
    error: NDArray[np.float64]
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


def lambda_grid(cross: NDArray[np.float64], *, n_lams: int, ratio: float) -> NDArray[np.float64]:
    """Space strengths evenly in their logarithm, from the least that silences a target down to `ratio` of it.

    Parameters
    ----------
    cross : array of float64, shape (n_targets, n_features)

    Returns
    -------
    lams : array of float64, shape (n_targets, n_lams)
        Falling; the first is max |c|, at which all weights are zero.
    """
    lams: NDArray[np.float64] = np.abs(cross).max(axis=1)[:, None] * ratio ** np.linspace(0, 1, n_lams)
    return lams


def solve_paths(
    gram: Floats,
    cross: NDArray[np.float64],
    lams: NDArray[np.float64],
    *,
    holdout: Holdout,
    tol: float,
    patience: int,
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
        Falling.
    tol : float
        Largest violation of an optimality condition at which a point is accepted, as a share of its lam.
    patience : int
        The path stops when so many points in a row have not lowered the held-out error.
    max_sweeps : int
        Most passes of coordinate descent for one point.
    progress : callable or None
        Called with (targets done, targets in all).
    """
    n_targets, n_features = cross.shape
    weight = np.zeros((n_targets, n_features), gram.dtype)
    best, n_solved, error = np.zeros(n_targets, np.int64), np.zeros(n_targets, np.int64), np.zeros(n_targets)

    def one(t: int) -> None:
        best[t], n_solved[t], error[t] = _follow_path(
            gram,
            cross[t],
            lams[t],
            tol,
            max_sweeps,
            patience,
            holdout.gram,
            holdout.cross[t],
            holdout.square[t],
            weight[t],
        )

    _for_each(one, n_targets, threads=threads, progress=progress)
    return Path(weight=weight, lam=lams[np.arange(n_targets), best], error=error, n_solved=n_solved)


def solve(
    gram: Floats,
    cross: NDArray[np.float64],
    square: NDArray[np.float64],
    lam: NDArray[np.float64],
    *,
    start: Floats,
    tol: float,
    max_sweeps: int,
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> Solution:
    """Solve each target at one strength, from the weights `start`, and certify the result.

    Parameters
    ----------
    gram : array of float32 or float64, shape (n_features, n_features), C order
    cross : array of float64, shape (n_targets, n_features)
    square : array of float64, shape (n_targets,)
        The targets' variances.
    lam : array of float64, shape (n_targets,)
        Not negative; above zero wherever the target varies.
    start : array of float, shape (n_targets, n_features)
    tol, max_sweeps, threads, progress
        As for `solve_paths`.
    """
    n_targets = len(cross)
    weight = np.array(start, dtype=gram.dtype, order="C")
    gap, kkt, converged = np.zeros(n_targets), np.zeros(n_targets), np.zeros(n_targets, np.bool_)

    def one(t: int) -> None:
        converged[t] = _solve_one(gram, cross[t], lam[t], tol, max_sweeps, weight[t])
        gap[t], kkt[t] = _certify(gram, cross[t], square[t], lam[t], weight[t])

    _for_each(one, n_targets, threads=threads, progress=progress)
    return Solution(weight=weight, gap=gap, kkt=kkt, converged=converged)


def certify(
    gram: Floats, cross: NDArray[np.float64], square: NDArray[np.float64], lam: NDArray[np.float64], weight: Floats
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Measure how far given weights are from optimal, in float64: duality gap and worst KKT violation a target.

    With the gradient g = c - Gw, residual r = y - Xw and all products divided by n: r'r = q - w'c - w'g and y'r = q -
    w'c. The residual scaled by s = min(1, lam / max |g|) is feasible for the dual, whose value there is s y'r - s^2
    r'r / 2. The gap is

        r'r / 2 + lam |w|_1 - s y'r + s^2 r'r / 2,

    divided by q. The violation is |g_j - lam sign(w_j)| where w_j is not zero and max(0, |g_j| - lam) where it is,
    divided by lam. A target without variance is certified (0, 0) with weights 0.

    Parameters
    ----------
    gram : array of float, shape (n_features, n_features)
    cross, weight : arrays of float, shape (n_targets, n_features)
    square, lam : arrays of float64, shape (n_targets,)

    Returns
    -------
    gap, kkt : arrays of float64, shape (n_targets,)
    """
    pairs = [_certify(gram, cross[t], square[t], lam[t], weight[t]) for t in range(len(cross))]
    gap, kkt = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return gap, kkt


def available_threads() -> int:
    """Count the processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


# sums may be reordered and fused, the same way in every run; nothing is assumed about NaN and infinity
_compiled = njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz", "arcp"})


@_compiled
def _follow_path(gram, cross, lams, tol, max_sweeps, patience, gram_out, cross_out, square_out, weight):
    """Leave the best weights in `weight`; return the index of its lam, the points solved and its held-out error."""
    n_features = len(cross)
    w = np.zeros(n_features, gram.dtype)
    gradient = cross.astype(gram.dtype)
    active = np.empty(n_features, np.int64)
    is_active = np.zeros(n_features, np.bool_)
    n_active = 0
    sub = np.empty((min(n_features, 64), min(n_features, 64)), gram.dtype)
    sub_out = np.empty((0, 0), gram.dtype)
    n_out = 0
    best, lowest, worse, n_solved = 0, square_out, 0, 0
    if lams[0] <= 0:
        return best, n_solved, lowest
    for step in range(len(lams)):
        n_active, sub, _ = _descend(gram, lams[step], tol, max_sweeps, w, gradient, active, is_active, n_active, sub)
        sub_out = _with_room(sub_out, n_out, n_active, n_features)
        _gather(sub_out, gram_out, active, n_out, n_active)
        n_out = n_active
        error = _held_out_error(w, active, n_active, sub_out, cross_out, square_out)
        n_solved += 1
        if step == 0 or error < lowest:
            best, lowest, worse = step, error, 0
            weight[:] = w
        else:
            worse += 1
            if worse >= patience:
                break
    return best, n_solved, lowest


@_compiled
def _solve_one(gram, cross, lam, tol, max_sweeps, weight):
    """Move `weight` to the solution at `lam` and tell whether it was reached; what nothing pulls gets zeros."""
    n_features = len(cross)
    if lam <= 0:
        weight[:] = 0
        return True
    active = np.empty(n_features, np.int64)
    is_active = np.zeros(n_features, np.bool_)
    n_active = 0
    for j in range(n_features):
        if gram[j, j] <= 0:
            weight[j] = 0
        elif weight[j] != 0:
            active[n_active] = j
            is_active[j] = True
            n_active += 1
    size = min(n_features, max(64, 2 * n_active))
    sub = np.empty((size, size), gram.dtype)
    _gather(sub, gram, active, 0, n_active)
    gradient = _gradient(gram, cross, weight).astype(gram.dtype)
    _, _, is_optimal = _descend(gram, lam, tol, max_sweeps, weight, gradient, active, is_active, n_active, sub)
    return is_optimal


@_compiled
def _descend(gram, lam, tol, max_sweeps, w, gradient, active, is_active, n_active, sub):
    """Solve at one lam by coordinate descent; `w`, `gradient`, `active` and `is_active` are moved in place.

    Features once active stay so, in the order they joined, with their part of G side by side in `sub`: a step then
    touches the active features' gradients alone, and all others' are brought up to date from the net change before
    they are checked.
    """
    strength = gram.dtype.type(lam)
    small = gram.dtype.type(tol * lam)
    sweeps = 0
    while True:
        v = np.empty(n_active, w.dtype)
        g = np.empty(n_active, w.dtype)
        for a in range(n_active):
            v[a], g[a] = w[active[a]], gradient[active[a]]
        worst = small
        while worst >= small and n_active > 0 and sweeps < max_sweeps:
            worst = _sweep(sub, strength, v, g)
            sweeps += 1
        _carry_over(gram, active, v, w, gradient)
        n_before = n_active
        n_active, is_optimal = _check(strength, small, w, gradient, active, is_active, n_active)
        if n_active > n_before:
            sub = _with_room(sub, n_before, n_active, len(w))
            _gather(sub, gram, active, n_before, n_active)
        if is_optimal or sweeps >= max_sweeps:
            return n_active, sub, is_optimal


@_compiled
def _carry_over(gram, active, v, w, gradient):
    """Store the active features' new weights, and bring the whole gradient up to date."""
    for a in range(len(v)):
        j = active[a]
        delta = v[a] - w[j]
        if delta != 0:
            w[j] = v[a]
            row = gram[j]
            for i in range(len(w)):
                gradient[i] -= delta * row[i]


@_compiled
def _check(lam, small, w, gradient, active, is_active, n_active):
    """Test every feature's optimality condition; those that break theirs join the active ones."""
    is_optimal = True
    for j in range(len(w)):
        if w[j] > 0:
            violation = abs(gradient[j] - lam)
        elif w[j] < 0:
            violation = abs(gradient[j] + lam)
        else:
            violation = abs(gradient[j]) - lam
        if violation > small:
            is_optimal = False
            if not is_active[j]:
                is_active[j] = True
                active[n_active] = j
                n_active += 1
    return n_active, is_optimal


@_compiled
def _with_room(sub, n_before, n_active, n_features):
    if n_active <= len(sub):
        return sub
    size = min(n_features, 2 * n_active)
    larger = np.empty((size, size), sub.dtype)
    for a in range(n_before):
        for b in range(n_before):
            larger[a, b] = sub[a, b]
    return larger


@_compiled
def _sweep(sub, lam, v, g):
    """Minimise over each active coordinate in turn; return the largest step, which is also the worst violation met."""
    worst = lam - lam
    for a in range(len(v)):
        row = sub[a]
        curvature = row[a]
        u = g[a] + curvature * v[a]
        if u > lam:
            new = (u - lam) / curvature
        elif u < -lam:
            new = (u + lam) / curvature
        else:
            new = lam - lam
        delta = new - v[a]
        if delta != 0:
            v[a] = new
            for b in range(len(v)):
                g[b] -= delta * row[b]
            worst = max(worst, curvature * abs(delta))
    return worst


@_compiled
def _gather(sub, gram, active, n_before, n_active):
    """Copy the rows and columns of G that joined after `n_before`."""
    for a in range(n_active):
        row = gram[active[a]]
        for b in range(n_before if a < n_before else 0, n_active):
            sub[a, b] = row[active[b]]


@_compiled
def _held_out_error(w, active, n_active, sub_out, cross_out, square_out):
    """Mean squared error as a quadratic form: q - 2 w'c + w'Gw of the held-out rows."""
    v = np.empty(n_active, w.dtype)
    for a in range(n_active):
        v[a] = w[active[a]]
    error = square_out
    for a in range(n_active):
        if v[a] != 0:
            inner = w.dtype.type(0)
            row = sub_out[a]
            for b in range(n_active):
                inner += row[b] * v[b]
            error += v[a] * (np.float64(inner) - 2 * cross_out[active[a]])
    return error


@_compiled
def _gradient(gram, cross, w):
    """Compute c - Gw in float64."""
    gradient = cross.astype(np.float64)
    for j in range(len(w)):
        if w[j] != 0:
            value = np.float64(w[j])
            row = gram[j]
            for i in range(len(w)):
                gradient[i] -= value * row[i]
    return gradient


@_compiled
def _certify(gram, cross, square, lam, w):
    """Duality gap over the variance, and worst violation over lam, of one target."""
    if square <= 0 or lam <= 0:
        return 0.0, 0.0
    gradient = _gradient(gram, cross, w)
    largest, violation, norm, w_cross, w_gradient = 0.0, 0.0, 0.0, 0.0, 0.0
    for j in range(len(w)):
        value, slope = np.float64(w[j]), gradient[j]
        largest = max(largest, abs(slope))
        if value == 0:
            violation = max(violation, abs(slope) - lam)
        else:
            violation = max(violation, abs(slope - np.sign(value) * lam))
            norm += abs(value)
            w_cross += value * cross[j]
            w_gradient += value * slope
    residual = square - w_cross - w_gradient
    scale = min(1.0, lam / largest) if largest > 0 else 1.0
    gap = residual / 2 + lam * norm - scale * (square - w_cross) + scale * scale * residual / 2
    return max(gap, 0.0) / square, violation / lam
