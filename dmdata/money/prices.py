"""What a transfer costs: a dated price table, and estimates with a lower and an upper bound.

List prices in US regions; nobody but the account's owner knows its discounts, its other traffic of the month or its
free tier. The dollars named by default are therefore an upper bound: as if the free tier were used up and the first
price tier not yet. The lower bound is the least that any month could make of it. What is known of the account narrows
the bounds; other prices are set in the config file. Budgets know nothing of the month: they always reserve the widest
upper bound. One GB is 2**30 bytes here, as on the bill.
"""

import functools
import math
from dataclasses import dataclass, replace
from enum import StrEnum

from dmdata.errors import SelectionError
from dmdata.settings import LinkOverrides, PriceOverrides, Settings, settings
from dmdata.shown import readable_bytes as readable_bytes  # prices are shown together with sizes and times
from dmdata.shown import readable_seconds as readable_seconds
from dmdata.shown import readable_usd as readable_usd
from dmdata.shown import rows_as_html

GIB = 1 << 30
LONG_RANGE_BYTES = 1 << 20
"""Ranges shorter than this on average are read by as many connections as pay, see `dmdata.reading.pace`."""


class Destination(StrEnum):
    """Where the bytes go: decides what a byte costs."""

    INTERNET = "internet"
    SAME_REGION = "same-region"
    CROSS_REGION = "cross-region"


def destination_of(to: str | None) -> Destination:
    """Read a destination's name; None is the one that is set (``DMDATA_TO``, config file), the internet by default.

    Raises
    ------
    SelectionError
        If it is none.
    """
    if to is None:
        return Destination(settings().to)
    try:
        return Destination(to)
    except ValueError as error:
        raise SelectionError(f"destination {to!r} is unknown; choose {', '.join(Destination)}") from error


@dataclass(frozen=True, slots=True)
class PriceTable:
    """List prices of one day.

    Attributes
    ----------
    date : str
        Day the list prices were last reviewed, ISO.
    usd_per_get : float
        A GET or HEAD request.
    usd_per_list : float
        A LIST request.
    free_gib : float
        GB to the internet that are free each month, over all services of the account.
    internet_tiers : tuple of (float, float)
        GB of the month up to which a price holds, and dollars a GB, which never rise; the last reaches to infinity.
    cross_region_usd_per_gib : tuple of float
        Lowest and highest dollars a GB between US regions.
    """

    date: str
    usd_per_get: float
    usd_per_list: float
    free_gib: float
    internet_tiers: tuple[tuple[float, float], ...]
    cross_region_usd_per_gib: tuple[float, float]

    def usd_per_byte(self, destination: Destination) -> float:
        """Highest price of one byte."""
        if destination is Destination.SAME_REGION:
            return 0.0
        if destination is Destination.CROSS_REGION:
            return self.cross_region_usd_per_gib[1] / GIB
        return self.internet_tiers[0][1] / GIB

    def break_even_gap_bytes(self, destination: Destination) -> float:
        """Unwanted bytes that cost as much as the request they save; infinity where bytes are free."""
        per_byte = self.usd_per_byte(destination)
        return self.usd_per_get / per_byte if per_byte else math.inf

    def transfer_usd(self, n_bytes: int, destination: Destination, *, used_gib: float) -> float:
        """Price bytes without their requests, after `used_gib` of the month went to the internet already."""
        if destination is not Destination.INTERNET:
            return n_bytes * self.usd_per_byte(destination)
        usd, position, left = 0.0, used_gib, n_bytes / GIB
        for limit, usd_per_gib in ((self.free_gib, 0.0), *self.internet_tiers):
            part = min(left, max(limit - position, 0.0))
            usd += part * usd_per_gib
            position, left = position + part, left - part
        return usd


PRICES = PriceTable(
    date="2026-11-22",
    usd_per_get=0.0004 / 1000,
    usd_per_list=0.005 / 1000,
    free_gib=100.0,
    # the first tier ends 10 TB, the next 50 TB, the next 150 TB into the month
    internet_tiers=((10_240.0, 0.09), (51_200.0, 0.085), (153_600.0, 0.07), (math.inf, 0.05)),
    cross_region_usd_per_gib=(0.01, 0.02),
)


_FREE = PriceTable(
    date=PRICES.date,
    usd_per_get=0.0,
    usd_per_list=0.0,
    free_gib=0.0,
    internet_tiers=((math.inf, 0.0),),
    cross_region_usd_per_gib=(0, 0),
)


def price_table() -> PriceTable:
    """Take the list prices, with what the config file overrides."""
    return _with_overrides(settings().prices)


def prices_in_words() -> str:
    """Name the prices that dollars are computed with: of which day, and what is the user's own."""
    overrides = settings().prices
    own = overrides.model_dump(exclude_none=True, exclude={"date"})
    return f"list prices of {_with_overrides(overrides).date}" + (f" with your own {', '.join(own)}" if own else "")


