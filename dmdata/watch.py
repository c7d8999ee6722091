"""What a command is doing, shown within two seconds: bars at a terminal; elsewhere, as in log files, plain lines.

Lines are far apart: the first after a second, and each next one when three times as long has passed, but at least one a
minute (the setting `progress_seconds` says otherwise). A command that is done before the first is silent.
"""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence

import click
from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from dmdata.errors import SettingsError
from dmdata.prices import readable_seconds
from dmdata.settings import Settings, settings

FIRST_SECONDS = 1.0
"""A command that takes less says nothing of what it is doing."""

_GROWTH = 3.0


class Count(ProgressColumn):
    """How many are done of how many, as `250 of 4,100 models`."""

    def render(self, task: Task) -> Text:
        """Write whole numbers; nothing as long as nothing is known to count."""
        if task.total is None:
            return Text("")
        return Text(f"{int(task.completed):,} of {int(task.total):,} {task.fields.get('unit', '')}".rstrip())


class Rate(ProgressColumn):
    """How many are done in a second."""

    def render(self, task: Task) -> Text:
        """Write the rate, in a minute or an hour where it is small; nothing as long as it is not known."""
        speed = task.finished_speed or task.speed
        if not speed or task.total is None:
            return Text("")
        for words, seconds in (("a second", 1), ("a minute", 60), ("an hour", 3600)):
            if speed * seconds >= 1 or seconds == 3600:
                return Text(f"{speed * seconds:,.1f} {words}")
        return Text("")


class Watch:
    """Shows what one command is doing while it is entered as a context.

    Parameters
    ----------
    name : str
        Of the command; starts the lines that say what is done as long as nothing is counted.
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
                    return  # standard error is closed: nobody looks
            elapsed = time.monotonic() - self._began
            due = elapsed + FIRST_SECONDS if self._console.is_terminal else min(_GROWTH * elapsed, elapsed + every)

    def _show(self) -> None:
        if not self._console.is_terminal:
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
        if self._console.is_terminal:
            return
        if self._bars is None:
            click.echo(f"{self._words()} ({readable_seconds(time.monotonic() - self._began)})", err=True)
            return
        self._n_lines += 1
        tasks = [task for task in self._bars.tasks if task.id not in self._told]
        # of many side by side one line says enough
        tasks = [task for task in tasks if task.fields.get("sums_up")] or tasks
        for task in tasks:
            if task.finished:
                self._told.add(task.id)
            if not is_last or task.finished:
                click.echo(self._line(task), err=True)

    def _line(self, task: Task) -> str:
        parts = [column.render(task) for column in self._columns]
        facts = [str(part).strip() for part in parts if str(part).strip(" ?")]
        if task.finished and task.finished_time is not None:
            facts.append(f"in {readable_seconds(task.finished_time)}")
        elif task.time_remaining is not None:
            facts.append(f"{readable_seconds(task.time_remaining)} left")
        elif task.elapsed is not None:
            facts.append(readable_seconds(task.elapsed))
        return f"{task.description}: {', '.join(facts)}"


def _line_seconds() -> float:
    try:
        return settings().progress_seconds
    except SettingsError:  # said by what needs a setting
        return Settings().progress_seconds
