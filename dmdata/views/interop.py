"""Lazy arrays for dask, xarray and torch's DataLoader, reading through the same budgeted transport.

All are optional: nothing here imports dask or xarray until it is called, and torch is never imported.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dmdata.copying.mirror import Readable
from dmdata.errors import DmdataError, SelectionError
from dmdata.layout.selection import Indices, select

if TYPE_CHECKING:
    import dask.array
    import xarray

_BLOCK_BYTES = 64 << 20


def block_shape(array: Readable) -> tuple[int, ...]:
    """Choose blocks of whole rows of about 64 MiB, which is how the bytes lie; of columns, in Fortran order."""
    sizes = list(array.shape)
    if sizes:
        axis = array.slowest_axis
        slab_bytes = array.dtype.itemsize
        for other, size in enumerate(sizes):
            slab_bytes *= size if other != axis else 1
        sizes[axis] = min(max(_BLOCK_BYTES // max(slab_bytes, 1), 1), sizes[axis])
    return tuple(sizes)


def to_dask(array: Readable, chunks: Any = None) -> "dask.array.Array":
    """Wrap a lazy array as a dask array.

    Parameters
    ----------
    array : LazyArray
    chunks : anything dask takes, optional
        By default blocks of whole rows of about 64 MiB, which is how the bytes lie.

    Raises
    ------
    DmdataError
        If dask is not installed.
    """
    try:
        import dask.array
    except ImportError as error:
        raise DmdataError("dask is not installed; pip install 'dmdata[dask]'") from error
    if chunks is None:
        chunks = block_shape(array)
    meta = np.empty((0,) * len(array.shape), array.dtype)
    lazy: dask.array.Array = dask.array.from_array(  # type: ignore[no-untyped-call] # dask ships partial types
        array, chunks=chunks, meta=meta, name=False, asarray=False, inline_array=True
    )
    return lazy


def to_xarray(array: Readable, chunks: Any = None) -> "xarray.DataArray":
    """Wrap a lazy array as an xarray DataArray over dask, with its dimensions named.

    Raises
    ------
    DmdataError
        If xarray or dask is not installed.
    """
    try:
        import xarray
    except ImportError as error:
        raise DmdataError("xarray is not installed; pip install 'dmdata[xarray]'") from error
    return xarray.DataArray(to_dask(array, chunks), dims=array.dims, name=array.name)


def torch_dataset(
    masks: Readable,
    outputs: Readable,
    *,
    batch_rows: int = 256,
    rows: Any = slice(None),
    columns: Any = slice(None),
    seed: int | None = None,
) -> "Batches":
    """Make batches of (mask, output) for torch's DataLoader; imports no torch.

    Parameters
    ----------
    masks : LazyArray of bool, shape (n_models, n_train)
    outputs : LazyArray, shape (n_models, n_targets) or (n_models, n_targets, n_classes)
        Of the same models.
    batch_rows : int
        Models of a batch; the last may have fewer.
    rows : slice or index array
        Models to draw batches from.
    columns : slice or index array
        Targets to read.
    seed : int, optional
        Shuffles the batches, and the models within each. Neighbouring models stay in one batch, which is what makes
        a batch a cheap read; they were trained on independent subsets, so that the batch is a random one.

    Returns
    -------
    batches : Batches
        For ``DataLoader(batches, batch_size=None, num_workers=...)``.

    Raises
    ------
    SelectionError
        If the arrays are not of the same models, or there is no such row or column.
    """
    if not masks.shape or not outputs.shape or masks.shape[0] != outputs.shape[0]:
        raise SelectionError(
            f"{masks.name} has shape {masks.shape} and {outputs.name} {outputs.shape}; they need rows of the same "
            "models, as cifar/50pct/train_masks and cifar/50pct/test_margins",
            shape=masks.shape,
        )
    if batch_rows < 1:
        raise SelectionError(f"a batch of {batch_rows} rows holds nothing; use 1 or more", shape=masks.shape)
    selected = select(rows, masks.shape, orthogonal=True)
    select((slice(None), columns) if len(outputs.shape) > 1 else ..., outputs.shape, orthogonal=True)
    return Batches(masks, outputs, np.asarray(selected.axes[0], np.int64), columns, batch_rows, seed)


class Batches:
    """Batches of (mask, output), read when asked for; made by `torch_dataset`.

    A map-style dataset whose items are whole batches: DataLoader deals them out to its workers, which then read each
    its own, and a ``DistributedSampler`` does so across machines. It needs no base class of torch's, which is why this
    package needs no torch. It pickles without credentials, so that workers may fork or spawn.
    """

    def __init__(
        self, masks: Readable, outputs: Readable, rows: Indices, columns: Any, batch_rows: int, seed: int | None
    ) -> None:
        self.masks = masks
        self.outputs = outputs
        self.rows = rows
        self.columns = columns
        self.batch_rows = batch_rows
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_rows)

    def __iter__(self) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        return (self[batch] for batch in range(len(self)))

    def __getitem__(self, batch: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Read a batch.

        Returns
        -------
        masks : array of bool, shape (n_rows, n_train)
        outputs : array, shape (n_rows, n_targets, ...)
            Of the stored dtype, in this machine's byte order.

        Raises
        ------
        IndexError
            If there are fewer.
        BudgetError, IntegrityError, AccessError, SourceError
        """
        rows = self.rows_of(batch)
        targets = (rows, self.columns) if len(self.outputs.shape) > 1 else (rows,)
        return _read(self.masks, (rows,)), _read(self.outputs, targets)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle again, for the epochs of workers started from now on."""
        self.epoch = epoch

    def rows_of(self, batch: int) -> Indices:
        """List the models of a batch in its order, without reading it."""
        if not 0 <= batch < len(self):
            raise IndexError(f"batch {batch} of {len(self)}")
        if self.seed is not None:
            batch = int(np.random.default_rng([self.seed, self.epoch]).permutation(len(self))[batch])
        rows = self.rows[batch * self.batch_rows : (batch + 1) * self.batch_rows]
        if self.seed is not None:
            rows = np.random.default_rng([self.seed, self.epoch, batch]).permutation(rows)
        return rows


def _read(array: Readable, key: tuple[Any, ...]) -> npt.NDArray[Any]:
    """Read what torch can wrap without a copy: native byte order, no negative strides."""
    read = array.read(select(key, array.shape, orthogonal=True))
    return np.ascontiguousarray(read, read.dtype.newbyteorder("="))
