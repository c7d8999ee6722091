"""Objects on the web: ranges of an http or https URL, by GET alone, through urllib3.

The URL is asked for as it was given: its percent-encoding and query are untouched, what may not stand in a URL is
encoded. A presigned URL is thus an address, and since its query is the right to read, it travels with the address to
workers; it is in no message, name, log or file. Redirects are followed, to a bound, and the target is remembered for a
minute. Each answer is looked at before its bytes are believed: see `dmdata.objects.http.answers`. Retries are fetch's.
"""

import contextlib
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urljoin, urlsplit

import numpy as np
import obstore
import obstore.exceptions

from dmdata.objects.address import (
    Address,
    Buffer,
    ByPieces,
    ObjectState,
    PastEndError,
    Put,
    Source,
    changed,
    ended_short,
)
from dmdata.objects.clients import client_once
from dmdata.objects.forks import announce_runtime, runtime_was_lost
from dmdata.objects.http.answers import (
    LONGEST_PAUSE_SECONDS,
    Answer,
    broken_kinds,
    coding_of,
    conditions,
    identity,
    is_same,
    object_size,
    pause_asked_for,
    refusal,
    require_file,
    require_range,
)
from dmdata.objects.http.connections import (
    CONNECT_SECONDS,
    SILENCE_SECONDS,
    broken,
    finish,
    has_proxies,
    root_certificate,
    send,
)
from dmdata.objects.http.urls import Target, split_url

_MOST_REDIRECTS = 10
_CHUNK_BYTES = 512 << 10
_PIECES_AT_ONCE = 8
_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "dmdata"}
_TARGET_SECONDS = 60.0
# a server heard of so lately is worth another try; a silent one is given up
_KNOWN_SECONDS = CONNECT_SECONDS + SILENCE_SECONDS
_REDIRECTS = frozenset({301, 302, 303, 307, 308})

# where a URL led to, and until when that is believed; when a server may be asked again
_TARGETS: dict[str, tuple[str, float]] = {}
_NOT_BEFORE: dict[str, float] = {}


def web_source(address: Address, *, remembers_seconds: float = _TARGET_SECONDS) -> Source:
    """Make the reader of an object on the web; see `dmdata.objects.source.connect`.

    Parameters
    ----------
    address : Address
    remembers_seconds : float
        For how long a redirect is followed without asking for it again.

    Raises
    ------
    SourceError
        If the URL names no host, or has a fragment, which is never sent.
    """
    return _WebSource(address, remembers_seconds)


@dataclass(frozen=True, slots=True)
class WholeObject:
    """An object as it is sent whole, for servers without ranges.

    Attributes
    ----------
    n_bytes : int or None
        None where the server does not say, or sends it compressed.
    etag : str or None
    chunks : iterator of bytes
        Its bytes in order, half a mebibyte at a time; raises `SourceError` where the transfer breaks.
    """

    n_bytes: int | None
    etag: str | None
    chunks: Iterator[bytes]


@contextlib.contextmanager
def whole_object(address: Address) -> Iterator[WholeObject]:
    """Ask for a whole object on the web in one request, and hand it over as it arrives; memory is bounded.

    What is sent compressed is decompressed.

    Raises
    ------
    ObjectMissingError, AccessError, SourceError
        Once: nothing is tried again, for it would begin at the first byte.
    """
    source = _WebSource(address)
    with source.answer(None, None) as answer:
        require_file(source.target, answer)
        is_plain = coding_of(answer) is None
        said = answer.headers.get("Content-Length", "")
        n_bytes = int(said) if is_plain and said.isdigit() else None
        yield WholeObject(n_bytes, identity(answer), source.chunks(answer, n_bytes))


