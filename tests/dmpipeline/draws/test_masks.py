import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmpipeline.draws.masks import (
    Purpose,
    draw_bernoulli_masks,
    draw_bits,
    draw_mask,
    draw_masks,
    draw_orders,
    draw_permutation,
    draw_uniform,
    given_masks,
    subset_masks,
    subset_size,
)
from dmpipeline.errors import SpecError
from dmpipeline.spec import RunSpec

SEEDS = st.integers(0, 2**64 - 1)


@given(seed=SEEDS, index=SEEDS, n_train=st.integers(4, 300), alpha=st.sampled_from([0.3, 0.5, 0.6]))
def test_a_mask_has_exactly_the_size_asked_for(seed, index, n_train, alpha):
    mask = draw_mask(seed, index, n_train, alpha)
    assert mask.shape == (n_train,)
    assert mask.sum() == subset_size(n_train, alpha) == round(alpha * n_train)


@given(seed=SEEDS, indices=st.lists(SEEDS, max_size=6))
def test_a_row_is_the_same_drawn_alone_or_among_others(seed, indices):
    masks = draw_masks(seed, np.array(indices, np.uint64), 50, 0.5)
    assert masks.shape == (len(indices), 50)
    assert all((mask == draw_mask(seed, index, 50, 0.5)).all() for mask, index in zip(masks, indices, strict=True))


@given(seed=SEEDS, index=SEEDS, n=st.integers(1, 200))
def test_a_permutation_holds_every_number_once(seed, index, n):
    assert (np.sort(draw_permutation(seed, Purpose.SPLIT, index, n)) == np.arange(n)).all()


@given(seed=SEEDS, index=SEEDS, subset=st.sets(st.integers(0, 100_000), min_size=1, max_size=40))
def test_every_epoch_sees_the_whole_subset_once(seed, index, subset):
    orders = draw_orders(seed, index, np.array(sorted(subset)), 3)
    assert orders.shape == (3, len(subset))
    assert all(sorted(order) == sorted(subset) for order in orders.tolist())


def test_draws_are_pinned_so_that_no_release_changes_a_row_unnoticed():
    # Computed once by this code. Another value here means that runs made before can no longer be replayed.
    assert draw_bits(7, Purpose.ORDER, 3, 2).tolist() == [2672325950562930440, 7430193390216688821]
    assert np.flatnonzero(draw_mask(7, 3, 12, 0.5)).tolist() == [0, 2, 3, 7, 10, 11]
    assert draw_permutation(0, Purpose.SPLIT, 0, 8).tolist() == [5, 4, 6, 7, 0, 1, 2, 3]
    assert draw_uniform(7, 3, 2).tolist() == [-0.8937344551086426, 0.18807852268218994]


def test_draws_are_those_of_philox_as_published():
    # Known answer of Philox 4x64-10 for counter and key zero, from the authors' Random123; numpy counts before it draws
    first = np.random.Philox(key=np.zeros(2, np.uint64), counter=np.array([2**64 - 1] * 4, np.uint64)).random_raw(4)
    assert [hex(word) for word in first.tolist()] == [
        "0x16554d9eca36314c",
        "0xdb20fe9d672d0fdc",
        "0xd7e772cee186176b",
        "0x7e68b68aec7ba23b",
    ]


