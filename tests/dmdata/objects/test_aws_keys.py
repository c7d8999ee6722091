"""The object that was named, or an error: keys with any characters, versions, addresses that are signed."""

from pathlib import Path

import boto3
import numpy as np
import pytest
from botocore.config import Config
from servers.aws import READER, PlayedAws
from small_release import document, npy, write_catalog

import dmdata
from dmdata.errors import DmdataError

NAME = "toy/50pct/test_margins"
KEYS = (
    "h#2.npy",
    "what?.npy",
    "100%.npy",
    "a%20b.npy",
    "a;b.npy",
    "a+b.npy",
    "a b.npy",
    "é漢.npy",
    "e\u0301.npy",  # not the same key as with the one character
    "x//y.npy",
    "a=b&c=d.npy",
    "it's (one), [two] {three} ~*!$@.npy",
    'say "a|c^d`e<f>".npy',
)


def values(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (40, 5), np.uint8)


def decoys(key: str) -> set[str]:
    """Keys that other readings of an address would lead to."""
    stems = {key.partition("#")[0], key.partition("?")[0], key.partition(";")[0], key.replace("%20", " ")}
    stems |= {key.replace("+", " "), key.replace(" ", "+"), key.replace("//", "/"), key.replace("e\u0301", "é")}
    stems |= {key.replace("/./", "/"), "b.npy", key.replace(" ", "%20"), key.replace("%", "%25")}
    return {stem for stem in stems if stem and stem != key}


@pytest.fixture(params=KEYS)
def key(request: pytest.FixtureRequest, aws: PlayedAws) -> str:
    """The key of an object, next to whatever might be taken for it."""
    named: str = request.param
    aws.own.put(named, npy(values(0)))
    for nth, decoy in enumerate(decoys(named), 1):
        aws.own.put(decoy, npy(values(nth)))
    return named


def assert_read(opened: dmdata.LazyArray, aws: PlayedAws, key: str) -> None:
    np.testing.assert_array_equal(opened[3], values(0)[3])
    np.testing.assert_array_equal(opened[:, 2], values(0)[:, 2])
    np.testing.assert_array_equal(opened[...], values(0))
    assert {request.key for request in aws.log if request.key} == {key}
    assert {request.status for request in aws.log if request.key} == {206}


def test_a_key_of_a_catalog_is_asked_for_as_it_is(aws: PlayedAws, key: str, tmp_path: Path) -> None:
    about = document({NAME: values(0)}, url=f"s3://{aws.own.name}", requester_pays=True)
    about["datasets"]["toy"]["alphas"]["50pct"]["arrays"]["test_margins"]["key"] = key
    assert_read(dmdata.open(NAME, catalog=write_catalog(about, tmp_path)), aws, key)


def test_a_key_in_an_address_is_asked_for_as_it_is(aws: PlayedAws, key: str, tmp_path: Path) -> None:
    address = f"s3://{aws.own.name}/{key}"
    assert_read(dmdata.open(address), aws, key)


@pytest.mark.parametrize("key", ["a/./b.npy", "a/../b.npy"])
def test_a_key_with_parts_that_browsers_take_away_is_read_or_refused(aws: PlayedAws, key: str) -> None:
    aws.own.put(key, npy(values(0)))
    aws.own.put("b.npy", npy(values(1)))
    aws.own.put("a/b.npy", npy(values(2)))
    try:
        read = dmdata.open(f"s3://{aws.own.name}/{key}")[...]
    except DmdataError:
        return
    np.testing.assert_array_equal(read, values(0))


def test_a_version_is_the_one_that_was_asked_for(aws: PlayedAws) -> None:
    kept = aws.make("kept", account=READER, versioning=True)
    kept.put("x.npy", npy(values(0)))
    kept.put("x.npy", npy(values(1)))
    old, new = kept.versions("x.npy")
    for version, seed in ((old, 0), (new, 1)):
        opened = dmdata.open(f"s3://kept/x.npy?versionId={version}")
        np.testing.assert_array_equal(opened[...], values(seed))
        np.testing.assert_array_equal(opened[3], values(seed)[3])
    with pytest.raises(DmdataError):
        dmdata.open("s3://kept/x.npy?versionId=none-such")
    np.testing.assert_array_equal(dmdata.open("s3://kept/x.npy")[...], values(1))


def test_an_object_that_is_replaced_is_noticed(aws: PlayedAws) -> None:
    aws.own.put("x.npy", npy(values(0)))
    opened = dmdata.open(f"s3://{aws.own.name}/x.npy")
    aws.own.put("x.npy", npy(values(1)))
    with pytest.raises(dmdata.errors.IntegrityError):
        opened[...]


@pytest.mark.parametrize("key", ["x.npy", "a b#c.npy"])
def test_a_presigned_address_is_read_by_ranges(aws: PlayedAws, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    aws.own.put(key, npy(values(0)))
    session = boto3.session.Session()  # the default one would keep these keys for the tests that follow
    client = session.client("s3", region_name="us-east-1", config=Config(signature_version="s3v4"))
    url = client.generate_presigned_url("get_object", Params={"Bucket": aws.own.name, "Key": key}, ExpiresIn=60)
    for name in aws.reader.env:
        monkeypatch.delenv(name)
    opened = dmdata.open(url)
    np.testing.assert_array_equal(opened[3], values(0)[3])
    np.testing.assert_array_equal(opened[...], values(0))
    assert {request.method for request in aws.log} == {"GET"}
    assert all(request.range for request in aws.log)
    assert "Signature" not in str(opened)
    aws.keys.clock_ahead_seconds = 120
    with pytest.raises(DmdataError, match="expired"):
        opened[...]


@pytest.mark.parametrize("prefix", ["a b", "a#b", "a%20b", "a+b", "é", "a?b"])
def test_a_copy_is_made_below_the_prefix_that_was_named(aws: PlayedAws, tmp_path: Path, prefix: str) -> None:
    np.save(tmp_path / "x.npy", values(0))
    opened = dmdata.open(tmp_path / "x.npy")
    copy = opened.mirror(f"s3://{aws.own.name}/{prefix}/one.zarr")
    np.testing.assert_array_equal(np.asarray(copy[...]), values(0))
    assert {stored.partition("/")[0] for stored in sorted(aws.own.keys())} == {prefix}
