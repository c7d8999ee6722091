# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# compiled kernels take their types from what they are called with

"""Compiled kernels of the solver: coordinate descent for one target over a Gram matrix G that all targets share.

Features that may carry weight are active. They are kept in the order they joined, with their part of G packed side by
side, so that a step of descent touches little memory. All other features' gradients follow from the net change of the
weights, and that is what costs: a row of G for every active feature. So a path is solved a stretch of four grid points
at a time over the active features alone; then each row is fetched once for the whole stretch, every feature's
optimality condition is checked at every point, and the points are accepted up to the first where one is broken.

Weights and gradients are of G's precision, float32 or float64; certificates are computed in float64.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dmpipeline.compute import kernel


class Target(NamedTuple):
    """What is solved for one target: 1/2 w'Gw - c'w + lam sum_j f_j |w_j|."""

    gram: NDArray[Any]  # G, (n_features, n_features)
    cross: NDArray[np.float64]  # c, (n_features,)
    factor: NDArray[Any]  # f, (n_features,), of G's dtype
    is_positive: bool  # whether weights are held to be positive or zero


class HeldOut(NamedTuple):
    """Second moments of the rows held out, of one target."""

    gram: NDArray[Any]  # (n_features, n_features), of G's dtype
    cross: NDArray[np.float64]  # (n_features,)
    square: float


class Stop(NamedTuple):
    """When a path ends; see `lasso.solve_paths`."""

    patience: int
    least_rise: float


class Room(NamedTuple):
    """Work space that a thread keeps from one target to the next: the active features' parts of two Gram matrices."""

    packed: NDArray[Any]
    packed_out: NDArray[Any]


_FORESIGHT = 0.3
"""How early a feature joins: this share of the way down a stretch below the strength at its end.

The strong rule (Tibshirani et al., 2012) has 1. Random masks are nearly orthogonal, so gradients drift less than it
allows for, and each feature that joins for nothing costs a row; where less was needed, a point is solved once more.
"""

_LEAST_STEP = 0.1
"""A step that removes less than this share of the tolerance is not taken, unless it silences a feature."""

_PANEL_COLUMNS = 2048
_CHECKED_AT_ONCE = 256


