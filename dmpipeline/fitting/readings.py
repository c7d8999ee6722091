"""In which space were weights written that come from elsewhere? Held-out models show it.

The reference solver fits standardised masks, (mask - mean) / deviation, and stores what it finds without turning it
back (fast_l1; see `Datamodels.to_raw`). Nothing in such a file says so. But the two readings of the same numbers
predict different outputs, and only one of them is right about models that were not fitted.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmpipeline.errors import SpecError
from dmpipeline.fitting.datamodels import Datamodels, SpaceName
from dmpipeline.moments.arrays import RowSliceable, check_shapes, read_masks, read_outputs

LEAST_MODELS = 10
"""Fewer models than this do not show how much their errors scatter."""

_SURE = 5.0


@dataclass(frozen=True, slots=True)
class Reading:
    """Which reading of some weights predicts held-out models better, and how clearly.

    Attributes
    ----------
    space : {"raw", "standardised"}
        The reading of smaller mean squared error.
    mse_raw, mse_standardised : float
        Mean squared error of each over models and targets, in squared units of the output.
    standard_errors : float
        How many standard errors over models lie between the two; infinite if every model says the same.
    share_of_targets : float
        Of all targets, those whose own error is smaller in that reading.
    n_models, n_targets : int
        What was looked at.
    """

    space: SpaceName
    mse_raw: float
    mse_standardised: float
    standard_errors: float
    share_of_targets: float
    n_models: int
    n_targets: int

    @property
    def is_sure(self) -> bool:
        """Whether the difference is beyond chance: five standard errors, and most targets agree."""
        return self.standard_errors >= _SURE and self.share_of_targets > 0.5

    def __str__(self) -> str:
        verdict = "surely" if self.is_sure else "perhaps"
        return (
            f"weights are {verdict} {self.space}: mean squared error {self.mse_raw:.4g} read as raw, "
            f"{self.mse_standardised:.4g} read as standardised, {self.standard_errors:.1f} standard errors apart over "
            f"{self.n_models:,} models; {self.share_of_targets:.0%} of {self.n_targets:,} targets agree"
        )


def find_space(
    datamodels: Datamodels,
    masks: RowSliceable,
    outputs: RowSliceable,
    *,
    mean: NDArray[np.float64] | float | None = None,
) -> Reading:
    """Predict held-out models with both readings of some weights, and return which is right.

    Parameters
    ----------
    datamodels : Datamodels
        What its `space` says is not asked.
    masks : bool or 0/1, shape (n_models, n_train)
        Of models that the weights were not fitted to; ten or more, a hundred are plenty.
    outputs : real, shape (n_models, n_targets)
        What these models said about the targets, in the units of the weights.
    mean : array of float64, shape (n_train,), or float, optional
        Share of the fitted subsets that hold each example; the share of ones in `masks` if not given, which is alpha.

    Raises
    ------
    SpecError
        Shapes that do not fit the datamodels, or fewer than `LEAST_MODELS` models.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> masks = rng.random((50, 8)) < 0.5
    >>> weight, bias = rng.standard_normal((8, 3)).astype(np.float32), np.ones(3, np.float32)
    >>> written = Datamodels(weight=weight, bias=bias, lam=bias)
    >>> find_space(written, masks, masks @ weight + 1 + 0.1 * rng.standard_normal((50, 3))).space
    'raw'
    """
    n_models, n_train, n_targets = check_shapes(masks, outputs)
    if (n_train, n_targets) != datamodels.weight.shape:
        raise SpecError(
            f"masks {masks.shape} and outputs {outputs.shape} do not fit datamodels of {datamodels.n_train} examples "
            f"and {datamodels.n_targets} targets; hand in models of the same release, and the same targets"
        )
    if n_models < LEAST_MODELS:
        raise SpecError(f"{n_models} held-out models are too few to decide; hand in at least {LEAST_MODELS}")
    rows = read_masks(masks, 0, n_models)
    true = read_outputs(outputs, 0, n_models).astype(np.float64)
    share = float(rows.mean()) if mean is None else mean
    raw = datamodels.read_as("raw")
    errors = np.stack(
        [
            (reading.predict(rows) - true) ** 2
            for reading in (raw, datamodels.read_as("standardised").to_raw(mean=share))
        ]
    )
    of_models = errors.mean(axis=2)  # (2, n_models)
    apart = of_models[0] - of_models[1]
    deviation = apart.std(ddof=1) / math.sqrt(n_models)
    better = int(apart.mean() > 0)
    of_targets = errors.mean(axis=1)
    return Reading(
        space="standardised" if better else "raw",
        mse_raw=float(of_models[0].mean()),
        mse_standardised=float(of_models[1].mean()),
        standard_errors=float(abs(apart.mean()) / deviation) if deviation > 0 else math.inf,
        share_of_targets=float((of_targets[better] < of_targets[1 - better]).mean()),
        n_models=n_models,
        n_targets=n_targets,
    )
