import io
import itertools
import os
import pickle
import resource
import zipfile

import dask.array
import numpy as np
import pytest
import torch
import zarr
from sklearn.linear_model import Lasso, lasso_path

from dmdata.errors import FormatError, ObjectMissingError
from dmpipeline.errors import ConvergenceError, RunError, SpecError
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.fitting.fitting import fit, fit_folds, fit_moments
from dmpipeline.fitting.solvers import lasso
from dmpipeline.fitting.spaces import Space
from dmpipeline.moments.moments import Moments


def planted(n_models=1500, n_train=60, n_targets=4, *, noise=0.5, seed=0, dtype=np.float16):
    """Masks of half the examples, and outputs that are sparse sums over them."""
    rng = np.random.default_rng(seed)
    masks = rng.random((n_models, n_train)).argsort(axis=1) < n_train // 2
    truth = np.zeros((n_train, n_targets))
    for t in range(n_targets):
        truth[rng.choice(n_train, 5, replace=False), t] = rng.choice([-1, 1], 5) * rng.uniform(1, 2, 5)
    outputs = masks @ truth + 3 + noise * rng.standard_normal((n_models, n_targets))
    return masks, outputs.astype(dtype), truth


@pytest.fixture(scope="module")
def problem():
    return planted()


@pytest.fixture(scope="module")
def fitted(problem):
    masks, outputs, _ = problem
    return fit(masks, outputs, tol=1e-4)


def test_planted_weights_are_found_in_raw_mask_space(problem, fitted):
    _, _, truth = problem
    assert fitted.weight.shape == truth.shape
    assert fitted.weight.dtype == fitted.bias.dtype == fitted.lam.dtype == np.float32
    assert np.abs(fitted.weight - truth).max() < 0.25
    assert ((np.abs(fitted.weight) > 0.5) == (truth != 0)).all()


def test_predictions_of_new_models_are_as_good_as_the_noise_allows(fitted):
    masks, outputs, _ = planted(noise=0.0, seed=0)  # the same truth, without noise
    error = ((fitted.predict(masks) - outputs.astype(float)) ** 2).mean()
    assert error < 0.1 * 0.5**2


def test_the_fit_equals_scikit_learns_on_all_rows_at_the_chosen_strength(problem, fitted):
    masks, outputs, _ = problem
    x = (masks - masks.mean(axis=0)) / masks.std(axis=0)
    for t in range(outputs.shape[1]):
        y = outputs[:, t].astype(float)
        oracle = Lasso(alpha=float(fitted.lam[t]), tol=1e-10, max_iter=10**6).fit(x, y)
        np.testing.assert_allclose(fitted.weight[:, t], oracle.coef_ / masks.std(axis=0), atol=1e-4)
        raw_bias = oracle.intercept_ - masks.mean(axis=0) @ (oracle.coef_ / masks.std(axis=0))
        assert fitted.bias[t] == pytest.approx(raw_bias, abs=1e-3)


def test_the_strength_is_the_best_of_the_grid_on_the_last_rows(problem, fitted):
    masks, outputs, _ = problem
    x, y = masks[:1350], outputs[:1350].astype(float)
    mean, scale = x.mean(axis=0), x.std(axis=0)
    lam_max = np.abs(((x - mean) / scale).T @ (y - y.mean(axis=0)) / 1350).max(axis=0)
    for t in range(4):
        grid = lam_max[t] * 0.01 ** np.linspace(0, 1, 100)
        errors = []
        for lam in grid:
            oracle = Lasso(alpha=lam, tol=1e-8, max_iter=10**6).fit((x - mean) / scale, y[:, t])
            errors.append(((oracle.predict((masks[1350:] - mean) / scale) - outputs[1350:, t]) ** 2).mean())
        assert fitted.lam[t] == pytest.approx(grid[np.argmin(errors)], rel=1e-5)


def test_every_target_is_certified(fitted):
    assert (fitted.certificate.gap < 1e-4).all()
    assert (fitted.certificate.kkt < 2e-4).all()


def test_any_array_of_rows_gives_the_same_fit(problem, tmp_path):
    masks, outputs, _ = problem
    masks, outputs = masks[:300], outputs[:300]
    plain = fit(masks, outputs)
    group = zarr.create_group(tmp_path / "run.zarr")
    stored = [group.create_array(name, data=a, chunks=(64, 4)) for name, a in (("m", masks), ("o", outputs))]
    for other in (
        fit(*stored, block_rows=64),
        fit(dask.array.from_array(masks), dask.array.from_array(outputs)),
        fit(masks.astype(np.float32), outputs.astype(np.float32), threads=1, block_rows=17),
    ):
        np.testing.assert_array_equal(other.weight, plain.weight)
        np.testing.assert_array_equal(other.bias, plain.bias)


