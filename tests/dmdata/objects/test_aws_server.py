"""AWS as it is played here: boto3 and obstore find what they would find at AWS, and are refused as there."""

import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import boto3
import botocore.exceptions
import obstore
import obstore.exceptions
import pytest
import urllib3
from botocore import UNSIGNED
from botocore.config import Config
from obstore.store import S3Store
from servers.aws import READER, Bill, PlayedAws
from servers.aws_calls import Key
from servers.loopback import BUCKET, Fault

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

BODY = bytes(range(256)) * 40
KEYS = ("plain.npy", "a b+c.npy", "h#q?p%25;e.npy", "dir//twice", "/leading", "unicode-é-漢.npy", "a%20b", "x=1&y=2")
PAYS: dict[str, Any] = {"RequestPayer": "requester"}


def client(key: Key | None = None, *, region: str = "us-east-1", **options: Any) -> "S3Client":
    names = {"aws_access_key_id": key.key_id, "aws_secret_access_key": key.secret} if key else {}
    token = {"aws_session_token": key.token} if key and key.token else {}
    config = Config(retries={"total_max_attempts": 1}, **options)  # type: ignore[arg-type]
    return boto3.session.Session().client("s3", region_name=region, config=config, **names, **token)


def store(key: Key, bucket: str = BUCKET, *, region: str = "us-east-1", **options: Any) -> Any:
    options = {"request_payer": True} | options
    if key.token:
        options["session_token"] = key.token
    secret = {"access_key_id": key.key_id, "secret_access_key": key.secret}
    return S3Store(bucket, region=region, **secret, retry_config={"max_retries": 0}, **options)  # type: ignore[arg-type]


def code_of(work: Callable[[], Any]) -> tuple[int, str]:
    with pytest.raises(botocore.exceptions.ClientError) as caught:
        work()
    return caught.value.response["ResponseMetadata"]["HTTPStatusCode"], caught.value.response["Error"]["Code"]


@pytest.mark.parametrize("style", ["path", "virtual"])
@pytest.mark.parametrize("key", KEYS)
def test_both_clients_read_a_key_by_both_host_styles(aws: PlayedAws, key: str, style: str) -> None:
    aws.release.put(key, BODY)
    got = client(s3={"addressing_style": style}).get_object(Bucket=BUCKET, Key=key, Range="bytes=5-14", **PAYS)
    assert (got["Body"].read(), got["RequestCharged"]) == (BODY[5:15], "requester")
    if "//" not in key and not key.startswith("/"):  # obstore's paths have no empty parts
        opened = store(aws.reader, virtual_hosted_style_request=style == "virtual")
        assert bytes(opened.get_range(key, start=5, end=15)) == BODY[5:15]
    assert {(request.key, request.status, request.n_bytes) for request in aws.log} == {(key, 206, 10)}
    assert {request.is_by_host for request in aws.log} == {style == "virtual"}
    assert aws.bill(aws.release) == Bill(len(aws.log), 10 * len(aws.log))


def test_a_bucket_whose_name_has_dots_fails_as_a_host_and_is_read_by_path(aws: PlayedAws) -> None:
    dotted = aws.make("a.name.with.dots", public=True)
    dotted.put("x.npy", BODY)
    with pytest.raises(obstore.exceptions.BaseError):
        store(aws.reader, dotted.name, virtual_hosted_style_request=True).get_range("x.npy", start=0, end=9)
    assert aws.log == ()
    deadline = time.monotonic() + 5
    while not aws.tunnels and time.monotonic() < deadline:  # the server may notice after the client has failed
        time.sleep(0.01)
    assert [tunnel.outcome for tunnel in aws.tunnels] == ["not trusted"]
    assert bytes(store(aws.reader, dotted.name).get_range("x.npy", start=0, end=9)) == BODY[:9]
    assert client().get_object(Bucket=dotted.name, Key="x.npy")["Body"].read() == BODY
    assert not any(request.is_by_host for request in aws.log)


