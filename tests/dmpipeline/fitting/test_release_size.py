"""The fit at the release's size, at sizes of seconds: it finds what was planted, and resumes where it was killed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "release_size.py"
SHAPE = ["--models", "4100", "--train", "60", "--targets", "6", "--fitted", "4", "--rates", "256"]


def command(folder):
    return [sys.executable, str(BENCHMARK), str(folder), *SHAPE]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    said = subprocess.run(command(folder), capture_output=True, text=True, check=True).stdout
    return folder, said


def test_what_was_planted_is_found_and_what_it_took_is_said(whole):
    folder, said = whole
    result = json.loads((folder / "result.json").read_text())
    assert result["converged"] == 4
    assert result["gap"] < 1e-4
    assert result["recall"] > 0.9
    assert abs(result["planted r2"] - 0.3) < 0.05
    assert result["planted r2"] - 0.02 < result["r2"] <= result["planted r2"] + 0.01
    assert list(result["seconds"]) == ["data", "moments", "before paths", "paths", "before refit", "refit", "the rest"]
    assert result["extrapolated seconds of 10,000 targets"]["moments"] > result["seconds"]["moments"]
    assert "forecast: moments" in said
    assert "extrapolated to 10,000 targets, moments" in said
    (moments,) = (folder / "work").glob("moments-60x6/0-3690-*.pt")
    assert moments.stat().st_size > 60 * 60 * 4


def test_the_data_are_those_of_the_counters(whole, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    import release_size

    problem = release_size.Problem(4100, 60, 6, 4, 0)
    weights = problem.weights()
    assert (np.diff(weights.indptr) == problem.n_planted).all()
    masks, outputs = problem.rows(1024, 2048, weights)
    assert (masks.sum(1) == 30).all()
    bits = np.fromfile(whole[0] / "data" / "masks.bits", np.uint8).reshape(4100, 8)
    assert np.array_equal(np.unpackbits(bits[1024:2048], axis=1, count=60).astype(bool), masks)
    halves = np.fromfile(whole[0] / "data" / "outputs.f16", np.float16).reshape(4100, 6)
    assert np.array_equal(halves[1024:2048], outputs)


def test_killed_while_it_draws_it_resumes_to_the_same_result(whole, tmp_path):
    drawn = tmp_path / "data" / "masks.bits"
    with subprocess.Popen(command(tmp_path), stdout=subprocess.DEVNULL) as process:
        while not drawn.exists() or not drawn.stat().st_size:
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    subprocess.run(command(tmp_path), stdout=subprocess.DEVNULL, check=True)
    first, second = (json.loads((folder / "result.json").read_text()) for folder in (whole[0], tmp_path))
    assert second["tries"] == 2
    for name in ("gap", "kkt", "recall", "r2", "planted r2"):
        assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-6)


def test_another_problem_in_the_same_folder_is_refused(whole):
    other = [*command(whole[0]), "--seed", "1"]
    done = subprocess.run(other, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "name another folder" in done.stderr
