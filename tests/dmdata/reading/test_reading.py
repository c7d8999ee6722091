"""A lazy array reads what NumPy would, byte for byte, and the ledger says what the server served."""

import math
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from servers.loopback import BUCKET, SECRET, Fault, LoopbackS3
from small_release import Pt, npy, publish, write_locally

import dmdata
from dmdata.errors import (
    AccessError,
    BudgetError,
    CatalogError,
    DmdataError,
    FormatError,
    IntegrityError,
    ObjectMissingError,
    SelectionError,
    SourceError,
)
from dmdata.money.ledger import Ledger, home

NAME = "toy/50pct/test_logits"
VALUES = np.arange(40 * 30 * 4, dtype=np.float32).reshape(40, 30, 4)
BIG = "toy/50pct/test_margins"
WIDE = np.random.default_rng(0).integers(0, 255, (40, 1 << 20), np.uint8)
"""40 MiB: a read of all of it takes ten requests of 4 MiB."""


@pytest.fixture
def server(s3: LoopbackS3) -> Iterator[LoopbackS3]:
    """A server to which no request without a range, and none that is not paid for, may ever have gone."""
    yield s3
    assert all(request.method == "GET" and request.range for request in s3.log), s3.log
    assert all(request.charged for request in s3.log if request.status == 206)


@pytest.fixture
def catalog(server: LoopbackS3, tmp_path: Path) -> str:
    return publish(server, {NAME: VALUES, BIG: WIDE}, tmp_path)


@pytest.fixture
def array(server: LoopbackS3, catalog: str) -> dmdata.LazyArray:
    opened = dmdata.open(NAME, catalog=catalog).read_header()
    server.reset_log()
    return opened


@pytest.fixture
def wide(server: LoopbackS3, catalog: str) -> dmdata.LazyArray:
    opened = dmdata.open(BIG, catalog=catalog).read_header()
    server.reset_log()
    return opened


def spent_by(work: Any) -> tuple[int, int, float]:
    """Bytes, requests and dollars that some work adds to the ledger."""
    before = dmdata.spend()
    work()
    after = dmdata.spend()
    return after.n_bytes - before.n_bytes, after.n_requests - before.n_requests, after.usd - before.usd


# the server is only read from, so that all examples may share it
shared = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@shared
@given(key=hnp.basic_indices(VALUES.shape))
def test_basic_indexing_equals_numpy_and_costs_what_was_planned(
    server: LoopbackS3, array: dmdata.LazyArray, key: Any
) -> None:
    server.reset_log()
    plan, price, got = array.plan(key), array.estimate(key), []
    n_bytes, n_requests, usd = spent_by(lambda: got.append(array[key]))
    np.testing.assert_array_equal(got[0], VALUES[key])
    assert got[0].dtype == VALUES.dtype
    assert type(got[0]) is type(VALUES[key]), "numbers where NumPy gives numbers"
    assert n_bytes == server.n_bytes == plan.n_bytes == price.n_bytes
    assert n_requests == server.n_requests == plan.n_requests == price.n_requests
    assert usd == pytest.approx(price.usd)


@shared
@given(data=st.data())
def test_orthogonal_indexing_equals_numpys_ix_and_costs_what_was_planned(
    server: LoopbackS3, array: dmdata.LazyArray, data: st.DataObject
) -> None:
    picks = [data.draw(hnp.arrays(int, st.integers(0, 6), elements=st.integers(-n, n - 1))) for n in VALUES.shape]
    server.reset_log()
    plan, got = array.plan(tuple(picks)), []
    n_bytes, n_requests, _ = spent_by(lambda: got.append(array.oindex[tuple(picks)]))
    np.testing.assert_array_equal(got[0], VALUES[np.ix_(*picks)])
    assert (n_bytes, n_requests) == (server.n_bytes, server.n_requests) == (plan.n_bytes, plan.n_requests)


def test_opening_and_reading_cost_what_the_estimate_by_the_catalog_says(server: LoopbackS3, catalog: str) -> None:
    price = dmdata.estimate(NAME, select="3:9,[1,5],0", catalog=catalog)
    got = dmdata.open(NAME, catalog=catalog).oindex[3:9, [1, 5], 0]
    np.testing.assert_array_equal(got, VALUES[3:9, [1, 5], 0])
    total = dmdata.spend()
    assert (total.n_bytes, total.n_requests) == (price.n_bytes, price.n_requests) == (server.n_bytes, server.n_requests)
    assert total.usd == pytest.approx(price.usd)


