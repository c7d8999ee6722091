"""What a user set, and where: flag before environment before config file before default.

The file is ``config.yaml`` in ``DMDATA_HOME``: safe YAML, every key known, every value checked. Credentials are found
by boto3 and have no place in it; what a catalog's URL may hold of them is left out of all that is shown, and no error
quotes the file.
"""

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit, urlunsplit

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dmdata.atomic import write_whole
from dmdata.errors import SettingsError
from dmdata.home import config_path


def _no_yes(value: Any) -> Any:
    """Refuse YAML's yes and no where a number is meant: they would count as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("it is yes or no and should be a number")
    return value


def _day(value: Any) -> Any:
    """Take a day as YAML reads it, without quotes."""
    return value.isoformat() if isinstance(value, date) else value


def _is_day(text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise ValueError("it should be a day, as year-month-day") from None


Amount = Annotated[float, BeforeValidator(_no_yes), Field(ge=0, allow_inf_nan=False)]
Limit = Annotated[float, BeforeValidator(_no_yes), Field(gt=0)]
Day = Annotated[str, AfterValidator(_is_day), BeforeValidator(_day)]

_PREFIX = "DMDATA_"
_TIERS_EXAMPLE = "[[10240, 0.09], [.inf, 0.085]]"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PriceOverrides(_Record):
    """What differs from the list prices, see `dmdata.money.prices.PriceTable`; `date` is the day it was looked up."""

    date: Day | None = Field(default=None, examples=["2027-01-31"])
    usd_per_get: Amount | None = Field(default=None, examples=["0.0000004"])
    usd_per_list: Amount | None = Field(default=None, examples=["0.000005"])
    free_gib: Amount | None = Field(default=None, examples=["100"])
    internet_tiers: tuple[tuple[Limit, Amount], ...] | None = Field(
        default=None, min_length=1, examples=[_TIERS_EXAMPLE]
    )
    cross_region_usd_per_gib: tuple[Amount, Amount] | None = Field(default=None, examples=["[0.01, 0.02]"])

    @model_validator(mode="after")
    def _bounds_hold(self) -> Self:
        limits, prices = zip(*(self.internet_tiers or ((math.inf, 0.0),)), strict=True)
        if list(limits) != sorted(set(limits)) or limits[-1] != math.inf:
            raise ValueError(f"internet_tiers must rise and end with .inf, like {_TIERS_EXAMPLE}")
        # the first tier is taken for the most expensive wherever an upper bound is named
        if list(prices) != sorted(prices, reverse=True):
            raise ValueError("the prices of internet_tiers must not rise with use; GB that are free go into free_gib")
        low, high = self.cross_region_usd_per_gib or (0.0, 0.0)
        if low > high:
            raise ValueError("cross_region_usd_per_gib is the lowest price, then the highest")
        return self


class LinkOverrides(_Record):
    """How fast a connection to the store is, where it differs from what is assumed: see `dmdata.money.prices.Link`."""

    seconds_to_first_byte: Annotated[Amount, Field(le=3600)] | None = Field(default=None, examples=["0.03"])
    bytes_per_second: Annotated[Amount, Field(ge=1, le=1e15)] | None = Field(default=None, examples=["50e6"])
    n_connections: Annotated[int, BeforeValidator(_no_yes), Field(ge=1, le=10_000)] | None = Field(
        default=None, examples=["32"]
    )


class Settings(_Record):
    """All that can be set. Each has a variable ``DMDATA_NAME``, but for those with parts."""

    max_cost: Amount | None = Field(
        default=None, description="dollars a calendar month, over all that shares DMDATA_HOME", examples=["5.00"]
    )
    catalog: str | None = Field(
        default=None,
        description="catalog.yaml, a folder with one, a mirror, or a URL",
        examples=["/data/run/catalog.yaml"],
    )
    to: Literal["internet", "same-region", "cross-region"] = Field(
        default="internet", description="where bytes go", examples=["same-region"]
    )
    used_gib: Amount | None = Field(
        default=None, description="GB the account sent to the internet this month", examples=["120"]
    )
    free_tier: bool = Field(
        default=False,
        description="whether the account's monthly free GB are unused but for used_gib",
        examples=["true"],
    )
    cache_gib: Amount = Field(
        default=10.0,
        description="limit of the cache of paid reads, in GB; 0 keeps nothing",
        examples=["50"],
    )
    offline: bool = Field(default=False, description="whether to read nothing remote", examples=["true"])
    local_mirrors: bool = Field(
        default=True,
        description="whether names of what is mirrored whole on this machine open the mirror",
        examples=["false"],
    )
    progress: bool = Field(
        default=True, description="whether to show progress bars of what takes long", examples=["false"]
    )
    progress_seconds: Annotated[Limit, Field(ge=0.1, allow_inf_nan=False)] = Field(
        default=60.0,
        description="seconds between two lines of a command's progress where there is no terminal",
        examples=["300"],
    )
    prices: PriceOverrides = Field(
        default=PriceOverrides(),
        description="what differs from the list prices",
        examples=["{usd_per_get: 0.0000004, free_gib: 100}"],
    )
    endpoint_prices: PriceOverrides = Field(
        default=PriceOverrides(),
        description="prices of S3 endpoints of your own, which are free unless set here",
        examples=["{usd_per_get: 0.0000004}"],
    )
    link: LinkOverrides = Field(
        default=LinkOverrides(),
        description="how fast a connection to the store is",
        examples=["{bytes_per_second: 50e6}"],
    )

    @property
    def cache_bytes(self) -> int:
        """Bound on what paid reads keep, in bytes."""
        return int(self.cache_gib * 2**30)


_WITH_PARTS = ("prices", "endpoint_prices", "link")
_SIMPLE = {name: f"{_PREFIX}{name.upper()}" for name in Settings.model_fields if name not in _WITH_PARTS}


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting in force as it may be shown, and where it comes from: a variable, the config file, or "default"."""

    name: str
    value: Any
    origin: str


