"""Where a run's dataset and masks are after something was moved.

A run.yaml names them by absolute paths. Where nothing is at such a path any more, the place that they had relative to
the run when it was created is tried, so that a folder with both is moved as a whole. A dataset that was moved alone is
told by `--dataset`, and remembered if it is the same by its fingerprint.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dmpipeline.data.datasets import Dataset
from dmpipeline.errors import RunError, SpecError, explain_os_errors, quoted
from dmpipeline.models.settling import dataset_of_run
from dmpipeline.runs.directory import PROVENANCE_BYTE, as_json, claimed, write_beside
from dmpipeline.spec import RunSpec, dataset_path, masks_path, relative_places, split_dataset


def read_spec(path: Path, dataset: str | None = None) -> RunSpec:
    """Read the spec of the run at `path`, with its dataset and masks where they are now, as far as that is known.

    Parameters
    ----------
    path : Path
    dataset : str, optional
        Where the dataset is now; not looked into.

    Raises
    ------
    SpecError
        If its run.yaml was damaged, or there is no such dataset.
    """
    spec = RunSpec.read(path / "run.yaml")
    if dataset is not None:
        spec = _with_dataset(spec, dataset)
    places = {"dataset": dataset_path(spec), "masks": masks_path(spec)}
    if all(place is None or place.exists() for place in places.values()):
        return spec
    recorded = _relative_places(path)
    found = {
        field: (path / recorded[field]).resolve()
        for field, place in places.items()
        if place is not None and not place.exists() and isinstance(recorded.get(field), str)
    }
    updates = {field: str(place) for field, place in found.items() if place.exists()}
    return _with_places(spec, **updates)


def load_recorded(path: Path, spec: RunSpec, recorded: Mapping[str, Any]) -> Dataset:
    """Load the dataset of the run at `path`, and make sure that it is the one it was created with.

    Parameters
    ----------
    path : Path
    spec : RunSpec
    recorded : mapping
        What the run's provenance says of the dataset.

    Raises
    ------
    SpecError
        If it is not there, with how to continue, or cannot be used.
    RunError
        If it is another one by its fingerprint.
    """
    place = dataset_path(spec)
    if place is not None and not place.exists():
        raise SpecError(
            f"dataset {spec.dataset} of the run at {path} is not there; restore it, or if it was moved say where it is "
            f"now: `dmpipeline status {quoted(path)} --dataset PATH`, which is remembered",
            field="dataset",
            value=spec.dataset,
        )
    try:
        dataset = dataset_of_run(spec)
    except SpecError as error:
        raise SpecError(
            f"the dataset of the run at {path} is not as it was when the run was created: {error}",
            field="dataset",
            value=spec.dataset,
        ) from error
    if dataset.fingerprint != recorded["fingerprint"]:
        raise RunError(
            f"dataset {spec.dataset} has fingerprint {dataset.fingerprint[:12]}, but the run at {path} was created "
            f"with {recorded['fingerprint'][:12]}; restore the dataset, or create another run",
            path=path,
        )
    # a file that was renamed would give it another name than its artifacts have
    return replace(dataset, **{name: recorded[name] for name in ("name", "example_order") if name in recorded})


def _with_dataset(spec: RunSpec, dataset: str) -> RunSpec:
    """Put a dataset at another path, which may be given with or without its form before it."""
    form, _ = split_dataset(spec.dataset)
    if dataset == spec.dataset:
        return spec
    if dataset_path(spec) is None:
        raise SpecError(
            f"dataset {dataset} cannot take the place of {spec.dataset}, which has no path; leave out --dataset",
            field="dataset",
            value=dataset,
        )
    given_form, given_place = split_dataset(dataset)
    if given_form not in (None, form):
        raise SpecError(
            f"dataset {dataset} is {given_form}, but the run is of {spec.dataset}; give where that is now",
            field="dataset",
            value=dataset,
        )
    path = Path(given_place).expanduser().absolute()
    if not path.exists():
        raise SpecError(f"dataset {dataset} is not there; correct the path", field="dataset", value=dataset)
    return _with_places(spec, dataset=str(path.resolve()))


def remember(path: Path, spec: RunSpec) -> None:
    """Write where the dataset of the run at `path` is now, in one replacement of its run.yaml.

    Raises
    ------
    RunError
        If it cannot be written.
    """
    written = RunSpec.read(path / "run.yaml")
    if written.dataset != spec.dataset:
        write_beside(path / "run.yaml", written.model_copy(update={"dataset": spec.dataset}).to_yaml())
    with explain_os_errors(path), open(path / "lock", "a+b") as lock, claimed(lock, PROVENANCE_BYTE, wait=True):
        facts = json.loads((path / "provenance.json").read_text(encoding="utf-8"))
        if facts.get("places") == relative_places(path, spec) and facts.get("spec", {}).get("dataset") == spec.dataset:
            return
        facts["places"] = relative_places(path, spec)
        if "spec" in facts:
            facts["spec"]["dataset"] = spec.dataset
        write_beside(path / "provenance.json", as_json(facts))


def _with_places(spec: RunSpec, **places: str) -> RunSpec:
    form, _ = split_dataset(spec.dataset)
    if form and "dataset" in places:
        places["dataset"] = f"{form}:{places['dataset']}"
    return spec.model_copy(update=places) if places else spec


def _relative_places(path: Path) -> dict[str, Any]:
    """Read what is on record; nothing where the record is damaged, which those who need it say."""
    try:
        facts = json.loads((path / "provenance.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    recorded = facts.get("places") if isinstance(facts, dict) else None
    return recorded if isinstance(recorded, dict) else {}
