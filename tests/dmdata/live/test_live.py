"""The same on a real S3 server that enforces requester pays, with signatures and accounts: Ceph's gateway."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import zarr
from small_release import document, key_of, npy, write_catalog

import dmdata
from dmdata.cli.command import main
from dmdata.errors import AccessError, BudgetError, IntegrityError

if TYPE_CHECKING:
    from conftest import LiveS3

pytestmark = pytest.mark.live

NAME = "toy/50pct/test_margins"
GONE = "toy/50pct/train_margins"
VALUES = np.random.default_rng(0).normal(size=(400, 3000)).astype(np.float16)


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    return f"tests/{request.node.originalname}"


@pytest.fixture
def catalog(live_s3: "LiveS3", prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A catalog of an array that is there and one that is not, read by a stranger who pays."""
    key = f"{prefix}/{key_of(NAME, VALUES)}"
    live_s3.owner.put_object(Bucket=live_s3.bucket, Key=key, Body=npy(VALUES), ACL="authenticated-read")
    for name, value in live_s3.reader_env.items():
        monkeypatch.setenv(name, value)
    about = document({NAME: VALUES, GONE: VALUES}, url=f"s3://{live_s3.bucket}/{prefix}", requester_pays=True)
    yield write_catalog(about, tmp_path)
    live_s3.owner.delete_object(Bucket=live_s3.bucket, Key=key)


def test_an_array_is_opened_and_sliced(catalog: str) -> None:
    array = dmdata.open(NAME, catalog=catalog).read_header()
    assert (array.shape, array.dtype) == (VALUES.shape, VALUES.dtype)
    np.testing.assert_array_equal(array[3], VALUES[3])
    np.testing.assert_array_equal(array[::40, 7], VALUES[::40, 7])
    np.testing.assert_array_equal(array.oindex[[9, 3], [2999, 0]], VALUES[np.ix_([9, 3], [2999, 0])])
    np.testing.assert_array_equal(array[...], VALUES)


def test_the_ledger_holds_what_was_estimated(catalog: str) -> None:
    price = dmdata.estimate(NAME, select=np.s_[:, 42], catalog=catalog)
    dmdata.open(NAME, catalog=catalog)[:, 42]
    spent = dmdata.spend()
    assert (spent.n_bytes, spent.n_requests) == (price.n_bytes, price.n_requests)
    assert spent.usd == pytest.approx(price.usd)


def test_a_budget_holds(catalog: str) -> None:
    array = dmdata.open(NAME, catalog=catalog).read_header()
    with dmdata.budget(usd=array.estimate().usd * 0.9), pytest.raises(BudgetError):
        array[...]


def test_an_array_is_mirrored_by_command(catalog: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["mirror", NAME, str(tmp_path / "m.zarr"), "--catalog", catalog, "--memory", "1", "-y", "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["artifacts"] == [NAME]
    np.testing.assert_array_equal(np.asarray(zarr.open_array(tmp_path / "m.zarr", mode="r")[...]), VALUES)
    assert dmdata.spend().n_bytes == len(npy(VALUES))


def test_an_object_is_downloaded(catalog: str, tmp_path: Path) -> None:
    path = dmdata.get(NAME, tmp_path / "x.npy", catalog=catalog)
    assert path.read_bytes() == npy(VALUES)


def test_an_object_that_changed_is_noticed(live_s3: "LiveS3", catalog: str, prefix: str) -> None:
    array = dmdata.open(NAME, catalog=catalog).read_header()
    key = f"{prefix}/{key_of(NAME, VALUES)}"
    live_s3.owner.put_object(Bucket=live_s3.bucket, Key=key, Body=npy(VALUES + 1), ACL="authenticated-read")
    with pytest.raises(IntegrityError):
        array[0]
    np.testing.assert_array_equal(dmdata.open(NAME, catalog=catalog)[0], VALUES[0] + 1)


@pytest.mark.parametrize(
    ("variable", "value", "code"),
    [
        ("AWS_ACCESS_KEY_ID", "NOBODY00000000000000", "InvalidAccessKeyId"),
        ("AWS_SECRET_ACCESS_KEY", "wrong-secret", "SignatureDoesNotMatch"),
    ],
)
def test_wrong_credentials_are_named_without_showing_them(
    catalog: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, code: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(AccessError, match=code) as caught:
        dmdata.open(NAME, catalog=catalog).read_header()
    assert caught.value.cause == "bad_credentials"
    assert value not in str(caught.value)


def test_a_missing_offer_to_pay_is_named(catalog: str) -> None:
    text = Path(catalog).read_text()
    Path(catalog).write_text(text.replace("requester_pays: true", "requester_pays: false"))
    with pytest.raises(AccessError, match="requester_pays: true") as caught:
        dmdata.open(NAME, catalog=catalog).read_header()
    assert caught.value.cause == "requester_pays"


def test_a_missing_key_is_told_from_missing_rights_as_far_as_can_be(live_s3: "LiveS3", catalog: str) -> None:
    with pytest.raises(AccessError) as caught:
        dmdata.open(f"s3://{live_s3.bucket}/no/such/key.npy")
    assert caught.value.cause == "not_in_release"
    with pytest.raises(AccessError) as caught:
        dmdata.open(GONE, catalog=catalog).read_header()
    assert caught.value.cause == "denied"


def test_an_object_of_the_owner_alone_is_denied(live_s3: "LiveS3", catalog: str, prefix: str) -> None:
    key = f"{prefix}/{key_of(GONE, VALUES)}"
    live_s3.owner.put_object(Bucket=live_s3.bucket, Key=key, Body=npy(VALUES))
    with pytest.raises(AccessError, match="s3:GetObject") as caught:
        dmdata.open(GONE, catalog=catalog).read_header()
    assert caught.value.cause == "denied"
    live_s3.owner.delete_object(Bucket=live_s3.bucket, Key=key)
