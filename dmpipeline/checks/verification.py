"""Whether what a run stores is what its spec says, found out by reading all of it.

Blocks are read one at a time, so memory is bounded by a block and two short digests a row. Nothing that is damaged
stops the reading: each check ends in a finding that says what is wrong and in which rows.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dmdata.reading.long_work import shows_count
from dmpipeline.checks.findings import Finding as Finding  # where it is known from
from dmpipeline.checks.mask_law import MaskLaw
from dmpipeline.checks.repeats import Repeats
from dmpipeline.data.datasets import Dataset
from dmpipeline.draws.masks import subset_masks, subset_size
from dmpipeline.errors import IncompleteRunError, RunError, SpecError, quoted
from dmpipeline.models.outputs import output_of
from dmpipeline.models.recipes import Recipe, find_recipe
from dmpipeline.runs.creation import dims_of_array
from dmpipeline.runs.learned import what_was_learned
from dmpipeline.runs.preparation import Prepared
from dmpipeline.runs.rows import RowArrays, block_digest
from dmpipeline.runs.store import Run
from dmpipeline.runs.stored import RowProgress
from dmpipeline.runs.training import RowTrainer
from dmpipeline.spec import MASK_LAWS, RunSpec
from dmpipeline.training.train import GradientTrainer, Way

CHECKS = {
    "dataset": "the dataset is the one the run was created with",
    "arrays": "arrays have the shapes and dtypes of the spec",
    "complete": "no row is missing",
    "digests": "every block has the bytes it was stored with",
    "finite": "all outputs are finite",
    "mask_sizes": "every mask has as many examples as the spec says",
    "masks": "every mask is the one its seed draws, or that was given",
    "densities": "every training example is in as many subsets as chance explains",
    "independence": "training examples are in subsets together as often as chance explains",
    "margins": "margins, and what else follows from the logits, equal those of the logits, to the bit",
    "duplicates": "no row is stored over another: no subset repeats but declared retrainings, and no outputs do",
    "learned": "models are better than always saying the commonest class, or the mean, and their outputs vary",
}
"""What is checked, in the order of the findings, and what holds where it passed."""

TOLERANCE = 0.02
"""How far a row may be from itself where another device or way of training rounds otherwise: see `Replay.differences`.

Training amplifies rounding. On digits perceptrons differed by 0.0000003 between the ways of `ensembles`, convolutional
nets by 0.0009; retrainings of one subset by 0.21 and 0.33.
"""

_SINGULAR = {"have": "has", "are": "is"}


def law_of(spec: RunSpec, n_train: int) -> MaskLaw | None:
    """Prepare counts of masks that follow the law of a spec; None for masks that were given, of which none is known.

    Raises
    ------
    SpecError
        If alpha leaves no example in or none out.
    """
    if spec.masks not in MASK_LAWS:
        return None
    is_exact = spec.masks == "exact"
    alpha = subset_size(n_train, spec.alpha) / n_train if is_exact else spec.alpha
    return MaskLaw(n_train, alpha, is_exact, seed=spec.seed)


@shows_count("verifying", "models")
def verify_run(run: Run, progress: RowProgress | None = None) -> list[Finding]:
    """Check a run against its spec.

    Parameters
    ----------
    run : Run
        Complete or not: missing rows are a finding.
    progress : callable, optional
        Called with (rows read, rows in total) after each block.

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
    learns_by_chance = isinstance(find_recipe(run.spec.recipe), Recipe)
    n_train = run.array("train_masks").shape[1]
    repeats, law = Repeats(run.spec, n_train, learns_by_chance), law_of(run.spec, n_train)
    seen = -1
    for number, rows in enumerate(run.spec.blocks):
        if not digests[number].any():
            notes.add_rows("complete", "are missing", rows)
        elif (block := _read(run, rows, notes)) is not None:
            if block_digest(block) != digests[number].tobytes():
                notes.add_rows("digests", "are not what was stored", rows)
            is_drawn = _check_block(run, rows, block, dataset, notes)
            subsets = run.spec.subset_indices(rows).tolist()
            repeats.add(rows, subsets, block, is_drawn)
            if law is not None:
                # retrainings of one subset are adjacent, and count once
                firsts = [i for i, subset in enumerate(subsets) if subset != (subsets[i - 1] if i else seen)]
                law.add(block["train_masks"][firsts])
                seen = subsets[-1]
        if progress is not None:
            progress(rows.stop, run.spec.n_rows)
    for what, wrong in repeats.faults():
        notes.add_rows("duplicates", what, wrong)
    notes.remarks["duplicates"] = repeats.remarks()
    _check_law(law, run.spec, notes)
    _check_learned(run, dataset, notes)
    return notes.findings()


def _check_law(law: MaskLaw | None, spec: RunSpec, notes: "_Notes") -> None:
    if law is None:
        for check in ("densities", "independence"):
            notes.remarks[check] = [f"masks are those of {spec.masks}, which follow no law that is known"]
        return
    for check, fault in (("densities", law.density_faults()), ("independence", law.pair_faults())):
        if fault is not None:
            notes.add(check, fault)


