"""Figures that tests measure and the end of a session shows: how often something was tried, and how it ended."""

import pytest

FIGURES = pytest.StashKey[list[str]]()
"""Lines, in the order they were measured; see conftest.py."""
