"""Pages of the documentation as a reader follows them: their code blocks in order, and what each shows.

A block of ``console`` holds commands after ``$`` and what they print; one of ``python`` is run as it stands or, with
``>>>``, as a doctest. The blocks of a page share one namespace and one working directory. ``...`` stands for any text.
"""

import doctest
import io
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
_MAINS = {"dmdata": "dmdata.cli", "dmpipeline": "dmpipeline.cli"}
_BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True, slots=True)
class Block:
    """One code block: its language, its text, and where the text begins."""

    language: str
    text: str
    where: str

    @property
    def commands(self) -> Iterator[tuple[list[str], str]]:
        """Each command of the block as words, without a comment at its end, and what it is said to print."""
        for command, shown in _COMMAND.findall(self.text if self.language == "console" else ""):
            yield shlex.split(command, comments=True), shown


def blocks_of(page: str) -> list[Block]:
    """Find the code blocks of a page, named by its path from the root of the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(found[1], found[2], f"{page}, line {text.count(chr(10), 0, found.start(2)) + 1}")
        for found in _BLOCK.finditer(text)
    ]


@dataclass(slots=True)
class Reader:
    """Follows pages; `names` are what their Python has defined."""

    names: dict[str, Any] = field(default_factory=dict)

    def follow(self, page: str) -> None:
        """Run every block of a page; fails where one prints something other than the page shows."""
        for block in blocks_of(page):
            for command, shown in block.commands:
                got = self.type(command)
                right = not shown or doctest.OutputChecker().check_output(shown, got, _FLAGS)
                assert right, f"{block.where}: {shlex.join(command)}\nshown:\n{shown}\nprinted:\n{got}"
            if block.language == "python":
                self.execute(block)

    def type(self, command: Sequence[str]) -> str:
        """Run a command in this process; returns what a terminal shows of it, and fails unless it ends well."""
        shown = io.StringIO()
        with redirect_stdout(shown), redirect_stderr(shown), pytest.raises(SystemExit) as ended:
            import_module(_MAINS[command[0]]).main(list(command[1:]))
        assert ended.value.code == 0, f"{shlex.join(command)} ended with {ended.value.code}:\n{shown.getvalue()}"
        return shown.getvalue()

    def execute(self, block: Block) -> None:
        """Run a block of Python, as a doctest where it has prompts."""
        if ">>>" not in block.text:
            exec(compile(block.text, block.where, "exec"), self.names)  # noqa: S102 - the page's own lines
            return
        test = doctest.DocTestParser().get_doctest(block.text, self.names, block.where, None, None)
        said: list[str] = []
        failed = doctest.DocTestRunner(optionflags=_FLAGS).run(test, out=said.append, clear_globs=False).failed
        assert not failed, "".join(said)
        self.names |= test.globs
