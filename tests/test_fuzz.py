"""Thousands of damaged files of each kind end in an answer or in our own errors, soon, and never in anything else.

The cases are drawn from a fixed seed; ``DMDATA_FUZZ_CASES`` sets how many of each kind (1,500 by default), and
``DMDATA_FUZZ_SEED`` others. The figures are printed at the end of the session.
"""

import io
import os
import sqlite3
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from figures import FIGURES
from servers.loopback import LoopbackS3
from small_release import document, npy, publish

import dmdata
from dmdata.catalog import Catalog
from dmdata.errors import DmdataError
from dmdata.formats import Layout, npy_layout, pt_layouts
from dmdata.ledger import Ledger, home
from dmdata.settings import config_path, settings

N_CASES = int(os.environ.get("DMDATA_FUZZ_CASES", "1500"))
SEED = int(os.environ.get("DMDATA_FUZZ_SEED", "0"))
LONGEST_SECONDS = 5.0
NAME = "toy/50pct/test_margins"
VALUES = np.arange(600, dtype=np.float16).reshape(30, 20)
EXTREMES = [0, 1, 0x7F, 0x80, 0xFF]

# a dict of two tensors as torch 2 saves it, so that the kind is fuzzed where torch is not installed, too
PICKLE = (
    b"\x80\x02}q\x00(X\x06\x00\x00\x00weightq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02((X\x07\x00\x00\x00storageq\x03"
    b"ctorch\nFloatStorage\nq\x04X\x01\x00\x00\x000q\x05X\x03\x00\x00\x00cpuq\x06K\x0ctq\x07QK\x00K\x03K\x04\x86q\x08K\x04"
    b"K\x01\x86q\t\x89ccollections\nOrderedDict\nq\n)Rq\x0btq\x0cRq\rX\x04\x00\x00\x00biasq\x0eh\x02((h\x03h\x04X\x01\x00"
    b"\x00\x001q\x0fh\x06K\x04tq\x10QK\x00K\x04\x85q\x11K\x01\x85q\x12\x89h\n)Rq\x13tq\x14Rq\x15u."
)


def pt(pickle: bytes = PICKLE) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("x/data.pkl", pickle)
        archive.writestr("x/byteorder", b"little")
        archive.writestr("x/data/0", np.arange(12, dtype=np.float32).tobytes())
        archive.writestr("x/data/1", np.arange(4, dtype=np.float32).tobytes())
        archive.writestr("x/version", b"3\n")
    return buffer.getvalue()


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Flip, insert, remove, repeat, cut or exchange a few bytes."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        if not data:
            break
        at, length = int(rng.integers(len(data))), int(rng.integers(1, 9))
        match int(rng.integers(8)):
            case 0:
                data[at] ^= 1 << int(rng.integers(8))
            case 1:
                data[at] = EXTREMES[int(rng.integers(len(EXTREMES)))]
            case 2:
                data[at:at] = rng.bytes(length)
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = data[at : at + length]
            case 5:
                del data[at:]
            case 6:
                data[at : at + length] = b"\xff" * length
            case 7:
                other = int(rng.integers(len(data)))
                here, there = data[at : at + length], data[other : other + length]
                data[at : at + length], data[other : other + length] = there, here
    return bytes(data)


def fuzz(request: pytest.FixtureRequest, kind: str, content: bytes, use: Callable[[bytes], object], *, n: int) -> None:
    """Hand damaged contents to `use`; anything but an answer or a `DmdataError`, or a long wait, fails."""
    rng = np.random.default_rng([SEED, *kind.encode()])
    ends: Counter[str] = Counter()
    for case in range(n):
        data = damaged(content, rng)
        began = time.monotonic()
        try:
            use(data)
            end = "answered"
        except DmdataError as error:
            end = type(error).__name__ if str(error) else "an error without words"
        except BaseException as error:  # noqa: BLE001 - what must not happen is shown with its case
            pytest.fail(f"case {case} of {kind} ended in {error!r}; it is {data!r}"[:3000])
        ends[end] += 1
        assert time.monotonic() - began < LONGEST_SECONDS, f"case {case} of {kind} took too long; it is {data!r}"[:3000]
    assert not ends["an error without words"]
    figures = ", ".join(f"{name} {count:,}" for name, count in ends.most_common())
    request.config.stash[FIGURES].append(f"fuzz, {kind}: {n:,} cases: {figures}")


