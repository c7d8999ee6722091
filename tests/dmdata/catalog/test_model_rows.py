"""A lazy array of a catalog knows which of its rows are models to fit on, and which are held out."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import yaml
from small_release import write_locally

import dmdata

N_MODELS = 20
RNG = np.random.default_rng(0)
RELEASE = {
    "toy/50pct/train_masks": RNG.integers(0, 2, (N_MODELS, 12)).astype(bool),
    "toy/50pct/test_margins": RNG.normal(size=(N_MODELS, 5)).astype(np.float16),
}
DIMS = {"train_masks": ["model", "train_example"], "test_margins": ["model", "test_example"]}


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    return with_rows(write_locally(RELEASE, tmp_path), fit=[0, 14], evaluation=[14, 20], n_retrainings=3)


def with_rows(path: str | Path, **rows: object) -> Path:
    """Give the toy catalog's arrays the names of their dimensions, and say what their rows are for."""
    path = Path(path)
    document = yaml.safe_load(path.read_text())
    alpha = document["datasets"]["toy"]["alphas"]["50pct"]
    alpha["rows"], alpha["basis"]["rows"] = rows, "measured"
    for name, array in alpha["arrays"].items():
        array["dims"] = DIMS[name]
    path.write_text(yaml.safe_dump(document))
    return path


def test_rows_select_the_models_to_fit_on_and_those_held_out(catalog: Path) -> None:
    masks = dmdata.open("toy/50pct/train_masks", catalog=catalog)
    whole = RELEASE["toy/50pct/train_masks"]
    assert isinstance(masks.rows, dmdata.ModelRows)
    assert (masks.rows.fit, masks.rows.evaluation, masks.rows.n_retrainings) == (slice(0, 14), slice(14, 20), 3)
    np.testing.assert_array_equal(masks[masks.rows.fit], whole[:14])
    np.testing.assert_array_equal(masks[masks.rows.evaluation], whole[14:])
    np.testing.assert_array_equal(masks.oindex[masks.rows.evaluation, [3, 1]], whole[14:][:, [3, 1]])


def test_rows_travel_with_the_array(catalog: Path) -> None:
    margins = dmdata.open("toy/50pct/test_margins", catalog=catalog, progress=False)
    for other in (pickle.loads(pickle.dumps(margins)), copy.copy(margins), margins.without_progress()):
        assert other.rows == margins.rows
        np.testing.assert_array_equal(other[other.rows.evaluation], RELEASE["toy/50pct/test_margins"][14:])


def test_the_released_models_to_evaluate_on_are_the_last_ten_thousand() -> None:
    for artifact in dmdata.load_catalog().artifacts():
        if artifact.schema is not None and artifact.schema.dims[0] == "model":
            assert artifact.rows is not None
            assert artifact.rows.evaluation == (artifact.schema.shape[0] - 10_000, artifact.schema.shape[0])


def test_what_no_catalog_speaks_of_has_no_rows(catalog: Path, tmp_path: Path) -> None:
    (stored,) = tmp_path.rglob("*train_masks*.npy")
    assert dmdata.open(stored).rows is None
    document = yaml.safe_load(catalog.read_text())
    del document["datasets"]["toy"]["alphas"]["50pct"]["rows"]
    del document["datasets"]["toy"]["alphas"]["50pct"]["basis"]["rows"]
    catalog.write_text(yaml.safe_dump(document))
    assert dmdata.open("toy/50pct/train_masks", catalog=catalog).rows is None


def test_slabs_of_bytes_are_no_models(catalog: Path) -> None:
    assert dmdata.open("toy/50pct/train_masks", catalog=catalog).slabs(12).rows is None


def test_an_array_with_fewer_rows_than_its_catalog_says_does_not_offer_rows_it_lacks(catalog: Path) -> None:
    with_rows(catalog, fit=[0, 14], evaluation=[14, 24], n_retrainings=1)
    assert dmdata.open("toy/50pct/train_masks", catalog=catalog).rows is None


def test_roles_are_told_row_by_row() -> None:
    rows = dmdata.ModelRows(fit=slice(0, 4), evaluation=slice(6, 8), n_retrainings=2)
    assert rows.role_of(range(9)).tolist() == ["fit"] * 4 + [""] * 2 + ["evaluation"] * 2 + [""]


def test_a_mirror_keeps_what_its_rows_are_for(catalog: Path, tmp_path: Path) -> None:
    dmdata.mirror("toy/50pct/*", tmp_path / "mirror", catalog=catalog)
    margins = dmdata.open(tmp_path / "mirror" / "toy/50pct/test_margins")
    assert margins.rows == dmdata.open("toy/50pct/test_margins", catalog=catalog).rows
    np.testing.assert_array_equal(margins[margins.rows.evaluation], RELEASE["toy/50pct/test_margins"][14:])


@pytest.mark.parametrize(
    ("copied", "fit", "evaluation"),
    [
        (slice(0, 10), slice(0, 10), slice(0, 0)),
        (slice(4, 20), slice(0, 10), slice(10, 16)),
        (slice(17, 20), slice(0, 0), slice(0, 3)),
        (slice(10, 17), slice(0, 4), slice(4, 7)),
        (slice(10, 18), None, None),
        (slice(15, 20), None, None),
        (slice(0, 20, 2), None, None),
        ([3, 4, 5], None, None),
    ],
)
def test_a_mirror_of_some_rows_knows_what_is_true_of_those(
    catalog: Path, tmp_path: Path, copied: object, fit: slice | None, evaluation: slice | None
) -> None:
    dmdata.open("toy/50pct/train_masks", catalog=catalog).mirror(tmp_path / "mirror", rows=copied, progress=False)
    mirrored = dmdata.open(tmp_path / "mirror")
    if fit is None or evaluation is None:
        assert mirrored.rows is None
    else:
        assert mirrored.rows == dmdata.ModelRows(fit, evaluation, 3)
        whole = RELEASE["toy/50pct/train_masks"][copied]
        np.testing.assert_array_equal(mirrored[mirrored.rows.fit], whole[fit])
