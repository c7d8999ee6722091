"""Export of a catalog by the name of a form."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import yaml

from dmdata.catalog.names import CATALOG_FILE
from dmdata.errors import CatalogError
from dmdata.exchange.croissant import croissant
from dmdata.exchange.datapackage import datapackage
from dmdata.exchange.described import Exported
from dmdata.exchange.intake import intake
from dmdata.release.catalogs import load_catalog
from dmdata.settings import settings

FormName: TypeAlias = Literal["croissant", "intake", "datapackage"]

_WRITERS: dict[FormName, Callable[[Exported], tuple[dict[str, Any], list[str]]]] = {
    "croissant": croissant,
    "intake": intake,
    "datapackage": datapackage,
}


def export_catalog(
    form: FormName,
    *,
    catalog: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> str:
    """Write a catalog in a form that other tools read; only the catalog is read for it.

    Parameters
    ----------
    form : {"croissant", "intake", "datapackage"}
        Croissant 1.0 as JSON-LD, an Intake 2 catalog as YAML, or a Data Package 2.0 as JSON.
    catalog : path or URL, optional
        By default the one that is set, else the published release's.
    folder : path, optional
        Where the text will be put: files below it are named relative to it. By default the folder of a catalog on this
        machine, and the working directory for another.

    Returns
    -------
    text : str

    Raises
    ------
    CatalogError
        If there is no such form, the catalog cannot be read, or the form cannot name its files from that folder.

    Examples
    --------
    >>> import json, dmdata
    >>> json.loads(dmdata.export_catalog("croissant"))["conditionsOfAccess"][:14]
    'requester pays'
    """
    document, _ = document_of(form, catalog=catalog, folder=folder)
    return text_of(document, form)


def document_of(
    form: str, *, catalog: str | os.PathLike[str] | None, folder: str | os.PathLike[str] | None
) -> tuple[dict[str, Any], list[str]]:
    """Make the document of a form, and notes of what the form has no field for; as `export_catalog`."""
    if form not in get_args(FormName):
        raise CatalogError(f"{form!r} is not a form that catalogs are exported in; choose {', '.join(_WRITERS)}")
    at = os.fspath(catalog) if catalog is not None else settings().catalog or ""
    known = load_catalog(at)
    own_folder = Path()
    if at and "://" not in at:
        path = Path(at).expanduser().absolute()
        path = path / CATALOG_FILE if path.is_dir() else path
        at, own_folder = str(path), path.parent
    exported = Exported(known, at, Path(os.path.abspath(own_folder if folder is None else folder)))
    return _WRITERS[form](exported)  # type: ignore[index] # checked above


def text_of(document: dict[str, Any], form: str) -> str:
    """Write a form's document as text."""
    if form == "intake":
        return yaml.safe_dump(document, sort_keys=False, width=120, allow_unicode=True)
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
