"""A run trained by many processes holds the same rows, whichever of them die, stop, fail or are of another version."""

import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cluster_runs import (
    COMMAND,
    LEARNER,
    cause_trouble,
    faults,
    kill_some,
    make_run,
    processes_of,
    require_same,
    started,
    workers_of,
    write_letters,
    write_times,
)
from processes import Child, wait_until

import dmpipeline
from dmpipeline.cluster.dask_cluster import local_cluster, train_on_cluster
from dmpipeline.errors import ClusterError, RunError, TrainingError
from dmpipeline.runs import claims
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec

distributed = pytest.importorskip("distributed")

ROOT = str(Path(dmpipeline.__file__).parents[1])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder whose modules this process and all that it starts can import."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), ROOT]))
    yield tmp_path
    sys.modules.pop("learner", None)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two workers that all tests of this module share, whichever of them they stop or kill."""
    modules = tmp_path_factory.mktemp("modules")
    (modules / "learner.py").write_text(LEARNER)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(modules)
        with local_cluster(2) as started:
            yield started


@pytest.fixture
def workers(cluster):
    """The shared cluster, once both of its workers are there."""
    wait_until(lambda: len(cluster.scheduler_info["workers"]) == 2)
    return cluster


def main(*arguments):
    """Run a command in this process; return its exit code."""
    from dmpipeline.cli import command

    with pytest.raises(SystemExit) as ended:
        command.main([str(argument) for argument in arguments])
    return ended.value.code


def test_processes_of_one_machine_train_the_rows_of_a_single_one_and_leave_nobody_behind(folder):
    recipe = {"name": "perceptron", "hidden": 6, "epochs": 20}
    spec = RunSpec(dataset=write_letters(folder), n_models=64, held_out={"n_subsets": 0}, recipe=recipe, block_models=4)
    run, whole = Run.create(folder / "run", spec), Run.create(folder / "whole", spec)
    with started(*COMMAND, "run", str(run.path), "--workers", "2") as process:
        _, said = process.communicate()
        assert (process.returncode, "distributed" in said) == (0, False), said
        wait_until(lambda: not processes_of(process.pid))
    assert (run.path / "catalog.yaml").exists()
    facts = run.provenance
    assert sum(session["n_rows"] for session in facts["sessions"]) == 64
    assert {session["way"]["method"] for session in facts["sessions"]} == {facts["ways"]["cpu"]["method"]}
    whole.train()
    require_same(run, whole)


def test_workers_that_are_killed_lose_no_row(folder):
    run, whole = make_run(folder, seconds=0.05), make_run(folder, "whole", seconds=0)
    with started(*COMMAND, "run", str(run.path), "--workers", "2") as process:
        for n_rows in (4, 16):
            wait_until(lambda n_rows=n_rows: run.n_rows_done >= n_rows)
            workers_of(process.pid)[0].kill()
        _, said = process.communicate()
        assert process.returncode == 0, said
    whole.train()
    require_same(run, whole)


def test_workers_that_all_die_at_once_before_what_they_said_is_heard_lose_no_row(folder, workers):
    run, whole = make_run(folder, seconds=0.05), make_run(folder, "whole", seconds=0)
    pids = [nanny.pid for nanny in workers.workers.values()]

    def kill_all(n_done, _):
        while n_done >= 8 and pids:
            os.kill(pids.pop(), signal.SIGKILL)

    train_on_cluster(run, workers, n_threads=1, progress=kill_all)
    whole.train()
    require_same(run, whole)


def test_a_command_that_is_killed_takes_its_workers_along_and_the_next_goes_on(folder):
    run, whole = make_run(folder, seconds=0.05), make_run(folder, "whole", seconds=0)
    with started(*COMMAND, "run", str(run.path), "--workers", "2") as process:
        wait_until(lambda: run.n_rows_done >= 8)
        process.kill()
        wait_until(lambda: not processes_of(process.pid))
    kept = run.n_rows_done
    assert 8 <= kept < run.spec.n_rows
    with started(*COMMAND, "run", str(run.path), "--workers", "2") as process:
        wait_until(lambda: run.n_rows_done > kept)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C at a terminal, which reaches workers, too
        _, said = process.communicate()
        assert process.returncode == 130, said
        assert "Traceback" not in said
        wait_until(lambda: not processes_of(process.pid))
    run.train()
    whole.train()
    require_same(run, whole)


def test_ctrl_c_while_workers_start_ends_all_without_a_word_of_theirs(folder):
    run = make_run(folder)
    with started(*COMMAND, "run", str(run.path), "--workers", "2") as process:
        wait_until(lambda: workers_of(process.pid))
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate()
        assert (process.returncode, "Traceback" in said, "distributed" in said) == (130, False, False), said
        wait_until(lambda: not processes_of(process.pid))


def test_a_worker_that_is_stopped_holds_nothing_up(folder, workers):
    run, whole = make_run(folder, seconds=0.05), make_run(folder, "whole", seconds=0)
    pids = [nanny.pid for nanny in workers.workers.values()]

    def stop_one(n_done, _):
        if n_done >= 8:
            os.kill(pids[0], signal.SIGSTOP)

    train_on_cluster(run, workers, n_threads=1, lease_seconds=1, progress=stop_one)
    stored = write_times(run)
    assert len(stored) == 10
    os.kill(pids[0], signal.SIGCONT)
    # its task ends, so another one of its process can begin
    train_on_cluster(make_run(folder, "next", seconds=0, n_models=8), workers, n_threads=1)
    with distributed.Client(workers) as client:
        wait_until(lambda: not any(client.processing().values()))
    assert write_times(run) == stored, "what woke up stored nothing again"
    whole.train()
    require_same(run, whole)


def test_workers_that_take_turns_with_other_commands_train_no_model_twice(folder, workers):
    run, whole = make_run(folder, seconds=0.01), make_run(folder, "whole", seconds=0)
    train_on_cluster(run, workers, n_threads=1, turn_seconds=0)
    assert sum(session["n_rows"] for session in run.provenance["sessions"]) == 40
    whole.train()
    require_same(run, whole)


TOUCHING = """
import fcntl, sys, time
from pathlib import Path
file = open(Path(sys.argv[1], "lock"), "a+b")
fcntl.lockf(file, fcntl.LOCK_EX, 1, 3)
while True:
    Path(sys.argv[1], ".claim-3").touch()
    print("claimed", flush=True)
    time.sleep(0.2)
