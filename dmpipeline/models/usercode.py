"""Code of the user's own: imported by its path, and its errors told by the user's frames instead of ours.

A module is looked for where Python looks, and last in the working directory, as ``python -m`` would; a command that
imports nothing of the user's never looks there. What the code raises becomes an error that names what was called, what
went wrong, and as `frames` the lines of the user's own files that led to it.
"""

import functools
import importlib
import keyword
import os
import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from dmdata.errors import FactualError
from dmpipeline import errors
from dmpipeline.errors import DmpipelineError, SpecError, TrainingError, UserCodeError
from dmpipeline.spec import nearest_name

_LONGEST_CAUSE = 500
_FIRST_FRAMES, _LAST_FRAMES = 4, 8


def import_object(path: str) -> Any:
    """Import a class or function by its path, `package.module:name`.

    Raises
    ------
    SpecError
        If the path has another form, there is no such module, it is hidden by another of its name, it has no such
        name, or the name cannot be called.
    UserCodeError
        If the module raises an error as it is imported.
    """
    if not is_import_path(path):
        raise SpecError(f"import path {path!r} is not of the form package.module:name; correct it", value=path)
    module_name, _, name = path.partition(":")
    module = _import_module(path, module_name)
    _require_visible(path, module_name)
    if not hasattr(module, name):
        nearest = nearest_name(name, (public for public in vars(module) if not public.startswith("_")))
        where = f" ({file})" if (file := getattr(module, "__file__", None)) else ""
        raise SpecError(
            f"import path {path!r}: {module_name}{where} has no {name}; choose {nearest or 'another'}", value=path
        )
    found = getattr(module, name)
    if not callable(found):
        wrong = (
            f"import path {path!r} is a {type(found).__name__}, not a class or function; name one that can be called"
        )
        raise SpecError(wrong, value=path)
    return found


def is_import_path(path: str) -> bool:
    """Return whether a text is of the form `package.module:name`."""
    module_name, colon, name = path.partition(":")
    parts = [*module_name.split("."), name]
    return bool(colon) and all(part.isidentifier() and not keyword.iskeyword(part) for part in parts)


def look_in(folder: str | Path) -> None:
    """Have modules be found in a folder as well, after everywhere else; nothing happens if it is not there."""
    text = str(folder)
    here = [os.path.abspath(place or os.curdir) for place in sys.path if isinstance(place, str)]
    if os.path.isdir(text) and os.path.abspath(text) not in here:
        sys.path.append(text)
    importlib.invalidate_caches()  # the file may have been written a moment ago


@contextmanager
def explained(
    what: str, path: str, *, kind: type[DmpipelineError] = TrainingError, remedy: str, **facts: Any
) -> Iterator[None]:
    """Turn whatever the user's code raises while the block runs into an error that shows where.

    Errors of dmdata and dmpipeline pass as they are, and so does an interrupt from the keyboard, which only the main
    thread receives. `SystemExit` does not: a call of `sys.exit` in a function must not end a run as if it were done.

    Parameters
    ----------
    what : str
        What was done, as "recipe.function 'mymodel:learn'".
    path : str
        The import path, which tells the user's files from those of libraries.
    kind : type
        Of the error.
    remedy : str
    **facts
        Of the error.

    Raises
    ------
    DmpipelineError
        Of the given kind; its `frames` are lines for a person, perhaps none.
    """
    try:
        yield
    except (FactualError, GeneratorExit):
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        raise kind(
            f"{what} fails with {cause_of(error)}; {remedy}", frames=user_frames(error, path), **facts
        ) from error


def in_words(rows: Sequence[int]) -> str:
    """Name some rows: "row 3", or "rows 3, 4, 5, 8 and 12 more"."""
    shown = ", ".join(map(str, rows[:4]))
    more = f" and {len(rows) - 4} more" if len(rows) > 4 else ""
    return f"row{'s' * (len(rows) != 1)} {shown}{more}"


