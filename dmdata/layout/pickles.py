"""The tensors that a pickle inside a ``.pt`` describes, read without unpickling: nothing is imported, nothing is run.

The reader understands the instructions and the few names that torch writes for tensors, and for the numbers, texts,
lists and dicts in which people keep them. What stands next to tensors is kept by its kind alone. A name it does not
know could be that of any program, so it refuses the whole file. What a hostile pickle could blow up is bounded: its
instructions, the paths to its values and their depth; no value of it is compared or hashed but numbers and text.
"""

import math
import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from dmdata.errors import FormatError
from dmdata.layout.layouts import ENCODINGS
from dmdata.layout.npy import no_warnings

_MOST_INSTRUCTIONS = 4_000_000
_MOST_PATHS = 1_000_000
_DEEPEST_PATH = 100
_LONGEST_NUMBER = 1 << 64


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a pickle describes it.

    Attributes
    ----------
    dtype : numpy.dtype
        As which an element is stored.
    encoding : str
        See `dmdata.layout.layouts.Layout`.
    key : str
        Names its storage, a member of the archive.
    n_stored : int
        Bytes of the storage.
    first : int
        Elements of the storage before its own.
    shape, strides : tuple of int
        In elements.
    """

    dtype: np.dtype[Any]
    encoding: str
    key: str
    n_stored: int
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A tensor that is not read, and why, as the end of a sentence that begins with its name."""

    why: str


Found: TypeAlias = StoredTensor | Unreadable


@dataclass(frozen=True, slots=True)
class _Name:
    """A name that the pickle would import."""

    module: str
    attribute: str

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute}"


@dataclass(frozen=True, slots=True)
class _Other:
    """A value that is not a tensor and holds none: of it only the kind is known."""

    kind: str


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str | None
    key: str
    size: int


_STORAGE_DTYPES = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
    "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexFloat": "complex64",
    "ComplexDouble": "complex128", "QInt8": "qint8", "QUInt8": "quint8", "QInt32": "qint32", "QUInt4x2": "quint4x2",
    "QUInt2x4": "quint2x4",
}  # fmt: skip
_STORAGES = {f"torch.{name}Storage": dtype for name, dtype in _STORAGE_DTYPES.items()}
_UNTYPED = "torch.storage.UntypedStorage"
_PLAIN = {
    "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64",
    "complex64", "complex128",
}  # fmt: skip
_OTHER_DTYPES = (
    "qint8 quint8 qint32 quint4x2 quint2x4 float4_e2m1fn_x2 bit bits16 bits1x8 bits2x4 bits4x2 bits8 int1 int2 int3 "
    "int4 int5 int6 int7 uint1 uint2 uint3 uint4 uint5 uint6 uint7"
)
_DTYPES = {f"torch.{name}": name for name in [*_PLAIN, *ENCODINGS, *_OTHER_DTYPES.split()]}
_NOT_PLAIN = {
    "torch._utils._rebuild_sparse_tensor": "is sparse; save its .to_dense()",
    "torch._utils._rebuild_sparse_csr_tensor": "is sparse; save its .to_dense()",
    "torch._utils._rebuild_qtensor": "is quantized; save its .dequantize()",
    "torch._utils._rebuild_nested_tensor": "is nested; save its .unbind()",
    "torch._utils._rebuild_meta_tensor_no_storage": "is on the meta device and has no elements; save it after loading",
    "torch._utils._rebuild_device_tensor_from_numpy": "is of a device's own form; save its .cpu()",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "is of a device's own form; save its .cpu()",
    "torch._utils._rebuild_wrapper_subclass": "is of a class of its own; save it as a plain tensor",
}
_PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
_TENSOR_CLASSES = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
_DICTS = {"collections.OrderedDict", "collections.Counter", "collections.defaultdict"}
_BUILTINS = ("dict", "list", "set", "frozenset", "int", "float", "complex", "bytearray")
# plain values that stand next to tensors in what people save; each is known here by its kind alone
_HARMLESS = {
    "torch.Size", "torch.device", "torch.serialization._get_layout", "torch.per_tensor_affine",
    "torch.per_channel_affine", "torch.strided", "torch.contiguous_format", "torch.channels_last",
    "torch.preserve_format", "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
    "numpy._core.numeric._frombuffer", "numpy.core.numeric._frombuffer", "_codecs.encode", "datetime.datetime",
    "datetime.date", "datetime.timedelta",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in _BUILTINS),
}  # fmt: skip
_BUILDERS = {
    "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3",
    "torch._tensor._rebuild_from_type_v2",
}  # fmt: skip
_KNOWN = {
    *_STORAGES, _UNTYPED, *_DTYPES, *_NOT_PLAIN, *_PARAMETERS, *_TENSOR_CLASSES, *_DICTS, *_HARMLESS, *_BUILDERS,
}  # fmt: skip

