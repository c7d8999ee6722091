"""What if: predicted changes are those of the planted weights, and intervals of measured ones hold."""

import numpy as np
import pytest
from planted_run import N_TEST, NOISE, planted_weight

import dmpipeline
from dmpipeline import Datamodels, RunError, SpecError
from dmpipeline.applications.counterfactuals import Case, counterfactuals, read_examples, removal_order
from dmpipeline.applications.retraining import PLACE, TrainingSet, retrain
from dmpipeline.training.functions import FunctionTrainer


def test_predicted_and_measured_changes_are_those_of_the_truth(planted):
    truth = planted_weight()
    cases = [
        Case(target, tuple(removal_order(truth[:, target], order, seed=target)[:k].tolist()))
        for target in range(N_TEST)
        for order in ("helpful", "harmful", "mixed", "random")
        for k in (2,)
    ]
    answers = counterfactuals(planted, cases, 20)
    true = np.array([-truth[list(case.remove), case.target].sum() for case in cases])
    predicted, measured = answers.changes()
    assert np.abs(predicted - true).max() < 0.2
    assert np.abs(measured - true).max() < 5 * NOISE * np.sqrt(2 / 20)
    holds = [row.measured_low <= change <= row.measured_high for row, change in zip(answers, true, strict=True)]
    assert np.mean(holds) > 0.85  # of intervals at 95%, for 48 cases


def test_adding_examples_is_a_change_from_a_set_that_lacks_them(planted):
    truth = planted_weight()[:, 0]
    best = int(truth.argmax())
    answer = dmpipeline.counterfactual(planted, 0, add=[best], n_retrainings=10)
    assert abs(answer.predicted_change - truth[best]) < 0.1
    assert abs(answer.measured_change - truth[best]) < 0.4
    assert answer.basis == "certified"
    assert dmpipeline.counterfactual(planted, 0, add=[best]).basis == "estimated"


def test_a_counterfactual_of_datamodels_alone_is_estimated_and_not_retrained(planted):
    dm = Datamodels.load(planted.datamodels_path)
    answer = dmpipeline.counterfactual(dm, 0, remove=[1, 2])
    assert answer.predicted_change == pytest.approx(-float(dm.weight[[1, 2], 0].sum()), rel=1e-5)
    with pytest.raises(SpecError, match="no run on disk"):
        dmpipeline.counterfactual(dm, 0, remove=[1, 2], n_retrainings=5)


def test_what_was_retrained_is_kept_and_only_what_is_missing_is_trained(planted, monkeypatch):
    trained = []
    start = FunctionTrainer.start

    def counted(self, masks, numbers, rows):
        trained.append(len(masks))
        return start(self, masks, numbers, rows)

    monkeypatch.setattr(FunctionTrainer, "start", counted)
    sets = [TrainingSet.of(60, without=[7, 8]), TrainingSet.of(60, without=[9, 10, 11])]
    few = retrain(planted, sets, 4)
    assert sum(trained) == 8
    more = retrain(planted, sets, 10)
    assert sum(trained) == 20
    again = retrain(planted, [sets[1]], 10)
    assert sum(trained) == 20
    np.testing.assert_array_equal(more[0].test[:4], few[0].test)
    np.testing.assert_array_equal(again[0].test, more[1].test)
    assert len(np.unique(more[0].test[:, 0])) == 10  # each with draws of its own


def test_a_call_that_was_stopped_resumes(planted):
    n = 256  # a group is finished, and kept, when it has about that many models
    sets = [TrainingSet.of(60, without=[20 + i, 40, 41]) for i in range(3)]
    seen = []

    def stop(done, total):
        seen.append(done)
        if done >= 2 * n:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retrain(planted, sets, n, progress=stop)
    seen.clear()
    retrain(planted, sets, n, progress=lambda done, _: seen.append(done))
    assert seen == [2 * n, 3 * n]


def test_a_damaged_file_of_retrainings_is_named_with_the_remedy(planted):
    each = TrainingSet.of(60, without=[30, 31])
    retrain(planted, [each], 2)
    path = planted.path / PLACE / f"{each.key}.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(RunError, match=r"damaged .* remove it"):
        retrain(planted, [each], 2)
    path.unlink()
    assert len(retrain(planted, [each], 2)[0].test) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "nothing is removed or added"),
        ({"remove": [60]}, "no training example 60"),
        ({"remove": [3, 3]}, "3 is listed twice"),
        ({"remove": [3], "add": [3]}, "both removed and added"),
        ({"remove": range(60)}, "leave at least one"),
        ({"remove": [1], "n_retrainings": -1}, "choose 0 for none"),
        ({"remove": [1], "level": 1.0}, "no|not a coverage"),
        ({"remove": [0.5]}, "not a list of whole numbers"),
    ],
)
def test_an_impossible_change_is_refused_before_anything_is_trained(planted, change, words):
    before = sorted((planted.path / PLACE).glob("*")) if (planted.path / PLACE).exists() else []
    with pytest.raises(SpecError, match=words):
        dmpipeline.counterfactual(planted, 0, **{"n_retrainings": 2, **change})
    assert (sorted((planted.path / PLACE).glob("*")) if (planted.path / PLACE).exists() else []) == before


def test_examples_are_read_from_lists_ranges_and_files(tmp_path):
    assert read_examples("3,17,20:23", 60) == [3, 17, 20, 21, 22]
    (tmp_path / "some.txt").write_text("5\n4, 4\n")
    assert read_examples(str(tmp_path / "some.txt"), 60) == [4, 5]
    np.save(tmp_path / "some.npy", np.array([9, 2]))
    assert read_examples(str(tmp_path / "some.npy"), 60) == [2, 9]
    mask = np.zeros(60, bool)
    mask[[1, 8]] = True
    np.save(tmp_path / "mask.npy", mask)
    assert read_examples(str(tmp_path / "mask.npy"), 60) == [1, 8]
    assert read_examples(",".join(map(str, range(60))) + ",1000:1000" + ", 3" * 200, 60) == list(range(60))
    for wrong in ("3;4", "3-4", "70", str(tmp_path / "none.npy")):
        with pytest.raises(SpecError):
            read_examples(wrong, 60)


def test_orders_list_those_that_matter_first_and_none_without_a_weight():
    weight = np.array([0.0, 2.0, -3.0, 1.0, -0.5])
    assert removal_order(weight).tolist() == [1, 3]
    assert removal_order(weight, "harmful").tolist() == [2, 4]
    assert removal_order(weight, "mixed").tolist() == [2, 1, 3, 4]
    assert sorted(removal_order(weight, "random").tolist()) == [0, 1, 2, 3, 4]
    with pytest.raises(SpecError, match="order"):
        removal_order(weight, "worst")
