"""Random draws by counter: the numbers a model is made from, given only the seed, their purpose and an index.

There is no state to carry along: any row can be drawn by any worker, in any order, any number of times, and is always
the same. The bits are those of Philox 4x64 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011), keyed by
seed and purpose, at a counter of the index's own. Only raw bits are used, never NumPy's distributions, whose streams
may change between its versions.
"""

import hashlib
from collections.abc import Iterable
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from dmpipeline.errors import SpecError
from dmpipeline.spec import HELD_OUT_BASE, MASK_LAWS, RunSpec


class Purpose(IntEnum):
    """What bits are drawn for; a different purpose gives independent bits for the same index."""

    MASK = 0
    INITIALISATION = 1
    ORDER = 2
    SPLIT = 3
    AUGMENTATION = 4
    TORCH_SEED = 5
    DROPOUT = 6  # whatever a network draws while it trains
    PROJECTION = 7  # of gradients


def subset_size(n_train: int, alpha: float) -> int:
    """Count the examples in a subset: round(alpha * n_train), halves to even.

    Raises
    ------
    SpecError
        If the subset would be empty or everything.
    """
    size = round(alpha * n_train)
    if not 0 < size < n_train:
        raise SpecError(
            f"alpha {alpha} of {n_train} training examples is a subset of {size}; "
            f"choose an alpha that leaves at least one example in and one out",
            field="alpha",
            value=alpha,
        )
    return size


def draw_mask(seed: int, subset_index: int, n_train: int, alpha: float) -> npt.NDArray[np.bool_]:
    """Draw one training subset of exact size.

    Parameters
    ----------
    seed : int
        From 0 to 2**64 - 1.
    subset_index : int
        From 0 to 2**64 - 1; the same index is the same subset.
    n_train : int
    alpha : float
        Share of examples in the subset.

    Returns
    -------
    mask : array of bool, shape (n_train,)
        True at `subset_size(n_train, alpha)` places.
    """
    size, mask = subset_size(n_train, alpha), np.zeros(n_train, np.bool_)
    words, low = _labelled(draw_bits(seed, Purpose.MASK, subset_index, n_train), np.arange(n_train, dtype=np.uint64))
    words.partition(size - 1)  # the first of `draw_permutation`, in some order
    mask[(words[:size] & low).astype(np.intp)] = True
    return mask


def draw_masks(seed: int, subset_indices: npt.NDArray[np.uint64], n_train: int, alpha: float) -> npt.NDArray[np.bool_]:
    """Draw many training subsets; row i is `draw_mask(seed, subset_indices[i], n_train, alpha)`.

    Returns
    -------
    masks : array of bool, shape (n, n_train)
    """
    masks = np.empty((len(subset_indices), n_train), np.bool_)
    for row, index in zip(masks, subset_indices, strict=True):
        row[:] = draw_mask(seed, int(index), n_train, alpha)
    return masks


def draw_bernoulli_masks(
    seed: int, subset_indices: npt.NDArray[np.uint64], n_train: int, alpha: float
) -> npt.NDArray[np.bool_]:
    """Draw training subsets that each example is in or out of by itself, with probability `alpha` to within 2**-53.

    A subset that would be empty has the one example that came closest.

    Returns
    -------
    masks : array of bool, shape (n, n_train)
    """
    masks = np.empty((len(subset_indices), n_train), np.bool_)
    for row, index in zip(masks, subset_indices.tolist(), strict=True):
        bits = draw_bits(seed, Purpose.MASK, index, n_train)
        row[:] = bits < np.uint64(int(alpha * 2.0**64))
        if not row.any():
            row[bits.argmin()] = True
    return masks


def subset_masks(spec: RunSpec, rows: Iterable[int], n_train: int) -> npt.NDArray[np.bool_]:
    """Return the subsets that rows of a run are trained on.

    Parameters
    ----------
    spec : RunSpec
    rows : iterable of int, length n
    n_train : int

    Returns
    -------
    masks : array of bool, shape (n, n_train)

    Raises
    ------
    SpecError
        If alpha leaves no example in or none out, or a file of masks cannot be used.
    """
    subsets = spec.subset_indices(rows)
    if spec.masks == "exact":
        return draw_masks(spec.seed, subsets, n_train, spec.alpha)
    if spec.masks == "bernoulli":
        return draw_bernoulli_masks(spec.seed, subsets, n_train, spec.alpha)
    held_out = subsets >= HELD_OUT_BASE
    places = np.where(held_out, subsets - np.uint64(HELD_OUT_BASE) + np.uint64(spec.n_models), subsets)
    masks = np.asarray(given_masks(spec, n_train)[places.astype(np.intp)])
    if not masks.any(1).all():
        row = int(places[~masks.any(1)][0])
        raise SpecError(f"masks {spec.masks}: row {row} has no example; give at least one", field="masks", value=row)
    return masks


