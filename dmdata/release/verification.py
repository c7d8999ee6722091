"""Compare a mirror with its source: by its own digests, by a random sample, or whole.

Digests are free: the chunks of every block are digested as they are stored and compared with the journal, no network
needed. They show that the mirror is what was written. A sample or the whole shows that it is what the source holds now,
and costs what reading that costs. Header and catalog must agree here, while `dmdata.open` only warns.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr

from dmdata.array import CatalogMismatchWarning, LazyArray
from dmdata.bodies import estimate_read
from dmdata.catalog.entries import Catalog
from dmdata.copying.journal import Journal, Original, open_copy, stored_digest
from dmdata.copying.place import Place
from dmdata.errors import IntegrityError, SelectionError
from dmdata.money.ledger import Ledger, home
from dmdata.money.prices import Estimate, Terms
from dmdata.reading.fetch import LEAST_RANGE_BYTES
from dmdata.reading.progress_bar import shown
from dmdata.release.mirrors import mirrors_at
from dmdata.release.opening import CatalogLike, in_force, load_catalog, reader_pays
from dmdata.release.opening import open as open_array
from dmdata.release.pricing import total_of

# a small array is not taken whole for a sample
_LEAST_UNITS = 64


@dataclass(frozen=True, slots=True)
class Sample:
    """How much of a source is read to be compared: a share of it, or what some dollars buy.

    Attributes
    ----------
    share : float or None
        Of the rows, above 0 and at most 1.
    usd : float or None
        Of all arrays together; at least a row of each is read.
    """

    share: float | None = None
    usd: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Sample":
        """Read a sample written as ``5%`` or as dollars, ``0.25`` or ``$0.25``.

        Raises
        ------
        SelectionError
            If it is neither.
        """
        try:
            number = float(text.strip().removeprefix("$").removesuffix("%"))
        except ValueError:
            number = math.nan
        if text.strip().endswith("%"):
            if 0 < number <= 100:
                return cls(share=number / 100)
        elif 0 < number < math.inf:
            return cls(usd=number)
        raise SelectionError(f"{text!r} is not a sample; write a share of the rows like 5%, or dollars like 0.25")


@dataclass(frozen=True, slots=True)
class Comparison:
    """One mirrored array, compared.

    Attributes
    ----------
    name : str
        Of the artifact.
    place : str
        Of the mirrored array.
    n_blocks, n_missing : int
        Blocks, and how many of them are not complete.
    damaged : tuple of int
        Blocks whose digest is another than when they were written.
    differing : tuple of int
        Blocks that hold other values than the source.
    faults : tuple of str
        What else differs, in words.
    n_rows_compared : int
        With the source.
    """

    name: str
    place: str
    n_blocks: int
    n_missing: int
    damaged: tuple[int, ...]
    differing: tuple[int, ...]
    faults: tuple[str, ...]
    n_rows_compared: int

    @property
    def is_same(self) -> bool:
        """Whether nothing was found that differs or is missing."""
        return not (self.n_missing or self.damaged or self.differing or self.faults)

    @property
    def bad(self) -> tuple[int, ...]:
        """Numbers of the blocks that must be made again."""
        return tuple(sorted({*self.damaged, *self.differing}))


@dataclass(frozen=True, slots=True)
class Check:
    """One mirrored array about to be compared, and what is read of its source for that.

    Attributes
    ----------
    journal : Journal
    units : list of (start, stop)
        Rows of the copy, along its blocks' axis, to read from the source; none to compare digests alone.
    terms : Terms
    catalog : Catalog
        That names the source.
    estimate : Estimate
        Price of the reads, the header included, by what the mirror records of its source: no network.
    """

    journal: Journal
    units: list[tuple[int, int]]
    terms: Terms
    catalog: Catalog
    estimate: Estimate

    @property
    def name(self) -> str:
        """Of the artifact."""
        return self.journal.original.artifact

    @property
    def is_paid(self) -> bool:
        """Whether the reader of the source pays."""
        return bool(self.units) and reader_pays(self.name, self.catalog, self.terms)


def verify(
    destination: Any,
    names: Sequence[str] = (),
    *,
    sample: str | Sample | None = None,
    whole: bool = False,
    seed: int = 0,
    repair: bool = False,
    to: str | None = None,
    catalog: CatalogLike = None,
    progress: Callable[[str, int, int], object] | Literal[False] | None = None,
) -> list[Comparison]:
    """Compare a mirror, or every mirror in a group, with its source.

    Parameters
    ----------
    destination : path or ``s3://bucket/prefix``
        Given to `dmdata.mirror` before.
    names : sequence of str
        Of artifacts in a group; by default all that are mirrored in it.
    sample : str, optional
        Also read this much of the source, at random: "5%" of the rows, or dollars as "0.25".
    whole : bool
        Also read all of the source.
    seed : int
        Of the sample.
    repair : bool
        Mark what is damaged or differs as missing, so that `dmdata.mirror` makes it again.
    to, catalog
        As in `dmdata.open`.
    progress : callable or False, optional
        Called with an artifact's name, and blocks or rows done and in total; else a bar is shown, or with False none.

    Returns
    -------
    comparisons : list of Comparison
        One for each array; the mirror is its source where ``all(c.is_same for c in comparisons)``.

    Raises
    ------
    DmdataError
        If no mirror is there.
    BudgetError, AccessError, SourceError
        From reading the source.
    """
    terms, catalog = in_force(to, catalog)
    checks = plan_checks(destination, names, terms, sample=sample, whole=whole, seed=seed, catalog=catalog)
    return run_checks(checks, repair=repair, progress=progress)


def plan_checks(
    destination: Any,
    names: Sequence[str],
    terms: Terms,
    *,
    sample: str | Sample | None = None,
    whole: bool = False,
    seed: int = 0,
    catalog: CatalogLike = None,
) -> list[Check]:
    """Find the mirrors and choose what will be read of their sources; asks nothing of these. See `verify`."""
    if sample is not None and whole:
        raise SelectionError("a sample and the whole cannot both be compared; choose one")
    wanted = Sample.parse(sample) if isinstance(sample, str) else Sample(share=1.0) if whole else sample
    place, known, rng = Place.of(destination), load_catalog(catalog), np.random.default_rng(seed)
    with place.explain_errors("read"):
        journals = [Journal.load(found) for found in mirrors_at(place, names)]
    usd = wanted.usd / len(journals) if wanted and wanted.usd is not None else None
    checks = []
    for journal in journals:
        units = _draw(journal, terms, share=wanted.share, usd=usd, rng=rng) if wanted else []
        parts = [estimate_read(journal.claimed_layout(), journal.blocks.part(*unit), terms) for unit in units]
        price = total_of(parts, terms, with_headers=min(len(units), 1))
        checks.append(Check(journal, units, terms, known, price))
    return checks


def run_checks(
    checks: Sequence[Check],
    *,
    repair: bool = False,
    progress: Callable[[str, int, int], object] | Literal[False] | None = None,
) -> list[Comparison]:
    """Compare what was planned by `plan_checks`; see `verify`."""
    usd = sum(check.estimate.usd for check in checks if check.is_paid)
    if usd:
        Ledger(home()).check(usd=usd, artifact=f"a comparison of {', '.join(check.name for check in checks)}")
    name = checks[0].name if len(checks) == 1 else f"{len(checks)} arrays"
    n_bytes = sum(check.estimate.n_bytes for check in checks)
    with shown(name, n_bytes, lambda: usd, wanted=progress is None) as arrived:
        return [_compare(check, repair=repair, progress=progress or _say_nothing, arrived=arrived) for check in checks]


def _draw(
    journal: Journal, terms: Terms, *, share: float | None, usd: float | None, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Draw runs of rows, none across two blocks, of complete blocks alone; in order."""
    blocks, layout = journal.blocks, journal.claimed_layout()
    if not blocks.selection.n_elements:
        return []
    row_bytes = max(blocks.selection.n_elements * layout.dtype.itemsize // blocks.n_rows, 1)
    # the whole is read in blocks; a sample in runs of a request each, so that it comes from everywhere
    n_rows = min(LEAST_RANGE_BYTES // row_bytes, blocks.n_rows // _LEAST_UNITS) if share != 1 else blocks.rows
    n_rows = max(min(n_rows, blocks.rows), 1)
    units = []
    for nth in np.flatnonzero(journal.digests.any(axis=1)).tolist():
        block = blocks[nth]
        units += [(start, min(start + n_rows, block.stop)) for start in range(block.start, block.stop, n_rows)]
    n_units = math.ceil((share or 1) * len(units))
    if usd is not None and units:
        n_units = min(max(int(usd / estimate_read(layout, blocks.part(*units[0]), terms).usd), 1), len(units))
    chosen = np.sort(rng.permutation(len(units))[:n_units]).tolist()
    return [units[nth] for nth in chosen]


def _compare(
    check: Check,
    *,
    repair: bool,
    progress: Callable[[str, int, int], object],
    arrived: Callable[[int], object] | None,
) -> Comparison:
    journal, blocks = check.journal, check.journal.blocks
    complete = np.flatnonzero(journal.digests.any(axis=1)).tolist()
    damaged: set[int] = set()
    with journal.place.explain_errors("read"):
        copy = open_copy(journal.place, "r")
        for n_done, nth in enumerate(complete, 1):
            block = blocks[nth]
            digest = stored_digest(copy, journal.place, blocks.region(block.start, block.stop))
            if digest != journal.digests[nth].tobytes():
                damaged.add(nth)
            progress(f"{check.name}: digests", n_done, len(complete))
        source, faults = _open_source(check) if check.units else (None, [])
        compared: tuple[list[int], int] = ([], 0)
        if source is not None:
            compared = _compare_with_source(check, source, copy, damaged, faults, progress, arrived)
        differing, n_rows = compared
    comparison = Comparison(
        name=check.name,
        place=journal.place.url,
        n_blocks=len(blocks),
        n_missing=len(blocks) - len(complete),
        damaged=tuple(sorted(damaged)),
        differing=tuple(differing),
        faults=tuple(faults),
        n_rows_compared=n_rows,
    )
    if repair and comparison.bad:
        with journal.place.explain_errors(), journal.place.claimed():
            fresh = Journal.load(journal.place)  # a mirror may have been resumed meanwhile
            for nth in comparison.bad:
                fresh.record(nth, b"")
    return comparison


def _open_source(check: Check) -> tuple[LazyArray | None, list[str]]:
    """Open the source, and list how it differs from what was mirrored; None where it cannot be compared at all."""
    original = check.journal.original
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CatalogMismatchWarning)
        source = open_array(
            original.artifact, catalog=check.catalog, to=check.terms.destination, cache=False, local=False
        ).read_header()
    faults = [str(warning.message) for warning in caught if warning.category is CatalogMismatchWarning]
    now = Original(source.name, source.identity, source.shape, str(source.dtype))
    for what in ("identity", "shape", "dtype"):
        if getattr(now, what) != getattr(original, what):
            faults.append(
                f"the {what} of the source is {getattr(now, what)}; when it was mirrored it was "
                f"{getattr(original, what)}"
            )
    return (source if (now.shape, now.dtype) == (original.shape, original.dtype) else None), faults


def _compare_with_source(
    check: Check,
    source: LazyArray,
    copy: zarr.Array[Any],
    damaged: set[int],
    faults: list[str],
    progress: Callable[[str, int, int], object],
    arrived: Callable[[int], object] | None,
) -> tuple[list[int], int]:
    """Compare rows with the source; return the blocks that differ, and how many rows were compared."""
    blocks = check.journal.blocks
    differing: set[int] = set()
    n_rows, n_in_total = 0, sum(stop - start for start, stop in check.units)
    for start, stop in check.units:
        nth = start // blocks.rows
        try:
            wanted = source.read(blocks.part(start, stop), progress=arrived)
        except IntegrityError as error:
            faults.append(str(error))
            break
        if nth not in damaged:
            stored = _stored(copy, blocks.region(start, stop))
            if stored is None or not _is_same(stored, wanted):
                differing.add(nth)
        n_rows += stop - start
        progress(f"{check.name}: source", n_rows, n_in_total)
    return sorted(differing), n_rows


def _stored(copy: zarr.Array[Any], region: tuple[slice, ...]) -> npt.NDArray[Any] | None:
    """Read a part of the mirror; None where it cannot be decoded."""
    try:
        return np.asarray(copy[region] if region else copy[...])
    except (
        ValueError,
        LookupError,
        ArithmeticError,
        RuntimeError,
        OSError,
    ):  # what zarr and its codecs raise on chunks cut short or scrambled
        return None


def _is_same(stored: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> bool:
    """Compare bit by bit: not-a-number is the same as itself, and -0 is not 0."""
    if stored.shape != wanted.shape or stored.dtype != wanted.dtype:
        return False
    bits, wanted_bits = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (stored, wanted))
    return np.array_equal(bits, wanted_bits)


def _say_nothing(stage: str, n_done: int, n_in_total: int) -> None:
    pass
