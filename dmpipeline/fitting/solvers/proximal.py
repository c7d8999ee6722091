"""The problems of `lasso`, solved for many targets together on any torch device: a GPU, or a CPU.

The method is accelerated proximal gradient (FISTA: Beck and Teboulle, 2009) whose momentum is dropped when it points
uphill (the gradient scheme of O'Donoghue and Candès, 2015). All targets take their steps together, each with its own
strength, momentum and end; those that have arrived wait and are taken out of the products when they are many.

A point of a path is solved over the features that carry weight or may come to (the strong rule: Tibshirani et al.,
2012), with each target's part of G packed side by side; then one product with all of G checks every other feature, and
targets for which one breaks its condition go again with it. Targets with so many active features that packing saves
nothing take their steps over all of G. Where steps turn out to be many, G being ill-conditioned, runs of conjugate
gradients over the weights that are not zero come in between; each is a product, too, and they save most of the steps.

Promises and conventions are those of `lasso`, but for rounding: which targets are solved together decides the order of
sums, and the last digits may differ. The device must have float64. TensorFloat-32, whose 10 bits of mantissa are too
few for gradients, is kept out: torch does not use it for products by default (precision "highest"), and where the
process has allowed it, it is disallowed while a solver runs.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dmpipeline.errors import SpecError
from dmpipeline.fitting.solvers import lasso


@dataclass(frozen=True, slots=True)
class Tuning:
    """What decides how fast targets are solved and how much memory it takes, and not what the solution is.

    Attributes
    ----------
    packed_share, always_packed : int
        A target is packed if its active features are at most one in `packed_share` of all, or at most `always_packed`:
        a product with a packed part of G fetches a number for each multiplication, so each takes longer than where
        targets share what is fetched.
    packed_bytes : int
        Of packed parts of G at a time, unless one target's part is larger.
    block_bytes : int
        Of G in float64, for certificates.
    largest_eigenvalue : float, optional
        An estimate of G's; by the power method if not given. If it is too low, more steps are taken.
    """

    packed_share: int = 4
    always_packed: int = 256
    packed_bytes: int = 2**30
    block_bytes: int = 2**28
    largest_eigenvalue: float | None = None


_MARGIN = 1.05
"""By how much the largest eigenvalue may be underestimated."""

_FIRST_TURN = 16
"""Targets that have not arrived after this many steps take as many by conjugate gradients, and so again later."""


def check_device(device: str) -> None:
    """Refuse a device that torch does not know or have."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise SpecError(
            f"device {device} cannot be used ({reason}); choose one such as cuda or cuda:1, or leave it out to solve "
            "on the processors",
            field="device",
            value=device,
        ) from error


