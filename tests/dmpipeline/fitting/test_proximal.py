"""The torch backend gives what `lasso` and scikit-learn give: closely in float64, less so in float32."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Lasso

from dmpipeline.errors import SpecError
from dmpipeline.fitting.fitting import fit
from dmpipeline.fitting.solvers import lasso, proximal

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small products are slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def moments(x, y, dtype=np.float64):
    n = len(x)
    return (x.T @ x / n).astype(dtype), np.ascontiguousarray(y.T @ x / n), (y**2).mean(axis=0)


def drawn(
    n_rows, n_features, n_targets, *, seed, correlated=0.0, n_duplicates=0, n_zero=0, n_constant=0, is_mask=False
):
    """Columns of unit variance, of 0/1 masks or normal, some of them copies or zeros, and sparse targets of them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_rows, n_features)) + correlated * rng.standard_normal((n_rows, 1))
    x = (x > 0).astype(float) if is_mask else x
    x[:, rng.integers(0, n_features, n_duplicates)] = x[:, [0]]
    x[:, rng.integers(0, n_features, n_zero)] = 1
    x = (x - x.mean(axis=0)) / np.where(x.std(axis=0) > 1e-9, x.std(axis=0), 1)
    y = x @ (rng.standard_normal((n_features, n_targets)) * (rng.random((n_features, n_targets)) < 0.3))
    y += 0.5 * rng.standard_normal(y.shape)
    y[:, rng.integers(0, n_targets, n_constant)] = 1
    y -= y.mean(axis=0)
    return x, np.where(y.std(axis=0) > 1e-9, y, 0)


def objective(gram, cross, w, lam, factor=1.0):
    """1/2 w'Gw - c'w + lam sum f|w| of each target, in float64."""
    w = w.astype(np.float64)
    return ((w @ gram.astype(np.float64)) * w).sum(1) / 2 - (w * cross).sum(1) + lam * (factor * np.abs(w)).sum(1)


def both_paths(gram, cross, lams, device="cpu", **settings):
    settings = {"patience": 5, "max_sweeps": 100_000, "progress": None} | settings
    return (
        lasso.solve_paths(gram, cross, lams, threads=1, **settings),
        proximal.solve_paths(gram, cross, lams, device=device, **settings),
    )


problems = st.fixed_dictionaries(
    {
        "n_rows": st.integers(8, 60),
        "n_features": st.integers(1, 30),
        "n_targets": st.integers(1, 6),
        "correlated": st.sampled_from([0.0, 1.0, 3.0]),
        "n_duplicates": st.sampled_from([0, 3]),
        "n_zero": st.sampled_from([0, 2]),
        "n_constant": st.sampled_from([0, 1]),
        "is_mask": st.booleans(),
        "seed": st.integers(0, 10_000),
    }
)

penalties = st.sampled_from(["none", "each", "shared"])


def penalty_factor(kind, x, y):
    rows = {"none": 0, "each": y.shape[1], "shared": 1}[kind]
    return np.random.default_rng(0).uniform(0.3, 3, (rows, x.shape[1])) if rows else None


