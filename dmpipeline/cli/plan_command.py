"""``dmpipeline plan``: what training models again and fitting datamodels to them costs, next to downloading both."""

import contextlib
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dmdata.cli.completion import complete_artifacts
from dmdata.cli.console import AMOUNT, Talk, talk_options
from dmdata.cli.tables import headed_table
from dmpipeline.cli.regeneration import (
    GPU_PRICE_DATE,
    GPU_USD_PER_HOUR,
    Basis,
    Regeneration,
    RegenerationPlan,
    release_models,
    release_seconds_per_model,
)
from dmpipeline.errors import SpecError

if TYPE_CHECKING:
    from rich.table import Table

    from dmdata.money.prices import Estimate
    from dmpipeline.fitting.forecast import Forecast
    from dmpipeline.runs.store import Run


@click.command("plan")
@click.argument("target", shell_complete=complete_artifacts)
@click.option("--seconds-per-model", type=AMOUNT, help="Use this instead of what is measured or published.")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="Devices that train at once.")
@click.option(
    "--gpu-usd-per-hour",
    type=AMOUNT,
    help=f"Of one device. [default: {GPU_USD_PER_HOUR} for the release, 0 for a run on this machine]",
)
@click.option("--fit", is_flag=True, help="Plan fitting the datamodels too, from a small fit on this machine.")
@click.option(
    "--nonzero",
    type=click.FloatRange(min=0, min_open=True),
    help="Nonzero weights per target. [default: those of a fitted run, else 2% of the examples, a guess]",
)
@click.option("--cores", type=click.IntRange(min=1), help="Processors to fit with. [default: those of this machine]")
@click.option(
    "--core-usd-per-hour",
    type=AMOUNT,
    help="Of one processor. [default: 0.0504 for the release, 0 for a run on this machine]",
)
@talk_options
def plan(
    talk: Talk,
    target: str,
    seconds_per_model: float | None,
    gpus: int,
    gpu_usd_per_hour: float | None,
    fit: bool,
    nonzero: float | None,
    cores: int | None,
    core_usd_per_hour: float | None,
) -> None:
    """Price training the models of TARGET again, in device-hours and dollars, next to downloading them.

    TARGET is the directory of a run or a run.yaml, whose time is measured by training a few of its models on
    this machine, or names in a catalogued release, such as cifar/50pct. With --fit, the cost of fitting datamodels too.
    """
    from dmdata.money.prices import prices_in_words, readable_usd

    is_run = Path(target).is_dir() or Path(target).suffix in (".yaml", ".yml")
    if is_run:
        compared, fits = _plan_of_run(Path(target), seconds_per_model, gpus, gpu_usd_per_hour or 0.0)
    else:
        usd_per_hour = GPU_USD_PER_HOUR if gpu_usd_per_hour is None else gpu_usd_per_hour
        compared, fits = _plan_of_release(target, seconds_per_model, gpus, usd_per_hour)
    usd_per_hour = next(iter(compared.jobs.values())).usd_per_hour
    data = _plan_facts(compared) | {"gpus": gpus, "gpu_usd_per_hour": usd_per_hour}
    tables = [_plan_table(compared)]
    if fit:
        core_usd = 0.0 if is_run and core_usd_per_hour is None else core_usd_per_hour
        gpu_usd = GPU_USD_PER_HOUR if gpu_usd_per_hour is None else gpu_usd_per_hour
        forecasts = _forecasts(fits, nonzero, cores, core_usd, gpu_usd)
        data |= {"fit": {name: forecast.as_dict() for name, forecast in forecasts.items()}, "fitting_left_out": False}
        tables.append(_fit_table(forecasts))
    talk.print_data(data, *tables)
    assumed = gpu_usd_per_hour is None and usd_per_hour
    known = {_BASIS_IN_WORDS[job.basis] for job in compared.jobs.values()}
    even = compared.break_even_usd_per_hour
    talk.remark(
        f"{gpus} device{'s' if gpus > 1 else ''} at {readable_usd(usd_per_hour)} an hour"
        + (f" (an A100 of {GPU_PRICE_DATE}, an assumption)" if assumed else "")
        + f"; seconds a model {', '.join(sorted(known))}; the download at {prices_in_words()} "
        f"to {compared.download.destination}, an upper bound"
        + (f"; training costs less below {readable_usd(even)} a device-hour" if even else "")
        + ("; fitting the datamodels again comes on top, see --fit" if compared.has_datamodels and not fit else "")
    )
    if fit:
        for forecast in list(forecasts.values())[:1]:
            talk.remark(
                f"fit with {forecast.n_cores} core{'s' if forecast.n_cores > 1 else ''} at "
                f"{readable_usd(forecast.usd_per_core_hour)} an hour each, rates measured here just now; a GPU at "
                f"{readable_usd(forecast.usd_per_gpu_hour)} an hour, its rate of an A100, assumed and "
                "never measured; with --work memory may be less, down to the part that is not mapped from disk"
            )


