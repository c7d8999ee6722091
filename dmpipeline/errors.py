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

What is done all the same, but is perhaps not what is meant, is warned of by `DataWarning`, and by
`LearningWarning` while a run is trained.

Like dmdata's, they carry facts as attributes and pickle. What the system or an installation refuses becomes one of
them by `explain_os_errors` and `explain_missing_extra`, around the work of each room.
"""

import errno
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dmdata.errors import FactualError


class DmpipelineError(FactualError):
    """Base of all errors of dmpipeline."""


class SpecError(DmpipelineError, ValueError):
    """A description or an argument that cannot be used; the message names field, value and remedy."""

    exit_code = 2


class UserCodeError(SpecError):
    """Code of the user's own raised an error as it was imported or built; `frames` shows where, in lines of text."""

    exit_code = 1


class RunError(DmpipelineError):
    """A run directory in the wrong state; `path` names it."""


class IncompleteRunError(RunError):
    """Rows are missing; `n_missing` counts them."""


class RunExistsError(RunError):
    """Another run is already there; `path` names it."""


class SpecChangedError(RunError):
    """A run.yaml says something else than its rows were made by; `differences` has (then, now) by field."""


class TrainingError(DmpipelineError):
    """A model could not be trained, or its outputs are not finite; `rows` lists the model rows.

    Where code of the user's own failed, `frames` shows where, in lines of text.
    """


class ClusterError(DmpipelineError):
    """A cluster was lost, or has no workers; what is stored stays. `scheduler` names it."""

    exit_code = 5


class VerificationError(DmpipelineError):
    """Stored data differ from what was specified; `findings` lists how."""

    exit_code = 3


class ConvergenceError(DmpipelineError):
    """A fit stopped short of its certificate; `targets` lists the columns."""


class DataWarning(UserWarning):
    """Usable, but perhaps not what is meant, as models that are both fitted and scored on; the message says which."""


class LearningWarning(UserWarning):
    """Trained models have not learned, or their outputs tell nothing; issued while a run is trained."""


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
        For an OSError, but neither for dmdata's own, which explain themselves, nor for a broken pipe, by which a
        command learns that nobody reads it any more.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, FactualError | BrokenPipeError):
            raise
        remedy = _REMEDIES.get(error.errno or 0, "choose another path, or mend this one")
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
_NO_RIGHTS = "choose a place that may be written to, or mend its permissions"
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
