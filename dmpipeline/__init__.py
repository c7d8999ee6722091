"""Regenerate the artifacts of the datamodels release, verify them, and fit datamodels against them.

Importing the package is light: its names are looked up, and torch and numba loaded, when they are first used.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dmpipeline.errors import explain_missing_extra

if TYPE_CHECKING:
    from dmpipeline.alternatives import Comparison, compare, debiased, difference_of_means, ridge
    from dmpipeline.attribution import gradient_scores
    from dmpipeline.curves import LearningCurve, draw_curves, learning_curves
    from dmpipeline.datamodels import Datamodels
    from dmpipeline.datasets import load_dataset
    from dmpipeline.evaluate import Evaluation, evaluate
    from dmpipeline.examples import Dataset
    from dmpipeline.export import export_run, publish_run
    from dmpipeline.extension import extend
    from dmpipeline.fitting import fit, fit_moments
    from dmpipeline.folders import save_dataset
    from dmpipeline.moments import Moments
    from dmpipeline.readings import find_space
    from dmpipeline.spec import RunSpec
    from dmpipeline.store import Run
    from dmpipeline.verify import Finding, replay, verify_run

__all__ = [
    "Comparison",
    "Datamodels",
    "Dataset",
    "Evaluation",
    "Finding",
    "LearningCurve",
    "Moments",
    "Run",
    "RunSpec",
    "compare",
    "debiased",
    "difference_of_means",
    "draw_curves",
    "evaluate",
    "export_run",
    "extend",
    "find_space",
    "fit",
    "fit_moments",
    "gradient_scores",
    "learning_curves",
    "load_dataset",
    "publish_run",
    "replay",
    "ridge",
    "save_dataset",
    "verify_run",
]

_ROOM_OF = {
    "Comparison": "alternatives",
    "Datamodels": "datamodels",
    "Dataset": "examples",
    "Evaluation": "evaluate",
    "Finding": "verify",
    "LearningCurve": "curves",
    "Moments": "moments",
    "Run": "store",
    "RunSpec": "spec",
    "compare": "alternatives",
    "debiased": "alternatives",
    "difference_of_means": "alternatives",
    "draw_curves": "curves",
    "evaluate": "evaluate",
    "export_run": "export",
    "extend": "extension",
    "find_space": "readings",
    "fit": "fitting",
    "fit_moments": "fitting",
    "gradient_scores": "attribution",
    "learning_curves": "curves",
    "load_dataset": "datasets",
    "publish_run": "export",
    "replay": "verify",
    "ridge": "alternatives",
    "save_dataset": "folders",
    "verify_run": "verify",
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
    return sorted({*__all__, "errors"})
