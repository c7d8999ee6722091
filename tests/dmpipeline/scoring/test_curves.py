"""Learning curves: equal to separate fits, each row read once; their picture; `curve` and `evaluate --compare`."""

import gc
import html
import json
import math
import re
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
from one_curve import learning_curve

import dmdata
from dmpipeline.cli.command import main, saving_in_words
from dmpipeline.errors import RunError, SpecError
from dmpipeline.figures.curve_picture import curve_figure, draw_curves
from dmpipeline.fitting import fitting
from dmpipeline.fitting.fitting import fit, fit_moments
from dmpipeline.moments.moments import Moments
from dmpipeline.runs.store import Run
from dmpipeline.scoring.alternatives import ridge
from dmpipeline.scoring.curves import CurvePoint, LearningCurve
from dmpipeline.scoring.evaluation import evaluate
from dmpipeline.scoring.learning import default_counts, learning_curves
from dmpipeline.workflow import artifact_name, curve_run, load_curves

QUICK = {"n_bootstraps": 50, "n_splits": 10}
N_TRAIN, N_TARGETS, R = 30, 4, 3


@pytest.fixture(scope="module")
def work():
    """Masks and float16 outputs of 600 models and of 20 held-out subsets, three retrainings each, and the truth."""
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((N_TRAIN, N_TARGETS)) * (rng.random((N_TRAIN, N_TARGETS)) < 0.3)
    masks = rng.random((600, N_TRAIN)) < 0.5
    held_out = np.repeat(rng.random((20, N_TRAIN)) < 0.5, R, axis=0)
    rows = np.vstack([masks, held_out])
    outputs = (rows @ truth + 2 * rng.standard_normal((len(rows), N_TARGETS)) + 5).astype(np.float16)
    return masks, outputs[:600], held_out, outputs[600:], truth


class Counted:
    """An array that notes which rows are asked for."""

    def __init__(self, array):
        self.array, self.shape, self.asked = array, array.shape, []

    def __getitem__(self, rows):
        self.asked.extend(range(*rows.indices(len(self.array))))
        return self.array[rows]


def keeping(estimate, kept):
    """Have an estimate note what it gives."""

    def kept_estimate(fitting, held_out):
        kept.append(estimate(fitting, held_out))
        return kept[-1]

    return kept_estimate


def curve(*lds, counts=(100, 200, 400), ceiling=0.9):
    points = [CurvePoint(n, value, value - 0.02, value + 0.02, 0.3, 5.0) for n, value in zip(counts, lds, strict=True)]
    return LearningCurve(tuple(points), ceiling, 0.95)


