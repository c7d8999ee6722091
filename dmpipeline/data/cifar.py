"""CIFAR-10 from the files its authors publish, in the binary form or in Python's, without trusting either.

Both hold 10,000 pictures a file, in the same order, the release's: five files to train on, one to test. The Python form
is a pickle, and a pickle may run any program. Those here are read by a machine that knows four names and answers each
by a stand-in which only notes what it was told; no function of another package is ever called.
"""

import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dmpipeline.data.examples import Dataset, checked_dataset, unusable

RECORDS_PER_FILE = 10_000
"""Pictures in each of the files."""

_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_TEST = "test_batch"
_FOLDERS = ("", "cifar-10-batches-bin", "cifar-10-batches-py")
_N_CLASSES = 10
_PIXEL_BYTES = 3 * 32 * 32


def load_cifar(folder: Path, *, n_pictures: int = RECORDS_PER_FILE) -> Dataset:
    """Load CIFAR-10 from a folder: 50,000 and 10,000 uint8 pictures (32, 32, 3), in the order of the files.

    Parameters
    ----------
    folder : Path
        Where `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin` are, or the same names without `.bin`
        (the Python form); or the folder that one of the archives was unpacked in.
    n_pictures : int
        In each file; tests have fewer.

    Returns
    -------
    Dataset
        Named `cifar`, as in the release, whichever form it came from.

    Raises
    ------
    SpecError
        If a file is missing, not of the size that CIFAR-10's have, or holds something else.
    """
    place, suffix = _find(folder)
    read = _read_binary if suffix else _read_python
    parts = []
    for names in (_TRAIN, (_TEST,)):
        pictures, labels = zip(*(read(place / f"{name}{suffix}", n_pictures) for name in names), strict=True)
        # the files have one colour's plane after the other
        planes = np.concatenate(pictures).reshape(-1, 3, 32, 32)
        parts.append((np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), np.concatenate(labels)))
    return checked_dataset(
        "cifar",
        parts[0],
        parts[1],
        source=folder,
        n_classes=_N_CLASSES,
        example_order="CIFAR-10's own: data_batch_1 to data_batch_5 train, test_batch tests",
    )


def _find(folder: Path) -> tuple[Path, str]:
    """Find where the files are and how their names end."""
    for place in (folder / name for name in _FOLDERS):
        for suffix in (".bin", ""):
            if (place / f"{_TRAIN[0]}{suffix}").is_file():
                return place, suffix
    raise unusable(
        folder,
        "a folder without data_batch_1.bin or data_batch_1" if folder.is_dir() else "no folder",
        "is to be where CIFAR-10's binary or Python archive was unpacked; correct the path",
    )


