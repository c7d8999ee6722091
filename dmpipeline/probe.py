"""Find the fastest way to train a run's models on a device, by training some for a moment in each.

What is measured is steps alone, with every core at work as in a real block; nothing is kept. The search climbs: a group
is doubled, or halved, from where its method usually does best, until that makes it no faster. It may take a tenth of
what the run itself will; a run shorter than that is trained as best guessed.
"""

import copy
import os
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dmdata import phases
from dmpipeline.ensembles import Material, Method, possible_methods, stacked_networks
from dmpipeline.errors import SpecError
from dmpipeline.examples import Dataset
from dmpipeline.networks import initial_states
from dmpipeline.recipes import Recipe
from dmpipeline.train import GradientTrainer, Way

_TRIAL_SECONDS = 0.2
_FIRST_STEPS = 3  # pay for what later ones find ready
_SHARE_OF_RUN = 0.1
_SHARE_OF_MEMORY = 0.5
_MOST_MODELS = 1024
_WORTH_DOUBLING = 1.03


def fastest_way(
    dataset: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    masks: npt.NDArray[np.bool_],
    n_models: int,
    device: str = "cpu",
    methods: tuple[Method, ...] | None = None,
    tell: Callable[[Way, float], None] | None = None,
) -> Way:
    """Choose the method, and how many models make a group.

    Parameters
    ----------
    dataset, recipe, seed, device
        As for `GradientTrainer`.
    masks : array of bool, shape (n, n_train)
        Some of the run's, at least one; no group is tried with more models.
    n_models : int
        How many are to be trained: tells how long the search may take.
    methods : tuple of str, optional
        Choose among these.
    tell : callable, optional
        Called with each way that was tried and how many models it trains in a second.

    Raises
    ------
    SpecError
        If the recipe cannot be trained on the dataset, by these methods or on this device.
    """
    material = GradientTrainer(dataset, recipe, seed=seed, device=device).material
    possible = possible_methods(material)
    for method in methods or ():
        if method not in possible:
            raise SpecError(
                f"{recipe.name} cannot be trained by {method} here; choose {' or '.join(possible)}",
                field="method",
                value=method,
            )
    if (methods or possible) == ("loop",) and not _compiles(material):
        return Way("loop", 1)
    phases.phase("finding the fastest way to train")
    began, rates = time.perf_counter(), dict[Way, float]()
    masks = _of_one_kind(material, masks)

    def rate(way: Way) -> float:
        """Measure, or remember; 0 where time is up or memory would not do."""
        fastest = max(rates.values(), default=0.0)
        is_late = rates and time.perf_counter() - began > _SHARE_OF_RUN * n_models / fastest
        if way not in rates and not is_late and _fits(material, way, len(masks)):
            trainer = GradientTrainer(dataset, recipe, seed=seed, way=way, device=device, material=material)
            phases.phase(f"finding the fastest way to train, trying {way.in_words}")
            try:
                rates[way] = trained_a_second(trainer, masks[: way.n_models])
            except RuntimeError:
                if not way.compiled:
                    with trainer.user_code():
                        raise
                rates[way] = 0.0  # torch cannot compile it, or has no compiler here
            if tell is not None:
                tell(way, rates[way])
        return rates.get(way, 0.0)

    chosen = []
    for method in methods or possible:
        way = Way(method, min(_usual_models(material, method), len(masks)))
        while not _fits(material, way, len(masks)):
            way = Way(method, way.n_models // 2)
        if way == Way("vmap", 1) and methods is None:
            continue  # a loop is the same with less to do
        best = rate(way)
        if method == "loop" and _compiles(material):
            chosen.append(Way("loop", 1, compiled=True))
            rate(chosen[-1])
        for factor in (2, 0.5):
            # a larger group takes more memory, and must be worth it
            while method != "loop" and (n := int(way.n_models * factor)):
                another = Way(method, n)
                if rate(another) <= best * (_WORTH_DOUBLING if factor > 1 else 1):
                    break
                way, best = another, rate(another)
        chosen.append(way)
    return max(chosen, key=rate)


def trained_a_second(trainer: GradientTrainer, masks: npt.NDArray[np.bool_]) -> float:
    """Measure how many models are trained in a second, every worker of a trainer at work on a group of these."""
    model_indices = np.arange(len(masks), dtype=np.uint64)
    steps_each = trainer.n_steps(int(masks[0].sum()))
    with trainer.workers() as (each, n_workers):
        barrier = threading.Barrier(n_workers)

        def work(_: int) -> float:
            with trainer.mode():
                try:
                    group, steps = trainer.begin(masks, model_indices), _over_again(trainer, masks, model_indices)
                    for _ in range(_FIRST_STEPS):
                        group.step(*next(steps))
                    _wait_for(trainer.material.device)
                except BaseException:
                    barrier.abort()  # nobody waits for who will not come
                    raise
                barrier.wait()
                began, n_steps = time.perf_counter(), 0
                while (seconds := time.perf_counter() - began) < _TRIAL_SECONDS or not n_steps:
                    group.step(*next(steps))
                    n_steps += 1
                    _wait_for(trainer.material.device)
            return n_steps * len(masks) / seconds / steps_each

        return float(sum(each(work, range(n_workers))))


def model_bytes(material: Material, method: Method) -> int:
    """Estimate the memory that a model in training takes.

    What products need is known; else it is its numbers three times, and the outputs of its layers twice.
    """
    states = initial_states(material.network, 0, [0])
    numbers = sum(tensor.numel() for tensor in states.values())
    batch = min(material.recipe.batch_size, material.dataset.n_train)
    if method == "products":
        return stacked_networks(material, states, batch).nbytes
    return 4 * (3 * numbers + 2 * batch * _outputs_of_layers(material))


def _outputs_of_layers(material: Material) -> int:
    """Count the numbers that all layers put out for one example."""
    counted = []

    def count(_layer: nn.Module, _inputs: tuple[torch.Tensor, ...], output: object) -> None:
        if isinstance(output, torch.Tensor):
            counted.append(output[0].numel())

    twin = copy.deepcopy(material.network).eval()
    for layer in twin.modules():
        if not list(layer.children()):
            layer.register_forward_hook(count)
    with torch.no_grad():
        twin(material.blank_inputs)
    return sum(counted)


def _fits(material: Material, way: Way, n_masks: int) -> bool:
    if way.n_models == 1:
        return True
    n_workers = torch.get_num_threads() if material.device.type == "cpu" else 1
    needed = way.n_models * n_workers * model_bytes(material, way.method)
    return way.n_models <= min(n_masks, _MOST_MODELS) and needed <= _SHARE_OF_MEMORY * _free_bytes(material.device)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def _compiles(material: Material) -> bool:
    """Tell whether it may be worth a minute to compile a network."""
    return material.device.type == "cuda"


def _of_one_kind(material: Material, masks: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Repeat the masks whose models take equally many steps, as most of them do, until there are as many as before."""
    batch_size, sizes = material.recipe.batch_size, masks.sum(1)
    batches = np.minimum(sizes, batch_size)
    kinds, of_mask = np.unique(np.stack([batches, sizes // batches]), axis=1, return_inverse=True)
    commonest = np.bincount(of_mask.ravel(), minlength=kinds.shape[1]).argmax()
    return masks[np.resize(np.flatnonzero(of_mask.ravel() == commonest), len(masks))]


def _usual_models(material: Material, method: Method) -> int:
    """How many models usually make the best group, as measured for small networks."""
    is_flat = len(material.input_shape) != 3
    return {"products": 64 if is_flat else 8, "vmap": 64 if is_flat else 8, "loop": 1}[method]


def _over_again(
    trainer: GradientTrainer, masks: npt.NDArray[np.bool_], model_indices: npt.NDArray[np.uint64]
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, float]]:
    while True:
        yield from trainer.steps(masks, model_indices)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
