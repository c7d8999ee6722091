# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# the compiled kernel takes its types from what it is called with

"""The coordinates in which datamodels are solved, and the way back: masks centred and scaled to unit variance."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmpipeline.compute import kernel
from dmpipeline.moments.moments import Moments, Zeros


@dataclass(frozen=True, slots=True, eq=False)
class Space:
    """The coordinates of a solution: masks less their mean, over their deviation, and outputs less their mean."""

    mean: NDArray[np.float64]  # (n_train,)
    inverse_scale: NDArray[np.float64]  # (n_train,), 0 for an example in all subsets or in none
    shift: NDArray[np.float64]  # (n_targets,)
    y_mean: NDArray[np.float64]  # (n_targets,), less the shift
    varies: NDArray[np.bool_]  # (n_targets,)

    @classmethod
    def of(cls, moments: Moments) -> "Space":
        """Take the means and deviations from these rows; others may then be seen in the same coordinates."""
        mean = moments.ones / moments.n
        variance = mean * (1 - mean)
        inverse_scale = np.divide(1, np.sqrt(variance), out=np.zeros_like(mean), where=variance > 0)
        y_mean = moments.y_sum / moments.n
        y_square = moments.y_squares / moments.n
        varies = y_square - y_mean**2 > _LEAST_VARIANCE * y_square
        return cls(mean, inverse_scale, moments.shift, y_mean, varies)

    def gram(
        self, moments: Moments, *, threads: int, dtype: type[np.floating[Any]] = np.float32, zeros: Zeros = np.zeros
    ) -> NDArray[np.floating[Any]]:
        """(X - mean)'(X - mean) / n in these units, shape (n_train, n_train); the sums are formed in float64."""
        seen = moments.ones / moments.n
        gram = zeros(moments.gram.shape, dtype)

        def rows_from(top: int) -> None:
            _standardise(moments.gram, moments.n, seen, self.mean, self.inverse_scale, gram, top, top + _ROWS_AT_ONCE)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(rows_from, range(0, len(gram), _ROWS_AT_ONCE)))
        return gram

    def cross(self, moments: Moments, part: slice) -> NDArray[np.float64]:
        """(Y - mean)'(X - mean) / n, shape (n_targets of the part, n_train); zeros for targets that do not vary."""
        seen, y_seen = moments.ones / moments.n, moments.y_sum[part] / moments.n
        y_mean = self._mean_from(moments, part)
        cross = moments.cross[:, part].T / moments.n
        cross -= np.outer(y_mean, seen)
        cross -= np.outer(y_seen - y_mean, self.mean)
        cross *= self.inverse_scale
        cross[~self.varies[part]] = 0
        return cross

    def square(self, moments: Moments, part: slice) -> NDArray[np.float64]:
        """Mean of (y - mean)^2, shape (n_targets of the part,)."""
        y_seen, y_mean = moments.y_sum[part] / moments.n, self._mean_from(moments, part)
        square = moments.y_squares[part] / moments.n - 2 * y_mean * y_seen + y_mean**2
        return np.maximum(square, 0)

    def _mean_from(self, moments: Moments, part: slice) -> NDArray[np.float64]:
        """Return the outputs' mean, counted from the shift of these moments."""
        return self.y_mean[part] + (self.shift[part] - moments.shift[part])

    def raw(
        self, weight: NDArray[np.float32], part: slice = slice(None)
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Turn weights in these units, (n_targets of the part, n_train), into those of raw masks, and biases.

        For an output y = sum_j w_j (x_j - mean_j) / scale_j + y_mean the weight of a raw mask is w_j / scale_j.

        Returns
        -------
        weight : array of float32, shape (n_train, n_targets of the part)
        bias : array of float32, shape (n_targets of the part,)
        """
        of_masks = np.ascontiguousarray(weight.T)
        of_masks *= self.inverse_scale[:, None].astype(np.float32)
        bias = self.shift[part] + (self.y_mean[part] - self.mean @ of_masks)
        return of_masks, bias.astype(np.float32)


def parts_of(n_targets: int, block_targets: int) -> list[slice]:
    """Cut the targets into blocks, whose covariances are formed at a time."""
    return [slice(i, min(i + block_targets, n_targets)) for i in range(0, n_targets, block_targets)]


_ROWS_AT_ONCE = 64

_LEAST_VARIANCE = 1e-13
"""Below this share of its mean square, a target's variance cannot be told from rounding in float64 sums."""


@kernel
def _standardise(counts, n, seen, mean, inverse_scale, gram, top, bottom):
    for i in range(top, min(bottom, len(gram))):
        row, out = counts[i], gram[i]
        scale, own_mean, excess = inverse_scale[i], mean[i], seen[i] - mean[i]
        for j in range(len(row)):
            out[j] = (row[j] / n - own_mean * seen[j] - excess * mean[j]) * (scale * inverse_scale[j])
