"""What pages are followed with: the release as its catalog describes it, served here, and a clean folder."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from documentation.pages import Reader
from servers.loopback import LoopbackS3
from servers.release import released

# pages are about both packages
collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_*.py"]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    """Someone who reads in an empty folder."""
    folder = tmp_path / "reader"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DMDATA_PROGRESS", "0")  # lines of progress depend on the machine
    return Reader()


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackS3]:
    """The release's bucket with some objects of their true sizes: headers, and zeros that take no room on the disk."""
    with released(tmp_path) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        yield server
