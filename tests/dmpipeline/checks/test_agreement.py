import numpy as np
import pytest
from scipy.stats import ks_2samp

from dmpipeline.checks.agreement import compare_outputs, rms_shape_margin, shape_margin
from dmpipeline.checks.samples import _least
from dmpipeline.errors import SpecError

N_TARGETS = 40


def ensemble(n_models, seed, *, n_targets=N_TARGETS, shift=0.0, stretch=1.0):
    """Draw outputs of models that depend on each other over targets, some of them with heavy tails."""
    rng = np.random.default_rng(seed)
    loadings = np.random.default_rng(99).standard_normal((4, n_targets))
    outputs = rng.standard_normal((n_models, 4)) @ loadings + rng.standard_normal((n_models, n_targets))
    outputs[:, : n_targets // 2] += rng.standard_t(5, (n_models, n_targets // 2))
    unit = ensemble_deviation(n_targets)
    return (outputs * stretch + shift * unit + np.arange(n_targets)).astype(np.float32)


def ensemble_deviation(n_targets=N_TARGETS):
    loadings = np.random.default_rng(99).standard_normal((4, n_targets))
    variance = (loadings**2).sum(0) + 1
    variance[: n_targets // 2] += 5 / 3
    return np.sqrt(variance)


def failed(agreement):
    return {finding.check for finding in agreement.findings if not finding.passed}


def finding(agreement, check):
    return next(found for found in agreement.findings if found.check == check)


def test_equal_ensembles_are_called_different_in_at_most_a_twentieth_of_draws():
    n_draws = 30
    verdicts = [
        compare_outputs(ensemble(60, 2 * i), ensemble(90, 2 * i + 1), n_permutations=199, seed=i).verdict
        for i in range(n_draws)
    ]
    # six of thirty and more have a probability of 0.3% where the share is a twentieth
    assert verdicts.count("differs") < 6


def test_something_is_detected_between_equal_ensembles_in_at_most_a_twentieth_of_draws():
    """The margin hides false alarms: without one, those of the simultaneous intervals must be as rare as promised."""
    n_draws = 40
    alarms = sum(
        compare_outputs(ensemble(80, 2 * i), ensemble(80, 2 * i + 1), n_permutations=199, seed=i).is_detected.any()
        for i in range(n_draws)
    )
    # of a binomial count with a share of 5%, more than 7 has a probability of 0.1%
    assert alarms <= 7


def test_large_equal_ensembles_agree_and_every_aggregate_is_bounded_within_its_margin():
    agreement = compare_outputs(ensemble(2000, 1), ensemble(2000, 2))
    assert agreement.verdict == "agrees"
    assert agreement.factor == 1
    for check in ("rms_shift", "rms_spread", "rms_shape"):
        found = finding(agreement, check)
        assert 0 <= found.low <= found.effect <= found.high < found.margin


def test_small_equal_ensembles_are_undecided_and_the_data_that_would_decide_is_foreseen():
    small = compare_outputs(ensemble(40, 1), ensemble(40, 2))
    assert small.verdict == "undecided"
    assert small.factor > 5
    n_models = round(40 * small.factor * 2)
    assert compare_outputs(ensemble(n_models, 3), ensemble(n_models, 4)).verdict == "agrees"


def test_a_shift_beyond_the_margin_differs_and_its_size_is_estimated():
    agreement = compare_outputs(ensemble(1500, 1), ensemble(1500, 2, shift=0.3))
    assert agreement.verdict == "differs"
    found = finding(agreement, "rms_shift")
    assert found.low < 0.3 < found.high
    assert found.effect == pytest.approx(0.3, abs=0.05)
    assert agreement.shift.mean() == pytest.approx(-0.3, abs=0.08)


def test_a_difference_that_is_detected_within_the_margin_passes_and_is_told():
    agreement = compare_outputs(ensemble(12_000, 1), ensemble(12_000, 2, shift=0.06))
    assert agreement.verdict == "agrees"
    found = finding(agreement, "location")
    assert found.passed
    assert found.high < 0
    assert "a smaller difference is sure of" in found.detail
    assert agreement.is_detected.mean() > 0.5


def test_another_spread_is_found_and_a_mean_that_is_the_same_is_not_blamed():
    agreement = compare_outputs(ensemble(1500, 1), ensemble(1500, 2, stretch=1.3) * 1.0)
    assert agreement.verdict == "differs"
    assert "spread" in failed(agreement)
    assert agreement.log_ratio.mean() == pytest.approx(-np.log(1.3), abs=0.04)


def test_one_target_of_many_that_differs_is_named_by_its_number():
    theirs = ensemble(800, 2)
    theirs[:, 7] += 2
    agreement = compare_outputs(ensemble(800, 1), theirs, numbers=np.arange(N_TARGETS) + 100)
    assert "location" in failed(agreement)
    assert "of target 107 the mean output differs by" in finding(agreement, "location").detail
    assert "one of 40 targets (107)" in finding(agreement, "location").detail


def test_another_shape_with_the_same_mean_and_spread_is_found():
    rng = np.random.default_rng(0)
    normal, two_humps = rng.standard_normal((1500, 6)), rng.choice([-1.0, 1.0], (1500, 6))
    agreement = compare_outputs(normal, two_humps + 0.01 * rng.standard_normal((1500, 6)))
    assert {"shape", "rms_shape"} <= failed(agreement)
    assert not {"location", "spread"} & failed(agreement)


def test_distances_are_those_of_scipy_where_values_repeat_too():
    ours, theirs = ensemble(70, 1).round(), ensemble(50, 2).round()
    agreement = compare_outputs(ours, theirs)
    expected = [ks_2samp(ours[:, i], theirs[:, i]).statistic for i in range(N_TARGETS)]
    np.testing.assert_allclose(agreement.distance, expected, atol=1e-6)


def test_a_permutation_takes_as_many_models_though_the_numbers_that_order_them_repeat():
    numbers = np.random.default_rng(0).integers(0, 12, (50, 30)).astype(np.float32)
    labels = _least(numbers, 13)
    assert set(np.unique(labels)) == {0, 1}
    assert (labels.sum(axis=1) == 13).all()
    taken, left = np.where(labels == 1, numbers, -1).max(axis=1), np.where(labels == 0, numbers, 99).min(axis=1)
    assert (taken <= left).all()


def test_shifts_and_errors_are_those_of_welch():
    ours, theirs = ensemble(70, 1).astype(float), ensemble(50, 2, stretch=2).astype(float)
    agreement = compare_outputs(ours, theirs)
    unit = np.sqrt((ours.var(0, ddof=1) + theirs.var(0, ddof=1)) / 2)
    np.testing.assert_allclose(agreement.shift, (ours.mean(0) - theirs.mean(0)) / unit, atol=1e-4)
    error = np.sqrt(ours.var(0, ddof=1) / 70 + theirs.var(0, ddof=1) / 50) / unit
    np.testing.assert_allclose(agreement.shift_error, error, rtol=1e-3)


def test_retrainings_of_a_subset_do_not_count_as_models_of_their_own():
    rng = np.random.default_rng(3)
    subsets = np.repeat(np.arange(60), 5)
    ours, theirs = ensemble(60, 1)[subsets], ensemble(60, 2)[subsets]
    ours += 0.1 * rng.standard_normal(ours.shape).astype(np.float32)
    theirs += 0.1 * rng.standard_normal(theirs.shape).astype(np.float32)
    grouped = compare_outputs(ours, theirs, subsets, subsets)
    assert (grouped.n_ours, grouped.n_theirs) == (60, 60)
    assert grouped.verdict == "undecided"
    wrongly = compare_outputs(ours, theirs)
    assert (wrongly.shift_error < 0.5 * grouped.shift_error).all()


def test_the_larger_problem_is_bounded_without_permutations_and_as_conservatively(monkeypatch):
    ours, theirs = ensemble(100, 1), ensemble(100, 2)
    permuted = finding(compare_outputs(ours, theirs), "location")
    monkeypatch.setattr("dmpipeline.checks.samples._MOST_WORK", 0)
    bounded = finding(compare_outputs(ours, theirs), "location")
    assert bounded.high - bounded.low >= 0.9 * (permuted.high - permuted.low)


def test_a_target_that_never_varies_agrees_with_itself_and_with_no_other_value():
    ours, theirs = ensemble(60, 1), ensemble(60, 2)
    ours[:, 3] = theirs[:, 3] = 5
    assert "location" not in failed(compare_outputs(ours, theirs))
    theirs[:, 3] = 5.5
    assert "of target 3 " in finding(compare_outputs(ours, theirs), "location").detail
    assert compare_outputs(ours, theirs).verdict == "differs"


def test_margins_of_shape_are_what_a_shift_makes_of_a_normal_law():
    x = np.linspace(-8, 8, 200_001)
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    below = np.cumsum(density) * (x[1] - x[0])
    shifted = np.interp(x - 0.1, x, below)
    assert shape_margin(0.1) == pytest.approx(np.abs(below - shifted).max(), rel=1e-3)
    square = ((below - shifted) ** 2 * density).sum() * (x[1] - x[0])
    assert rms_shape_margin(0.1) == pytest.approx(np.sqrt(square), rel=2e-2)


@pytest.mark.parametrize(
    ("ours", "theirs", "options", "said"),
    [
        (ensemble(30, 1), ensemble(30, 2)[:, :5], {}, "the same targets"),
        (ensemble(30, 1), ensemble(5, 2), {}, "too few to compare"),
        (ensemble(30, 1), np.full((30, N_TARGETS), np.nan), {}, "not all finite"),
        (ensemble(30, 1), ensemble(30, 2), {"margin": 0}, "choose more than 0"),
        (ensemble(30, 1), ensemble(30, 2), {"level": 0.7}, "between 0 and 0.5"),
        (ensemble(30, 1), ensemble(30, 2), {"our_groups": np.zeros(4)}, "do not fit 30 models"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_what_to_do(ours, theirs, options, said):
    with pytest.raises(SpecError, match=said):
        compare_outputs(ours, theirs, **options)


def test_without_permutations_bounds_are_bonferronis():
    agreement = compare_outputs(ensemble(60, 1), ensemble(60, 2), n_permutations=0)
    assert agreement.verdict in ("agrees", "undecided")
    assert not agreement.is_detected.any()
