"""A small S3 server on loopback that enforces requester pays, logs every request and byte, and fails on demand.

Tests compare what the ledger claims with what was served here. It promises that

- no body byte leaves it that the log does not count, and an answer is in the log before the client has all of it;
- refusals are those of AWS to a stranger: 403 `AccessDenied` without ``x-amz-request-payer: requester`` and for a key
  that does not exist, 403 `InvalidAccessKeyId`, 412 `PreconditionFailed`, 416 `InvalidRange`;
- leaving its ``with`` block ends every connection and thread, however a client behaves.

It checks key ids and not signatures, and speaks path-style addresses, GET, HEAD, PUT and ListObjectsV2 alone: what
needs more is tested against the real server of ``requester-pays-s3``. Run as a program it serves a folder as a fake
release::

    python tests/servers/loopback.py --folder DIR --port 9000
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import signal
import socket
import socketserver
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "madrylab-datamodels"
OWNER_KEY_ID = "OWNERKEY0000"
READER_KEY_ID = "READERKEY0000"
SECRET = "SECRET0000"
Content = bytes | bytearray | memoryview | str | os.PathLike[str]


@dataclass(slots=True)
class Request:
    """One line of the log; what `LoopbackS3.log` returns are copies."""

    method: str
    bucket: str
    key: str
    range: str | None  # the Range header as sent
    status: int
    n_bytes: int  # body bytes handed to the kernel, headers not counted, error documents counted
    charged: bool  # answered x-amz-request-charged: requester
    connection: int  # the client's port: equal for requests on one connection
    if_match: str | None = None  # the If-Match header as sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong with one answer; the fields combine where that makes sense."""

    status: int | None = None  # refuse with this status ...
    code: str | None = None  # ... and this S3 error code, else the usual one
    drop: bool = False  # reset the connection instead of answering; logged with status 0
    reset_after: int | None = None  # send so many body bytes, then reset the connection
    end_after: int | None = None  # send so many body bytes, then close the connection in good order
    shorten_to: int | None = None  # serve only so many bytes of the range, with an honest Content-Length
    stall_seconds: float = 0.0  # fall silent so long ...
    stall_after: int | None = None  # ... after so many body bytes, else before the status line
    shift: int = 0  # serve a range that begins so many bytes further, and say so in Content-Range
    claimed_size: int | None = None  # say in Content-Range that the object has so many bytes
    whole: bool = False  # answer 200 and the whole object where 206 is due
    heedless: bool = False  # answer whatever If-Match says
    replace: bytes | None = None  # another writer stores these bytes under the key just before the answer


@dataclass(slots=True)
class _Rule:
    fault: Fault
    when: Callable[[Request], bool]
    after: int
    times: float


