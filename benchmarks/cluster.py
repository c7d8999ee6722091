"""Training a run through its store and on a cluster of processes, against training alone."""

import shutil
import statistics
import tempfile
import time
from pathlib import Path

from timing import Bench

from dmpipeline.cluster import local_cluster, train_on_cluster
from dmpipeline.compute import available_threads
from dmpipeline.masks import subset_masks
from dmpipeline.spec import RunSpec
from dmpipeline.store import Run
from dmpipeline.train import Way

BLOCK = 512


def run(bench: Bench, *, small: bool) -> None:
    """4,096 perceptrons on halves of digits, small: 1,024, in blocks of 512, trained all in the same way.

    Bare training takes the same masks and keeps nothing. Processes share the cores that a single one has to itself.
    Their start, with all that it loads, is a figure of its own, as it does not grow with the run.
    """
    n_models = 1024 if small else 4096
    way, n_cores = Way("products", 64), available_threads()
    folder = Path(tempfile.mkdtemp())
    n_made = 0

    def made() -> Run:
        nonlocal n_made
        n_made += 1
        spec = RunSpec(n_models=n_models, held_out={"n_subsets": 0}, block_models=BLOCK)
        return Run.create(folder / str(n_made), spec)

    bare = made()
    trainer = bare.trainer(way=way)

    def bare_seconds() -> float:
        start = time.perf_counter()
        for rows in bare.spec.blocks:
            trainer.train(subset_masks(bare.spec, rows, trainer.dataset.n_train), bare.spec.model_indices(rows), rows)
        return time.perf_counter() - start

    def stored_seconds() -> float:
        stored = made()
        start = time.perf_counter()
        stored.train(way=way)
        seconds = time.perf_counter() - start
        shutil.rmtree(stored.path)
        return seconds

    def on(cluster: object, n_workers: int) -> float:
        trained, start = made(), time.perf_counter()
        how = {"method": way.method, "n_models": way.n_models, "n_threads": max(1, n_cores // n_workers)}
        train_on_cluster(trained, cluster, **how)
        seconds = time.perf_counter() - start
        shutil.rmtree(trained.path)
        return seconds

    try:
        start = time.perf_counter()
        with local_cluster(1) as one, local_cluster(2) as two:
            on(one, 1), on(two, 2)
            print(f"  first run on both clusters, with their start: {time.perf_counter() - start:.1f} s", flush=True)
            rounds = [
                (bare_seconds(), stored_seconds(), on(one, 1), on(two, 2), stored_seconds(), bare_seconds())
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
    bench.add(
        "train through the store",
        each,
        "bare, share of its time",
        [(r[1] + r[4]) / (r[0] + r[5]) for r in rounds],
        bar="<= 1.10",
    )
    bench.add(
        "train on a cluster of 1 process",
        each,
        "bare, share of its time",
        [2 * r[2] / (r[0] + r[5]) for r in rounds],
        bar="<= 1.10",
    )
    bench.add(
        "train on a cluster of 2 processes",
        each,
        "one process, throughput",
        [(r[1] + r[4]) / 2 / r[3] for r in rounds],
        bar=">= 0.9",
    )
    bench.add("start and end 2 processes", f"{statistics.median(starts):.1f} s", "in seconds", starts)
