"""fsspec's own tests of file systems, as far as they are of reading: ``get`` with all that finds what it gets.

They want trees of any depth and files of any bytes, which a catalog does not list; so the names are stood in for, and
listing, globbing, expanding and reading are ours.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fsspec.tests.abstract import (
    AbstractCopyTests,
    AbstractFixtures,
    AbstractGetTests,
    AbstractOpenTests,
    AbstractPipeTests,
    AbstractPutTests,
)

import dmdata
from dmdata.catalog.entries import Artifact, StoredArray
from dmdata.plugins.filesystem import DmdataFileSystem

_READ_ONLY = "it writes through the file system, and dmdata:// is read-only; test_filesystem.py sees that it refuses"


class AnyNames(dmdata.Catalog):
    """A catalog of any names, each of an object with the given content."""

    def artifacts(self, *, members: bool = False) -> Iterator[Artifact]:
        for name, content in self.title:  # type: ignore[misc] # stands in for all that a catalog says
            stored = StoredArray.model_construct(key=name, format="npy", n_bytes=len(content), members={}, basis={})
            yield Artifact(name, "", "", None, None, stored, None, None, None, {})  # type: ignore[arg-type]


class AnyFiles(DmdataFileSystem):  # type: ignore[misc] # fsspec ships no types
    """Our file system over files of any names and bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, bytes] = {}

    @property
    def catalog(self) -> dmdata.Catalog:
        return AnyNames.model_construct(title=list(self.files.items()))  # type: ignore[arg-type] # see above

    @catalog.setter
    def catalog(self, catalog: object) -> None:
        pass

    def _open_object(self, path: str) -> Any:
        return np.frombuffer(self.files[self._name(path)], np.uint8)

    def _name(self, path: str) -> str:
        return str(self._strip_protocol(path).strip("/"))

    # by which fsspec's tests plant their trees

    def touch(self, path: str, **_: Any) -> None:
        self.files[self._name(path)] = b""

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        self.files[self._name(path)] = value

    def mkdir(self, path: str, **_: Any) -> None:
        pass

    makedirs = mkdir

    def rm(self, path: str, **_: Any) -> None:
        self.files = {name: content for name, content in self.files.items() if not name.startswith(self._name(path))}


class Files(AbstractFixtures):  # type: ignore[misc] # fsspec ships no types
    """Where fsspec's tests plant the trees that they read."""

    @pytest.fixture
    def fs(self) -> AnyFiles:
        return AnyFiles()

    @pytest.fixture
    def fs_path(self) -> str:
        return "tree"

    @pytest.fixture
    def supports_empty_directories(self) -> bool:
        return False


class TestGet(Files, AbstractGetTests):  # type: ignore[misc] # fsspec ships no types
    pass


@pytest.mark.skip(reason=_READ_ONLY)
class TestCopy(Files, AbstractCopyTests):  # type: ignore[misc] # fsspec ships no types
    pass


@pytest.mark.skip(reason=_READ_ONLY)
class TestPut(Files, AbstractPutTests):  # type: ignore[misc] # fsspec ships no types
    pass


@pytest.mark.skip(reason=_READ_ONLY)
class TestOpen(Files, AbstractOpenTests):  # type: ignore[misc] # fsspec ships no types
    pass


@pytest.mark.skip(reason=_READ_ONLY)
class TestPipe(Files, AbstractPipeTests):  # type: ignore[misc] # fsspec ships no types
    pass
