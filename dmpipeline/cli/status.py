"""How far a run is and how fast it goes, by what lies in its store: true also while others train it, or were killed.

A block's digest is a file of its own that is written when the block is done, so those files' times show the rate,
whichever process trains, and wherever.
"""

import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from dmpipeline.draws.subsets import sizes_of
from dmpipeline.errors import explain_os_errors, quoted
from dmpipeline.runs.derivation import old_results
from dmpipeline.runs.directory import done_blocks, require_run
from dmpipeline.runs.learned import Learned, what_was_learned
from dmpipeline.runs.store import Run
from dmpipeline.runs.targets import datamodels_path
from dmpipeline.spec import MASK_LAWS

_WINDOW_SECONDS = 1200.0
_WINDOW_BLOCKS = 10
_FEW_BLOCKS = 4
# A pause is longer than any block: ten times as long as between blocks usually, and a minute at least.
_PAUSE_IN_MEDIANS = 10
_LEAST_PAUSE_SECONDS = 60.0


def models_per_second(run: Run) -> float | None:
    """Return how fast models were trained lately, by all who train the run together; None where it is not known.

    Told by the blocks of the last twenty minutes of training or the last ten blocks, whichever are more, but not across
    a pause. Where those are few, or the run is done, sessions on record tell, if there are any: they know when the
    first of its blocks was begun.
    """
    finished = _last_stretch(_finished(run))
    last = finished[-1][0] if finished else 0.0
    recent = [block for block in finished if last - block[0] <= _WINDOW_SECONDS]
    recent = max(recent, finished[-_WINDOW_BLOCKS - 1 :], key=len)
    sessions = run.provenance["sessions"]
    trained, spent = (sum(session[name] for session in sessions) for name in ("n_rows", "seconds"))
    if spent and (len(recent) <= _FEW_BLOCKS or run.n_rows_done == run.spec.n_rows):
        return float(trained / spent)
    seconds = last - recent[0][0] if recent else 0.0
    # the first block's time is when the clock starts, its rows came before
    return sum(len(run.spec.blocks[block]) for _, block in recent[1:]) / seconds if seconds else None


def run_facts(run: Run, learned: Learned | None = None) -> dict[str, Any]:
    """State a run's progress and what its models have learned, as ``dmpipeline status --json`` prints it."""
    learned = learned or what_was_learned(run)
    spec, done, rate = run.spec, run.n_rows_done, models_per_second(run)
    left = spec.n_rows - done
    failures = [
        {"block": block, "rows": [spec.blocks[block].start, spec.blocks[block].stop], "traceback": text}
        for block, text in run.failures().items()
        if block < len(spec.blocks)
    ]
    return {
        "run": str(run.path),
        "dataset": spec.dataset,
        "alpha": spec.alpha if spec.masks in MASK_LAWS else None,
        "masks": spec.masks,
        "subsets": sizes.as_dict() if (sizes := sizes_of(run.spec, run.provenance)) else None,
        "recipe": f"{spec.recipe.name}@{spec.recipe.version}",
        "n_rows": spec.n_rows,
        "n_rows_done": done,
        "models_per_second": rate,
        "seconds_left": left / rate if rate else None,
        "datamodels": run.datamodels_path.exists(),
        "train_datamodels": datamodels_path(run, "train").exists(),
        "old": [old.as_dict() for old in old_results(run)],
        "failures": failures,
        "sessions": run.provenance["sessions"],
        **learned.as_dict(),
        "warnings": learned.texts + _failed(run, failures),
    }


def _failed(run: Run, failures: list[dict[str, Any]]) -> list[str]:
    """Warn of blocks that could not be trained, as where nearly all models diverged."""
    if not failures:
        return []
    start, stop = failures[0]["rows"]
    why = (failures[0]["traceback"].strip().splitlines() or ["for no reason on record"])[-1]
    which = f"{len(failures)} of {len(run.spec.blocks)} blocks"
    return [
        f"{which} could not be trained, rows {start} to {stop - 1} first: {why}"
        f"; see all of it with `dmpipeline status -v {quoted(run.path)}`"
    ]


def runs_in(directory: Path) -> list[Path]:
    """List the runs that lie side by side in a directory; the directory itself if it is one.

    Raises
    ------
    RunError
        If there is none.
    """
    with explain_os_errors(directory, "opened"):
        if not (directory / "run.yaml").is_file() and (found := sorted(directory.glob("*/run.yaml"))):
            return [path.parent for path in found]
    require_run(directory)
    return [directory]


def _finished(run: Run) -> list[tuple[float, int]]:
    """List blocks that are done, with the time each was, oldest first."""
    return sorted((when, block) for block, when in done_blocks(run.path).items() if block < len(run.spec.blocks))


def _last_stretch(finished: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Cut off what comes before the last pause, unless too little came since; empty where nothing can be told."""
    gaps = [later[0] - earlier[0] for earlier, later in pairwise(finished)]
    if not gaps:
        return []
    pause = max(_LEAST_PAUSE_SECONDS, _PAUSE_IN_MEDIANS * statistics.median(gaps))
    cuts = [0, *(place + 1 for place, gap in enumerate(gaps) if gap > pause), len(finished)]
    stretches = [finished[start:stop] for start, stop in pairwise(cuts) if stop - start > 1]
    return stretches[-1] if stretches else []
