"""What a fit of any size will take, from a small one on this machine: seconds, memory, disk and dollars.

Five rates are measured, with all processors at work:

- counting X'X: n_models n_train^2 / 2 pairs of bits;
- taking in masks, reading, packing and identifying them: n_models n_train entries, taken to be no faster on more
  processors, for most of it waits for one;
- summing X'y: n_models n_train n_targets numbers;
- a path and its refit: for each target n_train times its nonzero weights, for that many numbers of the Gram matrix are
  fetched wherever its weights change, and the matrix lies in memory and not in a cache;
- standardising a Gram matrix: n_train^2 numbers.

A GPU is one assumed rate, `GPU_SECONDS`.

More processors are taken to be as much faster, which holds while each has its share of the memory's bandwidth.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmpipeline.compute import available_threads
from dmpipeline.draws.masks import draw_masks
from dmpipeline.errors import SpecError
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.fitting.fitting import fit_moments
from dmpipeline.fitting.guides.priors import TRUSTS
from dmpipeline.fitting.spaces import Space
from dmpipeline.moments import binary
from dmpipeline.moments.moments import Moments, bits_bytes_for

CORE_USD_PER_HOUR = 0.0504
"""A virtual core by the hour: half an m7i.large on demand, us-east-1, 2024. An assumption."""

GPU_SECONDS = 65e-12
"""Seconds of a path and its refit on an A100, a target, over n_train^2. An assumption, never measured: 760 operations,
as a small fit takes, at six tenths of the peak."""

GUESSED_NONZERO_SHARE = 0.02
"""Share of the examples that get weight for a target where no fit was made yet."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What is done in a second; see the module.

    Attributes
    ----------
    pairs, sums, path_numbers, gram_numbers : float
        By one processor, all others at the same work.
    entries : float
        By one processor, the others waiting.
    """

    pairs: float
    sums: float
    path_numbers: float
    gram_numbers: float
    entries: float = math.inf

    @classmethod
    def measured(cls, *, n_models: int = 4096, n_train: int = 4096, n_targets: int = 64) -> "Rates":
        """Measure on this machine, in some ten seconds.

        Parameters
        ----------
        n_models, n_train, n_targets : int
            Shape of the small fit. Its Gram matrix should not fit into the caches.
        """
        threads = available_threads()
        rng = np.random.default_rng(0)
        masks = draw_masks(0, np.arange(n_models, dtype=np.uint64), n_train, 0.5)
        effects = np.zeros((n_train, n_targets), np.float32)
        effects[: n_train // 16] = 0.2 * rng.standard_normal((n_train // 16, n_targets))
        noise = rng.standard_normal((n_models, n_targets), dtype=np.float32)
        outputs = (masks.astype(np.float32) @ effects + noise).astype(np.float16)
        Moments.of(masks[:64, :64], outputs[:64])  # compiles
        many = np.tile(outputs, 8)
        pairs_seconds = _counting_seconds(masks, threads)
        few_seconds = _seconds(lambda: Moments.of(masks, outputs))
        many_seconds = _seconds(lambda: Moments.of(masks, many))
        sums = n_models * n_train * (many.shape[1] - n_targets) / max(many_seconds - few_seconds, _LEAST_SECONDS)
        fitting = Moments.of(masks, outputs, stop=n_models * 9 // 10)
        held_out = Moments.of(masks, outputs, start=n_models * 9 // 10)
        space = Space.of(fitting)
        gram_seconds = _seconds(lambda: space.gram(fitting, threads=threads))
        fitted: list[Datamodels] = []
        fit_seconds = _seconds(lambda: fitted.append(fit_moments(fitting, held_out)))
        n_nonzero = int(np.count_nonzero(fitted[-1].weight))
        taking_in = max(few_seconds - pairs_seconds - n_models * n_train * n_targets / sums, _LEAST_SECONDS)
        return cls(
            pairs=n_models * n_train**2 / 2 / pairs_seconds / threads,
            sums=sums / threads,
            path_numbers=n_train * n_nonzero / max(fit_seconds - 3 * gram_seconds, _LEAST_SECONDS) / threads,
            gram_numbers=n_train**2 / gram_seconds / threads,
            entries=n_models * n_train / taking_in,
        )


@dataclass(frozen=True, slots=True)
class Forecast:
    """A fit of `n_models` x `n_train` masks to `n_targets` outputs, each of `n_nonzero` weights in the end.

    Attributes
    ----------
    n_models, n_train, n_targets : int
    n_nonzero : float
    n_cores : int
    usd_per_core_hour, usd_per_gpu_hour : float
    rates : Rates
    n_paths : int
        Paths a target, in addition to the refit: one, or as many as folds times `priors.TRUSTS`.
    """

    n_models: int
    n_train: int
    n_targets: int
    n_nonzero: float
    n_cores: int
    usd_per_core_hour: float
    usd_per_gpu_hour: float
    rates: Rates
    n_paths: int = 1

    def __post_init__(self) -> None:
        if self.n_nonzero > self.n_train:
            raise SpecError(
                f"{self.n_nonzero:,.0f} nonzero weights are more than the {self.n_train:,} examples; give fewer",
                field="n_nonzero",
            )

    @property
    def moments_seconds(self) -> float:
        """Time of X'X and X'y, once: further fits of the same models reuse them."""
        pairs = self.n_models * self.n_train**2 / 2 / self.rates.pairs
        sums = self.n_models * self.n_train * self.n_targets / self.rates.sums
        return (pairs + sums) / self.n_cores + self.n_models * self.n_train / self.rates.entries

    @property
    def paths_seconds(self) -> float:
        """Time of all targets' paths and refits."""
        grams = (2 * self.n_paths + 1) * self.n_train**2 / self.rates.gram_numbers
        paths = self.n_paths * self.n_targets * self.n_train * self.n_nonzero / self.rates.path_numbers
        return (grams + paths) / self.n_cores

    @property
    def seconds(self) -> float:
        """Time until the datamodels are there."""
        return self.moments_seconds + self.paths_seconds

    @property
    def usd(self) -> float:
        """Dollars of the cores."""
        return self.seconds / 3600 * self.n_cores * self.usd_per_core_hour

    @property
    def gpu_seconds(self) -> float:
        """Time of all targets' paths and refits on one GPU; an assumption, see `GPU_SECONDS`."""
        return (self.n_paths + 1) / 2 * GPU_SECONDS * self.n_train**2 * self.n_targets

    @property
    def usd_with_gpu(self) -> float:
        """Dollars of a fit whose moments are counted by the cores, and whose paths one GPU solves."""
        cores_usd = self.moments_seconds / 3600 * self.n_cores * self.usd_per_core_hour
        return cores_usd + self.gpu_seconds / 3600 * self.usd_per_gpu_hour

    @property
    def gpu_memory_bytes(self) -> int:
        """Memory of the GPU: two Gram matrices of float32, what 512 targets take at their widest, packed parts."""
        return 2 * 4 * self.n_train**2 + 42 * 4 * 512 * self.n_train + 2**31

    @property
    def memory_bytes(self) -> int:
        """Memory of a fit without a directory: moments, Gram matrices, the weights."""
        return self._arrays_bytes + 2 * 4 * self.n_train * self.n_targets + bits_bytes_for(self.n_train)

    @property
    def least_memory_bytes(self) -> int:
        """Memory of a fit in a directory, which maps the rest: a block of 512 targets, the bits of some masks."""
        return 512 * self.n_train * (8 + 8 + 4 + 4 + 4) + bits_bytes_for(self.n_train)

    @property
    def fast_memory_bytes(self) -> int:
        """Memory with which a fit in a directory does not wait for the disk: the two Gram matrices stay there too."""
        return self.least_memory_bytes + 2 * 4 * self.n_train**2

    @property
    def disk_bytes(self) -> int:
        """Most that a fit in a directory has on disk: moments, Gram matrices and results."""
        return self._arrays_bytes + (self.n_paths + 2) * 4 * self.n_train * self.n_targets

    @property
    def _arrays_bytes(self) -> int:
        """Two sets of moments and, at different times, two Gram matrices of float32 or the sum of the moments and one.

        With folds, as many sets as folds, their sum and that sum less one of them.
        """
        square, cross = self.n_train**2, self.n_train * self.n_targets
        n_sets = 2 if self.n_paths <= len(TRUSTS) else self.n_paths + 2
        return n_sets * (4 * square + 8 * cross) + 2 * 4 * square + 8 * cross

    def as_dict(self) -> dict[str, float]:
        """Return shape, seconds, dollars and bytes, ready for JSON."""
        names = ("n_models", "n_train", "n_targets", "n_nonzero", "n_cores", "usd_per_core_hour", "moments_seconds")
        derived = ("paths_seconds", "seconds", "usd", "memory_bytes", "least_memory_bytes", "fast_memory_bytes")
        on_gpu = ("usd_per_gpu_hour", "gpu_seconds", "gpu_memory_bytes", "usd_with_gpu")
        return {name: getattr(self, name) for name in (*names, *derived, "disk_bytes", *on_gpu)}


_LEAST_SECONDS = 1e-3
_LONG_ROWS = 2**14


def _counting_seconds(masks: NDArray[np.bool_], threads: int) -> float:
    """Time X'X alone: as a share of what `_LONG_ROWS` rows take, for short columns are slower to count."""
    n_columns, times = masks.shape[1], max(_LONG_ROWS // len(masks), 1)
    counts, seconds = np.zeros((n_columns, n_columns), np.int32), []
    with ThreadPoolExecutor(threads) as pool:
        codes = binary.code_rows(masks, pool)
        for _ in range(3):  # the first also claims memory
            bits = binary.Bits(n_columns, times * len(codes))
            for _ in range(times):
                bits.append(codes, pool)
            began = time.perf_counter()
            bits.add_counts(counts, pool)
            seconds.append(time.perf_counter() - began)
    return min(seconds) / times


def _seconds(work: Callable[[], object]) -> float:
    """Time work twice, and take the run that was less disturbed."""
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
