"""Training a run: which blocks are missing, how they are trained, and how they come into the store.

Models are trained and stored in blocks that are whole chunks. A block's data are written first and its digest, the
SHA-256 of the data, last: a block without a digest was never finished and is trained again, one with a digest never is.
So a run killed at any moment loses the blocks in flight and nothing else, and a creation that was killed is begun again
by the next. Several processes may train one run; `claims` decides which of them trains a block.
"""

import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from dmdata import phases
from dmdata.errors import FactualError
from dmpipeline.draws.masks import subset_masks
from dmpipeline.errors import RunError, TrainingError, explain_os_errors, quoted
from dmpipeline.runs import directory
from dmpipeline.runs.claims import LOOK_AGAIN_SECONDS, Claims
from dmpipeline.runs.directory import PRESENCE_BYTE, PROVENANCE_BYTE, claimed, write_beside
from dmpipeline.runs.learned import Watch
from dmpipeline.runs.pinned import pin, spec_digest
from dmpipeline.runs.preparation import Prepared
from dmpipeline.runs.relocation import read_spec
from dmpipeline.runs.rows import RowArrays, block_digest
from dmpipeline.runs.stored import RowProgress, StoredRun
from dmpipeline.training.scores import measure
from dmpipeline.training.train import Trainer, Way

Measured = tuple[RowArrays, npt.NDArray[np.float64]]
"""A block that was trained, and its models' scores: see `scores.SCORES`."""

_log = logging.getLogger(__name__)


def train(
    prepared: Prepared,
    progress: RowProgress | None = None,
    *,
    device: str = "cpu",
    way: Way | None = None,
    blocks: Sequence[int] | None = None,
) -> None:
    """Train and store the blocks of a run that are missing, then write its catalog; see `Run.train`."""
    run, report = prepared.run, progress or (lambda *_: None)
    n_reported = run.n_rows_done
    report(n_reported, run.spec.n_rows)
    with presence(run) as lock:
        trainer = prepared.trainer(device, way, lock=lock)
        began, clock, n_trained = directory.now(), time.monotonic(), 0
        watch = Watch(run, prepared.dataset)
        claims = Claims(run.path, run.spec.blocks, lock, uuid.uuid4().hex)
        wanted = range(len(run.spec.blocks)) if blocks is None else blocks
        n_left = len(set(wanted) - directory.done_blocks(run.path).keys())
        phases.phase(f"first block of {n_left}")
        try:
            with closing(RowTrainer(run, trainer).missing(claims, wanted)) as stored:
                for n_rows in stored:
                    if n_rows is None:
                        time.sleep(LOOK_AGAIN_SECONDS)
                    n_trained += n_rows or 0
                    if (n_done := run.n_rows_done) == n_reported:
                        continue
                    n_reported = n_done
                    phases.phase("")
                    watch.look()
                    report(n_done, run.spec.n_rows)
        finally:
            claims.clear(directory.done_blocks(run.path))
            if n_trained:
                seconds = time.monotonic() - clock
                record_sessions(run, lock, [directory.session(began, seconds, n_trained, trainer.way, device)])
    report(run.n_rows_done, run.spec.n_rows)
    if run.n_rows_done == run.spec.n_rows:
        run.write_catalog(dataset=prepared.dataset)


@contextmanager
def presence(run: StoredRun) -> Iterator[IO[bytes]]:
    """Be one of those who train the run, so that nobody extends it; yields its open lock file.

    One at a time in a process: closing any handle of that file drops all that the process holds of it.

    Raises
    ------
    RunError
        If the run was extended since it was opened, or its directory cannot be written to.
    """
    with (
        explain_os_errors(run.path),
        open(run.path / "lock", "a+b") as lock,
        claimed(lock, PRESENCE_BYTE, wait=True, shared=True),
    ):
        if not directory.is_settled(run.path) or read_spec(run.path) != run.spec:
            raise RunError(f"{run.path} was extended meanwhile; open it again", path=run.path)
        yield lock


def record_sessions(run: StoredRun, lock: IO[bytes], sessions: Sequence[dict[str, Any]]) -> None:
    """Put on record what was trained where; see `directory.session`. The caller is present."""
    with claimed(lock, PROVENANCE_BYTE, wait=True):
        facts = run.provenance
        facts["sessions"] += [session | {"spec_digest": spec_digest(run.spec)} for session in sessions]
        facts |= {} if "spec" in facts else pin(run.spec)  # a run made before specs were pinned
        write_beside(run.path / "provenance.json", directory.as_json(facts))


