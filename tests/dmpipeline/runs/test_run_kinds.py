"""Runs of every kind of dataset and learner, from their creation to the export."""

import json
import shutil
import sys

import numpy as np
import pytest
import zarr
from cluster_runs import faults

from dmdata.catalog.entries import load_file
from dmpipeline import workflow
from dmpipeline.checks.verification import replay
from dmpipeline.errors import IncompleteRunError, RunError, RunExistsError, SpecError
from dmpipeline.exporting.export import export_run
from dmpipeline.models.outputs import log_likelihoods, squared_errors
from dmpipeline.report.of_run import report_run
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec
from dmpipeline.training.train import Way

USERS = """
from torch import nn

class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
    def forward(self, tokens):
        return self.head(self.embedding(tokens))
"""


@pytest.fixture
def users(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "kinds_users.py").write_text(USERS)
    yield tmp_path / "kinds_users.py"
    sys.modules.pop("kinds_users", None)


def saved(path, train, test):
    np.savez(path, train_inputs=train[0], train_labels=train[1], test_inputs=test[0], test_labels=test[1])
    return str(path)


def classes_at(path):
    rng = np.random.default_rng(0)
    parts = [(rng.normal(size=(n, 6)), np.arange(n) % 3) for n in (30, 5)]
    return saved(path / "classes.npz", *parts)


def numbers_at(path, k):
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(6, k))
    inputs = rng.normal(size=(30, 6)), rng.normal(size=(5, 6))
    labels = [x @ weights + 0.1 * rng.normal(size=(len(x), k)) for x in inputs]
    return saved(path / "numbers.npz", *((x, y[:, 0] if k == 1 else y) for x, y in zip(inputs, labels, strict=True)))


def sequences_at(path):
    rng = np.random.default_rng(0)
    parts = []
    for n in (30, 5):
        tokens = rng.integers(0, 5, (n, 4))
        labels = (tokens + 1) % 5
        labels[::2, -1] = -1
        parts.append((tokens, labels))
    return saved(path / "sequences.npz", *parts)


SMALL = {"hidden": 4, "epochs": 2, "batch_size": 5, "lr": 0.02}
LANGUAGE = {"name": "module", "network": "kinds_users:Language", "epochs": 3, "batch_size": 5, "lr": 0.1}


def spec_of(dataset, **changes):
    values = {
        "dataset": dataset,
        "n_models": 20,
        "held_out": {"n_subsets": 4, "n_retrainings": 2},
        "recipe": SMALL,
        "block_models": 8,
    }
    return RunSpec(**(values | changes))


def whole_circle(run, way, folder):
    """Train, verify, fit, evaluate and export; return the catalog of the export."""
    run.train(way=way)
    assert not faults(run)
    datamodels = workflow.fit_run(run)
    assert datamodels.weight.shape == (30, 5)
    assert np.isfinite(workflow.evaluate_run(run).mse)
    catalog = load_file(run.path)
    name = run.provenance["dataset"]["name"]
    listed = {artifact.name for artifact in catalog.artifacts()}
    assert {f"{name}/{run.alpha_name}/{array}" for array in run.spec.arrays} <= listed
    for array in run.spec.arrays:
        artifact = catalog.find(f"{name}/{run.alpha_name}/{array}")
        assert artifact.schema.shape == run.array(array).shape
        assert (zarr.open_array(artifact.url, mode="r")[:] == run.array(array)[:]).all()
    files = export_run(run, folder, run.datamodels_path)
    keys = {file.key for file in files}
    assert keys == {f"{name}/data/{array}_{run.alpha_name}.npy" for array in run.spec.arrays} | {
        f"{name}/datamodels/test_{run.alpha_name}.pt"
    }
    for array in run.spec.arrays:
        assert (np.load(folder / name / f"data/{array}_{run.alpha_name}.npy") == run.array(array)[:]).all()
    return load_file(folder)


@pytest.mark.parametrize("k", [1, 2])
def test_a_regression_goes_the_whole_circle(tmp_path, k):
    run = Run.create(tmp_path / "run", spec_of(numbers_at(tmp_path, k), outputs=["squared_errors", "predictions"]))
    exported = whole_circle(run, Way("products", 4), tmp_path / "export")
    assert run.fitted_array == "test_squared_errors"
    data = run.dataset()
    predictions = run.array("test_predictions")[:]
    assert predictions.shape == (28, 5) if k == 1 else (28, 5, 2)
    expected = squared_errors(predictions.reshape(28, 5, k), data.test_labels)
    assert (run.array("test_squared_errors")[:] == expected).all()
    assert exported.find("numbers/50pct/test_predictions").schema.dtype == "float32"
    assert report_run(run, workflow.evaluate_run(run)).exists()


