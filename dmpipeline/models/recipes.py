"""Recipes: a network with the way it is trained, named and versioned, as data.

A version never changes once models were trained with it; a better recipe is a new version. Hyperparameters can be
overridden in the run's spec, where they are then on record. Networks themselves are built from recipes by `networks`,
pictures altered as recipes say by `augmentation`. Code of the user's own is named by an import path, and imported only
when models are trained: reading a spec runs nothing.
"""

import hashlib
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from dmpipeline.errors import SpecError
from dmpipeline.models.usercode import import_object, is_import_path
from dmpipeline.spec import RecipeSpec, nearest_name, spec_error

# what pictures are shifted and scaled by is single precision; exact in Python, for whole numbers of any size
LARGEST_NUMBER = 2**127


def _numbers(value: Any) -> Any:
    """Take what YAML has for a tuple of numbers; refuse anything else as a whole, so that errors name the field."""
    if not isinstance(value, list | tuple):
        if value is None:
            return None
        raise ValueError("not a list")
    if not value or not all(isinstance(number, int | float) and not isinstance(number, bool) for number in value):
        raise ValueError("not numbers")
    if not all(abs(number) <= LARGEST_NUMBER for number in value):
        raise ValueError("not finite in single precision")
    return tuple(float(number) for number in value)


def _counts(value: Any) -> Any:
    if not isinstance(value, list | tuple) or not all(type(count) is int and count >= 1 for count in value):
        raise ValueError("not counts")
    if len(value) != 2:
        raise ValueError("not two")
    return tuple(value)


def _named(value: Any) -> Any:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) and name.isidentifier() for name in value):
        raise ValueError("no mapping of names")
    return dict(value)


def _import_path(value: Any) -> Any:
    if not isinstance(value, str) or not is_import_path(value):
        raise ValueError("not an import path")
    return value


# Constraints and words of a field lie in its type, so that a recipe need only say its own default.
Epochs = Annotated[int, Field(ge=1, description="a count of epochs, from 1", examples=[15])]
BatchSize = Annotated[int, Field(ge=1, description="a count of examples, from 1", examples=[64])]
StepSize = Annotated[float, Field(gt=0, allow_inf_nan=False, description="a positive step size", examples=[0.3])]
Schedule = Annotated[
    Literal["linear", "constant", "triangle"],
    Field(description="linear, constant or triangle", examples=["linear"]),
]
PeakEpoch = Annotated[
    float,
    Field(
        gt=0,
        allow_inf_nan=False,
        validate_default=True,
        description="the epoch of the triangle's peak, above 0 and below epochs",
        examples=[0.5],
    ),
]
Momentum = Annotated[float, Field(ge=0, lt=1, description="a number from 0 to below 1", examples=[0.9])]
Nesterov = Annotated[bool, Field(description="true, which needs momentum, or false", examples=[False])]
WeightDecay = Annotated[
    float, Field(ge=0, allow_inf_nan=False, description="a finite number, 0 or more", examples=[0.0005])
]
LabelSmoothing = Annotated[float, Field(ge=0, lt=1, description="a number from 0 to below 1", examples=[0.1])]
Flip = Annotated[
    Literal["none", "random", "alternating"], Field(description="none, random or alternating", examples=["random"])
]
Translate = Annotated[int, Field(ge=0, lt=2**14, description="a count of pixels, 0 for none", examples=[2])]
Cutout = Annotated[int, Field(ge=0, lt=2**15, description="a side in pixels, 0 for none", examples=[4])]
Mean = Annotated[
    tuple[float, ...] | None,
    BeforeValidator(_numbers),
    Field(
        description="a list of numbers on the scale 0..255, one a channel, or null", examples=[[125.3, 123.0, 113.9]]
    ),
]
Std = Annotated[
    tuple[float, ...] | None,
    BeforeValidator(_numbers),
    Field(
        validate_default=True,
        description="a list of positive numbers on the scale 0..255, as many as mean has, or null where mean is",
        examples=[[51.6, 50.8, 51.3]],
    ),
]
TestViews = Annotated[
    Literal["none", "mirror", "channel_flip"], Field(description="none, mirror or channel_flip", examples=["mirror"])
]
Precision = Annotated[Literal["single", "half"], Field(description="single or half", examples=["single"])]
ImportPath = Annotated[
    str,
    BeforeValidator(_import_path),
    Field(
        validate_default=True,
        description="an import path, package.module:name",
        examples=["my_package.networks:SmallNet"],
    ),
]
Arguments = Annotated[
    dict[str, Any],
    BeforeValidator(_named),
    Field(description="a mapping of argument names to values", examples=[{"width": 32}]),
]

