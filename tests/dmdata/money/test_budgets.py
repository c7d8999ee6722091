"""A budget block holds whatever reads for it, whenever it was started; what was not sent, or is free, is not booked."""

import concurrent.futures
import copy
import multiprocessing
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import Child
from servers.loopback import BUCKET, Fault, LoopbackS3
from small_release import npy, publish

import dmdata
from dmdata.array import LazyArray
from dmdata.errors import BudgetError, DmdataError, SourceError
from dmdata.money.budgets import held
from dmdata.money.ledger import Ledger, home
from dmdata.money.prices import Terms
from dmdata.objects.address import Address
from dmdata.objects.endpoints import own_endpoint
from dmdata.reading.fetch import Transport
from dmdata.release.opening import load_catalog, reader_pays
from dmdata.settings import set_in_file
from dmdata.views.interop import torch_dataset

VALUES = np.arange(12_000, dtype=np.float32).reshape(40, 300)
NAME = "toy/50pct/test_margins"
MASKS = "toy/50pct/train_masks"


@pytest.fixture(autouse=True)
def nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pay for what is read again."""
    monkeypatch.setenv("DMDATA_CACHE_GIB", "0")


@pytest.fixture
def catalog(s3: LoopbackS3, tmp_path: Path) -> str:
    return publish(s3, {NAME: VALUES, MASKS: VALUES > 6000}, tmp_path)


@pytest.fixture
def lazy(s3: LoopbackS3, catalog: str) -> LazyArray:
    array = dmdata.open(NAME, catalog=catalog).read_header()
    s3.reset_log()
    return array


def read_row(array: LazyArray, row: int = 0) -> float:
    return float(array[row, 0])


def open_and_read(catalog: str) -> float:
    return float(dmdata.open(NAME, catalog=catalog)[1, 0])


def outcome(work: Callable[[], object]) -> str:
    try:
        work()
    except BudgetError:
        return "held"
    return "read"


def in_thread(work: Callable[[], object]) -> str:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(outcome(work)))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture(params=["fork", "spawn"])
def pool(request: pytest.FixtureRequest) -> Iterator[Any]:
    with multiprocessing.get_context(request.param).Pool(1) as started:
        started.apply(os.getpid)
        yield started


def test_a_pool_started_before_is_held(s3: LoopbackS3, lazy: LazyArray, catalog: str, pool: Any) -> None:
    with dmdata.budget(usd=0):
        with pytest.raises(BudgetError, match="budget in force"):
            pool.apply(read_row, (lazy,))
        with pytest.raises(BudgetError, match="budget in force"):
            pool.apply(open_and_read, (catalog,))
        assert s3.n_requests == 0
    assert pool.apply(read_row, (lazy, 1)) == 300
    assert pool.apply(open_and_read, (catalog,)) == 300


def test_an_executor_started_before_is_held(s3: LoopbackS3, lazy: LazyArray, catalog: str) -> None:
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        executor.submit(os.getpid).result()
        with dmdata.budget(usd=0):
            for call in ((read_row, lazy), (open_and_read, catalog)):
                with pytest.raises(BudgetError):
                    executor.submit(*call).result()
        assert s3.n_requests == 0
        assert executor.submit(read_row, lazy, 1).result() == 300


def test_workers_started_before_count_together_in_one_block(lazy: LazyArray, pool: Any) -> None:
    usd = lazy.estimate(np.s_[0, 0]).usd
    with dmdata.budget(usd=2.5 * usd):
        read_row(lazy)
        pool.apply(read_row, (lazy,))
        with pytest.raises(BudgetError):
            pool.apply(read_row, (lazy,))
        with pytest.raises(BudgetError):
            read_row(lazy)


def test_a_thread_pool_started_before_is_held(s3: LoopbackS3, lazy: LazyArray) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        executor.submit(os.getpid).result()
        with dmdata.budget(usd=0), pytest.raises(BudgetError):
            executor.submit(read_row, lazy).result()
        assert s3.n_requests == 0


def test_two_threads_with_two_blocks_keep_their_own(lazy: LazyArray) -> None:
    opened = threading.Barrier(2, timeout=20)
    ended = threading.Barrier(2, timeout=20)
    found: dict[float, list[str]] = {}

    def work(usd: float) -> None:
        with dmdata.budget(usd=usd):
            opened.wait()
            found[usd] = [outcome(lambda: read_row(lazy)), outcome(lambda: read_row(copy.deepcopy(lazy)))]
            found[usd].append(outcome(lambda: read_row(pickle.loads(pickle.dumps(lazy)))))
            found[usd].append(in_thread(lambda: read_row(lazy)))
            ended.wait()

    threads = [threading.Thread(target=work, args=(usd,)) for usd in (0.0, 0.5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0.5][:3] == ["read"] * 3
    assert found[0.0] == ["held"] * 4
    assert found[0.5][3] == "held", "a thread with no block of its own is held by every block of its process"


def test_blocks_of_two_threads_reach_the_same_pool_each_for_its_own_work(lazy: LazyArray, pool: Any) -> None:
    # pickled here, in the thread whose work it is: a pool pickles in a thread of its own
    opened = threading.Barrier(2, timeout=20)
    ended = threading.Barrier(2, timeout=20)
    found: dict[float, str] = {}

    def work(usd: float) -> None:
        with dmdata.budget(usd=usd):
            sent = pickle.dumps(lazy)
            opened.wait()
            found[usd] = outcome(lambda: pool.apply(read_pickled, (sent,)))
            ended.wait()

    threads = [threading.Thread(target=work, args=(usd,)) for usd in (0.0, 0.5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0.0: "held", 0.5: "read"}


def read_pickled(sent: bytes) -> float:
    return read_row(pickle.loads(sent))


def test_nested_blocks_all_travel_with_what_is_pickled(lazy: LazyArray) -> None:
    with dmdata.budget(usd=0), dmdata.budget(usd=5):
        sent = pickle.loads(pickle.dumps(lazy))
        again = pickle.loads(pickle.dumps(sent))
    for array in (sent, again):
        assert len(array.body.transport.held_by) == 2
        with pytest.raises(BudgetError):
            read_row(array)
    assert sent.body.transport == lazy.body.transport


def test_a_block_opened_later_inside_the_one_it_was_sent_from_holds_too(lazy: LazyArray, pool: Any) -> None:
    with dmdata.budget(usd=5):
        sent = pickle.dumps(lazy)
        assert pool.apply(read_pickled, (sent,)) == 0
        with dmdata.budget(usd=0), pytest.raises(BudgetError):
            pool.apply(read_pickled, (sent,))


def test_what_was_sent_in_a_block_counts_towards_it_after_its_end(lazy: LazyArray) -> None:
    usd = lazy.estimate(np.s_[0, 0]).usd
    with dmdata.budget(usd=1.5 * usd):
        late = pickle.loads(pickle.dumps(lazy))
    read_row(late)
    with pytest.raises(BudgetError, match="open it again"):
        read_row(late)
    read_row(lazy)


def test_a_copy_in_this_process_is_no_journey(lazy: LazyArray) -> None:
    with dmdata.budget(usd=0):
        copies = copy.copy(lazy), copy.deepcopy(lazy)
    for array in copies:
        read_row(array)


def test_a_block_whose_process_was_killed_holds_nobody() -> None:
    program = """
