"""Data support: on planted weights the smallest sets are known, and retraining certifies those that hold."""

from dataclasses import replace

import numpy as np
import pytest
from planted_run import N_TEST, planted_base, planted_weight

import dmpipeline
from dmpipeline import Datamodels, SpecError
from dmpipeline.applications.evidence import Evidence, find_evidence
from dmpipeline.workflow import fit_run


def true_sizes(factor=1.0):
    """Examples to take from each target's helpers until its margin is negative; None where all of them do not do."""
    sizes = []
    for base, weight in zip(planted_base(), planted_weight().T, strict=True):
        left = base + weight.sum() - factor * np.cumsum(np.sort(weight[weight > 0])[::-1])
        sizes.append(int(np.argmax(left < 0)) + 1 if (left < 0).any() else None)
    return sizes


def test_estimated_sets_are_the_smallest_and_retraining_certifies_them(planted):
    found = dmpipeline.data_support(planted, certify=10)
    assert [row.size for row in found] == true_sizes()
    assert [row.certified for row in found] == [True if size else None for size in true_sizes()]
    for row in found:
        if row.size:
            assert row.measured_low <= row.measured_margin <= row.measured_high < 0
            weights = planted_weight()[list(row.examples), row.target]
            assert (np.diff(weights) < 0).all()


def test_without_retraining_nothing_is_said_to_be_certified(planted):
    found = dmpipeline.data_support(planted)
    assert {row.certified for row in found} == {None}
    assert {row.measured_margin for row in found} == {None}
    assert found.shares() == {"certified": None, "flipped": None}
    assert found.curve(certified=True)[-1] == 0


def test_a_set_that_is_too_small_is_not_certified(planted):
    dm = Datamodels.load(planted.datamodels_path)
    # datamodels that take each example for twice as helpful as it is
    boasting = replace(dm, weight=2 * dm.weight)
    evidence = Evidence(str(planted.path), "test", 60, N_TEST, run=planted, _known=boasting)
    found = dmpipeline.data_support(evidence, [0, 2], certify=10)
    assert [row.size for row in found] == [1, 1]
    assert [row.certified for row in found] == [False, False]
    enlarged = dmpipeline.data_support(evidence, [0, 2], certify=10, inflation=1.0)
    assert [(row.size, row.certified) for row in enlarged] == [(2, True), (2, True)]


def test_the_curve_counts_the_targets_that_flip_within_k(planted):
    found = dmpipeline.data_support(planted, certify=10)
    sizes = np.array([size or 99 for size in true_sizes()])
    want = [(sizes <= k).mean() for k in range(int(sizes[sizes < 99].max()) + 1)]
    np.testing.assert_allclose(found.curve(), want)
    np.testing.assert_allclose(found.curve(certified=True), want)
    assert found.half_within == int(np.argmax(np.array(want) >= 0.5))


def test_mislabelling_sets_are_estimated_by_a_measured_factor_and_certified_on_changed_labels(planted):
    found = dmpipeline.data_support(planted, certify=10, mislabel=True)
    # a wrong label turns what an example brings into the opposite
    assert found.relabel_factor == pytest.approx(2.0, abs=0.15)
    assert found.factor_basis == "measured"
    labels = np.arange(60) % 3
    for row in found:
        if row.size:
            assert row.certified is True
            assert row.wrong_label != row.target % 3
            assert row.wrong_label not in labels[list(row.examples)]
    assert sum(bool(row.size) for row in found) > sum(bool(size) for size in true_sizes())
    assert dmpipeline.data_support(planted, mislabel=True).factor_basis == "assumed"


def test_targets_that_are_wrong_as_they_are_need_no_examples(planted):
    dm = Datamodels.load(planted.datamodels_path)
    wrong = replace(dm, bias=dm.bias - 100)
    found = dmpipeline.data_support(wrong, [0, 1])
    assert [(row.size, row.certified, row.examples) for row in found] == [(0, None, ()), (0, None, ())]
    assert found.curve().tolist() == [1.0]


def test_json_has_the_keys_that_others_rely_on(planted):
    data = dmpipeline.data_support(planted, [1, 0], certify=10).as_dict()
    assert [(row["target"], row["size"], row["certified"]) for row in data["targets"]] == [
        (1, None, None),
        (0, true_sizes()[0], True),
    ]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"targets": [12]}, "no test example 12"),
        ({"certify": -1}, "choose 0 for none"),
        ({"inflation": -0.1}, "is no share"),
        ({"level": 0.0}, "not a coverage"),
    ],
)
def test_what_cannot_be_is_refused(planted, wanted, words):
    with pytest.raises(SpecError, match=words):
        dmpipeline.data_support(planted, **wanted)


def test_datamodels_alone_cannot_be_certified_or_mislabelled(planted):
    dm = Datamodels.load(planted.datamodels_path)
    assert [row.size for row in dmpipeline.data_support(dm, [0])] == [true_sizes()[0]]
    with pytest.raises(SpecError, match="no run on disk"):
        dmpipeline.data_support(dm, [0], certify=5)
    with pytest.raises(SpecError, match="mislabel"):
        dmpipeline.data_support(dm, [0], mislabel=True)


def test_support_of_training_targets_starts_from_their_own_margins(planted):
    fit_run(planted, targets="train")
    found = dmpipeline.data_support(find_evidence(planted, "train"), [0, 5], certify=5)
    # the learner's own margin of a training example is 2 where it is in the set
    assert [row.margin for row in found] == [2.0, 2.0]
