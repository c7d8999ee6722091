"""Completion in a shell: what it offers, and that a shell finds it once it is installed."""

import importlib
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_release import write_locally

from dmdata.cli.command import main

SHELLS = ("bash", "zsh", "fish")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def completions(command: str, *words: str) -> list[str]:
    """What bash would be offered for the last of the words."""
    environment = os.environ | {
        f"_{command.upper()}_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join([command, *words]),
        "COMP_CWORD": str(len(words)),
    }
    program = f"from {command}.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_commands_options_and_names_complete() -> None:
    assert {"estimate", "doctor", "cache"} <= set(completions("dmdata", ""))
    assert completions("dmdata", "estimate", "cif") == ["cifar/"]
    assert completions("dmdata", "ls", "cifar/5") == ["cifar/50pct/"]
    assert completions("dmdata", "info", "cifar/50pct/test_d") == ["cifar/50pct/test_datamodels"]
    assert "--max-cost" in completions("dmdata", "get", "--m")
    assert "fit" in completions("dmpipeline", "f")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_is_printed(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "completion", shell)
    assert code == 0
    assert "_DMDATA_COMPLETE" in out


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("command", ["dmdata", "dmpipeline"])
def test_completion_is_installed_once_and_says_what_it_wrote(
    command: str, shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    (tmp_path / ".bashrc").write_text("alias ll='ls -l'")

    def install(*words: str) -> tuple[str, dict[Path, str]]:
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(f"{command}.cli").main(["completion", *words, "--install"])
        assert ended.value.code == 0
        return capsys.readouterr().out, {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}

    said, files = install()
    changed = [path for path, text in files.items() if path.name != ".bashrc" or "completion" in text]
    assert all(str(path) in said for path in changed)
    assert any(f"_{command.upper()}_COMPLETE" in files[path] for path in changed)
    assert files[tmp_path / ".bashrc"].splitlines()[0] == "alias ll='ls -l'"
    said, again = install(shell)
    assert again == files
    assert "wrote" not in said
    assert "added" not in said


def test_what_no_catalog_may_call_an_array_is_not_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(write_locally({"toy/50pct/good": np.zeros(2)}, tmp_path))
    text = path.read_text()
    assert "good:" in text
    path.write_text(text.replace("good:", "'g$(id>PWNED)':", 1))
    monkeypatch.setenv("DMDATA_CATALOG", str(path))
    assert "PWNED" not in "".join(completions("dmdata", "ls", "toy/50pct/"))
    path.write_text(text)
    assert completions("dmdata", "ls", "toy/50pct/") == ["toy/50pct/good"]


def test_a_folder_with_odd_characters_is_no_command_in_bashrc_and_a_relative_one_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    odd = tmp_path / 'a $(touch PWNED) "b"'
    monkeypatch.setenv("XDG_DATA_HOME", str(odd))
    assert run(capsys, "completion", "bash", "--install")[0] == 0
    script = odd / "bash-completion" / "completions" / "dmdata"
    script.write_text("echo found")
    done = subprocess.run(["bash", str(tmp_path / ".bashrc")], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr, (tmp_path / "PWNED").exists()) == ("found\n", "", False)
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert run(capsys, "completion", "bash", "--install")[0] == 0
    assert not (tmp_path / "relative").exists()
    assert (tmp_path / ".local" / "share" / "bash-completion" / "completions" / "dmdata").is_file()


def test_a_script_that_is_a_link_stays_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ZDOTDIR", raising=False)
    kept, link = tmp_path / "dotfiles" / "_dmdata", tmp_path / ".zfunc" / "_dmdata"
    for folder in (kept.parent, link.parent):
        folder.mkdir()
    kept.write_text("older")
    link.symlink_to(kept)
    assert run(capsys, "completion", "zsh", "--install")[0] == 0
    assert link.is_symlink()
    assert "compdef" in kept.read_text()


def test_an_unknown_shell_is_refused_with_those_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/bin/ksh")
    code, _, err = run(capsys, "completion", "--install")
    assert code == 2
    assert "name bash, zsh or fish: dmdata completion bash --install" in err
    assert not list(tmp_path.iterdir())


def _typed(shell: list[str], keys: str, *, until: str, **env: str) -> str:
    """Type at an interactive shell until it shows a text; returns what it showed."""
    process, ours = pty.fork()
    if process == 0:
        os.execvpe(shell[0], shell, os.environ | env)  # noqa: S606 - a shell, at a terminal of its own
    shown, deadline, rest = b"", time.monotonic() + 60, [*keys.split("|")]
    try:
        while time.monotonic() < deadline and until not in shown.decode(errors="replace"):
            if select.select([ours], [], [], 2)[0]:
                shown += os.read(ours, 1 << 16)
            elif rest:
                os.write(ours, rest.pop(0).encode())
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(ours)
    return shown.decode(errors="replace")


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_a_name_part_by_part(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    tools = tmp_path / "bin"
    tools.mkdir()
    tool = tools / "dmdata"
    tool.write_text(f"#!{sys.executable}\nfrom dmdata.cli import main\nmain()\n")
    tool.chmod(0o755)
    for variable in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    assert run(capsys, "completion", shell, "--install")[0] == 0
    words = [shell, "-i"]
    shown = _typed(words, "dmdata ls cif\t|5\t|test_m\t", until="cifar/50pct/test_margins", TERM="dumb", PS1="> ")
    assert "cifar/50pct/test_margins" in shown