import subprocess, sys, dmdata
with dmdata.budget(usd=0):
    print("in", flush=True)
    subprocess.run([sys.executable, "-c", "input()"])
"""
    with Child([sys.executable, "-c", program], stdout=subprocess.PIPE, stdin=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        with Ledger(home()).transaction() as connection:
            assert connection.execute("SELECT COUNT(*) FROM block WHERE ended IS NULL").fetchone() == (1,)
        process.kill()
    Ledger(home()).spent()
    with Ledger(home()).transaction() as connection:
        assert connection.execute("SELECT COUNT(*) FROM block WHERE ended IS NULL").fetchone() == (0,)


def test_a_child_forked_in_a_block_does_not_end_it_for_the_others(lazy: LazyArray, pool: Any) -> None:
    with ExitStack() as stack:
        stack.enter_context(dmdata.budget(usd=0))
        pid = os.fork()
        if not pid:
            stack.close()
            os._exit(0)
        os.waitpid(pid, 0)
        with pytest.raises(BudgetError):
            pool.apply(read_row, (lazy,))


WITHOUT_ANCESTORS = """
import os, pickle, sys, time
from dmdata.errors import BudgetError, DmdataError, SourceError
parent = os.getpid()
if os.fork():
    os._exit(0)
while os.getppid() == parent:
    time.sleep(0.01)
