"""Whether a file that is there already is what would be downloaded, by all that is known of it here; asks no source."""

import filecmp
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dmdata import phases
from dmdata.catalog.entries import Artifact
from dmdata.errors import DmdataError, ObjectMissingError
from dmdata.objects.address import ObjectState
from dmdata.reading import digests
from dmdata.reading.headers import known_state
from dmdata.release.opening import address_of


def check_object(artifact: Artifact, path: Path, state: ObjectState | None) -> str | None:
    """Compare a file with the object that would be downloaded to it.

    Parameters
    ----------
    artifact : Artifact
    path : Path
    state : ObjectState or None
        As the source has just answered, if it was asked.

    Returns
    -------
    how : str or None
        In words, what was compared; None where nothing is there.

    Raises
    ------
    DmdataError
        If something else is there.
    """
    if not _is_file(path):
        return None
    address, n_bytes = address_of(artifact), state.n_bytes if state else artifact.n_bytes
    size = path.stat().st_size
    if not n_bytes:
        raise DmdataError(f"{path} exists, and the size of {artifact.name} is not known; {_REMEDY}", path=str(path))
    if size != n_bytes:
        raise DmdataError(
            f"{path} exists and has {size:,} bytes, but {artifact.name} has {n_bytes:,}, so it is another file or only "
            f"part of this one; {_REMEDY}",
            path=str(path),
        )
    phases.phase(f"comparing {path.name}")
    if address.is_local:
        if not address.local_path.is_file():
            raise ObjectMissingError(
                f"{path} exists and cannot be compared with {artifact.name}: nothing is at {address}; check the name",
                url=str(address),
            )
        if not filecmp.cmp(path, address.local_path, shallow=False):
            raise DmdataError(f"{path} exists and differs from {address}; {_REMEDY}", path=str(path))
        return "the same byte for byte"
    read, sha256 = digests.latest(address) or (None, None)
    known = known_state(address)
    etags = [state.etag] if state and state.etag else [known and known.etag, artifact.stored.etag]
    if read and (others := [etag for etag in etags if etag and etag != read.etag]):
        raise DmdataError(
            f"{path} exists, and {artifact.name} has another ETag, {others[0]}, than when it was last downloaded here; "
            f"{_REMEDY}",
            path=str(path),
        )
    wanted = artifact.stored.sha256 or sha256
    if wanted is None:
        return "of the same size; its content was not compared, because no digest of it is known here"
    if _sha256(path) != wanted:
        raise DmdataError(
            f"{path} exists and is as long as {artifact.name}, but its SHA-256 is not {wanted}; {_REMEDY}",
            path=str(path),
        )
    return "of the same size and SHA-256" + (f" as ETag {read.etag}" if read else "")


def check_slice(name: str, path: Path, url: str, selection: str) -> str | None:
    """Compare a file with the part of an array that would be saved to it; see `check_object`.

    Parameters
    ----------
    name : str
        Of the array.
    path : Path
    url : str
        Where the array is.
    selection : str
        The digest of what is selected.
    """
    if not _is_file(path):
        return None
    if digests.recall_slice(url, selection) != _sha256(path):
        raise DmdataError(
            f"{path} exists and is not what was saved here of this selection of {name}; {_REMEDY}", path=str(path)
        )
    return "the same selection, unchanged since it was saved"


def check_values(name: str, path: Path, read: Callable[[], npt.NDArray[Any]]) -> str | None:
    """Compare a file with the part of an array that would be saved to it, which is read again; see `check_object`."""
    if not _is_file(path):
        return None
    values = read()
    try:
        saved = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        saved = None  # whatever it is, it is not that
    is_same = isinstance(saved, np.ndarray) and (saved.shape, saved.dtype) == (values.shape, values.dtype)
    if not is_same or saved.tobytes() != values.tobytes():
        raise DmdataError(f"{path} exists and is not this selection of {name}; {_REMEDY}", path=str(path))
    return "the same selection, value by value"


_REMEDY = "remove it, or name another file"


def _is_file(path: Path) -> bool:
    if path.is_file():
        return True
    if path.exists() or path.is_symlink():
        raise DmdataError(f"{path} exists and is not a file; {_REMEDY}", path=str(path))
    return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
