"""The manners of both commands: what is data and what is for people, progress, consent, and how they end.

Standard output is data: a table or, with ``--json``, one object. Everything else, progress bars and questions
included, goes to standard error. A command ends with the exit code of its error (see `dmdata.errors`), 2 for a wrong
command line, 6 where consent is needed and there is no terminal to ask at, and 130 when interrupted.
"""

import contextlib
import json
import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import click
import click.shell_completion
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from dmdata.errors import FactualError
from dmdata.prices import Estimate, prices_in_words, readable_bytes, readable_usd
from dmdata.progress_bar import hidden
from dmdata.settings import settings

EXIT_USAGE = 2
EXIT_CONSENT = 6
EXIT_INTERRUPTED = 130


class _Amount(click.FloatRange):
    """A number of at least 0 that is finite: click's own range lets nan and inf pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


AMOUNT = _Amount(min=0)
"""Type of an option that takes dollars, seconds or sizes."""


class ConsentError(FactualError):
    """A command would spend money and nobody said it may."""

    exit_code = EXIT_CONSENT


@dataclass(frozen=True, slots=True)
class Talk:
    """How one command talks, by its options.

    Attributes
    ----------
    as_json : bool
        Print one JSON object instead of tables.
    quiet : bool
        No progress and no remarks.
    verbose : bool
        Whatever is cut short otherwise is shown whole.
    """

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False

    def print_data(self, data: dict[str, Any], *tables: Table) -> None:
        """Print the command's result: as JSON, or as the tables made for people."""
        if self.as_json:
            click.echo(json.dumps(data, indent=2, allow_nan=False))
            return
        # names and paths may hold brackets, which are no markup
        if sys.stdout.isatty():
            console = Console(markup=False, highlight=False)
            for table in tables:
                console.print(table)
            return
        # whoever reads lines wants them whole
        console = Console(width=10_000, markup=False, highlight=False)
        with console.capture() as captured:
            for table in tables:
                console.print(table)
        click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))

    def remark(self, text: str) -> None:
        """Tell a person something, on standard error."""
        if not self.quiet:
            Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)

    @contextlib.contextmanager
    def progress(self, *columns: ProgressColumn) -> Iterator[Progress]:
        """Show progress bars on standard error while the block runs; none when quiet, set so or not at a terminal."""
        console = Console(stderr=True)
        shown = (TextColumn("{task.description}", markup=False), BarColumn(), *columns, TimeRemainingColumn())
        is_off = self.quiet or not console.is_terminal or not settings().progress
        with hidden(), Progress(*shown, console=console, disable=is_off) as progress:
            yield progress

    @contextlib.contextmanager
    def stages(self, units: dict[str, str]) -> Iterator[Callable[[str, int, int], None]]:
        """Show a bar for each stage of a work; yields what to call with (stage, done, in all).

        Parameters
        ----------
        units : dict of str to str
            What each stage counts, by its name.
        """
        with self.progress(TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}")) as bars:
            tasks: dict[str, TaskID] = {}

            def show(stage: str, done: int, in_all: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=in_all, unit=units[stage])
                bars.update(tasks[stage], completed=done, total=in_all)

            yield show

    @contextlib.contextmanager
    def counting(self, what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        """Show one bar; yields what to call with (done, in all)."""
        with self.stages({what: unit}) as show:
            yield lambda done, in_all: show(what, done, in_all)


def talk_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command ``--json``, ``-q``, ``-v`` and ``--debug``, handed on as one `Talk` named ``talk``."""

    def begin(context: click.Context, **options: Any) -> Any:
        flags = {name: options.pop(name) for name in ("as_json", "quiet", "verbose", "debug")}
        logging.basicConfig(
            stream=sys.stderr,
            format="%(name)s: %(message)s",
            level=logging.DEBUG if flags["debug"] else logging.INFO if flags["verbose"] else logging.WARNING,
            force=True,
        )
        context.find_root().meta["dmdata.debug"] = flags["debug"]
        if flags["quiet"]:
            context.with_resource(hidden())
        return context.invoke(command, talk=Talk(flags["as_json"], flags["quiet"], flags["verbose"]), **options)

    begin.__doc__ = command.__doc__
    begin.__name__ = command.__name__
    begin.__dict__.update(command.__dict__)
    wrapped: Callable[..., Any] = click.pass_context(begin)
    for option in (
        click.option("--debug", is_flag=True, help="Show tracebacks and the libraries' own logs."),
        click.option("-v", "--verbose", is_flag=True, help="Say more, on standard error."),
        click.option("-q", "--quiet", is_flag=True, help="No progress bars and no remarks."),
        click.option("--json", "as_json", is_flag=True, help="Print data as one JSON object on standard output."),
    ):
        wrapped = option(wrapped)
    return wrapped


def ask_consent(talk: Talk, price: Estimate, *, what: str, agreed: bool) -> None:
    """Ask before money is spent.

    Raises
    ------
    ConsentError
        If nobody said yes and there is no terminal to ask at, or the answer is no.
    """
    sentence = (
        f"{what} will cost up to {readable_usd(price.usd)} ({readable_bytes(price.n_bytes)} in {price.n_requests:,} "
        f"requests to {price.destination}, {prices_in_words()})"
    )
    if agreed:
        talk.remark(sentence)
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConsentError(f"{sentence}; there is no terminal to ask at: add -y to agree", usd=price.usd)
    if not click.confirm(f"{sentence}. Go on?", default=False, err=True):
        raise ConsentError("nothing was fetched and nothing was spent", usd=price.usd)


def run(command: click.Command, arguments: Sequence[str] | None, *, name: str) -> NoReturn:
    """Run a command and end the process as it should end."""
    warnings.showwarning = _show_warning
    if instruction := os.environ.get(complete_variable(name)):
        sys.exit(click.shell_completion.shell_complete(command, {}, name, complete_variable(name), instruction))
    context: click.Context | None = None
    try:
        with command.make_context(name, list(sys.argv[1:] if arguments is None else arguments)) as context:
            command.invoke(context)
        sys.exit(0)
    except click.exceptions.Exit as ended:
        sys.exit(ended.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USAGE)
    except (KeyboardInterrupt, click.Abort):
        click.echo(f"{name}: interrupted; what is complete stays, run the same again to go on", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(EXIT_INTERRUPTED)
    except FactualError as error:
        if context is not None and context.meta.get("dmdata.debug"):
            traceback.print_exc()
        click.echo(f"{name}: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        # what no room foresaw: a full disk, a folder that may not be written
        if context is not None and context.meta.get("dmdata.debug"):
            traceback.print_exc()
        click.echo(
            f"{name}: {error}; nothing that was complete is lost, run the same again once it is mended", err=True
        )
        sys.exit(1)


def complete_variable(name: str) -> str:
    """Name the variable by which a shell asks a command for completions."""
    return f"_{name.upper()}_COMPLETE"


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"warning: {message}", err=True)
