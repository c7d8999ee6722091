# mypy: disable-error-code="call-arg"
# compiled kernels take their types from what they are called with

"""Layers of many models at once: batched products, and gradients written out by hand.

The parameters of a group of models lie in one array a layer, models first. Pictures lie with channels last, for the
kernels of `convolution`, and pooling runs along channels. Work space is allocated once a group, because page
faults cost more than sums.

Every axis of a product is padded to whole cache lines, so that a model's numbers lie alike wherever in a group it is:
matrix products round differently at another alignment, and a row would depend on its place.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dmpipeline.training.architecture import Convolution, Described, Linear, MaxPooling, Rectifier, padded
from dmpipeline.training.kernels.convolution import (
    Units,
    add_gradients,
    border,
    bordered_size,
    convolve,
    convolve_and_pool,
    corners_of_places,
    filter_lines,
    learned_numbers,
    steps_to_winners,
)
from dmpipeline.training.kernels.pooling import pool, unpool

State = Mapping[str, Tensor]
"""A network's parameters and buffers by name; those of a group with models first."""

Space = dict[str, Tensor]
"""Where a layer puts its outputs, and what it leaves there for its gradients."""

_NEAR_BYTES = 2**16  # of pictures whose gradients are added up at a time, to stay in a core's own cache


@dataclass(slots=True)
class Parameter:
    """Numbers that are learned, of all models, shape (n_models, n_inputs or 1, n_outputs), and how fast they move."""

    value: Tensor
    velocity: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.velocity = torch.zeros_like(self.value)


class Layer(Protocol):
    """One layer of a group of networks."""

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """What is learned."""

    def space(self, n_models: int, batch: int, /, *, is_training: bool) -> Space:
        """Allocate for `batch` examples of each model."""

    def forward(self, x: Tensor, space: Space, /) -> Tensor:
        """Compute outputs (n_models, batch, ...) of inputs."""

    def backward(self, error: Tensor, space: Space, momentum: float, /) -> Tensor:
        """Slow the parameters' velocities by `momentum`, add the gradients, and return that of the inputs."""

    def state(self, model: int, /) -> dict[str, Tensor]:
        """Return what a model has learned, under the names and in the shapes of the network's own layer."""


def stacked_layer(layer: Described, states: State) -> Layer:
    """Make one layer of a group from its description and from where the models begin."""
    match layer:
        case Linear():
            return _Linear(layer, states[f"{layer.name}.weight"], states[f"{layer.name}.bias"])
        case Convolution():
            return _Convolution(layer, states[f"{layer.name}.weight"], states[f"{layer.name}.bias"])
        case MaxPooling():
            return _MaxPooling(layer)
        case Rectifier():
            return _Rectifier()


class _Linear:
    """Products with weights (n_models, n_inputs, n_outputs)."""

    def __init__(self, layer: Linear, weights: Tensor, biases: Tensor) -> None:
        self.layer, n_models = layer, len(weights)
        weight = torch.zeros(n_models, layer.width, padded(layer.n_outputs))
        bias = torch.zeros(n_models, 1, padded(layer.n_outputs))
        weight[:, layer.places, : layer.n_outputs] = weights.transpose(1, 2)
        bias[:, 0, : layer.n_outputs] = biases
        self.parameters = (Parameter(weight), Parameter(bias))

    def space(self, n_models: int, batch: int, *, is_training: bool) -> Space:
        _, n_inputs, n_outputs = self.parameters[0].value.shape
        space = {"out": torch.empty(n_models, batch, n_outputs)}
        if is_training and not self.layer.is_first:
            space["back"] = torch.empty(n_models, batch, n_inputs)
        return space

    def forward(self, x: Tensor, space: Space) -> Tensor:
        weight, bias = self.parameters
        space["x"] = x.flatten(2)
        return torch.baddbmm(bias.value, space["x"], weight.value, out=space["out"])

    def backward(self, error: Tensor, space: Space, momentum: float) -> Tensor:
        weight, bias = self.parameters
        weight.velocity.baddbmm_(space["x"].transpose(1, 2), error, beta=momentum)
        bias.velocity.mul_(momentum).add_(error.sum(1, keepdim=True))
        return error if self.layer.is_first else torch.bmm(error, weight.value.transpose(1, 2), out=space["back"])

    def state(self, model: int) -> dict[str, Tensor]:
        weight, bias = (parameter.value[model] for parameter in self.parameters)
        return {
            f"{self.layer.name}.weight": weight[self.layer.places, : self.layer.n_outputs].T.contiguous(),
            f"{self.layer.name}.bias": bias[0, : self.layer.n_outputs].clone(),
        }


