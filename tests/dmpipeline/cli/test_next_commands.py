"""Every command that is printed as the next one works: each is run as it stands, by a shell where quotes matter."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.datasets import load_iris

from dmdata.cli.command import commands as dmdata_commands
from dmpipeline.cli.command import commands as dmpipeline_commands
from dmpipeline.errors import VerificationError

WORDS = re.compile(r"next: (.*)")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder whose name no shell takes as it is, with iris in it, and both commands on the PATH."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("dmpipeline", "dmdata"):
        script = tools / name
        script.write_text(f"#!{sys.executable}\nfrom {name}.cli import main\nmain()\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]), prepend=":")
    folder = tmp_path / "it's my $HOME (new)"
    folder.mkdir()
    monkeypatch.chdir(folder)
    inputs, labels = load_iris(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    inputs, labels = inputs[order].astype(np.float32), labels[order]
    parts = {"train_inputs": inputs[:40], "train_labels": labels[:40]}
    parts |= {"test_inputs": inputs[40:52], "test_labels": labels[40:52]}
    np.savez("iris.npz", **parts)
    np.save("my masks.npy", np.random.default_rng(1).random((24, 40)) < 0.8)
    return folder


def shell(command):
    done = subprocess.run(["/bin/bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done


def commands_after(done):
    """Read the commands off standard error, and off the table of the demo."""
    found = []
    for text in WORDS.findall(done.stderr):
        found += re.split(r", (?=dm(?:pipeline|data) )", text.rstrip())
    return found


def in_process(command):
    """Do what a shell would, without the seconds that each process takes to begin."""
    name, *words = shlex.split(command)
    done = CliRunner().invoke({"dmpipeline": dmpipeline_commands, "dmdata": dmdata_commands}[name], words)
    assert done.exit_code == 0, f"{command}\n{done.output}{done.exception!r}"
    return done


def follow(command, run=in_process):
    """Run a command and whatever it prints as the next one, each once; return them in order."""
    waiting, ran = [command], []
    while waiting:
        command = waiting.pop(0)
        if command not in ran:
            ran.append(command)
            waiting += commands_after(run(command))
    return ran


def steps(ran):
    return [" ".join(command.split()[:2]) for command in ran]


INIT = "dmpipeline init 'my run' --dataset iris.npz --set hidden=8 --set epochs=40"


def test_a_shell_takes_what_is_printed_of_a_run_in_an_awkward_place(place):
    ran = follow(f"{INIT} --models 3 --held-out 0", shell)
    assert steps(ran) == ["dmpipeline init", "dmpipeline run", "dmpipeline verify"]
    shell("dmdata ls --catalog 'my run'")


def test_each_step_names_the_next(place):
    ran = follow(f"{INIT} --models 20 --held-out 4 --retrainings 2")
    assert steps(ran) == [f"dmpipeline {step}" for step in ("init", "run", "verify", "fit", "evaluate", "report")]
    assert (place / "my run" / "report.html").exists()
    assert steps(follow("dmpipeline curve 'my run' --counts 20"))[1:] == ["dmpipeline report"]
    assert steps(follow("dmpipeline export 'my run' 'an export'"))[1:] == ["dmdata ls"]


def test_runs_of_several_alphas_side_by_side(place):
    ran = follow(f"{INIT} --models 20 --held-out 4 --retrainings 2 --alpha 0.3 --alpha 0.6")
    assert steps(ran)[:4] == [f"dmpipeline {step}" for step in ("init", "run", "verify", "fit")]
    for alpha in ("30pct", "60pct"):
        assert (place / "my run" / alpha / "report.html").exists()
        assert f"dmpipeline evaluate '{Path('my run') / alpha}'" in ran
    shown = json.loads(in_process("dmpipeline evaluate 'my run' --json -q").stdout)
    assert [Path(run["run"]).name for run in shown["runs"]] == ["30pct", "60pct"]
    assert all("lds" in run for run in shown["runs"])
    text = in_process("dmpipeline verify 'my run' -q").stdout
    assert "30pct" in text
    assert "60pct" in text


def test_what_is_wrong_in_one_of_several_runs_keeps_verify_from_none(place):
    in_process(f"{INIT} --models 4 --held-out 0 --alpha 0.3 --alpha 0.6")
    in_process("dmpipeline run 'my run/60pct'")
    done = CliRunner().invoke(dmpipeline_commands, ["verify", "my run", "--json"])
    assert isinstance(done.exception, VerificationError)
    assert [run["passed"] for run in json.loads(done.stdout)["runs"]] == [False, True]
    (remedy,) = re.findall("`(.*?)`", str(done.exception))
    in_process(remedy)
    in_process("dmpipeline verify 'my run'")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (
            "--masks 'my masks.npy' --models 20 --held-out 4 --retrainings 2",
            ["run", "verify", "fit", "evaluate", "report"],
        ),
        ("--models 0 --held-out 4 --retrainings 2", ["run", "verify"]),
        ("--models 3 --held-out 4", ["run", "verify"]),
        ("--models 6 --held-out 0", ["run", "verify", "fit", "ls"]),
        ("--models 20 --held-out 2", ["run", "verify", "fit", "ls"]),
        ("--models 20 --held-out 3 --retrainings 1", ["run", "verify", "fit", "evaluate", "report"]),
        ("--models 20 --held-out 3 --retrainings 1 --outputs logits", ["run", "verify"]),
        ("--models 20 --held-out 3 --outputs predicted_labels", ["run", "verify", "fit", "evaluate", "report"]),
        (
            "--models 20 --held-out 3 --masks bernoulli --outputs test_margins",
            ["run", "verify", "fit", "evaluate", "report"],
        ),
    ],
)
def test_runs_that_lack_something_are_led_no_further_than_they_go(place, options, wanted):
    assert [step.split()[1] for step in steps(follow(f"{INIT} {options}"))] == ["init", *wanted]
