"""What long calls and commands leave in a notebook's cell: a clean line or a few, and never a question."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from servers.loopback import LoopbackS3
from small_release import publish

pytest.importorskip("nbclient", reason="nbclient executes the notebooks of the documentation; make install")
pytest.importorskip("ipykernel")

NAME = "toy/50pct/test_margins"
VALUES = np.zeros((64, 1 << 15), np.float32)
"""8 MiB: about four seconds of the slow server."""

# in a process of its own: the client runs an event loop, and warns of what is not ours
EXECUTE = """
import json, sys, nbformat
from nbclient import NotebookClient
cells = [nbformat.v4.new_code_cell(cell) for cell in json.load(sys.stdin)]
notebook = nbformat.v4.new_notebook(cells=cells)
NotebookClient(notebook, kernel_name="python3", timeout=100).execute()
json.dump([cell.outputs for cell in notebook.cells], sys.stdout)
"""


def outputs_of(*cells: str) -> list[list[str]]:
    """Execute cells; return the texts that each one shows."""
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE], input=json.dumps(cells), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    return [[each.get("text") or each["data"]["text/plain"] for each in outputs] for outputs in shown]


@pytest.fixture
def slow(s3: LoopbackS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMDATA_CATALOG", publish(s3, {NAME: VALUES}, tmp_path))
    monkeypatch.chdir(tmp_path)
    s3.bytes_per_second = 1.2e6


@pytest.mark.usefixtures("slow")
def test_long_calls_leave_one_line_and_commands_plain_lines() -> None:
    dmdata = f"{sys.executable} -m dmdata"
    read, mirrored, command = outputs_of(
        f"import dmdata; rows = dmdata.open({NAME!r})[...]",
        f"copy = dmdata.mirror({NAME!r}, 'copy.zarr')",
        f"!{dmdata} mirror {NAME} other.zarr -y",
    )
    for [line] in (read, mirrored):
        assert re.fullmatch(rf"{NAME}: .* MiB of .* MiB, \$0\.\d+ of \$0\.\d+, in .* s", line), line
    text = "".join(command)
    assert not re.findall(r"\x1b\[\d*[A-KJhl?]|\r(?!\n)|━", text), "no bar is drawn over itself"
    # a busy machine spends some of the seconds before the first byte
    assert 1 <= len(re.findall(rf"^{NAME}: [\d.]+/8\.0 MiB", text, re.MULTILINE)) <= 5, text


@pytest.mark.usefixtures("slow")
def test_a_command_in_a_cell_does_not_wait_for_an_answer_that_nobody_can_give() -> None:
    [said] = outputs_of(f"!{sys.executable} -m dmdata mirror {NAME} other.zarr")
    assert "add -y to agree" in "".join(said)
