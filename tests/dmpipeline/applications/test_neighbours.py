"""Neighbours by weight are the largest weights, by embedding the largest cosines; of a release one column is read."""

import json

import numpy as np
import pytest

from dmpipeline.applications.evidence import find_evidence
from dmpipeline.applications.neighbours import similar
from dmpipeline.data.datasets import load_dataset
from dmpipeline.errors import SpecError
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.fitting.fitted import load_datamodels
from dmpipeline.runs.store import Run
from dmpipeline.runs.targets import datamodels_path
from dmpipeline.spec import RunSpec
from dmpipeline.workflow.fit_step import fit_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """200 perceptrons of 150 digits, with datamodels of 40 test examples."""
    place, digits = tmp_path_factory.mktemp("neighbours"), load_dataset("digits")
    arrays = {f"train_{what}": getattr(digits, f"train_{what}")[:150] for what in ("inputs", "labels")}
    arrays |= {f"test_{what}": getattr(digits, f"test_{what}")[:40] for what in ("inputs", "labels")}
    arrays |= {name: value.reshape(-1, 8, 8) for name, value in arrays.items() if name.endswith("inputs")}
    np.savez(place / "small.npz", **arrays)
    spec = RunSpec(dataset=str(place / "small.npz"), n_models=200, recipe={"name": "perceptron", "version": 1})
    run = Run.create(place / "run", spec)
    run.train()
    fit_run(run)
    return run


def of(found, kind, part):
    return [row for row in found if row.kind == kind and row.part == part]


def test_neighbours_by_weight_are_the_largest_positive_weights(run):
    weight = load_datamodels(run).weight[:, 5]
    rows = of(similar(run, 5, top=4), "weight", "train")
    assert [row.index for row in rows] == [i for i in np.argsort(-weight, kind="stable")[:4] if weight[i] > 0]
    assert [row.score for row in rows] == pytest.approx([weight[row.index] for row in rows])
    assert [row.label for row in rows] == [int(run.dataset().train_labels[row.index]) for row in rows]


def test_neighbours_by_embedding_are_the_targets_whose_weights_have_the_largest_cosine(run):
    weight = load_datamodels(run).weight.astype(np.float64)
    lengths = np.linalg.norm(weight, axis=0)
    cosines = weight.T @ weight[:, 5] / (lengths * lengths[5])
    cosines[5] = -1
    rows = of(similar(run, 5, top=6, by=["embedding"]), "embedding", "test")
    assert [row.index for row in rows] == np.argsort(-cosines)[:6].tolist()
    assert [row.score for row in rows] == pytest.approx(np.sort(cosines)[::-1][:6], rel=1e-4)


def test_training_examples_are_compared_by_inputs_until_they_have_weights(run):
    rows = of(similar(run, 5, top=5), "embedding", "train")
    assert {row.compared for row in rows} == {"inputs"}
    labels = [row.label for row in rows]
    assert labels.count(int(run.dataset().test_labels[5])) >= 4
    fit_run(run, targets="train")
    try:
        of_train = load_datamodels(run, "train").weight
        own = load_datamodels(run).weight[:, 5]
        cosines = of_train.T @ own / np.maximum(np.linalg.norm(of_train, axis=0) * np.linalg.norm(own), 1e-12)
        rows = of(similar(run, 5, top=5), "embedding", "train")
        assert {row.compared for row in rows} == {"weights"}
        assert [row.score for row in rows] == pytest.approx(np.sort(cosines)[::-1][:5], rel=1e-3)
        found = similar(run, 7, targets="train")
        assert found.targets == "train"
        assert all((row.index, row.part) != (7, "train") for row in found)
    finally:
        datamodels_path(run, "train").unlink()


def test_neighbours_are_json_of_index_kind_score_and_label(run):
    said = json.loads(json.dumps(similar(run, 3, top=2).as_dict()))
    assert said["target"] == 3
    assert {"index", "kind", "score", "label"} <= said["neighbours"][0].keys()
    assert {row["kind"] for row in said["neighbours"]} == {"weight", "embedding"}


def test_of_a_release_one_column_is_read_and_embeddings_are_refused(tmp_path):
    weight = np.random.default_rng(0).standard_normal((60, 9)).astype(np.float32)
    zeros = np.zeros(9, np.float32)
    path = Datamodels(weight, zeros, zeros).save(tmp_path / "own_datamodels.pt")
    evidence = find_evidence(str(path), space="raw")
    found = similar(evidence, 4, top=3)
    assert [row.index for row in found] == np.argsort(-weight[:, 4])[:3].tolist()
    assert {(row.kind, row.label) for row in found} == {("weight", None)}
    with pytest.raises(SpecError, match="compare all 9 columns"):
        similar(evidence, 4, by=["embedding"])


def test_datamodels_alone_compare_their_targets():
    weight = np.eye(6, 4, dtype=np.float32)
    weight[:, 3] = weight[:, 1] * 2
    weight[5, 3] = 0.1
    zeros = np.zeros(4, np.float32)
    rows = of(similar(Datamodels(weight, zeros, zeros), 1, top=1), "embedding", "test")
    assert [row.index for row in rows] == [3]
    assert rows[0].score == pytest.approx(2 / np.sqrt(4.01))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"target": 99}, "choose 0 to 39"),
        ({"target": 1, "top": 0}, "1 or more"),
        ({"target": 1, "by": ["distance"]}, "choose weight or embedding"),
    ],
)
def test_what_cannot_be_is_refused(run, asked, said):
    with pytest.raises(SpecError, match=said):
        similar(run, **asked)
