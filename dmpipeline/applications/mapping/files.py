"""Embeddings as files for other programs: Parquet, which embedding-atlas shows as a map, and Zarr, with everything.

Both are written next to their place and moved there, so that a file is whole or not there.
"""

import importlib.util
import io
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dmdata.atomic import replacing
from dmpipeline.applications.mapping.embeddings import Embedding
from dmpipeline.data.examples import Dataset
from dmpipeline.errors import RunError, SpecError, explain_os_errors

_ROWS = 1_000
"""Examples in memory at a time, with their pictures."""

_MOST_FEATURES = 64
"""Columns of a table of inputs that are written with the examples; wider tables are left out."""


def check_places(parquet: str | os.PathLike[str] | None, zarr: str | os.PathLike[str] | None) -> None:
    """Refuse places that could not be written, before anything is read or paid.

    Raises
    ------
    SpecError
        For another kind of file, or where a folder is there already.
    RunError
        If pyarrow is needed and not installed.
    """
    if parquet is not None:
        if Path(parquet).suffix != ".parquet":
            raise SpecError(f"{parquet} is no .parquet; name one", path=parquet)
        if importlib.util.find_spec("pyarrow") is None:
            raise RunError(
                "pyarrow is not installed, by which Parquet is written; `pip install 'dmdata[atlas]'`, or save Zarr",
                module="pyarrow",
            )
    if zarr is not None and Path(zarr).exists():
        raise SpecError(f"{zarr} is there already; choose another path, or remove it", path=zarr)


def save_parquet(embedding: Embedding, path: str | os.PathLike[str]) -> Path:
    """Write the map with its examples as embedding-atlas reads it; the file is replaced if it is there.

    Show it by ``embedding-atlas FILE --x x --y y --neighbors neighbors``. It needs pyarrow, of the extra `atlas`.

    Parameters
    ----------
    embedding : Embedding
    path : path
        Of a ``.parquet``.

    Returns
    -------
    path : pathlib.Path

    Raises
    ------
    SpecError
        For another kind of file.
    RunError
        If pyarrow is not installed, or the file cannot be written.

    Notes
    -----
    A row is an example: `index` (int64), `x` and `y` (float32), `label` (text, or double in a regression) where it is
    known, and `neighbors`, a struct of `ids` (rows of the file, from 0) and `distances` (1 less the cosine), nearest
    first. Where the dataset is known its inputs follow: `image`, a struct with the `bytes` of a PNG; `text`, the tokens
    of a sequence; or the features of a table of at most 64, by name. The form is that of embedding-atlas 0.26
    (`embedding_atlas.widget`, argument `neighbors`, and `embedding_atlas.projection`).
    """
    path = Path(path)
    check_places(path, None)
    import pyarrow as pa  # optional, and slow to import
    import pyarrow.parquet as pq

    dataset = None if embedding.evidence.run is None else embedding.evidence.dataset()
    schema = _schema(embedding, dataset)
    with explain_os_errors(path), replacing(path) as partial, pq.ParquetWriter(partial, schema) as writer:
        for start in range(0, len(embedding.indices), _ROWS):
            rows = slice(start, min(start + _ROWS, len(embedding.indices)))
            columns = _own_columns(embedding, rows) | _input_columns(embedding, dataset, rows)
            writer.write_table(pa.table({name: columns[name] for name in schema.names}, schema=schema))
    return path


