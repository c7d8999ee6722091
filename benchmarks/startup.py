"""Starting: processor time of commands and imports as a share of importing NumPy, children included."""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import Bench

ROOT = Path(__file__).parents[1]
NUMPY = ["-c", "import numpy"]


def run(bench: Bench, *, small: bool) -> None:
    """Add how long commands take to start; `small` measures a few."""
    with tempfile.TemporaryDirectory() as home:
        # compiled modules are kept, of both, whatever is set here
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment |= {"DMDATA_HOME": home, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": f"{home}/compiled"}
        for what, words, bar in _starts(small=small):
            ratios = []
            for round_ in range(bench.repeats + 1):
                ours, numpys = _cpu_seconds(words, environment), _cpu_seconds(NUMPY, environment)
                if round_:  # the first one compiles
                    ratios.append(ours / numpys)
            bench.add(what, "processor time", "import numpy", ratios, bar=f"<= {bar}")


def _starts(*, small: bool) -> list[tuple[str, list[str], float]]:
    """List what is started: its name, the interpreter's words, and how many times `import numpy` it may take."""
    starts: list[tuple[str, list[str], float]] = [("import dmdata", ["-c", "import dmdata"], 2.0)]
    for command in ("dmdata", "dmpipeline"):
        for words in (["--version"], ["--help"], ["nope"]):
            starts.append((" ".join([command, *words]), ["-m", command, *words], 1.3))
    for words in ("dmdata mi", "dmdata info cifar/50pct/"):
        completion = f"{words} <tab>", ["-c", _COMPLETE, words], 1.3
        starts.append(completion)
    starts.append(("dmdata get, without a name", ["-m", "dmdata", "get"], 1.3))
    return starts[:3] if small else starts


_COMPLETE = """
import os, sys
words = sys.argv.pop()
os.environ |= dict(_DMDATA_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(len(words.split()) - 1))
from dmdata.cli import main
main()
"""


def _cpu_seconds(words: list[str], environment: dict[str, str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], capture_output=True, env=environment, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
