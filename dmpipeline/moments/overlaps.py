"""Whether subsets that should differ are the same, more often than chance has it, and what is then said.

A run's held-out subsets are trained several times each, and its other subsets once. So subsets that are repeated among
rows to fit on look like held-out ones that were taken along, and held-out subsets that were fitted on give scores that
say nothing of new subsets. Of tiny training sets there are few subsets, and they repeat by chance, which is harmless.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dmpipeline.draws.chance import is_beyond_chance, log_choose
from dmpipeline.errors import DataWarning

_RARE = 1e-4

Keys = NDArray[np.uint64]
"""Of masks, by `dmpipeline.moments.identity.keys_of_masks`."""


@dataclass(frozen=True, slots=True)
class Possible:
    """How many subsets there are to draw from.

    Attributes
    ----------
    log_n : float
        The natural logarithm of their number.
    """

    log_n: float

    @classmethod
    def subsets(cls, n_train: int, size: float) -> Self:
        """Count the subsets of `size` examples, which is the average of the masks."""
        return cls(log_choose(n_train, size))

    def share_of(self, n: int) -> float:
        """Share of the subsets that n different ones are, at most 1."""
        return math.exp(max(min(math.log(max(n, 1)) - self.log_n, 0.0), -700.0))  # which is not quite 0


def repeats_beyond_chance(keys: Keys, possible: Possible) -> int:
    """Count the rows whose subset an earlier row has, or return 0 where chance explains that many."""
    n_different = len(np.unique(keys))
    n_repeats = len(keys) - n_different
    return n_repeats if is_beyond_chance(n_repeats, len(keys) * possible.share_of(n_different), rarely=_RARE) else 0


def shared_beyond_chance(keys: Keys, fitted: Keys, possible: Possible) -> int:
    """Count the different subsets of some rows that were fitted on, or return 0 where chance explains that many."""
    different = np.unique(keys)
    n_shared = int(np.isin(different, fitted).sum())
    share = possible.share_of(len(np.unique(fitted)))
    return n_shared if is_beyond_chance(n_shared, len(different) * share, rarely=_RARE) else 0


def warn_of_held_out_rows(arrays: tuple[Any, ...], keys: Keys, possible: Possible, *, stacklevel: int) -> None:
    """Warn where rows to fit on seem to be, or are, a run's held-out models too.

    Parameters
    ----------
    arrays : tuple of array
        Masks and outputs as they were handed in: one of a catalogued run knows which rows are held out.
    keys : array of uint64, shape (n_rows,)
        Of the masks of all rows.
    possible : Possible
    stacklevel : int
        As for `warnings.warn`, from the caller.
    """
    for array in arrays:
        roles = getattr(array, "rows", None)
        held_out, to_fit = getattr(roles, "evaluation", None), getattr(roles, "fit", None)
        if held_out is not None and to_fit is not None and held_out.start < min(held_out.stop, len(keys)):
            warnings.warn(
                f"rows {held_out.start} to {min(held_out.stop, len(keys))} are held-out models, and are fitted on: "
                "nothing is left to score these datamodels on; fit masks[masks.rows.fit] and outputs[masks.rows.fit], "
                f"which are rows {to_fit.start} to {to_fit.stop}",
                DataWarning,
                stacklevel=stacklevel + 1,
            )
            return
    if n_repeats := repeats_beyond_chance(keys, possible):
        first = _first_repeat(keys)
        warnings.warn(
            f"{n_repeats:,} of {len(keys):,} rows to fit on repeat the subset of an earlier row, as a run's held-out "
            f"models do, which are trained several times each: the first is row {first}; leave held-out models out, as "
            "masks[:n_models] and outputs[:n_models] do with the n_models of the run's spec, or score on others",
            DataWarning,
            stacklevel=stacklevel + 1,
        )


def _first_repeat(keys: Keys) -> int:
    _, first = np.unique(keys, return_index=True)
    is_first = np.zeros(len(keys), np.bool_)
    is_first[first] = True
    return int(np.flatnonzero(~is_first)[0])
