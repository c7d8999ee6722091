"""Which networks can be trained by products, described layer by layer: a value a layer, with all that it needs to know.

A network of plain layers is read once from first to last, following the shape of what passes through it. Pictures come
first, if at all: convolutions, rectified and pooled. They are flattened before they meet a linear layer, which torch
would otherwise apply to each of their rows. The last layer is linear.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmpipeline.training.kernels.convolution import Form
from dmpipeline.training.kernels.lines import LINE


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer.

    Attributes
    ----------
    name : str
        In the network.
    n_outputs : int
    width : int
        Numbers that an example comes in, padding among them.
    places : tensor of int64, shape (n_inputs,)
        Where among those each of the network's own inputs lies.
    is_first : bool
        Whether it is the first layer: nothing needs the gradient of its inputs.
    """

    name: str
    n_outputs: int
    width: int
    places: Tensor
    is_first: bool


@dataclass(frozen=True, slots=True)
class Convolution:
    """Filters for pictures whose size they keep, perhaps pooled by 2 and rectified in the same pass.

    Attributes
    ----------
    name : str
        In the network.
    n_inputs : int
        Channels that the network itself has; the form has more where they are padded.
    form : Form
    is_pooled, is_rectified, is_first : bool
        As for `Linear`.
    """

    name: str
    n_inputs: int
    form: Form
    is_pooled: bool
    is_rectified: bool
    is_first: bool


@dataclass(frozen=True, slots=True)
class MaxPooling:
    """The largest of each square window of pictures; windows do not overlap."""

    height: int
    width: int
    channels: int
    window: int


@dataclass(frozen=True, slots=True)
class Rectifier:
    """Negative numbers become 0."""


Described = Linear | Convolution | MaxPooling | Rectifier


def can_stack(network: nn.Module, input_shape: tuple[int, ...]) -> bool:
    """State whether a network can be described; inputs are (n_features,) or (channels, height, width)."""
    return described(network, input_shape) is not None


def described(network: nn.Module, input_shape: tuple[int, ...]) -> tuple[Described, ...] | None:
    """Describe a network's layers in their order; None if one of them, or their order, has no form here."""
    if type(network) is not nn.Sequential or len(input_shape) not in (1, 3):
        return None
    layers = list(network.named_children())
    # a layer that is there twice is a child once
    if len(layers) != len(network) or not all(_is_plain(layer) for _, layer in layers):
        return None
    if not layers or type(layers[-1][1]) is not nn.Linear:
        return None
    passing: _Pictures | _Features = _Features.lying_as_they_are(torch.Size(input_shape).numel())
    if len(input_shape) == 3:
        channels, height, width = input_shape
        if begins_with_convolution(network):
            passing = _Pictures(height, width, channels, channels)
        elif type(layers[0][1]) is not nn.Flatten:
            return None
    found: list[Described] = []
    while layers:
        (name, layer), *layers = layers
        match layer, passing:
            case nn.Flatten(), _Pictures():
                passing = passing.flattened()
            case nn.Flatten(), _:
                pass
            case nn.Linear(), _Features():
                found.append(Linear(name, layer.out_features, passing.width, passing.places, is_first=not found))
                passing = _Features.lying_as_they_are(layer.out_features)
            case nn.Conv2d(), _Pictures():
                is_pooled, is_rectified = _same_pass([layer for _, layer in layers[:2]])
                layers = layers[is_pooled + is_rectified :]
                form = Form(passing.height, passing.width, passing.lying, layer.kernel_size[0], layer.out_channels)
                found.append(Convolution(name, passing.channels, form, is_pooled, is_rectified, is_first=not found))
                passing = _Pictures(form.height, form.width, layer.out_channels, padded(layer.out_channels))
                passing = passing.pooled(2) if is_pooled else passing
            case nn.MaxPool2d(), _Pictures():
                window = int(layer.kernel_size)  # type: ignore[arg-type]
                found.append(MaxPooling(passing.height, passing.width, passing.lying, window))
                passing = passing.pooled(window)
            case nn.ReLU(), _ if found:
                found.append(Rectifier())
            case _:
                return None
    return tuple(found)


def begins_with_convolution(network: nn.Module) -> bool:
    """State whether a network takes pictures as such, with their channels last here."""
    return isinstance(next(network.children(), None), nn.Conv2d)


def padded(length: int) -> int:
    """Round a count of float32 numbers up to whole cache lines."""
    return -(-length // LINE) * LINE


@dataclass(frozen=True, slots=True)
class _Pictures:
    """Pictures that pass through a network, padded from `channels` to `lying` channels."""

    height: int
    width: int
    channels: int
    lying: int

    def pooled(self, window: int) -> "_Pictures":
        return _Pictures(self.height // window, self.width // window, self.channels, self.lying)

    def flattened(self) -> "_Features":
        # torch flattens channels first
        size = self.height * self.width * self.lying
        places = torch.arange(size).view(self.height, self.width, self.lying)[..., : self.channels]
        return _Features(size, places.permute(2, 0, 1).flatten())


@dataclass(frozen=True, slots=True)
class _Features:
    """Numbers that pass through a network, and where each lies among `width` of them."""

    width: int
    places: Tensor

    @classmethod
    def lying_as_they_are(cls, n: int) -> "_Features":
        return cls(padded(n), torch.arange(n))


def _is_plain(layer: nn.Module) -> bool:
    """State whether a layer is of a kind, and has the settings, that can be described; a subclass may do anything."""
    if type(layer) not in (nn.Flatten, nn.Linear, nn.ReLU, nn.MaxPool2d, nn.Conv2d):
        return False
    match layer:
        case nn.Flatten():
            return layer.start_dim == 1 and layer.end_dim == -1
        case nn.Linear():
            return layer.bias is not None
        case nn.MaxPool2d():
            size = layer.kernel_size
            plain = not layer.ceil_mode and not layer.return_indices and (layer.padding, layer.dilation) == (0, 1)
            return isinstance(size, int) and layer.stride == size and plain
        case nn.Conv2d():
            taps = layer.kernel_size[0]
            same = layer.padding in ("same", (taps // 2, taps // 2)) and layer.padding_mode == "zeros"
            plain = (layer.stride, layer.dilation, layer.groups) == ((1, 1), (1, 1), 1) and layer.bias is not None
            return plain and same and layer.kernel_size == (taps, taps) and taps % 2 == 1
    return True


def _same_pass(following: Sequence[nn.Module]) -> tuple[bool, bool]:
    """State whether the two layers after a convolution pool it by 2, and if so whether they rectify it too."""
    match following:
        case [nn.MaxPool2d(kernel_size=2), nn.ReLU()] | [nn.ReLU(), nn.MaxPool2d(kernel_size=2)]:
            return True, True
        case [nn.MaxPool2d(kernel_size=2), *_]:
            return True, False
    return False, False
