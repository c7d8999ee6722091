"""Measures of attribution scores of any origin that need no retraining: what they rank first, and how they rank labels.

They are those that quanda and dattri offer, by the same definitions, so that figures can be compared:

==========================  ===========================================  ==================================
here                        quanda                                       dattri
==========================  ===========================================  ==================================
`class_detection`           ClassDetectionMetric, SubclassDetectionMetric
`top_k_cardinality`         TopKCardinalityMetric
`mislabel_detection`        MislabelingDetectionMetric (see there)       metric.mislabel_detection_auc
`share_within`              .                                            metric.brittleness, of many targets
==========================  ===========================================  ==================================

Their LDS is that of `dmpipeline.scoring.evaluation`. Scores are matrices of shape (n_train, n_targets), positive where
an example speaks for the target's output. They are read once, some rows at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmpipeline.errors import SpecError
from dmpipeline.moments.arrays import RowSliceable, read_outputs
from dmpipeline.scoring.correlation import Floats

_BLOCK_BYTES = 2**26


@dataclass(frozen=True, slots=True, eq=False)
class Proponents:
    """What one pass over a matrix of scores found.

    Attributes
    ----------
    indices : array of intp, shape (k, n_targets)
        Training examples of each target's k highest scores, the highest first; of equal scores the earlier example.
    self_influence : array of float64, shape (n_train,), or None
        Score of each training example for itself, where targets are the training examples.
    """

    indices: NDArray[np.intp]
    self_influence: Floats | None


@dataclass(frozen=True, slots=True)
class MislabelDetection:
    """How well a ranking of training examples finds the mislabelled ones.

    Attributes
    ----------
    auc : float
        Area under the receiver operating characteristic: the chance that a mislabelled example ranks before one that is
        not, ties counted half. dattri's `mislabel_detection_auc`.
    average_precision : float
        Precision averaged over the mislabelled examples, each at its own rank; by chance their share.
    """

    auc: float
    average_precision: float


def find_proponents(scores: RowSliceable, k: int = 1, *, is_of_train: bool = False, name: str = "scores") -> Proponents:
    """Find each target's k highest scores.

    Parameters
    ----------
    scores : array of real, shape (n_train, n_targets)
        Of any kind that `dmpipeline.moments.arrays` reads.
    k : int
        At most n_train, and one less where targets are the training examples.
    is_of_train : bool
        Targets are the training examples: none is its own proponent, and the scores for themselves are returned.
    name : str
        What to call the scores in errors.

    Raises
    ------
    SpecError
        For a k that cannot be, or scores that are not finite real numbers.

    Notes
    -----
    Memory holds a block of rows of at most 64 MiB, or one row, a few times over, and k n_targets numbers. The time is
    that of k passes.
    """
    n_train, n_targets = scores.shape
    if not 1 <= k <= n_train - is_of_train:
        raise SpecError(f"top_k is {k}; choose from 1 to {n_train - is_of_train:,}", field="top_k", value=k)
    highest: Floats = np.empty((0, n_targets))
    best: NDArray[np.intp] = np.empty((0, n_targets), np.intp)
    self_influence = np.empty(n_train) if is_of_train else None
    for start, block in _blocks(scores, name):
        rows = np.arange(start, start + len(block))
        if self_influence is not None:
            self_influence[rows] = block[rows - start, rows]
            block[rows - start, rows] = -np.inf
        of_rows = np.broadcast_to(rows[:, None], block.shape)
        highest, places = _highest(np.concatenate([highest, block]), k)
        best = np.take_along_axis(np.concatenate([best, of_rows]), places, axis=0)
    return Proponents(best, self_influence)


def scores_of_targets(scores: RowSliceable, targets: Sequence[int], *, name: str = "scores") -> Floats:
    """Read the scores of some targets alone, float64, shape (n_train, len(targets)); a block of rows at a time."""
    picked = np.asarray(targets, np.intp)
    return np.concatenate([block[:, picked] for _, block in _blocks(scores, name)])


def class_detection(
    proponents: NDArray[np.intp], train_labels: NDArray[Any], target_labels: NDArray[Any]
) -> tuple[float, Floats]:
    """Measure how many of the targets' proponents are of their target's class.

    The identical class test, and with labels that are finer than those trained on the identical subclass test, of
    Hanawa et al. (Evaluation of Similarity-based Explanations, 2021). quanda: ``ClassDetectionMetric`` and
    ``SubclassDetectionMetric`` with ``s = k``.

    Parameters
    ----------
    proponents : array of int, shape (k, n_targets)
        See `find_proponents`.
    train_labels, target_labels : arrays, shape (n_train,), (n_targets,)

    Returns
    -------
    share : float
        Over targets and proponents, from 0 to 1.
    target_shares : array of float64, shape (n_targets,)

    Examples
    --------
    >>> import numpy as np
    >>> class_detection(np.array([[0, 1]]), np.array([7, 8, 8]), np.array([7, 7]))
    (0.5, array([1., 0.]))
    """
    shares = (train_labels[proponents] == target_labels).mean(axis=0, dtype=np.float64)
    return float(shares.mean()), shares


def top_k_cardinality(proponents: NDArray[np.intp]) -> float:
    """Measure how little targets share their proponents: different examples among them, as a share of all.

    1 where no two targets share one; 1 / n_targets where all have the same. Attributions that depend on the target
    share few (Barshan, Brunet and Dziugaite, RelatIF, 2020). quanda: ``TopKCardinalityMetric``.

    Parameters
    ----------
    proponents : array of int, shape (k, n_targets)

    Examples
    --------
    >>> import numpy as np
    >>> top_k_cardinality(np.array([[3, 3, 5, 3]]))
    0.5
    """
    return len(np.unique(proponents)) / proponents.size


def mislabel_detection(self_influence: NDArray[Any], mislabelled: Sequence[int]) -> MislabelDetection:
    """Measure how well training examples' scores for themselves, the highest first, rank mislabelled ones first.

    What a model can only have learned by heart has a large effect on itself (Koh and Liang, 2017; Pruthi et al., 2020).
    The area is that of dattri's ``metric.mislabel_detection_auc``. quanda's ``MislabelingDetectionMetric`` takes the
    area under the share found against the share inspected, which is a linear function of it: with n examples, of which
    m are mislabelled, ``m / 2n + (n - m) / n * auc``, but for one half of 1 / mn where the first is a mislabelled one.

    Parameters
    ----------
    self_influence : array of real, shape (n_train,)
    mislabelled : sequence of int
        Some examples, but not all; known, for instance, because they were relabelled on purpose.

    Raises
    ------
    SpecError
        If none or all are mislabelled.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score  # slow to import

    truth = np.zeros(len(self_influence), np.bool_)
    truth[np.asarray(mislabelled, np.intp)] = True
    if truth.all() or not truth.any():
        raise SpecError(
            f"{truth.sum()} of {len(truth)} training examples are mislabelled; name at least one, and not all",
            field="mislabelled",
        )
    auc, average = roc_auc_score(truth, self_influence), average_precision_score(truth, self_influence)
    return MislabelDetection(float(auc), float(average))


