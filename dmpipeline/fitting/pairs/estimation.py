"""Estimating pair terms: one pass over the models that were fitted on, one more that certifies and validates.

With masks standardised to z, and r what a linear datamodel leaves of the output, the products z_i z_j of independent
masks are uncorrelated and of unit variance. So mean(r z_i z_j) estimates a pair's coefficient without bias, for any two
examples and whatever the other pairs do; its noise has the variance of r over the number of models. How far it is to be
believed is told by all estimates together: see `dmpipeline.fitting.pairs.shrinkage`.

The residuals are those of weights that were fitted to the same models, which took up a share of whatever they could: by
generalised cross-validation (Craven and Wahba, Smoothing noisy data with spline functions, Numer. Math. 31, 1979) they
are divided by f, where f^2 is the mean square of these residuals over that of models held out. These models are held
out here as well: they decide whether pairs are used at all, and then their residuals join the estimates.

What is certified: the terms are meant to solve the ridge problem 1/2n |r - Zb|^2 + e/2 sum b^2 / v, where v is the
variance by which an estimate would be shrunk as much as it is. Its Hessian in units of sqrt(v) is at least e, so that
with the gradient g the objective is at most |sqrt(v) g|^2 / 2e above its minimum.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmpipeline.fitting.pairs.shrinkage import (
    NORMAL,
    Mixture,
    believed,
    likeliest_law,
    likeliest_mixture,
    likely_variance,
    pair_features,
)
from dmpipeline.fitting.pairs.terms import PairTerms, square
from dmpipeline.moments.arrays import RowSliceable, as_rows, read_masks, read_outputs

PAIR_EXAMPLES = 100
"""Examples a target whose pairs are estimated: on digits 40, 100 and 200 give an LDS of 0.827, 0.828 and 0.828 with
4,000 models, and 60, 100, 200 one of 0.876, 0.877, 0.877 with 16,000."""

_BLOCK_ROWS = 4096
_LAW_TARGETS = 256
_LEAST_FREE = 0.1
_MOST_BELIEVED = 1 - 1e-6
_SHARES = (0.5, 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Blind:
    """Linear datamodels of the first models alone, which choose nothing by those held out.

    Attributes
    ----------
    weight : array of float32, shape (n_train, n_targets)
    bias : array of float32, shape (n_targets,)
    mean : array of float64, shape (n_train,)
        Share of those models' subsets that hold each example.
    deviation : array of float64, shape (n_targets,)
        Of those models' outputs; 0 for a target that does not vary.
    n_fit : int
        They were fitted to rows before this one.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]
    n_fit: int