def _read_binary(path: Path, n_pictures: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    expected = n_pictures * (1 + _PIXEL_BYTES)
    records = np.frombuffer(_bytes_of(path, n_pictures, at_least=expected, at_most=expected), np.uint8)
    records = records.reshape(n_pictures, 1 + _PIXEL_BYTES)
    return records[:, 1:], _checked_labels(path, records[:, 0])


def _read_python(path: Path, n_pictures: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    # next to the pixels there are a label and a file's name for each picture; bytes written as text may take two each
    content = _bytes_of(
        path, n_pictures, at_least=n_pictures * _PIXEL_BYTES, at_most=n_pictures * (2 * _PIXEL_BYTES + 256) + 4096
    )
    expected = f"is to be a dict of data, ({n_pictures}, {_PIXEL_BYTES}) uint8, and labels; get the file again"
    try:
        batch = _unpickled(content)
    except pickle.UnpicklingError as error:
        raise unusable(path, str(error)[:200], expected) from error
    if not isinstance(batch, dict):
        raise unusable(path, "no dict", expected)
    data, labels = batch.get(b"data"), batch.get(b"labels")
    pixels = data.pixels() if isinstance(data, _Array) else None
    if pixels is None or pixels.shape != (n_pictures, _PIXEL_BYTES):
        raise unusable(path, "data of another form" if pixels is None else f"data of shape {pixels.shape}", expected)
    if (
        not isinstance(labels, list)
        or len(labels) != n_pictures
        or not all(type(k) is int and 0 <= k < 256 for k in labels)
    ):
        raise unusable(path, "labels that are not a list of as many bytes", expected)
    return pixels, _checked_labels(path, labels)


def _bytes_of(path: Path, n_pictures: int, *, at_least: int, at_most: int) -> bytes:
    """Read a file whose size is as it should be, and no more of any other."""
    try:
        found = path.stat().st_size
        if not at_least <= found <= at_most:
            size = f"{at_least:,}" if at_least == at_most else f"{at_least:,} to {at_most:,}"
            why = f"is to have {size}, {n_pictures:,} pictures; get the file again"
            raise unusable(path, f"{found:,} bytes", why)
        return path.read_bytes()
    except OSError as error:
        raise unusable(path, str(error.strerror), "keeps it from being read; put CIFAR-10's own file there") from error


def _checked_labels(path: Path, labels: npt.NDArray[np.uint8] | list[int]) -> npt.NDArray[np.int64]:
    if not 0 <= min(labels) <= max(labels) < _N_CLASSES:
        found = f"labels from {min(labels)} to {max(labels)}"
        raise unusable(path, found, f"is to number classes from 0, below {_N_CLASSES}; get the file again")
    return np.asarray(labels, np.int64)


class _Array:
    """Stands for a numpy array of a pickle; keeps what it is told."""

    __slots__ = ("state",)

    def __setstate__(self, state: object) -> None:
        self.state = state

    def pixels(self) -> npt.NDArray[np.uint8] | None:
        """Return the array, if it is a matrix of uint8."""
        match getattr(self, "state", None):
            case (int(), (int(rows), int(columns)), _Type("u1"), bool(is_fortran), bytes(content)):
                if len(content) == rows * columns and rows > 0:
                    order: Literal["F", "C"] = "F" if is_fortran else "C"
                    return np.frombuffer(content, np.uint8).reshape((rows, columns), order=order)
        return None


class _Type:
    """Stands for a numpy dtype of a pickle; of its name alone is made use."""

    __slots__ = ("name",)
    __match_args__ = ("name",)

    def __init__(self, name: object) -> None:
        self.name = name.decode("latin-1") if isinstance(name, bytes) else name

    def __setstate__(self, state: object) -> None:
        """Byte order and the like, which bytes do not have."""


# The interpreter's own reader in Python: the one in C sets aside as much memory as a pickle claims to need.
class _BatchUnpickler(pickle._Unpickler):
    """Reads a batch as Python 2 wrote it; what comes out are numbers, bytes, lists, dicts and stand-ins."""

    def find_class(self, module: str, name: str, /) -> Any:
        # made again for each use, because a pickle may set attributes on what it gets
        match module, name:
            case "numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct":
                return lambda *_: _Array()
            case "numpy", "dtype":
                return lambda name, *_: _Type(name)
            case "numpy", "ndarray":
                return None
            case "_codecs", "encode":
                return _encode_latin()
        raise pickle.UnpicklingError(f"a pickle that names {module}.{name}")


def _encode_latin() -> Callable[[str, str], bytes]:
    """Make what Python 3 writes bytes with for Python 2; of all codecs only that one, for others may inflate."""

    def encode(text: str, codec: str) -> bytes:
        if codec != "latin1":
            raise pickle.UnpicklingError("a pickle that encodes otherwise than as latin1")
        return text.encode("latin-1")

    return encode


def _unpickled(content: bytes) -> object:
    """Read a batch.

    Raises
    ------
    pickle.UnpicklingError
        If it is not a pickle, or holds or asks for anything that a batch does not.
    """
    try:
        return _BatchUnpickler(io.BytesIO(content), encoding="bytes").load()
    except _HOW_PICKLES_FAIL as error:
        raise pickle.UnpicklingError(f"a pickle that cannot be read ({error})") from error


# a pickle is a program; what goes wrong in it is whatever its steps may raise
_HOW_PICKLES_FAIL = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    NameError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)
