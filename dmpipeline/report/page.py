"""One self-contained HTML page about a fit: its scores, what its predictions rest on, how it was made and what it cost.

The page holds its own style and pictures, runs no script and asks no server for anything, follows the reader's light
or dark setting, and fits a phone. What it shows comes in as plain arrays and mappings; the page is written whole or
not at all.
"""

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray

from dmdata.atomic import write_whole
from dmpipeline.errors import SpecError, explain_os_errors
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.report.curve_picture import curve_figure, describe
from dmpipeline.report.figures import DARK, LIGHT, PAGE, blank, page_svg
from dmpipeline.runs.learned import Learned
from dmpipeline.scoring.curves import LearningCurve
from dmpipeline.scoring.evaluation import Evaluation, readable_score


@dataclass(frozen=True, slots=True, eq=False)
class Gallery:
    """Pictures of the training and target examples, in the order of the masks' and outputs' columns.

    Attributes
    ----------
    train : array, shape (n_train, height, width) or (n_train, height, width, 3)
        Grey or colour; 0 to 255 where integers, 0 to 1 where floating.
    targets : array, shape (n_targets, height, width) or (n_targets, height, width, 3)
    train_labels, target_labels : sequences of str
        Class names.
    """

    train: NDArray[Any]
    targets: NDArray[Any]
    train_labels: Sequence[str]
    target_labels: Sequence[str]


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    evaluation: Evaluation,
    datamodels: Datamodels,
    predicted: NDArray[Any],
    true: NDArray[Any],
    n_models: int | None,
    made: Mapping[str, object],
    costs: Mapping[str, object],
    gallery: Gallery | None,
    output_name: str,
    curves: Mapping[str, LearningCurve] | None = None,
    old: Mapping[str, str] | None = None,
    learned: Learned | None = None,
) -> Path:
    """Write the report page.

    Parameters
    ----------
    path : path
        The `.html` file; replaced if it is there.
    title : str
    evaluation : Evaluation
    datamodels : Datamodels
    predicted, true : arrays of float, shape (n_subsets, n_targets)
        Outputs on the held-out subsets: predicted, and averaged over the retrainings.
    n_models : int or None
        Models fitted on; None where that is not known.
    made, costs : mappings of str to anything printable
        Rows of the tables of provenance and of costs, in order.
    gallery : Gallery or None
        Without it the page leaves out the training images behind the predictions.
    output_name : str
        What a trained model returned for a target, such as "margin".
    curves : mapping of str to LearningCurve, optional
        By the names to show; LDS against the number of models.
    old : mapping of str to str, optional
        Why the "datamodels" or the "curve" are not of what the run has now.
    learned : Learned, optional
        How good the models are; what is wrong with them is shown first.

    Raises
    ------
    SpecError
        Arrays that do not fit the datamodels.
    RunError
        If the page cannot be written.
    """
    expected = (evaluation.n_subsets, datamodels.n_targets)
    if predicted.shape != expected or true.shape != expected:
        raise SpecError(
            f"predicted {predicted.shape} and true {true.shape} do not fit the evaluation; expected {expected}: "
            "one row a held-out subset, one column a target"
        )
    cards = [] if gallery is None else _cards(gallery, datamodels, evaluation, true)
    height, width = (0, 0) if gallery is None else gallery.targets.shape[1:3]
    page = _environment().from_string(
        resources.files("dmpipeline.report").joinpath("report.html.j2").read_text("utf-8")
    )
    text = page.render(
        light=LIGHT,
        dark=DARK,
        title=title,
        summary=_summary(evaluation, n_models=n_models, output_name=output_name) + _old_remark(old, "datamodels"),
        warnings=[] if learned is None else [text[0].upper() + text[1:] for text in learned.texts],
        models=_models_sentence(learned),
        tiles=_model_tiles(learned) + _tiles(evaluation, output_name=output_name),
        retrainings=_times(evaluation.n_retrainings),
        figures=[
            _lds_figure(evaluation),
            _margins_figure(evaluation, predicted, true, output_name=output_name),
            *([_curves_figure(curves, remark=_old_remark(old, "curve"))] if curves else []),
        ],
        cards=cards,
        n_shown=_N_SHOWN,
        width=width,
        height=height,
        pixelated=width < 64,
        output_name=output_name,
        tables=[
            {"heading": "How it was made", "rows": list(made.items())},
            {"heading": "The fit", "rows": _fit_rows(datamodels, evaluation, n_models=n_models)},
            {"heading": "What it cost", "rows": list(costs.items())},
        ],
        footer="Datamodels: Ilyas, Park, Engstrom, Leclerc and Madry, arXiv 2202.00622, 2022. "
        "LDS: linear datamodeling score, a Spearman correlation averaged over targets.",
    )
    return _write_whole(Path(path), text)


