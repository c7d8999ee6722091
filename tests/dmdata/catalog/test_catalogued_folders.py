"""A folder with a catalog.yaml, as an export or a run, opens by its path."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import dmdata
from dmdata.cli.command import main
from dmdata.errors import CatalogError, ObjectMissingError

CATALOG = """
version: 1
title: an export
source: {{url: ., basis: {{url: measured, requester_pays: measured}}}}
datasets:
  digits:
    title: digits
    basis: {{title: measured}}
    alphas:
      50pct:
        alpha: 0.5
        rows: {{fit: [0, 4], evaluation: [4, 6], n_retrainings: 2}}
        basis: {{alpha: measured, rows: measured}}
        arrays:
{arrays}
"""
ARRAY = """
          {name}:
            key: digits/data/{name}_50pct.npy
            format: npy
            shape: [6, {n}]
            dtype: {dtype}
            dims: [model, {dim}]
            n_bytes: {n_bytes}
            basis:
              {{key: measured, format: measured, shape: measured, dtype: measured, dims: measured, n_bytes: measured}}
"""


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "my export"
    (folder / "digits" / "data").mkdir(parents=True)
    described = ""
    rng = np.random.default_rng(0)
    for name, dim, array in (
        ("train_masks", "train_example", rng.random((6, 5)) < 0.5),
        ("test_margins", "test_example", rng.random((6, 3)).astype(np.float16)),
    ):
        path = folder / "digits" / "data" / f"{name}_50pct.npy"
        np.save(path, array)
        facts = {"name": name, "dim": dim, "n": array.shape[1], "dtype": array.dtype, "n_bytes": path.stat().st_size}
        described += ARRAY.format(**facts)
    (folder / "catalog.yaml").write_text(CATALOG.format(arrays=described))
    monkeypatch.chdir(tmp_path)
    return folder


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    said = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, said.out, said.err


@pytest.mark.parametrize("way", ["relative", "dotted", "absolute", "path", "slashes", "home"])
def test_an_artifact_opens_by_the_path_of_its_folder(export: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(export.parent))
    name = "my export/digits/50pct/test_margins"
    place: str | Path = {
        "relative": name,
        "dotted": f"./{name}",
        "absolute": os.path.abspath(name),
        "path": Path(name),
        "slashes": name.replace("/", "//"),
        "home": f"~/{name}",
    }[way]
    array = dmdata.open(place)
    wanted = np.load(export / "digits/data/test_margins_50pct.npy")
    assert array.dims == ("model", "test_example")
    assert (array[...] == wanted).all()
    assert (pickle.loads(pickle.dumps(array))[2] == wanted[2]).all()


def test_a_name_of_the_catalog_at_hand_is_not_looked_for_on_disk(export: Path, tmp_path: Path) -> None:
    (tmp_path / "cifar").symlink_to(export)
    assert dmdata.estimate("cifar/50pct/train_masks").n_bytes > 1e9


def test_files_of_such_a_folder_open_as_before(export: Path) -> None:
    path = "my export/digits/data/test_margins_50pct.npy"
    assert (dmdata.open(path)[...] == np.load(path)).all()
    with pytest.raises(ObjectMissingError):
        dmdata.open("my export/digits/data/none.npy")


@pytest.mark.parametrize("place", ["my export", "./my export/", "my export/digits", "my export/digits/50pct"])
def test_a_path_that_names_no_artifact_yet_says_what_there_is(export: Path, place: str) -> None:
    with pytest.raises(CatalogError, match="holds 2 artifacts; open one of") as caught:
        dmdata.open(place)
    named = str(caught.value).partition("open one of ")[2].split(", ")
    assert [dmdata.open(name).shape for name in named] == [(6, 5), (6, 3)]


def test_an_artifact_that_the_folder_lacks_is_refused_with_the_nearest(export: Path) -> None:
    with pytest.raises(CatalogError, match="nearest: digits/50pct/test_margins"):
        dmdata.open("my export/digits/50pct/test_margin")
    with pytest.raises(CatalogError, match="choose 50%"):
        dmdata.open("my export/digits/30pct/test_margins")


def test_commands_take_such_paths(export: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for pattern in ("my export", "./my export", "my export/digits", "my export/digits/50pct/*"):
        code, out, err = call(capsys, "ls", pattern)
        assert (code, err) == (0, "")
        assert ["digits/50pct/train_masks" in out, "digits/50pct/test_margins" in out] == [True, True]
    assert "train_masks" not in call(capsys, "ls", "my export/digits/50pct/test_*")[1]
    assert "an export" in call(capsys, "info", "my export")[1]
    assert "50pct" in call(capsys, "info", "my export/digits")[1]
    assert "test_example" in call(capsys, "info", "./my export/digits/50pct/test_margins")[1]
    assert call(capsys, "estimate", "my export/digits/50pct/*", "--json")[0] == 0
    assert call(capsys, "get", "my export/digits/50pct/test_margins", "-o", "got.npy", "-q")[0] == 0
    assert (np.load("got.npy") == np.load(export / "digits/data/test_margins_50pct.npy")).all()
    assert call(capsys, "doctor", "my export/digits/50pct/test_margins", "--json")[1].count("digits/50pct/test_margins")
    code, _, err = call(capsys, "ls", "my export/none")
    assert (code, "dataset 'none' is not in this catalog" in err) == (2, True)


def test_a_mirror_of_such_a_path_holds_what_it_names(export: Path, tmp_path: Path) -> None:
    dmdata.mirror("my export/digits/50pct/*", tmp_path / "copy.zarr")
    copied = dmdata.open(tmp_path / "copy.zarr" / "digits/50pct/test_margins")
    assert (copied[...] == np.load(export / "digits/data/test_margins_50pct.npy")).all()


def test_xarray_opens_all_of_an_alpha_by_its_path(export: Path) -> None:
    for place in ("my export/digits/50pct", str(export / "digits" / "50pct")):
        with xr.open_dataset(place, engine="dmdata") as opened:
            assert set(opened) == {"train_masks", "test_margins"}
            assert opened["role"].values.tolist() == ["fit"] * 4 + ["evaluation"] * 2
    with pytest.raises(CatalogError, match="digits/50pct"):
        xr.open_dataset("my export", engine="dmdata")
