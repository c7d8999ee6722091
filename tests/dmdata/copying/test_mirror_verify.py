"""`dmdata verify` finds what differs between a mirror and its source, for free or at a price known first."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from servers.loopback import LoopbackS3
from small_release import npy, publish, write_locally

import dmdata
from dmdata.cli.command import main
from dmdata.copying.journal import DIGESTS, JOURNAL, stored_digest
from dmdata.copying.place import Place
from dmdata.errors import BudgetError, CatalogError, DmdataError, FormatError, SelectionError

MARGINS = "toy/50pct/test_margins"
MASKS = "toy/50pct/train_masks"
VALUES = np.random.default_rng(0).normal(size=(2000, 1000)).astype(np.float16)
MEBIBYTE = 1 << 20
"""Of memory: sixteen blocks of 128 rows."""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def catalog(s3: LoopbackS3, tmp_path: Path) -> str:
    masks = np.random.default_rng(1).random((300, 70)) < 0.5
    return publish(s3, {MARGINS: VALUES, MASKS: masks}, tmp_path)


@pytest.fixture
def copy(s3: LoopbackS3, catalog: str, tmp_path: Path) -> Path:
    dmdata.mirror(MARGINS, tmp_path / "m.zarr", catalog=catalog, memory_bytes=MEBIBYTE)
    s3.reset_log()
    return tmp_path / "m.zarr"


@pytest.fixture
def dm(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return run


def scramble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x10
    path.write_bytes(content)


def forge(copy: Path, row: int) -> None:
    """Change a value, and the digest with it: only the source can tell."""
    array = zarr.open_array(copy)
    array[row, 7] = 1234
    nth = row // 128
    digest = stored_digest(array, Place.of(copy), (slice(128 * nth, 128 * nth + 128),))
    zarr.open_array(copy / DIGESTS)[nth] = np.frombuffer(digest, np.uint8)


def test_a_whole_mirror_is_the_same_and_asking_is_free(s3: LoopbackS3, copy: Path, catalog: str) -> None:
    (found,) = dmdata.verify(copy, catalog=catalog)
    assert found.is_same
    assert (found.name, found.n_blocks, found.n_rows_compared) == (MARGINS, 16, 0)
    assert s3.n_requests == 0


@pytest.mark.parametrize("how", ["scrambled", "gone", "emptied", "changed"])
def test_a_damaged_chunk_is_found_and_made_again(s3: LoopbackS3, copy: Path, catalog: str, how: str) -> None:
    chunk = copy / "c/5/0"
    if how == "scrambled":
        scramble(chunk)
    elif how == "gone":
        chunk.unlink()
    elif how == "emptied":
        chunk.write_bytes(b"")
    else:
        zarr.open_array(copy)[5 * 128, 0] += 1
    (found,) = dmdata.verify(copy, catalog=catalog)
    assert not found.is_same
    assert (found.damaged, found.differing, found.n_missing) == ((5,), (), 0)
    dmdata.verify(copy, repair=True, catalog=catalog)
    (found,) = dmdata.verify(copy, catalog=catalog)
    assert (found.damaged, found.n_missing) == ((), 1)
    s3.reset_log()
    again = dmdata.mirror(MARGINS, copy, catalog=catalog)
    np.testing.assert_array_equal(np.asarray(again[...]), VALUES)  # type: ignore[index] # an array
    assert s3.n_object_bytes == 128 * 2000
    assert dmdata.verify(copy, catalog=catalog)[0].is_same


def test_values_that_differ_from_the_source_are_found_by_the_whole(s3: LoopbackS3, copy: Path, catalog: str) -> None:
    forge(copy, 700)
    assert dmdata.verify(copy, catalog=catalog)[0].is_same
    (found,) = dmdata.verify(copy, whole=True, catalog=catalog)
    assert (found.damaged, found.differing, found.n_rows_compared) == ((), (5,), 2000)
    assert s3.n_object_bytes == VALUES.nbytes


def test_a_sample_costs_what_it_says_and_is_drawn_by_its_seed(s3: LoopbackS3, copy: Path, catalog: str) -> None:
    (found,) = dmdata.verify(copy, sample="10%", catalog=catalog)
    assert found.is_same
    assert 200 <= found.n_rows_compared <= 260
    assert s3.n_object_bytes == found.n_rows_compared * 2000
    ranges = []
    for seed in (1, 1, 2):
        s3.reset_log()
        dmdata.verify(copy, sample="10%", seed=seed, catalog=catalog)
        ranges.append({request.range for request in s3.log})
    assert ranges[0] == ranges[1] != ranges[2]
    s3.reset_log()
    before = dmdata.spend().usd
    usd = 1e5 * 0.09 / 2**30
    (found,) = dmdata.verify(copy, sample=f"${usd:.12f}", catalog=catalog)
    assert 0.5 * usd < dmdata.spend().usd - before <= usd


def test_enough_samples_find_a_difference(copy: Path, catalog: str) -> None:
    forge(copy, 700)
    bad = {dmdata.verify(copy, sample="30%", seed=seed, catalog=catalog)[0].differing for seed in range(20)}
    assert bad == {(), (5,)}


def test_a_sample_over_the_budget_is_refused_before_any_request(s3: LoopbackS3, copy: Path, catalog: str) -> None:
    with dmdata.budget(usd=1e-6), pytest.raises(BudgetError):
        dmdata.verify(copy, whole=True, catalog=catalog)
    assert s3.n_requests == 0


def test_a_source_that_changed_is_named(s3: LoopbackS3, copy: Path, catalog: str, dmdata_home: Path) -> None:
    s3.put("toy/data/test_margins_50pct.npy", npy(VALUES + 1))
    (found,) = dmdata.verify(copy, sample="1%", catalog=catalog)
    assert "changed" in found.faults[0]
    (found,) = dmdata.verify(copy, sample="1%", catalog=catalog)
    assert "the identity of the source" in found.faults[0]
    assert found.differing
    s3.put("toy/data/test_margins_50pct.npy", npy(VALUES[:10]))
    for header in (dmdata_home / "headers").iterdir():
        header.unlink()
    (found,) = dmdata.verify(copy, whole=True, catalog=catalog)
    assert any(
        "the shape of the source is (10, 1000); when it was mirrored it was (2000, 1000)" in f for f in found.faults
    )
    assert any("the catalog says" in fault for fault in found.faults)


def test_a_header_that_differs_from_the_catalog_is_a_fault_here(s3: LoopbackS3, tmp_path: Path) -> None:
    catalog = publish(s3, {MARGINS: VALUES}, tmp_path, shape=[2001, 1000], n_bytes=2001 * 2000 + 128)
    with pytest.warns(dmdata.CatalogMismatchWarning):
        dmdata.mirror(MARGINS, tmp_path / "m.zarr", catalog=catalog)
    (found,) = dmdata.verify(tmp_path / "m.zarr", sample="1%", catalog=catalog)
    assert not found.is_same
    assert "the catalog says" in found.faults[0]


def test_a_group_is_verified_array_by_array(catalog: str, tmp_path: Path) -> None:
    group = tmp_path / "g.zarr"
    dmdata.mirror("toy/50pct/*", group, catalog=catalog)
    scramble(group / MASKS / "c/0/0")
    found = {comparison.name: comparison for comparison in dmdata.verify(group, catalog=catalog)}
    assert {name: comparison.is_same for name, comparison in found.items()} == {MARGINS: True, MASKS: False}
    assert [comparison.name for comparison in dmdata.verify(group, [MARGINS], catalog=catalog)] == [MARGINS]
    with pytest.raises(CatalogError, match="holds no mirror of toy/50pct/x; it holds toy/50pct/test_margins, toy/50p"):
        dmdata.verify(group, ["toy/50pct/x"], catalog=catalog)


@settings(max_examples=15)
@given(data=st.data())
def test_subsets_in_any_order_are_compared_with_their_own_rows(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("subset")
    values = (
        np.asfortranarray(np.arange(240, dtype=np.int32).reshape(20, 12))
        if data.draw(st.booleans())
        else (np.arange(240, dtype=np.int32).reshape(20, 12))
    )
    np.save(folder / "x.npy", values)
    rows = data.draw(st.lists(st.integers(0, 19), min_size=1, max_size=8) | st.slices(20))
    columns = data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=8) | st.slices(12))
    dmdata.open(folder / "x.npy").mirror(folder / "m.zarr", rows=rows, columns=columns, memory_bytes=400)
    (found,) = dmdata.verify(folder / "m.zarr", whole=True)
    assert found.is_same
    copy = zarr.open_array(folder / "m.zarr")
    if copy.size:
        where = tuple(data.draw(st.integers(0, size - 1)) for size in copy.shape)
        copy[where] = -1
        assert not dmdata.verify(folder / "m.zarr")[0].is_same


def test_what_is_no_mirror_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(DmdataError, match="no mirror is at"):
        dmdata.verify(tmp_path / "nothing")
    zarr.create_array(tmp_path / "other.zarr", shape=(3,), dtype="i4")
    with pytest.raises(DmdataError, match="not a mirror"):
        dmdata.verify(tmp_path / "other.zarr")
    zarr.open_group(tmp_path / "g.zarr", mode="w")
    with pytest.raises(DmdataError, match="without any mirror"):
        dmdata.verify(tmp_path / "g.zarr")
    for sample in ("x%", "0%", "101%", "-1", "nan", "inf", ""):
        with pytest.raises(SelectionError):
            dmdata.verify(tmp_path / "g.zarr", sample=sample)


@pytest.mark.parametrize(
    "damage",
    [
        {"version": 1},
        {"axis": 2},
        {"axis": "0"},
        {"block_rows": 0},
        {"axes": [[0, 1 << 62, 1], [0, 1000, 1]]},
        {"axes": [[0, 2000, 0], [0, 1000, 1]]},
        {"axes": ["indices_0", [0, 1000, 1]]},
        {"shape": [1000, 2000]},
        {"dtype": "no dtype"},
        {"selection": "0"},
    ],
)
def test_a_damaged_journal_is_refused_in_words(copy: Path, catalog: str, damage: dict[str, Any]) -> None:
    array = zarr.open_array(copy)
    facts: Any = array.attrs[JOURNAL]
    array.attrs[JOURNAL] = facts | damage
    with pytest.raises(FormatError, match="journal of a mirror is missing or damaged"):
        dmdata.verify(copy, catalog=catalog)
    with pytest.raises(DmdataError):
        dmdata.mirror(MARGINS, copy, catalog=catalog)


# The command


def test_the_command_tells_by_words_and_exit_code(copy: Path, catalog: str, dm: Run) -> None:
    code, out, err = dm("verify", copy, "--catalog", catalog)
    assert (code, err) == (0, "")
    assert out.splitlines()[1].split() == [MARGINS, "16", "0", "0", "0", "same"]
    scramble(copy / "c/5/0")
    code, out, err = dm("verify", copy, "--catalog", catalog)
    assert code == 3
    assert "not the same" in out
    assert f"1 of 16 blocks are damaged (5); run dmdata verify {copy} --repair, then mirror it again" in err
    code, out, _ = dm("verify", copy, "--catalog", catalog, "--repair", "--json")
    assert code == 3
    assert json.loads(out)["artifacts"][0]["damaged"] == [5]
    code, _, err = dm("verify", copy, "--catalog", catalog)
    assert code == 3
    assert "1 of 16 blocks are not mirrored yet; to resume, mirror it again" in err
    assert dm("mirror", MARGINS, copy, "--catalog", catalog, "-y")[0] == 0
    assert dm("verify", copy, MARGINS, "--catalog", catalog)[0] == 0


def test_the_command_asks_before_it_reads_the_source(s3: LoopbackS3, copy: Path, catalog: str, dm: Run) -> None:
    code, _, err = dm("verify", copy, "--whole", "--catalog", catalog)
    assert code == 6
    assert "will cost up to" in err
    code, out, _ = dm("verify", copy, "--whole", "--catalog", catalog, "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["bytes"] == VALUES.nbytes + 128
    assert dm("verify", copy, "--sample", "5%", "--catalog", catalog, "--max-cost", "0.000000001", "-y")[0] == 8
    assert s3.n_requests == 0
    code, out, _ = dm("verify", copy, "--whole", "--catalog", catalog, "-y", "--json")
    assert code == 0
    assert json.loads(out)["artifacts"][0]["rows_compared"] == 2000
    assert dm("verify", copy, "--whole", "--sample", "1%")[0] == 2


def test_a_free_source_is_compared_without_consent(tmp_path: Path, dm: Run) -> None:
    catalog = write_locally({MARGINS: VALUES}, tmp_path / "run")
    dmdata.mirror(MARGINS, tmp_path / "m.zarr", catalog=catalog)
    assert dm("verify", tmp_path / "m.zarr", "--whole", "--catalog", catalog)[0] == 0
