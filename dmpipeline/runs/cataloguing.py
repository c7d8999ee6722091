"""A run's arrays and datamodels, and the run itself, as entries of a catalog."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zarr

from dmdata.catalog.entries import Alpha, ArraySchema, Basis, Catalog, DatasetEntry, Rows, SourceEntry, StoredArray
from dmdata.errors import FormatError
from dmdata.layout.formats import pt_layouts
from dmpipeline.data.examples import Dataset
from dmpipeline.draws.subsets import SubsetSizes
from dmpipeline.errors import explain_os_errors
from dmpipeline.spec import GIVEN, MASK_LAWS, RunSpec

DATAMODELS_TARGETS = {"test_datamodels": "test_example", "train_datamodels": "train_target"}
"""What catalogs call datamodels, and the dimension of what these predict, both as the release has it."""


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


def datamodels_of_train(path: Path) -> Path:
    """Return where datamodels of training examples belong, from where those of test examples do."""
    return path.with_name(path.name.replace("test_", "train_", 1))


def describe_fitted(folder: Path, path: Path, *, only_sound: bool) -> dict[str, StoredArray]:
    """Describe the datamodels of a run that are there, by the names that catalogs give them.

    Parameters
    ----------
    folder, path : pathlib.Path
        The run's directory, where keys start, and where datamodels of test examples belong.
    only_sound : bool
        Leave out a file that is damaged, which is an error otherwise.

    Raises
    ------
    dmdata.errors.FormatError, RunError
        As `describe_datamodels`.
    """
    stored = {}
    for name, file in {"test_datamodels": path, "train_datamodels": datamodels_of_train(path)}.items():
        if file.exists():
            try:
                stored[name] = describe_datamodels(file, name=name, key=file.relative_to(folder).as_posix())
            except FormatError:
                if not only_sound:
                    raise
    return stored


def describe_datamodels(path: Path, *, key: str, name: str = "test_datamodels", note: str | None = None) -> StoredArray:
    """Describe a `.pt` of datamodels for a catalog, from the file's own directory.

    Parameters
    ----------
    path : pathlib.Path
    key : str
        Its place below the catalog's folder.
    name : {"test_datamodels", "train_datamodels"}
        What the catalog is to call them, which says what they predict.
    note : str, optional

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
    n_train, n_targets = (*shapes.get("weight", ()), 0, 0)[:2]
    of_models = {tensor for tensor in set(shapes) & {"fitted_masks"} if len(shapes[tensor]) == 1}
    of_pairs = {name: dims for name, dims in _PAIR_DIMS.items() if len(shapes.get(name, ())) == len(dims)}
    of_targets = set(shapes) - {"weight"} - of_models - of_pairs.keys()
    expected: dict[str, tuple[int, ...]] = {"weight": (n_train, n_targets)} | dict.fromkeys(of_targets, (n_targets,))
    expected |= {tensor: shapes[tensor] for tensor in of_models | of_pairs.keys()}
    if not of_targets >= {"bias", "lam"} or shapes != expected:
        raise FormatError(
            f"{path} holds {shapes}; datamodels are weight (n_train, n_targets), bias and lam (n_targets,), and what "
            "else there is of each target",
            url=str(path),
        )
    target = DATAMODELS_TARGETS[name]
    dims: dict[str, tuple[str, ...]] = {"weight": ("train_example", target)} | dict.fromkeys(of_targets, (target,))
    dims |= dict.fromkeys(of_models, ("fitted_model",))
    dims |= {tensor: tuple(target if dim == "target" else dim for dim in its) for tensor, its in of_pairs.items()}
    members = {
        tensor: ArraySchema(shape=layout.shape, dtype=str(layout.dtype), dims=dims[tensor])
        for tensor, layout in layouts.items()
    }
    basis = _measured("key", "format", "n_bytes")
    return StoredArray(key=key, format="pt", n_bytes=n_bytes, members=members, basis=basis, note=note)


_PAIR_DIMS: dict[str, tuple[str, ...]] = {
    "pair_examples": ("target", "strongest"),
    "pair_weight": ("target", "pair"),
    "pair_mean": ("train_example",),
}


def _measured(*facts: str) -> dict[str, Basis]:
    return dict.fromkeys(facts, Basis.MEASURED)
