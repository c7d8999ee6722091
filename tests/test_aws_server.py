"""AWS as it is played here: boto3 and obstore find what they would find at AWS, and are refused as there."""

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import boto3
import botocore.exceptions
import obstore
import obstore.exceptions
import pytest
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
