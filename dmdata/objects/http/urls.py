"""URLs of the web as they are asked for: encoded as far as they are not yet, user and password apart.

A query may be the right to read: it is in no text that is shown.
"""

import base64
import re
import time
from calendar import timegm
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from dmdata.errors import SourceError
from dmdata.objects.address import Address


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked for on the web.

    Attributes
    ----------
    address : Address
        As it was given.
    url : str
        Encoded, without user and password.
    authorization : str or None
        The header that user and password make.
    """

    address: Address
    url: str
    authorization: str | None

    @classmethod
    def of(cls, address: Address) -> "Target":
        """Find what to ask for.

        Raises
        ------
        SourceError
            If the URL names no host, or has a fragment, which is never sent.
        """
        shown = str(address)
        if "#" in address.url:
            raise SourceError(
                f"{shown} is followed by a fragment (#...), which is never sent; write %23 if it belongs to the name, "
                "else leave it out",
                url=shown,
            )
        try:
            url, user = split_url(address.url)
        except ValueError:
            raise SourceError(
                f"{shown} names no host, or a port that is not a number; write it like https://HOST/NAME.npy",
                url=shown,
            ) from None
        if user is None:
            return cls(address, url, None)
        return cls(address, url, f"Basic {base64.b64encode(unquote(user).encode()).decode()}")

    def authorization_for(self, url: str) -> dict[str, str]:
        """Make the header for a request: the password goes only to the server that it was given for."""
        if self.authorization is None or not _is_same_server(self.url, url):
            return {}
        return {"Authorization": self.authorization}

    def failed(
        self,
        words: str,
        *,
        transient: bool = False,
        refused: bool = False,
        unsent: bool = False,
        whole: bool = False,
        by_download: bool = False,
    ) -> SourceError:
        """State that reading failed; `words` follow the address, for the rest see `SourceError`."""
        return SourceError(
            f"{self.address} {words}",
            url=str(self.address),
            transient=transient,
            refused=refused,
            unsent=unsent,
            whole=whole,
            by_download=by_download,
        )


def split_url(url: str) -> tuple[str, str | None]:
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


def _is_same_server(given: str, asked: str) -> bool:
    """Whether two URLs are of one server, or the second is the same by https."""
    one, other = urlsplit(given), urlsplit(asked)
    if one.hostname != other.hostname:
        return False
    ports = {"http": 80, "https": 443}
    one_port, other_port = one.port or ports[one.scheme], other.port or ports[other.scheme]
    return (one.scheme, one_port) == (other.scheme, other_port) or (one_port, other_port) == (80, 443)


def has_expired(url: str) -> bool:
    """Whether a signed link has run out, by the parameters of S3, Google and CloudFront."""
    query = urlsplit(url).query
    found = re.search(r"(?i)(?:^|&)X-(?:Amz|Goog)-Date=(\d{8}T\d{6})Z", query)
    lasts = re.search(r"(?i)(?:^|&)X-(?:Amz|Goog)-Expires=(\d+)", query)
    if found and lasts:
        return timegm(time.strptime(found[1], "%Y%m%dT%H%M%S")) + int(lasts[1]) < time.time()
    ends = re.search(r"(?:^|&)Expires=(\d+)(?:&|$)", query)
    return ends is not None and int(ends[1]) < time.time()
