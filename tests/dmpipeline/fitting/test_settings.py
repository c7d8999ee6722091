"""The settings of a fit: taken whole or by keyword, checked once, and the names of kept work that follow from them."""

import dataclasses

import numpy as np
import pytest
import torch

from dmpipeline import FitSettings, fit
from dmpipeline.errors import SpecError
from dmpipeline.fitting.checkpoints import Checkpoints
from dmpipeline.fitting.settings import FitKeywords


def test_every_field_is_a_keyword_of_the_same_type():
    fields = {field.name: field.type for field in dataclasses.fields(FitSettings)}
    assert FitKeywords.__annotations__ == fields


def test_keywords_take_the_place_of_fields():
    rng = np.random.default_rng(0)
    masks = rng.random((200, 8)) < 0.5
    outputs = masks @ rng.standard_normal((8, 2)) + 0.1 * rng.standard_normal((200, 2))
    by_keyword = fit(masks, outputs, is_positive=True, n_lams=20)
    whole = fit(masks, outputs, settings=FitSettings(is_positive=True, n_lams=20))
    both = fit(masks, outputs, settings=FitSettings(n_lams=20), is_positive=True)
    for other in (whole, both):
        np.testing.assert_array_equal(other.weight, by_keyword.weight)
        np.testing.assert_array_equal(other.lam, by_keyword.lam)


@pytest.mark.parametrize(
    "settings",
    [{"n_lams": 0}, {"lam_ratio": 1.0}, {"tol": 0.0}, {"patience": 0}, {"max_sweeps": 0}, {"block_targets": 0}],
)
def test_a_value_out_of_range_is_refused_by_name(settings):
    (name,) = settings
    with pytest.raises(SpecError, match=f"^{name} is .*; choose ") as refused:
        FitSettings(**settings)
    assert refused.value.field == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_lams", "5"),
        ("n_lams", 5.5),
        ("max_sweeps", np.inf),
        ("tol", 10**400),
        ("tol", np.nan),
        ("n_lams", True),
        ("is_positive", 1),
        ("tol", None),
        ("threads", "2"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(name, value):
    with pytest.raises(SpecError, match=f"^{name} is {value!r}; expected "):
        FitSettings(**{name: value})


def test_numbers_of_numpy_are_taken_as_pythons_and_what_was_set_is_told():
    settings = FitSettings(n_lams=20.0, tol=np.float32(0.25), is_positive=np.True_, lam_ratio=0.01)
    assert settings == FitSettings(n_lams=20, tol=0.25, is_positive=True)
    assert settings.changed() == {"is_positive": True, "n_lams": 20, "tol": 0.25}
    assert {type(value) for value in settings.changed().values()} == {bool, int, float}
    assert FitSettings(tol=1e-3).changed() == {}


def test_a_device_is_named_or_handed_in_as_torch_has_it():
    assert FitSettings(device=torch.device("cpu")) == FitSettings(device="cpu")
    for device in (0, "gpu"):
        with pytest.raises(SpecError, match="device"):
            FitSettings(device=device)


def test_an_unknown_keyword_is_refused():
    with pytest.raises(TypeError, match="tolerance"):
        fit(np.ones((4, 1), bool), np.ones((4, 1)), tolerance=0.1)


def test_fits_that_were_interrupted_keep_the_names_of_their_directories(tmp_path):
    """Else they would be solved again after an upgrade."""
    place = Checkpoints(tmp_path)
    ranges = [(0, 720), (720, 900)]
    assert place.under("fit", FitSettings().key, None, ranges, "ab").directory.name == "fit-68fbfaa8ff3e4f60"
    other = FitSettings(is_positive=True, n_lams=50, lam_ratio=0.05, tol=1e-4, patience=3)
    assert place.under("fit", other.key, None, ranges, "ab").directory.name == "fit-7c93dc7b97850e57"
    assert FitSettings(block_targets=3).key != FitSettings().key
