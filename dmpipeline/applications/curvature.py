"""How an output bends along a set of examples: what a linear datamodel misses when many like examples go together.

A datamodel's prediction falls in two: what the examples of a set weigh that are in a subset, z, and what the others
weigh, u. If the output were linear, it would be z + u. Models that were trained on subsets of several sizes tell how it
bends: their outputs are fitted by least squares as

    y = a + b z + c u + d z^2 + e z u + f u^2,

for each case on its own, and the change foreseen is the difference of this at both training sets. Subsets of one alpha
hold z and u near one point of the plane, from where the full set and the changed one are far; those of several alphas
spread along the way.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from dmpipeline.applications.evidence import Evidence
from dmpipeline.errors import SpecError
from dmpipeline.moments.arrays import read_masks, read_outputs
from dmpipeline.runs.targets import fitted_array

LEAST_MODELS = 200
"""Fewer models than this say little about six numbers."""

_BLOCK_BYTES = 1 << 26
_N_TERMS = 6


def bent_changes(
    evidences: Sequence[Evidence],
    weight: npt.NDArray[np.float64],
    targets: Sequence[int],
    before: npt.NDArray[np.bool_],
    after: npt.NDArray[np.bool_],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.float64]:
    """Foresee changes from the models of several runs, each case by a surface of its own.

    Parameters
    ----------
    evidences : sequence of Evidence
        Whose models are read: runs of one dataset and recipe, of different alphas.
    weight : array of float, shape (n_train, n_cases)
        Of each case's target, of raw masks.
    targets : sequence of int, length n_cases
    before, after : array of bool, shape (n_cases, n_train)
        The unchanged training set of each case, and the changed one.
    progress : callable, optional
        Called with (models read, in total).

    Returns
    -------
    changes : array of float64, shape (n_cases,)
        Where neither the set nor the rest has a weight, 0.

    Raises
    ------
    SpecError
        If the runs are of other examples, or have fewer than `LEAST_MODELS` models together.

    Notes
    -----
    Memory holds 64 MiB of masks, and as many numbers for each case as models in such a block, a few times over.
    """
    n_train = len(weight)
    rows = [evidence.rows("models") for evidence in evidences]
    for evidence in evidences:
        if (evidence.n_train, evidence.n_targets) != (evidences[0].n_train, evidences[0].n_targets):
            raise SpecError(
                f"{evidence.name} has {evidence.n_train:,} training examples and {evidence.n_targets:,} targets, but "
                f"{evidences[0].name} has {evidences[0].n_train:,} and {evidences[0].n_targets:,}; name runs of one "
                "dataset",
                value=evidence.name,
            )
    made_by = [
        (
            evidence.run.provenance["dataset"]["fingerprint"],
            evidence.run.spec.recipe,
            fitted_array(evidence.run, evidence.targets),
        )
        for evidence in evidences
        if evidence.run is not None
    ]
    if any(each != made_by[0] for each in made_by):
        raise SpecError("these runs differ in dataset, recipe or output; name runs that differ in alpha alone")
    n_models = sum(masks.shape[0] for masks, _ in rows)
    if n_models < LEAST_MODELS:
        raise SpecError(f"{n_models} models are too few to see how outputs bend; train at least {LEAST_MODELS}")
    changed = (before != after).T
    own, rest = np.where(changed, weight, 0), np.where(changed, 0, weight)
    surface = _Surface(own, rest)
    step, done = max(1, _BLOCK_BYTES // (4 * n_train)), 0
    for masks, outputs in rows:
        for start in range(0, masks.shape[0], step):
            stop = min(start + step, masks.shape[0])
            surface.add(read_masks(masks, start, stop), read_outputs(outputs, start, stop)[:, list(targets)])
            done += stop - start
            if progress is not None:
                progress(done, n_models)
    coefficients = surface.coefficients()
    first, last = (surface.terms(*surface.places(each)) for each in (before, after))
    changes: npt.NDArray[np.float64] = ((last - first) * coefficients).sum(axis=-1)
    return changes


class _Surface:
    """Normal equations of every case, in units in which z and u are about one."""

    def __init__(self, own: npt.NDArray[np.float64], rest: npt.NDArray[np.float64]) -> None:
        self.parts = [part.astype(np.float32) for part in (own, rest)]
        # by how much a random half of the examples varies, and where it lies
        self.scales = [np.sqrt((part**2).sum(axis=0)) / 2 for part in (own, rest)]
        self.scales = [np.where(scale > 0, scale, 1) for scale in self.scales]
        self.centers = [part.sum(axis=0) / 2 for part in (own, rest)]
        n_cases = own.shape[1]
        self.gram = np.zeros((n_cases, _N_TERMS, _N_TERMS))
        self.cross = np.zeros((n_cases, _N_TERMS))

    def add(self, masks: npt.NDArray[np.int8], outputs: npt.NDArray[np.floating]) -> None:
        """Add some models: masks (n, n_train), and the output of each case's target, (n, n_cases)."""
        wide = masks.astype(np.float32)
        terms = self.terms(*(self._placed(wide @ part, nth) for nth, part in enumerate(self.parts)))
        self.gram += np.einsum("nci,ncj->cij", terms, terms, optimize=True)
        self.cross += np.einsum("nci,nc->ci", terms, outputs.astype(np.float64), optimize=True)

    def coefficients(self) -> npt.NDArray[np.float64]:
        """Solve each case; terms that never vary get 0."""
        found = np.zeros_like(self.cross)
        for nth, (gram, cross) in enumerate(zip(self.gram, self.cross, strict=True)):
            found[nth] = np.linalg.lstsq(gram, cross, rcond=1e-12)[0]
        return found

    def places(self, sets: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.float64]]:
        """Return z and u of one set for each case, (n_cases,) each."""
        own = [np.einsum("ci,ic->c", sets.astype(np.float64), part.astype(np.float64)) for part in self.parts]
        return [self._placed(value, nth) for nth, value in enumerate(own)]

    def terms(self, z: npt.NDArray[np.float64], u: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return 1, z, u, z^2, z u and u^2, along a new last axis."""
        return np.stack([np.ones_like(z), z, u, z * z, z * u, u * u], axis=-1)

    def _placed(self, value: npt.NDArray[np.floating], nth: int) -> npt.NDArray[np.float64]:
        placed: npt.NDArray[np.float64] = (value.astype(np.float64) - self.centers[nth]) / self.scales[nth]
        return placed
