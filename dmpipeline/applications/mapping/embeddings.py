"""Datamodel embeddings: examples by the training data that matter to them, in a few principal directions and on a map.

A target's embedding is its column of weights: an entry for each training example, large where that example changes
what the model says about the target. A training example's is its row of weights: what it changes about each target
(Ilyas et al., Datamodels, 2022, section 5). Targets are alike here if models learn them from the same examples, however
they look.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt

import dmdata
from dmpipeline.applications.describing import label_of
from dmpipeline.applications.evidence import Evidence, find_evidence
from dmpipeline.errors import SpecError
from dmpipeline.fitting.datamodels import Datamodels, SpaceName
from dmpipeline.fitting.influences import Label
from dmpipeline.runs.store import Run
from dmpipeline.runs.targets import TargetsName
from dmpipeline.tables import Table, plain

EmbeddedName = Literal["targets", "train"]
"""What is embedded: targets, by their columns of the weights, or training examples, by their rows."""

EndName = Literal["positive", "negative"]

MOST_ON_A_TSNE = 5_000
"""Larger sets are mapped by their first two principal directions, for t-SNE would take minutes to hours."""

_PERPLEXITY = 30
_WORKING_MIB = 64
_LISTED_ENDS = 10


@dataclass(frozen=True, slots=True)
class Direction:
    """A principal direction of an embedding, and the examples that lie furthest along it.

    Attributes
    ----------
    direction : int
        From 0, by falling share.
    explained_share : float
        Of the embeddings' variance.
    positive, negative : tuple of int
        Indices of the embedded examples of largest and of least score, the outermost first.
    positive_labels, negative_labels : tuple or None
        Their labels: class names, or classes, or numbers; None where they are not known or not one an example.
    """

    direction: int
    explained_share: float
    positive: tuple[int, ...]
    positive_labels: tuple[str | int | float, ...] | None
    negative: tuple[int, ...]
    negative_labels: tuple[str | int | float, ...] | None


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Embedding(Table[Direction]):
    """Examples in principal directions and on a map; made by `embed`.

    Attributes
    ----------
    rows : tuple of Direction
    evidence : Evidence
        That weights are from.
    of : {"targets", "train"}
        What is embedded.
    indices : array of int64, shape (n,)
        Of the embedded examples: targets or training examples.
    features : array of int64, shape (n_features,)
        What the entries of an embedding stand for: training examples where targets are embedded, and targets where
        training examples are.
    scores : array of float32, shape (n, n_components)
        Of each example in each direction, in units of the weights; their mean is 0.
    loadings : array of float32, shape (n_components, n_features)
        The directions: of length 1, orthogonal, and of the sign that makes the largest entry positive.
    x, y : array of float32, shape (n,)
        Places on a map.
    map_name : {"t-SNE", "PCA"}
        How they were found. Distances on a t-SNE mean little; neighbours mean something.
    neighbours : array of int64, shape (n, n_neighbours)
        For each example the rows of those nearest by the cosine of their whole embeddings, nearest first.
    similarities : array of float32, shape (n, n_neighbours)
        Those cosines; 0 for an example without weights.
    labels : array of int64 or float32, shape (n,), or None
        Classes, or the numbers of a regression; None where they are not known or not one an example.
    class_names : tuple of str, or None
    seed : int
    """

    evidence: Evidence
    of: EmbeddedName
    indices: npt.NDArray[np.int64]
    features: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    loadings: npt.NDArray[np.float32]
    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.float32]
    map_name: Literal["t-SNE", "PCA"]
    neighbours: npt.NDArray[np.int64]
    similarities: npt.NDArray[np.float32]
    labels: npt.NDArray[Any] | None
    class_names: tuple[str, ...] | None
    seed: int

    name: ClassVar[str] = "directions"

    @property
    def part(self) -> TargetsName:
        """Whether the embedded examples are of the dataset's training or test part."""
        return "train" if self.of == "train" else self.evidence.targets

    def label(self, row: int) -> Label:
        """Return the label of an embedded example: the class's name, its number, or the number of a regression."""
        return None if self.labels is None else label_of(self.labels[row], self.class_names)

    def facts(self) -> dict[str, Any]:
        """State what is embedded, from what, and how it was mapped."""
        return {
            "embedded": self.of,
            "targets": self.evidence.targets,
            "n_examples": len(self.indices),
            "explained_share": sum(row.explained_share for row in self.rows),
            "map": self.map_name,
            "seed": self.seed,
        }

    def as_dict(self) -> dict[str, Any]:
        """Return directions and examples ready for JSON; loadings are for `save_zarr`."""
        columns = (self.indices, self.x, self.y, self.scores, self.indices[self.neighbours], self.similarities)
        names = ("index", "x", "y", "scores", "neighbours", "similarities")
        examples = [
            {"label": self.label(row), **dict(zip(names, values, strict=True))}
            for row, values in enumerate(zip(*columns, strict=True))
        ]
        whole: dict[str, Any] = plain({self.name: self.rows, "examples": examples} | self.facts())
        return whole


