"""The real server enforces what the release's bucket enforces, and the gate does not pass without it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError

if TYPE_CHECKING:
    from conftest import LiveS3

HERE = Path(__file__)
PAY: dict[str, Any] = {"RequestPayer": "requester"}


@pytest.fixture
def key(live_s3: "LiveS3", request: pytest.FixtureRequest) -> str:
    name = f"tests/{request.node.name}"
    live_s3.owner.put_object(Bucket=live_s3.bucket, Key=name, Body=bytes(range(100)), ACL="authenticated-read")
    return name


def refusal(live_s3: "LiveS3", **how: Any) -> tuple[int, str]:
    with pytest.raises(ClientError) as caught:
        live_s3.reader.get_object(Bucket=live_s3.bucket, **how)
    response = caught.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]


@pytest.mark.live
def test_a_stranger_who_offers_to_pay_is_served_and_charged(live_s3: "LiveS3", key: str) -> None:
    answer = live_s3.reader.get_object(Bucket=live_s3.bucket, Key=key, Range="bytes=10-19", **PAY)
    with answer["Body"] as body:
        assert body.read() == bytes(range(10, 20))
    metadata = answer["ResponseMetadata"]
    assert metadata["HTTPStatusCode"] == 206
    assert metadata["HTTPHeaders"]["content-range"] == "bytes 10-19/100"
    assert metadata["HTTPHeaders"]["x-amz-request-charged"] == "requester"


@pytest.mark.live
def test_a_stranger_is_refused_without_the_offer(live_s3: "LiveS3", key: str) -> None:
    assert refusal(live_s3, Key=key) == (403, "AccessDenied")


@pytest.mark.live
def test_a_stranger_cannot_tell_a_missing_key_from_a_forbidden_one(live_s3: "LiveS3", key: str) -> None:
    assert refusal(live_s3, Key=key + "-missing", **PAY) == (403, "AccessDenied")


@pytest.mark.live
def test_an_object_that_changed_fails_its_precondition(live_s3: "LiveS3", key: str) -> None:
    etag = live_s3.reader.head_object(Bucket=live_s3.bucket, Key=key, **PAY)["ETag"]
    live_s3.owner.put_object(Bucket=live_s3.bucket, Key=key, Body=b"other", ACL="authenticated-read")
    assert refusal(live_s3, Key=key, IfMatch=etag, **PAY) == (412, "PreconditionFailed")


@pytest.mark.live
def test_a_range_behind_the_end_is_refused(live_s3: "LiveS3", key: str) -> None:
    assert refusal(live_s3, Key=key, Range="bytes=100-109", **PAY) == (416, "InvalidRange")


@pytest.mark.live
def test_a_stranger_may_not_write(live_s3: "LiveS3", key: str) -> None:
    with pytest.raises(ClientError, match="AccessDenied"):
        live_s3.reader.put_object(Bucket=live_s3.bucket, Key=key, Body=b"", **PAY)


@pytest.mark.parametrize(("required", "code", "says"), [("", 0, "skipped"), ("browser,live", 1, "this must run")])
def test_a_live_test_without_the_server_is_skipped_unless_required(required: str, code: int, says: str) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("S3_", "OWNER_", "READER_"))}
    program = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "live", str(HERE)]
    done = subprocess.run(
        [*program, "-k", "offer"],
        cwd=HERE.parents[3],
        env={**env, "DMDATA_TESTS_REQUIRE": required},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout
    assert says in done.stdout
    assert 'eval "$(tests/servers/requester-pays-s3 up)"' in done.stdout
