"""A run.yaml that was edited is noticed by every command, and what is refused leaves the run as it was."""

import json
import shutil

import numpy as np
import pytest
import yaml
from cluster_runs import faults, write_letters
from sklearn.datasets import load_diabetes, load_wine

from dmpipeline.cli.command import main
from dmpipeline.data.folders import save_dataset
from dmpipeline.errors import RunError, SpecChangedError, SpecError
from dmpipeline.runs.pinned import differences, pin
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec
from dmpipeline.training.train import Way

WAY = Way("products", 8)

LEARNER = """
import numpy as np

def learn(dataset, mask, seed):
    rng = np.random.default_rng([seed % 2**32, int(mask.sum())])
    return [rng.normal(size=(len(labels), dataset.n_classes)) for labels in (dataset.train_labels, dataset.test_labels)]
"""


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return write_letters(tmp_path_factory.mktemp("data"), 40, 6)


@pytest.fixture
def spec(letters):
    return RunSpec(
        dataset=letters,
        n_models=10,
        held_out={"n_subsets": 3, "n_retrainings": 2},
        recipe={"hidden": 4, "epochs": 1},
        block_models=4,
    )


@pytest.fixture
def run(tmp_path, spec):
    made = Run.create(tmp_path / "run", spec)
    made.train(way=WAY)
    return made


def edit(run, **changes):
    path = run.path / "run.yaml"
    values = yaml.safe_load(path.read_text())
    for name, value in changes.items():
        *within, last = name.split("__")
        place = values
        for part in within:
            place = place[part]
        place[last] = value
    path.write_text(yaml.safe_dump(values))


@pytest.mark.parametrize("command", ["run", "status", "verify", "fit", "evaluate", "curve", "report", "plan"])
def test_every_command_notices_an_edited_run_yaml(run, capsys, command):
    edit(run, recipe__lr=0.001)
    before = files(run.path)
    code, _, said = call(capsys, command, run.path)
    assert code == (3 if command == "verify" else 1)
    assert "recipe.lr is 0.001, rows were made by 0.3" in said
    assert "init OTHER --spec" in said
    assert files(run.path) == before


def test_export_notices_too(run, tmp_path, capsys):
    edit(run, seed=9)
    code, _, said = call(capsys, "export", run.path, tmp_path / "out")
    assert (code, (tmp_path / "out").exists()) == (1, False)
    assert "seed is 9, rows were made by 0" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "seed is 1"),
        ({"alpha": 0.2}, "alpha is 0.2"),
        ({"block_models": 5}, "block_models is 5"),
        ({"outputs": ["margins"]}, "outputs is"),
        ({"masks": "bernoulli"}, "masks is"),
        ({"held_out__n_subsets": 4}, "held_out.n_subsets is 4"),
        ({"held_out__n_retrainings": 3}, "held_out.n_retrainings is 3"),
        ({"recipe__name": "logistic-regression"}, "recipe.name is"),
        ({"recipe__hidden": 5}, "recipe.hidden is 5, rows were made by 4"),
        ({"n_models": 12}, "--models 12"),
        ({"n_models": 8, "seed": 3}, "n_models is 8"),
    ],
)
def test_whatever_rows_depend_on_is_pinned(run, changes, said):
    edit(run, **changes)
    with pytest.raises(SpecChangedError) as raised:
        Run.open(run.path)
    assert said in str(raised.value)
    assert raised.value.differences


def test_a_default_that_is_written_out_is_no_difference(run):
    edit(run, recipe__lr=0.3, recipe__momentum=0.9)
    assert Run.open(run.path).n_rows_done == 16


def test_what_was_put_back_is_the_run_again(run):
    before = (run.path / "run.yaml").read_bytes()
    edit(run, n_models=200)
    with pytest.raises(SpecChangedError):
        Run.open(run.path)
    (run.path / "run.yaml").write_bytes(before)
    assert Run.open(run.path).n_rows_done == 16


def test_half_a_run_is_not_continued_by_another_learner(tmp_path, spec, capsys):
    half = Run.create(tmp_path / "half", spec)
    half.train(way=WAY, blocks=[0, 2])
    edit(half, recipe__lr=0.001)
    code, _, said = call(capsys, "run", half.path)
    assert code == 1
    assert "recipe.lr" in said
    edit(half, recipe__lr=0.3)
    assert call(capsys, "run", half.path, "-q")[0] == 0
    assert Run.open(half.path).n_rows_done == 16


def test_a_dataset_at_another_place_is_the_same_as_long_as_its_examples_are(run, letters, tmp_path):
    copy = shutil.copy(letters, tmp_path / "letters.npz")
    edit(run, dataset=str(copy))
    assert Run.open(run.path).n_rows_done == 16
    edit(run, dataset="digits")
    with pytest.raises((RunError, SpecError), match="not as it was"):
        Run.open(run.path)


