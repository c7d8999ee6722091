"""What datamodels, scores, curves and pages were made from, and whether that is still what the run has.

Each step that leaves a result in a run leaves a note with it, in the folder ``made_from``: the digest of the result, so
that one put in its place by hand is not taken for it, and the digests of what it was made from, which are the recorded
digests of the run's rows and those of other results. A result is *old* where any of these has changed since: the run
was extended, rows were trained again to other bits, datamodels were fitted or put there again. It is still what it is,
scores of 100 models are true scores of 100 models, so commands show it, and state how it was made.

Results made before there were notes, or brought from elsewhere, have none that fits them: of what they were made is
not known, and they are not called old. Only datamodels that were fitted before say how many models they were fitted on.
"""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dmpipeline.errors import RunError, explain_os_errors
from dmpipeline.runs.directory import write_beside
from dmpipeline.runs.store import Run
from dmpipeline.runs.targets import TARGETS, TargetsName, command, datamodels_path, place_of

RESULTS = ("datamodels", "evaluation", "curve", "report")
"""What is derived from a run, in the order in which it is made."""

_FOLDER = "made_from"
_COPIED_BYTES = 2**22
_MAKER = {"datamodels": "fit", "evaluation": "evaluate", "curve": "curve", "report": "report"}


class OldResultWarning(UserWarning):
    """A result was made from other rows, or other datamodels, than a run has now."""


@dataclass(frozen=True, slots=True)
class OldResult:
    """A result that was made from what a run does not have any more.

    Attributes
    ----------
    what : {"datamodels", "evaluation", "curve", "report"}
    path : str
        Of its file.
    why : str
        What it was made from, and what there is now.
    next : str
        The command to run first.
    """

    what: str
    path: str
    why: str
    next: str

    def as_dict(self) -> dict[str, str]:
        """Return all there is, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.path} is old: {self.why}; next: {self.next}"


def result_path(run: Run, what: str, targets: TargetsName = "test") -> Path:
    """Return where a result lies."""
    if what == "datamodels":
        return datamodels_path(run, targets)
    names = {"evaluation": "evaluation.json", "curve": "curve.json", "report": "report.html"}
    return place_of(run, names[what], targets)


def sources_of(run: Run, what: str, targets: TargetsName = "test") -> dict[str, Any]:
    """State what a result is made from, if it is made now; nothing of the rows is read.

    Returns
    -------
    sources : dict
        Ready for JSON: `n_models` that are fitted on, None where that is not known; `models` and `held_out`, digests of
        rows; `datamodels` and `curve`, SHA-256 of these results' files, None where there is none.
    """
    rows = run.spec.rows
    if what == "datamodels":
        return {"n_models": run.spec.n_models, "models": run.rows_digest(rows.models)}
    held_out = {"rows": [rows.held_out.start, rows.held_out.stop], "held_out": run.rows_digest(rows.held_out)}
    if what == "curve":
        return {"n_models": run.spec.n_models, "models": run.rows_digest(rows.models)} | held_out
    sources = {"n_models": n_models_of(run, targets), "datamodels": _digest(run, "datamodels", targets)} | held_out
    return sources if what == "evaluation" else sources | {"curve": _digest(run, "curve", targets)}


def take_note(
    run: Run, what: str, targets: TargetsName, sources: Mapping[str, Any], options: Sequence[str] = ()
) -> None:
    """Note what a result that is in place was made from.

    Parameters
    ----------
    run : Run
    what, targets
        Which result.
    sources : mapping
        As `sources_of` stated them before the result was made.
    options : sequence of str
        Words with which the command that made it is to be run again.

    Raises
    ------
    RunError
        If the note cannot be written.
    """
    path = result_path(run, what, targets)
    with explain_os_errors(path, "read"):
        state, sha256 = path.stat(), _sha256(path)
    facts = {
        "file": path.relative_to(run.path).as_posix(),
        "sha256": sha256,
        "n_bytes": state.st_size,
        "mtime_ns": state.st_mtime_ns,
        "made_from": dict(sources),
        "options": list(options),
    }
    note = _note_path(run, what, targets)
    with explain_os_errors(note):
        note.parent.mkdir(exist_ok=True)
    write_beside(note, json.dumps(facts, indent=2) + "\n")


def is_from_elsewhere(run: Run, targets: TargetsName = "test") -> bool:
    """Return whether a run's datamodels are known not to be those that were fitted in it last."""
    note = _read_note(run, "datamodels", targets)
    return note is not None and not _is_of(note, result_path(run, "datamodels", targets))


def n_models_of(run: Run, targets: TargetsName = "test") -> int | None:
    """Return how many models a run's datamodels were fitted on; None where it was not noted."""
    note = _read_note(run, "datamodels", targets)
    if note is None:
        return _count_in_notes_of_the_fit(run, targets)
    if not _is_of(note, result_path(run, "datamodels", targets)):
        return None
    count = note["made_from"].get("n_models")
    return count if isinstance(count, int) else None


def old_result(run: Run, what: str, targets: TargetsName = "test") -> OldResult | None:
    """Find out whether a result is old; None where it is not, is not there, or is of unknown origin."""
    path = result_path(run, what, targets)
    if not path.is_file():
        return None
    note = _read_note(run, what, targets)
    if note is not None and not _is_of(note, path):
        note = None
    if what == "datamodels":
        why, maker = _why_datamodels(run, note, targets), what
    elif note is None:
        return None
    else:
        why, maker = _why_other(run, what, note, targets)
    if why is None:
        return None
    options = note["options"] if note is not None and maker == what else []
    return OldResult(what, str(path), why, _next(run, maker, targets, options))


