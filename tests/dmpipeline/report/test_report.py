import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from dmpipeline.errors import RunError, SpecError
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.fitting.fitting import fit
from dmpipeline.report.page import Gallery, write_report
from dmpipeline.scoring.evaluation import evaluate

N_TRAIN, N_TARGETS, N_SUBSETS, R = 40, 12, 30, 4

PROBE = """
<script>
// nothing is awaited: virtual time runs out before what a busy machine takes for it; a broken image has width 0
addEventListener("load", () => {
  const images = [...document.images];
  document.body.style.width = "360px";
  document.documentElement.dataset.probe = JSON.stringify({
    widths: images.map(image => image.naturalWidth),
    alts: images.map(image => image.alt),
    drawn: [...document.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect().height),
    labels: [...document.querySelectorAll("figure svg")].map(svg => svg.getAttribute("aria-label")),
    shown: document.body.innerText,
    asked: performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:")),
    overflow: document.body.scrollWidth - 360,
    scripts: document.scripts.length,
  });
});
</script>
"""


@pytest.fixture(scope="module")
def work():
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((N_TRAIN, N_TARGETS)) * (rng.random((N_TRAIN, N_TARGETS)) < 0.3)
    masks = rng.random((600, N_TRAIN)) < 0.5
    held_out = np.repeat(rng.random((N_SUBSETS, N_TRAIN)) < 0.5, R, axis=0)
    noise = rng.standard_normal((600 + len(held_out), N_TARGETS))
    outputs = (np.vstack([masks, held_out]) @ truth + noise).astype(np.float16)
    datamodels = fit(masks, outputs[:600])
    evaluation = evaluate(datamodels, held_out, outputs[600:], n_retrainings=R, n_bootstraps=50)
    gallery = Gallery(
        train=rng.random((N_TRAIN, 8, 8)),
        targets=rng.random((N_TARGETS, 8, 8)),
        train_labels=[f"class {i % 3}" for i in range(N_TRAIN)],
        target_labels=[f"class {i % 3}" for i in range(N_TARGETS)],
    )
    return {
        "title": "Datamodels of <digits> & more",
        "evaluation": evaluation,
        "datamodels": datamodels,
        "predicted": datamodels.predict(held_out[::R]),
        "true": outputs[600:].astype(float).reshape(N_SUBSETS, R, N_TARGETS).mean(axis=1),
        "n_models": 600,
        "made": {"Dataset": "made up", "Seed": 0, "Note": "<script>alert(1)</script>"},
        "costs": {"Training": "3.2 s on 2 cores"},
        "gallery": gallery,
        "output_name": "margin",
    }


