"""Groups of models in training on one device, in whichever way suits their network: all of one face.

- ``products``: `layers.StackedNetworks`, for small networks of plain layers on a CPU;
- ``vmap``: any network that torch can batch over models, its parameters stacked, differentiated automatically;
- ``loop``: any network, a model at a time.

A group takes the same steps in each of them, but for rounding: SGD as `torch.optim.SGD` has it, on the mean loss of
each model over its own batch.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dmpipeline.augmentation import augmented, normalised, tta_views
from dmpipeline.errors import SpecError, UserCodeError
from dmpipeline.examples import Dataset, as_features
from dmpipeline.layers import StackedNetworks, State, can_stack, laid_out, n_models_of, true_outputs
from dmpipeline.networks import build_network, named_tensors
from dmpipeline.outputs import as_tensor
from dmpipeline.recipes import LogisticRegression, Module, Perceptron, Recipe
from dmpipeline.usercode import explained

Method = Literal["products", "vmap", "loop"]
"""How a group is trained."""

COMPILER = "inductor"
"""What `torch.compile` compiles with."""

_EVALUATED_EXAMPLES = 512  # at once, of all models of a group together


class Group(Protocol):
    """Some models in training together."""

    def step(self, examples: Tensor, words: Tensor | None, lr: float, /) -> None:
        """Take one step: each model on its own examples, (n_models, batch), altered as their words say."""

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Compute outputs on all train and all test examples, float32 (n_models, n, ...) on the CPU.

        Those of a regression are in the units of the labels.
        """

    def states(self) -> list[dict[str, Tensor]]:
        """Give what each model has learned, as states of the network, on the CPU."""


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
    """

    dataset: Dataset
    recipe: Recipe
    device: torch.device
    network: nn.Module

    @classmethod
    def of(cls, dataset: Dataset, recipe: Recipe, device: str | torch.device = "cpu") -> "Material":
        """Build the network for a dataset's examples.

        Raises
        ------
        SpecError
            If the recipe's network cannot take them, or gives outputs of another shape than is to be predicted.
        """
        shape = _input_shape(dataset, recipe)
        material = cls(dataset, recipe, torch.device(device), build_network(recipe, shape, dataset.n_classes))
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
        """All of the dataset's, on the device, scaled as the dataset says; pictures as they are stored."""
        return self._resident(self.dataset.train_inputs)

    @functools.cached_property
    def test_inputs(self) -> Tensor:
        """All of the dataset's, on the device, scaled as the training inputs are; pictures as they are stored."""
        return self._resident(self.dataset.test_inputs)

    @functools.cached_property
    def labels(self) -> Tensor:
        """Those of the train examples, on the device; a regression's scaled as the dataset says."""
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
        """Two examples of nothing but zeros, on the CPU, to try the network on."""
        is_tokens = self.dataset.train_inputs.dtype.kind == "i"
        return torch.zeros(2, *self.input_shape, dtype=torch.int64 if is_tokens else torch.float32)

    @functools.cached_property
    def compiled(self) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        """A network on the device and its compiled form: made once, for each model's numbers in turn."""
        network = copy.deepcopy(self.network).to(self.device)
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        return network, torch.compile(network, backend=COMPILER, mode=mode, dynamic=False)

    def prepare(self, method: Method) -> None:
        """Make what groups share, before threads come that would each make it."""
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


def possible_methods(material: Material) -> tuple[Method, ...]:
    """List the ways in which a network can be trained, the one that treats the most models at once first."""
    recipe, dataset = material.recipe, material.dataset
    if not _can_vmap(material):
        return ("loop",)
    plain = not material.is_altered and recipe.tta == "none" and not recipe.nesterov and not dataset.is_sequence
    if material.device.type == "cpu" and plain and can_stack(material.network, material.input_shape):
        return ("products", "vmap", "loop")
    return ("vmap", "loop")


def begin_group(material: Material, method: Method, states: State, batch: int, *, compiled: bool = False) -> Group:
    """Set up a group whose models begin with these states, models first, and take steps on so many examples.

    With `compiled`, for the method loop alone, it has the material's one compiled network until the next is set up.
    """
    if method == "products":
        return _Products(material, states, batch)
    if method == "loop" and n_models_of(states) != 1:
        raise ValueError("a loop has one model at a time")
    return _Differentiated(material, states, is_stacked=method == "vmap", is_compiled=compiled)