@settings(max_examples=60, deadline=None)
@given(problem=problems, kind=penalties, is_positive=st.booleans(), share=st.floats(0.02, 0.9))
def test_solutions_equal_those_of_the_compiled_solver(problem, kind, is_positive, share):
    x, y = drawn(**problem)
    gram, cross, square = moments(x, y)
    penalty = {"factor": penalty_factor(kind, x, y), "is_positive": is_positive}
    lam = lasso.lambda_grid(cross, n_lams=1, ratio=1, **penalty)[:, 0] * share
    start = np.random.default_rng(0).standard_normal(cross.shape)
    limits = {"start": start, "tol": 1e-7, "max_sweeps": 100_000, "progress": None}
    want = lasso.solve(gram, cross, square, lam, threads=1, **limits, **penalty)
    got = proximal.solve(gram, cross, square, lam, device="cpu", **limits, **penalty)
    np.testing.assert_array_equal(got.converged, True)
    assert (got.kkt <= 1.01e-7).all()
    gap, kkt = lasso.certify(gram, cross, square, lam, got.weight, **penalty)
    np.testing.assert_allclose(got.gap, gap, atol=1e-12)
    np.testing.assert_allclose(got.kkt, kkt, atol=1e-9)
    factor = 1.0 if kind == "none" else penalty["factor"]
    of_got, of_want = (objective(gram, cross, w, lam, factor) for w in (got.weight, want.weight))
    assert (of_got <= of_want + 1e-6 * square).all()
    assert not got.weight[:, x.std(axis=0) == 0].any()
    assert not got.weight[square == 0].any()
    if is_positive:
        assert (got.weight >= 0).all()
    varies = x.std(axis=0) > 0
    if varies.any() and np.linalg.eigvalsh(gram[np.ix_(varies, varies)])[0] > 0.01:  # the minimum is well marked
        np.testing.assert_allclose(got.weight, want.weight, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(problem=problems, share=st.floats(0.02, 0.9), is_positive=st.booleans())
def test_objectives_equal_those_of_scikit_learn(problem, share, is_positive):
    x, y = drawn(**problem | {"n_targets": 1, "n_constant": 0})
    gram, cross, square = moments(x, y)
    lam = np.maximum(lasso.lambda_grid(cross, n_lams=1, ratio=1, is_positive=is_positive)[:, 0], 1e-3) * share
    limits = {"tol": 1e-7, "max_sweeps": 100_000, "device": "cpu", "progress": None}
    got = proximal.solve(gram, cross, square, lam, start=np.zeros(cross.shape), is_positive=is_positive, **limits)
    oracle = Lasso(alpha=lam[0], fit_intercept=False, positive=is_positive, tol=1e-10, max_iter=1_000_000).fit(x, y)
    best = objective(gram, cross, np.atleast_2d(oracle.coef_), lam)
    assert objective(gram, cross, got.weight, lam)[0] <= best[0] + 1e-6 * square[0]


@settings(max_examples=40, deadline=None)
@given(
    problem=problems, kind=penalties, is_positive=st.booleans(), patience=st.sampled_from([2, 1000]),
    least_rise=st.sampled_from([0.0, 0.1]),
)  # fmt: skip
def test_paths_equal_those_of_the_compiled_solver(problem, kind, is_positive, patience, least_rise):
    x, y = drawn(**problem)
    penalty = {"factor": penalty_factor(kind, x, y), "is_positive": is_positive}
    n_fit = len(x) * 3 // 4
    gram, cross, square = moments(x[:n_fit], y[:n_fit])
    lams = lasso.lambda_grid(cross, n_lams=15, ratio=0.02, **penalty)
    # where several weights solve a problem, they agree on the fitted rows alone
    is_unique = np.linalg.eigvalsh(gram)[0] > 1e-3
    out = lasso.Holdout(*(moments(x[n_fit:], y[n_fit:]) if is_unique else (gram, cross, square)))
    rule = {"patience": patience, "least_rise": least_rise, "tol": 1e-9}
    want, got = both_paths(gram, cross, lams, holdout=out, **rule, **penalty)
    assert_same_choice(got, want, lams, slack=1e-6, atol=1e-5 if is_unique else None)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n_features=st.integers(1, 60),
    is_mask=st.booleans(),
    correlated=st.sampled_from([0, 1]),
)
def test_paths_in_float32_equal_those_of_the_compiled_solver(seed, n_features, is_mask, correlated):
    x, y = drawn(300, n_features, 5, seed=seed, is_mask=is_mask, correlated=correlated)
    gram, cross, square = moments(x[:200], y[:200], np.float32)
    lams = lasso.lambda_grid(cross, n_lams=20, ratio=0.02)
    out = lasso.Holdout(*moments(x[200:], y[200:], np.float32))
    want, got = both_paths(gram, cross, lams, holdout=out, tol=1e-4)
    assert got.weight.dtype == np.float32
    assert_same_choice(got, want, lams, slack=5e-4, atol=1e-3 * np.sqrt(square.max()))
    limits = {"start": want.weight, "tol": 1e-3, "max_sweeps": 10_000, "progress": None}
    exact = lasso.solve(gram.astype(float), cross, square, want.lam, threads=1, **limits | {"tol": 1e-8})
    solution = proximal.solve(gram, cross, square, want.lam, device="cpu", **limits)
    assert solution.converged.all()
    assert (solution.gap <= 1e-4).all()
    of_got, of_exact = (objective(gram, cross, w, want.lam) for w in (solution.weight, exact.weight))
    assert (of_got - of_exact <= (solution.gap + 1e-6) * square).all()