def given_masks(spec: RunSpec, n_train: int) -> npt.NDArray[np.bool_]:
    """Map the user's own masks from their file: those to fit on first, then one for each held-out subset.

    Raises
    ------
    SpecError
        If there is no such file, or it does not hold bool of shape (n_models + n_subsets, n_train).
    """
    wanted = (spec.n_models + spec.held_out.n_subsets, n_train)
    try:
        masks = np.lib.format.open_memmap(spec.masks, mode="r")
        found = f"{masks.dtype} of shape {masks.shape}"
    except (OSError, ValueError, EOFError) as error:
        raise SpecError(
            f"masks {spec.masks} cannot be read ({error}); write bool of shape {wanted} there with numpy.save",
            field="masks",
            value=spec.masks,
        ) from error
    if masks.dtype != np.bool_ or masks.shape != wanted:
        raise SpecError(
            f"masks {spec.masks} holds {found}; write bool of shape {wanted}, a row for each of n_models "
            f"{spec.n_models} and held_out.n_subsets {spec.held_out.n_subsets}",
            field="masks",
            value=found,
        )
    checked: npt.NDArray[np.bool_] = masks
    return checked


def masks_digest(spec: RunSpec) -> str | None:
    """Digest the user's own file of masks, SHA-256; None for masks that are drawn.

    Raises
    ------
    SpecError
        If there is no such file.
    """
    if spec.masks in MASK_LAWS:
        return None
    try:
        with open(spec.masks, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SpecError(
            f"masks {spec.masks} cannot be read ({error}); restore the file, or write where it is now as masks in the "
            "run.yaml",
            field="masks",
            value=spec.masks,
        ) from error


def draw_permutation(seed: int, purpose: Purpose, index: int, n: int) -> npt.NDArray[np.int64]:
    """Draw an order of 0, ..., n - 1.

    Returns
    -------
    permutation : array of int64, shape (n,)
    """
    return _sorted_by_bits(draw_bits(seed, purpose, index, n), np.arange(n, dtype=np.uint64))


def draw_orders(seed: int, model_index: int, subset: npt.NDArray[np.int64], n_epochs: int) -> npt.NDArray[np.int64]:
    """Draw the order in which a model sees its subset, for each epoch.

    Parameters
    ----------
    seed, model_index : int
    subset : array of int64, shape (size,)
        Indices of the training examples in the subset.
    n_epochs : int

    Returns
    -------
    orders : array of int64, shape (n_epochs, size)
        Each row is `subset` in another order.
    """
    bits = draw_bits(seed, Purpose.ORDER, model_index, n_epochs * len(subset))
    return _sorted_by_bits(bits.reshape(n_epochs, len(subset)), subset.astype(np.uint64))


def draw_uniform(seed: int, model_index: int, n: int) -> npt.NDArray[np.float32]:
    """Draw a model's initial numbers, uniform on [-1, 1) in steps of 2**-23.

    Returns
    -------
    uniform : array of float32, shape (n,)
    """
    bits = draw_bits(seed, Purpose.INITIALISATION, model_index, n)
    # 24 bits are what a float32 holds exactly; processors convert signed numbers
    return (bits >> np.uint64(40)).view(np.int64).astype(np.int32).astype(np.float32) * np.float32(
        2.0**-23
    ) - np.float32(1)


def draw_bits(seed: int, purpose: Purpose, index: int, n: int) -> npt.NDArray[np.uint64]:
    """Draw raw bits; streams of different indices are 2**192 blocks apart and cannot meet.

    Returns
    -------
    bits : array of uint64, shape (n,)
    """
    bits = np.empty(n, np.uint64)
    from dmpipeline.draws.philox import fill  # compiled by numba, and what only reads a run draws nothing

    fill(bits, np.uint64(seed), np.uint64(purpose), np.uint64(index))
    return bits


def _sorted_by_bits(bits: npt.NDArray[np.uint64], values: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Order distinct values by random bits, along the last axis."""
    words, low = _labelled(bits, values)
    words.sort(axis=-1)
    words &= low
    return words.view(np.int64)


def _labelled(bits: npt.NDArray[np.uint64], values: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint64], np.uint64]:
    """Put distinct values into the low bits of random words; return which bits those are.

    The words are distinct, so their order does not depend on the sorting algorithm, and sorting them is several times
    faster than sorting indices. The high bits kept (48 for 50,000 values) leave two of one row equal about once in
    200,000 rows, where the values then decide: no bias that any statistic could see.
    """
    low = np.uint64((1 << int(values.max()).bit_length()) - 1)
    words = bits & ~low
    words |= values
    return words, low
