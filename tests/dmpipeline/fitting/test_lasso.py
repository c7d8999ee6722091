import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Lasso

from dmpipeline.fitting.solvers import lasso


def standardised(n_rows, n_features, n_targets, *, seed, correlated=0.0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_rows, n_features)) + correlated * rng.standard_normal((n_rows, 1))
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    truth = rng.standard_normal((n_features, n_targets)) * (rng.random((n_features, n_targets)) < 0.3)
    y = x @ truth + 0.5 * rng.standard_normal((n_rows, n_targets))
    return x, y - y.mean(axis=0)


def moments(x, y, dtype=np.float64):
    n = len(x)
    return (x.T @ x / n).astype(dtype), np.ascontiguousarray(y.T @ x / n), (y**2).mean(axis=0)


def solved(x, y, lam, *, dtype=np.float64, tol=1e-6, max_sweeps=10_000, **penalty):
    gram, cross, square = moments(x, y, dtype)
    start = np.zeros(cross.shape)
    limits = {"tol": tol, "max_sweeps": max_sweeps, "threads": 2, "progress": None}
    return lasso.solve(gram, cross, square, lam, start=start, **limits, **penalty)


def path_of(x, y, x_out, y_out, *, patience=1000, **penalty):
    gram, cross, _ = moments(x, y)
    lams = lasso.lambda_grid(cross, n_lams=20, ratio=0.01, **penalty)
    path = lasso.solve_paths(
        gram,
        cross,
        lams,
        holdout=lasso.Holdout(*moments(x_out, y_out)),
        tol=1e-6,
        patience=patience,
        max_sweeps=10_000,
        threads=2,
        progress=None,
        **penalty,
    )
    return lams, path


def objective(x, y, w, lam):
    return ((y - x @ w) ** 2).mean() / 2 + lam * np.abs(w).sum()


@settings(max_examples=30, deadline=None)
@given(
    n_rows=st.integers(5, 80),
    n_features=st.integers(1, 30),
    share=st.floats(0.02, 0.9),
    correlated=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_weights_equal_those_of_scikit_learn(n_rows, n_features, share, correlated, seed):
    x, y = standardised(n_rows, n_features, 1, seed=seed, correlated=correlated)
    lam = np.abs(x.T @ y / n_rows).max(axis=0) * share
    got = solved(x, y, lam)
    oracle = Lasso(alpha=lam[0], fit_intercept=False, tol=1e-12, max_iter=1_000_000).fit(x, y[:, 0])
    best = objective(x, y[:, 0], oracle.coef_, lam[0])
    assert objective(x, y[:, 0], got.weight[0], lam[0]) <= best * (1 + 1e-6)
    assert got.kkt[0] <= 1.1e-6
    if n_rows > 2 * n_features:  # the minimum is then well marked
        np.testing.assert_allclose(got.weight[0], oracle.coef_, atol=1e-4 * lam[0])


@settings(max_examples=30, deadline=None)
@given(
    n_rows=st.integers(5, 80),
    n_features=st.integers(1, 30),
    share=st.floats(0.02, 0.9),
    correlated=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_weights_held_positive_equal_those_of_scikit_learn(n_rows, n_features, share, correlated, seed):
    x, y = standardised(n_rows, n_features, 1, seed=seed, correlated=correlated)
    lam = np.maximum((x.T @ y / n_rows).max(axis=0), 1e-3) * share
    got = solved(x, y, lam, is_positive=True)
    oracle = Lasso(alpha=lam[0], fit_intercept=False, positive=True, tol=1e-12, max_iter=1_000_000).fit(x, y[:, 0])
    best = objective(x, y[:, 0], oracle.coef_, lam[0])
    assert (got.weight >= 0).all()
    assert objective(x, y[:, 0], got.weight[0], lam[0]) <= best * (1 + 1e-6)
    assert got.kkt[0] <= 1.1e-6
    assert got.gap[0] < 1e-4


@settings(max_examples=30, deadline=None)
@given(
    n_rows=st.integers(20, 80),
    n_features=st.integers(1, 30),
    share=st.floats(0.02, 0.9),
    seed=st.integers(0, 10_000),
)
def test_penalty_factors_equal_a_change_of_units(n_rows, n_features, share, seed):
    x, y = standardised(n_rows, n_features, 2, seed=seed)
    factor = np.random.default_rng(seed).uniform(0.3, 3, (2, n_features))
    lam = share * np.abs((x.T @ y / n_rows).T / factor).max(axis=1)
    got = solved(x, y, lam, factor=factor)
    assert (got.kkt <= 1.1e-6).all()
    for t in range(2):
        scaled = x / factor[t]
        oracle = Lasso(alpha=lam[t], fit_intercept=False, tol=1e-12, max_iter=1_000_000).fit(scaled, y[:, t])
        best = objective(scaled, y[:, t], oracle.coef_, lam[t])
        assert objective(scaled, y[:, t], got.weight[t] * factor[t], lam[t]) <= best * (1 + 1e-6)
        gap, kkt = lasso.certify(*moments(x, y[:, [t]]), lam[[t]], got.weight[[t]], factor=factor[[t]])
        assert (gap[0], kkt[0]) == pytest.approx((got.gap[t], got.kkt[t]), abs=1e-12)


def test_a_path_with_penalty_factors_is_that_of_scaled_columns():
    x, y = standardised(80, 30, 3, seed=5)
    factor = np.random.default_rng(0).uniform(0.5, 2, (1, 30))
    lams, path = path_of(x[:50], y[:50], x[50:], y[50:], factor=factor)
    scaled_lams, scaled = path_of(x[:50] / factor, y[:50], x[50:] / factor, y[50:])
    np.testing.assert_allclose(lams, scaled_lams)
    np.testing.assert_array_equal(path.best, scaled.best)
    np.testing.assert_allclose(path.error, scaled.error, rtol=1e-5)
    np.testing.assert_allclose(path.weight * factor, scaled.weight, atol=1e-4)


def test_a_path_held_positive_stays_so_and_a_target_that_only_falls_is_silent():
    x, y = standardised(80, 30, 2, seed=5, correlated=1.0)
    y[:, 1] = -x.sum(axis=1)
    _, path = path_of(x, y, x, y, is_positive=True)
    assert (path.weight >= 0).all()
    assert path.weight[0].any()
    assert not path.weight[1].any()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.05, 0.9), sloppy=st.sampled_from([0.3, 0.03, 1e-3]))
