"""The ``dmpipeline`` command: describe a run, train it, check it, fit datamodels on it, score, report and export.

Each command imports what it needs when it runs: torch, numba and matplotlib take seconds to load, which help should not
wait for, and without the `pipeline` extra they are not installed.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from dmdata.cli.completion import completion_command
from dmdata.cli.console import Talk, options_of_group, talk_options
from dmdata.cli.ending import run
from dmdata.cli.tables import headed_table
from dmpipeline.cli.finding_commands import clusters, embed, leakage, similar
from dmpipeline.cli.plan_command import plan
from dmpipeline.cli.report_command import report
from dmpipeline.cli.run_commands import for_each_run, next_to_evaluate, next_to_list, next_to_report
from dmpipeline.cli.train_commands import DIRECTORY, TARGETS, facts_table, init, status, submit, train, warn_of
from dmpipeline.cli.use_commands import counterfactual, explain, support
from dmpipeline.cli.verify_command import verify
from dmpipeline.errors import explain_missing_extra

if TYPE_CHECKING:
    from rich.table import Table

    from dmpipeline import workflow
    from dmpipeline.moments.arrays import RowSliceable
    from dmpipeline.runs.learned import Learned
    from dmpipeline.runs.store import Run
    from dmpipeline.runs.targets import TargetsName
    from dmpipeline.scoring.curves import LearningCurve
    from dmpipeline.scoring.evaluation import Evaluation


class _Counts(click.ParamType[list[int]]):
    """Whole numbers with commas between them."""

    name = "counts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        try:
            return [int(count) for count in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers; write it like 500,1000,2000.", param, ctx)


class _NamedFile(click.ParamType[tuple[str, Path]]):
    """A name and a file, with = between them."""

    name = "name=file.npy"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        if isinstance(value, tuple):
            return value
        name, equals, path = str(value).partition("=")
        if not (name.strip() and equals and path):
            self.fail(f"{value!r} does not name its scores; write it like trak=trak.npy.", param, ctx)
        return name.strip(), Path(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the entry point of ``dmpipeline``."""
    run(commands, arguments, name="dmpipeline", runs_user_code=True)


_FIT_WORDS = {
    "nonzero_weights": "nonzero weights a target, mean",
    "worst_gap": "worst duality gap, share of the variance",
    "worst_kkt": "worst broken condition, share of lam",
}


_IN_ORDER = (
    "demo", "init", "plan", "run", "submit", "status", "verify", "fit", "evaluate", "report", "explain",
    "counterfactual", "support", "leakage", "similar", "embed", "clusters", "curve", "export",
)  # fmt: skip


class _Commands(click.Group):
    """A group whose commands state what to install where a package of the extra is missing."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List commands in the order of their use, and others after them."""
        known = super().list_commands(ctx)
        return [name for name in _IN_ORDER if name in known] + [name for name in known if name not in _IN_ORDER]

    def invoke(self, ctx: click.Context) -> Any:
        with explain_missing_extra():
            return super().invoke(ctx)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="dmdata")
@options_of_group
def commands() -> None:
    """Train models on random subsets, fit datamodels to them, and ask which examples led to a prediction."""


commands.add_command(completion_command("dmpipeline"))
commands.add_command(plan)
for _command in (
    init,
    train,
    status,
    submit,
    verify,
    report,
    explain,
    counterfactual,
    support,
    similar,
    leakage,
    embed,
    clusters,
):
    commands.add_command(_command)


@commands.command("demo")
@click.argument("directory", type=click.Path(path_type=Path), default=Path("demo"))
@click.option("--models", type=int, default=4000, show_default=True, help="Models to fit on.")
@click.option("--held-out", type=int, default=100, show_default=True, help="Held-out subsets.")
@click.option("--retrainings", type=int, default=10, show_default=True, help="Trainings of each held-out subset.")
@talk_options
def demo(talk: Talk, directory: Path, models: int, held_out: int, retrainings: int) -> None:
    """Run every step on digits in under three minutes; DIRECTORY is then a run like any other."""
    from dmpipeline.cli.demo import run_demo
    from dmpipeline.spec import RunSpec

    spec = RunSpec(n_models=models, held_out={"n_subsets": held_out, "n_retrainings": retrainings})
    summary = run_demo(talk, directory, spec)
    talk.print_data(summary.as_dict(), summary.table())
    warn_of(summary.warnings)


