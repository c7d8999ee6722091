"""Whether datamodels fitted to two ensembles are the same ones: by their weights, and by what they predict.

Weights of two fits differ by noise even where everything else is alike, so their correlation is reported and decides
nothing. What decides is prediction: datamodels of one ensemble must rank the held-out models of the other as well as
those of their own.
"""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

import dmdata
from dmpipeline.checks.findings import Finding
from dmpipeline.errors import SpecError
from dmpipeline.fitting.datamodels import Datamodels
from dmpipeline.fitting.fitted import load_datamodels
from dmpipeline.fitting.readings import LEAST_MODELS, find_space
from dmpipeline.runs.store import Run
from dmpipeline.runs.targets import command, datamodels_path, fitted_array
from dmpipeline.scoring.evaluation import Evaluation, evaluate
from dmpipeline.scoring.retrainings import LEAST_SUBSETS
from dmpipeline.workflow.reference import Reference
from dmpipeline.workflow.run_arrays import open_rows

MOST_TARGETS = 100
"""Targets whose datamodels are compared, drawn at random where there are more."""

MARGIN = 0.1
"""By how much the LDS of the same datamodels may differ between the held-out models of two ensembles alike."""

MOST_HELD_OUT = 1000
"""Held-out models of either side that datamodels are scored on, at most."""

_LEAST_FACTOR = 1.5  # slopes of predictions that differ by less may come from another regularisation

HeldOut = tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64], int]


def picked_targets(n_targets: int, seed: int) -> npt.NDArray[np.intp]:
    """Choose whose datamodels are compared."""
    if n_targets <= MOST_TARGETS:
        return np.arange(n_targets)
    return np.sort(np.random.default_rng(seed).choice(n_targets, MOST_TARGETS, replace=False))


def refit_prices(run: Run, reference: Reference, *, seed: int) -> list[tuple[dmdata.Artifact, dmdata.Estimate]]:
    """Price what `compare_datamodels` reads of a reference, array by array; empty where ours are not fitted."""
    if not datamodels_path(run, reference.targets).exists() or reference.outputs.schema is None:
        return []
    picked = picked_targets(reference.outputs.schema.shape[1], seed)
    return reference.refit_prices(picked, _their_rows(run, reference))


def refit_usd(run: Run, reference: Reference, *, seed: int) -> float:
    """Price comparing datamodels, in dollars; 0 where nobody pays."""
    return sum(price.usd for _, price in refit_prices(run, reference, seed=seed)) if reference.is_paid else 0.0


def compare_datamodels(run: Run, reference: Reference, *, seed: int) -> Iterator[Finding]:
    """Compare the datamodels of a run with those of a reference that lists some.

    Yields
    ------
    finding : Finding
        Of level "refit": the space of the weights, their correlation and support, and LDS crosswise. One that says
        what is missing, where ours are not fitted or held-out models are too few.
    """
    targets = reference.targets
    if not datamodels_path(run, targets).exists():
        told = f"ours are not fitted; fit them with `{command(run.path, 'fit', targets)}` to compare datamodels"
        yield Finding("weights", passed=True, detail=told, level="refit")
        return
    known = load_datamodels(run, targets)
    picked = picked_targets(known.n_targets, seed)
    # as written: what they are of is found out below
    written = reference.datamodels(picked)
    if (written.n_train, written.n_targets) != (known.n_train, len(picked)):
        told = f"datamodels of the reference have {written.n_train:,} training examples, ours {known.n_train:,}"
        yield Finding("weights", passed=False, detail=told, level="refit")
        return
    ours = Datamodels(known.weight[:, picked], known.bias[picked], known.lam[picked])
    sides = _held_out(run, reference, picked)
    if sides is None:
        theirs = written if written.space == "raw" else written.to_raw(mean=run.spec.alpha)
        yield _of_weights(ours, theirs)
        return
    # what masks are standardised by is the reference's, and masks that were given have no alpha
    theirs, space = _in_raw_space(written, sides[0], float(sides[1][0].mean()))
    yield space
    yield _of_scale(ours, theirs, sides[0])
    yield _of_weights(ours, theirs)
    yield from _crosswise(ours, theirs, sides, seed)


