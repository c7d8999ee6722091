"""What commands share that ask something of a run, or of datamodels that a catalog lists: options, prices, consent."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from dmdata.cli.console import Talk
from dmdata.cli.copy_commands import options_spending

if TYPE_CHECKING:
    from dmpipeline.applications.evidence import Evidence
    from dmpipeline.tables import Table

RUN = click.argument("asked", metavar="RUN")
"""A run's directory, or a name or address of datamodels."""

_TARGETS = click.option(
    "--targets",
    type=click.Choice(["test", "train"]),
    default="test",
    show_default=True,
    help="Whose outputs the datamodels predict.",
)
_SPACE = click.option(
    "--space",
    type=click.Choice(["raw", "standardised"]),
    help="What a release's weights are multiplied by: a mask's 0 or 1, or standardised masks. [default: what its file "
    "says, else raw]",
)
DEVICE = click.option("--device", default="cpu", show_default=True, help="Torch device to retrain on.")
SEED = click.option("--seed", type=int, default=0, show_default=True, help="Of whatever is random.")
CSV = click.option("--csv", "as_csv", is_flag=True, help="Print the rows as CSV on standard output.")
CHECK_BY_RETRAINING = "estimated; check it by retraining: add --retrain 20 to the command"
"""The remark on what is predicted alone, where it could be measured."""


def certified_by(n_retrainings: int) -> str:
    """Say what a measured change rests on."""
    return f"certified by {n_retrainings} retrainings of each set"


@dataclass(frozen=True, slots=True)
class Question:
    """What a command asks of, and on which terms."""

    asked: str
    targets: Any
    space: Any
    to: str | None
    catalog: str | None
    spending: dict[str, Any]

    @contextlib.contextmanager
    def evidence(
        self, talk: Talk, columns: Sequence[int] | None, *, row: int | None = None, passes: int = 0
    ) -> Iterator["Evidence | None"]:
        """Open what answers: a run at once, a release's weights once their price is agreed to; None in a dry run.

        Parameters
        ----------
        talk : Talk
        columns : sequence of int, optional
            Targets whose weights will be read; all if not given.
        row : int, optional
            A training example whose weights will be read instead.
        passes : int
            How often the masks of all models will be read as well, and their outputs once.
        """
        from dmpipeline.applications.evidence import find_evidence, is_run, weights_name

        if is_run(self.asked):
            yield find_evidence(self.asked, self.targets)
            return
        import numpy as np

        from dmdata.cli.copy_commands import Priced, headers_paid_for, paid_for
        from dmdata.release import opening
        from dmpipeline.fitting.datamodels import price_load

        terms, chosen = opening.in_force(self.to, self.catalog)
        name = weights_name(self.asked, self.targets)
        with contextlib.ExitStack() as stack:
            if not stack.enter_context(headers_paid_for(talk, [f"{name}/weight"], terms, **self.spending)):
                yield None
                return
            picked = None if columns is None else np.asarray(columns, np.intp)
            parts = price_load(name, catalog=chosen, targets=picked, example=row, to=self.to)
            priced = Priced.all_of(parts, terms)
            base = name.rpartition("/")[0]
            # whose they are is read off the name, as find_evidence does
            own_targets = "train" if name.rpartition("/")[2].startswith("train") else "test"
            for array in ("train_masks", f"{own_targets}_margins") if passes else ():
                found = opening.look_up(f"{base}/{array}", terms, catalog=chosen)
                priced += (passes if array == "train_masks" else 1) * Priced.all_of(
                    opening.price_reading(found, terms), terms
                )
            if not stack.enter_context(paid_for(talk, priced, f"reading {name}", terms, **self.spending)):
                yield None
                return
            yield find_evidence(self.asked, self.targets, catalog=chosen, space=self.space, to=self.to)


def options_asking(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command that takes `RUN` its options, handed on as one `Question` named ``question``."""

    def begin(asked: str, targets: str, space: str | None, to: str | None, catalog: str | None, **options: Any) -> Any:
        spending = {name: options.pop(name) for name in ("dry_run", "max_cost", "yes")}
        return command(question=Question(asked, targets, space, to, catalog, spending), **options)

    begin.__doc__, begin.__name__ = command.__doc__, command.__name__
    begin.__dict__.update(command.__dict__)
    return _TARGETS(_SPACE(options_spending(begin)))


def print_answer(talk: Talk, table: "Table[Any]", *, as_csv: bool = False, **facts: Any) -> None:
    """Print a table of answers: for people, as JSON, or as CSV."""
    if as_csv:
        import csv
        import io

        from dmpipeline.tables import plain

        rows = [plain(row) for row in table.rows]
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else ["nothing"], lineterminator="\n")
        if rows:
            writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: " ".join(map(str, cell)) if isinstance(cell, list) else cell for name, cell in row.items()}
            )
        talk.print_text(text.getvalue())
        return
    talk.print_data(table.as_dict() | facts, table.table())
