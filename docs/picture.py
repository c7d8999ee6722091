"""Draw the README's picture from a finished demo: test images, and the training images that help and hurt them most.

Run it as ``.venv/bin/python docs/picture.py demo docs/datamodels.png`` after ``make demo``.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

import dmpipeline

TARGETS = (51, 203, 166)
N_SHOWN = 5


def show(axes: Axes, inputs: NDArray[np.float32], label: object, below: str, color: str = "black") -> None:
    """Draw one 8 x 8 image with its label and what there is to say of it."""
    axes.imshow(inputs.reshape(8, 8), cmap="gray_r")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(f"{label}  {below}".rstrip(), fontsize=8, color=color, labelpad=2)
    for spine in axes.spines.values():
        spine.set_color(color)


def main(run: Path, out: Path) -> None:
    """Draw the datamodels in `run` to `out`."""
    datamodels = dmpipeline.Datamodels.load(run / "datamodels" / "test_50pct.pt")
    digits = dmpipeline.load_dataset("digits")
    figure = Figure(figsize=(8.6, 0.98 * len(TARGETS) + 0.25), facecolor="white")
    axes = figure.subplots(len(TARGETS), 2 * N_SHOWN + 3, width_ratios=[1, 0.3, *[1] * N_SHOWN, 0.3, *[1] * N_SHOWN])
    for row, target in zip(axes, TARGETS, strict=True):
        weight = datamodels.weight[:, target]
        order = np.argsort(weight)
        show(row[0], digits.test_inputs[target], digits.test_labels[target], "")
        helping, hurting = order[::-1][:N_SHOWN], order[:N_SHOWN]
        for places, examples, color in ((row[2:], helping, "#1a7f37"), (row[3 + N_SHOWN :], hurting, "#b35900")):
            for place, example in zip(places, examples, strict=False):
                said = f"{weight[example]:+.2f}"
                show(place, digits.train_inputs[example], digits.train_labels[example], said, color)
        for place in (row[1], row[2 + N_SHOWN]):
            place.axis("off")
    for place, title in zip(axes[0][[0, 4, 5 + N_SHOWN]], ("test image", "help most", "hurt most"), strict=True):
        place.set_title(title, fontsize=9)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.9, bottom=0.07, hspace=0.42, wspace=0.12)
    figure.savefig(out, dpi=170)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
