"""What one read sends and receives: drawn on its reservation before it is sent, and settled once.

What may have been billed is counted from above: bytes that arrived, and all that a request asked for where its transfer
broke or was cut off. Free sources are counted likewise, without a reservation.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from dmdata.errors import DmdataError, SourceError
from dmdata.money.ledger import Amount, Reservation
from dmdata.money.prices import PriceTable, Terms

# what a killed read may have sent and could not settle is at most one draw, and what its threads had in hand
_DRAW_BYTES = 64 << 20
_DRAW_REQUESTS = 4096
# a server that sends the whole object instead of a range has sent at most what fits into both ends' buffers
_MOST_BUFFERED_BYTES = 16 << 20

Received: TypeAlias = Callable[[int], object]
"""Called with the number of bytes that arrived since the last call, from any thread."""


@dataclass(slots=True)
class Tally:
    """What one thread sent and received: an upper bound of what may be billed for it.

    Attributes
    ----------
    progress : callable or None
    n_requests, n_bytes : int
        Sent; and arrived, or billed without.
    in_flight, requests_in_flight : int
        Bytes asked for that have not arrived, and the requests of the last call.
    """

    progress: Received | None
    n_requests: int = 0
    n_bytes: int = 0
    in_flight: int = 0
    requests_in_flight: int = 0

    def sending(self, n_bytes: int, *, n_requests: int = 1) -> None:
        """Count requests that ask for `n_bytes` together."""
        self.n_requests += n_requests
        self.in_flight, self.requests_in_flight = n_bytes, n_requests

    def arrived(self, n_bytes: int) -> None:
        """Count bytes of what is in flight as received."""
        self.n_bytes += n_bytes
        self.in_flight -= n_bytes
        if self.progress and n_bytes:
            self.progress(n_bytes)

    def break_off(self, error: DmdataError, object_bytes: int) -> int:
        """Count what is still in flight as billed, unless the source refused to send it; return how much.

        What was provably not sent (`unsent`) is not counted, nor is its request.
        """
        if error.unsent and self.requests_in_flight == 1:
            self.n_requests -= 1
            self.in_flight = 0
            return 0
        # of several requests one was refused, and the others may have been answered
        n_bytes = 0 if error.refused and self.requests_in_flight == 1 else self.in_flight
        if isinstance(error, SourceError) and error.whole:
            n_bytes = max(n_bytes, self.requests_in_flight * min(object_bytes, _MOST_BUFFERED_BYTES))
        self.n_bytes += n_bytes
        self.in_flight = 0
        return n_bytes


@dataclass(slots=True)
class Meter:
    """Counts what one read sends and receives, draws on its reservation, and settles it.

    Attributes
    ----------
    terms : Terms
    n_bytes, n_requests : int
        As planned.
    progress : callable or None
    charged : bool or None
        What the source answered about charging its reader.
    reservation : Reservation or None
        None where reading is free.
    table : PriceTable or None
        The prices that hold for it; None where reading is, or turned out to be, free.
    object_bytes : int
        Of the whole object, which a server may send where a range is due.
    tallies : list of Tally
        One a thread.
    taken, drawn : (int, int)
        Bytes and requests handed to threads; and drawn so far.
    is_settled : bool
    lock : threading.Lock
    """

    terms: Terms
    n_bytes: int
    n_requests: int
    progress: Received | None
    charged: bool | None
    reservation: Reservation | None = None
    table: PriceTable | None = None
    object_bytes: int = _MOST_BUFFERED_BYTES
    tallies: list[Tally] = field(default_factory=list)
    taken: tuple[int, int] = (0, 0)
    drawn: tuple[int, int] = (0, 0)
    is_settled: bool = False
    lock: Any = field(default_factory=threading.Lock)

    def tally(self) -> Tally:
        """Make the count of one more thread."""
        tally = Tally(self.progress)
        with self.lock:
            self.tallies.append(tally)
        return tally

    def usd(self, n_bytes: int, n_requests: int) -> float:
        """Price a part of it, upper bound."""
        return self.terms.quote(n_bytes, n_requests, table=self.table).usd if self.table else 0.0

    def next_draw(self, n_bytes: int, n_requests: int) -> Amount:
        """Draw what is about to be sent and some more, up to all that was reserved."""
        drawn_bytes, drawn_requests = self.drawn
        now_bytes = max(min(drawn_bytes + _DRAW_BYTES, self.n_bytes), n_bytes)
        now_requests = max(min(drawn_requests + _DRAW_REQUESTS, self.n_requests), n_requests)
        self.drawn = now_bytes, now_requests
        more_bytes, more_requests = now_bytes - drawn_bytes, now_requests - drawn_requests
        return Amount(self.usd(more_bytes, more_requests), more_bytes, more_requests)

    def draw(self, sent_bytes: int, n_requests: int) -> None:
        """Make sure that what is about to be sent is drawn."""
        if not self.reservation:
            return
        with self.lock:
            all_bytes, all_requests = self.taken[0] + sent_bytes, self.taken[1] + n_requests
            self.taken = all_bytes, all_requests
            if not self.is_settled and (all_bytes > self.drawn[0] or all_requests > self.drawn[1]):
                self.reservation.draw(self.next_draw(all_bytes, all_requests))

    def extend(self, n_bytes: int, n_requests: int) -> None:
        """Set aside requests that must be sent again, and bytes that may be billed although they did not arrive."""
        if not n_bytes and not n_requests:
            return  # what was reserved for it was not used
        with self.lock:
            if self.reservation and not self.is_settled:
                usd = self.usd(n_bytes, n_requests)
                self.reservation.extend(Amount(usd, n_bytes, n_requests))

    @property
    def received_bytes(self) -> int:
        """Count what arrived until now, and what is billed without having arrived."""
        return sum(tally.n_bytes for tally in self.tallies)

    def settle(self) -> None:
        """Write the receipt; what is in flight, in a thread that could not be waited for, counts as billed."""
        with self.lock:
            self.is_settled = True
            if not self.reservation:
                return
            n_bytes = self.received_bytes + sum(tally.in_flight for tally in self.tallies)
            n_requests = sum(tally.n_requests for tally in self.tallies)
            usd = self.usd(n_bytes, n_requests)
            self.reservation.settle(usd=usd, n_bytes=n_bytes, n_requests=n_requests, charged=self.charged)
