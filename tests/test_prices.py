"""What a transfer costs, against the list prices worked out by hand."""

import doctest
import importlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmdata.prices import GIB, LINK, PRICES, Destination, quote, readable_bytes, readable_usd

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


@pytest.mark.parametrize("module", ["dmdata", "dmdata.prices", "dmdata.array"])
def test_the_examples_in_the_documentation_are_true(module: str) -> None:
    outcome = doctest.testmod(importlib.import_module(module))
    assert outcome.attempted > 0
    assert outcome.failed == 0