def test_a_session_says_which_spec_its_rows_were_made_by(run):
    facts = run.provenance
    assert facts["spec"]["recipe"] == {"name": "perceptron", "version": 1, "hidden": 4, "epochs": 1}
    assert {session["spec_digest"] for session in facts["sessions"]} == {facts["spec_digest"]}


def test_a_run_made_before_specs_were_pinned_is_pinned_when_it_is_trained(tmp_path, spec):
    run = Run.create(tmp_path / "run", spec)
    run.train(way=WAY, blocks=[0])
    facts = run.provenance
    del facts["spec"], facts["spec_digest"]
    (run.path / "provenance.json").write_text(json.dumps(facts))
    Run.open(run.path).train(way=WAY)
    edit(run, seed=3)
    with pytest.raises(SpecChangedError):
        Run.open(run.path)


def test_a_run_made_before_specs_were_pinned_has_no_room_for_more_models_by_hand(run):
    facts = {name: fact for name, fact in run.provenance.items() if not name.startswith("spec")}
    (run.path / "provenance.json").write_text(json.dumps(facts))
    edit(run, n_models=200)
    with pytest.raises(SpecChangedError, match=r"206 models .* room for 16 .*--models N"):
        Run.open(run.path)
    edit(run, n_models=10)
    assert Run.open(run.path).n_rows_done == 16


def test_a_hyperparameter_that_is_set_to_null_stays_so(tmp_path):
    given = RunSpec(n_models=4, recipe={"name": "cifar-fast", "mean": None, "std": None})
    (tmp_path / "run.yaml").write_text(given.to_yaml())
    assert RunSpec.read(tmp_path / "run.yaml").recipe.overrides == {"mean": None, "std": None}
    assert differences(RunSpec(**pin(given)["spec"]), given) == {}
    assert set(differences(given, RunSpec(n_models=4, recipe={"name": "cifar-fast"}))) == {"recipe.mean", "recipe.std"}


@pytest.mark.parametrize("name", ["model_scores", "row_digests"])
def test_what_is_only_on_record_may_be_damaged(tmp_path, spec, capsys, name):
    run = Run.create(tmp_path / "run", spec)
    run.train(way=WAY)
    assert call(capsys, "run", run.path, "--models", "13", "--shard", "1/5", "-q")[0] == 0  # leaves blocks that are cut
    for file in (run.path / "store.zarr" / name / "c").rglob("*"):
        if file.is_file():
            file.write_bytes(b"nothing")
    for command in ("status", "run", "verify"):
        code = call(capsys, command, run.path, "-q")[0]
        assert code == (3 if command == "verify" else 0)  # nothing is learned of made-up examples
    assert call(capsys, "run", run.path, "--models", "17", "-q")[0] == 0
    assert not faults(Run.open(run.path))


@pytest.fixture
def own_code(tmp_path, monkeypatch, letters):
    """A complete run of a function of the user's own, and the module it lies in."""
    module = tmp_path / f"learner_{tmp_path.name}.py"  # Python imports a module once
    module.write_text(LEARNER)
    monkeypatch.syspath_prepend(tmp_path)
    run = Run.create(
        tmp_path / "own",
        RunSpec(
            dataset=letters,
            n_models=10,
            held_out={"n_subsets": 0},
            recipe={"name": "function", "function": f"{module.stem}:learn"},
            block_models=4,
        ),
    )
    run.train()
    return run, module


@pytest.mark.parametrize("more", [[], ["--workers", "1"], ["--shard", "1/2"]])
def test_an_extension_that_is_refused_leaves_every_file_as_it_was(own_code, capsys, more):
    run, module = own_code
    module.write_text(LEARNER + "# a comment\n")
    before = files(run.path)
    code, _, said = call(capsys, "run", run.path, "--models", "20", *more)
    assert code == 1
    assert "has changed" in said
    assert files(run.path) == before
    assert Run.open(run.path).n_rows_done == 10


@pytest.mark.parametrize(
    "options",
    [
        ["--device", "cuda:7"],
        ["--method", "products"],  # of a function, which trains its models itself
        ["--at-once", "4"],
        ["--workers", "1", "--method", "vmap"],
        ["--workers", "1", "--device", "cuda:7"],
        ["--scheduler", "tcp://127.0.0.1:9"],
        ["--models", "3"],
        ["--shard", "3/2"],
        ["--replay", "400"],
    ],
)
def test_options_that_cannot_be_used_are_refused_before_the_run_is_extended(own_code, capsys, options):
    run, _ = own_code
    before = files(run.path)
    code, _, said = call(capsys, "run", run.path, *([] if "--models" in options else ["--models", "20"]), *options)
    assert code != 0
    assert said
    assert files(run.path) == before


