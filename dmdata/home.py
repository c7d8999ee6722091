"""Where dmdata keeps what lasts between processes: the ledger, the config file and the cache."""

import functools
import os
from pathlib import Path

import platformdirs

from dmdata.errors import SettingsError


def home() -> Path:
    """Find the directory of the ledger, the config file and the cache (``DMDATA_HOME``).

    It is one place whatever the working directory: ``~`` is the user's home directory, and a relative path is taken
    from there.
    """
    text = os.environ.get("DMDATA_HOME") or platformdirs.user_data_dir("dmdata")
    return _absolute(text, os.environ.get("HOME"))


def config_path() -> Path:
    """Find the config file; it need not exist."""
    return home() / "config.yaml"


@functools.lru_cache(maxsize=8)
def _absolute(text: str, user_home: str | None) -> Path:
    del user_home  # which `~` stands for
    try:
        path = Path(text).expanduser()
        return Path(os.path.normpath(path if path.is_absolute() else Path.home() / path))
    except RuntimeError as error:
        raise SettingsError(
            f"DMDATA_HOME={text} cannot be found ({error}); give an absolute path", origin="DMDATA_HOME"
        ) from error
