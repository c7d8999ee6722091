"""The same questions of a table with names, of a regression and of texts: answers are in their terms, or refused."""

import sys

import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_wine

import dmpipeline
from dmpipeline import Run, RunSpec, SpecError, workflow
from dmpipeline.applications.describing import example_in_words
from dmpipeline.applications.retraining import TrainingSet, retrain

_TEXTS = """
import numpy as np

def learn(dataset, mask, seed):
    rng = np.random.default_rng(seed)
    counts = np.zeros((dataset.n_classes, dataset.n_classes))
    for tokens, labels in zip(dataset.train_inputs[mask], dataset.train_labels[mask]):
        np.add.at(counts, (tokens[labels >= 0], labels[labels >= 0]), 1)
    counts += 0.5 + 0.01 * rng.random(counts.shape)
    table = np.log(counts / counts.sum(axis=1, keepdims=True))
    return table[dataset.train_inputs].astype(np.float32), table[dataset.test_inputs].astype(np.float32)
"""


def made(folder, dataset, **spec):
    run = Run.create(
        folder / "run", RunSpec(dataset=str(dataset), held_out={"n_subsets": 5, "n_retrainings": 2}, **spec)
    )
    run.train()
    workflow.fit_run(run)
    return run


@pytest.fixture(scope="module")
def wine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wine")
    table = load_wine(as_frame=True)
    names = table.target.map({0: "barolo", 1: "grignolino", 2: "barbera"})
    order = np.random.default_rng(0).permutation(len(names))
    parts = [(table.data.iloc[some], names.iloc[some]) for some in (order[:130], order[130:])]
    dmpipeline.save_dataset(folder / "wine", *parts)
    return made(folder, folder / "wine", n_models=300)


@pytest.fixture(scope="module")
def diabetes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diabetes")
    inputs, labels = load_diabetes(return_X_y=True)
    dmpipeline.save_dataset(folder / "diabetes", (inputs[:200], labels[:200]), (inputs[200:230], labels[200:230]))
    return made(folder, folder / "diabetes", n_models=300, outputs=["squared_errors", "predictions"])


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 8, (60, 10))
    tokens[:, 1::2] = (tokens[:, ::2] + 1) % 8  # every other token follows from the one before
    labels = np.concatenate([tokens[:, 1:], np.full((60, 1), -1)], axis=1)
    dmpipeline.save_dataset(folder / "texts", (tokens[:48], labels[:48]), (tokens[48:], labels[48:]))
    (folder / "texts_learner.py").write_text(_TEXTS)
    sys.path.insert(0, str(folder))
    recipe = {"name": "function", "function": "texts_learner:learn"}
    return made(folder, folder / "texts", n_models=300, outputs=["log_likelihoods"], recipe=recipe)


def test_a_table_is_explained_by_its_class_and_column_names(wine):
    found = dmpipeline.explain(wine, 0, top=3)
    assert {row.label for row in found} <= {"barolo", "grignolino", "barbera"}
    dataset = wine.dataset()
    assert example_in_words(dataset, dataset.train_inputs[found[0].index]).startswith("alcohol 1")
    answer = dmpipeline.counterfactual(wine, 0, [row.index for row in found.helpers], n_retrainings=5)
    assert answer.measured_change < 0
    assert dmpipeline.data_support(wine, [0, 1], mislabel=True).change == "mislabelled"


def test_a_regression_is_explained_and_changed_but_nothing_in_it_flips(diabetes):
    found = dmpipeline.explain(diabetes, 2, top=3)
    assert all(isinstance(row.label, float) for row in found)
    answer = dmpipeline.counterfactual(diabetes, 2, [row.index for row in found.harmers], n_retrainings=5)
    assert answer.measured_low < answer.measured_change < answer.measured_high
    with pytest.raises(SpecError, match="sign does not tell right from wrong"):
        dmpipeline.data_support(diabetes, [2])
    with pytest.raises(SpecError, match="no classes"):
        retrain(diabetes, [TrainingSet.of(200, relabelled=[(0, 1)])], 1)


def test_texts_are_explained_by_their_tokens(texts):
    found = dmpipeline.explain(texts, 1, top=3)
    assert {row.label for row in found} == {None}  # a label a position
    dataset = texts.dataset()
    words = example_in_words(dataset, dataset.train_inputs[0])
    assert words == " ".join(map(str, dataset.train_inputs[0].tolist()))
    answer = dmpipeline.counterfactual(texts, 1, range(24), n_retrainings=3)
    assert answer.measured_change < 0  # of the log-likelihood, with half of the texts
    with pytest.raises(SpecError, match="sign does not tell right from wrong"):
        dmpipeline.data_support(texts)
