"""What a spec leaves to its dataset, decided once, when a run is created, and written into its run.yaml.

The task and the form of inputs; and of the small recipes, hyperparameters that the user leaves out, where the version's
defaults, which are made for pictures of digits, do not suit a table. They stand in run.yaml as if they had been typed,
so no version of a recipe changes its meaning.
"""

from typing import Any

from dmpipeline.data.datasets import load_dataset
from dmpipeline.data.examples import Dataset
from dmpipeline.data.tasks import unscaled_inputs
from dmpipeline.errors import SpecError
from dmpipeline.models.recipes import Function, Recipe, find_recipe
from dmpipeline.spec import RecipeSpec, RunSpec

_SMALL_RECIPES = ("perceptron", "logistic-regression")

# Fifteen epochs of batches of 64 are fifteen steps where there are few examples. On halves of iris and wine, twice the
# epochs raise the mean accuracy of models from 0.91 to 0.98 and from 0.98 to 0.98.
_FEW_EXAMPLES = 256
_MORE_EPOCHS = 30

# Squared errors of scaled labels diverge at a step size of 0.3. Measured on halves of diabetes and of Friedman's first
# problem, in R2 on test examples: 0.32 and 0.88 with these; 0.25 and 0.91 with 0.1 and no decay.
_REGRESSION = {"lr": 0.05, "weight_decay": 0.07}


def settle(spec: RunSpec, dataset: Dataset | None = None) -> tuple[RunSpec, Dataset]:
    """Decide what a spec leaves open.

    Parameters
    ----------
    spec : RunSpec
        With absolute paths.
    dataset : Dataset, optional
        What was settled for such a spec before, perhaps with another alpha; otherwise it is loaded.

    Returns
    -------
    spec : RunSpec
        With `task`, `inputs`, and whatever hyperparameters differ for the dataset; the same when settled again.
    dataset : Dataset

    Raises
    ------
    SpecError
        If the dataset cannot be used as the spec says, or leaves a doubt about what is to be learned.
    """
    dataset = dataset or load_dataset(spec.dataset, task=spec.task, inputs=spec.inputs)
    recipe = find_recipe(spec.recipe)
    if isinstance(recipe, Function):
        if spec.inputs == "standardised":
            raise SpecError(
                "inputs 'standardised' are not for recipe function, which is given inputs as they are; leave inputs "
                "out, and standardise within the function",
                field="inputs",
                value=spec.inputs,
            )
        dataset = unscaled_inputs(dataset)
    elif recipe.mean is not None and dataset.inputs_form == "standardised" and spec.inputs is None:
        # the recipe normalises pictures itself
        dataset = unscaled_inputs(dataset)
    return settled_as(spec, dataset.task, dataset.inputs_form, dataset.n_train), dataset


def settled_as(spec: RunSpec, task: str, inputs: str, n_train: int) -> RunSpec:
    """Return a spec with what is decided for a dataset of this task, form of inputs and size, where it is left open."""
    decided: dict[str, Any] = {"task": spec.task or task, "inputs": spec.inputs or inputs}
    recipe = find_recipe(spec.recipe)
    own = _hyperparameters(spec.recipe, task, inputs, n_train) if isinstance(recipe, Recipe) else {}
    if own:
        facts = spec.recipe.model_dump() | own
        decided["recipe"] = RecipeSpec(**facts)
    return spec.model_copy(update=decided)


def unsettled(spec: RunSpec, *, keep_task: bool) -> RunSpec:
    """Leave open again what a run's spec had its dataset decide, as far as it can be told from what was typed.

    Parameters
    ----------
    spec : RunSpec
        Of a run.
    keep_task : bool
        Whether the dataset is still the same, so that its task and outputs are.
    """
    given, settled = dict(spec.recipe.overrides), dict[str, Any]()
    if spec.task == "regression":
        settled |= _REGRESSION
    if spec.inputs == "standardised":
        settled["epochs"] = _MORE_EPOCHS
    own = {name: value for name, value in given.items() if name not in settled or settled[name] != value}
    open_again = {"inputs": None} if keep_task else {"task": None, "inputs": None}
    values = {name: value for name, value in spec.facts().items() if name not in open_again}
    if not keep_task:
        values.pop("outputs")
    return RunSpec(**(values | {"recipe": {"name": spec.recipe.name, "version": spec.recipe.version, **own}}))


def dataset_of_run(spec: RunSpec) -> Dataset:
    """Load the dataset of a run that is there, read as when the run was created.

    Raises
    ------
    SpecError
        If it cannot be used any more.
    """
    if spec.task is None and spec.inputs is None:
        return load_dataset(spec.dataset, as_before=True)
    return load_dataset(spec.dataset, task=spec.task, inputs=spec.inputs)


def _hyperparameters(recipe: RecipeSpec, task: str, inputs: str, n_train: int) -> dict[str, Any]:
    """List those that the user leaves out and that a table of this kind needs."""
    given, own = recipe.overrides, dict[str, Any]()
    if recipe.name not in _SMALL_RECIPES or recipe.version != 1:
        return own
    if task == "regression" and not given.keys() & {"lr", "momentum", "weight_decay"}:
        own |= _REGRESSION
    if inputs == "standardised" and n_train < _FEW_EXAMPLES and not given.keys() & {"epochs", "batch_size", "lr"}:
        own["epochs"] = _MORE_EPOCHS
    return own
