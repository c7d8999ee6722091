"""What a fit has finished is kept: it resumes after a kill, never reads a row twice, and workers may share it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from processes import Child

from dmdata.errors import FormatError
from dmpipeline.draws.masks import draw_masks
from dmpipeline.errors import ConvergenceError, RunError, SpecError
from dmpipeline.fitting.checkpoints import Checkpoints, Sizes
from dmpipeline.fitting.fitting import fit
from dmpipeline.fitting.forecast import Forecast, Rates

SMALL_BLOCKS = {
    "block_targets": 3,
    "sizes": Sizes(rows_of_a_piece=200, least_rows_of_a_task=200, mapped_bytes=1),
}
"""Several pieces of rows and blocks of targets, and arrays mapped from files, in a problem of any size."""


class Counted:
    """An array that notes which rows are read."""

    def __init__(self, array):
        self.array, self.shape, self.rows = array, array.shape, []

    def __getitem__(self, rows):
        self.rows += range(*rows.indices(len(self.array)))
        return self.array[rows]


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(3)
    masks = rng.random((900, 40)) < 0.5
    truth = rng.standard_normal((40, 10)) * (rng.random((40, 10)) < 0.3)
    return masks, (masks @ truth + 0.3 * rng.standard_normal((900, 10))).astype(np.float16)


class Reports:
    """What a fit reports of its stages: how much was done, first what was kept."""

    def __init__(self):
        self.of = {"moments": [], "paths": [], "refit": []}

    def __call__(self, stage, done, _):
        self.of[stage].append(done)


@pytest.fixture
def work(tmp_path):
    """A directory of the fit's own; tmp_path also holds the ledger's home."""
    return tmp_path / "work"


def assert_same(got, expected):
    for name in ("weight", "bias", "lam", "validation_error"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    np.testing.assert_array_equal(got.certificate.gap, expected.certificate.gap)
    assert got.prior_strength == expected.prior_strength


def assert_same_but_for_rounding(got, expected):
    """Compare fits of two processes: a kernel just compiled may round otherwise than the same read from the cache."""
    np.testing.assert_array_equal(got.lam, expected.lam)
    for name in ("weight", "bias", "validation_error"):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.certificate.gap, expected.certificate.gap, atol=1e-6)
    assert got.prior_strength == expected.prior_strength


@pytest.mark.parametrize("how", [{}, {"folds": 3}, {"prior": True}, {"is_positive": True}])
def test_a_fit_in_a_directory_is_the_fit_in_memory(problem, work, how):
    masks, outputs = problem
    if "prior" in how:
        how = {"prior": np.abs(np.random.default_rng(0).standard_normal((40, 10)))}
    assert_same(fit(masks, outputs, directory=work, **SMALL_BLOCKS, **how), fit(masks, outputs, block_targets=3, **how))
    (moments,) = work.iterdir()
    assert moments.name.startswith("moments-"), "what was needed for this fit alone is gone"
    assert not list(moments.glob(".*")), "nor is anything left of what was written"


def test_further_settings_read_the_rows_to_know_them_and_count_none(problem, work):
    masks, outputs = problem
    fit(masks, outputs, directory=work)
    again, reports = (Counted(masks), Counted(outputs)), Reports()
    got = fit(*again, directory=work, is_positive=True, progress=reports)
    assert_same(got, fit(masks, outputs, is_positive=True))
    assert sorted(again[0].rows) == sorted(again[1].rows) == list(range(900)), "each row once"
    assert reports.of["moments"] == [900], "all of them kept"


def test_more_models_are_added_to_those_that_were_counted(problem, work):
    masks, outputs = problem
    fit(masks[:500], outputs[:500], directory=work, **SMALL_BLOCKS)
    grown, reports = (Counted(masks), Counted(outputs)), Reports()
    got = fit(*grown, directory=work, progress=reports, **SMALL_BLOCKS)
    assert reports.of["moments"] == [500, 600, 810, 900]  # rows 800 to 810 join the piece before
    assert sorted(grown[0].rows) == sorted(grown[1].rows) == list(range(900)), "each row once"
    assert_same(got, fit(masks, outputs, block_targets=3))


def test_what_other_fits_left_is_kept_up_to_a_bound_the_latest_used_first(problem, work):
    masks, outputs = problem
    fit(masks, outputs, directory=work)
    (size,) = {path.stat().st_size for path in work.glob("moments-*/0-810-*")}
    how = {"directory": work, "sizes": Sizes(bytes_of_others=4 * size)}
    for factor in (1, 2, 3, 4):
        fit(masks, np.float16(factor) * outputs, **how)
    assert len(list(work.glob("moments-*/*-*.pt"))) == 6, "of this fit and of the two before it"
    reports = Reports()
    fit(masks, np.float16(2) * outputs, progress=reports, **how)
    assert reports.of["moments"] == [900], "which another user of the directory finds again"
    reports = Reports()
    fit(masks, outputs, progress=reports, **how)
    assert reports.of["moments"] == [810, 900], "but not what was used long ago"


def test_other_data_are_not_taken_for_those_that_were_counted(problem, work):
    masks, outputs = problem
    fit(masks, outputs, directory=work)
    assert_same(fit(masks, -outputs, directory=work), fit(masks, -outputs))


KILLED = """
import sys, time
import numpy as np
from dmpipeline.fitting.checkpoints import Sizes
from dmpipeline.fitting.fitting import fit
def report(stage, done, total):
    if (stage, done) == (sys.argv[2], 7):
        print("in the third block", flush=True)
        time.sleep(600)
