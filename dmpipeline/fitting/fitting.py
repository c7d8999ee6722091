"""Fitting: from masks and outputs, or their second moments, to datamodels.

Masks and outputs are taken in any form that has rows, and are read once. The strength of the penalty is chosen for
each target on rows held out, and the fit is then repeated on all rows at that strength. Every fit comes with a
certificate of how near its optimum it is.

Nothing is read before the shapes and settings are known to be usable.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from dmdata.reading.long_work import shows_stages
from dmpipeline.errors import ConvergenceError, SpecError
from dmpipeline.fitting.checkpoints import Checkpoints, Sizes
from dmpipeline.fitting.counting import counted_moments
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.fitting.guides.priors import TRUSTS, check_prior
from dmpipeline.fitting.pairs.estimation import estimate_pairs
from dmpipeline.fitting.settings import VALIDATION, FitKeywords, FitSettings, StageProgress
from dmpipeline.fitting.solving import Fit
from dmpipeline.moments.arrays import RowSliceable, check_shapes
from dmpipeline.moments.moments import BLOCK_ROWS, Moments, checked_targets
from dmpipeline.moments.overlaps import Possible, warn_of_held_out_rows

FEW_MODELS = 10_000
FOLDS_OF_FEW = 3
"""A tenth of so few models does not say how far a prior may be trusted, so a fit with one has folds.

