"""The command that verifies runs: by themselves, and against a reference, which may cost something to read."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dmdata.cli.console import Talk, talk_options
from dmdata.cli.copy_commands import Priced, options_spending, paid_for
from dmpipeline.cli.run_commands import for_each_run
from dmpipeline.cli.train_commands import DIRECTORY, TARGETS
from dmpipeline.errors import SpecChangedError, VerificationError, quoted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dmpipeline.checks.findings import Finding, Verification
    from dmpipeline.runs.store import Run
    from dmpipeline.runs.targets import TargetsName
    from dmpipeline.workflow.reference import Reference

MAX_ROWS = 3000
"""As `dmpipeline.workflow.verify_step.MAX_ROWS`, known without loading it."""


@click.command("verify")
@DIRECTORY
@click.option(
    "--against",
    metavar="REFERENCE",
    help="Compare with another run, a folder or URL with a catalog, or a name in the catalog, as cifar/50pct.",
)
@click.option(
    "--margin",
    type=float,
    default=0.1,
    show_default=True,
    help="Differences up to this many standard deviations of a target count as none.",
)
@click.option(
    "--max-rows", type=int, default=MAX_ROWS, show_default=True, help="Rows of the reference to read at most."
)
@click.option("--replay", "replays", type=int, default=0, metavar="N", help="Train N rows again, and compare.")
@click.option(
    "--refit/--no-refit",
    default=None,
    help="Whether to compare datamodels too. [default: where reading those of the reference is free]",
)
@click.option(
    "--tta",
    type=int,
    default=0,
    metavar="N",
    help="Train N rows with each of the recipe's views at test time: which fits the reference?",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of permutations and samples.")
@TARGETS
@options_spending
@talk_options
@for_each_run
def verify(
    talk: Talk,
    directory: Path,
    against: str | None,
    margin: float,
    max_rows: int,
    replays: int,
    refit: bool | None,
    tta: int,
    seed: int,
    targets: "TargetsName",
    to: str | None,
    catalog: str | None,
    dry_run: bool,
    max_cost: float | None,
    yes: bool,
) -> None:
    """Check the run at DIRECTORY against its spec, seeds and digests; exit code 3 if anything differs.

    With --against, its models are compared with those of a reference as well: whole rows are read, 100 first, then 300,
    1,000 and so on until they surely agree or surely differ; where that costs something, the price of the most that may
    be read is asked for first. Differences within the margin are reported, and are none. If neither is sure, the
    verdict is "undecided", the exit code 0, and what would decide is named.
    """
    from dmpipeline.checks.findings import Finding
    from dmpipeline.checks.verification import verify_run
    from dmpipeline.report.of_run import keep_answer
    from dmpipeline.runs.learned import what_was_learned
    from dmpipeline.runs.store import Run
    from dmpipeline.workflow import verify_step
    from dmpipeline.workflow.reference import find_reference

    verify_step.check_verify_settings(
        margin=margin, level=verify_step.LEVEL, max_rows=max_rows, replays=replays, tta=tta
    )
    try:
        opened = Run.open(directory)
    except SpecChangedError as error:
        _print(talk, verify_step.differing([Finding("spec", passed=False, detail=str(error))]), [])
        raise VerificationError(str(error), findings=[str(error)]) from error
    reference = None if against is None else find_reference(opened, against, targets, catalog=catalog, to=to)
    priced = [] if reference is None else _priced(opened, reference, max_rows=max_rows, refit=refit, seed=seed)
    what = f"comparing {directory} with {against}"
    with paid_for(talk, priced, what, _terms(to, catalog), dry_run=dry_run, max_cost=max_cost, yes=yes) as agreed:
        if not agreed:
            return
        with talk.counting("verifying", "models") as progress:
            findings = [*verify_run(opened, progress), *verify_step.replayed(opened, replays, seed=seed)]
        if reference is None:
            verification = verify_step.verified(opened, findings)
        else:
            with talk.counting("comparing", "rows") as progress:
                verification = verify_step.compared(
                    opened,
                    findings,
                    reference,
                    margin=margin,
                    level=verify_step.LEVEL,
                    max_rows=max_rows,
                    refit=refit,
                    tta=tta,
                    seed=seed,
                    progress=progress,
                )
    keep_answer(opened, "verification", verification.as_dict())
    learned = what_was_learned(opened).texts
    _print(talk, verification, learned)
    if verification.verdict == "undecided":
        talk.remark(next(finding.detail for finding in verification if finding.check == "evidence"))
    _raise_if_wrong(directory, verification, learned)


def _terms(to: str | None, catalog: str | None) -> Any:
    from dmdata.release.opening import in_force

    return in_force(to, catalog)[0]


def _priced(opened: "Run", reference: "Reference", *, max_rows: int, refit: bool | None, seed: int) -> list[Priced]:
    """Price the most that may be read of a reference."""
    from dmpipeline.workflow.refit_check import refit_prices

    priced = reference.prices(max_rows)
    if refit or (refit is None and not reference.is_paid):
        priced += refit_prices(opened, reference, seed=seed)
    return [Priced(artifact.name, price, reference.is_paid) for artifact, price in priced]


def _print(talk: Talk, verification: "Verification", told: list[str]) -> None:
    talk.print_data(verification.as_dict() | {"warnings": told}, verification.table())
    if verification.reference is not None:
        words = f"verdict: the run {_VERDICTS[verification.verdict]} {verification.reference}"
        if verification.verdict == "agrees" and any(finding.check == "same_models" for finding in verification):
            words += f": the {verification.n_rows:,} rows that were read are models of its own"
        talk.remark(words)


_VERDICTS = {"agrees": "agrees with", "differs": "differs from", "undecided": "may or may not agree with"}


def _raise_if_wrong(directory: Path, verification: "Verification", learned: "Sequence[str]") -> None:
    wrong = [finding for finding in verification if not finding.passed]
    if not wrong:
        return
    from dmpipeline.checks.verification import CHECKS

    details = [finding.detail for finding in wrong if finding.check != "learned"]
    if not details:
        raise VerificationError(f"{directory} holds what was specified, but {learned[0]}", findings=[wrong[0].detail])
    own = (*CHECKS, "replays")
    if _are_of_the_run(wrong, own):
        first = next(finding.detail for finding in wrong if finding.check in own and finding.check != "learned")
        raise VerificationError(
            f"{directory} is not what was specified: {first}; if rows are missing run `dmpipeline run "
            f"{quoted(directory)}`, else train it again in another directory",
            findings=details,
        )
    raise VerificationError(
        f"{directory} differs from {verification.reference}: {details[0]}; compare the specs, recipes and datasets of "
        "both",
        findings=details,
    )


def _are_of_the_run(wrong: "list[Finding]", own: tuple[str, ...]) -> bool:
    return any(finding.check in own and finding.check != "learned" for finding in wrong)
