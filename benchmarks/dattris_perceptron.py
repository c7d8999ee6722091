"""The network of dattri's benchmark on MNIST, alone in its file: a run refuses to go on once the file changed."""

from torch import nn


def perceptron() -> nn.Module:
    """784-128-64-10."""
    layers = [nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(nn.Flatten(), *layers)
