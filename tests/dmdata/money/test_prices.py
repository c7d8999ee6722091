"""What a transfer costs, against the list prices worked out by hand."""

import doctest
import importlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmdata.errors import SelectionError
from dmdata.money.prices import GIB, LINK, PRICES, Destination, Usage, quote, readable_bytes, readable_usd, usage_of

INTERNET, SAME, CROSS = Destination.INTERNET, Destination.SAME_REGION, Destination.CROSS_REGION
TIB = 1024 * GIB


@pytest.mark.parametrize(
    ("n_bytes", "used_gib", "usd"),
    [
        (GIB, 100, 0.09),
        (GIB, 0, 0.0),
        (100 * GIB, 0, 0.0),
        (101 * GIB, 0, 0.09),
        (101 * GIB, 50, 51 * 0.09),
        (10 * TIB, 100, 10_140 * 0.09 + 100 * 0.085),
        (10 * TIB, 0, 10_140 * 0.09),
        (200 * TIB, 0, 10_140 * 0.09 + 40_960 * 0.085 + 102_400 * 0.07 + (204_800 - 153_600) * 0.05),
        (GIB, 20_000, 0.085),
        (GIB, 60_000, 0.07),
        (GIB, 1e6, 0.05),
    ],
)
def test_the_price_to_the_internet_falls_by_tiers_after_a_free_one(n_bytes: int, used_gib: float, usd: float) -> None:
    assert PRICES.transfer_usd(n_bytes, INTERNET, used_gib=used_gib) == pytest.approx(usd)


def test_the_default_is_an_upper_bound_that_takes_the_free_tier_as_used_up() -> None:
    one = quote(GIB, 1000, INTERNET)
    assert one.usd == one.usd_high == pytest.approx(0.09 + 0.0004)
    assert one.usd_low == pytest.approx(0.0004)


def test_in_the_same_region_only_requests_cost() -> None:
    one = quote(TIB, 10_000, SAME)
    assert one.usd == one.usd_low == one.usd_high == pytest.approx(0.004)


def test_to_another_region_a_gigabyte_costs_one_or_two_cents() -> None:
    one = quote(10 * GIB, 0, CROSS)
    assert (one.usd_low, one.usd_high) == (pytest.approx(0.10), pytest.approx(0.20))


def test_a_request_costs_as_much_as_4772_bytes_to_the_internet() -> None:
    assert math.floor(PRICES.break_even_gap_bytes(INTERNET)) == 4772
    assert math.floor(PRICES.break_even_gap_bytes(CROSS)) == 21_474
    assert PRICES.break_even_gap_bytes(SAME) == math.inf


@given(st.integers(0, 1 << 60), st.integers(0, 10**9), st.sampled_from(Destination))
def test_bounds_hold_and_more_is_never_cheaper(n_bytes: int, n_requests: int, destination: Destination) -> None:
    one, more = quote(n_bytes, n_requests, destination), quote(n_bytes + GIB, n_requests + 1, destination)
    assert 0 <= one.usd_low <= one.usd_high == one.usd
    assert one.usd < more.usd
    assert one.usd_low < more.usd_low


@given(
    n_bytes=st.integers(0, 300 * TIB),
    used_gib=st.one_of(st.floats(0, 1e6), st.sampled_from([0.0, 100.0, 10_240.0, 51_200.0, 153_600.0, 1e12])),
    free_gib_left=st.booleans(),
    known=st.booleans(),
)
def test_whatever_the_month_was_the_bill_lies_between_the_bounds(
    n_bytes: int, used_gib: float, free_gib_left: bool, known: bool
) -> None:
    position = used_gib if free_gib_left else max(used_gib, PRICES.free_gib)
    bill = PRICES.transfer_usd(n_bytes, INTERNET, used_gib=position)
    one = quote(n_bytes, 0, INTERNET, usage=Usage(used_gib if known else None))
    assert one.usd_low <= bill * (1 + 1e-9)
    assert bill <= one.usd_high * (1 + 1e-9)
    assert one.usd == one.usd_high


