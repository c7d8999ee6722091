import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from dmpipeline.data.datasets import load_dataset
from dmpipeline.draws.masks import draw_mask, draw_orders, draw_uniform
from dmpipeline.errors import SpecError
from dmpipeline.models.networks import IdentityConv2d, build_network, initial_states, whitened
from dmpipeline.models.recipes import (
    CifarFast,
    ConvNet,
    LogisticRegression,
    Module,
    Perceptron,
    Resnet9Release,
    Resnet18Release,
)

BARE_RESNET9 = Resnet9Release(flip="none", translate=0, cutout=0, mean=None, std=None, tta="none")
SMALL_FAST = CifarFast(widths=(8, 16))
EVERY = [
    (Perceptron(hidden=7), (12,)),
    (Perceptron(hidden=7), (1, 4, 5)),
    (LogisticRegression(), (12,)),
    (ConvNet(), (1, 8, 8)),
    (ConvNet(channels=(3, 5)), (2, 9, 13)),
    (Resnet9Release(), (3, 16, 16)),
    (Resnet18Release(), (3, 32, 32)),
    (SMALL_FAST, (3, 16, 16)),
]
NAMES = [f"{recipe.name}-{'x'.join(map(str, shape))}" for recipe, shape in EVERY]


def initial_state(network, seed, model_index):
    """Draw the numbers that one model starts from."""
    return {name: value[0] for name, value in initial_states(network, seed, [model_index]).items()}


@pytest.fixture
def users_network(tmp_path, monkeypatch):
    """Write a user's module with this text; return the import path of its Net."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text):
        (tmp_path / "net_of_a_user.py").write_text("import torch\nfrom torch import nn\n" + text)
        return "net_of_a_user:Net"

    yield write
    sys.modules.pop("net_of_a_user", None)


def with_state(network, state):
    """Put a model's numbers into the module itself; running statistics as well."""
    network.load_state_dict(state)
    return network


def as_double(value):
    return value.double() if value.is_floating_point() else value


def stacked(states, network):
    """Stack the numbers of several models: parameters to be trained, and buffers."""
    trained = {name for name, _ in network.named_parameters()}
    together = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    parameters = {name: value.requires_grad_() for name, value in together.items() if name in trained}
    return parameters, {name: value for name, value in together.items() if name not in trained}


@pytest.mark.parametrize(("recipe", "shape"), EVERY, ids=NAMES)
def test_a_network_gives_a_logit_for_each_output(recipe, shape):
    network = build_network(recipe, shape, 6)
    assert network.training
    assert network(torch.randn(3, *shape)).shape == (3, 6)


@pytest.mark.parametrize(("recipe", "shape"), EVERY, ids=NAMES)
def test_a_state_has_every_parameter_and_buffer_by_its_name(recipe, shape):
    network = build_network(recipe, shape, 6)
    state, own = initial_state(network, 1, 2), network.state_dict()
    assert {name: (value.shape, value.dtype) for name, value in state.items()} == {
        name: (value.shape, value.dtype) for name, value in own.items()
    }
    assert all(value.dtype == torch.float32 for name, value in state.items() if "num_batches" not in name)
    assert all(value.is_contiguous() for value in state.values())
    assert not {value.data_ptr() for value in state.values()} & {value.data_ptr() for value in own.values()}


@pytest.mark.parametrize(("recipe", "shape"), EVERY, ids=NAMES)
def test_a_state_depends_on_seed_and_model_alone_and_leaves_the_global_generator(recipe, shape):
    torch.manual_seed(0)
    generator = torch.get_rng_state()
    first = initial_state(build_network(recipe, shape, 4), 1, 2)
    assert (torch.get_rng_state() == generator).all()
    torch.manual_seed(99)
    again = initial_state(build_network(recipe, shape, 4), 1, 2)
    assert all((first[name] == again[name]).all() for name in first)
    # a convolution with no more outputs than inputs that starts as the identity starts as nothing else
    layers = dict(build_network(recipe, shape, 4).named_modules())
    drawn = [f"{name}.weight" for name, layer in layers.items() if type(layer) in (nn.Linear, nn.Conv2d)]
    for seed, index in ((2, 2), (1, 3)):
        other = initial_state(build_network(recipe, shape, 4), seed, index)
        assert all((first[name] != other[name]).any() for name in drawn)


