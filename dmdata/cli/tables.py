"""The two kinds of table that commands print, and how any table fits a terminal; rich is imported when it is needed.

Names, paths and numbers are never shortened or broken: prose is wrapped at its words, and where that is not enough each
row's name gets a line of its own, with the row's other columns below it.
"""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.style import StyleType
    from rich.table import Table
    from rich.text import Text

_GAP = "  "
_INDENT = "  "
# prose with words that do not fit is still wrapped at this width
_LEAST_PROSE = 16
# a column narrower than this fraction of the width is a label, and stays next to what it labels
_SHORT_NAMES = 4


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


def lines_of(table: "Table", width: int | None) -> "list[Text]":
    """Lay a table out, a line each.

    Parameters
    ----------
    table : Table
        Whose cells are text.
    width : int or None
        Of the terminal, in characters; None where every row is to be one line. A word that is longer than the terminal
        is wide sticks out, for the terminal to wrap, so that it is copied whole.

    Returns
    -------
    lines : list of Text
    """
    columns = [_Column.of(table, place) for place in range(len(table.columns))]
    if not columns:
        return []
    if width is None:
        return _stacked(_rows(table, columns, [column.natural for column in columns]))
    widths, excess = _widths(columns, width - 1, sticking_out=False)
    if excess and columns[0].natural <= width // _SHORT_NAMES:
        widths, excess = _widths(columns, width - 1, sticking_out=True)
    if not excess or len(columns) == 1:
        return _stacked(_rows(table, columns, widths))
    # each row's name has a line of its own, and its other columns one or more below that
    names, columns = columns[0], columns[1:]
    widths, _ = _widths(columns, width - len(_INDENT) - 1, sticking_out=True)
    lines = []
    for name, style, rest in zip(names.texts, _styles(table), _rows(table, columns, widths), strict=True):
        lines += [_styled(" ", name, style), *(_styled(_INDENT, line, "") for line in rest)]
    return lines


@dataclass(frozen=True, slots=True)
class _Column:
    """The header, if any, and the cells of a column; prose wraps, names and numbers do not, a header does."""

    texts: "list[Text]"
    has_header: bool
    is_prose: bool
    is_right: bool

    @classmethod
    def of(cls, table: "Table", place: int) -> "_Column":
        from rich.text import Text

        column, has_header = table.columns[place], table.show_header
        cells = [column.header, *column.cells] if has_header else list(column.cells)
        is_right = column.justify == "right"
        texts = [cell if isinstance(cell, Text) else Text(str(cell)) for cell in cells]
        return cls(texts, has_header, is_prose=place > 0 and not is_right, is_right=is_right)

    @property
    def natural(self) -> int:
        """How wide it is where nothing wraps."""
        return _longest_line(self.texts)

    @property
    def with_wrapped_header(self) -> int:
        """How wide its cells are, and each word of its header."""
        return max(_longest_line(self.texts[int(self.has_header) :]), _longest_word(self.texts[: int(self.has_header)]))

    @property
    def least(self) -> int:
        """How wide it has to be for whole names, numbers and words."""
        return _longest_word(self.texts) if self.is_prose else self.with_wrapped_header


def _longest_line(texts: "Sequence[Text]") -> int:
    return max((line.cell_len for text in texts for line in text.split()), default=0)


def _longest_word(texts: "Sequence[Text]") -> int:
    from rich.cells import cell_len

    return max((cell_len(word) for text in texts for word in text.plain.split()), default=0)


def _widths(columns: Sequence[_Column], width: int, *, sticking_out: bool) -> tuple[list[int], int]:
    """Choose the width of each column, headers giving way first, then the widest prose; and by how much it is too wide.

    With `sticking_out` a word of prose may be longer than its column, which then ends further right in that line; the
    last column's always may, as nothing stands behind it.
    """
    widths = [column.natural for column in columns]
    least = [column.least for column in columns]
    for place, column in enumerate(columns):
        if column.is_prose and (sticking_out or place == len(columns) - 1):
            least[place] = min(least[place], _LEAST_PROSE)
    excess = sum(widths) + len(_GAP) * (len(widths) - 1) - width
    for bounds in ([max(*both) for both in zip(least, (c.with_wrapped_header for c in columns), strict=True)], least):
        while excess > 0 and (free := [place for place, its in enumerate(widths) if its > bounds[place]]):
            widths[max(free, key=widths.__getitem__)] -= 1
            excess -= 1
    return widths, max(excess, 0)


def _stacked(rows: "Iterable[list[Text]]") -> "list[Text]":
    return [line for row in rows for line in row]


def _rows(table: "Table", columns: Sequence[_Column], widths: Sequence[int]) -> "Iterator[list[Text]]":
    """Lay out each row, the headers first, in columns of these widths."""
    from rich.text import Text

    for style, cells in zip(_styles(table), zip(*(column.texts for column in columns), strict=True), strict=True):
        parts = [_wrapped(cell, its) for cell, its in zip(cells, widths, strict=True)]
        lines = []
        for its_parts in zip_longest(*parts, fillvalue=Text()):
            aligned = [part.copy() for part in its_parts]
            for part, column, its in zip(aligned, columns, widths, strict=True):
                if part.cell_len < its:  # rich would cut off what is longer
                    part.align("right" if column.is_right else "left", its)
            lines.append(_styled(" ", Text(_GAP).join(aligned), style))
        yield lines


def _styles(table: "Table") -> "list[StyleType]":
    headers = [table.header_style] if table.show_header else []
    return [*headers, *(row.style or "" for row in table.rows)]


def _styled(before: str, text: "Text", style: "StyleType") -> "Text":
    from rich.text import Text

    line = Text.assemble(before, text)
    line.rstrip()
    line.stylize_before(style)
    return line


def _wrapped(text: "Text", width: int) -> "list[Text]":
    """Break a text at its spaces, where it is too long; words stay whole."""
    from rich.text import Text

    lines = list(text.split()) or [Text()]
    if all(line.cell_len <= width for line in lines):
        return lines
    return [
        Text(part, style=text.style)
        for line in lines
        for part in textwrap.wrap(line.plain, width, break_long_words=False, break_on_hyphens=False) or [""]
    ]
