"""The page of datamodels alone, such as the release's: their weights, and the user's own files of the examples."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dmpipeline.applications.evidence import Evidence
from dmpipeline.applications.mapping.clusters import clusters
from dmpipeline.applications.mapping.embeddings import embed
from dmpipeline.applications.support import data_support
from dmpipeline.data.examples import Dataset
from dmpipeline.errors import SpecError
from dmpipeline.report.contents import Contents, add_map, add_weights, empty_facts
from dmpipeline.report.findings import PartName, add_cluster_rows, note_on_map
from dmpipeline.report.of_run import add_examples
from dmpipeline.report.page import checked_place, is_one_file, write_page
from dmpipeline.report.wording import BETTER, FOOTER, fit_rows, words_used

_OF_WEIGHTS: tuple[PartName, ...] = ("support", "map", "clusters")
_MOST_MAPPED = 20_000


def report_datamodels(
    evidence: Evidence,
    path: str | os.PathLike[str],
    *,
    columns: Sequence[int] | None = None,
    dataset: Dataset | None = None,
    parts: Sequence[PartName] | None = None,
) -> Path:
    """Write a page from weights alone.

    Parameters
    ----------
    evidence : Evidence
        Of datamodels that a catalog lists; their weights are read now, once.
    path : path
        As for `dmpipeline.report.page.write_page`.
    columns : sequence of int, optional
        These targets alone, in this order.
    dataset : Dataset, optional
        The examples, in the order of the weights' rows and of their columns: then the page has pictures and labels.
    parts : sequence of str, optional
        Of "support", "map" and "clusters"; the others are of runs.

    Returns
    -------
    path : pathlib.Path
        Of the HTML file.

    Raises
    ------
    SpecError
        If the dataset does not fit, or targets are not there.
    CatalogError, BudgetError, AccessError, SourceError
        If the weights are not found or cannot be read.

    Notes
    -----
    Memory holds the weights of the targets asked for, a few times over where they are mapped and clustered.
    """
    picked = list(range(evidence.n_targets)) if columns is None else evidence.checked_once(columns)
    if dataset is not None:
        _check_fits(dataset, evidence)
    chosen = _OF_WEIGHTS if parts is None else tuple(parts)
    if unknown := [part for part in chosen if part not in _OF_WEIGHTS]:
        raise SpecError(
            f"{unknown[0]} is found out about runs; of weights alone choose from {', '.join(_OF_WEIGHTS)}",
            field="parts",
        )
    path = checked_place(path)
    output = (evidence.output() or "outputs").removesuffix("s").replace("_", " ")
    held = evidence.held(None if columns is None else picked)
    datamodels = held.datamodels(picked)
    nouns = {"train": "training example", "targets": f"{_ADJECTIVE[evidence.targets]} example"}
    contents = Contents(
        empty_facts(
            title=f"Datamodels: {evidence.name}",
            summary=f"The weights of {len(picked):,} targets on {evidence.n_train:,} training examples. What models "
            "truly said was not read, so how well these datamodels foresee it is not on this page.",
            words_used=words_used(nouns=nouns, output=output, alpha=evidence.alpha, n_models=None),
            nouns=nouns,
            output=output,
            is_margin=output == "margin",
            better=BETTER.get(output),
            target_numbers=None if columns is None else picked,
            targets=evidence.targets,
            alpha=evidence.alpha,
            tables=[
                {
                    "heading": "Where they are from",
                    "rows": [["datamodels", evidence.name], ["targets", _named(columns)]],
                },
                {"heading": "The fit", "rows": fit_rows(datamodels, None, n_models=None)},
            ],
            footer=FOOTER,
        )
    )
    add_weights(contents, datamodels)
    if dataset is not None:
        add_examples(contents, dataset, evidence.targets, datamodels, picked=picked, in_one_file=is_one_file(path))
    if "support" in chosen and contents.facts["is_margin"]:
        sizes = [-1 if row.size is None else row.size for row in data_support(held, picked, of=evidence.targets)]
        contents.arrays["support"] = np.array(sizes, np.int32)
    if len(picked) <= _MOST_MAPPED:
        _add_maps(contents, held, picked, chosen)
    return write_page(path, contents)


_ADJECTIVE = {"test": "test", "train": "training"}


def _named(columns: Sequence[int] | None) -> str:
    if columns is None:
        return "all"
    first = ", ".join(map(str, columns[:20]))
    return f"{first} and {len(columns) - 20:,} more" if columns[20:] else first


def _check_fits(dataset: Dataset, evidence: Evidence) -> None:
    n_targets = dataset.n_train if evidence.targets == "train" else dataset.n_test
    if (dataset.n_train, n_targets) != (evidence.n_train, evidence.n_targets):
        raise SpecError(
            f"{dataset.name} has {dataset.n_train:,} training and {n_targets:,} {evidence.targets} examples, but "
            f"{evidence.name} has weights of {evidence.n_train:,} on {evidence.n_targets:,}; name the dataset that "
            "they were fitted with",
            field="dataset",
        )


def _add_maps(contents: Contents, held: Evidence, picked: list[int], chosen: tuple[str, ...]) -> None:
    try:
        if "map" in chosen:
            embedding = embed(held, targets=held.targets, columns=picked)
            add_map(contents, "targets", embedding.x, embedding.y, name=embedding.map_name, note=note_on_map(embedding))
        if "clusters" in chosen:
            add_cluster_rows(contents, clusters(held, targets=held.targets, columns=picked), picked)
    except SpecError as error:
        contents.facts["left_out"].append({"part": "map and clusters", "why": str(error), "next": None})
