"""Measures of attribution scores against their definitions, written out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from dmpipeline.errors import SpecError
from dmpipeline.scoring import attributions, evaluation
from dmpipeline.scoring.attributions import (
    class_detection,
    find_proponents,
    mislabel_detection,
    scores_of_targets,
    share_within,
    top_k_cardinality,
)
from dmpipeline.scoring.evaluation import evaluate


@settings(max_examples=60)
@given(
    n_train=st.integers(2, 12),
    n_targets=st.integers(1, 5),
    k=st.integers(1, 12),
    block_bytes=st.sampled_from([8, 100, 10_000]),
    dtype=st.sampled_from([np.float16, np.float64, np.int8]),
    seed=st.integers(0, 10_000),
)
def test_proponents_are_those_of_a_stable_sort_whatever_the_blocks(n_train, n_targets, k, block_bytes, dtype, seed):
    k = min(k, n_train)
    scores = np.random.default_rng(seed).integers(-2, 3, (n_train, n_targets)).astype(dtype)  # with many ties
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attributions, "_BLOCK_BYTES", block_bytes)
        found = find_proponents(scores, k)
        some = scores_of_targets(scores, [n_targets - 1, 0])
    expected = np.argsort(-scores.astype(float), axis=0, kind="stable")[:k]
    np.testing.assert_array_equal(found.indices, expected)
    assert found.self_influence is None
    np.testing.assert_array_equal(some, scores[:, [n_targets - 1, 0]])


@settings(max_examples=40)
@given(n=st.integers(2, 9), k=st.integers(1, 8), block_bytes=st.sampled_from([8, 150]), seed=st.integers(0, 10_000))
def test_a_training_example_is_not_its_own_proponent_but_has_a_score_for_itself(n, k, block_bytes, seed):
    k = min(k, n - 1)
    scores = np.random.default_rng(seed).integers(0, 4, (n, n)).astype(float)
    scores[np.arange(n), np.arange(n)] += 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attributions, "_BLOCK_BYTES", block_bytes)
        found = find_proponents(scores, k, is_of_train=True)
    np.testing.assert_array_equal(found.self_influence, scores.diagonal())
    others = np.where(np.eye(n, dtype=bool), -np.inf, scores)
    np.testing.assert_array_equal(found.indices, np.argsort(-others, axis=0, kind="stable")[:k])


def test_the_first_score_that_is_not_finite_is_named():
    scores = np.zeros((6, 4), np.float32)
    scores[4, 2], scores[5, 0] = np.nan, np.inf
    with pytest.raises(SpecError, match=r"trak: the score of training example 4 for target 2 is nan; .* or put 0") as e:
        find_proponents(scores, name="trak")
    assert (e.value.row, e.value.column) == (4, 2)


@pytest.mark.parametrize("k", [0, 5])
def test_more_proponents_than_other_examples_are_refused(k):
    with pytest.raises(SpecError, match=r"choose from 1 to 4"):
        find_proponents(np.zeros((5, 5)), k, is_of_train=True)


def test_classes_are_detected_and_cardinality_counted_over_all_proponents():
    scores = np.array([[5.0, 1, 0], [4, 9, 0], [1, 8, 3], [0, 0, 2]])
    proponents = find_proponents(sparse.csc_array(scores).tocsr(), 2).indices
    assert proponents.tolist() == [[0, 1, 2], [1, 2, 3]]
    share, of_targets = class_detection(proponents, np.array(["a", "b", "b", "c"]), np.array(["a", "b", "a"]))
    assert of_targets.tolist() == [0.5, 1, 0]
    assert share == 0.5
    assert top_k_cardinality(proponents) == 4 / 6
    assert top_k_cardinality(np.zeros((1, 10), int)) == 0.1


def test_mislabels_are_ranked_as_pairs_say():
    rng = np.random.default_rng(0)
    own, wrong = rng.integers(0, 6, 40).astype(float), [3, 8, 21, 39]
    own[wrong] += 2
    found = mislabel_detection(own, wrong)
    right = np.setdiff1d(np.arange(40), wrong)
    pairs = own[wrong][:, None] - own[right]
    assert found.auc == pytest.approx((pairs > 0).mean() + (pairs == 0).mean() / 2)
    assert mislabel_detection(np.arange(40.0), [38, 39]).average_precision == 1
    assert mislabel_detection(np.arange(40.0), [37, 39]).average_precision == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("wrong", [[], [0, 1, 2]])
def test_mislabels_need_two_kinds(wrong):
    with pytest.raises(SpecError, match="at least one, and not all"):
        mislabel_detection(np.zeros(3), wrong)


def test_shares_count_what_flipped_before():
    assert share_within(np.array([10, 40, np.nan, np.nan]), [5, 10, 20, 40]) == (0, 0.25, 0.25, 0.5)


def test_an_lds_does_not_depend_on_how_scores_are_read(monkeypatch):
    rng = np.random.default_rng(0)
    masks = rng.random((30, 50)) < 0.5
    scores = rng.standard_normal((50, 4)).astype(np.float32)
    outputs = masks @ scores + rng.standard_normal((30, 4))
    whole = evaluate(scores, masks, outputs, n_bootstraps=10)
    monkeypatch.setattr(evaluation, "_SCORES_BYTES", 8 * 4 * 7)
    assert evaluate(scores, masks, outputs, n_bootstraps=10).target_lds.tolist() == whole.target_lds.tolist()
    assert whole.lds > 0.9
