"""Rows of a run's store, and the digests that they are known by.

A block that is done has one digest, over all of its arrays. Where an extension cuts a block, rows of it that are done
stay in the arrays without that digest, each known by one of its own, until the rest of the block is trained.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

RowArrays = Mapping[str, npt.NDArray[Any]]
"""Rows of each of a run's arrays."""

DIGEST_BYTES = 32


def block_digest(block: RowArrays) -> bytes:
    """Digest a block: SHA-256 over the elements of each array, in C order and the order given; 32 bytes."""
    digest = hashlib.sha256()
    for array in block.values():
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.digest()


def row_digests(block: RowArrays) -> npt.NDArray[np.uint8]:
    """Digest each row of a block by itself, as `block_digest` does; shape (n_rows, 32)."""
    n_rows = len(next(iter(block.values())))
    each = [block_digest({name: array[row : row + 1] for name, array in block.items()}) for row in range(n_rows)]
    return np.frombuffer(b"".join(each), np.uint8).reshape(n_rows, DIGEST_BYTES)


@dataclass(frozen=True, slots=True)
class PartialBlock:
    """A block some of whose rows are done.

    Attributes
    ----------
    block : mapping of str to array
        All rows; those that are not done hold anything.
    is_done : array of bool, shape (n_rows,)
    """

    block: RowArrays
    is_done: npt.NDArray[np.bool_]

    @classmethod
    def sound(cls, block: RowArrays, digests: npt.NDArray[np.uint8]) -> "PartialBlock":
        """Take for done what is as its digest says; `digests` (n_rows, 32) are zeros for rows that never were."""
        known: npt.NDArray[np.bool_] = np.asarray(digests.any(axis=1))
        if known.any():
            known[known] = (row_digests(some(block, np.flatnonzero(known))) == digests[known]).all(axis=1)
        return cls(block, known)

    @property
    def missing(self) -> list[int]:
        """Places in the block whose rows are to be trained."""
        return np.flatnonzero(~self.is_done).tolist()

    def filled(self, trained: RowArrays) -> RowArrays:
        """Put the rows that were missing, in order, into a copy of the block."""
        whole = {name: np.array(array) for name, array in self.block.items()}
        for name, array in trained.items():
            whole[name][~self.is_done] = array
        return whole


def some(block: RowArrays, places: Sequence[int] | npt.NDArray[np.intp]) -> dict[str, npt.NDArray[Any]]:
    """Pick rows of a block by their places in it."""
    return {name: array[places] for name, array in block.items()}
