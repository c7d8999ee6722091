"""What models have learned: their scores, what these are compared with, and warnings that nobody can miss."""

import dataclasses
import json
import re
import shutil
import subprocess
import warnings

import numpy as np
import pytest
import sklearn.datasets
from cluster_runs import COMMAND
from sklearn.metrics import accuracy_score, r2_score

from dmpipeline.checks.verification import verify_run
from dmpipeline.cli.command import main
from dmpipeline.cli.demo import run_demo
from dmpipeline.data.datasets import load_dataset
from dmpipeline.data.examples import checked_dataset
from dmpipeline.errors import LearningWarning
from dmpipeline.runs.extension import extend
from dmpipeline.runs.learned import what_was_learned
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec
from dmpipeline.training.scores import SCORES, baseline_facts, stored_scores
from dmpipeline.training.train import Way

WAY = Way("products", 10)
CLASSES = {"hidden": 8, "epochs": 4}

LEARNERS = """
import numpy as np

def _both(dataset, say):
    return [say(inputs, labels) for inputs, labels in (
        (dataset.train_inputs, dataset.train_labels), (dataset.test_inputs, dataset.test_labels))]

def same_for_all(dataset, mask, seed):
    return _both(dataset, lambda inputs, labels: np.eye(dataset.n_classes)[labels])

def exploded(dataset, mask, seed):
    rng = np.random.default_rng(seed)
    return _both(dataset, lambda inputs, labels: rng.normal(size=(len(labels), 1)) * 1e6)

def means(dataset, mask, seed):
    mean = dataset.train_labels[mask].mean()
    return _both(dataset, lambda inputs, labels: np.full((len(labels), 1), mean))

def noisy(dataset, mask, seed):
    rng = np.random.default_rng(seed)
    noise = 0.7 * dataset.train_labels.std()
    return _both(dataset, lambda inputs, labels: (labels + noise * rng.normal(size=len(labels)))[:, None])

def knows_its_classes(dataset, mask, seed):
    rng, known = np.random.default_rng(seed), np.unique(dataset.train_labels[mask])
    return _both(dataset, lambda inputs, labels: np.eye(dataset.n_classes)[
        np.where(np.isin(labels, known), labels, known[0])] + 0.1 * rng.random((len(labels), dataset.n_classes)))

def half_right(dataset, mask, seed):
    rng = np.random.default_rng(seed)
    def say(inputs, labels):
        known = np.where(rng.random(labels.shape) < 0.5, labels, 0)
        return np.eye(dataset.n_classes)[np.maximum(known, 0)] + 0.001 * rng.random((*labels.shape, dataset.n_classes))
    return _both(dataset, say)
"""


def save(path, inputs, labels, seed=0):
    """Write a dataset whose last fifth, in a random order, is for testing."""
    order = np.random.default_rng(seed).permutation(len(labels))
    inputs, labels, n_train = inputs[order].astype(np.float32), labels[order], int(0.8 * len(labels))
    arrays = {"train_inputs": inputs[:n_train], "train_labels": labels[:n_train]}
    np.savez(path, **arrays, test_inputs=inputs[n_train:], test_labels=labels[n_train:])
    return str(path)


def made(path, dataset="digits", n_models=40, **changes):
    values = {"recipe": CLASSES, "held_out": {"n_subsets": 3, "n_retrainings": 2}, "block_models": 20}
    return Run.create(path, RunSpec(dataset=dataset, n_models=n_models, **(values | changes)))


def taught_by(name, tmp_path, monkeypatch, dataset, inputs="as-is", **changes):
    (tmp_path / "learners.py").write_text(LEARNERS)
    monkeypatch.syspath_prepend(tmp_path)
    run = made(
        tmp_path / name,
        dataset,
        10,
        recipe={"name": "function", "function": f"learners:{name}"},
        inputs=inputs,
        **changes,
    )
    run.train()
    return run


def kinds(run):
    return [kind for kind, _ in what_was_learned(run).warnings]


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return ended.value.code, json.loads(captured.out) if captured.out.startswith("{") else captured.out, captured.err


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    run = made(tmp_path_factory.mktemp("runs") / "digits")
    run.train(way=WAY)
    return run


@pytest.fixture(scope="module")
def raw_cancer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cancer")
    data = sklearn.datasets.load_breast_cancer()
    return save(folder / "cancer.npz", data.data, data.target)


