"""Training many small networks at once against a plain loop."""

import numpy as np
import torch
from timing import Bench, timed

from dmpipeline.datasets import load_dataset
from dmpipeline.masks import draw_masks
from dmpipeline.recipes import Perceptron
from dmpipeline.train import train_block


def run(bench: Bench, *, small: bool) -> None:
    """128 perceptrons, small: 32, on halves of digits against a plain PyTorch loop over 4 of them, seconds a model."""
    n_models = 128 if not small else 32
    digits, recipe = load_dataset("digits"), Perceptron()
    numbers = np.arange(n_models, dtype=np.uint64)
    masks = draw_masks(0, numbers, digits.n_train, 0.5)
    inputs, labels = torch.from_numpy(digits.train_inputs), torch.from_numpy(digits.train_labels)

    def batched() -> None:
        train_block(digits, recipe, masks=masks, seed=0, model_indices=numbers, rows=range(n_models))

    def plain_loop() -> None:
        for mask in masks[:4]:
            subset = torch.from_numpy(np.flatnonzero(mask))
            network = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
            optimizer = torch.optim.SGD(network.parameters(), lr=recipe.lr, momentum=recipe.momentum)
            for _ in range(recipe.epochs):
                for batch in subset[torch.randperm(len(subset))].split(recipe.batch_size)[:-1]:
                    optimizer.zero_grad(set_to_none=True)
                    torch.nn.functional.cross_entropy(network(inputs[batch]), labels[batch]).backward()
                    optimizer.step()

    batched(), plain_loop()
    ratios = []
    for _ in range(bench.repeats):
        own, loop = timed(batched) / n_models, timed(plain_loop) / 4
        ratios.append(loop / own)
    bench.add("train a perceptron", f"{own * 1e3:.1f} ms", "plain PyTorch loop", ratios)
