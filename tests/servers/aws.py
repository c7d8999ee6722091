"""AWS played on loopback: a proxy behind which Amazon's host names answer as Amazon does, with no endpoint set.

Clients are led there by ``HTTPS_PROXY`` and made to trust it by ``AWS_CA_BUNDLE`` and ``SSL_CERT_FILE``. The proxy
answers CONNECT for the hosts of S3, STS and single sign-on in a few regions, ends the TLS with certificates that cover
what AWS's cover, and answers what is asked inside. It promises that

- signatures, session tokens, clocks and regions are checked as AWS checks them, and refusals have AWS's codes;
- requester pays is enforced, and each answer that is charged is in the bill of its bucket;
- each request is in the log before the client has all of its answer, and no body byte leaves that the log lacks;
- leaving the ``with`` block ends every connection and thread.
"""

import base64
import contextlib
import re
import secrets
import socket
import socketserver
import ssl
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

from servers.aws_calls import Answer, Call, Key, Keys, Refusal, error_document
from servers.aws_certificates import Authority
from servers.aws_identity import Identity, sts_error
from servers.aws_s3 import S3, Bucket
from servers.loopback import BUCKET, Fault

REGIONS = ("us-east-1", "us-west-2", "eu-central-1", "ap-northeast-1")
PUBLISHER, READER = "111111111111", "222222222222"
"""Accounts: who owns the release, and the stranger who reads it and pays."""

_HOSTS = re.compile(
    rf"(?:.+\.)?s3(?:-fips|-accelerate)?(?:\.dualstack)?(?:\.(?:{'|'.join(REGIONS)}))?\.amazonaws\.com|sts\.amazonaws\.com|"
    rf"(?:portal\.sso|oidc|sts)\.(?:{'|'.join(REGIONS)})\.amazonaws\.com"
)
_USUAL_CODES = {400: "InvalidRequest", 403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError", 503: "SlowDown"}
_STEP = 1 << 16


@dataclass(slots=True)
class Request:
    """One line of the log; what `PlayedAws.log` returns are copies."""

    method: str
    host: str
    path: str  # as sent, with the query
    bucket: str
    key: str
    range: str | None
    payer: str | None  # the x-amz-request-payer header as sent
    connection: int  # the client's port
    status: int = 0
    code: str = ""  # of the error document
    n_bytes: int = 0
    charged: bool = False
    key_id: str | None = None  # whose valid signature it has

    @property
    def is_by_host(self) -> bool:
        """Whether the bucket was named by the host."""
        return self.host.startswith(f"{self.bucket}.")


@dataclass(frozen=True, slots=True)
class Tunnel:
    """One request to the proxy: for a connection, or to ask for something itself."""

    host: str
    outcome: str  # "open", "not trusted", "no such host", "password needed"


@dataclass(frozen=True, slots=True)
class Bill:
    """What an account is charged for a bucket."""

    n_requests: int = 0
    n_bytes: int = 0


class PlayedAws:
    """AWS; use it as a context manager. `s3`, `keys` and `identity` are its services.

    Two keys are there: `owner` of the release's account, and `reader`, of a stranger who pays. Of the buckets
    `release` charges readers, and `own` is the reader's.

    Parameters
    ----------
    authority : Authority
        Its certificates.
    proxy_password : str or None
        Ask for this password of the user ``somebody`` before any tunnel is opened.
    """

    def __init__(self, authority: Authority, *, proxy_password: str | None = None) -> None:
        self.authority = authority
        self.proxy_password = proxy_password
        self.keys = Keys()
        self.s3 = S3(self.keys)
        self.identity = Identity(self.keys, READER)
        self.owner: Key = self.keys.issue(PUBLISHER)
        self.reader: Key = self.keys.issue(READER)
        self.release = self.make(BUCKET, account=PUBLISHER, requester_pays=True)
        self.own = self.make("readers-own", account=READER)
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._log: list[Request] = []
        self._tunnels: list[Tunnel] = []
        self._rules: list[_Rule] = []
        self._http = _Proxy(self)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), name="played-aws")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        self._http.shutdown()
        self._thread.join()
        self._http.hang_up()
        self._http.server_close()  # joins the threads of all connections
        if self._http.defects and kind is None:
            raise self._http.defects[0]

    def make(self, name: str, *, account: str = PUBLISHER, region: str = "us-east-1", **terms: bool) -> Bucket:
        """Make a bucket; `terms` are attributes of `Bucket`."""
        return self.s3.make(Bucket(name, region, account, **terms))

    @property
    def proxy_url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    @property
    def env(self) -> dict[str, str]:
        """The variables that lead clients there, as the stranger who pays."""
        proxies = dict.fromkeys(("HTTPS_PROXY", "https_proxy"), self.proxy_url)
        trust = dict.fromkeys(("AWS_CA_BUNDLE", "SSL_CERT_FILE"), self.authority.bundle)
        return proxies | trust | self.reader.env

    def inject(
        self,
        fault: Fault,
        *,
        when: Callable[[Request], bool] = lambda request: request.method == "GET" and bool(request.key),
        after: int = 0,
        times: float = 1,
    ) -> None:
        """Let matching requests fail; see `LoopbackS3.inject`. Some kinds of fault are not played here."""
        played = {"status", "code", "drop", "reset_after", "end_after", "stall_seconds"}
        if others := [name for name in Fault.__slots__ if name not in played and getattr(fault, name)]:
            raise ValueError(f"{others[0]} is not played here; use LoopbackS3")
        with self._lock:
            self._rules.append(_Rule(fault, when, after, times))

    def clear_faults(self) -> None:
        """Let all go well again."""
        with self._lock:
            self._rules.clear()

    @property
    def log(self) -> tuple[Request, ...]:
        """All requests inside tunnels since the start or `reset_log`, in the order they came."""
        with self._lock:
            return tuple(replace(request) for request in self._log)

    @property
    def tunnels(self) -> tuple[Tunnel, ...]:
        """What the proxy was asked for, in order."""
        with self._lock:
            return tuple(self._tunnels)

    def reset_log(self) -> None:
        """Start to count again; call it while nothing is under way."""
        with self._lock:
            self._log.clear()
            self._tunnels.clear()

    def bill(self, bucket: Bucket) -> Bill:
        """Add up what readers of a bucket are charged."""
        charged = [request for request in self.log if request.charged and request.bucket == bucket.name]
        return Bill(len(charged), sum(request.n_bytes for request in charged))

    # What follows is for the connections' threads.

    def fault_for(self, request: Request) -> Fault:
        with self._lock:
            for rule in self._rules:
                if not rule.when(request):
                    continue
                if rule.after:
                    rule.after -= 1
                elif rule.times:
                    rule.times -= 1
                    return rule.fault
        return Fault()

    def begin(self, request: Request) -> None:
        with self._lock:
            self._log.append(request)

    def count(self, request: Request, n_bytes: int) -> None:
        with self._lock:
            request.n_bytes += n_bytes

    def note(self, tunnel: Tunnel) -> None:
        with self._lock:
            self._tunnels.append(tunnel)

    def answer(self, call: Call, request: Request) -> Answer:
        """Answer a call; fills in what the log says of it."""
        address = self.s3.address(call)
        if address is None:
            try:
                answer = self.identity.answer(call)
            except Refusal as refusal:
                request.code = refusal.code
                return sts_error(refusal)
            assert answer is not None, f"no service is at {call.host}"
            return answer
        answer, signer = self.s3.answer(call, *address)
        request.key_id = signer.key_id if signer else None
        return answer


