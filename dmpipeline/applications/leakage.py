"""Leakage between training and test examples, and copies within the training set.

Inputs decide, and weights may propose. A test example's copy in the training set mostly has a large weight, but an easy
example leans on many that are alike: of 30 exact copies among digits the copy had the largest weight for six. So pairs
are scored by their inputs, see `copies`, and are calibrated against the training set: how well each of its examples is
explained as a copy of another is what happens without leakage.

Inputs that are equal number for number are found first, and need no such comparison: they are always listed.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt

from dmdata.reading.long_work import shows_count
from dmpipeline.applications.evidence import Evidence, find_evidence, run_at
from dmpipeline.applications.inspecting.copies import FEWEST_EXAMPLES, InputSpace, Scored, score_copies
from dmpipeline.data.examples import Dataset
from dmpipeline.data.identical import identical_to_tests, identical_training
from dmpipeline.errors import SpecError
from dmpipeline.runs.store import Run
from dmpipeline.runs.targets import TargetsName, check_targets, datamodels_path
from dmpipeline.tables import Table

NullName = Literal["distinct", "all"]
"""Which training examples show how alike examples are without leakage: those that are no copies themselves, or all."""

# A natural pair has such a likelihood ratio with a chance of 1 in this number times the pairs looked at, or less.
_ODDS = 100

# Of the errors that are allowed, what goes to pairs that weights alone propose: they are rarely what is found.
_SHARE_OF_WEIGHTS = 0.05

_FEWEST_FOR_COPIES = 100
"""With fewer training examples to compare with, what is found is called alike, not a copy."""


@dataclass(frozen=True, slots=True)
class LeakedPair:
    """A test example and a training example that equals it, or is more alike than chance explains.

    Attributes
    ----------
    train, test : int
        Indices, from 0.
    score : float
        Logarithm of how much more likely the pair is as a copy with noise than as two examples.
        Identical inputs may have a low one, where the training set has so many of them that they are usual.
    p : float
        Share of training examples, without leakage, whose best pair within the training set scores as high; over 0.95
        where the pair is of nearest inputs, and over 0.05 where only weights proposed it, if they were asked.
    distance : float
        Between inputs from which noise is filtered, at the best shift of a picture; in the units of the inputs, where a
        table is standardised.
    weight : float or None
        Of the training example in the test example's datamodel, in the output's units; None where none were fitted.
    same_label : bool
        False where the copy bears another label, or another number in a regression.
    identical : bool
        Whether the inputs are equal, number for number.
    """

    train: int
    test: int
    score: float
    p: float
    distance: float
    weight: float | None
    same_label: bool
    identical: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class Leakage(Table[LeakedPair]):
    """Pairs of equal inputs, and after them those found significant, the highest score first.

    Attributes
    ----------
    q : float
        Bound of the false discovery rate of leaked test examples.
    n_tested, n_leaked, n_identical : int
        Test examples looked at, those in a pair, and those that equal a training example.
    n_null : int
        Training examples that the null is made of.
    train_duplicate_share : float
        Share of training examples that are copies of other training examples beyond doubt; see `leakage`.
    threshold : float or None
        Largest p that is significant; None where no pair is.
    expected_false_share : float or None
        How many test examples would score so high by chance, as a share of those found; None where none were found so.
    fewest_significant : int
        Fewer leaked test examples than these can never be significant with so small a null, unless they are equal.
    is_sure : bool
        Whether pairs that are not equal may be called copies. They are only alike beyond what is usual where fewer than
        100 training examples say what is usual, or more than half of the training set repeats itself.
    """

    name: ClassVar[str] = "pairs"

    q: float
    n_tested: int
    n_leaked: int
    n_null: int
    train_duplicate_share: float
    threshold: float | None
    expected_false_share: float | None
    fewest_significant: int
    n_identical: int = 0
    is_sure: bool = True

    def in_words(self) -> str:
        """State what was found among the test examples, without a full stop."""
        of_all, n_alike = f"of {self.n_tested:,} test examples", self.n_leaked - self.n_identical
        what = "a copy in the training set" if self.is_sure else "a training example alike beyond what is usual here"
        if not self.n_identical:
            said = f"{n_alike:,} {of_all} {_has(n_alike)} {what}"
        else:
            said = f"{self.n_identical:,} {of_all} {_has(self.n_identical)} an identical training example"
            said += f", and {n_alike:,} more {_has(n_alike)} {what}" if n_alike else ""
        if n_alike and self.expected_false_share is not None:
            share = min(1.0, self.expected_false_share * self.n_leaked / n_alike)
            said += f"; about {share:.0%} of these are expected to be there by chance"
        return said


@shows_count("comparing", "steps")
def leakage(
    run: Run | Evidence | str | os.PathLike[str],
    *,
    q: float = 0.1,
    targets: TargetsName = "test",
    candidates: int = 0,
    null: NullName = "distinct",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Leakage:
    """Find test examples that the training set holds copies of: exact, noisy, of pictures also shifted, or relabelled.

    Each test example is scored with the training examples whose inputs are nearest, and if asked those whose weights
    are largest. So is each training example, or each of 5,000 drawn ones, with the rest of the training set, and with
    what the weights propose for the test example nearest to it: the null. Pairs of either kind have a null of their
    own. The p-value of a test example is the share of the null with a best score as high (a conformal p-value, Bates
    et al. 2023), and the false discovery rate of leaked test examples is held by the procedure of Benjamini and
    Hochberg in its adaptive form, which counts how many test examples are left that may be false (Benjamini, Krieger
    and Yekutieli 2006). It holds where test examples come from the same population as the training set, but for those
    that are copies.

    On digits with exact, noisy, shifted and relabelled copies, weights proposed none that inputs did not, and a
    twentieth of the errors allowed was spent on them: so none are asked for unless `candidates` says so.

    Parameters
    ----------
    run : Run, path or Evidence
        Of pictures, tables or tokens; of classes or numbers. With datamodels of test examples where candidates are
        asked for; where it has some, pairs state their weights.
    q : float
        Bound of the share of false ones among the test examples found, on average.
    targets : {"test"}
        Those of training examples are compared by `duplicates`.
    candidates : int
        How many training examples the weights propose for each test example, the largest in size first; 0 for none.
    null : {"distinct", "all"}
        Training examples that the null is made of. A training set often has copies within itself, and it has them as
        often as a test set that was split off at random. "all" counts them as natural: only what is more alike than the
        training set's own is found. "distinct" leaves those out that are copies beyond doubt, by a likelihood ratio of
        a hundred times their number, so that copies are found however many there are in the training set; where more
        than half are, as in tables of few values, all count.
    seed : int
        Of what is drawn: training examples where there are more than 5,000, the projection of inputs of more than 1,024
        numbers that are no pictures.
    progress : callable, optional
        Called with (steps done, steps in total): training examples compared with test examples and with the null.

    Returns
    -------
    Leakage
    XX

    Raises
    ------
    SpecError
        If an argument cannot be, there are less than 20 training examples, or examples are not known, as of a release:
        weights alone propose pairs, but do not say which of them are copies.
    IncompleteRunError
        If the run has no datamodels, and candidates are asked for.

    Notes
    -----
    Memory is the dataset's and the datamodels' own, 32 MiB of distances a few times over, and 64 numbers for each shift
    and each test example; at most 25 MB for the null. Time goes with (test examples + 5,000) x training examples.
    """
    if check_targets(targets) != "test":
        raise SpecError(
            "leakage is between training and test examples; copies within the training set are found by duplicates",
            field="targets",
            value=targets,
        )
    if not 0 < q < 1:
        raise SpecError(f"q is {q}; choose a false discovery rate between 0 and 1, such as 0.1", field="q", value=q)
    if null not in get_args(NullName):
        raise SpecError(f"null is {null!r}; choose distinct or all", field="null", value=null)
    if candidates < 0:
        raise SpecError(f"{candidates} candidates; choose 0 or more", field="candidates", value=candidates)
    dataset, weight = _known(run, "test", is_needed=candidates > 0)
    space = InputSpace(dataset, seed)
    equal, is_repeated = identical_to_tests(dataset), np.zeros(dataset.n_train, np.bool_)
    for group in identical_training(dataset):
        is_repeated[group] = True
    n_steps = 2 * dataset.n_train

    def step(start: int) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, _: progress(start + done, n_steps)

    proposed = None if weight is None or not candidates else largest_weights(weight, candidates)
    tested = score_copies(space, "test", np.arange(dataset.n_test), proposed=proposed, progress=step(0))
    like_proposed = None if proposed is None else proposed[space.nearest_tests(space.sample)]
    natural = score_copies(space, "train", space.sample, proposed=like_proposed, progress=step(dataset.n_train)).score
    n_nearest = natural.shape[1] - (0 if like_proposed is None else like_proposed.shape[1])
    is_copy = (natural[:, :n_nearest].max(1) > math.log(_ODDS * len(natural))) | is_repeated[space.sample]
    counted = natural
    if null == "distinct" and is_copy.mean() <= 0.5 and (~is_copy).sum() >= FEWEST_EXAMPLES:
        counted = natural[~is_copy]
    share = 0.0 if proposed is None else _SHARE_OF_WEIGHTS
    p = p_values(tested.score[:, :n_nearest], counted[:, :n_nearest].max(1)) / (1 - share)
    if proposed is not None:
        p = np.concatenate([p, p_values(tested.score[:, n_nearest:], counted[:, n_nearest:].max(1)) / share], 1)
    n_significant, threshold = _significant(p.min(1), q)
    pairs = _pairs(dataset, weight, tested, p, threshold, equal)
    n_leaked = len({pair.test for pair in pairs})
    return Leakage(
        rows=tuple(pairs),
        q=q,
        n_tested=dataset.n_test,
        n_leaked=n_leaked,
        n_null=len(counted),
        train_duplicate_share=float(is_copy.mean()),
        threshold=threshold,
        expected_false_share=(
            None if threshold is None else min(1.0, (dataset.n_test - n_significant) * threshold / n_leaked)
        ),
        fewest_significant=math.ceil(dataset.n_test * (1 + q) / (q * (1 - share) * (len(counted) + 1))),
        n_identical=len(equal),
        is_sure=len(counted) >= _FEWEST_FOR_COPIES and bool(is_copy.mean() <= 0.5),
    )


def p_values(scores: npt.NDArray[np.float64], null: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return which share of the null scores as high, the score itself counted: (1 + n as high) / (1 + n)."""
    ordered = np.sort(null)
    n_as_high = len(ordered) - np.searchsorted(ordered, scores, "left")
    shares: npt.NDArray[np.float64] = (1 + n_as_high) / (1 + len(ordered))
    return shares


