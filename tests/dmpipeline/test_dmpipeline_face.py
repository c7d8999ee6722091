"""What `import dmpipeline` gives, and what it costs and needs."""

import subprocess
import sys

import pytest

import dmpipeline
from dmpipeline.errors import RunError, explain_missing_extra, explain_os_errors

EXTRA = ["torch", "numba", "sklearn", "matplotlib", "jinja2"]
WITHOUT_EXTRA = f"import sys; sys.modules.update(dict.fromkeys({EXTRA}))\n"


def python(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_every_name_of_the_face_is_there_and_no_other():
    for name in dmpipeline.__all__:
        assert getattr(dmpipeline, name).__name__ == name
    assert set(dmpipeline.__all__) <= set(dir(dmpipeline))
    with pytest.raises(AttributeError, match="fits"):
        dmpipeline.fits  # noqa: B018


def test_without_the_extra_the_package_imports_and_its_names_say_what_to_install():
    done = python(
        WITHOUT_EXTRA
        + "import dmpipeline; print(dmpipeline.RunSpec.__name__)\n"
        + "try: dmpipeline.fit\n"
        + "except dmpipeline.errors.RunError as error: print(error)"
    )
    assert done.stderr == ""
    assert done.stdout.startswith("RunSpec\n")
    assert "pip install 'dmdata[pipeline]'" in done.stdout


def test_without_the_extra_the_command_shows_help_and_ends_in_one_line():
    done = python(
        WITHOUT_EXTRA
        + "from dmpipeline.cli.command import main\n"
        + "for words in (['--help'], ['demo', '--help'], ['--version'], ['init', 'x'], ['demo', 'x']):\n"
        + "    try: main(words)\n"
        + "    except SystemExit as ended: print(ended.code)"
    )
    codes = [line for line in done.stdout.splitlines() if line in ("0", "1", "2")]
    assert codes == ["0", "0", "0", "1", "1"]
    errors = [line for line in done.stderr.splitlines() if line.startswith("dmpipeline: ")]  # not progress
    assert len(errors) == 2
    assert all("pip install 'dmdata[pipeline]'" in line for line in errors)


def test_a_missing_package_that_is_not_of_the_extra_is_a_defect_and_stays_one():
    with pytest.raises(ModuleNotFoundError, match="no_such"), explain_missing_extra():
        import no_such_package  # noqa: F401


def test_an_error_of_the_system_is_explained_but_a_broken_pipe_is_not(tmp_path):
    with (
        pytest.raises(RunError, match=r"cannot be opened .*; choose another path") as caught,
        explain_os_errors(tmp_path, "opened"),
    ):
        (tmp_path / "none").read_text()
    assert caught.value.path == tmp_path
    with pytest.raises(BrokenPipeError), explain_os_errors(tmp_path):
        raise BrokenPipeError
