"""Regenerate the artifacts of the datamodels release, verify them, and fit datamodels against them.

Importing the package is light: its names are looked up, and torch and numba loaded, when they are first used.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dmpipeline.errors import explain_missing_extra

if TYPE_CHECKING:
    from dmpipeline.datamodels import Datamodels
    from dmpipeline.evaluate import Evaluation, evaluate
    from dmpipeline.fitting import fit
    from dmpipeline.folders import save_dataset
    from dmpipeline.spec import RunSpec
    from dmpipeline.store import Run

__all__ = ["Datamodels", "Evaluation", "Run", "RunSpec", "evaluate", "fit", "save_dataset"]

_ROOM_OF = {
    "Datamodels": "datamodels",
    "Evaluation": "evaluate",
    "Run": "store",
    "RunSpec": "spec",
    "evaluate": "evaluate",
    "fit": "fitting",
    "save_dataset": "folders",
}


class _Face(ModuleType):
    """Keeps `dmpipeline.evaluate` the function, where importing the room of that name would put the module."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _ROOM_OF and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with explain_missing_extra():
        value = getattr(importlib.import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
