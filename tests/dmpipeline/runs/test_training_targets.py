"""Datamodels of training examples: which wrong labels they show, where they lie, and what they need."""

import json
import shutil

import numpy as np
import pytest
from sklearn.datasets import load_iris

import dmdata
import dmpipeline
from dmpipeline import workflow
from dmpipeline.cli.command import main
from dmpipeline.errors import IncompleteRunError, SpecError
from dmpipeline.fitting.attribution import gradient_scores
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.fitting.fitting import fit
from dmpipeline.runs.store import Run
from dmpipeline.runs.targets import datamodels_path, fitted_array
from dmpipeline.spec import RunSpec
from dmpipeline.training.train import Way

WRONG = (3, 17, 41)
N_MODELS, N_TRAIN, N_TEST = 300, 110, 40
WAY = Way("products", 50)


def call(capsys, *arguments):
    """Run a command; return its exit code, its JSON if it printed any, and what it said to people."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    data = json.loads(captured.out) if captured.out.startswith("{") else captured.out
    return ended.value.code, data, captured.err


@pytest.fixture(scope="module")
def iris(tmp_path_factory):
    """The irises, three of the training ones with a wrong label; the first training examples are test examples, too."""
    inputs, labels = load_iris(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    inputs, labels = ((inputs - inputs.mean(0)) / inputs.std(0))[order].astype(np.float32), labels[order]
    labels[list(WRONG)] = (labels[list(WRONG)] + 1) % 3
    folder = tmp_path_factory.mktemp("iris")
    train, test = slice(0, N_TRAIN), slice(0, N_TEST)
    arrays = {"train_inputs": inputs[train], "train_labels": labels[train]}
    np.savez(folder / "iris.npz", **arrays, test_inputs=inputs[test], test_labels=labels[test])
    return str(folder / "iris.npz")


def made(path, iris, **values):
    spec = RunSpec(dataset=iris, n_models=N_MODELS, held_out={"n_subsets": 5, "n_retrainings": 2}, **values)
    return Run.create(path, spec)


@pytest.fixture(scope="module")
def fitted(iris, tmp_path_factory):
    """A run with datamodels of training examples and nothing else; made once."""
    run = made(tmp_path_factory.mktemp("targets") / "run", iris)
    run.train(way=WAY)
    workflow.fit_run(run, targets="train")
    return run.path


@pytest.fixture
def run(fitted, tmp_path):
    shutil.copytree(fitted, tmp_path / "run")
    return Run.open(tmp_path / "run")


def test_wrong_labels_have_the_largest_weights_on_themselves(run):
    datamodels = workflow.load_datamodels(run, "train")
    assert datamodels.weight.shape == (N_TRAIN, N_TRAIN)
    assert set(np.argsort(-np.diag(datamodels.weight))[: len(WRONG)]) == set(WRONG)


def test_they_are_fitted_to_what_the_models_say_of_training_examples(run):
    rows = run.spec.rows.models
    expected = fit(run.array("train_masks")[rows], run.array("train_margins")[rows])
    got = Datamodels.load(run.path / "datamodels" / "train_50pct.pt")
    np.testing.assert_allclose(got.weight, expected.weight, atol=1e-5)
    assert datamodels_path(run, "train") == run.path / "datamodels" / "train_50pct.pt"
    assert run.datamodels_path == run.path / "datamodels" / "test_50pct.pt"
    assert not run.datamodels_path.exists()


def test_the_catalog_lists_them_as_the_release_does(run):
    weight = dmdata.open("iris/50pct/train_datamodels/weight", catalog=run.path)
    released = dmdata.load_catalog().find("cifar/50pct/train_datamodels/weight").schema
    assert weight.dims == released.dims
    assert dmdata.load_catalog(run.path).has("iris/50pct/train_margins")
    assert not dmdata.load_catalog(run.path).has("iris/50pct/test_datamodels")


def test_both_kinds_lie_side_by_side_each_with_its_own_notes_scores_curve_and_page(run, capsys):
    assert call(capsys, "fit", run.path, "--folds", 3, "-q")[0] == 0
    code, data, said = call(capsys, "fit", run.path, "--targets", "train", "--json")
    assert (code, data["targets"], data["validation"]) == (0, "train", 0.1)
    assert data["datamodels"] == str(run.path / "datamodels" / "train_50pct.pt")
    assert f"next: dmpipeline evaluate {run.path} --targets train" in said
    assert "folds" in workflow.fit_facts(run)
    assert "folds" not in workflow.fit_facts(run, "train")
    scores = {}
    for targets, n_targets in (("test", N_TEST), ("train", N_TRAIN)):
        code, scores[targets], said = call(capsys, "evaluate", run.path, "--targets", targets, "--compare", "--json")
        assert (code, scores[targets]["n_targets"], scores[targets]["targets"]) == (0, n_targets, targets)
        assert f"next: dmpipeline report {run.path}{'' if targets == 'test' else ' --targets train'}" in said
        assert call(capsys, "curve", run.path, "--counts", "100,300", "--targets", targets, "-q")[0] == 0
        code, page, _ = call(capsys, "report", run.path, "--targets", targets, "--json")
        assert (code, page["warnings"]) == (0, [])
        prefix = "" if targets == "test" else "train_"
        assert page["report"] == str(run.path / f"{prefix}report.html")
        assert f"margin of {n_targets} targets" in (run.path / f"{prefix}report.html").read_text()
        for name in ("evaluation.json", "curve.json", "curve.svg"):
            assert (run.path / f"{prefix}{name}").is_file()
    assert scores["test"]["lds"] != scores["train"]["lds"]
    assert scores["train"]["lds"] > 0.5
    code, data, _ = call(capsys, "status", run.path, "--json")
    assert (data["datamodels"], data["train_datamodels"], data["old"]) == (True, True, [])


def test_the_export_has_them_where_the_release_has_its_own(run, tmp_path, capsys):
    workflow.fit_run(run)
    code, data, _ = call(capsys, "export", run.path, tmp_path / "out", "--json")
    keys = {file["name"]: file["key"] for file in data["files"]}
    assert code == 0
    assert keys["iris/50pct/train_datamodels"] == "iris/datamodels/train_50pct.pt"
    assert keys["iris/50pct/test_datamodels"] == "iris/datamodels/test_50pct.pt"
    for name in ("train", "test"):
        exported = Datamodels.load(f"iris/50pct/{name}_datamodels", catalog=tmp_path / "out")
        np.testing.assert_array_equal(exported.weight, workflow.load_datamodels(run, name).weight)


def test_a_fit_of_test_examples_does_not_touch_those_of_training_examples_even_damaged_ones(run):
    before = datamodels_path(run, "train").read_bytes()
    workflow.fit_run(run)
    assert datamodels_path(run, "train").read_bytes() == before
    datamodels_path(run, "train").write_bytes(before[:1000])
    workflow.fit_run(run)
    catalog = dmdata.load_catalog(run.path)
    assert catalog.has("iris/50pct/test_datamodels")
    assert not catalog.has("iris/50pct/train_datamodels")
    workflow.fit_run(run, targets="train")
    assert dmdata.load_catalog(run.path).has("iris/50pct/train_datamodels")


def test_scores_before_a_fit_say_which_fit_is_missing(iris, tmp_path):
    run = made(tmp_path / "run", iris)
    with pytest.raises(IncompleteRunError, match=r"no datamodels of training examples yet; .*fit \S+ --targets train"):
        workflow.load_datamodels(run, "train")


@pytest.mark.parametrize("command", ["run", "fit", "evaluate", "curve", "report"])
def test_a_run_that_stores_no_outputs_of_training_examples_is_refused_with_the_remedy(iris, tmp_path, capsys, command):
    run = made(tmp_path / "run", iris, outputs=("test_margins",))
    code, _, said = call(capsys, command, run.path, "--targets", "train")
    assert code == 2
    assert "outputs are test_margins" in said
    assert "--outputs margins`" in said
    assert run.n_rows_done == 0
    assert not (run.path / "catalog.yaml").exists()


def test_what_the_remedy_says_to_write_is_accepted(iris, tmp_path):
    run = made(tmp_path / "run", iris, outputs=("test_margins", "logits"))
    with pytest.raises(SpecError, match=r"--outputs margins,logits") as refused:
        fitted_array(run, "train")
    assert refused.value.facts["value"] == ["test_margins", "logits"]
    assert fitted_array(made(tmp_path / "other", iris, outputs=("margins", "logits")), "train") == "train_margins"


def test_the_same_output_is_taken_of_both_kinds_where_it_is_stored(iris, tmp_path):
    run = made(tmp_path / "run", iris, outputs=("test_log_likelihoods", "margins", "train_log_likelihoods"))
    assert fitted_array(run) == "test_log_likelihoods"
    assert fitted_array(run, "train") == "train_log_likelihoods"
    with pytest.raises(SpecError, match="targets are 'held_out'; choose test or train"):
        fitted_array(run, "held_out")


def test_a_run_for_training_targets_names_their_fit_next(run, capsys):
    code, _, said = call(capsys, "run", run.path, "--targets", "train")
    assert code == 0
    assert f"dmpipeline fit {run.path} --targets train" in said


def test_gradient_scores_of_training_examples_are_those_of_the_same_examples_as_test_examples(run):
    of_train, of_test = (gradient_scores(run, n_models=2, targets=targets) for targets in ("train", "test"))
    assert of_train.shape == (N_TRAIN, N_TRAIN)
    np.testing.assert_allclose(of_train[:, :N_TEST], of_test, rtol=1e-3, atol=1e-4)


def test_a_prior_of_gradients_guides_the_fit_of_training_examples(run, capsys):
    code, data, _ = call(capsys, "fit", run.path, "--targets", "train", "--prior", "gradient", "--json")
    assert code == 0
    assert 0 <= data["prior_strength"] <= 1
    assert set(np.argsort(-np.diag(workflow.load_datamodels(run, "train").weight))[: len(WRONG)]) == set(WRONG)


def test_from_python_a_run_without_datamodels_names_the_call_that_fits_them(iris, tmp_path):
    run = made(tmp_path / "run", iris)
    with pytest.raises(IncompleteRunError, match=r"dmpipeline\.Run\.open\('.*run'\)\.train\(\)"):
        dmpipeline.fit_run(run.path)
    for targets, own in (("test", ""), ("train", ", targets='train'")):
        with pytest.raises(IncompleteRunError) as refused:
            dmpipeline.explain(run.path, 0, targets=targets)
        assert f"or in Python with dmpipeline.fit_run({str(run.path)!r}{own})" in str(refused.value)
        with pytest.raises(IncompleteRunError, match=r"dmpipeline\.fit_run"):
            dmpipeline.evaluate_run(str(run.path), targets)


def test_from_python_a_run_is_fitted_scored_explained_and_shown_by_its_path(run):
    path = str(run.path)
    dmpipeline.fit_run(path)
    evaluation = dmpipeline.evaluate_run(path)
    assert evaluation.n_targets == run.dataset().n_test
    assert dmpipeline.explain(path, 0).index == 0
    assert dmpipeline.report_run(path, evaluation, parts=[]).is_file()
