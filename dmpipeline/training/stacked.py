# mypy: allow-untyped-calls
# tensors split by functions of torch without types

"""Small networks that take their steps together, in batched products.

Where products are small this is several times as fast as automatic differentiation of the same network. What cannot be
described by `architecture` is trained otherwise (`ensembles`).

Products round differently where several threads share them: a row does not depend on the others of its group where
torch has one thread, as in a worker of `train`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmpipeline.training.architecture import Linear, begins_with_convolution, described, padded
from dmpipeline.training.layers import Space, State, stacked_layer

_NEVER = -1e30  # the logit of a class that is only padding: its probability is 0
_OUTPUT_BYTES = 2**18  # of a layer of one model, where no gradients are wanted


class StackedNetworks:
    """A group of networks of one form, and how they are trained.

    Parameters
    ----------
    network : torch.nn.Sequential
        One that `can_stack`.
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
        layers = described(network, input_shape)
        if layers is None or not isinstance(last := layers[-1], Linear):
            raise TypeError("a network that cannot be stacked")
        self.layers, self.n_outputs = [stacked_layer(layer, states) for layer in layers], last.n_outputs
        self._spaces = [layer.space(self.n_models, batch, is_training=True) for layer in self.layers]
        self._x = torch.empty(self.n_models, batch, *laid_out_shape(network, input_shape))
        self._truth = torch.empty(self.n_models, batch, padded(self.n_outputs))

    def step(self, inputs: Tensor, truth: Tensor, examples: Tensor, lr: float) -> None:
        """Take one step of SGD on each model's mean loss.

        Parameters
        ----------
        inputs, truth : tensor of float32, shape (n, ...)
            All examples, as `laid_out` and `true_outputs` return them.
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
        """Return what each model has learned, as states of the network."""
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
    if begins_with_convolution(network):
        return inputs.float().permute(0, 2, 3, 1).contiguous()
    return _padded(inputs.float().flatten(1))


def laid_out_shape(network: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one example that is `laid_out`."""
    if begins_with_convolution(network):
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


def _padded(rows: Tensor) -> Tensor:
    return torch.nn.functional.pad(rows, (0, padded(rows.shape[1]) - rows.shape[1]))