@kernel
def follow_path(target, lams, held_out, stop, tol, max_sweeps, weight, error, room):
    """Go down one target's grid; leave the weights of least held-out error in `weight`, each point's error in `error`.

    Returns
    -------
    best, n_solved
        Index of the point kept, and how many points were solved.
    room
        Perhaps grown, to be handed in again with the next target.
    """
    gram, cross, factor, is_positive = target
    packed, packed_out = room
    n_features = len(cross)
    gradient, w = cross.astype(gram.dtype), np.zeros(n_features, gram.dtype)
    gradient_before, w_before = gradient.copy(), w.copy()  # at the point before
    idle = _idle_factor(gram, factor)
    active, n_active, n_packed = np.zeros(n_features + 3, np.int32), 0, 0
    gradients = np.empty((4, n_features), gram.dtype)
    weight[:] = 0
    error[0] = held_out.square  # of a target that nothing pulls, which has no path
    lowest, best, worse, is_over = np.inf, 0, 0, lams[0] <= 0
    step = 0
    while step < len(lams) and not is_over:
        n_points = min(4, len(lams) - step, max(stop.patience - worse, 1))
        end = lams[step + n_points - 1]
        early = max(end - _FORESIGHT * (lams[max(step - 1, 0)] - end), 0)
        n_active = _join(gradient, idle, early, active, n_active, is_positive)
        packed = _with_room(packed, n_packed, n_active)
        packed_out = _with_room(packed_out, n_packed, n_active)
        _pack(packed, gram, active, n_packed, n_active)
        _pack_lower(packed_out, held_out.gram, active, n_packed, n_active)
        n_packed = n_active
        v, g, own_factor = (
            _pick(w, active, n_active),
            _pick(gradient, active, n_active),
            _pick(factor, active, n_active),
        )
        v_before, g_before = _pick(w_before, active, n_active), _pick(gradient_before, active, n_active)
        start = v.copy()
        steps = np.zeros((4, (n_active + 3) // 4 * 4), gram.dtype)
        for q in range(n_points):
            k = step + q
            if k > 1:
                ahead = gram.dtype.type((lams[k] - lams[k - 1]) / (lams[k - 1] - lams[k - 2]))
                _extrapolate(ahead, v, v_before)
                _extrapolate(ahead, g, g_before)
            _solve_active(packed, lams[k], own_factor, tol, max_sweeps, is_positive, v, g)
            steps[q, :n_active] = v - start
            error[k] = _held_out_error(v, active, packed_out, held_out.cross, held_out.square)
            gradients[q] = gradient
        _subtract_four(gram, active, steps, gradients)
        n_good = 0
        while n_good < n_points and n_active == n_packed:
            lam = lams[step + n_good]
            n_active = _join(gradients[n_good], idle, lam + tol * lam, active, n_active, is_positive)
            n_good += n_active == n_packed
        n_accepted = 0
        while n_accepted < n_good and not is_over:
            if error[step] < lowest:
                lowest, best, worse = error[step], step, 0
                for a in range(n_packed):
                    weight[active[a]] = start[a] + steps[n_accepted, a]
            elif error[step] > lowest:  # where nothing moves yet, nothing is worse
                worse += 1
                is_over = worse >= stop.patience and error[step] > (1 + stop.least_rise) * lowest
            n_accepted += 1
            step += 1
        for q in range(max(n_accepted - 2, 0), n_accepted):
            gradient_before[:], w_before[:] = gradient, w
            gradient[:] = gradients[q]
            for a in range(n_packed):
                w[active[a]] = start[a] + steps[q, a]
    error[max(step, 1) :] = np.nan
    return best, step, Room(packed, packed_out)


@kernel
def solve_at(target, lam, tol, max_sweeps, weight, packed):
    """Move one target's weights to the solution at `lam`, and return whether it was reached.

    A feature that cannot move and a target that nothing pulls get zeros.

    Returns
    -------
    is_optimal
    packed
        Work space, perhaps grown.
    """
    gram, cross, factor, is_positive = target
    n_features = len(cross)
    if lam <= 0:
        weight[:] = 0
        return True, packed
    idle = _idle_factor(gram, factor)
    active, n_active, n_packed = np.empty(n_features, np.int32), 0, 0
    for j in range(n_features):
        if idle[j] == np.inf:
            weight[j] = 0
        elif weight[j] != 0:
            idle[j] = np.inf
            active[n_active] = j
            n_active += 1
    gradient = exact_gradient(gram, cross, weight).astype(gram.dtype)
    n_active = _join(gradient, idle, lam + tol * lam, active, n_active, is_positive)
    while True:
        packed = _with_room(packed, n_packed, n_active)
        _pack(packed, gram, active, n_packed, n_active)
        n_packed = n_active
        start = _pick(weight, active, n_active)
        v, g, own_factor = start.copy(), _pick(gradient, active, n_active), _pick(factor, active, n_active)
        is_optimal = _solve_active(packed, lam, own_factor, tol, max_sweeps, is_positive, v, g)
        _subtract_one(gram, active, v - start, gradient)
        for a in range(n_active):
            weight[active[a]] = v[a]
        n_active = _join(gradient, idle, lam + tol * lam, active, n_active, is_positive)
        if n_active == n_packed or not is_optimal:
            return is_optimal, packed


@kernel
def certify_one(target, square, lam, weight):
    """Duality gap over the variance, and worst violation over lam, of one target; see `lasso.certify`."""
    if square <= 0 or lam <= 0:
        return 0.0, 0.0
    gram, cross, factor, is_positive = target
    gradient = exact_gradient(gram, cross, weight)
    scale, worst, norm, w_cross, w_gradient = 1.0, 0.0, 0.0, 0.0, 0.0
    for j in range(len(weight)):
        value, slope, strength = np.float64(weight[j]), gradient[j], lam * np.float64(factor[j])
        worst = max(worst, _violation(value, slope, strength, is_positive))
        pull = slope if is_positive else abs(slope)
        if pull > strength:
            scale = min(scale, strength / pull)
        norm += strength * abs(value)
        w_cross += value * cross[j]
        w_gradient += value * slope
    residual = square - w_cross - w_gradient
    gap = residual / 2 + norm - scale * (square - w_cross) + scale * scale * residual / 2
    return max(gap, 0.0) / square, worst / lam


@kernel
def exact_gradient(gram, cross, weight):
    """Compute c - Gw of one target in float64."""
    feature = np.flatnonzero(weight).astype(np.int32)
    gradient = cross.copy()
    _subtract_one(gram, feature, _pick(weight, feature, len(feature)).astype(np.float64), gradient)
    return gradient


@kernel
def _subtract_four(gram, feature, steps, gradients):
    """Take G @ step off each of four gradients, (4, n_features), with `steps` (4, n) given at the first n features.

    Four rows of G and four gradients are in hand at a time, so that a number fetched serves four. What is missing to
    make n a multiple of four must be there as zero steps of any feature.
    """
    for left in range(0, gradients.shape[1], _PANEL_COLUMNS):
        right = left + _PANEL_COLUMNS
        g0, g1 = gradients[0, left:right], gradients[1, left:right]
        g2, g3 = gradients[2, left:right], gradients[3, left:right]
        for k in range(0, steps.shape[1], 4):
            row_a, row_b = gram[feature[k], left:right], gram[feature[k + 1], left:right]
            row_c, row_d = gram[feature[k + 2], left:right], gram[feature[k + 3], left:right]
            a0, b0, c0, d0 = steps[0, k], steps[0, k + 1], steps[0, k + 2], steps[0, k + 3]
            a1, b1, c1, d1 = steps[1, k], steps[1, k + 1], steps[1, k + 2], steps[1, k + 3]
            a2, b2, c2, d2 = steps[2, k], steps[2, k + 1], steps[2, k + 2], steps[2, k + 3]
            a3, b3, c3, d3 = steps[3, k], steps[3, k + 1], steps[3, k + 2], steps[3, k + 3]
            for i in range(len(g0)):
                a, b, c, d = row_a[i], row_b[i], row_c[i], row_d[i]
                g0[i] -= (a0 * a + b0 * b) + (c0 * c + d0 * d)
                g1[i] -= (a1 * a + b1 * b) + (c1 * c + d1 * d)
                g2[i] -= (a2 * a + b2 * b) + (c2 * c + d2 * d)
                g3[i] -= (a3 * a + b3 * b) + (c3 * c + d3 * d)


@kernel
def _subtract_one(gram, feature, step, gradient):
    """Take G @ step off a gradient, (n_features,), with `step` (n,) given at the first n features."""
    n = len(step)
    for left in range(0, len(gradient), _PANEL_COLUMNS):
        g = gradient[left : left + _PANEL_COLUMNS]
        for k in range(0, n - 3, 4):
            row_a, row_b, row_c, row_d = (
                gram[feature[k]],
                gram[feature[k + 1]],
                gram[feature[k + 2]],
                gram[feature[k + 3]],
            )
            a, b, c, d = step[k], step[k + 1], step[k + 2], step[k + 3]
            row_a, row_b, row_c, row_d = row_a[left:], row_b[left:], row_c[left:], row_d[left:]
            for i in range(len(g)):
                g[i] -= (a * row_a[i] + b * row_b[i]) + (c * row_c[i] + d * row_d[i])
        for k in range(n // 4 * 4, n):
            row_a = gram[feature[k]][left:]
            for i in range(len(g)):
                g[i] -= step[k] * row_a[i]


@kernel
def _extrapolate(ahead, values, before):
    """Continue the line from `before` to `values`, which become `before`; a path is straight between two kinks."""
    for a in range(len(values)):
        here = values[a]
        values[a] += ahead * (here - before[a])
        before[a] = here


@kernel
def _solve_active(packed, lam, factor, tol, max_sweeps, is_positive, v, g):
    """Minimise over the active features, moving `v` and `g`; return whether all their conditions hold."""
    zero, small = v.dtype.type(0), v.dtype.type(tol * lam)
    least = v.dtype.type(_LEAST_STEP * tol * lam)
    strength = v.dtype.type(lam) * factor
    for _ in range(max_sweeps):
        worst = zero
        for a in range(len(v)):
            row = packed[a]
            curvature = row[a]
            u = g[a] + curvature * v[a]
            if u > strength[a]:
                new = (u - strength[a]) / curvature
            elif u < -strength[a] and not is_positive:
                new = (u + strength[a]) / curvature
            else:
                new = zero
            delta = new - v[a]
            if delta != 0 and (new == 0 or curvature * abs(delta) > least):
                v[a] = new
                worst = max(worst, curvature * abs(delta))
                for b in range(len(v)):
                    g[b] -= delta * row[b]
        if worst <= small:  # the last steps of the sweep moved the gradients of those before them
            for a in range(len(v)):
                worst = max(worst, _violation(v[a], g[a], strength[a], is_positive))
            if worst <= small:
                return True
    return len(v) == 0


@kernel
def _violation(weight, slope, strength, is_positive):
    """Return how far a feature is from its optimality condition, in the units of its gradient; below 0 inside it."""
    if weight > 0:
        return abs(slope - strength)
    if weight < 0:
        return abs(slope + strength)
    return (slope if is_positive else abs(slope)) - strength


@kernel
def _idle_factor(gram, factor):
    """Copy the penalty factors, with infinity for the features that cannot move; those that join get it too."""
    idle = np.empty(len(factor), gram.dtype)
    for j in range(len(factor)):
        idle[j] = factor[j] if gram[j, j] > 0 else np.inf
    return idle


@kernel
def _join(gradient, idle, lam, active, n_active, is_positive):
    """Append to `active` all idle features whose gradient exceeds `lam` times their factor; return how many are active.

    Counting first, over a stretch, needs no branches and is many times faster than asking each feature.
    """
    threshold = gradient.dtype.type(lam)
    for left in range(0, len(gradient), _CHECKED_AT_ONCE):
        g, f = gradient[left : left + _CHECKED_AT_ONCE], idle[left : left + _CHECKED_AT_ONCE]
        n_over = 0
        if is_positive:
            for i in range(len(g)):
                n_over += g[i] > threshold * f[i]
        else:
            for i in range(len(g)):
                n_over += abs(g[i]) > threshold * f[i]
        if n_over > 0:
            for i in range(len(g)):
                if (g[i] if is_positive else abs(g[i])) > threshold * f[i]:
                    f[i] = np.inf
                    active[n_active] = left + i
                    n_active += 1
    return n_active


@kernel
def _pick(values, active, n_active):
    own = np.empty(n_active, values.dtype)
    for a in range(n_active):
        own[a] = values[active[a]]
    return own


@kernel
def _with_room(packed, n_packed, n_active):
    """Return `packed`, or a larger copy if `n_active` features do not fit."""
    if n_active <= len(packed):
        return packed
    size = (n_active + n_active // 2 + 15) // 16 * 16  # rows begin where vectors may
    larger = np.empty((size, size), packed.dtype)
    for a in range(n_packed):
        for b in range(n_packed):
            larger[a, b] = packed[a, b]
    return larger


@kernel
def _pack(packed, gram, active, n_before, n):
    """Copy the part of G of the features that joined after `n_before`; a row is read once, for G is symmetric."""
    _pack_lower(packed, gram, active, n_before, n)
    for b in range(n):
        for a in range(max(b, n_before), n):
            packed[b, a] = packed[a, b]


@kernel
def _pack_lower(packed, gram, active, n_before, n):
    for a in range(n_before, n):
        row = gram[active[a]]
        for b in range(a + 1):
            packed[a, b] = row[active[b]]


@kernel
def _held_out_error(v, active, packed_out, cross_out, square_out):
    """Mean squared error as a quadratic form, q - 2 w'c + w'Gw of the held-out rows; the lower half of G suffices."""
    error = square_out
    for a in range(len(v)):
        if v[a] != 0:
            inner = v.dtype.type(0)
            row = packed_out[a]
            for b in range(a):
                inner += row[b] * v[b]
            value = np.float64(v[a])
            error += value * (2 * np.float64(inner) + np.float64(row[a]) * value - 2 * cross_out[active[a]])
    return error
