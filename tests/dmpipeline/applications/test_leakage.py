"""Copies of test examples that are planted in a training set are found, others are not, and labels are not believed."""

import json
from pathlib import Path

import numpy as np
import pytest

from dmpipeline.applications.evidence import Evidence
from dmpipeline.applications.leakage import duplicates, largest_weights, leakage, p_values
from dmpipeline.data.datasets import load_dataset
from dmpipeline.data.examples import checked_dataset
from dmpipeline.errors import IncompleteRunError, SpecError
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec

N_TRAIN, N_TEST = 400, 120


def parts(inputs, labels):
    return (inputs[:N_TRAIN], labels[:N_TRAIN]), (inputs[N_TRAIN:][:N_TEST], labels[N_TRAIN:][:N_TEST])


def digits(n=N_TRAIN + N_TEST):
    whole = load_dataset("digits")
    return whole.train_inputs[:n].reshape(-1, 8, 8).copy(), whole.train_labels[:n].copy()


def table(rng):
    """Three correlated clusters of ten features, of very different units."""
    labels = rng.integers(0, 3, N_TRAIN + N_TEST)
    mixing = rng.standard_normal((10, 10))
    inputs = (rng.standard_normal((3, 10))[labels] * 2 + rng.standard_normal((len(labels), 10))) @ mixing
    return inputs * 10.0 ** np.arange(-3, 7), labels


def texts(rng):
    """Sequences of 20 tokens out of 30, of two classes, by chains whose steps are mostly one of three."""
    labels = rng.integers(0, 2, N_TRAIN + N_TEST)
    steps = rng.integers(0, 30, (2, 30, 3))
    tokens = np.empty((len(labels), 20), np.int64)
    tokens[:, 0] = rng.integers(0, 30, len(labels))
    for position in range(1, 20):
        taken = steps[labels, tokens[:, position - 1], rng.integers(0, 3, len(labels))]
        is_any = rng.random(len(labels)) < 0.2
        tokens[:, position] = np.where(is_any, rng.integers(0, 30, len(labels)), taken)
    return tokens, labels


def run_of(path, train, test, *, task="classification"):
    """Create a run of a dataset; nothing is trained."""
    path.mkdir()
    file = path / "own.npz"
    np.savez(file, train_inputs=train[0], train_labels=train[1], test_inputs=test[0], test_labels=test[1])
    spec = RunSpec(
        dataset=str(file),
        task=task,
        **({"outputs": ["squared_errors"]} if task == "regression" else {}),
        n_models=4,
        recipe={"name": "perceptron", "version": 1},
    )
    return Run.create(path / "run", spec)


def planted(inputs, labels, change, *, n=12, seed=0):
    """Put changed copies of test examples in the place of training examples; returns the parts and what is where."""
    rng = np.random.default_rng(seed)
    train, test = ((part[0].copy(), part[1].copy()) for part in parts(inputs, labels))
    tests, trains = rng.choice(N_TEST, n, replace=False), rng.choice(N_TRAIN, n, replace=False)
    train[0][trains] = change(test[0][tests], rng)
    train[1][trains] = test[1][tests]
    return train, test, set(zip(trains.tolist(), tests.tolist(), strict=True))


def recall_and_false(found, truth):
    pairs = {(pair.train, pair.test) for pair in found}
    return len(pairs & truth) / len(truth), len(pairs - truth)


def same(inputs, _rng):
    return inputs


def one_down(pictures, _rng):
    return np.roll(pictures, 1, axis=1)


def noisy(pictures, rng):
    return np.clip(pictures + rng.normal(0, 0.1, pictures.shape), 0, 1)


def one_to_the_right(pictures, _rng):
    moved = np.zeros_like(pictures)
    moved[:, :, 1:] = pictures[:, :, :-1]
    return moved


@pytest.mark.parametrize("change", [same, noisy, one_to_the_right])
def test_copies_of_pictures_are_found_exact_noisy_and_shifted(tmp_path, change):
    train, test, truth = planted(*digits(), change)
    found = leakage(run_of(tmp_path / "it", train, test))
    recall, n_false = recall_and_false(found, truth)
    assert recall >= 0.8
    assert n_false <= 3


def test_pictures_of_bytes_with_channels_are_compared_as_those_of_floats(tmp_path):
    pictures, labels = digits()
    large = np.kron(pictures, np.ones((1, 4, 4)))[..., None] * [255, 200, 100]
    train, test, truth = planted(large.astype(np.uint8), labels, one_down)
    found = leakage(run_of(tmp_path / "it", train, test))
    recall, n_false = recall_and_false(found, truth)
    assert recall >= 0.9
    assert n_false <= 3


def test_copies_in_a_table_are_found_whatever_the_units(tmp_path):
    inputs, labels = table(np.random.default_rng(0))
    deviation = inputs.std(0)
    train, test, truth = planted(inputs, labels, lambda rows, rng: rows + rng.normal(0, 0.03, rows.shape) * deviation)
    found = leakage(run_of(tmp_path / "it", train, test))
    recall, n_false = recall_and_false(found, truth)
    assert recall >= 0.9
    assert n_false <= 3


