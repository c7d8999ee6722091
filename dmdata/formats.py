"""Where the numbers of an array lie inside its object, read from the object's own header.

A ``.npy`` header or the directory of a ``.pt`` becomes a `Layout`: shape, dtype, byte offset and strides. Nothing is
unpickled, imported or run, torch is not needed, and only the headers are read. Whatever is damaged, lies about its
size, or holds more than plain numbers raises `FormatError` naming the object.
"""

import ast
import contextlib
import io
import math
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from dmdata.errors import FormatError

ReadAt: TypeAlias = Callable[[int, int], bytes]
"""Read the half-open byte range (start, stop) of an object; fewer bytes come back only at its end."""

NPY_PREFIX_BYTES = 128
"""What numpy writes before the first element of an array of few dimensions: one read gets it all."""

PT_HEAD_BYTES = 4096
"""What a ``.pt`` of a few tensors begins with: its pickle, and all that torch writes before the first tensor."""

_LONGEST_NPY_HEADER = 65_536
_LONGEST_PICKLE = 1 << 16
_MOST_DIMENSIONS = 64
_LARGEST_SIZE = 1 << 50
_DEEPEST_NESTING = 4
_FLAT: tuple[int, tuple[Any, ...]] = (1, ())
_PT_TAIL_BYTES = 4096
# bits 0, 5, 6 and 13 of a zip member's flags, by PKWARE's APPNOTE 4.4.4
_ENCRYPTED_OR_PATCHED = 0x2061
# what zipfile and struct raise for bytes that are no sound archive
_DAMAGED_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    MemoryError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the elements of an array lie in an object.

    Attributes
    ----------
    shape : tuple of int
    dtype : numpy.dtype
    offset : int
        Bytes before the first element.
    strides : tuple of int
        Bytes from one element to the next along each axis. The elements fill their extent without holes, in C order,
        Fortran order, or any other order of the axes.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    strides: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stop(self) -> int:
        """First byte after the last element."""
        return self.offset + self.n_bytes

    @property
    def storage_order(self) -> list[int]:
        """Axes from the slowest to the fastest."""
        return sorted(range(len(self.shape)), key=lambda axis: (-self.strides[axis], axis))


def contiguous_strides(shape: tuple[int, ...], itemsize: int, *, fortran: bool = False) -> tuple[int, ...]:
    """Compute the byte strides of an array without holes, in C or Fortran order."""
    sizes = shape if fortran else shape[::-1]
    strides = [itemsize]
    for size in sizes[:-1]:
        strides.append(strides[-1] * max(size, 1))
    strides = strides[: len(shape)]
    return tuple(strides if fortran else strides[::-1])


def npy_layout(read_at: ReadAt, *, object_bytes: int, url: str) -> Layout:
    """Read the header of a ``.npy`` object.

    Parameters
    ----------
    read_at : callable
        Called once with the first 128 bytes, once more for a longer header.
    object_bytes : int
        Size of the object as its store tells it; the header's promise must agree to the byte.
    url : str
        Names the object in errors.

    Raises
    ------
    FormatError
        If it is no ``.npy`` file, its header is damaged, it holds objects or records, or its size is not what the
        header promises.

    Notes
    -----
    The format is NumPy's enhancement proposal 1 (versions 1.0, 2.0 and 3.0).
    """
    head = bytes(read_at(0, min(NPY_PREFIX_BYTES, object_bytes)))
    if not head.startswith(b"\x93NUMPY") or len(head) < 12:
        raise FormatError(f"{url} is not a .npy file: it starts with {head[:8]!r}; expected b'\\x93NUMPY'", url=url)
    major, minor = head[6:8]
    if major not in (1, 2, 3) or minor != 0:
        raise FormatError(f"{url} has .npy version {major}.{minor}; versions 1.0, 2.0 and 3.0 are known", url=url)
    width = 2 if major == 1 else 4
    offset = 8 + width + int.from_bytes(head[8 : 8 + width], "little")
    if offset > min(object_bytes, _LONGEST_NPY_HEADER):
        raise FormatError(
            f"{url} claims a header of {offset} bytes in an object of {object_bytes}; it is damaged", url=url
        )
    if offset > len(head):
        head += bytes(read_at(len(head), offset))
    shape, fortran, dtype = _npy_facts(head[8 + width : offset], encoding="utf-8" if major == 3 else "latin1", url=url)
    layout = Layout(shape, dtype, offset, contiguous_strides(shape, dtype.itemsize, fortran=fortran))
    if layout.stop != object_bytes:
        raise FormatError(
            f"{url} has {object_bytes} bytes but its header promises {layout.stop} (shape {shape}, {dtype}); "
            "it is truncated or damaged: fetch it anew or ask its publisher",
            url=url,
            promised_bytes=layout.stop,
            object_bytes=object_bytes,
        )
    return layout


