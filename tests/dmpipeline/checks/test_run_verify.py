import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from cluster_runs import faults, write_letters

from dmpipeline.checks.verification import CHECKS, verify_run
from dmpipeline.runs.rows import block_digest
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec

ARRAYS = RunSpec().arrays


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return Path(write_letters(tmp_path_factory.mktemp("data"), 60, 7))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, letters):
    spec = RunSpec(
        dataset=str(letters),
        n_models=9,
        held_out={"n_subsets": 2, "n_retrainings": 3},
        recipe={"hidden": 4, "epochs": 2},
        block_models=4,
    )
    run = Run.create(tmp_path_factory.mktemp("runs") / "run", spec)
    run.train()
    return run


@pytest.fixture
def run(tmp_path, whole):
    """A copy of the run, to be damaged."""
    return Run.open(shutil.copytree(whole.path, tmp_path / "run"))


def sign_again(run):
    """Make digests those of the bytes now stored, as a writer in error would have left them."""
    for number, rows in enumerate(run.spec.blocks):
        run.array("block_digests")[number] = np.frombuffer(block_digest(run.read_block(rows)), np.uint8)


def test_a_sound_run_passes_every_check(whole):
    calls = []
    findings = verify_run(whole, lambda done, n_rows: calls.append((done, n_rows)))
    assert [finding.check for finding in findings] == list(CHECKS)
    # eight random numbers a letter: there is nothing to learn
    assert [finding.check for finding in findings if not finding.passed] == ["learned"]
    assert calls == [(4, 15), (8, 15), (12, 15), (15, 15)]


def test_rows_that_were_never_trained_are_missing(run):
    run.array("block_digests")[1] = 0
    assert faults(run) == {"complete": "rows 4, 5, 6, 7 are missing"}


@pytest.mark.parametrize("name", ARRAYS)
def test_any_changed_value_differs_from_what_was_stored(run, name):
    array = run.array(name)
    corner = (5, *(0 for _ in array.shape[1:]))
    array[corner] = 1 - array[corner]
    assert "rows 4, 5, 6, 7 are not what was stored" in faults(run)["digests"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ARRAYS[1:])
def test_an_output_that_is_not_finite_is_found(run, name, value):
    array = run.array(name)
    array[(6, *(1 for _ in array.shape[1:]))] = value
    sign_again(run)
    assert faults(run)["finite"] == "row 6 has outputs that are not finite"


def test_a_mask_of_another_size_is_found(run):
    mask = run.array("train_masks")[3]
    mask[np.flatnonzero(~mask)[0]] = True
    run.array("train_masks")[3] = mask
    sign_again(run)
    wrong = faults(run)
    assert wrong["mask_sizes"].startswith("row 3 ")
    assert set(wrong) == {"mask_sizes", "masks"}


def test_a_mask_that_its_seed_does_not_draw_is_found(run):
    run.array("train_masks")[3] = np.roll(run.array("train_masks")[3], 1)
    sign_again(run)
    assert set(faults(run)) == {"masks"}


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_margin_that_is_not_that_of_its_logits_is_found_however_small_the_difference(run, part):
    margins = run.array(f"{part}_margins")
    margins[14, 2] = np.nextafter(margins[14, 2], np.float16(np.inf))
    sign_again(run)
    wrong = faults(run)
    assert set(wrong) == {"margins"}
    assert wrong["margins"].startswith(f"row 14 has {part} margins")


def test_a_row_stored_twice_is_found(run):
    for name in ARRAYS:
        run.array(name)[8] = run.array(name)[2]
    sign_again(run)
    wrong = faults(run)
    assert wrong["duplicates"] == "row 8 has the mask of an earlier row; row 8 has the outputs of an earlier row"
    assert set(wrong) == {"duplicates", "masks"}


def test_retrainings_may_share_a_mask_but_not_logits(run):
    for name in ARRAYS[1:]:
        run.array(name)[11] = run.array(name)[10]
    sign_again(run)
    assert faults(run) == {"duplicates": "row 11 has the outputs of an earlier row"}


def test_a_chunk_that_is_gone_reads_as_rows_that_differ(run):
    (run.path / "store.zarr/test_logits/c/2/0/0").unlink()
    assert "rows 8, 9, 10, 11 are not what was stored" in faults(run)["digests"]


@pytest.mark.parametrize("content", [b"", b"\x00" * 9, b"\xff" * 400])
def test_a_chunk_that_cannot_be_decoded_is_a_finding_and_no_crash(run, content):
    (run.path / "store.zarr/test_logits/c/2/0/0").write_bytes(content)
    wrong = faults(run)
    assert wrong["digests"].startswith("rows 8, 9, 10, 11 cannot be read")
    assert set(wrong) == {"digests"}


def test_a_chunk_cut_short_is_a_finding_and_no_crash(run):
    chunk = run.path / "store.zarr/train_logits/c/0/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-20])
    assert "rows 0, 1, 2, 3" in faults(run)["digests"]


@pytest.mark.parametrize(
    ("shape", "dtype"), [((15, 8), "float16"), ((14, 7), "float16"), ((15, 7), "float32"), ((15,), "float16")]
)
def test_an_array_of_another_shape_or_dtype_is_found(run, shape, dtype):
    zarr.create_array(run.path / "store.zarr", name="test_margins", shape=shape, dtype=dtype, overwrite=True)
    wrong = faults(run)
    assert f"test_margins is {dtype} {shape}, not float16 (15, 7)" in wrong["arrays"]
    assert set(wrong) == set(CHECKS) - {"dataset", "learned"}


@pytest.mark.parametrize("name", [*ARRAYS, "block_digests"])
def test_an_array_that_is_gone_is_found(run, name):
    shutil.rmtree(run.path / "store.zarr" / name)
    assert name in faults(run)["arrays"]


def test_metadata_that_is_no_longer_json_is_a_finding_and_no_crash(run):
    (run.path / "store.zarr/test_margins/zarr.json").write_text("{")
    assert "test_margins" in faults(run)["arrays"]


def test_a_dataset_that_changed_or_is_gone_is_found_and_the_rest_is_still_checked(run, letters, tmp_path):
    before = letters.read_bytes()
    try:
        with np.load(letters) as arrays:
            changed = dict(arrays) | {"test_labels": np.array([1, 1, 1, 1, 1, 1, 2])}
        np.savez(letters, **changed)
        run.array("train_masks")[3] = np.roll(run.array("train_masks")[3], 1)
        sign_again(run)
        assert set(faults(run)) == {"dataset", "margins", "masks"}
        letters.unlink()
        assert "say where it is now: `dmpipeline status" in faults(run)["dataset"]
    finally:
        letters.write_bytes(before)


def test_damaged_digests_are_a_finding(run):
    (run.path / "store.zarr/block_digests/c/1/0").write_bytes(b"short")
    wrong = faults(run)
    assert wrong["arrays"].startswith("block_digests cannot be read")
    assert "could not be checked" in wrong["digests"]
