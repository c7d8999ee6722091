import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import dmpipeline
from dmpipeline import Run, RunSpec, workflow
from dmpipeline.applications.evidence import find_evidence
from dmpipeline.cli.command import main
from dmpipeline.errors import RunError, SpecError
from dmpipeline.exporting.export import export_run
from dmpipeline.report.of_datamodels import report_datamodels
from dmpipeline.report.of_run import keep_answer, report_run

from .conftest import HOSTILE, TARGET


def facts_of(path):
    return json.loads(re.search(r'id="facts">(.*?)</script>', path.read_text(), re.DOTALL)[1])


def test_the_page_is_one_small_file_that_names_no_server(page, digits):
    text = page.read_text()
    assert page == digits.path / "report.html"
    assert page.stat().st_size < 1_500_000
    without_namespaces = text.replace("http://www.w3.org/", "")
    assert not re.search(r'(?:src|href)="(?!data:|#)|@import|https?://', without_namespaces.partition("<script>")[0])
    assert "default-src 'none'" in text


def test_scores_warnings_and_provenance_are_those_of_the_run(page, digits):
    facts, evaluation = facts_of(page), workflow.evaluate_run(digits)
    assert (
        f"LDS is {evaluation.lds:.3f} (95% interval {evaluation.lds_low:.3f} to {evaluation.lds_high:.3f})"
        in facts["summary"]
    )
    assert facts["lds"]["lds_ceiling"] == pytest.approx(evaluation.lds_ceiling)
    assert [heading["heading"] for heading in facts["tables"]] == ["How it was made", "The fit", "What it cost"]
    assert dict(facts["tables"][0]["rows"])["models to fit on"] == "500"
    assert [point["n_models"] for point in facts["curves"][0]["points"]] == [200, 500]
    assert [row[0] for row in facts["methods"]["rows"]] == ["datamodels", "noise"]
    assert facts["verification"]["verdict"] == "agrees"
    assert not facts["left_out"]


def test_retrained_sets_are_shown_at_the_target_whose_first_helpers_they_lack(page, digits):
    retrained = facts_of(page)["retrained"]
    full, without = retrained[str(TARGET)]
    assert (full["k"], full["kind"], without["k"], without["kind"], without["n"]) == (0, "full", 5, "helper", 4)
    assert without["low"] < without["mean"] < without["high"]
    assert without["mean"] < full["mean"]
    weight = find_evidence(digits).datamodels().weight
    removed = set(np.argsort(-weight[:, TARGET])[:5])
    others = {t for t in range(360) if set(np.argsort(-weight[:, t])[:5]) == removed}
    assert set(map(int, retrained)) == others


def test_answers_that_were_kept_are_called_old_once_the_run_is_another(wine, tmp_path):
    shutil.copytree(wine.path, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    keep_answer(run, "verification", dmpipeline.verify(run).as_dict())
    keep_answer(run, "scores", dmpipeline.score(run, {"noise": np.ones((run.dataset().n_train, 38))}).as_dict())
    facts = facts_of(report_run(run, workflow.evaluate_run(run), parts=[]))
    assert (facts["verification"]["old"], facts["methods"]["old"]) == ("", "")
    workflow.fit_run(run, validation=0.2)
    facts = facts_of(report_run(run, workflow.evaluate_run(run), parts=[]))
    assert facts["verification"]["old"] == ""
    assert facts["methods"]["old"].startswith("The run has changed since, when there were 120 models")
    (run.path / "scores.json").write_text("{}")
    with pytest.raises(RunError, match=r"scores\.json is damaged"):
        report_run(run, workflow.evaluate_run(run), parts=[])


def test_of_training_examples_the_page_says_so_and_has_no_pairs_of_test_examples(wine, tmp_path):
    shutil.copytree(wine.path, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    workflow.fit_run(run, targets="train")
    facts = facts_of(report_run(run, workflow.evaluate_run(run, "train"), "train"))
    assert facts["nouns"]["targets"] == "training row"
    assert facts["options"] == " --targets train"
    assert facts["leakage"] is None
    assert facts["duplicates"] is None


def test_of_several_runs_one_page_is_not_written_over_by_the_next(wine, tmp_path, capsys):
    for name in ("a", "b"):
        shutil.copytree(wine.path, tmp_path / "runs" / name)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path / "runs"), "-o", str(tmp_path / "page.html")])
    assert ended.value.code == 2
    assert "holds several; name one of them" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_what_users_wrote_is_data_and_never_markup(wine):
    path = report_run(wine, workflow.evaluate_run(wine))
    text = path.read_text()
    assert "</script>two" not in text
    assert "<b>one" not in text
    assert facts_of(path)["classes"] == HOSTILE


def test_the_same_run_gives_the_same_bytes(page, digits, tmp_path):
    again = report_run(digits, workflow.evaluate_run(digits), path=tmp_path / "again.html")
    assert again.read_bytes() == page.read_bytes()


