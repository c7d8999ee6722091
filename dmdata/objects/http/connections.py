"""Connections to web servers: urllib3's pools by proxy and trust, and errors for answers that did not come.

Proxies are found by the rules of the standard library, which are botocore's, too (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY,
NO_PROXY). Trusted is whom this machine trusts (SSL_CERT_FILE), and whom AWS_CA_BUNDLE, REQUESTS_CA_BUNDLE or
CURL_CA_BUNDLE names. urllib3 quotes URLs in its errors and in its log, and a query may be a secret: the errors are
neither quoted nor chained, and the log does not get it.
"""

import contextlib
import logging
import os
import re
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from dmdata.errors import SourceError
from dmdata.objects.address import Address

if TYPE_CHECKING:
    import urllib3

CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 9.0
"""Of a server that accepted a connection: together with what it takes to connect, less than 15 s."""

_MOST_CONNECTIONS = 64
# as much is sooner read than a connection made
_DRAINED_BYTES = 16 << 10
_BUNDLES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_LOCK = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)
# by process and environment: a forked process must not write into its parent's connections
_MANAGERS: dict[tuple[object, ...], "urllib3.PoolManager"] = {}
_ASKING = threading.local()


def send(url: str, headers: dict[str, str]) -> "urllib3.BaseHTTPResponse":
    """Send one GET, and return its answer before its body; follows no redirect and tries nothing again.

    Raises
    ------
    urllib3.exceptions.HTTPError, OSError
        For `broken` to explain.
    """
    import urllib3

    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    with _unlogged():
        manager, is_proxied = _manager(url)
        pool = manager.connection_from_host(parts.hostname, parts.port, parts.scheme)
        return pool.urlopen(
            "GET",
            f"{parts.scheme}://{parts.netloc}{target}" if is_proxied and parts.scheme == "http" else target,
            headers=headers,
            retries=False,
            redirect=False,
            assert_same_host=False,
            timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=SILENCE_SECONDS),
            preload_content=False,
            decode_content=False,
        )


def finish(answer: "urllib3.BaseHTTPResponse") -> None:
    """Keep the connection of an answer that was read to its end, or nearly; more is not waited for."""
    n_left = answer.length_remaining
    if n_left is not None and n_left <= _DRAINED_BYTES:
        answer.drain_conn()
    else:
        answer.close()
    answer.release_conn()


def broken(address: Address, url: str, error: Exception, *, is_known: bool) -> SourceError:
    """Explain why no answer came from a server, or why it broke off.

    Parameters
    ----------
    address : Address
        What was asked for.
    url : str
        Where it was asked for.
    error : Exception
        As `send` or the reading of a body raised it.
    is_known : bool
        Whether the server was heard of a moment ago, so that it may be worth another try.
    """
    import urllib3.exceptions as kinds

    host = urlsplit(url).netloc
    if isinstance(error, kinds.SSLError | ssl.SSLError):
        words, is_known = _tls_words(host, repr(error)), False
    elif isinstance(error, kinds.ProxySchemeUnknown | kinds.ProxySchemeUnsupported | kinds.LocationValueError):
        words, is_known = (
            "the proxy in the environment is not an http or https one; set HTTPS_PROXY to http://HOST:PORT",
            False,
        )
    elif isinstance(error, kinds.ProxyError) and isinstance(error.original_error, kinds.SSLError | ssl.SSLError):
        words, is_known = _tls_words(f"the proxy {_proxy_shown(url)}", repr(error)), False
    elif isinstance(error, kinds.ProxyError):
        words = _proxy_words(host, _proxy_shown(url), str(error.original_error))
    elif isinstance(error, kinds.NameResolutionError):
        words = f"no address is known for the host {host}; check its name, and the network"
    elif isinstance(error, kinds.NewConnectionError):
        words = f"{host} cannot be reached or refuses connections; check host and port, or try again later"
    elif isinstance(error, kinds.ConnectTimeoutError):
        words = (
            f"no connection to {host} within {CONNECT_SECONDS:.0f} s; check the network and proxy, or try again later"
        )
    else:
        return _broken_after_sending(address, host, error, is_known=is_known)
    return SourceError(f"{address} could not be asked for: {words}", url=str(address), transient=is_known, unsent=True)


def _broken_after_sending(address: Address, host: str, error: Exception, *, is_known: bool) -> SourceError:
    import urllib3.exceptions as kinds

    text = repr(error)
    if isinstance(error, kinds.ReadTimeoutError | TimeoutError):
        words = f"{host} accepted the connection and then was silent for {SILENCE_SECONDS:.0f} s; try again later"
        is_transient = is_known
    elif "\\x15\\x03" in text:
        words, is_transient = f"it is asked for by http, and {host} speaks https there; write https://", False
    elif "BadStatusLine" in text or "LineTooLong" in text or "UnknownProtocol" in text:
        words, is_transient = f"what {host} speaks there is not HTTP; check the port", False
    elif "RemoteDisconnected" in text and not is_known:
        words, is_transient = (
            f"{host} closed the connection without an answer; does it speak https there? Then write https://",
            True,
        )
    else:
        words, is_transient = "the connection broke", True
    return SourceError(f"{address} could not be read: {words}", url=str(address), transient=is_transient)


