"""The planner against NumPy: every wanted byte covered once, nothing else but gaps, and the same answer."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dmdata.errors import SelectionError
from dmdata.layout.formats import Layout, contiguous_strides
from dmdata.layout.plan import land, plan_read, product_array
from dmdata.layout.selection import parse_selection, select


@st.composite
def arrays_in_objects(draw):
    """An array of distinct elements, its layout in an object with a header, and the object's bytes."""
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=7))
    dtype = draw(st.sampled_from(["bool", "float16", "float32", "int64"]))
    values = np.arange(math.prod(shape)).astype(dtype).reshape(shape)
    offset = draw(st.integers(0, 200))
    axes = draw(st.permutations(range(len(shape))))
    stored = values.transpose(axes)
    strides = [0] * len(shape)
    for axis, stride in zip(axes, contiguous_strides(stored.shape, values.itemsize), strict=True):
        strides[axis] = stride
    blob = bytes(offset) + np.ascontiguousarray(stored).tobytes() + b"tail"
    return values, Layout(values.shape, values.dtype, offset, tuple(strides)), np.frombuffer(blob, np.uint8)


def index_arrays(size):
    """Integer index arrays within bounds, negative ones, repeats and any order included."""
    return hnp.arrays(int, st.integers(0, 6) if size else 0, elements=st.integers(-size, max(size - 1, 0)))


def carry_out(plan, blob, *, chunk_bytes=1 << 20):
    """Do what a fetch does, in the plainest way, and check the plan's promises on the way."""
    product = np.zeros(plan.wanted_bytes, np.uint8)
    covered = np.zeros(len(blob), int)
    ranges = plan.ranges
    landings = plan.wanted.landing(ranges.ravel()).reshape(-1, 2)
    for (start, stop), (at, end) in zip(ranges, landings, strict=True):
        assert start < stop
        covered[start:stop] += 1
        for position in range(start, stop, chunk_bytes):
            chunk = blob[position : min(position + chunk_bytes, stop)]
            at += land(plan.wanted, position, chunk, product, at)
        assert at == end
    assert covered.max(initial=0) <= 1
    assert covered.sum() == plan.n_bytes
    assert len(ranges) == plan.n_requests
    for starts, stops in plan.wanted.segments():
        for start, stop in zip(starts, stops, strict=True):
            assert (covered[start:stop] == 1).all()
    assert (ranges[:-1, 1] <= ranges[1:, 0]).all()
    return product_array(plan, product)


@pytest.fixture(params=[1 << 20, 5, 1], ids=["at once", "five at once", "one at once"])
def how(request):
    """Let the planner hold few or many segments at a time; what it plans must not depend on it."""
    return {"most_at_once": request.param}


together = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@together
@given(st.data())
def test_basic_indexing_equals_numpy_and_covers_each_wanted_byte_once(how, data):
    values, layout, blob = data.draw(arrays_in_objects())
    key = data.draw(hnp.basic_indices(values.shape))
    cap, gap = data.draw(st.integers(1, 64)), data.draw(st.integers(0, 40))
    plan = plan_read(layout, select(key, values.shape, orthogonal=False), max_gap_bytes=gap, max_range_bytes=cap, **how)
    expected = values[key]
    got = carry_out(plan, blob, chunk_bytes=data.draw(st.integers(1, 40)))
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)
    assert plan.wanted_bytes == expected.nbytes
    assert (np.diff(plan.ranges) <= max(cap, values.itemsize)).all()


@together
@given(st.data())
def test_orthogonal_indexing_equals_numpys_ix(how, data):
    values, layout, blob = data.draw(arrays_in_objects())
    key, picks = [], []
    for size in values.shape:
        if data.draw(st.booleans()):
            mask = data.draw(hnp.arrays(bool, size))
            key.append(mask)
            picks.append(np.flatnonzero(mask))
        else:
            index = data.draw(index_arrays(size))
            key.append(index)
            picks.append(index)
    plan = plan_read(
        layout, select(tuple(key), values.shape, orthogonal=True), max_gap_bytes=8, max_range_bytes=32, **how
    )
    np.testing.assert_array_equal(carry_out(plan, blob), values[np.ix_(*picks)])


@together
@given(st.data())
def test_one_index_array_among_numbers_and_slices_equals_numpy(how, data):
    values, layout, blob = data.draw(arrays_in_objects())
    where = data.draw(st.integers(0, values.ndim - 1))
    key = []
    for axis, size in enumerate(values.shape):
        if axis == where:
            key.append(data.draw(index_arrays(size)))
        elif size and data.draw(st.booleans()):
            key.append(data.draw(st.integers(-size, size - 1)))
        else:
            key.append(data.draw(st.slices(size)))
    plan = plan_read(
        layout, select(tuple(key), values.shape, orthogonal=False), max_gap_bytes=0, max_range_bytes=64, **how
    )
    np.testing.assert_array_equal(carry_out(plan, blob), values[tuple(key)])


