"""Other people's attributions on a run's held-out models, next to the run's own datamodels.

Whatever gives each training example a score for each target, TRAK, influence functions, TracIn, a distance of pixels,
is judged by the same models: by LDS with its interval and ceiling, by measures that need no models (see
`dmpipeline.scoring.attributions`), and, where retraining is asked for, by what happens when the examples that it ranks
first are removed.
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from dmdata.reading.long_work import shows_count
from dmpipeline.applications.brittleness import Removals
from dmpipeline.applications.evidence import Evidence, checked_indices, find_evidence, is_run
from dmpipeline.errors import DataWarning, SpecError
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.moments.arrays import RowSliceable, as_rows, read_masks, read_outputs
from dmpipeline.runs.store import Run
from dmpipeline.runs.targets import TargetsName, check_targets, datamodels_path, fitted_array
from dmpipeline.scoring.attributions import (
    Proponents,
    class_detection,
    find_proponents,
    mislabel_detection,
    top_k_cardinality,
)
from dmpipeline.scoring.evaluation import Evaluation, evaluate
from dmpipeline.tables import Table, in_words

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    import dmdata

OWN = "datamodels"
"""Name of the row of the run's own datamodels."""


_REVERSED_LDS = -0.1
"""Intervals are over subsets, not over draws of random scores, whose LDS on digits is within 0.04 of 0."""


@dataclass(frozen=True, slots=True)
class AttributionScore:
    """How good one attribution is; None stands for what was not asked for, or does not exist for these data.

    Attributes
    ----------
    name : str
    lds : float
        Against the averages of the retrainings of each held-out subset; see `dmpipeline.evaluate`.
    lds_low, lds_high : float
        Its bootstrap interval over subsets.
    lds_single : float
        Against one retraining of each subset, as dattri's ``metric.lds`` with one run a subset.
    lds_ceiling, lds_ratio : float
        The highest LDS that the noise of the retrainings allows, and the share of it that is reached.
    class_detection : float or None
        Share of the targets' first `top_k` proponents that are of the target's class. quanda's ``ClassDetectionMetric``
        with ``s = top_k``.
    subclass_detection : float or None
        The same of the subclasses handed in. quanda's ``SubclassDetectionMetric``.
    top_k_cardinality : float
        Different examples among all targets' first `top_k` proponents, as a share of all. quanda's
        ``TopKCardinalityMetric``.
    mislabel_auc, mislabel_average_precision : float or None
        How well the training examples' scores for themselves find those that are mislabelled. dattri's
        ``metric.mislabel_detection_auc``; quanda's ``MislabelingDetectionMetric`` is a linear function of it.
    flipped : tuple of float, or None
        Share of the sampled targets that were classified wrongly after some number of `removals` up to each. dattri's
        ``metric.brittleness`` finds the number for one target.
    """

    name: str
    lds: float
    lds_low: float
    lds_high: float
    lds_single: float
    lds_ceiling: float
    lds_ratio: float
    class_detection: float | None
    subclass_detection: float | None
    top_k_cardinality: float
    mislabel_auc: float | None
    mislabel_average_precision: float | None
    flipped: tuple[float, ...] | None


@dataclass(frozen=True, slots=True, repr=False)
class AttributionScores(Table[AttributionScore]):
    """Attributions on the same held-out models: the run's own datamodels, where it has some, and then the others.

    Attributes
    ----------
    rows : tuple of AttributionScore
    targets : {"test", "train"}
        Whose outputs.
    n_targets, n_constant : int
        Of which some never vary, and have no LDS.
    n_subsets, n_subset_retrainings : int
        Held-out subsets, and how often the one trained least often was trained.
    subset_share : float
        Mean share of the training examples that a held-out subset has.
    level : float
        Of the intervals.
    top_k : int
        Proponents of a target that are looked at.
    removals : tuple of int
        How many examples were removed at most, for each of `flipped`; empty where nothing was retrained.
    brittle_targets : tuple of int
        The targets that they were removed for.
    n_retrainings : int
        Of each set with removals.
    seed : int
    """

    targets: TargetsName
    n_targets: int
    n_constant: int
    n_subsets: int
    n_subset_retrainings: int
    subset_share: float
    level: float
    top_k: int
    removals: tuple[int, ...]
    brittle_targets: tuple[int, ...]
    n_retrainings: int
    seed: int

    name: ClassVar[str] = "scores"

    def by_name(self) -> dict[str, dict[str, Any]]:
        """Return each attribution's measures by its name, ready for JSON: None stands for what is not defined."""
        rows: list[dict[str, Any]] = self.as_dict()[self.name]
        return {row.pop("name"): row for row in rows}

    def table(self) -> "RichTable":
        """Lay the rows out for a terminal, without what was measured of none."""
        from rich.table import Table as RichTable  # slow to import

        rows = self.as_dict()[self.name]
        shown = [(title, key) for key, title in _TITLES.items() if any(row[key] is not None for row in rows)]
        columns = ["attribution", "LDS", f"{self.level:.0%} interval", *(title for title, _ in shown)]
        columns += [f"flipped by {k:,}" for k in self.removals]
        table = RichTable(*columns, box=None, header_style="bold")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            interval = f"{in_words(row['lds_low'])} to {in_words(row['lds_high'])}"
            measures = [in_words(row[key]) for _, key in shown]
            flipped = [f"{share:.0%}" for share in row["flipped"] or ()]
            table.add_row(row["name"], in_words(row["lds"]), interval, *measures, *flipped)
        return table