@functools.lru_cache(maxsize=8)
def _with_overrides(overrides: PriceOverrides) -> PriceTable:
    return replace(PRICES, **overrides.model_dump(exclude_none=True))


@functools.lru_cache(maxsize=8)
def _named_alone(overrides: PriceOverrides) -> PriceTable | None:
    """Take prices that are named for a source; what they leave out costs nothing. None where nothing is named."""
    named = overrides.model_dump(exclude_none=True)
    return replace(_FREE, **named) if named else None


@dataclass(frozen=True, slots=True)
class Usage:
    """What is known of the account's month.

    Attributes
    ----------
    used_gib : float or None
        GB that already went to the internet this month; None if unknown.
    free_tier : bool
        Whether the free GB of the month are the reader's to use, less what was used; otherwise they may be gone.
    """

    used_gib: float | None = None
    free_tier: bool = False


ANY_MONTH = Usage()
"""Nothing is known: the bounds hold for every month. Budgets and consent are computed so."""


def usage_of(used_gib: float | None = None, free_tier: bool | None = None, *, known: Settings | None = None) -> Usage:
    """Take what is known of the account's month from the arguments, else from the settings.

    Raises
    ------
    SelectionError
        If `used_gib` is negative or no number.
    """
    known = known or settings()
    used = known.used_gib if used_gib is None else used_gib
    if used is not None and not (math.isfinite(used) and used >= 0):
        raise SelectionError(f"used_gib={used}; give the GB of this month so far, at least 0")
    return Usage(used, known.free_tier if free_tier is None else free_tier)


@dataclass(frozen=True, slots=True)
class Link:
    """How fast a connection to the store is thought to be, for the seconds of an estimate.

    Attributes
    ----------
    seconds_to_first_byte : float
    bytes_per_second : float
        Of one connection.
    n_connections : int
        Used at once; they bound the bytes.
    n_for_short_ranges : int
        Requests in flight where a read is many short ranges; they bound its requests alone.
    """

    seconds_to_first_byte: float = 0.03
    bytes_per_second: float = 50e6
    n_connections: int = 32
    n_for_short_ranges: int = 256

    @property
    def break_even_gap_bytes(self) -> float:
        """Unwanted bytes that take as long as the request they save."""
        return self.seconds_to_first_byte * self.bytes_per_second

    def seconds(self, n_bytes: int, n_requests: int) -> float:
        """Time of a transfer, all connections busy."""
        at_once = max(min(self.n_connections, n_requests), 1)
        is_short = n_requests > self.n_connections and n_bytes < LONG_RANGE_BYTES * n_requests
        requests_at_once = min(self.n_for_short_ranges, n_requests) if is_short else at_once
        to_first_bytes = n_requests * self.seconds_to_first_byte / requests_at_once
        return to_first_bytes + n_bytes / self.bytes_per_second / at_once


LINK = Link()
"""50 MB/s a connection and 30 ms to the first byte: an assumption, as of a good host outside the region.

256 requests in flight are then 8,500 a second. S3 answers at least 5,500 a second for a prefix.
"""


@functools.lru_cache(maxsize=8)
def _link_with(overrides: LinkOverrides) -> Link:
    own = overrides.model_dump(exclude_none=True)
    # a number of connections that is set holds for short ranges, too
    return replace(LINK, **own, n_for_short_ranges=own.get("n_connections", LINK.n_for_short_ranges))


@dataclass(frozen=True, slots=True)
class Quote:
    """One way of reading a selection, priced.

    Attributes
    ----------
    n_requests, n_bytes : int
        As planned: what is fetched, gaps included.
    usd, usd_low, usd_high : float
        Dollars: ``usd`` is the upper bound, as ``usd_high``, and what a budget reserves unless more is known of the
        month; ``usd_low`` is the least it can be.
    seconds : float
        By the assumed link.
    """

    n_requests: int
    n_bytes: int
    usd: float
    usd_low: float
    usd_high: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a read would cost, before a byte moves: the cheapest way, which reads take, and the fastest."""

    cheapest: Quote
    fastest: Quote
    destination: Destination
    price_date: str
    table: PriceTable | None = None  # that it was priced by; None for the list prices in force

    @property
    def n_requests(self) -> int:
        """Requests of the cheapest way."""
        return self.cheapest.n_requests

    @property
    def n_bytes(self) -> int:
        """Bytes of the cheapest way."""
        return self.cheapest.n_bytes

    @property
    def usd(self) -> float:
        """Dollars of the cheapest way: the upper bound."""
        return self.cheapest.usd

    @property
    def usd_low(self) -> float:
        """Lower bound: free GB left, or so much used that the last tier's price holds; as far as either may be."""
        return self.cheapest.usd_low

    @property
    def usd_high(self) -> float:
        """Upper bound: free GB used up unless known to be left, highest price that may hold."""
        return self.cheapest.usd_high

    @property
    def seconds(self) -> float:
        """Seconds of the cheapest way, by the assumed link."""
        return self.cheapest.seconds

    def _repr_html_(self) -> str:
        """Show both ways in a notebook, one where they are the same."""
        ways = {"cheapest": self.cheapest} | ({"fastest": self.fastest} if self.fastest != self.cheapest else {})
        columns = ("", "dollars, at most", "at least", "bytes", "requests", "time")
        rows = [
            (
                way,
                readable_usd(quote.usd_high),
                readable_usd(quote.usd_low),
                readable_bytes(quote.n_bytes),
                f"{quote.n_requests:,}",
                readable_seconds(quote.seconds),
            )
            for way, quote in ways.items()
        ]
        title = f"Estimate of a read to {self.destination}, prices of {self.price_date}"
        return rows_as_html(title, columns, rows, n_rows=len(rows))