def share_within(smallest: NDArray[Any], grid: Sequence[int]) -> tuple[float, ...]:
    """Measure which share of targets has flipped within each number of removals.

    Parameters
    ----------
    smallest : array of real, shape (n_targets,)
        Smallest number of removals that flips each target, as dattri's ``metric.brittleness`` finds it; nan for none.
    grid : sequence of int

    Examples
    --------
    >>> import numpy as np
    >>> share_within(np.array([20.0, np.nan, 80.0, 20.0]), [20, 40, 80])
    (0.5, 0.5, 0.75)
    """
    return tuple(float((smallest <= k).mean()) for k in grid)


def _highest(values: Floats, k: int) -> tuple[Floats, NDArray[np.intp]]:
    """Take out the k highest values of each column, and return them and their rows; the first of equal ones first."""
    columns = np.arange(values.shape[1])
    taken, places = [], []
    for _ in range(min(k, len(values))):
        places.append(values.argmax(axis=0))
        taken.append(values[places[-1], columns])
        values[places[-1], columns] = -np.inf
    return np.stack(taken), np.stack(places)


def _blocks(scores: RowSliceable, name: str) -> Iterator[tuple[int, Floats]]:
    """Read scores as float64, (first row, block) at a time, and refuse what is not finite."""
    n_train, n_targets = scores.shape
    step = max(1, _BLOCK_BYTES // (8 * n_targets))
    for start in range(0, n_train, step):
        block = read_outputs(scores, start, min(start + step, n_train)).astype(np.float64)
        finite = np.isfinite(block)
        if not finite.all():
            row, column = np.argwhere(~finite)[0].tolist()
            raise SpecError(
                f"{name}: the score of training example {start + row} for target {column} is {block[row, column]}; "
                "expected finite numbers: compute it again, or put 0 where an example was not scored",
                row=start + row,
                column=column,
            )
        yield start, block
