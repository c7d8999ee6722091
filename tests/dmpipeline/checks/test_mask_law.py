import numpy as np
import pytest

from dmpipeline.checks.mask_law import MaskLaw
from dmpipeline.draws.masks import draw_bernoulli_masks, draw_masks
from dmpipeline.errors import SpecError

N_TRAIN, N_MASKS = 90, 600


def drawn(law, seed=0, n_masks=N_MASKS):
    numbers = np.arange(n_masks, dtype=np.uint64)
    draw = draw_masks if law == "exact" else draw_bernoulli_masks
    return draw(seed, numbers, N_TRAIN, 0.4)


def law_of(masks, law):
    found = MaskLaw(N_TRAIN, 0.4, is_exact=law == "exact")
    for start in range(0, len(masks), 250):
        found.add(masks[start : start + 250])
    return found


def faults(masks, law):
    found = law_of(masks, law)
    return found.size_faults(masks.sum(1)), found.density_faults(), found.pair_faults()


@pytest.mark.parametrize("law", ["exact", "bernoulli"])
def test_masks_of_either_law_pass_whatever_the_seed(law):
    assert all(faults(drawn(law, seed), law) == (None, None, None) for seed in range(6))


@pytest.mark.parametrize("law", ["exact", "bernoulli"])
def test_a_column_that_is_in_too_many_subsets_is_named(law):
    masks = drawn(law)
    masks[:150, 17] = True
    assert "example 17 is in" in faults(masks, law)[1]


@pytest.mark.parametrize("law", ["exact", "bernoulli"])
def test_neighbours_that_come_together_are_found_though_each_is_in_as_many_subsets_as_it_should(law):
    masks = drawn(law)
    masks[:, 31] = masks[:, 30]
    _, density, pairs = faults(masks, law)
    assert density is None
    assert "30 and 31 are together in" in pairs


def test_the_negative_correlation_of_exact_subsets_is_no_fault_and_would_be_one_of_independent_draws():
    masks = draw_masks(0, np.arange(60_000, dtype=np.uint64), 24, 0.5)
    exact, independent = (MaskLaw(24, 0.5, is_exact=is_exact) for is_exact in (True, False))
    exact.add(masks)
    independent.add(masks)
    assert exact.pair_faults() is None
    assert "are in subsets together more or less often" in independent.pair_faults()


def test_masks_of_another_law_or_alpha_are_found_by_their_sizes():
    assert "masks have another size than 36" in faults(drawn("bernoulli"), "exact")[0]
    assert "sizes of masks scatter by 0.0" in faults(drawn("exact"), "bernoulli")[0]
    other = draw_masks(0, np.arange(5, dtype=np.uint64), N_TRAIN, 0.8)
    masks = np.concatenate([drawn("exact"), other])
    assert faults(masks, "exact")[0] == "5 of 605 masks have another size than 36 of 90 examples; mask 600 has 72"
    mixed = np.concatenate([drawn("bernoulli"), other])
    assert "mask 600 has 72" in faults(mixed, "bernoulli")[0]


def test_a_share_that_is_none_is_refused():
    with pytest.raises(SpecError, match="choose between 0 and 1"):
        MaskLaw(10, 1.0, is_exact=True)
