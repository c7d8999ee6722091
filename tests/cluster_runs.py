"""Runs whose models take a chosen time, fail or kill their process at will, for tests that train them on clusters."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from dmpipeline.checks.verification import verify_run
from dmpipeline.draws.masks import Purpose, draw_bits
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec

LEARNER = '''
import json, os, time
from pathlib import Path
import numpy as np

def learn(dataset, mask, number, folder, seconds):
    """Logits that depend on subset and number alone; takes `seconds`, and fails as folder/trouble.json says."""
    trouble = Path(folder, "trouble.json")
    kind = json.loads(trouble.read_text()).get(str(number)) if trouble.exists() else None
    if kind == "raises":
        raise ArithmeticError("this row will not do")
    if kind == "dies":
        os._exit(1)
    time.sleep(seconds)
    rng = np.random.default_rng([number, int(mask.sum())])
    return [rng.normal(size=(len(labels), dataset.n_classes)) for labels in (dataset.train_labels, dataset.test_labels)]
'''
COMMAND = [sys.executable, "-c", "from dmpipeline.cli.command import main; main()"]


def write_letters(folder: Path, n_train: int = 120, n_test: int = 20) -> str:
    """Write a dataset small enough that a process which trains on it need not load scikit-learn."""
    rng = np.random.default_rng(0)
    arrays = {"train_labels": np.arange(n_train) % 3, "test_labels": np.arange(n_test) % 3}
    arrays |= {"train_inputs": rng.random((n_train, 8), np.float32), "test_inputs": rng.random((n_test, 8), np.float32)}
    np.savez(folder / "letters.npz", **arrays)
    return str(folder / "letters.npz")


def make_run(folder: Path, name: str = "run", *, n_models: int = 40, seconds: float = 0.01) -> Run:
    """Create a run of blocks of four models that the learner in `folder` trains."""
    (folder / "learner.py").write_text(LEARNER)
    arguments = {"folder": str(folder), "seconds": seconds}
    spec = RunSpec(
        dataset=write_letters(folder),
        n_models=n_models,
        held_out={"n_subsets": 0},
        block_models=4,
        recipe={"name": "function", "function": "learner:learn", "arguments": arguments},
    )
    return Run.create(folder / name, spec)


def cause_trouble(run: Run, folder: Path, kinds: dict[int, str]) -> None:
    """Have the learner raise at some rows, or end its process; by row."""
    # a function is given the upper half
    numbers = {row: int(draw_bits(run.spec.seed, Purpose.TORCH_SEED, row, 1)[0]) >> 32 for row in kinds}
    (folder / "trouble.json").write_text(json.dumps({str(numbers[row]): kind for row, kind in kinds.items()}))


def faults(run: Run) -> dict[str, str]:
    """Return what is wrong with what a run stores, by check; made-up examples need not be learned."""
    return {f.check: f.detail for f in verify_run(run) if not f.passed and f.check != "learned"}


def require_same(run: Run, other: Run) -> None:
    """Fail unless two runs hold the same, to the bit."""
    for name in (*run.spec.arrays, "block_digests"):
        np.testing.assert_array_equal(run.array(name)[:], other.array(name)[:])


def write_times(run: Run) -> dict[str, tuple[int, int]]:
    """Return which file holds the digest of each block that is done, and when it was written."""
    files = (run.path / "store.zarr/block_digests/c").glob("*/0")
    return {file.parent.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


@contextmanager
def started(*command: str, path: Path | None = None, **options: Any) -> Iterator["subprocess.Popen[str]"]:
    """Start a process in a session of its own that finds modules in `path` first; kill what is left of it."""
    where = os.pathsep.join(filter(None, [str(path or ""), os.environ.get("PYTHONPATH", "")]))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    env = os.environ | {"PYTHONPATH": where}
    process = subprocess.Popen(list(command), start_new_session=True, env=env, **pipes)
    try:
        yield process
    finally:
        for left in processes_of(process.pid):
            left.kill()
        process.wait()
        for pipe in filter(None, (process.stdout, process.stderr)):
            pipe.close()


def processes_of(session: int) -> list[psutil.Process]:
    """List the processes of a session that are alive."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def workers_of(session: int) -> list[psutil.Process]:
    """List the processes of a session that were spawned to work."""
    found = []
    for process in processes_of(session):
        try:
            if "spawn_main" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def kill_some(run: Run, session: int, rng: random.Random, n_kills: int) -> int:
    """Kill workers, or the whole command, at random moments until all is killed or done; return how many."""
    for killed in range(1, n_kills + 1):
        time.sleep(rng.uniform(0.2, 1.5))
        workers = workers_of(session)
        if not workers or run.n_rows_done == run.spec.n_rows:
            return killed - 1
        if rng.random() < 0.3:
            os.kill(session, signal.SIGKILL)
            return killed
        try:
            rng.choice(workers).kill()
        except psutil.NoSuchProcess:
            continue
    return n_kills
