"""Whether two ensembles number their examples alike: arrays in, sentences out.

An order that is off by one makes nearly every target differ, and no list of targets says why. Targets are recognised
by the mean and spread of their outputs and by how they correlate; training examples by what their presence in a
subset does to the outputs.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MOST_SHIFT = 20
"""Orders that are off by up to this many places are recognised."""

_MOST_MOVED = 2000
_SHARE_THAT_FITS = 0.9
_N_REFERENCES = 300
_DOUBTFUL = 4.0  # a misfit that one in seven targets exceeds by chance
_COST_OF_MOVING = 10.0
_SURE = 6.0
_ABSENT = 3.0


@dataclass(frozen=True, slots=True)
class Order:
    """How the examples of two ensembles correspond.

    Attributes
    ----------
    kind : {"same", "shifted", "swapped", "other", "unknown"}
        Shifted: number i of the reference is number i + `shift` of ours. Swapped: `moved` says which ones hold each
        other's outputs. Other: an order that was not found. Unknown: too little was read, or outputs differ in a way
        that no order explains.
    detail : str
        For people.
    shift : int
        0 unless shifted.
    moved : dict of int to int
        Number in the reference to number in ours, of those that were swapped.
    """

    kind: Literal["same", "shifted", "swapped", "other", "unknown"]
    detail: str
    shift: int = 0
    moved: dict[int, int] | None = None

    @property
    def is_wrong(self) -> bool:
        """Whether an order surely differs."""
        return self.kind in ("shifted", "swapped", "other")


def order_of_targets(ours: npt.NDArray[np.floating], theirs: npt.NDArray[np.floating], noun: str = "target") -> Order:
    """Find out whether targets of two ensembles are numbered alike.

    Parameters
    ----------
    ours : array of float, shape (n_models, n_targets)
    theirs : array of float, shape (m_models, n_targets)
        The reference.
    noun : str
        How a target is called, for the sentence.

    Returns
    -------
    order : Order
        Shifted, where at least 90% of targets fit those at another place, and fewer than half their own. Swapped, where
        targets that differ fit one another, and correlate with the rest as those do.
    """
    mine, other = _Profile.of(ours), _Profile.of(theirs)
    n_targets = ours.shape[1]
    fits = mine.misfit(other, np.arange(n_targets), np.arange(n_targets)) < mine.bound(n_targets)
    if fits.all():
        return Order("same", f"every {noun} has the mean and spread of its own number")
    if fits.mean() < 0.5:
        for shift in sorted((k for k in range(-MOST_SHIFT, MOST_SHIFT + 1) if k), key=abs):
            places = np.arange(max(0, -shift), min(n_targets, n_targets - shift))
            if len(places) < max(10, n_targets // 2):
                continue
            share = float((mine.misfit(other, places + shift, places) < mine.bound(n_targets)).mean())
            if share >= _SHARE_THAT_FITS:
                return Order(
                    "shifted", _shifted(shift, noun, f"{share:.0%} of them fit so, {fits.mean():.0%} not"), shift
                )
        if mine.has_the_values_of(other):
            return Order(
                "other",
                f"the order of {noun}s is another: {1 - fits.mean():.0%} of them differ, but taken together they have "
                "the same means and the same spreads",
            )
    differing = np.flatnonzero(~fits)
    if 2 <= len(differing) <= _MOST_MOVED:
        moved = _matched(mine, other, differing, ours, theirs)
        if moved:
            first = next(iter(moved))
            more = f", and {len(moved) - 1} more hold each other's outputs" if len(moved) > 1 else ""
            detail = f"{noun}s are swapped: {noun} {first} of the reference is {moved[first]} of ours{more}"
            return Order("swapped", detail, moved=moved)
    return Order("unknown", f"{len(differing):,} of {n_targets:,} {noun}s differ in a way that no other order explains")


@dataclass(frozen=True, slots=True, eq=False)
class _Profile:
    """What a target is recognised by: the mean and the spread of its outputs, with their standard errors."""

    mean: Floats
    mean_error: Floats
    log_spread: Floats
    log_error: Floats

    @classmethod
    def of(cls, outputs: npt.NDArray[np.floating]) -> "_Profile":
        n, n_targets = outputs.shape
        mean, variance, kurtosis = np.empty(n_targets), np.empty(n_targets), np.empty(n_targets)
        for start in range(0, n_targets, 256):  # wide copies of all targets may not fit into memory
            part = slice(start, start + 256)
            wide = np.asarray(outputs[:, part], np.float64)
            mean[part] = wide.mean(0)
            squares = (wide - mean[part]) ** 2
            variance[part] = np.maximum(squares.mean(0), 1e-24)
            kurtosis[part] = np.maximum((squares**2).mean(0) / variance[part] ** 2, 1.5)
        return cls(mean, np.sqrt(variance / n), 0.5 * np.log(variance), np.sqrt((kurtosis - 1) / (4 * n)))

    def misfit(self, other: "_Profile", own: npt.NDArray[np.intp], others: npt.NDArray[np.intp]) -> Floats:
        """Compare targets of ours with targets of the reference: about chi-square with two degrees where alike.

        Indices broadcast: a column of one and a row of the other give a matrix.
        """
        errors = self.mean_error[own] ** 2 + other.mean_error[others] ** 2
        log_errors = self.log_error[own] ** 2 + other.log_error[others] ** 2
        apart = (self.mean[own] - other.mean[others]) ** 2 / errors
        return np.asarray(apart + (self.log_spread[own] - other.log_spread[others]) ** 2 / log_errors)

    def has_the_values_of(self, other: "_Profile") -> bool:
        """Whether sorted means, and sorted spreads, are the same but for noise."""
        for own, theirs, error, their_error in (
            (self.mean, other.mean, self.mean_error, other.mean_error),
            (self.log_spread, other.log_spread, self.log_error, other.log_error),
        ):
            noise = np.sqrt(np.median(error**2 + their_error**2))
            if np.mean(np.abs(np.sort(own) - np.sort(theirs)) < 3 * noise) < _SHARE_THAT_FITS:
                return False
        return True

    @staticmethod
    def bound(n_targets: int) -> float:
        """Bound a misfit that chance explains: 1% over all targets, and what heavy tails add."""
        return 1.5 * 2 * float(np.log(n_targets / 0.01))


def _matched(
    mine: _Profile,
    other: _Profile,
    differing: npt.NDArray[np.intp],
    ours: npt.NDArray[np.floating],
    theirs: npt.NDArray[np.floating],
) -> dict[int, int] | None:
    """Assign targets that differ to one another; None unless they fit, and correlate as those they are assigned to."""
    from scipy.optimize import linear_sum_assignment  # slow to import

    everything = np.arange(ours.shape[1])
    # one that was moved may happen to fit where it is
    doubtful = np.flatnonzero(mine.misfit(other, everything, everything) > _DOUBTFUL)
    candidates = np.union1d(differing, doubtful) if len(doubtful) <= _MOST_MOVED else differing
    cost = np.minimum(mine.misfit(other, candidates[None, :], candidates[:, None]), 1e6)
    of_theirs, of_ours = linear_sum_assignment(cost + _COST_OF_MOVING * (1 - np.eye(len(candidates))))
    moved = of_theirs != of_ours
    is_explained = cost[of_theirs, of_ours][np.isin(candidates[of_theirs], differing)] < mine.bound(ours.shape[1])
    if is_explained.mean() < _SHARE_THAT_FITS or moved.sum() < 2:
        return None
    before, after = candidates[of_theirs[moved]], candidates[of_ours[moved]]
    references = np.setdiff1d(everything, candidates)
    if len(references) < 10:
        return None
    references = references[np.linspace(0, len(references) - 1, min(len(references), _N_REFERENCES)).astype(np.intp)]
    known, as_moved, as_numbered = (
        _correlations(of, targets, references) for of, targets in ((theirs, before), (ours, after), (ours, before))
    )
    closer = ((known - as_moved) ** 2).sum(1) < ((known - as_numbered) ** 2).sum(1)
    if closer.mean() < _SHARE_THAT_FITS:
        return None
    return dict(zip(before.tolist(), after.tolist(), strict=True))


def _correlations(
    outputs: npt.NDArray[np.floating], targets: npt.NDArray[np.intp], references: npt.NDArray[np.intp]
) -> Floats:
    def standard(columns: npt.NDArray[np.intp]) -> Floats:
        part = np.asarray(outputs[:, columns], np.float64)
        part = part - part.mean(0)
        deviation = part.std(0)
        return np.asarray(part / np.where(deviation > 0, deviation, 1))

    return np.asarray(standard(targets).T @ standard(references) / len(outputs))


def order_of_training(
    our_masks: npt.NDArray[np.bool_],
    ours: npt.NDArray[np.floating],
    their_masks: npt.NDArray[np.bool_],
    theirs: npt.NDArray[np.floating],
    noun: str = "training example",
) -> Order:
    """Find out whether training examples of two ensembles are numbered alike.

    What an example's presence does to each target is estimated on both sides, noisily; over all examples and targets
    the estimates correlate if the numbers agree, and if not, then at the shift at which they do. Every other shift
    shows how large such a correlation is by chance.

    Parameters
    ----------
    our_masks, their_masks : array of bool, shape (n_models, n_train) and (m_models, n_train)
    ours, theirs : array of float, shape (n_models, n_targets) and (m_models, n_targets)

    Returns
    -------
    order : Order
        Unknown where the halves of either side do not show their own order.
    """
    rng = np.random.default_rng(0)
    sides = [_Effects.of(masks, outputs, rng) for masks, outputs in ((our_masks, ours), (their_masks, theirs))]
    n_train = our_masks.shape[1]
    if n_train < 4 * MOST_SHIFT:
        return Order("unknown", f"{n_train} {noun}s are too few to recognise their order")
    together = _alignment(sides[0].whole, sides[1].whole)
    standard = _in_deviations(together)
    if standard[0] > _SURE:
        return Order("same", f"what {noun}s do to outputs agrees number by number ({standard[0]:.0f} deviations)")
    best = int(standard.argmax())
    shift = best if best <= n_train // 2 else best - n_train
    if standard[best] > 2 * _SURE:
        return Order(
            "shifted", _shifted(shift, noun, f"{standard[best]:.0f} deviations, against {standard[0]:.1f}"), shift
        )
    own = [float(_in_deviations(_alignment(*side.halves))[0]) for side in sides]
    if min(own) > 2 * _SURE and standard[0] < _ABSENT:
        return Order(
            "other",
            f"{noun}s of the reference have another order or are others: what they do to outputs has nothing to do "
            f"with ours ({standard[0]:.1f} deviations, where halves of either side agree by {min(own):.0f})",
        )
    return Order("unknown", f"too few models were read to recognise the order of {noun}s")


@dataclass(frozen=True, slots=True, eq=False)
class _Effects:
    """What each training example's presence does to each target, (n_train, n_targets): of all models and of halves."""

    whole: Floats
    halves: tuple[Floats, Floats]

    @classmethod
    def of(
        cls, masks: npt.NDArray[np.bool_], outputs: npt.NDArray[np.floating], rng: np.random.Generator
    ) -> "_Effects":
        n_targets = outputs.shape[1]
        picked = np.linspace(0, n_targets - 1, min(n_targets, _N_REFERENCES)).astype(np.intp)
        standard = np.asarray(outputs[:, picked], np.float64)
        deviation = standard.std(0)
        standard = (standard - standard.mean(0)) / np.where(deviation > 0, deviation, 1)
        order = rng.permutation(len(masks))
        first, second = order[: len(order) // 2], order[len(order) // 2 :]
        parts = [_cross_moments(masks[rows], standard[rows]) for rows in (first, second)]
        return cls(parts[0] + parts[1], (parts[0], parts[1]))


def _cross_moments(masks: npt.NDArray[np.bool_], outputs: Floats) -> Floats:
    centered = masks.astype(np.float32) - masks.mean(0, dtype=np.float32)
    found = np.asarray(centered.T @ (outputs - outputs.mean(0)).astype(np.float32), np.float64)
    # what all examples do together is not an example's own
    return np.asarray(found - found.mean(0))


def _alignment(ours: Floats, theirs: Floats) -> Floats:
    """Add up products of effects at every shift: place k is that of ours' example i + k with the reference's i."""
    n_train = len(ours)
    total = np.zeros(n_train // 2 + 1, np.complex128)
    for start in range(0, ours.shape[1], 32):
        part = slice(start, start + 32)
        total += (np.conj(np.fft.rfft(theirs[:, part], axis=0)) * np.fft.rfft(ours[:, part], axis=0)).sum(1)
    return np.asarray(np.fft.irfft(total, n_train))


def _in_deviations(alignment: Floats) -> Floats:
    """Measure each shift by how far the others scatter: by quartiles, which the one that fits does not move."""
    low, middle, high = np.quantile(alignment, [0.25, 0.5, 0.75])
    return np.asarray((alignment - middle) / max((high - low) / 1.349, 1e-300))


def _shifted(shift: int, noun: str, evidence: str) -> str:
    off = "off by one" if abs(shift) == 1 else f"off by {abs(shift)}"
    place = f"i {'+' if shift > 0 else '-'} {abs(shift)}"
    return f"the order of {noun}s is {off}: {noun} i of the reference is {place} of ours ({evidence})"
