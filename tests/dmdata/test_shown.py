"""What a notebook shows of an object: a plain table, escaped, with readable sizes and dollars; nothing is read."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from servers.loopback import LoopbackS3
from small_release import publish, write_locally

import dmdata
from dmdata.shown import SHOWN_ROWS, as_html, rows_as_html

NAME = "toy/50pct/test_margins"


class Table(HTMLParser):
    """A table's caption and cells; any tag that a table does not have is an error, and so is a colour."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.sides: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []
        assert "color" not in text, "colours are the page's, light or dark"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("div", "table", "thead", "tbody", "tr", "th", "td"), tag
        self.open.append(tag)
        self.texts += [""] if tag in ("div", "th", "td") else []
        self.sides += [str(dict(attrs).get("style"))] if tag == "td" else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts[-1] += data


def test_a_lazy_array_shows_its_shape_size_place_and_whether_reading_is_charged_and_reads_nothing(
    s3: LoopbackS3, tmp_path: Path
) -> None:
    array = dmdata.open(NAME, catalog=publish(s3, {NAME: np.zeros((2048, 3), np.float16)}, tmp_path))
    n_requests = s3.n_requests
    text = " ".join(Table(array._repr_html_()).texts)
    assert s3.n_requests == n_requests
    for words in (NAME, "2,048 model x 3 example", "float16", "12.0 KiB", "s3://", "is charged"):
        assert words in text
    local = dmdata.open(NAME, catalog=write_locally({NAME: np.zeros((2, 3), np.float16)}, tmp_path / "local"))
    assert "is free" in " ".join(Table(local._repr_html_()).texts)


def test_an_estimate_shows_both_ways_with_dollars_and_bytes() -> None:
    table = Table(dmdata.estimate("cifar/50pct/test_margins", select=":1000")._repr_html_())
    assert {"cheapest", "fastest", "$0.0017", "19.1 MiB"} <= set(table.texts)
    assert "to internet" in table.texts[0]
    one_way = Table(dmdata.estimate("cifar/50pct/test_margins", select="0")._repr_html_()).texts
    assert "fastest" not in one_way


def test_spending_shows_dollars_bytes_and_requests() -> None:
    texts = Table(dmdata.Spending(usd=0.00012, n_requests=1234, n_bytes=3 << 20, n_reads=2)._repr_html_()).texts
    assert {"$0.00012", "1,234", "3.0 MiB"} <= set(texts)


def test_a_catalog_shows_its_artifacts_and_a_short_line_without_a_password(tmp_path: Path) -> None:
    catalog = dmdata.load_catalog("")
    texts = Table(catalog._repr_html_()).texts
    assert "37 artifacts at s3://madrylab-datamodels, requester pays" in texts[0]
    assert {"310,000 model x 10,000 test_example", "weight + bias + lam", "5.8 GiB"} <= set(texts)
    assert len(repr(catalog)) < 150
    (tmp_path / "catalog.yaml").write_text(catalog.dump().replace("s3://madrylab", "https://me:hush@madrylab"))
    other = dmdata.load_catalog(tmp_path)
    assert "hush" not in repr(other) + other._repr_html_()


def test_whatever_a_table_holds_is_no_markup() -> None:
    facts = as_html("<i>", {"<script>": "</table><b>&", "none": None, "n": 12_345, "share": 0.12345, "is": True})
    assert Table(facts).texts == ["<i>", "<script>", "</table><b>&", "n", "12,345", "share", "0.123", "is", "True"]
    rows = rows_as_html("<i>", ["<b>"], [["</td><script>"]], n_rows=1)
    assert Table(rows).texts == ["<i>", "<b>", "</td><script>"]


def test_long_tables_end_with_how_many_more_there_are_and_figures_are_set_to_the_right() -> None:
    rows = ([f"name {nth}", f"${nth}.00"] for nth in range(10**6))
    table = Table(rows_as_html("many", ["name", "cost"], rows, n_rows=10**6))
    assert len(table.texts) == 3 + 2 * SHOWN_ROWS + 1
    assert table.texts[-1] == f"and {10**6 - SHOWN_ROWS:,} more"
    assert ["right" in side for side in table.sides[:2]] == [False, True]
    lists = Table(rows_as_html("lists", ["examples", "size"], [["3, 17", "19.1 MiB"], ["4", "-"]], n_rows=2))
    assert ["right" in side for side in lists.sides] == [False, True, False, True]


@pytest.mark.parametrize("columns", [[], ["a"]])
def test_an_empty_table_is_a_table(columns: list[str]) -> None:
    assert re.search("nothing", rows_as_html("nothing", columns, [], n_rows=0))
