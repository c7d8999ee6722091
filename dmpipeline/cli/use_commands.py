"""The commands that put datamodels to use: why a prediction, what if, on what does it rest."""

import shutil
from typing import TYPE_CHECKING, Any

import click

from dmdata.cli.console import Talk, talk_options
from dmdata.cli.tables import headed_table
from dmpipeline.cli.asking import (
    CHECK_BY_RETRAINING,
    CSV,
    DEVICE,
    RUN,
    SEED,
    Question,
    certified_by,
    options_asking,
    print_answer,
)
from dmpipeline.errors import SpecError, quoted

if TYPE_CHECKING:
    from rich.table import Table

    from dmpipeline.applications.counterfactuals import Counterfactual
    from dmpipeline.applications.evidence import Evidence
    from dmpipeline.applications.support import DataSupport

_LEVEL = click.option(
    "--level", type=float, default=0.95, show_default=True, help="Coverage of the intervals of what is measured."
)


@click.command("explain")
@RUN
@click.argument("target", type=int, required=False)
@click.option("--train-example", type=int, metavar="N", help="List the targets that lean on this training example.")
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, help="Of each kind, at most.")
@click.option(
    "--fits",
    type=click.IntRange(min=0),
    metavar="N",
    help="Fits to halves of the models that show how stable each weight is; 0 for none. [default: 20 of a run]",
)
@SEED
@CSV
@options_asking
@talk_options
def explain(
    talk: Talk,
    question: Question,
    target: int | None,
    train_example: int | None,
    top: int,
    fits: int | None,
    seed: int,
    as_csv: bool,
) -> None:
    """List the training examples that help and hurt a TARGET most, by the datamodels of RUN.

    RUN is a run's directory, or names datamodels that a catalog lists, as cifar/50pct: of these one column is read,
    once its price is agreed to.
    """
    from dmpipeline.applications.explanations import explain as explained

    if (target is None) == (train_example is None):
        raise click.UsageError("give either a TARGET or --train-example N.")
    columns = None if target is None else [target]
    # once to see which examples' masks go with the output, once for these
    with question.evidence(talk, columns, row=train_example, passes=2 if fits else 0) as evidence:
        if evidence is None:
            return
        if columns is not None:
            evidence = evidence.held(columns)  # a release's are paid once
        with talk.counting("reading", "models") as progress:
            table = explained(
                evidence, target, train_example=train_example, top=top, n_fits=fits, seed=seed, progress=progress
            )
        if as_csv or talk.as_json:
            print_answer(talk, table, as_csv=as_csv)
            return
        tables = [*_explained(table, evidence), *_pictures(table, evidence), _influences(table, evidence)]
        talk.print_data({}, *tables, *_pairs(table))
        _remark_on_influences(talk, table, question)


def _influences(table: Any, evidence: "Evidence") -> "Table":
    from dmpipeline.applications.describing import described
    from dmpipeline.tables import in_words, plain

    is_column = table.of == "target"
    shown = headed_table(
        "helps" if is_column else "helped", "weight", "label", "same sign", "rank", "example", right=slice(0, 2)
    )
    describe = described(evidence, "train" if is_column else evidence.targets)
    for nth, group in enumerate((table.helpers, table.harmers)):
        if nth and table.harmers:
            shown.add_row("hurts" if is_column else "hurt", style="bold")
        for row in group:
            ranks = "-" if row.rank_low is None else f"{row.rank_low} to {row.rank_high}"
            sign = "-" if row.same_sign is None else f"{row.same_sign:.0%}"
            shown.add_row(
                str(row.index), f"{row.weight:+.3f}", in_words(plain(row.label)), sign, ranks, describe(row.index)
            )
    return shown


