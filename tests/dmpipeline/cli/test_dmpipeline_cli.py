"""The `dmpipeline` command, from an empty directory to a report, and what it answers when something is missing."""

import json
import re
import shutil
import sys

import numpy as np
import pytest

import dmdata
from dmpipeline.cli.command import main
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.moments.moments import Moments

SMALL = ["--models", "60", "--held-out", "4", "--retrainings", "2"]


def call(capsys, *arguments):
    """Run a command; return its exit code, its JSON if it printed any, and what it said to people."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    data = json.loads(captured.out) if captured.out.startswith("{") else captured.out
    return ended.value.code, data, captured.err


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A small demo, made once."""
    directory = tmp_path_factory.mktemp("demo") / "demo"
    with pytest.raises(SystemExit) as ended:
        main(["demo", str(directory), *SMALL, "-q"])
    assert ended.value.code == 0
    return directory


def test_the_demo_leaves_a_run_its_catalog_a_report_and_the_releases_layout(demo):
    for name in (
        "run.yaml",
        "catalog.yaml",
        "report.html",
        "export/catalog.yaml",
        "export/digits/data/train_masks_50pct.npy",
        "export/digits/data/test_margins_50pct.npy",
        "export/digits/data/train_logits_50pct.npy",
        "export/digits/datamodels/test_50pct.pt",
    ):
        assert (demo / name).is_file(), name


def test_a_run_and_its_export_open_by_the_same_call_and_agree(demo):
    for array in ("train_masks", "test_margins", "test_logits", "test_datamodels/weight"):
        ours, exported = (dmdata.open(f"digits/50pct/{array}", catalog=catalog) for catalog in (demo, demo / "export"))
        np.testing.assert_array_equal(ours[...], exported[...])
        assert ours.dims == exported.dims


def test_the_datamodels_of_a_run_and_of_its_export_keep_their_certificate(demo):
    ours, exported = (
        Datamodels.load("digits/50pct/test_datamodels", catalog=place) for place in (demo, demo / "export")
    )
    for loaded in (ours, exported):
        assert loaded.space == "raw"
        assert loaded.certificate.gap.max() < 1e-4
        assert loaded.certificate.kkt.max() < 2e-3
    np.testing.assert_array_equal(ours.validation_error, exported.validation_error)


def test_the_demo_puts_its_next_commands_on_the_path_where_they_are_not(demo, tmp_path, capsys, monkeypatch):
    (tmp_path / "own" / "bin").mkdir(parents=True)
    (tmp_path / "own" / "bin" / "activate").write_text("")
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "own"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert " . own/bin/activate; dmdata ls" in " ".join(call(capsys, "demo", demo, *SMALL, "-q")[1].split())
    tool = tmp_path / "bin" / "dmpipeline"
    tool.write_text("")
    tool.chmod(0o755)
    assert "activate" not in call(capsys, "demo", demo, *SMALL, "-q")[1]


def test_commands_are_listed_in_the_order_of_their_use(capsys):
    out = call(capsys, "--help")[1]
    places = [out.index(f"\n  {name} ") for name in ("init", "run", "verify", "fit", "evaluate", "report", "explain")]
    assert places == sorted(places)


def test_init_says_how_many_models_are_to_fit_on_and_how_many_are_held_out(tmp_path, capsys):
    code, _, err = call(capsys, "init", tmp_path / "run", "--models", 200, "--held-out", 10, "--retrainings", 3)
    assert (code, "230 models to train (200 to fit on + 10 x 3 held out); next: " in err) == (0, True)


def test_doing_the_demo_again_trains_nothing_twice(demo, capsys):
    before = json.loads((demo / "provenance.json").read_text())["sessions"]
    code, data, _ = call(capsys, "demo", demo, *SMALL, "--json", "-q")
    assert code == 0
    assert data["n_models"] == 60
    assert json.loads((demo / "provenance.json").read_text())["sessions"] == before


def test_evaluate_prints_the_scores_that_programs_rely_on(demo, capsys):
    code, data, _ = call(capsys, "evaluate", demo, "--json")
    assert code == 0
    assert {"lds", "lds_ceiling", "mse", "r2"} <= set(data)
    assert data["n_subsets"] == 4
    assert data["n_retrainings"] == 2


@pytest.mark.parametrize("command", ["run", "status", "verify", "fit", "evaluate", "report"])
def test_every_command_accepts_the_demos_directory(demo, capsys, command):
    code, data, _ = call(capsys, command, demo, "--json", "-q")
    assert code == 0
    assert isinstance(data, dict)


