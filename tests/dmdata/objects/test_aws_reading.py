"""All that a reader of the release does, on AWS itself: no endpoint, no region, nothing but keys in the environment."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers.aws import READER, PlayedAws
from servers.loopback import BUCKET, Fault
from small_release import Pt, document, key_of, npy, pt, publish, write_catalog

import dmdata
from dmdata.errors import BudgetError

MARGINS = "toy/50pct/test_margins"
LOGITS = "toy/50pct/test_logits"
MASKS = "toy/50pct/train_masks"
WEIGHTS = "toy/50pct/test_datamodels"
_random = np.random.default_rng(0)
VALUES: dict[str, Any] = {
    MARGINS: _random.normal(size=(400, 700)).astype(np.float16),
    LOGITS: _random.normal(size=(60, 30, 10)).astype(np.float32),
    MASKS: _random.random((400, 70)) < 0.5,
}
MEMBERS = {"weight": _random.normal(size=(70, 30)).astype(np.float32), "bias": np.arange(30, dtype=np.float32)}
RELEASE = VALUES | {WEIGHTS: Pt(pt(MEMBERS), MEMBERS)}
COMMAND = "from dmdata.cli.command import main; main()"


def configure(lines: str) -> None:
    """Write the user's AWS config file."""
    Path(os.environ["AWS_CONFIG_FILE"]).write_text(f"[default]\n{lines}")


@pytest.fixture
def catalog(aws: PlayedAws, tmp_path: Path) -> str:
    return publish(aws.release, RELEASE, tmp_path)  # type: ignore[arg-type] # has the same `put`


@pytest.fixture(autouse=True)
def asked_as_at_aws(aws: PlayedAws) -> Iterator[None]:
    """Whatever a test does: no read lacks the offer to pay, hosts are AWS's, and the bill is what the ledger says."""
    yield
    assert all(tunnel.outcome == "open" for tunnel in aws.tunnels), aws.tunnels
    for request in (request for request in aws.log if request.bucket == BUCKET):
        assert re.fullmatch(rf"({BUCKET}\.)?s3(\.us-east-1)?\.amazonaws\.com", request.host)
        # asking a bucket where it is, is not charged, and a refusal tells it too
        assert request.payer == "requester" or (request.method, request.key) == ("HEAD", "")
    if all(request.bucket in (BUCKET, aws.own.name) for request in aws.log):
        spent, charged = dmdata.spend(), aws.bill(aws.release)
        refused = sum(request.bucket == BUCKET and request.status >= 400 and bool(request.key) for request in aws.log)
        assert (spent.n_requests, spent.n_bytes) == (charged.n_requests + refused, charged.n_bytes)


def test_rows_columns_and_parts_are_numpys(aws: PlayedAws, catalog: str) -> None:
    margins, logits = (
        dmdata.open(MARGINS, catalog=catalog).read_header(),
        dmdata.open(LOGITS, catalog=catalog).read_header(),
    )
    np.testing.assert_array_equal(margins[3], VALUES[MARGINS][3])
    np.testing.assert_array_equal(margins[:, 7], VALUES[MARGINS][:, 7])
    np.testing.assert_array_equal(margins.oindex[[9, 3], [699, 0]], VALUES[MARGINS][np.ix_([9, 3], [699, 0])])
    np.testing.assert_array_equal(logits[5:9, ::7, 2], VALUES[LOGITS][5:9, ::7, 2])
    np.testing.assert_array_equal(dmdata.open(MASKS, catalog=catalog)[...], VALUES[MASKS])
    assert dmdata.spend().usd > 0


def test_a_member_of_a_pt_is_read(aws: PlayedAws, catalog: str) -> None:
    opened = dmdata.open(f"s3://{BUCKET}/{key_of(WEIGHTS, RELEASE[WEIGHTS])}/bias")
    np.testing.assert_array_equal(opened[...], MEMBERS["bias"])
    by_name = dmdata.open(f"{WEIGHTS}/weight", catalog=catalog)
    np.testing.assert_array_equal(by_name[4:6], MEMBERS["weight"][4:6])


