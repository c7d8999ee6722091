"""The threads of one read: which ranges each takes, how it reads them, and when a broken transfer is tried again.

A range is counted before it is sent and again as its bytes arrive, whatever becomes of it. A broken transfer is tried
again with backoff from the byte it broke at; a refusal or a missing object never is.
"""

import itertools
import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from dmdata.errors import DmdataError, SourceError
from dmdata.layout.plan import ReadPlan, land
from dmdata.money.meter import Meter, Tally
from dmdata.money.prices import LONG_RANGE_BYTES
from dmdata.objects.address import SHORT_RANGE_BYTES, Source, ended_short
from dmdata.reading.pace import RequestPace
from dmdata.reading.ranges import Keeper

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.02
_TRIES_WITHOUT_PROGRESS = 6
_MOST_TRIES = 64
_LONGEST_PAUSE_SECONDS = 8.0
_MOST_RANGES_IN_HAND = 128
# of a server that is far: how many are asked for again where one fails, and how many a thread reads before it rests
_FEW_RANGES_IN_HAND = 40
_FEW_AGAIN = 8
# that a thread reads without a look at their headers
_MOST_RANGES_UNSEEN = 127
# how often a thread asks for its ranges one by one after a failure, so that a storm does not cost each of them twice
_HANDFULS_ONE_BY_ONE = 8
_LISTED_AT_ONCE = 4096
# how long others may take to notice that a read has failed, before it ends without them
_GRACE_SECONDS = 0.25
_INTERRUPTIBLE_SECONDS = 0.1
# a range of a plan: its number, its bytes in the object, and its wanted bytes in the product
_Range: TypeAlias = tuple[int, int, int, int, int]