@pytest.fixture(scope="module")
def unlearned(tmp_path_factory, raw_cancer):
    run = made(tmp_path_factory.mktemp("runs") / "cancer", raw_cancer, inputs="as-is")
    run.train(way=WAY)
    return run


@pytest.fixture
def diabetes(tmp_path):
    data = sklearn.datasets.load_diabetes()
    return save(tmp_path / "diabetes.npz", data.data, data.target.astype(np.float32))


def test_a_models_scores_are_those_that_scikit_learn_takes_from_its_logits(digits):
    dataset, scores = digits.dataset(), digits.array("model_scores")[:]
    said = digits.array("test_logits")[:].argmax(-1)
    assert scores[:, 0] == pytest.approx([accuracy_score(dataset.test_labels, row) for row in said], abs=1e-12)
    said, masks = digits.array("train_logits")[:].argmax(-1), digits.array("train_masks")[:]
    of_left_out = [accuracy_score(dataset.train_labels[~m], row[~m]) for row, m in zip(said, masks, strict=True)]
    assert scores[:, 1] == pytest.approx(of_left_out, abs=1e-12)
    learned = what_was_learned(digits)
    assert learned.score == pytest.approx(scores[:, 0].mean())
    assert learned.low < learned.score < learned.high
    commonest = np.bincount(dataset.train_labels).argmax()
    assert learned.baseline == pytest.approx((dataset.test_labels == commonest).mean())
    assert learned.commonest == str(commonest)


def test_the_commonest_class_of_left_out_examples_is_scored_on_each_models_own(digits):
    dataset, masks = digits.dataset(), digits.array("train_masks")[:]
    of_commonest = dataset.train_labels == np.bincount(dataset.train_labels).argmax()
    expected = [of_commonest[~mask].mean() for mask in masks]
    assert digits.array("model_scores")[:, 2] == pytest.approx(expected)


def test_a_run_that_learns_is_not_warned_of_and_passes(tmp_path, digits):
    with warnings.catch_warnings():
        warnings.simplefilter("error", LearningWarning)
        made(tmp_path / "run").train(way=WAY)
    assert what_was_learned(digits).verdict == "better"
    assert what_was_learned(digits).texts == []
    findings = verify_run(digits)
    assert findings[-1].check == "learned"
    assert all(finding.passed for finding in findings)
    assert "models are right on" in findings[-1].detail


def test_networks_that_learned_nothing_are_warned_of_after_the_first_block(tmp_path, raw_cancer, monkeypatch):
    run = made(tmp_path / "run", raw_cancer, inputs="as-is", n_models=80)
    done = []
    with warnings.catch_warnings():
        warnings.simplefilter("always", LearningWarning)
        monkeypatch.setattr(warnings, "showwarning", lambda message, *_: done.append((run.n_rows_done, str(message))))
        run.train(way=WAY)
    assert [n for n, _ in done] == [20, 20]  # each kind once, though there are five blocks
    assert "no better than always saying the commonest class, 1" in done[0][1]
    assert "--inputs standardised" in done[0][1]
    assert "20 of 20 models say one class" in done[1][1]


def test_verify_fails_what_learned_nothing_with_effect_and_remedy(unlearned, capsys):
    wrong = [finding for finding in verify_run(unlearned) if not finding.passed]
    assert [finding.check for finding in wrong] == ["learned"]
    assert "Datamodels of such models predict noise" in wrong[0].detail
    assert "--inputs standardised" in wrong[0].detail
    code, data, said = call(capsys, "verify", unlearned.path, "--json")
    assert code == 3
    assert len(data["warnings"]) == 2
    assert "holds what was specified, but models have not learned" in said


def test_every_command_says_how_good_the_models_are_and_warns(unlearned, tmp_path, capsys):
    directory = shutil.copytree(unlearned.path, tmp_path / "run")
    for command in ("run", "status", "fit", "evaluate", "report"):
        code, data, said = call(capsys, command, directory, "--json")
        assert code == 0
        assert "models have not learned" in data["warnings"][0], command
        assert "warning: models have not learned" in said
        if command in ("run", "status", "evaluate"):
            assert data["accuracy"] == pytest.approx(data["baseline_accuracy"])
            assert data["accuracy_low"] <= data["baseline_accuracy"]
            assert data["r2_models"] is None
    assert "always saying the commonest class, 1, would be on" in call(capsys, "status", directory)[1]
    assert "always saying the commonest class, 1, would be on" in call(capsys, "evaluate", directory)[1]
    page = (directory / "report.html").read_text()
    facts = json.loads(re.search(r'id="facts">(.*?)</script>', page, re.DOTALL)[1])
    assert facts["warnings"][0].startswith("Models have not learned")


