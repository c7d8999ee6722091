"""Completion in the shell, for both commands: the script that turns it on, and the names of a catalog's artifacts."""

import click
from click.shell_completion import CompletionItem, get_completion_class

from dmdata.console import complete_variable
from dmdata.errors import DmdataError
from dmdata.locate import is_address
from dmdata.release import address_at, load_catalog
from dmdata.settings import settings


def complete_artifacts(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the names of the catalog in use that go on from what was typed, one part of a name at a time.

    Of an address, files are offered. A catalog that would have to be paid for is not fetched at the press of a key.
    """
    del parameter
    if is_address(incomplete):
        return [CompletionItem(incomplete, type="file")]
    try:
        chosen = context.params.get("catalog") or settings().catalog
        if chosen and address_at(chosen).requester_pays:
            return []
        catalog = load_catalog(chosen)
    except DmdataError:
        return []  # what is wrong with it is said when the command runs
    depth = incomplete.count("/") + 1
    names = (artifact.name for artifact in catalog.artifacts(members=True))
    begun = dict.fromkeys("/".join(name.split("/")[:depth]) for name in names if name.startswith(incomplete))
    return [CompletionItem(name) for name in begun]


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