def solve_paths(
    gram: lasso.Floats | Tensor,
    cross: NDArray[np.float64],
    lams: NDArray[np.float64],
    *,
    holdout: lasso.Holdout,
    factor: lasso.Floats | None = None,
    is_positive: bool = False,
    tol: float,
    patience: int,
    least_rise: float = 0.0,
    max_sweeps: int,
    device: str | torch.device,
    progress: Callable[[int, int], None] | None,
    tuning: Tuning | None = None,
) -> lasso.Path:
    """Follow each target's grid downwards with warm starts, and keep the point of least held-out error.

    Parameters
    ----------
    gram : array or tensor of float32 or float64, shape (n_features, n_features)
        As a tensor on the device, it is used where it is; so is `holdout.gram`.
    max_sweeps : int
        Most steps at one point of the grid between two looks at all features, each a product with G or a packed part;
        they are worth less than sweeps. A point at which they ran out is taken as it is.
    device : str or torch.device
        Such as "cpu", "cuda" or "cuda:1".
    progress : callable or None
        Called with (targets done, total) when some more are done. They go down their grids side by side, so
        most are done towards the end.
    tuning : Tuning, optional
    cross, lams, holdout, factor, is_positive, tol, patience, least_rise
        As for `lasso.solve_paths`.

    Notes
    -----
    The device holds G and the held-out rows' G and, in addition, at most 21 times (n_targets, n_features) floats of G's
    dtype, or 42 times while many targets take their steps over all of G (measured, of float32), and 2 GiB of packed
    parts of G, or a single one if that is larger. G is never copied.
    """
    n_targets, n_lams = lams.shape
    error, lowest = np.full(lams.shape, np.nan), np.full(n_targets, np.inf)
    best, n_solved, worse = (np.zeros(n_targets, np.int64) for _ in range(3))
    error[:, :1] = holdout.square[:, None]  # of a target that nothing pulls, which has no path
    live = np.flatnonzero(lams[:, 0] > 0)
    with _full_precision():
        problem = _Problem(gram, factor, is_positive=is_positive, device=device, tuning=tuning or Tuning())
        gram_out = problem.tensor(holdout.gram)
        cross_out, square_out = problem.tensor(holdout.cross[live], torch.float64), holdout.square[live]
        c, f = problem.tensor(cross[live]), problem.factor_of(live)
        kept = problem.tensor(np.zeros(cross.shape))
        w, g = torch.zeros_like(c), c
        w_before = w  # at the point before
        for k in range(n_lams):
            if len(live) == 0:
                break
            lam, before, start = lams[live, k], lams[live, max(k - 1, 0)], w
            if k > 1:  # a path is straight between two kinks
                ahead = (lam - before) / (before - lams[live, k - 2])
                start = w + problem.tensor(ahead)[:, None] * (w - w_before)
            w_before = w
            w, g, _ = problem.solve_at(c, g, f, lam, start, early=2 * lam - before, tol=tol, max_steps=max_sweeps)
            inner = (w @ gram_out).double()
            now = square_out + (w.double() * (inner - 2 * cross_out)).sum(1).cpu().numpy()
            error[live, k], n_solved[live] = now, k + 1
            lower, higher = now < lowest[live], now > lowest[live]  # where nothing moves yet, nothing is worse
            lowest[live[lower]], best[live[lower]] = now[lower], k
            kept[problem.index(live[lower])] = w[problem.index(lower)]
            worse[live] = np.where(lower, 0, worse[live] + higher)
            is_over = higher & (worse[live] >= patience) & (now > (1 + least_rise) * lowest[live])
            if is_over.any() and k + 1 < n_lams:
                live, square_out, stay = live[~is_over], square_out[~is_over], problem.index(~is_over)
                c, g, w, w_before, cross_out = c[stay], g[stay], w[stay], w_before[stay], cross_out[stay]
                f = problem.factor_of(live)
                if progress is not None and len(live) > 0:
                    progress(n_targets - len(live), n_targets)
        weight = kept.cpu().numpy()
    if progress is not None and n_targets > 0:
        progress(n_targets, n_targets)
    return lasso.Path(weight=weight, lam=lams[np.arange(n_targets), best], error=error, best=best, n_solved=n_solved)


def solve(
    gram: lasso.Floats | Tensor,
    cross: NDArray[np.float64],
    square: NDArray[np.float64],
    lam: NDArray[np.float64],
    *,
    start: lasso.Floats,
    factor: lasso.Floats | None = None,
    is_positive: bool = False,
    tol: float,
    max_sweeps: int,
    device: str | torch.device,
    progress: Callable[[int, int], None] | None,
    tuning: Tuning | None = None,
) -> lasso.Solution:
    """Solve each target at one strength, from the weights `start`, and certify the result.

    Where the conditions hold to `tol` and the duality gap is still above 1e-4 of the variance, a finer one follows.

    Parameters
    ----------
    gram, max_sweeps, device, progress, tuning
        As for `solve_paths`; all targets but those refined are done at once.
    cross, square, lam, start, factor, is_positive, tol
        As for `lasso.solve`.

    Notes
    -----
    The device holds what it does for `solve_paths`, with one G. The certificates are computed there in float64, for
    which G is converted 256 MiB at a time.
    """
    n_targets = len(cross)
    gap, kkt, converged = np.zeros(n_targets), np.zeros(n_targets), np.ones(n_targets, np.bool_)
    with _full_precision():
        problem = _Problem(gram, factor, is_positive=is_positive, device=device, tuning=tuning or Tuning())
        weight = problem.tensor(np.zeros(cross.shape))
        finer, rows, max_steps = tol, np.flatnonzero(lam > 0), max_sweeps
        weight[problem.index(rows)] = problem.tensor(start[rows])
        while len(rows) > 0:
            c, f, w = problem.tensor(cross[rows]), problem.factor_of(rows), weight[problem.index(rows)]
            w, _, met = problem.solve_at(c, None, f, lam[rows], w, early=lam[rows], tol=finer, max_steps=max_steps)
            new_gap, new_kkt = problem.certify(cross[rows], square[rows], lam[rows], f, w)
            if finer == tol:
                converged[rows] = met
            is_better = (finer == tol) | (new_gap < gap[rows]) & (new_kkt <= np.maximum(kkt[rows], tol))
            better = rows[is_better]
            weight[problem.index(better)] = w[problem.index(is_better)]
            gap[better], kkt[better] = new_gap[is_better], new_kkt[is_better]
            rows = rows[converged[rows] & (gap[rows] > lasso.LARGE_GAP)] if finer > tol / 100 else rows[:0]
            if progress is not None and len(rows) > 0:
                progress(n_targets - len(rows), n_targets)
            finer, max_steps = finer / 4, min(max_sweeps, lasso.MORE_SWEEPS)
        found = weight.cpu().numpy()
    if progress is not None and n_targets > 0:
        progress(n_targets, n_targets)
    return lasso.Solution(weight=found, gap=gap, kkt=kkt, converged=converged)


