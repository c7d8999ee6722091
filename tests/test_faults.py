"""Whatever breaks on the way: no byte lost, none wrong, and no dollar billed beyond the ledger.

What the server served is what a provider may bill; the ledger must say at least that. The figures of each fault are
printed at the end of the session. Kills, full disks and two mirrors at one place are in test_mirror_interrupted.py and
test_mirror.py.
"""

import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from servers.loopback import Fault, LoopbackS3, Request
from small_release import npy, publish

import dmdata
from dmdata.errors import DmdataError, IntegrityError, SourceError
from dmdata.fetch import CONNECTIONS, LEAST_RANGE_BYTES

NAME = "toy/50pct/test_margins"
MEBIBYTE = 1 << 20
VALUES = np.random.default_rng(0).integers(0, 255, (24, MEBIBYTE), np.uint8)
"""24 MiB: a read of all of it takes six requests of 4 MiB."""
ROWS = np.array([1, 4, 9, 14, 22])
PATIENCE = 8  # how often a fault may strike one operation; each request is tried six times in a row at most

USD_PER_BYTE, USD_PER_GET = 0.09 / 2**30, 0.0004 / 1000


def whole(array: dmdata.LazyArray, folder: Path) -> npt.NDArray[np.uint8]:
    del folder
    return array[...]


def rows(array: dmdata.LazyArray, folder: Path) -> npt.NDArray[np.uint8]:
    del folder
    return array.oindex[ROWS]


def column(array: dmdata.LazyArray, folder: Path) -> npt.NDArray[np.uint8]:
    del folder
    return array[:, 12_345]


def mirror(array: dmdata.LazyArray, folder: Path) -> npt.NDArray[np.uint8]:
    return np.asarray(array.mirror(folder / "m.zarr", memory_bytes=16 * MEBIBYTE)[...])


def download(array: dmdata.LazyArray, folder: Path) -> npt.NDArray[np.uint8]:
    path = dmdata.get(array.name, folder / "x.npy", catalog=str(folder / "catalog.yaml"))
    return np.asarray(np.load(path))


OPERATIONS: dict[Callable[..., npt.NDArray[np.uint8]], npt.NDArray[np.uint8]] = {
    whole: VALUES,
    rows: VALUES[ROWS],
    column: VALUES[:, 12_345],
    mirror: VALUES,
    download: VALUES,
}
PASSING = {
    "503 storm": Fault(status=503),
    "SlowDown storm": Fault(status=503, code="SlowDown"),
    "500": Fault(status=500),
    "request time-out": Fault(status=400, code="RequestTimeout"),
    "reset before the answer": Fault(drop=True),
    "reset at the first byte": Fault(reset_after=0),
    "reset mid-body": Fault(reset_after=700_001),
    "closed mid-body": Fault(end_after=300_001),
    "short body": Fault(shorten_to=500_003),
    "a pause mid-body": Fault(stall_seconds=0.2, stall_after=100_000),
}


def is_data(request: Request) -> bool:
    return request.method == "GET" and request.range not in ("bytes=0-127", "bytes=0-0")


def billed(s3: LoopbackS3) -> float:
    """What a provider could ask for: each request, and each byte of an object that left the server."""
    return s3.n_object_bytes * USD_PER_BYTE + s3.n_requests * USD_PER_GET


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_what_passes_costs_tries_and_nothing_else(
    s3: LoopbackS3, tmp_path: Path, request: pytest.FixtureRequest, figures: list[str], fault: Fault
) -> None:
    name = request.node.callspec.id
    catalog = publish(s3, {NAME: VALUES}, tmp_path)
    tries, lost, wrong, over = 0, 0, 0, 0.0
    for operation, expected in OPERATIONS.items():
        array = dmdata.open(NAME, catalog=catalog)
        before = dmdata.spend().usd
        s3.reset_log()
        rng = random.Random(name + operation.__name__)  # noqa: S311 - a seeded fault, no secret
        s3.inject(fault, when=lambda sent, rng=rng: is_data(sent) and rng.random() < 0.4, times=PATIENCE)
        got = operation(array, tmp_path)
        s3.clear_faults()
        tries += s3.n_requests
        lost += max(expected.nbytes - got.nbytes, 0)
        wrong += int((got != expected).sum())
        over = max(over, billed(s3) - (dmdata.spend().usd - before))
        assert all(sent.if_match for sent in s3.log if is_data(sent)), "each request names the object first seen"
        assert all(sent.range for sent in s3.log), "and a range"
    line = f"fault, {name}: {len(OPERATIONS)} operations, {tries} requests, bytes lost {lost}, wrong {wrong}"
    figures.append(f"{line}, dollars over the ledger {max(over, 0.0):.2g}")
    assert (lost, wrong) == (0, 0)
    assert over <= 1e-12


@pytest.mark.slow
def test_a_server_that_falls_silent_is_given_up_on_after_its_time(
    s3: LoopbackS3, tmp_path: Path, request: pytest.FixtureRequest, figures: list[str]
) -> None:
    array = dmdata.open(NAME, catalog=publish(s3, {NAME: VALUES}, tmp_path))
    s3.inject(Fault(stall_seconds=60, stall_after=1_000_000), when=is_data, times=3)
    began = time.monotonic()
    np.testing.assert_array_equal(array[...], VALUES)
    seconds = time.monotonic() - began
    assert 15 < seconds < 40
    over = billed(s3) - dmdata.spend().usd
    figures.append(
        f"fault, stall of a minute: 3 of them, {s3.n_requests} requests, {seconds:.0f} s, bytes lost 0, wrong 0, "
        f"dollars over the ledger {max(over, 0.0):.2g}"
    )
    assert over <= 1e-12