_N_SHOWN = 5


def _environment() -> Environment:
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _number(value: float, digits: int = 2) -> str:
    return readable_score(value, digits=digits).replace("-", "\N{MINUS SIGN}")


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def _times(n: int) -> str:
    return {1: "once", 2: "twice"}.get(n, f"{n} times")


def _old_remark(old: Mapping[str, str] | None, what: str) -> str:
    """State why datamodels or a curve are old; nothing for those that are not."""
    if not old or what not in old:
        return ""
    subject, again = {
        "datamodels": ("These datamodels are", "dmpipeline fit makes new ones"),
        "curve": ("This curve is", "dmpipeline curve draws it again"),
    }[what]
    return f" {subject} old: {old[what]}; {again}."


def _summary(evaluation: Evaluation, *, n_models: int | None, output_name: str) -> str:
    e = evaluation
    if math.isnan(e.lds):
        return f"None of the {e.n_targets:,} targets varies over the held-out subsets, so there is nothing to predict."
    text = (
        f"From {_models(n_models)} trained on random subsets, the datamodels learned to predict the {output_name} of "
        f"{e.n_targets:,} targets. On {e.n_subsets:,} subsets they had not seen, each trained "
        f"{_times(e.n_retrainings)}, the mean LDS is {_number(e.lds, 3)} "
        f"({e.level:.0%} interval {_number(e.lds_low, 3)} to {_number(e.lds_high, 3)})"
    )
    share = e.lds_ratio
    if math.isnan(share):
        return text + "."
    return text + f", which is {share:.0%} of what the noise of training allows ({_number(e.lds_ceiling, 3)})."


def _models(n_models: int | None) -> str:
    return "models" if n_models is None else f"{n_models:,} models"


def _models_sentence(learned: Learned | None) -> str:
    sentence = "" if learned is None else learned.sentence()
    return f"The {sentence}.".replace("-", "\N{MINUS SIGN}") if sentence else ""


def _model_tiles(learned: Learned | None) -> list[dict[str, str]]:
    if learned is None or math.isnan(learned.score):
        return []
    meaning = f"of {learned.unit} the models are right on"
    if learned.measure == "r2":
        meaning = "R\N{SUPERSCRIPT TWO} of the models; always saying the mean has 0"
    elif not math.isnan(learned.baseline):
        meaning += f"; always saying {learned.commonest} would be on {learned.baseline:.1%}"
    return [{"value": learned.figure().replace("-", "\N{MINUS SIGN}"), "meaning": meaning}]


def _tiles(evaluation: Evaluation, *, output_name: str) -> list[dict[str, str]]:
    e = evaluation
    share = e.lds_ratio
    facts = {
        f"LDS, against the average of {e.n_retrainings} retrainings": _number(e.lds, 3),
        "noise ceiling of the LDS": _number(e.lds_ceiling, 3),
        "of the ceiling reached": "not defined" if math.isnan(share) else f"{share:.0%}",
        "LDS against single retrainings": _number(e.lds_single, 3),
        "of a single retraining's variance explained (R\N{SUPERSCRIPT TWO})": _number(e.r2),
        f"mean squared error, in squared units of the {output_name}": _number(e.mse),
    }
    return [{"value": value, "meaning": meaning} for meaning, value in facts.items()]


