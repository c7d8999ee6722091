"""Names of a package that are looked up when they are first used, and module paths that were documented formerly."""

import contextlib
import importlib
import sys
from collections.abc import Callable, Mapping
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def late_names(
    package: str,
    module_of: Mapping[str, str],
    *,
    while_importing: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> Callable[[str], Any]:
    """Make a package's ``__getattr__``.

    Parameters
    ----------
    package : str
    module_of : mapping of str to str
        The module that has each name.
    while_importing : callable, optional
        Makes the context in which a module is imported.

    Returns
    -------
    getattr : callable
        Returns the value of a name; AttributeError for one that is not there.
    """

    def value_of(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with while_importing():
            value = getattr(importlib.import_module(module_of[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return value_of


class FormerPaths(MetaPathFinder, Loader):
    """Finds a module by its former path.

    Parameters
    ----------
    paths : mapping of str to str
        Where each former path is today.
    """

    def __init__(self, paths: Mapping[str, str]) -> None:
        self._paths = paths

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:  # noqa: ARG002
        """Find a former path; None for any other name."""
        return ModuleSpec(fullname, self) if fullname in self._paths else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of today in the place of `module`."""
        sys.modules[module.__name__] = importlib.import_module(self._paths[module.__name__])
