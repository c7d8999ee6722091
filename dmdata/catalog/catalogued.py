"""What is catalogued in a local folder, by its path: "export/digits/50pct/test_margins" of the catalog in "export".

A run's directory, an export, and a copy of either have a ``catalog.yaml``. A path into such a folder, with an
artifact's name where a file would be, means that artifact.
"""

import os
from pathlib import Path

from dmdata.catalog.entries import Artifact, Catalog, load_file
from dmdata.catalog.locate import may_be_an_object
from dmdata.errors import CatalogError

_CATALOG = "catalog.yaml"
_MOST_SHOWN = 4


def catalog_below(path: str) -> tuple[Catalog, str] | None:
    """Find the catalog that a local path leads through.

    Parameters
    ----------
    path : str
        Relative or absolute; perhaps with wildcards at its end.

    Returns
    -------
    catalog, name : pair of Catalog and str, or None
        The catalog of the longest part of the path that is a folder with one, and what follows that folder, which is ""
        where nothing does. None where there is no such folder, or the path is that of an object or a Zarr store.

    Raises
    ------
    CatalogError
        If the ``catalog.yaml`` that is there is not one.
    """
    if "://" in path or may_be_an_object(path):
        return None
    parts = [part for part in path.split("/") if part not in ("", ".")]
    start = "/" if path.startswith("/") else ""
    for n in range(len(parts), 0, -1):
        folder = Path(os.path.expanduser(start + "/".join(parts[:n])))
        if n == len(parts) and _is_zarr(folder):
            return None
        if (folder / _CATALOG).is_file():
            return load_file(folder), "/".join(parts[n:])
    return None


def artifact_below(path: str) -> Artifact | None:
    """Find the artifact that a local path names in the catalog it leads through; None where it leads through none.

    Raises
    ------
    CatalogError
        If the catalog has no such artifact, or the path ends before it names one; says what there is.
    """
    found = catalog_below(path)
    if found is None:
        return None
    catalog, name = found
    names = [artifact.name for artifact in catalog.artifacts()]
    below = [other for other in names if other.startswith(f"{name}/")] if name else names
    if below and name not in names:
        shown = ", ".join(f"{path.rstrip('/')}/{other.removeprefix(name).lstrip('/')}" for other in below[:_MOST_SHOWN])
        more = f" and {len(below) - _MOST_SHOWN} more" if len(below) > _MOST_SHOWN else ""
        raise CatalogError(f"{path} holds {len(below)} artifacts; open one of {shown}{more}", name=path, nearest=below)
    return catalog.find(name)


def _is_zarr(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup"))