def _fit_rows(datamodels: Datamodels, evaluation: Evaluation, *, n_models: int | None) -> list[tuple[str, str]]:
    support = np.count_nonzero(datamodels.weight, axis=0)
    rows = [
        ("Models fitted on", "not recorded" if n_models is None else f"{n_models:,}"),
        ("Targets", f"{datamodels.n_targets:,}"),
        ("Training examples", f"{datamodels.n_train:,}"),
        ("Nonzero weights a target, median", f"{np.median(support):,.0f}"),
        ("Penalty lam, median", f"{np.median(datamodels.lam):.3g}"),
        ("Targets that never vary, left out", f"{evaluation.n_constant:,}"),
    ]
    if datamodels.certificate is not None:
        rows += [
            ("Worst duality gap, share of the variance", f"{datamodels.certificate.gap.max():.1e}"),
            ("Worst broken optimality condition, share of lam", f"{datamodels.certificate.kkt.max():.1e}"),
        ]
    return rows


def _lds_figure(evaluation: Evaluation) -> dict[str, str]:
    scores = evaluation.target_lds[~np.isnan(evaluation.target_lds)]
    figure, axes = blank(5.2, 4.0)
    ax = axes[0]
    low = min(0.0, float(scores.min(initial=0.0)))
    counts, _, _ = ax.hist(scores, bins=np.linspace(low, 1, 41), color=PAGE.accent_soft)
    top = max(float(np.max(counts)), 1.0)
    ax.set(xlim=(low, 1), ylim=(0, top * 1.3), xlabel="LDS of a target", ylabel="targets")
    marks = [(evaluation.lds, "mean", PAGE.accent, 1.1), (evaluation.lds_ceiling, "ceiling", PAGE.hurt, 1.22)]
    for value, name, color, height in marks:
        if not math.isnan(value):
            ax.axvline(value, ymax=height / 1.3, color=color, lw=2, ls="-" if name == "mean" else (0, (4, 2)))
            side = {"ha": "right", "x": value - 0.012} if value > 0.3 else {"ha": "left", "x": value + 0.012}
            ax.text(
                y=top * (height - 0.02),
                s=f"{name} {_number(value, 3)}",
                color=color,
                va="center",
                weight="bold",
                **side,
            )
    label = (
        f"Histogram of LDS over {len(scores)} targets; mean {_number(evaluation.lds, 3)}, "
        f"mean noise ceiling {_number(evaluation.lds_ceiling, 3)}."
    )
    caption = (
        "LDS of every target against the average of its retrainings; the lines are the mean and the mean noise ceiling."
    )
    return {"name": "lds", "svg": page_svg(figure, label=label, salt="lds"), "caption": caption}


def _margins_figure(
    evaluation: Evaluation, predicted: NDArray[Any], true: NDArray[Any], *, output_name: str
) -> dict[str, str]:
    shown = _spread(evaluation.target_lds, (0.1, 0.4, 0.7, 0.95))
    figure, axes = blank(5.2, 4.0, rows=2, columns=2)
    for ax in axes[len(shown) :]:
        ax.set_visible(False)
    for ax, t in zip(axes, shown, strict=False):
        x, y = predicted[:, t].astype(float), true[:, t].astype(float)
        ax.scatter(x, y, s=9, color=PAGE.accent, alpha=0.65, linewidths=0)
        ends = np.array([min(x.min(), y.min()), max(x.max(), y.max())])
        ax.plot(ends, ends, color=PAGE.soft, lw=1, ls=(0, (4, 2)), zorder=0)
        ax.set_title(f"target {t}, LDS {evaluation.target_lds[t]:.2f}", fontsize=9.5, loc="left", color=PAGE.ink)
    figure.supxlabel(f"predicted {output_name}", color=PAGE.ink, fontsize=10.5)
    figure.supylabel(f"actual {output_name}, average of retrainings", color=PAGE.ink, fontsize=10.5)
    names = ", ".join(f"target {t} with LDS {evaluation.target_lds[t]:.2f}" for t in shown) or "no target varies"
    label = f"Predicted against actual {output_name} on held-out subsets: {names}."
    caption = (
        "A dot is a held-out subset. Targets at the 10th, 40th, 70th and 95th percentile of LDS; on the dashed line, "
        "prediction and truth agree."
    )
    return {"name": "margins", "svg": page_svg(figure, label=label, salt="margins"), "caption": caption}


