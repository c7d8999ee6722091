"""What a verification finds: one finding a check, by level, the worst first."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dmdata.shown import as_html
from dmpipeline.tables import Table, plain

if TYPE_CHECKING:
    from rich.table import Table as RichTable

LevelName = Literal["bytes", "schema", "meaning", "statistics", "refit"]
VerdictName = Literal["agrees", "differs", "undecided"]

LEVELS: tuple[LevelName, ...] = ("bytes", "schema", "meaning", "statistics", "refit")
"""From what everything else stands on to what is the furthest from the bytes.

Bytes are those that were stored; the schema has the shapes and types of the spec; the meaning is that numbers are
what they are called; statistics compare with a reference; refit compares the datamodels fitted to both.
"""

_LEVEL_OF: dict[str, LevelName] = {
    "complete": "bytes",
    "digests": "bytes",
    "spec": "schema",
    "dataset": "schema",
    "arrays": "schema",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check.

    Attributes
    ----------
    check : str
        What was checked, as "digests" or "location".
    passed : bool
    detail : str
        What holds, or what does not and where; for people.
    level : {"bytes", "schema", "meaning", "statistics", "refit"}
        If not given, that of the check.
    effect : float or None
        How large the largest difference is, in the units that `detail` names; None where nothing was estimated.
    low, high : float or None
        Interval of the effect; where several are looked at, it holds for all of them at once.
    margin : float or None
        Differences up to this size count as none.
    n_rows : int or None
        Rows of the reference that were read.
    """

    check: str
    passed: bool
    detail: str
    level: LevelName = ""  # type: ignore[assignment] # filled in below
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    margin: float | None = None
    n_rows: int | None = None

    def __post_init__(self) -> None:
        if not self.level:
            object.__setattr__(self, "level", _LEVEL_OF.get(self.check, "meaning"))

    @property
    def outcome(self) -> str:
        """In a word: "ok", "differs", or "warning" where models have not learned."""
        return "ok" if self.passed else "warning" if self.check == "learned" else "differs"

    def _repr_html_(self) -> str:
        return as_html(f"Finding: {self.check}", {"level": self.level, "": self.outcome, "what was found": self.detail})


def worst_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Order findings: those that failed before those that passed, then by level; else as they came."""
    return tuple(sorted(findings, key=lambda finding: (finding.passed, LEVELS.index(finding.level))))


@dataclass(frozen=True, slots=True, repr=False)
class Verification(Table[Finding]):
    """What was found of a run, by itself or next to a reference.

    Attributes
    ----------
    rows : tuple of Finding
        The worst first.
    verdict : {"agrees", "differs", "undecided"}
        Next to a reference: "differs" if a check failed, or a difference surely exceeds its margin; "agrees" if every
        difference is surely within its margin, or the rows that were read are the same models, which the finding
        "same_models" then says; else "undecided". Of a run by itself: "agrees" if every check passed,
        else "differs".
    reference : str or None
        What it was compared with.
    n_rows : int
        Rows of the reference that were read; of a run by itself, its own.
    usd : float or None
        Dollars that reading the reference cost, at most; None without one.
    """

    verdict: VerdictName
    reference: str | None = None
    n_rows: int = 0
    usd: float | None = None

    name: ClassVar[str] = "findings"

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(finding.passed for finding in self.rows)

    def facts(self) -> dict[str, Any]:
        """State what holds for all findings, by name."""
        return {
            "verdict": self.verdict,
            "passed": self.passed,
            "reference": self.reference,
            "n_rows": self.n_rows,
            "usd": self.usd,
        }

    def _shown_rows(self) -> Iterator[dict[str, Any]]:
        return (
            {"level": row.level, "check": row.check, "": row.outcome, "what was found": row.detail} for row in self.rows
        )

    def as_dict(self) -> dict[str, Any]:
        """Return everything ready for JSON, the verdict first."""
        whole: dict[str, Any] = plain(self.facts() | {self.name: self.rows})
        return whole

    def table(self) -> "RichTable":
        """Lay the findings out for a terminal."""
        from rich.table import Table as RichTable  # slow to import
        from rich.text import Text

        table = RichTable("level", "check", "", "what was found", box=None, header_style="bold")
        for finding in self.rows:
            outcome = Text(finding.outcome, style="" if finding.passed else "bold red")
            table.add_row(finding.level, finding.check, outcome, finding.detail)
        return table
