"""What was spent and what may still be: reservations, receipts and budgets in one SQLite file.

Money is reserved before the first byte and settled on what was received after the last. Amounts are whole
pico-dollars, and every reservation is one exclusive transaction, so that no number of threads, processes or hosts
that share the file can pass a budget together, by however little.

Three budgets hold, the tightest decides: dollars a calendar month (``DMDATA_MAX_COST``); dollars of one command with
all its workers (``--max-cost``); dollars of one ``with dmdata.budget(usd=...)`` block, with the processes started in
it. With none set, one dollar a process.

A long read draws on its reservation as it goes, before it sends the next requests. When a process is killed, what it
had drawn stays counted, since nobody can know what of it was billed: its reads show as ``lost``, an upper bound. The
rest of the reservation expires and is free again.
"""

import contextlib
import json
import math
import os
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

from dmdata.errors import BudgetError, DmdataError, FactualError, SettingsError
from dmdata.home import config_path, home
from dmdata.money.budgets import Budget, Held, close_here, held, is_alive, open_here, process_name, put_in_force
from dmdata.money.commits import FAILURES, Commits, Work
from dmdata.settings import Settings, settings
from dmdata.shown import as_html, readable_bytes, readable_usd

__all__ = ["Amount", "Grouping", "Ledger", "Reservation", "Spending", "budget", "home"]

DEFAULT_PROCESS_USD = 1.0

T = TypeVar("T")

Grouping: TypeAlias = Literal["day", "month", "artifact", "destination", "state", "charged"]

