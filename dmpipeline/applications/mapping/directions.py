"""What a principal direction means, by removal: without the training examples at its ends, what changes for targets.

Datamodels predict the change, and models that are trained without those examples measure it (Ilyas et al., Datamodels,
2022, section 5).
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import numpy as np
import numpy.typing as npt

from dmdata.reading.long_work import shows_count
from dmpipeline.applications.evidence import checked_indices
from dmpipeline.applications.mapping.embeddings import Embedding, EndName, end_of
from dmpipeline.applications.retraining import TrainingSet, retrain
from dmpipeline.errors import SpecError
from dmpipeline.tables import Table

_CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Removal:
    """What removing the training examples at one end of a direction changes about the targets at an end.

    Attributes
    ----------
    direction : int
    removed_end, of_end : {"positive", "negative"}
        Where the removed examples lie, and the targets.
    predicted_change : float
        Of the targets' mean output, by the datamodels: minus the sum of the removed examples' weights.
    measured_change : float or None
        Mean output of models trained without them, less that of models trained on all. None if nothing was retrained.
    low, high : float or None
        Interval of 95% about the measured change, by Welch's t over retrainings.
    removed, of_targets : tuple of int
        The removed training examples and the targets, the outermost first.
    """

    direction: int
    removed_end: EndName
    of_end: EndName
    predicted_change: float
    measured_change: float | None
    low: float | None
    high: float | None
    removed: tuple[int, ...]
    of_targets: tuple[int, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Removals(Table[Removal]):
    """What removals along directions change; made by `what_removal_does`.

    Attributes
    ----------
    rows : tuple of Removal
    k : int
        Examples removed at a time.
    n_retrainings : int
        Of the full training set and of each that is left; 0 where changes are predicted alone.
    """

    k: int
    n_retrainings: int

    name: ClassVar[str] = "removals"


@shows_count("retraining", "models")
def what_removal_does(
    embedding: Embedding,
    directions: int | Sequence[int] = 0,
    *,
    k: int = 20,
    n_targets: int = 10,
    n_retrainings: int = 0,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Removals:
    """Remove the training examples at either end of directions, and see what changes for the targets at either end.

    Parameters
    ----------
    embedding : Embedding
    directions : int or sequence of int
        Numbers of directions.
    k : int
        Training examples removed at an end: of the largest or least score where training examples are embedded,
        loading where targets are.
    n_targets : int
        Targets at an end whose mean output is looked at; they are the other side of the direction.
    n_retrainings : int
        Models to train on each set, and as many on the full training set; 0 to predict alone, from 2 to measure. They
        are kept in the run.
    device, progress
        As for `dmpipeline.applications.retraining.retrain`.

    Returns
    -------
    removals : Removals
        Four rows a direction.

    Raises
    ------
    SpecError
        If an argument cannot be used, or models are to be trained where there is no run.
    RunError, TrainingError
        As for `retrain`.

    Notes
    -----
    Datamodels are fitted around subsets of a share alpha of the training set, so a removal from the full set is an
    extrapolation. On digits (1,000 perceptrons of alpha 0.5; 50 examples removed at both ends of four directions, 10
    retrainings each) predicted and measured changes correlate by 0.98, and all 16 agree in sign.
    """
    evidence = embedding.evidence
    asked = np.atleast_1d(np.asarray(directions)).tolist()
    numbers = checked_indices(asked, len(embedding), "direction", field="directions")
    check_removal(
        evidence.n_train, len(embedding.indices if embedding.of == "targets" else embedding.features), k, n_retrainings
    )
    run = evidence.require_measurable() if n_retrainings else None
    on_embedded, on_features = (embedding.scores.T, embedding.indices), (embedding.loadings, embedding.features)
    is_of_targets = embedding.of == "targets"
    removed = _ends(on_features if is_of_targets else on_embedded, numbers, k, "k")
    looked_at = _ends(on_embedded if is_of_targets else on_features, numbers, n_targets, "n_targets")
    targets = sorted({target for end in looked_at.values() for target in end})
    weight = evidence.datamodels(targets).weight
    full: npt.NDArray[Any] | None = None
    without: dict[_End, npt.NDArray[Any]] = {}
    if run is not None:
        sets = [TrainingSet.of(evidence.n_train, without=end) for end in [[], *removed.values()]]
        trained = retrain(run, sets, n_retrainings, device=device, progress=progress)
        full, *others = (each.of(evidence.targets)[:, targets] for each in trained)
        without = dict(zip(removed, others, strict=True))
    rows = []
    for number in numbers:
        for removed_end, of_end in itertools.product(get_args(EndName), repeat=2):
            examples, of_targets = removed[number, removed_end], looked_at[number, of_end]
            columns = np.searchsorted(targets, of_targets)
            predicted = -float(weight[examples][:, columns].sum(0, dtype=np.float64).mean())
            measured: tuple[float, float, float] | tuple[None, None, None] = (None, None, None)
            if full is not None:
                measured = _difference(without[number, removed_end][:, columns].mean(1), full[:, columns].mean(1))
            change, low, high = measured
            of_both = (tuple(examples), tuple(of_targets))
            rows.append(Removal(number, removed_end, of_end, predicted, change, low, high, *of_both))
    return Removals(tuple(rows), k, n_retrainings)


def check_removal(n_train: int, n_targets: int, k: int, n_retrainings: int) -> None:
    """Raise SpecError for a `k` or a number of retrainings that `what_removal_does` cannot use on data of this size."""
    if n_targets < 2:
        raise SpecError(f"{n_targets} target has no two ends; choose two or more", field="columns", value=n_targets)
    if n_retrainings < 0 or n_retrainings == 1:
        raise SpecError(
            f"{n_retrainings} retrainings have no interval; choose 0, to predict alone, or from 2",
            field="n_retrainings",
            value=n_retrainings,
        )
    _check_size(k, n_train, "k")


_End = tuple[int, EndName]


def _ends(
    side: tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]], numbers: Sequence[int], size: int, name: str
) -> dict[_End, list[int]]:
    """List the examples at both ends of directions, on the side (places along each direction, indices) given.

    Raises
    ------
    SpecError
        If half of the examples are fewer than `size`, the value of the argument called `name`.
    """
    along, indices = side
    _check_size(size, len(indices), name)
    ends = itertools.product(numbers, get_args(EndName))
    return {(number, end): indices[end_of(along[number], end, size)].tolist() for number, end in ends}


def _check_size(size: int, n: int, name: str) -> None:
    if not 1 <= size <= n // 2:
        raise SpecError(f"{name} is {size}; choose 1 to {n // 2:,}, half of them", field=name, value=size)


def _difference(these: npt.NDArray[Any], those: npt.NDArray[Any]) -> tuple[float, float, float]:
    """Return the difference of two means with Welch's interval; of no width where nothing varies."""
    from scipy.stats import ttest_ind  # slow to import

    change = float(these.mean() - those.mean())
    if np.ptp(these) == 0 and np.ptp(those) == 0:
        return change, change, change
    interval = ttest_ind(these, those, equal_var=False).confidence_interval(_CONFIDENCE)
    return change, float(interval.low), float(interval.high)
