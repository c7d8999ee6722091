"""A table of what one GPU does: `python benchmarks/gpu.py`, or `make gpu`; `--rehearse` runs it on the CPU, tiny.

It needs no network, and of packages what `gpu-wheels` holds and a Python with torch, numpy, numba and pytest. Rows are
printed as they are found. Parts run in a process of their own, each under a time limit: one that fails or hangs costs
its own rows, which then say why, and the next part begins in a fresh process.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
WHEELS = ROOT / "gpu-wheels"
EXPECTED_HERE = ("torch", "numpy", "numba", "pytest")
FROM_WHEELS = ("boto3", "click", "filelock", "fsspec", "google_crc32c", "hypothesis", "numcodecs", "obstore")
FROM_WHEELS += ("platformdirs", "pydantic", "pytest_asyncio", "pytest_timeout", "rich", "urllib3", "yaml", "zarr")

PARTS: dict[str, tuple[float, tuple[str, ...]]] = {
    "environment": (40, ("GPU", "torch", "Python")),
    "tests": (110, ("tests marked gpu",)),
    "equal": (
        45,
        (
            "equal to the CPU's: ResNet-9 by loop",
            "equal to the CPU's: ResNet-9 by vmap",
            "equal to the CPU's: convnet by loop",
            "equal to the CPU's: convnet by vmap",
            "equal to the CPU's: perceptron by vmap",
            "half precision stays near single: ResNet-9",
            "same to the bit, twice: ResNet-9 by loop",
            "same to the bit, twice: ResNet-18 by loop",
        ),
    ),
    "whole": (
        60,
        (
            "whole ResNet-9, loop",
            "its accuracy, loop",
            "peak memory, one model by loop",
            "whole ResNet-9, CUDA graph",
            "its accuracy, CUDA graph",
        ),
    ),
    "ways": (
        80,
        (
            "ResNet-9, loop, half precision",
            "ResNet-9, loop, single precision",
            "ResNet-9, loop, bfloat16",
            "ResNet-9, loop, half precision, cuDNN chooses",
            "ResNet-9, a CUDA graph a step",
            "ResNet-9, graphs on 2 streams",
            "ResNet-9, graphs on 4 streams",
            "ResNet-9, vmap of 2",
            "ResNet-9, vmap of 4",
            "ResNet-9, vmap of 8",
        ),
    ),
    "resnet18": (
        45,
        (
            "ResNet-18 at 224, loop, half precision",
            "peak memory, one ResNet-18 by loop",
            "ResNet-18 at 224, a CUDA graph a step",
        ),
    ),
    "fit": (75, ("fit, processors", "fit, device", "fit, targets with the same lam", "fit, same weights")),
    "int8": (
        30,
        (
            "X'X by packed bits, processors",
            "X'X by int8 products, device",
            "X'X by int8 products, counts that differ",
        ),
    ),
    "compiled": (
        90,
        (
            "compiling ResNet-9",
            "ResNet-9, compiled, torch's CUDA graphs",
            "whole ResNet-9, compiled",
            "its accuracy, compiled",
            "ResNet-9, compiled, no CUDA graphs",
        ),
    ),
    "processes": (
        50,
        ("ResNet-9, loop, half precision, 2 processes", "ResNet-9, loop, half precision, 4 processes"),
    ),
    "probe": (60, ("the way that the probe chooses",)),
}
"""Seconds that a part may take, and the rows that it owes, in the order of their worth."""

REHEARSED_LONGER = 3  # a processor that others use
LEAST_SECONDS = 5  # left of all, or a part is not begun
WIDTHS = (48, 18, 13, 10)


class Table:
    """Rows, printed as they come; `met` is "failed" where there is no figure, for the reason in the note."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str]] = []
        self._line("what", "figure", "bar", "met", "note")

    def add(self, what: str, figure: str = "", bar: str = "", met: str = "", note: str = "") -> None:
        self.rows.append({"what": what, "figure": figure, "bar": bar, "met": met, "note": note})
        self._line(what, figure, bar, met, note)

    def fail(self, part: str, why: str) -> None:
        """Say of what a part still owes why it is not there."""
        there = {row["what"] for row in self.rows}
        for what in PARTS[part][1]:
            if what not in there:
                self.add(what, met="failed", note=why)
                why = "as above"

    def _line(self, *cells: str) -> None:
        padded = [cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=False)]
        print(" ".join([*padded, *cells[len(padded) :]]).rstrip(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="everything tiny, on the CPU")
    parser.add_argument("--device", default="cuda", metavar="NAME", help="as torch names it [default: cuda]")
    parser.add_argument("--seconds", type=float, default=350, metavar="N", help="for all of it [default: 350]")
    parser.add_argument("--parts", metavar="A,B", help=f"only some of {','.join(PARTS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there as well")
    parser.add_argument("--run", metavar="A,B", help=argparse.SUPPRESS)  # parts, in this process
    options = parser.parse_args()
    device = "cpu" if options.rehearse else options.device
    if options.run:
        run_here(options.run.split(","), device, is_full=not options.rehearse)
        return
    parts = options.parts.split(",") if options.parts else list(PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--parts {','.join(unknown)} is not among {','.join(PARTS)}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        table = Table()
        environ = environment(table, Path(scratch))
        run_all(table, parts, environ, began + options.seconds, device=device, is_full=not options.rehearse)
    n_failed, n_missed = (sum(row["met"] == met for row in table.rows) for met in ("failed", "no"))
    seconds = time.monotonic() - began
    print(f"{len(table.rows)} rows in {seconds:.0f} s: {n_failed} failed, {n_missed} below their bar", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"seconds": seconds, "rows": table.rows}, indent=2))
    sys.exit(1 if n_failed else 0)