def settings() -> Settings:
    """Collect the settings in force.

    Raises
    ------
    SettingsError
        If a variable or the config file holds something other than a setting.
    """
    # the file is read each time, since others may have changed it; its text is checked once
    return _combined(_config_text(), tuple(_variables().items()), str(config_path()))


def settings_in_force() -> list[Setting]:
    """List all settings with where each comes from; a catalog's URL without user, password and query.

    Raises
    ------
    SettingsError
    """
    in_force = settings()
    file = _document(_config_text(), str(config_path()))
    variables = _variables()
    listed = []
    for name in Settings.model_fields:
        origin = "default"
        if name in variables:
            origin = _SIMPLE[name]
        elif name in file:
            origin = str(config_path())
        value = getattr(in_force, name)
        if isinstance(value, _Record):
            value = value.model_dump(exclude_none=True)
        elif name == "catalog" and value is not None:
            value = _without_secrets(value)
        listed.append(Setting(name, value, origin))
    return listed


def names_of_settings() -> list[str]:
    """List the names that can be set, parts such as "prices.usd_per_get" in place of what they are parts of."""
    names = []
    for name, field in Settings.model_fields.items():
        parts = getattr(field.annotation, "model_fields", None)
        names += [f"{name}.{part}" for part in parts] if parts else [name]
    return names


def setting_in_force(name: str) -> Setting:
    """Find one setting, or a part of one, with where it comes from; its value is None where it is not set.

    Raises
    ------
    SettingsError
        If there is no such setting.
    """
    if not _is_known(name):
        raise _no_such(name)
    whole, *parts = name.split(".")
    found = next(setting for setting in settings_in_force() if setting.name == whole)
    for part in parts:
        value = found.value.get(part)
        found = Setting(name, value, "default" if value is None else found.origin)
    return found