def stacked_networks(material: Material, states: State, batch: int) -> StackedNetworks:
    """Stack models that begin with these states, for the method products."""
    if not isinstance(material.network, nn.Sequential):
        raise TypeError("a network without stacked layers")
    return StackedNetworks(
        material.network,
        states,
        input_shape=material.input_shape,
        batch=batch,
        momentum=material.recipe.momentum,
        weight_decay=material.recipe.weight_decay,
        is_regression=material.dataset.is_regression,
    )


def mean_losses(outputs: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Mean loss of each model.

    Parameters
    ----------
    outputs : float tensor, shape (n_models, batch, n_outputs)
        Of sequences (n_models, batch, n_positions, n_tokens).
    labels : tensor, shape (n_models, batch, ...)
        Numbers of a regression, whose squared errors are averaged; or classes, by cross-entropy, -1 where there is
        nothing to predict.
    label_smoothing : float

    Returns
    -------
    losses : float tensor, shape (n_models,)
    """
    n_models = len(outputs)
    if labels.is_floating_point():
        return (outputs.float().reshape(n_models, -1) - labels.reshape(n_models, -1)).square().mean(1)
    flat = labels.reshape(-1)
    each = torch.nn.functional.cross_entropy(
        outputs.float().reshape(len(flat), -1),
        flat,
        ignore_index=-1,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    counts = (flat >= 0).view(n_models, -1).sum(1).clamp(min=1)
    return each.view(n_models, -1).sum(1) / counts


class _Products:
    def __init__(self, material: Material, states: State, batch: int) -> None:
        self.in_units = material.in_units
        self.inputs, self.test_inputs, self.truth = material.laid_out
        self.networks = stacked_networks(material, states, batch)

    def step(self, examples: Tensor, _words: Tensor | None, lr: float) -> None:
        self.networks.step(self.inputs, self.truth, examples, lr)

    def outputs(self) -> tuple[Tensor, Tensor]:
        train, test = (self.networks.outputs(part) for part in (self.inputs, self.test_inputs))
        return self.in_units(train), self.in_units(test)

    def states(self) -> list[dict[str, Tensor]]:
        return self.networks.states()


class _Differentiated:
    """Models whose gradients torch finds: one, or several under vmap with their numbers stacked."""

    def __init__(self, material: Material, states: State, *, is_stacked: bool, is_compiled: bool) -> None:
        self.material, self.recipe, self.n_models = material, material.recipe, n_models_of(states)
        self.is_stacked = is_stacked
        if is_compiled:
            self.network, self._trained = material.compiled
        else:
            self.network = self._trained = copy.deepcopy(material.network).to(material.device)
        if is_stacked:
            tensors = {name: tensor.to(material.device) for name, tensor in states.items()}
            learned = [name for name, parameter in self.network.named_parameters() if parameter.requires_grad]
            self.parameters = {name: tensors.pop(name).requires_grad_() for name in learned}
            self.buffers = tensors
            self._batched = torch.func.vmap(self._functional)
        else:
            with torch.no_grad():
                for name, tensor in named_tensors(self.network):
                    tensor.copy_(states[name][0])
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.parameters = {n: p for n, p in self.network.named_parameters() if p.requires_grad}
        is_half = self.recipe.precision == "half" and material.device.type == "cuda"
        # scaling of one model's loss must not hang on another's gradients, and bfloat16 does without
        self._half = (torch.bfloat16 if is_stacked else torch.float16) if is_half else None
        self._scaler = torch.amp.GradScaler("cuda", enabled=is_half and not is_stacked)
        self._optimizer = torch.optim.SGD(
            self.parameters.values(),
            lr=self.recipe.lr,
            momentum=self.recipe.momentum,
            nesterov=self.recipe.nesterov,
            weight_decay=self.recipe.weight_decay,
            foreach=True,
        )

    def step(self, examples: Tensor, words: Tensor | None, lr: float) -> None:
        flat = examples.reshape(-1)
        inputs = self.material.network_inputs(self.material.train_inputs[flat])
        if words is not None:
            inputs = augmented(inputs, words.reshape(-1), self.recipe)
        labels = self.material.labels[flat]
        outputs = self._forward(inputs.view(self.n_models, -1, *inputs.shape[1:]))
        # gradients of the sum are each model's own
        losses = mean_losses(outputs, labels.view(self.n_models, -1, *labels.shape[1:]), self.recipe.label_smoothing)
        self._optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(losses.sum()).backward()  # type: ignore[no-untyped-call]
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._scaler.step(self._optimizer)
        self._scaler.update()

    def outputs(self) -> tuple[Tensor, Tensor]:
        self.network.eval()
        with torch.no_grad():
            material = self.material
            train, test = (self._all_outputs(part) for part in (material.train_inputs, material.test_inputs))
        self.network.train()
        return material.in_units(train), material.in_units(test)

    def states(self) -> list[dict[str, Tensor]]:
        if not self.is_stacked:
            return [{name: tensor.detach().cpu().clone() for name, tensor in named_tensors(self.network)}]
        stacked = self.parameters | self.buffers
        each = range(self.n_models)
        return [{name: tensor[model].detach().cpu().clone() for name, tensor in stacked.items()} for model in each]

    def _all_outputs(self, stored: Tensor) -> Tensor:
        parts = []
        for some in torch.split(stored, max(1, _EVALUATED_EXAMPLES // self.n_models)):
            inputs = self.material.network_inputs(some)
            views = tta_views(inputs, self.recipe) if len(self.material.input_shape) == 3 else [inputs]
            outputs = [self._forward(view.expand(self.n_models, *view.shape)).float() for view in views]
            parts.append((sum(outputs[1:], outputs[0]) / len(outputs)).cpu())
        return torch.cat(parts, dim=1)

    def _forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast(self.material.device.type, self._half, enabled=self._half is not None):
            if self.is_stacked:
                return self._batched(self.parameters, self.buffers, inputs)
            alone = inputs[0]
            if alone.ndim == 4:
                alone = alone.contiguous(memory_format=torch.channels_last)
            # evaluation has other sizes, for which nothing is worth compiling
            outputs: Tensor = (self._trained if self.network.training else self.network)(alone)
            return outputs[None]

    def _functional(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Tensor) -> Tensor:
        outputs: Tensor = torch.func.functional_call(self.network, (parameters, buffers), (inputs,))
        return outputs


def _input_shape(dataset: Dataset, recipe: Recipe) -> tuple[int, ...]:
    shape = dataset.image_shape
    if shape is None or dataset.train_inputs.dtype.kind == "i":
        return dataset.train_inputs.shape[1:] if dataset.train_inputs.dtype.kind == "i" else (dataset.n_features,)
    if isinstance(recipe, Perceptron | LogisticRegression):
        return (dataset.n_features,)
    height, width, *channels = shape
    return (channels[0] if channels else 1, height, width)


def _check_network(material: Material) -> None:
    """Refuse a network that cannot take the dataset's examples, or does not give what is to be predicted of them."""
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


@functools.lru_cache(maxsize=8)
def _vmaps(network: nn.Module, input_shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Try whether torch batches a network over models: not if it draws random numbers, looks at values, or has none."""
    state = {name: tensor.detach()[None] for name, tensor in named_tensors(network)}
    inputs = torch.zeros(1, 2, *input_shape, dtype=dtype)
    twin = copy.deepcopy(network)

    def forward(numbers: dict[str, Tensor], some: Tensor) -> Any:
        return torch.func.functional_call(twin, numbers, (some,))

    try:
        torch.func.vmap(forward)({name: tensor.clone() for name, tensor in state.items()}, inputs)
    except Exception:  # noqa: BLE001 - a user's network may raise anything when it meets what it was not written for
        return False
    return True


def _can_vmap(material: Material) -> bool:
    return _vmaps(material.network, material.input_shape, material.blank_inputs.dtype)


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Have torch choose, while the block runs, what gives the same numbers every time on the same device."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