def test_predictions_alone_of_one_number_are_what_is_fitted(tmp_path):
    run = Run.create(tmp_path / "run", spec_of(numbers_at(tmp_path, 1), outputs=["predictions"]))
    assert run.fitted_array == "test_predictions"
    two = Run.create(tmp_path / "two", spec_of(numbers_at(tmp_path, 2), outputs=["predictions", "squared_errors"]))
    assert two.fitted_array == "test_squared_errors"
    none = Run.create(tmp_path / "none", spec_of(numbers_at(tmp_path, 2), outputs=["predictions"]))
    with pytest.raises(SpecError, match="one number per test example"):
        _ = none.fitted_array


def test_a_run_of_sequences_goes_the_whole_circle(tmp_path, users):
    outputs = ["log_likelihoods", "logits", "predicted_labels"]
    run = Run.create(tmp_path / "run", spec_of(sequences_at(tmp_path), recipe=LANGUAGE, outputs=outputs))
    exported = whole_circle(run, Way("vmap", 4), tmp_path / "export")
    assert run.fitted_array == "test_log_likelihoods"
    data = run.dataset()
    logits = run.array("test_logits")[:]
    assert logits.shape == (28, 5, 4, 5)
    assert (run.array("test_log_likelihoods")[:] == log_likelihoods(logits, data.test_labels)).all()
    assert (run.array("test_predicted_labels")[:] == logits.argmax(-1)).all()
    assert exported.find("sequences/50pct/test_logits").schema.shape == (28, 5, 4, 5)
    # the next token is learned
    right = logits.argmax(-1) == data.test_labels
    assert right[:, data.test_labels >= 0].mean() > 0.4
    assert report_run(run, workflow.evaluate_run(run)).exists()


@pytest.mark.parametrize("masks", ["bernoulli", "given"])
def test_subsets_of_unequal_sizes_go_the_whole_circle(tmp_path, masks):
    if masks == "given":
        masks = str(tmp_path / "masks.npy")
        np.save(masks, np.random.default_rng(1).random((24, 30)) < 0.5)
    run = Run.create(tmp_path / "run", spec_of(classes_at(tmp_path), masks=masks))
    whole_circle(run, None, tmp_path / "export")  # the way is found by trying
    sizes = run.array("train_masks")[:].sum(1)
    assert len(set(sizes)) > 3
    held_out = run.array("train_masks")[run.spec.rows.held_out]
    assert (held_out[::2] == held_out[1::2]).all()


@pytest.mark.parametrize("outputs", [["margins", "logits"], ["predictions"]])
def test_outputs_that_the_datasets_models_do_not_have_create_nothing(tmp_path, outputs):
    dataset = numbers_at(tmp_path, 1) if outputs != ["predictions"] else classes_at(tmp_path)
    with pytest.raises(SpecError, match="do not exist"):
        Run.create(tmp_path / "run", spec_of(dataset, outputs=outputs))
    assert not (tmp_path / "run").exists()


def test_a_change_of_the_users_own_code_is_refused_at_training(tmp_path, users):
    run = Run.create(tmp_path / "run", spec_of(sequences_at(tmp_path), recipe=LANGUAGE, outputs=["log_likelihoods"]))
    run.train(way=Way("loop", 1), blocks=[0])
    users.write_text(USERS + "\n# mended\n")
    for act in (run.train, run.trainer, lambda: replay(run, 0)):
        with pytest.raises(RunError, match="has changed since"):
            act()
    users.write_text(USERS)
    run.train()
    run.require_complete()


def test_a_change_of_the_users_own_masks_is_refused_at_training(tmp_path):
    masks, path = np.random.default_rng(1).random((24, 30)) < 0.5, tmp_path / "masks.npy"
    np.save(path, masks)
    run = Run.create(tmp_path / "run", spec_of(classes_at(tmp_path), masks=str(path)))
    run.train(way=Way("loop", 1), blocks=[0])
    np.save(path, ~masks)
    for act in (run.train, lambda: replay(run, 0)):
        with pytest.raises(RunError, match=r"masks.npy have changed since"):
            act()
    path.unlink()
    with pytest.raises(SpecError, match="restore the file"):
        run.train()
    np.save(path, masks)
    run.train()
    run.require_complete()


def test_hyperparameters_in_tuples_are_those_in_lists(tmp_path):
    rng = np.random.default_rng(0)
    parts = [(rng.integers(0, 256, (n, 6, 6), np.uint8), np.arange(n) % 3) for n in (30, 5)]
    dataset = saved(tmp_path / "pictures.npz", *parts)
    run = Run.create(tmp_path / "run", spec_of(dataset, recipe={"name": "convnet", "channels": (3, 4)}))
    again = Run.create(tmp_path / "run", spec_of(dataset, recipe={"name": "convnet", "channels": [3, 4]}))
    assert again.path == run.path
    with pytest.raises(RunExistsError, match="recipe"):
        Run.create(tmp_path / "run", spec_of(dataset, recipe={"name": "convnet", "channels": (3, 5)}))


