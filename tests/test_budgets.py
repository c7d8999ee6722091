"""A budget block holds whatever reads for it: threads, pools, Dask workers and DataLoaders, whenever they were started."""

import concurrent.futures
import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers.loopback import LoopbackS3
from small_release import publish

import dmdata
from dmdata.array import LazyArray
from dmdata.blocks import held
from dmdata.errors import BudgetError, DmdataError
from dmdata.interop import torch_dataset
from dmdata.ledger import Ledger, home

VALUES = np.arange(12_000, dtype=np.float32).reshape(40, 300)
NAME = "toy/50pct/test_margins"
MASKS = "toy/50pct/train_masks"


@pytest.fixture
def catalog(s3: LoopbackS3, tmp_path: Path) -> str:
    return publish(s3, {NAME: VALUES, MASKS: VALUES > 6000}, tmp_path)


@pytest.fixture
def lazy(s3: LoopbackS3, catalog: str) -> LazyArray:
    array = dmdata.open(NAME, catalog=catalog)
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
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stdin=subprocess.PIPE) as process:
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
from dmdata.errors import BudgetError, DmdataError
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
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def test_work_sent_to_a_process_that_is_no_descendant_is_held(
    s3: LoopbackS3, lazy: LazyArray, tmp_path: Path
) -> None:
    with dmdata.budget(usd=0):
        assert elsewhere(lazy, tmp_path).startswith("BudgetError")
        assert s3.n_requests == 0
    assert elsewhere(lazy, tmp_path) == "300.0"


def test_a_worker_that_does_not_share_the_ledger_refuses_paid_reads(
    s3: LoopbackS3, lazy: LazyArray, tmp_path: Path
) -> None:
    with dmdata.budget(usd=5):
        said = elsewhere(lazy, tmp_path, DMDATA_HOME=str(tmp_path / "other"))
    assert "no part in the ledger" in said
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
    masks = dmdata.open(MASKS, catalog=catalog)
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


def test_a_block_that_cannot_be_entered_in_the_ledger_does_not_begin() -> None:
    home().write_text("a file")
    with pytest.raises(DmdataError, match="cannot be used"), dmdata.budget(usd=1):
        pytest.fail("others could not see it")
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