try:
    print(pickle.load(open(sys.argv[1], "rb"))[1, 0], flush=True)
except DmdataError as error:
    print(type(error).__name__, error, flush=True)
"""


def elsewhere(lazy: LazyArray, tmp_path: Path, **variables: str) -> str:
    """Read in a process that descends from nobody here and inherited no block, as a worker on another host."""
    (tmp_path / "sent").write_bytes(pickle.dumps(lazy))
    environment = {name: text for name, text in os.environ.items() if name != "DMDATA_BUDGETS"} | variables
    command = [sys.executable, "-c", WITHOUT_ANCESTORS, str(tmp_path / "sent")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_work_sent_to_a_process_that_is_no_descendant_is_held(s3: LoopbackS3, lazy: LazyArray, tmp_path: Path) -> None:
    with dmdata.budget(usd=0):
        assert elsewhere(lazy, tmp_path).startswith("BudgetError")
        assert s3.n_requests == 0
    assert elsewhere(lazy, tmp_path) == "300.0"


def test_a_worker_that_does_not_share_the_ledger_refuses_paid_reads(
    s3: LoopbackS3, lazy: LazyArray, tmp_path: Path
) -> None:
    with dmdata.budget(usd=5):
        said = elsewhere(lazy, tmp_path, DMDATA_HOME=str(tmp_path / "other"))
    assert "does not share the ledger" in said
    assert "DMDATA_HOME" in said
    assert s3.n_requests == 0


@pytest.mark.parametrize("processes", [True, False])
def test_a_dask_cluster_started_before_is_held(
    s3: LoopbackS3, lazy: LazyArray, processes: bool, tmp_path: Path
) -> None:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, processes=processes, dashboard_address=None, silence_logs="CRITICAL"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        built_before = lazy.to_dask(chunks=(10, 300)).mean()
        with dmdata.budget(usd=0):
            for compute in (built_before.compute, lazy.to_dask(chunks=(10, 300)).sum().compute):
                with pytest.raises(BudgetError):
                    compute()
            with pytest.raises(BudgetError):
                client.submit(read_row, lazy, pure=False).result()
        assert s3.n_requests == 0
        assert built_before.compute() == pytest.approx(VALUES.mean(dtype=np.float64))


def test_a_data_loader_with_persistent_workers_started_before_is_held(
    s3: LoopbackS3, lazy: LazyArray, catalog: str
) -> None:
    data = pytest.importorskip("torch.utils.data")
    masks = dmdata.open(MASKS, catalog=catalog).read_header()
    batches = torch_dataset(masks, lazy, batch_rows=10)
    loader = data.DataLoader(
        batches, batch_size=None, num_workers=1, persistent_workers=True, multiprocessing_context="spawn"
    )
    assert len(list(loader)) == 4
    s3.reset_log()
    with dmdata.budget(usd=0), pytest.raises(BudgetError):
        list(loader)
    assert s3.n_requests == 0
    assert len(list(loader)) == 4


def test_where_the_ledger_cannot_be_written_a_block_begins_and_nothing_that_costs_is_read(lazy: LazyArray) -> None:
    shutil.rmtree(home())
    home().write_text("a file")
    with dmdata.budget(usd=1), pytest.raises(DmdataError, match="cannot be used"):
        read_row(lazy)
    assert "DMDATA_BUDGETS" not in os.environ


def test_a_block_left_in_another_context_is_over_there_too() -> None:
    def in_block() -> Iterator[int]:
        with dmdata.budget(usd=0):
            yield 1

    generator = in_block()
    next(generator)
    thread = threading.Thread(target=lambda: list(generator))
    thread.start()
    thread.join()
    assert held().certain == ()


@pytest.fixture
def shut(s3: LoopbackS3, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name an endpoint at which nobody listens."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
    return f"http://127.0.0.1:{port}"


def test_reads_that_were_never_sent_are_not_booked(lazy: LazyArray, shut: str) -> None:
    before = dmdata.spend()
    # each is tried six times, with pauses: so at once
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for reading in [pool.submit(lazy.__getitem__, key) for key in (np.s_[:], np.s_[0], np.s_[::2, 0])]:
            with pytest.raises(SourceError):
                reading.result()
    after = dmdata.spend()
    assert (after.usd, after.n_bytes, after.n_requests) == (before.usd, before.n_bytes, before.n_requests)
    with Ledger(home()).transaction() as connection:
        committed = connection.execute("SELECT SUM(committed_pico) FROM budget WHERE scope LIKE 'month:%'").fetchone()
    assert committed == (round(before.usd * 10**12),)


def test_a_header_that_was_never_asked_for_is_not_booked(catalog: str, shut: str) -> None:
    with pytest.raises(SourceError) as caught:
        dmdata.open(NAME, catalog=catalog).read_header()
    assert caught.value.n_tries > 1
    total = dmdata.spend()
    assert (total.usd, total.n_bytes, total.n_requests) == (0, 0, 0)


def test_a_read_that_was_sent_and_broke_is_booked(s3: LoopbackS3, lazy: LazyArray) -> None:
    before = dmdata.spend()
    s3.inject(Fault(drop=True), times=1)
    assert lazy[0, 0] == 0
    after = dmdata.spend()
    assert after.n_requests - before.n_requests == 2


@pytest.fixture
def own_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackS3]:
    """Play an endpoint of one's own, which charges nobody."""
    with LoopbackS3(requester_pays=False) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        server.put("x.npy", npy(VALUES))
        yield server