"""


def test_workers_that_wait_for_a_block_of_another_process_train_for_another_command_meanwhile(folder, workers):
    waiting, run = make_run(folder, "waiting", seconds=0), make_run(folder, seconds=0)
    how = {"n_threads": 1, "lease_seconds": 1000, "turn_seconds": 0.5}
    with ThreadPoolExecutor(2) as pool:
        with started(sys.executable, "-c", TOUCHING, str(waiting.path)) as other:
            assert other.stdout.readline() == "claimed\n"
            first = pool.submit(train_on_cluster, waiting, workers, **how)
            wait_until(lambda: waiting.n_rows_done == 36)
            pool.submit(train_on_cluster, run, workers, **how).result()
        run.require_complete()
        first.result()
    waiting.require_complete()


def test_no_worker_trains_two_blocks_while_another_trains_none(folder, workers):
    recipe = {"name": "perceptron", "hidden": 6, "epochs": 600}
    spec = RunSpec(dataset=write_letters(folder), n_models=8, held_out={"n_subsets": 0}, recipe=recipe, block_models=4)
    run = Run.create(folder / "run", spec)
    train_on_cluster(run, workers, n_threads=1, method="loop", n_models=1)
    assert [session["n_rows"] for session in run.provenance["sessions"]] == [4, 4]


FRAGILE = (
    LEARNER
    + """
if Path(__file__).with_name("die").exists():
    os._exit(1)
