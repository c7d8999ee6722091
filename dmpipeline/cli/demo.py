"""The whole circle on scikit-learn's digits: real models, the release's layout, its prices, and a page to look at.

Train, verify, export as the release would, read the export back lazily through its catalog, mirror it into Zarr, fit
datamodels on what was read, score them on held-out subsets, and write the report. Everything is left in the run's
directory, which every ``dmpipeline`` command accepts; doing it again resumes what is missing.
"""

import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import dmdata
from dmdata.cli.console import Talk
from dmdata.cli.tables import plain_table
from dmdata.money.prices import readable_bytes, readable_usd
from dmpipeline import workflow
from dmpipeline.applications.attributions import score
from dmpipeline.applications.counterfactuals import Counterfactual, counterfactual, removal_order
from dmpipeline.applications.evidence import Evidence, find_evidence
from dmpipeline.applications.support import SUPPORT_STAGES, Support, data_support
from dmpipeline.checks.findings import Finding, Verification
from dmpipeline.checks.verification import verify_run
from dmpipeline.errors import SpecError, VerificationError, explain_os_errors, quoted
from dmpipeline.exporting.export import export_run
from dmpipeline.fitting.fitting import split_rows
from dmpipeline.fitting.settings import VALIDATION
from dmpipeline.report.of_run import REPORT_STAGES, download_price, keep_answer, report_run
from dmpipeline.runs.learned import what_was_learned
from dmpipeline.runs.store import Run
from dmpipeline.scoring.evaluation import Evaluation, readable_score
from dmpipeline.scoring.retrainings import LEAST_SUBSETS
from dmpipeline.spec import RunSpec
from dmpipeline.tables import plain
from dmpipeline.workflow.reference import find_reference
from dmpipeline.workflow.verify_step import compared

if TYPE_CHECKING:
    from rich.table import Table


