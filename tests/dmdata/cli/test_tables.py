"""However narrow a terminal is, a name can be copied off a table; whatever reads lines gets one a row."""

import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from terminals import run_at_terminal

from dmdata.cli.tables import headed_table, lines_of, plain_table

NAMES = ("cifar/50pct/test_margins", "cifar/50pct/train_datamodels/weight", "x")
PROSE = "bytes that were paid for; without them the next read pays again"


def shown(width: int | None, *, right: slice = slice(1, 3)) -> list[str]:
    """Lines of a table with names, numbers and prose."""
    table = headed_table("artifact", "size", "to the internet", "what it is", right=right)
    for name in NAMES:
        table.add_row(name, "288.7 GiB", "$25.99", PROSE)
    return [line.plain for line in lines_of(table, width)]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_names_and_numbers_are_whole_at_any_width_and_no_line_is_wider(width: int) -> None:
    lines = shown(width)
    text = "\n".join(lines)
    assert all(len(line) <= width for line in lines)
    assert all(f" {name}\n" in f"{text}\n" or f" {name} " in text for name in NAMES)
    assert text.count("288.7 GiB") == text.count("$25.99") == len(NAMES)
    assert "…" not in text


def test_without_a_terminal_each_row_is_one_line() -> None:
    lines = shown(None)
    assert len(lines) == 1 + len(NAMES)
    assert all(line.endswith(PROSE) for line in lines[1:])


def test_a_longer_word_sticks_out_of_its_own_line_alone() -> None:
    url = "s3://madrylab-datamodels/cifar/data/test_margins_50pct.npy"
    table = headed_table("fact", "value", "basis")
    table.add_row("key", url, "inferred")
    table.add_row("shape", "310,000 x 10,000", "published")
    lines = [line.plain for line in lines_of(table, 60)]
    assert [len(line) > 60 for line in lines] == [False, True, False]
    assert lines[1].split() == ["key", url, "inferred"]


def test_a_path_and_its_size_stay_whole() -> None:
    path = "/scratch/" + "deep/" * 14 + "margins.npy"
    lines = [line.plain.strip() for line in lines_of(plain_table((path, "76.3 MiB")), 60)]
    assert lines == [path, "76.3 MiB"]


@pytest.mark.parametrize("width", [None, 60])
def test_a_table_of_one_column_or_none_is_shown_too(width: int | None) -> None:
    assert lines_of(headed_table(), width) == []
    assert [line.plain for line in lines_of(plain_table(["x" * 80]), width)] == [" " + "x" * 80]


_CELLS = st.text(st.characters(codec="ascii", min_codepoint=33), min_size=1, max_size=30)


@given(
    rows=st.lists(st.tuples(_CELLS, _CELLS, st.lists(_CELLS, max_size=8).map(" ".join)), min_size=1, max_size=5),
    width=st.integers(1, 120) | st.none(),
    right=st.booleans(),
)
def test_no_width_loses_or_breaks_a_word(rows: list[tuple[str, str, str]], width: int | None, right: bool) -> None:
    table = headed_table("a name", "some words", "more words", right=slice(1, 2) if right else slice(0))
    for row in rows:
        table.add_row(*row)
    words = [word for line in lines_of(table, width) for word in line.plain.split()]
    wanted = ["a", "name", "some", "words", "more", "words"] + [word for row in rows for word in " ".join(row).split()]
    assert sorted(words) == sorted(wanted)


@pytest.mark.parametrize("columns", ["60", "80"])
def test_every_artifact_of_the_release_can_be_copied_off_a_narrow_terminal(columns: str) -> None:
    text = run_at_terminal([sys.executable, "-m", "dmdata", "ls"], COLUMNS=columns, TERM="xterm")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)  # colours, and the line that says "starting" where it is slow
    assert "cifar/50pct/train_datamodels" in text.split()
    assert max(map(len, text.splitlines())) <= int(columns)
