"""Regenerate the artifacts of the datamodels release, verify them, and fit datamodels against them.

Importing the package is light: a name is looked up, and torch and numba are loaded, when it is first used.
"""

import logging
import sys
from typing import TYPE_CHECKING, Any

from dmdata.late_names import FormerPaths, late_names
from dmpipeline.errors import explain_missing_extra

if TYPE_CHECKING:
    from dmpipeline.applications.attributions import AttributionScores, score
    from dmpipeline.applications.counterfactuals import (
        Case,
        Counterfactual,
        Counterfactuals,
        counterfactual,
        counterfactuals,
    )
    from dmpipeline.applications.explanations import explain
    from dmpipeline.applications.inspecting.suspects import suspects
    from dmpipeline.applications.leakage import Leakage, duplicates, leakage
    from dmpipeline.applications.mapping.clusters import Clusters, clusters
    from dmpipeline.applications.mapping.directions import what_removal_does
    from dmpipeline.applications.mapping.embeddings import Embedding, embed
    from dmpipeline.applications.mapping.files import save_parquet, save_zarr
    from dmpipeline.applications.mapping.maps import draw_map
    from dmpipeline.applications.neighbours import similar
    from dmpipeline.applications.pictures import draw_counterfactuals, draw_support
    from dmpipeline.applications.support import DataSupport, data_support
    from dmpipeline.checks.findings import Verification
    from dmpipeline.checks.verification import Finding, replay, verify_run
    from dmpipeline.data.datasets import load_dataset
    from dmpipeline.data.examples import Dataset
    from dmpipeline.data.folders import save_dataset
    from dmpipeline.errors import (
        ClusterError,
        ConvergenceError,
        DataWarning,
        DmpipelineError,
        IncompleteRunError,
        LearningWarning,
        RunError,
        RunExistsError,
        SpecChangedError,
        SpecError,
        TrainingError,
        UserCodeError,
        VerificationError,
    )
    from dmpipeline.exporting.export import export_run, publish_run
    from dmpipeline.figures.curve_picture import draw_curves
    from dmpipeline.fitting.attribution import gradient_scores
    from dmpipeline.fitting.datamodels import Datamodels
    from dmpipeline.fitting.fitting import fit, fit_moments
    from dmpipeline.fitting.influences import Influences
    from dmpipeline.fitting.readings import find_space
    from dmpipeline.fitting.settings import FitSettings
    from dmpipeline.moments.moments import Moments
    from dmpipeline.report.of_datamodels import report_datamodels
    from dmpipeline.report.of_run import report_run
    from dmpipeline.runs.extension import extend
    from dmpipeline.runs.store import Run
    from dmpipeline.scoring.alternatives import Comparison, compare, debiased, difference_of_means, ridge
    from dmpipeline.scoring.curves import LearningCurve
    from dmpipeline.scoring.evaluation import Evaluation, evaluate
    from dmpipeline.scoring.learning import learning_curves
    from dmpipeline.spec import RunSpec
    from dmpipeline.workflow.fit_step import fit_run
    from dmpipeline.workflow.score_steps import evaluate_run
    from dmpipeline.workflow.verify_step import verify

__all__ = [
    "AttributionScores",
    "Case",
    "ClusterError",
    "Clusters",
    "Comparison",
    "ConvergenceError",
    "Counterfactual",
    "Counterfactuals",
    "DataSupport",
    "DataWarning",
    "Datamodels",
    "Dataset",
    "DmpipelineError",
    "Embedding",
    "Evaluation",
    "Finding",
    "FitSettings",
    "IncompleteRunError",
    "Influences",
    "Leakage",
    "LearningCurve",
    "LearningWarning",
    "Moments",
    "Run",
    "RunError",
    "RunExistsError",
    "RunSpec",
    "SpecChangedError",
    "SpecError",
    "TrainingError",
    "UserCodeError",
    "Verification",
    "VerificationError",
    "clusters",
    "compare",
    "counterfactual",
    "counterfactuals",
    "data_support",
    "debiased",
    "difference_of_means",
    "draw_counterfactuals",
    "draw_curves",
    "draw_map",
    "draw_support",
    "duplicates",
    "embed",
    "evaluate",
    "evaluate_run",
    "explain",
    "export_run",
    "extend",
    "find_space",
    "fit",
    "fit_moments",
    "fit_run",
    "gradient_scores",
    "leakage",
    "learning_curves",
    "load_dataset",
    "publish_run",
    "replay",
    "report_datamodels",
    "report_run",
    "ridge",
    "save_dataset",
    "save_parquet",
    "save_zarr",
    "score",
    "similar",
    "suspects",
    "verify",
    "verify_run",
    "what_removal_does",
]

