"""How many requests a read keeps in flight: as many as pay, and fewer as soon as a server asks for that.

Few long ranges are bound by bytes: the connections of `StreamPace`. Many short ones are bound by the time to the first
byte, so that what is in flight should be the requests a second that are wanted times the seconds that one takes
(Little's law): `RequestPace` measures those and adds connections step by step. Where a server refuses for a while (S3's
SlowDown) or drops connections, it goes down by a quarter each round, and up again by one a round.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Self

CONNECTIONS = 32
"""Most long ranges in flight at a time, and most short ones where a source cannot have more."""

SHORT_RANGE_CONNECTIONS = 512
"""Most short ranges in flight at a time. S3 answers 5,500 requests a second for a prefix, and says when it is less."""

FEW_CONNECTIONS = 8
"""How many threads a read begins with; near servers are read by no more, for they would be in each other's way."""

# a server that sends faster than this a connection is near
_NEAR_BYTES_PER_SECOND = 60e6
# where eight threads that ask for ten ranges at a time would not have enough in flight for the requests below
_FAR_SECONDS = 0.004
# about as many as one process can ask for, and as many bytes as CONNECTIONS streams at 50 MB/s have
_MOST_REQUESTS_PER_SECOND = 20_000
_MOST_BYTES_PER_SECOND = CONNECTIONS * 50e6
# each new connection is a TCP and TLS handshake: these many at most are begun at once
_MOST_NEW_CONNECTIONS = 80
_ANSWERS_AVERAGED = 64
_CUT = 0.75


class StreamPace:
    """How many threads read long ranges: a few near a server that is near, else all.

    Parameters
    ----------
    n_most : int
    received_bytes : callable
        Tells the bytes that arrived so far.
    looks_first : bool
        Whether the read is large enough to look at how fast its bytes arrive, before all threads are started.
    """

    def __init__(self, n_most: int, received_bytes: Callable[[], int], *, looks_first: bool) -> None:
        self.n_most = n_most
        self._received_bytes = received_bytes
        self._n_first = self._n = min(FEW_CONNECTIONS, n_most) if looks_first else n_most
        self._seen, self._seen_at = 0, time.monotonic()

    def n_now(self) -> int:
        """Return how many threads there should be now. Called some time after all of them were started."""
        before, before_at = self._seen, self._seen_at
        self._seen, self._seen_at = self._received_bytes(), time.monotonic()
        is_slow = self._seen - before < _NEAR_BYTES_PER_SECOND * self._n_first * (self._seen_at - before_at)
        # the time until the first byte says nothing about the pace, except of a server that is far
        if not self._seen or (before and is_slow):
            self._n = self.n_most
        return self._n

    @property
    def n_first(self) -> int:
        """Threads to begin with."""
        return self._n_first


class RequestPace:
    """How many threads read short ranges; use it as a context manager around their work.

    Parameters
    ----------
    n_requests, n_bytes : int
        Of the whole read.
    n_each : int
        What a thread has in flight.
    n_most : int
        What the source can have in flight.
    """

    def __init__(self, n_requests: int, n_bytes: int, *, n_each: int, n_most: int) -> None:
        self.n_first = FEW_CONNECTIONS
        self.n_most = max(-(-n_most // n_each), self.n_first)
        self.allowed = self.n_first
        """How many threads may work now: the nth rests while it is not below."""
        self._n_each = n_each
        self._per_second = min(_MOST_REQUESTS_PER_SECOND, _MOST_BYTES_PER_SECOND * n_requests / max(n_bytes, 1))
        self._lock = threading.Lock()
        self._n_answers, self._seconds, self._fastest = 0, 0.0, 0.0
        self._bound, self._cut_at = float(self.n_most), 0.0
        self._n_told = 0

    def __enter__(self) -> Self:
        """Take the first connections out of those that this process may have."""
        self._n_told = self.n_first
        _IN_USE.take(self.n_first * self._n_each, n_least=self.n_first * self._n_each)
        return self

    def __exit__(self, *_: object) -> None:
        """Give all connections back."""
        _IN_USE.give_back(self._n_told * self._n_each)

    @property
    def is_known(self) -> bool:
        """Whether it is known how far the server is."""
        return self._n_answers > 0

    @property
    def is_far(self) -> bool:
        """Whether more threads pay than the first few."""
        return self._fastest >= _FAR_SECONDS

    def n_now(self) -> int:
        """Return how many threads there should be by now; it grows by some at each call."""
        if self.allowed > self._n_told:
            n_wanted = min((self.allowed - self._n_told) * self._n_each, _MOST_NEW_CONNECTIONS)
            n_taken = _IN_USE.take(n_wanted, n_least=0)
            _IN_USE.give_back(n_taken % self._n_each)
            self._n_told += n_taken // self._n_each
        return self._n_told

    def answered(self, seconds: float) -> None:
        """Note how long one request took, on a connection that was there already."""
        with self._lock:
            self._n_answers += 1
            n_answers = self._n_answers
            self._seconds += (seconds - self._seconds) / min(n_answers, _ANSWERS_AVERAGED)
            # the average has seen congestion of our own making, the fastest of the first few has not
            if n_answers <= _ANSWERS_AVERAGED:
                self._fastest = min(self._fastest, seconds) if n_answers > 1 else seconds
            self._allow()

    def went_well(self, n_requests: int) -> None:
        """Note requests that were answered, one by one or together."""
        if self._bound < self.n_most:
            with self._lock:
                self._bound = min(self._bound + n_requests / (self._n_each * self._bound), self.n_most)
                self._allow()

    def refused(self, sent_at: float) -> None:
        """Note that a request, sent at that time (`time.monotonic`), was refused for a while, or broke."""
        with self._lock:
            # what was sent before the last cut reflects the time before it
            if sent_at >= self._cut_at:
                self._cut_at = time.monotonic()
                self._bound = max(_CUT * min(self.allowed, self._n_told), 1.0)
                self._allow()

    def _allow(self) -> None:
        n_wanted = self.n_first
        if self.is_far:
            n_wanted = max(-(-int(self._seconds * self._per_second) // self._n_each), self.n_first)
        self.allowed = max(min(n_wanted, int(self._bound), self.n_most), 1)


class _Connections:
    """The connections for short ranges that this process may have: they are open files, and those are bounded."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin with none in use, as a forked child does: its parent's threads stayed behind."""
        self._lock = threading.Lock()
        self._n_in_use = 0

    def take(self, n_wanted: int, *, n_least: int) -> int:
        """Take as many as there are, up to what is wanted, and the least in any case."""
        with self._lock:
            n = max(min(n_wanted, SHORT_RANGE_CONNECTIONS - self._n_in_use, _n_files() // 2 - self._n_in_use), n_least)
            self._n_in_use += n
        return n

    def give_back(self, n: int) -> None:
        """Put connections back."""
        with self._lock:
            self._n_in_use -= n


def _n_files() -> int:
    """Count the files this process may have open: 1,024 is common, 256 is not rare."""
    if sys.platform == "win32":
        return 2 * SHORT_RANGE_CONNECTIONS
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2 * SHORT_RANGE_CONNECTIONS if soft == resource.RLIM_INFINITY else soft


_IN_USE = _Connections()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_IN_USE.forget)
