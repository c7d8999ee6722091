"""A cheap attribution from a handful of a run's own models, as a prior for datamodels.

The score is that of TRAK (Park et al., 2023): a trained model is taken for linear in its gradients, and removing an
example for one step of Newton's method on its logistic loss. Products of gradients are found layer by layer where all
learned layers are linear; otherwise gradients are kept where they fit into memory, and else projected. Scores of a few
models are averaged. They order examples far worse than datamodels of many models do; what they are for is
`dmpipeline.fit(..., prior=scores)`.
"""

import copy
from collections.abc import Callable
from numbers import Integral

import numpy as np
import torch
from numpy.typing import NDArray

from dmdata.reading.long_work import shows_count
from dmpipeline.data.examples import Dataset
from dmpipeline.draws.masks import subset_masks
from dmpipeline.errors import SpecError
from dmpipeline.fitting.guides.gradients import Examples, Gradients, Scorer, shares_missed
from dmpipeline.fitting.guides.layerwise import LinearLayers
from dmpipeline.runs.preparation import Prepared
from dmpipeline.runs.store import Run
from dmpipeline.runs.targets import TargetsName, check_targets
from dmpipeline.training.train import GradientTrainer

GRADIENTS_BYTES = 2**30
"""Gradients that take no more are kept as they are, and others projected to as many numbers as that holds."""

LEAST_PROJECTION = 4096
"""But to no fewer, however many examples there are."""

# What curvatures are raised by, so that examples learned for certain count a little. On digits the scores' LDS is 0.731
# with 0, 0.732 with 0.001 and 0.714 with 0.01. Where gradients are projected this is multiplied by the root of
# n_parameters / projection, for more examples that count make up for some of its chance: of three MNIST models
# projected from 109,386 to 512 numbers the LDS rises by that from 0.26 to 0.30.
_LEAST_CURVATURE = 0.001


@shows_count("gradients", "models")
def gradient_scores(
    run: Run,
    *,
    n_models: int = 10,
    damping: float = 2.0,
    projection: int | None = None,
    targets: TargetsName = "test",
    dataset: Dataset | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """Score every training example for every test example, or every other one, by gradients of a run's first models.

    With g_i the gradient of example i's log odds log(p_i / (1 - p_i)) in all parameters at a trained model, and r_i the
    mean over the models of p_i (1 - p_i) plus 0.001 (n_parameters / projection)^0.5, the scores for a target t are

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
        Above zero: how far examples with like gradients share their leverage. On digits the scores' own LDS is 0.66,
        0.72, 0.74, 0.73, 0.69 and 0.60 with a damping of 0.2, 0.5, 1, 2, 4 and 10; on wine, breast_cancer and MNIST it
        is 0.00 to 0.07 higher with 2 than with 1.
    projection : int, optional
        To how many numbers each gradient is projected; gradients of no more parameters are kept as they are. If left
        out, they are kept where those of all examples take at most 1 GiB, 4 (n_train + n_test) n_parameters bytes, or
        where a network learns by linear layers alone and their products do, 4 n_train (n_train + n_test); otherwise
        they are projected to as many numbers as 1 GiB holds, or to 4,096 if that is more. On digits, whose networks
        have 4,810 parameters, the LDS is 0.707, 0.720, 0.729 and 0.732 with 512, 1,024, 2,048 and 4,096 numbers, and
        0.732 with all. On MNIST, with 109,386, it is 0.43, 0.54 and 0.56 with 512, 4,096 and all.
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
    more. Nothing else grows with the number of examples: not with examples times parameters. By linear layers it holds
    4 n_train n of products in place of gradients, 20 n_train^2 to solve with, and what goes in and out of the layers.
    """
    if not 1 <= n_models <= run.spec.n_models:
        raise SpecError(f"n_models is {n_models}; choose from 1 to the run's {run.spec.n_models}")
    if not damping > 0:
        raise SpecError(f"damping is {damping}; choose a number above 0, such as 1")
    if projection is not None and not (isinstance(projection, Integral) and projection >= 1):
        raise SpecError(
            f"projection is {projection!r}; choose a whole number from 1, such as {LEAST_PROJECTION}, or leave it out",
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
    network = copy.deepcopy(trainer.material.network).eval()
    parts = [(trainer.material.train_inputs, dataset.train_labels)]
    if not is_of_train:
        parts.append((trainer.material.test_inputs, dataset.test_labels))
    examples = Examples(trainer.material, parts, trainer.user_code)
    n_train, n_all = examples.n_train, examples.n_all
    indices = run.spec.model_indices(range(n_models))
    states = trainer.states(subset_masks(run.spec, range(n_models), n_train), indices)
    scorer: Scorer | None = None
    least_curvature = _LEAST_CURVATURE
    if projection is None and 4 * n_train * n_all <= GRADIENTS_BYTES:
        scorer = LinearLayers.of(examples, network, states[0])
    if scorer is None:
        sizes = {name: parameter.numel() for name, parameter in network.named_parameters() if parameter.requires_grad}
        width = int(projection or max(LEAST_PROJECTION, GRADIENTS_BYTES // (4 * n_all)))
        least_curvature *= max(sum(sizes.values()) / width, 1) ** 0.5
        scorer = Gradients(examples, network, sizes, width=width, seed=run.spec.seed)
    missed = torch.stack([shares_missed(examples, network, state) for state in states])
    curvatures = (missed * (1 - missed)).mean(0) + least_curvature
    leverages = torch.zeros(n_train, examples.of_targets.stop - examples.of_targets.start)
    for done, (state, model_index) in enumerate(zip(states, indices.tolist(), strict=True), start=1):
        scorer.add(leverages, state, model_index, curvatures, damping)
        if progress is not None:
            progress(done, n_models)
    return leverages.mul_(missed.mean(0)[:, None] / n_models).numpy()
