"""The learning curve of one fit."""

import functools
from typing import Any

from dmpipeline.fitting.fitting import fit_moments
from dmpipeline.scoring.curves import LearningCurve
from dmpipeline.scoring.learning import learning_curves


def learning_curve(*arrays: Any, prior: Any = None, is_positive: bool = False, **settings: Any) -> LearningCurve:
    """Draw the curve of `fit_moments` by the arguments of `learning_curves`."""
    estimate = functools.partial(fit_moments, prior=prior, is_positive=is_positive)
    return learning_curves(*arrays, estimates={"": estimate}, **settings)[""]
