"""How fast it is, beside peers in the same run: ratios with their spread, for this machine and no other.

A ratio above 1 says ours is faster. The bars are those of the full size; a small run shows that all of it works.
Reading, column and mirroring need nginx (apt-get install nginx-light libnginx-mod-http-lua); s3fs takes part where
`.venv-peers` is.

    python benchmarks/run.py                          # all, about fifteen minutes on two cores
    python benchmarks/run.py reading mirroring        # some; see --help
    python benchmarks/run.py --size small --json x.json
"""

import importlib
from pathlib import Path

import click
from timing import Bench

PARTS = ("reading", "small_reads", "column", "cache", "mirroring", "fitting", "training", "cluster")


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(PARTS))
@click.option("--size", type=click.Choice(["small", "full"]), default="full", show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the table there, too.")
def main(parts: tuple[str, ...], size: str, repeats: int, path: Path | None) -> None:
    """Measure PARTS, or all."""
    bench = Bench(repeats=repeats if size == "full" else min(repeats, 3))
    for part in parts or PARTS:
        print(part, flush=True)
        importlib.import_module(part).run(bench, small=size == "small")
    bench.show(path, size=size)


if __name__ == "__main__":
    main()
