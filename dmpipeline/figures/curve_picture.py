"""The picture of learning curves: LDS against the number of models, with intervals and the noise ceiling."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter
from numpy.typing import NDArray

from dmpipeline.errors import SpecError
from dmpipeline.figures.drawing import LIGHT, Palette, blank, file_bytes
from dmpipeline.runs.directory import write_beside
from dmpipeline.scoring.curves import LearningCurve
from dmpipeline.scoring.evaluation import readable_score

_BESIDE = 1.06
"""The axis of models goes beyond the first and the last by this factor."""


def draw_curves(curves: Mapping[str, LearningCurve], path: str | os.PathLike[str]) -> Path:
    """Draw curves with the intervals of their points into a file; replaced if it is there.

    Parameters
    ----------
    curves : mapping of str to LearningCurve
        At least one, by the names to show.
    path : path
        Of a ``.svg``, which is dark where its reader's setting is, or a ``.png``.

    Raises
    ------
    SpecError
        For another kind of file, or no curves.
    RunError
        If the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".png"):
        raise SpecError(f"{path} is neither an .svg nor a .png; name one of these", path=path)
    write_beside(path, file_bytes(curve_figure(curves), path.suffix, label=describe(curves)))
    return path


def curve_figure(curves: Mapping[str, LearningCurve], *, palette: Palette = LIGHT) -> Figure:
    """Draw LDS against models, on a logarithmic axis whose ticks are the points' own numbers of models.

    Raises
    ------
    SpecError
        If there are no curves.
    """
    if not curves:
        raise SpecError("there are no curves to draw; hand in at least one, by name")
    figure, (ax,) = blank(5.8, 4.0, palette=palette)
    colors = (palette.accent, palette.hurt, palette.ink, palette.soft)
    ends = {}
    for i, (name, curve) in enumerate(curves.items()):
        color, marker = colors[i % len(colors)], "os^D"[i % 4]
        bounds = np.array([(point.lds_low, point.lds_high) for point in curve.points])
        ax.fill_between(curve.counts, *bounds.T, color=color, alpha=0.16, linewidth=0)
        ax.plot(curve.counts, curve.lds, color=color, lw=2, marker=marker, ms=5)
        ends[name] = (curve.counts[-1], float(curve.lds[-1]), color)
    counts = sorted({count for curve in curves.values() for count in curve.counts})
    ceiling = next(iter(curves.values())).lds_ceiling
    if not math.isnan(ceiling):
        ax.axhline(ceiling, color=palette.soft, lw=1.3, ls=(0, (4, 2)))
    low, high = ax.get_ylim()
    high += 0.08 * (high - low)  # room for what is written on the ceiling
    ax.set(xscale="log", ylim=(low, high), xlabel="models fitted on, validation models included", ylabel="LDS")
    ax.set_xlim(counts[0] / _BESIDE, counts[-1] * _BESIDE)
    _mark_counts(ax, counts)
    if not math.isnan(ceiling):
        place = {"xytext": (0, 4), "textcoords": "offset points", "va": "bottom"}
        text = f"noise ceiling {ceiling:.3f}"
        ax.annotate(text, (counts[0], ceiling), color=palette.soft, fontsize=9.5, **place)
    known = {name: end for name, end in ends.items() if not math.isnan(end[1])}
    heights = _apart([lds for _, lds, _ in known.values()], least=0.065 * (high - low))
    for (name, (count, lds, color)), height in zip(known.items(), heights, strict=True):
        ax.annotate(
            f"{name} {lds:.3f}".strip(),
            (count, height),
            xytext=(9, 0),
            textcoords="offset points",
            color=color,
            fontsize=10,
            weight="bold",
            va="center",
            parse_math=False,  # a name may hold dollars
        )
    return figure


def describe(curves: Mapping[str, LearningCurve]) -> str:
    """Describe in words what a figure of these curves shows."""
    said = []
    for name, curve in curves.items():
        first, last = curve.points[0], curve.points[-1]
        from_first = f"{readable_score(first.lds)} with {first.n_models:,} models"
        said.append(f"{name} from {from_first} to {readable_score(last.lds)} with {last.n_models:,}".strip())
    return f"LDS against the number of models: {'; '.join(said)}."


def _mark_counts(ax: Any, counts: Sequence[int]) -> None:
    """Put a tick at each count, and write those there is room for: the last, the first, then from the last down."""
    room = 0.12 * math.log(counts[-1] * _BESIDE**2 / counts[0])
    written: list[int] = []
    for count in (counts[-1], counts[0], *reversed(counts)):
        if all(abs(math.log(count / other)) >= room for other in written):
            written.append(count)
    ax.set_xticks(written, [f"{count:,}" for count in written])
    ax.xaxis.set_minor_locator(FixedLocator([count for count in counts if count not in written]))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _apart(values: Sequence[float], *, least: float) -> NDArray[np.float64]:
    """Move numbers as little as possible, in the sum of squares, so that neighbours in order are `least` apart."""
    order = np.argsort(values, kind="stable")
    # that is an isotonic regression of what is left of each once those below have their room: pool adjacent violators
    pools: list[tuple[float, int]] = []
    for below, i in enumerate(order):
        pools.append((values[i] - below * least, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (lower, n), (upper, m) = pools[-2:]
            pools[-2:] = [((n * lower + m * upper) / (n + m), n + m)]
    moved = np.empty(len(values))
    moved[order] = [level for level, n in pools for _ in range(n)] + least * np.arange(len(values))
    return moved
