"""Lazy, priced access to the datamodels release and to any other catalogued arrays.

>>> import dmdata
>>> dmdata.estimate("cifar/50pct/test_margins", select="0:1000,42").n_bytes
2128
"""

import fsspec

from dmdata.array import LazyArray
from dmdata.catalog import Artifact, Catalog
from dmdata.copies import get, mirror
from dmdata.interop import torch_dataset
from dmdata.ledger import Ledger, Spending, budget, home
from dmdata.prices import Estimate
from dmdata.release import CatalogLike, CatalogMismatchWarning, estimate, load_catalog, open  # noqa: A004
from dmdata.roles import ModelRows
from dmdata.verify import Comparison, verify

__all__ = [
    "Artifact",
    "Catalog",
    "CatalogLike",
    "CatalogMismatchWarning",
    "Comparison",
    "Estimate",
    "LazyArray",
    "ModelRows",
    "Spending",
    "budget",
    "estimate",
    "get",
    "load_catalog",
    "mirror",
    "open",
    "spend",
    "torch_dataset",
    "verify",
]

# an installed dmdata is found by its entry point; this serves a checkout that is only on the path
fsspec.register_implementation("dmdata", "dmdata.filesystem.DmdataFileSystem", clobber=True)


def spend() -> Spending:
    """Add up everything that went through this machine's ledger (``DMDATA_HOME``).

    Returns
    -------
    spending : Spending
        Its ``usd``, ``n_requests``, ``n_bytes`` and ``n_reads``.
    """
    return Ledger(home()).spent().get("total", Spending(0.0, 0, 0, 0))
