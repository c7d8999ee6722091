"""Thousands of damaged files of every kind that dmdata reads: each ends in an error of ours, soon, or in what is right.

Each kind starts from small files that are right, damages them a few bytes at a time, and reads them. Whatever is read
must end in a `DmdataError` or in what an independent reader makes of the same bytes; nothing may take long or much
memory. The same damage is done each time, unless ``FUZZ_SEED`` is set; ``FUZZ_CASES`` sets how much of it. One line a
kind is printed when all tests have run.
"""

import contextlib
import importlib
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import sqlite3
import struct
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_release import Pt, npy, pt, pt_pickle, write_locally

import dmdata
from dmdata.catalog.entries import Catalog, load_file
from dmdata.errors import DmdataError, FormatError
from dmdata.layout.formats import (
    Kind,
    Layout,
    TrailingBytesWarning,
    npy_layout,
    npz_arrays,
    pt_layouts,
    safetensors_layouts,
)
from dmdata.money.ledger import Grouping, Ledger, home
from dmdata.money.prices import Destination, quote
from dmdata.objects.address import Address, ObjectState
from dmdata.reading.headers import read_header
from dmdata.settings import config_path
from dmdata.settings import settings as settings_in_force

N_CASES = int(os.environ.get("FUZZ_CASES", "2000"))
SEED = os.environ.get("FUZZ_SEED", "0")
URL = "s3://bucket/damaged"
LONGEST_SECONDS = 10
MOST_MEMORY_BYTES = 256 << 20

# Damage