@dataclass(frozen=True, slots=True)
class Replay:
    """A row trained again, next to what is stored of it.

    Attributes
    ----------
    row : int
    is_same : bool
        Whether every array is the same to the bit: to be expected on the same kind of device, in the same way, with
        the same versions.
    differences : dict of str to float
        For each array of outputs the mean absolute difference, as a share of the stored row's standard deviation;
        infinite where the row is of another subset or not finite.
    """

    row: int
    is_same: bool
    differences: dict[str, float]

    @property
    def agrees(self) -> bool:
        """Whether the row differs by no more than rounding does that another device or way of training brings."""
        return self.is_same or all(difference <= TOLERANCE for difference in self.differences.values())


def replay(run: Run, row: int, *, device: str = "cpu", way: Way | None = None) -> Replay:
    """Train one row of a run again, nothing of it stored, and compare.

    Parameters
    ----------
    run : Run
    row : int
        One that is done.
    device, way
        As for `Run.train`.

    Raises
    ------
    SpecError
        If there is no such row.
    IncompleteRunError
        If it is not trained yet.
    RunError
        If it is damaged, or as `Run.train`.
    TrainingError
        If it cannot be trained.
    """
    return replay_prepared(Prepared.of(run), row, device=device, way=way)


def replay_prepared(prepared: Prepared, row: int, *, device: str = "cpu", way: Way | None = None) -> Replay:
    """Train one row of a run again, as `replay` does."""
    run, spec = prepared.run, prepared.run.spec
    if not 0 <= row < spec.n_rows:
        raise SpecError(f"{run.path} has no row {row}; choose 0 to {spec.n_rows - 1}", field="row", value=row)
    number = row // spec.block_models
    rows = spec.blocks[number]
    if not run.digests()[number].any():
        raise IncompleteRunError(
            f"row {row} is not trained yet; train it with `dmpipeline run {quoted(run.path)}`",
            path=run.path,
            n_missing=1,
        )
    trainer = prepared.trainer(device, way)
    company = [row]
    if isinstance(trainer, GradientTrainer) and trainer.way.keeps_company:
        masks = subset_masks(spec, rows, trainer.dataset.n_train)
        company = next([rows[i] for i in group] for group in trainer.groups(masks) if row in [rows[i] for i in group])
    again = {name: array[company.index(row)] for name, array in RowTrainer(run, trainer).rows(company).items()}
    stored = {name: array[0] for name, array in run.read_block(range(row, row + 1)).items()}
    same = all(np.array_equal(stored[name], again[name]) for name in spec.arrays)
    if not np.array_equal(stored["train_masks"], again["train_masks"]):
        return Replay(row, same, dict.fromkeys(spec.arrays[1:], float("inf")))
    return Replay(row, same, {name: _difference(stored[name], again[name]) for name in spec.arrays[1:]})


def _difference(stored: npt.NDArray[Any], again: npt.NDArray[Any]) -> float:
    if stored.dtype.kind == "i":
        return float((stored != again).mean())
    wide = stored.astype(np.float64)
    if not np.isfinite(wide).all():
        return float("inf")
    spread = float(wide.std())
    difference = float(np.abs(wide - again).mean())
    return difference / spread if spread else float(difference > 0)


@dataclass(slots=True)
class _Notes:
    """What is wrong, by check: sentences, and rows gathered under one sentence each."""

    sentences: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    rows: dict[tuple[str, str], list[int]] = field(default_factory=lambda: defaultdict(list))
    remarks: dict[str, list[str]] = field(default_factory=dict)
    """What is to be known of a check that passed."""

    def add(self, check: str, sentence: str) -> None:
        if sentence not in self.sentences[check]:  # each block may find the same
            self.sentences[check].append(sentence)

    def add_rows(self, check: str, what: str, rows: range | list[int]) -> None:
        self.rows[check, what].extend(rows)

    def findings(self) -> list[Finding]:
        wrong = {check: list(sentences) for check, sentences in self.sentences.items()}
        for (check, what), rows in self.rows.items():
            if rows:
                wrong.setdefault(check, []).append(_sentence(rows, what))
        holding = {check: self.remarks.get(check) or [holds] for check, holds in CHECKS.items()}
        return [Finding(check, check not in wrong, "; ".join(wrong.get(check, holding[check]))) for check in CHECKS]


def _find_dataset(run: Run, notes: _Notes) -> Dataset | None:
    try:
        return run.dataset()
    except (RunError, SpecError) as error:
        notes.add("dataset", str(error))
        return None


