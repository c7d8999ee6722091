"""Registers ``dmdata://`` with fsspec, without importing it: that takes as long as importing NumPy.

An installed dmdata is found by its entry point; this serves a checkout that is only on the path.
"""

import contextlib
import importlib.util
import sys
import threading
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_with_fsspec() -> None:
    """Register ``dmdata://`` now where fsspec is imported already, otherwise as soon as it is."""
    if "fsspec" in sys.modules:
        import fsspec  # waits where another thread is importing it

        _register(fsspec)
    else:
        sys.meta_path.insert(0, _AfterFsspec())


def _register(fsspec: ModuleType) -> None:
    fsspec.register_implementation("dmdata", "dmdata.plugins.filesystem.DmdataFileSystem", clobber=True)


class _AfterFsspec(MetaPathFinder):
    """Finds fsspec as others do, and registers with it at the end of its import."""

    def __init__(self) -> None:
        self._thread = threading.local()

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:  # noqa: ARG002
        if fullname != "fsspec" or getattr(self._thread, "is_asking_others", False):
            return None
        self._thread.is_asking_others = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._thread.is_asking_others = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)
            with contextlib.suppress(ValueError):  # another import of it has
                sys.meta_path.remove(self)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
