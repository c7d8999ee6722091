"""Whatever command or option a text of ours advises is one that the command line takes."""

import ast
import re
import shlex
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import click

from dmdata.cli.command import commands as dmdata_commands
from dmpipeline.cli.command import commands as dmpipeline_commands

ROOT = Path(__file__).parents[2]
GROUPS = {"dmdata": dmdata_commands, "dmpipeline": dmpipeline_commands}

HOLE = "1"
"""Stands for what is filled in when a text is made, and for a word in capitals."""

# a command ends where its sentence, its quotes or its part of a list does
_COMMAND = re.compile(r"\b(dmdata|dmpipeline) ([a-z]+\b.*?)(?=[`;|)\n]|, |\.(?:\s|$)|: |\? | # |$)", re.DOTALL)
_OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z-]*(?![\w-])")
# of other programs, or words of a text
_FOREIGN = {"--version", "--help", "--profile", "--token-code", "--requeue", "--open-mode", "--gres"}


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """Every text in a module but docstrings, with the line it is in; what is filled in later is HOLE."""
    tree = ast.parse(path.read_text())
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(node.value)
        if isinstance(node, ast.JoinedStr):
            skipped |= set(node.values)
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(p.value if isinstance(p, ast.Constant) else HOLE for p in node.values)


def helps(group: click.Group) -> Iterator[str]:
    for command in group.commands.values():
        yield command.help or ""
        if isinstance(command, click.Group):
            yield from helps(command)


def advised() -> list[tuple[str, str]]:
    """Where and what: each text of the two packages, help included."""
    modules = chain(*((ROOT / package).rglob("*.py") for package in GROUPS))
    found = [(f"{path.relative_to(ROOT)}:{line}", text) for path in modules for line, text in texts_of(path)]
    return found + [(f"{name} --help", text) for name, group in GROUPS.items() for text in helps(group)]


def is_taken(words: list[str], package: str) -> bool:
    """Whether the command line takes these words, all of its arguments being there."""
    group = GROUPS[package]
    try:
        command, arguments = group, words
        with click.Context(group) as context:
            while isinstance(command, click.Group) and arguments:
                _, found, arguments = command.resolve_command(context, arguments)
                if found is None:
                    return False
                command = found
            if isinstance(command, click.Group) and not command.invoke_without_command:
                return False
            command.make_context(words[0], [*arguments], parent=context).close()
    except click.exceptions.Exit:
        return True
    except click.ClickException:
        return False
    return True


def words_of(text: str, group: click.Group) -> list[str]:
    """The words of a command, up to where prose begins: a plain word that is no command and no option's value."""
    text = re.sub(r"\b[A-Z][A-Z0-9_]*\b", HOLE, text)
    try:
        words = shlex.split(text)
    except ValueError:
        words = text.split()
    command: click.Command | None = group
    for place, word in enumerate(words):
        if isinstance(command, click.Group) and word in command.commands:
            command = command.commands[word]
        elif re.fullmatch("[a-z]+", word) and not (place and takes_value(command, words[place - 1])):
            return words[:place]
    return words


def takes_value(command: click.Command | None, option: str) -> bool:
    return any(
        isinstance(parameter, click.Option) and option in parameter.opts and not parameter.is_flag
        for parameter in (command.params if command else [])
    )


def commands_in(texts: list[tuple[str, str]]) -> Iterator[tuple[str, str, list[str]]]:
    for where, text in texts:
        for package, rest in _COMMAND.findall(text):
            words = words_of(rest, GROUPS[package])
            if words and words[0] in GROUPS[package].commands:
                yield where, package, words


def test_each_command_that_is_advised_is_taken_as_it_stands() -> None:
    found = list(commands_in(advised()))
    refused = [
        f"{where}: {package} {' '.join(words)}" for where, package, words in found if not is_taken(words, package)
    ]
    assert len(found) > 40
    assert not refused, "\n".join(refused)


def test_each_option_that_is_advised_is_there() -> None:
    def options(group: click.Group) -> Iterator[str]:
        for command in [group, *group.commands.values()]:
            if isinstance(command, click.Group) and command is not group:
                yield from options(command)
            for parameter in command.params:
                yield from (*parameter.opts, *parameter.secondary_opts)

    known = {option for group in GROUPS.values() for option in options(group)} | _FOREIGN
    strange = [
        f"{where}: {option} in {text!r}"
        for where, text in advised()
        for option in _OPTION.findall(text)
        if option.startswith("--") and option not in known
    ]
    assert not strange, "\n".join(strange)