def test_labels_that_say_nothing_of_the_inputs_are_not_taken_for_learned(tmp_path):
    data = sklearn.datasets.load_digits()
    for seed in range(3):
        labels = np.random.default_rng(seed).permutation(data.target)
        run = made(tmp_path / str(seed), save(tmp_path / f"shuffled{seed}.npz", data.data / 16, labels, seed))
        run.train(way=WAY)
        assert "no better" in kinds(run), what_was_learned(run)


def test_a_learner_that_is_right_a_little_more_often_than_chance_is_not_accused(tmp_path, monkeypatch):
    inputs = np.random.default_rng(0).random((200, 4))
    labels = np.arange(200) % 2
    path = save(tmp_path / "coins.npz", inputs, labels)
    run = taught_by("half_right", tmp_path, monkeypatch, path)
    learned = what_was_learned(run)
    assert 0.65 < learned.score < 0.85
    assert learned.verdict == "better"


def test_few_models_whose_interval_holds_the_baseline_are_too_few_to_tell(tmp_path, digits):
    few = {"n_models": 3, "held_out": {"n_subsets": 0}}
    run = made(tmp_path / "chance", **few, recipe={"hidden": 2, "epochs": 1, "lr": 1e-9})
    run.train(way=Way("products", 3))
    learned = what_was_learned(run)
    assert learned.verdict == "too few"
    assert "3 models are too few to tell" in learned.sentence()
    assert all(finding.passed for finding in verify_run(run))
    run = made(tmp_path / "good", **few)
    run.train(way=Way("products", 3))
    assert what_was_learned(run).verdict == "better"


def test_outputs_that_are_the_same_for_all_models_are_a_failing_finding(tmp_path, monkeypatch):
    data = sklearn.datasets.load_iris()
    run = taught_by("same_for_all", tmp_path, monkeypatch, save(tmp_path / "iris.npz", data.data, data.target))
    assert kinds(run) == ["unvarying"]
    assert "have one and the same output of every test example" in what_was_learned(run).texts[0]
    assert "learned" in {finding.check for finding in verify_run(run) if not finding.passed}


def test_a_regressions_r2_is_scikit_learns_and_stands_next_to_the_mean(tmp_path, diabetes, capsys):
    run = made(tmp_path / "run", diabetes, outputs=("squared_errors", "predictions"), recipe={"lr": 1e-4, "epochs": 8})
    run.train(way=WAY)
    dataset, predictions = run.dataset(), run.array("test_predictions")[:]
    expected = [r2_score(dataset.test_labels, row) for row in predictions]
    assert run.array("model_scores")[:, 0] == pytest.approx(expected, rel=1e-4)
    code, data, _ = call(capsys, "status", run.path, "--json")
    assert code == 0
    assert data["r2_models"] == pytest.approx(np.mean(expected), rel=1e-4)
    assert data["accuracy"] is None
    assert data["baseline_accuracy"] is None
    assert "always saying the mean has 0" in call(capsys, "status", run.path)[1]


def test_exploding_errors_of_a_regression_are_said_to_be_that(tmp_path, monkeypatch, diabetes):
    run = taught_by("exploded", tmp_path, monkeypatch, diabetes, outputs=("squared_errors", "predictions"))
    assert kinds(run)[0] == "exploding"
    assert "errors exploded: 16 models have an R2 below -10" in what_was_learned(run).texts[0]


def test_a_regression_that_says_the_mean_has_learned_nothing(tmp_path, monkeypatch, diabetes):
    run = taught_by("means", tmp_path, monkeypatch, diabetes, outputs=("squared_errors", "predictions"))
    assert kinds(run) == ["no better", "constant"]
    assert "no better than always saying the mean" in what_was_learned(run).texts[0]
    assert "say one number for all test examples" in what_was_learned(run).texts[1]


def test_a_handful_of_left_out_numbers_is_measured_against_the_spread_of_all(tmp_path, monkeypatch, diabetes):
    outputs = ("squared_errors", "predictions")
    run = taught_by("noisy", tmp_path, monkeypatch, diabetes, outputs=outputs, alpha=0.99)
    learned = what_was_learned(run)
    assert learned.left_out == pytest.approx(learned.score, abs=0.25)
    assert learned.warnings == ()


