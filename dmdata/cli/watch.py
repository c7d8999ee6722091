"""What a command is doing, shown within two seconds: bars at a terminal; elsewhere, as in log files, plain lines.

Lines are far apart: the first after a second, and each next one when three times as long has passed, but at least one a
minute (or as the setting `progress_seconds` has it). A command that is done before the first is silent. A cell of a
notebook that starts a command gets lines: it would keep every state of a bar.
"""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence

import click
from rich.console import Console
from rich.progress import (
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from dmdata.errors import SettingsError
from dmdata.money.prices import readable_seconds
from dmdata.reading.one_line import OneLine
from dmdata.reading.progress_bar import in_cells_shell
from dmdata.reading.stages import RATE_SECONDS, line_of
from dmdata.settings import Settings, settings

FIRST_SECONDS = 1.0
"""A command that takes less shows nothing of what it is doing."""

_GROWTH = 3.0


def bars(*columns: ProgressColumn, is_wanted: bool) -> Progress:
    """Make the bars of a command, which are drawn at a terminal alone, with columns of its own."""
    console = Console(stderr=True)
    is_off = not is_wanted or not _draws(console)
    return OneLine(*columns, console=console, disable=is_off, speed_estimate_period=RATE_SECONDS)


def _draws(console: Console) -> bool:
    return console.is_terminal and not in_cells_shell()


class Watch:
    """Shows what one command is doing while it is entered as a context.

    Parameters
    ----------
    name : str
        Of the command; starts the lines that show what is done while nothing is counted.
    wanted : bool
        Otherwise nothing is ever shown.
    """

    def __init__(self, name: str, *, wanted: bool) -> None:
        self._name, self._wanted = name, wanted
        self._console = Console(stderr=True)
        self._lock, self._over = threading.RLock(), threading.Event()
        self._phase, self._began, self._paused = "starting", time.monotonic(), 0
        self._bars: Progress | None = None
        self._columns: Sequence[ProgressColumn] = ()
        self._spinner: Progress | None = None
        self._n_lines, self._told = 0, set[int]()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watch":
        if self._wanted:
            self._thread = threading.Thread(target=self._look, name="dmdata-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        with self._lock:
            self._wipe()
        if self._thread is not None:
            self._thread.join()

    def phase(self, text: str) -> None:
        """Take note of what the command does from now on; see `dmdata.phases`."""
        with self._lock:
            self._phase = text or "working"
            if self._spinner is not None:
                self._spinner.update(self._spinner.tasks[0].id, description=self._words())

    def advance(self, amount: float) -> None:
        """Nothing is counted here."""

    @contextlib.contextmanager
    def showing(self, bars: Progress, columns: Sequence[ProgressColumn]) -> Iterator[None]:
        """Show the tasks of `bars` while the block runs: at no terminal as lines, with the text of these columns."""
        with self._lock:
            self._wipe()
            self._bars, self._columns, self._n_lines, self._told = bars, columns, 0, set()
        try:
            yield
        except BaseException:
            self._show_no_bars()
            raise
        with self._lock:
            if self._n_lines:
                self._print_lines(is_last=True)
        self._show_no_bars()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Leave standard error to others while the block runs, as to ask a question."""
        with self._lock:
            self._paused += 1
            self._wipe()
        try:
            yield
        finally:
            with self._lock:
                self._paused -= 1

    def _show_no_bars(self) -> None:
        with self._lock:
            self._bars = None

    def _look(self) -> None:
        every = _line_seconds()
        due = min(FIRST_SECONDS, every)
        while not self._over.wait(max(0.0, self._began + due - time.monotonic())):
            with self._lock:
                if self._over.is_set():
                    return
                try:
                    if not self._paused:
                        self._show()
                except (OSError, ValueError):
                    return  # standard error is closed
            elapsed = time.monotonic() - self._began
            due = elapsed + FIRST_SECONDS if _draws(self._console) else min(_GROWTH * elapsed, elapsed + every)

    def _show(self) -> None:
        if not _draws(self._console):
            self._print_lines()
        elif self._bars is None and self._spinner is None:
            columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
            self._spinner = Progress(*columns, console=self._console, transient=True)
            self._spinner.add_task(self._words(), total=None)
            self._spinner.start()

    def _wipe(self) -> None:
        if self._spinner is not None:
            spinner, self._spinner = self._spinner, None
            with contextlib.suppress(OSError, ValueError):
                spinner.stop()

    def _words(self) -> str:
        return f"{self._name}: {self._phase}"

    def _print_lines(self, *, is_last: bool = False) -> None:
        if _draws(self._console):
            return
        if self._bars is None:
            click.echo(f"{self._words()} ({readable_seconds(time.monotonic() - self._began)})", err=True)
            return
        self._n_lines += 1
        tasks = [task for task in self._bars.tasks if task.id not in self._told]
        # of many at the same time one line is enough
        tasks = [task for task in tasks if task.fields.get("sums_up")] or tasks
        for task in tasks:
            if task.finished:
                self._told.add(task.id)
            if not is_last or task.finished:
                click.echo(line_of(task, self._columns), err=True)


def _line_seconds() -> float:
    try:
        return settings().progress_seconds
    except SettingsError:  # reported by what needs a setting
        return Settings().progress_seconds
