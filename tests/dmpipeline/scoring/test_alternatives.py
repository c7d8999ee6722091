import functools
import json

import numpy as np
import pytest
from sklearn.linear_model import Lasso, LinearRegression, Ridge

from dmpipeline.errors import ConvergenceError, SpecError
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.fitting.fitting import fit_moments
from dmpipeline.moments.moments import Moments
from dmpipeline.scoring.alternatives import compare, debiased, difference_of_means, ridge

positive = functools.partial(fit_moments, is_positive=True)

QUICK = {"n_bootstraps": 50, "n_splits": 10}


def planted(n_models=800, n_train=40, n_targets=5, *, noise=0.5, offset=3.0, dtype=np.float32, seed=0):
    """Masks of half the examples, outputs that are sparse sums over them, and the weights of these sums."""
    rng = np.random.default_rng(seed)
    masks = rng.random((n_models, n_train)).argsort(axis=1) < n_train // 2
    truth = np.zeros((n_train, n_targets))
    for t in range(n_targets):
        truth[rng.choice(n_train, 5, replace=False), t] = rng.choice([-1, 1], 5) * rng.uniform(1, 2, 5)
    outputs = masks @ truth + offset + noise * rng.standard_normal((n_models, n_targets))
    return masks, outputs.astype(dtype), truth


def with_oddities(masks, outputs):
    """Hold example 3 in all subsets and 7 in none, make 9 a duplicate of 8, and target 1 constant."""
    masks, outputs = masks.copy(), outputs.copy()
    masks[:, 3], masks[:, 7], masks[:, 9] = True, False, masks[:, 8]
    outputs[:, 1] = outputs[0, 1]
    return masks, outputs


def halves(masks, outputs, n_fit):
    return Moments.of(masks, outputs, stop=n_fit), Moments.of(masks, outputs, start=n_fit)


def standardised(masks, rows=slice(None)):
    mean, scale = masks[rows].mean(axis=0), masks[rows].std(axis=0)
    return np.divide(masks - mean, scale, out=np.zeros(masks.shape), where=scale > 0)


PROBLEMS = {
    "as planted": lambda: planted(),
    "with oddities": lambda: with_oddities(*planted()[:2]),
    "fewer models than examples": lambda: planted(60, 90, noise=0.1),
    "far from zero": lambda: with_oddities(*planted(offset=1e5)[:2]),  # float32 there has steps of 1/128
    "half precision": lambda: planted(dtype=np.float16),
}


