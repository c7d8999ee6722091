"""Whether masks follow the law they are said to be drawn by: each column's density, and columns independent.

Seeds show whether a run's masks are those its spec draws. This shows it of any masks, as those of a release whose
seeds nobody knows: examples that are in too many or too few subsets, and pairs that come or stay away together.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dmpipeline.errors import SpecError

UNLIKELY = 1e-6
"""Counts that chance gives less often than this, in the most extreme of all columns or pairs, are a fault."""

N_PAIRS = 2000
"""Pairs of columns that are looked at: half of them neighbours, half of them anywhere."""


@dataclass(slots=True)
class MaskLaw:
    """Counts over masks that come block by block; ask for `density_faults` and `pair_faults` at the end.

    Memory is that of a count for each training example and each sampled pair.

    Attributes
    ----------
    n_train : int
    alpha : float
        Share of the training examples in a subset; of exact subsets their size over `n_train`.
    is_exact : bool
        Whether subsets have a fixed size. Then two examples are in a subset together a little less often than alpha
        squared: indicators correlate by -1 / (n_train - 1).
    seed : int
        Of the sample of pairs.

    Raises
    ------
    SpecError
        If alpha is not between 0 and 1.
    """

    n_train: int
    alpha: float
    is_exact: bool
    seed: int = 0
    n_masks: int = 0
    _counts: npt.NDArray[np.int64] = field(init=False)
    _pairs: npt.NDArray[np.int64] = field(init=False)
    _together: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise SpecError(f"alpha {self.alpha} is not a share; choose between 0 and 1", field="alpha")
        self._counts = np.zeros(self.n_train, np.int64)
        self._pairs = _sample_of_pairs(self.n_train, self.seed)
        self._together = np.zeros(len(self._pairs), np.int64)

    def add(self, masks: npt.NDArray[np.bool_]) -> None:
        """Count some masks, array of bool of shape (n_models, n_train); each subset once, without its retrainings."""
        self.n_masks += len(masks)
        self._counts += masks.sum(axis=0, dtype=np.int64)
        first, second = self._pairs.T
        self._together += (masks[:, first] & masks[:, second]).sum(axis=0, dtype=np.int64)

    @property
    def expected_density(self) -> float:
        """Probability that a mask holds an example; of independent draws one that would be empty holds one."""
        if self.is_exact:
            return self.alpha
        return float(self.alpha + (1 - self.alpha) ** self.n_train / self.n_train)

    def size_faults(self, sizes: npt.NDArray[np.int64]) -> str | None:
        """Describe masks of a size that the law does not have, `sizes` of shape (n_models,); None where there are none.

        Independent draws give binomial sizes: each one's tail is bounded over all masks, and their scatter is too.
        """
        if not len(sizes):
            return None
        if self.is_exact:
            size = round(self.alpha * self.n_train)
            wrong, expected = sizes != size, f"{size:,}"
        else:
            from scipy.stats import binom, chi2  # slow to import

            law = binom(self.n_train, self.alpha)
            wrong = 2 * np.minimum(law.cdf(sizes), law.sf(sizes - 1)) * len(sizes) < UNLIKELY
            expected = f"about {law.mean():,.0f}"
            scatter = float(((sizes - law.mean()) ** 2).sum() / law.var())
            beyond = chi2(len(sizes))
            # of a handful of examples the rule that no mask is empty narrows the scatter
            is_binomial = (1 - self.alpha) ** self.n_train <= UNLIKELY
            if is_binomial and not wrong.any() and 2 * min(beyond.cdf(scatter), beyond.sf(scatter)) < UNLIKELY:
                return (
                    f"sizes of masks scatter by {sizes.std():,.1f} examples around {sizes.mean():,.1f}, where draws "
                    f"example by example scatter by {law.std():,.1f}"
                )
        if not wrong.any():
            return None
        first = int(np.flatnonzero(wrong)[0])
        return (
            f"{int(wrong.sum()):,} of {len(sizes):,} masks have another size than {expected} of {self.n_train:,} "
            f"examples; mask {first} has {sizes[first]:,}"
        )

    def density_faults(self) -> str | None:
        """Describe the columns whose number of ones is beyond chance; None where there are none.

        A column's count over independent masks is binomial under either law; the bound is Bonferroni's over columns.
        """
        wrong, worst = self._beyond(self._counts, self.expected_density)
        if not wrong:
            return None
        return (
            f"{wrong:,} of {self.n_train:,} training examples are in more or fewer subsets than chance explains; "
            f"example {worst} is in {self._counts[worst]:,} of {self.n_masks:,}, where "
            f"{self.expected_density:.1%} are expected"
        )

    def pair_faults(self) -> str | None:
        """Describe the sampled pairs of columns that are not independent; None where there are none."""
        size = self.alpha * self.n_train
        p = self.alpha * (size - 1) / (self.n_train - 1) if self.is_exact and self.n_train > 1 else self.alpha**2
        if not self.is_exact and (1 - self.alpha) ** self.n_train > UNLIKELY:
            return None  # draws that would be empty are not independent, which shows for a handful of examples alone
        wrong, worst = self._beyond(self._together, p)
        if not wrong:
            return None
        first, second = self._pairs[worst]
        return (
            f"{wrong:,} of {len(self._pairs):,} sampled pairs of training examples are in subsets together more or "
            f"less often than independent draws; {first} and {second} are together in {self._together[worst]:,} of "
            f"{self.n_masks:,}, where {p:.1%} are expected"
        )

    def _beyond(self, counts: npt.NDArray[np.int64], p: float) -> tuple[int, int]:
        """Count which binomial counts are beyond chance, and find the most extreme."""
        from scipy.stats import binom  # slow to import

        if not len(counts) or not self.n_masks:
            return 0, 0
        law = binom(self.n_masks, p)
        tails = np.minimum(law.cdf(counts), law.sf(counts - 1))
        return int((2 * tails * len(counts) < UNLIKELY).sum()), int(tails.argmin())


def _sample_of_pairs(n_train: int, seed: int) -> npt.NDArray[np.int64]:
    """Draw pairs of different columns; neighbours among them, which faults of a generator show in first."""
    if n_train < 2:
        return np.zeros((0, 2), np.int64)
    rng = np.random.default_rng(seed)
    left = np.arange(n_train - 1)
    if len(left) > N_PAIRS // 2:
        left = np.sort(rng.choice(left, N_PAIRS // 2, replace=False))
    first = rng.integers(0, n_train, N_PAIRS // 2)
    second = (first + rng.integers(1, n_train, N_PAIRS // 2)) % n_train
    anywhere = np.sort(np.stack([first, second], axis=1), axis=1)
    return np.unique(np.concatenate([np.stack([left, left + 1], axis=1), anywhere]), axis=0)
