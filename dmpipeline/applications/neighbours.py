"""Neighbours of an example: training examples that raise its output, and examples that models treat alike.

A target's weights are an embedding of it (Ilyas et al. 2022, section 4.3): two examples are alike where the same
training examples matter for both. Where a training example has no weights of its own, it is represented by its input.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt

import dmdata
from dmpipeline.applications.describing import label_names
from dmpipeline.applications.evidence import Evidence, find_evidence
from dmpipeline.applications.inspecting.copies import FEWEST_EXAMPLES, InputSpace
from dmpipeline.errors import SpecError
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.fitting.fitted import load_datamodels
from dmpipeline.runs.store import Run
from dmpipeline.runs.targets import TargetsName, datamodels_path
from dmpipeline.tables import Table

KindName = Literal["weight", "embedding"]
"""By what an example is a neighbour: by its weight in the target's datamodel, or by being alike."""

_BLOCK_BYTES = 2**25


@dataclass(frozen=True, slots=True)
class Neighbour:
    """One neighbour.

    Attributes
    ----------
    index : int
        From 0, in its part.
    kind : {"weight", "embedding"}
    score : float
        The weight, in the output's units; or a cosine, from -1 to 1.
    label : number, list of numbers, or None
        As the dataset numbers classes; None where no dataset is known.
    part : {"train", "test"}
        Where the example is.
    compared : {"weights", "inputs"}
        What was compared: the weights of both examples, or both inputs, where the training example has no weights.
    """

    index: int
    kind: KindName
    score: float
    label: Any
    part: TargetsName
    compared: Literal["weights", "inputs"]


@dataclass(frozen=True, slots=True, repr=False)
class Neighbours(Table[Neighbour]):
    """Neighbours of a target, by kind, and the nearest of each kind and part first.

    Attributes
    ----------
    target : int
    targets : {"test", "train"}
    label : number, list of numbers, or None
        The target's own.
    """

    name: ClassVar[str] = "neighbours"

    target: int
    targets: TargetsName
    label: Any


def similar(
    run: Run | Evidence | Datamodels | str | os.PathLike[str],
    target: int,
    *,
    top: int = 10,
    targets: TargetsName = "test",
    by: Sequence[KindName] | None = None,
    seed: int = 0,
    catalog: dmdata.CatalogLike = None,
) -> Neighbours:
    """Find the neighbours of a target.

    By weight: the training examples with the largest positive weights in its datamodel. By embedding: the other targets
    whose weights are most alike, by the cosine; and the training examples whose own weights are, where datamodels of
    training examples were fitted (`dmpipeline fit --targets train`), else those whose inputs are, by the cosine of
    filtered principal components, where the examples are known.

    Parameters
    ----------
    run : Run, Evidence, Datamodels, path or name
        As for `find_evidence`.
    target : int
    top : int
        How many of each kind and part, at most.
    targets : {"test", "train"}
        Which part the target is of.
    by : sequence of {"weight", "embedding"}, optional
        Left out, both; by weight alone where datamodels are of a release, of which one column is read.
    seed : int
        Of what is drawn to represent inputs: 5,000 training examples where there are more.
    catalog : Catalog, path or URL, optional
        See `dmdata.load_catalog`.

    Returns
    -------
    Neighbours

    Raises
    ------
    SpecError
        If there is no such target, an argument cannot be, or embeddings are asked of a release, for which all of it
        would be read.
    IncompleteRunError
        If a run has no datamodels of these targets.

    Notes
    -----
    Weights are compared in blocks of 32 MiB.
    """
    if top < 1:
        raise SpecError(f"top is {top}; choose 1 or more", field="top", value=top)
    if wrong := [kind for kind in by or () if kind not in get_args(KindName)]:
        raise SpecError(f"by {wrong[0]!r} is not known; choose weight or embedding", field="by", value=by)
    evidence = find_evidence(run, targets, catalog=catalog)
    target = evidence.checked_one(target)
    is_at_hand = evidence.is_at_hand
    kinds = by or (get_args(KindName) if is_at_hand else ("weight",))
    if "embedding" in kinds and not is_at_hand:
        raise SpecError(
            f"neighbours by embedding compare all {evidence.n_targets:,} columns of {evidence.name}; ask for those "
            "by weight, which reads one, or load all with Datamodels.load and hand these in",
            field="by",
            value=by,
        )
    train_name, own_name = label_names(evidence)
    own_part = evidence.targets
    of_target = evidence.datamodels([target]).weight[:, 0]
    found: list[Neighbour] = []

    def add(kind: KindName, part: TargetsName, compared: Literal["weights", "inputs"], scores: Any) -> None:
        name = train_name if part == "train" else own_name
        for index in _largest(scores, top):
            found.append(Neighbour(int(index), kind, float(scores[index]), name(int(index)), part, compared))

    if "weight" in kinds:
        positive = np.where(of_target > 0, of_target, -np.inf)
        if own_part == "train":
            positive[target] = -np.inf  # an example does not count as its own neighbour
        add("weight", "train", "weights", positive)
    if "embedding" in kinds:
        alike = _cosines(of_target, evidence.datamodels().weight)
        alike[target] = -np.inf
        add("embedding", own_part, "weights", alike)
        if own_part == "test" and evidence.run is not None:
            if datamodels_path(evidence.run, "train").exists():
                of_train = load_datamodels(evidence.run, "train").weight
                add("embedding", "train", "weights", _cosines(of_target, of_train))
            elif evidence.n_train >= FEWEST_EXAMPLES:  # of fewer, inputs do not show how alike examples are by nature
                add("embedding", "train", "inputs", _alike_inputs(evidence, target, seed))
    return Neighbours(tuple(found), target=target, targets=own_part, label=own_name(target))


def _largest(scores: npt.NDArray[np.floating[Any]], n: int) -> npt.NDArray[np.intp]:
    """Return the places of the n largest scores that are finite, the largest first."""
    order = np.argsort(-scores, kind="stable")[:n]
    finite: npt.NDArray[np.intp] = order[np.isfinite(scores[order])]
    return finite


def _cosines(vector: npt.NDArray[np.float32], weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return the cosine of a vector (n_train,) with each column of weights; of columns of zeros, -inf."""
    n_train, n_targets = weight.shape
    length = float(np.linalg.norm(vector))
    found = np.full(n_targets, -np.inf)
    for columns in _blocks(n_targets, max(1, _BLOCK_BYTES // (4 * n_train))):
        block = weight[:, columns]
        lengths = np.linalg.norm(block, axis=0) * length
        np.divide(vector @ block, lengths, out=found[columns], where=lengths > 0)
    return found


def _alike_inputs(evidence: Evidence, target: int, seed: int) -> npt.NDArray[np.float64]:
    space = InputSpace(evidence.dataset(), seed)
    own = space.representation(evidence.targets, np.array([target]))[0]
    train = space.representation("train", np.arange(evidence.n_train))
    return _cosines(own, np.ascontiguousarray(train.T))


def _blocks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
