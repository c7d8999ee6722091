"""A cheap attribution from a handful of a run's own models, as a prior for datamodels.

The score is that of TRAK (Park et al., 2023): a trained model is taken for linear in its gradients, and removing an
example for one step of Newton's method on its logistic loss. Gradients are kept as they are where they fit into memory,
and projected otherwise. Scores of a few models are averaged. They order examples far worse than datamodels do; what
they are for is `dmpipeline.fit(..., prior=scores)`.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dmdata.reading.long_work import shows_count
from dmpipeline.data.examples import Dataset
from dmpipeline.draws.masks import Purpose, draw_bits, subset_masks
from dmpipeline.errors import SpecError
from dmpipeline.runs.preparation import Prepared
from dmpipeline.runs.store import Run
from dmpipeline.runs.targets import TargetsName, check_targets
from dmpipeline.training.layers import State
from dmpipeline.training.train import GradientTrainer

PROJECTION = 4096
"""Numbers that a gradient is projected to, where all of them do not fit into memory."""

EXACT_BYTES = 2**30
"""Gradients that take no more are kept as they are."""

# Gradients as they are computed: enough examples for products to be fast, few enough for any laptop.
_BLOCK_BYTES, _BLOCK_EXAMPLES = 2**28, 256
_ROWS_AT_ONCE = 1024
# What the curvature p (1 - p) of an example's loss is raised by, so that those learned for certain count a little. On
# digits the scores' LDS is 0.722 with 0, 0.727 with 0.001 and 0.703 with 0.01.
_LEAST_CURVATURE = 0.001


@shows_count("gradients", "models")
def gradient_scores(
    run: Run,
    *,
    n_models: int = 10,
    damping: float = 1.0,
    projection: int | None = None,
    targets: TargetsName = "test",
    dataset: Dataset | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """Score every training example for every test example, or every other one, by gradients of a run's first models.

    With g_i the gradient of example i's log odds log(p_i / (1 - p_i)) in all parameters at a trained model, and
    r_i = p_i (1 - p_i) + 0.001, the scores for a target t are

        (1 - p_i) g_i' (sum_j r_j g_j g_j' + damping mean_j(r_j g_j'g_j) I)^-1 g_t,

    where j runs over all training examples (Park et al., 2023, eq. 13, without the correction for leverage, and with
    r_i, which they leave out of eq. 15). 1 - p_i and the product with g_t are averaged over the models each for itself,
    as in their eq. 17.

    Parameters
    ----------
    run : Run
        Its first rows are trained again; nothing of it is read but its specification and dataset.
    n_models : int
        How many.
    damping : float
        Above zero: how far examples with like gradients share their leverage. On digits the scores' own LDS is 0.59,
        0.68, 0.73, 0.70 and 0.59 with a damping of 0.1, 0.3, 1, 3 and 10.
    projection : int, optional
        To how many numbers each gradient is projected; gradients of no more parameters are kept as they are. If left
        out, they are kept where those of all examples take at most 1 GiB, 4 (n_train + n_test) n_parameters bytes, and
        are projected to 4,096 numbers otherwise. On digits, whose networks have 4,810 parameters, the LDS is 0.709,
        0.719, 0.722 and 0.724 with 512, 1,024, 2,048 and 4,096 numbers, and 0.726 with all.
    targets : {"test", "train"}
        Whose outputs the scores are for. A training example's score for itself is large: it is what was learned of it.
    dataset : Dataset, optional
        What `run.dataset()` returned, where it is at hand.
    progress : callable, optional
        Called with (models done, total).

    Returns
    -------
    scores : array of float32, shape (n_train, n_test), or (n_train, n_train) for training examples
        Positive where an example speaks for the target's true class.

    Raises
    ------
    SpecError
        If `n_models` is not from 1 to the run's, `damping` is not positive or too small for float32, `projection` is
        not a whole number from 1, there are no such targets, or the run's models are no classifiers trained by
        gradients.

    Notes
    -----
    A projection is drawn for each model from the run's seed: every parameter gets a random sign and one of the
    `projection` places, and gradients are summed by place (Charikar et al., 2002, count sketch). Its products of
    gradients are as precise as those of a dense random matrix of the same width, for one addition a parameter.

    With k the projection, or n_parameters where gradients are kept, and n = n_train + n_test (n_train for training
    examples), memory holds 4 n k bytes of gradients, up to 20 min(k, n_train)^2 bytes to solve with, 4 n_train n_test
    of scores, 4 n_parameters of signs, and gradients as they are computed, twice 256 MiB or two examples' if that is
    more. Nothing else grows with the number of examples: not with examples times parameters.
    """
    if not 1 <= n_models <= run.spec.n_models:
        raise SpecError(f"n_models is {n_models}; choose from 1 to the run's {run.spec.n_models}")
    if not damping > 0:
        raise SpecError(f"damping is {damping}; choose a number above 0, such as 1")
    if projection is not None and not (isinstance(projection, Integral) and projection >= 1):
        raise SpecError(
            f"projection is {projection!r}; choose a whole number from 1, such as {PROJECTION}, or leave it out",
            field="projection",
            value=projection,
        )
    is_of_train = check_targets(targets) == "train"
    trainer = Prepared.of(run, dataset).trainer()
    dataset = trainer.dataset
    if not isinstance(trainer, GradientTrainer) or dataset.is_regression or dataset.is_sequence:
        raise SpecError(
            f"gradient scores are of classifiers whose gradients are at hand, not of {run.spec.recipe.name} on "
            f"{dataset.name}; give scores of your own as prior",
            field="prior",
        )
    material = trainer.material
    network = copy.deepcopy(material.network).eval()
    parts = [(material.train_inputs, dataset.train_labels)]
    if not is_of_train:
        parts.append((material.test_inputs, dataset.test_labels))
    n_train, n_all = dataset.n_train, sum(len(labels) for _, labels in parts)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters() if parameter.requires_grad}
    n_parameters = sum(sizes.values())
    if projection is None:
        projection = n_parameters if 4 * n_all * n_parameters <= EXACT_BYTES else PROJECTION
    at_once = min(_BLOCK_EXAMPLES, max(1, _BLOCK_BYTES // (4 * n_parameters)))

    gradients = torch.empty(n_all, min(int(projection), n_parameters))
    of_train, of_targets = gradients[:n_train], gradients[n_train:] if n_all > n_train else gradients
    log_odds = torch.empty(n_all)
    wrong, leverages = torch.zeros(n_train), torch.zeros(n_train, len(of_targets))
    indices = run.spec.model_indices(range(n_models))
    states = trainer.states(subset_masks(run.spec, range(n_models), n_train), indices)
    for done, (state, model_index) in enumerate(zip(states, indices.tolist(), strict=True), start=1):
        projected = Projection.drawn(sizes, gradients.shape[1], run.spec.seed, model_index)
        gradients.zero_()
        with trainer.user_code():
            n_done = 0
            for stored, labels in parts:
                for start in range(0, len(labels), at_once):
                    some = slice(start, start + at_once)
                    of_some = torch.tensor(labels[some], dtype=torch.int64)
                    rows = slice(n_done, n_done + len(of_some))
                    inputs = material.network_inputs(stored[some])
                    log_odds[rows], of_each = log_odds_gradients(network, state, inputs, of_some)
                    projected.add(of_each, gradients[rows])
                    n_done += len(of_some)
        wrong_now = torch.sigmoid(-log_odds[:n_train])
        wrong += wrong_now / n_models
        curvatures = wrong_now * (1 - wrong_now) + _LEAST_CURVATURE
        _add_leverages(leverages, of_train, of_targets, curvatures, damping)
        if progress is not None:
            progress(done, n_models)
    return leverages.mul_(wrong[:, None] / n_models).numpy()


def _add_leverages(leverages: Tensor, of_train: Tensor, of_targets: Tensor, curvatures: Tensor, damping: float) -> None:
    """Add G (G' R G + c I)^-1 G_t' of a model, in the smaller of its two forms, to leverages (n_train, n_targets).

    G are gradients of training examples (n_train, k), G_t those of targets, R curvatures on the diagonal, and c is
    `damping` times the mean of R's products with squared lengths. With k above n_train the other form is used, which
    equals it: with D the square root of R, D^-1 (D G G' D + c I)^-1 D G G_t'.
    """
    n_train, size = of_train.shape
    is_wide, roots = size > n_train, curvatures.sqrt()[:, None]
    if is_wide:
        system = (of_train @ of_train.T).mul_(roots).mul_(roots.T)
    else:
        system = torch.zeros(size, size)
        for some, of_some in zip(*(torch.split(part, _ROWS_AT_ONCE) for part in (of_train, curvatures)), strict=True):
            system.addmm_(some.T, of_some[:, None] * some)
    system = system.double()
    system.diagonal().add_(damping * (curvatures * torch.linalg.vector_norm(of_train, dim=1).square()).double().mean())
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed:
        raise SpecError(
            f"damping is {damping}, too small to solve for gradients in float32; choose a larger one, such as 1",
            field="damping",
            value=damping,
        )
    for some, out in zip(
        torch.split(of_targets, _ROWS_AT_ONCE), torch.split(leverages, _ROWS_AT_ONCE, dim=1), strict=True
    ):
        products = (of_train @ some.T).mul_(roots) if is_wide else some.T
        solved = torch.cholesky_solve(products.double(), factor).float()
        out += solved.div_(roots) if is_wide else of_train @ solved


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
        logits: Tensor = torch.func.functional_call(network, (parameters, rest), (example[None],))[0]
        is_true = torch.arange(logits.shape[-1]) == label
        return logits.gather(-1, label[None])[0] - torch.logsumexp(logits.masked_fill(is_true, -torch.inf), -1)

    each = torch.func.vmap(torch.func.grad_and_value(log_odds), in_dims=(None, 0, 0))
    gradients, values = each(parameters, inputs, labels)
    return values, gradients