COUNTS = {
    "apart": ([40, 100, 600], 0.1),
    "one's validation rows among another's": ([300, 306, 320, 600], 0.1),
    "one ends where another begins": ([180, 200, 222], 0.1),
    "two begin at the same row": ([99, 100, 500], 0.5),
    "one point": ([600], 0.2),
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_point_is_exactly_a_fit_of_the_first_models_and_each_row_is_read_once(work, name):
    masks, outputs, held_out, truth, _ = work
    counts, validation = COUNTS[name]
    read = [Counted(array) for array in (masks, outputs, held_out, truth)]
    kept, of_ridge = [], []
    estimates = {"lasso": keeping(fit_moments, kept), "ridge": keeping(ridge, of_ridge)}
    settings = {"n_retrainings": R, **QUICK}
    drawn = learning_curves(*read, estimates=estimates, counts=counts, validation=validation, block_rows=64, **settings)
    for array in read:
        assert sorted(array.asked) == list(range(counts[-1] if array in read[:2] else len(held_out)))
    assert drawn["lasso"].counts == drawn["ridge"].counts == tuple(counts)
    assert len(of_ridge) == len(counts)
    for n, datamodels, point in zip(counts, kept, drawn["lasso"].points, strict=True):
        expected = fit(masks[:n], outputs[:n], validation=validation)
        for part in ("weight", "bias", "lam", "validation_error"):
            np.testing.assert_array_equal(getattr(datamodels, part), getattr(expected, part))
        scores = evaluate(expected, held_out, truth, **settings)
        assert (point.lds, point.lds_low, point.lds_high) == (scores.lds, scores.lds_low, scores.lds_high)
        assert point.r2 == scores.r2
        assert drawn["lasso"].lds_ceiling == scores.lds_ceiling
        assert point.nonzero_weights == np.count_nonzero(expected.weight) / N_TARGETS


def test_outputs_far_from_zero_give_what_separate_fits_give_but_for_rounding(work):
    masks, outputs, held_out, truth, _ = work
    outputs, truth = outputs.astype(np.float64) + 1e6, truth.astype(np.float64) + 1e6
    drawn = learning_curve(masks, outputs, held_out, truth, counts=[300, 306, 600], n_retrainings=R, **QUICK)
    for n, lds in zip(drawn.counts, drawn.lds, strict=True):
        assert lds == pytest.approx(evaluate(fit(masks[:n], outputs[:n]), held_out, truth, n_retrainings=R).lds)


@pytest.mark.parametrize(("counts", "held"), [([40, 100, 600], [2, 2, 2]), ([300, 306, 320], [4 + 1, 3 + 1, 2])])
def test_memory_holds_the_moments_of_open_points_and_no_others(work, counts, held):
    gc.collect()
    before = sum(type(thing) is Moments for thing in gc.get_objects())
    seen = []

    def look(fitting, held_out):
        seen.append(sum(type(thing) is Moments for thing in gc.get_objects()) - before)
        return fit_moments(fitting, held_out)

    learning_curves(*work[:4], estimates={"": look}, counts=counts, n_retrainings=R, **QUICK)
    assert seen == held


def test_a_curve_rises_within_its_intervals_and_tells_how_far_it_got(work):
    told = []
    drawn = learning_curve(
        *work[:4], counts=[50, 150, 600], n_retrainings=R, progress=lambda *step: told.append(step), **QUICK
    )
    assert (np.diff(drawn.lds) > 0).all()
    assert all(point.lds_low < point.lds < point.lds_high for point in drawn.points)
    assert all(point.prior_strength is None for point in drawn.points)
    rows = [done for stage, done, in_all in told if stage == "moments" and in_all == 600]
    assert rows == [45, 50, 135, 150, 540, 600]
    assert [step for step in told if step[0] == "points"] == [("points", n, 3) for n in (1, 2, 3)]


def test_a_prior_is_that_of_separate_fits_and_its_strength_is_shown(work, monkeypatch):
    masks, outputs, held_out, truth, weights = work
    weights = weights + 0.2 * np.random.default_rng(4).standard_normal(weights.shape)
    monkeypatch.setattr(fitting, "FEW_MODELS", 300)  # fits of fewer have folds, that of 400 has not
    settings = {"counts": [60, 120, 400], "n_retrainings": R, **QUICK}
    curves = learning_curves(*work[:4], estimates={"plain": fit_moments}, priors={"helped": weights}, **settings)
    plain, helped = curves["plain"], curves["helped"]
    assert plain == learning_curve(*work[:4], **settings)
    for point in helped.points:
        expected = fit(masks[: point.n_models], outputs[: point.n_models], prior=weights)
        assert point.prior_strength > 0
        assert point.prior_strength == expected.prior_strength
        assert point.lds == evaluate(expected, held_out, truth, n_retrainings=R, **QUICK).lds
    assert helped.points[-1].prior_strength > 0
    assert "prior strength" in str(helped)
    assert "prior strength" not in str(plain)
    with pytest.raises(SpecError, match="prior has shape"):
        learning_curves(*work[:4], estimates={}, priors={"": weights[1:]}, **settings)
    with pytest.raises(SpecError, match="priors have names of estimates, plain; choose others"):
        learning_curves(*work[:4], estimates={"plain": ridge}, priors={"plain": weights}, **settings)


def test_no_weight_is_negative_where_only_positive_ones_are_allowed(work):
    masks, outputs, held_out, truth, _ = work
    drawn = learning_curve(*work[:4], counts=[200], n_retrainings=R, is_positive=True, **QUICK)
    expected = evaluate(fit(masks[:200], outputs[:200], is_positive=True), held_out, truth, n_retrainings=R, **QUICK)
    assert drawn.points[0].lds == expected.lds


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"counts": [200, 100]}, "counts are 200, 100; .* in rising order"),
        ({"counts": [100, 100]}, "in rising order"),
        ({"counts": []}, "counts are empty"),
        ({"counts": [-5, 100]}, "in rising order"),
        ({"counts": [100, 601]}, "up to 601, but there are 600 models; .* train more"),
        ({"counts": [10, 100]}, "begin too low at 10: .* leave 9 to fit and 1 to validate.* or begin with more"),
        ({"counts": [100.5]}, "whole numbers"),
        ({"counts": [100], "validation": 1.5}, "validation 1.5 is not a share"),
    ],
)
def test_counts_that_cannot_be_used_are_refused_before_anything_is_read(work, changes, words):
    read = [Counted(array) for array in work[:4]]
    with pytest.raises(SpecError, match=words):
        learning_curve(*read, n_retrainings=R, **changes)
    assert not any(array.asked for array in read)