def cause_of(error: BaseException) -> str:
    """Say in one line what an error is: its kind and message."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - a user's error may fail to say what it is
        text = "(its message cannot be shown)"
    if isinstance(error, SystemExit):
        return f"a call of sys.exit({error.code!r})"
    if isinstance(error, SyntaxError) and error.msg:
        text = f"{error.msg} ({error.filename}, line {error.lineno})"
    shown = text if len(text) <= _LONGEST_CAUSE else f"{text[:_LONGEST_CAUSE]}..."
    return f"{type(error).__name__}{shown and f': {shown}'}"


def user_frames(error: BaseException, path: str) -> str:
    """Write the frames of an error's traceback that are the user's, and the one that raised it, as Python would.

    Parameters
    ----------
    error : BaseException
        As it was caught.
    path : str
        Import path of the user's code: a package of that name is the user's wherever it is installed.

    Returns
    -------
    frames : str
        Lines that end with a newline, those of repeated calls left out; empty where there is nothing to show.
    """
    stack = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_ours(frame.filename)]
    own = _folder_of(path)
    is_users = [_is_within(frame.filename, own) or not _is_library(frame.filename) for frame in stack]
    shown = [frame for frame, is_own in zip(stack, is_users, strict=True) if is_own]
    # where a library raises, its last frame says what it did not like
    if stack and not is_users[-1]:
        shown.append(stack[-1])
    if isinstance(error, SyntaxError):
        # importlib's frames say nothing, the error itself names the line
        shown = [frame for frame in shown if not _is_library(frame.filename)]
    lines = traceback.StackSummary.from_list(shown).format()
    if isinstance(error, SyntaxError):
        lines += traceback.format_exception_only(type(error), error)[:-1]
    if len(lines) > _FIRST_FRAMES + _LAST_FRAMES:
        left_out = f"  [{len(lines) - _FIRST_FRAMES - _LAST_FRAMES} more]\n"
        lines = [*lines[:_FIRST_FRAMES], left_out, *lines[-_LAST_FRAMES:]]
    return "".join(lines)


def _import_module(path: str, module_name: str) -> ModuleType:
    with suppress(OSError):  # a working directory that was removed
        look_in(os.getcwd())
    try:
        with explained(
            f"import path {path!r}: importing {module_name}", path, kind=UserCodeError, remedy="fix it", value=path
        ):
            return importlib.import_module(module_name)
    except UserCodeError as error:
        missing = getattr(error.__cause__, "name", None) if isinstance(error.__cause__, ModuleNotFoundError) else None
        if missing is None:
            raise
        if f"{module_name}.".startswith(f"{missing}."):
            raise SpecError(
                f"import path {path!r}: module {module_name} cannot be imported, for {missing} was not found; run the "
                "same in the folder it lies in, put that folder on PYTHONPATH, or install it",
                value=path,
            ) from error.__cause__
        raise UserCodeError(
            f"import path {path!r}: importing {module_name} fails, for {missing} was not found; install it",
            value=path,
            frames=error.frames,
        ) from error.__cause__


def _require_visible(path: str, module_name: str) -> None:
    """Refuse a module of Python's or of a library that hides a file of the user's in the working directory."""
    top = module_name.partition(".")[0]
    module = sys.modules[top]
    file = getattr(module, "__file__", None)
    if file is not None and not (_is_ours(file) or _is_library(file)):
        return
    with suppress(OSError):
        for hidden in (Path.cwd() / f"{top}.py", Path.cwd() / top / "__init__.py"):
            if hidden.is_file() and not (file and os.path.samefile(hidden, file)):
                raise SpecError(
                    f"import path {path!r}: {top} is a module of {_owner_of(top, file)}, which hides {hidden}; rename "
                    "yours, and name it so in the recipe",
                    value=path,
                )


def _owner_of(top: str, file: str | None) -> str:
    if file is None or top in sys.stdlib_module_names:
        return "Python's own"
    return f"an installed package ({file})"


def _folder_of(path: str) -> str | None:
    """Find the folder of the user's package; None of a module that is a file of its own, or of what is not loaded."""
    module = sys.modules.get(path.partition(":")[0].partition(".")[0])
    places = list(getattr(module, "__path__", []))
    return os.path.abspath(places[0]) if places else None


@functools.cache
def _our_folders() -> tuple[str, ...]:
    import dmdata

    return tuple(os.path.dirname(os.path.abspath(str(module.__file__))) for module in (errors, dmdata))


@functools.cache
def _library_folders() -> tuple[str, ...]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    return tuple({os.path.abspath(sysconfig.get_paths()[name]) for name in names})


def _is_within(filename: str, folder: str | None) -> bool:
    return folder is not None and os.path.abspath(filename).startswith(folder + os.sep)


def _is_ours(filename: str) -> bool:
    return any(_is_within(filename, folder) for folder in _our_folders())


def _is_library(filename: str) -> bool:
    if filename.startswith("<frozen "):
        return True
    parts = Path(filename).parts
    if "site-packages" in parts or "dist-packages" in parts:
        return True
    return any(_is_within(filename, folder) for folder in _library_folders())
