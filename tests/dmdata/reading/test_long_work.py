"""A function that takes long shows its stages where somebody is looking, unless the caller or a command takes them."""

import inspect
import re
import sys

from terminals import run_at_terminal

import dmpipeline

WORK = """
import sys, time, dmdata
from dmdata.reading.long_work import shows_count, shows_stages

@shows_count("inner", "parts")
def inner(progress=None):
    for done in range(3):
        time.sleep(0.1)
        if progress: progress(done + 1, 3)

@shows_stages({"first": "models", "second": "targets"})
def work(progress=None):
    inner()
    for done in range(14):
        time.sleep(0.2)
        if progress: progress("first", done + 1, 14)
    if progress: progress("second", 5, 5)
    return "seen" if progress else "alone"
"""


def at_terminal(program: str, **env: str) -> str:
    return run_at_terminal([sys.executable, "-c", WORK + program], TERM="xterm-256color", COLUMNS="120", **env)


def test_long_work_shows_its_stages_and_leaves_a_clean_terminal() -> None:
    written = at_terminal("print('then', work())")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    assert re.search(r"first +━+.* \d+ of 14 models", plain), written
    assert "inner" not in plain, "what a work does within is part of it"
    assert re.search(r"\x1b\[2K[^━]*then seen", written), written
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1, "the cursor is back"


def test_nothing_is_shown_of_work_that_is_short_off_taken_or_under_a_command() -> None:
    taken = """
def quiet(*_): pass
class Command:
    def phase(self, text): pass
    def advance(self, amount): pass
from dmdata import phases
inner()
work(progress=quiet)
with phases.listening(Command()): assert work() == "alone"
"""
    assert at_terminal(taken) == ""
    assert at_terminal("work()", DMDATA_PROGRESS="0") == ""


def test_work_in_a_notebook_leaves_a_line_a_stage() -> None:
    from .test_in_notebooks import outputs_of

    [shown] = outputs_of(WORK + "work()\n'done'")
    lines = shown[0].splitlines()
    assert re.fullmatch(r"first: 14 of 14 models, [\d.]+ a second, in \d\.\d s", lines[0]), shown
    assert re.match(r"second: 5 of 5 targets", lines[1]), shown
    assert shown[1:] == ["'done'"]


def test_every_public_function_that_reports_progress_shows_it() -> None:
    silent = []
    for name in dmpipeline.__all__:
        named = getattr(dmpipeline, name)
        its = [named]
        if inspect.isclass(named):
            its = [one for key, one in inspect.getmembers(named, callable) if not key.startswith("_")]
        for one in its:
            # what hands it on shows its parts
            if one is dmpipeline.verify or not (inspect.isfunction(one) or inspect.ismethod(one)):
                continue
            if "progress" in inspect.signature(one).parameters and not hasattr(one, "__wrapped__"):
                silent.append(one.__qualname__)
    assert silent == []