@commands.command("fit")
@DIRECTORY
@click.option("--validation", type=float, default=0.1, show_default=True, help="Share of models to choose lambda on.")
@click.option(
    "--folds",
    type=int,
    help="Choose lambda by cross-validation with this many folds instead; as many times slower. With a prior and fewer "
    "than 10,000 models there are three.",
)
@click.option(
    "--prior",
    type=click.Choice(["none", "gradient"]),
    default="none",
    show_default=True,
    help="Guide the fit by gradients of the run's first models; on digits worth up to three times as many models.",
)
@click.option(
    "--pairs", is_flag=True, help="Add what two examples do together, where the validation models gain by it."
)
@click.option("--positive", is_flag=True, help="Allow no weight below zero.")
@click.option("--strict", is_flag=True, help="Fail where a target did not converge.")
@click.option("--device", metavar="NAME", help="Torch device to solve on, such as cuda. [default: the CPU]")
@click.option("--work", type=click.Path(path_type=Path), help="Keep what is finished here, not in DIRECTORY/fitting.")
@click.option("--scheduler", metavar="ADDRESS", help="Let a Dask cluster do it, as tcp://host:8786.")
@TARGETS
@talk_options
@for_each_run
def fit(
    talk: Talk,
    directory: Path,
    validation: float,
    folds: int | None,
    prior: "workflow.PriorName",
    pairs: bool,
    positive: bool,
    strict: bool,
    device: str | None,
    work: Path | None,
    scheduler: str | None,
    targets: "TargetsName",
) -> None:
    """Fit a datamodel to every target's margin, on the models of the run at DIRECTORY.

    Targets are test examples, or with --targets train the training examples themselves. The weight of one of these on
    itself says how much it is memorised rather than predicted from others, which is how wrong labels stand out.

    Stop it at any time and run it again to resume. The second moments of the models are kept: a fit with other options
    does not compute them again, nor does a fit of a longer run of the same seed with --work DIRECTORY/fitting.
    """
    from dmpipeline import workflow
    from dmpipeline.runs.learned import what_was_learned
    from dmpipeline.runs.store import Run
    from dmpipeline.runs.targets import datamodels_path

    opened = Run.open(directory)
    with talk.stages(workflow.FIT_STAGES) as progress:
        workflow.fit_run(
            opened,
            targets=targets,
            validation=validation,
            folds=folds,
            prior=prior,
            pairs=pairs,
            is_positive=positive,
            strict=strict,
            device=device,
            directory=work,
            scheduler=scheduler,
            progress=progress,
        )
    facts: dict[str, Any] = {"datamodels": str(datamodels_path(opened, targets)), "targets": targets}
    facts |= workflow.fit_facts(opened, targets)
    learned = what_was_learned(opened)
    shown = {_FIT_WORDS.get(name, name): fact for name, fact in facts.items()}
    talk.print_data(facts | {"warnings": learned.texts}, facts_table(shown))
    warn_of(learned.texts)
    talk.remark(next_to_evaluate(directory, opened, targets))


@commands.command("evaluate")
@DIRECTORY
@click.option(
    "--compare", "is_compared", is_flag=True, help="Also score ridge, debiased weights and differences of means."
)
@click.option(
    "--scores",
    "named",
    type=_NamedFile(),
    multiple=True,
    metavar="NAME=FILE.npy",
    help="Also score another attribution: a matrix (training examples, targets), positive where an example raises the "
    "target's output. Repeatable.",
)
@TARGETS
@talk_options
@for_each_run
def evaluate(
    talk: Talk, directory: Path, is_compared: bool, named: tuple[tuple[str, Path], ...], targets: "TargetsName"
) -> None:
    """Score the datamodels of the run at DIRECTORY on its held-out models."""
    from dmpipeline import workflow
    from dmpipeline.runs.derivation import n_models_of, without_warnings
    from dmpipeline.runs.learned import what_was_learned
    from dmpipeline.runs.store import Run

    opened = Run.open(directory)
    attributions = _checked_attributions(opened, named, targets)
    with without_warnings():
        evaluation = workflow.evaluate_run(opened, targets)
    n_models, learned = n_models_of(opened, targets), what_was_learned(opened)
    told = learned.texts + _old(opened, targets)
    facts: dict[str, Any] = evaluation.as_dict() | learned.as_dict()
    n_without = _n_without_weights(opened, targets)
    facts |= {"targets": targets, "n_models": n_models, "n_without_weights": n_without, "warnings": told}
    tables = [] if is_compared else [_evaluation_table(evaluation, n_models, learned, n_without)]
    if is_compared:
        with talk.stages(workflow.COMPARE_STAGES) as progress:
            compared = workflow.compare_run(opened, targets=targets, progress=progress)
        facts["comparison"] = compared.as_rows()
        tables.append(compared.table())
    if attributions:
        facts["datamodels"], facts["scores"], table = _attribution_scores(opened, attributions, targets, evaluation)
        tables.append(table)
    talk.print_data(facts, *tables)
    warn_of(told)
    if evaluation.decomposition is not None:
        advice = evaluation.decomposition.advice
        talk.remark(f"advice: {advice}{_how_to_follow(advice, directory, targets)}")
    talk.remark(next_to_report(directory, targets))


