"""Datamodels: for every target, a sparse linear model from the training subset to the trained model's output.

`fit` takes masks and outputs in any form that gives rows, reads them once, and returns `Datamodels` in the space of
the raw masks: an output is predicted by `masks @ weight + bias`. The strength of the penalty is chosen for each
target on the last rows, and the fit is then repeated on all rows at that strength. Every fit comes with a certificate
of how near its optimum is.

Nothing is read before the shapes and settings are known to be usable, and a saved file is complete or not there.
"""

import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

import dmdata
from dmdata.errors import FormatError
from dmpipeline import lasso
from dmpipeline.errors import ConvergenceError, SpecError, explain_os_errors
from dmpipeline.moments import BLOCK_ROWS, Moments, RowSliceable, as_binary, check_shapes

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, in all); the stages are "moments" in rows, then "paths" and "refit" in targets."""


@dataclass(frozen=True, slots=True, eq=False)
class Certificate:
    """How near its optimum each target's fit is; measured in float64 from the weights themselves.

    Attributes
    ----------
    gap : array of float64, shape (n_targets,)
        Duality gap as a share of the output's variance: the objective is at most this far above its minimum.
    kkt : array of float64, shape (n_targets,)
        Worst violation of an optimality condition over all examples, as a share of lam.
    """

    gap: NDArray[np.float64]
    kkt: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Datamodels:
    """A fitted set of datamodels, one column a target, in raw-mask space.

    Attributes
    ----------
    weight : array of float32, shape (n_train, n_targets)
        Change of the output when the example joins the subset, in the output's units.
    bias : array of float32, shape (n_targets,)
        Predicted output of the empty subset.
    lam : array of float32, shape (n_targets,)
        The chosen strength in 1/2n |y - Xw|^2 + lam |w|_1, where X are masks centred and scaled to unit variance.
    certificate : Certificate or None
        None where the set was read from a file, which holds no certificate.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    lam: NDArray[np.float32]
    certificate: Certificate | None = None

    def __repr__(self) -> str:
        nonzero = np.count_nonzero(self.weight) / max(self.n_targets, 1)
        return (
            f"<Datamodels: {self.n_targets} targets, {self.n_train} examples, {nonzero:.0f} nonzero weights a target>"
        )

    @property
    def n_train(self) -> int:
        """Training examples a mask covers."""
        return int(self.weight.shape[0])

    @property
    def n_targets(self) -> int:
        """Targets predicted."""
        return int(self.weight.shape[1])

    def predict(self, masks: RowSliceable, *, block_rows: int = BLOCK_ROWS) -> NDArray[np.float32]:
        """Predict the outputs of models trained on these subsets, reading `block_rows` masks at a time.

        Parameters
        ----------
        masks : bool or 0/1, shape (n_models, n_train)

        Returns
        -------
        outputs : array of float32, shape (n_models, n_targets)

        Raises
        ------
        SpecError
            Masks of another width, or with other values than 0 and 1.
        """
        if not hasattr(masks, "shape"):
            raise SpecError(f"masks are a {type(masks).__name__}; hand in an array, such as numpy.asarray(masks)")
        if len(masks.shape) != 2 or masks.shape[1] != self.n_train:
            raise SpecError(
                f"masks have shape {masks.shape}; these datamodels expect (n_models, {self.n_train})", shape=masks.shape
            )
        predicted = np.empty((masks.shape[0], self.n_targets), np.float32)
        for first in range(0, len(predicted), block_rows):
            block = as_binary(np.asarray(masks[first : first + block_rows]), first=first)
            np.matmul(block.astype(np.float32), self.weight, out=predicted[first : first + block_rows])
        predicted += self.bias
        return predicted

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the release's `.pt` form: a dict of the float32 tensors `weight`, `bias` and `lam`.

        The file is written beside its destination and moved into place, so a reader finds all of it or none.

        Raises
        ------
        SpecError
            If the path does not end in ``.pt``, by which the form is known when it is read.
        RunError
            If the file cannot be written.
        """
        path = Path(path)
        if path.suffix != ".pt":
            raise SpecError(f"{path} does not end in .pt, so it would not be read again; choose {path.name}.pt")
        tensors = {name: torch.from_numpy(np.array(getattr(self, name), np.float32)) for name in _TENSORS}
        with explain_os_errors(path):
            _save_whole(tensors, path)
        return path

    @classmethod
    def load(cls, name: str | os.PathLike[str], *, catalog: dmdata.CatalogLike = None) -> Self:
        """Read datamodels in the release's form; nothing in the file is unpickled or run.

        Parameters
        ----------
        name : str or path
            Of a `.pt`: a path, a URL, or a name in a catalog, as "cifar/50pct/test_datamodels".
        catalog : Catalog, path or URL, optional
            See `dmdata.load_catalog`.

        Raises
        ------
        FormatError
            Anything but `weight` (n_train, n_targets), `bias` (n_targets,) and `lam` (n_targets,), all real numbers.
        CatalogError, BudgetError, AccessError, ObjectMissingError, SourceError
            If there is no such file or it cannot be read; see `dmdata.open`.
        """
        tensors = [dmdata.open(f"{os.fspath(name)}/{tensor}", catalog=catalog) for tensor in _TENSORS]
        _check_tensors(*tensors)
        weight, bias, lam = (np.asarray(tensor[...], np.float32, order="C") for tensor in tensors)
        return cls(weight=weight, bias=bias, lam=lam)


def fit(
    masks: RowSliceable,
    outputs: RowSliceable,
    *,
    validation: float = 0.1,
    n_lams: int = 100,
    lam_ratio: float = 1e-2,
    tol: float = 1e-3,
    patience: int = 5,
    strict: bool = False,
    block_rows: int = BLOCK_ROWS,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Datamodels:
    """Fit a sparse linear datamodel to every target.

    Parameters
    ----------
    masks : bool or 0/1, shape (n_models, n_train)
        Which examples each model was trained on: an array, LazyArray, Zarr or dask array.
    outputs : real, shape (n_models, n_targets)
        What each model said about each target, say a float16 margin.
    validation : float
        Share of the rows, the last ones, on which lam is chosen.
    n_lams, lam_ratio
        Points of a target's grid, spaced evenly in log lam from the least lam that silences it down to `lam_ratio` of
        that.
    tol : float
        Largest violation of an optimality condition at which a point is accepted, as a share of lam.
    patience : int
        A path stops when so many points in a row have not lowered the validation error.
    strict : bool
        Refuse a target whose last fit did not reach `tol` before its sweeps ran out. Otherwise it is warned of, and its
        certificate tells how near it came.
    block_rows : int
        Models read at a time.
    threads : int, optional
        Targets solved at a time; all processors if not given. The result does not depend on it.
    progress : callable, optional
        See `Progress`.

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
    n_models, _, _ = check_shapes(masks, outputs)
    n_fit = split_rows(n_models, validation)
    _check_settings(n_lams=n_lams, lam_ratio=lam_ratio, tol=tol, patience=patience, threads=threads)

    def rows_done(done: int, _: int) -> None:
        if progress is not None:
            progress("moments", done, n_models)

    def all_done(done: int, _: int) -> None:
        rows_done(n_fit + done, n_models)

    return fit_moments(
        Moments.of(masks, outputs, stop=n_fit, block_rows=block_rows, progress=rows_done),
        Moments.of(masks, outputs, start=n_fit, block_rows=block_rows, progress=all_done),
        n_lams=n_lams,
        lam_ratio=lam_ratio,
        tol=tol,
        patience=patience,
        strict=strict,
        threads=threads,
        progress=progress,
    )


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


