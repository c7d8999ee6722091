"""Shared behaviour of both commands: what is data and what is for people, progress, consent, and how they end.

Standard output is data: a table or, with ``--json``, one object. Everything else, progress and questions and whatever
a user's own code prints included, goes to standard error. A command ends with the exit code of its error (see
`dmdata.errors`), 2 for a wrong command line, 6 where consent is needed and there is no terminal to ask at, and 130 when
interrupted.
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
from dataclasses import dataclass, field
from typing import Any, NoReturn, TextIO

import click
import click.shell_completion
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from dmdata import phases, streams
from dmdata.errors import FactualError, SettingsError
from dmdata.prices import Estimate, prices_in_words, readable_bytes, readable_usd
from dmdata.progress_bar import hidden
from dmdata.settings import settings
from dmdata.watch import Count, Rate, Watch

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
    out : text stream, optional
        Where data go, if not to `sys.stdout`.
    watch : Watch, optional
        What shows what the command is doing.
    """

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    out: TextIO | None = field(default=None, repr=False, compare=False)
    watch: Watch | None = field(default=None, repr=False, compare=False)

    def print_data(self, data: dict[str, Any], *tables: Table) -> None:
        """Print the command's result: as JSON, or as the tables made for people."""
        if self.as_json:
            self.print_text(json.dumps(data, indent=2, allow_nan=False) + "\n")
            return
        out = sys.stdout if self.out is None else self.out
        # names and paths may hold brackets, which are no markup
        if out.isatty():
            console = Console(file=out, markup=False, highlight=False)
            with self._aside():
                for table in tables:
                    console.print(table)
            return
        # whoever reads lines wants them whole
        console = Console(file=out, width=10_000, markup=False, highlight=False)
        with console.capture() as captured:
            for table in tables:
                console.print(table)
        self.print_text("\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n")

    def print_text(self, text: str) -> None:
        """Print the command's result where it is text as it is; no newline is added."""
        with self._aside():
            click.echo(text, nl=False, file=self.out)

    def remark(self, text: str) -> None:
        """Tell a person something, on standard error."""
        if not self.quiet:
            with self._aside():
                Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)

    def confirm(self, question: str) -> bool:
        """Ask a person on standard error; the answer is no unless they say yes."""
        with self._aside():
            return click.confirm(question, default=False, err=True)

    def _aside(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.watch is None else self.watch.aside()

    @contextlib.contextmanager
    def progress(self, *columns: ProgressColumn) -> Iterator[Progress]:
        """Show progress on standard error while the block runs: bars at a terminal, elsewhere lines far apart.

        None when quiet or set so. A task with the field `sums_up` stands for all others in lines.
        """
        console = Console(stderr=True)
        shown = (TextColumn("{task.description}", markup=False), BarColumn(), *columns, TimeRemainingColumn())
        is_wanted = not self.quiet and settings().progress
        is_off = not is_wanted or not console.is_terminal
        with contextlib.ExitStack() as stack:
            watch = self.watch or stack.enter_context(Watch("working", wanted=is_wanted))
            stack.enter_context(hidden())
            bars = Progress(*shown, console=console, disable=is_off, speed_estimate_period=_RATE_SECONDS)
            stack.enter_context(watch.showing(bars, columns))
            yield stack.enter_context(bars)

    @contextlib.contextmanager
    def stages(self, units: dict[str, str]) -> Iterator[Callable[[str, int, int], None]]:
        """Show each stage of a work; yields what to call with (stage, done, in total).

        What the block tells `dmdata.phases` is shown as well: what is done, and parts of what is counted.

        Parameters
        ----------
        units : dict of str to str
            What each stage counts, by its name.
        """
        with self.progress(Count(), Rate()) as bars:
            shown = _Stages(bars, units)
            with phases.listening(shown):
                yield shown.show

    @contextlib.contextmanager
    def counting(self, what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        """Show one count; yields what to call with (done, in total)."""
        with self.stages({what: unit}) as show:
            yield lambda done, in_all: show(what, done, in_all)


# blocks may take long, and between two of them nothing is known
_RATE_SECONDS = 3600.0


class _Stages:
    """Tasks of a progress display, one a stage, and what is done just now in the one that came last."""

    def __init__(self, bars: Progress, units: dict[str, str]) -> None:
        self._bars, self._units, self._lock = bars, units, threading.Lock()
        self._tasks: dict[str, TaskID] = {}
        self._reported: dict[str, int] = {}
        self._phase = ""
        # what comes before anything is counted is shown under the name of the work, or for want of one as a start
        alone = next(iter(units)) if len(units) == 1 else "starting"
        self._first: TaskID | None = bars.add_task(alone, total=None, unit="")
        self._last = alone

    def show(self, stage: str, done: int, in_all: int) -> None:
        with self._lock:
            if stage not in self._tasks:
                # a task is timed from when it is made, so that the one before says nothing of this one's rate
                if self._first is not None:
                    self._bars.remove_task(self._first)
                    self._first = None
                self._tasks[stage] = self._bars.add_task(stage, total=in_all, unit=self._units[stage])
                self._reported[stage] = -1
            task = self._tasks[stage]
            if stage != self._last:
                self._last, self._phase = stage, ""
            if done != self._reported[stage]:
                so_far = self._bars.tasks[self._bars.task_ids.index(task)].completed
                self._bars.update(task, completed=done if done >= in_all else max(done, so_far), total=in_all)
                self._reported[stage] = done
                self._phase = self._phase if done < in_all else ""
            self._bars.update(task, description=self._words())

    def phase(self, text: str) -> None:
        with self._lock:
            task = self._bars.tasks[-1]
            if task.finished:
                return  # what comes after all is counted is not part of it
            self._phase = text
            self._bars.update(self._tasks.get(self._last, self._first or TaskID(0)), description=self._words())

    def advance(self, amount: float) -> None:
        with self._lock:
            if (task := self._tasks.get(self._last)) is None:
                return
            its = self._bars.tasks[self._bars.task_ids.index(task)]
            # what was begun is not done before it is stored
            if its.total is not None:
                self._bars.update(task, completed=min(its.completed + amount, max(its.completed, its.total - 1)))

    def _words(self) -> str:
        return f"{self._last}, {self._phase}" if self._phase else self._last


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
        is_kept = flags["as_json"] or _runs_user_code
        kept: contextlib.AbstractContextManager[TextIO | None] = contextlib.nullcontext()
        if is_kept:
            kept = streams.kept_for_results(for_good=_is_own_process)
        with (
            kept as out,
            Watch(context.command_path, wanted=not flags["quiet"] and _may_show()) as watch,
            phases.listening(watch),
        ):
            talk = Talk(flags["as_json"], flags["quiet"], flags["verbose"], out, watch)
            return context.invoke(command, talk=talk, **options)

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
    if not talk.confirm(f"{sentence}. Go on?"):
        raise ConsentError("nothing was fetched and nothing was spent", usd=price.usd)


def run(
    command: click.Command, arguments: Sequence[str] | None, *, name: str, runs_user_code: bool = False
) -> NoReturn:
    """Run a command and end the process as it should end: with one line for a person, whatever went wrong.

    Parameters
    ----------
    command : click.Command
    arguments : sequence of str or None
        None: those of the process, which is then the command's.
    name : str
    runs_user_code : bool
        Keep what is printed by others off standard output even where no ``--json`` asks for it.
    """
    warnings.showwarning = _show_warning
    if instruction := os.environ.get(complete_variable(name)):
        sys.exit(click.shell_completion.shell_complete(command, {}, name, complete_variable(name), instruction))
    global _is_own_process, _runs_user_code
    words = list(sys.argv[1:] if arguments is None else arguments)
    is_debug = "--debug" in words
    _is_own_process, _runs_user_code = arguments is None, runs_user_code
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
        # lines of the user's own code that led to it, if that is what failed
        frames = error.facts.get("frames", "") if isinstance(error, FactualError) else ""
        click.echo(f"{name}: {without_keys(text)}", err=True)
        click.echo(without_keys(frames), err=True, nl=False)
        sys.exit(exit_code)


# whether the process ends with the command, and whether it may run code of the user's
_is_own_process, _runs_user_code = False, False


def _may_show() -> bool:
    try:
        return settings().progress
    except SettingsError:
        return False  # the command may be the one that corrects it, and any other says so


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
