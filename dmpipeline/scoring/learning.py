"""Drawing learning curves: fit on the first models, for rising numbers of them, and score on held-out ones.

A curve says whether more models are worth their price, and what an estimate, or a prior, saves of them. All points and
estimates share second moments that grow along the rows, so each row is read once however many there are.
"""

import functools
import itertools
import operator
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from dmdata.reading.long_work import shows_stages
from dmpipeline.errors import SpecError
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.fitting.fitting import ends_of_parts, fit_folds, fit_moments, folds_of, split_rows
from dmpipeline.fitting.guides.priors import check_prior
from dmpipeline.fitting.limits import LinearLimit
from dmpipeline.fitting.settings import VALIDATION, StageProgress
from dmpipeline.moments.arrays import RowSliceable, check_shapes
from dmpipeline.moments.moments import BLOCK_ROWS, Moments
from dmpipeline.scoring.curves import CurvePoint, LearningCurve, check_rising
from dmpipeline.scoring.decomposition import ErrorLaw
from dmpipeline.scoring.evaluation import Evaluation, HeldOut, ScoreKeywords, check_keywords

Estimator = Callable[[Moments, Moments], Datamodels]
"""Fits datamodels from the moments of the rows to fit on and of those that choose lam, as `fit_moments` does."""


_STAGES = {"moments": "models", "points": "fits"}


@shows_stages(_STAGES)
def learning_curves(
    masks: RowSliceable,
    outputs: RowSliceable,
    held_out_masks: RowSliceable,
    held_out_outputs: RowSliceable,
    *,
    estimates: Mapping[str, Estimator],
    priors: Mapping[str, NDArray[Any]] | None = None,
    counts: Sequence[int],
    validation: float = VALIDATION,
    block_rows: int = BLOCK_ROWS,
    threads: int | None = None,
    progress: StageProgress | None = None,
    **scoring: Unpack[ScoreKeywords],
) -> dict[str, LearningCurve]:
    """Score estimates on the first models, for rising numbers of them, on held-out models; each row is read once.

    With `fit_moments`, and with a prior, the point of M models is exactly `evaluate(fit(masks[:M], outputs[:M], ...),
    ...)` for float16 outputs of ordinary size, whose moments are exact; for wider ones up to rounding. Where a fit with
    a prior has folds, because models are few, their rows are read again.

    Parameters
    ----------
    masks, outputs, validation, block_rows
        As for `dmpipeline.fit`.
    held_out_masks, held_out_outputs
        As `masks` and `outputs` of `evaluate`.
    estimates : mapping of str to callable
        At least one `Estimator` by name: `fit_moments` or `dmpipeline.ridge`, or a `functools.partial` of one with
        its settings.
    priors : mapping of str to array of float, shape (n_train, n_targets), optional
        Scores by name, other names than the estimates'; each stands for fits with it as `prior`, see `dmpipeline.fit`.
    threads : int, optional
        Of the moments; the estimates have their own.
    counts : sequence of int
        Numbers of models, rising. As many models as the last are read.
    progress : callable, optional
        Called with (stage, done, total); the stages are "moments" in rows and "points" in fits.
    **scoring
        `n_retrainings`, `n_bootstraps`, `n_splits`, `level` and `seed` of `evaluate`.

    Returns
    -------
    curves : dict of str to LearningCurve
        By the names of estimates and priors.

    Raises
    ------
    SpecError
        No estimates, counts that do not rise, are more than the models or too few to split, or shapes that disagree,
        before anything is read; else as for `fit` and `evaluate`.

    Notes
    -----
    A point is open from its first validation row to its last. With k points open memory holds k + 1 sets of moments:
    of the rows before the first open point's validation rows, and of those from each one's first to the next one's. A
    fit adds what `fit_moments` holds, and where k > 1 the sum of a point's validation rows. Points 1 / (1 - validation)
    apart or more are open one at a time, and the curve then holds no more than its largest `fit`. A fit with folds
    holds its own moments next to those.
    """
    check_keywords(scoring, of="learning_curves")
    if not estimates and not priors:
        raise SpecError("there are no estimates to draw a curve of; hand in at least one, by name")
    n_models, *columns = check_shapes(masks, outputs)
    _, *held_out_columns = check_shapes(held_out_masks, held_out_outputs)
    if columns != held_out_columns:
        raise SpecError(
            f"held-out masks {held_out_masks.shape} and outputs {held_out_outputs.shape} do not fit masks "
            f"{masks.shape} and outputs {outputs.shape}; hand in held-out models of the same run"
        )
    splits = split_counts(counts, n_models=n_models, validation=validation)
    priors = priors or {}
    if twice := sorted(priors.keys() & estimates.keys()):
        raise SpecError(f"priors have names of estimates, {', '.join(twice)}; choose others")
    for prior in priors.values():
        check_prior(prior, n_train=columns[0], n_targets=columns[1])
    moments = functools.partial(Moments.of, masks, outputs, block_rows=block_rows, threads=threads)
    scored_on = HeldOut.read(held_out_masks, held_out_outputs, **scoring)
    scores: dict[str, list[tuple[CurvePoint, Evaluation, LinearLimit | None]]] = {
        name: [] for name in (*estimates, *priors)
    }
    total = len(splits) * len(scores)

    for fitting, held_out in _moments_of_points(
        masks, outputs, splits, block_rows=block_rows, threads=threads, progress=progress
    ):
        n_fitted = fitting.n + held_out.n
        fits = itertools.chain(
            ((name, estimate(fitting, held_out)) for name, estimate in estimates.items()),
            _guided_fits(priors, fitting, held_out, validation, moments),
        )
        for name, datamodels in fits:
            evaluation = scored_on.scores_of(datamodels, in_parts=n_fitted == splits[-1][1])
            scores[name].append((_point(datamodels, evaluation, n_fitted), evaluation, datamodels.limit))
            if progress is not None:
                progress("points", sum(map(len, scores.values())), total)
        del fitting, held_out, fits  # or they would be held while further rows are read
    return {name: _curve(scored) for name, scored in scores.items()}