def test_a_read_longer_than_one_range_is_cut_and_joined(server: LoopbackS3, wide: dmdata.LazyArray) -> None:
    np.testing.assert_array_equal(wide[...], WIDE)
    assert server.n_requests == 10
    assert server.n_bytes == WIDE.nbytes
    np.testing.assert_array_equal(wide[::7, 5], WIDE[::7, 5])
    np.testing.assert_array_equal(wide[:, [999_999, 3]], WIDE[:, [999_999, 3]])


def test_a_range_of_an_object_is_fetched_once_however_often_it_is_wanted(
    server: LoopbackS3, array: dmdata.LazyArray
) -> None:
    np.testing.assert_array_equal(array[[5, 5, 5, 4, 5]], VALUES[[5, 5, 5, 4, 5]])
    assert (server.n_requests, server.n_bytes) == (1, 2 * VALUES[0].nbytes)


def test_a_lazy_array_looks_like_an_array_and_its_repr_touches_nothing(
    server: LoopbackS3, array: dmdata.LazyArray
) -> None:
    assert (array.shape, array.dtype, array.ndim, array.size, len(array)) == ((40, 30, 4), np.float32, 3, 4800, 40)
    assert (array.nbytes, array.dims, array.name) == (19_200, ("model", "example", "class"), NAME)
    assert repr(array) == (
        "<LazyArray toy/50pct/test_logits (model: 40, example: 30, class: 4) float32, 18.8 KiB at "
        f"s3://{BUCKET}/toy/data/test_logits_50pct.npy>"
    )
    assert repr(array.plan()) == "ReadPlan(n_requests=1, n_bytes=19,200, wanted_bytes=19,200, amplification=1.00)"
    with pytest.raises(TypeError):
        iter(array)
    assert server.n_requests == 0
    np.testing.assert_array_equal(np.asarray(array), VALUES)
    assert np.asarray(array, dtype=np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(array, copy=False)


def test_a_bad_selection_or_destination_sends_nothing(server: LoopbackS3, array: dmdata.LazyArray) -> None:
    for key in (40, np.s_[0, 0, 0, 0], ([0, 1], [0, 1]), "x", None, np.zeros(3, bool), 1.5):
        with pytest.raises(SelectionError):
            array[key]
    for attempt in (
        lambda: array.estimate(to="moon"),
        lambda: array.plan(to="moon"),
        lambda: dmdata.estimate("cifar/**", to="moon"),
    ):
        with pytest.raises(SelectionError, match="internet, same-region, cross-region"):
            attempt()
    assert server.n_requests == 0


def test_where_the_bytes_go_decides_how_ranges_are_merged(server: LoopbackS3, catalog: str) -> None:
    inside = dmdata.open(BIG, catalog=catalog, to="same-region").read_header()
    server.reset_log()
    n_bytes, n_requests, usd = spent_by(lambda: inside[:3, 0])
    assert (n_bytes, n_requests) == (2 * WIDE.shape[1] + 1, 1)
    assert usd == pytest.approx(0.0004 / 1000)
    server.reset_log()
    n_bytes, n_requests, _ = spent_by(lambda: dmdata.open(BIG, catalog=catalog, cache=False)[:3, 0])
    assert (n_bytes, n_requests) == (3, 3)


def test_several_threads_read_at_once(server: LoopbackS3, array: dmdata.LazyArray) -> None:
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda row: array[row], range(40)))
    np.testing.assert_array_equal(np.stack(rows), VALUES)
    assert dmdata.spend().n_bytes == server.n_bytes + 128


# Money


def test_a_read_over_the_budget_fails_before_any_request(server: LoopbackS3, wide: dmdata.LazyArray) -> None:
    price = wide.estimate()
    with dmdata.budget(usd=price.usd * 0.999), pytest.raises(BudgetError, match="nothing was fetched") as caught:
        wide[...]
    assert server.n_requests == 0
    assert caught.value.usd == pytest.approx(price.usd)
    assert caught.value.artifact == BIG
    with dmdata.budget(usd=price.usd * 1.001):
        wide[...]


