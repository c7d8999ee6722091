"""A run as its users hold it: what lies in it is read by `StoredRun`; creating and training it are handed on.

What creates and trains is imported when it is first needed: reading a run does without torch.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from dmdata.reading.long_work import shows_count
from dmpipeline.runs.rows import RowArrays
from dmpipeline.runs.stored import RowProgress, StoredRun
from dmpipeline.spec import RunSpec

if TYPE_CHECKING:
    from dmpipeline.data.examples import Dataset
    from dmpipeline.training.ensembles import Method
    from dmpipeline.training.train import Trainer, Way

__all__ = ["RowProgress", "Run", "opened"]


@dataclass(frozen=True, slots=True, repr=False)
class Run(StoredRun):
    """A run on disk, to be read and trained; made by `create` or `open`."""

    @classmethod
    def create(cls, path: str | Path, spec: RunSpec, *, dataset: "Dataset | None" = None) -> Self:
        """Create a run, or open the one that is there if its spec is the same.

        Parameters
        ----------
        path : path
        spec : RunSpec
        dataset : Dataset, optional
            What the spec names, where it has been loaded as `models.settling.settle` loads it.

        Raises
        ------
        SpecError
            If the dataset, its subsets or the recipe cannot be used.
        RunExistsError
            If the path holds another spec's run, or anything else but what a killed creation left.
        RunError
            If the directory cannot be made or written to.
        """
        from dmpipeline.runs import creation

        path = Path(path).absolute()
        creation.create(path, spec.located(Path.cwd()), dataset)
        return cls.open(path)

    @shows_count("training", "models")
    def train(
        self,
        progress: RowProgress | None = None,
        *,
        device: str = "cpu",
        way: "Way | None" = None,
        blocks: Sequence[int] | None = None,
    ) -> None:
        """Train and store the blocks that are missing, then write the catalog.

        From the first block on, models that have not learned are warned of by an `errors.LearningWarning`.
        Holds one block's outputs in memory, or two where threads train: one is stored while the next is trained.

        Parameters
        ----------
        progress : callable, optional
            Called with (rows done, rows in total) at the start and after each block; rows that other processes finished
            count.
        device : str
            As torch names it.
        way : Way, optional
            How to train, from here on; otherwise as the run was trained on such a device before, or as is found to be
            the fastest.
        blocks : sequence of int, optional
            Only these.

        Raises
        ------
        TrainingError
            If a model's outputs cannot be stored; its block is left out, blocks before it stay.
        RunError
            If the dataset, the user's own code or masks have changed since the run was created, or its directory cannot
            be written to.
        SpecError
            If the device or the way cannot be used.
        """
        from dmpipeline.runs import preparation, training

        training.train(preparation.Prepared.of(self), progress, device=device, way=way, blocks=blocks)

    def find_way(self, device: str = "cpu", method: "Method | None" = None, n_models: int | None = None) -> "Way":
        """Settle how to train; see `preparation.Prepared.find_way`."""
        from dmpipeline.runs.preparation import Prepared

        return Prepared.of(self).find_way(device, method, n_models)

    def trainer(self, device: str = "cpu", way: "Way | None" = None, *, lock: IO[bytes] | None = None) -> "Trainer":
        """Make what trains this run's rows; see `preparation.Prepared.trainer`."""
        from dmpipeline.runs.preparation import Prepared

        return Prepared.of(self).trainer(device, way, lock=lock)

    def train_rows(self, trainer: "Trainer", rows: Sequence[int]) -> RowArrays:
        """Train some rows; nothing is stored."""
        from dmpipeline.runs.training import RowTrainer

        return RowTrainer(self, trainer).rows(rows)

    def presence(self) -> AbstractContextManager[IO[bytes]]:
        """Be one of those who train the run; see `training.presence`."""
        from dmpipeline.runs.training import presence

        return presence(self)

    def record_sessions(self, lock: IO[bytes], sessions: Sequence[dict[str, Any]]) -> None:
        """Put on record what was trained where; see `training.record_sessions`."""
        from dmpipeline.runs.training import record_sessions

        record_sessions(self, lock, sessions)


def opened(run: "Run | str | os.PathLike[str]") -> Run:
    """Return a run, which is opened where its directory was given."""
    return run if isinstance(run, Run) else Run.open(Path(run).expanduser())
