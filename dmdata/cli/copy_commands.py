"""The commands that copy and compare: get, mirror and verify; and how commands that can spend ask before they do."""

import contextlib
import math
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from dmdata.catalog.locate import is_address, url_and_member
from dmdata.cli.completion import complete_artifacts
from dmdata.cli.console import AMOUNT, Talk, ask_consent, option_catalog, talk_options
from dmdata.cli.tables import headed_table, plain_table
from dmdata.errors import BudgetError, IntegrityError

if TYPE_CHECKING:
    from pathlib import Path

    from rich.progress import Progress, Task

    from dmdata.catalog.entries import Artifact
    from dmdata.money.prices import Estimate, Quote, Terms
    from dmdata.release.verification import Comparison

DESTINATIONS = ("internet", "same-region", "cross-region")
"""Names of `dmdata.money.prices.Destination`, known without loading it."""
DEFAULT_MEMORY_MIB = 512
"""As `dmdata.copying.mirror.DEFAULT_MEMORY_BYTES`."""
# beyond an agreed price: longer headers than most; a broken range that is billed again, as a share of large reads
_HEADERS_USD = 0.0001
_RANGE_USD = 0.002
_SHARE = 0.25


def option_to(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--to`` to a command."""
    return click.option(
        "--to",
        type=click.Choice(DESTINATIONS),
        show_default="internet, or as set",
        help="Where the bytes go: decides the price of a byte.",
    )(command)


def options_spending(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of commands that can spend, and that read what a catalog lists."""
    return options_paying(option_catalog(command))


def options_paying(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of commands that can spend."""
    for option in (
        click.option("-y", "--yes", is_flag=True, help="Agree to the price without being asked."),
        click.option("--max-cost", type=AMOUNT, metavar="USD", help="Fail before spending more than this."),
        click.option("--dry-run", is_flag=True, help="Show what would be fetched and its price, then stop."),
    ):
        command = option(command)
    return option_to(command)


@dataclass(frozen=True, slots=True)
class Priced:
    """Part of what a command will read: its name, price, and whether its reader pays."""

    name: str
    estimate: "Estimate"
    is_paid: bool

    @classmethod
    def all_of(cls, priced: "list[tuple[Artifact, Estimate]]", terms: "Terms") -> "list[Priced]":
        """Take artifacts as `dmdata.release.pricing` prices them."""
        from dmdata.release import opening

        return [
            cls(artifact.name, estimate, estimate.n_requests > 0 and opening.is_paid(artifact, terms))
            for artifact, estimate in priced
        ]


@contextlib.contextmanager
def paid_for(
    talk: Talk,
    priced: list[Priced],
    what: str,
    terms: "Terms",
    *,
    dry_run: bool,
    max_cost: float | None,
    yes: bool,
) -> Iterator[bool]:
    """Ask where the work costs something, and hold its budget while it runs; yields whether to do it.

    What is read may not be as its catalog claims. It may therefore cost as much as was agreed to, with some room for
    requests that are sent again, or, where that is given, up to `max_cost`.

    Raises
    ------
    BudgetError
        If it would cost more; the read that would has not begun.
    """
    if dry_run:
        print_estimate(talk, priced, terms)
        yield False
        return
    from dmdata.money import ledger

    paid = [part for part in priced if part.is_paid]
    with contextlib.ExitStack() as stack:
        if max_cost is not None:
            stack.enter_context(ledger.budget(usd=max_cost))
        if paid:
            agreed = agree_to(talk, paid, what, terms, yes=yes)
            if max_cost is None:
                stack.enter_context(_no_more_than(agreed))
        yield True


@contextlib.contextmanager
def _no_more_than(agreed: float) -> Iterator[None]:
    """Hold what was agreed to, in dollars, as a budget, and say so where it would be passed."""
    from dmdata.money import ledger
    from dmdata.money.prices import readable_usd

    limit = agreed + max(_SHARE * agreed, min(agreed, _RANGE_USD)) + _HEADERS_USD
    try:
        with ledger.budget(usd=limit):
            yield
    except BudgetError as error:
        if error.limit_usd is None or not math.isclose(error.limit_usd, limit, abs_tol=1e-11):
            raise  # of another budget
        cost = "more" if error.usd is None else f"up to {readable_usd(error.usd)} more"
        raise error.reworded(
            f"reading {error.artifact} would cost {cost}, but {readable_usd(agreed)} was agreed to in total: it is not "
            "as its catalog describes it, or much was sent again; what is complete stays; name the object "
            "by its address, for a price by its own header, or state the most that it may cost: --max-cost USD"
        ) from error


@contextlib.contextmanager
def headers_paid_for(
    talk: Talk, names: Sequence[str], terms: "Terms", *, dry_run: bool, max_cost: float | None, yes: bool
) -> Iterator[bool]:
    """Ask where the headers of addresses cost something, and hold the budget of the whole command while it runs.

    Yields whether they may be read: nothing is spent in a dry run that nobody agreed to.
    """
    from dmdata.money import ledger
    from dmdata.release import opening

    headers = [Priced(name, price, is_paid=True) for name, price in opening.price_headers(names, terms)]
    with contextlib.ExitStack() as stack:
        if max_cost is not None:
            stack.enter_context(ledger.budget(usd=max_cost))
        if headers and dry_run and not yes:
            print_estimate(talk, headers, terms)
            talk.remark("these are the headers alone: add -y to read them, and to see the price of all")
            yield False
            return
        if headers:
            what = f"the header of {headers[0].name}" if len(headers) == 1 else f"{len(headers)} headers"
            agree_to(talk, headers, f"reading {what}", terms, yes=yes)
        yield True


def agree_to(talk: Talk, paid: list[Priced], what: str, terms: "Terms", *, yes: bool) -> float:
    """Check that a price fits the budget, and ask whether it may be spent; returns it, in dollars."""
    from dmdata.money import ledger
    from dmdata.release import pricing

    price = pricing.total_of([part.estimate for part in paid], terms)
    ledger.Ledger(ledger.home()).check(
        usd=price.usd, artifact=paid[0].name if len(paid) == 1 else f"{len(paid)} artifacts"
    )
    ask_consent(talk, price, what=what, agreed=yes)
    return price.usd


def print_estimate(talk: Talk, priced: list[Priced], terms: "Terms") -> None:
    """Print what reads would cost, part by part and in total, the cheapest way and the fastest."""
    from dmdata.money.prices import Destination, prices_in_words, readable_usd
    from dmdata.release import pricing

    def facts(way: "Quote") -> dict[str, Any]:
        return {
            "bytes": way.n_bytes,
            "requests": way.n_requests,
            "usd": way.usd,
            "usd_low": way.usd_low,
            "usd_high": way.usd_high,
            "seconds": way.seconds,
        }

    def both(price: "Estimate") -> dict[str, Any]:
        return facts(price.cheapest) | {"fastest": facts(price.fastest)}

    total = pricing.total_of([part.estimate for part in priced], terms)
    data = both(total) | {
        "to": str(total.destination),
        "price_date": total.price_date,
        "artifacts": [{"name": part.name} | both(part.estimate) for part in priced],
    }
    table = headed_table("artifact", "bytes", "requests", "dollars", "seconds", right=slice(1, None))
    for part in priced:
        table.add_row(part.name, *_quote_cells(part.estimate.cheapest))
        if part.estimate.fastest != part.estimate.cheapest:
            table.add_row("  fastest", *_quote_cells(part.estimate.fastest))
    table.add_section()
    table.add_row("total, cheapest", *_quote_cells(total.cheapest), style="bold")
    if total.fastest != total.cheapest:
        table.add_row("total, fastest", *_quote_cells(total.fastest))
    talk.print_data(data, table)
    if total.n_requests and not any(part.is_paid for part in priced):
        talk.remark("reading these is free where they are; the figures say what the same costs at the prices below")
    link = terms.link
    low, high = readable_usd(total.usd_low), readable_usd(total.usd_high)
    open_ended = low != high and total.destination is Destination.INTERNET
    talk.remark(
        (f"between {low} and {high}" if low != high else high)
        + f", at {prices_in_words()} to {total.destination}; seconds assume {link.n_connections} connections of "
        f"{link.bytes_per_second / 1e6:g} MB/s, and {link.n_for_short_ranges} short requests at once"
        + ("; estimate's --used-gib and --free-tier narrow it" if open_ended else "")
    )


@click.command("get")
@click.argument("name", shell_complete=complete_artifacts)
@click.option("-o", "--output", metavar="PATH", help="File or folder. [default: the object's own name]")
@click.option("--select", metavar="INDEX", help='Save this part of an array alone, as "0:1000,42", in a .npy.')
@options_spending
@talk_options
def get(
    talk: Talk,
    name: str,
    output: str | None,
    select: str | None,
    to: str | None,
    catalog: str | None,
    **spending: Any,
) -> None:
    """Download the whole object at NAME, a catalog name or an address, unchanged. Run again to resume.

    With --select, read that part of the array alone and save it as a .npy, in C order. It has to fit into memory;
    `mirror` copies what does not. A file that is there is compared with what is known of the object, by size and by
    the digest and ETag of an earlier download, and is not downloaded again if it is the same.
    """
    from dmdata.release import copies, opening, pricing

    terms, chosen = opening.in_force(to, catalog)
    with contextlib.ExitStack() as stack:
        if select is not None:
            if not stack.enter_context(headers_paid_for(talk, [name], terms, **spending)):
                return
            found = opening.look_up([name], terms, catalog=chosen)
            part = copies.Slice.planned(found, select, output, terms)
            if (how := part.found_there()) is not None:
                _print_file(talk, part.path, how)
                return
            priced = Priced.all_of(part.prices(), terms)
            what = f"reading {select} of {part.artifact.name}"
            if stack.enter_context(paid_for(talk, priced, what, terms, **spending)):
                with _bars(talk, priced) as bars:
                    copies.run_slice(part, progress=lambda done, total: bars.complete(part.artifact.name, done, total))
                _print_file(talk, part.path)
            return
        if is_address(name):
            # of a member the whole object is meant
            url = url_and_member(name)[0]
            if not stack.enter_context(headers_paid_for(talk, [url], terms, **spending)):
                return
            artifact, state = opening.describe_whole(url, terms, catalog=chosen)
        else:
            artifact, state = opening.object_named(name, chosen), None
        planned = copies.Download(artifact, pricing.download_path(artifact, output), terms, state)
        if (how := planned.found_there()) is not None:
            _print_file(talk, planned.path, how)
            return
        priced = Priced.all_of(planned.prices(), terms)
        if not stack.enter_context(paid_for(talk, priced, f"downloading {artifact.name}", terms, **spending)):
            return
        with _bars(talk, priced) as bars:
            path = copies.run_download(planned, progress=lambda done, total: bars.complete(artifact.name, done, total))
    _print_file(talk, path)


def _print_file(talk: Talk, path: "Path", how: str | None = None) -> None:
    """Print what was downloaded, or that it was there already and how that is known."""
    from dmdata.money.prices import readable_bytes

    n_bytes = path.stat().st_size
    facts = {"path": str(path), "bytes": n_bytes, "present": how is not None}
    talk.print_data(facts, plain_table((str(path), readable_bytes(n_bytes))))
    if how is not None:
        talk.remark(f"{path} is there already, {how}; nothing was downloaded")


@click.command("mirror")
@click.argument("patterns", nargs=-1, shell_complete=complete_artifacts)
@click.argument("destination", required=False)
@click.option("--register", metavar="PATH", help="Have names open what the mirror at PATH holds; copy nothing.")
@click.option("--forget", metavar="PATH", help="Have names no longer open the mirror at PATH; copy and remove nothing.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave these out; may be given several times.")
@click.option("--select", metavar="INDEX", help='Rows and columns of each artifact, as "0:1000,0:50".')
@click.option(
    "--memory",
    type=click.IntRange(min=1),
    metavar="MIB",
    default=DEFAULT_MEMORY_MIB,
    show_default=True,
    help="Limit on the memory of the copy; on a cluster, of each thread.",
)
@click.option("--scheduler", metavar="ADDRESS", help="Copy on the Dask cluster of this scheduler, as tcp://host:8786.")
@options_spending
@talk_options
def mirror(
    talk: Talk,
    patterns: tuple[str, ...],
    destination: str | None,
    register: str | None,
    forget: str | None,
    exclude: tuple[str, ...],
    select: str | None,
    memory: int,
    scheduler: str | None,
    to: str | None,
    catalog: str | None,
    **spending: Any,
) -> None:
    """Copy artifacts into a chunked Zarr store at DESTINATION, a path or s3://bucket/prefix. Run again to resume.

    One exact name or address makes DESTINATION that array; globs or several make it a group. DESTINATION is a catalog,
    too. From then on the names of what was copied whole open the copy, for nothing; see also --register and --forget.
    """
    from dmdata.release import copies, mirrors, opening

    if register is not None or forget is not None:
        if patterns or destination or (register is not None and forget is not None):
            raise click.UsageError("--register PATH and --forget PATH stand alone: nothing is copied")
        path = str(register if forget is None else forget)
        names = mirrors.forget_mirror(path) if register is None else mirrors.register_mirror(path, catalog=catalog)
        talk.print_data({"path": path, "artifacts": names}, plain_table((path, f"{len(names)} artifacts")))
        return
    if not patterns or destination is None:
        raise click.UsageError("name what to copy, then DESTINATION")
    terms, chosen = opening.in_force(to, catalog)
    with contextlib.ExitStack() as stack:
        if not stack.enter_context(headers_paid_for(talk, patterns, terms, **spending)):
            return
        found = opening.look_up(patterns, terms, exclude=exclude, catalog=chosen)
        plan = copies.plan_mirror(patterns, found, destination, terms, key=select, memory_bytes=memory << 20)
        priced = Priced.all_of(plan.prices(), terms)
        # a query of an address may hold a secret
        what = ", ".join(str(opening.address_named(p)) if is_address(p) else p for p in patterns)
        if not stack.enter_context(paid_for(talk, priced, f"mirroring {what}", terms, **spending)):
            return
        with _bars(talk, priced) as bars:
            copies.run_mirror(plan, scheduler=scheduler, received=bars.received)
    names = [part.artifact.name for part in plan.parts]
    table = plain_table((destination, f"{len(names)} artifacts"))
    talk.print_data({"destination": destination, "artifacts": names}, table)


@click.command("verify")
@click.argument("destination")
@click.argument("names", nargs=-1)
@click.option("--sample", metavar="USD|N%", help="Also read this much of the source at random: dollars, or 5% of rows.")
@click.option("--whole", is_flag=True, help="Also read all of the source.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sample.")
@click.option("--repair", is_flag=True, help="Mark bad blocks as missing, for the same mirror command to make again.")
@options_spending
@talk_options
def compare(
    talk: Talk,
    destination: str,
    names: tuple[str, ...],
    sample: str | None,
    whole: bool,
    seed: int,
    repair: bool,
    to: str | None,
    catalog: str | None,
    **spending: Any,
) -> None:
    """Compare the mirror at DESTINATION with its source; exit with 3 where they differ.

    By default only recorded digests are compared, which is free. Comparing with a sample or the whole of the source
    costs what reading it costs. With NAMES, only these arrays of a group are compared.
    """
    from dmdata.release import opening
    from dmdata.release.verification import plan_checks, run_checks

    terms, chosen = opening.in_force(to, catalog)
    checks = plan_checks(destination, names, terms, sample=sample, whole=whole, seed=seed, catalog=chosen)
    priced = [Priced(check.name, check.estimate, check.is_paid) for check in checks]
    with paid_for(talk, priced, f"comparing {destination} with its source", terms, **spending) as agreed:
        if not agreed:
            return
        units = defaultdict(lambda: "rows", {f"{check.name}: digests": "blocks" for check in checks})
        with talk.stages(units) as show:
            comparisons = run_checks(checks, repair=repair, progress=show)
    columns = ("artifact", "blocks", "missing", "bad", "rows compared", "verdict")
    table = headed_table(*columns, right=slice(1, 5))
    for found in comparisons:
        counts = (found.n_blocks, found.n_missing, len(found.bad), found.n_rows_compared)
        table.add_row(found.name, *(f"{count:,}" for count in counts), "same" if found.is_same else "not the same")
    talk.print_data(
        {"same": all(found.is_same for found in comparisons), "artifacts": [_facts(f) for f in comparisons]}, table
    )
    if faults := [words for found in comparisons for words in _in_words(found, destination, repaired=repair)]:
        raise IntegrityError("; ".join(faults), url=destination)


def _facts(found: "Comparison") -> dict[str, Any]:
    return {
        "name": found.name,
        "place": found.place,
        "same": found.is_same,
        "blocks": found.n_blocks,
        "missing": found.n_missing,
        "damaged": list(found.damaged),
        "differing": list(found.differing),
        "faults": list(found.faults),
        "rows_compared": found.n_rows_compared,
    }


def _in_words(found: "Comparison", destination: str, *, repaired: bool) -> Iterator[str]:
    """List what is wrong with a mirror, and what to do."""
    mirrored = "mirror it again, with the command that made it"
    yield from (f"{found.name}: {fault}" for fault in found.faults)
    for what, numbers in (("damaged", found.damaged), ("not what the source holds", found.differing)):
        if numbers:
            shown = ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
            remedy = mirrored if repaired else f"run dmdata verify {shlex.quote(destination)} --repair, then {mirrored}"
            yield f"{found.name}: {len(numbers)} of {found.n_blocks} blocks are {what} ({shown}); {remedy}"
    if found.n_missing:
        yield (
            f"{found.name}: {found.n_missing} of {found.n_blocks} blocks are not mirrored yet; to resume, {mirrored}"
        )


def _quote_cells(way: Any) -> tuple[str, str, str, str]:
    from dmdata.money.prices import readable_bytes, readable_usd

    return readable_bytes(way.n_bytes), f"{way.n_requests:,}", readable_usd(way.usd), f"{way.seconds:,.1f}"


class _Bars:
    """A bar for each artifact, and one for all where there are several: bytes fetched of those planned, and dollars."""

    def __init__(self, bars: "Progress", priced: list[Priced]) -> None:
        self._bars = bars
        self._tasks: dict[str, Task] = {}
        self._arrived: dict[str, float] = {}
        # of several, each is timed from its first bytes
        is_alone = len(priced) == 1
        for part in priced:
            usd = part.estimate.usd if part.is_paid else 0.0
            self._tasks[part.name] = self._add(part.name, part.estimate.n_bytes, usd, start=is_alone)
        self._total: Task | None = None
        if not is_alone:
            tasks = list(self._tasks.values())
            n_bytes, usd = (sum(task.fields[field] for task in tasks) for field in ("n_bytes", "usd"))
            self._total = self._add("total", n_bytes, usd, sums_up=True)

    def _add(self, name: str, n_bytes: int, usd: float, *, start: bool = True, **fields: bool) -> "Task":
        made = self._bars.add_task(name, start=start, total=n_bytes, n_bytes=n_bytes, usd=usd, **fields)
        return self._bars.tasks[self._bars.task_ids.index(made)]

    def received(self, name: str, n_bytes: int) -> None:
        """Count bytes that have just arrived."""
        task = self._tasks[name]
        self._bars.start_task(task.id)  # once
        self._bars.advance(task.id, n_bytes)
        self._arrived[name] = task.elapsed or 0.0
        if self._total is not None:
            self._bars.advance(self._total.id, n_bytes)

    def finish(self) -> None:
        """Show bars as full, with what arrived: cached headers, and ranges fetched by an earlier run, did not."""
        from dmdata.reading.one_line import usd_so_far

        for task in self._bars.tasks:
            n_bytes, usd = task.completed, usd_so_far(task)
            self._bars.update(task.id, total=n_bytes or 1, completed=n_bytes or 1, n_bytes=n_bytes or 1, usd=usd)
            task.finished_time = self._arrived.get(task.description, task.finished_time)

    def complete(self, name: str, n_bytes: int, n_in_total: int) -> None:
        """Show how many bytes are complete."""
        self._bars.update(self._tasks[name].id, completed=n_bytes, total=n_in_total)


@contextlib.contextmanager
def _bars(talk: Talk, priced: list[Priced]) -> Iterator[_Bars]:
    from dmdata.reading.one_line import Bytes, Dollars, Speed

    with talk.progress(Bytes(), Dollars(), Speed()) as bars:
        shown = _Bars(bars, priced)
        yield shown
        shown.finish()
