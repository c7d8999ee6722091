"""Shared behaviour of both commands: what is data and what is for people, progress, and consent.

Standard output is data: a table or, with ``--json``, one object. Everything else, including progress, questions and
what a user's own code prints, goes to standard error. How a command ends is in `dmdata.cli.ending`.

Importing this is quick: rich and the settings are loaded when a command runs.
"""

import contextlib
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

import click

from dmdata import phases
from dmdata.cli.ending import Invocation, without_keys
from dmdata.errors import FactualError, SettingsError

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn
    from rich.table import Table

    from dmdata.cli.watch import Watch
    from dmdata.money.prices import Estimate

EXIT_CONSENT = 6


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
    """A command would spend money without consent."""

    usd: float | None = None
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
    watch: "Watch | None" = field(default=None, repr=False, compare=False)

    def print_data(self, data: dict[str, Any], *tables: "Table") -> None:
        """Print the command's result: as JSON, or as the tables made for people."""
        if self.as_json:
            self.print_text(json.dumps(data, indent=2, allow_nan=False) + "\n")
            return
        from rich.console import Console

        from dmdata.cli.tables import lines_of

        out = sys.stdout if self.out is None else self.out
        # names and paths may hold brackets, which are no markup
        console = Console(file=out, markup=False, highlight=False, soft_wrap=True)
        with self._aside():
            for table in tables:
                # what reads lines, as grep, needs them whole
                for line in lines_of(table, console.width if out.isatty() else None):
                    console.print(line)

    def print_text(self, text: str) -> None:
        """Print the command's result where it is text as it is; no newline is added."""
        with self._aside():
            click.echo(text, nl=False, file=self.out)

    def remark(self, text: str) -> None:
        """Print a remark for people, on standard error."""
        if not self.quiet:
            from rich.console import Console

            with self._aside():
                Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)

    def confirm(self, question: str) -> bool:
        """Ask a person on standard error; the answer is no unless they say yes."""
        with self._aside():
            return click.confirm(question, default=False, err=True)

    def _aside(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.watch is None else self.watch.aside()

    @contextlib.contextmanager
    def progress(self, *columns: "ProgressColumn") -> Iterator["Progress"]:
        """Show progress on standard error while the block runs: bars at a terminal, elsewhere lines far apart.

        None when quiet or set so. A task with the field `sums_up` stands for all others in lines.
        """
        from dmdata.cli.watch import Watch, bars
        from dmdata.reading.progress_bar import hidden
        from dmdata.settings import settings

        is_wanted = not self.quiet and settings().progress
        with contextlib.ExitStack() as stack:
            watch = self.watch or stack.enter_context(Watch("working", wanted=is_wanted))
            stack.enter_context(hidden())
            shown = bars(*columns, is_wanted=is_wanted)
            stack.enter_context(watch.showing(shown, columns))
            yield stack.enter_context(shown)

    @contextlib.contextmanager
    def stages(self, units: dict[str, str]) -> Iterator[Callable[[str, int, int], None]]:
        """Show each stage of a work; yields what to call with (stage, done, in total).

        What the block reports to `dmdata.phases` is shown as well: what is done, and parts of what is counted.

        Parameters
        ----------
        units : dict of str to str
            What each stage counts, by its name.
        """
        from dmdata.reading.stages import Count, Rate, Stages

        with self.progress(Count(), Rate()) as bars:
            shown = Stages(bars, units)
            with phases.listening(shown):
                yield shown.show

    @contextlib.contextmanager
    def counting(self, what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        """Show one count; yields what to call with (done, in total)."""
        with self.stages({what: unit}) as show:
            yield lambda done, in_all: show(what, done, in_all)


def talk_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command ``--json``, ``-q``, ``-v`` and ``--debug``, handed on as one `Talk` named ``talk``.

    What was given before the command counts as well; see `options_of_group`. A group is called without a subcommand
    only.
    """

    def begin(context: click.Context, **options: Any) -> Any:
        if context.invoked_subcommand is not None:
            return None  # of a group, whose command talks
        from dmdata.cli.streams import kept_for_results
        from dmdata.cli.watch import Watch

        flags = {name: name in context.meta.get(_GIVEN, ()) for name in _FLAGS}
        terms = context.find_object(Invocation) or Invocation()
        _start_logging(verbose=flags["verbose"], debug=flags["debug"])
        if flags["quiet"]:
            from dmdata.reading.progress_bar import hidden

            context.with_resource(hidden())
        kept: contextlib.AbstractContextManager[TextIO | None] = contextlib.nullcontext()
        if flags["as_json"] or terms.runs_user_code:
            kept = kept_for_results(for_good=terms.is_own_process)
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
    return _flags(click.pass_context(begin))


_FLAGS = {
    "as_json": (("--json",), "Print data as one JSON object on standard output."),
    "quiet": (("-q", "--quiet"), "No progress bars and no remarks."),
    "verbose": (("-v", "--verbose"), "Print more, and each paid read and each retry on standard error."),
    "debug": (("--debug",), "Show tracebacks, and all that is logged."),
}
_GIVEN = f"{__name__}.flags"
_CATALOG = f"{__name__}.catalog"


def _flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command or a group the flags of a `Talk`; they are noted in the context that all of its commands share."""

    def note(context: click.Context, parameter: click.Parameter, is_given: bool) -> None:
        if is_given:
            context.meta.setdefault(_GIVEN, set()).add(parameter.name)

    for name, (words, text) in reversed(_FLAGS.items()):
        command = click.option(*words, name, is_flag=True, help=text, callback=note, expose_value=False)(command)
    return command


def option_catalog(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--catalog`` to a command; by default what was given before the command."""
    return click.option(
        "--catalog",
        metavar="FILE",
        help="catalog.yaml, a folder with one, a mirror, or a URL. "
        "[default: $DMDATA_CATALOG, else the published release's]",
        callback=lambda context, _, value: context.meta.get(_CATALOG) if value is None else value,
    )(command)


def options_of_group(group: Callable[..., Any]) -> Callable[..., Any]:
    """Have a group take ``--json``, ``-q``, ``-v``, ``--debug`` and ``--catalog`` for the command that it runs."""

    def note(context: click.Context, _: click.Parameter, value: str | None) -> None:
        if value is not None:
            context.meta[_CATALOG] = value

    described = "For commands that read a catalog: catalog.yaml, a folder with one, or its URL."
    option = click.option("--catalog", metavar="FILE", help=described, callback=note, expose_value=False)
    return _flags(option(group))


def _start_logging(*, verbose: bool, debug: bool) -> None:
    """Show warnings of all that logs, with ``-v`` what our own loggers say as well, and with ``--debug`` everything."""
    handler = _ToStandardError()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s") if debug else _OneLine())
    logging.basicConfig(handlers=[handler], level=logging.DEBUG if debug else logging.WARNING, force=True)
    for name in _OWN_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO if verbose and not debug else logging.NOTSET)


_OWN_LOGGERS = ("dmdata", "dmpipeline")


def ask_consent(talk: Talk, price: "Estimate", *, what: str, agreed: bool) -> None:
    """Ask before money is spent.

    Raises
    ------
    ConsentError
        If nobody agreed and there is no terminal to ask at, or the answer is no.
    """
    from dmdata.money.prices import prices_in_words, readable_bytes, readable_usd
    from dmdata.reading.progress_bar import in_cells_shell

    sentence = (
        f"{what} will cost up to {readable_usd(price.usd)} ({readable_bytes(price.n_bytes)} in {price.n_requests:,} "
        f"requests to {price.destination}, {prices_in_words()})"
    )
    if agreed:
        talk.remark(sentence)
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()) or in_cells_shell():
        raise ConsentError(f"{sentence}; there is no terminal to ask at: add -y to agree", usd=price.usd)
    if not talk.confirm(f"{sentence}. Continue?"):
        raise ConsentError("nothing was fetched and nothing was spent", usd=price.usd)


def _may_show() -> bool:
    from dmdata.settings import settings

    try:
        return settings().progress
    except SettingsError:
        return False  # the command may be the one that corrects it, and any other reports it


class _ToStandardError(logging.StreamHandler[TextIO]):
    """Writes to what is standard error at the time: progress bars move down for what is written there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        self.stream = sys.stderr
        super().emit(record)


class _OneLine(logging.Formatter):
    """Gives an exception that a library logs as its last line; its traceback is for ``--debug``."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record in one line, without keys."""
        text = f"{record.name}: {record.getMessage()}"
        if record.exc_info and record.exc_info[0] is not None:
            text += f" ({record.exc_info[0].__name__}: {record.exc_info[1]})"
        return without_keys(" ".join(text.split()))
