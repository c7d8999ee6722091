"""A fit at the size of the released CIFAR-10 masks, 300,000 x 50,000, or any fraction of it, from planted weights.

    python benchmarks/release_size.py FOLDER --fraction 0.05

Masks are drawn by counter, half of the examples each, and kept packed, a bit an entry. Outputs are float16: a few
planted weights a target, of heavy-tailed sizes, and noise. Moments are taken of 1,000 targets, and 300 of them are
fitted. What it took is compared with the forecast, and what was planted with what was found. The fit of 10,000 targets
is extrapolated.

Killed at any moment, the same command resumes. FOLDER/result.json holds what is printed, and seconds add up over all
tries.
"""

import argparse
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from dmdata.atomic import write_whole
from dmpipeline import fit
from dmpipeline.compute import available_threads
from dmpipeline.draws.masks import draw_masks, subset_size
from dmpipeline.fitting.checkpoints import Sizes
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.fitting.fitting import split_rows
from dmpipeline.fitting.forecast import CORE_USD_PER_HOUR, GUESSED_NONZERO_SHARE, Forecast, Rates
from dmpipeline.fitting.settings import VALIDATION

Array = np.ndarray[Any, Any]

N_MODELS, N_TRAIN, N_TARGETS = 300_000, 50_000, 10_000
"""Of the release's CIFAR-10 at 50%."""

ALPHA = 0.5
BLOCK_ROWS = 1024
TARGETS_OF_A_BLOCK = 100
"""Targets solved before they are kept: what a kill loses of the paths."""

R2 = 0.3
"""Of the planted weights: about the square of 0.54, the rank correlation published for datamodels of CIFAR-10."""

N_PLANTED = 80
SPREAD = 1.0
"""Of the logarithm of the planted weights' sizes: the largest of 80 is some ten times the median."""

FRESH = 1 << 40
"""Index of the first subset that no model of the fit was trained on."""


def main() -> None:
    options = _options()
    problem = Problem(
        options.models or round(N_MODELS * options.fraction),
        options.train or round(N_TRAIN * options.fraction),
        options.targets,
        options.fitted,
        options.seed,
    )
    folder: Path = options.folder
    notes = Notes(folder, problem)
    forecast = notes.forecast(options.rates)
    print(forecast_table(notes, forecast))
    need = notes.disk_bytes
    used = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    if shutil.disk_usage(folder).free + used < need:
        raise SystemExit(f"{folder} has no room for {need / 2**30:,.1f} GiB; choose another folder or a fraction")
    with Watch(folder, notes) as watch:
        masks, outputs = make(problem, folder / "data", watch)
        datamodels = fit(
            masks,
            outputs,
            directory=folder / "work",
            targets=slice(0, problem.n_fitted),
            block_targets=TARGETS_OF_A_BLOCK,
            progress=watch.report,
        )
        watch.report("the rest", 1, 1)
    result = compared(problem, datamodels, notes, forecast)
    write_whole(folder / "result.json", json.dumps(result, indent=1))
    print(result_table(problem, result))


