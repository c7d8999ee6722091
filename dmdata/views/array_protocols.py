"""What libraries and operators do to a lazy array besides indexing it: one planned read, or an error before a byte.

Functions called by name (``np.mean(lazy)``, ``torch.tensor(lazy)``, ``pandas.DataFrame(lazy)``) ask for the whole array
and get it by one planned read. Operators, comparisons, truth and iteration are refused with the remedy: they would read
everything, or a row at a time, for what looks free.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

_BINARY = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "matmul": "@",
    "truediv": "/",
    "floordiv": "//",
    "mod": "%",
    "pow": "**",
    "lshift": "<<",
    "rshift": ">>",
    "and": "&",
    "xor": "^",
    "or": "|",
}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNARY = {"neg": "-{}", "pos": "+{}", "invert": "~{}", "abs": "abs({})", "round": "round({})"}
_NUMBERS = ("int", "float", "complex")
# how other libraries' arrays and tables are asked for their values
_VALUES = frozenset({"numpy", "to_numpy", "values", "compute", "load"})


class ArrayProtocols:
    """Everything that is called on an array-like, in terms of its `shape`, `dtype`, ``[]`` and `oindex`."""

    __slots__ = ()

    # an operator of NumPy's, as in `ones * lazy`, hands over to the one here, which refuses; np.multiply does not
    __array_priority__ = 1e6

    if TYPE_CHECKING:
        name: str

        @property
        def shape(self) -> tuple[int, ...]: ...  # noqa: D102 - for the checker alone

        @property
        def dtype(self) -> np.dtype[Any]: ...  # noqa: D102 - for the checker alone

        @property
        def oindex(self) -> Any: ...  # noqa: D102 - for the checker alone

        def __getitem__(self, key: Any) -> npt.NDArray[Any]: ...

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError(f"{self.name} is not in memory, so it cannot be had without a copy; leave copy out")
        return self[...].astype(dtype, copy=False) if dtype is not None else self[...]

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # memory of the CPU

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Read the whole array once for ``torch.tensor`` and others, which would otherwise read it a row at a time.

        Raises
        ------
        BufferError
            If the consumer cannot take the dtype, device or copy that this is; nothing is read.
        """
        if copy is False or stream is not None:
            raise BufferError(f"{self.name} is not in memory, so it cannot be shared without a copy: use lazy[...]")
        native = self.dtype.newbyteorder("=")
        options: dict[str, Any] = {"max_version": max_version, "dl_device": dl_device}
        try:
            np.empty(0, native).__dlpack__(**options)
        except BufferError as error:
            raise BufferError(f"{self.name} of {self.dtype} cannot be exchanged ({error}); use lazy[...]") from error
        return np.require(self[...], native, ["C", "W"]).__dlpack__(**options)

    def __arrow_array__(self, type: Any = None) -> Any:  # noqa: A002 - by Arrow
        if len(self.shape) != 1:
            raise TypeError(f"{self.name} has shape {self.shape} and Arrow takes one dimension; select it: lazy[:, 0]")
        arrow = importlib.import_module("pyarrow")  # it is who calls
        return arrow.array(self[...], type=type)

    def __getitems__(self, indices: Sequence[int]) -> list[npt.NDArray[Any]]:
        """Read a batch for torch's DataLoader, which would otherwise read its examples one by one."""
        return list(self.oindex[np.asarray(indices, np.intp)])

    # identity, as for any object: what is cached or used as a key by libraries stays so although == is refused
    __hash__ = object.__hash__

    def __bool__(self) -> NoReturn:
        raise ValueError(
            f"the truth of {self.name} would need all of it; use lazy[...].any() or lazy[...].all(), or "
            "lazy is not None"
        )

    def __iter__(self) -> NoReturn:
        raise _refusal(self, "iterating over", "a request a row", "for row in lazy[0:100]")

    def __reversed__(self) -> NoReturn:
        raise _refusal(self, "iterating over", "a request a row", "lazy[::-1]")

    def __contains__(self, value: object) -> NoReturn:
        raise _refusal(self, "searching", "a request a row", f"{_shown(value)} in lazy[...]")

    def __setitem__(self, key: Any, value: Any) -> NoReturn:
        raise TypeError(f"{self.name} can only be read; change a copy: values = lazy[...]")

    if not TYPE_CHECKING:  # or every misspelt attribute would be one of type Any

        def __getattr__(self, name: str) -> Any:
            kind = type(self).__name__
            text = f"{kind!r} object has no attribute {name!r}"
            if name in _VALUES:
                text += "; read it as lazy[...], which is a NumPy array"
            elif hasattr(np.ndarray, name):
                call = "()" if callable(getattr(np.ndarray, name)) else ""
                text += f"; read what you need first: lazy[...].{name}{call}"
                text += "" if name.startswith("_") else f", or stay lazy: lazy.to_dask().{name}{call}"
            raise AttributeError(text, name=name, obj=self)


def _refusal(array: ArrayProtocols, doing: str, why: str, remedy: str) -> TypeError:
    return TypeError(f"{doing} {array.name} would be {why}, so it is refused; read what you need first: {remedy}")


def _shown(value: object) -> str:
    """Write an operand as it would be typed; anything but a number or short text as `other`."""
    is_short = isinstance(value, bool | int | float | complex | np.number | np.bool_)
    return str(value) if is_short else "other"


def _operator(name: str, form: str) -> Callable[..., NoReturn]:
    """Make a method that refuses an operator; `form` is how it is written, with {} for each operand."""

    def refuse(self: ArrayProtocols, *others: object) -> NoReturn:
        eager = form.format("lazy[...]", *map(_shown, others[:1]))
        raise _refusal(self, f"{form.format('lazy', *map(_shown, others[:1]))} for", "a read of all of it", eager)

    refuse.__name__ = refuse.__qualname__ = name
    return refuse


for _name, _sign in (_BINARY | _COMPARISONS).items():
    setattr(ArrayProtocols, f"__{_name}__", _operator(f"__{_name}__", f"{{0}} {_sign} {{1}}"))
for _name, _sign in _BINARY.items():
    setattr(ArrayProtocols, f"__r{_name}__", _operator(f"__r{_name}__", f"{{1}} {_sign} {{0}}"))
for _name, _form in _UNARY.items():
    setattr(ArrayProtocols, f"__{_name}__", _operator(f"__{_name}__", _form.replace("{}", "{0}")))
for _name in _NUMBERS:
    setattr(ArrayProtocols, f"__{_name}__", _operator(f"__{_name}__", f"{_name}({{0}})"))
for _name in ("divmod", "rdivmod"):
    _form = "divmod({0}, {1})" if _name == "divmod" else "divmod({1}, {0})"
    setattr(ArrayProtocols, f"__{_name}__", _operator(f"__{_name}__", _form))