def assert_same_choice(got, want, lams, *, slack, atol):
    """Same errors to `slack` of the variance, and the same points and weights where no other point is as good."""
    for t, (mine, theirs) in enumerate(zip(got.error, want.error, strict=True)):
        n = min(got.n_solved[t], want.n_solved[t])
        scale = slack * theirs[0]
        np.testing.assert_allclose(mine[:n], theirs[:n], rtol=0, atol=scale)
        assert got.lam[t] == lams[t, got.best[t]]
        assert np.isnan(mine[max(got.n_solved[t], 1) :]).all()
        if n == 0 or (np.abs(np.diff(theirs[:n])) > 2 * scale).all():
            assert got.n_solved[t] == want.n_solved[t]
        if n == 0 or (np.delete(theirs[:n], want.best[t]) > theirs[want.best[t]] + 2 * scale).all():
            assert got.best[t] == want.best[t]
            if atol is not None:
                np.testing.assert_allclose(got.weight[t], want.weight[t], atol=atol)


def planted(dtype=np.float64, n_targets=7):
    x, y = drawn(120, 100, n_targets, seed=11, correlated=0.5)
    gram, cross, square = moments(x[:90], y[:90], dtype)
    return gram, cross, square, lasso.Holdout(*moments(x[90:], y[90:], dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_any_device_gives_what_the_compiled_solver_gives(device, dtype):
    gram, cross, square, out = planted(dtype)
    lams = lasso.lambda_grid(cross, n_lams=20, ratio=0.01)
    tol, slack = (1e-7, 1e-5) if dtype == np.float64 else (1e-3, 5e-3)
    want, got = both_paths(gram, cross, lams, device, holdout=out, tol=tol)
    assert_same_choice(got, want, lams, slack=slack, atol=1e-3 if dtype == np.float64 else 0.05)
    on_device = [torch.from_numpy(matrix).to(device) for matrix in (gram, out.gram)]
    moved = lasso.Holdout(on_device[1], out.cross, out.square)
    limits = {"patience": 5, "max_sweeps": 100_000, "device": device, "progress": None}
    again = proximal.solve_paths(on_device[0], cross, lams, holdout=moved, tol=tol, **limits)
    np.testing.assert_array_equal(again.weight, got.weight)
    limits = {"start": got.weight, "tol": tol, "max_sweeps": 10_000, "progress": None}
    solution = proximal.solve(on_device[0], cross, square, want.lam, device=device, **limits)
    gap, kkt = lasso.certify(gram, cross, square, want.lam, solution.weight)
    np.testing.assert_allclose(solution.gap, gap, atol=1e-10)
    np.testing.assert_allclose(solution.kkt, kkt, atol=1e-8)
    assert solution.converged.all()
    assert (gap < 1e-4).all()


@pytest.mark.parametrize("packed_share", [1, 4, 1000])
def test_the_result_does_not_depend_on_what_is_packed_or_solved_together(packed_share):
    gram, cross, square, out = planted()
    lams = lasso.lambda_grid(cross, n_lams=20, ratio=0.01)
    limits = {"tol": 1e-8, "max_sweeps": 100_000, "device": "cpu", "progress": None}

    def solved(targets, tuning=None):
        own = lasso.Holdout(out.gram, out.cross[targets], out.square[targets])
        path = proximal.solve_paths(
            gram, cross[targets], lams[targets], holdout=own, patience=5, tuning=tuning, **limits
        )
        how = {"start": path.weight, "tuning": tuning}
        final = proximal.solve(gram, cross[targets], square[targets], path.lam, **how, **limits)
        return np.vstack([path.weight, final.weight])

    whole = solved(slice(0, 7))
    tuning = proximal.Tuning(packed_share, always_packed=1, packed_bytes=20_000, block_bytes=10_000)
    np.testing.assert_allclose(solved(slice(0, 7), tuning), whole, atol=1e-5)
    np.testing.assert_allclose(solved(slice(3, 4), tuning), whole[3::7], atol=1e-5)


def test_an_underestimated_eigenvalue_makes_no_target_diverge():
    gram, cross, square, _ = planted()
    lam = np.abs(cross).max(axis=1) / 20
    limits = {"start": np.zeros(cross.shape), "tol": 1e-6, "max_sweeps": 100_000, "device": "cpu", "progress": None}
    got = proximal.solve(gram, cross, square, lam, tuning=proximal.Tuning(largest_eigenvalue=1e-3), **limits)
    assert got.converged.all()
    assert (got.kkt <= 1.01e-6).all()


def test_badly_conditioned_problems_take_few_steps():
    x, y = drawn(60, 90, 3, seed=29, correlated=3.0)
    gram, cross, square = moments(x, y)
    lam = np.abs(cross).max(axis=1) / 100
    limits = {"start": np.zeros(cross.shape), "tol": 1e-6, "device": "cpu", "progress": None}
    assert proximal.solve(gram, cross, square, lam, max_sweeps=4096, **limits).converged.all()


def test_running_out_of_steps_shows_in_the_certificate():
    x, y = drawn(60, 90, 2, seed=29, correlated=2.0)
    gram, cross, square = moments(x, y)
    lam = np.abs(cross).max(axis=1) / 100
    limits = {"start": np.zeros(cross.shape), "tol": 1e-4, "device": "cpu", "progress": None}
    short, full = (proximal.solve(gram, cross, square, lam, max_sweeps=n, **limits) for n in (3, 10_000))
    assert not short.converged.any()
    assert (short.kkt > 1e-2).all()
    assert full.converged.all()
    assert (full.kkt < 1.1e-4).all()


def test_a_path_goes_on_where_steps_run_out():
    gram, cross, _, out = planted()
    lams = lasso.lambda_grid(cross, n_lams=20, ratio=0.01)
    limits = {"tol": 1e-9, "patience": 1000, "device": "cpu", "progress": None}
    path = proximal.solve_paths(gram, cross, lams, holdout=out, max_sweeps=1, **limits)
    np.testing.assert_array_equal(path.n_solved, 20)
    assert np.isfinite(path.error).all()


def test_progress_rises_to_all_targets():
    gram, cross, square, out = planted()
    lams = lasso.lambda_grid(cross, n_lams=20, ratio=0.01)
    seen = []
    limits = {"tol": 1e-4, "max_sweeps": 1000, "device": "cpu", "progress": lambda *counts: seen.append(counts)}
    path = proximal.solve_paths(gram, cross, lams, holdout=out, patience=1, **limits)
    assert len(seen) > 1  # some targets stopped before others
    assert seen == sorted(set(seen))
    assert seen[-1] == (7, 7)
    seen.clear()
    proximal.solve(gram, cross, square, path.lam, start=path.weight, **limits)
    assert seen[-1] == (7, 7)


def test_no_targets_give_empty_results():
    gram, _, _, out = planted()
    none = np.empty((0, 100))
    limits = {"tol": 1e-4, "max_sweeps": 1000, "device": "cpu", "progress": None}
    own = lasso.Holdout(out.gram, none, np.empty(0))
    path = proximal.solve_paths(gram, none, np.empty((0, 20)), holdout=own, patience=2, **limits)
    assert path.weight.shape == (0, 100)
    assert proximal.solve(gram, none, np.empty(0), path.lam, start=path.weight, **limits).weight.shape == (0, 100)


def test_reduced_precision_that_the_process_allowed_is_kept_out_and_given_back():
    gram, cross, _, out = planted(np.float32)
    lams = lasso.lambda_grid(cross, n_lams=20, ratio=0.01)
    seen = []

    def note(done, total):
        if done < total:
            seen.append(torch.get_float32_matmul_precision())

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        limits = {"tol": 1e-4, "max_sweeps": 1000, "device": "cpu", "progress": note}
        proximal.solve_paths(gram, cross, lams, holdout=out, patience=1, **limits)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"highest"}, "while it solves"


def test_a_fit_on_a_device_is_the_fit_on_the_processors():
    rng = np.random.default_rng(2)
    masks = rng.random((600, 30)) < 0.5
    truth = rng.standard_normal((30, 6)) * (rng.random((30, 6)) < 0.4)
    outputs = masks @ truth + 0.5 * rng.standard_normal((600, 6))
    for how in ({}, {"is_positive": True}, {"folds": 3}, {"prior": truth + 0.1 * rng.standard_normal(truth.shape)}):
        here, there = fit(masks, outputs, tol=1e-4, **how), fit(masks, outputs, tol=1e-4, device="cpu", **how)
        same = there.lam == here.lam  # neighbours on the grid may be as good
        assert same.mean() > 0.8
        np.testing.assert_allclose(there.weight[:, same], here.weight[:, same], atol=1e-3)
        # one mixture is of all targets, so that it moves with any of those neighbours
        of_error = 1e-3 if "prior" in how else 1e-4
        np.testing.assert_allclose(there.validation_error, here.validation_error, rtol=of_error)
        assert (there.certificate.gap < 1e-4).all()
        assert there.prior_strength == (pytest.approx(here.prior_strength, abs=0.02) if "prior" in how else None)


@pytest.mark.parametrize("device", ["cuda:7", "nonsense", "meta:x"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(SpecError, match=f"device {device} cannot be used"):
        fit(np.ones((40, 2), bool), np.ones((40, 1)), device=device)
