"""How objects show themselves, at a prompt and in a notebook: in a few facts, never by their arrays; and in JSON."""

import html
import math
from collections.abc import Mapping


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
        said = ", ".join(f"{name} {_in_words(fact)}" for name, fact in facts.items() if fact is not None)
        return f"<{title}: {said}>" if said else f"<{title}>"

    def _repr_html_(self) -> str:
        return as_html(*self._facts())


def as_html(title: str, facts: Mapping[str, object]) -> str:
    """Make a table of named facts for a notebook; whatever is in them is escaped.

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
        f"<tr><th style='text-align: left'>{html.escape(name)}</th>"
        f"<td style='text-align: left'>{html.escape(_in_words(fact))}</td></tr>"
        for name, fact in facts.items()
        if fact is not None
    )
    return f"<table><caption>{html.escape(title)}</caption>{rows}</table>"


def number_or_none(value: float | None) -> float | None:
    """Return a number as JSON has it: None where it is not defined, which is nan or None here."""
    return None if value is None or math.isnan(value) else value


def _in_words(fact: object) -> str:
    if isinstance(fact, bool) or not isinstance(fact, int | float):
        return str(fact)
    return f"{fact:,}" if isinstance(fact, int) else f"{fact:.3f}"
