import shutil
import sys

import numpy as np
import pytest
import torch

from dmpipeline.data.examples import checked_dataset
from dmpipeline.draws.masks import draw_masks
from dmpipeline.errors import SpecError
from dmpipeline.models.networks import initial_states
from dmpipeline.models.recipes import (
    CifarFast,
    ConvNet,
    Function,
    LogisticRegression,
    Module,
    Perceptron,
    Resnet9Release,
    Resnet18Release,
)
from dmpipeline.training.ensembles import begin_group, mean_losses, possible_methods
from dmpipeline.training.material import Material
from dmpipeline.training.train import GradientTrainer, Way, make_trainer

USERS = """
import numpy as np
import torch
from torch import nn

class Language(nn.Module):
    def __init__(self, n_tokens, tied=False):
        super().__init__()
        self.embedding, self.head = nn.Embedding(n_tokens, 6), nn.Linear(6, n_tokens, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.full((6,), 1.5), persistent=False)
    def forward(self, tokens):
        return self.head(self.embedding(tokens) * self.scale)

class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
    def forward(self, inputs):
        return self.layers(inputs)

class Looking(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)
    def forward(self, inputs):
        outputs = self.linear(inputs)
        return outputs * 2 if outputs.mean().item() > 0 else outputs

def plain(n_outputs=3, n_features=8):
    return nn.Sequential(nn.Linear(n_features, 5), nn.Tanh(), nn.Linear(5, n_outputs))

class Squeezed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 1)
    def forward(self, inputs):
        return self.linear(inputs)[:, 0]

def ridge(dataset, mask, seed, strength=1.0):
    x, y = dataset.train_inputs[mask], np.eye(dataset.n_classes)[dataset.train_labels[mask]]
    w = np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ y)
    noise = torch.randn(1).item() * 1e-3
    return dataset.train_inputs @ w + noise, dataset.test_inputs @ w
"""


@pytest.fixture(autouse=True)
def users(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "engine_users.py").write_text(USERS)
    yield
    sys.modules.pop("engine_users", None)


def module(name, **changes):
    values = {"epochs": 2, "batch_size": 5, "lr": 0.1, "network": f"engine_users:{name}"}
    return Module(**(values | changes))


def made(inputs, labels, n_test=4):
    train, test = (inputs[n_test:], labels[n_test:]), (inputs[:n_test], labels[:n_test])
    return checked_dataset("made", train, test, source="made", example_order="as made")


def pictures(side, n_channels, n=24):
    rng = np.random.default_rng(0)
    return made(rng.integers(0, 256, (n, side, side, n_channels), np.uint8), np.arange(n) % 3)


def numbers(n=24):
    return made(np.random.default_rng(0).normal(size=(n, 8)), np.arange(n) % 3)


def regression(k, n=24):
    rng = np.random.default_rng(0)
    return made(rng.normal(size=(n, 8)), rng.normal(size=(n, k) if k else n))


def sequences(n=24):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, (n, 5))
    labels[:, 3] = -1
    labels[::3, 1:] = -1
    return made(rng.integers(0, 7, (n, 5)), labels)


def trained(dataset, recipe, way, indices=(0, 1, 2), *, seed=3, alpha=0.6, material=None):
    numbers = np.array(indices, np.uint64)
    masks = draw_masks(seed, numbers, dataset.n_train, alpha)
    trainer = GradientTrainer(dataset, recipe, seed=seed, way=way, material=material)
    return trainer.train(masks, numbers, range(len(masks)))


