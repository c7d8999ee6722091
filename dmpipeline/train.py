"""Train many models, each on its own subset, from its own initialisation, in its own order.

Models are trained in groups, in whichever way is fastest where they are (`Way`, found by `probe`). On a CPU each core
has a group of its own, for the products of small networks gain little from being shared by cores, and lose much where
cores are shared with other programs. A model's draws depend on nothing but the seed and its own number, so a row is the
same whichever block, worker or resume trained it: to the bit on the same device in the same way, else but for rounding.
Networks that draw numbers of their own, as dropout does, are trained by one thread a process; several may train a run.
"""

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dmdata import phases
from dmpipeline.augmentation import draw_augmentation
from dmpipeline.compute import Shared
from dmpipeline.ensembles import Group, Material, Method, begin_group, possible_methods, repeatable
from dmpipeline.errors import SpecError, TrainingError
from dmpipeline.examples import Dataset
from dmpipeline.layers import State
from dmpipeline.masks import Purpose, draw_bits, draw_orders
from dmpipeline.networks import initial_states, is_whitened, stacked, whitened
from dmpipeline.outputs import LARGEST_LOGIT, as_tensor
from dmpipeline.recipes import AnyRecipe, Function, Module, Recipe
from dmpipeline.returned import checked_outputs, output_shapes
from dmpipeline.usercode import explained, import_object, in_words

# Whitening is made of the first of a subset's pictures: so many tell a layer of 24 filters all there is to know.
_WHITENED_PICTURES = 5000


@dataclass(frozen=True, slots=True)
class Way:
    """How models are trained: chosen once for a run and a kind of device, so that rows do not hang on who trains them.

    Attributes
    ----------
    method : {"products", "vmap", "loop"}
        See `ensembles`.
    n_models : int
        In a group.
    compiled : bool
        Whether networks are compiled by torch first, for the method loop alone: paid once a process.
    """

    method: Method
    n_models: int
    compiled: bool = False

    @property
    def in_words(self) -> str:
        """As people are told of it: "products, 64 models at once"."""
        if self.method == "loop":
            return f"one model at a time{', compiled' * self.compiled}"
        return f"{self.method}, {self.n_models} models at once"

    @property
    def keeps_company(self) -> bool:
        """Whether a model's rounding may hang on which others are in its group."""
        return self.method == "vmap"


@dataclass(frozen=True, slots=True)
class Logits:
    """Raw outputs of trained models.

    Attributes
    ----------
    train, test : array, shape (n_models, n_train, n_classes), (n_models, n_test, n_classes)
        float16 logits; of sequences one more axis, positions, before the classes. Of regressions float32 predictions.
    """

    train: npt.NDArray[Any]
    test: npt.NDArray[Any]


