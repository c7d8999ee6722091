"""Embeddings by datamodels: directions, neighbours, maps, their files and their picture."""

import dataclasses
import importlib.util
import io
import json
import sys

import numpy as np
import pytest
import zarr
from embedding_runs import N_TEST, N_TRAIN, blob_of, blobs_run, trained
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import cosine_similarity
from small_release import Pt, pt, publish, write_locally

from dmpipeline.applications.evidence import find_evidence
from dmpipeline.applications.mapping.directions import what_removal_does
from dmpipeline.applications.mapping.embeddings import cosine_neighbours, embed
from dmpipeline.applications.mapping.files import save_parquet, save_zarr
from dmpipeline.applications.mapping.maps import draw_map, map_figure
from dmpipeline.errors import RunError, SpecError
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.fitting.fitted import load_datamodels

LANGUAGE = """
from torch import nn

class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
    def forward(self, tokens):
        return self.head(self.embedding(tokens))
"""

needs_pyarrow = pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None, reason="pyarrow, which writes Parquet, is not installed"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return blobs_run(tmp_path_factory.mktemp("blobs"))


@pytest.fixture(scope="module")
def embedding(run):
    return embed(run)


def datamodels_of(weight):
    n_targets = weight.shape[1]
    return Datamodels(weight=weight.astype(np.float32), bias=np.zeros(n_targets), lam=np.zeros(n_targets))


def weights(n_train=30, n_targets=12, seed=0):
    return np.random.default_rng(seed).normal(size=(n_train, n_targets)).astype(np.float32)


def rows_of(path):
    from pyarrow.parquet import read_table

    return read_table(path).to_pylist()


@pytest.mark.parametrize("n_components", [3, 50], ids=["some directions", "all that there are"])
@pytest.mark.parametrize("of", ["targets", "train"])
def test_directions_are_the_principal_components_of_scikit_learn(of, n_components):
    weight = weights() * np.linspace(1, 4, 12)  # so that no two shares are alike
    vectors = weight if of == "train" else weight.T
    found = embed(datamodels_of(weight), of=of, n_components=n_components)
    k = min(n_components, min(vectors.shape) - (of == "targets"))
    expected = PCA(k, svd_solver="full").fit(vectors.astype(np.float64))
    assert len(found) == k == found.scores.shape[1]
    np.testing.assert_allclose([row.explained_share for row in found], expected.explained_variance_ratio_, rtol=1e-4)
    np.testing.assert_allclose(abs(np.sum(found.loadings * expected.components_, axis=1)), 1, rtol=1e-4)
    np.testing.assert_allclose(found.scores, (vectors - vectors.mean(0)) @ found.loadings.T, atol=1e-4)
    assert (found.loadings.max(1) == abs(found.loadings).max(1)).all()


def test_neighbours_are_those_of_largest_cosine_and_zeros_are_like_nothing():
    vectors = weights(25, 7)
    vectors[4] = 0
    places, similarities = cosine_neighbours(vectors, 6)
    expected = cosine_similarity(vectors)
    np.fill_diagonal(expected, -2)
    np.testing.assert_allclose(similarities, -np.sort(-expected, axis=1)[:, :6], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(expected, places, 1), similarities, atol=1e-6)
    assert (similarities[4] == 0).all()
    assert cosine_neighbours(vectors[:3], 6)[0].shape == (3, 2)


def test_neighbours_of_a_target_are_mostly_of_its_own_planted_subclass(embedding):
    blobs = blob_of(N_TEST)
    nearest = blobs[embedding.neighbours[:, :3]] == blobs[:, None]
    assert nearest.mean() > 0.6  # by chance, 9/39


def test_an_embedding_is_the_same_for_the_same_seed_and_is_ready_for_json(run, embedding):
    again = embed(run)
    for name in ("scores", "x", "y", "neighbours"):
        np.testing.assert_array_equal(getattr(again, name), getattr(embedding, name))
    told = json.loads(json.dumps(embedding.as_dict()))
    assert [row["direction"] for row in told["directions"]] == list(range(10))
    assert told["directions"][0]["positive_labels"][0] in ("even", "odd")
    assert told["examples"][3]["label"] == "odd"
    assert told["examples"][3]["neighbours"] == embedding.neighbours[3].tolist()
    assert (told["map"], told["n_examples"]) == ("t-SNE", N_TEST)
    assert len(embedding.to_pandas()) == 10
    assert "explained share" in embedding._repr_html_()


