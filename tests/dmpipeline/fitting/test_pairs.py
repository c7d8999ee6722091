"""Pair terms: planted interactions are found, nothing is invented, and files hold all of it."""

from dataclasses import replace

import numpy as np
import pytest

import dmpipeline
from dmdata.errors import FormatError
from dmpipeline import Datamodels, fit, workflow
from dmpipeline.applications.evidence import find_evidence
from dmpipeline.applications.interactions import pairs_help
from dmpipeline.fitting.pairs.estimation import Blind, _Work
from dmpipeline.fitting.pairs.shrinkage import NORMAL, believed, likeliest_law, likeliest_mixture, pair_features
from dmpipeline.fitting.pairs.terms import PairTerms
from dmpipeline.moments.tensors import save_tensors

N_TRAIN, N_TARGETS = 40, 5
BOTH = -2.0
"""What the planted pair of each target, its two strongest examples, adds."""


def planted(n_models, *, alpha=0.5, both=BOTH, noise=0.5, seed=0):
    """Masks and outputs: eight weights a target, of which the first two examples interact."""
    rng = np.random.default_rng(seed)
    masks = rng.random((n_models, N_TRAIN)) < alpha
    outputs = noise * rng.standard_normal((n_models, N_TARGETS))
    for target in range(N_TARGETS):
        examples = np.arange(target, target + 8)
        outputs[:, target] += masks[:, examples] @ np.array([3.0, 2.5, 1, 1, -1, 0.8, -0.6, 0.5])
        outputs[:, target] += both * masks[:, target] * masks[:, target + 1]
    return masks, outputs.astype(np.float32)


@pytest.fixture(scope="module", params=[0.5, 0.3, 0.7])
def fitted(request):
    masks, outputs = planted(6000, alpha=request.param)
    return fit(masks, outputs, pairs=True), request.param


def test_a_planted_pair_is_found_for_any_alpha_with_what_it_adds(fitted):
    datamodels, alpha = fitted
    for target in range(N_TARGETS):
        first, *others = datamodels.pairs.top(target, 5)
        assert {first.first, first.second} == {target, target + 1}
        assert first.weight == pytest.approx(BOTH, abs=0.3 if alpha == 0.5 else 0.5)
        assert all(abs(pair.weight) < 0.4 for pair in others)


def test_predictions_of_fresh_models_gain_by_it_and_the_linear_part_is_the_linear_fit(fitted):
    datamodels, alpha = fitted
    masks, truth = planted(2000, alpha=alpha, noise=0.0, seed=1)
    errors = [((each.predict(masks) - truth) ** 2).mean() for each in (datamodels.linear, datamodels)]
    assert errors[1] < 0.2 * errors[0]
    linear = fit(*planted(6000, alpha=alpha))
    np.testing.assert_array_equal(datamodels.linear.weight, linear.weight)
    np.testing.assert_array_equal(datamodels.linear.predict(masks), linear.predict(masks))
    assert linear.pairs is None
    assert (datamodels.pairs.validation_error < 0.8 * datamodels.validation_error).all()


@pytest.mark.parametrize("n_models", [60, 300, 3000])
def test_nothing_is_invented_where_nothing_interacts(n_models):
    fresh, truth = planted(2000, both=0.0, noise=0.0, seed=99)
    lost = []
    for seed in range(6):
        datamodels = fit(*planted(n_models, both=0.0, seed=seed), pairs=True)
        linear, both = (((each.predict(fresh) - truth) ** 2).mean() for each in (datamodels.linear, datamodels))
        lost.append(both / linear - 1)
    assert np.mean(lost) < 0.02
    assert max(lost) < 0.1


