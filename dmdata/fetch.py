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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from dmdata.address import SHORT_RANGE_BYTES, Address, ObjectState, Source, ended_short
from dmdata.errors import DmdataError, SourceError
from dmdata.formats import Layout
from dmdata.ledger import Amount, Ledger, Reservation, home
from dmdata.plan import ReadPlan, land, plan_read
from dmdata.prices import Destination, quote
from dmdata.selection import select
from dmdata.source import connect

MAX_RANGE_BYTES = 16 << 20
"""Longest request: a transport's time-out covers a whole body, and what breaks must not be large."""

LEAST_RANGE_BYTES = 4 << 20
"""Shortest range that a short read is split into for concurrency; splitting costs 0.1% of its price at most."""

CONNECTIONS = 32
"""Most ranges in flight at a time. A read of short ranges begins with 8, and more where answers are slow to come."""

_FIRST_CONNECTIONS = 8
_LONG_RANGE_BYTES = 1 << 20
# an answer that took longer than this was waited for, so that more at a time is faster
_SLOW_ANSWER_SECONDS = 0.01
_TRIES_WITHOUT_PROGRESS = 6
_MOST_TRIES = 64
_LONGEST_PAUSE_SECONDS = 8.0
# what a killed read may have sent and could not settle is at most one draw, and what its threads had in hand
_DRAW_BYTES = 64 << 20
_DRAW_REQUESTS = 4096
_MOST_RANGES_IN_HAND = 32
_LISTED_AT_ONCE = 4096
# how long others may take to notice that a read has failed, before it ends without them
_GRACE_SECONDS = 0.25
_INTERRUPTIBLE_SECONDS = 0.1
# a server that sends the whole object instead of a range has sent at most what fits into both ends' buffers
_MOST_BUFFERED_BYTES = 16 << 20

