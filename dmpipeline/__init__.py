"""Regenerate the artifacts of the datamodels release, verify them, and fit datamodels against them."""

from dmpipeline.datamodels import Datamodels, fit
from dmpipeline.evaluate import Evaluation, evaluate
from dmpipeline.spec import RunSpec
from dmpipeline.store import Run

__all__ = ["Datamodels", "Evaluation", "Run", "RunSpec", "evaluate", "fit"]
