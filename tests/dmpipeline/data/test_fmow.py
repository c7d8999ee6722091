import logging
import os

import numpy as np
import pytest
from PIL import Image

from dmdata.cli.cache import clear, remembered
from dmpipeline.data import fmow
from dmpipeline.data.datasets import load_dataset
from dmpipeline.errors import SpecError

# split, timestamp, category: which rows are of the release is said behind
ROWS = [
    ("train", "2012-01-01T00:00:00Z", "airport"),  # train 0
    ("train", "2011-12-31T23:59:59Z", "zoo"),  # a day too early
    ("seq", "2012-05-05T05:05:05Z", "zoo"),  # sequestered, but counted
    ("test", "2012-02-03T04:05:06Z", "zoo"),  # id_test of 2012
    ("train", "2012-12-31T23:59:59.999Z", "zoo"),  # train 4
    ("val", "2012-06-06T00:00:00Z", "park"),  # id_val
    ("train", "2013-01-01T00:00:00Z", "park"),  # out of distribution
    ("test", "2016-07-08T00:00:00Z", "park"),  # out of distribution
    ("test", "2009-07-08T00:00:00Z", "wind_farm"),  # id_test of another year
    ("train", "2013-01-01T01:30:00+02:00", "multi-unit_residential"),  # train 9, in another zone
    ("test", "2012-09-09T09:09:09Z", "barn"),  # id_test of 2012
]
TRAIN, TEST = [0, 4, 9], [3, 10]


def load(folder, n_train=3, n_test=2):
    return fmow.load_fmow(folder, n_train=n_train, n_test=n_test)


def pixels(row):
    return np.random.default_rng(row).integers(0, 256, (224, 224, 3), np.uint8)


def write_metadata(folder, rows):
    lines = [f'{split},"u,{n}",{time},{category}' for n, (split, time, category) in enumerate(rows)]
    (folder / "rgb_metadata.csv").write_text("\n".join(["split,img_filename,timestamp,category", *lines, ""]))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "fmow_v1.1"
    (folder / "images").mkdir(parents=True)
    write_metadata(folder, ROWS)
    for row in {*TRAIN, *TEST}:
        Image.fromarray(pixels(row)).save(folder / "images" / f"rgb_img_{row}.png", compress_level=0)
    return folder


def kept(home):
    return sorted(path.name for path in (home / "datasets").iterdir())


def test_the_releases_rows_are_taken_in_ascending_order(folder):
    dataset = load(folder)
    assert (dataset.name, dataset.n_train, dataset.n_test, dataset.n_classes) == ("fmow", 3, 2, 62)
    assert (dataset.image_shape, dataset.train_inputs.dtype) == ((224, 224, 3), np.uint8)
    assert dataset.train_labels.tolist() == [0, 61, 30]
    assert dataset.test_labels.tolist() == [61, 6]
    for inputs, rows in ((dataset.train_inputs, TRAIN), (dataset.test_inputs, TEST)):
        assert all((picture == pixels(row)).all() for picture, row in zip(inputs, rows, strict=True))
    assert dataset.example_order.endswith("train of 2012, id_test of 2012")


@pytest.mark.parametrize(("n_train", "n_test"), [(4, 2), (3, 4), (3, 3), (2, 3)])
def test_a_folder_that_does_not_lead_to_the_releases_counts_is_refused(folder, n_train, n_test):
    found = "metadata with 3 train and 2 test rows of 2012"
    with pytest.raises(SpecError, match=f"{found} does not lead to the release's {n_train} and {n_test}"):
        load(folder, n_train, n_test)


def test_a_test_row_of_another_year_is_never_taken_although_the_count_would_fit_with_it(folder):
    write_metadata(folder, [*ROWS[:10], ("test", "2011-09-09T09:09:09Z", "barn")])
    with pytest.raises(SpecError, match="3 train and 1 test rows of 2012"):
        load(folder)
    with pytest.raises(SpecError, match="3 train and 1 test rows of 2012"):
        load(folder, n_test=3)


def test_a_folder_is_held_to_the_releases_own_counts(folder):
    with pytest.raises(SpecError, match="does not lead to the release's 21,404 and 3,138"):
        load_dataset(f"fmow:{folder}")


def test_pictures_are_decoded_and_digested_once(folder, dmdata_home, caplog):
    with caplog.at_level(logging.INFO, "dmpipeline.data.fmow"):
        first = load(folder)
    assert "decoding 5 pictures" in caplog.text
    assert [name.rpartition(".")[2] for name in kept(dmdata_home)] == ["npy", "sha256"]
    for picture in (folder / "images").iterdir():  # of the same size and time, so not known to have changed
        before = picture.stat()
        picture.write_bytes(bytes(before.st_size))
        os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns))
    (kept_digest,) = (dmdata_home / "datasets").glob("*.sha256")
    assert kept_digest.read_text().strip() == first.fingerprint
    kept_digest.write_text("0" * 64)
    second = load(folder)
    assert second.fingerprint == "0" * 64
    assert (second.train_inputs == first.train_inputs).all()
    assert not second.train_inputs.flags.writeable


def test_the_fingerprint_is_that_of_the_arrays_in_any_other_form(folder, tmp_path):
    dataset = load(folder)
    names = ("train_inputs", "train_labels", "test_inputs", "test_labels")
    np.savez(tmp_path / "same.npz", **{name: getattr(dataset, name) for name in names})
    assert load_dataset(str(tmp_path / "same.npz"), as_before=True).fingerprint == dataset.fingerprint