class _Problem:
    """What the targets share: G, the penalty factors and the size of a step."""

    def __init__(
        self,
        gram: lasso.Floats | Tensor,
        factor: lasso.Floats | None,
        *,
        is_positive: bool,
        device: str | torch.device,
        tuning: Tuning,
    ) -> None:
        self.tuning = tuning
        self.device, self.is_positive = torch.device(device), is_positive
        self.gram = (gram if isinstance(gram, Tensor) else _from_numpy(gram)).to(self.device)
        self.can_move = self.gram.diagonal() > 0
        self.factor = np.ones((1, len(gram))) if factor is None else factor
        self.bound = max(float(rows.abs().sum(1).amax()) for rows in self._blocks()) or 1.0  # no eigenvalue is larger
        largest = _largest_eigenvalue(self.gram) if tuning.largest_eigenvalue is None else tuning.largest_eigenvalue
        self.curvature = min(_MARGIN * largest, self.bound) or 1.0

    def tensor(self, array: lasso.Floats | Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Put an array on the device, in G's dtype unless another is given."""
        tensor = array if isinstance(array, Tensor) else _from_numpy(array)
        return tensor.to(self.device, dtype or self.gram.dtype)

    def index(self, array: NDArray[np.integer[Any] | np.bool_]) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def factor_of(self, targets: NDArray[np.intp]) -> Tensor:
        """Return the penalty factors of some targets, (n, n_features) or (1, n_features)."""
        return self.tensor(self.factor if len(self.factor) == 1 else self.factor[targets])

    def solve_at(
        self, c: Tensor, g: Tensor | None, factor: Tensor, lam: NDArray[np.float64], start: Tensor, *,
        early: NDArray[np.float64], tol: float, max_steps: int,
    ) -> tuple[Tensor, Tensor, NDArray[np.bool_]]:  # fmt: skip
        """Find the targets' weights at `lam`, each feature checked; return which targets meet all conditions.

        Features whose gradient `g`, of weights near by, is above `early` times their factor are active from the start.

        Returns
        -------
        w, g : tensors, shape (n_targets, n_features)
            `g` is c - Gw.
        is_optimal : array of bool, shape (n_targets,)
        """
        w = torch.where(self.can_move, start, 0)
        strength = torch.where(self.can_move, self.tensor(lam)[:, None] * factor, torch.inf)
        small = self.tensor(tol * lam)[:, None]
        g = c - w @ self.gram if g is None else g.clone()
        active = (w != 0) | (self._pull(g) > self.tensor(np.maximum(early / lam, 0))[:, None] * strength)
        is_optimal = torch.ones(len(c), dtype=torch.bool, device=self.device)
        waiting = torch.arange(len(c), device=self.device)
        while len(waiting) > 0:
            for rows, width in self._groups(active, waiting):
                if width < c.shape[1]:  # there is room for the next most likely, too
                    near = (self._pull(g[rows]) / strength[rows]).masked_fill(active[rows], torch.inf)
                    features = near.topk(width).indices.sort().values
                    own = self.gram[features[:, :, None], features[:, None, :]]
                else:
                    features, own = torch.arange(width, device=self.device), self.gram
                at = rows[:, None], features
                active[at] = True
                w[at], is_optimal[rows] = self._descend(own, c[at], w[at], strength[at], small[rows], max_steps)
            g[waiting] = c[waiting] - w[waiting] @ self.gram
            joining = (self._pull(g[waiting]) > (1 + tol) * strength[waiting]) & ~active[waiting]
            active[waiting] |= joining
            # a target that ran out of steps stays unsolved, whatever else would join
            waiting = waiting[joining.any(1) & is_optimal[waiting]]
        return w, g, is_optimal.cpu().numpy()

    def certify(
        self, cross: NDArray[np.float64], square: NDArray[np.float64], lam: NDArray[np.float64],
        factor: Tensor, weight: Tensor,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:  # fmt: skip
        """Certify weights as `lasso.certify` does, with G converted a block at a time."""
        c, w = self.tensor(cross, torch.float64), weight.double()
        gradient = c - torch.cat([w @ rows.double().T for rows in self._blocks()], 1)
        of_target = (self.tensor(np.where(square > 0, square, 1), torch.float64), self.tensor(lam, torch.float64))
        pair = _certificate(w, c, gradient, *of_target, factor.double(), is_positive=self.is_positive)
        gap, kkt = (np.where(square > 0, values.cpu().numpy(), 0) for values in pair)
        return gap, kkt

    def _pull(self, gradient: Tensor) -> Tensor:
        return gradient if self.is_positive else gradient.abs()

    def _blocks(self) -> Iterator[Tensor]:
        """Cut G into blocks of rows that take bounded memory in float64."""
        yield from torch.split(self.gram, max(self.tuning.block_bytes // (8 * len(self.gram)), 1))

    def _groups(self, active: Tensor, waiting: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Put targets together that need the same room, a number of features: all where the whole of G is to be used.

        It depends on a target's own active features alone. Targets without any are in no group.
        """
        n_features, tuning = active.shape[1], self.tuning
        waiting = waiting[active[waiting].any(1)]
        most_packed = max(n_features // tuning.packed_share, tuning.always_packed)
        counts, order = torch.sort(active[waiting].sum(1))

        def room(n_active: int) -> int:
            width: int = 1 << (n_active - 1).bit_length()
            return min(width, n_features) if width <= most_packed else n_features

        start = 0
        for width, same in itertools.groupby(counts.tolist(), room):
            n_most = (
                len(counts) if width == n_features else tuning.packed_bytes // (width**2 * self.gram.element_size())
            )
            rows = waiting[order[start : start + len(list(same))]]
            yield from ((part, width) for part in torch.split(rows, max(n_most, 1)))
            start += len(rows)

    def _descend(
        self, gram: Tensor, c: Tensor, w: Tensor, strength: Tensor, small: Tensor, max_steps: int
    ) -> tuple[Tensor, Tensor]:
        """Minimise from `w` with G that all targets share, (n, n), or each has its own of, (n_targets, n, n).

        A step along which the objective curves more than was thought is not taken, and the target's steps are made
        shorter, down to where none can fail: so no target diverges, even if the largest eigenvalue was underestimated.

        Returns
        -------
        found : tensor, shape (n_targets, n)
        is_optimal : tensor of bool, shape (n_targets,)
            Whether all conditions hold to `small`, (n_targets, 1), rather than `max_steps` were taken.
        """
        found, is_optimal = w.clone(), torch.zeros(len(w), dtype=torch.bool, device=w.device)
        rows = torch.arange(len(w), device=w.device)
        if self.is_positive:
            w = w.clip(min=0)
        g = c - _product(gram, w)
        ahead, g_ahead = w, g
        curvature, t = torch.full_like(small, self.curvature), torch.ones_like(small)
        n_steps, turn = 0, _FIRST_TURN
        while True:
            met = (_violation(w, g, strength, is_positive=self.is_positive) <= small).all(1)
            arrived = met & ~is_optimal[rows]
            found[rows[arrived]], is_optimal[rows[arrived]] = w[arrived], True
            stay = ~is_optimal[rows]
            n_left = int(stay.sum())
            if n_left == 0 or n_steps >= max_steps:
                break
            if n_left <= len(rows) // 2:
                rows, gram = rows[stay], gram if gram.ndim == 2 else gram[stay]
                c, w, g, ahead, g_ahead = c[stay], w[stay], g[stay], ahead[stay], g_ahead[stay]
                strength, small, curvature, t = strength[stay], small[stay], curvature[stay], t[stay]
            if n_steps == turn:
                n_more = min(turn, max_steps - n_steps)
                w = _descend_face(gram, w, g, strength, small, n_more)
                g = c - _product(gram, w)
                ahead, g_ahead, t = w, g, torch.ones_like(t)
                n_steps, turn = n_steps + n_more, 4 * turn
                continue
            new = ahead + g_ahead / curvature
            new = (self._pull(new) - strength / curvature).clip(min=0) * (1 if self.is_positive else new.sign())
            g_new = c - _product(gram, new)
            moved = new - ahead
            bend, reach = _dot(moved, g_ahead - g_new), _dot(moved, moved)
            is_bent = (bend > curvature * reach) & (curvature < self.bound)
            curvature = torch.where(is_bent, (2 * curvature).clip(max=self.bound), curvature)
            new, g_new = torch.where(is_bent, w, new), torch.where(is_bent, g, g_new)
            is_restart = is_bent | (_dot(ahead - new, new - w) > 0)
            t_new = (1 + (1 + 4 * t * t).sqrt()) / 2
            momentum = torch.where(is_restart, 0, (t - 1) / t_new)
            t = torch.where(is_restart, 1, t_new)
            ahead, g_ahead = new + momentum * (new - w), g_new + momentum * (g_new - g)
            w, g = new, g_new
            n_steps += 1
        found[rows[~is_optimal[rows]]] = w[~is_optimal[rows]]
        return found, is_optimal


def _descend_face(gram: Tensor, w: Tensor, g: Tensor, strength: Tensor, small: Tensor, n_steps: int) -> Tensor:
    """Minimise over the weights that are not zero, by conjugate gradients; one that reaches zero stays there.

    Between zeros the objective is a quadratic, on which these steps are worth many proximal ones if it is badly
    conditioned. No step leads upwards, nor over a weight's change of sign.
    """
    before = direction = torch.zeros_like(w)
    for _ in range(n_steps):
        slope = torch.where(w == 0, 0, g - strength * w.sign())
        moves = slope.abs().amax(1, keepdim=True) > small / 4
        if not moves.any():
            break
        share = _dot(slope, slope - before) / _dot(before, before)
        direction = slope + direction * share.nan_to_num(0, posinf=0).clip(min=0)
        direction = torch.where((w == 0) | (_dot(slope, direction) <= 0), slope, direction)
        bent = _product(gram, direction)
        to_zero = torch.where(w * direction < 0, -w / direction, torch.inf)
        nearest = to_zero.amin(1, keepdim=True)
        best = _dot(slope, direction) / _dot(direction, bent).clip(min=0)
        length = torch.minimum(best.nan_to_num(0, posinf=torch.inf), nearest)
        length = torch.where(moves & length.isfinite(), length, 0)
        ends = (to_zero <= length) & moves
        w, g = torch.where(ends, 0, w + length * direction), g - length * bent
        before = torch.where(ends.any(1, keepdim=True), 0, slope)
    return w


def _certificate(
    weight: Tensor, cross: Tensor, gradient: Tensor, square: Tensor, lam: Tensor, factor: Tensor, *, is_positive: bool
) -> tuple[Tensor, Tensor]:
    """Compute what `lasso.certify` describes from the gradient c - Gw, all in float64 and targets that vary."""
    strength = lam[:, None] * factor
    pull = gradient if is_positive else torch.abs(gradient)
    scale = torch.amin(strength / torch.maximum(pull, strength), 1)
    residual = square - (weight * cross).sum(1) - (weight * gradient).sum(1)
    norm = (strength * torch.abs(weight)).sum(1)
    gap = residual / 2 + norm - scale * (square - (weight * cross).sum(1)) + scale * scale * residual / 2
    worst = torch.amax(_violation(weight, gradient, strength, is_positive=is_positive), 1)
    return gap.clip(min=0) / square, worst.clip(min=0) / lam


def _violation(weight: Tensor, gradient: Tensor, strength: Tensor, *, is_positive: bool) -> Tensor:
    """Return how far each feature is from its condition, in the units of its gradient; below 0 inside it."""
    at_zero = gradient if is_positive else torch.abs(gradient)
    return torch.where(weight == 0, at_zero - strength, torch.abs(gradient - torch.sign(weight) * strength))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1, keepdim=True)


def _largest_eigenvalue(gram: Tensor) -> float:
    """Estimate it, from below, by 30 steps of the power method with eight vectors."""
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(len(gram), min(8, len(gram)), generator=draw, dtype=gram.dtype).to(gram.device)
    for _ in range(30):
        vectors = torch.linalg.qr(gram @ vectors).Q
    return float(torch.linalg.eigvalsh(vectors.T @ gram @ vectors)[-1])


def _product(gram: Tensor, w: Tensor) -> Tensor:
    return w @ gram if gram.ndim == 2 else torch.bmm(w[:, None], gram)[:, 0]


def _from_numpy(array: lasso.Floats) -> Tensor:
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


@contextmanager
def _full_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
