"""Fitting datamodels against scikit-learn's path a target."""

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import lasso_path
from timing import Bench

from dmpipeline import fit
from dmpipeline.masks import draw_masks


def run(bench: Bench, *, small: bool) -> None:
    """5,000 models x 1,000 examples x 50 targets, small: 1,000 x 200 x 10; scikit-learn's path a target, one Gram."""
    n_models, n_train, n_targets = (5000, 1000, 50) if not small else (1000, 200, 10)
    rng = np.random.default_rng(0)
    masks = draw_masks(0, np.arange(n_models, dtype=np.uint64), n_train, 0.5)
    truth = np.where(rng.random((n_train, n_targets)) < 0.03, rng.standard_normal((n_train, n_targets)), 0)
    outputs = (masks @ truth + rng.standard_normal((n_models, n_targets))).astype(np.float32)
    n_fit = n_models * 9 // 10
    x = masks[:n_fit].astype(float)
    x = (x - x.mean(0)) / x.std(0)
    y = outputs[:n_fit] - outputs[:n_fit].mean(0)
    warnings.simplefilter("ignore", ConvergenceWarning)

    def scikit_learn() -> None:
        gram = x.T @ x
        for target in range(n_targets):
            lasso_path(x, y[:, target], precompute=gram, alphas=100, eps=1e-2, tol=1e-4)

    what = f"fit {n_models:,} x {n_train:,} x {n_targets}"
    bench.compare(what, lambda: fit(masks, outputs), {"scikit-learn lasso_path": scikit_learn})
