"""Collect the wheels that a machine with a GPU lacks, to be taken there: it may have no network.

Torch, numpy, numba and pytest are expected there and never collected; neither is scikit-learn or matplotlib, which what
is measured there does without.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_BYTES = 60_000_000
EXPECTED_THERE = {"torch", "numpy", "numba", "llvmlite", "pytest", "pluggy", "iniconfig"}
"""Distributions that the other machine has, in versions that fit each other."""
FROM_TESTS = {"hypothesis", "pytest-asyncio", "pytest-timeout"}
"""Of the group `tests`: what the tests' configuration names."""
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)] + ["manylinux2014_x86_64"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default="3.12", metavar="X.Y", help="version there [default: 3.12]")
    parser.add_argument("--to", type=Path, default=ROOT / "gpu-wheels", metavar="FOLDER", help="[default: gpu-wheels]")
    options = parser.parse_args()
    if not re.fullmatch(r"3\.\d+", options.python):
        parser.error(f"--python {options.python} is not a version such as 3.12")
    n_bytes = collect(options.to, options.python)
    n_wheels = len(list(options.to.glob("*.whl")))
    print(f"{n_wheels} wheels for Python {options.python}, {n_bytes / 1e6:.1f} MB: {options.to}")


def collect(folder: Path, python: str) -> int:
    """Download what is needed into a folder, from which other wheels are removed; return its size in bytes."""
    for_there = ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python]
    for platform in PLATFORMS:
        for_there += ["--platform", platform]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.json")
        resolve = ["install", "--dry-run", "--ignore-installed", "--target", scratch, "--report", str(report)]
        _pip(*resolve, *for_there, "--constraint", str(ROOT / "constraints.txt"), *_requirements())
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    wanted = [f"{of['name']}=={of['version']}" for of in found if _plain(of["name"]) not in EXPECTED_THERE]
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in folder.glob("*.whl"):
        wheel.unlink()
    _pip("download", "--no-deps", "--dest", str(folder), *for_there, *wanted)
    sizes = {wheel.name: wheel.stat().st_size for wheel in folder.glob("*.whl")}
    if (total := sum(sizes.values())) > MOST_BYTES:
        largest = ", ".join(sorted(sizes, key=lambda name: -sizes[name])[:3])
        raise SystemExit(f"{total / 1e6:.1f} MB of wheels, more than {MOST_BYTES / 1e6:.0f}; the largest: {largest}")
    return total


def _requirements() -> list[str]:
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())
    of_tests = [text for text in about["dependency-groups"]["tests"] if _plain(text) in FROM_TESTS]
    return [*about["project"]["dependencies"], *of_tests]


def _plain(requirement: str) -> str:
    """Give the normalised name of a distribution or requirement."""
    name = re.split(r"[^A-Za-z0-9._-]", requirement)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def _pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"pip {arguments[0]} failed:\n{done.stderr.strip()[-2000:]}")


if __name__ == "__main__":
    main()
