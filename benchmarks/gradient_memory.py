"""What memory and time gradient scores of the release's ResNet-9, of 6.6 million parameters, take by examples.

    python benchmarks/gradient_memory.py 200 800

Pictures of CIFAR-10's size are made up, and one model learns them for one epoch. Each number of examples, of which a
fifth are targets, is measured in a process of its own: the most memory it ever had, and what of it was there before.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from dmdata.money.prices import readable_bytes
from dmpipeline import Run, RunSpec, gradient_scores, save_dataset


def most_bytes() -> int:
    """Return the most memory this process ever had; getrusage would begin with the most its parent had."""
    [kibibytes] = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(kibibytes)


def measure(n_examples: int) -> None:
    """Print a line of the table."""
    rng, n_targets = np.random.default_rng(0), n_examples // 5
    pictures = rng.integers(0, 256, (n_examples, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, n_examples)
    parts = [(pictures[some], labels[some]) for some in (slice(n_targets, None), slice(n_targets))]
    with tempfile.TemporaryDirectory() as folder:
        dataset = save_dataset(Path(folder) / "pictures", *parts)
        spec = RunSpec(
            dataset=str(dataset),
            n_models=1,
            held_out={"n_subsets": 0},
            recipe={"name": "resnet9-release", "epochs": 1, "peak_epoch": 0.5, "precision": "single", "batch_size": 32},
        )
        run, before, began = Run.create(Path(folder) / "run", spec), most_bytes(), time.perf_counter()
        scores = gradient_scores(run, n_models=1)
    seconds = time.perf_counter() - began
    memory = f"{readable_bytes(most_bytes())} at most, of which {readable_bytes(before)} before"
    print(f"{n_examples:>6,} examples, scores {scores.shape}: {memory}, {seconds:,.0f} s", flush=True)


def main() -> None:
    """Measure each number of examples in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n_examples", type=int, nargs="+")
    counts = parser.parse_args().n_examples
    if len(counts) == 1:
        measure(counts[0])
        return
    for count in counts:
        subprocess.run([sys.executable, __file__, str(count)], check=True)


if __name__ == "__main__":
    main()
