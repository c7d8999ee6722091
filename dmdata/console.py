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
import re
import sys
import threading
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
        if not flags["debug"]:
            logging.getLogger().handlers[0].setFormatter(_OneLine())
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
    """Run a command and end the process as it should end: with one line for a person, whatever went wrong."""
    warnings.showwarning = _show_warning
    if instruction := os.environ.get(complete_variable(name)):
        sys.exit(click.shell_completion.shell_complete(command, {}, name, complete_variable(name), instruction))
    words = list(sys.argv[1:] if arguments is None else arguments)
    is_debug = "--debug" in words
    if arguments is None and not is_debug:  # the process is this command's
        threading.excepthook = _show_failed_thread
        sys.unraisablehook = _show_nothing  # what a library could not clean up changes no answer
    try:
        with command.make_context(name, words.copy()) as context:
            command.invoke(context)
        sys.exit(0)
    except SystemExit:
        raise
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
    except BaseException as error:  # noqa: BLE001 - a panic of a library in Rust is no Exception, and nobody sees it raised
        if is_debug:
            click.echo(without_keys(traceback.format_exc()), err=True)
        text, exit_code = _last_words(error, name)
        click.echo(f"{name}: {without_keys(text)}", err=True)
        sys.exit(exit_code)


def _last_words(error: BaseException, name: str) -> tuple[str, int]:
    """Say what ended a command, and the exit code."""
    if isinstance(error, FactualError):
        return str(error), error.exit_code
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        # what no room foresaw: a full disk, a folder that may not be written
        return f"{text}; nothing that was complete is lost, run the same again once it is fixed", 1
    if isinstance(error, MemoryError):
        return f"there is not enough memory{text and f' ({text})'}; select less, or use a machine with more", 1
    kind = type(error).__name__
    shown = text if len(text) <= _LONGEST_FAULT else f"{text[:_LONGEST_FAULT]}..."
    return f"{kind}{shown and f': {shown}'}; this is a fault of {name}: run again with --debug and report it", 1


_LONGEST_FAULT = 500
# a shorter one may be part of any word
_SHORTEST_SECRET = 8
_SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")
_SECRETS = re.compile(
    r"(?i)(\b(?:x-amz-(?:signature|credential|security-token)|signature|awsaccesskeyid|aws_secret_access_key"
    r"|aws_session_token|secret_access_key|secret_key|session_token|sig)['\"]?\s*[=:]\s*['\"]?)[^\s&'\",;)]+"
    r"|(?<=://)[^\s/@]+:[^\s/@]+(?=@)|\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b"
)


def without_keys(text: str) -> str:
    """Leave out of a text whatever is, or looks like, a key, a token or a signature."""
    for variable in _SECRET_VARIABLES:
        if len(secret := os.environ.get(variable, "")) >= _SHORTEST_SECRET:
            text = text.replace(secret, "***")
    return _SECRETS.sub(lambda found: f"{found[1] or ''}***", text)


def _show_failed_thread(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_type is not SystemExit:
        what = " ".join(f"{arguments.exc_type.__name__}: {arguments.exc_value}".split())
        click.echo(without_keys(f"warning: {what}"), err=True)


def _show_nothing(_: Any) -> None:
    pass


class _OneLine(logging.Formatter):
    """Gives an exception that a library logs as its last line; its traceback is for ``--debug``."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record in one line, without keys."""
        text = f"{record.name}: {record.getMessage()}"
        if record.exc_info and record.exc_info[0] is not None:
            text += f" ({record.exc_info[0].__name__}: {record.exc_info[1]})"
        return without_keys(" ".join(text.split()))


def complete_variable(name: str) -> str:
    """Name the variable by which a shell asks a command for completions."""
    return f"_{name.upper()}_COMPLETE"


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(without_keys(f"warning: {message}"), err=True)