def test_a_fit_from_merged_moments_equals_one_from_the_rows(problem):
    masks, outputs, _ = problem
    parts = [Moments.of(masks, outputs, start=i, stop=j) for i, j in ((0, 500), (500, 1350), (1350, 1500))]
    np.testing.assert_array_equal(
        fit_moments(parts[0] + parts[1], parts[2]).weight, fit(masks, outputs, validation=0.1).weight
    )


def test_folds_choose_the_median_of_their_lams_of_least_error(problem):
    masks, outputs, _ = problem
    masks, outputs = masks[:203], outputs[:203].astype(np.float64)
    dm = fit(masks, outputs, folds=3, patience=100, tol=1e-5)
    whole = Moments.of(masks, outputs)
    lams = lasso.lambda_grid(Space.of(whole).cross(whole, slice(0, 4)), n_lams=100, ratio=1e-2)
    ends = [0, 67, 135, 203]
    for t in range(4):
        errors, best = np.zeros(100), []
        for start, stop in itertools.pairwise(ends):
            held_out = np.arange(203)[start:stop]
            x, y = np.delete(masks, held_out, axis=0).astype(float), np.delete(outputs[:, t], held_out)
            mean, scale, y_mean = x.mean(axis=0), x.std(axis=0), y.mean()
            _, weights, _ = lasso_path((x - mean) / scale, y - y_mean, alphas=lams[t], tol=1e-10, max_iter=100_000)
            predicted = (masks[held_out] - mean) / scale @ weights + y_mean
            of_fold = ((outputs[held_out, t][:, None] - predicted) ** 2).sum(axis=0)
            errors += of_fold
            best.append(int(of_fold.argmin()))
        chosen = sorted(best)[1]
        assert dm.lam[t] == pytest.approx(lams[t, chosen])
        assert dm.validation_error[t] == pytest.approx(errors[chosen] / 203, rel=1e-4)
    assert (dm.certificate.gap < 1e-4).all()


