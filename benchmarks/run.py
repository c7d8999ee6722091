"""How fast it is, beside peers in the same run: ratios with their spread, for this machine and no other.

Each pair takes turns, so that what else the machine does falls on both. A ratio above 1 says ours is faster.

    python benchmarks/run.py            # a few minutes
    python benchmarks/run.py read fit   # some of read, fit, train
"""

import io
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import boto3
import numpy as np
import obstore
import torch
from rich.console import Console
from rich.table import Table
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import lasso_path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from servers.loopback import BUCKET, READER_KEY_ID, SECRET, LoopbackS3

import dmdata
from dmpipeline import fit
from dmpipeline.datasets import load_dataset
from dmpipeline.masks import draw_masks
from dmpipeline.recipes import Perceptron
from dmpipeline.train import train_block

REPEATS = 5


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(table: Table, what: str, ours: Callable[[], object], peers: dict[str, Callable[[], object]]) -> None:
    """Time ours and each peer by turns, after one round that warms caches and compiles."""
    for work in (ours, *peers.values()):
        work()
    rounds = [(timed(ours), {name: timed(work) for name, work in peers.items()}) for _ in range(REPEATS)]
    seconds = statistics.median(own for own, _ in rounds)
    for name in peers:
        ratios = sorted(others[name] / own for own, others in rounds)
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        table.add_row(what, f"{seconds:.3f} s", name, f"{statistics.median(ratios):.2f}", spread)


def read(table: Table) -> None:
    """A whole 256 MB float16 .npy over loopback HTTP, requester pays enforced, into memory."""
    values = np.random.default_rng(0).standard_normal((12_800, 10_000), np.float32).astype(np.float16)
    buffer = io.BytesIO()
    np.save(buffer, values)
    with LoopbackS3() as server, tempfile.TemporaryDirectory() as home, dmdata.budget(usd=1000):
        os.environ |= server.env | {"DMDATA_HOME": home}
        server.put("cifar/data/test_margins_50pct.npy", buffer.getvalue())
        warnings.simplefilter("ignore", dmdata.CatalogMismatchWarning)
        lazy = dmdata.open("cifar/50pct/test_margins")
        store = obstore.store.S3Store(
            BUCKET, aws_endpoint_url_s3=server.endpoint_url, access_key_id=READER_KEY_ID, secret_access_key=SECRET,
            region="us-east-1", request_payer=True, client_options={"allow_http": True},
        )  # fmt: skip
        client = boto3.client("s3")
        key, size = "cifar/data/test_margins_50pct.npy", values.nbytes + 128
        starts = list(range(0, size, 16 << 20))
        stops = [min(start + (16 << 20), size) for start in starts]
        peers = {
            "obstore get_ranges": lambda: obstore.get_ranges(store, key, starts=starts, ends=stops, coalesce=0),
            "boto3 download_file": lambda: client.download_file(
                BUCKET, key, f"{home}/x.npy", ExtraArgs={"RequestPayer": "requester"}
            ),
        }
        compare(table, "read 256 MB", lambda: lazy[...], peers)
        rows = np.sort(np.random.default_rng(1).choice(len(values), 200, replace=False))

        def one_by_one() -> None:
            for row in rows:
                obstore.get_range(store, key, start=128 + int(row) * 20_000, length=20_000)

        compare(table, "read 200 scattered rows", lambda: lazy.oindex[rows], {"obstore, one by one": one_by_one})


def fitting(table: Table) -> None:
    """5,000 models x 1,000 examples x 50 targets; scikit-learn's path a target, its Gram shared."""
    rng = np.random.default_rng(0)
    masks = draw_masks(0, np.arange(5000, dtype=np.uint64), 1000, 0.5)
    truth = np.where(rng.random((1000, 50)) < 0.03, rng.standard_normal((1000, 50)), 0)
    outputs = (masks @ truth + rng.standard_normal((5000, 50))).astype(np.float32)
    x = masks[:4500].astype(float)
    x = (x - x.mean(0)) / x.std(0)
    y = outputs[:4500] - outputs[:4500].mean(0)
    warnings.simplefilter("ignore", ConvergenceWarning)

    def scikit_learn() -> None:
        gram = x.T @ x
        for target in range(50):
            lasso_path(x, y[:, target], precompute=gram, alphas=100, eps=1e-2, tol=1e-4)

    compare(table, "fit 5,000 x 1,000 x 50", lambda: fit(masks, outputs), {"scikit-learn lasso_path": scikit_learn})


def training(table: Table) -> None:
    """128 perceptrons on halves of digits against a plain PyTorch loop over 4 of them, seconds a model."""
    digits, recipe = load_dataset("digits"), Perceptron()
    numbers = np.arange(128, dtype=np.uint64)
    masks = draw_masks(0, numbers, digits.n_train, 0.5)
    inputs, labels = torch.from_numpy(digits.train_inputs), torch.from_numpy(digits.train_labels)

    def batched() -> None:
        train_block(digits, recipe, masks=masks, seed=0, model_indices=numbers, rows=range(128))

    def plain_loop() -> None:
        for mask in masks[:4]:
            subset = torch.from_numpy(np.flatnonzero(mask))
            network = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
            optimizer = torch.optim.SGD(network.parameters(), lr=recipe.lr, momentum=recipe.momentum)
            for _ in range(recipe.epochs):
                for batch in subset[torch.randperm(len(subset))].split(recipe.batch_size)[:-1]:
                    optimizer.zero_grad(set_to_none=True)
                    torch.nn.functional.cross_entropy(network(inputs[batch]), labels[batch]).backward()
                    optimizer.step()

    batched(), plain_loop()
    ratios = []
    for _ in range(REPEATS):
        own, loop = timed(batched) / 128, timed(plain_loop) / 4
        ratios.append(loop / own)
    spread = f"{min(ratios):.1f} to {max(ratios):.1f}"
    table.add_row(
        "train a perceptron", f"{own * 1e3:.1f} ms", "plain PyTorch loop", f"{statistics.median(ratios):.1f}", spread
    )


def main(names: list[str]) -> None:
    table = Table("what", "ours", "peer", "times faster", "spread", title=f"medians of {REPEATS}, taking turns")
    parts = {"read": read, "fit": fitting, "train": training}
    for name in names or parts:
        parts[name](table)
    Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
