"""The training examples that a datamodel leans on most, as a table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmpipeline.errors import SpecError
from dmpipeline.fitting.pairs.terms import Pair
from dmpipeline.tables import Table, plain

Label = int | float | str | None
"""What an example is labelled, as the user calls it; None where that is not known."""


@dataclass(frozen=True, slots=True)
class Influence:
    """What one example does to one output.

    Attributes
    ----------
    index : int
        Of the training example, or of the target where the targets of an example are listed.
    weight : float
        Change of the output when the training example joins the subset, in the output's units.
    label : int, float, str or None
        Of the example with this index.
    same_sign : float or None
        Share of fits to halves of the models in which the weight has this sign; None where no fits were made.
    rank_low, rank_high : int or None
        Ranks between which nine tenths of these fits place the example, 1 for the largest weight of its sign.
    """

    index: int
    weight: float
    label: Label = None
    same_sign: float | None = None
    rank_low: int | None = None
    rank_high: int | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Influences(Table[Influence]):
    """The largest weights of one target, or of one training example; helpers first, then harmers, the largest first.

    Attributes
    ----------
    of : {"target", "train_example"}
        Whose weights: a column, or a row of the weights.
    index : int
        Of that target or example.
    label : int, float, str or None
    n_nonzero : int
        Weights that are not zero.
    n_fits : int
        Fits to halves of the models that say how stable each weight is; 0 where none were made.
    pairs : tuple of Pair
        Of a target whose datamodel has pair terms: those of largest magnitude.
    """

    of: str = "target"
    index: int = 0
    label: Label = None
    n_nonzero: int = 0
    n_fits: int = 0
    pairs: tuple[Pair, ...] = ()

    @property
    def helpers(self) -> tuple[Influence, ...]:
        """Those of positive weight, the largest first."""
        return tuple(row for row in self.rows if row.weight > 0)

    @property
    def harmers(self) -> tuple[Influence, ...]:
        """Those of negative weight, the furthest below zero first."""
        return tuple(row for row in self.rows if row.weight < 0)

    def as_dict(self) -> dict[str, Any]:
        """Return everything ready for JSON: ``target`` or ``train_example``, ``helpers``, ``harmers`` and ``pairs``."""
        facts = {self.of: self.index, "label": self.label, "n_nonzero": self.n_nonzero, "n_fits": self.n_fits}
        whole: dict[str, Any] = plain(facts | {"helpers": self.helpers, "harmers": self.harmers, "pairs": self.pairs})
        return whole


def largest(
    weight: NDArray[np.floating[Any]], k: int, label_of: Callable[[int], Label] = lambda _: None
) -> tuple[Influence, ...]:
    """Pick the k largest weights and the k furthest below zero; those that are zero are neither.

    Raises
    ------
    SpecError
        If k is not 1 or more.
    """
    if k < 1:
        raise SpecError(f"{k} examples cannot be listed; choose 1 or more", field="top", value=k)
    order = np.argsort(weight, kind="stable")
    helpers = [i for i in order[::-1][:k].tolist() if weight[i] > 0]
    harmers = [i for i in order[:k].tolist() if weight[i] < 0]
    return tuple(Influence(i, float(weight[i]), label_of(i)) for i in (*helpers, *harmers))
