"""The two kinds of table that commands print; rich is imported when the first is made."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def headed_table(*headers: str, right: slice = slice(0)) -> "Table":
    """Make a table with bold headers; the columns of `right` are aligned to the right."""
    from rich.table import Table

    table = Table(*headers, box=None, header_style="bold")
    for column in table.columns[right]:
        column.justify = "right"
    return table


def plain_table(*rows: Iterable[str]) -> "Table":
    """Make a table without headers."""
    from rich.table import Table

    table = Table(box=None, show_header=False)
    for row in rows:
        table.add_row(*row)
    return table
