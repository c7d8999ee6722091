"""How a command ends: with one line for people, whatever went wrong, and the exit code of its error.

The codes are those of `dmdata.errors`, 2 for a wrong command line, and 130 when interrupted.
"""

import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import click
import click.shell_completion

from dmdata.errors import FactualError

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Invocation:
    """How a command was started, for `dmdata.cli.console`.

    Attributes
    ----------
    is_own_process : bool
        The process ends with the command.
    runs_user_code : bool
        It may run code of the user's.
    """

    is_own_process: bool = False
    runs_user_code: bool = False


def run(
    command: click.Command, arguments: Sequence[str] | None, *, name: str, runs_user_code: bool = False
) -> NoReturn:
    """Run a command and end the process: with one line for people, whatever went wrong.

    Parameters
    ----------
    command : click.Command
    arguments : sequence of str or None
        None: those of the process, which is then the command's.
    name : str
    runs_user_code : bool
        Keep what is printed by others off standard output even where no ``--json`` asks for it.
    """
    warnings.showwarning = _show_warning
    if instruction := os.environ.get(complete_variable(name)):
        sys.exit(click.shell_completion.shell_complete(command, {}, name, complete_variable(name), instruction))
    words = list(sys.argv[1:] if arguments is None else arguments)
    is_debug = "--debug" in words
    if arguments is None and not is_debug:  # the process is this command's
        threading.excepthook = _show_failed_thread
        sys.unraisablehook = _show_nothing  # what a library could not clean up changes no answer
    try:
        with command.make_context(name, words.copy(), obj=Invocation(arguments is None, runs_user_code)) as context:
            command.invoke(context)
        sys.exit(0)
    except SystemExit:
        raise
    except click.exceptions.Exit as ended:
        sys.exit(ended.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USAGE)
    except (KeyboardInterrupt, click.Abort):
        click.echo(f"{name}: interrupted; what is complete stays, run the same again to resume", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(EXIT_INTERRUPTED)
    except BaseException as error:  # noqa: BLE001 - a panic of a library in Rust is no Exception, and nobody sees it raised
        if is_debug:
            click.echo(without_keys(traceback.format_exc()), err=True)
        text, exit_code = _last_words(error, name)
        # lines of the user's own code that led to it, if that is what failed
        frames = getattr(error, "frames", None) or ""
        click.echo(f"{name}: {without_keys(text)}", err=True)
        click.echo(without_keys(frames), err=True, nl=False)
        sys.exit(exit_code)


def _last_words(error: BaseException, name: str) -> tuple[str, int]:
    """Describe what ended a command; return that and the exit code."""
    if isinstance(error, FactualError):
        return str(error), error.exit_code
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        # anything not handled before: a full disk, a folder that may not be written
        return f"{text}; nothing that was complete is lost, run the same again once it is fixed", 1
    if isinstance(error, MemoryError):
        return f"there is not enough memory{text and f' ({text})'}; select less, or use a machine with more", 1
    kind = type(error).__name__
    shown = text if len(text) <= _LONGEST_FAULT else f"{text[:_LONGEST_FAULT]}..."
    return f"{kind}{shown and f': {shown}'}; this is a fault of {name}: run again with --debug and report it", 1


_LONGEST_FAULT = 500
# a shorter one may be part of any word
_SHORTEST_SECRET = 8
_SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")
_SECRETS = re.compile(
    r"(?i)(\b(?:x-amz-(?:signature|credential|security-token)|signature|awsaccesskeyid|aws_secret_access_key"
    r"|aws_session_token|secret_access_key|secret_key|session_token|sig)['\"]?\s*[=:]\s*['\"]?)[^\s&'\",;)]+"
    r"|(?<=://)[^\s/@]+:[^\s/@]+(?=@)|\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b"
)


def without_keys(text: str) -> str:
    """Leave out of a text whatever is, or looks like, a key, a token or a signature."""
    for variable in _SECRET_VARIABLES:
        if len(secret := os.environ.get(variable, "")) >= _SHORTEST_SECRET:
            text = text.replace(secret, "***")
    return _SECRETS.sub(lambda found: f"{found[1] or ''}***", text)


def _show_failed_thread(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_type is not SystemExit:
        what = " ".join(f"{arguments.exc_type.__name__}: {arguments.exc_value}".split())
        click.echo(without_keys(f"warning: {what}"), err=True)


def _show_nothing(_: Any) -> None:
    pass


def complete_variable(name: str) -> str:
    """Name the variable by which a shell asks a command for completions."""
    return f"_{name.upper()}_COMPLETE"


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(without_keys(f"warning: {message}"), err=True)
