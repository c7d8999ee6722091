"""The commands that find examples by how they are learned: alike ones, leaked ones, a map of all, and clusters."""

from typing import TYPE_CHECKING, Any

import click

from dmdata.cli.console import Talk, talk_options
from dmdata.cli.tables import headed_table
from dmpipeline.cli.asking import (
    CHECK_BY_RETRAINING,
    CSV,
    DEVICE,
    RUN,
    SEED,
    Question,
    certified_by,
    options_asking,
    print_answer,
)
from dmpipeline.errors import quoted

if TYPE_CHECKING:
    from rich.table import Table

    from dmpipeline.applications.leakage import Leakage
    from dmpipeline.applications.mapping.clusters import Clusters
    from dmpipeline.applications.mapping.directions import Removals
    from dmpipeline.applications.mapping.embeddings import Embedding

_OF = click.option(
    "--of",
    type=click.Choice(["targets", "train"]),
    default="targets",
    show_default=True,
    help="Which examples: targets, by the training examples that matter to them, or training examples, by the targets.",
)
_COLUMNS = click.option(
    "--only", metavar="LIST", help='These targets alone, as "0:1000": of a release no others are read.'
)


@click.command("similar")
@RUN
@click.argument("target", type=int)
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, help="Of each kind, at most.")
@SEED
@CSV
@options_asking
@talk_options
def similar(talk: Talk, question: Question, target: int, top: int, seed: int, as_csv: bool) -> None:
    """List the examples that are most like a TARGET of RUN: by weight, and by what they are learned from."""
    from dmpipeline.applications.neighbours import similar as neighbours

    with question.evidence(talk, [target]) as evidence:
        if evidence is None:
            return
        print_answer(talk, neighbours(evidence, target, top=top, seed=seed), as_csv=as_csv)


@click.command("leakage")
@RUN
@click.option("--q", type=float, default=0.1, show_default=True, help="Bound of the share of false discoveries.")
@click.option(
    "--candidates",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Training examples that the weights propose for each test example, next to those that look alike.",
)
@click.option(
    "--null",
    type=click.Choice(["distinct", "all"]),
    default="distinct",
    show_default=True,
    help="Whether copies within the training set count as natural: with all they do.",
)
@click.option("--duplicates", "within", flag_value="duplicates", help="List copies within the training set instead.")
@click.option("--suspects", "within", flag_value="suspects", help="List training examples whose label looks wrong.")
@SEED
@CSV
@talk_options
def leakage(
    talk: Talk, asked: str, q: float, candidates: int, null: Any, within: str | None, seed: int, as_csv: bool
) -> None:
    """Find test examples of RUN that its training set holds copies of: exact, noisy, shifted or relabelled ones.

    RUN is a run's directory; its models need not be trained. With --suspects they must be.
    """
    from dmpipeline.applications.inspecting.suspects import suspects
    from dmpipeline.applications.leakage import duplicates
    from dmpipeline.applications.leakage import leakage as leaked

    with talk.counting("comparing", "steps") as progress:
        if within == "duplicates":
            pairs = duplicates(asked, seed=seed, progress=progress)
            print_answer(talk, pairs, as_csv=as_csv)
            talk.remark(pairs.in_words())
            return
        if within == "suspects":
            print_answer(talk, suspects(asked, progress=progress), as_csv=as_csv)
            return
        found = leaked(asked, q=q, candidates=candidates, null=null, seed=seed, progress=progress)
    print_answer(talk, found, as_csv=as_csv)
    talk.remark(_leakage_in_words(found))


def _leakage_in_words(found: "Leakage") -> str:
    but = " but identical ones" if found.n_identical else ""
    return f"{found.in_words()}; at q {found.q:g} no fewer than {found.fewest_significant}{but} can be found"


