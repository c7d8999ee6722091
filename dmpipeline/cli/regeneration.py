"""What training the models again would cost, next to what downloading them costs. Pure arithmetic.

Seconds a model are measured on this machine for a run of one's own, and second-hand for the release's networks. The
price of a GPU-hour is an assumption, dated: replace it by your own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dmdata.errors import CatalogError
from dmpipeline.errors import SpecError

if TYPE_CHECKING:
    from dmdata.catalog.entries import Artifact
    from dmdata.money.prices import Estimate

GPU_USD_PER_HOUR = 4.10
"""An A100 by the hour: an eighth of a p4d.24xlarge on demand, us-east-1. An assumption."""

GPU_PRICE_DATE = "2024"
"""Year of that list price."""

Basis = Literal["given", "measured", "published"]
"""How the seconds of a model are known."""

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
        Of one device; 0 for a machine that costs nothing extra.
    basis : {"given", "measured", "published"}
        How the seconds are known: from the user, by training some models on this machine, or second-hand.
    """

    n_models: int
    seconds_per_model: float
    n_devices: int
    usd_per_hour: float
    basis: Basis

    @property
    def device_hours(self) -> float:
        """Hours of all devices together."""
        return self.n_models * self.seconds_per_model / 3600

    @property
    def seconds(self) -> float:
        """Time until all are trained, all devices at work at the same time."""
        return self.n_models * self.seconds_per_model / self.n_devices

    @property
    def usd(self) -> float:
        """Dollars of the device-hours."""
        return self.device_hours * self.usd_per_hour


@dataclass(frozen=True, slots=True)
class RegenerationPlan:
    """Training again next to downloading.

    Attributes
    ----------
    jobs : mapping of str to Regeneration
        One for each dataset and alpha, one after the other on the same devices.
    download : dmdata.Estimate
        Of what is wanted.
    has_datamodels : bool
        Whether fitted datamodels are among what is wanted: fitting them again comes on top of the jobs.
    """

    jobs: Mapping[str, Regeneration]
    download: "Estimate"
    has_datamodels: bool = False

    @property
    def n_models(self) -> int:
        """Models of all jobs."""
        return sum(job.n_models for job in self.jobs.values())

    @property
    def device_hours(self) -> float:
        """Hours of all devices together, over all jobs."""
        return sum(job.device_hours for job in self.jobs.values())

    @property
    def seconds(self) -> float:
        """Time until all jobs are done."""
        return sum(job.seconds for job in self.jobs.values())

    @property
    def usd(self) -> float:
        """Dollars of all jobs."""
        return sum(job.usd for job in self.jobs.values())

    @property
    def break_even_usd_per_hour(self) -> float | None:
        """Price of a device-hour below which training costs less than the download; None where nothing is trained."""
        return self.download.usd / self.device_hours if self.device_hours else None


def release_models(artifacts: "Sequence[Artifact]") -> dict[tuple[str, str], tuple[int, float]]:
    """Count the models behind artifacts: each dataset and alpha once, whatever is wanted of it.

    Parameters
    ----------
    artifacts : sequence of dmdata.catalog.entries.Artifact

    Returns
    -------
    models : dict of (dataset, alpha name) to (number of models, alpha)

    Raises
    ------
    CatalogError
        If the catalog does not say how many models there are, as one made by a scan.
    """
    models = {}
    for artifact in artifacts:
        if artifact.rows is None or artifact.alpha is None:
            raise CatalogError(
                f"the catalog does not say which models {artifact.name} is of; add alpha and rows to "
                f"{artifact.dataset}/{artifact.alpha_name} in it",
                name=artifact.name,
            )
        models[artifact.dataset, artifact.alpha_name] = artifact.rows.evaluation[1], artifact.alpha
    return models


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
