"""Pictures of answers: how many targets flip within k examples, and predicted against measured changes."""

import os
from pathlib import Path

import numpy as np

from dmpipeline.applications.counterfactuals import Counterfactuals
from dmpipeline.applications.support import DataSupport
from dmpipeline.errors import SpecError
from dmpipeline.figures.drawing import LIGHT, blank, file_bytes
from dmpipeline.runs.directory import write_beside


def draw_support(support: DataSupport, path: str | os.PathLike[str]) -> Path:
    """Draw the share of targets that flip within k examples: by the estimate, and as far as retraining certified it.

    Parameters
    ----------
    support : DataSupport
    path : path
        Of a ``.svg``, which is dark where its reader's setting is, or a ``.png``; replaced if it is there.

    Raises
    ------
    SpecError
        For another kind of file.
    RunError
        If the file cannot be written.
    """
    path = picture_path(path)
    figure, (ax,) = blank(5.8, 4.0, palette=LIGHT)
    curves = [("estimated", support.curve(), LIGHT.accent, "-")]
    if support.n_retrainings:
        name = f"certified by {support.n_retrainings} retrainings, or wrong as it is"
        curves.append((name, support.curve(certified=True), LIGHT.hurt, "-"))
    longest = max(len(curve) for _, curve, *_ in curves)
    for name, curve, color, style in curves:
        shares = np.concatenate([curve, np.full(longest - len(curve), curve[-1])])
        ax.step(np.arange(longest), 100 * shares, where="post", color=color, lw=2, ls=style, label=name)
    what = "removed" if support.change == "removed" else "given a wrong label"
    ax.set(xlabel=f"training examples {what}", ylabel="targets that flip, %", ylim=(0, 100))
    ax.set_xlim(0, max(longest - 1, 1))
    ax.legend(frameon=False, loc="upper left", fontsize=10, labelcolor=LIGHT.ink)
    label = f"Of {len(support)} targets {curves[0][1][-1]:.0%} flip by the estimate"
    label += f", {curves[1][1][-1]:.0%} are certified or wrong as they are" if support.n_retrainings else ""
    write_beside(path, file_bytes(figure, path.suffix, label=f"{label}."))
    return path


def draw_counterfactuals(answers: Counterfactuals, path: str | os.PathLike[str]) -> Path:
    """Draw measured against predicted changes, with the intervals of the measured ones, into a file as `draw_support`.

    Raises
    ------
    SpecError
        For another kind of file, or where nothing was retrained.
    RunError
        If the file cannot be written.
    """
    path = picture_path(path)
    predicted, measured = answers.changes()
    known = ~np.isnan(measured)
    if not known.any():
        raise SpecError("nothing was retrained, so that there is nothing to compare with; hand in n_retrainings=20")
    rows = [row for row, is_known in zip(answers, known.tolist(), strict=True) if is_known]
    reach = np.array([(row.measured_low, row.measured_high) for row in rows], np.float64)
    x, y = predicted[known], measured[known]
    figure, (ax,) = blank(5.0, 4.6, palette=LIGHT)
    errors = np.abs(reach.T - y)
    ax.errorbar(x, y, np.where(np.isfinite(errors), errors, 0), fmt="none", ecolor=LIGHT.accent_soft, elinewidth=1)
    ax.scatter(x, y, s=22, color=LIGHT.accent, zorder=3)
    bounds = [min(x.min(), y.min()), max(x.max(), y.max())]
    ax.plot(bounds, bounds, color=LIGHT.soft, lw=1.2, ls=(0, (4, 2)))
    place = {"xytext": (-8, 2), "textcoords": "offset points", "ha": "right"}
    ax.annotate("as predicted", (bounds[1], bounds[1]), color=LIGHT.soft, fontsize=9.5, **place)
    ax.set(xlabel="predicted change, estimated", ylabel=f"measured change, {answers.level:.0%} interval")
    label = f"Measured against predicted changes of {len(x)} sets"
    if len(x) > 2:
        label += f", correlation {np.corrcoef(x, y)[0, 1]:.2f}"
    write_beside(path, file_bytes(figure, path.suffix, label=f"{label}."))
    return path


def picture_path(path: str | os.PathLike[str]) -> Path:
    """Take the path of a picture; SpecError where it is neither an .svg nor a .png."""
    path = Path(path)
    if path.suffix not in (".svg", ".png"):
        raise SpecError(f"{path} is neither an .svg nor a .png; name one of these", path=path)
    return path