@click.command("embed")
@RUN
@_OF
@_COLUMNS
@click.option("--components", type=click.IntRange(min=1), default=10, show_default=True, help="Principal directions.")
@click.option("--map", "picture", metavar="FILE", help="Draw the map, as .svg or .png.")
@click.option("--parquet", metavar="FILE", help="Write map, neighbours, labels and pictures, as embedding-atlas reads.")
@click.option("--zarr", metavar="FOLDER", help="Write scores, directions, map and neighbours as Zarr arrays.")
@click.option(
    "--remove",
    "removed",
    type=int,
    multiple=True,
    metavar="DIRECTION",
    help="What changes without the training examples at either end of this one; may be given several times.",
)
@click.option("--k", type=int, help="Of --remove: training examples at an end. [default: 20]")
@click.option(
    "--retrain",
    type=click.IntRange(min=0),
    metavar="R",
    help="Of --remove: check by training R models without each end, and R on the full set; they are kept in the run.",
)
@SEED
@DEVICE
@options_asking
@talk_options
def embed(
    talk: Talk,
    question: Question,
    of: Any,
    only: str | None,
    components: int,
    picture: str | None,
    parquet: str | None,
    zarr: str | None,
    removed: tuple[int, ...],
    k: int | None,
    retrain: int | None,
    seed: int,
    device: str,
) -> None:
    """Embed the examples of RUN by the weights of their datamodels: directions, neighbours and a map.

    With --remove, see what a direction means: for up to 10 targets at either end of it, what the datamodels predict of
    their mean output without the training examples at one end, and what --retrain R measures, with an interval.
    """
    from dmpipeline.applications.evidence import checked_indices, run_at
    from dmpipeline.applications.mapping.directions import check_removal, what_removal_does
    from dmpipeline.applications.mapping.embeddings import embed as embedded
    from dmpipeline.applications.pictures import picture_path

    if not removed and (k is not None or retrain is not None):
        raise click.UsageError("say which direction --k and --retrain are of: --remove DIRECTION.")
    k, retrain = 20 if k is None else k, retrain or 0
    directions = list(dict.fromkeys(checked_indices(removed, components, "direction", field="remove")))
    if retrain:
        run_at(question.asked, "what models are retrained with is")
    if picture is not None:
        picture_path(picture)
    if parquet is not None or zarr is not None:
        from dmpipeline.applications.mapping.files import check_places

        check_places(parquet, zarr)
    columns = read_columns(only)
    with question.evidence(talk, columns) as evidence:
        if evidence is None:
            return
        if directions:
            n_columns = evidence.n_targets if columns is None else len(columns)
            check_removal(evidence.n_train, n_columns, k, retrain)
            n_embedded, n_features = (evidence.n_train, n_columns)[:: 1 if of == "train" else -1]
            n_directions = min(components, n_embedded - 1, n_features)
            checked_indices(directions, n_directions, "direction", field="remove")
            if retrain:
                evidence.require_measurable()
            evidence = evidence.held(columns)  # weights of a release are paid once
        found = embedded(evidence, of=of, columns=columns, n_components=components, seed=seed)
        facts, tables = found.as_dict(), [_directions(found)]
        if directions:
            n_targets = min(10, len(found.features if of == "train" else found.indices) // 2)
            with talk.counting("retraining", "models") as progress:
                removals = what_removal_does(
                    found,
                    directions,
                    k=k,
                    n_targets=n_targets,
                    n_retrainings=retrain,
                    device=device,
                    progress=progress,
                )
            facts |= removals.as_dict()
            tables.append(_removals(removals))
        written = _write(found, picture, parquet, zarr)
        talk.print_data(facts | {"written": written}, *tables)
        if directions and not retrain and evidence.run is not None:
            talk.remark(CHECK_BY_RETRAINING)
        for path in written:
            talk.remark(f"written: {path}")
        if not written:
            talk.remark(f"next: dmpipeline embed {quoted(question.asked)} --map map.svg")


def _write(found: "Embedding", picture: str | None, parquet: str | None, zarr: str | None) -> list[str]:
    written = []
    if picture is not None:
        from dmpipeline.applications.mapping.maps import draw_map

        written.append(str(draw_map(found, picture)))
    if parquet is not None:
        from dmpipeline.applications.mapping.files import save_parquet

        written.append(str(save_parquet(found, parquet)))
    if zarr is not None:
        from dmpipeline.applications.mapping.files import save_zarr

        written.append(str(save_zarr(found, zarr)))
    return written


def _directions(found: "Embedding") -> "Table":
    shown = headed_table("direction", "share", "one end", "other end", right=slice(0, 2))
    for row in found.rows:
        ends = []
        for indices, labels in ((row.positive, row.positive_labels), (row.negative, row.negative_labels)):
            named = zip(indices[:6], labels or [None] * len(indices), strict=False)
            ends.append(", ".join(str(i) if label is None else f"{i} ({label})" for i, label in named))
        shown.add_row(str(row.direction), f"{row.explained_share:.1%}", *ends)
    return shown


def _removals(found: "Removals") -> "Table":
    shown = headed_table(
        "direction", "removed end", "of targets at", "predicted", "measured", "95% interval", "basis", right=slice(3, 5)
    )
    for row in found.rows:
        measured, interval, basis = "-", "-", "estimated"
        if row.measured_change is not None:
            measured, interval = f"{row.measured_change:+.3f}", f"{row.low:+.3f} to {row.high:+.3f}"
            basis = certified_by(found.n_retrainings)
        shown.add_row(
            str(row.direction), row.removed_end, row.of_end, f"{row.predicted_change:+.3f}", measured, interval, basis
        )
    return shown


@click.command("clusters")
@RUN
@_OF
@_COLUMNS
@click.option("--n-clusters", type=click.IntRange(min=2), help="How many. [default: by the largest eigengap]")
@click.option("--stability/--no-stability", default=None, help="Compare with fits to halves of the models, or not.")
@SEED
@CSV
@options_asking
@talk_options
def clusters(
    talk: Talk,
    question: Question,
    of: Any,
    only: str | None,
    n_clusters: int | None,
    stability: bool | None,
    seed: int,
    as_csv: bool,
) -> None:
    """Find clusters of examples of RUN that models learn from the same data, and how stable they are."""
    from dmpipeline.applications.mapping.clusters import clusters as clustered

    columns = read_columns(only)
    with question.evidence(talk, columns) as evidence:
        if evidence is None:
            return
        with talk.counting("fitting halves", "steps") as progress:
            found = clustered(
                evidence,
                n_clusters=n_clusters,
                of=of,
                columns=columns,
                stability=stability,
                seed=seed,
                progress=progress,
            )
        if as_csv or talk.as_json:
            print_answer(talk, found, as_csv=as_csv)
            return
        talk.print_data({}, _clusters(found))
        if found.ari is not None:
            talk.remark(f"clusters of two halves of the models agree to {found.ari:.2f} (adjusted Rand index)")


def _clusters(found: "Clusters") -> "Table":
    shown = headed_table("cluster", "size", "purity", "commonest", "stability", "members", right=slice(0, 3))
    for row in found.rows:
        purity = "-" if row.purity is None else f"{row.purity:.0%}"
        stability = "-" if row.stability is None else f"{row.stability:.2f}"
        members = ", ".join(map(str, row.members[:8])) + (", ..." if len(row.members) > 8 else "")
        common = "-" if row.commonest_label is None else str(row.commonest_label)
        shown.add_row(str(row.cluster), str(row.size), purity, common, stability, members)
    return shown


def read_columns(text: str | None) -> list[int] | None:
    """Read which targets are meant, as "3,17,20:40"; None for all."""
    if text is None:
        return None
    from dmpipeline.applications.counterfactuals import read_numbers

    return read_numbers(text)
