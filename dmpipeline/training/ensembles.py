"""Groups of models in training on one device, by whichever method suits their network, behind one protocol.

- ``products``: `stacked.StackedNetworks`, for small networks of plain layers on a CPU;
- ``vmap``: any network that torch can batch over models, its parameters stacked, differentiated automatically;
- ``loop``: any network, a model at a time.

A group takes the same steps in each of them, but for rounding: SGD as `torch.optim.SGD` has it, on the mean loss of
each model over its own batch.
"""

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dmpipeline.errors import SpecError
from dmpipeline.models.augmentation import augmented, tta_views
from dmpipeline.models.networks import named_tensors
from dmpipeline.models.recipes import Recipe
from dmpipeline.training.architecture import can_stack
from dmpipeline.training.layers import State
from dmpipeline.training.material import Material
from dmpipeline.training.stacked import StackedNetworks, n_models_of
from dmpipeline.training.way import Method as Method  # other floors know it from here

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
        """Return what each model has learned, as states of the network, on the CPU."""


def possible_methods(material: Material) -> tuple[Method, ...]:
    """List the ways in which a network can be trained, the one that treats the most models at once first."""
    recipe, dataset = material.recipe, material.dataset
    if not _can_vmap(material):
        return ("loop",)
    plain = not material.is_altered and recipe.tta == "none" and not recipe.nesterov and not dataset.is_sequence
    if material.device.type == "cpu" and plain and can_stack(material.network, material.input_shape):
        return ("products", "vmap", "loop")
    return ("vmap", "loop")


def impossible_method(recipe: Recipe, method: Method, possible: tuple[Method, ...]) -> SpecError:
    """Make the error for a method that is not among the possible ones."""
    return SpecError(
        f"{recipe.name} cannot be trained by {method} here; choose {' or '.join(possible)}",
        field="method",
        value=method,
    )


def begin_group(material: Material, method: Method, states: State, batch: int, *, compiled: bool = False) -> Group:
    """Set up a group whose models begin with these states, models first, and whose steps take `batch` examples.

    With `compiled`, for the method loop alone, it has the material's one compiled network until the next is set up.
    """
    if method == "products":
        return _Products(material, states, batch)
    if method == "loop" and n_models_of(states) != 1:
        raise ValueError("a loop trains one model at a time")
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
        # scaling of one model's loss must not depend on another's gradients, and bfloat16 needs none
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
            # batches of an evaluation have other sizes, which would each be compiled
            outputs: Tensor = (self._trained if self.network.training else self.network)(alone)
            return outputs[None]

    def _functional(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Tensor) -> Tensor:
        outputs: Tensor = torch.func.functional_call(self.network, (parameters, buffers), (inputs,))
        return outputs


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
    """Have torch use, inside the block, only what returns the same numbers every time on the same device."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
