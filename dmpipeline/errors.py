"""Every error that dmpipeline raises on purpose, grouped by what the catcher does next.

::

    DmpipelineError
    ├── SpecError (ValueError)        mend the run's description, or the arrays handed in
    ├── RunError                      the run directory is not in the state the command needs
    │   ├── IncompleteRunError        train the missing rows first
    │   └── RunExistsError            choose another directory, or resume
    ├── TrainingError                 a model could not be trained
    ├── VerificationError             what is stored is not what was specified
    └── ConvergenceError              a fit did not reach its certificate

Like dmdata's, they carry facts as attributes and pickle.
"""

from dmdata.errors import FactualError


class DmpipelineError(FactualError):
    """Base of all errors of dmpipeline."""


class SpecError(DmpipelineError, ValueError):
    """A description or an argument that cannot be used; the message names field, value and remedy."""

    exit_code = 2


class RunError(DmpipelineError):
    """A run directory in the wrong state; `path` names it."""


class IncompleteRunError(RunError):
    """Rows are missing; `n_missing` counts them."""


class RunExistsError(RunError):
    """Another run is already there; `path` names it."""


class TrainingError(DmpipelineError):
    """A model could not be trained, or its outputs are not finite; `rows` lists the model rows."""


class VerificationError(DmpipelineError):
    """Stored data differ from what was specified; `findings` lists how."""

    exit_code = 3


class ConvergenceError(DmpipelineError):
    """A fit stopped short of its certificate; `targets` lists the columns."""
