"""What is logged under our modules' names: each paid read, each retry, and nothing unless a program asks for it."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from servers.loopback import SECRET, Fault, LoopbackS3
from small_release import publish

import dmdata

NAME = "toy/50pct/test_margins"
VALUES = np.arange(60_000, dtype=np.float32).reshape(300, 200)


@pytest.fixture
def catalog(s3: LoopbackS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = publish(s3, {NAME: VALUES}, tmp_path)
    monkeypatch.setenv("DMDATA_CATALOG", path)
    return path


def ours(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name.startswith("dmdata.")]


@pytest.mark.usefixtures("catalog")
def test_each_paid_read_is_one_line_with_its_bytes_requests_and_price(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    array = dmdata.open(NAME)
    for _ in range(2):  # the second time nothing is paid
        array[:100]
    [read] = [record.getMessage() for record in ours(caplog)]  # the header comes with the rows
    assert re.fullmatch(rf"reading {NAME}: 78\.2 KiB in 1 request, up to \$0\.0000\d+", read)


@pytest.mark.usefixtures("catalog")
def test_each_retry_is_one_line_that_says_why_and_holds_no_key(
    s3: LoopbackS3, caplog: pytest.LogCaptureFixture
) -> None:
    array = dmdata.open(NAME)
    caplog.set_level(logging.DEBUG)
    s3.inject(Fault(status=503, code="SlowDown"), times=2)
    array[:100]
    again = [record for record in ours(caplog) if "again" in record.getMessage()]
    assert [record.levelno for record in again] == [logging.INFO] * 2
    assert all("503" in record.getMessage() for record in again)
    assert SECRET not in caplog.text


def test_what_is_free_is_told_to_who_looks_closer(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", VALUES)
    for level, n_lines in ((logging.INFO, 0), (logging.DEBUG, 2)):
        caplog.clear()
        with caplog.at_level(level):
            dmdata.open(tmp_path / "x.npy")[:3]
        assert [record.levelno for record in ours(caplog)] == [level] * n_lines


@pytest.mark.parametrize("package", ["dmdata", "dmpipeline"])
def test_a_program_that_sets_no_logging_up_sees_none(package: str) -> None:
    program = f"import {package}, logging; logging.getLogger('{package}.x').error('unheard')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.usefixtures("catalog")
def test_commands_show_our_lines_with_v_and_those_of_libraries_with_debug(tmp_path: Path) -> None:
    def said(*words: str) -> str:
        command = [sys.executable, "-m", "dmdata", "get", NAME, "-y", "-o", str(tmp_path / f"x{words}.npy"), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
        assert SECRET not in done.stderr
        return done.stderr

    plain, verbose, debug = said(), said("-v"), said("--debug")
    assert "dmdata.reading" not in plain
    assert verbose.count("dmdata.reading.fetch: reading") == 2
    assert "botocore" not in verbose
    assert "botocore" in debug
    assert "dmdata.reading.fetch: reading" in debug
