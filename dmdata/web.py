"""Objects on the web: ranges of an http or https URL, by GET alone, through urllib3.

The URL is asked for as it was given: its percent-encoding and query are untouched, what may not stand in a URL is
encoded. A presigned URL is thus an address, and since its query is the right to read, it travels with the address to
workers; it is in no message, name, log or file. Redirects are followed, to a bound, and the target is remembered for a
minute. Each answer is looked at before its bytes are believed: status, range, size, coding and identity.

An object's identity is its ETag, weak or strong, else the time it was changed at, else there is none. Retries are
fetch's.
"""

import base64
import contextlib
import functools
import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import quote, unquote, urljoin, urlsplit

import numpy as np
import obstore
import obstore.exceptions

from dmdata.address import Address, Buffer, ByPieces, ObjectState, Put, Source, changed, ended_short
from dmdata.clients import client_once, runtime_was_lost
from dmdata.connections import CONNECT_SECONDS, SILENCE_SECONDS, broken, finish, has_proxies, root_certificate, send
from dmdata.errors import AccessError, DmdataError, ObjectMissingError, SourceError

if TYPE_CHECKING:
    import urllib3

_MOST_REDIRECTS = 10
_CHUNK_BYTES = 512 << 10
_PIECES_AT_ONCE = 8
_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "dmdata"}
_TARGET_SECONDS = 60.0
# a server heard of so lately is worth another try; a silent one is given up
_KNOWN_SECONDS = CONNECT_SECONDS + SILENCE_SECONDS
# a server that asks for a longer pause is not waited for
_LONGEST_PAUSE_SECONDS = 20.0
# of an error's text: enough for what S3, Google and Azure write
_REFUSAL_BYTES = 4096
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_EXPIRED = re.compile(
    rb"request has expired|token has expired|ExpiredToken|signature not valid in the specified time", re.I
)

# where a URL led to, and until when that is believed; when a server may be asked again
_TARGETS: dict[str, tuple[str, float]] = {}
_NOT_BEFORE: dict[str, float] = {}

_Answer: TypeAlias = "urllib3.BaseHTTPResponse"


def web_source(address: Address) -> Source:
    """Make the reader of an object on the web; see `dmdata.source.connect`.

    Raises
    ------
    SourceError
        If the URL names no host, or has a fragment, which is never sent.
    """
    return _WebSource(address)


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
        source.require_file(answer)
        is_plain = _coding(answer) is None
        said = answer.headers.get("Content-Length", "")
        n_bytes = int(said) if is_plain and said.isdigit() else None
        yield WholeObject(n_bytes, _identity(answer), source.chunks(answer, n_bytes))


