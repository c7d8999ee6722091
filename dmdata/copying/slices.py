"""Part of an array saved as a ``.npy``: resumable, and under its final name only when complete.

Ranges are kept in ``NAME.part.bytes`` and ``NAME.part.ranges`` as they land; the same command, run again, fetches and
pays only for the others. All of the selection is in memory once; a mirror is not.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dmdata.atomic import replacing
from dmdata.copying.mirror import Readable
from dmdata.copying.spool import Landing, read_key
from dmdata.errors import DmdataError
from dmdata.layout.selection import Selection
from dmdata.reading.locks import only_process_at


def save_slice(
    array: Readable, selection: Selection, path: Path, *, progress: Callable[[int], object] | None = None
) -> str:
    """Read a selection and save it.

    Parameters
    ----------
    array : Readable
    selection : Selection
    path : Path
        Final name; nothing is there before the file is complete.
    progress : callable, optional
        Called with bytes as they arrive.

    Returns
    -------
    sha256 : str
        Of the file.

    Raises
    ------
    BudgetError, AccessError, ObjectMissingError, SourceError
        What was received stays for the next try.
    DmdataError
        If the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with only_process_at(path):
            landing = Landing()
            try:
                plan = None if array.is_local else array.planned(selection)
                if plan is not None and plan.n_requests:
                    key = read_key(array.identity, plan)
                    landing.attach(path.with_name(f"{path.name}.part"), key, plan.wanted_bytes)
                values = array.read(selection, progress=progress, spool=landing)
                with replacing(path, replace=False) as partial:
                    with partial.open("wb") as file:
                        np.lib.format.write_array(file, np.asarray(values), allow_pickle=False)
                    with partial.open("rb") as file:
                        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                landing.discard()
            finally:
                landing.detach()
    except OSError as error:
        if isinstance(error, DmdataError):
            raise
        raise DmdataError(f"{path} cannot be written: {error}; run the same command again to resume") from error
    path.with_name(f"{path.name}.part.bytes").unlink(missing_ok=True)
    return sha256