def test_training_examples_are_embedded_by_the_targets_they_matter_to(run):
    found = embed(run, of="train", columns=[3, 5, 8])
    weight = load_datamodels(run).weight[:, [3, 5, 8]]
    assert (found.part, found.scores.shape, found.features.tolist()) == ("train", (N_TRAIN, 3), [3, 5, 8])
    np.testing.assert_allclose(found.scores @ found.loadings, weight - weight.mean(0), atol=1e-4)
    assert found.label(1) == "odd"


def test_the_change_by_a_removal_is_predicted_by_weights_and_measured_by_retraining(run, embedding):
    found = what_removal_does(embedding, [1, 0], k=15, n_targets=5, n_retrainings=10)
    assert [(row.direction, row.removed_end, row.of_end) for row in found][:3] == [
        (1, "positive", "positive"),
        (1, "positive", "negative"),
        (1, "negative", "positive"),
    ]
    weight = load_datamodels(run).weight
    for row in found:
        along = embedding.loadings[row.direction] * (-1 if row.removed_end == "positive" else 1)
        assert set(row.removed) == set(np.argsort(along)[:15].tolist())
        scores = embedding.scores[:, row.direction] * (-1 if row.of_end == "positive" else 1)
        assert set(row.of_targets) == set(np.argsort(scores)[:5].tolist())
        predicted = -weight[list(row.removed)][:, list(row.of_targets)].sum(0).mean()
        assert row.predicted_change == pytest.approx(predicted, abs=1e-5)
        assert row.low < row.measured_change < row.high
    predicted, measured = ([getattr(row, name) for row in found] for name in ("predicted_change", "measured_change"))
    assert np.corrcoef(predicted, measured)[0, 1] > 0.7
    # what lies at an end is hurt by the removal of what lies there, too
    assert all(row.measured_change < 0 for row in found if row.removed_end == row.of_end)
    alone = what_removal_does(embedding, 1, k=15, n_targets=5)
    assert [row.predicted_change for row in alone] == [row.predicted_change for row in found][:4]
    assert alone[0].measured_change is None
    assert alone.as_dict()["removals"][0]["low"] is None


def test_what_cannot_be_asked_of_an_embedding_is_refused_with_what_can(run, embedding):
    with pytest.raises(SpecError, match="there is no direction 10; choose 0 to 9"):
        what_removal_does(embedding, 10)
    with pytest.raises(SpecError, match="k is 41; choose 1 to 40"):
        what_removal_does(embedding, k=41)
    with pytest.raises(SpecError, match="1 retrainings have no interval; choose 0, to predict alone, or from 2"):
        what_removal_does(embedding, n_retrainings=1)
    with pytest.raises(SpecError, match="retrained with is known of runs alone"):
        what_removal_does(embed(datamodels_of(weights())), k=3, n_targets=3, n_retrainings=5)
    with pytest.raises(SpecError, match="target 2 is asked for twice"):
        embed(run, columns=[2, 3, 2])
    with pytest.raises(SpecError, match="choose targets or train"):
        embed(run, of="test")
    with pytest.raises(SpecError, match="nothing to compare among 1 examples"):
        embed(run, columns=[2])
    with pytest.raises(SpecError, match="n_components is 0; choose at least 1"):
        embed(run, n_components=0)
    with pytest.raises(SpecError, match="have the same weights"):
        embed(datamodels_of(np.ones((5, 6))))
    for draw in (draw_map, save_parquet):
        with pytest.raises(SpecError, match=r"map\.gif"):
            draw(embedding, "map.gif")