def test_masks_of_ones_own_that_leave_out_a_class_are_no_sign_of_nothing_learned(tmp_path, monkeypatch):
    data = sklearn.datasets.load_iris()
    path = save(tmp_path / "iris.npz", data.data, data.target)
    labels = np.load(path)["train_labels"]
    np.save(tmp_path / "masks.npy", [labels != of for of in np.arange(13) % 3])
    masks = str(tmp_path / "masks.npy")
    run = taught_by("knows_its_classes", tmp_path, monkeypatch, path, masks=masks)
    assert what_was_learned(run).left_out == 0
    assert what_was_learned(run).warnings == ()


def test_of_tokens_positions_with_a_label_are_counted(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 5, (40, 6))
    labels = (tokens + 1) % 5
    labels[::2, -2:] = -1
    parts = {"train_inputs": tokens[:30], "train_labels": labels[:30]}
    np.savez(tmp_path / "words.npz", **parts, test_inputs=tokens[30:], test_labels=labels[30:])
    run = taught_by(
        "half_right",
        tmp_path,
        monkeypatch,
        str(tmp_path / "words.npz"),
        inputs="tokens",
        outputs=("log_likelihoods", "logits"),
    )
    said, truth = run.array("test_logits")[:].argmax(-1), run.dataset().test_labels
    expected = [(row == truth)[truth >= 0].mean() for row in said]
    assert run.array("model_scores")[:, 0] == pytest.approx(expected)
    learned = what_was_learned(run)
    assert learned.unit == "positions of the test sequences"
    known = labels[:30][labels[:30] >= 0]
    commonest = np.bincount(known).argmax()
    assert learned.baseline == pytest.approx((truth[truth >= 0] == commonest).mean())


@pytest.mark.parametrize("outputs", [("margins", "logits"), ("margins",), ("predicted_labels",), ("logits",)])
def test_scores_of_a_run_without_any_on_record_are_taken_from_what_it_stores(tmp_path, outputs):
    run = made(tmp_path / "run", outputs=outputs)
    run.train(way=WAY)
    recorded = what_was_learned(run)
    shutil.rmtree(run.path / "store.zarr" / "model_scores")
    found = what_was_learned(Run.open(run.path))
    assert found.n_models == recorded.n_models
    # a tie of two float16 logits has no margin, and counts as wrong
    assert found.score == pytest.approx(recorded.score, abs=0.002)
    assert found.left_out == pytest.approx(recorded.left_out, abs=0.002)
    assert found.baseline == recorded.baseline
    assert all(finding.passed for finding in verify_run(Run.open(run.path)))


def test_a_run_that_was_made_before_is_trained_further_without_a_place_for_scores(tmp_path):
    run = made(tmp_path / "run")
    run.train(way=WAY, blocks=[0])
    shutil.rmtree(run.path / "store.zarr" / "model_scores")
    run = Run.open(run.path)
    run.train()
    assert run.n_rows_done == run.spec.n_rows
    assert what_was_learned(run).score > 0.5


def test_what_is_not_told_by_what_is_stored_is_not_made_up(tmp_path, capsys):
    run = made(tmp_path / "run", outputs=("log_likelihoods",))
    run.train(way=WAY)
    assert what_was_learned(run).score > 0.5  # on record since training
    shutil.rmtree(run.path / "store.zarr" / "model_scores")
    code, data, _ = call(capsys, "status", run.path, "--json")
    assert code == 0
    assert data["accuracy"] is None
    assert data["warnings"] == []
    assert all(finding.passed for finding in verify_run(Run.open(run.path)))


def test_status_needs_no_dataset_and_says_nothing_of_models_that_are_not_there(tmp_path, raw_cancer, capsys):
    path = shutil.copy(raw_cancer, tmp_path / "moved.npz")
    run = made(tmp_path / "run", str(path), inputs="as-is")
    code, data, _ = call(capsys, "status", run.path, "--json")
    assert (code, data["accuracy"], data["warnings"]) == (0, None, [])
    run.train(way=WAY)
    path.unlink()
    code, data, _ = call(capsys, "status", run.path, "--json")
    assert code == 0
    assert data["accuracy"] == pytest.approx(data["baseline_accuracy"])


