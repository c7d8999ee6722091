"""Wrong labels and copies within a training set are found, whatever is stored of models."""

import json

import numpy as np
import pytest

from dmpipeline.applications.inspecting.suspects import suspects
from dmpipeline.applications.leakage import duplicates
from dmpipeline.data.datasets import load_dataset
from dmpipeline.errors import IncompleteRunError, SpecError
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec
from dmpipeline.workflow.run_arrays import open_rows

N_TRAIN = 600
FLIPPED = np.arange(0, N_TRAIN, 30)
COPIES = {(10, 201): True, (11, 202): True, (12, 203): False}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Digits of which some bear a wrong label; three are copies of others, one of them with another label."""
    place, digits = tmp_path_factory.mktemp("suspects"), load_dataset("digits")
    inputs, labels = digits.train_inputs[:N_TRAIN].reshape(-1, 8, 8).copy(), digits.train_labels[:N_TRAIN].copy()
    labels[FLIPPED] = (labels[FLIPPED] + 3) % 10
    for (one, other), is_same in COPIES.items():
        inputs[other] = inputs[one]
        labels[other] = labels[one] if is_same else (labels[one] + 1) % 10
    test = {"test_inputs": digits.test_inputs[:20].reshape(-1, 8, 8), "test_labels": digits.test_labels[:20]}
    np.savez(place / "flipped.npz", train_inputs=inputs, train_labels=labels, **test)
    return place


def trained(place, outputs, *, dataset="flipped.npz"):
    spec = RunSpec(
        dataset=str(place / dataset), n_models=100, outputs=outputs, recipe={"name": "perceptron", "version": 1}
    )
    run = Run.create(place / "-".join(outputs), spec)
    run.train()
    return run


@pytest.fixture(scope="module")
def run(place):
    return trained(place, ("margins", "logits"))


def test_flipped_labels_are_the_most_suspect_and_the_true_ones_suggested(run):
    found = suspects(run, top=len(FLIPPED))
    rows = {row.index: row for row in found}
    right = rows.keys() & set(FLIPPED.tolist())
    assert len(right) >= 0.7 * len(FLIPPED)
    true = load_dataset("digits").train_labels
    assert np.mean([rows[index].suggested == true[index] for index in right]) >= 0.8
    assert all(rows[index].label != true[index] for index in right)
    assert found.array == "train_logits"


@pytest.mark.parametrize("output", ["margins", "log_likelihoods"])
def test_outputs_of_one_number_rank_labels_as_well(place, output):
    found = suspects(trained(place, (output,)), top=len(FLIPPED))
    assert len({row.index for row in found} & set(FLIPPED.tolist())) >= 0.7 * len(FLIPPED)
    assert {row.suggested for row in found} == {None}


def test_only_models_not_trained_on_an_example_are_asked_of_it(place):
    run = trained(place, ("margins",))
    found = suspects(run, top=N_TRAIN)
    masks, margins = (np.asarray(open_rows(run, f"train_{name}", slice(0, 100))[:]) for name in ("masks", "margins"))
    for row in found.rows[:5]:
        mean = margins[~masks[:, row.index].astype(bool), row.index].astype(np.float64).mean()
        assert row.score == pytest.approx(1 / (1 + np.exp(mean)))


def test_wrong_numbers_of_a_regression_are_the_most_suspect(tmp_path):
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((240, 5)).astype(np.float32)
    numbers = (inputs @ np.array([1, -2, 0.5, 0, 3])).astype(np.float32)
    wrong = np.arange(0, 200, 20)
    numbers[wrong] += 15
    parts = {"train_inputs": inputs[:200], "train_labels": numbers[:200]}
    np.savez(tmp_path / "numbers.npz", **parts, test_inputs=inputs[200:], test_labels=numbers[200:])
    found = suspects(trained(tmp_path, ("squared_errors", "predictions"), dataset="numbers.npz"), top=len(wrong))
    assert len({row.index for row in found} & set(wrong.tolist())) >= 9
    assert all(abs(row.suggested - row.label) > 5 for row in found.rows[:5])


def test_suspects_are_json_and_progress_reaches_all_models(run):
    calls = []
    found = suspects(run, top=3, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (100, 100)
    said = json.loads(json.dumps(found.as_dict()))
    assert len(said["suspects"]) == 3
    assert said["suspects"][0].keys() >= {"index", "label", "suggested", "score"}


def test_copies_within_the_training_set_are_found_with_their_conflicts(run):
    found = duplicates(run)
    by_place = {(row.train, row.train2): row for row in found}
    assert by_place.keys() >= COPIES.keys()
    assert len(by_place) <= len(COPIES) + 2
    assert {pair: by_place[pair].same_label for pair in COPIES} == COPIES
    assert found.n_conflicting == sum(not row.same_label for row in found) >= 1
    assert all(row.score >= found.threshold for row in found)


def test_what_cannot_be_is_refused(run, place):
    with pytest.raises(SpecError, match="1 or more"):
        suspects(run, top=0)
    with pytest.raises(SpecError, match="1 or more"):
        duplicates(run, odds=0)
    spec = RunSpec(dataset=str(place / "flipped.npz"), n_models=100, recipe={"name": "perceptron", "version": 1})
    with pytest.raises(IncompleteRunError):
        suspects(Run.create(place / "untrained", spec))