def test_the_gap_bounds_the_distance_from_the_optimum(seed, share, sloppy):
    x, y = standardised(40, 15, 1, seed=seed, correlated=1.0)
    lam = np.abs(x.T @ y / 40).max(axis=0) * share
    rough = solved(x, y, lam, tol=sloppy)
    exact = solved(x, y, lam, tol=1e-9)
    excess = objective(x, y[:, 0], rough.weight[0], lam[0]) - objective(x, y[:, 0], exact.weight[0], lam[0])
    assert excess <= rough.gap[0] * (y**2).mean() + 1e-12
    assert rough.kkt[0] <= sloppy * 1.01


def test_certificates_of_wrong_weights_are_bad():
    x, y = standardised(100, 10, 2, seed=1)
    gram, cross, square = moments(x, y)
    lam = np.abs(cross).max(axis=1) / 5
    good = solved(x, y, lam)
    gap, kkt = lasso.certify(gram, cross, square, lam, good.weight + 0.1)
    assert (gap > 1e-3).all()
    assert (kkt > 0.1).all()
    np.testing.assert_array_equal(lasso.certify(gram, cross, square, lam, good.weight)[0], good.gap)


def test_the_certificate_equals_its_textbook_formula():
    x, y = standardised(60, 12, 1, seed=3)
    gram, cross, square = moments(x, y)
    lam = np.abs(cross).max(axis=1) / 4
    w = np.random.default_rng(0).standard_normal((1, 12)) * 0.2
    gap, kkt = lasso.certify(gram, cross, square, lam, w)
    residual = y[:, 0] - x @ w[0]
    slopes = x.T @ residual / 60
    dual = residual * min(1, lam[0] / np.abs(slopes).max())
    dual_value = (y[:, 0] ** 2).mean() / 2 - ((y[:, 0] - dual) ** 2).mean() / 2
    assert gap[0] == pytest.approx((objective(x, y[:, 0], w[0], lam[0]) - dual_value) / square[0], rel=1e-10)
    assert kkt[0] == pytest.approx(np.abs(slopes - lam[0] * np.sign(w[0])).max() / lam[0], rel=1e-10)


