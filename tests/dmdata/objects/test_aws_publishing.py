"""A run is published to AWS itself, and a stranger who pays reads it by its address."""

import json

import numpy as np
import pytest
from servers.aws import PUBLISHER, Bill

import dmdata
from dmpipeline.cli.command import main
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec


@pytest.mark.parametrize(
    ("name", "region"), [("our-release", "us-east-1"), ("our.release.by.name", "us-east-1"), ("far", "eu-central-1")]
)
def test_a_stranger_reads_what_was_published_and_pays_for_it(aws, tmp_path, monkeypatch, capsys, name, region):
    bucket = aws.make(name, account=PUBLISHER, region=region, requester_pays=True)
    run = Run.create(tmp_path / "run", RunSpec(n_models=12, held_out={"n_subsets": 3, "n_retrainings": 2}))
    run.train()
    url = f"s3://{name}/published"
    with monkeypatch.context() as owner:
        for variable, value in aws.owner.env.items():
            owner.setenv(variable, value)
        with pytest.raises(SystemExit, match="0"):
            main(["export", str(run.path), url, "--requester-pays", "--json"])
    files = json.loads(capsys.readouterr().out)["files"]
    assert {file["sent_bytes"] for file in files} == {file["bytes"] for file in files}
    assert aws.bill(bucket) == Bill()
    written = len(aws.log)
    margins = dmdata.open("digits/50pct/test_margins", catalog=url)
    np.testing.assert_array_equal(margins[:, 7], run.array("test_margins")[:, 7])
    read = [request for request in aws.log[written:] if request.key]
    assert {request.payer for request in read} == {"requester"}
    assert {request.key_id for request in read} == {aws.reader.key_id}
    spent = dmdata.spend()
    assert Bill(spent.n_requests, spent.n_bytes) == aws.bill(bucket)
