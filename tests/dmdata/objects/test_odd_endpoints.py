"""Endpoints that are S3 in part: each is read, or said in one sentence and a request or two not to be."""

import gc
import io
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import dmdata
from dmdata.errors import DmdataError, SourceError
from dmdata.objects.clients import SILENCE_SECONDS

ADDRESS = "s3://bucket/x.npy"
VALUES = np.arange(200_000, dtype=np.float32).reshape(4000, 50)
_FILE = io.BytesIO()
np.save(_FILE, VALUES)
CONTENT = _FILE.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Answers as the server's `mode` says."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.server.n_requests += 1
        mode, asked = self.server.mode, self.headers.get("Range", "bytes=0-")
        start, _, last = asked.removeprefix("bytes=").partition("-")
        part = CONTENT[int(start) : int(last) + 1 if last else None]
        if mode == "weak" and "If-Match" in self.headers:
            self.answer(412, b"")  # RFC 9110: a weak tag matches nothing
        elif mode.isdecimal():
            self.answer(int(mode), b"", Location="https://127.0.0.1:1/elsewhere")
        elif mode == "whole":
            self.answer(200, CONTENT, ETag='"abc"')
        else:
            headers = {"Content-Range": f"bytes {start}-{int(start) + len(part) - 1}/{len(CONTENT)}"}
            if mode != "no etag":
                headers["ETag"] = 'W/"abc"' if mode == "weak" else '"abc"'
            if mode == "gzip":
                headers["Content-Encoding"] = "aws-chunked, gzip"
            if mode == "chunked":
                headers["Content-Encoding"] = "aws-chunked"
            self.answer(206, part, **headers)

    do_HEAD = do_GET  # noqa: N815 - a name that http.server calls

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        stamp = {"Last-Modified": "Wed, 01 Jan 2025 00:00:00 GMT", "Content-Length": str(len(body))}
        for name, value in (stamp | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except ConnectionError:  # a client that does not want the whole
            self.close_connection = True


class Server(ThreadingHTTPServer):
    """Counts what it is asked."""

    mode = "usual"
    n_requests = 0


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, dmdata_home: Path) -> Iterator[Callable[[str], Server]]:
    """Make an endpoint of one's own with a mode; the environment leads there."""
    servers: list[tuple[Server, threading.Thread]] = []
    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)

    def start(mode: str) -> Server:
        server = Server(("127.0.0.1", 0), Handler)
        server.mode = mode
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        servers.append((server, thread))
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
        return server

    yield start
    gc.collect()  # a connection left open is a warning here, and fails
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("mode", ["usual", "weak", "no etag", "chunked"])
def test_rows_and_columns_are_read_whatever_tag_the_object_has(serve: Callable[[str], Server], mode: str) -> None:
    serve(mode)
    lazy = dmdata.open(ADDRESS)
    np.testing.assert_array_equal(lazy[7:9], VALUES[7:9])
    np.testing.assert_array_equal(lazy[::500, 3], VALUES[::500, 3])


def test_an_object_that_is_stored_compressed_is_said_to_be_and_downloaded_as_it_is(
    serve: Callable[[str], Server], tmp_path: Path
) -> None:
    server = serve("gzip")
    with pytest.raises(SourceError, match=r"Content-Encoding gzip.*dmdata get") as caught:
        dmdata.open(ADDRESS)
    assert (caught.value.exit_code, server.n_requests) == (1, 1)
    assert dmdata.get(ADDRESS, tmp_path / "x.npy").read_bytes() == CONTENT


@pytest.mark.parametrize("status", ["301", "302", "307", "308"])
def test_where_an_endpoint_redirects_to_is_named_after_one_request(serve: Callable[[str], Server], status: str) -> None:
    server = serve(status)
    with pytest.raises(DmdataError, match=r"redirects to https://127\.0\.0\.1:1/elsewhere.*AWS_ENDPOINT_URL") as caught:
        dmdata.open(ADDRESS)
    assert (caught.value.exit_code, server.n_requests) == (1, 1)


@pytest.mark.parametrize("status", ["303", "405", "418"])
def test_an_answer_that_s3_never_gives_is_named_after_one_request(serve: Callable[[str], Server], status: str) -> None:
    server = serve(status)
    with pytest.raises(SourceError, match=r"AWS_ENDPOINT_URL|S3 endpoint|as S3 does") as caught:
        dmdata.open(ADDRESS)
    assert (caught.value.exit_code, server.n_requests) == (1, 1)


def test_an_endpoint_that_sends_the_whole_object_is_named_after_one_request(serve: Callable[[str], Server]) -> None:
    server = serve("whole")
    with pytest.raises(SourceError, match="cannot be read by ranges") as caught:
        dmdata.open(ADDRESS)
    assert (caught.value.exit_code, server.n_requests) == (1, 1)


def test_an_endpoint_that_never_answers_is_given_up_after_one_request_and_within_15_seconds(
    serve: Callable[[str], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve("usual")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(SourceError, match="did not answer") as caught:
            dmdata.open(ADDRESS)
        silent.setblocking(False)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()
    assert SILENCE_SECONDS < 15
    assert caught.value.exit_code == 5
