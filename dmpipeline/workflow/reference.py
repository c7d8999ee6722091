"""What a run is compared with, another run or arrays that a catalog lists; priced before anything is read."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import dmdata
from dmdata.bodies import estimate_read
from dmdata.errors import CatalogError
from dmdata.layout.selection import select
from dmdata.release.catalogs import in_force
from dmdata.release.opening import read_is_paid
from dmdata.release.pricing import claimed_layout, named_prices, price_reads
from dmpipeline.errors import SpecError
from dmpipeline.fitting.datamodels import Datamodels, price_load
from dmpipeline.runs.store import Run
from dmpipeline.runs.targets import TargetsName, fitted_array
from dmpipeline.workflow.run_arrays import artifact_name

LEAST_FIT_ROWS = 20
"""Where there are fewer models to fit on than this, held-out ones are compared."""

_PORTIONS = (1, 3)
# Rows are read up to 100, 300, 1,000, 3,000 and so on; what may be called different by chance is shared by the looks.
_FIRST_LOOK = 100


def portions(n_rows: int) -> list[int]:
    """List after how many rows to look: 100, 300, 1,000, 3,000 and so on, and all."""
    looks, scale = [], _FIRST_LOOK
    while scale < n_rows:
        looks += [scale * factor for factor in _PORTIONS if scale * factor < n_rows]
        scale *= 10
    return [*looks, n_rows]


@dataclass(frozen=True, slots=True)
class Part:
    """Which models of an ensemble are compared: adjacent rows, of which `n_retrainings` share a subset."""

    rows: range
    n_retrainings: int = 1

    @classmethod
    def of(cls, fit: range, held_out: range, n_retrainings: int) -> "Part":
        """Choose models to fit on, each of its own subset, or held-out ones where there are hardly any of these."""
        return cls(fit) if len(fit) >= min(LEAST_FIT_ROWS, len(held_out)) else cls(held_out, n_retrainings)

    def groups(self, n_rows: int) -> npt.NDArray[np.intp]:
        """Return the number of the subset of each of the first rows."""
        return np.arange(n_rows) // self.n_retrainings


@dataclass(frozen=True, slots=True)
class Reference:
    """An ensemble to compare with; made by `find_reference`. Nothing of its arrays is read yet.

    Attributes
    ----------
    name : str
        As people call it.
    prefix : str
        What names of its artifacts begin with, as "cifar/50pct".
    targets : {"test", "train"}
    outputs, masks : dmdata.Artifact, and dmdata.Artifact or None
        The arrays that are compared.
    part : Part
        Which of their rows.
    held_out : Part
        Models to score datamodels with; may be empty.
    has_weights : bool
        Whether datamodels are listed.
    """

    name: str
    prefix: str
    targets: TargetsName
    outputs: dmdata.Artifact
    masks: dmdata.Artifact | None
    part: Part
    held_out: Part
    has_weights: bool
    _catalog: dmdata.Catalog
    _to: str | None

    @property
    def arrays(self) -> tuple[dmdata.Artifact, ...]:
        """What is read of each row."""
        return (self.outputs,) if self.masks is None else (self.masks, self.outputs)

    def prices(self, n_rows: int) -> list[tuple[dmdata.Artifact, dmdata.Estimate]]:
        """Price the first `n_rows` rows that are compared, in portions, by what the catalog claims."""
        terms, _ = in_force(self._to, self._catalog)
        rows = self.part.rows[:n_rows]
        looks = [0, *portions(len(rows))]
        parts = [rows[start:stop] for start, stop in itertools.pairwise(looks)]
        priced = []
        for artifact in self.arrays:
            layout = claimed_layout(artifact)
            reads = [(select(slice(part.start, part.stop), layout.shape, orthogonal=True), 1) for part in parts]
            priced.append((artifact, price_reads(artifact, layout, reads, terms)))
        return priced

    def refit_prices(
        self, targets: npt.NDArray[np.intp], held_out: range
    ) -> list[tuple[dmdata.Artifact, dmdata.Estimate]]:
        """Price what comparing datamodels reads: those of some targets, and rows of held-out models."""
        if not self.has_weights:
            return []
        terms, _ = in_force(self._to, self._catalog)
        priced = price_load(self.datamodels_name(), catalog=self._catalog, targets=targets, to=self._to)
        for artifact in self.arrays if held_out else ():  # whose headers were read for the rows before
            layout, table = claimed_layout(artifact), named_prices(artifact, terms)
            rows = select(slice(held_out.start, held_out.stop), layout.shape, orthogonal=True)
            priced.append((artifact, estimate_read(layout, rows, terms, table=table)))
        return priced

    def datamodels(self, targets: npt.NDArray[np.intp]) -> Datamodels:
        """Read its datamodels of some targets, as they are written."""
        return Datamodels.load(self.datamodels_name(), catalog=self._catalog, targets=targets, to=self._to)

    @property
    def is_paid(self) -> bool:
        """Whether reading it is charged, as far as is known before."""
        terms, _ = in_force(self._to, self._catalog)
        weights = (self._catalog.find(f"{self.datamodels_name()}/weight"),) if self.has_weights else ()
        return any(read_is_paid(artifact, terms) for artifact in (*self.arrays, *weights))

    def open(self, artifact: str) -> dmdata.LazyArray:
        """Open one of its arrays, as "test_margins" or "test_datamodels/weight"."""
        return dmdata.open(f"{self.prefix}/{artifact}", catalog=self._catalog, to=self._to)

    def datamodels_name(self) -> str:
        """Name its datamodels."""
        return f"{self.prefix}/{self.targets}_datamodels"

    def rows(self) -> "ReferenceRows":
        """Open what is compared; headers are read now."""
        terms, _ = in_force(self._to, self._catalog)
        opened = [self.open(artifact.name.removeprefix(f"{self.prefix}/")).read_header() for artifact in self.arrays]
        paid = tuple(read_is_paid(artifact, terms) for artifact in self.arrays)
        return ReferenceRows(opened[-1], opened[0] if self.masks is not None else None, self.part, paid)


@dataclass(slots=True)
class ReferenceRows:
    """Rows of a reference, read from the first on, each once.

    Attributes
    ----------
    usd : float
        What was paid so far, by the plans of the reads; without headers.
    n_rows : int
        Rows read so far.
    """

    outputs: dmdata.LazyArray
    masks: dmdata.LazyArray | None
    part: Part
    paid: tuple[bool, ...]
    usd: float = 0.0
    n_rows: int = 0

    @property
    def n_available(self) -> int:
        """How many rows there are."""
        return len(self.part.rows)

    def price(self, n_rows: int) -> float:
        """Price the next rows up to `n_rows` in dollars; 0 where nobody pays."""
        rows = self._next(n_rows)
        arrays = [array for array in (self.masks, self.outputs) if array is not None]
        return sum(
            array.estimate(slice(rows.start, rows.stop)).usd
            for array, is_charged in zip(arrays, self.paid, strict=True)
            if is_charged
        )

    def read(self, n_rows: int) -> tuple[npt.NDArray[np.bool_] | None, npt.NDArray[Any]]:
        """Read the next rows, up to `n_rows` in total."""
        rows = self._next(n_rows)
        self.usd += self.price(n_rows)
        masks = None if self.masks is None else np.asarray(self.masks[rows.start : rows.stop], np.bool_)
        outputs = np.asarray(self.outputs[rows.start : rows.stop])
        self.n_rows = n_rows
        return masks, outputs

    def _next(self, n_rows: int) -> range:
        return self.part.rows[self.n_rows : n_rows]


def find_reference(
    run: Run,
    against: "Run | str | os.PathLike[str]",
    targets: TargetsName = "test",
    *,
    catalog: dmdata.CatalogLike = None,
    to: str | None = None,
) -> Reference:
    """Find what to compare a run with; reads catalogs alone.

    Parameters
    ----------
    run : Run
        Which is to be compared: the same output of the same targets is looked for.
    against : Run, path, URL or name
        Another run or its directory; a folder or a URL with a catalog; or a name in `catalog`, as "cifar/50pct".
    targets : {"test", "train"}
    catalog : Catalog, path or URL, optional
        See `dmdata.load_catalog`.
    to : {"internet", "same-region", "cross-region"}, optional
        Where the bytes go.

    Raises
    ------
    SpecError
        If the catalog lists several ensembles and none has the run's dataset and alpha.
    IncompleteRunError
        If the other run is not trained yet.
    CatalogError, RunError
        If there is no such thing.
    """
    array = fitted_array(run, targets)
    listed, prefix, name = _listed(run, against, array, catalog)
    outputs = listed.find(f"{prefix}/{array}")
    masks = listed.find(f"{prefix}/train_masks") if listed.has(f"{prefix}/train_masks") else None
    if outputs.schema is None:
        raise CatalogError(f"{outputs.name} holds several arrays; the outputs of models are one", name=outputs.name)
    roles, n_rows = outputs.rows, outputs.schema.shape[0]
    if roles is None:
        part, held_out = Part(range(n_rows)), Part(range(0))
    else:
        fit, evaluation = range(*roles.fit), range(*roles.evaluation)
        part, held_out = Part.of(fit, evaluation, roles.n_retrainings), Part(evaluation, roles.n_retrainings)
    has_weights = listed.has(f"{prefix}/{targets}_datamodels/weight")
    return Reference(name, prefix, targets, outputs, masks, part, held_out, has_weights, listed, to)


def _listed(
    run: Run, against: "Run | str | os.PathLike[str]", array: str, catalog: dmdata.CatalogLike
) -> tuple[dmdata.Catalog, str, str]:
    """Find the catalog, the prefix of names in it, and what people call it."""
    if not isinstance(against, Run) and os.fspath(against).startswith("~"):
        against = Path(against).expanduser()
    if not isinstance(against, Run) and (Path(against) / "run.yaml").exists():
        against = Run.open(Path(against))
    if isinstance(against, Run):
        against.require_complete()
        return dmdata.load_catalog(against.path), artifact_name(against, "").rstrip("/"), str(against.path)
    text = os.fspath(against)
    if "://" in text or text.endswith((".yaml", ".yml")) or Path(text).is_dir():
        listed = dmdata.load_catalog(text)
        prefix = _prefix_in(listed, run, array, text)
        return listed, prefix, f"{prefix} of {text}"
    prefix = "/".join(text.strip("/").split("/")[:2])
    return dmdata.load_catalog(in_force(None, catalog)[1]), prefix, text.strip("/")


def _prefix_in(listed: dmdata.Catalog, run: Run, array: str, where: str) -> str:
    wanted = artifact_name(run, "").rstrip("/")
    prefixes = list(dict.fromkeys(_prefixes(listed, array)))
    if wanted in prefixes:
        return wanted
    if len(prefixes) == 1:
        return prefixes[0]
    if not prefixes:
        raise SpecError(
            f"{where} lists no {array}, which is what the datamodels of {run.path} predict; name a reference that does",
            field="against",
            value=where,
        )
    raise SpecError(
        f"{where} lists {', '.join(prefixes)}, and none is {wanted}; name one of them, with its catalog as catalog",
        field="against",
        value=where,
    )


def _prefixes(listed: dmdata.Catalog, array: str) -> Iterator[str]:
    for artifact in listed.artifacts():
        prefix, _, name = artifact.name.rpartition("/")
        if name == array:
            yield prefix
