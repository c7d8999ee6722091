import io

import numpy as np
import pytest
from PIL import Image

from dmpipeline.report.thumbnails import thumbnails


def image_of(sheet):
    return np.asarray(Image.open(io.BytesIO(sheet)).convert("RGB"))


def place(nth, made):
    row, column = divmod(nth, 40)
    return np.s_[row * made.height : (row + 1) * made.height, column * made.width : (column + 1) * made.width]


def test_small_grey_pictures_are_kept_to_the_pixel_dark_on_light():
    pictures = np.random.default_rng(0).integers(0, 256, (50, 8, 6), np.uint8)
    made = thumbnails(pictures)
    assert (made.width, made.height, made.count, made.shown) == (6, 8, 50, None)
    sheet = image_of(made.sheets[0])
    for nth in (0, 39, 40, 49):
        np.testing.assert_array_equal(sheet[place(nth, made)][..., 0], 255 - pictures[nth])


def test_pictures_of_numbers_from_0_to_1_are_those_of_bytes():
    pictures = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    assert thumbnails(pictures).sheets == thumbnails(pictures / 255).sheets


def test_large_photographs_are_averaged_down_and_look_like_themselves():
    ramp = np.linspace(0, 255, 100).astype(np.uint8)
    photograph = np.stack([np.tile(ramp, (70, 1)), np.tile(ramp[::-1], (70, 1)), np.full((70, 100), 128, np.uint8)], -1)
    made = thumbnails(np.stack([photograph] * 2))
    assert max(made.width, made.height) <= 48
    seen = image_of(made.sheets[0])[place(1, made)].astype(int)
    expected = photograph[: made.height * 3 : 3, : made.width * 3 : 3]
    assert np.abs(seen[2:-2, 2:-2] - expected[: len(seen), : seen.shape[1]][2:-2, 2:-2]).mean() < 12


@pytest.mark.parametrize("n", [1600, 1601])
def test_sheets_hold_1600_each_and_only_those_asked_for(n):
    pictures = np.arange(2000 * 4, dtype=np.float32).reshape(2000, 2, 2) / 8000
    made = thumbnails(pictures, range(n))
    assert len(made.sheets) == 1 + (n > 1600)
    assert made.facts()["shown"] == list(range(n))
