"""A run whose dataset, masks or own directory were moved: found where they went together, else it says what to do."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from cluster_runs import faults, write_letters

import dmdata
from dmpipeline.cli.command import commands
from dmpipeline.errors import RunError, SpecError
from dmpipeline.runs.extension import extend
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec
from dmpipeline.training.train import Way

WAY = Way("products", 4)


@pytest.fixture
def project(tmp_path):
    """A folder with data and a run of it, half trained."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    write_letters(folder / "data", 40, 7)
    return folder


def created(folder, **values):
    settings = {"recipe": {"hidden": 4, "epochs": 1}, "n_models": 8, "held_out": {"n_subsets": 0}, "block_models": 4}
    run = Run.create(folder / "runs" / "run", RunSpec(dataset=str(folder / "data/letters.npz"), **(settings | values)))
    run.train(way=WAY, blocks=[0])
    return run


def given(folder, n=8):
    path = folder / "masks.npy"
    np.save(path, np.random.default_rng(0).random((n, 40)) < 0.5)
    return str(path)


def call(*words):
    done = CliRunner().invoke(commands, [str(word) for word in words])
    return done.exit_code, done.stdout, done.exception


def test_a_run_that_is_moved_together_with_its_dataset_and_masks_finds_both(project, tmp_path):
    masks = given(project)
    before = created(project, masks=masks).read_block(range(4))
    moved = shutil.move(project, tmp_path / "elsewhere" / "deep")
    run = Run.open(moved / "runs" / "run")
    assert run.spec.dataset == str(moved / "data" / "letters.npz")
    assert run.spec.masks == str(moved / "masks.npy")
    run.train()
    assert all((run.read_block(range(4))[name] == before[name]).all() for name in run.spec.arrays)
    assert not faults(run)
    assert dmdata.open("letters/given/train_masks", catalog=run.path).shape == (8, 40)


def test_a_moved_run_can_be_extended(project, tmp_path):
    created(project)
    moved = shutil.move(project, tmp_path / "elsewhere")
    extend(Run.open(moved / "runs" / "run"), 12)
    run = Run.open(moved / "runs" / "run")
    run.train()
    assert (run.spec.n_models, run.n_rows_done) == (12, 12)


def test_a_copy_of_a_run_reads_the_dataset_that_is_still_there(project, tmp_path):
    created(project)
    shutil.copytree(project / "runs", tmp_path / "copy")
    assert Run.open(tmp_path / "copy" / "run").dataset().n_train == 40


def test_a_dataset_that_was_moved_alone_is_named_with_the_remedy(project, tmp_path):
    run = created(project)
    shutil.move(project / "data" / "letters.npz", tmp_path / "renamed.npz")
    for act in (Run.open(run.path).dataset, Run.open(run.path).train):
        with pytest.raises(SpecError, match=r"letters\.npz of the run at .* is not there; .*--dataset PATH") as caught:
            act()
    remedy = str(caught.value).partition("`")[2].partition("`")[0].replace("PATH", str(tmp_path / "renamed.npz"))
    assert call(*remedy.split()[1:])[0] == 0


@pytest.mark.parametrize("command", ["run", "verify", "status"])
def test_where_a_dataset_is_now_is_said_once_and_remembered(project, tmp_path, command, monkeypatch):
    run = created(project)
    run.train()
    shutil.move(project / "data" / "letters.npz", tmp_path / "renamed.npz")
    monkeypatch.chdir(tmp_path)
    code, _, error = call(command, run.path, "--dataset", "renamed.npz", "-q")
    if command != "verify":  # which finds that nothing is learned of made-up examples
        assert (code, error) == (0, None)
    opened = Run.open(run.path)
    assert opened.spec.dataset == str(tmp_path / "renamed.npz")
    assert opened.spec == RunSpec.read(run.path / "run.yaml")
    # artifacts keep the name that they have in catalogs
    assert opened.dataset().name == "letters"
    assert not faults(opened)
    shutil.move(tmp_path, moved := tmp_path.with_name(tmp_path.name + "-moved"))
    assert Run.open(moved / "project/runs/run").spec.dataset == str(moved / "renamed.npz")


def test_another_dataset_is_refused_and_nothing_changes(project, tmp_path):
    run = created(project)
    before = {name: (run.path / name).read_bytes() for name in ("run.yaml", "provenance.json")}
    (tmp_path / "other").mkdir()
    other = write_letters(tmp_path / "other", 41, 7)
    for dataset, kind, words in (
        (other, RunError, "has fingerprint"),
        (tmp_path / "none.npz", SpecError, "is not there; correct the path"),
        (f"cifar10:{tmp_path}", SpecError, "give where that is now"),
        ("digits", SpecError, "give where that is now"),
    ):
        with pytest.raises(kind, match=words):
            Run.open(run.path, dataset=str(dataset))
        assert call("status", run.path, "--dataset", dataset)[0] != 0
    assert {name: (run.path / name).read_bytes() for name in before} == before
    run.train()


def test_a_dataset_without_a_path_has_no_other_place(tmp_path):
    run = Run.create(tmp_path / "run", RunSpec(n_models=2, held_out={"n_subsets": 0}))
    assert json.loads((run.path / "provenance.json").read_text())["places"] == {}
    with pytest.raises(SpecError, match="digits, which has no path; leave out --dataset"):
        Run.open(run.path, dataset=str(tmp_path))


def test_masks_that_were_moved_alone_are_named_with_the_remedy(project, tmp_path):
    run = created(project, masks=given(project))
    shutil.move(project / "masks.npy", tmp_path / "mine.npy")
    with pytest.raises(SpecError, match=r"write where it is now as masks in the run\.yaml"):
        Run.open(run.path).train()
    text = (run.path / "run.yaml").read_text()
    (run.path / "run.yaml").write_text(text.replace(str(project / "masks.npy"), str(tmp_path / "mine.npy")))
    Run.open(run.path).train()


def test_a_run_made_before_places_were_on_record_reads_as_before(project, tmp_path):
    run = created(project)
    facts = json.loads((run.path / "provenance.json").read_text())
    del facts["places"]
    (run.path / "provenance.json").write_text(json.dumps(facts))
    Run.open(run.path).train(blocks=[0])
    moved = shutil.move(project, tmp_path / "elsewhere")
    with pytest.raises(SpecError, match="--dataset PATH"):
        Run.open(moved / "runs/run").train()
    opened = Run.open(moved / "runs/run", dataset=str(moved / "data/letters.npz"))
    opened.train()
    assert opened.n_rows_done == 8