@dataclass(slots=True)
class _Rule:
    fault: Fault
    when: Callable[[Request], bool]
    after: int
    times: float


class _Proxy(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close() joins them
    request_queue_size = 128

    def __init__(self, aws: PlayedAws) -> None:
        self.aws = aws
        self.defects: list[BaseException] = []
        self._connections: set[socket.socket] = set()
        self._connections_lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks the name service
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def process_request(self, request: socket.socket, client_address: tuple[str, int]) -> None:  # type: ignore[override]
        self.hold(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        self.let_go(request)
        with contextlib.suppress(OSError):  # its TLS has taken it over
            super().shutdown_request(request)

    def hold(self, connection: socket.socket) -> None:
        with self._connections_lock:
            self._connections.add(connection)
            if self.aws.stopping.is_set():
                self._end(connection)

    def let_go(self, connection: socket.socket) -> None:
        with self._connections_lock:
            self._connections.discard(connection)

    def hang_up(self) -> None:
        """Wake every thread that waits for a client."""
        with self._connections_lock:
            for connection in self._connections:
                self._end(connection)

    @staticmethod
    def _end(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        if isinstance(error := sys.exception(), Exception) and not isinstance(error, OSError):
            self.defects.append(error)


class _Handler(BaseHTTPRequestHandler):
    server: _Proxy
    protocol_version = "HTTP/1.1"
    server_version = "AmazonS3"
    sys_version = ""
    disable_nagle_algorithm = True
    _host: str | None = None  # of the tunnel that this connection has become

    def do_CONNECT(self) -> None:
        aws, host = self.server.aws, self.path.rpartition(":")[0].lower()
        if not self._may_pass(host):
            return
        if not _HOSTS.fullmatch(host):
            aws.note(Tunnel(host, "no such host"))
            self.send_error(502, "Bad Gateway", f"the name {host} does not resolve")
            return
        self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        context = aws.authority.context(host)
        plain = self.connection
        try:
            plain.getpeername()
        except OSError:  # hung up already: what wraps such a socket may raise, and leave it open
            self.close_connection = True
            return
        self.connection = context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        self.server.hold(self.connection)
        self.server.let_go(plain)
        self.close_connection = True
        try:
            self.connection.do_handshake()
        except OSError as error:
            told = isinstance(error, ssl.SSLError) and "ALERT" in str(error).upper()
            aws.note(Tunnel(host, "not trusted" if told else "hung up"))
            return
        aws.note(Tunnel(host, "open"))
        self._host = host
        self.rfile.close()
        self.rfile = self.connection.makefile("rb", -1)
        self.wfile = socketserver._SocketWriter(self.connection)  # type: ignore[assignment]
        self.close_connection = False

    def finish(self) -> None:
        try:
            super().finish()
        finally:
            if isinstance(self.connection, ssl.SSLSocket):
                self.server.let_go(self.connection)
                self.connection.close()

    def do_GET(self) -> None:
        body = self._body()
        if self._host is None:
            host = self.headers.get("Host", "")
            if self._may_pass(host):
                self.server.aws.note(Tunnel(host, "no such host"))
                self.send_error(502, "Bad Gateway", "plain HTTP leads nowhere from here")
            return
        # as sent: http.server takes slashes away that belong to a key
        raw_path, _, raw_query = self.requestline.split(" ")[1].partition("?")
        host = self.headers.get("Host", "").lower().removesuffix(":443")
        call = Call(self.command, host, raw_path, raw_query, self.headers, body)
        _, key, _ = where = self.server.aws.s3.address(call) or ("", "", None)
        request = Request(
            self.command,
            host,
            raw_path + (f"?{raw_query}" if raw_query else ""),
            where[0],
            key,
            self.headers.get("Range"),
            self.headers.get("x-amz-request-payer"),
            self.client_address[1],
        )
        self._serve(call, request)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815 - names that http.server calls

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's own name
        """Keep stderr quiet: the log is `PlayedAws.log`."""

    def _may_pass(self, host: str) -> bool:
        aws = self.server.aws
        if aws.proxy_password is None:
            return True
        wanted = base64.b64encode(f"somebody:{aws.proxy_password}".encode()).decode()
        if self.headers.get("Proxy-Authorization") == f"Basic {wanted}":
            return True
        aws.note(Tunnel(host, "password needed"))
        self.send_response(407, "Proxy Authentication Required")
        self.send_header("Proxy-Authenticate", 'Basic realm="proxy"')
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _serve(self, call: Call, request: Request) -> None:
        aws = self.server.aws
        fault = aws.fault_for(request)
        aws.stopping.wait(fault.stall_seconds)
        if fault.drop:
            aws.begin(request)
            self._reset()
            return
        request_id = secrets.token_hex(8).upper()
        try:
            if call.host != self._host:
                raise Refusal(421, "MisdirectedRequest", f"this connection is to {self._host}, not to {call.host}")
            if fault.status is not None:
                code = fault.code or _USUAL_CODES[fault.status]
                raise Refusal(fault.status, code, "a fault of the test")
            answer = aws.answer(call, request)
        except Refusal as refusal:
            request.code = refusal.code
            headers = {"Content-Type": "application/xml", **refusal.headers}
            answer = Answer(refusal.status, headers, error_document(refusal, request_id))
        request.status, request.charged = answer.status, answer.charged
        aws.begin(request)
        try:
            self._send(request, answer, fault, request_id)
        except OSError:  # the client hung up
            self.close_connection = True

    def _send(self, request: Request, answer: Answer, fault: Fault, request_id: str) -> None:
        self.send_response(answer.status)
        headers = {"x-amz-request-id": request_id, "x-amz-id-2": "played+on/loopback="} | answer.headers
        for name, value in (headers | {"Content-Length": str(len(answer.body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD" or answer.status == 204:
            return
        cuts = [n for n in (fault.reset_after, fault.end_after) if n is not None]
        body = memoryview(answer.body)[: min(cuts) if cuts else None]
        for at in range(0, len(body), _STEP):
            piece = body[at : at + _STEP]
            # counted first, so that a client that has all of a body finds it in the log
            self.server.aws.count(request, len(piece))
            self.connection.sendall(piece)
        if fault.reset_after is not None:
            self._reset()
        elif fault.end_after is not None:
            self.close_connection = True

    def _reset(self) -> None:
        """Drop the connection as a broken network would."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.server.let_go(self.connection)
        self.rfile.close()  # holds the socket open otherwise
        self.connection.close()
