"""Rows that two ensembles share: the same models, or models of the same subsets, which are not independent.

A run and its own export hold the same models, and a reference may hold some of ours among others. That such rows agree
says nothing of how another training would compare.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dmpipeline.checks.repeats import UNLIKELY, expected_in_common, telling_digest
from dmpipeline.checks.verification import TOLERANCE
from dmpipeline.draws.chance import is_beyond_chance
from dmpipeline.spec import MASK_LAWS, RunSpec


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """What the rows of two ensembles have in common; made by `shared_rows`.

    Attributes
    ----------
    is_same : array of bool, shape (m_models,)
        Rows of the reference that are models of ours: of a subset that ours has, with outputs equal to rounding.
    is_again : array of bool, shape (m_models,)
        Its other rows of a subset that ours has: trainings of their own.
    ours, theirs : array of bool, shape (n_models,) and (m_models,)
        Rows that are independent between the two: the same models are left to ours, and other subsets that both have
        to either side in turn.
    """

    is_same: npt.NDArray[np.bool_]
    is_again: npt.NDArray[np.bool_]
    ours: npt.NDArray[np.bool_]
    theirs: npt.NDArray[np.bool_]

    def in_words(self) -> str:
        """State how many rows are shared, and what follows; empty where none are."""
        n_same, n_again, n_rows = int(self.is_same.sum()), int(self.is_again.sum()), len(self.is_same)
        if n_same == n_rows:
            return (
                f"all {n_rows:,} rows of the reference that were read are models that ours holds too: the same subsets "
                "and, to rounding, the same outputs. They agree because they are the same models, so statistics are "
                "left out, and nothing is told of how models trained independently would compare"
            )
        said = []
        if n_same:
            said.append(
                f"{n_same:,} of {n_rows:,} rows of the reference are models that ours holds too; they were not compared"
            )
        if n_again:
            said.append(
                f"{n_again:,} of {n_rows:,} are other trainings on subsets that ours has too; each such subset was "
                "compared on one side alone"
            )
        return "; ".join(said)


def shared_rows(
    ours: npt.NDArray[Any],
    theirs: npt.NDArray[Any],
    our_subsets: Sequence[int] | None,
    their_subsets: Sequence[int] | None,
    spec: RunSpec,
    n_train: int,
) -> Shared:
    """Find which rows of a reference are not independent of ours.

    Parameters
    ----------
    ours, theirs : array of float, shape (n_models, n_targets) and (m_models, n_targets)
    our_subsets, their_subsets : sequence of int, or None
        A key of each row's subset (`dmpipeline.moments.identity.keys_of_masks`). Where masks are not known rows are the
        same models if their outputs are, to the bit.
    spec : RunSpec
        Of ours; tells how many subsets two ensembles have in common by chance, which are no sign of anything.
    n_train : int
    """
    our_keys: Sequence[Hashable] = our_subsets or []
    their_keys: Sequence[Hashable] = their_subsets or []
    expected = 0.0
    if not our_keys or not their_keys:
        wide = np.result_type(ours, theirs)
        our_keys, their_keys = (
            [telling_digest(row.astype(wide, copy=False)) for row in side] for side in (ours, theirs)
        )
    elif spec.masks in MASK_LAWS:
        counts = len(set(our_keys)), len(set(their_keys))
        expected = min(counts[1], expected_in_common(spec, *counts, n_train))
    is_same, is_again = np.zeros(len(theirs), np.bool_), np.zeros(len(theirs), np.bool_)
    apart = np.ones(len(ours), np.bool_), np.ones(len(theirs), np.bool_)
    places: dict[Hashable, list[int]] = defaultdict(list)
    for i, key in enumerate(our_keys):
        places[key].append(i)
    in_common = set(places) & set(their_keys) - {None}
    if not is_beyond_chance(len(in_common), expected, rarely=UNLIKELY):
        return Shared(is_same, is_again, *apart)
    sound = np.isfinite(ours).all(axis=1)
    near = TOLERANCE * (ours if sound.all() else ours[sound]).std(axis=0, dtype=np.float64)
    turns: dict[Hashable, int] = {}
    for j, key in enumerate(their_keys):
        if key not in in_common:
            continue
        is_same[j] = any(_is_one(ours[i], theirs[j], near) for i in places[key])
        is_again[j] = not is_same[j]
        if is_same[j] or turns.setdefault(key, len(turns)) % 2:
            apart[1][j] = False
        else:
            apart[0][places[key]] = False
    return Shared(is_same, is_again, *apart)


def _is_one(own: npt.NDArray[Any], other: npt.NDArray[Any], near: npt.NDArray[np.float64]) -> bool:
    """Tell whether every target differs by rounding alone: by less than `near`, a share of its spread over models."""
    rounding = max((float(np.finfo(side.dtype).eps) for side in (own, other) if side.dtype.kind == "f"), default=0.0)
    wide = own.astype(np.float64)
    return bool((np.abs(wide - other) <= near + rounding * np.abs(wide)).all())