def test_an_address_at_an_endpoint_of_ones_own_is_free(own_store: LoopbackS3) -> None:
    with dmdata.budget(usd=0.00001):
        lazy = dmdata.open(f"s3://{BUCKET}/x.npy")
    assert dmdata.spend().usd == 0, "the header was set aside as if it were paid for, and turned out to be free"
    assert [request.charged for request in own_store.log] == [False]
    with dmdata.budget(usd=0):
        np.testing.assert_array_equal(lazy[:], VALUES)
        np.testing.assert_array_equal(dmdata.open(f"s3://{BUCKET}/x.npy")[:], VALUES)
    assert lazy.price_usd(10**12, 10**6) == 0
    assert dmdata.spend().usd == 0
    assert not lazy.body.transport.is_paid


def test_an_address_whose_answer_says_that_it_is_charged_counts_at_any_endpoint(
    s3: LoopbackS3, lazy: LazyArray
) -> None:
    s3.put("x.npy", npy(VALUES))
    array = dmdata.open(f"s3://{BUCKET}/x.npy")
    before = dmdata.spend().usd
    array[0]
    assert dmdata.spend().usd - before == pytest.approx(array.estimate(0).usd)
    with dmdata.budget(usd=0), pytest.raises(BudgetError):
        array[0]


def test_prices_named_for_endpoints_of_ones_own_count_there(own_store: LoopbackS3) -> None:
    set_in_file("endpoint_prices", "{usd_per_get: 0.01}")
    array = dmdata.open(f"s3://{BUCKET}/x.npy")
    array[0]
    assert dmdata.spend().usd == pytest.approx(0.02), "the header and a row: a cent each, and bytes cost nothing"
    assert array.estimate(0).usd == pytest.approx(0.01)
    with dmdata.budget(usd=0.015), pytest.raises(BudgetError):
        array[:2], array[2:4]