@pytest.mark.parametrize(("recipe", "shape"), EVERY, ids=NAMES)
def test_weights_start_by_torchs_own_law(recipe, shape):
    network = build_network(recipe, shape, 10)
    state = initial_state(network, 5, 6)
    for name, layer in network.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert (state[f"{name}.weight"] == 1).all()
            assert (state[f"{name}.running_var"] == 1).all()
            assert not state[f"{name}.bias"].any()
            assert not state[f"{name}.running_mean"].any()
        if isinstance(layer, nn.Linear | nn.Conv2d) and not isinstance(layer, IdentityConv2d):
            bound = (layer.weight[0].numel()) ** -0.5
            values = [state[f"{name}.weight"]] + ([state[f"{name}.bias"]] if layer.bias is not None else [])
            assert all(value.abs().max() <= bound for value in values)
            uniform = (torch.cat([value.flatten() for value in values]) / bound).sort().values
            n = len(uniform)
            # Kolmogorov and Smirnov's distance from the uniform law on -1..1
            assert (uniform - torch.linspace(-1 + 1 / n, 1 - 1 / n, n)).abs().max() / 2 < 2.2 / n**0.5


def test_no_two_layers_start_from_the_same_numbers():
    state = initial_state(build_network(Resnet9Release(), (3, 32, 32), 10), 0, 0)
    drawn = torch.cat([value.flatten() / value.abs().max() for value in state.values() if value.ndim > 1])
    assert len(drawn.unique()) > 0.9 * len(drawn)


def test_the_perceptron_starts_from_the_numbers_of_the_hand_written_one():
    state = initial_state(build_network(Perceptron(hidden=5), (12,), 3), 7, 8)
    w1, b1, w2, b2 = np.split(draw_uniform(7, 8, 12 * 5 + 5 + 5 * 3 + 3), np.cumsum([60, 5, 15]))
    scale, scale_2 = np.float32(12**-0.5), np.float32(5**-0.5)
    assert (state["1.weight"].numpy() == w1.reshape(12, 5).T * scale).all()
    assert (state["1.bias"].numpy() == b1 * scale).all()
    assert (state["3.weight"].numpy() == w2.reshape(5, 3).T * scale_2).all()
    assert (state["3.bias"].numpy() == b2 * scale_2).all()


def test_draws_follow_the_layers_with_outputs_fastest():
    state = initial_state(build_network(ConvNet(channels=(3, 5)), (2, 8, 8), 4), 7, 8)
    sizes = [2 * 9 * 3, 3, 3 * 9 * 5, 5, 20 * 4, 4]
    drawn = np.split(draw_uniform(7, 8, sum(sizes)), np.cumsum(sizes)[:-1])
    shapes = [(3, 2, 3, 3), (5, 3, 3, 3), (4, 20)]
    for layer, weight, bias, shape in zip((0, 3, 7), drawn[::2], drawn[1::2], shapes, strict=True):
        scale = np.float32(np.prod(shape[1:]) ** -0.5)
        expected = np.moveaxis(weight.reshape(*shape[1:], shape[0]), -1, 0) * scale
        assert (state[f"{layer}.weight"].numpy() == expected).all()
        assert (state[f"{layer}.bias"].numpy() == bias * scale).all()


def test_identity_convolutions_start_by_passing_their_inputs_on():
    layer = build_network(SMALL_FAST, (3, 16, 16), 4)
    state = initial_state(layer, 1, 2)
    x = torch.randn(2, 8, 6, 6)
    weight = state["3.0.weight"]
    assert weight.shape == (16, 8, 3, 3)
    outputs = functional.conv2d(x, weight, padding=1)
    assert torch.equal(outputs[:, :8], x)
    assert (weight[8:].abs().amax((1, 2, 3)) > 0.5 * 72**-0.5).all()


@pytest.mark.parametrize("recipe", [Perceptron(), LogisticRegression(), ConvNet()], ids=lambda recipe: recipe.name)
def test_small_networks_are_plain_stacks_of_layers(recipe):
    network = build_network(recipe, (1, 8, 8), 10)
    assert type(network) is nn.Sequential
    assert {type(layer) for layer in network} <= {nn.Flatten, nn.Linear, nn.Conv2d, nn.MaxPool2d, nn.ReLU}