def _explained(table: Any, evidence: "Evidence") -> "list[Table]":
    """State which target is explained, and what its datamodel says of the full training set."""
    import numpy as np

    from dmpipeline.applications.describing import described
    from dmpipeline.tables import in_words, plain

    if table.of != "target":
        return []
    whole = np.ones((1, evidence.n_train), np.bool_)
    full = float(evidence.datamodels([table.index]).predict(whole)[0, 0])
    output = (evidence.output() or "output").replace("_", " ").removesuffix("s")
    shown = headed_table("target", "label", f"{output}, estimated", "example", right=slice(2, 3))
    label = in_words(plain(table.label))
    shown.add_row(str(table.index), label, f"{full:.3f}", described(evidence, evidence.targets)(table.index))
    return [shown]


def _pairs(table: Any) -> "list[Table]":
    """Lay out what pairs of examples do together, where that is known."""
    if not table.pairs:
        return []
    shown = headed_table("these two together", "", "add", right=slice(0, 3))
    for pair in table.pairs:
        shown.add_row(str(pair.first), str(pair.second), f"{pair.weight:+.3f}")
    return [shown]


def _pictures(table: Any, evidence: "Evidence") -> "list[Table]":
    """Draw the target, its first helpers and its first harmers side by side, where examples are pictures."""
    from dmpipeline.applications.describing import shades

    if evidence.run is None or table.of != "target":
        return []
    dataset = evidence.dataset()
    own = dataset.train_inputs if evidence.targets == "train" else dataset.test_inputs
    target = shades(dataset, own[table.index])
    if not target:
        return []
    # as many as fit the terminal
    n_each = min(3, max(1, (shutil.get_terminal_size((130, 40)).columns // (len(target[0]) + 2) - 1) // 2))
    empty = [""] * (n_each - 1)
    shown = headed_table(f"target {table.index}", "helped most by", *empty, "hurt most by", *empty)
    columns = [target]
    for group in (table.helpers[:n_each], table.harmers[:n_each]):
        drawn = [shades(dataset, dataset.train_inputs[row.index]) for row in group]
        columns += drawn + [[""] * len(target)] * (n_each - len(drawn))
    shown.add_row(*("\n".join(column) for column in columns))
    return [shown]


def _remark_on_influences(talk: Talk, table: Any, question: Question) -> None:
    if table.of == "target":
        label = "" if table.label is None else f", which is labelled {table.label}"
        if not table.n_nonzero:
            talk.remark(
                f"target {table.index}{label}: no training example has a weight, so its datamodel says the same "
                "whichever are left out; more models may show some"
            )
            return
        talk.remark(f"target {table.index}{label}: {table.n_nonzero:,} training examples have a weight")
        if table.helpers:
            own = "" if question.targets == "test" else f" --targets {question.targets}"
            talk.remark(
                f"next: dmpipeline counterfactual {quoted(question.asked)} {table.index}{own} "
                f"--remove-top {len(table.helpers)}"
            )


@click.command("counterfactual")
@RUN
@click.argument("target", type=int)
@click.option("--remove-top", type=click.IntRange(min=1), metavar="K", help="Remove the K first by --order.")
@click.option(
    "--order",
    type=click.Choice(["helpful", "harmful", "mixed", "random"]),
    default="helpful",
    show_default=True,
    help="Of --remove-top: by the target's weights, the largest first, the lowest first, by magnitude; or at random.",
)
@click.option("--remove", metavar="LIST", help='Remove these, as "3,17,20:40", or those in a file.')
@click.option("--add", metavar="LIST", help="What adding these brings to a set that lacks them.")
@click.option(
    "--with",
    "others",
    multiple=True,
    metavar="RUN",
    help="Also ask the models of this run, of another alpha, how the output bends; may be given several times.",
)
@click.option(
    "--retrain",
    type=click.IntRange(min=0),
    default=0,
    metavar="R",
    help="Check by training R models on the changed set, and R on the unchanged one; they are kept in the run.",
)
@_LEVEL
@SEED
@DEVICE
@options_asking
@talk_options
def counterfactual(
    talk: Talk,
    question: Question,
    target: int,
    remove_top: int | None,
    order: Any,
    remove: str | None,
    add: str | None,
    others: tuple[str, ...],
    retrain: int,
    level: float,
    seed: int,
    device: str,
) -> None:
    """Foresee the output of a TARGET if training examples were removed or added, and check it by retraining.

    What is predicted is estimated by the datamodels of RUN; what is measured is certified by --retrain R, with an
    interval.
    """
    from dmpipeline.applications.counterfactuals import Case, counterfactuals, read_examples, removal_order

    if remove_top is not None and remove is not None:
        raise click.UsageError("give --remove-top or --remove, not both.")
    if remove_top is None and remove is None and add is None:
        raise click.UsageError("say what to change: --remove-top K, --remove LIST or --add LIST.")
    from dmpipeline.applications.evidence import run_at

    bending = "the models that tell how outputs bend are"
    runs = [run_at(other, bending) for other in others]
    if others:
        run_at(question.asked, bending)  # all masks of a release would be read, and paid
    if retrain:
        run_at(question.asked, "what models are retrained with is")
    with question.evidence(talk, [target]) as evidence:
        if evidence is None:
            return
        if remove_top is not None:
            ordered = removal_order(evidence.datamodels([target]).weight[:, 0], order, seed=seed)
            if len(ordered) < remove_top:
                raise SpecError(
                    f"target {target} has {len(ordered)} {order} training examples; choose a smaller --remove-top",
                    field="remove_top",
                    value=remove_top,
                )
            removed = ordered[:remove_top].tolist()
        else:
            removed = [] if remove is None else read_examples(remove, evidence.n_train)
        added = [] if add is None else read_examples(add, evidence.n_train)
        with talk.counting("retraining", "models") as progress:
            answers = counterfactuals(
                evidence,
                [Case(target, tuple(removed), tuple(added))],
                retrain,
                others=runs,
                level=level,
                device=device,
                progress=progress,
            )
        from dmpipeline.tables import plain

        answer = answers[0]
        facts = plain(answer) | {"basis": answer.basis, "alpha": answers.alpha, "level": level}
        facts |= {"bent_by": list(answers.bent_by), "advice": answers.advice}
        talk.print_data(facts, _answer(answer, level))
        if answers.advice is not None:
            talk.remark(answers.advice + ("" if evidence.run is None else ", or add such a run: --with RUN"))
        if removed:
            more = f" and {len(removed) - 20:,} more" if removed[20:] else ""
            talk.remark(f"removed: {', '.join(map(str, removed[:20]))}{more}")
        if answer.is_far_off:
            talk.remark(
                "the predicted change lies outside the interval of the measured one: datamodels of few models foresee "
                "less than happens; docs/how-to/explain.md says by how much, under 'How far to trust what is predicted'"
            )
        if not retrain and evidence.run is not None:
            talk.remark(CHECK_BY_RETRAINING)
        elif evidence.run is not None:
            own = "" if evidence.targets == "test" else f" --targets {evidence.targets}"
            talk.remark(f"next: dmpipeline support {quoted(question.asked)} {target}{own}")


def _answer(answer: "Counterfactual", level: float) -> "Table":
    shown = headed_table("", "before", "after", "change", f"{level:.0%} interval", "basis", right=slice(1, 4))
    ends = (f"{answer.predicted_before:.3f}", f"{answer.predicted_after:.3f}")
    shown.add_row("predicted", *ends, f"{answer.linear_change:+.3f}", "-", "estimated")
    if answer.predicted_change != answer.linear_change:
        shown.add_row("with its bend", "", "", f"{answer.predicted_change:+.3f}", "-", "estimated")
    if answer.measured_change is not None:
        shown.add_row(
            "measured",
            f"{answer.measured_before:.3f}",
            f"{answer.measured_after:.3f}",
            f"{answer.measured_change:+.3f}",
            f"{answer.measured_low:+.3f} to {answer.measured_high:+.3f}",
            certified_by(answer.n_retrainings)
            if answer.n_retrainings > 1
            else "one retraining of each set, which certifies nothing",
        )
    return shown


@click.command("support")
@RUN
@click.argument("wanted", metavar="[TARGET]...", type=int, nargs=-1)
@click.option(
    "--certify",
    type=click.IntRange(min=0),
    default=0,
    metavar="R",
    help="Train R models on each set, and R on the full one; they are kept in the run.",
)
@click.option("--mislabel", is_flag=True, help="Mislabel examples rather than remove them.")
@click.option(
    "--inflation",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Enlarge estimated sets by this share: the paper took 0.2.",
)
@click.option("--picture", metavar="FILE", help="Draw how many targets flip within k examples, as .svg or .png.")
@_LEVEL
@SEED
@DEVICE
@CSV
@options_asking
@talk_options
def support(
    talk: Talk,
    question: Question,
    wanted: tuple[int, ...],
    certify: int,
    mislabel: bool,
    inflation: float,
    picture: str | None,
    level: float,
    seed: int,
    device: str,
    as_csv: bool,
) -> None:
    """Find the fewest training examples of RUN without which each TARGET is predicted wrongly.

    Without a TARGET, of all. Sizes are estimated by the datamodels. With --certify R models are trained without each
    set: it is certified where the interval of their mean margin lies below zero.
    """
    from dmpipeline.applications.pictures import draw_support, picture_path
    from dmpipeline.applications.support import SUPPORT_STAGES, data_support

    if picture is not None:
        picture_path(picture)  # refused before anything is trained
    with question.evidence(talk, list(wanted) or None) as evidence:
        if evidence is None:
            return
        with talk.stages(SUPPORT_STAGES) as progress:
            table = data_support(
                evidence,
                list(wanted) or None,
                certify,
                mislabel=mislabel,
                inflation=inflation,
                level=level,
                device=device,
                seed=seed,
                progress=progress,
            )
        if picture is not None:
            draw_support(table, picture)
        if as_csv or talk.as_json:
            print_answer(talk, table, as_csv=as_csv)
            return
        talk.print_data({}, _support_table(table))
        talk.remark(_support_in_words(table))


def _support_table(table: "DataSupport") -> "Table":
    shown = headed_table("target", "margin", "size", "certified", "margin after", "examples", right=slice(0, 3))
    for row in table:
        size = "none found" if row.size is None else "wrong as it is" if row.size == 0 else str(row.size)
        certified = "-" if row.certified is None else "yes" if row.certified else "no"
        after = "-" if row.estimated_margin is None else f"{row.estimated_margin:.2f} estimated"
        if row.measured_margin is not None:
            after = f"{row.measured_margin:.2f} ({row.measured_low:.2f} to {row.measured_high:.2f})"
        first = ", ".join(map(str, row.examples[:6])) + (", ..." if len(row.examples) > 6 else "")
        wrong = "" if row.wrong_label is None or not row.examples else f" called {row.wrong_label}"
        shown.add_row(str(row.target), f"{row.margin:.2f}", size, certified, after, first + wrong)
    return shown


def _support_in_words(table: "DataSupport") -> str:
    found = sum(row.size is not None for row in table)
    words = f"{found:,} of {len(table):,} targets flip when examples are {table.change}, by the estimate"
    if table.half_within is not None:
        words += f"; half of them within {table.half_within}"
    if table.relabel_factor is not None:
        words += f"; mislabelling counts {table.relabel_factor:.1f} times removal ({table.factor_basis})"
    shares = table.shares()
    if shares["certified"] is None:
        return f"{words}; nothing is certified: add --certify 20"
    return (
        f"{words}; of sets retrained {shares['certified']:.0%} are certified, {shares['flipped']:.0%} flip on average"
    )
