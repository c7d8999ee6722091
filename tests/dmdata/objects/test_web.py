"""Web servers differ, and signed links are secrets: each is read by ranges, or one sentence says why not."""

import contextlib
import logging
import pickle
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from processes import Child
from servers.web import Authority, Page, WebServer
from small_release import npy

import dmdata
from dmdata.errors import AccessError, DmdataError, IntegrityError, ObjectMissingError, SourceError
from dmdata.objects.address import Address
from dmdata.objects.http.connections import SILENCE_SECONDS
from dmdata.objects.http.web import web_source, whole_object
from dmdata.objects.source import connect

VALUES = np.arange(60_000, dtype=np.float32).reshape(600, 100)
FILE = npy(VALUES)
SIGNED = "/x.npy?X-Amz-Signature=5ec2e7&X-Amz-Date=20200101T000000Z&X-Amz-Expires=60"
SECRETS = ("5ec2e7", "pass/word", "pass%2Fword")


@pytest.fixture
def web() -> Iterator[WebServer]:
    with WebServer() as server:
        yield server


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def secure(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.bundle))
    with WebServer(authority.context) as server:
        yield server


def refusal(url: str, read: Callable[[str], object] = dmdata.open) -> DmdataError:
    """Read what cannot be read; the error holds no secret, however it is written out."""
    with pytest.raises(DmdataError) as caught:
        read(url)
    error = caught.value
    written = f"{error!r} {error.facts} {pickle.loads(pickle.dumps(error))!r}"
    written += "".join(traceback.format_exception(error))
    assert not [secret for secret in SECRETS if secret in written]
    return error


def start(url: str) -> object:
    """Read the first bytes, in one request."""
    return connect(Address(url)).start(128)


def assert_reads(url: str) -> None:
    array = dmdata.open(url)
    np.testing.assert_array_equal(array[7], VALUES[7])
    np.testing.assert_array_equal(array[:, 3], VALUES[:, 3])
    np.testing.assert_array_equal(array[:], VALUES)


# Addresses.


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("/a%20b.npy", "/a%20b.npy"),
        ("/a b.npy", "/a%20b.npy"),
        ("/a%2Fb%25.npy", "/a%2Fb%25.npy"),
        ("/a%.npy", "/a%25.npy"),
        ("/ü/é+;,=.npy", "/%C3%BC/%C3%A9+;,=.npy"),
        ("//d//x.npy", "//d//x.npy"),
        ("/a/../x.npy", "/a/../x.npy"),
        ("/get.npy?name=a%2Fb%20c&n=1+1", "/get.npy?name=a%2Fb%20c&n=1+1"),
        ("/x.npy?X-Amz-Signature=s/s", "/x.npy?X-Amz-Signature=s/s"),
    ],
)
def test_a_url_is_asked_for_as_it_was_given(web: WebServer, given: str, asked: str) -> None:
    web.pages[asked] = Page(content=FILE)
    np.testing.assert_array_equal(dmdata.open(web.url + given)[7:9], VALUES[7:9])
    assert {one.target for one in web.asked} == {asked}


def test_a_fragment_is_refused_before_anything_is_asked(web: WebServer) -> None:
    error = refusal(f"{web.url}/x.npy#2.npy")
    assert "write %23" in str(error)
    assert web.asked == []


@pytest.mark.parametrize("url", ["http:///x.npy", "https://host:port/x.npy", "http://a b/x.npy"])
def test_a_url_without_a_host_is_named(url: str) -> None:
    assert "names no host" in str(refusal(url))


def test_a_signed_link_is_read_by_get_alone_and_travels_to_workers(web: WebServer) -> None:
    web.pages[SIGNED] = Page(content=FILE)
    assert_reads(web.url + SIGNED)
    assert {(one.method, one.target) for one in web.asked} == {("GET", SIGNED)}
    array = pickle.loads(pickle.dumps(dmdata.open(web.url + SIGNED)))
    np.testing.assert_array_equal(array[5], VALUES[5])
    shown = f"{array!r} {array.name} {array.url} {array.body.transport.address}"
    assert "5ec2e7" not in shown