def test_held_out_models_of_another_run_and_no_estimates_are_refused(work):
    masks, outputs, held_out, truth, _ = work
    with pytest.raises(SpecError, match="held-out models of the same run"):
        learning_curve(masks, outputs, held_out[:, 1:], truth, counts=[100])
    with pytest.raises(SpecError, match="no estimates"):
        learning_curves(masks, outputs, held_out, truth, estimates={}, counts=[100])


@pytest.mark.parametrize(
    ("n_models", "counts"),
    [(4000, [250, 400, 630, 1000, 1600, 2500, 4000]), (60, [15, 24, 38, 60]), (5, [5]), (1234, 7)],
)
def test_counts_are_spaced_evenly_and_end_with_all_models(n_models, counts):
    given = default_counts(n_models)
    assert given == counts if isinstance(counts, list) else len(given) == counts
    assert given[-1] == n_models


@pytest.mark.parametrize(
    ("lds", "n_models"),
    [(0.5, 100), (0.6, 100 * 2**0.5), (0.7, 200), (0.75, 200 * 2**0.5), (0.8, 400), (0.81, None), (0.49, None)],
)
def test_models_for_an_lds_are_interpolated_in_their_logarithm(lds, n_models):
    found = curve(0.5, 0.7, 0.8).models_for(lds)
    assert math.isnan(found) if n_models is None else found == pytest.approx(n_models)


def test_a_curve_that_falls_again_is_read_where_it_first_gets_there():
    assert curve(0.5, 0.7, 0.6).models_for(0.7) == 200
    assert curve(0.5, 0.5, 0.5).models_for(0.5) == 100


def test_a_curve_comes_back_from_json_and_prints_as_a_table(work):
    drawn = learning_curve(*work[:4], counts=[60, 120], n_retrainings=R, prior=work[4], **QUICK)
    assert LearningCurve.from_dict(json.loads(json.dumps(drawn.as_dict(), allow_nan=False))) == drawn
    assert [row["n_models"] for row in drawn.as_rows()] == [60, 120]
    lines = str(drawn).splitlines()
    assert lines[0].split()[:2] == ["models", "LDS"]
    assert lines[2].split()[:2] == ["120", f"{drawn.lds[1]:.3f}"]
    assert repr(drawn) == "<LearningCurve: 2 points, 60 to 120 models>"


def test_what_is_not_defined_is_null_in_json(work):
    masks, outputs, held_out, truth, _ = work
    drawn = learning_curve(masks, outputs, held_out[::R], truth[::R], counts=[60], n_bootstraps=0)
    data = json.loads(json.dumps(drawn.as_dict(), allow_nan=False))
    assert data["lds_ceiling"] is data["points"][0]["lds_low"] is None
    assert math.isnan(LearningCurve.from_dict(data).lds_ceiling)
    assert curve_figure({"plain": drawn}).axes[0].texts[0].get_text() == f"plain {drawn.lds[0]:.3f}"
    constant = learning_curve(masks, outputs, held_out[::R], np.ones((20, N_TARGETS)), counts=[60, 120])
    assert "not defined" in str(constant)
    assert not curve_figure({"plain": constant}).axes[0].texts