def environment(table: Table, scratch: Path) -> dict[str, str]:
    """Give the variables under which parts find this checkout and all packages, wheels unpacked if some are missing."""
    paths = [str(ROOT)]
    missing = [name for name in FROM_WHEELS if importlib.util.find_spec(name) is None]
    if missing:
        site, note = scratch / "site", ""
        try:
            unpack(WHEELS, site)
            paths.insert(0, str(site))
        except (OSError, RuntimeError, subprocess.TimeoutExpired, zipfile.BadZipFile) as error:
            note = f"{type(error).__name__}: {error}"
        still = [name for name in missing if not (site / name).exists() and not (site / f"{name}.py").exists()]
        note = note or (
            f"not in {WHEELS.name}: {', '.join(still)}; make gpu-wheels" if still else f"from {WHEELS.name}"
        )
        table.add("packages missing here", str(len(missing)), "", "failed" if still else "", note)
    if absent := [name for name in EXPECTED_HERE if importlib.util.find_spec(name) is None]:
        table.add("packages expected here", f"{len(absent)} missing", "", "failed", f"install {', '.join(absent)}")
    before = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *before]), "PYTHONUNBUFFERED": "1"}


def unpack(wheels: Path, site: Path) -> None:
    """Install wheels into a folder of their own, without network: by pip, or where there is none by unpacking them."""
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise FileNotFoundError(f"there are no wheels in {wheels}; make gpu-wheels where there is a network")
    if importlib.util.find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
        command += ["--quiet", "--disable-pip-version-check", "--target", str(site), *map(str, found)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(f"pip: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
        return
    for wheel in found:
        of_python = wheel.stem.split("-")[-3]
        here = f"cp{sys.version_info.major}{sys.version_info.minor}"
        if not (of_python.endswith("py3") or of_python == here or "abi3" in wheel.stem):
            raise RuntimeError(f"{wheel.name} is not for this Python, {here}; make gpu-wheels PYTHON_THERE=3.x")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)


def run_all(
    table: Table, parts: list[str], environ: dict[str, str], deadline: float, *, device: str, is_full: bool
) -> None:
    """Run parts in their order; what fails, hangs or finds no time left says so in its rows.

    Nothing is timed in a rehearsal, so the tests run next to the parts there.
    """
    left = list(parts)
    if "tests" in parts and not is_full:
        limit = deadline - time.monotonic()
        tests = threading.Thread(target=run_tests, args=(table, environ, limit), kwargs={"is_rehearsed": True})
        tests.start()
        parts = [part for part in parts if part != "tests"]
        run_all(table, parts, environ, deadline, device=device, is_full=is_full)
        tests.join()
        return
    while left:
        if deadline - time.monotonic() < LEAST_SECONDS:
            for part in left:
                table.fail(part, "no time was left for it")
            return
        if left[0] == "tests":
            limit = min(PARTS["tests"][0], deadline - time.monotonic())
            run_tests(table, environ, limit, is_rehearsed=False)
            left.pop(0)
            continue
        together = left[: left.index("tests")] if "tests" in left else left
        n_done = run_parts(table, together, environ, deadline, device=device, is_full=is_full)
        del left[:n_done]


def run_parts(
    table: Table, parts: list[str], environ: dict[str, str], deadline: float, *, device: str, is_full: bool
) -> int:
    """Run parts in one process until one fails; count those that are through with, well or not."""
    command = [sys.executable, str(Path(__file__)), "--run", ",".join(parts), "--device", device]
    if not is_full:
        command, environ = [*command, "--rehearse"], environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as errors, started(command, environ, errors) as (process, lines):
        for n_done, part in enumerate(parts):
            limit = PARTS[part][0] * (1 if is_full else REHEARSED_LONGER)
            until = min(time.monotonic() + limit, deadline)
            why = ""
            while not why:
                try:
                    line = lines.get(timeout=max(until - time.monotonic(), 0))
                except queue.Empty:
                    why = f"stopped after {f'{limit:.0f} s' if until < deadline else 'all the time there was'}"
                    break
                if line is None:
                    errors.seek(0)
                    said = errors.read().strip().splitlines()
                    why = f"its process ended with {process.wait()}: {said[-1] if said else 'no reason given'}"
                elif (said_row := parsed(line)) is None:
                    continue  # something else that was printed
                elif "done" in said_row:
                    break
                elif "failed" in said_row:
                    why = said_row["failed"]
                else:
                    table.add(**said_row)
            if why:
                table.fail(part, why)
                return n_done + 1
            table.fail(part, "the part ended without it")
    return len(parts)


@contextlib.contextmanager
def started(command: list[str], environ: dict[str, str], errors) -> Iterator[tuple[subprocess.Popen, queue.Queue]]:
    """Run a command whose lines come by a queue, None after the last; in the end all its processes are killed."""
    process = subprocess.Popen(
        command,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        start_new_session=True,
        cwd=ROOT,
        preexec_fn=_end_with_parent,
    )
    lines: queue.Queue = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield process, lines
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(5)
        if not reader.is_alive():
            process.stdout.close()


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_parent() -> None:
    """Ask Linux to kill this process when who started it is gone, however it went."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def parsed(line: str) -> dict[str, str] | None:
    """Take apart a line that `run_here` printed; None of any other."""
    try:
        said = json.loads(line)
    except ValueError:
        return None
    return said if isinstance(said, dict) else None


def run_here(parts: list[str], device: str, *, is_full: bool) -> None:
    """Run parts in this process and print what they find, a line of JSON each; end with the first that fails."""
    for part in parts:
        try:
            import gpu_parts

            for row in gpu_parts.PARTS[part](gpu_parts.Size(device, is_full)):
                print(json.dumps(row._asdict()), flush=True)
        except Exception as error:
            print(json.dumps({"failed": shortened(f"{type(error).__name__}: {error}")}), flush=True)
            raise
        print(json.dumps({"done": part}), flush=True)


def run_tests(table: Table, environ: dict[str, str], limit: float, *, is_rehearsed: bool) -> None:
    """Run the tests marked gpu; a row says how many passed, and each that did not has one of its own."""
    files = ["tests/dmpipeline/cli/test_gpu.py"]
    if importlib.util.find_spec("sklearn") is not None and not is_rehearsed:
        files.append("tests/dmpipeline/fitting/test_proximal.py")
    environ = environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environ |= {"DMDATA_GPU_REHEARSAL": "1"} if is_rehearsed else {}
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "errors"), "w+") as errors:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--junitxml", str(report)]
        command += [] if is_rehearsed else ["--timeout", "60"]
        command += ["-p", "no:cacheprovider", "-p", "pytest_timeout", "-p", "pytest_asyncio.plugin", *files]
        said: list[str] = []
        until = time.monotonic() + limit
        with started(command, environ, errors) as (process, lines):
            try:
                while (line := lines.get(timeout=max(until - time.monotonic(), 0))) is not None:
                    said.append(line.strip())
            except queue.Empty:
                table.fail("tests", f"stopped after {limit:.0f} s; {' '.join(said[-1:])}")
                return
            process.wait()
        suite = ElementTree.parse(report).getroot().find("testsuite") if report.exists() else None  # noqa: S314
        if suite is None or not int(suite.get("tests")):
            errors.seek(0)
            why = [*said, *errors.read().strip().splitlines()]
            table.fail("tests", shortened(next((line for line in reversed(why) if line), "no reason given")))
            return
        tests, skipped = int(suite.get("tests")), int(suite.get("skipped"))
        n_bad = int(suite.get("failures")) + int(suite.get("errors"))
        met = "yes" if tests - skipped and not n_bad else "no"
        note = f"{skipped} skipped" if skipped else ""
        table.add("tests marked gpu", f"{tests - skipped - n_bad} passed", "all", met, note)
        for case in suite.iter("testcase"):
            for outcome in (*case.findall("failure"), *case.findall("error")):
                why = shortened(outcome.get("message") or outcome.text or "")
                table.add(f"  {case.get('name')}", met="failed", note=why)


def shortened(text: str) -> str:
    """One line of a reason."""
    return " ".join(text.split())[:300]


if __name__ == "__main__":
    if shutil.which("nvidia-smi") is None and "--rehearse" not in sys.argv and "--run" not in sys.argv:
        print("there is no nvidia-smi here; --rehearse runs everything on the CPU", file=sys.stderr)
    main()