class _WebSource(ByPieces):
    """An object on the web. Many threads may read by it."""

    __slots__ = ("_heard_at", "_is_for_obstore", "_remembers_seconds", "address", "target")

    def __init__(self, address: Address, remembers_seconds: float = _TARGET_SECONDS) -> None:
        self.address = address
        self.target = Target.of(address)
        self._remembers_seconds = remembers_seconds
        self._heard_at: float | None = None
        self._is_for_obstore = True

    def start(self, n_bytes: int) -> tuple[bytes, ObjectState]:
        try:
            with self.answer((0, n_bytes), None) as answer:
                require_file(self.target, answer)
                size = object_size(answer)
                head = b"".join(self._body(answer, min(n_bytes, size)))
                return head, ObjectState(size, identity(answer))
        except PastEndError as error:
            if error.object_bytes != 0:
                raise
            return b"", ObjectState(0, None)

    def read(self, start: int, stop: int, *, etag: str | None, put: Put, stopped: Callable[[], bool]) -> None:
        with self.answer((start, stop), etag) as answer:
            if etag is not None and not is_same(identity(answer), etag):
                raise changed(self.address)
            size = object_size(answer)
            for chunk in self._body(answer, min(stop, size) - start):
                put(np.frombuffer(chunk, np.uint8))
                start += len(chunk)
                if stopped():
                    return
        if start < stop:
            raise ended_short(self.address, start, transient=False)

    def pieces(self, starts: Sequence[int], stops: Sequence[int], *, etag: str | None) -> Sequence[Buffer]:
        """Read short ranges, several at a time: most of the time of each is the way to the server and back.

        Where obstore asks just as we do, it asks: five times as many a second. It cannot say in full what
        it fails with, so each range is then read alone.
        """
        if (store := self._store(etag)) is not None:
            try:
                return obstore.get_ranges(store, "", starts=starts, ends=stops, coalesce=0)  # type: ignore[return-value]
            except (obstore.exceptions.BaseError, OSError, ValueError):
                self._is_for_obstore = False
                raise self.target.failed("could not be read in several ranges at once", transient=True) from None
        found: list[Buffer] = [b""] * len(starts)
        turns = itertools.count()
        errors: list[BaseException] = []

        def work() -> None:
            try:
                while not errors and (nth := next(turns)) < len(found):
                    found[nth] = self.piece(starts[nth], stops[nth], etag=etag)
            except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
                errors.append(error)

        # daemons: who interrupts a read does not wait for a server that has fallen silent
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(_PIECES_AT_ONCE, len(found)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return found

    def _store(self, etag: str | None) -> Any:
        """Find obstore's client for this object; None where it would ask otherwise, or hang."""
        from obstore.store import HTTPStore

        url, is_remembered = self._where_to_ask()
        # it compares no weak tag, has rules of its own for proxies, and names us as the referrer where it is redirected
        if (
            not self._is_for_obstore
            or (self.target.url in _TARGETS and not is_remembered)
            or (etag or "").startswith("W/")
            or "/." in url
            or runtime_was_lost()
            or has_proxies()
        ):
            return None
        headers = _HEADERS | conditions(etag) | self.target.authorization_for(url)
        options: dict[str, Any] = {
            "allow_http": url.startswith("http:"),
            "connect_timeout": f"{CONNECT_SECONDS:.0f}s",
            "read_timeout": f"{SILENCE_SECONDS:.0f}s",
            "timeout": "600s",
            "default_headers": headers,
        } | root_certificate()
        retries: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=600)}
        terms = (url, *sorted(headers.items()), options.get("root_certificate"))
        announce_runtime()
        store = client_once(terms, lambda: HTTPStore.from_url(url, client_options=options, retry_config=retries))  # type: ignore[arg-type]
        return store if store.url == url else None

    @contextlib.contextmanager
    def answer(self, span: tuple[int, int] | None, etag: str | None) -> Iterator[Answer]:
        """Ask for a range, or for all, and look at whether it is sent; its connection is kept if it is read to the end.

        Raises
        ------
        IntegrityError
            If the server says that the object is not the one that has this etag.
        ObjectMissingError, AccessError, SourceError
        """
        headers = _HEADERS | conditions(etag)
        if span is not None:
            headers["Range"] = f"bytes={span[0]}-{span[1] - 1}"
        answer = self._follow(headers)
        try:
            if answer.status not in (200, 206) or (span is None and answer.status == 206):
                raise refusal(self.target, answer)
            if span is not None:
                require_range(self.target, answer, *span)
            yield answer
        finally:
            finish(answer)

    def chunks(self, answer: Answer, n_bytes: int | None) -> Iterator[bytes]:
        """Hand over a whole body, decompressed; `n_bytes` is None where its length is not known."""
        n_received, parts = 0, answer.stream(_CHUNK_BYTES, decode_content=True)
        while chunk := self._next_of(lambda: next(parts, b"")):
            n_received += len(chunk)
            yield chunk
        if n_bytes is not None and n_received != n_bytes:
            raise ended_short(self.address, n_received, transient=True)

    def _next_of(self, take: Callable[[], bytes]) -> bytes:
        try:
            chunk = take()
        except broken_kinds() as error:
            raise broken(self.address, self.target.url, error, is_known=True) from None
        self._heard_at = time.monotonic()
        return chunk

    def _where_to_ask(self) -> tuple[str, bool]:
        """Find where to ask, and whether that is remembered from a redirect."""
        url, until = _TARGETS.get(self.target.url, (self.target.url, 0.0))
        return (url, True) if time.monotonic() < until else (self.target.url, False)

    def _follow(self, headers: dict[str, str]) -> Answer:
        """Ask, and ask where the answer points to, until one points nowhere."""
        url, is_remembered = self._where_to_ask()
        asked: list[str] = []
        while True:
            asked.append(url)
            answer = self._send(url, headers)
            if answer.status in _REDIRECTS:
                finish(answer)
                next_url = self._next(url, answer)
                if next_url in asked:
                    raise self.target.failed(
                        "leads back to itself by redirects; report it to its publisher, or use another address"
                    )
                if len(asked) > _MOST_REDIRECTS:
                    raise self.target.failed(
                        f"was redirected more than {_MOST_REDIRECTS} times; give the address it leads to in a browser"
                    )
                url = next_url
            elif is_remembered and answer.status in (400, 401, 403, 404, 410):
                # a target that was good for some minutes: the way to it is asked for again
                finish(answer)
                _TARGETS.pop(self.target.url, None)
                url, is_remembered, asked = self.target.url, False, []
            else:
                if len(asked) > 1:
                    _TARGETS[self.target.url] = url, time.monotonic() + self._remembers_seconds
                return answer

    def _next(self, url: str, answer: Answer) -> str:
        location = answer.headers.get("Location")
        if not location:
            raise self.target.failed(
                f"was answered with {answer.status} and no address to go to; report it to its publisher"
            )
        with contextlib.suppress(UnicodeError):  # http.client reads headers as Latin-1
            location = location.encode("latin-1").decode()
        try:
            target, _ = split_url(urljoin(url, location.partition("#")[0]))
        except ValueError:
            raise self.target.failed(
                "was redirected to what is not an http or https address; give the address of the file itself"
            ) from None
        if url.startswith("https:") and target.startswith("http:"):
            raise self.target.failed(
                f"was redirected to {Address(target)}, which is not encrypted; if you trust the network, give that "
                "address itself"
            )
        return target

    def _send(self, url: str, headers: dict[str, str]) -> Answer:
        """Send one request, with the user's password only to the server it is for."""
        parts = urlsplit(url)
        server = f"{parts.scheme}://{parts.netloc}"
        if (pause := _NOT_BEFORE.get(server, 0.0) - time.monotonic()) > 0:
            time.sleep(pause)
        try:
            answer = send(url, headers | self.target.authorization_for(url))
        except broken_kinds() as error:
            is_known = self._heard_at is not None and time.monotonic() - self._heard_at < _KNOWN_SECONDS
            raise broken(self.address, url, error, is_known=is_known) from None
        self._heard_at = time.monotonic()
        pause = pause_asked_for(answer)
        if 0 < pause <= LONGEST_PAUSE_SECONDS:
            _NOT_BEFORE[server] = time.monotonic() + pause
        return answer

    def _body(self, answer: Answer, n_bytes: int) -> Iterator[bytes]:
        """Hand over bytes as the connection gives them: where it breaks, nothing that arrived is lost."""
        n_missing = n_bytes
        while n_missing > 0:
            chunk = self._next_of(functools.partial(answer.read1, min(_CHUNK_BYTES, n_missing)))
            if not chunk:
                raise self.target.failed(f"broke off {n_missing} bytes before the end of a range", transient=True)
            n_missing -= len(chunk)
            yield chunk
