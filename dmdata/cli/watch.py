"""What a command is doing, shown within two seconds: bars at a terminal; elsewhere, as in log files, plain lines.

Lines are far apart: the first after a second, and each next one when three times as long has passed, but at least one a
minute (or as the setting `progress_seconds` has it). A command that is done before the first is silent.
"""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from dmdata.errors import SettingsError
from dmdata.money.prices import readable_seconds, readable_usd
from dmdata.settings import Settings, settings

FIRST_SECONDS = 1.0
"""A command that takes less shows nothing of what it is doing."""

_GROWTH = 3.0
# blocks may take long, and between two of them nothing is known
_RATE_SECONDS = 3600.0


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


class Dollars(ProgressColumn):
    """What the bytes so far cost, of what all will."""

    def render(self, task: Task) -> Text:
        """Write the dollars, requests included."""
        usd = task.fields["usd"]
        so_far = usd * min(task.completed / task.total, 1.0) if task.total else 0.0
        return Text(f"{readable_usd(so_far)} of {readable_usd(usd)}" if usd else "free")


def bars(*columns: ProgressColumn, is_wanted: bool) -> Progress:
    """Make the bars of a command, which are drawn at a terminal alone, with columns of its own."""
    console = Console(stderr=True)
    shown = (TextColumn("{task.description}", markup=False), BarColumn(), *columns, TimeRemainingColumn())
    is_off = not is_wanted or not console.is_terminal
    return Progress(*shown, console=console, disable=is_off, speed_estimate_period=_RATE_SECONDS)


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
        # of many at the same time one line is enough
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
    except SettingsError:  # reported by what needs a setting
        return Settings().progress_seconds


class Stages:
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
        """Show how much of a stage is done."""
        with self._lock:
            if stage not in self._tasks:
                # a task is timed from when it is made, so that the one before does not count in this one's rate
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
        """Show what is done from now on; see `dmdata.phases`."""
        with self._lock:
            task = self._bars.tasks[-1]
            if task.finished:
                return  # what comes after all is counted is not part of it
            self._phase = text
            self._bars.update(self._tasks.get(self._last, self._first or TaskID(0)), description=self._words())

    def advance(self, amount: float) -> None:
        """Count part of what is being done."""
        with self._lock:
            if (task := self._tasks.get(self._last)) is None:
                return
            its = self._bars.tasks[self._bars.task_ids.index(task)]
            # what was begun is not done before it is stored
            if its.total is not None:
                self._bars.update(task, completed=min(its.completed + amount, max(its.completed, its.total - 1)))

    def _words(self) -> str:
        return f"{self._last}, {self._phase}" if self._phase else self._last