data = np.load(sys.argv[3])
sizes = Sizes(rows_of_a_piece=200, least_rows_of_a_task=200, mapped_bytes=1)
fit(data["masks"], data["outputs"], directory=sys.argv[1], block_targets=3, sizes=sizes, progress=report)
"""


@pytest.mark.parametrize("stage", ["paths", "refit"])
def test_a_killed_fit_resumes_where_it_was(problem, tmp_path, work, stage):
    masks, outputs = problem
    np.savez(tmp_path / "data.npz", masks=masks, outputs=outputs)
    command = [sys.executable, "-c", KILLED, str(work), stage, str(tmp_path / "data.npz")]
    with Child(command, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout.readline() == "in the third block\n"
        killed.kill()
    again, reports = (Counted(masks), Counted(outputs)), Reports()
    got = fit(*again, directory=work, progress=reports, **SMALL_BLOCKS)
    assert reports.of["moments"] == [900], "the moments were kept"
    assert reports.of["paths"][0] == (6 if stage == "paths" else 10)
    assert reports.of["refit"][0] == (1 if stage == "paths" else 6)
    assert_same_but_for_rounding(got, fit(masks, outputs))


def test_moments_resume_from_the_last_piece_that_was_counted(problem, work):
    masks, outputs = problem

    class Failing(Counted):
        def __getitem__(self, rows):
            if rows.start >= 600:
                raise OSError("gone")
            return super().__getitem__(rows)

    with pytest.raises(OSError, match="gone"):
        fit(masks, Failing(outputs), directory=work, **SMALL_BLOCKS)
    reports = Reports()
    got = fit(masks, outputs, directory=work, progress=reports, **SMALL_BLOCKS)
    assert reports.of["moments"] == [600, 800, 810, 900]
    assert_same(got, fit(masks, outputs, block_targets=3))


@pytest.mark.parametrize("how", [{}, {"folds": 3}, {"is_positive": True}])
def test_a_fit_of_some_targets_is_that_of_their_columns_and_others_need_no_mask(problem, work, how):
    masks, outputs = problem
    first = fit(masks, outputs, directory=work, targets=slice(0, 4), **how)
    assert_same(first, fit(masks, outputs[:, :4], **how))
    again = Counted(masks), Counted(outputs)
    reports = Reports()
    others = fit(*again, directory=work, targets=slice(4, None), progress=reports, **how)
    assert_same(others, fit(masks, outputs[:, 4:], **how))
    assert reports.of["moments"] == [900], "nothing was counted again"


def test_a_prior_is_of_all_targets_and_some_are_fitted(problem):
    masks, outputs = problem
    prior = np.random.default_rng(0).standard_normal((40, 10))
    got = fit(masks, outputs, prior=prior, targets=slice(2, 5))
    assert_same(got, fit(masks, outputs[:, 2:5], prior=prior[:, 2:5]))


def test_pairs_of_some_targets_are_refused_with_what_to_hand_in(problem):
    with pytest.raises(SpecError, match="hand in these columns"):
        fit(*problem, pairs=True, targets=slice(2, 5))


def test_the_disk_that_a_fit_takes_is_what_was_foreseen(tmp_path):
    n_models, n_train, n_targets = 600, 3000, 20
    masks = draw_masks(0, np.arange(n_models, dtype=np.uint64), n_train, 0.5)
    outputs = np.random.default_rng(0).standard_normal((n_models, n_targets)).astype(np.float16)
    rates = Rates(pairs=1, sums=1, path_numbers=1, gram_numbers=1)
    foreseen = Forecast(n_models, n_train, n_targets, 10, 1, 0, 0, rates).disk_bytes
    most, over = 0, threading.Event()

    def watch():
        nonlocal most
        while not over.wait(0.001):
            most = max(most, _bytes_under(tmp_path))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        fit(masks, outputs, directory=tmp_path, sizes=Sizes(rows_of_a_piece=200, mapped_bytes=2**20))
    finally:
        over.set()
        watching.join()
    assert 0.8 * foreseen < most < 1.02 * foreseen


def _bytes_under(folder):
    """What files take there, and those that are unlinked and still mapped; arrays of a file's holes take nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    for fields in (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()):
        if len(fields) == 6 and fields[5].startswith(str(folder)) and fields[5].endswith("(deleted)"):
            start, end = (int(number, 16) for number in fields[0].split("-"))
            total += end - start
    return total


