"""However a command ends, a person reads one line and never a key; tracebacks are for --debug."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable

import click
import pytest
from terminals import run_at_terminal

from dmdata.cli.console import talk_options
from dmdata.cli.ending import run, without_keys
from dmdata.errors import BudgetError

SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"
SIGNED = f"https://bucket/x.npy?X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F2026&X-Amz-Signature={'f' * 64}&partNumber=1"


class PanicException(BaseException):
    """No Exception, as a panic in Rust."""


def ended(capsys: pytest.CaptureFixture[str], fail: Callable[[], object], *words: str) -> tuple[object, str]:
    """End a command by what a function raises: its exit code and standard error."""

    @click.command("fail")
    @talk_options
    def command(talk: object) -> None:
        fail()

    with pytest.raises(SystemExit) as caught:
        run(command, list(words), name="dmdata")
    out, err = capsys.readouterr()
    assert not out
    return caught.value.code, err


def raising(error: BaseException) -> Callable[[], object]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (BudgetError("too dear"), 8, "dmdata: too dear"),
        (KeyError("shape"), 1, "dmdata: KeyError: 'shape'; this is a fault of dmdata: run again with --debug and "),
        (RuntimeError("two\nlines\n"), 1, "dmdata: RuntimeError: two lines; this is a fault of dmdata"),
        (AssertionError(), 1, "dmdata: AssertionError; this is a fault of dmdata"),
        (RecursionError("deep"), 1, "dmdata: RecursionError: deep; this is a fault"),
        (PanicException("panicked at src/lib.rs"), 1, "dmdata: PanicException: panicked at src/lib.rs; this is a"),
        (OSError(28, "No space left on device", "x.part"), 1, "dmdata: [Errno 28] No space left on device: 'x.part'"),
        (MemoryError("Unable to allocate 6 TiB"), 1, "dmdata: there is not enough memory (Unable to allocate 6 TiB)"),
        (ValueError(SIGNED), 1, "dmdata: ValueError: https://bucket/x.npy?X-Amz-Credential=***&X-Amz-Signature=***&"),
    ],
)
def test_whatever_ends_a_command_is_one_line_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    exit_code, err = ended(capsys, raising(error))
    assert exit_code == code
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_a_traceback_is_for_debugging_alone_and_holds_no_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    error = RuntimeError(f"signing with {SECRET} for https://me:password@host/x failed")
    for words in ([], ["--debug"]):
        code, err = ended(capsys, raising(error), *words)
        assert code == 1
        assert ("Traceback" in err) == bool(words)
        assert "signing with *** for https://***@host/x failed" in err
        assert SECRET not in err
        assert "password" not in err


def test_what_a_library_logs_as_failed_is_one_line_without_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    program = f"""
import logging, threading, click
from dmdata.cli.console import talk_options
from dmdata.cli.ending import run

class Leaky:
    def __del__(self):
        raise ValueError("while it was cleaned up")

@click.command("work")
@talk_options
def command(talk):
    try:
        raise ValueError("aws_secret_access_key={SECRET}")
    except ValueError:
        logging.getLogger("library").exception("a task failed")
    def fail():
        raise KeyError("in a thread")
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    Leaky()
    print("done")

run(command, None, name="dmdata")
"""
    for words in ([], ["--debug"]):
        done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, env=os.environ)
        assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
        if words:
            assert done.stderr.count("Traceback") == 3
        else:
            assert done.stderr == (
                "library: a task failed (ValueError: aws_secret_access_key=***)\nwarning: KeyError: 'in a thread'\n"
            )


@pytest.mark.parametrize(
    "text",
    [
        "the bucket is s3://release/x.npy?versionId=3 and costs $0.08",
        "https://host:9000/bucket/key=value.npy",
        "requester pays: the design: signatures differ",
    ],
)
def test_what_is_no_key_is_left_as_it_is(text: str) -> None:
    assert without_keys(text) == text


WORKING = """
import time, click
from dmdata import phases
from dmdata.cli.console import talk_options
from dmdata.cli.ending import run

@click.command("work")
@click.option("--short", is_flag=True)
@talk_options
def command(talk, short):
    if short:
        talk.print_data({"done": 1})
        return
    time.sleep(1.3)
    with talk.counting("training", "models") as progress:
        phases.phase("compiling")
        time.sleep(1.3)
        progress(0, 40)
        phases.phase("first block of 2")
        share = phases.Share(phases.heard_by())
        for _ in range(12):
            time.sleep(0.3)
            share.add(0.5)
        progress(20, 40)
        phases.phase("")
        progress(40, 40)
    talk.print_data({"done": 40})

run(command, None, name="dmdata")
"""


def test_without_a_terminal_lines_say_what_is_done_at_which_rate_and_data_stay_data() -> None:
    env = os.environ | {"DMDATA_PROGRESS_SECONDS": "1"}
    done = subprocess.run([sys.executable, "-c", WORKING, "--json"], capture_output=True, text=True, env=env)
    assert json.loads(done.stdout) == {"done": 40}
    lines = done.stderr.splitlines()
    assert re.match(r"dmdata: starting \(\d+\.\d s\)", lines[0])
    assert any(re.match(r"training, compiling: \d+\.\d", line) for line in lines), lines
    rates = [line for line in lines if re.match(r"training, first block of 2: \d of 40 models, \d.* left$", line)]
    assert rates, lines
    assert re.fullmatch(r"training: 40 of 40 models, .* in \d\.\d s", lines[-1])


@pytest.mark.parametrize("words", [["-q"], ["--short"]])
def test_quiet_and_short_commands_say_nothing_of_what_they_do(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", WORKING, *words], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0
    assert done.stderr == ""


def test_at_a_terminal_the_phase_is_shown_and_then_a_bar_with_a_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", run_at_terminal([sys.executable, "-c", WORKING]))
    states = [line.strip() for line in re.split(r"[\r\n]+", plain)]
    assert any("dmdata: starting" in state for state in states), states
    assert any(state.startswith("training, compiling") for state in states), states
    assert any(re.match(r"training, first block of 2 .* of 40 models \d\.\d a second", state) for state in states)
    assert "training, first block" not in states[-1]
