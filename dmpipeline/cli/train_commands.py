"""`init`, `run`, `status` and `submit`: runs created, trained here or on a cluster, and looked at meanwhile."""

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from dmdata.cli.console import Talk, talk_options
from dmdata.cli.tables import headed_table, plain_table
from dmpipeline.cli.run_commands import next_to_check_and_fit, next_to_train, with_dataset_option
from dmpipeline.errors import SpecError, VerificationError, quoted

if TYPE_CHECKING:
    from rich.table import Table

    from dmpipeline.data.examples import Dataset
    from dmpipeline.runs.store import Run
    from dmpipeline.runs.targets import TargetsName
    from dmpipeline.spec import RunSpec
    from dmpipeline.training.ensembles import Method

DIRECTORY = click.argument("directory", type=click.Path(path_type=Path))
TARGETS = click.option(
    "--targets",
    type=click.Choice(["test", "train"]),
    default="test",
    show_default=True,
    help="Whose outputs datamodels predict: test examples', or training examples', which helps to find wrong labels.",
)

RECIPES = (
    *("perceptron", "logistic-regression", "convnet", "resnet9-release", "resnet18-release", "cifar-fast"),
    *("module", "function"),
)
"""Names of `dmpipeline.models.recipes.type_of_recipe`, known without loading it."""

_LINES_OF_A_TRACEBACK = 3
_AUTO = 0


class _Workers(click.ParamType[int]):
    """A count of processes, or `auto`: one a GPU, or on processors one a core."""

    name = "workers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if value != "auto" and not (str(value).isdecimal() and int(value) > 0):
            self.fail(f"{value!r} is not a number of processes; give 1 or more, or auto.", param, ctx)
        return _AUTO if value == "auto" else int(value)


class _Shard(click.ParamType[tuple[int, int]]):
    """One of several parts, as 3/8."""

    name = "shard"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        found = re.fullmatch(r"(\d+)/(\d+)", str(value))
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            self.fail(f"{value!r} is not a shard; give its number, from 1, and how many there are, as 3/8.", param, ctx)
        return int(found[1]), int(found[2])


class _Setting(click.ParamType[tuple[str, Any]]):
    """A hyperparameter and its value, as YAML would have it."""

    name = "setting"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        import yaml

        name, is_given, text = str(value).partition("=")
        try:
            setting = yaml.safe_load(text)
        except yaml.YAMLError:
            is_given = ""
        if not is_given or not name.isidentifier():
            self.fail(f"{value!r} is not a setting; give a name and a value, as lr=0.1.", param, ctx)
        return name, setting


