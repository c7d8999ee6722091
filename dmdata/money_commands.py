"""Commands about money and settings: ``spend``, ``prices``, ``config``."""

import math
from typing import Any

import click
from rich.table import Table

from dmdata import ledger
from dmdata.console import Talk, talk_options
from dmdata.prices import PRICES, Destination, price_table, readable_bytes, readable_usd
from dmdata.settings import config_path, set_in_file, settings, settings_in_force

_WHAT = {
    "usd_per_get": "a GET or HEAD request",
    "free_gib": "GB to the internet that are free each month",
    "internet_tiers": "GB of the month up to which a price holds, and dollars a GB",
    "cross_region_usd_per_gib": "lowest and highest dollars a GB between US regions",
}


@click.command("spend")
@click.option(
    "--by",
    type=click.Choice(["day", "month", "artifact", "destination", "state", "charged"]),
    help="Group by; 'charged' is what sources confirmed by x-amz-request-charged.",
)
@talk_options
def spend(talk: Talk, by: ledger.Grouping | None) -> None:
    """Show what was spent through this machine's ledger: an upper bound of the bill, at list prices.

    Where no transfer broke it is exact. What the sources themselves said of charging is set beside it.
    """
    books = ledger.Ledger(ledger.home())
    nothing = ledger.Spending(0.0, 0, 0, 0)
    total = books.spent().get("total", nothing)
    groups = books.spent(by=by) if by else {}
    charged = books.spent(by="charged")
    table = Table(by or "", "dollars", "bytes", "requests", "reads", box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, part in (groups | {"total": total}).items():
        table.add_row(
            name, readable_usd(part.usd), readable_bytes(part.n_bytes), f"{part.n_requests:,}", f"{part.n_reads:,}"
        )
    data = _spending_facts(total) | {"charged": {name: _spending_facts(part) for name, part in charged.items()}}
    if by:
        data[f"by_{by}"] = {name: _spending_facts(part) for name, part in groups.items()}
    talk.print_data(data, table)
    said = ", ".join(f"{readable_usd(part.usd)} {name}" for name, part in charged.items())
    talk.remark(f"ledger: {books.path}" + (f"; by the sources' own word: {said}" if said else ""))


@click.group("prices")
def prices() -> None:
    """Show the prices that dollars are reckoned with."""


@prices.command("show")
@talk_options
def show(talk: Talk) -> None:
    """Show the price table in force: its date, each price, and what the config file overrides."""
    table_in_force = price_table()
    overridden = settings().prices.model_dump(exclude_none=True)
    table = Table("price", "value", "what it is", "from", box=None, header_style="bold")
    origins = {name: str(config_path()) if name in overridden else f"list prices of {PRICES.date}" for name in _WHAT}
    for name, what in _WHAT.items():
        table.add_row(name, _written(getattr(table_in_force, name)), what, origins[name])
    for to in Destination:
        gap = table_in_force.break_even_gap_bytes(to)
        usd = f"{readable_usd(table_in_force.usd_per_byte(to) * (1 << 30))} a GB"
        worth = "any number of bytes" if math.isinf(gap) else f"{gap:,.0f} bytes"
        table.add_row(f"to {to}", usd, f"at most; a request costs as much as {worth}", "")
    destinations = {
        str(to): {
            "usd_per_gib": table_in_force.usd_per_byte(to) * (1 << 30),
            "break_even_gap_bytes": None if math.isinf(gap := table_in_force.break_even_gap_bytes(to)) else gap,
        }
        for to in Destination
    }
    tiers = [[None if math.isinf(limit) else limit, usd] for limit, usd in table_in_force.internet_tiers]
    data: dict[str, Any] = {name: getattr(table_in_force, name) for name in _WHAT}
    data |= {
        "date": table_in_force.date,
        "internet_tiers": tiers,
        "destinations": destinations,
        "overridden": sorted(overridden),
    }
    talk.print_data(data, table)
    talk.remark(
        f"prices of {table_in_force.date}, US regions, one GB being 2^30 bytes; yours differ? "
        "dmdata config set prices.usd_per_get 0.0000004"
    )


@click.group("config", invoke_without_command=True)
@talk_options
@click.pass_context
def config(context: click.Context, talk: Talk) -> None:
    """Show the settings in force, and where each comes from: flag before environment before file before default."""
    if context.invoked_subcommand is not None:
        return
    table = Table("setting", "value", "from", "what it is", box=None, header_style="bold")
    listed = settings_in_force()
    fields = type(settings()).model_fields
    for setting in listed:
        table.add_row(setting.name, _written(setting.value), setting.origin, fields[setting.name].description)
    facts = {setting.name: {"value": setting.value, "from": setting.origin} for setting in listed}
    talk.print_data({"path": str(config_path()), "settings": facts}, table)


@config.command("path")
def path() -> None:
    """Print where the config file is, or would be."""
    click.echo(config_path())


@config.command("set")
@click.argument("name")
@click.argument("value")
@talk_options
def set_(talk: Talk, name: str, value: str) -> None:
    """Write NAME: VALUE to the config file, as max_cost 5, or prices.usd_per_get 0.0000004."""
    set_in_file(name, value)
    talk.remark(f"{name} is set in {config_path()}")


@config.command("unset")
@click.argument("name")
@talk_options
def unset(talk: Talk, name: str) -> None:
    """Take NAME out of the config file."""
    set_in_file(name, None)
    talk.remark(f"{name} is not set in {config_path()}")


def _written(value: Any) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return "; ".join(f"{'above' if math.isinf(limit) else f'to {limit:,.0f}'}: ${usd:g}" for limit, usd in value)
    if isinstance(value, tuple):
        return " to ".join(f"${part:g}" for part in value)
    if isinstance(value, float):
        return f"{value:.10f}".rstrip("0").rstrip(".")
    return "" if value is None else str(value)


def _spending_facts(part: ledger.Spending) -> dict[str, Any]:
    return {"bytes": part.n_bytes, "requests": part.n_requests, "usd": part.usd, "reads": part.n_reads}
