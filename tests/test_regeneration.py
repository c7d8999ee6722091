"""Making the models again is priced beside downloading them."""

import json
from pathlib import Path

import pytest

import dmdata
from dmpipeline.cli import main
from dmpipeline.regeneration import GPU_USD_PER_HOUR, Regeneration


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_hours_and_dollars_are_those_of_all_devices_and_time_is_shared() -> None:
    job = Regeneration(n_models=3600, seconds_per_model=17.0, n_devices=4, usd_per_hour=2.0)
    assert (job.device_hours, job.seconds, job.usd) == (17.0, 15_300.0, 34.0)


def test_a_release_is_priced_in_gpu_hours_beside_its_download(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "cifar/50pct", "--json")
    assert code == 0
    data = json.loads(out)
    part = data["train"]["cifar/50pct"]
    assert (part["models"], part["seconds_per_model"]) == (310_000, 17.0)
    assert data["usd"] == pytest.approx(310_000 * 17 / 3600 * GPU_USD_PER_HOUR)
    assert data["download"]["usd"] == pytest.approx(dmdata.estimate("cifar/50pct/**").usd)
    code, out, _ = run(capsys, "plan", "cifar/*pct/test_margins", "--gpus", "8", "--gpu-usd-per-hour", "1", "--json")
    data = json.loads(out)
    assert set(data["train"]) == {"cifar/10pct", "cifar/20pct", "cifar/50pct", "cifar/75pct"}
    assert data["seconds"] == pytest.approx(data["device_hours"] * 3600 / 8)
    assert data["usd"] == pytest.approx(data["device_hours"])


def test_what_nobody_published_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "plan", "fmow/50pct")
    assert (code, "--seconds-per-model" in err) == (2, True)
    assert run(capsys, "plan", "fmow/50pct", "--seconds-per-model", "60")[0] == 0
    code, _, err = run(capsys, "plan", "cifar/30pct")
    assert (code, "30%" in err) == (2, True)


def test_a_run_is_measured_here_and_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = str(tmp_path / "run")
    assert run(capsys, "init", directory, "--models", "100", "--held-out", "2", "--retrainings", "2")[0] == 0
    code, out, _ = run(capsys, "plan", directory, "--json")
    assert code == 0
    data = json.loads(out)
    part = data["train"][directory]
    assert part["models"] == 104
    assert 0 < part["seconds_per_model"] < 5
    assert data["usd"] == 0
    assert data["download"]["bytes"] > 104 * 1437 * 10 * 2
    assert "download" in run(capsys, "plan", directory, "--seconds-per-model", "0.1")[1]
