"""A run's arrays and datamodels, and the run itself, as entries of a catalog."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zarr

from dmdata.catalog import Alpha, ArraySchema, Basis, Catalog, DatasetEntry, Rows, SourceEntry, StoredArray
from dmdata.errors import FormatError
from dmdata.formats import pt_layouts
from dmpipeline.errors import explain_os_errors
from dmpipeline.examples import Dataset
from dmpipeline.spec import GIVEN, MASK_LAWS, RunSpec
from dmpipeline.subsets import SubsetSizes


def catalog_of(
    spec: RunSpec, dataset: Dataset, stored: Mapping[str, StoredArray], *, alpha_name: str, sizes: SubsetSizes | None
) -> Catalog:
    """Catalog artifacts of a run under `dataset/alpha_name/name`; their keys start at the catalog's folder.

    Given masks have no alpha; a note says how large they are, where that is known.
    """
    rows, is_drawn = spec.rows, spec.masks in MASK_LAWS
    note = f"{GIVEN} subsets of {sizes.in_words}" if sizes and not is_drawn else None
    alpha = Alpha(
        alpha=spec.alpha if is_drawn else None,
        note=note,
        rows=Rows(
            fit=(rows.models.start, rows.models.stop),
            evaluation=(rows.held_out.start, rows.held_out.stop),
            n_retrainings=spec.held_out.n_retrainings,
        ),
        arrays=dict(stored),
        basis=_measured("alpha", "rows") if is_drawn else _measured("rows"),
    )
    entry = DatasetEntry(
        title=dataset.name,
        n_train=dataset.n_train,
        n_test=dataset.n_test,
        n_classes=dataset.n_classes,
        example_order=dataset.example_order,
        alphas={alpha_name: alpha},
        basis=_measured("title", "n_train", "n_test", "n_classes", "example_order"),
    )
    return Catalog(
        version=1,
        title=f"{dataset.name}, {spec.recipe.name}@{spec.recipe.version}, seed {spec.seed}, trained by dmpipeline",
        source=SourceEntry(url=".", basis=_measured("url", "requester_pays")),
        datasets={dataset.name: entry},
    )


def describe_array(
    array: "zarr.Array[Any]", *, key: str, form: str, n_bytes: int | None = None, sha256: str | None = None
) -> StoredArray:
    """Describe an array for a catalog; without `n_bytes`, those of its elements are meant."""
    return StoredArray.model_validate(
        {
            "key": key,
            "format": form,
            "shape": array.shape,
            "dtype": str(array.dtype),
            "dims": getattr(array.metadata, "dimension_names", None),
            "n_bytes": array.nbytes if n_bytes is None else n_bytes,
            "sha256": sha256,
            "basis": _measured("key", "format", "shape", "dtype", "dims", "n_bytes"),
        }
    )


def describe_datamodels(path: Path, *, key: str, sha256: str | None = None) -> StoredArray:
    """Describe a `.pt` of test datamodels for a catalog, from the file's own directory.

    Raises
    ------
    dmdata.errors.FormatError
        If the file is damaged or holds anything but tensors.
    RunError
        If it cannot be read.
    """
    with explain_os_errors(path, "read"), open(path, "rb") as file:
        n_bytes = os.fstat(file.fileno()).st_size

        def read_at(start: int, stop: int) -> bytes:
            file.seek(start)
            return file.read(stop - start)

        layouts = pt_layouts(read_at, object_bytes=n_bytes, url=str(path))
    shapes = {name: layout.shape for name, layout in layouts.items()}
    n_train, n_test = (*shapes.get("weight", ()), 0, 0)[:2]
    of_models = {name for name in set(shapes) & {"fitted_masks"} if len(shapes[name]) == 1}
    of_targets = set(shapes) - {"weight"} - of_models
    expected: dict[str, tuple[int, ...]] = {"weight": (n_train, n_test)} | dict.fromkeys(of_targets, (n_test,))
    expected |= {name: shapes[name] for name in of_models}
    if not of_targets >= {"bias", "lam"} or shapes != expected:
        raise FormatError(
            f"{path} holds {shapes}; datamodels are weight (n_train, n_test), bias and lam (n_test,), and what else "
            "there is of each target",
            url=str(path),
        )
    dims = {"weight": ("train_example", "test_example")} | dict.fromkeys(of_targets, ("test_example",))
    dims |= dict.fromkeys(of_models, ("fitted_model",))
    members = {
        name: ArraySchema(shape=layout.shape, dtype=str(layout.dtype), dims=dims[name])
        for name, layout in layouts.items()
    }
    basis = _measured("key", "format", "n_bytes")
    return StoredArray(key=key, format="pt", n_bytes=n_bytes, sha256=sha256, members=members, basis=basis)


def _measured(*facts: str) -> dict[str, Basis]:
    return dict.fromkeys(facts, Basis.MEASURED)
