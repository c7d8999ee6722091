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
import socket
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeAlias

from dmdata.errors import BudgetError, DmdataError, FactualError, SettingsError
from dmdata.prices import readable_usd
from dmdata.settings import config_path, home, settings

__all__ = ["Amount", "Grouping", "Ledger", "Reservation", "Spending", "budget", "home"]

DEFAULT_PROCESS_USD = 1.0

Grouping: TypeAlias = Literal["day", "month", "artifact", "destination", "state", "charged"]

_PICO = 10**12
# the one list of blocks in force: child processes inherit it
_BLOCKS_VARIABLE = "DMDATA_BUDGETS"
_BLOCKS_LOCK = threading.Lock()

# SQLite has locks of its own: a child forked while another thread holds one would wait for it for ever
_ONE_IN_SQLITE = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_ONE_IN_SQLITE.acquire,
        after_in_parent=_ONE_IN_SQLITE.release,
        after_in_child=_ONE_IN_SQLITE.release,
    )
# a process of another host that has not drawn for so long is taken for dead
_LEASE_SECONDS = 24 * 3600.0

_SCHEMA_VERSION = 2
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS budget (scope TEXT PRIMARY KEY, committed_pico INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS reading (id TEXT PRIMARY KEY, "
    "state TEXT NOT NULL CHECK (state IN ('reserved', 'settled', 'lost', 'expired')), at REAL NOT NULL, "
    "process TEXT NOT NULL, artifact TEXT NOT NULL, destination TEXT NOT NULL, pico INTEGER NOT NULL, "
    "n_bytes INTEGER NOT NULL, n_requests INTEGER NOT NULL, scopes TEXT NOT NULL, drawn_pico INTEGER NOT NULL, "
    "drawn_bytes INTEGER NOT NULL, drawn_requests INTEGER NOT NULL, charged INTEGER)",
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

    def draw(self, amount: Amount) -> None:
        """Note what will be sent next of what was reserved: what would stay counted if this process were killed."""
        with self.ledger.transaction() as connection:
            self._draw(connection, amount)

    def extend(self, amount: Amount) -> None:
        """Set more aside, and draw it, for a request that must be sent again.

        Raises
        ------
        BudgetError
            If a budget would be passed; what was reserved stays reserved.
        """
        pico = _to_pico(amount.usd)
        with self.ledger.transaction() as connection:
            _commit(connection, self.scopes, pico, artifact=self.artifact)
            connection.execute("UPDATE reading SET pico = pico + ? WHERE id = ?", (pico, self.id))
            self._draw(connection, amount)

    def settle(self, *, usd: float, n_bytes: int, n_requests: int, charged: bool | None = None) -> None:
        """Replace the reservation by its receipt.

        Parameters
        ----------
        usd : float
        n_bytes, n_requests : int
        charged : bool or None
            Whether the source says that it charges its reader (``x-amz-request-charged``); None where it was not asked.
        """
        pico = _to_pico(usd)
        with self.ledger.transaction() as connection:
            row = connection.execute("SELECT pico FROM reading WHERE id = ?", (self.id,)).fetchone()
            if row is None:
                raise DmdataError(f"{self.ledger.path} has lost reservation {self.id}; was it removed meanwhile?")
            _release(connection, self.scopes, row[0] - pico)
            connection.execute(
                "UPDATE reading SET state = 'settled', at = ?, pico = ?, n_bytes = ?, n_requests = ?, charged = ? "
                "WHERE id = ?",
                (time.time(), pico, n_bytes, n_requests, charged, self.id),
            )

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

        Raises
        ------
        BudgetError
            If a budget would be passed; nothing is reserved. `remaining_usd` and `limit_usd` are those of the budget.
        """
        reservation = Reservation(self, uuid.uuid4().hex, _active_scopes(), artifact)
        pico = _to_pico(usd)
        with self.transaction() as connection:
            _expire_killed(connection)
            _commit(connection, reservation.scopes, pico, artifact=artifact)
            row = (reservation.id, time.time(), _process(), artifact, destination, pico, n_bytes, n_requests)
            connection.execute(
                "INSERT INTO reading VALUES (?, 'reserved', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
                (*row, json.dumps(list(reservation.scopes)), *_picos(drawn or Amount(usd, n_bytes, n_requests))),
            )
        return reservation

    def check(self, *, usd: float, artifact: str) -> None:
        """Tell whether an amount fits every budget that holds here, without setting it aside.

        Raises
        ------
        BudgetError
            If it does not.
        """
        with self.transaction() as connection:
            _expire_killed(connection)
            _check(connection, _active_scopes(), _to_pico(usd), artifact=artifact)

    def spent(self, *, by: Grouping | None = None, since: str = "", month: str = "") -> dict[str, Spending]:
        """Add up receipts and open reservations.

        Parameters
        ----------
        by : {"day", "month", "artifact", "destination", "state", "charged"}, optional
            How to group them (days and months in UTC); by default all in one, named "total". "charged" tells what the
            sources themselves confirmed to charge (``x-amz-request-charged``).
        since, month : str, optional
            Only from this day on ("2027-01-31"), or of this month ("2027-01"); UTC.
        """
        if not self.path.exists():
            return {}
        with self.transaction() as connection:
            _expire_killed(connection)
            rows = connection.execute(
                f"SELECT {_GROUPS[by]}, SUM(pico), SUM(n_requests), SUM(n_bytes), COUNT(*) "  # noqa: S608 - from a dict
                "FROM reading WHERE state != 'expired' AND date(at, 'unixepoch') >= ? AND date(at, 'unixepoch') LIKE ? "
                "GROUP BY 1 ORDER BY 1",
                (since, f"{month}%"),
            ).fetchall()
        return {key: Spending(pico / _PICO, requests, size, count) for key, pico, requests, size, count in rows}

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=60, isolation_level=None)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Hold the file alone: all of the block is written, or nothing.

        Raises
        ------
        DmdataError
            If the file cannot be used. Then nothing may be spent.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # a connection each time: none is shared between threads, carried over a fork, or left open
            with _ONE_IN_SQLITE, contextlib.closing(self._connect()) as connection:
                connection.execute("BEGIN IMMEDIATE")
                _prepare(connection)
                yield connection
                connection.execute("COMMIT")
        except (OSError, sqlite3.Error, ValueError, TypeError, OverflowError, AttributeError) as error:
            # a damaged file shows in what SQLite says, in text that is none, or in a value of another kind
            if isinstance(error, FactualError):
                raise
            raise DmdataError(
                f"the ledger {self.path} cannot be used ({error}), so nothing is spent; set DMDATA_HOME to a "
                "directory you can write to, or move a damaged ledger away",
                path=str(self.path),
            ) from error


@contextlib.contextmanager
def budget(*, usd: float) -> Iterator[None]:
    """Refuse what would bring the reads made during this block, in all threads and processes started, over `usd`.

    Blocks nest, and each of them holds. Those of different threads hold for each other too: a budget can only be
    tighter than asked for.

    Raises
    ------
    BudgetError
        From the read that would pass it, before its first byte.
    ValueError
        If `usd` is negative or not a number.
    """
    if not (math.isfinite(usd) and usd >= 0):
        raise ValueError(f"a budget of {usd} dollars; give a number of at least 0")
    block = f"block:{uuid.uuid4().hex}={_to_pico(usd)}"
    with _BLOCKS_LOCK:
        _set_blocks([*_blocks(), block])
    try:
        yield
    finally:
        with _BLOCKS_LOCK:
            # others may have begun or ended meanwhile, in other threads
            _set_blocks([other for other in _blocks() if other != block])


def _blocks() -> list[str]:
    """List the budget blocks in force: of this process, in all its threads, and of the one that started it."""
    return [block for block in os.environ.get(_BLOCKS_VARIABLE, "").split(",") if block]


def _set_blocks(blocks: list[str]) -> None:
    if blocks:
        os.environ[_BLOCKS_VARIABLE] = ",".join(blocks)
    else:
        os.environ.pop(_BLOCKS_VARIABLE, None)


def _active_scopes() -> dict[str, int]:
    """List every budget that a read made now counts towards, with its limit in pico-dollars (-1: none)."""
    limits = {}
    for block in _blocks():
        name, _, pico = block.partition("=")
        if not (name.startswith("block:") and pico.isdecimal()):
            raise BudgetError(f"{_BLOCKS_VARIABLE} holds {block!r}, which is no budget; unset it")
        limits[name] = int(pico)
    try:
        monthly = settings().max_cost
    except SettingsError as error:
        raise BudgetError(f"{error}; nothing is spent until it is mended", origin=error.facts.get("origin")) from error
    if not limits and monthly is None:
        limits[f"process:{_process()}"] = _to_pico(DEFAULT_PROCESS_USD)
    # the month is counted even without a limit, so that one set later knows what was spent before
    limits[f"month:{datetime.now(UTC):%Y-%m}"] = -1 if monthly is None else _to_pico(monthly)
    return limits


def _commit(connection: sqlite3.Connection, scopes: dict[str, int], pico: int, *, artifact: str) -> None:
    """Count an amount towards its budgets, or refuse it whole."""
    _check(connection, scopes, pico, artifact=artifact)
    connection.executemany(
        "INSERT INTO budget VALUES (?, ?) ON CONFLICT (scope) DO UPDATE SET committed_pico = committed_pico + ?",
        [(scope, pico, pico) for scope in scopes],
    )


def _check(connection: sqlite3.Connection, scopes: dict[str, int], pico: int, *, artifact: str) -> None:
    for scope, limit in scopes.items():
        row = connection.execute("SELECT committed_pico FROM budget WHERE scope = ?", (scope,)).fetchone()
        committed = row[0] if row else 0
        if limit >= 0 and committed + pico > limit:
            raise _over_budget(scope, pico=pico, limit=limit, committed=committed, artifact=artifact)


def _release(connection: sqlite3.Connection, scopes: Iterable[str], pico: int) -> None:
    connection.executemany(
        "UPDATE budget SET committed_pico = committed_pico - ? WHERE scope = ?", [(pico, scope) for scope in scopes]
    )


def _over_budget(scope: str, *, pico: int, limit: int, committed: int, artifact: str) -> BudgetError:
    usd, remaining, limit_usd = pico / _PICO, max(limit - committed, 0) / _PICO, limit / _PICO
    kind = scope.partition(":")[0]
    name, remedy = {
        "month": ("month's budget", f"raise DMDATA_MAX_COST, or max_cost in {config_path()}"),
        "block": ("budget in force", "raise it: --max-cost USD, or with dmdata.budget(usd=...)"),
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
        if _is_alive(process, at):
            continue
        _release(connection, json.loads(scopes), pico - drawn_pico)
        connection.execute(
            "UPDATE reading SET state = CASE WHEN drawn_pico > 0 THEN 'lost' ELSE 'expired' END, pico = drawn_pico, "
            "n_bytes = drawn_bytes, n_requests = drawn_requests WHERE id = ?",
            (reading,),
        )


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


def _process(pid: int | None = None) -> str:
    """Name a process so that another one, later, with the same number is told apart."""
    pid = os.getpid() if pid is None else pid
    try:
        # the 22nd field of proc(5)'s stat, counted behind the name, which may hold spaces
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        started = ""  # no /proc on this system: the number alone must do
    return f"{socket.gethostname()}:{pid}:{started}"


def _is_alive(process: str, reserved_at: float) -> bool:
    host, pid, _ = process.rsplit(":", 2)
    if host != socket.gethostname():
        return time.time() - reserved_at < _LEASE_SECONDS
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's process has the number; the start time tells whose
    return _process(int(pid)) == process


def _to_pico(usd: float) -> int:
    return math.ceil(usd * _PICO)


def _picos(amount: Amount) -> tuple[int, int, int]:
    return _to_pico(amount.usd), amount.n_bytes, amount.n_requests
