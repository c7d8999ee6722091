"""No budget is ever passed, by however many processes, and nothing that may have been billed is forgotten."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Child
from servers.loopback import LoopbackS3
from small_release import publish

import dmdata
from dmdata.errors import BudgetError, DmdataError
from dmdata.money.ledger import Amount, Ledger, Reservation, Spending, home

RESERVE_UNTIL_REFUSED = """
import sys
from dmdata.errors import BudgetError
from dmdata.money.ledger import Ledger, home
print("ready", flush=True)
sys.stdin.readline()
n = 0
for _ in range(2000):
    try:
        Ledger(home()).reserve(usd=float(sys.argv[1]), n_bytes=1, n_requests=1, artifact="a", destination="internet")
    except BudgetError:
        break
    n += 1
print(n)
"""

RESERVE_AND_WAIT = """
import sys, time
from dmdata.money.ledger import Amount, Ledger, home
Ledger(home()).reserve(usd=0.25, n_bytes=700, n_requests=7, artifact="a", destination="internet")
Ledger(home()).reserve(usd=0.04, n_bytes=80, n_requests=8, artifact="b", destination="internet", drawn=Amount(0, 0, 0))
third = Ledger(home()).reserve(
    usd=0.01, n_bytes=50, n_requests=5, artifact="c", destination="internet", drawn=Amount(0.001, 5, 1))