def test_a_run_goes_from_init_to_export_step_by_step(tmp_path, capsys):
    directory = tmp_path / "run"
    assert call(capsys, "init", directory, *SMALL, "--alpha", "0.2", "--seed", "7")[0] == 0
    code, data, _ = call(capsys, "status", directory, "--json")
    assert (code, data["n_rows"], data["n_rows_done"]) == (0, 68, 0)
    code, _, said = call(capsys, "fit", directory)
    assert code == 1
    assert "dmpipeline run" in said
    assert call(capsys, "run", directory, "-q")[0] == 0
    code, _, said = call(capsys, "evaluate", directory)
    assert code == 1
    assert "dmpipeline fit" in said
    code, data, said = call(capsys, "export", directory, tmp_path / "out", "--json")
    assert code == 0
    assert "replaced" not in said
    assert [set(file) for file in data["files"]] == [{"name", "key", "bytes", "sha256", "replaced"}] * 5
    assert "5 of 5 files replaced" in call(capsys, "export", directory, tmp_path / "out")[2]
    assert dmdata.open("digits/20pct/train_masks", catalog=tmp_path / "out")[:].sum(1).tolist() == [287] * 68


def test_a_fit_takes_its_settings_and_notes_them(demo, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(demo, run)
    code, facts, _ = call(capsys, "fit", run, "--folds", 3, "--prior", "gradient", "--positive", "--json")
    assert code == 0
    assert facts["folds"] == 3
    assert "validation" not in facts
    assert 0 <= facts["prior_strength"] <= 1
    assert (Datamodels.load(run / "datamodels" / "test_50pct.pt").weight >= 0).all()
    code, _, said = call(capsys, "fit", run, "--scheduler", "tcp://127.0.0.1:1", "--folds", 4)
    assert code == 1
    assert "no Dask scheduler answers at tcp://127.0.0.1:1" in said


def test_a_longer_run_goes_on_from_the_moments_of_a_shorter(demo, tmp_path, capsys, monkeypatch):
    longer = tmp_path / "longer"
    call(capsys, "init", longer, *SMALL[2:], "--models", 90)
    call(capsys, "run", longer)
    counted = []
    count = Moments.of.__func__

    def counting(cls, masks, outputs, *, start=0, stop=None, **settings):
        counted.append((start, stop))
        return count(cls, masks, outputs, start=start, stop=stop, **settings)

    monkeypatch.setattr(Moments, "of", classmethod(counting))
    work = tmp_path / "work"
    shutil.copytree(demo / "fitting", work)
    assert call(capsys, "fit", longer, "--work", work)[0] == 0
    assert set(counted) == {(60, 81), (81, 90)}
    weight = Datamodels.load(longer / "datamodels" / "test_50pct.pt").weight
    assert call(capsys, "fit", longer)[0] == 0
    np.testing.assert_array_equal(Datamodels.load(longer / "datamodels" / "test_50pct.pt").weight, weight)


def test_a_run_is_fitted_on_a_cluster(demo, tmp_path, capsys):
    distributed = pytest.importorskip("distributed")
    before = Datamodels.load(demo / "datamodels" / "test_50pct.pt")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, dashboard_address="127.0.0.1:0", silence_logs=50
    ) as local:
        work = ("--work", tmp_path / "work", "--scheduler", local.scheduler_address)
        assert call(capsys, "fit", demo, *work)[0] == 0
    fitted = Datamodels.load(demo / "datamodels" / "test_50pct.pt")
    # the workers' kernels may round otherwise, which 60 models of 1,437 examples let grow to what the tolerance allows
    np.testing.assert_allclose(fitted.validation_error, before.validation_error, rtol=0.02)
    assert (fitted.certificate.gap < 1e-4).all()
    assert np.median(np.abs(fitted.weight - before.weight)[before.weight != 0]) < 1e-5


def test_a_run_that_was_tampered_with_fails_verification_with_its_own_code(tmp_path, capsys):
    import zarr

    directory = tmp_path / "run"
    call(capsys, "init", directory, *SMALL)
    call(capsys, "run", directory, "-q")
    margins = zarr.open_group(directory / "store.zarr", mode="r+")["test_margins"]
    margins[3, 5] = 7.0
    code, data, said = call(capsys, "verify", directory, "--json", "-q")
    assert code == 3
    assert not data["passed"]
    assert "row 3" in json.dumps(data) or "rows 0 to" in json.dumps(data)
    assert "is not what was specified" in said


def test_an_export_into_the_run_itself_is_refused(demo, capsys):
    before = (demo / "catalog.yaml").read_bytes()
    code, _, said = call(capsys, "export", demo, demo)
    assert code == 1
    assert "choose" in said
    assert (demo / "catalog.yaml").read_bytes() == before


@pytest.fixture
def damaged(demo, tmp_path):
    """A copy of the demo's run, to be damaged."""
    ignored = shutil.ignore_patterns("export", "mirror.zarr")
    return shutil.copytree(demo, tmp_path / "run", ignore=ignored)