def test_what_a_killed_process_was_writing_is_removed_before_anything_is_written(problem, work):
    masks, outputs = problem
    fit(masks[:500], outputs[:500], directory=work, **SMALL_BLOCKS)
    (folder,) = work.glob("moments-*")
    left = folder / ".0-200.x.partial"
    left.write_bytes(b"half")
    seen = []
    fit(masks, outputs, directory=work, progress=lambda *_: seen.append(left.exists()), **SMALL_BLOCKS)
    assert seen
    assert not any(seen)


def test_a_damaged_checkpoint_is_named(problem, work):
    masks, outputs = problem
    fit(masks, outputs, directory=work)
    (path, _) = sorted(work.glob("moments-*/*-*.pt"))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(FormatError, match=path.name):
        fit(masks, outputs, directory=work)


def test_a_refused_fit_leaves_its_moments_alone(problem, work):
    masks, outputs = problem
    with pytest.raises(ConvergenceError):
        fit(masks, outputs, directory=work, tol=1e-9, max_sweeps=1, strict=True)
    assert [path.name.partition("-")[0] for path in work.iterdir()] == ["moments"]


def test_a_full_disk_is_said_before_anything_is_mapped(work, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError, match=r"No space left on device.*make room"):
        Checkpoints.at(work).zeros((10_000, 10_000), np.float32)


def test_a_scheduler_without_a_directory_is_refused_before_anything_is_read(problem):
    masks = Counted(problem[0])
    with pytest.raises(SpecError, match="name one"):
        fit(masks, problem[1], scheduler="tcp://127.0.0.1:1")
    assert not masks.rows


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0", silence_logs="CRITICAL"
    ) as local:
        yield local


@pytest.mark.parametrize("how", [{}, {"folds": 3, "prior": True}])
def test_a_cluster_gives_the_fit_of_one_process(problem, cluster, work, how):
    masks, outputs = problem
    if "prior" in how:
        how = how | {"prior": np.abs(np.random.default_rng(0).standard_normal((40, 10)))}
    seen = []
    got = fit(
        masks,
        outputs,
        directory=work,
        scheduler=cluster.scheduler_address,
        progress=lambda *said: seen.append(said),
        **SMALL_BLOCKS,
        **how,
    )
    assert_same_but_for_rounding(got, fit(masks, outputs, block_targets=3, **how))
    for stage in ("moments", "paths", "refit"):
        counts = [(done, total) for name, done, total in seen if name == stage]
        assert counts == sorted(counts)
        assert counts[-1][0] == counts[-1][1]
    assert [path.name.partition("-")[0] for path in work.iterdir()] == ["moments"]


def test_a_fit_outlives_its_workers(problem, cluster, work):
    masks, outputs = problem
    killed = []

    def kill_one():
        while not list(work.glob("fit-*/paths-0-1.pt")):
            time.sleep(0.005)
        pid = next(iter(cluster.workers.values())).pid
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    killer = threading.Thread(target=kill_one)
    killer.start()
    how = SMALL_BLOCKS | {"block_targets": 1}
    got = fit(masks, outputs, directory=work, scheduler=cluster.scheduler_address, **how)
    killer.join()
    assert killed
    assert_same_but_for_rounding(got, fit(masks, outputs))
