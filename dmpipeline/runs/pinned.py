"""The spec that a run's rows were made by, kept apart from run.yaml, which people edit.

It lies in the provenance as it was written, and is compared by what it means: a hyperparameter written out that was a
default before is not a difference. Where dataset and masks lie on the disk does not count; what they hold is known by
digests of their own.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmpipeline.errors import SpecChangedError, SpecError, quoted
from dmpipeline.models.recipes import find_recipe
from dmpipeline.spec import MASK_LAWS, RunSpec


def pin(spec: RunSpec) -> dict[str, Any]:
    """Return what the provenance keeps of a spec: the `spec` itself and its `spec_digest`."""
    return {"spec": spec.facts(), "spec_digest": spec_digest(spec)}


def spec_digest(spec: RunSpec) -> str:
    """Digest what a spec means; SHA-256, in hexadecimal."""
    return hashlib.sha256(json.dumps(_meaning(spec), sort_keys=True).encode()).hexdigest()


def require_pinned(path: Path, spec: RunSpec, provenance: Mapping[str, Any]) -> None:
    """Refuse a run.yaml that differs from what its rows were made by.

    Parameters
    ----------
    path : pathlib.Path
        The run's directory.
    spec : RunSpec
        What its run.yaml says now.
    provenance : mapping
        Without a pinned spec, as in runs made before specs were pinned, nothing is refused.

    Raises
    ------
    SpecChangedError
        With what differs, and how to continue.
    """
    if "spec" not in provenance:
        return
    try:
        made_by = RunSpec(**provenance["spec"])
    except (SpecError, TypeError):
        return  # a later version's: it says itself what it cannot read
    if made_by == spec or (differing := differences(made_by, spec)) == {}:
        return
    raise SpecChangedError(_explanation(path, made_by, spec, differing), path=path, differences=differing)


def differences(made_by: RunSpec, spec: RunSpec) -> dict[str, tuple[Any, Any]]:
    """List what differs in meaning, by field, as (what rows were made by, what the spec says)."""
    before, after = _flat(_meaning(made_by)), _flat(_meaning(spec))
    names = dict.fromkeys([*before, *after])
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def _meaning(spec: RunSpec) -> dict[str, Any]:
    facts = spec.facts()
    with contextlib.suppress(SpecError):  # what is no recipe's differs as it stands
        facts["recipe"] = find_recipe(spec.recipe).model_dump(mode="json")
    del facts["dataset"]
    if spec.masks not in MASK_LAWS:
        facts["masks"] = "given"
    return facts


def _flat(facts: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        flat |= _flat(value, f"{within}{name}.") if isinstance(value, dict) and value else {within + name: value}
    return flat


def _explanation(path: Path, made_by: RunSpec, spec: RunSpec, differing: Mapping[str, tuple[Any, Any]]) -> str:
    each = (f"{name} is {_shown(now)}, rows were made by {_shown(then)}" for name, (then, now) in differing.items())
    said = ", ".join(each)
    remedies = ["put back what it said"]
    folder, file = quoted(path), quoted(path / "run.yaml")
    if spec.n_models > made_by.n_models:
        extend = f"dmpipeline run {folder} --models {spec.n_models}"
        remedies.append(f"to train more models, put it back and extend: `{extend}`")
    if set(differing) != {"n_models"}:
        remedies.append(f"to train by other settings, make a run of its own: `dmpipeline init OTHER --spec {file}`")
    return f"{path / 'run.yaml'} was edited: {said}; {'; or '.join(remedies)}"


def _shown(value: Any) -> str:
    return "not set" if value is None else json.dumps(value)
