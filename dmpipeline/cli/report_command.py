"""The command that writes the page: of a run, or of datamodels that a catalog lists."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dmdata.cli.console import Talk, talk_options
from dmpipeline.cli.asking import RUN, Question, options_asking
from dmpipeline.cli.run_commands import for_each_run
from dmpipeline.cli.train_commands import facts_table, warn_of

if TYPE_CHECKING:
    from dmpipeline.runs.targets import TargetsName


@click.command("report")
@RUN
@click.option(
    "-o",
    "--output",
    "place",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="An .html file, or a new folder for a page with more pictures than fit one. [default: report.html in the run]",
)
@click.option(
    "--parts",
    metavar="NAMES",
    help="Of stability, support, map, clusters, leakage, duplicates and suspects, with commas; all by default, but for "
    "what would take more than minutes.",
)
@click.option("--only", metavar="LIST", help='Of a release, these targets alone, as "0:1000"; no others are read.')
@click.option(
    "--dataset",
    metavar="NAME",
    help="Where a run's dataset is now; of a release, its examples, as cifar10:PATH, of which the page shows pictures.",
)
@options_asking
@talk_options
def report(
    talk: Talk,
    question: Question,
    place: Path | None,
    parts: str | None,
    only: str | None,
    dataset: str | None,
) -> None:
    """Write the page of RUN: scores, and which examples made which prediction, to be explored.

    It is one file that needs no network, and shows what verify and evaluate --scores found when they last ran. RUN is a
    run's directory, or names datamodels that a catalog lists, as cifar/50pct: their weights are read, once the price is
    agreed to, and -o says where the page goes.
    """
    from dmpipeline.applications.evidence import is_run
    from dmpipeline.cli.status import runs_in
    from dmpipeline.report.findings import checked_parts
    from dmpipeline.report.page import checked_place

    if place is not None:
        checked_place(place)
    chosen = None if parts is None else checked_parts([name.strip() for name in parts.split(",") if name.strip()])
    directory = Path(question.asked).expanduser()
    if any(directory.glob("*/run.yaml")) or is_run(question.asked):
        if only is not None:
            raise click.UsageError("--only is for a release; the page of a run has all its targets.")
        if place is not None and len(runs_in(directory)) > 1:
            raise click.UsageError(f"-o is for one run, and {directory} holds several; name one of them.")
        options = {"place": place, "parts": chosen, "targets": question.targets}
        for_each_run(_of_run)(talk=talk, directory=directory, dataset=dataset, **options)
        return
    _of_release(talk, question, place, chosen, only, dataset)


def _of_run(talk: Talk, directory: Path, place: Path | None, parts: Any, targets: "TargetsName") -> None:
    from dmpipeline import workflow
    from dmpipeline.report.of_run import REPORT_STAGES, report_run
    from dmpipeline.runs.derivation import n_models_of, old_result, without_warnings
    from dmpipeline.runs.learned import what_was_learned
    from dmpipeline.runs.store import Run

    opened = Run.open(directory)
    with without_warnings(), talk.stages(REPORT_STAGES) as progress:
        evaluation = workflow.evaluate_run(opened, targets)
        path = report_run(opened, evaluation, targets, path=place, parts=parts, progress=progress)
    old = (old_result(opened, what, targets) for what in ("datamodels", "curve"))
    told = what_was_learned(opened).texts + [str(result) for result in old if result is not None]
    _say(talk, path, place, targets=targets, n_models=n_models_of(opened, targets), warnings=told)
    warn_of(told)


def _of_release(
    talk: Talk, question: Question, place: Path | None, parts: Any, only: str | None, dataset: str | None
) -> None:
    from dmpipeline.applications.counterfactuals import read_numbers
    from dmpipeline.data.datasets import load_dataset
    from dmpipeline.report.of_datamodels import report_datamodels

    if place is None:
        raise click.UsageError(f"name the page of {question.asked}, as in -o page.html.")
    # whatever can refuse is asked before weights are paid
    examples = None if dataset is None else load_dataset(dataset)
    columns = None if only is None else read_numbers(only)
    with question.evidence(talk, columns) as evidence:
        if evidence is None:
            return
        path = report_datamodels(evidence, place, columns=columns, dataset=examples, parts=parts)
        _say(
            talk,
            path,
            place,
            targets=evidence.targets,
            n_targets=evidence.n_targets if columns is None else len(columns),
        )


def _say(talk: Talk, path: Path, place: Path | None, **facts: Any) -> None:
    from dmdata.money.prices import readable_bytes
    from dmpipeline.report.page import is_one_file

    files = [path] if place is None or is_one_file(place) else list(path.parent.iterdir())
    n_bytes = sum(file.stat().st_size for file in files)
    shown = facts_table({"report": f"{path}, {readable_bytes(n_bytes)}"})
    talk.print_data({"report": str(path), "bytes": n_bytes} | facts, shown)
