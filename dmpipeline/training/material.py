"""What all groups of a run's models share: the dataset on the device, and the form of their network."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dmpipeline.data.examples import Dataset, as_features
from dmpipeline.errors import SpecError, UserCodeError
from dmpipeline.models.augmentation import normalised
from dmpipeline.models.networks import build_network
from dmpipeline.models.outputs import as_tensor
from dmpipeline.models.recipes import LogisticRegression, Module, Perceptron, Recipe
from dmpipeline.models.usercode import explained
from dmpipeline.training.stacked import laid_out, true_outputs
from dmpipeline.training.way import Method

COMPILER = "inductor"
"""What `torch.compile` compiles with, by default."""


@dataclass(frozen=True)
class Material:
    """What every group of a run shares: its dataset on the device, and its network's form.

    Attributes
    ----------
    dataset : Dataset
    recipe : Recipe
    device : torch.device
    network : torch.nn.Module
        Structure alone, on the CPU; see `networks.build_network`.
    compiler : str or callable
        What `torch.compile` compiles with, as its `backend`.
    """

    dataset: Dataset
    recipe: Recipe
    device: torch.device
    network: nn.Module
    compiler: str | Callable[..., Any] = COMPILER

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        recipe: Recipe,
        device: str | torch.device = "cpu",
        *,
        compiler: str | Callable[..., Any] = COMPILER,
    ) -> "Material":
        """Build the network for a dataset's examples.

        Raises
        ------
        SpecError
            If the recipe's network cannot take them, or returns outputs of another shape than what is to be predicted.
        """
        shape = _input_shape(dataset, recipe)
        material = cls(dataset, recipe, torch.device(device), build_network(recipe, shape, dataset.n_classes), compiler)
        _check_network(material)
        return material

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of an example as the network takes it: (n_features,), (channels, height, width) or (n_positions,)."""
        return _input_shape(self.dataset, self.recipe)

    @property
    def is_altered(self) -> bool:
        """Whether examples are altered at random while training."""
        recipe = self.recipe
        return recipe.flip != "none" or bool(recipe.translate) or bool(recipe.cutout)

    @functools.cached_property
    def train_inputs(self) -> Tensor:
        """All training inputs, on the device, scaled as the dataset says; pictures as they are stored."""
        return self._resident(self.dataset.train_inputs)

    @functools.cached_property
    def test_inputs(self) -> Tensor:
        """All test inputs, on the device, scaled as the training inputs are; pictures as they are stored."""
        return self._resident(self.dataset.test_inputs)

    @functools.cached_property
    def labels(self) -> Tensor:
        """Labels of the training examples, on the device; a regression's scaled as the dataset says."""
        labels, scaling = self.dataset.train_labels, self.dataset.scaling
        moments = None if scaling is None else scaling.labels
        return self._on_device(labels if moments is None else moments.standardised(labels))

    @functools.cached_property
    def draws(self) -> bool:
        """Whether the network draws random numbers while it trains, as dropout does."""
        twin = copy.deepcopy(self.network)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            before = torch.get_rng_state()
            twin(self.blank_inputs)
            return not torch.equal(torch.get_rng_state(), before)

    @property
    def blank_inputs(self) -> Tensor:
        """Two examples of zeros, on the CPU, to try the network on."""
        is_tokens = self.dataset.train_inputs.dtype.kind == "i"
        return torch.zeros(2, *self.input_shape, dtype=torch.int64 if is_tokens else torch.float32)

    @functools.cached_property
    def compiled(self) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        """A network on the device and its compiled form: made once, for each model's numbers in turn."""
        network = copy.deepcopy(self.network).to(self.device)
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        return network, torch.compile(network, backend=self.compiler, mode=mode, dynamic=False)

    def prepare(self, method: Method) -> None:
        """Make what groups share before threads start that would each make it."""
        if method == "products":
            _ = self.laid_out
        else:
            _ = self.train_inputs, self.test_inputs, self.labels

    def network_inputs(self, stored: Tensor) -> Tensor:
        """Turn some stored examples into what the network takes."""
        if len(self.input_shape) != 3:
            return stored
        if self.dataset.image_shape is None:
            raise ValueError("pictures without a shape")
        return normalised(stored, self.dataset.image_shape, self.recipe)

    def in_units(self, outputs: Tensor) -> Tensor:
        """Return a network's outputs, on the CPU, in the units of the labels, where training scales those."""
        scaling = self.dataset.scaling
        if scaling is None or scaling.labels is None:
            return outputs
        mean, std = (torch.from_numpy(np.asarray(numbers)) for numbers in (scaling.labels.mean, scaling.labels.std))
        return (outputs.double() * std + mean).float()

    @functools.cached_property
    def laid_out(self) -> tuple[Tensor, Tensor, Tensor]:
        """Train inputs, test inputs and true outputs as `layers` takes them."""
        train, test = (
            laid_out(self.network, self.network_inputs(part)) for part in (self.train_inputs, self.test_inputs)
        )
        return train, test, true_outputs(self.labels, self.dataset.n_classes, self.recipe.label_smoothing)

    def _resident(self, inputs: np.ndarray[Any, Any]) -> Tensor:
        if self.dataset.scaling is not None and self.dataset.scaling.inputs is not None:
            inputs = self.dataset.scaling.inputs.standardised(inputs)
        is_as_stored = len(self.input_shape) == 3 or inputs.dtype.kind == "i"
        return self._on_device(inputs if is_as_stored else as_features(inputs))

    def _on_device(self, numbers: np.ndarray[Any, Any]) -> Tensor:
        return as_tensor(numbers).to(self.device)


def _input_shape(dataset: Dataset, recipe: Recipe) -> tuple[int, ...]:
    shape = dataset.image_shape
    if shape is None or dataset.train_inputs.dtype.kind == "i":
        return dataset.train_inputs.shape[1:] if dataset.train_inputs.dtype.kind == "i" else (dataset.n_features,)
    if isinstance(recipe, Perceptron | LogisticRegression):
        return (dataset.n_features,)
    height, width, *channels = shape
    return (channels[0] if channels else 1, height, width)


def _check_network(material: Material) -> None:
    """Refuse a network that cannot take the dataset's examples, or does not return what is to be predicted."""
    dataset, recipe, inputs = material.dataset, material.recipe, material.blank_inputs
    twin = copy.deepcopy(material.network).eval()
    wanted = (2, *dataset.train_labels.shape[1:], *(() if dataset.is_regression else (dataset.n_classes,)))
    of = f"of {dataset.name}, {inputs.dtype} of shape {tuple(inputs.shape)} for two examples"
    path = recipe.network if isinstance(recipe, Module) else ""
    remedy = "fix its network" if path else "choose another recipe"
    facts: dict[str, Any] = {"field": "recipe.name", "value": recipe.name}
    what = f"recipe {recipe.name}{path and f' {path!r}'} cannot take the inputs {of}: it"
    kind = UserCodeError if path else SpecError
    with explained(what, path, kind=kind, remedy=remedy, **facts), torch.random.fork_rng(devices=[]), torch.no_grad():
        outputs = twin(inputs)
    found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if found != wanted and not (dataset.is_regression and found == (2, dataset.n_classes)):
        raise SpecError(
            f"recipe {recipe.name} makes {found} of the inputs {of}; have its network return a tensor of shape "
            f"{wanted}, float",
            field="recipe.name",
            value=found,
        )
