"""Tables of answers: rows that are small dataclasses, shown in a terminal, a notebook, pandas and JSON."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np

from dmdata.shown import SHOWN_ROWS, Shown, readable_usd, rows_as_html, rows_as_text

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table as RichTable

Row = TypeVar("Row")


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
        if "usd" in facts:
            facts["cost"] = readable_usd(float(facts.pop("usd")))
        return type(self).__name__, {self.name: len(self.rows), **facts}

    def _shown_rows(self) -> Iterator[dict[str, Any]]:
        """Iterate over the rows as a notebook shows them: plain values by the columns' titles."""
        return ({name.replace("_", " "): value for name, value in plain(row).items()} for row in self.rows)

    def _repr_html_(self) -> str:
        """Show the first rows, and how many there are."""
        rows = itertools.islice(self._shown_rows(), SHOWN_ROWS)
        return dicts_as_html(self._title(), list(rows), n_rows=len(self.rows))

    def __str__(self) -> str:
        """Show the first rows for `print`, a line each, and how many there are."""
        rows = list(itertools.islice(self._shown_rows(), SHOWN_ROWS))
        columns = _known_columns(rows)
        texts = [[in_words(row[name]) for name in columns] for row in rows]
        return rows_as_text(self._title(), columns, texts, n_rows=len(self.rows))

    def _title(self) -> str:
        title, facts = self._facts()
        said = ", ".join(f"{name.replace('_', ' ')} {in_words(fact)}" for name, fact in facts.items())
        return f"{title}: {said}"


def dicts_as_html(title: str, rows: Sequence[Mapping[str, Any]], *, n_rows: int) -> str:
    """Make a table for a notebook of rows that are plain values by their columns' titles; see `rows_as_html`.

    Columns of which nothing is known in any row are left out.
    """
    columns = _known_columns(rows)
    return rows_as_html(title, columns, ([in_words(row[name]) for name in columns] for row in rows), n_rows=n_rows)


def _known_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in (rows[0] if rows else ()) if any(row[name] is not None for row in rows)]


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


def number_or_none(value: float | None) -> float | None:
    """Return a number as JSON has it: None where it is not defined, which is nan or None here."""
    return None if value is None or math.isnan(value) else value


def number(value: Any) -> float:
    """Read a number of JSON, None for what is not defined; TypeError for anything else."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


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
