"""What would score or fit the wrong rows, or the wrong form of them, is grouped, warned of or refused, never silent."""

import warnings
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import scipy.sparse
import torch
from one_curve import learning_curve
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier

from dmpipeline.errors import DataWarning, SpecError
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.fitting.fitting import fit
from dmpipeline.moments.identity import keys_of_masks
from dmpipeline.moments.overlaps import Possible, repeats_beyond_chance, shared_beyond_chance
from dmpipeline.runs.cataloguing import describe_datamodels
from dmpipeline.scoring.evaluation import evaluate
from dmpipeline.scoring.retrainings import noise_ceiling

QUICK = {"n_bootstraps": 20, "n_splits": 20}
N_FIT, N_SUBSETS, N_RETRAININGS = 200, 12, 4


@pytest.fixture(scope="module")
def digits():
    """Masks and margins of ridge classifiers of threes and fives, each on a half of 30 bootstrapped digits.

    The rows to fit on come first, then the held-out subsets, each trained on several resamples of its examples.
    """
    pictures, labels = load_digits(return_X_y=True)
    chosen = np.isin(labels, (3, 5))
    pictures, signs = pictures[chosen] / 16, np.where(labels[chosen] == 3, 1.0, -1.0)
    rng = np.random.default_rng(0)
    drawn = rng.random((N_FIT + N_SUBSETS, 30)) < 0.5
    masks = np.vstack([drawn[:N_FIT], np.repeat(drawn[N_FIT:], N_RETRAININGS, axis=0)])
    margins = np.empty((len(masks), 6), np.float32)
    for row, mask in enumerate(masks):
        rows = np.flatnonzero(mask)
        rows = rng.choice(rows, len(rows))
        rows = np.r_[rows, 30:34]  # of both classes
        model = RidgeClassifier().fit(pictures[rows], signs[rows])
        margins[row] = model.decision_function(pictures[100:106]) * signs[100:106]
    return masks, margins


@pytest.fixture(scope="module")
def fitted(digits):
    masks, margins = digits
    return fit(masks[:N_FIT], margins[:N_FIT])


@pytest.fixture
def held_out(digits):
    return digits[0][N_FIT:], digits[1][N_FIT:]


# retrainings of one subset


def test_rows_of_one_mask_are_found_and_taken_together(fitted, held_out):
    told = evaluate(fitted, *held_out, n_retrainings=N_RETRAININGS, **QUICK)
    found = evaluate(fitted, *held_out, **QUICK)
    assert found.as_dict() == told.as_dict()
    assert found.n_subsets == N_SUBSETS


def test_it_does_not_matter_where_the_retrainings_of_a_subset_are(fitted, held_out):
    masks, margins = held_out
    # each subset's retrainings stay in their order, and subsets in that of their first rows
    order = np.arange(len(masks)).reshape(N_SUBSETS, N_RETRAININGS).T.ravel()
    scattered = evaluate(fitted, masks[order], margins[order], **QUICK)
    assert scattered.as_dict() == evaluate(fitted, masks, margins, **QUICK).as_dict()


def test_subsets_that_were_trained_differently_often_count_once_each(fitted, held_out):
    masks, margins = held_out
    keep = np.delete(np.arange(len(masks)), [0, 1, 2, 4, 47])
    result = evaluate(fitted, masks[keep], margins[keep], **QUICK)
    subsets = np.unique(masks[keep], axis=0)
    averages = np.array([margins[keep][(masks[keep] == subset).all(1)].astype(float).mean(0) for subset in subsets])
    predicted = fitted.predict(subsets)
    expected = [stats.spearmanr(predicted[:, t], averages[:, t]).statistic for t in range(6)]
    np.testing.assert_allclose(result.target_lds, expected)
    assert (result.n_subsets, result.n_retrainings) == (N_SUBSETS, 1)
    residual = fitted.predict(masks[keep]) - margins[keep].astype(float)
    assert result.mse == pytest.approx((residual**2).mean())


