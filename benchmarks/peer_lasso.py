"""Public LASSO solvers in a process and an environment of their own. Says its seconds and held-out errors, a line each.

Started as `python peer_lasso.py FOLDER`, which holds masks.npy, outputs.npy and n_fit.npy: the rows before n_fit are
fitted, the others held out. At every line of standard input, a solver's name and targets, it solves their paths one
after another over the same 100 strengths, down to a hundredth of the largest, and answers with a line of JSON. Forming
the Gram matrix, for those that take one, is not in the time.
"""

import json
import sys
import time
import warnings
from pathlib import Path

import adelie
import celer
import numpy as np
import skglm
from sklearn.linear_model import lasso_path


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")  # of points that did not converge, which the errors will show
    masks, outputs, n_fit = (np.load(folder / f"{name}.npy") for name in ("masks", "outputs", "n_fit"))
    x = np.asfortranarray(masks[:n_fit], dtype=np.float64)
    mean, scale = x.mean(axis=0), x.std(axis=0)
    x -= mean
    x /= scale
    gram = x.T @ x
    x_out = (masks[n_fit:] - mean) / scale
    y = outputs[:n_fit].astype(np.float64)
    y_mean = y.mean(axis=0)
    y -= y_mean
    y_out = outputs[n_fit:] - y_mean
    covariance = gram / len(x)

    def solve(name: str, target: int) -> np.ndarray:
        of_target = np.ascontiguousarray(y[:, target])
        products = x.T @ of_target
        alphas = np.abs(products).max() / len(x) * 0.01 ** np.linspace(0, 1, 100)
        if name == "scikit-learn":
            return lasso_path(x, of_target, precompute=gram, Xy=products, alphas=alphas, tol=1e-4, check_input=False)[1]
        if name == "celer":
            return celer.celer_path(x, of_target, "lasso", alphas=alphas, tol=1e-4)[1]
        if name == "skglm":
            return skglm.Lasso(tol=1e-4, fit_intercept=False).path(x, of_target, alphas)[1]
        state = adelie.solver.gaussian_cov(
            covariance, products / len(x), lmda_path=alphas, early_exit=False, progress_bar=False
        )
        return state.betas.toarray().T

    print("ready", flush=True)
    for line in sys.stdin:
        name, *targets = line.split()
        began = time.perf_counter()
        paths = [solve(name, int(target)) for target in targets]
        seconds = time.perf_counter() - began
        errors = [
            float(((y_out[:, [int(target)]] - x_out @ path) ** 2).mean(axis=0).min())
            for target, path in zip(targets, paths, strict=True)
        ]
        print(json.dumps({"seconds": seconds, "errors": errors}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
