"""FMoW from the folder of WILDS (v1.1), split as the release's customised WILDS split.

WILDS's `time_after_2016` calls in-distribution what was taken before 2013: rows of its metadata's split `train` are its
training set, those of `test` its `id_test`. The release's own `src/fmow.py` in MadryLab/datamodels restricts both to
the year 2012, by one in-distribution mask from year - 4 to year - 3. All else follows
`wilds/datasets/fmow_dataset.py` in p-lambda/wilds. The counts are second-hand; a folder that does not lead to them is
refused.

Decoding takes minutes, so pictures are kept decoded under ``DMDATA_HOME``, where `dmdata cache` counts and clears them.
"""

import csv
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dmdata.atomic import write_whole
from dmdata.home import home
from dmpipeline.data.examples import Dataset, checked_dataset, unusable
from dmpipeline.data.folders import write_array
from dmpipeline.errors import SpecError, explain_missing_extra, explain_os_errors

N_TRAIN, N_TEST = 21_404, 3_138
"""Examples of the release."""

SIDE = 224
"""Pixels along each side of a picture."""

# in WILDS's order: a class is a category's place here
_CATEGORIES = """
    airport airport_hangar airport_terminal amusement_park aquaculture archaeological_site barn border_checkpoint
    burial_site car_dealership construction_site crop_field dam debris_or_rubble educational_institution
    electric_substation factory_or_powerplant fire_station flooded_road fountain gas_station golf_course
    ground_transportation_station helipad hospital impoverished_settlement interchange lake_or_pond lighthouse
    military_facility multi-unit_residential nuclear_powerplant office_building oil_or_gas_facility park
    parking_lot_or_garage place_of_worship police_station port prison race_track railway_bridge recreational_facility
    road_bridge runway shipyard shopping_mall single-unit_residential smokestack solar_farm space_facility stadium
    storage_tank surface_mine swimming_pool toll_booth tower tunnel_opening waste_disposal water_treatment_facility
    wind_farm zoo
"""
_CLASS_OF = {category: label for label, category in enumerate(_CATEGORIES.split())}

_YEAR_BEGINS = datetime(2012, 1, 1, tzinfo=UTC)
_YEAR_ENDS = datetime(2013, 1, 1, tzinfo=UTC)

_EXAMPLE_ORDER = "ascending rows of WILDS's FMoW v1.1 metadata, time_after_2016: train of 2012, id_test of 2012"

# Pictures decoded before they are written: enough to keep every core busy, some 40 MB.
_PICTURES_AT_ONCE = 256

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Split:
    """Rows of the metadata, which number the pictures, and their classes; ascending."""

    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]


def load_fmow(folder: Path, *, n_train: int = N_TRAIN, n_test: int = N_TEST) -> Dataset:
    """Load the release's FMoW: 21,404 and 3,138 uint8 pictures (224, 224, 3), in ascending rows of the metadata.

    Parameters
    ----------
    folder : Path
        WILDS's `fmow_v1.1`, with `rgb_metadata.csv` and `images/rgb_img_0.png` and so on, numbered by row. Only the
        pictures that are used need to be there.
    n_train, n_test : int
        Counts that the metadata is to lead to; tests have fewer.

    Returns
    -------
    Dataset
        Named `fmow`. Its pictures are a read-only memory map of 3.7 GB, made when it is first loaded, and again when a
        picture's size or time changes.

    Raises
    ------
    SpecError
        If the metadata cannot be read or lead to other counts, or a picture is missing or of another size.
    RunError
        If decoded pictures cannot be kept under ``DMDATA_HOME``, or Pillow is not installed.
    """
    train, test = _read_splits(folder, n_train, n_test)
    paths = [folder / "images" / f"rgb_img_{row}.png" for row in (*train.rows.tolist(), *test.rows.tolist())]
    kept = home() / "datasets" / f"fmow-{_key(folder, paths, (train, test))}.npy"
    fingerprint_file = kept.with_suffix(".sha256")
    pictures, fingerprint = _kept_pictures(kept, len(paths)), None
    if pictures is None:
        _log.info("decoding %d pictures of %s into %s", len(paths), folder, kept)
        with explain_os_errors(kept):
            kept.parent.mkdir(parents=True, exist_ok=True)
            fingerprint_file.unlink(missing_ok=True)
            write_array(kept, (len(paths), SIDE, SIDE, 3), np.uint8, _decoded(folder, paths))
        pictures = _kept_pictures(kept, len(paths))
        if pictures is None:
            raise unusable(folder, f"{kept}, its decoded pictures,", "cannot be read back; load the dataset again")
    else:
        fingerprint = _kept_fingerprint(fingerprint_file)
    dataset = checked_dataset(
        "fmow",
        (pictures[: len(train.rows)], train.labels),
        (pictures[len(train.rows) :], test.labels),
        source=folder,
        n_classes=len(_CLASS_OF),
        example_order=_EXAMPLE_ORDER,
        fingerprint=fingerprint,
    )
    if fingerprint is None:
        with explain_os_errors(fingerprint_file):
            write_whole(fingerprint_file, dataset.fingerprint + "\n")
    return dataset


