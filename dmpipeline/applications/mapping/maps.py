"""The picture of an embedding's map: a point an example, coloured by its label."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from dmpipeline.applications.mapping.embeddings import Embedding
from dmpipeline.errors import SpecError
from dmpipeline.figures.drawing import LIGHT, Palette, blank, file_bytes
from dmpipeline.runs.directory import write_beside

# Paul Tol's bright scheme, which colour-blind readers tell apart too (Colour Schemes, SRON/EPS/TN/09-002, 2021).
# Neighbouring classes differ in colour and in marker, and as 6 and 5 have no common factor, 30 pairs are different.
_COLORS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377")
_MARKERS = "os^DP"
_MOST_CLASSES = len(_COLORS) * len(_MARKERS)
_LEGEND_ROWS = 15
_RASTER_FROM = 3_000


def draw_map(embedding: Embedding, path: str | os.PathLike[str]) -> Path:
    """Draw the map of an embedding into a file; replaced if it is there.

    Parameters
    ----------
    embedding : Embedding
    path : path
        Of a ``.svg``, which is dark where its reader's setting is, or a ``.png``.

    Returns
    -------
    path : pathlib.Path

    Raises
    ------
    SpecError
        For another kind of file.
    RunError
        If the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".png"):
        raise SpecError(f"{path} is neither an .svg nor a .png; name one of these", path=path)
    write_beside(path, file_bytes(map_figure(embedding), path.suffix, label=describe_map(embedding)))
    return path


def map_figure(embedding: Embedding, *, palette: Palette = LIGHT) -> Figure:
    """Draw a map with a legend of classes or a scale of numbers next to it; without labels, in one colour.

    Of more than 30 classes the 29 commonest have a colour of their own, and the others share grey.
    """
    labels = embedding.labels
    are_classes = labels is not None and labels.dtype.kind == "i"
    names = _classes(embedding)
    n_columns = -(-len(names) // _LEGEND_ROWS)
    longest = max((len(name) for _, name in names), default=0)
    room = n_columns * (0.55 + 0.085 * min(longest, 24)) if are_classes else 0.9 * (labels is not None)
    figure, (ax,) = blank(5.2 + room, 5.0, palette=palette)
    size = float(np.clip(9_000 / len(embedding.indices), 4, 32))
    # the edge parts points that lie on one another
    style: dict[str, Any] = {"s": size, "linewidths": 0.3, "edgecolors": palette.paper}
    style["rasterized"] = len(embedding.indices) > _RASTER_FROM
    if labels is None:
        ax.scatter(embedding.x, embedding.y, color=palette.accent, **style)
    elif not are_classes:
        points = ax.scatter(embedding.x, embedding.y, c=labels, cmap="cividis", **style)
        bar = figure.colorbar(points, ax=ax, shrink=0.7, aspect=28, pad=0.03)
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=palette.soft, labelsize=9)
        bar.set_label("label", color=palette.ink, fontsize=10.5)
    else:
        _scatter_classes(ax, embedding, names, labels, style, palette)
        legend = ax.legend(
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            ncols=n_columns,
            frameon=False,
            fontsize=10,
            labelcolor=palette.ink,
            handletextpad=0.3,
            labelspacing=0.55,
            columnspacing=1.0,
        )
        for handle in legend.legend_handles:
            handle.set(sizes=[42])
    _name_axes(ax, embedding)
    return figure


def describe_map(embedding: Embedding) -> str:
    """Describe in words what a map shows."""
    what = "training examples" if embedding.of == "train" else f"{embedding.evidence.targets} examples"
    return f"{len(embedding.indices):,} {what} by their datamodels, on a map by {embedding.map_name}."


def _classes(embedding: Embedding) -> list[tuple[npt.NDArray[np.intp], str]]:
    """List the points of each class that is drawn apart and its name, in the order of their numbers; the rest last."""
    if embedding.labels is None or embedding.labels.dtype.kind != "i":
        return []
    classes, counts = np.unique(embedding.labels, return_counts=True)
    if len(classes) > _MOST_CLASSES:
        classes = np.sort(classes[np.argsort(-counts, kind="stable")[: _MOST_CLASSES - 1]])
    listed = [
        (points, _shortened(str(embedding.label(int(points[0])))))
        for points in (np.flatnonzero(embedding.labels == each) for each in classes)
    ]
    rest = np.flatnonzero(~np.isin(embedding.labels, classes))
    return [*listed, (rest, f"{len(counts) - len(classes)} others")] if len(rest) else listed


def _shortened(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"


def _scatter_classes(
    ax: Any,
    embedding: Embedding,
    names: list[tuple[npt.NDArray[np.intp], str]],
    labels: npt.NDArray[Any],
    style: dict[str, Any],
    palette: Palette,
) -> None:
    n_classes = len(np.unique(labels))
    for nth, (points, name) in enumerate(names):
        is_rest = n_classes > _MOST_CLASSES and nth == len(names) - 1
        color = palette.soft if is_rest else _COLORS[nth % len(_COLORS)]
        marker = "." if is_rest else _MARKERS[nth % len(_MARKERS)]
        text = name.replace("$", r"\$")  # a name may hold dollars, which begin formulas
        text = f" {text}" if text.startswith("_") else text  # else matplotlib leaves it out
        ax.scatter(embedding.x[points], embedding.y[points], color=color, marker=marker, label=text, **style)


def _name_axes(ax: Any, embedding: Embedding) -> None:
    """Name directions with their shares; those of a t-SNE mean nothing, and have neither names nor numbers."""
    if embedding.map_name == "PCA":
        for axis, row in zip((ax.xaxis, ax.yaxis), embedding.rows[:2], strict=False):
            axis.set_label_text(f"direction {row.direction} ({row.explained_share:.1%} of the variance)")
        return
    ax.set(xticks=[], yticks=[])
    ax.spines[["left", "bottom"]].set_visible(False)
    shares = sum(row.explained_share for row in embedding.rows)
    text = f"t-SNE of {len(embedding)} principal directions, {shares:.0%} of the variance of datamodels' weights"
    ax.set_xlabel(text, fontsize=9)
    ax.set_aspect("equal", adjustable="datalim")
