"""A fit in a directory is that of the data it is handed, whatever was fitted there before."""

import contextlib
import re
import shutil

import dask.array
import numpy as np
import pytest
import scipy.sparse
import torch
import zarr
from cluster_runs import write_letters
from servers.loopback import BUCKET
from small_release import npy

import dmdata
from dmdata.errors import IntegrityError
from dmpipeline import workflow
from dmpipeline.errors import DataWarning
from dmpipeline.fitting.checkpoints import Sizes
from dmpipeline.fitting.fitting import fit
from dmpipeline.moments.moments import Moments
from dmpipeline.runs.extension import extend
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec
from dmpipeline.training.train import Way


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(8)
    masks = rng.random((600, 24)) < 0.5
    truth = rng.standard_normal((24, 5)) * (rng.random((24, 5)) < 0.4)
    return masks, (masks @ truth + 0.3 * rng.standard_normal((600, 5))).astype(np.float16)


class Counted(list):
    """How many rows were known or counted, as a fit reports it: first how many were known."""

    def __call__(self, stage, done, _):
        if stage == "moments":
            self.append(done)


@pytest.fixture
def work(tmp_path):
    return tmp_path / "work"


def same(one, other):
    names = ("weight", "bias", "lam", "validation_error", "fitted_masks")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


def corrected(masks, outputs):
    outputs = outputs.copy()
    outputs[300:] *= -1
    return masks, outputs


def corrected_once(masks, outputs):
    outputs = outputs.copy()
    outputs[411, 3] += 1
    return masks, outputs


def other_masks(masks, outputs):
    masks = masks.copy()
    masks[500:, 7] ^= True
    return masks, outputs


def permuted(masks, outputs):
    order = np.r_[:200, 599:199:-1]
    return masks[order], outputs[order]


