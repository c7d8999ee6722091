"""The page in a browser: what it shows when clicked, typed and looked at in other ways."""

import re
from pathlib import Path

import numpy as np
import pytest

from dmpipeline import workflow
from dmpipeline.applications.evidence import find_evidence
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.report.contents import Contents, add_map, add_outputs, add_weights, empty_facts
from dmpipeline.report.of_run import report_run
from dmpipeline.report.page import write_page

from .conftest import TARGET

MINUS = "\N{MINUS SIGN}"
ROOT = Path(__file__).parents[3]
VIEWS = ["overview", "targets", f"target={TARGET}", "training", "train=5", "map", "findings", "about"]

pytestmark = pytest.mark.browser


class Shown:
    """A page in a browser that remembers what it complained about and asked for."""

    def __init__(self, chromium, path, *, width=1280, scheme="light"):
        self.context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, accept_downloads=True
        )
        self.tab = self.context.new_page()
        self.wrong, self.asked = [], []
        self.tab.on("console", lambda said: self.wrong.append(said.text) if said.type in ("error", "warning") else None)
        self.tab.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.url = path.as_uri()
        self.tab.goto(self.url)
        self.tab.wait_for_selector("html[data-ready]")

    def at(self, view):
        self.tab.evaluate("view => { location.hash = view }", view)
        name, _, index = view.partition("&")[0].partition("=")
        there = f"main[data-view='{name} {index}'], main[data-view='{name}'], main [role=alert]"
        self.tab.wait_for_selector(there)
        self.tab.wait_for_timeout(200)  # for effects: keys are listened to, canvases painted
        return self.tab

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()
        assert self.wrong == []
        assert [url for url in self.asked if not url.startswith((self.url.rpartition("/")[0], "data:", "blob:"))] == []


def text_of(tab):
    return tab.locator("main").inner_text()


def test_every_view_is_shown_at_all_widths_and_in_both_schemes_without_scrolling_sideways(chromium, page):
    for width in (390, 768, 1280, 2560):
        for scheme in ("light", "dark"):
            with Shown(chromium, page, width=width, scheme=scheme) as shown:
                for view in VIEWS:
                    tab = shown.at(view)
                    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), (width, view)
                    assert len(text_of(tab)) > 30


def test_axe_finds_nothing_wrong_with_any_view_with_its_tables_open(chromium, page, wine):
    from axe_playwright_python.sync_playwright import Axe

    pages = [(page, VIEWS), (report_run(wine, workflow.evaluate_run(wine)), ["targets", "target=3", "train=5"])]
    for scheme in ("light", "dark"):
        for path, views in pages:
            with Shown(chromium, path, scheme=scheme) as shown:
                for view in views:
                    tab = shown.at(view)
                    tab.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
                    tab.wait_for_timeout(100)
                    found = Axe().run(tab).response["violations"]
                    assert [(view, each["id"], each["nodes"][0]["html"][:200]) for each in found] == []


def test_a_view_that_is_left_before_it_is_painted_leaves_no_error(chromium, page):
    with Shown(chromium, page) as shown:
        slow = shown.context.new_cdp_session(shown.tab)
        slow.send("Emulation.setCPUThrottlingRate", {"rate": 6})
        shown.tab.evaluate("""async () => {
            for (let i = 0; i < 40; i++) {
                location.hash = i % 2 ? "" : i % 4 ? "target=3" : "targets";
                await new Promise((done) => setTimeout(done, i));
            }
        }""")


def test_a_targets_values_equal_those_of_numpy(chromium, page, digits):
    weight = find_evidence(digits).datamodels().weight[:, TARGET]
    bias = float(find_evidence(digits).datamodels().bias[TARGET])
    evaluation = workflow.evaluate_run(digits)
    order = np.argsort(-weight, kind="stable")
    with Shown(chromium, page) as shown:
        tab = shown.at(f"target={TARGET}&k=5")
        text = text_of(tab)
        full = weight.sum() + bias
        assert f"{full - weight[order[:5]].sum():.2f}".replace("-", MINUS) in tab.locator(".answer").inner_text()
        assert f"{full:.2f}".replace("-", MINUS) in text
        assert f"{evaluation.target_lds[TARGET]:.2f}" in text
        listed = tab.locator(".help-list a.example")
        hrefs = [listed.nth(i).get_attribute("href") for i in range(5)]
        assert hrefs == [f"#train={i}" for i in order[:5]]
        weights = [listed.nth(i).locator(".weight").inner_text() for i in range(5)]
        assert weights == [f"+{weight[i]:.2f}" for i in order[:5]]
        assert "measured" in tab.locator(".answer").inner_text()  # five were retrained


def test_the_slider_removes_helpers_by_keys_and_says_what_is_foreseen(chromium, page):
    with Shown(chromium, page) as shown:
        tab = shown.at(f"target={TARGET}")
        before = tab.locator(".answer").inner_text()
        slider = tab.get_by_role("slider")
        slider.focus()
        for _ in range(3):
            tab.keyboard.press("ArrowRight")
        assert slider.get_attribute("aria-valuetext").startswith("3 training images removed: predicted margin")
        assert tab.locator(".answer").inner_text() != before
        tab.wait_for_url("**#target=163&k=3")  # can be sent as it is
        tab.get_by_label("of its").select_option("harmer")
        assert "strongest harmers" in text_of(tab)


