"""Find the fastest way to train a run's models on a device, by training some for a moment each way.

What is measured is steps alone, with every core at work as in a real block; nothing is kept. The search climbs: a group
is doubled, or halved, from where its method usually does best, until that makes it no faster. It may take a tenth of
what the run itself will; a run shorter than that is trained as best guessed.
"""

import copy
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dmdata import phases
from dmpipeline.data.examples import Dataset
from dmpipeline.models.networks import initial_states
from dmpipeline.models.recipes import Recipe
from dmpipeline.training.ensembles import impossible_method, possible_methods, stacked_networks
from dmpipeline.training.material import Material
from dmpipeline.training.train import GradientTrainer, Way
from dmpipeline.training.way import Method

Masks = npt.NDArray[np.bool_]

TRIAL_SECONDS = 0.2
"""How long steps of a way are timed."""

_FIRST_STEPS = 3  # pay for what later ones find ready
_SHARE_OF_RUN = 0.1
_SHARE_OF_MEMORY = 0.5
_MOST_MODELS = 1024
_WORTH_DOUBLING = 1.03


def trained_a_second(
    trainer: GradientTrainer,
    masks: Masks,
    *,
    seconds: float = TRIAL_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
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
                    barrier.abort()  # so that the others do not wait forever
                    raise
                barrier.wait()
                began, n_steps = clock(), 0
                while (taken := clock() - began) < seconds or not n_steps:
                    group.step(*next(steps))
                    n_steps += 1
                    _wait_for(trainer.material.device)
            return n_steps * len(masks) / taken / steps_each

        return float(sum(each(work, range(n_workers))))


def free_bytes(device: torch.device) -> int:
    """Return the memory of a device, or of this machine, that nothing uses."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def is_worth_compiling(device: torch.device) -> bool:
    """State whether it may be worth a minute to compile a network for a device."""
    return device.type == "cuda"


@dataclass(frozen=True, slots=True)
class Machine:
    """What the search asks about the machine it is on.

    Attributes
    ----------
    rate : callable
        Models that a trainer trains in a second, of these masks.
    free_bytes : callable
        Memory of a device that is not in use.
    is_worth_compiling : callable
        Whether networks for a device may be compiled.
    clock : callable
        Seconds since some time.
    """

    rate: Callable[[GradientTrainer, Masks], float] = trained_a_second
    free_bytes: Callable[[torch.device], int] = free_bytes
    is_worth_compiling: Callable[[torch.device], bool] = is_worth_compiling
    clock: Callable[[], float] = time.perf_counter


THIS_MACHINE = Machine()


def fastest_way(
    dataset: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    masks: Masks,
    n_models: int,
    device: str = "cpu",
    methods: tuple[Method, ...] | None = None,
    tell: Callable[[Way, float], None] | None = None,
    machine: Machine = THIS_MACHINE,
) -> Way:
    """Choose the method, and how many models make a group.

    Parameters
    ----------
    dataset, recipe, seed, device
        As for `GradientTrainer`.
    masks : array of bool, shape (n, n_train)
        Some of the run's, at least one; no group is tried with more models.
    n_models : int
        How many are to be trained: a share of their time is what the search may take.
    methods : tuple of str, optional
        Choose among these.
    tell : callable, optional
        Called with each way that was tried and how many models it trains in a second.
    machine : Machine, optional
        What to ask in place of this one.

    Raises
    ------
    SpecError
        If the recipe cannot be trained on the dataset, by these methods or on this device.
    """
    material = GradientTrainer(dataset, recipe, seed=seed, device=device).material
    allowed = _allowed_methods(material, methods)
    if allowed == ("loop",) and not machine.is_worth_compiling(material.device):
        return Way("loop", 1)
    phases.phase("finding the fastest way to train")
    trials = _Trials(material, seed, _of_one_kind(material, masks), n_models, tell, machine)
    finalists = []
    for method in allowed:
        if method == "loop":
            finalists += _loops(trials)
        # without a choice of the user's, a loop is the same as a stack of one with less to do
        elif (first := _first_way(trials, method)) != Way("vmap", 1) or methods is not None:
            finalists.append(_climb(trials, first))
    return max(finalists, key=trials.rate)


@dataclass(slots=True)
class _Trials:
    """Ways that were tried, and how fast each is; nothing new is tried once time is up."""

    material: Material
    seed: int
    masks: Masks
    n_models: int
    tell: Callable[[Way, float], None] | None
    machine: Machine
    rates: dict[Way, float] = field(default_factory=dict)
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = self.machine.clock()

    def rate(self, way: Way) -> float:
        """Return how many models a way trains in a second; 0 where it was not, or cannot be, tried."""
        if way not in self.rates and not self._is_late() and self.fits(way):
            self.rates[way] = self._tried(way)
            if self.tell is not None:
                self.tell(way, self.rates[way])
        return self.rates.get(way, 0.0)

    def fits(self, way: Way) -> bool:
        """State whether there are masks and memory for groups of this size."""
        if way.n_models == 1:
            return True
        if way.n_models > min(len(self.masks), _MOST_MODELS):
            return False
        device = self.material.device
        n_workers = torch.get_num_threads() if device.type == "cpu" else 1
        needed = way.n_models * n_workers * model_bytes(self.material, way.method)
        return needed <= _SHARE_OF_MEMORY * self.machine.free_bytes(device)

    def _is_late(self) -> bool:
        if not self.rates:
            return False
        return self.machine.clock() - self.began > _SHARE_OF_RUN * self.n_models / max(self.rates.values())

    def _tried(self, way: Way) -> float:
        material = self.material
        trainer = GradientTrainer(material.dataset, material.recipe, seed=self.seed, way=way, material=material)
        phases.phase(f"finding the fastest way to train, trying {way.in_words}")
        try:
            return self.machine.rate(trainer, self.masks[: way.n_models])
        except RuntimeError:
            if not way.compiled:
                with trainer.user_code():
                    raise
            return 0.0  # torch cannot compile it, or has no compiler here


def _allowed_methods(material: Material, methods: tuple[Method, ...] | None) -> tuple[Method, ...]:
    possible = possible_methods(material)
    for method in methods or ():
        if method not in possible:
            raise impossible_method(material.recipe, method, possible)
    return methods or possible


def _loops(trials: _Trials) -> list[Way]:
    """Try a loop, and a compiled one where that may be worth it."""
    loops = [Way("loop", 1)]
    if trials.machine.is_worth_compiling(trials.material.device):
        loops.append(Way("loop", 1, compiled=True))
    for way in loops:
        trials.rate(way)
    return loops


def _first_way(trials: _Trials, method: Method) -> Way:
    """Begin with the group that usually does best, as measured for small networks, or the largest that fits."""
    usual = 8 if len(trials.material.input_shape) == 3 else 64
    way = Way(method, min(usual, len(trials.masks)))
    while not trials.fits(way):
        way = Way(method, way.n_models // 2)
    return way


def _climb(trials: _Trials, way: Way) -> Way:
    """Double a group, then halve it, as long as that is faster; a larger one takes more memory and must be worth it."""
    best = trials.rate(way)
    for factor, gain in ((2, _WORTH_DOUBLING), (0.5, 1)):
        while n_models := int(way.n_models * factor):
            another = Way(way.method, n_models)
            if (rate := trials.rate(another)) <= best * gain:
                break
            way, best = another, rate
    return way


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


def _of_one_kind(material: Material, masks: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Repeat the masks whose models take equally many steps, as most of them do, until there are as many as before."""
    batch_size, sizes = material.recipe.batch_size, masks.sum(1)
    batches = np.minimum(sizes, batch_size)
    kinds, of_mask = np.unique(np.stack([batches, sizes // batches]), axis=1, return_inverse=True)
    commonest = np.bincount(of_mask.ravel(), minlength=kinds.shape[1]).argmax()
    return masks[np.resize(np.flatnonzero(of_mask.ravel() == commonest), len(masks))]


def _over_again(
    trainer: GradientTrainer, masks: npt.NDArray[np.bool_], model_indices: npt.NDArray[np.uint64]
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, float]]:
    while True:
        yield from trainer.steps(masks, model_indices)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