CHANGES = {
    "rows from the middle on": corrected,
    "a single output": corrected_once,
    "masks under the same outputs": other_masks,
    "the order of rows": permuted,
    "fewer rows": lambda masks, outputs: (masks[:450], outputs[:450]),
    "rows in front": lambda masks, outputs: (np.vstack([~masks[-9:], masks]), np.vstack([outputs[-9:], outputs])),
    "the dtype": lambda masks, outputs: (masks, outputs.astype(np.float64) + 1e-3),
    "a target less": lambda masks, outputs: (masks, outputs[:, :4]),
    "an example less": lambda masks, outputs: (masks[:, 1:], outputs),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_fit_is_that_of_its_data_whatever_changed_since_the_last_one(data, work, change):
    before = fit(*data, directory=work)
    changed = CHANGES[change](*data)
    expected = fit(*changed)
    assert not same(before, expected)
    assert same(fit(*changed, directory=work), expected)
    assert same(fit(*data, directory=work), before), "and of the old data once they are back"


def test_only_the_pieces_that_changed_are_counted_again(data, work):
    masks, outputs = data
    how = {"directory": work, "sizes": Sizes(least_rows_of_a_piece=64)}
    fit(masks, outputs, progress=(counted := Counted()), **how)
    assert counted[-2:] == [576, 600]
    assert len(counted) == 11
    changed = corrected_once(masks, outputs)
    got = fit(*changed, progress=(counted := Counted()), **how)
    assert counted == [600 - 64, 600], "all but the rows 384 to 448 were known"
    assert same(got, fit(*changed))


FORMS = {
    "zarr": lambda x: zarr.create_array({}, data=x, chunks=(100, x.shape[1])),
    "dask": lambda x: dask.array.from_array(x, chunks=(70, -1)),
    "torch": torch.tensor,
    "bytes": lambda x: x.astype(np.uint8) if x.dtype == bool else x,
    "sparse": lambda x: scipy.sparse.csr_array(x) if x.dtype == bool else x,
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_rows_in_another_form_are_known(data, work, form):
    expected = fit(*data, directory=work)
    assert same(fit(*map(FORMS[form], data), directory=work, progress=(counted := Counted())), expected)
    assert counted == [600]


def test_moments_of_an_earlier_version_are_counted_again_and_said_to_be_once(data, work, recwarn):
    old = work / "moments-3fa8c1d23fa8c1d2"
    Moments.of(data[0][:540], -data[1][:540]).save(old / "0-540.pt")
    Moments.of(data[0][540:], -data[1][540:]).save(old / "540-600.pt")
    with pytest.warns(DataWarning, match=re.escape(str(work)) + ".*first 16 rows alone.*counted again"):
        got = fit(*data, directory=work)
    assert same(got, fit(*data))
    assert not old.exists()
    fit(*data, directory=work)
    assert not [told for told in recwarn if told.category is DataWarning]


def test_a_fit_that_was_killed_on_other_data_gives_none_of_its_results(data, work):
    """Outputs of flipped sign have the same sums of squares."""
    masks, outputs = data

    def interrupt(stage, *_):
        if stage == "refit":
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        fit(masks, outputs, directory=work, progress=interrupt)
    assert list(work.glob("fit-*/paths-*"))
    assert same(fit(masks, -outputs, directory=work), fit(masks, -outputs))


# a source that says what it holds


def reading(monkeypatch, kind, name):
    """Note which rows of a lazy array of this name are read."""
    rows, read = [], kind.__getitem__

    def noted(self, key):
        if getattr(self, "array", self).name.endswith(name):
            rows.extend(range(*key.indices(self.shape[0])))
        return read(self, key)

    monkeypatch.setattr(kind, "__getitem__", noted)
    return rows


def test_paid_objects_are_known_by_their_etags_and_not_read_again(data, work, s3, monkeypatch):
    for name, values in zip(("masks", "outputs"), data, strict=True):
        s3.put(f"{name}.npy", npy(values))
    masks, outputs = (dmdata.open(f"s3://{BUCKET}/{name}.npy") for name in ("masks", "outputs"))
    monkeypatch.setenv("DMDATA_CACHE_GIB", "0")
    expected = fit(masks, outputs, directory=work)
    assert same(expected, fit(*data))
    s3.reset_log()
    again = fit(masks, outputs, directory=work, folds=4)
    assert same(again, fit(*data, folds=4))
    s3.reset_log()
    assert same(fit(masks, outputs, directory=work), expected)
    assert sum(request.n_bytes for request in s3.log) == 2, "a byte of each, to see that it is the same object"

    s3.put("outputs.npy", npy(-data[1]))
    with pytest.raises(IntegrityError, match="changed"):
        fit(masks, dmdata.open(f"s3://{BUCKET}/outputs.npy"), directory=work)
    reopened = dmdata.open(f"s3://{BUCKET}/outputs.npy")
    assert same(fit(masks, reopened, directory=work), fit(data[0], -data[1]))


def test_paid_outputs_are_not_paid_again_where_masks_are_at_hand(data, work, s3, monkeypatch):
    monkeypatch.setenv("DMDATA_CACHE_GIB", "0")
    s3.put("outputs.npy", npy(data[1]))
    outputs = dmdata.open(f"s3://{BUCKET}/outputs.npy")
    expected = fit(data[0], outputs, directory=work)
    s3.reset_log()
    assert same(fit(data[0], outputs, directory=work, progress=(counted := Counted())), expected)
    assert counted == [600]
    assert sum(request.n_bytes for request in s3.log) == 1
    masks = other_masks(*data)[0]
    assert same(fit(masks, outputs, directory=work), fit(masks, data[1]))


@pytest.fixture
def run(tmp_path):
    spec = RunSpec(
        dataset=write_letters(tmp_path, 40, 6),
        n_models=40,
        held_out={"n_subsets": 3, "n_retrainings": 2},
        recipe={"hidden": 4, "epochs": 1},
        block_models=8,
    )
    run = Run.create(tmp_path / "run", spec)
    run.train(way=Way("products", 8))
    return run


def test_rows_of_a_run_are_not_read_again_for_further_settings(run, monkeypatch):
    workflow.fit_run(run)
    rows = reading(monkeypatch, workflow.RowsOf, "train_masks")
    got = workflow.fit_run(run, is_positive=True)
    assert rows == []
    assert len(got.fitted_masks) == 40


def test_rows_of_a_run_that_were_damaged_and_trained_again_are_fitted_as_they_are_now(run):
    """The digests recorded for them are those that they had before they were damaged."""
    expected = workflow.fit_run(run)
    shutil.rmtree(run.path / "fitting")
    margins = zarr.open_group(run.path / "store.zarr")["test_margins"]
    digests = zarr.open_group(run.path / "store.zarr")["block_digests"]
    margins[16:24] = -margins[16:24]
    assert not same(workflow.fit_run(run), expected)
    digests[2] = 0
    run = Run.open(run.path)
    run.train(way=Way("products", 8))
    assert same(workflow.fit_run(run), expected)


def test_more_models_of_a_run_are_read_alone(run, monkeypatch):
    workflow.fit_run(run)
    longer = extend(run, 64)
    longer.train(way=Way("products", 8))
    rows = reading(monkeypatch, workflow.RowsOf, "train_masks")
    got = workflow.fit_run(longer)
    assert sorted(rows) == list(range(40, 64))
    shutil.rmtree(longer.path / "fitting")
    assert same(workflow.fit_run(longer), got)