def test_a_perceptron_takes_a_picture_as_its_features():
    flat, picture = (build_network(Perceptron(), shape, 10) for shape in ((64,), (1, 8, 8)))
    state, x = initial_state(flat, 0, 0), torch.randn(3, 64)
    assert torch.equal(with_state(flat, state)(x), with_state(picture, state)(x.reshape(3, 1, 8, 8)))


def test_the_convnet_pools_before_it_rectifies():
    network = build_network(ConvNet(channels=(3, 5)), (2, 9, 13), 4)
    state, x = initial_state(network, 0, 0), torch.randn(6, 2, 9, 13)
    h = x
    for layer in ("0", "3"):
        h = functional.conv2d(h, state[f"{layer}.weight"], state[f"{layer}.bias"], padding=1)
        h = functional.max_pool2d(h, 2).relu()
    assert h.shape == (6, 5, 2, 3)
    expected = h.flatten(1) @ state["7.weight"].T + state["7.bias"]
    torch.testing.assert_close(with_state(network, state)(x), expected)


def test_the_resnet9_is_the_releases_layer_by_layer():
    network = build_network(Resnet9Release(), (3, 32, 32), 10)
    state = initial_state(network, 0, 0)
    weights = [value for value in state.values() if value.ndim > 1]
    assert [tuple(weight.shape) for weight in weights] == [
        (64, 3, 3, 3),
        (128, 64, 5, 5),
        (128, 128, 3, 3),
        (128, 128, 3, 3),
        (256, 128, 3, 3),
        (256, 256, 3, 3),
        (256, 256, 3, 3),
        (128, 256, 3, 3),
        (10, 128),
    ]
    n_convolved = 64 * 27 + 128 * 64 * 25 + 2 * 128 * 128 * 9 + 256 * 128 * 9 + 2 * 256 * 256 * 9 + 128 * 256 * 9
    n_normalised = 2 * (64 + 3 * 128 + 3 * 256 + 128)
    assert sum(parameter.numel() for parameter in network.parameters()) == n_convolved + n_normalised + 1280

    def layer(x, number, stride=1, padding=1):
        x = functional.conv2d(x, weights[number], stride=stride, padding=padding)
        return (functional.batch_norm(x, None, None, training=True)).relu()

    x = torch.randn(8, 3, 32, 32)
    h = layer(layer(x, 0), 1, stride=2, padding=2)
    assert h.shape[2:] == (16, 16)
    h = h + layer(layer(h, 2), 3)
    h = functional.max_pool2d(layer(h, 4), 2)
    h = h + layer(layer(h, 5), 6)
    h = layer(h, 7, padding=0)
    assert h.shape[2:] == (6, 6)
    expected = 0.2 * (h.amax((2, 3)) @ weights[8].T)
    torch.testing.assert_close(with_state(network, state)(x), expected, atol=1e-5, rtol=1e-4)


def test_the_resnet18_has_the_parameters_of_the_published_one():
    # He et al. 2015 and torchvision's resnet18: 11,689,512 parameters for ImageNet's 1,000 classes
    network = build_network(Resnet18Release(), (3, 224, 224), 1000)
    assert sum(parameter.numel() for parameter in network.parameters()) == 11_689_512
    sides = []
    for layer in network:
        layer.register_forward_hook(lambda _layer, _inputs, outputs: sides.append(outputs.shape[-1]))
    network(torch.randn(2, 3, 224, 224))
    assert sides[:10] == [112, 56, 56, 56, 28, 28, 14, 14, 7, 7]


def test_the_fast_network_has_the_size_of_airbenchs():
    # airbench94's layers without the whitening layer's bias: 24 -> 64 -> 64, 64 -> 256 -> 256, 256 -> 256 -> 256
    convolved = 9 * (24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256)
    network = build_network(CifarFast(), (3, 32, 32), 10)
    n_parameters = sum(parameter.numel() for parameter in network.parameters())
    assert n_parameters == convolved + 2 * (2 * 64 + 4 * 256) + 2560
    assert "0.filters" in dict(network.named_buffers())


def correlated_pictures(n=300, n_channels=3):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n, n_channels, 12, 12, generator=generator)
    smooth = functional.avg_pool2d(noise, 3, 1, 1) * 3
    return smooth + 0.5 * smooth.mean(1, keepdim=True)