class LoopbackS3:
    """A running server; use it as a context manager.

    Parameters
    ----------
    bucket : str
        The one bucket there is; another one gets 404 `NoSuchBucket`.
    requester_pays : bool
        Refuse all but the owner unless they offer to pay. Where false, everybody may read, also unsigned.
    folder : path or None
        Serve the files below it, each under its relative path.
    hide_missing : bool
        Answer 403 for a missing key to all but the owner, as S3 does to who may not list; where false, 404. Lists are
        refused likewise.
    region : str
        What HEAD on the bucket answers in ``x-amz-bucket-region``.
    strict_region : bool
        Refuse requests signed for another region with 400 `AuthorizationHeaderMalformed`.
    latency_seconds, bytes_per_second : float
        Wait before each answer; bound on the body bytes of each connection (0: none).
    port : int
        0 takes a free one.
    """

    def __init__(
        self,
        bucket: str = BUCKET,
        *,
        requester_pays: bool = True,
        folder: str | os.PathLike[str] | None = None,
        hide_missing: bool = True,
        region: str = "us-east-1",
        strict_region: bool = False,
        latency_seconds: float = 0.0,
        bytes_per_second: float = 0.0,
        port: int = 0,
    ) -> None:
        self.bucket = bucket
        self.requester_pays = requester_pays
        self.hide_missing = hide_missing
        self.region = region
        self.strict_region = strict_region
        self.latency_seconds = latency_seconds
        self.bytes_per_second = bytes_per_second
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._log: list[Request] = []
        self._rules: list[_Rule] = []
        self._objects: dict[str, _Source | Path] = {}
        self._http = _HTTPServer(("127.0.0.1", port), self)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), name="loopback-s3")
        if folder is not None:
            root = Path(folder).resolve(strict=True)
            for path in sorted(path for path in root.rglob("*") if path.is_file()):
                self.put(path.relative_to(root).as_posix(), path)

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

    @property
    def endpoint_url(self) -> str:
        """Where it listens, without the bucket."""
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    @property
    def env(self) -> dict[str, str]:
        """The variables by which AWS clients find it, as the stranger who pays."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": READER_KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": self.region,
        }

    def put(self, key: str, content: Content) -> str:
        """Store bytes, or serve the file at a path, under a key; returns the ETag, quotes included."""
        stored: _Source | Path
        if isinstance(content, str | os.PathLike):
            stored = Path(content).resolve(strict=True)
        else:
            stored = _Source(bytes(content))
        with self._lock:
            self._objects[key] = stored
        with _opened(stored) as source:
            return source.etag

    def etag(self, key: str) -> str:
        """Return the ETag of what is stored under a key, quotes included; `KeyError` where nothing is."""
        with self._lock:
            stored = self._objects[key]
        with _opened(stored) as source:
            return source.etag

    def content(self, key: str) -> bytes:
        """Return what is stored under a key; `KeyError` where nothing is."""
        with self._lock:
            stored = self._objects[key]
        return stored.read_bytes() if isinstance(stored, Path) else stored.content

    def delete(self, key: str) -> None:
        """Forget an object; `KeyError` where there is none. A file on disk stays."""
        with self._lock:
            del self._objects[key]

    def keys(self) -> list[str]:
        """All keys, sorted."""
        with self._lock:
            return sorted(self._objects)

    def inject(
        self,
        fault: Fault,
        *,
        when: Callable[[Request], bool] = lambda request: request.method == "GET",
        after: int = 0,
        times: float = 1,
    ) -> None:
        """Let matching requests fail.

        Parameters
        ----------
        fault : Fault
        when : callable
            Sees the request with status 0 before it is answered; the default takes each GET.
        after : int
            Let so many matching requests pass first.
        times : int or math.inf
            Then fail so many. Of several faults due, the one injected first happens.
        """
        with self._lock:
            self._rules.append(_Rule(fault, when, after, times))

    def clear_faults(self) -> None:
        """Let all go well again."""
        with self._lock:
            self._rules.clear()

    @property
    def log(self) -> tuple[Request, ...]:
        """All requests since the start or `reset_log`, in the order they came."""
        with self._lock:
            return tuple(replace(request) for request in self._log)

    def reset_log(self) -> None:
        """Start counting anew; call it while nothing is under way."""
        with self._lock:
            self._log.clear()

    @property
    def n_requests(self) -> int:
        """Requests in the log, refused ones included."""
        return len(self.log)

    @property
    def n_bytes(self) -> int:
        """Body bytes in the log, error documents included."""
        return sum(request.n_bytes for request in self.log)

    @property
    def n_object_bytes(self) -> int:
        """Body bytes of objects: what a provider charges for."""
        return sum(request.n_bytes for request in self.log if request.status in (200, 206))

    # What follows is for the connections' threads.

    def find(self, key: str) -> "_Source | Path | None":
        with self._lock:
            return self._objects.get(key)

    def fault_for(self, request: Request) -> Fault | None:
        with self._lock:
            for rule in self._rules:
                if not rule.when(request):
                    continue
                if rule.after:
                    rule.after -= 1
                elif rule.times:
                    rule.times -= 1
                    return rule.fault
        return None

    def begin(self, request: Request) -> None:
        with self._lock:
            self._log.append(request)

    def count(self, request: Request, n_bytes: int) -> None:
        with self._lock:
            request.n_bytes += n_bytes


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close() joins them
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], s3: LoopbackS3) -> None:
        self.s3 = s3
        self.defects: list[BaseException] = []
        self._connections: set[socket.socket] = set()
        self._connections_lock = threading.Lock()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks the name service
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def process_request(self, request: socket.socket, client_address: tuple[str, int]) -> None:  # type: ignore[override]
        with self._connections_lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        with self._connections_lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Wake every thread that waits for a client."""
        with self._connections_lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        if isinstance(error := sys.exception(), Exception) and not isinstance(error, ConnectionError):
            self.defects.append(error)