def npy_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """Write the header that numpy puts before the elements of a C-ordered array of this shape and dtype."""
    buffer = io.BytesIO()
    facts = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, facts)
    return buffer.getvalue()


def pt_layouts(read_at: ReadAt, *, object_bytes: int, url: str) -> dict[str, Layout]:
    """Find the tensors of a ``.pt`` object: a dict from names to tensors, saved by torch 1.6 or newer.

    Parameters
    ----------
    read_at : callable
        Called for the zip directory at the end, the pickle, and 30 bytes before each tensor.
    object_bytes : int
    url : str
        Names the object in errors.

    Returns
    -------
    layouts : dict of str to Layout
        In the order of the file.

    Raises
    ------
    FormatError
        If the object is damaged, compressed, of the form before torch 1.6, or holds anything but plain tensors. The
        pickle is never run: a reader of its own understands dicts and tensors and refuses all else.
    """
    file = io.BufferedReader(_RangeFile(read_at, object_bytes), buffer_size=_PT_TAIL_BYTES)
    try:
        with zipfile.ZipFile(file) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            tensors = _pickled_tensors(_small_member(archive, members, "data.pkl", url), url=url)
            if "byteorder" in members and _small_member(archive, members, "byteorder", url) != b"little":
                raise FormatError(f"{url} is big-endian; load it in torch and save it on a little-endian host", url=url)
            ends = _ends_of_members(archive)
            return {name: _placed(tensor, members, ends, read_at, url) for name, tensor in tensors.items()}
    except FormatError:
        raise
    except _DAMAGED_ZIP as error:
        raise FormatError(
            f"{url} is not a readable .pt ({str(error)[:200]}); if it was saved before torch 1.6, load it in torch "
            "with weights_only=True and save it again",
            url=url,
        ) from error


def _npy_facts(text: bytes, *, encoding: str, url: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        with _no_warnings():
            facts = ast.literal_eval(text.decode(encoding))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise FormatError(f"{url} has a damaged .npy header: {text[:80]!r}", url=url) from error
    if not isinstance(facts, dict) or set(facts) != {"descr", "fortran_order", "shape"}:
        raise FormatError(f"{url} has a .npy header of {text[:80]!r}; expected descr, fortran_order and shape", url=url)
    shape, fortran, descr = facts["shape"], facts["fortran_order"], facts["descr"]
    if not isinstance(shape, tuple) or not _is_possible(shape):
        raise FormatError(f"{url} has shape {str(shape)[:80]} in its header; expected a tuple of counts", url=url)
    if not isinstance(fortran, bool):
        raise FormatError(f"{url} has fortran_order {fortran!r} in its header; expected True or False", url=url)
    dtype = _plain_dtype(descr)
    if dtype is None:
        raise FormatError(
            f"{url} holds {str(descr)[:80]!r}; only plain numbers are read, for anything else could run code", url=url
        )
    return shape, fortran, dtype


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Keep Python's parsers from warning of odd text in a file: it is judged by what it says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _plain_dtype(descr: object) -> np.dtype[Any] | None:
    if not isinstance(descr, str) or not re.fullmatch(r"[<>=|]?(\?|[biufc]\d{1,2})", descr):
        return None
    try:
        return np.dtype(descr)
    except TypeError:
        return None


def _is_possible(shape: tuple[Any, ...]) -> bool:
    """Tell whether NumPy could make an array of this shape, whatever its elements."""
    sizes_fit = all(type(size) is int and 0 <= size < _LARGEST_SIZE for size in shape)
    return len(shape) <= _MOST_DIMENSIONS and sizes_fit and math.prod(size or 1 for size in shape) < _LARGEST_SIZE


class _RangeFile(io.RawIOBase):
    """A seekable file over `read_at`, for zipfile; the tail, where a zip keeps its directory, is read once."""

    def __init__(self, read_at: ReadAt, size: int) -> None:
        self._read_at = read_at
        self._size = size
        self._position = 0
        self._tail_start = max(size - _PT_TAIL_BYTES, 0)
        self._tail: bytes | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        start, stop = self._position, min(self._position + len(buffer), self._size)
        if start >= stop:
            return 0
        if start >= self._tail_start:
            if self._tail is None:
                self._tail = bytes(self._read_at(self._tail_start, self._size))
            data = self._tail[start - self._tail_start : stop - self._tail_start]
        else:
            data = bytes(self._read_at(start, stop))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _small_member(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], name: str, url: str) -> bytes:
    if name not in members:
        raise FormatError(f"{url} is a zip archive without {name}, not a .pt saved by torch", url=url)
    info = members[name]
    _require_stored(info, url)
    if info.file_size > _LONGEST_PICKLE:
        raise FormatError(
            f"{url} has a {name} of {info.file_size} bytes; a dict of tensors needs a few hundred", url=url
        )
    return archive.read(info)


