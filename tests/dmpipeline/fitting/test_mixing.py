import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmpipeline.fitting.guides.mixing import Agreement, best_mixture


def agreement_of(predictions, truth, square_fitted=None):
    """Take it of rows held out: predictions (n_fits, n_rows, n_targets)."""
    n = len(truth)
    among = np.einsum("int,jnt->tij", predictions, predictions) / n
    square = np.square(truth).mean(axis=0)
    fitted = square if square_fitted is None else square_fitted
    return Agreement(among, np.einsum("int,nt->ti", predictions, truth) / n, square, fitted)


def several(seed, n_fits=4, n_rows=60, n_targets=7):
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal((n_rows, n_targets)) * rng.uniform(0.1, 10, n_targets)
    noise = rng.uniform(0.1, 3, (n_fits, 1, 1)) * rng.standard_normal((n_fits, n_rows, n_targets)) * truth.std(axis=0)
    return truth + noise, truth


def shares(agreement, mixture):
    return float(np.mean(agreement.error(np.asarray(mixture)) / agreement.square))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), n_fits=st.integers(1, 6))
def test_a_mixture_has_no_negative_part_and_predicts_no_worse_than_the_first(seed, n_fits):
    predictions, truth = several(seed, n_fits)
    agreement = agreement_of(predictions, truth)
    mixture = best_mixture(agreement, len(truth))
    assert mixture.shape == (n_fits,)
    assert (mixture >= 0).all()
    assert shares(agreement, mixture) <= shares(agreement, np.eye(n_fits)[0]) * (1 + 1e-9)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_on_the_validation_rows_a_mixture_is_about_as_good_as_the_best_of_what_it_is_made_of(seed):
    predictions, truth = several(seed)
    agreement = agreement_of(predictions, truth)
    best = min(shares(agreement, alone) for alone in np.eye(len(predictions)))
    first = shares(agreement, np.eye(len(predictions))[0])
    drawn_back_by = first / len(truth) / 7**0.5 * 2  # a row's share, of (w - e)^2 up to 2
    assert shares(agreement, best_mixture(agreement, len(truth))) <= best + drawn_back_by + first / len(truth)


def test_errors_are_those_of_the_mixed_predictions():
    predictions, truth = several(3)
    mixture = np.array([0.2, 0.0, 0.5, 0.1])
    expected = np.square(truth - np.einsum("i,int->nt", mixture, predictions)).mean(axis=0)
    np.testing.assert_allclose(agreement_of(predictions, truth).error(mixture), expected)


def test_agreement_is_taken_from_moments():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((50, 8)), rng.standard_normal((50, 3))
    weights = [rng.standard_normal((3, 8)).astype(np.float32) for _ in range(2)]
    expected = agreement_of(np.stack([x @ weight.T for weight in weights]), y)
    got = Agreement.of(weights, x.T @ x / 50, y.T @ x / 50, np.square(y).mean(axis=0), np.ones(y.shape[1]))
    for name in ("among", "with_truth", "square"):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=1e-5, atol=1e-6)


def test_a_target_whose_large_rows_were_all_fitted_on_counts_no_more():
    """With heavy tails a target may be next to silent over the rows held out, and its errors are not."""
    rng = np.random.default_rng(4)
    good = rng.standard_normal((60, 40))
    bad = rng.standard_normal((60, 40))
    truth = np.array([good, bad]).mean(axis=0)
    truth[:, :2] = 1e-3 * rng.standard_normal((60, 2))
    fits = np.stack([bad, good + truth])
    fits[0, :, :2] *= 1e-3
    honest = agreement_of(fits, truth, square_fitted=np.ones(40))
    loud = agreement_of(fits, truth)
    without = agreement_of(fits[:, :, 2:], truth[:, 2:])
    assert best_mixture(loud, 60)[1] < 0.01
    np.testing.assert_allclose(best_mixture(honest, 60), best_mixture(without, 60), atol=0.05)


def test_a_target_of_another_unit_counts_no_more():
    predictions, truth = several(5)
    units = np.array([1e-6, 1, 1e6, 1, 1, 1, 1])
    plain, scaled = (best_mixture(agreement_of(predictions * u, truth * u), 60) for u in (1, units))
    np.testing.assert_allclose(scaled, plain, rtol=1e-6)


@pytest.mark.parametrize("n_targets", [1, 40])
def test_what_improves_by_chance_alone_is_left_out(n_targets):
    rng = np.random.default_rng(1)
    truth = rng.standard_normal((400, n_targets))
    first = truth + 0.5 * rng.standard_normal(truth.shape)
    useless = 1e-3 * rng.standard_normal((3, *truth.shape))
    mixture = best_mixture(agreement_of(np.stack([0.8 * first, *useless]), truth), 400)
    np.testing.assert_array_equal(mixture, [1, 0, 0, 0])


def test_targets_that_never_vary_and_predictions_of_nothing_are_no_trouble():
    truth = np.zeros((20, 2))
    np.testing.assert_array_equal(best_mixture(agreement_of(np.zeros((3, 20, 2)), truth), 20), [1, 0, 0])
    truth = np.random.default_rng(0).standard_normal((20, 2))
    np.testing.assert_array_equal(best_mixture(agreement_of(np.zeros((3, 20, 2)), truth), 20), [1, 0, 0])
