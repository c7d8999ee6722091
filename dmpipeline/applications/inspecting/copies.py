"""How likely one example's input is a copy of another's: with noise, and for pictures perhaps shifted by some pixels.

Examples become rows of numbers: pictures in grey, averaged to at most 16 x 16 blocks, tables standardised, texts hashed
counts of their tokens by position and of their n-grams. Two hypotheses explain a pair. Either one row is the other with
independent noise of some variance on each number; or it is another example of the same population, whose density is a
kernel estimate: around each example a Gaussian with the covariance of the differences of nearest neighbours. The score
of a pair is the logarithm of the ratio of the two likelihoods, maximised over the noise. Noise spreads evenly over all
directions, differences of examples do not: that is how a noisy copy is distinguished from an example that is as near.
Where they do spread evenly, as between pictures of independent noise, or where few examples do not show how they
spread, only what is nearer than usual may be a copy: an even spread of the usual size explains another example, too.

What is held in memory: `_BLOCK_BYTES` of distances, as much of rows, and 64 numbers for each example that is asked
about and each shift; inputs are read in blocks.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from dmpipeline.data.examples import Dataset, as_features
from dmpipeline.data.scaling import Moments
from dmpipeline.errors import SpecError

N_NEIGHBOURS = 8
"""As many nearest examples are proposed as the original of a copy, and stand for the density around an example."""

N_FOLDS = 10
"""An example is scored by differences of examples that are not in its fold: by its own it would seem more natural."""

FEWEST_EXAMPLES = 20
"""With fewer training examples nothing is known of how alike examples are by nature."""

Shift = tuple[int, int]

_SIDE = 16  # blocks that a picture is averaged to, at most, in height and width
_MOST_FEATURES = 1024
_HASHED = 512
_MOST_SAMPLED = 5000
_COORDINATES = 64
_NOISE_SHARES = np.geomspace(1e-3, 1.2, 12)  # variances of noise that are tried, as shares of the mean variance
_BLOCK_BYTES = 2**25

Rows = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Nearest:
    """Nearest training examples of some examples, nearest first.

    Attributes
    ----------
    index : array of int, shape (n, k)
        Of training examples.
    shift : array of int, shape (n, k)
        Which of `InputSpace.shifts` brings the training example nearest.
    distance : array of float32, shape (n, k)
        Squared, between inputs from which noise is filtered.
    """

    index: Indices
    shift: Indices
    distance: Rows


@dataclass(frozen=True)
class InputSpace:
    """Examples of a dataset as rows of numbers, and what differences between them are like.

    Attributes
    ----------
    dataset : Dataset
    seed : int
        Of the sample of training examples that differences are learned from, and of the projection of wide inputs.
    """

    dataset: Dataset
    seed: int

    def __post_init__(self) -> None:
        """Refuse a dataset with too few examples."""
        if self.dataset.n_train < FEWEST_EXAMPLES:
            raise SpecError(
                f"{self.dataset.n_train} training examples do not show how alike examples are by nature; at least "
                f"{FEWEST_EXAMPLES} are needed",
                field="dataset",
                value=self.dataset.n_train,
            )

    @property
    def is_picture(self) -> bool:
        """Whether inputs are pictures, which may be shifted."""
        return self.dataset.image_shape is not None and self.dataset.train_inputs.dtype.kind != "i"

    @cached_property
    def shifts(self) -> tuple[Shift, ...]:
        """Shifts that are tried, down and to the right, in pixels; (0, 0) first, and alone where there are no pictures.

        By one pixel in each direction where pictures have less than 16 pixels a side, else two; by more where they have
        more than 32.
        """
        if not self.is_picture:
            return ((0, 0),)
        side = min(self._picture[:2])
        most, unit = (1 if side < _SIDE else 2), max(1, side // (2 * _SIDE))
        steps = range(-most, most + 1)
        tried = [(y * unit, x * unit) for y, x in itertools.product(steps, steps) if abs(y) + abs(x) <= 2]
        tried = [shift for shift in tried if self.kept(shift).any()]  # of one row, a shift may leave nothing
        return tuple(sorted(tried, key=lambda shift: abs(shift[0]) + abs(shift[1])))

    @property
    def _picture(self) -> tuple[int, int, int]:
        shape = self.dataset.image_shape or ()
        height, width, n_channels = (*shape, 1)[:3]
        return height, width, n_channels

    def rows(self, part: str, which: Indices | slice, shift: Shift = (0, 0)) -> Rows:
        """Make rows of some examples' inputs, (n, n_features); parts of a shifted picture beyond its edge are 0."""
        inputs = self.dataset.train_inputs if part == "train" else self.dataset.test_inputs
        picked = np.asarray(inputs[which])
        if picked.dtype.kind == "i":
            return _hashed(picked)
        numbers = as_features(picked)
        if self.is_picture:
            return _averaged(_shifted(_grey(numbers.reshape(-1, *self._picture)), shift))
        numbers = self._scale.standardised(numbers)
        return numbers if self._project is None else numbers @ self._project

    def kept(self, shift: Shift) -> npt.NDArray[np.bool_]:
        """Tell which numbers of a shifted row are of pixels inside the picture, (n_features,)."""
        if not self.is_picture:
            return np.ones(self.n_features, np.bool_)
        inside = _shifted(np.ones((1, *self._picture[:2], 1), np.float32), shift)
        is_kept: npt.NDArray[np.bool_] = (_averaged(inside) > 1 - 1e-6)[0]
        return is_kept

    @cached_property
    def n_features(self) -> int:
        """Count of numbers in a row."""
        return int(self.rows("train", slice(0, 1)).shape[1])

    @cached_property
    def _scale(self) -> Moments:
        inputs = self.dataset.train_inputs
        return Moments.of(inputs.reshape(len(inputs), -1))

    @cached_property
    def _project(self) -> Rows | None:
        if self.dataset.n_features <= _MOST_FEATURES:
            return None
        rng = np.random.default_rng(self.seed)
        drawn = rng.standard_normal((self.dataset.n_features, _MOST_FEATURES), np.float32)
        return drawn / np.float32(math.sqrt(_MOST_FEATURES))

    @cached_property
    def sample(self) -> Indices:
        """Training examples that stand for all, by rising number: all, or 5,000 that are drawn."""
        n_train = self.dataset.n_train
        if n_train <= _MOST_SAMPLED:
            return np.arange(n_train)
        return np.sort(np.random.default_rng(self.seed).choice(n_train, _MOST_SAMPLED, replace=False))

    @cached_property
    def _covariance(self) -> npt.NDArray[np.float64]:
        rows = self._train_rows(self.sample).astype(np.float64)
        return np.cov(rows.T).reshape(rows.shape[1], -1)

    def _train_rows(self, which: Indices) -> Rows:
        """Make rows of training examples, whose inputs are read a block at a time."""
        made = np.empty((len(which), self.n_features), np.float32)
        for block in _blocks(len(which), max(1, _BLOCK_BYTES // (8 * max(1, self.dataset.n_features)))):
            made[block] = self.rows("train", which[block])
        return made

    @cached_property
    def mean_variance(self) -> float:
        """Variance of a number of a row, averaged over the numbers."""
        return max(float(np.trace(self._covariance)) / self.n_features, 1e-12)

    @cached_property
    def filters(self) -> list[Rows]:
        """Weights of numbers in the coordinates that distances are measured in, (kept, at most 64), for each shift.

        Principal components, each by the share of its variance that is not noise where noise has the mean variance
        of a number: Wiener's filter.
        """
        found = []
        for shift in self.shifts:
            kept = self.kept(shift)
            variance, axes = np.linalg.eigh(self._covariance[np.ix_(kept, kept)])
            variance, axes = np.maximum(variance[::-1], 0), axes[:, ::-1]
            gain = np.sqrt(variance / (variance + self.mean_variance))[:_COORDINATES]
            gain *= math.sqrt(self.n_features / max(1, int(kept.sum())))
            found.append((axes[:, :_COORDINATES] * gain).astype(np.float32))
        return found

    @cached_property
    def folds(self) -> npt.NDArray[np.intp]:
        """Number the fold of each training example of the sample, -1 for the others, (n_train,)."""
        found = np.full(self.dataset.n_train, -1)
        found[self.sample] = np.random.default_rng(self.seed).permutation(len(self.sample)) % N_FOLDS
        return found

    @cached_property
    def differences(self) -> list[list[tuple[npt.NDArray[np.float64], Rows]]]:
        """Variances (kept,) and axes (kept, kept) of differences of nearest neighbours.

        A list for each fold of the sample, of differences between examples that are not in it, and last for the whole;
        in a list what holds of each shift's numbers.
        """
        found = []
        for fold in range(N_FOLDS + 1):
            moment = self._moment(self.sample[self.folds[self.sample] != fold])
            of_kept: dict[bytes, tuple[npt.NDArray[np.float64], Rows]] = {}  # shifts may keep the same numbers
            for kept in map(self.kept, self.shifts):
                if kept.tobytes() not in of_kept:
                    variance, axes = np.linalg.eigh(moment[np.ix_(kept, kept)])
                    variance = np.maximum(variance, 1e-6 * self.mean_variance)
                    of_kept[kept.tobytes()] = (variance, axes.astype(np.float32))
            found.append([of_kept[self.kept(shift).tobytes()] for shift in self.shifts])
        return found

    def _moment(self, which: Indices) -> npt.NDArray[np.float64]:
        """Average the outer products of differences between training examples and the nearest others of them."""
        asked = self._coordinates("train", which, 0, is_moved=False)
        nearest = np.empty(len(which), np.intp)
        for block in _blocks(len(which), max(1, _BLOCK_BYTES // (4 * len(which)))):
            apart = _squared_distances(asked[block], asked)
            apart[np.arange(len(apart)), np.arange(block.start, block.stop)] = np.inf
            nearest[block] = which[apart.argmin(1)]
        apart = (self._train_rows(which) - self._train_rows(nearest)).astype(np.float64)
        moment: npt.NDArray[np.float64] = apart.T @ apart / len(apart)
        return moment

    @cached_property
    def usual_spread(self) -> float:
        """Squared distance to the second to fifth nearest example, averaged over the sample."""
        k = min(5, self.dataset.n_train - 1)
        nearest = self.nearest("train", self.sample, k=k, is_shifted=False)
        return max(float(nearest.distance[:, 1:].mean(dtype=np.float64)), 1e-30)

    def nearest(
        self,
        part: str,
        which: Indices,
        *,
        k: int,
        is_shifted: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> Nearest:
        """Find the nearest training examples of some examples; an example does not count as its own.

        Parameters
        ----------
        part : {"train", "test"}
        which : array of int, shape (n,)
        k : int
            How many of each, at most n_train - 1.
        is_shifted : bool
            Whether shifts are tried.
        progress : callable, optional
            Called with (training examples compared, n_train).
        """
        n_train, n_tried = self.dataset.n_train, len(self.shifts) if is_shifted else 1
        asked = [self._coordinates(part, which, nth, is_moved=False) for nth in range(n_tried)]
        own = which if part == "train" else np.full(len(which), -1)
        index = np.full((len(which), k), -1)
        shift, distance = np.zeros((len(which), k), np.intp), np.full((len(which), k), np.inf, np.float32)
        n_rows = max(k, min(n_train, _BLOCK_BYTES // (8 * max(1, self.dataset.n_features))))
        for train in _blocks(n_train, n_rows):
            compared = [
                self._coordinates("train", np.arange(train.start, train.stop), nth, is_moved=True)
                for nth in range(n_tried)
            ]
            for block in _blocks(len(which), max(1, _BLOCK_BYTES // (8 * n_rows))):
                apart = np.full((block.stop - block.start, train.stop - train.start), np.inf, np.float32)
                moved = np.zeros(apart.shape, np.int16)
                for nth in range(n_tried):
                    one = _squared_distances(asked[nth][block], compared[nth])
                    nearer = one < apart
                    apart[nearer], moved[nearer] = one[nearer], nth
                is_own = own[block, None] == np.arange(train.start, train.stop)
                apart[is_own] = np.inf
                all_apart = np.concatenate([distance[block], apart], 1)
                best = np.argpartition(all_apart, k - 1, 1)[:, :k]
                best = np.take_along_axis(best, np.argsort(np.take_along_axis(all_apart, best, 1), 1, "stable"), 1)
                numbers = np.broadcast_to(np.arange(train.start, train.stop), apart.shape)
                index[block] = np.take_along_axis(np.concatenate([index[block], numbers], 1), best, 1)
                shift[block] = np.take_along_axis(np.concatenate([shift[block], moved], 1), best, 1)
                distance[block] = np.take_along_axis(all_apart, best, 1)
            if progress is not None:
                progress(train.stop, n_train)
        return Nearest(index, shift, distance)

    def nearest_tests(self, which: Indices) -> Indices:
        """Find the test example nearest to each of some training examples, (n,), without shifts."""
        tests = self._coordinates("test", np.arange(self.dataset.n_test), 0, is_moved=False)
        found = np.empty(len(which), np.intp)
        for block in _blocks(len(which), max(1, _BLOCK_BYTES // (4 * len(tests)))):
            asked = self._coordinates("train", which[block], 0, is_moved=False)
            found[block] = _squared_distances(asked, tests).argmin(1)
        return found

    def pairs(self, part: str, which: Indices, index: Indices) -> Nearest:
        """Compare examples (n,) with given training examples (n, k): the best shift of each, in the order given."""
        shift, distance = np.zeros(index.shape, np.intp), np.full(index.shape, np.inf, np.float32)
        there, places = np.unique(index, return_inverse=True)
        places = places.reshape(index.shape)
        for nth in range(len(self.shifts)):
            asked = self._coordinates(part, which, nth, is_moved=False)
            moved = self._coordinates("train", there, nth, is_moved=True)
            for column in range(index.shape[1]):
                one = np.square(asked - moved[places[:, column]]).sum(1)
                nearer = one < distance[:, column]
                distance[nearer, column], shift[nearer, column] = one[nearer], nth
        return Nearest(index, shift, distance)

    def log_likelihoods(
        self, part: str, which: Indices, nearest: Nearest, spread: npt.NDArray[np.float64], folds: Indices
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Compute how likely the difference of each pair is for a noisy copy, and for another example.

        Parameters
        ----------
        part, which
            Examples, (n,).
        nearest : Nearest
            The training examples that each is compared with, (n, k).
        spread : array of float64, shape (n,)
            By `spread`.
        folds : array of int, shape (n,)
            Which of `differences` each is scored by.

        Returns
        -------
        as_copy, as_other : array of float64, shape (n, k)
            Logarithms, up to the same constant, scaled to the numbers of a whole row.
        """
        as_copy, as_other = np.empty(nearest.index.shape), np.empty(nearest.index.shape)
        noises = _NOISE_SHARES * self.mean_variance
        for nth, fold in itertools.product(range(len(self.shifts)), np.unique(folds)):
            shift = self.shifts[nth]
            kept = self.kept(shift)
            variance, axes = self.differences[fold][nth]
            of_rows, of_columns = np.nonzero((nearest.shift == nth) & (folds == fold)[:, None])
            step = max(1, _BLOCK_BYTES // (32 * max(self.n_features, self.dataset.n_features)))
            for block in _blocks(len(of_rows), step):
                places = (of_rows[block], of_columns[block])
                ours = self.rows(part, which[places[0]])[:, kept]
                apart = np.square((ours - self.rows("train", nearest.index[places], shift)[:, kept]) @ axes)
                whole, n_kept = apart.sum(1, dtype=np.float64), apart.shape[1]
                copy = np.max([-0.5 * (whole / noise + n_kept * math.log(noise)) for noise in noises], 0)
                # evenly, as large as usual, or as around this example where that is less
                usual = max(float(variance.mean(dtype=np.float64)), 1e-6 * self.mean_variance)
                least = usual * np.minimum(spread[places[0]], 1)
                usual = np.clip(whole / n_kept, least, np.maximum(least, usual))
                other = -0.5 * (whole / usual + n_kept * np.log(usual))
                for noise in noises:
                    around = spread[places[0], None] * variance + noise
                    other = np.maximum(other, -0.5 * (apart / around + np.log(around)).sum(1))
                scale = self.n_features / n_kept
                as_copy[places], as_other[places] = copy * scale, other * scale
        return as_copy, as_other

    def representation(self, part: str, which: Indices) -> Rows:
        """Represent examples by filtered principal components of their inputs, less the mean, (n, at most 64)."""
        mean = self._coordinates("train", self.sample, 0, is_moved=False).mean(0, dtype=np.float64)
        found: Rows = self._coordinates(part, which, 0, is_moved=False) - mean.astype(np.float32)
        return found

    def spread(self, nearest: Nearest) -> npt.NDArray[np.float64]:
        """Measure how far examples are apart around each, (n,), in squared distance: about 1 where it is as usual."""
        around = nearest.distance[:, 1:5].mean(1, dtype=np.float64)
        spread: npt.NDArray[np.float64] = np.clip(around / self.usual_spread, 0.1, 10)
        return spread

    def _coordinates(self, part: str, which: Indices, nth: int, *, is_moved: bool) -> Rows:
        shift = self.shifts[nth]
        kept, taken = self.kept(shift), self.filters[nth]
        made = np.empty((len(which), taken.shape[1]), np.float32)
        for block in _blocks(len(which), max(1, _BLOCK_BYTES // (8 * max(1, self.dataset.n_features)))):
            rows = self.rows(part, which[block], shift if is_moved else (0, 0))
            made[block] = rows[:, kept] @ taken
        return made


@dataclass(frozen=True, slots=True)
class Scored:
    """Pairs of an example and a training example, scored as copies.

    Attributes
    ----------
    index : array of int, shape (n, k)
        Training examples that were compared; -1 for none.
    score : array of float64, shape (n, k)
        Logarithm of how much more likely a copy is than another example; -inf for none.
    distance : array of float64, shape (n, k)
        Between inputs from which noise is filtered, at the best shift, in their units.
    """

    index: Indices
    score: npt.NDArray[np.float64]
    distance: npt.NDArray[np.float64]


def score_copies(
    space: InputSpace,
    part: str,
    which: Indices,
    *,
    proposed: Indices | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scored:
    """Score pairs of some examples and the training examples nearest to them, and others that are proposed.

    A copy may be either one's noisy version, so that the natural explanation is that of the less likely of the two
    among the training examples around it.

    Parameters
    ----------
    space : InputSpace
    part : {"train", "test"}
        Of the examples; of training examples each is compared with all others.
    which : array of int, shape (n,)
    proposed : array of int, shape (n, m), optional
        More training examples to compare with.
    progress : callable, optional
        Called with (training examples compared, n_train) while neighbours are searched.
    """
    k = min(N_NEIGHBOURS, space.dataset.n_train - 2)
    nearest = space.nearest(part, which, k=k, progress=progress)
    spread = space.spread(nearest)
    folds = space.folds[which] if part == "train" else np.full(len(which), -1)
    folds = np.where(folds < 0, which % N_FOLDS, folds)
    as_copy, as_other = space.log_likelihoods(part, which, nearest, spread, folds)
    around = _second_largest(as_other)  # of its other neighbours, which explains the example itself
    if proposed is not None and proposed.shape[1]:
        more = space.pairs(part, which, proposed)
        more_copy, more_other = space.log_likelihoods(part, which, more, spread, folds)
        is_there = (proposed[:, :, None] == nearest.index[:, None]).any(2)
        if part == "train":
            is_there |= proposed == which[:, None]
        more_copy[is_there] = -np.inf
        around = np.concatenate([around, np.broadcast_to(as_other.max(1, keepdims=True), proposed.shape)], 1)
        nearest = Nearest(
            np.concatenate([nearest.index, more.index], 1),
            np.concatenate([nearest.shift, more.shift], 1),
            np.concatenate([nearest.distance, more.distance], 1),
        )
        as_copy, as_other = np.concatenate([as_copy, more_copy], 1), np.concatenate([as_other, more_other], 1)
    of_original = _natural(space, nearest.index, which if part == "train" else np.full(len(which), -1), k)
    score = as_copy - np.maximum(as_other, np.minimum(of_original, around))
    return Scored(nearest.index, score, np.sqrt(nearest.distance.astype(np.float64)))


def _natural(space: InputSpace, index: Indices, own: Indices, k: int) -> npt.NDArray[np.float64]:
    """Return how likely training examples (n, k) are by those around them, other than the example of their row."""
    there, places = np.unique(index, return_inverse=True)
    around = space.nearest("train", there, k=k, is_shifted=False)
    whole = np.full(len(there), N_FOLDS)
    _, as_other = space.log_likelihoods("train", there, around, space.spread(around), whole)
    order = np.argsort(-as_other, 1, "stable")[:, :2]
    best = np.take_along_axis(around.index, order[:, :1], 1)[:, 0]
    first, second = np.take_along_axis(as_other, order, 1).T
    places = places.reshape(index.shape)
    found: npt.NDArray[np.float64] = np.where(best[places] == own[:, None], second[places], first[places])
    return found


def _second_largest(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return for each value the largest of the others in its row."""
    order = np.argsort(-values, 1, "stable")
    largest = np.repeat(np.take_along_axis(values, order[:, :1], 1), values.shape[1], 1)
    np.put_along_axis(largest, order[:, :1], np.take_along_axis(values, order[:, 1:2], 1), 1)
    return largest


def _squared_distances(a: Rows, b: Rows) -> Rows:
    found: Rows = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * (a @ b.T)
    return np.maximum(found, 0, out=found)


def _blocks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _grey(pictures: Rows) -> Rows:
    """Average red, green and blue, (n, height, width, 1); a fourth channel, which is no colour, is left out."""
    if pictures.shape[3] < 3:
        return pictures
    grey: Rows = pictures[..., :3].mean(3, keepdims=True, dtype=np.float32)
    return grey


def _shifted(pictures: Rows, shift: Shift) -> Rows:
    """Move pictures (n, height, width, channels) down and to the right; what comes in is 0."""
    if shift == (0, 0):
        return pictures
    moved = np.zeros_like(pictures)
    (to_y, from_y), (to_x, from_x) = (
        (slice(max(by, 0), size + min(by, 0)), slice(max(-by, 0), size + min(-by, 0)))
        for by, size in zip(shift, pictures.shape[1:3], strict=True)
    )
    moved[:, to_y, to_x] = pictures[:, from_y, from_x]
    return moved


def _averaged(pictures: Rows) -> Rows:
    """Average pictures (n, height, width, channels) over blocks, at most 16 x 16 of them, and make rows."""
    n, height, width, n_channels = pictures.shape
    size_y, size_x = math.ceil(height / _SIDE), math.ceil(width / _SIDE)
    if size_y > 1 or size_x > 1:
        more = ((0, 0), (0, -height % size_y), (0, -width % size_x), (0, 0))
        pictures = np.pad(pictures, more, mode="edge")
        shape = (n, pictures.shape[1] // size_y, size_y, pictures.shape[2] // size_x, size_x, n_channels)
        pictures = pictures.reshape(shape).mean((2, 4), dtype=np.float32)
    return pictures.reshape(n, -1)


def _hashed(tokens: npt.NDArray[Any]) -> Rows:
    """Count tokens by position, and n-grams of one to three wherever they are, in 512 bins each hashed with a sign."""
    n, n_positions = tokens.shape
    codes = tokens.astype(np.uint64)
    made = np.zeros((n, _HASHED), np.float32)
    rows = np.arange(n)[:, None]
    with np.errstate(over="ignore"):
        grams = [_mixed(codes + (np.arange(n_positions, dtype=np.uint64) << np.uint64(32)), 7)]
        for length in range(1, min(3, n_positions) + 1):
            gram = np.zeros((n, n_positions - length + 1), np.uint64)
            for nth in range(length):
                gram = _mixed(gram + codes[:, nth : n_positions - length + 1 + nth], length)
            grams.append(gram)
    for gram in grams:
        signs = np.where(gram >> np.uint64(63), np.float32(1), np.float32(-1))
        np.add.at(made, (rows, (gram & np.uint64(_HASHED - 1)).astype(np.intp)), signs)
    return made


def _mixed(codes: npt.NDArray[np.uint64], salt: int) -> npt.NDArray[np.uint64]:
    """Mix the bits of codes: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    mixed = codes + np.uint64(0x9E3779B97F4A7C15) * np.uint64(salt + 1)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
