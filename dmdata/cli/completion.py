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
    # what is no name itself is, like a folder, what others begin with
    known = set(names)
    return [CompletionItem(name if name in known else f"{name}/") for name in begun]


def _names_of(catalog: str | None) -> list[str]:
    from dmdata.catalog.names import bundled_text, names_in, text_at

    if not catalog:
        return names_in(bundled_text())
    if "://" not in catalog:
        return names_in(text_at(Path(catalog))[0])
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
    """Make the command that prints or installs the completion script of `name`."""

    @click.command("completion", help=_HELP.format(name=name))
    @click.argument("shell", type=click.Choice(SHELLS), required=False)
    @click.option("--install", "installing", is_flag=True, help="Install it. [default for SHELL: your login shell]")
    @click.pass_context
    def completion(context: click.Context, shell: str | None, installing: bool) -> None:
        if shell is None and installing:
            shell = _login_shell(context)
        if shell is None:
            raise click.MissingParameter(ctx=context, param=context.command.params[0])
        script = _script(context.find_root().command, name, shell)
        if not installing:
            click.echo(script)
            return
        from dmdata.cli.installation import install

        for line in install(script, name=name, shell=shell):
            click.echo(line)

    return completion


SHELLS = ("bash", "zsh", "fish")


def _login_shell(context: click.Context) -> str:
    shell = Path(os.environ.get("SHELL", "")).name
    if shell not in SHELLS:
        said = f"SHELL is {shell}" if shell else "SHELL is not set"
        raise click.UsageError(
            f"{said}, for which there is no completion; name bash, zsh or fish: {context.command_path} bash --install"
        )
    return shell


def _script(command: click.Command, name: str, shell: str) -> str:
    """Make the script of a shell; as click's, but that no space follows a name that ends with a slash."""
    found = get_completion_class(shell)
    assert found is not None  # noqa: S101 - the choices are click's own
    script = found(command, {}, name, complete_variable(name)).source()
    for text, with_slashes in _SLASHES.get(shell, ()):
        script = script.replace(text, with_slashes.replace("_NAME", f"_{name}"))
    return script


_NO_SPACE_IN_BASH = """\
    if [[ ${#COMPREPLY[@]} -eq 1 && $COMPREPLY == */ ]]; then
        compopt -o nospace
    fi
"""
_FOLDER_IN_ZSH = """\
                if [[ "$key" == */ ]]; then
                    folders+=("$key")
                else
                    completions+=("$key")
                fi
"""
_FOLDERS_IN_ZSH = """\
    if [ -n "$folders" ]; then
        compadd -U -S '' -V unsorted -a folders
    fi
"""
# what stands in click's script, and what in ours; fish leaves out the space by itself
_SLASHES = {
    "bash": [("    return 0\n", f"{_NO_SPACE_IN_BASH}\n    return 0\n")],
    "zsh": [
        ("    local -a completions\n", "    local -a completions\n    local -a folders\n"),
        ('                completions+=("$key")\n', _FOLDER_IN_ZSH),
        ('    if [ -n "$completions" ]', f'{_FOLDERS_IN_ZSH}\n    if [ -n "$completions" ]'),
        # a function that was loaded is not loaded a second time, and completes all the same
        ("$zsh_eval_context[-1] == loadautofunc", "$zsh_eval_context[-1] == loadautofunc || $funcstack[1] == _NAME"),
    ],
}
_HELP = """Print the script that completes commands, options and artifact names in SHELL, or install it.

With --install it is written where SHELL looks for it, and what was written or changed is said. By hand:

\b
bash:  {name} completion bash > ~/.local/share/bash-completion/completions/{name}
zsh:   {name} completion zsh > ~/.zfunc/_{name}    (a folder of fpath)
fish:  {name} completion fish > ~/.config/fish/completions/{name}.fish
"""