def test_copies_of_a_regression_with_another_number_are_told(tmp_path):
    inputs, _ = table(np.random.default_rng(1))
    numbers = inputs @ np.random.default_rng(2).standard_normal(10) / 1e6
    train, test, truth = planted(inputs, numbers, same)
    train[1][[pair[0] for pair in truth]] += 1
    found = leakage(run_of(tmp_path / "it", train, test, task="regression"))
    assert {(pair.train, pair.test) for pair in found} >= truth
    assert not any(pair.same_label for pair in found if (pair.train, pair.test) in truth)


def test_texts_of_which_three_tokens_in_twenty_were_replaced_are_found():
    def replaced(tokens, rng):
        changed = tokens.copy()
        for row in changed:
            row[rng.choice(20, 3, replace=False)] = rng.integers(0, 30, 3)
        return changed

    train, test, truth = planted(*texts(np.random.default_rng(0)), replaced)
    found = leakage(_evidence(train, test))
    recall, n_false = recall_and_false(found, truth)
    assert recall >= 0.9
    assert n_false <= 5


def test_without_leakage_little_is_found_in_any_split():
    """With nothing to find, false discoveries are held where few splits find anything."""
    pictures, labels = digits(1437)
    n_with_any = 0
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(pictures))[: N_TRAIN + N_TEST]
        train, test = parts(pictures[order], labels[order])
        found = leakage(_evidence(train, test))
        n_with_any += found.n_leaked > 0
        assert found.n_leaked <= 6
    assert n_with_any <= 2


def test_copies_within_the_training_set_do_not_hide_those_of_test_examples(tmp_path):
    train, test, truth = planted(*digits(), same)
    spare = sorted(set(range(N_TRAIN)) - {pair[0] for pair in truth})
    train[0][spare[:60]] = train[0][spare[60:120]]
    run = run_of(tmp_path / "it", train, test)
    found = leakage(run)
    assert found.train_duplicate_share > 0.2
    assert {(pair.train, pair.test) for pair in found} >= truth
    natural = leakage(run, null="all")
    assert natural.n_null == N_TRAIN
    assert all(pair.identical for pair in natural)  # which are listed whatever is usual


@pytest.fixture(scope="module")
def planted_evidence():
    train, test, truth = planted(*digits(), same)
    train[1][min(truth)[0]] = (train[1][min(truth)[0]] + 1) % 10
    return _evidence(train, test), truth


def _evidence(train, test):
    """Return evidence with random weights, whose run knows its examples alone."""
    dataset = checked_dataset("own", train, test, source="own", example_order="as drawn")
    weight = np.random.default_rng(0).standard_normal((N_TRAIN, N_TEST)).astype(np.float32)
    zeros = np.zeros(N_TEST, np.float32)
    return Evidence("own", "test", N_TRAIN, N_TEST, run=_Known(dataset), _known=Datamodels(weight, zeros, zeros))


class _Known:
    """A run's examples; it has no datamodels."""

    datamodels_path = Path("nowhere/test_50pct.pt")

    def __init__(self, dataset):
        self._dataset = dataset

    def dataset(self):
        return self._dataset


def test_a_relabelled_copy_is_found_and_said_to_bear_another_label(planted_evidence):
    evidence, truth = planted_evidence
    found = leakage(evidence, candidates=5)
    by_place = {(pair.train, pair.test): pair for pair in found}
    assert by_place.keys() >= truth
    assert not by_place[min(truth)].same_label
    assert all(by_place[place].same_label for place in truth - {min(truth)})
    assert by_place[min(truth)].weight == evidence.datamodels().weight[min(truth)]


def test_pairs_are_json_best_first_with_what_was_controlled(planted_evidence):
    found = leakage(planted_evidence[0], q=0.05, candidates=20)
    said = json.loads(json.dumps(found.as_dict()))
    order = [(not pair["identical"], -pair["score"]) for pair in said["pairs"]]
    assert order == sorted(order)
    assert set(said["pairs"][0]) == {"train", "test", "score", "p", "distance", "weight", "same_label", "identical"}
    assert said["q"] == 0.05
    assert 0 < said["expected_false_share"] <= 0.05
    assert said["n_tested"] == N_TEST


def test_the_same_seed_finds_the_same_and_progress_reaches_its_end(planted_evidence):
    calls = []
    first = leakage(planted_evidence[0], progress=lambda done, total: calls.append((done, total)))
    assert first == leakage(planted_evidence[0])
    assert calls[-1] == (2 * N_TRAIN, 2 * N_TRAIN)
    assert calls == sorted(calls)


def test_a_release_is_refused_because_weights_alone_do_not_decide():
    weight, zeros = np.zeros((30, 3), np.float32), np.zeros(3, np.float32)
    with pytest.raises(SpecError, match="weights alone only propose"):
        leakage(Evidence("elsewhere", "test", 30, 3, _known=Datamodels(weight, zeros, zeros)))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"q": 0}, "false discovery rate between 0 and 1"),
        ({"candidates": -1}, "0 or more"),
        ({"targets": "train"}, "duplicates"),
        ({"null": "some"}, "distinct or all"),
    ],
)
def test_arguments_that_cannot_be_are_refused(planted_evidence, wrong, said):
    with pytest.raises(SpecError, match=said):
        leakage(planted_evidence[0], **wrong)