def test_folds_of_moments_equal_folds_of_rows_whatever_the_threads(problem):
    masks, outputs, _ = problem
    parts = [Moments.of(masks, outputs, start=i, stop=i + 500) for i in (0, 500, 1000)]
    expected = fit(masks, outputs, folds=3, threads=1)
    got = fit_folds(parts, threads=2)
    for name in ("weight", "bias", "lam", "validation_error"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


@pytest.mark.parametrize(("n_models", "folds"), [(20, 1), (20, 11), (3, 2)])
def test_folds_that_cannot_be_are_refused(n_models, folds):
    masks, outputs, _ = planted(n_models, 10, 1)
    with pytest.raises(SpecError, match=f"cannot be cut into {folds} folds"):
        fit(masks, outputs, folds=folds)


def test_planted_weights_are_approached_as_fast_as_theory_says():
    """The error of LASSO weights falls as the square root of the number of models (Bickel, Ritov, Tsybakov, 2009)."""
    masks, outputs, truth = planted(24_000, 60, 8, noise=1.0, dtype=np.float32)
    errors = [np.abs(fit(masks[:n], outputs[:n]).weight - truth).mean() for n in (1500, 6000, 24_000)]
    for more, fewer in zip(errors[1:], errors, strict=False):
        assert 1.5 < fewer / more < 2.7


def test_constant_examples_and_targets_get_zero_weights_and_a_bias(problem):
    masks, outputs, _ = problem
    masks, outputs = masks.copy(), outputs.astype(np.float32)
    masks[:, 3], masks[:, 7] = True, False
    outputs[:, 1] = 0.1
    dm = fit(masks, outputs)
    assert not dm.weight[[3, 7]].any()
    assert not dm.weight[:, 1].any()
    assert dm.bias[1] == pytest.approx(0.1)
    assert dm.certificate.gap[1] == dm.certificate.kkt[1] == 0
    assert dm.weight[:, [0, 2, 3]].any(axis=0).all()


def test_a_target_that_varies_in_the_validation_rows_alone_is_silenced_and_certified():
    masks, outputs, _ = planted(200, 20, 2)
    outputs[:180, 0] = 1
    dm = fit(masks, outputs)
    assert not dm.weight[:, 0].any()
    assert dm.lam[0] > 0
    assert dm.certificate.kkt[0] < 1e-6


def test_a_large_offset_changes_the_bias_and_nothing_else(problem):
    masks, outputs, _ = problem
    outputs = outputs.astype(np.float64) / 10
    plain, offset = fit(masks, outputs), fit(masks, outputs + 1e6)
    assert plain.weight.any(axis=0).all()
    np.testing.assert_allclose(offset.weight, plain.weight, atol=1e-5)
    np.testing.assert_allclose(offset.lam, plain.lam, rtol=1e-5)
    np.testing.assert_allclose(offset.bias, plain.bias + 1e6, rtol=1e-6)
    parts = [Moments.of(masks, outputs + 1e6, start=i, stop=j) for i, j in ((0, 500), (500, 1350), (1350, 1500))]
    np.testing.assert_allclose(fit_moments(parts[1] + parts[0], parts[2]).weight, plain.weight, atol=1e-5)


def test_a_fit_whose_sweeps_run_out_is_warned_of_or_refused_naming_its_targets(problem):
    masks, outputs, _ = problem
    few = {"tol": 1e-12, "n_lams": 3}  # beyond what float32 can reach
    with pytest.warns(RuntimeWarning, match=r"of 2 targets did not reach tol 1e-12 .*duality gap is at most"):
        assert fit(masks[:200], outputs[:200, :2], **few).certificate.gap.max() < 1e-4
    with pytest.raises(ConvergenceError, match="larger tol") as caught:
        fit(masks[:200], outputs[:200, :2], strict=True, **few)
    assert set(caught.value.targets) <= {0, 1}
    assert caught.value.targets
    fit(masks[:200], outputs[:200, :2], strict=True)


def test_fewer_models_than_examples_are_fitted_and_certified():
    masks, outputs, _ = planted(60, 150, 3)
    dm = fit(masks, outputs, validation=0.2)
    assert np.isfinite(dm.weight).all()
    assert (dm.certificate.gap < 1e-3).all()


def test_pure_noise_is_explained_by_next_to_nothing():
    rng = np.random.default_rng(0)
    masks, outputs = rng.random((1000, 40)) < 0.5, rng.standard_normal((1000, 5))
    dm = fit(masks, outputs)
    assert np.abs(dm.predict(masks) - outputs.mean(axis=0)).std() < 0.2


def test_progress_tells_stages_and_ends_complete(problem):
    masks, outputs, _ = problem
    seen = {}
    fit(
        masks,
        outputs,
        block_rows=400,
        progress=lambda stage, done, total: seen.setdefault(stage, []).append((done, total)),
    )
    assert list(seen) == ["moments", "paths", "refit"]
    assert seen["moments"] == [(400, 1500), (800, 1500), (1200, 1500), (1350, 1500), (1500, 1500)]
    assert seen["paths"] == seen["refit"] == [(i, 4) for i in range(1, 5)]


def test_predictions_do_not_depend_on_the_block(problem, fitted):
    masks, _, _ = problem
    expected = masks.astype(np.float32) @ fitted.weight + fitted.bias
    np.testing.assert_allclose(fitted.predict(masks, block_rows=37), expected, rtol=1e-5)
    assert fitted.predict(masks[:0]).shape == (0, 4)


def test_a_saved_file_is_the_releases_form_and_loads_again(fitted, tmp_path):
    path = fitted.save(tmp_path / "datamodels" / "test_50pct.pt")
    assert [p.name for p in path.parent.iterdir()] == ["test_50pct.pt"]
    raw = torch.load(path, weights_only=True)
    assert {name: (tuple(v.shape), v.dtype) for name, v in raw.items()} == {
        "weight": ((60, 4), torch.float32),
        "bias": ((4,), torch.float32),
        "lam": ((4,), torch.float32),
        "gap": ((4,), torch.float64),
        "kkt": ((4,), torch.float64),
        "validation_error": ((4,), torch.float64),
        "fitted_masks": ((len(fitted.fitted_masks),), torch.int64),
        **{f"limit_{name}": ((4,), torch.float64) for name in ("variance", "linear", "error")},
    }
    loaded = Datamodels.load(path)
    for name in ("weight", "bias", "lam", "validation_error"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(fitted, name))
    np.testing.assert_array_equal(loaded.certificate.gap, fitted.certificate.gap)
    np.testing.assert_array_equal(loaded.certificate.kkt, fitted.certificate.kkt)
    np.testing.assert_array_equal(loaded.limit.left, fitted.limit.left)
    np.testing.assert_array_equal(Datamodels.load(path, targets=slice(1, 3)).limit.error, fitted.limit.error[1:3])


def test_a_file_of_the_release_has_no_certificate(fitted, tmp_path):
    bare = Datamodels(weight=fitted.weight, bias=fitted.bias, lam=fitted.lam)
    loaded = Datamodels.load(bare.save(tmp_path / "released.pt"))
    assert loaded.certificate is None
    assert loaded.validation_error is None


def test_weights_turned_to_the_other_space_and_back_predict_the_same(problem, fitted):
    masks, _, _ = problem
    mean = masks.mean(axis=0)
    turned = fitted.to_standardised(mean=mean)
    assert turned.space == "standardised"
    by_hand = (masks - mean) / masks.std(axis=0) @ turned.weight + turned.bias
    np.testing.assert_allclose(by_hand, fitted.predict(masks), atol=1e-4)
    back = turned.to_raw(mean=mean)
    np.testing.assert_allclose(back.weight, fitted.weight, atol=1e-6)
    np.testing.assert_allclose(back.bias, fitted.bias, atol=1e-4)
    assert fitted.to_raw(mean=0.5) is fitted
    assert turned.to_standardised(mean=0.5) is turned
    with pytest.raises(SpecError, match=r"turn them with \.to_raw"):
        turned.predict(masks)


def test_an_example_in_all_subsets_has_no_standardised_weight(fitted):
    mean = np.full(60, 0.5)
    mean[3] = 1
    assert not fitted.read_as("standardised").to_raw(mean=mean).weight[3].any()
    assert np.isfinite(fitted.to_standardised(mean=mean).to_raw(mean=mean).weight).all()


def test_a_saved_file_says_which_space_it_is_in_and_the_reader_may_overrule_it(fitted, tmp_path):
    path = fitted.to_standardised(mean=0.5).save(tmp_path / "turned.pt")
    assert Datamodels.load(path).space == "standardised"
    assert Datamodels.load(path, space="raw").space == "raw"
    assert Datamodels.load(fitted.save(tmp_path / "raw.pt")).space == "raw"
    with pytest.raises(SpecError, match="choose raw or standardised"):
        Datamodels.load(path, space="cooked")


@pytest.mark.parametrize("mean", [1.5, -0.1, np.nan, np.full(59, 0.5)])
def test_a_mean_that_is_no_share_is_refused(fitted, mean):
    with pytest.raises(SpecError, match="not a share of subsets"):
        fitted.to_standardised(mean=mean)


@pytest.mark.parametrize("targets", [slice(1, 3), np.array([3, 0])])
def test_some_targets_are_read_alone(fitted, tmp_path, targets):
    path = fitted.save(tmp_path / "all.pt")
    some = Datamodels.load(path, targets=targets)
    np.testing.assert_array_equal(some.weight, fitted.weight[:, targets])
    for name in ("bias", "lam", "validation_error"):
        np.testing.assert_array_equal(getattr(some, name), getattr(fitted, name)[targets])
    np.testing.assert_array_equal(some.certificate.gap, fitted.certificate.gap[targets])


def test_a_transposed_or_half_precision_tensor_is_read_as_it_is_meant(fitted, tmp_path):
    path = tmp_path / "turned.pt"
    weight = torch.from_numpy(fitted.weight.T.copy()).T
    bias, lam = torch.from_numpy(fitted.bias).double(), torch.from_numpy(fitted.lam).double()
    torch.save({"weight": weight, "bias": bias, "lam": lam}, path)
    loaded = Datamodels.load(path)
    np.testing.assert_array_equal(loaded.weight, fitted.weight)
    np.testing.assert_array_equal(loaded.bias, fitted.bias)


def test_a_failed_save_leaves_the_old_file_and_nothing_beside_it(fitted, tmp_path, monkeypatch):
    path = fitted.save(tmp_path / "dm.pt")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=f"{path} cannot be written .No space left.*; make room"):
        fitted.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("n_bytes", [0, 1000, 2000])
