"""Datamodels of test examples or of training examples: which of a run's arrays they predict, and where they belong.

Those of training examples, which mislabelled examples are found by, are named as the release names its own:
``datamodels/train_50pct.pt``, catalogued as ``train_datamodels``. What is made of them lies in the run under the same
names as what is made of test examples, with ``train_`` in front.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from dmpipeline.errors import IncompleteRunError, SpecError, quoted
from dmpipeline.runs.cataloguing import datamodels_of_train
from dmpipeline.runs.store import Run

TargetsName = Literal["test", "train"]
"""Whose outputs datamodels predict: test examples', or training examples'."""

TARGETS: tuple[TargetsName, ...] = get_args(TargetsName)


def fitted_array(run: Run, targets: TargetsName = "test") -> str:
    """Name the array that datamodels are fitted to; of the run's elements nothing is read.

    Of test examples it is `Run.fitted_array`; of training examples the same output where it is stored, else the first
    with one number a training example.

    Parameters
    ----------
    run : Run
        Trained or not.
    targets : {"test", "train"}

    Raises
    ------
    SpecError
        If the run stores none, or there are no such targets.
    """
    if check_targets(targets) == "test":
        return run.fitted_array
    stored = [
        name
        for name in run.spec.arrays
        if name.startswith("train_") and name != "train_masks" and run.array(name).ndim == 2
    ]
    if not stored:
        outputs = _wanted_outputs(run)
        raise SpecError(
            f"{run.path} stores nothing that is one number a training example, which datamodels of training examples "
            f"predict: its outputs are {', '.join(run.spec.outputs)}; create another run with "
            f"`dmpipeline init OTHER --spec {quoted(run.path / 'run.yaml')} --outputs {','.join(outputs)}`",
            field="outputs",
            value=list(run.spec.outputs),
        )
    of_test = [name for name in run.spec.arrays if name.startswith("test_") and run.array(name).ndim == 2]
    same = f"train_{of_test[0].removeprefix('test_')}" if of_test else ""
    return same if same in stored else stored[0]


def check_targets(targets: Any) -> TargetsName:
    """Take the name of some targets; SpecError for any other word."""
    for known in TARGETS:
        if targets == known:
            return known
    raise SpecError(f"targets are {targets!r}; choose test or train", field="targets", value=targets)


def datamodels_path(run: Run, targets: TargetsName = "test") -> Path:
    """Return where a run's datamodels of these targets belong."""
    path = run.datamodels_path
    return path if check_targets(targets) == "test" else datamodels_of_train(path)


def require_datamodels(run: Run, targets: TargetsName = "test") -> None:
    """Raise IncompleteRunError, which says how they are fitted, where a run has no datamodels of these targets yet."""
    if datamodels_path(run, targets).exists():
        return
    of_train, own = ("", "") if targets == "test" else (" of training examples", f", targets={targets!r}")
    raise IncompleteRunError(
        f"{run.path} has no datamodels{of_train} yet; fit them with `{command(run.path, 'fit', targets)}`, "
        f"or in Python with dmpipeline.fit_run({str(run.path)!r}{own})",
        path=run.path,
    )


def place_of(run: Run, name: str, targets: TargetsName = "test") -> Path:
    """Return where something made of these targets' datamodels belongs: `name` in the run, or with train_ in front."""
    path = run.path / name
    return path if check_targets(targets) == "test" else path.with_name(f"train_{path.name}")


def options_of(targets: TargetsName) -> list[str]:
    """Return the words by which a command is told of these targets; none for test examples."""
    return [] if targets == "test" else ["--targets", targets]


def command(path: str | Path, name: str, targets: TargetsName = "test", options: Sequence[str] = ()) -> str:
    """Write the command that makes something of these targets of the run at `path`, as a shell takes it."""
    return " ".join(["dmpipeline", name, quoted(path), shlex.join([*options_of(targets), *options])]).rstrip()


def _wanted_outputs(run: Run) -> list[str]:
    """Name the outputs that a run like this one would have to store."""
    of_test = [name for name in run.spec.arrays if name.startswith("test_") and run.array(name).ndim == 2]
    name = of_test[0].removeprefix("test_") if of_test else "margins"
    wanted = [output for output in run.spec.outputs if output != f"test_{name}"]
    return [name, *(output for output in wanted if output != name)]