@click.command("init")
@DIRECTORY
@click.option("--spec", type=click.Path(path_type=Path), help="A run.yaml; options that are given override it.")
@click.option(
    "--dataset",
    default="digits",
    show_default=True,
    help="digits, cifar10:PATH, fmow:PATH, or the path of an .npz file or a folder of arrays.",
)
@click.option(
    "--task",
    type=click.Choice(["classification", "regression", "tokens"]),
    help="What is learned. [default: inferred, where the labels leave no doubt]",
)
@click.option(
    "--inputs",
    type=click.Choice(["standardised", "as-is", "tokens"]),
    help="How inputs are taken. [default: tables standardised, others as they are]",
)
@click.option(
    "--alpha",
    "alphas",
    type=float,
    multiple=True,
    default=(0.5,),
    show_default=True,
    help="Share of the examples in a subset. Several make runs side by side: DIRECTORY/20pct, DIRECTORY/50pct.",
)
@click.option("--masks", default="exact", show_default=True, help="exact, bernoulli, or an .npy file of your own.")
@click.option(
    "--recipe",
    default="perceptron",
    show_default=True,
    help=f"By name: {', '.join(RECIPES)}. The last two train code of your own.",
    shell_complete=lambda _, __, begun: [name for name in RECIPES if name.startswith(begun)],
)
@click.option("--set", "settings", type=_Setting(), multiple=True, help="A hyperparameter of the recipe, as lr=0.1.")
@click.option("--outputs", help="What to store, as margins,logits. [default: what the dataset's models have]")
@click.option("--models", type=int, default=4000, show_default=True, help="Models to fit on.")
@click.option("--held-out", type=int, default=100, show_default=True, help="Held-out subsets.")
@click.option("--retrainings", type=int, default=10, show_default=True, help="Trainings of each held-out subset.")
@click.option("--seed", type=int, default=0, show_default=True)
@talk_options
@click.pass_context
def init(context: click.Context, /, talk: Talk, directory: Path, spec: Path | None, **options: Any) -> None:
    """Create a run in DIRECTORY; nothing is trained yet."""
    from dmpipeline.cli.introduction import dataset_facts, dataset_tables
    from dmpipeline.draws.subsets import SubsetSizes
    from dmpipeline.runs.creation import require_creatable
    from dmpipeline.runs.store import Run
    from dmpipeline.spec import MASK_LAWS, RunSpec

    given = {
        name: value
        for name, value in options.items()
        if spec is None or context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    specs, dataset = _specs(_base_spec(spec, given) if spec else None, given)
    if len(specs) > 1 and specs[0].masks not in MASK_LAWS:
        raise click.UsageError(
            f"the masks in {specs[0].masks} have no alpha, so there is one run of them; leave out --alpha"
        )
    places = [directory] if len(specs) == 1 else [directory / wanted.alpha_name for wanted in specs]
    if len(specs) > 1:  # all of them, or none
        for place, wanted in zip(places, specs, strict=True):
            require_creatable(place.absolute(), wanted, dataset)
    made = [Run.create(place, wanted, dataset=dataset) for place, wanted in zip(places, specs, strict=True)]
    sizes = [SubsetSizes.of(run.spec, run.provenance["dataset"]["n_train"]) for run in made]
    facts = [
        {"directory": str(run.path), "n_rows": run.spec.n_rows, "subsets": its.as_dict()}
        for run, its in zip(made, sizes, strict=True)
    ]
    is_new = dataset.fingerprint == made[0].provenance["dataset"]["fingerprint"]
    learned = dataset_facts(dataset if is_new else made[0].dataset(), made[0].spec)
    talk.print_data(
        (facts[0] if len(made) == 1 else {"runs": facts}) | learned,
        *(facts_table({"run": str(run.path), "subsets": its.in_words}) for run, its in zip(made, sizes, strict=True)),
        *dataset_tables(learned),
    )
    for warning in learned["warnings"]:
        talk.remark(f"warning: {warning}")
    if made[0].spec.masks not in MASK_LAWS and made[0].spec.alpha != RunSpec().alpha:
        talk.remark(f"alpha {made[0].spec.alpha:.0%} is not used: the subsets are those in {made[0].spec.masks}")
    each = f" in each of {len(made)} runs" if len(made) > 1 else ""
    n_to_fit, held_out = made[0].spec.n_models, made[0].spec.held_out
    parts = f"{n_to_fit:,} to fit on + {held_out.n_subsets:,} x {held_out.n_retrainings:,} held out{each}"
    talk.remark(f"{sum(run.spec.n_rows for run in made):,} models to train ({parts}); {next_to_train(directory)}")


def _base_spec(path: Path, given: Mapping[str, Any]) -> "RunSpec":
    """Read the file that --spec names; of a run's own, without what its dataset decided where that is another now."""
    from dmpipeline.models.settling import unsettled
    from dmpipeline.runs.relocation import read_spec
    from dmpipeline.spec import RunSpec

    if path.name != "run.yaml" or not (path.parent / "provenance.json").exists():
        return RunSpec.read(path)
    base = read_spec(path.parent.absolute())
    is_other = given.keys() & {"dataset", "task", "inputs"}
    return unsettled(base, keep_task="dataset" not in given) if is_other else base


def _specs(base: "RunSpec | None", given: Mapping[str, Any]) -> "tuple[list[RunSpec], Dataset]":
    """Make a spec for each alpha of the options that were given, and of a file's spec where they are silent.

    They are of one dataset, which is loaded here.
    """
    from dmpipeline.models.outputs import default_outputs
    from dmpipeline.models.settling import settle
    from dmpipeline.spec import RunSpec

    values: dict[str, Any] = base.model_dump() if base else {}
    values |= {name: given[option] for option, name in _FIELDS.items() if option in given}
    held_out = {name: given[option] for option, name in _HELD_OUT_FIELDS.items() if option in given}
    values["held_out"] = values.get("held_out", {}) | held_out
    recipe = values.get("recipe", {})
    if (name := given.get("recipe")) not in (None, recipe.get("name")):
        recipe = {"name": name}  # another's hyperparameters are not its
    values["recipe"] = recipe | dict(given.get("settings", ()))
    if given.get("outputs"):
        values["outputs"] = given["outputs"].split(",")
    elif base is None or "outputs" not in base.model_fields_set:
        values.pop("outputs", None)
    alphas = dict.fromkeys(given.get("alphas", (values.get("alpha"),)))
    _, dataset = settle(RunSpec(**(values | {"alpha": next(iter(alphas))})).located(Path.cwd()))
    values.setdefault("outputs", default_outputs(dataset))
    specs = [RunSpec(**(values | {"alpha": alpha})) for alpha in alphas]
    return specs, dataset


_FIELDS = {
    "dataset": "dataset",
    "task": "task",
    "inputs": "inputs",
    "masks": "masks",
    "models": "n_models",
    "seed": "seed",
}
_HELD_OUT_FIELDS = {"held_out": "n_subsets", "retrainings": "n_retrainings"}


@click.command("run")
@DIRECTORY
@click.option("--models", type=int, help="Extend the run to this many models to fit on first.")
@click.option("--device", default="cpu", show_default=True, help="Where to train, as torch names it: cuda, cuda:1.")
@click.option("--method", type=click.Choice(["products", "vmap", "loop"]), help="How to train. [default: the fastest]")
@click.option("--at-once", type=click.IntRange(min=1), help="Models to train at once. [default: the fastest number]")
@click.option("--workers", type=_Workers(), help="Train in this many processes; auto: one a GPU, or a core.")
@click.option("--scheduler", metavar="ADDRESS", help="Train on a Dask cluster, as tcp://host:8786.")
@click.option("--shard", type=_Shard(), metavar="I/N", help="Train only every N-th block, as the I-th of N hosts.")
@click.option("--replay", metavar="ROW", type=int, help="Train this row again instead, store nothing, and compare.")
@TARGETS
@talk_options
@with_dataset_option
def train(
    talk: Talk,
    directory: Path,
    models: int | None,
    device: str,
    method: "Method | None",
    at_once: int | None,
    workers: int | None,
    scheduler: str | None,
    shard: tuple[int, int] | None,
    replay: int | None,
    targets: "TargetsName",
) -> None:
    """Train what is missing in the run at DIRECTORY, or in all runs there. Run it again at any time to resume.

    With --targets train, first check that the run stores the outputs that datamodels of training examples need.
    """
    from dmdata.copying.cluster import connect
    from dmpipeline.cli.status import runs_in
    from dmpipeline.runs import training
    from dmpipeline.runs.extension import extend, extended_spec, require_alone
    from dmpipeline.runs.preparation import Prepared, prepare
    from dmpipeline.runs.store import Run
    from dmpipeline.runs.targets import fitted_array
    from dmpipeline.training.train import usable_device

    ways = {"--workers": workers, "--scheduler": scheduler, "--shard": shard, "--replay": replay}
    if len(given := [name for name, value in ways.items() if value is not None]) > 1:
        raise click.UsageError(f"{' and '.join(given)} exclude each other; give one of them")
    opened = [Run.open(path) for path in runs_in(directory)]
    if targets == "train":
        for run in opened:
            fitted_array(run, targets)
    if replay is not None and models is not None:
        raise click.UsageError("--replay stores nothing, and --models extends the run; give one of them")
    if replay is not None:
        if len(opened) > 1:
            raise click.UsageError(f"{directory} holds {len(opened)} runs; name the one to replay row {replay} of")
        _print_replay(talk, opened[0], replay, device, method, at_once)
        return
    # whatever can be refused is, before any run is touched
    to_prepare = []
    for run in opened:
        if models is not None:
            extended_spec(run, models)
            require_alone(run)
        if models is not None or (workers is None and scheduler is None):
            to_prepare.append(run)
    if scheduler is None:
        usable_device(device)  # before a dataset is loaded
    prepared = {its.run.path: its for its in prepare(to_prepare)}
    for its in prepared.values():
        its.require_way(device if scheduler is None else None, method, at_once)
    with contextlib.ExitStack() as stack:
        cluster, n_threads = scheduler, None
        if workers is not None:
            cluster, n_threads = stack.enter_context(_processes(workers, device))
        elif scheduler is not None:
            with connect(scheduler):
                pass
        if models is not None:
            opened = [extend(run, models, dataset=prepared[run.path].dataset) for run in opened]
        for run in opened:
            with talk.counting("training", "models") as progress:
                if cluster is not None:
                    from dmpipeline.cluster.dask_cluster import train_on_cluster

                    how: dict[str, Any] = {"device": device, "method": method, "n_models": at_once}
                    train_on_cluster(run, cluster, **how, n_threads=n_threads, progress=progress)
                else:
                    its = Prepared.of(run, prepared.pop(run.path).dataset)
                    way = its.find_way(device, method, at_once) if method or at_once else None
                    blocks = None if shard is None else range(shard[0] - 1, len(run.spec.blocks), shard[1])
                    training.train(its, progress, device=device, way=way, blocks=blocks)
    _print_status(talk, opened)
    left = sum(run.spec.n_rows - run.n_rows_done for run in opened)
    if shard is not None and left:
        n_rows = sum(run.spec.n_rows for run in opened)
        talk.remark(f"shard {shard[0]}/{shard[1]} is done; other shards lack {left:,} of {n_rows:,} models")
    else:
        talk.remark(next_to_check_and_fit(directory, opened, targets))


@click.command("status")
@DIRECTORY
@talk_options
@with_dataset_option
def status(talk: Talk, directory: Path) -> None:
    """Show what the run at DIRECTORY is, how far it is, how fast it goes, and what failed; or all runs there."""
    from dmpipeline.cli.status import runs_in
    from dmpipeline.runs.store import Run

    _print_status(talk, [Run.open(path) for path in runs_in(directory)])


@click.command("submit")
@DIRECTORY
@click.option("--slurm", is_flag=True, help="For Slurm; no other scheduler is supported.")
@click.option("--jobs", type=click.IntRange(min=1), default=8, show_default=True, help="Jobs of the array.")
@click.option("--gpus-per-job", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--cpus-per-job", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--memory", help="Memory of a job, for example 16G. [default: the partition's]")
@click.option("--time", default="04:00:00", show_default=True, help="Longest time of a job, as HH:MM:SS.")
@click.option("--partition")
@click.option("--account")
@click.option("--start", is_flag=True, help="Do not print: have Dask start the jobs, and stay until all is trained.")
@talk_options
def submit(
    talk: Talk,
    directory: Path,
    slurm: bool,
    jobs: int,
    gpus_per_job: int,
    cpus_per_job: int,
    memory: str | None,
    time: str,
    partition: str | None,
    account: str | None,
    start: bool,
) -> None:
    """Print the script that trains the run at DIRECTORY on Slurm: dmpipeline submit DIRECTORY --slurm | sbatch.

    Killed jobs resume where they stopped. They write their output to DIRECTORY/logs.
    """
    from dmpipeline.cluster.slurm import Jobs, own_command, sbatch_script, slurm_cluster
    from dmpipeline.runs.store import Run

    if not slurm:
        raise click.UsageError("name the scheduler: --slurm is the only one supported")
    if not re.fullmatch(r"(\d+-)?\d{1,3}:\d\d:\d\d", time):
        raise SpecError(f"time {time!r} is not HH:MM:SS; give for example --time 04:00:00", field="time", value=time)
    if start and memory is None:
        raise click.UsageError("--start needs to know how much memory a job is to have; give for example --memory 8GB")
    run = Run.open(directory)
    wanted = Jobs(jobs, gpus_per_job, cpus_per_job, time, partition, account, memory)
    # a job whose log has no folder ends at once, without a message
    (run.path / "logs").mkdir(exist_ok=True)
    if not start:
        script = sbatch_script(run.path, wanted, own_command())
        if talk.as_json:
            talk.print_data({"script": script})
        else:
            talk.print_text(script)
        return
    from dmpipeline.cluster.dask_cluster import train_on_cluster

    with slurm_cluster(run.path, wanted) as cluster, talk.counting("training", "models") as progress:
        # a queue may be long
        device = "cuda" if gpus_per_job else "cpu"
        train_on_cluster(run, cluster, device=device, wait_seconds=None, progress=progress)
    _print_status(talk, [run])


@contextlib.contextmanager
def _processes(n_workers: int, device: str) -> Iterator[tuple[Any, int]]:
    """Run a cluster on this machine, whose workers share its cores; yields it and the cores of each."""
    from dmpipeline.cluster.dask_cluster import local_cluster, visible_gpus
    from dmpipeline.compute import available_threads

    n_cores = available_threads()
    n_workers = n_workers or (len(visible_gpus()) if device.startswith("cuda") else n_cores) or 1
    with local_cluster(n_workers, device=device) as cluster:
        yield cluster, max(1, n_cores // n_workers)


def _print_replay(
    talk: Talk, opened: "Run", row: int, device: str, method: "Method | None", at_once: int | None
) -> None:
    from dmpipeline.checks.verification import TOLERANCE, replay_prepared
    from dmpipeline.runs.preparation import Prepared

    prepared = Prepared.of(opened)
    way = prepared.find_way(device, method, at_once) if method or at_once else None
    found = replay_prepared(prepared, row, device=device, way=way)
    facts: dict[str, Any] = {"row": row, "same_to_the_bit": found.is_same, "agrees": found.agrees}
    table = headed_table("array", "mean difference, of its standard deviation")
    for name, difference in found.differences.items():
        table.add_row(name, "none" if found.is_same else f"{difference:.2g}")
    finite = {name: difference if math.isfinite(difference) else None for name, difference in found.differences.items()}
    talk.print_data(facts | {"differences": finite}, table)
    if not found.agrees:
        raise VerificationError(
            f"row {row} of {opened.path} trained again differs from the stored row by more than {TOLERANCE:.0%}; if "
            f"versions or the recipe's code changed, train again in another directory, else see `dmpipeline verify "
            f"{quoted(opened.path)}`"
        )
    talk.remark(f"row {row} trained again is the same{' to the bit' if found.is_same else ', but for rounding'}")


def warn_of(texts: Iterable[str]) -> None:
    """Warn on standard error of what is wrong with a run's models."""
    for text in texts:
        click.secho(f"warning: {text}", fg="red", bold=True, err=True)


def _print_status(talk: Talk, runs: list["Run"]) -> None:
    from dmpipeline.cli.status import run_facts
    from dmpipeline.runs.learned import what_was_learned

    learned = [what_was_learned(run) for run in runs]
    facts = [run_facts(run, its) for run, its in zip(runs, learned, strict=True)]
    if len(runs) == 1:
        table = _status_table(runs[0], facts[0], learned[0].sentence())
        talk.print_data(facts[0], table, *_old_tables(facts[0]), *_failure_tables(talk, facts[0]))
        warn_of(learned[0].texts)
        return
    columns = ("run", "models", "of", "a second", "left", "failed blocks", "accuracy or R2", "commonest or mean", "old")
    table = headed_table(*columns)
    for run, its in zip(runs, facts, strict=True):
        rate = its["models_per_second"]
        cells = [f"{its['n_rows_done']:,}", f"{its['n_rows']:,}", f"{rate:,.1f}" if rate else ""]
        cells += _left(its), str(len(its["failures"]) or "")
        if its["r2_models"] is not None:
            cells += f"{its['r2_models']:.3f}", "0"
        elif its["accuracy"] is not None:
            cells += f"{its['accuracy']:.1%}", f"{its['baseline_accuracy'] or math.nan:.1%}"
        else:
            cells += "", ""
        table.add_row(run.path.name, *cells, ", ".join(result["what"] for result in its["old"]))
    talk.print_data({"runs": facts}, table)
    for run, found in zip(runs, learned, strict=True):
        warn_of(f"{run.path.name}: {text}" for text in found.texts)


def _status_table(run: "Run", facts: dict[str, Any], learned: str) -> "Table":
    from dmpipeline.draws.subsets import law_in_words, sizes_of
    from dmpipeline.runs.targets import datamodels_path

    spec, rate = run.spec, facts["models_per_second"]
    of_train = {"datamodels of training examples": str(datamodels_path(run, "train"))}
    return facts_table(
        {
            "run": facts["run"],
            "what": f"{facts['recipe']} on {spec.dataset} {law_in_words(spec)}",
            "subsets": sizes.in_words
            if (sizes := sizes_of(run.spec, run.provenance))
            else "of sizes that are not known",
            "models": f"{facts['n_rows_done']:,} of {spec.n_rows:,} trained ({spec.n_models:,} to fit on)",
            "rate": f"{rate:,.1f} models a second" if rate else "nothing trained yet",
            "left": _left(facts),
            "learned": learned or "not known yet",
            "datamodels": str(run.datamodels_path) if facts["datamodels"] else "not fitted yet",
        }
        | (of_train if facts["train_datamodels"] else {})
    )


def _left(facts: dict[str, Any]) -> str:
    if facts["n_rows_done"] == facts["n_rows"]:
        return "nothing"
    return f"{facts['seconds_left']:,.0f} s" if facts["seconds_left"] else "unknown"


def _old_tables(facts: dict[str, Any]) -> "list[Table]":
    """Show what was made from rows or datamodels that the run does not have any more."""
    if not facts["old"]:
        return []
    table = headed_table("old", "why", "next")
    for old in facts["old"]:
        table.add_row(old["path"], old["why"], old["next"])
    return [table]


def _failure_tables(talk: Talk, facts: dict[str, Any]) -> "list[Table]":
    """Show each failure with the end of its traceback, or all of it."""
    if not facts["failures"]:
        return []
    table = headed_table("failed rows", "why")
    for failure in facts["failures"]:
        lines = failure["traceback"].rstrip().splitlines()
        start, stop = failure["rows"]
        table.add_row(f"{start} to {stop - 1}", "\n".join(lines if talk.verbose else lines[-_LINES_OF_A_TRACEBACK:]))
    return [table]


def facts_table(facts: Mapping[str, object]) -> "Table":
    """Show named facts, one a line."""
    shown = ((name, f"{value:,.4g}" if isinstance(value, float) else str(value)) for name, value in facts.items())
    return plain_table(*((name.replace("_", " "), value) for name, value in shown))
