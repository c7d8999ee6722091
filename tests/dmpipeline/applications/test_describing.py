"""Examples in a terminal: pictures in shades of gray, tables by their columns."""

import numpy as np

from dmpipeline import load_dataset
from dmpipeline.applications.describing import example_in_words, shades
from dmpipeline.data.examples import checked_dataset


def test_a_small_picture_is_drawn_a_line_a_row_of_pixels():
    dataset = load_dataset("digits")
    picture = dataset.train_inputs[0].reshape(8, 8)
    lines = shades(dataset, dataset.train_inputs[0])
    assert [len(line) for line in lines] == [16] * 8
    brightest, darkest = (np.unravel_index(place, (8, 8)) for place in (picture.argmax(), picture.argmin()))
    assert lines[brightest[0]][2 * brightest[1]] == "█"
    assert lines[darkest[0]][2 * darkest[1]] == " "
    assert example_in_words(dataset, dataset.train_inputs[0]) == ""


def test_large_and_coloured_pictures_are_averaged_down_and_a_blank_one_is_blank():
    pictures = np.random.default_rng(0).integers(0, 256, (6, 32, 40, 3), np.uint8)
    pictures[0] = 7
    dataset = checked_dataset(
        "pictures", (pictures, np.arange(6) % 2), (pictures, np.arange(6) % 2), source="here", example_order="as made"
    )
    lines = shades(dataset, pictures[1])
    assert len(lines) <= 12
    assert len({len(line) for line in lines}) == 1
    assert set("".join(shades(dataset, pictures[0]))) == {" "}


def test_a_table_has_no_picture_but_its_first_columns():
    rows = np.arange(24, dtype=np.float32).reshape(4, 6)
    dataset = checked_dataset(
        "rows", (rows, np.array([0, 1, 0, 1])), (rows, np.array([0, 1, 0, 1])), source="here", example_order="as made"
    )
    assert shades(dataset, rows[0]) == []
    assert example_in_words(dataset, rows[1]) == "column 0: 6, column 1: 7, column 2: 8, column 3: 9, column 4: 10, ..."


def test_a_flat_picture_is_drawn_flat():
    rows = np.random.default_rng(0).random((4, 1, 64)).astype(np.float32)
    dataset = checked_dataset(
        "series", (rows, np.array([0, 1, 0, 1])), (rows, np.array([0, 1, 0, 1])), source="here", example_order="as made"
    )
    assert len(shades(dataset, rows[0])) <= 1


def test_of_a_row_that_is_mostly_zero_the_largest_values_are_named():
    rows = np.zeros((2, 12), np.float32)
    rows[:, [3, 7, 9]] = 0.25, 0.5, -1
    words = tuple(f"word{i}" for i in range(12))
    dataset = checked_dataset(
        "own",
        (rows, np.arange(2)),
        (rows, np.arange(2)),
        source="own",
        example_order="as drawn",
        feature_names=words,
    )
    assert example_in_words(dataset, rows[0]) == "word9 -1, word7 0.5, word3 0.25"
