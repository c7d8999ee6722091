"""Small runs of every kind of input, whose datamodels are embedded."""

import numpy as np

from dmpipeline import workflow
from dmpipeline.data.folders import save_dataset
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec

N_TRAIN, N_TEST = 80, 40
N_BLOBS = 4


def blob_of(n):
    """The planted subclass of each of the first n examples."""
    return np.arange(n) % N_BLOBS


def trained(folder, train, test, *, n_models=60, **changes):
    """A run of few models on these examples, fitted."""
    dataset = save_dataset(folder / "data", train, test)
    recipe = {"hidden": 8, "epochs": 6, "batch_size": 16, "lr": 0.1}
    values = {"held_out": {"n_subsets": 4, "n_retrainings": 2}, "recipe": recipe, "block_models": 102}
    run = Run.create(folder / "run", RunSpec(dataset=str(dataset), n_models=n_models, **(values | changes)))
    run.train()
    workflow.fit_run(run)
    return run


def blobs(n, seed):
    """Examples of four subclasses in two classes: the table and the labels."""
    centres = 1.5 * np.random.default_rng(0).normal(size=(N_BLOBS, 12))
    inputs = centres[blob_of(n)] + np.random.default_rng(seed).normal(size=(n, 12))
    return inputs, np.array(["even", "odd"])[blob_of(n) % 2]


def blobs_run(folder, n_models=400):
    """Four subclasses planted in two classes, of a table."""
    return trained(folder, blobs(N_TRAIN, 1), blobs(N_TEST, 2), n_models=n_models)
