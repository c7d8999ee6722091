"""What a fit left in a run: its datamodels, and what it noted of itself."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from dmdata.errors import FormatError
from dmpipeline.errors import IncompleteRunError, RunError
from dmpipeline.runs.derivation import is_from_elsewhere
from dmpipeline.runs.store import Run
from dmpipeline.runs.targets import TargetsName, command, datamodels_path, place_of

if TYPE_CHECKING:
    from dmpipeline.fitting.datamodels import Datamodels


def load_datamodels(run: Run, targets: TargetsName = "test") -> "Datamodels":
    """Read a run's datamodels of test examples, or of training examples.

    Raises
    ------
    IncompleteRunError
        If it has none yet.
    RunError
        If they are damaged.
    """
    path, again = datamodels_path(run, targets), command(run.path, "fit", targets)
    if not path.exists():
        of_train = " of training examples" if targets == "train" else ""
        raise IncompleteRunError(f"{run.path} has no datamodels{of_train} yet; fit them with `{again}`", path=run.path)
    from dmpipeline.fitting.datamodels import Datamodels  # which brings torch

    try:
        return Datamodels.load(path)
    except FormatError as error:
        raise RunError(f"{path} is damaged ({error}); fit again with `{again}`", path=run.path) from error


def fit_facts(run: Run, targets: TargetsName = "test") -> dict[str, float]:
    """Read what `fit_run` noted: settings, seconds, certificate; empty where the datamodels came from elsewhere.

    Raises
    ------
    RunError
        If the notes are damaged.
    """
    path = fit_notes_path(run, targets)
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _damaged_notes(run, targets, str(error)) from error
    if not isinstance(facts, dict) or not all(isinstance(fact, int | float) for fact in facts.values()):
        raise _damaged_notes(run, targets, "it does not hold numbers by name")
    return {} if is_from_elsewhere(run, targets) else facts


def fit_notes_path(run: Run, targets: TargetsName) -> Path:
    """Return where `fit_run` notes what `fit_facts` reads."""
    return place_of(run, "datamodels/fit.json", targets)


def _damaged_notes(run: Run, targets: TargetsName, how: str) -> RunError:
    again = command(run.path, "fit", targets)
    return RunError(f"{fit_notes_path(run, targets)} is damaged ({how}); fit again with `{again}`", path=run.path)
