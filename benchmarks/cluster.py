"""Training a run through its store and on a cluster of processes, against training alone."""

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from timing import Bench

from dmpipeline.cluster.dask_cluster import local_cluster, train_on_cluster
from dmpipeline.compute import available_threads
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec
from dmpipeline.training.ensembles import begin_group
from dmpipeline.training.train import GradientTrainer, Way

BLOCK = 512


def run(bench: Bench, *, small: bool) -> None:
    """4,096 perceptrons on halves of digits (small: 1,024), in blocks of 512, all trained in the same way.

    Bare training draws subsets, initial weights and orders from torch's own generator, and stores nothing. Processes
    share the cores that a single one has to itself. The time to start them is a separate figure, because it does not
    grow with the run.
    """
    n_models = 1024 if small else 4096
    way, n_cores = Way("products", 64), available_threads()
    folder = Path(tempfile.mkdtemp())
    n_made = 0

    def made(n_models: int = n_models) -> Run:
        nonlocal n_made
        n_made += 1
        spec = RunSpec(n_models=n_models, held_out={"n_subsets": 0}, block_models=BLOCK)
        return Run.create(folder / str(n_made), spec)

    bare = made()
    trainer = bare.trainer(way=way)
    assert isinstance(trainer, GradientTrainer)

    def bare_seconds() -> float:
        start = time.perf_counter()
        with trainer.workers() as (each, _):
            list(each(lambda _: _train_barely(trainer, way.n_models), range(n_models // way.n_models)))
        return time.perf_counter() - start

    def stored_seconds() -> float:
        stored, start = made(), time.perf_counter()
        stored.train(way=way)
        return time.perf_counter() - start

    def clustered_seconds(n_workers: int) -> float:
        how = {"method": way.method, "n_models": way.n_models, "n_threads": max(1, n_cores // n_workers)}
        with local_cluster(n_workers) as cluster:
            # first without the clock: what workers load and compile does not count
            train_on_cluster(made(n_workers * BLOCK), cluster, **how)
            trained, start = made(), time.perf_counter()
            train_on_cluster(trained, cluster, **how)
            return time.perf_counter() - start

    try:
        bare_seconds(), stored_seconds()
        rounds = [
            (
                bare_seconds(),
                stored_seconds(),
                clustered_seconds(1),
                clustered_seconds(2),
                stored_seconds(),
                bare_seconds(),
            )
            for _ in range(bench.repeats)
        ]
        starts = []
        for _ in range(min(bench.repeats, 3)):
            start = time.perf_counter()
            tiny = Run.create(folder / f"tiny-{start}", RunSpec(n_models=2, held_out={"n_subsets": 0}))
            with local_cluster(2) as cluster:
                train_on_cluster(tiny, cluster, method="loop", n_threads=1)
            starts.append(time.perf_counter() - start)
    finally:
        shutil.rmtree(folder)
    each = f"{statistics.median(r[0] + r[-1] for r in rounds) / 2 / n_models * 1e3:.2f} ms a model bare"
    whole = [r[0] + r[5] for r in rounds]
    ways = {
        "through the store": [r[1] + r[4] for r in rounds],
        "on a cluster of 1 process": [2 * r[2] for r in rounds],
        "on a cluster of 2 processes": [2 * r[3] for r in rounds],
    }
    for how, seconds in ways.items():
        shares = [taken / bare for taken, bare in zip(seconds, whole, strict=True)]
        bench.add(f"train {how}", each, "bare, unseeded ensemble, share of its time", shares, bar="<= 1.10")
    bench.add(
        "train on a cluster of 2 processes",
        each,
        "one process, throughput",
        [(r[1] + r[4]) / 2 / r[3] for r in rounds],
        bar=">= 0.9",
    )
    bench.add("start and end 2 processes", f"{statistics.median(starts):.1f} s", "in seconds", starts)


def _train_barely(trainer: GradientTrainer, n_models: int) -> torch.Tensor:
    """Train one group as a script would that does not record its random draws; return its logits."""
    material, recipe = trainer.material, trainer.recipe
    n_train = len(material.labels)
    size = n_train // 2
    steps_each = size // recipe.batch_size
    states = {
        name: torch.empty(n_models, *value.shape).uniform_(-1, 1).mul_(value[0].numel() ** -0.5)
        for name, value in material.network.named_parameters()
    }
    with torch.inference_mode():
        group = begin_group(material, "products", states, recipe.batch_size)
        subsets = [torch.randperm(n_train)[:size] for _ in range(n_models)]
        for epoch in range(recipe.epochs):
            orders = torch.stack([subset[torch.randperm(size)] for subset in subsets])
            for step in range(steps_each):
                some = orders[:, step * recipe.batch_size : (step + 1) * recipe.batch_size]
                group.step(some, None, recipe.rate(epoch * steps_each + step, steps_each))
        train, test = group.outputs()
    return torch.cat([train, test], dim=1).half()
