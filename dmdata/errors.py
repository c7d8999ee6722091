"""Every error that dmdata raises on purpose, grouped by what the catcher does next.

::

    DmdataError
    ├── CatalogError (ValueError)          choose another name: the catalog does not know this one
    ├── SelectionError (ValueError)        choose another selection
    ├── SettingsError (ValueError)         mend a variable or the config file
    ├── FormatError (ValueError)           the object is not what it says it is
    ├── BudgetError                        raise the budget or read less
    ├── AccessError (PermissionError)      mend credentials, permissions or requester pays
    ├── SourceError (OSError)              the transport failed: try again later
    │   └── ObjectMissingError (FileNotFoundError)   nothing is there: trying again will not help
    └── IntegrityError                     the bytes are not those of the object first seen

A message says the value, what was expected, and the remedy. The facts ride as attributes, and every error pickles with
them.
"""

from typing import Any, Self


class FactualError(Exception):
    """An error whose facts ride as attributes and survive pickling; base of the trees of both packages.

    Parameters
    ----------
    message : str
        Value, expectation, remedy.
    **facts
        Become attributes: numbers and names a program may want to act on.

    Attributes
    ----------
    exit_code : int
        What a command that ends with the error tells its shell: 1 failed, 2 usage, 3 verification mismatch,
        4 credentials or requester pays, 5 transient, 6 consent needed, 8 over the budget.
    """

    exit_code = 1

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts

    def __getattr__(self, name: str) -> Any:
        facts = self.__dict__.get("facts", {})
        if name in facts:
            return facts[name]
        raise AttributeError(name)

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, tuple[type[Self], str, dict[str, Any]]]:
        return _rebuild, (type(self), self.message, self.facts)


def _rebuild(kind: type[FactualError], message: str, facts: dict[str, Any]) -> FactualError:
    return kind(message, **facts)


class DmdataError(FactualError):
    """Base of all errors of dmdata."""


class CatalogError(DmdataError, ValueError):
    """A name, alpha or column the catalog does not have; `nearest` lists valid ones."""

    exit_code = 2


class SelectionError(DmdataError, ValueError):
    """A selection that does not fit the array; `shape` is the array's."""

    exit_code = 2


class SettingsError(DmdataError, ValueError):
    """A setting that is unknown or has no sensible value; `origin` is the variable or file it comes from."""

    exit_code = 2


class FormatError(DmdataError, ValueError):
    """An object that is damaged, lies about itself, or holds what is not read for safety; `url` names it."""


class BudgetError(DmdataError):
    """A read that would pass a budget, refused before any byte; `usd`, `remaining_usd` and `limit_usd`."""

    exit_code = 8


class AccessError(DmdataError, PermissionError):
    """The source refused.

    `cause` is one of no_credentials, bad_credentials, configuration, requester_pays, not_in_release, denied, account,
    clock, read_only.
    """

    exit_code = 4


class SourceError(DmdataError, OSError):
    """The transport failed; `url`, `cause`, `n_tries`, and `transient`: whether trying again may help by itself."""

    exit_code = 5

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message, **facts)
        if facts.get("transient") is False:
            self.exit_code = 1


class ObjectMissingError(SourceError, FileNotFoundError):
    """No object has this key or path; `url`."""

    exit_code = 1


class IntegrityError(DmdataError):
    """The object changed between two reads, or bytes differ from their digest; `url`."""

    exit_code = 3
