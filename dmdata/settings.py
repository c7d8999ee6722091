"""What a user set, and where: flag before environment before config file before default.

The file is ``config.yaml`` in ``DMDATA_HOME``: safe YAML, every key known, every value checked. It holds no secret:
credentials are found by boto3 and are nobody else's business.
"""

import functools
import math
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import platformdirs
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dmdata.errors import SettingsError

Usd = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_PREFIX = "DMDATA_"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PriceOverrides(_Record):
    """What differs from the list prices: see `dmdata.prices.PriceTable`. Give the day it was looked up as `date`."""

    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = None
    usd_per_get: Usd | None = None
    free_gib: Usd | None = None
    internet_tiers: tuple[tuple[float, Usd], ...] | None = None
    cross_region_usd_per_gib: tuple[Usd, Usd] | None = None

    @model_validator(mode="after")
    def _tiers_reach_all_amounts(self) -> Self:
        limits = [limit for limit, _ in self.internet_tiers or ((math.inf, 0.0),)]
        if limits != sorted(set(limits)) or limits[-1] != math.inf:
            raise ValueError("internet_tiers must rise and end with .inf, like [[10240, 0.09], [.inf, 0.05]]")
        low, high = self.cross_region_usd_per_gib or (0.0, 0.0)
        if low > high:
            raise ValueError("cross_region_usd_per_gib is the lowest price, then the highest")
        return self


class LinkOverrides(_Record):
    """How fast a connection to the store is, where it differs from what is assumed: see `dmdata.prices.Link`."""

    seconds_to_first_byte: Annotated[float, Field(ge=0)] | None = None
    bytes_per_second: Annotated[float, Field(gt=0)] | None = None
    n_connections: Annotated[int, Field(ge=1)] | None = None


class Settings(_Record):
    """All that can be set. Each has a variable ``DMDATA_NAME``, but for `prices` and `link`."""

    max_cost: Usd | None = Field(None, description="dollars a calendar month, over all that shares DMDATA_HOME")
    catalog: str | None = Field(None, description="catalog.yaml, a folder with one, or its URL")
    to: Literal["internet", "same-region", "cross-region"] = Field("internet", description="where bytes go")
    used_gib: Annotated[float, Field(ge=0)] = Field(0.0, description="GB the account sent to the internet this month")
    free_tier: bool = Field(False, description="whether the account's monthly free GB are unused but for used_gib")
    offline: bool = Field(False, description="whether to read nothing remote")
    prices: PriceOverrides = Field(PriceOverrides(), description="what differs from the list prices")
    link: LinkOverrides = Field(LinkOverrides(), description="how fast a connection to the store is")


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting in force, and where it comes from: a variable, the config file, or "default"."""

    name: str
    value: Any
    origin: str


def home() -> Path:
    """Find the directory of the ledger, the config file and what is remembered between processes (``DMDATA_HOME``)."""
    return Path(os.environ.get("DMDATA_HOME") or platformdirs.user_data_dir("dmdata"))


def config_path() -> Path:
    """Find the config file; it need not exist."""
    return home() / "config.yaml"


def settings() -> Settings:
    """Collect the settings in force.

    Raises
    ------
    SettingsError
        If a variable or the config file holds something else than a setting.
    """
    file, variables = _config_text(), _variables()
    return _combined(file, tuple(sorted(variables.items())), str(config_path()))


def settings_in_force() -> list[Setting]:
    """List all settings with where each comes from.

    Raises
    ------
    SettingsError
    """
    in_force = settings()
    file = _parsed(_config_text(), str(config_path()))
    variables = _variables()
    listed = []
    for name in Settings.model_fields:
        origin = "default"
        if name in variables:
            origin = f"{_PREFIX}{name.upper()}"
        elif name in file:
            origin = str(config_path())
        value = getattr(in_force, name)
        listed.append(
            Setting(name, value.model_dump(exclude_none=True) if isinstance(value, _Record) else value, origin)
        )
    return listed


def set_in_file(name: str, text: str | None) -> None:
    """Write one setting to the config file, beside and then into place; None takes it out.

    Parameters
    ----------
    name : str
        Of a setting, or of a part of one, as "prices.usd_per_get".
    text : str or None
        Its value as YAML.

    Raises
    ------
    SettingsError
        If there is no such setting or the value does not fit; nothing is written.
    """
    path = config_path()
    document = _parsed(_config_text(), str(path))
    *outer, last = name.split(".")
    place: dict[str, Any] = document
    for part in outer:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise _no_such(name)
    if text is None:
        place.pop(last, None)
    else:
        place[last] = _yaml(text, f"the value of {name}")
    _validated({key: value for key, value in document.items() if value != {}}, str(path))
    beside = path.with_suffix(f".{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(yaml.safe_dump(document, sort_keys=False))
        beside.replace(path)
    except OSError as error:
        raise SettingsError(f"{path} cannot be written ({error}); set DMDATA_HOME to a directory that can") from error


@functools.lru_cache(maxsize=8)
def _combined(file: str, variables: tuple[tuple[str, str], ...], origin: str) -> Settings:
    document = _parsed(file, origin)
    for name, text in variables:
        variable = f"{_PREFIX}{name.upper()}"
        _validated({name: text}, variable)
        document[name] = text
    return _validated(document, origin)


def _variables() -> dict[str, str]:
    simple = [name for name in Settings.model_fields if name not in ("prices", "link")]
    found = {name: os.environ.get(f"{_PREFIX}{name.upper()}", "") for name in simple}
    return {name: text for name, text in found.items() if text}


def _config_text() -> str:
    try:
        return config_path().read_text()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{config_path()} cannot be read ({error}); mend or remove it") from error


def _parsed(text: str, origin: str) -> dict[str, Any]:
    document = _yaml(text, origin)
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise SettingsError(f"{origin} is no list of settings; write it like 'max_cost: 5.00'", origin=origin)
    _validated(document, origin)
    return document


def _yaml(text: str, origin: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SettingsError(f"{origin} is no YAML ({error}); mend it, or see dmdata config", origin=origin) from error


def _validated(document: Mapping[str, Any], origin: str) -> Settings:
    try:
        return Settings.model_validate(document)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            raise _no_such(where, origin) from error
        raise SettingsError(
            f"{origin}: {where} is {fault['input']!r}, but {fault['msg'][0].lower()}{fault['msg'][1:]}; "
            f"see dmdata config",
            origin=origin,
        ) from error


def _no_such(name: str, origin: str = "") -> SettingsError:
    names = ", ".join(Settings.model_fields)
    return SettingsError(f"{origin or 'config'}: there is no setting {name}; choose {names}", origin=origin)
