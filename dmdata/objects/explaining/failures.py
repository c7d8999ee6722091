"""Errors for a server that was not reached, or whose connection broke, with the remedy.

Errors of libraries hold requests, and these the token: `without_requests` takes them out.
"""

import socket
import ssl
import traceback
from collections.abc import Iterator
from typing import Any

from dmdata.errors import SourceError
from dmdata.objects.address import Address

WORDS = {
    "dns": "the name of its server could not be found; check the network, and the spelling of the address or of "
    "AWS_ENDPOINT_URL",
    "refused": "its server refuses connections; check that it runs, and the address or AWS_ENDPOINT_URL, then "
    "try again",
    "certificate": "the certificate of its server is not trusted; where a company's proxy or an authority of your own "
    "has signed it, set AWS_CA_BUNDLE to the PEM file of that authority",
    "tls": "its server does not speak TLS there; check whether the address or AWS_ENDPOINT_URL should begin with "
    "http:// or https://, and its port",
    "proxy": "the proxy in HTTPS_PROXY or HTTP_PROXY cannot be reached or refuses to connect to the server; correct or "
    "unset it, or add the server to NO_PROXY",
    "proxy_password": "the proxy in HTTPS_PROXY or HTTP_PROXY asks for a user and a password; write them into it, as "
    "http://USER:PASSWORD@HOST:PORT",
    "unreachable": "no connection to its server could be made in time; check the network, or try again later",
    "silent": "its server accepted the connection and then did not answer; try again later",
    "broken": "the connection broke",
}
"""What is wrong with a connection, and what to do."""

TRANSIENT = {"refused", "unreachable", "silent", "broken"}
"""What may be over when it is tried again."""


def connection_error(address: Address | str, kind: str, host: str = "") -> SourceError:
    """State that a server was not reached, or how its connection failed.

    Parameters
    ----------
    address : Address or str
    host : str
        Of the server, where it is known.
    kind : {"dns", "refused", "certificate", "tls", "proxy", "proxy_password", "unreachable", "silent", "broken"}
    """
    words = WORDS[kind]
    if host:
        words = words.replace("its server", f"its server {host}", 1)
    return SourceError(
        f"{address} could not be read: {words}",
        url=str(address),
        cause=kind,
        transient=kind in TRANSIENT,
        unsent=kind not in ("silent", "broken"),
        silent=kind in ("silent", "unreachable"),
    )


def kind_of_chain(error: BaseException) -> str:
    """Find why a connection of boto3's failed, from its error and those it was made of; a key of `WORDS`."""
    import botocore.exceptions as by

    chain = list(_causes(error))
    if any(isinstance(cause, by.ProxyConnectionError) for cause in chain):
        return "proxy_password" if any("407" in str(cause) for cause in chain) else "proxy"
    if any(isinstance(cause, socket.gaierror) for cause in chain):
        return "dns"
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in chain):
        return "certificate"
    if any(isinstance(cause, ConnectionRefusedError) for cause in chain):
        return "refused"
    if any(isinstance(cause, by.ConnectTimeoutError) for cause in chain):
        return "unreachable"
    if any(isinstance(cause, by.ReadTimeoutError) or type(cause).__name__ == "ReadTimeoutError" for cause in chain):
        return "silent"
    if any(isinstance(cause, by.SSLError | ssl.SSLError) for cause in chain):
        return "tls"
    return "broken"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Walk from an error through those it was made of, whichever way it holds them."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        found = waiting.pop()
        if not isinstance(found, BaseException) or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        waiting += [found.__cause__, found.__context__, getattr(found, "reason", None)]
        kwargs: Any = getattr(found, "kwargs", None)
        waiting += [kwargs.get("error")] if isinstance(kwargs, dict) else []
        waiting += [part for part in found.args if isinstance(part, BaseException)]


def without_requests(error: Exception) -> None:
    """Take requests out of an error and what it was made of: they hold the token, and Dask pickles contexts along.

    The frames that are over let go of theirs, too: one that stumbled over an answer holds an open connection.
    """
    for cause in _causes(error):
        traceback.clear_frames(cause.__traceback__)
        for name in ("request", "response"):
            if getattr(cause, name, None) is not None:
                vars(cause)[name] = None
