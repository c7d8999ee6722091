"""Ratios with their spread: whoever is compared takes turns, so that what else the machine does falls on both."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a figure beside what it is measured against, and beside its bar where it has one."""

    what: str
    ours: str
    against: str
    figure: float
    low: float
    high: float
    bar: str = ""


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
    ) -> None:
        """Time ours and each peer by turns; the figure is how many times faster ours is.

        A peer that returns a float timed itself.
        """
        for work in (ours, *peers.values()):
            work()
        rounds = [(timed(ours), {name: timed(work) for name, work in peers.items()}) for _ in range(self.repeats)]
        own = statistics.median(seconds for seconds, _ in rounds)
        for name in peers:
            ratios = [others[name] / seconds for seconds, others in rounds]
            self.add(what, f"{own:.3f} s", name, ratios, bar=(bars or {}).get(name, ""))

    def add(self, what: str, ours: str, against: str, figures: list[float], *, bar: str = "") -> None:
        """Add one figure, measured once or several times."""
        self.rows.append(Row(what, ours, against, statistics.median(figures), min(figures), max(figures), bar))
        print(f"  {what}: {statistics.median(figures):.3f} against {against} {bar}", flush=True)

    def show(self, path: Path | None) -> None:
        """Print the table, and write it as JSON where a path is given."""
        table = Table("what", "ours", "against", "figure", "spread", "bar", title="figures of this machine, this run")
        for row in self.rows:
            spread = "" if row.low == row.high else f"{row.low:.3g} to {row.high:.3g}"
            table.add_row(row.what, row.ours, row.against, f"{row.figure:.3g}", spread, row.bar)
        Console(width=150).print(table)
        if path is not None:
            facts = [{name: getattr(row, name) for name in Row.__slots__} for row in self.rows]
            path.write_text(json.dumps(facts, indent=2))


def timed(work: Callable[[], float | object]) -> float:
    """Time some work in seconds, unless it did so itself."""
    start = time.perf_counter()
    said = work()
    return said if isinstance(said, float) else time.perf_counter() - start