def test_a_path_keeps_the_grid_point_of_least_held_out_error():
    x, y = standardised(80, 30, 3, seed=5)
    x, x_out, y, y_out = x[:50], x[50:], y[:50], y[50:]
    lams, path = path_of(x, y, x_out, y_out)
    for t in range(3):
        oracle = [Lasso(alpha=lam, fit_intercept=False, tol=1e-10, max_iter=10**6).fit(x, y[:, t]) for lam in lams[t]]
        errors = [((y_out[:, t] - x_out @ fit.coef_) ** 2).mean() for fit in oracle]
        best = int(np.argmin(errors))
        assert path.lam[t] == lams[t, best]
        assert path.error[t, best] == pytest.approx(errors[best], rel=1e-4)
        np.testing.assert_allclose(path.weight[t], oracle[best].coef_, atol=1e-4)
        assert path.n_solved[t] == lams.shape[1]


def test_every_point_of_a_path_is_optimal_where_features_come_in_unforeseen():
    """A suppressor's own covariance with the target is nearly nothing: only the gradient tells when it is needed."""
    rng = np.random.default_rng(41)
    hidden = rng.standard_normal((400, 10))
    x = np.hstack([hidden + 0.3 * rng.standard_normal((400, 10)), hidden, rng.standard_normal((400, 20))])
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    y = (x[:, :10] - x[:, 10:20]) @ rng.uniform(1, 3, (10, 3)) + 0.1 * rng.standard_normal((400, 3))
    y -= y.mean(axis=0)
    gram, cross, square = moments(x, y)
    lams = lasso.lambda_grid(cross, n_lams=30, ratio=1e-3)
    limits = {"tol": 1e-8, "patience": 100, "max_sweeps": 100_000, "threads": 1, "progress": None}
    path = lasso.solve_paths(gram, cross, lams, holdout=lasso.Holdout(gram, cross, square), **limits)
    for t in range(3):
        for lam, error in zip(lams[t], path.error[t], strict=True):
            oracle = Lasso(alpha=lam, fit_intercept=False, tol=1e-12, max_iter=10**6).fit(x, y[:, t])
            assert error == pytest.approx(((y[:, t] - x @ oracle.coef_) ** 2).mean(), rel=1e-5)


def test_the_first_point_of_the_grid_silences_every_weight_and_the_second_does_not():
    x, y = standardised(50, 9, 4, seed=2)
    lams = lasso.lambda_grid(moments(x, y)[1], n_lams=30, ratio=0.01)
    assert not solved(x, y, lams[:, 0]).weight.any()
    assert solved(x, y, lams[:, 1]).weight.any(axis=1).all()
    np.testing.assert_allclose(lams[:, -1] / lams[:, 0], 0.01)


def test_a_path_stops_when_patience_runs_out():
    x, y = standardised(60, 20, 1, seed=7)
    _, path = path_of(x, y, x, -y, patience=3)  # the held-out rows say the opposite: the error rises from the start
    assert path.n_solved[0] == 4
    assert not path.weight.any()


def test_a_path_goes_on_while_the_error_has_hardly_risen():
    x, y = standardised(60, 20, 1, seed=7)
    gram, cross, square = moments(x, y)
    lams = lasso.lambda_grid(cross, n_lams=20, ratio=0.01)
    opposite = lasso.Holdout(gram, -cross, square)
    limits = {"tol": 1e-4, "patience": 3, "max_sweeps": 1000, "threads": 1, "progress": None}
    whole = lasso.solve_paths(gram, cross, lams, holdout=opposite, **limits | {"patience": 100}).error[0]
    for rise in (0.0, 0.5, 1.0, 100.0):
        path = lasso.solve_paths(gram, cross, lams, holdout=opposite, least_rise=rise, **limits)
        beyond = np.flatnonzero((whole > (1 + rise) * whole[0]) & (np.arange(20) >= 3))
        assert path.n_solved[0] == (beyond[0] + 1 if len(beyond) else 20)


