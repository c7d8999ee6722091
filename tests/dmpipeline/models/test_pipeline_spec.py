import doctest
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dmpipeline.spec
from dmpipeline.errors import SpecError
from dmpipeline.models.recipes import Perceptron, find_recipe
from dmpipeline.spec import RecipeSpec, RunSpec

SPECS = st.builds(
    RunSpec,
    alpha=st.integers(1, 99).map(lambda percent: percent / 100),
    n_models=st.integers(1, 500),
    held_out=st.fixed_dictionaries({"n_subsets": st.integers(0, 20), "n_retrainings": st.integers(1, 12)}),
    seed=st.integers(0, 2**64 - 1),
    block_models=st.integers(1, 600),
    masks=st.sampled_from(["exact", "bernoulli", "/data/masks.npy"]),
    outputs=st.lists(
        st.sampled_from(["margins", "test_logits", "train_log_likelihoods", "predicted_labels", "test_squared_errors"]),
        min_size=1,
    ),
)


@given(SPECS)
def test_a_spec_written_as_yaml_reads_back_equal(tmp_path_factory, spec):
    path = tmp_path_factory.mktemp("spec") / "run.yaml"
    path.write_text(spec.to_yaml())
    assert RunSpec.read(path) == spec


@given(SPECS)
def test_blocks_cover_every_row_once_and_in_order(spec):
    assert [row for rows in spec.blocks for row in rows] == list(range(spec.n_rows))
    assert all(len(rows) == spec.block_models for rows in spec.blocks[:-1])


@given(SPECS)
def test_models_come_first_and_retrainings_of_a_subset_are_adjacent(spec):
    rows = range(spec.n_rows)
    subsets = spec.subset_indices(rows)[spec.rows.held_out].reshape(-1, spec.held_out.n_retrainings)
    assert spec.rows.models == slice(0, spec.n_models)
    assert len(subsets) == spec.held_out.n_subsets
    assert (subsets == subsets[:, :1]).all()
    assert len(np.unique(spec.subset_indices(rows))) == spec.n_models + spec.held_out.n_subsets
    assert len(np.unique(spec.model_indices(rows))) == spec.n_rows


def test_more_models_leave_the_first_ones_and_the_held_out_ones_as_they_are():
    held_out = {"n_subsets": 3, "n_retrainings": 2}
    short, long = RunSpec(n_models=10, held_out=held_out), RunSpec(n_models=25, held_out=held_out)
    for numbers in (RunSpec.subset_indices, RunSpec.model_indices):
        of_short, of_long = numbers(short, range(16)), numbers(long, range(31))
        assert (of_short[:10] == of_long[:10]).all()
        assert (of_short[10:] == of_long[25:]).all()


def test_an_empty_mapping_is_the_demo():
    spec = RunSpec()
    assert (spec.dataset, spec.alpha, spec.n_rows, spec.alpha_name) == ("digits", 0.5, 5000, "50pct")
    assert find_recipe(spec.recipe) == Perceptron(hidden=64, epochs=15, batch_size=64, lr=0.3, momentum=0.9)


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({"alpha": 1.5}, "alpha", ["1.5", "0.01 to 0.99"]),
        ({"alpha": 0.125}, "alpha", ["0.125", "whole percents"]),
        ({"alpha": float("nan")}, "alpha", ["nan"]),
        ({"n_models": -1}, "n_models", ["-1", "0 or more"]),
        ({"n_models": 0, "held_out": {"n_subsets": 0}}, "held_out", ["something to train"]),
        ({"masks": "poisson"}, "masks", ["'poisson'", "bernoulli"]),
        ({"outputs": ["margin"]}, "outputs", ["margin", "log_likelihoods"]),
        ({"outputs": []}, "outputs", ["margins"]),
        ({"n_models": "many"}, "n_models", ["'many'", "write for example n_models: 4000"]),
        ({"n_model": 3}, "n_model", ["choose n_models"]),
        ({"held_out": {"n_subset": 3}}, "held_out.n_subset", ["choose n_subsets"]),
        ({"held_out": {"n_retrainings": 0}}, "held_out.n_retrainings", ["from 1"]),
        ({"held_out": 3}, "held_out", ["mapping"]),
        ({"seed": -1}, "seed", ["-1", "2**64 - 1"]),
        ({"version": 2}, "version", ["2", "version: 1"]),
    ],
)
def test_a_field_that_cannot_be_used_is_named_with_its_value_and_a_remedy(values, field, words):
    with pytest.raises(SpecError) as caught:
        RunSpec(**values)
    assert caught.value.field == field
    for word in (field, *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("alpha: [", "not YAML"),
        ("- alpha", "no mapping"),
        ("1: 2", "no mapping"),
        ("", "no mapping"),
        ("alpha: !!python/object:os.system {}", "not YAML"),
    ],
)
def test_a_file_that_is_no_spec_is_refused(tmp_path, text, words):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=words) as caught:
        RunSpec.read(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_names_the_command_that_writes_one(tmp_path):
    with pytest.raises(SpecError, match="dmpipeline init"):
        RunSpec.read(tmp_path / "run.yaml")


def test_a_relative_dataset_is_taken_from_the_folder_of_its_file(tmp_path):
    (tmp_path / "run.yaml").write_text("dataset: ../letters.npz\n")
    assert RunSpec.read(tmp_path / "run.yaml").dataset == str(Path(tmp_path).parent.resolve() / "letters.npz")


def test_every_form_of_dataset_with_a_path_gets_an_absolute_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "letters").mkdir()
    (tmp_path / "digits").mkdir()
    here = tmp_path.resolve()
    located = {
        "letters": f"{here}/letters",
        "./letters": f"{here}/letters",
        "there/letters": f"{here}/there/letters",
        "/there": "/there",
        "~/letters.npz": "/home/me/letters.npz",
        "cifar10:../data": f"cifar10:{here.parent}/data",
        "cifar10:/data": "cifar10:/data",
        "fmow:~/fmow_v1.1": "fmow:/home/me/fmow_v1.1",
        # no paths: a name, and mistakes, which are to be shown as they were written
        "digits": "digits",
        "digit": "digit",
        "fmow:": "fmow:",
        "cifar:/data": "cifar:/data",
    }
    assert {dataset: RunSpec(dataset=dataset).located(tmp_path).dataset for dataset in located} == located


