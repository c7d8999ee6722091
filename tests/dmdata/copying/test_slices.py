"""Part of an array saved as a file: priced, paid once, whole or not there; and what a second `get` says of a first."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers.loopback import Fault, LoopbackS3
from small_release import key_of, npy, publish, write_locally

import dmdata
from dmdata.cli.command import main
from dmdata.errors import BudgetError, DmdataError, SelectionError, SourceError
from dmdata.money.ledger import home
from dmdata.release.copies import Slice, run_slice
from dmdata.release.opening import in_force, load_catalog

NAME = "toy/50pct/test_margins"
OTHER = "toy/50pct/train_margins"
VALUES = np.random.default_rng(0).normal(size=(64, 1 << 16)).astype(np.float32)
"""16 MiB: several ranges."""


@pytest.fixture
def catalog(s3: LoopbackS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = publish(s3, {NAME: VALUES, OTHER: VALUES + 1}, tmp_path)
    monkeypatch.setenv("DMDATA_CATALOG", path)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, catalog: str) -> Path:
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def dm(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.mark.parametrize(
    ("text", "key"), [("0:10,42", np.s_[0:10, 42]), ("5", np.s_[5]), (":,3", np.s_[:, 3]), ("::16", np.s_[::16])]
)
def test_a_selection_is_saved_as_numpy_would_and_costs_what_was_announced(
    s3: LoopbackS3, folder: Path, capsys: pytest.CaptureFixture[str], text: str, key: Any
) -> None:
    priced = json.loads(dm(capsys, "get", NAME, "--select", text, "--dry-run", "--json")[1])
    assert s3.n_requests == 0
    code, out, _ = dm(capsys, "get", NAME, "--select", text, "-o", "x.npy", "-y", "--json")
    assert code == 0
    assert json.loads(out) == {"path": "x.npy", "bytes": (folder / "x.npy").stat().st_size, "present": False}
    np.testing.assert_array_equal(np.load("x.npy"), VALUES[key])
    assert dmdata.spend().usd <= priced["usd"] + 1e-9
    assert [path.name for path in folder.iterdir()] == ["x.npy"]


def test_a_selection_of_what_was_mirrored_here_is_read_from_the_mirror_for_nothing(
    s3: LoopbackS3, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dmdata.mirror(NAME, folder.parent / "m.zarr")
    n_requests = s3.n_requests
    assert json.loads(dm(capsys, "get", NAME, "--select", ":,3", "--dry-run", "--json")[1])["usd"] == 0
    assert dm(capsys, "get", NAME, "--select", ":,3", "-o", "x.npy", "--max-cost", "0", "-q")[0] == 0
    np.testing.assert_array_equal(np.load("x.npy"), VALUES[:, 3])
    assert s3.n_requests == n_requests


def test_without_consent_or_over_the_budget_nothing_is_read_or_left(
    s3: LoopbackS3, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("get", NAME, "--select", "0:10", "-o", "x.npy")
    assert dm(capsys, *words)[0] == 6
    assert dm(capsys, *words, "-y", "--max-cost", "0.0000001")[0] == 8
    with dmdata.budget(usd=1e-7), pytest.raises(BudgetError):
        dmdata.get(NAME, "x.npy", select=np.s_[:10])
    assert s3.n_object_bytes == 0
    assert list(folder.iterdir()) == []


def test_a_selection_that_was_interrupted_pays_only_for_what_is_missing(s3: LoopbackS3, folder: Path) -> None:
    dmdata.open(NAME)
    # the last range is refused a second after the others were asked for
    s3.inject(Fault(status=400, stall_seconds=1.0), after=3)
    with pytest.raises(SourceError):
        dmdata.get(NAME, "x.npy", select="0:64")
    assert not (folder / "x.npy").exists()
    s3.clear_faults()
    before = s3.n_object_bytes
    dmdata.get(NAME, "x.npy", select="0:64")
    np.testing.assert_array_equal(np.load("x.npy"), VALUES)
    assert s3.n_object_bytes - before < VALUES.nbytes
    assert [path.name for path in folder.iterdir()] == ["x.npy"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["toy/50pct", "--select", "0"], f"there are 2: {NAME}, {OTHER}; name one of them"),
        ([NAME, "--select", "0", "-o", "x.txt"], "use x.txt.npy"),
        ([NAME, "--select", "99"], "99"),
    ],
)
def test_what_cannot_be_selected_is_refused_before_anything_is_asked_for(
    s3: LoopbackS3, folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    code, _, err = dm(capsys, "get", *words, "-y")
    assert (code, said in err) == (2, True), err
    assert s3.n_requests == 0


# What is there already


def test_what_was_got_before_is_there_and_neither_asked_for_nor_paid_again(
    s3: LoopbackS3, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["get", NAME, "-o", "x.npy"], ["get", NAME, "--select", ":,42", "-o", "column.npy"]):
        assert dm(capsys, *words, "-y")[0] == 0
        n_requests, usd = s3.n_requests, dmdata.spend().usd
        code, _, err = dm(capsys, *words)  # without consent
        assert (code, f"{words[-1]} is there already" in err) == (0, True), err
        assert json.loads(dm(capsys, *words, "--json")[1])["present"] is True
        assert (s3.n_requests, dmdata.spend().usd) == (n_requests, usd)
    assert dmdata.get(NAME, "x.npy") == Path("x.npy")
    assert dmdata.get(NAME, "column.npy", select=np.s_[:, 42]) == Path("column.npy")
    assert s3.n_requests == n_requests


def test_another_file_part_of_one_or_an_older_one_is_refused_in_words(
    s3: LoopbackS3, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = dmdata.get(NAME, "x.npy")
    whole = path.read_bytes()
    for content, said in (
        (whole[:5000], "has 5,000 bytes"),
        (whole[:-1] + b"x", "is as long as"),
    ):
        path.write_bytes(content)
        code, _, err = dm(capsys, "get", NAME, "-o", path)
        assert (code, said in err, "remove it, or name another file" in err) == (1, True, True), err
        assert path.read_bytes() == content
    path.write_bytes(whole)
    newer = publish(s3, {NAME: VALUES}, tmp_path / "newer", etag='"another"')
    code, _, err = dm(capsys, "get", NAME, "-o", path, "--catalog", newer)
    assert (code, "has another ETag" in err) == (1, True), err
    assert dm(capsys, "get", NAME, "--select", "0", "-o", path)[0] == 1
    (folder / "d.npy").mkdir()
    assert dm(capsys, "get", NAME, "--select", "0", "-o", folder / "d.npy", "-y")[0] == 0
    assert (folder / "d.npy" / "test_margins.npy").is_file()


def test_a_file_whose_digest_nobody_knows_is_compared_by_size_and_that_is_said(
    s3: LoopbackS3, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "x.npy").write_bytes(npy(VALUES))
    code, _, err = dm(capsys, "get", NAME, "-o", "x.npy")
    assert (code, "its content was not compared" in err, s3.n_requests) == (0, True, 0), err


def test_a_copy_of_a_local_object_is_compared_byte_for_byte(tmp_path: Path, folder: Path) -> None:
    catalog = write_locally({NAME: VALUES}, tmp_path / "run")
    path = dmdata.get(NAME, "x.npy", catalog=catalog)
    assert dmdata.get(NAME, "x.npy", catalog=catalog) == path
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DmdataError, match="differs from"):
        dmdata.get(NAME, "x.npy", catalog=catalog)
    with pytest.raises(SelectionError, match=r"use y\.npz\.npy"):
        dmdata.get(NAME, "y.npz", select="0", catalog=catalog)
    row = dmdata.get(NAME, "y.npy", select="0", catalog=catalog)
    np.testing.assert_array_equal(np.load(row), VALUES[0])
    assert dmdata.get(NAME, "y.npy", select="0", catalog=catalog) == row
    write_locally({NAME: VALUES + 1}, tmp_path / "run")
    with pytest.raises(DmdataError, match="is not this selection of"):
        dmdata.get(NAME, "y.npy", select="0", catalog=catalog)


# What is not as its catalog claims


@pytest.mark.parametrize(
    "words", [("get", NAME, "--select", "0:1", "-o", "x.npy"), ("mirror", NAME, "m.zarr", "--select", "0:1")]
)
def test_what_costs_more_than_was_agreed_to_is_not_read_unless_the_most_is_stated(
    s3: LoopbackS3, folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    # the catalog does not tell the order: of this one a row is all over the object
    s3.put(key_of(NAME, VALUES), npy(np.asfortranarray(VALUES)))
    code, _, err = dm(capsys, *words, "-y")
    assert (code, "was agreed to in total" in err, "--max-cost" in err) == (8, True, True), err
    assert dmdata.spend().usd < 1e-4
    assert dm(capsys, *words, "-y", "--max-cost", "1")[0] == 0
    assert dmdata.spend().usd > 1e-4


def test_at_an_address_the_price_is_by_the_objects_own_order(
    s3: LoopbackS3, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    s3.put("rows.npy", npy(np.asfortranarray(VALUES)))
    words = ("get", f"s3://{s3.bucket}/rows.npy", "--select", "0:1", "-o", "x.npy", "-y")
    assert json.loads(dm(capsys, *words, "--dry-run", "--json")[1])["usd"] > 1e-3
    assert dm(capsys, *words)[0] == 0
    np.testing.assert_array_equal(np.load("x.npy"), VALUES[:1])


def test_ranges_that_are_sent_again_are_within_what_was_agreed_to(
    s3: LoopbackS3, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    s3.inject(Fault(reset_after=100_000), after=1)
    assert dm(capsys, "get", NAME, "--select", "0:4", "-o", "x.npy", "-y")[0] == 0
    np.testing.assert_array_equal(np.load("x.npy"), VALUES[:4])


def test_a_header_read_since_tells_that_what_is_there_is_of_an_earlier_object(
    s3: LoopbackS3, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part, whole = ("get", NAME, "--select", "0:2", "-o", "x.npy"), ("get", NAME, "-o", "whole.npy")
    for words in (part, whole):
        assert dm(capsys, *words, "-y")[0] == 0
    s3.put(key_of(NAME, VALUES), npy(VALUES + 1))
    _forget_headers()
    dmdata.open(NAME).read_header()
    for words, said in ((part, "is not what was saved here"), (whole, "has another ETag")):
        code, _, err = dm(capsys, *words)
        assert (code, said in err) == (1, True), err
        (folder / words[-1]).unlink()
        assert dm(capsys, *words, "-y")[0] == 0
        assert dm(capsys, *words)[0] == 0
    np.testing.assert_array_equal(np.load("x.npy"), VALUES[:2] + 1)


def test_a_download_makes_an_older_header_forgotten(
    s3: LoopbackS3, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dmdata.open(NAME).read_header()
    s3.put(key_of(NAME, VALUES), npy(VALUES + 1))
    for words in (["-y"], []):
        code, _, err = dm(capsys, "get", NAME, "-o", "whole.npy", *words)
        assert code == 0, err


def test_another_servers_object_of_the_same_name_is_not_what_is_there(
    s3: LoopbackS3, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dmdata.get(NAME, "x.npy", select="0:2")
    with LoopbackS3() as other:
        other.put(key_of(NAME, VALUES), npy(VALUES))
        for variable, value in other.env.items():
            monkeypatch.setenv(variable, value)
        with pytest.raises(DmdataError, match="is not what was saved here"):
            dmdata.get(NAME, "x.npy", select="0:2")


def test_the_same_elements_in_another_shape_are_another_selection(folder: Path) -> None:
    dmdata.get(NAME, "x.npy", select="5:6,0:3")
    with pytest.raises(DmdataError, match="is not what was saved here"):
        dmdata.get(NAME, "x.npy", select="5,0:3")


def test_a_mirror_that_goes_after_its_price_was_told_is_not_replaced_by_a_paid_read(
    s3: LoopbackS3, folder: Path
) -> None:
    dmdata.mirror(NAME, folder.parent / "m.zarr")
    terms = in_force(None, None)[0]
    planned = Slice.planned([load_catalog().find(NAME)], "0:2", "x.npy", terms)
    shutil.rmtree(folder.parent / "m.zarr")
    before = s3.n_requests
    assert planned.prices()[0][1].usd == 0
    with pytest.raises(DmdataError, match="for nothing, can no longer be read; run the same again"):
        run_slice(planned)
    assert s3.n_requests == before


def test_a_remembered_header_of_another_shape_is_read_again(
    s3: LoopbackS3, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    s3.put(key_of(NAME, VALUES), npy(VALUES[:10]))
    with pytest.warns(UserWarning, match="shape"):
        dmdata.open(NAME).read_header()
    s3.put(key_of(NAME, VALUES), npy(VALUES))
    code, _, err = dm(capsys, "get", NAME, "--select", "20:22", "-o", "x.npy", "-y")
    assert code == 0, err
    np.testing.assert_array_equal(np.load("x.npy"), VALUES[20:22])


def test_an_output_that_ends_with_a_slash_is_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dm(capsys, "get", NAME, "-o", "whole/", "-y")[0] == 0
    assert dm(capsys, "get", NAME, "--select", "0", "-o", "part/", "-y")[0] == 0
    assert (folder / "whole" / Path(key_of(NAME, VALUES)).name).is_file()
    assert (folder / "part" / "test_margins.npy").is_file()


def test_the_default_name_keeps_the_points_of_an_arrays_name(s3: LoopbackS3, folder: Path) -> None:
    s3.put("a.b.npy", npy(VALUES))
    assert dmdata.get(f"s3://{s3.bucket}/a.b.npy", select="0") == Path("a.b.npy")


def test_a_file_whose_local_source_is_gone_is_not_compared_and_that_is_said(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog = write_locally({NAME: VALUES}, tmp_path / "run")
    assert dm(capsys, "get", NAME, "-o", "x.npy", "--catalog", catalog)[0] == 0
    (tmp_path / "run" / key_of(NAME, VALUES)).unlink()
    code, _, err = dm(capsys, "get", NAME, "-o", "x.npy", "--catalog", catalog)
    assert (code, "cannot be compared" in err, "Errno" in err) == (1, True, False), err


def _forget_headers() -> None:
    for path in (home() / "headers").glob("*.json"):
        path.unlink()
