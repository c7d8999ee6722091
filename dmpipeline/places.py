"""Which files outside its directory a run needs: its dataset, unless that has no path, and masks that were given."""

import os
from pathlib import Path

from dmpipeline.spec import MASK_LAWS, RunSpec, split_dataset


def relative_places(path: Path, spec: RunSpec) -> dict[str, str]:
    """State for the provenance of the run at `path` where its dataset and masks are, seen from there."""
    places = {"dataset": dataset_path(spec), "masks": masks_path(spec)}
    return {name: os.path.relpath(place, path.resolve()) for name, place in places.items() if place is not None}


def dataset_path(spec: RunSpec) -> Path | None:
    """Tell the path of a spec's dataset; None where it has none, as digits."""
    form, place = split_dataset(spec.dataset)
    is_path = bool(place) and (form is not None or os.path.isabs(place))
    return Path(place) if is_path else None


def masks_path(spec: RunSpec) -> Path | None:
    """Tell the path of the masks that were given; None where they are drawn."""
    return None if spec.masks in MASK_LAWS else Path(spec.masks)