def test_links_arrow_keys_and_the_back_button_go_from_example_to_example(chromium, page):
    with Shown(chromium, page) as shown:
        tab = shown.at(f"target={TARGET}")
        tab.keyboard.press("ArrowRight")
        tab.wait_for_function("document.querySelector('main h2').textContent.includes('Test image 164')")
        tab.locator(".help-list a.example").first.click()
        tab.wait_for_function("document.querySelector('main h2').textContent.includes('Training image')")
        assert "Leaning on it" in text_of(tab)
        assert tab.locator("a.example[href='#target=164']").count() >= 1  # whom it helps, this one too
        tab.go_back()
        tab.wait_for_function("document.querySelector('main h2').textContent.includes('Test image 164')")
        tab.go_back()
        tab.wait_for_function("document.querySelector('main h2').textContent.includes('Test image 163')")
        # somebody else's link
        shown.at("target=360")
        assert "There is no test image 360; numbers go from 0 to 359." in text_of(tab)


def test_targets_are_found_by_number_and_class_and_ordered(chromium, page, digits):
    evaluation, labels = workflow.evaluate_run(digits), digits.dataset().test_labels
    with Shown(chromium, page) as shown:
        tab = shown.at("targets")

        def listed():
            return [
                int(href.partition("=")[2])
                for href in tab.eval_on_selector_all("main ul a", "all => all.map(a => a.getAttribute('href'))")
            ]

        tab.get_by_label("Order").select_option("worst")
        known = np.where(np.isnan(evaluation.target_lds), np.inf, evaluation.target_lds.astype(np.float32))
        assert listed()[:10] == np.lexsort((np.arange(360), known))[:10].tolist()
        tab.get_by_label("Class").select_option("3")
        assert set(listed()) == set(np.flatnonzero(labels == 3)[:120])
        tab.get_by_label("Class").select_option("")
        tab.get_by_label("Find").fill("123")
        assert listed() == [123]


def test_a_bar_of_the_histogram_lists_whose_it_is_by_a_key(chromium, page, digits):
    evaluation = workflow.evaluate_run(digits)
    with Shown(chromium, page) as shown:
        tab = shown.at("overview")
        bar = tab.locator("#figure-lds [role=button]").first
        name = bar.get_attribute("aria-label")
        low, high = (float(part.replace(MINUS, "-")) for part in re.search(r"LDS (\S+) to (\S+):", name).groups())
        bar.focus()
        tab.keyboard.press("Enter")
        tab.wait_for_selector("#figure-lds .picked-list a")
        links = tab.eval_on_selector_all("#figure-lds .picked-list a", "all => all.map(a => a.getAttribute('href'))")
        for target in (int(href.partition("=")[2]) for href in links):
            assert low - 0.006 <= evaluation.target_lds[target] <= high + 0.006
        assert links


def test_every_plot_has_its_numbers_as_csv(chromium, page, digits):
    evaluation = workflow.evaluate_run(digits)
    with Shown(chromium, page) as shown:
        tab = shown.at("overview")
        with tab.expect_download() as download:
            tab.locator("#figure-lds").get_by_role("button", name="CSV").click()
        lines = Path(download.value.path()).read_text().splitlines()
        assert lines[0] == "test image,LDS,ceiling"
        assert len(lines) == 361
        assert float(lines[1 + TARGET].split(",")[1]) == pytest.approx(evaluation.target_lds[TARGET], abs=1e-6)
        for figure in tab.locator("figure").all():
            assert figure.get_by_role("button", name="CSV").count() == 1


def test_an_open_table_is_of_the_example_that_is_shown(chromium, page):
    with Shown(chromium, page) as shown:
        tab = shown.at(f"target={TARGET}")
        figure = tab.locator("figure").last
        figure.locator("summary").click()
        first = figure.locator("tbody tr").first
        before = first.inner_text()
        tab.keyboard.press("ArrowRight")
        tab.wait_for_selector(f"main[data-view='target {TARGET + 1}']")
        tab.wait_for_timeout(200)
        assert figure.locator("tbody tr").first.inner_text() != before


def test_addresses_that_make_no_sense_show_something_sensible(chromium, page):
    with Shown(chromium, page) as shown:
        for view in ("targets=&order=strange", "training=&order=brittle", "overview&view=zzz", "target=5&k=-3&of=x"):
            shown.tab.evaluate("view => { location.hash = view }", view)
            shown.tab.wait_for_timeout(200)
            assert len(text_of(shown.tab)) > 100
            shown.tab.reload()
            shown.tab.wait_for_selector("html[data-ready]")


