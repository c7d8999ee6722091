"""A header is read once, remembered while the object stays the same, and never remembered when it is damaged."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from servers.loopback import BUCKET, Fault, LoopbackS3
from small_release import npy, publish

import dmdata
from dmdata.errors import FormatError, IntegrityError
from dmdata.money.ledger import home

NAME = "toy/50pct/test_margins"
VALUES = np.arange(60, dtype=np.float16).reshape(12, 5)


@pytest.fixture
def catalog(s3: LoopbackS3, tmp_path: Path) -> str:
    return publish(s3, {NAME: VALUES}, tmp_path)


def key() -> str:
    return "toy/data/test_margins_50pct.npy"


def remembered() -> list[Path]:
    return sorted((home() / "headers").glob("*"))


def test_a_second_open_sends_nothing(s3: LoopbackS3, catalog: str) -> None:
    dmdata.open(NAME, catalog=catalog).read_header()
    assert [request.range for request in s3.log] == ["bytes=0-127"]
    again = dmdata.open(NAME, catalog=catalog).read_header()
    assert s3.n_requests == 1
    np.testing.assert_array_equal(again[...], VALUES)


def test_another_process_remembers_too(s3: LoopbackS3, catalog: str) -> None:
    dmdata.open(NAME, catalog=catalog).read_header()
    program = f"import dmdata; print(dmdata.open({NAME!r}, catalog={catalog!r}).read_header().shape)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(12, 5)"
    assert s3.n_requests == 1


def test_two_servers_with_the_same_bucket_are_told_apart(
    s3: LoopbackS3, catalog: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dmdata.open(NAME, catalog=catalog).read_header()
    with LoopbackS3() as other:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", other.endpoint_url)
        other.put(key(), npy(VALUES.astype(np.float32)))
        with pytest.warns(dmdata.CatalogMismatchWarning):
            assert dmdata.open(NAME, catalog=catalog).read_header().dtype == np.float32


def test_an_object_that_changed_fails_the_read_and_the_next_open_works(s3: LoopbackS3, catalog: str) -> None:
    array = dmdata.open(NAME, catalog=catalog).read_header()
    s3.put(key(), npy(VALUES + 1))
    with pytest.raises(IntegrityError, match="changed since it was first read") as caught:
        array[...]
    assert caught.value.url == f"s3://{BUCKET}/{key()}"
    np.testing.assert_array_equal(dmdata.open(NAME, catalog=catalog).read_header()[...], VALUES + 1)
    with pytest.raises(IntegrityError):
        array[...]


def test_an_object_that_changes_between_two_ranges_of_one_read_fails_it(s3: LoopbackS3, catalog: str) -> None:
    wide = np.zeros((12, 40_000), np.float16)
    s3.put(key(), npy(wide))
    with pytest.warns(dmdata.CatalogMismatchWarning):
        array = dmdata.open(NAME, catalog=catalog).read_header()
    s3.inject(Fault(replace=npy(wide + 1)), after=3)
    with pytest.raises(IntegrityError):
        array[:, 7]
    (note,) = remembered()
    assert "layouts" not in note.read_text(), "of the header nothing; only which ETag is gone"


def test_a_header_and_a_catalog_that_disagree_are_both_named(s3: LoopbackS3, catalog: str) -> None:
    s3.put(key(), npy(VALUES[:7]))
    with pytest.warns(dmdata.CatalogMismatchWarning, match=r"\(12, 5\).*\(7, 5\).*is believed"):
        array = dmdata.open(NAME, catalog=catalog).read_header()
    np.testing.assert_array_equal(array[...], VALUES[:7])


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"short",
        npy(VALUES)[:-1],
        npy(VALUES)[:100],
        npy(VALUES).replace(b"(12, 5)", b"(12, 6)"),
        npy(VALUES).replace(b"<f2", b"|O8"),
        b"<html>" * 100,
    ],
)
def test_a_damaged_object_is_named_and_nothing_of_it_is_remembered(s3: LoopbackS3, catalog: str, blob: bytes) -> None:
    s3.put(key(), blob)
    for _ in range(2):
        with pytest.raises(FormatError, match=f"s3://{BUCKET}/{key()}") as caught:
            dmdata.open(NAME, catalog=catalog).read_header()
        assert caught.value.url == f"s3://{BUCKET}/{key()}"
        assert not remembered()
    assert dmdata.spend().n_bytes == s3.n_object_bytes
    s3.put(key(), npy(VALUES))
    np.testing.assert_array_equal(dmdata.open(NAME, catalog=catalog).read_header()[...], VALUES)


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"layouts": {"": 3}}', "\x00", '{"layouts": [], "etag": 1}'])
def test_a_damaged_memory_is_ignored(s3: LoopbackS3, catalog: str, damage: str) -> None:
    dmdata.open(NAME, catalog=catalog).read_header()
    (path,) = remembered()
    path.write_text(damage)
    np.testing.assert_array_equal(dmdata.open(NAME, catalog=catalog).read_header()[...], VALUES)
    assert json.loads(path.read_text())["facts"]["n_bytes"] == len(npy(VALUES))


def test_files_of_this_machine_are_never_remembered(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", VALUES)
    assert dmdata.open(tmp_path / "x.npy").shape == (12, 5)
    np.save(tmp_path / "x.npy", VALUES[:3])
    assert dmdata.open(tmp_path / "x.npy").shape == (3, 5)
    assert not remembered()


def test_where_nothing_can_be_remembered_the_header_is_read_each_time(s3: LoopbackS3, catalog: str) -> None:
    home().mkdir()
    (home() / "headers").write_text("in the way")
    for n_requests in (1, 2):
        assert dmdata.open(NAME, catalog=catalog).read_header().shape == (12, 5)
        assert s3.n_requests == n_requests


def test_what_is_remembered_holds_no_credentials(s3: LoopbackS3, catalog: str) -> None:
    dmdata.open(NAME, catalog=catalog).read_header()
    (path,) = remembered()
    assert path.parent == home() / "headers"
    assert not [value for name, value in s3.env.items() if "KEY" in name and value in path.read_text()]
