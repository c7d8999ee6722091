"""An operation takes its terms from the settings once, and a plan is made once: counted where the system sees it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opened_files import opened_files
from servers.loopback import BUCKET, LoopbackS3
from small_release import npy, publish

import dmdata
from dmdata.array import LazyArray
from dmdata.cli.command import main
from dmdata.errors import BudgetError, SourceError
from dmdata.settings import set_in_file

NAME, OTHER = "cifar/50pct/test_margins", "cifar/50pct/train_masks"
VALUES = np.arange(60_000, dtype=np.float32).reshape(3000, 20)


def n_config_reads(work: Callable[[], object]) -> int:
    """Count how often config.yaml is opened meanwhile."""
    with opened_files() as paths:
        work()
    return sum(os.path.basename(path) == "config.yaml" for path in paths)


@pytest.fixture
def catalog(s3: LoopbackS3, tmp_path: Path, dmdata_home: Path) -> str:
    dmdata_home.mkdir()
    (dmdata_home / "config.yaml").write_text("max_cost: 5\nprices: {usd_per_get: 0.001}\n")
    return publish(s3, {NAME: VALUES, OTHER: VALUES > 9}, tmp_path)


@pytest.fixture
def lazy(catalog: str) -> LazyArray:
    return dmdata.open(NAME, catalog=catalog).read_header()


def test_reading_rows_looks_at_the_config_file_once(lazy: LazyArray) -> None:
    assert n_config_reads(lambda: lazy[7]) == 1
    assert n_config_reads(lambda: lazy[[1, 700, 2000]]) == 1
    assert n_config_reads(lambda: lazy[7]) == 0, "what is kept needs no budget"


def test_pricing_looks_at_the_config_file_once(lazy: LazyArray) -> None:
    assert n_config_reads(lambda: lazy.estimate(np.s_[:9])) == 1
    assert n_config_reads(lambda: dmdata.estimate("cifar/**")) == 1
    assert n_config_reads(lambda: dmdata.estimate("cifar/*/test_margins", select="0:9")) == 1


def test_an_operation_that_spends_looks_at_the_config_file_once_and_for_the_budget_at_each_request(
    s3: LoopbackS3, catalog: str, tmp_path: Path
) -> None:
    assert n_config_reads(lambda: dmdata.open(NAME, catalog=catalog).read_header()) == 1 + s3.n_requests
    s3.reset_log()
    # whether all of a copy fits the budget is asked once, too, before its first request
    assert n_config_reads(lambda: dmdata.mirror(OTHER, tmp_path / "m.zarr", catalog=catalog)) == 2 + s3.n_requests
    s3.reset_log()
    assert n_config_reads(lambda: dmdata.get(OTHER, tmp_path / "x.npy", catalog=catalog)) == 2 + s3.n_requests


def test_prices_that_are_set_hold_for_what_is_opened_afterwards(lazy: LazyArray, catalog: str) -> None:
    before = lazy.price_usd(0, 1)
    set_in_file("prices.usd_per_get", "0.002")
    assert lazy.price_usd(0, 1) == before == 0.001
    assert dmdata.open(NAME, catalog=catalog).price_usd(0, 1) == 0.002


def test_the_budget_and_being_offline_hold_for_arrays_that_are_open(
    s3: LoopbackS3, lazy: LazyArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_in_file("max_cost", "0")
    s3.reset_log()
    with pytest.raises(BudgetError):
        lazy[7]
    set_in_file("max_cost", "5")
    monkeypatch.setenv("DMDATA_OFFLINE", "1")
    with pytest.raises(SourceError, match="DMDATA_OFFLINE"):
        lazy[7]
    assert s3.n_requests == 0
    monkeypatch.delenv("DMDATA_OFFLINE")
    np.testing.assert_array_equal(lazy[7], VALUES[7])


def run(*arguments: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    assert not ended.value.code


def test_commands_ask_a_source_for_each_byte_once(s3: LoopbackS3, catalog: str, tmp_path: Path) -> None:
    n_bytes = len(npy(VALUES))
    s3.put("unseen.npy", npy(VALUES))
    s3.put("unseen", npy(VALUES))
    for nth, key in enumerate(("unseen.npy", "unseen")):
        s3.reset_log()
        run("get", f"s3://{BUCKET}/{key}", "-o", tmp_path / f"{nth}.npy", "-y")
        assert [request.range for request in s3.log] == ["bytes=0-127", f"bytes=0-{n_bytes - 1}"]
        np.testing.assert_array_equal(np.load(tmp_path / f"{nth}.npy"), VALUES)
    s3.put("another.npy", npy(VALUES))
    for nth, name in enumerate((f"s3://{BUCKET}/another.npy", NAME)):
        s3.reset_log()
        run("mirror", name, tmp_path / f"{nth}.zarr", "--catalog", catalog, "-y")
        assert [request.range for request in s3.log] == ["bytes=0-127", f"bytes=128-{n_bytes - 1}"]