GOOD = curve(0.5, 0.7, 0.8).as_dict()


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "curve",
        {},
        GOOD | {"points": []},
        GOOD | {"points": GOOD["points"][::-1]},
        GOOD | {"points": [{"n_models": 100}]},
        GOOD | {"points": [GOOD["points"][0] | {"n_models": 100.5}]},
        GOOD | {"points": [GOOD["points"][0] | {"lds": "high"}]},
        GOOD | {"level": True},
        GOOD | {"level": None},
        GOOD | {"lds_ceiling": math.inf},
        GOOD | {"lds_ceiling": {}},
    ],
)
def test_what_is_no_curve_is_refused(data):
    with pytest.raises(SpecError):
        LearningCurve.from_dict(data)


def test_a_picture_names_curves_counts_and_ceiling_and_turns_dark(tmp_path):
    curves = {"plain": curve(0.5, 0.7, 0.8), "<$prior$> & more": curve(0.6, 0.75, 0.803)}
    path = draw_curves(curves, tmp_path / "curve.svg")
    text = path.read_text()
    root = ElementTree.fromstring(text)  # noqa: S314, our own
    said = [html.unescape("".join(element.itertext())) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for words in ("plain 0.800", "<$prior$> & more 0.803", "100", "200", "400", "noise ceiling 0.900", "LDS"):
        assert words in said
    assert "plain from 0.500 with 100 models to 0.800 with 400" in root.attrib["aria-label"]
    assert "prefers-color-scheme: dark" in text
    assert draw_curves(curves, tmp_path / "again.svg").read_text() == text
    assert draw_curves(curves, tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SpecError, match=r"neither an \.svg nor a \.png"):
        draw_curves(curves, tmp_path / "curve.pdf")
    with pytest.raises(SpecError, match="no curves"):
        draw_curves({}, tmp_path / "none.svg")
    with pytest.raises(RunError, match="cannot be written"):
        draw_curves(curves, tmp_path / "nowhere/curve.svg")


def boxes(texts, figure):
    renderer = figure.canvas.get_renderer()
    return [text.get_window_extent(renderer) for text in texts if text.get_text()]


@pytest.mark.parametrize("counts", [(100, 200, 400), (990, 1000, 1010), tuple(range(100, 1000, 30)), (4000,)])
def test_nothing_written_in_a_picture_overlaps(counts):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    rising = np.linspace(0.5, 0.8, len(counts))
    curves = {f"curve {i}": curve(*(rising + 0.001 * i), counts=counts) for i in range(5)}
    figure = curve_figure(curves)
    FigureCanvasAgg(figure).draw()
    (ax,) = figure.axes
    for texts in (ax.texts, ax.get_xticklabels()):
        places = boxes(texts, figure)
        assert not any(a.overlaps(b) for i, a in enumerate(places) for b in places[:i])
        assert all(figure.bbox.padded(1).contains(*corner) for box in places for corner in box.corners())
    written = [label.get_text() for label in ax.get_xticklabels()]
    assert f"{counts[-1]:,}" in written
    ticks = {*ax.xaxis.get_majorticklocs(), *ax.xaxis.get_minorticklocs()}
    assert ticks == set(counts)


def call(capsys, *arguments):
    """Run a command; return its exit code, its JSON if it printed any, and what it said to people."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    data = json.loads(captured.out) if captured.out.startswith("{") else captured.out
    return ended.value.code, data, captured.err


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small run with datamodels, made once."""
    directory = tmp_path_factory.mktemp("curves") / "run"
    small = ["--models", "80", "--held-out", "4", "--retrainings", "2"]
    for command in (["init", directory, *small], ["run", directory], ["fit", directory]):
        with pytest.raises(SystemExit) as ended:
            main([str(part) for part in [*command, "-q"]])
        assert ended.value.code == 0
    return directory


@pytest.fixture
def run(made, tmp_path):
    """A copy of the small run."""
    return shutil.copytree(made, tmp_path / "run")


def test_the_command_leaves_its_numbers_and_picture_and_the_report_shows_them(run, capsys):
    assert call(capsys, "report", run, "--parts", "support")[0] == 0
    assert '"curves":[]' in (run / "report.html").read_text()
    code, data, _ = call(capsys, "curve", run, "--counts", "20,40,80", "--json", "-q")
    assert code == 0
    assert list(data["curves"]) == ["plain"]
    assert [point["n_models"] for point in data["curves"]["plain"]["points"]] == [20, 40, 80]
    scores = call(capsys, "evaluate", run, "--json")[1]
    assert data["curves"]["plain"]["points"][-1]["lds"] == scores["lds"]
    assert json.loads((run / "curve.json").read_text()) == data["curves"]
    assert ElementTree.parse(data["picture"]).getroot().tag.endswith("svg")  # noqa: S314, our own
    assert load_curves(Run.open(run))["plain"].counts == (20, 40, 80)
    assert call(capsys, "report", run, "--parts", "support")[0] == 0
    page = (run / "report.html").read_text()
    facts = json.loads(re.search(r'id="facts">(.*?)</script>', page, re.DOTALL)[1])
    [curve] = facts["curves"]
    assert (curve["name"], curve["points"]) == ("plain", data["curves"]["plain"]["points"])


def test_a_prior_is_drawn_beside_the_plain_curve_and_what_it_saves_is_said(run, capsys):
    code, data, said = call(capsys, "curve", run, "--prior", "gradient", "--json")
    assert code == 0
    plain, helped = (LearningCurve.from_dict(data["curves"][name]) for name in ("plain", "gradient scores"))
    assert plain.counts == helped.counts == (20, 32, 50, 80)
    assert all(point.prior_strength is not None for point in helped.points)
    needed = helped.models_for(plain.points[-1].lds)
    assert data["models_for_plain_lds"] == (None if math.isnan(needed) else round(needed))
    assert "the LDS that 80 reach without" in said
    assert "curve.svg" in said
    assert "gradient scores from" in (run / "curve.svg").read_text()


@pytest.mark.parametrize(
    ("helped", "words"),
    [
        ((0.6, 0.8, 0.9), "scores 200 models reach the LDS that 400 reach without (0.800): 200 fewer"),
        ((0.81, 0.85, 0.9), "scores fewer than 100 models reach the LDS that 400 reach without (0.800)"),
        ((0.4, 0.5, 0.6), "no number of these models reaches the LDS that 400 reach without"),
    ],
)
def test_what_a_prior_saves_is_stated_from_both_curves(helped, words):
    plain, with_prior = curve(0.5, 0.7, 0.8), curve(*helped)
    assert words in saving_in_words(plain, with_prior, with_prior.models_for(plain.points[-1].lds))


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ("40,20", "rising order"),
        ("40,100", "there are 80 models"),
        ("5,80", "begin too low at 5"),
        ("many", "'many' is not a list of whole numbers"),
        ("", "whole numbers"),
    ],
)
def test_unusable_counts_are_said_in_a_line_and_write_nothing(run, capsys, counts, words):
    code, _, said = call(capsys, "curve", run, "--counts", counts, "--prior", "gradient")
    assert code == 2
    assert words in said
    assert "Traceback" not in said
    assert not (run / "curve.json").exists()


