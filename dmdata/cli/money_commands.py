"""Commands about money and settings: ``spend``, ``prices``, ``config``."""

import math
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from dmdata.cli.console import Talk, talk_options
from dmdata.cli.tables import headed_table
from dmdata.home import config_path

if TYPE_CHECKING:
    from rich.table import Table

    from dmdata.money.ledger import Grouping, Spending

_WHAT = {
    "date": "day the prices were looked up",
    "usd_per_get": "a GET or HEAD request",
    "usd_per_list": "a LIST request, of up to 1,000 objects",
    "free_gib": "GB to the internet that are free each month",
    "internet_tiers": "GB of the month up to which a price holds, and dollars a GB",
    "cross_region_usd_per_gib": "lowest and highest dollars a GB between US regions",
}


_PRICES = ("date", "usd_per_get", "usd_per_list", "free_gib", "internet_tiers", "cross_region_usd_per_gib")
SETTINGS = (
    *(
        "max_cost",
        "catalog",
        "to",
        "used_gib",
        "free_tier",
        "cache_gib",
        "offline",
        "local_mirrors",
        "progress",
        "progress_seconds",
    ),
    *(f"{of}.{price}" for of in ("prices", "endpoint_prices") for price in _PRICES),
    *(f"link.{part}" for part in ("seconds_to_first_byte", "bytes_per_second", "n_connections")),
)
"""As `dmdata.settings.names_of_settings` lists them, known without loading it."""

_NAMES = f"NAME is one of {', '.join(SETTINGS)}. `dmdata config` says what each is."


