"""Bytes come whole or not at all, and every refusal is translated once, into what to do and without any secret."""

import logging
import os
import pickle
import subprocess
import sys
import traceback
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from servers.loopback import BUCKET, OWNER_KEY_ID, Fault, LoopbackS3
from small_release import npy, publish

import dmdata
from dmdata.errors import AccessError, CatalogError, DmdataError, IntegrityError, ObjectMissingError, SourceError
from dmdata.objects.address import Address, Source
from dmdata.objects.aws import terms_of
from dmdata.objects.source import connect

CONTENT = bytes(range(256)) * 40
SECRET = "an+entirely/secret+value"
TOKEN = "a+token/nobody+may+see"


def never() -> bool:
    return False


def read(source: Source, start: int, stop: int, *, etag: str | None = None) -> bytes:
    parts: list[bytes] = []
    source.read(start, stop, etag=etag, put=lambda chunk: parts.append(chunk.tobytes()), stopped=never)
    return b"".join(parts)


@pytest.fixture(params=["file", "memory", "s3"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Address:
    """The same bytes in a local file, in fsspec's memory, and in a requester-pays bucket."""
    if request.param == "file":
        (tmp_path / "x.bin").write_bytes(CONTENT)
        return Address(str(tmp_path / "x.bin"))
    if request.param == "memory":
        fsspec.filesystem("memory").pipe("/tests/x.bin", CONTENT)
        return Address("memory://tests/x.bin")
    request.getfixturevalue("s3").put("x.bin", CONTENT)
    return Address(f"s3://{BUCKET}/x.bin", requester_pays=True)


def test_any_range_of_any_source_is_read(stored: Address) -> None:
    source = connect(stored)
    head, state = source.start(128)
    assert (head, state.n_bytes) == (CONTENT[:128], len(CONTENT))
    assert state.etag
    assert source.start(10**6)[0] == CONTENT
    for start, stop in ((0, 1), (100, 4000), (len(CONTENT) - 1, len(CONTENT))):
        assert read(source, start, stop, etag=state.etag) == CONTENT[start:stop]


def test_a_range_behind_the_end_is_an_error_of_any_source(stored: Address) -> None:
    source = connect(stored)
    for start, stop in ((len(CONTENT) - 5, len(CONTENT) + 5), (len(CONTENT) + 5, len(CONTENT) + 9)):
        with pytest.raises(SourceError, match="ended"):
            read(source, start, stop)


def test_another_etag_is_an_error_of_any_source(stored: Address) -> None:
    with pytest.raises(IntegrityError, match="open it again"):
        read(connect(stored), 0, 4, etag='"another"')


def test_a_missing_object_is_an_error_of_any_source(stored: Address) -> None:
    missing = Address(stored.url + "-none", stored.requester_pays)
    expected = AccessError if stored.is_s3 else ObjectMissingError
    for attempt in (lambda: connect(missing).start(4), lambda: read(connect(missing), 0, 4)):
        with pytest.raises(expected) as caught:
            attempt()
        assert missing.url in str(caught.value)


def test_addresses_travel_and_hold_no_credentials(stored: Address) -> None:
    twin = pickle.loads(pickle.dumps(stored))
    assert twin == stored
    assert connect(twin).start(3)[0] == CONTENT[:3]
    for name, value in os.environ.items():
        if name.startswith("AWS_") and ("KEY" in name or "TOKEN" in name):
            assert value.encode() not in pickle.dumps(stored)


def test_a_folder_is_no_object(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="could not be read"):
        connect(Address(str(tmp_path))).start(4)


def test_an_address_without_a_key_or_of_an_unknown_kind_is_refused(s3: LoopbackS3) -> None:
    with pytest.raises(SourceError, match="s3://bucket/key"):
        connect(Address("s3://")).start(4)
    with pytest.raises(SourceError, match="s3://bucket/key"):
        connect(Address(f"s3://{BUCKET}")).start(4)
    with pytest.raises(SourceError, match="no reader for nosuch://x/y"):
        connect(Address("nosuch://x/y")).start(4)
    assert s3.n_requests == 0


@pytest.mark.parametrize("host", ["", "localhost", "LOCALHOST"])
def test_a_file_url_is_decoded_and_a_path_is_not(tmp_path: Path, host: str) -> None:
    (tmp_path / "a b\u00fc.bin").write_bytes(b"decoded")
    (tmp_path / "a%20b%C3%BC.bin").write_bytes(b"as it is")
    for scheme in ("file", "FILE"):
        assert connect(Address(f"{scheme}://{host}{tmp_path}/a%20b%C3%BC.bin")).start(99)[0] == b"decoded"
    assert connect(Address(f"{tmp_path}/a%20b%C3%BC.bin")).start(99)[0] == b"as it is"
    np.save(tmp_path / "x y.npy", np.arange(3))
    assert dmdata.open(f"file://{host}{tmp_path}/x%20y.npy")[2] == 2


@pytest.mark.parametrize("url", ["file://another-host/x.npy", "file://x.npy"])
def test_a_file_of_another_machine_is_refused(url: str) -> None:
    with pytest.raises(SourceError, match="write file:///PATH"):
        connect(Address(url)).start(4)


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("gs://bucket/x.npy", "pip install gcsfs"),
        ("hf://datasets/a/b/x.npy", "pip install huggingface-hub"),
        ("az://container/x.npy", "pip install adlfs"),
        ("sftp://host/x.npy", "pip install paramiko"),
        ("zip://x.npy::https://u:secret@host/a.zip?sig=secret", "pip install requests aiohttp"),
        ("s3a://bucket/x.npy", "write s3://"),
    ],
)
def test_a_store_whose_package_is_missing_says_which(url: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("gcsfs", "huggingface_hub", "adlfs", "paramiko", "aiohttp", "s3fs"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in [
        name for name in sys.modules if name.startswith(("fsspec.implementations.http", "fsspec.implementations.sftp"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SourceError) as caught:
        connect(Address(url)).start(4)
    assert remedy in str(caught.value)
    assert not caught.value.transient
    assert "secret" not in "".join(traceback.format_exception(caught.value))


def test_an_archive_is_read_through(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x.bin", CONTENT)
    source = connect(Address(f"zip://x.bin::{tmp_path}/a.zip"))
    assert source.start(9)[0] == CONTENT[:9]
    assert read(source, 100, 4000) == CONTENT[100:4000]


def test_no_secret_of_a_chain_of_urls_is_shown() -> None:
    for url, shown in (
        ("zip://x.npy::https://u:secret@h/a.zip?sig=secret", "zip://x.npy::https://h/a.zip"),
        ("https://u:secret@[::1]:80/x.npy?sig=a::secret", "https://[::1]:80/x.npy"),
        ("https://[broken?secret", "https://[broken"),
        ("github://org:repo@main/x.npy", "github://org:repo@main/x.npy"),
    ):
        assert str(Address(url)) == shown


def test_offline_only_what_is_local_is_read(s3: LoopbackS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMDATA_OFFLINE", "1")
    np.save(tmp_path / "x.npy", np.arange(3))
    assert dmdata.open(tmp_path / "x.npy")[2] == 2
    s3.put("x.npy", npy(np.arange(3)))
    with pytest.raises(SourceError, match="DMDATA_OFFLINE is set"):
        dmdata.open(f"s3://{BUCKET}/x.npy")
    assert s3.n_requests == 0
    monkeypatch.setenv("DMDATA_OFFLINE", "0")
    assert dmdata.open(f"s3://{BUCKET}/x.npy")[2] == 2


# The causes of a 403: what was not sent, who asked, what they may, what there is.


@pytest.fixture
def catalog(s3: LoopbackS3, tmp_path: Path) -> str:
    return publish(s3, {"toy/50pct/test_margins": np.zeros((4, 3), np.float16)}, tmp_path)


NAME = "toy/50pct/test_margins"


def refusal(name: str, catalog: str | None = None) -> AccessError:
    with pytest.raises(AccessError) as caught:
        dmdata.open(name, catalog=catalog).read_header()
    assert caught.value.exit_code == 4
    return caught.value


def test_no_credentials_are_noticed_before_any_request(
    s3: LoopbackS3, catalog: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    error = refusal(NAME, catalog)
    assert error.cause == "no_credentials"
    assert "aws configure" in str(error)
    assert s3.n_requests == 0
    assert dmdata.spend().usd == 0


def test_a_profile_that_does_not_exist_is_named_before_any_request(
    s3: LoopbackS3, catalog: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobodys-profile")
    with pytest.raises(AccessError, match="nobodys-profile"):
        dmdata.open(NAME, catalog=catalog).read_header()
    assert s3.n_requests == 0


def test_without_the_offer_to_pay_the_catalogs_flag_is_named(s3: LoopbackS3, catalog: str) -> None:
    text = Path(catalog).read_text()
    Path(catalog).write_text(text.replace("requester_pays: true", "requester_pays: false"))
    error = refusal(NAME, catalog)
    assert error.cause == "requester_pays"
    assert "requester_pays: true" in str(error)
    assert s3.n_requests == 1, "a refusal is never tried again"


def test_a_key_that_no_catalog_lists_is_said_to_be_likely_missing(s3: LoopbackS3) -> None:
    error = refusal(f"s3://{BUCKET}/cifar/datamodels/train_20pct.pt")
    assert error.cause == "not_in_release"
    assert "dmdata ls" in str(error)
    assert s3.n_requests == 1


def test_a_listed_key_that_is_refused_is_said_to_be_a_matter_of_rights(s3: LoopbackS3, catalog: str) -> None:
    s3.inject(Fault(status=403))
    error = refusal(NAME, catalog)
    assert error.cause == "denied"
    assert "aws sts get-caller-identity" in str(error)
    assert s3.n_requests == 1


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"])
def test_credentials_that_are_not_valid_are_said_to_be(s3: LoopbackS3, catalog: str, code: str) -> None:
    s3.inject(Fault(status=403, code=code))
    error = refusal(NAME, catalog)
    assert error.cause == "bad_credentials"
    assert code in str(error)
    assert s3.n_requests == 1


def test_a_free_bucket_is_read_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    with LoopbackS3(requester_pays=False) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        server.put("x.bin", CONTENT)
        assert connect(Address(f"s3://{BUCKET}/x.bin")).start(9)[0] == CONTENT[:9]


def test_a_missing_key_or_bucket_is_never_tried_again(s3: LoopbackS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", OWNER_KEY_ID)
    for url in (f"s3://{BUCKET}/none.npy", "s3://another-bucket/none.npy"):
        s3.reset_log()
        with pytest.raises(ObjectMissingError, match=url):
            dmdata.open(url).read_header()
        assert s3.n_requests == 1


def test_a_wrong_region_is_named_as_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    with LoopbackS3(region="eu-west-3", strict_region=True) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        server.put("x.npy", npy(np.arange(3)))
        assert dmdata.open(f"s3://{BUCKET}/x.npy")[1] == 1
        server.reset_log()
        monkeypatch.setenv("AWS_REGION", "us-west-1")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-1")
        server.put("y.npy", npy(np.arange(3)))
        with pytest.raises(SourceError, match="set AWS_REGION") as caught:
            dmdata.open(f"s3://{BUCKET}/y.npy")
        assert not caught.value.transient
        assert server.n_requests == 1


# Secrets stay where they are.


@pytest.mark.parametrize(
    "fault", [Fault(status=403, code="SignatureDoesNotMatch"), Fault(status=400), Fault(drop=True)]
)
def test_no_secret_is_in_any_error_its_causes_or_its_pickle(
    s3: LoopbackS3, catalog: str, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    pytest.importorskip("distributed")  # from its import on, an error is pickled with its causes
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    array = dmdata.open(NAME, catalog=catalog).read_header()
    assert_no_secret(repr(array), repr(vars(type(array))), pickle.dumps(array).decode("latin1"))
    s3.inject(fault, times=100)
    with pytest.raises(DmdataError) as caught:
        connect(Address(array.url, requester_pays=True)).start(4)
    error = caught.value
    assert_no_secret(
        str(error), repr(error), repr(error.facts), "".join(traceback.format_exception(error)), repr(error.__cause__)
    )
    assert_no_secret(pickle.dumps(error).decode("latin1"))


def test_no_secret_is_in_the_logs_of_the_libraries(
    s3: LoopbackS3, catalog: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    with caplog.at_level(logging.DEBUG):
        assert dmdata.open(NAME, catalog=catalog)[0, 0] == 0
    assert caplog.records, "boto3 logs at that level"
    assert_no_secret(caplog.text)


@pytest.mark.parametrize("fault", [None, Fault(status=403, code="InvalidAccessKeyId")])
def test_no_secret_is_in_what_the_command_prints_with_debug(
    s3: LoopbackS3, catalog: str, tmp_path: Path, fault: Fault | None
) -> None:
    if fault:
        s3.inject(fault, times=100)
    program = [sys.executable, "-c", "from dmdata.cli.command import main; main()", "get", NAME, "--debug", "-y"]
    done = subprocess.run(
        [*program, "--catalog", catalog, "-o", str(tmp_path / "x.npy")],
        env={**os.environ, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": TOKEN},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (4 if fault else 0), done.stderr
    assert ("Traceback" in done.stderr) == bool(fault)
    assert_no_secret(done.stdout, done.stderr)


def assert_no_secret(*texts: str) -> None:
    for text in texts:
        for secret in (SECRET, TOKEN):
            assert secret not in text


def test_a_catalog_is_read_from_a_bucket(s3: LoopbackS3, catalog: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.put("run/catalog.yaml", Path(catalog).read_bytes())
    assert dmdata.open(NAME, catalog=f"s3://{BUCKET}/run").shape == (4, 3)
    monkeypatch.setenv("DMDATA_CATALOG", f"s3://{BUCKET}/run/catalog.yaml")
    assert dmdata.open(NAME).shape == (4, 3)
    s3.put("large/catalog.yaml", b"x" * ((4 << 20) + 1))
    with pytest.raises(CatalogError, match="at most"):
        dmdata.load_catalog(f"s3://{BUCKET}/large")


def test_many_objects_of_a_bucket_do_not_keep_a_client_each(s3: LoopbackS3) -> None:
    for nth in range(40):
        s3.put(f"{nth}.bin", bytes([nth]) * 100)
    for _ in range(2):
        for nth in range(40):
            source = connect(Address(f"s3://{s3.bucket}/{nth}.bin", requester_pays=True))
            assert bytes(source.piece(10, 12, etag=s3.etag(f"{nth}.bin"))) == bytes([nth]) * 2
    assert len(terms_of(s3.bucket, Address(f"s3://{s3.bucket}/0.bin", requester_pays=True)).stores) <= 32
