"""Clusters by datamodels: planted subpopulations are found, and how stable they are is told."""

import json

import numpy as np
import pytest
from embedding_runs import N_TEST, blob_of, blobs, blobs_run, trained
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from small_release import Pt, pt, write_locally

from dmpipeline import workflow
from dmpipeline.applications.mapping.clusters import clusters
from dmpipeline.data.datasets import load_dataset
from dmpipeline.data.folders import save_dataset
from dmpipeline.errors import SpecError
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return blobs_run(tmp_path_factory.mktemp("blobs"))


def parts_of(found, n):
    parts = np.full(n, -1)
    for row in found:
        parts[list(row.members)] = row.cluster
    return parts


def planted(n_groups=5, each=12, noise=0.3):
    """Datamodels whose targets fall into groups, in turns, each with training examples of its own."""
    rng = np.random.default_rng(0)
    group = np.arange(n_groups * each) % n_groups
    weight = noise * rng.normal(size=(n_groups * 8, len(group)))
    weight += np.arange(n_groups).repeat(8)[:, None] == group
    zeros = np.zeros(len(group))
    return Datamodels(weight=weight.astype(np.float32), bias=zeros, lam=zeros), group


@pytest.mark.parametrize("n_groups", [2, 3, 5, 8])
def test_the_eigengap_finds_how_many_groups_are_planted_and_which(n_groups):
    datamodels, group = planted(n_groups)
    found = clusters(datamodels)
    assert (found.n_clusters, found.chosen_by) == (n_groups, "eigengap")
    assert adjusted_rand_score(group, parts_of(found, len(group))) == 1
    assert sum(row.size for row in found) == len(group)
    assert found[0].purity is found[0].stability is found.ari is None
    assert clusters(datamodels, n_clusters=4).chosen_by == "you"


def test_examples_without_weights_are_told_apart_from_clusters():
    datamodels, group = planted(3)
    datamodels.weight[:, [4, 10]] = 0
    found = clusters(datamodels)
    assert found.unclustered == (4, 10)
    kept = np.delete(np.arange(len(group)), [4, 10])
    assert adjusted_rand_score(group[kept], parts_of(found, len(group))[kept]) == 1
    assert found.as_dict()["unclustered"] == [4, 10]
    datamodels.weight[:] = 0
    with pytest.raises(SpecError, match="hardly any of 36 examples have weights"):
        clusters(datamodels)


def test_subclasses_that_labels_do_not_name_are_found_and_found_again_by_half_of_the_models(run):
    reported = []
    found = clusters(run, n_clusters=4, progress=lambda done, total: reported.append((done, total)))
    assert adjusted_rand_score(blob_of(N_TEST), parts_of(found, N_TEST)) > 0.6  # labels alone have 0.48
    assert found.ari > 0.4
    assert all(0 < row.stability <= 1 for row in found)
    # not every blob is as stable, and the measure is no constant
    assert len({row.stability for row in found}) > 1
    assert all(row.purity > 0.8 and row.commonest_label in ("even", "odd") for row in found)
    assert [row.size for row in found] == sorted((row.size for row in found), reverse=True)
    assert reported[-1] == (2 * N_TEST, 2 * N_TEST)
    assert reported == sorted(reported)
    told = json.loads(json.dumps(found.as_dict()))
    assert set(told["clusters"][0]) == {"cluster", "size", "purity", "commonest_label", "stability", "members"}
    assert told["ari"] == found.ari
    assert clusters(run, n_clusters=4, stability=False).rows[0].members == found[0].members


def test_more_clusters_than_there_are_subclasses_are_less_stable(run):
    own, cut = (clusters(run, n_clusters=n_clusters) for n_clusters in (4, 13))
    assert cut.ari < own.ari
    assert np.mean([row.stability for row in cut]) < np.mean([row.stability for row in own])