def test_an_address_is_read_when_the_reader_offers_to_pay(aws: PlayedAws, catalog: str) -> None:
    opened = dmdata.open(f"s3://{BUCKET}/{key_of(MARGINS, VALUES[MARGINS])}")
    np.testing.assert_array_equal(opened[::50], VALUES[MARGINS][::50])


def test_objects_are_downloaded_mirrored_and_verified(aws: PlayedAws, catalog: str, tmp_path: Path) -> None:
    path = dmdata.get(MARGINS, tmp_path / "x.npy", catalog=catalog)
    assert path.read_bytes() == npy(VALUES[MARGINS])
    copy: Any = dmdata.mirror(LOGITS, tmp_path / "m.zarr", catalog=catalog)
    np.testing.assert_array_equal(np.asarray(copy[...]), VALUES[LOGITS])
    (found,) = dmdata.verify(tmp_path / "m.zarr", whole=True, catalog=catalog)
    assert found.is_same


def test_a_copy_is_made_in_a_bucket_of_the_readers_own(aws: PlayedAws, catalog: str) -> None:
    url = f"s3://{aws.own.name}/copies/one.zarr"
    copy: Any = dmdata.mirror(MARGINS, url, catalog=catalog)
    np.testing.assert_array_equal(np.asarray(copy[...]), VALUES[MARGINS])
    assert aws.own.content("copies/one.zarr/zarr.json")
    (found,) = dmdata.verify(url, whole=True, catalog=catalog)
    assert found.is_same


def test_a_catalog_is_read_from_the_bucket_it_describes(aws: PlayedAws, catalog: str) -> None:
    aws.release.put("catalog.yaml", catalog)
    for url in (f"s3://{BUCKET}/catalog.yaml", f"s3://{BUCKET}"):
        np.testing.assert_array_equal(dmdata.open(MARGINS, catalog=url)[5], VALUES[MARGINS][5])


@pytest.mark.parametrize(
    "style",
    [
        "path",
        "auto",
        "virtual",
    ],
)
def test_the_addressing_style_of_the_config_file_is_kept_by_both_clients(
    aws: PlayedAws, catalog: str, style: str
) -> None:
    configure(f"s3 =\n  addressing_style = {style}\n")
    np.testing.assert_array_equal(dmdata.open(MARGINS, catalog=catalog)[3], VALUES[MARGINS][3])
    styles = {request.is_by_host for request in aws.log if request.key}
    assert styles == {style == "virtual"} or style == "auto"


def test_a_bucket_in_another_region_is_found_and_read(aws: PlayedAws, tmp_path: Path) -> None:
    far = aws.make("a-lab-far-away", region="eu-central-1", requester_pays=True)
    far.put(key_of(MARGINS, VALUES[MARGINS]), npy(VALUES[MARGINS]))
    about = document({MARGINS: VALUES[MARGINS]}, url=f"s3://{far.name}", requester_pays=True)
    opened = dmdata.open(MARGINS, catalog=write_catalog(about, tmp_path)).read_header()
    np.testing.assert_array_equal(opened[3], VALUES[MARGINS][3])
    np.testing.assert_array_equal(opened[:, 3], VALUES[MARGINS][:, 3])
    reads = [request for request in aws.log if request.key]
    assert {request.status for request in reads} == {206}
    assert {request.payer for request in reads} == {"requester"}
    assert all("eu-central-1" in request.host for request in reads)
    assert dmdata.spend().n_requests == len(reads)
    # the region of the user's own configuration is not the bucket's
    configure("region = us-west-2\n")
    np.testing.assert_array_equal(dmdata.open(MARGINS, catalog=str(tmp_path / "catalog.yaml"))[3], VALUES[MARGINS][3])


