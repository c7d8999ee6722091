"""How objects show themselves, at a prompt, in a notebook and printed: in a few facts, never by their arrays.

What a notebook shows is a plain table without colours, legible on a light page and a dark one; whatever is in it is
escaped.
"""

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence

SHOWN_ROWS = 50
"""A table in a notebook shows no more rows than these, and how many there are."""

_PADDED = "padding: 0.1em 1em 0.1em 0"
_LEFT, _RIGHT = f"text-align: left; {_PADDED}", f"text-align: right; white-space: nowrap; {_PADDED}"
_FIGURE = re.compile(r"-|-?\$?\d[\d,.]*(e[-+]?\d+)?%?( [A-Za-z]+)?")  # "1,234", "$0.53", "19.1 MiB"


class Shown:
    """Provides `repr` and, for notebooks, a small table, from a title and a few facts.

    A dataclass that derives from it is made with ``repr=False``.
    """

    __slots__ = ()

    def _facts(self) -> tuple[str, Mapping[str, object]]:
        """State what matters: a title, and facts by name in words; what is None is left out."""
        raise NotImplementedError

    def __repr__(self) -> str:
        title, facts = self._facts()
        said = ", ".join(f"{name} {fact_in_words(fact)}" for name, fact in facts.items() if fact is not None)
        return f"<{title}: {said}>" if said else f"<{title}>"

    def _repr_html_(self) -> str:
        return as_html(*self._facts())


def as_html(title: str, facts: Mapping[str, object]) -> str:
    """Make a table of named facts for a notebook.

    Parameters
    ----------
    title : str
    facts : mapping of str to object
        What is None is left out.

    Returns
    -------
    table : str
    """
    rows = "".join(
        f"<tr>{_cell(name, 'th', _LEFT)}{_cell(fact_in_words(fact), 'td', _LEFT)}</tr>"
        for name, fact in facts.items()
        if fact is not None
    )
    return _titled(title, f"<tbody>{rows}</tbody>")


def rows_as_html(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, n_rows: int) -> str:
    """Make a table of rows for a notebook: the first `SHOWN_ROWS`, and how many more there are.

    Parameters
    ----------
    title : str
    columns : sequence of str
        Their titles.
    rows : iterable of sequence of str
        In words. Columns of nothing but numbers, sizes and dollars are set to the right.
    n_rows : int
        How many there are; `rows` may end after `SHOWN_ROWS`.

    Returns
    -------
    table : str
    """
    shown = [row for row, _ in zip(rows, range(SHOWN_ROWS), strict=False)]
    sides = [_RIGHT if all(_FIGURE.fullmatch(row[at]) for row in shown) else _LEFT for at in range(len(columns))]
    head = "".join(_cell(name, "th", side) for name, side in zip(columns, sides, strict=True))
    body = "".join(
        "<tr>" + "".join(_cell(value, "td", side) for value, side in zip(row, sides, strict=True)) + "</tr>"
        for row in shown
    )
    more = n_rows - len(shown)
    last = f"<tr><td style='{_LEFT}' colspan='{len(columns)}'>and {more:,} more</td></tr>" if more > 0 else ""
    return _titled(title, f"<thead><tr>{head}</tr></thead><tbody>{body}{last}</tbody>")


def rows_as_text(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, n_rows: int) -> str:
    """Make a table of rows for `print`: a line each, the first `SHOWN_ROWS`, and how many more there are.

    Arguments are those of `rows_as_html`.
    """
    shown = [list(columns), *(list(row) for row, _ in zip(rows, range(SHOWN_ROWS), strict=False))]
    if len(shown) == 1:
        return title
    widths = [max(len(row[at]) for row in shown) for at in range(len(columns))]
    is_right = [all(_FIGURE.fullmatch(row[at].lstrip("+")) for row in shown[1:]) for at in range(len(columns))]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_right, strict=True)
        ).rstrip()
        for row in shown
    ]
    more = n_rows - len(shown) + 1
    return "\n".join([title, *lines, *([f"and {more:,} more"] if more > 0 else [])])


def fact_in_words(fact: object) -> str:
    """Write a fact for people: whole numbers with separators, others with three decimals."""
    if isinstance(fact, bool) or not isinstance(fact, int | float):
        return str(fact)
    return f"{fact:,}" if isinstance(fact, int) else f"{fact:.3f}"


def sizes_in_words(shape: Sequence[int], dims: Sequence[str]) -> str:
    """Write sizes with the names of their dimensions.

    >>> sizes_in_words((310000, 10000), ("model", "test_example"))
    '310,000 model x 10,000 test_example'
    """
    return " x ".join(f"{size:,} {dim}".rstrip() for size, dim in zip(shape, dims, strict=True))


def readable_usd(usd: float) -> str:
    """Write dollars with cents, or with two digits where cents would hide them.

    >>> readable_usd(374.2), readable_usd(0.53), readable_usd(0.00012), readable_usd(0)
    ('$374.20', '$0.53', '$0.00012', '$0.00')
    """
    if usd == 0 or abs(usd) >= 0.01:
        return f"${usd:,.2f}"
    return f"${usd:.{1 - math.floor(math.log10(abs(usd)))}f}"


def readable_bytes(n_bytes: float) -> str:
    """Write a size in binary units, GiB being what a bill calls GB.

    >>> readable_bytes(999), readable_bytes(15_100_000_128)
    ('999 B', '14.1 GiB')
    """
    unit, size = "B", float(n_bytes)
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        unit, size = larger, size / 1024
    return f"{size:.0f} B" if unit == "B" else f"{size:,.1f} {unit}"


def readable_seconds(seconds: float) -> str:
    """Write a time in the largest unit of which there is at least one.

    >>> readable_seconds(0.25), readable_seconds(90), readable_seconds(5_270_000)
    ('0.2 s', '1.5 min', '61.0 days')
    """
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"


def _titled(title: str, rows: str) -> str:
    # not a caption, which would be as narrow as its table
    return f"<div>{html.escape(title)}</div><table>{rows}</table>"


def _cell(words: str, kind: str, side: str) -> str:
    return f"<{kind} style='{side}'>{html.escape(words)}</{kind}>"
