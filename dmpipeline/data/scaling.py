"""How inputs and regression labels are scaled for training: by statistics of the full training set.

The scaler has seen every training example, also those that a model's subset leaves out. So what a datamodel says of
removing an example is with the scale of inputs and labels held fixed, as it is with pictures that are normalised by
constants of the full set; what an example does to the scale itself is not counted.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_PIECE_BYTES = 2**24
_LISTED_VALUES = 256


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and standard deviation of each value of an example over a training set.

    Attributes
    ----------
    mean, std : array of float64, shape of one example
        In the units of the data; where a value never varies, `std` is 1.
    """

    mean: npt.NDArray[np.float64]
    std: npt.NDArray[np.float64]

    @classmethod
    def of(cls, values: npt.NDArray[Any], piece_bytes: int = _PIECE_BYTES) -> "Moments":
        """Measure them in float64, a piece of the examples in memory at a time; divided by n, not n - 1.

        Parameters
        ----------
        values : array of float or int, shape (n, ...)
            Finite. May be a memory map.
        piece_bytes : int
            Size in memory of a piece.
        """
        mean = sum((piece.sum(0) for piece in _pieces(values, piece_bytes)), np.zeros(values.shape[1:])) / len(values)
        variance = sum(
            (np.square(piece - mean).sum(0) for piece in _pieces(values, piece_bytes)), np.zeros(values.shape[1:])
        )
        # a mean of equal values is not always that value, so the deviation of a constant may come out above 0
        is_constant = np.ones(values.shape[1:], bool)
        for piece in _pieces(values, piece_bytes):
            is_constant &= (piece == values[0]).all(0)
        std = np.where(is_constant, 1.0, np.sqrt(np.asarray(variance) / len(values)))
        return cls(np.asarray(mean, np.float64), np.where(std > 0, std, 1.0))

    def standardised(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return values less the mean, over the deviation; computed in float64, shape unchanged."""
        scaled = np.empty(values.shape, np.float32)
        start = 0
        for piece in _pieces(values):
            scaled[start : start + len(piece)] = (piece - self.mean) / self.std
            start += len(piece)
        return scaled


@dataclass(frozen=True, slots=True)
class Scaling:
    """What is scaled for training, and by what.

    Attributes
    ----------
    inputs : Moments, or None
        Of the training inputs; None where inputs are taken as they are.
    labels : Moments, or None
        Of a regression's training labels, in whose units predictions are returned; None for classes and tokens.
    """

    inputs: Moments | None
    labels: Moments | None

    def facts(self) -> dict[str, Any]:
        """State the scaling for a run's record: SHA-256 of means and deviations, and the values where there are few."""
        stated: dict[str, Any] = {}
        for name, moments in (("inputs", self.inputs), ("labels", self.labels)):
            if moments is None:
                stated[name] = None
                continue
            both = np.stack([moments.mean.ravel(), moments.std.ravel()])
            stated[name] = {"sha256": hashlib.sha256(both.astype("<f8").tobytes()).hexdigest()}
            if both.size <= 2 * _LISTED_VALUES:
                stated[name] |= {"mean": both[0].tolist(), "std": both[1].tolist()}
        return stated


def _pieces(values: npt.NDArray[Any], piece_bytes: int = _PIECE_BYTES) -> Iterator[npt.NDArray[np.float64]]:
    step = max(1, piece_bytes // max(1, values[:1].size * 8))
    for start in range(0, len(values), step):
        yield values[start : start + step].astype(np.float64)