def test_a_prior_nobody_knows_is_refused(run):
    with pytest.raises(SpecError, match="prior is 'graident'; choose gradient"):
        curve_run(Run.open(run), prior="graident")


def test_a_run_without_datamodels_has_a_curve_and_one_without_models_does_not(run, tmp_path, capsys):
    shutil.rmtree(run / "datamodels")
    (run / "catalog.yaml").unlink()
    assert call(capsys, "curve", run, "--counts", "40,80", "-q")[0] == 0
    call(capsys, "init", tmp_path / "new", "--models", "80")
    code, _, said = call(capsys, "curve", tmp_path / "new")
    assert code == 1
    assert "dmpipeline run" in said


@pytest.mark.parametrize("text", ["", "{", "[]", '{"plain": {"points": 3}}', '{"plain": 1}', "\udcff"])
def test_a_damaged_curve_is_said_and_mended_by_drawing_it_again(run, capsys, text):
    (run / "curve.json").write_bytes(text.encode(errors="surrogateescape"))
    code, _, said = call(capsys, "report", run, "--parts", "support")
    assert code == 1
    assert "curve.json is damaged" in said
    assert f"dmpipeline curve {run}" in said
    assert call(capsys, "curve", run, "--counts", "80", "-q")[0] == 0
    assert call(capsys, "report", run, "--parts", "support")[0] == 0


