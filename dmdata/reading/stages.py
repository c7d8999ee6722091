"""The stages of long work: what each of them counts, how much is done, and what is being done just now."""

import threading
from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task, TaskID
from rich.text import Text

from dmdata.money.prices import readable_seconds
from dmdata.reading.one_line import OneLine

RATE_SECONDS = 3600.0
"""Over how long a rate is taken: blocks may take long, and between two of them nothing is known."""


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


def stage_bars(console: Console, **options: bool) -> OneLine:
    """Make the bars of stages, on a console."""
    return OneLine(Count(), Rate(), console=console, speed_estimate_period=RATE_SECONDS, **options)


def line_of(task: Task, columns: Sequence[ProgressColumn]) -> str:
    """Write a task as text: its name, what columns say of it, and how long it took or will take."""
    parts = [column.render(task) for column in columns]
    facts = [str(part).strip() for part in parts if str(part).strip(" ?")]
    if task.finished and task.finished_time is not None:
        facts.append(f"in {readable_seconds(task.finished_time)}")
    elif task.time_remaining is not None:
        facts.append(f"{readable_seconds(task.time_remaining)} left")
    elif task.elapsed is not None:
        facts.append(readable_seconds(task.elapsed))
    return f"{task.description}: {', '.join(facts)}"


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
                self._tasks[stage] = self._bars.add_task(stage, total=in_all, unit=self._units.get(stage, ""))
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
