"""Download an object as it is: resumable, checked, and under its final name only when complete.

Blocks are fetched whole and appended in order to a ``.part`` file; a ``.part.json`` next to it records which object
it is of and the checksum of each block, entered after it was written. An interrupted download is resumed behind the
blocks whose checksums hold and pays only for the block in flight, and for what was damaged on disk meanwhile.
"""

import contextlib
import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from dmdata.atomic import write_whole
from dmdata.copying.spool import take_room
from dmdata.errors import DmdataError, FormatError, IntegrityError, SourceError
from dmdata.layout.formats import NPY_PREFIX_BYTES, Kind, Layout, contents_of, npy_layout
from dmdata.layout.npy import no_warnings
from dmdata.layout.plan import ReadPlan, plan_read
from dmdata.layout.selection import select
from dmdata.objects.address import ObjectState
from dmdata.objects.http.web import whole_object
from dmdata.reading import digests
from dmdata.reading.fetch import LEAST_RANGE_BYTES, MAX_RANGE_BYTES, Transport
from dmdata.reading.locks import only_process_at
from dmdata.reading.progress_bar import shown

Checked: TypeAlias = Kind | Literal["bytes"]
"""How what was downloaded is checked: by its header, or not where it has none."""

START_BYTES: dict[Checked, int] = {"npy": NPY_PREFIX_BYTES, "npz": 1, "pt": 1, "safetensors": 1, "bytes": 1}
"""What is read first, in addition to the object itself: its header, if that is short and in one place."""

_RANGES_AT_ONCE = 8
_BLOCK_BYTES = _RANGES_AT_ONCE * MAX_RANGE_BYTES