def set_in_file(name: str, text: str | None) -> None:
    """Write one setting to the config file, whole or not at all; None takes it out. Comments are not kept.

    Parameters
    ----------
    name : str
        Of a setting, or of a part of one, as "prices.usd_per_get". What is in the file by mistake can be taken out.
    text : str or None
        Its value as YAML.

    Raises
    ------
    SettingsError
        If there is no such setting or the value does not fit; nothing is written.
    """
    path = config_path()
    document = _document(_config_text(), str(path))
    *outer, last = name.split(".")
    place: Any = document
    for part in outer:
        place = place.setdefault(part, {}) if isinstance(place, dict) else None
    if text is None:
        if not isinstance(place, dict) or (last not in place and not _is_known(name)):
            raise _no_such(name)
        place.pop(last, None)
    else:
        if not isinstance(place, dict) or not _is_known(name):
            raise _no_such(name)
        place[last] = _yaml(text, f"the value of {name}")
        # the rest may have faults of its own, which are fixed one after the other
        _validated({name.split(".")[0]: document[name.split(".")[0]]}, str(path))
    _replace_file(path, yaml.safe_dump({key: value for key, value in document.items() if value != {}}, sort_keys=False))


def _replace_file(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise SettingsError(f"{path} cannot be written ({error}); set DMDATA_HOME to a directory that can") from error


@functools.lru_cache(maxsize=8)
def _combined(file: str, variables: tuple[tuple[str, str], ...], origin: str) -> Settings:
    document = _document(file, origin)
    _validated(document, origin)
    for name, text in variables:
        _validated({name: text}, _SIMPLE[name])
    return _validated(document | dict(variables), origin)


def _variables() -> dict[str, str]:
    return {name: text for name, variable in _SIMPLE.items() if (text := os.environ.get(variable))}


def _config_text() -> str:
    try:
        return config_path().read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{config_path()} cannot be read ({error}); fix or remove it") from error


def _document(text: str, origin: str) -> dict[str, Any]:
    document = _yaml(text, origin)
    if document is None:
        return {}
    if not isinstance(document, dict) or not all(isinstance(name, str) for name in document):
        raise SettingsError(f"{origin} is not a list of settings; write it like 'max_cost: 5.00'", origin=origin)
    return document


def _yaml(text: str, origin: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise SettingsError(
            f"{origin} is not valid YAML{where}; fix it: one setting a line, like 'max_cost: 5.00'",
            origin=origin,
        ) from None  # YAML's own words quote the file


def _validated(document: Mapping[str, Any], origin: str) -> Settings:
    try:
        return Settings.model_validate(document)
    except ValidationError as error:
        fault = error.errors()[0]
        if fault["type"] in ("extra_forbidden", "invalid_key"):
            raise _no_such(".".join(str(part) for part in fault["loc"]), origin) from None
        # numbers count inside a list of tiers
        name = ".".join(part for part in fault["loc"] if isinstance(part, str))
        value = fault["input"]
        shown = f" is {value!r}, but" if isinstance(value, str | int | float) and name != "catalog" else ":"
        message = str(fault["ctx"]["error"]) if fault["type"] == "value_error" else fault["msg"]
        example = _field(name).examples[0]
        if origin.startswith(_PREFIX):
            remedy = f"{origin}={example}"
        else:
            remedy = (
                f'dmdata config set {name} "{example}"' if " " in example else f"dmdata config set {name} {example}"
            )
        raise SettingsError(
            f"{origin}: {name}{shown} {message[0].lower()}{message[1:]}; set it like {remedy}", origin=origin, name=name
        ) from None  # pydantic's own words quote the file


def _field(name: str) -> Any:
    """Find the field of a setting, or of a part of one; None where there is none."""
    model: Any = Settings
    field = None
    for part in name.split("."):
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, _Record) else None
        if field is None:
            return None
        model = field.annotation
    return field


def _is_known(name: str) -> bool:
    return _field(name) is not None


def _no_such(name: str, origin: str = "") -> SettingsError:
    *outer, _ = name.split(".")
    field = _field(".".join(outer)) if outer else None
    parts = getattr(field.annotation, "model_fields", None) if field else None
    choices = [".".join([*outer, part]) for part in parts] if parts else list(Settings.model_fields)
    remedy = f", or take it out: dmdata config unset {name}" if origin == str(config_path()) else ""
    return SettingsError(
        f"{origin or 'config'}: there is no setting {name}; choose {', '.join(choices)}{remedy}", origin=origin
    )


def _without_secrets(catalog: str) -> str:
    if "://" not in catalog:
        return catalog
    parts = urlsplit(catalog)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
