"""What commands on runs share: several runs in a directory, a dataset that was moved, and which command comes next."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dmdata.cli.console import Talk
from dmdata.cli.tables import plain_table
from dmpipeline.errors import SpecError, VerificationError, quoted

if TYPE_CHECKING:
    from rich.table import Table

    from dmpipeline.runs.store import Run
    from dmpipeline.runs.targets import TargetsName


def for_each_run(command: Callable[..., Any]) -> Callable[..., Any]:
    """Have a command that takes one run's ``directory`` take a directory with several, one after the other.

    It gets ``--dataset`` as well; see `with_dataset_option`. Several runs are printed one below the other, and with
    ``--json`` as ``{"runs": [...]}``, each with its path as ``run``. What `verify` finds wrong in one of them does not
    keep it from the others.
    """

    @with_dataset_option
    def begin(talk: Talk, directory: Path, **options: Any) -> None:
        from dmpipeline.cli.status import runs_in

        paths = runs_in(directory)
        if len(paths) == 1:
            command(talk=talk, directory=paths[0], **options)
            return
        parts: list[dict[str, Any]] = []
        wrong: list[VerificationError] = []
        settings = {field.name: getattr(talk, field.name) for field in dataclasses.fields(Talk)}
        try:
            for path in paths:
                its_talk = _TalkOfOne(**settings, path=path, parts=parts)
                try:
                    command(talk=its_talk, directory=path, **options)
                except VerificationError as error:
                    wrong.append(error)
        finally:  # what was done of some is printed, whatever ended the others
            if talk.as_json:
                talk.print_data({"runs": parts})
        if wrong:
            more = f" (and {len(wrong) - 1} more of {len(paths)} runs)" if wrong[1:] else ""
            raise VerificationError(f"{wrong[0]}{more}", findings=[str(error) for error in wrong])

    return _in_place_of(command, begin)


def with_dataset_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command on the runs in ``directory`` the option ``--dataset``: where their dataset is now.

    It is checked by its fingerprint and remembered in the runs before the command begins.
    """

    def begin(talk: Talk, directory: Path, dataset: str | None, **options: Any) -> Any:
        if dataset is not None:
            from dmpipeline.cli.status import runs_in
            from dmpipeline.runs.store import Run

            for path in runs_in(directory):
                Run.open(path, dataset=dataset)
        return command(talk=talk, directory=directory, **options)

    option = click.option(
        "--dataset", metavar="PATH", help="Where the run's dataset is now, if it was moved; remembered."
    )
    return option(_in_place_of(command, begin))


def next_to_train(directory: Path) -> str:
    """Name the command after runs in a directory were created."""
    return f"next: dmpipeline run {quoted(directory)}"


def next_to_check_and_fit(directory: Path, runs: Sequence["Run"], targets: "TargetsName" = "test") -> str:
    """Name the commands after all runs in a directory were trained; `fit` for those that can be fitted."""
    from dmpipeline.runs.targets import command

    commands = [f"dmpipeline verify {quoted(directory)}"]
    fits = {run.path: options for run in runs if (options := _fit_options(run, targets)) is not None}
    if len(fits) == len(runs) and len(set(fits.values())) == 1:
        commands.append(command(directory, "fit", targets, next(iter(fits.values()))))
    else:
        commands += [command(path, "fit", targets, options) for path, options in fits.items()]
    return f"next: {', '.join(commands)}"


def next_to_evaluate(directory: Path, run: "Run", targets: "TargetsName" = "test") -> str:
    """Name the command after datamodels of a run were fitted; without held-out subsets they can be looked at alone."""
    from dmpipeline.runs.targets import command
    from dmpipeline.scoring.retrainings import LEAST_SUBSETS

    if run.spec.held_out.n_subsets < LEAST_SUBSETS:
        return f"next: dmdata ls --catalog {quoted(directory)}"
    return f"next: {command(directory, 'evaluate', targets)}"


def next_to_report(directory: Path, targets: "TargetsName" = "test") -> str:
    """Name the command after datamodels were scored."""
    from dmpipeline.runs.targets import command

    return f"next: {command(directory, 'report', targets)}"


def next_to_list(destination: str) -> str:
    """Name the command after a run was exported."""
    return f"next: dmdata ls --catalog {quoted(destination)}"


# the first leaves most models to fit on; of a few models more have to choose lambda
_VALIDATION_SHARES = (0.1, 0.2, 0.5)


def _fit_options(run: "Run", targets: "TargetsName") -> tuple[str, ...] | None:
    """Find the options with which datamodels can be fitted; None where they cannot."""
    from dmpipeline.fitting.fitting import split_rows
    from dmpipeline.runs.targets import fitted_array

    try:
        fitted_array(run, targets)
    except SpecError:
        return None
    for share in _VALIDATION_SHARES:
        try:
            split_rows(run.spec.n_models, share)
        except SpecError:
            continue
        return () if share == _VALIDATION_SHARES[0] else ("--validation", str(share))
    return None


@dataclasses.dataclass(frozen=True, slots=True)
class _TalkOfOne(Talk):
    """How a command talks about one of several runs."""

    path: Path = Path()
    parts: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def print_data(self, data: dict[str, Any], *tables: "Table") -> None:
        """Keep the result for one JSON object of all, or print it below its run's path."""
        if self.as_json:
            self.parts.append({"run": str(self.path)} | data)
            return
        heading = plain_table()
        heading.add_row("run", str(self.path), style="bold")
        Talk.print_data(self, data, heading, *tables)


def _in_place_of(command: Callable[..., Any], begin: Callable[..., Any]) -> Callable[..., Any]:
    begin.__doc__, begin.__name__ = command.__doc__, command.__name__
    begin.__dict__.update(command.__dict__)
    return begin
