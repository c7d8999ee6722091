"""Mirrors into a bucket of one's own, on a real S3 server: Ceph's gateway."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import zarr
from small_release import document, key_of, npy, write_catalog
from zarr.storage import ObjectStore

import dmdata
from dmdata.cli.command import main
from dmdata.copying.place import LEASE, Place
from dmdata.errors import AccessError, DmdataError
from dmdata.objects.s3 import writable_store

if TYPE_CHECKING:
    from conftest import LiveS3

pytestmark = pytest.mark.live

BUCKET = "mirrors-of-the-reader"
NAME = "toy/50pct/test_margins"
MASKS = "toy/50pct/train_masks"
VALUES = {
    NAME: np.random.default_rng(0).normal(size=(400, 3000)).astype(np.float16),
    MASKS: np.random.default_rng(1).random((300, 70)) < 0.5,
}


@pytest.fixture
def catalog(live_s3: "LiveS3", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A catalog whose arrays a stranger pays for, and a bucket of the stranger's own to mirror them to."""
    prefix = "tests/mirrors"
    keys = {name: f"{prefix}/{key_of(name, values)}" for name, values in VALUES.items()}
    for name, key in keys.items():
        live_s3.owner.put_object(Bucket=live_s3.bucket, Key=key, Body=npy(VALUES[name]), ACL="authenticated-read")
    live_s3.reader.create_bucket(Bucket=BUCKET)
    for name, value in live_s3.reader_env.items():
        monkeypatch.setenv(name, value)
    about = document(VALUES, url=f"s3://{live_s3.bucket}/{prefix}", requester_pays=True)
    yield write_catalog(about, tmp_path)
    for key in keys.values():
        live_s3.owner.delete_object(Bucket=live_s3.bucket, Key=key)
    for page in live_s3.reader.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for entry in page.get("Contents", []):
            live_s3.reader.delete_object(Bucket=BUCKET, Key=entry["Key"])


def keys_in(live_s3: "LiveS3", prefix: str) -> set[str]:
    answer = live_s3.reader.list_objects_v2(Bucket=BUCKET, Prefix=prefix)
    return {entry["Key"].removeprefix(prefix) for entry in answer.get("Contents", [])}


def test_a_mirror_in_a_bucket_is_gone_on_with_and_verified(
    live_s3: "LiveS3", catalog: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"s3://{BUCKET}/one.zarr"
    done = []

    def stop(progress: object) -> None:
        done.append(progress)
        if len(done) == 2:
            raise KeyboardInterrupt

    array = dmdata.open(NAME, catalog=catalog).read_header()
    with pytest.raises(KeyboardInterrupt):
        array.mirror(url, memory_bytes=1 << 20, progress=stop)
    assert "zarr.json" in keys_in(live_s3, "one.zarr/")
    copy = array.mirror(url, memory_bytes=1 << 20)
    np.testing.assert_array_equal(np.asarray(copy[...]), VALUES[NAME])
    assert dmdata.spend().n_bytes == len(npy(VALUES[NAME]))
    assert LEASE not in keys_in(live_s3, "one.zarr/")
    plain = zarr.open_array(ObjectStore(writable_store(url), read_only=True), mode="r")
    np.testing.assert_array_equal(np.asarray(plain[:, 7]), VALUES[NAME][:, 7])
    with pytest.raises(SystemExit) as ended:
        main(["verify", url, "--catalog", catalog, "--json"])
    assert ended.value.code == 0
    live_s3.reader.put_object(Bucket=BUCKET, Key="one.zarr/c/1/0", Body=b"short")
    (found,) = dmdata.verify(url, repair=True, catalog=catalog)
    assert found.damaged == (1,)
    array.mirror(url)
    assert dmdata.verify(url, whole=True, catalog=catalog)[0].is_same


def test_a_group_is_mirrored_into_a_bucket(catalog: str) -> None:
    url = f"s3://{BUCKET}/group.zarr"
    group = dmdata.mirror("toy/50pct/*", url, catalog=catalog, rows=[5, 2, 9])
    for name, values in VALUES.items():
        np.testing.assert_array_equal(np.asarray(group[name][...]), values[[5, 2, 9]])  # type: ignore[index] # an array
    assert [found.is_same for found in dmdata.verify(url, whole=True, catalog=catalog)] == [True, True]


def test_a_bucket_is_written_by_one_machine_at_a_time(
    live_s3: "LiveS3", catalog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{BUCKET}/two.zarr"
    with Place.of(url).claimed():
        with monkeypatch.context() as patch:
            patch.setenv("DMDATA_HOME", str(tmp_path / "another machine"))
            with pytest.raises(DmdataError, match=r"another process, on .*, is writing"):
                dmdata.mirror(NAME, url, catalog=catalog)
        body = live_s3.reader.get_object(Bucket=BUCKET, Key=f"two.zarr/{LEASE}")["Body"].read()
    # as a machine leaves it that died long ago, or just now with this very home
    for facts in ({"at": 0.0, "home": "elsewhere:/home"}, {}):
        live_s3.reader.put_object(
            Bucket=BUCKET, Key=f"two.zarr/{LEASE}", Body=json.dumps(json.loads(body) | facts).encode()
        )
        dmdata.mirror(NAME, url, catalog=catalog, rows=slice(0, 400))


def test_a_bucket_that_may_not_be_written_is_named(
    live_s3: "LiveS3", catalog: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url, answer in (
        (f"s3://{live_s3.bucket}/mirrors/x.zarr", "AccessDenied"),
        ("s3://no-such-bucket-at-all/x.zarr", "NoSuchBucket"),
    ):
        with pytest.raises(DmdataError, match=rf"{url} .*{answer}") as caught:
            dmdata.mirror(NAME, url, catalog=catalog)
        assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)
    assert dmdata.spend().n_bytes <= 128
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(AccessError, match="no AWS credentials"):
        Place.of(f"s3://{BUCKET}/x.zarr").store()


def test_a_cluster_writes_into_a_bucket(catalog: str, dmdata_home: Path) -> None:
    distributed = pytest.importorskip("distributed")
    url = f"s3://{BUCKET}/three.zarr"
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0", silence_logs="CRITICAL"
    ) as cluster:
        copy = dmdata.mirror(NAME, url, catalog=catalog, memory_bytes=1 << 20, scheduler=cluster.scheduler_address)
    np.testing.assert_array_equal(np.asarray(copy[...]), VALUES[NAME])  # type: ignore[index] # an array
    assert dmdata.spend().n_bytes == len(npy(VALUES[NAME]))
    assert not list((dmdata_home / "spools").iterdir())
