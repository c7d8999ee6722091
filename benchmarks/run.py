"""How fast it is, beside peers in the same run: ratios with their spread, for this machine and no other.

A ratio above 1 says ours is faster. The bars are those of the full size; a small run shows that all of it works.
Reading, column and mirroring need nginx (apt-get install nginx-light libnginx-mod-http-lua); s3fs takes part where
`.venv-peers` is, and dattri where `.venv-measures` is.

    python benchmarks/run.py                          # all that measure speed, about fifteen minutes on two cores
    python benchmarks/run.py reading mirroring        # some; see --help
    python benchmarks/run.py --size small --json x.json
    python benchmarks/run.py attribution --dataset mnist    # how good, and at what cost
    python benchmarks/run.py --repeats 7 --write docs/reference/speed-table.md    # what the documentation shows
"""

import importlib
from pathlib import Path

import click
from timing import Bench

PARTS = ("reading", "small_reads", "column", "cache", "mirroring", "fitting", "training", "cluster", "startup")

ALONE = ("attribution", "science")
"""Figures that are not ratios of speeds: measured where they are asked for by name."""


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice([*PARTS, *ALONE]))
@click.option("--size", type=click.Choice(["small", "full"]), default="full", show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--dataset", type=click.Choice(["digits", "mnist"]), default="digits", help="Of attribution.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the table there, too.")
@click.option("--write", type=click.Path(path_type=Path), help="Write the table there as Markdown.")
def main(parts: tuple[str, ...], size: str, repeats: int, dataset: str, path: Path | None, write: Path | None) -> None:
    """Measure PARTS, or all that measure speed."""
    bench = Bench(repeats=repeats if size == "full" else min(repeats, 3))
    for part in parts or PARTS:
        print(part, flush=True)
        options = {"dataset": dataset} if part in ALONE else {}
        importlib.import_module(part).run(bench, small=size == "small", **options)
    bench.show(path, size=size)
    if write is not None:
        bench.write(write, size=size, parts=" ".join(parts) or "all")


if __name__ == "__main__":
    main()
