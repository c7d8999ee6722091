"""The error trees are frozen: who catches one, and which code a shell sees, are promises."""

import copy
import dataclasses
import importlib
import inspect
import pickle
import re
from typing import Any

import pytest

from dmdata import errors
from dmdata.errors import FactualError, SourceError

MODULES = ("dmdata.errors", "dmpipeline.errors")
TREE = {
    "DmdataError": ("FactualError", 1),
    "CatalogError": ("DmdataError ValueError", 2),
    "SelectionError": ("DmdataError ValueError", 2),
    "FormatError": ("DmdataError ValueError", 1),
    "BudgetError": ("DmdataError", 8),
    "AccessError": ("DmdataError PermissionError", 4),
    "SourceError": ("DmdataError OSError", 5),
    "SettingsError": ("DmdataError ValueError", 2),
    "ObjectMissingError": ("SourceError FileNotFoundError", 1),
    "IntegrityError": ("DmdataError", 3),
    "DmpipelineError": ("FactualError", 1),
    "SpecError": ("DmpipelineError ValueError", 2),
    "UserCodeError": ("SpecError", 1),
    "RunError": ("DmpipelineError", 1),
    "IncompleteRunError": ("RunError", 1),
    "RunExistsError": ("RunError", 1),
    "SpecChangedError": ("RunError", 1),
    "TrainingError": ("DmpipelineError", 1),
    "ClusterError": ("DmpipelineError", 5),
    "VerificationError": ("DmpipelineError", 3),
    "ConvergenceError": ("DmpipelineError", 1),
}


def classes(module_name: str) -> dict[str, type[FactualError]]:
    module = importlib.import_module(module_name)
    found = inspect.getmembers(module, lambda item: inspect.isclass(item) and issubclass(item, FactualError))
    return {name: kind for name, kind in found if kind is not FactualError}


ALL = {name: kind for module in MODULES for name, kind in classes(module).items()}


def test_the_trees_are_these_with_these_exit_codes() -> None:
    found = {name: (" ".join(base.__name__ for base in kind.__bases__), kind.exit_code) for name, kind in ALL.items()}
    assert found == TREE


@pytest.mark.parametrize("module", MODULES)
def test_the_tree_drawn_in_the_docstring_is_the_tree(module: str) -> None:
    drawn = re.findall(r"(?:├──|└──) (\w+)(?: \((\w+)\))?", importlib.import_module(module).__doc__ or "")
    inner = [(name, kind) for name, kind in classes(module).items() if kind.__bases__ != (FactualError,)]
    builtin = {
        name: [base.__name__ for base in kind.__bases__ if base.__module__ == "builtins"] for name, kind in inner
    }
    assert {name: [base] if base else [] for name, base in drawn} == builtin


@pytest.mark.parametrize("kind", ALL.values(), ids=ALL)
def test_every_error_survives_pickling_and_copying_with_its_facts(kind: type[FactualError]) -> None:
    given: dict[str, Any] = {fact.name: [fact.name] for fact in dataclasses.fields(kind) if fact.name != "message"}
    error = kind("0.7 is too much; choose 0.5", **given)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is kind
        assert str(twin) == "0.7 is too much; choose 0.5"
        assert twin.facts == error.facts == given
        assert {name: getattr(twin, name) for name in given} == given
        assert twin.exit_code == error.exit_code


@pytest.mark.parametrize("kind", ALL.values(), ids=ALL)
def test_a_fact_that_an_error_does_not_declare_is_refused_at_once(kind: type[FactualError]) -> None:
    with pytest.raises(TypeError, match="colour"):
        kind("no", colour="red")


@pytest.mark.parametrize("kind", ALL.values(), ids=ALL)
def test_a_fact_that_was_not_given_has_its_default(kind: type[FactualError]) -> None:
    error = kind("no")
    assert (str(error), error.args, repr(error)) == ("no", ("no",), f"{kind.__name__}('no')")
    assert set(error.facts.values()) <= {True, False}
    assert not hasattr(error, "colour")


def test_a_failure_that_will_not_pass_by_itself_ends_a_command_with_another_code() -> None:
    assert (SourceError("down", transient=True).exit_code, SourceError("down").exit_code) == (5, 1)


def test_an_error_can_be_reworded_and_keeps_its_facts() -> None:
    error = SourceError("down", url="s3://x/y", transient=True).reworded("down; given up", n_tries=6)
    assert (str(error), error.url, error.n_tries, error.transient) == ("down; given up", "s3://x/y", 6, True)


def test_errors_are_caught_as_the_builtins_they_refine() -> None:
    assert issubclass(errors.ObjectMissingError, FileNotFoundError)
    with pytest.raises(OSError, match="down"):
        raise SourceError("down", url="s3://x/y")
