"""Every error that dmpipeline raises on purpose, grouped by what the catcher does next.

::

    DmpipelineError
    ├── SpecError (ValueError)        correct the run's description, or the arrays handed in
    │   └── UserCodeError             fix the code of your own that the description names
    ├── RunError                      the run directory is not in the state the command needs
    │   ├── IncompleteRunError        train the missing rows first
    │   ├── RunExistsError            choose another directory, or resume
    │   └── SpecChangedError          put run.yaml back, extend, or make a run of its own
    ├── TrainingError                 a model could not be trained
    ├── ClusterError                  the cluster is gone or idle: what is done stays, run the same again
    ├── VerificationError             what is stored is not what was specified
    └── ConvergenceError              a fit did not reach its certificate

`DataWarning`, and `LearningWarning` while a run is trained, warn of what is done although it may not be what is meant.

Like dmdata's, they have typed facts and can be pickled. `explain_os_errors` and `explain_missing_extra` turn what the
system or an installation refuses into one of them.
"""

import errno
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dmdata.errors import FactualError


class DmpipelineError(FactualError):
    """Base of all errors of dmpipeline."""


class SpecError(DmpipelineError, ValueError):
    """A description or an argument that cannot be used; the message names field, value and remedy.

    Attributes
    ----------
    field : str or None
        Of the description, as "recipe.name"; or the argument's name.
    value : object
        That it has.
    path : str, path or None
        The file.
    dataset : str or None
    shape : tuple of int or None
        That an array has.
    dtype : str or None
    row, column, example, target, subset : int or None
        Where in an array, or of which.
    rows, targets, counts : sequence of int or None
    n_models, n_fit, n_validation, folds, n_masks, n_outputs, n_retrainings : int or None
        That do not fit together.
    """

    field: str | None = None
    value: Any = None
    path: str | os.PathLike[str] | None = None
    dataset: str | None = None
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    row: int | None = None
    column: int | None = None
    example: int | None = None
    target: int | None = None
    subset: int | None = None
    rows: Sequence[int] | None = None
    targets: Sequence[int] | None = None
    counts: Sequence[int] | None = None
    n_models: int | None = None
    n_fit: int | None = None
    n_validation: int | None = None
    folds: int | None = None
    n_masks: int | None = None
    n_outputs: int | None = None
    n_retrainings: int | None = None
    exit_code = 2


class UserCodeError(SpecError):
    """Code of the user's own raised an error as it was imported or built; `frames` shows where, in lines of text."""

    exit_code = 1


class RunError(DmpipelineError):
    """A run directory in the wrong state, or a machine that cannot work on it.

    Attributes
    ----------
    path : str, path or None
        Of the run, or of a file in it.
    reason : str or None
        What a reader of one of its files said.
    host : str or None
        Of the worker.
    versions : mapping or None
        Of packages that the worker has and should not, by name.
    module : str or None
        That is not installed.
    """

    path: str | os.PathLike[str] | None = None
    reason: str | None = None
    host: str | None = None
    versions: Mapping[str, Any] | None = None
    module: str | None = None


class IncompleteRunError(RunError):
    """Rows are missing; `n_missing` counts them."""

    n_missing: int | None = None


class RunExistsError(RunError):
    """Another run is already there; `path` names it."""


class SpecChangedError(RunError):
    """A run.yaml describes another run than its rows were made by; `differences` has (then, now) by field."""

    differences: Mapping[str, tuple[Any, Any]] | None = None


class TrainingError(DmpipelineError):
    """A model could not be trained, or its outputs are not finite.

    Where the user's own code failed, `frames` shows where, in lines of text.

    Attributes
    ----------
    rows : sequence of int or None
        Of the models.
    value : object
        The import path of the code that failed.
    classes : list of int or None
        That the outputs lack.
    """

    rows: Sequence[int] | None = None
    value: Any = None
    classes: Sequence[int] | None = None


class ClusterError(DmpipelineError):
    """A cluster was lost, or has no workers; what is stored stays. `scheduler` is its address."""

    scheduler: str | None = None
    exit_code = 5


class VerificationError(DmpipelineError):
    """Stored data differ from what was specified; `findings` lists how."""

    findings: Sequence[Any] | None = None
    exit_code = 3


class ConvergenceError(DmpipelineError):
    """A fit stopped short of its certificate; `targets` lists the columns, `gap` is the largest duality gap."""

    targets: Sequence[int] | None = None
    gap: float | None = None


class DataWarning(UserWarning):
    """Usable, but perhaps not what is meant, as models that are both fitted and scored on; the message says which."""


class LearningWarning(UserWarning):
    """Trained models have not learned, or their outputs carry no information; issued while a run is trained."""


def quoted(path: str | os.PathLike[str]) -> str:
    """Write a path as a shell takes it, for commands that are printed: in quotes where it needs them."""
    text = os.fspath(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


@contextmanager
def explain_os_errors(path: str | Path, what: str = "written") -> Iterator[None]:
    """Turn what the system refuses while the block runs into a `RunError` that names the path and a remedy.

    Parameters
    ----------
    path : path
        What is worked on.
    what : str
        What cannot be done with it, in the passive: "written".

    Raises
    ------
    RunError
        For an OSError, but neither for dmdata's own, which explain themselves, nor for a broken pipe, which means
        that nobody reads a command's output any more.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, FactualError | BrokenPipeError):
            raise
        remedy = _REMEDIES.get(error.errno or 0, "choose another path, or fix this one")
        raise RunError(f"{path} cannot be {what} ({error.strerror or error}); {remedy}", path=Path(path)) from error


@contextmanager
def explain_missing_extra() -> Iterator[None]:
    """Turn a failed import of a package of the `pipeline` extra into a `RunError` that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _PIPELINE_EXTRA:
            raise
        raise RunError(
            f"{error.name} is not installed; training, fitting and reports need `pip install 'dmdata[pipeline]'`",
            module=error.name,
        ) from error


_PIPELINE_EXTRA = {"PIL", "jinja2", "matplotlib", "numba", "sklearn", "torch"}

_NO_SPACE = "make room and do the same again"
_NO_RIGHTS = "choose a place that may be written to, or fix its permissions"
_NO_PLACE = "a file is where a folder should be, or a folder where a file should be; choose another path"
_REMEDIES = {
    errno.ENOSPC: _NO_SPACE,
    errno.EDQUOT: _NO_SPACE,
    errno.EFBIG: _NO_SPACE,
    errno.EACCES: _NO_RIGHTS,
    errno.EPERM: _NO_RIGHTS,
    errno.EROFS: _NO_RIGHTS,
    errno.EEXIST: _NO_PLACE,
    errno.ENOTDIR: _NO_PLACE,
    errno.EISDIR: _NO_PLACE,
}
