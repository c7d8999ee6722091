"""What a fit of any size will take, from a small one on this machine: seconds, memory, disk and dollars.

Four rates are measured, with all processors at work:

- counting X'X: n_models n_train^2 / 2 pairs of bits;
- summing X'y: n_models n_train n_targets numbers;
- a path and its refit: for each target n_train times its nonzero weights, for that many numbers of the Gram matrix are
  fetched wherever its weights change, and the matrix lies in memory and not in a cache;
- standardising a Gram matrix: n_train^2 numbers.

On a GPU a path and its refit take products with all of the Gram matrix, some hundred for each target, however many of
its weights are not zero: their arithmetic is counted in a small fit by the same solver, and divided by what the GPU
does in a second, which is measured where there is one, and else an A100's.

More processors are taken to be as much faster, which holds while each has its share of the memory's bandwidth.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from dmpipeline.compute import available_threads
from dmpipeline.datamodels import Datamodels
from dmpipeline.errors import SpecError
from dmpipeline.fitting import fit_moments
from dmpipeline.masks import draw_masks
from dmpipeline.moments import BITS_BYTES, Moments
from dmpipeline.spaces import Space

CORE_USD_PER_HOUR = 0.0504
"""A virtual core by the hour: half an m7i.large on demand, us-east-1, 2024. An assumption."""

A100_FLOPS = 0.6 * 19.5e12
"""Float32 operations a second: six tenths of an A100's peak without TensorFloat-32. An assumption."""

GUESSED_NONZERO_SHARE = 0.02
"""Share of the examples that get weight for a target where no fit is there to tell."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What is done in a second; see the module.

    Attributes
    ----------
    pairs, sums, path_numbers, gram_numbers : float
        By one processor, all others at the same work.
    gpu_operations : float
        Operations of a path and its refit on a GPU, a target, over n_train^2.
    gpu_flops : float
        What a GPU does in a second.
    has_gpu : bool
        Whether that was measured.
    """

    pairs: float
    sums: float
    path_numbers: float
    gram_numbers: float
    gpu_operations: float
    gpu_flops: float
    has_gpu: bool

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
        counting = max(few_seconds - n_models * n_train * n_targets / sums, _LEAST_SECONDS)
        return cls(
            pairs=n_models * n_train**2 / 2 / counting / threads,
            sums=sums / threads,
            path_numbers=n_train * n_nonzero / max(fit_seconds - 3 * gram_seconds, _LEAST_SECONDS) / threads,
            gram_numbers=n_train**2 / gram_seconds / threads,
            gpu_operations=_gpu_operations(masks[:, : n_train // 4], outputs[:, : n_targets // 2]),
            gpu_flops=_gpu_flops() if torch.cuda.is_available() else A100_FLOPS,
            has_gpu=torch.cuda.is_available(),
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
        Paths a target, beside the refit: one, or so many as folds times `priors.TRUSTS`.
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
        """Time of X'X and X'y, once; further fits of the same models do without."""
        pairs = self.n_models * self.n_train**2 / 2 / self.rates.pairs
        sums = self.n_models * self.n_train * self.n_targets / self.rates.sums
        return (pairs + sums) / self.n_cores

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
        """Time of all targets' paths and refits on one GPU."""
        operations = (self.n_paths + 1) / 2 * self.rates.gpu_operations * self.n_train**2 * self.n_targets
        return operations / self.rates.gpu_flops

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
        """Memory of a fit without a directory: three sets of moments, two Gram matrices of float32, the weights."""
        square, cross = self.n_train**2, self.n_train * self.n_targets
        return 3 * (4 * square + 8 * cross) + 2 * 4 * square + 2 * 4 * cross + BITS_BYTES

    @property
    def least_memory_bytes(self) -> int:
        """Memory of a fit in a directory, which maps the rest: a block of 512 targets, the bits of some masks."""
        return 512 * self.n_train * (8 + 8 + 4 + 4 + 4) + BITS_BYTES

    @property
    def fast_memory_bytes(self) -> int:
        """Memory with which a fit in a directory does not wait for the disk: the two Gram matrices stay there too."""
        return self.least_memory_bytes + 2 * 4 * self.n_train**2

    @property
    def disk_bytes(self) -> int:
        """Most that a fit in a directory has on disk: moments three times, Gram matrices twice, results."""
        square, cross = self.n_train**2, self.n_train * self.n_targets
        return 3 * (4 * square + 8 * cross) + 4 * 4 * square + (self.n_paths + 2) * 4 * cross

    def as_dict(self) -> dict[str, float]:
        """Give shape, seconds, dollars and bytes, ready for JSON."""
        names = ("n_models", "n_train", "n_targets", "n_nonzero", "n_cores", "usd_per_core_hour", "moments_seconds")
        derived = ("paths_seconds", "seconds", "usd", "memory_bytes", "least_memory_bytes", "fast_memory_bytes")
        on_gpu = ("usd_per_gpu_hour", "gpu_seconds", "gpu_memory_bytes", "usd_with_gpu")
        return {name: getattr(self, name) for name in (*names, *derived, "disk_bytes", *on_gpu)}


_LEAST_SECONDS = 1e-3


def _gpu_operations(masks: NDArray[np.bool_], outputs: NDArray[np.float16]) -> float:
    n_models, n_train = masks.shape
    fitting = Moments.of(masks, outputs, stop=n_models * 9 // 10)
    held_out = Moments.of(masks, outputs, start=n_models * 9 // 10)
    with FlopCounterMode(display=False) as counted:
        fit_moments(fitting, held_out, device="cpu")
    n_operations: int = counted.get_total_flops()
    return float(n_operations / outputs.shape[1] / n_train**2)


def _gpu_flops() -> float:
    """Measure float32 products on the GPU."""
    n = 8192
    gram, weight = torch.ones(n, n, device="cuda"), torch.ones(n, 512, device="cuda")

    def multiply() -> None:
        for _ in range(20):
            torch.matmul(gram, weight)
        torch.cuda.synchronize()

    return 20 * 2 * n * n * 512 / _seconds(multiply)


def _seconds(work: Callable[[], object]) -> float:
    """Time it twice, and take the less disturbed."""
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
