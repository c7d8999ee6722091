"""The ``dmpipeline`` command: describe a run, train it, check it, fit datamodels on it, score, report and export.

Each command imports the rooms it needs when it runs: torch, numba and matplotlib take seconds to load, which nobody
should wait for who asks for help, and without the `pipeline` extra they are not there.
"""

import contextlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from dmdata.completion import complete_artifacts, completion_command
from dmdata.console import AMOUNT, Talk, run, talk_options
from dmdata.prices import prices_in_words, readable_bytes, readable_seconds, readable_usd
from dmdata.release import estimate, load_catalog
from dmpipeline.errors import VerificationError, explain_missing_extra
from dmpipeline.regeneration import (
    GPU_PRICE_DATE,
    GPU_USD_PER_HOUR,
    Basis,
    Comparison,
    Regeneration,
    release_models,
    release_seconds_per_model,
)
from dmpipeline.spec import RunSpec

if TYPE_CHECKING:
    from dmpipeline.curves import LearningCurve
    from dmpipeline.evaluate import Evaluation
    from dmpipeline.store import Run
    from dmpipeline.verify import Finding

DIRECTORY = click.argument("directory", type=click.Path(path_type=Path))


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
    run(commands, arguments, name="dmpipeline")


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


@commands.command("init")
@DIRECTORY
@click.option("--spec", type=click.Path(path_type=Path), help="Take everything from this run.yaml.")
@click.option("--dataset", default="digits", show_default=True, help="digits, or the path of an .npz file.")
@click.option("--alpha", type=float, default=0.5, show_default=True, help="Share of the examples in a subset.")
@click.option("--models", type=int, default=4000, show_default=True, help="Models to fit on.")
@click.option("--held-out", type=int, default=100, show_default=True, help="Held-out subsets.")
@click.option("--retrainings", type=int, default=10, show_default=True, help="Trainings of each held-out subset.")
@click.option("--seed", type=int, default=0, show_default=True)
@talk_options
def init(
    talk: Talk,
    directory: Path,
    spec: Path | None,
    dataset: str,
    alpha: float,
    models: int,
    held_out: int,
    retrainings: int,
    seed: int,
) -> None:
    """Create a run in DIRECTORY; nothing is trained yet."""
    from dmpipeline.store import Run

    wanted = (
        RunSpec.read(spec)
        if spec
        else RunSpec(
            dataset=dataset,
            alpha=alpha,
            n_models=models,
            held_out={"n_subsets": held_out, "n_retrainings": retrainings},
            seed=seed,
        )
    )
    created = Run.create(directory, wanted)
    talk.print_data({"directory": str(created.path), "n_rows": wanted.n_rows}, _facts({"run": str(created.path)}))
    talk.remark(f"{wanted.n_rows:,} models to train; next: dmpipeline run {directory}")


@commands.command("plan")
@click.argument("target", shell_complete=complete_artifacts)
@click.option("--seconds-per-model", type=AMOUNT, help="Instead of what is measured or published.")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="Devices at work side by side.")
@click.option(
    "--gpu-usd-per-hour",
    type=AMOUNT,
    help=f"Of one device. [default: {GPU_USD_PER_HOUR} for the release, 0 for a run on this machine]",
)
@talk_options
def plan(talk: Talk, target: str, seconds_per_model: float | None, gpus: int, gpu_usd_per_hour: float | None) -> None:
    """Price making the models of TARGET again, in device-hours and dollars, beside downloading them.

    TARGET is the directory of a run or a run.yaml, whose time is measured by training a few of its models here and
    now, or names of a catalogued release, as cifar/50pct.
    """
    if Path(target).is_dir() or Path(target).suffix in (".yaml", ".yml"):
        compared = _plan_of_run(Path(target), seconds_per_model, gpus, gpu_usd_per_hour or 0.0)
    else:
        usd_per_hour = GPU_USD_PER_HOUR if gpu_usd_per_hour is None else gpu_usd_per_hour
        compared = _plan_of_release(target, seconds_per_model, gpus, usd_per_hour)
    usd_per_hour = next(iter(compared.jobs.values())).usd_per_hour
    talk.print_data(_plan_facts(compared) | {"gpus": gpus, "gpu_usd_per_hour": usd_per_hour}, _plan_table(compared))
    assumed = gpu_usd_per_hour is None and usd_per_hour
    known = {_BASIS_IN_WORDS[job.basis] for job in compared.jobs.values()}
    even = compared.break_even_usd_per_hour
    talk.remark(
        f"{gpus} device{'s' if gpus > 1 else ''} at {readable_usd(usd_per_hour)} an hour"
        + (f" (an A100 of {GPU_PRICE_DATE}, an assumption)" if assumed else "")
        + f"; seconds a model {', '.join(sorted(known))}; the download at {prices_in_words()} "
        f"to {compared.download.destination}, an upper bound"
        + (f"; training costs less below {readable_usd(even)} a device-hour" if even else "")
        + ("; fitting the datamodels anew comes on top" if compared.has_datamodels else "")
    )


