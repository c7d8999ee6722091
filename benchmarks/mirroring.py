"""Mirroring masks and margins into Zarr: how fast, how small on disk, and in how much memory."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import numpy as np
from reading import write_npy
from server import BUCKET, Nginx, nginx
from timing import Bench

import dmdata
from dmdata.layout.formats import npy_header

N_TRAIN = 50_000
_BARS_ON_DISK = {10: "<= 1.2", 20: "<= 1.2", 50: "<= 1.15", 75: "<= 1.15"}


def run(bench: Bench, *, small: bool) -> None:
    """Measure all of it; small: a quarter of the rows."""
    n_models = 8192 if not small else 2048
    with nginx() as server, dmdata.budget(usd=10_000):
        for percent in (10, 20, 50, 75) if not small else (50,):
            masks(bench, server, percent, n_models)
        margins(bench, server, n_models * 2)
        memory(bench, server, small=small)


def masks(bench: Bench, server: Nginx, percent: int, n_models: int) -> None:
    """Subsets of exact size, mirrored against boto3's download of the same object."""
    key = f"masks_{percent}.npy"
    write_masks(server.objects / key, n_models, percent / 100)
    what = f"mirror masks of {percent}%, {n_models * N_TRAIN / 1e6:,.0f} MB"
    n_bytes = against_download(bench, key, what, bar=">= 1")
    alpha = percent / 100
    bound = -(alpha * math.log2(alpha) + (1 - alpha) * math.log2(1 - alpha)) / 8 * n_models * N_TRAIN
    bench.add(
        f"masks of {percent}% on disk", f"{n_bytes / 1e6:,.1f} MB", "the entropy bound", [n_bytes / bound],
        bar=_BARS_ON_DISK[percent],
    )  # fmt: skip
    (server.objects / key).unlink()


def margins(bench: Bench, server: Nginx, n_models: int) -> None:
    """float16 normal draws."""
    write_npy(server.objects / "margins.npy", (n_models, 10_000), np.dtype("float16"))
    against_download(bench, "margins.npy", f"mirror margins, {n_models * 20_000 / 1e6:,.0f} MB", bar=">= 0.5")
    (server.objects / "margins.npy").unlink()


def against_download(bench: Bench, key: str, what: str, *, bar: str) -> int:
    """Compare a mirror with a download of the same object to the same disk; returns the mirror's bytes."""
    lazy = dmdata.open(f"s3://{BUCKET}/{key}")
    folder = Path(os.environ["DMDATA_HOME"])
    client = boto3.client("s3")
    size = 0

    def mirror() -> None:
        nonlocal size
        shutil.rmtree(folder / "m.zarr", ignore_errors=True)
        lazy.mirror(folder / "m.zarr")
        size = sum(path.stat().st_size for path in (folder / "m.zarr").rglob("*") if path.is_file())

    def download() -> None:
        client.download_file(BUCKET, key, str(folder / "object"), ExtraArgs={"RequestPayer": "requester"})

    peers = {"boto3 download_file": download}
    bench.compare(what, mirror, peers, dict.fromkeys(peers, bar), memory_bytes=2 * lazy.nbytes)
    shutil.rmtree(folder / "m.zarr")
    (folder / "object").unlink()
    return size


def memory(bench: Bench, server: Nginx, *, small: bool) -> None:
    """Peak resident memory of a mirror of masks, with eight times the rows."""
    n_models = 8192 if not small else 2048
    write_masks(server.objects / "masks.npy", n_models, 0.5, n_times=8)
    peaks = [peak_of_mirror(n_models), peak_of_mirror(8 * n_models)]
    grown = peaks[1] / peaks[0] - 1
    before = f"{peaks[0]:,.0f} MB of {n_models:,} rows"
    what = f"peak memory of a mirror, {8 * n_models:,} rows"
    bench.add(what, f"{peaks[1]:,.0f} MB", before, [grown], bar="< 0.05")
    (server.objects / "masks.npy").unlink()


def peak_of_mirror(n_rows: int) -> float:
    """Mirror so many rows in a process of its own; returns its peak resident memory in MB."""
    program = (
        "import sys, dmdata\n"
        "sys.path.insert(0, sys.argv[4])\n"
        "from reading import peak_memory\n"
        "with dmdata.budget(usd=10000):\n"
        "    dmdata.open(sys.argv[1]).mirror(sys.argv[2], rows=slice(int(sys.argv[3])), memory_bytes=64 << 20)\n"
        "print(peak_memory() / 1e6)\n"
    )
    destination = Path(os.environ["DMDATA_HOME"]) / "memory.zarr"
    command = [sys.executable, "-c", program, f"s3://{BUCKET}/masks.npy", str(destination), str(n_rows)]
    command.append(str(Path(__file__).parent))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shutil.rmtree(destination)
    return float(done.stdout)


def write_masks(path: Path, n_models: int, alpha: float, *, n_times: int = 1) -> None:
    """Write subsets of exact size as a .npy of bool, the same ones several times over."""
    rng = np.random.default_rng(0)
    size = round(alpha * N_TRAIN)
    with path.open("wb") as file:
        file.write(npy_header((n_times * n_models, N_TRAIN), np.dtype(bool)))
        body = file.tell()
        for first in range(0, n_models, 512):
            ranks: Any = rng.random((min(512, n_models - first), N_TRAIN), np.float32)
            cut = np.partition(ranks, size, axis=1)[:, size : size + 1]
            file.write((ranks < cut).tobytes())
        file.flush()
        for _ in range(n_times - 1):
            with path.open("rb") as again:
                again.seek(body)
                file.write(again.read(n_models * N_TRAIN))
