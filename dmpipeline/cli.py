"""The ``dmpipeline`` command: describe a run, train it, check it, fit datamodels on it, score, report and export.

Each command imports the rooms it needs when it runs: torch, numba and matplotlib take seconds to load, which nobody
should wait for who asks for help, and without the `pipeline` extra they are not there.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.table import Table
from rich.text import Text

from dmdata.completion import completion_command
from dmdata.console import Talk, run, talk_options
from dmdata.prices import readable_bytes
from dmpipeline.errors import SpecChangedError, VerificationError, explain_missing_extra, quoted
from dmpipeline.plan_command import plan
from dmpipeline.run_commands import for_each_run, next_to_evaluate, next_to_list, next_to_report
from dmpipeline.spec import RunSpec
from dmpipeline.train_commands import DIRECTORY, TARGETS, facts_table, init, status, submit, train, warn_of

if TYPE_CHECKING:
    from dmpipeline import workflow
    from dmpipeline.curves import LearningCurve
    from dmpipeline.evaluate import Evaluation
    from dmpipeline.learned import Learned
    from dmpipeline.store import Run
    from dmpipeline.targets import TargetsName
    from dmpipeline.verify import Finding


class _Counts(click.ParamType[list[int]]):
    """Whole numbers with commas between them."""

    name = "counts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        try:
            return [int(count) for count in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers; give such as 500,1000,2000.", param, ctx)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the entry point of ``dmpipeline``."""
    run(commands, arguments, name="dmpipeline", runs_user_code=True)


class _Commands(click.Group):
    """A group whose commands say what to install where a package of the extra is missing."""

    def invoke(self, ctx: click.Context) -> Any:
        with explain_missing_extra():
            return super().invoke(ctx)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="dmdata")
def commands() -> None:
    """Train models on random subsets, fit datamodels to them, and ask which examples made a prediction."""


commands.add_command(completion_command("dmpipeline"))
commands.add_command(plan)
for _command in (init, train, status, submit):
    commands.add_command(_command)


@commands.command("demo")
@click.argument("directory", type=click.Path(path_type=Path), default=Path("demo"))
@click.option("--models", type=int, default=4000, show_default=True, help="Models to fit on.")
@click.option("--held-out", type=int, default=100, show_default=True, help="Held-out subsets.")
@click.option("--retrainings", type=int, default=10, show_default=True, help="Trainings of each held-out subset.")
@talk_options
def demo(talk: Talk, directory: Path, models: int, held_out: int, retrainings: int) -> None:
    """Show the whole circle on digits in under three minutes; leaves DIRECTORY, a run like any other."""
    from dmpipeline.demo import run_demo

    spec = RunSpec(n_models=models, held_out={"n_subsets": held_out, "n_retrainings": retrainings})
    summary = run_demo(talk, directory, spec)
    talk.print_data(summary.as_dict(), summary.table())
    warn_of(summary.warnings)


@commands.command("verify")
@DIRECTORY
@talk_options
@for_each_run
def verify(talk: Talk, directory: Path) -> None:
    """Check the run at DIRECTORY against its spec, seeds and digests; exit code 3 if anything differs."""
    from dmpipeline.learned import what_was_learned
    from dmpipeline.store import Run
    from dmpipeline.verify import Finding, verify_run

    try:
        opened = Run.open(directory)
    except SpecChangedError as error:
        _print_findings(talk, [Finding("spec", passed=False, detail=str(error))], [])
        raise VerificationError(str(error), findings=[str(error)]) from error
    with talk.counting("verifying", "models") as progress:
        findings = verify_run(opened, progress)
    passed, learned = all(finding.passed for finding in findings), what_was_learned(opened).texts
    _print_findings(talk, findings, learned)
    wrong = [finding.detail for finding in findings if not finding.passed and finding.check != "learned"]
    if not passed and not wrong:
        raise VerificationError(
            f"{directory} holds what was specified, but {learned[0]}", findings=[findings[-1].detail]
        )
    if wrong:
        raise VerificationError(
            f"{directory} is not what was specified: {wrong[0]}; if rows are missing run `dmpipeline run "
            f"{quoted(directory)}`, else train it anew in another directory",
            findings=wrong,
        )