@pytest.mark.parametrize(
    ("fault", "kinds"),
    [
        (Fault(replace=npy(VALUES + 1)), IntegrityError),
        (Fault(whole=True), (SourceError, IntegrityError)),
        (Fault(status=403), DmdataError),
        (Fault(status=404), DmdataError),
    ],
    ids=["a changed object", "200 where 206 is due", "403", "404"],
)
@pytest.mark.parametrize("operation", [whole, rows, column, mirror, download], ids=lambda operation: operation.__name__)
def test_what_does_not_pass_ends_in_an_error_before_a_wrong_byte(
    s3: LoopbackS3,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    figures: list[str],
    operation: Callable[..., npt.NDArray[np.uint8]],
    fault: Fault,
    kinds: type[DmdataError] | tuple[type[DmdataError], ...],
) -> None:
    array = dmdata.open(NAME, catalog=publish(s3, {NAME: VALUES}, tmp_path))
    s3.inject(fault, when=is_data, after=2, times=1 if fault.replace else math.inf)
    with pytest.raises(kinds):
        operation(array, tmp_path)
    time.sleep(0.3)  # what was cut off may still be on its way out of the server
    over = billed(s3) - dmdata.spend().usd
    figures.append(
        f"fault, {request.node.callspec.id}: refused after {s3.n_requests} requests, dollars over the ledger "
        f"{max(over, 0.0):.2g}"
    )
    assert over <= 1e-12
    assert not (tmp_path / "x.npy").exists()


@pytest.mark.parametrize(
    "content",
    [npy(VALUES)[:-5], npy(VALUES) + b"\0", b"", npy(VALUES)[:100], b"\x93NUMPY\x01\x00\xff\xff" + bytes(1000)],
    ids=["too short", "too long", "empty", "half a header", "a header of 64 KiB that is not there"],
)
def test_an_object_of_a_wrong_length_is_refused_by_its_header(s3: LoopbackS3, tmp_path: Path, content: bytes) -> None:
    catalog = publish(s3, {NAME: VALUES}, tmp_path)
    s3.put("toy/data/test_margins_50pct.npy", content)
    with pytest.raises(DmdataError):
        dmdata.open(NAME, catalog=catalog)
    assert s3.n_object_bytes <= 1200
    assert billed(s3) <= dmdata.spend().usd + 1e-12


@pytest.mark.slow
def test_twenty_kills_of_a_mirror_lose_nothing(
    s3: LoopbackS3, tmp_path: Path, request: pytest.FixtureRequest, figures: list[str]
) -> None:
    values = np.random.default_rng(1).integers(0, 255, (64, MEBIBYTE), np.uint8)
    catalog = publish(s3, {NAME: values}, tmp_path)
    s3.bytes_per_second = 1.2e6
    destination, rng = tmp_path / "m.zarr", random.Random(7)  # noqa: S311
    command = ["mirror", NAME, str(destination), "--catalog", catalog, "--memory", "64", "-y", "--max-cost", "1"]
    program = [sys.executable, "-c", "from dmdata.cli import main; main()", *command]
    n_kills = 0
    for _ in range(60):
        if n_kills == 20:
            break
        sent = s3.n_requests
        with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 20
            while s3.n_requests == sent and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(rng.random() * 0.5)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                n_kills += 1
    s3.bytes_per_second = 0
    copy = dmdata.mirror(NAME, destination, catalog=catalog, memory_bytes=64 * MEBIBYTE)
    wrong = int((np.asarray(copy[...]) != values).sum())  # type: ignore[index] # one name: an array
    served, spent = s3.n_object_bytes, dmdata.spend()
    again = served - values.nbytes - 128
    over = billed(s3) - spent.usd
    figures.append(
        f"fault, SIGKILL of a mirror: {n_kills} kills, {s3.n_requests} requests, bytes wrong {wrong}, fetched again "
        f"{again / MEBIBYTE:.1f} MiB in all, dollars over the ledger {max(over, 0.0):.2g}"
    )
    assert n_kills == 20
    assert wrong == 0
    assert over <= 1e-12
    assert again <= n_kills * CONNECTIONS * LEAST_RANGE_BYTES, "at most what was in flight at each kill"


def test_several_processes_under_one_budget_never_pass_it_while_transfers_break(
    s3: LoopbackS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, figures: list[str]
) -> None:
    values = VALUES[:, :200_000]
    catalog = publish(s3, {NAME: values}, tmp_path)
    price = dmdata.open(NAME, catalog=catalog).estimate().usd
    monkeypatch.setenv("DMDATA_MAX_COST", f"{dmdata.spend().usd + price * 5.5:.12f}")
    rng = random.Random(3)  # noqa: S311
    s3.inject(Fault(reset_after=50_000), when=lambda sent: is_data(sent) and rng.random() < 0.3, times=math.inf)
    program = (
        "import sys, dmdata\n"
        "array, n = dmdata.open(sys.argv[1], catalog=sys.argv[2]), 0\n"
        "for _ in range(20):\n"
        "    try:\n"
        "        array[...]\n"
        "        n += 1\n"
        "    except dmdata.errors.BudgetError:\n"
        "        break\n"
        "print(n)\n"
    )
    command = [sys.executable, "-c", "import dmdata.errors\n" + program, NAME, catalog]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) for _ in range(8)]
    counts = [int(racer.communicate(timeout=100)[0]) for racer in racers]
    limit, spent = float(os.environ["DMDATA_MAX_COST"]), dmdata.spend().usd
    figures.append(
        f"fault, 8 processes and resets under one budget: {sum(counts)} reads done, ${spent:.6f} of ${limit:.6f} "
        f"spent, served for ${billed(s3):.6f}"
    )
    assert spent <= limit
    assert billed(s3) <= spent + 1e-12
    assert 1 <= sum(counts) <= 5