@pytest.mark.parametrize("noise", [0.5, 1.5])
def test_the_ceiling_of_unequal_groups_is_what_a_perfect_prediction_reaches(noise):
    rng = np.random.default_rng(4)
    sizes = rng.choice([1, 2, 4, 7], 600, p=[0.1, 0.3, 0.3, 0.3])
    scores = rng.standard_normal((40, 20)) / np.sqrt(10)
    subsets = rng.random((600, 40)) < 0.5
    masks = np.repeat(subsets, sizes, axis=0)
    outputs = masks @ scores + noise * rng.standard_normal((len(masks), 20))
    result = evaluate(scores, masks, outputs, **QUICK)
    assert result.lds_ceiling == pytest.approx(result.lds, abs=0.02)
    assert result.n_retrainings == 1


def test_the_ceiling_is_unknown_where_most_subsets_were_trained_once(fitted, held_out):
    masks, margins = held_out
    keep = np.r_[0:8, np.arange(8, len(masks), N_RETRAININGS)]
    assert np.isnan(evaluate(fitted, masks[keep], margins[keep], **QUICK).lds_ceiling)


def test_the_ceiling_of_equal_groups_is_that_of_before(fitted, held_out):
    single = held_out[1].astype(float).reshape(N_SUBSETS, N_RETRAININGS, 6)
    result = evaluate(fitted, *held_out, **QUICK)
    np.testing.assert_array_equal(result.target_lds_ceiling, noise_ceiling(single, n_splits=20, seed=0))


@pytest.mark.parametrize("n_retrainings", [1, 2])
def test_a_number_of_retrainings_that_leaves_subsets_repeated_is_warned_of(fitted, held_out, n_retrainings):
    with pytest.warns(DataWarning, match=rf"n_retrainings is {n_retrainings}, but 48 rows hold 12 different.*leave"):
        evaluate(fitted, *held_out, n_retrainings=n_retrainings, **QUICK)


def test_curves_find_retrainings_too(digits, held_out):
    masks, margins = digits
    arrays = masks[:N_FIT], margins[:N_FIT], *held_out
    found = learning_curve(*arrays, counts=[100, 200], **QUICK)
    assert found.as_dict() == learning_curve(*arrays, counts=[100, 200], n_retrainings=N_RETRAININGS, **QUICK).as_dict()


# rows that are both fitted and scored on


def test_scores_on_rows_that_were_fitted_are_warned_of(fitted, digits, tmp_path):
    masks, margins = digits
    loaded = Datamodels.load(fitted.save(tmp_path / "dm.pt"))
    for datamodels in (fitted, loaded, loaded.to_standardised(mean=0.5).to_raw(mean=0.5)):
        with pytest.warns(DataWarning, match=r"200 of 212 subsets to score on were fitted on.*held-out models alone"):
            evaluate(datamodels, masks, margins, **QUICK)
    with pytest.warns(DataWarning, match=r"1 of 13 subsets"):
        evaluate(fitted, masks[N_FIT - 1 :], margins[N_FIT - 1 :], **QUICK)


def test_what_was_fitted_is_known_where_moments_were_kept(digits, tmp_path):
    masks, margins = digits
    for _ in range(2):
        datamodels = fit(masks[:N_FIT], margins[:N_FIT], directory=tmp_path / "work")
    np.testing.assert_array_equal(datamodels.fitted_masks, keys_of_masks(masks[:N_FIT].view(np.int8)))


def test_datamodels_of_before_and_of_some_targets_load_and_are_catalogued(fitted, held_out, tmp_path):
    path = fitted.save(tmp_path / "new.pt")
    entry = describe_datamodels(path, key="new.pt")
    assert entry.members["fitted_masks"].shape == (N_FIT,)
    some = Datamodels.load(path, targets=slice(2, 4))
    np.testing.assert_array_equal(some.fitted_masks, fitted.fitted_masks)
    tensors = torch.load(path, weights_only=True)
    del tensors["fitted_masks"]
    torch.save(tensors, tmp_path / "old.pt")
    old = Datamodels.load(tmp_path / "old.pt")
    assert old.fitted_masks is None
    assert "fitted_masks" not in describe_datamodels(tmp_path / "old.pt", key="old.pt").members
    assert evaluate(old, *held_out, **QUICK).as_dict() == evaluate(fitted, *held_out, **QUICK).as_dict()


def test_a_fit_that_takes_retrained_subsets_along_is_warned_of(digits):
    with pytest.warns(DataWarning, match=r"36 of 248 rows to fit on repeat.*the first is row 201; leave held-out"):
        fit(*digits)