LDS on digits, wine, breast_cancer and MNIST with 250 to 4,000 models, next to a tenth held out: of log likelihoods it
is higher by up to 0.035, of margins by up to 0.006 and never lower by more than 0.0004. Five folds are no better.
"""

_STAGES = {"moments": "models", "paths": "targets", "refit": "targets", "pairs": "models"}


@shows_stages(_STAGES)
def fit(
    masks: RowSliceable,
    outputs: RowSliceable,
    *,
    validation: float = VALIDATION,
    folds: int | None = None,
    prior: NDArray[Any] | None = None,
    pairs: bool = False,
    targets: slice | None = None,
    block_rows: int = BLOCK_ROWS,
    directory: str | os.PathLike[str] | None = None,
    scheduler: str | None = None,
    sizes: Sizes | None = None,
    progress: StageProgress | None = None,
    settings: FitSettings | None = None,
    **changes: Unpack[FitKeywords],
) -> Datamodels:
    """Fit a sparse linear datamodel to every target.

    Parameters
    ----------
    masks : bool or 0/1, shape (n_models, n_train)
        Which examples each model was trained on: an array of any kind that `dmpipeline.moments.arrays` takes, such as a
        LazyArray, Zarr or dask array, a sparse one, a torch tensor or a DataFrame.
    outputs : real, shape (n_models, n_targets)
        What each model said about each target, such as a float16 margin.
    validation : float
        Share of the rows, the last ones, on which lam is chosen. Not used with `folds`.
    folds : int, optional
        Choose lam by cross-validation with this many folds instead: each contiguous fold of rows is held out in turn,
        and the median of their lams of least error taken, which few odd rows do not decide. It takes that many times as
        long, and holds two more sets of moments than folds where a split holds two. A fit with a prior of fewer than
        `FEW_MODELS` models has `FOLDS_OF_FEW` folds unless this or another `validation` than 0.1 is given; in a
        directory, its moments are counted apart from those of a plain fit.
    prior : array of float, shape (n_train, n_targets), optional
        Scores that say which examples are likely to matter for a target; any attribution will do. There is a fit with
        each of `priors.TRUSTS`: likely examples are penalised less, and weights are shrunk towards the target's scores,
        or towards a combination of those of the other targets of its block too, instead of towards zero (but not if
        `is_positive`). What comes back is a mixture of these fits, the plain one and the bare scores, one for all
        targets, that predicts the validation models best (`mixing.best_mixture`). Weights may then be dense. The fit
        takes up to four times as long, with folds as many times that, and holds the standardised weights of four fits
        rather than one; a useless prior costs little else.
    pairs : bool
        Add what two examples do together beyond the sum of both, for pairs of each target's 100 examples of largest
        weight: see `dmpipeline.fitting.pairs.estimation`. They are left out where the models that choose lam do not
        speak for them. Masks and outputs are read twice more, not on a cluster; examples should be in the subsets
        independently of one another, or in equally many of each.
    targets : slice, optional
        Fit these columns of `outputs` alone. The second moments are of all columns, so with a `directory` the fit of
        others reads no mask again.
    block_rows : int
        Models read at a time.
    directory : path, optional
        Keep there what is finished, moments of rows and blocks of targets: the same fit resumes from it after it was
        killed, large arrays are mapped from it rather than held in memory, and the moments stay for later fits, with
        other settings or more models. Data are known by all of their rows, so only what changed is counted again:
        see `dmpipeline.fitting.checkpoints`.
    scheduler : str, optional
        Address of a Dask scheduler, as ``tcp://host:8786``, whose workers do the work. They must see `directory` under
        the same path. Masks and outputs should be arrays that they can open, such as LazyArrays; others are sent to
        them.
    sizes : Sizes, optional
        How much is kept in `directory`, and in what pieces.
    progress : callable, optional
        See `dmpipeline.fitting.settings.StageProgress`.
    settings : FitSettings, optional
        How targets are solved; the defaults of its fields if not given.
    **changes
        Fields of `FitSettings` by name, such as ``tol=1e-4``; they take the place of those in `settings`.

    Returns
    -------
    datamodels : Datamodels
        With a certificate. An example that is in all subsets or in none has weight 0; a target that never varies has
        weights 0.

    Raises
    ------
    SpecError
        Shapes that disagree, too few rows or an unusable setting, before anything is read; masks other than 0 and 1
        or outputs that are not finite, once they are met.
    ConvergenceError
        If `strict`, naming the targets that did not reach `tol`.

    Warns
    -----
    RuntimeWarning
        If not `strict` and some targets did not reach `tol`.
    DataWarning
        If a run's held-out models are among the rows, or seem to be: then subsets repeat.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> masks = rng.random((500, 20)) < 0.5
    >>> outputs = 3.0 * masks[:, [4]] + 0.1 * rng.standard_normal((500, 1))
    >>> dm = fit(masks, outputs)
    >>> int(abs(dm.weight[:, 0]).argmax()), bool(abs(dm.weight[4, 0] - 3) < 0.1)
    (4, True)
    """
    settings = (settings or FitSettings()).with_changes(**changes)
    n_models, n_train, n_targets = check_shapes(masks, outputs)
    if prior is not None:
        check_prior(prior, n_train=n_train, n_targets=n_targets)
    if targets is not None:
        targets = checked_targets(targets, n_targets)
        if pairs:
            raise SpecError(
                f"pairs of targets {targets.start}:{targets.stop} alone are not looked for; hand in these columns of "
                "the outputs instead of targets, or leave pairs out",
                field="targets",
            )
        prior = None if prior is None else prior[:, targets]
    folds = folds_of(n_models, validation=validation, folds=folds, is_guided=prior is not None)
    ends = ends_of_parts(n_models, validation=validation, folds=folds)
    ranges = list(zip([0, *ends], ends, strict=False))
    place = Checkpoints.at(directory, scheduler, sizes=sizes)
    with place.claimed():
        rows = counted_moments(
            place,
            masks,
            outputs,
            ranges,
            block_rows=block_rows,
            threads=settings.threads,
            progress=Fit(settings, progress=progress).report("moments", n_models),
        )
        size = sum(int(part.ones.sum(dtype=np.int64)) for part in rows.parts) / n_models
        possible = Possible.subsets(n_train, size)
        warn_of_held_out_rows((masks, outputs), rows.mask_keys, possible, stacklevel=3)
        facts = [settings.key, prior, ranges, rows.digest] + ([] if prior is None else [TRUSTS])
        own = Fit(settings, prior, place.under("fit", *facts, *([] if targets is None else [targets])), progress)
        own.place.clear_unfinished()
        parts = rows.parts if targets is None else [part.of_targets(targets) for part in rows.parts]
        try:
            fitted = own.folds(parts) if folds else own.split(*parts)
        except ConvergenceError:
            own.place.remove()
            raise
        own.place.remove()
        terms = None
        if pairs:
            report = own.report("pairs", n_models + ranges[-1][0])
            terms = estimate_pairs(masks, outputs, fitted.blind(), threads=settings.n_threads, progress=report)
    return replace(fitted.datamodels, fitted_masks=rows.mask_keys, pairs=terms)


@shows_stages(_STAGES)
def fit_moments(
    fitting: Moments,
    held_out: Moments,
    *,
    prior: NDArray[Any] | None = None,
    progress: StageProgress | None = None,
    settings: FitSettings | None = None,
    **changes: Unpack[FitKeywords],
) -> Datamodels:
    """Fit from second moments: choose lam on the rows of `held_out`, then fit the rows of both at that lam.

    The other arguments are those of `fit`. No model is read, so the time does not depend on how many there were.
    """
    settings = (settings or FitSettings()).with_changes(**changes)
    return Fit(settings, prior, progress=progress).split(fitting, held_out).datamodels


@shows_stages(_STAGES)
def fit_folds(
    parts: Sequence[Moments],
    *,
    prior: NDArray[Any] | None = None,
    progress: StageProgress | None = None,
    settings: FitSettings | None = None,
    **changes: Unpack[FitKeywords],
) -> Datamodels:
    """Fit from the second moments of two or more sets of rows: hold out each in turn to choose lam, then fit all.

    The other arguments are those of `fit`.
    """
    if len(parts) < 2:
        raise SpecError(f"{len(parts)} sets of moments leave nothing to hold out; hand in at least 2")
    settings = (settings or FitSettings()).with_changes(**changes)
    return Fit(settings, prior, progress=progress).folds(parts).datamodels


def split_rows(n_models: int, validation: float) -> int:
    """Count the rows to fit on; those after them, `validation` of all, choose lam.

    Raises
    ------
    SpecError
        If there are not two of each, or `validation` is not a share.
    """
    if not 0 < validation < 1:
        raise SpecError(f"validation {validation} is not a share of the rows; choose between 0 and 1, such as 0.1")
    n_validation = max(round(validation * n_models), 1)
    n_fit = n_models - n_validation
    if n_fit < 2 or n_validation < 2:
        raise SpecError(
            f"{n_models} models with validation {validation} leave {n_fit} to fit and {n_validation} to validate; "
            "expected at least 2 of each: train more models, or choose another share",
            n_fit=n_fit,
            n_validation=n_validation,
        )
    return n_fit


def folds_of(n_models: int, *, validation: float, folds: int | None, is_guided: bool) -> int | None:
    """Return with how many folds a fit chooses lam, None for rows held out: those asked for, or few models' own."""
    if folds is None and is_guided and validation == VALIDATION and 2 * FOLDS_OF_FEW <= n_models < FEW_MODELS:
        return FOLDS_OF_FEW
    return folds


def ends_of_parts(n_models: int, *, validation: float, folds: int | None) -> list[int]:
    """Return the row at which each part ends: what is fitted and what is held out, or the folds."""
    if folds is None:
        return [split_rows(n_models, validation), n_models]
    if folds < 2 or n_models < 2 * folds:
        raise SpecError(
            f"{n_models} models cannot be cut into {folds} folds; choose at least 2, of at least 2 models each",
            n_models=n_models,
            folds=folds,
        )
    return [n_models * (k + 1) // folds for k in range(folds)]
