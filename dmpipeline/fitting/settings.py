"""The settings of a fit, in one place: what the solver does with each target, whichever rows and files it is given."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, Self, TypedDict, Unpack, get_args

import numpy as np

from dmpipeline.compute import available_threads
from dmpipeline.errors import SpecError

StageProgress = Callable[[str, int, int], None]
"""Called with (stage, done, total); the stages are "moments" in rows, then "paths" and "refit" in targets."""

BLOCK_TARGETS = 512

VALIDATION = 0.1
"""Share of the models on which lambda is chosen, unless another is given."""

_LEAST_RISE = 0.1
"""A path continues while its error is within this, over the root of the validation models, of the lowest.

Without it 1 to 7 of 100 targets stopped before a minimum up to 5% lower (of 200 to 1,100 planted models); with it none.
"""


class FitKeywords(TypedDict, total=False):
    """The fields of `FitSettings` as keywords, each of them optional."""

    is_positive: bool
    n_lams: int
    lam_ratio: float
    tol: float
    patience: int
    max_sweeps: int
    strict: bool
    block_targets: int
    threads: int | None
    device: str | None


@dataclass(frozen=True, slots=True)
class FitSettings:
    """How targets are solved. `fit`, `fit_moments` and what builds on them take the fields as keywords, too.

    Attributes
    ----------
    is_positive : bool
        Allow no weight below zero (the positive Lasso of Efron et al., Least Angle Regression, 2004).
    n_lams, lam_ratio
        Points of a target's grid, spaced evenly in log lam from the least lam that silences it down to `lam_ratio` of
        that.
    tol : float
        Largest violation of an optimality condition at which a point is accepted, as a share of lam.
    patience : int
        A path stops when this many points in a row have not lowered the validation error, and it has risen by more than
        0.1 / sqrt(validation models) of itself: less is often chance, and a lower minimum lies further on.
    max_sweeps : int
        Most passes of the solver over the active examples of a target at one point.
    strict : bool
        Refuse a target whose last fit did not reach `tol` in `max_sweeps`. Otherwise there is a warning, and the
        target's certificate states how near it came.
    block_targets : int
        Targets prepared, solved and kept together, which bounds memory.
    threads : int, optional
        Targets solved at a time; all processors if not given. The result does not depend on it.
    device : str, optional
        Solve with torch on this device, many targets at a time, such as "cuda"; else on the processors, which is far
        faster than torch on them. The answer is the same except for what `tol` allows. The second moments are counted
        on the processors in both cases.

    Raises
    ------
    SpecError
        If a value is of another type or out of range, or the device is not there.

    Examples
    --------
    >>> FitSettings(tol=1e-4).with_changes(n_lams=50).n_lams
    50
    """

    is_positive: bool = False
    n_lams: int = 100
    lam_ratio: float = 1e-2
    tol: float = 1e-3
    patience: int = 5
    max_sweeps: int = 10_000
    strict: bool = False
    block_targets: int = BLOCK_TARGETS
    threads: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _of_its_type(field.name, field.type, getattr(self, field.name)))
        for name, is_usable, expected in (
            ("n_lams", self.n_lams >= 1, "at least 1"),
            ("lam_ratio", 0 < self.lam_ratio < 1, "between 0 and 1, such as 0.01"),
            ("tol", 0 < self.tol < 1, "between 0 and 1, such as 0.001"),
            ("patience", self.patience >= 1, "at least 1"),
            ("max_sweeps", self.max_sweeps >= 1, "at least 1"),
            ("block_targets", self.block_targets >= 1, "at least 1"),
            ("threads", self.threads is None or self.threads >= 1, "at least 1, or leave it out"),
        ):
            if not is_usable:
                value = getattr(self, name)
                raise SpecError(f"{name} is {value}; choose {expected}", field=name, value=value)
        if self.device is not None:
            from dmpipeline.fitting.solvers.proximal import check_device  # which loads torch

            check_device(self.device)

    def changed(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}

    def with_changes(self, **changes: Unpack[FitKeywords]) -> Self:
        """Return these settings with some fields replaced."""
        return replace(self, **changes)

    @property
    def n_threads(self) -> int:
        """`threads`, or how many processors there are."""
        return self.threads or available_threads()

    @property
    def key(self) -> tuple[object, ...]:
        """Everything that results depend on. Directories of interrupted fits are named by a hash of it."""
        own = (self.is_positive, self.n_lams, self.lam_ratio, self.tol, self.patience, self.max_sweeps, _LEAST_RISE)
        # names of blocks hold their first target only; added last, so that directories of before keep their names
        return own if self.block_targets == BLOCK_TARGETS else (*own, self.block_targets)

    def of_solver(self, *, threads: int | None = None) -> dict[str, Any]:
        """Return the arguments of the solvers that are the same for all targets."""
        where = {"threads": threads or self.n_threads} if self.device is None else {"device": self.device}
        return {"is_positive": self.is_positive, "tol": self.tol, "max_sweeps": self.max_sweeps} | where

    def of_grid(self) -> dict[str, Any]:
        """Return the arguments of `lasso.lambda_grid` that are the same for all targets."""
        return {"n_lams": self.n_lams, "ratio": self.lam_ratio, "is_positive": self.is_positive}

    def of_paths(self, n_validation: int) -> dict[str, Any]:
        """Return what `solve_paths` takes in addition, with this many validation models."""
        return {"patience": self.patience, "least_rise": _LEAST_RISE / n_validation**0.5}


_ACCEPTED: dict[type, tuple[Any, str]] = {
    bool: (bool | np.bool_, "True or False"),
    int: (Real, "a whole number"),
    float: (Real, "a number"),
}


def _of_its_type(name: str, annotation: Any, value: Any) -> Any:
    """Return a setting as Python has it, whatever NumPy made of it."""
    kind, *optional = get_args(annotation) or (annotation,)
    if value is None and optional:
        return None
    if kind is str:  # a device, as torch has it or by its name
        return str(value)
    accepted, expected = _ACCEPTED[kind]
    try:
        plain = kind(value) if isinstance(value, accepted) else None
    except (OverflowError, ValueError):  # infinity as a whole number, or a whole number too large for a float
        plain = None
    if plain is None or plain != value or (isinstance(value, bool) and kind is not bool):
        raise SpecError(f"{name} is {value!r}; expected {expected}", field=name, value=value)
    return plain