_BASIS_IN_WORDS = {
    "given": "as given",
    "measured": "measured here just now",
    "published": "second-hand, on an A100, in proportion to the subset",
}


def _plan_facts(plan: Comparison) -> dict[str, Any]:
    parts = {}
    for name, job in plan.jobs.items():
        parts[name] = {"models": job.n_models, "seconds_per_model": job.seconds_per_model, "basis": job.basis}
        parts[name] |= {"device_hours": job.device_hours, "seconds": job.seconds, "usd": job.usd}
    price = plan.download
    fetched = {"bytes": price.n_bytes, "requests": price.n_requests, "usd": price.usd, "usd_low": price.usd_low}
    return {
        "device_hours": plan.device_hours,
        "seconds": plan.seconds,
        "usd": plan.usd,
        "train": parts,
        "download": fetched | {"seconds": price.seconds},
        "break_even_gpu_usd_per_hour": plan.break_even_usd_per_hour,
        "fitting_left_out": plan.has_datamodels,
    }


def _plan_table(plan: Comparison) -> Table:
    table = Table(
        "way", "models", "s a model", "device-hours", "time", "dollars", "size", box=None, header_style="bold"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, job in plan.jobs.items():
        work = (f"{job.n_models:,}", f"{job.seconds_per_model:,.3g}", _hours(job.device_hours))
        table.add_row(f"train {name}", *work, readable_seconds(job.seconds), readable_usd(job.usd))
    price = plan.download
    trained = (f"{plan.n_models:,}", "", _hours(plan.device_hours), readable_seconds(plan.seconds))
    fetched = ("", "", "", readable_seconds(price.seconds))
    table.add_row("train, in all", *trained, readable_usd(plan.usd), readable_bytes(price.n_bytes), style="bold")
    table.add_row("download", *fetched, readable_usd(price.usd), readable_bytes(price.n_bytes), style="bold")
    return table


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.2g}"


@commands.command("run")
@DIRECTORY
@talk_options
def train(talk: Talk, directory: Path) -> None:
    """Train what is missing in the run at DIRECTORY. Stop it at any time and run it again to go on."""
    from dmpipeline.store import Run

    opened = Run.open(directory)
    with talk.counting("training", "models") as progress:
        opened.train(progress)
    _print_status(talk, opened)
    talk.remark(f"next: dmpipeline verify {directory}, dmpipeline fit {directory}")


@commands.command("status")
@DIRECTORY
@talk_options
def status(talk: Talk, directory: Path) -> None:
    """Show what the run at DIRECTORY is, how far it is, and how fast it went."""
    from dmpipeline.store import Run

    _print_status(talk, Run.open(directory))


@commands.command("verify")
@DIRECTORY
@talk_options
def verify(talk: Talk, directory: Path) -> None:
    """Check the run at DIRECTORY against its spec, seeds and digests; exit code 3 if anything differs."""
    from dmpipeline.store import Run
    from dmpipeline.verify import verify_run

    opened = Run.open(directory)
    with talk.counting("verifying", "models") as progress:
        findings = verify_run(opened, progress)
    passed = all(finding.passed for finding in findings)
    data = [{"check": f.check, "passed": f.passed, "detail": f.detail} for f in findings]
    talk.print_data({"passed": passed, "findings": data}, _findings_table(findings))
    if not passed:
        wrong = [finding.detail for finding in findings if not finding.passed]
        raise VerificationError(
            f"{directory} is not what was specified: {wrong[0]}; if rows are missing run `dmpipeline run {directory}`, "
            "else train it anew in another directory",
            findings=wrong,
        )


