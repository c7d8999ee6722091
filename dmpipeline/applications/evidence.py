"""What a question is answered from: a run on disk, or datamodels and arrays that a catalog lists, read as needed.

Weights are known in full where they are a run's. Those of a release are read a target at a time, and what that costs
can be asked before.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

import dmdata
from dmdata.catalog.catalogued import catalog_below
from dmdata.errors import CatalogError, FormatError
from dmpipeline.data.examples import Dataset
from dmpipeline.draws.subsets import sizes_of
from dmpipeline.errors import SpecError
from dmpipeline.fitting.datamodels import Datamodels, SpaceName
from dmpipeline.fitting.fitted import load_datamodels
from dmpipeline.moments.arrays import RowSliceable
from dmpipeline.runs.derivation import warn_of_old_datamodels
from dmpipeline.runs.directory import require_run
from dmpipeline.runs.store import Run
from dmpipeline.runs.targets import TargetsName, check_targets, fitted_array, require_datamodels
from dmpipeline.workflow.run_arrays import open_rows

RowsName = Literal["models", "held_out"]
"""Which models: those that datamodels are fitted on, or those kept to score with."""


Asked: TypeAlias = "Run | Evidence | Datamodels | str | os.PathLike[str]"
"""What a question may be asked of; see `find_evidence`."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Datamodels, and what else is known around them; made by `find_evidence`.

    Attributes
    ----------
    name : str
        Path of the run, or name or address of the datamodels.
    targets : {"test", "train"}
        Whose outputs they predict.
    n_train, n_targets : int
    run : Run or None
        None where datamodels are not of a run on disk: then nothing can be retrained, and no dataset is known.
    """

    name: str
    targets: TargetsName
    n_train: int
    n_targets: int
    run: Run | None = None
    _known: Datamodels | None = field(default=None, repr=False)
    _held: tuple[int, ...] | None = field(default=None, repr=False)
    _catalog: dmdata.CatalogLike = field(default=None, repr=False)
    _space: SpaceName | None = field(default=None, repr=False)
    _to: str | None = field(default=None, repr=False)

    @property
    def is_at_hand(self) -> bool:
        """Whether all weights are in memory; otherwise they are read as they are asked for, and may be paid."""
        return self._known is not None and self._held is None

    def held(self, targets: Sequence[int] | None = None) -> "Evidence":
        """Return evidence with the weights of these targets, or of all, in memory: a release's are read now, once."""
        if self._known is not None:
            return self
        held = None if targets is None else tuple(self.checked_once(targets))
        return replace(self, _known=self.datamodels(held), _held=held)

    def datamodels(self, targets: Sequence[int] | None = None) -> Datamodels:
        """Return datamodels of these targets, in this order, or of all; their weights are of raw masks.

        Those of a release are read now: the columns asked for are what is paid.
        """
        picked = None if targets is None else np.asarray(self.checked(targets), np.intp)
        if self._held is not None and picked is not None and set(picked.tolist()) <= set(self._held):
            places = {target: place for place, target in enumerate(self._held)}
            picked = None if tuple(picked) == self._held else np.array([places[i] for i in picked.tolist()], np.intp)
        elif not self.is_at_hand:
            loaded = Datamodels.load(self.name, catalog=self._catalog, targets=picked, space=self._space, to=self._to)
            return loaded.to_raw(mean=self._share()) if loaded.space == "standardised" else loaded
        assert self._known is not None  # noqa: S101 - told above
        return self._known if picked is None else _columns(self._known, picked)

    def weights_of(self, example: int) -> npt.NDArray[np.float32]:
        """Return the weights of one training example for all targets, of raw masks, shape (n_targets,)."""
        if self._known is not None and self._held is None:
            known: npt.NDArray[np.float32] = self._known.weight[example]
            return known
        weight = self._open(f"{self.name}/weight")
        row = np.asarray(weight[example], np.float32)
        if self._is_standardised():
            share = self._share()
            row = row / np.float32((share * (1 - share)) ** 0.5)
        return row

    def rows(self, which: RowsName) -> tuple[RowSliceable, RowSliceable]:
        """Open the masks (n_models, n_train) and outputs (n_models, n_targets) of some models, to be read lazily.

        Raises
        ------
        SpecError
            If none are known.
        """
        if self.run is not None:
            rows = getattr(self.run.spec.rows, which)
            names = ("train_masks", fitted_array(self.run, self.targets))
            masks, outputs = (open_rows(self.run, name, rows) for name in names)
            return masks, outputs
        base = self.name.rpartition("/")[0]
        try:
            arrays = [self._open(f"{base}/{name}") for name in ("train_masks", f"{self.targets}_margins")]
        except CatalogError as error:
            raise SpecError(
                f"no models are known of {self.name}; name the datamodels of a run, or of a catalog that lists masks "
                "and margins next to them",
                value=self.name,
            ) from error
        rows = arrays[0].rows
        if rows is None:
            raise SpecError(f"no catalog says which models of {base} are for fitting", value=self.name)
        part = rows.fit if which == "models" else rows.evaluation
        return _Part(arrays[0], part), _Part(arrays[1], part)

    def dataset(self) -> Dataset:
        """Load the examples.

        Raises
        ------
        SpecError
            If they are not known.
        """
        return self.require_run("the examples themselves are").dataset()

    def require_run(self, what: str) -> Run:
        """Return the run, or raise SpecError that `what` ("to retrain is") known of runs on disk alone."""
        if self.run is None:
            raise _no_run(self.name, what)
        return self.run

    def require_measurable(self) -> Run:
        """Return the run that models are retrained with.

        Raises
        ------
        SpecError
            If there is none on disk, or retraining would measure another output than the datamodels predict.
        """
        run = self.require_run("what models are retrained with is")
        if fitted_array(run, self.targets).partition("_")[2] != fitted_array(run).partition("_")[2]:
            raise SpecError(
                f"{self.name} has datamodels of {fitted_array(run, self.targets)}, but {fitted_array(run)} is what "
                "retraining measures; leave retraining out, or ask of test examples",
                field="n_retrainings",
            )
        return run

    def output(self) -> str | None:
        """Name the output that datamodels predict, as "margins"; None where no catalog lists one next to them."""
        if self.run is not None:
            return fitted_array(self.run, self.targets).partition("_")[2]
        prefix = f"{self.name.rpartition('/')[0]}/{self.targets}_"
        names = [artifact.name for artifact in dmdata.load_catalog(self._catalog).artifacts()]
        listed = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        listed -= {"datamodels", "logits", "predicted_labels"}
        return "margins" if "margins" in listed else listed.pop() if len(listed) == 1 else None

    def labels(self) -> tuple[npt.NDArray[Any] | None, npt.NDArray[Any] | None]:
        """Return the labels of training examples and of targets, as the dataset numbers them; None if not known."""
        if self.run is None:
            return None, None
        dataset = self.dataset()
        return dataset.train_labels, dataset.train_labels if self.targets == "train" else dataset.test_labels

    def checked(self, targets: Sequence[int]) -> list[int]:
        """Return targets as whole numbers; SpecError for one that is not there."""
        return checked_indices(targets, self.n_targets, f"{self.targets} example", field="target")

    def checked_one(self, target: int) -> int:
        """Return one target as a whole number; SpecError for one that is not there, and for several."""
        return checked_index(target, self.n_targets, f"{self.targets} example", field="target")

    def checked_once(self, targets: Sequence[int]) -> list[int]:
        """Return targets as whole numbers; SpecError for one that is not there, or is there twice."""
        picked = self.checked(targets)
        if len(set(picked)) < len(picked):
            twice = next(target for target in picked if picked.count(target) > 1)
            raise SpecError(f"target {twice} is asked for twice; name each once", field="columns", value=twice)
        return picked

    @property
    def alpha(self) -> float | None:
        """Share of the examples in the subsets of the fitted models; None where it is not known."""
        if self.run is not None:
            sizes = sizes_of(self.run.spec, self.run.provenance)
            return None if sizes is None else sizes.mean / sizes.n_train
        return self._named_share()

    def _open(self, name: str) -> dmdata.LazyArray:
        return dmdata.open(name, catalog=self._catalog, to=self._to)

    def _is_standardised(self) -> bool:
        if self._space is not None:
            return self._space == "standardised"
        try:
            self._open(f"{self.name}/standardised")
        except (FormatError, CatalogError):
            return False
        return True

    def _share(self) -> float:
        share = self._named_share()
        if share is not None:
            return share
        raise SpecError(
            f"{self.name} holds weights of standardised masks, and no name says of which alpha; turn them with "
            "Datamodels.to_raw(mean=0.5) and hand these in",
            value=self.name,
        )

    def _named_share(self) -> float | None:
        """Read which share of the examples a subset holds off the name, as 0.5 of `cifar/50pct/test_datamodels`."""
        for part in self.name.split("/"):
            found = re.search(r"(?:^|_)(\d{1,2})pct(?:\.|$)", part)
            if found:
                return int(found[1]) / 100
        return None


