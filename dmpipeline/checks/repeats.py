"""Rows that hold what an earlier row holds: by chance, by the learner's nature, or because one was stored over another.

Of few examples there are few subsets, so the same one is drawn again; how often is computed from the law of the draws.
A learner without randomness gives the same outputs for the same subset, and one that decides by few examples, as a
support vector machine or a tree, for different ones too. None of that is a fault.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dmpipeline.draws.chance import is_beyond_chance, log_choose
from dmpipeline.draws.masks import subset_size
from dmpipeline.spec import MASK_LAWS, RunSpec

UNLIKELY = 1e-9
"""Repeats that chance gives less often than this are a fault."""

_SPARSE = 1e-4
# Outputs of fewer distinct values may be the same by chance: constant ones, classes, a small tree's probabilities.
_LEAST_DISTINCT = 9
_LOOKED_AT = 1024  # values of a row, which may have half a million
_LEAST_ROWS_OF_A_COPY = 2


def expected_repeats(spec: RunSpec, n_subsets: int, n_train: int) -> float:
    """Compute how many of the subsets that a spec draws are expected to be the same as an earlier one.

    Parameters
    ----------
    spec : RunSpec
        With masks that are drawn.
    n_subsets, n_train : int

    Returns
    -------
    repeats : float
        The sum over all masks of n p - 1 + (1 - p)^n, where p is a mask's probability: expected draws of it, less
        one if there is any.
    """
    total = 0.0
    for log_count, log_p in _masks_by_probability(spec, n_train):
        log_hits = math.log(n_subsets) + log_p if n_subsets else -math.inf
        if log_hits < math.log(_SPARSE):
            pairs = n_subsets * (n_subsets - 1) / 2
            total += pairs * math.exp(log_count + 2 * log_p)
        else:
            p = math.exp(log_p)
            missed = math.exp(n_subsets * math.log1p(-p)) if p < 1 else 0.0
            total += math.exp(log_count) * (n_subsets * p - 1 + missed)
    return total


def expected_in_common(spec: RunSpec, n_ours: int, n_theirs: int, n_train: int) -> float:
    """Bound how many subsets two ensembles that draw by a spec are expected to share, by the number of equal pairs."""
    return n_ours * n_theirs * sum(math.exp(count + 2 * p) for count, p in _masks_by_probability(spec, n_train))


@dataclass(slots=True)
class Repeats:
    """What the rows of a run repeat; hand in its blocks one after the other, then ask for `faults` and `remarks`.

    Memory is bounded by two short digests a row.
    """

    spec: RunSpec
    n_train: int
    learns_by_chance: bool
    """Whether two trainings are the same only by accident: those of our own trainer, which begin at random numbers."""
    _rows: list[int] = field(default_factory=list)
    _subsets: list[int] = field(default_factory=list)
    _masks: list[bytes] = field(default_factory=list)
    _outputs: list[bytes] = field(default_factory=list)
    _is_drawn: list[bool] = field(default_factory=list)
    _is_telling: list[bool] = field(default_factory=list)

    def add(
        self,
        rows: range,
        subsets: Sequence[int],
        block: Mapping[str, npt.NDArray[Any]],
        is_drawn: npt.NDArray[np.bool_],
    ) -> None:
        """Take in a block.

        Parameters
        ----------
        rows : range
        subsets : sequence of int
            The number of each row's subset.
        block : dict of str to array
            The rows of each of the run's arrays.
        is_drawn : array of bool, shape (n_rows,)
            Whether each row's mask is the one that its seed draws, or that was given.
        """
        outputs = [array for name, array in block.items() if name != "train_masks"]
        for i, (row, subset) in enumerate(zip(rows, subsets, strict=True)):
            self._rows.append(row)
            self._subsets.append(subset)
            self._masks.append(_short_digest(block["train_masks"][i]))
            self._outputs.append(_short_digest(*(array[i] for array in outputs)))
            self._is_drawn.append(bool(is_drawn[i]))
            self._is_telling.append(any(_is_telling(array[i]) for array in outputs))

    def faults(self) -> list[tuple[str, list[int]]]:
        """List what is wrong, a plural verb and its object, and in which rows."""
        found = []
        repeated = self._repeated_masks()
        if copied := [self._rows[i] for i, _ in repeated if not self._is_drawn[i]]:
            found.append(("have the mask of an earlier row", copied))
        drawn = [self._rows[i] for i, _ in repeated if self._is_drawn[i]]
        if self.spec.masks in MASK_LAWS and is_beyond_chance(len(drawn), self._expected, rarely=UNLIKELY):
            found.append((f"have masks drawn before, where chance gives about {_rounded(self._expected)}", drawn))
        if outputs := [self._rows[i] for i in self._wrongly_repeated_outputs()]:
            found.append(("have the outputs of an earlier row", outputs))
        return found

    def remarks(self) -> list[str]:
        """State which repeats there are that are not faults; empty where there are none."""
        said = []
        n_masks = len(self._repeated_masks())
        if n_masks and self.spec.masks in MASK_LAWS:
            said.append(
                f"{n_masks:,} of {self._n_subsets:,} subsets are the same as an earlier one; "
                f"chance gives about {_rounded(self._expected)}"
            )
        elif n_masks:
            said.append(f"{n_masks:,} of the {self._n_subsets:,} subsets given are the same as an earlier one")
        wrong = set(self._wrongly_repeated_outputs())
        same, other = (
            [i for i, j in self._repeated_outputs() if i not in wrong and self._is_same(i, j) is is_same]
            for is_same in (True, False)
        )
        if same:
            said.append(
                f"{len(same):,} rows have the outputs of an earlier row of the same subset, as a learner "
                "without randomness gives them"
            )
        if other:
            said.append(
                f"{len(other):,} rows have the outputs of an earlier row of another subset, as learners do that "
                "give few different outputs"
            )
        return said

    @property
    def _n_subsets(self) -> int:
        return len(set(self._subsets))

    @property
    def _expected(self) -> float:
        return expected_repeats(self.spec, self._n_subsets, self.n_train)

    def _is_same(self, i: int, j: int) -> bool:
        return self._masks[i] == self._masks[j]

    def _repeated_masks(self) -> list[tuple[int, int]]:
        """List the first row of each subset whose mask another subset had before, and any row not of its own."""
        first: dict[bytes, int] = {}
        seen: set[int] = set()
        repeated = []
        for i, (mask, subset) in enumerate(zip(self._masks, self._subsets, strict=True)):
            j = first.setdefault(mask, i)
            if self._subsets[j] != subset and (subset not in seen or not self._is_drawn[i]):
                repeated.append((i, j))
            seen.add(subset)
        return repeated

    def _repeated_outputs(self) -> list[tuple[int, int]]:
        first: dict[bytes, int] = {}
        pairs = ((i, first.setdefault(outputs, i)) for i, outputs in enumerate(self._outputs))
        return [(i, j) for i, j in pairs if i != j]

    def _wrongly_repeated_outputs(self) -> list[int]:
        """List rows whose outputs can only have been stored over their own."""
        pairs = [(i, j) for i, j in self._repeated_outputs() if self._is_telling[i]]
        copies = self._copied_blocks(pairs)
        not_theirs = {i for i, _ in pairs if not self._is_drawn[i]}
        if not self.learns_by_chance:
            return sorted(not_theirs | copies)
        # a learner is taken for one without randomness if no two of its trainings on one subset ever differ
        again = self._trainings_again()
        repeated = {i for i, _ in pairs}
        is_random = any(i not in repeated for i in again)
        return sorted({i for i, j in pairs if is_random or not self._is_same(i, j)} | not_theirs | copies)

    def _trainings_again(self) -> list[int]:
        first: dict[bytes, int] = {}
        return [i for i, mask in enumerate(self._masks) if first.setdefault(mask, i) != i]

    def _copied_blocks(self, pairs: list[tuple[int, int]]) -> set[int]:
        """Find blocks that hold, row by row, the outputs of an earlier block, though they are of other subsets."""
        step, source = self.spec.block_models, dict(pairs)
        places = {row: i for i, row in enumerate(self._rows)}
        copied: set[int] = set()
        for rows in self.spec.blocks:
            block = [places[row] for row in rows if row in places]
            if len(block) < max(len(rows), _LEAST_ROWS_OF_A_COPY) or not all(i in source for i in block):
                continue
            shifts = {self._rows[i] - self._rows[source[i]] for i in block}
            is_aligned = len(shifts) == 1 and shifts.pop() % step == 0
            if is_aligned and not any(self._is_same(i, source[i]) for i in block):
                copied.update(block)
        return copied


def rows_repeated(outputs: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """List the rows of outputs, shape (n_models, n_targets), that are equal to an earlier one to the bit.

    Rows of too few different values to be anybody's own are left out.
    """
    first: dict[bytes, int] = {}
    repeated = [i for i, row in enumerate(outputs) if first.setdefault(_short_digest(row), i) != i and _is_telling(row)]
    return np.asarray(repeated, np.intp)


def _masks_by_probability(spec: RunSpec, n_train: int) -> list[tuple[float, float]]:
    """List the masks that may be drawn: logarithms of how many there are of a kind, and of the probability of each."""
    n = n_train
    if spec.masks == "exact":
        log_count = log_choose(n, subset_size(n, spec.alpha))
        return [(log_count, -log_count)]
    inside, outside = math.log(spec.alpha), math.log1p(-spec.alpha)
    kinds = [(log_choose(n, size), size * inside + (n - size) * outside) for size in range(1, n + 1)]
    # what would be empty holds one example instead
    single = math.exp(kinds[0][1]) + math.exp(n * outside) / n
    kinds[0] = (math.log(n), math.log(single) if single else -math.inf)
    return kinds


def _rounded(count: float) -> str:
    return f"{count:,.0f}" if count >= 10 else f"{count:.2g}"


def _is_telling(outputs: npt.NDArray[Any]) -> bool:
    """Return whether outputs have too many different values to be the same as others' by chance."""
    if outputs.dtype.kind != "f":
        return False
    flat = np.ascontiguousarray(outputs).reshape(-1)
    return len(np.unique(flat[:: max(1, len(flat) // _LOOKED_AT)])) >= _LEAST_DISTINCT


def telling_digest(outputs: npt.NDArray[Any]) -> bytes | None:
    """Return what tells a model by its outputs; None where they have too few different values for that."""
    return _short_digest(outputs) if _is_telling(outputs) else None


def _short_digest(*arrays: npt.NDArray[Any]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.digest()
