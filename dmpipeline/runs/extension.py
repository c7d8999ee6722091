"""More models for a run that is there: its rows keep what they hold, and the new ones are missing until trained.

Held-out models lie behind those to fit on, so they move. All new files are made next to the old ones first, chunks that
stay where they are as hard links; then they are put in place together. Killed at any moment, the run is the old one or
the new one.
"""

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from dmpipeline.data.examples import Dataset
from dmpipeline.errors import RunError, SpecError, explain_os_errors
from dmpipeline.runs import directory
from dmpipeline.runs.creation import create_store
from dmpipeline.runs.directory import PRESENCE_BYTE, claimed, write_beside
from dmpipeline.runs.pinned import pin
from dmpipeline.runs.preparation import Prepared
from dmpipeline.runs.relocation import read_spec
from dmpipeline.runs.rows import DIGEST_BYTES, PartialBlock, block_digest, row_digests, some
from dmpipeline.runs.store import Run
from dmpipeline.spec import MASK_LAWS, RunSpec


def extend(run: Run, n_models: int, *, dataset: Dataset | None = None) -> Run:
    """Make room in a run for more models to fit on.

    Parameters
    ----------
    run : Run
        Complete or not.
    n_models : int
        How many it is to have, at least as many as it has; held-out ones are not counted.
    dataset : Dataset, optional
        The run's, where it is at hand.

    Returns
    -------
    run : Run
        The same directory with its new spec. Rows that are done stay done, also of blocks that the old end or the new
        one cuts; only rows that are damaged are trained again.

    Raises
    ------
    SpecError
        If the run has more models already, or is of given masks.
    RunError
        If another process is training the run, its directory cannot be written to, or, as for `Run.train`, its dataset
        or the user's own code has changed. The run is left as it was.
    """
    old, new = run.spec, extended_spec(run, n_models)
    if new == old:
        return run
    # whatever training would refuse, before anything is moved
    dataset = Prepared.of(run, dataset).dataset
    with _alone_with(run):
        if not directory.is_settled(run.path) or read_spec(run.path) != old:
            raise RunError(f"{run.path} was extended meanwhile; open it again", path=run.path)
        directory.remove_staging(run.path)
        staging = directory.staging_folder(run.path, "extending")
        store = create_store(staging / "store.zarr", new, dataset)
        _carry_over(run, store, staging / "store.zarr", new)
        facts = run.provenance
        facts.setdefault("extensions", []).append(
            {"at": directory.now(), "n_models_before": old.n_models, "n_models": n_models}
        )
        write_beside(staging / "provenance.json", directory.as_json(facts | pin(new)))
        write_beside(staging / "run.yaml", new.to_yaml())
        directory.put_extended(run.path, staging)
    return Run.open(run.path)


def require_alone(run: Run) -> None:
    """Refuse to extend a run that another process trains; nothing is changed.

    Raises
    ------
    RunError
    """
    with _alone_with(run):
        pass


@contextmanager
def _alone_with(run: Run) -> Iterator[None]:
    """Hold a run that no process trains, and that none will train meanwhile."""
    with (
        explain_os_errors(run.path),
        open(run.path / "lock", "a+b") as lock,
        claimed(lock, PRESENCE_BYTE, wait=False) as is_alone,
    ):
        if not is_alone:
            raise RunError(f"{run.path} is being trained by another process; stop it, then extend", path=run.path)
        yield


def extended_spec(run: Run, n_models: int) -> RunSpec:
    """Return the spec of a run with more models to fit on; nothing is changed.

    Raises
    ------
    SpecError
        If the run has more models already, or is of given masks.
    """
    old = run.spec
    if n_models < old.n_models:
        raise SpecError(
            f"{run.path} has {old.n_models:,} models to fit on, more than {n_models:,}; a run never shrinks, but "
            "may be read in part",
            field="n_models",
            value=n_models,
        )
    if n_models > old.n_models and old.masks not in MASK_LAWS:
        raise SpecError(f"{run.path} is of the masks in {old.masks}; create another run for other masks", field="masks")
    return RunSpec(**(old.model_dump() | {"n_models": n_models}))


def _carry_over(run: Run, store: zarr.Group, path: Path, new: RunSpec) -> None:
    """Put into each block of the new store at `path` the rows that the run's store has of it, as they were stored.

    Blocks that stay what they are become hard links. Of others every sound row is written; where rows are missing, each
    with a digest of its own instead of the block's. A block of the old store that is damaged has no sound rows.
    """
    old, n_new = run.spec, new.n_models - run.spec.n_models
    done = run.digests()

    @functools.lru_cache(maxsize=2)
    def sound(number: int) -> PartialBlock | None:
        rows = old.blocks[number]
        try:
            if not done[number].any():
                return run.read_partial(rows) if number in cut else None
            block = run.read_block(rows)
        except RunError:
            return None
        is_sound = block_digest(block) == done[number].tobytes()
        return PartialBlock(block, np.ones(len(rows), np.bool_)) if is_sound else None

    cut = directory.cut_blocks(run.path)
    for number, rows in enumerate(new.blocks):
        # -1 for rows that are new
        sources = np.array([row if row < old.n_models else row - n_new for row in rows])
        sources[[old.n_models <= row < new.n_models for row in rows]] = -1
        is_same = number < len(old.blocks) and old.blocks[number] == rows and (sources == list(rows)).all()
        if is_same and done[number].any():
            for name in (*old.arrays, *_per_row(run, store), "block_digests"):
                chunks = Path(name, "c", str(number))
                _link_files(run.path / "store.zarr" / chunks, path / chunks)
            continue
        _write_rows(run, store, number, rows, sources, sound)


def _write_rows(
    run: Run,
    store: zarr.Group,
    number: int,
    rows: range,
    sources: npt.NDArray[np.int64],
    sound: Callable[[int], PartialBlock | None],
) -> None:
    """Write a block's rows that are there; `sources` says in which rows of the old store, -1 for none."""
    step, names = run.spec.block_models, (*run.spec.arrays, *_per_row(run, store))
    data = {name: np.asarray(_array(store, name)[rows.start : rows.stop]) for name in names}
    is_there = np.zeros(len(rows), np.bool_)
    for source in sorted({int(row) // step for row in sources[sources >= 0]}):
        if (found := sound(source)) is None:
            continue
        places = np.flatnonzero((sources >= 0) & (sources // step == source))
        taken = sources[places] - source * step
        places, taken = places[found.is_done[taken]], taken[found.is_done[taken]]
        for name, array in found.block.items():
            data[name][places] = array[taken]
        for name in _per_row(run, store):
            data[name][places] = run.scores(run.spec.blocks[source])[taken]
        is_there[places] = True
    if not is_there.any():
        return
    for name, array in data.items():
        _array(store, name)[rows.start : rows.stop] = array
    block = {name: data[name] for name in run.spec.arrays}
    if is_there.all():
        _array(store, "block_digests")[number] = np.frombuffer(block_digest(block), np.uint8)
        return
    digests = np.zeros((len(rows), DIGEST_BYTES), np.uint8)
    digests[is_there] = row_digests(some(block, np.flatnonzero(is_there)))
    _array(store, "row_digests")[rows.start : rows.stop] = digests


def _per_row(run: Run, store: zarr.Group) -> list[str]:
    """Name arrays with a row for each model that are not outputs, where both stores have them."""
    return [name for name in directory.PER_ROW if name in run.arrays and name in store]


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
