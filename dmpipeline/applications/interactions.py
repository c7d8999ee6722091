"""Whether pair terms foresee changes of the full training set better: asked of the sets a run was retrained on."""

import numpy as np

from dmpipeline.applications.evidence import Evidence
from dmpipeline.applications.retraining import kept_sets

LEAST_SETS = 5
"""Retrained sets below which nothing is said of pairs."""


def pairs_help(evidence: Evidence) -> bool | None:
    """Ask the sets that a run was retrained on whether pairs foresee what they changed better than weights alone.

    Pair terms are learned from subsets of a share alpha, and the full set lies outside of these. So they are used there
    only where the squared error of the foreseen changes, averaged over all targets, falls by more than twice its
    standard error over the sets.

    Parameters
    ----------
    evidence : Evidence
        Of a run whose datamodels have pair terms.

    Returns
    -------
    helps : bool or None
        None where fewer than `LEAST_SETS` sets, or no full one, were retrained.
    """
    if evidence.run is None:
        return None
    datamodels = evidence.datamodels()
    sets, outputs = [], []
    for each, retrained in kept_sets(evidence.run):
        if not each.relabelled:
            sets.append(each.is_in)
            outputs.append(retrained.of(evidence.targets).mean(axis=0))
    whole = [nth for nth, is_in in enumerate(sets) if is_in.all()]
    if not whole or len(sets) - 1 < LEAST_SETS:
        return None
    masks = np.stack([sets[whole[0]], *(is_in for is_in in sets if not is_in.all())])
    measured = np.stack(
        [outputs[whole[0]], *(out for out, is_in in zip(outputs, sets, strict=True) if not is_in.all())]
    )
    errors = []
    for foreseen in (datamodels.linear.predict(masks), datamodels.predict(masks)):
        missed = (foreseen[1:] - foreseen[0]) - (measured[1:] - measured[0])
        errors.append((missed.astype(np.float64) ** 2).mean(axis=1))
    gain = errors[0] - errors[1]
    return bool(gain.mean() > 2 * gain.std(ddof=1) / np.sqrt(len(gain)))
