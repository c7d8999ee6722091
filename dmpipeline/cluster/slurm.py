"""A run on a cluster that Slurm schedules: a script for an array of jobs, or Dask workers that Slurm starts."""

import contextlib
import importlib
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmpipeline.errors import RunError


@dataclass(frozen=True, slots=True)
class Jobs:
    """The jobs to request from Slurm.

    Attributes
    ----------
    n_jobs : int
    gpus_per_job, cpus_per_job : int
    time : str
        Longest time of a job, as HH:MM:SS.
    partition, account : str or None
    memory : str or None
        Of a job, as 16G.
    """

    n_jobs: int
    gpus_per_job: int
    cpus_per_job: int
    time: str
    partition: str | None = None
    account: str | None = None
    memory: str | None = None


def sbatch_script(run: Path, jobs: Jobs, command: list[str]) -> str:
    """Write the script of an array of jobs, each of which trains one shard of a run; a GPU takes a shard of its own.

    A job that is requeued resumes where it was killed. The last to finish writes the run's catalog.

    Parameters
    ----------
    run : pathlib.Path
        Absolute path, the same wherever jobs run.
    jobs : Jobs
    command : list of str
        How ``dmpipeline`` is called there; see `own_command`.
    """
    # Slurm takes % in paths for its own, and has no way to quote a space but these
    logs = str(run / "logs").replace("%", "%%").replace('"', '\\"')
    facts = {
        "job-name": f"dmpipeline-{''.join(c if c.isalnum() or c in '._-' else '_' for c in run.name)}",
        "array": f"1-{jobs.n_jobs}",
        "cpus-per-task": jobs.cpus_per_job,
        "gres": f"gpu:{jobs.gpus_per_job}" if jobs.gpus_per_job else None,
        "mem": jobs.memory,
        "time": jobs.time,
        "partition": jobs.partition,
        "account": jobs.account,
        "output": f'"{logs}/%A_%a.log"',
    }
    lines = ["#!/bin/bash", *(f"#SBATCH --{name}={value}" for name, value in facts.items() if value is not None)]
    lines += ["#SBATCH --requeue", "#SBATCH --open-mode=append", "set -euo pipefail", ""]
    train = shlex.join([*command, "run", str(run)])
    if jobs.gpus_per_job <= 1:
        device = " --device cuda" if jobs.gpus_per_job else ""
        return "\n".join([*lines, f'{train} --shard "$SLURM_ARRAY_TASK_ID/{jobs.n_jobs}"{device}', ""])
    n_shards = jobs.n_jobs * jobs.gpus_per_job
    default = ",".join(map(str, range(jobs.gpus_per_job)))
    return "\n".join(
        [
            *lines,
            f'IFS=, read -ra gpus <<< "${{CUDA_VISIBLE_DEVICES:-{default}}}"',
            "pids=()",
            f"for ((i = 0; i < {jobs.gpus_per_job}; i++)); do",
            f"  shard=$(((SLURM_ARRAY_TASK_ID - 1) * {jobs.gpus_per_job} + i + 1))",
            f'  CUDA_VISIBLE_DEVICES="${{gpus[i]}}" {train} --shard "$shard/{n_shards}" --device cuda &',
            "  pids+=($!)",
            "done",
            "failed=0",
            'for pid in "${pids[@]}"; do wait "$pid" || failed=$?; done',
            'exit "$failed"',
            "",
        ]
    )


def own_command() -> list[str]:
    """Return the command, with absolute paths, that calls the ``dmpipeline`` that is running."""
    installed = Path(sys.executable).parent / "dmpipeline"
    found = installed if installed.exists() else shutil.which("dmpipeline")
    if found:
        return [str(Path(found).absolute())]
    return [sys.executable, "-c", "from dmpipeline.cli.command import main; main()"]


@contextlib.contextmanager
def slurm_cluster(run: Path, jobs: Jobs) -> Iterator[Any]:
    """Have Slurm start Dask workers while the block runs; yields the cluster.

    Raises
    ------
    RunError
        If dask-jobqueue is not installed.
    """
    from dmpipeline.cluster.dask_cluster import quiet

    try:
        jobqueue: Any = importlib.import_module("dask_jobqueue")
    except ImportError as error:
        raise RunError(
            "submit --start has Dask start Slurm jobs, for which dask-jobqueue is not installed; pip install "
            f"dask-jobqueue, or do without: dmpipeline submit {shlex.quote(str(run))} --slurm | sbatch"
        ) from error
    # one process a GPU, which sees no other
    n_gpus = max(1, jobs.gpus_per_job)
    with (
        quiet(),
        jobqueue.SLURMCluster(
            queue=jobs.partition,
            account=jobs.account,
            cores=max(1, jobs.cpus_per_job // n_gpus),
            processes=1,
            memory=jobs.memory,
            walltime=jobs.time,
            job_extra_directives=["--gres=gpu:1"] if jobs.gpus_per_job else [],
            log_directory=str(run / "logs"),
            scheduler_options={"dashboard": False, "dashboard_address": ":0"},
        ) as cluster,
    ):
        cluster.scale(jobs=jobs.n_jobs * n_gpus)
        yield cluster
