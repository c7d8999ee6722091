"""The script of the page: it is what its source builds, and its parts hold their own tests."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "dmpipeline" / "report" / "explorer"


def test_the_script_is_what_its_source_builds(tmp_path):
    if shutil.which("npm") is None or not (FOLDER / "node_modules").exists():
        pytest.skip("npm or the script's packages are not here; make explorer")
    before = (FOLDER.parent / "explorer.js").read_bytes()
    built = tmp_path / "explorer.js"
    build = json.loads((FOLDER / "package.json").read_text())["scripts"]["build"].replace("../explorer.js", str(built))
    subprocess.run(["npx", *build.split()], cwd=FOLDER, capture_output=True, check=True)
    assert built.read_bytes() == before


def test_the_parts_of_the_script_hold_their_own_tests():
    if shutil.which("node") is None or not (FOLDER / "node_modules").exists():
        pytest.skip("node or the script's packages are not here; make explorer")
    done = subprocess.run(
        ["node", "--test", str(ROOT / "tests" / "explorer")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert json.loads(json.dumps(re.findall(r"^# pass (\d+)", done.stdout, re.MULTILINE)))[0] != "0"