def _tls_words(host: str, text: str) -> str:
    found = re.search(r"certificate verify failed: ([^(\"']+)", text)
    if found or "doesn't match" in text:
        reason = found[1].strip() if found else "it is for another host"
        return (
            f"the certificate of {host} is not trusted ({reason}); if an authority of your own signed it, name its "
            "file in AWS_CA_BUNDLE or SSL_CERT_FILE"
        )
    if any(sign in text for sign in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH")):
        return f"{host} speaks no TLS there; write http://, or check the port"
    return f"no TLS connection to {host} could be made; check the port, and what stands between"


def _proxy_words(host: str, proxy: str, said: str) -> str:
    if "407" in said:
        return f"the proxy {proxy} asks for a user and password (407); write them into HTTPS_PROXY"
    if found := re.search(r"Tunnel connection failed: (\d{3})", said):
        return (
            f"the proxy {proxy} does not let {host} through ({found[1]}); name the host in NO_PROXY, or ask who runs it"
        )
    return f"the proxy {proxy} cannot be reached; check HTTPS_PROXY, HTTP_PROXY and NO_PROXY"


def root_certificate() -> dict[str, str]:
    """Write for obstore, which trusts whom this machine trusts, whom the bundles in the environment name."""
    texts: list[str] = []
    for path in filter(None, (os.environ.get(name) for name in _BUNDLES)):
        with contextlib.suppress(OSError):  # a folder, or nothing: said where a certificate is refused
            texts.append(Path(path).read_text(errors="replace"))
    return {"root_certificate": "\n".join(texts)} if texts else {}


def has_proxies() -> bool:
    """Whether a proxy is named for anything."""
    return bool(getproxies().keys() - {"no"})


def _proxy_for(url: str) -> str | None:
    """Find the proxy for a URL, by the rules of the standard library, which are botocore's, too."""
    parts = urlsplit(url)
    if not parts.netloc or proxy_bypass(parts.netloc):
        return None
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def _proxy_shown(url: str) -> str:
    proxy = urlsplit(_proxy_for(url) or "")
    return proxy.netloc.rpartition("@")[2] or "set in the environment"


def _manager(url: str) -> "tuple[urllib3.PoolManager, bool]":
    """Find the pools of connections for a URL, made once for a process, proxy and trust; and whether by a proxy."""
    import urllib3

    proxy, is_encrypted = _proxy_for(url), url.startswith("https:") or (_proxy_for(url) or "").startswith("https:")
    trust = tuple(os.environ.get(name) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", *_BUNDLES)) if is_encrypted else ()
    known = (os.getpid(), proxy, is_encrypted, trust)
    with _LOCK:
        if known not in _MANAGERS:
            options: dict[str, Any] = {"maxsize": _MOST_CONNECTIONS, "num_pools": 32}
            if is_encrypted:
                options["ssl_context"] = _trust()
            if proxy is None:
                _MANAGERS[known] = urllib3.PoolManager(**options)
            else:
                parts = urlsplit(proxy)
                if parts.username:
                    user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
                    options["proxy_headers"] = urllib3.make_headers(proxy_basic_auth=user)
                options["proxy_ssl_context"] = options.get("ssl_context")
                bare = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
                _MANAGERS[known] = urllib3.ProxyManager(bare, **options)
        return _MANAGERS[known], proxy is not None


def _trust() -> ssl.SSLContext:
    """Trust whom this machine trusts (SSL_CERT_FILE), and whom the bundles in the environment name in addition."""
    context = ssl.create_default_context()
    for path in filter(None, (os.environ.get(name) for name in _BUNDLES)):
        if os.path.isdir(path):
            context.load_verify_locations(capath=path)
        else:
            with contextlib.suppress(OSError):  # said by the refusal that follows, which names the variable
                context.load_verify_locations(cafile=path)
    if not context.cert_store_stats()["x509_ca"] and not os.environ.get("SSL_CERT_FILE"):
        # a Python that brings no authorities: those that come with botocore
        from botocore.httpsession import where

        context.load_verify_locations(cafile=where())
    return context


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Keep the queries of our requests out of urllib3's log, and leave the log of others' as it is."""
    logger = logging.getLogger("urllib3.connectionpool")
    if _without_query not in logger.filters:
        logger.addFilter(_without_query)
    _ASKING.now = True
    try:
        yield
    finally:
        _ASKING.now = False


def _without_query(record: logging.LogRecord) -> bool:
    if getattr(_ASKING, "now", False) and isinstance(record.args, tuple):
        record.args = tuple(re.sub(r"\?\S*", "?...", str(one)) if "?" in str(one) else one for one in record.args)
    return True