def test_the_map_zooms_by_keys_and_a_lasso_lists_what_it_holds(chromium, page):
    with Shown(chromium, page) as shown:
        tab = shown.at("map")
        canvas = tab.locator("canvas")
        before = canvas.evaluate("c => c.toDataURL()")
        canvas.focus()
        tab.keyboard.press("+")
        tab.wait_for_timeout(150)
        assert canvas.evaluate("c => c.toDataURL()") != before
        tab.keyboard.press("0")
        tab.get_by_role("button", name="Lasso").click()
        box = canvas.bounding_box()
        corners = [(0.02, 0.02), (0.98, 0.02), (0.98, 0.98), (0.02, 0.98), (0.02, 0.05)]
        tab.mouse.move(box["x"] + 0.02 * box["width"], box["y"] + 0.02 * box["height"])
        tab.mouse.down()
        for x, y in corners:
            tab.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=4)
        tab.mouse.up()
        tab.wait_for_selector("text=/360 test images selected/")


def test_labels_of_a_dataset_are_text_wherever_they_are_shown(chromium, wine):
    with Shown(chromium, report_run(wine, workflow.evaluate_run(wine))) as shown:
        for view in ("overview", "targets", "target=3", "train=2", "map", "findings"):
            tab = shown.at(view)
            assert tab.locator("main b b").count() == 0
        assert "</script>two" in text_of(shown.at("targets"))
        assert "alcohol" in text_of(shown.at("target=3"))


def test_a_page_in_a_folder_and_one_of_weights_alone_are_shown_too(chromium, digits, wine, tmp_path):
    folder = report_run(digits, workflow.evaluate_run(digits), path=tmp_path / "page", parts=["support"])
    with Shown(chromium, folder) as shown:
        tab = shown.at(f"target={TARGET}")
        assert "Test image 163" in text_of(tab)
        assert "train-0.webp" in tab.locator(".help-list .picture").first.evaluate(
            "e => getComputedStyle(e).backgroundImage"
        )
    contents = Contents(empty_facts(title="Bare"))
    datamodels = find_evidence(wine).datamodels()
    add_weights(contents, datamodels)
    with Shown(chromium, write_page(tmp_path / "bare.html", contents)) as shown:
        for view in VIEWS:
            shown.at(view)
        assert "Training example 5" in text_of(shown.at("train=5"))


def test_no_more_removals_are_advised_than_there_are_helpers_and_a_target_without_weights_is_called_that(
    chromium, tmp_path
):
    weight = np.zeros((30, 3), np.float32)
    weight[:4, 0] = [3, 2, 1, -1]
    weight[:2, 2] = -1
    contents = Contents(empty_facts(title="Few weights", run="few", is_margin=True))
    add_weights(contents, Datamodels(weight, np.ones(3, np.float32), np.zeros(3, np.float32)))
    with Shown(chromium, write_page(tmp_path / "few.html", contents)) as shown:
        assert "dmpipeline counterfactual few 0 --remove-top 3 --retrain 20" in text_of(shown.at("target=0"))
        assert "--order harmful" not in text_of(shown.at("target=2"))
        assert "--remove-top" not in text_of(shown.at("target=2"))
        bare = text_of(shown.at("target=1"))
        assert "is without weights" in bare
        assert "strongest" not in bare


def test_labels_to_look_at_are_those_of_which_models_say_another(chromium, tmp_path):
    contents = Contents(empty_facts(title="Labels"))
    weight = np.ones((30, 3), np.float32)
    add_weights(contents, Datamodels(weight, np.ones(3, np.float32), np.zeros(3, np.float32)))
    believed = {"index": 3, "label": "neg", "suggested": "neg", "score": 6.2e-6, "own_weight": None}
    doubted = {"index": 7, "label": "neg", "suggested": "pos", "score": 0.9, "own_weight": None}
    for rows, others in (([doubted, believed], 1), ([believed], 0)):
        contents.facts["suspects"] = {"rows": rows}
        with Shown(chromium, write_page(tmp_path / "labels.html", contents)) as shown:
            said = text_of(shown.at("findings"))
            assert (said.count("models say"), "models say pos" in said) == (others, bool(others))
            assert ("these models believe all labels" in said) == (not others)


def test_a_thousand_targets_and_a_hundred_thousand_points_are_shown_and_move_by_keys(chromium, tmp_path):
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((5000, 1000)) * (rng.random((5000, 1000)) < 0.1)).astype(np.float32)
    contents = Contents(empty_facts(title="Large"))
    add_weights(contents, Datamodels(weight=weight, bias=weight[0], lam=weight[0]))
    true = rng.standard_normal((100, 1000))
    add_outputs(contents, true, true)
    add_map(contents, "targets", rng.standard_normal(100_000), rng.standard_normal(100_000), name="t-SNE", note="")
    with Shown(chromium, write_page(tmp_path / "large.html", contents)) as shown:
        tab = shown.at("map")
        canvas = tab.locator("canvas")
        canvas.focus()
        seen = [canvas.evaluate("c => c.toDataURL()")]
        for key in ("+", "ArrowRight", "ArrowUp"):
            tab.keyboard.press(key)
            tab.wait_for_timeout(200)
            seen.append(canvas.evaluate("c => c.toDataURL()"))
        assert len(set(seen)) == len(seen)