def test_what_is_asked_for_consent_is_priced_by_the_prices_that_are_named(
    own_store: LoopbackS3, tmp_path: Path
) -> None:
    catalog = Path(publish(own_store, {NAME: VALUES, MASKS: VALUES > 6000}, tmp_path))
    text = catalog.read_text().replace("requester_pays: true", "requester_pays: false\n  prices: {usd_per_get: 0.05}")
    catalog.write_text(text)
    both = dmdata.estimate([NAME, MASKS], catalog=str(catalog))
    assert both.usd == pytest.approx(0.05 * both.n_requests)
    one = dmdata.estimate(NAME, select="0:2", catalog=str(catalog))
    assert one.usd == pytest.approx(0.05), "the header and the rows in one request"


def test_prices_of_a_catalog_count_where_nobody_is_charged_by_s3(own_store: LoopbackS3, tmp_path: Path) -> None:
    catalog = Path(publish(own_store, {NAME: VALUES}, tmp_path))
    text = catalog.read_text().replace("requester_pays: true", "requester_pays: false\n  prices: {usd_per_get: 0.05}")
    catalog.write_text(text)
    dmdata.open(NAME, catalog=str(catalog))[0]
    assert dmdata.spend().usd == pytest.approx(0.05)


def test_on_aws_itself_an_address_always_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    address = Address("s3://bucket/x.npy", requester_pays=True)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    for endpoint in (
        None,
        "https://s3.eu-west-1.amazonaws.com",
        "https://bucket.vpce-1.s3.us-east-1.vpce.amazonaws.com",
    ):
        if endpoint:
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        for charged in (None, True, False):
            assert Transport(address, "x", charged=charged).is_paid


@pytest.mark.parametrize(
    ("config", "own"),
    [
        ("[default]\nendpoint_url = http://minio:9000\n", "http://minio:9000"),
        ("[default]\nservices = mine\n[services mine]\ns3 =\n  endpoint_url = http://r2:1\n", "http://r2:1"),
        ("[default]\nservices = mine\n[services mine]\nsqs =\n  endpoint_url = http://r2:1\n", None),
        ("[default]\nendpoint_url = http://minio:9000\nignore_configured_endpoint_urls = true\n", None),
        ("[default]\nendpoint_url = https://s3.us-east-1.amazonaws.com\n", None),
        ("[default]\nendpoint_url = https://amazonaws.com.evil.example\n", "https://amazonaws.com.evil.example"),
    ],
)
def test_an_endpoint_of_the_aws_config_file_is_known(config: str, own: str | None) -> None:
    Path(os.environ["AWS_CONFIG_FILE"]).write_text(config)
    assert own_endpoint() == own


def test_consent_is_asked_until_an_endpoint_of_ones_own_has_said_that_it_does_not_charge(
    own_store: LoopbackS3,
) -> None:
    url, empty, terms = f"s3://{BUCKET}/x.npy", load_catalog(None), Terms.in_force()
    assert reader_pays(url, empty, terms)
    dmdata.open(url).read_header()
    assert not reader_pays(url, empty, terms)


@pytest.mark.parametrize("text", ["~/dm", "dm", "./dm", "x/../dm"])
def test_the_home_is_one_place_whatever_the_working_directory(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DMDATA_HOME", text)
    program = "import dmdata.money.ledger; print(dmdata.money.ledger.home())"
    for folder in (tmp_path, Path("/")):
        done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(tmp_path / "dm")
    assert home() == tmp_path / "dm"