def find_evidence(
    asked: Asked,
    targets: TargetsName = "test",
    *,
    catalog: dmdata.CatalogLike = None,
    space: SpaceName | None = None,
    to: str | None = None,
) -> Evidence:
    """Find what a question is answered from.

    Parameters
    ----------
    asked : Run, Datamodels, path or name
        A run, or its directory; fitted datamodels alone; a name in a catalog, as "cifar/50pct" or
        "cifar/50pct/train_datamodels", or the address of a `.pt`.
    targets : {"test", "train"}
        Whose outputs.
    catalog : Catalog, path or URL, optional
        See `dmdata.load_catalog`.
    space : {"raw", "standardised"}, optional
        Of a release's weights, see `Datamodels.load`.
    to : {"internet", "same-region", "cross-region"}, optional
        Where a release's bytes go, as for `dmdata.open`.

    Raises
    ------
    IncompleteRunError
        If the run has no datamodels yet.
    SpecError, RunError, CatalogError
        If there is no such thing.

    Warns
    -----
    OldResultWarning
        If a run's datamodels were fitted on other models than it has now.
    """
    if isinstance(asked, Evidence):
        return asked
    check_targets(targets)
    if isinstance(asked, Datamodels):
        if asked.space != "raw":
            raise SpecError(
                "these weights are of standardised masks; hand in datamodels.to_raw(mean=0.5), or whichever share of "
                "the subsets holds an example"
            )
        return Evidence("the datamodels given", targets, asked.n_train, asked.n_targets, _known=asked)
    if not isinstance(asked, Run) and is_run(asked):
        asked = Run.open(Path(asked).expanduser())
    if isinstance(asked, Run):
        require_datamodels(asked, targets)
        known = load_datamodels(asked, targets)
        warn_of_old_datamodels(asked, targets)
        return Evidence(str(asked.path), targets, known.n_train, known.n_targets, run=asked, _known=known)
    name = weights_name(asked, targets)
    targets = "train" if name.rpartition("/")[2].startswith("train") else "test"
    weight = dmdata.open(f"{name}/weight", catalog=catalog, to=to)
    n_train, n_targets = weight.shape
    return Evidence(name, targets, n_train, n_targets, _catalog=catalog, _space=space, _to=to)