def _how_to_follow(advice: str, directory: Path, targets: "TargetsName") -> str:
    """Name the command for a sentence of advice that begins so, if there is one."""
    from dmpipeline.runs.targets import command
    from dmpipeline.scoring.decomposition import TRAIN_MORE, USE_PAIRS

    if advice.startswith(TRAIN_MORE):
        return f"; {command(directory, 'curve', targets)} tells how many"
    if advice.startswith(USE_PAIRS):
        return f"; {command(directory, 'fit', targets)} --pairs"
    return ""


def _checked_attributions(
    opened: "Run", named: Sequence[tuple[str, Path]], targets: "TargetsName"
) -> "dict[str, RowSliceable]":
    """Open what `--scores` names, and refuse what is not of the run, before anything is worked out."""
    if not named:
        return {}
    from dmpipeline.applications.attributions import checked_scores, find_scored

    by_name = dict(named)
    if len(by_name) < len(named):
        twice = next(name for name, _ in named if sum(name == other for other, _ in named) > 1)
        raise click.UsageError(f"--scores {twice} is given twice; name each by its own method.")
    return checked_scores(find_scored(opened, targets), by_name)


def _attribution_scores(
    opened: "Run", attributions: "dict[str, RowSliceable]", targets: "TargetsName", evaluation: "Evaluation"
) -> "tuple[dict[str, Any], dict[str, Any], Table]":
    """Score attributions, and return the measures of the run's own, those of the others by name, and a table of all."""
    from dmpipeline.applications.attributions import OWN, score
    from dmpipeline.report.of_run import keep_answer
    from dmpipeline.runs.derivation import without_warnings

    with without_warnings():
        scored = score(opened, attributions, targets=targets, own=evaluation)
    keep_answer(opened, "scores", scored.as_dict(), targets)
    others = scored.by_name()
    return others.pop(OWN), others, scored.table()


def _old(opened: "Run", targets: "TargetsName", *results: str) -> list[str]:
    """Describe which results are out of date, of datamodels and these."""
    from dmpipeline.runs.derivation import old_result

    old = (old_result(opened, what, targets) for what in ("datamodels", *results))
    return [str(result) for result in old if result is not None]


@commands.command("curve")
@DIRECTORY
@click.option("--counts", type=_Counts(), help="Numbers of models, as 500,1000,2000. [default: about 7, up to all]")
@click.option(
    "--prior",
    type=click.Choice(["none", "gradient"]),
    default="none",
    show_default=True,
    help="Draw a second curve, with gradient scores of the run's first models as the prior.",
)
@TARGETS
@talk_options
@for_each_run
def curve(talk: Talk, directory: Path, counts: list[int] | None, prior: str, targets: "TargetsName") -> None:
    """Draw LDS against the number of models of the run at DIRECTORY that are fitted on.

    Leaves curve.json and curve.svg in the run, which dmpipeline report DIRECTORY shows.
    """
    from dmpipeline import workflow
    from dmpipeline.runs.store import Run

    opened = Run.open(directory)
    with talk.stages(workflow.CURVE_STAGES) as progress:
        guide: Literal["gradient"] | None = "gradient" if prior == "gradient" else None
        curves = workflow.curve_run(opened, counts, guide, targets=targets, progress=progress)
    tables = [drawn.table() for drawn in curves.values()]
    data: dict[str, Any] = {name: drawn.as_dict() for name, drawn in curves.items()}
    picture = str(workflow.curve_picture(opened, targets))
    facts: dict[str, Any] = {"picture": picture, "curves": data, "targets": targets, "warnings": []}
    if workflow.GRADIENT in curves:
        for name, table in zip(curves, tables, strict=True):
            table.columns[0].header = f"models, {name}"
        plain, helped = curves[workflow.PLAIN], curves[workflow.GRADIENT]
        needed = helped.models_for(plain.points[-1].lds)
        facts["models_for_plain_lds"] = None if math.isnan(needed) else round(needed)
    talk.print_data(facts, *tables)
    for name, drawn in curves.items():
        told = [] if drawn.law is None else [drawn.law.in_words()]
        told += [] if drawn.advice is None else [f"advice: {drawn.advice}"]
        for text in told:
            talk.remark(f"{name}, {text}" if len(curves) > 1 else text)
    if workflow.GRADIENT in curves:
        talk.remark(saving_in_words(plain, helped, needed))
    talk.remark(f"drawn in {picture}; {next_to_report(directory, targets)}")


def saving_in_words(plain: "LearningCurve", helped: "LearningCurve", needed: float) -> str:
    """Describe with how many models a prior reaches the LDS that all models reach without."""
    last = plain.points[-1]
    goal = f"the LDS that {last.n_models:,} reach without ({last.lds:.3f})"
    if not math.isnan(needed):
        return f"with gradient scores {round(needed):,} models reach {goal}: {last.n_models - round(needed):,} fewer"
    if helped.points[0].lds > last.lds:
        return f"with gradient scores fewer than {helped.counts[0]:,} models reach {goal}"
    return f"with gradient scores no number of these models reaches {goal}"


