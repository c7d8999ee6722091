"""The commands that list, describe and price what a catalog holds: ``ls``, ``info`` and ``estimate``."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from dmdata.catalog.locate import is_address
from dmdata.cli.completion import complete_artifacts
from dmdata.cli.console import AMOUNT, Talk, option_catalog, talk_options
from dmdata.cli.copy_commands import Priced, headers_paid_for, options_spending, print_estimate
from dmdata.cli.tables import headed_table, plain_table
from dmdata.errors import CatalogError

if TYPE_CHECKING:
    from dmdata.catalog.entries import Artifact, Catalog


@click.command("ls")
@click.argument("patterns", nargs=-1, shell_complete=complete_artifacts)
@option_catalog
@talk_options
def list_artifacts(talk: Talk, patterns: tuple[str, ...], catalog: str | None) -> None:
    """List artifacts by name or glob, with shape, size and what fetching each would cost.

    Without PATTERNS everything is listed. '*' stands for any text within one part of a name, '**' for any parts; what
    ends before it names an artifact, as cifar/50pct, stands for all below it.
    """
    from dmdata.release import opening

    listed, addresses = opening.matching(patterns or ("**",), catalog=catalog)
    if addresses:
        raise CatalogError(
            f"{addresses[0]} is an address, and ls lists what a catalog holds, for free; describe it with dmdata info "
            "NAME, or make a catalog of all that is there with dmdata catalog scan TARGET",
            name=addresses[0],
        )
    _print_list(talk, listed)


def _print_list(talk: Talk, listed: "list[Artifact]") -> None:
    from dmdata.money.prices import Destination, Terms, readable_bytes, readable_usd
    from dmdata.release import pricing

    priced = pricing.price_artifacts(listed, Terms.in_force(Destination.INTERNET))
    table = headed_table("artifact", "shape", "dtype", "size", "to the internet", right=slice(3, None))
    for artifact, price in priced:
        table.add_row(
            artifact.name, *_shape_and_dtype(artifact), readable_bytes(artifact.n_bytes), readable_usd(price.usd)
        )
    talk.print_data(
        {"artifacts": [_artifact_facts(artifact) | {"usd": price.usd} for artifact, price in priced]}, table
    )


@click.command("info")
@click.argument("name", required=False, shell_complete=complete_artifacts)
@options_spending
@talk_options
def describe(talk: Talk, name: str | None, to: str | None, catalog: str | None, **spending: Any) -> None:
    """Show all that is known of NAME, an artifact, a dataset or an address, and for each fact how it is known.

    Without NAME the release itself: where it is, how large, how to cite it, and what was never released. What ends
    before it names an artifact, as cifar/50pct, is listed. For an address the header is read, which costs a request or
    two if the reader pays.
    """
    from dmdata.catalog.catalogued import catalog_below
    from dmdata.money.prices import Terms
    from dmdata.release import opening

    below = catalog_below(name) if name is not None else None
    if name is not None and is_address(name) and below is None:
        terms = Terms.in_force(to)
        with headers_paid_for(talk, [name], terms, **spending) as agreed:
            if agreed:
                _describe_artifact(talk, opening.describe(name, terms)[0])
        return
    known = opening.load_catalog(catalog)
    if below is not None and name is not None and (is_address(name) or not known.has(name)):
        known, name = below
    name = name and name.rstrip("/")
    if not name:
        _describe_release(talk, known)
    elif name in known.datasets:
        _describe_dataset(talk, known, name)
    elif not known.has(name) and known.has(f"{name}/**"):
        _print_list(talk, known.match(f"{name}/**"))
    else:
        _describe_artifact(talk, known.find(name))


def _describe_artifact(talk: Talk, artifact: "Artifact") -> None:
    from dmdata.release.opening import address_of

    rows_of = artifact.rows
    data = _artifact_facts(artifact) | {
        "url": str(address_of(artifact)),
        "etag": artifact.stored.etag,
        "requester_pays": artifact.source.requester_pays,
        "fit_rows": rows_of.fit if rows_of else None,
        "evaluation_rows": rows_of.evaluation if rows_of else None,
        "basis": {fact: str(basis) for fact, basis in artifact.basis.items()},
        "note": artifact.stored.note,
    }
    table = headed_table("fact", "value", "basis")
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


@click.command("estimate")
@click.argument("patterns", nargs=-1, required=True, shell_complete=complete_artifacts)
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave these out; may be given several times.")
@click.option("--select", metavar="INDEX", help='What is read of each artifact, as "0:1000,42".')
@click.option("--used-gib", type=AMOUNT, metavar="GB", help="GB already sent to the internet this month.")
@click.option("--free-tier/--no-free-tier", default=None, help="Whether free GB are unused, apart from --used-gib.")
@options_spending
@talk_options
def estimate(
    talk: Talk,
    patterns: tuple[str, ...],
    exclude: tuple[str, ...],
    select: str | None,
    used_gib: float | None,
    free_tier: bool | None,
    to: str | None,
    catalog: str | None,
    **spending: Any,
) -> None:
    """Price artifacts before a byte moves, by the catalog alone: no network, no credentials.

    For an address, the header is read, which costs a request or two if the reader pays. Two ways are shown: the
    cheapest, which is the default for reads, and the fastest over the assumed link.
    """
    from dmdata.money.prices import usage_of
    from dmdata.release import opening
    from dmdata.settings import settings

    known = settings()
    terms, chosen = opening.in_force(to, catalog, known=known)
    usage = usage_of(used_gib, free_tier, known=known)
    with headers_paid_for(talk, patterns, terms, **spending) as agreed:
        if agreed:
            found = opening.look_up(patterns, terms, exclude=exclude, catalog=chosen)
            of_month = replace(terms, usage=usage)
            priced = opening.price_reading(found, of_month, key=select, local=known.local_mirrors)
            print_estimate(talk, Priced.all_of(priced, terms), of_month)
            if n_local := sum(not price.n_requests and artifact.n_bytes > 0 for artifact, price in priced):
                talk.remark(f"{n_local} of {len(priced)} are read from local mirrors, for nothing")


def _describe_release(talk: Talk, known: "Catalog") -> None:
    from dmdata.money.prices import readable_bytes

    n_bytes = sum(artifact.n_bytes for artifact in known.artifacts())
    facts = {"title": known.title, "url": known.source.url, "requester_pays": known.source.requester_pays}
    table = plain_table(*((fact.replace("_", " "), str(value)) for fact, value in facts.items()))
    table.add_row("datasets", ", ".join(known.datasets))
    table.add_row("size", f"{readable_bytes(n_bytes)} in {sum(1 for _ in known.artifacts())} objects")
    for record in known.not_released:
        table.add_row("never released", f"{', '.join(record.artifacts)}: {record.why}")
    if known.citation:
        table.add_row("cite", known.citation)
    missing = [record.model_dump(mode="json") for record in known.not_released]
    rest = {"datasets": list(known.datasets), "bytes": n_bytes, "not_released": missing, "citation": known.citation}
    talk.print_data(facts | rest, table)


def _describe_dataset(talk: Talk, known: "Catalog", name: str) -> None:
    from dmdata.money.prices import GIB

    dataset = known.datasets[name]
    facts = {"title": dataset.title, "n_train": dataset.n_train, "n_test": dataset.n_test}
    facts |= {"n_classes": dataset.n_classes, "example_order": dataset.example_order}
    about = headed_table("fact", "value", "basis")
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
        table = headed_table("size of", "published, GiB", "from the shapes, GiB")
        for size in sizes:
            table.add_row(" + ".join(size["artifacts"]), f"{size['published_gib']:,g}", f"{size['derived_gib']:,.1f}")
        tables.append(table)
    talk.print_data({"name": name} | facts | {"alphas": list(dataset.alphas), "sizes": sizes}, *tables)


def _artifact_facts(artifact: "Artifact") -> dict[str, Any]:
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


def _shape_and_dtype(artifact: "Artifact") -> tuple[str, str]:
    if artifact.schema is None and not artifact.stored.members:
        return "bytes", ""
    if artifact.schema is None:
        dtypes = {member.dtype for member in artifact.stored.members.values()}
        return " + ".join(artifact.stored.members), ", ".join(sorted(dtypes))
    return " x ".join(f"{size:,}" for size in artifact.schema.shape), artifact.schema.dtype


def _rows(bounds: tuple[int, int]) -> str:
    return f"{bounds[0]:,} to {bounds[1]:,}"
