"""What applications find out about a whole run, as facts and arrays of a page; each part can be left out."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from dmpipeline.applications.evidence import Evidence
from dmpipeline.applications.halves import run_to_halve, weights_of_halves
from dmpipeline.applications.inspecting.suspects import suspects
from dmpipeline.applications.leakage import duplicates, leakage
from dmpipeline.applications.mapping.clusters import Clusters, clusters
from dmpipeline.applications.mapping.embeddings import EmbeddedName, Embedding, embed
from dmpipeline.applications.retraining import kept_sets
from dmpipeline.applications.support import data_support
from dmpipeline.data.examples import Dataset
from dmpipeline.errors import SpecError
from dmpipeline.report.contents import Contents, add_map
from dmpipeline.runs.store import Run
from dmpipeline.runs.targets import TargetsName
from dmpipeline.tables import plain

PartName = Literal["stability", "support", "map", "clusters", "leakage", "duplicates", "suspects"]
"""What a page has besides weights and scores, and may leave out."""

PARTS: tuple[PartName, ...] = get_args(PartName)

_TAKES = {"leakage": "copies", "duplicates": "copies", "stability": "fits", "clusters": "fits"}
_MOST_PAIRS = 10**8
_MOST_ROWS = 200
_MOST_PAIRS_SHOWN = 50
_NEXT = {
    "leakage": "dmpipeline leakage {run}",
    "duplicates": "dmpipeline leakage {run} --duplicates",
    "suspects": "dmpipeline leakage {run} --suspects",
    "clusters": "dmpipeline clusters {run}",
    "map": "dmpipeline embed {run}",
    "support": "dmpipeline support {run}",
    "stability": "dmpipeline explain {run} TARGET",
}

Progress = Callable[[str, int, int], None]


def default_parts(dataset: Dataset, n_targets: int) -> tuple[PartName, ...]:
    """Return the parts that a page has unless told otherwise: all, but what would take more than minutes."""
    n_pairs = {
        "copies": dataset.n_train * (dataset.n_test + min(5_000, dataset.n_train)),
        "fits": dataset.n_train * n_targets,
    }
    return tuple(part for part in PARTS if n_pairs.get(_TAKES.get(part, ""), 0) <= _MOST_PAIRS)


def checked_parts(parts: Sequence[str]) -> tuple[PartName, ...]:
    """Return parts of a page in their order; SpecError for one that there is not."""
    for part in parts:
        if part not in PARTS:
            raise SpecError(f"{part!r} is not a part of the page; choose from {', '.join(PARTS)}", field="parts")
    return tuple(part for part in PARTS if part in parts)


def add_findings(
    contents: Contents, evidence: Evidence, parts: tuple[PartName, ...], progress: Progress | None
) -> None:
    """Add parts, and of each that cannot be had why, and which command says more."""
    run = evidence.require_run("what is found out about all examples is")
    command, options = contents.facts["run"], contents.facts["options"]
    report = progress or (lambda *_: None)
    adders: dict[PartName, Callable[[], None]] = {
        "stability": lambda: None,  # it came with the weights
        "support": lambda: _add_support(contents, evidence),
        "map": lambda: _add_maps(contents, evidence, report),
        "clusters": lambda: _add_clusters(contents, evidence),
        "leakage": lambda: _add_leakage(contents, run, lambda *n: report("leakage", *n)),
        "duplicates": lambda: _add_duplicates(contents, run, lambda *n: report("duplicates", *n)),
        "suspects": lambda: _add_suspects(contents, run, lambda *n: report("suspects", *n)),
    }
    for part in PARTS:
        is_of_test = part in ("leakage", "duplicates")
        if (part == "support" and not contents.facts["is_margin"]) or (is_of_test and evidence.targets == "train"):
            continue
        why = "left out of this page; to see it run"
        if part in parts:
            try:
                adders[part]()
            except SpecError as error:
                contents.facts["left_out"].append({"part": part, "why": str(error), "next": None})
            continue
        contents.facts["left_out"].append({"part": part, "why": why, "next": _NEXT[part].format(run=command) + options})


def weights_by_halves(
    evidence: Evidence, parts: tuple[PartName, ...], progress: Progress | None
) -> list[np.ndarray[Any, Any]] | None:
    """Fit datamodels to both halves of a run's models, where they are enough and anything wants them."""
    if not {"stability", "clusters"} & set(parts):
        return None
    run = run_to_halve(evidence, None)
    if run is None:
        return None
    own = None if progress is None else lambda done, total: progress("halves", done, total)
    return weights_of_halves(run, evidence.targets, progress=own)


