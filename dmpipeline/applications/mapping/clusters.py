"""Clusters of examples that models learn from the same data: subpopulations, found from datamodels alone.

Examples are joined to those of nearest embedding, and the graph is cut where it hangs together least. How much of what
is found is chance is known where the models are at hand: datamodels of one half of them give clusters of their own,
those of the other half others, and what is there is found by both.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

import dmdata
from dmdata.reading.long_work import shows_count
from dmpipeline.applications.evidence import Evidence, find_evidence
from dmpipeline.applications.halves import run_to_halve, weights_of_halves
from dmpipeline.applications.mapping.embeddings import EmbeddedName, cosine_neighbours, labels_of, weight_vectors
from dmpipeline.errors import SpecError
from dmpipeline.fitting.datamodels import Datamodels, SpaceName
from dmpipeline.runs.store import Run
from dmpipeline.runs.targets import TargetsName
from dmpipeline.tables import Table

MOST_CLUSTERS = 20
"""As many are considered where their number is chosen here."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Examples that models learn from the same data.

    Attributes
    ----------
    cluster : int
        From 0, by falling size.
    size : int
    purity : float or None
        Share of the commonest label; None where labels are not known or not classes.
    commonest_label : str or int, or None
    stability : float or None
        Largest Jaccard overlap with a cluster of datamodels that were fitted to half of the models, a mean over both
        halves (Hennig, Cluster-wise assessment of cluster stability, 2007, who calls clusters from 0.75 valid and below
        0.5 dissolved); None where it was not measured.
    members : tuple of int
        Indices of the examples, rising.
    """

    cluster: int
    size: int
    purity: float | None
    commonest_label: str | int | None
    stability: float | None
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Clusters(Table[Cluster]):
    """Clusters; made by `clusters`.

    Attributes
    ----------
    rows : tuple of Cluster
    of : {"targets", "train"}
        What is clustered.
    targets : {"test", "train"}
        Whose datamodels.
    n_clusters : int
    chosen_by : {"eigengap", "you"}
        Who chose how many there are.
    ari : float or None
        Adjusted Rand index (Hubert and Arabie, Comparing partitions, 1985) between the clusters of both halves of the
        models: 1 where they agree, about 0 where they agree by chance; what a half puts into no cluster counts as
        alone. None where it was not measured.
    unclustered : tuple of int
        Examples without an embedding that is like another's, such as those whose outputs never vary.
    seed : int
    """

    of: EmbeddedName
    targets: TargetsName
    n_clusters: int
    chosen_by: Literal["eigengap", "you"]
    ari: float | None
    unclustered: tuple[int, ...]
    seed: int

    name: ClassVar[str] = "clusters"


@shows_count("fitting halves", "steps")
def clusters(
    asked: "Run | Evidence | Datamodels | str | os.PathLike[str]",
    *,
    n_clusters: int | None = None,
    targets: TargetsName = "test",
    of: EmbeddedName = "targets",
    columns: Sequence[int] | None = None,
    n_neighbours: int = 10,
    stability: bool | None = None,
    halves: Sequence[npt.NDArray[np.float32]] | None = None,
    seed: int = 0,
    catalog: dmdata.CatalogLike = None,
    space: SpaceName | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Clusters:
    """Find clusters of examples by the weights of their datamodels, and how stable they are.

    Parameters
    ----------
    asked : Run, Evidence, Datamodels, path or name
        As for `dmpipeline.applications.evidence.find_evidence`.
    n_clusters : int, optional
        Left out, it is where the eigenvalues of the graph's Laplacian have their largest gap, from 2 to 20.
    targets : {"test", "train"}
        Whose datamodels.
    of : {"targets", "train"}
        Cluster targets, or training examples, as `dmpipeline.applications.mapping.embeddings.embed` has it.
    columns : sequence of int, optional
        These targets alone: of a release, no others are read and paid.
    n_neighbours : int
        Nearest examples that each is joined to.
    stability : bool, optional
        Whether to fit datamodels to each half of the models and compare their clusters; left out, where a run of 40
        models or more is on disk. The second moments of the halves are kept in the run's folder `halves`, which may be
        removed.
    halves : sequence of two arrays of float32, shape (n_train, n_targets)
        Weights of such fits where they are at hand, as `weights_of_halves` returns them; nothing is fitted then.
    seed : int
        Of the spectral embedding and of k-means.
    catalog, space
        As for `find_evidence`.
    progress : callable, optional
        Called with (targets done, targets in total), over the fits of both halves.

    Returns
    -------
    clusters : Clusters

    Raises
    ------
    SpecError
        If an argument cannot be used, there are not as many examples or no two alike, or stability cannot be
        measured.
    IncompleteRunError
        If the run has no datamodels yet, or models are missing.
    CatalogError, BudgetError, AccessError, SourceError
        If a release's weights are not found or cannot be read.

    Notes
    -----
    Spectral clustering of Ng, Jordan and Weiss (On spectral clustering, 2001): k-means, of rows scaled to length 1, on
    the eigenvectors of the normalised Laplacian of a graph that joins each example to its nearest by cosine; negative
    cosines are no edge. For the eigengap see von Luxburg (A tutorial on spectral clustering, 2007, section 8.3).

    Memory holds less than four times the weights of the targets asked for, the graph's edges, and 64 MiB of
    similarities at a time. Stability costs two fits of those targets, each to half of the models.
    """
    for name, value, least in (("n_clusters", n_clusters, 2), ("n_neighbours", n_neighbours, 1)):
        if value is not None and value < least:
            raise SpecError(f"{name} is {value}; choose at least {least}", field=name, value=value)
    evidence = find_evidence(asked, targets, catalog=catalog, space=space)
    n_examples = evidence.n_train if of == "train" else evidence.n_targets if columns is None else len(columns)
    if n_clusters is not None and n_clusters > n_examples:
        raise SpecError(
            f"{n_examples} examples make no {n_clusters} clusters; choose at most as many as there are examples",
            field="n_clusters",
            value=n_clusters,
        )
    run = None if halves is not None else run_to_halve(evidence, stability)
    vectors, indices, _ = weight_vectors(evidence, of, columns)
    parts, n_found = _spectral_clusters(vectors, n_clusters, n_neighbours, seed)
    if len(_by_falling_size(parts)) < 2:
        raise SpecError(
            f"hardly any of {n_examples} examples have weights that are like another's, which leaves nothing to "
            "cluster; fit datamodels of more models"
        )
    ari, overlaps = None, None
    if run is not None:
        halves = weights_of_halves(run, evidence.targets, columns, progress)
    if halves is not None:
        of_halves = [weight if of == "train" else np.ascontiguousarray(weight.T) for weight in halves]
        ari, overlaps = _agreement(
            parts, [_spectral_clusters(half, n_found, n_neighbours, seed)[0] for half in of_halves]
        )
    rows = _described(parts, indices, *labels_of(evidence, of), overlaps)
    return Clusters(
        rows=rows,
        of=of,
        targets=evidence.targets,
        n_clusters=len(rows),
        chosen_by="eigengap" if n_clusters is None else "you",
        ari=ari,
        unclustered=tuple(indices[parts < 0].tolist()),
        seed=seed,
    )


def _described(
    parts: npt.NDArray[np.int64],
    indices: npt.NDArray[np.int64],
    labels: npt.NDArray[Any] | None,
    class_names: Sequence[str] | None,
    overlaps: Mapping[int, float] | None,
) -> tuple[Cluster, ...]:
    rows = []
    for number, part in enumerate(_by_falling_size(parts)):
        members = indices[parts == part]
        share: float | None = None
        commonest: str | int | None = None
        if labels is not None and labels.dtype.kind == "i":
            classes, counts = np.unique(labels[members], return_counts=True)
            share, number_of = float(counts.max() / len(members)), int(classes[counts.argmax()])
            commonest = number_of if class_names is None else class_names[number_of]
        stability = None if overlaps is None else overlaps[part]
        rows.append(Cluster(number, len(members), share, commonest, stability, tuple(members.tolist())))
    return tuple(rows)


def _spectral_clusters(
    vectors: npt.NDArray[np.float32], n_clusters: int | None, n_neighbours: int, seed: int
) -> tuple[npt.NDArray[np.int64], int]:
    """Return each example's cluster, -1 for those without an edge, and how many there are."""
    from scipy.sparse import csr_array, diags_array  # slow to import
    from sklearn.cluster import KMeans
    from sklearn.preprocessing import normalize

    places, similarities = cosine_neighbours(vectors, n_neighbours)
    n, k = places.shape
    edges = csr_array((np.maximum(similarities, 0).ravel(), places.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))
    edges = edges.astype(np.float64)
    edges = (edges + edges.T) / 2
    degrees = np.asarray(edges.sum(1)).ravel()
    joined = np.flatnonzero(degrees > 0)
    parts = np.full(n, -1, np.int64)
    if len(joined) < 2:
        return parts, 0
    wanted = None if n_clusters is None else min(n_clusters, len(joined))
    scale = diags_array(degrees[joined] ** -0.5)
    values, spectral = _largest_eigen(scale @ edges[joined][:, joined] @ scale, wanted, seed)
    chosen = wanted or _eigengap(values)
    parts[joined] = KMeans(chosen, n_init=10, random_state=seed).fit_predict(normalize(spectral[:, :chosen]))
    return parts, chosen