def _curves_figure(curves: Mapping[str, LearningCurve], *, remark: str) -> dict[str, str]:
    level = next(iter(curves.values())).level
    caption = (
        f"LDS of datamodels fitted on the first models of the run, with {level:.0%} intervals over the held-out "
        f"subsets. The dashed line is the mean noise ceiling.{remark}"
    )
    svg = page_svg(curve_figure(curves, palette=PAGE), label=describe(curves), salt="curve")
    return {"name": "curve", "svg": svg, "caption": caption}


def _spread(values: NDArray[np.float64], quantiles: Sequence[float]) -> list[int]:
    """Pick the columns at these rising quantiles of what is defined, each once."""
    known = np.flatnonzero(~np.isnan(values))
    ranked = known[np.argsort(values[known], kind="stable")]
    places: list[int] = []
    for quantile in quantiles:
        place = max(round(quantile * (len(ranked) - 1)), places[-1] + 1 if places else 0)
        if place < len(ranked):
            places.append(place)
    return [int(ranked[place]) for place in places]


def _cards(
    gallery: Gallery, datamodels: Datamodels, evaluation: Evaluation, true: NDArray[Any]
) -> list[dict[str, object]]:
    n_train, n_targets = datamodels.weight.shape
    counts = (len(gallery.train), len(gallery.train_labels), len(gallery.targets), len(gallery.target_labels))
    if counts != (n_train, n_train, n_targets, n_targets):
        raise SpecError(
            f"the gallery has {counts[0]} training and {counts[2]} target images with {counts[1]} and {counts[3]} "
            f"labels; expected {n_train} and {n_targets} of each"
        )
    averages = true.astype(np.float64).mean(axis=0)
    cards: list[dict[str, object]] = []
    for t in _spread(averages, (0.0, 0.03, 0.1, 0.3, 0.6, 0.95)):
        weight = datamodels.weight[:, t]
        order = np.argsort(weight, kind="stable")
        kinds = []
        for name, heading, indices in (
            ("help", "help most", order[::-1][:_N_SHOWN]),
            ("hurt", "hurt most", order[:_N_SHOWN]),
        ):
            sign = 1 if name == "help" else -1
            examples = [
                {
                    "index": int(i),
                    "image": _data_uri(gallery.train[i]),
                    "label": gallery.train_labels[i],
                    "weight": _signed(float(weight[i])),
                }
                for i in indices
                if weight[i] * sign > 0
            ]
            kinds.append({"name": name, "heading": heading if examples else f"none {name}s", "examples": examples})
        cards.append(
            {
                "index": t,
                "image": _data_uri(gallery.targets[t]),
                "label": gallery.target_labels[t],
                "average": _number(float(averages[t]), 1),
                "lds": _number(float(evaluation.target_lds[t])),
                "kinds": kinds,
            }
        )
    return cards


def _data_uri(image: NDArray[Any]) -> str:
    """Encode a picture as PNG inside a data URI; grey ones are dark on light, as ink is."""
    pixels = image.astype(np.float64) / (255 if image.dtype.kind in "iu" else 1)
    buffer = io.BytesIO()
    if pixels.ndim == 2:
        matplotlib.image.imsave(buffer, pixels, cmap="gray_r", vmin=0, vmax=1, format="png")
    else:
        matplotlib.image.imsave(buffer, np.clip(pixels, 0, 1), format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _write_whole(path: Path, text: str) -> Path:
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    return path