@commands.command("fit")
@DIRECTORY
@click.option("--validation", type=float, default=0.1, show_default=True, help="Share of models to choose lambda on.")
@click.option("--folds", type=int, help="Choose lambda by so many-fold cross-validation instead; slower by as much.")
@click.option(
    "--prior",
    type=click.Choice(["none", "gradient"]),
    default="none",
    show_default=True,
    help="Guide the fit by gradients of the run's first models; on digits worth half again as many models, or more.",
)
@click.option("--positive", is_flag=True, help="Allow no weight below zero.")
@click.option("--strict", is_flag=True, help="Fail where a target did not converge.")
@click.option("--device", metavar="NAME", help="Solve with torch there, as cuda. [default: on the processors]")
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
    positive: bool,
    strict: bool,
    device: str | None,
    work: Path | None,
    scheduler: str | None,
    targets: "TargetsName",
) -> None:
    """Fit a datamodel to every target's margin, on the models of the run at DIRECTORY.

    Targets are test examples, or with --targets train the training examples themselves. The weight of one of these on
    itself says how much it is remembered rather than foreseen, and a wrong label stands out by it.

    Stop it at any time and run it again to go on. The second moments of the models are kept: a fit with other options
    does not count them again, nor one of a longer run of the same seed that is given this one's by --work.
    """
    from dmpipeline import workflow
    from dmpipeline.learned import what_was_learned
    from dmpipeline.store import Run
    from dmpipeline.targets import datamodels_path

    opened = Run.open(directory)
    with talk.stages(workflow.FIT_STAGES) as progress:
        workflow.fit_run(
            opened,
            targets=targets,
            validation=validation,
            folds=folds,
            prior=prior,
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
    talk.print_data(facts | {"warnings": learned.texts}, facts_table(facts))
    warn_of(learned.texts)
    talk.remark(next_to_evaluate(directory, opened, targets))


@commands.command("evaluate")
@DIRECTORY
@click.option("--compare", "is_compared", is_flag=True, help="Beside ridge, debiased weights and differences of means.")
@TARGETS
@talk_options
@for_each_run
def evaluate(talk: Talk, directory: Path, is_compared: bool, targets: "TargetsName") -> None:
    """Score the datamodels of the run at DIRECTORY on its held-out models."""
    from dmpipeline import workflow
    from dmpipeline.derivation import n_models_of, without_warnings
    from dmpipeline.learned import what_was_learned
    from dmpipeline.store import Run

    opened = Run.open(directory)
    with without_warnings():
        evaluation = workflow.evaluate_run(opened, targets)
    n_models, learned = n_models_of(opened, targets), what_was_learned(opened)
    told = learned.texts + _old(opened, targets)
    facts: dict[str, Any] = evaluation.as_dict() | learned.as_dict()
    facts |= {"targets": targets, "n_models": n_models, "warnings": told}
    if is_compared:
        _print_comparison(talk, opened, targets, facts)
    else:
        talk.print_data(facts, _evaluation_table(evaluation, n_models, learned))
    warn_of(told)
    talk.remark(next_to_report(directory, targets))


def _print_comparison(talk: Talk, opened: "Run", targets: "TargetsName", facts: dict[str, Any]) -> None:
    from dmpipeline import workflow

    with talk.stages(workflow.COMPARE_STAGES) as progress:
        compared = workflow.compare_run(opened, targets=targets, progress=progress)
    talk.print_data(facts | {"comparison": compared.as_rows()}, compared.table())


def _old(opened: "Run", targets: "TargetsName", *results: str) -> list[str]:
    """Say which results are old, of datamodels and these."""
    from dmpipeline.derivation import old_result

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

    Leaves curve.json and curve.svg in the run; dmpipeline report shows them.
    """
    from dmpipeline import workflow
    from dmpipeline.store import Run

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
    if workflow.GRADIENT in curves:
        talk.remark(_saving(plain, helped, needed))
    talk.remark(f"drawn in {picture}; {next_to_report(directory, targets)}")


def _saving(plain: "LearningCurve", helped: "LearningCurve", needed: float) -> str:
    """Say with how many models a prior reaches the LDS that all models reach without."""
    last = plain.points[-1]
    goal = f"the LDS that {last.n_models:,} reach without ({last.lds:.3f})"
    if not math.isnan(needed):
        return f"with gradient scores {round(needed):,} models reach {goal}: {last.n_models - round(needed):,} fewer"
    if helped.points[0].lds > last.lds:
        return f"with gradient scores fewer than {helped.counts[0]:,} models reach {goal}"
    return f"with gradient scores no number of these models reaches {goal}"


@commands.command("report")
@DIRECTORY
@TARGETS
@talk_options
@for_each_run
def report(talk: Talk, directory: Path, targets: "TargetsName") -> None:
    """Write the page of the run at DIRECTORY, report.html: scores, and which examples made which prediction."""
    from dmpipeline import workflow
    from dmpipeline.derivation import n_models_of, without_warnings
    from dmpipeline.learned import what_was_learned
    from dmpipeline.store import Run

    opened = Run.open(directory)
    with without_warnings():
        path = workflow.report_run(opened, workflow.evaluate_run(opened, targets), targets)
    told = what_was_learned(opened).texts + _old(opened, targets, "curve")
    facts: dict[str, Any] = {"report": str(path), "targets": targets, "n_models": n_models_of(opened, targets)}
    talk.print_data(facts | {"warnings": told}, facts_table({"report": str(path)}))
    warn_of(told)


@commands.command("export")
@DIRECTORY
@click.argument("destination")
@click.option("--requester-pays", is_flag=True, help="Say in the catalog that readers pay.")
@click.option("--acl", metavar="NAME", help="Of the objects in a bucket, as authenticated-read.")
@talk_options
@for_each_run
def export(talk: Talk, directory: Path, destination: str, requester_pays: bool, acl: str | None) -> None:
    """Write the run at DIRECTORY in the release's own layout to DESTINATION, a folder or s3://bucket/prefix.

    .npy arrays, the .pt of its datamodels of test and of training examples if there are any, and a catalog.yaml that
    dmdata opens. Other datasets and alphas that are in DESTINATION stay. What is sent to a bucket before you stop it is
    not sent again.
    """
    from dmpipeline.export import export_run, publish_run
    from dmpipeline.store import Run
    from dmpipeline.targets import TARGETS, datamodels_path

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
    table = Table("artifact", "key", "size", "SHA-256", *(["sent"] if in_bucket else []), box=None, header_style="bold")
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


def _print_findings(talk: Talk, findings: Sequence["Finding"], told: list[str]) -> None:
    data = [{"check": f.check, "passed": f.passed, "detail": f.detail} for f in findings]
    passed = all(finding.passed for finding in findings)
    talk.print_data({"passed": passed, "findings": data, "warnings": told}, _findings_table(findings))


def _findings_table(findings: Sequence["Finding"]) -> Table:
    table = Table("check", "", "what was found", box=None, header_style="bold")
    for finding in findings:
        table.add_row(finding.check, _verdict(finding), finding.detail)
    return table


def _verdict(finding: "Finding") -> Text:
    wrong = "warning" if finding.check == "learned" else "differs"
    return Text("ok") if finding.passed else Text(wrong, style="bold red")


def _evaluation_table(evaluation: "Evaluation", n_models: int | None, learned: "Learned") -> Table:
    from dmpipeline.evaluate import readable_score

    table = Table("score", "", "against", box=None, header_style="bold")
    averaged = f"averages of {evaluation.n_retrainings} retrainings of {evaluation.n_subsets} held-out subsets"
    low, high = readable_score(evaluation.lds_low), readable_score(evaluation.lds_high)
    interval = f"{evaluation.level:.0%} interval {low} to {high}"
    table.add_row("LDS", readable_score(evaluation.lds), f"{averaged}; {interval}")
    table.add_row("its noise ceiling", readable_score(evaluation.lds_ceiling), "")
    table.add_row("LDS", readable_score(evaluation.lds_ratio), "as a share of its noise ceiling")
    table.add_row("LDS", readable_score(evaluation.lds_single), "single retrainings")
    table.add_row("R2", readable_score(evaluation.r2), "single retrainings")
    table.add_row("MSE", readable_score(evaluation.mse), "single retrainings, in squared units of the output")
    table.add_row("models", "unknown" if n_models is None else f"{n_models:,}", "that the datamodels were fitted on")
    table.add_row("targets", f"{evaluation.n_targets:,}", f"{evaluation.n_constant} left out because they never vary")
    if sentence := learned.sentence():
        table.add_row("models", learned.figure(), sentence)
    return table
