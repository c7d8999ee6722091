"""What an answer of a web server is: the range that was asked for, something else, or a refusal.

An object's identity is its ETag, weak or strong, else the time it was changed at, else there is none.
"""

import contextlib
import re
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import urlsplit

from dmdata.errors import AccessError, DmdataError, ObjectMissingError
from dmdata.objects.address import changed, past_end
from dmdata.objects.http.urls import Target, has_expired

if TYPE_CHECKING:
    import urllib3

LONGEST_PAUSE_SECONDS = 20.0
"""A server that asks for a longer pause is not waited for."""

Answer: TypeAlias = "urllib3.BaseHTTPResponse"

# of an error's text: enough for what S3, Google and Azure write
_REFUSAL_BYTES = 4096
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_EXPIRED = re.compile(
    rb"request has expired|token has expired|ExpiredToken|signature not valid in the specified time", re.I
)
_CHANGED_AT = "Last-Modified: "


def require_file(target: Target, answer: Answer) -> None:
    """Refuse a web page where a file is due: it is a login, or the page about the file.

    Raises
    ------
    SourceError
    """
    kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml") and not urlsplit(target.url).path.endswith((".html", ".htm")):
        raise target.failed(
            "was answered with a web page, not a file: it asks for a login, or is the page about the file; give "
            "the link of the download itself"
        )


def require_range(target: Target, answer: Answer, start: int, stop: int) -> None:
    """Refuse an answer that is not the range that was asked for, or may not be.

    Raises
    ------
    SourceError
        `by_download` where the object can only be had whole.
    """
    if coding := coding_of(answer):
        raise target.failed(
            f"is sent compressed (Content-Encoding: {coding}), so ranges of it are not ranges of the file; "
            "download it (dmdata get URL) and open the copy",
            whole=answer.status == 200,
            by_download=True,
        )
    if answer.status == 200:
        said = answer.headers.get("Content-Length", "")
        if start == 0 and said.isdigit() and int(said) <= stop:
            return  # whole, and no more than was asked for
        require_file(target, answer)
        raise target.failed(
            "cannot be read by ranges, because its server does not answer ranges but sends the whole object; "
            "download it (dmdata get URL) and open the copy",
            whole=True,
            by_download=True,
        )
    if answer.headers.get("Content-Type", "").lower().startswith("multipart/byteranges"):
        raise target.failed(
            "was answered with several ranges (multipart/byteranges) where one was asked for; download it "
            "(dmdata get URL) and open the copy",
            by_download=True,
        )
    found = re.fullmatch(r"\s*bytes\s+(\d+)-(\d+)/(\d+|\*)\s*", answer.headers.get("Content-Range", ""))
    if found is None or int(found[1]) != start or not start <= int(found[2]) < stop:
        raise target.failed("was answered with another range than was asked for; try again", transient=True)
    if found[3] == "*":
        raise target.failed(
            "is sent without its size (Content-Range: */*), so its end is not known; download it (dmdata get URL) "
            "and open the copy",
            by_download=True,
        )
    said = answer.headers.get("Content-Length", "")
    n_sent = int(found[2]) + 1 - start
    if n_sent != min(stop, int(found[3])) - start or (said.isdigit() and int(said) != n_sent):
        raise target.failed("was answered with fewer bytes than were asked for; try again", transient=True)


def object_size(answer: Answer) -> int:
    """Read the object's size from an answer that was looked at."""
    if answer.status == 200:
        return int(answer.headers["Content-Length"])
    return int(answer.headers["Content-Range"].rpartition("/")[2])


def conditions(etag: str | None) -> dict[str, str]:
    """Ask for the object only if it is the same; by its weak tag it never would be (RFC 9110, 13.1.1)."""
    if etag is None or etag.startswith("W/"):
        return {}
    if etag.startswith(_CHANGED_AT):
        return {"If-Unmodified-Since": etag.removeprefix(_CHANGED_AT)}
    return {"If-Match": etag}


def identity(answer: Answer) -> str | None:
    """Read what identifies the object as it is now; None where the server sends nothing that does."""
    if etag := answer.headers.get("ETag"):
        return etag
    changed_at = answer.headers.get("Last-Modified")
    return f"{_CHANGED_AT}{changed_at}" if changed_at else None


