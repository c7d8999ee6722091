"""Run a plan under a budget: reserve, fetch ranges concurrently into the destination, settle on what was received.

Memory is bounded by the destination plus what each connection holds of a range, less than a mebibyte. A broken
transfer is tried again with backoff from the byte it broke at; a refusal or a missing object never is. What may have
been billed is in the ledger: bytes that arrived, and the rest of a range where its transfer broke or was cut off.
Ctrl-C ends a read at once, whatever its connections wait for. Free sources are read the same way, without ledger or
budget.
"""

import itertools
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from dmdata.address import SHORT_RANGE_BYTES, Address, ObjectState, Source, ended_short
from dmdata.aws import known_to_be_unsigned
from dmdata.blocks import Block, in_force_here
from dmdata.endpoints import own_endpoint
from dmdata.errors import DmdataError, SourceError
from dmdata.formats import Layout
from dmdata.ledger import Ledger, home
from dmdata.meter import Meter, Progress, Tally
from dmdata.plan import ReadPlan, land, plan_read
from dmdata.prices import Destination, PriceTable, own_prices, price_table, quote
from dmdata.ranges import Keeper, Kept, kept_of, note_saved
from dmdata.selection import select
from dmdata.settings import PriceOverrides
from dmdata.source import connect

MAX_RANGE_BYTES = 16 << 20
"""Longest request: a transport's time-out covers a whole body, and what breaks must not be large."""

LEAST_RANGE_BYTES = 4 << 20
"""Shortest range that a short read is split into for concurrency; splitting costs 0.1% of its price at most."""

CONNECTIONS = 32
"""Most long ranges in flight at a time; of many short ones, 8 threads ask for several each."""

_LONG_RANGE_BYTES = 1 << 20
# a server that sends faster than this a connection is so near that more than 8 would be in each other's way; a read
# must be large to be worth a look at how fast its bytes arrive
_FEW_CONNECTIONS = 8
_NEAR_BYTES_PER_SECOND = 60e6
_LARGE_READ_BYTES = 64 << 20
_LOOK_SECONDS = 0.02
_TRIES_WITHOUT_PROGRESS = 6
_MOST_TRIES = 64
_LONGEST_PAUSE_SECONDS = 8.0
_MOST_RANGES_IN_HAND = 128
# after a failure, a thread asks so often for its ranges one by one, so that a storm does not cost each of them twice
_HANDFULS_ONE_BY_ONE = 8
_LISTED_AT_ONCE = 4096
# how long others may take to notice that a read has failed, before it ends without them
_GRACE_SECONDS = 0.25
_INTERRUPTIBLE_SECONDS = 0.1
# a range of a plan: its number, its bytes in the object, and its wanted bytes in the product
_Range: TypeAlias = tuple[int, int, int, int, int]