@dataclass(frozen=True, slots=True)
class Problem:
    """Masks of `n_models` subsets of `n_train` examples, `n_targets` outputs, of which `n_fitted` are fitted."""

    n_models: int
    n_train: int
    n_targets: int
    n_fitted: int
    seed: int

    @property
    def n_planted(self) -> int:
        return min(N_PLANTED, self.n_train // 5)

    @property
    def mask_bytes(self) -> int:
        return -(-self.n_train // 8)

    @property
    def data_bytes(self) -> int:
        return self.n_models * (self.mask_bytes + 2 * self.n_targets)

    def weights(self) -> scipy.sparse.csr_array:
        """Return the planted weights of raw masks, (n_targets, n_train), whose sums have the variance R2."""
        weights = scipy.sparse.lil_array((self.n_targets, self.n_train), dtype=np.float32)
        for target in range(self.n_targets):
            rng = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 1, target]))
            places = rng.choice(self.n_train, self.n_planted, replace=False)
            own = np.exp(SPREAD * rng.standard_normal(self.n_planted)) * rng.choice([-1, 1], self.n_planted)
            # subsets of exact size: entries of a mask are a little correlated
            share = subset_size(self.n_train, ALPHA) / self.n_train
            variance = share * (1 - share) / (1 - 1 / self.n_train) * ((own**2).sum() - own.sum() ** 2 / self.n_train)
            weights[target, places] = own * math.sqrt(R2 / variance)
        return weights.tocsr()

    def rows(self, first: int, stop: int, weights: scipy.sparse.csr_array) -> tuple[Array, Array]:
        """Draw masks (bool) of some subsets, and their outputs (float16)."""
        masks = draw_masks(self.seed, np.arange(first, stop, dtype=np.uint64), self.n_train, ALPHA)
        signal = (weights @ np.ascontiguousarray(masks.T).astype(np.float32)).T
        noise = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 2, first]))
        signal += math.sqrt(1 - R2) * noise.standard_normal(signal.shape, dtype=np.float32)
        return masks, signal.astype(np.float16)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a file that the problem determines: they need not be read to be known."""

    file: np.memmap[Any, Any]
    n_columns: int
    facts: str

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.file), self.n_columns

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.bool_) if self.file.dtype == np.uint8 else self.file.dtype

    def __getitem__(self, rows: slice) -> Array:
        if self.file.dtype == np.uint8:
            return np.unpackbits(self.file[rows], axis=1, count=self.n_columns).view(np.bool_)
        return np.asarray(self.file[rows])

    def content_digest(self, start: int, stop: int) -> str:
        return f"{self.facts}, {self.file.dtype}, {start}:{stop}"


def make(problem: Problem, folder: Path, watch: "Watch") -> tuple[Rows, Rows]:
    """Draw what is not on disk yet: blocks of rows, each at the end of both files."""
    folder.mkdir(parents=True, exist_ok=True)
    places = folder / "masks.bits", folder / "outputs.f16"
    row_bytes = problem.mask_bytes, 2 * problem.n_targets
    for place in places:
        place.touch()
    whole = min(place.stat().st_size // size for place, size in zip(places, row_bytes, strict=True))
    done = whole if whole == problem.n_models else whole // BLOCK_ROWS * BLOCK_ROWS
    for place, size in zip(places, row_bytes, strict=True):
        os.truncate(place, done * size)
    weights = problem.weights()
    with open(places[0], "ab") as of_masks, open(places[1], "ab") as of_outputs:
        for masks, outputs in _drawn(problem, done, weights):
            of_masks.write(np.packbits(masks, axis=1).data)
            of_outputs.write(np.ascontiguousarray(outputs).data)
            done += len(masks)
            watch.report("data", done, problem.n_models)
    bits = np.memmap(places[0], np.uint8, "r", shape=(problem.n_models, problem.mask_bytes))
    halves = np.memmap(places[1], np.float16, "r", shape=(problem.n_models, problem.n_targets))
    return Rows(bits, problem.n_train, repr(problem)), Rows(halves, problem.n_targets, repr(problem))


def _drawn(problem: Problem, done: int, weights: scipy.sparse.csr_array) -> Iterator[tuple[Array, Array]]:
    """Draw blocks in order, as many at a time as there are threads."""
    threads = available_threads()
    with ThreadPoolExecutor(threads) as pool:
        firsts = list(range(done, problem.n_models, BLOCK_ROWS))
        for i in range(0, len(firsts), threads):
            yield from pool.map(
                lambda first: problem.rows(first, min(first + BLOCK_ROWS, problem.n_models), weights),
                firsts[i : i + threads],
            )


class Notes:
    """What is known of a run over all its tries, in FOLDER/notes.json: the forecast, seconds a stage, and peaks."""

    def __init__(self, folder: Path, problem: Problem) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._path = folder, folder / "notes.json"
        self.known: dict[str, Any] = {"problem": repr(problem), "seconds": {}, "cpu": {}, "peaks": {}, "tries": 0}
        if self._path.exists():
            self.known = json.loads(self._path.read_text(encoding="utf-8"))
            if self.known["problem"] != repr(problem):
                raise SystemExit(f"{folder} holds {self.known['problem']}, not {problem}; name another folder")
        self.known["tries"] += 1
        self.save()
        self.problem = problem

    def save(self) -> None:
        write_whole(self._path, json.dumps(self.known, indent=1))

    @property
    def written_per_second(self) -> float:
        return float(self.known["written_per_second"])

    def forecast(self, side: int) -> Forecast:
        """Measure this machine's rates, at the first try, the best of two; return what they lead to expect."""
        if "rates" not in self.known:
            measured = [Rates.measured(n_models=side, n_train=side) for _ in range(2)]
            self.known["rates"] = {
                name: max(getattr(rates, name) for rates in measured) for name in Rates.__dataclass_fields__
            }
            self.known["written_per_second"] = _written_per_second(self._folder)
            self.save()
        return self.forecast_of(self.problem.n_fitted)

    @property
    def disk_bytes(self) -> int:
        """What is expected on disk at its largest: moments of all targets, and the data."""
        return self.forecast_of(self.problem.n_targets).disk_bytes + self.problem.data_bytes

    @property
    def written_bytes(self) -> int:
        """Files as large as X'X: pieces of the fitted rows and their sums, the validation rows, and four of a fit."""
        n_pieces = max(round(split_rows(self.problem.n_models, VALIDATION) / Sizes().rows_of_a_piece), 1)
        return (2 * n_pieces + 4) * 4 * self.problem.n_train**2 + self.problem.data_bytes

    def forecast_of(self, n_targets: int, n_nonzero: float = 0.0) -> Forecast:
        problem = self.problem
        return Forecast(
            n_models=problem.n_models,
            n_train=problem.n_train,
            n_targets=n_targets,
            n_nonzero=n_nonzero or max(GUESSED_NONZERO_SHARE * problem.n_train, problem.n_planted),
            n_cores=available_threads(),
            usd_per_core_hour=CORE_USD_PER_HOUR,
            usd_per_gpu_hour=0.0,
            rates=Rates(**self.known["rates"]),
        )