@commands.command("export")
@DIRECTORY
@click.argument("destination")
@click.option("--requester-pays", is_flag=True, help="State in the catalog that readers pay.")
@click.option("--acl", metavar="NAME", help="ACL of the objects in a bucket, for example authenticated-read.")
@talk_options
@for_each_run
def export(talk: Talk, directory: Path, destination: str, requester_pays: bool, acl: str | None) -> None:
    """Write the run at DIRECTORY in the release's own layout to DESTINATION, a folder or s3://bucket/prefix.

    .npy arrays, the .pt of its datamodels of test and of training examples if there are any, and a catalog.yaml that
    dmdata opens. Other datasets and alphas that are in DESTINATION stay. What is sent to a bucket before you stop it is
    not sent again.
    """
    from dmdata.money.prices import readable_bytes
    from dmpipeline.exporting.export import export_run, publish_run
    from dmpipeline.runs.store import Run
    from dmpipeline.runs.targets import TARGETS, datamodels_path

    opened = Run.open(directory)
    fitted = {targets: path for targets in TARGETS if (path := datamodels_path(opened, targets)).exists()}
    told = [text for targets in fitted for text in _old(opened, targets)]
    warn_of(told)
    with talk.counting("exporting", "models") as progress:
        what: dict[str, Any] = {"datamodels": fitted.get("test"), "train_datamodels": fitted.get("train")}
        what |= {"progress": progress, "requester_pays": requester_pays}
        if destination.startswith("s3://"):
            files = publish_run(opened, destination, acl=acl, **what)
        else:
            files = export_run(opened, destination, **what)
    in_bucket = destination.startswith("s3://")
    table = headed_table("artifact", "key", "size", "SHA-256", *(["sent"] if in_bucket else []))
    data = []
    for file in files:
        row, facts = [], {"name": file.name, "key": file.key, "bytes": file.n_bytes, "sha256": file.sha256}
        if file.sent_bytes is not None:
            row = [readable_bytes(file.sent_bytes)]
            facts |= {"sent_bytes": file.sent_bytes, "present_bytes": file.n_bytes - file.sent_bytes}
        table.add_row(file.name, file.key, readable_bytes(file.n_bytes), file.sha256[:16], *row)
        data.append(facts | {"replaced": file.replaced})
    talk.print_data({"destination": destination, "files": data, "warnings": told}, table)
    if n_replaced := sum(file.replaced for file in files):
        talk.remark(f"{n_replaced} of {len(files)} files replaced those that {destination} listed under their names")
    talk.remark(next_to_list(destination))


def _n_without_weights(opened: "Run", targets: "TargetsName") -> int:
    """Count the targets whose datamodels have no weight but 0."""
    from dmpipeline.fitting.fitted import load_datamodels

    return int((~load_datamodels(opened, targets).weight.any(axis=0)).sum())


def _evaluation_table(evaluation: "Evaluation", n_models: int | None, learned: "Learned", n_without: int) -> "Table":
    from dmpipeline.scoring.evaluation import readable_score

    table = headed_table("score", "", "against")
    averaged = f"averages of {evaluation.n_retrainings} retrainings of {evaluation.n_subsets} held-out subsets"
    low, high = readable_score(evaluation.lds_low), readable_score(evaluation.lds_high)
    interval = f"{evaluation.level:.0%} interval {low} to {high}"
    table.add_row("LDS", readable_score(evaluation.lds), f"{averaged}; {interval}")
    if evaluation.lds_linear is not None:
        table.add_row("without pairs", readable_score(evaluation.lds_linear), "")
    table.add_row("its noise ceiling", readable_score(evaluation.lds_ceiling), "")
    table.add_row("share of the ceiling", readable_score(evaluation.lds_ratio), "")
    table.add_row("single LDS", readable_score(evaluation.lds_single), "single retrainings")
    table.add_row("R2", readable_score(evaluation.r2), "single retrainings")
    table.add_row("MSE", readable_score(evaluation.mse), "single retrainings, in squared units of the output")
    if evaluation.decomposition is not None:
        for part, lds in evaluation.decomposition.in_words():
            table.add_row(*part, lds)
    table.add_row("models", "unknown" if n_models is None else f"{n_models:,}", "that the datamodels were fitted on")
    left_out = f"{evaluation.n_constant} left out because they never vary"
    without = f"; {n_without:,} without weights, whose LDS counts as 0" if n_without else ""
    table.add_row("targets", f"{evaluation.n_targets:,}", f"{left_out}{without}")
    if sentence := learned.sentence():
        table.add_row("models", learned.figure(), sentence)
    return table
