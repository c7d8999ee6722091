"""Weights are no worse than those of celer and adelie, public solvers in an environment of their own (`make peers`)."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Child

from dmpipeline.fitting.solvers import lasso

ROOT = Path(__file__).parents[3]
PEERS = ROOT / ".venv-peers"

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def ask():
    """Ask a peer for the weights of a problem."""
    if not (PEERS / ".installed").exists():
        pytest.skip("the public solvers are not installed; make peers")
    command = [PEERS / "bin" / "python", "-I", ROOT / "tests" / "servers" / "peer_solvers.py"]
    with Child(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"

        def solve(solver, **problem):
            sent = {name: np.asarray(value).tolist() for name, value in problem.items()}
            process.stdin.write(json.dumps({"solver": solver, **sent}) + "\n")
            process.stdin.flush()
            return np.array(json.loads(process.stdout.readline()))

        yield solve
        process.stdin.close()


@pytest.mark.parametrize("solver", ["celer", "adelie"])
@settings(max_examples=60, deadline=None)
@given(
    n_rows=st.integers(6, 90),
    n_features=st.integers(1, 40),
    share=st.floats(0.01, 0.9),
    correlated=st.sampled_from([0.0, 1.0]),
    n_effects=st.integers(0, 8),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    is_tied=st.booleans(),
    is_weighted=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_no_peer_finds_a_lower_objective(
    ask, solver, n_rows, n_features, share, correlated, n_effects, scale, is_tied, is_weighted, seed
):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_rows, n_features)) + correlated * rng.standard_normal((n_rows, 1))
    if is_tied:
        x[:, n_features // 2 :] = x[:, : n_features - n_features // 2]
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    effects = np.zeros(n_features)
    effects[: min(n_effects, n_features)] = rng.standard_normal(min(n_effects, n_features))
    y = scale * (x @ effects + 0.5 * rng.standard_normal(n_rows))
    y -= y.mean()
    factor = rng.uniform(0.5, 5, n_features) if is_weighted else np.ones(n_features)
    lam = share * np.abs(x.T @ y / n_rows / factor).max()
    got = lasso.solve(
        x.T @ x / n_rows,
        (x.T @ y / n_rows)[None],
        np.array([y @ y / n_rows]),
        np.array([lam]),
        start=np.zeros((1, n_features)),
        factor=factor[None],
        tol=1e-7,
        max_sweeps=100_000,
        threads=1,
        progress=None,
    )
    theirs = ask(solver, x=x, y=y, lam=lam, factor=factor)

    def objective(w):
        return np.square(y - x @ w).mean() / 2 + lam * (factor * np.abs(w)).sum()

    ours = objective(got.weight[0])
    assert ours <= objective(theirs) * (1 + 1e-6)
    # the certificate bounds how far any solver can be below
    assert ours - objective(theirs) <= got.gap[0] * (y @ y / n_rows) * (1 + 1e-6) + 1e-12 * scale**2