CIFAR_MEAN = (125.307, 122.961, 113.8575)
CIFAR_STD = (51.5865, 50.847, 51.255)


class Recipe(BaseModel):
    """What is common to every recipe that this package trains: SGD with momentum on cross-entropy, pictures altered.

    An epoch is one pass over the subset in a new order; a last batch that would be short is left out, and a subset
    smaller than a batch is one batch. `mean` and `std` are on the scale 0..255 of pictures, one number a channel;
    without them pictures are on 0..1. `translate` and `cutout` are in pixels. `flip` is horizontal: `random` draws it
    for each example in each epoch, `alternating` draws an example's first and inverts it every other epoch (Jordan,
    94% on CIFAR-10 in 3.29 seconds on a single GPU, 2024). `tta` is whose logits are averaged at the end: those of the
    picture and its `mirror` image, or of the picture with its channels reversed (`channel_flip`, which the release's
    own code did; see `Resnet9Release`).
    Half precision is of GPUs: float16 one by one, bfloat16 under vmap; a CPU computes in single.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    version: int
    epochs: Epochs = 15
    batch_size: BatchSize = 64
    lr: StepSize = 0.3
    schedule: Schedule = "linear"
    peak_epoch: PeakEpoch = 0.5
    momentum: Momentum = 0.9
    nesterov: Nesterov = False
    weight_decay: WeightDecay = 0.0
    label_smoothing: LabelSmoothing = 0.0
    flip: Flip = "none"
    translate: Translate = 0
    cutout: Cutout = 0
    mean: Mean = None
    std: Std = None
    tta: TestViews = "none"
    precision: Precision = "single"

    @field_validator("peak_epoch")
    @classmethod
    def _peaks_before_the_end(cls, peak_epoch: float, info: ValidationInfo) -> float:
        if info.data.get("schedule") == "triangle" and peak_epoch >= info.data.get("epochs", np.inf):
            raise ValueError("not before the end")
        return peak_epoch

    @field_validator("nesterov")
    @classmethod
    def _nesterov_has_momentum(cls, nesterov: bool, info: ValidationInfo) -> bool:
        if nesterov and info.data.get("momentum") == 0:
            raise ValueError("nesterov without momentum")
        return nesterov

    @field_validator("std")
    @classmethod
    def _std_matches_mean(cls, std: tuple[float, ...] | None, info: ValidationInfo) -> tuple[float, ...] | None:
        if "mean" not in info.data:  # it was refused itself
            return std
        mean = info.data["mean"]
        if len(std or ()) != len(mean or ()) or any(deviation <= 0 for deviation in std or ()):
            raise ValueError("not a deviation for each mean")
        return std

    def rate(self, step: int, steps_each: int) -> float:
        """Return the step size of one step.

        Parameters
        ----------
        step : int
            From 0 to below epochs * steps_each.
        steps_each : int
            Count of steps in an epoch.

        Returns
        -------
        rate : float
            `linear` falls from lr towards zero, `constant` stays, `triangle` rises from zero at the first step to lr
            at `peak_epoch` and falls to zero after the last epoch (the release's schedule).
        """
        n_steps = self.epochs * steps_each
        match self.schedule:
            case "linear":
                return self.lr * (1 - step / n_steps)
            case "triangle":
                return self.lr * float(np.interp(step, [0, self.peak_epoch * steps_each, n_steps], [0, 1, 0]))
            case "constant":
                return self.lr


class Perceptron(Recipe):
    """One hidden layer of rectified units, trained by plain SGD with momentum on cross-entropy.

    Every parameter starts uniform within one over the square root of its layer's inputs. The step size falls linearly
    from `lr` towards zero, or stays. It matters: on digits, retrainings of one subset agree far better when it falls,
    and the LDS of datamodels rises with that from 0.72 to 0.81.
    """

    name: Literal["perceptron"] = "perceptron"
    version: Literal[1] = 1
    hidden: int = Field(default=64, ge=1, description="a count of hidden units, from 1", examples=[64])


class LogisticRegression(Recipe):
    """A linear layer: multinomial logistic regression by SGD, without a penalty unless `weight_decay` sets one."""

    name: Literal["logistic-regression"] = "logistic-regression"
    version: Literal[1] = 1


class ConvNet(Recipe):
    """A small net for small pictures: two 3 x 3 convolutions, each max-pooled by 2 and rectified, and a linear layer.

    Pictures need 4 pixels a side or more.
    """

    name: Literal["convnet"] = "convnet"
    version: Literal[1] = 1
    epochs: Epochs = 12
    lr: StepSize = 0.15
    channels: Annotated[
        tuple[int, int],
        BeforeValidator(_counts),
        Field(description="two counts of channels, from 1", examples=[[16, 32]]),
    ] = (16, 32)


class Resnet9Release(Recipe):
    """The release's ResNet-9 on CIFAR-10, to the digit of its public code (MadryLab/datamodels, train_cifar.py).

    Two things of that code are kept on purpose. `tta` is `channel_flip`: its flip at test time is torch's fliplr on
    NCHW, which reverses the channels and not the width, so the released margins may hold it; `tta: mirror` is what was
    meant. And a cutout never covers the last row or column (`augmentation.augmented`). One thing differs: shifted-in
    pixels and cutouts are filled with the mean exactly, where that code rounds it down to whole numbers first.
    """

    name: Literal["resnet9-release"] = "resnet9-release"
    version: Literal[1] = 1
    epochs: Epochs = 24
    batch_size: BatchSize = 512
    lr: StepSize = 0.5
    schedule: Schedule = "triangle"
    peak_epoch: PeakEpoch = 5.0
    weight_decay: WeightDecay = 5e-4
    label_smoothing: LabelSmoothing = 0.1
    flip: Flip = "random"
    translate: Translate = 2
    cutout: Cutout = 4
    mean: Mean = CIFAR_MEAN
    std: Std = CIFAR_STD
    tta: TestViews = "channel_flip"
    precision: Precision = "half"


class Resnet18Release(Recipe):
    """A ResNet-18 for FMoW, as far as the release's is known: no public code trains it.

    Second-hand: the network, 15 epochs, batches of 512, a peak step size of 0.4. Assumed, because the CIFAR-10 recipe
    has it: momentum, weight decay, the triangle with its peak at epoch 5, label smoothing, random flips, half
    precision. Assumed for want of anything: ImageNet's mean and deviation, the ImageNet form of the network (a 7 x 7
    first layer of stride 2 and a max pool), torch's default initial law, no translation, no cutout, no averaging at
    test time. Compare with released margins before relying on it.
    """

    name: Literal["resnet18-release"] = "resnet18-release"
    version: Literal[1] = 1
    epochs: Epochs = 15
    batch_size: BatchSize = 512
    lr: StepSize = 0.4
    schedule: Schedule = "triangle"
    peak_epoch: PeakEpoch = 5.0
    weight_decay: WeightDecay = 5e-4
    label_smoothing: LabelSmoothing = 0.1
    flip: Flip = "random"
    mean: Mean = (123.675, 116.28, 103.53)
    std: Std = (58.395, 57.12, 57.375)
    precision: Precision = "half"


class CifarFast(Recipe):
    """Another learner than the release's, for CIFAR-10 in seconds; its datamodels are not those of the release.

    In the manner of airbench94 (Jordan, 94% on CIFAR-10 in 3.29 seconds on a single GPU, 2024): a first layer of 2 x 2
    filters that whiten the pictures of the model's own subset, never trained; three groups of two convolutions with
    GELU; alternating flips, translation, Nesterov momentum, label smoothing, mirror images at test time. `lr` and
    `weight_decay` are airbench's put in terms of a mean loss over 1,024 examples.

    Simplified: no moving average of parameters (Lookahead), no larger step size for BatchNorm's biases, BatchNorm's
    scales are trained too, the whitening layer has no bias, ten whole epochs instead of 9.9, shifted-in pixels are the
    mean colour instead of a reflection, no shifted views at test time, the step size starts and ends at zero.
    """

    name: Literal["cifar-fast"] = "cifar-fast"
    version: Literal[1] = 1
    epochs: Epochs = 10
    batch_size: BatchSize = 1024
    lr: StepSize = 1.5
    schedule: Schedule = "triangle"
    peak_epoch: PeakEpoch = 2.3
    momentum: Momentum = 0.85
    nesterov: Nesterov = True
    weight_decay: WeightDecay = 1.3e-3
    label_smoothing: LabelSmoothing = 0.2
    flip: Flip = "alternating"
    translate: Translate = 2
    mean: Mean = CIFAR_MEAN
    std: Std = CIFAR_STD
    tta: TestViews = "mirror"
    precision: Precision = "half"
    widths: Annotated[
        tuple[int, int],
        BeforeValidator(_counts),
        Field(description="two counts of channels, of the first group and of the others, from 1", examples=[[64, 256]]),
    ] = (64, 256)


class Module(Recipe):
    """A network of the user's own, trained as the fields say.

    `network` is the import path of a torch.nn.Module class, or of a function that returns a new one; it is called with
    `arguments`. Its initial numbers are to come from torch's global generator on the CPU, which is seeded for each
    model by its number.
    """

    name: Literal["module"] = "module"
    version: Literal[1] = 1
    lr: StepSize = 0.1
    network: ImportPath = ""
    arguments: Arguments = Field(default_factory=dict)


class Function(BaseModel):
    """A learner of the user's own, whatever it is: a function that is given a subset and returns logits.

    `function` is its import path; for each model it is called as `function(dataset, mask, seed, **arguments)`, with the
    `datasets.Dataset`, the bool mask (n_train,) and a number that is the model's own, and returns the pair
    (train_logits, test_logits), of shapes (n_train, n_classes) and (n_test, n_classes): of all examples, whether in the
    subset or not, and with a column for every class of the dataset, also those that the subset lacks. For a regression
    these are predictions, (n_train,) and (n_test,) where one number is predicted.

    `seed` is from 0 to 2**32 - 1, as scikit-learn's `random_state`, `numpy.random.seed` and `random.seed` take it. A
    function with a parameter named `seed64` is given a number from 0 to 2**64 - 1 there as well, which no two models
    are likely ever to share. torch's global generators are seeded by that number before each call, and put back. Of
    version 1 `seed` is that number of 64 bits; runs that were created with it keep it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Literal["function"] = "function"
    version: Literal[1, 2] = 2
    function: ImportPath = ""
    arguments: Arguments = Field(default_factory=dict)