class Trainer(ABC):
    """Trains rows of one run in this process.

    Attributes
    ----------
    dataset : Dataset
    way : Way
    n_ahead : int
        So many blocks are best started before the first of them is waited for.
    """

    dataset: Dataset
    way: Way
    n_ahead = 1

    @abstractmethod
    def workers(self) -> AbstractContextManager[Any]:
        """Have at hand what trains the blocks that are started meanwhile."""

    @abstractmethod
    def start(
        self, masks: npt.NDArray[np.bool_], model_indices: npt.NDArray[np.uint64], rows: Sequence[int]
    ) -> Callable[[], Logits]:
        """Have a block of models trained, after those that were started before.

        Parameters
        ----------
        masks : array of bool, shape (n_models, n_train)
            The subset each model is trained on; none of them empty.
        model_indices : array of uint64, shape (n_models,)
            Numbers that initialisation, order and augmentation are drawn from.
        rows : sequence of int, length n_models
            How an error calls the models.

        Returns
        -------
        finish : callable
            Waits for the logits and gives them, as `train`; called once, while there still are the same `workers`.
        """

    def train(self, masks: npt.NDArray[np.bool_], model_indices: npt.NDArray[np.uint64], rows: Sequence[int]) -> Logits:
        """Train a block of models, given as for `start`.

        Raises
        ------
        TrainingError
            If an output is not finite, or so large that a margin may not fit float16; `rows` lists whose.
        """
        with self.workers():
            return self.start(masks, model_indices, rows)()


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
            raise SpecError(
                f"{recipe.name} cannot be trained by {self.way.method} here; choose {' or '.join(possible)}",
                field="method",
                value=self.way.method,
            )
        if self.way.n_models != 1 if self.way.method == "loop" else self.way.compiled:
            raise SpecError(
                f"method {self.way.method} has no groups of {self.way.n_models} models"
                f"{', compiled' * self.way.compiled}; loop has one at a time, and it alone is compiled",
                field="method",
                value=self.way.method,
            )
        self.dataset, self.recipe, self.seed = dataset, recipe, seed
        # all threads draw from one generator of torch's, and there is one compiled network
        self._has_threads = self.material.device.type == "cpu" and not self.way.compiled and not self.material.draws
        self._workers = Shared(self._start_workers)
        # where threads train, they go on with the next block while one is stored
        self.n_ahead = 2 if self._has_threads else 1

    def start(
        self, masks: npt.NDArray[np.bool_], model_indices: npt.NDArray[np.uint64], rows: Sequence[int]
    ) -> Callable[[], Logits]:
        """Have a block of models trained; see `Trainer`."""
        found = _Block.empty(self.dataset, len(masks))
        # threads that train do not know who listens
        listener = phases.heard_by()

        def train_group(members: npt.NDArray[np.intp]) -> list[int]:
            with self.user_code([rows[i] for i in members]):
                done = phases.Share(listener)
                train, test = self._trained(masks[members], model_indices[members], done).outputs()
            return [rows[i] for i in found.store(members, train, test)]

        with self.workers() as (each, n_workers):
            diverged = each(train_group, self.groups(masks, n_workers))

        def finish() -> Logits:
            if lost := sorted(row for of_group in diverged for row in of_group):
                raise _diverged(self.dataset, self.recipe, lost, len(masks))
            return Logits(train=found.train, test=found.test)

        return finish

    def states(self, masks: npt.NDArray[np.bool_], model_indices: npt.NDArray[np.uint64]) -> list[dict[str, Any]]:
        """Train models and give what each has learned, as states of `material.network`."""
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
        """Cut a block into groups of models that take equally many steps on batches of one size.

        Where it changes nothing, groups are of equal sizes that keep all workers busy to the end.
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
        """Set up one group; its models take equally many steps."""
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
        """Count the steps of a model on so many examples."""
        return self.recipe.epochs * self._steps(size)[1]

    def user_code(self, rows: Sequence[int] = ()) -> AbstractContextManager[None]:
        """Have what goes wrong in training a network of the user's told as an error of its code; see `usercode`."""
        if not isinstance(self.recipe, Module):
            return nullcontext()
        path = self.recipe.network
        where = f"{in_words(rows)}: " if rows else ""
        return explained(
            f"{where}training recipe.network {path!r}", path, remedy=FIX_IN_ANOTHER_RUN, rows=list(rows), value=path
        )

    def mode(self) -> AbstractContextManager[None]:
        """Have torch keep no account of what is done meanwhile, where gradients are written out."""
        return torch.inference_mode(self.way.method == "products")

    def workers(self) -> AbstractContextManager[tuple[Callable[..., Iterator[Any]], int]]:
        """Start one thread a core that torch may use, each of which computes alone; give the caller its setting back.

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
        """Batch size and steps an epoch of a model on so many examples."""
        batch = min(self.recipe.batch_size, size)
        return batch, size // batch

    def _whitened(self, state: dict[str, torch.Tensor], mask: npt.NDArray[np.bool_]) -> dict[str, torch.Tensor]:
        stored = self.material.train_inputs[torch.from_numpy(np.flatnonzero(mask)[:_WHITENED_PICTURES])]
        return whitened(self.material.network, state, self.material.network_inputs(stored))


class FunctionTrainer(Trainer):
    """Trains by a function of the user's own, a model at a time; see `recipes.Function`."""

    way = Way("loop", 1)

    def __init__(self, dataset: Dataset, recipe: Function, *, seed: int) -> None:
        self.dataset, self.recipe, self.seed = dataset, recipe, seed
        self.function = import_object(recipe.function)

    def start(
        self, masks: npt.NDArray[np.bool_], model_indices: npt.NDArray[np.uint64], rows: Sequence[int]
    ) -> Callable[[], Logits]:
        """Have a block of models trained, once its logits are asked for; see `Trainer`."""
        return functools.partial(self._train, masks, model_indices, rows)

    def _train(
        self, masks: npt.NDArray[np.bool_], model_indices: npt.NDArray[np.uint64], rows: Sequence[int]
    ) -> Logits:
        found, done = _Block.empty(self.dataset, len(masks)), phases.Share(phases.heard_by())
        too_large: list[int] = []
        path = self.recipe.function
        for place, (mask, model) in enumerate(zip(masks, model_indices.tolist(), strict=True)):
            row, what = rows[place], f"row {rows[place]}: recipe.function {path!r}"
            number = int(draw_bits(self.seed, Purpose.TORCH_SEED, model, 1)[0])
            with torch.random.fork_rng():
                torch.manual_seed(number)
                with explained(what, path, remedy=FIX_IN_ANOTHER_RUN, rows=[row], value=path):
                    returned = self.function(self.dataset, mask, *self._seeds(number), **self._arguments(number))
            train, test = checked_outputs(returned, self.dataset, mask, row=row, path=path)
            outputs = [as_tensor(part)[None] for part in (train, test)]
            too_large += [rows[i] for i in found.store(np.array([place]), *outputs)]
            done.add(1)
        if too_large:
            raise TrainingError(
                f"recipe.function {path!r} returned {_too_large(self.dataset)} at {in_words(too_large)}; return "
                "smaller ones, as logarithms of probabilities are",
                rows=too_large,
            )
        return Logits(train=found.train, test=found.test)

    @contextmanager
    def workers(self) -> Iterator[tuple[None, int]]:
        """One model is trained after the other, by whatever the function does."""
        yield None, 1

    def _seeds(self, number: int) -> tuple[int]:
        # the upper half, for a number's bits are all equally good
        return (number if self.recipe.version == 1 else number >> 32,)

    def _arguments(self, number: int) -> dict[str, Any]:
        return self.recipe.arguments | ({"seed64": number} if self._takes_seed64 else {})

    @functools.cached_property
    def _takes_seed64(self) -> bool:
        if self.recipe.version == 1 or "seed64" in self.recipe.arguments:
            return False
        try:
            return "seed64" in inspect.signature(self.function).parameters
        except (TypeError, ValueError):  # as of some functions in C
            return False