def test_a_changed_picture_is_decoded_again(folder, dmdata_home):
    first = load(folder)
    path = folder / "images" / "rgb_img_4.png"
    before = path.stat()
    Image.fromarray(pixels(99)).save(path, compress_level=0)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert path.stat().st_size == before.st_size
    second = load(folder)
    assert (second.train_inputs[1] == pixels(99)).all()
    assert second.fingerprint != first.fingerprint


def test_a_changed_label_changes_the_fingerprint_though_no_picture_did(folder):
    first = load(folder).fingerprint
    write_metadata(folder, [("train", "2012-01-01T00:00:00Z", "park"), *ROWS[1:]])
    assert load(folder).fingerprint != first


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY"])
def test_damaged_or_missing_remains_of_the_cache_are_made_again(folder, dmdata_home, damage):
    first = load(folder).fingerprint
    for name in kept(dmdata_home):
        path = dmdata_home / "datasets" / name
        for content in (damage, None):
            whole = path.read_bytes()
            path.unlink()  # its maps stay as they were
            if content is not None:
                path.write_bytes(content)
            assert load(folder).fingerprint == first
            assert path.read_bytes() == whole


def test_dmdata_cache_counts_and_clears_decoded_pictures(folder, dmdata_home):
    first = load(folder).fingerprint
    (part,) = [part for part in remembered() if part.folder == "datasets"]
    assert part.n_files == 2
    assert part.n_bytes > 5 * 224 * 224 * 3
    clear()
    assert kept(dmdata_home) == []
    assert load(folder).fingerprint == first


def test_missing_pictures_are_counted_before_any_is_decoded(folder, dmdata_home):
    (folder / "images" / "rgb_img_4.png").unlink()
    with pytest.raises(SpecError, match=r"rgb_img_4\.png of 5 pictures is missing"):
        load(folder)
    (folder / "images" / "rgb_img_10.png").unlink()
    with pytest.raises(SpecError, match=r"images/rgb_img_4\.png and 1 more of 5 pictures"):
        load(folder)


def test_a_picture_that_cannot_be_used_is_named_and_nothing_is_kept(folder, dmdata_home):
    path = folder / "images" / "rgb_img_10.png"
    whole = path.read_bytes()
    Image.fromarray(pixels(10)[:200]).save(path)
    with pytest.raises(SpecError, match=r"rgb_img_10\.png of 224 x 200 pixels is to have 224 x 224"):
        load(folder)
    Image.fromarray(pixels(10)).save(path, format="BMP")
    with pytest.raises(SpecError, match=r"rgb_img_10\.png, .*cannot be decoded"):
        load(folder)
    for content in (b"", whole[:1000], whole[:-5000], whole[:200] + b"\0" * 100 + whole[300:]):
        path.write_bytes(content)
        with pytest.raises(SpecError, match=r"rgb_img_10\.png, .*cannot be decoded"):
            load(folder)
    assert kept(dmdata_home) == []


def test_grey_and_transparent_pictures_become_rgb(folder):
    Image.fromarray(pixels(0)).convert("L").save(folder / "images" / "rgb_img_0.png")
    rgba = np.dstack([pixels(4), np.full((224, 224), 128, np.uint8)])
    Image.fromarray(rgba).save(folder / "images" / "rgb_img_4.png")
    dataset = load(folder)
    assert (dataset.train_inputs[0] == np.asarray(Image.fromarray(pixels(0)).convert("L"))[..., None]).all()
    assert (dataset.train_inputs[1] == pixels(4)).all()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (("train", "2012-13-01T00:00:00Z", "zoo"), "timestamp '2012-13-01T00:00:00Z' in row 11"),
        (("train", "2012-03-01T00:00:00", "zoo"), "timestamp '2012-03-01T00:00:00' in row 11"),
        (("test", "", "zoo"), "timestamp '' in row 11"),
        (("train", "2012-03-01T00:00:00Z", "castle"), "category 'castle' in row 11 is not one of WILDS's 62"),
    ],
)
def test_odd_rows_of_the_metadata_are_named(folder, row, words):
    write_metadata(folder, [*ROWS, row])
    with pytest.raises(SpecError, match=words):
        load(folder)


@pytest.mark.parametrize(
    "row",
    [
        ("seq", "", ""),
        ("val", "soon", "castle"),
        ("train", "2014-01-01T00:00:00Z", "castle"),
        ("test", "2011-01-01T00:00:00Z", "castle"),
    ],
)
def test_rows_that_are_not_of_the_release_may_hold_anything(folder, row):
    write_metadata(folder, [*ROWS, row])
    assert load(folder).n_train == len(TRAIN)


def test_blank_lines_are_no_rows_and_short_ones_are_refused(folder):
    path = folder / "rgb_metadata.csv"
    text = path.read_text()
    path.write_text(text.replace("\n", "\n\n", 3))
    assert load(folder).train_labels.tolist() == [0, 61, 30]
    path.write_text(text + "train,x\n")
    with pytest.raises(SpecError, match=r"row 11 of rgb_metadata\.csv is cut short"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"lacks rgb_metadata\.csv; give the path of WILDS's fmow_v1\.1"),
        (b"", r"rgb_metadata\.csv lacks split, timestamp, category"),
        (b"split,category\n", "lacks timestamp"),
        (b"split,timestamp,category\n\xff\xfe\n", r"rgb_metadata\.csv, .*cannot be read"),
        (b'split,timestamp,category\n"' + b"a" * 200_000, r"rgb_metadata\.csv, .*cannot be read"),
    ],
)
def test_metadata_that_cannot_be_read_is_refused(folder, content, words):
    path = folder / "rgb_metadata.csv"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SpecError, match=words):
        load(folder)