_CONSTANTS = {"NEWTRUE": True, "NEWFALSE": False, "NONE": None}
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "BINSTRING", "SHORT_BINSTRING"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def pickled_tensors(pickle: bytes, *, url: str) -> dict[str, Found]:
    """List the tensors that a pickle holds, by their paths: keys and positions, joined by "/"; "" for a lone tensor.

    Parameters
    ----------
    pickle : bytes
    url : str
        Names the object in errors.

    Returns
    -------
    tensors : dict of str to StoredTensor or Unreadable
        In the order of the pickle.

    Raises
    ------
    FormatError
        If the pickle is damaged, names anything but what tensors and plain values need, or holds no tensor.
    LookupError, ValueError, ...
        As `dmdata.layout.archives.DAMAGED_ZIP`, if it is damaged.
    """
    with no_warnings():
        value = _PickleReader(url).read(pickle)
    found: dict[str, Found] = {}
    for path, tensor in _tensors(value, url):
        found[path] = Unreadable("is one of two that have this path; rename a key") if path in found else tensor
    if not found:
        raise FormatError(f"{url} holds {_kind(value)}{_inside(value)}; expected tensors, alone or in dicts", url=url)
    return found


def _tensors(value: Any, url: str) -> Iterator[tuple[str, Found]]:
    """Walk through containers; the same one may be met by several paths, and in a hostile pickle by any number."""
    n_paths = 0
    left: list[tuple[str, Any, int]] = [("", value, 0)]
    while left:
        path, value, depth = left.pop()
        n_paths += 1
        if n_paths > _MOST_PATHS or depth > _DEEPEST_PATH:
            raise FormatError(f"{url} nests too deeply, or too often, to be plain dicts of tensors", url=url)
        if isinstance(value, StoredTensor | Unreadable):
            yield path, value
        elif isinstance(value, dict | list | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            # numbers and texts are most of some files, and lead nowhere
            inner = [(key, part) for key, part in items if not isinstance(part, str | int | float | None)]
            left += [(f"{path}/{key}" if path else str(key), part, depth + 1) for key, part in reversed(inner)]


def _kind(value: object) -> str:
    match value:
        case StoredTensor() | Unreadable():
            return "a tensor"
        case _Other(kind):
            return f"a {kind}"
        case _Name():
            return f"the name {value}"[:100]
        case None:
            return "None"
    return f"a {type(value).__name__.strip('_')}"


def _inside(value: object) -> str:
    """State what else a container holds, by the kinds of its first few values."""
    parts = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    kinds = dict.fromkeys(_kind(part) for part in parts[:20])
    return f" of {', '.join(list(kinds)[:3])}" if kinds else ""


class _PickleReader:
    """Understands the few pickle instructions that tensors and plain values need; refuses every other one by name."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def read(self, pickle: bytes) -> Any:
        for nth, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
            if opcode.name == "STOP":
                return self._stack.pop()
            if nth >= _MOST_INSTRUCTIONS:
                break
            self._run(opcode.name, argument)
        raise self._refuse(f"a pickle that does not end within {_MOST_INSTRUCTIONS:,} instructions")

    def _run(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            stack.append(tuple(self._pop_last(_TUPLES[name])))
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(self._pop_to_mark()))
        elif name == "GLOBAL":
            module, _, attribute = argument.partition(" ")
            stack.append(self._known_name(module, attribute))
        elif name == "STACK_GLOBAL":
            stack.append(self._known_name(*self._pop_last(2)))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(self._call(*self._pop_last(2)))
        else:
            self._run_containers(name)

    def _run_containers(self, name: str) -> None:
        stack = self._stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_SET":
                stack.append(_Other("set"))
            case "LIST":
                stack.append(self._pop_to_mark())
            case "FROZENSET":
                self._pop_to_mark()
                stack.append(_Other("frozenset"))
            case "DICT":
                items = self._pop_to_mark()
                stack.append({})
                self._set_items(items)
            case "SETITEM" | "SETITEMS":
                self._set_items(self._pop_last(2) if name == "SETITEM" else self._pop_to_mark())
            case "APPEND" | "APPENDS" | "ADDITEMS":
                self._add(self._pop_last(1) if name == "APPEND" else self._pop_to_mark())
            case "BUILD":
                self._pop_last(1)
                if not isinstance(stack[-1], dict | StoredTensor | Unreadable | _Other):
                    raise self._refuse(f"a state for {_kind(stack[-1])}")
            case "POP":
                self._pop_last(1)
            case "POP_MARK":
                self._pop_to_mark()
            case _ if name in _BYTES:
                stack.append(_Other("bytes"))
            case _:
                raise self._danger(f"the pickle instruction {name}")

    def _refuse(self, what: str) -> FormatError:
        return FormatError(f"{self._url} holds {what}, which torch does not write for tensors; it is damaged",
                           url=self._url)  # fmt: skip

    def _danger(self, what: str) -> FormatError:
        return FormatError(
            f"{self._url} holds {what}, which tensors do not need and which could run code; nothing was run. If it is "
            "a model that you trust, load it in torch and save its state_dict() instead",
            url=self._url,
        )

    def _pop_last(self, n: int) -> list[Any]:
        if len(self._stack) < n or (self._marks and len(self._stack) - n < self._marks[-1]):
            raise self._refuse("a pickle with too few values")
        values = self._stack[-n:]
        del self._stack[-n:]
        return values

    def _pop_to_mark(self) -> list[Any]:
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return values

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if len(items) % 2:
            raise self._refuse("a key without a value")
        if isinstance(target, _Other):
            return
        if not isinstance(target, dict):
            raise self._refuse(f"items set on {_kind(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self._key(key, len(target))] = value

    def _key(self, key: object, nth: int) -> str | int | float:
        """Make a key of a path; others than numbers and text are named by their position, for they may be huge."""
        if key is None:
            return "None"
        if isinstance(key, str) or (isinstance(key, int | float) and not abs(key) >= _LONGEST_NUMBER):
            return str(key) if isinstance(key, bool) or key != key else key
        return f"[{nth}]"

    def _add(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target += items
        elif not isinstance(target, _Other):
            raise self._refuse(f"values added to {_kind(target)}")

    def _known_name(self, module: object, attribute: object) -> _Name:
        if not (isinstance(module, str) and isinstance(attribute, str)):
            raise self._refuse("a name that is not text")
        name = _Name(module, attribute)
        if str(name) not in _KNOWN:
            raise self._danger(f"the name {name}"[:100])
        return name

    def _storage(self, reference: object) -> _Storage:
        match reference:
            case (str() as what, _Name() as kind, str() as key, str(), int() as size) if what == "storage":
                if str(kind) in _STORAGES:
                    return _Storage(_STORAGES[str(kind)], key, size)
                if str(kind) == _UNTYPED:
                    return _Storage(None, key, size)
        raise self._refuse("a reference to something other than a storage of numbers")

    def _call(self, function: object, arguments: object) -> Any:
        if not isinstance(arguments, tuple):
            raise self._refuse("a call without arguments")
        if isinstance(function, _Name):
            name = str(function)
            if name in _NOT_PLAIN:
                return Unreadable(_NOT_PLAIN[name])
            if name in _BUILDERS:
                return self._tensor(name, arguments)
            if name in _PARAMETERS and arguments and isinstance(arguments[0], StoredTensor | Unreadable):
                return arguments[0]
            if name in _DICTS:
                return self._dict(arguments)
            if name == "torch.Size" and len(arguments) == 1 and isinstance(arguments[0], tuple):
                return arguments[0]
            if name in _HARMLESS:
                return _Other(name)
        raise self._refuse(f"a call of {_kind(function)}")

    def _dict(self, arguments: tuple[Any, ...]) -> dict[Any, Any]:
        match arguments:
            case () | (None,) | (_Name(),):
                return {}
            case (dict() as items,) | (_Name() | None, dict() as items):
                return items
        raise self._refuse("a dict made of something other than a dict")

    def _tensor(self, name: str, arguments: tuple[Any, ...]) -> Found:
        if name == "torch._tensor._rebuild_from_type_v2":
            match arguments:
                case (_Name() as function, _Name() as kind, tuple() as inner, _) if str(
                    kind
                ) in _TENSOR_CLASSES and str(function) in _BUILDERS - {name}:
                    return self._tensor(str(function), inner)
            raise self._refuse("a tensor of a class of its own")
        match arguments:
            case (_Storage() as storage, int() as first, tuple() as shape, tuple() as strides, *others):
                pass
            case _:
                raise self._refuse("a call that is not the building of a tensor")
        if not all(type(n) is int and abs(n) < _LONGEST_NUMBER for n in (first, storage.size, *shape, *strides)):
            raise self._refuse("a tensor whose sizes are not numbers")
        dtype, metadata = storage.dtype, others[2:3]
        if name.endswith("_v3"):
            if len(others) < 3 or not isinstance(others[2], _Name):
                raise self._refuse("a tensor without a dtype")
            dtype, metadata = _DTYPES.get(str(others[2])), others[3:4]
        if metadata and metadata[0] is not None and not (isinstance(metadata[0], dict) and not any(
            value is True for value in metadata[0].values()
        )):  # fmt: skip
            return Unreadable("is a conjugate or negative view; save its .resolve_conj().resolve_neg()")
        if dtype not in _PLAIN and dtype not in ENCODINGS:
            return Unreadable(f"is of dtype {dtype}, which is not read; save it as one of plain numbers")
        encoding = dtype if dtype in ENCODINGS else ""
        stored = ENCODINGS[encoding].stored_dtype if encoding else np.dtype(dtype).newbyteorder("<")
        n_stored = storage.size * (1 if storage.dtype is None else stored.itemsize)
        return StoredTensor(stored, encoding, storage.key, n_stored, first, shape, strides)


def fills_its_extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether axes of these sizes and strides, in elements, are in some order those of an array without holes."""
    if len(shape) != len(strides) or any(size < 0 for size in shape):
        return False
    expected = 1
    for size, stride in sorted(zip(shape, strides, strict=True), key=lambda axis: (axis[1], axis[0])):
        if size != 1:
            if stride != expected and math.prod(shape) > 0:
                return False
            expected *= size
    return True
