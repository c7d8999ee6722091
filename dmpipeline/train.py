"""Train many models at once, each on its own subset, from its own initialisation, in its own order.

Small networks are trained in groups: the parameters of a group lie in one array each, and every step is a few batched
matrix products with the gradients written out by hand. Each core has a group of its own, for products this small gain
little from being shared by cores, and lose much where cores are shared with other programs. A model's draws depend on
nothing but the seed and its own number, so a row is the same whichever block, worker or resume trained it.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dmpipeline.datasets import Dataset, as_features
from dmpipeline.errors import TrainingError
from dmpipeline.masks import draw_masks, draw_orders, draw_uniform
from dmpipeline.outputs import LARGEST_LOGIT
from dmpipeline.recipes import Perceptron, find_recipe
from dmpipeline.spec import RunSpec

# Measured for 64-64-10 perceptrons on 2 cores: fewer models pay for more calls, more of them fall out of the cache.
GROUP_MODELS = 64


@dataclass(frozen=True, slots=True)
class Logits:
    """Raw outputs of trained models.

    Attributes
    ----------
    train : array of float16, shape (n_models, n_train, n_classes)
    test : array of float16, shape (n_models, n_test, n_classes)
    """

    train: npt.NDArray[np.float16]
    test: npt.NDArray[np.float16]


def train_block(
    dataset: Dataset,
    recipe: Perceptron,
    *,
    masks: npt.NDArray[np.bool_],
    seed: int,
    model_indices: npt.NDArray[np.uint64],
    rows: range,
) -> Logits:
    """Train a block of models and return their logits on all examples.

    Parameters
    ----------
    dataset : Dataset
    recipe : Perceptron
    masks : array of bool, shape (n_models, n_train)
        The subset each model is trained on; all of one size.
    seed : int
        The run's seed.
    model_indices : array of uint64, shape (n_models,)
        Numbers that initialisation and order are drawn from.
    rows : range of length n_models
        How an error calls the models.

    Returns
    -------
    Logits

    Raises
    ------
    TrainingError
        If a logit is not finite, or so large that a margin may not fit float16; `rows` lists whose.
    """
    n_models = len(masks)
    train = np.empty((n_models, dataset.n_train, dataset.n_classes), np.float16)
    test = np.empty((n_models, dataset.n_test, dataset.n_classes), np.float16)
    inputs, targets = _inputs_and_targets(dataset)
    widths = (dataset.n_features, recipe.hidden, dataset.n_classes)

    def train_group(group: slice) -> list[int]:
        with torch.inference_mode():
            parameters = _initial_parameters(seed, model_indices[group], widths)
            orders = _orders(seed, model_indices[group], masks[group], recipe.epochs)
            logits = _train_group(inputs, targets, recipe, parameters, orders)[..., : dataset.n_classes]
            usable = (logits.abs() <= LARGEST_LOGIT).flatten(1).all(1)
            half = logits.clamp_(-LARGEST_LOGIT, LARGEST_LOGIT).half().numpy()
        train[group], test[group] = half[:, : dataset.n_train], half[:, dataset.n_train :]
        return [rows[group.start + int(i)] for i in torch.nonzero(~usable)]

    with _workers() as (pool, n_workers):
        diverged = [row for lost in pool.map(train_group, _groups(n_models, n_workers)) for row in lost]
    if diverged:
        raise TrainingError(
            f"{len(diverged)} of {n_models} models, row {diverged[0]} first, have logits that are not finite or pass "
            f"{LARGEST_LOGIT:,.0f}, too large for float16 margins; lower the recipe's lr or momentum",
            rows=diverged,
        )
    return Logits(train=train, test=test)


def train_rows(spec: RunSpec, dataset: Dataset, rows: range) -> tuple[npt.NDArray[np.bool_], Logits]:
    """Train some rows of a run, on the subsets that its seed draws for them.

    Returns
    -------
    masks : bool array, shape (len(rows), n_train)
    logits : Logits

    Raises
    ------
    TrainingError
        As `train_block`.
    """
    masks = draw_masks(spec.seed, spec.subset_indices(rows), dataset.n_train, spec.alpha)
    recipe, model_indices = find_recipe(spec.recipe), spec.model_indices(rows)
    return masks, train_block(dataset, recipe, masks=masks, seed=spec.seed, model_indices=model_indices, rows=rows)


def train_parameters(spec: RunSpec, dataset: Dataset, rows: range) -> list[dict[str, torch.Tensor]]:
    """Train some rows of a run again and return what was learned: a run stores outputs, and its seed draws the rest.

    Returns
    -------
    parameters : list of dict
        For each row float32 tensors `w1` (n_features, hidden), `b1` (hidden,), `w2` (hidden, n_classes) and `b2`
        (n_classes,); see `perceptron_logits`.
    """
    recipe = find_recipe(spec.recipe)
    masks = draw_masks(spec.seed, spec.subset_indices(rows), dataset.n_train, spec.alpha)
    models = spec.model_indices(rows)
    widths = (dataset.n_features, recipe.hidden, dataset.n_classes)
    inputs, targets = _inputs_and_targets(dataset)
    with torch.inference_mode():
        parameters = _initial_parameters(spec.seed, models, widths)
        _train_group(inputs, targets, recipe, parameters, _orders(spec.seed, models, masks, recipe.epochs))
    n_features, hidden, n_classes = widths
    w1, b1, w2, b2 = (parameter.clone() for parameter in parameters)
    return [
        {
            "w1": w1[m, :n_features, :hidden],
            "b1": b1[m, 0, :hidden],
            "w2": w2[m, :hidden, :n_classes],
            "b2": b2[m, 0, :n_classes],
        }
        for m in range(len(rows))
    ]


def perceptron_logits(parameters: Mapping[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """Logits of a trained perceptron, (..., n_classes), for inputs (..., n_features)."""
    hidden = torch.relu(inputs @ parameters["w1"] + parameters["b1"])
    return hidden @ parameters["w2"] + parameters["b2"]


def _inputs_and_targets(dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Join the inputs of train and then test examples, and make one-hot labels of the train ones, padded."""
    inputs = torch.tensor(np.concatenate([as_features(dataset.train_inputs), as_features(dataset.test_inputs)]))
    targets = torch.nn.functional.one_hot(torch.tensor(dataset.train_labels), dataset.n_classes).float()
    return _padded(inputs, axes=1), _padded(targets, axes=1)


