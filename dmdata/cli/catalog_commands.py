"""The commands about catalogs: to make one, check that it is valid and true, show it, and export it for others."""

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dmdata.cli.console import Talk, ask_consent, option_catalog, options_of_group, talk_options
from dmdata.cli.copy_commands import Priced, options_paying, paid_for
from dmdata.cli.tables import headed_table, plain_table
from dmdata.errors import CatalogError, IntegrityError, SourceError

if TYPE_CHECKING:
    from dmdata.catalog.entries import Catalog
    from dmdata.money.prices import Estimate, Terms
    from dmdata.objects.address import Address
    from dmdata.release.confirm import Answer


@click.group("catalog")
@options_of_group
def catalog() -> None:
    """Make a catalog of what is there, check one, show or export the one in use, or print the schema they follow."""


@catalog.command("scan")
@click.argument("target")
@click.option("-o", "--output", default="catalog.yaml", show_default=True, metavar="FILE", help="Where to write it.")
@click.option("--force", is_flag=True, help="Write over FILE where it exists.")
@click.option(
    "--requester-pays/--no-requester-pays",
    default=None,
    help="Whether readers pay. [default: yes, if the source charges you]",
)
@options_paying
@talk_options
def make(
    talk: Talk,
    target: str,
    output: str,
    force: bool,
    requester_pays: bool | None,
    to: str | None,
    dry_run: bool,
    max_cost: float | None,
    yes: bool,
) -> None:
    """Make a catalog of the arrays below TARGET, a folder or s3://bucket/prefix, by reading their headers.

    First the objects are listed, then the headers are read; each step shows its price and asks. Names are proposed
    from the keys: change them in FILE as you like. What cannot be read is left out, and listed.
    """
    from dmdata.money import ledger
    from dmdata.money.prices import Terms, readable_bytes
    from dmdata.objects.listing import PAGE_OBJECTS
    from dmdata.release import scan

    root, path, terms = scan.root_of(target), Path(output), Terms.in_force(to)
    if path.exists() and not force:
        raise scan.exists_already(path)
    _require_folder(path)
    with contextlib.ExitStack() as stack:
        if max_cost is not None:
            stack.enter_context(ledger.budget(usd=max_cost))
        if root.requester_pays:
            page = _price_of_page(terms)
            if dry_run and not yes:
                _show_page(talk, root, page)
                return
            ledger.Ledger(ledger.home()).check(usd=page.usd, artifact=f"the list of {root}")
            ask_consent(talk, page, what=f"listing {root}, for each {PAGE_OBJECTS:,} objects,", agreed=yes)
        found = scan.find(root, terms)
        headers = [Priced(name, price, is_paid=True) for name, price in found.prices(terms)]
        what = f"reading the headers of {len(headers):,} objects"
        paying = paid_for(talk, headers, what, terms, dry_run=dry_run, max_cost=max_cost, yes=yes)
        if not stack.enter_context(paying):
            return
        with talk.counting("headers", "objects") as show:
            made, remarks = scan.catalog_of(
                found,
                terms,
                url="." if root.is_local and path.absolute().parent.resolve() == Path(root.url).resolve() else None,
                requester_pays=requester_pays,
                progress=show,
            )
        scan.write(made, path, force=force)
    for remark in remarks:
        talk.remark(remark)
    artifacts = list(made.artifacts())
    n_bytes = sum(artifact.n_bytes for artifact in artifacts)
    table = plain_table((output, f"{len(artifacts)} artifacts", readable_bytes(n_bytes), f"at {root}"))
    facts = {"path": output, "artifacts": [artifact.name for artifact in artifacts], "bytes": n_bytes}
    source = {"url": str(root), "requester_pays": made.source.requester_pays, "region": made.source.region}
    talk.print_data(facts | source | {"remarks": remarks}, table)