def largest_weights(weight: npt.NDArray[np.float32], n: int) -> npt.NDArray[np.intp]:
    """Return the n training examples with the largest weights in size of each target, (n_targets, n), in no order.

    Reads a block of targets at a time, so that a copy of the weights is never made.
    """
    n_train, n_targets = weight.shape
    n = min(n, n_train)
    found = np.empty((n_targets, n), np.intp)
    step = max(1, 2**22 // n_train)
    for start in range(0, n_targets, step):
        size = np.abs(weight[:, start : start + step].T)
        found[start : start + step] = np.argpartition(size, n_train - n, 1)[:, n_train - n :]
    return found


def _known(
    asked: Run | Evidence | str | os.PathLike[str], targets: TargetsName, *, is_needed: bool
) -> tuple[Dataset, npt.NDArray[np.float32] | None]:
    """Find the examples, and the weights where they are needed or there."""
    run = run_at(
        asked, "which pairs are copies is decided by their inputs, since weights alone only propose them; examples are"
    )
    if isinstance(asked, Evidence) and asked.targets == targets and asked.is_at_hand:
        return run.dataset(), asked.datamodels().weight
    if not is_needed and not datamodels_path(run, targets).exists():
        return run.dataset(), None
    return run.dataset(), find_evidence(run, targets).datamodels().weight


def _significant(p: npt.NDArray[np.float64], q: float) -> tuple[int, float | None]:
    """Return how many are significant by Benjamini, Krieger and Yekutieli, and the largest p-value of them."""
    from scipy.stats import false_discovery_control  # slow to import

    adjusted = false_discovery_control(np.minimum(p, 1), method="bh")
    first = q / (1 + q)  # definition 6 of the paper
    n_first = int((adjusted <= first).sum())
    if n_first in (0, len(p)):
        is_found = adjusted <= first
    else:
        is_found = adjusted <= first * len(p) / (len(p) - n_first)
    return int(is_found.sum()), float(p[is_found].max()) if is_found.any() else None


def _pairs(
    dataset: Dataset,
    weight: npt.NDArray[np.float32] | None,
    tested: Scored,
    p: npt.NDArray[np.float64],
    threshold: float | None,
    equal: Mapping[int, Sequence[int]],
) -> list[LeakedPair]:
    places: dict[tuple[int, int], int] = {}
    for test, place in zip(*np.nonzero(p <= (-1 if threshold is None else threshold)), strict=True):
        places[int(test), int(tested.index[test, place])] = int(place)
    for test, trains in equal.items():
        for train in trains:
            # one that is not among the nearest scores as those that equal it
            is_it = tested.index[test] == train
            places.setdefault((test, train), int((is_it if is_it.any() else tested.score[test]).argmax()))
    found = []
    for (test, train), place in places.items():
        is_identical = train in equal.get(test, ())
        found.append(
            LeakedPair(
                train=train,
                test=test,
                score=float(tested.score[test, place]),
                p=float(p[test, place]),
                distance=0.0 if is_identical else float(tested.distance[test, place]),
                weight=None if weight is None else float(weight[train, test]),
                same_label=_is_same(dataset.train_labels[train], dataset.test_labels[test]),
                identical=is_identical,
            )
        )
    return sorted(found, key=lambda pair: (not pair.identical, -pair.score, pair.test, pair.train))


def _has(n: int) -> str:
    return "has" if n == 1 else "have"


def _pair(n: int) -> str:
    return "pair" if n == 1 else "pairs"


def _is_same(one: Any, other: Any) -> bool:
    return bool(np.array_equal(one, other))


@dataclass(frozen=True, slots=True)
class DuplicatePair:
    """Two training examples of which one is a copy of the other.

    Attributes
    ----------
    train, train2 : int
        Indices, from 0, the lower first.
    score : float
        Logarithm of how much more likely the pair is as a copy with noise than as two examples.
    distance : float
        As that of `LeakedPair`.
    weight : float or None
        Mean of the weights of each in the other's datamodel, in the output's units; None where datamodels of training
        examples were not fitted.
    same_label : bool
        False where labels are in conflict.
    identical : bool
        Whether the inputs are equal, number for number.
    """

    train: int
    train2: int
    score: float
    distance: float
    weight: float | None
    same_label: bool
    identical: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class Duplicates(Table[DuplicatePair]):
    """Pairs of training examples: those of equal inputs, and after them others, the highest score first.

    Attributes
    ----------
    threshold : float
        Least score that counts where inputs are not equal: the logarithm of `odds` times the number of examples.
    n_conflicting : int
        Pairs whose labels differ.
    n_identical : int
        Pairs of equal inputs: each example with the first one that it equals.
    is_sure : bool
        Whether pairs that are not equal may be called copies; as that of `Leakage`.
    """

    name: ClassVar[str] = "pairs"

    threshold: float
    n_conflicting: int
    n_identical: int = 0
    is_sure: bool = True

    def in_words(self) -> str:
        """State what was found within the training set, without a full stop."""
        n_alike = len(self) - self.n_identical
        said = [f"{self.n_identical:,} {_pair(self.n_identical)} of identical training examples"]
        what = "that are copies of one another" if self.is_sure else "that are alike beyond what is usual here"
        said.append(f"{n_alike:,} {_pair(n_alike)} of training examples {what}")
        found = " and ".join(words for words, n in zip(said, (self.n_identical, n_alike), strict=True) if n)
        return (found or "no copies found") + (
            f"; labels differ in {self.n_conflicting:,}" if self.n_conflicting else ""
        )


@shows_count("comparing", "steps")
def duplicates(
    run: Run | Evidence | str | os.PathLike[str],
    *,
    odds: float = _ODDS,
    candidates: int = 50,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Duplicates:
    """Find copies within the training set, and among them those with labels in conflict.

    There is no other set to calibrate by, so that the likelihood ratio decides: a pair counts if a copy is more likely
    than two examples by `odds` times the number of training examples, as many as may be an example's original. So a
    copy with much noise is missed here that `leakage` would find. Examples whose inputs are equal are always listed,
    each with the first that it equals.

    Parameters
    ----------
    run : Run, path or Evidence
        Where it has datamodels of training examples (`dmpipeline fit --targets train`), their weights propose pairs.
    odds : float
        At least 1.
    candidates : int
        How many training examples the weights propose for each.
    seed, progress
        As for `leakage`.

    Raises
    ------
    SpecError
        If an argument cannot be, or examples are not known, as of a release.

    Notes
    -----
    Memory is that of `leakage`. Time goes with the square of the number of training examples.
    """
    if not (math.isfinite(odds) and odds >= 1):
        raise SpecError(f"odds are {odds}; choose 1 or more, such as 100", field="odds", value=odds)
    if candidates < 0:
        raise SpecError(f"{candidates} candidates; choose 0 or more", field="candidates", value=candidates)
    dataset, weight = _known(run, "train", is_needed=False)
    space = InputSpace(dataset, seed)
    proposed = None if weight is None or not candidates else largest_weights(weight, candidates)
    scored = score_copies(space, "train", np.arange(dataset.n_train), proposed=proposed, progress=progress)
    threshold = math.log(odds * dataset.n_train)
    best: dict[tuple[int, int], tuple[float, float]] = {}
    for one, place in zip(*np.nonzero(scored.score >= threshold), strict=True):
        other = int(scored.index[one, place])
        pair = (min(int(one), other), max(int(one), other))
        found = (float(scored.score[one, place]), float(scored.distance[one, place]))
        best[pair] = max(found, best.get(pair, (-math.inf, 0.0)))
    groups = identical_training(dataset)
    of_group = {index: group for group in groups for index in group}
    for index, group in of_group.items():
        if index != group[0]:
            best.setdefault((group[0], index), (float(scored.score[index].max()), 0.0))
    rows = [
        DuplicatePair(
            train=one,
            train2=other,
            score=score,
            distance=distance,
            weight=None if weight is None else float((weight[one, other] + weight[other, one]) / 2),
            same_label=_is_same(dataset.train_labels[one], dataset.train_labels[other]),
            identical=other in of_group.get(one, ()),
        )
        for (one, other), (score, distance) in best.items()
    ]
    rows.sort(key=lambda pair: (not pair.identical, -pair.score, pair.train, pair.train2))
    found_in = {index for pair in rows for index in (pair.train, pair.train2)}
    return Duplicates(
        tuple(rows),
        threshold=threshold,
        n_conflicting=sum(not pair.same_label for pair in rows),
        n_identical=sum(pair.identical for pair in rows),
        is_sure=dataset.n_train >= _FEWEST_FOR_COPIES and len(found_in) <= dataset.n_train / 2,
    )
