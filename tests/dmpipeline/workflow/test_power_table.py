"""The table of power compares as `verify` does, and goes on where it was."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from dmpipeline.runs.store import Run
from dmpipeline.workflow.tta_check import best_views
from dmpipeline.workflow.verify_step import LEVEL, MARGIN, verify

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
FAULTS = ["clean", "shift 0.2", "training order off by one", "a row repeated", "1% of rows of another alpha"]


@pytest.fixture(scope="module")
def power():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        patch.setenv("OMP_NUM_THREADS", "1")
        import power

        yield power


@pytest.fixture(scope="module")
def cache(power, tmp_path_factory):
    found = tmp_path_factory.mktemp("pools")
    power.digits_bench(found, 300)
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_a_draw_of_the_table_is_judged_as_verify_judges_the_same_rows(power, cache, tmp_path, fault):
    bench = power.digits_bench(cache, 300)
    ours, theirs = bench.pool.at(np.arange(160)), bench.pool.at(np.arange(160, 300))
    rng = np.random.default_rng(0)
    planted = power.FAULTS[fault](power.Draw(bench, ours, theirs, np.arange(160, 300), rng))
    comparison = power.OfPool(bench.run, bench.reference, margin=MARGIN, level=LEVEL, seed=0).of(ours)
    looks = list(comparison.verdicts(planted, [100, 140]))

    runs = []
    for name, models in (("ours", ours), ("theirs", planted)):
        copy = Run.create(tmp_path / name, bench.run.spec.model_copy(update={"n_models": len(models.masks)}))
        copy.train()
        stored = zarr.open_group(copy.path / "store.zarr", mode="r+")
        stored["train_masks"][:], stored["test_margins"][:] = models.masks, models.outputs
        runs.append(Run.open(copy.path))
    found = verify(*runs, refit=False)
    verdict, failed = looks[power.Outcome(looks).end]
    own = {"digests", "masks", "duplicates", "learned"}  # of our run by itself, whose rows were written over
    assert {finding.check for finding in found if not finding.passed} - own == set(failed)
    assert (verdict == "differs") == bool(failed)
    assert found.n_rows == [100, 140][power.Outcome(looks).end]


def test_a_cell_that_is_known_is_not_computed_again_and_one_with_fewer_draws_gets_the_rest(power, cache, capsys):
    cache = shutil.copytree(cache, cache.parent / "resumed")
    asked = [str(cache), "--models", "300", "--rows", "100", "--faults", "a row repeated", "--jobs", "1"]
    power.main([*asked, "--draws", "2"])
    path = cache / "power.json"
    (cell,) = json.loads(path.read_text())["cells"]
    assert (cell["n_draws"], cell["n_differs"], cell["n_named"], cell["checks"]) == (2, 2, 2, {"reference_rows": 2})
    cell["n_named"] = 0
    path.write_text(json.dumps({"cells": [cell]}))
    power.main([*asked, "--draws", "3"])
    (cell,) = json.loads(path.read_text())["cells"]
    assert (cell["n_draws"], cell["n_differs"], cell["n_named"]) == (3, 3, 1)
    before = path.stat().st_mtime_ns
    power.main([*asked, "--draws", "2"])
    assert path.stat().st_mtime_ns == before
    assert "a row repeated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--faults", "clear"], "clear: no such fault; choose of clean, "),
        (["--models", "110"], "--models 110"),
        (["--rows", "10"], "--rows 10"),
        (["--looks", "--faults", "weights of another space"], "are compared once"),
    ],
)
def test_what_cannot_be_computed_is_refused_before_anything_is_trained(power, tmp_path, capsys, wrong, said):
    with pytest.raises(SystemExit):
        power.main([str(tmp_path / "cache"), "--rows", "100", *wrong])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_views_are_told_by_the_shift_that_rows_trained_again_show():
    rng = np.random.default_rng(0)
    change = rng.normal(0, 0.5, 40)
    ours, theirs = rng.normal(size=(400, 40)), rng.normal(size=(300, 40)) + change
    again = {"none": ours[:8] + change, "channel_flip": ours[:8] - change}
    finding = best_views("mirror", ours, theirs, again)
    assert not finding.passed
    assert "fit the reference best: none" in finding.detail
    assert best_views("mirror", ours, theirs - change, again).passed


def test_views_are_blamed_by_chance_in_at_most_a_twentieth_of_comparisons_though_targets_share_their_noise():
    rng, blamed = np.random.default_rng(0), 0
    for _ in range(200):
        ours, theirs = (rng.normal(size=(n, 1)) + 0.3 * rng.normal(size=(n, 40)) for n in (400, 300))
        again = {views: ours[:8] + 0.1 * rng.normal(size=(8, 1)) for views in ("none", "channel_flip")}
        blamed += not best_views("mirror", ours, theirs, again).passed
    assert blamed <= 15


def test_retrainings_of_few_subsets_are_not_taken_for_as_many_models():
    rng, blamed = np.random.default_rng(0), 0
    for _ in range(200):
        ours, theirs = (
            np.repeat(rng.normal(size=(20, 1)), 10, axis=0) + 0.3 * rng.normal(size=(200, 40)) for _ in range(2)
        )
        again = {views: ours[:8] + 0.1 * rng.normal(size=(8, 1)) for views in ("none", "channel_flip")}
        blamed += not best_views("mirror", ours, theirs, again, n_subsets=(20, 20)).passed
    assert blamed <= 15
