"""Completion in the shell, for both commands: the script that turns it on, and the names of a catalog's artifacts."""

import os
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from dmdata.catalog.locate import is_address
from dmdata.cli.ending import complete_variable
from dmdata.errors import DmdataError
from dmdata.home import config_path


def complete_artifacts(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the names of the catalog in use that begin with what was typed, one part of a name at a time.

    Of an address, files are offered. A catalog that would have to be paid for is not fetched at the press of a key.
    """
    del parameter
    if is_address(incomplete):
        return [CompletionItem(incomplete, type="file")]
    try:
        names = _names_of(context.params.get("catalog") or os.environ.get("DMDATA_CATALOG") or _catalog_in_file())
    except (DmdataError, OSError, UnicodeDecodeError):
        return []  # the command itself reports what is wrong with it
    depth = incomplete.count("/") + 1
    begun = dict.fromkeys("/".join(name.split("/")[:depth]) for name in names if name.startswith(incomplete))
    return [CompletionItem(name) for name in begun]


def _names_of(catalog: str | None) -> list[str]:
    from dmdata.catalog.names import CATALOG_FILE, bundled_text, names_in

    if not catalog:
        return names_in(bundled_text())
    if "://" not in catalog:
        path = Path(catalog)
        return names_in((path / CATALOG_FILE if path.is_dir() else path).read_text())
    from dmdata.release.opening import address_at, load_catalog

    if address_at(catalog).requester_pays:
        return []
    return [artifact.name for artifact in load_catalog(catalog).artifacts(members=True)]


def _catalog_in_file() -> str | None:
    """Read the setting `catalog` alone: checking all of the config file takes longer than a completion may."""
    import yaml

    try:
        found = yaml.safe_load(config_path().read_text(encoding="utf-8"))["catalog"]
    except (FileNotFoundError, NotADirectoryError, yaml.YAMLError, LookupError, TypeError, ValueError):
        return None
    return found if isinstance(found, str) else None


def completion_command(name: str) -> click.Command:
    """Make the command that prints the completion script of `name`."""

    @click.command("completion", help=_HELP.format(name=name))
    @click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
    @click.pass_context
    def completion(context: click.Context, shell: str) -> None:
        script = get_completion_class(shell)
        assert script is not None  # noqa: S101 - the choices are click's own
        click.echo(script(context.find_root().command, {}, name, complete_variable(name)).source())

    return completion


_HELP = """Print the script that completes commands, options and artifact names in SHELL.

\b
bash:  {name} completion bash > ~/.local/share/bash-completion/completions/{name}
zsh:   {name} completion zsh > ~/.zfunc/_{name}    (a folder of fpath)
fish:  {name} completion fish > ~/.config/fish/completions/{name}.fish
"""
