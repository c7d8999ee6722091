"""Whether what a run stores is what its spec says, found out by reading all of it.

Blocks are read one at a time, so memory is bounded by a block and two short digests a row. Nothing that is damaged
stops the reading: each check ends in a finding that says what is wrong and in which rows.
"""

import hashlib
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dmpipeline.datasets import Dataset
from dmpipeline.errors import RunError, SpecError
from dmpipeline.masks import draw_masks, subset_size
from dmpipeline.outputs import correct_class_margins
from dmpipeline.store import ARRAYS, Block, Progress, Run, block_digest

CHECKS = {
    "dataset": "the dataset is the one the run was created with",
    "arrays": "arrays have the shapes and dtypes of the spec",
    "complete": "no row is missing",
    "digests": "every block has the bytes it was stored with",
    "finite": "all outputs are finite",
    "mask_sizes": "every mask has exactly the spec's number of examples",
    "masks": "every mask is the one its seed draws",
    "margins": "margins equal those of the logits, to the bit",
    "duplicates": "no two rows share a subset, unless declared retrainings, nor logits",
}
"""What is checked, in the order of the findings, and what holds where it passed."""

_SINGULAR = {"have": "has", "are": "is"}


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check.

    Attributes
    ----------
    check : str
        One of CHECKS.
    passed : bool
    detail : str
        What holds, or what does not and where; for people.
    """

    check: str
    passed: bool
    detail: str


def verify_run(run: Run, progress: Progress | None = None) -> list[Finding]:
    """Check a run against its spec.

    Parameters
    ----------
    run : Run
        Complete or not: missing rows are a finding.
    progress : callable, optional
        Called with (rows read, rows in all) after each block.

    Returns
    -------
    findings : list of Finding
        One for each of CHECKS, in their order. A check whose ground is missing (no dataset, no array) fails too.
    """
    notes = _Notes()
    dataset = _find_dataset(run, notes)
    if not _check_arrays(run, dataset, notes):
        for check in CHECKS:
            if check not in ("dataset", "arrays"):
                notes.add(check, "could not be checked without the arrays")
        return notes.findings()
    if dataset is None:
        notes.add("margins", "could not be checked without the dataset's labels")
    digests = run.digests()
    duplicates = _Duplicates()
    for number, rows in enumerate(run.spec.blocks):
        if not digests[number].any():
            notes.add_rows("complete", "are missing", rows)
        elif (block := _read(run, rows, notes)) is not None:
            if block_digest(block) != digests[number].tobytes():
                notes.add_rows("digests", "are not what was stored", rows)
            _check_block(run, rows, block, dataset, notes)
            duplicates.check(run, rows, block, notes)
        if progress is not None:
            progress(rows.stop, run.spec.n_rows)
    return notes.findings()


@dataclass(slots=True)
class _Notes:
    """What is wrong, by check: sentences, and rows gathered under one sentence each."""

    sentences: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    rows: dict[tuple[str, str], list[int]] = field(default_factory=lambda: defaultdict(list))

    def add(self, check: str, sentence: str) -> None:
        self.sentences[check].append(sentence)

    def add_rows(self, check: str, what: str, rows: range | list[int]) -> None:
        self.rows[check, what].extend(rows)

    def findings(self) -> list[Finding]:
        wrong = {check: list(sentences) for check, sentences in self.sentences.items()}
        for (check, what), rows in self.rows.items():
            if rows:
                wrong.setdefault(check, []).append(_sentence(rows, what))
        return [
            Finding(check, check not in wrong, "; ".join(wrong.get(check, [holds]))) for check, holds in CHECKS.items()
        ]


def _find_dataset(run: Run, notes: _Notes) -> Dataset | None:
    try:
        return run.dataset()
    except (RunError, SpecError) as error:
        notes.add("dataset", str(error))
        return None


def _check_arrays(run: Run, dataset: Dataset | None, notes: _Notes) -> bool:
    """Compare shapes and dtypes with the spec; without a dataset, sizes are those the arrays agree on."""
    try:
        arrays = {name: run.array(name) for name in (*ARRAYS, "block_digests")}
    except RunError as error:
        notes.add("arrays", str(error))
        return False
    try:
        run.digests()
    except RunError as error:
        notes.add("arrays", f"block_digests cannot be read ({error.reason})")
        return False
    n_rows = run.spec.n_rows
    if dataset is not None:
        n_train, n_test, n_classes = dataset.n_train, dataset.n_test, dataset.n_classes
    else:
        n_train, n_test = arrays["train_masks"].shape[-1], arrays["test_margins"].shape[-1]
        n_classes = arrays["test_logits"].shape[-1]
    expected = {
        "train_masks": ((n_rows, n_train), "bool"),
        "test_margins": ((n_rows, n_test), "float16"),
        "train_margins": ((n_rows, n_train), "float16"),
        "test_logits": ((n_rows, n_test, n_classes), "float16"),
        "train_logits": ((n_rows, n_train, n_classes), "float16"),
        "block_digests": ((len(run.spec.blocks), 32), "uint8"),
    }
    found = {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}
    for name, (shape, dtype) in expected.items():
        if found[name] != (shape, dtype):
            notes.add("arrays", f"{name} is {found[name][1]} {found[name][0]}, not {dtype} {shape}")
    return found == expected


def _read(run: Run, rows: range, notes: _Notes) -> Block | None:
    try:
        return run.read_block(rows)
    except RunError as error:
        notes.add_rows("digests", f"cannot be read ({error.reason})", rows)
        return None


def _check_block(run: Run, rows: range, block: Block, dataset: Dataset | None, notes: _Notes) -> None:
    masks = block["train_masks"]
    n_train = masks.shape[1]
    finite = np.ones(len(rows), np.bool_)
    for name in ARRAYS[1:]:
        finite &= np.isfinite(block[name]).reshape(len(rows), -1).all(axis=1)
    drawn = draw_masks(run.spec.seed, run.spec.subset_indices(rows), n_train, run.spec.alpha)
    wrong = {
        ("finite", "have outputs that are not finite"): ~finite,
        ("mask_sizes", f"have masks of another size than {subset_size(n_train, run.spec.alpha)}"): (
            masks.sum(axis=1) != subset_size(n_train, run.spec.alpha)
        ),
        ("masks", "have masks that their seeds do not draw"): (masks != drawn).any(axis=1),
    }
    if dataset is not None:
        for part, labels in (("test", dataset.test_labels), ("train", dataset.train_labels)):
            same = _margins_are_of(block[f"{part}_margins"], block[f"{part}_logits"], labels)
            wrong["margins", f"have {part} margins that are not those of their logits"] = ~same
    for (check, what), flags in wrong.items():
        notes.add_rows(check, what, [rows[i] for i in np.flatnonzero(flags).tolist()])


def _margins_are_of(
    margins: npt.NDArray[np.float16], logits: npt.NDArray[np.float16], labels: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    # damaged logits may give margins beyond float16 or none at all: they compare unequal, and need no warning
    with np.errstate(over="ignore", invalid="ignore"):
        expected = correct_class_margins(logits, labels).astype(np.float16)
    return np.asarray((margins.view(np.uint16) == expected.view(np.uint16)).all(axis=1))


class _Duplicates:
    """Remembers rows by digests of their masks and logits, and notes those that were met before."""

    def __init__(self) -> None:
        self.mask_rows: dict[bytes, tuple[int, int]] = {}
        self.logit_rows: dict[bytes, int] = {}

    def check(self, run: Run, rows: range, block: Block, notes: _Notes) -> None:
        subsets = run.spec.subset_indices(rows).tolist()
        for i, (row, subset) in enumerate(zip(rows, subsets, strict=True)):
            _, of_subset = self.mask_rows.setdefault(_short_digest(block["train_masks"][i]), (row, subset))
            if of_subset != subset:
                notes.add_rows("duplicates", "have the mask of an earlier row", [row])
            logits = _short_digest(block["test_logits"][i], block["train_logits"][i])
            if self.logit_rows.setdefault(logits, row) != row:
                notes.add_rows("duplicates", "have the logits of an earlier row", [row])


def _short_digest(*arrays: npt.NDArray[Any]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.digest()


def _sentence(rows: list[int], what: str) -> str:
    """Say of rows what is wrong; `what` begins with a plural verb."""
    if len(rows) == 1:
        verb, _, rest = what.partition(" ")
        return f"row {rows[0]} {_SINGULAR.get(verb, verb)} {rest}"
    more = f" and {len(rows) - 5:,} more" if len(rows) > 5 else ""
    return f"rows {', '.join(map(str, rows[:5]))}{more} {what}"
