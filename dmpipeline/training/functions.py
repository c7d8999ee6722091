"""Training by a function of the user's own, a model at a time; see `recipes.Function`."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dmdata import phases
from dmpipeline.data.examples import Dataset
from dmpipeline.draws.masks import Purpose, draw_bits
from dmpipeline.errors import TrainingError
from dmpipeline.models.outputs import as_tensor
from dmpipeline.models.recipes import Function
from dmpipeline.models.returned import checked_outputs
from dmpipeline.models.usercode import explained, import_object, in_words
from dmpipeline.training.logits import Logits, too_large
from dmpipeline.training.trainer import FIX_IN_ANOTHER_RUN, Trainer
from dmpipeline.training.way import Way


class FunctionTrainer(Trainer):
    """Trains by a function of the user's own, a model at a time; see `recipes.Function`."""

    way = Way("loop", 1)

    def __init__(self, dataset: Dataset, recipe: Function, *, seed: int) -> None:
        self.dataset, self.recipe, self.seed = dataset, recipe, seed
        self.function = import_object(recipe.function)

    def start(
        self, masks: npt.NDArray[np.bool_], model_indices: npt.NDArray[np.uint64], rows: Sequence[int]
    ) -> Callable[[], Logits]:
        """Return what trains a block of models once its logits are asked for; see `Trainer`."""
        return functools.partial(self._train, masks, model_indices, rows)

    def _train(
        self, masks: npt.NDArray[np.bool_], model_indices: npt.NDArray[np.uint64], rows: Sequence[int]
    ) -> Logits:
        found, done = Logits.empty(self.dataset, len(masks)), phases.Share(phases.heard_by())
        unusable: list[int] = []
        path = self.recipe.function
        for place, (mask, model) in enumerate(zip(masks, model_indices.tolist(), strict=True)):
            row, what = rows[place], f"row {rows[place]}: recipe.function {path!r}"
            number = int(draw_bits(self.seed, Purpose.TORCH_SEED, model, 1)[0])
            with torch.random.fork_rng():
                torch.manual_seed(number)
                with explained(what, path, remedy=FIX_IN_ANOTHER_RUN, rows=[row], value=path):
                    returned = self.function(self.dataset, mask, *self._seeds(number), **self._arguments(number))
            train, test = checked_outputs(returned, self.dataset, mask, row=row, path=path)
            outputs = [as_tensor(part)[None] for part in (train, test)]
            unusable += [rows[i] for i in found.store(np.array([place]), *outputs)]
            done.add(1)
        if unusable:
            raise TrainingError(
                f"recipe.function {path!r} returned {too_large(self.dataset)} at {in_words(unusable)}; return "
                "smaller ones, as logarithms of probabilities are",
                rows=unusable,
            )
        return found

    @contextmanager
    def workers(self) -> Iterator[tuple[None, int]]:
        """One model is trained after the other, by whatever the function does."""
        yield None, 1

    def _seeds(self, number: int) -> tuple[int]:
        # the upper half: all bits of a number are equally good
        return (number if self.recipe.version == 1 else number >> 32,)

    def _arguments(self, number: int) -> dict[str, Any]:
        return self.recipe.arguments | ({"seed64": number} if self._takes_seed64 else {})

    @functools.cached_property
    def _takes_seed64(self) -> bool:
        if self.recipe.version == 1 or "seed64" in self.recipe.arguments:
            return False
        try:
            return "seed64" in inspect.signature(self.function).parameters
        except (TypeError, ValueError):  # as of some functions in C
            return False