def test_a_page_that_cannot_be_written_is_an_error_that_leaves_nothing(wine, tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(RunError, match=r"report\.html cannot be written .*choose another path"):
        report_run(wine, workflow.evaluate_run(wine), path=tmp_path / "report.html", parts=[])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_folder_holds_all_pictures_and_replaces_an_earlier_page_alone(wine, tmp_path):
    evaluation = workflow.evaluate_run(wine)
    first = report_run(wine, evaluation, path=tmp_path / "page", parts=[])
    assert sorted(path.name for path in (tmp_path / "page").iterdir()) == ["index.html", "numbers.js"]
    assert report_run(wine, evaluation, path=tmp_path / "page", parts=[]) == first
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    (tmp_path / "mine" / "index.html").write_text("a page of my own")
    with pytest.raises(SpecError, match="mine is not a page's folder"):
        report_run(wine, evaluation, path=tmp_path / "mine", parts=[])
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["index.html", "thesis.tex"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "page"]


def test_a_link_to_a_folder_is_followed_and_stays(wine, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    report_run(wine, workflow.evaluate_run(wine), path=tmp_path / "link", parts=[])
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "index.html").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "there"]


def test_parts_are_left_out_as_asked_and_said_to_be(wine, tmp_path):
    path = report_run(wine, workflow.evaluate_run(wine), path=tmp_path / "bare.html", parts=["map"])
    facts = facts_of(path)
    assert set(facts["maps"]) == {"targets", "train"}
    assert facts["clusters"] is None
    left = {row["part"]: row["next"] for row in facts["left_out"]}
    assert left["leakage"] == f"dmpipeline leakage {wine.path}"
    with pytest.raises(SpecError, match="'maps' is not a part of the page; choose from stability, support, map"):
        report_run(wine, workflow.evaluate_run(wine), path=tmp_path / "bad.html", parts=["maps"])


def test_a_regression_has_numbers_for_labels_and_nothing_that_flips(tmp_path):
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((80, 3)).astype(np.float32)
    labels = (inputs @ [1, 2, 3]).astype(np.float32)
    np.savez(
        tmp_path / "sums.npz",
        train_inputs=inputs[:60],
        train_labels=labels[:60],
        test_inputs=inputs[60:],
        test_labels=labels[60:],
    )
    recipe = {"name": "perceptron", "epochs": 2, "hidden": 4}
    spec = RunSpec(
        dataset=str(tmp_path / "sums.npz"), n_models=60, held_out={"n_subsets": 4, "n_retrainings": 2},
        recipe=recipe, outputs=["predictions", "squared_errors"],
    )  # fmt: skip
    run = Run.create(tmp_path / "run", spec)
    run.train()
    workflow.fit_run(run)
    facts = facts_of(report_run(run, workflow.evaluate_run(run)))
    assert facts["is_regression"]
    assert (facts["output"], facts["better"]) == ("prediction", None)
    assert "margin" not in dict(facts["words_used"])
    assert "support" not in facts["arrays"]
    assert facts["nouns"] == {"train": "training row", "targets": "test row"}


def test_a_release_has_a_page_of_its_weights_and_of_the_users_own_pictures(digits, tmp_path):
    export_run(digits, tmp_path / "export", digits.datamodels_path)
    evidence = find_evidence("digits/50pct", catalog=tmp_path / "export")
    path = report_datamodels(
        evidence, tmp_path / "page.html", columns=[TARGET, 3, *range(20, 60)], dataset=digits.dataset()
    )
    facts = facts_of(path)
    assert (facts["n_train"], facts["n_targets"]) == (1437, 42)
    assert facts["lds"] is None
    assert "was not read" in facts["summary"]
    assert facts["pictures"]["targets"]["count"] == 42
    assert facts["target_numbers"] == [TARGET, 3, *range(20, 60)]
    assert facts["is_margin"]
    with pytest.raises(SpecError, match="leakage is found out about runs; of weights alone choose from support"):
        report_datamodels(evidence, tmp_path / "no.html", parts=["leakage"])
    with pytest.raises(SpecError, match="name the dataset that they were fitted with"):
        report_datamodels(evidence, tmp_path / "no.html", dataset=np_digits(digits))
    assert not (tmp_path / "no.html").exists()


def np_digits(digits):
    from dataclasses import replace

    dataset = digits.dataset()
    return replace(dataset, train_inputs=dataset.train_inputs[:-1], train_labels=dataset.train_labels[:-1])


def test_the_command_writes_the_page_of_a_run_and_of_a_release(digits, tmp_path):
    def report(*words):
        done = subprocess.run(
            [sys.executable, "-m", "dmpipeline", "report", *words, "--json"],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, json.loads(done.stdout) if done.returncode == 0 else done.stderr

    code, said = report(str(digits.path), "-o", str(tmp_path / "a.html"), "--parts", "support")
    assert (code, said["report"], said["bytes"]) == (0, str(tmp_path / "a.html"), (tmp_path / "a.html").stat().st_size)
    export_run(digits, tmp_path / "export", digits.datamodels_path)
    release = ["digits/50pct", "--catalog", str(tmp_path / "export")]
    code, said = report(*release, "-o", str(tmp_path / "b.html"), "--only", "0:30", "--dataset", "digits")
    assert (code, said["n_targets"]) == (0, 30)
    assert report(*release)[0] == 2
    assert report(str(tmp_path / "nothing"))[0] == 1
