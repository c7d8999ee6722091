"""Runs trained by many processes: Dask workers and Slurm jobs."""

from dmdata.late_names import late_names

_NAMES = ("local_cluster", "train_on_cluster")

# this folder was that file
__getattr__ = late_names(__name__, dict.fromkeys(_NAMES, "dmpipeline.cluster.dask_cluster"))
