"""Gradients of a classifier's log odds, kept as they are or projected, and the scores that follow from them.

What a score is stands in `dmpipeline.fitting.attribution`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dmpipeline.draws.masks import Purpose, draw_bits
from dmpipeline.errors import SpecError
from dmpipeline.training.layers import State
from dmpipeline.training.material import Material

# Gradients as they are computed: enough examples for products to be fast, few enough for any laptop.
_BLOCK_BYTES, _BLOCK_EXAMPLES = 2**28, 256
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Examples:
    """Examples of a run as its networks take them, those to train on first.

    Attributes
    ----------
    material : Material
    parts : list of (tensor, array)
        Stored inputs and labels: of the training examples, and of the targets where these are others.
    user_code : callable
        Opens a context in which a network of the user's may fail.
    """

    material: Material
    parts: list[tuple[Tensor, NDArray[np.int64]]]
    user_code: Callable[[], AbstractContextManager[None]]

    @property
    def n_train(self) -> int:
        """How many are to train on."""
        return len(self.parts[0][1])

    @property
    def n_all(self) -> int:
        """How many there are with the targets."""
        return sum(len(labels) for _, labels in self.parts)

    @property
    def of_targets(self) -> slice:
        """Which of all examples are the targets."""
        return slice(self.n_train if len(self.parts) > 1 else 0, self.n_all)

    def blocks(self, n_examples: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield rows, network inputs, and int64 labels, `n_examples` at a time."""
        n_done = 0
        for stored, labels in self.parts:
            for start in range(0, len(labels), n_examples):
                some = slice(start, start + n_examples)
                of_some = torch.tensor(labels[some], dtype=torch.int64)
                yield slice(n_done, n_done + len(of_some)), self.material.network_inputs(stored[some]), of_some
                n_done += len(of_some)


def shares_missed(examples: Examples, network: nn.Module, state: State) -> Tensor:
    """Return 1 - p of each training example's true class under a trained model, (n_train,)."""
    missed = torch.empty(examples.n_train)
    with examples.user_code(), torch.no_grad():
        for rows, inputs, labels in examples.blocks(_BLOCK_EXAMPLES):
            if rows.start >= examples.n_train:
                break
            logits = torch.func.functional_call(network, dict(state), (inputs,))
            missed[rows] = torch.sigmoid(-log_odds_of(logits, labels))
    return missed


class Scorer(Protocol):
    """Scores by one trained model after the other, with room that all of them share."""

    def add(self, leverages: Tensor, state: State, model_index: int, curvatures: Tensor, damping: float) -> None:
        """Add a model's leverages, (n_train, n_targets), at curvatures of training examples' losses, (n_train,)."""