_REMOVED = 20
_RETRAININGS = 20
_SUPPORTS = 10
_INFLATION = 0.2
_OTHER_MODELS = 1000


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
        See `learned.Learned`; the mean over the trained models on test examples, its interval, what always predicting
        the commonest class would be right on, and the mean on left-out training examples.
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
    verdict : str
        Of the run's verification against the export of a run of another seed.
    n_rows : int
        Rows of that export which were read for it.
    counterfactual : Counterfactual
        What becomes of one target without the training examples that help it most, certified by retraining.
    support : Support or None
        The smallest certified support set of the targets that were tried; None where none of them was certified.
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
    counterfactual: Counterfactual
    support: Support | None
    verdict: str
    n_rows: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Give the figures, ready for JSON: None stands for what is not defined."""
        whole: dict[str, Any] = plain(self)
        return whole

    def table(self) -> "Table":
        """Lay it out in sentences, for a terminal."""
        table = plain_table()
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
        table.add_row("what if", _foreseen(self.counterfactual))
        if self.support is not None:
            table.add_row("rests on", _supported(self.support))
        table.add_row("compared", _compared_in_words(self.verdict, self.n_rows))
        table.add_row("page", self.report)
        place = quoted(self.directory)
        commands = f"dmpipeline evaluate {place}; dmpipeline explain {place} {self.counterfactual.target}"
        table.add_row("next", f"{_activation()}dmdata ls --catalog {place}; {commands}")
        table.add_row("took", f"{self.seconds:.0f} s")
        return table

    def _of_ceiling(self) -> str:
        if math.isnan(self.lds_ceiling):
            return "of a ceiling that is not defined with one retraining a subset"
        return f"of at most {readable_score(self.lds_ceiling)} that retraining noise allows"


def _activation() -> str:
    """Return what puts the commands on the path of a shell, where they are not on it; nothing where they are."""
    script = Path(sys.prefix) / "bin" / "activate"
    if shutil.which("dmpipeline") is not None or not script.is_file():
        return ""
    return f". {quoted(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script)}; "


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
        workflow.fit_run(run, progress=stages)
    release = run.path / "export"
    with talk.counting("exporting", "models") as progress:
        export_run(run, release, datamodels=run.datamodels_path, progress=progress)
    column = _read_back(talk, run, release)
    evaluation = workflow.evaluate_run(run)
    evidence = find_evidence(run)
    changed, support = _what_if(talk, evidence), _support(talk, evidence)
    verification = _compared(talk, run, findings)
    _keep_for_the_page(run, verification, evaluation)
    with talk.stages(workflow.CURVE_STAGES) as stages:
        workflow.curve_run(run, progress=stages)
    with talk.stages(REPORT_STAGES) as stages:
        report = report_run(run, evaluation, progress=stages)
    return _summary(
        run,
        evaluation,
        report,
        sum(f.passed for f in findings),
        column,
        changed,
        support,
        verification,
        time.monotonic() - started,
    )


def _require_enough(spec: RunSpec) -> None:
    split_rows(spec.n_models, VALIDATION)
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
            shutil.rmtree(mirror)  # of an earlier demo: its source was exported again
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
            f"{release} does not read back as what was trained in {run.path}; export it again", findings=[str(release)]
        )
    return lazy.estimate(np.s_[:, target])


def _what_if(talk: Talk, evidence: Evidence) -> Counterfactual:
    """Remove what helps one target most: of all targets, the one whose first helpers weigh most."""
    weight = evidence.datamodels().weight
    target = int(np.sort(weight, axis=0)[-_REMOVED:].sum(axis=0).argmax())
    remove = removal_order(weight[:, target])[:_REMOVED].tolist()
    with talk.counting("what if", "models") as progress:
        return counterfactual(evidence, target, remove, n_retrainings=_RETRAININGS, progress=progress)


def _support(talk: Talk, evidence: Evidence) -> Support | None:
    """Certify the support of the targets whose estimated sets are the smallest, enlarged; return the smallest."""
    sizes = {row.target: row.size for row in data_support(evidence) if row.size}
    tried = sorted(sizes, key=sizes.__getitem__)[:_SUPPORTS]
    if not tried:
        return None
    with talk.stages(SUPPORT_STAGES) as progress:
        found = data_support(evidence, tried, _RETRAININGS, inflation=_INFLATION, progress=progress)
    certified = [row for row in found if row.certified and row.size]
    return min(certified, key=lambda row: row.size or 0, default=None)


def _compared(talk: Talk, run: Run, findings: Sequence[Finding]) -> Verification:
    """Train a run of another seed, export it, and verify the run against that, as against a release."""
    spec = run.spec
    changes = {"seed": (spec.seed + 1) % 2**64, "n_models": min(spec.n_models, _OTHER_MODELS), "outputs": ("margins",)}
    none_held_out = spec.held_out.model_copy(update={"n_subsets": 0})
    other = Run.create(run.path / "other", spec.model_copy(update=changes | {"held_out": none_held_out}))
    with talk.counting("another seed", "models") as progress:
        other.train(progress)
    release = run.path / "other-export"
    with talk.counting("exporting it", "models") as progress:
        export_run(other, release, progress=progress)
    with talk.counting("comparing", "rows") as progress:
        return compared(run, findings, find_reference(run, release), refit=False, progress=progress)


def _compared_in_words(verdict: str, n_rows: int) -> str:
    words = {
        "agrees": f"the run agrees with the export of another seed, as {n_rows:,} of its rows show",
        "differs": f"the run differs from the export of another seed, as {n_rows:,} of its rows show",
        "undecided": f"{n_rows:,} rows of another seed are too few to say that the run agrees with them",
    }
    return words[verdict]


def _foreseen(answer: Counterfactual) -> str:
    return (
        f"without the {len(answer.removed)} training examples that help it most, the margin of target {answer.target} "
        f"changes by {answer.predicted_change:+.1f} by its datamodel, and by {answer.measured_change:+.1f} "
        f"({answer.measured_low:+.1f} to {answer.measured_high:+.1f}) in {answer.n_retrainings} retrainings"
    )


def _supported(row: Support) -> str:
    return (
        f"target {row.target} is predicted wrongly without {row.size} training examples: margin "
        f"{row.measured_margin:.1f} ({row.measured_low:.1f} to {row.measured_high:.1f}), certified by {_RETRAININGS} "
        "retrainings"
    )


def _keep_for_the_page(run: Run, verification: Verification, evaluation: Evaluation) -> None:
    """Keep what verification found, and how another attribution scores: the likeness of pixels, within a class."""
    dataset = run.dataset()
    train, test = (
        inputs.reshape(len(inputs), -1).astype(np.float64) for inputs in (dataset.train_inputs, dataset.test_inputs)
    )
    apart = (train**2).sum(axis=1)[:, None] + (test**2).sum(axis=1) - 2 * train @ test.T
    same = dataset.train_labels[:, None] == dataset.test_labels
    nearness = np.where(same, 1, -1) * np.exp(-apart / np.median(apart))
    scored = score(run, {"nearness of pixels": nearness}, own=evaluation)
    keep_answer(run, "scores", scored.as_dict())
    keep_answer(run, "verification", verification.as_dict())


def _summary(
    run: Run,
    evaluation: Evaluation,
    report: Path,
    n_checks: int,
    column: dmdata.Estimate,
    changed: Counterfactual,
    support: Support | None,
    verification: Verification,
    seconds: float,
) -> DemoSummary:
    price = download_price(run)
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
        counterfactual=changed,
        support=support,
        verdict=verification.verdict,
        n_rows=verification.n_rows,
        seconds=round(seconds, 1),
    )
