"""Commands that look after an installation: ``doctor``, ``cache``."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dmdata.catalog.locate import is_address
from dmdata.cli.completion import complete_artifacts
from dmdata.cli.console import AMOUNT, Talk, ask_consent, option_catalog, talk_options
from dmdata.cli.tables import headed_table, plain_table
from dmdata.home import home

if TYPE_CHECKING:
    from dmdata.cli.doctor import Finding
    from dmdata.objects.address import Address

_MARKS = {"ok": "ok", "warn": "look", "fail": "FAIL"}


@click.command("doctor")
@click.argument("name", required=False, shell_complete=complete_artifacts)
@click.option("--at", "destination", default=".", metavar="PATH", help="Where a copy would go. [default: here]")
@click.option("--probe", "probing", is_flag=True, help="Read one byte of it, for one request's price.")
@click.option("-y", "--yes", is_flag=True, help="Agree to the price of the probe without being asked.")
@option_catalog
@talk_options
@click.pass_context
def doctor(
    context: click.Context,
    talk: Talk,
    name: str | None,
    destination: str,
    probing: bool,
    yes: bool,
    catalog: str | None,
) -> None:
    """Explain whether NAME could be read and what would be in the way: credentials, region, prices, budget, disk.

    NAME is a catalog name or an address. Without it the first object of the catalog is examined. Nothing is spent
    without --probe.
    """
    from dmdata.catalog.catalogued import artifact_below
    from dmdata.cli.doctor import examine
    from dmdata.release import opening

    below = artifact_below(name) if name is not None else None
    if name is not None and is_address(name) and below is None:
        address = opening.address_named(name)
        looked_at, n_bytes = str(address), None
    else:
        known = opening.load_catalog(catalog)
        if below is not None and name is not None and (is_address(name) or not known.has(name)):
            artifact = below
        else:
            artifact = known.find(name) if name else next(known.artifacts())
        address, looked_at, n_bytes = opening.address_of(artifact), artifact.name, artifact.n_bytes
    findings = examine(address, n_bytes=n_bytes, destination=Path(destination))
    if probing:
        findings.append(_probed(talk, address, looked_at, agreed=yes))
    table = headed_table("", "what", "how it is", "next")
    for finding in findings:
        table.add_row(_MARKS[finding.state], finding.topic, finding.words, finding.remedy)
    facts = [
        {"topic": finding.topic, "state": finding.state, "words": finding.words, "next": finding.remedy}
        for finding in findings
    ]
    talk.print_data({"artifact": looked_at, "findings": facts}, table)
    context.exit(1 if any(finding.state == "fail" for finding in findings) else 0)


def _probed(talk: Talk, address: "Address", name: str, *, agreed: bool) -> "Finding":
    from dmdata.cli.doctor import probe
    from dmdata.money.ledger import Ledger
    from dmdata.reading.fetch import Transport

    if (transport := Transport(address, name)).is_paid:
        price = transport.terms.quote(1, 1)
        Ledger(home()).check(usd=price.usd, artifact=name)
        ask_consent(talk, transport.terms.estimate(price, price), what=f"probing {name}", agreed=agreed)
    return probe(address, artifact=name)


@click.group("cache", invoke_without_command=True)
@talk_options
def cache(talk: Talk) -> None:
    """Show what is cached under DMDATA_HOME to save requests; `cache clear` removes it. The ledger stays."""
    from dmdata.cli.cache import remembered
    from dmdata.money.prices import readable_bytes, readable_usd
    from dmdata.reading import ranges

    table = headed_table("folder", "files", "size", "what it saves")
    found = remembered()
    for part in found:
        table.add_row(part.folder, f"{part.n_files:,}", readable_bytes(part.n_bytes), part.what)
    facts = [{"folder": part.folder, "files": part.n_files, "bytes": part.n_bytes} for part in found]
    kept = ranges.usage()
    about = {
        "objects": kept.n_objects,
        "files": kept.n_segments,
        "bytes": kept.n_bytes,
        "bound_bytes": kept.bound_bytes,
        "saved_bytes": kept.saved_bytes,
        "saved_usd": kept.saved_usd,
    }
    talk.print_data({"home": str(home()), "folders": facts, "ranges": about}, table)
    bound = f"of at most {readable_bytes(kept.bound_bytes)}" if kept.bound_bytes else "and nothing more is kept"
    talk.remark(
        f"ranges: {readable_bytes(kept.n_bytes)} of {kept.n_objects:,} objects, {bound}; "
        f"{readable_bytes(kept.saved_bytes)} were not fetched again, which saved {readable_usd(kept.saved_usd)}"
    )
    talk.remark(f"in {home()}")


@cache.command("clear")
@click.option("--older-than", type=AMOUNT, default=0.0, metavar="DAYS", help="Leave what is newer.")
@talk_options
def clear(talk: Talk, older_than: float) -> None:
    """Remove what is cached. The ledger, and what was mirrored or downloaded, stay."""
    from dmdata.cli import cache
    from dmdata.money.prices import readable_bytes

    n_files, n_bytes = cache.clear(older_than_seconds=older_than * 86400)
    table = plain_table(("removed", f"{n_files:,} files", readable_bytes(n_bytes)))
    talk.print_data({"files": n_files, "bytes": n_bytes}, table)