def test_a_forked_process_reads_too(web: WebServer) -> None:
    web.pages["/x.npy"] = Page(content=FILE)
    program = (
        "import os, sys, dmdata; from dmdata.objects.source import connect\n"
        "from dmdata.objects.address import Address\n"
        "array, source = dmdata.open(sys.argv[1]), connect(Address(sys.argv[1]))\n"
        "read = lambda: [bytes(one) for one in source.pieces([0, 900], [6, 906], etag='\"abc\"')]\n"
        "before = read(), float(array[5, 0]); pid = os.fork()\n"
        "if not pid: os._exit(before != (read(), 500.0))\n"
        "sys.exit(os.waitpid(pid, 0)[1])"
    )
    command = [sys.executable, "-c", program, f"{web.url}/x.npy"]
    assert subprocess.run(command, check=False).returncode == 0


def test_an_expired_link_asks_for_a_new_one(web: WebServer) -> None:
    s3_says = b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"
    web.pages[SIGNED] = Page(status=403, content=s3_says)
    error = refusal(web.url + SIGNED)
    assert isinstance(error, AccessError)
    assert (error.cause, error.exit_code) == ("bad_credentials", 4)
    assert "expired" in str(error)
    assert "new one" in str(error)
    web.pages["/y.npy?sig=5ec2e7"] = Page(status=403, content=b"<Error><Code>SignatureDoesNotMatch</Code></Error>")
    assert "signature" in str(refusal(f"{web.url}/y.npy?sig=5ec2e7"))
    assert len(web.asked) == 2


def test_user_and_password_are_sent_to_their_server_alone(web: WebServer) -> None:
    web.pages["/x.npy"] = Page(content=FILE, password="Basic dTpwYXNzL3dvcmQ=")
    url = web.url.replace("://", "://u:pass%2Fword@")
    np.testing.assert_array_equal(dmdata.open(f"{url}/x.npy")[5], VALUES[5])
    with WebServer() as other:
        web.pages["/away.npy"] = Page(status=302, headers={"Location": f"{other.url}/y.npy"})
        web.pages["/here.npy"] = Page(status=302, headers={"Location": "/x.npy"})
        other.pages["/y.npy"] = Page(content=FILE)
        dmdata.open(f"{url}/away.npy")
        dmdata.open(f"{url}/here.npy")
        assert ["Authorization" in one.headers for one in other.asked] == [False]
    assert "asks for a user" in str(refusal(f"{web.url}/x.npy"))
    wrong = refusal(web.url.replace("://", "://u:5ec2e7@") + "/x.npy")
    assert isinstance(wrong, AccessError)
    assert wrong.cause == "bad_credentials"


def test_no_query_is_in_the_logs(web: WebServer, caplog: pytest.LogCaptureFixture) -> None:
    web.pages[SIGNED] = Page(content=FILE)
    with caplog.at_level(logging.DEBUG):
        assert_reads(web.url + SIGNED)
    assert caplog.records, "urllib3 logs at that level"
    assert "5ec2e7" not in caplog.text


# Redirects.


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed_with_range_and_condition_and_remembered(web: WebServer, status: int) -> None:
    with WebServer() as other:
        web.pages["/x.npy"] = Page(status=status, headers={"Location": "../y.npy"})
        web.pages["/y.npy"] = Page(status=status, headers={"Location": f"{other.url}/z z.npy?sig=5ec2e7"})
        other.pages["/z%20z.npy?sig=5ec2e7"] = Page(content=FILE)
        array = dmdata.open(f"{web.url}/x.npy")
        for row in range(5):
            np.testing.assert_array_equal(array[row], VALUES[row])
        assert len(web.asked) == 2
        assert [one.headers.get("If-Match") for one in other.asked] == [None, *['"abc"'] * 5]
        assert all("Range" in one.headers for one in other.asked)
        # a target that has expired: the way is asked for again
        other.pages["/new.npy"] = other.pages["/z%20z.npy?sig=5ec2e7"]
        other.pages["/z%20z.npy?sig=5ec2e7"] = Page(status=403)
        web.pages["/y.npy"] = Page(status=status, headers={"Location": f"{other.url}/new.npy"})
        np.testing.assert_array_equal(array[9], VALUES[9])


def test_a_redirect_to_https_is_followed(web: WebServer, secure: WebServer) -> None:
    web.pages["/x.npy"] = Page(status=301, headers={"Location": f"{secure.url}/x.npy"})
    secure.pages["/x.npy"] = Page(content=FILE)
    assert_reads(f"{web.url}/x.npy")