def embed(
    asked: "Run | Evidence | Datamodels | str | os.PathLike[str]",
    *,
    targets: TargetsName = "test",
    of: EmbeddedName = "targets",
    columns: Sequence[int] | None = None,
    n_components: int = 10,
    n_neighbours: int = 10,
    seed: int = 0,
    catalog: dmdata.CatalogLike = None,
    space: SpaceName | None = None,
) -> Embedding:
    """Embed examples by the weights of datamodels: principal directions, nearest neighbours, and a map.

    Parameters
    ----------
    asked : Run, Evidence, Datamodels, path or name
        As for `dmpipeline.applications.evidence.find_evidence`.
    targets : {"test", "train"}
        Whose datamodels. Those of training examples weigh each on itself, too; that entry is large where the example is
        only remembered, and is kept.
    of : {"targets", "train"}
        Embed targets, by the training examples that matter to them, or training examples, by the targets that they
        matter to.
    columns : sequence of int, optional
        These targets alone: of a release, no others are read and paid.
    n_components : int
        Directions; there are fewer where there are not as many examples.
    n_neighbours : int
        Nearest examples found for each; fewer where there are not as many.
    seed : int
        Of the iteration that finds the directions, and of the map.
    catalog, space
        As for `find_evidence`.

    Returns
    -------
    embedding : Embedding

    Raises
    ------
    SpecError
        If an argument cannot be used, or there are not two examples whose weights differ.
    IncompleteRunError
        If the run has no datamodels yet.
    CatalogError, BudgetError, AccessError, SourceError
        If a release's weights are not found or cannot be read.

    Notes
    -----
    Directions are right singular vectors of the embeddings less their mean (principal component analysis). Memory holds
    less than four times the weights of the targets asked for, and 64 MiB of similarities at a time. The time of the
    neighbours grows with the square of the examples; a t-SNE of 1,437 took 17 seconds on one busy core.
    """
    for name, value in (("n_components", n_components), ("n_neighbours", n_neighbours)):
        if value < 1:
            raise SpecError(f"{name} is {value}; choose at least 1", field=name, value=value)
    evidence = find_evidence(asked, targets, catalog=catalog, space=space)
    vectors, indices, features = weight_vectors(evidence, of, columns)
    scores, loadings, shares = _principal_directions(vectors, n_components, seed)
    neighbours, similarities = cosine_neighbours(vectors, n_neighbours)
    labels, class_names = labels_of(evidence, of)
    labels = None if labels is None else labels[indices]
    x, y, map_name = _mapped(scores, seed)
    return Embedding(
        rows=_directions(indices, scores, shares, labels, class_names),
        evidence=evidence,
        of=of,
        indices=indices,
        features=features,
        scores=scores,
        loadings=loadings,
        x=x,
        y=y,
        map_name=map_name,
        neighbours=neighbours,
        similarities=similarities,
        labels=labels,
        class_names=class_names,
        seed=seed,
    )


def weight_vectors(
    evidence: Evidence, of: EmbeddedName, columns: Sequence[int] | None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return embeddings (n, n_features), the indices of their examples (n,), and what their entries stand for.

    Raises
    ------
    SpecError
        If there is no such kind of example, a column is asked for twice or is not there, or fewer than two examples
        are left.
    """
    if of not in get_args(EmbeddedName):
        raise SpecError(f"{of!r} cannot be embedded; choose targets or train", field="of", value=of)
    picked = None if columns is None else evidence.checked_once(columns)
    of_targets = np.arange(evidence.n_targets) if picked is None else np.array(picked, np.int64)
    of_train = np.arange(evidence.n_train)
    n_embedded = len(of_targets if of == "targets" else of_train)
    if n_embedded < 2 or not len(of_targets):
        raise SpecError(f"there is nothing to compare among {n_embedded} examples; choose two or more", field="columns")
    weight = evidence.datamodels(picked).weight
    if of == "train":
        return weight, of_train, of_targets
    return np.ascontiguousarray(weight.T), of_targets, of_train


def cosine_neighbours(
    vectors: npt.NDArray[np.float32], n_neighbours: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Find for each vector the others of largest cosine, comparing all with all, 64 MiB of similarities at a time.

    Parameters
    ----------
    vectors : array of float32, shape (n, n_features)
    n_neighbours : int
        Fewer are found where there are not as many.

    Returns
    -------
    places : array of int64, shape (n, n_neighbours)
        Rows of `vectors`, nearest first.
    similarities : array of float32, shape (n, n_neighbours)
        From -1 to 1; 0 to a vector of zeros and from it.
    """
    from sklearn import config_context  # slow to import
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=min(n_neighbours, len(vectors) - 1), metric="cosine", algorithm="brute")
    with config_context(working_memory=_WORKING_MIB):
        distances, places = search.fit(vectors).kneighbors()
    similarities = np.clip(1 - distances, -1, 1).astype(np.float32)
    # distances to zeros are 1 but for rounding
    has_none = ~np.any(vectors, axis=1, keepdims=True)
    similarities[has_none | has_none[places, 0]] = 0
    return places.astype(np.int64), similarities


