"""Run a plan under a budget: reserve, fetch ranges concurrently into the destination, settle on what was received.

Memory is bounded by the destination plus what each connection holds of a range: less than a mebibyte, or up to 16 MiB
where its gaps are kept for later reads. What may have been billed is in the ledger: bytes that arrived, and the rest of
a range where its transfer broke or was cut off.
Ctrl-C ends a read at once, whatever its connections wait for. Free sources are read the same way, without ledger or
budget.
"""

import itertools
import logging
import threading
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from dmdata.errors import DmdataError
from dmdata.layout.formats import Layout
from dmdata.layout.plan import ReadPlan, plan_read
from dmdata.layout.selection import select
from dmdata.money.budgets import Budget, in_force_here
from dmdata.money.ledger import Ledger, home
from dmdata.money.meter import Meter, Received
from dmdata.money.prices import LONG_RANGE_BYTES, Destination, PriceTable, Terms, readable_bytes, readable_usd
from dmdata.objects.address import Address, ObjectState, Source
from dmdata.objects.aws import known_to_be_unsigned
from dmdata.objects.endpoints import own_endpoint
from dmdata.objects.source import connect
from dmdata.reading.pace import CONNECTIONS, RequestPace, StreamPace
from dmdata.reading.ranges import Kept, kept_of, note_saved
from dmdata.reading.reader import RangeQueue, RangeReader, Spool, patience, work_together
from dmdata.settings import PriceOverrides, settings

MAX_RANGE_BYTES = 16 << 20
"""Longest request: a transport's time-out covers a whole body, and what breaks must not be large."""

LEAST_RANGE_BYTES = 4 << 20
"""Shortest range that a short read is split into for concurrency; splitting costs 0.1% of its price at most."""