@dataclass(frozen=True, slots=True)
class _Shape:
    """What is to be fitted."""

    n_models: int
    n_train: int
    n_targets: int
    n_nonzero: float | None = None  # of a fit, where there is one


_BASIS_IN_WORDS = {
    "given": "as given",
    "measured": "measured here just now",
    "published": "second-hand, on an A100, in proportion to the subset",
}


def _plan_facts(plan: RegenerationPlan) -> dict[str, Any]:
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


def _plan_table(plan: RegenerationPlan) -> "Table":
    from dmdata.money.prices import readable_bytes, readable_seconds, readable_usd

    columns = ("way", "models", "s a model", "device-hours", "time", "dollars", "size")
    table = headed_table(*columns, right=slice(1, None))
    for name, job in plan.jobs.items():
        work = (f"{job.n_models:,}", f"{job.seconds_per_model:,.3g}", _hours(job.device_hours))
        table.add_row(f"train {name}", *work, readable_seconds(job.seconds), readable_usd(job.usd))
    price = plan.download
    trained = (f"{plan.n_models:,}", "", _hours(plan.device_hours), readable_seconds(plan.seconds))
    fetched = ("", "", "", readable_seconds(price.seconds))
    table.add_row("train, in total", *trained, readable_usd(plan.usd), readable_bytes(price.n_bytes), style="bold")
    table.add_row("download", *fetched, readable_usd(price.usd), readable_bytes(price.n_bytes), style="bold")
    return table


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.2g}"


def _plan_of_run(
    path: Path, seconds_per_model: float | None, gpus: int, usd_per_hour: float
) -> tuple[RegenerationPlan, dict[str, _Shape]]:
    from dmpipeline.fitting.fitted import fit_facts
    from dmpipeline.runs.store import Run
    from dmpipeline.spec import RunSpec

    with contextlib.ExitStack() as until_planned:
        if path.is_dir():
            opened = Run.open(path)
        else:
            # what a run of this spec holds is what the run itself says, so one is made and thrown away
            place = until_planned.enter_context(tempfile.TemporaryDirectory())
            opened = Run.create(Path(place) / "run", RunSpec.read(path))
        seconds = _probed_seconds_per_model(opened) if seconds_per_model is None else seconds_per_model
        basis: Basis = "measured" if seconds_per_model is None else "given"
        job = Regeneration(opened.spec.n_rows, seconds, gpus, usd_per_hour, basis)
        sizes = opened.provenance["dataset"]
        shape = _Shape(opened.spec.n_models, sizes["n_train"], sizes["n_test"], fit_facts(opened).get(_NONZERO))
        return RegenerationPlan({str(path): job}, _price_of_arrays(opened)), {str(path): shape}


def _price_of_arrays(run: "Run") -> "Estimate":
    """Price a download of all that a run will hold, trained or not, were it on a requester-pays bucket.

    To where bytes are set to go, and with what is set of the month, as `dmdata.estimate` has it.
    """
    from dmdata.copying.download import n_requests_of
    from dmdata.money.prices import Estimate, destination_of, price_table, quote, usage_of

    sizes = [int(run.array(name).nbytes) for name in run.spec.arrays]
    n_requests = sum(n_requests_of(size) + 1 for size in sizes)
    to = destination_of(None)
    way = quote(sum(sizes), n_requests, to, usage=usage_of())
    return Estimate(way, way, to, price_table().date)