class Spool(Protocol):
    """Where a read lands, kept by someone who remembers what has landed, so that an interrupted read resumes there."""

    def product(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Return the buffer to fill, with the bytes of earlier ranges in place."""

    def has(self, nth: int) -> bool:
        """Whether the nth range of the plan is in the buffer already."""

    def landed(self, nth: int, start: int, stop: int) -> None:
        """Note that the nth range's wanted bytes are in ``product[start:stop]``. Called from any thread."""


class RangeQueue:
    """Hands the ranges of a plan to the threads: one at a time where they are long, several where they are short."""

    def __init__(self, plan: ReadPlan, spool: Spool | None, n_missing: int) -> None:
        self._ranges = self._walk(plan, spool)
        self.n_left = n_missing
        self._lock = threading.Lock()

    def take(self, short: RequestPace | None) -> list[_Range]:
        """Take the next ranges; none are left where the list is empty."""
        taken: list[_Range] = []
        with self._lock:
            n_bytes, n_most = 0, 1
            if short and short.is_known:
                n_most = _FEW_RANGES_IN_HAND if short.is_far else _MOST_RANGES_IN_HAND
                n_most = max(min(n_most, self.n_left // (2 * short.allowed)), 1)
            for one in itertools.islice(self._ranges, n_most):
                taken.append(one)
                n_bytes += one[2] - one[1]
                if n_bytes >= LONG_RANGE_BYTES:
                    break
            self.n_left -= len(taken)
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


class RangeReader:
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
        short: RequestPace | None,
    ) -> None:
        self._keeper = keeper
        self._source, self._plan, self._product, self._etag = source, plan, product, etag
        self._meter, self._stopping, self._spool = meter, stopping, spool
        self._tally, self._pace = meter.tally(), short
        self._n_one_by_one, self._n_unseen = 0, _MOST_RANGES_UNSEEN
        self._is_connected = False

    def read(self, ranges: list[_Range]) -> None:
        """Read some ranges; less only if stopped.

        One of many is asked for alone, and whose bytes these are is looked at: the others, asked for together, show no
        headers.
        """
        n_alone = 1 if self._n_unseen >= _MOST_RANGES_UNSEEN else 0
        if self._n_one_by_one or len(ranges) == 1:
            self._n_one_by_one = max(self._n_one_by_one - 1, 0)
            n_alone = len(ranges)
        alone, together = ranges[:n_alone], ranges[n_alone:]
        for one in alone:
            self._read_one(*one)
        if together and not self._stopping.is_set() and not self._read_together(together):
            self._read_again(together)

    def _read_again(self, ranges: list[_Range]) -> None:
        """Read ranges of which one, nobody knows which, failed with the others."""
        n_each = _FEW_AGAIN if self._pace and self._pace.is_far else 1
        for first in range(0, len(ranges), n_each):
            some = ranges[first : first + n_each]
            if self._stopping.is_set() or (len(some) > 1 and self._read_together(some)):
                continue
            for one in some:
                self._read_one(*one)

    def _read_one(self, nth: int, start: int, stop: int, at: int, end: int) -> None:
        """Read a range, resuming after each broken transfer at the byte it broke at."""
        source, tally = self._source, self._tally
        keeps = self._keeper is not None
        arrivals = _Arrivals(self._plan, self._product, tally, start, stop, at, end, keeps=keeps)
        n_tries = fruitless = 0
        while not self._stopping.is_set():
            began = arrivals.position
            n_tries += 1
            tally.sending(stop - began)
            sent_at = time.monotonic()
            try:
                if stop - began > SHORT_RANGE_BYTES:
                    source.read(began, stop, etag=self._etag, put=arrivals.put, stopped=self._stopping.is_set)
                else:
                    arrivals.put(np.frombuffer(source.piece(began, stop, etag=self._etag), np.uint8))
                if arrivals.position == stop:
                    self._answered(sent_at)
                    self._landed(nth, at, end)
                    if self._keeper:
                        arrivals.hand_to(self._keeper)
                elif not self._stopping.is_set():
                    raise ended_short(source.address, arrivals.position, transient=True)
                return
            except DmdataError as error:
                self._failed(sent_at)
                fruitless = 0 if arrivals.position > began else fruitless + 1
                patience(error, tally, self._meter, self._stopping, fruitless=fruitless, n_tries=n_tries)

    def _read_together(self, ranges: list[_Range]) -> bool:
        """Read short ranges in one call; False where that failed and nothing has landed."""
        tally = self._tally
        _, starts, stops, ats, ends = zip(*ranges, strict=True)
        sizes = [stop - start for start, stop in zip(starts, stops, strict=True)]
        if max(sizes) > SHORT_RANGE_BYTES:
            return False
        tally.sending(sum(sizes), n_requests=len(ranges))
        sent_at = time.monotonic()
        try:
            pieces = self._source.pieces(starts, stops, etag=self._etag)
            if [len(piece) for piece in pieces] != sizes:
                raise ended_short(self._source.address, stops[0], transient=True)
        except DmdataError as error:
            self._failed(sent_at)
            self._n_one_by_one = 0 if self._pace and self._pace.is_far else _HANDFULS_ONE_BY_ONE
            patience(error, tally, self._meter, self._stopping, fruitless=1, n_tries=1)
            return False
        if ends[-1] - ats[0] == sum(sizes) == sum(ends) - sum(ats):  # wanted to the byte, and nothing between them
            self._product[ats[0] : ends[-1]] = np.frombuffer(b"".join(pieces), np.uint8)
            tally.arrived(sum(sizes))
        else:
            for piece, (_, start, stop, at, end) in zip(pieces, ranges, strict=True):
                _Arrivals(self._plan, self._product, tally, start, stop, at, end).put(np.frombuffer(piece, np.uint8))
        self._n_unseen += len(ranges)
        if self._pace:
            self._pace.went_well(len(ranges))
        for nth, _, _, at, end in ranges:
            self._landed(nth, at, end)
        if self._keeper:
            for start, piece in zip(starts, pieces, strict=True):
                self._keeper.keep(start, np.frombuffer(piece, np.uint8))
        return True

    def _answered(self, sent_at: float) -> None:
        self._n_unseen = 0
        if self._pace:
            # the first answer took the making of a connection, too
            if self._is_connected:
                self._pace.answered(time.monotonic() - sent_at)
            self._pace.went_well(1)
        self._is_connected = True

    def _failed(self, sent_at: float) -> None:
        self._is_connected = False
        if self._pace:
            self._pace.refused(sent_at)

    def _landed(self, nth: int, at: int, end: int) -> None:
        if self._spool is not None:
            self._spool.landed(nth, at, end)


def patience(
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
    was_heard = meter.received_bytes > 0
    may_be_billed = tally.break_off(error, meter.object_bytes)
    n_requests = tally.requests_in_flight - (n_before - tally.n_requests)
    if not (isinstance(error, SourceError) and error.transient) or stopping.is_set():
        raise error
    if error.silent and not was_heard:
        raise error  # a server that never answered is waited for once
    if fruitless >= _TRIES_WITHOUT_PROGRESS or n_tries >= _MOST_TRIES:
        what = f"{fruitless} tries in a row without a byte" if fruitless > 1 else f"{n_tries} tries"
        raise error.reworded(f"{error}; given up after {what}: try again later", n_tries=n_tries) from error
    meter.extend(may_be_billed, n_requests)
    _log.info("trying again after try %d: %s", n_tries, error)
    pause = min(_LONGEST_PAUSE_SECONDS, 0.1 * 2**fruitless)
    stopping.wait(random.uniform(pause / 2, pause))  # noqa: S311 - spreads retries, guards nothing


class _Pace(Protocol):
    @property
    def n_first(self) -> int:
        """How many threads to begin with."""

    @property
    def n_most(self) -> int:
        """How many there can be."""

    def n_now(self) -> int:
        """Return how many threads there should be by now."""


def work_together(
    work: Callable[[int], None], pace: _Pace, n_left: Callable[[], int], stopping: threading.Event
) -> None:
    """Do the same work in several threads until all have ended; the first error, or Ctrl-C, stops them and is raised.

    Others join while the pace says so and something is left that no thread has in hand. They are daemons, because one
    may wait in the transport for a server that has fallen silent: who is interrupted does not wait with it.
    """
    outcomes: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run(nth: int) -> None:
        try:
            work(nth)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits, and raised there
            outcomes.put(error)
        else:
            outcomes.put(None)

    threads: list[threading.Thread] = []
    n_most = pace.n_most

    def start(n: int) -> None:
        nonlocal n_most
        while len(threads) < min(n, n_most):
            thread = threading.Thread(target=run, args=(len(threads),), name="dmdata-fetch", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system allows this process no more; those that were started read all the same
                if not threads:
                    raise
                n_most = len(threads)
                return
            threads.append(thread)

    n_ended, look_at = 0, time.monotonic() + _LOOK_SECONDS
    try:
        start(pace.n_first)
        while n_ended < len(threads):
            may_grow = len(threads) < n_most and n_left() > 0
            wait = max(look_at - time.monotonic(), 0) if may_grow else _INTERRUPTIBLE_SECONDS
            outcome: BaseException | None = None
            try:
                # an interrupt that reaches another thread is noticed only between two waits
                outcome = outcomes.get(timeout=wait)
                n_ended += 1
            except queue.Empty:
                pass
            if outcome is not None:
                raise outcome
            if may_grow and time.monotonic() >= look_at:
                start(pace.n_now())
                look_at = time.monotonic() + _LOOK_SECONDS
    except BaseException:
        stopping.set()
        deadline = time.monotonic() + _GRACE_SECONDS
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))
        raise
