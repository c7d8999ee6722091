"""``xarray.open_dataset("cifar/50pct", engine="dmdata")``: all arrays of one alpha as a lazy dataset.

Opening reads nothing but the catalog. A variable is read when it is indexed, by exact ranges under the budget, with
dask (``chunks={}``) or without. Imported by xarray when the engine is used, never by dmdata itself.
"""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray
from xarray.backends import BackendArray, BackendEntrypoint
from xarray.core import indexing

from dmdata.array import LazyArray
from dmdata.catalog.catalogued import catalog_below
from dmdata.catalog.entries import Artifact, Catalog
from dmdata.catalog.locate import is_address
from dmdata.catalog.roles import ROLES, ModelRows
from dmdata.errors import CatalogError, FormatError, SelectionError
from dmdata.layout.selection import select
from dmdata.release.opening import CatalogLike, load_catalog
from dmdata.release.opening import open as open_array
from dmdata.release.pricing import arrays_of
from dmdata.views.interop import block_shape

_MODEL = "model"


class DmdataBackendEntrypoint(BackendEntrypoint):
    """Datasets of a dmdata catalog, by name as "cifar/50pct", lazily and within a budget."""

    description = "Open arrays of a catalog of dmdata, as 'cifar/50pct', lazily, priced and within a budget"
    open_dataset_parameters = ("filename_or_obj", "drop_variables", "catalog", "to", "local")

    def open_dataset(  # type: ignore[override] # a backend's own keywords, as xarray documents them
        self,
        filename_or_obj: str,
        *,
        drop_variables: str | Iterable[str] | None = None,
        catalog: CatalogLike = None,
        to: str = "internet",
        local: bool | None = None,
    ) -> xarray.Dataset:
        """Open all arrays of one alpha of a dataset, or one array.

        Parameters
        ----------
        filename_or_obj : str
            "dataset/alpha" or "dataset/alpha/array" of the catalog, with or without ``dmdata://`` before it; or
            the same behind the path of a folder with a ``catalog.yaml``, as "export/digits/50pct".
        drop_variables : str or iterable of str, optional
            Arrays not to open.
        catalog, to, local
            As in `dmdata.open`.

        Returns
        -------
        dataset : xarray.Dataset
            Arrays inside a ``.pt`` are named like ``test_datamodels_weight``. The coordinate ``role`` says which models
            to fit on and which to evaluate on.

        Raises
        ------
        CatalogError
            If the catalog has no such name.
        FormatError
            If two arrays do not fit into one dataset.
        """
        name = str(filename_or_obj).removeprefix("dmdata://")
        dropped = {drop_variables} if isinstance(drop_variables, str) else set(drop_variables or ())
        known, name = _catalog_and_name(name, catalog)
        artifacts = _artifacts_named(name, known)
        opened = {
            variable: open_array(artifact.name, catalog=known, to=to, local=local)
            for artifact in artifacts
            if (variable := _variable_name(artifact)) not in dropped
        }
        sizes = _common_sizes(opened)
        coordinates = {}
        rows = next((array.rows for array in opened.values() if array.rows is not None), None)
        if rows is not None and "role" not in dropped:
            lazy = indexing.LazilyIndexedArray(_Roles(rows, sizes[_MODEL]))
            coordinates["role"] = xarray.Variable((_MODEL,), lazy)
        dataset = xarray.Dataset(
            {variable: _as_variable(array) for variable, array in opened.items()},
            coords=coordinates,
            attrs=_attributes(artifacts[0], known),
        )
        dataset.encoding["source"] = f"dmdata://{name}"
        return dataset

    def guess_can_open(self, filename_or_obj: Any) -> bool:
        """Only what is called by our protocol's name is known to be ours."""
        return isinstance(filename_or_obj, str) and filename_or_obj.startswith("dmdata://")


