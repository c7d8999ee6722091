"""What trains a run's models, as other floors import it: each model on its own subset, as its recipe says."""

from dmpipeline.data.examples import Dataset
from dmpipeline.models.recipes import AnyRecipe, Function
from dmpipeline.training.functions import FunctionTrainer
from dmpipeline.training.gradients import GradientTrainer, usable_device
from dmpipeline.training.logits import Logits
from dmpipeline.training.trainer import Trainer
from dmpipeline.training.way import Way

__all__ = ["FunctionTrainer", "GradientTrainer", "Logits", "Trainer", "Way", "make_trainer", "usable_device"]


def make_trainer(
    dataset: Dataset, recipe: AnyRecipe, *, seed: int, way: Way | None = None, device: str = "cpu"
) -> Trainer:
    """Make what trains a recipe's models.

    Raises
    ------
    SpecError
        If the recipe cannot be trained on the dataset, in this way or on this device, or its code cannot be imported.
    """
    if isinstance(recipe, Function):
        return FunctionTrainer(dataset, recipe, seed=seed)
    return GradientTrainer(dataset, recipe, seed=seed, way=way, device=device)
