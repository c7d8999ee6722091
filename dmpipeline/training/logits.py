"""Raw outputs of trained models: put together group by group, and refused where a run could not store them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from dmpipeline.data.examples import LARGEST_PLAIN_INPUT, Dataset, largest_plain_input
from dmpipeline.errors import TrainingError
from dmpipeline.models.outputs import LARGEST_LOGIT
from dmpipeline.models.recipes import Recipe
from dmpipeline.models.returned import output_shapes
from dmpipeline.models.usercode import in_words


@dataclass(frozen=True, slots=True)
class Logits:
    """Raw outputs of trained models.

    Attributes
    ----------
    train, test : array, shape (n_models, n_train, n_classes), (n_models, n_test, n_classes)
        float16 logits; of sequences one more axis, positions, before the classes. Of regressions float32 predictions.
    """

    train: npt.NDArray[Any]
    test: npt.NDArray[Any]

    @classmethod
    def empty(cls, dataset: Dataset, n_models: int) -> Self:
        """Allocate those of some models on a dataset's examples."""
        dtype = np.float32 if dataset.is_regression else np.float16
        train, test = output_shapes(dataset)
        return cls(np.empty((n_models, *train), dtype), np.empty((n_models, *test), dtype))

    def store(self, members: npt.NDArray[np.intp], train: torch.Tensor, test: torch.Tensor) -> list[int]:
        """Put some models' outputs in place; return those of them that cannot be stored."""
        bound = LARGEST_LOGIT if self.train.dtype == np.float16 else torch.finfo(torch.float32).max
        usable = torch.ones(len(members), dtype=torch.bool)
        for into, outputs in ((self.train, train), (self.test, test)):
            usable &= torch.le(outputs.abs(), bound).flatten(1).all(1)
            stored = torch.clamp(outputs, -bound, bound).to(torch.from_numpy(into).dtype)
            into[members] = stored.numpy().reshape(len(members), *into.shape[1:])
        return [int(members[i]) for i in torch.nonzero(~usable)]


def too_large(dataset: Dataset) -> str:
    """Describe outputs that cannot be stored, for an error."""
    if dataset.is_regression:
        return "predictions that are not finite in single precision"
    return f"logits that pass {LARGEST_LOGIT:,.0f}, too large for float16"


def diverged(dataset: Dataset, recipe: Recipe, rows: Sequence[int], n_models: int) -> TrainingError:
    """Make the error for models whose outputs cannot be stored, with how to train others."""
    if dataset.is_regression:
        what = "their predictions are not finite numbers"
    else:
        what = f"their logits are not finite, or pass {LARGEST_LOGIT:,.0f}, too large for float16 margins"
    largest, scale = largest_plain_input(dataset) or 0.0, ""
    if largest > LARGEST_PLAIN_INPUT:
        scale = f"inputs reach {largest:,.4g}, so set inputs: standardised in that run, or "
    return TrainingError(
        f"{in_words(rows)}: {len(rows)} of {n_models} models diverged in training: {what}; all rows of a run are "
        f"trained alike, so make another: {scale}lower the recipe's lr, which is {recipe.lr:g}, as dmpipeline init "
        f"OTHER --spec RUN/run.yaml --set lr={recipe.lr / 10:.3g}",
        rows=list(rows),
    )
