"""Learning curves, LDS against the number of models fitted on: their points, as a table and as JSON."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from dmpipeline.errors import SpecError
from dmpipeline.scoring.decomposition import TRAIN_MORE, Decomposition, ErrorLaw
from dmpipeline.scoring.evaluation import readable_score, readable_table
from dmpipeline.tables import dicts_as_html, number, number_or_none


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Scores of datamodels fitted on the first `n_models` models.

    Attributes
    ----------
    n_models : int
        Those that chose lam included.
    lds, lds_low, lds_high, r2 : float
        As in `Evaluation`.
    nonzero_weights : float
        Mean number a target.
    prior_strength : float or None
        How far the prior was trusted, from 0 to 1; None if there was none.
    mse : float
        As in `Evaluation`.
    estimation : float
        What of it is of too few models, as a share of each target's variance, averaged over targets: the error above
        what is of chance and not linear by `LearningCurve.decomposition`. nan where that is not known.
    """

    n_models: int
    lds: float
    lds_low: float
    lds_high: float
    r2: float
    nonzero_weights: float
    prior_strength: float | None = None
    mse: float = math.nan
    estimation: float = math.nan


@dataclass(frozen=True, slots=True)
class LearningCurve:
    """Scores on the same held-out models by the number of models fitted on, which `print` shows as a table.

    Attributes
    ----------
    points : tuple of CurvePoint
        At least one, in rising order of models. Intervals are of the same resamples.
    lds_ceiling : float
        The highest LDS that the noise in the held-out averages allows; nan with a single retraining.
    level : float
        Of the intervals.
    decomposition : Decomposition or None
        Where the error of the last point comes from.
    law : ErrorLaw or None
        How `estimation` falls with the number of models; None where fewer than `LEAST_POINTS` points tell.
    """

    points: tuple[CurvePoint, ...]
    lds_ceiling: float
    level: float
    decomposition: Decomposition | None = None
    law: ErrorLaw | None = None

    def foreseen(self, n_models: float) -> float:
        """Return the LDS that is foreseen for another number of models; nan where no law is known."""
        if self.law is None or self.decomposition is None:
            return math.nan
        return self.decomposition.lds_with(self.law.estimation(n_models))

    @property
    def advice(self) -> str | None:
        """One sentence: train how many more models, use pairs, or stop; None where the error was not taken apart."""
        if self.decomposition is None:
            return None
        advice, n_models = self.decomposition.advice, self.counts[-1]
        if self.law is None or not self.law.holds or not advice.startswith(TRAIN_MORE):
            return advice
        goal = (self.points[-1].lds + self.decomposition.lds_without_estimation.value) / 2
        factors = (2, 4)  # no further than the law was tested, by about as much
        factor = next((factor for factor in factors if self.foreseen(factor * n_models) >= goal), factors[-1])
        more, lds = (factor - 1) * n_models, self.foreseen(factor * n_models)
        return advice.replace(TRAIN_MORE, f"train {more:,} more models, for an LDS of about {lds:.3f}", 1)

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of models of each point."""
        return tuple(point.n_models for point in self.points)

    @property
    def lds(self) -> NDArray[np.float64]:
        """LDS of each point, (n_points,)."""
        return np.array([point.lds for point in self.points])

    def models_for(self, lds: float) -> float:
        """Return with how many models the curve first reaches an LDS, taken as linear in log models between points.

        Returns
        -------
        n_models : float
            nan where the curve ends below that LDS, or begins above it.
        """
        reached = np.flatnonzero(self.lds >= lds)
        if not len(reached) or (reached[0] == 0 and self.lds[0] > lds):
            return math.nan
        last = int(reached[0])
        if last == 0:
            return float(self.counts[0])
        low, high = self.lds[last - 1 : last + 1]
        fewer, more = self.counts[last - 1 : last + 1]
        return float(fewer * (more / fewer) ** ((lds - low) / (high - low)))

    def as_rows(self) -> list[dict[str, float | int | None]]:
        """Return a row for each point, ready for JSON: None stands for what is not defined.

        Returns
        -------
        rows : list of dict
            The attributes of `CurvePoint` by name.
        """
        return [{name: number_or_none(value) for name, value in asdict(point).items()} for point in self.points]

    def as_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON: the attributes, `points` as `as_rows` has them, and the advice."""
        found: dict[str, Any] = {"lds_ceiling": number_or_none(self.lds_ceiling), "level": self.level}
        found |= {"points": self.as_rows()}
        if self.decomposition is not None:
            found |= {"decomposition": self.decomposition.as_dict(), "advice": self.advice}
        return found | ({} if self.law is None else {"law": self.law.as_dict()})

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Take what `as_dict` returned.

        Raises
        ------
        SpecError
            If it is anything else.
        """
        try:
            points = tuple(_point_of(row) for row in data["points"])
            parts, law = data.get("decomposition"), data.get("law")
            curve = cls(
                points,
                number(data["lds_ceiling"]),
                number(data["level"]),
                None if parts is None else Decomposition.from_dict(parts),
                None if law is None else ErrorLaw.from_dict(law),
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise SpecError(f"not a learning curve: {type(error).__name__} {error}") from error
        if not 0 < curve.level < 1:
            raise SpecError(f"not a learning curve: level {curve.level}")
        check_rising(curve.counts)
        return curve

    def table(self) -> Table:
        """Lay the points out for a terminal."""
        has_prior = any(point.prior_strength is not None for point in self.points)
        columns = ["LDS", f"{self.level:.0%} interval", "of its ceiling", "R2", "nonzero weights"]
        columns += ["prior strength"] if has_prior else []
        columns += ["error of too few"] if self.decomposition is not None else []
        table = Table("models", *columns, box=None, header_style="bold")
        for column in table.columns:
            column.justify = "right"
        for point in self.points:
            interval = f"{readable_score(point.lds_low)} to {readable_score(point.lds_high)}"
            share = point.lds / self.lds_ceiling if self.lds_ceiling > 0 else math.nan
            scores = (readable_score(point.lds), interval, readable_score(share), readable_score(point.r2))
            strength = () if point.prior_strength is None else (f"{point.prior_strength:.2f}",)
            few = () if self.decomposition is None else (f"{point.estimation:.1%}",)
            table.add_row(f"{point.n_models:,}", *scores, f"{point.nonzero_weights:,.1f}", *strength, *few)
        return table

    def __str__(self) -> str:
        return readable_table(self.table())

    def _repr_html_(self) -> str:
        rows = [{name.replace("_", " "): value for name, value in row.items()} for row in self.as_rows()]
        title = f"LearningCurve: LDS by the number of models, of at most {readable_score(self.lds_ceiling)}"
        return dicts_as_html(title, rows, n_rows=len(rows))

    def __repr__(self) -> str:
        return f"<LearningCurve: {len(self.points)} points, {self.counts[0]:,} to {self.counts[-1]:,} models>"


def check_rising(counts: Sequence[int]) -> None:
    """Refuse numbers of models that do not rise, with SpecError."""
    if not counts or counts[0] < 1 or any(a >= b for a, b in itertools.pairwise(counts)):
        shown = ", ".join(map(str, counts)) or "empty"
        raise SpecError(
            f"counts are {shown}; give at least one number of models, in rising order, such as 500, 1000, 2000",
            counts=list(counts),
        )


def _point_of(row: Any) -> CurvePoint:
    """Take a row of `as_rows`; TypeError or KeyError for anything else."""
    scores = {name: number(row[name]) for name in ("lds", "lds_low", "lds_high", "r2", "nonzero_weights")}
    strength = None if row["prior_strength"] is None else number(row["prior_strength"])
    scores |= {name: number(row.get(name)) for name in ("mse", "estimation")}
    return CurvePoint(n_models=_count(row["n_models"]), prior_strength=strength, **scores)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is not a count")
    return value