def test_opening_under_an_empty_budget_fails_before_any_request(server: LoopbackS3, catalog: str) -> None:
    with dmdata.budget(usd=0), pytest.raises(BudgetError):
        dmdata.open(NAME, catalog=catalog).read_header()
    assert server.n_requests == 0


def test_what_is_local_needs_no_budget(tmp_path: Path) -> None:
    catalog = write_locally({NAME: VALUES}, tmp_path / "run")
    with dmdata.budget(usd=0):
        array = dmdata.open(NAME, catalog=catalog)
        np.testing.assert_array_equal(array[3:5], VALUES[3:5])
    assert array.estimate(np.s_[3:5]).usd > 0, "what it would cost from a release"
    assert dmdata.spend().n_reads == 0


# What breaks on the way


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=503),
        Fault(status=500),
        Fault(status=400, code="RequestTimeout"),
        Fault(drop=True),
        Fault(reset_after=0),
        Fault(reset_after=3 << 20),
        Fault(end_after=3 << 20),
        Fault(shorten_to=1 << 20),
        Fault(stall_seconds=0.3, stall_after=1 << 20),
    ],
    ids=repr,
)
def test_a_transfer_that_breaks_is_resumed(server: LoopbackS3, wide: dmdata.LazyArray, fault: Fault) -> None:
    server.inject(fault, times=2, after=1)
    n_bytes, n_requests, usd = spent_by(lambda: np.testing.assert_array_equal(wide[...], WIDE))
    # the ledger is an upper bound: of a transfer that broke, all that was asked for may be billed
    assert WIDE.nbytes <= server.n_object_bytes <= n_bytes <= WIDE.nbytes + 2 * (4 << 20)
    assert n_requests == server.n_requests
    assert usd == pytest.approx(n_bytes * 0.09 / 2**30 + n_requests * 0.0004 / 1000)


def test_after_a_break_only_what_is_missing_is_asked_for(server: LoopbackS3, wide: dmdata.LazyArray) -> None:
    server.inject(Fault(end_after=3 << 20))
    np.testing.assert_array_equal(wide[:4], WIDE[:4])
    first, second = (request.range for request in server.log)
    assert first == f"bytes=128-{(4 << 20) + 127}"
    assert second == f"bytes={(3 << 20) + 128}-{(4 << 20) + 127}", "every byte that arrived is kept"


def test_a_transfer_that_stalls_is_broken_off_and_resumed(server: LoopbackS3, wide: dmdata.LazyArray) -> None:
    server.inject(Fault(stall_seconds=60, stall_after=3 << 20))
    np.testing.assert_array_equal(wide[:4], WIDE[:4])
    assert server.n_requests == 2
    assert server.n_object_bytes <= dmdata.spend().n_bytes <= (4 << 20) + (1 << 20) + 128


@pytest.mark.parametrize("status", [403, 404])
def test_a_refusal_is_never_tried_again(server: LoopbackS3, array: dmdata.LazyArray, status: int) -> None:
    server.inject(Fault(status=status), times=math.inf)
    with pytest.raises(AccessError if status == 403 else ObjectMissingError):
        array[...]
    assert server.n_requests == 1


def test_a_server_that_stays_down_is_given_up_and_said_to_be(server: LoopbackS3, array: dmdata.LazyArray) -> None:
    server.inject(Fault(status=503), times=math.inf)
    with pytest.raises(SourceError, match=r"given up after 6 tries.*try again later") as caught:
        array[...]
    assert caught.value.transient
    assert caught.value.exit_code == 5
    assert caught.value.n_tries == server.n_requests == 6
    assert dmdata.spend().n_bytes == 128


def test_tries_are_paid_for_and_never_pass_the_budget(server: LoopbackS3, array: dmdata.LazyArray) -> None:
    server.inject(Fault(status=503), times=math.inf)
    with dmdata.budget(usd=array.estimate().usd + 2.5 * 0.0004 / 1000), pytest.raises(BudgetError):
        array[...]
    assert server.n_requests == 3