def test_a_release_is_embedded_by_the_columns_asked_for_alone_and_without_labels(tmp_path):
    weight, tensors = weights(30, 12), {}
    tensors = {"weight": weight, "bias": np.zeros(12, np.float32), "lam": np.zeros(12, np.float32)}
    catalog = write_locally({"toy/50pct/test_datamodels": Pt(pt(tensors), tensors)}, tmp_path / "release")
    chosen = [11, 2, 3, 7, 5, 0]
    found = embed("toy/50pct", columns=chosen, catalog=catalog)
    assert found.indices.tolist() == chosen
    alone = embed(datamodels_of(weight[:, chosen]))
    np.testing.assert_array_equal(found.scores, alone.scores)
    assert found.labels is None
    assert found[0].positive_labels is None
    assert found.as_dict()["examples"][0]["label"] is None
    # indices are those of the release, neighbours in files are rows of the file
    assert found.as_dict()["examples"][0]["neighbours"] == [chosen[row] for row in found.neighbours[0]]
    assert draw_map(found, tmp_path / "map.svg").read_text().startswith("<svg")
    group = zarr.open_group(save_zarr(found, tmp_path / "map.zarr"), mode="r")
    assert "labels" not in group
    assert what_removal_does(found, k=3, n_targets=2)[0].predicted_change < 0