_MODULE_OF = {
    "AttributionScores": "dmpipeline.applications.attributions",
    "Case": "dmpipeline.applications.counterfactuals",
    "ClusterError": "dmpipeline.errors",
    "Clusters": "dmpipeline.applications.mapping.clusters",
    "Comparison": "dmpipeline.scoring.alternatives",
    "ConvergenceError": "dmpipeline.errors",
    "Counterfactual": "dmpipeline.applications.counterfactuals",
    "Counterfactuals": "dmpipeline.applications.counterfactuals",
    "DataSupport": "dmpipeline.applications.support",
    "DataWarning": "dmpipeline.errors",
    "Datamodels": "dmpipeline.fitting.datamodels",
    "Dataset": "dmpipeline.data.examples",
    "DmpipelineError": "dmpipeline.errors",
    "Embedding": "dmpipeline.applications.mapping.embeddings",
    "Evaluation": "dmpipeline.scoring.evaluation",
    "Finding": "dmpipeline.checks.verification",
    "FitSettings": "dmpipeline.fitting.settings",
    "IncompleteRunError": "dmpipeline.errors",
    "Influences": "dmpipeline.fitting.influences",
    "Leakage": "dmpipeline.applications.leakage",
    "LearningCurve": "dmpipeline.scoring.curves",
    "LearningWarning": "dmpipeline.errors",
    "Moments": "dmpipeline.moments.moments",
    "Run": "dmpipeline.runs.store",
    "RunError": "dmpipeline.errors",
    "RunExistsError": "dmpipeline.errors",
    "RunSpec": "dmpipeline.spec",
    "SpecChangedError": "dmpipeline.errors",
    "SpecError": "dmpipeline.errors",
    "TrainingError": "dmpipeline.errors",
    "UserCodeError": "dmpipeline.errors",
    "Verification": "dmpipeline.checks.findings",
    "VerificationError": "dmpipeline.errors",
    "clusters": "dmpipeline.applications.mapping.clusters",
    "compare": "dmpipeline.scoring.alternatives",
    "counterfactual": "dmpipeline.applications.counterfactuals",
    "counterfactuals": "dmpipeline.applications.counterfactuals",
    "data_support": "dmpipeline.applications.support",
    "debiased": "dmpipeline.scoring.alternatives",
    "difference_of_means": "dmpipeline.scoring.alternatives",
    "draw_counterfactuals": "dmpipeline.applications.pictures",
    "draw_curves": "dmpipeline.figures.curve_picture",
    "draw_map": "dmpipeline.applications.mapping.maps",
    "draw_support": "dmpipeline.applications.pictures",
    "duplicates": "dmpipeline.applications.leakage",
    "embed": "dmpipeline.applications.mapping.embeddings",
    "evaluate": "dmpipeline.scoring.evaluation",
    "evaluate_run": "dmpipeline.workflow.score_steps",
    "explain": "dmpipeline.applications.explanations",
    "export_run": "dmpipeline.exporting.export",
    "extend": "dmpipeline.runs.extension",
    "find_space": "dmpipeline.fitting.readings",
    "fit": "dmpipeline.fitting.fitting",
    "fit_moments": "dmpipeline.fitting.fitting",
    "fit_run": "dmpipeline.workflow.fit_step",
    "gradient_scores": "dmpipeline.fitting.attribution",
    "leakage": "dmpipeline.applications.leakage",
    "learning_curves": "dmpipeline.scoring.learning",
    "load_dataset": "dmpipeline.data.datasets",
    "publish_run": "dmpipeline.exporting.export",
    "replay": "dmpipeline.checks.verification",
    "report_datamodels": "dmpipeline.report.of_datamodels",
    "report_run": "dmpipeline.report.of_run",
    "ridge": "dmpipeline.scoring.alternatives",
    "save_dataset": "dmpipeline.data.folders",
    "save_parquet": "dmpipeline.applications.mapping.files",
    "save_zarr": "dmpipeline.applications.mapping.files",
    "score": "dmpipeline.applications.attributions",
    "similar": "dmpipeline.applications.neighbours",
    "suspects": "dmpipeline.applications.inspecting.suspects",
    "verify": "dmpipeline.workflow.verify_step",
    "verify_run": "dmpipeline.checks.verification",
    "what_removal_does": "dmpipeline.applications.mapping.directions",
}

sys.meta_path.append(
    FormerPaths(
        {
            "dmpipeline.attribution": "dmpipeline.fitting.attribution",
            "dmpipeline.readings": "dmpipeline.fitting.readings",
            "dmpipeline.store": "dmpipeline.runs.store",
        }
    )
)
# quiet unless the program that uses it sets logging up
logging.getLogger(__name__).addHandler(logging.NullHandler())


_value_of = late_names(__name__, _MODULE_OF, while_importing=explain_missing_extra)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # slow to import

        return version("dmdata")
    return _value_of(name)


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__", "errors"})