LANGUAGE = module("Language", arguments={"n_tokens": 7})
FEW = {"epochs": 2, "batch_size": 4}
CASES = {
    "perceptron": (numbers, Perceptron(hidden=5, **FEW)),
    "perceptron on pictures": (lambda: pictures(5, 1), Perceptron(hidden=5, **FEW)),
    "logistic": (numbers, LogisticRegression(weight_decay=0.1, label_smoothing=0.1, **FEW)),
    "nesterov": (numbers, Perceptron(hidden=5, nesterov=True, **FEW)),
    "convnet": (lambda: pictures(9, 3), ConvNet(channels=(3, 5), **FEW)),
    "grey convnet": (lambda: pictures(7, 1), ConvNet(channels=(3, 5), weight_decay=0.01, **FEW)),
    "altered convnet": (
        lambda: pictures(9, 3),
        ConvNet(channels=(3, 5), flip="alternating", translate=1, cutout=2, tta="mirror", **FEW),
    ),
    "resnet9": (lambda: pictures(11, 3), Resnet9Release(schedule="constant", lr=0.005, **FEW)),
    "resnet18": (lambda: pictures(8, 3), Resnet18Release(schedule="constant", lr=0.01, epochs=1, batch_size=12)),
    "cifar-fast": (lambda: pictures(9, 3), CifarFast(widths=(4, 6), schedule="constant", lr=0.05, **FEW)),
    "one number": (lambda: regression(0), Perceptron(hidden=5, lr=0.02, **FEW)),
    "two numbers": (lambda: regression(2), Perceptron(hidden=5, lr=0.02, **FEW)),
    "one number in a column": (lambda: regression(1), LogisticRegression(lr=0.02, **FEW)),
    "sequences": (sequences, LANGUAGE),
    "module": (numbers, module("plain")),
    "squeezed module": (lambda: regression(0), module("Squeezed", lr=0.01)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_possible_method_trains_the_same_models_but_for_rounding(case):
    dataset, recipe = CASES[case][0](), CASES[case][1]
    methods = possible_methods(Material.of(dataset, recipe))
    assert "vmap" in methods
    alone = trained(dataset, recipe, Way("loop", 1))
    start = trained(dataset, recipe.model_copy(update={"lr": 1e-9}), Way("loop", 1))
    assert np.abs(alone.train.astype(float) - start.train).max() > 0.01  # it has moved away from where it began
    for method in methods[:-1]:
        together = trained(dataset, recipe, Way(method, 2))
        for part in ("train", "test"):
            got, expected = (getattr(logits, part).astype(np.float64) for logits in (together, alone))
            assert got.shape == expected.shape
            np.testing.assert_allclose(got, expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize(
    ("case", "methods"),
    [
        ("perceptron", ("products", "vmap", "loop")),
        ("convnet", ("products", "vmap", "loop")),
        ("two numbers", ("products", "vmap", "loop")),
        ("nesterov", ("vmap", "loop")),
        ("altered convnet", ("vmap", "loop")),
        ("resnet9", ("vmap", "loop")),
        ("sequences", ("vmap", "loop")),
        ("module", ("vmap", "loop")),
    ],
)
def test_methods_are_those_that_a_network_and_its_recipe_allow(case, methods):
    make, recipe = CASES[case]
    assert possible_methods(Material.of(make(), recipe)) == methods


@pytest.mark.parametrize(("name", "draws"), [("Dropping", True), ("Looking", False)])
def test_networks_that_draw_numbers_or_look_at_values_are_trained_one_by_one(name, draws):
    material = Material.of(numbers(), module(name))
    assert possible_methods(material) == ("loop",)
    assert material.draws == draws
    with pytest.raises(SpecError, match="choose loop"):
        GradientTrainer(numbers(), module(name), seed=0, way=Way("vmap", 2))


def test_what_dropout_draws_depends_on_seed_and_model_alone_and_leaves_torchs_generator():
    dataset, recipe = numbers(), module("Dropping", epochs=6)
    torch.manual_seed(1)
    generator = torch.get_rng_state()
    first = trained(dataset, recipe, Way("loop", 1), (0, 1, 2))
    assert torch.equal(torch.get_rng_state(), generator)
    torch.manual_seed(2)
    again = trained(dataset, recipe, Way("loop", 1), (2, 7, 0))
    assert np.array_equal(first.train[0], again.train[2])
    assert np.array_equal(first.train[2], again.train[0])
    undropped = trained(dataset, module("plain", epochs=6), Way("loop", 1))
    assert undropped.train.shape == first.train.shape
    # the same model with other draws is another one
    trainer = GradientTrainer(dataset, recipe, seed=3)
    masks = draw_masks(3, np.array([0], np.uint64), dataset.n_train, 0.6)
    group = trainer.begin(masks, np.array([0], np.uint64))
    for step in trainer.steps(masks, np.array([0], np.uint64)):
        group.step(*step)  # drawn from torch's own generator
    assert not np.array_equal(group.outputs()[0][0].half(), first.train[0])


def test_tied_weights_stay_tied_and_buffers_that_are_never_saved_are_kept():
    recipe = module("Language", arguments={"n_tokens": 7, "tied": True})
    dataset = sequences()
    methods = possible_methods(Material.of(dataset, recipe))
    found = [trained(dataset, recipe, Way(method, 1)).test.astype(float) for method in methods]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=5e-3)
    index = np.array([0], np.uint64)
    trainer = GradientTrainer(dataset, recipe, seed=3)
    (state,) = trainer.states(draw_masks(3, index, dataset.n_train, 0.6), index)
    assert set(state) == {"network.embedding.weight", "network.scale"}


def test_positions_with_nothing_to_predict_do_not_matter():
    dataset = sequences()
    labels = torch.tensor(dataset.train_labels[:6]).view(2, 3, 5)
    outputs = torch.randn(2, 3, 5, 7)
    losses = mean_losses(outputs, labels, 0.0)
    for model in range(2):
        seen = labels[model] >= 0
        expected = torch.nn.functional.cross_entropy(outputs[model][seen], labels[model][seen])
        torch.testing.assert_close(losses[model], expected)
    disturbed = outputs + torch.where(labels[..., None] < 0, 100 * torch.randn(7), 0)
    torch.testing.assert_close(mean_losses(disturbed, labels, 0.1), mean_losses(outputs, labels, 0.1))


@pytest.mark.parametrize(
    ("make", "recipe"),
    [(lambda: pictures(9, 3), ConvNet(channels=(3, 5), **FEW)), (numbers, LogisticRegression(**FEW))],
)
@pytest.mark.parametrize("method", ["products", "vmap", "loop"])
def test_datasets_may_be_memory_maps_that_nobody_may_write_to(tmp_path, make, recipe, method):
    dataset = make()
    mapped = {}
    for name in ("train_inputs", "train_labels", "test_inputs", "test_labels"):
        np.save(tmp_path / f"{name}.npy", getattr(dataset, name))
        mapped[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    parts = [(mapped[f"{part}_inputs"], mapped[f"{part}_labels"]) for part in ("train", "test")]
    read_only = checked_dataset("made", *parts, source="made", example_order="as made")
    assert not read_only.train_inputs.flags.writeable
    assert not read_only.train_labels.flags.writeable
    way = Way(method, 1)
    assert np.array_equal(trained(read_only, recipe, way).test, trained(dataset, recipe, way).test)


@pytest.mark.parametrize(
    ("make", "recipe", "words"),
    [
        (numbers, module("plain", arguments={"n_outputs": 4}), r"\(2, 4\).*\(2, 3\)"),
        (numbers, module("plain", arguments={"n_features": 9}), "cannot take the inputs"),
        (sequences, Perceptron(), "cannot take the inputs"),
        (numbers, LANGUAGE, "cannot take the inputs"),
    ],
)
def test_a_network_that_does_not_fit_the_dataset_is_refused_before_anything_is_trained(make, recipe, words):
    with pytest.raises(SpecError, match=words):
        make_trainer(make(), recipe, seed=0)


def test_a_function_of_the_users_is_called_with_the_models_own_subset_and_number():
    dataset, recipe = numbers(), Function(function="engine_users:ridge", arguments={"strength": 2.0})
    indices = np.array([4, 9], np.uint64)
    masks = draw_masks(0, indices, dataset.n_train, 0.5)
    torch.manual_seed(0)
    generator = torch.get_rng_state()
    first = make_trainer(dataset, recipe, seed=0).train(masks, indices, range(2))
    assert torch.equal(torch.get_rng_state(), generator)
    torch.manual_seed(5)
    again = make_trainer(dataset, recipe, seed=0).train(masks[1:], indices[1:], range(1))
    assert np.array_equal(first.train[1], again.train[0])
    x, y = dataset.train_inputs[masks[0]], np.eye(3)[dataset.train_labels[masks[0]]]
    expected = dataset.test_inputs @ np.linalg.solve(x.T @ x + 2 * np.eye(8), x.T @ y)
    np.testing.assert_allclose(first.test[0], expected, atol=2e-3)


def test_models_of_unequal_subsets_are_trained_as_alone():
    dataset, recipe = numbers(40), Perceptron(hidden=5, epochs=2, batch_size=6)
    indices = np.arange(6, dtype=np.uint64)
    masks = np.random.default_rng(0).random((6, dataset.n_train)) < np.linspace(0.1, 0.9, 6)[:, None]
    for way in (Way("products", 4), Way("vmap", 4)):
        together = GradientTrainer(dataset, recipe, seed=0, way=way).train(masks, indices, range(6))
        for model in range(6):
            some = slice(model, model + 1)
            alone = GradientTrainer(dataset, recipe, seed=0).train(masks[some], indices[some], range(1))
            np.testing.assert_allclose(together.test[model].astype(float), alone.test[0], atol=5e-3)


def test_half_precision_is_single_on_a_processor():
    dataset = pictures(9, 3)
    half, single = (
        trained(dataset, CifarFast(widths=(4, 6), precision=precision, schedule="constant", **FEW), Way("loop", 1))
        for precision in ("half", "single")
    )
    assert np.array_equal(half.test, single.test)


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_in_bfloat16_the_same_steps_are_taken_within_its_rounding(method):
    dataset, recipe = numbers(), Perceptron(hidden=16, label_smoothing=0.1, **FEW)
    indices = np.array([0], np.uint64)
    masks = draw_masks(0, indices, dataset.n_train, 0.6)
    trainer = GradientTrainer(dataset, recipe, seed=0, way=Way(method, 1))
    exact, rounded = trainer.begin(masks, indices), trainer.begin(masks, indices)
    rounded._half = torch.bfloat16
    for step in trainer.steps(masks, indices):
        exact.step(*step)
        rounded.step(*step)
    one, other = exact.outputs()[0], rounded.outputs()[0]
    assert other.dtype == torch.float32
    assert not torch.equal(one, other)
    torch.testing.assert_close(one, other, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("way", [Way("loop", 2), Way("vmap", 2, compiled=True), Way("products", 2, compiled=True)])
def test_a_way_that_cannot_be_is_refused(way):
    with pytest.raises(SpecError, match="only loop trains one model at a time"):
        GradientTrainer(numbers(), Perceptron(), seed=0, way=way)


@pytest.mark.parametrize("case", ["cifar-fast", "perceptron"])
def test_one_compiled_network_trains_all_models_as_they_are_trained_without(case):
    compiled = []
    make, recipe = CASES[case]
    dataset = make()
    material = Material.of(dataset, recipe, compiler=lambda graph, _inputs: compiled.append(graph) or graph.forward)
    torch.compiler.reset()
    found = trained(dataset, recipe, Way("loop", 1, compiled=True), material=material)
    expected = trained(dataset, recipe, Way("loop", 1))
    assert len(compiled) == 1
    np.testing.assert_allclose(found.test.astype(float), expected.test, atol=5e-3)
    np.testing.assert_allclose(found.train.astype(float), expected.train, atol=5e-3)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles with g++ here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it loads its compiler
def test_torchs_own_compiler_changes_nothing_but_rounding(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    dataset, recipe = numbers(), Perceptron(hidden=5, **FEW)
    torch.compiler.reset()
    found = trained(dataset, recipe, Way("loop", 1, compiled=True))
    np.testing.assert_allclose(found.test.astype(float), trained(dataset, recipe, Way("loop", 1)).test, atol=5e-3)


def test_a_group_of_a_loop_has_one_model():
    material = Material.of(numbers(), Perceptron())
    with pytest.raises(ValueError, match="one model at a time"):
        begin_group(material, "loop", initial_states(material.network, 0, [0, 1]), 4)