def save_zarr(embedding: Embedding, path: str | os.PathLike[str]) -> Path:
    """Write all arrays of an embedding as a Zarr group of version 3.

    Parameters
    ----------
    embedding : Embedding
    path : path
        Of a folder that is not there yet.

    Returns
    -------
    path : pathlib.Path

    Raises
    ------
    SpecError
        If something is there.
    RunError
        If it cannot be written.

    Notes
    -----
    Arrays are called as the fields of `Embedding`: `indices`, `features`, `scores`, `directions` (its `loadings`),
    `explained_shares`, `x`, `y`, `neighbours` (rows of the other arrays), `similarities`, and `labels` where they are
    known. Attributes say what is embedded, the map and the seed, and name the classes.
    """
    import zarr  # slow to import

    path = Path(path)
    check_places(None, path)
    arrays: dict[str, npt.NDArray[Any]] = {
        "indices": embedding.indices,
        "features": embedding.features,
        "scores": embedding.scores,
        "directions": embedding.loadings,
        "explained_shares": np.array([row.explained_share for row in embedding]),
        "x": embedding.x,
        "y": embedding.y,
        "neighbours": embedding.neighbours,
        "similarities": embedding.similarities,
    }
    if embedding.labels is not None:
        arrays["labels"] = np.asarray(embedding.labels)
    facts = embedding.facts() | {"datamodels": embedding.evidence.name}
    if embedding.class_names is not None:
        facts["class_names"] = list(embedding.class_names)
    staging = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    with explain_os_errors(path):
        try:
            group = zarr.open_group(staging, mode="w", zarr_format=3, attributes=facts)
            for name, array in arrays.items():
                group.create_array(name, data=np.ascontiguousarray(array))
            os.rename(staging, path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return path


def _schema(embedding: Embedding, dataset: Dataset | None) -> Any:
    import pyarrow as pa

    fields = [
        ("index", pa.int64()),
        ("x", pa.float32()),
        ("y", pa.float32()),
        ("neighbors", pa.struct([("ids", pa.list_(pa.int64())), ("distances", pa.list_(pa.float32()))])),
    ]
    if embedding.labels is not None:
        fields.append(("label", pa.float64() if embedding.labels.dtype.kind == "f" else pa.string()))
    if dataset is None:
        return pa.schema(fields)
    if dataset.image_shape is not None:
        fields.append(("image", pa.struct([("bytes", pa.binary())])))
    elif dataset.train_inputs.dtype.kind == "i":
        fields.append(("text", pa.string()))
    else:
        taken = [name for name, _ in fields]
        fields += [(name, pa.float32()) for name in _feature_names(dataset, taken)]
    return pa.schema(fields)


def _own_columns(embedding: Embedding, rows: slice) -> dict[str, Any]:
    """Return what the embedding knows of some examples, by column."""
    pairs = zip(embedding.neighbours[rows].tolist(), (1 - embedding.similarities[rows]).tolist(), strict=True)
    columns: dict[str, Any] = {
        "index": embedding.indices[rows],
        "x": embedding.x[rows],
        "y": embedding.y[rows],
        "neighbors": [{"ids": ids, "distances": distances} for ids, distances in pairs],
    }
    if embedding.labels is not None:
        labels = [embedding.label(row) for row in range(rows.start, rows.stop)]
        columns["label"] = labels if embedding.labels.dtype.kind == "f" else list(map(str, labels))
    return columns


def _input_columns(embedding: Embedding, dataset: Dataset | None, rows: slice) -> dict[str, Any]:
    """Return the inputs of some examples, by column."""
    if dataset is None:
        return {}
    whole = dataset.train_inputs if embedding.part == "train" else dataset.test_inputs
    inputs = np.asarray(whole[embedding.indices[rows]])
    if dataset.image_shape is not None:
        pictures = _as_pixels(inputs.reshape(len(inputs), *dataset.image_shape))
        return {"image": [{"bytes": _png(picture)} for picture in pictures]}
    if inputs.dtype.kind == "i":
        return {"text": [" ".join(map(str, tokens)) for tokens in inputs.tolist()]}
    taken = ["index", "x", "y", "neighbors"] + ([] if embedding.labels is None else ["label"])
    names = _feature_names(dataset, taken)
    return dict(zip(names, inputs.reshape(len(inputs), -1).T.astype(np.float32), strict=False))


def _feature_names(dataset: Dataset, taken: list[str]) -> list[str]:
    """Name the columns of a table of inputs; with an underscore where one is called as a column of ours."""
    if dataset.n_features > _MOST_FEATURES:
        return []
    names = dataset.feature_names or tuple(f"feature_{place}" for place in range(dataset.n_features))
    return [f"{name}_" if name in taken else name for name in names]


def _as_pixels(pictures: npt.NDArray[Any]) -> Iterator[npt.NDArray[np.uint8]]:
    """Make bytes of pictures: of floats from 0 to 1 as of 255 steps, of others between their own least and largest."""
    for picture in pictures:
        if picture.dtype == np.uint8:
            yield picture
            continue
        low, high = float(picture.min()), float(picture.max())
        if low >= 0 and high <= 1:
            low, high = 0.0, 1.0
        yield np.rint((picture - low) * (255 / (high - low or 1.0))).astype(np.uint8)


def _png(picture: npt.NDArray[np.uint8]) -> bytes:
    from PIL import Image  # slow to import

    buffer = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[2:] == (1,) else picture).save(buffer, format="PNG")
    return buffer.getvalue()