@pytest.mark.parametrize(
    ("recipe", "field", "words"),
    [
        ({"name": "percepton"}, "recipe.name", "choose perceptron"),
        ({"name": "perceptron", "version": 7}, "recipe.version", "choose 1"),
        ({"hiden": 3}, "recipe.hiden", "choose hidden"),
        ({"momentum": 1.0}, "recipe.momentum", "below 1"),
        ({"lr": float("inf")}, "recipe.lr", "positive step size"),
    ],
)
def test_an_unknown_recipe_or_hyperparameter_names_the_nearest_one(recipe, field, words):
    with pytest.raises(SpecError, match=words) as caught:
        find_recipe(RecipeSpec(**recipe))
    assert caught.value.field == field


def test_overrides_of_a_recipe_are_part_of_the_spec():
    spec = RunSpec(recipe={"name": "perceptron", "epochs": 3})
    assert find_recipe(spec.recipe) == Perceptron(epochs=3)
    assert spec != RunSpec()
    assert "epochs: 3" in spec.to_yaml()


def test_the_examples_in_the_documentation_run():
    assert doctest.testmod(dmpipeline.spec).failed == 0


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({"outputs": "margins"}, "outputs", "a list of margins, logits"),
        ({"outputs": []}, "outputs", "a list of"),
        ({"outputs": ["margin"]}, "outputs", "a list of"),
        ({"outputs": ["test_train_margins"]}, "outputs", "a list of"),
        ({"outputs": [3]}, "outputs", "a list of"),
        ({"masks": "bernouilli"}, "masks", "exact, bernoulli, or the path"),
        ({"masks": ""}, "masks", "exact, bernoulli, or the path"),
        ({"masks": "masks.npz"}, "masks", "exact, bernoulli, or the path"),
    ],
)
def test_masks_and_outputs_that_cannot_be_are_refused_with_a_remedy(values, field, words):
    with pytest.raises(SpecError, match=words) as caught:
        RunSpec(**values)
    assert caught.value.field == field


def test_outputs_name_arrays_of_both_parts_or_of_one_each_once():
    assert RunSpec(outputs=["test_margins", "logits", "margins"]).arrays == (
        "train_masks",
        "test_margins",
        "test_logits",
        "train_logits",
        "train_margins",
    )


def test_a_relative_file_of_masks_is_taken_from_the_folder_of_its_spec(tmp_path):
    (tmp_path / "run.yaml").write_text("dataset: digits\nmasks: of mine/masks.npy\n")
    spec = RunSpec.read(tmp_path / "run.yaml")
    assert spec.masks == str(tmp_path / "of mine/masks.npy")
    assert spec.located("/elsewhere") == spec
    assert RunSpec(masks="bernoulli").located(tmp_path).masks == "bernoulli"
