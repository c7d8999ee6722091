"""What is made from a run says what it was made from, and is called old once the run has something else."""

import html
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from sklearn.datasets import load_wine

from dmpipeline import workflow
from dmpipeline.cli.command import main
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.report.of_run import report_run
from dmpipeline.runs.derivation import OldResultWarning, n_models_of, old_results
from dmpipeline.runs.extension import extend
from dmpipeline.runs.rows import block_digest
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec
from dmpipeline.training.train import Way

WAY = Way("products", 20)
N_MODELS, MORE = 60, 90


def call(capsys, *arguments):
    """Run a command; return its exit code, its JSON if it printed any, and what it said to people."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    data = json.loads(captured.out) if captured.out.startswith("{") else captured.out
    return ended.value.code, data, captured.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the wines with everything that is made from one, and the same extended; made once."""
    folder = tmp_path_factory.mktemp("derived")
    inputs, labels = load_wine(return_X_y=True)
    inputs = ((inputs - inputs.mean(0)) / inputs.std(0)).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:100], order[100:130]
    arrays = {"train_inputs": inputs[train], "train_labels": labels[train]}
    np.savez(folder / "wine.npz", **arrays, test_inputs=inputs[test], test_labels=labels[test])
    spec = RunSpec(
        dataset=str(folder / "wine.npz"),
        n_models=N_MODELS,
        held_out={"n_subsets": 4, "n_retrainings": 2},
        block_models=20,
        recipe={"name": "perceptron", "epochs": 5},
    )
    run = Run.create(folder / "run", spec)
    run.train(way=WAY)
    workflow.fit_run(run)
    workflow.curve_run(run, [30, N_MODELS])
    report_run(run, workflow.evaluate_run(run))
    shutil.copytree(run.path, folder / "longer")
    extend(Run.open(folder / "longer"), MORE).train(way=WAY)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run")
    return Run.open(tmp_path / "run")


@pytest.fixture
def longer(finished, tmp_path):
    shutil.copytree(finished / "longer", tmp_path / "longer")
    return Run.open(tmp_path / "longer")


def old(run):
    return {result.what: result for result in old_results(run)}


def store_again(run, row):
    """Have other bits in a row of the margins, stored as training them again would; done twice, the old ones."""
    number = row // run.spec.block_models
    rows = run.spec.blocks[number]
    block = {name: np.array(values) for name, values in run.read_block(rows).items()}
    block["test_margins"][row - rows.start] *= -1
    run.array("test_margins")[rows.start : rows.stop] = block["test_margins"]
    run.arrays["block_digests"][number] = np.frombuffer(block_digest(block), np.uint8)


def test_nothing_is_old_of_a_run_that_was_just_finished_or_copied(run, capsys):
    assert old(run) == {}
    code, data, said = call(capsys, "status", run.path, "--json")
    assert (code, data["old"]) == (0, [])
    code, data, said = call(capsys, "evaluate", run.path, "--json")
    assert (code, data["n_models"], data["targets"], data["warnings"]) == (0, N_MODELS, "test", [])
    assert "warning" not in said
    assert old(run) == {}


def test_after_an_extension_status_lists_what_is_old_why_and_what_to_run(longer, capsys):
    code, data, _ = call(capsys, "status", longer.path, "--json")
    assert code == 0
    assert [set(result) for result in data["old"]] == [{"what", "path", "why", "next"}] * 4
    found = {result["what"]: result for result in data["old"]}
    assert list(found) == ["datamodels", "evaluation", "curve", "report"]
    assert found["datamodels"]["path"] == str(longer.datamodels_path)
    assert found["datamodels"]["why"] == f"fitted on {N_MODELS} models, the run has {MORE}"
    assert found["datamodels"]["next"] == f"dmpipeline fit {longer.path}"
    assert found["curve"]["next"] == f"dmpipeline curve {longer.path}"
    code, text, _ = call(capsys, "status", longer.path)
    assert code == 0
    assert f"fitted on {N_MODELS} models, the run has {MORE}" in text
    assert f"dmpipeline fit {longer.path}" in text


def test_status_of_several_runs_names_what_is_old_in_each(run, longer, capsys):
    assert run.path.parent == longer.path.parent
    code, text, _ = call(capsys, "status", run.path.parent)
    assert code == 0
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert lines["longer"].endswith("datamodels, evaluation, curve, report")
    assert "datamodels" not in lines["run"]


def test_old_datamodels_are_scored_as_what_they_are(longer, capsys):
    code, data, said = call(capsys, "evaluate", longer.path, "--json")
    assert (code, data["n_models"]) == (0, N_MODELS)
    (warning,) = data["warnings"]
    assert f"fitted on {N_MODELS} models, the run has {MORE}; next: dmpipeline fit {longer.path}" in warning
    assert f"warning: {warning}" in said
    assert json.loads((longer.path / "evaluation.json").read_text())["n_models"] == N_MODELS
    assert "datamodels that are old" in old(longer)["evaluation"].why
    code, text, _ = call(capsys, "evaluate", longer.path)
    assert f"{N_MODELS}" in next(line for line in text.splitlines() if line.split()[:1] == ["models"])


def test_the_page_says_how_many_models_were_fitted_on_and_that_they_are_not_all(longer, capsys):
    code, data, said = call(capsys, "report", longer.path, "--json")
    assert (code, data["n_models"], len(data["warnings"])) == (0, N_MODELS, 2)
    assert said.count("warning:") == 2
    page = html.unescape((longer.path / "report.html").read_text())
    assert f"From {N_MODELS} models trained" in page
    assert f"From {MORE} models" not in page
    assert f"These datamodels are old: fitted on {N_MODELS} models, the run has {MORE}" in page
    assert f"This curve is old: drawn when the run had {N_MODELS} models, it has {MORE}" in page