@dataclass(frozen=True, slots=True)
class Terms:
    """What a reader's settings say of its reads: where the bytes go, what they cost, how fast they arrive.

    Taken from the settings once, when an array is opened or a command begins, and used until its end: what is set
    afterwards holds for what is opened afterwards. Budgets are not part of it; those in force are asked at every read.

    Attributes
    ----------
    destination : Destination
    prices : PriceTable
        The list prices, with what the config file overrides.
    endpoint_prices : PriceTable or None
        Of S3 endpoints of one's own; None where these are free.
    link : Link
    cache_bytes : int
        Bound on what paid reads keep; 0 keeps nothing.
    usage : Usage
        What is known of the month; by default nothing, as for a budget.
    """

    destination: Destination
    prices: PriceTable
    endpoint_prices: PriceTable | None
    link: Link
    cache_bytes: int
    usage: Usage = ANY_MONTH

    @classmethod
    def in_force(cls, to: str | None = None, *, known: Settings | None = None) -> "Terms":
        """Take the terms that are set now, to a destination or to the one that is set.

        Raises
        ------
        SelectionError
            If there is no such destination.
        SettingsError
            If a variable or the config file holds something other than a setting.
        """
        known = known or settings()
        return cls(
            destination_of(known.to if to is None else to),
            _with_overrides(known.prices),
            _named_alone(known.endpoint_prices),
            _link_with(known.link),
            known.cache_bytes,
        )

    def prices_of(self, of_catalog: PriceOverrides, *, has_endpoint: bool) -> PriceTable | None:
        """Take the prices that are named for a source: by its catalog, or for endpoints of one's own.

        None where nothing is named, and the list prices hold, if any do.
        """
        return _named_alone(of_catalog) or (self.endpoint_prices if has_endpoint else None)

    def quote(self, n_bytes: int, n_requests: int, *, table: PriceTable | None = None) -> Quote:
        """Price a transfer of bytes by GET or HEAD requests; by default at `prices`."""
        prices = table or self.prices
        requests_usd = n_requests * prices.usd_per_get
        low, high = _transfer_bounds_usd(prices, n_bytes, self.destination, self.usage)
        low, high = low + requests_usd, high + requests_usd
        seconds = self.link.seconds(n_bytes, n_requests)
        return Quote(n_requests, n_bytes, usd=high, usd_low=low, usd_high=high, seconds=seconds)

    def estimate(self, cheapest: Quote, fastest: Quote, *, table: PriceTable | None = None) -> Estimate:
        """Put the two ways of a read together that were priced by these terms."""
        return Estimate(cheapest, fastest, self.destination, (table or self.prices).date, table)


def quote(n_bytes: int, n_requests: int, destination: Destination, *, usage: Usage = ANY_MONTH) -> Quote:
    """Price one transfer by the settings in force; see `Terms.quote`."""
    return replace(Terms.in_force(destination), usage=usage).quote(n_bytes, n_requests)


def _transfer_bounds_usd(
    prices: PriceTable, n_bytes: int, destination: Destination, usage: Usage
) -> tuple[float, float]:
    if destination is not Destination.INTERNET:
        lowest = prices.cross_region_usd_per_gib[0] if destination is Destination.CROSS_REGION else 0.0
        return n_bytes / GIB * lowest, n_bytes * prices.usd_per_byte(destination)

    def after(used_gib: float) -> float:
        return prices.transfer_usd(n_bytes, destination, used_gib=used_gib)

    used_gib = usage.used_gib or 0.0
    if usage.free_tier:
        return after(used_gib), after(used_gib)
    # prices never rise with use: the most is paid right behind the free GB, the least within them or in the last tier
    high = after(max(used_gib, prices.free_gib))
    if usage.used_gib is None:
        return min(after(0.0), n_bytes / GIB * prices.internet_tiers[-1][1]), high
    return after(used_gib), high