def complete_settings(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Offer the names of settings that begin with what was typed."""
    del context, parameter
    return [name for name in SETTINGS if name.startswith(incomplete)]


@click.command("spend")
@click.option(
    "--by",
    multiple=True,
    type=click.Choice(["day", "month", "artifact", "destination", "state", "charged"]),
    help="Group by; may be given several times. 'charged' is what sources confirmed by x-amz-request-charged.",
)
@click.option("--since", type=click.DateTime(["%Y-%m-%d"]), metavar="DAY", help="Only from this day on, in UTC.")
@click.option("--month", type=click.DateTime(["%Y-%m"]), metavar="YYYY-MM", help="Only of this month, in UTC.")
@talk_options
def spend(talk: Talk, by: "tuple[Grouping, ...]", since: datetime | None, month: datetime | None) -> None:
    """Show what was spent through this machine's ledger: an upper bound of the bill, at the prices in force then.

    Where no transfer broke it is exact. Next to it stand what the sources themselves confirmed as charged, and what is
    left of the month's budget.
    """
    from dmdata.money.ledger import Ledger, Spending, home
    from dmdata.money.prices import readable_usd

    books = Ledger(home())
    nothing = Spending(0.0, 0, 0, 0)
    first_day, of_month = f"{since:%Y-%m-%d}" if since else "", f"{month:%Y-%m}" if month else ""

    def spent(grouping: "Grouping | None" = None) -> dict[str, Spending]:
        return books.spent(by=grouping, since=first_day, month=of_month)

    total = spent().get("total", nothing)
    groups = {grouping: spent(grouping) for grouping in by}
    charged = spent("charged")
    now = _month_facts(books.spent(by="month"))
    tables = [_spending_table(grouping, parts) for grouping, parts in groups.items()]
    tables.append(_spending_table("", {"total": total}))
    data = _spending_facts(total) | {"charged": {name: _spending_facts(part) for name, part in charged.items()}}
    data["month"] = now
    for grouping, parts in groups.items():
        data[f"by_{grouping}"] = {name: _spending_facts(part) for name, part in parts.items()}
    talk.print_data(data, *tables)
    said = ", ".join(f"{readable_usd(part.usd)} {name}" for name, part in charged.items())
    talk.remark(f"ledger: {books.path}" + (f"; confirmed by the sources: {said}" if said else ""))
    spent_of_month = f"{now['month']}: {readable_usd(now['usd'])}"
    if now["limit_usd"] is None:
        talk.remark(f"{spent_of_month}; no budget for the month is set: dmdata config set max_cost 5.00")
    else:
        talk.remark(f"{spent_of_month} of {readable_usd(now['limit_usd'])}, {readable_usd(now['left_usd'])} left")


def _month_facts(by_month: "dict[str, Spending]") -> dict[str, Any]:
    from dmdata.settings import settings

    month, limit_usd = f"{datetime.now(UTC):%Y-%m}", settings().max_cost
    usd = by_month[month].usd if month in by_month else 0.0
    left_usd = None if limit_usd is None else max(limit_usd - usd, 0.0)
    return {"month": month, "usd": usd, "limit_usd": limit_usd, "left_usd": left_usd}


def _spending_table(grouping: str, parts: "dict[str, Spending]") -> "Table":
    from dmdata.money.prices import readable_bytes, readable_usd

    table = headed_table(grouping, "dollars", "bytes", "requests", "reads", right=slice(1, None))
    for name, part in parts.items():
        sizes = (readable_bytes(part.n_bytes), f"{part.n_requests:,}", f"{part.n_reads:,}")
        table.add_row(name, readable_usd(part.usd), *sizes)
    return table


def _spending_facts(part: "Spending") -> dict[str, Any]:
    return {"bytes": part.n_bytes, "requests": part.n_requests, "usd": part.usd, "reads": part.n_reads}


@click.group("prices", invoke_without_command=True)
@talk_options
def prices(talk: Talk) -> None:
    """Show the prices that dollars are computed with: their date, each price, and what the config file overrides."""
    _show_prices(talk)


@prices.command("show")
@talk_options
def show(talk: Talk) -> None:
    """Show the price table in force, as `prices` alone does."""
    _show_prices(talk)


def _show_prices(talk: Talk) -> None:
    from dmdata.money.prices import GIB, PRICES, Destination, price_table, prices_in_words, readable_usd
    from dmdata.settings import settings

    in_force = price_table()
    overridden = settings().prices.model_dump(exclude_none=True)
    listed = f"list prices of {PRICES.date}"
    table = headed_table("price", "value", "what it is", "from")
    for name, what in _WHAT.items():
        origin = str(config_path()) if name in overridden else listed
        table.add_row(name, _written(getattr(in_force, name)), what, origin)
    destinations: dict[str, dict[str, float | None]] = {}
    for to in Destination:
        usd_per_gib, gap = in_force.usd_per_byte(to) * GIB, in_force.break_even_gap_bytes(to)
        worth = "any number of bytes" if math.isinf(gap) else f"{gap:,.0f} bytes"
        about = f"at most; a request costs as much as {worth}, so smaller gaps are fetched"
        table.add_row(f"to {to}", f"{readable_usd(usd_per_gib)} a GB", about, "")
        destinations[str(to)] = {"usd_per_gib": usd_per_gib, "break_even_gap_bytes": _finite(gap)}
    data = {name: _finite(getattr(in_force, name)) for name in _WHAT}
    data |= {"destinations": destinations, "overridden": sorted(overridden), "config": str(config_path())}
    talk.print_data(data, table)
    talk.remark(
        f"{prices_in_words()}, US regions, one GB being 2^30 bytes; yours differ? "
        "dmdata config set prices.usd_per_get 0.0000004"
    )


@click.group("config", invoke_without_command=True)
@talk_options
def config(talk: Talk) -> None:
    """Show the settings in force, and where each comes from: flag before environment before file before default."""
    from dmdata.settings import settings, settings_in_force

    table = headed_table("setting", "value", "from", "what it is")
    listed = settings_in_force()
    fields = type(settings()).model_fields
    for setting in listed:
        table.add_row(setting.name, _written(setting.value), setting.origin, fields[setting.name].description)
    facts = {setting.name: {"value": _finite(setting.value), "from": setting.origin} for setting in listed}
    talk.print_data({"path": str(config_path()), "settings": facts}, table)


@config.command("path")
@talk_options
def path(talk: Talk) -> None:
    """Print where the config file is, or would be."""
    if talk.as_json:
        talk.print_data({"path": str(config_path())})
    else:
        talk.print_text(f"{config_path()}\n")


_NAME = click.argument("name", shell_complete=complete_settings)


@config.command("get", epilog=_NAMES)
@_NAME
@talk_options
def get(talk: Talk, name: str) -> None:
    """Print the value of NAME that is in force, as `set` takes it; an empty line if it is not set."""
    from dmdata.settings import setting_in_force

    found = setting_in_force(name)
    if talk.as_json:
        talk.print_data({"name": name, "value": _finite(found.value), "from": found.origin})
        return
    talk.print_text(f"{_as_set(found.value)}\n")
    if found.value is None:
        talk.remark(f"{name} is not set")


@config.command("set", epilog=_NAMES)
@_NAME
@click.argument("value")
@talk_options
def set_(talk: Talk, name: str, value: str) -> None:
    """Write NAME: VALUE to the config file, as max_cost 5, or prices.usd_per_get 0.0000004.

    VALUE is read as YAML. Comments in the file are not kept.
    """
    from dmdata.settings import set_in_file

    set_in_file(name, value)
    _print_written(talk, name, f"{name} is set in {config_path()}")


@config.command("unset")
@_NAME
@talk_options
def unset(talk: Talk, name: str) -> None:
    """Take NAME out of the config file."""
    from dmdata.settings import set_in_file

    set_in_file(name, None)
    _print_written(talk, name, f"{name} is not set in {config_path()}")


def _print_written(talk: Talk, name: str, done: str) -> None:
    variable = f"DMDATA_{name.upper()}"
    if talk.as_json:
        talk.print_data({"name": name, "path": str(config_path())})
    talk.remark(done + (f", but {variable} is set too and comes first" if os.environ.get(variable) else ""))


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_written(part)}" for name, part in value.items())
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return "; ".join(f"{'above' if math.isinf(limit) else f'to {limit:,.0f}'}: ${usd:g}" for limit, usd in value)
    if isinstance(value, tuple):
        return " to ".join(f"${part:g}" for part in value)
    if isinstance(value, float):
        return f"{value:.10f}".rstrip("0").rstrip(".")
    return "" if value is None else str(value)


def _as_set(value: Any) -> str:
    """Write a value as `config set` takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, dict | tuple):
        return _written(value)
    import yaml

    return yaml.safe_dump(_plain(value), default_flow_style=True, width=math.inf).strip()


def _plain(value: Any) -> Any:
    """Make lists of tuples, which YAML does not have."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def _finite(value: Any) -> Any:
    """Make a value fit for JSON, which has no infinity: None stands for it."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and math.isinf(value) else value
