"""Datamodels from masks and outputs: spaces, solvers, the choice of lambda, priors, and what a fit will take."""

from dmdata.late_names import late_names

# this folder was that file
__getattr__ = late_names(__name__, dict.fromkeys(("fit", "fit_moments", "fit_folds"), "dmpipeline.fitting.fitting"))