def test_weights_of_a_release_that_are_held_are_read_once(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("DMDATA_CACHE_GIB", "0")
    weight = weights(30, 12)
    tensors = {"weight": weight, "bias": np.zeros(12, np.float32), "lam": np.zeros(12, np.float32)}
    catalog = publish(s3, {"toy/50pct/test_datamodels": Pt(pt(tensors), tensors)}, tmp_path)
    evidence = find_evidence("toy/50pct", catalog=catalog).held([11, 2, 3, 7, 5, 0])
    served = s3.n_object_bytes
    found = embed(evidence, columns=[11, 2, 3, 7, 5, 0])
    row = what_removal_does(found, k=3, n_targets=2)[0]
    assert s3.n_object_bytes == served
    assert row.predicted_change == pytest.approx(-weight[list(row.removed)][:, list(row.of_targets)].sum(0).mean())
    np.testing.assert_array_equal(evidence.datamodels([2, 4]).weight, weight[:, [2, 4]])
    np.testing.assert_array_equal(evidence.datamodels().weight, weight)
    np.testing.assert_array_equal(evidence.weights_of(8), weight[8])
    assert not evidence.is_at_hand


def test_zarr_keeps_everything_whole_and_replaces_nothing(embedding, tmp_path):
    path = save_zarr(embedding, tmp_path / "own.zarr")
    group = zarr.open_group(path, mode="r")
    assert group.metadata.zarr_format == 3
    for name in ("scores", "x", "y", "neighbours", "similarities", "labels", "indices", "features"):
        np.testing.assert_array_equal(group[name][:], getattr(embedding, name))
    np.testing.assert_array_equal(group["directions"][:], embedding.loadings)
    assert group.attrs["class_names"] == ["even", "odd"]
    assert group.attrs["map"] == "t-SNE"
    assert [entry.name for entry in tmp_path.iterdir() if "zarr" in entry.name] == ["own.zarr"]
    with pytest.raises(SpecError, match="is there already; choose another path"):
        save_zarr(embedding, path)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"):
        save_zarr(embedding, tmp_path / "file" / "own.zarr")


@needs_pyarrow
def test_parquet_of_examples_that_are_not_known_has_no_labels_and_no_inputs(tmp_path):
    path = save_parquet(embed(datamodels_of(weights()), columns=[4, 2, 9, 7]), tmp_path / "map.parquet")
    assert [row["index"] for row in rows_of(path)] == [4, 2, 9, 7]
    assert list(rows_of(path)[0]) == ["index", "x", "y", "neighbors"]


@needs_pyarrow
def test_parquet_holds_what_embedding_atlas_reads(embedding, tmp_path):
    rows = rows_of(save_parquet(embedding, tmp_path / "map.parquet"))
    assert [row["label"] for row in rows[:3]] == ["even", "odd", "even"]
    assert [row["x"] for row in rows] == embedding.x.tolist()
    assert rows[5]["neighbors"]["ids"] == embedding.neighbours[5].tolist()
    distances = np.array([row["neighbors"]["distances"] for row in rows])
    np.testing.assert_allclose(distances, 1 - embedding.similarities, atol=1e-6)
    assert (np.diff(distances, axis=1) >= 0).all()
    inputs = embedding.evidence.dataset().test_inputs
    np.testing.assert_allclose([row["feature_11"] for row in rows], inputs[:, 11])


def test_without_pyarrow_parquet_says_what_to_install(embedding, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(RunError, match=r"pip install 'dmdata\[atlas\]'"):
        save_parquet(embedding, tmp_path / "map.parquet")
    assert not (tmp_path / "map.parquet").exists()


def test_a_map_has_a_color_and_marker_of_its_own_for_each_class_and_words_for_screen_readers(embedding, tmp_path):
    figure = map_figure(embedding)
    legend = figure.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["even", "odd"]
    drawn = figure.axes[0].collections
    assert sum(len(points.get_offsets()) for points in drawn) == N_TEST
    assert drawn[0].get_facecolor().tolist() != drawn[1].get_facecolor().tolist()
    assert len(drawn[0].get_paths()[0].vertices) != len(drawn[1].get_paths()[0].vertices)
    text = draw_map(embedding, tmp_path / "map.svg").read_text()
    assert "40 test examples by their datamodels, on a map by t-SNE" in text
    assert draw_map(embedding, tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_of_many_classes_the_commonest_are_drawn_apart_and_names_are_taken_as_they_are():
    found = embed(datamodels_of(weights(8, 90)))
    labels = np.concatenate([np.arange(45), np.arange(45) % 5])
    names = ("_hidden", "$a$", *(f"class {number} of a very long name indeed" for number in range(2, 45)))
    figure = map_figure(dataclasses.replace(found, labels=labels, class_names=names))
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert len(texts) == 30
    assert texts[:2] == [" _hidden", r"\$a\$"]
    assert texts[-1] == "16 others"
    assert sum(len(points.get_offsets()) for points in figure.axes[0].collections) == 90


@pytest.fixture(scope="module")
def inputs_of_kinds():
    rng = np.random.default_rng(0)
    return {
        "pictures": [rng.integers(0, 256, (n, 6, 6, 3), dtype=np.uint8) for n in (30, 8)],
        "numbers": [rng.normal(size=(n, 6)).astype(np.float32) for n in (30, 8)],
        "texts": [rng.integers(0, 5, (n, 4)) for n in (30, 8)],
    }


@pytest.fixture(scope="module")
def kinds(inputs_of_kinds, tmp_path_factory):
    """Training examples of each kind, embedded."""
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "embedded_language.py").write_text(LANGUAGE)
    language = {"name": "module", "network": "embedded_language:Language", "epochs": 3, "batch_size": 5, "lr": 0.1}
    labels = {
        "pictures": lambda x: x[:, 0, 0, 0].astype(int) // 128,
        "numbers": lambda x: x[:, 0] + 0.1,
        "texts": lambda x: (x + 1) % 5,
    }
    more = {
        "pictures": {},
        "numbers": {"outputs": ["squared_errors"]},
        "texts": {"outputs": ["log_likelihoods"], "recipe": language},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        runs = {
            kind: trained(folder / kind, *((x, labels[kind](x)) for x in parts), **more[kind])
            for kind, parts in inputs_of_kinds.items()
        }
        sys.modules.pop("embedded_language", None)
    return {kind: embed(run, of="train") for kind, run in runs.items()}


def test_pictures_and_regressions_and_texts_are_embedded_and_drawn(kinds, inputs_of_kinds, tmp_path):
    numbers = kinds["numbers"]
    assert kinds["pictures"].labels.dtype.kind == "i"
    assert numbers.label(3) == pytest.approx(inputs_of_kinds["numbers"][0][3, 0] + 0.1)
    assert numbers[0].positive_labels[0] == numbers.label(numbers[0].positive[0])
    assert kinds["texts"].labels is None
    for kind, each in kinds.items():
        assert draw_map(each, tmp_path / f"{kind}.svg").read_text().startswith("<svg")
    assert len(map_figure(numbers).axes) == 2  # the second is the scale of colours


@needs_pyarrow
def test_pictures_and_numbers_and_tokens_go_into_parquet_with_their_examples(kinds, inputs_of_kinds, tmp_path):
    from PIL import Image

    rows = {kind: rows_of(save_parquet(each, tmp_path / f"{kind}.parquet")) for kind, each in kinds.items()}
    pictures, tables, texts = (parts[0] for parts in inputs_of_kinds.values())
    png = Image.open(io.BytesIO(rows["pictures"][7]["image"]["bytes"]))
    np.testing.assert_array_equal(np.asarray(png), pictures[7])
    assert rows["numbers"][4]["label"] == pytest.approx(tables[4, 0] + 0.1)
    assert rows["numbers"][4]["feature_5"] == tables[4, 5]
    assert rows["texts"][9]["text"] == " ".join(map(str, texts[9]))
