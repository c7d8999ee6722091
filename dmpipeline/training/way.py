"""How a run's models are trained: the method, and how many at once. It needs no torch, so reading a run does not."""

from dataclasses import dataclass
from typing import Literal

Method = Literal["products", "vmap", "loop"]
"""How a group is trained; see `ensembles`."""


@dataclass(frozen=True, slots=True)
class Way:
    """How models are trained: chosen once for a run and a kind of device, so that rows do not depend on who trains.

    Attributes
    ----------
    method : {"products", "vmap", "loop"}
        See `ensembles`.
    n_models : int
        In a group.
    compiled : bool
        Whether networks are compiled by torch first, for the method loop alone: paid once a process.
    """

    method: Method
    n_models: int
    compiled: bool = False

    @property
    def in_words(self) -> str:
        """For people: "products, 64 models at once"."""
        if self.method == "loop":
            return f"one model at a time{', compiled' * self.compiled}"
        return f"{self.method}, {self.n_models} models at once"

    @property
    def keeps_company(self) -> bool:
        """Whether a model's rounding may depend on which others are in its group."""
        return self.method == "vmap"