def estimate_pairs(
    masks: RowSliceable,
    outputs: RowSliceable,
    blind: Blind,
    *,
    k: int = PAIR_EXAMPLES,
    threads: int,
    progress: Callable[[int], None] = lambda _: None,
) -> PairTerms | None:
    """Estimate the pair terms of all targets.

    Parameters
    ----------
    masks : bool or 0/1, shape (n_models, n_train)
    outputs : real, shape (n_models, n_targets)
    blind : Blind
    k : int
        Examples a target, those of largest weight.
    threads : int
        Targets worked on at a time.
    progress : callable
        Called with the models done; those fitted on are read twice, and all of these count.

    Returns
    -------
    terms : PairTerms or None
        None where the models held out do not speak for them: where what pairs take away of the error may be chance,
        by Student's t at 99%.

    Notes
    -----
    Memory holds 12 k^2 bytes a target, and a block of 4,096 models. Time grows as models x targets x k^2.
    """
    work = _Work(as_rows(masks, "masks"), as_rows(outputs, "outputs"), blind, min(k, len(blind.mean)), threads)
    if work.k < 2 or not work.varies.any():
        return None
    products, squares = work.sums(progress)
    free = work.free = work.share_left(squares)
    noise = squares / work.n_fit / free**2 / work.n_fit
    estimate = products / (work.n_fit * free)
    variance, mixture = work.likely(estimate, noise)
    tried = [work.solution(estimate, noise, variance, mixture) for mixture in (NORMAL, mixture)]
    seen, more = work.foreseen(tried, progress)
    best = min(seen, key=lambda one: float(one.error(one.share)[work.varies].mean()))
    if not best.share:
        return None
    gap = work.gap(best.solution, progress)
    # models that were held out are blind to nothing any more
    n = work.n_models
    estimate = (products / free + more) / n
    solution = work.solution(estimate, noise * work.n_fit / n, variance, best.solution.mixture)
    weight = best.share * solution.weight
    first, second = np.triu_indices(work.k, 1)
    scale = work.inverse_scale[work.examples]
    raw = weight * scale[:, first] * scale[:, second] * blind.deviation[:, None]
    return PairTerms(
        examples=work.examples,
        weight=raw.astype(np.float32),
        mean=blind.mean.astype(np.float32),
        gap=gap,
        validation_error=best.error(best.share) * blind.deviation**2,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Solution:
    """What to expect of each pair, in units of standardised masks and outputs."""

    weight: NDArray[np.float32]  # (n_targets, n_pairs)
    factor: NDArray[np.float32]  # (n_targets, n_pairs): how far each estimate is believed
    mixture: Mixture


@dataclass(frozen=True, slots=True, eq=False)
class _Foreseen:
    """What a solution says of the models held out, in units of standardised outputs."""

    solution: _Solution
    squares: NDArray[np.float64]  # (n_targets, 3): mean r^2, r f and f^2
    gains: NDArray[np.float64]  # (n_held_out, 2): means over targets of r f and f^2

    def error(self, share: float) -> NDArray[np.float64]:
        """Mean squared error of each target with this share of the pairs."""
        error: NDArray[np.float64] = self.squares @ np.array([1, -2 * share, share**2])
        return error

    @property
    def share(self) -> float:
        """How much of the pairs is best used; nothing if what that wins may be chance, by Student's t at 99%."""
        from scipy import stats  # slow to import

        gains = {share: self.gains @ np.array([2 * share, -(share**2)]) for share in _SHARES}
        best = max(gains, key=lambda share: float(gains[share].mean()))
        gain = gains[best]
        least = stats.t.ppf(0.99, len(gain) - 1) * gain.std(ddof=1) / np.sqrt(len(gain))
        return best if gain.mean() > least else 0.0


class _Work:
    """The rows, and what is the same in each pass over them."""

    def __init__(self, masks: RowSliceable, outputs: RowSliceable, blind: Blind, k: int, threads: int) -> None:
        self.masks, self.outputs, self.blind, self.k, self.threads = masks, outputs, blind, k, threads
        self.n_models, self.n_fit = int(masks.shape[0]), blind.n_fit
        self.n_targets = len(blind.bias)
        self.pairs = np.triu_indices(k, 1)
        order = np.argsort(-np.abs(blind.weight.T), axis=1, kind="stable")
        self.examples = np.ascontiguousarray(order[:, :k], np.int32)
        spread = np.sqrt(blind.mean * (1 - blind.mean))
        self.spread = spread
        self.inverse_scale = np.divide(1, spread, out=np.zeros_like(spread), where=spread > 0)
        self.varies = blind.deviation > 0
        self.per_output = np.divide(1, blind.deviation, out=np.zeros_like(blind.deviation), where=self.varies)
        self.free = 1.0  # share of a residual that fitting to it has left

    def blocks(
        self, start: int, stop: int, progress: Callable[[int], None], before: int
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Yield standardised masks, (n, n_train), and what the linear datamodels leave, (n, n_targets)."""
        for first in range(start, stop, _BLOCK_ROWS):
            last = min(first + _BLOCK_ROWS, stop)
            block = read_masks(self.masks, first, last).astype(np.float32)
            left = read_outputs(self.outputs, first, last).astype(np.float64)
            left -= block @ self.blind.weight + self.blind.bias
            left *= self.per_output
            block -= self.blind.mean.astype(np.float32)
            block *= self.inverse_scale.astype(np.float32)
            yield block, left.astype(np.float32)
            progress(before + last)

    def each(self, work: Callable[[int], None]) -> None:
        """Work on all targets, some at a time."""
        from threadpoolctl import threadpool_limits  # comes with scikit-learn

        # threads of the libraries' own would wait for one another
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(work, range(self.n_targets)))

    def sums(self, progress: Callable[[int], None]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Sum r z_i z_j, (n_targets, n_pairs), and r^2, (n_targets,), over the models that were fitted on."""
        products = np.zeros((self.n_targets, len(self.pairs[0])), np.float32)
        squares = np.zeros(self.n_targets)
        for block, left in self.blocks(0, self.n_fit, progress, 0):
            squares += np.einsum("nt,nt->t", left, left, dtype=np.float64)

            def add(target: int, block: Any = block, left: Any = left) -> None:
                own = block[:, self.examples[target]]
                products[target] += (own.T @ (own * left[:, target, None]))[self.pairs]

            self.each(add)
        return products, squares

    def share_left(self, squares: NDArray[np.float64]) -> float:
        """Return what share of a residual the linear fit has left, from sums of r^2 of the models fitted on."""
        held_out = np.zeros(self.n_targets)
        for _, left in self.blocks(self.n_fit, self.n_models, lambda _: None, 0):
            held_out += np.einsum("nt,nt->t", left, left, dtype=np.float64)
        blind = float(held_out[self.varies].mean()) / (self.n_models - self.n_fit)
        seen = float(squares[self.varies].mean()) / self.n_fit
        return min(max((seen / blind) ** 0.5, _LEAST_FREE), 1.0) if blind > 0 else 1.0

    def likely(
        self, estimate: NDArray[np.floating[Any]], noise: NDArray[np.float64]
    ) -> tuple[NDArray[np.float32], Mixture]:
        """Learn the law and the mixture from some of the targets, evenly spread; apply the law to all."""
        varying = np.flatnonzero(self.varies)
        some = varying[np.unique(np.linspace(0, len(varying) - 1, min(len(varying), _LAW_TARGETS)).astype(int))]
        law = likeliest_law(estimate[some], noise[some], np.stack([self.features(target) for target in some]))
        variance = np.empty(estimate.shape, np.float32)

        def apply(target: int) -> None:
            variance[target] = likely_variance(self.features(target), law)

        self.each(apply)
        return variance, likeliest_mixture(estimate[some], noise[some], variance[some])

    def solution(
        self,
        estimate: NDArray[np.floating[Any]],
        noise: NDArray[np.float64],
        variance: NDArray[np.float32],
        mixture: Mixture,
    ) -> _Solution:
        """Shrink estimates, (n_targets, n_pairs)."""
        factor = np.zeros(estimate.shape, np.float32)

        def weigh(target: int) -> None:
            if self.varies[target]:
                factor[target] = believed(estimate[target], noise[target], variance[target], mixture)

        self.each(weigh)
        return _Solution((factor * estimate).astype(np.float32), factor, mixture)

    def features(self, target: int) -> NDArray[np.float64]:
        """Describe a target's pairs."""
        examples = self.examples[target]
        effects = self.blind.weight[examples] * self.per_output.astype(np.float32)
        length = np.linalg.norm(effects, axis=1, keepdims=True)
        alike = np.divide(effects, length, out=np.zeros_like(effects), where=length > 0)
        alike[:, target] = 0  # its own weights are what is described otherwise
        return pair_features(effects[:, target] * self.spread[examples], alike @ alike.T)

    def foreseen(
        self, solutions: Sequence[_Solution], progress: Callable[[int], None]
    ) -> tuple[list[_Foreseen], NDArray[np.float32]]:
        """See what solutions say of the models held out, and sum r z_i z_j over these, (n_targets, n_pairs)."""
        n = self.n_models - self.n_fit
        products, truth = np.zeros((self.n_targets, len(self.pairs[0])), np.float32), np.zeros(self.n_targets)
        agreement, size = (np.zeros((len(solutions), self.n_targets)) for _ in range(2))
        gains, at = np.zeros((len(solutions), n, 2)), 0
        for block, left in self.blocks(self.n_fit, self.n_models, progress, 0):
            by_pairs = np.zeros((len(solutions), *left.shape), np.float32)

            def foresee(target: int, block: Any = block, left: Any = left, by_pairs: Any = by_pairs) -> None:
                own = block[:, self.examples[target]]
                products[target] += (own.T @ (own * left[:, target, None]))[self.pairs]
                for nth, solution in enumerate(solutions):
                    by_pairs[nth, :, target] = self.of_pairs(own, solution, target)

            self.each(foresee)
            agrees, squares = by_pairs * left, by_pairs**2
            truth += np.einsum("nt,nt->t", left, left, dtype=np.float64)
            agreement += agrees.sum(axis=1, dtype=np.float64)
            size += squares.sum(axis=1, dtype=np.float64)
            gains[:, at : at + len(left)] = np.stack([agrees.mean(axis=2), squares.mean(axis=2)], axis=2)
            at += len(left)
        seen = [
            _Foreseen(solution, np.stack([truth, agreement[nth], size[nth]], axis=1) / n, gains[nth])
            for nth, solution in enumerate(solutions)
        ]
        return seen, products

    def gap(self, solution: _Solution, progress: Callable[[int], None]) -> NDArray[np.float64]:
        """Bound how far the ridge objective of the models fitted on is above its minimum, (n_targets,)."""
        products = np.zeros(solution.weight.shape, np.float32)
        for block, left in self.blocks(0, self.n_fit, progress, self.n_models):

            def add(target: int, block: Any = block, left: Any = left) -> None:
                own = block[:, self.examples[target]]
                rest = left[:, target] / np.float32(self.free) - self.of_pairs(own, solution, target)
                products[target] += (own.T @ (own * rest[:, None]))[self.pairs]

            self.each(add)
        # the gradient in units of sqrt(v / e), where v / (v + e) is how far an estimate is believed
        odds = solution.factor.astype(np.float64) / (1 - np.minimum(solution.factor, _MOST_BELIEVED))
        slope = np.sqrt(odds) * (products / self.n_fit)
        slope -= np.divide(solution.weight, np.sqrt(odds), out=np.zeros_like(odds), where=odds > 0)
        gap: NDArray[np.float64] = (slope**2).sum(axis=1) / 2
        return gap

    def of_pairs(self, own: NDArray[np.float32], solution: _Solution, target: int) -> NDArray[np.float32]:
        """Predict by pairs, (n,), from the standardised masks of a target's examples, (n, k)."""
        predicted: NDArray[np.float32] = np.einsum("nk,nk->n", own @ square(solution.weight[target], self.k), own)
        return predicted
