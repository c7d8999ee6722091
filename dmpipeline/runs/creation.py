"""Creating a run: what its spec leaves open is decided, and its files are put in place together, run.yaml last."""

import math
import os
from pathlib import Path
from typing import Any

import zarr
from zarr.codecs import BloscCodec

from dmpipeline.data.examples import Dataset
from dmpipeline.draws.masks import given_masks, masks_digest, subset_size
from dmpipeline.draws.subsets import subsets_on_record
from dmpipeline.errors import RunExistsError, explain_os_errors, quoted
from dmpipeline.models.outputs import check_outputs, dims_of, output_of
from dmpipeline.models.recipes import code_digest, find_recipe
from dmpipeline.models.settling import settle, settled_as
from dmpipeline.runs import directory
from dmpipeline.runs.directory import claimed, write_beside
from dmpipeline.runs.pinned import pin
from dmpipeline.runs.rows import DIGEST_BYTES
from dmpipeline.runs.stored import StoredRun
from dmpipeline.spec import MASK_LAWS, RunSpec, relative_places
from dmpipeline.training.scores import SCORES, baseline_facts
from dmpipeline.training.train import make_trainer

_LARGEST_CHUNK_BYTES = 2**24


def create(path: Path, spec: RunSpec, dataset: Dataset | None = None) -> None:
    """Create a run at `path`, unless one of the same spec is there.

    Parameters
    ----------
    path : pathlib.Path
        Absolute.
    spec : RunSpec
        With absolute paths.
    dataset : Dataset, optional
        What `settle` loads for such a spec, where it is at hand.

    Raises
    ------
    SpecError, RunExistsError, RunError
        As `Run.create`.
    """
    with explain_os_errors(path):
        if not (path / "run.yaml").exists():
            _put_in_place(path, *_settled(spec, dataset))
    # another process may have just created one there
    require_same(StoredRun.open(path), spec)


def require_creatable(path: Path, spec: RunSpec, dataset: Dataset | None = None) -> None:
    """Refuse what `create` would refuse; nothing is written."""
    with explain_os_errors(path):
        if (path / "run.yaml").exists():
            require_same(StoredRun.open(path), spec)
            return
        directory.require_vacant(path)
    _settled(spec, dataset)


def require_same(run: StoredRun, spec: RunSpec) -> None:
    """Refuse a run of another spec.

    Raises
    ------
    RunExistsError
    """
    spec = spec.with_version_of(run.spec)
    if run.spec.task and run.spec.inputs:  # decided when it was created
        n_train = run.provenance["dataset"]["n_train"]
        spec = settled_as(spec, run.spec.task, run.spec.inputs, n_train)
    there, wanted = (some.model_dump(mode="json") for some in (run.spec, spec))
    if differing := [name for name in wanted if there[name] != wanted[name]]:
        name = differing[0]
        more = f" --models {wanted[name]}" if name == "n_models" and wanted[name] > there[name] else ""
        raise RunExistsError(
            f"{run.path} holds a run with {name} {there[name]!r}, not {wanted[name]!r}; "
            f"choose another directory, or resume that run with `dmpipeline run {quoted(run.path)}{more}`",
            path=run.path,
        )


def _settled(spec: RunSpec, dataset: Dataset | None) -> tuple[RunSpec, Dataset]:
    """Decide what a spec leaves to its dataset, and make sure that its models can be trained."""
    spec, dataset = settle(spec, dataset)
    if spec.masks == "exact":
        subset_size(dataset.n_train, spec.alpha)
    if spec.masks not in MASK_LAWS:
        given_masks(spec, dataset.n_train)
    check_outputs(spec.arrays[1:], dataset)
    make_trainer(dataset, find_recipe(spec.recipe), seed=spec.seed)
    return spec, dataset


