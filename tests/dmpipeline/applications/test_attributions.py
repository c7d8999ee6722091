"""Other people's attributions on a run's held-out models: what is measured, and what is refused before it is."""

import itertools
import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.datasets import load_diabetes, load_iris

from dmpipeline import workflow
from dmpipeline.applications.attributions import OWN, AttributionScores, score
from dmpipeline.applications.retraining import TrainingSet, retrain
from dmpipeline.cli.command import main
from dmpipeline.errors import DataWarning, SpecError
from dmpipeline.fitting.fitted import load_datamodels
from dmpipeline.runs.store import Run
from dmpipeline.scoring.evaluation import evaluate
from dmpipeline.spec import RunSpec
from dmpipeline.training.train import Way

WRONG = (3, 17, 41, 70)
N_TRAIN, N_TEST = 110, 40
HELD_OUT = {"n_subsets": 12, "n_retrainings": 3}
WAY = Way("products", 50)


def call(capsys, *arguments):
    """Run a command; return its exit code, its JSON if it printed any, and what it said to people."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    data = json.loads(captured.out) if captured.out.startswith("{") else captured.out
    return ended.value.code, data, captured.err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on irises, a table, with four wrong labels; datamodels of both kinds."""
    folder = tmp_path_factory.mktemp("scores")
    inputs, labels = load_iris(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    inputs, labels = ((inputs - inputs.mean(0)) / inputs.std(0))[order].astype(np.float32), labels[order]
    labels[list(WRONG)] = (labels[list(WRONG)] + 1) % 3
    parts = {"train_inputs": inputs[:N_TRAIN], "train_labels": labels[:N_TRAIN]}
    np.savez(folder / "iris.npz", **parts, test_inputs=inputs[N_TRAIN:], test_labels=labels[N_TRAIN:])
    run = Run.create(folder / "run", RunSpec(dataset=str(folder / "iris.npz"), n_models=200, held_out=HELD_OUT))
    run.train(way=WAY)
    for targets in ("test", "train"):
        workflow.fit_run(run, targets=targets)
    return run


@pytest.fixture(scope="module")
def close(run):
    """An attribution that anyone can work out: how close two irises are, with the sign of whether labels agree."""
    dataset = run.dataset()

    def to(inputs, labels):
        distance = np.linalg.norm(dataset.train_inputs[:, None] - inputs[None], axis=-1)
        return (np.where(dataset.train_labels[:, None] == labels, 1, -1) * np.exp(-distance)).astype(np.float32)

    return to(dataset.test_inputs, dataset.test_labels), to(dataset.train_inputs, dataset.train_labels)


def held_out(run, array):
    rows = run.spec.rows.held_out
    return run.array("train_masks")[rows], run.array(array)[rows].astype(np.float32)


def test_scores_and_the_runs_own_datamodels_are_judged_as_evaluate_judges_them(run, close):
    scored = score(run, {"close": close[0], "random": np.random.default_rng(0).standard_normal(close[0].shape)})
    assert isinstance(scored, AttributionScores)
    assert [row.name for row in scored] == [OWN, "close", "random"]
    masks, outputs = held_out(run, "test_margins")
    for row, estimate in zip(scored, [load_datamodels(run), close[0]], strict=False):
        expected = evaluate(estimate, masks, outputs, n_retrainings=3)
        assert (row.lds, row.lds_low, row.lds_high) == (expected.lds, expected.lds_low, expected.lds_high)
        assert (row.lds_ceiling, row.lds_single) == (expected.lds_ceiling, expected.lds_single)
    assert scored[0].lds > scored[2].lds
    assert scored[1].lds > 0.2 > abs(scored[2].lds)
    assert (scored.n_subsets, scored.n_subset_retrainings, scored.n_targets) == (12, 3, N_TEST)
    assert scored.subset_share == pytest.approx(0.5)
    assert scored[1].class_detection == 1  # only the same class has scores above 0
    assert 0.1 < scored[2].class_detection < 0.6
    assert scored[1].flipped is None
    assert score(run, {"close": close[0]}, seed=1)[1].lds_low != scored[1].lds_low


def test_a_table_is_json_a_frame_and_a_page(run, close):
    scored = score(run.path, {"close": close[0]}, top_k=3)
    data = json.loads(json.dumps(scored.as_dict()))
    assert (data["top_k"], data["removals"], data["n_retrainings"]) == (3, [], 0)
    assert data["scores"][1]["mislabel_auc"] is None
    assert list(scored.by_name()) == [OWN, "close"]
    assert "name" not in scored.by_name()["close"]
    assert scored.to_pandas().set_index("name").loc["close", "lds"] == scored[1].lds
    assert ">close</td>" in scored._repr_html_()
    titles = [column.header for column in scored.table().columns]
    assert titles[:3] == ["attribution", "LDS", "95% interval"]
    assert "mislabel AUC" not in titles


def test_any_kind_of_matrix_counts_the_same(run, close, tmp_path):
    np.save(tmp_path / "close.npy", close[0])
    np.save(tmp_path / "columns.npy", np.asfortranarray(close[0]))
    kinds = {
        "path": tmp_path / "close.npy",
        "text": str(tmp_path / "columns.npy"),
        "mapped": np.load(tmp_path / "close.npy", mmap_mode="r"),
        "torch": torch.from_numpy(close[0]),
        "pandas": pd.DataFrame(close[0]),
        "sparse": sparse.csc_array(close[0]),
    }
    scored = score(run, {"array": close[0], **kinds})
    assert len({(row.lds, row.class_detection, row.top_k_cardinality) for row in scored.rows[1:]}) == 1


def test_a_run_without_datamodels_is_enough(run, close, tmp_path):
    bare = Run.create(tmp_path / "bare", run.spec.model_copy(update={"n_models": 50}))
    bare.train(way=WAY)
    scored = score(bare, {"close": close[0]})
    assert [row.name for row in scored] == ["close"]
    assert scored[0].lds == score(run, {"close": close[0]})[1].lds  # the held-out models are the same


def test_subclasses_are_the_callers(run, close):
    parts = run.dataset().train_labels % 2, run.dataset().test_labels % 2
    scored = score(run, {"close": close[0]}, subclasses=parts)
    assert scored[1].subclass_detection == 1
    upside_down = score(run, {"close": close[0]}, subclasses=(parts[0], 1 - parts[1]))
    assert upside_down[1].subclass_detection == 0
    with pytest.raises(SpecError, match=r"lengths \(40, 110\); expected a pair: 110 of the training examples and 40"):
        score(run, {"close": close[0]}, subclasses=(parts[1], parts[0]))


def test_wrong_labels_stand_out_among_training_examples(run, close):
    neighbours = close[1].copy()
    np.fill_diagonal(neighbours, 0)
    np.fill_diagonal(neighbours, -neighbours.sum(axis=0))  # an example that its neighbours speak against
    scored = score(run, {"close": neighbours}, targets="train", mislabelled=WRONG)
    own, other = scored
    assert own.mislabel_auc > 0.9
    assert other.mislabel_auc > 0.9
    assert 4 / N_TRAIN < own.mislabel_average_precision <= 1
    # were an example its own proponent, all of those with wrong labels would be right
    assert own.class_detection < 1
    with pytest.raises(SpecError, match=r'targets="train"'):
        score(run, {"close": close[0]}, mislabelled=WRONG)
    for wrong, what in (([], "0 of 110"), ([110], "no training example 110"), ([0.5], "not a list of whole numbers")):
        with pytest.raises(SpecError, match=what):
            score(run, {"close": neighbours}, targets="train", mislabelled=wrong)


def test_flips_are_those_of_models_retrained_without_the_highest_scores(run, close):
    seen = []
    options = {"n_retrainings": 2, "n_brittle_targets": 6, "removals": [5, 20, 45], "seed": 3}
    scored = score(run, {"close": close[0]}, progress=lambda *counts: seen.append(counts), **options)
    most = (1 + 2 * 6 * 3) * 2
    assert seen[-1] == (most, most)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert scored.removals == (5, 20, 45)
    picked = scored.brittle_targets
    assert len(set(picked)) == 6
    full = retrain(run, [TrainingSet.of(N_TRAIN)], 2)[0].of("test").mean(axis=0)
    assert (full[list(picked)] > 0).all()
    has_flipped = np.zeros(6, bool)
    for place, k in enumerate(scored.removals):
        order = np.argsort(-close[0][:, picked], axis=0)
        sets = [TrainingSet.of(N_TRAIN, without=order[:k, nth]) for nth in range(6)]
        after = [
            each.of("test").mean(axis=0)[target] for each, target in zip(retrain(run, sets, 2), picked, strict=True)
        ]
        has_flipped |= np.array(after) < 0
        assert scored[1].flipped[place] == has_flipped.mean()
    assert scored[1].flipped[-1] > 0  # 45 are all of a class but a few
    assert score(run, {"close": close[0]}, **options).rows == scored.rows
    # harmers first: what speaks against a target flips nothing when it is gone
    with pytest.warns(DataWarning, match="hand in their negative"):
        reversed_ = score(run, {"close": -close[0]}, **options)
    assert reversed_[1].flipped[0] == 0


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"n_retrainings": -1}, "choose 0 or more"),
        ({"n_retrainings": 1, "removals": [5, 5]}, "rising numbers from 1 to 109"),
        ({"n_retrainings": 1, "removals": [110]}, "rising numbers from 1 to 109"),
        ({"n_retrainings": 1, "n_brittle_targets": 41}, "from 1 to 40"),
        ({"top_k": 111}, "from 1 to 110"),
        ({"targets": "both"}, "choose test or train"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_trained(run, close, options, what):
    before = set(run.path.rglob("*"))
    with pytest.raises(SpecError, match=what):
        score(run, {"close": close[0]}, **options)
    assert set(run.path.rglob("*")) == before


@pytest.mark.parametrize(
    ("scores", "what"),
    [
        ({}, "no scores"),
        ([1, 2], "mapping of names"),
        ({"": np.zeros((N_TRAIN, N_TEST))}, "is no name"),
        ({OWN: np.zeros((N_TRAIN, N_TEST))}, "the run's own datamodels"),
        ({"a": np.zeros((N_TEST, N_TRAIN))}, r"scores 'a' have shape \(40, 110\).*look transposed: hand in scores.T"),
        ({"a": np.zeros((N_TRAIN, N_TRAIN))}, r'choose targets="train"'),
        ({"a": np.zeros(N_TRAIN)}, r"shape \(110,\); expected \(110, 40\)"),
        ({"a": np.full((N_TRAIN, N_TEST), 1j)}, "real numbers"),
        ({"a": np.full((N_TRAIN, N_TEST), "1")}, "real numbers"),
        ({"a": [[1.0]]}, "a list; hand in an array"),
        ({"a": np.full((N_TRAIN, N_TEST), np.nan)}, "scores 'a': the score of training example 0 for target 0 is nan"),
    ],
)
def test_scores_that_are_not_the_runs_are_refused(run, scores, what):
    with pytest.raises(SpecError, match=what):
        score(run, scores)


def test_training_targets_want_square_scores(run, close):
    with pytest.raises(SpecError, match=r'for scores of test examples, choose targets="test"'):
        score(run, {"a": close[0]}, targets="train")


def test_files_that_hold_no_matrix_are_refused(run, tmp_path):
    files = {
        "text.npy": lambda path: path.write_text("0.1,0.2"),
        "empty.npy": lambda path: path.touch(),
        "pickled.npy": lambda path: np.save(path, np.array([{"a": 1}], object)),
        "folder.npy": lambda path: path.mkdir(),
    }
    for name, write in files.items():
        write(tmp_path / name)
        with pytest.raises(SpecError, match=r"without pickles .* numpy\.save"):
            score(run, {"a": tmp_path / name})
    np.savez(tmp_path / "several.npz", a=np.zeros(3))
    with pytest.raises(SpecError, match="several arrays"):
        score(run, {"a": tmp_path / "several.npz"})
    with pytest.raises(SpecError, match="there is no file"):
        score(run, {"a": tmp_path / "nothing.npy"})


def test_a_regression_has_an_lds_and_no_classes(tmp_path):
    inputs, numbers = load_diabetes(return_X_y=True)
    numbers = (numbers - numbers.mean()) / numbers.std()
    parts = {"train_inputs": inputs[:80], "train_labels": numbers[:80]}
    np.savez(tmp_path / "d.npz", **parts, test_inputs=inputs[80:90], test_labels=numbers[80:90])
    run = Run.create(
        tmp_path / "run",
        RunSpec(dataset=str(tmp_path / "d.npz"), n_models=20, held_out=HELD_OUT, outputs=["predictions"]),
    )
    run.train()
    dataset = run.dataset()
    similar = (dataset.train_inputs @ dataset.test_inputs.T) * dataset.train_labels[:, None]
    row = score(run, {"similar": similar})[0]
    assert row.class_detection is None
    assert row.lds > 0.1
    with pytest.raises(SpecError, match="whether a target is classified correctly"):
        score(run, {"similar": similar}, n_retrainings=1)


LANGUAGE = """
from torch import nn

class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
    def forward(self, tokens):
        return self.head(self.embedding(tokens))
"""


def test_text_has_an_lds_and_the_callers_subclasses(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "scored_language.py").write_text(LANGUAGE)
    tokens = np.random.default_rng(0).integers(0, 5, (50, 7))
    parts = {"train_inputs": tokens[:40, :-1], "train_labels": tokens[:40, 1:]}
    np.savez(tmp_path / "text.npz", **parts, test_inputs=tokens[40:, :-1], test_labels=tokens[40:, 1:])
    recipe = {"name": "module", "network": "scored_language:Language", "epochs": 3}
    spec = RunSpec(
        dataset=str(tmp_path / "text.npz"), n_models=6, held_out=HELD_OUT, recipe=recipe, outputs=["log_likelihoods"]
    )
    try:
        run = Run.create(tmp_path / "run", spec)
        run.train()
        bigrams = [set(itertools.pairwise(row)) for row in tokens.tolist()]
        shared = np.array([[len(a & b) for b in bigrams[40:]] for a in bigrams[:40]])
        kinds = np.arange(50) % 2
        row = score(run, {"shared": shared}, subclasses=(kinds[:40], kinds[40:]))[0]
    finally:
        sys.modules.pop("scored_language", None)
    assert row.class_detection is None
    assert row.subclass_detection == np.mean(kinds[:40][shared.argmax(axis=0)] == kinds[40:])
    assert row.lds > 0.05


def test_the_command_prints_scores_by_name_next_to_the_runs_own(run, close, tmp_path, capsys):
    np.save(tmp_path / "close.npy", close[0])
    np.save(tmp_path / "none.npy", np.zeros((N_TRAIN, N_TEST), np.int8))
    named = ["--scores", f"close={tmp_path / 'close.npy'}", "--scores", f"none={tmp_path / 'none.npy'}"]
    code, data, _ = call(capsys, "evaluate", run.path, *named, "--json")
    assert code == 0
    assert list(data["scores"]) == ["close", "none"]
    expected = score(run, {"close": close[0]})
    assert data["scores"]["close"] == json.loads(json.dumps(expected.by_name()["close"]))
    assert {"lds", "lds_low", "lds_high", "lds_ceiling"} <= set(data["scores"]["close"])
    assert data["scores"]["none"]["lds"] == 0
    assert data["lds"] == data["datamodels"]["lds"] == expected[0].lds
    code, said, _ = call(capsys, "evaluate", run.path, *named, "--compare")
    assert code == 0
    assert "difference of means" in said
    assert "class detection" in said
    plain = call(capsys, "evaluate", run.path, "--json")[1]
    assert "scores" not in plain


def test_the_command_refuses_scores_before_it_scores_anything(run, close, tmp_path, capsys):
    np.save(tmp_path / "turned.npy", close[0].T)
    np.save(tmp_path / "nan.npy", np.full_like(close[0], np.nan))
    np.save(tmp_path / "good.npy", close[0])
    (run.path / "evaluation.json").unlink(missing_ok=True)
    cases = [
        (["nameless.npy"], 2, "write it like trak=trak.npy"),
        (["=good.npy"], 2, "write it like trak=trak.npy"),
        (["a="], 2, "write it like trak=trak.npy"),
        ([f"a={tmp_path / 'gone.npy'}"], 2, "there is no file"),
        ([f"a={tmp_path / 'turned.npy'}"], 2, "scores.T"),
        ([f"a={tmp_path / 'good.npy'}"] * 2, 2, "given twice"),
        ([f"datamodels={tmp_path / 'good.npy'}"], 2, "the run's own"),
    ]
    for named, expected, what in cases:
        options = [word for each in named for word in ("--scores", each)]
        code, _, said = call(capsys, "evaluate", run.path, *options)
        assert code == expected, named
        assert what in " ".join(said.split())
    assert not (run.path / "evaluation.json").exists()
    code, _, said = call(capsys, "evaluate", run.path, "--scores", f"a={tmp_path / 'nan.npy'}", "--json")
    assert (code, "training example 0 for target 0 is nan" in said) == (2, True)


def test_datamodels_alone_are_not_enough(run, close):
    with pytest.raises(SpecError, match="hand in their run"):
        score(load_datamodels(run), {"close": close[0]})
