import numpy as np
import pytest

from dmpipeline.errors import SpecError
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.report.contents import Contents, add_labels, add_outputs, add_weights, empty_facts, removal_steps


def made(n_train=300, n_targets=7, *, seed=0, halves=None):
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((n_train, n_targets)) * (rng.random((n_train, n_targets)) < 0.4)).astype(np.float32)
    weight[:, -1] = 0
    bias = rng.standard_normal(n_targets).astype(np.float32)
    contents = Contents(empty_facts(), halves=halves)
    add_weights(contents, Datamodels(weight=weight, bias=bias, lam=np.ones(n_targets, np.float32)))
    return contents, weight, bias


def test_each_target_lists_its_largest_weights_as_numpy_sorts_them():
    contents, weight, _ = made()
    for t in range(7):
        for kind, sign in (("helper", 1), ("harmer", -1)):
            count = contents.arrays[f"{kind}_count"][t]
            total = (sign * weight[:, t] > 0).sum()
            assert (count, contents.arrays[f"{kind}_total"][t]) == (min(50, total), total)
            index = contents.arrays[f"{kind}_index"][t, :count]
            np.testing.assert_array_equal(np.sort(sign * weight[:, t])[::-1][:count], sign * weight[index, t])
            np.testing.assert_array_equal(contents.arrays[f"{kind}_weight"][t, :count], weight[index, t])


def test_what_is_foreseen_without_the_first_k_is_the_datamodel_of_that_subset():
    contents, weight, bias = made()
    steps = contents.arrays["removal_k"]
    for t in range(7):
        for kind, sign in (("helper", 1), ("harmer", -1)):
            order = np.argsort(-sign * weight[:, t], kind="stable")
            total = (sign * weight[:, t] > 0).sum()
            for place, k in enumerate(steps):
                mask = np.ones(300)
                mask[order[: min(k, total)]] = 0
                seen = contents.arrays["target_full"][t] - contents.arrays[f"{kind}_drop"][t, place]
                assert seen == pytest.approx(mask @ weight[:, t] + bias[t], abs=1e-4)


def test_steps_rise_from_none_to_all_and_leave_out_none_of_the_first_twenty():
    for n_train in (1, 5, 20, 21, 1437, 50_000):
        steps = removal_steps(n_train)
        assert steps[: min(20, n_train) + 1] == list(range(min(20, n_train) + 1))
        assert steps[-1] == n_train
        assert (np.diff(steps) > 0).all()
    assert len(removal_steps(50_000)) < 80


def test_stability_counts_the_halves_in_which_a_weight_has_its_sign():
    _, weight, _ = made()
    contents, _, _ = made(halves=[weight, -weight])
    same, _, _ = made(halves=[weight, weight])
    for kind in ("helper", "harmer"):
        count = contents.arrays[f"{kind}_count"][0]
        assert set(contents.arrays[f"{kind}_stable"][0, :count]) == {1}
        assert set(same.arrays[f"{kind}_stable"][0, :count]) == {2}


def test_classes_influence_one_another_by_the_mean_of_what_their_weights_add_up_to():
    contents, weight, _ = made()
    train, targets = np.arange(300) % 3, np.array([0, 0, 1, 1, 1, 0, 2])
    add_labels(contents, weight, train=train, targets=targets, class_names=["a", "b", "c"])
    matrix = contents.arrays["class_matrix"]
    expected = [[weight[train == i][:, targets == j].sum(0).mean() for j in range(3)] for i in range(3)]
    np.testing.assert_allclose(matrix, expected, rtol=1e-4, atol=1e-5)
    assert contents.facts["matrix_classes"] == ["a", "b", "c"]


def test_what_does_not_fit_the_weights_is_refused():
    contents, weight, _ = made()
    with pytest.raises(SpecError, match=r"299 training and 7 target labels do not fit weights of shape \(300, 7\)"):
        add_labels(contents, weight, train=np.zeros(299, int), targets=np.zeros(7, int), class_names=None)
    with pytest.raises(SpecError, match="one row a held-out subset"):
        add_outputs(contents, np.zeros((4, 7)), np.zeros((5, 7)))


def test_outputs_that_are_too_many_for_a_page_are_left_out_but_counted_in_means_and_ranges():
    contents, _, _ = made(n_train=20, n_targets=700)
    true = np.random.default_rng(0).standard_normal((200, 700))
    add_outputs(contents, true + 1, true)
    shown = contents.arrays["true"]
    assert shown.size <= 60_000
    np.testing.assert_allclose(shown, true[: len(shown)], atol=0.01)
    np.testing.assert_allclose(contents.arrays["target_mean"], true.mean(0), atol=1e-6)
    np.testing.assert_allclose(contents.arrays["target_low"], true.min(0), atol=1e-6)
    add_outputs(contents, true * 1e9, true * 1e9)
    np.testing.assert_allclose(contents.arrays["true"], true[: len(shown)] * 1e9, rtol=1e-6)


def test_what_was_measured_is_foreseen_at_the_same_numbers_of_removals():
    contents = Contents(empty_facts())
    weight = np.ones((300, 2), np.float32)
    add_weights(contents, Datamodels(weight=weight, bias=weight[0], lam=weight[0]), measured=[0, 23, 123])
    assert {23, 123} <= set(contents.arrays["removal_k"].tolist())
    assert (np.diff(contents.arrays["removal_k"]) > 0).all()


def test_a_class_that_no_target_has_is_not_said_to_have_no_influence():
    contents, weight, _ = made()
    add_labels(contents, weight, train=np.arange(300) % 3, targets=np.zeros(7, int), class_names=None)
    assert np.isfinite(contents.arrays["class_matrix"][:, 0]).all()
    assert np.isnan(contents.arrays["class_matrix"][:, 1:]).all()