def test_a_bucket_elsewhere_says_where_it_is(aws: PlayedAws) -> None:
    far = aws.make("far-away", region="eu-central-1")
    far.put("x", BODY)
    for style in ("path", "virtual"):
        answer = client(s3={"addressing_style": style}).get_object(Bucket=far.name, Key="x")  # botocore follows
        assert answer["Body"].read() == BODY
    assert {request.status for request in aws.log} == {301, 200, 400}
    aws.reset_log()
    unsigned = client(signature_version=UNSIGNED)
    with pytest.raises(botocore.exceptions.ClientError) as caught:
        unsigned.head_bucket(Bucket=far.name)
    assert caught.value.response["ResponseMetadata"]["HTTPHeaders"]["x-amz-bucket-region"] == "eu-central-1"
    with pytest.raises(obstore.exceptions.BaseError, match="region"):
        store(aws.reader, far.name).get_range("x", start=0, end=9)
    assert bytes(store(aws.reader, far.name, region="eu-central-1").get_range("x", start=0, end=9)) == BODY[:9]


def test_credentials_are_refused_with_the_codes_of_aws(aws: PlayedAws) -> None:
    aws.release.put("x", BODY)

    def read(key: Key) -> Callable[[], Any]:
        return lambda: client(key).get_object(Bucket=BUCKET, Key="x", **PAYS)["Body"].read()

    session = aws.keys.issue(READER, seconds=60)
    assert read(session)() == BODY
    assert bytes(store(session).get_range("x", start=0, end=9)) == BODY[:9]
    assert {request.key_id for request in aws.log} == {session.key_id}
    wrong = {
        Key(aws.reader.key_id, "wrong", READER): (403, "SignatureDoesNotMatch"),
        Key("AKIANOBODY", "wrong", READER): (403, "InvalidAccessKeyId"),
        Key(session.key_id, session.secret, READER, "another token"): (400, "InvalidToken"),
        Key(session.key_id, session.secret, READER): (400, "InvalidToken"),
    }
    for key, refused in wrong.items():
        assert code_of(read(key)) == refused
    with pytest.raises(obstore.exceptions.BaseError, match="SignatureDoesNotMatch"):
        store(Key(aws.reader.key_id, "wrong", READER)).get_range("x", start=0, end=9)
    aws.keys.expire(session)
    assert code_of(read(session)) == (400, "ExpiredToken")
    aws.keys.clock_ahead_seconds = 3600
    assert code_of(read(aws.reader)) == (403, "RequestTimeTooSkewed")


def test_who_does_not_offer_to_pay_is_refused_and_not_charged(aws: PlayedAws) -> None:
    aws.release.put("x", BODY)
    assert code_of(lambda: client().get_object(Bucket=BUCKET, Key="x")) == (403, "AccessDenied")
    assert code_of(lambda: client().get_object(Bucket=BUCKET, Key="no", **PAYS)) == (403, "AccessDenied")
    assert code_of(lambda: client().put_object(Bucket=BUCKET, Key="y", Body=b"", **PAYS)) == (403, "AccessDenied")
    assert code_of(lambda: client().get_object(Bucket="nothing-there", Key="x")) == (404, "NoSuchBucket")
    assert aws.bill(aws.release) == Bill()
    assert client(aws.owner).get_object(Bucket=BUCKET, Key="x")["Body"].read() == BODY
    assert code_of(lambda: client(aws.owner).get_object(Bucket=BUCKET, Key="no")) == (404, "NoSuchKey")
    assert aws.bill(aws.release) == Bill()


def test_a_presigned_url_is_checked_and_expires(aws: PlayedAws) -> None:
    aws.own.put("a b#c", BODY)
    where = {"Bucket": aws.own.name, "Key": "a b#c"}
    url = client(signature_version="s3v4").generate_presigned_url("get_object", Params=where, ExpiresIn=60)
    with urllib3.ProxyManager(aws.proxy_url, ca_certs=aws.authority.bundle) as pool:

        def ask(address: str) -> tuple[int, bytes]:
            answer = pool.request("GET", address, headers={"Range": "bytes=0-9"}, retries=False)
            return answer.status, answer.data

        assert ask(url) == (206, BODY[:10])
        assert ask(url.replace("Signature=", "Signature=0"))[0] == 403
        aws.keys.clock_ahead_seconds = 120
        status, document = ask(url)
        assert status == 403
        assert b"Request has expired" in document