def _check_arrays(run: Run, dataset: Dataset | None, notes: _Notes) -> bool:
    """Compare shapes and dtypes with the spec; without a dataset, sizes are those the arrays agree on."""
    try:
        arrays = {name: run.array(name) for name in (*run.spec.arrays, "block_digests")}
    except RunError as error:
        notes.add("arrays", str(error))
        return False
    try:
        run.digests()
    except RunError as error:
        notes.add("arrays", f"block_digests cannot be read ({error.reason})")
        return False
    n_rows = run.spec.n_rows
    expected = {"block_digests": ((len(run.spec.blocks), 32), "uint8")}
    for name in run.spec.arrays:
        dtype = "bool" if name == "train_masks" else output_of(name).dtype
        dims = dims_of_array(name, dataset).values() if dataset is not None else arrays[name].shape[1:]
        expected[name] = ((n_rows, *dims), dtype)
    found = {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}
    for name, (shape, dtype) in expected.items():
        if found[name] != (shape, dtype):
            notes.add("arrays", f"{name} is {found[name][1]} {found[name][0]}, not {dtype} {shape}")
    return found == expected


def _check_learned(run: Run, dataset: Dataset | None, notes: _Notes) -> None:
    """See whether models are better than the baseline, as far as their number and what is stored of them tell."""
    learned = what_was_learned(run, dataset)
    for text in learned.texts:
        notes.add("learned", text)
    remark = learned.sentence() or "what is stored does not tell whether the models are right"
    notes.remarks["learned"] = [remark]


def _read(run: Run, rows: range, notes: _Notes) -> RowArrays | None:
    try:
        return run.read_block(rows)
    except RunError as error:
        notes.add_rows("digests", f"cannot be read ({error.reason})", rows)
        return None


def _check_block(
    run: Run, rows: range, block: RowArrays, dataset: Dataset | None, notes: _Notes
) -> npt.NDArray[np.bool_]:
    """Check what can be told of each row by itself; return which rows have the mask that is theirs."""
    masks = block["train_masks"]
    n_train = masks.shape[1]
    finite = np.ones(len(rows), np.bool_)
    for name in run.spec.arrays[1:]:
        finite &= np.isfinite(block[name]).reshape(len(rows), -1).all(axis=1)
    wrong: dict[tuple[str, str], npt.NDArray[np.bool_]] = {("finite", "have outputs that are not finite"): ~finite}
    if run.spec.masks == "exact":
        size = subset_size(n_train, run.spec.alpha)
        wrong["mask_sizes", f"have masks of another size than {size}"] = np.asarray(masks.sum(axis=1) != size)
    else:
        wrong["mask_sizes", "have masks without an example"] = ~np.asarray(masks.any(axis=1))
    is_drawn = np.ones(len(rows), np.bool_)
    source = "their seeds do not draw" if run.spec.masks in MASK_LAWS else f"are not those of {run.spec.masks}"
    try:
        differs: npt.NDArray[np.bool_] = masks != subset_masks(run.spec, rows, n_train)
        is_drawn = ~np.asarray(differs.any(axis=1))
        wrong["masks", f"have masks that {source}"] = ~is_drawn
    except SpecError as error:
        notes.add("masks", f"could not be checked: {error}")
    if dataset is not None:
        for part, labels in (("test", dataset.test_labels), ("train", dataset.train_labels)):
            wrong |= _derived_wrongly(block, part, labels)
    for (check, what), flags in wrong.items():
        notes.add_rows(check, what, [rows[i] for i in np.flatnonzero(flags).tolist()])
    return is_drawn


def _derived_wrongly(
    block: RowArrays, part: str, labels: npt.NDArray[Any]
) -> dict[tuple[str, str], npt.NDArray[np.bool_]]:
    """Find rows whose stored outputs do not follow from their raw ones, if those are stored."""
    raw = next((name for name in (f"{part}_logits", f"{part}_predictions") if name in block), None)
    if raw is None:
        return {}
    wrong = {}
    for name in block:
        if not name.startswith(f"{part}_") or name in (raw, "train_masks"):
            continue
        # damaged logits may give margins beyond float16 or none at all: they compare unequal, and need no warning
        with np.errstate(over="ignore", invalid="ignore"):
            numbers = block[raw]
            if raw.endswith("predictions") and labels.ndim == 1:
                numbers = numbers[..., None]
            expected = np.ascontiguousarray(output_of(name)(numbers, labels))
        stored = np.ascontiguousarray(block[name])
        same = (stored.view(np.uint8) == expected.view(np.uint8)).reshape(len(stored), -1).all(axis=1)
        what = name.replace("_", " ")
        wrong["margins", f"have {what} that are not those of their {raw.partition('_')[2]}"] = ~same
    return wrong


def _sentence(rows: list[int], what: str) -> str:
    """Say of rows what is wrong; `what` begins with a plural verb."""
    if len(rows) == 1:
        verb, _, rest = what.partition(" ")
        return f"row {rows[0]} {_SINGULAR.get(verb, verb)} {rest}"
    more = f" and {len(rows) - 5:,} more" if len(rows) > 5 else ""
    return f"rows {', '.join(map(str, rows[:5]))}{more} {what}"