@pytest.fixture(params=PROBLEMS)
def problem(request):
    masks, outputs, *_ = PROBLEMS[request.param]()
    return masks, outputs, halves(masks, outputs, len(masks) * 4 // 5)


def assert_predicts(datamodels, masks, expected):
    """Compare predictions in float64, apart from what float32 must round off a large bias."""
    predicted = masks @ datamodels.weight.astype(np.float64) + datamodels.bias
    np.testing.assert_allclose(predicted, expected, rtol=1e-6, atol=2e-3)


def assert_zero_where_nothing_varies(datamodels, masks, outputs):
    assert not datamodels.weight[masks.std(axis=0) == 0].any()
    is_constant = (outputs == outputs[0]).all(axis=0)
    assert not datamodels.weight[:, is_constant].any()
    np.testing.assert_allclose(datamodels.bias[is_constant], outputs[0, is_constant], rtol=1e-6)


def test_ridge_equals_scikit_learns_on_all_rows_at_the_lam_chosen(problem):
    masks, outputs, parts = problem
    dm = ridge(*parts)
    x = standardised(masks)
    assert dm.weight.dtype == dm.bias.dtype == dm.lam.dtype == np.float32
    assert dm.certificate is None
    for t in range(outputs.shape[1]):
        oracle = Ridge(alpha=len(x) * float(dm.lam[t])).fit(x, outputs[:, t].astype(float))
        np.testing.assert_allclose(dm.weight[:, t] * masks.std(axis=0), oracle.coef_, atol=2e-5)
        assert_predicts(Datamodels(dm.weight[:, [t]], dm.bias[[t]], dm.lam[[t]]), masks, oracle.predict(x)[:, None])
    assert_zero_where_nothing_varies(dm, masks, outputs)


def test_ridge_chooses_the_lam_of_least_error_on_the_held_out_rows():
    masks, outputs, _ = planted(300, 60, noise=2.0)
    outputs[:, 4] = np.random.default_rng(1).standard_normal(300)  # nothing to explain
    dm = ridge(*halves(masks, outputs, 240), n_lams=13)
    x, grid = standardised(masks, slice(240)), 60 / 240 * np.geomspace(1e3, 1e-3, 13)
    for t in range(5):
        fits = [Ridge(alpha=240 * lam).fit(x[:240], outputs[:240, t].astype(float)) for lam in grid]
        errors = [((fitted.predict(x[240:]) - outputs[240:, t]) ** 2).mean() for fitted in fits]
        assert dm.lam[t] == pytest.approx(grid[np.argmin(errors)])
        assert dm.validation_error[t] == pytest.approx(min(errors), rel=1e-5)
    assert len(set(dm.lam)) > 1
    assert dm.lam[4] > dm.lam[:4].max()


def test_ridge_is_exact_where_lam_is_far_below_what_float32_resolves():
    masks, outputs, _ = planted(200_000, 8, 2, noise=1e-4)  # subsets of one size: singular
    dm = ridge(*halves(masks, outputs, 150_000))
    assert dm.lam.max() < 1e-6
    x = standardised(masks)
    for t in range(2):
        oracle = Ridge(alpha=len(x) * float(dm.lam[t]), solver="svd").fit(x, outputs[:, t].astype(float))
        np.testing.assert_allclose(dm.weight[:, t] * masks.std(axis=0), oracle.coef_, atol=1e-5)


def test_targets_beyond_one_part_are_fitted_alike():
    masks, outputs, _ = planted(n_targets=7)
    parts = halves(masks, outputs, 640)
    lasso = fit_moments(*parts)
    estimators = (
        functools.partial(ridge, *parts),
        functools.partial(debiased, lasso, sum_of(parts)),
        functools.partial(difference_of_means, parts[0]),
    )
    for estimate in estimators:
        np.testing.assert_allclose(estimate(block_targets=3).weight, estimate().weight, atol=1e-6)


def sum_of(parts):
    return parts[0] + parts[1]


def test_debiased_weights_are_least_squares_on_the_support(problem):
    masks, outputs, parts = problem
    lasso = fit_moments(*parts)
    dm = debiased(lasso, sum_of(parts))
    assert dm.certificate is dm.validation_error is None
    np.testing.assert_array_equal(dm.lam, lasso.lam)
    for t in range(outputs.shape[1]):
        support = np.flatnonzero(lasso.weight[:, t])
        assert not np.delete(dm.weight[:, t], support).any()
        if len(support):
            x = masks[:, support].astype(float)
            if np.linalg.matrix_rank(x - x.mean(axis=0)) == len(support):
                oracle = LinearRegression().fit(x, outputs[:, t].astype(float))
                np.testing.assert_allclose(dm.weight[support, t], oracle.coef_, atol=2e-4)
                own = Datamodels(dm.weight[:, [t]], dm.bias[[t]], dm.lam[[t]])
                assert_predicts(own, masks, oracle.predict(x)[:, None])
    assert_zero_where_nothing_varies(dm, masks, outputs)


def on_support(n_train, support, n_targets=1):
    weight = np.zeros((n_train, n_targets), np.float32)
    weight[support] = 1
    return Datamodels(weight, np.zeros(n_targets, np.float32), np.ones(n_targets, np.float32))


def test_dependent_columns_of_a_support_get_the_least_squares_answer_of_least_norm():
    masks, outputs, _ = planted(500, 30, 1)
    masks[:, 9] = masks[:, 8]
    masks[:, 11] = ~masks[:, 10]  # as dependent as a duplicate, once centred
    moments = Moments.of(masks, outputs)
    support = [2, 8, 9, 10, 11, 20]
    dm = debiased(on_support(30, support), moments)
    x, y = standardised(masks)[:, support], outputs[:, 0].astype(float)
    oracle = np.linalg.lstsq(x, y - y.mean(), rcond=1e-8)[0]
    np.testing.assert_allclose(dm.weight[support, 0] * masks.std(axis=0)[support], oracle, atol=1e-5)
    assert dm.weight[8, 0] == pytest.approx(dm.weight[9, 0], rel=1e-4)
    single = debiased(on_support(30, [2, 8, 10, 20]), moments)
    assert_predicts(dm, masks, masks @ single.weight.astype(float) + single.bias)


def test_a_support_of_more_columns_than_rows_is_interpolated():
    masks, outputs, _ = planted(30, 50, 2)
    dm = debiased(on_support(50, np.arange(50), 2), Moments.of(masks, outputs))
    assert_predicts(dm, masks, outputs)
    x, y = standardised(masks), outputs[:, 0].astype(float)
    oracle = np.linalg.lstsq(x, y - y.mean(), rcond=1e-8)[0]
    np.testing.assert_allclose(dm.weight[:, 0] * masks.std(axis=0), oracle, atol=1e-4)


def test_examples_of_a_support_that_never_vary_get_weight_zero():
    masks, outputs, _ = planted(300, 20, 1)
    masks[:, 3] = True
    dm = debiased(on_support(20, [2, 3]), Moments.of(masks, outputs))
    assert dm.weight[3, 0] == 0
    oracle = LinearRegression().fit(masks[:, [2]].astype(float), outputs[:, 0].astype(float))
    assert dm.weight[2, 0] == pytest.approx(oracle.coef_[0], rel=1e-5)


def test_positive_weights_equal_scikit_learns_on_all_rows_at_the_lam_chosen(problem):
    masks, outputs, parts = problem
    dm = positive(*parts, tol=1e-5)
    x = standardised(masks)
    assert (dm.weight >= 0).all()
    assert dm.weight.any()
    assert (dm.certificate.gap < 1e-4).all()
    for t in np.flatnonzero((outputs != outputs[0]).any(axis=0)):
        y = outputs[:, t].astype(float)
        oracle = Lasso(alpha=float(dm.lam[t]), positive=True, tol=1e-8, max_iter=10**6).fit(x, y - y.mean())
        # where duplicates or few rows leave several optima, their predictions agree
        predicted = x @ (dm.weight[:, t] * masks.std(axis=0))
        np.testing.assert_allclose(predicted, oracle.predict(x), atol=5e-3 * y.std())
    assert_zero_where_nothing_varies(dm, masks, outputs)


def test_the_grid_of_positive_weights_begins_at_the_largest_positive_covariance():
    masks, outputs, _ = planted(n_targets=3)
    fitting, held_out = halves(masks, outputs, 640)
    dm = positive(fitting, held_out, n_lams=1)
    y = outputs[:640].astype(float)
    covariance = standardised(masks[:640]).T @ (y - y.mean(axis=0)) / 640
    np.testing.assert_allclose(dm.lam, covariance.max(axis=0), rtol=1e-5)
    assert (np.abs(covariance).max(axis=0) > 1.01 * covariance.max(axis=0)).any()


def test_a_target_that_only_negative_weights_would_explain_is_silenced_and_certified():
    rng = np.random.default_rng(0)
    masks = rng.random((400, 3)) < 0.5
    outputs = -(masks @ np.array([[1.0, 2.0], [1.5, 1.0], [1.0, 3.0]])) + 0.1 * rng.standard_normal((400, 2))
    dm = positive(*halves(masks, outputs, 320))
    assert not dm.weight.any()
    np.testing.assert_allclose(dm.bias, outputs.mean(axis=0), rtol=1e-6)
    assert (dm.lam == 0).all()
    assert (dm.certificate.kkt == 0).all()
    np.testing.assert_allclose(
        dm.validation_error, ((outputs[320:] - outputs[:320].mean(axis=0)) ** 2).mean(axis=0), rtol=1e-6
    )


def test_positive_weights_keep_the_manners_of_a_fit():
    masks, outputs, _ = planted(200, 20, 2)
    parts = halves(masks, outputs, 160)
    few = {"tol": 1e-12, "n_lams": 3}  # beyond what float32 can reach
    with pytest.warns(RuntimeWarning, match="did not reach tol") as warned:
        positive(*parts, **few)
    assert warned[0].filename == __file__
    with pytest.raises(ConvergenceError):
        positive(*parts, strict=True, **few)
    seen = []
    positive(*parts, progress=lambda stage, done, total: seen.append((stage, done, total)))
    assert seen[-1] == ("refit", 2, 2)


def test_differences_of_means_are_those_of_the_models_with_and_without_an_example(problem):
    masks, outputs, parts = problem
    dm = difference_of_means(sum_of(parts))
    y = outputs.astype(float)
    for j in np.flatnonzero(masks.std(axis=0)):
        expected = y[masks[:, j]].mean(axis=0) - y[~masks[:, j]].mean(axis=0)
        np.testing.assert_allclose(dm.weight[j], expected, atol=1e-6)
    predicted = masks @ dm.weight.astype(float) + dm.bias
    np.testing.assert_allclose(predicted.mean(axis=0), y.mean(axis=0), rtol=1e-6)
    assert_zero_where_nothing_varies(dm, masks, outputs)
    assert not dm.lam.any()


def held_out_models(truth, n_subsets=60, n_retrainings=4, *, noise, seed=1):
    rng = np.random.default_rng(seed)
    masks = np.repeat(rng.random((n_subsets, len(truth))) < 0.5, n_retrainings, axis=0)
    outputs = masks @ truth + 3 + noise * rng.standard_normal((len(masks), truth.shape[1]))
    return masks, outputs.astype(np.float32)


@pytest.fixture(scope="module")
def compared():
    masks, outputs, truth = planted(400, 100, 6, noise=1.0)
    parts = halves(masks, outputs, 320)
    lasso = fit_moments(*parts)
    estimates = {
        "LASSO": lasso,
        "debiased": debiased(lasso, sum_of(parts)),
        "ridge": ridge(*parts),
        "positive": positive(*parts),
        "difference of means": difference_of_means(sum_of(parts)),
    }
    return compare(estimates, *held_out_models(truth, noise=1.0), n_retrainings=4, **QUICK)


def test_where_few_examples_matter_sparse_estimates_beat_the_difference_of_means(compared):
    lds = {row["name"]: row["lds"] for row in compared.as_rows()}
    r2 = {row["name"]: row["r2"] for row in compared.as_rows()}
    for name in ("LASSO", "debiased"):
        assert lds[name] > lds["difference of means"] + 0.1
        assert lds[name] > lds["ridge"]
        assert r2[name] > r2["difference of means"]
    assert lds["LASSO"] > lds["positive"] + 0.1  # half the weights are negative


def test_rows_are_json_with_the_scores_of_each_evaluation(compared):
    rows = json.loads(json.dumps(compared.as_rows()))
    assert [row["name"] for row in rows] == list(compared.evaluations)
    for row in rows:
        evaluation = compared.evaluations[row["name"]]
        for name in ("lds", "lds_low", "lds_high", "lds_ratio", "r2", "mse"):
            assert row[name] == getattr(evaluation, name)
        assert row["lds_ratio"] == evaluation.lds / evaluation.lds_ceiling
    assert rows[0]["nonzero_weights"] == rows[1]["nonzero_weights"] < rows[2]["nonzero_weights"] == 100


def test_a_comparison_prints_a_line_for_each_estimate(compared):
    header, *lines = str(compared).splitlines()
    assert " ".join(header.split()) == "estimate LDS 95% interval of its ceiling R2 MSE nonzero weights"
    assert [line.split("  ")[0].strip() for line in lines] == list(compared.evaluations)
    scores = compared.evaluations["LASSO"]
    assert f"{scores.lds:.3f}  {scores.lds_low:.3f} to {scores.lds_high:.3f}" in lines[0]
    assert repr(compared) == "<Comparison: LASSO, debiased, ridge, positive, difference of means>"


def test_held_out_models_are_read_once_and_names_are_shown_as_they_are():
    _, _, truth = planted(10, 12, 2)
    masks, outputs = held_out_models(truth, 20, 1, noise=0.1)
    perfect = Datamodels(truth.astype(np.float32), np.full(2, 3, np.float32), np.zeros(2, np.float32))

    class Counted:
        def __init__(self, array):
            self.array, self.shape, self.n_reads = array, array.shape, 0

        def __getitem__(self, rows):
            self.n_reads += 1
            return self.array[rows]

    arrays = Counted(masks), Counted(outputs)
    result = compare({"[bold] :star:": perfect, "b": perfect}, *arrays, **QUICK)
    assert [array.n_reads for array in arrays] == [1, 1]
    assert "[bold] :star:" in str(result)
    assert result.as_rows()[0]["lds_ratio"] is None  # a single retraining has no ceiling
    assert "not defined" in str(result)


def test_what_cannot_be_fitted_or_compared_is_refused():
    masks, outputs, _ = planted(100, 10, 2)
    fitting, held_out = halves(masks, outputs, 80)
    other = Moments.of(masks[:, :9], outputs)
    for estimate in (ridge, positive):
        with pytest.raises(SpecError, match=r"\(10, 2\) and \(9, 2\)"):
            estimate(fitting, other)
        with pytest.raises(SpecError, match="n_lams is 0"):
            estimate(fitting, held_out, n_lams=0)
        with pytest.raises(SpecError, match="threads is 0"):
            estimate(fitting, held_out, threads=0)
    with pytest.raises(SpecError, match=r"moments of \(9, 2\) .* do not fit datamodels of \(10, 2\)"):
        debiased(difference_of_means(fitting), other)
    with pytest.raises(SpecError, match="no estimates"):
        compare({}, masks, outputs)