def test_chosen_targets_alone_are_clustered_with_their_own_halves(run):
    chosen = [30, 2, 4, 6, 8, 10, 3, 5, 7, 9, 11, 13]
    found = clusters(run, columns=chosen, n_clusters=2)
    assert sorted([*found.unclustered, *(member for row in found for member in row.members)]) == sorted(chosen)
    assert found.ari is not None
    of_train = clusters(run, of="train", n_clusters=4, stability=False)
    assert sum(row.size for row in of_train) + len(of_train.unclustered) == 80


def test_a_regression_has_clusters_without_purity(tmp_path):
    tables = [blobs(n, seed)[0] for n, seed in ((80, 1), (40, 2))]
    numbers = [(x, x @ np.linspace(-1, 1, 12) + 0.05) for x in tables]
    found = clusters(trained(tmp_path, *numbers, outputs=["squared_errors"]), n_clusters=3)
    assert found[0].purity is found[0].commonest_label is None
    assert found.ari is not None


def test_a_release_is_clustered_by_the_columns_asked_for(tmp_path):
    datamodels, group = planted(3)
    n = len(group)
    tensors = {"weight": datamodels.weight, "bias": np.zeros(n, np.float32), "lam": np.zeros(n, np.float32)}
    catalog = write_locally({"toy/50pct/test_datamodels": Pt(pt(tensors), tensors)}, tmp_path)
    chosen = list(range(1, n, 2))
    found = clusters("toy/50pct", columns=chosen, catalog=catalog)
    assert adjusted_rand_score(group[chosen], parts_of(found, n)[chosen]) == 1
    with pytest.raises(SpecError, match="models to fit halves of are known of runs alone"):
        clusters("toy/50pct", stability=True, catalog=catalog)


def test_what_cannot_be_asked_is_refused_with_what_can(run, tmp_path):
    with pytest.raises(SpecError, match="n_clusters is 1; choose at least 2"):
        clusters(run, n_clusters=1)
    with pytest.raises(SpecError, match="40 examples make no 41 clusters"):
        clusters(run, n_clusters=41)
    with pytest.raises(SpecError, match="choose targets or train"):
        clusters(run, of="test")
    with pytest.raises(SpecError, match="n_neighbours is 0"):
        clusters(run, n_neighbours=0)
    few = trained(tmp_path, blobs(24, 1), blobs(12, 2), n_models=20)
    assert clusters(few, n_clusters=2).ari is None
    with pytest.raises(SpecError, match="20 models are too few to fit halves of; train 40 or more"):
        clusters(few, stability=True)


def test_digits_are_found_by_models_that_were_taught_even_and_odd(tmp_path, figures):
    digits = load_dataset("digits")
    pixels = digits.test_inputs.reshape(-1, 64)
    parts = [
        (inputs.reshape(-1, 8, 8), labels % 2)
        for inputs, labels in (
            (digits.train_inputs, digits.train_labels),
            (digits.test_inputs, digits.test_labels),
        )
    ]
    dataset = save_dataset(tmp_path / "parity", *parts, task="classification")
    held_out = {"n_subsets": 4, "n_retrainings": 2}
    run = Run.create(tmp_path / "run", RunSpec(dataset=str(dataset), n_models=500, held_out=held_out))
    run.train()
    workflow.fit_run(run, n_lams=30, tol=1e-2)
    found = clusters(run, n_clusters=10, stability=False)
    ari = adjusted_rand_score(digits.test_labels, parts_of(found, digits.n_test))
    of_pixels = KMeans(10, n_init=10, random_state=0).fit_predict(pixels)
    of_pixels = adjusted_rand_score(digits.test_labels, of_pixels)
    figures.append(
        f"ten digits in clusters of 500 even/odd models: adjusted Rand {ari:.3f}; of k-means on pixels "
        f"{of_pixels:.3f}, of even and odd {adjusted_rand_score(digits.test_labels, digits.test_labels % 2):.3f}"
    )
    assert ari > 0.35  # even and odd alone have 0.20, chance 0
