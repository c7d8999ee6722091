"""Verify a run: by itself, and against a reference of which only as many rows are read as decide."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import dmdata
from dmdata.reading.long_work import shows_count
from dmpipeline.checks.agreement import LEAST_MODELS, Agreement, compare_outputs
from dmpipeline.checks.findings import Finding, VerdictName, Verification, worst_first
from dmpipeline.checks.mask_law import MaskLaw
from dmpipeline.checks.orders import Order, order_of_targets, order_of_training
from dmpipeline.checks.repeats import rows_repeated
from dmpipeline.checks.shared import shared_rows
from dmpipeline.checks.verification import law_of, replay, verify_run
from dmpipeline.errors import RunError, SpecError
from dmpipeline.moments.identity import keys_of_masks
from dmpipeline.runs.store import Run
from dmpipeline.runs.stored import RowProgress
from dmpipeline.runs.targets import TargetsName, check_targets, fitted_array
from dmpipeline.workflow.reference import Part, Reference, ReferenceRows, find_reference, portions
from dmpipeline.workflow.refit_check import compare_datamodels, refit_usd
from dmpipeline.workflow.run_arrays import open_rows
from dmpipeline.workflow.tta_check import compare_views

LEVEL = 0.05
"""Probability of a wrong verdict of either kind, unless another is asked for."""

MARGIN = 0.1
"""Standard deviations of a target up to which a difference counts as none, unless others are asked for."""

MAX_ROWS = 3000
"""Rows of a reference that are read at most, unless more are asked for."""

_MOST_NUMBERS = 1e7
# Beyond this many outputs of both ensembles together, a sample of targets is compared, in under a gigabyte.
_ORDER_ROWS = 1000
_FEW_ROWS = 256  # of ours, whose masks are read at a time to know their subsets
_UNREADABLE = ("arrays", "complete", "digests")


def verify(
    run: "Run | str | os.PathLike[str]",
    against: "Run | str | os.PathLike[str] | None" = None,
    *,
    catalog: dmdata.CatalogLike = None,
    targets: TargetsName = "test",
    margin: float = MARGIN,
    level: float = LEVEL,
    max_rows: int = MAX_ROWS,
    replays: int = 0,
    refit: bool | None = None,
    tta: int = 0,
    to: str | None = None,
    seed: int = 0,
    progress: RowProgress | None = None,
) -> Verification:
    """Check a run against its own spec, and its models against those of a reference.

    Parameters
    ----------
    run : Run or path
    against : Run, path, URL or name, optional
        Another run or its directory; a folder or a URL with a catalog; or a name in `catalog`, as "cifar/50pct". Whole
        rows of masks and outputs are read, 100 first, then 300, 1,000 and so on until the verdict is clear. Where
        reading is charged, this is paid: `dmdata.budget` bounds it.
    catalog : Catalog, path or URL, optional
        Where the name is looked up; see `dmdata.load_catalog`.
    targets : {"test", "train"}
        Whose outputs are compared.
    margin : float
        Differences up to this many standard deviations of a target count as none.
    level : float
        Probability of calling equal ensembles different, at most, over all statistics and looks; and of calling
        ensembles equal that differ by the margin.
    max_rows : int
        Rows of the reference to read at most.
    replays : int
        Rows of the run, drawn at random, that are trained again and compared with what is stored.
    refit : bool, optional
        Whether datamodels are compared, where both sides have some; by default where reading them is free.
    tta : int
        Rows of ours to train again with each of the recipe's views of pictures at test time, to find out which fits the
        reference best.
    to : {"internet", "same-region", "cross-region"}, optional
        Where the bytes go, which decides their price.
    seed : int
        Of permutations and samples.
    progress : callable, optional
        Called with (rows read, rows in total) while the run is read, then while the reference is.

    Returns
    -------
    verification : Verification
        Findings, the worst first; `verdict` is "agrees", "differs" or "undecided".

    Raises
    ------
    SpecError
        For a number that cannot be used, or a reference that cannot be found.
    RunError, CatalogError, BudgetError, AccessError, SourceError
        If the run or the reference cannot be read.

    Examples
    --------
    >>> import dmpipeline
    >>> dmpipeline.verify("myrun", against="cifar/50pct").verdict  # doctest: +SKIP
    'agrees'
    """
    check_verify_settings(margin=margin, level=level, max_rows=max_rows, replays=replays, tta=tta)
    check_targets(targets)
    opened = run if isinstance(run, Run) else Run.open(Path(run).expanduser())
    reference = None if against is None else find_reference(opened, against, targets, catalog=catalog, to=to)
    findings = [*verify_run(opened, progress), *replayed(opened, replays, seed=seed)]
    if reference is None:
        return verified(opened, findings)
    return compared(
        opened,
        findings,
        reference,
        margin=margin,
        level=level,
        max_rows=max_rows,
        refit=refit,
        tta=tta,
        seed=seed,
        progress=progress,
    )


def check_verify_settings(*, margin: float, level: float, max_rows: int, replays: int, tta: int = 0) -> None:
    """Refuse numbers that cannot be used; SpecError names the one."""
    if not margin > 0:
        raise SpecError(f"margin {margin} leaves nothing that agrees; choose more than 0, as 0.1", field="margin")
    if not 0 < level < 0.5:
        raise SpecError(f"level {level} is not an error that may be made; choose between 0 and 0.5", field="level")
    if max_rows < LEAST_MODELS:
        raise SpecError(f"{max_rows} rows are too few to compare; read at least {LEAST_MODELS}", field="max_rows")
    for field_name, count in (("replays", replays), ("tta", tta)):
        if count < 0:
            raise SpecError(f"{count} rows cannot be trained again; choose 0 or more", field=field_name, value=count)


def verified(run: Run, findings: Sequence[Finding]) -> Verification:
    """Give the verdict on a run by itself."""
    verdict: VerdictName = "agrees" if all(finding.passed for finding in findings) else "differs"
    return Verification(worst_first(findings), verdict, n_rows=run.spec.n_rows)


def differing(findings: Sequence[Finding]) -> Verification:
    """Give the verdict on a run that cannot even be opened as what it was."""
    return Verification(worst_first(findings), "differs")


def replayed(run: Run, n_rows: int, *, seed: int) -> Iterator[Finding]:
    """Train some rows again, drawn at random from those that are done; nothing where none are asked for."""
    if not n_rows:
        return
    digests = run.digests()
    done = [row for rows, digest in zip(run.spec.blocks, digests, strict=True) if digest.any() for row in rows]
    if not done:
        yield Finding("replays", passed=False, detail="no row is trained yet, so none can be trained again")
        return
    picked = np.sort(np.random.default_rng(seed).choice(done, min(n_rows, len(done)), replace=False))
    try:
        results = [replay(run, row) for row in picked.tolist()]
    except RunError as error:
        yield Finding("replays", passed=False, detail=f"rows could not be trained again: {error}")
        return
    wrong = [result.row for result in results if not result.agrees]
    n_same = sum(result.is_same for result in results)
    largest = max(max(result.differences.values(), default=0.0) for result in results)
    if wrong:
        told = f"rows {', '.join(map(str, wrong[:5]))}, trained again from their seeds, are not what is stored"
    else:
        told = f"{len(results)} rows trained again from their seeds are what is stored, {n_same} of them to the bit" + (
            f"; the others differ by {largest:.2g} of their standard deviation" if n_same < len(results) else ""
        )
    yield Finding("replays", passed=not wrong, detail=told, effect=largest)


@shows_count("comparing", "rows")
def compared(
    run: Run,
    findings: Sequence[Finding],
    reference: Reference,
    *,
    margin: float = MARGIN,
    level: float = LEVEL,
    max_rows: int = MAX_ROWS,
    refit: bool | None = None,
    tta: int = 0,
    seed: int = 0,
    progress: RowProgress | None = None,
) -> Verification:
    """Compare a run that was checked by itself with a reference, and give the verdict on both."""
    if any(not finding.passed for finding in findings if finding.check in _UNREADABLE):
        told = f"not compared with {reference.name}: our own rows are missing or damaged"
        skipped = Finding("reference", passed=False, detail=told, level="schema", n_rows=0)
        return Verification(worst_first([*findings, skipped]), "differs", reference.name, usd=0.0)
    comparison = _Comparison(run, reference, margin=margin, level=level, seed=seed)
    found = comparison.findings(max_rows, progress, n_tta=tta)
    verdict = comparison.verdict
    usd = comparison.usd
    wanted = not reference.is_paid if refit is None else refit
    if comparison.fits and reference.has_weights and wanted:
        found += compare_datamodels(run, reference, seed=seed)
        usd += refit_usd(run, reference, seed=seed)
    everything = worst_first([*findings, *found])
    if not all(finding.passed for finding in everything):
        verdict = "differs"
    return Verification(everything, verdict, reference.name, comparison.n_rows, usd)


@dataclass(slots=True)
class _Comparison:
    """A run's models next to the rows of a reference, which are read portion by portion until the verdict is clear."""

    run: Run
    reference: Reference
    margin: float
    level: float
    seed: int
    verdict: VerdictName = "undecided"
    n_rows: int = 0
    usd: float = 0.0
    fits: bool = True
    _masks: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    _outputs: list[npt.NDArray[Any]] = field(default_factory=list)
    _sizes: list[npt.NDArray[np.int64]] = field(default_factory=list)
    _subsets: dict[int, int] = field(default_factory=dict)
    _groups: list[int] = field(default_factory=list)
    _our_subsets: list[int] = field(default_factory=list)

    def findings(self, max_rows: int, progress: RowProgress | None, *, n_tta: int) -> list[Finding]:
        """Read and compare; sets the verdict, and what was read and paid."""
        rows = self.reference.rows()
        if wrong := self._misfit(rows):
            self.verdict, self.fits = "differs", False
            return [Finding("reference", passed=False, detail=wrong, level="schema")]
        spec = self.run.spec
        part = Part.of(
            range(spec.rows.models.start, spec.rows.models.stop),
            range(spec.rows.held_out.start, spec.rows.held_out.stop),
            spec.held_out.n_retrainings,
        )
        ours = self._ours(part, max_rows)
        if rows.masks is not None:
            self._know_our_subsets(part, len(ours))
        most = min(max_rows, rows.n_available)
        looks = portions(most)
        law = law_of(spec, rows.masks.shape[1]) if rows.masks is not None else None
        found: list[Finding] = []
        for look in looks:
            masks, outputs = rows.read(look)
            self._keep(masks, outputs, law)
            self.n_rows, self.usd = rows.n_rows, rows.usd
            if progress is not None:
                progress(look, most)
            found = self._look(ours, part, law, self.level / len(looks))
            if self.verdict != "undecided":
                break
        if n_tta:
            found += self._of_views(ours, part, n_tta)
        detail = f"{self.n_rows:,} of {rows.n_available:,} rows of {self.reference.name} were read"
        found.insert(0, Finding("reference", passed=True, detail=detail, level="schema", n_rows=self.n_rows))
        return found

    def _misfit(self, rows: ReferenceRows) -> str | None:
        """Compare shapes; a sentence where the reference is not of the same examples."""
        expected = self.run.array(fitted_array(self.run, self.reference.targets)).shape[1:]
        if rows.outputs.shape[1:] != expected:
            return (
                f"{rows.outputs.name} holds {rows.outputs.shape[1:]} numbers a model, ours {expected}: they are not of "
                "the same targets"
            )
        n_train = self.run.array("train_masks").shape[1]
        if rows.masks is not None and rows.masks.shape[1:] != (n_train,):
            return f"{rows.masks.name} has masks of {rows.masks.shape[1:]} examples, ours of {n_train:,}"
        if not rows.n_available:
            return f"{rows.outputs.name} has no models to compare with"
        return None

    def _ours(self, part: Part, max_rows: int) -> npt.NDArray[Any]:
        array = fitted_array(self.run, self.reference.targets)
        # ours are at hand: reading more of them costs nothing
        n_rows = min(len(part.rows), max(max_rows, MAX_ROWS))
        return open_rows(self.run, array, slice(part.rows.start, part.rows.start + n_rows))[0:n_rows]

    def _our_masks(self, part: Part, start: int, stop: int) -> npt.NDArray[np.bool_]:
        rows = slice(part.rows.start + start, part.rows.start + stop)
        return np.asarray(open_rows(self.run, "train_masks", rows)[0 : stop - start], np.bool_)

    def _know_our_subsets(self, part: Part, n_rows: int) -> None:
        for start in range(0, n_rows, _FEW_ROWS):
            own = self._our_masks(part, start, min(start + _FEW_ROWS, n_rows))
            self._our_subsets += keys_of_masks(own.view(np.int8)).tolist()

    def _keep(self, masks: npt.NDArray[np.bool_] | None, outputs: npt.NDArray[Any], law: MaskLaw | None) -> None:
        self._outputs.append(outputs.astype(np.float32) if outputs.dtype.kind in "iub" else outputs)
        if masks is None:
            return
        if sum(map(len, self._masks)) < _ORDER_ROWS:
            self._masks.append(masks)
        firsts = []
        for place, key in enumerate(keys_of_masks(masks.view(np.int8)).tolist()):
            number = len(self._subsets)
            subset = self._subsets.setdefault(key, number)
            self._groups.append(subset)
            if subset == number:
                firsts.append(place)
        # retrainings of one subset have one size, which counts once
        self._sizes.append(masks[firsts].sum(axis=1, dtype=np.int64))
        if law is not None:
            law.add(masks[firsts])

    def _look(self, ours: npt.NDArray[Any], part: Part, law: MaskLaw | None, level: float) -> list[Finding]:
        theirs = np.concatenate(self._outputs)
        found = [*self._of_masks(law), *self._of_rows(ours, theirs)]
        good = [np.isfinite(side).all(axis=1) for side in (ours, theirs)]
        known = list(self._subsets)
        their_subsets = [known[number] for number in self._groups] if self._groups else None
        n_train = self.run.array("train_masks").shape[1]
        shared = shared_rows(ours, theirs, self._our_subsets or None, their_subsets, self.run.spec, n_train)
        if told := shared.in_words():
            check = "same_models" if shared.is_same.all() else "shared_models"
            found.append(Finding(check, passed=True, detail=told, level="statistics", n_rows=self.n_rows))
        if shared.is_same.all():
            self.verdict = "agrees" if all(finding.passed for finding in found) else "differs"
            return found
        good = [flags & own for flags, own in zip(good, (shared.ours, shared.theirs), strict=True)]
        # rows of one mask are retrainings of one subset, whatever a catalog says of them
        of_theirs = np.asarray(self._groups) if self._groups else self.reference.part.groups(len(theirs))
        groups = [part.groups(len(ours)), of_theirs]
        sides = [side[flags] for side, flags in zip((ours, theirs), good, strict=True)]
        groups = [numbers[flags] for numbers, flags in zip(groups, good, strict=True)]
        if min(len(np.unique(numbers)) for numbers in groups) < LEAST_MODELS:
            both = ", without those that both have," if told else ""
            told = (
                f"{len(sides[0]):,} of our models and {len(sides[1]):,} of the reference{both} are too few to compare"
            )
            self.verdict = "undecided" if all(finding.passed for finding in found) else "differs"
            return [*found, Finding("evidence", passed=True, detail=told, level="statistics", n_rows=self.n_rows)]
        picked = self._sample(sum(map(len, sides)), ours.shape[1])
        agreement = compare_outputs(
            sides[0][:, picked],
            sides[1][:, picked],
            *groups,
            margin=self.margin,
            level=level,
            numbers=picked,
            seed=self.seed,
        )
        orders = self._of_orders(sides, ours, part)
        found += [*agreement.findings, *orders]
        if all(finding.passed for finding in found):
            self.verdict = agreement.verdict
        else:
            self.verdict = "differs"
        if self.verdict == "undecided":
            found.append(self._needed(agreement))
        return found

    def _sample(self, n_models: int, n_targets: int) -> npt.NDArray[np.int64]:
        most = max(LEAST_MODELS, int(_MOST_NUMBERS // n_models))
        if n_targets <= most:
            return np.arange(n_targets)
        return np.sort(np.random.default_rng(self.seed).choice(n_targets, most, replace=False))

    def _of_masks(self, law: MaskLaw | None) -> Iterator[Finding]:
        """Hold the reference's masks against the law of ours."""
        if not self._sizes:
            return
        if law is None:
            told = f"ours are masks of {self.run.spec.masks}, which follow no law that is known; not compared"
            yield Finding("reference_masks", passed=True, detail=told, level="statistics", n_rows=self.n_rows)
            return
        faults = (law.size_faults(np.concatenate(self._sizes)), law.density_faults(), law.pair_faults())
        wrong = [fault for fault in faults if fault is not None]
        told = "; ".join(wrong) or "masks of the reference follow the law that ours are drawn by"
        yield Finding("reference_masks", passed=not wrong, detail=told, level="statistics", n_rows=self.n_rows)

    def _of_rows(self, ours: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> Iterator[Finding]:
        """Look for rows of the reference that cannot be a model's own."""
        damaged = np.flatnonzero(~np.isfinite(theirs).all(axis=1))
        repeated = rows_repeated(theirs)
        wrong = []
        if len(damaged):
            wrong.append(f"{len(damaged):,} rows have outputs that are not finite, row {damaged[0]} the first")
        # learners that give few different outputs repeat them on both sides
        if len(repeated) and not len(rows_repeated(ours)):
            wrong.append(f"{len(repeated):,} rows have the outputs of an earlier row, row {repeated[0]} the first")
        told = "; ".join(wrong) or "rows of the reference are finite, and none has the outputs of another"
        yield Finding("reference_rows", passed=not wrong, detail=told, level="statistics", n_rows=self.n_rows)

    def _of_orders(self, sides: list[npt.NDArray[Any]], ours: npt.NDArray[Any], part: Part) -> Iterator[Finding]:
        nouns = ("test example", "training example")
        orders: list[tuple[str, Order]] = []
        noun = nouns[self.reference.targets == "train"]
        orders.append((f"{self.reference.targets}_order", order_of_targets(sides[0], sides[1], noun=noun)))
        if self._masks and self.reference.targets == "test":
            masks = np.concatenate(self._masks)[:_ORDER_ROWS]
            theirs = np.concatenate(self._outputs)[: len(masks)]
            good = np.isfinite(theirs).all(axis=1)
            ours = ours[:_ORDER_ROWS]
            sound = np.isfinite(ours).all(axis=1)
            own = self._our_masks(part, 0, len(ours))
            order = order_of_training(own[sound], ours[sound], masks[good], theirs[good], noun=nouns[1])
            orders.append(("train_order", order))
        for check, order in orders:
            yield Finding(check, passed=not order.is_wrong, detail=order.detail, level="statistics", n_rows=self.n_rows)

    def _of_views(self, ours: npt.NDArray[Any], part: Part, n_rows: int) -> Iterator[Finding]:
        theirs = np.concatenate(self._outputs)
        good = np.isfinite(theirs).all(axis=1)
        groups = np.asarray(self._groups) if self._groups else self.reference.part.groups(len(theirs))
        theirs, groups = theirs[good], groups[good]
        if len(theirs) < LEAST_MODELS or not np.isfinite(ours).all():
            return
        finding = compare_views(
            self.run,
            self.reference.targets,
            ours,
            theirs,
            n_rows=n_rows,
            first_row=part.rows.start,
            n_subsets=(len(np.unique(part.groups(len(ours)))), len(np.unique(groups))),
        )
        if finding is not None:
            yield finding

    def _needed(self, agreement: Agreement) -> Finding:
        """Say about how many rows, and dollars, would decide."""
        said = f"undecided after {self.n_rows:,} rows"
        if agreement.factor is None:
            told = f"{said}: a difference seems to lie at the margin itself; another margin would decide"
            return Finding("evidence", passed=True, detail=told, level="statistics", n_rows=self.n_rows)
        per_row = (1 / agreement.n_ours + 1 / agreement.n_theirs) / agreement.factor
        left = per_row - 1 / agreement.n_ours
        # of a subset's retrainings, and of rows that both have, not all count
        rows_each = self.n_rows / agreement.n_theirs
        if left > 0.1 * per_row:
            n_rows = round(rows_each / left)
            told = f"{said}: about {n_rows:,} rows of the reference would decide{self._dollars(n_rows)}"
            if n_rows > len(self.reference.part.rows):
                told += f", but it has {len(self.reference.part.rows):,}"
        else:
            n_rows = round(2 / per_row * rows_each)
            told = (
                f"{said}: about {n_rows:,} rows of the reference{self._dollars(n_rows)} and {round(2 / per_row):,} "
                f"models of ours, of which there are {agreement.n_ours:,}, would decide"
            )
        return Finding("evidence", passed=True, detail=told, level="statistics", n_rows=n_rows)

    def _dollars(self, n_rows: int) -> str:
        from dmdata.money.prices import readable_usd

        available = min(n_rows, len(self.reference.part.rows))
        usd = sum(price.usd for _, price in self.reference.prices(available))
        return f" ({readable_usd(usd)} at the prices of a paid release)"
