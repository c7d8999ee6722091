"""The formats that are read, and how the end of a path names one."""

from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["npy", "npz", "pt", "safetensors"]

NPY = ""
"""Name of the one array of a ``.npy``, or of a lone tensor."""

_SUFFIXES: dict[str, Kind] = {".npy": "npy", ".npz": "npz", ".pt": "pt", ".pth": "pt", ".safetensors": "safetensors"}


def kind_by_suffix(path: str) -> Kind | None:
    """Recognize a format by the end of a path, in capitals or not; None where it has none of those known."""
    return next((kind for suffix, kind in _SUFFIXES.items() if path.lower().endswith(suffix)), None)


def without_suffix(name: str) -> str:
    """Leave out the end of a name that tells its format; what else follows a point is part of the name."""
    suffix = next((suffix for suffix in (*_SUFFIXES, ".zarr") if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)] or name