@pytest.mark.parametrize("region", ["us-east-1", "us-west-2"])
def test_a_bucket_whose_name_has_dots_is_read_and_written(aws: PlayedAws, tmp_path: Path, region: str) -> None:
    dotted = aws.make("data.of.the.lab", account=READER, region=region)
    dotted.put("x.npy", npy(VALUES[MASKS]))
    np.testing.assert_array_equal(dmdata.open(f"s3://{dotted.name}/x.npy")[7:9], VALUES[MASKS][7:9])
    about = document({MASKS: VALUES[MASKS]}, url=f"s3://{dotted.name}", requester_pays=False)
    dotted.put(key_of(MASKS, VALUES[MASKS]), npy(VALUES[MASKS]))
    copy: Any = dmdata.mirror(MASKS, f"s3://{dotted.name}/copy.zarr", catalog=write_catalog(about, tmp_path))
    np.testing.assert_array_equal(np.asarray(copy[...]), VALUES[MASKS])


def test_a_budget_holds_before_a_byte(aws: PlayedAws, catalog: str) -> None:
    opened = dmdata.open(MARGINS, catalog=catalog).read_header()
    n_requests = len(aws.log)
    with dmdata.budget(usd=opened.estimate().usd * 0.9), pytest.raises(BudgetError):
        opened[...]
    assert len(aws.log) == n_requests


def test_what_broke_is_tried_again_and_each_try_is_in_the_ledger(aws: PlayedAws, catalog: str) -> None:
    opened = dmdata.open(MARGINS, catalog=catalog).read_header()
    aws.inject(Fault(status=503, code="SlowDown"), times=1)
    np.testing.assert_array_equal(opened[3], VALUES[MARGINS][3])


def test_workers_of_a_cluster_read_and_write_for_their_caller(aws: PlayedAws, catalog: str) -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0", silence_logs="CRITICAL"
    ) as cluster:
        url = f"s3://{aws.own.name}/by-a-cluster.zarr"
        address = cluster.scheduler_address
        copy: Any = dmdata.mirror(MARGINS, url, catalog=catalog, memory_bytes=1 << 20, scheduler=address)
        np.testing.assert_array_equal(np.asarray(copy[...]), VALUES[MARGINS])
        with distributed.Client(cluster):
            total = dmdata.open(LOGITS, catalog=catalog).to_dask().sum().compute()
    assert total == pytest.approx(VALUES[LOGITS].sum(), rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_workers_of_a_data_loader_read(aws: PlayedAws, catalog: str, start: str) -> None:
    data = pytest.importorskip("torch.utils.data")
    masks, margins = (
        dmdata.open(MASKS, catalog=catalog).read_header(),
        dmdata.open(MARGINS, catalog=catalog).read_header(),
    )
    batches = dmdata.torch_dataset(masks, margins, batch_rows=100)
    loader = data.DataLoader(batches, batch_size=None, num_workers=2, multiprocessing_context=start)
    np.testing.assert_array_equal(np.concatenate([part.numpy() for _, part in loader]), VALUES[MARGINS])


def test_the_commands_work_with_nothing_but_keys(aws: PlayedAws, catalog: str, tmp_path: Path) -> None:
    def command(*words: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *words, "--catalog", catalog, "--json"],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        assert aws.reader.secret not in done.stdout + done.stderr
        return json.loads(done.stdout)

    facts = {finding["topic"]: finding for finding in command("doctor", MARGINS, "--probe", "-y")["findings"]}
    assert {finding["state"] for finding in facts.values()} <= {"ok", "warn"}
    assert "us-east-1" in facts["source"]["words"]
    assert "x-amz-request-charged" in facts["probe"]["words"]
    command("get", MARGINS, "-o", "x.npy", "-y")
    assert (tmp_path / "x.npy").read_bytes() == npy(VALUES[MARGINS])
    command("mirror", MASKS, "m.zarr", "-y")
    command("verify", "m.zarr")
