"""Every error that dmdata raises on purpose, grouped by what the catcher does next.

::

    DmdataError
    ├── CatalogError (ValueError)          choose another name: the catalog does not know this one
    ├── SelectionError (ValueError)        choose another selection
    ├── SettingsError (ValueError)         fix a variable or the config file
    ├── FormatError (ValueError)           the object is not what it says it is
    ├── BudgetError                        raise the budget or read less
    ├── AccessError (PermissionError)      fix credentials, permissions or requester pays
    ├── SourceError (OSError)              the transport failed: try again later
    │   └── ObjectMissingError (FileNotFoundError)   nothing is there: trying again will not help
    └── IntegrityError                     the bytes are not those of the object first seen

A message states the value, what was expected, and the remedy. The facts of an error are typed attributes; every error
pickles with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self, dataclass_transform


@dataclass_transform(kw_only_default=True, eq_default=False)
@dataclass(eq=False, repr=False)
class FactualError(Exception):
    """An error with facts that a program may act on; base of the trees of both packages.

    A subclass declares its facts as a dataclass declares its fields, each with a default. They are keywords of the
    constructor and attributes of the error, and survive pickling and copying.

    Parameters
    ----------
    message : str
        Value, expectation, remedy.
    frames : str, optional
        Where the user's own code failed, in lines of text.

    Attributes
    ----------
    exit_code : int
        With which a command ends after the error: 1 failed, 2 usage, 3 verification mismatch, 4 credentials or
        requester pays, 5 transient, 6 consent needed, 8 over the budget.
    """

    message: str
    frames: str | None = field(default=None, kw_only=True)
    exit_code = 1

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        dataclass(eq=False, repr=False, kw_only=True)(cls)

    def __post_init__(self) -> None:
        super().__init__(self.message)

    @property
    def facts(self) -> dict[str, Any]:
        """The facts that are known, by name."""
        values = {fact.name: getattr(self, fact.name) for fact in fields(self) if fact.name != "message"}
        return {name: value for name, value in values.items() if value is not None}

    def reworded(self, message: str, **facts: Any) -> Self:
        """Make the same error with another message, and with other facts where they are given."""
        return type(self)(message, **self.facts | facts)

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.facts)


def _rebuild(kind: type[FactualError], message: str, facts: dict[str, Any]) -> FactualError:
    return kind(message, **facts)


class DmdataError(FactualError):
    """Base of all errors of dmdata.

    Attributes
    ----------
    url : str or None
        The object or file that it is about.
    path : str or None
        A file of dmdata's own that it is about.
    cause : str or None
        Why, as one word.
    refused : bool
        Whether the store answered with an error instead of the object's bytes, so that none of those can be billed.
    unsent : bool
        Whether nothing reached the store, so that nothing can be billed.
    """

    url: str | None = None
    path: str | None = None
    cause: str | None = None
    refused: bool = False
    unsent: bool = False


class CatalogError(DmdataError, ValueError):
    """A name, alpha or column the catalog does not have; `nearest` lists valid ones, `origin` is a catalog's file."""

    name: str | None = None
    nearest: Sequence[str] | None = None
    origin: str | None = None
    exit_code = 2


class SelectionError(DmdataError, ValueError):
    """A selection that does not fit the array; `shape` is the array's, `size` that of the axis."""

    shape: tuple[int, ...] | None = None
    axis: int | None = None
    size: int | None = None
    exit_code = 2


class SettingsError(DmdataError, ValueError):
    """A setting that is unknown or has no sensible value; `origin` is the variable or file it comes from."""

    name: str | None = None
    origin: str | None = None
    exit_code = 2


class FormatError(DmdataError, ValueError):
    """An object that is damaged, lies about itself, or holds what is not read for safety; `url` names it."""

    promised_bytes: int | None = None
    object_bytes: int | None = None


class BudgetError(DmdataError):
    """A read that would exceed a budget, refused before any byte; amounts in dollars."""

    usd: float | None = None
    remaining_usd: float | None = None
    limit_usd: float | None = None
    artifact: str | None = None
    origin: str | None = None
    exit_code = 8


class AccessError(DmdataError, PermissionError):
    """The source refused; `code` is the one it answered with.

    `cause` is one of no_credentials, bad_credentials, configuration, requester_pays, not_in_release, denied, account,
    clock, read_only.
    """

    code: str | None = None
    exit_code = 4


class SourceError(DmdataError, OSError):
    """The transport failed.

    Attributes
    ----------
    transient : bool
        Whether trying again may help by itself.
    code : str or None
        The one that the store answered with.
    n_tries : int or None
        After which it was given up.
    silent : bool
        Whether the server never answered.
    whole : bool
        Whether the server began to send the whole object where a range was due.
    by_download : bool
        Whether the object cannot be read by ranges, but can be downloaded as a whole.
    """

    transient: bool = False
    code: str | None = None
    n_tries: int | None = None
    silent: bool = False
    whole: bool = False
    by_download: bool = False
    exit_code = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.transient:
            self.exit_code = 1


class ObjectMissingError(SourceError, FileNotFoundError):
    """No object has this key or path; `url`."""

    exit_code = 1


class IntegrityError(DmdataError):
    """The object changed between two reads, or bytes differ from their digest; `url`."""

    exit_code = 3
