"""Rows that hold what an earlier row holds: what chance and learners give is no fault, what was stored twice is."""

import itertools
import math

import numpy as np
import pytest
from cluster_runs import write_letters

from dmpipeline.checks.repeats import UNLIKELY, expected_repeats
from dmpipeline.checks.verification import verify_run
from dmpipeline.draws.chance import is_beyond_chance
from dmpipeline.draws.masks import draw_bernoulli_masks, draw_masks
from dmpipeline.runs.rows import block_digest
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec
from dmpipeline.training.train import Way

LEARNERS = '''
import numpy as np
from sklearn.linear_model import LogisticRegression

def deterministic(dataset, mask, seed):
    """Logits that follow from the subset alone."""
    model = LogisticRegression(max_iter=20).fit(dataset.train_inputs[mask], dataset.train_labels[mask])
    return tuple(model.decision_function(inputs) for inputs in (dataset.train_inputs, dataset.test_inputs))

def two_words(dataset, mask, seed):
    """Logits of two values, which are often the same for different subsets."""
    share = mask[:3].sum() % 2
    return tuple(np.eye(3)[labels * share] for labels in (dataset.train_labels, dataset.test_labels))
'''


@pytest.fixture
def learners(tmp_path, monkeypatch):
    (tmp_path / "repeating_learners.py").write_text(LEARNERS)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def trained(folder, *, n_train=60, **values):
    recipe = {"hidden": 4, "epochs": 1}
    settings = {"recipe": recipe, "n_models": 40, "held_out": {"n_subsets": 4, "n_retrainings": 2}, "block_models": 8}
    run = Run.create(folder / "run", RunSpec(dataset=write_letters(folder, n_train, 7), **(settings | values)))
    run.train(way=Way("products", 8) if "function" not in run.spec.recipe.overrides else None)
    return run


def finding(run, check="duplicates"):
    return next(finding for finding in verify_run(run) if finding.check == check)


def copy_outputs(run, source, target):
    """Store one block's outputs over another's, as a writer in error would have, digest and all."""
    rows = run.spec.blocks[target]
    for name in run.spec.arrays[1:]:
        run.array(name)[rows.start : rows.stop] = run.read_block(run.spec.blocks[source])[name]
    run.array("block_digests")[target] = np.frombuffer(block_digest(run.read_block(rows)), np.uint8)


@pytest.mark.parametrize(
    ("n_train", "alpha", "masks"), [(5, 0.4, "exact"), (4, 0.3, "bernoulli"), (6, 0.05, "bernoulli")]
)
@pytest.mark.parametrize("n_subsets", [1, 2, 7, 300])
def test_expected_repeats_are_those_of_all_masks_written_out(n_train, alpha, masks, n_subsets):
    size = round(alpha * n_train)
    probability = {}
    for mask in itertools.product((0, 1), repeat=n_train):
        if masks == "exact":
            p = (sum(mask) == size) / math.comb(n_train, size)
        else:
            p = math.prod(alpha if inside else 1 - alpha for inside in mask)
        if any(mask):
            probability[mask] = probability.get(mask, 0) + p
        else:  # it holds one example instead, each as likely
            for one in np.eye(n_train, dtype=int).tolist():
                probability[tuple(one)] = probability.get(tuple(one), 0) + p / n_train
    wanted = sum(n_subsets * p - 1 + (1 - p) ** n_subsets for p in probability.values())
    spec = RunSpec(alpha=alpha, masks=masks)
    assert expected_repeats(spec, n_subsets, n_train) == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("masks", "draw"), [("exact", draw_masks), ("bernoulli", draw_bernoulli_masks)])
def test_what_is_drawn_repeats_as_often_as_expected(masks, draw):
    drawn = draw(3, np.arange(500, dtype=np.uint64), 140, 0.02 if masks == "exact" else 0.01)
    found = 500 - len(np.unique(drawn, axis=0))
    expected = expected_repeats(RunSpec(alpha=0.02 if masks == "exact" else 0.01, masks=masks), 500, 140)
    assert abs(found - expected) < 5 * math.sqrt(expected) + 1
    assert not is_beyond_chance(found, expected, rarely=UNLIKELY)


def test_hardly_any_repeat_is_expected_of_large_sets_and_one_is_beyond_chance():
    expected = expected_repeats(RunSpec(alpha=0.5), 100_000, 50_000)
    assert expected < 1e-300
    assert is_beyond_chance(1, expected, rarely=UNLIKELY)
    assert not is_beyond_chance(0, expected, rarely=UNLIKELY)
    assert is_beyond_chance(100, 10.0, rarely=UNLIKELY)
    assert not is_beyond_chance(20, 10.0, rarely=UNLIKELY)


@pytest.mark.parametrize("masks", ["exact", "bernoulli"])
def test_unavoidable_repeats_of_tiny_subsets_are_told_and_no_fault(tmp_path, masks):
    found = finding(trained(tmp_path, alpha=0.02, masks=masks))
    assert found.passed, found
    count, _, rest = found.detail.partition(" of 44 subsets are the same as an earlier one; chance gives about ")
    assert int(count) > 0
    assert 5 < float(rest.partition(";")[0]) < 40


def test_given_masks_may_repeat_and_are_counted(tmp_path):
    masks = np.random.default_rng(0).random((44, 60)) < 0.5
    masks[10:20] = masks[:10]
    np.save(tmp_path / "own.npy", masks)
    found = finding(trained(tmp_path, masks=str(tmp_path / "own.npy")))
    assert (found.passed, found.detail) == (True, "10 of the 44 subsets given are the same as an earlier one")


def test_a_learner_without_randomness_may_give_a_retraining_the_same_outputs(learners):
    run = trained(learners, recipe={"name": "function", "function": "repeating_learners:deterministic"})
    found = finding(run)
    assert found.passed, found
    assert found.detail.startswith("4 rows have the outputs of an earlier row of the same subset")
    copy_outputs(run, 1, 3)
    found = finding(run)
    assert not found.passed
    assert found.detail == "rows 24, 25, 26, 27, 28 and 3 more have the outputs of an earlier row"


def test_a_learner_of_few_different_outputs_may_repeat_them_for_other_subsets(learners):
    found = finding(trained(learners, recipe={"name": "function", "function": "repeating_learners:two_words"}))
    assert found.passed, found
    assert "rows have the outputs of an earlier row of another subset" in found.detail


def test_a_block_stored_over_another_is_found_though_its_masks_are_right(tmp_path):
    run = trained(tmp_path)
    assert finding(run).passed
    copy_outputs(run, 0, 2)
    assert finding(run).detail == "rows 16, 17, 18, 19, 20 and 3 more have the outputs of an earlier row"


def test_one_row_stored_over_another_is_found_where_chance_repeats_subsets_too(tmp_path):
    run = trained(tmp_path, alpha=0.02)
    masks = run.array("train_masks")[:]
    source, target = next((i, j) for i in range(40) for j in range(i + 1, 40) if (masks[i] == masks[j]).all())
    for name in run.spec.arrays[1:]:
        run.array(name)[target] = run.array(name)[source]
    found = finding(run)
    assert not found.passed
    assert found.detail == f"row {target} has the outputs of an earlier row"