def _require_stored(info: zipfile.ZipInfo, url: str) -> None:
    is_plain = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & _ENCRYPTED_OR_PATCHED
    if not is_plain or info.compress_size != info.file_size:
        raise FormatError(
            f"{url} is compressed or encrypted ({info.filename}), so its tensors cannot be read in place; "
            "load it in torch with weights_only=True and save it again",
            url=url,
        )


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: np.dtype[Any]
    key: str
    n_elements: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _ends_of_members(archive: zipfile.ZipFile) -> dict[str, int]:
    """Find where each member's part of the archive ends: where the next one, or the directory, begins."""
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    stops = [*(info.header_offset for info in infos[1:]), archive.start_dir]
    return {info.filename: stop for info, stop in zip(infos, stops, strict=True)}


def _placed(
    tensor: _Tensor, members: dict[str, zipfile.ZipInfo], ends: dict[str, int], read_at: ReadAt, url: str
) -> Layout:
    """Find where a tensor lies, by the local header before its storage and by where its member ends."""
    storage, itemsize = tensor.storage, tensor.storage.dtype.itemsize
    info = members[f"data/{storage.key}"]
    _require_stored(info, url)
    header = bytes(read_at(info.header_offset, info.header_offset + 30))
    signature, name_bytes, extra_bytes = struct.unpack("<I22xHH", header)
    data_start = info.header_offset + 30 + name_bytes + extra_bytes
    descriptor_bytes = ends[info.filename] - data_start - info.file_size
    if (
        signature != 0x04034B50
        or name_bytes != len(info.orig_filename.encode())
        or descriptor_bytes not in _descriptor_sizes(info)
    ):
        raise FormatError(f"{url} has a damaged header before {info.filename}; fetch it anew", url=url)
    if storage.n_elements * itemsize != info.file_size:
        raise FormatError(
            f"{url} claims {storage.n_elements} elements in {info.filename}, which has {info.file_size} bytes", url=url
        )
    if not _fills_its_extent(tensor) or tensor.first + math.prod(tensor.shape) > storage.n_elements or tensor.first < 0:
        raise FormatError(
            f"{url} has a tensor of shape {tensor.shape} and strides {tensor.strides} that does not fill its storage; "
            "save it again with .contiguous()",
            url=url,
        )
    offset = data_start + tensor.first * itemsize
    return Layout(tensor.shape, storage.dtype, offset, tuple(stride * itemsize for stride in tensor.strides))


def _descriptor_sizes(info: zipfile.ZipInfo) -> tuple[int, ...]:
    """Tell how many bytes of checksum and sizes may follow a member's data: with 8-byte sizes in a large archive."""
    if not info.flag_bits & 8:
        return (0,)
    return (16, 24) if max(info.file_size, info.header_offset) >= 2**32 - 1 else (16,)


def _fills_its_extent(tensor: _Tensor) -> bool:
    """Tell whether the axes, in some order, are those of an array without holes."""
    if len(tensor.shape) != len(tensor.strides) or any(size < 0 for size in tensor.shape):
        return False
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.strides, strict=True), key=lambda axis: (axis[1], axis[0])):
        if size != 1:
            if stride != expected and math.prod(tensor.shape) > 0:
                return False
            expected *= size
    return True


_STORAGES = {
    ("torch", f"{name}Storage"): np.dtype(code)
    for name, code in {
        "Float": "<f4", "Double": "<f8", "Half": "<f2", "Long": "<i8", "Int": "<i4", "Short": "<i2",
        "Char": "i1", "Byte": "u1", "Bool": "?",
    }.items()
}  # fmt: skip
_REBUILD_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
_REBUILD_PARAMETER = ("torch._utils", "_rebuild_parameter")
_ORDERED_DICT = ("collections", "OrderedDict")
_KNOWN_GLOBALS = {*_STORAGES, _REBUILD_TENSOR, _REBUILD_PARAMETER, _ORDERED_DICT}
_CONSTANTS = {"EMPTY_TUPLE": (), "NEWTRUE": True, "NEWFALSE": False, "NONE": None}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _pickled_tensors(pickle: bytes, *, url: str) -> dict[str, _Tensor]:
    with _no_warnings():
        result = _PickleReader(url).read(pickle)
    if not isinstance(result, dict) or not result:
        raise FormatError(f"{url} holds {_kind(result)}; expected a dict of tensors", url=url)
    for name, value in result.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise FormatError(f"{url} holds {_kind(value)} under {name!r}; only tensors are read", url=url)
    return result


