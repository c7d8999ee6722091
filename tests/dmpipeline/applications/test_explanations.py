"""Why this prediction: the planted helpers and harmers are found, with how stable that is, from a run or a release."""

import json

import numpy as np
import pytest
from planted_run import N_TEST, planted_weight

import dmdata
import dmpipeline
from dmpipeline import Datamodels, SpecError
from dmpipeline.exporting.export import export_run


@pytest.fixture(scope="module")
def release(planted, tmp_path_factory):
    """The run in the release's layout, with its catalog."""
    folder = tmp_path_factory.mktemp("release")
    export_run(planted, folder, datamodels=planted.datamodels_path)
    return folder


def test_the_planted_helpers_and_harmers_of_a_target_come_first_and_are_stable(planted):
    for target in range(N_TEST):
        truth = planted_weight()[:, target]
        found = dmpipeline.explain(planted, target, top=6)
        assert [row.index for row in found.helpers] == np.argsort(-truth, kind="stable")[:6].tolist()
        assert [row.index for row in found.harmers][:3] == np.argsort(truth, kind="stable")[:3].tolist()
        for row in (*found.helpers, *found.harmers[:3]):
            assert row.same_sign == 1.0
            assert abs(row.weight - truth[row.index]) < 0.1
        assert [row.rank_low for row in found.helpers] == [1, 2, 3, 4, 5, 6]


def test_what_is_but_chance_is_told_from_what_is_stable(planted):
    truth = planted_weight()
    shares = [
        row.same_sign
        for target in range(N_TEST)
        for row in dmpipeline.explain(planted, target, top=20).rows
        if truth[row.index, target] == 0
    ]
    assert len(shares) > 30
    assert np.median(shares) < 0.8


def test_json_has_the_keys_that_others_rely_on_and_labels_as_the_user_calls_them(planted):
    data = json.loads(json.dumps(dmpipeline.explain(planted, 1, top=2).as_dict()))
    assert data["target"] == 1
    assert [set(row) >= {"index", "weight", "label"} for row in data["helpers"] + data["harmers"]] == [True] * 4
    assert [row["label"] for row in data["helpers"]] == [row["index"] % 3 for row in data["helpers"]]


def test_the_targets_that_lean_on_a_training_example_are_listed(planted):
    truth = planted_weight()
    example = int(np.argmax((truth > 0).sum(axis=1)))
    found = dmpipeline.explain(planted, train_example=example, top=3)
    want = np.argsort(-truth[example], kind="stable")[:3]
    assert [row.index for row in found.helpers] == [t for t in want.tolist() if truth[example, t] > 0][:3]
    assert found.as_dict()["train_example"] == example


def test_a_release_is_explained_by_name_without_stability_and_labels(planted, release):
    of_run = dmpipeline.explain(planted, 3)
    by_name = dmpipeline.explain("planted/50pct", 3, catalog=release)
    assert [(row.index, row.weight) for row in by_name] == [(row.index, row.weight) for row in of_run]
    assert {(row.same_sign, row.label) for row in by_name} == {(None, None)}
    by_file = dmpipeline.explain(release / "planted" / "datamodels" / "test_50pct.pt", 3)
    assert by_file.rows == by_name.rows
    leaning = dmpipeline.explain("planted/50pct/test_datamodels", train_example=4, catalog=release)
    assert [row.index for row in leaning] == [row.index for row in dmpipeline.explain(planted, train_example=4)]


def test_stability_can_be_asked_of_a_release_whose_masks_are_listed(planted, release):
    stable = dmpipeline.explain("planted/50pct", 3, n_fits=20, catalog=release)
    assert [row.same_sign for row in stable] == [row.same_sign for row in dmpipeline.explain(planted, 3)]


def test_datamodels_alone_are_explained_too(planted):
    dm = Datamodels.load(planted.datamodels_path)
    top = dm.top(2, k=4)
    assert top.rows == dmpipeline.explain(dm, 2, top=4).rows
    assert [row.index for row in top.helpers] == np.argsort(-dm.weight[:, 2], kind="stable")[:4].tolist()


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"target": 12}, "no test example 12; choose 0 to 11"),
        ({"target": -1}, "no test example -1"),
        ({"target": 0, "train_example": 1}, "either a target or a train_example"),
        ({}, "either a target or a train_example"),
        ({"train_example": 60}, "no training example 60"),
        ({"target": 0, "top": 0}, "top is 0"),
        ({"target": 0, "n_fits": 3}, "an even number"),
        ({"target": "3"}, "not one whole number"),
    ],
)
def test_what_is_not_there_is_refused(planted, wanted, words):
    with pytest.raises(SpecError, match=words):
        dmpipeline.explain(planted, **wanted)


def test_weights_of_standardised_masks_are_turned_into_raw_ones(planted, tmp_path):
    dm = Datamodels.load(planted.datamodels_path)
    turned = dm.to_standardised(mean=0.5)
    path = turned.save(tmp_path / "test_50pct.pt")
    for wanted in ({"target": 2}, {"train_example": 8}):
        found, own = dmpipeline.explain(path, **wanted), dmpipeline.explain(dm, **wanted)
        assert [row.index for row in found] == [row.index for row in own]
        np.testing.assert_allclose([row.weight for row in found], [row.weight for row in own], rtol=1e-5)
    with pytest.raises(SpecError, match="to_raw"):
        dmpipeline.explain(turned, 2)


def test_a_name_that_no_catalog_lists_is_said_to_be_none(release):
    with pytest.raises(dmdata.CatalogError):
        dmpipeline.explain("planted/20pct", 0, catalog=release)


def test_a_table_is_shown_in_a_notebook_and_in_pandas(planted):
    pandas = pytest.importorskip("pandas")
    found = dmpipeline.explain(planted, 0, top=2)
    frame = found.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["index"].tolist() == [row.index for row in found]
    assert "<table>" in found._repr_html_()
    assert str(found[0].index) in found._repr_html_()


@pytest.mark.parametrize("wrong", [np.array([1, 2, 3]), [], [0], 1.0, "1", None, True])
def test_a_target_that_is_not_one_whole_number_is_refused_with_what_to_do(planted, wrong):
    calls = [dmpipeline.counterfactual, dmpipeline.similar]
    refused = [lambda ask=ask: ask(planted, wrong, [1]) if ask is calls[0] else ask(planted, wrong) for ask in calls]
    if wrong is not None:
        refused += [
            lambda: dmpipeline.explain(planted, wrong),
            lambda: dmpipeline.explain(planted, train_example=wrong),
        ]
    for ask in refused:
        with pytest.raises(SpecError, match=r"is not one whole number; give the number of one .* example, from 0 to "):
            ask()


def test_several_targets_are_refused_with_a_loop_and_one_from_the_end_with_how_they_count(planted):
    with pytest.raises(SpecError, match="for several call it once for each"):
        dmpipeline.explain(planted, [0, 1])
    with pytest.raises(SpecError, match="not counted from the end"):
        dmpipeline.explain(planted, -1)


def test_what_is_printed_has_a_line_for_each_row(planted):
    found = dmpipeline.explain(planted, 0, top=3)
    title, head, *lines = str(found).splitlines()
    assert title.startswith("Influences: ")
    assert head.split()[:2] == ["index", "weight"]
    assert [int(line.split()[0]) for line in lines] == [row.index for row in found.rows]
    printed = str(dmpipeline.counterfactual(planted, 0, [1, 2]))
    assert printed.splitlines()[0] == "Counterfactual of target 0"
    assert max(map(len, printed.split())) < 16
