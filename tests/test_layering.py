"""The rooms of both packages import only from rooms above them, and importing dmdata is light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS_IN_ORDER = {
    "dmdata": """
        errors phases streams settings layouts npy archives pickles pt npz safetensors formats locate catalog catalogued
        selection prices progress_bar plan blocks commits ledger address endpoints segments ranges refusals clients
        aws s3 uploads connections web source meter pace reader fetch locks headers digests roles place spool journal
        cluster mirror download interop view array_protocols array pricing release copies verify listing scan confirm
        filesystem xarray_engine watch console cache doctor completion copy_commands money_commands catalog_commands
        upkeep_commands cli
    """,
    "dmpipeline": """
        errors shown compute philox regeneration spec masks subsets places scaling examples conversion labels tasks
        folders cifar fmow datasets usercode recipes pinned rows returned outputs settling augmentation networks lines
        convolution layers ensembles train scores probe directory learned relocation cataloguing stored store targets
        derivation extension worker handing cluster status slurm attribution repeats verify tensors arrays binary
        moments identity overlaps checkpoints spaces descent lasso proximal datamodels fitted priors fitting forecast
        readings evaluate alternatives figures curves applications export report workflow demo introduction plan_command
        run_commands train_commands cli
    """,
}
ROOMS = {package: text.split() for package, text in ROOMS_IN_ORDER.items()}
FILES = [path for package in ROOMS for path in sorted((ROOT / package).rglob("*.py"))]
FORBIDDEN_NAMES = {"utils", "util", "helpers", "common", "types", "misc"}


def imports(path: Path, *, root: Path = ROOT) -> Iterator[tuple[int, str]]:
    """List what a file imports, at any depth, as dotted names, with the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(root).parent.parts[: -node.level + 1 or None] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def room(dotted: str) -> tuple[str, str] | None:
    """Tell which package and room a dotted name is in; the package itself is the room ''."""
    package, _, rest = dotted.partition(".")
    name = rest.partition(".")[0]
    return None if package not in ROOMS else (package, name if name in ROOMS[package] else "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_files_above_it(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    order = [*ROOMS[package], "__init__"]
    own = order.index(path.stem)
    for line, dotted in imports(path):
        where = f"{path.relative_to(ROOT)}:{line} imports {dotted}"
        target = room(dotted)
        assert not (package == "dmdata" and dotted.split(".")[0] in ("dmpipeline", "torch")), where
        if target is not None and target[0] == package:
            assert target[1], f"{where}: the package's face is above nobody"
            assert order.index(target[1]) < own, f"{where}, which is not above it"


def test_every_file_is_in_the_list_of_rooms() -> None:
    unlisted = [
        str(path.relative_to(ROOT))
        for path in FILES
        if path.stem not in [*ROOMS[path.relative_to(ROOT).parts[0]], "__init__"]
        or len(path.relative_to(ROOT).parts) > 2
    ]
    assert not unlisted


def test_no_room_is_named_for_nothing() -> None:
    assert not [path for path in FILES if path.stem in FORBIDDEN_NAMES]


def test_no_file_is_longer_than_600_lines() -> None:
    assert not {str(path): n for path in FILES if (n := len(path.read_text().splitlines())) > 600}


def test_the_checker_sees_nested_and_relative_imports(tmp_path: Path) -> None:
    folder = tmp_path / "dmdata"
    folder.mkdir()
    file = folder / "errors.py"
    file.write_text("def f():\n    from . import cli\n    from .plan import x\n    import dmdata.array\n")
    assert [name for _, name in imports(file, root=tmp_path)] == ["dmdata.cli", "dmdata.plan.x", "dmdata.array"]


def test_importing_dmdata_loads_nothing_heavy() -> None:
    heavy = ["torch", "numba", "dask", "distributed", "xarray", "matplotlib", "sklearn", "scipy", "boto3", "dmpipeline"]
    program = f"import sys, dmdata, dmdata.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
