"""A cheap attribution from a handful of a run's own models, as a prior for datamodels.

The score is that of TRAK (Park et al., 2023) without its random projection: a trained model is taken for linear in its
gradients, whose least-squares fit has leverage scores of the training examples for a target. Scores of a few models are
averaged. They order examples far worse than datamodels do; what they are for is `dmpipeline.fit(..., prior=scores)`.
"""

import copy
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dmpipeline.data.examples import Dataset
from dmpipeline.draws.masks import subset_masks
from dmpipeline.errors import SpecError
from dmpipeline.runs.preparation import Prepared
from dmpipeline.runs.store import Run
from dmpipeline.runs.targets import TargetsName, check_targets
from dmpipeline.training.layers import State
from dmpipeline.training.train import GradientTrainer

_EXAMPLES_AT_ONCE = 256


def gradient_scores(
    run: Run,
    *,
    n_models: int = 10,
    damping: float = 1.0,
    targets: TargetsName = "test",
    dataset: Dataset | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """Score every training example for every test example, or every other one, by gradients of a run's first models.

    With g_i the gradient of example i's log odds log(p_i / (1 - p_i)) in all parameters at a trained model, and G those
    of the training examples as rows, the scores for a target t are

        (1 - p_i) [(GG' + damping mean(diag GG') I)^-1 G g_t]_i,

    averaged over the models (Park et al., 2023, eq. 15, in its dual form).

    Parameters
    ----------
    run : Run
        Its first rows are trained again; nothing of it is read but its specification and dataset.
    n_models : int
        How many.
    damping : float
        Above zero: how far examples with like gradients share their leverage. On digits the scores' own LDS is 0.29,
        0.38, 0.52, 0.63 and 0.55 with a damping of 0.001, 0.01, 0.1, 1 and 10.
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
        If `n_models` is not from 1 to the run's, `damping` is not positive, there are no such targets, or the run's
        models are no classifiers trained by gradients.

    Notes
    -----
    Memory holds the gradients of all examples for one model, 4 (n_train + n_test) n_parameters bytes, and two matrices
    of 8 n_train^2; for training examples those of training examples alone, and three matrices.
    """
    if not 1 <= n_models <= run.spec.n_models:
        raise SpecError(f"n_models is {n_models}; choose from 1 to the run's {run.spec.n_models}")
    if not damping > 0:
        raise SpecError(f"damping is {damping}; choose a number above 0, such as 1")
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
    parts, of_parts = [material.train_inputs], [dataset.train_labels]
    if not is_of_train:
        parts, of_parts = [*parts, material.test_inputs], [*of_parts, dataset.test_labels]
    inputs = torch.cat([material.network_inputs(part) for part in parts])
    labels = torch.tensor(np.concatenate(of_parts), dtype=torch.int64)
    network = copy.deepcopy(material.network).eval()
    n_targets = dataset.n_train if is_of_train else dataset.n_test
    scores = torch.zeros(dataset.n_train, n_targets, dtype=torch.float64)
    rows = range(n_models)
    states = trainer.states(subset_masks(run.spec, rows, dataset.n_train), run.spec.model_indices(rows))
    for done, state in enumerate(states, start=1):
        with trainer.user_code():
            gradients = log_odds_gradients(network, state, inputs, labels)
        train, of_targets = gradients[: dataset.n_train], gradients[-n_targets:]
        kernel = (train @ train.T).double()
        kernel.diagonal().add_(damping * kernel.diagonal().mean())
        leverage = torch.linalg.solve(kernel, (train @ of_targets.T).double())
        with torch.no_grad():
            logits = torch.func.functional_call(network, state, (inputs[: dataset.n_train],))
            odds = torch.softmax(logits, -1)
            wrong = 1 - odds[torch.arange(dataset.n_train), labels[: dataset.n_train]].double()
        scores += wrong[:, None] * leverage
        if progress is not None:
            progress(done, n_models)
    return (scores / n_models).float().numpy()


def log_odds_gradients(network: nn.Module, state: State, inputs: Tensor, labels: Tensor) -> Tensor:
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
    gradients : float32 tensor, shape (n_examples, n_parameters)
    """
    learned = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    parameters = {name: tensor for name, tensor in state.items() if name in learned}
    rest = {name: tensor for name, tensor in state.items() if name not in learned}

    def log_odds(parameters: dict[str, Tensor], example: Tensor, label: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(network, (parameters, rest), (example[None],))[0]
        is_true = torch.arange(logits.shape[-1]) == label
        return logits.gather(-1, label[None])[0] - torch.logsumexp(logits.masked_fill(is_true, -torch.inf), -1)

    each = torch.func.vmap(torch.func.grad(log_odds), in_dims=(None, 0, 0))
    parts = []
    for start in range(0, len(inputs), _EXAMPLES_AT_ONCE):
        some = slice(start, start + _EXAMPLES_AT_ONCE)
        gradient = each(parameters, inputs[some], labels[some])
        parts.append(torch.cat([gradient[name].flatten(1) for name in parameters], dim=1))
    return torch.cat(parts)