class _Convolution:
    """Filters for pictures, and what is pooled and rectified in the same pass; see `convolution`."""

    def __init__(self, layer: Convolution, weights: Tensor, biases: Tensor) -> None:
        self.layer = layer
        self.form = form = layer.form
        self.window = window = 2 if layer.is_pooled else 1
        mask, corners = learned_numbers(form), corners_of_places(form, window)
        self._tables = (filter_lines(form), mask, corners, steps_to_winners(form))
        self._chunk = max(2, _NEAR_BYTES // (4 * bordered_size(form, 1)))
        weight = torch.zeros(len(weights), padded(form.n_outputs), len(mask))
        bias = torch.zeros(len(weights), padded(form.n_outputs))
        self._filters(weight)[..., : layer.n_inputs] = weights.permute(0, 1, 3, 4, 2)
        bias[:, : form.n_outputs] = biases
        self.parameters = (Parameter(weight), Parameter(bias))

    def _filters(self, weight: Tensor) -> Tensor:
        """View what is learned of the filters, (n_models, n_outputs, taps, taps, channels)."""
        taps, run, n_outputs = self.form.taps, self.form.taps * self.form.channels, self.form.n_outputs
        rows = weight[:, :n_outputs, : taps * padded(run)].view(-1, n_outputs, taps, padded(run))
        return rows[..., :run].view(-1, n_outputs, taps, taps, self.form.channels)

    def space(self, n_models: int, batch: int, *, is_training: bool) -> Space:
        form, (n_places, n_outputs) = self.form, (len(self._tables[2]), padded(self.form.n_outputs))
        n_winners = n_places if self.layer.is_pooled else 0
        space = {
            "bordered": torch.zeros(bordered_size(form, n_models * batch)),
            "filters": torch.empty(n_outputs * form.taps**2 * form.channels),
            "out": torch.empty(n_models, batch, n_places, n_outputs),
            "winner": torch.empty(n_models, batch, n_winners, n_outputs, dtype=torch.int8),
        }
        if is_training:
            chunk = min(self._chunk, batch)
            space["corners"] = torch.empty(chunk * n_places + 1, dtype=torch.int64)
            space["errors"] = torch.empty(chunk * n_places + 1)
            space["back_bordered"] = torch.empty(0 if self.layer.is_first else bordered_size(form, chunk))
            picture = form.height * form.width * form.channels
            space["back"] = torch.empty(n_models, 0 if self.layer.is_first else batch, picture)
        return space

    def forward(self, x: Tensor, space: Space) -> Tensor:
        weight, bias = (parameter.value.numpy() for parameter in self.parameters)
        bordered, out, filters = space["bordered"].numpy(), space["out"].numpy(), space["filters"].numpy()
        border(x.reshape(x.shape[0] * x.shape[1], -1).numpy(), self.form, bordered)
        if self.layer.is_pooled:
            winner = space["winner"].numpy()
            convolve_and_pool(bordered, self.form, weight, bias, filters, self.layer.is_rectified, out, winner)
        else:
            convolve(bordered, self.form, weight, bias, filters, out)
        height, width = self.form.height // self.window, self.form.width // self.window
        return space["out"].view(*x.shape[:2], height, width, -1)

    def backward(self, error: Tensor, space: Space, momentum: float) -> Tensor:
        weight, bias = self.parameters
        add_gradients(
            space["bordered"].numpy(),
            self.form,
            weight.value.numpy(),
            error.view_as(space["out"]).numpy(),
            space["winner"].numpy(),
            self._tables,
            Units(space["corners"].numpy(), space["errors"].numpy()),
            min(self._chunk, error.shape[1]),
            weight.velocity.mul_(momentum).numpy(),
            bias.velocity.mul_(momentum).numpy(),
            space["back_bordered"].numpy(),
            space["back"].numpy(),
        )
        return space["back"]

    def state(self, model: int) -> dict[str, Tensor]:
        weight, bias = (parameter.value for parameter in self.parameters)
        filters = self._filters(weight)[model, ..., : self.layer.n_inputs]
        return {
            f"{self.layer.name}.weight": filters.permute(0, 3, 1, 2).contiguous(),
            f"{self.layer.name}.bias": bias[model, : self.form.n_outputs].clone(),
        }


class _Unlearned:
    """A layer without parameters."""

    parameters: tuple[Parameter, ...] = ()

    def state(self, _model: int) -> dict[str, Tensor]:
        return {}


class _Rectifier(_Unlearned):
    def space(self, *_sizes: int, **_purpose: bool) -> Space:
        return {}

    def forward(self, x: Tensor, space: Space) -> Tensor:
        space["out"] = x.relu_()
        return x

    def backward(self, error: Tensor, space: Space, _momentum: float) -> Tensor:
        # only the sign of rectified units is wanted any more: 1 where active, else 0
        return error.view_as(space["out"]).mul_(space["out"].sign_())


class _MaxPooling(_Unlearned):
    def __init__(self, layer: MaxPooling) -> None:
        self.shape, self.window = (layer.height, layer.width, layer.channels), layer.window

    def space(self, n_models: int, batch: int, *, is_training: bool) -> Space:
        height, width, channels = self.shape
        pooled = (n_models, batch, height // self.window, width // self.window, channels)
        space = {"out": torch.empty(pooled), "winner": torch.empty(pooled, dtype=torch.int32)}
        if is_training:
            # what is beyond the last whole window stays zero
            space["back"] = torch.zeros(n_models, batch, *self.shape)
        return space

    def forward(self, x: Tensor, space: Space) -> Tensor:
        pool(*(t.flatten(0, 1).numpy() for t in (x, space["out"], space["winner"])), self.window)
        return space["out"]

    def backward(self, error: Tensor, space: Space, _momentum: float) -> Tensor:
        error = error.view_as(space["out"])
        unpool(*(t.flatten(0, 1).numpy() for t in (error, space["winner"], space["back"])), self.window)
        return space["back"]