def test_what_pairs_say_is_the_sum_over_products_of_centred_masks():
    rng = np.random.default_rng(0)
    k = 4
    terms = PairTerms(
        examples=np.array([[3, 0, 5, 2], [1, 4, 0, 5]], np.int32),
        weight=rng.standard_normal((2, k * (k - 1) // 2)).astype(np.float32),
        mean=rng.random(6).astype(np.float32),
        gap=np.zeros(2),
        validation_error=np.zeros(2),
    )
    masks = (rng.random((7, 6)) < 0.5).astype(np.float32)
    predicted = np.zeros((7, 2), np.float32)
    terms.add_to(predicted, masks)
    for target in range(2):
        examples, at, expected = terms.examples[target], 0, np.zeros(7)
        for i in range(k):
            for j in range(i + 1, k):
                product = np.prod([masks[:, each] - terms.mean[each] for each in examples[[i, j]]], axis=0)
                expected += terms.weight[target, at] * product
                at += 1
        np.testing.assert_allclose(predicted[:, target], expected, atol=1e-5)
        assert terms.part_of(target, masks[0]) == pytest.approx(expected[0], abs=1e-5)
    assert terms.columns([1]).top(0, 2)[0] == terms.top(1, 1)[0]
    assert [abs(pair.weight) for pair in terms.top(0, 9)] == sorted(np.abs(terms.weight[0]).tolist(), reverse=True)


def test_the_law_of_coefficients_is_learned_from_noisy_estimates():
    rng = np.random.default_rng(0)
    weight = np.exp(rng.normal(-3, 1, (30, 20)))
    features = np.stack([pair_features(own, np.full((20, 20), 0.3)) for own in weight])
    truth = np.array([-8.0, 1.2, 0, 0])
    variance = np.exp(features @ truth)
    coefficients = np.sqrt(variance) * rng.standard_normal(variance.shape)
    noise = np.full(30, float(np.median(variance)))
    estimate = coefficients + np.sqrt(noise[:, None]) * rng.standard_normal(variance.shape)
    law = likeliest_law(estimate, noise, features)
    np.testing.assert_allclose((features @ law).mean(), (features @ truth).mean(), atol=0.2)
    assert law[1] == pytest.approx(1.2, abs=0.1)
    factor = believed(estimate[0], noise[0], variance[0], NORMAL)
    np.testing.assert_allclose(factor, variance[0] / (variance[0] + noise[0]))
    mixture = likeliest_mixture(estimate, noise, np.exp(features @ law))
    assert mixture.scales @ mixture.shares == pytest.approx(1, abs=0.4)
    shrunk = np.stack([believed(estimate[t], noise[t], variance[t], mixture) * estimate[t] for t in range(30)])
    assert ((shrunk - coefficients) ** 2).mean() < 0.6 * ((estimate - coefficients) ** 2).mean()


def test_a_heavy_tail_is_learned_and_its_large_coefficients_are_kept():
    rng = np.random.default_rng(0)
    large = rng.random((40, 200)) < 0.03
    coefficients = np.where(large, 1.0, 0.05) * rng.standard_normal((40, 200))
    noise = np.full(40, 0.04)
    estimate = coefficients + 0.2 * rng.standard_normal((40, 200))
    variance = np.full((40, 200), float((coefficients**2).mean()))
    mixture = likeliest_mixture(estimate, noise, variance)
    error = {
        name: np.mean(
            [
                (believed(estimate[t], noise[t], variance[t], law) * estimate[t] - coefficients[t]) ** 2
                for t in range(40)
            ]
        )
        for name, law in (("normal", NORMAL), ("mixture", mixture))
    }
    assert error["mixture"] < 0.6 * error["normal"]


def test_the_certificate_bounds_how_far_the_ridge_objective_is_from_its_minimum():
    masks, outputs = planted(400)
    linear = fit(masks[:360], outputs[:360])
    blind = Blind(linear.weight, linear.bias, masks[:360].mean(0), outputs[:360].std(0).astype(float), 360)
    work = _Work(masks, outputs, blind, 8, 1)
    products, squares = work.sums(lambda _: None)
    work.free = work.share_left(squares)
    assert 0.8 < work.free < 1
    noise = squares / 360 / work.free**2 / 360
    estimate = products / (360 * work.free)
    variance, mixture = work.likely(estimate, noise)
    solution = work.solution(estimate, noise, variance, mixture)
    gap = work.gap(solution, lambda _: None)
    [(block, left)] = work.blocks(0, 360, lambda _: None, 0)
    for target in range(N_TARGETS):
        own = block[:, work.examples[target]].astype(float)
        features = own[:, work.pairs[0]] * own[:, work.pairs[1]]
        rest = left[:, target] / work.free
        factor = solution.factor[target].astype(float)
        penalty = (1 - factor) / factor  # e / v

        def objective(weight, features=features, rest=rest, penalty=penalty):
            return ((rest - features @ weight) ** 2).mean() / 2 + (penalty * weight**2).sum() / 2

        best = np.linalg.solve(features.T @ features / 360 + np.diag(penalty), features.T @ rest / 360)
        above = objective(solution.weight[target].astype(float)) - objective(best)
        assert 0 <= above <= gap[target] * 1.001 + 1e-9
        assert gap[target] < 100 * above + 1e-6


def test_the_answer_does_not_depend_on_threads_files_or_how_often_it_is_asked(tmp_path):
    masks, outputs = planted(1500)
    one = fit(masks, outputs, pairs=True, threads=1)
    for other in (
        fit(masks, outputs, pairs=True, threads=2),
        fit(masks, outputs, pairs=True, directory=tmp_path / "kept"),
        fit(masks, outputs, pairs=True, directory=tmp_path / "kept"),
    ):
        np.testing.assert_array_equal(one.pairs.weight, other.pairs.weight)
        np.testing.assert_array_equal(one.pairs.examples, other.pairs.examples)


def test_folds_priors_and_targets_that_do_not_vary_have_pairs_too():
    masks, outputs = planted(3000)
    outputs[:, 2] = 1.0
    prior = np.zeros((N_TRAIN, N_TARGETS))
    for target in range(N_TARGETS):
        prior[target : target + 8, target] = 1
    for how in ({"folds": 4}, {"prior": prior}):
        datamodels = fit(masks, outputs, pairs=True, **how)
        assert {datamodels.pairs.top(0, 1)[0].first, datamodels.pairs.top(0, 1)[0].second} == {0, 1}
        assert datamodels.pairs.top(2, 3) == ()
        assert datamodels.pairs.validation_error[2] == datamodels.pairs.gap[2] == 0
        assert np.isfinite(datamodels.predict(masks[:10])).all()


def test_a_single_target_and_a_single_example_are_no_trouble():
    masks, outputs = planted(3000)
    datamodels = fit(masks, outputs[:, :1], pairs=True)
    assert {datamodels.pairs.top(0, 1)[0].first, datamodels.pairs.top(0, 1)[0].second} == {0, 1}
    assert fit(masks[:, :1], outputs, pairs=True).pairs is None


def test_a_file_holds_them_and_some_targets_can_be_read(fitted, tmp_path):
    datamodels, _ = fitted
    path = datamodels.save(tmp_path / "both.pt")
    masks = planted(50)[0]
    again = Datamodels.load(path)
    np.testing.assert_array_equal(again.predict(masks), datamodels.predict(masks))
    np.testing.assert_array_equal(again.pairs.gap, datamodels.pairs.gap)
    some = Datamodels.load(path, targets=np.array([3, 1]))
    np.testing.assert_allclose(some.predict(masks), datamodels.predict(masks)[:, [3, 1]], rtol=1e-5, atol=1e-5)
    plain = datamodels.linear.save(tmp_path / "linear.pt")
    assert Datamodels.load(plain).pairs is None
    assert "pairs of 40 examples a target" in repr(again)


@pytest.mark.parametrize("wrong", ["pair_weight", "pair_examples", "missing"])
def test_pair_terms_that_do_not_fit_the_weights_are_refused(fitted, tmp_path, wrong):
    datamodels, _ = fitted
    arrays = {name: getattr(datamodels, name) for name in ("weight", "bias", "lam")}
    arrays |= {
        f"pair_{name}": getattr(datamodels.pairs, name) for name in ("weight", "mean", "gap", "validation_error")
    }
    arrays["pair_examples"] = datamodels.pairs.examples.astype(np.int64)
    if wrong == "pair_weight":
        arrays["pair_weight"] = arrays["pair_weight"][:, :-1].copy()
    elif wrong == "pair_examples":
        arrays["pair_examples"] = arrays["pair_examples"] + N_TRAIN
    else:
        del arrays["pair_mean"]
    path = save_tensors(arrays, tmp_path / "wrong.pt")
    with pytest.raises(FormatError, match="pair terms"):
        Datamodels.load(path)


def test_a_run_fits_scores_explains_and_foresees_with_them(tmp_path):
    spec = dmpipeline.RunSpec(n_models=2000, held_out={"n_subsets": 12, "n_retrainings": 2})
    run = dmpipeline.Run.create(tmp_path / "run", spec)
    run.train()
    terms = workflow.fit_run(run, pairs=True).pairs
    assert workflow.fit_facts(run)["pair_terms"] == terms.weight.shape[1]
    evaluation = workflow.evaluate_run(run)
    assert 0 < evaluation.lds_linear < evaluation.lds
    assert evaluation.as_dict()["lds_linear"] == evaluation.lds_linear
    listed = dmpipeline.explain(run, 5, top=3, n_fits=0).as_dict()["pairs"]
    assert len(listed) == 3
    assert set(listed[0]) == {"first", "second", "weight"}
    # nothing was retrained: pairs are told, and not used
    case = dmpipeline.Case(5, tuple(terms.examples[5, :10].tolist()))
    before = dmpipeline.counterfactuals(run, [case])
    assert not before.with_pairs
    assert before[0].predicted_change == before[0].linear_change
    full, changed = np.ones((2, terms.mean.size), np.float32)
    changed[list(case.remove)] = 0
    assert before[0].pair_change == pytest.approx(terms.part_of(5, changed) - terms.part_of(5, full))
    # sets of strong examples are retrained, and these decide
    cases = [dmpipeline.Case(t, tuple(terms.examples[t, :40].tolist())) for t in range(0, 60, 5)]
    dmpipeline.counterfactuals(run, cases, 3)
    evidence = find_evidence(run)
    after = dmpipeline.counterfactuals(run, [case])
    assert after.with_pairs is pairs_help(evidence)
    used = before[0].pair_change if after.with_pairs else 0
    assert after[0].predicted_change == pytest.approx(before[0].linear_change + used)
    assert after[0].predicted_after - after[0].predicted_before == pytest.approx(after[0].predicted_change)
    # and terms of the wrong sign are not used, whatever the models held out said of them
    turned = replace(evidence.datamodels(), pairs=replace(terms, weight=-3 * terms.weight))
    turned.save(run.datamodels_path)
    assert not dmpipeline.counterfactuals(run, [case]).with_pairs
    workflow.fit_run(run)
    assert workflow.evaluate_run(run).lds_linear is None
    assert dmpipeline.explain(run, 5, n_fits=0).as_dict()["pairs"] == []
