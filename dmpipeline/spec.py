"""The description of a run, as people write it in run.yaml.

A spec says which models are trained: on which dataset, on subsets of what size, how many, and by which recipe.
Everything random follows from its `seed`, so two runs of one spec hold the same rows. What can be checked without the
dataset is checked here, and a value that cannot be used is a `SpecError` that names the field, the value and what to
write instead.

Rows are models. Those a datamodel is fitted on come first; the held-out ones follow, the retrainings of one subset
adjacent. The numbers that draws are made from do not depend on `n_models`: a longer run of the same seed begins with
the same models and has the same held-out ones.
"""

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from dmpipeline.errors import SpecError

# Held-out subsets and models draw from numbers of their own, so that adding models leaves them as they are.
HELD_OUT_BASE = 2**32

DATASET_NAMES = ("digits",)
"""Datasets that need no path."""

DATASET_FORMS = ("cifar10", "fmow")
"""Public datasets in their own files, whose folder follows a colon."""


OutputName = Literal["margins", "logits", "log_likelihoods", "predicted_labels", "predictions", "squared_errors"]
"""What can be stored of models; see `outputs`."""

MASK_LAWS = ("exact", "bernoulli")
"""How subsets can be drawn: of exactly the same size, or each example by itself."""

GIVEN = "given"
"""What names of artifacts call subsets that were given, not drawn by an alpha."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the two kinds of rows lie: `models`, to fit on, and `held_out`, to score with; half-open slices."""

    models: slice
    held_out: slice


