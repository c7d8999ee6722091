"""A read from Python that takes longer than two seconds is shown where somebody is looking, and nowhere else."""

import io
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from servers.loopback import LoopbackS3
from small_release import publish
from terminals import run_at_terminal

from dmdata.reading.one_line import Bytes, Dollars, OneLine, Speed

NAME = "toy/50pct/test_margins"
VALUES = np.zeros((64, 1 << 15), np.float32)
"""8 MiB: two ranges of 4 MiB."""


@pytest.fixture
def slow(s3: LoopbackS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackS3]:
    """A server that takes four seconds for all of the array."""
    monkeypatch.setenv("DMDATA_CATALOG", publish(s3, {NAME: VALUES}, tmp_path))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    s3.bytes_per_second = 1.2e6
    yield s3
    s3.bytes_per_second = None


def at_terminal(program: str, **env: str) -> str:
    """Run a program at a pseudoterminal; return what it wrote there."""
    return run_at_terminal([sys.executable, "-c", f"import dmdata, numpy as np\n{program}"], **env)


def bars(terminal: str) -> list[str]:
    """List the states of bars that a terminal showed, without colours."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal)
    return [line for line in re.split(r"[\r\n]+", plain) if "━" in line]


def test_a_long_read_shows_bytes_dollars_and_time_and_leaves_a_clean_terminal(slow: LoopbackS3) -> None:
    written = at_terminal(f"rows = dmdata.open({NAME!r})[...]\nprint('then', rows.shape)")
    states = bars(written)
    assert states, written
    assert all(NAME in state for state in states)
    assert re.search(r"[1-9][\d.]*/8\.4 MB|[1-9][\d.]*/8\.0 MiB", states[0]), states[0]
    assert re.search(r"\$0\.000\d+ of \$0\.000\d+", states[0]), states[0]
    assert any(re.search(r"\d [kM]?B/s 0:00:\d\d", state) for state in states), states
    if " of $" not in states[-1]:  # the last is drawn when all is there
        assert re.search(r"8\.0 MiB \$0\.000\d+ .*in [3-9]\.\d s$", states[-1]), states[-1]
    # the line is wiped before anything else is written
    assert re.search(r"\x1b\[2K[^━]*then \(64, 32768\)", written), written
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1, "the cursor is back"


def test_nothing_is_shown_of_short_reads_and_where_it_is_off_or_nobody_looks(
    slow: LoopbackS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    all_at_once = f"""
from concurrent.futures import ThreadPoolExecutor
from dmdata.layout.selection import select
lazy = dmdata.open({NAME!r}).read_header()
all_rows = select(..., lazy.shape, orthogonal=False)
ways = [
    lambda: lazy[:2],
    lambda: dmdata.open({NAME!r}, progress=False)[...],
    lambda: lazy.read(all_rows, progress=lambda n_bytes: None),
    lambda: lazy.to_dask().compute(),
    lambda: lazy.to_xarray().compute(),
    lambda: dmdata.get({NAME!r}, 'x.npy', progress=False),
    lambda: dmdata.mirror({NAME!r}, 'x.zarr', progress=False),
    lambda: lazy.mirror('y.zarr', progress=lambda done: None),
]
with ThreadPoolExecutor(len(ways)) as pool:
    [done.result() for done in [pool.submit(way) for way in ways]]