AnyRecipe = Recipe | Function

type_of_recipe: dict[tuple[str, int], type[AnyRecipe]] = {
    ("perceptron", 1): Perceptron,
    ("logistic-regression", 1): LogisticRegression,
    ("convnet", 1): ConvNet,
    ("resnet9-release", 1): Resnet9Release,
    ("resnet18-release", 1): Resnet18Release,
    ("cifar-fast", 1): CifarFast,
    ("module", 1): Module,
    ("function", 1): Function,
    ("function", 2): Function,
}


def find_recipe(spec: RecipeSpec) -> AnyRecipe:
    """Look up the recipe that a spec names, with its overrides; imports nothing.

    Raises
    ------
    SpecError
        If no recipe has this name and version, or it has no such hyperparameter, or a value cannot be used.
    """
    kind = type_of_recipe.get((spec.name, spec.version))
    if kind is None:
        raise _unknown_recipe(spec)
    try:
        return kind.model_validate({"version": spec.version} | spec.overrides)
    except ValidationError as error:
        raise spec_error(error, kind, within="recipe.") from error


def code_digest(recipe: AnyRecipe) -> str | None:
    """Compute the digest of the user's code behind a recipe, by which a run knows that it changed.

    Returns
    -------
    digest : str or None
        SHA-256, in hexadecimal, of the file that defines the class or function (of that file alone, not of what it
        imports); None for the recipes of this package, whose versions stand for their code.

    Raises
    ------
    SpecError
        As `import_object`, or if the object has no file.
    """
    if isinstance(recipe, Module):
        path = recipe.network
    elif isinstance(recipe, Function):
        path = recipe.function
    else:
        return None
    found = inspect.unwrap(import_object(path))
    module = importlib.import_module(path.partition(":")[0])
    # an instance that can be called, or a partial, has no file of its own: that of the module it is named in counts
    home = inspect.getmodule(found) if inspect.isclass(found) or inspect.isroutine(found) else module
    file = getattr(home, "__file__", None)
    try:
        return hashlib.sha256(Path(file or "").read_bytes()).hexdigest()
    except OSError as error:
        wrong = f"import path {path!r} has no source file that can be read; put it into a module of your own"
        raise SpecError(wrong, value=path) from error


def _unknown_recipe(spec: RecipeSpec) -> SpecError:
    versions = [version for name, version in type_of_recipe if name == spec.name]
    if versions:
        wrong = f"recipe.version {spec.version} of {spec.name} does not exist; choose {' or '.join(map(str, versions))}"
        return SpecError(wrong, field="recipe.version", value=spec.version)
    nearest = nearest_name(spec.name, {name for name, _ in type_of_recipe})
    return SpecError(
        f"recipe.name {spec.name!r} does not exist; choose {nearest}", field="recipe.name", value=spec.name
    )