_PICO = 10**12
_SCHEMA_VERSION = 3
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS budget (scope TEXT PRIMARY KEY, committed_pico INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS reading (id TEXT PRIMARY KEY, "
    "state TEXT NOT NULL CHECK (state IN ('reserved', 'settled', 'lost', 'expired')), at REAL NOT NULL, "
    "process TEXT NOT NULL, artifact TEXT NOT NULL, destination TEXT NOT NULL, pico INTEGER NOT NULL, "
    "n_bytes INTEGER NOT NULL, n_requests INTEGER NOT NULL, scopes TEXT NOT NULL, drawn_pico INTEGER NOT NULL, "
    "drawn_bytes INTEGER NOT NULL, drawn_requests INTEGER NOT NULL, charged INTEGER)",
    "CREATE TABLE IF NOT EXISTS block (name TEXT PRIMARY KEY, process TEXT NOT NULL, pico INTEGER NOT NULL, "
    "inside TEXT NOT NULL, at REAL NOT NULL, ended REAL)",
    "CREATE INDEX IF NOT EXISTS open_block ON block (name) WHERE ended IS NULL",
    "CREATE INDEX IF NOT EXISTS open_reading ON reading (state) WHERE state = 'reserved'",
)
# the first form of the ledger knew no draws: all that was reserved counts as drawn
_FROM_FIRST_FORM = (
    "INSERT INTO reading SELECT id, state, at, process, artifact, destination, pico, n_bytes, n_requests, '[]', "
    "pico, n_bytes, n_requests, NULL FROM read",
    "DROP TABLE read",
)
_GROUPS: dict[Grouping | None, str] = {
    None: "'total'",
    "day": "date(at, 'unixepoch')",
    "month": "strftime('%Y-%m', at, 'unixepoch')",
    "artifact": "artifact",
    "destination": "destination",
    "state": "state",
    "charged": "CASE charged WHEN 1 THEN 'confirmed' WHEN 0 THEN 'not charged' ELSE 'unknown' END",
}


@dataclass(frozen=True, slots=True)
class Spending:
    """What went through a ledger: an upper bound of the bill, exact where no transfer broke.

    Attributes
    ----------
    usd : float
        Dollars at list price.
    n_requests, n_bytes : int
        Sent and received; where a transfer broke, asked for; for reads of killed processes, drawn.
    n_reads : int
        Reads behind these figures.
    """

    usd: float
    n_requests: int
    n_bytes: int
    n_reads: int

    def _repr_html_(self) -> str:
        facts = {"dollars, at most": readable_usd(self.usd), "bytes": readable_bytes(self.n_bytes)}
        return as_html("Spending", facts | {"requests": self.n_requests, "reads": self.n_reads})


@dataclass(frozen=True, slots=True)
class Amount:
    """Dollars, bytes and requests of a part of a read."""

    usd: float
    n_bytes: int
    n_requests: int


@dataclass(frozen=True, slots=True)
class Reservation:
    """Money set aside for one read; settled once, by what was received."""

    ledger: "Ledger"
    id: str
    scopes: dict[str, int]
    artifact: str
    pico: int

    def draw(self, amount: Amount) -> None:
        """Note what will be sent next of what was reserved: what would stay counted if this process were killed."""
        self.ledger.commit(lambda connection: self._draw(connection, amount))

    def extend(self, amount: Amount) -> None:
        """Set more aside, and draw it, for a request that must be sent again.

        Raises
        ------
        BudgetError
            If a budget would be passed; what was reserved stays reserved.
        """
        pico = _to_pico(amount.usd)

        def work(connection: sqlite3.Connection) -> None:
            _check(connection, self.scopes, pico, artifact=self.artifact)
            _count(connection, self.scopes, pico)
            connection.execute("UPDATE reading SET pico = pico + ? WHERE id = ?", (pico, self.id))
            self._draw(connection, amount)

        self.ledger.commit(work)

    def settle(self, *, usd: float, n_bytes: int, n_requests: int, charged: bool | None = None) -> None:
        """Replace the reservation by its receipt.

        Where that frees nothing it is written along with the next reservation, or within a moment: of a process that is
        killed before, the same is counted.

        Parameters
        ----------
        usd : float
        n_bytes, n_requests : int
        charged : bool or None
            Whether the source states that it charges its reader (``x-amz-request-charged``); None if it was not asked.
        """
        pico = _to_pico(usd)
        at = time.time()

        def work(connection: sqlite3.Connection) -> None:
            settled = (
                "UPDATE reading SET state = 'settled', at = ?, pico = ?, n_bytes = ?, n_requests = ?, charged = ? "
                "WHERE id = ?"
            )
            receipt = (at, pico, n_bytes, n_requests, charged, self.id)
            if pico == self.pico and connection.execute(f"{settled} AND pico = ?", (*receipt, pico)).rowcount:
                return
            row = connection.execute("SELECT pico FROM reading WHERE id = ?", (self.id,)).fetchone()
            if row is None:
                raise DmdataError(f"{self.ledger.path} has lost reservation {self.id}; was it removed meanwhile?")
            if row[0] != pico:
                _release(connection, self.scopes, row[0] - pico)
            connection.execute(settled, receipt)

        if pico == self.pico:
            self.ledger.commit_later(work)
        else:
            self.ledger.commit(work)

    def _draw(self, connection: sqlite3.Connection, amount: Amount) -> None:
        connection.execute(
            "UPDATE reading SET at = ?, drawn_pico = drawn_pico + ?, drawn_bytes = drawn_bytes + ?, "
            "drawn_requests = drawn_requests + ? WHERE id = ?",
            (time.time(), _to_pico(amount.usd), amount.n_bytes, amount.n_requests, self.id),
        )


class Ledger:
    """The ledger in one directory, which is made when first written to.

    Parameters
    ----------
    directory : Path
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / "ledger.sqlite"

    def reserve(
        self,
        *,
        usd: float,
        n_bytes: int,
        n_requests: int,
        artifact: str,
        destination: str,
        drawn: Amount | None = None,
        carried: Sequence[Budget] = (),
        known: Settings | None = None,
    ) -> Reservation:
        """Set money aside under every budget that holds here.

        Parameters
        ----------
        usd : float
            Upper bound of the read's price.
        n_bytes, n_requests : int
            As planned.
        drawn : Amount, optional
            What will be sent first, see `Reservation.draw`; by default all of it.
        artifact, destination : str
            For the books.
        carried : sequence of Budget
            In force where the work was sent from; they hold too, even if they have ended.
        known : Settings, optional
            Those in force, where they have just been read; by default they are read.

        Raises
        ------
        BudgetError
            If a budget would be passed; nothing is reserved. `remaining_usd` and `limit_usd` are those of the budget.
        DmdataError
            If this process does not share the ledger of who sent the work, or the ledger cannot be used.
        """
        name, pico = uuid.uuid4().hex, _to_pico(usd)
        drawn_picos = _picos(drawn or Amount(usd, n_bytes, n_requests))
        budgets, monthly, at = held(carried), _monthly_pico(known), time.time()

        def work(connection: sqlite3.Connection) -> dict[str, int]:
            scopes = _scopes(connection, self.path, budgets, monthly)
            _check(connection, scopes, pico, artifact=artifact)
            row = (name, at, process_name(), artifact, destination, pico, n_bytes, n_requests, json.dumps(list(scopes)))
            added = connection.execute(
                "INSERT OR IGNORE INTO reading VALUES (?, 'reserved', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
                (*row, *drawn_picos),
            )
            if added.rowcount:  # else it is done again after an interrupt that came too late
                _count(connection, scopes, pico)
            return scopes

        try:
            return Reservation(self, name, self.commit(work), artifact, pico)
        except (KeyboardInterrupt, SystemExit):
            self.commit_later(lambda connection: _cancel(connection, name))
            raise

    def check(self, *, usd: float, artifact: str, carried: Sequence[Budget] = ()) -> None:
        """Check that an amount fits every budget that holds here, without setting it aside.

        Raises
        ------
        BudgetError
            If it does not.
        """
        budgets, monthly, pico = held(carried), _monthly_pico(), _to_pico(usd)

        def work(connection: sqlite3.Connection) -> None:
            _check(connection, _scopes(connection, self.path, budgets, monthly), pico, artifact=artifact)

        self.commit(work)

    def spent(self, *, by: Grouping | None = None, since: str = "", month: str = "") -> dict[str, Spending]:
        """Add up receipts and open reservations.

        Parameters
        ----------
        by : {"day", "month", "artifact", "destination", "state", "charged"}, optional
            How to group them (days and months in UTC); by default all in one, named "total". "charged" shows what the
            sources themselves confirmed to charge (``x-amz-request-charged``).
        since, month : str, optional
            Only from this day on ("2027-01-31"), or of this month ("2027-01"); UTC.
        """
        if not self.path.exists():
            return {}

        def work(connection: sqlite3.Connection) -> list[tuple[str, int, int, int, int]]:
            _expire_killed(connection)
            return connection.execute(
                f"SELECT {_GROUPS[by]}, SUM(pico), SUM(n_requests), SUM(n_bytes), COUNT(*) "  # noqa: S608 - from a dict
                "FROM reading WHERE state != 'expired' AND date(at, 'unixepoch') >= ? AND date(at, 'unixepoch') LIKE ? "
                "GROUP BY 1 ORDER BY 1",
                (since, f"{month}%"),
            ).fetchall()

        rows = self.commit(work)
        return {key: Spending(pico / _PICO, requests, size, count) for key, pico, requests, size, count in rows}

    def commit(self, work: Work[T]) -> T:
        """Do work in a transaction, with what other threads wait for.

        Raises
        ------
        DmdataError
            If the file cannot be used, then nothing may be spent; or what `work` refused with.
        """
        with self._in_words():
            return self._commits().do(work)

    def commit_later(self, work: Work[object]) -> None:
        """Do work in a transaction, with the next or within a moment."""
        self._commits().do_later(work)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Hold the file alone: all of the block is written, or nothing.

        Raises
        ------
        DmdataError
            If the file cannot be used. Then nothing may be spent.
        """
        with self._in_words(), self._commits().alone() as connection:
            yield connection

    def _commits(self) -> Commits:
        return Commits.on(self.path, _prepare)

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            if isinstance(error, FactualError):
                raise
            raise DmdataError(
                f"the ledger {self.path} cannot be used ({error}), so nothing is spent; set DMDATA_HOME to a "
                "directory you can write to, or move a damaged ledger away",
                path=str(self.path),
            ) from error


@contextlib.contextmanager
def budget(*, usd: float) -> Iterator[None]:
    """Refuse what would bring the reads made for this block over `usd`, whichever process makes them.

    It holds this thread, threads that have no block of their own, processes started in it, what is pickled in it (tasks
    of a Dask graph, whenever the graph was built), and processes that descend from this one, whenever they began.
    Blocks nest, and each of them holds. Those of two threads hold each for its own. Work that was sent out in a block
    and is done after its end still counts towards it, and is held by it.

    Raises
    ------
    BudgetError
        From the read that would pass it, before its first byte.
    ValueError
        If `usd` is negative or not a number.
    """
    if not (math.isfinite(usd) and usd >= 0):
        raise ValueError(f"a budget of {usd} dollars; give a number of at least 0")
    ledger, opened_by = Ledger(home()), os.getpid()
    opened = open_here(f"block:{uuid.uuid4().hex}", _to_pico(usd))
    # where the ledger cannot be written nothing that costs is read by anybody, and a block has nothing to hold
    with contextlib.suppress(DmdataError):
        ledger.commit(
            lambda connection: connection.execute(
                "INSERT OR IGNORE INTO block VALUES (?, ?, ?, ?, ?, NULL)",
                (opened.name, process_name(), opened.pico, json.dumps(opened.inside), time.time()),
            )
        )
    put_in_force(opened)
    try:
        yield
    finally:
        close_here(opened)
        # a child that was forked inside the block leaves it, too, but does not end it
        if os.getpid() == opened_by:
            # where it cannot be ended it holds this process's descendants until this process ends
            with contextlib.suppress(DmdataError):
                ledger.commit(
                    lambda connection: connection.execute(
                        "UPDATE block SET ended = ? WHERE name = ?", (time.time(), opened.name)
                    )
                )


def spend() -> Spending:
    """Add up everything that went through this machine's ledger (``DMDATA_HOME``).

    Returns
    -------
    spending : Spending
        Its ``usd``, ``n_requests``, ``n_bytes`` and ``n_reads``.
    """
    return Ledger(home()).spent().get("total", Spending(0.0, 0, 0, 0))


def _monthly_pico(known: Settings | None = None) -> int | None:
    try:
        monthly = (known or settings()).max_cost
    except SettingsError as error:
        raise BudgetError(f"{error}; nothing is spent until it is fixed", origin=error.origin) from error
    return None if monthly is None else _to_pico(monthly)


def _scopes(connection: sqlite3.Connection, path: Path, budgets: Held, monthly: int | None) -> dict[str, int]:
    """List every budget that a read made now counts towards, with its limit in pico-dollars (-1: none)."""
    limits = {budget.name: budget.pico for budget in budgets.certain}
    others = {budget.name: budget for budget in budgets.of_others}
    still_open = set()
    for budget in budgets.carried:
        row = connection.execute("SELECT ended IS NULL FROM block WHERE name = ?", (budget.name,)).fetchone()
        if row is None:
            raise DmdataError(
                f"this worker does not share the ledger of the process that sent it work: {path.parent} is another "
                "directory there; set DMDATA_HOME to one that all share, or read from a free source"
            )
        limits[budget.name] = budget.pico
        if row[0]:
            still_open.add(budget.name)
    if budgets.ancestors:
        for name, process, pico, inside in connection.execute(
            "SELECT name, process, pico, inside FROM block WHERE ended IS NULL"
        ):
            if process in budgets.ancestors:
                others[name] = Budget(name, pico, tuple(json.loads(inside)))
    for name, budget in others.items():
        # work that brought its budgets with it is not another thread's; its own may have been narrowed since
        if not still_open or still_open.intersection(budget.inside):
            limits.setdefault(name, budget.pico)
    if not limits and monthly is None:
        limits[f"process:{process_name()}"] = _to_pico(DEFAULT_PROCESS_USD)
    # the month is counted even without a limit, so that one set later knows what was spent before
    limits[f"month:{datetime.now(UTC):%Y-%m}"] = -1 if monthly is None else monthly
    return limits


def _count(connection: sqlite3.Connection, scopes: dict[str, int], pico: int) -> None:
    """Count an amount that was checked towards its budgets."""
    connection.execute(
        f"INSERT INTO budget VALUES {', '.join(['(?, ?)'] * len(scopes))} ON CONFLICT (scope) DO UPDATE "  # noqa: S608
        "SET committed_pico = committed_pico + excluded.committed_pico",
        [value for scope in scopes for value in (scope, pico)],
    )


def _check(connection: sqlite3.Connection, scopes: dict[str, int], pico: int, *, artifact: str) -> None:
    if _scope_passed(connection, scopes, pico) is None:
        return
    # what a killed process had set aside and not drawn is free again: looked for where that may matter
    _expire_killed(connection)
    if passed := _scope_passed(connection, scopes, pico):
        scope, committed = passed
        ended = connection.execute("SELECT 1 FROM block WHERE name = ? AND ended IS NOT NULL", (scope,)).fetchone()
        kind = "ended" if ended else scope.partition(":")[0]
        raise _over_budget(kind, pico=pico, limit=scopes[scope], committed=committed, artifact=artifact)


def _scope_passed(connection: sqlite3.Connection, scopes: dict[str, int], pico: int) -> tuple[str, int] | None:
    marks = ", ".join("?" * len(scopes))
    found = connection.execute(f"SELECT scope, committed_pico FROM budget WHERE scope IN ({marks})", list(scopes))  # noqa: S608
    counted = dict(found.fetchall())
    for scope, limit in scopes.items():
        committed = counted.get(scope, 0)
        if limit >= 0 and committed + pico > limit:
            return scope, committed
    return None


def _release(connection: sqlite3.Connection, scopes: Iterable[str], pico: int) -> None:
    connection.executemany(
        "UPDATE budget SET committed_pico = committed_pico - ? WHERE scope = ?", [(pico, scope) for scope in scopes]
    )


def _cancel(connection: sqlite3.Connection, reading: str) -> None:
    """Take back a reservation whose owner was interrupted before it had it."""
    row = connection.execute(
        "SELECT scopes, pico FROM reading WHERE id = ? AND state = 'reserved'", (reading,)
    ).fetchone()
    if row is not None:
        _release(connection, json.loads(row[0]), row[1])
        connection.execute("UPDATE reading SET state = 'expired', pico = 0 WHERE id = ?", (reading,))


def _over_budget(kind: str, *, pico: int, limit: int, committed: int, artifact: str) -> BudgetError:
    usd, remaining, limit_usd = pico / _PICO, max(limit - committed, 0) / _PICO, limit / _PICO
    name, remedy = {
        "month": ("month's budget", f"raise DMDATA_MAX_COST, or max_cost in {config_path()}"),
        "block": ("budget in force", "raise it: --max-cost USD, or with dmdata.budget(usd=...)"),
        "ended": (
            "budget it was sent out under, which has ended,",
            "open it again, outside that block",
        ),
        "process": (
            "default budget a process",
            "raise it: with dmdata.budget(usd=...), --max-cost USD, or DMDATA_MAX_COST for a month",
        ),
    }[kind]
    return BudgetError(
        f"reading {artifact} would cost up to {readable_usd(usd)}, but the {name} of {readable_usd(limit_usd)} has "
        f"{readable_usd(remaining)} left; nothing was fetched; read less or {remedy}",
        usd=usd,
        remaining_usd=remaining,
        limit_usd=limit_usd,
        artifact=artifact,
    )


def _expire_killed(connection: sqlite3.Connection) -> None:
    """Close the reservations of processes that are gone: what they had drawn stays counted, the rest is free again."""
    rows = connection.execute(
        "SELECT id, process, at, scopes, pico, drawn_pico FROM reading WHERE state = 'reserved'"
    ).fetchall()
    for reading, process, at, scopes, pico, drawn_pico in rows:
        if is_alive(process, at):
            continue
        _release(connection, json.loads(scopes), pico - drawn_pico)
        connection.execute(
            "UPDATE reading SET state = CASE WHEN drawn_pico > 0 THEN 'lost' ELSE 'expired' END, pico = drawn_pico, "
            "n_bytes = drawn_bytes, n_requests = drawn_requests WHERE id = ?",
            (reading,),
        )
    opened = connection.execute("SELECT name, process, at FROM block WHERE ended IS NULL").fetchall()
    dead = [(name,) for name, process, at in opened if not is_alive(process, at)]
    connection.executemany("UPDATE block SET ended = at WHERE name = ?", dead)


def _prepare(connection: sqlite3.Connection) -> None:
    """Make the tables where there are none, and bring those of an earlier form along."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version == _SCHEMA_VERSION:
        return
    if version > _SCHEMA_VERSION:
        raise sqlite3.DatabaseError(f"it has form {version}, made by a newer dmdata; upgrade this one")
    for statement in _SCHEMA:
        connection.execute(statement)
    if connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'read'").fetchone():
        for statement in _FROM_FIRST_FORM:
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")


def _to_pico(usd: float) -> int:
    return math.ceil(usd * _PICO)


def _picos(amount: Amount) -> tuple[int, int, int]:
    return _to_pico(amount.usd), amount.n_bytes, amount.n_requests