def _put_in_place(path: Path, spec: RunSpec, dataset: Dataset) -> None:
    """Put the files of a new run in place, unless another process has just done so.

    Raises
    ------
    RunExistsError
        If there is anything else but what a killed creation left.
    """
    directory.require_vacant(path)
    path.mkdir(parents=True, exist_ok=True)
    with open(path / "lock", "a+b") as lock, claimed(lock, 0, wait=True):
        if not (path / "run.yaml").exists():
            _create_files(path, spec, dataset)


def create_store(path: Path, spec: RunSpec, dataset: Dataset) -> zarr.Group:
    """Create a run's Zarr store, without a single chunk."""
    group = zarr.create_group(path, zarr_format=3)
    for name in spec.arrays:
        is_mask = name == "train_masks"
        dims = dims_of_array(name, dataset)
        block = min(spec.block_models, spec.n_rows)
        dtype = "bool" if is_mask else output_of(name).dtype
        examples, *rest = dims.values()
        bytes_of_example = block * math.prod(rest) * _itemsize(dtype)
        group.create_array(
            name,
            shape=(spec.n_rows, examples, *rest),
            dtype=dtype,
            chunks=(block, max(1, min(examples, _LARGEST_CHUNK_BYTES // bytes_of_example)), *rest),
            compressors=BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle" if is_mask else "shuffle"),
            # what was never written is not mistaken for a model's output
            fill_value=float("nan") if dtype.startswith("float") else -1 if dtype.startswith("int") else False,
            dimension_names=("model", *dims),
        )
    block = min(spec.block_models, spec.n_rows)
    for name, dim, n, chunk in (
        ("block_digests", "block", len(spec.blocks), 1),
        ("row_digests", "model", spec.n_rows, block),
    ):
        group.create_array(
            name,
            shape=(n, DIGEST_BYTES),
            dtype="uint8",
            chunks=(chunk, DIGEST_BYTES),
            compressors=None,
            fill_value=0,
            dimension_names=(dim, "byte"),
        )
    group.create_array(
        "model_scores",
        shape=(spec.n_rows, len(SCORES)),
        dtype="float64",
        chunks=(block, len(SCORES)),
        compressors=None,
        fill_value=float("nan"),
        dimension_names=("model", "score"),
        attributes={"scores": list(SCORES), "baseline": baseline_facts(dataset, spec)},
    )
    return group


def dims_of_array(name: str, dataset: Dataset) -> dict[str, int]:
    """Name and measure the dimensions of one of a run's arrays but the first, which is models."""
    return {"train_example": dataset.n_train} if name == "train_masks" else dims_of(name, dataset)


def provenance(path: Path, spec: RunSpec, dataset: Dataset) -> dict[str, Any]:
    """State how the run at `path` comes about."""
    return {
        "created": directory.now(),
        **pin(spec),
        "versions": directory.versions(),
        "machine": directory.machine("cpu"),
        "dataset": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "n_train": dataset.n_train,
            "n_test": dataset.n_test,
            "n_classes": dataset.n_classes,
            "example_order": dataset.example_order,
            "scaling": dataset.scaling and dataset.scaling.facts(),
        },
        "code": code_digest(find_recipe(spec.recipe)),
        "masks": masks_digest(spec),
        "subsets": subsets_on_record(spec, dataset.n_train),
        "places": relative_places(path, spec),
        "ways": {},
        "sessions": [],
    }


def _create_files(path: Path, spec: RunSpec, dataset: Dataset) -> None:
    """Put a run's files in place, run.yaml last; the caller holds the lock."""
    staging = directory.staging_folder(path, "creating")
    create_store(staging / "store.zarr", spec, dataset)
    write_beside(staging / "provenance.json", directory.as_json(provenance(path, spec, dataset)))
    write_beside(staging / "run.yaml", spec.to_yaml())
    if (path / "store.zarr").exists():
        os.rename(path / "store.zarr", staging / "left-over.zarr")
    for name in ("store.zarr", "provenance.json", "run.yaml"):
        os.rename(staging / name, path / name)
    directory.remove_staging(path)


def _itemsize(dtype: str) -> int:
    return {"bool": 1, "float16": 2}.get(dtype, 4)
