"""Runs, exports, mirrors and ledgers that earlier code left on disk are read as before; see `tests/kept/README.md`."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import dmdata
from dmdata.money.ledger import Ledger
from dmpipeline.checks.verification import replay, verify_run
from dmpipeline.cli.status import run_facts
from dmpipeline.exporting.export import export_run
from dmpipeline.fitting.fitted import fit_facts, load_datamodels
from dmpipeline.runs.derivation import old_results
from dmpipeline.runs.extension import extend
from dmpipeline.runs.store import Run
from dmpipeline.workflow import evaluate_run, fit_run

KEPT = Path(__file__).parents[2] / "kept" / "made-before.zip"


@pytest.fixture
def kept(tmp_path):
    with zipfile.ZipFile(KEPT) as archive:
        archive.extractall(tmp_path / "kept")
    return tmp_path / "kept"


@pytest.fixture
def complete(kept):
    return Run.open(kept / "runs" / "complete")


@pytest.fixture
def half(kept):
    return Run.open(kept / "runs" / "half")


def failed(run, *expected):
    return [finding for finding in verify_run(run) if not finding.passed and finding.check not in expected]


def test_a_complete_run_of_before_is_opened_and_is_sound(complete, kept):
    assert complete.spec.dataset == str(kept / "data" / "flowers.npz")
    assert complete.n_rows_done == complete.spec.n_rows == 50
    assert complete.dataset().n_train == 24
    # models so small say one class for everything now and then, which is a finding
    assert not failed(complete, "learned")


def test_a_row_of_a_run_of_before_is_trained_again_to_the_same(complete):
    assert complete.provenance["ways"]["cpu"] == {"method": "products", "n_models": 10, "compiled": False}
    assert all(replay(complete, row).agrees for row in (0, 49))


def test_a_run_of_before_states_how_far_it_is(complete, half):
    facts = run_facts(complete)
    assert (facts["n_rows_done"], facts["datamodels"], facts["old"]) == (50, True, [])
    facts = run_facts(half)
    assert (facts["n_rows"], facts["n_rows_done"]) == (50, 30)
    assert [session["n_rows"] for session in facts["sessions"]] == [30]


def test_a_run_is_read_without_torch(complete):
    program = """
import sys
sys.modules["torch"] = None
from dmpipeline.cli.status import run_facts
from dmpipeline.runs.store import Run
run = Run.open(sys.argv[1])
print(run_facts(run)["n_rows_done"], run.read_block(range(10))["test_margins"].shape)
"""
    command = [sys.executable, "-c", program, str(complete.path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "50 (10, 12)\n"


def test_a_half_trained_run_of_before_is_completed_to_the_rows_of_the_one_that_was_trained_whole(half, complete):
    before = half.read_block(range(10))
    half.train()
    assert not failed(half, "learned")
    for name in half.spec.arrays:
        np.testing.assert_array_equal(half.read_block(range(10))[name], before[name])
        if name == "train_masks":
            np.testing.assert_array_equal(half.array(name)[...], complete.array(name)[...])
        else:
            np.testing.assert_allclose(half.array(name)[...], complete.array(name)[...], atol=0.05)


def test_a_run_of_before_is_extended(complete):
    before, held_out = complete.read_block(range(40)), complete.read_block(range(40, 50))
    extended = extend(complete, 50)
    assert extended.n_rows_done == 50
    extended.train()
    for name in extended.spec.arrays:
        np.testing.assert_array_equal(extended.read_block(range(40))[name], before[name])
        np.testing.assert_array_equal(extended.read_block(range(50, 60))[name], held_out[name])
    assert not failed(extended, "learned")
    assert [old.what for old in old_results(extended)] == ["datamodels", "evaluation"]


def test_datamodels_and_scores_of_before_are_those_found_again(complete):
    assert load_datamodels(complete).weight.shape == (24, 12)
    assert fit_facts(complete)["n_models"] == 40
    stored = json.loads((complete.path / "evaluation.json").read_text())
    again = evaluate_run(complete)
    assert (again.lds, again.mse) == pytest.approx((stored["lds"], stored["mse"]))


def test_a_run_of_before_is_fitted_again_to_the_same_datamodels(complete):
    before = load_datamodels(complete)
    fit_run(complete, validation=0.2)
    np.testing.assert_allclose(load_datamodels(complete).weight, before.weight, atol=1e-4)


def test_an_export_of_before_is_what_is_exported_now(complete, kept, tmp_path):
    with_datamodels = {"datamodels": complete.datamodels_path, "requester_pays": True}
    for file in export_run(complete, tmp_path / "release", **with_datamodels):
        assert (kept / "release" / file.key).read_bytes() == (tmp_path / "release" / file.key).read_bytes()
    assert (kept / "release/catalog.yaml").read_text() == (tmp_path / "release/catalog.yaml").read_text()
    margins = dmdata.open("flowers/50pct/test_margins", catalog=complete.path)
    np.testing.assert_array_equal(margins[...], np.load(kept / "release/flowers/data/test_margins_50pct.npy"))


def test_a_mirror_of_before_is_read(complete, kept):
    np.testing.assert_array_equal(dmdata.open(kept / "mirror.zarr")[...], complete.array("test_margins")[...])


def test_a_ledger_of_before_is_read_and_counts_on(kept, monkeypatch):
    monkeypatch.setenv("DMDATA_HOME", str(kept / "home"))
    by_artifact = Ledger(kept / "home").spent(by="artifact")
    assert by_artifact["flowers/50pct/test_margins"].n_bytes == 1328
    before = dmdata.spend()
    assert (before.n_requests, before.usd) == (3, pytest.approx(1.6e-6, rel=0.05))
    reservation = Ledger(kept / "home").reserve(usd=0.5, n_bytes=7, n_requests=1, artifact="a", destination="internet")
    reservation.settle(usd=0.25, n_bytes=7, n_requests=1)
    assert dmdata.spend().usd == pytest.approx(before.usd + 0.25)