def _read_splits(folder: Path, n_train: int, n_test: int) -> tuple[_Split, _Split]:
    """Rebuild the release's train and id_test from the metadata."""
    examples: dict[str, list[tuple[int, int]]] = {"train": [], "test": []}
    for row, split, category in _rows_of_2012(folder / "rgb_metadata.csv", folder):
        if category not in _CLASS_OF:
            raise unusable(
                folder, f"category {category!r} in row {row}", "is not one of WILDS's 62; get the file again"
            )
        examples[split].append((row, _CLASS_OF[category]))
    found = {split: len(its) for split, its in examples.items()}
    if found != {"train": n_train, "test": n_test}:
        raise unusable(
            folder,
            f"metadata with {found['train']:,} train and {found['test']:,} test rows of 2012",
            f"does not lead to the release's {n_train:,} and {n_test:,}; use rgb_metadata.csv of WILDS's FMoW v1.1",
        )
    return _split_of(examples["train"]), _split_of(examples["test"])


def _rows_of_2012(path: Path, folder: Path) -> Iterator[tuple[int, str, str]]:
    """Read the number, split and category of each row of train and test that was taken in 2012."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            # blank lines are not rows, because pandas, by which WILDS counts, skips them
            rows = (row for row in csv.reader(file) if row)
            header = next(rows, [])
            columns = ("split", "timestamp", "category")
            if missing := [name for name in columns if name not in header]:
                raise unusable(folder, path.name, f"lacks {', '.join(missing)}; get it from WILDS's FMoW v1.1")
            places = [header.index(name) for name in columns]
            for number, row in enumerate(rows):
                if len(row) <= max(places):
                    raise unusable(folder, f"row {number} of {path.name}", "is cut short; get the file again")
                split, timestamp, category = (row[place] for place in places)
                if split in ("train", "test") and _YEAR_BEGINS <= _time_of(timestamp, number, folder) < _YEAR_ENDS:
                    yield number, split, category
    except SpecError:
        raise
    except FileNotFoundError as error:
        raise unusable(folder, "a folder", f"lacks {path.name}; give the path of WILDS's fmow_v1.1") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise unusable(folder, f"{path.name}, {error},", "cannot be read; get it again") from error


def _time_of(timestamp: str, row: int, folder: Path) -> datetime:
    try:
        taken = datetime.fromisoformat(timestamp)
    except ValueError:
        taken = None
    if taken is None or taken.tzinfo is None:
        found = f"timestamp {timestamp!r} in row {row}"
        raise unusable(folder, found, "is to be such as 2012-03-04T05:06:07Z; get the metadata again")
    return taken


def _split_of(examples: list[tuple[int, int]]) -> _Split:
    rows, labels = zip(*examples, strict=True)
    return _Split(np.array(rows, np.int64), np.array(labels, np.int64))


def _key(folder: Path, paths: list[Path], splits: tuple[_Split, _Split]) -> str:
    """Digest what decoded pictures and their fingerprint follow from, without reading a picture."""
    digest = hashlib.sha256(b"fmow 1")
    for split in splits:
        digest.update(f"{len(split.rows)}".encode() + split.rows.tobytes() + split.labels.tobytes())
    missing = []
    for path in paths:
        try:
            facts = path.stat()
        except OSError:
            missing.append(path)
        else:
            digest.update(f"{facts.st_size} {facts.st_mtime_ns};".encode())
    if missing:
        found = f"{missing[0].relative_to(folder)} and {len(missing) - 1:,} more" if missing[1:] else missing[0].name
        raise unusable(folder, f"{found} of {len(paths):,} pictures", "is missing; unpack WILDS's FMoW v1.1 again")
    return digest.hexdigest()[:32]


def _kept_pictures(path: Path, n: int) -> npt.NDArray[np.uint8] | None:
    """Map decoded pictures, if they are there and whole."""
    try:
        pictures = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError):
        return None
    return pictures if pictures.shape == (n, SIDE, SIDE, 3) and pictures.dtype == np.uint8 else None


def _kept_fingerprint(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if re.fullmatch("[0-9a-f]{64}", text) else None


def _decoded(folder: Path, paths: list[Path]) -> Iterator[npt.NDArray[np.uint8]]:
    with explain_missing_extra():
        from PIL import Image  # noqa: F401  (said before any thread starts)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), _PICTURES_AT_ONCE):
            yield from pool.map(lambda path: _picture(folder, path)[None], paths[start : start + _PICTURES_AT_ONCE])


def _picture(folder: Path, path: Path) -> npt.NDArray[np.uint8]:
    from PIL import Image

    found = path.relative_to(folder)
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.size != (SIDE, SIDE):
                size = f"{image.width} x {image.height}"
                raise unusable(folder, f"{found} of {size} pixels", f"is to have {SIDE} x {SIDE}; get it again")
            return np.asarray(image.convert("RGB"))
    except SpecError:
        raise
    # how Pillow refuses damaged files
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise unusable(folder, f"{found}, {error},", "cannot be decoded; get it again") from error