def _guided_fits(
    priors: Mapping[str, NDArray[Any]],
    fitting: Moments,
    held_out: Moments,
    validation: float,
    moments: Callable[..., Moments],
) -> Iterator[tuple[str, Datamodels]]:
    """Fit with each prior as `fit` does; `moments` counts those of rows by `start` and `stop`."""
    n_models = fitting.n + held_out.n
    folds = folds_of(n_models, validation=validation, folds=None, is_guided=bool(priors))
    if folds is None:
        yield from ((name, fit_moments(fitting, held_out, prior=prior)) for name, prior in priors.items())
        return
    ends = ends_of_parts(n_models, validation=validation, folds=folds)
    parts = [moments(start=start, stop=stop) for start, stop in itertools.pairwise([0, *ends])]
    yield from ((name, fit_folds(parts, prior=prior)) for name, prior in priors.items())


def _curve(scored: Sequence[tuple[CurvePoint, Evaluation, LinearLimit | None]]) -> LearningCurve:
    """Put evaluations on a curve; what more models cannot take away is told from the most of them."""
    points = tuple(point for point, _, _ in scored)
    _, last, limit = scored[-1]
    parts = last.decomposition
    if parts is None or limit is None:
        return LearningCurve(points, last.lds_ceiling, last.level)
    errors = [parts.estimation_of(evaluation.target_mse, limit) for _, evaluation, _ in scored]
    points = tuple(replace(point, estimation=error) for point, error in zip(points, errors, strict=True))
    law = ErrorLaw.of([point.n_models for point in points], errors)
    return LearningCurve(points, last.lds_ceiling, last.level, parts, law)


def split_counts(counts: Sequence[int], *, n_models: int, validation: float) -> list[tuple[int, int]]:
    """Return for each of some numbers of models where its validation rows begin and end.

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
    check_rising(whole)
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


def default_counts(n_models: int, *, validation: float = VALIDATION) -> list[int]:
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
    progress: StageProgress | None,
) -> Iterator[tuple[Moments, Moments]]:
    """Yield each point's moments of the rows to fit on and of its validation rows, reading each row once.

    Points end in the order in which their validation rows begin. So the first of `sums`, the rows before the first
    open point's validation rows, is always what the next point to end is fitted on.
    """
    total = splits[-1][1]
    begin = deque(n_fit for n_fit, _ in splits)
    ends = {n_models for _, n_models in splits}
    sums: list[Moments | None] = [None]
    at = 0
    for stop in sorted({*begin, *ends}):
        report = None if progress is None else functools.partial(_count_on, progress, at, total)
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


def _count_on(progress: StageProgress, before: int, total: int, done: int, _: int) -> None:
    progress("moments", before + done, total)


def _point(datamodels: Datamodels, evaluation: Evaluation, n_models: int) -> CurvePoint:
    e = evaluation
    nonzero = float(np.count_nonzero(datamodels.weight) / datamodels.n_targets)
    return CurvePoint(n_models, e.lds, e.lds_low, e.lds_high, e.r2, nonzero, datamodels.prior_strength, e.mse)
