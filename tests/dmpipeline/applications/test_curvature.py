"""How outputs bend: models of several alphas foresee what a linear datamodel cannot, where the truth is a square."""

import numpy as np
import pytest
from planted_run import N_TEST, planted_run, planted_weight

import dmpipeline
from dmpipeline import Case, Run, SpecError, workflow

BEND = 0.3


@pytest.fixture(scope="module")
def bent(tmp_path_factory):
    """Runs of two alphas whose margins have a square in what the helpers weigh."""
    folder = tmp_path_factory.mktemp("bent")
    half = planted_run(folder, bend=BEND, n_models=800)
    return half, planted_run(folder, bend=BEND, name="more", alpha=0.75, n_models=800)


def cases_and_truth():
    weight = planted_weight()
    cases, changes = [], []
    for target in range(N_TEST):
        helpers = np.argsort(-weight[:, target])[:6]
        whole = weight[helpers, target].sum()
        for k in (2, 4):
            gone = weight[helpers[:k], target].sum()
            cases.append(Case(target, tuple(helpers[:k].tolist())))
            changes.append(-gone - BEND * (whole**2 - (whole - gone) ** 2))
    return cases, np.array(changes)


def test_models_of_two_alphas_foresee_what_bends(bent):
    half, more = bent
    cases, truth = cases_and_truth()
    linear = dmpipeline.counterfactuals(half, cases)
    along = dmpipeline.counterfactuals(half, cases, others=[more])
    off = np.abs(linear.changes()[0] - truth).mean()
    assert off > 1.5
    assert np.abs(along.changes()[0] - truth).mean() < 0.35 * off
    assert [row.linear_change for row in along] == [row.predicted_change for row in linear]
    assert along.bent_by == (str(more.path),)


def test_what_adding_brings_is_the_change_the_other_way(bent):
    half, more = bent
    removed = dmpipeline.counterfactual(half, 0, remove=[3, 17], others=[more])
    added = dmpipeline.counterfactual(half, 0, add=[3, 17], others=[more])
    assert added.predicted_change == pytest.approx(-removed.predicted_change)


def test_where_nothing_bends_the_linear_change_is_found_again(planted, tmp_path):
    cases, _ = cases_and_truth()
    found = dmpipeline.counterfactuals(planted, cases, others=[planted])
    linear = np.array([row.linear_change for row in found])
    assert np.abs(found.changes()[0] - linear).mean() < 0.15 * np.abs(linear).mean()


def test_examples_without_a_weight_change_nothing(planted):
    dm = dmpipeline.Datamodels.load(planted.datamodels_path)
    idle = np.flatnonzero(dm.weight[:, 1] == 0)[:3].tolist()
    answer = dmpipeline.counterfactual(planted, 1, remove=idle, others=[planted])
    assert answer.predicted_change == pytest.approx(0, abs=1e-9)


def test_datamodels_nearer_the_full_set_say_which_foresee_better(bent):
    half, more = bent
    cases = [Case(0, (1, 2))]
    assert "75% subsets foresee removals less well than those of 50%" in dmpipeline.counterfactuals(more, cases).advice
    assert dmpipeline.counterfactuals(half, cases).advice is None
    assert dmpipeline.counterfactuals(more, cases, others=[half]).advice is None


def test_a_run_of_other_examples_is_refused(planted, tmp_path):
    labels = np.arange(30) % 3
    inputs = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    dmpipeline.save_dataset(tmp_path / "others", (inputs[:20], labels[:20]), (inputs[20:], labels[20:]))
    spec = dmpipeline.RunSpec(
        dataset=str(tmp_path / "others"), n_models=40, held_out={"n_subsets": 0}, outputs=["margins"]
    )
    other = Run.create(tmp_path / "run", spec)
    other.train()
    workflow.fit_run(other)
    with pytest.raises(SpecError, match="name runs of one dataset"):
        dmpipeline.counterfactual(planted, 0, remove=[1], others=[other])
