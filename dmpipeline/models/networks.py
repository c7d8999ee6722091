"""From recipes to networks: torch modules, and the numbers that each model starts from.

A module here is structure alone. The numbers of a model, parameters and buffers, are a dictionary apart from it, drawn
by counter: `torch.func.functional_call` puts one model's into the module, and under `torch.func.vmap` those of many,
stacked, BatchNorm's running statistics included. The order of draws is part of a recipe's version.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import nn

from dmpipeline.draws.masks import Purpose, draw_bits, draw_uniform
from dmpipeline.errors import SpecError, UserCodeError
from dmpipeline.models.recipes import (
    CifarFast,
    ConvNet,
    LogisticRegression,
    Module,
    Perceptron,
    Recipe,
    Resnet9Release,
    Resnet18Release,
)
from dmpipeline.models.usercode import explained, import_object

State = dict[str, torch.Tensor]

# Added to mean squares as in airbench, so that directions with hardly any of the pictures in them are not blown up.
WHITENING_EPSILON = 5e-4
# torch's global generator is seeded, used and put back by one thread at a time; a user's code may come back here.
_global_generator = threading.RLock()


def build_network(recipe: Recipe, input_shape: tuple[int, ...], n_outputs: int) -> nn.Module:
    """Build the structure of a recipe's network.

    Parameters
    ----------
    recipe : Recipe
    input_shape : tuple of int
        Of one example, without the batch: (n_features,), or (channels, height, width) for pictures. A user's module is
        called with its `arguments` alone and takes what it takes.
    n_outputs : int
        Count of logits an example.

    Returns
    -------
    network : torch.nn.Module
        From (n, *input_shape) to (n, n_outputs), on the CPU, in training mode; its own numbers mean nothing, see
        `initial_states`. Perceptron, logistic regression and convnet are an nn.Sequential of Flatten, Linear, Conv2d,
        MaxPool2d and ReLU alone. torch's global generator is left as it was.

    Raises
    ------
    SpecError
        If the network cannot take inputs of this shape, the recipe alters pictures and these are none or too small, or
        the user's module cannot be built.
    """
    _check_pictures(recipe, input_shape)
    with _global_generator, torch.random.fork_rng(devices=[]):
        match recipe:
            case Perceptron():
                n_features = torch.Size(input_shape).numel()
                return nn.Sequential(
                    nn.Flatten(), nn.Linear(n_features, recipe.hidden), nn.ReLU(), nn.Linear(recipe.hidden, n_outputs)
                )
            case LogisticRegression():
                return nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(input_shape).numel(), n_outputs))
            case ConvNet():
                return _convnet(recipe, _pictures(recipe, input_shape, smallest=4), n_outputs)
            case Resnet9Release():
                return _resnet9(_pictures(recipe, input_shape, smallest=11)[0], n_outputs)
            case Resnet18Release():
                return _resnet18(_pictures(recipe, input_shape, smallest=1)[0], n_outputs)
            case CifarFast():
                return _cifar_fast(recipe, _pictures(recipe, input_shape, smallest=9)[0], n_outputs)
            case Module():
                return UserNetwork(recipe)
    raise TypeError(f"{type(recipe).__name__} has no network")


def initial_states(network: nn.Module, seed: int, model_indices: Sequence[int]) -> State:
    """Draw the numbers that models start from.

    Weights and biases of Linear and Conv2d are uniform within 1 / sqrt(fan_in), torch's own default law, taken from
    `masks.draw_uniform` layer after layer: a layer's weights, the outputs varying fastest, then its biases. BatchNorm
    starts as the identity. Identity convolutions pass their first inputs on. A user's module is built again, with
    torch's global generator seeded by the model's number and put back afterwards. A model's numbers are the same
    whichever others are drawn with it.

    Parameters
    ----------
    network : torch.nn.Module
        From `build_network`; not altered.
    seed : int
    model_indices : sequence of int
        From 0 to 2**64 - 1, as the seed.

    Returns
    -------
    states : dict of str to tensor, shapes (n_models, ...)
        Every parameter and buffer by its name in `network`, on the CPU: float32 but for BatchNorm's int64 counts of
        batches and what a user's module says. Nothing is shared with `network`.

    Raises
    ------
    SpecError
        If a user's module cannot be built, or the same one is returned again.
    """
    if isinstance(network, UserNetwork):
        states = stacked([network.drawn_anew(seed, index) for index in model_indices])
        return {f"network.{name}": value for name, value in states.items()}
    n_models, layers = len(model_indices), list(_drawn_layers(network))
    sizes = [parameter.numel() for _, layer in layers for parameter in layer.parameters(recurse=False)]
    uniform = np.empty((n_models, sum(sizes)), np.float32)
    for numbers, index in zip(uniform, model_indices, strict=True):
        numbers[:] = draw_uniform(seed, index, sum(sizes))
    drawn, learned = iter(torch.split(torch.from_numpy(uniform), sizes, dim=1)), State()
    for prefix, layer in layers:
        n_outputs, fan_in = layer.weight.flatten(1).shape
        bound = fan_in**-0.5
        weight = next(drawn).mul(bound).view(n_models, fan_in, n_outputs).transpose(1, 2)
        weight = learned[f"{prefix}.weight"] = weight.reshape(n_models, *layer.weight.shape).contiguous()
        if isinstance(layer, IdentityConv2d):
            for filters in weight:
                nn.init.dirac_(filters[: min(filters.shape[:2])])
        if layer.bias is not None:
            learned[f"{prefix}.bias"] = next(drawn).mul(bound)
    return {
        name: learned[name] if name in learned else value.detach().repeat(n_models, *[1] * value.ndim)
        for name, value in named_tensors(network)
    }


def stacked(states: Sequence[State]) -> State:
    """Put the states of some models together, models first."""
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def named_tensors(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """List what a network's state holds: parameters and buffers, each once, those that are never saved as well."""
    yield from network.named_parameters()
    yield from network.named_buffers()