def _largest_eigen(
    affinity: Any, n_clusters: int | None, seed: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return eigenvalues and vectors of a sparse symmetric matrix, the largest first: as many as are looked at."""
    from scipy.sparse.linalg import eigsh  # slow to import

    n = affinity.shape[0]
    wanted = n_clusters or min(MOST_CLUSTERS + 1, n)
    if wanted < n - 1 and n > 2 * wanted + 1:
        start = np.random.default_rng(seed).standard_normal(n)
        values, vectors = eigsh(affinity, wanted, which="LA", v0=start)
    else:
        values, vectors = np.linalg.eigh(affinity.toarray())
    order = np.argsort(-values, kind="stable")[:wanted]
    return values[order], vectors[:, order]


def _eigengap(values: npt.NDArray[np.float64]) -> int:
    """Return after how many of the falling eigenvalues, from two, the gap is largest; of two, there is none to see."""
    gaps = -np.diff(values)[1:]
    return 2 + int(gaps.argmax()) if len(gaps) else 2


def _by_falling_size(parts: npt.NDArray[np.int64]) -> list[int]:
    """List the clusters, the largest first, among equals that of the first example."""
    found, first, sizes = np.unique(parts[parts >= 0], return_index=True, return_counts=True)
    chosen: list[int] = found[np.lexsort((first, -sizes))].tolist()
    return chosen


def _agreement(parts: npt.NDArray[np.int64], halves: Sequence[npt.NDArray[np.int64]]) -> tuple[float, dict[int, float]]:
    """Return the adjusted Rand index of the halves' clusters, and each cluster's mean overlap with its best matches."""
    from sklearn.metrics import adjusted_rand_score  # slow to import

    # what is in no cluster stands alone, in another one in each half
    first, second = (
        np.where(half < 0, len(half) * (nth + 1) + np.arange(len(half)), half) for nth, half in enumerate(halves)
    )
    ari = float(adjusted_rand_score(first, second)) if any((half >= 0).any() for half in halves) else 0.0
    overlaps = {}
    for part in _by_falling_size(parts):
        own = parts == part
        best = [max((_jaccard(own, half == other) for other in _by_falling_size(half)), default=0.0) for half in halves]
        overlaps[part] = float(np.mean(best))
    return ari, overlaps


def _jaccard(these: npt.NDArray[np.bool_], those: npt.NDArray[np.bool_]) -> float:
    return float((these & those).sum() / (these | those).sum())
