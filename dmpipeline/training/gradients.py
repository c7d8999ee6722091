"""Training by gradient descent, each model on its own subset, from its own initialisation, in its own order.

Models are trained in groups, in whichever way is fastest where they are (`Way`, found by `probe`). On a CPU each core
has a group of its own, for the products of small networks gain little from being shared by cores, and lose much where
cores are shared with other programs. A model's draws depend on nothing but the seed and its own number, so a row is the
same whichever block, worker or resume trained it: to the bit on the same device in the same way, else up to rounding.
Networks that draw numbers of their own, as dropout does, are trained by one thread a process; several may train a run.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dmdata import phases
from dmpipeline.compute import Shared
from dmpipeline.data.examples import Dataset
from dmpipeline.draws.masks import Purpose, draw_bits, draw_orders
from dmpipeline.errors import SpecError
from dmpipeline.models.augmentation import draw_augmentation
from dmpipeline.models.networks import initial_states, is_whitened, stacked, whitened
from dmpipeline.models.recipes import Module, Recipe
from dmpipeline.models.usercode import explained, in_words
from dmpipeline.training.ensembles import Group, begin_group, impossible_method, possible_methods, repeatable
from dmpipeline.training.layers import State
from dmpipeline.training.logits import Logits, diverged
from dmpipeline.training.material import Material
from dmpipeline.training.trainer import FIX_IN_ANOTHER_RUN, Trainer
from dmpipeline.training.way import Way

# Whitening is made of the first of a subset's pictures: more would tell a layer of 24 filters nothing new.
_WHITENED_PICTURES = 5000


class GradientTrainer(Trainer):
    """Trains networks by SGD as a recipe says.

    Parameters
    ----------
    dataset : Dataset
    recipe : Recipe
    seed : int
        The run's.
    way : Way, optional
        Otherwise one model after the other.
    device : str
        As torch names it.
    material : Material, optional
        Of the same dataset, recipe and device, made before.

    Raises
    ------
    SpecError
        If the recipe cannot be trained on the dataset, in this way or on this device.
    """

    def __init__(
        self,
        dataset: Dataset,
        recipe: Recipe,
        *,
        seed: int,
        way: Way | None = None,
        device: str = "cpu",
        material: Material | None = None,
    ) -> None:
        self.material = material or Material.of(dataset, recipe, usable_device(device))
        possible = possible_methods(self.material)
        self.way = way or Way("loop", 1)
        if self.way.method not in possible:
            raise impossible_method(recipe, self.way.method, possible)
        if self.way.n_models != 1 if self.way.method == "loop" else self.way.compiled:
            raise SpecError(
                f"method {self.way.method} cannot use groups of {self.way.n_models} models"
                f"{', compiled' * self.way.compiled}; only loop trains one model at a time, and only loop is compiled",
                field="method",
                value=self.way.method,
            )
        self.dataset, self.recipe, self.seed = dataset, recipe, seed
        # all threads draw from one generator of torch's, and there is one compiled network
        self._has_threads = self.material.device.type == "cpu" and not self.way.compiled and not self.material.draws
        self._workers = Shared(self._start_workers)
        # where threads train, they start the next block while one is stored
        self.n_ahead = 2 if self._has_threads else 1

    def start(
        self, masks: npt.NDArray[np.bool_], model_indices: npt.NDArray[np.uint64], rows: Sequence[int]
    ) -> Callable[[], Logits]:
        """Start training a block of models; see `Trainer`."""
        found = Logits.empty(self.dataset, len(masks))
        # threads that train do not inherit the listener
        listener = phases.heard_by()

        def train_group(members: npt.NDArray[np.intp]) -> list[int]:
            with self.user_code([rows[i] for i in members]):
                done = phases.Share(listener)
                train, test = self._trained(masks[members], model_indices[members], done).outputs()
            return [rows[i] for i in found.store(members, train, test)]

        with self.workers() as (each, n_workers):
            unusable = each(train_group, self.groups(masks, n_workers))

        def finish() -> Logits:
            if lost := sorted(row for of_group in unusable for row in of_group):
                raise diverged(self.dataset, self.recipe, lost, len(masks))
            return found

        return finish

    def states(self, masks: npt.NDArray[np.bool_], model_indices: npt.NDArray[np.uint64]) -> list[dict[str, Any]]:
        """Train models and return what each has learned, as states of `material.network`."""
        states: list[dict[str, Any]] = [{}] * len(masks)

        def train_group(members: npt.NDArray[np.intp]) -> None:
            with self.user_code():
                learned = self._trained(masks[members], model_indices[members]).states()
            for member, state in zip(members.tolist(), learned, strict=True):
                states[member] = state

        with self.workers() as (each, n_workers):
            list(each(train_group, self.groups(masks, n_workers)))
        return states

    def groups(self, masks: npt.NDArray[np.bool_], n_workers: int = 1) -> list[npt.NDArray[np.intp]]:
        """Cut a block into groups of models that take the same number of steps on batches of one size.

        Where rounding allows it, groups are of equal sizes that keep all workers busy to the end.
        """
        kinds: dict[tuple[int, int], list[int]] = {}
        for model, size in enumerate(masks.sum(1).tolist()):
            kinds.setdefault(self._steps(size), []).append(model)
        groups = []
        for members in kinds.values():
            step = self.way.n_models
            if not self.way.keeps_company:
                rounds = -(-len(members) // (step * n_workers))
                step = -(-len(members) // (rounds * n_workers))
            groups += [np.array(members[start : start + step]) for start in range(0, len(members), step)]
        return groups

    def begin(self, masks: npt.NDArray[np.bool_], model_indices: npt.NDArray[np.uint64]) -> Group:
        """Set up one group, whose models take the same number of steps."""
        states: State = initial_states(self.material.network, self.seed, model_indices.tolist())
        if is_whitened(self.material.network):
            each = [{name: value[model] for name, value in states.items()} for model in range(len(masks))]
            states = stacked([self._whitened(state, mask) for state, mask in zip(each, masks, strict=True)])
        batch, _ = self._steps(int(masks[0].sum()))
        return begin_group(self.material, self.way.method, states, batch, compiled=self.way.compiled)

    def steps(
        self, masks: npt.NDArray[np.bool_], model_indices: npt.NDArray[np.uint64]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, float]]:
        """Draw what a group takes its steps on: examples, how they are altered, and the step size."""
        device, epochs = self.material.device, self.recipe.epochs
        batch, steps_each = self._steps(int(masks[0].sum()))
        length = batch * steps_each
        orders = np.empty((len(masks), epochs, length), np.int64)
        words = np.empty_like(orders) if self.material.is_altered else None
        for place, (model, mask) in enumerate(zip(model_indices.tolist(), masks, strict=True)):
            order = draw_orders(self.seed, model, np.flatnonzero(mask), epochs)
            orders[place] = order[:, :length]
            if words is not None:
                words[place] = draw_augmentation(self.seed, model, order, self.recipe)[:, :length]
        examples = torch.from_numpy(orders).to(device)
        altered = None if words is None else torch.from_numpy(words).to(device)
        for step in range(epochs * steps_each):
            epoch, start = step // steps_each, step % steps_each * batch
            some = (slice(None), epoch, slice(start, start + batch))
            yield examples[some], None if altered is None else altered[some], self.recipe.rate(step, steps_each)

    def n_steps(self, size: int) -> int:
        """Count the steps of a model on a subset of this size."""
        return self.recipe.epochs * self._steps(size)[1]

    def user_code(self, rows: Sequence[int] = ()) -> AbstractContextManager[None]:
        """Report what goes wrong in training a network of the user's as an error in its code; see `usercode`."""
        if not isinstance(self.recipe, Module):
            return nullcontext()
        path = self.recipe.network
        where = f"{in_words(rows)}: " if rows else ""
        return explained(
            f"{where}training recipe.network {path!r}", path, remedy=FIX_IN_ANOTHER_RUN, rows=list(rows), value=path
        )

    def mode(self) -> AbstractContextManager[None]:
        """Have torch record nothing for automatic differentiation, where gradients are written out."""
        return torch.inference_mode(self.way.method == "products")

    def workers(self) -> AbstractContextManager[tuple[Callable[..., Iterator[Any]], int]]:
        """Start one thread a core that torch may use, each of which computes alone; the caller's setting is restored.

        What is given is a `map` over them, and how many there are. Only the calling thread works for a device of
        another kind, with a compiled network, and where networks draw random numbers. Who comes while others are at
        work shares their threads.
        """
        return self._workers()

    @contextmanager
    def _start_workers(self) -> Iterator[tuple[Callable[..., Iterator[Any]], int]]:
        n_threads = torch.get_num_threads()
        self.material.prepare(self.way.method)
        with repeatable(self.material.device), ExitStack() as stack:
            stack.callback(torch.set_num_threads, n_threads)
            if not self._has_threads:
                if self.material.device.type == "cpu":
                    torch.set_num_threads(1)
                yield map, 1
                return
            pool = ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,))
            stack.callback(pool.shutdown, cancel_futures=True)
            yield pool.map, n_threads

    def _trained(
        self, masks: npt.NDArray[np.bool_], model_indices: npt.NDArray[np.uint64], done: phases.Share | None = None
    ) -> Group:
        done = done or phases.Share(None)
        models_a_step = len(masks) / self.n_steps(int(masks[0].sum()))
        with self.mode():
            group = self.begin(masks, model_indices)
            with self._drawing(int(model_indices[0])):
                for examples, words, lr in self.steps(masks, model_indices):
                    group.step(examples, words, lr)
                    done.add(models_a_step)
        return group

    @contextmanager
    def _drawing(self, model_index: int) -> Iterator[None]:
        """Have a network that draws random numbers draw a model's own; torch's generators are put back."""
        if not self.material.draws:
            yield
            return
        device = self.material.device
        number = int(draw_bits(self.seed, Purpose.DROPOUT, model_index, 1)[0])
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.default_generator.manual_seed(number)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(number)
            yield

    def _steps(self, size: int) -> tuple[int, int]:
        """Return batch size and steps an epoch of a model on a subset of this size."""
        batch = min(self.recipe.batch_size, size)
        return batch, size // batch

    def _whitened(self, state: dict[str, torch.Tensor], mask: npt.NDArray[np.bool_]) -> dict[str, torch.Tensor]:
        stored = self.material.train_inputs[torch.from_numpy(np.flatnonzero(mask)[:_WHITENED_PICTURES])]
        return whitened(self.material.network, state, self.material.network_inputs(stored))


def usable_device(name: str) -> torch.device:
    """Look up a device by torch's name for it.

    Raises
    ------
    SpecError
        If there is none of this name, or it cannot be used.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SpecError(
            f"device {name!r} cannot be used ({reason}); choose cpu, or cuda where there is a GPU",
            field="device",
            value=name,
        ) from error
    return device