@pytest.mark.parametrize(
    ("array", "command"),
    [("train_masks", "fit"), ("test_margins", "evaluate"), ("test_margins", "report"), ("train_logits", "export")],
)
def test_a_damaged_chunk_names_the_run_and_the_command_that_finds_it(damaged, capsys, array, command):
    for chunk in (damaged / "store.zarr" / array / "c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(b"scrambled")
    code, _, said = call(capsys, command, damaged, *(["out"] if command == "export" else []))
    assert code == 1
    assert f"dmpipeline verify {damaged}" in said
    code, data, _ = call(capsys, "verify", damaged, "--json")
    assert code == 3
    assert "cannot be read" in json.dumps(data)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seconds": "many"}'])
def test_damaged_notes_of_a_fit_are_said_and_mended_by_fitting_again(damaged, capsys, text):
    (damaged / "datamodels/fit.json").write_text(text)
    code, _, said = call(capsys, "report", damaged)
    assert code == 1
    assert "fit.json is damaged" in said
    assert f"dmpipeline fit {damaged}" in said


def test_damaged_datamodels_are_said_and_mended_by_fitting_again(damaged, capsys):
    path = damaged / "datamodels/test_50pct.pt"
    path.write_bytes(path.read_bytes()[:1000])
    (damaged / "datamodels/fit.json").write_text("{")
    code, _, said = call(capsys, "evaluate", damaged)
    assert code == 1
    assert f"dmpipeline fit {damaged}" in said
    assert call(capsys, "fit", damaged)[0] == 0
    assert call(capsys, "report", damaged)[0] == 0


@pytest.mark.parametrize(
    ("command", "in_the_way"),
    [
        ("run", "lock"),
        ("fit", "datamodels/test_50pct.pt"),
        ("fit", "datamodels/fit.json"),
        ("evaluate", "evaluation.json"),
        ("report", "report.html"),
    ],
)
def test_a_place_that_cannot_be_written_ends_a_command_in_one_line(damaged, capsys, command, in_the_way):
    (damaged / in_the_way).unlink(missing_ok=True)
    (damaged / in_the_way).mkdir()
    code, _, said = call(capsys, command, damaged, "-q")
    assert code == 1
    where = damaged if in_the_way == "lock" else damaged / in_the_way
    assert re.match(f"dmpipeline: {where} cannot be (read|written)", said)
    assert len(said.splitlines()) == 1


def test_an_export_to_where_a_file_is_ends_in_one_line(demo, tmp_path, capsys):
    (tmp_path / "file").touch()
    code, _, said = call(capsys, "export", demo, tmp_path / "file", "-q")
    assert code == 1
    assert said.startswith(f"dmpipeline: {tmp_path / 'file'} cannot be written")
    assert len(said.splitlines()) == 1


def test_a_demo_with_one_retraining_prints_json_without_a_ceiling(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["demo", str(tmp_path / "d"), "--models", "20", "--held-out", "3", "--retrainings", "1", "--json", "-q"])

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    data = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert data["lds_ceiling"] is None
    assert isinstance(data["lds"], float)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--held-out", 0, "n_subsets 0"), ("--held-out", 2, "at least 3"), ("--models", 10, "train more models")],
)
def test_a_demo_that_could_not_be_scored_is_refused_before_anything_is_trained(tmp_path, capsys, option, value, words):
    code, _, said = call(capsys, "demo", tmp_path / "d", option, value)
    assert code == 2
    assert words in said
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["init", "x", "--alpha", "1.5"], 2, "alpha 1.5"),
        (["init", "x", "--dataset", "digit"], 2, "digits"),
        (["status", "nowhere"], 1, "dmpipeline init"),
        (["init", "file"], 1, "choose a new or empty directory"),
        (["init", "file/below"], 1, "choose another path"),
        (["init", "y" * 300], 1, "choose another path"),
        (["status", "y" * 300], 1, "choose another path"),
        (["fly"], 2, "No such command"),
        (["fit", "x", "--validation", "much"], 2, "much"),
    ],
)
def test_what_cannot_be_used_is_said_with_its_remedy(tmp_path, monkeypatch, capsys, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    ended, _, said = call(capsys, *arguments)
    assert ended == code
    assert words in said
    assert "Traceback" not in said
    assert not (tmp_path / "x").exists()


def test_the_demo_reaches_the_lds_it_promises_with_a_quarter_of_its_models(tmp_path, capsys):
    code, data, _ = call(capsys, "demo", tmp_path / "d", "--models", "1000", "--held-out", "40", "--json", "-q")
    assert code == 0
    # measured 0.72 at 1,000 models; the demo's own 4,000 reach 0.81
    assert data["lds"] > 0.65
    assert data["lds"] < data["lds_ceiling"] <= 1
