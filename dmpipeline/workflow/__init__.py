"""The steps from a trained run to scored datamodels: fit, evaluate, curve. Each leaves its result in the run.

::

    run/
      datamodels/test_50pct.pt     fit_run
      datamodels/fit.json          fit_run: settings, certificate, seconds
      fitting/                     fit_run: second moments, kept for further fits
      evaluation.json              evaluate_run
      curve.json, curve.svg        curve_run
      report.html                  dmpipeline.report.of_run.report_run
      made_from/                   each: what its result was made from, see `dmpipeline.runs.derivation`

Of datamodels of training examples the same, with ``train_`` in front: see `dmpipeline.runs.targets`.

Arrays are read through the run's catalog, a block of rows at a time, as those of a release would be. What is damaged
ends a step with a `RunError` that names the command which finds or replaces it.

Importing this package is light: the file of a step, and what it needs, is loaded when one of its names is first used.
"""

from typing import TYPE_CHECKING

from dmdata.late_names import late_names
from dmpipeline.errors import explain_missing_extra

if TYPE_CHECKING:
    from dmpipeline.fitting.fitted import fit_facts, load_datamodels
    from dmpipeline.workflow.fit_step import FIT_STAGES, PriorName, fit_run
    from dmpipeline.workflow.run_arrays import RowsOf, artifact_name
    from dmpipeline.workflow.score_steps import (
        COMPARE_STAGES,
        CURVE_STAGES,
        GRADIENT,
        PLAIN,
        compare_run,
        curve_picture,
        curve_run,
        evaluate_run,
        load_curves,
    )

__all__ = [
    "COMPARE_STAGES",
    "CURVE_STAGES",
    "FIT_STAGES",
    "GRADIENT",
    "PLAIN",
    "PriorName",
    "RowsOf",
    "artifact_name",
    "compare_run",
    "curve_picture",
    "curve_run",
    "evaluate_run",
    "fit_facts",
    "fit_run",
    "load_curves",
    "load_datamodels",
]

_MODULE_OF = {
    "COMPARE_STAGES": "dmpipeline.workflow.score_steps",
    "CURVE_STAGES": "dmpipeline.workflow.score_steps",
    "FIT_STAGES": "dmpipeline.workflow.fit_step",
    "GRADIENT": "dmpipeline.workflow.score_steps",
    "PLAIN": "dmpipeline.workflow.score_steps",
    "PriorName": "dmpipeline.workflow.fit_step",
    "RowsOf": "dmpipeline.workflow.run_arrays",
    "artifact_name": "dmpipeline.workflow.run_arrays",
    "compare_run": "dmpipeline.workflow.score_steps",
    "curve_picture": "dmpipeline.workflow.score_steps",
    "curve_run": "dmpipeline.workflow.score_steps",
    "evaluate_run": "dmpipeline.workflow.score_steps",
    "fit_facts": "dmpipeline.fitting.fitted",
    "fit_run": "dmpipeline.workflow.fit_step",
    "load_curves": "dmpipeline.workflow.score_steps",
    "load_datamodels": "dmpipeline.fitting.fitted",
}


__getattr__ = late_names(__name__, _MODULE_OF, while_importing=explain_missing_extra)


def __dir__() -> list[str]:
    return __all__