def _written_per_second(folder: Path) -> float:
    """Measure how fast a file of 512 MiB reaches the disk."""
    block, place = np.random.default_rng(0).bytes(2**24), folder / ".written"
    began = time.perf_counter()
    with open(place, "wb") as file:
        for _ in range(32):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    place.unlink()
    return 2**29 / (time.perf_counter() - began)


class Watch:
    """Adds up seconds a stage, and looks at memory and disk once a second; prints a line every half a minute.

    What comes between the last report of a stage and the first of the next, such as Gram matrices, is "before" that.
    """

    def __init__(self, folder: Path, notes: Notes) -> None:
        self._folder, self._notes, self._over = folder, notes, threading.Event()
        self._stage, self._printed = "", 0.0
        self._last = self._last_cpu = 0.0
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        self._last, self._last_cpu = time.perf_counter(), time.process_time()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._notes.save()

    def report(self, stage: str, done: int, total: int) -> None:
        now, now_cpu = time.perf_counter(), time.process_time()
        name = stage if stage in (self._stage, "data", "moments", "the rest") else f"before {stage}"
        for kind, spent in (("seconds", now - self._last), ("cpu", now_cpu - self._last_cpu)):
            self._notes.known[kind][name] = self._notes.known[kind].get(name, 0.0) + spent
        if now - self._printed > 30 or done == total or stage != self._stage:
            self._printed = now
            print(f"{time.strftime('%H:%M:%S')}  {stage}: {done:,} of {total:,}", flush=True)
            self._notes.save()
        self._stage, self._last, self._last_cpu = stage, now, now_cpu

    def _look(self) -> None:
        while not self._over.wait(1.0):
            self._note()
        self._note()

    def _note(self) -> None:
        peaks, status = self._notes.known["peaks"], Path("/proc/self/status").read_text(encoding="ascii")
        found = {
            f"{name} bytes": int(status.partition(f"{field}:")[2].split()[0]) * 1024
            for name, field in (("resident", "VmHWM"), ("anonymous", "RssAnon"))
        }
        found["disk bytes"] = _bytes_under(self._folder)
        for name, value in found.items():
            peaks[name] = max(peaks.get(name, 0), value)