def test_redirects_without_end_are_named_within_a_bound(web: WebServer) -> None:
    web.pages["/x.npy"] = Page(status=302, headers={"Location": "/y.npy"})
    web.pages["/y.npy"] = Page(status=302, headers={"Location": "/x.npy"})
    assert "leads back to itself" in str(refusal(f"{web.url}/x.npy"))
    assert len(web.asked) == 2
    web.asked.clear()
    for nth in range(30):
        web.pages[f"/{nth}"] = Page(status=302, headers={"Location": f"/{nth + 1}"})
    web.pages["/n.npy"] = web.pages["/0"]
    assert "more than 10 times" in str(refusal(f"{web.url}/n.npy"))
    assert len(web.asked) == 11


@pytest.mark.parametrize(
    ("location", "words"), [("ftp://h/x", "not an http or https address"), ("", "no address to go to")]
)
def test_a_redirect_to_nowhere_is_named(web: WebServer, location: str, words: str) -> None:
    web.pages["/x.npy"] = Page(status=302, headers={"Location": location} if location else {})
    assert words in str(refusal(f"{web.url}/x.npy"))
    assert len(web.asked) == 1


def test_a_redirect_from_https_to_http_is_refused(web: WebServer, secure: WebServer) -> None:
    secure.pages["/x.npy"] = Page(status=302, headers={"Location": f"{web.url}/x.npy?5ec2e7"})
    assert "not encrypted" in str(refusal(f"{secure.url}/x.npy"))
    assert web.asked == []


# Answers.


def test_a_server_without_ranges_is_noticed_in_one_request_and_read_whole(web: WebServer, tmp_path: Path) -> None:
    web.pages["/x.npy"] = Page(content=FILE, ranges=False)
    error = refusal(f"{web.url}/x.npy")
    assert "does not answer ranges" in str(error)
    assert "dmdata get" in str(error)
    assert error.whole
    assert not error.transient
    assert len(web.asked) == 1
    with whole_object(Address(f"{web.url}/x.npy")) as whole:
        assert (whole.n_bytes, whole.etag) == (len(FILE), '"abc"')
        assert b"".join(whole.chunks) == FILE