class HeldOutSpec(BaseModel):
    """Models kept for scoring: `n_subsets` subsets, each trained `n_retrainings` times."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    n_subsets: int = Field(
        default=100, ge=0, lt=HELD_OUT_BASE, description="a count of subsets, 0 or more", examples=[100]
    )
    n_retrainings: int = Field(
        default=10, ge=1, lt=2**16, description="a count of trainings a subset, from 1", examples=[10]
    )


_DEFAULT_VERSIONS = {"function": 2}


class RecipeSpec(BaseModel):
    """A recipe's name, version and whichever hyperparameters are to differ; for `recipes.find_recipe`.

    Where no version is given, the newest is meant; `model_fields_set` tells whether one was.
    """

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    name: str = Field(default="perceptron", description="a recipe's name", examples=["perceptron"])
    version: int = Field(default=1, ge=1, description="a recipe's version, from 1", examples=[1])

    @model_validator(mode="after")
    def _newest_version(self) -> Self:
        if "version" not in self.model_fields_set:
            # a frozen model is still being made here
            self.__dict__["version"] = _DEFAULT_VERSIONS.get(self.name, 1)
        return self

    @property
    def overrides(self) -> dict[str, Any]:
        """Hyperparameters given in addition to the name and version."""
        return dict(self.model_extra or {})


class RunSpec(BaseModel):
    """What a run trains; frozen, compared by value, read from and written to run.yaml.

    Raises
    ------
    SpecError
        On construction, when a field is unknown or its value cannot be used; `field` and `value` say which.

    Examples
    --------
    >>> spec = RunSpec(n_models=40, held_out={"n_subsets": 3, "n_retrainings": 2})
    >>> spec.n_rows, spec.alpha_name, spec.rows.held_out
    (46, '50pct', slice(40, 46, None))
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = Field(default=1, description="the version of this file's form, 1", examples=[1])
    dataset: str = Field(
        default="digits",
        min_length=1,
        description="a dataset: digits, cifar10:PATH, fmow:PATH, or the path of an .npz file or a folder",
        examples=["digits"],
    )
    task: Literal["classification", "regression", "tokens"] | None = Field(
        default=None,
        description="classification, regression or tokens; left out, what the labels leave no doubt of",
        examples=["classification"],
    )
    inputs: Literal["standardised", "as-is", "tokens"] | None = Field(
        default=None,
        description="standardised, as-is, or tokens where whole numbers number words; left out, what suits the dataset",
        examples=["standardised"],
    )
    alpha: float = Field(
        default=0.5,
        ge=0.01,
        le=0.99,
        description="a share of the training examples in whole percents, from 0.01 to 0.99",
        examples=[0.5],
    )
    masks: str = Field(
        default="exact",
        min_length=1,
        description="exact, bernoulli, or the path of an .npy file with a mask for each subset",
        examples=["exact"],
    )
    n_models: int = Field(
        default=4000, ge=0, lt=HELD_OUT_BASE, description="a count of models to fit on, 0 or more", examples=[4000]
    )
    held_out: HeldOutSpec = Field(
        default=HeldOutSpec(),
        description="a mapping of n_subsets and n_retrainings that leaves something to train",
        examples=[{"n_subsets": 100}],
    )
    recipe: RecipeSpec = Field(
        default=RecipeSpec(),
        description="a mapping of name, version and hyperparameters that differ",
        examples=[{"name": "perceptron", "version": 1}],
    )
    outputs: tuple[str, ...] = Field(
        default=("margins", "logits"),
        min_length=1,
        description=f"a list of {', '.join(get_args(OutputName))}, of both parts or with test_ or train_ before them",
        examples=[["margins", "logits"]],
    )
    seed: int = Field(default=0, ge=0, lt=2**64, description="an integer from 0 to 2**64 - 1", examples=[0])
    block_models: int = Field(
        default=250, ge=1, description="a count of models trained and stored together", examples=[250]
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise spec_error(error, type(self)) from error

    @field_validator("alpha")
    @classmethod
    def _whole_percent(cls, alpha: float) -> float:
        if abs(alpha * 100 - round(alpha * 100)) > 1e-9:
            raise ValueError("not a whole percentage")
        return round(alpha * 100) / 100

    @field_validator("masks")
    @classmethod
    def _known_law(cls, masks: str) -> str:
        if masks not in MASK_LAWS and not masks.endswith(".npy"):
            raise ValueError("neither a law nor a file")
        return masks

    @field_validator("outputs", mode="before")
    @classmethod
    def _known_outputs(cls, outputs: Any) -> Any:
        if not isinstance(outputs, list | tuple) or not all(
            isinstance(name, str) and re.sub("^(test|train)_", "", name) in get_args(OutputName) for name in outputs
        ):
            raise ValueError("not a list of outputs")
        return tuple(dict.fromkeys(outputs))

    @field_validator("held_out")
    @classmethod
    def _trains_something(cls, held_out: HeldOutSpec, info: ValidationInfo) -> HeldOutSpec:
        if not held_out.n_subsets and info.data.get("n_models") == 0:
            raise ValueError("nothing to train")
        return held_out

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a spec from a YAML file; a dataset's relative path is taken from the file's folder.

        Raises
        ------
        SpecError
            If the file is missing, is not a YAML mapping, or holds what a spec cannot.
        """
        path = Path(path)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise SpecError(
                f"{path} cannot be read ({error.strerror}); write one with `dmpipeline init DIRECTORY`"
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise SpecError(f"{path} is not YAML: {error}; write one with `dmpipeline init DIRECTORY`") from error
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise SpecError(f"{path} holds no mapping of fields to values; write one with `dmpipeline init DIRECTORY`")
        return cls(**values).located(path.parent)

    def located(self, folder: str | Path) -> Self:
        """Return the spec with the paths of its dataset and masks, if there are any, made absolute from `folder`.

        A bare word is a path where it ends in .npz or a folder of that name is there; `digits` never is one.
        """
        if self.masks not in MASK_LAWS:
            masks = str((Path(folder) / Path(self.masks).expanduser()).resolve())
            self = self.model_copy(update={"masks": masks})
        form, place = split_dataset(self.dataset)
        if form in DATASET_NAMES or not place:
            return self
        path = Path(folder) / Path(place).expanduser()
        is_path = place.endswith(".npz") or ("/" in place and ":" not in place)
        if form is None and not is_path and not path.is_dir():
            return self
        located = f"{form}:{path.resolve()}" if form else str(path.resolve())
        return self.model_copy(update={"dataset": located})

    def with_version_of(self, other: Self) -> Self:
        """Return the spec with the version that `other` has of the same recipe, unless this one was given its own."""
        if "version" in self.recipe.model_fields_set or self.recipe.name != other.recipe.name:
            return self
        recipe = self.recipe.model_copy()
        recipe.__dict__["version"] = other.recipe.version
        return self.model_copy(update={"recipe": recipe})

    def to_yaml(self) -> str:
        """Return the text of a run.yaml that reads back as this spec, every default spelled out."""
        return yaml.safe_dump(self.facts(), sort_keys=False)

    def facts(self) -> dict[str, Any]:
        """Return all fields as JSON has them, without what is left to the dataset to decide."""
        undecided = {name for name in ("task", "inputs") if getattr(self, name) is None}
        return self.model_dump(mode="json", exclude=undecided)

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the arrays that are stored, in the order in which a block's digest covers them."""
        names = ["train_masks"]
        for output in self.outputs:
            names += [output] if output.startswith(("test_", "train_")) else [f"test_{output}", f"train_{output}"]
        return tuple(dict.fromkeys(names))

    @property
    def alpha_name(self) -> str:
        """How names of artifacts spell the subsets: alpha, as `50pct`, or `given` for masks of one's own."""
        return self.share_name if self.masks in MASK_LAWS else GIVEN

    @property
    def share_name(self) -> str:
        """How alpha alone is spelled, as `50pct`."""
        return f"{round(self.alpha * 100)}pct"

    @property
    def n_rows(self) -> int:
        """Count of models trained in total, held-out ones included."""
        return self.n_models + self.held_out.n_subsets * self.held_out.n_retrainings

    @property
    def rows(self) -> Rows:
        """Where models to fit on and held-out models lie."""
        return Rows(models=slice(0, self.n_models), held_out=slice(self.n_models, self.n_rows))

    @property
    def blocks(self) -> tuple[range, ...]:
        """Rows of each block, in order; the last may be shorter."""
        step = self.block_models
        return tuple(range(start, min(start + step, self.n_rows)) for start in range(0, self.n_rows, step))

    def subset_indices(self, rows: Iterable[int]) -> npt.NDArray[np.uint64]:
        """Return the number of the subset each row is trained on: equal for the retrainings of one held-out subset.

        Parameters
        ----------
        rows : iterable of int, length n

        Returns
        -------
        subset_indices : array of uint64, shape (n,)
        """
        numbers = self.model_indices(rows)
        held_out = numbers >= HELD_OUT_BASE
        numbers[held_out] = HELD_OUT_BASE + (numbers[held_out] - HELD_OUT_BASE) // self.held_out.n_retrainings
        return numbers

    def model_indices(self, rows: Iterable[int]) -> npt.NDArray[np.uint64]:
        """Return the number that each row's initialisation and order are drawn from; no two rows share one.

        Parameters
        ----------
        rows : iterable of int, length n

        Returns
        -------
        model_indices : array of uint64, shape (n,)
        """
        numbers = np.fromiter(rows, np.uint64)
        return np.where(numbers < self.n_models, numbers, numbers + np.uint64(HELD_OUT_BASE - self.n_models))


_MOST_SAID = 80
"""Characters of a refused value that are repeated in the error."""


def spec_error(error: ValidationError, model: type[BaseModel], *, within: str = "") -> SpecError:
    """Say in a `SpecError` what pydantic refused: field, value, and what to write instead.

    Parameters
    ----------
    error : pydantic.ValidationError
    model : type of pydantic.BaseModel
        The model that refused; its fields' descriptions and examples word the remedy.
    within : str
        Put before each field's name, as `recipe.`.

    Returns
    -------
    SpecError
        With the first offending `field` and its `value` as facts.
    """
    details = error.errors(include_url=False, include_context=False)
    first = details[0]
    return SpecError(
        "; ".join(_refusal(detail["type"], detail["loc"], detail["input"], model, within) for detail in details),
        field=within + ".".join(map(str, first["loc"])),
        value=first["input"],
    )


def split_dataset(dataset: str) -> tuple[str | None, str]:
    """Split a spec's `dataset` into a name or form that is known and the path behind it.

    Returns
    -------
    form : str or None
        One of `DATASET_NAMES` or `DATASET_FORMS`; None where the whole is a path, or a mistake.
    place : str
        The path, perhaps empty.

    Examples
    --------
    >>> split_dataset("cifar10:/data"), split_dataset("letters.npz"), split_dataset("digits")
    (('cifar10', '/data'), (None, 'letters.npz'), ('digits', ''))
    """
    if dataset in DATASET_NAMES:
        return dataset, ""
    form, colon, place = dataset.partition(":")
    return (form, place) if colon and form in DATASET_FORMS else (None, dataset)


def nearest_name(wrong: str, valid: Iterable[str]) -> str:
    """Name the valid names to choose from: the nearest one where there is one, else all of them."""
    names = sorted(valid)
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)
    return near[0] if near else ", ".join(names)


