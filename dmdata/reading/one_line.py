"""Progress bars that take one line each, however narrow the terminal is; rich alone would wrap and shorten their text.

What is least needed gives way first: the bar becomes short, then the rate goes, the bar, the time left, the dollars.
A name is cut only where it does not fit next to how much is done.
"""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.progress import (
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dmdata.money.prices import readable_bytes, readable_seconds, readable_usd

_BAR = 40
_LEAST_BAR = 8


class Bytes(DownloadColumn):
    """How many bytes are there of how many; of what is done, how many there are."""

    def __init__(self) -> None:
        super().__init__(binary_units=True)

    def render(self, task: Task) -> Text:
        """Write the bytes in one unit."""
        return Text(readable_bytes(task.completed)) if task.finished else super().render(task)


class Dollars(ProgressColumn):
    """What the bytes that were fetched so far cost, of what all will; of what is done, what it cost.

    A task's field `usd` is the price of its field `n_bytes` bytes, which are the last of its total.
    """

    def render(self, task: Task) -> Text:
        """Write the dollars, requests included."""
        usd = task.fields["usd"]
        if not usd:
            return Text("free")
        so_far = usd_so_far(task)
        return Text(readable_usd(so_far) if task.finished else f"{readable_usd(so_far)} of {readable_usd(usd)}")


def usd_so_far(task: Task) -> float:
    """Return what the bytes that a task has fetched so far cost."""
    n_bytes = task.fields["n_bytes"]
    if not n_bytes or task.total is None:
        return 0.0
    return float(task.fields["usd"] * min(max(1.0 - (task.total - task.completed) / n_bytes, 0.0), 1.0))


class TimeLeft(TimeRemainingColumn):
    """How long it will still take; of what is done, how long it took."""

    def render(self, task: Task) -> Text:
        """Write hours, minutes and seconds of what is left, or the time taken in its largest unit."""
        if not task.finished:
            return super().render(task) if task.started else Text("")
        return Text(f"in {readable_seconds(task.finished_time)}" if task.finished_time is not None else "")


class Speed(TransferSpeedColumn):
    """Bytes a second."""

    def render(self, task: Task) -> Text:
        """Write the speed; nothing as long as it is not known."""
        return super().render(task) if task.finished_speed or task.speed else Text("")


class OneLine(Progress):
    """A display of tasks, a line each: the name, a bar, how much is done, other facts, the rate and the time left.

    Parameters
    ----------
    *facts : ProgressColumn
        How much is done first, the rate last.
    console : Console
    **options
        As of `rich.progress.Progress`.
    """

    def __init__(self, *facts: ProgressColumn, console: Console, **options: bool | float) -> None:
        self._console = console  # rich lays the tasks out before it has its own
        super().__init__(*facts, TimeLeft(), console=console, **options)  # type: ignore[arg-type]

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        """Lay out the tasks that are shown."""
        seen = [task for task in tasks if task.visible]
        names = [Text(task.description) for task in seen]
        facts = [
            [_text(column, task) for task in seen] for column in self.columns if isinstance(column, ProgressColumn)
        ]
        room = self._console.width - 1 - max((name.cell_len for name in names), default=0)
        bar, shown = _fitting([_width(cells) for cells in facts], room)
        others = sum(_width(facts[place]) + 1 for place in shown) + (bar + 1 if bar else 0)
        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True, overflow="ellipsis", max_width=max(self._console.width - 1 - others, 1))
        for _ in range(len(shown) + bool(bar)):
            table.add_column(no_wrap=True, overflow="crop")
        for nth, (task, name) in enumerate(zip(seen, names, strict=True)):
            drawn = [ProgressBar(total=task.total, completed=task.completed, width=bar)] if bar else []
            table.add_row(name, *drawn, *(facts[place][nth] for place in shown))
        return table


def _text(column: ProgressColumn, task: Task) -> Text:
    shown = column(task)
    return shown if isinstance(shown, Text) else Text(str(shown))


def _width(texts: Sequence[Text]) -> int:
    return max((text.cell_len for text in texts), default=0)


def _fitting(widths: Sequence[int], room: int) -> tuple[int, list[int]]:
    """Choose the width of the bar, 0 for none, and which facts are shown, by their places."""
    shown = [place for place, width in enumerate(widths) if width]
    least_bar, rate, left = _LEAST_BAR, len(widths) - 2, len(widths) - 1
    for gives_way in (rate, None, left, *range(rate - 1, 0, -1), 0):
        spare = room - sum(widths[place] + 1 for place in shown) - bool(least_bar)
        if spare >= least_bar or gives_way == 0:
            break
        if gives_way is None:
            least_bar = 0
        else:
            shown = [place for place in shown if place != gives_way]
    return min(spare, _BAR) if least_bar else 0, shown