@given(seed=SEEDS, purpose=st.sampled_from(Purpose), index=SEEDS, n=st.integers(0, 40))
def test_draws_are_those_of_numpy(seed, purpose, index, n):
    key, counter = np.array([seed, purpose], np.uint64), np.array([0, 0, 0, index], np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(n)
    assert draw_bits(seed, purpose, index, n).tolist() == words.tolist()


@given(seed=SEEDS, index=SEEDS, n=st.integers(2, 400))
def test_a_mask_is_where_a_permutation_begins(seed, index, n):
    first = draw_permutation(seed, Purpose.MASK, index, n)[: n // 2]
    assert np.flatnonzero(draw_mask(seed, index, n, n // 2 / n)).tolist() == sorted(first.tolist())


@pytest.mark.parametrize("change", ["seed", "purpose", "index"])
def test_another_seed_purpose_or_index_gives_other_bits(change):
    values = {"seed": 1, "purpose": Purpose.MASK, "index": 1}
    other = values | {change: Purpose.ORDER if change == "purpose" else 2}
    assert not np.intersect1d(draw_bits(**values, n=1000), draw_bits(**other, n=1000)).size


def test_examples_are_drawn_equally_often_and_pairs_independently():
    masks = draw_masks(0, np.arange(4000, dtype=np.uint64), 40, 0.5).astype(float)
    deviation = 0.5 / np.sqrt(len(masks))
    assert np.abs(masks.mean(0) - 0.5).max() < 4.5 * deviation
    # exact sizes make any two examples a little exclusive: their correlation is -1 / (n_train - 1)
    pairs = np.corrcoef(masks.T)[np.triu_indices(40, 1)]
    assert np.abs(pairs + 1 / 39).max() < 5 / np.sqrt(len(masks))


def test_initial_numbers_are_uniform_within_one_of_zero():
    numbers = draw_uniform(0, 0, 100_000)
    assert numbers.dtype == np.float32
    assert -1 <= numbers.min() < -0.999 < 0.999 < numbers.max() < 1
    assert abs(numbers.mean()) < 0.01
    assert abs(numbers.var() - 1 / 3) < 0.01


@pytest.mark.parametrize(("n_train", "alpha"), [(3, 0.1), (4, 0.9), (1, 0.5)])
def test_a_subset_of_nothing_or_of_everything_is_refused(n_train, alpha):
    with pytest.raises(SpecError, match=str(alpha)):
        draw_mask(0, 0, n_train, alpha)


def test_independent_masks_hold_examples_as_often_as_alpha_says_and_independently():
    masks = draw_bernoulli_masks(0, np.arange(4000, dtype=np.uint64), 40, 0.3)
    deviation = np.sqrt(0.3 * 0.7 / len(masks))
    assert np.abs(masks.mean(0) - 0.3).max() < 4.5 * deviation
    pairs = np.corrcoef(masks.T.astype(float))[np.triu_indices(40, 1)]
    assert np.abs(pairs).max() < 5 / np.sqrt(len(masks))
    # sizes are those of coins
    assert masks.sum(1).var() == pytest.approx(40 * 0.3 * 0.7, rel=0.15)


@given(seed=SEEDS, indices=st.lists(SEEDS, min_size=1, max_size=4), n_train=st.integers(1, 60))
def test_an_independent_mask_is_the_same_alone_among_others_and_at_the_start_of_a_longer_one(seed, indices, n_train):
    numbers = np.array(indices, np.uint64)
    masks = draw_bernoulli_masks(seed, numbers, n_train, 0.5)
    assert (masks[-1] == draw_bernoulli_masks(seed, numbers[-1:], n_train, 0.5)[0]).all()
    longer = draw_bernoulli_masks(seed, numbers, n_train + 10, 0.5)[:, :n_train]
    assert all((long == mask).all() for long, mask in zip(longer, masks, strict=True) if long.any())


def test_an_independent_mask_is_never_empty():
    masks = draw_bernoulli_masks(0, np.arange(3000, dtype=np.uint64), 3, 0.01)
    assert masks.any(1).all()
    assert (masks.sum(1) == 1).mean() > 0.9
    # whichever comes closest is equally likely to be any
    assert np.abs(masks.mean(0) - 1 / 3).max() < 0.05


def test_independent_masks_are_pinned_so_that_no_release_changes_a_row_unnoticed():
    assert np.flatnonzero(draw_bernoulli_masks(7, np.array([3], np.uint64), 12, 0.5)[0]).tolist() == [
        0,
        2,
        3,
        4,
        5,
        7,
        10,
        11,
    ]


def given_spec(path, **changes):
    return RunSpec(**({"masks": str(path), "n_models": 3, "held_out": {"n_subsets": 2, "n_retrainings": 2}} | changes))


def test_given_masks_are_those_to_fit_on_and_then_one_for_each_held_out_subset(tmp_path):
    masks = np.random.default_rng(0).random((5, 9)) < 0.7
    np.save(tmp_path / "masks.npy", masks)
    spec = given_spec(tmp_path / "masks.npy")
    assert (subset_masks(spec, range(spec.n_rows), 9) == masks[[0, 1, 2, 3, 3, 4, 4]]).all()
    assert (subset_masks(spec, [6, 1, 3], 9) == masks[[4, 1, 3]]).all()
    assert subset_masks(spec, [], 9).shape == (0, 9)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: np.save(path, np.ones((4, 9), bool)), r"bool of shape \(4, 9\); write bool of shape \(5, 9\)"),
        (lambda path: np.save(path, np.ones((5, 9), np.uint8)), r"uint8 of shape \(5, 9\)"),
        (lambda path: np.save(path, np.array([{"a": 1}], object), allow_pickle=True), "cannot be read"),
        (lambda path: np.savez(path.open("wb"), masks=np.ones((5, 9), bool)), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(b"not numpy's"), "cannot be read"),
        (lambda _: None, "cannot be read .*No such file.*numpy.save"),
    ],
    ids=["rows", "dtype", "pickle", "npz", "empty", "text", "missing"],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_file_of_other_things_than_masks_is_refused(tmp_path, write, words):
    write(tmp_path / "masks.npy")
    with pytest.raises(SpecError, match=words):
        given_masks(given_spec(tmp_path / "masks.npy"), 9)


def test_a_given_mask_without_an_example_is_refused_by_its_row(tmp_path):
    masks = np.ones((5, 9), bool)
    masks[4] = False
    np.save(tmp_path / "masks.npy", masks)
    spec = given_spec(tmp_path / "masks.npy")
    assert subset_masks(spec, range(5), 9).all()
    with pytest.raises(SpecError, match="row 4 has no example"):
        subset_masks(spec, range(5, 7), 9)