def test_a_longer_run_knows_the_scores_of_the_models_it_had(tmp_path):
    run = made(tmp_path / "run")
    run.train(way=WAY)
    before = what_was_learned(run)
    after = what_was_learned(extend(run, 60))
    assert after.n_models > 0
    assert after.score == pytest.approx(before.score, abs=0.1)


def test_damaged_scores_are_taken_from_what_is_stored(tmp_path, digits):
    path = shutil.copytree(digits.path, tmp_path / "run")
    for chunk in (path / "store.zarr" / "model_scores" / "c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(b"x")
    assert what_was_learned(Run.open(path)).score == pytest.approx(what_was_learned(digits).score, abs=0.02)


def test_scores_are_no_part_of_what_a_blocks_digest_covers(digits):
    before = digits.array("model_scores")[:]
    digits.array("model_scores")[:] = 0
    findings = {finding.check: finding.passed for finding in verify_run(digits)}
    digits.array("model_scores")[:] = before
    assert findings["digests"]
    assert before.shape == (digits.spec.n_rows, len(SCORES))


def test_ties_and_negative_zeros_are_told_as_numpy_tells_them():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 50, 3)).astype(np.float16)
    logits[0, :4] = [[-0.0, 0.0, -1], [0.0, -0.0, -1], [-2, -2, -2], [-60000, -59000, -65504]]
    labels = rng.integers(0, 3, 50)
    inputs = np.zeros((50, 2), np.float32)
    dataset = checked_dataset("few", (inputs, labels), (inputs, labels), source="few", example_order="none")
    block = {"train_masks": rng.random((4, 50)) < 0.5, "test_logits": logits}
    scores = stored_scores(dataset, block)
    np.testing.assert_allclose(scores[:, 0], (logits.argmax(-1) == labels).mean(1))
    counts = np.array([np.bincount(row, minlength=3).max() for row in logits.argmax(-1)])
    np.testing.assert_allclose(scores[:, 3], counts / 50)
    assert np.isnan(scores[:, 1]).all()


def test_classes_are_called_by_their_names_where_they_have_some(digits):
    named = dataclasses.replace(load_dataset("digits"), class_names=tuple("abcdefghij"))
    assert named.name_of(np.int64(1)) == "b"
    assert load_dataset("digits").name_of(7) == "7"
    assert baseline_facts(load_dataset("digits"), digits.spec)["largest_input"] == 1


def test_blocks_that_could_not_be_trained_are_among_the_warnings(tmp_path, diabetes, capsys):
    recipe = {"lr": 1e3, "momentum": 0.99, "epochs": 5}
    run = made(tmp_path / "run", diabetes, outputs=("squared_errors", "predictions"), recipe=recipe, inputs="as-is")
    assert call(capsys, "run", run.path)[0] == 1
    code, data, _ = call(capsys, "status", run.path, "--json")
    assert code == 0
    assert "could not be trained, rows 0 to 19 first: " in data["warnings"][0]


def test_the_demo_says_how_good_its_models_are(tmp_path):
    from dmdata.cli.console import Talk

    spec = RunSpec(n_models=40, held_out={"n_subsets": 4, "n_retrainings": 2})
    summary = run_demo(Talk(quiet=True), tmp_path / "demo", spec)
    facts = summary.as_dict()
    assert facts["accuracy"] > 0.85 > facts["baseline_accuracy"]
    assert facts["accuracy_low"] < facts["accuracy"] < facts["accuracy_high"]
    assert list(facts["warnings"]) == []
    assert facts["n_checks"] == 12
    page = (tmp_path / "demo" / "report.html").read_text()
    assert 'id="warnings"' not in page
    assert "always saying the commonest class" in page


@pytest.mark.parametrize("how", [pytest.param(["--workers", "1"], marks=pytest.mark.slow), ["--shard", "1/2"]])
def test_whoever_trains_is_told_after_the_first_block(tmp_path, raw_cancer, how):
    if how[0] == "--workers":
        pytest.importorskip("distributed")
    run = made(tmp_path / "run", raw_cancer, inputs="as-is", n_models=800)
    done = subprocess.run([*COMMAND, "run", str(run.path), *how], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "models have not learned" in line]
    first, last = (int(re.search(r"over (\d+) models", line)[1]) for line in told[:2])
    assert first < last / 2  # while others were still to be trained
    assert len(told) == 2  # and once more at the end
