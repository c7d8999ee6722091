"""Training the models again is priced next to downloading them."""

import dataclasses
import json
from pathlib import Path

import pytest

import dmdata
from dmdata.errors import CatalogError
from dmpipeline.cli.command import main
from dmpipeline.cli.regeneration import GPU_USD_PER_HOUR, Regeneration, RegenerationPlan, release_models


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_hours_and_dollars_are_those_of_all_devices_and_time_is_shared() -> None:
    job = Regeneration(n_models=3600, seconds_per_model=17.0, n_devices=4, usd_per_hour=2.0, basis="given")
    assert (job.device_hours, job.seconds, job.usd) == (17.0, 15_300.0, 34.0)
    price = dmdata.estimate("cifar/50pct/test_margins")
    both = RegenerationPlan({"one": job, "other": job}, price)
    assert (both.n_models, both.device_hours, both.seconds, both.usd) == (7200, 34.0, 30_600.0, 68.0)
    assert both.break_even_usd_per_hour == pytest.approx(price.usd / 34)
    free = Regeneration(n_models=5, seconds_per_model=0.0, n_devices=1, usd_per_hour=2.0, basis="given")
    assert RegenerationPlan({"free": free}, price).break_even_usd_per_hour is None


def test_a_release_is_priced_in_gpu_hours_next_to_its_download(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "cifar/50pct", "--json")
    assert code == 0
    data = json.loads(out)
    part = data["train"]["cifar/50pct"]
    assert (part["models"], part["seconds_per_model"], part["basis"]) == (310_000, 17.0, "published")
    assert data["break_even_gpu_usd_per_hour"] * data["device_hours"] == pytest.approx(data["download"]["usd"])
    assert data["usd"] == pytest.approx(310_000 * 17 / 3600 * GPU_USD_PER_HOUR)
    assert data["download"]["usd"] == pytest.approx(dmdata.estimate("cifar/50pct/**").usd)
    code, out, _ = run(capsys, "plan", "cifar/*pct/test_margins", "--gpus", "8", "--gpu-usd-per-hour", "1", "--json")
    data = json.loads(out)
    assert set(data["train"]) == {"cifar/10pct", "cifar/20pct", "cifar/50pct", "cifar/75pct"}
    assert data["usd"] == pytest.approx(sum(part["usd"] for part in data["train"].values()))
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
    assert (part["models"], part["basis"]) == (104, "measured")
    assert part["seconds_per_model"] > 0
    assert data["usd"] == 0
    assert data["download"]["bytes"] > 104 * 1437 * 10 * 2
    assert "download" in run(capsys, "plan", directory, "--seconds-per-model", "0.1")[1]


def test_a_run_can_be_priced_by_its_description_alone_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "run"
    run(capsys, "init", str(directory), "--models", "100", "--held-out", "2", "--retrainings", "2")
    by_run = json.loads(run(capsys, "plan", str(directory), "--seconds-per-model", "0.5", "--json")[1])
    spec = (tmp_path / "mine.yaml").write_text((directory / "run.yaml").read_text())
    assert spec
    code, out, err = run(capsys, "plan", "mine.yaml", "--seconds-per-model", "0.5", "--gpu-usd-per-hour", "2", "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["train"]["mine.yaml"]["models"] == 104
    assert data["download"] == by_run["download"]
    assert data["usd"] == pytest.approx(104 * 0.5 / 3600 * 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml", "run"]
    code, _, err = run(capsys, "plan", "nowhere.yaml")
    assert (code, "dmpipeline init" in err) == (2, True)


def test_planning_trains_into_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "run"
    run(capsys, "init", str(directory), "--models", "30", "--held-out", "2", "--retrainings", "2")
    assert run(capsys, "plan", str(directory))[0] == 0
    assert json.loads(run(capsys, "status", str(directory), "--json")[1])["n_rows_done"] == 0


def test_a_plan_says_what_it_assumes(capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, "plan", "cifar/50pct")[2]
    for words in ("$4.10 an hour", "an assumption", "second-hand", "list prices of", "training costs less below $"):
        assert words in said
    said = run(capsys, "plan", "cifar/50pct", "--gpu-usd-per-hour", "1", "--seconds-per-model", "3", "--gpus", "2")[2]
    assert "2 devices at $1.00" in said
    assert "as given" in said
    assert "assumption" not in said


def test_a_plan_says_where_fitting_comes_on_top(capsys: pytest.CaptureFixture[str]) -> None:
    for name, left_out in (("cifar/50pct", True), ("cifar/50pct/*_datamodels", True), ("cifar/50pct/*_margins", False)):
        code, out, err = run(capsys, "plan", name, "--json")
        assert (code, json.loads(out)["fitting_left_out"], "fitting" in err) == (0, left_out, left_out)


@pytest.mark.parametrize("option", ["--seconds-per-model", "--gpu-usd-per-hour"])
@pytest.mark.parametrize("number", ["nan", "inf", "-1", "many"])
def test_a_plan_takes_finite_numbers_only(option: str, number: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "plan", "cifar/50pct", option, number)
    assert (code, out, option in err) == (2, "", True)


def test_the_download_of_a_run_goes_where_bytes_are_set_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = str(tmp_path / "run")
    run(capsys, "init", directory, "--models", "30", "--held-out", "2", "--retrainings", "2")
    monkeypatch.setenv("DMDATA_TO", "same-region")
    code, out, err = run(capsys, "plan", directory, "--seconds-per-model", "1", "--json")
    download = json.loads(out)["download"]
    assert (code, "to same-region" in err) == (0, True)
    assert download["usd"] == pytest.approx(download["requests"] * 0.0004 / 1000)


def test_a_catalog_that_does_not_say_how_many_models_there_are_is_refused_with_the_remedy() -> None:
    artifact = dataclasses.replace(dmdata.load_catalog().find("cifar/50pct/train_masks"), rows=None)
    with pytest.raises(CatalogError, match="add alpha and rows"):
        release_models([artifact])