def test_a_disk_that_is_full_amid_a_file_is_told_in_the_systems_words(fitted, tmp_path, n_bytes):
    path = tmp_path / "dm.pt"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        with pytest.raises(RunError, match="File too large"):
            fitted.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_would_not_be_read_again_is_refused_before_anything_is_written(fitted, tmp_path):
    for name in ("x.bin", "x", "x.PT"):
        with pytest.raises(SpecError, match=f"choose {name}.pt"):
            fitted.save(tmp_path / "new" / name)
    assert list(tmp_path.iterdir()) == []


def test_a_pt_file_with_code_in_it_is_refused_and_not_run(tmp_path):
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(trace),)

    torch.save({"weight": Evil(), "bias": 1, "lam": 1}, path)
    with pytest.raises(FormatError, match=r"evil\.pt"):
        Datamodels.load(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(FormatError, match=r"evil\.pt"):
        Datamodels.load(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, "holds no array"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(3), "lam": torch.zeros(2)}, r"bias \(3,\)"),
        ({"weight": torch.zeros(3), "bias": torch.zeros(2), "lam": torch.zeros(2)}, r"weight \(3,\)"),
        ({n: torch.zeros(s, dtype=torch.int64) for n, s in (("weight", (3, 2)), ("bias", 2), ("lam", 2))}, "int64"),
    ],
)
def test_tensors_that_are_no_datamodels_are_refused(tmp_path, tensors, said):
    path = tmp_path / "other.pt"
    torch.save(tensors, path)
    with pytest.raises(FormatError, match=said):
        Datamodels.load(path)


