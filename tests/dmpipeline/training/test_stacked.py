import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dmpipeline.models.networks import stacked
from dmpipeline.training.architecture import can_stack, padded
from dmpipeline.training.stacked import StackedNetworks, laid_out, true_outputs

N = 9  # examples
STEP_SIZE = 0.01  # squared errors do not explode


def linear_end(draw, n_inputs, n_outputs):
    layers = []
    for _ in range(draw(st.integers(0, 2))):
        width = draw(st.integers(1, 20))
        layers += [nn.Linear(n_inputs, width), *([nn.ReLU()] * draw(st.integers(0, 1)))]
        n_inputs = width
    return [*layers, nn.Linear(n_inputs, n_outputs)]


@st.composite
def networks(draw):
    """Draw a network that can be stacked, with the shape of its inputs and the count of its outputs."""
    n_outputs = draw(st.integers(1, 18))
    if draw(st.booleans()):
        n_features = draw(st.integers(1, 20))
        layers = [nn.Flatten()] * draw(st.integers(0, 1))
        return nn.Sequential(*layers, *linear_end(draw, n_features, n_outputs)), (n_features,), n_outputs
    n_channels, height, width = draw(st.sampled_from([1, 3])), draw(st.integers(3, 9)), draw(st.integers(3, 9))
    shape = n_channels, height, width
    layers = []
    for _ in range(draw(st.integers(0, 2))):
        taps, n_next = draw(st.sampled_from([1, 3, 5])), draw(st.integers(1, 18))
        padding = draw(st.sampled_from(["same", taps // 2]))
        layers.append(nn.Conv2d(n_channels, n_next, taps, padding=padding))
        n_channels = n_next
        after = draw(st.permutations([nn.ReLU(), "pool"]))[: draw(st.integers(0, 2))]
        for layer in after:
            window = draw(st.sampled_from([2, 3]))
            if layer != "pool":
                layers.append(layer)
            elif min(height, width) >= window:
                layers.append(nn.MaxPool2d(window))
                height, width = height // window, width // window
    end = linear_end(draw, n_channels * height * width, n_outputs)
    return nn.Sequential(*layers, nn.Flatten(), *end), shape, n_outputs


@pytest.fixture
def one_thread():
    """Compute as a worker does."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


SETTINGS = st.fixed_dictionaries(
    {
        "momentum": st.sampled_from([0.0, 0.9]),
        "weight_decay": st.sampled_from([0.0, 0.01]),
        "label_smoothing": st.sampled_from([0.0, 0.2]),
        "is_regression": st.booleans(),
    }
)


def states_of(network, n_models, seed=0):
    """Draw numbers for some models, as torch initialises such layers."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            name: (torch.rand(value.shape, generator=generator) - 0.5) * 0.8
            for name, value in network.state_dict().items()
        }
        for _ in range(n_models)
    ]


def data_for(shape, n_outputs, *, is_regression, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(N, *shape, generator=generator)
    if is_regression:
        return inputs, torch.randn(N, n_outputs, generator=generator)
    return inputs, torch.randint(0, n_outputs, (N,), generator=generator)


def stack(network, states, shape, *, batch=5, momentum=0.9, weight_decay=0.0, is_regression=False, **_):
    return StackedNetworks(
        network,
        stacked(states),
        input_shape=shape,
        batch=batch,
        momentum=momentum,
        weight_decay=weight_decay,
        is_regression=is_regression,
    )


def batches(n_models, n_steps, batch=5):
    rng = np.random.default_rng(1)
    return [torch.tensor(np.stack([rng.permutation(N)[:batch] for _ in range(n_models)])) for _ in range(n_steps)]


def steps_of_torch(network, state, inputs, labels, examples, how):
    """Train one model as a textbook does, in float64, by torch's own modules, autograd and optimizer."""
    network.double().load_state_dict(state)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=STEP_SIZE, momentum=how["momentum"], weight_decay=how["weight_decay"]
    )
    for some in examples:
        outputs = network(inputs[some].double())
        if how["is_regression"]:
            loss = nn.functional.mse_loss(outputs, labels[some].double())
        else:
            loss = nn.functional.cross_entropy(outputs, labels[some], label_smoothing=how["label_smoothing"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


@settings(max_examples=60)
@given(networks(), SETTINGS)
def test_a_group_takes_the_steps_that_torch_takes_one_by_one(made, how):
    network, shape, n_outputs = made
    assert can_stack(network, shape)
    states = states_of(network, 3)
    inputs, labels = data_for(shape, n_outputs, is_regression=how["is_regression"])
    group = stack(network, states, shape, **how)
    lying = laid_out(network, inputs)
    truth = true_outputs(labels, n_outputs, how["label_smoothing"])
    examples = batches(3, 4)
    for some in examples:
        group.step(lying, truth, some, STEP_SIZE)
    outputs, learned = group.outputs(lying), group.states()
    assert outputs.shape == (3, N, n_outputs)
    for model in range(3):
        one = steps_of_torch(network, states[model], inputs, labels, [some[model] for some in examples], how)
        torch.testing.assert_close(outputs[model].double(), one(inputs.double()), rtol=1e-3, atol=1e-4)
        for name, value in one.state_dict().items():
            torch.testing.assert_close(learned[model][name].double(), value, rtol=1e-3, atol=1e-4)
    network.float()


def test_pictures_that_are_rectified_after_they_are_flattened_are_stacked_too():
    network = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.ReLU(), nn.Linear(3 * 4 * 5, 3))
    assert can_stack(network, (2, 4, 5))
    how = {"momentum": 0.9, "weight_decay": 0.0, "label_smoothing": 0.0, "is_regression": False}
    inputs, labels = data_for((2, 4, 5), 3, is_regression=False)
    states, examples = states_of(network, 2), batches(2, 4)
    group = stack(network, states, (2, 4, 5), **how)
    for some in examples:
        group.step(laid_out(network, inputs), true_outputs(labels, 3), some, STEP_SIZE)
    outputs = group.outputs(laid_out(network, inputs))
    for model in range(2):
        one = steps_of_torch(network, states[model], inputs, labels, [some[model] for some in examples], how)
        torch.testing.assert_close(outputs[model].double(), one(inputs.double()), rtol=1e-3, atol=1e-4)


@settings(max_examples=30)
@given(networks())
def test_a_group_that_took_no_step_gives_its_states_back_to_the_bit(made):
    network, shape, _ = made
    states = states_of(network, 2)
    for before, after in zip(states, stack(network, states, shape).states(), strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


CONVOLUTIONS = nn.Sequential(
    nn.Conv2d(3, 5, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(5, 17, 5, padding=2),
    nn.MaxPool2d(2),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(17 * 2 * 2, 7),
)
LINEAR = nn.Sequential(nn.Linear(13, 21), nn.ReLU(), nn.Linear(21, 3))


@pytest.mark.parametrize(("network", "shape"), [(CONVOLUTIONS, (3, 9, 11)), (LINEAR, (13,))])
def test_bits_depend_neither_on_a_models_place_in_the_group_nor_on_the_groups_size(network, shape, one_thread):
    n_outputs = network[-1].out_features
    inputs, labels = data_for(shape, n_outputs, is_regression=False)
    # more than are put through the layers at once
    many = inputs.repeat(1200, *[1] * len(shape))[: 10_000 if len(shape) == 1 else 40]
    states, examples = states_of(network, 19), batches(19, 3)

    def trained(members):
        group = stack(network, [states[member] for member in members], shape)
        for some in examples:
            group.step(laid_out(network, inputs), true_outputs(labels, n_outputs), some[members], STEP_SIZE)
        return group.outputs(laid_out(network, many))

    whole = trained(list(range(19)))
    for members in ([11], [18, 11], [0, 1, 2, 11, 5, 6, 7], list(range(3, 12))):
        assert torch.equal(trained(members)[members.index(11)], whole[11])


def test_a_class_that_is_only_padding_stays_impossible_however_long_weights_decay():
    network = nn.Sequential(nn.Linear(4, 3))
    inputs, labels = data_for((4,), 3, is_regression=False)
    how = {"momentum": 0.9, "weight_decay": 0.5, "label_smoothing": 0.0, "is_regression": False}
    states, examples = states_of(network, 1), batches(1, 4000)
    group = stack(network, states, (4,), **how)
    for some in examples:
        group.step(laid_out(network, inputs), true_outputs(labels, 3), some, STEP_SIZE)
    one = steps_of_torch(network, states[0], inputs, labels, [some[0] for some in examples], how)
    torch.testing.assert_close(
        group.outputs(laid_out(network, inputs))[0].double(), one(inputs.double()), rtol=1e-3, atol=1e-4
    )
    network.float()


SHARED = nn.ReLU()
END = (nn.Flatten(), nn.Linear(4 * 8 * 8, 3))


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ((nn.ReLU(), nn.Linear(8, 3)), (8,)),
        ((nn.Linear(8, 3), nn.ReLU()), (8,)),
        ((nn.Linear(8, 3), nn.Flatten()), (8,)),
        ((nn.Linear(8, 3, bias=False),), (8,)),
        ((nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 3)), (8,)),
        ((nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), (8,)),
        ((nn.Linear(8, 8), SHARED, nn.Linear(8, 8), SHARED, nn.Linear(8, 3)), (8,)),
        ((nn.Linear(8, 3),), (4, 4)),
        ((), (8,)),
        ((nn.Flatten(),), (8,)),
        ((nn.Flatten(2), nn.Linear(64, 3)), (2, 8, 8)),
        # torch applies a linear layer to each row of a picture
        ((nn.Linear(8, 4), nn.Flatten(), nn.Linear(2 * 8 * 4, 3)), (2, 8, 8)),
        ((nn.Conv2d(2, 4, 3, padding=1), nn.Linear(8, 4), nn.Flatten(), nn.Linear(4 * 8 * 4, 3)), (2, 8, 8)),
        ((nn.Flatten(), nn.Conv2d(2, 4, 3, padding=1), nn.Linear(8, 3)), (2, 8, 8)),
        ((nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2 * 4 * 4, 3)), (2, 8, 8)),
        ((nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 3)), (2, 8, 8)),
        ((nn.Conv2d(2, 4, 3, padding=2), nn.Flatten(), nn.Linear(4 * 10 * 10, 3)), (2, 8, 8)),
        ((nn.Conv2d(2, 4, 3, 2, padding=1), nn.Flatten(), nn.Linear(4 * 4 * 4, 3)), (2, 8, 8)),
        ((nn.Conv2d(2, 4, 3, dilation=2, padding="same"), *END), (2, 8, 8)),
        ((nn.Conv2d(2, 4, 2, padding="same"), *END), (2, 8, 8)),
        ((nn.Conv2d(2, 4, (3, 5), padding="same"), *END), (2, 8, 8)),
        ((nn.Conv2d(2, 4, 3, padding=1, groups=2), *END), (2, 8, 8)),
        ((nn.Conv2d(2, 4, 3, padding=1, bias=False), *END), (2, 8, 8)),
        ((nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), *END), (2, 8, 8)),
        ((nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), *END), (2, 8, 8)),
        ((nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(4 * 7 * 7, 3)), (2, 8, 8)),
        ((nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d(3, 3, 1), nn.Flatten(), nn.Linear(36, 3)), (2, 8, 8)),
        ((nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d(2, dilation=2), nn.Flatten(), nn.Linear(36, 3)), (2, 8, 8)),
        ((nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d(3, ceil_mode=True), nn.Flatten(), nn.Linear(36, 3)), (2, 8, 8)),
        ((nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d((2, 2)), nn.Flatten(), nn.Linear(64, 3)), (2, 8, 8)),
        ((nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d(2, return_indices=True), *END), (2, 8, 8)),
    ],
    ids=lambda value: "-".join(type(layer).__name__ for layer in value) if isinstance(value, tuple) else None,
)
def test_what_has_no_form_is_not_stacked(layers, shape):
    assert not can_stack(nn.Sequential(*layers), shape)


def test_a_layer_or_network_of_another_class_is_not_stacked_whatever_it_descends_from():
    class Doubled(nn.Linear):
        def forward(self, inputs):
            return 2 * super().forward(inputs)

    class Backwards(nn.Sequential):
        def forward(self, inputs):
            return super().forward(inputs.flip(1))

    assert not can_stack(nn.Sequential(Doubled(8, 3)), (8,))
    assert not can_stack(Backwards(nn.Linear(8, 3)), (8,))
    assert not can_stack(nn.Linear(8, 3), (8,))


def test_padding_goes_up_to_whole_cache_lines():
    assert [padded(length) for length in (1, 16, 17, 48)] == [16, 16, 32, 48]
