"""The error trees are frozen: who catches one, and which code a shell sees, are promises."""

import copy
import importlib
import inspect
import pickle
import re

import pytest

from dmdata import errors
from dmdata.errors import DmdataError, FactualError, SourceError

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
    error = kind("0.7 is too much; choose 0.5", limit_usd=0.5, names=["a", "b"])
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is kind
        assert str(twin) == "0.7 is too much; choose 0.5"
        assert twin.limit_usd == 0.5
        assert twin.names == ["a", "b"]
        assert twin.facts == error.facts


def test_a_fact_that_was_not_given_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="usd"):
        _ = DmdataError("no").usd


def test_errors_are_caught_as_the_builtins_they_refine() -> None:
    assert issubclass(errors.ObjectMissingError, FileNotFoundError)
    with pytest.raises(OSError, match="down"):
        raise SourceError("down", url="s3://x/y")