def is_whitened(network: nn.Module) -> bool:
    """Return whether a network has a layer that `whitened` sets."""
    return any(isinstance(layer, Whitening) for layer in network.modules())


def whitened(network: nn.Module, state: State, images: torch.Tensor) -> State:
    """Set the filters of a network's whitening layer from pictures.

    Parameters
    ----------
    network : torch.nn.Module
        From `build_network`.
    state : dict of str to tensor
        A model's numbers; not altered.
    images : tensor of float32, shape (n, channels, height, width)
        Normalised pictures of the model's own subset, and of nothing else: filters made from others would let a model
        know of examples that it is not trained on.

    Returns
    -------
    state : dict of str to tensor
        With the whitening filters, on the device and in the dtype they had; as it was for networks without any.
    """
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, Whitening)]
    filters = {f"{name}.filters": layer.filters_from(images) for name, layer in layers}
    return state | {name: value.to(state[name]) for name, value in filters.items()}


class UserNetwork(nn.Module):
    """A module of the user's own, with the way to build it again.

    Attributes
    ----------
    network : torch.nn.Module
    """

    def __init__(self, recipe: Module) -> None:
        super().__init__()
        self.recipe = recipe
        self.network = self._built()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Pass on to the user's module."""
        outputs: torch.Tensor = self.network(inputs)
        return outputs

    def drawn_anew(self, seed: int, model_index: int) -> State:
        """Build the module once more from a seed of the model's own; return copies of its parameters and buffers."""
        bits = int(draw_bits(seed, Purpose.TORCH_SEED, model_index, 1)[0])
        with _global_generator, torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(bits)
            network = self._built()
        if network is self.network:
            raise SpecError(
                f"recipe.network {self.recipe.network!r} returned the same module twice, so that all models would "
                f"start from the same numbers; return a new one at each call",
                field="recipe.network",
                value=self.recipe.network,
            )
        return {name: value.detach().clone() for name, value in named_tensors(network)}

    def _built(self) -> nn.Module:
        path, arguments = self.recipe.network, self.recipe.arguments
        build: Callable[..., object] = import_object(path)
        what, remedy = f"recipe.network {path!r} called with {arguments}", "fix it, or recipe.arguments"
        with explained(what, path, kind=UserCodeError, remedy=remedy, field="recipe.network", value=path):
            network = build(**arguments)
        if not isinstance(network, nn.Module):
            wrong = f"recipe.network {path!r} returned a {type(network).__name__}, not a torch.nn.Module"
            raise SpecError(f"{wrong}; return a module", field="recipe.network", value=path)
        return network


