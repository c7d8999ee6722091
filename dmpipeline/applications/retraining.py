"""Training on other sets than a run's own subsets: the full training set, less some examples, or with other labels.

What a model says when it is trained on such a set is what certifies a prediction about it. Each set has a file in the
run, ``retrainings/<digest of the set>.npz``, with the outputs of its retrainings so far. Sets are trained in groups,
and a group's files are written when it is done: so a call that was stopped resumes, another that asks for the same set
finds it, and one that asks for more retrainings adds those that are missing. Every random draw follows from the run's
seed, the set and the number of the retraining; draws of different sets are independent.
"""

import dataclasses
import hashlib
import io
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dmpipeline.errors import RunError, SpecError, explain_os_errors
from dmpipeline.models.outputs import output_of
from dmpipeline.runs.directory import write_beside
from dmpipeline.runs.preparation import Prepared
from dmpipeline.runs.store import Run
from dmpipeline.runs.targets import TargetsName, fitted_array
from dmpipeline.training.train import Logits, Trainer, make_trainer

PLACE = "retrainings"
"""Folder of a run with a file for each set."""

MOST_RETRAININGS = 2**14
"""As many retrainings of one set have numbers of their own to draw from."""

_GROUP_MODELS = 256
_FORM = 1


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """A training set: which of the examples it holds, and which of them bear other labels.

    Attributes
    ----------
    mask : bytes
        Of n_train bytes, 1 where the example is in. `of` makes it.
    relabelled : tuple of (int, int)
        Example and class, by rising example.
    """

    mask: bytes = field(repr=False)
    relabelled: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(
        cls, n_train: int, *, without: Iterable[int] = (), relabelled: Iterable[tuple[int, int]] = ()
    ) -> "TrainingSet":
        """Make the full set without some examples, some others with other labels."""
        mask = np.ones(n_train, np.bool_)
        mask[np.fromiter(without, np.intp)] = False
        if not mask.any():
            raise SpecError(f"all {n_train} training examples are removed; leave at least one", field="remove")
        return cls(mask.tobytes(), tuple(sorted((int(i), int(label)) for i, label in relabelled)))

    @property
    def is_in(self) -> npt.NDArray[np.bool_]:
        """Which examples are in, shape (n_train,)."""
        return np.frombuffer(self.mask, np.bool_)

    @property
    def key(self) -> str:
        """Digest that the set is known by."""
        return hashlib.sha256(self.mask + repr(self.relabelled).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Retrained:
    """Outputs of models that were trained on one set.

    Attributes
    ----------
    test, train : array of float, shape (n_retrainings, n_test), (n_retrainings, n_train)
        What the run's datamodels predict, such as margins; of training examples by their own labels, not changed ones.
    """

    test: npt.NDArray[Any]
    train: npt.NDArray[Any]

    def of(self, targets: TargetsName) -> npt.NDArray[np.float64]:
        """Return the outputs of these targets, (n_retrainings, n_targets)."""
        outputs: npt.NDArray[Any] = self.test if targets == "test" else self.train
        return outputs.astype(np.float64)


def retrain(
    run: Run,
    sets: Sequence[TrainingSet],
    n_retrainings: int,
    *,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[Retrained]:
    """Train models on each of some sets, as the run trains its own, or find those that were trained before.

    Parameters
    ----------
    run : Run
    sets : sequence of TrainingSet
    n_retrainings : int
        Of each set.
    device : str
        As for `Run.train`.
    progress : callable, optional
        Called with (models done, models in total); those found count.

    Returns
    -------
    retrained : list of Retrained
        One for each of `sets`, of exactly this many retrainings.

    Raises
    ------
    SpecError
        If the number cannot be, a set does not fit the run, or labels of a regression are to be changed.
    RunError
        If the dataset or the user's code has changed since the run was created, or files cannot be read or written.
    TrainingError
        If a model cannot be trained; sets that were done stay.
    """
    if not 1 <= n_retrainings <= MOST_RETRAININGS:
        raise SpecError(
            f"{n_retrainings} retrainings; choose from 1 to {MOST_RETRAININGS:,}",
            field="n_retrainings",
            value=n_retrainings,
        )
    pool = _Pool.of(run)
    wanted = {each.key: each for each in sets}
    found = {key: pool.read(key, each) for key, each in wanted.items()}
    n_wanted = len(wanted) * n_retrainings
    n_done = sum(min(_length(of_set), n_retrainings) for of_set in found.values())
    report = progress or (lambda *_: None)
    report(n_done, n_wanted)
    left = [each for key, each in wanted.items() if _length(found[key]) < n_retrainings]
    if left:
        prepared = Prepared.of(run)
        _require_fit(prepared, left)
        way = prepared.trainer(device).way
        for group in _groups(left, {key: _length(of_set) for key, of_set in found.items()}, n_retrainings):
            trainer = _trainer(prepared, group[0], way, device)
            rows = [(each, nth) for each in group for nth in range(_length(found[each.key]), n_retrainings)]
            masks = np.stack([each.is_in for each, _ in rows])
            numbers = np.array([_number(each, nth) for each, nth in rows], np.uint64)
            with trainer.workers():
                logits = trainer.start(masks, numbers, range(len(rows)))()
            outputs = pool.outputs_of(prepared, logits)
            for each in group:
                own = [place for place, (of_row, _) in enumerate(rows) if of_row.key == each.key]
                joined = _joined(found[each.key], Retrained(*(array[own] for array in outputs)))
                pool.write(each, joined)
                found[each.key] = joined
            n_done += len(rows)
            report(n_done, n_wanted)
    cut = {key: _first(of_set, n_retrainings) for key, of_set in found.items()}
    return [cut[each.key] for each in sets]


def kept_sets(run: Run) -> Iterator[tuple[TrainingSet, Retrained]]:
    """Yield the sets that a run's models were retrained on so far, in the order of their digests, and the outputs.

    Files of another output than the run's datamodels predict now are passed over.

    Raises
    ------
    RunError
        If a file is damaged.
    """
    pool = _Pool.of(run)
    n_train = run.provenance["dataset"]["n_train"]
    for path in sorted(pool.folder.glob("*.npz")):
        each = pool.set_of(path, n_train)
        retrained = None if each is None else pool.read(path.stem, each)
        if each is not None and retrained is not None:
            yield each, retrained


@dataclass(frozen=True, slots=True)
class _Pool:
    """Files of a run's retrained sets."""

    folder: Path
    array: str  # what is kept of models, without its part: margins

    @classmethod
    def of(cls, run: Run) -> "_Pool":
        return cls(run.path / PLACE, fitted_array(run).removeprefix("test_"))

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.npz"

    def read(self, key: str, expected: TrainingSet) -> Retrained | None:
        path = self.path(key)
        try:
            with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                is_same = file["mask"].tobytes() == np.packbits(expected.is_in).tobytes()
                if int(file["form"]) == _FORM and str(file["output"]) == self.array and is_same:
                    return Retrained(file["test"], file["train"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise _damaged(path, error) from error
        return None  # of another output or form: trained again, and replaced

    def set_of(self, path: Path, n_train: int) -> TrainingSet | None:
        """Return which set a file is of; None where it is of another form."""
        try:
            with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                if int(file["form"]) != _FORM:
                    return None
                mask = np.unpackbits(file["mask"], count=n_train)
                return TrainingSet(mask.tobytes(), tuple((int(i), int(label)) for i, label in file["relabelled"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise _damaged(path, error) from error

    def write(self, each: TrainingSet, retrained: Retrained) -> None:
        with explain_os_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
        content = io.BytesIO()
        np.savez(
            content,
            form=np.int64(_FORM),
            output=np.array(self.array),
            mask=np.packbits(each.is_in),
            relabelled=np.array(each.relabelled, np.int64).reshape(-1, 2),
            test=retrained.test,
            train=retrained.train,
        )
        write_beside(self.path(each.key), content.getvalue())

    def outputs_of(self, prepared: Prepared, logits: Logits) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        dataset = prepared.dataset
        test = output_of(f"test_{self.array}")(logits.test, dataset.test_labels)
        return test, output_of(f"train_{self.array}")(logits.train, dataset.train_labels)


def _damaged(path: Path, error: Exception) -> RunError:
    return RunError(f"{path} is damaged ({error}); remove it, and its set is trained again", path=path)


def _length(retrained: Retrained | None) -> int:
    return 0 if retrained is None else len(retrained.test)


def _first(retrained: Retrained | None, n: int) -> Retrained:
    if retrained is None:
        raise ValueError("a set that was not trained")
    return Retrained(retrained.test[:n], retrained.train[:n])


def _joined(before: Retrained | None, new: Retrained) -> Retrained:
    if before is None:
        return new
    return Retrained(np.concatenate([before.test, new.test]), np.concatenate([before.train, new.train]))


def _groups(sets: Sequence[TrainingSet], n_there: dict[str, int], n_retrainings: int) -> list[list[TrainingSet]]:
    """Cut sets into groups that are trained together: of like labels, and of about as many models each."""
    by_labels: dict[tuple[tuple[int, int], ...], list[TrainingSet]] = {}
    # models of one size train together
    for each in sorted(sets, key=lambda one: int(one.is_in.sum())):
        by_labels.setdefault(each.relabelled, []).append(each)
    groups: list[list[TrainingSet]] = []
    for alike in by_labels.values():
        n_models = _GROUP_MODELS
        for each in alike:
            if n_models >= _GROUP_MODELS:
                groups.append([])
                n_models = 0
            groups[-1].append(each)
            n_models += n_retrainings - n_there[each.key]
    return groups


def _trainer(prepared: Prepared, each: TrainingSet, way: Any, device: str) -> Trainer:
    dataset = prepared.dataset
    if each.relabelled:
        labels = np.array(dataset.train_labels)
        for example, label in each.relabelled:
            labels[example] = label
        dataset = dataclasses.replace(dataset, train_labels=labels)
    return make_trainer(dataset, prepared.recipe, seed=prepared.run.spec.seed, way=way, device=device)


def _number(each: TrainingSet, nth: int) -> int:
    """Return the number that a retraining's initialisation and order are drawn from: beyond all of a run's own."""
    return 2**63 | (int(each.key[:12], 16) << 14) | nth


def _require_fit(prepared: Prepared, sets: Sequence[TrainingSet]) -> None:
    dataset = prepared.dataset
    for each in sets:
        if len(each.mask) != dataset.n_train:
            raise SpecError(f"a set of {len(each.mask)} examples does not fit the {dataset.n_train} of the run")
        if each.relabelled and dataset.train_labels.ndim + dataset.is_regression != 1:
            raise SpecError(f"labels of {dataset.name} are no classes, so that none is a wrong one; remove examples")
        for example, label in each.relabelled:
            if not (0 <= example < dataset.n_train and 0 <= label < dataset.n_classes):
                raise SpecError(f"example {example} cannot be labelled {label}", field="relabelled")