class _LazyRead(BackendArray):
    """A lazy array behind xarray's explicit indexing: what is asked for axis by axis is read, and no more."""

    def __init__(self, array: LazyArray) -> None:
        self.array = array
        self.shape = array.shape
        self.dtype = array.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> npt.NDArray[Any]:
        outer = indexing.IndexingSupport.OUTER
        return np.asarray(indexing.explicit_indexing_adapter(key, self.shape, outer, self._read))

    def _read(self, key: tuple[Any, ...]) -> npt.NDArray[Any]:
        answer = self.array.read(select(key, self.shape, orthogonal=True))
        if answer.dtype != self.dtype:  # xarray was told so before the header was read
            raise SelectionError(
                f"{self.array.name} has dtype {answer.dtype}, and not {self.dtype} as its catalog claims; open the "
                "dataset again"
            )
        return answer


class _Roles(BackendArray):
    """What each model is for, told without holding a million words in memory."""

    def __init__(self, rows: ModelRows, n_models: int) -> None:
        self.rows = rows
        self.shape = (n_models,)
        self.dtype = ROLES.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> npt.NDArray[Any]:
        outer = indexing.IndexingSupport.OUTER
        return np.asarray(indexing.explicit_indexing_adapter(key, self.shape, outer, self._roles_of))

    def _roles_of(self, key: tuple[Any, ...]) -> npt.NDArray[Any]:
        return self.rows.role_of(np.arange(self.shape[0])[key])


def _catalog_and_name(name: str, catalog: CatalogLike) -> tuple[Catalog, str]:
    found = catalog_below(name)
    if found is None and os.path.isabs(name):
        # open_mfdataset makes absolute paths of names
        name = os.path.relpath(name)
    if found is not None and is_address(name):
        return found
    known, name = load_catalog(catalog), name.strip("/")
    if found is not None and not (known.has(name) or known.has(f"{name}/*")):
        return found
    return known, name


def _artifacts_named(name: str, known: Catalog) -> list[Artifact]:
    if not name:
        names = [f"{dataset}/{alpha}" for dataset, entry in known.datasets.items() for alpha in entry.alphas]
        raise CatalogError(f"the folder holds {', '.join(names)}; open one of them, behind its path", nearest=names)
    if name in known.datasets:
        alphas = " or ".join(f"{name}/{alpha}" for alpha in known.datasets[name].alphas)
        raise CatalogError(
            f"{name} has models of several alphas, which do not make one dataset; open {alphas}", name=name
        )
    exact = {artifact.name for artifact in known.artifacts(members=True)}
    return arrays_of(known.match(name if name in exact else f"{name}/*"))


def _variable_name(artifact: Artifact) -> str:
    return artifact.name.removeprefix(f"{artifact.dataset}/{artifact.alpha_name}/").replace("/", "_")


def _common_sizes(opened: dict[str, LazyArray]) -> dict[str, int]:
    sizes: dict[str, tuple[int, str]] = {}
    for variable, array in opened.items():
        for dim, size in zip(array.dims, array.shape, strict=True):
            other_size, other = sizes.setdefault(dim, (size, variable))
            if size != other_size:
                raise FormatError(
                    f"{variable} has {size} along {dim} but {other} has {other_size}, so they do not make one dataset; "
                    f"open one by its own name, or leave one out: drop_variables=[{variable!r}]",
                    url=array.url,
                )
    return {dim: size for dim, (size, _) in sizes.items()}


def _as_variable(array: LazyArray) -> xarray.Variable:
    lazy = indexing.LazilyIndexedArray(_LazyRead(array))
    variable = xarray.Variable(array.dims, lazy, attrs={"artifact": array.name, "url": array.url})
    variable.encoding["preferred_chunks"] = dict(zip(array.dims, block_shape(array), strict=True))
    return variable


def _attributes(artifact: Artifact, known: Catalog) -> dict[str, Any]:
    alpha = known.datasets[artifact.dataset].alphas[artifact.alpha_name].alpha
    facts: dict[str, Any] = {
        "title": known.title,
        "dataset": artifact.dataset,
        "alpha": alpha,
        "citation": known.citation,
    }
    facts |= {"n_retrainings": artifact.rows and artifact.rows.n_retrainings}
    return {name: value for name, value in facts.items() if value is not None}
