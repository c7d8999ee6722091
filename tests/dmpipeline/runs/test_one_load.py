"""Whatever is done with a run, its dataset is read once."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from cluster_runs import write_letters
from opened_files import opened_files

from dmpipeline.checks.verification import replay, verify_run
from dmpipeline.cli.command import commands
from dmpipeline.cli.status import run_facts
from dmpipeline.exporting.export import export_run
from dmpipeline.runs.extension import extend
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec
from dmpipeline.workflow import curve_run, evaluate_run, fit_run


@pytest.fixture
def n_reads():
    """Count how often the dataset's file was opened since this was last called."""
    with opened_files() as paths:

        def count():
            n = sum(Path(path).name == "letters.npz" for path in paths)
            paths.clear()
            return n

        yield count


@pytest.fixture
def letters(tmp_path):
    return write_letters(tmp_path)


def test_each_operation_on_a_run_reads_its_dataset_once_or_not_at_all(tmp_path, letters, n_reads):
    held_out = {"n_subsets": 4, "n_retrainings": 2}
    spec = RunSpec(dataset=letters, recipe={"hidden": 4, "epochs": 1}, n_models=24, held_out=held_out, block_models=8)
    n_reads()
    run, found = Run.create(tmp_path / "run", spec), {}
    found["create"] = n_reads()
    run = Run.open(run.path)
    found["open"] = n_reads()
    run.train()
    found["train"] = n_reads()
    run_facts(run)
    found["status"] = n_reads()
    verify_run(run)
    found["verify"] = n_reads()
    replay(run, 3)
    found["replay"] = n_reads()
    fit_run(run, validation=0.25)
    found["fit"] = n_reads()
    fit_run(run, validation=0.25, prior="gradient")
    found["fit with a prior"] = n_reads()
    curve_run(run, [16, 24], prior="gradient", validation=0.25)
    found["curve"] = n_reads()
    evaluate_run(run)
    found["evaluate"] = n_reads()
    export_run(run, tmp_path / "release", run.datamodels_path)
    found["export"] = n_reads()
    extend(run, 28)
    found["extend"] = n_reads()
    nothing = {"open": 0, "status": 0, "evaluate": 0}
    assert found == dict.fromkeys(found, 1) | nothing


def test_a_command_reads_the_dataset_of_its_runs_once(tmp_path, letters, n_reads):
    def reads(*words):
        n_reads()
        assert CliRunner().invoke(commands, [str(word) for word in words]).exit_code == 0
        return n_reads()

    of = ("--dataset", letters, "--held-out", 2, "--retrainings", 2, "--set", "epochs=1")
    assert reads("init", tmp_path / "runs", *of, "--models", 4, "--alpha", 0.3, "--alpha", 0.5) == 1
    assert reads("run", tmp_path / "runs") == 1
    assert reads("run", tmp_path / "runs" / "50pct", "--models", 6, "--method", "loop") == 1
    assert reads("run", tmp_path / "runs" / "50pct", "--replay", 1) == 1
    assert reads("plan", tmp_path / "runs" / "50pct") == 1