@pytest.mark.parametrize(
    ("way", "masks"),
    [
        (Way("products", 3), "exact"),
        (Way("vmap", 3), "exact"),
        (Way("vmap", 3), "bernoulli"),
        (Way("loop", 1), "bernoulli"),
    ],
)
def test_a_row_trained_again_in_the_same_way_is_the_same_to_the_bit(tmp_path, way, masks):
    run = Run.create(tmp_path / "run", spec_of(classes_at(tmp_path), masks=masks))
    run.train(way=way)
    before = run.provenance
    for row in (0, 7, 8, 13, 27):
        found = replay(run, row)
        assert found.row == row
        assert found.is_same
        assert found.agrees
        assert set(found.differences) == set(run.spec.arrays[1:])
        assert set(found.differences.values()) == {0.0}
    assert run.provenance == before


def test_the_way_is_on_record_for_a_kind_of_device_and_kept_by_whoever_goes_on(tmp_path):
    run = Run.create(tmp_path / "run", spec_of(classes_at(tmp_path)))
    run.train(way=Way("vmap", 3), blocks=[0])
    assert run.provenance["ways"] == {"cpu": {"method": "vmap", "n_models": 3, "compiled": False}}
    assert run.find_way() == Way("vmap", 3)
    assert run.find_way(n_models=5) == Way("vmap", 5)
    assert run.find_way(method="loop") == Way("loop", 1)
    # as it was written before networks could be compiled
    facts = run.provenance | {"ways": {"cpu": {"method": "products", "n_models": 2}}}
    (run.path / "provenance.json").write_text(json.dumps(facts))
    assert run.trainer().way == Way("products", 2)
    run.train()
    assert [session["way"]["method"] for session in run.provenance["sessions"]] == ["vmap", "products"]
    with pytest.raises(SpecError, match="only loop trains one model at a time"):
        run.train(way=run.find_way(method="loop", n_models=4))


def test_a_row_trained_again_in_another_way_agrees(tmp_path):
    run = Run.create(tmp_path / "run", spec_of(classes_at(tmp_path)))
    run.train(way=Way("products", 3))
    for way in (Way("loop", 1), Way("vmap", 5)):
        found = replay(run, 9, way=way)
        assert found.agrees
        assert max(found.differences.values()) < 0.01


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run = Run.create(folder / "run", spec_of(classes_at(folder)))
    run.train(way=Way("products", 4))
    return run


@pytest.fixture
def run(tmp_path, trained):
    """A copy of a trained run, to be damaged."""
    return Run.open(shutil.copytree(trained.path, tmp_path / "run"))


@pytest.mark.parametrize("damage", ["noise", "another row", "nan", "inf", "mask"])
def test_a_tampered_row_does_not_agree(run, damage):
    logits = run.array("train_logits")[5]
    if damage == "noise":
        run.array("train_logits")[5] = logits + np.random.default_rng(0).normal(0, 0.1, logits.shape)
    elif damage == "another row":
        run.array("train_logits")[5] = run.array("train_logits")[6]
    elif damage in ("nan", "inf"):
        logits[0, 0] = float(damage)
        run.array("train_logits")[5] = logits
    else:
        run.array("train_masks")[5] = ~run.array("train_masks")[5]
    found = replay(run, 5)
    assert not found.is_same
    assert not found.agrees
    assert replay(run, 4).is_same


def test_a_row_that_is_not_there_or_not_trained_cannot_be_trained_again(run):
    for row in (-1, 28):
        with pytest.raises(SpecError, match="choose 0 to 27"):
            replay(run, row)
    run.array("block_digests")[1] = 0
    with pytest.raises(IncompleteRunError, match="row 9 is not trained"):
        replay(run, 9)


def test_the_command_says_whether_a_row_is_the_same_and_ends_with_3_where_it_is_not(run, capsys):
    from dmpipeline.cli.command import main

    def says(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["run", str(run.path), *arguments])
        return ended.value.code, capsys.readouterr()

    code, said = says("--replay", "5")
    assert code == 0
    assert "the same to the bit" in said.err
    code, said = says("--replay", "5", "--method", "loop")
    assert code == 0
    run.array("train_masks")[5] = ~run.array("train_masks")[5]
    code, said = says("--replay", "5", "--json")
    assert code == 3
    assert '"agrees": false' in said.out
    assert "null" in said.out
