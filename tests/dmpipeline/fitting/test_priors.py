import numpy as np
import pytest
import sklearn.datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from dmpipeline import Run, RunSpec, evaluate, fit, gradient_scores, save_dataset
from dmpipeline.errors import SpecError
from dmpipeline.fitting import solving
from dmpipeline.fitting.guides.priors import (
    TRUSTS,
    Trust,
    combined_weights,
    expected_weights,
    penalty_factors,
    pooled_scores,
)


def planted(n_models=400, n_train=150, n_targets=30, *, seed=0):
    """Targets in three groups; those of a group depend on the same eight examples, each in its own measure."""
    rng = np.random.default_rng(seed)
    masks = rng.random((n_models, n_train)).argsort(axis=1) < n_train // 2
    truth = np.zeros((n_train, n_targets))
    for group in range(3):
        examples = rng.choice(n_train, 8, replace=False)
        sign = rng.choice([-1, 1], 8)
        for target in range(group, n_targets, 3):
            truth[examples, target] = sign * rng.uniform(0.5, 1.5, 8)
    outputs = masks @ truth + 1.5 * rng.standard_normal((n_models, n_targets)) + 3
    return masks, outputs, truth


def distance(dm, truth):
    return np.square(dm.weight - truth).sum(axis=0).mean()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000), strength=st.sampled_from([0.0, 0.25, 0.5, 1.0]), scale=st.sampled_from([1e-6, 1.0, 1e9])
)
def test_factors_are_the_formula_and_know_no_scale_or_sign(seed, strength, scale):
    scores = np.random.default_rng(seed).standard_normal((9, 4))
    factor = penalty_factors(scores * scale, strength=strength)
    assert factor.shape == (4, 9)
    for t in range(4):
        size = np.abs(scores[:, t])
        np.testing.assert_allclose(factor[t], (size / size.max() + 0.003) ** -strength, rtol=1e-5)
    np.testing.assert_array_equal(penalty_factors(-scores * scale, strength=strength), factor)


def test_nothing_known_of_a_target_leaves_its_factors_equal():
    factor = penalty_factors(np.zeros((5, 2)), strength=0.5)
    assert (factor == factor[0, 0]).all()


def test_a_good_prior_brings_the_weights_nearer_to_the_truth():
    masks, outputs, truth = planted()
    plain, guided = fit(masks, outputs), fit(masks, outputs, prior=np.abs(truth))
    assert plain.prior_strength is None
    assert 0.5 < guided.prior_strength <= 1
    assert distance(guided, truth) < 0.7 * distance(plain, truth)
    assert guided.validation_error.mean() < plain.validation_error.mean()
    assert (guided.certificate.gap < 1e-4).all()


def test_weights_are_shrunk_towards_the_scores_whichever_sign_they_come_with():
    masks, outputs, truth = planted()
    near = truth * np.random.default_rng(5).uniform(0.9, 1.1, truth.shape)
    signed, turned = fit(masks, outputs, prior=near), fit(masks, outputs, prior=-near)
    np.testing.assert_allclose(signed.weight, turned.weight, atol=1e-4)
    by_size = fit(masks, outputs, prior=np.abs(near))
    assert distance(signed, truth) < 0.8 * distance(by_size, truth)
    assert signed.validation_error.mean() < by_size.validation_error.mean()


def test_scores_that_are_wrong_in_value_still_say_where_to_look():
    masks, outputs, truth = planted()
    noisy = truth + 0.1 * np.random.default_rng(5).standard_normal(truth.shape)  # adds up to much over all examples
    guided = fit(masks, outputs, prior=noisy)
    assert guided.prior_strength > 0
    assert distance(guided, truth) < 0.8 * distance(fit(masks, outputs), truth)


def only(trust):
    """Let nothing count but the fit with one trust."""
    share = [float(other == trust) for other in TRUSTS]
    return lambda agreement, _, **__: np.array(share + [0.0] * (agreement.with_truth.shape[1] - len(TRUSTS)))


