import pickle
import subprocess
import sys

import dask.array
import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from dmdata.errors import FormatError
from dmpipeline.errors import RunError, SpecError
from dmpipeline.moments import binary
from dmpipeline.moments.moments import Moments


def drawn(n_models, n_train, n_targets, *, seed=0, dtype=np.float16):
    rng = np.random.default_rng(seed)
    return rng.random((n_models, n_train)) < 0.5, rng.normal(3, 4, (n_models, n_targets)).astype(dtype)


def assert_same(a, b):
    assert a.n == b.n
    for name in ("gram", "shift", "cross", "y_sum", "y_squares"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@settings(max_examples=40, deadline=None)
@given(
    n_models=st.integers(1, 60),
    n_train=st.integers(1, 20),
    n_targets=st.integers(1, 4),
    block_rows=st.integers(1, 70),
    seed=st.integers(0, 1000),
)
def test_moments_equal_the_plain_products(n_models, n_train, n_targets, block_rows, seed):
    masks, outputs = drawn(n_models, n_train, n_targets, seed=seed)
    got = Moments.of(masks, outputs, block_rows=block_rows)
    x, y = masks.astype(np.int64), outputs.astype(np.float64)
    assert got.n == n_models
    np.testing.assert_array_equal(got.gram, x.T @ x)
    np.testing.assert_array_equal(got.ones, x.sum(axis=0))
    np.testing.assert_array_equal(got.cross, x.T @ y)  # exact: sums of float16 numbers fit float64
    np.testing.assert_array_equal(got.y_sum, y.sum(axis=0))
    np.testing.assert_allclose(got.y_squares, (y**2).sum(axis=0), rtol=1e-14)


@pytest.mark.parametrize(
    "n_train", [1, 2 * binary._TILE_COLUMNS + 77, binary._PANEL_COLUMNS + 2 * binary._TILE_COLUMNS]
)
def test_columns_beyond_one_tile_and_one_panel_are_all_counted(n_train):
    masks, outputs = drawn(40, n_train, 2)
    got = Moments.of(masks, outputs, block_rows=13)
    np.testing.assert_array_equal(got.gram, masks.astype(np.int64).T @ masks.astype(np.int64))
    np.testing.assert_array_equal(got.cross, masks.astype(float).T @ outputs.astype(float))


@pytest.mark.parametrize("n_models", [31, 33, 64 * binary._TILE_WORDS, 64 * binary._TILE_WORDS + 65])
def test_rows_that_end_within_a_word_and_beyond_a_tile_are_all_counted(n_models):
    masks, outputs = drawn(n_models, 7, 3)
    got = Moments.of(masks, outputs, block_rows=10_000)
    np.testing.assert_array_equal(got.gram, masks.astype(np.int64).T @ masks.astype(np.int64))
    np.testing.assert_array_equal(got.cross, masks.astype(float).T @ outputs.astype(float))


def test_bits_that_fill_their_room_are_counted_and_forgotten():
    masks, outputs = drawn(500, 70, 2)
    whole = Moments.of(masks, outputs)
    for block_rows in (60, 200):
        assert_same(Moments.of(masks, outputs, block_rows=block_rows, bits_bytes=70 * 16), whole)  # 128 rows


@pytest.mark.parametrize("n_targets", [1, 2 * binary._MOST_BYTES // 4 + 5])
def test_the_number_of_threads_does_not_change_a_bit(n_targets):
    masks, outputs = drawn(300, 300, n_targets, dtype=np.float32)
    assert_same(Moments.of(masks, outputs, threads=1), Moments.of(masks, outputs, threads=7))


def test_added_moments_equal_those_of_all_rows_in_any_order():
    masks, outputs = drawn(90, 12, 3)
    whole = Moments.of(masks, outputs)
    a, b, c = (Moments.of(masks, outputs, start=i, stop=j) for i, j in ((0, 20), (20, 61), (61, 90)))
    assert_same(a + b + c, whole)
    assert_same(c + (a + b), whole)


def centred(moments):
    """X'(Y - mean) and the variances of Y, which do not depend on the shift."""
    mean = moments.y_sum / moments.n
    return moments.cross - np.outer(moments.ones, mean), moments.y_squares / moments.n - mean**2


@settings(max_examples=40, deadline=None)
@given(
    offset=st.sampled_from([0.0, -3.0, 1e3, 1e6, -1e9]),
    dtype=st.sampled_from([np.float64, np.float32]),
    cut=st.integers(1, 199),
    block_rows=st.integers(1, 250),
    seed=st.integers(0, 1000),
)
def test_a_large_offset_drowns_nothing_whether_summed_at_once_or_in_parts(offset, dtype, cut, block_rows, seed):
    rng = np.random.default_rng(seed)
    masks = rng.random((200, 6)) < 0.5
    outputs = (offset + rng.normal(0, 0.1, (200, 3)) * max(1, abs(offset) * 1e-5)).astype(dtype)
    y = outputs.astype(np.longdouble)
    y -= y.mean(axis=0)
    cross, variance = (masks.T @ y).astype(float), (y**2).mean(axis=0).astype(float)
    deviation = np.sqrt(variance).max()
    first, second = (
        Moments.of(masks, outputs, start=i, stop=j, block_rows=block_rows) for i, j in ((0, cut), (cut, 200))
    )
    for got in (Moments.of(masks, outputs, block_rows=block_rows), first + second, second + first):
        got_cross, got_variance = centred(got)
        np.testing.assert_allclose(got_cross, cross, rtol=0, atol=1e-9 * deviation)
        np.testing.assert_allclose(got_variance, variance, rtol=1e-9)
        np.testing.assert_array_equal(got.gram, masks.astype(np.int64).T @ masks.astype(np.int64))


def test_half_precision_outputs_are_summed_as_they_are():
    masks, outputs = drawn(30, 6, 2)
    assert not Moments.of(masks, outputs).shift.any()
    np.testing.assert_array_equal(Moments.of(masks, outputs.astype(np.float32), start=3).shift, outputs[3])


@settings(max_examples=30, deadline=None)
@given(
    exponents=st.sampled_from([(-24, -14), (-24, 15), (-8, 4), (15, 15)]),
    n_models=st.sampled_from([7, 511, 513, 2000]),
    sign=st.sampled_from([1, -1, 0]),
    seed=st.integers(0, 10_000),
)
def test_sums_of_half_precision_are_exact_however_large_and_small(exponents, n_models, sign, seed):
    rng = np.random.default_rng(seed)
    size = rng.uniform(1, 1.999, (n_models, 70)) * 2.0 ** rng.integers(*exponents, (n_models, 70), endpoint=True)
    outputs = (size * (sign or rng.choice([-1, 1], size.shape)) * (rng.random(size.shape) < 0.9)).astype(np.float16)
    masks = rng.random((n_models, 9)) < 0.8
    grains = (outputs.astype(np.float64) * 2**24).astype(np.int64)  # every float16 is a whole number of these
    got = Moments.of(masks, outputs, block_rows=1024)
    np.testing.assert_array_equal(got.cross * 2**24, masks.astype(np.int64).T @ grains)
    np.testing.assert_array_equal(got.y_sum * 2**24, grains.sum(axis=0))


def test_small_outputs_among_large_ones_are_summed_in_every_column_and_target():
    """The small ones have digits below what the large ones are counted in, and are added by themselves."""
    masks, outputs = drawn(100, binary._PANEL_COLUMNS + 5, 2 * binary._RESTS_AT_ONCE + 3)
    outputs[::7] = (np.arange(outputs.shape[1]) + 1) * 2.0**-24
    outputs[0] = 60_000
    got = Moments.of(masks, outputs, block_rows=64)
    np.testing.assert_array_equal(got.cross, masks.astype(float).T @ outputs.astype(float))


def test_moments_taken_off_leave_those_of_the_other_rows():
    masks, outputs = drawn(90, 12, 3)
    whole, last = Moments.of(masks, outputs), Moments.of(masks, outputs, start=61)
    assert_same(whole - last, Moments.of(masks, outputs, stop=61))
    shifted = outputs.astype(np.float64) + 1e6
    rest = Moments.of(masks, shifted) - Moments.of(masks, shifted, start=61)
    for got, expected in zip(centred(rest), centred(Moments.of(masks, shifted, stop=61)), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(SpecError, match="at least 1 model"):
        last - last


class Recorder:
    """An array that writes down which rows are asked for."""

    def __init__(self, data):
        self.data, self.shape, self.read = data, data.shape, []

    def __getitem__(self, rows):
        self.read.append((rows.start, rows.stop))
        return self.data[rows]


def test_saved_moments_are_extended_without_reading_old_rows(tmp_path):
    masks, outputs = drawn(300, 40, 5)
    early = Moments.of(masks[:120], outputs[:120])
    path = early.save(tmp_path / "moments.pt")
    grown = Recorder(masks), Recorder(outputs)
    late = Moments.open(path).extended(*grown, block_rows=64)
    assert_same(late, Moments.of(masks, outputs))
    assert grown[0].read == grown[1].read == [(120, 184), (184, 248), (248, 300)]
    assert_same(Moments.open(path), early)  # a file is not changed by what was read from it
    late.save(path)
    assert_same(Moments.open(path), late)
    assert [p.name for p in tmp_path.iterdir()] == ["moments.pt"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_moments_filled_into_a_file_are_those_that_are_saved(tmp_path, dtype):
    masks, outputs = drawn(90, 7, 3, dtype=dtype)
    whole = Moments.of(masks, outputs)
    Moments.save_new(tmp_path / "a.pt", 7, 3, lambda zeros: Moments.of(masks, outputs, stop=40, zeros=zeros))
    first, rest = Moments.open(tmp_path / "a.pt"), Moments.of(masks, outputs, start=40)
    assert_same(first, Moments.of(masks, outputs, stop=40))
    Moments.save_new(tmp_path / "sum.pt", 7, 3, lambda zeros: first.plus(rest, zeros=zeros))
    assert_same(Moments.open(tmp_path / "sum.pt"), first + rest)
    assert np.array_equal(Moments.open(tmp_path / "sum.pt").ones, whole.ones)
    torch.load(tmp_path / "sum.pt", weights_only=True)


def test_what_fails_while_a_file_is_filled_leaves_none(tmp_path):
    masks, outputs = drawn(20, 7, 3)
    outputs[11] = np.inf
    with pytest.raises(SpecError, match="not finite in rows 11"):
        Moments.save_new(tmp_path / "a.pt", 7, 3, lambda zeros: Moments.of(masks, outputs, zeros=zeros))
    assert not list(tmp_path.iterdir())


def test_a_file_larger_than_the_disk_is_refused_before_it_is_filled(tmp_path):
    with pytest.raises(RunError, match=r"No space left|File too large"):
        Moments.save_new(tmp_path / "a.pt", 2_000_000, 3, lambda _: pytest.fail("nothing is to be counted"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("chosen", [slice(1, 3), slice(2, None), slice(0, 5, 2), slice(-1, None)])
def test_moments_of_some_targets_are_those_of_their_columns(chosen):
    masks, outputs = drawn(50, 7, 5, dtype=np.float64)
    whole = Moments.of(masks, outputs)
    assert_same(whole.of_targets(chosen), Moments.of(masks, outputs[:, chosen]))
    assert whole.of_targets(chosen).gram is whole.gram


def test_no_targets_are_refused():
    with pytest.raises(SpecError, match="none of 5; choose at least one"):
        Moments.of(*drawn(9, 7, 5)).of_targets(slice(5, 9))


def test_extended_moments_keep_their_shift_and_leave_the_old_ones_alone():
    masks, outputs = drawn(200, 6, 3, dtype=np.float32)
    early = Moments.of(masks[:50], outputs[:50] + 1e6)
    before = early.gram.copy(), early.cross.copy()
    late = early.extended(masks[50:], outputs[50:] + 1e6, start=0)
    assert late.n == 200
    np.testing.assert_array_equal(late.shift, early.shift)
    for got, expected in zip(centred(late), centred(Moments.of(masks, outputs + 1e6)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(early.gram, before[0])
    np.testing.assert_array_equal(early.cross, before[1])


def test_moments_are_not_extended_by_other_columns_or_no_rows():
    early = Moments.of(*drawn(20, 4, 2))
    with pytest.raises(SpecError, match="do not continue moments of 4 examples and 2 targets"):
        early.extended(*drawn(40, 5, 2))
    with pytest.raises(SpecError, match="rows 20:20"):
        early.extended(*drawn(20, 4, 2))


def test_a_file_that_holds_no_moments_is_refused(tmp_path):
    whole = Moments.of(*drawn(20, 4, 2)).save(tmp_path / "moments.pt")
    data = whole.read_bytes()
    whole.write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError, match="write it again"):
        Moments.open(whole)
    torch.save({"n": torch.tensor(3), "gram": torch.zeros(2, 2)}, whole)
    with pytest.raises(FormatError, match="does not hold the tensors"):
        Moments.open(whole)
    moments_of = {name: torch.zeros(2, dtype=torch.float64) for name in ("shift", "y_sum", "y_squares")}
    torch.save(moments_of | {"n": torch.tensor(3), "gram": torch.zeros(2, 2), "cross": torch.zeros(4, 2)}, whole)
    with pytest.raises(FormatError, match="write it again"):
        Moments.open(whole)
    whole.write_bytes(pickle.dumps({"n": 1}))
    with pytest.raises(FormatError):
        Moments.open(whole)
    with pytest.raises(RunError, match="gone"):
        Moments.open(tmp_path / "gone.pt")


MEMORY = """
from pathlib import Path
import numpy as np
from dmpipeline.moments.moments import BITS_BYTES, Moments

def most_used():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])

class Drawn:
    def __init__(self, shape, dtype):
        self.shape, self.dtype = shape, dtype
    def __getitem__(self, rows):
        shape = (rows.stop - rows.start, self.shape[1])
        return np.random.default_rng(rows.start).integers(0, 2, shape, self.dtype).view(self.out)

masks, outputs = Drawn((12_000, 6000), np.uint8), Drawn((12_000, 8), np.uint16)
masks.out, outputs.out = np.bool_, np.float16
Moments.of(np.eye(3, dtype=bool), np.ones((3, 2), np.float16))  # compiles
before = most_used()
moments = Moments.of(masks, outputs, block_rows=1024, threads=2)
print(most_used() - before, 1.3 * moments.gram.nbytes + 1024 * (6000 + 12 * 8) + BITS_BYTES + 2 * 2 * 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_the_gram_and_a_stated_buffer():
    said = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout
    grown, stated = map(float, said.split())
    assert 4 * 6000**2 < grown < stated


def test_moments_of_different_examples_are_not_added():
    with pytest.raises(SpecError, match="same examples"):
        Moments.of(*drawn(9, 4, 2)) + Moments.of(*drawn(9, 5, 2))


def test_zarr_and_dask_give_the_same_moments_as_numpy(tmp_path):
    masks, outputs = drawn(50, 8, 3)
    group = zarr.create_group(tmp_path / "run.zarr")
    x = group.create_array("masks", data=masks, chunks=(16, 8))
    y = group.create_array("margins", data=outputs, chunks=(16, 3))
    whole = Moments.of(masks, outputs, block_rows=7)
    assert_same(Moments.of(x, y, block_rows=7), whole)
    assert_same(Moments.of(dask.array.from_array(masks), dask.array.from_array(outputs), block_rows=7), whole)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_zeros_and_ones_of_any_dtype_are_masks(dtype):
    masks, outputs = drawn(30, 6, 2)
    assert_same(Moments.of(masks.astype(dtype), outputs), Moments.of(masks, outputs))


def test_lists_are_refused_with_what_to_hand_in():
    masks, outputs = drawn(30, 6, 2)
    with pytest.raises(SpecError, match=r"masks are a list; .*numpy\.asarray\(masks\)"):
        Moments.of(masks.tolist(), outputs)
    with pytest.raises(SpecError, match="outputs are a list"):
        Moments.of(masks, outputs.tolist())


def test_rows_are_read_once_and_in_blocks():
    masks, outputs = (Recorder(a) for a in drawn(50, 5, 2))
    seen = []
    Moments.of(
        masks, outputs, start=10, stop=45, block_rows=16, progress=lambda done, total: seen.append((done, total))
    )
    assert masks.read == outputs.read == [(10, 26), (26, 42), (42, 45)]
    assert seen == [(16, 35), (32, 35), (35, 35)]


def test_outputs_that_are_not_finite_are_named_by_row_and_target():
    masks, outputs = drawn(50, 5, 4)
    outputs[31, 2] = np.nan
    outputs[33, 0] = np.inf
    with pytest.raises(SpecError, match=r"not finite in rows 31, 33, targets 0, 2") as caught:
        Moments.of(masks, outputs, block_rows=30)
    assert caught.value.rows == [31, 33]
    assert caught.value.targets == [0, 2]


def test_a_mask_that_is_not_zero_or_one_is_named():
    masks, outputs = drawn(20, 5, 1)
    counts = masks.astype(int)
    counts[17, 3] = 2
    with pytest.raises(SpecError, match="2 at row 17, column 3"):
        Moments.of(counts, outputs, block_rows=10)


@pytest.mark.parametrize(
    ("masks", "outputs", "said"),
    [
        (np.ones(5, bool), np.ones((5, 1)), "n_models, n_train"),
        (np.ones((5, 2), bool), np.ones(5), "reshape a single target"),
        (np.ones((5, 2), bool), np.ones((5, 3, 10)), "margin of the logits"),
        (np.ones((5, 2), bool), np.ones((6, 3)), "5 masks but 6 rows"),
        (np.ones((0, 2), bool), np.ones((0, 3)), "nothing to fit"),
        (np.ones((5, 2), bool), np.ones((5, 3), complex), "real numbers"),
    ],
)
def test_arrays_that_make_no_regression_are_refused(masks, outputs, said):
    with pytest.raises(SpecError, match=said):
        Moments.of(masks, outputs)
