"""Exported catalogs are read by mlcroissant, intake and frictionless themselves, which `make formats` installs."""

import copy
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
import zarr
from processes import Child
from small_release import Pt, pt, write_locally

import dmdata

ROOT = Path(__file__).parents[3]
READERS = ROOT / ".venv-formats"
MARGINS, DATAMODELS = "toy/50pct/test_margins", "toy/20pct/test_datamodels"
VALUES = np.arange(12, dtype=np.float16).reshape(4, 3)
WEIGHTS = np.linspace(0, 1, 15, dtype=np.float32).reshape(5, 3)

pytestmark = pytest.mark.formats


@pytest.fixture(scope="module")
def ask():
    """Ask one of the readers about a file."""
    if not (READERS / ".installed").exists():
        pytest.skip("mlcroissant, intake and frictionless are not installed; make formats")
    command = [READERS / "bin" / "python", "-I", ROOT / "tests" / "servers" / "peer_catalogs.py"]
    with Child(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"

        def answer(read, path, **asked):
            process.stdin.write(json.dumps({"read": read, "path": str(path), **asked}) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield answer
        process.stdin.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a .npy and a .pt, and one array in Zarr as a run has them, with its catalog and every export."""
    members = {"weight": WEIGHTS, "bias": np.ones(3, np.float32)}
    release = {MARGINS: VALUES, DATAMODELS: Pt(pt(members), members)}
    catalog = Path(write_locally(release, tmp_path_factory.mktemp("release")))
    document = yaml.safe_load(catalog.read_text())
    arrays = document["datasets"]["toy"]["alphas"]["50pct"]["arrays"]
    zarr.create_array(catalog.parent / "store.zarr", name="masks", data=VALUES > 5, chunks=(2, 3))
    stored = {"key": "store.zarr/masks", "format": "zarr", "dtype": "bool", "n_bytes": VALUES.size}
    arrays["masks"] = copy.deepcopy(arrays["test_margins"]) | stored
    members_there = document["datasets"]["toy"]["alphas"]["20pct"]["arrays"]["test_datamodels"]["members"]
    members_there["weight"]["dims"], members_there["bias"]["dims"] = ["train_example", "example"], ["example"]
    catalog.write_text(yaml.safe_dump(document))
    write_exports(catalog.parent, catalog.parent)
    return catalog.parent


def write_exports(folder, catalog):
    for form, name in {
        "croissant": "croissant.json",
        "intake": "intake.yaml",
        "datapackage": "datapackage.json",
    }.items():
        (folder / name).write_text(dmdata.export_catalog(form, catalog=catalog, folder=folder))


def test_mlcroissant_finds_no_error_and_misses_only_what_the_catalog_does_not_say(ask, folder, tmp_path):
    write_exports(tmp_path, "")
    for place, known in ((tmp_path, dmdata.load_catalog("")), (folder, dmdata.load_catalog(folder))):
        found = ask("croissant", place / "croissant.json")
        assert found["errors"] == []
        missing = {warning.rpartition("/")[2].partition('"')[0] for warning in found["warnings"]}
        assert missing <= {"license", "datePublished", "version"} | (set() if known.citation else {"citeAs"})
        assert list(found["files"]) == [artifact.name for artifact in known.artifacts()]


def test_mlcroissant_requires_the_checksums_that_are_not_known(ask, tmp_path):
    write_exports(tmp_path, "")
    document = json.loads((tmp_path / "croissant.json").read_text())
    del document["isLiveDataset"]
    (tmp_path / "croissant.json").write_text(json.dumps(document))
    [error] = ask("croissant", tmp_path / "croissant.json")["errors"]
    assert "sha256" in error


def test_frictionless_validates_the_package_and_the_files_it_names(ask, folder, tmp_path):
    write_exports(tmp_path, "")
    assert ask("datapackage", tmp_path / "datapackage.json", validate_files=False)["faults"] == []
    found = ask("datapackage", folder / "datapackage.json", validate_files=True)
    assert found["faults"] == []
    assert found["resources"]["toy/50pct/masks"] == "store.zarr/masks/zarr.json"


def test_intake_opens_every_entry_of_a_folder(ask, folder):
    path = folder / "intake.yaml"
    names = ask("intake", path)["entries"]
    assert {"toy/50pct", MARGINS, f"{MARGINS}.npy", DATAMODELS, "toy/50pct/masks.zarr"} <= set(names)
    opened = {name: ask("intake", path, entry=name) for name in names}
    assert opened["toy/50pct"]["sums"]["test_margins"] == VALUES.sum()
    assert opened[MARGINS] == {"sums": {"test_margins": VALUES.sum()}, "sizes": {"model": 4, "example": 3}}
    assert opened[DATAMODELS]["sums"]["test_datamodels_weight"] == pytest.approx(WEIGHTS.sum())
    assert opened[f"{MARGINS}.npy"] == {"sum": VALUES.sum(), "shape": [4, 3]}
    assert opened["toy/50pct/masks.zarr"] == {"sum": 6, "shape": [4, 3]}