def test_weights_guided_by_a_prior_meet_the_conditions_of_the_penalty_on_what_is_left(monkeypatch):
    monkeypatch.setattr(solving, "best_mixture", only(Trust(0.5, True)))
    masks, outputs, truth = planted()
    prior = truth * np.random.default_rng(5).uniform(0.7, 1.3, truth.shape)
    dm = fit(masks, outputs, prior=prior)
    n, mean, scale = len(masks), masks.mean(axis=0), masks.std(axis=0)
    x, y = (masks - mean) / scale, outputs - outputs.mean(axis=0)
    weight = dm.weight * scale[:, None]
    size = np.abs(prior) / np.abs(prior).max(axis=0)
    scores = np.where(size < 0.003, 0, prior) * scale[:, None]
    expected = scores * (np.einsum("ij,ij->j", x @ scores, y) / np.square(x @ scores).sum(axis=0))
    left, gradient = weight - expected, x.T @ (y - x @ weight) / n
    strength = dm.lam * (size + 0.003) ** -0.5
    moved = np.abs(left) > 1e-5
    assert (np.abs(gradient) <= strength * 1.002).all()
    np.testing.assert_allclose(gradient[moved], (np.sign(left) * strength)[moved], rtol=5e-3, atol=1e-4)
    assert 0 < moved.sum() < left.size / 2


def test_scores_that_are_small_beside_the_largest_leave_weights_sparse():
    masks, outputs, truth = planted()
    dm = fit(masks, outputs, prior=np.where(truth == 0, 1e-3, 10 * truth))
    assert dm.prior_strength > 0
    assert np.count_nonzero(dm.weight) < dm.weight.size / 2


def test_a_prior_of_noise_is_not_trusted_and_costs_nothing():
    masks, outputs, truth = planted()
    noise = np.random.default_rng(1).exponential(size=truth.shape)
    plain, guided = fit(masks, outputs, folds=3), fit(masks, outputs, prior=noise)
    assert guided.prior_strength == 0
    np.testing.assert_array_equal(guided.weight, plain.weight)
    np.testing.assert_array_equal(guided.lam, plain.lam)


@pytest.mark.parametrize("n_targets", [1, 30])
@pytest.mark.parametrize("scores", ["noise", "zeros", "constant"])
def test_a_prior_that_says_nothing_leaves_the_plain_fit(n_targets, scores):
    masks, outputs, truth = planted(n_targets=n_targets)
    prior = np.random.default_rng(1).standard_normal(truth.shape) if scores == "noise" else np.zeros(truth.shape)
    prior += scores == "constant"
    plain, guided = fit(masks, outputs, folds=3), fit(masks, outputs, prior=prior)
    assert guided.prior_strength == 0
    np.testing.assert_array_equal(guided.weight, plain.weight)


@pytest.mark.parametrize("n_targets", [1, 5])
def test_scores_that_are_the_truth_are_nearly_all_of_the_mixture(n_targets):
    masks, _, _ = planted()
    rng = np.random.default_rng(2)
    truth = rng.standard_normal((150, n_targets))  # too dense for few models
    outputs = masks @ truth + 3 * rng.standard_normal((400, n_targets))
    plain, guided = fit(masks, outputs), fit(masks, outputs, prior=truth)
    assert guided.prior_strength > 0.7
    assert distance(guided, truth) < 0.2 * distance(plain, truth)


def test_weights_stay_positive_whatever_the_signs_of_the_prior():
    masks, outputs, truth = planted()
    dm = fit(masks, outputs, prior=truth, is_positive=True)
    assert dm.prior_strength > 0
    assert (dm.weight >= 0).all()


def test_scores_of_other_targets_are_combined_by_ridge_regression_on_what_they_predict():
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((200, 40)), rng.standard_normal((200, 6))
    scores = rng.standard_normal((6, 40)).astype(np.float32)
    y += x @ (scores.T @ rng.standard_normal((6, 6)))
    gram, cross, square = x.T @ x / 200, y.T @ x / 200, np.square(y).mean(axis=0)
    expected, pull = combined_weights(scores, gram, cross, square, 200)
    np.testing.assert_allclose(pull, expected @ gram, rtol=1e-4, atol=1e-4)
    predicted = x @ (scores / np.linalg.norm(scores, axis=1, keepdims=True)).T
    own = np.diag([f @ t / (f @ f) for f, t in zip(predicted.T, y.T, strict=True)])
    eigenvalues = np.linalg.eigvalsh(predicted.T @ predicted / 200)

    def ridge(share):
        kernel = predicted.T @ predicted / 200 + share * eigenvalues.mean() * np.eye(6)
        return own + np.linalg.solve(kernel, predicted.T @ (y - predicted @ own) / 200)

    distances = [np.abs(x @ expected.T - predicted @ ridge(share)).max() for share in np.geomspace(1e-4, 1e3, 60)]
    assert min(distances) < 1e-3
    assert (
        np.square(y - x @ expected.T).mean()
        < 0.1 * np.square(y - x @ expected_weights(scores, gram, cross)[0].T).mean()
    )


