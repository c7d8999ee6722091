"""The guide's way from nothing to scored datamodels, command by command, with a worker killed on the way."""

import json
import subprocess

import pytest
from cluster_runs import COMMAND, processes_of, require_same, started, workers_of
from documentation.pages import blocks_of
from processes import wait_until

from dmpipeline.runs.store import Run
from dmpipeline.training.train import Way

pytest.importorskip("distributed")

STEPS = ["init", "plan", "run", "status", "verify", "fit", "evaluate"]


def said_by(*arguments):
    """Run a command as a user would; return what it prints as JSON."""
    command = [*COMMAND, *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_way_from_nothing_to_scored_datamodels_survives_a_killed_worker(tmp_path, figures):
    shown = [command for block in blocks_of("docs/how-to/runs.md") for command, _ in block.commands]
    assert [words[1] for words in shown[: len(STEPS)]] == STEPS
    folder = tmp_path / "myrun"
    said_by("init", folder, "--dataset", "digits", "--alpha", 0.5, "--models", 700, "--held-out", 20)
    assert said_by("plan", folder)["train"][str(folder)]["models"] == 900
    run = Run.open(folder)
    with started(*COMMAND, "run", str(folder), "--workers", "2") as process:
        wait_until(lambda: run.n_rows_done > 0)
        workers_of(process.pid)[0].kill()
        _, said = process.communicate()
        assert process.returncode == 0, said
        wait_until(lambda: not processes_of(process.pid))
    assert said_by("status", folder)["n_rows_done"] == 900
    assert said_by("verify", folder)["passed"]
    said_by("fit", folder)
    scores = said_by("evaluate", folder)
    whole = Run.create(tmp_path / "whole", run.spec)
    whole.train(way=Way(**run.provenance["ways"]["cpu"]))
    require_same(run, whole)
    figures.append(f"the guide's way with a killed worker, 900 perceptrons on digits: LDS {scores['lds']:.3f}")
    assert 0.55 < scores["lds"] < scores["lds_ceiling"]
