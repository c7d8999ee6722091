"""The whole circle on scikit-learn's digits: real models, the release's layout, its prices, and a page to look at.

Train, verify, export as the release would, read the export back lazily through its catalog, mirror it into Zarr, fit
datamodels on what was read, score them on held-out subsets, and write the report. Everything is left in the run's
directory, which every ``dmpipeline`` command accepts; doing it again resumes what is missing.
"""

import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

import dmdata
from dmdata.console import Talk
from dmdata.prices import readable_bytes, readable_usd
from dmpipeline import workflow
from dmpipeline.errors import SpecError, VerificationError, explain_os_errors, quoted
from dmpipeline.evaluate import LEAST_SUBSETS, Evaluation, readable_score
from dmpipeline.export import export_run
from dmpipeline.fitting import split_rows
from dmpipeline.learned import what_was_learned
from dmpipeline.spec import RunSpec
from dmpipeline.store import Run
from dmpipeline.verify import verify_run


@dataclass(frozen=True, slots=True)
class DemoSummary:
    """What the demo did, in figures.

    Attributes
    ----------
    directory, report : str
    n_models, n_held_out : int
        Models trained to fit on, and to score with.
    n_checks : int
        Checks of the verification that passed.
    accuracy, accuracy_low, accuracy_high, baseline_accuracy, left_out_accuracy : float
        See `learned.Learned`; the mean over the trained models on test examples, its interval, what always saying the
        commonest class would be right on, and the mean on left-out training examples.
    learned : str
        The same in words.
    warnings : tuple of str
        What is wrong with what the models have learned.
    download_bytes, download_usd
        What a download of the exported artifacts from a requester-pays bucket would be.
    column_usd : float
        What reading one target's margins from there would cost.
    lds, lds_low, lds_high, lds_ceiling : float
        nan where not defined: the ceiling with one retraining a subset, all with targets that never vary.
    seconds : float
        Wall time of this call.
    """

    directory: str
    report: str
    dataset: str
    n_models: int
    n_held_out: int
    n_checks: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    baseline_accuracy: float
    left_out_accuracy: float
    learned: str
    warnings: tuple[str, ...]
    download_bytes: int
    download_usd: float
    column_usd: float
    lds: float
    lds_low: float
    lds_high: float
    lds_ceiling: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Give the figures, ready for JSON: None stands for what is not defined."""
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in asdict(self).items()
        }

    def table(self) -> Table:
        """Say it in sentences, for a terminal."""
        table = Table(box=None, show_header=False)
        table.add_column(style="bold")
        table.add_row(
            "trained",
            f"{self.n_models:,} networks on random subsets of {self.dataset}, and {self.n_held_out:,} more to score "
            f"with; {self.n_checks} checks passed",
        )
        table.add_row("learned", self.learned)
        table.add_row(
            "priced",
            f"a download of the same from a requester-pays bucket: {readable_bytes(self.download_bytes)}, "
            f"{readable_usd(self.download_usd)}; one column of margins: {readable_usd(self.column_usd)}",
        )
        table.add_row(
            "predicted",
            f"LDS {readable_score(self.lds)} (95% interval {readable_score(self.lds_low)} to "
            f"{readable_score(self.lds_high)}) {self._of_ceiling()}",
        )
        table.add_row("page", self.report)
        place = quoted(self.directory)
        table.add_row("next", f"dmdata ls --catalog {place}; dmpipeline evaluate {place}")
        table.add_row("took", f"{self.seconds:.0f} s")
        return table

    def _of_ceiling(self) -> str:
        if math.isnan(self.lds_ceiling):
            return "of a ceiling that is not defined with one retraining a subset"
        return f"of at most {readable_score(self.lds_ceiling)} that retraining noise allows"


def run_demo(talk: Talk, directory: Path, spec: RunSpec) -> DemoSummary:
    """Run the whole circle in a directory.

    Parameters
    ----------
    talk : Talk
        Where progress is shown.
    directory : Path
        A new or empty directory, or one of an earlier demo of the same spec.
    spec : RunSpec

    Raises
    ------
    SpecError
        If the models would be too few to fit datamodels on, or the held-out subsets to score them; nothing is trained.
    RunExistsError
        If the directory holds something else.
    VerificationError
        If what was trained, exported or read back is not what was specified.
    """
    _require_enough(spec)
    started = time.monotonic()
    run = Run.create(directory, spec)
    with talk.counting("training", "models") as progress:
        run.train(progress)
    with talk.counting("verifying", "models") as progress:
        findings = verify_run(run, progress)
    # models that have not learned are what was specified, and are warned of at the end
    if wrong := [finding.detail for finding in findings if not finding.passed and finding.check != "learned"]:
        raise VerificationError(f"the run at {run.path} is not what was specified: {wrong[0]}", findings=wrong)
    with talk.stages(workflow.FIT_STAGES) as stages:
        workflow.fit_run(run, validation=_VALIDATION, progress=stages)
    release = run.path / "export"
    with talk.counting("exporting", "models") as progress:
        export_run(run, release, datamodels=run.datamodels_path, progress=progress)
    column = _read_back(talk, run, release)
    evaluation = workflow.evaluate_run(run)
    report = workflow.report_run(run, evaluation)
    return _summary(run, evaluation, report, sum(f.passed for f in findings), column, time.monotonic() - started)


_VALIDATION = 0.1


def _require_enough(spec: RunSpec) -> None:
    split_rows(spec.n_models, _VALIDATION)
    if spec.held_out.n_subsets < LEAST_SUBSETS:
        raise SpecError(
            f"held_out.n_subsets {spec.held_out.n_subsets} is too few to score datamodels on; "
            f"choose at least {LEAST_SUBSETS} held-out subsets",
            field="held_out.n_subsets",
            value=spec.held_out.n_subsets,
        )


def _read_back(talk: Talk, run: Run, release: Path) -> dmdata.Estimate:
    """Read the export as a stranger would, by its catalog: one column, then a mirror; compare with what was trained."""
    margins, masks = (workflow.artifact_name(run, array) for array in ("test_margins", "train_masks"))
    lazy = dmdata.open(margins, catalog=release)
    target = lazy.shape[1] // 2
    same = np.array_equal(lazy[:, target], run.array("test_margins")[:, target])
    mirror = run.path / "mirror.zarr"
    if mirror.exists():
        with explain_os_errors(mirror, "removed"):
            shutil.rmtree(mirror)  # of an earlier demo: its source was exported anew
    with talk.stages({margins: "rows", masks: "rows"}) as show:
        dmdata.mirror(
            [margins, masks],
            mirror,
            catalog=release,
            progress=lambda name, done: show(name, done.n_rows, done.n_rows_total),
        )
    for name in (margins, masks):
        same = same and np.array_equal(dmdata.open(mirror / name)[...], run.array(name.rpartition("/")[2])[:])
    if not same:
        raise VerificationError(
            f"{release} does not read back as what was trained in {run.path}; export it anew", findings=[str(release)]
        )
    return lazy.estimate(np.s_[:, target])


def _summary(
    run: Run, evaluation: Evaluation, report: Path, n_checks: int, column: dmdata.Estimate, seconds: float
) -> DemoSummary:
    price = workflow.download_price(run)
    held_out, learned = run.spec.rows.held_out, what_was_learned(run)
    return DemoSummary(
        directory=str(run.path),
        report=str(report),
        dataset=run.provenance["dataset"]["name"],
        n_models=run.spec.n_models,
        n_held_out=held_out.stop - held_out.start,
        n_checks=n_checks,
        accuracy=learned.score,
        accuracy_low=learned.low,
        accuracy_high=learned.high,
        baseline_accuracy=learned.baseline,
        left_out_accuracy=learned.left_out,
        learned=learned.sentence(),
        warnings=tuple(learned.texts),
        download_bytes=price.n_bytes,
        download_usd=price.usd,
        column_usd=column.usd,
        lds=evaluation.lds,
        lds_low=evaluation.lds_low,
        lds_high=evaluation.lds_high,
        lds_ceiling=evaluation.lds_ceiling,
        seconds=round(seconds, 1),
    )