class Gradients:
    """Scores by gradients, (n_examples, width).

    Parameters
    ----------
    examples : Examples
    network : torch.nn.Module
        In evaluation mode.
    sizes : mapping of str to int
        How many numbers each learned parameter has.
    width : int
        To how many numbers gradients are projected; those of no more parameters are kept as they are.
    seed : int
        Of the projections.
    """

    def __init__(
        self,
        examples: Examples,
        network: nn.Module,
        sizes: Mapping[str, int],
        *,
        width: int,
        seed: int,
    ) -> None:
        self.examples, self.network, self.sizes, self.seed = examples, network, sizes, seed
        self.gradients = torch.empty(examples.n_all, min(width, sum(sizes.values())))

    def add(self, leverages: Tensor, state: State, model_index: int, curvatures: Tensor, damping: float) -> None:
        """Add a model's; see `Scorer`."""
        gradients, n_train = self.gradients, self.examples.n_train
        projected = Projection.drawn(self.sizes, gradients.shape[1], self.seed, model_index)
        gradients.zero_()
        at_once = min(_BLOCK_EXAMPLES, max(1, _BLOCK_BYTES // (4 * sum(self.sizes.values()))))
        with self.examples.user_code():
            for rows, inputs, labels in self.examples.blocks(at_once):
                projected.add(log_odds_gradients(self.network, state, inputs, labels)[1], gradients[rows])
        of_train, of_targets = gradients[:n_train], gradients[self.examples.of_targets]
        if gradients.shape[1] > n_train:
            add_by_products(
                leverages, of_train @ of_train.T, lambda some: of_train @ of_targets[some].T, curvatures, damping
            )
        else:
            _add_by_gradients(leverages, of_train, of_targets, curvatures, damping)


def _add_by_gradients(
    leverages: Tensor, of_train: Tensor, of_targets: Tensor, curvatures: Tensor, damping: float
) -> None:
    """Add G (G' R G + c I)^-1 G_t' to leverages (n_train, n_targets).

    G are gradients of training examples (n_train, k), G_t those of targets, R curvatures on the diagonal, and c is
    `damping` times the mean of R's products with squared lengths.
    """
    size = of_train.shape[1]
    system = torch.zeros(size, size)
    for some, of_some in zip(*(torch.split(part, _ROWS_AT_ONCE) for part in (of_train, curvatures)), strict=True):
        system.addmm_(some.T, of_some[:, None] * some)
    lengths = torch.linalg.vector_norm(of_train, dim=1).square()
    factor = _factor(system.double(), (curvatures * lengths).double().mean(), damping)
    for some, out in zip(*_split_targets(of_targets, leverages), strict=True):
        out += of_train @ torch.cholesky_solve(some.T.double(), factor).float()


def add_by_products(
    leverages: Tensor, among: Tensor, with_targets: Callable[[slice], Tensor], curvatures: Tensor, damping: float
) -> None:
    """Add the same from products of gradients alone, D^-1 (D G G' D + c I)^-1 D G G_t' with D the square root of R.

    Parameters
    ----------
    leverages : float32 tensor, shape (n_train, n_targets)
    among : float32 tensor, shape (n_train, n_train)
        G G'.
    with_targets : callable
        Returns columns of G G_t'.
    curvatures : float32 tensor, shape (n_train,)
    damping : float
    """
    roots = curvatures.sqrt()[:, None]
    system = among.double().mul_(roots).mul_(roots.T)
    del among
    factor = _factor(system, system.diagonal().mean(), damping)
    for start in range(0, leverages.shape[1], _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        solved = torch.cholesky_solve((with_targets(some) * roots).double(), factor)
        leverages[:, some] += solved.float().div_(roots)


def _split_targets(of_targets: Tensor, leverages: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return torch.split(of_targets, _ROWS_AT_ONCE), torch.split(leverages, _ROWS_AT_ONCE, dim=1)


def _factor(system: Tensor, mean: Tensor, damping: float) -> Tensor:
    """Factor a float64 system, in which `damping` times a mean is added to the diagonal."""
    system.diagonal().add_(damping * mean)
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed:
        raise SpecError(
            f"damping is {damping}, too small to solve for gradients in float32; choose a larger one, such as 1",
            field="damping",
            value=damping,
        )
    return factor


@dataclass(frozen=True, slots=True)
class Projection:
    """A count sketch of gradients: at which of a few places, and with which sign, each parameter's is added.

    A parameter's numbers are taken in pieces no longer than there are places. Each piece is laid down at a place of its
    own, from the last place on to the first: two numbers of a piece never meet, and those of different pieces meet with
    the probability 1 / size, as in a sketch whose places are drawn one by one, but in the order they lie in memory.

    Attributes
    ----------
    size : int
        How many places there are.
    pieces : list of (str, slice, int, tensor)
        A parameter's name, which of its numbers, the place of the first, and their signs, float32.
    """

    size: int
    pieces: list[tuple[str, slice, int, Tensor]]

    @classmethod
    def drawn(cls, sizes: Mapping[str, int], size: int, seed: int, model_index: int) -> Self:
        """Draw a model's own, or with as many places as there are parameters, keep every one as it is.

        Parameters
        ----------
        sizes : mapping of str to int
            How many numbers each parameter has.
        size : int
        seed, model_index : int
        """
        n_parameters = sum(sizes.values())
        parts = [(name, slice(s, min(s + size, n))) for name, n in sizes.items() for s in range(0, n, size)]
        lengths = np.array([part.stop - part.start for _, part in parts])
        if size >= n_parameters:
            places, signs = lengths.cumsum() - lengths, torch.ones(n_parameters)
        else:
            bits = draw_bits(seed, Purpose.PROJECTION, model_index, len(parts) + -(-n_parameters // 64))
            places = bits[: len(parts)] % np.uint64(size)
            each = np.unpackbits(bits[len(parts) :].astype("<u8").view(np.uint8), count=n_parameters)
            signs = torch.from_numpy(each.astype(np.float32)).mul_(2).sub_(1)
        of_parts = torch.split(signs, lengths.tolist())
        return cls(size, [(*part, int(place), sign) for part, place, sign in zip(parts, places, of_parts, strict=True)])

    def add(self, gradients: Mapping[str, Tensor], into: Tensor) -> None:
        """Add gradients by parameter, shapes (n_examples, ...), to sketches (n_examples, size)."""
        rows = {name: gradient.flatten(1) for name, gradient in gradients.items()}
        for name, part, place, signs in self.pieces:
            piece, n_before_end = rows[name][:, part], self.size - place
            before, after = piece[:, :n_before_end], piece[:, n_before_end:]
            into[:, place : place + before.shape[1]].addcmul_(before, signs[:n_before_end])
            if after.shape[1]:
                into[:, : after.shape[1]].addcmul_(after, signs[n_before_end:])


def log_odds_gradients(
    network: nn.Module, state: State, inputs: Tensor, labels: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Differentiate examples' log odds in all parameters of a trained classifier.

    Parameters
    ----------
    network : torch.nn.Module
        The form, in evaluation mode.
    state : State
        What was learned.
    inputs : float tensor, shape (n_examples, ...)
    labels : int64 tensor, shape (n_examples,)

    Returns
    -------
    log_odds : float32 tensor, shape (n_examples,)
    gradients : dict of str to float32 tensor, shapes (n_examples, ...)
        By the names of parameters.
    """
    learned = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    parameters = {name: tensor for name, tensor in state.items() if name in learned}
    rest = {name: tensor for name, tensor in state.items() if name not in learned}

    def log_odds(parameters: dict[str, Tensor], example: Tensor, label: Tensor) -> Tensor:
        return log_odds_of(torch.func.functional_call(network, (parameters, rest), (example[None],)), label[None])[0]

    each = torch.func.vmap(torch.func.grad_and_value(log_odds), in_dims=(None, 0, 0))
    gradients, values = each(parameters, inputs, labels)
    return values, gradients


def log_odds_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log(p / (1 - p)) for the true classes' p, (n_examples,), from logits, (n_examples, n_classes)."""
    is_true = torch.arange(logits.shape[-1]) == labels[:, None]
    return logits.gather(-1, labels[:, None])[:, 0] - torch.logsumexp(logits.masked_fill(is_true, -torch.inf), -1)
