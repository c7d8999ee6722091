"""Examples whose inputs are equal number for number: known without any comparison of how alike examples are."""

import hashlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from dmpipeline.data.examples import Dataset

_BLOCK_BYTES = 2**25
_MOST_OF_TEST = 8


def identical_training(dataset: Dataset) -> list[list[int]]:
    """List the groups of training examples with equal inputs, of two or more, each by rising number."""
    groups: dict[bytes, list[int]] = {}
    for index, digest in enumerate(_digests(dataset.train_inputs, _common_dtype(dataset))):
        groups.setdefault(digest, []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def identical_to_tests(dataset: Dataset) -> dict[int, list[int]]:
    """List for each test example that the training set has, the first training examples equal to it, 8 at most."""
    dtype = _common_dtype(dataset)
    asked: dict[bytes, list[int]] = {digest: [] for digest in _digests(dataset.test_inputs, dtype)}
    for index, digest in enumerate(_digests(dataset.train_inputs, dtype)):
        if digest in asked and len(asked[digest]) < _MOST_OF_TEST:
            asked[digest].append(index)
    found = ((test, asked[digest]) for test, digest in enumerate(_digests(dataset.test_inputs, dtype)))
    return {test: trains for test, trains in found if trains}


def _common_dtype(dataset: Dataset) -> np.dtype[np.generic]:
    return np.result_type(dataset.train_inputs.dtype, dataset.test_inputs.dtype)


def _digests(inputs: npt.NDArray[np.generic], dtype: np.dtype[np.generic]) -> Iterator[bytes]:
    """Digest each example's input, read in blocks of 32 MiB; -0.0 counts as 0."""
    n_bytes = max(1, inputs[:1].size) * dtype.itemsize
    step = max(1, _BLOCK_BYTES // n_bytes)
    for start in range(0, len(inputs), step):
        block = np.ascontiguousarray(inputs[start : start + step], dtype)
        if dtype.kind == "f":
            block = block + dtype.type(0)
        for row in block:
            yield hashlib.blake2b(row.tobytes(), digest_size=16).digest()
