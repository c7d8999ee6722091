"""Training many small networks at once against a plain loop, one network after the other."""

from collections.abc import Callable

import numpy as np
import torch
from timing import Bench, timed

from dmpipeline.data.datasets import load_dataset
from dmpipeline.data.examples import Dataset, checked_dataset
from dmpipeline.draws.masks import draw_masks
from dmpipeline.models.networks import build_network
from dmpipeline.models.recipes import ConvNet, Perceptron, Recipe
from dmpipeline.training.probe import fastest_way
from dmpipeline.training.train import GradientTrainer, Way

SEED = 0


def run(bench: Bench, *, small: bool) -> None:
    """Perceptrons on digits, and a convolutional net on 8 x 8 and on 28 x 28 pictures, seconds a model."""
    digits, share = load_dataset("digits"), 4 if small else 1
    _compare(bench, "train a perceptron", digits, Perceptron(), 512 // share, 4, ">= 25")
    _compare(bench, "train a convolutional net, 8 x 8", digits, ConvNet(), 64 // share, 4, ">= 4")
    _compare(
        bench, "train a convolutional net, 28 x 28", _enlarged(digits), ConvNet(epochs=3), 32 // share, 4, ">= 1.3"
    )


def _compare(bench: Bench, what: str, dataset: Dataset, recipe: Recipe, n_models: int, n_looped: int, bar: str) -> None:
    numbers = np.arange(n_models, dtype=np.uint64)
    masks = draw_masks(SEED, numbers, dataset.n_train, 0.5)
    # the search may take what it would in a real run
    way = fastest_way(dataset, recipe, seed=SEED, masks=masks, n_models=10_000, tell=_tell)
    trainer = GradientTrainer(dataset, recipe, seed=SEED, way=way)
    inputs = trainer.material.network_inputs(trainer.material.train_inputs)
    test_inputs = trainer.material.network_inputs(trainer.material.test_inputs)
    labels = trainer.material.labels
    right: dict[str, list[float]] = {"ours": [], "loop": []}

    def ours() -> None:
        logits = trainer.train(masks, numbers, range(n_models)).test
        right["ours"].append(float((logits.argmax(-1) == dataset.test_labels).mean()))

    def plain_loop() -> None:
        for mask in masks[:n_looped]:
            network = build_network(recipe, trainer.material.input_shape, dataset.n_classes)
            logits = _trained_plainly(network, inputs, labels, torch.from_numpy(np.flatnonzero(mask)), recipe)(
                test_inputs
            )
            right["loop"].append(float((logits.argmax(-1).numpy() == dataset.test_labels).mean()))

    ours(), plain_loop()
    ratios = []
    for _ in range(bench.repeats):
        own, loop = timed(ours) / n_models, timed(plain_loop) / n_looped
        ratios.append(loop / own)
    accuracy = f"{np.mean(right['ours']):.1%} right, the loop {np.mean(right['loop']):.1%}"
    bench.add(f"{what}: {accuracy}", f"{own * 1e3:.1f} ms by {way.method}", "plain PyTorch loop", ratios, bar=bar)


def _trained_plainly(
    network: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor, subset: torch.Tensor, recipe: Recipe
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Train a network as a textbook does, on all cores that torch takes by itself."""
    optimizer = torch.optim.SGD(network.parameters(), lr=recipe.lr, momentum=recipe.momentum)
    steps_each = len(subset) // recipe.batch_size
    for epoch in range(recipe.epochs):
        batches = subset[torch.randperm(len(subset))].split(recipe.batch_size)[:steps_each]
        for number, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = recipe.rate(epoch * steps_each + number, steps_each)
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(network(inputs[batch]), labels[batch]).backward()
            optimizer.step()
    return torch.no_grad()(network)


def _enlarged(digits: Dataset) -> Dataset:
    """Enlarge digits to 28 x 28 pictures, each pixel three times as wide and high, with a border."""

    def enlarge(pictures: np.ndarray) -> np.ndarray:
        large = np.kron(pictures.reshape(-1, 8, 8), np.ones((1, 3, 3), np.float32))
        return np.pad(large, ((0, 0), (2, 2), (2, 2)))

    parts = [(digits.train_inputs, digits.train_labels), (digits.test_inputs, digits.test_labels)]
    train, test = [(enlarge(inputs), labels) for inputs, labels in parts]
    return checked_dataset(
        "large-digits", train, test, source="digits", example_order="that of digits", image_shape=(28, 28)
    )


def _tell(way: Way, rate: float) -> None:
    print(f"    {way.method} by {way.n_models}: {rate:.3g} models a second", flush=True)
