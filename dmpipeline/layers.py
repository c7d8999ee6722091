# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, disable-error-code="call-arg"
# compiled kernels take their types from what they are called with

"""Small networks that take their steps together: batched matrix products, gradients written out by hand.

The parameters of a group of models lie in one array a layer, models first. Pictures lie with channels last, for the
kernels of `convolution`, and pooling runs along channels. Work space is allocated once a group, for page faults cost
more than sums. Where products are small this is several times as fast as automatic differentiation of the same network;
what has no form here is trained otherwise (`ensembles`).

Every axis of a product is padded to whole cache lines, so that a model's numbers lie alike wherever in a group it is:
matrix products round differently at another alignment, and a row would depend on its place. They also do where several
threads share them: bits do not depend on the others of a group where torch has one thread, as in a worker of `train`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from dmpipeline.compute import kernel
from dmpipeline.convolution import (
    Form,
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
from dmpipeline.lines import LINE

State = Mapping[str, Tensor]
"""A network's parameters and buffers by name; those of a group with models first."""

Space = dict[str, Tensor]
"""Where a layer puts its outputs, and what it leaves there for its gradients."""

Learned = tuple[Tensor, Tensor]
"""A layer's weights and biases as torch has them, models first."""

_NEVER = -1e30  # the logit of a class that is only padding: its probability is 0
_OUTPUT_BYTES = 2**18  # of a layer of one model, where no gradients are wanted
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
        """Allocate for so many examples of each model."""

    def forward(self, x: Tensor, space: Space, /) -> Tensor:
        """Compute outputs (n_models, batch, ...) of inputs."""

    def backward(self, error: Tensor, space: Space, momentum: float, /) -> Tensor:
        """Slow the parameters' velocities by `momentum`, add the gradients, and return that of the inputs."""

    def state(self, model: int, /) -> dict[str, Tensor]:
        """Give what a model has learned, under the names and in the shapes of the network's own layer."""


def can_stack(network: nn.Module, input_shape: tuple[int, ...]) -> bool:
    """Tell whether every layer of a network has a form here; inputs are (n_features,) or (channels, height, width)."""
    if type(network) is not nn.Sequential or len(input_shape) not in (1, 3):
        return False
    layers = list(network)
    # a layer that is there twice is a child once
    if len(list(network.children())) != len(layers) or not all(map(_has_form, layers)):
        return False
    kinds = "".join(_SPELLED[type(layer)] for layer in layers)
    return bool(_OF_PICTURES.fullmatch(kinds) if len(input_shape) == 3 else _OF_FEATURES.fullmatch(kinds))