def patches_of(images):
    """List every 2 x 2 patch, by slicing: (n, channels * 4)."""
    images = images.numpy()
    corners = [images[:, :, top : top + 11, left : left + 11] for top in (0, 1) for left in (0, 1)]
    return np.stack(corners, axis=2).transpose(0, 3, 4, 1, 2).reshape(-1, images.shape[1] * 4)


def test_whitened_patches_are_uncorrelated_and_of_size_one():
    network, images = build_network(SMALL_FAST, (3, 12, 12), 4), correlated_pictures()
    state = whitened(network, initial_state(network, 0, 0), images)
    patches = patches_of(images).astype(float)
    raw = patches.T @ patches / len(patches)
    assert np.abs(raw - np.eye(12)).max() > 0.9  # they are far from white
    filters = state["0.filters"].numpy().reshape(24, 12).astype(float)
    white = patches @ filters[:12].T
    np.testing.assert_allclose(white.T @ white / len(white), np.eye(12), atol=0.02)
    assert (filters[12:] == -filters[:12]).all()
    sizes = np.linalg.norm(filters[:12], axis=1)
    assert (np.diff(sizes) >= 0).all()  # the strongest direction first
    assert (filters[:12][np.arange(12), np.abs(filters[:12]).argmax(1)] > 0).all()
    expected = white.reshape(300, 11, 11, 12).transpose(0, 3, 1, 2)
    outputs = with_state(network, state)[0](images)
    np.testing.assert_allclose(outputs[:, :12], expected, atol=1e-4)


def test_whitening_sees_the_given_pictures_alone_and_alters_nothing_else():
    network, images = build_network(SMALL_FAST, (3, 12, 12), 4), correlated_pictures()
    state = initial_state(network, 0, 0)
    assert not state["0.filters"].any()
    of_all, of_some = whitened(network, state, images), whitened(network, state, images[:40])
    assert not state["0.filters"].any()
    assert (of_all["0.filters"] != of_some["0.filters"]).any()
    reordered = whitened(network, state, images[torch.randperm(300, generator=torch.Generator().manual_seed(1))])
    torch.testing.assert_close(reordered["0.filters"], of_all["0.filters"], atol=1e-3, rtol=1e-3)
    assert all((of_all[name] == state[name]).all() for name in state if name != "0.filters")
    assert of_all["0.filters"].dtype == torch.float32


def test_flat_pictures_give_finite_filters():
    network = build_network(SMALL_FAST, (3, 12, 12), 4)
    filters = whitened(network, initial_state(network, 0, 0), torch.zeros(5, 3, 12, 12))["0.filters"]
    assert filters.isfinite().all()


def test_networks_without_a_whitening_layer_keep_their_state():
    network = build_network(ConvNet(), (3, 12, 12), 4)
    state = initial_state(network, 0, 0)
    assert whitened(network, state, correlated_pictures()) == state


