"""Web servers as they are met: static files by RFC 9110, and each of the ways in which some differ.

`WebServer` answers GET alone, exactly for the targets it was given (percent-encoding and query included), and keeps
what it was asked. A `Page` says how one target is answered.
"""

import contextlib
import gzip
import re
import ssl
import subprocess
import threading
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """How one target is answered; without anything, as a static file."""

    content: bytes = b""
    etag: str | None = '"abc"'
    modified: str | None = None
    status: int | None = None  # answer with this, whatever was asked
    headers: dict[str, str] = field(default_factory=dict)  # in addition, or in place of the usual ones
    ranges: bool = True
    coded: bool = False  # send gzip, whatever the client accepts
    chunked: bool = False  # without Content-Length
    shift: int = 0  # send a range that begins so many bytes further
    cut_after: int | None = None  # close the connection after so many body bytes
    silent: bool = False  # read the request, and never answer
    password: str | None = None  # the Authorization header that is asked for


@dataclass(frozen=True, slots=True)
class Asked:
    """One request."""

    method: str
    target: str
    headers: Message


class WebServer:
    """A server on loopback, with TLS where it gets a context; `pages` by target, as it stands in the request line."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.pages: dict[str, Page] = {}
        self.asked: list[Asked] = []
        self.ending = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.web = self
        if context is not None:
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._scheme = "https" if context else "http"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def host(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self._server.server_port}"

    @property
    def url(self) -> str:
        """Scheme, host and port."""
        return f"{self._scheme}://{self.host}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ending.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    web: WebServer

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients break off on purpose here."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = 20
    disable_nagle_algorithm = True

    def log_message(self, *line: object) -> None:
        """Keep the tests quiet; `asked` has it all."""

    def do_HEAD(self) -> None:
        web = self.server.web
        web.asked.append(Asked(self.command, self.path, self.headers))
        self._send(403, {"Content-Length": "0"}, b"")

    def do_GET(self) -> None:
        web = self.server.web
        target = self.requestline.split()[1]  # `path` has one slash less where it begins with two
        web.asked.append(Asked(self.command, target, self.headers))
        page = web.pages.get(target)
        if page is None:
            self._send(404, {}, b"nothing here")
        elif page.silent:
            web.ending.wait(60)
            self.close_connection = True
        elif page.password is not None and self.headers["Authorization"] != page.password:
            self._send(401, {"WWW-Authenticate": "Basic"}, b"who are you?")
        elif page.status is not None:
            self._send(page.status, page.headers, page.content)
        else:
            self._send_file(page)

    def _send_file(self, page: Page) -> None:
        headers = {"Content-Type": "application/octet-stream"}
        headers |= {"ETag": page.etag} if page.etag else {}
        headers |= {"Last-Modified": page.modified} if page.modified else {}
        asked_for, since = self.headers["If-Match"], self.headers["If-Unmodified-Since"]
        # a weak tag matches nothing (RFC 9110, 13.1.1)
        if (asked_for and (asked_for != page.etag or asked_for.startswith("W/"))) or (since and since != page.modified):
            self._send(412, {}, b"")
            return
        content, size = page.content, len(page.content)
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        if page.coded:
            content, headers["Content-Encoding"] = gzip.compress(content), "gzip"
        if not page.ranges or not found:
            self._send(200, headers | page.headers, content, page)
            return
        start, stop = int(found[1]) + page.shift, min(int(found[2]) + 1 + page.shift, size)
        if start >= size:
            self._send(416, {"Content-Range": f"bytes */{size}"}, b"")
            return
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._send(206, headers | page.headers, content[start:stop], page)

    def _send(self, status: int, headers: dict[str, str], body: bytes, page: Page | None = None) -> None:
        is_chunked = page is not None and page.chunked
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if is_chunked:
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        elif "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if page is not None and page.cut_after is not None:
            body, self.close_connection = body[: page.cut_after], True
        with contextlib.suppress(OSError):
            self.wfile.write(body)


class Authority:
    """A throw-away certificate authority, made by openssl, and a server's certificate for 127.0.0.1."""

    def __init__(self, folder: Path) -> None:
        self.bundle = folder / "authority.pem"
        key, leaf = folder / "key.pem", folder / "leaf.pem"
        _openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", key)
        # newer Pythons look at all that RFC 5280 asks for, and rustls takes no authority for a server
        of_authority = ("basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign")
        of_server = ("basicConstraints=critical,CA:FALSE", "subjectAltName=IP:127.0.0.1")
        of_server += ("keyUsage=critical,digitalSignature", "authorityKeyIdentifier=keyid")
        _openssl("req", "-x509", "-key", key, "-out", self.bundle, "-subj", "/CN=throw-away", *_added(of_authority))
        signing = ("-CA", self.bundle, "-CAkey", key, *_added(of_server))
        _openssl("req", "-x509", "-key", key, "-out", leaf, "-subj", "/CN=127.0.0.1", *signing)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(leaf, key)


def _added(extensions: tuple[str, ...]) -> list[str]:
    return [word for extension in extensions for word in ("-addext", extension)]


def _openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
