"""What trains the rows of a run, whatever it does: blocks of models from their subsets and numbers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt

from dmpipeline.data.examples import Dataset
from dmpipeline.training.logits import Logits
from dmpipeline.training.way import Way

FIX_IN_ANOTHER_RUN = (
    "fix it; a run keeps the code it was created with, so train with the new code in another: "
    "dmpipeline init OTHER --spec RUN/run.yaml"
)
"""The remedy where the user's own code fails."""


class Trainer(ABC):
    """Trains rows of one run in this process.

    Attributes
    ----------
    dataset : Dataset
    way : Way
    n_ahead : int
        How many blocks are best started before the first of them is waited for.
    """

    dataset: Dataset
    way: Way
    n_ahead = 1

    @abstractmethod
    def workers(self) -> AbstractContextManager[Any]:
        """Keep available, inside the block, what trains the models."""

    @abstractmethod
    def start(
        self, masks: npt.NDArray[np.bool_], model_indices: npt.NDArray[np.uint64], rows: Sequence[int]
    ) -> Callable[[], Logits]:
        """Start training a block of models, after those that were started before.

        Parameters
        ----------
        masks : array of bool, shape (n_models, n_train)
            The subset each model is trained on; none of them empty.
        model_indices : array of uint64, shape (n_models,)
            Numbers that initialisation, order and augmentation are drawn from.
        rows : sequence of int, length n_models
            How an error calls the models.

        Returns
        -------
        finish : callable
            Waits for the logits and returns them, as `train` does; called once, inside the same `workers`.
        """

    def train(self, masks: npt.NDArray[np.bool_], model_indices: npt.NDArray[np.uint64], rows: Sequence[int]) -> Logits:
        """Train a block of models, given as for `start`.

        Raises
        ------
        TrainingError
            If an output is not finite, or so large that a margin may not fit float16; `rows` lists whose.
        """
        with self.workers():
            return self.start(masks, model_indices, rows)()
