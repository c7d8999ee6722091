"""What a stranger installs: the wheel holds the catalog, both packages and both commands, and needs no checkout."""

import configparser
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from small_release import write_locally

from dmdata.catalog.entries import Catalog, bundled

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    program = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_catalog_of_the_checkout(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read("dmdata/catalog.yaml").decode()
    assert text == (ROOT / "catalog.yaml").read_text()
    assert Catalog.parse(text, origin="catalog.yaml") == bundled()


def test_the_wheel_holds_both_packages_and_commands_and_no_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
        commands = configparser.ConfigParser()
        commands.read_string(archive.read(entry_points).decode())
    assert dict(commands["console_scripts"]) == {
        "dmdata": "dmdata.cli:main",
        "dmpipeline": "dmpipeline.cli:main",
    }
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dmdata", "dmpipeline"}
    assert {"dmdata/py.typed", "dmpipeline/py.typed"} <= set(names)
    for package in ("dmdata", "dmpipeline"):
        assert {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")} <= set(names)


def test_the_catalog_loads_from_the_unpacked_wheel_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    unpacked = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    program = (
        "import dmdata, dmdata.catalog.entries as c; print(dmdata.__file__); "
        "print(sum(1 for _ in c.bundled().artifacts())); "
        "print(dmdata.estimate('cifar/50pct/test_margins').n_bytes)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    where, n_artifacts, n_bytes = done.stdout.split()
    assert Path(where).is_relative_to(unpacked)
    assert int(n_artifacts) == sum(1 for _ in bundled().artifacts())
    assert int(n_bytes) == 310_000 * 10_000 * 2 + 128


def test_xarray_and_fsspec_find_dmdata_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("xarray")
    unpacked = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    values = np.arange(40, dtype=np.float32).reshape(8, 5)
    catalog = write_locally({"digits/50pct/test_margins": values}, tmp_path / "run")
    program = (
        "import sys, xarray as xr; assert 'dmdata' not in sys.modules\n"
        "print(float(xr.open_dataset('digits/50pct', engine='dmdata').test_margins[3:5, 2].sum()))\n"
        "import fsspec, numpy as np\n"
        "with fsspec.open('dmdata://digits/50pct/test_margins') as file: print(float(np.load(file).sum()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(unpacked), "DMDATA_CATALOG": catalog, "DMDATA_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(values[3:5, 2].sum()), str(values.sum())]
