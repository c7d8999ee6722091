"""Objects show what matters of them, in few words and without their arrays, at a prompt and in a notebook."""

import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from cluster_runs import write_letters

import dmpipeline
from dmpipeline.checks.findings import Finding, Verification
from dmpipeline.runs.store import Run
from dmpipeline.scoring.alternatives import Comparison
from dmpipeline.scoring.curves import CurvePoint, LearningCurve
from dmpipeline.spec import RunSpec
from dmpipeline.training.train import Way


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """One of each, of a small run in a folder whose name is markup."""
    folder = tmp_path_factory.mktemp("shown") / "<b>&amp;"
    folder.mkdir()
    spec = RunSpec(
        dataset=write_letters(folder, 40, 7),
        n_models=30,
        held_out={"n_subsets": 4, "n_retrainings": 2},
        recipe={"hidden": 4, "epochs": 1},
        block_models=10,
    )
    run = Run.create(folder / "run", spec)
    run.train(way=Way("products", 10))
    rows = run.spec.rows
    masks, margins = run.array("train_masks")[:], run.array("test_margins")[:].astype(np.float32)
    fitted = dmpipeline.fit(masks[rows.models], margins[rows.models])
    scored = dmpipeline.evaluate(fitted, masks[rows.held_out], margins[rows.held_out], n_retrainings=2)
    return {"Run": run, "Dataset": run.dataset(), "Datamodels": fitted, "Evaluation": scored}


class Cells(HTMLParser):
    """The texts of a table's cells; any tag that a table does not have is an error."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.depth = [], 0
        self.feed(text)
        assert self.depth == 0

    def handle_starttag(self, tag, attrs):
        assert tag in ("div", "table", "tr", "th", "td", "thead", "tbody"), tag
        self.depth += 1

    def handle_endtag(self, tag):
        self.depth -= 1

    def handle_data(self, data):
        self.cells.append(data)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("Run", ["run", "alpha 50%", "perceptron@1", "30 to fit on", "4 subsets of 2 held out", "38 of 38 models"]),
        ("Dataset", ["letters", "40", "7", "float32 (8,)", "3 classes"]),
        ("Datamodels", ["7", "40", "raw"]),
        ("Evaluation", ["LDS", "95%", "R2", "4 subsets of 2"]),
    ],
)
def test_each_says_what_matters_in_a_line_and_in_a_table(shown, kind, words):
    thing = shown[kind]
    line, table = repr(thing), thing._repr_html_()
    assert line.startswith(f"<{kind}")
    assert "\n" not in line
    assert len(line) - (2 * len(str(shown["Run"].path)) if kind == "Run" else 0) < 250
    assert len(table) < 2000
    assert not any(mark in line for mark in ("array(", "[[", "dtype"))
    text = " ".join(Cells(table).cells)
    for word in words:
        assert word in line, line
        assert word in text, text


def test_answers_of_any_kind_are_tables_in_a_notebook(shown):
    run, fitted, scored = shown["Run"], shown["Datamodels"], shown["Evaluation"]
    verified = dmpipeline.verify(run)
    point = CurvePoint(30, lds=0.5, lds_low=0.4, lds_high=0.6, r2=0.25, nonzero_weights=3.0)
    tables = {
        "spec": verified,
        "what was found": verified[0],
        "Comparison of 1 estimates": Comparison({"lasso": scored}, {"lasso": 3.0}),
        "of at most 0.900": LearningCurve((point,), lds_ceiling=0.9, level=0.95),
        "2 removed, 0 added": dmpipeline.counterfactual(fitted, 0, remove=[1, 2]),
        "index 0": dmpipeline.explain(fitted, 0, top=3),
    }
    for words, thing in tables.items():
        assert words in " ".join(Cells(thing._repr_html_()).cells), words
    columns = Cells(tables["index 0"]._repr_html_()).cells[1:3]
    assert columns == ["index", "weight"]
    assert "rank low" not in tables["index 0"]._repr_html_(), "nothing is known of it"


def test_findings_say_what_was_found_and_cost_what_it_did_in_a_notebook():
    found = Finding("digests", False, "row 3 is <damaged>")
    shown = Cells(Verification((found,), verdict="differs", usd=0.00012)._repr_html_()).cells
    assert shown[1:] == ["level", "check", "what was found", "bytes", "digests", "differs", "row 3 is <damaged>"]
    assert "cost $0.00012" in shown[0]


def test_a_run_that_is_gone_from_disk_can_still_be_shown(tmp_path, shown):
    run = shown["Run"]
    gone = Run(tmp_path / "gone", run.spec, run.arrays)
    assert "0 of 38 models" in repr(gone)


def test_dir_lists_what_a_user_may_use_and_nothing_else():
    program = "import dmpipeline, sys; print(*dir(dmpipeline)); print('torch' in sys.modules, 'numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names, loaded = done.stdout.splitlines()
    assert loaded == "False False"
    assert set(names.split()) == {*dmpipeline.__all__, "__version__", "errors"}
    assert {"Dataset", "Run", "fit", "evaluate", "load_dataset", "save_dataset", "verify_run"} <= set(names.split())
    for name in names.split():
        assert getattr(dmpipeline, name).__doc__