def test_gaps_are_merged_only_up_to_the_limit():
    layout = Layout((100, 10), np.dtype("float16"), 128, (20, 2))
    column = select(np.s_[:, 3], layout.shape, orthogonal=False)
    apart = plan_read(layout, column, max_gap_bytes=17, max_range_bytes=1 << 20)
    together = plan_read(layout, column, max_gap_bytes=18, max_range_bytes=1 << 20)
    assert (apart.n_requests, apart.n_bytes) == (100, 200)
    assert (together.n_requests, together.n_bytes) == (1, 99 * 20 + 2)
    assert together.amplification == pytest.approx(9.91)


def test_a_column_of_a_million_rows_is_planned_as_arrays():
    layout = Layout((1_510_000, 10_000), np.dtype("float16"), 128, (20_000, 2))
    plan = plan_read(
        layout, select(np.s_[:, 42], layout.shape, orthogonal=False), max_gap_bytes=4772, max_range_bytes=2**24
    )
    assert plan.n_requests == 1_510_000
    assert plan.n_bytes == plan.wanted_bytes == 3_020_000


@given(st.data())
def test_how_many_segments_are_held_at_once_changes_no_range(data):
    values, layout, _ = data.draw(arrays_in_objects())
    selection = select(data.draw(hnp.basic_indices(values.shape)), values.shape, orthogonal=False)
    how = {"max_gap_bytes": data.draw(st.integers(0, 40)), "max_range_bytes": data.draw(st.integers(1, 64))}
    whole = plan_read(layout, selection, **how)
    in_parts = plan_read(layout, selection, **how, most_at_once=data.draw(st.integers(1, 7)))
    np.testing.assert_array_equal(in_parts.ranges, whole.ranges)
    assert (in_parts.n_requests, in_parts.n_bytes) == (whole.n_requests, whole.n_bytes)


def test_every_second_number_of_terabytes_is_planned_in_bounded_memory():
    layout = Layout((1_510_000, 50_000, 10), np.dtype("float16"), 128, (1_000_000, 20, 2))
    every_second = select(np.s_[:, ::2, 3], layout.shape, orthogonal=False)
    tracemalloc.start()
    plan = plan_read(layout, every_second, max_gap_bytes=4772, max_range_bytes=1 << 24)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # planning goes through the 37,750,000,000 pieces of one class of half of the examples
    assert plan.wanted_bytes == 1_510_000 * 25_000 * 2
    assert peak < 300e6


def test_a_short_read_is_split_for_the_connections_there_are():
    layout = Layout((1 << 24,), np.dtype("uint8"), 0, (1,))
    whole = select(..., layout.shape, orthogonal=False)
    how = {"max_gap_bytes": 0, "max_range_bytes": 1 << 24, "least_range_bytes": 1 << 21}
    for n_at_once, n_requests in ((1, 1), (4, 4), (6, 6), (32, 8)):
        plan = plan_read(layout, whole, n_at_once=n_at_once, **how)
        assert (plan.n_requests, plan.n_bytes) == (n_requests, 1 << 24)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (7, "out of bounds"),
        (np.s_[0, 0, 0], "3 indices"),
        (([0, 1], [0, 1]), "oindex"),
        (np.zeros((4, 5), bool), "1-D"),
        (np.zeros(3, bool), "boolean index of 3"),
        ([0.5], "float64"),
        (None, "newaxis"),
        (True, "adds an axis"),
        ((..., ...), "two ellipses"),
        ("a", "not read"),
        (slice("a"), "slice"),
        ([[0], [1, 2]], "not an index"),
    ],
)
def test_a_selection_that_cannot_be_read_says_why(key, words):
    with pytest.raises(SelectionError, match=words):
        select(key, (4, 5), orthogonal=False)


def test_a_selection_written_as_text_means_the_product_of_its_axes():
    assert parse_selection("0:1000,42", (2000, 50)).shape == (1000,)
    assert parse_selection("::2,[1,5,9]", (10, 50)).shape == (5, 3)
    assert parse_selection("...,-1", (10, 50, 3)).shape == (10, 50)
    assert parse_selection(":", (10, 50)).shape == (10, 50)
    for text in ("a", "1:2:3:4", "[1,a]", ""):
        with pytest.raises(SelectionError, match="write it like"):
            parse_selection(text, (10, 50))