def is_run(asked: str | os.PathLike[str]) -> bool:
    """Tell whether a run lies there, rather than what a catalog or an address names.

    Raises
    ------
    RunError
        If it is a folder of several runs, or a path at which there is nothing.
    """
    path, text = Path(asked).expanduser(), os.fspath(asked)
    if "://" in text or (path / "run.yaml").exists():
        return "://" not in text
    is_lost = path.is_absolute() or text.startswith(".")
    if any(path.glob("*/run.yaml")) or (is_lost and not path.exists() and catalog_below(text) is None):
        require_run(path)
    return False


def run_at(asked: "Run | Evidence | str | os.PathLike[str]", what: str) -> Run:
    """Return a run that is meant; see `Evidence.require_run` for `what`. Nothing of a release is read.

    Raises
    ------
    SpecError, RunError
        If it is none.
    """
    if isinstance(asked, Run):
        return asked
    if isinstance(asked, Evidence):
        return asked.require_run(what)
    if is_run(asked):
        return Run.open(Path(asked).expanduser())
    raise _no_run(os.fspath(asked), what)


def weights_name(asked: str | os.PathLike[str], targets: TargetsName) -> str:
    """Name the datamodels that are meant by a name or address: "cifar/50pct" means those of these targets there."""
    name = os.fspath(asked)
    return name if name.endswith(("_datamodels", ".pt")) else f"{name.rstrip('/')}/{targets}_datamodels"


def checked_indices(indices: Sequence[int] | npt.NDArray[Any], n: int, what: str, *, field: str) -> list[int]:
    """Return indices as Python's whole numbers, each from 0 to n - 1.

    Raises
    ------
    SpecError
        For any other; `what` is how one of them is called, as "test example".
    """
    array = np.asarray(indices)
    if array.size and array.dtype.kind not in "iu":
        raise SpecError(f"{field} {indices!r} is not a list of whole numbers; number {what}s from 0", field=field)
    numbers: list[int] = array.astype(np.int64).reshape(-1).tolist()
    for number in numbers:
        if not 0 <= number < n:
            last = "; they are not counted from the end" if -n <= number < 0 else ""
            raise SpecError(f"there is no {what} {number}; choose 0 to {n - 1:,}{last}", field=field, value=number)
    return numbers


def checked_index(index: Any, n: int, what: str, *, field: str) -> int:
    """Return one index as Python's whole number, from 0 to n - 1; SpecError for any other, and for several at once."""
    if np.ndim(index) or np.asarray(index).dtype.kind not in "iu":
        several = f"; for several call it once for each, as in a loop over their {field}s" if np.ndim(index) else ""
        raise SpecError(
            f"{field} {index!r} is not one whole number; give the number of one {what}, from 0 to {n - 1:,}{several}",
            field=field,
            value=index,
        )
    return checked_indices([index], n, what, field=field)[0]


def _no_run(name: str, what: str) -> SpecError:
    return SpecError(
        f"{name} is no run on disk, and {what} known of runs alone; regenerate it with `dmpipeline init DIRECTORY`",
        value=name,
    )


def _columns(known: Datamodels, picked: npt.NDArray[np.intp]) -> Datamodels:
    return Datamodels(
        weight=np.ascontiguousarray(known.weight[:, picked]),
        bias=known.bias[picked],
        lam=known.lam[picked],
        prior_strength=known.prior_strength,
        fitted_masks=known.fitted_masks,
        pairs=None if known.pairs is None else known.pairs.columns(picked),
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """Some adjacent rows of a release's array, still lazy."""

    array: dmdata.LazyArray
    part: slice

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.part.stop - self.part.start, *self.array.shape[1:])

    def __getitem__(self, rows: slice) -> npt.NDArray[Any]:
        start, stop, _ = rows.indices(self.shape[0])
        return self.array[self.part.start + start : self.part.start + stop]