def _kind(value: object) -> str:
    return "a tensor" if isinstance(value, _Tensor) else f"a {type(value).__name__}"


class _PickleReader:
    """Understands the few pickle instructions that a dict of tensors needs; refuses every other one by name."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        # how deep each tuple nests; it is kept beside, so that its id stays its own
        self._depths: dict[int, tuple[int, tuple[Any, ...]]] = {id(()): (0, ())}

    def read(self, pickle: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(pickle):
            if opcode.name == "STOP":
                return self._stack.pop()
            self._run(opcode.name, argument)
        raise FormatError(f"{self._url} has a pickle that does not end", url=self._url)

    def _run(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in ("PROTO", "FRAME"):
            return
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name in _TUPLES:
            stack.append(self._tuple_of(self._pop_last(_TUPLES[name])))
        elif name == "TUPLE":
            stack.append(self._tuple_of(self._pop_to_mark()))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in ("SETITEM", "SETITEMS"):
            self._set_items(self._pop_last(2) if name == "SETITEM" else self._pop_to_mark())
        elif name == "GLOBAL":
            module, _, attribute = argument.partition(" ")
            stack.append(self._known_global(module, attribute))
        elif name == "STACK_GLOBAL":
            stack.append(self._known_global(*self._pop_last(2)))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name == "REDUCE":
            stack.append(self._call(*self._pop_last(2)))
        else:
            raise self._refuse(f"the pickle instruction {name}")

    def _refuse(self, what: str) -> FormatError:
        return FormatError(
            f"{self._url} holds {what}, which plain tensors do not need and which could run code; nothing was run",
            url=self._url,
        )

    def _pop_last(self, n: int) -> list[Any]:
        if len(self._stack) < n or (self._marks and len(self._stack) - n < self._marks[-1]):
            raise self._refuse("a pickle with too few values")
        values = self._stack[-n:]
        del self._stack[-n:]
        return values

    def _tuple_of(self, values: list[Any]) -> tuple[Any, ...]:
        """Make a tuple, unless it is larger than any tensor's description: comparing it could take for ever."""
        inside = max((self._depths.get(id(value), _FLAT)[0] for value in values if isinstance(value, tuple)), default=0)
        if len(values) > _MOST_DIMENSIONS or inside >= _DEEPEST_NESTING:
            raise self._refuse("long or deeply nested tuples")
        made = tuple(values)
        self._depths[id(made)] = (inside + 1, made)
        return made

    def _pop_to_mark(self) -> list[Any]:
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return values

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise self._refuse("items set on something else than a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise self._refuse(f"a dict with a key that is {_kind(key)}")
            target[key] = value

    def _known_global(self, module: object, attribute: object) -> tuple[str, str]:
        if not (isinstance(module, str) and isinstance(attribute, str)):
            raise self._refuse("a name that is no text")
        if (module, attribute) not in _KNOWN_GLOBALS:
            raise self._refuse(f"the name {module}.{attribute}"[:100])
        return module, attribute

    def _storage(self, reference: object) -> _Storage:
        match reference:
            case ("storage", (str() as module, str() as name), str() as key, str(), int() as n_elements):
                if (module, name) in _STORAGES:
                    return _Storage(_STORAGES[module, name], key, n_elements)
        raise self._refuse("a reference to something else than a storage of plain numbers")

    def _call(self, function: object, arguments: object) -> Any:
        match function, arguments:
            case (_, ()) if function == _ORDERED_DICT:
                return {}
            case (_, (_Tensor() as tensor, bool(), dict())) if function == _REBUILD_PARAMETER:
                return tensor
            case (_, (_Storage() as storage, int() as first, tuple() as shape, tuple() as strides, bool(), *_)) if (
                function == _REBUILD_TENSOR and all(type(n) is int for n in (*shape, *strides))
            ):
                return _Tensor(storage, first, shape, strides)
        raise self._refuse("a call that is not the building of a tensor")