def test_a_run_without_datamodels_says_how_to_fit_them(tmp_path):
    run = run_of(tmp_path / "it", *parts(*digits()))
    with pytest.raises(IncompleteRunError, match="dmpipeline fit"):
        leakage(run, candidates=10)


def test_p_values_count_the_score_itself():
    assert p_values(np.array([5.0, 2.0, 0.0]), np.array([1.0, 2.0, 3.0])).tolist() == [0.25, 0.75, 1.0]


def test_the_largest_weights_are_those_of_a_full_sort():
    weight = np.random.default_rng(0).standard_normal((50, 7)).astype(np.float32)
    expected = np.argsort(-np.abs(weight), axis=0)[:4].T
    assert np.array_equal(np.sort(largest_weights(weight, 4), 1), np.sort(expected, 1))


def test_series_of_one_row_are_compared_and_their_copies_found():
    rng = np.random.default_rng(0)
    train, test = (
        rng.standard_normal((60, 1, 24)).astype(np.float32),
        rng.standard_normal((40, 1, 24)).astype(np.float32),
    )
    train[:8] = test[:8]
    labels = np.arange(60) % 3
    dataset = checked_dataset("series", (train, labels), (test, labels[:40]), source="series", example_order="as drawn")
    zeros = np.zeros(40, np.float32)
    evidence = Evidence(
        "series", "test", 60, 40, run=_Known(dataset), _known=Datamodels(np.zeros((60, 40), np.float32), zeros, zeros)
    )
    found = {(pair.train, pair.test) for pair in leakage(evidence)}
    copies = {(i, i) for i in range(8)}
    assert copies <= found
    assert len(found - copies) <= 3  # a tenth of what is found on average, of eight and a small null


def of_examples(train, test):
    """Return evidence that knows no weights, of examples alone."""
    dataset = checked_dataset("own", train, test, source="own", example_order="as drawn")
    n = (dataset.n_train, dataset.n_test)
    known = Datamodels(np.zeros(n, np.float32), np.zeros(n[1], np.float32), np.zeros(n[1], np.float32))
    return Evidence("own", "test", *n, run=_Known(dataset), _known=known)


@pytest.fixture(scope="module")
def four_sentences():
    """Twenty times four rows, and two of each to test on: nothing of it is unusual, and all of it is repeated."""
    rows = np.eye(4, 12, dtype=np.float32)
    inputs, labels = np.tile(rows, (22, 1)), np.tile([0, 0, 1, 1], 22)
    labels[79] = 0  # of a sentence that is labelled 1 elsewhere
    return of_examples((inputs[:80], labels[:80]), (inputs[80:], labels[80:]))


def test_identical_inputs_are_listed_where_the_whole_set_repeats_itself(four_sentences):
    found = leakage(four_sentences)
    assert (found.n_leaked, found.n_identical, found.n_tested) == (8, 8, 8)
    assert all(pair.identical and pair.distance == 0 for pair in found)
    assert {pair.train % 4 == pair.test % 4 for pair in found} == {True}
    assert not found.is_sure
    assert "8 of 8 test examples have an identical training example" in found.in_words()


def test_identical_training_examples_are_listed_with_the_first_of_them(four_sentences):
    found = duplicates(four_sentences, candidates=0)
    pairs = {(pair.train, pair.train2) for pair in found if pair.identical}
    assert pairs >= {(index % 4, index) for index in range(4, 80)}
    assert any(not pair.same_label for pair in found if pair.train2 == 79)
    assert found.n_conflicting
    assert "identical training examples" in found.in_words()


def test_pictures_of_independent_noise_are_no_copies_whatever_their_brightness():
    rng = np.random.default_rng(0)
    labels = np.arange(72) % 2
    noise = rng.normal(90 + 60 * labels[:, None, None], 25, (72, 16, 16))
    pictures = np.clip(noise, 0, 255).astype(np.uint8)
    evidence = of_examples((pictures[:60], labels[:60]), (pictures[60:], labels[60:]))
    found = duplicates(evidence, candidates=0)
    assert len(found) == 0
    assert found.in_words() == "no copies found"


def test_with_few_examples_what_is_not_identical_is_called_alike():
    pictures, labels = digits(80)
    pictures[60:63] = np.clip(pictures[:3] + 0.02, 0, 1)
    pictures[63] = pictures[3]
    found = leakage(of_examples((pictures[:60], labels[:60]), (pictures[60:], labels[60:])), q=0.3)
    assert not found.is_sure
    assert found.n_identical == 1
    assert "1 of 20 test examples has an identical training example" in found.in_words()
    if found.n_leaked > 1:
        assert "alike beyond what is usual here" in found.in_words()
        assert "a copy" not in found.in_words()