_TITLES = {
    "lds_ceiling": "ceiling",
    "lds_ratio": "of its ceiling",
    "class_detection": "class detection",
    "subclass_detection": "subclass detection",
    "top_k_cardinality": "top-k cardinality",
    "mislabel_auc": "mislabel AUC",
    "mislabel_average_precision": "mislabel average precision",
}


@shows_count("retraining", "models")
def score(
    run: "Run | Evidence | str | os.PathLike[str]",
    scores: Mapping[str, Any],
    *,
    targets: TargetsName = "test",
    top_k: int = 1,
    subclasses: tuple[Sequence[Any], Sequence[Any]] | None = None,
    mislabelled: Sequence[int] | None = None,
    n_retrainings: int = 0,
    n_brittle_targets: int = 20,
    removals: Sequence[int] | None = None,
    level: float = 0.95,
    seed: int = 0,
    own: Evaluation | None = None,
    catalog: "dmdata.CatalogLike" = None,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> AttributionScores:
    """Score attributions of any origin on a run's held-out models, next to the run's own datamodels.

    Parameters
    ----------
    run : Run, path or name
        A run, or its directory, with or without datamodels; or a release's datamodels as for `find_evidence`.
    scores : mapping of str to array or path
        By the names to show, each a matrix of real numbers of shape (n_train, n_targets), positive where an example
        raises the target's output: an array, also memory-mapped, sparse, of torch or of pandas, or the path of a `.npy`
        file, which is read without unpickling. Negate scores of a loss.
    targets : {"test", "train"}
        Whose outputs they are for.
    top_k : int
        Proponents of a target that class detection and cardinality look at; quanda's own defaults are 5 and 1. An
        example that is both a target and trained on is not counted as its own proponent.
    subclasses : (sequence, sequence), optional
        A finer class of each training example and of each target.
    mislabelled : sequence of int, optional
        Training examples that are known to be mislabelled; for targets="train" alone, where scores have a diagonal.
    n_retrainings : int
        Above 0, examples are removed and models retrained this often on what remains, which is what takes time: at most
        one set for each attribution, target and number of removals, and the full set.
    n_brittle_targets : int
        Targets that are sampled for it from those that models of the full set classify correctly, by their mean margin.
    removals : sequence of int, optional
        Rising numbers of a target's highest scores to remove, equal scores in an order drawn by `seed`; by default
        10, 20, 40, 80, 160 and 320 as far as they are below n_train / 2.
    level : float
        Of the intervals.
    seed : int
        Of intervals, ceilings and the sample of targets.
    own : Evaluation, optional
        What `dmpipeline.evaluate` returned for the run's datamodels, where it is at hand.
    catalog, device
        As for `find_evidence` and `Run.train`.
    progress : callable, optional
        Called with (models done, models at most), while models are retrained.

    Returns
    -------
    scores : AttributionScores

    Raises
    ------
    SpecError
        For scores of another shape, that are not finite, or whose file cannot be read; for a name that is empty or the
        run's own; for options that do not fit the targets or the run. All before anything is retrained.
    RunError, TrainingError
        As for `find_evidence` and `retrain`.

    Warns
    -----
    DataWarning
        Of scores whose LDS is clearly below 0: they are probably of a loss.

    Notes
    -----
    Besides the held-out masks and outputs, memory holds a block of a matrix of scores at a time, of 64 MiB or a row,
    a few times over.
    """
    evidence = find_scored(run, targets, catalog=catalog)
    if own is not None and (own.level, own.n_targets) != (level, evidence.n_targets):
        raise SpecError(
            f"own is of {own.n_targets:,} targets at level {own.level:g}, not of {evidence.n_targets:,} at {level:g}; "
            "leave it out, and it is worked out here",
            field="own",
        )
    matrices = checked_scores(evidence, scores)
    options = _checked_options(evidence, top_k, subclasses, mislabelled)
    plan = Removals.of(evidence, n_retrainings, n_brittle_targets, removals, seed)
    has_own = evidence.run is None or datamodels_path(evidence.run, evidence.targets).exists()
    datamodels = evidence.datamodels() if has_own else None
    if datamodels is not None:
        matrices = {OWN: datamodels.weight, **matrices}
    found = {name: options.measures(name, matrix) for name, matrix in matrices.items()}

    masks, outputs = evidence.rows("held_out")
    rows, truth = read_masks(masks, 0, masks.shape[0]), read_outputs(outputs, 0, outputs.shape[0])
    n_each = None if evidence.run is None else evidence.run.spec.held_out.n_retrainings
    evaluations = {}
    for name, matrix in matrices.items():
        if name == OWN and own is not None:
            evaluations[name] = own
            continue
        estimate = datamodels if name == OWN and datamodels is not None else matrix
        evaluations[name] = evaluate(estimate, rows, truth, n_retrainings=n_each, level=level, seed=seed)
        if name != OWN:
            _warn_of_losses(name, evaluations[name])

    picked: tuple[int, ...] = ()
    flipped: dict[str, tuple[float, ...]] = {}
    if plan is not None:
        picked, flipped = plan.carried_out(matrices, device=device, progress=progress)
    first = next(iter(evaluations.values()))
    return AttributionScores(
        tuple(_row(name, of_name, found[name], flipped.get(name)) for name, of_name in evaluations.items()),
        targets=evidence.targets,
        n_targets=first.n_targets,
        n_constant=first.n_constant,
        n_subsets=first.n_subsets,
        n_subset_retrainings=first.n_retrainings,
        subset_share=float(rows.mean()),
        level=level,
        top_k=top_k,
        removals=() if plan is None else plan.removals,
        brittle_targets=picked,
        n_retrainings=n_retrainings,
        seed=seed,
    )


def find_scored(
    run: "Run | Evidence | str | os.PathLike[str]",
    targets: TargetsName = "test",
    *,
    catalog: "dmdata.CatalogLike" = None,
) -> Evidence:
    """Find what scores are judged by, as `find_evidence` does, but of a run also where it has no datamodels yet."""
    check_targets(targets)
    if isinstance(run, Datamodels):
        raise SpecError("datamodels alone have no held-out models to score with; hand in their run, or its directory")
    if not isinstance(run, Run | Evidence) and is_run(run):
        run = Run.open(os.path.expanduser(os.fspath(run)))
    if isinstance(run, Run) and not datamodels_path(run, targets).exists():
        (_, n_train), (_, n_targets) = run.array("train_masks").shape, run.array(fitted_array(run, targets)).shape
        return Evidence(str(run.path), targets, n_train, n_targets, run=run)
    return find_evidence(run, targets, catalog=catalog)


def checked_scores(evidence: "Evidence | Run", scores: Mapping[str, Any]) -> dict[str, RowSliceable]:
    """Open attributions by name, and refuse those that are not of a run's examples and targets; elements are not read.

    Parameters
    ----------
    evidence : Evidence or Run
        A run stands for its test examples.
    scores : mapping of str to array or path
        As for `score`.

    Raises
    ------
    SpecError
    """
    if isinstance(evidence, Run):
        evidence = find_scored(evidence)
    if not isinstance(scores, Mapping):
        raise SpecError(
            f'scores are a {type(scores).__name__}; hand in a mapping of names to matrices, such as {{"trak": scores}}',
            field="scores",
        )
    if not scores:
        raise SpecError('there are no scores; hand in at least one matrix by name, as {"trak": scores}', field="scores")
    for name in scores:
        if not isinstance(name, str) or not name.strip() or name == OWN:
            why = "is the row of the run's own datamodels" if name == OWN else "is no name"
            raise SpecError(f"{name!r} {why}; name each matrix of scores by its method", field="scores", value=name)
    return {name: _fitting(evidence, name, matrix) for name, matrix in scores.items()}


def _fitting(evidence: Evidence, name: str, matrix: Any) -> RowSliceable:
    """Open one attribution, and compare its shape."""
    what = f"scores {name!r}"
    if isinstance(matrix, str | os.PathLike):
        matrix = _opened(matrix)
    array = as_rows(matrix, what)
    dtype = getattr(array, "dtype", None)
    if getattr(dtype, "kind", "f") not in "fiubV":  # V: bfloat16, which is read as float32
        raise SpecError(f"{what} have dtype {dtype}; expected real numbers", field=name, dtype=str(dtype))
    shape, expected = tuple(array.shape), (evidence.n_train, evidence.n_targets)
    if shape == expected:
        return array
    remedy = f"hand in those of {evidence.name}"
    if shape == expected[::-1]:
        remedy = "they look transposed: hand in scores.T"
    elif evidence.targets == "train" and shape[:1] == expected[:1]:
        remedy = 'for scores of test examples, choose targets="test"'
    elif evidence.targets == "test" and shape == (evidence.n_train, evidence.n_train):
        remedy = 'for scores of training examples, choose targets="train"'
    raise SpecError(
        f"{what} have shape {shape}; expected {expected}: a row for each training example, a column for each "
        f"{evidence.targets} example; {remedy}",
        field=name,
        shape=shape,
    )


def _opened(path: str | os.PathLike[str]) -> npt.NDArray[Any]:
    """Map a `.npy` file into memory."""
    try:
        array = np.load(os.path.expanduser(path), mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise SpecError(f"there is no file {path}; name a .npy that numpy.save wrote", path=path) from error
    except (OSError, ValueError, EOFError) as error:
        raise SpecError(
            f"{path} cannot be read as a .npy without pickles ({error}); write it with numpy.save(path, scores), where "
            "scores is a matrix of numbers",
            path=path,
        ) from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise SpecError(f"{path} holds several arrays; write the matrix alone with numpy.save(path, scores)", path=path)
    return array


@dataclass(frozen=True, slots=True)
class _Options:
    """What is measured without models."""

    top_k: int
    is_of_train: bool
    classes: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None
    subclasses: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None
    mislabelled: list[int] | None

    def measures(self, name: str, matrix: RowSliceable) -> dict[str, float | None]:
        """Read a matrix once, and measure it."""
        found = find_proponents(matrix, self.top_k, is_of_train=self.is_of_train, name=f"scores {name!r}")
        auc = average_precision = None
        if self.mislabelled is not None and found.self_influence is not None:
            mislabels = mislabel_detection(found.self_influence, self.mislabelled)
            auc, average_precision = mislabels.auc, mislabels.average_precision
        return {
            "class_detection": self._detection(found, self.classes),
            "subclass_detection": self._detection(found, self.subclasses),
            "top_k_cardinality": top_k_cardinality(found.indices),
            "mislabel_auc": auc,
            "mislabel_average_precision": average_precision,
        }

    @staticmethod
    def _detection(found: Proponents, labels: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None) -> float | None:
        return None if labels is None else class_detection(found.indices, *labels)[0]


def _checked_options(
    evidence: Evidence,
    top_k: int,
    subclasses: tuple[Sequence[Any], Sequence[Any]] | None,
    mislabelled: Sequence[int] | None,
) -> _Options:
    is_of_train = evidence.targets == "train"
    most = evidence.n_train - is_of_train
    if not 1 <= top_k <= most:
        raise SpecError(f"top_k is {top_k}; choose from 1 to {most:,}", field="top_k", value=top_k)
    finer = None
    if subclasses is not None:
        sizes = tuple(len(part) for part in subclasses)
        if sizes != (evidence.n_train, evidence.n_targets):
            raise SpecError(
                f"subclasses have lengths {sizes}; expected a pair: {evidence.n_train} of the training examples and "
                f"{evidence.n_targets} of the {evidence.targets} examples",
                field="subclasses",
                value=sizes,
            )
        finer = (np.asarray(subclasses[0]), np.asarray(subclasses[1]))
    wrong = None
    if mislabelled is not None:
        if not is_of_train:
            raise SpecError(
                "mislabelled examples are found by the scores of training examples for themselves; hand in scores of "
                'shape (n_train, n_train) with targets="train"',
                field="mislabelled",
            )
        wrong = sorted(set(checked_indices(mislabelled, evidence.n_train, "training example", field="mislabelled")))
        if not 0 < len(wrong) < evidence.n_train:
            raise SpecError(
                f"{len(wrong)} of {evidence.n_train} training examples are mislabelled; name at least one, and not all",
                field="mislabelled",
            )
    labels = (None, None) if evidence.run is None or not _has_classes(evidence) else evidence.labels()
    classes = None if labels[0] is None or labels[1] is None else (labels[0], labels[1])
    return _Options(top_k, is_of_train, classes, finer, wrong)


def _has_classes(evidence: Evidence) -> bool:
    dataset = evidence.dataset()
    return not dataset.is_regression and dataset.train_labels.ndim == 1


def _row(
    name: str, evaluation: Evaluation, measures: dict[str, float | None], flipped: tuple[float, ...] | None
) -> AttributionScore:
    ldses = ("lds", "lds_low", "lds_high", "lds_single", "lds_ceiling", "lds_ratio")
    values: dict[str, Any] = {lds: getattr(evaluation, lds) for lds in ldses} | measures
    return AttributionScore(name=name, **values, flipped=flipped)


def _warn_of_losses(name: str, evaluation: Evaluation) -> None:
    if evaluation.lds < _REVERSED_LDS and evaluation.lds_high < 0:
        warnings.warn(
            f"the LDS of scores {name!r} is {evaluation.lds:.3f}: what they say raises an output lowers it; if they "
            "are scores of a loss, hand in their negative",
            DataWarning,
            stacklevel=4,
        )
