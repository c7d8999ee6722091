"""Rows that two ensembles share: told from trainings of one's own, and from subsets that repeat by chance."""

import numpy as np
import pytest

from dmpipeline.checks.shared import shared_rows
from dmpipeline.spec import RunSpec

SPEC = RunSpec(n_models=40)
N_TRAIN = 60


def outputs(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 30)).astype(np.float16)


def test_the_same_models_are_known_by_subset_and_outputs_in_any_order_and_to_rounding():
    ours = outputs(40)
    order = np.random.default_rng(1).permutation(40)
    theirs = ours[order].astype(np.float32) * np.float32(1.001)
    shared = shared_rows(ours, theirs, list(range(40)), order.tolist(), SPEC, N_TRAIN)
    assert shared.is_same.all()
    assert not shared.is_again.any()
    assert "all 40 rows of the reference that were read are models that ours holds too" in shared.in_words()


def swapped(theirs):
    theirs[:, [3, 7]] = theirs[:, [7, 3]]


def shifted(theirs):
    theirs[:, 3] += 0.1


@pytest.mark.parametrize("plant", [swapped, shifted])
def test_models_are_not_the_same_if_any_target_differs(plant):
    ours = np.random.default_rng(0).normal(size=(40, 1000)).astype(np.float32)
    theirs = ours.copy()
    plant(theirs)
    shared = shared_rows(ours, theirs, list(range(40)), list(range(40)), SPEC, N_TRAIN)
    assert shared.is_same.mean() < 0.1  # of a swap, rows in which both are alike by chance
    np.testing.assert_array_equal(shared.is_again, ~shared.is_same)


def test_targets_far_apart_do_not_make_other_trainings_the_same():
    far = np.linspace(0, 1000, 30)  # as of a regression, where models differ little
    ours, theirs = outputs(40) + far, outputs(40, 1) + far
    assert shared_rows(ours, theirs, list(range(40)), list(range(40)), SPEC, N_TRAIN).is_again.all()


def test_no_subset_is_left_on_both_sides_and_other_rows_are_left_alone():
    ours, theirs = outputs(40), outputs(40, 1)
    theirs[:5] = ours[:5]  # the same models; rows 5 to 20 are trained again, the others are of other subsets
    keys = list(range(40)), [*range(20), *range(100, 120)]
    shared = shared_rows(ours, theirs, *keys, SPEC, N_TRAIN)
    assert np.flatnonzero(shared.is_same).tolist() == list(range(5))
    assert np.flatnonzero(shared.is_again).tolist() == list(range(5, 20))
    sides = zip(keys, (shared.ours, shared.theirs), strict=True)
    left = [{key for key, kept in zip(*side, strict=True) if kept} for side in sides]
    assert not left[0] & left[1]
    assert (len(left[0]), len(left[1])) == (40 - 8, 40 - 5 - 7)
    assert shared.in_words().startswith("5 of 40 rows of the reference are models that ours holds too; they were not")
    assert "15 of 40 are other trainings on subsets that ours has too" in shared.in_words()


def test_retrainings_of_a_subset_stay_together():
    keys = [row // 2 for row in range(40)]
    shared = shared_rows(outputs(40), outputs(40, 1), keys, keys, SPEC, N_TRAIN)
    assert shared.is_again.all()
    np.testing.assert_array_equal(shared.ours, ~shared.theirs)
    np.testing.assert_array_equal(shared.ours[::2], shared.ours[1::2])
    assert shared.ours.sum() == 20


def test_subsets_that_repeat_by_chance_are_independent():
    keys = [np.random.default_rng(seed).integers(252, size=200).tolist() for seed in (0, 1)]
    assert len(set(keys[0]) & set(keys[1])) > 50
    shared = shared_rows(outputs(200), outputs(200, 1), *keys, SPEC, 10)
    assert shared.ours.all()
    assert shared.theirs.all()
    assert shared.in_words() == ""
    # of 60 examples there are a hundred thousand million million subsets
    assert shared_rows(outputs(200), outputs(200, 1), *keys, SPEC, N_TRAIN).is_again.any()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_without_masks_models_are_known_by_outputs_that_are_equal_and_telling(dtype):
    ours = outputs(40)
    theirs = np.concatenate([outputs(10, 1), ours[:30]]).astype(dtype)
    shared = shared_rows(ours, theirs, None, None, SPEC, N_TRAIN)
    assert np.flatnonzero(shared.is_same).tolist() == list(range(10, 40))
    right = np.ones((40, 30), np.float32)
    assert not shared_rows(right, right, None, None, SPEC, N_TRAIN).is_same.any()
