"""The loopback server refuses, serves, counts and fails as it says; else nothing that is compared with it is tested."""

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Child
from servers import loopback
from servers.loopback import OWNER_KEY_ID, READER_KEY_ID, Fault, LoopbackS3

CONTENT = bytes(range(251)) * 17


class Answer:
    """Status, headers and body of one request, which may have broken off."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.broken: Exception | None = None
        chunks = []
        try:
            while chunk := response.read1(1 << 16):
                chunks.append(chunk)
            if response.length:
                self.broken = http.client.IncompleteRead(b"", response.length)
        except (http.client.IncompleteRead, ConnectionError, TimeoutError) as error:
            self.broken = error
        finally:
            response.close()
        self.body = b"".join(chunks)


def connect(server: LoopbackS3) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(server.endpoint_url.removeprefix("http://"), timeout=20)


def request(
    server: LoopbackS3,
    key: str,
    *,
    method: str = "GET",
    key_id: str | None = READER_KEY_ID,
    payer: bool = True,
    body: bytes | None = None,
    region: str = "us-east-1",
    connection: http.client.HTTPConnection | None = None,
    **headers: str,
) -> Answer:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if key_id is not None:
        sent["Authorization"] = f"AWS4-HMAC-SHA256 Credential={key_id}/20260101/{region}/s3/aws4_request, Signature=0"
    if payer:
        sent["x-amz-request-payer"] = "requester"
    with contextlib.ExitStack() as stack:
        if connection is None:
            connection = stack.enter_context(contextlib.closing(connect(server)))
        connection.request(method, f"/{server.bucket}/{key}" if key else f"/{server.bucket}", body=body, headers=sent)
        return Answer(connection.getresponse())


def test_a_stranger_who_offers_to_pay_is_served_and_charged(s3: LoopbackS3) -> None:
    etag = s3.put("a/b.npy", CONTENT)
    answer = request(s3, "a/b.npy", Range="bytes=10-19")
    assert (answer.status, answer.body) == (206, CONTENT[10:20])
    assert answer.headers["Content-Range"] == f"bytes 10-19/{len(CONTENT)}"
    assert answer.headers["ETag"] == etag
    assert answer.headers["x-amz-request-charged"] == "requester"
    (entry,) = s3.log
    assert (entry.method, entry.bucket, entry.key, entry.range) == ("GET", s3.bucket, "a/b.npy", "bytes=10-19")
    assert (entry.status, entry.n_bytes, entry.charged) == (206, 10, True)


@pytest.mark.parametrize(
    ("how", "status", "code"),
    [
        ({"payer": False}, 403, "AccessDenied"),
        ({"key_id": None}, 403, "AccessDenied"),
        ({"key_id": "NOBODY"}, 403, "InvalidAccessKeyId"),
        ({"key": "missing"}, 403, "AccessDenied"),
        ({"key": "missing", "key_id": OWNER_KEY_ID}, 404, "NoSuchKey"),
        ({"If_Match": '"other"'}, 412, "PreconditionFailed"),
        ({"Range": f"bytes={len(CONTENT)}-"}, 416, "InvalidRange"),
        ({"method": "PUT", "body": b"x"}, 403, "AccessDenied"),
    ],
)
def test_a_refusal_has_the_status_and_code_of_aws_and_no_byte_of_the_object(
    s3: LoopbackS3, how: dict[str, object], status: int, code: str
) -> None:
    s3.put("k", CONTENT)
    answer = request(s3, **{"key": "k", **how})  # type: ignore[arg-type]
    assert answer.status == status
    assert f"<Code>{code}</Code>".encode() in answer.body
    assert "x-amz-request-charged" not in answer.headers
    assert s3.n_object_bytes == 0
    assert s3.n_bytes == len(answer.body)
    assert s3.content("k") == CONTENT


def test_the_owner_needs_no_offer_and_is_not_charged(s3: LoopbackS3) -> None:
    s3.put("k", CONTENT)
    answer = request(s3, "k", key_id=OWNER_KEY_ID, payer=False)
    assert (answer.status, answer.body) == (200, CONTENT)
    assert "x-amz-request-charged" not in answer.headers


def test_a_free_bucket_serves_unsigned_requests() -> None:
    with LoopbackS3(requester_pays=False, hide_missing=False) as server:
        server.put("k", CONTENT)
        assert request(server, "k", key_id=None, payer=False).body == CONTENT
        assert request(server, "other", key_id=None, payer=False).status == 404


def test_another_bucket_does_not_exist(s3: LoopbackS3) -> None:
    with contextlib.closing(connect(s3)) as connection:
        connection.request("GET", "/elsewhere/k")
        answer = Answer(connection.getresponse())
    assert (answer.status, b"<Code>NoSuchBucket</Code>" in answer.body) == (404, True)


def test_a_head_has_the_headers_and_no_body(s3: LoopbackS3) -> None:
    etag = s3.put("k", CONTENT)
    answer = request(s3, "k", method="HEAD")
    assert (answer.status, answer.body) == (200, b"")
    assert (answer.headers["Content-Length"], answer.headers["ETag"]) == (str(len(CONTENT)), etag)
    assert s3.n_bytes == 0


@pytest.mark.parametrize("key_id", [READER_KEY_ID, None])
def test_the_bucket_tells_its_region_even_where_it_refuses(key_id: str | None) -> None:
    with LoopbackS3(region="eu-west-3", strict_region=True) as server:
        server.put("k", CONTENT)
        answer = request(server, "", method="HEAD", key_id=key_id, region="eu-west-3")
        assert answer.status == (403 if key_id is None else 200)
        assert answer.headers["x-amz-bucket-region"] == "eu-west-3"
        refused = request(server, "k")
        assert (refused.status, refused.headers["x-amz-bucket-region"]) == (400, "eu-west-3")
        assert request(server, "k", region="eu-west-3").body == CONTENT


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[LoopbackS3, http.client.HTTPConnection]]:
    with LoopbackS3() as server, contextlib.closing(connect(server)) as connection:
        yield server, connection


@settings(max_examples=60)
@given(size=st.integers(0, 40), first=st.integers(0, 45) | st.none(), last=st.integers(0, 45) | st.none())
def test_any_single_range_is_what_slicing_gives(
    shared: tuple[LoopbackS3, http.client.HTTPConnection], size: int, first: int | None, last: int | None
) -> None:
    server, connection = shared
    server.put("k", CONTENT[:size])
    header = f"bytes={'' if first is None else first}-{'' if last is None else last}"
    answer = request(server, "k", Range=header, connection=connection)
    if (first is None and last is None) or (first is not None and last is not None and last < first):
        assert (answer.status, answer.body) == (200, CONTENT[:size])  # malformed: ignored, as on S3
        return
    if first is None:
        expected = CONTENT[max(size - last, 0) : size] if last else b""
    else:
        expected = CONTENT[:size][first : None if last is None else last + 1]
    assert (answer.status, answer.body if expected else b"") == (206 if expected else 416, expected)


def test_files_are_served_as_they_are_when_asked_for(s3: LoopbackS3, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(CONTENT * 1000)
    etag = s3.put("x", path)
    answer = request(s3, "x", Range="bytes=1000000-3999999", If_Match=etag)
    assert (answer.status, answer.body) == (206, (CONTENT * 1000)[1_000_000:4_000_000])
    path.write_bytes(b"rewritten")
    assert request(s3, "x", If_Match=etag).status == 412
    assert request(s3, "x").body == b"rewritten"


def test_the_owner_may_store_and_not_overwrite_by_mistake(s3: LoopbackS3) -> None:
    stored = request(s3, "new", method="PUT", key_id=OWNER_KEY_ID, body=CONTENT)
    assert stored.status == 200
    assert request(s3, "new").headers["ETag"] == stored.headers["ETag"]
    again = request(s3, "new", method="PUT", key_id=OWNER_KEY_ID, body=b"x", If_None_Match="*")
    assert (again.status, s3.content("new"), s3.keys()) == (412, CONTENT, ["new"])


def test_connections_are_kept_alive_over_refusals(s3: LoopbackS3) -> None:
    s3.put("k", CONTENT)
    with contextlib.closing(connect(s3)) as connection:
        for key in ("k", "missing", "k"):
            request(s3, key, connection=connection)
    assert len({entry.connection for entry in s3.log}) == 1
    assert [entry.status for entry in s3.log] == [200, 403, 200]


def test_faults_hit_the_requests_they_are_meant_for(s3: LoopbackS3) -> None:
    s3.put("k", CONTENT)
    s3.inject(Fault(status=503), after=1, times=2)
    assert [request(s3, "k").status for _ in range(4)] == [200, 503, 503, 200]
    s3.inject(Fault(status=500, code="InternalError"), when=lambda asked: asked.key == "other")
    assert request(s3, "k").status == 200
    assert request(s3, "other").status == 500
    s3.inject(Fault(status=503), times=10)
    s3.clear_faults()
    assert request(s3, "k").status == 200


@pytest.mark.parametrize("field", ["reset_after", "end_after"])
@pytest.mark.parametrize("n", [0, 3000])
def test_a_broken_body_ends_after_the_bytes_asked_for_and_the_log_says_so(s3: LoopbackS3, field: str, n: int) -> None:
    s3.put("k", CONTENT)
    s3.inject(Fault(reset_after=n) if field == "reset_after" else Fault(end_after=n))
    answer = request(s3, "k")
    assert answer.headers["Content-Length"] == str(len(CONTENT))
    assert answer.body == CONTENT[:n]
    assert isinstance(answer.broken, ConnectionResetError if field == "reset_after" else http.client.IncompleteRead)
    assert s3.n_bytes == n


def test_a_dropped_connection_has_no_answer(s3: LoopbackS3) -> None:
    s3.put("k", CONTENT)
    s3.inject(Fault(drop=True))
    with pytest.raises(ConnectionError):
        request(s3, "k")
    assert [(entry.status, entry.n_bytes) for entry in s3.log] == [(0, 0)]


def test_a_shortened_body_is_honest_about_its_length_alone(s3: LoopbackS3) -> None:
    s3.put("k", CONTENT)
    s3.inject(Fault(shorten_to=5))
    answer = request(s3, "k", Range="bytes=0-99")
    assert (answer.status, answer.body, answer.broken) == (206, CONTENT[:5], None)
    assert answer.headers["Content-Range"] == f"bytes 0-99/{len(CONTENT)}"


def test_a_range_may_be_ignored_and_an_object_replaced(s3: LoopbackS3) -> None:
    etag = s3.put("k", CONTENT)
    s3.inject(Fault(whole=True))
    answer = request(s3, "k", Range="bytes=0-9")
    assert (answer.status, answer.body) == (200, CONTENT)
    s3.inject(Fault(replace=b"another"), after=1)
    assert [request(s3, "k", If_Match=etag).status for _ in range(2)] == [200, 412]


@pytest.mark.parametrize("after", [None, 0, 100])
def test_a_stalled_answer_comes_whole_in_the_end(s3: LoopbackS3, after: int | None) -> None:
    s3.put("k", CONTENT)
    s3.inject(Fault(stall_seconds=0.01, stall_after=after))
    assert request(s3, "k").body == CONTENT


@pytest.mark.parametrize(
    ("options", "fault", "n_bytes"),
    [
        ({"latency_seconds": 600}, Fault(), None),
        ({}, Fault(stall_seconds=600), None),
        ({}, Fault(stall_seconds=600, stall_after=100), 100),
        ({"bytes_per_second": 1}, Fault(), 0),
    ],
)
def test_a_client_waits_as_long_as_it_is_made_to(options: dict[str, float], fault: Fault, n_bytes: int | None) -> None:
    with LoopbackS3(**options) as server, contextlib.closing(connect(server)) as connection:  # type: ignore[arg-type]
        server.put("k", CONTENT)
        server.inject(fault)
        connection.timeout = 0.3
        if n_bytes is None:
            with pytest.raises(TimeoutError):
                request(server, "k", connection=connection)
        else:
            answer = request(server, "k", connection=connection)
            assert answer.body == CONTENT[:n_bytes]
            assert isinstance(answer.broken, TimeoutError)
            assert server.n_bytes == n_bytes


def test_parallel_requests_are_all_counted(s3: LoopbackS3) -> None:
    s3.put("k", CONTENT)

    def ask() -> None:
        for i in range(20):
            assert request(s3, "k", Range=f"bytes={i}-{i + 99}").body == CONTENT[i : i + 100]

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (s3.n_requests, s3.n_bytes, s3.n_object_bytes) == (100, 10_000, 10_000)
    s3.reset_log()
    assert (s3.n_requests, s3.n_bytes) == (0, 0)


def test_it_stops_at_once_whatever_its_clients_do() -> None:
    before = set(threading.enumerate())
    with LoopbackS3() as server:
        server.put("k", bytes(50_000_000))
        server.inject(Fault(stall_seconds=600), when=lambda asked: asked.range == "bytes=0-0")
        idle, unread, stalled = (connect(server) for _ in range(3))
        request(server, "k", connection=idle)
        headers = {"Authorization": f"Credential={READER_KEY_ID}/1/us-east-1/s3", "x-amz-request-payer": "requester"}
        unread.request("GET", f"/{server.bucket}/k", headers=headers)
        stalled.request("GET", f"/{server.bucket}/k", headers={**headers, "Range": "bytes=0-0"})
        unread.getresponse()  # and leave 50 MB in the pipe
    assert set(threading.enumerate()) <= before
    for connection in (idle, unread, stalled):
        connection.close()


def test_boto3_reads_it(s3: LoopbackS3) -> None:
    s3.put("a b+%é.npy", CONTENT)
    client = boto3.client("s3", config=Config(retries={"total_max_attempts": 1}))
    answer = client.get_object(Bucket=s3.bucket, Key="a b+%é.npy", Range="bytes=0-9", RequestPayer="requester")
    with answer["Body"] as body:
        assert body.read() == CONTENT[:10]
    assert answer["ResponseMetadata"]["HTTPHeaders"]["x-amz-request-charged"] == "requester"
    with pytest.raises(ClientError, match="AccessDenied"):
        client.get_object(Bucket=s3.bucket, Key="a b+%é.npy")
    client.close()


def test_as_a_program_it_serves_a_folder_and_says_how_to_reach_it(tmp_path: Path) -> None:
    (tmp_path / "cifar" / "data").mkdir(parents=True)
    (tmp_path / "cifar" / "data" / "x.npy").write_bytes(CONTENT)
    program = [sys.executable, loopback.__file__, "--folder", str(tmp_path)]
    with Child(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(5)]
        exports = dict(line.removeprefix("export ").strip().split("=", 1) for line in lines[1:])
        client = boto3.client(
            "s3",
            endpoint_url=exports["AWS_ENDPOINT_URL_S3"],
            aws_access_key_id=exports["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=exports["AWS_SECRET_ACCESS_KEY"],
            region_name=exports["AWS_REGION"],
        )
        key = "cifar/data/x.npy"
        with client.get_object(Bucket=loopback.BUCKET, Key=key, RequestPayer="requester")["Body"] as body:
            assert body.read() == CONTENT
        client.close()
        os.kill(process.pid, signal.SIGTERM)
        assert process.stdout.read() == f"# served 1 requests, {len(CONTENT)} bytes\n"
    assert process.returncode == 0