@contextmanager
def _workers() -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """Start one thread a core that torch may use, each of which computes alone; give the caller its setting back."""
    n_workers = torch.get_num_threads()
    pool = ThreadPoolExecutor(n_workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool, n_workers
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(n_workers)


def _groups(n_models: int, n_workers: int) -> list[slice]:
    """Cut a block into groups of equal size that keep all workers busy to the end."""
    rounds = -(-n_models // (GROUP_MODELS * n_workers))
    size = -(-n_models // (rounds * n_workers))
    return [slice(start, min(start + size, n_models)) for start in range(0, n_models, size)]


def _initial_parameters(seed: int, models: npt.NDArray[np.uint64], widths: tuple[int, int, int]) -> list[torch.Tensor]:
    """Draw w1, b1, w2, b2 of each model: (group, fan_in, fan_out) and (group, 1, fan_out), within 1 / sqrt(fan_in)."""
    n_features, hidden, n_classes = widths
    shapes = [(n_features, hidden), (1, hidden), (hidden, n_classes), (1, n_classes)]
    bounds = [n_features**-0.5, n_features**-0.5, hidden**-0.5, hidden**-0.5]
    sizes = [rows * columns for rows, columns in shapes]
    drawn = torch.from_numpy(np.stack([draw_uniform(seed, int(model), sum(sizes)) for model in models]))
    pieces = zip(torch.split(drawn, sizes, dim=1), shapes, bounds, strict=True)
    w1, b1, w2, b2 = (piece.reshape(-1, *shape).mul(bound) for piece, shape, bound in pieces)
    # a class that is only padding is never predicted; features and hidden units that are only padding stay zero
    b2 = _padded(b2, axes=1, value=-torch.inf)
    return [_padded(w1, axes=2), _padded(b1, axes=1), _padded(w2, axes=2), b2]


def models_at_once() -> int:
    """Count the models that keep every core busy with a full group."""
    return GROUP_MODELS * torch.get_num_threads()


def _padded(tensor: torch.Tensor, *, axes: int, value: float = 0.0) -> torch.Tensor:
    """Lengthen the last axes to whole cache lines, so that every model's numbers lie alike wherever in a group it is.

    Matrix products round differently at another alignment, and a row would depend on its place.
    """
    line = 64 // tensor.element_size()
    lengths = [length for axis in range(axes) for length in (0, -tensor.shape[-1 - axis] % line)]
    return torch.nn.functional.pad(tensor, lengths, value=value)


def _orders(
    seed: int, models: npt.NDArray[np.uint64], masks: npt.NDArray[np.bool_], n_epochs: int
) -> npt.NDArray[np.int64]:
    """Draw the order in which each model sees its subset, (group, n_epochs, subset size)."""
    pairs = zip(models, masks, strict=True)
    return np.stack([draw_orders(seed, int(model), np.flatnonzero(mask), n_epochs) for model, mask in pairs])


def _train_group(
    inputs: torch.Tensor,
    targets: torch.Tensor,
    recipe: Perceptron,
    parameters: list[torch.Tensor],
    orders: npt.NDArray[np.int64],
) -> torch.Tensor:
    """Train a group from its draws; return float32 logits on all inputs, classes padded."""
    size = orders.shape[2]
    batch = min(recipe.batch_size, size)
    ensemble = _Ensemble(parameters, batch=batch, momentum=recipe.momentum)
    steps_each = size // batch
    n_steps = recipe.epochs * steps_each
    for step in range(n_steps):
        epoch, start = step // steps_each, step % steps_each * batch
        examples = torch.from_numpy(orders[:, epoch, start : start + batch])
        remaining = 1 - step / n_steps if recipe.schedule == "linear" else 1.0
        ensemble.step(inputs, targets, examples, lr=recipe.lr * remaining)
    return ensemble.logits(inputs)


class _Ensemble:
    """Perceptrons that take their steps together; work space is allocated once, for page faults cost more than sums."""

    def __init__(self, parameters: list[torch.Tensor], *, batch: int, momentum: float) -> None:
        self.w1, self.b1, self.w2, self.b2 = parameters
        self.velocities = [torch.zeros_like(parameter) for parameter in parameters]
        self.momentum = momentum
        n_models, n_features, hidden = self.w1.shape
        n_classes = self.w2.shape[2]
        self.x = torch.empty(n_models, batch, n_features)
        self.truth = torch.empty(n_models, batch, n_classes)
        self.hidden = torch.empty(n_models, batch, hidden)
        self.back = torch.empty(n_models, batch, hidden)
        self.error = torch.empty(n_models, batch, n_classes)

    def step(self, inputs: torch.Tensor, targets: torch.Tensor, examples: torch.Tensor, *, lr: float) -> None:
        """Take one step of SGD with momentum on mean cross-entropy; examples are (n_models, batch) indices."""
        chosen = examples.reshape(-1)
        torch.index_select(inputs, 0, chosen, out=self.x.view(-1, inputs.shape[1]))
        torch.index_select(targets, 0, chosen, out=self.truth.view(-1, targets.shape[1]))
        x, hidden, back, error = self.x, self.hidden, self.back, self.error
        torch.baddbmm(self.b1, x, self.w1, out=hidden).relu_()
        torch.baddbmm(self.b2, hidden, self.w2, out=error)
        # the gradient of cross-entropy with respect to the logits
        torch.softmax(error, -1, out=error).sub_(self.truth).div_(examples.shape[1])
        v_w1, v_b1, v_w2, v_b2 = self.velocities
        v_w2.baddbmm_(hidden.transpose(1, 2), error, beta=self.momentum)
        v_b2.mul_(self.momentum).add_(error.sum(1, keepdim=True))
        # from here on only the sign of hidden units is wanted: they are rectified, so it is 1 where active, else 0
        torch.bmm(error, self.w2.transpose(1, 2), out=back).mul_(hidden.sign_())
        v_w1.baddbmm_(x.transpose(1, 2), back, beta=self.momentum)
        v_b1.mul_(self.momentum).add_(back.sum(1, keepdim=True))
        for parameter, velocity in zip((self.w1, self.b1, self.w2, self.b2), self.velocities, strict=True):
            parameter.sub_(velocity, alpha=lr)

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the logits of every model on every input, (n_models, n_inputs, n_classes)."""
        every = inputs.expand(len(self.w1), -1, -1)
        return torch.baddbmm(self.b2, torch.baddbmm(self.b1, every, self.w1).relu_(), self.w2)
