"""One process at a time on a destination: a lock that ends with its process, kept away from the destination itself."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import filelock

from dmdata.errors import DmdataError
from dmdata.money.ledger import home


@contextlib.contextmanager
def only_process_at(path: Path | str) -> Iterator[None]:
    """Hold a destination, a path or an address, while the block runs; who shares ``DMDATA_HOME`` is kept out.

    Raises
    ------
    DmdataError
        If another process, or another thread of this one, holds it.
    """
    name = hashlib.sha256(str(path.absolute() if isinstance(path, Path) else path).encode()).hexdigest()
    lock = filelock.FileLock(home() / "locks" / f"{name}.lock", timeout=0)
    try:
        (home() / "locks").mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout as error:
        raise DmdataError(f"another process is writing {path}; wait for it, or choose another destination") from error
    except OSError as error:
        raise DmdataError(f"{home()} cannot be written ({error}); set DMDATA_HOME to a directory that can") from error
    try:
        yield
    finally:
        lock.release()
