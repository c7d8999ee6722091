"""Public LASSO solvers as oracles, in a process and an environment of their own: `python peer_solvers.py`.

Each line of standard input is JSON: `solver`, "celer" or "adelie", the design `x` (n_rows, n_features), the target `y`
(n_rows,), the strength `lam` and the penalty factors `factor` (n_features,). The answer is a line of JSON, the weights.
"""

import json
import sys

import adelie
import celer
import numpy as np


def weights(problem: dict) -> np.ndarray:
    x, y = np.asfortranarray(problem["x"]), np.array(problem["y"])
    factor, lam = np.array(problem["factor"]), problem["lam"]
    if problem["solver"] == "celer":
        model = celer.Lasso(
            alpha=lam, weights=factor, fit_intercept=False, tol=1e-12, max_iter=1000, max_epochs=200_000
        )
        return model.fit(x, y).coef_
    state = adelie.solver.gaussian_cov(
        np.asfortranarray(x.T @ x / len(x)),
        x.T @ y / len(x),
        penalty=factor,
        lmda_path=[lam],
        early_exit=False,
        tol=1e-14,
        max_iters=10_000_000,
        progress_bar=False,
    )
    return state.betas.toarray()[0]


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(weights(json.loads(line)).tolist()), flush=True)