@pytest.mark.parametrize(
    ("recipe", "shape", "layout"),
    [
        (Perceptron(), (1, 8, 8), torch.contiguous_format),
        (ConvNet(), (1, 8, 8), torch.contiguous_format),
        (ConvNet(), (1, 8, 8), torch.channels_last),
        (SMALL_FAST, (3, 12, 12), torch.contiguous_format),
        (SMALL_FAST, (3, 12, 12), torch.channels_last),
        (Resnet9Release(), (3, 12, 12), torch.channels_last),
        (Resnet18Release(), (3, 32, 32), torch.channels_last),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_models_trained_in_a_stack_are_those_that_torch_trains_one_by_one(recipe, shape, layout):
    # in double precision: BatchNorm of few numbers makes rounding errors large
    n_models, n_steps, batch = 3, 2, 6
    network = build_network(recipe, shape, 5).double()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n_models, n_steps, batch, *shape, generator=generator, dtype=torch.float64)
    y = torch.randint(5, (n_models, n_steps, batch), generator=generator)
    states = [whitened(network, initial_state(network, 0, index), x[index, 0]) for index in range(n_models)]
    states = [{name: as_double(value) for name, value in state.items()} for state in states]
    options = {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}

    def loss_of(parameters, buffers, inputs, labels):
        logits = torch.func.functional_call(network, (parameters, buffers), (inputs,))
        return functional.cross_entropy(logits, labels, label_smoothing=0.1)

    parameters, buffers = stacked(states, network)
    optimizer = torch.optim.SGD(parameters.values(), **options)
    for step in range(n_steps):
        inputs = x[:, step].flatten(0, 1).to(memory_format=layout).unflatten(0, (n_models, batch))
        optimizer.zero_grad()
        torch.func.vmap(loss_of)(parameters, buffers, inputs, y[:, step]).sum().backward()
        optimizer.step()

    for index, state in enumerate(states):
        alone = with_state(build_network(recipe, shape, 5).double(), state)
        optimizer = torch.optim.SGD(alone.parameters(), **options)
        for step in range(n_steps):
            optimizer.zero_grad()
            functional.cross_entropy(alone(x[index, step]), y[index, step], label_smoothing=0.1).backward()
            optimizer.step()
        for name, value in alone.state_dict().items():
            found = (parameters | buffers)[name][index].detach()
            torch.testing.assert_close(
                found, value, atol=1e-7, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
        moved = {name for name, value in alone.state_dict().items() if not torch.equal(value, state[name])}
        assert moved == set(state) - {"0.filters"}


def test_a_stack_is_judged_by_its_running_statistics():
    network = build_network(Resnet9Release(), (3, 12, 12), 5).eval()
    states = [initial_state(network, 0, index) for index in range(2)]
    for state in states:
        state.update({name: value + 0.5 for name, value in state.items() if "running" in name})
    parameters, buffers = stacked(states, network)
    x = torch.randn(4, 3, 12, 12)

    def logits_of(parameters, buffers):
        return torch.func.functional_call(network, (parameters, buffers), (x,))

    with torch.no_grad():
        together = torch.func.vmap(logits_of)(parameters, buffers)
        for state, found in zip(states, together, strict=True):
            torch.testing.assert_close(found, with_state(network, state)(x), atol=1e-5, rtol=1e-4)


def test_the_default_convnet_learns_digits():
    digits, recipe = load_dataset("digits"), ConvNet()
    x, y = torch.tensor(digits.train_inputs).reshape(-1, 1, 8, 8), torch.tensor(digits.train_labels)
    accuracies = []
    for index in range(2):
        network = build_network(recipe, (1, 8, 8), 10)
        with_state(network, initial_state(network, 0, index))
        optimizer = torch.optim.SGD(network.parameters(), lr=recipe.lr, momentum=recipe.momentum)
        subset = np.flatnonzero(draw_mask(0, index, digits.n_train, 0.5))
        steps_each = len(subset) // recipe.batch_size
        for epoch, order in enumerate(draw_orders(0, index, subset, recipe.epochs)):
            for step in range(steps_each):
                batch = order[step * recipe.batch_size :][: recipe.batch_size]
                optimizer.param_groups[0]["lr"] = recipe.rate(epoch * steps_each + step, steps_each)
                optimizer.zero_grad()
                functional.cross_entropy(network(x[batch]), y[batch]).backward()
                optimizer.step()
        predicted = network(torch.tensor(digits.test_inputs).reshape(-1, 1, 8, 8)).argmax(1)
        accuracies.append((predicted.numpy() == digits.test_labels).mean())
    assert np.mean(accuracies) > 0.95


@pytest.mark.parametrize(
    ("recipe", "shape", "field", "words"),
    [
        (BARE_RESNET9, (64,), "name", "64 numbers"),
        (Resnet9Release(), (64,), "flip", "needs pictures"),
        (Resnet9Release(), (3, 8, 8), "name", "11 x 11 pixels or more"),
        (Resnet9Release(), (1, 32, 32), "mean", "give 1"),
        (ConvNet(), (64,), "name", "choose perceptron"),
        (ConvNet(), (1, 3, 8), "name", "4 x 4 pixels or more"),
        (ConvNet(), (2, 1, 8, 8), "name", "2 x 1 x 8 x 8 numbers"),
        (Resnet18Release(mean=None, std=None, flip="none"), (64,), "name", "takes pictures"),
        (CifarFast(), (3, 8, 8), "name", "9 x 9 pixels or more"),
        (Perceptron(translate=1), (64,), "translate", "needs pictures"),
        (Perceptron(tta="mirror"), (64,), "tta", "needs pictures"),
        (LogisticRegression(mean=(1,), std=(1,)), (64,), "mean", "needs pictures"),
        (ConvNet(cutout=8), (1, 8, 8), "cutout", "less than 8"),
        (ConvNet(translate=9), (1, 8, 12), "translate", "less than 8"),
    ],
)  # fmt: skip
def test_inputs_that_a_recipe_cannot_take_are_refused(recipe, shape, field, words):
    with pytest.raises(SpecError, match=words) as caught:
        build_network(recipe, shape, 10)
    assert caught.value.field == f"recipe.{field}"


@pytest.mark.parametrize("shape", [(3, 11, 11), (3, 12, 13)])
def test_the_smallest_pictures_are_taken(shape):
    assert build_network(Resnet9Release(), shape, 4)(torch.randn(2, *shape)).shape == (2, 4)
    assert build_network(SMALL_FAST, (3, 9, 9), 4)(torch.randn(2, 3, 9, 9)).shape == (2, 4)
    assert build_network(ConvNet(), (3, 4, 4), 4)(torch.randn(2, 3, 4, 4)).shape == (2, 4)


USERS = """
class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.attend = nn.TransformerEncoderLayer(width, 2, 8, dropout=0.0, batch_first=True)
        self.scale = nn.Parameter(torch.rand(width))
        self.register_buffer("seen", torch.zeros(()))
        self.out = nn.Linear(width, 3)

    def forward(self, tokens):
        return self.out((self.attend(self.embed(tokens)) * self.scale).mean(1))
"""


def test_a_users_module_is_built_with_its_arguments_and_takes_what_it_takes(users_network):
    network = build_network(Module(network=users_network(USERS), arguments={"width": 6}), (5,), 3)
    assert network(torch.randint(11, (2, 5))).shape == (2, 3)
    assert network.network.scale.shape == (6,)


def test_a_users_module_starts_from_the_models_own_numbers(users_network):
    network = build_network(Module(network=users_network(USERS)), (5,), 3)
    torch.manual_seed(0)
    generator = torch.get_rng_state()
    first = initial_state(network, 1, 2)
    assert (torch.get_rng_state() == generator).all()
    assert set(first) == set(network.state_dict())
    torch.manual_seed(99)
    again = initial_state(network, 1, 2)
    assert all((first[name] == again[name]).all() for name in first)
    for seed, index in ((1, 3), (2, 2), (2**64 - 1, 2**63)):
        other = initial_state(network, seed, index)
        for name in ("network.embed.weight", "network.scale", "network.out.bias"):
            assert (first[name] != other[name]).any()
    assert not {value.data_ptr() for value in first.values()} & {value.data_ptr() for value in again.values()}


def test_a_users_modules_are_drawn_alike_by_threads_at_once(users_network):
    network = build_network(Module(network=users_network(USERS)), (5,), 3)
    alone = [initial_state(network, 0, index) for index in range(40)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda index: initial_state(network, 0, index), range(40)))
    for first, second in zip(alone, together, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch has no batching rule for its attention
def test_a_users_state_can_be_put_into_the_module_and_stacked(users_network):
    network = build_network(Module(network=users_network(USERS)), (5,), 3)
    states = [initial_state(network, 0, index) for index in range(2)]
    parameters, buffers = stacked(states, network)
    tokens = torch.randint(11, (4, 5))

    def logits_of(parameters, buffers):
        return torch.func.functional_call(network, (parameters, buffers), (tokens,))

    together = torch.func.vmap(logits_of)(parameters, buffers)
    for state, found in zip(states, together, strict=True):
        torch.testing.assert_close(found, with_state(network, state)(tokens))


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        ("def Net(): return 3", {}, "returned a int, not a torch.nn.Module"),
        ("def Net(): raise OSError('no weights')", {}, "OSError: no weights"),
        ("class Net(nn.Linear): pass", {"in_features": 3}, "out_features"),
        ("Net = 3", {}, "can be called"),
        ("1 / 0", {}, "ZeroDivisionError"),
    ],
)
def test_a_users_module_that_cannot_be_built_is_explained(users_network, text, arguments, words):
    with pytest.raises(SpecError, match=words):
        build_network(Module(network=users_network(text), arguments=arguments), (5,), 3)


def test_a_function_that_returns_the_same_module_twice_is_refused(users_network):
    network = build_network(Module(network=users_network("kept = nn.Linear(3, 2)\ndef Net(): return kept")), (3,), 2)
    with pytest.raises(SpecError, match="same module twice"):
        initial_state(network, 0, 0)
