"""Make `made-before.zip`: what earlier code left on disk, which the code of today must still read.

Run by hand, with the code whose files are to be kept; `README.md` has the command.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import yaml
from servers.loopback import BUCKET, LoopbackS3

FOLDER = Path("/tmp/kept")  # noqa: S108 - stands in the files, so that it should be nobody's home
COMMANDS = {name: [sys.executable, "-c", f"from {name}.cli import main; main()"] for name in ("dmdata", "dmpipeline")}
SPEC = {
    "dataset": "data/flowers.npz",
    "recipe": {"name": "perceptron", "hidden": 4, "epochs": 4},
    "outputs": ["margins", "train_margins"],
    "n_models": 40,
    "held_out": {"n_subsets": 5, "n_retrainings": 2},
    "block_models": 10,
}


def call(*words: str) -> None:
    program, *arguments = words
    subprocess.run([*COMMANDS[program], *arguments], check=True, cwd=FOLDER)


def write_dataset() -> None:
    random = np.random.default_rng(0)
    labels = np.arange(36) % 3
    inputs = random.normal(size=(36, 4)) + labels[:, None] * [1.0, 2.0, 0.0, -1.0]
    (FOLDER / "data").mkdir()
    np.savez_compressed(
        FOLDER / "data" / "flowers.npz",
        train_inputs=inputs[:24],
        train_labels=labels[:24],
        test_inputs=inputs[24:],
        test_labels=labels[24:],
    )


def make_runs() -> None:
    (FOLDER / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    for name in ("complete", "half"):
        call("dmpipeline", "init", f"runs/{name}", "--spec", "spec.yaml")
    call("dmpipeline", "run", "runs/complete", "--method", "products", "--at-once", "10")
    call("dmpipeline", "run", "runs/half", "--method", "products", "--at-once", "10", "--shard", "1/2")
    call("dmpipeline", "fit", "runs/complete", "--validation", "0.2")
    call("dmpipeline", "evaluate", "runs/complete", "--json")
    call("dmpipeline", "export", "runs/complete", "release", "--requester-pays")


def mirror_for_money() -> None:
    """Mirror the exported margins from a bucket whose reader pays, which leaves spending in the ledger."""
    with LoopbackS3() as server:
        for path in (FOLDER / "release").rglob("*"):
            if path.is_file():
                server.put(path.relative_to(FOLDER / "release").as_posix(), path.read_bytes())
        os.environ.update(server.env, DMDATA_HOME=str(FOLDER / "home"))
        words = ("mirror", "flowers/50pct/test_margins", "mirror.zarr", "-y", "--max-cost", "1")
        call("dmdata", *words, "--catalog", f"s3://{BUCKET}/catalog.yaml")
        call("dmdata", "spend", "--by", "artifact")


def pack(target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in sorted(FOLDER.rglob("*")):
            if path.is_file() and path.name != "spec.yaml":
                archive.writestr(path.relative_to(FOLDER).as_posix(), path.read_bytes())


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    write_dataset()
    make_runs()
    mirror_for_money()
    pack(Path(sys.argv[1]))
    shutil.rmtree(FOLDER)


if __name__ == "__main__":
    main()