def _bytes_under(folder: Path) -> int:
    """Count what files in a folder take, and what those take that are unlinked there but still mapped."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    unlinked: dict[str, int] = {}
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(str(folder.resolve())) and fields[5].endswith("(deleted)"):
            start, end = (int(number, 16) for number in fields[0].split("-"))
            unlinked[fields[4]] = unlinked.get(fields[4], 0) + end - start
    return total + sum(unlinked.values())


def compared(problem: Problem, datamodels: Datamodels, notes: Notes, forecast: Forecast) -> dict[str, Any]:
    """Compare what a fit took and found with what was expected and planted."""
    planted = problem.weights()[: problem.n_fitted].toarray().T
    weight, is_planted = np.asarray(datamodels.weight), planted != 0
    found = weight != 0
    k = problem.n_planted
    largest = np.argpartition(-np.abs(weight), k - 1, axis=0)[:k]
    n_nonzero = float(found.sum(0).mean())
    r2, oracle = _fresh_r2(problem, datamodels)
    seconds = notes.known["seconds"]
    moments = notes.forecast_of(problem.n_targets).moments_seconds
    many, paths = notes.forecast_of(N_TARGETS), seconds.get("paths", 0.0) + seconds.get("refit", 0.0)
    certificate = datamodels.certificate
    assert certificate is not None
    extrapolated = {
        "moments": seconds["moments"] * many.moments_seconds / moments,
        "paths and refit": paths * N_TARGETS / problem.n_fitted,
        "in between": seconds.get("before paths", 0.0) + seconds.get("before refit", 0.0),
    }
    return {
        "problem": repr(problem),
        "tries": notes.known["tries"],
        "seconds": seconds,
        "cpu seconds": notes.known["cpu"],
        "forecast seconds": {
            "moments": moments,
            "paths": forecast.paths_seconds,
            "paths of as many nonzero": notes.forecast_of(problem.n_fitted, n_nonzero).paths_seconds,
        },
        "forecast bytes": {"memory": forecast.least_memory_bytes, "disk": notes.disk_bytes},
        "peaks": notes.known["peaks"],
        "gap": float(certificate.gap.max()),
        "kkt": float(certificate.kkt.max()),
        "converged": int((certificate.kkt <= 1.05e-3).sum()),
        "nonzero": n_nonzero,
        "recall": float(found[is_planted].mean()),
        "precision": float(is_planted[found].mean()),
        "of the largest": float(np.take_along_axis(is_planted, largest, 0).mean()),
        "weight correlation": float(np.corrcoef(weight.ravel(), planted.ravel())[0, 1]),
        "r2": r2,
        "planted r2": oracle,
        "extrapolated seconds of 10,000 targets": extrapolated,
    }


def _fresh_r2(problem: Problem, datamodels: Datamodels) -> tuple[float, float]:
    """Return the mean R2 of predictions for 2,000 subsets that were not fitted, and that of the planted weights."""
    weights = problem.weights()
    errors, variances = np.zeros((2, problem.n_fitted)), []
    for first in range(FRESH, FRESH + 2000, 500):
        masks, outputs = problem.rows(first, first + 500, weights)
        truth = outputs[:, : problem.n_fitted].astype(np.float64)
        planted = (weights[: problem.n_fitted] @ masks.T.astype(np.float32)).T
        errors += [((truth - guess) ** 2).sum(0) for guess in (datamodels.predict(masks), planted)]
        variances.append(truth)
    scores = 1 - errors / (2000 * np.concatenate(variances).var(0))
    return float(scores[0].mean()), float(scores[1].mean())


def forecast_table(notes: Notes, forecast: Forecast) -> str:
    problem, moments = notes.problem, notes.forecast_of(notes.problem.n_targets).moments_seconds
    written = notes.written_bytes
    return (
        f"{problem.n_models:,} models x {problem.n_train:,} examples, moments of {problem.n_targets:,} targets, "
        f"{problem.n_fitted:,} of them fitted, {problem.n_planted} planted weights a target\n"
        f"forecast: moments {_time(moments)}, paths and refit {_time(forecast.paths_seconds)} with "
        f"{forecast.n_nonzero:,.0f} nonzero weights a target, drawing not included;\n"
        f"  {_gib(written)} written on the way, {_time(written / notes.written_per_second)} at "
        f"{notes.written_per_second / 1e6:,.0f} MB/s, as fast as half a gigabyte went just now;\n"
        f"  memory {_gib(forecast.least_memory_bytes)}, or {_gib(forecast.fast_memory_bytes)} with what is best in the "
        f"page cache; disk {_gib(notes.disk_bytes)}"
    )


def result_table(problem: Problem, result: dict[str, Any]) -> str:
    """Lay out a result, a line each; a ratio is that to the forecast."""
    seconds, expected, peaks = result["seconds"], result["forecast seconds"], result["peaks"]
    lines = [("stage", "took", "forecast", "ratio, processors' time")]
    for stage, took in seconds.items():
        forecast = expected.get({"paths": "paths of as many nonzero"}.get(stage, stage))
        ratio, cpu = f"{took / forecast:.2f}, " if forecast else "", _time(result["cpu seconds"][stage])
        lines.append((stage, _time(took), _time(forecast) if forecast else "", ratio + cpu))
    cpu = _time(sum(result["cpu seconds"].values()))
    lines += [
        ("in total", _time(sum(seconds.values())), "", f"{cpu}; tries: {result['tries']}"),
        ("memory, resident with mapped files", _gib(peaks["resident bytes"]), "", ""),
        ("memory, its own", _gib(peaks["anonymous bytes"]), _gib(result["forecast bytes"]["memory"]), ""),
        ("disk", _gib(peaks["disk bytes"]), _gib(result["forecast bytes"]["disk"]), ""),
        ("worst duality gap, share of variance", f"{result['gap']:.1e}", "", ""),
        ("worst optimality violation, share of lam", f"{result['kkt']:.1e}", "", ""),
        ("targets converged", f"{result['converged']} of {problem.n_fitted}", "", ""),
        ("nonzero weights a target", f"{result['nonzero']:,.0f}", "", ""),
        ("planted weights found", f"{result['recall']:.3f}", "", ""),
        ("nonzero weights that were planted", f"{result['precision']:.3f}", "", ""),
        (f"the {problem.n_planted} largest that were planted", f"{result['of the largest']:.3f}", "", ""),
        ("correlation of weights", f"{result['weight correlation']:.4f}", "", ""),
        ("R2 of new subsets", f"{result['r2']:.4f}", f"{result['planted r2']:.4f}", ""),
    ]
    lines += [
        (f"extrapolated to {N_TARGETS:,} targets, {stage}", _time(took), "", "")
        for stage, took in result["extrapolated seconds of 10,000 targets"].items()
    ]
    width = max(len(line[0]) for line in lines)
    return "\n".join(f"{a:<{width}}  {b:>12}  {c:>12}  {d}".rstrip() for a, b, c, d in lines)


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.1f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 7200 else f"{seconds / 3600:,.2f} h"


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:,.2f} GiB"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where everything is kept; the same command resumes what is there")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the models, and of the examples")
    parser.add_argument("--models", type=int, help="instead of that fraction of 300,000")
    parser.add_argument("--train", type=int, help="examples, instead of that fraction of 50,000")
    parser.add_argument("--targets", type=int, default=1000, help="whose moments are taken")
    parser.add_argument("--fitted", type=int, default=300, help="of these, the first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rates", type=int, default=4096, help="models and examples of the fit that rates are from")
    options = parser.parse_args()
    if options.fitted > options.targets:
        parser.error(f"--fitted {options.fitted} are more than --targets {options.targets}; give fewer")
    return options


if __name__ == "__main__":
    sys.exit(main())
