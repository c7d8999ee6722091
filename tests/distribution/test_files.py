"""Files stay short and are named for what they do; contracts in pyproject.toml hold which may import which."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [path for package in ("dmdata", "dmpipeline") for path in sorted((ROOT / package).rglob("*.py"))]


def test_no_file_is_named_for_nothing() -> None:
    assert not [path for path in FILES if path.stem in {"utils", "util", "helpers", "common", "types", "misc"}]


def test_no_file_is_longer_than_600_lines() -> None:
    assert not {str(path): n for path in FILES if (n := len(path.read_text().splitlines())) > 600}


def test_no_folder_has_more_than_16_files() -> None:
    folders = {path.parent for path in FILES}
    assert not {str(folder): n for folder in folders if (n := len(list(folder.glob("*.py")))) > 16}


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs the pipeline extra")
def test_a_former_path_is_the_same_module_and_takes_no_name_of_the_face() -> None:
    program = (
        "from dmpipeline.store import Run; from dmpipeline.readings import find_space\n"
        "from dmpipeline.attribution import gradient_scores; from dmpipeline.moments import Moments\n"
        "import dmpipeline, dmdata\n"
        "assert Run is dmpipeline.Run and Moments is dmpipeline.Moments\n"
        "try: import dmdata.mirror\n"
        "except ModuleNotFoundError: pass\n"
        "print(type(dmdata.mirror).__name__, type(dmpipeline.evaluate).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("function function\n", "")


def test_every_file_of_both_packages_is_in_the_contracts() -> None:
    contracts = (ROOT / "pyproject.toml").read_text().partition("[tool.importlinter]")[2]
    listed = set(re.findall(r'"(\w+)"', contracts))
    assert {path.stem for path in FILES} - {"__init__"} <= listed


def test_names_of_modules_in_docstrings_and_messages_exist() -> None:
    named = set()
    for path in FILES:
        named |= set(re.findall(r"`(dm(?:data|pipeline)(?:\.\w+)+)`", path.read_text()))
    missing = []
    for name in sorted(named):
        package, *parts = name.split(".")
        place: Path | None = ROOT / package
        for n, part in enumerate(parts):
            if (place / part).is_dir():
                place = place / part
            elif (place / f"{part}.py").is_file():
                text = (place / f"{part}.py").read_text()
                if parts[n + 1 :] and not re.search(
                    rf"^\s*(?:def|class|async def)? ?{parts[n + 1]}\b", text, re.MULTILINE
                ):
                    missing.append(name)
                break
            else:
                if not re.search(rf'"{part}"', (place / "__init__.py").read_text()):
                    missing.append(name)
                break
    assert not missing


def test_what_the_slower_tier_lists_exists() -> None:
    lines = (ROOT / "tests" / "slower-tier.txt").read_text().splitlines()
    for file, _, test in (line.partition("::") for line in lines if line and not line.startswith("#")):
        function = test.partition("[")[0]
        assert f"def {function.rpartition('::')[2]}" in (ROOT / file).read_text(), f"{file}::{function} is not there"