def labels_of(evidence: Evidence, of: EmbeddedName) -> tuple[npt.NDArray[Any] | None, tuple[str, ...] | None]:
    """Return the label of every training example or target, and the names of classes.

    Returns
    -------
    labels : array of int64 classes or float32 numbers, shape (n,), or None
        None where no dataset is known, or an example has several, as the tokens of a sequence.
    class_names : tuple of str, or None
    """
    of_train, of_targets = evidence.labels()
    labels = of_train if of == "train" else of_targets
    if labels is None or labels.ndim != 1:
        return None, None
    return labels, evidence.dataset().class_names


def end_of(along: npt.NDArray[Any], end: EndName, size: int) -> npt.NDArray[np.intp]:
    """Return the places of the largest ("positive") or least values, the outermost first; equal ones in their order."""
    return np.argsort(-along if end == "positive" else along, kind="stable")[:size]


def _principal_directions(
    vectors: npt.NDArray[np.float32], n_components: int, seed: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """Return scores (n, k), loadings (k, n_features) and explained shares (k,), by falling share."""
    from scipy.sparse.linalg import svds  # slow to import

    centred = vectors - vectors.mean(0, dtype=np.float64).astype(np.float32)
    total = float(np.einsum("ij,ij->", centred, centred, dtype=np.float64))
    if not total > 0:
        raise SpecError(
            f"all {len(vectors)} examples have the same weights, so that no direction tells them apart; "
            "choose others, or fit datamodels of more models"
        )
    most = min(len(vectors) - 1, vectors.shape[1])
    k = min(n_components, most)
    if k < min(centred.shape):
        start = np.random.default_rng(seed).standard_normal(min(centred.shape)).astype(np.float32)
        left, sizes, right = svds(centred, k, v0=start)
    else:
        left, sizes, right = np.linalg.svd(centred, full_matrices=False)
    order = np.argsort(-sizes, kind="stable")[:k]
    left, sizes, right = left[:, order], sizes[order].astype(np.float64), right[order]
    signs = np.sign(right[np.arange(k), np.abs(right).argmax(1)])
    return (left * (sizes * signs)).astype(np.float32), right * signs[:, None], sizes**2 / total


def _mapped(
    scores: npt.NDArray[np.float32], seed: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], Literal["t-SNE", "PCA"]]:
    n, k = scores.shape
    perplexity = min(_PERPLEXITY, (n - 1) / 3)
    if n > MOST_ON_A_TSNE or k < 2 or perplexity < 2:
        y = scores[:, 1] if k > 1 else np.zeros(n, np.float32)
        return scores[:, 0].copy(), y.copy(), "PCA"
    places = _places(scores.tobytes(), scores.shape, perplexity, seed)
    return places[:, 0].copy(), places[:, 1].copy(), "t-SNE"


@functools.lru_cache(maxsize=8)  # seconds of work, which a page asks for again after a notebook has
def _places(scores: bytes, shape: tuple[int, int], perplexity: float, seed: int) -> npt.NDArray[np.float32]:
    """Lay out float32 scores of this shape by t-SNE, (n, 2)."""
    from sklearn.manifold import TSNE  # slow to import
    from threadpoolctl import threadpool_limits

    tsne = TSNE(perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed)
    # on a machine with other work, threads that wait for one another took four to six times as long
    with threadpool_limits(1, user_api="openmp"):
        places: npt.NDArray[np.float32] = tsne.fit_transform(np.frombuffer(scores, np.float32).reshape(shape))
    return places.astype(np.float32)


def _directions(
    indices: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float32],
    shares: npt.NDArray[np.float64],
    labels: npt.NDArray[Any] | None,
    class_names: Sequence[str] | None,
) -> tuple[Direction, ...]:
    rows = []
    size = min(_LISTED_ENDS, len(indices) // 2)
    for number, share in enumerate(shares.tolist()):
        ends: list[Any] = []
        for end in get_args(EndName):
            places = end_of(scores[:, number], end, size)
            ends.append(tuple(indices[places].tolist()))
            known = None if labels is None else tuple(label_of(label, class_names) for label in labels[places])
            ends.append(known)
        rows.append(Direction(number, share, *ends))
    return tuple(rows)