@commands.command("fit")
@DIRECTORY
@click.option("--validation", type=float, default=0.1, show_default=True, help="Share of models to choose lambda on.")
@talk_options
def fit(talk: Talk, directory: Path, validation: float) -> None:
    """Fit a datamodel to every test example's margin, on the models of the run at DIRECTORY."""
    from dmpipeline import workflow
    from dmpipeline.store import Run

    opened = Run.open(directory)
    with talk.stages(workflow.FIT_STAGES) as progress:
        workflow.fit_run(opened, validation=validation, progress=progress)
    facts = {"datamodels": str(opened.datamodels_path)} | workflow.fit_facts(opened)
    talk.print_data(facts, _facts(facts))
    talk.remark(f"next: dmpipeline evaluate {directory}")


@commands.command("evaluate")
@DIRECTORY
@click.option("--compare", "is_compared", is_flag=True, help="Beside ridge, debiased weights and differences of means.")
@talk_options
def evaluate(talk: Talk, directory: Path, is_compared: bool) -> None:
    """Score the datamodels of the run at DIRECTORY on its held-out models."""
    from dmpipeline import workflow
    from dmpipeline.store import Run

    opened = Run.open(directory)
    evaluation = workflow.evaluate_run(opened)
    if is_compared:
        _print_comparison(talk, opened, evaluation)
    else:
        talk.print_data(evaluation.as_dict(), _evaluation_table(evaluation))
    talk.remark(f"next: dmpipeline report {directory}")


def _print_comparison(talk: Talk, opened: "Run", evaluation: "Evaluation") -> None:
    from dmpipeline import workflow

    with talk.stages(workflow.COMPARE_STAGES) as progress:
        compared = workflow.compare_run(opened, progress=progress)
    talk.print_data(evaluation.as_dict() | {"comparison": compared.as_rows()}, compared.table())


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
@talk_options
def curve(talk: Talk, directory: Path, counts: list[int] | None, prior: str) -> None:
    """Draw LDS against the number of models of the run at DIRECTORY that are fitted on.

    Leaves curve.json and curve.svg in the run; dmpipeline report shows them.
    """
    from dmpipeline import workflow
    from dmpipeline.store import Run

    opened = Run.open(directory)
    with talk.stages(workflow.CURVE_STAGES) as progress:
        curves = workflow.curve_run(opened, counts, "gradient" if prior == "gradient" else None, progress=progress)
    tables = [drawn.table() for drawn in curves.values()]
    data: dict[str, Any] = {name: drawn.as_dict() for name, drawn in curves.items()}
    facts: dict[str, Any] = {"picture": str(workflow.curve_picture(opened)), "curves": data}
    if workflow.GRADIENT in curves:
        for name, table in zip(curves, tables, strict=True):
            table.columns[0].header = f"models, {name}"
        plain, helped = curves[workflow.PLAIN], curves[workflow.GRADIENT]
        needed = helped.models_for(plain.points[-1].lds)
        facts["models_for_plain_lds"] = None if math.isnan(needed) else round(needed)
    talk.print_data(facts, *tables)
    if workflow.GRADIENT in curves:
        talk.remark(_saving(plain, helped, needed))
    talk.remark(f"drawn in {facts['picture']}; next: dmpipeline report {directory}")


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
@talk_options
def report(talk: Talk, directory: Path) -> None:
    """Write the page of the run at DIRECTORY, report.html: scores, and which examples made which prediction."""
    from dmpipeline import workflow
    from dmpipeline.store import Run

    opened = Run.open(directory)
    path = workflow.report_run(opened, workflow.evaluate_run(opened))
    talk.print_data({"report": str(path)}, _facts({"report": str(path)}))


@commands.command("export")
@DIRECTORY
@click.argument("destination")
@click.option("--requester-pays", is_flag=True, help="Say in the catalog that readers pay.")
@click.option("--acl", metavar="NAME", help="Of the objects in a bucket, as authenticated-read.")
@talk_options
def export(talk: Talk, directory: Path, destination: str, requester_pays: bool, acl: str | None) -> None:
    """Write the run at DIRECTORY in the release's own layout to DESTINATION, a folder or s3://bucket/prefix.

    .npy arrays, the .pt of its datamodels if there are any, and a catalog.yaml that dmdata opens.
    """
    from dmpipeline.export import export_run, publish_run
    from dmpipeline.store import Run

    opened = Run.open(directory)
    with talk.counting("exporting", "models") as progress:
        fitted = opened.datamodels_path if opened.datamodels_path.exists() else None
        if destination.startswith("s3://"):
            files = publish_run(opened, destination, fitted, progress, requester_pays=requester_pays, acl=acl)
        else:
            files = export_run(opened, destination, fitted, progress, requester_pays=requester_pays)
    table = Table("artifact", "key", "size", "SHA-256", box=None, header_style="bold")
    for file in files:
        table.add_row(file.name, file.key, readable_bytes(file.n_bytes), file.sha256[:16])
    data = [{"name": f.name, "key": f.key, "bytes": f.n_bytes, "sha256": f.sha256} for f in files]
    talk.print_data({"destination": destination, "files": data}, table)
    talk.remark(f"next: dmdata ls --catalog {destination}")


