"""What the models behind an array's rows are for: those to fit on, and the held-out ones to evaluate on."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class ModelRows:
    """Rows of an array by role, as its catalog says; half-open slices, for ``array[array.rows.fit]``.

    Attributes
    ----------
    fit : slice
        Models to fit on.
    evaluation : slice
        Held-out models to evaluate on.
    n_retrainings : int
        How many adjacent evaluation rows share one subset.

    Examples
    --------
    >>> rows = ModelRows(fit=slice(0, 60), evaluation=slice(60, 68), n_retrainings=2)
    >>> rows.role_of([0, 59, 60, 68]).tolist()
    ['fit', 'fit', 'evaluation', '']
    """

    fit: slice
    evaluation: slice
    n_retrainings: int = 1

    def role_of(self, models: npt.ArrayLike) -> npt.NDArray[Any]:
        """Name the role of some rows.

        Parameters
        ----------
        models : array of int, any shape
            Row numbers, from 0.

        Returns
        -------
        roles : array of str, of the same shape
            "fit", "evaluation", or "" for rows that are neither.
        """
        numbers = np.asarray(models)
        role = np.zeros(numbers.shape, np.intp)
        for nth, rows in enumerate((self.fit, self.evaluation), 1):
            role[(numbers >= rows.start) & (numbers < rows.stop)] = nth
        return np.asarray(ROLES[role])

    def within(self, rows: range) -> "ModelRows | None":
        """Describe what adjacent rows that were copied to a place of their own are for.

        Parameters
        ----------
        rows : range
            Of the whole array.

        Returns
        -------
        rows : ModelRows or None
            None where the rows are not adjacent, or cut the retrainings of a subset apart.
        """
        if rows.step != 1:
            return None
        fit, evaluation = (
            slice(max(part.start, rows.start) - rows.start, max(min(part.stop, rows.stop), rows.start) - rows.start)
            for part in (self.fit, self.evaluation)
        )
        ends = (evaluation.start + rows.start - self.evaluation.start, evaluation.stop - evaluation.start)
        if evaluation.stop > evaluation.start and any(end % self.n_retrainings for end in ends):
            return None
        return ModelRows(_ordered(fit), _ordered(evaluation), self.n_retrainings)

    def as_dict(self) -> dict[str, Any]:
        """Return all there is, ready for JSON."""
        ends = {name: [part.start, part.stop] for name, part in (("fit", self.fit), ("evaluation", self.evaluation))}
        return ends | {"n_retrainings": self.n_retrainings}

    @classmethod
    def from_dict(cls, facts: Any) -> "ModelRows | None":
        """Take what `as_dict` gave; None for anything else, as nothing is known then."""
        match facts:
            case {
                "fit": [int(), int()] as fit,
                "evaluation": [int(), int()] as evaluation,
                "n_retrainings": int(n_retrainings),
            }:
                return cls(slice(*fit), slice(*evaluation), n_retrainings)
        return None


def _ordered(rows: slice) -> slice:
    return slice(0, 0) if rows.stop <= rows.start else rows


ROLES = np.array(["", "fit", "evaluation"])
"""The names of roles, that of rows without one first."""
