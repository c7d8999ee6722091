"""The ``dmdata`` command: list, describe, price, download and mirror what a catalog holds, and show what was spent."""

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.progress import DownloadColumn, ProgressColumn, Task
from rich.table import Table
from rich.text import Text

from dmdata import ledger, money_commands, release, upkeep_commands
from dmdata.catalog import Artifact, Catalog
from dmdata.completion import complete_artifacts, completion_command
from dmdata.console import Talk, ask_consent, run, talk_options
from dmdata.mirror import DEFAULT_MEMORY_BYTES
from dmdata.prices import (
    GIB,
    Destination,
    Estimate,
    Quote,
    assumed_link,
    price_table,
    prices_in_words,
    readable_bytes,
    readable_usd,
    usage_of,
)
from dmdata.settings import settings


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the entry point of ``dmdata``."""
    run(commands, arguments, name="dmdata")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="dmdata")
def commands() -> None:
    """Read a requester-pays release of datamodels: lazily, exactly, and with the price known first."""


def _option_catalog(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--catalog",
        metavar="FILE",
        help="catalog.yaml, a folder with one, or its URL. [default: $DMDATA_CATALOG, else the published release's]",
    )(command)


def _option_to(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--to",
        type=click.Choice([str(destination) for destination in Destination]),
        default=lambda: settings().to,
        show_default="internet, or as set",
        help="Where the bytes go: decides the price of a byte.",
    )(command)


def _options_spending(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("-y", "--yes", is_flag=True, help="Agree to the price without being asked."),
        click.option(
            "--max-cost", type=click.FloatRange(min=0), metavar="USD", help="Fail before spending more than this."
        ),
        click.option("--dry-run", is_flag=True, help="Show what would be fetched and its price, then stop."),
    ):
        command = option(command)
    return _option_to(_option_catalog(command))


for _command in (
    money_commands.spend,
    money_commands.prices,
    money_commands.config,
    upkeep_commands.doctor,
    upkeep_commands.cache,
    upkeep_commands.catalog,
    completion_command("dmdata"),
):
    commands.add_command(_command)


@commands.command("ls")
@click.argument("patterns", nargs=-1, shell_complete=complete_artifacts)
@_option_catalog
@talk_options
def list_artifacts(talk: Talk, patterns: tuple[str, ...], catalog: str | None) -> None:
    """List artifacts by name or glob, with shape, size and what fetching each would cost.

    Without PATTERNS everything is listed. '*' stands for any text within one part of a name, '**' for any parts.
    """
    known = release.load_catalog(catalog)
    priced = release.price_artifacts(known.match(patterns or ("**",)), to=Destination.INTERNET)
    table = Table("artifact", "shape", "dtype", "size", "to the internet", box=None, header_style="bold")
    for column in table.columns[3:]:
        column.justify = "right"
    for artifact, price in priced:
        table.add_row(
            artifact.name, *_shape_and_dtype(artifact), readable_bytes(artifact.n_bytes), readable_usd(price.usd)
        )
    talk.print_data(
        {"artifacts": [_artifact_facts(artifact) | {"usd": price.usd} for artifact, price in priced]}, table
    )


@commands.command("info")
@click.argument("name", required=False, shell_complete=complete_artifacts)
@_option_catalog
@talk_options
def describe(talk: Talk, name: str | None, catalog: str | None) -> None:
    """Show all that is known of NAME, an artifact or a dataset, and for each fact how it is known.

    Without NAME the release itself: where it is, how large, how to cite it, and what was never released.
    """
    known = release.load_catalog(catalog)
    if name is None:
        _describe_release(talk, known)
        return
    if name in known.datasets:
        _describe_dataset(talk, known, name)
        return
    artifact = known.find(name)
    data = _artifact_facts(artifact) | {
        "url": artifact.url,
        "requester_pays": artifact.source.requester_pays,
        "fit_rows": artifact.rows.fit,
        "evaluation_rows": artifact.rows.evaluation,
        "basis": {fact: str(basis) for fact, basis in artifact.basis.items()},
        "note": artifact.stored.note,
    }
    table = Table("fact", "value", "basis", box=None, header_style="bold")
    shape, dtype = _shape_and_dtype(artifact)
    basis = artifact.basis
    rows = {"key": artifact.url, "shape": shape, "dtype": dtype, "n_bytes": f"{artifact.n_bytes:,}"}
    for fact, value in rows.items():
        table.add_row(fact, value, str(basis.get(fact, "")))
    if artifact.schema is not None:
        table.add_row("dims", ", ".join(artifact.schema.dims), str(basis.get("dims", "")))
    table.add_row("fit rows", _rows(artifact.rows.fit), str(basis.get("rows", "")))
    table.add_row("evaluation rows", _rows(artifact.rows.evaluation), str(basis.get("rows", "")))
    table.add_row("paid by", "the reader (requester pays)" if artifact.source.requester_pays else "nobody", "")
    if artifact.stored.note:
        table.add_row("note", artifact.stored.note, "")
    talk.print_data(data, table)


@commands.command("estimate")
@click.argument("patterns", nargs=-1, required=True, shell_complete=complete_artifacts)
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave these out; may be given several times.")
@click.option("--select", metavar="INDEX", help='What is read of each artifact, as "0:1000,42".')
@click.option("--used-gib", type=click.FloatRange(min=0), metavar="GB", help="Sent to the internet this month already.")
@click.option("--free-tier/--no-free-tier", default=None, help="Whether the month's free GB are left but for these.")
@_option_to
@_option_catalog
@talk_options
def estimate(
    talk: Talk,
    patterns: tuple[str, ...],
    exclude: tuple[str, ...],
    select: str | None,
    used_gib: float | None,
    free_tier: bool | None,
    to: str,
    catalog: str | None,
) -> None:
    """Price artifacts before a byte moves, by the catalog alone: no network, no credentials.

    Both ends are shown: the cheapest way, which reads take, and the fastest by the assumed link.
    """
    known, usage = release.load_catalog(catalog), usage_of(used_gib, free_tier)
    priced = release.price_artifacts(known.match(patterns, exclude=exclude), key=select, to=to, usage=usage)
    _print_estimate(talk, priced, release.total_of([price for _, price in priced], to=to, usage=usage))


@commands.command("get")
@click.argument("name")
@click.option("-o", "--output", metavar="PATH", help="File or folder. [default: the object's own name]")
@_options_spending
@talk_options
def get(talk: Talk, name: str, output: str | None, **spending: Any) -> None:
    """Download the object of NAME as it is. Run again to resume."""
    known = release.load_catalog(spending["catalog"])
    artifact = known.find(known.find(name).object_name)
    priced = release.price_download(artifact, release.download_path(artifact, output), to=spending["to"])
    with _paid_for(talk, priced, f"downloading {artifact.name}", **spending) as agreed:
        if not agreed:
            return
        with talk.progress(DownloadColumn(), _Dollars(artifact, spending["to"])) as bars:
            bar = bars.add_task(artifact.name, total=artifact.n_bytes)
            path = release.get(
                artifact.name,
                output,
                to=spending["to"],
                catalog=known,
                progress=lambda done, total: bars.update(bar, completed=done, total=total),
            )
    talk.print_data(
        {"path": str(path), "bytes": path.stat().st_size}, _lines(f"{path}", readable_bytes(path.stat().st_size))
    )


@commands.command("mirror")
@click.argument("patterns", nargs=-1, required=True)
@click.argument("destination")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave these out; may be given several times.")
@click.option("--select", metavar="INDEX", help='Rows and columns of each artifact, as "0:1000,0:50".')
@click.option(
    "--memory", type=click.IntRange(min=1), metavar="MIB", default=DEFAULT_MEMORY_BYTES >> 20, show_default=True
)
@_options_spending
@talk_options
def mirror(
    talk: Talk,
    patterns: tuple[str, ...],
    destination: str,
    exclude: tuple[str, ...],
    select: str | None,
    memory: int,
    **spending: Any,
) -> None:
    """Copy artifacts into a chunked Zarr store at DESTINATION. Run again to resume.

    One exact name makes DESTINATION that array; globs or several names make it a group.
    """
    known = release.load_catalog(spending["catalog"])
    artifacts = release.arrays_of(known.match(patterns, exclude=exclude), known)
    priced = release.price_mirror(
        artifacts,
        Path(destination),
        key=select,
        to=spending["to"],
        memory_bytes=memory << 20,
        alone=release.mirrored_alone(patterns, artifacts),
    )
    with _paid_for(talk, priced, f"mirroring {', '.join(patterns)}", **spending) as agreed:
        if not agreed:
            return
        with talk.stages(defaultdict(lambda: "rows")) as show:
            release.mirror(
                patterns[0] if len(patterns) == 1 else patterns,
                destination,
                key=select,
                exclude=exclude,
                to=spending["to"],
                catalog=known,
                memory_bytes=memory << 20,
                progress=lambda name, done: show(name, done.n_rows, done.n_rows_total),
            )
    names = [artifact.name for artifact in artifacts]
    talk.print_data({"destination": destination, "artifacts": names}, _lines(destination, f"{len(names)} artifacts"))


@contextlib.contextmanager
def _paid_for(
    talk: Talk,
    priced: list[tuple[Artifact, Estimate]],
    what: str,
    *,
    to: str,
    catalog: str | None,
    dry_run: bool,
    max_cost: float | None,
    yes: bool,
) -> Any:
    """Ask where the work costs something, and hold its budget while it runs; yields whether to go on."""
    del catalog
    total = release.total_of([price for _, price in priced], to=to)
    if max_cost is not None and math.isnan(max_cost):
        raise click.BadParameter("nan is no number of dollars", param_hint="--max-cost")
    if dry_run:
        _print_estimate(talk, priced, total)
        yield False
        return
    paid = [price for artifact, price in priced if artifact.source.requester_pays]
    with contextlib.ExitStack() as stack:
        if max_cost is not None:
            stack.enter_context(ledger.budget(usd=max_cost))
        if paid:
            price = release.total_of(paid, to=to)
            ledger.Ledger(ledger.home()).check(usd=price.usd, artifact=what)
            ask_consent(talk, price, what=what, agreed=yes)
        yield True


def _print_estimate(talk: Talk, priced: list[tuple[Artifact, Estimate]], total: Estimate) -> None:
    def facts(way: Quote) -> dict[str, Any]:
        return {
            "bytes": way.n_bytes,
            "requests": way.n_requests,
            "usd": way.usd,
            "usd_low": way.usd_low,
            "usd_high": way.usd_high,
            "seconds": way.seconds,
        }

    def both(price: Estimate) -> dict[str, Any]:
        return facts(price.cheapest) | {"fastest": facts(price.fastest)}

    data = both(total) | {
        "to": str(total.destination),
        "price_date": total.price_date,
        "artifacts": [{"name": artifact.name} | both(price) for artifact, price in priced],
    }
    table = Table("artifact", "bytes", "requests", "dollars", "seconds", box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for artifact, price in priced:
        table.add_row(artifact.name, *_quote_cells(price.cheapest))
        if price.fastest != price.cheapest:
            table.add_row("  fastest", *_quote_cells(price.fastest))
    table.add_section()
    table.add_row("total, cheapest", *_quote_cells(total.cheapest), style="bold")
    if total.fastest != total.cheapest:
        table.add_row("total, fastest", *_quote_cells(total.fastest))
    talk.print_data(data, table)
    link = assumed_link()
    low, high = readable_usd(total.usd_low), readable_usd(total.usd_high)
    open_ended = low != high and total.destination is Destination.INTERNET
    talk.remark(
        (f"between {low} and {high}" if low != high else high)
        + f", at {prices_in_words()} to {total.destination}; seconds assume {link.n_connections} connections of "
        f"{link.bytes_per_second / 1e6:g} MB/s" + ("; --used-gib and --free-tier narrow it" if open_ended else "")
    )


def _quote_cells(way: Any) -> tuple[str, str, str, str]:
    return readable_bytes(way.n_bytes), f"{way.n_requests:,}", readable_usd(way.usd), f"{way.seconds:,.1f}"


def _describe_release(talk: Talk, known: Catalog) -> None:
    n_bytes = sum(artifact.n_bytes for artifact in known.artifacts())
    facts = {"title": known.title, "url": known.source.url, "requester_pays": known.source.requester_pays}
    table = Table(box=None, show_header=False)
    for fact, value in facts.items():
        table.add_row(fact.replace("_", " "), str(value))
    table.add_row("datasets", ", ".join(known.datasets))
    table.add_row("size", f"{readable_bytes(n_bytes)} in {sum(1 for _ in known.artifacts())} objects")
    for record in known.not_released:
        table.add_row("never released", f"{', '.join(record.artifacts)}: {record.why}")
    if known.citation:
        table.add_row("cite", known.citation)
    missing = [record.model_dump(mode="json") for record in known.not_released]
    rest = {"datasets": list(known.datasets), "bytes": n_bytes, "not_released": missing, "citation": known.citation}
    talk.print_data(facts | rest, table)


def _describe_dataset(talk: Talk, known: Catalog, name: str) -> None:
    dataset = known.datasets[name]
    facts = {"title": dataset.title, "n_train": dataset.n_train, "n_test": dataset.n_test}
    facts |= {"n_classes": dataset.n_classes, "example_order": dataset.example_order}
    about = Table("fact", "value", "basis", box=None, header_style="bold")
    for fact, value in facts.items():
        about.add_row(fact, f"{value:,}" if isinstance(value, int) else str(value), str(dataset.basis.get(fact, "")))
    about.add_row("alphas", ", ".join(dataset.alphas), "")
    sizes: list[dict[str, Any]] = []
    for record in known.published_sizes:
        if record.artifacts[0].startswith(f"{name}/"):
            derived = sum(artifact.n_bytes for artifact in known.match(record.artifacts)) / GIB
            sizes.append({"artifacts": record.artifacts, "published_gib": record.gib, "derived_gib": derived})
    tables = [about]
    if sizes:
        table = Table("size of", "published, GiB", "from the shapes, GiB", box=None, header_style="bold")
        for size in sizes:
            table.add_row(" + ".join(size["artifacts"]), f"{size['published_gib']:,g}", f"{size['derived_gib']:,.1f}")
        tables.append(table)
    talk.print_data({"name": name} | facts | {"alphas": list(dataset.alphas), "sizes": sizes}, *tables)


def _artifact_facts(artifact: Artifact) -> dict[str, Any]:
    schema = artifact.schema
    return {
        "name": artifact.name,
        "shape": list(schema.shape) if schema else None,
        "dtype": schema.dtype if schema else None,
        "dims": list(schema.dims) if schema else None,
        "bytes": artifact.n_bytes,
        "key": artifact.stored.key,
        "format": artifact.stored.format,
        "members": list(artifact.stored.members),
    }


def _shape_and_dtype(artifact: Artifact) -> tuple[str, str]:
    if artifact.schema is None:
        dtypes = {member.dtype for member in artifact.stored.members.values()}
        return " + ".join(artifact.stored.members), ", ".join(sorted(dtypes))
    return " x ".join(f"{size:,}" for size in artifact.schema.shape), artifact.schema.dtype


def _rows(bounds: tuple[int, int]) -> str:
    return f"{bounds[0]:,} to {bounds[1]:,}"


def _lines(*texts: str) -> Table:
    table = Table(box=None, show_header=False)
    table.add_row(*texts)
    return table


class _Dollars(ProgressColumn):
    """What the bytes so far cost."""

    def __init__(self, artifact: Artifact, to: str) -> None:
        super().__init__()
        self._usd_per_byte = price_table().usd_per_byte(Destination(to)) if artifact.source.requester_pays else 0.0

    def render(self, task: Task) -> Text:
        """Write the dollars of the bytes that are complete."""
        return Text(readable_usd(task.completed * self._usd_per_byte))
