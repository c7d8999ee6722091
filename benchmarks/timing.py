"""Ratios with their spread: whoever is compared takes turns, so that what else the machine does falls on both."""

import json
import operator
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

PEERS = Path(__file__).parents[1] / ".venv-peers"
"""An environment of their own for peers whose requirements are not ours; `make bench` makes it."""

MEASURES = Path(__file__).parents[1] / ".venv-measures"
"""Another for those of attribution; `make measures` makes it."""

_COMPARISONS = {">=": operator.ge, "<=": operator.le, "<": operator.lt, "=": operator.eq}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a figure beside what it is measured against, and beside its bar where it has one.

    A bar is a comparison and a number, as ``>= 0.85``.
    """

    what: str
    ours: str
    against: str
    figure: float
    low: float
    high: float
    bar: str = ""

    @property
    def met(self) -> bool | None:
        """Tell whether the figure, a median, meets its bar; None without one."""
        if not self.bar:
            return None
        comparison, number = self.bar.split()
        return bool(_COMPARISONS[comparison](self.figure, float(number)))


@dataclass(slots=True)
class Bench:
    """Collects rows; `repeats` rounds each, after one that warms caches and compiles."""

    repeats: int
    rows: list[Row] = field(default_factory=list)

    def compare(
        self,
        what: str,
        ours: Callable[[], object],
        peers: dict[str, Callable[[], float | object]],
        bars: dict[str, str] | None = None,
        *,
        memory_bytes: int = 0,
    ) -> None:
        """Time ours and each peer by turns; the figure is how many times faster ours is.

        A peer that returns a float timed itself. Every other round goes backwards, so that nobody always has the same
        predecessor. A virtual machine gives memory that is free for seconds back to its host, and whoever needs it next
        waits: `memory_bytes` are claimed and freed just before each turn, so that nobody pays for a slow predecessor.
        """
        works = {"": ours, **peers}
        for work in works.values():
            work()
        rounds: list[dict[str, float]] = []
        for nth in range(self.repeats):
            order = list(works) if nth % 2 == 0 else list(reversed(works))
            rounds.append({})
            for name in order:
                np.ones(memory_bytes, np.uint8)
                rounds[-1][name] = timed(works[name])
        own = statistics.median(seconds[""] for seconds in rounds)
        for name in peers:
            ratios = [seconds[name] / seconds[""] for seconds in rounds]
            self.add(what, f"{own:.3g} s", name, ratios, bar=(bars or {}).get(name, ""))

    def add(self, what: str, ours: str, against: str, figures: list[float], *, bar: str = "") -> None:
        """Add one figure, measured once or several times."""
        row = Row(what, ours, against, statistics.median(figures), min(figures), max(figures), bar)
        self.rows.append(row)
        print(f"  {what}, against {against}: {row.figure:.3g} {bar and f'({bar})'}", flush=True)

    def show(self, path: Path | None, **about: object) -> None:
        """Print the table, and write it as JSON where a path is given, with what else there is to say of the run."""
        about |= {"python": platform.python_version(), "cores": os.cpu_count(), "repeats": self.repeats}
        title = "medians, " + ", ".join(f"{name} {value}" for name, value in about.items())
        table = Table("what", "ours", "against", "figure", "spread", "bar", "met", title=title)
        verdicts = {None: "", True: "yes", False: "no"}
        for row in self.rows:
            spread = "" if row.low == row.high else f"{row.low:.3g} to {row.high:.3g}"
            table.add_row(row.what, row.ours, row.against, f"{row.figure:.3g}", spread, row.bar, verdicts[row.met])
        Console(width=150).print(table)
        if path is not None:
            rows = [asdict(row) | {"met": row.met} for row in self.rows]
            path.write_text(json.dumps({**about, "rows": rows}, indent=2))

    def write(self, path: Path, **about: object) -> None:
        """Write the table for the documentation, as Markdown that says when and how it was measured."""
        how = ", ".join(f"{name} {value}" for name, value in about.items())
        lines = [
            f"Measured on {date.today()} by `benchmarks/run.py`, which wrote this file: {how}, {os.cpu_count()} cores, "
            f"Python {platform.python_version()}, {self.repeats} rounds.",
            "",
            "| what | ours | against | figure | spread | bar |",
            "|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            figure = f"**{row.figure:.3g}**" if row.met is False else f"{row.figure:.3g}"
            spread = "" if row.low == row.high else f"{row.low:.3g} to {row.high:.3g}"
            lines.append(f"| {row.what} | {row.ours} | {row.against} | {figure} | {spread} | {row.bar} |")
        path.write_text("\n".join([*lines, ""]), encoding="utf-8")


def timed(work: Callable[[], float | object]) -> float:
    """Time some work in seconds, unless it did so itself."""
    start = time.perf_counter()
    said = work()
    return said if isinstance(said, float) else time.perf_counter() - start
