"""Objects put into a bucket in parts; what needs a bucket is in test_live_publish.py."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmdata.errors import AccessError, SourceError
from dmdata.objects import uploads
from dmdata.objects.uploads import EtagDigest, Uploads, part_bytes

MIB = 1 << 20


@given(st.integers(0, 5 << 40))
def test_any_object_fits_into_ten_thousand_parts_that_s3_takes(n_bytes):
    assert 5 * MIB <= part_bytes(n_bytes) <= 5 << 30
    assert -(-n_bytes // part_bytes(n_bytes)) <= 10_000
    assert part_bytes(n_bytes) % MIB == 0


@given(st.binary(max_size=100), st.integers(1, 40), st.integers(1, 40))
def test_an_etag_is_that_of_s3_however_the_bytes_come(data, part, step):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploads, "part_bytes", lambda _: part)
        digest = EtagDigest(len(data))
    for start in range(0, len(data), step):
        digest.write(data[start : start + step])
    parts = [md5(data[start : start + part]) for start in range(0, len(data), part)]
    whole = md5(b"".join(parts)).hex()
    assert digest.etag == (md5(data).hex() if len(data) <= part else f"{whole}-{len(parts)}")


def md5(data):
    return hashlib.md5(data, usedforsecurity=False).digest()


def test_without_credentials_nothing_is_begun(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(AccessError, match="no AWS credentials were found to write s3://bucket/x"):
        Uploads("s3://bucket/x")


def test_an_address_without_a_bucket_is_refused():
    with pytest.raises(SourceError, match="names no bucket"):
        Uploads("s3://")
