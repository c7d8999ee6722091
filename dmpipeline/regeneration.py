"""What making the models again would cost, beside what downloading them costs. Pure arithmetic.

Seconds a model are measured on this machine for a run of one's own, and published for the release's networks. A price
of a GPU-hour is an assumption, dated, and the first thing to replace by one's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dmdata.catalog import Artifact
from dmpipeline.errors import SpecError

GPU_USD_PER_HOUR = 4.10
"""An A100 by the hour: an eighth of a p4d.24xlarge on demand, us-east-1, list price of 2024. An assumption."""

RELEASE_SECONDS_PER_MODEL = {"cifar": 17.0}
"""Seconds a network of the release takes on an A100, second-hand, at alpha 50%: 24 epochs of a ResNet-9 on CIFAR-10."""

_RELEASE_ALPHA = 0.5


@dataclass(frozen=True, slots=True)
class Regeneration:
    """What it takes to train models again.

    Attributes
    ----------
    n_models : int
    seconds_per_model : float
        On one device.
    n_devices : int
    usd_per_hour : float
        Of one device; 0 for a machine that is there anyway.
    """

    n_models: int
    seconds_per_model: float
    n_devices: int
    usd_per_hour: float

    @property
    def device_hours(self) -> float:
        """Hours of all devices together."""
        return self.n_models * self.seconds_per_model / 3600

    @property
    def seconds(self) -> float:
        """Time until all are trained, the devices at work side by side."""
        return self.n_models * self.seconds_per_model / self.n_devices

    @property
    def usd(self) -> float:
        """Dollars of the device-hours."""
        return self.device_hours * self.usd_per_hour


def release_models(artifacts: Sequence[Artifact]) -> dict[tuple[str, str], tuple[int, float]]:
    """Count the models behind artifacts: each dataset and alpha once, whatever is wanted of it.

    Parameters
    ----------
    artifacts : sequence of dmdata.catalog.Artifact

    Returns
    -------
    models : dict of (dataset, alpha name) to (number of models, alpha)
    """
    return {
        (artifact.dataset, artifact.alpha_name): (artifact.rows.evaluation[1], artifact.alpha) for artifact in artifacts
    }


def release_seconds_per_model(dataset: str, alpha: float) -> float:
    """Estimate the seconds of one network of the release: in proportion to the size of its subset.

    Raises
    ------
    SpecError
        If nobody has published a time for the dataset.
    """
    if dataset not in RELEASE_SECONDS_PER_MODEL:
        raise SpecError(
            f"nobody has published how long a model of {dataset} takes; give --seconds-per-model, measured or guessed",
            dataset=dataset,
        )
    return RELEASE_SECONDS_PER_MODEL[dataset] * alpha / _RELEASE_ALPHA
