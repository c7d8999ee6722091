"""Run a plan under a budget: reserve, fetch ranges concurrently into the destination, settle on what was received.

Memory is bounded by the destination plus one range a connection. A broken transfer is tried again with backoff from
the byte it broke at; a refusal or a missing object never is. Ctrl-C stops all connections at their next megabyte.
Free sources are read the same way, without ledger or budget.
"""

import itertools
import random
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dmdata.address import Address, ObjectState, Source
from dmdata.errors import SourceError
from dmdata.ledger import Ledger, Reservation, home
from dmdata.plan import ReadPlan, land
from dmdata.prices import Destination, quote
from dmdata.source import connect

MAX_RANGE_BYTES = 16 << 20
"""Longest request: a transport's time-out covers a whole body, and what breaks must not be large."""

CONNECTIONS = 8
_TRIES_WITHOUT_PROGRESS = 6
_LONGEST_PAUSE_SECONDS = 8.0

Progress = Callable[[int], object]
"""Called with the number of bytes that arrived since the last call, from any thread."""


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
    """

    address: Address
    artifact: str
    destination: Destination = Destination.INTERNET

    def start(self, n_bytes: int) -> tuple[bytes, ObjectState]:
        """Read up to `n_bytes` from the start, and learn the object's size and etag.

        Raises
        ------
        BudgetError, AccessError, ObjectMissingError, SourceError
        """
        source, meter = connect(self.address), self._meter(n_bytes, 1)
        try:
            head, state = _patiently(lambda: source.start(n_bytes), meter, threading.Event())
            meter.received(len(head))
            return head, state
        finally:
            meter.settle()

    def read(self, start: int, stop: int, *, etag: str | None) -> bytes:
        """Read one range.

        Raises
        ------
        BudgetError, IntegrityError, AccessError, ObjectMissingError, SourceError
        """
        source, meter = connect(self.address), self._meter(stop - start, 1)
        try:
            buffer = bytearray(stop - start)
            _fill(source, memoryview(buffer), start, etag, meter, threading.Event())
        finally:
            meter.settle()
        return bytes(buffer)

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
            If it cannot be read; what arrived until then is in the ledger.
        """
        if not plan.n_requests:
            return np.empty(0, np.uint8)
        missing = [nth for nth in range(plan.n_requests) if spool is None or not spool.has(nth)]
        n_bytes = int((plan.range_stops - plan.range_starts)[missing].sum())
        source, meter = connect(self.address), self._meter(n_bytes, len(missing), progress)
        stop = threading.Event()
        next_range = itertools.count()

        def work() -> None:
            while not stop.is_set() and (position := next(next_range)) < len(missing):
                nth = missing[position]
                _fetch_range(source, plan, nth, product, etag, meter, stop)
                if spool is not None and not stop.is_set():
                    first, last = plan.first_piece[nth], plan.first_piece[nth + 1]
                    spool.landed(nth, int(plan.landing[first]), int(plan.landing[last]))

        try:
            product = spool.product(plan.wanted_bytes) if spool else np.empty(plan.wanted_bytes, np.uint8)
            if missing:
                _run_in_threads(work, min(CONNECTIONS, len(missing)), stop)
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
        reservation = None
        if self.address.requester_pays:
            price = quote(n_bytes, n_requests, self.destination)
            reservation = Ledger(home()).reserve(
                usd=price.usd,
                n_bytes=n_bytes,
                n_requests=n_requests,
                artifact=self.artifact,
                destination=self.destination,
            )
        return _Meter(self.destination, reservation, n_requests, progress)


def _fetch_range(
    source: Source,
    plan: ReadPlan,
    nth: int,
    product: npt.NDArray[np.uint8],
    etag: str | None,
    meter: "_Meter",
    stop: threading.Event,
) -> None:
    first, last = plan.first_piece[nth], plan.first_piece[nth + 1]
    start, n_bytes = int(plan.range_starts[nth]), int(plan.range_stops[nth] - plan.range_starts[nth])
    target = product[plan.landing[first] : plan.landing[last]]
    if len(target) == n_bytes:
        _fill(source, target.data, start, etag, meter, stop)
        return
    received = np.empty(n_bytes, np.uint8)
    _fill(source, received.data, start, etag, meter, stop)
    if not stop.is_set():
        land(plan, nth, received, product)


def _fill(
    source: Source, buffer: memoryview, start: int, etag: str | None, meter: "_Meter", stop: threading.Event
) -> None:
    """Fill a buffer, going on after each broken transfer from where it broke; less only if stopped."""
    done = 0

    def attempt() -> None:
        nonlocal done
        n_received = 0
        try:
            n_received = source.read_into(buffer[done:], start + done, etag=etag, stopped=stop.is_set)
        except SourceError as error:
            n_received = error.facts.get("n_received", 0)
            raise
        finally:
            meter.received(n_received)
            done += n_received

    _patiently(attempt, meter, stop)


@dataclass(slots=True)
class _Meter:
    """Counts what one read sends and receives, in any thread, and settles its reservation by it."""

    destination: Destination
    reservation: Reservation | None
    n_reserved: int
    progress: Progress | None
    n_bytes: int = 0
    n_requests: int = 0
    lock: Any = field(default_factory=threading.Lock)

    def sending(self) -> None:
        with self.lock:
            self.n_requests += 1
            beyond = self.n_requests > self.n_reserved
        if beyond and self.reservation:
            self.reservation.extend(usd=quote(0, 1, self.destination).usd)

    def received(self, n_bytes: int) -> None:
        with self.lock:
            self.n_bytes += n_bytes
        if self.progress and n_bytes:
            self.progress(n_bytes)

    def settle(self) -> None:
        if self.reservation:
            price = quote(self.n_bytes, self.n_requests, self.destination)
            self.reservation.settle(usd=price.usd, n_bytes=self.n_bytes, n_requests=self.n_requests)


def _patiently(attempt: Callable[[], Any], meter: _Meter, stop: threading.Event) -> Any:
    """Make an attempt again and again while it fails for a passing reason, with growing random pauses."""
    fruitless = 0
    while True:
        meter.sending()
        try:
            return attempt()
        except SourceError as error:
            if not error.facts.get("transient", False) or stop.is_set():
                raise
            fruitless = 0 if error.facts.get("n_received", 0) else fruitless + 1
            if fruitless >= _TRIES_WITHOUT_PROGRESS:
                raise SourceError(
                    f"{error}; given up after {fruitless} tries in a row without a byte: try again later",
                    **error.facts | {"n_tries": meter.n_requests},
                ) from error
            pause = min(_LONGEST_PAUSE_SECONDS, 0.1 * 2**fruitless)
            stop.wait(random.uniform(pause / 2, pause))  # noqa: S311 - spreads retries, guards nothing


def _run_in_threads(work: Callable[[], None], n_threads: int, stop: threading.Event) -> None:
    """Run the same work in several threads; the first error, or Ctrl-C, stops them all and is raised."""
    with ThreadPoolExecutor(n_threads, thread_name_prefix="dmdata-fetch") as pool:
        futures = [pool.submit(work) for _ in range(n_threads)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
    for future in futures:
        future.result()