def test_a_truncated_or_missing_file_is_named(fitted, tmp_path):
    path = fitted.save(tmp_path / "dm.pt")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"dm\.pt"):
        Datamodels.load(path)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("hello", "world")
    path.write_bytes(buffer.getvalue())
    with pytest.raises(FormatError, match=r"dm\.pt"):
        Datamodels.load(path)
    with pytest.raises(ObjectMissingError, match=r"gone\.pt"):
        Datamodels.load(tmp_path / "gone.pt")


class Unreadable:
    """Has a shape, and fails when read: shows that a check came first."""

    def __init__(self, *shape):
        self.shape = shape

    def __getitem__(self, rows):
        raise AssertionError("read before it was checked")


@pytest.mark.parametrize(
    ("masks", "outputs", "settings", "said"),
    [
        ((100, 5), (99, 2), {}, "100 masks but 99 rows"),
        ((100,), (100, 2), {}, "n_models, n_train"),
        ((100, 5), (100,), {}, "one number a target"),
        ((10, 5), (10, 2), {}, "9 to fit and 1 to validate"),
        ((1, 5), (1, 2), {}, "0 to fit"),
        ((100, 5), (100, 2), {"validation": 0.0}, "validation 0.0"),
        ((100, 5), (100, 2), {"validation": 1.5}, "validation 1.5"),
        ((100, 5), (100, 2), {"validation": float("nan")}, "validation nan"),
        ((100, 5), (100, 2), {"n_lams": 0}, "n_lams is 0"),
        ((100, 5), (100, 2), {"lam_ratio": 1.0}, "lam_ratio is 1.0"),
        ((100, 5), (100, 2), {"tol": 0.0}, "tol is 0.0"),
        ((100, 5), (100, 2), {"patience": 0}, "patience is 0"),
        ((100, 5), (100, 2), {"threads": 0}, "threads is 0"),
        ((100, 5), (100, 2), {"block_rows": 0}, "block_rows is 0"),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_anything_is_read(masks, outputs, settings, said):
    with pytest.raises(SpecError, match=said):
        fit(Unreadable(*masks), Unreadable(*outputs), **settings)


def test_bad_values_are_refused_by_row(problem):
    masks, outputs, _ = problem
    outputs = outputs.copy()
    outputs[1400, 2] = np.nan
    with pytest.raises(SpecError, match="rows 1400, targets 2"):
        fit(masks, outputs)
    with pytest.raises(SpecError, match="2 at row 0"):
        fit(masks.astype(int) * 2, outputs[:, :1])


def test_lists_are_refused_with_what_to_hand_in(problem, fitted):
    masks, outputs, _ = problem
    with pytest.raises(SpecError, match="such as numpy"):
        fit(masks.tolist(), outputs.tolist())
    with pytest.raises(SpecError, match="such as numpy"):
        fitted.predict(masks.tolist())


def test_predicting_masks_of_another_width_is_refused(fitted):
    with pytest.raises(SpecError, match=r"expect \(n_models, 60\)"):
        fitted.predict(np.ones((3, 59), bool))


def test_a_repr_says_sizes_and_sparsity(fitted):
    assert repr(fitted).startswith("<Datamodels: 4 targets, 60 examples, ")