def test_the_first_error_stops_the_other_connections_and_the_ledger_stays_an_upper_bound(
    server: LoopbackS3, wide: dmdata.LazyArray
) -> None:
    server.bytes_per_second = 4e6
    server.inject(Fault(status=403, stall_seconds=0.2), when=lambda request: f"={(4 << 20) + 128}-" in request.range)
    with pytest.raises(AccessError):
        wide[...]
    spent = dmdata.spend()
    assert server.n_object_bytes <= spent.n_bytes
    assert spent.n_bytes <= 9 * (4 << 20) + 128
    assert server.n_object_bytes < WIDE.nbytes / 2


@pytest.mark.parametrize("stalled", [False, True], ids=["while bytes arrive", "while the server is silent"])
def test_ctrl_c_ends_a_read_at_once(server: LoopbackS3, wide: dmdata.LazyArray, stalled: bool) -> None:
    if stalled:
        server.inject(Fault(stall_seconds=120, stall_after=1 << 20), times=math.inf)
    else:
        server.bytes_per_second = 4e5

    def interrupt_while_reading() -> None:
        while server.n_object_bytes < (1 << 20 if stalled else 1):
            time.sleep(0.01)
        time.sleep(0.5)
        signal.raise_signal(signal.SIGINT)  # the signal comes to another thread, as it may

    interrupt = threading.Thread(target=interrupt_while_reading)
    interrupted_by = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            wide[...]
        if stalled:
            assert "dmdata-fetch" in {thread.name for thread in threading.enumerate()}, "it waited for a silent server"
    finally:
        signal.signal(signal.SIGINT, interrupted_by)
        interrupt.join()
    assert dmdata.spend().n_bytes >= server.n_object_bytes
    assert server.n_object_bytes < WIDE.nbytes / 2


def test_every_read_asks_for_the_object_first_seen(server: LoopbackS3, array: dmdata.LazyArray) -> None:
    array[::3, 5]
    array[...]
    etag = server.etag("toy/data/test_logits_50pct.npy")
    assert server.log
    assert {request.if_match for request in server.log} == {etag}


def test_the_ledger_says_that_the_source_confirmed_to_charge(
    server: LoopbackS3, array: dmdata.LazyArray, catalog: str
) -> None:
    array[3]
    (state,) = Ledger(home()).spent(by="charged").items()
    assert state[0] == "confirmed"
    assert state[1].n_requests == server.n_requests + 1
    dmdata.open(array.name, catalog=catalog)[3]
    assert list(Ledger(home()).spent(by="charged")) == ["confirmed"], "the header's memory knows it, too"


def test_a_whole_object_where_a_range_is_due_never_gives_wrong_bytes(
    server: LoopbackS3, array: dmdata.LazyArray
) -> None:
    server.inject(Fault(whole=True))
    try:
        got = array[3:5, 2]
    except (SourceError, IntegrityError):
        return
    np.testing.assert_array_equal(got, VALUES[3:5, 2])


def test_a_server_that_knows_no_ranges_is_an_error(server: LoopbackS3, array: dmdata.LazyArray) -> None:
    server.inject(Fault(whole=True), times=math.inf)
    with pytest.raises((SourceError, IntegrityError)):
        array[3:5, 2]