def test_pythons_own_server_is_said_to_answer_no_ranges(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(FILE)
    program = "import http.server as h, functools as f, sys; s = h.ThreadingHTTPServer(('127.0.0.1', 0), f.partial("
    program += (
        "h.SimpleHTTPRequestHandler, directory=sys.argv[1])); print(s.server_port, flush=True); s.serve_forever()"
    )
    with Child(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout
            url = f"http://127.0.0.1:{server.stdout.readline().strip()}/x.npy"
            assert "does not answer ranges" in str(refusal(url))
        finally:
            server.kill()


@pytest.mark.parametrize(
    "page", [Page(content=FILE, ranges=False), Page(content=FILE, coded=True)], ids=["whole", "gzip"]
)
def test_what_cannot_be_read_by_ranges_is_downloaded_whole(web: WebServer, tmp_path: Path, page: Page) -> None:
    web.pages["/x.npy"] = page
    with pytest.raises(SourceError, match="dmdata get"):
        dmdata.open(f"{web.url}/x.npy")[:]
    told: list[tuple[int, int]] = []
    path = dmdata.get(f"{web.url}/x.npy", tmp_path / "x.npy", progress=lambda done, total: told.append((done, total)))
    assert path.read_bytes() == FILE
    assert told[-1] == (len(FILE), len(FILE))
    np.testing.assert_array_equal(dmdata.open(path)[...], VALUES)
    assert not list(tmp_path.glob("*.part*"))


def test_a_small_file_is_read_though_its_server_has_no_ranges(web: WebServer) -> None:
    web.pages["/x.bin"] = Page(content=b"abc", ranges=False)
    head, state = connect(Address(f"{web.url}/x.bin")).start(128)
    assert (head, state.n_bytes) == (b"abc", 3)


def test_what_breaks_off_while_it_is_read_whole_is_named(web: WebServer) -> None:
    web.pages["/x.npy"] = Page(content=FILE, ranges=False, cut_after=1000)
    with whole_object(Address(f"{web.url}/x.npy")) as whole, pytest.raises(SourceError, match="broke"):
        list(whole.chunks)
    # an error of whoever takes the bytes stays his own
    with pytest.raises(OSError, match="disk full"), whole_object(Address(f"{web.url}/x.npy")):
        raise OSError("disk full")


def test_a_weak_etag_is_compared_and_not_asked_for(web: WebServer) -> None:
    web.pages["/x.npy"] = Page(content=FILE, etag='W/"abc"')
    assert_reads(f"{web.url}/x.npy")
    assert not [one for one in web.asked if "If-Match" in one.headers]
    array = dmdata.open(f"{web.url}/x.npy")
    web.pages["/x.npy"] = Page(content=FILE, etag='W/"abd"')
    with pytest.raises(IntegrityError):
        array[7]
    with pytest.raises(IntegrityError):
        array[:, 3]


def test_without_an_etag_the_time_of_change_is_the_identity(web: WebServer) -> None:
    web.pages["/x.npy"] = Page(content=FILE, etag=None, modified="Sun, 06 Nov 1994 08:49:37 GMT")
    assert_reads(f"{web.url}/x.npy")
    array = dmdata.open(f"{web.url}/x.npy")
    web.pages["/x.npy"] = Page(content=FILE, etag=None, modified="Mon, 07 Nov 1994 08:49:37 GMT")
    with pytest.raises(IntegrityError):
        array[7]
    web.pages["/y.npy"] = Page(content=FILE, etag=None)
    assert_reads(f"{web.url}/y.npy")


def test_what_is_sent_compressed_is_refused_by_ranges_and_read_whole(web: WebServer) -> None:
    web.pages["/x.npy"] = Page(content=FILE, coded=True)
    error = refusal(f"{web.url}/x.npy")
    assert "compressed (Content-Encoding: gzip)" in str(error)
    assert not error.transient
    assert [one.headers["Accept-Encoding"] for one in web.asked] == ["identity"]
    with whole_object(Address(f"{web.url}/x.npy")) as whole:
        assert whole.n_bytes is None
        assert b"".join(whole.chunks) == FILE


def test_an_answer_in_chunks_is_read(web: WebServer) -> None:
    web.pages["/x.npy"] = Page(content=FILE, chunked=True)
    assert_reads(f"{web.url}/x.npy")
    with whole_object(Address(f"{web.url}/x.npy")) as whole:
        assert b"".join(whole.chunks) == FILE


def test_a_transfer_that_breaks_is_resumed_where_it_broke(web: WebServer) -> None:
    values = np.arange(500_000, dtype=np.int64)
    web.pages["/x.npy"] = Page(content=npy(values))
    array = dmdata.open(f"{web.url}/x.npy")
    web.pages["/x.npy"] = Page(content=npy(values), cut_after=300_000)
    np.testing.assert_array_equal(array[:], values)
    starts = [int(one.headers["Range"].split("=")[1].split("-")[0]) for one in web.asked[1:]]
    assert len(set(starts)) == len(starts) > 12, "no byte is asked for twice"


@pytest.mark.parametrize(
    ("page", "words", "is_transient"),
    [
        (Page(content=FILE, shift=5), "another range", True),
        (Page(content=FILE, headers={"Content-Range": "bytes 0-127/*"}), "without its size", False),
        (Page(content=FILE, headers={"Content-Type": "multipart/byteranges; boundary=x"}), "several ranges", False),
        (Page(content=b"<html>log in", ranges=False, headers={"Content-Type": "text/html"}), "a web page", False),
        (Page(content=b"<html>" * 99, headers={"Content-Type": "text/html; charset=utf-8"}), "a web page", False),
        (Page(status=403), "a login or a signed link", False),
        (Page(status=404), "was not found (404)", False),
        (Page(status=410), "gone for good", False),
        (Page(status=429), "too many requests", True),
        (Page(status=429, headers={"Retry-After": "3600"}), "asks not to be contacted for 3600 s", False),
        (Page(status=500), "its server failed (500)", True),
        (Page(status=501), "its server failed (501)", False),
        (Page(status=418), "answered 418", False),
        (Page(status=304), "answered 304", False),
        (Page(content=FILE, cut_after=0), "broke", True),
    ],
)
def test_each_answer_that_is_no_range_has_its_sentence(
    web: WebServer, page: Page, words: str, is_transient: bool
) -> None:
    web.pages["/x.npy?sig=5ec2e7"] = page
    error = refusal(f"{web.url}/x.npy?sig=5ec2e7", start)
    assert words in str(error)
    assert (error.facts.get("transient", False), len(web.asked)) == (is_transient, 1)
    assert isinstance(error, ObjectMissingError) == (page.status in (404, 410))


def test_a_server_that_asks_for_a_pause_gets_it(web: WebServer) -> None:
    web.pages["/x.npy"] = Page(content=FILE)
    array = dmdata.open(f"{web.url}/x.npy")
    web.pages["/x.npy"] = Page(status=429, headers={"Retry-After": "1"})
    threading.Timer(0.5, web.pages.__setitem__, ("/x.npy", Page(content=FILE))).start()
    np.testing.assert_array_equal(array[7], VALUES[7])
    assert len(web.asked) == 3, "without a pause there would be more"


def test_an_empty_file_is_empty_and_a_range_behind_the_end_is_an_error(web: WebServer) -> None:
    web.pages["/x.bin"] = Page(content=b"")
    web.pages["/y.bin"] = Page(content=b"abc")
    assert connect(Address(f"{web.url}/x.bin")).start(4) == (b"", dmdata.objects.address.ObjectState(0, None))
    for start in (2, 9):
        with pytest.raises(SourceError, match="ended"):
            connect(Address(f"{web.url}/y.bin")).piece(start, start + 9, etag=None)


def assert_pieces(url: str, *, remembers_seconds: float = 60.0) -> None:
    source = web_source(Address(url), remembers_seconds=remembers_seconds)
    etag = source.start(128)[1].etag
    starts = list(range(0, 100_000, 1000))
    pieces = source.pieces(starts, [start + 7 for start in starts], etag=etag)
    assert [bytes(piece) for piece in pieces] == [FILE[start : start + 7] for start in starts]


@pytest.mark.parametrize(
    ("target", "page", "is_by_obstore"),
    [
        ("/x%20%2F.npy?X-Amz-Signature=5ec2e7%2F&a=1+1", Page(content=FILE), True),
        ("/x.npy", Page(content=FILE, etag=None, modified="Sun, 06 Nov 1994 08:49:37 GMT"), True),
        ("//d/x.npy", Page(content=FILE, etag=None), True),
        ("/a/../x.npy", Page(content=FILE), False),
        ("/x.npy", Page(content=FILE, etag='W/"abc"'), False),
    ],
)
def test_many_short_ranges_are_read_together(web: WebServer, target: str, page: Page, is_by_obstore: bool) -> None:
    web.pages[target] = page
    assert_pieces(web.url + target)
    assert {(one.method, one.target) for one in web.asked} == {("GET", target)}
    # hyper writes names in small letters
    assert ["range" in one.headers.keys() for one in web.asked[1:]] == [is_by_obstore] * 100  # noqa: SIM118
    assert {one.headers["Accept-Encoding"] for one in web.asked} == {"identity"}


def test_many_short_ranges_are_read_together_where_a_redirect_leads_by_https_and_with_a_password(
    web: WebServer, secure: WebServer
) -> None:
    web.pages["/x.npy"] = Page(status=302, headers={"Location": f"{secure.url}/y.npy?5ec2e7"})
    secure.pages["/y.npy?5ec2e7"] = Page(content=FILE)
    assert_pieces(f"{web.url}/x.npy")
    assert len(web.asked) == 1
    # the way is asked for again after a while, and not by obstore, which would name us as the referrer
    secure.pages["/new.npy"] = Page(content=FILE)
    web.pages["/y.npy"] = Page(status=302, headers={"Location": f"{secure.url}/new.npy"})
    assert_pieces(f"{web.url}/y.npy", remembers_seconds=0.0)
    assert len(web.asked) == 102
    secure.pages["/z.npy"] = Page(content=FILE, password="Basic dTpw")
    assert_pieces(secure.url.replace("://", "://u:p@") + "/z.npy")
    for server in (web, secure):
        assert not [one for one in server.asked if one.headers["Referer"]]


@pytest.mark.parametrize("etag", ['"abc"', 'W/"abc"'])
def test_a_change_is_noticed_among_many_short_ranges(web: WebServer, etag: str) -> None:
    web.pages["/x.npy"] = Page(content=FILE, etag=etag)
    source = connect(Address(f"{web.url}/x.npy"))
    web.pages["/x.npy"] = Page(content=FILE, etag=etag.replace("c", "d"))
    with pytest.raises((IntegrityError, SourceError)) as caught:
        source.pieces([0, 500], [9, 509], etag=etag)
    # read alone next, as fetch does, it is said what happened
    assert isinstance(caught.value, IntegrityError) or caught.value.transient
    with pytest.raises(IntegrityError):
        source.pieces([0, 500], [9, 509], etag=etag)


# No answer.


def test_a_silent_server_is_given_up_after_one_request() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=16) as listening:
        error = refusal(f"http://127.0.0.1:{listening.getsockname()[1]}/x.npy?5ec2e7")
        assert n_waiting(listening) == 1
    assert f"was silent for {SILENCE_SECONDS:.0f} s" in str(error)
    assert "try again later" in str(error)


def n_waiting(listening: socket.socket) -> int:
    """Count the connections that were made to a server and not accepted."""
    listening.setblocking(False)
    n = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            listening.accept()[0].close()
            n += 1
    return n


def test_what_provably_was_not_sent_is_said_to_be(
    web: WebServer, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    refused = refusal(f"http://127.0.0.1:{port}/x.npy")
    assert "refuses connections" in str(refused)
    unknown = refusal("https://no-such-host.invalid/x.npy?5ec2e7")
    assert "no address is known" in str(unknown)
    plain = refusal(f"https://{web.host}/x.npy")
    assert "speaks no TLS" in str(plain)
    with WebServer(authority.context) as secure:
        untrusted = refusal(f"{secure.url}/x.npy")
        assert "is not trusted" in str(untrusted)
        assert "AWS_CA_BUNDLE" in str(untrusted)
        assert secure.asked == []
        assert "write https://" in str(refusal(f"http://{secure.host}/x.npy"))
    monkeypatch.setenv("HTTP_PROXY", f"http://u:5ec2e7@127.0.0.1:{port}")
    proxy = refusal("http://example.org/x.npy")
    assert f"the proxy 127.0.0.1:{port} cannot be reached" in str(proxy)
    for error in (refused, unknown, plain, untrusted, proxy):
        assert error.unsent
        assert not error.transient


@pytest.mark.parametrize(
    ("greeting", "words"),
    [(b"SSH-2.0-OpenSSH_9.2\r\n", "is not HTTP"), (b"\x15\x03\x01\x00\x02\x02\x46", "write https://")],
)
def test_what_speaks_no_http_is_named(greeting: bytes, words: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def greet() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(greeting)

        threading.Thread(target=greet, daemon=True).start()
        assert words in str(refusal(f"http://127.0.0.1:{listening.getsockname()[1]}/x.npy"))


def test_http_on_a_port_for_https_is_named(web: WebServer) -> None:
    web.pages["/x.npy"] = Page(status=400, content=b"The plain HTTP request was sent to HTTPS port")
    assert "write https://" in str(refusal(f"{web.url}/x.npy"))


@pytest.mark.parametrize("exception", ["", "127.0.0.1:{port}"])
def test_a_proxy_is_asked_but_for_hosts_it_is_not_for(
    web: WebServer, exception: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WebServer() as proxy:
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setenv("HTTP_PROXY", proxy.url.replace("://", "://u:p%40@"))
        monkeypatch.setenv("NO_PROXY", exception.format(port=web.host.rpartition(":")[2]))
        web.pages["/a%20b.npy?q"] = proxy.pages[f"{web.url}/a%20b.npy?q"] = Page(content=FILE)
        np.testing.assert_array_equal(dmdata.open(f"{web.url}/a b.npy?q")[7], VALUES[7])
        assert (len(web.asked), len(proxy.asked)) == ((2, 0) if exception else (0, 2))
        assert {one.headers["Proxy-Authorization"] for one in proxy.asked} <= {"Basic dTpwQA=="}


def test_a_certificate_for_another_host_is_named(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.bundle))
    with WebServer(authority.context) as secure:
        error = refusal(secure.url.replace("127.0.0.1", "localhost") + "/x.npy")
        assert "is not trusted" in str(error)