class StackedNetworks:
    """A group of networks of one form, and how they are trained.

    Parameters
    ----------
    network : torch.nn.Sequential
        One that `can_stack`; says the form.
    states : State
        Where the models begin.
    input_shape : tuple of int
        (n_features,), or (channels, height, width).
    batch : int
        Examples of a step.
    momentum, weight_decay : float
        As of `torch.optim.SGD`.
    is_regression : bool
        Whether the loss is the squared error, not the cross-entropy.
    """

    def __init__(
        self,
        network: nn.Sequential,
        states: State,
        *,
        input_shape: tuple[int, ...],
        batch: int,
        momentum: float,
        weight_decay: float,
        is_regression: bool,
    ) -> None:
        self.n_models, self.batch = n_models_of(states), batch
        self.momentum, self.weight_decay, self.is_regression = momentum, weight_decay, is_regression
        self.layers = list(_stacked(network, states, input_shape))
        self.n_outputs = _last(network).out_features
        self._spaces = [layer.space(self.n_models, batch, is_training=True) for layer in self.layers]
        self._x = torch.empty(self.n_models, batch, *laid_out_shape(network, input_shape))
        self._truth = torch.empty(self.n_models, batch, padded(self.n_outputs))

    def step(self, inputs: Tensor, truth: Tensor, examples: Tensor, lr: float) -> None:
        """Take one step of SGD on each model's mean loss.

        Parameters
        ----------
        inputs, truth : tensor of float32, shape (n, ...)
            All examples, as `laid_out` and `true_outputs` give them.
        examples : tensor of int64, shape (n_models, batch)
            Which of them the step is on.
        lr : float
        """
        chosen = examples.reshape(-1)
        torch.index_select(inputs, 0, chosen, out=self._x.view(-1, *inputs.shape[1:]))
        torch.index_select(truth, 0, chosen, out=self._truth.view(-1, truth.shape[1]))
        error = self._forward(self._x, self._spaces)
        # the gradient of the mean loss with respect to the outputs
        if self.is_regression:
            error.sub_(self._truth).mul_(2 / (self.batch * self.n_outputs))
        else:
            error[..., self.n_outputs :] = _NEVER
            torch.softmax(error, -1, out=error).sub_(self._truth).div_(self.batch)
        for layer, space in zip(reversed(self.layers), reversed(self._spaces), strict=True):
            error = layer.backward(error, space, self.momentum)
        for parameter in (parameter for layer in self.layers for parameter in layer.parameters):
            if self.weight_decay:
                parameter.velocity.add_(parameter.value, alpha=self.weight_decay)
            parameter.value.sub_(parameter.velocity, alpha=lr)

    def outputs(self, inputs: Tensor) -> Tensor:
        """Compute the outputs of every model on every input, float32 (n_models, n, n_outputs)."""
        of_one = [layer.space(1, 1, is_training=False) for layer in self.layers]
        largest = max(tensor.nbytes for space in of_one for tensor in space.values())
        # as many at once in a group of any size: products of fewer rows may round otherwise
        step = max(1, _OUTPUT_BYTES // largest)
        result = torch.empty(self.n_models, len(inputs), self.n_outputs)
        spaces = dict[int, list[Space]]()  # of whole parts, and of the last one
        for some, into in zip(inputs.split(step), result.split(step, dim=1), strict=True):
            if (n := len(some)) not in spaces:
                spaces[n] = [layer.space(self.n_models, n, is_training=False) for layer in self.layers]
            into.copy_(self._forward(some.expand(self.n_models, *some.shape), spaces[n])[..., : self.n_outputs])
        return result

    @property
    def nbytes(self) -> int:
        """Memory that the group is trained in."""
        learned = [(p.value, p.velocity) for layer in self.layers for p in layer.parameters]
        rooms = [space.values() for space in self._spaces]
        return sum(tensor.nbytes for some in (*learned, *rooms, (self._x, self._truth)) for tensor in some)

    def states(self) -> list[dict[str, Tensor]]:
        """Give what each model has learned, as states of the network."""
        each = range(self.n_models)
        return [{k: v for layer in self.layers for k, v in layer.state(model).items()} for model in each]

    def _forward(self, x: Tensor, spaces: Sequence[Space]) -> Tensor:
        for layer, space in zip(self.layers, spaces, strict=True):
            x = layer.forward(x, space)
        return x


def n_models_of(states: State) -> int:
    """Count the models that these are the states of."""
    return len(next(iter(states.values())))


def laid_out(network: nn.Module, inputs: Tensor) -> Tensor:
    """Lay inputs (n, n_features) or (n, channels, height, width) out as `StackedNetworks` of the network take them."""
    if _begins_with_convolution(network):
        return inputs.float().permute(0, 2, 3, 1).contiguous()
    return _padded(inputs.float().flatten(1))


def laid_out_shape(network: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one example that is `laid_out`."""
    if _begins_with_convolution(network):
        channels, height, width = input_shape
        return height, width, channels
    return (padded(torch.Size(input_shape).numel()),)


def true_outputs(labels: Tensor, n_outputs: int, label_smoothing: float = 0.0) -> Tensor:
    """Lay out what is to be predicted: classes (n,) as smoothed one-hot rows, numbers (n,) or (n, k) as they are."""
    if labels.is_floating_point():
        return _padded(labels.float().reshape(len(labels), -1))
    truth = torch.nn.functional.one_hot(labels, n_outputs).float()
    if label_smoothing:
        truth.mul_(1 - label_smoothing).add_(label_smoothing / n_outputs)
    return _padded(truth)


def padded(length: int) -> int:
    """Round a count of float32 numbers up to whole cache lines."""
    return -(-length // LINE) * LINE


class _Linear:
    """Products with weights (n_models, n_inputs, n_outputs); `places` tells where each of the network's inputs lies."""

    def __init__(self, name: str, learned: Learned, places: Tensor, width: int, *, first: bool) -> None:
        self.name, self.places, self.is_first = name, places, first
        n_models, self.n_outputs = learned[1].shape
        weight = torch.zeros(n_models, width, padded(self.n_outputs))
        bias = torch.zeros(n_models, 1, padded(self.n_outputs))
        weight[:, places, : self.n_outputs] = learned[0].transpose(1, 2)
        bias[:, 0, : self.n_outputs] = learned[1]
        self.parameters = (Parameter(weight), Parameter(bias))

    def space(self, n_models: int, batch: int, *, is_training: bool) -> Space:
        _, n_inputs, n_outputs = self.parameters[0].value.shape
        space = {"out": torch.empty(n_models, batch, n_outputs)}
        if is_training and not self.is_first:
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
        return error if self.is_first else torch.bmm(error, weight.value.transpose(1, 2), out=space["back"])

    def state(self, model: int) -> dict[str, Tensor]:
        weight, bias = (parameter.value[model] for parameter in self.parameters)
        return {
            f"{self.name}.weight": weight[self.places, : self.n_outputs].T.contiguous(),
            f"{self.name}.bias": bias[0, : self.n_outputs].clone(),
        }


class _Convolution:
    """Filters for pictures whose size they keep, perhaps pooled by 2 and rectified with them; see `convolution`."""

    def __init__(
        self, name: str, learned: Learned, form: Form, *, is_pooled: bool, is_rectified: bool, first: bool
    ) -> None:
        self.name, self.form, self.is_pooled, self.is_rectified = name, form, is_pooled, is_rectified
        self.is_first, self.n_inputs = first, learned[0].shape[2]
        self.shape = (form.height // 2, form.width // 2) if is_pooled else (form.height, form.width)
        mask, corners = learned_numbers(form), corners_of_places(form, 2 if is_pooled else 1)
        self._tables = (filter_lines(form), mask, corners, steps_to_winners(form))
        self._chunk = max(2, _NEAR_BYTES // (4 * bordered_size(form, 1)))
        weight = torch.zeros(len(learned[0]), padded(form.n_outputs), len(mask))
        bias = torch.zeros(len(learned[0]), padded(form.n_outputs))
        self._filters(weight)[..., : self.n_inputs] = learned[0].permute(0, 1, 3, 4, 2)
        bias[:, : form.n_outputs] = learned[1]
        self.parameters = (Parameter(weight), Parameter(bias))

    def _filters(self, weight: Tensor) -> Tensor:
        """View what is learned of the filters, (n_models, n_outputs, taps, taps, channels)."""
        taps, run, n_outputs = self.form.taps, self.form.taps * self.form.channels, self.form.n_outputs
        rows = weight[:, :n_outputs, : taps * padded(run)].view(-1, n_outputs, taps, padded(run))
        return rows[..., :run].view(-1, n_outputs, taps, taps, self.form.channels)

    def space(self, n_models: int, batch: int, *, is_training: bool) -> Space:
        form, (n_places, n_outputs) = self.form, (len(self._tables[2]), padded(self.form.n_outputs))
        space = {
            "bordered": torch.zeros(bordered_size(form, n_models * batch)),
            "filters": torch.empty(n_outputs * form.taps**2 * form.channels),
            "out": torch.empty(n_models, batch, n_places, n_outputs),
            "winner": torch.empty(n_models, batch, n_places if self.is_pooled else 0, n_outputs, dtype=torch.int8),
        }
        if is_training:
            chunk = min(self._chunk, batch)
            space["corners"] = torch.empty(chunk * n_places + 1, dtype=torch.int64)
            space["errors"] = torch.empty(chunk * n_places + 1)
            space["back_bordered"] = torch.empty(0 if self.is_first else bordered_size(form, chunk))
            picture = form.height * form.width * form.channels
            space["back"] = torch.empty(n_models, 0 if self.is_first else batch, picture)
        return space

    def forward(self, x: Tensor, space: Space) -> Tensor:
        weight, bias = (parameter.value.numpy() for parameter in self.parameters)
        bordered, out, filters = space["bordered"].numpy(), space["out"].numpy(), space["filters"].numpy()
        border(x.reshape(x.shape[0] * x.shape[1], -1).numpy(), self.form, bordered)
        if self.is_pooled:
            winner = space["winner"].numpy()
            convolve_and_pool(bordered, self.form, weight, bias, filters, self.is_rectified, out, winner)
        else:
            convolve(bordered, self.form, weight, bias, filters, out)
        return space["out"].view(*x.shape[:2], *self.shape, -1)

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
        filters = self._filters(weight)[model, ..., : self.n_inputs]
        return {
            f"{self.name}.weight": filters.permute(0, 3, 1, 2).contiguous(),
            f"{self.name}.bias": bias[model, : self.form.n_outputs].clone(),
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
    """The largest of each window of pictures of shape (height, width, channels); windows do not overlap."""

    def __init__(self, shape: tuple[int, int, int], window: int) -> None:
        self.shape, self.window = shape, window

    def space(self, n_models: int, batch: int, *, is_training: bool) -> Space:
        height, width, channels = self.shape
        pooled = (n_models, batch, height // self.window, width // self.window, channels)
        space = {"out": torch.empty(pooled), "winner": torch.empty(pooled, dtype=torch.int32)}
        if is_training:
            # what is beyond the last whole window stays zero
            space["back"] = torch.zeros(n_models, batch, *self.shape)
        return space

    def forward(self, x: Tensor, space: Space) -> Tensor:
        _pool(*(t.flatten(0, 1).numpy() for t in (x, space["out"], space["winner"])), self.window)
        return space["out"]

    def backward(self, error: Tensor, space: Space, _momentum: float) -> Tensor:
        error = error.view_as(space["out"])
        _unpool(*(t.flatten(0, 1).numpy() for t in (error, space["winner"], space["back"])), self.window)
        return space["back"]


_SPELLED = {nn.Flatten: "F", nn.Linear: "L", nn.ReLU: "R", nn.MaxPool2d: "P", nn.Conv2d: "C"}
# Pictures are flattened before they meet a linear layer, which would otherwise be applied to each of their rows.
_OF_FEATURES = re.compile("F*L([LRF]*L)?")
_OF_PICTURES = re.compile("(C[CPR]*)?F+L([LRF]*L)?")


def _has_form(layer: nn.Module) -> bool:
    if type(layer) not in _SPELLED:
        return False
    match layer:
        case nn.Flatten():
            return layer.start_dim == 1 and layer.end_dim == -1
        case nn.Linear():
            return layer.bias is not None
        case nn.ReLU():
            return True
        case nn.MaxPool2d():
            size = layer.kernel_size
            plain = not layer.ceil_mode and not layer.return_indices and (layer.padding, layer.dilation) == (0, 1)
            return isinstance(size, int) and layer.stride == size and plain
        case nn.Conv2d():
            taps = layer.kernel_size[0]
            same = layer.padding in ("same", (taps // 2, taps // 2)) and layer.padding_mode == "zeros"
            plain = (layer.stride, layer.dilation, layer.groups) == ((1, 1), (1, 1), 1) and layer.bias is not None
            return plain and same and layer.kernel_size == (taps, taps) and taps % 2 == 1
    return False


def _last(network: nn.Sequential) -> nn.Linear:
    last = network[-1]
    if not isinstance(last, nn.Linear):
        raise TypeError("a network that does not end in a linear layer")
    return last


def _begins_with_convolution(network: nn.Module) -> bool:
    return isinstance(next(network.children(), None), nn.Conv2d)


def _stacked(network: nn.Sequential, states: State, input_shape: tuple[int, ...]) -> Iterator[Layer]:
    """Turn a network's layers into those of a group, following the shape of what passes through them."""
    picture: tuple[int, int, int] | None = None  # height, width, channels
    if _begins_with_convolution(network):
        n_channels, height, width = input_shape
        picture = (height, width, n_channels)
    n_inputs, real_channels = torch.Size(input_shape).numel(), input_shape[0]
    is_first, children = True, list(network.named_children())
    while children:
        (name, layer), *children = children
        match layer:
            case nn.Conv2d():
                if picture is None:
                    raise ValueError("a convolution of what is no picture")
                is_pooled, is_rectified = _taken_along([layer for _, layer in children])
                children = children[is_pooled + is_rectified :]
                form = Form(*picture, layer.kernel_size[0], layer.out_channels)
                convolution = _Convolution(
                    name, _learned(states, name), form, is_pooled=is_pooled, is_rectified=is_rectified, first=is_first
                )
                yield convolution
                real_channels, picture = layer.out_channels, (*convolution.shape, padded(layer.out_channels))
            case nn.MaxPool2d():
                if picture is None:
                    raise ValueError("pooling of what is no picture")
                window = int(layer.kernel_size)  # type: ignore[arg-type]
                yield _MaxPooling(picture, window)
                picture = (picture[0] // window, picture[1] // window, picture[2])
            case nn.Linear():
                places, n_padded = torch.arange(n_inputs), padded(n_inputs)
                if picture is not None:
                    # torch flattens channels first
                    places = torch.arange(torch.Size(picture).numel()).view(picture)[..., :real_channels]
                    places, n_padded = places.permute(2, 0, 1).flatten(), torch.Size(picture).numel()
                yield _Linear(name, _learned(states, name), places, n_padded, first=is_first)
                n_inputs, picture = layer.out_features, None
            case nn.ReLU():
                yield _Rectifier()
        is_first = is_first and isinstance(layer, nn.Flatten)


def _learned(states: State, layer: str) -> Learned:
    return states[f"{layer}.weight"], states[f"{layer}.bias"]


def _taken_along(following: Sequence[nn.Module]) -> tuple[bool, bool]:
    """Tell whether what follows a convolution is pooling by 2, and whether that is rectified, before or after."""
    kinds = [type(layer) for layer in following[:2]]
    pooling = next((layer for layer in following[:2] if isinstance(layer, nn.MaxPool2d)), None)
    if pooling is None or pooling.kernel_size != 2:
        return False, False
    return kinds[0] is nn.MaxPool2d or kinds[0] is nn.ReLU, nn.ReLU in kinds


def _padded(rows: Tensor) -> Tensor:
    return torch.nn.functional.pad(rows, (0, padded(rows.shape[1]) - rows.shape[1]))


@kernel
def _pool(pictures, pooled, winners, window):
    for n in range(len(pooled)):
        for y in range(pooled.shape[1]):
            for x in range(pooled.shape[2]):
                largest, winner = pooled[n, y, x], winners[n, y, x]
                largest[:] = pictures[n, y * window, x * window]
                winner[:] = 0
                for k in range(1, window * window):
                    rival = pictures[n, y * window + k // window, x * window + k % window]
                    # without branches, which would be guessed wrong as often as not
                    for c in range(len(largest)):
                        winner[c] = k if rival[c] > largest[c] else winner[c]
                        largest[c] = max(rival[c], largest[c])


@kernel
def _unpool(errors, winners, pictures, window):
    for n in range(len(errors)):
        for y in range(errors.shape[1]):
            for x in range(errors.shape[2]):
                error, winner = errors[n, y, x], winners[n, y, x]
                for k in range(window * window):
                    back = pictures[n, y * window + k // window, x * window + k % window]
                    for c in range(len(error)):
                        back[c] = error[c] if winner[c] == k else 0
