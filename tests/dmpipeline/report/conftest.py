"""A run and its page, and a browser to look at it with."""

import shutil

import numpy as np
import pytest

import dmpipeline
from dmpipeline import Run, RunSpec, workflow
from dmpipeline.applications.evidence import find_evidence
from dmpipeline.report.of_run import keep_answer, report_run

TARGET = 163
HOSTILE = ["<b>one</b>", "</script>two", "three & '\"more"]


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A run of digits with datamodels, TARGET retrained without its first five helpers, a curve, and answers kept."""
    spec = RunSpec(n_models=500, held_out={"n_subsets": 10, "n_retrainings": 2})
    run = Run.create(tmp_path_factory.mktemp("digits") / "run", spec)
    run.train()
    workflow.fit_run(run)
    evidence = find_evidence(run)
    first = dmpipeline.explain(evidence, TARGET, top=5, n_fits=0)
    dmpipeline.counterfactual(evidence, TARGET, [row.index for row in first.helpers], n_retrainings=4)
    workflow.curve_run(run, [200, 500])
    noise = np.random.default_rng(0).standard_normal((1437, 360))
    keep_answer(run, "scores", dmpipeline.score(run, {"noise": noise}).as_dict())
    keep_answer(run, "verification", dmpipeline.verify(run).as_dict())
    return run


@pytest.fixture(scope="session")
def page(digits):
    """The page of that run."""
    return report_run(digits, workflow.evaluate_run(digits))


@pytest.fixture(scope="session")
def wine(tmp_path_factory):
    """A run of a table whose classes are named to break a page."""
    from sklearn.datasets import load_wine

    folder = tmp_path_factory.mktemp("wine")
    wine = load_wine()
    order = np.random.default_rng(0).permutation(len(wine.data))
    inputs, labels = wine.data[order].astype(np.float32), wine.target[order]
    np.savez(
        folder / "wine.npz",
        train_inputs=inputs[:140],
        train_labels=labels[:140],
        test_inputs=inputs[140:],
        test_labels=labels[140:],
        class_names=np.array(HOSTILE),
        feature_names=np.array(wine.feature_names),
    )
    recipe = {"name": "perceptron", "epochs": 3, "hidden": 8}
    spec = RunSpec(
        dataset=str(folder / "wine.npz"), n_models=120, held_out={"n_subsets": 6, "n_retrainings": 2}, recipe=recipe
    )
    run = Run.create(folder / "run", spec)
    run.train()
    workflow.fit_run(run)
    return run


@pytest.fixture(scope="session")
def chromium():
    """A headless Chromium, driven by Playwright."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium on PATH")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