class _WebSource(ByPieces):
    """An object on the web. Many threads may read by it."""

    __slots__ = ("_authorization", "_heard_at", "_is_for_obstore", "_url", "address")

    def __init__(self, address: Address) -> None:
        self.address = address
        self._url, self._authorization = _url_to_ask(address)
        self._heard_at: float | None = None
        self._is_for_obstore = True

    def start(self, n_bytes: int) -> tuple[bytes, ObjectState]:
        try:
            with self.answer((0, n_bytes), None) as answer:
                self.require_file(answer)
                size = self._size(answer)
                head = b"".join(self._body(answer, min(n_bytes, size)))
                return head, ObjectState(size, _identity(answer))
        except SourceError as error:
            if error.facts.get("past_end") and error.facts.get("object_bytes") == 0:
                return b"", ObjectState(0, None)
            raise

    def read(self, start: int, stop: int, *, etag: str | None, put: Put, stopped: Callable[[], bool]) -> None:
        with self.answer((start, stop), etag) as answer:
            if etag is not None and not _is_same(_identity(answer), etag):
                raise changed(self.address)
            size = self._size(answer)
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
                raise self._error("could not be read in several ranges at once", transient=True) from None
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

        url, is_remembered = self._target()
        # it compares no weak tag, has rules of its own for proxies, and names us as the referrer where it is redirected
        if (
            not self._is_for_obstore
            or (self._url in _TARGETS and not is_remembered)
            or (etag or "").startswith("W/")
            or "/." in url
            or runtime_was_lost()
            or has_proxies()
        ):
            return None
        headers = _HEADERS | _conditions(etag)
        if self._authorization is not None and _may_have_password(self._url, url):
            headers["Authorization"] = self._authorization
        options: dict[str, Any] = {
            "allow_http": url.startswith("http:"),
            "connect_timeout": f"{CONNECT_SECONDS:.0f}s",
            "read_timeout": f"{SILENCE_SECONDS:.0f}s",
            "timeout": "600s",
            "default_headers": headers,
        } | root_certificate()
        retries: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=600)}
        terms = (url, *sorted(headers.items()), options.get("root_certificate"), "obstore")
        store = client_once(terms, lambda: HTTPStore.from_url(url, client_options=options, retry_config=retries))  # type: ignore[arg-type]
        return store if store.url == url else None

    @contextlib.contextmanager
    def answer(self, span: tuple[int, int] | None, etag: str | None) -> Iterator[_Answer]:
        """Ask for a range, or for all, and look at whether it is sent; its connection is kept if it is read to the end.

        Raises
        ------
        IntegrityError
            If the server says that the object is not the one that has this etag.
        ObjectMissingError, AccessError, SourceError
        """
        headers = _HEADERS | _conditions(etag)
        if span is not None:
            headers["Range"] = f"bytes={span[0]}-{span[1] - 1}"
        answer = self._follow(headers)
        try:
            if answer.status not in (200, 206) or (span is None and answer.status == 206):
                raise self._refusal(answer)
            if span is not None:
                self._require_range(answer, *span)
            yield answer
        finally:
            finish(answer)

    def require_file(self, answer: _Answer) -> None:
        """Refuse a web page where a file is due: it is a login, or the page about the file.

        Raises
        ------
        SourceError
        """
        kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind in ("text/html", "application/xhtml+xml") and not urlsplit(self._url).path.endswith((".html", ".htm")):
            raise self._error(
                "was answered with a web page, not a file: it asks for a login, or is the page about the file; give "
                "the link of the download itself"
            )

    def chunks(self, answer: _Answer, n_bytes: int | None) -> Iterator[bytes]:
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
        except _broken_kinds() as error:
            raise broken(self.address, self._url, error, is_known=True) from None
        self._heard_at = time.monotonic()
        return chunk

    def _target(self) -> tuple[str, bool]:
        """Find where to ask, and whether that is remembered from a redirect."""
        url, until = _TARGETS.get(self._url, (self._url, 0.0))
        return (url, True) if time.monotonic() < until else (self._url, False)

    def _follow(self, headers: dict[str, str]) -> _Answer:
        """Ask, and ask where the answer points to, until one points nowhere."""
        url, is_remembered = self._target()
        asked: list[str] = []
        while True:
            asked.append(url)
            answer = self._send(url, headers)
            if answer.status in _REDIRECTS:
                finish(answer)
                next_url = self._next(url, answer)
                if next_url in asked:
                    raise self._error("leads back to itself by redirects; tell its publisher, or give another address")
                if len(asked) > _MOST_REDIRECTS:
                    raise self._error(
                        f"was redirected more than {_MOST_REDIRECTS} times; give the address it leads to in a browser"
                    )
                url = next_url
            elif is_remembered and answer.status in (400, 401, 403, 404, 410):
                # a target that was good for some minutes: the way to it is asked for again
                finish(answer)
                _TARGETS.pop(self._url, None)
                url, is_remembered, asked = self._url, False, []
            else:
                if len(asked) > 1:
                    _TARGETS[self._url] = url, time.monotonic() + _TARGET_SECONDS
                return answer

    def _next(self, url: str, answer: _Answer) -> str:
        location = answer.headers.get("Location")
        if not location:
            raise self._error(f"was answered with {answer.status} and no address to go to; tell its publisher")
        with contextlib.suppress(UnicodeError):  # http.client reads headers as Latin-1
            location = location.encode("latin-1").decode()
        try:
            target, _ = _split(urljoin(url, location.partition("#")[0]))
        except ValueError:
            raise self._error(
                "was redirected to what is not an http or https address; give the address of the file itself"
            ) from None
        if url.startswith("https:") and target.startswith("http:"):
            raise self._error(
                f"was redirected to {_shown(target)}, which is not encrypted; if you trust the network, give that "
                "address itself"
            )
        return target

    def _send(self, url: str, headers: dict[str, str]) -> _Answer:
        """Send one request, with the user's password only to the server it is for."""
        parts = urlsplit(url)
        if self._authorization is not None and _may_have_password(self._url, url):
            headers = headers | {"Authorization": self._authorization}
        server = f"{parts.scheme}://{parts.netloc}"
        if (pause := _NOT_BEFORE.get(server, 0.0) - time.monotonic()) > 0:
            time.sleep(pause)
        try:
            answer = send(url, headers)
        except _broken_kinds() as error:
            is_known = self._heard_at is not None and time.monotonic() - self._heard_at < _KNOWN_SECONDS
            raise broken(self.address, url, error, is_known=is_known) from None
        self._heard_at = time.monotonic()
        pause = _pause_asked_for(answer)
        if 0 < pause <= _LONGEST_PAUSE_SECONDS:
            _NOT_BEFORE[server] = time.monotonic() + pause
        return answer

    def _require_range(self, answer: _Answer, start: int, stop: int) -> None:
        if coding := _coding(answer):
            raise self._error(
                f"is sent compressed (Content-Encoding: {coding}), so ranges of it are not ranges of the file; "
                "download it with dmdata get and open the copy",
                whole=answer.status == 200,
                by_download=True,
            )
        if answer.status == 200:
            said = answer.headers.get("Content-Length", "")
            if start == 0 and said.isdigit() and int(said) <= stop:
                return  # whole, and no more than was asked for
            self.require_file(answer)
            raise self._error(
                "cannot be read by ranges, because its server does not answer ranges but sends the whole object; "
                "download it with dmdata get and open the copy",
                whole=True,
                by_download=True,
            )
        if answer.headers.get("Content-Type", "").lower().startswith("multipart/byteranges"):
            raise self._error(
                "was answered with several ranges (multipart/byteranges) where one was asked for; download it with "
                "dmdata get and open the copy",
                by_download=True,
            )
        found = re.fullmatch(r"\s*bytes\s+(\d+)-(\d+)/(\d+|\*)\s*", answer.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != start or not start <= int(found[2]) < stop:
            raise self._error("was answered with another range than was asked for; try again", transient=True)
        if found[3] == "*":
            raise self._error(
                "is sent without its size (Content-Range: */*), so its end is not known; download it with dmdata get "
                "and open the copy",
                by_download=True,
            )
        said = answer.headers.get("Content-Length", "")
        n_sent = int(found[2]) + 1 - start
        if n_sent != min(stop, int(found[3])) - start or (said.isdigit() and int(said) != n_sent):
            raise self._error("was answered with fewer bytes than were asked for; try again", transient=True)

    def _size(self, answer: _Answer) -> int:
        """Read the object's size from an answer that was looked at."""
        if answer.status == 200:
            return int(answer.headers["Content-Length"])
        return int(answer.headers["Content-Range"].rpartition("/")[2])

    def _body(self, answer: _Answer, n_bytes: int) -> Iterator[bytes]:
        """Hand over bytes as the connection gives them: where it breaks, nothing that arrived is lost."""
        n_missing = n_bytes
        while n_missing > 0:
            chunk = self._next_of(functools.partial(answer.read1, min(_CHUNK_BYTES, n_missing)))
            if not chunk:
                raise self._error(f"broke off {n_missing} bytes before the end of a range", transient=True)
            n_missing -= len(chunk)
            yield chunk

    def _refusal(self, answer: _Answer) -> DmdataError:
        """Say what a status other than success means."""
        status, address = answer.status, self.address
        try:
            text = answer.read(_REFUSAL_BYTES)
        except _broken_kinds():  # whatever breaks here, the status is known
            text = b""
        found = re.search(rb"<Code>(\w+)</Code>", text)
        code = found[1].decode() if found else None
        said = f"{status} {code}" if code else f"{status}"
        if status == 412:
            return changed(address, refused=True)
        if status == 416:
            return self._past_end(answer)
        if (
            status in (400, 401, 403)
            and urlsplit(self._url).query
            and (_EXPIRED.search(text) or _has_expired(self._url))
        ):
            return self._access("bad_credentials", code, f"its signed link has expired ({said}); ask for a new one")
        if status in (404, 410):
            words = "is gone for good (410); ask its publisher where it went" if status == 410 else ""
            words = words or f"was not found ({said}); check the address"
            return ObjectMissingError(f"{address} {words}", url=str(address), transient=False, refused=True)
        if status == 401:
            if self._authorization is None:
                return self._access(
                    "no_credentials",
                    code,
                    "it asks for a user and password (401); write https://USER:PASSWORD@HOST/...",
                )
            return self._access("bad_credentials", code, "the user and password given are not valid there (401)")
        if status == 403:
            if code in ("SignatureDoesNotMatch", "InvalidAccessKeyId", "AuthenticationFailed"):
                return self._access(
                    "bad_credentials", code, f"the signature in the link is not valid ({said}); copy it whole, quoted, "
                    "or ask for a new one",
                )  # fmt: skip
            return self._access("denied", code, f"the server lets nobody read it who asks like this ({said}); a login "
                                "or a signed link may be needed: ask its publisher")  # fmt: skip
        if status == 407:
            return self._error(
                "could not be asked for: the proxy wants a user and password (407); write them into HTTPS_PROXY",
                unsent=True,
            )
        if status in (400, 497) and (b"HTTPS port" in text or b"HTTPS server" in text):
            return self._error("is asked for by http on a port for https; write https://", refused=True)
        if (pause := _pause_asked_for(answer)) > _LONGEST_PAUSE_SECONDS:
            return self._error(
                f"was refused with {said}: its server wants no request for {pause:.0f} s; try again then", refused=True
            )
        if status == 429:
            return self._error("was refused with 429: too many requests", transient=True, refused=True)
        if status >= 500:
            return self._error(
                f"could not be read: its server failed ({said})", transient=status in _TRANSIENT, refused=True
            )
        return self._error(
            f"could not be read: its server answered {said}; check the address",
            transient=status in _TRANSIENT,
            refused=True,
        )

    def _past_end(self, answer: _Answer) -> SourceError:
        error = ended_short(self.address, None, transient=False)
        found = re.fullmatch(r"bytes \*/(\d+)", answer.headers.get("Content-Range", ""))
        return SourceError(error.message, **error.facts, object_bytes=int(found[1]) if found else 0)

    def _access(self, cause: str, code: str | None, words: str) -> AccessError:
        return AccessError(
            f"{self.address} was refused: {words}", url=str(self.address), cause=cause, code=code, refused=True
        )

    def _error(self, words: str, *, transient: bool = False, **facts: Any) -> SourceError:
        return SourceError(f"{self.address} {words}", url=str(self.address), transient=transient, **facts)


def _url_to_ask(address: Address) -> tuple[str, str | None]:
    """Encode a URL as far as it is not yet, and take user and password out of it, as a header."""
    shown = str(address)
    if "#" in address.url:
        raise SourceError(
            f"{shown} is followed by a fragment (#...), which is never sent; write %23 if it belongs to the name, else "
            "leave it out",
            url=shown,
            transient=False,
        )
    try:
        url, user = _split(address.url)
    except ValueError:
        raise SourceError(
            f"{shown} names no host, or a port that is not a number; write it like https://HOST/NAME.npy",
            url=shown,
            transient=False,
        ) from None
    if user is None:
        return url, None
    return url, f"Basic {base64.b64encode(unquote(user).encode()).decode()}"


def _split(url: str) -> tuple[str, str | None]:
    """Separate a URL from its user and password, and encode what may not stand in it; a ValueError if it is none."""
    found = re.fullmatch(r"(?is)(https?)://(?:([^/?#]*)@)?([^/?#@]+)([^?#]*)(\?[^#]*)?", url)
    if found is None:
        raise ValueError("not an http or https URL")
    scheme, user, server, path, query = found.groups()
    parts = urlsplit(f"//{server}")
    host = parts.hostname
    if not host or any(character.isspace() for character in server):
        raise ValueError("no host")
    _ = parts.port  # a ValueError where it is none
    if not server.isascii():
        server = host.encode("idna").decode() + (f":{parts.port}" if parts.port else "")
    return f"{scheme.lower()}://{server}{_encoded(path) or '/'}{_encoded(query or '')}", user


def _encoded(part: str) -> str:
    part = re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", part)
    return quote(part, safe="%/?:@!$&'()*+,;=-._~", errors="surrogateescape")


def _shown(url: str) -> str:
    return str(Address(url))


def _may_have_password(given: str, asked: str) -> bool:
    """Tell whether it is the server the password was given for, or the same by https."""
    one, other = urlsplit(given), urlsplit(asked)
    if one.hostname != other.hostname:
        return False
    ports = {"http": 80, "https": 443}
    one_port, other_port = one.port or ports[one.scheme], other.port or ports[other.scheme]
    return (one.scheme, one_port) == (other.scheme, other_port) or (one_port, other_port) == (80, 443)


def _conditions(etag: str | None) -> dict[str, str]:
    """Ask for the object only if it is the same; by its weak tag it never would be (RFC 9110, 13.1.1)."""
    if etag is None or etag.startswith("W/"):
        return {}
    if etag.startswith(_CHANGED_AT):
        return {"If-Unmodified-Since": etag.removeprefix(_CHANGED_AT)}
    return {"If-Match": etag}


_CHANGED_AT = "Last-Modified: "


def _identity(answer: _Answer) -> str | None:
    if etag := answer.headers.get("ETag"):
        return etag
    changed_at = answer.headers.get("Last-Modified")
    return f"{_CHANGED_AT}{changed_at}" if changed_at else None


def _is_same(one: str | None, other: str) -> bool:
    """Compare by what the tags say: a proxy on the way may make a strong one weak."""
    return one is not None and one.removeprefix("W/") == other.removeprefix("W/")


def _coding(answer: _Answer) -> str | None:
    codings = [name.strip().lower() for name in answer.headers.get("Content-Encoding", "").split(",")]
    return ", ".join(name for name in codings if name not in ("", "identity", "aws-chunked")) or None


def _pause_asked_for(answer: _Answer) -> float:
    """Read how many seconds a server that has too much to do wants to be left alone."""
    said = answer.headers.get("Retry-After", "").strip()
    if answer.status not in (429, 503) or not said:
        return 0.0
    if said.isdigit():
        return float(said)
    with contextlib.suppress(ValueError, TypeError):
        return max(parsedate_to_datetime(said).timestamp() - time.time(), 0.0)
    return 0.0


def _broken_kinds() -> tuple[type[Exception], ...]:
    from urllib3.exceptions import HTTPError  # not loaded where nothing of the web is read

    return (HTTPError, OSError)


def _has_expired(url: str) -> bool:
    """Tell by S3's and CloudFront's own parameters whether a signed link has run out."""
    query = urlsplit(url).query
    found = re.search(r"(?i)(?:^|&)X-(?:Amz|Goog)-Date=(\d{8}T\d{6})Z", query)
    lasts = re.search(r"(?i)(?:^|&)X-(?:Amz|Goog)-Expires=(\d+)", query)
    if found and lasts:
        from calendar import timegm

        return timegm(time.strptime(found[1], "%Y%m%dT%H%M%S")) + int(lasts[1]) < time.time()
    ends = re.search(r"(?:^|&)Expires=(\d+)(?:&|$)", query)
    return ends is not None and int(ends[1]) < time.time()