def _require_folder(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise CatalogError(f"{path.absolute().parent} is not a folder; make it, or name another file with -o")


def _price_of_page(terms: "Terms") -> "Estimate":
    from dmdata.money.prices import Quote
    from dmdata.objects.listing import PAGE_BYTES, page_usd

    usd, seconds = page_usd(terms), terms.link.seconds(PAGE_BYTES, 1)
    way = Quote(1, PAGE_BYTES, usd=usd, usd_low=terms.prices.usd_per_list, usd_high=usd, seconds=seconds)
    return terms.estimate(way, way)


def _show_page(talk: Talk, root: "Address", page: "Estimate") -> None:
    from dmdata.money.prices import readable_usd
    from dmdata.objects.listing import PAGE_OBJECTS

    table = plain_table((f"list of {root}", f"up to {readable_usd(page.usd)} for each {PAGE_OBJECTS:,} objects"))
    facts = {"url": str(root), "usd_per_page": page.usd, "objects_per_page": PAGE_OBJECTS, "to": str(page.destination)}
    talk.print_data(facts, table)
    talk.remark("this is the list alone: add -y to ask for it, and to see the price of the headers")


@catalog.command("check")
@click.argument("file", type=click.Path())
@click.option("--against-bucket", is_flag=True, help="Also compare it with its source, header by header.")
@click.option("--write", "writing", is_flag=True, help="Mark the facts that the source confirms as measured in FILE.")
@options_paying
@talk_options
def check(talk: Talk, file: str, against_bucket: bool, writing: bool, **spending: Any) -> None:
    """Check that FILE is a valid catalog and, if it is not, show which entry is wrong and why.

    With --against-bucket the header of each object is read, and compared in size, ETag, shape, dtype and, where the
    object was read whole before, digest; it ends with 3 where something differs or is missing.
    """
    from dmdata.money.prices import readable_bytes
    from dmdata.release.opening import load_catalog

    known = load_catalog(file)
    artifacts = list(known.artifacts())
    if not artifacts:
        raise CatalogError(f"{file} lists no artifacts; add some below datasets: NAME: alphas: NAME: arrays:")
    if against_bucket or writing:
        _check_against_bucket(talk, file, known, writing=writing, **spending)
        return
    n_bytes = sum(artifact.n_bytes for artifact in artifacts)
    about = (known.title, f"{len(artifacts)} artifacts", readable_bytes(n_bytes), f"at {known.source.url}")
    table = plain_table(("valid", *about))
    talk.print_data({"valid": True, "artifacts": len(artifacts), "bytes": n_bytes, "url": known.source.url}, table)


def _check_against_bucket(
    talk: Talk, file: str, known: "Catalog", *, writing: bool, to: str | None, **spending: Any
) -> None:
    from dmdata.catalog.entries import Catalog
    from dmdata.money.prices import Terms
    from dmdata.release import scan
    from dmdata.release.confirm import confirm, measured, prices

    path = Path(file) / "catalog.yaml" if Path(file).is_dir() else Path(file)
    if writing and "://" in file:
        raise CatalogError(f"{file} is not a local file, so nothing can be marked in it; copy it first", name=file)
    artifacts = list(known.artifacts())
    terms = Terms.in_force(to)
    priced = Priced.all_of(prices(artifacts, terms), terms)
    with paid_for(talk, priced, f"reading the headers of {file}", terms, **spending) as agreed:
        if not agreed:
            return
        with talk.counting("headers", "objects") as show:
            answers = confirm(artifacts, terms, progress=show)
    if writing:
        text = path.read_text()
        base = Catalog.parse(text, origin="catalog.yaml").source.url  # as FILE says it, not as it was resolved
        marked = measured(known, answers)
        source = marked.source.model_copy(update={"url": base})
        scan.write(marked.model_copy(update={"source": source}), path, force=True)
    counts = {verdict: sum(answer.verdict == verdict for answer in answers) for verdict in _VERDICTS}
    table = headed_table("artifact", "verdict", "what")
    for answer in answers:
        table.add_row(answer.name, answer.verdict, "; ".join(answer.words))
    talk.print_data({"url": known.source.url, **counts, "artifacts": [_answer_facts(a) for a in answers]}, table)
    if wrong := [answer for answer in answers if answer.verdict in ("differs", "missing")]:
        shown = "; ".join(f"{answer.name} {answer.verdict}: {', '.join(answer.words)}" for answer in wrong[:3])
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise IntegrityError(f"{len(wrong)} of {len(answers)} objects are not as {file} says: {shown}{more}", url=file)
    if counts["not checked"]:
        raise SourceError(f"{counts['not checked']} of {len(answers)} objects could not be looked at", transient=True)


_VERDICTS = ("confirmed", "differs", "missing", "not checked")


def _answer_facts(answer: "Answer") -> dict[str, Any]:
    return {
        "name": answer.name,
        "verdict": answer.verdict,
        "what": list(answer.words),
        "bytes": answer.state.n_bytes if answer.state else None,
        "etag": answer.state.etag if answer.state else None,
        "sha256": answer.sha256,
    }


@catalog.command("schema")
def schema() -> None:
    """Print the JSON Schema of a catalog, for editors that check YAML as it is written."""
    from dmdata.catalog.entries import Catalog

    click.echo(json.dumps(Catalog.model_json_schema(), indent=2))


@catalog.command("show")
@option_catalog
def show(catalog: str | None) -> None:
    """Print the catalog in use as YAML: the start of one's own."""
    from dmdata.release.opening import load_catalog

    click.echo(load_catalog(catalog).dump(), nl=False)


@catalog.command("export")
@click.option(
    "--to",
    "form",
    type=click.Choice(["croissant", "intake", "datapackage"]),
    required=True,
    help="Croissant 1.0 (JSON-LD), an Intake 2 catalog (YAML), or a Data Package 2.0 (JSON).",
)
@click.option("-o", "--output", metavar="FILE", help="Where to write it. [default: standard output]")
@click.option("--force", is_flag=True, help="Write over FILE where it exists.")
@option_catalog
@talk_options
def export(talk: Talk, form: str, output: str | None, force: bool, catalog: str | None) -> None:
    """Write the catalog in use in a form that other tools read; nothing but the catalog is read.

    Files below FILE's folder are named relative to it; without -o, those below the catalog's own folder. What the form
    has no field for is kept under keys of our own, and listed.
    """
    from dmdata.exchange.export import document_of, text_of

    path = Path(output) if output else None
    if path is not None:
        _require_folder(path)
    document, notes = document_of(form, catalog=catalog, folder=path.parent if path else None)
    for note in notes:
        talk.remark(f"{note}.")
    if path is None:
        talk.print_text(text_of(document, "croissant" if talk.as_json else form))  # JSON is YAML too
        return
    _write(text_of(document, form), path, force=force)
    talk.print_data({"path": str(path), "form": form, "notes": notes}, plain_table((str(path), form)))


def _write(text: str, path: Path, *, force: bool) -> None:
    from dmdata.atomic import write_whole
    from dmdata.release.scan import exists_already

    try:
        write_whole(path, text, replace=force)
    except FileExistsError as error:
        raise exists_already(path) from error
    except OSError as error:
        raise CatalogError(f"{path} cannot be written: {error}; name another file with -o", name=str(path)) from error