def _plan_of_run(path: Path, seconds_per_model: float | None, gpus: int, usd_per_hour: float) -> Comparison:
    from dmpipeline import workflow
    from dmpipeline.store import Run

    with contextlib.ExitStack() as until_planned:
        if path.is_dir():
            opened = Run.open(path)
        else:
            # what a run of this spec holds is what the run itself says, so one is made and thrown away
            place = until_planned.enter_context(tempfile.TemporaryDirectory())
            opened = Run.create(Path(place) / "run", RunSpec.read(path))
        measured = seconds_per_model is None
        seconds = workflow.probe_seconds_per_model(opened) if seconds_per_model is None else seconds_per_model
        job = Regeneration(opened.spec.n_rows, seconds, gpus, usd_per_hour, "measured" if measured else "given")
        return Comparison({str(path): job}, workflow.price_of_arrays(opened))


def _plan_of_release(pattern: str, seconds_per_model: float | None, gpus: int, usd_per_hour: float) -> Comparison:
    patterns = [pattern, f"{pattern.rstrip('/')}/**"] if pattern.count("/") < 2 else [pattern]
    catalog = load_catalog()
    wanted = [name for name in patterns if catalog.has(name)] or patterns[:1]
    jobs, artifacts = {}, catalog.match(wanted)
    for (dataset, alpha_name), (n_models, alpha) in release_models(artifacts).items():
        published = seconds_per_model is None
        seconds = release_seconds_per_model(dataset, alpha) if seconds_per_model is None else seconds_per_model
        basis: Basis = "published" if published else "given"
        jobs[f"{dataset}/{alpha_name}"] = Regeneration(n_models, seconds, gpus, usd_per_hour, basis)
    fitted = any(artifact.stored.format == "pt" for artifact in artifacts)
    return Comparison(jobs, estimate(wanted), has_datamodels=fitted)


def _print_status(talk: Talk, opened: "Run") -> None:
    spec, done = opened.spec, opened.n_rows_done
    sessions = opened.provenance["sessions"]
    seconds, trained = (sum(session[name] for session in sessions) for name in ("seconds", "n_rows"))
    rate = trained / seconds if seconds else None
    left = spec.n_rows - done
    facts = {
        "run": str(opened.path),
        "dataset": spec.dataset,
        "alpha": spec.alpha,
        "recipe": f"{spec.recipe.name}@{spec.recipe.version}",
        "n_rows": spec.n_rows,
        "n_rows_done": done,
        "models_per_second": rate,
        "seconds_left": left / rate if rate else None,
        "datamodels": opened.datamodels_path.exists(),
    }
    shown = {
        "run": facts["run"],
        "what": f"{facts['recipe']} on {spec.dataset} at alpha {spec.alpha:.0%}",
        "models": f"{done:,} of {spec.n_rows:,} trained ({spec.n_models:,} to fit on)",
        "rate": f"{rate:,.1f} models a second" if rate else "nothing trained yet",
        "left": f"{left / rate:,.0f} s" if rate and left else ("nothing" if not left else "unknown"),
        "datamodels": str(opened.datamodels_path) if facts["datamodels"] else "not fitted yet",
    }
    talk.print_data(facts, _facts(shown))


def _facts(facts: Mapping[str, object]) -> Table:
    table = Table(box=None, show_header=False)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), f"{value:,.4g}" if isinstance(value, float) else str(value))
    return table


def _findings_table(findings: Sequence["Finding"]) -> Table:
    table = Table("check", "", "what was found", box=None, header_style="bold")
    for finding in findings:
        table.add_row(finding.check, _verdict(finding), finding.detail)
    return table


def _verdict(finding: "Finding") -> Text:
    return Text("ok") if finding.passed else Text("differs", style="bold red")


def _evaluation_table(evaluation: "Evaluation") -> Table:
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
    table.add_row("MSE", readable_score(evaluation.mse), "single retrainings, squared logits")
    table.add_row("targets", f"{evaluation.n_targets:,}", f"{evaluation.n_constant} left out because they never vary")
    return table