@pytest.mark.parametrize("in_the_way", ["curve.json", "curve.svg"])
def test_a_place_that_cannot_be_written_ends_the_command_in_one_line(run, capsys, in_the_way):
    (run / in_the_way).mkdir()
    code, _, said = call(capsys, "curve", run, "--counts", "80", "-q")
    assert code == 1
    assert said.startswith(f"dmpipeline: {run / in_the_way} cannot be written")
    assert len(said.splitlines()) == 1


def test_a_damaged_chunk_names_the_command_that_finds_it(run, capsys):
    for chunk in (run / "store.zarr/train_masks/c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(b"scrambled")
    for command in (["curve", run], ["evaluate", run, "--compare"]):
        code, _, said = call(capsys, *command, "-q")
        assert code == 1
        assert f"dmpipeline verify {run}" in said


def test_compare_shows_the_saved_datamodels_beside_others_of_the_same_models(run, capsys):
    code, data, _ = call(capsys, "evaluate", run, "--compare", "--json", "-q")
    assert code == 0
    plain = call(capsys, "evaluate", run, "--json", "-q")[1]
    compared = data.pop("comparison")
    assert data == plain
    names = ["saved datamodels", "debiased", "ridge", "difference of means"]
    assert [row["name"] for row in compared] == names
    assert {name: compared[0][name] for name in ("lds", "lds_low", "r2")} == {
        name: plain[name] for name in ("lds", "lds_low", "r2")
    }
    assert compared[0]["nonzero_weights"] == compared[1]["nonzero_weights"] < compared[2]["nonzero_weights"]


def test_compare_takes_the_validation_models_of_the_saved_fit(run, capsys):
    call(capsys, "fit", run, "--validation", "0.25", "-q")
    shown = call(capsys, "evaluate", run, "--compare", "-q")[1]
    names = ["saved datamodels", "debiased", "ridge", "difference of means"]
    assert [line.split("  ")[0].strip() for line in shown.splitlines()[1:]] == names
    data = call(capsys, "evaluate", run, "--compare", "--json", "-q")[1]
    opened = Run.open(run)
    rows, held_out = opened.spec.rows.models, opened.spec.rows.held_out
    masks, margins = (artifact_rows(opened, name) for name in ("train_masks", "test_margins"))
    fitting, validation = (Moments.of(masks[rows], margins[rows], start=i, stop=j) for i, j in ((0, 60), (60, 80)))
    expected = evaluate(ridge(fitting, validation), masks[held_out], margins[held_out], n_retrainings=2)
    assert data["comparison"][2]["r2"] == pytest.approx(expected.r2)


def artifact_rows(run, name):
    return np.asarray(dmdata.open(artifact_name(run, name), catalog=run.path)[:])


def test_compare_without_datamodels_names_the_command_that_fits_them(run, capsys):
    shutil.rmtree(run / "datamodels")
    code, _, said = call(capsys, "evaluate", run, "--compare")
    assert code == 1
    assert "dmpipeline fit" in said