@pytest.fixture(scope="module")
def page(work, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    path = write_report(folder / "report.html", **work)
    assert list(folder.iterdir()) == [path]  # nothing is left beside it
    return path


def test_the_page_says_scores_costs_and_provenance(page, work):
    text = html.unescape(page.read_text())
    scores = work["evaluation"]
    for figure in (f"{scores.lds:.3f}", f"{scores.lds_ceiling:.3f}", f"{scores.mse:.2f}", f"{scores.r2:.2f}"):
        assert figure in text
    assert f"{scores.lds / scores.lds_ceiling:.0%}" in text
    # two digits would show an interval whose end is the estimate
    assert f"LDS is {scores.lds:.3f} (95% interval {scores.lds_low:.3f} to {scores.lds_high:.3f})" in text
    assert "600 models" in text
    assert "3.2 s on 2 cores" in text
    assert "made up" in text


def test_the_page_asks_nothing_of_any_server_and_runs_no_script(page):
    text = page.read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#|data:)", text)
    assert "<script" not in text
    assert all(link.startswith(("data:", "#")) for link in re.findall(r'(?:src|href)="([^"]*)"', text))


def test_what_users_wrote_is_escaped(page):
    text = page.read_text()
    assert "Datamodels of &lt;digits&gt; &amp; more" in text
    assert "&lt;script&gt;alert(1)" in text


def test_the_strongest_weights_of_each_shown_target_are_there_with_their_images(page, work):
    text = page.read_text()
    shown = [int(t) for t in re.findall(r'alt="Target (\d+):', text)]
    assert len(shown) == 6
    assert len(set(shown)) == 6
    averages = work["true"].mean(axis=0)[shown]
    assert (np.diff(averages) > 0).all()  # hardest first
    for card, t in zip(text.split('<article class="card">')[1:], shown, strict=True):
        weight = work["datamodels"].weight[:, t]
        helping, hurting = np.argsort(-weight)[:5], np.argsort(weight)[:5]
        expected = [i for i in helping if weight[i] > 0] + [i for i in hurting if weight[i] < 0]
        assert [int(i) for i in re.findall(r'alt="Training image (\d+):', card)] == expected
        assert f"{weight[helping[0]]:+.2f}" in card


def test_the_same_inputs_give_the_same_bytes(page, work, tmp_path):
    assert write_report(tmp_path / "again.html", **work).read_bytes() == page.read_bytes()


def test_a_page_that_cannot_be_written_is_a_run_error_and_leaves_nothing_beside_it(work, tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(RunError, match=r"report\.html cannot be written .*choose another path"):
        write_report(tmp_path / "report.html", **work)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_page_without_images_ceiling_or_certificate_is_still_a_page(work, tmp_path):
    dm = work["datamodels"]
    bare = Datamodels(weight=dm.weight, bias=dm.bias, lam=dm.lam)
    rng = np.random.default_rng(1)
    masks = rng.random((20, N_TRAIN)) < 0.5
    true = dm.predict(masks) + rng.standard_normal((20, N_TARGETS))
    evaluation = evaluate(bare, masks, true, n_bootstraps=20)
    changes = {"datamodels": bare, "evaluation": evaluation, "gallery": None, "true": true, "predicted": true}
    text = write_report(tmp_path / "bare.html", **work | changes).read_text()
    assert "<img" not in text
    assert "not defined" in text
    assert "trained once" in text
    assert "duality gap" not in text


def test_targets_that_never_vary_leave_a_page_that_says_so(work, tmp_path):
    masks = np.random.default_rng(1).random((20, N_TRAIN)) < 0.5
    constant = np.ones((20, N_TARGETS))
    evaluation = evaluate(work["datamodels"], masks, constant)
    changes = {"evaluation": evaluation, "true": constant, "predicted": work["datamodels"].predict(masks)}
    assert "nothing to predict" in write_report(tmp_path / "flat.html", **work | changes).read_text()


def test_colour_images_are_drawn(work, tmp_path):
    rng = np.random.default_rng(0)
    gallery = Gallery(
        train=rng.integers(0, 256, (N_TRAIN, 9, 7, 3), dtype=np.uint8),
        targets=rng.random((N_TARGETS, 9, 7, 3)),
        train_labels=["cat"] * N_TRAIN,
        target_labels=["dog"] * N_TARGETS,
    )
    text = write_report(tmp_path / "colour.html", **work | {"gallery": gallery}).read_text()
    assert 'width="7" height="9"' in text


def test_arrays_that_do_not_fit_are_refused_and_no_file_is_written(work, tmp_path):
    path = tmp_path / "report.html"
    with pytest.raises(SpecError, match="one row a held-out subset"):
        write_report(path, **work | {"predicted": work["predicted"][:-1]})
    gallery = work["gallery"]
    short = Gallery(gallery.train[:-1], gallery.targets, gallery.train_labels, gallery.target_labels)
    with pytest.raises(SpecError, match="39 training and 12 target images"):
        write_report(path, **work | {"gallery": short})
    assert not path.exists()


@pytest.mark.browser
def test_a_browser_shows_the_figures_and_every_image_and_asks_for_nothing_else(page, work, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on PATH")
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=10000 --dump-dom"
    )
    command = [chromium, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", probed.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seen = json.loads(html.unescape(re.search(r'data-probe="([^"]*)"', dom)[1]))
    assert len(seen["widths"]) >= 6 * 3
    assert all(width == 8 for width in seen["widths"])
    assert all(seen["alts"])
    assert len(seen["drawn"]) == 2
    assert all(height > 100 for height in seen["drawn"])
    assert all(seen["labels"])
    assert seen["asked"] == []
    assert seen["scripts"] == 1  # the probe itself
    assert seen["overflow"] <= 0
    for text in (
        work["title"],
        f"{work['evaluation'].lds:.3f}",
        "LDS of a target",
        "predicted margin",
        "3.2 s on 2 cores",
    ):
        assert text in seen["shown"]