def _probed_seconds_per_model(run: "Run") -> float:
    """Measure how long a model of a run takes on this machine, by training a few of its own; nothing is kept.

    As many as its first block trains side by side: fewer would leave cores idle and seem slower than they are.
    """
    from dmpipeline.runs.preparation import Prepared

    trainer = Prepared.of(run).trainer()
    with trainer.workers() as (_, n_workers):
        rows = run.spec.blocks[0][: trainer.way.n_models * n_workers]
    # the first steps of a process pay for what later ones find ready
    for some in (rows[:1], rows):
        began = time.perf_counter()
        run.train_rows(trainer, some)
    return (time.perf_counter() - began) / len(rows)


def _plan_of_release(
    pattern: str, seconds_per_model: float | None, gpus: int, usd_per_hour: float
) -> tuple[RegenerationPlan, dict[str, _Shape]]:
    from dmdata.release.opening import estimate, load_catalog

    patterns = [pattern, f"{pattern.rstrip('/')}/**"] if pattern.count("/") < 2 else [pattern]
    catalog = load_catalog()
    wanted = [name for name in patterns if catalog.has(name)] or patterns[:1]
    jobs, artifacts = {}, catalog.match(wanted)
    for (dataset, alpha_name), (n_models, alpha) in release_models(artifacts).items():
        published = seconds_per_model is None
        seconds = release_seconds_per_model(dataset, alpha) if seconds_per_model is None else seconds_per_model
        basis: Basis = "published" if published else "given"
        jobs[f"{dataset}/{alpha_name}"] = Regeneration(n_models, seconds, gpus, usd_per_hour, basis)
    fits = {
        artifact.name: _Shape(artifact.rows.fit[1] - artifact.rows.fit[0], *artifact.stored.members["weight"].shape)
        for artifact in artifacts
        if "weight" in artifact.stored.members and artifact.rows is not None
    }
    return RegenerationPlan(jobs, estimate(wanted), has_datamodels=bool(fits)), fits


def _forecasts(
    fits: Mapping[str, _Shape],
    nonzero: float | None,
    cores: int | None,
    core_usd_per_hour: float | None,
    gpu_usd_per_hour: float,
) -> "dict[str, Forecast]":
    from dmpipeline.compute import available_threads
    from dmpipeline.fitting.forecast import CORE_USD_PER_HOUR, GUESSED_NONZERO_SHARE, Forecast, Rates

    if not fits:
        raise SpecError("--fit needs names of datamodels, such as cifar/50pct/test_datamodels, or a run")
    rates = Rates.measured()
    return {
        name: Forecast(
            shape.n_models,
            shape.n_train,
            shape.n_targets,
            nonzero or shape.n_nonzero or GUESSED_NONZERO_SHARE * shape.n_train,
            n_cores=cores or available_threads(),
            usd_per_core_hour=CORE_USD_PER_HOUR if core_usd_per_hour is None else core_usd_per_hour,
            usd_per_gpu_hour=gpu_usd_per_hour,
            rates=rates,
        )
        for name, shape in fits.items()
    }


def _fit_table(forecasts: "Mapping[str, Forecast]") -> "Table":
    from dmdata.money.prices import readable_bytes, readable_seconds, readable_usd

    columns = (
        "models x examples x targets",
        "nonzero",
        "moments",
        "fit",
        "dollars",
        "memory",
        "memory with --work",
        "disk",
    )
    table = headed_table("fit", *columns, right=slice(1, None))
    for name, f in forecasts.items():
        table.add_row(
            name,
            f"{f.n_models:,} x {f.n_train:,} x {f.n_targets:,}",
            f"{f.n_nonzero:,.0f}",
            readable_seconds(f.moments_seconds),
            readable_seconds(f.paths_seconds),
            readable_usd(f.usd),
            readable_bytes(f.memory_bytes),
            f"{readable_bytes(f.least_memory_bytes)} to {readable_bytes(f.fast_memory_bytes)}",
            readable_bytes(f.disk_bytes),
        )
        on_gpu = (readable_seconds(f.gpu_seconds), readable_usd(f.usd_with_gpu))
        table.add_row(
            "  paths on a GPU", "", "", "", *on_gpu, f"{readable_bytes(f.gpu_memory_bytes)} of its own", "", ""
        )
    return table


_NONZERO = "nonzero_weights"