def test_points_at_which_nothing_moves_yet_do_not_wear_patience_out():
    x, y = standardised(80, 30, 2, seed=5)
    gram, cross, square = moments(x, y)
    grid = lasso.lambda_grid(cross, n_lams=20, ratio=0.01)
    lams = np.hstack([grid[:, [0]] * 1.1 ** np.arange(8, 0, -1), grid])
    limits = {"tol": 1e-4, "patience": 3, "max_sweeps": 1000, "threads": 1, "progress": None}
    path = lasso.solve_paths(gram, cross, lams, holdout=lasso.Holdout(gram, cross, square), **limits)
    np.testing.assert_array_equal(path.error[:, :9], np.tile(square[:, None], 9))
    assert (path.best > 9).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_result_does_not_depend_on_threads_or_neighbours(dtype):
    x, y = standardised(120, 100, 7, seed=11, correlated=0.5)
    gram, cross, square = moments(x[:90], y[:90], dtype)
    held_out = moments(x[90:], y[90:], dtype)
    lams = lasso.lambda_grid(cross, n_lams=20, ratio=0.01)

    def weights(targets, threads):
        holdout = lasso.Holdout(held_out[0], held_out[1][targets], held_out[2][targets])
        path = lasso.solve_paths(
            gram,
            cross[targets],
            lams[targets],
            holdout=holdout,
            tol=1e-4,
            patience=5,
            max_sweeps=10_000,
            threads=threads,
            progress=None,
        )
        final = lasso.solve(
            gram,
            cross[targets],
            square[targets],
            path.lam,
            start=path.weight,
            tol=1e-5,
            max_sweeps=10_000,
            threads=threads,
            progress=None,
        )
        return np.vstack([path.weight, final.weight])

    whole = weights(slice(0, 7), threads=1)
    np.testing.assert_array_equal(weights(slice(0, 7), threads=5), whole)
    np.testing.assert_array_equal(weights(slice(3, 4), threads=2), whole[3::7])


def test_float32_agrees_with_float64():
    x, y = standardised(300, 80, 4, seed=13)
    lam = np.abs(moments(x, y)[1]).max(axis=1) / 20
    single, double = (solved(x, y, lam, dtype=dtype, tol=1e-4) for dtype in (np.float32, np.float64))
    assert single.weight.dtype == np.float32
    np.testing.assert_allclose(single.weight, double.weight, atol=2e-4 * lam.max())
    assert (single.gap < 1e-5).all()
    assert (single.kkt < 2e-4).all()


def test_more_features_than_rows_are_certified():
    x, y = standardised(30, 200, 3, seed=17)
    lam = np.abs(moments(x, y)[1]).max(axis=1) / 30
    got = solved(x, y, lam, dtype=np.float32, tol=1e-3)
    assert (got.gap < 1e-4).all()
    assert (got.kkt < 1.1e-3).all()
    assert ((got.weight != 0).sum(axis=1) > 5).all()


def test_duplicate_columns_share_a_solution_as_good_as_one():
    x, y = standardised(60, 8, 1, seed=19)
    lam = np.abs(moments(x, y)[1]).max(axis=1) / 10
    plain = solved(x, y, lam)
    doubled = solved(np.hstack([x, x]), y, lam)
    np.testing.assert_allclose(doubled.weight[0, :8] + doubled.weight[0, 8:], plain.weight[0], atol=1e-5)
    assert doubled.kkt[0] < 1.1e-6


def test_columns_and_targets_without_variance_get_zero_weights():
    x, y = standardised(60, 8, 2, seed=23)
    x[:, 5], y[:, 1] = 0, 0
    gram, cross, square = moments(x, y)
    lams = lasso.lambda_grid(cross, n_lams=10, ratio=0.1)
    assert not lams[1].any()
    path = lasso.solve_paths(
        gram,
        cross,
        lams,
        holdout=lasso.Holdout(gram, cross, square),
        tol=1e-4,
        patience=5,
        max_sweeps=1000,
        threads=1,
        progress=None,
    )
    assert not path.weight[:, 5].any()
    assert not path.weight[1].any()
    start = np.ones(cross.shape)
    final = lasso.solve(gram, cross, square, path.lam, start=start, tol=1e-4, max_sweeps=1000, threads=1, progress=None)
    assert not final.weight[:, 5].any()
    assert not final.weight[1].any()
    assert (final.gap[1], final.kkt[1]) == (0, 0)


def test_running_out_of_sweeps_shows_in_the_certificate():
    x, y = standardised(60, 90, 1, seed=29, correlated=2.0)
    lam = np.abs(moments(x, y)[1]).max(axis=1) / 100
    short, full = (solved(x, y, lam, tol=1e-4, max_sweeps=sweeps) for sweeps in (3, 10_000))
    assert short.kkt[0] > 1e-2
    assert full.kkt[0] < 1.1e-4


def test_progress_counts_every_target_once():
    x, y = standardised(40, 5, 6, seed=31)
    gram, cross, square = moments(x, y)
    seen = []
    lasso.solve(
        gram,
        cross,
        square,
        np.full(6, 0.1),
        start=np.zeros((6, 5)),
        tol=1e-3,
        max_sweeps=100,
        threads=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(i, 6) for i in range(1, 7)]
