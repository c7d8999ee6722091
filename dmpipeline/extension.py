"""More models for a run that is there: its rows keep what they hold, and the new ones are missing until trained.

Held-out models lie behind those to fit on, so they move. All new files are made beside the old ones first, chunks that
stay where they are as hard links; then they are put in place together. Killed at any moment, the run is the old one or
the new one.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from dmpipeline import directory
from dmpipeline.directory import PRESENCE_BYTE, claimed, write_beside
from dmpipeline.errors import RunError, SpecError, explain_os_errors
from dmpipeline.relocation import read_spec
from dmpipeline.spec import MASK_LAWS, RunSpec
from dmpipeline.store import Run, block_digest


def extend(run: Run, n_models: int) -> Run:
    """Make room in a run for more models to fit on.

    Parameters
    ----------
    run : Run
        Complete or not.
    n_models : int
        How many it is to have, at least as many as it has; held-out ones are not counted.

    Returns
    -------
    run : Run
        The same directory with its new spec. Rows that are done stay done, but those of blocks that the old end or
        the new one cuts, which are trained again.

    Raises
    ------
    SpecError
        If the run has more models already, or is of given masks.
    RunError
        If another process is training the run, or its directory cannot be written to.
    """
    old = run.spec
    if n_models == old.n_models:
        return run
    if n_models < old.n_models:
        raise SpecError(
            f"{run.path} has {old.n_models:,} models to fit on, more than {n_models:,}; a run never shrinks, but "
            "may be read in part",
            field="n_models",
            value=n_models,
        )
    if old.masks not in MASK_LAWS:
        raise SpecError(f"{run.path} is of the masks in {old.masks}; create another run for other masks", field="masks")
    new = RunSpec(**(old.model_dump() | {"n_models": n_models}))
    with (
        explain_os_errors(run.path),
        open(run.path / "lock", "a+b") as lock,
        claimed(lock, PRESENCE_BYTE, wait=False) as alone,
    ):
        if not alone:
            raise RunError(f"{run.path} is being trained by another process; stop it, then extend", path=run.path)
        if not directory.is_settled(run.path) or read_spec(run.path) != old:
            raise RunError(f"{run.path} was extended meanwhile; open it again", path=run.path)
        directory.remove_staging(run.path)
        staging = directory.staging_folder(run.path, "extending")
        directory.create_store(staging / "store.zarr", new, run.dataset())
        done = run.digests()
        for number, rows in enumerate(new.blocks):
            _carry_over(run, staging / "store.zarr", done, number, rows, n_new=n_models - old.n_models)
        facts = run.provenance
        facts.setdefault("extensions", []).append(
            {"at": directory.now(), "n_models_before": old.n_models, "n_models": n_models}
        )
        write_beside(staging / "provenance.json", directory.as_json(facts))
        write_beside(staging / "run.yaml", new.to_yaml())
        directory.put_extended(run.path, staging)
    return Run.open(run.path)


def _carry_over(run: Run, path: Path, done: npt.NDArray[np.uint8], number: int, rows: range, *, n_new: int) -> None:
    """Give a block of the store at `path` its rows, if the run's has all of them, as they were stored."""
    old, store = run.spec, zarr.open_group(path, mode="r+", zarr_format=3)
    sources = [row if row < old.n_models else row - n_new for row in rows]
    if any(old.n_models <= row < old.n_models + n_new for row in rows):
        return
    numbers = sorted({row // old.block_models for row in sources})
    if not all(done[block].any() for block in numbers):
        return
    if numbers == [number] and old.blocks[number] == rows and sources == list(rows):
        for name in (*old.arrays, "block_digests"):
            chunks = Path(name, "c", str(number))
            _link_files(run.path / "store.zarr" / chunks, path / chunks)
        return
    # what is damaged is trained again, not carried over as if it were right
    try:
        whole = {block: run.read_block(old.blocks[block]) for block in numbers}
    except RunError:
        return
    if any(block_digest(block) != done[at].tobytes() for at, block in whole.items()):
        return
    first = old.blocks[numbers[0]].start
    places = np.array(sources) - first
    data = {name: np.concatenate([block[name] for block in whole.values()])[places] for name in old.arrays}
    for name, array in data.items():
        _array(store, name)[rows.start : rows.stop] = array
    _array(store, "block_digests")[number] = np.frombuffer(block_digest(data), np.uint8)


def _array(store: zarr.Group, name: str) -> "zarr.Array[Any]":
    array = store[name]
    if not isinstance(array, zarr.Array):
        raise TypeError(f"{name} is a group")
    return array


def _link_files(source: Path, target: Path) -> None:
    """Have the files below a folder in another place too, without copying them where the file system can."""
    for path in filter(Path.is_file, source.rglob("*")):
        into = target / path.relative_to(source)
        into.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, into)
        except OSError:
            shutil.copyfile(path, into)