class Spool(Protocol):
    """Where a read lands, by someone who remembers what has landed: an interrupted read then goes on from there."""

    def product(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Give the buffer to fill, with the bytes of earlier ranges in place."""

    def has(self, nth: int) -> bool:
        """Tell whether the nth range of the plan is in the buffer already."""

    def landed(self, nth: int, start: int, stop: int) -> None:
        """Take note that the nth range's wanted bytes are in ``product[start:stop]``. Called from any thread."""


@dataclass(frozen=True, slots=True)
class Transport:
    """Budgeted access to one object.

    Attributes
    ----------
    address : Address
    artifact : str
        Name in the books.
    destination : Destination
        Decides the price of a byte.
    charged : bool or None
        What the source said of charging its reader when the object was opened.
    prices : PriceOverrides
        That its catalog names.
    held_by : tuple of Block
        Budget blocks that were in force where it was sent from, if it was.
    """

    address: Address
    artifact: str
    destination: Destination = Destination.INTERNET
    charged: bool | None = None
    prices: PriceOverrides = field(default=PriceOverrides())
    held_by: tuple[Block, ...] = field(default=(), compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, tuple[dict[str, Any]]]:
        """Travel with the budget blocks in force where it is pickled: reads through it are read for them."""
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
        if named := own_prices(self.prices, has_endpoint=own is not None):
            return named
        # who reads from AWS by address pays, as its requester or as its owner; elsewhere who is told so, or may be yet
        is_charged = address.requester_pays and (address.listed or own is None or self.charged is not False)
        return price_table() if is_charged else None

    def price_usd(self, n_bytes: int, n_requests: int) -> float:
        """Price a transfer, upper bound; 0 where it is free."""
        table = self.table
        return quote(n_bytes, n_requests, self.destination, table=table).usd if table else 0.0

    def start(self, n_bytes: int) -> tuple[bytes, ObjectState]:
        """Read up to `n_bytes` from the start, and learn the object's size and etag.

        Raises
        ------
        BudgetError, AccessError, ObjectMissingError, SourceError
        """
        source, meter = connect(self.address), self._meter(n_bytes, 1)
        tally = meter.tally()
        try:
            for n_tries in itertools.count(1):
                tally.sending(n_bytes)
                try:
                    head, state = source.start(n_bytes)
                except DmdataError as error:
                    _patience(error, tally, meter, threading.Event(), fruitless=n_tries, n_tries=n_tries)
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
        progress: Progress | None = None,
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
            Whether what `dmdata.ranges` keeps is neither fetched nor paid for, and what is fetched is kept. A read with
            a spool goes past it. `progress` is told of bytes that are fetched, as always.

        Returns
        -------
        product : uint8 array, shape (plan.wanted_bytes,)
            For `dmdata.plan.product_array`.

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
        kept = self.kept(etag) if cache and spool is None else None
        plan, filled = self._filled(kept, plan) if kept else (plan, None)
        n_bytes, n_requests = _missing(plan, spool)
        if not n_requests:
            return _product(plan, spool) if filled is None else filled
        source, meter = connect(self.address), self._meter(n_bytes, n_requests, progress)
        meter.object_bytes = plan.layout.stop
        stopping = threading.Event()
        keeper = kept.keeper(plan) if kept else None

        def work() -> None:
            reader = _Reader(source, plan, product, etag, meter, stopping, spool, keeper)
            while not stopping.is_set() and (in_hand := ranges.take()):
                meter.draw(sum(stop - start for _, start, stop, _, _ in in_hand), len(in_hand))
                reader.read(in_hand)

        # many short ranges are worked for more than waited for, and more threads would be in each other's way
        is_short = n_bytes < _LONG_RANGE_BYTES * n_requests and n_requests > CONNECTIONS
        n_threads = _FEW_CONNECTIONS if is_short else min(CONNECTIONS, n_requests)
        n_first = min(_FEW_CONNECTIONS, n_threads) if n_bytes >= _LARGE_READ_BYTES else n_threads
        ranges = _Queue(plan, spool, n_requests, n_threads)
        try:
            product = _product(plan, spool) if filled is None else filled
            _work_together(work, n_first, n_threads, lambda: meter.received_bytes, stopping)
        finally:
            meter.settle()
            if keeper:
                keeper.close()
        return product

    def kept(self, etag: str | None) -> Kept | None:
        """Give what is kept of the object from earlier reads; None where nothing of it is."""
        return kept_of(self.address, etag, paid=self.is_paid)

    def _filled(self, kept: Kept, plan: ReadPlan) -> tuple[ReadPlan, npt.NDArray[np.uint8] | None]:
        """Put what is kept into the product, count what that saves, and leave it out of the plan."""
        if plan.wanted_bytes >= _LARGE_READ_BYTES and (rest := kept.rest_of(plan)) is not plan and rest.n_requests:
            # no memory is claimed for what a budget will refuse
            self.require_budget(n_bytes=rest.n_bytes, n_requests=rest.n_requests)
        rest, product = kept.fill(plan)
        if rest is not plan:
            whole, part = (quote(each.n_bytes, each.n_requests, self.destination) for each in (plan, rest))
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

    def _meter(self, n_bytes: int, n_requests: int, progress: Progress | None = None) -> Meter:
        meter = Meter(self.destination, n_bytes, n_requests, progress, self.charged, table=self.table)
        if meter.table is not None:
            meter.reservation = Ledger(home()).reserve(
                usd=meter.usd(n_bytes, n_requests),
                n_bytes=n_bytes,
                n_requests=n_requests,
                artifact=self.artifact,
                destination=self.destination,
                drawn=meter.next_draw(0, 0),
                carried=self.held_by,
            )
        return meter


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


class _Queue:
    """Hands the ranges of a plan to the threads: one at a time where they are long, several where they are short."""

    def __init__(self, plan: ReadPlan, spool: Spool | None, n_missing: int, n_threads: int) -> None:
        self._ranges = self._walk(plan, spool)
        self._left = n_missing
        self._n_threads = n_threads
        self._lock = threading.Lock()

    def take(self) -> list[_Range]:
        """Take the next ranges; none are left where the list is empty."""
        taken: list[_Range] = []
        with self._lock:
            n_bytes, n_most = 0, max(min(_MOST_RANGES_IN_HAND, self._left // (2 * self._n_threads)), 1)
            for one in itertools.islice(self._ranges, n_most):
                taken.append(one)
                n_bytes += one[2] - one[1]
                if n_bytes >= _LONG_RANGE_BYTES:
                    break
            self._left -= len(taken)
        return taken

    @staticmethod
    def _walk(plan: ReadPlan, spool: Spool | None) -> Iterator[_Range]:
        nth = 0
        for batch in plan.batches():
            for first in range(0, len(batch), _LISTED_AT_ONCE):
                ranges = batch[first : first + _LISTED_AT_ONCE]
                landings = plan.wanted.landing(ranges.ravel()).reshape(-1, 2)
                for (start, stop), (at, end) in zip(ranges.tolist(), landings.tolist(), strict=True):
                    if spool is None or not spool.has(nth):
                        yield nth, start, stop, at, end
                    nth += 1


class _Arrivals:
    """Takes the bytes of one range as they arrive: counts them and puts the wanted ones into the product.

    With a keeper all bytes are kept, those between the wanted ones too: they are paid for.
    """

    __slots__ = ("_at", "_end", "_is_whole", "_plan", "_product", "_received", "_start", "_stop", "_tally", "position")

    def __init__(
        self,
        plan: ReadPlan,
        product: npt.NDArray[np.uint8],
        tally: Tally,
        start: int,
        stop: int,
        at: int,
        end: int,
        *,
        keeps: bool = False,
    ) -> None:
        self._plan, self._product, self._tally = plan, product, tally
        self.position, self._stop, self._at = start, stop, at
        self._start, self._end = start, end
        self._is_whole = end - at == stop - start
        self._received = np.empty(stop - start, np.uint8) if keeps and not self._is_whole else None

    def put(self, chunk: npt.NDArray[np.uint8]) -> None:
        n_bytes = len(chunk)
        if n_bytes > self._stop - self.position:
            chunk = chunk[: self._stop - self.position]
            n_bytes = len(chunk)
        if self._is_whole:
            self._product[self._at : self._at + n_bytes] = chunk
            self._at += n_bytes
        else:
            self._at += land(self._plan.wanted, self.position, chunk, self._product, self._at)
        if self._received is not None:
            self._received[self.position - self._start :][:n_bytes] = chunk
        self.position += n_bytes
        self._tally.arrived(n_bytes)

    def hand_to(self, keeper: Keeper) -> None:
        """Hand over all bytes of the range, once they are here."""
        whole = self._product[self._end - (self._stop - self._start) : self._end]
        keeper.keep(self._start, whole if self._received is None else self._received)


class _Reader:
    """Reads ranges into the product, for one thread."""

    def __init__(
        self,
        source: Source,
        plan: ReadPlan,
        product: npt.NDArray[np.uint8],
        etag: str | None,
        meter: Meter,
        stopping: threading.Event,
        spool: Spool | None,
        keeper: Keeper | None,
    ) -> None:
        self._keeper = keeper
        self._source, self._plan, self._product, self._etag = source, plan, product, etag
        self._meter, self._stopping, self._spool = meter, stopping, spool
        self._tally = meter.tally()
        self._one_by_one = 0

    def read(self, ranges: list[_Range]) -> None:
        """Read some ranges; less only if stopped.

        The first is asked for alone, and whose bytes these are is looked at: the others, asked for together, show no
        headers.
        """
        first, others = ranges[:1], ranges[1:]
        if self._one_by_one:
            self._one_by_one -= 1
            first, others = ranges, []
        for one in first:
            self._read_one(*one)
        if others and not self._stopping.is_set() and not self._read_together(others):
            for one in others:
                self._read_one(*one)

    def _read_one(self, nth: int, start: int, stop: int, at: int, end: int) -> None:
        """Read a range, going on after each broken transfer from the byte it broke at."""
        source, tally = self._source, self._tally
        keeps = self._keeper is not None
        arrivals = _Arrivals(self._plan, self._product, tally, start, stop, at, end, keeps=keeps)
        n_tries = fruitless = 0
        while not self._stopping.is_set():
            began = arrivals.position
            n_tries += 1
            tally.sending(stop - began)
            try:
                if stop - began > SHORT_RANGE_BYTES:
                    source.read(began, stop, etag=self._etag, put=arrivals.put, stopped=self._stopping.is_set)
                else:
                    arrivals.put(np.frombuffer(source.piece(began, stop, etag=self._etag), np.uint8))
                if arrivals.position == stop:
                    self._landed(nth, at, end)
                    if self._keeper:
                        arrivals.hand_to(self._keeper)
                elif not self._stopping.is_set():
                    raise ended_short(source.address, arrivals.position, transient=True)
                return
            except DmdataError as error:
                fruitless = 0 if arrivals.position > began else fruitless + 1
                _patience(error, tally, self._meter, self._stopping, fruitless=fruitless, n_tries=n_tries)

    def _read_together(self, ranges: list[_Range]) -> bool:
        """Read short ranges in one call, or tell that it did not go well, and nothing has landed."""
        tally = self._tally
        _, starts, stops, ats, ends = zip(*ranges, strict=True)
        sizes = [stop - start for start, stop in zip(starts, stops, strict=True)]
        if max(sizes) > SHORT_RANGE_BYTES:
            return False
        tally.sending(sum(sizes), n_requests=len(ranges))
        try:
            pieces = self._source.pieces(starts, stops, etag=self._etag)
            if [len(piece) for piece in pieces] != sizes:
                raise ended_short(self._source.address, stops[0], transient=True)
        except DmdataError as error:
            self._one_by_one = _HANDFULS_ONE_BY_ONE
            _patience(error, tally, self._meter, self._stopping, fruitless=1, n_tries=1)
            return False
        if ends[-1] - ats[0] == sum(sizes) == sum(ends) - sum(ats):  # wanted to the byte, and nothing between them
            self._product[ats[0] : ends[-1]] = np.frombuffer(b"".join(pieces), np.uint8)
            tally.arrived(sum(sizes))
        else:
            for piece, (_, start, stop, at, end) in zip(pieces, ranges, strict=True):
                _Arrivals(self._plan, self._product, tally, start, stop, at, end).put(np.frombuffer(piece, np.uint8))
        for nth, _, _, at, end in ranges:
            self._landed(nth, at, end)
        if self._keeper:
            for start, piece in zip(starts, pieces, strict=True):
                self._keeper.keep(start, np.frombuffer(piece, np.uint8))
        return True

    def _landed(self, nth: int, at: int, end: int) -> None:
        if self._spool is not None:
            self._spool.landed(nth, at, end)


def _patience(
    error: DmdataError,
    tally: Tally,
    meter: Meter,
    stopping: threading.Event,
    *,
    fruitless: int,
    n_tries: int,
) -> None:
    """Account for a failed try; then wait a while if another one may go well, else raise what it failed for."""
    n_before = tally.n_requests
    may_be_billed = tally.break_off(error, meter.object_bytes)
    n_requests = tally.requests_in_flight - (n_before - tally.n_requests)
    if not (isinstance(error, SourceError) and error.facts.get("transient")) or stopping.is_set():
        raise error
    if error.facts.get("silent") and not meter.received_bytes:
        raise error  # a server that never answered is waited for once
    if fruitless >= _TRIES_WITHOUT_PROGRESS or n_tries >= _MOST_TRIES:
        what = f"{fruitless} tries in a row without a byte" if fruitless > 1 else f"{n_tries} tries"
        raise SourceError(
            f"{error}; given up after {what}: try again later", **error.facts | {"n_tries": n_tries}
        ) from error
    meter.extend(may_be_billed, n_requests)
    pause = min(_LONGEST_PAUSE_SECONDS, 0.1 * 2**fruitless)
    stopping.wait(random.uniform(pause / 2, pause))  # noqa: S311 - spreads retries, guards nothing


def _work_together(
    work: Callable[[], None],
    n_first: int,
    n_threads: int,
    received_bytes: Callable[[], int],
    stopping: threading.Event,
) -> None:
    """Do the same work in several threads until all have ended; the first error, or Ctrl-C, stops them and is raised.

    Begins with `n_first`; the others join once these are seen to wait for a server that is not near. They are daemons,
    because one may wait in the transport for a server that has fallen silent: who is interrupted does not wait with it.
    """
    if n_threads == 1 and threading.current_thread() is not threading.main_thread():
        work()  # no interrupt reaches this thread, and starting another costs as much as a short read
        return
    outcomes: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits, and raised there
            outcomes.put(error)
        else:
            outcomes.put(None)

    threads: list[threading.Thread] = []

    def start(n: int) -> None:
        while len(threads) < n:
            thread = threading.Thread(target=run, name="dmdata-fetch", daemon=True)
            thread.start()
            threads.append(thread)

    n_ended, seen, seen_at = 0, 0, time.monotonic()
    try:
        start(n_first)
        while n_ended < len(threads):
            try:
                # an interrupt that reaches another thread is noticed only between two waits
                outcome = outcomes.get(timeout=_LOOK_SECONDS if len(threads) < n_threads else _INTERRUPTIBLE_SECONDS)
            except queue.Empty:
                before, before_at = seen, seen_at
                seen, seen_at = received_bytes(), time.monotonic()
                is_slow = seen - before < _NEAR_BYTES_PER_SECOND * n_first * (seen_at - before_at)
                # the time until the first byte tells nothing of the pace, but for a server that is far
                if not seen or (before and is_slow):
                    start(n_threads)
                continue
            n_ended += 1
            if outcome is not None:
                raise outcome
    except BaseException:
        stopping.set()
        deadline = time.monotonic() + _GRACE_SECONDS
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))
        raise
