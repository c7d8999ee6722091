"""Runs that applications are asked of."""

import pytest
from planted_run import planted_run

from dmpipeline import Run


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose truth is known; not to be written to but by retraining."""
    return planted_run(tmp_path_factory.mktemp("planted"))