Progress: TypeAlias = Callable[[int], object]
"""Called with the number of bytes that arrived since the last call, from any thread."""

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
        What the source said of charging its reader when the object was opened, for the books.
    """

    address: Address
    artifact: str
    destination: Destination = Destination.INTERNET
    charged: bool | None = None

    def start(self, n_bytes: int) -> tuple[bytes, ObjectState]:
        """Read up to `n_bytes` from the start, and learn the object's size and etag.

        Raises
        ------
        BudgetError, AccessError, ObjectMissingError, SourceError
        """
        source, meter = connect(self.address), self._meter(n_bytes, 1)
        meter.object_bytes = _MOST_BUFFERED_BYTES  # it may be of any size yet
        tally = meter.tally()
        try:
            while True:
                tally.sending(n_bytes)
                try:
                    head, state = source.start(n_bytes)
                except DmdataError as error:
                    _patience(error, tally, meter, threading.Event())
                    continue
                tally.arrived(len(head))
                tally.in_flight = 0
                meter.charged = state.charged
                return head, state
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
        self, plan: ReadPlan, *, etag: str | None, progress: Progress | None = None, spool: Spool | None = None
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
        n_bytes, n_requests = _missing(plan, spool)
        if not n_requests:
            return _product(plan, spool)
        source, meter = connect(self.address), self._meter(n_bytes, n_requests, progress)
        meter.object_bytes = plan.layout.stop
        stopping = threading.Event()
        ranges = _Queue(plan, spool, n_requests)

        def work() -> None:
            tally = meter.tally()
            while not stopping.is_set() and (in_hand := ranges.take()):
                meter.draw(in_hand)
                for nth, start, stop, at, end in in_hand:
                    if stopping.is_set():
                        return
                    began = time.perf_counter()
                    arrivals = _Arrivals(plan, product, tally, start, stop, at, end)
                    _read_range(source, arrivals, stop, etag, tally, meter, stopping)
                    if spool is not None and not stopping.is_set():
                        spool.landed(nth, at, end)
                    if time.perf_counter() - began > _SLOW_ANSWER_SECONDS:
                        crew.add(most=n_most)

        n_most = min(CONNECTIONS, n_requests)
        # short ranges from a near server are worked for, not waited for, and more threads would be in each other's way
        n_first = n_most if n_bytes >= _LONG_RANGE_BYTES * n_requests else min(_FIRST_CONNECTIONS, n_most)
        try:
            product = _product(plan, spool)
            crew = _Crew(work, stopping)
            crew.run(n_first)
        finally:
            meter.settle()
        return product

    def require_budget(self, *, n_bytes: int, n_requests: int) -> None:
        """Refuse work of several reads, before its first byte, if a budget would not let it end.

        Raises
        ------
        BudgetError
        """
        if self.address.requester_pays:
            price = quote(n_bytes, n_requests, self.destination)
            Ledger(home()).check(usd=price.usd, artifact=self.artifact)

    def _meter(self, n_bytes: int, n_requests: int, progress: Progress | None = None) -> "_Meter":
        meter = _Meter(self.destination, n_bytes, n_requests, progress, self.charged)
        if self.address.requester_pays:
            meter.reservation = Ledger(home()).reserve(
                usd=quote(n_bytes, n_requests, self.destination).usd,
                n_bytes=n_bytes,
                n_requests=n_requests,
                artifact=self.artifact,
                destination=self.destination,
                drawn=meter.next_draw(0, 0),
            )
        return meter


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

    def __init__(self, plan: ReadPlan, spool: Spool | None, n_missing: int) -> None:
        self._ranges = self._walk(plan, spool)
        self._left = n_missing
        self._most = max(min(_MOST_RANGES_IN_HAND, _LONG_RANGE_BYTES * plan.n_requests // plan.n_bytes), 1)
        self._lock = threading.Lock()

    def take(self) -> list[_Range]:
        """Take the next ranges; none are left where the list is empty."""
        with self._lock:
            n = max(min(self._most, self._left // (2 * CONNECTIONS)), 1)
            taken = list(itertools.islice(self._ranges, n))
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
    """Takes the bytes of one range as they arrive: counts them and puts the wanted ones into the product."""

    __slots__ = ("_at", "_is_whole", "_plan", "_product", "_stop", "_tally", "position")

    def __init__(
        self, plan: ReadPlan, product: npt.NDArray[np.uint8], tally: "_Tally", start: int, stop: int, at: int, end: int
    ) -> None:
        self._plan, self._product, self._tally = plan, product, tally
        self.position, self._stop, self._at = start, stop, at
        self._is_whole = end - at == stop - start

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
        self.position += n_bytes
        self._tally.arrived(n_bytes)


def _read_range(
    source: Source,
    arrivals: _Arrivals,
    stop: int,
    etag: str | None,
    tally: "_Tally",
    meter: "_Meter",
    stopping: threading.Event,
) -> None:
    """Read a range, going on after each broken transfer from the byte it broke at; less only if stopped."""
    n_tries = fruitless = 0
    while True:
        began = arrivals.position
        n_tries += 1
        tally.sending(stop - began)
        try:
            if stop - began > SHORT_RANGE_BYTES:
                source.read(began, stop, etag=etag, put=arrivals.put, stopped=stopping.is_set)
                return
            arrivals.put(np.frombuffer(source.piece(began, stop, etag=etag), np.uint8))
            if arrivals.position == stop:
                return
            raise ended_short(source.address, arrivals.position, transient=True)
        except DmdataError as error:
            fruitless = 0 if arrivals.position > began else fruitless + 1
            _patience(error, tally, meter, stopping, fruitless=fruitless, n_tries=n_tries)


def _patience(
    error: DmdataError,
    tally: "_Tally",
    meter: "_Meter",
    stopping: threading.Event,
    *,
    fruitless: int | None = None,
    n_tries: int | None = None,
) -> None:
    """Account for a failed try; then wait a while if another one may go well, else raise what it failed for."""
    n_tries = tally.n_requests if n_tries is None else n_tries
    fruitless = n_tries if fruitless is None else fruitless
    may_be_billed = tally.break_off(error, meter.object_bytes)
    if not (isinstance(error, SourceError) and error.facts.get("transient")) or stopping.is_set():
        raise error
    if fruitless >= _TRIES_WITHOUT_PROGRESS or n_tries >= _MOST_TRIES:
        what = f"{fruitless} tries in a row without a byte" if fruitless > 1 else f"{n_tries} tries"
        raise SourceError(
            f"{error}; given up after {what}: try again later", **error.facts | {"n_tries": n_tries}
        ) from error
    meter.extend(may_be_billed)
    pause = min(_LONGEST_PAUSE_SECONDS, 0.1 * 2**fruitless)
    stopping.wait(random.uniform(pause / 2, pause))  # noqa: S311 - spreads retries, guards nothing


@dataclass(slots=True)
class _Tally:
    """What one thread sent and received: an upper bound of what may be billed for it."""

    progress: Progress | None
    n_requests: int = 0
    n_bytes: int = 0
    in_flight: int = 0

    def sending(self, n_bytes: int) -> None:
        self.n_requests += 1
        self.in_flight = n_bytes

    def arrived(self, n_bytes: int) -> None:
        self.n_bytes += n_bytes
        self.in_flight -= n_bytes
        if self.progress and n_bytes:
            self.progress(n_bytes)

    def break_off(self, error: DmdataError, object_bytes: int) -> int:
        """Count what is still in flight as billed, unless the source refused to send it; return how much."""
        n_bytes = 0 if error.facts.get("refused") else self.in_flight
        if error.facts.get("whole"):
            n_bytes = max(n_bytes, min(object_bytes, _MOST_BUFFERED_BYTES))
        self.n_bytes += n_bytes
        self.in_flight = 0
        return n_bytes


@dataclass(slots=True)
class _Meter:
    """Counts what one read sends and receives, draws on its reservation, and settles it."""

    destination: Destination
    n_bytes: int
    n_requests: int
    progress: Progress | None
    charged: bool | None
    reservation: Reservation | None = None
    object_bytes: int = 0
    tallies: list[_Tally] = field(default_factory=list)
    taken: tuple[int, int] = (0, 0)
    drawn: tuple[int, int] = (0, 0)
    is_settled: bool = False
    lock: Any = field(default_factory=threading.Lock)

    def tally(self) -> _Tally:
        tally = _Tally(self.progress)
        with self.lock:
            self.tallies.append(tally)
        return tally

    def next_draw(self, n_bytes: int, n_requests: int) -> Amount:
        """Draw what is about to be sent and some more, up to all that was reserved."""
        drawn_bytes, drawn_requests = self.drawn
        now_bytes = max(min(drawn_bytes + _DRAW_BYTES, self.n_bytes), n_bytes)
        now_requests = max(min(drawn_requests + _DRAW_REQUESTS, self.n_requests), n_requests)
        self.drawn = now_bytes, now_requests
        more_bytes, more_requests = now_bytes - drawn_bytes, now_requests - drawn_requests
        return Amount(quote(more_bytes, more_requests, self.destination).usd, more_bytes, more_requests)

    def draw(self, ranges: Sequence[_Range]) -> None:
        """Make sure that what is about to be sent is drawn."""
        if not self.reservation:
            return
        with self.lock:
            n_bytes, n_requests = self.taken
            n_bytes += sum(stop - start for _, start, stop, _, _ in ranges)
            n_requests += len(ranges)
            self.taken = n_bytes, n_requests
            if not self.is_settled and (n_bytes > self.drawn[0] or n_requests > self.drawn[1]):
                self.reservation.draw(self.next_draw(n_bytes, n_requests))

    def extend(self, n_bytes: int) -> None:
        """Set aside one more request, and bytes that must be fetched again although they may be billed already."""
        with self.lock:
            if self.reservation and not self.is_settled:
                self.reservation.extend(Amount(quote(n_bytes, 1, self.destination).usd, n_bytes, 1))

    def settle(self) -> None:
        """Write the receipt; what is in flight, in a thread that could not be waited for, counts as billed."""
        with self.lock:
            self.is_settled = True
            if not self.reservation:
                return
            n_bytes = sum(tally.n_bytes + tally.in_flight for tally in self.tallies)
            n_requests = sum(tally.n_requests for tally in self.tallies)
            price = quote(n_bytes, n_requests, self.destination)
            self.reservation.settle(usd=price.usd, n_bytes=n_bytes, n_requests=n_requests, charged=self.charged)


class _Crew:
    """Threads at the same work; the first error, or Ctrl-C, stops them all and is raised.

    They are daemons, because one may wait in the transport for a server that has fallen silent: who is interrupted does
    not wait with it.
    """

    def __init__(self, work: Callable[[], None], stopping: threading.Event) -> None:
        self._work = work
        self._stopping = stopping
        self._outcomes: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def run(self, n_first: int) -> None:
        """Start some threads and wait until these and all that were added have ended."""
        n_ended = 0
        try:
            for _ in range(n_first):
                self.add(most=n_first)
            while n_ended < len(self._threads):
                try:
                    # an interrupt that reaches another thread is noticed only between two waits
                    outcome = self._outcomes.get(timeout=_INTERRUPTIBLE_SECONDS)
                except queue.Empty:
                    continue
                n_ended += 1
                if outcome is not None:
                    raise outcome
        except BaseException:
            self._stopping.set()
            deadline = time.monotonic() + _GRACE_SECONDS
            for thread in self._threads:
                thread.join(max(deadline - time.monotonic(), 0))
            raise

    def add(self, *, most: int) -> None:
        """Start one more thread, unless there are `most`."""
        with self._lock:
            if len(self._threads) < most and not self._stopping.is_set():
                thread = threading.Thread(target=self._run, name="dmdata-fetch", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits, and raised there
            self._outcomes.put(error)
        else:
            self._outcomes.put(None)
