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


ROLES = np.array(["", "fit", "evaluation"])
"""The names of roles, that of rows without one first."""