def _refusal(kind: str, location: tuple[int | str, ...], value: Any, model: type[BaseModel], within: str) -> str:
    """Word one refusal, finding the model that owns the field by walking down its location."""
    name = within + ".".join(map(str, location))
    for part in location[:-1]:
        owner = model.model_fields[str(part)].annotation
        if isinstance(owner, type) and issubclass(owner, BaseModel):
            model = owner
    last = str(location[-1])
    if kind == "extra_forbidden" or last not in model.model_fields:
        return f"{name} is not a field; choose {nearest_name(last, model.model_fields)}"
    field = model.model_fields[last]
    example = field.examples[0] if field.examples else field.default
    said = " ".join(repr(value).split())
    said = said if len(said) <= _MOST_SAID else f"{said[:_MOST_SAID]}..."
    own = "; arrays of your own are written by dmpipeline.save_dataset first" if last == "dataset" else ""
    return f"{name} {said} is not {field.description}{own}; write for example {last}: {example}"


def relative_places(path: Path, spec: RunSpec) -> dict[str, str]:
    """State for the provenance of the run at `path` where its dataset and masks are, seen from there."""
    places = {"dataset": dataset_path(spec), "masks": masks_path(spec)}
    return {name: os.path.relpath(place, path.resolve()) for name, place in places.items() if place is not None}


def dataset_path(spec: RunSpec) -> Path | None:
    """Return the path of a spec's dataset; None where it has none, as digits."""
    form, place = split_dataset(spec.dataset)
    is_path = bool(place) and (form is not None or os.path.isabs(place))
    return Path(place) if is_path else None


def masks_path(spec: RunSpec) -> Path | None:
    """Return the path of the masks that were given; None where they are drawn."""
    return None if spec.masks in MASK_LAWS else Path(spec.masks)
