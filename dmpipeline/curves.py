"""Learning curves: LDS against the number of models fitted on, and their picture.

A curve says whether more models are worth their price, and what an estimate, or a prior, saves of them. All points and
estimates share second moments that grow along the rows, so each row is read once however many there are.
"""

import functools
import itertools
import math
import operator
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter
from numpy.typing import NDArray
from rich.table import Table

from dmpipeline.arrays import RowSliceable, check_shapes, read_masks, read_outputs
from dmpipeline.datamodels import Datamodels
from dmpipeline.directory import write_beside
from dmpipeline.errors import SpecError
from dmpipeline.evaluate import Evaluation, evaluate, readable_score, readable_table
from dmpipeline.figures import LIGHT, Palette, blank, file_bytes
from dmpipeline.fitting import Progress, fit_moments, split_rows
from dmpipeline.moments import BLOCK_ROWS, Moments
from dmpipeline.priors import check_prior

Estimate = Callable[[Moments, Moments], Datamodels]
"""Fits datamodels from the moments of the rows to fit on and of those that choose lam, as `fit_moments` does."""


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Scores of datamodels fitted on the first `n_models` models.

    Attributes
    ----------
    n_models : int
        Those that chose lam included.
    lds, lds_low, lds_high, r2 : float
        As in `Evaluation`.
    nonzero_weights : float
        Mean number a target.
    prior_strength : float or None
        How far the prior was trusted; None if there was none.
    """

    n_models: int
    lds: float
    lds_low: float
    lds_high: float
    r2: float
    nonzero_weights: float
    prior_strength: float | None = None


@dataclass(frozen=True, slots=True)
class LearningCurve:
    """Scores on the same held-out models by the number of models fitted on, which `print` shows as a table.

    Attributes
    ----------
    points : tuple of CurvePoint
        At least one, in rising order of models. Intervals are of the same resamples.
    lds_ceiling : float
        The highest LDS that the noise in the held-out averages allows; nan with a single retraining.
    level : float
        Of the intervals.
    """

    points: tuple[CurvePoint, ...]
    lds_ceiling: float
    level: float

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of models of each point."""
        return tuple(point.n_models for point in self.points)

    @property
    def lds(self) -> NDArray[np.float64]:
        """LDS of each point, (n_points,)."""
        return np.array([point.lds for point in self.points])

    def models_for(self, lds: float) -> float:
        """Say with how many models the curve first reaches an LDS, taken as linear in log models between points.

        Returns
        -------
        n_models : float
            nan where the curve ends below that LDS, or begins above it.
        """
        reached = np.flatnonzero(self.lds >= lds)
        if not len(reached) or (reached[0] == 0 and self.lds[0] > lds):
            return math.nan
        last = int(reached[0])
        if last == 0:
            return float(self.counts[0])
        low, high = self.lds[last - 1 : last + 1]
        fewer, more = self.counts[last - 1 : last + 1]
        return float(fewer * (more / fewer) ** ((lds - low) / (high - low)))

    def as_rows(self) -> list[dict[str, float | int | None]]:
        """Give a row for each point, ready for JSON: None stands for what is not defined.

        Returns
        -------
        rows : list of dict
            The attributes of `CurvePoint` by name.
        """
        return [{name: _or_none(value) for name, value in asdict(point).items()} for point in self.points]

    def as_dict(self) -> dict[str, Any]:
        """Give all there is, ready for JSON: `lds_ceiling`, `level`, and `points` as `as_rows` gives them."""
        return {"lds_ceiling": _or_none(self.lds_ceiling), "level": self.level, "points": self.as_rows()}

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Take what `as_dict` gave.

        Raises
        ------
        SpecError
            If it is anything else.
        """
        try:
            points = tuple(_point_of(row) for row in data["points"])
            curve = cls(points, _number(data["lds_ceiling"]), _number(data["level"]))
        except (TypeError, KeyError) as error:
            raise SpecError(f"no learning curve: {type(error).__name__} {error}") from error
        if not 0 < curve.level < 1:
            raise SpecError(f"no learning curve: level {curve.level}")
        _check_rising(curve.counts)
        return curve

    def table(self) -> Table:
        """Lay the points out for a terminal."""
        has_prior = any(point.prior_strength is not None for point in self.points)
        columns = ["LDS", f"{self.level:.0%} interval", "of its ceiling", "R2", "nonzero weights"]
        columns += ["prior strength"] if has_prior else []
        table = Table("models", *columns, box=None, header_style="bold")
        for column in table.columns:
            column.justify = "right"
        for point in self.points:
            interval = f"{readable_score(point.lds_low)} to {readable_score(point.lds_high)}"
            share = point.lds / self.lds_ceiling if self.lds_ceiling > 0 else math.nan
            scores = (readable_score(point.lds), interval, readable_score(share), readable_score(point.r2))
            strength = () if point.prior_strength is None else (f"{point.prior_strength:g}",)
            table.add_row(f"{point.n_models:,}", *scores, f"{point.nonzero_weights:,.1f}", *strength)
        return table

    def __str__(self) -> str:
        return readable_table(self.table())

    def __repr__(self) -> str:
        return f"<LearningCurve: {len(self.points)} points, {self.counts[0]:,} to {self.counts[-1]:,} models>"


def learning_curve(
    masks: RowSliceable,
    outputs: RowSliceable,
    held_out_masks: RowSliceable,
    held_out_outputs: RowSliceable,
    *,
    counts: Sequence[int],
    n_retrainings: int | None = None,
    validation: float = 0.1,
    prior: NDArray[Any] | None = None,
    is_positive: bool = False,
    n_bootstraps: int = 500,
    n_splits: int = 50,
    level: float = 0.95,
    seed: int = 0,
    block_rows: int = BLOCK_ROWS,
    threads: int | None = None,
    progress: Progress | None = None,
) -> LearningCurve:
    """Score `fit` on the first models, for rising numbers of them, on held-out models.

    The point of M models is exactly `evaluate(fit(masks[:M], outputs[:M], validation=validation, ...), ...)` for
    float16 outputs of ordinary size, whose moments are exact; for wider ones up to rounding.

    Parameters
    ----------
    masks, outputs, validation, prior, is_positive, block_rows, threads
        As for `fitting.fit`.
    held_out_masks, held_out_outputs, n_retrainings, n_bootstraps, n_splits, level, seed
        As for `evaluate.evaluate`; read once.
    counts : sequence of int
        Numbers of models, rising. Of the models, so many as the last are read, once.
    progress : callable, optional
        Called with (stage, done, in all); the stages are "moments" in rows and "points" in fits.

    Raises
    ------
    SpecError
        Counts that do not rise, are more than the models or too few to split, or shapes that disagree, before anything
        is read; else as for `fit` and `evaluate`.

    Notes
    -----
    A point is open from its first validation row to its last. With k points open memory holds k + 1 sets of moments:
    of the rows before the first open point's validation rows, and of those from each one's first to the next one's. A
    fit adds what `fit_moments` holds, and where k > 1 the sum of a point's validation rows. Points 1 / (1 - validation)
    apart or more are open one at a time, and the curve then holds no more than its largest `fit`.
    """
    _, n_train, n_targets = check_shapes(masks, outputs)
    if prior is not None:
        check_prior(prior, n_train=n_train, n_targets=n_targets)
    estimate = functools.partial(fit_moments, prior=prior, is_positive=is_positive, threads=threads)
    curves = learning_curves(
        masks,
        outputs,
        held_out_masks,
        held_out_outputs,
        estimates={"": estimate},
        counts=counts,
        n_retrainings=n_retrainings,
        validation=validation,
        n_bootstraps=n_bootstraps,
        n_splits=n_splits,
        level=level,
        seed=seed,
        block_rows=block_rows,
        threads=threads,
        progress=progress,
    )
    return curves[""]


def learning_curves(
    masks: RowSliceable,
    outputs: RowSliceable,
    held_out_masks: RowSliceable,
    held_out_outputs: RowSliceable,
    *,
    estimates: Mapping[str, Estimate],
    counts: Sequence[int],
    n_retrainings: int | None = None,
    validation: float = 0.1,
    n_bootstraps: int = 500,
    n_splits: int = 50,
    level: float = 0.95,
    seed: int = 0,
    block_rows: int = BLOCK_ROWS,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, LearningCurve]:
    """Draw the learning curves of several estimates over the same models, which are read once for all of them.

    Parameters
    ----------
    estimates : mapping of str to callable
        At least one `Estimate` by name: `fit_moments` or `alternatives.ridge`, or a `functools.partial` of one with
        its settings.
    threads : int, optional
        Of the moments; the estimates have their own.
    masks, outputs, held_out_masks, held_out_outputs, counts, progress and the other settings
        As for `learning_curve`.

    Returns
    -------
    curves : dict of str to LearningCurve
        By the estimates' names.

    Raises
    ------
    SpecError
        If there are no estimates; else as for `learning_curve`.
    """
    if not estimates:
        raise SpecError("there are no estimates to draw a curve of; hand in at least one, by name")
    n_models, *columns = check_shapes(masks, outputs)
    n_held_out, *held_out_columns = check_shapes(held_out_masks, held_out_outputs)
    if columns != held_out_columns:
        raise SpecError(
            f"held-out masks {held_out_masks.shape} and outputs {held_out_outputs.shape} do not fit masks "
            f"{masks.shape} and outputs {outputs.shape}; hand in held-out models of the same run"
        )
    splits = split_counts(counts, n_models=n_models, validation=validation)
    rows, truth = read_masks(held_out_masks, 0, n_held_out), read_outputs(held_out_outputs, 0, n_held_out)
    scores: dict[str, list[tuple[CurvePoint, Evaluation]]] = {name: [] for name in estimates}
    in_all = len(splits) * len(estimates)
    for fitting, held_out in _moments_of_points(
        masks, outputs, splits, block_rows=block_rows, threads=threads, progress=progress
    ):
        for name, estimate in estimates.items():
            datamodels = estimate(fitting, held_out)
            evaluation = evaluate(
                datamodels,
                rows,
                truth,
                n_retrainings=n_retrainings,
                n_bootstraps=n_bootstraps,
                n_splits=n_splits,
                level=level,
                seed=seed,
            )
            scores[name].append((_point(datamodels, evaluation, fitting.n + held_out.n), evaluation))
            if progress is not None:
                progress("points", sum(map(len, scores.values())), in_all)
        del fitting, held_out  # or they would be held while further rows are read
    return {
        name: LearningCurve(tuple(point for point, _ in scored), scored[0][1].lds_ceiling, level)
        for name, scored in scores.items()
    }


def split_counts(counts: Sequence[int], *, n_models: int, validation: float) -> list[tuple[int, int]]:
    """Say for each of some numbers of models where its validation rows begin and end.

    Raises
    ------
    SpecError
        If the numbers do not rise, go beyond `n_models`, or begin with too few to be split.
    """
    whole = []
    for count in counts:
        try:
            whole.append(operator.index(count))
        except TypeError:
            raise SpecError(f"counts hold {count!r}; give whole numbers of models, such as 1000") from None
    _check_rising(whole)
    if whole[-1] > n_models:
        raise SpecError(
            f"counts go up to {whole[-1]:,}, but there are {n_models:,} models; choose no more, or train more models",
            n_models=n_models,
        )
    try:
        return [(split_rows(count, validation), count) for count in whole]
    except SpecError as error:
        if not 0 < validation < 1:
            raise
        raise SpecError(f"counts begin too low at {whole[0]:,}: {error}, or begin with more", counts=whole) from error


def default_counts(n_models: int, *, validation: float = 0.1) -> list[int]:
    """Space about seven numbers of models evenly in their logarithm, from a sixteenth up to `n_models`.

    They are rounded to two digits, but for the last; those too few to be split are left out.

    Examples
    --------
    >>> default_counts(4000)
    [250, 400, 630, 1000, 1600, 2500, 4000]
    """
    rounded = {int(float(f"{count:.2g}")) for count in np.geomspace(n_models / 16, n_models, 7)[:-1]}
    usable = [count for count in sorted(rounded) if count < n_models and _can_be_split(count, validation)]
    return [*usable, n_models]


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
    """Say in words what a figure of these curves shows."""
    said = []
    for name, curve in curves.items():
        first, last = curve.points[0], curve.points[-1]
        from_first = f"{readable_score(first.lds)} with {first.n_models:,} models"
        said.append(f"{name} from {from_first} to {readable_score(last.lds)} with {last.n_models:,}".strip())
    return f"LDS against the number of models: {'; '.join(said)}."


_BESIDE = 1.06
"""The axis of models goes beyond the first and the last by this factor."""


def _check_rising(counts: Sequence[int]) -> None:
    if not counts or counts[0] < 1 or any(a >= b for a, b in itertools.pairwise(counts)):
        shown = ", ".join(map(str, counts)) or "empty"
        raise SpecError(
            f"counts are {shown}; give at least one number of models, in rising order, such as 500, 1000, 2000",
            counts=list(counts),
        )


def _can_be_split(count: int, validation: float) -> bool:
    try:
        split_rows(count, validation)
    except SpecError:
        return False
    return True


def _moments_of_points(
    masks: RowSliceable,
    outputs: RowSliceable,
    splits: Sequence[tuple[int, int]],
    *,
    block_rows: int,
    threads: int | None,
    progress: Progress | None,
) -> Iterator[tuple[Moments, Moments]]:
    """Give each point's moments of the rows to fit on and of its validation rows, reading each row once.

    Points end in the order in which their validation rows begin. So the first of `sums`, the rows before the first
    open point's validation rows, is always what the next point to end is fitted on.
    """
    in_all = splits[-1][1]
    begin = deque(n_fit for n_fit, _ in splits)
    ends = {n_models for _, n_models in splits}
    sums: list[Moments | None] = [None]
    at = 0
    for stop in sorted({*begin, *ends}):
        report = None if progress is None else functools.partial(_count_on, progress, at, in_all)
        rows: dict[str, Any] = {
            "start": at,
            "stop": stop,
            "block_rows": block_rows,
            "threads": threads,
            "progress": report,
        }
        part = sums.pop()
        sums.append(Moments.of(masks, outputs, **rows) if part is None else part.extended(masks, outputs, **rows))
        del part  # its successor holds all it held
        at = stop
        if stop in ends:
            fitting = _sum(sums[:1])
            yield fitting, _sum(sums[1:])
            del fitting
            sums[:2] = [_sum(sums[:2])]
        while begin and begin[0] == stop:
            begin.popleft()
            sums.append(None)


def _sum(parts: Sequence[Moments | None]) -> Moments:
    """Add up what has rows: two points may begin to validate at the same row."""
    return functools.reduce(operator.add, (part for part in parts if part is not None))


def _count_on(progress: Progress, before: int, in_all: int, done: int, _: int) -> None:
    progress("moments", before + done, in_all)


def _point(datamodels: Datamodels, evaluation: Evaluation, n_models: int) -> CurvePoint:
    e = evaluation
    nonzero = float(np.count_nonzero(datamodels.weight) / datamodels.n_targets)
    return CurvePoint(n_models, e.lds, e.lds_low, e.lds_high, e.r2, nonzero, datamodels.prior_strength)


def _point_of(row: Any) -> CurvePoint:
    """Take a row of `as_rows`; TypeError or KeyError for anything else."""
    scores = {name: _number(row[name]) for name in ("lds", "lds_low", "lds_high", "r2", "nonzero_weights")}
    strength = None if row["prior_strength"] is None else _number(row["prior_strength"])
    return CurvePoint(n_models=_count(row["n_models"]), prior_strength=strength, **scores)


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


def _or_none(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _number(value: Any) -> float:
    """Read a number of JSON, None for what is not defined."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is no count")
    return value