def test_of_several_runs_all_are_asked_before_one_is_extended(tmp_path, spec, capsys):
    for name, n_models in (("a", 10), ("b", 30)):
        Run.create(tmp_path / "runs" / name, spec.model_copy(update={"n_models": n_models})).train(way=WAY)
    before = files(tmp_path / "runs")
    code, _, said = call(capsys, "run", tmp_path / "runs", "--models", "20")
    assert code == 2
    assert "never shrinks" in said
    assert files(tmp_path / "runs") == before


def test_options_count_over_the_file_that_spec_names(tmp_path, spec, letters, capsys):
    (tmp_path / "half.yaml").write_text(spec.to_yaml())
    options = ["--seed", "7", "--models", "12", "--alpha", "0.3", "--retrainings", "4", "--set", "lr=0.1"]
    assert call(capsys, "init", tmp_path / "run", "--spec", tmp_path / "half.yaml", *options)[0] == 0
    made = Run.open(tmp_path / "run").spec
    assert (made.seed, made.n_models, made.alpha) == (7, 12, 0.3)
    assert (made.held_out.n_subsets, made.held_out.n_retrainings) == (3, 4)
    assert made.recipe.overrides == {"hidden": 4, "epochs": 1, "lr": 0.1}
    assert (made.dataset, made.block_models) == (letters, 4)


def test_without_options_the_file_is_taken_as_it_is(tmp_path, spec, capsys):
    (tmp_path / "half.yaml").write_text(spec.model_copy(update={"seed": 5, "alpha": 0.2}).to_yaml())
    assert call(capsys, "init", tmp_path / "run", "--spec", tmp_path / "half.yaml")[0] == 0
    made = Run.open(tmp_path / "run").spec
    assert (made.seed, made.alpha, made.n_models) == (5, 0.2, 10)


def test_another_recipe_does_not_inherit_hyperparameters_of_the_files(tmp_path, spec, capsys):
    (tmp_path / "half.yaml").write_text(spec.to_yaml())
    options = ["--spec", tmp_path / "half.yaml", "--recipe", "logistic-regression", "--alpha", "0.2", "--alpha", "0.5"]
    assert call(capsys, "init", tmp_path / "runs", *options)[0] == 0
    for name in ("20pct", "50pct"):
        recipe = Run.open(tmp_path / "runs" / name).spec.recipe
        assert recipe.name == "logistic-regression"
        assert "hidden" not in recipe.overrides
        assert recipe.overrides.get("epochs") != 1


def test_another_dataset_decides_for_itself_what_a_runs_own_file_had_decided(tmp_path, capsys):
    data = load_diabetes()
    save_dataset(tmp_path / "sugar", (data.data[:300], data.target[:300]), (data.data[300:], data.target[300:]))
    data = load_wine()
    save_dataset(tmp_path / "wine", (data.data[::2], data.target[::2]), (data.data[1::2], data.target[1::2]))
    assert call(capsys, "init", tmp_path / "a", "--dataset", tmp_path / "wine", "--models", "6", "--seed", "3")[0] == 0
    assert Run.open(tmp_path / "a").spec.recipe.overrides == {"epochs": 30}
    file = tmp_path / "a" / "run.yaml"
    assert call(capsys, "init", tmp_path / "b", "--spec", file, "--dataset", tmp_path / "sugar")[0] == 0
    made = Run.open(tmp_path / "b").spec
    assert (made.task, made.inputs, made.seed, made.n_models) == ("regression", "standardised", 3, 6)
    assert made.outputs == ("squared_errors", "predictions")
    assert made.recipe.overrides == {"lr": 0.05, "weight_decay": 0.07}
    assert call(capsys, "init", tmp_path / "c", "--spec", file, "--inputs", "as-is")[0] == 0
    made = Run.open(tmp_path / "c").spec
    assert (made.task, made.inputs, made.recipe.overrides) == ("classification", "as-is", {})


def test_of_several_alphas_all_runs_are_made_or_none(tmp_path, letters, capsys):
    common = ["--dataset", letters, "--models", "4"]
    code, _, said = call(capsys, "init", tmp_path / "runs", *common, "--alpha", "0.5", "--alpha", "0.01")
    assert (code, (tmp_path / "runs").exists()) == (2, False)
    assert "alpha 0.01" in said


def test_rows_that_an_extension_moved_are_the_same_rows(run, spec, tmp_path, capsys):
    before = {name: run.array(name)[:] for name in run.spec.arrays}
    assert call(capsys, "run", run.path, "--models", "15", "-q")[0] == 0
    after = Run.open(run.path)
    for name, array in before.items():
        np.testing.assert_array_equal(after.array(name)[:10], array[:10])
        np.testing.assert_array_equal(after.array(name)[15:], array[10:])
