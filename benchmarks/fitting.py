"""Fitting datamodels beside public LASSO solvers, and what the time is made of."""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import PEERS, Bench, timed

from dmpipeline import fit
from dmpipeline.compute import available_threads, kernel
from dmpipeline.draws.masks import draw_masks
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.fitting.fitting import fit_moments
from dmpipeline.moments import binary
from dmpipeline.moments.moments import BLOCK_ROWS, Moments
from dmpipeline.scoring.learning import learning_curves

Array = np.ndarray[Any, Any]


def run(bench: Bench, *, small: bool) -> None:
    """All parts; small: a tenth of the rows and columns."""
    beside_peers(bench, *((1000, 200, 10) if small else (20_000, 2000, 500)))
    dense_supports(bench, *((2000, 500, 8) if small else (60_000, 10_000, 64)))
    second_moments(bench, *((2000, 500, 50) if small else (20_000, 2000, 500)))
    second_moments(bench, *((2000, 500, 2) if small else (16_384, 10_000, 20)))
    number_of_models(bench, *((500, 200, 10) if small else (5000, 1000, 200)))
    nine_points(bench, *((1000, 200, 10) if small else (20_000, 2000, 100)))
    if not small:
        nine_points(bench, 300_000, 2000, 20)


def beside_peers(bench: Bench, n_models: int, n_train: int, n_targets: int) -> None:
    """Ours from the masks on, second moments included, against paths a target; both over the same strengths."""
    masks, outputs = planted(n_models * 11 // 10, n_train, n_targets, n_effects=min(40, n_train // 5), scale=0.3)
    fits: list[Datamodels] = []

    def ours() -> float:
        fits.clear()
        return timed(lambda: fits.append(fit(masks, outputs, validation=1 / 11))) / n_targets

    errors: dict[str, list[float]] = {}
    with peer_solvers(masks, outputs, n_models) as ask:

        def peer(name: str, n: int) -> Callable[[], float]:
            def solve() -> float:
                said = ask(name, n)
                errors[name] = said["errors"]
                return float(said["seconds"]) / n

            return solve

        # those that take no Gram matrix need more than ten seconds a target
        peers = {
            "scikit-learn lasso_path, Gram given": peer("scikit-learn", 10),
            "adelie gaussian_cov, Gram given": peer("adelie", 10),
            "celer_path": peer("celer", 1),
            "skglm Lasso.path": peer("skglm", 1),
        }
        bars = dict(zip(peers, (">= 100", ">= 1", ">= 1", ">= 1"), strict=True))
        what = f"fit {n_models:,} x {n_train:,} x {n_targets} from masks, a target"
        bench.compare(what, ours, peers, bars, memory_bytes=2**30)
    (datamodels,) = fits
    best = np.minimum(errors["scikit-learn"], errors["adelie"])
    best[0] = min(best[0], errors["celer"][0], errors["skglm"][0])
    excess = datamodels.validation_error[:10] / best - 1
    bench.add("its validation error, 1 taken off the ratio", "", "best peer, 10 targets", list(excess), bar="<= 1e-4")
    gap = float(datamodels.certificate.gap.max())
    bench.add("its largest duality gap", "", "variance of the target", [gap], bar="<= 1e-4")


def dense_supports(bench: Bench, n_models: int, n_train: int, n_targets: int) -> None:
    """Milliseconds a target where more than a tenth of all examples get weight; second moments are known."""
    masks, outputs = planted(n_models * 11 // 10, n_train, n_targets, n_effects=n_train * 3 // 100, scale=0.1)
    fitting, held_out = Moments.of(masks, outputs, stop=n_models), Moments.of(masks, outputs, start=n_models)
    supports: list[float] = []

    def once() -> float:
        np.ones(8 * n_train**2, np.uint8)
        start = time.perf_counter()
        datamodels = fit_moments(fitting, held_out)
        seconds = time.perf_counter() - start
        supports.append(np.count_nonzero(datamodels.weight) / n_targets)
        return seconds / n_targets * 1000

    once()
    figures = [once() for _ in range(bench.repeats)]
    what = f"fit {n_models:,} x {n_train:,} x {n_targets} from moments, ms a target"
    bench.add(what, "", f"support {supports[-1]:,.0f}", figures, bar="<= 100")


def second_moments(bench: Bench, n_models: int, n_train: int, n_targets: int) -> None:
    """X'X and X'y from boolean masks and float16 outputs, against float32 products and against what the counts need."""
    masks, outputs = planted(n_models, n_train, n_targets, n_effects=20, scale=0.3)

    def float32() -> None:
        gram, cross = torch.zeros(n_train, n_train), torch.zeros(n_train, n_targets)
        for first in range(0, n_models, BLOCK_ROWS):
            x = torch.from_numpy(masks[first : first + BLOCK_ROWS]).float()
            gram.addmm_(x.T, x)
            cross.addmm_(x.T, torch.from_numpy(outputs[first : first + BLOCK_ROWS]).float())

    what = f"moments {n_models:,} x {n_train:,} x {n_targets}"
    memory = 5 * n_train**2
    peers = {"float32 products": float32}
    bench.compare(what, lambda: Moments.of(masks, outputs), peers, dict.fromkeys(peers, ">= 6"), memory_bytes=memory)
    pool = ThreadPoolExecutor(available_threads())
    codes = binary.code_rows(masks, pool)
    counts = np.zeros((n_train, n_train), np.int32)

    def counting() -> float:
        bits = binary.Bits(n_train, len(codes))
        bits.append(codes, pool)
        return timed(lambda: bits.add_counts(counts, pool))

    n_words = n_train * (n_train + 1) // 2 * -(-n_models // 64)
    counting()
    shares = [counting() / (n_words / words_a_second(pool)) for _ in range(bench.repeats)]
    bench.add(f"its X'X of {n_train:,} columns, times the bound", "", "counts from the first cache", shares)


def number_of_models(bench: Bench, n_models: int, n_train: int, n_targets: int) -> None:
    """Time of a fit from moments of 16 times the models, over that of the fewer."""
    masks, outputs = planted(16 * n_models, n_train, n_targets, n_effects=20, scale=0.3)
    pairs = [
        (Moments.of(masks, outputs, stop=n), Moments.of(masks, outputs, start=n, stop=n + n // 10))
        for n in (n_models, 14 * n_models)
    ]
    times: list[list[float]] = [
        [timed(lambda pair=pair: fit_moments(*pair)) for pair in pairs] for _ in range(bench.repeats + 1)
    ]
    figures = [many / few for few, many in times[1:]]
    bench.add(f"fit x {n_train:,} x {n_targets} from moments, 14 times the models", "", "time with the fewer", figures)


def nine_points(bench: Bench, n_models: int, n_train: int, n_targets: int) -> None:
    """Time of a curve of nine points, from a sixteenth of the models on, over that of its longest fit, unscored."""
    masks, outputs = planted(n_models * 11 // 10, n_train, n_targets, n_effects=min(40, n_train // 5), scale=0.3)
    own, found = masks[:n_models], outputs[:n_models]
    held_out, truth = (array[n_models : n_models + 100] for array in (masks, outputs))
    counts = [int(count) for count in np.geomspace(n_models // 16, n_models, 9).round()]

    def curve() -> None:
        learning_curves(own, found, held_out, truth, estimates={"": fit_moments}, counts=counts, n_retrainings=1)

    works = (curve, lambda: fit(own, found))
    times: list[list[float]] = []
    for nth in range(bench.repeats + 1):
        rounds = [timed(work) for work in (works if nth % 2 else works[::-1])]
        times.append(rounds if nth % 2 else rounds[::-1])
    what = f"learning curve of nine points, {n_models:,} x {n_train:,} x {n_targets}, {len(truth):,} held out"
    bench.add(what, "", "time of its longest fit", [of_curve / of_fit for of_curve, of_fit in times[1:]], bar="<= 1.5")


def planted(n_models: int, n_train: int, n_targets: int, *, n_effects: int, scale: float) -> tuple[Array, Array]:
    """Masks of half the examples, and float16 outputs: `n_effects` normal effects a target and noise of variance 1."""
    rng = np.random.default_rng(0)
    masks = draw_masks(0, np.arange(n_models, dtype=np.uint64), n_train, 0.5)
    truth = np.zeros((n_train, n_targets), np.float32)
    for target in range(n_targets):
        truth[rng.choice(n_train, n_effects, replace=False), target] = scale * rng.standard_normal(n_effects)
    outputs = np.empty((n_models, n_targets), np.float16)
    for first in range(0, n_models, BLOCK_ROWS):
        block = masks[first : first + BLOCK_ROWS].astype(np.float32) @ truth
        outputs[first : first + BLOCK_ROWS] = block + rng.standard_normal(block.shape, dtype=np.float32)
    return masks, outputs


def words_a_second(pool: ThreadPoolExecutor) -> float:
    """Measure how many words of two columns all processors count in a second where all of them lie in a first cache."""
    words = np.random.default_rng(0).integers(0, 2**63, (8, 256), dtype=np.uint64)
    rounds, threads = 20_000, available_threads()
    _count(words, 1)
    started = time.perf_counter()
    list(pool.map(lambda _: _count(words, rounds), range(threads)))
    return threads * rounds * 16 * 256 / (time.perf_counter() - started)


@kernel
def _count(words, rounds):
    counts = np.zeros((4, 4), np.uint64)
    for _ in range(rounds):
        for i in range(0, 4, 2):
            for j in range(0, 4, 2):
                a, b, c, d = words[i], words[i + 1], words[4 + j], words[5 + j]
                ac, ad, bc, bd = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
                for r in range(len(a)):
                    ac += binary.ones_of(a[r] & c[r])
                    ad += binary.ones_of(a[r] & d[r])
                    bc += binary.ones_of(b[r] & c[r])
                    bd += binary.ones_of(b[r] & d[r])
                counts[i, j] += ac
                counts[i, j + 1] += ad
                counts[i + 1, j] += bc
                counts[i + 1, j + 1] += bd
    return counts


@contextmanager
def peer_solvers(masks: Array, outputs: Array, n_fit: int) -> Iterator[Callable[[str, int], dict[str, Any]]]:
    """Start the public solvers in their own environment; asked with a name, they solve so many of the targets."""
    if not (PEERS / ".installed").exists():
        raise SystemExit("the public solvers are not installed; make bench")
    command = [str(PEERS / "bin" / "python"), "-I", str(Path(__file__).with_name("peer_lasso.py"))]
    with tempfile.TemporaryDirectory() as folder:
        for name, array in (("masks", masks), ("outputs", outputs), ("n_fit", n_fit)):
            np.save(Path(folder, f"{name}.npy"), array)
        with subprocess.Popen([*command, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            stdin, stdout = process.stdin, process.stdout
            if stdout.readline().strip() != "ready":
                raise SystemExit("the public solvers do not start, see above; rm -r .venv-peers; make bench")

            def ask(name: str, n_targets: int) -> dict[str, Any]:
                stdin.write(" ".join([name, *map(str, range(n_targets))]) + "\n")
                stdin.flush()
                said: dict[str, Any] = json.loads(stdout.readline())
                return said

            try:
                yield ask
            finally:
                stdin.close()
