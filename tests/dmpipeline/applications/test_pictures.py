"""Pictures of answers are files of the kind that is named, and say in words what they show."""

import pytest
from planted_run import planted_weight

import dmpipeline
from dmpipeline import SpecError
from dmpipeline.applications.counterfactuals import Case, removal_order
from dmpipeline.applications.pictures import draw_counterfactuals, draw_support


def test_the_curve_of_support_is_drawn_with_what_is_estimated_and_what_is_certified(planted, tmp_path):
    found = dmpipeline.data_support(planted, certify=10)
    svg = draw_support(found, tmp_path / "support.svg").read_text()
    assert "Of 12 targets 50% flip by the estimate, 50% are certified or wrong as they are." in svg
    assert "certified by 10 retrainings" in svg
    assert draw_support(found, tmp_path / "support.png").read_bytes().startswith(b"\x89PNG")
    estimated = draw_support(dmpipeline.data_support(planted), tmp_path / "estimated.svg").read_text()
    assert "certified" not in estimated
    with pytest.raises(SpecError, match=r"neither an \.svg nor a \.png"):
        draw_support(found, tmp_path / "support.pdf")


def test_measured_changes_are_drawn_against_predicted_ones(planted, tmp_path):
    weight = planted_weight()
    cases = [Case(target, tuple(removal_order(weight[:, target])[:2].tolist())) for target in range(4)]
    answers = dmpipeline.counterfactuals(planted, cases, 5)
    svg = draw_counterfactuals(answers, tmp_path / "changes.svg").read_text()
    assert "Measured against predicted changes of 4 sets" in svg
    with pytest.raises(SpecError, match="nothing was retrained"):
        draw_counterfactuals(dmpipeline.counterfactuals(planted, cases), tmp_path / "changes.svg")
