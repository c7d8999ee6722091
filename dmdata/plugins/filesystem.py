"""The objects of a catalog as files: ``dmdata://cifar/50pct/test_margins`` for whatever speaks fsspec.

Names are those of the catalog, and a file is the object as it lies, header included: ``numpy.load`` reads a ``.npy``
through it, ``torch.load`` a ``.pt``. Listing costs nothing, since the catalog has the names and sizes; every byte read
goes through the budgeted transport. Nothing can be written.

``import dmdata`` registers the protocol, and an installed dmdata is found by fsspec without it.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import fsspec
from fsspec.spec import AbstractBufferedFile

from dmdata.array import LazyArray
from dmdata.catalog.entries import Artifact
from dmdata.errors import AccessError, CatalogError, DmdataError, ObjectMissingError
from dmdata.release.opening import CatalogLike, load_catalog, open_object
from dmdata.views.zarr_store import read_ranges

PROTOCOL = "dmdata"


class DmdataFileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc] # fsspec ships no types
    """A catalog's objects as read-only files.

    Parameters
    ----------
    catalog : Catalog, path or URL, optional
        See `dmdata.load_catalog`.
    to : {"internet", "same-region", "cross-region"}
        Where the bytes go: decides their price.
    local : bool, optional
        Whether local mirrors stand for ``.npy`` files; see `dmdata.open`.

    Examples
    --------
    >>> import fsspec
    >>> fsspec.filesystem("dmdata").glob("cifar/10pct/test_*")
    ['cifar/10pct/test_datamodels', 'cifar/10pct/test_logits', 'cifar/10pct/test_margins']
    """

    protocol = PROTOCOL
    # what a catalog without a path means depends on the environment, so an instance is not kept for ever
    cachable = False

    def __init__(
        self, catalog: CatalogLike = None, to: str = "internet", local: bool | None = None, **storage_options: Any
    ) -> None:
        super().__init__(**storage_options)
        self.catalog = catalog
        self.to = to
        self.local = local

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """List a dataset, an alpha of it, or one object; free.

        Raises
        ------
        ObjectMissingError
            If the catalog has no such name.
        """
        path = self._strip_protocol(path).strip("/")
        artifacts = list(load_catalog(self.catalog).artifacts())
        entries: dict[str, dict[str, Any]] = {}
        for artifact in artifacts:
            if artifact.name == path:
                entries = {path: _facts(artifact)}
                break
            if not path or artifact.name.startswith(f"{path}/"):
                rest = artifact.name[len(path) :].lstrip("/")
                name = artifact.name[: len(artifact.name) - len(rest)] + rest.partition("/")[0]
                entries[name] = _facts(artifact) if name == artifact.name else _folder(name)
        if not entries and path:
            raise self._missing(path)
        listed = [entries[name] for name in sorted(entries)]
        return listed if detail else [entry["name"] for entry in listed]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Return name, size in bytes as catalogued, and type; free.

        Raises
        ------
        ObjectMissingError
            If the catalog has no such name.
        """
        path = self._strip_protocol(path).strip("/")
        entries: list[dict[str, Any]] = self.ls(path)
        return entries[0] if path and entries[0]["name"] == path else _folder(path)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """Read an object, or a half-open range of its bytes; negative numbers count from its end.

        Raises
        ------
        BudgetError, IntegrityError, AccessError, ObjectMissingError, SourceError
        """
        octets = self._open_object(path)
        return bytes(octets[slice(start, end)])

    def cat_ranges(
        self,
        paths: list[str],
        starts: Any,
        ends: Any,
        max_gap: int | None = None,  # noqa: ARG002 - gaps are merged by price, as everywhere
        on_error: str = "return",
        **_: Any,
    ) -> list[Any]:
        """Read ranges of several objects, those of one object in one planned read.

        Parameters
        ----------
        paths : list of str
        starts, ends : int, None or list of them
            Half-open; negative numbers count from the end.
        on_error : {"return", "raise"}
            With "return" an error stands in place of the bytes of its object's ranges.
        """
        starts, ends = (list(side) if isinstance(side, Sequence) else [side] * len(paths) for side in (starts, ends))
        if not len(paths) == len(starts) == len(ends):
            raise ValueError(f"{len(paths)} paths, {len(starts)} starts and {len(ends)} ends; pass as many of each")
        answers: list[Any] = [b""] * len(paths)
        for path in dict.fromkeys(paths):
            positions = [position for position, other in enumerate(paths) if other == path]
            try:
                octets = self._open_object(path)
                bounds = [slice(starts[at], ends[at]).indices(len(octets))[:2] for at in positions]
                pieces: list[Any] = [piece.tobytes() for piece in read_ranges(octets, bounds)]
            except (OSError, DmdataError) as error:
                if on_error != "return":
                    raise
                pieces = [error] * len(positions)
            for position, piece in zip(positions, pieces, strict=True):
                answers[position] = piece
        return answers

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> "DmdataFile":
        if mode != "rb":
            self._refuse(path)
        options.pop("size", None)
        octets = self._open_object(path)
        return DmdataFile(octets, self, path, mode=mode, block_size=block_size, size=len(octets), **options)

    def _open_object(self, path: str) -> LazyArray:
        path = self._strip_protocol(path).strip("/")
        if self.info(path)["type"] == "directory":
            raise IsADirectoryError(f"{path} holds several objects; open one of {self.ls(path, detail=False)}")
        return open_object(path, catalog=self.catalog, to=self.to, local=self.local)

    def _missing(self, path: str) -> ObjectMissingError:
        try:
            found = load_catalog(self.catalog).find(path)
        except CatalogError as error:
            return ObjectMissingError(str(error), url=f"{PROTOCOL}://{path}")
        return ObjectMissingError(
            f"{path} is a part of the object {found.object_name}, not a file; open that, or dmdata.open({path!r})",
            url=f"{PROTOCOL}://{path}",
        )

    def _refuse(self, path: str, *_: Any, **__: Any) -> NoReturn:
        raise AccessError(
            f"{PROTOCOL}:// is read-only, so {path} cannot be written or removed; open it with mode 'rb', or copy it: "
            "dmdata get NAME",
            cause="read_only",
        )

    cp_file = mkdir = makedirs = rmdir = _rm = rm_file = rm = pipe_file = put_file = touch = mv = _refuse


class DmdataFile(AbstractBufferedFile):  # type: ignore[misc] # fsspec ships no types
    """An open object; what is read at once is `block_size` bytes more than asked for, unless ``cache_type="none"``."""

    DEFAULT_BLOCK_SIZE = 1 << 20
    """What is read ahead is paid for: enough for a header or a zip's directory, not for a block of rows."""

    def __init__(self, octets: LazyArray, filesystem: DmdataFileSystem, path: str, **options: Any) -> None:
        self._octets = octets
        super().__init__(filesystem, path, **options)

    def _fetch_range(self, start: int, end: int) -> bytes:
        return bytes(self._octets[start:end])


def _facts(artifact: Artifact) -> dict[str, Any]:
    # an array of a Zarr store is not a file; under another type it is listed, and not taken for one
    kind = "other" if artifact.stored.format == "zarr" else "file"
    return {"name": artifact.name, "size": artifact.n_bytes, "type": kind, "format": artifact.stored.format}


def _folder(name: str) -> dict[str, Any]:
    return {"name": name, "size": 0, "type": "directory"}