class OfRun:
    """An array that knows which of its rows are which, as a LazyArray of a catalogued run does."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape
        self.rows = SimpleNamespace(fit=slice(0, N_FIT), evaluation=slice(N_FIT, len(array)), n_retrainings=None)

    def __getitem__(self, rows):
        return self.array[rows]


def test_a_fit_of_all_rows_of_a_run_names_those_to_fit(digits):
    masks, margins = digits
    with pytest.warns(
        DataWarning, match=r"rows 200 to 248 are held-out.*masks\[masks.rows.fit\].*rows 0 to 200"
    ) as told:
        fit(OfRun(masks), OfRun(margins))
    assert len(told) == 1, "once"
    assert told[0].filename == __file__, "at the user's own line"


def test_repeats_by_chance_in_tiny_sets_are_no_fault():
    rng = np.random.default_rng(1)
    for n_train, alpha in ((8, 0.5), (12, 0.2), (140, 0.01)):
        size = max(round(alpha * n_train), 1)
        masks = np.zeros((400, n_train), bool)
        for mask in masks:
            mask[rng.choice(n_train, size, replace=False)] = True
        outputs = masks @ rng.standard_normal((n_train, 2)) + 0.1 * rng.standard_normal((400, 2))
        with warnings.catch_warnings():
            warnings.simplefilter("error", DataWarning)
            datamodels = fit(masks[:300], outputs[:300])
            evaluate(datamodels, masks[300:], outputs[300:], **QUICK)


def test_a_repeat_that_chance_does_not_explain_is_told_from_one_that_it_does():
    keys = np.r_[np.arange(99), 0].astype(np.uint64)
    assert repeats_beyond_chance(keys, Possible.subsets(100, 50)) == 1
    assert repeats_beyond_chance(keys, Possible.subsets(14, 7)) == 0  # 3,432 subsets: 1.4 repeats by chance
    assert shared_beyond_chance(keys, keys[:3], Possible.subsets(100, 50)) == 3
    assert shared_beyond_chance(keys, np.arange(2000, 5000).astype(np.uint64), Possible.subsets(14, 7)) == 0


# scores of anybody


def test_a_matrix_of_scores_is_evaluated_by_the_sums_over_subsets(fitted, held_out):
    masks, margins = held_out
    result = evaluate(fitted.weight, masks, margins, **QUICK)
    assert result.lds == pytest.approx(evaluate(fitted, masks, margins, **QUICK).lds, abs=1e-3)
    assert np.isnan(result.mse)
    assert np.isnan(result.r2)
    assert result.as_dict()["mse"] is None
    scaled = evaluate(torch.tensor(1e6 * fitted.weight), masks, margins, **QUICK)
    assert scaled.lds == pytest.approx(result.lds, abs=1e-3)


def test_scores_that_do_not_fit_name_both_shapes(fitted, held_out):
    with pytest.raises(SpecError, match=r"shape \(6, 30\).*need \(30, 6\).*hand in scores.T"):
        evaluate(fitted.weight.T, *held_out)
    with pytest.raises(SpecError, match=r"shape \(29, 6\), but masks \(48, 30\)"):
        evaluate(fitted.weight[1:], *held_out)
    with pytest.raises(SpecError, match="not finite"):
        evaluate(np.full((30, 6), np.nan), *held_out)
    with pytest.raises(SpecError, match=r"scores are a list; hand in an array"):
        evaluate(fitted.weight.tolist(), *held_out)


# masks and outputs of any kind

FORMS = {
    "csr_matrix": scipy.sparse.csr_matrix,
    "csc_array": scipy.sparse.csc_array,
    "coo_array": scipy.sparse.coo_array,
    "lil_matrix": scipy.sparse.lil_matrix,
    "DataFrame": pandas.DataFrame,
    "DataFrame of nullable": lambda x: pandas.DataFrame(x).convert_dtypes(),
    "torch": torch.tensor,
    "torch coo": lambda x: torch.tensor(x).to_sparse(),
    "requires grad": lambda x: torch.tensor(x.astype(np.float32), requires_grad=True),
    "big-endian": lambda x: x.astype(">f4"),
    "masked, of nothing": np.ma.array,
}


@pytest.mark.parametrize("form", FORMS)
def test_arrays_of_any_kind_are_fitted_predicted_and_scored_as_numpys_are(fitted, digits, held_out, form):
    make = FORMS[form]
    masks, margins = (array[:N_FIT] for array in digits)
    got = fit(make(masks), make(margins), block_rows=64)
    expected = fit(masks, margins, block_rows=64)
    np.testing.assert_array_equal(got.weight, expected.weight)
    np.testing.assert_array_equal(fitted.predict(make(masks), block_rows=64), fitted.predict(masks, block_rows=64))
    other = [make(array) for array in held_out]
    assert evaluate(fitted, *other, **QUICK).as_dict() == evaluate(fitted, *held_out, **QUICK).as_dict()


def test_half_brains_are_widened_exactly(digits):
    masks, margins = (array[:N_FIT] for array in digits)
    outputs = torch.tensor(margins).bfloat16()
    got = fit(torch.tensor(masks).bfloat16(), outputs)
    np.testing.assert_array_equal(got.weight, fit(masks, outputs.float().numpy()).weight)
    assert (got.predict(torch.tensor(masks)) == got.predict(masks)).all()


def test_whole_numbers_are_outputs(digits):
    masks, margins = (array[:N_FIT] for array in digits)
    whole = np.round(100 * margins).astype(np.int32)
    np.testing.assert_allclose(fit(masks, whole).weight, fit(masks, whole.astype(np.float64)).weight)


REFUSED = {
    "complex": (lambda x: x.astype(complex), "complex128"),
    "objects": (lambda x: x.astype(object), "object"),
    "text": (lambda x: x.astype(str), "<U"),
    "dates": (lambda x: x.astype(int).astype("datetime64[s]"), "datetime64"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_numbers_that_are_not_real_are_refused_with_the_remedy(digits, fitted, kind):
    masks, margins = (array[:N_FIT] for array in digits)
    make, said = REFUSED[kind]
    with pytest.raises(SpecError, match=rf"masks have dtype {said}.*masks.astype\(bool\)"):
        fit(make(masks), margins)
    with pytest.raises(SpecError, match=rf"outputs have dtype {said}.*outputs.astype\(float\)"):
        fit(masks, make(margins))
    with pytest.raises(SpecError, match=rf"masks have dtype {said}"):
        fitted.predict(make(masks))


def test_masked_values_and_missing_ones_are_named(digits):
    masks, margins = (array[:N_FIT] for array in digits)
    hidden = np.ma.array(margins, mask=np.zeros(margins.shape, bool))
    hidden[17, 2] = np.ma.masked
    with pytest.raises(SpecError, match=r"masked values, the first in row 17; fill them in"):
        fit(masks, hidden)
    frame = pandas.DataFrame(margins).convert_dtypes()
    frame.iloc[31, 4] = pandas.NA
    with pytest.raises(SpecError, match=r"not finite in rows 31, targets 4"):
        fit(masks, frame)


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        (lambda masks, outputs: (masks.T, outputs), r"masks have shape \(30, 200\) and outputs \(200, 6\).*masks\.T"),
        (lambda masks, outputs: (masks, outputs.T), r"masks have shape \(200, 30\) and outputs \(6, 200\).*outputs\.T"),
        (lambda masks, outputs: (masks.T, outputs.T), r"both look transposed.*a row for each model"),
        (lambda masks, outputs: (masks, outputs[:-1]), r"200 masks but 199 rows.*same models in the same order"),
        (lambda masks, outputs: (masks, np.stack([outputs] * 3, 2)), r"\(200, 6, 3\).*margin.*outputs\[:, :, 0\]"),
    ],
)
def test_arrays_the_wrong_way_round_are_named_with_both_shapes(digits, turn, said):
    with pytest.raises(SpecError, match=said):
        fit(*turn(*(array[:N_FIT] for array in digits)))


def test_masks_to_predict_that_are_the_wrong_way_round_are_named(fitted, held_out):
    with pytest.raises(SpecError, match=r"shape \(30, 48\); these datamodels expect \(n_models, 30\); hand in masks.T"):
        fitted.predict(held_out[0].T)