def reader(data: bytes) -> Callable[[int, int], bytes]:
    return lambda start, stop: data[start:stop]


def check_layout(layout: Layout, data: bytes) -> None:
    assert 0 <= layout.offset <= layout.stop <= len(data)
    assert len(layout.shape) == len(layout.strides)


def test_npy_headers(request: pytest.FixtureRequest) -> None:
    content = npy(VALUES)[:128] + bytes(VALUES.nbytes)

    def use(data: bytes) -> None:
        check_layout(npy_layout(reader(data), object_bytes=len(data), url="x.npy"), data)

    fuzz(request, "npy, anywhere", content, use, n=N_CASES)
    body = bytes(VALUES.nbytes)
    fuzz(request, "npy, its header", content[:128], lambda data: use(data + body), n=N_CASES)
    text = b"{'descr': '<f2', 'fortran_order': False, 'shape': (30, 20), }"

    def dressed(data: bytes) -> None:
        padded = data.ljust(117)[:65_000] + b"\n"
        use(b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + body)

    fuzz(request, "npy, its facts", text, dressed, n=N_CASES)


def test_zips_and_pickles(request: pytest.FixtureRequest) -> None:
    def use(data: bytes) -> None:
        for layout in pt_layouts(reader(data), object_bytes=len(data), url="x.pt").values():
            check_layout(layout, data)

    use(pt())
    fuzz(request, "pt, anywhere", pt(), use, n=N_CASES)
    fuzz(request, "pt, its pickle", PICKLE, lambda data: use(pt(data)), n=N_CASES)


def test_catalogs(request: pytest.FixtureRequest) -> None:
    import yaml

    about = yaml.safe_dump(document({NAME: VALUES}, url="s3://bucket", requester_pays=True), sort_keys=False)

    def use(data: bytes) -> None:
        text = data.decode("utf-8", errors="replace")
        for artifact in Catalog.parse(text, origin="s3://x/catalog.yaml").artifacts():
            assert ".." not in artifact.stored.key

    fuzz(request, "catalogs", about.encode(), use, n=N_CASES)


def test_ledgers(request: pytest.FixtureRequest) -> None:
    books = Ledger(home())
    books.reserve(usd=0.1, n_bytes=1, n_requests=1, artifact="a", destination="internet").settle(
        usd=0.1, n_bytes=1, n_requests=1
    )
    with sqlite3.connect(books.path) as connection:
        connection.execute("VACUUM")
    connection.close()
    content = books.path.read_bytes()

    def use(data: bytes) -> None:
        for beside in books.path.parent.glob("ledger.sqlite*"):
            beside.unlink()
        books.path.write_bytes(data)
        spent = books.spent(by="artifact")
        books.reserve(usd=1e-6, n_bytes=1, n_requests=1, artifact="a", destination="internet").settle(
            usd=1e-6, n_bytes=1, n_requests=1
        )
        for part in spent.values():
            assert isinstance(part.usd, float)

    fuzz(request, "ledgers", content, use, n=max(N_CASES // 5, 1))


def test_settings_files(request: pytest.FixtureRequest) -> None:
    config_path().parent.mkdir(parents=True)
    text = b"max_cost: 5\nto: internet\nprices: {usd_per_get: 0.0000004, internet_tiers: [[100, 0.09], [.inf, 0.05]]}\n"

    def use(data: bytes) -> None:
        config_path().write_bytes(data)
        settings()

    fuzz(request, "settings", text, use, n=N_CASES)


def test_remembered_headers(request: pytest.FixtureRequest, s3: LoopbackS3, tmp_path: Path) -> None:
    catalog = publish(s3, {NAME: VALUES}, tmp_path)
    dmdata.open(NAME, catalog=catalog)
    (memory,) = (home() / "headers").glob("*.json")

    def use(data: bytes) -> None:
        memory.write_bytes(data)
        with dmdata.budget(usd=1):
            array = dmdata.open(NAME, catalog=catalog)
        assert (array.shape, array.dtype, array.layout.offset) == (VALUES.shape, VALUES.dtype, 128)

    fuzz(request, "header memories", memory.read_bytes(), use, n=max(N_CASES // 5, 1))