@dataclass(frozen=True, slots=True)
class RowTrainer:
    """Trains rows of a run, and stores them.

    Attributes
    ----------
    run : StoredRun
    trainer : Trainer
        As `Prepared.trainer` makes it.
    """

    run: StoredRun
    trainer: Trainer

    def rows(self, rows: Sequence[int]) -> RowArrays:
        """Train some rows; nothing is stored."""
        with self.trainer.workers():
            return self._start(rows)()[0]

    def missing(
        self,
        claims: Claims,
        wanted: Sequence[int] | None = None,
        *,
        may_start: Callable[[], bool] = lambda: True,
        n_others: int = 0,
    ) -> Generator[int | None]:
        """Train the blocks that are not done and that nobody else has claimed.

        Blocks that others have claimed, or begun and left, come last, one by one; so nobody waits while it has a claim.

        Parameters
        ----------
        claims : Claims
        wanted : sequence of int, optional
            Only these blocks.
        may_start : callable
            Returns whether another block may be started; otherwise those that are started are stored, and no others.
        n_others : int
            How many other processes would take blocks; a block is started ahead only if some are left for them.

        Yields
        ------
        n_rows : int or None
            How many rows a block took, once it is stored; None where others have claimed all that is left, to be asked
            again after a moment.

        Raises
        ------
        TrainingError
            If nothing can be trained, as where a device lacks memory.
        Exception
            What went wrong in training; its traceback is on record. Not where `claims` carry on.
        """
        path, again = self.run.path, False
        done, wanted = directory.done_blocks(path), range(len(self.run.spec.blocks)) if wanted is None else wanted
        left = [block for block in wanted if block not in done]
        started: deque[tuple[int, int, Callable[[], Measured], ExitStack]] = deque()

        def start(block: int) -> bool:
            with ExitStack() as claim:
                is_ours = claim.enter_context(claims.claimed(block, again=again))
                if not is_ours or directory.is_stored(path, block):
                    return False
                claim.enter_context(claims.failures(block))
                n_rows, trained = self._start_block(block)
                started.append((block, n_rows, trained, claim.pop_all()))
            return True

        def finish_first() -> int:
            block, n_rows, trained, claim = started.popleft()
            with claim:
                if self._finish(block, trained):
                    return n_rows
            return 0

        with claims, ExitStack() as working:
            if left:
                self._prepare(left[0], working)
            try:
                while left and may_start():
                    n_started, n_ahead = 0, 1 if again else self.trainer.n_ahead
                    for place, block in enumerate(left):
                        if started and not claims.are_free(n_others, left[place:]):
                            yield finish_first()
                        if not may_start():
                            break
                        if directory.is_stored(path, block) or not start(block):
                            continue
                        n_started += 1
                        if len(started) == n_ahead:
                            yield finish_first()
                        if claims.is_hopeless():
                            return
                    while started:
                        yield finish_first()
                    failed = claims.failed()
                    left = [block for block in left if block not in failed and not directory.is_stored(path, block)]
                    if again and left and not n_started:
                        yield None
                    again = True
            finally:
                for *_, claim in started:
                    claim.close()

    def _prepare(self, block: int, working: ExitStack) -> None:
        """Enter the trainer's `workers`; what goes wrong is on record as a failure of the first block to train."""
        with self._failure_on_record(block):
            try:
                working.enter_context(self.trainer.workers())
            except FactualError:
                raise
            except Exception as error:
                cause = f"{type(error).__name__}: {error}".splitlines()[0]
                raise TrainingError(
                    f"training the models of {self.run.path} could not be prepared ({cause}); see all of it with "
                    f"`dmpipeline status -v {quoted(self.run.path)}`"
                ) from error

    def _start(self, rows: Sequence[int]) -> Callable[[], Measured]:
        masks = subset_masks(self.run.spec, rows, self.trainer.dataset.n_train)
        trained = self.trainer.start(masks, self.run.spec.model_indices(rows), rows)
        return lambda: measure(self.run.spec.arrays, self.trainer.dataset, masks, trained())

    def _start_block(self, block: int) -> tuple[int, Callable[[], Measured]]:
        """Start training the rows of a block that are missing; return how many, and what returns the whole block."""
        rows = self.run.spec.blocks[block]
        with self._failure_on_record(block):
            if block not in directory.cut_blocks(self.run.path):
                return len(rows), self._start(rows)
            there = self.run.read_partial(rows)
            scores = self.run.scores(rows)
            if not there.missing:
                return 0, lambda: (there.block, scores)
            trained = self._start([rows[place] for place in there.missing])

            def filled() -> Measured:
                block, scores[~there.is_done] = trained()
                return there.filled(block), scores

            return len(there.missing), filled

    @contextmanager
    def _failure_on_record(self, block: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            rows = self.run.spec.blocks[block]
            directory.record_failure(self.run.path, block, rows, error)
            _log.info("rows %d to %d of %s could not be trained", rows.start, rows.stop - 1, self.run.path)
            raise

    def _finish(self, block: int, trained: Callable[[], Measured]) -> bool:
        """Wait for a block and store it, unless another process did because this one was stopped meanwhile."""
        rows = self.run.spec.blocks[block]
        with self._failure_on_record(block):
            data, scores = trained()
        if directory.is_stored(self.run.path, block):
            return False
        # compressed side by side: one thread would keep many cores waiting
        with ThreadPoolExecutor(len(data)) as pool:
            digest = pool.submit(block_digest, data)
            list(pool.map(lambda name: self._write(name, rows, data[name]), data))
        if "model_scores" in self.run.arrays:  # not in runs of before there were any
            self._write("model_scores", rows, scores)
        if directory.is_stored(self.run.path, block):  # or while it wrote: the same bytes, which are the other's
            return False
        self._write("block_digests", range(block, block + 1), np.frombuffer(digest.result(), np.uint8)[None])
        directory.forget_failure(self.run.path, block)
        _log.info("stored rows %d to %d of %s", rows.start, rows.stop - 1, self.run.path)
        return True

    def _write(self, name: str, rows: range, data: npt.NDArray[Any]) -> None:
        # to look first whether all of it is missing values, and need not be written, takes longer than to write it
        self.run.array(name).with_config({"write_empty_chunks": True})[rows.start : rows.stop] = data