# a read must be large to be worth a look at how fast its bytes arrive
_LARGE_READ_BYTES = 64 << 20
_RESTING_SECONDS = 0.05

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Transport:
    """Budgeted access to one object.

    Attributes
    ----------
    address : Address
    artifact : str
        Name in the books.
    terms : Terms
        By which its reads are priced and kept; by default those in force when it is made, to the internet.
    charged : bool or None
        What the source answered about charging its reader when the object was opened.
    prices : PriceOverrides
        That its catalog names.
    held_by : tuple of Budget
        Those in force where it was sent from, if it was.
    """

    address: Address
    artifact: str
    terms: Terms = field(default_factory=lambda: Terms.in_force(Destination.INTERNET))
    charged: bool | None = None
    prices: PriceOverrides = field(default=PriceOverrides())
    held_by: tuple[Budget, ...] = field(default=(), compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, tuple[dict[str, Any]]]:
        """Travel with the budgets in force where it is pickled: reads through it are read for them."""
        facts = {part.name: getattr(self, part.name) for part in fields(self)}
        return _sent, (facts | {"held_by": in_force_here(self.held_by)},)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    @property
    def is_paid(self) -> bool:
        """Whether its reads count: what its reader is charged for, or has a price of its own."""
        return self.table is not None

    @property
    def table(self) -> PriceTable | None:
        """The prices that hold for its reads; None where they are free."""
        address = self.address
        if address.is_local or (address.is_s3 and known_to_be_unsigned(address)):
            return None
        own = own_endpoint() if address.is_s3 else None
        if named := self.terms.prices_of(self.prices, has_endpoint=own is not None):
            return named
        # who reads from AWS by address pays, as requester or as owner; elsewhere, unless the source has denied it
        is_charged = address.requester_pays and (address.listed or own is None or self.charged is not False)
        return self.terms.prices if is_charged else None

    def price_usd(self, n_bytes: int, n_requests: int) -> float:
        """Price a transfer, upper bound; 0 where it is free."""
        table = self.table
        return self.terms.quote(n_bytes, n_requests, table=table).usd if table else 0.0

    def start(self, n_bytes: int) -> tuple[bytes, ObjectState]:
        """Read up to `n_bytes` from the start, and learn the object's size and etag.

        Raises
        ------
        BudgetError, AccessError, ObjectMissingError, SourceError
        """
        source, meter = self._begin(n_bytes, 1, self.table)
        tally = meter.tally()
        try:
            for n_tries in itertools.count(1):
                tally.sending(n_bytes)
                try:
                    head, state = source.start(n_bytes)
                except DmdataError as error:
                    patience(error, tally, meter, threading.Event(), fruitless=n_tries, n_tries=n_tries)
                    continue
                tally.arrived(len(head))
                tally.in_flight = 0
                meter.charged = state.charged
                if not replace(self, charged=state.charged).is_paid:
                    meter.table = None
                return head, state
            raise AssertionError("tries end with an answer or an error")
        finally:
            meter.settle()

    def read(self, start: int, stop: int, *, etag: str | None) -> bytes:
        """Read one range.

        Raises
        ------
        BudgetError, IntegrityError, AccessError, ObjectMissingError, SourceError
        """
        layout = Layout((stop - start,), np.dtype(np.uint8), start, (1,))
        plan = plan_read(
            layout, select(..., layout.shape, orthogonal=False), max_gap_bytes=0, max_range_bytes=stop - start
        )
        return self.fetch(plan, etag=etag).tobytes()

    def fetch(
        self,
        plan: ReadPlan,
        *,
        etag: str | None,
        progress: Received | None = None,
        spool: Spool | None = None,
        cache: bool = False,
    ) -> npt.NDArray[np.uint8]:
        """Read what a plan asks for.

        Parameters
        ----------
        plan : ReadPlan
        etag : str or None
            The object must still have it, at every request.
        progress : callable, optional
        spool : Spool, optional
            Ranges it has are neither fetched nor paid for.
        cache : bool
            Whether what `dmdata.reading.ranges` keeps is neither fetched nor paid for, and what is fetched is kept. A
            read with a spool goes past it. `progress` is called with bytes that are fetched, as always.

        Returns
        -------
        product : uint8 array, shape (plan.wanted_bytes,)
            For `dmdata.layout.plan.product_array`.

        Raises
        ------
        BudgetError
            Before the first byte.
        IntegrityError
            If the object changed meanwhile.
        AccessError, ObjectMissingError, SourceError
            If it cannot be read; what may have been billed until then is in the ledger.
        """
        if not plan.n_requests:
            return np.empty(0, np.uint8)
        table = self.table
        kept = self._kept(etag, table) if cache and spool is None else None
        plan, filled = self._filled(kept, plan) if kept else (plan, None)
        n_bytes, n_requests = _missing(plan, spool)
        if not n_requests:
            return _product(plan, spool) if filled is None else filled
        source, meter = self._begin(n_bytes, n_requests, table, progress)
        meter.object_bytes = plan.layout.stop
        stopping = threading.Event()
        keeper = kept.keeper(plan.n_bytes, bound=self.terms.cache_bytes) if kept else None

        ranges = RangeQueue(plan, spool, n_requests)
        short: RequestPace | None = None

        def work(nth: int) -> None:
            reader = RangeReader(source, plan, product, etag, meter, stopping, spool, keeper, short)
            while not stopping.is_set() and ranges.n_left:
                if short and nth >= short.allowed:
                    stopping.wait(_RESTING_SECONDS)
                    continue
                in_hand = ranges.take(short)
                meter.draw(sum(stop - start for _, start, stop, _, _ in in_hand), len(in_hand))
                reader.read(in_hand)

        try:
            product = _product(plan, spool) if filled is None else filled
            if n_bytes < LONG_RANGE_BYTES * n_requests and n_requests > CONNECTIONS:
                with RequestPace(
                    n_requests, n_bytes, n_each=source.pieces_at_once, n_most=source.most_at_once
                ) as short:
                    work_together(work, short, lambda: ranges.n_left, stopping)
            elif n_requests == 1 and threading.current_thread() is not threading.main_thread():
                work(0)  # no interrupt reaches this thread, and starting another costs as much as a short read
            else:
                pace = StreamPace(
                    min(CONNECTIONS, n_requests),
                    lambda: meter.received_bytes,
                    looks_first=n_bytes >= _LARGE_READ_BYTES,
                )
                work_together(work, pace, lambda: ranges.n_left, stopping)
        finally:
            meter.settle()
            if keeper:
                keeper.close()
        return product

    def keep(self, received: npt.NDArray[np.uint8], *, etag: str | None) -> None:
        """Keep what `start` has returned as a read with `cache` keeps what it fetches."""
        kept = self.kept(etag)
        if kept and (keeper := kept.keeper(len(received), bound=self.terms.cache_bytes)):
            keeper.keep(0, received)
            keeper.close()

    def kept(self, etag: str | None) -> Kept | None:
        """Find what is kept of the object from earlier reads; None where nothing of it is."""
        return self._kept(etag, self.table)

    def _kept(self, etag: str | None, table: PriceTable | None) -> Kept | None:
        return kept_of(self.address, etag, paid=table is not None, bound_bytes=self.terms.cache_bytes)

    def _filled(self, kept: Kept, plan: ReadPlan) -> tuple[ReadPlan, npt.NDArray[np.uint8] | None]:
        """Put what is kept into the product, count what that saves, and leave it out of the plan."""
        if plan.wanted_bytes >= _LARGE_READ_BYTES and (rest := kept.rest_of(plan)) is not plan and rest.n_requests:
            # no memory is claimed for what a budget will refuse
            self.require_budget(n_bytes=rest.n_bytes, n_requests=rest.n_requests)
        rest, product = kept.fill(plan)
        if rest is not plan:
            whole, part = (self.terms.quote(each.n_bytes, each.n_requests) for each in (plan, rest))
            note_saved(plan.n_bytes - rest.n_bytes, max(whole.usd - part.usd, 0.0))
        return rest, product

    def require_budget(self, *, n_bytes: int, n_requests: int) -> None:
        """Refuse work of several reads, before its first byte, if a budget would not let it end.

        Raises
        ------
        BudgetError
        """
        if self.is_paid:
            usd = self.price_usd(n_bytes, n_requests)
            Ledger(home()).check(usd=usd, artifact=self.artifact, carried=self.held_by)

    def _begin(
        self, n_bytes: int, n_requests: int, table: PriceTable | None, progress: Received | None = None
    ) -> tuple[Source, Meter]:
        """Connect and reserve the price, by the budget in force now, and unless offline is set."""
        known = None if self.address.is_local else settings()
        source = connect(self.address, known=known)
        meter = Meter(self.terms, n_bytes, n_requests, progress, self.charged, table=table)
        if meter.table is not None:
            meter.reservation = Ledger(home()).reserve(
                usd=meter.usd(n_bytes, n_requests),
                n_bytes=n_bytes,
                n_requests=n_requests,
                artifact=self.artifact,
                destination=self.terms.destination,
                drawn=meter.next_draw(0, 0),
                carried=self.held_by,
                known=known,
            )
        if _log.isEnabledFor(logging.INFO):
            # what is paid for is told at once, what is free to who looks closer
            level, price = logging.DEBUG, "free"
            if meter.table is not None:
                level, price = logging.INFO, f"up to {readable_usd(meter.usd(n_bytes, n_requests))}"
            many = "request" if n_requests == 1 else "requests"
            what = self.artifact, readable_bytes(n_bytes), n_requests, many, price
            _log.log(level, "reading %s: %s in %d %s, %s", *what)
        return source, meter


def _sent(facts: dict[str, Any]) -> Transport:
    return Transport(**facts)


def _missing(plan: ReadPlan, spool: Spool | None) -> tuple[int, int]:
    """Count the bytes and requests of the ranges that a spool has not."""
    if spool is None:
        return plan.n_bytes, plan.n_requests
    n_bytes = n_requests = nth = 0
    for ranges in plan.batches():
        for start, stop in ranges.tolist():
            if not spool.has(nth):
                n_bytes, n_requests = n_bytes + stop - start, n_requests + 1
            nth += 1
    return n_bytes, n_requests


def _product(plan: ReadPlan, spool: Spool | None) -> npt.NDArray[np.uint8]:
    return np.empty(plan.wanted_bytes, np.uint8) if spool is None else spool.product(plan.wanted_bytes)