def test_versions_conditions_and_archives(aws: PlayedAws) -> None:
    kept = aws.make("kept", account=READER, versioning=True)
    kept.put("x", b"old")
    kept.put("x", b"new")
    old, new = kept.versions("x")
    read = client().get_object
    assert read(Bucket="kept", Key="x", VersionId=old)["Body"].read() == b"old"
    answer = read(Bucket="kept", Key="x")
    assert (answer["Body"].read(), answer["VersionId"]) == (b"new", new)
    assert code_of(lambda: read(Bucket="kept", Key="x", VersionId="none")) == (404, "NoSuchVersion")
    assert code_of(lambda: read(Bucket="kept", Key="x", IfMatch='"other"')) == (412, "PreconditionFailed")
    assert code_of(lambda: read(Bucket="kept", Key="x", Range="bytes=9-")) == (416, "InvalidRange")
    kept.put("cold", BODY, storage_class="GLACIER")
    assert code_of(lambda: read(Bucket="kept", Key="cold")) == (403, "InvalidObjectState")
    assert client().head_object(Bucket="kept", Key="cold")["StorageClass"] == "GLACIER"


def test_objects_are_written_whole_and_in_parts_listed_and_deleted(aws: PlayedAws) -> None:
    mine, name, large = client(), aws.own.name, BODY * 600
    for key in KEYS:
        mine.put_object(Bucket=name, Key=key, Body=BODY)  # with a trailing checksum, as boto3 does it now
    assert set(aws.own.keys()) == set(KEYS)
    store(aws.reader, name).put("by obstore", BODY)
    obstore.put(store(aws.reader, name), "large", large, chunk_size=5 << 20)
    assert (aws.own.content("by obstore"), aws.own.content("large")) == (BODY, large)
    pages = mine.get_paginator("list_objects_v2").paginate(Bucket=name, PaginationConfig={"PageSize": 3})
    assert [entry["Key"] for page in pages for entry in page["Contents"]] == aws.own.keys()
    listed = mine.list_objects_v2(Bucket=name, Delimiter="/", Prefix="d")
    assert [entry["Prefix"] for entry in listed["CommonPrefixes"]] == ["dir/"]
    upload = mine.create_multipart_upload(Bucket=name, Key="in parts")["UploadId"]
    part = mine.upload_part(Bucket=name, Key="in parts", UploadId=upload, PartNumber=1, Body=BODY)
    parts = mine.list_parts(Bucket=name, Key="in parts", UploadId=upload)["Parts"]
    assert [found["Size"] for found in parts] == [len(BODY)]
    assert [found["Key"] for found in mine.list_multipart_uploads(Bucket=name)["Uploads"]] == ["in parts"]
    done: Any = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    mine.complete_multipart_upload(Bucket=name, Key="in parts", UploadId=upload, MultipartUpload=done)
    assert aws.own.content("in parts") == BODY
    assert code_of(lambda: mine.list_parts(Bucket=name, Key="in parts", UploadId=upload)) == (404, "NoSuchUpload")
    mine.delete_object(Bucket=name, Key="in parts")
    obstore.delete(store(aws.reader, name), ["by obstore", "large"])
    assert set(aws.own.keys()) == set(KEYS)


def test_faults_happen_as_often_as_was_asked_for(aws: PlayedAws) -> None:
    aws.own.put("x", BODY)

    def read() -> bytes:
        return client().get_object(Bucket=aws.own.name, Key="x")["Body"].read()

    aws.inject(Fault(status=503), times=1)
    assert code_of(read) == (503, "SlowDown")
    assert read() == BODY
    for fault in (Fault(drop=True), Fault(reset_after=100), Fault(end_after=100)):
        aws.inject(fault)
        with pytest.raises((botocore.exceptions.BotoCoreError, OSError)):
            read()
    assert read() == BODY


def test_what_is_not_at_aws_is_not_reached(aws: PlayedAws) -> None:
    with pytest.raises(botocore.exceptions.ProxyConnectionError):
        client(region="mars-north-1").head_bucket(Bucket=BUCKET)
    assert [tunnel.outcome for tunnel in aws.tunnels] == ["no such host"]


def test_its_threads_end_with_it_however_clients_behave(aws: PlayedAws) -> None:
    before = threading.active_count()
    with PlayedAws(aws.authority) as other:
        silent = socket.create_connection(("127.0.0.1", int(other.proxy_url.rpartition(":")[2])))
        tunnel = socket.create_connection(silent.getpeername())
        tunnel.sendall(b"CONNECT s3.us-east-1.amazonaws.com:443 HTTP/1.1\r\nHost: s3\r\n\r\n")
        assert b"200" in tunnel.recv(100)
        time.sleep(0.05)
    silent.close()
    tunnel.close()
    assert threading.active_count() == before