def make_trainer(
    dataset: Dataset, recipe: AnyRecipe, *, seed: int, way: Way | None = None, device: str = "cpu"
) -> GradientTrainer | FunctionTrainer:
    """Make what trains a recipe's models.

    Raises
    ------
    SpecError
        If the recipe cannot be trained on the dataset, in this way or on this device, or its code cannot be imported.
    """
    if isinstance(recipe, Function):
        return FunctionTrainer(dataset, recipe, seed=seed)
    return GradientTrainer(dataset, recipe, seed=seed, way=way, device=device)


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


@dataclass(frozen=True, slots=True)
class _Block:
    """Outputs of a block, filled group by group."""

    train: npt.NDArray[Any]
    test: npt.NDArray[Any]

    @classmethod
    def empty(cls, dataset: Dataset, n_models: int) -> "_Block":
        dtype = np.float32 if dataset.is_regression else np.float16
        train, test = _output_shapes(dataset, n_models)
        return cls(np.empty(train, dtype), np.empty(test, dtype))

    def store(self, members: npt.NDArray[np.intp], train: torch.Tensor, test: torch.Tensor) -> list[int]:
        """Put some models' outputs in place; return those of them that cannot be stored."""
        bound = LARGEST_LOGIT if self.train.dtype == np.float16 else torch.finfo(torch.float32).max
        usable = torch.ones(len(members), dtype=torch.bool)
        for into, outputs in ((self.train, train), (self.test, test)):
            usable &= torch.le(outputs.abs(), bound).flatten(1).all(1)
            stored = torch.clamp(outputs, -bound, bound).to(torch.from_numpy(into).dtype)
            into[members] = stored.numpy().reshape(len(members), *into.shape[1:])
        return [int(members[i]) for i in torch.nonzero(~usable)]


FIX_IN_ANOTHER_RUN = (
    "fix it; a run keeps the code it was created with, so train with the new code in another: "
    "dmpipeline init OTHER --spec RUN/run.yaml"
)
"""The remedy where the user's own code fails."""

_INPUTS_LOOKED_AT = 1000
_LARGE_INPUT = 20.0


def _too_large(dataset: Dataset) -> str:
    if dataset.is_regression:
        return "predictions that are not finite in single precision"
    return f"logits that pass {LARGEST_LOGIT:,.0f}, too large for float16"


def _diverged(dataset: Dataset, recipe: Recipe, rows: Sequence[int], n_models: int) -> TrainingError:
    """Say of models whose outputs cannot be stored what they are, and how to train others."""
    if dataset.is_regression:
        what = "their predictions are not finite numbers"
    else:
        what = f"their logits are not finite, or pass {LARGEST_LOGIT:,.0f}, too large for float16 margins"
    largest = _largest_input(dataset)
    scale = f"inputs reach {largest:,.4g}, so give that run inputs: standardised, or " if largest > _LARGE_INPUT else ""
    return TrainingError(
        f"{in_words(rows)}: {len(rows)} of {n_models} models diverged in training: {what}; all rows of a run are "
        f"trained alike, so make another: {scale}lower the recipe's lr, which is {recipe.lr:g}, as dmpipeline init "
        f"OTHER --spec RUN/run.yaml --set lr={recipe.lr / 10:.3g}",
        rows=list(rows),
    )


def _largest_input(dataset: Dataset) -> float:
    """Find how large inputs are that are numbers as the user gave them; 0 of pictures, tokens and scaled ones."""
    is_scaled = dataset.scaling is not None and dataset.scaling.inputs is not None
    if is_scaled or dataset.train_inputs.dtype.kind != "f":
        return 0.0
    return float(np.abs(dataset.train_inputs[:_INPUTS_LOOKED_AT]).max(initial=0.0))


def _output_shapes(dataset: Dataset, n_models: int) -> list[tuple[int, ...]]:
    return [(n_models, *shape) for shape in output_shapes(dataset)]
