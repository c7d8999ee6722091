"""How large a run's subsets are, and what its artifacts are called for that.

Subsets that are drawn have a share, `alpha`, by which catalogs and files name what was trained on them, as `50pct`.
Masks that are given have none that anybody chose: they are called `given`, and their sizes are counted.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from dmpipeline.draws.masks import given_masks, subset_size
from dmpipeline.spec import MASK_LAWS, RunSpec

_PIECE_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class SubsetSizes:
    """How many training examples the subsets of a run hold, each held-out one counted once.

    Attributes
    ----------
    smallest, largest : int or None
        None where subsets are drawn example by example, and their sizes are not known before.
    mean : float
    n_train : int
        What they are subsets of.
    """

    smallest: int | None
    mean: float
    largest: int | None
    n_train: int

    @classmethod
    def of(cls, spec: RunSpec, n_train: int) -> Self:
        """Return the sizes of a spec's subsets; those of given masks are counted, in one pass over their file.

        Raises
        ------
        SpecError
            If alpha leaves no example in or none out, or a file of masks cannot be used.
        """
        if spec.masks == "exact":
            size = subset_size(n_train, spec.alpha)
            return cls(size, float(size), size, n_train)
        if spec.masks == "bernoulli":
            return cls(None, spec.alpha * n_train, None, n_train)
        masks = given_masks(spec, n_train)
        step = max(1, _PIECE_BYTES // max(1, n_train))
        sizes = np.concatenate([masks[i : i + step].sum(1, dtype=np.int64) for i in range(0, len(masks), step)])
        return cls(int(sizes.min()), float(sizes.mean()), int(sizes.max()), n_train)

    @property
    def in_words(self) -> str:
        """For people, as "80 to 112 of 120 examples, 100 on average"."""
        if self.smallest is None or self.largest is None:
            return f"about {self.mean:,.0f} of {self.n_train:,} examples"
        if self.smallest == self.largest:
            return f"{self.smallest:,} of {self.n_train:,} examples"
        return f"{self.smallest:,} to {self.largest:,} of {self.n_train:,} examples, {self.mean:,.0f} on average"

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes by name, for JSON."""
        return asdict(self)


def subsets_on_record(spec: RunSpec, n_train: int) -> dict[str, Any]:
    """State for a run's provenance what its subsets are: `alpha_name`, and their sizes."""
    return {"alpha_name": spec.alpha_name} | SubsetSizes.of(spec, n_train).as_dict()


def alpha_name_of(spec: RunSpec, provenance: Mapping[str, Any]) -> str:
    """Return how names of a run's artifacts spell its subsets.

    Runs of given masks that have nothing about them on record were made when those were called by an `alpha` that
    nobody used; their datamodels and catalogs keep that name.
    """
    if spec.masks in MASK_LAWS or "subsets" in provenance:
        return spec.alpha_name
    return spec.share_name


def sizes_of(spec: RunSpec, provenance: Mapping[str, Any]) -> SubsetSizes | None:
    """Return the sizes of a run's subsets: those on record, else counted; None where their file no longer exists."""
    match provenance.get("subsets"):
        case {"smallest": smallest, "mean": mean, "largest": largest, "n_train": n_train}:
            return SubsetSizes(smallest, mean, largest, n_train)
    if spec.masks not in MASK_LAWS and not Path(spec.masks).exists():
        return None
    return SubsetSizes.of(spec, provenance["dataset"]["n_train"])


def law_in_words(spec: RunSpec) -> str:
    """Describe for people how subsets came about, as "at alpha 50%" or "on the subsets of mine.npy"."""
    return f"at alpha {spec.alpha:.0%}" if spec.masks in MASK_LAWS else f"on the subsets of {Path(spec.masks).name}"


def spec_facts(spec: RunSpec) -> dict[str, str]:
    """State for people what is trained: on what, how, and how many models."""
    held_out = spec.held_out
    return {
        "dataset": spec.dataset,
        "subsets": law_in_words(spec).removeprefix("on the subsets ").removeprefix("at "),
        "recipe": f"{spec.recipe.name}@{spec.recipe.version}",
        "models": f"{spec.n_models:,} to fit on, {held_out.n_subsets:,} subsets of {held_out.n_retrainings:,} held out",
    }