third.draw(Amount(0.002, 10, 2))
print("reserved", flush=True)
time.sleep(600)
"""


def reserve(usd: float, artifact: str = "a", **facts: Any) -> Reservation:
    facts = {"n_bytes": 100, "n_requests": 1, "destination": "internet"} | facts
    return Ledger(home()).reserve(usd=usd, artifact=artifact, **facts)


@contextmanager
def started(program: str, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", program, *arguments]
    with Child(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def say(process: "subprocess.Popen[str]", text: str) -> None:
    assert process.stdin is not None
    process.stdin.write(text)
    process.stdin.flush()


def hear(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_eight_processes_racing_for_the_last_cent_never_pass_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reserve(0.99).settle(usd=0.99, n_bytes=1, n_requests=1)
    monkeypatch.setenv("DMDATA_MAX_COST", "1.0")
    with ExitStack() as stack:
        racers = [stack.enter_context(started(RESERVE_UNTIL_REFUSED, "0.0003")) for _ in range(8)]
        for racer in racers:
            assert hear(racer) == "ready"
        for racer in racers:
            say(racer, "go\n")
        counts = [int(hear(racer)) for racer in racers]
    assert sum(counts) == 33, "thirty-three times $0.0003 fit into a cent, a thirty-fourth does not"
    total = dmdata.spend()
    assert total.usd == pytest.approx(0.99 + 33 * 0.0003)
    assert total.usd <= 1.0
    assert total.n_reads == 34


def test_threads_racing_for_a_budget_never_pass_it() -> None:
    taken = []

    def race() -> None:
        for _ in range(20):
            try:
                taken.append(reserve(0.01))
            except BudgetError:
                return

    with dmdata.budget(usd=0.35):
        threads = [threading.Thread(target=race) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(taken) == 35


def test_of_a_killed_process_what_it_drew_stays_counted_and_the_rest_expires() -> None:
    with dmdata.budget(usd=0.30):
        with started(RESERVE_AND_WAIT) as process:
            assert hear(process) == "reserved"
            assert set(Ledger(home()).spent(by="state")) == {"reserved"}
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert Ledger(home()).spent(by="artifact") == {"a": Spending(0.25, 7, 700, 1), "c": Spending(0.003, 3, 15, 1)}
        assert set(Ledger(home()).spent(by="state")) == {"lost"}
        with pytest.raises(BudgetError) as caught:
            reserve(0.06)
        assert caught.value.remaining_usd == pytest.approx(0.047)
        reserve(0.047)
    assert dmdata.spend() == Spending(pytest.approx(0.30), 11, 815, 3)  # type: ignore[arg-type] # stands for a float


def test_a_ledger_of_the_first_form_is_brought_along() -> None:
    home().mkdir()
    with sqlite3.connect(home() / "ledger.sqlite") as connection:
        connection.execute("CREATE TABLE budget (scope TEXT PRIMARY KEY, committed_pico INTEGER NOT NULL)")
        connection.execute(
            "CREATE TABLE read (id TEXT PRIMARY KEY, state TEXT NOT NULL, at REAL NOT NULL, process TEXT NOT NULL, "
            "artifact TEXT NOT NULL, destination TEXT NOT NULL, pico INTEGER NOT NULL, n_bytes INTEGER NOT NULL, "
            "n_requests INTEGER NOT NULL)"
        )
        connection.execute(
            "INSERT INTO read VALUES ('x', 'settled', 0, 'host:1:2', 'a', 'internet', ?, 700, 7)", (10**11,)
        )
    connection.close()
    assert dmdata.spend() == Spending(0.1, 7, 700, 1)
    reserve(0.2).settle(usd=0.1, n_bytes=1, n_requests=1)
    assert dmdata.spend() == Spending(0.2, 8, 701, 2)


def test_a_ledger_of_a_newer_dmdata_is_left_alone() -> None:
    home().mkdir()
    with sqlite3.connect(home() / "ledger.sqlite") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(DmdataError, match="newer dmdata"):
        reserve(0.1)


def test_what_the_source_says_of_charging_is_in_the_books() -> None:
    for charged in (True, True, False, None):
        reserve(0.1).settle(usd=0.1, n_bytes=1, n_requests=1, charged=charged)
    assert {name: part.n_reads for name, part in Ledger(home()).spent(by="charged").items()} == {
        "confirmed": 2,
        "not charged": 1,
        "unknown": 1,
    }


def test_a_budget_reaches_the_processes_started_in_it_and_no_others() -> None:
    with dmdata.budget(usd=0.001), started(RESERVE_UNTIL_REFUSED, "0.0004") as child:
        say(child, "go\n")
        assert (hear(child), hear(child)) == ("ready", "2")
        with pytest.raises(BudgetError, match="budget in force"):
            reserve(0.0004)
    assert "DMDATA_BUDGETS" not in os.environ
    with started(RESERVE_UNTIL_REFUSED, "0.4") as other:
        say(other, "go\n")
        assert (hear(other), hear(other)) == ("ready", "2"), "the default dollar of its own"


def test_each_block_of_nested_ones_holds() -> None:
    with dmdata.budget(usd=0.10):
        with dmdata.budget(usd=5.00):
            reserve(0.07)
            with pytest.raises(BudgetError) as caught:
                reserve(0.04)
            assert caught.value.limit_usd == 0.10
        with dmdata.budget(usd=0.01):
            with pytest.raises(BudgetError) as caught:
                reserve(0.02)
            assert caught.value.limit_usd == 0.01
            reserve(0.01)
        reserve(0.02)
        with pytest.raises(BudgetError):
            reserve(1e-9)


def test_a_block_may_allow_more_than_the_default_dollar() -> None:
    with dmdata.budget(usd=50):
        reserve(40)
    reserve(0.9)


def test_without_any_budget_a_process_has_one_dollar() -> None:
    reserve(0.6)
    with pytest.raises(BudgetError, match=r"default budget a process of \$1\.00 has \$0\.40 left") as caught:
        reserve(0.6)
    assert caught.value.exit_code == 8
    for remedy in ("dmdata.budget", "--max-cost", "DMDATA_MAX_COST", "nothing was fetched"):
        assert remedy in str(caught.value)
    reserve(0.4)


def test_the_month_counts_what_was_read_before_its_budget_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    reserve(0.5).settle(usd=0.3, n_bytes=1, n_requests=1)
    monkeypatch.setenv("DMDATA_MAX_COST", "2.5")
    with pytest.raises(BudgetError, match=r"month's budget of \$2\.50 has \$2\.20 left.*raise DMDATA_MAX_COST"):
        reserve(2.3)
    reserve(2.2)


def test_the_month_holds_inside_a_larger_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMDATA_MAX_COST", "0.02")
    with dmdata.budget(usd=1), pytest.raises(BudgetError, match="month"):
        reserve(0.03)


@pytest.mark.parametrize("text", ["lots", "-1", "nan", "inf", "1,5", "$3"])
def test_a_monthly_budget_that_is_no_number_spends_nothing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMDATA_MAX_COST", text)
    with pytest.raises(BudgetError, match="DMDATA_MAX_COST"):
        reserve(0.0001)
    assert dmdata.spend().n_reads == 0


@pytest.mark.parametrize("usd", [-0.01, float("nan"), float("inf")])
def test_a_block_of_no_sensible_amount_is_refused(usd: float) -> None:
    with pytest.raises(ValueError, match="at least 0"), dmdata.budget(usd=usd):
        pytest.fail("the block must not run")


def test_a_block_of_nothing_lets_nothing_through() -> None:
    with dmdata.budget(usd=0), pytest.raises(BudgetError):
        reserve(1e-12)


def test_a_block_ends_also_when_it_fails() -> None:
    with pytest.raises(KeyError), dmdata.budget(usd=0.01):
        raise KeyError
    assert "DMDATA_BUDGETS" not in os.environ
    reserve(0.5)


def test_blocks_of_two_threads_that_overlap_do_not_outlive_themselves() -> None:
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with dmdata.budget(usd=0.001):
            first_in.set()
            second_in.wait(10)
        first_out.set()

    def second() -> None:
        first_in.wait(10)
        with dmdata.budget(usd=0.002):
            second_in.set()
            first_out.wait(10)

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "DMDATA_BUDGETS" not in os.environ
    reserve(0.5)


def test_settling_for_less_frees_the_rest() -> None:
    with dmdata.budget(usd=0.10):
        first = reserve(0.09)
        with pytest.raises(BudgetError):
            reserve(0.02)
        first.settle(usd=0.03, n_bytes=40, n_requests=2)
        reserve(0.07)
    assert Ledger(home()).spent(by="state") == {
        "reserved": Spending(0.07, 1, 100, 1),
        "settled": Spending(0.03, 2, 40, 1),
    }


def test_a_reservation_grows_only_within_the_budget() -> None:
    with dmdata.budget(usd=0.10):
        reservation = reserve(0.06)
        reservation.extend(Amount(0.04, 1, 1))
        with pytest.raises(BudgetError):
            reservation.extend(Amount(1e-9, 1, 1))
        reservation.settle(usd=0.08, n_bytes=1, n_requests=2)
        reserve(0.02)
    assert dmdata.spend().usd == pytest.approx(0.10)


def test_a_check_sets_nothing_aside() -> None:
    books = Ledger(home())
    with dmdata.budget(usd=0.10):
        books.check(usd=0.10, artifact="a")
        books.check(usd=0.10, artifact="a")
        with pytest.raises(BudgetError):
            books.check(usd=0.11, artifact="a")
    assert dmdata.spend().n_reads == 0


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 60), st.floats(0, 1), st.booleans()), max_size=8))
def test_what_is_committed_is_receipts_plus_open_reservations(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, float, bool]]
) -> None:
    books = Ledger(tmp_path_factory.mktemp("ledger"))
    counted = 0.0
    with dmdata.budget(usd=1.00):
        for cents, share, is_settled in steps:
            facts: dict[str, Any] = {"n_bytes": 1, "n_requests": 1, "artifact": "a", "destination": "internet"}
            if counted + cents / 100 > 1.00 + 1e-9:
                with pytest.raises(BudgetError):
                    books.reserve(usd=cents / 100, **facts)
                continue
            if abs(counted + cents / 100 - 1.00) < 1e-9:
                continue  # on the limit to the pico-dollar, a float's last digit decides
            reservation = books.reserve(usd=cents / 100, **facts)
            if is_settled:
                reservation.settle(usd=share * cents / 100, n_bytes=1, n_requests=1)
            counted += share * cents / 100 if is_settled else cents / 100
    assert books.spent().get("total", Spending(0.0, 0, 0, 0)).usd == pytest.approx(counted, abs=1e-9)


def test_the_books_can_be_read_by_day_artifact_destination_and_state() -> None:
    reserve(0.1, "x").settle(usd=0.1, n_bytes=10, n_requests=1)
    reserve(0.2, "x", destination="cross-region").settle(usd=0.2, n_bytes=20, n_requests=2)
    reserve(0.3, "y").settle(usd=0.3, n_bytes=30, n_requests=3)
    books = Ledger(home())
    assert set(books.spent(by="artifact")) == {"x", "y"}
    assert books.spent(by="destination")["cross-region"] == Spending(0.2, 2, 20, 1)
    assert list(books.spent(by="day")) == [f"{datetime.now(UTC):%Y-%m-%d}"]
    for grouping in ("day", "artifact", "destination", "state"):
        parts = books.spent(by=grouping).values()  # type: ignore[arg-type] # one of the four
        assert sum(part.n_bytes for part in parts) == dmdata.spend().n_bytes == 60
        assert sum(part.usd for part in parts) == pytest.approx(dmdata.spend().usd)


def test_an_empty_home_has_spent_nothing_and_is_not_made_by_asking() -> None:
    assert dmdata.spend() == Spending(0.0, 0, 0, 0)
    assert not home().exists()


def test_a_damaged_ledger_stops_all_spending(s3: LoopbackS3, tmp_path: Path) -> None:
    catalog = publish(s3, {"toy/50pct/test_margins": np.zeros((4, 3), np.float16)}, tmp_path)
    home().mkdir()
    (home() / "ledger.sqlite").write_bytes(b"this is no database, " * 100)
    with pytest.raises(DmdataError, match="nothing is spent; set DMDATA_HOME"):
        dmdata.open("toy/50pct/test_margins", catalog=catalog)[0]
    with pytest.raises(DmdataError, match="damaged ledger"):
        dmdata.spend()
    assert s3.n_requests == 0
    assert (home() / "ledger.sqlite").read_bytes().startswith(b"this is no database"), "left for its owner to see"


def test_a_home_that_is_a_file_stops_all_spending(s3: LoopbackS3, tmp_path: Path) -> None:
    catalog = publish(s3, {"toy/50pct/test_margins": np.zeros((4, 3), np.float16)}, tmp_path)
    home().write_text("a file")
    with pytest.raises(DmdataError, match="cannot be used"):
        dmdata.open("toy/50pct/test_margins", catalog=catalog)[0]
    assert s3.n_requests == 0


def test_a_ledger_held_by_another_is_waited_for() -> None:
    reserve(0.1)
    connection = sqlite3.connect(Ledger(home()).path, isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN IMMEDIATE")
    released = threading.Timer(0.3, connection.execute, ["COMMIT"])
    released.start()
    reserve(0.1)
    released.join()
    connection.close()
    assert dmdata.spend().n_reads == 2


def n_transactions() -> int:
    """Read the change counter of the file's own header: one more a transaction that wrote something."""
    return int.from_bytes((home() / "ledger.sqlite").read_bytes()[24:28], "big")


def test_threads_that_read_at_once_share_transactions() -> None:
    reserve(0.0)
    dmdata.spend()
    before = n_transactions()

    def work() -> None:
        for _ in range(10):
            reserve(1e-6).settle(usd=1e-6, n_bytes=100, n_requests=1)

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert dmdata.spend().n_reads == 161
    assert n_transactions() - before < 160, "one each for reserving and settling would be 320"


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise SystemExit"])
def test_the_last_receipt_is_written_before_a_process_ends(end: str) -> None:
    program = f"""
import sys
from dmdata.money.ledger import Ledger, home
reading = Ledger(home()).reserve(usd=0.1, n_bytes=1, n_requests=1, artifact="a", destination="internet")
reading.settle(usd=0.1, n_bytes=1, n_requests=1)
{end}
"""
    subprocess.run([sys.executable, "-c", program], check=False)
    with sqlite3.connect(home() / "ledger.sqlite") as connection:
        states = connection.execute("SELECT state FROM reading").fetchall()
    connection.close()
    assert states == [("settled",)]
