"""The ``dmdata`` command: list, describe, price, download and mirror what a catalog holds, and show what was spent."""

from collections.abc import Sequence
from typing import Any

import click
from rich.table import Table

from dmdata import catalog_commands, money_commands, pricing, release, upkeep_commands
from dmdata.catalog import Artifact, Catalog
from dmdata.catalogued import catalog_below
from dmdata.completion import complete_artifacts, completion_command
from dmdata.console import AMOUNT, Talk, run, talk_options
from dmdata.copy_commands import (
    Priced,
    compare,
    get,
    looked_up,
    mirror,
    option_catalog,
    options_spending,
    print_estimate,
)
from dmdata.errors import CatalogError
from dmdata.locate import is_address
from dmdata.prices import GIB, Destination, readable_bytes, readable_usd, usage_of


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the entry point of ``dmdata``."""
    run(commands, arguments, name="dmdata")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="dmdata")
def commands() -> None:
    """Read a requester-pays release of datamodels: lazily, exactly, and with the price known first."""


for _command in (
    get,
    mirror,
    compare,
    money_commands.spend,
    money_commands.prices,
    money_commands.config,
    upkeep_commands.doctor,
    upkeep_commands.cache,
    catalog_commands.catalog,
    completion_command("dmdata"),
):
    commands.add_command(_command)


@commands.command("ls")
@click.argument("patterns", nargs=-1, shell_complete=complete_artifacts)
@option_catalog
@talk_options
def list_artifacts(talk: Talk, patterns: tuple[str, ...], catalog: str | None) -> None:
    """List artifacts by name or glob, with shape, size and what fetching each would cost.

    Without PATTERNS everything is listed. '*' stands for any text within one part of a name, '**' for any parts.
    """
    listed, addresses = release.matching(patterns or ("**",), catalog=catalog)
    if addresses:
        raise CatalogError(
            f"{addresses[0]} is an address, and ls lists what a catalog holds, for free; describe it with dmdata info, "
            "or make a catalog of all that is there with dmdata catalog scan",
            name=addresses[0],
        )
    priced = pricing.price_artifacts(listed, to=Destination.INTERNET)
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
@options_spending
@talk_options
def describe(talk: Talk, name: str | None, **spending: Any) -> None:
    """Show all that is known of NAME, an artifact, a dataset or an address, and for each fact how it is known.

    Without NAME the release itself: where it is, how large, how to cite it, and what was never released. Of an address
    the header is read, for the price of a request or two where its reader pays.
    """
    below = catalog_below(name) if name is not None else None
    if name is not None and is_address(name) and below is None:
        with looked_up(talk, [name], **spending) as found:
            if found is not None:
                _describe_artifact(talk, found[0])
        return
    known = release.load_catalog(spending["catalog"])
    if below is not None and name is not None and (is_address(name) or not known.has(name)):
        known, name = below
    if not name:
        _describe_release(talk, known)
        return
    if name in known.datasets:
        _describe_dataset(talk, known, name)
        return
    _describe_artifact(talk, known.find(name))


def _describe_artifact(talk: Talk, artifact: Artifact) -> None:
    rows_of = artifact.rows
    data = _artifact_facts(artifact) | {
        "url": str(release.address_of(artifact)),
        "etag": artifact.stored.etag,
        "requester_pays": artifact.source.requester_pays,
        "fit_rows": rows_of.fit if rows_of else None,
        "evaluation_rows": rows_of.evaluation if rows_of else None,
        "basis": {fact: str(basis) for fact, basis in artifact.basis.items()},
        "note": artifact.stored.note,
    }
    table = Table("fact", "value", "basis", box=None, header_style="bold")
    shape, dtype = _shape_and_dtype(artifact)
    basis = artifact.basis
    rows = {"key": data["url"], "shape": shape, "dtype": dtype, "n_bytes": f"{artifact.n_bytes:,}"}
    for fact, value in rows.items():
        table.add_row(fact, value, str(basis.get(fact, "")))
    if artifact.schema is not None:
        table.add_row("dims", ", ".join(artifact.schema.dims), str(basis.get("dims", "")))
    if artifact.stored.etag:
        table.add_row("etag", artifact.stored.etag, "")
    if rows_of is not None:
        table.add_row("fit rows", _rows(rows_of.fit), str(basis.get("rows", "")))
        table.add_row("evaluation rows", _rows(rows_of.evaluation), str(basis.get("rows", "")))
    table.add_row("paid by", "the reader (requester pays)" if artifact.source.requester_pays else "nobody", "")
    if artifact.stored.note:
        table.add_row("note", artifact.stored.note, "")
    talk.print_data(data, table)


@commands.command("estimate")
@click.argument("patterns", nargs=-1, required=True, shell_complete=complete_artifacts)
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave these out; may be given several times.")
@click.option("--select", metavar="INDEX", help='What is read of each artifact, as "0:1000,42".')
@click.option("--used-gib", type=AMOUNT, metavar="GB", help="Sent to the internet this month already.")
@click.option("--free-tier/--no-free-tier", default=None, help="Whether the month's free GB are left but for these.")
@options_spending
@talk_options
def estimate(
    talk: Talk,
    patterns: tuple[str, ...],
    exclude: tuple[str, ...],
    select: str | None,
    used_gib: float | None,
    free_tier: bool | None,
    **spending: Any,
) -> None:
    """Price artifacts before a byte moves, by the catalog alone: no network, no credentials.

    Of an address the header is read, for the price of a request or two where its reader pays. Both ends are shown: the
    cheapest way, which reads take, and the fastest by the assumed link.
    """
    usage, to = usage_of(used_gib, free_tier), spending["to"]
    with looked_up(talk, patterns, exclude=exclude, **spending) as found:
        if found is not None:
            priced = pricing.price_artifacts(found, key=select, to=to, usage=usage)
            print_estimate(talk, Priced.all_of(priced), to=to, usage=usage)


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
    if artifact.schema is None and not artifact.stored.members:
        return "bytes", ""
    if artifact.schema is None:
        dtypes = {member.dtype for member in artifact.stored.members.values()}
        return " + ".join(artifact.stored.members), ", ".join(sorted(dtypes))
    return " x ".join(f"{size:,}" for size in artifact.schema.shape), artifact.schema.dtype


def _rows(bounds: tuple[int, int]) -> str:
    return f"{bounds[0]:,} to {bounds[1]:,}"
