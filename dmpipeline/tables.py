"""Tables of answers: rows that are small dataclasses, shown in a terminal, a notebook, pandas and JSON."""

import dataclasses
import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np

from dmpipeline.shown import Shown

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table as RichTable

Row = TypeVar("Row")

_SHOWN_ROWS = 50


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Table(Shown, Generic[Row]):
    """Rows of one kind, in their order.

    Attributes
    ----------
    rows : tuple of dataclasses
    """

    rows: tuple[Row, ...]

    name: ClassVar[str] = "rows"
    """How JSON calls the list of rows."""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, place: int) -> Row:
        return self.rows[place]

    def facts(self) -> dict[str, Any]:
        """State what holds for all rows, by name."""
        own = {field.name for field in dataclasses.fields(self)} - {"rows"}
        return {name: getattr(self, name) for name in sorted(own)}

    def as_dict(self) -> dict[str, Any]:
        """Return everything ready for JSON: None stands for what is not defined."""
        whole: dict[str, Any] = plain({self.name: self.rows} | self.facts())
        return whole

    def to_pandas(self) -> "pd.DataFrame":
        """Return the rows as a pandas DataFrame, a column an attribute; ImportError where pandas is not installed."""
        import pandas as pd  # an optional package, and slow to import

        return pd.DataFrame([plain(row) for row in self.rows])

    def table(self) -> "RichTable":
        """Lay the rows out for a terminal."""
        from rich.table import Table as RichTable  # slow to import

        rows = [plain(row) for row in self.rows]
        names = list(rows[0]) if rows else []
        table = RichTable(*(name.replace("_", " ") for name in names), box=None, header_style="bold")
        for row in rows:
            table.add_row(*(in_words(value) for value in row.values()))
        return table

    def _facts(self) -> tuple[str, Mapping[str, object]]:
        facts = {name: value for name, value in self.facts().items() if isinstance(value, str | int | float)}
        return type(self).__name__, {self.name: len(self.rows), **facts}

    def _repr_html_(self) -> str:
        """Show the first rows, and how many there are."""
        rows = [plain(row) for row in self.rows[:_SHOWN_ROWS]]
        title, facts = self._facts()
        said = ", ".join(f"{name.replace('_', ' ')} {in_words(value)}" for name, value in facts.items())
        head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in (rows[0] if rows else {}))
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(in_words(value))}</td>" for value in row.values()) + "</tr>"
            for row in rows
        )
        more = len(self.rows) - len(rows)
        last = f"<tr><td>and {more:,} more</td></tr>" if more else ""
        return (
            f"<table><caption>{html.escape(title)}: {html.escape(said)}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}{last}</tbody></table>"
        )


def plain(value: Any) -> Any:
    """Turn dataclasses, arrays and NumPy numbers into what JSON has; what is not finite becomes None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(each) for each in value]
    return value


def in_words(value: Any) -> str:
    """Write a plain value for people: a dash for what is not known, long lists cut short."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 1e4 else f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(in_words, value[:8])) + (f" and {len(value) - 8:,} more" if value[8:] else "")
    return str(value)
