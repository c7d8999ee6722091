import numpy as np
import pytest

from dmpipeline.checks.orders import order_of_targets, order_of_training

N_TRAIN, N_TARGETS = 200, 60


def ensemble(n_models, seed, *, n_train=N_TRAIN):
    """Make masks, and outputs that depend on them by planted weights, with a mean and a spread of each target."""
    rng, truth = np.random.default_rng(seed), np.random.default_rng(5)
    weight = truth.standard_normal((n_train, N_TARGETS)) * (truth.random((n_train, N_TARGETS)) < 0.2)
    mean, spread = 3 * truth.standard_normal(N_TARGETS), np.exp(truth.standard_normal(N_TARGETS))
    masks = rng.random((n_models, n_train)) < 0.5
    noise = 3 * rng.standard_normal((n_models, N_TARGETS))
    return masks, ((masks - 0.5) @ weight + noise) * spread + mean


@pytest.fixture(scope="module")
def sides():
    return ensemble(400, 1), ensemble(300, 2)


def test_the_same_orders_are_recognised(sides):
    (our_masks, ours), (their_masks, theirs) = sides
    assert order_of_targets(ours, theirs).kind == "same"
    assert order_of_training(our_masks, ours, their_masks, theirs).kind == "same"


@pytest.mark.parametrize("shift", [1, -1, 4])
def test_an_order_of_targets_that_is_off_is_said_in_either_direction(sides, shift):
    (_, ours), (_, theirs) = sides
    order = order_of_targets(ours, np.roll(theirs, -shift, axis=1), noun="test example")
    assert (order.kind, order.shift) == ("shifted", shift)
    place = f"i {'+' if shift > 0 else '-'} {abs(shift)} of ours"
    assert f"test example i of the reference is {place}" in order.detail


@pytest.mark.parametrize("shift", [1, -2])
def test_an_order_of_training_examples_that_is_off_is_said_in_either_direction(sides, shift):
    (our_masks, ours), (their_masks, theirs) = sides
    order = order_of_training(our_masks, ours, np.roll(their_masks, -shift, axis=1), theirs)
    assert (order.kind, order.shift) == ("shifted", shift)


def test_targets_that_were_exchanged_are_named_one_by_one(sides):
    (_, ours), (_, theirs) = sides
    before = np.arange(N_TARGETS)
    before[[3, 10, 20]] = [10, 20, 3]
    order = order_of_targets(ours, theirs[:, before])
    assert order.kind == "swapped"
    assert order.moved == {3: 10, 10: 20, 20: 3}
    assert "target 3 of the reference is 10 of ours" in order.detail


def test_targets_that_differ_without_being_anothers_are_not_explained_by_an_order(sides):
    (_, ours), (_, theirs) = sides
    changed = theirs.copy()
    changed[:, [3, 10, 20]] += 2 * theirs[:, [3, 10, 20]].std(0)
    assert order_of_targets(ours, changed).kind == "unknown"
    assert order_of_targets(ours, theirs + theirs.std(0)).kind == "unknown"


def test_any_other_order_is_told_from_outputs_that_differ(sides):
    (our_masks, ours), (their_masks, theirs) = sides
    rng = np.random.default_rng(0)
    assert order_of_targets(ours, theirs[:, rng.permutation(N_TARGETS)]).kind == "other"
    permuted = their_masks[:, rng.permutation(N_TRAIN)]
    assert order_of_training(our_masks, ours, permuted, theirs).kind == "other"


def test_too_few_models_or_examples_say_nothing_about_the_order_of_training_examples(sides):
    (our_masks, ours), (their_masks, theirs) = sides
    few = slice(0, 20)
    shifted = np.roll(their_masks, 1, axis=1)
    assert order_of_training(our_masks[few], ours[few], shifted[few], theirs[few]).kind == "unknown"
    assert order_of_training(our_masks[:, :30], ours, their_masks[:, :30], theirs).kind == "unknown"


def test_orders_of_sound_ensembles_are_never_called_wrong():
    for seed in range(40):
        (our_masks, ours), (their_masks, theirs) = ensemble(60, 100 + 2 * seed), ensemble(60, 101 + 2 * seed)
        assert not order_of_targets(ours, theirs).is_wrong
        assert not order_of_training(our_masks, ours, their_masks, theirs).is_wrong