EXTREMES = (0, 1, 127, 128, 255, 256, 2**15 - 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
EXTREME_TEXTS = [b"-1", b"0", b"4294967296", b"9223372036854775807", b"1e999", b"nan", b"1_0", b"0x10", b"9" * 400]


def damage(rng: random.Random, blob: bytes, tokens: Sequence[bytes] = ()) -> bytes:
    """Do one to four things to some bytes that a broken disk, writer or network might, or an attacker would."""
    damaged = bytearray(blob)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        at = rng.randrange(len(damaged) + 1)
        stop = min(at + rng.choice((1, 2, 4, 8, 30, 200)), len(damaged))
        match rng.randrange(10):
            case 0 | 1 if at < len(damaged):
                damaged[at] ^= 1 << rng.randrange(8)
            case 2 if at < len(damaged):
                damaged[at] = rng.randrange(256)
            case 3:
                del damaged[at:stop]
            case 4:
                damaged[at:at] = rng.randbytes(rng.choice((1, 2, 4, 16, 300)))
            case 5:
                elsewhere = rng.randrange(len(damaged) + 1)
                damaged[at:stop] = damaged[elsewhere : elsewhere + rng.choice((1, 4, 16, 100))]
            case 6:
                width = rng.choice((1, 2, 4, 8))
                number = rng.choice(EXTREMES) & ((1 << 8 * width) - 1)
                damaged[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
            case 7:
                numbers = list(re.finditer(rb"\d+", damaged))
                if numbers:
                    damaged[slice(*rng.choice(numbers).span())] = rng.choice(EXTREME_TEXTS)
            case 8:
                del damaged[at:]
            case _:
                damaged[at:stop] = rng.choice(tokens) if tokens else bytes(stop - at)
    return bytes(damaged)


@dataclass
class Tally:
    """How the cases of one kind ended."""

    kind: str
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    slowest_seconds: float = 0.0
    longest_error: str = ""

    def __str__(self) -> str:
        refusals = ", ".join(f"{name} {count:,}" for name, count in self.refused.most_common()) or "none"
        n_cases = self.accepted + self.refused.total()
        return (
            f"fuzz: {self.kind:<20} {n_cases:>6,} cases, {self.accepted:>5,} right, refused by {refusals}; "
            f"slowest {self.slowest_seconds:.2f} s"
        )


class Fuzz:
    """Runs the cases of one kind and keeps the account."""

    def __init__(self, figures: list[str]) -> None:
        self._figures = figures

    def __call__(
        self,
        kind: str,
        victims: Sequence[bytes],
        attempt: Callable[[bytes], object],
        *,
        n_cases: int = N_CASES,
        tokens: Sequence[bytes] = (),
    ) -> Tally:
        """Damage victims and attempt to read each; an attempt raises if what it reads is wrong."""
        rng = random.Random(f"{kind} {SEED}")  # noqa: S311 - damage that can be done again
        for victim in victims:
            attempt(victim)
        tally, memory_before = Tally(kind), start_of_memory()
        for nth in range(n_cases):
            case = damage(rng, rng.choice(victims), tokens)
            began = time.process_time()
            try:
                attempt(case)
                tally.accepted += 1
            except DmdataError as error:
                tally.refused[type(error).__name__] += 1
                tally.longest_error = max(tally.longest_error, str(error), key=len)
            except BaseException as error:
                error.add_note(f"{kind}, case {nth} of seed {SEED}: {case[:2000]!r}")
                raise
            tally.slowest_seconds = max(tally.slowest_seconds, time.process_time() - began)
        self._figures.append(str(tally))
        assert len(tally.longest_error) < 1000, tally.longest_error
        assert tally.slowest_seconds < LONGEST_SECONDS
        assert most_memory() - memory_before < MOST_MEMORY_BYTES
        return tally


@pytest.fixture
def fuzz(figures: list[str]) -> Fuzz:
    return Fuzz(figures)


def start_of_memory() -> int:
    """Begin to watch the most memory in use; returns what it is now. Linux alone can."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return most_memory()


def most_memory() -> int:
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) << 10 if found else 0


# Objects

VALUES = np.arange(24, dtype=np.float32).reshape(4, 6)
RECORDS = np.ones(3, np.dtype([("a", "u1"), ("at", [("x", "<f4")]), ("rgb", "<i2", (2,)), ("b", "<f8")], align=True))
NPY_TOKENS = [b"'descr'", b"'|O'", b"'<f8'", b"'<M8[ns]'", b"True", b"(", b")", b"{", b"[", b",", b"'''", b"#", b"\\N{"]


def elements(blob: bytes, layout: Layout) -> Any:
    assert 0 <= layout.offset <= layout.stop <= len(blob)
    return np.ndarray(layout.shape, layout.dtype, blob, layout.offset, layout.strides)


def read_npy(blob: bytes) -> None:
    """Read a ``.npy`` and compare with NumPy, which must not refuse what we accept."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrailingBytesWarning)
        layout = npy_layout(lambda start, stop: blob[start:stop], object_bytes=len(blob), url=URL)
    theirs = np.load(io.BytesIO(blob), allow_pickle=False)
    assert (layout.shape, layout.dtype) == (theirs.shape, theirs.dtype)
    assert_same_bits(elements(blob, layout), theirs)


def assert_same_bits(ours: Any, theirs: Any) -> None:
    """Compare all but the padding inside records, which NumPy does not copy."""
    if ours.dtype.names:
        for name in ours.dtype.names:
            assert_same_bits(ours[name], theirs[name])
    else:
        assert ours.tobytes() == theirs.tobytes()


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_damaged_npy_is_refused_or_read_as_numpy_reads_it(fuzz: Fuzz) -> None:
    victims = [npy(VALUES), npy(np.asfortranarray(VALUES) > 3), npy(np.arange(6, dtype=">i2")), npy(np.float16(3))]
    longer = npy(VALUES).replace(b"'shape'", b" " * 64 + b"'shape'").replace(b"\x76\x00", b"\xb6\x00", 1)
    tally = fuzz(".npy headers", [*victims, longer], read_npy, tokens=NPY_TOKENS)
    assert tally.accepted, "damage to the elements alone is nobody's to notice"
    others = [npy(np.array(["2020-01-01", "NaT"], "M8[D]")), npy(np.array(["abc", "d"])), npy(RECORDS)]
    others.append(npy(VALUES).replace(b"(4, 6)", b"(4L, 6L)").replace(b"  \n", b"\n"))
    fuzz(".npy of dates and records", others, read_npy, tokens=[*NPY_TOKENS, b"L", b"6L,", b"('a', '<f4'),", b"[us]"])


PLAIN = st.integers() | st.booleans() | st.none() | st.text(max_size=5) | st.floats() | st.binary(max_size=5)
NESTED = st.recursive(
    PLAIN | st.sampled_from(["<f4", "|b1", "|O"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=6,
)


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=300)
@given(descr=NESTED, fortran=NESTED, shape=NESTED, data=st.binary(max_size=40))
def test_a_npy_header_of_any_values_is_refused_or_read_as_numpy_reads_it(
    descr: object, fortran: object, shape: object, data: bytes
) -> None:
    text = repr({"descr": descr, "fortran_order": fortran, "shape": shape}).encode()
    blob = b"\x93NUMPY\x03\x00" + struct.pack("<I", len(text)) + text + data
    try:
        read_npy(blob)
    except FormatError as error:
        assert error.url == URL  # noqa: PT017 - either outcome is right


def read_npz(blob: bytes) -> None:
    """Read a ``.npz`` and compare each array with its member, by Python's own zip reader and NumPy's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arrays = npz_arrays(lambda start, stop: blob[start:stop], object_bytes=len(blob), url=URL)
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            for name, layout in arrays.layouts.items():
                try:
                    theirs = np.load(io.BytesIO(archive.read(f"{name}.npy")))
                except zipfile.BadZipFile:
                    continue  # its elements are damaged, which nobody can notice without reading them all
                assert_same_bits(elements(blob, layout), theirs)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::SyntaxWarning")
def test_a_damaged_npz_is_refused_or_read_as_its_zip_is(fuzz: Fuzz) -> None:
    whole, compressed = io.BytesIO(), io.BytesIO()
    np.savez(whole, weight=VALUES, bias=VALUES[0], masks=VALUES > 3)
    np.savez_compressed(compressed, weight=VALUES)
    tokens = [b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"weight.npy", b"\xff" * 4]
    with pytest.raises(FormatError, match="compressed"):
        read_npz(compressed.getvalue())
    fuzz(".npz archives", [whole.getvalue()], read_npz, tokens=[*tokens, *NPY_TOKENS])


SAFE_HEADER = (
    b'{"__metadata__":{"format":"pt"},"weight":{"dtype":"F32","shape":[4,6],"data_offsets":[0,96]},'
    b'"bias":{"dtype":"BF16","shape":[6],"data_offsets":[96,108]},"e":{"dtype":"F8_E5M2","shape":[0],'
    b'"data_offsets":[108,108]}}  '
)


def read_safetensors(blob: bytes) -> None:
    """Read a ``.safetensors`` and compare with its header; what is accepted fills the file exactly."""
    layouts = safetensors_layouts(lambda start, stop: blob[start:stop], object_bytes=len(blob), url=URL)
    n_header = int.from_bytes(blob[:8], "little")
    said = json.loads(blob[8 : 8 + n_header])
    assert set(layouts) == set(said) - {"__metadata__"}
    for name, layout in layouts.items():
        start, stop = said[name]["data_offsets"]
        assert (layout.offset, layout.stop) == (8 + n_header + start, 8 + n_header + stop)
        assert layout.decode(elements(blob, layout)).shape == tuple(said[name]["shape"])
    assert sum(layout.n_bytes for layout in layouts.values()) == len(blob) - 8 - n_header


def test_a_damaged_safetensors_is_refused_or_read_as_its_header_says(fuzz: Fuzz) -> None:
    victim = len(SAFE_HEADER).to_bytes(8, "little") + SAFE_HEADER + VALUES.tobytes() + bytes(12)
    tokens = [
        b'"F64"',
        b'"shape":[]',
        b"null",
        b"NaN",
        b"Infinity",
        b"[",
        b"{",
        b'"',
        b"\\ud800",
        b"1e2",
        b"-0",
        b"true",
    ]
    tally = fuzz(".safetensors headers", [victim], read_safetensors, tokens=tokens)
    assert tally.accepted, "damage to the elements alone is nobody's to notice"


MEMBERS = {"weight": VALUES, "bias": VALUES[0], "lam": VALUES[1, :2]}


def read_pt(blob: bytes) -> None:
    """Read a ``.pt`` and compare each tensor with the member of its storage, by Python's own zip reader."""
    layouts = pt_layouts(lambda start, stop: blob[start:stop], object_bytes=len(blob), url=URL)
    with zipfile.ZipFile(io.BytesIO(blob)) as archive:
        names = [name for name in archive.namelist() if re.search("/data/[^/]+$", name)]
        stored = []
        for name in names:
            try:
                stored.append(archive.read(name))
            except zipfile.BadZipFile:
                continue  # its elements are damaged, which nobody can notice without reading them all
        for layout in layouts.values():
            ours = elements(blob, layout).tobytes("A")
            assert len(stored) < len(names) or any(ours in content for content in stored)


def unseekable_pt() -> bytes:
    """Write a ``.pt`` as torch does: sizes and checksums behind each member."""

    class Unseekable(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: Any) -> int:
            raise io.UnsupportedOperation

        def tell(self) -> int:
            raise io.UnsupportedOperation

    whole = Unseekable()
    with zipfile.ZipFile(io.BytesIO(pt(MEMBERS))) as old, zipfile.ZipFile(whole, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return whole.getvalue()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Duplicate name:UserWarning")
def test_a_damaged_pt_is_refused_or_read_as_its_zip_is(fuzz: Fuzz) -> None:
    tokens = [b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"data.pkl", b"\xff" * 4]
    fuzz(".pt archives", [pt(MEMBERS), unseekable_pt()], read_pt, tokens=tokens)


def zipped_again(pickled: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(pt(MEMBERS))) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, pickled if info.filename.endswith("data.pkl") else old.read(info))
    return buffer.getvalue()


def checkpoint_pickle() -> bytes:
    """Write the pickle of nested dicts and lists around tensors, with numbers, a state to build, and plain objects."""
    inner = pt_pickle({name: values.shape for name, values in MEMBERS.items()})[2:-1]
    built = b"ccollections\nOrderedDict\n)R}X\x09\x00\x00\x00_metadataNsb"
    plain = b"](K\x03G?\xe0\x00\x00\x00\x00\x00\x00NX\x01\x00\x00\x00ae"
    size = b"ctorch\nSize\n(K\x01K\x02t\x85R"
    return b"\x80\x02}(X\x05\x00\x00\x00modelq\x10" + inner + b"K\x07" + built + b"N" + plain + b"K\x08" + size + b"u."


# Python's own pickletools warns about odd text that it decodes for us
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")
def test_a_damaged_pickle_with_a_good_checksum_is_refused_or_names_what_is_there(fuzz: Fuzz) -> None:
    tokens = [bytes([instruction]) for instruction in b"R\x93\x94t\x85suQ(.02"]
    tokens += [b"cposix\nsystem\n", b"cbuiltins\neval\n", b"\x8a\xff" + b"\x7f" * 255, b"h\x00", b"F1e999\n"]
    tokens += [b"\x95" + b"\xff" * 8, b"X\xff\xff\xff\x7f"]
    victim = pt_pickle({name: values.shape for name, values in MEMBERS.items()})
    fuzz("pickles", [victim], lambda pickled: read_pt(zipped_again(pickled)), tokens=tokens)
    fuzz("checkpoint pickles", [checkpoint_pickle()], lambda pickled: read_pt(zipped_again(pickled)), tokens=tokens)


@settings(max_examples=200)
@given(NESTED, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_a_pickle_of_plain_values_alone_is_refused(values: object, protocol: int) -> None:
    with pytest.raises(FormatError):
        read_pt(zipped_again(pickle.dumps(values, protocol)))


# Catalogs

NAME = "toy/50pct/test_margins"


def read_catalog(file: Path) -> None:
    """Read a catalog; what is accepted must mean the same when it is written and read again."""
    catalog = load_file(file)
    assert Catalog.parse(catalog.dump(), origin=str(file)) == catalog
    for artifact in catalog.artifacts(members=True):
        assert catalog.find(artifact.name) == artifact
        assert ".." not in artifact.url.split("/")
        assert artifact.url.startswith(catalog.source.url.rstrip("/"))


def test_a_damaged_catalog_is_refused_or_means_the_same_when_written_again(fuzz: Fuzz, tmp_path: Path) -> None:
    path = Path(write_locally({NAME: VALUES, "toy/50pct/test_datamodels": Pt(pt(MEMBERS), MEMBERS)}, tmp_path))

    def attempt(text: bytes) -> None:
        path.write_bytes(text)
        read_catalog(path)

    texts = "&a |*a|<<: |!!python/object:os.system |!!binary |!!timestamp |..|/|null|.inf|.nan|- |: |? |{|[|2001-01-01"
    tokens = [text.encode() for text in (*texts.split("|"), "0o17", "%YAML 9.9\n", "\t", "\u2028")]
    fuzz("catalogs", [path.read_bytes()], attempt, tokens=tokens)


def test_damaged_settings_are_refused_or_hold_prices_that_can_be_paid(fuzz: Fuzz) -> None:
    config_path().parent.mkdir(parents=True)
    text = b"max_cost: 5\nto: internet\nprices: {usd_per_get: 0.0000004, internet_tiers: [[100, 0.09], [.inf, 0.05]]}\n"

    def attempt(damaged: bytes) -> None:
        config_path().write_bytes(damaged)
        limit = settings_in_force().max_cost
        assert limit is None or limit >= 0
        assert 0 <= quote(1 << 30, 1000, Destination.INTERNET).usd < math.inf

    tokens = [b"-1", b".inf", b".nan", b"null", b"[]", b"{}", b"&a ", b"*a", b"!!binary ", b"1e999", b"0x10"]
    fuzz("settings", [text], attempt, tokens=tokens)


# What dmdata itself has written

JSON_TOKENS = [b"null", b"[]", b"{}", b'"', b"<f8", b"true", b"1e999"]


def test_a_damaged_ledger_is_refused_or_goes_on_counting(fuzz: Fuzz) -> None:
    books = Ledger(home())
    kept: dict[str, Any] = {"artifact": NAME, "destination": "internet"}
    for nth in range(5):
        reservation = books.reserve(usd=0.01, n_bytes=1000, n_requests=1, **kept)
        if nth:
            reservation.settle(usd=0.01, n_bytes=1000, n_requests=1)
    with books.transaction() as connection:  # as of a process that was killed, so that it must be closed
        connection.execute("UPDATE reading SET process = 'elsewhere:1:1', at = 0 WHERE state = 'reserved'")
        connection.execute("UPDATE reading SET state = 'reserved' WHERE rowid = 2")
    victim = books.path.read_bytes()

    def attempt(blob: bytes) -> None:
        for path in home().iterdir():
            path.unlink()
        books.path.write_bytes(blob)
        before = books.spent().get("total")
        for by in get_args(Grouping):
            books.spent(by=by)
        books.check(usd=0.001, artifact=NAME)
        books.reserve(usd=0.25, n_bytes=7, n_requests=1, **kept).settle(usd=0.25, n_bytes=7, n_requests=1)
        after = books.spent()["total"]
        with contextlib.closing(sqlite3.connect(books.path)) as connection:
            if connection.execute("PRAGMA quick_check").fetchone() != ("ok",):
                return  # rows that overlap, which SQLite notices only when all of the file is looked through
        assert after.usd == pytest.approx((before.usd if before else 0.0) + 0.25)
        assert after.n_bytes == (before.n_bytes if before else 0) + 7

    tokens = [b"reserved", b"settled", b"lost", b"month:2026-01", b"CREATE TRIGGER", b"NULL", b"\xff" * 9, b"[]", b"{"]
    fuzz("ledgers", [victim], attempt, tokens=tokens)


@dataclass(frozen=True)
class InMemory:
    """Stands for the transport of an object that costs a request to look at."""

    address: Address
    content: bytes

    def start(self, n_bytes: int) -> tuple[bytes, ObjectState]:
        return self.content[:n_bytes], ObjectState(len(self.content), '"etag"', charged=True)

    def read(self, start: int, stop: int, *, etag: str | None) -> bytes:
        assert etag == '"etag"'
        return self.content[start:stop]


def test_a_damaged_memory_of_a_header_never_says_what_the_object_does_not(fuzz: Fuzz) -> None:
    blobs: dict[Kind, bytes] = {"npy": npy(RECORDS), "pt": pt(MEMBERS)}
    objects: dict[Kind, Any] = {kind: InMemory(Address(f"s3://b/x.{kind}"), blob) for kind, blob in blobs.items()}
    true = {kind: read_header(body, kind=kind) for kind, body in objects.items()}
    files = sorted((home() / "headers").iterdir())
    assert len(files) == 2

    def attempt(blob: bytes) -> None:
        for path in files:
            path.write_bytes(blob)
        for kind, body in objects.items():
            assert read_header(body, kind=kind) == true[kind]

    fuzz("header memories", [path.read_bytes() for path in files], attempt, tokens=JSON_TOKENS)


def test_a_damaged_part_of_a_download_never_ends_in_another_file(
    fuzz: Fuzz, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("dmdata.copying.download"), "_BLOCK_BYTES", 1000)
    values = np.random.default_rng(0).random((10, 61))
    catalog = dmdata.load_catalog(write_locally({NAME: values}, tmp_path / "release"))
    path = tmp_path / "x.npy"

    def stop_half_way(done: int, total: int) -> None:
        if done > total / 2:
            raise InterruptedError("enough")

    with pytest.raises(DmdataError):
        dmdata.get(NAME, path, catalog=catalog, progress=stop_half_way)
    parts = [(part, part.read_bytes()) for part in sorted(tmp_path.glob("x.npy.part*"))]
    assert len(parts) == 2
    n_kept = [0]

    def attempt(blob: bytes) -> None:
        for part, content in parts:
            part.write_bytes(content)
        nth, damaged = which(blob)
        parts[nth % 2][0].write_bytes(damaged)
        path.unlink(missing_ok=True)
        seen: list[int] = []
        dmdata.get(NAME, path, catalog=catalog, progress=lambda done, _: seen.append(done))
        n_kept[0] += len(seen) < 5
        assert path.read_bytes() == npy(values)
        assert not [part for part, _ in parts if part.exists()]

    victims = [bytes([nth]) + content for nth, (_, content) in enumerate(parts)]
    fuzz("download parts", victims, attempt, n_cases=N_CASES // 2, tokens=JSON_TOKENS)
    assert n_kept[0], "what is complete is kept"


def which(blob: bytes) -> tuple[int, bytes]:
    """Take apart a case of several files: which of them is damaged, and what it holds now."""
    return (blob[0], blob[1:]) if blob else (0, b"")


def test_a_damaged_mirror_is_refused_or_goes_on_to_what_verify_can_judge(fuzz: Fuzz, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(-99, 99, (64, 50), np.int16)
    np.save(tmp_path / "x.npy", values)
    array = dmdata.open(tmp_path / "x.npy")
    whole, place = tmp_path / "whole.zarr", tmp_path / "m.zarr"

    def stop_half_way(done: Any) -> None:
        if done.n_rows > 30:
            raise InterruptedError("enough")

    with pytest.raises((DmdataError, InterruptedError)):
        array.mirror(whole, memory_bytes=3200, progress=stop_half_way)
    files = sorted(path for path in whole.rglob("*") if path.is_file())
    contents = {path: path.read_bytes() for path in files}

    def attempt(blob: bytes) -> None:
        nth, damaged = which(blob)
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(whole, place)
        (place / files[nth % len(files)].relative_to(whole)).write_bytes(damaged)
        copy = array.mirror(place, memory_bytes=3200)
        try:
            same = np.array_equal(np.asarray(copy[...]), values)
        except (ValueError, RuntimeError, OSError, TypeError, SystemError):
            same = False  # a chunk that Zarr itself refuses
        assert same or not all(found.is_same for found in dmdata.verify(place))

    victims = [bytes([nth]) + contents[path] for nth, path in enumerate(files)]
    fuzz("mirrors", victims, attempt, n_cases=N_CASES // 10, tokens=[*JSON_TOKENS, b"digests", b"codecs"])


def test_the_summary_counts_what_happened() -> None:
    tally = Tally("pickles", accepted=2, refused=Counter({"FormatError": 5}), slowest_seconds=0.25)
    assert re.search(r"pickles +7 cases, +2 right, refused by FormatError 5; slowest 0.25 s", str(tally))