def fit_moments(
    fitting: Moments,
    held_out: Moments,
    *,
    n_lams: int = 100,
    lam_ratio: float = 1e-2,
    tol: float = 1e-3,
    patience: int = 5,
    strict: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Datamodels:
    """Fit from second moments: choose lam on the rows of `held_out`, then fit the rows of both at that lam.

    The settings are those of `fit`. No model is read, so the time does not depend on how many there were.
    """
    _check_settings(n_lams=n_lams, lam_ratio=lam_ratio, tol=tol, patience=patience, threads=threads)
    threads = threads or lasso.available_threads()
    both = fitting + held_out
    space = _Space.of(fitting)
    gram = space.gram(fitting)
    holdout_gram = space.gram(held_out)
    whole = _Space.of(both)
    n_train, n_targets = both.cross.shape
    start = np.zeros((n_targets, n_train), np.float32)
    lam = np.zeros(n_targets)
    for part, report in _parts(n_targets, "paths", progress):
        cross = space.cross(fitting, part)
        path = lasso.solve_paths(
            gram,
            cross,
            lasso.lambda_grid(cross, n_lams=n_lams, ratio=lam_ratio),
            holdout=lasso.Holdout(holdout_gram, space.cross(held_out, part), space.square(held_out, part)),
            tol=tol,
            patience=patience,
            max_sweeps=_MAX_SWEEPS,
            threads=threads,
            progress=report,
        )
        start[part], lam[part] = path.weight, path.lam
    del gram, holdout_gram
    gram = whole.gram(both)
    gap, kkt, converged = np.zeros(n_targets), np.zeros(n_targets), np.zeros(n_targets, np.bool_)
    for part, report in _parts(n_targets, "refit", progress):
        cross = whole.cross(both, part)
        # a target without a path, constant over the fitting rows, is silenced over all rows too
        lam[part] = np.where(lam[part] > 0, lam[part], np.abs(cross).max(axis=1))
        solution = lasso.solve(
            gram,
            cross,
            whole.square(both, part),
            lam[part],
            start=start[part],
            tol=tol,
            max_sweeps=_MAX_SWEEPS,
            threads=threads,
            progress=report,
        )
        start[part], converged[part] = solution.weight, solution.converged
        gap[part], kkt[part] = solution.gap, solution.kkt
    if not converged.all():
        _tell_unconverged(np.flatnonzero(~converged), gap, tol=tol, strict=strict)
    weight = np.ascontiguousarray(start.T)
    weight *= whole.inverse_scale[:, None].astype(np.float32)
    bias = whole.shift + (whole.y_mean - whole.mean @ weight)
    return Datamodels(
        weight=weight,
        bias=bias.astype(np.float32),
        lam=lam.astype(np.float32),
        certificate=Certificate(gap=gap, kkt=kkt),
    )


_TENSORS = ("weight", "bias", "lam")
_MAX_SWEEPS = 10_000
_TARGETS_AT_ONCE = 512

_LEAST_VARIANCE = 1e-13
"""Below this share of its mean square, a target's variance cannot be told from rounding in float64 sums."""


@dataclass(frozen=True, slots=True, eq=False)
class _Space:
    """The coordinates of a solution: masks less their mean, over their deviation, and outputs less their mean."""

    mean: NDArray[np.float64]  # (n_train,)
    inverse_scale: NDArray[np.float64]  # (n_train,), 0 for an example in all subsets or in none
    shift: NDArray[np.float64]  # (n_targets,)
    y_mean: NDArray[np.float64]  # (n_targets,), less the shift
    varies: NDArray[np.bool_]  # (n_targets,)

    @classmethod
    def of(cls, moments: Moments) -> "_Space":
        mean = moments.ones / moments.n
        variance = mean * (1 - mean)
        inverse_scale = np.divide(1, np.sqrt(variance), out=np.zeros_like(mean), where=variance > 0)
        y_mean = moments.y_sum / moments.n
        y_square = moments.y_squares / moments.n
        varies = y_square - y_mean**2 > _LEAST_VARIANCE * y_square
        return cls(mean, inverse_scale, moments.shift, y_mean, varies)

    def gram(self, moments: Moments) -> NDArray[np.float32]:
        """(X - mean)'(X - mean) / n in these units, a row block at a time; the sums are formed in float64."""
        seen = moments.ones / moments.n
        gram = np.empty(moments.gram.shape, np.float32)
        for first in range(0, len(gram), 256):
            rows = slice(first, first + 256)
            block = moments.gram[rows] / moments.n
            block -= self.mean[rows, None] * seen
            block -= np.outer(seen[rows] - self.mean[rows], self.mean)
            block *= self.inverse_scale[rows, None]
            block *= self.inverse_scale
            gram[rows] = block
        return gram

    def cross(self, moments: Moments, part: slice) -> NDArray[np.float64]:
        """(Y - mean)'(X - mean) / n, shape (n_targets of the part, n_train); zeros for targets that do not vary."""
        seen, y_seen = moments.ones / moments.n, moments.y_sum[part] / moments.n
        y_mean = self._mean_from(moments, part)
        cross = moments.cross[:, part].T / moments.n
        cross -= np.outer(y_mean, seen)
        cross -= np.outer(y_seen - y_mean, self.mean)
        cross *= self.inverse_scale
        cross[~self.varies[part]] = 0
        return cross

    def square(self, moments: Moments, part: slice) -> NDArray[np.float64]:
        """Mean of (y - mean)^2, shape (n_targets of the part,)."""
        y_seen, y_mean = moments.y_sum[part] / moments.n, self._mean_from(moments, part)
        square = moments.y_squares[part] / moments.n - 2 * y_mean * y_seen + y_mean**2
        return np.maximum(square, 0)

    def _mean_from(self, moments: Moments, part: slice) -> NDArray[np.float64]:
        """Give the outputs' mean, counted from the shift of these moments."""
        return self.y_mean[part] + (self.shift[part] - moments.shift[part])


def _tell_unconverged(targets: NDArray[np.intp], gap: NDArray[np.float64], *, tol: float, strict: bool) -> None:
    shown = ", ".join(map(str, targets[:5])) + (", ..." if len(targets) > 5 else "")
    told = (
        f"{len(targets):,} of {len(gap):,} targets did not reach tol {tol} in {_MAX_SWEEPS:,} sweeps ({shown}); their "
        f"duality gap is at most {gap[targets].max():.1e} of the variance: choose a larger tol or lam_ratio"
    )
    if strict:
        raise ConvergenceError(told, targets=targets.tolist(), gap=float(gap[targets].max()))
    warnings.warn(told, RuntimeWarning, stacklevel=4)


def _parts(
    n_targets: int, stage: str, progress: Progress | None
) -> list[tuple[slice, Callable[[int, int], None] | None]]:
    """Cut the targets into parts, each with a reporter that counts over all of them."""

    def reporter(first: int) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, _: progress(stage, first + done, n_targets)

    return [
        (slice(first, min(first + _TARGETS_AT_ONCE, n_targets)), reporter(first))
        for first in range(0, n_targets, _TARGETS_AT_ONCE)
    ]


def _check_settings(*, n_lams: int, lam_ratio: float, tol: float, patience: int, threads: int | None) -> None:
    for name, value, usable, expected in (
        ("n_lams", n_lams, n_lams >= 1, "at least 1"),
        ("lam_ratio", lam_ratio, 0 < lam_ratio < 1, "between 0 and 1, such as 0.01"),
        ("tol", tol, 0 < tol < 1, "between 0 and 1, such as 0.001"),
        ("patience", patience, patience >= 1, "at least 1"),
        ("threads", threads, threads is None or threads >= 1, "at least 1, or leave it out"),
    ):
        if not usable:
            raise SpecError(f"{name} is {value}; choose {expected}", field=name, value=value)


def _save_whole(tensors: dict[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            try:
                torch.save(tensors, file)
            except RuntimeError as error:
                # its writer fails once more where it closes after a failed write, and hides what the system said
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o666 & ~_umask())
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def _check_tensors(weight: dmdata.LazyArray, bias: dmdata.LazyArray, lam: dmdata.LazyArray) -> None:
    if len(weight.shape) != 2 or bias.shape != weight.shape[1:] or lam.shape != weight.shape[1:]:
        raise FormatError(
            f"{weight.url} holds weight {weight.shape}, bias {bias.shape} and lam {lam.shape}; "
            "expected (n_train, n_targets), (n_targets,) and (n_targets,)",
            url=weight.url,
        )
    for tensor in (weight, bias, lam):
        if tensor.dtype.kind != "f":
            raise FormatError(f"{tensor.name} has dtype {tensor.dtype}; expected floating point", url=tensor.url)


def _umask() -> int:
    """Read the process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