@given(st.integers(0, 300 * TIB), st.floats(0, 1e6))
def test_with_the_month_known_the_price_is_one_number_and_more_knowledge_never_widens_the_bounds(
    n_bytes: int, used_gib: float
) -> None:
    nothing = quote(n_bytes, 7, INTERNET)
    used = quote(n_bytes, 7, INTERNET, usage=Usage(used_gib))
    everything = quote(n_bytes, 7, INTERNET, usage=Usage(used_gib, free_tier=True))
    assert everything.usd_low == everything.usd == everything.usd_high
    tolerance = 1 + 1e-9
    assert nothing.usd_low <= used.usd_low * tolerance
    assert used.usd_low <= everything.usd * tolerance
    assert everything.usd <= used.usd_high * tolerance
    assert used.usd_high <= nothing.usd_high * tolerance


@pytest.mark.parametrize(
    ("usage", "low", "high"),
    [
        (Usage(), 0.0, 90.0 / 1000),
        (Usage(0.0), 0.0, 90.0 / 1000),
        (Usage(99.5), 0.045, 0.09),
        (Usage(99.5, free_tier=True), 0.045, 0.045),
        (Usage(100.0), 0.09, 0.09),
        (Usage(10_239.5), 0.0875, 0.0875),
        (Usage(10_240.0), 0.085, 0.085),
        (Usage(153_600.0), 0.05, 0.05),
        (Usage(free_tier=True), 0.0, 0.0),
    ],
)
def test_a_gigabyte_at_each_edge_of_the_month(usage: Usage, low: float, high: float) -> None:
    one = quote(GIB, 0, INTERNET, usage=usage)
    assert (one.usd_low, one.usd_high) == (pytest.approx(low), pytest.approx(high))


def test_without_knowledge_of_the_month_the_lower_bound_is_that_of_the_heaviest_user() -> None:
    assert quote(4 * TIB, 0, INTERNET).usd_low == pytest.approx(4096 * 0.05)
    assert quote(4 * TIB, 0, INTERNET, usage=Usage(0.0)).usd_low == pytest.approx((4096 - 100) * 0.09)


@pytest.mark.parametrize("used_gib", [-1.0, math.nan, math.inf])
def test_a_month_that_cannot_be_is_refused(used_gib: float) -> None:
    with pytest.raises(SelectionError, match="at least 0"):
        usage_of(used_gib)


@pytest.mark.parametrize("destination", [SAME, CROSS])
def test_the_month_to_the_internet_changes_nothing_inside(destination: Destination) -> None:
    assert quote(TIB, 5, destination) == quote(TIB, 5, destination, usage=Usage(20_000.0, free_tier=True))


@given(st.integers(0, 1 << 50), st.integers(0, 1 << 50), st.floats(0, 1e6))
def test_a_transfer_in_two_parts_costs_what_it_costs_in_one(first: int, second: int, used_gib: float) -> None:
    whole = PRICES.transfer_usd(first + second, INTERNET, used_gib=used_gib)
    parts = PRICES.transfer_usd(first, INTERNET, used_gib=used_gib)
    parts += PRICES.transfer_usd(second, INTERNET, used_gib=used_gib + first / GIB)
    assert whole == pytest.approx(parts, rel=1e-9, abs=1e-9)


def test_many_small_requests_take_longer_than_one_large() -> None:
    assert LINK.seconds(1000, 1000) > LINK.seconds(1000, 1)
    assert LINK.seconds(0, 0) == 0


@pytest.mark.parametrize(
    ("usd", "text"),
    [(0, "$0.00"), (1234.5, "$1,234.50"), (0.01, "$0.01"), (0.0099, "$0.0099"), (3.4e-7, "$0.00000034")],
)
def test_dollars_are_readable_however_few(usd: float, text: str) -> None:
    assert readable_usd(usd) == text


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (GIB, "1.0 GiB"),
        (5 * TIB, "5.0 TiB"),
        (5000 * TIB, "5,000.0 TiB"),
    ],
)
def test_bytes_are_readable_however_many(n_bytes: int, text: str) -> None:
    assert readable_bytes(n_bytes) == text


@pytest.mark.parametrize("module", ["dmdata", "dmdata.shown", "dmdata.array"])
def test_the_examples_in_the_documentation_are_true(module: str) -> None:
    outcome = doctest.testmod(importlib.import_module(module))
    assert outcome.attempted > 0
    assert outcome.failed == 0
