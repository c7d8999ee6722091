"""doctor, cache, catalog: what a person is told before anything goes wrong, and what may be forgotten."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from servers.loopback import BUCKET, SECRET, LoopbackS3
from small_release import publish, write_locally

import dmdata
from dmdata.cli.command import main
from dmdata.money.ledger import home

NAME = "toy/50pct/test_margins"
VALUES = np.arange(600, dtype=np.float16).reshape(30, 20)


@pytest.fixture
def catalog(s3: LoopbackS3, tmp_path: Path) -> str:
    return publish(s3, {NAME: VALUES}, tmp_path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def findings(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    code, out, err = run(capsys, "doctor", *arguments, "--json")
    assert SECRET not in out + err
    return code, {finding["topic"]: finding for finding in json.loads(out)["findings"]}


def test_doctor_finds_nothing_wrong_where_nothing_is_and_spends_nothing(
    s3: LoopbackS3, catalog: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = findings(capsys, NAME, "--catalog", catalog)
    assert code == 0
    assert {finding["state"] for finding in found.values()} == {"ok"}
    assert "environment variables" in found["credentials"]["words"]
    assert s3.endpoint_url in found["source"]["words"]
    assert "x-amz-request-payer" in found["requester pays"]["words"]
    assert s3.n_requests == 0
    assert not home().exists()


def test_doctor_names_missing_credentials_and_the_next_command(
    s3: LoopbackS3, catalog: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    code, found = findings(capsys, NAME, "--catalog", catalog)
    assert code == 1
    assert found["credentials"]["state"] == "fail"
    assert "aws configure" in found["credentials"]["next"]


def test_a_probe_reads_one_byte_and_says_whether_the_reader_is_charged(
    s3: LoopbackS3, catalog: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "doctor", NAME, "--catalog", catalog, "--probe")
    assert code == 6, "a probe costs a request, so that it needs consent"
    assert "-y" in err
    assert s3.n_requests == 0
    code, found = findings(capsys, NAME, "--catalog", catalog, "--probe", "-y")
    assert (code, found["probe"]["state"]) == (0, "ok")
    assert "x-amz-request-charged" in found["probe"]["words"]
    assert (s3.n_requests, s3.n_bytes) == (1, 1)
    assert (dmdata.spend().n_requests, dmdata.spend().n_bytes) == (1, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s3: s3.delete("toy/data/test_margins_50pct.npy"), "s3:GetObject"),
        (lambda _: os.environ.update(AWS_ACCESS_KEY_ID="NOBODY00000000000000"), "not valid"),
    ],
    ids=["no such key", "bad credentials"],
)
def test_a_probe_explains_a_refusal(
    s3: LoopbackS3,
    catalog: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: Any,
    words: str,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", os.environ["AWS_ACCESS_KEY_ID"])  # put back afterwards
    change(s3)
    code, found = findings(capsys, NAME, "--catalog", catalog, "--probe", "-y")
    assert (code, found["probe"]["state"]) == (1, "fail")
    assert words in found["probe"]["words"]
    assert found["probe"]["next"]


def test_doctor_warns_of_a_disk_too_small_and_of_being_offline(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DMDATA_OFFLINE", "1")
    code, found = findings(capsys, "cifar/10pct/train_logits")
    assert found["disk"]["state"] == "warn"
    assert "--select" in found["disk"]["next"]
    assert found["source"]["next"] == "unset DMDATA_OFFLINE"
    assert code == 1


def test_doctor_says_that_a_local_release_is_free(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = findings(capsys, "--catalog", write_locally({NAME: VALUES}, tmp_path / "run"), "--probe")
    assert code == 0
    assert "free" in found["source"]["words"]
    assert "free" in found["probe"]["words"]


def test_the_cache_is_counted_and_cleared_and_the_ledger_stays(
    s3: LoopbackS3, catalog: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    dmdata.open(NAME, catalog=catalog).read_header()
    (tmp_path / "precious").write_text("dear")
    (home() / "headers" / "link").symlink_to(tmp_path / "precious")
    folders = json.loads(run(capsys, "cache", "--json")[1])["folders"]
    assert {folder["folder"]: folder["files"] for folder in folders}["headers"] == 2
    assert json.loads(run(capsys, "cache", "clear", "--older-than", "1", "--json")[1])["files"] == 0
    assert json.loads(run(capsys, "cache", "clear", "--json")[1])["files"] == 2
    assert (tmp_path / "precious").read_text() == "dear"
    assert dmdata.spend().n_requests == 1
    dmdata.open(NAME, catalog=catalog).read_header()
    assert s3.n_requests == 2, "the header is read anew"


def test_what_paid_reads_keep_is_shown_with_what_it_saved_and_cleared(
    s3: LoopbackS3, catalog: str, capsys: pytest.CaptureFixture[str]
) -> None:
    array = dmdata.open(NAME, catalog=catalog).read_header()
    array[0:10]
    paid = dmdata.spend()
    array[0:10]
    shown = json.loads(run(capsys, "cache", "--json")[1])["ranges"]
    assert (shown["objects"], shown["files"], shown["bound_bytes"]) == (1, 1, 10 * 2**30)
    assert 400 <= shown["bytes"] < 1000
    assert shown["saved_bytes"] == 400
    assert 0 < shown["saved_usd"] < paid.usd
    words = run(capsys, "cache")
    assert "1 objects, of at most 10.0 GiB" in words[1] + words[2]
    run(capsys, "cache", "clear", "--older-than", "1")
    assert array.plan(np.s_[0:10]).n_requests == 0
    run(capsys, "cache", "clear")
    assert not list((home() / "ranges").iterdir())
    assert array.plan(np.s_[0:10]).n_requests == 1


def test_a_catalog_is_checked_and_its_fault_named(
    catalog: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "catalog", "check", catalog, "--json")
    assert (code, json.loads(out)["artifacts"]) == (0, 1)
    about = yaml.safe_load(Path(catalog).read_text())
    about["datasets"]["toy"]["alphas"]["50pct"]["alpha"] = 7
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(about))
    code, _, err = run(capsys, "catalog", "check", str(tmp_path / "bad.yaml"))
    assert code == 2
    assert "datasets.toy.alphas.50pct.alpha" in err


def test_what_catalog_show_prints_is_a_catalog_and_the_schema_is_json(
    catalog: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "copy.yaml").write_text(run(capsys, "catalog", "show", "--catalog", catalog)[1])
    assert (
        dmdata.load_catalog(tmp_path / "copy.yaml").find(NAME).url == f"s3://{BUCKET}/toy/data/test_margins_50pct.npy"
    )
    assert json.loads(run(capsys, "catalog", "schema")[1])["title"] == "Catalog"