def test_an_object_cut_short_behind_our_back_is_an_error(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", VALUES)
    array = dmdata.open(tmp_path / "x.npy")
    os.truncate(tmp_path / "x.npy", 1000)
    with pytest.raises(IntegrityError):
        array[...]


# Processes


def test_a_pickled_array_holds_no_credentials_and_reads_elsewhere(server: LoopbackS3, array: dmdata.LazyArray) -> None:
    blob = pickle.dumps(array)
    for secret in (SECRET, server.env["AWS_ACCESS_KEY_ID"]):
        assert secret.encode() not in blob
    np.testing.assert_array_equal(pickle.loads(blob)[7], VALUES[7])
    array[3]
    assert pickle.dumps(array) == blob, "reading leaves nothing in it"
    program = "import pickle, sys; print(float(pickle.load(sys.stdin.buffer)[7].sum()))"
    done = subprocess.run([sys.executable, "-c", program], input=blob, capture_output=True, check=True)
    assert float(done.stdout) == VALUES[7].sum()


# in a process of its own: a client that is carried over a fork can crash the parent, too
READ_IN_FORKED_CHILDREN = """
import multiprocessing, sys, threading
import dmdata
name, catalog, n_threads, n_children = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
array = dmdata.open(name, catalog=catalog)
done = threading.Event()
def keep_reading():
    while not done.is_set():
        array[0]
array[0]
threads = [threading.Thread(target=keep_reading) for _ in range(n_threads)]
for thread in threads:
    thread.start()
context = multiprocessing.get_context("fork")
for nth in range(n_children):
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(float(array[nth, :5].sum())))
    child.start()
    print(receiver.recv() if receiver.poll(8) else "hangs", flush=True)
    child.kill()
    child.join()
done.set()
for thread in threads:
    thread.join()
print(float(array[9].sum()))
"""


@pytest.mark.parametrize("n_threads", [0, 3], ids=["alone", "while threads read"])
def test_forked_children_read_without_hanging_or_harming_their_parent(
    server: LoopbackS3, catalog: str, n_threads: int
) -> None:
    server.latency_seconds = 0.02
    program = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", READ_IN_FORKED_CHILDREN]
    done = subprocess.run([*program, NAME, catalog, str(n_threads), "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:] + f"ended with {done.returncode}"
    expected = [VALUES[0, :5].sum(), VALUES[1, :5].sum(), VALUES[9].sum()]
    assert [float(line) for line in done.stdout.split()] == expected
    assert dmdata.spend().n_bytes == server.n_bytes, "the children's reads are in the same ledger"


FORKED_FROM_A_USER_OF_OBSTORE = """
import multiprocessing, os, sys
from obstore.store import S3Store
known, name, catalog, bucket, key = sys.argv[1:]
if known != "nothing":
    import dmdata
if known == "array":
    dmdata.open(name, catalog=catalog)
where = {"endpoint": os.environ["AWS_ENDPOINT_URL_S3"], "client_options": {"allow_http": True}}
store = S3Store(bucket, request_payer=True, **where)
read = lambda: len(store.get_range(key, start=0, length=100))
def row_sum(row):
    import dmdata
    return float(dmdata.open(name, catalog=catalog)[row].sum())
read()
with multiprocessing.get_context("fork").Pool(2) as pool:
    work = [pool.apply_async(row_sum, (row,)) for row in range(6)]
    print(sum(read() for _ in range(30)))
    for one in work:
        print(one.get(timeout=60))
"""


@pytest.mark.parametrize("known", ["array", "package", "nothing"])
def test_children_forked_from_a_process_that_uses_obstore_itself_leave_it_whole(
    server: LoopbackS3, catalog: str, known: str
) -> None:
    key = dmdata.open(NAME, catalog=catalog).url.removeprefix(f"s3://{BUCKET}/")
    program = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED_FROM_A_USER_OF_OBSTORE]
    done = subprocess.run([*program, known, NAME, catalog, BUCKET, key], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:] + f"ended with {done.returncode}"
    assert [float(line) for line in done.stdout.split()] == [3000.0, *(row.sum() for row in VALUES[:6])]


# Other forms and places


def test_the_members_of_a_remote_pt_are_lazy_and_exact(server: LoopbackS3, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    values = {"weight": np.arange(60_000, dtype=np.float32).reshape(300, 200), "bias": np.arange(200, dtype=np.float32)}
    path = tmp_path / "x.pt"
    torch.save({name: torch.from_numpy(array) for name, array in values.items()}, path)
    catalog = publish(server, {"toy/50pct/test_datamodels": Pt(path.read_bytes(), values)}, tmp_path)
    weight = dmdata.open("toy/50pct/test_datamodels/weight", catalog=catalog).read_header()
    assert (weight.shape, weight.dtype) == ((300, 200), np.float32)
    assert server.n_requests <= 3, "its start, its directory, and the header before the second tensor"
    assert server.n_bytes < 9_000, "the header of a .pt is a few kilobytes"
    assert dmdata.spend().n_bytes == server.n_bytes
    bias = dmdata.open("toy/50pct/test_datamodels/bias", catalog=catalog).read_header()
    server.reset_log()
    np.testing.assert_array_equal(weight[10:12], values["weight"][10:12])
    assert server.n_bytes == 2 * 200 * 4
    np.testing.assert_array_equal(bias[...], values["bias"])
    np.testing.assert_array_equal(weight[:, 3], values["weight"][:, 3])
    by_address = dmdata.open(f"s3://{BUCKET}/toy/datamodels/test_datamodels_50pct.pt/bias")
    np.testing.assert_array_equal(by_address[5:7], values["bias"][5:7])
    with pytest.raises(CatalogError, match="open one of toy/50pct/test_datamodels/weight"):
        dmdata.open("toy/50pct/test_datamodels", catalog=catalog)
    with pytest.raises(FormatError, match="no array 'wait'; it holds weight, bias"):
        dmdata.open(f"s3://{BUCKET}/toy/datamodels/test_datamodels_50pct.pt/wait")


def test_a_remote_pt_with_code_in_it_is_refused_unrun_and_not_remembered(server: LoopbackS3, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    marker = tmp_path / "was_run"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {marker}",)

    torch.save({"weight": Payload()}, tmp_path / "x.pt")
    server.put("x.pt", tmp_path / "x.pt")
    with pytest.raises(FormatError, match=re.escape(f"s3://{BUCKET}/x.pt")):
        dmdata.open(f"s3://{BUCKET}/x.pt/weight")
    assert not marker.exists()
    assert not (home() / "headers").exists()


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_in_fortran_order_and_without_dimensions_are_read(
    server: LoopbackS3, tmp_path: Path, order: Any
) -> None:
    values = np.asarray(VALUES, order=order)
    server.put("x.npy", npy(values))
    array = dmdata.open(f"s3://{BUCKET}/x.npy")
    np.testing.assert_array_equal(array[:, 3, 1:3], values[:, 3, 1:3])
    server.put("point.npy", npy(np.float32(2.5)))
    point = dmdata.open(f"s3://{BUCKET}/point.npy")
    assert (point.shape, float(point[()]), float(np.asarray(point))) == ((), 2.5, 2.5)
    with pytest.raises(TypeError, match="no length"):
        len(point)


def test_an_array_of_no_elements_is_read_without_a_request(server: LoopbackS3) -> None:
    server.put("x.npy", npy(np.zeros((0, 5), np.float16)))
    array = dmdata.open(f"s3://{BUCKET}/x.npy")
    server.reset_log()
    assert array[...].shape == (0, 5)
    assert server.n_requests == 0
    assert array.estimate().usd == 0


def places(tmp_path: Path) -> dict[str, str]:
    """The same array as a local file, as a file URL, in fsspec's memory, and in a Zarr store."""
    np.save(tmp_path / "x.npy", VALUES)
    fsspec.filesystem("memory").pipe("/reading/x.npy", npy(VALUES))
    store = zarr.create_array(tmp_path / "x.zarr", shape=VALUES.shape, dtype=VALUES.dtype, chunks=(7, 11, 3))
    store[...] = VALUES
    return {
        "file": str(tmp_path / "x.npy"),
        "file url": f"file://{tmp_path}/x.npy",
        "memory": "memory://reading/x.npy",
        "zarr": str(tmp_path / "x.zarr"),
    }


@pytest.mark.parametrize("place", ["file", "file url", "memory", "zarr"])
def test_an_array_is_read_alike_wherever_it_is(place: str, tmp_path: Path) -> None:
    array = dmdata.open(places(tmp_path)[place])
    assert (array.shape, array.dtype) == (VALUES.shape, VALUES.dtype)
    for key in (np.s_[3], np.s_[::-3, 2], np.s_[-1, -1, -1], np.s_[..., 1], np.s_[5:5], np.s_[:, [7, 7, 2]], ...):
        np.testing.assert_array_equal(array[key], VALUES[key])
    np.testing.assert_array_equal(array[3, :, [2, 0]], VALUES[3, :, [2, 0]])
    rows, columns, classes = [30, 2, 2], VALUES[0, :, 0] > 50, [-1]
    np.testing.assert_array_equal(
        array.oindex[rows, columns, classes], VALUES[np.ix_(rows, np.flatnonzero(columns), classes)]
    )
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(array))[4], VALUES[4])
    assert array.estimate(np.s_[3]).n_bytes == VALUES[3].nbytes
    assert dmdata.spend().n_reads == 0


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=hnp.basic_indices(VALUES.shape))
def test_an_array_of_a_zarr_store_is_indexed_as_numpy(tmp_path: Path, key: Any) -> None:
    if not (tmp_path / "x.zarr").exists():
        places(tmp_path)
    got = dmdata.open(tmp_path / "x.zarr")[key]
    np.testing.assert_array_equal(got, VALUES[key])
    assert got.dtype == VALUES.dtype


def test_a_file_that_is_replaced_while_open_fails_the_read(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", VALUES)
    array = dmdata.open(tmp_path / "x.npy")
    np.save(tmp_path / "y.npy", VALUES + 1)
    (tmp_path / "y.npy").replace(tmp_path / "x.npy")
    with pytest.raises(IntegrityError):
        array[...]
    np.testing.assert_array_equal(dmdata.open(tmp_path / "x.npy")[2], VALUES[2] + 1)


def test_what_is_no_array_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.npy").write_text("hello")
    with pytest.raises(FormatError, match=r"text\.npy is not a \.npy file"):
        dmdata.open(tmp_path / "text.npy")
    with pytest.raises(FormatError, match=r"none\.zarr is not a readable Zarr array"):
        dmdata.open(tmp_path / "none.zarr")
    zarr.create_group(tmp_path / "group.zarr")
    with pytest.raises(CatalogError, match=r"group\.zarr is a Zarr group without arrays; name an array"):
        dmdata.open(tmp_path / "group.zarr")
    with pytest.raises(ObjectMissingError, match=r"none\.npy"):
        dmdata.open(tmp_path / "none.npy")


def test_a_relative_path_is_opened_where_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", VALUES)
    monkeypatch.chdir(tmp_path)
    array = dmdata.open("x.npy")
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(array[3], VALUES[3])


def test_an_array_on_the_web_is_read_by_ranges_for_nothing() -> None:
    with LoopbackS3(requester_pays=False) as web:
        values = np.arange(5000, dtype="float16").reshape(500, 10)
        web.put("data/x.npy", npy(values))
        array = dmdata.open(f"{web.endpoint_url}/{BUCKET}/data/x.npy")
        np.testing.assert_array_equal(array[100:110], values[100:110])
        assert web.n_bytes == 128 + 200
        assert dmdata.spend().usd == 0


def test_a_secret_in_an_address_is_never_shown(s3: LoopbackS3, dmdata_home: Path) -> None:
    address = f"http://user:PASSWORD1@127.0.0.1:{s3.endpoint_url.rpartition(':')[2]}/nowhere/x.npy?X-Amz-Signature=SIG1"
    with pytest.raises(DmdataError) as caught:
        dmdata.open(address)
    shown = f"{caught.value!r} {caught.value} {caught.value.facts}"
    shown += "".join(path.read_text() for path in dmdata_home.rglob("*.json"))
    assert "PASSWORD1" not in shown
    assert "SIG1" not in shown


def test_a_selection_of_billions_of_pieces_is_priced() -> None:
    price = dmdata.estimate("cifar/50pct/test_margins", select=":,::2", catalog=dmdata.load_catalog())
    assert price.n_bytes == pytest.approx(310_000 * 10_000 * 2, rel=1e-3), "gaps are smaller than a request is worth"


def test_a_read_is_planned_for_speed_where_that_is_asked_for(server: LoopbackS3, catalog: str) -> None:
    values = np.random.default_rng(0).integers(0, 255, (2000, 5000), np.uint8)
    server.put("x.npy", npy(values))
    quick = dmdata.open(f"s3://{BUCKET}/x.npy", prefer="speed")
    price = quick.estimate(np.s_[:, 7])
    assert (price.cheapest.n_bytes, price.cheapest.n_requests) == (2000, 2000)
    n_merged = price.fastest.n_bytes
    assert 1999 * 5000 - 70_000 < n_merged <= 1999 * 5000 + 1
    assert price.fastest.n_requests == 7
    assert price.fastest.seconds < price.cheapest.seconds / 3
    server.reset_log()
    n_bytes, n_requests, _ = spent_by(lambda: np.testing.assert_array_equal(quick[:, 7], values[:, 7]))
    assert (n_bytes, n_requests) == (server.n_bytes, server.n_requests) == (n_merged, 7)
    with pytest.raises(SelectionError, match="price or speed"):
        dmdata.open(BIG, catalog=catalog, prefer="luck")  # type: ignore[arg-type] # on purpose
