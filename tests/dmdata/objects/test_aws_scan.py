"""A catalog is made of what a bucket of AWS holds, and checked against it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from servers.aws import PlayedAws
from small_release import npy

import dmdata

COMMAND = "from dmdata.cli.command import main; main()"
VALUES = np.arange(600, dtype=np.float32).reshape(60, 10)


def command(*words: str) -> "subprocess.CompletedProcess[str]":
    """Run a command as a job without a terminal."""
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *words], capture_output=True, text=True, env=dict(os.environ), check=False
    )


def test_a_release_of_aws_is_scanned_opened_and_confirmed(aws: PlayedAws, tmp_path: Path) -> None:
    bucket = aws.make("another-lab", region="eu-central-1", requester_pays=True, lists=True)
    for name in ("train_masks_50pct", "test_margins_50pct", "test_margins_20pct"):
        bucket.put(f"lab/data/{name}.npy", npy(VALUES))
    target, file = "s3://another-lab/lab", tmp_path / "catalog.yaml"
    refused = command("catalog", "scan", target, "-o", str(file))
    assert refused.returncode == 6
    assert not file.exists()
    assert not [request for request in aws.log if request.charged]
    made = command("catalog", "scan", target, "-o", str(file), "-y", "--json")
    assert made.returncode == 0, (made.stderr, aws.tunnels)
    names = [artifact.name for artifact in dmdata.load_catalog(str(file)).artifacts()]
    assert len(names) == 3, names
    for name in names:
        np.testing.assert_array_equal(dmdata.open(name, catalog=str(file))[7], VALUES[7])
    checked = command("catalog", "check", str(file), "--against-bucket", "-y", "--json")
    assert checked.returncode == 0, checked.stderr
    bucket.put("lab/data/test_margins_20pct.npy", npy(VALUES[:50]))
    changed = command("catalog", "check", str(file), "--against-bucket", "-y", "--json")
    assert changed.returncode == 3, changed.stdout
    assert json.loads(changed.stdout)
    bill, spent = aws.bill(bucket), dmdata.spend()
    assert (spent.n_requests, spent.n_bytes) == (bill.n_requests, bill.n_bytes)


def test_addresses_do_in_every_command_on_aws(aws: PlayedAws, tmp_path: Path) -> None:
    aws.release.put("x.npy", npy(VALUES))
    address = f"s3://{aws.release.name}/x.npy"
    info = command("info", address, "-y", "--json")
    assert info.returncode == 0, info.stderr
    assert json.loads(info.stdout)["shape"] == [60, 10]
    priced = command("estimate", address, "--select", "0:5", "-y", "--json")
    assert priced.returncode == 0, priced.stderr
    got = command("get", address, "-o", str(tmp_path / "x.npy"), "-y", "--json")
    assert got.returncode == 0, got.stderr
    assert (tmp_path / "x.npy").read_bytes() == npy(VALUES)
    copied = command("mirror", address, str(tmp_path / "x.zarr"), "-y", "--json")
    assert copied.returncode == 0, copied.stderr
    looked = command("doctor", address, "--probe", "-y", "--json")
    assert looked.returncode == 0, looked.stdout
    bill = aws.bill(aws.release)
    spent = dmdata.spend()
    assert (spent.n_requests, spent.n_bytes) == (bill.n_requests, bill.n_bytes)
