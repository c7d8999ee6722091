"""A release small enough for tests: a few arrays, the objects that hold them, and the catalog that lists them."""

import io
import math
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from servers.loopback import BUCKET, LoopbackS3

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Pt:
    """A ``.pt`` as bytes, and the arrays inside it."""

    content: bytes
    members: Mapping[str, Array]


Release = Mapping[str, Array | Pt]


def npy(values: npt.ArrayLike) -> bytes:
    """Write an array as np.save does."""
    buffer = io.BytesIO()
    np.save(buffer, np.asanyarray(values))
    return buffer.getvalue()


def pt(members: Mapping[str, Array], *, storage: str = "Float") -> bytes:
    """Write arrays as torch.save does a dict of tensors, without torch."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pt_pickle({name: array.shape for name, array in members.items()}, storage))
        archive.writestr("archive/byteorder", "little")
        for nth, array in enumerate(members.values()):
            archive.writestr(f"archive/data/{nth}", np.ascontiguousarray(array).tobytes())
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def pt_pickle(shapes: Mapping[str, tuple[int, ...]], storage: str = "Float") -> bytes:
    """Write the pickle inside a ``.pt``: each tensor a storage of its own, named by its number."""

    def text(value: str) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little")

    def numbers(values: Iterable[int]) -> bytes:
        return b"(" + b"".join(number(value) for value in values) + b"t"

    parts = [b"\x80\x02}q\x00("]
    for nth, (name, shape) in enumerate(shapes.items()):
        parts += [text(name), b"ctorch._utils\n_rebuild_tensor_v2\nq\x01((", text("storage")]
        parts += [f"ctorch\n{storage}Storage\n".encode(), text(str(nth)), text("cpu"), number(math.prod(shape)), b"tQ"]
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        parts += [b"K\x00", numbers(shape), numbers(strides), b"\x89ccollections\nOrderedDict\n)RtR"]
    return b"".join([*parts, b"u."])


def key_of(name: str, stored: Array | Pt) -> str:
    """Name the object of ``dataset/alpha/array``."""
    dataset, alpha, array = name.split("/")
    folder, suffix = ("datamodels", "pt") if isinstance(stored, Pt) else ("data", "npy")
    return f"{dataset}/{folder}/{array}_{alpha}.{suffix}"


def document(release: Release, *, url: str, requester_pays: bool) -> dict[str, Any]:
    """Describe a release as the document of its catalog."""
    datasets: dict[str, Any] = {}
    for name, stored in release.items():
        dataset, alpha, array = name.split("/")
        entry = datasets.setdefault(dataset, _dataset())
        arrays = entry["alphas"].setdefault(alpha, _alpha(alpha))["arrays"]
        arrays[array] = {"key": key_of(name, stored), **_facts(stored)}
        arrays[array]["basis"] = dict.fromkeys(set(arrays[array]) - {"members"}, "measured")
    source = {"url": url, "requester_pays": requester_pays}
    source["basis"] = dict.fromkeys(source, "measured")
    return {"version": 1, "title": "a small release", "source": source, "datasets": datasets}


def publish(s3: LoopbackS3, release: Release, folder: Path, **claims: Any) -> str:
    """Put a release on the server; returns the path of its catalog, in which `claims` replace facts of each array."""
    for name, stored in release.items():
        s3.put(key_of(name, stored), stored.content if isinstance(stored, Pt) else npy(stored))
    about = document(release, url=f"s3://{BUCKET}", requester_pays=True)
    return write_catalog(about, folder, **claims)


def write_locally(release: Release, folder: Path) -> str:
    """Write a release below a folder, with its catalog; returns the catalog's path."""
    for name, stored in release.items():
        path = folder / key_of(name, stored)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(stored.content if isinstance(stored, Pt) else npy(stored))
    return write_catalog(document(release, url=".", requester_pays=False), folder)


def write_catalog(about: dict[str, Any], folder: Path, **claims: Any) -> str:
    """Write a catalog's document into a folder; returns its path."""
    for dataset in about["datasets"].values():
        for alpha in dataset["alphas"].values():
            for entry in alpha["arrays"].values():
                entry.update(claims)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "catalog.yaml"
    path.write_text(yaml.safe_dump(about, sort_keys=False))
    return str(path)


def _dataset() -> dict[str, Any]:
    facts = {"title": "a toy", "n_train": 1, "n_test": 1, "example_order": "as they came"}
    return {**facts, "basis": dict.fromkeys(facts, "measured"), "alphas": {}}


def _alpha(name: str) -> dict[str, Any]:
    facts = {"alpha": int(name.removesuffix("pct")) / 100, "rows": {"fit": [0, 1], "evaluation": [1, 2]}}
    return {**facts, "basis": dict.fromkeys(facts, "measured"), "arrays": {}}


def _facts(stored: Array | Pt) -> dict[str, Any]:
    if isinstance(stored, Pt):
        return {
            "format": "pt",
            "n_bytes": len(stored.content),
            "members": {name: _schema(array) for name, array in stored.members.items()},
        }
    return {"format": "npy", **_schema(stored), "n_bytes": len(npy(stored))}


def _schema(array: Array) -> dict[str, Any]:
    dims = ["model", "example", "class"][: array.ndim]
    return {"shape": list(array.shape), "dtype": str(array.dtype), "dims": dims}
