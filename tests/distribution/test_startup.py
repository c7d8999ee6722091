"""What starts loads only what it needs: help, completion and errors next to nothing, and reading a run no torch."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmdata.cli.copy_commands import DEFAULT_MEMORY_MIB, DESTINATIONS
from dmdata.cli.money_commands import SETTINGS
from dmdata.copying.mirror import DEFAULT_MEMORY_BYTES
from dmdata.money.prices import Destination
from dmdata.settings import names_of_settings
from dmpipeline.cli.train_commands import RECIPES
from dmpipeline.models.recipes import type_of_recipe

ROOT = Path(__file__).parents[2]
HEAVY = {"numpy", "pydantic", "yaml", "rich", "zarr", "fsspec", "obstore", "boto3", "urllib3", "torch", "numba"}
HEAVY |= {"sklearn", "matplotlib", "dask", "distributed", "xarray"}
TRAINING = {"torch", "numba", "sklearn", "matplotlib", "dask", "distributed"}
COMMAND = "from importlib import import_module; import_module(sys.argv[1] + '.cli').main(sys.argv[2:])"


needs_pipeline = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs the pipeline extra")


def loaded_by(program: str, *arguments: str, code: int = 0, **environment: str) -> set[str]:
    """Run a program in a process of its own and list which packages were imported when it ended."""
    program = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('', *{name.partition('.')[0] for name in sys.modules}, file=sys.stderr))\n"
        + program
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        cwd=ROOT,
    )
    assert done.returncode == code, done.stderr
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("package", ["dmdata", "dmpipeline"])
def test_importing_a_package_loads_nothing_of_what_its_names_need(package: str) -> None:
    assert not loaded_by(f"import {package}; dir({package})") & HEAVY


@pytest.mark.parametrize("command", ["dmdata", "dmpipeline"])
@pytest.mark.parametrize(
    ("words", "code"), [(["--help"], 0), (["--version"], 0), ([], 2), (["nope"], 2), (["--nope"], 2)]
)
def test_help_version_and_errors_of_usage_load_next_to_nothing(command: str, words: list[str], code: int) -> None:
    assert not loaded_by(COMMAND, command, *words, code=code) & HEAVY


@pytest.mark.parametrize("command", ["dmdata", "dmpipeline"])
def test_help_and_errors_of_each_command_load_next_to_nothing(command: str) -> None:
    program = """
import sys
from importlib import import_module
module = import_module(sys.argv[1] + ".cli.command")

def words_of(command, *before):
    yield before
    for name, inner in getattr(command, "commands", {}).items():
        yield from words_of(inner, *before, name)

for words in words_of(module.commands):
    for last in ("--help", "--no-such-option"):
        try:
            module.main([*words, last])
        except SystemExit:
            pass
"""
    assert not loaded_by(program, command) & HEAVY


@pytest.mark.parametrize(("command", "words"), [("dmdata", "dmdata mi"), ("dmpipeline", "dmpipeline run --wo")])
def test_completing_commands_and_options_loads_next_to_nothing(command: str, words: str) -> None:
    loaded = loaded_by(COMMAND, command, **completing(command, words))
    assert not loaded & HEAVY


@pytest.mark.parametrize("words", ["dmdata info cifar/50pct/", "dmpipeline plan cif"])
def test_completing_names_reads_the_catalog_without_checking_it(words: str, tmp_path: Path) -> None:
    command = words.split()[0]
    loaded = loaded_by(COMMAND, command, **completing(command, words), DMDATA_HOME=str(tmp_path))
    assert loaded & HEAVY == {"yaml"}


def completing(command: str, words: str) -> dict[str, str]:
    variables = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    return variables | {f"_{command.upper()}_COMPLETE": "bash_complete"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("startup") / "run"
    loaded_by(COMMAND, "dmpipeline", "init", str(path), "--models", "20", "--held-out", "2", "--retrainings", "2")
    loaded_by(COMMAND, "dmpipeline", "run", str(path))
    return path


@needs_pipeline
@pytest.mark.parametrize("words", [["status"], ["submit", "--slurm"], ["plan", "--seconds-per-model", "1"]])
def test_looking_at_a_run_loads_neither_torch_nor_numba(run: Path, words: list[str]) -> None:
    assert not loaded_by(COMMAND, "dmpipeline", words[0], str(run), *words[1:]) & TRAINING


@needs_pipeline
def test_planning_to_make_a_release_again_loads_neither_torch_nor_numba(tmp_path: Path) -> None:
    assert not loaded_by(COMMAND, "dmpipeline", "plan", "cifar/50pct", DMDATA_HOME=str(tmp_path)) & TRAINING


@needs_pipeline
@pytest.mark.parametrize("name", ["fit", "evaluate", "learning_curves", "compare", "find_space", "Run", "Datamodels"])
def test_what_fits_scores_and_reads_imports_no_torch(name: str) -> None:
    assert "torch" not in loaded_by(f"import dmpipeline; dmpipeline.{name}")


def test_fsspec_finds_a_checkout_that_is_only_on_the_path_whichever_is_imported_first(tmp_path: Path) -> None:
    import fsspec

    # without site-packages there are no entry points, by which an installed dmdata is found
    (tmp_path / "fsspec").symlink_to(Path(fsspec.__file__).parent)
    for imports in (
        "import dmdata, fsspec",
        "import fsspec, dmdata",
        "import dmdata; from fsspec import registry",
        "import dmdata, importlib.util; importlib.util.find_spec('fsspec'); import fsspec",
    ):
        program = (
            f"import sys; sys.path[:0] = {[str(tmp_path), str(ROOT)]!r}; {imports}\n"
            "from fsspec.registry import known_implementations\n"
            "print(known_implementations['dmdata']['class'])"
        )
        done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True)
        assert (done.stdout, done.stderr) == ("dmdata.plugins.filesystem.DmdataFileSystem\n", "")


def test_what_options_know_without_loading_it_is_so() -> None:
    assert tuple(str(destination) for destination in Destination) == DESTINATIONS
    assert DEFAULT_MEMORY_MIB << 20 == DEFAULT_MEMORY_BYTES
    assert list(SETTINGS) == names_of_settings()
    assert list(RECIPES) == list(dict.fromkeys(name for name, _ in type_of_recipe))