class _Refused(Exception):  # noqa: N818 - an answer, not an error of this program
    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}


_USUAL_CODES = {400: "InvalidRequest", 403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError", 503: "SlowDown"}


class _Handler(BaseHTTPRequestHandler):
    server: _HTTPServer
    protocol_version = "HTTP/1.1"
    server_version = "loopback-s3"
    sys_version = ""
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        s3 = self.server.s3
        self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))  # also where it is refused
        bucket, _, key = unquote(urlsplit(self.path).path).lstrip("/").partition("/")
        sent, port = self.headers, self.client_address[1]
        request = Request(self.command, bucket, key, sent.get("Range"), 0, 0, False, port, sent.get("If-Match"))
        fault = s3.fault_for(request) or Fault()
        s3.stopping.wait(s3.latency_seconds + (fault.stall_seconds if fault.stall_after is None else 0.0))
        if fault.replace is not None:
            s3.put(key, fault.replace)
        if fault.drop:
            s3.begin(request)
            self._reset()
            return
        try:
            if fault.status is not None:
                raise _Refused(fault.status, fault.code or _USUAL_CODES[fault.status], "a fault of the test")
            self._authorize(bucket)
            if self.command == "PUT":
                self._store(request)
            else:
                self._read(request, fault)
        except _Refused as refused:
            self._refuse(request, refused)

    do_HEAD = do_PUT = do_GET  # noqa: N815 - names that http.server calls

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's own name
        """Keep stderr quiet: the log is `LoopbackS3.log`."""

    def _authorize(self, bucket: str) -> None:
        s3 = self.server.s3
        if bucket != s3.bucket:
            raise _Refused(404, "NoSuchBucket", "The specified bucket does not exist")
        region = {"x-amz-bucket-region": s3.region}
        key_id, signed_region = self._signer()
        if key_id not in (None, OWNER_KEY_ID, READER_KEY_ID):
            raise _Refused(403, "InvalidAccessKeyId", "The access key id does not exist in our records", region)
        if s3.strict_region and signed_region not in (None, s3.region):
            message = f"the region '{signed_region}' is wrong; expecting '{s3.region}'"
            raise _Refused(400, "AuthorizationHeaderMalformed", message, region)
        offers = self.headers.get("x-amz-request-payer", "").lower() == "requester"
        if s3.requester_pays and key_id != OWNER_KEY_ID and (key_id is None or not offers):
            raise _Refused(403, "AccessDenied", "Access Denied", region)

    def _signer(self) -> tuple[str | None, str | None]:
        """Return the key id and region of the signature, None where the request is unsigned."""
        match = re.search(r"Credential=([^/,\s]+)/\d+/([^/,\s]+)/", self.headers.get("Authorization", ""))
        return (match[1], match[2]) if match else (None, None)

    def _read(self, request: Request, fault: Fault) -> None:
        s3 = self.server.s3
        if not request.key and self.command == "HEAD":
            self._send(replace(request, status=200), {"x-amz-bucket-region": s3.region}, _Source(b""))
            return
        if not request.key:
            self._list(request, fault)
            return
        stored = s3.find(request.key)
        owner = self._signer()[0] == OWNER_KEY_ID
        if stored is None:
            if s3.hide_missing and not owner:
                raise _Refused(403, "AccessDenied", "Access Denied")
            raise _Refused(404, "NoSuchKey", "The specified key does not exist")
        with _opened(stored) as source:
            wanted = None if fault.heedless else self.headers.get("If-Match")
            if wanted is not None and wanted != "*" and source.etag not in wanted.split(", "):
                raise _Refused(412, "PreconditionFailed", "At least one of the pre-conditions did not hold")
            span = _span(request.range, source.size)
            status = 200 if span is None or fault.whole else 206
            start, stop = span if span is not None and status == 206 else (0, source.size)
            headers = source.headers()
            if status == 206:
                start, stop = (min(at + fault.shift, source.size) for at in (start, stop))
                size = source.size if fault.claimed_size is None else fault.claimed_size
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            if fault.shorten_to is not None:
                stop = min(stop, start + fault.shorten_to)
            answered = replace(request, status=status, charged=s3.requester_pays and not owner)
            self._send(answered, headers, source, (start, stop), fault)

    def _list(self, request: Request, fault: Fault) -> None:
        """Answer ListObjectsV2, without delimiter."""
        s3, asked = self.server.s3, dict(parse_qsl(urlsplit(self.path).query, keep_blank_values=True))
        if asked.get("list-type") != "2" or asked.get("delimiter"):
            raise _Refused(501, "NotImplemented", "this server lists by ListObjectsV2 without delimiter alone")
        owner = self._signer()[0] == OWNER_KEY_ID
        if s3.hide_missing and not owner:
            raise _Refused(403, "AccessDenied", "Access Denied")
        most = min(int(asked.get("max-keys", 1000)), 1000)
        # the token is the last key that was listed
        after = asked.get("continuation-token") or asked.get("start-after") or ""
        stored_keys = s3.keys()
        keys = [key for key in stored_keys if key.startswith(asked.get("prefix", "")) and key > after]
        written = quote if asked.get("encoding-type") == "url" else escape
        entries = ""
        for key in keys[:most]:
            stored = s3.find(key)
            assert stored is not None
            with _opened(stored) as source:
                entries += (
                    f"<Contents><Key>{written(key)}</Key><ETag>{escape(source.etag)}</ETag><Size>{source.size}</Size>"
                    "<StorageClass>STANDARD</StorageClass></Contents>"
                )
        more = len(keys) > most
        token = f"<NextContinuationToken>{escape(keys[most - 1])}</NextContinuationToken>" if more else ""
        encoding = "<EncodingType>url</EncodingType>" if written is quote else ""
        document = (
            '<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{s3.bucket}</Name><KeyCount>{len(keys[:most])}</KeyCount><MaxKeys>{most}</MaxKeys>{encoding}"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{entries}</ListBucketResult>"
        )
        answered = replace(request, status=200, charged=s3.requester_pays and not owner)
        self._send(answered, {"Content-Type": "application/xml"}, _Source(document.encode()), fault=fault)

    def _store(self, request: Request) -> None:
        s3 = self.server.s3
        if self._signer()[0] != OWNER_KEY_ID or not request.key:
            raise _Refused(403, "AccessDenied", "Access Denied")
        if "aws-chunked" in self.headers.get("Content-Encoding", "") or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise _Refused(501, "NotImplemented", "this server takes plain bodies only")
        if self.headers.get("If-None-Match") == "*" and s3.find(request.key) is not None:
            raise _Refused(412, "PreconditionFailed", "At least one of the pre-conditions did not hold")
        etag = s3.put(request.key, self._body)
        self._send(replace(request, status=200), {"ETag": etag}, _Source(b""))

    def _refuse(self, request: Request, refused: _Refused) -> None:
        document = (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f"<Error><Code>{refused.code}</Code><Message>{escape(refused.message)}</Message>"
            f"<BucketName>{escape(request.bucket)}</BucketName><Key>{escape(request.key)}</Key></Error>"
        )
        headers = {"Content-Type": "application/xml", **refused.headers}
        self._send(replace(request, status=refused.status), headers, _Source(document.encode()))

    def _send(
        self,
        request: Request,
        headers: dict[str, str],
        source: "_Source",
        span: tuple[int, int] | None = None,
        fault: Fault | None = None,
    ) -> None:
        start, stop = span or (0, source.size)
        self.server.s3.begin(request)
        try:
            self.send_response(request.status)
            for name, value in {**headers, "Content-Length": str(stop - start)}.items():
                self.send_header(name, value)
            if request.charged:
                self.send_header("x-amz-request-charged", "requester")
            self.end_headers()
            if self.command != "HEAD":
                self._send_body(request, source, start, stop, fault or Fault())
        except OSError:  # the client hung up
            self.close_connection = True

    def _send_body(self, request: Request, source: "_Source", start: int, stop: int, fault: Fault) -> None:
        s3 = self.server.s3
        cuts = [n for n in (fault.reset_after, fault.end_after) if n is not None]
        end = min([stop, *(start + n for n in cuts)])
        pause = None if fault.stall_after is None else start + fault.stall_after
        position = start
        while position < end:
            if position == pause:
                s3.stopping.wait(fault.stall_seconds)
                pause = None
            n = min((end if pause is None or pause > end else pause) - position, _STEP)
            if s3.bytes_per_second:
                n = min(n, _PACED_STEP)
                s3.stopping.wait(n / s3.bytes_per_second)
            # Counted first, so that a client that has all of a body finds it in the log.
            s3.count(request, n)
            sent = 0
            try:
                sent = source.send(self.connection, position, n)
            finally:
                s3.count(request, sent - n)
            if not sent:  # the file has become shorter
                break
            position += sent
        if fault.reset_after is not None:
            self._reset()
        elif position < stop:
            self.close_connection = True

    def _reset(self) -> None:
        """Drop the connection as a broken network would, after the client has got what was sent."""
        deadline = time.monotonic() + 1
        while any(fcntl.ioctl(self.connection, termios.TIOCOUTQ, bytes(4))) and time.monotonic() < deadline:
            time.sleep(0.001)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.rfile.close()  # holds the socket open otherwise
        self.connection.close()


