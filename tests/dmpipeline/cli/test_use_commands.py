"""`explain`, `counterfactual`, `support`, `embed --remove`: what people and scripts see; what a release costs."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from planted_run import planted_run, planted_weight
from small_release import Pt, pt, publish

import dmdata
from dmpipeline import Datamodels, embed, what_removal_does
from dmpipeline.cli.command import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return planted_run(tmp_path_factory.mktemp("planted"))


def call(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def data(capsys, *arguments):
    code, out, err = call(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_explain_lists_helpers_and_harmers_with_labels_features_and_stability(run, capsys):
    truth = planted_weight()[:, 4]
    found = data(capsys, "explain", run.path, 4, "--top", 3)
    assert found["target"] == 4
    assert [row["index"] for row in found["helpers"]] == np.argsort(-truth)[:3].tolist()
    assert [row["index"] for row in found["harmers"]] == np.argsort(truth)[:3].tolist()
    assert {row["same_sign"] for row in found["helpers"]} == {1.0}
    code, out, err = call(capsys, "explain", run.path, 4, "--top", 3)
    assert code == 0
    own, *lines = out.splitlines()[1:]
    assert own.split()[0] == "4"  # the target itself, and its row
    assert "column 0: " in own
    assert lines[1].split()[0] == str(found["helpers"][0]["index"])
    assert "100%" in lines[1]
    assert "column 0: " in lines[1].rpartition("to")[2]  # the first columns of the example's table
    assert "--remove-top 3" in err


def test_explain_prints_csv_that_reads_back(run, capsys):
    code, out, _ = call(capsys, "explain", run.path, 4, "--top", 3, "--csv")
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    want = data(capsys, "explain", run.path, 4, "--top", 3)
    assert [int(row["index"]) for row in rows] == [row["index"] for row in want["helpers"] + want["harmers"]]


def test_explain_tells_which_targets_lean_on_an_example(run, capsys):
    found = data(capsys, "explain", run.path, "--train-example", 5, "--top", 12)
    truth = planted_weight()[5]
    assert {t for t in range(12) if truth[t] > 0.3} <= {row["index"] for row in found["helpers"]}
    assert found["train_example"] == 5


def test_counterfactual_predicts_and_measures(run, capsys):
    truth = planted_weight()[:, 4]
    first = np.argsort(-truth)[:2].tolist()
    found = data(capsys, "counterfactual", run.path, 4, "--remove-top", 2, "--retrain", 10)
    assert found["target"] == 4
    assert found["removed"] == first
    assert found["predicted_change"] == pytest.approx(-truth[first].sum(), abs=0.15)
    assert found["measured_low"] < found["measured_change"] < found["measured_high"]
    assert found["measured_change"] == pytest.approx(-truth[first].sum(), abs=0.4)
    assert found["basis"] == "certified"
    by_hand = data(capsys, "counterfactual", run.path, 4, "--remove", ",".join(map(str, first)))
    assert by_hand["predicted_change"] == pytest.approx(found["predicted_change"])
    assert (by_hand["measured_change"], by_hand["basis"]) == (None, "estimated")
    code, out, err = call(capsys, "counterfactual", run.path, 4, "--remove", "1:4")
    assert (code, "estimated" in out, "--retrain" in err) == (0, True, True)


def test_counterfactual_says_what_is_removed_and_where_what_is_predicted_is_not_what_happens(run, capsys, monkeypatch):
    from dmpipeline.applications.counterfactuals import Counterfactual

    asked = ("counterfactual", run.path, 4, "--remove", "7,3", "--retrain", 10)
    code, _, err = call(capsys, *asked)
    assert (code, "removed: 3, 7" in err, "next: dmpipeline support" in err) == (0, True, True)
    known = {"target": 4, "removed": (3,), "added": (), "predicted_before": 0.0, "predicted_after": -1.0}
    known |= {"predicted_change": -1.0, "linear_change": -1.0, "measured_change": -3.0, "n_retrainings": 9}
    within, outside = ({"measured_low": -4.0, "measured_high": high} for high in (-0.5, -2.0))
    assert not Counterfactual(**known, **within).is_far_off
    assert Counterfactual(**known, **outside).is_far_off
    assert not Counterfactual(**known).is_far_off
    monkeypatch.setattr(Counterfactual, "is_far_off", True)
    assert "lies outside the interval of the measured one" in call(capsys, *asked)[2]


def test_a_target_without_weights_is_called_that(tmp_path, capsys):
    run = planted_run(tmp_path)
    whole = Datamodels.load(run.datamodels_path)
    weight = whole.weight.copy()
    weight[:, 4] = 0
    dataclasses.replace(whole, weight=weight, certificate=None).save(run.datamodels_path)
    assert "no training example has a weight" in call(capsys, "explain", run.path, 4)[2]
    code, out, err = call(capsys, "evaluate", run.path)
    assert code == 0, err
    assert "1 without weights, whose LDS counts as 0" in out
    assert data(capsys, "evaluate", run.path)["n_without_weights"] == 1


def test_support_prints_sizes_and_which_are_certified(run, capsys):
    found = data(capsys, "support", run.path, 0, 1, "--certify", 10)
    assert [(row["target"], row["size"], row["certified"]) for row in found["targets"]] == [
        (0, 2, True),
        (1, None, None),
    ]
    assert len(data(capsys, "support", run.path)["targets"]) == 12
    code, out, err = call(capsys, "support", run.path, 0, 1)
    assert code == 0
    assert "none found" in out
    assert "nothing is certified" in err


def test_embed_tells_what_removing_the_ends_of_directions_does_as_the_function_does(run, capsys):
    asked = ("embed", run.path, "--components", 3, "--remove", 2, "--remove", 0, "--k", 5)
    found = data(capsys, *asked, "--retrain", 4)
    want = what_removal_does(embed(run, n_components=3), [2, 0], k=5, n_targets=6, n_retrainings=4)
    assert found["removals"] == want.as_dict()["removals"]
    assert (found["k"], found["n_retrainings"]) == (5, 4)
    assert len(found["directions"]) == 3
    assert all(row["low"] < row["measured_change"] < row["high"] for row in found["removals"])
    alone = data(capsys, *asked)["removals"]
    assert [row["predicted_change"] for row in alone] == [row["predicted_change"] for row in found["removals"]]
    assert {row["measured_change"] for row in alone} == {None}
    assert "removals" not in data(capsys, "embed", run.path, "--components", 3)
    code, out, err = call(capsys, *asked)
    assert (code, "certified" in out, out.count("estimated"), "--retrain" in err) == (0, False, 8, True)
    code, out, err = call(capsys, *asked, "--retrain", 4)
    first = want[0]
    line = next(line for line in out.splitlines() if "certified by 4 retrainings of each set" in line)
    assert line.split()[:5] == [
        "2",
        "positive",
        "positive",
        f"{first.predicted_change:+.3f}",
        f"{first.measured_change:+.3f}",
    ]
    assert f"{first.low:+.3f} to {first.high:+.3f}" in line
    assert (code, "--retrain" in err) == (0, False)


def test_what_embed_cannot_remove_is_refused_before_a_map_is_drawn(run, capsys, tmp_path):
    picture = tmp_path / "map.svg"
    for options, words in (
        (("--remove", 10), "there is no direction 10; choose 0 to 9"),
        (("--remove", 0, "--k", 31), "k is 31; choose 1 to 30"),
        (("--remove", 0, "--retrain", 1), "1 retrainings have no interval"),
        (("--remove", 0, "--only", "3"), "1 target has no two ends"),
        (("--remove", 0, "--only", "3,3"), "target 3 is asked for twice"),
        (("--retrain", 5), "--remove DIRECTION"),
        (("--k", 5), "--remove DIRECTION"),
    ):
        code, out, err = call(capsys, "embed", run.path, "--map", picture, *options)
        assert (code, out) == (2, ""), options
        assert words in err
    assert not picture.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("explain", "RUN"), 2, "TARGET or --train-example"),
        (("explain", "RUN", 3, "--train-example", 3), 2, "TARGET or --train-example"),
        (("explain", "RUN", 300), 2, "no test example 300; choose 0 to 11"),
        (("counterfactual", "RUN", 3), 2, "say what to change"),
        (("counterfactual", "RUN", 3, "--remove-top", 1, "--remove", "2"), 2, "not both"),
        (("counterfactual", "RUN", 3, "--remove-top", 50), 2, "choose a smaller --remove-top"),
        (("counterfactual", "RUN", 3, "--remove", "x"), 2, "neither a number nor a range"),
        (("support", "RUN", 99), 2, "no test example 99"),
        (("explain", "RUN/..", 3), 1, "is not one run, but holds 1"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_what_to_do(run, capsys, arguments, code, words):
    named = [str(argument).replace("RUN", str(run.path)) for argument in arguments]
    found, out, err = call(capsys, *named)
    assert (found, out) == (code, "")
    assert words in err
    assert "Traceback" not in err


def test_a_release_is_asked_once_its_price_is_agreed_to(run, s3, capsys, tmp_path):
    dm = Datamodels.load(run.datamodels_path)
    members = {"weight": dm.weight, "bias": dm.bias, "lam": dm.lam}
    release = {"planted/50pct/test_datamodels": Pt(pt(members), members)}
    catalog = publish(s3, release, tmp_path)
    asked = ("planted/50pct", 4, "--catalog", catalog)
    code, _, err = call(capsys, "explain", *asked)
    assert code == 6
    assert "add -y to agree" in err
    assert call(capsys, "explain", *asked, "--dry-run")[0] == 0
    assert call(capsys, "explain", *asked, "-y", "--max-cost", "0.0000000001")[0] == 8
    assert s3.n_object_bytes == 0
    assert dmdata.spend().n_requests == 0
    found = data(capsys, "explain", *asked, "-y")
    assert [row["index"] for row in found["helpers"]] == [
        row["index"] for row in data(capsys, "explain", run.path, 4)["helpers"]
    ]
    assert {row["same_sign"] for row in found["helpers"]} == {None}
    assert 0 < s3.n_object_bytes <= dmdata.spend().n_bytes
    change = data(capsys, "counterfactual", *asked, "--remove-top", 2, "-y")
    assert change["predicted_change"] == pytest.approx(-np.sort(dm.weight[:, 4])[::-1][:2].sum(), rel=1e-5)
    served = s3.n_object_bytes
    assert call(capsys, "counterfactual", *asked, "--remove-top", 2, "-y", "--retrain", 5)[0] == 2
    assert call(capsys, "counterfactual", *asked, "--remove-top", 2, "-y", "--with", run.path)[0] == 2
    assert s3.n_object_bytes == served
    embedding = ("embed", "planted/50pct", "--catalog", catalog, "--only", "0:10", "--components", 2, "--remove", 1)
    assert call(capsys, *embedding, "-y", "--retrain", 5)[0] == 2
    assert call(capsys, *embedding, "-y", "--k", 31)[0] == 2
    assert call(capsys, *embedding, "-y", "--remove", 9, "--components", 10, "--only", "0:5")[0] == 2
    assert s3.n_object_bytes == served
    removals = data(capsys, *embedding, "-y")["removals"]
    chosen = dm.weight[removals[0]["removed"]][:, removals[0]["of_targets"]]
    assert removals[0]["predicted_change"] == pytest.approx(-chosen.sum(0).mean(), rel=1e-4)
    sizes = data(capsys, "support", "planted/50pct", 0, "--catalog", catalog, "-y")
    assert [row["size"] for row in sizes["targets"]] == [2]


@pytest.mark.parametrize("question", [("embed",), ("explain", 4), ("explain", "--train-example", 5)])
def test_what_a_release_costs_is_what_was_announced_wherever_the_bytes_go(run, s3, capsys, tmp_path, question):
    members = {name: tensor.numpy() for name, tensor in torch.load(run.datamodels_path).items()}
    assert {"gap", "fitted_masks"} <= set(members)
    release = {"planted/50pct/test_datamodels": Pt(run.datamodels_path.read_bytes(), members)}
    name, *rest = question
    asked = (name, "planted/50pct", *rest, "--catalog", publish(s3, release, tmp_path), "--to", "same-region")
    priced = data(capsys, *asked, "--dry-run")
    data(capsys, *asked, "-y")
    spent = dmdata.spend()
    assert spent.n_bytes <= priced["bytes"]
    # the ledger rounds each read up
    assert 0 < spent.usd <= priced["usd"] * 1.00001
    assert priced["usd"] <= 2 * spent.usd