def retrained_sets(
    run: Run, weight: npt.NDArray[np.float32], targets: TargetsName, level: float
) -> dict[str, list[dict[str, Any]]]:
    """Return what models said that were trained without exactly a target's first k helpers or harmers.

    Parameters
    ----------
    run : Run
    weight : array of float32, shape (n_train, n_targets)
    targets : {"test", "train"}
    level : float
        Of the intervals of their means.

    Returns
    -------
    dots : dict of str to list of dict
        By target, by rising `k`: `kind` "helper" or "harmer", or "full" of no removals; `mean`, `low`, `high` and `n`.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    full: npt.NDArray[np.float64] | None = None
    for each, retrained in kept_sets(run):
        removed = np.flatnonzero(~each.is_in)
        outputs = retrained.of(targets)
        if each.relabelled:
            continue
        if not len(removed):
            full = outputs
            continue
        own = weight[removed]
        for kind, sign in (("helper", 1), ("harmer", -1)):
            least = (sign * own).min(axis=0)
            # removing exactly the first k of a kind leaves none in that is as strong
            of_kind = np.flatnonzero(least > 0)
            n_as_strong = np.array([(sign * weight[:, t] >= least[t]).sum() for t in of_kind])
            for t in of_kind[n_as_strong == len(removed)].tolist():
                dot = _dot(outputs[:, t], level) | {"k": len(removed), "kind": kind}
                found.setdefault(str(t), []).append(dot)
    if full is not None:
        for t in list(found):
            found[t].append(_dot(full[:, int(t)], level) | {"k": 0, "kind": "full"})
    return {t: sorted(dots, key=lambda dot: dot["k"]) for t, dots in sorted(found.items())}


def _dot(outputs: np.ndarray[Any, Any], level: float) -> dict[str, Any]:
    """Return the mean of some retrainings' outputs, and its interval by Student's t."""
    n, mean = len(outputs), float(outputs.mean())
    if n < 2:
        return {"mean": mean, "low": None, "high": None, "n": n}
    from scipy import stats  # slow to import

    reach = float(stats.t.ppf((1 + level) / 2, n - 1) * outputs.std(ddof=1) / math.sqrt(n))
    return {"mean": mean, "low": mean - reach, "high": mean + reach, "n": n}


def _add_support(contents: Contents, evidence: Evidence) -> None:
    found = data_support(evidence, of=evidence.targets)
    sizes = [-1 if row.size is None else row.size for row in found]
    contents.arrays["support"] = np.array(sizes, np.int32)


def _add_maps(contents: Contents, evidence: Evidence, report: Progress) -> None:
    for nth, (part, of) in enumerate(_mapped(evidence)):
        embedding = embed(evidence, targets=evidence.targets, of=of)
        note = note_on_map(embedding)
        add_map(contents, part, embedding.x, embedding.y, name=embedding.map_name, note=note)
        report("map", nth + 1, len(list(_mapped(evidence))))


def _mapped(evidence: Evidence) -> Iterator[tuple[str, EmbeddedName]]:
    yield "targets", "targets"
    if evidence.targets == "test":
        yield "train", "train"


def _add_clusters(contents: Contents, evidence: Evidence) -> None:
    halves = contents.halves
    own = False if halves is None else None
    found = clusters(evidence, targets=evidence.targets, halves=halves, stability=own)
    add_cluster_rows(contents, found, range(evidence.n_targets))


def add_cluster_rows(contents: Contents, found: Clusters, targets: Sequence[int]) -> None:
    """Add clusters of targets, which the page shows in this order."""
    place = {target: nth for nth, target in enumerate(targets)}
    number = np.full(len(targets), -1, np.int16)
    rows = []
    for row in found:
        number[[place[target] for target in row.members]] = row.cluster
        facts = {"cluster": row.cluster, "size": row.size, "purity": row.purity, "label": row.commonest_label}
        rows.append(facts | {"stability": row.stability})
    contents.arrays["cluster_targets"] = number
    contents.facts["clusters"] = plain({"rows": rows, "ari": found.ari})


def note_on_map(embedding: Embedding) -> str:
    """State what distances on a map mean."""
    if embedding.map_name == "t-SNE":
        return "Distances on it mean little; neighbours mean something."
    return "Its axes are the two directions of largest variance."


def _add_leakage(contents: Contents, run: Run, progress: Callable[[int, int], None]) -> None:
    found = leakage(run, progress=progress)
    said = found.in_words()
    said = "None" + said.removeprefix("0") if said.startswith("0 ") else said
    rows = plain(found.rows[:_MOST_PAIRS_SHOWN])
    more = _and_more(len(found), f"dmpipeline leakage {contents.facts['run']}")
    contents.facts["leakage"] = {"rows": rows, "sentence": f"{said}.{more}"}


def _add_duplicates(contents: Contents, run: Run, progress: Callable[[int, int], None]) -> None:
    found = duplicates(run, progress=progress)
    said = found.in_words()
    rows = [{"first": row.train, "second": row.train2} | plain(row) for row in found.rows[:_MOST_PAIRS_SHOWN]]
    more = _and_more(len(found), f"dmpipeline leakage {contents.facts['run']} --duplicates")
    contents.facts["duplicates"] = {"rows": rows, "sentence": f"{said[0].upper()}{said[1:]}.{more}"}


def _and_more(n_pairs: int, command: str) -> str:
    n_more = n_pairs - _MOST_PAIRS_SHOWN
    return "" if n_more <= 0 else f" Below are the first {_MOST_PAIRS_SHOWN} pairs; {n_more:,} more: {command}"


def _add_suspects(contents: Contents, run: Run, progress: Callable[[int, int], None]) -> None:
    found = suspects(run, top=_MOST_ROWS, progress=progress)
    dataset = run.dataset()

    def named(label: Any) -> Any:
        return label if label is None or dataset.is_regression else dataset.name_of(label)

    rows = [plain(row) | {"label": named(row.label), "suggested": named(row.suggested)} for row in found]
    contents.facts["suspects"] = {"rows": rows}