"""
)


def test_workers_that_die_before_they_train_anything_end_the_command(folder, workers, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "fragile.py").write_text(FRAGILE)
    arguments = {"folder": str(folder), "seconds": 0.05}
    recipe = {"name": "function", "function": "fragile:learn", "arguments": arguments}
    held_out = {"n_subsets": 0}
    spec = RunSpec(dataset=write_letters(folder), n_models=40, held_out=held_out, recipe=recipe, block_models=4)
    run = Run.create(folder / "run", spec)
    (folder / "die").touch()
    with pytest.raises(ClusterError, match=r"die before they train anything.*see their logs"):
        train_on_cluster(run, workers, n_threads=1)
    (folder / "die").unlink()
    wait_until(lambda: len(workers.scheduler_info["workers"]) == 2)

    def kill_all(n_done, _):
        if n_done >= 4:
            (folder / "die").touch()
            for nanny in workers.workers.values():
                os.kill(nanny.pid, signal.SIGKILL)

    with pytest.raises(ClusterError, match=r"die before they train anything.*see their logs"):
        train_on_cluster(run, workers, n_threads=1, progress=kill_all)
    assert 4 <= run.n_rows_done < 40
    (folder / "die").unlink()
    train_on_cluster(run, workers, n_threads=1)
    run.require_complete()


def test_a_cluster_that_loses_its_workers_is_given_up_and_what_they_did_is_kept(folder):
    run = make_run(folder, seconds=0.05)
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0"
    ) as some:

        def lose_all(n_done, _):
            if n_done >= 8:
                some.scale(0)

        with pytest.raises(ClusterError, match=r"no workers for 2 s.*run the same command again"):
            train_on_cluster(run, some, n_threads=1, wait_seconds=2, progress=lose_all)
    assert 8 <= run.n_rows_done < run.spec.n_rows
    run.train()
    run.require_complete()


def test_a_block_that_another_process_has_claimed_and_never_trains_is_trained_all_the_same(folder, workers):
    run = make_run(folder, seconds=0.01)
    program = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'a+b')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX, 1, 3); print('claimed', flush=True); time.sleep(600)"
    )
    with started(sys.executable, "-c", program, str(run.path / "lock")) as other:
        assert other.stdout.readline() == "claimed\n"
        train_on_cluster(run, workers, n_threads=1, lease_seconds=1)
    run.require_complete()


def test_failing_blocks_are_named_on_record_and_hold_no_others_up(folder, workers, capsys, monkeypatch):
    run = make_run(folder)
    cause_trouble(run, folder, {5: "raises", 22: "dies"})
    with pytest.raises(TrainingError, match=r"rows 4 to 7, 20 to 23 .*dmpipeline status -v") as caught:
        train_on_cluster(run, workers, n_threads=1)
    assert caught.value.rows == [4, 5, 6, 7, 20, 21, 22, 23]
    assert run.n_rows_done == 32
    assert "every worker that trained it died" in run.failures()[5]
    assert main("status", run.path, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert [(its["block"], its["rows"]) for its in facts["failures"]] == [(1, [4, 8]), (5, [20, 24])]
    assert "ArithmeticError: this row will not do" in facts["failures"][0]["traceback"]
    assert main("status", run.path) == 0
    short = capsys.readouterr().out
    assert "this row will not do" in short
    assert "Traceback" not in short
    assert main("status", run.path, "-v") == 0
    assert "Traceback" in capsys.readouterr().out
    # each of these fails, so most are never tried
    many = make_run(folder, "many", seconds=0.02)
    cause_trouble(many, folder, dict.fromkeys(range(0, 40, 4), "raises"))
    with pytest.raises(TrainingError):
        train_on_cluster(many, workers, n_threads=1)
    assert claims.MOST_FAILED_BLOCKS <= len(many.failures()) <= claims.MOST_FAILED_BLOCKS + 2
    # fixed
    (folder / "trouble.json").unlink()
    train_on_cluster(run, workers, n_threads=1)
    assert not run.failures()
    # seen from elsewhere this path is another one, but to processes that start there
    wait_until(lambda: len(workers.scheduler_info["workers"]) == 2)
    monkeypatch.chdir(folder)
    with pytest.raises(RunError, match=r"does not find the run at /proc/self/cwd/run; .*disk that all share"):
        train_on_cluster(Run.open("/proc/self/cwd/run"), workers, n_threads=1)
    run.require_complete()


@pytest.fixture
def scheduler(tmp_path):
    """A scheduler in a process of its own, and its address."""
    program = "from distributed.cli.dask_scheduler import main; main()"
    file = tmp_path / "scheduler.json"
    arguments = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--dashboard-address", "127.0.0.1:0")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with started(sys.executable, "-c", program, *arguments, "--scheduler-file", str(file), **quiet) as process:
        wait_until(lambda: file.exists() and file.read_text().endswith("}"))  # it is written in place
        yield process, json.loads(file.read_text())["address"]


def worker_at(address, path=None):
    """Start a worker whose modules come from `path` first."""
    program = "from distributed.cli.dask_worker import main; main()"
    options = ("--no-nanny", "--nthreads", "1", "--no-dashboard", "--host", "127.0.0.1")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return started(sys.executable, "-c", program, address, *options, path=path, cwd=path, **quiet)


def test_a_scheduler_that_dies_ends_the_command_as_transient_and_keeps_what_is_done(folder, scheduler):
    process, address = scheduler
    run = make_run(folder, seconds=0.05)
    arguments = ("run", str(run.path), "--scheduler", address)
    with worker_at(address), started(*COMMAND, *arguments) as command:
        wait_until(lambda: run.n_rows_done >= 8)
        process.kill()
        _, said = command.communicate()
    assert command.returncode == 5, said
    last = said.splitlines()[-1]
    assert re.fullmatch(
        rf"dmpipeline: the cluster at {address} was lost .* run the same command again to resume", last
    ), said
    run.train()
    run.require_complete()


def test_workers_stop_with_their_command_and_those_that_come_late_take_part_in_the_next(folder, scheduler):
    _, address = scheduler
    run = make_run(folder, seconds=0.05)
    arguments = ("run", str(run.path), "--scheduler", address)
    with worker_at(address) as early:
        with started(*COMMAND, *arguments) as command:
            wait_until(lambda: run.n_rows_done >= 4)
            command.kill()
        wait_until(lambda: not list(run.path.glob(".claim-*")))
        kept = run.n_rows_done
        with started(*COMMAND, *arguments) as command:
            wait_until(lambda: run.n_rows_done > kept)
            early.kill()
            with worker_at(address):
                _, said = command.communicate()
    assert kept < run.spec.n_rows
    assert command.returncode == 0, said
    run.require_complete()
    assert not list(run.path.glob(".claim-*"))


def test_a_worker_with_different_code_refuses_and_stores_nothing(folder, scheduler):
    _, address = scheduler
    run = make_run(folder)
    copy = folder / "copy"
    for package in ("dmdata", "dmpipeline"):
        shutil.copytree(Path(ROOT, package), copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    changed = copy / "dmpipeline" / "draws" / "masks.py"
    changed.write_bytes(changed.read_bytes() + b"\n")
    with (
        worker_at(address, copy),
        pytest.raises(RunError, match=r"different code from .*dmpipeline \w{16} there") as caught,
    ):
        train_on_cluster(run, address)
    assert "install the same versions there" in str(caught.value)
    assert set(caught.value.versions) == {"dmpipeline"}
    assert run.n_rows_done == 0
    assert not run.provenance["sessions"]


def test_shards_are_parts_that_make_the_whole_and_the_last_writes_the_catalog(folder, capsys):
    run = make_run(folder, seconds=0)
    assert main("run", run.path, "--shard", "2/2") == 0
    assert "shard 2/2 is done; other shards lack 20 of 40 models" in capsys.readouterr().err
    assert [bool(digest.any()) for digest in run.digests()] == [False, True] * 5
    assert not (run.path / "catalog.yaml").exists()
    assert main("run", run.path, "--shard", "1/2") == 0
    assert (run.path / "catalog.yaml").exists()
    assert not faults(run)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shard", "0/2"], "3/8"),
        (["--shard", "3/2"], "3/8"),
        (["--workers", "0"], "1 or more"),
        (["--shard", "1/2", "--workers", "2"], "--workers and --shard exclude each other"),
        (["--shard", "1/2", "--replay", "0"], "--shard and --replay exclude each other"),
    ],
)
def test_ways_of_running_that_make_no_sense_are_refused(folder, capsys, options, words):
    assert main("run", folder, *options) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("gpus", [0, 2])
def test_the_script_for_slurm_is_one_that_trains_the_run(folder, capsys, gpus):
    (folder / "it's a $HOME").mkdir()
    run = make_run(folder, "it's a $HOME/run", seconds=0, n_models=16)
    options = ["--jobs", 2, "--gpus-per-job", gpus, "--time", "01:30:00", "--partition", "long"]
    assert main("submit", run.path, "--slurm", *options) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash\n#SBATCH --job-name=dmpipeline-run\n#SBATCH --array=1-2\n")
    assert f'--output="{run.path}/logs/%A_%a.log"' in script
    assert "#SBATCH --requeue" in script
    assert ("--gres=gpu:2" in script) == bool(gpus)
    (folder / "job.sh").write_text(script.replace("--device cuda", "--device cpu"))
    subprocess.run(["bash", "-n", folder / "job.sh"], check=True)
    assert (run.path / "logs").is_dir()
    with contextlib.ExitStack() as stack:
        start = functools.partial(Child, ["bash", folder / "job.sh"], cwd="/")
        jobs = [stack.enter_context(start(env=os.environ | {"SLURM_ARRAY_TASK_ID": task})) for task in "12"]
        assert [job.wait() for job in jobs] == [0, 0]
    run.require_complete()
    assert (run.path / "catalog.yaml").exists()


def test_starting_slurm_jobs_by_dask_says_what_to_install(folder, capsys, monkeypatch):
    run = make_run(folder)
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    assert main("submit", run.path, "--slurm", "--start", "--memory", "8GB") == 1
    assert "pip install dask-jobqueue" in capsys.readouterr().err
    assert main("submit", run.path, "--slurm", "--time", "soon") == 2
    assert "--time 04:00:00" in capsys.readouterr().err


def test_status_tells_the_rate_of_a_run_that_others_are_training(folder, capsys):
    run = make_run(folder, seconds=0)
    run.train(blocks=range(6))
    for block in range(6):
        os.utime(run.path / f"store.zarr/block_digests/c/{block}/0", (time.time(), time.time() - 60 + 8 * block))
    assert main("status", run.path, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["models_per_second"] == pytest.approx(0.5, rel=0.01)
    assert facts["seconds_left"] == pytest.approx(32, rel=0.01)


def test_runs_of_several_alphas_lie_side_by_side_and_are_trained_and_shown_together(folder, capsys):
    sweep = folder / "sweep"
    options = ["--dataset", write_letters(folder), "--models", 8, "--held-out", 0]
    assert main("init", sweep, "--alpha", 0.2, "--alpha", 0.5, *options) == 0
    assert main("run", sweep) == 0
    capsys.readouterr()
    assert main("status", sweep) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in shown[1:]] == [["20pct", "8", "8"], ["50pct", "8", "8"]]
    assert main("status", sweep, "--json") == 0
    assert [its["alpha"] for its in json.loads(capsys.readouterr().out)["runs"]] == [0.2, 0.5]


def test_twenty_kills_at_random_lose_no_row_and_train_none_twice(folder, figures):
    n_kills, rng = 20, random.Random(0)  # noqa: S311 - no secret
    run, whole = (make_run(folder, name, n_models=600, seconds=its) for name, its in (("run", 0.03), ("whole", 0)))
    killed = n_starts = n_again = 0
    seen: dict[str, tuple[int, int]] = {}

    def look() -> int:
        now = write_times(run)
        changed = sum(now.get(name) != facts for name, facts in seen.items())
        seen.update(now)
        return changed

    while run.n_rows_done < run.spec.n_rows:
        n_starts += 1
        with started(*COMMAND, "run", str(run.path), "--workers", "2", stderr=subprocess.DEVNULL) as process:
            before = run.n_rows_done
            wait_until(lambda before=before, process=process: run.n_rows_done > before or process.poll() is not None)
            killed += kill_some(run, process.pid, rng, n_kills - killed)
            if killed == n_kills:
                process.communicate()
        n_again += look()
    whole.train()
    require_same(run, whole)
    assert not faults(run)
    n_rows = run.spec.n_rows
    figures.append(f"{killed} random kills, {n_starts} starts: {n_rows} rows, {n_rows - run.n_rows_done} lost, ")
    figures.append(f"{n_again} blocks trained again that were done, 0 bits other than in an undisturbed run")
    assert (killed, n_again, run.n_rows_done) == (n_kills, 0, n_rows)
