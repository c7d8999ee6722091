"""A run published to the real bucket is read by a stranger who pays, through the catalog beside it."""

import json

import numpy as np
import pytest

import dmdata
from dmdata.errors import AccessError, BudgetError
from dmpipeline.cli.command import main
from dmpipeline.exporting.export import publish_run
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec

pytestmark = pytest.mark.live


@pytest.fixture
def published(live_s3, tmp_path, monkeypatch):
    """A small run in the bucket; from here on the environment is the stranger's."""
    run = Run.create(tmp_path / "run", RunSpec(n_models=12, held_out={"n_subsets": 3, "n_retrainings": 2}))
    run.train()
    url = f"s3://{live_s3.bucket}/published"
    with monkeypatch.context() as owner:
        for name, value in live_s3.owner_env.items():
            owner.setenv(name, value)
        publish_run(run, url, requester_pays=True, acl="authenticated-read")
    for name, value in live_s3.reader_env.items():
        monkeypatch.setenv(name, value)
    return run, url


def test_a_stranger_reads_what_was_published_and_pays_for_what_was_read(published):
    run, url = published
    with dmdata.budget(usd=0.01):
        margins = dmdata.open("digits/50pct/test_margins", catalog=url)
        np.testing.assert_array_equal(margins[:, 7], run.array("test_margins")[:, 7])
        np.testing.assert_array_equal(
            dmdata.open("digits/50pct/train_masks", catalog=url)[2:5], run.array("train_masks")[2:5]
        )
    spent = dmdata.spend()
    assert spent.n_requests >= 3
    assert 0 < spent.usd < 0.01


def test_a_published_run_downloads_to_its_digest(published, tmp_path):
    run, url = published
    path = dmdata.get("digits/50pct/test_margins", tmp_path / "x.npy", catalog=url)
    np.testing.assert_array_equal(np.load(path), run.array("test_margins")[:])


def test_nothing_of_it_is_read_over_the_budget(published):
    _, url = published
    catalog = dmdata.load_catalog(url)
    before = dmdata.spend().n_requests
    with dmdata.budget(usd=0), pytest.raises(BudgetError):
        dmdata.open("digits/50pct/test_margins", catalog=catalog).read_header()
    assert dmdata.spend().n_requests == before


def test_while_a_run_is_published_anew_no_catalog_lists_its_objects(published, live_s3, monkeypatch):
    run, url = published

    def keys():
        listed = live_s3.owner.list_objects_v2(Bucket=live_s3.bucket, Prefix="published/")
        return {item["Key"].removeprefix("published/") for item in listed["Contents"]}

    assert "catalog.yaml" in keys()
    for name, value in live_s3.owner_env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(AccessError):
        publish_run(run, url, acl="no-such-acl")  # refused by the first upload
    assert "catalog.yaml" not in keys()
    publish_run(run, url)
    assert "catalog.yaml" in keys()
    assert not list(run.path.glob(".publishing-*"))


def test_a_stranger_cannot_publish(published):
    run, url = published
    with pytest.raises(AccessError, match="may not be written"):
        publish_run(run, f"{url}/mine")


def test_the_command_says_what_was_sent_and_what_was_there(published, live_s3, monkeypatch, capsys):
    run, url = published
    for name, value in live_s3.owner_env.items():
        monkeypatch.setenv(name, value)
    live_s3.owner.delete_object(Bucket=live_s3.bucket, Key="published/digits/data/test_margins_50pct.npy")
    with pytest.raises(SystemExit, match="0"):
        main(["export", str(run.path), url, "--requester-pays", "--acl", "authenticated-read", "--json"])
    files = json.loads(capsys.readouterr().out)["files"]
    sent = {file["name"].rpartition("/")[2]: (file["sent_bytes"], file["present_bytes"]) for file in files}
    sizes = {file["name"].rpartition("/")[2]: file["bytes"] for file in files}
    assert sent == {name: (size, 0) if name == "test_margins" else (0, size) for name, size in sizes.items()}