@pytest.fixture(scope="module")
def wine(tmp_path_factory):
    """A run of scikit-learn's wine, 300 models and 60 held-out subsets, and its gradient scores."""
    folder = tmp_path_factory.mktemp("wine")
    inputs, labels = sklearn.datasets.load_wine(return_X_y=True)
    is_test = np.arange(len(labels)) % 5 == 0
    dataset = save_dataset(folder / "wine", (inputs[~is_test], labels[~is_test]), (inputs[is_test], labels[is_test]))
    held_out = {"n_subsets": 60, "n_retrainings": 3}
    run = Run.create(
        folder / "run",
        RunSpec(
            dataset=str(dataset), n_models=300, held_out=held_out, outputs=["test_margins", "test_log_likelihoods"]
        ),
    )
    run.train()
    return run, gradient_scores(run)


@pytest.mark.parametrize("output", ["test_margins", "test_log_likelihoods"])
@pytest.mark.parametrize("prior", ["as it is", "turned round", "useless", "constant", "zeros"])
def test_no_prior_does_harm_to_models_of_real_data(wine, output, prior):
    run, scores = wine
    useless = np.random.default_rng(0).permutation(scores)
    given = {
        "as it is": scores,
        "turned round": -scores,
        "useless": useless,
        "constant": np.ones_like(scores),
        "zeros": np.zeros_like(scores),
    }[prior]
    masks, outputs = run.array("train_masks")[:], run.array(output)[:].astype(np.float32)
    rows, held_out = run.spec.rows.models, run.spec.rows.held_out

    def lds(estimate):
        return evaluate(estimate, masks[held_out], outputs[held_out], n_retrainings=3).lds

    plain, guided = (lds(fit(masks[rows], outputs[rows], prior=p)) for p in (None, given))
    assert guided > plain - 0.005
    if prior in ("useless", "constant", "zeros"):
        assert guided == lds(fit(masks[rows], outputs[rows], folds=3))
    if prior in ("as it is", "turned round"):
        assert guided > max(plain, lds(scores)) - 0.005


def test_pooling_over_targets_that_vary_together_is_a_good_prior():
    masks, outputs, truth = planted()
    first = fit(masks[:360], outputs[:360])
    prior = pooled_scores(first, outputs[:360])
    correlation = np.corrcoef(outputs[:360], rowvar=False) ** 2
    np.testing.assert_allclose(prior, np.abs(first.weight) @ correlation, rtol=1e-4, atol=1e-6)
    guided = fit(masks, outputs, prior=prior)
    assert guided.prior_strength > 0
    assert distance(guided, truth) < 0.9 * distance(fit(masks, outputs), truth)


def test_pooled_scores_do_not_suffer_from_a_large_offset_or_a_constant_target():
    masks, outputs, _ = planted(200, 40, 6)
    outputs[:, 2] = 5
    first = fit(masks, outputs)
    plain = pooled_scores(first, outputs)
    np.testing.assert_allclose(pooled_scores(first, outputs + 1e7), plain, rtol=1e-4)
    assert not plain[:, 2].any()


def test_folds_and_a_prior_go_together():
    masks, outputs, truth = planted(300, 60, 9)
    dm = fit(masks, outputs, folds=3, prior=np.abs(truth))
    assert dm.prior_strength > 0
    assert distance(dm, truth) < distance(fit(masks, outputs, folds=3), truth)


def test_a_prior_of_another_shape_or_with_nan_is_refused_before_anything_is_read():
    class Unread:
        def __init__(self, shape):
            self.shape = shape

        def __getitem__(self, rows):
            raise AssertionError("read")

    masks, outputs = Unread((100, 7)), Unread((100, 3))
    with pytest.raises(SpecError, match=r"prior has shape \(3, 7\); expected .*\(7, 3\)"):
        fit(masks, outputs, prior=np.ones((3, 7)))
    prior = np.ones((7, 3))
    prior[4, 1] = np.nan
    with pytest.raises(SpecError, match="nan for example 4, target 1"):
        fit(masks, outputs, prior=prior)


def test_outputs_of_other_targets_are_not_pooled():
    masks, outputs, _ = planted(100, 30, 3)
    with pytest.raises(SpecError, match="of 3 targets"):
        pooled_scores(fit(masks, outputs), outputs[:, :2])