def test_python_is_warned_of_old_datamodels(longer):
    with pytest.warns(OldResultWarning, match=f"fitted on {N_MODELS} models, the run has {MORE}"):
        evaluation = workflow.evaluate_run(longer)
    with pytest.warns(OldResultWarning, match=f"dmpipeline fit {longer.path}"):
        report_run(longer, evaluation)


def test_an_export_of_old_datamodels_says_so_here_and_in_its_catalog(run, longer, tmp_path, capsys):
    code, data, said = call(capsys, "export", longer.path, tmp_path / "out", "--json")
    assert code == 0
    assert len(data["warnings"]) == 1
    assert "warning:" in said

    def note(folder):
        alphas = yaml.safe_load((folder / "catalog.yaml").read_text())["datasets"]["wine"]["alphas"]
        return alphas["50pct"]["arrays"]["test_datamodels"].get("note")

    assert note(tmp_path / "out") == f"fitted on {N_MODELS} models, the run has {MORE}"
    code, data, _ = call(capsys, "export", run.path, tmp_path / "fresh", "--json")
    assert (data["warnings"], note(tmp_path / "fresh")) == ([], None)


def test_making_everything_again_in_the_order_that_is_named_leaves_nothing_old(longer, capsys):
    commands = []
    while left := old_results(longer):
        commands.append(left[0].next.split()[1])
        assert call(capsys, *left[0].next.split()[1:], "-q")[0] == 0
        assert len(commands) <= 4, commands
    assert commands == ["fit", "evaluate", "curve", "report"]
    assert n_models_of(longer) == MORE
    assert f"From {MORE} models trained" in (longer.path / "report.html").read_text()


def test_everything_is_old_once_a_row_was_trained_again_to_other_bits(run):
    store_again(run, 25)
    assert set(old(run)) == {"datamodels", "evaluation", "curve", "report"}
    assert "trained again" in old(run)["datamodels"].why
    store_again(run, 25)
    assert old(run) == {}


def test_held_out_rows_that_were_trained_again_make_scores_old_and_no_datamodels(run):
    store_again(run, N_MODELS + 5)
    assert set(old(run)) == {"evaluation", "curve", "report"}
    assert "held-out models were trained again" in old(run)["evaluation"].why


def test_models_that_are_missing_are_trained_before_anything_is_made_of_them(run):
    shutil.rmtree(run.path / "store.zarr" / "block_digests" / "c" / "1")
    results = old(run)
    assert set(results) == {"datamodels", "evaluation", "curve", "report"}
    assert {result.next for result in results.values()} == {f"dmpipeline run {run.path}"}
    run.train(way=WAY)
    assert old(run) == {}


def test_scores_of_datamodels_that_somebody_replaced_are_old(run):
    theirs = Datamodels.load(run.datamodels_path)
    theirs.weight[:] *= 2
    theirs.save(run.datamodels_path)
    assert set(old(run)) == {"evaluation", "report"}
    assert "other datamodels" in old(run)["evaluation"].why
    assert n_models_of(run) is None
    assert workflow.fit_facts(run) == {}
    report_run(run, workflow.evaluate_run(run))
    assert old(run) == {}
    page = (run.path / "report.html").read_text()
    assert "From models trained" in page
    assert f"From {N_MODELS} models" not in page


def test_a_page_is_old_once_another_curve_was_drawn(run):
    workflow.curve_run(run, [40, N_MODELS])
    assert set(old(run)) == {"report"}
    assert "curve" in old(run)["report"].why


def test_a_fit_is_to_be_done_again_as_it_was_done(run):
    workflow.fit_run(run, folds=3, is_positive=True)
    store_again(run, 25)
    assert old(run)["datamodels"].next == f"dmpipeline fit {run.path} --folds 3 --positive"
    workflow.fit_run(run, validation=0.2)
    store_again(run, 25)
    assert old(run)["datamodels"].next == f"dmpipeline fit {run.path} --validation 0.2"


def test_a_fit_from_before_there_were_notes_says_how_many_models_it_is_of(longer, run):
    for some in (longer, run):
        shutil.rmtree(some.path / "made_from")
    assert set(old(longer)) == {"datamodels"}
    assert old(longer)["datamodels"].why == f"fitted on {N_MODELS} models, the run has {MORE}"
    assert old(run) == {}
    assert n_models_of(run) == N_MODELS


def test_status_tells_of_a_run_whose_digests_are_damaged(run, capsys):
    (run.path / "store.zarr" / "block_digests" / "c" / "0" / "0").write_bytes(b"cut short")
    code, data, _ = call(capsys, "status", run.path, "--json")
    assert code == 0
    assert [result["what"] for result in data["old"]] == ["datamodels", "evaluation", "curve", "report"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sha256": 3}', '{"made_from": "here"}'])
def test_a_note_that_cannot_be_read_is_of_nothing(run, text):
    for note in (run.path / "made_from").iterdir():
        note.write_text(text)
    assert old(run) == {}


def test_a_path_with_spaces_is_quoted_in_what_to_run(longer):
    spaced = longer.path.with_name("a longer run")
    longer.path.rename(spaced)
    assert old(Run.open(spaced))["datamodels"].next == f"dmpipeline fit '{spaced}'"


def test_a_command_of_its_own_says_it_on_standard_error_and_prints_json_alone(longer):
    program = "from dmpipeline.cli.command import main; main()"
    command = [sys.executable, "-c", program, "evaluate", str(longer.path), "--json", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert json.loads(done.stdout)["n_models"] == N_MODELS
    assert done.stderr.count("is old: fitted on") == 1
