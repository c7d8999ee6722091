"""dattri's attributors in a process and an environment of their own.

Started as `python peer_attribution.py FOLDER`, which holds problem.pt: a network, states of trained models, training
and test inputs and labels. Each attributor's scores go to FOLDER/<name>.npy, positive where an example helps; a line of
JSON a name says how many models it took, how wide its projections are (0: there are none), and its seconds: of all
processors, and by the clock.
"""

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from dattri.algorithm import IFAttributorCG, TRAKAttributor
from dattri.task import AttributionTask
from torch.utils.data import DataLoader, TensorDataset

BATCH = 256
LARGE = 50_000
SOME_TARGETS = 100
SOME_MODELS = 3


def main(folder: Path) -> None:
    torch.manual_seed(0)
    problem = torch.load(folder / "problem.pt", weights_only=False)  # written by attribution.py
    network, states = problem["network"].eval(), problem["states"]
    sets = {part: TensorDataset(problem[f"{part}_inputs"], problem[f"{part}_labels"]) for part in ("train", "test")}
    train, test = (DataLoader(examples, batch_size=BATCH) for examples in sets.values())

    of_one = problem["train_inputs"].shape[1:]

    def loss(parameters: dict, examples: tuple) -> torch.Tensor:
        inputs, labels = examples  # of one under vmap, of a batch in products with the Hessian
        logits = torch.func.functional_call(network, parameters, inputs.reshape(-1, *of_one))
        return torch.nn.functional.cross_entropy(logits, labels.reshape(-1))

    def log_odds(parameters: dict, example: tuple) -> torch.Tensor:
        inputs, label = example
        logits = torch.func.functional_call(network, parameters, inputs.unsqueeze(0))
        is_true = torch.arange(logits.shape[-1]) == label
        rest = torch.where(is_true, -torch.inf, logits[0])
        return (logits[0] * is_true).sum() - torch.logsumexp(rest, -1)

    def probability(parameters: dict, example: tuple) -> torch.Tensor:
        return torch.exp(-loss(parameters, example))

    def trak(n_models: int, size: int, regularization: float) -> torch.Tensor:
        task = AttributionTask(loss_func=log_odds, model=network, checkpoints=states[:n_models])
        projector = {"proj_dim": size, "proj_max_batch_size": 32, "proj_seed": 0, "device": "cpu"}
        attributor = TRAKAttributor(
            task, correct_probability_func=probability, projector_kwargs=projector, regularization=regularization
        )
        with torch.no_grad():
            attributor.cache(train)
            return attributor.attribute(test)

    def influence(n_models: int) -> torch.Tensor:
        task = AttributionTask(loss_func=loss, model=network, checkpoints=states[:n_models])
        attributor = IFAttributorCG(task, max_iter=10, regularization=0.1)
        # it solves once more for each pair of a training batch and a test example, by products with all batches
        whole = DataLoader(sets["train"], batch_size=len(sets["train"]))
        attributor.cache(whole)
        return attributor.attribute(whole, test).detach()

    n = len(states)
    # of a large network, wide projections of all models and solutions for all targets take most of an hour
    is_large = sum(value.numel() for value in states[0].values()) > LARGE
    few = min(n, SOME_MODELS)
    wider = ((512, n), (2048, few)) if is_large else ((2048, n), (4096, n))
    say(folder, f"dattri TRAK-{n}, as it comes", n, 512, lambda: trak(n, 512, 0.0))
    for width, of in wider:
        name = f"dattri TRAK-{of}, {width:,} wide, regularised by 0.1"
        say(folder, name, of, width, functools.partial(trak, of, width, 0.1))
    which = slice(SOME_TARGETS) if is_large else slice(None)
    test = DataLoader(TensorDataset(*(part[which] for part in sets["test"].tensors)), batch_size=BATCH)
    name = "dattri influence functions by conjugate gradients"
    say(folder, f"{name}, {SOME_TARGETS} targets" if is_large else name, 1, 0, lambda: influence(1))


def say(folder: Path, name: str, n_models: int, width: int, work: Callable[[], torch.Tensor]) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    scores = work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    np.save(folder / f"{name}.npy", scores.float().numpy())
    facts = {"name": name, "n_models": n_models, "width": width, "cpu_seconds": cpu, "wall_seconds": wall}
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
