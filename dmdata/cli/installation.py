"""Completion scripts put where a shell finds them: written, or left as they are, but never twice."""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from dmdata.atomic import write_whole


def install(script: str, *, name: str, shell: str) -> Iterator[str]:
    """Put the completion script of a command where a shell finds it.

    Parameters
    ----------
    script : str
    name : str
        Of the command.
    shell : {"bash", "zsh", "fish"}

    Yields
    ------
    done : str
        What was written, changed, or there already; one line for each file.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    home = Path.home()
    if shell == "fish":
        yield _write(_folder("XDG_CONFIG_HOME", home / ".config") / "fish" / "completions" / f"{name}.fish", script)
    elif shell == "bash":
        path = _folder("XDG_DATA_HOME", home / ".local" / "share") / "bash-completion" / "completions" / name
        yield _write(path, script)
        # whether bash-completion looks into that folder depends on the system, and on its being installed
        quoted = shlex.quote(str(path))
        yield _add_line(home / ".bashrc", f"[ -r {quoted} ] && . {quoted}")
    else:
        yield _write(home / ".zfunc" / f"_{name}", script)
        line = 'fpath=("$HOME/.zfunc" $fpath); autoload -Uz compinit && compinit -i'
        yield _add_line(_folder("ZDOTDIR", home) / ".zshrc", line)
    yield f"it works in the next {shell} that you start"


def _folder(variable: str, default: Path) -> Path:
    """Take a folder that is set; one that is relative would be another from each working directory, and is ignored."""
    path = Path(os.environ.get(variable) or default)
    return path if path.is_absolute() else default


def _write(path: Path, content: str) -> str:
    content = content.rstrip("\n") + "\n"
    try:
        before = path.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        before = None
    if before == content:
        return f"{path} is there already, and was not changed"
    target = path.resolve()  # a link stays one
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, content)
    return f"wrote {path}"


def _add_line(path: Path, line: str) -> str:
    text = path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else ""
    if line in text.splitlines():
        return f"{path} loads it already, and was not changed"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:  # where it is a link, what it leads to
        file.write(("\n" if text and not text.endswith("\n") else "") + line + "\n")
    return f"added one line to {path}: {line}"