def old_results(run: Run) -> list[OldResult]:
    """List a run's results that are old, in the order in which they are to be made again."""
    found = (old_result(run, what, targets) for targets in TARGETS for what in RESULTS)
    return [old for old in found if old is not None]


def warn_of_old_datamodels(run: Run, targets: TargetsName = "test", *, stacklevel: int = 3) -> None:
    """Issue an `OldResultWarning` if a run's datamodels are old."""
    if old := old_result(run, "datamodels", targets):
        warnings.warn(str(old), OldResultWarning, stacklevel=stacklevel)


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Suppress `OldResultWarning` while the block runs, where the same is reported in another way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OldResultWarning)
        yield


def _why_datamodels(run: Run, note: Mapping[str, Any] | None, targets: TargetsName) -> str | None:
    n_models = n_models_of(run, targets)
    if n_models is not None and n_models != run.spec.n_models:
        return f"fitted on {n_models:,} models, the run has {run.spec.n_models:,}"
    if note is not None and note["made_from"].get("models") != _rows_digest(run, run.spec.rows.models):
        return f"some of the {run.spec.n_models:,} models it was fitted on have been trained again since, or are gone"
    return None


def _why_other(run: Run, what: str, note: Mapping[str, Any], targets: TargetsName) -> tuple[str | None, str]:
    """State why an evaluation, a curve or a page is old, and which result is to be made again first."""
    made_from, spec = note["made_from"], run.spec
    if what == "curve":
        if made_from.get("n_models") != spec.n_models:
            return f"drawn when the run had {made_from.get('n_models'):,} models, it has {spec.n_models:,}", what
        if made_from.get("models") != _rows_digest(run, spec.rows.models):
            return "some of the models it was drawn of have been trained again since, or are gone", what
    elif made_from.get("datamodels") != _digest(run, "datamodels", targets):
        return _other_datamodels(made_from.get("n_models"), n_models_of(run, targets)), what
    elif old := old_result(run, "datamodels", targets):
        return f"it is of datamodels that are old: {old.why}", "datamodels"
    if made_from.get("held_out") != _rows_digest(run, spec.rows.held_out):
        moved = made_from.get("rows") != [spec.rows.held_out.start, spec.rows.held_out.stop]
        why = "the run was extended" if moved else "held-out models were trained again, or are gone,"
        return f"{why} since it was made", what
    if what == "report" and made_from.get("curve") != _digest(run, "curve", targets):
        return "the learning curve was drawn, replaced or removed since it was written", what
    return None, what


def _other_datamodels(before: Any, now: int | None) -> str:
    """State how datamodels differ from those in place now: by how many models they were fitted on, if that differs."""
    if isinstance(before, int) and now is not None and before != now:
        return f"it is of datamodels of {before:,} models, those in place now are of {now:,}"
    return "it is of other datamodels than those in place now"


def _rows_digest(run: Run, rows: slice) -> str | None:
    """Digest rows; None where that cannot be told: digests are damaged, or another process is changing the run."""
    try:
        return run.rows_digest(rows)
    except RunError:
        return None


def _next(run: Run, maker: str, targets: TargetsName, options: Sequence[str]) -> str:
    """Name the command to run first: models that are missing are trained before anything is made of them."""
    if run.n_rows_done < run.spec.n_rows:
        return command(run.path, "run")
    return command(run.path, _MAKER[maker], targets, options)


def _note_path(run: Run, what: str, targets: TargetsName) -> Path:
    return place_of(run, f"{_FOLDER}/{what}.json", targets)


def _read_note(run: Run, what: str, targets: TargetsName) -> dict[str, Any] | None:
    """Read a note; None where there is none that can be read: what is not known is not old."""
    try:
        facts = json.loads(_note_path(run, what, targets).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    match facts:
        case {"sha256": str(), "n_bytes": int(), "mtime_ns": int(), "made_from": dict(), "options": list(options)}:
            return facts if all(isinstance(word, str) for word in options) else None
    return None


def _is_of(note: Mapping[str, Any], path: Path) -> bool:
    """Return whether a file is the one that a note was taken of."""
    try:
        state = path.stat()
        # an untouched file needs no digest: a fit may take gigabytes
        if (state.st_size, state.st_mtime_ns) == (note["n_bytes"], note["mtime_ns"]):
            return True
        return bool(state.st_size == note["n_bytes"] and _sha256(path) == note["sha256"])
    except OSError:
        return False


def _digest(run: Run, what: str, targets: TargetsName) -> str | None:
    """Digest a result's file; None where there is none."""
    path, note = result_path(run, what, targets), _read_note(run, what, targets)
    if note is not None and _is_of(note, path):
        return str(note["sha256"])
    try:
        return _sha256(path)
    except OSError:
        return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_COPIED_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _count_in_notes_of_the_fit(run: Run, targets: TargetsName) -> int | None:
    """Read how many models a fit was made on, from what fits recorded before there were notes."""
    path = result_path(run, "datamodels", targets)
    try:
        count = json.loads(place_of(run, f"{path.parent.name}/fit.json", targets).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    count = count.get("n_models") if isinstance(count, dict) and path.is_file() else None
    return count if isinstance(count, int) and not isinstance(count, bool) else None