"""
    read = f"dmdata.open({NAME!r})[...]"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.yaml").write_text("progress: false\n")
    worker = (
        "import multiprocessing\n"
        "with multiprocessing.get_context('fork').Pool(1) as pool:\n"
        f"    pool.apply(dmdata.open({NAME!r}).__getitem__, (...,))"
    )
    programs: dict[str, tuple[str, dict[str, str]]] = {
        "off for one, or shown by others": (all_at_once, {}),
        "variable": (read, {"DMDATA_PROGRESS": "0"}),
        "config": (read, {"DMDATA_HOME": str(elsewhere)}),
        "worker process": (worker, {}),
        "standard error elsewhere": (f"import sys; sys.stderr = open('log', 'w')\n{read}", {}),
    }
    with ThreadPoolExecutor(len(programs)) as pool:
        written = {name: pool.submit(at_terminal, program, **env) for name, (program, env) in programs.items()}
    assert {name: done.result() for name, done in written.items()} == dict.fromkeys(programs, "")
    assert (tmp_path / "log").read_text() == ""


def test_nothing_is_shown_in_pipes(slow: LoopbackS3) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import dmdata; dmdata.open({NAME!r})[...]"], capture_output=True, check=True
    )
    assert (done.stdout, done.stderr) == (b"", b"")


def test_get_mirror_and_verify_show_one_bar_each(
    slow: LoopbackS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    calls = (
        f"dmdata.get({NAME!r}, 'x.npy')",
        f"dmdata.mirror({NAME!r}, 'x.zarr')",
        "dmdata.verify('x.zarr', whole=True)",
    )
    written = at_terminal("\nprint('|')\n".join(calls))
    for call, part in zip(calls, written.split("|"), strict=True):
        states = bars(part)
        assert states, call
        assert all(state.count(NAME) == 1 for state in states), states
        assert all(re.search(r"[/ ]8\.[04] M", state) for state in states), states


def test_reads_of_several_threads_share_one_bar(slow: LoopbackS3) -> None:
    program = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        f"lazy = dmdata.open({NAME!r}).read_header()\n"
        "with ThreadPoolExecutor(2) as pool: list(pool.map(lambda rows: lazy[rows], [slice(0, 32), slice(32, 64)]))"
    )
    states = bars(at_terminal(program))
    assert states
    assert any("2 reads" in state and re.search(r"/8\.[04] M", state) for state in states), states


def test_an_interrupted_read_leaves_the_terminal_clean(slow: LoopbackS3) -> None:
    program = (
        "import os, signal, threading\n"
        f"lazy = dmdata.open({NAME!r}).read_header()\n"
        "threading.Timer(3.2, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "try: lazy[...]\n"
        "except KeyboardInterrupt: print('stopped')"
    )
    written = at_terminal(program)
    assert bars(written)
    assert re.search(r"\x1b\[2K[^━]*stopped", written), written
    assert written.endswith("stopped\r\n")


def test_bars_take_one_line_at_a_narrow_terminal_and_end_with_bytes_dollars_and_time(
    slow: LoopbackS3, tmp_path: Path
) -> None:
    longer = "cifar/50pct/train_datamodels"
    folder = tmp_path / "two"
    folder.mkdir()
    catalog = publish(slow, {NAME: VALUES, longer: np.ones_like(VALUES)}, folder)

    def states_at(width: int) -> list[str]:
        command = [sys.executable, "-m", "dmdata", "mirror", NAME, longer, str(tmp_path / f"{width}.zarr"), "-y"]
        env = {"DMDATA_CATALOG": catalog, "COLUMNS": str(width), "DMDATA_HOME": str(tmp_path / f"home{width}")}
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", run_at_terminal(command, **env))
        return [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.startswith((NAME, longer, "total"))]

    with ThreadPoolExecutor(2) as pool:
        for width, states in zip((60, 80), pool.map(states_at, (60, 80)), strict=True):
            assert max(map(len, states)) < width
            assert all(re.search(r" [\d.]+(/[\d.]+)? MiB( |$)", state) for state in states), states
            for state, size in zip(states[-3:], ("8.0", "8.0", "16.0"), strict=True):
                done = rf"{size} MiB +\$0\.00\d+ .*in \d+\.\d s$"
                assert re.search(done, state), states[-3:]


@pytest.mark.parametrize("width", range(20, 140, 8))
def test_a_bar_gives_way_before_what_it_says(width: int) -> None:
    console = Console(width=width, file=io.StringIO(), force_terminal=True)
    bars = OneLine(Bytes(), Dollars(), Speed(), console=console)
    for name, done in (("cifar/50pct/train_datamodels", 1 << 20), ("total", 1 << 30)):
        bars.add_task(name, total=1 << 30, completed=done, n_bytes=1 << 30, usd=0.09)
    lines = console.render_lines(bars.make_tasks_table(bars.tasks), pad=False)
    texts = ["".join(segment.text for segment in line).rstrip() for line in lines]
    assert len(texts) == 2
    assert all(len(text) < width for text in texts)
    assert "1.0/1.0 GiB" in texts[1] or "1.0 GiB" in texts[1]
    assert (" of $0.09" in texts[0]) == (width >= 60)
    assert ("━" in texts[0]) == (width >= 84)


def test_a_command_shows_its_own_bars_alone_and_none_when_set_so(
    slow: LoopbackS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-c", "from dmdata.cli.command import main; main()", "get", NAME, "-y"]
    with ThreadPoolExecutor(2) as pool:
        on = pool.submit(run_at_terminal, [*command, "-o", "on.npy"])
        off = pool.submit(run_at_terminal, [*command, "-o", "off.npy"], DMDATA_PROGRESS="0")
    assert all(state.count(NAME) == 1 for state in bars(on.result()))
    assert bars(on.result())
    assert not bars(off.result())
    assert (tmp_path / "on.npy").read_bytes() == (tmp_path / "off.npy").read_bytes()