class Residual(nn.Module):
    """What an inner module adds to its input, or to what `shortcut` makes of it."""

    def __init__(self, inner: nn.Module, shortcut: nn.Module | None = None, *, rectified: bool = False) -> None:
        super().__init__()
        self.inner, self.shortcut, self.rectified = inner, shortcut or nn.Identity(), rectified

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Add, and rectify the sum where the architecture does."""
        outputs: torch.Tensor = self.shortcut(inputs) + self.inner(inputs)
        return torch.relu(outputs) if self.rectified else outputs


class Scale(nn.Module):
    """Logits times a constant, which keeps the first ones small."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        return inputs * self.factor


class IdentityConv2d(nn.Conv2d):
    """A 3 x 3 convolution without bias that starts by passing its inputs on, to as many outputs as there are."""

    def __init__(self, n_inputs: int, n_outputs: int) -> None:
        super().__init__(n_inputs, n_outputs, 3, padding=1, bias=False)


class Whitening(nn.Module):
    """2 x 2 filters, never trained, whose outputs on the pictures they are made from are uncorrelated and of size 1.

    They are the principal directions of the patches about zero, each over its root mean square and with both signs
    (Page, How to train your ResNet, 2019; Jordan, 2024). Zero until `whitened` sets them.
    """

    filters: torch.Tensor

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.register_buffer("filters", torch.zeros(2 * 4 * n_channels, n_channels, 2, 2))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Filter without padding."""
        return nn.functional.conv2d(inputs, self.filters)

    def filters_from(self, images: torch.Tensor) -> torch.Tensor:
        """Compute filters like `filters` from pictures (n, channels, height, width)."""
        n_weights = self.filters[0].numel()
        moments = torch.zeros(n_weights, n_weights, dtype=torch.float64, device=images.device)
        n_patches = 0
        for some in torch.split(images, 256):
            patches = nn.functional.unfold(some.float(), 2).transpose(1, 2).reshape(-1, n_weights)
            moments += (patches.T @ patches).double()
            n_patches += len(patches)
        variances, directions = torch.linalg.eigh((moments / n_patches).cpu())
        # an eigenvector's sign is arbitrary: its largest entry is made positive, so that every machine has the same
        largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        whitening = (directions * largest.sign() / (variances + WHITENING_EPSILON).sqrt()).T.flip(0)
        return torch.cat([whitening, -whitening]).reshape(self.filters.shape).float()


def _convnet(recipe: ConvNet, shape: tuple[int, int, int], n_outputs: int) -> nn.Module:
    n_channels, height, width = shape
    first, second = recipe.channels
    return nn.Sequential(
        nn.Conv2d(n_channels, first, 3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(second * (height // 2 // 2) * (width // 2 // 2), n_outputs),
    )


def _resnet9(n_channels: int, n_outputs: int) -> nn.Module:
    return nn.Sequential(
        _conv_norm_relu(n_channels, 64),
        _conv_norm_relu(64, 128, side=5, stride=2, padding=2),
        Residual(nn.Sequential(_conv_norm_relu(128, 128), _conv_norm_relu(128, 128))),
        _conv_norm_relu(128, 256),
        nn.MaxPool2d(2),
        Residual(nn.Sequential(_conv_norm_relu(256, 256), _conv_norm_relu(256, 256))),
        _conv_norm_relu(256, 128, padding=0),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(128, n_outputs, bias=False),
        Scale(0.2),
    )


def _resnet18(n_channels: int, n_outputs: int) -> nn.Module:
    """ResNet-18 for pictures of ImageNet's size (He et al., Deep residual learning for image recognition, 2015)."""
    blocks: list[nn.Module] = []
    n_inputs = 64
    for width, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
        inner = nn.Sequential(
            _conv_norm_relu(n_inputs, width, stride=stride),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        projection = nn.Sequential(nn.Conv2d(n_inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        blocks.append(Residual(inner, projection if width != n_inputs else None, rectified=True))
        n_inputs = width
    return nn.Sequential(
        _conv_norm_relu(n_channels, 64, side=7, stride=2, padding=3),
        nn.MaxPool2d(3, 2, padding=1),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, n_outputs),
    )


def _cifar_fast(recipe: CifarFast, n_channels: int, n_outputs: int) -> nn.Module:
    first, others = recipe.widths

    def group(n_inputs: int, width: int) -> nn.Module:
        return nn.Sequential(
            IdentityConv2d(n_inputs, width),
            nn.MaxPool2d(2),
            _fast_norm(width),
            nn.GELU(),
            IdentityConv2d(width, width),
            _fast_norm(width),
            nn.GELU(),
        )

    return nn.Sequential(
        Whitening(n_channels),
        nn.GELU(),
        group(8 * n_channels, first),
        group(first, others),
        group(others, others),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(others, n_outputs, bias=False),
        Scale(1 / 9),
    )


def _conv_norm_relu(n_inputs: int, n_outputs: int, *, side: int = 3, stride: int = 1, padding: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(n_inputs, n_outputs, side, stride, padding, bias=False),
        nn.BatchNorm2d(n_outputs),
        nn.ReLU(inplace=True),
    )


# airbench's running statistics forget fast, for there are few batches: torch's momentum is the share of the new one
_fast_norm = partial(nn.BatchNorm2d, momentum=0.4)


def _drawn_layers(network: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            yield name, layer


def _pictures(recipe: Recipe, shape: tuple[int, ...], *, smallest: int) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape[1:]) < smallest:
        raise SpecError(
            f"recipe.name {recipe.name!r} takes pictures of {smallest} x {smallest} pixels or more, and an input of "
            f"this dataset is {_words_for(shape)}; choose perceptron, or a dataset of such pictures",
            field="recipe.name",
            value=recipe.name,
        )
    n_channels, height, width = shape
    return n_channels, height, width


def _check_pictures(recipe: Recipe, shape: tuple[int, ...]) -> None:
    """Refuse a recipe that alters pictures in a way that inputs of this shape do not allow."""
    altering = {
        name: value
        for name in ("flip", "translate", "cutout", "mean", "tta")
        if (value := getattr(recipe, name)) not in ("none", 0, None)
    }
    if altering and len(shape) != 3:
        name, value = next(iter(altering.items()))
        raise _unfit(recipe, name, shape, f"needs pictures; leave {name} out, or give the dataset pictures", value)
    if "cutout" in altering and recipe.cutout >= min(shape[1:]):
        raise _unfit(recipe, "cutout", shape, f"leaves nothing; choose less than {min(shape[1:])}", recipe.cutout)
    if "translate" in altering and recipe.translate >= min(shape[1:]):
        raise _unfit(recipe, "translate", shape, f"leaves nothing; choose less than {min(shape[1:])}", recipe.translate)
    if recipe.mean is not None and len(recipe.mean) != shape[0]:
        remedy = f"has {len(recipe.mean)} numbers; give {shape[0]}, one a channel, for mean and std"
        raise _unfit(recipe, "mean", shape, remedy, recipe.mean)


def _unfit(recipe: Recipe, name: str, shape: tuple[int, ...], why: str, value: object) -> SpecError:
    wrong = f"recipe.{name} {value!r} of {recipe.name}, for inputs that are {_words_for(shape)}, {why}"
    return SpecError(wrong, field=f"recipe.{name}", value=value)


def _words_for(shape: tuple[int, ...]) -> str:
    if len(shape) == 3:
        n_channels, height, width = shape
        return f"{height} x {width} pixels in {n_channels} channel{'s' * (n_channels != 1)}"
    return " x ".join(map(str, shape)) + " numbers"
