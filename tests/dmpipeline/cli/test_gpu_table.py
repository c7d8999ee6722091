"""The table of a GPU is rehearsed where there is none, and a part of it that breaks costs its own rows alone."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

from dmpipeline.checks.verification import TOLERANCE

ROOT = Path(__file__).parents[3]
BENCHMARKS = ROOT / "benchmarks"

PARTS = """
import os, time
from typing import NamedTuple

class Row(NamedTuple):
    what: str
    figure: str = ""
    bar: str = ""
    met: str = ""
    note: str = ""

class Size(NamedTuple):
    device: str
    is_full: bool

def good(size):
    print("a line of somebody else's")
    yield Row("one", "1 s", note=size.device)
    yield Row("two", "2 s")

def raising(size):
    yield Row("before", "1 s")
    raise ValueError("no room\\nfor it")

def dying(size):
    os._exit(3)
    yield

def hanging(size):
    yield Row("begun", "1 s")
    time.sleep(600)

def forgetful(size):
    yield from ()

def last(size):
    yield Row("the last", str(os.getpid()))

PARTS = {part.__name__: part for part in (good, raising, dying, hanging, forgetful, last)}
"""


def loaded(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def table_module():
    return loaded(BENCHMARKS / "gpu.py", "gpu_as_it_is")


@pytest.fixture
def broken(tmp_path):
    """The table with parts that break in every way."""
    folder = tmp_path / "checkout" / "benchmarks"
    folder.mkdir(parents=True)
    shutil.copy(BENCHMARKS / "gpu.py", folder)
    (folder / "gpu_parts.py").write_text(PARTS)
    module = loaded(folder / "gpu.py", "gpu_broken")
    module.PARTS = {
        "good": (60, ("one", "two")),
        "raising": (60, ("before", "after", "later")),
        "dying": (60, ("never",)),
        "hanging": (3, ("begun", "not ended")),
        "forgetful": (60, ("forgotten",)),
        "last": (60, ("the last",)),
    }
    return module


def filled(module, seconds=60.0, is_full=True):
    table = module.Table()
    module.run_all(
        table, list(module.PARTS), dict(os.environ), time.monotonic() + seconds, device="cpu", is_full=is_full
    )
    return {row["what"]: row for row in table.rows}


def test_a_part_that_fails_dies_or_hangs_costs_its_own_rows_which_say_why(broken, capsys):
    rows = filled(broken)
    assert list(rows) == [what for _, owed in broken.PARTS.values() for what in owed]
    failed = {what: row["note"] for what, row in rows.items() if row["met"] == "failed"}
    assert failed == {
        "after": "ValueError: no room for it",
        "later": "as above",
        "never": "its process ended with 3: no reason given",
        "not ended": "stopped after 3 s",
        "forgotten": "the part ended without it",
    }
    assert rows["one"]["note"] == "cpu"
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["what", "figure", "bar", "met", "note"]
    assert len(printed) == 1 + len(rows)
    with pytest.raises(ProcessLookupError):  # nothing is left running
        os.kill(int(rows["the last"]["figure"]), 0)


def test_parts_for_which_no_time_is_left_are_in_the_table(broken):
    rows = filled(broken, seconds=2.0)
    assert len(rows) == sum(len(owed) for _, owed in broken.PARTS.values())
    assert {row["met"] for row in rows.values()} == {"failed"}
    assert rows["one"]["note"] == "no time was left for it"


def test_tests_that_cannot_be_run_are_a_row_that_says_why(table_module, monkeypatch):
    monkeypatch.setattr(
        table_module, "ROOT", Path(__file__).parent
    )  # where there is no tests/dmpipeline/cli/test_gpu.py
    table = table_module.Table()
    table_module.run_tests(table, dict(os.environ), 60, is_rehearsed=True)
    (row,) = table.rows
    assert (row["what"], row["met"]) == ("tests marked gpu", "failed")
    assert "tests/dmpipeline/cli/test_gpu.py" in row["note"]


def test_the_whole_table_is_rehearsed_without_a_gpu(table_module, tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--rehearse", "--json", str(tmp_path / "table.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["what"]: row for row in json.loads((tmp_path / "table.json").read_text())["rows"]}
    assert set(rows) == {what for _, owed in table_module.PARTS.values() for what in owed}
    assert rows["tests marked gpu"]["met"] == "yes"
    assert int(rows["tests marked gpu"]["figure"].split()[0]) >= 25
    assert all(row["met"] == "yes" for what, row in rows.items() if what.startswith(("equal to", "same to")))
    assert rows["its accuracy, loop"]["met"] == "yes"
    assert rows["X'X by int8 products, counts that differ"]["figure"] == "0"
    for what in ("GPU", "ResNet-9, a CUDA graph a step", "peak memory, one model by loop", "fit, device"):
        assert rows[what]["met"] == "needs CUDA"


def test_the_tolerance_is_that_of_a_replay():
    told = re.search(r"^TOLERANCE = ([\d.]+)", (BENCHMARKS / "gpu_parts.py").read_text(), re.MULTILINE)
    assert float(told.group(1)) == TOLERANCE


def test_what_is_taken_there_is_all_that_the_package_needs_but_what_is_expected_there(table_module):
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    needed = {re.split(r"[^A-Za-z0-9._-]", text)[0].lower() for text in about}
    modules = {{"pyyaml": "yaml"}.get(name, name.replace("-", "_")) for name in needed} - set(
        table_module.EXPECTED_HERE
    )
    assert modules <= set(table_module.FROM_WHEELS)


def wheel(folder, tag="py3-none-any"):
    """A wheel with one module of a name that nobody has."""
    folder.mkdir(exist_ok=True)
    path = folder / f"taken_along-1.0-{tag}.whl"
    about = "Metadata-Version: 2.1\nName: taken-along\nVersion: 1.0\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("taken_along.py", "answer = 42\n")
        archive.writestr("taken_along-1.0.dist-info/METADATA", about)
        archive.writestr("taken_along-1.0.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr("taken_along-1.0.dist-info/RECORD", "")
    return path


@pytest.mark.parametrize("has_pip", [True, False])
def test_wheels_are_unpacked_without_network_by_pip_or_without_it(table_module, tmp_path, monkeypatch, has_pip):
    if not has_pip:
        monkeypatch.setattr(table_module.importlib.util, "find_spec", lambda _: None)
    elif importlib.util.find_spec("pip") is None:
        pytest.skip("no pip here")
    wheel(tmp_path / "wheels")
    table_module.unpack(tmp_path / "wheels", tmp_path / "site")
    assert (tmp_path / "site" / "taken_along.py").read_text() == "answer = 42\n"
    with pytest.raises(FileNotFoundError, match="make gpu-wheels"):
        table_module.unpack(tmp_path / "nowhere", tmp_path / "other")
    wheel(tmp_path / "wrong", tag="cp27-none-any")
    with pytest.raises(RuntimeError):
        table_module.unpack(tmp_path / "wrong", tmp_path / "other")