def is_same(one: str | None, other: str) -> bool:
    """Compare by what the tags say: a proxy on the way may make a strong one weak."""
    return one is not None and one.removeprefix("W/") == other.removeprefix("W/")


def coding_of(answer: Answer) -> str | None:
    """Read how the bytes are encoded; None where they are as they were saved."""
    codings = [name.strip().lower() for name in answer.headers.get("Content-Encoding", "").split(",")]
    return ", ".join(name for name in codings if name not in ("", "identity", "aws-chunked")) or None


def pause_asked_for(answer: Answer) -> float:
    """Read how many seconds a server that has too much to do wants to be left alone."""
    said = answer.headers.get("Retry-After", "").strip()
    if answer.status not in (429, 503) or not said:
        return 0.0
    if said.isdigit():
        return float(said)
    with contextlib.suppress(ValueError, TypeError):
        return max(parsedate_to_datetime(said).timestamp() - time.time(), 0.0)
    return 0.0


def broken_kinds() -> tuple[type[Exception], ...]:
    """Collect the kinds of errors by which a connection breaks."""
    from urllib3.exceptions import HTTPError  # not loaded where nothing of the web is read

    return (HTTPError, OSError)


def refusal(target: Target, answer: Answer) -> DmdataError:
    """State what a status other than success means."""
    status, address = answer.status, target.address
    try:
        text = answer.read(_REFUSAL_BYTES)
    except broken_kinds():  # whatever breaks here, the status is known
        text = b""
    found = re.search(rb"<Code>(\w+)</Code>", text)
    code = found[1].decode() if found else None
    said = f"{status} {code}" if code else f"{status}"
    if status == 412:
        return changed(address, refused=True)
    if status == 416:
        size = re.fullmatch(r"bytes \*/(\d+)", answer.headers.get("Content-Range", ""))
        return past_end(address, int(size[1]) if size else 0)
    if status in (400, 401, 403) and urlsplit(target.url).query and (_EXPIRED.search(text) or has_expired(target.url)):
        return _access(target, "bad_credentials", code, f"its signed link has expired ({said}); ask for a new one")
    if status in (404, 410):
        words = "is gone for good (410); ask its publisher where it went" if status == 410 else ""
        words = words or f"was not found ({said}); check the address"
        return ObjectMissingError(f"{address} {words}", url=str(address), refused=True)
    if status == 401:
        if target.authorization is None:
            return _access(
                target,
                "no_credentials",
                code,
                "it asks for a user and password (401); write https://USER:PASSWORD@HOST/...",
            )
        return _access(target, "bad_credentials", code, "the user and password given are not valid there (401)")
    if status == 403:
        if code in ("SignatureDoesNotMatch", "InvalidAccessKeyId", "AuthenticationFailed"):
            return _access(target,
                "bad_credentials", code, f"the signature in the link is not valid ({said}); copy it whole, quoted, "
                "or ask for a new one",
            )  # fmt: skip
        return _access(target, "denied", code, f"the server refuses this request ({said}); a login "
                            "or a signed link may be needed: ask its publisher")  # fmt: skip
    if status == 407:
        return target.failed(
            "could not be asked for: the proxy wants a user and password (407); write them into HTTPS_PROXY",
            unsent=True,
        )
    if status in (400, 497) and (b"HTTPS port" in text or b"HTTPS server" in text):
        return target.failed("is asked for by http on a port for https; write https://", refused=True)
    if (pause := pause_asked_for(answer)) > LONGEST_PAUSE_SECONDS:
        return target.failed(
            f"was refused with {said}: its server asks not to be contacted for {pause:.0f} s; try again then",
            refused=True,
        )
    if status == 429:
        return target.failed("was refused with 429: too many requests", transient=True, refused=True)
    if status >= 500:
        return target.failed(
            f"could not be read: its server failed ({said})", transient=status in _TRANSIENT, refused=True
        )
    return target.failed(
        f"could not be read: its server answered {said}; check the address",
        transient=status in _TRANSIENT,
        refused=True,
    )


def _access(target: Target, cause: str, code: str | None, words: str) -> AccessError:
    return AccessError(
        f"{target.address} was refused: {words}", url=str(target.address), cause=cause, code=code, refused=True
    )