def _held_out(run: Run, reference: Reference, picked: npt.NDArray[np.intp]) -> tuple[HeldOut, HeldOut] | None:
    """Read the held-out models of both; None where either has too few subsets to score with."""
    spec, part = run.spec, reference.held_out
    theirs = _their_rows(run, reference)
    if not theirs:
        return None
    n_rows = min(_most(spec.held_out.n_retrainings), spec.rows.held_out.stop - spec.rows.held_out.start)
    rows = slice(spec.rows.held_out.start, spec.rows.held_out.start + n_rows)
    masks = open_rows(run, "train_masks", rows)[0:n_rows]
    outputs = open_rows(run, fitted_array(run, reference.targets), rows)[0:n_rows]
    mask_rows, output_rows = (
        reference.open(artifact.name.removeprefix(f"{reference.prefix}/"))[theirs.start : theirs.stop]
        for artifact in reference.arrays
    )
    return (
        (np.asarray(masks, np.bool_), outputs[:, picked].astype(np.float64), spec.held_out.n_retrainings),
        (np.asarray(mask_rows, np.bool_), output_rows[:, picked].astype(np.float64), part.n_retrainings),
    )


def _their_rows(run: Run, reference: Reference) -> range:
    """Choose the reference's held-out rows to score on; none where either side has too few subsets for it."""
    part = reference.held_out
    subsets = (run.spec.held_out.n_subsets, len(part.rows) // part.n_retrainings)
    if min(subsets) < max(LEAST_SUBSETS, LEAST_MODELS) or reference.masks is None:
        return range(0)
    return part.rows[: _most(part.n_retrainings)]


def _most(n_retrainings: int) -> int:
    return MOST_HELD_OUT - MOST_HELD_OUT % n_retrainings or n_retrainings


def _in_raw_space(written: Datamodels, side: HeldOut, alpha: float) -> tuple[Datamodels, Finding]:
    """Turn weights into those of raw masks, whatever their file says: held-out models show what they are of."""
    masks, outputs, n_retrainings = side
    reading = find_space(written, masks[::n_retrainings], outputs[::n_retrainings])
    space = reading.space if reading.is_sure else written.space
    found = f"{reading}"
    if space == written.space:
        told = f"weights of the reference are of {space} masks, as read; {found}"
    else:
        told = (
            f"weights of the reference are of {space} masks, though their file does not say so: they were turned into "
            f"those of raw masks before the comparison; {found}"
        )
    theirs = written.read_as(space)
    # a file of raw weights states nothing, nor does the release's, whose weights are of standardised masks
    is_stated = written.space == "standardised"
    finding = Finding("weight_space", passed=space == written.space or not is_stated, detail=told, level="refit")
    return theirs if space == "raw" else theirs.to_raw(mean=alpha), finding


def _of_scale(ours: Datamodels, theirs: Datamodels, side: HeldOut) -> Finding:
    """Compare by how much predictions of both must be stretched to be outputs: a constant factor shows so."""
    masks, outputs, n_retrainings = side
    masks, outputs = masks[::n_retrainings], outputs[::n_retrainings]
    predicted = [datamodels.predict(masks.astype(np.int8)).astype(np.float64) for datamodels in (ours, theirs)]
    slopes = np.array([_slope(each, outputs) for each in predicted])
    # a tenth of the models left out at a time shows how sure slopes are
    tenths = np.arange(len(masks)) % 10
    parts = np.array([[_slope(each[tenths != k], outputs[tenths != k]) for each in predicted] for k in range(10)])
    errors = np.sqrt(0.9 * ((parts - parts.mean(0)) ** 2).sum(0))
    if (np.abs(slopes) <= 3 * errors).any() or not parts.all():
        told = "datamodels predict held-out models too poorly to compare the scale of their weights"
        return Finding("weight_scale", passed=True, detail=told, level="refit")
    ratio = float(slopes[0] / slopes[1])
    logs = np.log(np.abs(parts[:, 0] / parts[:, 1]))
    half = 3 * math.sqrt(0.9 * float(((logs - logs.mean()) ** 2).sum()))
    is_off = ratio <= 0 or abs(math.log(ratio)) - half > math.log(_LEAST_FACTOR)
    told = f"predictions of the reference's datamodels are {ratio:.3g} times as wide as those of ours"
    if is_off:
        told += f": a factor between the weights, of {1 / _LEAST_FACTOR:.2g} to {_LEAST_FACTOR:g} at most expected"
    return Finding(
        "weight_scale", passed=not is_off, detail=told, level="refit", effect=float(ratio), margin=_LEAST_FACTOR
    )


def _slope(predicted: npt.NDArray[np.floating], outputs: npt.NDArray[np.float64]) -> float:
    apart = predicted - predicted.mean(0)
    square = float((apart**2).sum())
    return float((apart * (outputs - outputs.mean(0))).sum()) / square if square else 0.0


def _of_weights(ours: Datamodels, theirs: Datamodels) -> Finding:
    """Describe how alike the weights are: correlation, and support in common beyond chance."""
    first, second = ours.weight.astype(np.float64), theirs.weight.astype(np.float64)
    correlation = float(np.corrcoef(first.ravel(), second.ravel())[0, 1]) if first.any() and second.any() else math.nan
    supports = [weight != 0 for weight in (first, second)]
    common = int((supports[0] & supports[1]).sum())
    by_chance = float((supports[0].sum(0) / len(first) * supports[1].sum(0)).sum())
    times = f", {common / by_chance:.1f} times what chance gives" if by_chance else ""
    told = (
        f"weights of {ours.n_targets:,} targets correlate by {correlation:.3f}; of {int(supports[0].sum()):,} that are "
        f"not zero in ours, {common:,} are not zero in the reference{times}"
    )
    return Finding("weights", passed=True, detail=told, level="refit", effect=correlation)


def _crosswise(ours: Datamodels, theirs: Datamodels, sides: tuple[HeldOut, HeldOut], seed: int) -> Iterator[Finding]:
    """Score both datamodels on both ensembles' held-out models: whose models they are must not matter."""
    names = ("our datamodels", "the reference's datamodels")
    places = ("our held-out models", "the reference's")
    for nth, (name, datamodels) in enumerate(zip(names, (ours, theirs), strict=True)):
        try:
            at_home, abroad = (_scored(datamodels, sides[side], seed) for side in (nth, 1 - nth))
        except SpecError as error:
            yield Finding(
                ("our_lds", "their_lds")[nth], passed=True, detail=f"{name} could not be scored: {error}", level="refit"
            )
            continue
        half = math.hypot(*((score.lds_high - score.lds_low) / 2 for score in (at_home, abroad)))
        # another ceiling of another number of retrainings is no difference between datamodels
        ceilings = [score.lds_ceiling for score in (at_home, abroad)]
        is_known = all(map(math.isfinite, ceilings)) and ceilings[0] > 0
        scale = ceilings[1] / ceilings[0] if is_known else 1.0
        difference = abroad.lds - at_home.lds * scale
        # of other numbers of retrainings nothing is told where a ceiling is not known
        is_off = difference + half < -MARGIN and (is_known or sides[0][2] == sides[1][2])
        told = (
            f"LDS of {name} is {at_home.lds:.3f} on {places[nth]} (ceiling {ceilings[0]:.3f}) and {abroad.lds:.3f} on "
            f"{places[1 - nth]} (ceiling {ceilings[1]:.3f})"
        )
        if is_off:
            told += f": surely lower by more than {MARGIN}"
        yield Finding(
            ("our_lds", "their_lds")[nth],
            passed=not is_off,
            detail=told,
            level="refit",
            effect=float(difference),
            low=float(difference - half),
            high=float(difference + half),
            margin=MARGIN,
        )


def _scored(datamodels: Datamodels, side: HeldOut, seed: int) -> Evaluation:
    masks, outputs, n_retrainings = side
    return evaluate(datamodels, masks, outputs, n_retrainings=n_retrainings, seed=seed)
