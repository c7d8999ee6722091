import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from sklearn.datasets import load_diabetes

from dmpipeline.errors import SpecError
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.scoring.correlation import Ranker, lds, lds_interval, spearman, weighted_correlation
from dmpipeline.scoring.evaluation import evaluate, score
from dmpipeline.scoring.retrainings import noise_ceiling

QUICK = {"n_bootstraps": 100, "n_splits": 20, "level": 0.95, "seed": 0}


@settings(max_examples=100, deadline=None)
@given(data=st.data(), shape=hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=12))
def test_spearman_equals_scipys_with_ties(data, shape):
    values = hnp.arrays(np.float64, shape, elements=st.integers(-3, 3).map(float))
    a, b = data.draw(values), data.draw(values)
    got = spearman(a, b)
    for column in range(shape[1]):
        x, y = a[:, column], b[:, column]
        if len(np.unique(x)) < 2 or len(np.unique(y)) < 2:
            assert np.isnan(got[column])
        else:
            assert got[column] == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_lds_is_the_mean_of_spearmans_correlations():
    rng = np.random.default_rng(0)
    predicted, true = rng.standard_normal((2, 30, 7))
    expected = np.mean([stats.spearmanr(predicted[:, t], true[:, t]).statistic for t in range(7)])
    assert lds(predicted, true) == pytest.approx(expected)


def noisy(n_subsets, n_retrainings, n_targets, *, noise, seed=0):
    """True outputs of variance 1, and retrainings with noise of this deviation, rows of a subset adjacent."""
    rng = np.random.default_rng(seed)
    true = rng.standard_normal((n_subsets, n_targets))
    single = true[:, None] + noise * rng.standard_normal((n_subsets, n_retrainings, n_targets))
    return true, single.reshape(-1, n_targets)


@pytest.mark.parametrize(("n_retrainings", "noise"), [(10, 1.0), (10, 2.0), (5, 1.0), (2, 0.5)])
def test_the_ceiling_is_what_a_perfect_prediction_reaches(n_retrainings, noise):
    true, outputs = noisy(400, n_retrainings, 40, noise=noise)
    result = score(true, outputs, **QUICK)
    assert result.lds == pytest.approx(result.lds_ceiling, abs=0.02)
    reliability = 1 / (1 + noise**2 / n_retrainings)
    assert result.lds_ceiling == pytest.approx(np.sqrt(reliability), abs=0.02)


def test_single_retrainings_are_harder_to_foresee_than_their_average():
    true, outputs = noisy(200, 8, 20, noise=1.5)
    result = score(true, outputs, **QUICK)
    expected = np.mean([spearman(true, outputs[r::8]).mean() for r in range(8)])
    assert result.lds_single == pytest.approx(expected)
    assert result.lds_single < result.lds - 0.2


def test_the_ceiling_of_pure_noise_is_low_and_of_one_retraining_unknown():
    rng = np.random.default_rng(0)
    assert noise_ceiling(rng.standard_normal((300, 6, 30)), n_splits=20, seed=0).mean() < 0.25
    assert np.isnan(noise_ceiling(rng.standard_normal((30, 1, 5)), n_splits=20, seed=0)).all()
    assert score(rng.standard_normal((30, 5)), rng.standard_normal((30, 5)), **QUICK).as_dict()["lds_ceiling"] is None


def test_the_ratio_is_of_the_averages_and_needs_a_ceiling():
    result = score(*noisy(100, 4, 5, noise=1.0), **QUICK)
    assert result.as_dict()["lds_ratio"] == result.lds_ratio == result.lds / result.lds_ceiling
    assert score(*noisy(100, 1, 5, noise=1.0), **QUICK).as_dict()["lds_ratio"] is None


def test_errors_are_those_of_single_retrainings():
    true, outputs = noisy(50, 4, 6, noise=0.7)
    result = score(true, outputs, **QUICK)
    residual = outputs - np.repeat(true, 4, axis=0)
    assert result.mse == pytest.approx((residual**2).mean())
    np.testing.assert_allclose(result.target_r2, 1 - (residual**2).mean(axis=0) / outputs.var(axis=0))
    assert result.r2 == pytest.approx(result.target_r2.mean())


def test_the_interval_holds_the_estimate_and_its_width_is_that_of_fresh_subsets():
    runs = []
    for seed in range(40):
        true, outputs = noisy(60, 2, 3, noise=1.0, seed=seed)
        runs.append(score(true, outputs, **QUICK | {"seed": seed}))
    assert all(run.lds_low < run.lds < run.lds_high for run in runs)
    spread = np.std([run.lds for run in runs])
    width = np.mean([run.lds_high - run.lds_low for run in runs])
    assert width == pytest.approx(2 * 1.96 * spread, rel=0.35)


def test_ranks_of_resamples_equal_those_of_the_repeated_rows():
    rng = np.random.default_rng(0)
    predicted, true = rng.integers(0, 6, (2, 25, 3)).astype(float)
    rows = np.random.default_rng([5, 2]).multinomial(25, np.full(25, 1 / 25))
    again = np.repeat(np.arange(25), rows)
    expected = lds(predicted[again], true[again])
    result = score(predicted, true, n_bootstraps=1, n_splits=1, level=0.9, seed=5)
    assert result.lds_low == result.lds_high == pytest.approx(result.lds)  # one resample has no spread
    weight = rows.astype(float)
    got = weighted_correlation(Ranker.of(predicted).ranks(weight), Ranker.of(true).ranks(weight), weight)
    assert got.mean() == pytest.approx(expected)


