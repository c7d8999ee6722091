"""Fitting datamodels against scikit-learn's path a target."""

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import lasso_path
from timing import Bench

from dmpipeline import fit
from dmpipeline.masks import draw_masks


def run(bench: Bench, *, small: bool) -> None:
    """5,000 models x 1,000 examples x 50 targets; scikit-learn's path a target, its Gram shared."""
    del small  # it takes seconds either way
    rng = np.random.default_rng(0)
    masks = draw_masks(0, np.arange(5000, dtype=np.uint64), 1000, 0.5)
    truth = np.where(rng.random((1000, 50)) < 0.03, rng.standard_normal((1000, 50)), 0)
    outputs = (masks @ truth + rng.standard_normal((5000, 50))).astype(np.float32)
    x = masks[:4500].astype(float)
    x = (x - x.mean(0)) / x.std(0)
    y = outputs[:4500] - outputs[:4500].mean(0)
    warnings.simplefilter("ignore", ConvergenceWarning)

    def scikit_learn() -> None:
        gram = x.T @ x
        for target in range(50):
            lasso_path(x, y[:, target], precompute=gram, alphas=100, eps=1e-2, tol=1e-4)

    bench.compare("fit 5,000 x 1,000 x 50", lambda: fit(masks, outputs), {"scikit-learn lasso_path": scikit_learn})
