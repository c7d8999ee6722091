"""What is shown of a dataset when a run is created: the task, classes with their counts, and how inputs are taken.

The task and the classes are inferred, so they are always shown: a user who sees a class that is none, or 442 classes
where amounts were meant, can correct that before anything is trained.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dmdata.cli.tables import headed_table, plain_table
from dmpipeline.data.examples import Dataset
from dmpipeline.spec import RunSpec

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN_CLASSES = 20
_LISTED_NAMES = 5


def dataset_facts(dataset: Dataset, spec: RunSpec) -> dict[str, Any]:
    """State what a run learns of which examples, as JSON has it.

    Parameters
    ----------
    dataset : Dataset
    spec : RunSpec
        Of a run, with what was decided when it was created.

    Returns
    -------
    facts : dict
        `dataset`, `task`, `inputs`, `n_train`, `n_test`, `n_features`; `recipe`, as settled; `classes`, a list of
        `name`, `n_train` and `n_test`, of a classification; `labels`, a mapping of `mean`, `std`, `least` and `largest`
        over the training labels, of a regression; `n_tokens` and `n_positions` of tokens; and `warnings`, a list of
        texts.
    """
    facts: dict[str, Any] = {
        "dataset": dataset.name,
        "task": dataset.task,
        "inputs": spec.inputs or dataset.inputs_form,
        "n_train": dataset.n_train,
        "n_test": dataset.n_test,
        "n_features": dataset.n_features,
        "recipe": spec.recipe.model_dump(mode="json"),
    }
    if dataset.task == "classification":
        facts["classes"] = _class_counts(dataset)
    elif dataset.task == "regression":
        labels = np.asarray(dataset.train_labels, np.float64)
        facts["labels"] = {
            "mean": float(labels.mean()),
            "std": float(labels.std()),
            "least": float(labels.min()),
            "largest": float(labels.max()),
        }
    else:
        facts |= {"n_tokens": dataset.n_classes, "n_positions": dataset.train_labels.shape[1]}
    return facts | {"warnings": dataset_warnings(dataset)}


def dataset_warnings(dataset: Dataset) -> list[str]:
    """List what is odd about a dataset's classes, a sentence each."""
    if dataset.task != "classification":
        return []
    classes = _class_counts(dataset)
    unseen = [its["name"] for its in classes if its["n_test"] and not its["n_train"]]
    empty = [its["name"] for its in classes if not its["n_test"] and not its["n_train"]]
    untested = [its["name"] for its in classes if its["n_train"] and not its["n_test"]]
    warnings = []
    if unseen:
        n_targets = sum(its["n_test"] for its in classes if not its["n_train"])
        warnings.append(
            f"{_some(unseen)} in test but not in train: no model can learn that, and datamodels of those {n_targets:,} "
            "test examples measure nothing; shuffle before splitting, or leave them out"
        )
    if untested:
        warnings.append(f"{_some(untested)} in train but not in test: no datamodel is of such an example")
    if empty:
        warnings.append(f"{_some(empty)} in neither train nor test")
    return warnings


def dataset_tables(facts: Mapping[str, Any]) -> "list[Table]":
    """Show `dataset_facts` to people: what is learned, a line each, and the classes with their counts."""
    table = plain_table()
    table.add_row("dataset", f"{facts['dataset']}: {facts['n_train']:,} train, {facts['n_test']:,} test examples")
    table.add_row("task", _task_in_words(facts))
    table.add_row("inputs", _inputs_in_words(facts))
    named = {name: value for name, value in facts["recipe"].items() if name not in ("name", "version")}
    if named:
        settings = ", ".join(f"{name} {value}" for name, value in named.items())
        table.add_row("recipe", f"{facts['recipe']['name']}: {settings}")
    tables = [table]
    if classes := facts.get("classes"):
        counts = headed_table("class", "train", "test")
        for its in classes[:_SHOWN_CLASSES]:
            counts.add_row(its["name"], f"{its['n_train']:,}", f"{its['n_test']:,}")
        if len(classes) > _SHOWN_CLASSES:
            rest = classes[_SHOWN_CLASSES:]
            trained, tested = (sum(its[part] for its in rest) for part in ("n_train", "n_test"))
            counts.add_row(f"{len(rest):,} more", f"{trained:,}", f"{tested:,}")
        tables.append(counts)
    return tables


def _class_counts(dataset: Dataset) -> list[dict[str, Any]]:
    parts = (dataset.train_labels, dataset.test_labels)
    counts = [np.bincount(labels, minlength=dataset.n_classes).tolist() for labels in parts]
    return [
        {"name": dataset.name_of(label), "n_train": n_train, "n_test": n_test}
        for label, (n_train, n_test) in enumerate(zip(*counts, strict=True))
    ]


def _task_in_words(facts: Mapping[str, Any]) -> str:
    if facts["task"] == "classification":
        return f"classification, {len(facts['classes']):,} classes"
    if facts["task"] == "regression":
        its = facts["labels"]
        return (
            f"regression, of labels from {its['least']:.4g} to {its['largest']:.4g}, mean {its['mean']:.4g}; "
            "scaled for training, outputs in their units"
        )
    return f"tokens, {facts['n_tokens']:,} to choose from at each of {facts['n_positions']:,} positions"


def _inputs_in_words(facts: Mapping[str, Any]) -> str:
    n_features = f"{facts['n_features']:,} {'positions' if facts['inputs'] == 'tokens' else 'values'} an example"
    how = {
        "standardised": f"standardised by mean and deviation of all {facts['n_train']:,} training examples",
        "as-is": "as they are",
        "tokens": "tokens",
    }[facts["inputs"]]
    return f"{n_features}, {how}"


def _some(names: list[str]) -> str:
    listed = ", ".join(repr(name) for name in names[:_LISTED_NAMES]) + (", ..." if len(names) > _LISTED_NAMES else "")
    return f"class {listed} is" if len(names) == 1 else f"{len(names):,} classes, {listed}, are"