def test_the_interval_is_that_of_resampled_rows_ranked_by_scipy():
    """Measures of 442 patients, full of ties, and a column of two values."""
    true = load_diabetes(scaled=False).data[:, :9]
    predicted = np.column_stack([true[:, 1:], true[:, 0] > 60])
    n_bootstraps = 40  # more than one batch, and not a whole number of them
    rng, scores = np.random.default_rng([1, 2]), []
    for _ in range(n_bootstraps):
        again = np.repeat(np.arange(len(true)), rng.multinomial(len(true), np.full(len(true), 1 / len(true))))
        pairs = [stats.spearmanr(predicted[again, t], true[again, t]).statistic for t in range(true.shape[1])]
        scores.append(np.mean(pairs))
    low, high = np.quantile(np.array(scores) - np.mean(scores), [0.05, 0.95])
    got = lds_interval(predicted, true, n_bootstraps=n_bootstraps, level=0.9, seed=1)
    assert got == pytest.approx((lds(predicted, true) + low, lds(predicted, true) + high), abs=1e-12)


def test_targets_that_never_vary_are_left_out_and_counted():
    true, outputs = noisy(40, 3, 5, noise=0.5)
    without = score(true[:, :4], outputs[:, :4], **QUICK)
    outputs[:, 4] = 7
    result = score(true, outputs, **QUICK)
    assert result.n_constant == 1
    assert np.isnan(result.target_lds[4])
    for name in ("lds", "lds_low", "lds_high", "lds_single", "lds_ceiling", "mse", "r2"):
        assert getattr(result, name) == pytest.approx(getattr(without, name)), name


def test_a_datamodel_that_always_predicts_the_same_counts_as_zero():
    true, outputs = noisy(40, 2, 2, noise=0.1)
    true[:, 1] = 3
    result = score(true, outputs, **QUICK)
    assert result.target_lds[1] == result.target_lds_single[1] == 0
    assert result.lds == pytest.approx(result.target_lds[0] / 2)
    assert result.n_constant == 0


def test_nothing_that_varies_gives_no_score_and_no_warning():
    facts = score(np.ones((5, 2)), np.ones((10, 2)), **QUICK).as_dict()
    assert facts["lds"] is facts["r2"] is facts["lds_low"] is None
    assert facts["n_constant"] == 2


def datamodels_of(n_train=12, n_targets=3, seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((n_train, n_targets)).astype(np.float32)
    return Datamodels(weight=weight, bias=np.ones(n_targets, np.float32), lam=np.ones(n_targets, np.float32))


def held_out(datamodels, n_subsets=30, n_retrainings=4, seed=1):
    rng = np.random.default_rng(seed)
    masks = np.repeat(rng.random((n_subsets, datamodels.n_train)) < 0.5, n_retrainings, axis=0)
    noise = 0.3 * rng.standard_normal((len(masks), datamodels.n_targets))
    return masks, (datamodels.predict(masks) + noise).astype(np.float16)


def test_datamodels_are_scored_on_their_own_held_out_rows():
    datamodels = datamodels_of()
    masks, outputs = held_out(datamodels)
    result = evaluate(datamodels, masks, outputs, n_retrainings=4)
    averages = outputs.astype(float).reshape(30, 4, 3).mean(axis=1)
    assert result.lds == pytest.approx(lds(datamodels.predict(masks[::4]), averages))
    assert result.mse == pytest.approx(0.09, rel=0.25)
    assert (result.n_subsets, result.n_retrainings, result.n_targets) == (30, 4, 3)
    again = evaluate(datamodels, masks, outputs, n_retrainings=4)
    assert again.as_dict() == result.as_dict()


def test_the_scores_are_json_with_the_promised_names():
    datamodels = datamodels_of()
    facts = json.loads(json.dumps(evaluate(datamodels, *held_out(datamodels), n_retrainings=4).as_dict()))
    assert {"lds", "lds_ceiling", "mse", "r2"} <= facts.keys()
    assert all(isinstance(value, float | int) for value in facts.values())


def test_rows_that_are_not_retrainings_of_one_subset_are_refused():
    datamodels = datamodels_of()
    masks, outputs = held_out(datamodels)
    with pytest.raises(SpecError, match="not whole groups of 7"):
        evaluate(datamodels, masks, outputs, n_retrainings=7)
    with pytest.raises(SpecError, match="rows 0 to 8 hold different masks"):
        evaluate(datamodels, masks, outputs, n_retrainings=8)


def test_what_cannot_be_scored_is_refused():
    datamodels = datamodels_of()
    masks, outputs = held_out(datamodels)
    with pytest.raises(SpecError, match="do not fit datamodels of 12 examples"):
        evaluate(datamodels, masks[:, :11], outputs, n_retrainings=4)
    with pytest.raises(SpecError, match="at least 3 subsets"):
        evaluate(datamodels, masks[:8], outputs[:8], n_retrainings=4)
    outputs[5, 1] = np.inf
    with pytest.raises(SpecError, match="not finite"):
        evaluate(datamodels, masks, outputs, n_retrainings=4)
    with pytest.raises(SpecError, match=r"level 1.0"):
        score(np.ones((5, 2)), np.ones((5, 2)), **QUICK | {"level": 1.0})
