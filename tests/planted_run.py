"""A run whose models are known: each margin is a sum of planted weights over the subset, and some noise.

What an application says can then be compared with the truth. An example with a wrong label counts the other way.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import dmpipeline
from dmpipeline import Run, RunSpec, workflow

N_TRAIN, N_TEST, N_CLASSES = 60, 12, 3
NOISE = 0.2

_LEARNER = """
import numpy as np

def learn(dataset, mask, seed):
    planted = np.load({path!r})
    rng = np.random.default_rng(seed)
    signs = np.where(dataset.train_labels == planted["labels"], 1.0, -1.0)
    margins = planted["base"] + (mask * signs) @ planted["weight"] + {noise} * rng.standard_normal(len(planted["base"]))
    margins += {bend} * ((mask * signs) @ np.maximum(planted["weight"], 0)) ** 2
    test = np.zeros((len(dataset.test_labels), dataset.n_classes), np.float32)
    test[np.arange(len(test)), dataset.test_labels] = margins
    others = test.copy()
    others[np.arange(len(test)), dataset.test_labels] = -np.inf
    test[np.arange(len(test)), dataset.test_labels] = margins + others.max(axis=1)
    train = np.zeros((len(dataset.train_labels), dataset.n_classes), np.float32)
    train[np.arange(len(train)), planted["labels"]] = 1.0 + mask
    return train, test
"""


def planted_weight() -> npt.NDArray[np.float64]:
    """Weights (N_TRAIN, N_TEST): each target has six helpers, of 1.5 down to 0.5, and three harmers."""
    weight = np.zeros((N_TRAIN, N_TEST))
    for target in range(N_TEST):
        rng = np.random.default_rng(target)
        chosen = rng.choice(N_TRAIN, 9, replace=False)
        weight[chosen[:6], target] = np.linspace(1.5, 0.5, 6)
        weight[chosen[6:], target] = [-0.9, -0.7, -0.5]
    return weight


def planted_base() -> npt.NDArray[np.float64]:
    """Margin of each target without any example: the even ones flip when helpers are lost, the odd ones never do."""
    return np.where(np.arange(N_TEST) % 2 == 0, -1.4, 8.0)


def planted_run(folder: Path, *, bend: float = 0.0, name: str = "run", **changes: Any) -> Run:
    """Make the dataset, the learner and the run in a folder, train it and fit its datamodels.

    With a bend, the square of what a target's helpers weigh counts, too. Another name makes another run of the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    labels = np.arange(N_TRAIN) % N_CLASSES
    inputs = rng.standard_normal((N_TRAIN + N_TEST, 4)).astype(np.float32)
    if not (folder / "planted").exists():
        dmpipeline.save_dataset(
            folder / "planted",
            (inputs[:N_TRAIN], labels),
            (inputs[N_TRAIN:], np.arange(N_TEST) % N_CLASSES),
        )
    np.savez(folder / "truth.npz", weight=planted_weight(), base=planted_base(), labels=labels)
    module = f"planted_learner_{abs(hash(str(folder)))}"
    text = _LEARNER.format(path=str(folder / "truth.npz"), noise=NOISE, bend=bend)
    (folder / f"{module}.py").write_text(text)
    sys.path.insert(0, str(folder))
    spec: dict[str, Any] = {
        "dataset": str(folder / "planted"),
        "n_models": 600,
        "held_out": {"n_subsets": 20, "n_retrainings": 2},
        "outputs": ["margins"],
        "recipe": {"name": "function", "function": f"{module}:learn"},
    }
    run = Run.create(folder / name, RunSpec(**(spec | changes)))
    run.train()
    workflow.fit_run(run)
    return run