_STEP = 1 << 20
_PACED_STEP = 1 << 16


class _Source:
    """The bytes of an object and what is said about them."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.size = len(content)
        self.etag = _quoted_digest(content)
        self.modified = time.time()

    def send(self, connection: socket.socket, start: int, n: int) -> int:
        return connection.send(memoryview(self.content)[start : start + n])

    def headers(self) -> dict[str, str]:
        return {
            "ETag": self.etag,
            "Last-Modified": formatdate(self.modified, usegmt=True),
            "Accept-Ranges": "bytes",
            "Content-Type": "binary/octet-stream",
        }


class _FileSource(_Source):
    def __init__(self, file: int) -> None:
        self._file = file
        status = os.fstat(file)
        self.size, self.modified = status.st_size, status.st_mtime
        # A digest of the content would take seconds for large files.
        self.etag = _quoted_digest(f"{status.st_ino} {status.st_size} {status.st_mtime_ns}".encode())

    def send(self, connection: socket.socket, start: int, n: int) -> int:
        return os.sendfile(connection.fileno(), self._file, start, n)


@contextlib.contextmanager
def _opened(stored: _Source | Path) -> Iterator[_Source]:
    if isinstance(stored, _Source):
        yield stored
        return
    file = os.open(stored, os.O_RDONLY)
    try:
        yield _FileSource(file)
    finally:
        os.close(file)


def _quoted_digest(content: bytes) -> str:
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'


def _span(header: str | None, size: int) -> tuple[int, int] | None:
    """Return (start, stop) of a single byte range, None for the whole object.

    As on S3, several ranges and malformed ones are ignored; one that begins behind the end is refused.
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        start, stop = max(size - int(last), 0), size
    elif last and int(last) < int(first):
        return None
    else:
        start, stop = int(first), min(int(last) + 1, size) if last else size
    if start >= stop:
        headers = {"Content-Range": f"bytes */{size}"}
        raise _Refused(416, "InvalidRange", "The requested range is not satisfiable", headers)
    return start, stop


def main(arguments: list[str] | None = None) -> None:
    """Serve a folder until interrupted; then print what was served."""
    parser = argparse.ArgumentParser(description="Serve a folder as a requester-pays bucket on loopback.")
    parser.add_argument("--folder", type=Path, required=True, help="its files become objects, keyed by relative path")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--bucket", default=BUCKET)
    parser.add_argument("--free", action="store_true", help="let anybody read without offering to pay")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="wait before each answer")
    parser.add_argument("--mb-per-s", type=float, default=0.0, help="bound on each connection; 0: none")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"--folder {options.folder} is no folder; name one whose files shall be served")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with LoopbackS3(
        options.bucket,
        requester_pays=not options.free,
        folder=options.folder,
        latency_seconds=options.latency_ms / 1e3,
        bytes_per_second=options.mb_per_s * 1e6,
        port=options.port,
    ) as server:
        print(f"# {len(server.keys())} objects in s3://{server.bucket} at {server.endpoint_url}; Ctrl-C ends it")
        for name, value in server.env.items():
            print(f"export {name}={value}")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        print(f"# served {server.n_requests} requests, {server.n_bytes} bytes")


if __name__ == "__main__":
    main()