def download(
    transport: Transport,
    path: Path,
    *,
    kind: Checked,
    sha256: str | None,
    state: ObjectState | None = None,
    progress: Callable[[int, int], object] | Literal[False] | None,
) -> None:
    """Download an object to a file.

    Parameters
    ----------
    transport : Transport
    path : Path
        Final name; nothing is there before the download is complete and checked.
    kind : {"npy", "npz", "pt", "safetensors", "bytes"}
        What its header must be; "bytes" have none.
    sha256 : str or None
        What its digest must be.
    state : ObjectState, optional
        As the source has just answered, where its header was read before.
    progress : callable, False or None
        Called with bytes complete and bytes in total; with None a bar is shown.

    Raises
    ------
    FormatError, IntegrityError
        If the object is damaged or changed meanwhile; nothing of it is kept.
    BudgetError, AccessError, ObjectMissingError, SourceError
        What is complete stays for the next try.
    """
    part = _Part(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with only_process_at(path):
            try:
                state = _append(transport, kind, state, part, progress)
            except SourceError as error:
                if not error.by_download:
                    raise
                state = _fetch_whole(transport, part, progress)
            if state.encoding:
                kind = "bytes"  # what it holds shows when it is unpacked
            known = digests.recall(transport.address, state)
            is_remote = not transport.address.is_local
            digest = _check(part.path, str(transport.address), kind, sha256 or known, digested=is_remote)
            part.path.replace(path)
            part.about.unlink(missing_ok=True)
            if digest is not None:
                digests.record(transport.address, state, digest)
    except (FormatError, IntegrityError):
        part.discard()
        raise
    except OSError as error:
        if isinstance(error, DmdataError):
            raise
        raise DmdataError(f"{part.path} cannot be written: {error}; run the same again to resume") from error


def _fetch_whole(
    transport: Transport, part: "_Part", progress: Callable[[int, int], object] | Literal[False] | None
) -> ObjectState:
    """Download an object of a web server that does not answer ranges of it, in one request that cannot be resumed."""
    part.discard()
    n_bytes = 0
    with whole_object(transport.address) as whole, part.path.open("wb") as file:
        total = whole.n_bytes or 0
        with shown(transport.artifact, total, lambda: 0.0, wanted=progress is None) as arrived:
            for chunk in whole.chunks:
                file.write(chunk)
                n_bytes += len(chunk)
                if arrived:
                    arrived(len(chunk))
                if progress:
                    progress(n_bytes, max(total, n_bytes))
        return ObjectState(n_bytes, whole.etag)


def _append(
    transport: Transport,
    kind: Checked,
    seen: ObjectState | None,
    part: "_Part",
    progress: Callable[[int, int], object] | Literal[False] | None,
) -> ObjectState:
    """Fetch what is missing of the object that was seen, or, if it has changed since, of what is there now."""
    if seen is not None:
        with contextlib.suppress(IntegrityError):
            _append_missing(transport, seen, part, part.begin(seen), progress)
            return seen
    state = _look_at_start(transport, kind)
    _append_missing(transport, state, part, part.begin(state), progress)
    return state


def _look_at_start(transport: Transport, kind: Checked) -> ObjectState:
    """Learn an object's size and etag; refuse a ``.npy`` whose header does not fit its size before it is paid for."""
    head, state = transport.start(START_BYTES[kind])

    def read_at(start: int, stop: int) -> bytes:
        missing = max(start, len(head))
        return head[start:stop] + (transport.read(missing, stop, etag=state.etag) if stop > missing else b"")

    if kind == "npy" and not state.encoding:
        npy_layout(read_at, object_bytes=state.n_bytes, url=str(transport.address))
    return state


def n_requests_of(n_bytes: int) -> int:
    """Count the requests of a download of `n_bytes`."""
    n_blocks, rest = divmod(n_bytes, _BLOCK_BYTES)
    return n_blocks * _RANGES_AT_ONCE + _plan_block(0, rest, n_bytes=rest).n_requests


def bytes_complete(path: Path) -> int:
    """Count the bytes that an interrupted download to this path has and will not fetch again; reads them."""
    return len(_Part(path).sound_checksums()) * _BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class _Part:
    """A download under way, next to its final name."""

    final: Path

    @property
    def path(self) -> Path:
        return self.final.with_name(self.final.name + ".part")

    @property
    def about(self) -> Path:
        return self.final.with_name(self.final.name + ".part.json")

    def begin(self, state: ObjectState) -> list[int]:
        """Keep what is there of this same object, else begin again; return the checksums of what is kept."""
        about = self._read_about()
        if (about.get("n_bytes"), about.get("etag")) == (state.n_bytes, state.etag):
            checksums = self.sound_checksums()[: state.n_bytes // _BLOCK_BYTES]
        else:
            checksums = []
        if not checksums:
            self.path.write_bytes(b"")
        self.record(state, checksums)
        return checksums

    def record(self, state: ObjectState, checksums: list[int]) -> None:
        """Enter the blocks that are written."""
        write_whole(self.about, json.dumps({"n_bytes": state.n_bytes, "etag": state.etag, "crc32": checksums}))

    def sound_checksums(self) -> list[int]:
        """List the checksums of the leading blocks that are what they were when they were written."""
        sound: list[int] = []
        claimed = self._read_about().get("crc32")
        try:
            with self.path.open("rb") as file:
                for checksum in claimed if isinstance(claimed, list) else []:
                    block = file.read(_BLOCK_BYTES)
                    if len(block) < _BLOCK_BYTES or zlib.crc32(block) != checksum:
                        break
                    sound.append(checksum)
        except OSError:
            pass  # nothing there: nothing is complete
        return sound

    def _read_about(self) -> dict[str, Any]:
        try:
            about = json.loads(self.about.read_text())
        except (OSError, ValueError, RecursionError):
            return {}  # not there, or damaged: the download begins again
        return about if isinstance(about, dict) else {}

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.about.unlink(missing_ok=True)


def _append_missing(
    transport: Transport,
    state: ObjectState,
    part: _Part,
    checksums: list[int],
    progress: Callable[[int, int], object] | Literal[False] | None,
) -> None:
    with part.path.open("r+b") as file:
        # a full disk is noticed before anything is paid for
        take_room(file.fileno(), state.n_bytes)
        # a block cut short by a crash while it was written is fetched again
        done = file.seek(len(checksums) * _BLOCK_BYTES)
        n_missing = state.n_bytes - done
        transport.require_budget(n_bytes=n_missing, n_requests=n_requests_of(n_missing))

        def price() -> float:
            return transport.price_usd(n_missing, n_requests_of(n_missing))

        with shown(transport.artifact, n_missing, price, wanted=progress is None) as arrived:
            while done < state.n_bytes:
                stop = min(done + _BLOCK_BYTES, state.n_bytes)
                plan = _plan_block(done, stop, n_bytes=state.n_bytes)
                data = transport.fetch(plan, etag=state.etag, progress=arrived).data
                file.write(data)
                file.flush()
                done = stop
                if done % _BLOCK_BYTES == 0:
                    checksums.append(zlib.crc32(data))
                    part.record(state, checksums)
                if progress:
                    progress(done, state.n_bytes)


def _plan_block(start: int, stop: int, *, n_bytes: int) -> ReadPlan:
    layout = Layout((n_bytes,), np.dtype(np.uint8), 0, (1,))
    return plan_read(
        layout,
        select(slice(start, stop), layout.shape, orthogonal=False),
        max_gap_bytes=0,
        max_range_bytes=MAX_RANGE_BYTES,
        n_at_once=_RANGES_AT_ONCE,
        least_range_bytes=LEAST_RANGE_BYTES,
    )


def _check(path: Path, url: str, kind: Checked, sha256: str | None, *, digested: bool) -> str | None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if sha256 or digested else None
        if sha256 and digest != sha256:
            raise IntegrityError(
                f"{url} has SHA-256 {digest}; its catalog, or an earlier reading of the same ETag, says {sha256}; "
                "nothing was kept; ask its publisher which is right",
                url=url,
            )
        if kind == "bytes":
            return digest

        def read_at(start: int, stop: int) -> bytes:
            file.seek(start)
            return file.read(stop - start)

        with no_warnings():  # warnings were given before the download
            # of a .npz the directory alone: compressed arrays cannot be read in place, but can be had whole
            contents_of(kind, read_at, object_bytes=path.stat().st_size, url=url, wanted="")
        return digest
