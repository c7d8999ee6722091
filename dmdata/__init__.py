"""Lazy, priced access to the datamodels release and to any other catalogued arrays.

>>> import dmdata
>>> dmdata.estimate("cifar/50pct/test_margins", select="0:1000,42").n_bytes
2128

Importing the package is light: a name is looked up, and what it needs is loaded, when it is first used.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from dmdata.late_names import late_names
from dmdata.objects import forks as _forks  # noqa: F401 - it sees all forks from here on
from dmdata.plugins.registration import register_with_fsspec

if TYPE_CHECKING:
    from dmdata.array import CatalogMismatchWarning, LazyArray
    from dmdata.catalog.entries import Artifact, Catalog
    from dmdata.catalog.roles import ModelRows
    from dmdata.copying.mirror import Progress
    from dmdata.copying.registry import LocalMirrorWarning
    from dmdata.errors import (
        AccessError,
        BudgetError,
        CatalogError,
        DmdataError,
        FormatError,
        IntegrityError,
        ObjectMissingError,
        SelectionError,
        SettingsError,
        SourceError,
    )
    from dmdata.exchange.export import export_catalog
    from dmdata.money.ledger import Spending, budget, spend
    from dmdata.money.prices import Estimate
    from dmdata.release.copies import get, mirror
    from dmdata.release.mirrors import forget_mirror, register_mirror
    from dmdata.release.opening import CatalogLike, estimate, load_catalog, open  # noqa: A004
    from dmdata.release.verification import Comparison, verify
    from dmdata.views.interop import torch_dataset

__all__ = [
    "AccessError",
    "Artifact",
    "BudgetError",
    "Catalog",
    "CatalogError",
    "CatalogLike",
    "CatalogMismatchWarning",
    "Comparison",
    "DmdataError",
    "Estimate",
    "FormatError",
    "IntegrityError",
    "LazyArray",
    "LocalMirrorWarning",
    "ModelRows",
    "ObjectMissingError",
    "Progress",
    "SelectionError",
    "SettingsError",
    "SourceError",
    "Spending",
    "budget",
    "estimate",
    "export_catalog",
    "forget_mirror",
    "get",
    "load_catalog",
    "mirror",
    "open",
    "register_mirror",
    "spend",
    "torch_dataset",
    "verify",
]

_MODULE_OF = {
    "AccessError": "dmdata.errors",
    "Artifact": "dmdata.catalog.entries",
    "BudgetError": "dmdata.errors",
    "Catalog": "dmdata.catalog.entries",
    "CatalogError": "dmdata.errors",
    "CatalogLike": "dmdata.release.opening",
    "CatalogMismatchWarning": "dmdata.array",
    "Comparison": "dmdata.release.verification",
    "DmdataError": "dmdata.errors",
    "Estimate": "dmdata.money.prices",
    "FormatError": "dmdata.errors",
    "IntegrityError": "dmdata.errors",
    "LazyArray": "dmdata.array",
    "LocalMirrorWarning": "dmdata.copying.registry",
    "ModelRows": "dmdata.catalog.roles",
    "ObjectMissingError": "dmdata.errors",
    "Progress": "dmdata.copying.mirror",
    "SelectionError": "dmdata.errors",
    "SettingsError": "dmdata.errors",
    "SourceError": "dmdata.errors",
    "Spending": "dmdata.money.ledger",
    "budget": "dmdata.money.ledger",
    "estimate": "dmdata.release.opening",
    "export_catalog": "dmdata.exchange.export",
    "forget_mirror": "dmdata.release.mirrors",
    "get": "dmdata.release.copies",
    "load_catalog": "dmdata.release.opening",
    "mirror": "dmdata.release.copies",
    "open": "dmdata.release.opening",
    "register_mirror": "dmdata.release.mirrors",
    "spend": "dmdata.money.ledger",
    "torch_dataset": "dmdata.views.interop",
    "verify": "dmdata.release.verification",
}

register_with_fsspec()
# quiet unless the program that uses it sets logging up
logging.getLogger(__name__).addHandler(logging.NullHandler())


_value_of = late_names(__name__, _MODULE_OF)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # slow to import

        return version("dmdata")
    if name == "errors":
        return importlib.import_module("dmdata.errors")
    return _value_of(name)


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__", "errors"})
